// Broken tokenizer files, seeds fixed: whatever a file holds, loading it succeeds or throws a typed error that names
// the file, and a tokenizer that loads encodes and decodes whatever it is given.

#include <headfold/tokenizer/tokenizer.h>
#include <headfold/tokenizer/utf8.h>

#include <cstring>

#include "hostile.h"

namespace headfold::tokenizer {
namespace {

using namespace testing_support;

fs::path demo(const char* model) {
  return source_folder() / "demo/models" / model;
}

/// Texts of every kind: plain, full of spaces and special tokens, random characters, zeros, broken UTF-8.
std::vector<std::string> texts(std::uint64_t seed) {
  std::vector<std::string> all = {"",
                                  " ",
                                  "the thesis",
                                  "  the \xE2\x96\x81 </s><s>the<mask>  end\n\n",
                                  std::string("a\0b\0\0the", 8),
                                  std::string(300, 't') + std::string(40, ' '),
                                  "\xE2\x96\x81\xE2\x96\x81h\xF0\x9F\x90\x88\xEF\xBF\xBF",
                                  "<0x41><0xFF><unk>",
                                  "caf\xE9",
                                  "\xED\xA0\x80",
                                  "\xF4\x90\x80\x80",
                                  "t\xE2\x96"};
  std::mt19937_64 random(seed);
  for (int i = 0; i < 4; ++i) {
    std::string bytes(random() % 70, ' ');
    for (char& byte : bytes) byte = static_cast<char>(random());
    all.push_back(bytes);
    all.push_back(replace_invalid_utf8(bytes));
  }
  return all;
}

/// Encodes and decodes; what may be thrown is an InputError.
void exercise(const Tokenizer& tokenizer, const std::vector<std::string>& all) {
  const std::int64_t size = tokenizer.vocab_size();
  ASSERT_GT(size, 0);
  ASSERT_TRUE(tokenizer.bos() >= -1 && tokenizer.bos() < size && tokenizer.eos() >= -1 && tokenizer.eos() < size);
  for (const std::string& text : all) {
    const bool sound = invalid_utf8_at(text) == std::string_view::npos;
    try {
      const auto ids = tokenizer.encode(text);
      ASSERT_TRUE(sound) << "broken UTF-8 was taken";
      ASSERT_LE(ids.size(), 32 * text.size() + 32);
      for (const std::int64_t id : ids) ASSERT_TRUE(id >= 0 && id < size) << id;
      ASSERT_EQ(tokenizer.encode(text), ids) << "the second time, from the cache";
      ASSERT_EQ(invalid_utf8_at(tokenizer.decode(ids)), std::string_view::npos);
    } catch (const InputError&) {
    }
  }
  for (const std::int64_t id : {std::int64_t{-1}, size, INT64_MIN, INT64_MAX})
    ASSERT_THROW(tokenizer.decode({id}), InputError);
  std::vector<std::int64_t> ids;
  for (std::int64_t i = 0; i < 40; ++i) ids.push_back((i * 7919) % size);
  try {
    ASSERT_EQ(invalid_utf8_at(tokenizer.decode(ids)), std::string_view::npos);
  } catch (const InputError&) {  // numbers that no token has
  }
}

/// A model folder of which one file changes.
class Folder {
 public:
  explicit Folder(const std::string& file) : file_(file), outcomes(file) {}
  void add(const std::string& name, const std::string& content) { put(folder_ / name, content); }
  void load(const std::string& content, const std::string& what) {
    put(folder_ / file_, content);
    outcomes.run(what, [&] { exercise(*load_tokenizer(folder_.path()), texts_); });
  }

 private:
  ScratchFolder folder_;
  MemoryLid lid_;
  std::string file_;
  std::vector<std::string> texts_ = texts(5);

