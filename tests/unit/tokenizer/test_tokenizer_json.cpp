// tokenizer.json: BLOOM's byte-level BPE, added tokens, hostile files.

#include <headfold/tokenizer/pieces.h>

#include <chrono>

#include "tokenizer_support.h"

namespace headfold::tokenizer {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using namespace testing_support;
using Ids = std::vector<std::int64_t>;

std::unique_ptr<Tokenizer> edited(const std::function<void(Json&)>& edit) {
  const ScratchFolder folder;
  write_edited(folder, edit);
  return load_tokenizer(folder.path());
}

/// The demo's byte-level BPE by its definition, from the JSON file.
class NaiveBloom {
 public:
  NaiveBloom() {
    const Json root = Json::parse(read_file(demo_bloom() / "tokenizer.json"));
    vocabulary_ = root.at("model").at("vocab").get<std::map<std::string, std::int64_t>>();
    for (const Json& merge : root.at("model").at("merges")) {
      const auto text = merge.get<std::string>();
      const std::size_t space = text.find(' ');
      const std::size_t rank = ranks_.size();
      ranks_[{text.substr(0, space), text.substr(space + 1)}] = rank;
    }
  }
  Ids encode(const std::string& text) const {
    Ids ids;
    for (const std::string_view piece : split_bloom(text)) {
      std::vector<std::string> symbols;
      for (const char byte : piece) symbols.push_back(byte_symbols()[static_cast<unsigned char>(byte)]);
      for (const std::string& token : merge_naively(symbols, ranks_)) ids.push_back(vocabulary_.at(token));
    }
    return ids;
  }

