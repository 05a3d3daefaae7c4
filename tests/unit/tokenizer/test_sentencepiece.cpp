// tokenizer.model, and the LLaMA-style tokenizer.json made from the same pieces.

#include <algorithm>
#include <cstring>

#include "tokenizer_support.h"

namespace headfold::tokenizer {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using namespace testing_support;
using Ids = std::vector<std::int64_t>;

constexpr const char* space = "▁";

enum class Form { normalizer, metaspace };

struct Piece {
  std::string text;
  float score = 0;
  int type = 1;  // normal 1, unknown 2, control 3, byte 6
};

/// The pieces of the demo's model, read with no more than its own shape needs: pieces come first, each shorter than 128
/// bytes, with the fields text, score and, unless normal, type.
std::vector<Piece> demo_pieces() {
  const std::string bytes = read_file(demo_llama() / "tokenizer.model");
  std::vector<Piece> pieces;
  for (std::size_t at = 0; bytes.at(at) == 0x0A;) {
    const std::size_t end = at + 2 + static_cast<unsigned char>(bytes.at(at + 1));
    Piece piece;
    for (at += 2; at < end;) {
      const char tag = bytes.at(at++);
      if (tag == 0x0A) {
        piece.text = bytes.substr(at + 1, static_cast<unsigned char>(bytes.at(at)));
        at += 1 + piece.text.size();
      } else if (tag == 0x15) {
        std::memcpy(&piece.score, bytes.data() + at, 4);
        at += 4;
      } else {
        EXPECT_EQ(tag, 0x18);
        piece.type = bytes.at(at++);
      }
    }
    pieces.push_back(piece);
  }
  return pieces;
}

/// tokenizer.json as the converter of Hugging Face makes it from a SentencePiece BPE model: a merge for every way to
/// cut a piece in two known ones, best score first; equal scores by the ids of the two parts.
Json llama_json(Form form) {
  const std::vector<Piece> pieces = demo_pieces();
  Json vocabulary = Json::object(), added = Json::array();
  std::map<std::string, std::size_t> ids;
  for (std::size_t id = 0; id < pieces.size(); ++id) {
    vocabulary[pieces[id].text] = id;
    ids[pieces[id].text] = id;
    if (pieces[id].type == 2 || pieces[id].type == 3)
      added.push_back({{"id", id},
                       {"content", pieces[id].text},
                       {"single_word", false},
                       {"lstrip", false},
                       {"rstrip", false},
                       {"normalized", false},
                       {"special", true}});
  }
  struct Merge {
    float score;
    std::size_t left, right;
    std::string a, b;
  };
  std::vector<Merge> merges;
  for (const auto& [piece, id] : ids)
    for (std::size_t cut = 1; cut < piece.size(); ++cut) {
      const auto left = ids.find(piece.substr(0, cut)), right = ids.find(piece.substr(cut));
      if (left == ids.end() || right == ids.end() || pieces[id].type != 1) continue;
      merges.push_back({pieces[id].score, left->second, right->second, left->first, right->first});
    }
  std::sort(merges.begin(), merges.end(), [](const Merge& x, const Merge& y) {
    return std::tie(y.score, x.left, x.right) < std::tie(x.score, y.left, y.right);
  });
  Json list = Json::array();
  for (const Merge& merge : merges) list.push_back(merge.a + " " + merge.b);

  Json root;
  root["version"] = "1.0";
  root["added_tokens"] = added;
  root["model"] = {{"type", "BPE"},         {"dropout", nullptr},  {"unk_token", "<unk>"}, {"fuse_unk", true},
                   {"byte_fallback", true}, {"vocab", vocabulary}, {"merges", list}};
  root["post_processor"] = {
      {"type", "TemplateProcessing"},
      {"single", {{{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}}, {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}}},
      {"special_tokens", {{"<s>", {{"id", "<s>"}, {"ids", {1}}, {"tokens", {"<s>"}}}}}}};
  if (form == Form::normalizer) {
    root["normalizer"] = {{"type", "Sequence"},
                          {"normalizers",
                           {{{"type", "Prepend"}, {"prepend", space}},
                            {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", space}}}}};
    root["pre_tokenizer"] = nullptr;
    root["decoder"] = {{"type", "Sequence"},
                       {"decoders",
                        {{{"type", "Replace"}, {"pattern", {{"String", space}}}, {"content", " "}},
                         {{"type", "ByteFallback"}},
                         {{"type", "Fuse"}},
                         {{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}}}}};
  } else {
    root["normalizer"] = nullptr;
    root["pre_tokenizer"] = {
        {"type", "Metaspace"}, {"replacement", space}, {"prepend_scheme", "first"}, {"split", false}};
    root["decoder"] = {{"type", "Sequence"},
                       {"decoders",
                        {{{"type", "ByteFallback"}},
                         {{"type", "Metaspace"}, {"replacement", space}, {"prepend_scheme", "first"}},
                         {{"type", "Fuse"}}}}};
  }
  return root;
}

std::unique_ptr<Tokenizer> load_json(const Json& root) {
  const ScratchFolder folder;
  write_json(folder / "tokenizer.json", root);
  return load_tokenizer(folder.path());
}

TEST(SentencePieceTest, demo_llama_is_what_it_says) {
  const auto tokenizer = load_tokenizer(demo_llama());
  EXPECT_EQ(tokenizer->kind(), "sentencepiece");
  EXPECT_EQ(tokenizer->vocab_size(), 4096);
  EXPECT_EQ(tokenizer->bos(), 1);
  EXPECT_EQ(tokenizer->eos(), 2);
  EXPECT_TRUE(tokenizer->adds_bos());
  EXPECT_THAT(tokenizer->encode(""), ElementsAre());
  EXPECT_THAT(tokenizer->encode("", Bos::model_default), ElementsAre(1));
  EXPECT_EQ(tokenizer->encode("the end", Bos::never), tokenizer->encode("the end"));
  EXPECT_THAT(tokenizer->encode("<s>"), testing::Not(testing::Contains(1)))
      << "special tokens in the text are plain text";
}

TEST(SentencePieceTest, real_and_random_text_survives) {
  const auto tokenizer = load_tokenizer(demo_llama());
  for (const std::string& document : real_documents(100))
    ASSERT_EQ(tokenizer->decode(tokenizer->encode(document)), document);
  std::mt19937 generator(5);
  for (int round = 0; round < 150; ++round) {
    const std::string text = random_text(generator, generator() % 60);
    if (text.find(space) != std::string::npos) continue;  // stands for a space in this format
    ASSERT_EQ(tokenizer->decode(tokenizer->encode(text)), text);
  }
  EXPECT_THROW(tokenizer->encode("caf\xE9"), InputError);
}

TEST(SentencePieceTest, decoding_leaves_special_tokens_and_one_space_out) {
  const auto tokenizer = load_tokenizer(demo_llama());
  Ids ids = tokenizer->encode(" two  spaces");
  ids.insert(ids.begin(), 1);
  ids.push_back(2);
  ids.push_back(0);
  EXPECT_EQ(tokenizer->decode(ids), " two  spaces");
  EXPECT_EQ(tokenizer->decode({}), "");
  EXPECT_THROW(tokenizer->decode({4096}), InputError);
  EXPECT_THROW(tokenizer->decode({std::int64_t{1} << 32}), InputError);
}

TEST(SentencePieceTest, configuration_beside_it_counts) {
  const ScratchFolder folder;
  headfold::copy_file(demo_llama() / "tokenizer.model", folder / "tokenizer.model");
  write_json(folder / "tokenizer_config.json", Json{{"add_bos_token", false}});
  EXPECT_FALSE(load_tokenizer(folder.path())->adds_bos());
  EXPECT_EQ(load_tokenizer(folder.path())->encode("a", Bos::always).front(), 1);
  write_json(folder / "tokenizer_config.json", Json{{"eos_token", "<unk>"}});
  EXPECT_EQ(load_tokenizer(folder.path())->eos(), 0);
  write_json(folder / "tokenizer_config.json", Json{{"eos_token", "<|none|>"}});
  EXPECT_THROW(load_tokenizer(folder.path()), InputError);
  write_json(folder / "tokenizer_config.json", Json{{"add_bos_token", "yes"}});
  EXPECT_THROW(load_tokenizer(folder.path()), InputError);
  write_file(folder / "tokenizer_config.json", "{");
  EXPECT_THROW(load_tokenizer(folder.path()), CorruptFile);
}

TEST(SentencePieceTest, broken_files_are_typed_errors_that_name_the_file) {
  const std::string whole = read_file(demo_llama() / "tokenizer.model");
  const auto load = [](const std::string& bytes) {
    const ScratchFolder folder;
    write_file(folder / "tokenizer.model", bytes);
    load_tokenizer(folder.path());
  };
  const auto refusal = [&](const std::string& bytes) {
    const std::string message = message_of<CorruptFile>([&] { load(bytes); });
    EXPECT_THAT(message, HasSubstr("tokenizer.model"));
    return message;
  };
  EXPECT_THAT(refusal(""), HasSubstr("empty"));
  EXPECT_THAT(refusal("version https://git-lfs.github.com/spec/v1\n"), HasSubstr("LFS"));
  refusal("IQ== 0\nIg== 1\n");  // tiktoken's format goes by the same file name
  refusal(R"({"model": {}})");
  refusal(std::string(1000, '\0'));
  refusal(std::string(64, '\xFF'));
  // Wherever it is cut, also exactly between two pieces, where protobuf sees nothing wrong.
  for (std::size_t size = 1; size < whole.size(); size += 2503) refusal(whole.substr(0, size));
  std::size_t pieces_end = 0;
  for (int n = 0; n < 100; ++n) pieces_end += 2 + static_cast<unsigned char>(whole[pieces_end + 1]);
  EXPECT_THAT(refusal(whole.substr(0, pieces_end)), HasSubstr("100 pieces"));
  // Single broken bytes either load or are refused with a typed error; nothing else may happen.
  std::mt19937 generator(9);
  std::size_t refused = 0;
  for (int round = 0; round < 150; ++round) {
    std::string bytes = whole;
    const std::size_t range = round % 3 == 0 ? 300 : bytes.size();
    bytes[round % 3 == 1 ? bytes.size() - 1 - generator() % 190 : generator() % range] = static_cast<char>(generator());
    try {
      load(bytes);
    } catch (const CorruptFile&) {
      ++refused;
    } catch (const InputError&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 15U);
}

TEST(SentencePieceTest, unsupported_kinds_are_named) {
  const std::string whole = read_file(demo_llama() / "tokenizer.model");
  const auto refusal = [&](const std::string& from, const std::string& to) {
    std::string bytes = whole;
    bytes.replace(bytes.rfind(from), from.size(), to);
    const ScratchFolder folder;
    write_file(folder / "tokenizer.model", bytes);
    const std::string message = message_of<Error>([&] { load_tokenizer(folder.path()); });
    EXPECT_THAT(message, HasSubstr("tokenizer.model"));
    return message;
  };
  EXPECT_THAT(refusal("\x12\x03tok\x18\x02", "\x12\x03tok\x18\x01"), HasSubstr("unigram"));
  EXPECT_THAT(refusal(std::string("\xC0\x01\x00", 3), "\xC0\x01\x01"), HasSubstr("treat_whitespace_as_suffix"));
  // "identity" makes room for a character map of two bytes.
  EXPECT_THAT(refusal(std::string("\x0A\x08identity\x12\x00", 12), std::string("\x0A\x06identi\x12\x02xy", 12)),
              HasSubstr("character map"));
  EXPECT_THAT(refusal("\x98\x02\x01", std::string("\x98\x02\x00", 3)), HasSubstr("byte_fallback"));
  EXPECT_THAT(refusal("<0x41>", "<0xZZ>"), HasSubstr("<0xZZ>"));
  EXPECT_THAT(refusal("<0x41>", "<0x42>"), HasSubstr("twice"));
}

TEST(LlamaJsonTest, equals_sentencepiece_on_real_text) {
  const auto reference = load_tokenizer(demo_llama());
  const auto normalizer = load_json(llama_json(Form::normalizer)), metaspace = load_json(llama_json(Form::metaspace));
  for (const Tokenizer* tokenizer : {normalizer.get(), metaspace.get()}) {
    EXPECT_EQ(tokenizer->kind(), "byte-fallback-bpe");
    EXPECT_EQ(tokenizer->vocab_size(), 4096);
    EXPECT_EQ(tokenizer->bos(), 1);
    EXPECT_TRUE(tokenizer->adds_bos());
    std::size_t tokens = 0;
    for (const std::string& document : real_documents(100)) {
      ASSERT_NE(document.front(), ' ');
      const Ids ids = reference->encode(document);
      ASSERT_EQ(tokenizer->encode(document), ids) << document.substr(0, 200);
      ASSERT_EQ(tokenizer->decode(ids), document);
      tokens += ids.size();
    }
    EXPECT_GT(tokens, 40000U);
    for (const char* text : {"", "a", "a b", "Hello  world", "\n", "a\nb", "Question: 1+1=2?\nAnswer:", "naïve café 👍",
                             "tab\there", "x   ", "日本"})
      EXPECT_EQ(tokenizer->encode(text), reference->encode(text)) << text;
  }
  // Where the text starts with a space the two forms differ: Metaspace takes that space for its own.
  EXPECT_EQ(normalizer->encode(" a b"), reference->encode(" a b"));
  EXPECT_EQ(metaspace->encode(" a b"), reference->encode("a b"));
}

TEST(LlamaJsonTest, cutting_at_spaces_changes_nothing) {
  // A rule that joins across a space turns the shortcut off; on text that does not use the rule both ways must agree.
  Json root = llama_json(Form::normalizer);
  const auto cut = load_json(root);
  root["model"]["vocab"]["§▁"] = 4096;
  root["model"]["vocab"]["§"] = 4097;
  root["model"]["merges"].push_back("§ ▁");
  const auto whole = load_json(root);
  for (const std::string& document : real_documents(10)) EXPECT_EQ(cut->encode(document), whole->encode(document));
  EXPECT_THAT(whole->encode("a§ "), testing::Contains(4096));
  std::mt19937 generator(13);
  for (int round = 0; round < 200; ++round) {
    std::string text = random_text(generator, generator() % 60);
    if (text.find("§") != std::string::npos) continue;
    EXPECT_EQ(cut->encode(text), whole->encode(text));
  }
}

TEST(LlamaJsonTest, special_tokens_split_the_text_and_each_part_gets_its_prefix) {
  const auto reference = load_tokenizer(demo_llama());
  const auto normalizer = load_json(llama_json(Form::normalizer)), metaspace = load_json(llama_json(Form::metaspace));
  Ids expected = reference->encode("one");
  expected.push_back(2);
  const Ids second = reference->encode("two");
  expected.insert(expected.end(), second.begin(), second.end());
  EXPECT_EQ(normalizer->encode("one</s>two"), expected);
  // prepend_scheme "first": only the text's own start is prefixed.
  EXPECT_NE(metaspace->encode("one</s>two"), expected);
  EXPECT_EQ(metaspace->encode("one</s> two"), expected);
  EXPECT_EQ(normalizer->decode(expected), "one two");
}

TEST(LlamaJsonTest, unknown_characters_and_partial_bytes) {
  Json root = llama_json(Form::normalizer);
  root["model"]["vocab"].erase("<0xF0>");
  const auto fused = load_json(root);
  const auto marks = [](const Ids& ids) { return std::count(ids.begin(), ids.end(), 0); };
  EXPECT_EQ(marks(fused->encode("a👍👍b👍")), 2);
  root["model"]["fuse_unk"] = false;
  EXPECT_EQ(marks(load_json(root)->encode("a👍👍b👍")), 3);
  const auto tokenizer = load_json(llama_json(Form::normalizer));
  const Ids thumb = tokenizer->encode("👍");
  ASSERT_EQ(thumb.size(), 5U) << "a space and four bytes";
  EXPECT_EQ(tokenizer->decode({thumb.begin(), thumb.end() - 1}), "\uFFFD\uFFFD\uFFFD");
}

TEST(LlamaJsonTest, llama_class_configuration_overrides_the_template) {
  const ScratchFolder folder;
  const Json content = Json::parse(R"({
      "model": {"type": "BPE", "byte_fallback": true, "unk_token": "<unk>", "vocab": {"<unk>": 0, "<s>": 1, "a": 2}, "merges": []},
      "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]}})");
  write_json(folder / "tokenizer.json", content);
  EXPECT_TRUE(load_tokenizer(folder.path())->adds_bos());
  write_json(folder / "tokenizer_config.json",
             Json{{"add_bos_token", false}, {"tokenizer_class", "LlamaTokenizerFast"}});
  EXPECT_FALSE(load_tokenizer(folder.path())->adds_bos());
  write_json(folder / "tokenizer_config.json",
             Json{{"add_bos_token", false}, {"tokenizer_class", "PreTrainedTokenizerFast"}});
  EXPECT_TRUE(load_tokenizer(folder.path())->adds_bos());
}

}  // namespace
}  // namespace headfold::tokenizer