 public:
  Outcomes outcomes;
};

// ----------------------------------------------------------------------------------------------------------
// SentencePiece
// ----------------------------------------------------------------------------------------------------------

std::string varint(std::uint64_t value) {
  std::string bytes;
  for (; value >= 0x80; value >>= 7) bytes.push_back(static_cast<char>(value | 0x80));
  return bytes + static_cast<char>(value);
}
std::string field(std::uint64_t number, unsigned type, const std::string& content) {
  return varint(number << 3 | type) + (type == 2 ? varint(content.size()) : "") + content;
}
std::string piece(const std::string& text, float score, std::uint64_t type) {
  std::string bits(4, '\0');
  std::memcpy(bits.data(), &score, 4);
  return field(1, 2, field(1, 2, text) + field(2, 5, bits) + (type == 1 ? "" : field(3, 0, varint(type))));
}
/// A small whole model; `extra` goes between the pieces and the specifications.
std::string small_model(bool bytes, const std::string& extra = {}) {
  std::string model = piece("<unk>", 0, 2) + piece("<s>", 0, 3) + piece("</s>", 0, 3);
  for (int value = 0; bytes && value < 256; ++value) model += piece(fmt::format("<0x{:02X}>", value), 0, 6);
  float score = 0;
  for (const char* text :
       {"th", "\xE2\x96\x81t", "\xE2\x96\x81the", "he", "the", "es", "\xE2\x96\x81", "t", "h", "e", "s"})
    model += piece(text, score -= 1, 1);
  return model + extra + field(2, 2, field(3, 0, varint(2)) + (bytes ? field(35, 0, varint(1)) : "")) +
         field(3, 2, field(3, 0, varint(1)) + field(4, 0, varint(0)) + field(5, 0, varint(1)));
}

TEST(TokenizerFuzz, sentencepiece_cut_short) {
  Folder folder("tokenizer.model");
  const std::string small = small_model(false), whole = read_file(demo("prose-llama") / "tokenizer.model");
  folder.load(small, "small");
  folder.load(small_model(true), "small with bytes");
  folder.load(whole, "the demo's");
  ASSERT_EQ(folder.outcomes.opened, 3);
  for (std::size_t length = 0; length < small.size(); ++length)
    folder.load(small.substr(0, length), fmt::format("{} bytes of the small one", length));
  for (std::size_t length = 0; length < whole.size(); length += 1009)
    folder.load(whole.substr(0, length), fmt::format("{} bytes of the demo's", length));
  EXPECT_EQ(folder.outcomes.opened, 3) << "a part passed for the whole";
}

TEST(TokenizerFuzz, sentencepiece_changed) {
  Folder folder("tokenizer.model");
  Mutator mutator(11);
  const std::string plain = small_model(false), bytes = small_model(true);
  for (int i = 0; i < 4000; ++i) {
    const std::string& from = i % 8 == 0 ? bytes : plain;
    folder.load(i % 2 == 0 ? mutator.flip(from) : mutator.mutate(from), fmt::format("iteration {}", i));
  }
  EXPECT_GT(folder.outcomes.opened, 300);
  EXPECT_GT(folder.outcomes.refused, 1000);
}

TEST(TokenizerFuzz, sentencepiece_that_lies) {
  Folder folder("tokenizer.model");
  std::int64_t refused = 0;
  const auto refuse = [&](const std::string& content, const std::string& what) {
    folder.load(content, what);
    EXPECT_EQ(folder.outcomes.refused, ++refused) << what;
    refused = folder.outcomes.refused;
  };
  // Lengths beyond the file, at the top and inside a part.
  for (unsigned shift = 7; shift < 64; ++shift)
    for (const std::uint64_t length : {std::uint64_t{1} << shift, (std::uint64_t{2} << shift) - 1}) {
      refuse(varint(1 << 3 | 2) + varint(length) + small_model(false), fmt::format("a piece of {} bytes", length));
      refuse(small_model(false, field(1, 2, varint(1 << 3 | 2) + varint(length) + "x")),
             fmt::format("a text of {}", length));
    }
  refuse(std::string(20, '\xFF') + small_model(false), "a number without end");
  // Every field that is read, with every wire type but its own.
  const auto typed = [](unsigned type, std::uint64_t number) {
    return field(number, type, type == 0 ? varint(1) : std::string(type == 1 ? 8 : 4, '\1'));
  };
  for (unsigned type : {0U, 1U, 2U, 3U, 4U, 5U, 6U, 7U}) {
    for (const std::uint64_t number : {1, 2, 3})
      if (type != 2) refuse(small_model(false, typed(type, number)), fmt::format("part {} of type {}", number, type));
    for (const std::uint64_t number : {1, 2, 3}) {
      if (type != (number == 1 ? 2U : number == 2 ? 5U : 0U))
        refuse(small_model(false, field(1, 2, typed(type, number))), fmt::format("piece.{} of type {}", number, type));
    }
    for (const std::uint64_t number : {3, 24, 35, 46, 47})
      if (type != (number > 40 ? 2U : 0U))
        refuse(small_model(false, field(2, 2, typed(type, number))),
               fmt::format("trainer.{} of type {}", number, type));
    for (const std::uint64_t number : {2, 3, 4, 5})
      if (type != (number == 2 ? 2U : 0U))
        refuse(small_model(false, field(3, 2, typed(type, number))),
               fmt::format("normalizer.{} of type {}", number, type));
  }
  refuse(small_model(false, field(0, 0, varint(1))), "field 0");
  const float nan = std::nanf("");
  refuse(small_model(false, piece("nan", nan, 1)), "a piece without score");
  refuse(small_model(false, piece("", 0, 1)), "an empty piece");
  refuse(small_model(false, piece("the", 0, 1)), "a piece twice");
  refuse(small_model(false, piece("\xE2\x96", 0, 1)), "a piece of half a character");
  for (const std::uint64_t type : {0ULL, 2ULL, 5ULL, 6ULL, 7ULL, 1ULL << 32, ~0ULL})
    refuse(small_model(false, piece("new", 0, type)), fmt::format("a piece of type {}", type));
  // Making the rules of a piece costs its length squared.
  refuse(small_model(false, piece(std::string(std::size_t{1} << 24, 't'), 0, 1)), "a piece of 16 MiB");
  EXPECT_EQ(folder.outcomes.opened, 0);

  // Odd, but sound.
  Folder odd("tokenizer.model");
  odd.load(small_model(false, piece("inf", INFINITY, 1) + piece("-inf", -INFINITY, 1) + piece("big", 3e38F, 1)),
           "scores");
  odd.load(small_model(false, piece(std::string(4096, 't'), 0, 1)), "a piece of 4 KiB");
  odd.load(small_model(true, piece("the<", 0, 4) + piece("\n", 0, 4) + piece(std::string("\0", 1), 0, 4)),
           "user-defined");
  odd.load(small_model(false, piece("a\xE2\x96\x81t", 5, 1) + piece("s \xE2\x96\x81", 9, 1)), "pieces across spaces");
  odd.load(small_model(false) + field(99, 2, std::string(1000, 'x')) + field(4, 0, varint(3)), "unknown fields");
  EXPECT_EQ(odd.outcomes.opened, 5);
}

// ----------------------------------------------------------------------------------------------------------
// tokenizer.json
// ----------------------------------------------------------------------------------------------------------

Json byte_level() {
  Json json = Json::parse(R"({"version":"1.0","added_tokens":[
    {"id":0,"content":"<unk>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true},
    {"id":2,"content":"</s>","special":true,"lstrip":true,"rstrip":true},
    {"id":9,"content":"<mask>","normalized":true,"single_word":true,"lstrip":true}],
    "normalizer":null,
    "pre_tokenizer":{"type":"Sequence","pretokenizers":[{"type":"Split","pattern":{"Regex":"?"},"behavior":"Isolated","invert":false},
      {"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":false}]},
    "post_processor":{"type":"ByteLevel","add_prefix_space":true},
    "decoder":{"type":"ByteLevel","add_prefix_space":true},
    "model":{"type":"BPE","dropout":null,"unk_token":"<unk>","fuse_unk":false,
      "vocab":{"<unk>":0,"<s>":1,"</s>":2,"t":3,"h":4,"e":5,"th":6,"the":7,"Ġthe":8,"Ġ":10},
      "merges":["t h","th e",["Ġ","the"]]}})");
  const Json real = read_json(demo("prose-bloom") / "tokenizer.json");
  json["pre_tokenizer"]["pretokenizers"][0]["pattern"] = real["pre_tokenizer"]["pretokenizers"][0]["pattern"];
  return json;
}

Json byte_fallback(bool metaspace) {
  Json json = Json::parse(R"({"added_tokens":[
    {"id":0,"content":"<unk>","special":true},{"id":1,"content":"<s>","special":true},
    {"id":12,"content":"<mask>","normalized":true,"rstrip":true}],
    "normalizer":{"type":"Sequence","normalizers":[{"type":"Prepend","prepend":"▁"},
      {"type":"Replace","pattern":{"String":" "},"content":"▁"}]},
    "post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<s>","type_id":0}},{"Sequence":{"id":"A","type_id":0}}]},
    "decoder":{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"▁"},"content":" "},{"type":"ByteFallback"},
      {"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]},
    "model":{"type":"BPE","unk_token":"<unk>","fuse_unk":true,"byte_fallback":true,"ignore_merges":false,
      "vocab":{"<unk>":0,"<s>":1,"</s>":2,"<0x41>":3,"<0xFF>":4,"▁":5,"t":6,"h":7,"e":8,"th":9,"the":10,"▁the":11},
      "merges":["t h","th e","▁ the"]}})");
  if (metaspace) {
    json["normalizer"] = nullptr;
    json["pre_tokenizer"] = {
        {"type", "Metaspace"}, {"replacement", "▁"}, {"prepend_scheme", "first"}, {"split", false}};
    json["decoder"] =
        Json::parse(R"({"type":"Sequence","decoders":[{"type":"ByteFallback"},{"type":"Metaspace"},{"type":"Fuse"}]})");
  }
  return json;
}