 private:
  std::map<std::string, std::int64_t> vocabulary_;
  std::map<std::pair<std::string, std::string>, std::size_t> ranks_;
};

TEST(TokenizerJsonTest, demo_bloom_is_what_it_says) {
  const auto tokenizer = load_tokenizer(demo_bloom());
  EXPECT_EQ(tokenizer->kind(), "byte-level-bpe");
  EXPECT_EQ(tokenizer->vocab_size(), 4096);
  EXPECT_EQ(tokenizer->bos(), 1);
  EXPECT_EQ(tokenizer->eos(), 2);
  EXPECT_FALSE(tokenizer->adds_bos());
  EXPECT_THAT(tokenizer->encode(""), ElementsAre());
  const Ids plain = tokenizer->encode("the end");
  EXPECT_EQ(tokenizer->encode("the end", Bos::model_default), plain);
  EXPECT_EQ(tokenizer->encode("the end", Bos::never), plain);
  Ids with_bos = plain;
  with_bos.insert(with_bos.begin(), 1);
  EXPECT_EQ(tokenizer->encode("the end", Bos::always), with_bos);
}

TEST(TokenizerJsonTest, equals_the_definition_on_real_text) {
  const auto tokenizer = load_tokenizer(demo_bloom());
  const NaiveBloom naive;
  std::size_t tokens = 0;
  for (const std::string& document : real_documents(60)) {
    const Ids ids = tokenizer->encode(document);
    ASSERT_EQ(ids, naive.encode(document)) << document.substr(0, 200);
    ASSERT_EQ(tokenizer->encode(document), ids) << "the second time, from the cache";
    ASSERT_EQ(tokenizer->decode(ids), document);
    tokens += ids.size();
  }
  EXPECT_GT(tokens, 20000U);
}

TEST(TokenizerJsonTest, any_text_survives_a_round_trip) {
  const auto tokenizer = load_tokenizer(demo_bloom());
  const NaiveBloom naive;
  std::mt19937 generator(3);
  for (int round = 0; round < 400; ++round) {
    const std::string text = random_text(generator, generator() % 80);
    const Ids ids = tokenizer->encode(text);
    ASSERT_EQ(tokenizer->decode(ids), text);
    ASSERT_EQ(ids, naive.encode(text));
    std::string bytes(generator() % 80, ' ');
    for (char& byte : bytes) byte = static_cast<char>(generator());
    bytes = replace_invalid_utf8(bytes);
    ASSERT_EQ(tokenizer->decode(tokenizer->encode(bytes)), bytes);
  }
  EXPECT_THROW(tokenizer->encode("caf\xE9"), InputError);
}

TEST(TokenizerJsonTest, cut_characters_decode_to_replacement_characters) {
  const auto tokenizer = load_tokenizer(demo_bloom());
  const Ids ids = tokenizer->encode("猫");
  ASSERT_EQ(ids.size(), 3U) << "the demo's vocabulary has no token for this character";
  EXPECT_EQ(tokenizer->decode({ids[0], ids[1]}), "\uFFFD");
  EXPECT_EQ(tokenizer->decode({ids[1]}), "\uFFFD");
  EXPECT_THROW(tokenizer->decode({4096}), InputError);
  EXPECT_THROW(tokenizer->decode({-1}), InputError);
}

TEST(TokenizerJsonTest, special_tokens_are_found_in_the_text_and_left_out_of_it) {
  const auto tokenizer = load_tokenizer(demo_bloom());
  Ids expected = tokenizer->encode("The quick fox");
  expected.push_back(2);
  EXPECT_EQ(tokenizer->encode("The quick fox</s>"), expected);
  EXPECT_EQ(tokenizer->decode(expected), "The quick fox");
  EXPECT_THAT(tokenizer->encode("<s><pad></s><unk>"), ElementsAre(1, 3, 2, 0));
  const Ids broken = tokenizer->encode("<s");
  EXPECT_THAT(broken, testing::Each(testing::Gt(3)));
}

TEST(TokenizerJsonTest, added_tokens_follow_their_flags) {
  const auto token = [](std::int64_t id, const char* content) {
    return Json{{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
                {"rstrip", false}, {"normalized", false}, {"special", false}};
  };
  const auto tokenizer = edited([&](Json& root) {
    Json& list = root["added_tokens"];
    list.push_back(token(4096, "<x>"));
    list.push_back(token(4097, "<x><y>"));
    Json left = token(4098, "<left>"), right = token(4099, "<right>"), word = token(4100, "zebra");
    left["lstrip"] = true;
    right["rstrip"] = true;
    word["single_word"] = true;
    for (const Json& entry : {left, right, word}) list.push_back(entry);
  });
  const auto a = tokenizer->encode("a"), b = tokenizer->encode("b"), space_b = tokenizer->encode(" b"),
             a_spaces = tokenizer->encode("a  ");
  EXPECT_EQ(tokenizer->vocab_size(), 4101);
  const auto joined = [](std::initializer_list<Ids> parts) {
    Ids all;
    for (const Ids& part : parts) all.insert(all.end(), part.begin(), part.end());
    return all;
  };
  EXPECT_EQ(tokenizer->encode("a<x><y>b"), joined({a, {4097}, b})) << "the longest of those that start together";
  EXPECT_EQ(tokenizer->encode("a<x><x>b"), joined({a, {4096, 4096}, b}));
  EXPECT_EQ(tokenizer->encode("a  <left> b"), joined({a, {4098}, space_b}));
  EXPECT_EQ(tokenizer->encode("a\u00A0\u3000<left>b"), joined({a, {4098}, b}));
  EXPECT_EQ(tokenizer->encode("a  <right>  b"), joined({a_spaces, {4099}, b}));
  EXPECT_EQ(tokenizer->encode("<right>  <left>b"), joined({{4099, 4098}, b}));
  EXPECT_EQ(tokenizer->encode("zebra b"), joined({{4100}, space_b}));
  EXPECT_EQ(tokenizer->encode("zebra"), joined({{4100}}));
  for (const char* inside : {"zebras", "_zebra", "ézebra", "zebra7"})
    EXPECT_THAT(tokenizer->encode(inside), testing::Not(testing::Contains(4100))) << inside;
  EXPECT_EQ(tokenizer->decode({4100, 4096}), "zebra<x>") << "added tokens that are not special are text";
}

TEST(TokenizerJsonTest, both_forms_of_merges_are_the_same) {
  const auto strings = load_tokenizer(demo_bloom());
  const auto pairs = edited([](Json& root) {
    for (Json& merge : root["model"]["merges"]) {
      const auto text = merge.get<std::string>();
      merge = Json::array({text.substr(0, text.find(' ')), text.substr(text.find(' ') + 1)});
    }
  });
  for (const std::string& document : real_documents(5)) EXPECT_EQ(pairs->encode(document), strings->encode(document));
}

TEST(TokenizerJsonTest, model_flags_change_what_they_should) {
  // ignore_merges: a piece that is a token is that token, whatever the merges say.
  const auto whole = edited([](Json& root) {
    root["model"]["ignore_merges"] = true;
    root["model"]["vocab"]["Ġxqzzy"] = 4096;
  });
  EXPECT_THAT(whole->encode(" xqzzy"), ElementsAre(4096));
  EXPECT_GT(whole->encode(" xqzzyx").size(), 1U);
  const auto prefixed =
      edited([](Json& root) { root["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = true; });
  EXPECT_EQ(prefixed->encode("the end"), load_tokenizer(demo_bloom())->encode(" the end"));
  // A byte without a token: unk where there is one, fused or not, and an error without.
  const auto lacking = [](bool unknown, bool fuse) {
    return edited([=](Json& root) {
      root["model"]["vocab"].erase("þ");
      root["model"]["vocab"].erase("ÿ");
      root["model"]["vocab"].erase("æ");
      if (unknown) root["model"]["unk_token"] = "<unk>";
      root["model"]["fuse_unk"] = fuse;
    });
  };
  const std::string cats = "\u6708";  // bytes E6 9C 88; E6 has no token now
  EXPECT_EQ(lacking(true, false)->encode(cats + "!").front(), 0);
  EXPECT_THAT(message_of<InputError>([&] { lacking(false, false)->encode(cats); }), HasSubstr("0xE6"));
}

TEST(TokenizerJsonTest, special_ids_come_from_the_files_beside) {
  const ScratchFolder folder;
  write_edited(folder, [](Json&) {});
  EXPECT_EQ(load_tokenizer(folder.path())->bos(), -1);
  EXPECT_THROW(load_tokenizer(folder.path())->encode("x", Bos::always), InputError);
  write_json(folder / "config.json", Json{{"bos_token_id", 1}, {"eos_token_id", Json::array({2, 3})}});
  EXPECT_EQ(load_tokenizer(folder.path())->bos(), 1);
  EXPECT_EQ(load_tokenizer(folder.path())->eos(), 2);
  write_json(folder / "tokenizer_config.json", Json{{"bos_token", "<pad>"}, {"eos_token", {{"content", "<unk>"}}}});
  EXPECT_EQ(load_tokenizer(folder.path())->bos(), 3);
  EXPECT_EQ(load_tokenizer(folder.path())->eos(), 0);
  write_json(folder / "tokenizer_config.json", Json{{"bos_token", "<absent>"}});
  EXPECT_THAT(message_of<InputError>([&] { load_tokenizer(folder.path()); }),
              testing::AllOf(HasSubstr("tokenizer_config.json"), HasSubstr("<absent>")));
  fs::remove(folder / "tokenizer_config.json");
  write_json(folder / "config.json", Json{{"bos_token_id", 4096}});
  EXPECT_THAT(message_of<InputError>([&] { load_tokenizer(folder.path()); }),
              testing::AllOf(HasSubstr("config.json"), HasSubstr("4096")));
  write_json(folder / "config.json", Json{{"bos_token_id", "one"}});
  EXPECT_THROW(load_tokenizer(folder.path()), InputError);
}

TEST(TokenizerJsonTest, template_says_whether_bos_is_added) {
  const auto with_template = [](const Json& single) {
    return edited([&](Json& root) {
      root["post_processor"] = {{"type", "TemplateProcessing"}, {"single", single}, {"special_tokens", Json::object()}};
    });
  };
  const Json bos = {{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}},
             text = {{"Sequence", {{"id", "A"}, {"type_id", 0}}}};
  const auto adds = with_template({bos, text});
  EXPECT_TRUE(adds->adds_bos());
  EXPECT_EQ(adds->bos(), 1);
  EXPECT_EQ(adds->encode("a", Bos::model_default).front(), 1);
  EXPECT_NE(adds->encode("a").front(), 1);
  EXPECT_FALSE(with_template(Json::array({text}))->adds_bos());
  EXPECT_THROW(with_template({bos, bos, text}), InputError);
}

TEST(TokenizerJsonTest, unsupported_kinds_are_named) {
  const auto refusal = [](const std::function<void(Json&)>& edit) {
    return message_of<InputError>([&] { edited(edit); });
  };
  EXPECT_THAT(
      refusal([](Json& root) { root["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "\\p{L}+|\\d{1,3}"; }),
      HasSubstr("\\p{L}+|\\d{1,3}"));
  EXPECT_THAT(refusal([](Json& root) { root["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Removed"; }),
              HasSubstr("Removed"));
  EXPECT_THAT(refusal([](Json& root) { root["pre_tokenizer"]["pretokenizers"][0]["type"] = "Digits"; }),
              HasSubstr("Digits"));
  EXPECT_THAT(refusal([](Json& root) { root["pre_tokenizer"]["pretokenizers"][1]["use_regex"] = true; }),
              HasSubstr("use_regex"));
  EXPECT_THAT(refusal([](Json& root) { root["pre_tokenizer"]["pretokenizers"].erase(1); }),
              HasSubstr("tokenizer.json"));
  EXPECT_THAT(refusal([](Json& root) { root["model"]["type"] = "WordPiece"; }), HasSubstr("WordPiece"));
  EXPECT_THAT(refusal([](Json& root) { root["model"]["dropout"] = 0.1; }), HasSubstr("dropout"));
  EXPECT_THAT(refusal([](Json& root) { root["model"]["end_of_word_suffix"] = "</w>"; }),
              HasSubstr("end_of_word_suffix"));
  EXPECT_THAT(refusal([](Json& root) { root["normalizer"] = {{"type", "NFKC"}}; }), HasSubstr("NFKC"));
  EXPECT_THAT(refusal([](Json& root) {
                root["post_processor"] = {{"type", "BertProcessing"}};
              }),
              HasSubstr("BertProcessing"));
  EXPECT_THAT(refusal([](Json& root) { root["decoder"] = {{"type", "WordPiece"}}; }), HasSubstr("WordPiece"));
}

TEST(TokenizerJsonTest, broken_files_are_typed_errors_that_name_the_file) {
  const std::string whole = read_file(demo_bloom() / "tokenizer.json");
  const auto content = [](const std::string& bytes) {
    const ScratchFolder folder;
    write_file(folder / "tokenizer.json", bytes);
    const std::string message = message_of<CorruptFile>([&] { load_tokenizer(folder.path()); });
    EXPECT_THAT(message, HasSubstr("tokenizer.json"));
    return message;
  };
  EXPECT_THAT(content(""), HasSubstr("empty"));
  EXPECT_THAT(content("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), HasSubstr("LFS"));
  for (const std::size_t size : {std::size_t{1}, whole.size() / 3, whole.size() / 2, whole.size() - 2})
    content(whole.substr(0, size));
  content(whole + "{}");
  content("[1, 2]");
  content("{}");
  content(R"({"model": 5})");
  content(R"({"model": {"type": "BPE", "vocab": {"a": 0, "a": 1}, "merges": []}})");

  const auto damage = [](const std::function<void(Json&)>& edit) {
    const std::string message = message_of<CorruptFile>([&] { edited(edit); });
    EXPECT_THAT(message, HasSubstr("tokenizer.json"));
    return message;
  };
  damage([](Json& root) { root["model"].erase("vocab"); });
  damage([](Json& root) { root["model"].erase("merges"); });
  damage([](Json& root) { root["model"]["vocab"] = Json::array({"a", "b"}); });
  damage([](Json& root) { root["model"]["vocab"] = Json::object(); });
  EXPECT_THAT(damage([](Json& root) { root["model"]["vocab"]["the"] = 7; }), HasSubstr("same id 7"));
  EXPECT_THAT(damage([](Json& root) { root["model"]["vocab"]["zzzz"] = 4000000000000000000; }), HasSubstr("zzzz"));
  EXPECT_THAT(damage([](Json& root) { root["model"]["vocab"]["zzzz"] = 2000000000; }), HasSubstr("2000000000"));
  EXPECT_THAT(damage([](Json& root) { root["model"]["vocab"]["zzzz"] = -1; }), HasSubstr("-1"));
  EXPECT_THAT(damage([](Json& root) { root["model"]["vocab"]["zzzz"] = 5.5; }), HasSubstr("5.5"));
  EXPECT_THAT(damage([](Json& root) { root["model"]["vocab"]["zzzz"] = "4"; }), HasSubstr("zzzz"));
  EXPECT_THAT(damage([](Json& root) { root["model"]["merges"].push_back("qqq zzz"); }), HasSubstr("qqq"));
  EXPECT_THAT(damage([](Json& root) { root["model"]["merges"].push_back("x þ"); }), HasSubstr("xþ"));
  for (const Json& merge : {Json("onetoken"), Json("a b c"), Json(" a"), Json::array({"a"}), Json::array({"a", 1}),
                            Json(17), Json(nullptr)})
    EXPECT_THAT(damage([&](Json& root) { root["model"]["merges"].push_back(merge); }), HasSubstr("merge 3836"));
  damage([](Json& root) { root["added_tokens"].push_back({{"id", 17}, {"content", "<x>"}}); });
  damage([](Json& root) { root["added_tokens"].push_back({{"id", 5000}, {"content", "<s>"}}); });
  damage([](Json& root) { root["added_tokens"].push_back({{"id", 900000000}, {"content", "<x>"}}); });
  damage([](Json& root) { root["added_tokens"].push_back({{"content", "<x>"}}); });
  damage([](Json& root) { root["added_tokens"] = "none"; });
  damage([](Json& root) { root["model"]["unk_token"] = "<nothing>"; });
  damage([](Json& root) { root["pre_tokenizer"].erase("pretokenizers"); });
  damage([](Json& root) { root["decoder"] = 3; });

  const ScratchFolder empty;
  EXPECT_THAT(message_of<IoError>([&] { load_tokenizer(empty.path()); }), HasSubstr(empty.path().string()));
}

TEST(TokenizerJsonTest, megabytes_take_seconds_whatever_they_hold) {
  const auto tokenizer = load_tokenizer(demo_bloom());
  std::string prose;
  while (prose.size() < 4000000)
    for (const std::string& document : real_documents(256)) prose += document;
  // One piece of a million bytes is what a quadratic merge would choke on.
  for (const std::string& text : {prose, std::string(1000000, 'a'), std::string(1000000, ' '), [] {
                                    std::mt19937 generator(1);
                                    std::string letters(1000000, ' ');
                                    for (char& c : letters) c = static_cast<char>('a' + generator() % 26);
                                    return letters;
                                  }()}) {
    const auto start = std::chrono::steady_clock::now();
    const Ids ids = tokenizer->encode(text);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    RecordProperty("megabytes_per_second", std::to_string(static_cast<double>(text.size()) / 1e6 / seconds));
    fmt::print("{:.1f} MB, {} tokens: {:.1f} MB/s\n", static_cast<double>(text.size()) / 1e6, ids.size(),
               static_cast<double>(text.size()) / 1e6 / seconds);
    EXPECT_LT(seconds, 30);
    EXPECT_EQ(tokenizer->decode(ids), text);
  }
}

}  // namespace
}  // namespace headfold::tokenizer