TEST(TokenizerFuzz, json_cut_short) {
  Folder folder("tokenizer.json");
  const std::string small = byte_level().dump(), whole = read_file(demo("prose-bloom") / "tokenizer.json");
  folder.load(small, "small");
  folder.load(byte_fallback(false).dump(), "byte fallback");
  folder.load(byte_fallback(true).dump(), "byte fallback, Metaspace");
  folder.load(whole, "the demo's");
  ASSERT_EQ(folder.outcomes.opened, 4);
  for (std::size_t length = 0; length < small.size(); ++length)
    folder.load(small.substr(0, length), fmt::format("{} bytes of the small one", length));
  for (std::size_t length = 0; length + 2 < whole.size(); length += 9973)
    folder.load(whole.substr(0, length), fmt::format("{} bytes of the demo's", length));
  EXPECT_EQ(folder.outcomes.opened, 4) << "a part passed for the whole";
}

TEST(TokenizerFuzz, json_changed) {
  Folder folder("tokenizer.json");
  Mutator mutator(13);
  const std::string forms[] = {byte_level().dump(), byte_fallback(false).dump(), byte_fallback(true).dump()};
  for (int i = 0; i < 2400; ++i) {
    const std::string& from = forms[i % 3];
    folder.load(i % 4 == 0 ? mutator.flip(from) : mutator.mutate(from), fmt::format("iteration {}", i));
  }
  EXPECT_GT(folder.outcomes.opened, 100);
  EXPECT_GT(folder.outcomes.refused, 1000);
}

TEST(TokenizerFuzz, json_with_other_types_and_numbers) {
  std::size_t first = 0;  // each form gets another third of the values
  for (const Json& form : {byte_level(), byte_fallback(false), byte_fallback(true)}) {
    Folder folder("tokenizer.json");
    const auto load = [&](const Json& edited, const std::string& what) { folder.load(edited.dump(), what); };
    for_each_edit(form, load, 3, first++);
    EXPECT_GT(folder.outcomes.opened, 50);
    EXPECT_GT(folder.outcomes.refused, 300);
  }
}

TEST(TokenizerFuzz, settings_beside_the_tokenizer) {
  for (const bool json : {false, true}) {
    for (const bool tokenizer_config : {false, true}) {
      Folder folder(tokenizer_config ? "tokenizer_config.json" : "config.json");
      if (json)
        folder.add("tokenizer.json", byte_fallback(false).dump());
      else
        folder.add("tokenizer.model", small_model(false));
      const Json sound = tokenizer_config ? Json{{"tokenizer_class", "LlamaTokenizer"},
                                                 {"bos_token", {{"content", "<s>"}, {"lstrip", false}}},
                                                 {"eos_token", "</s>"},
                                                 {"add_bos_token", true}}
                                          : Json{{"bos_token_id", {1, 2}}, {"eos_token_id", 2}};
      folder.load(sound.dump(), "sound");
      ASSERT_EQ(folder.outcomes.opened, 1);
      for_each_edit(sound, [&](const Json& edited, const std::string& what) { folder.load(edited.dump(), what); });
      const std::string text = sound.dump();
      for (std::size_t length = 0; length < text.size(); ++length) folder.load(text.substr(0, length), "cut");
      EXPECT_GT(folder.outcomes.refused, 60);
    }
  }
}

TEST(TokenizerFuzz, json_that_wants_much) {
  Folder folder("tokenizer.json");
  std::int64_t refused = 0;
  const auto refuse = [&](const std::string& content, const std::string& what) {
    folder.load(content, what);
    EXPECT_EQ(folder.outcomes.refused, ++refused) << what;
    refused = folder.outcomes.refused;
  };
  for (const char* open : {"[", "{\"a\":", "[{\"a\":"})
    for (const std::size_t depth : {201, 1000, 100000}) {
      std::string deep;
      for (std::size_t i = 0; i < depth; ++i) deep += open;
      refuse(deep, "nested without an end");
      std::string text = byte_level().dump();
      text.replace(text.find("\"normalizer\":null") + 13, 4, deep);
      refuse(text, "nested inside");
    }
  // Ids far beyond the number of tokens would cost memory.
  for (const std::uint64_t id : {std::uint64_t{1} << 20, std::uint64_t{1} << 31, std::uint64_t{1} << 33, UINT64_MAX}) {
    Json json = byte_level();
    json["model"]["vocab"]["far"] = id;
    refuse(json.dump(), "a token far away");
    json = byte_level();
    json["added_tokens"][2]["id"] = id;
    refuse(json.dump(), "an added token far away");
  }
  Json json = byte_fallback(false);
  json["normalizer"]["normalizers"][0]["prepend"] = std::string(1 << 20, 'x');
  refuse(json.dump(), "a megabyte before every text");
  EXPECT_EQ(folder.outcomes.opened, 0);
}

TEST(TokenizerFuzz, replacements_that_multiply_the_text_are_refused) {
  const ScratchFolder folder;
  const MemoryLid lid;
  const Json step = {{"type", "Replace"}, {"pattern", {{"String", "t"}}}, {"content", std::string(16, 't')}};
  Json json = byte_fallback(false);
  json["normalizer"] = {{"type", "Sequence"}, {"normalizers", Json(60, step)}};
  put(folder / "tokenizer.json", json.dump());
  const auto greedy = load_tokenizer(folder.path());
  EXPECT_THROW(greedy->encode("the"), InputError);
  EXPECT_NO_THROW(greedy->encode("he"));
  json = byte_fallback(false);
  json["decoder"] = {{"type", "Sequence"}, {"decoders", Json(60, step)}};
  put(folder / "tokenizer.json", json.dump());
  const auto verbose = load_tokenizer(folder.path());
  EXPECT_THROW(verbose->decode(verbose->encode("the")), InputError);
  EXPECT_EQ(verbose->decode({7, 8}), "he");
}

TEST(TokenizerFuzz, added_token_of_which_normalising_leaves_nothing) {
  const ScratchFolder folder;
  Json json = byte_fallback(false);
  json["normalizer"] = {{"type", "Replace"}, {"pattern", {{"String", "<mask>"}}}, {"content", ""}};
  put(folder / "tokenizer.json", json.dump());
  const auto tokenizer = load_tokenizer(folder.path());
  EXPECT_EQ(tokenizer->encode(std::string("t\0h", 3)), (std::vector<std::int64_t>{6, 0, 7}));
  EXPECT_EQ(tokenizer->encode("t<mask>h"), (std::vector<std::int64_t>{9}));
}

}  // namespace
}  // namespace headfold::tokenizer
