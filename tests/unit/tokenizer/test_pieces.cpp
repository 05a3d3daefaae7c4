// UTF-8, BLOOM's pre-tokenizer character by character, GPT-2's byte map and byte-pair merging.

#include <headfold/tokenizer/byte_pair.h>
#include <headfold/tokenizer/pieces.h>

#include <set>

#include "tokenizer_support.h"

namespace headfold::tokenizer {
namespace {

using testing::ElementsAre;
using namespace testing_support;

std::string utf8(char32_t value) {
  std::string text;
  append_utf8(text, value);
  return text;
}

TEST(Utf8Test, every_character_survives_and_is_well_formed) {
  for (char32_t value = 0; value <= 0x10FFFF; ++value) {
    if (value >= 0xD800 && value <= 0xDFFF) continue;
    const std::string text = utf8(value);
    ASSERT_EQ(invalid_utf8_at(text), std::string_view::npos) << static_cast<std::uint32_t>(value);
    const CodePoint back = code_point_at(text, 0);
    ASSERT_EQ(back.value, value);
    ASSERT_EQ(back.bytes, text.size());
  }
}

TEST(Utf8Test, broken_bytes_are_found_at_their_place) {
  const std::string lead = "0123456789abcdef";  // longer than the fast path's word
  EXPECT_EQ(invalid_utf8_at(""), std::string_view::npos);
  for (const std::string_view broken :
       {"\x80", "\xBF", "\xC0\x80", "\xC1\xBF", "\xE0\x80\x80", "\xED\xA0\x80", "\xF0\x80\x80\x80", "\xF4\x90\x80\x80",
        "\xF5\x80\x80\x80", "\xFF", "\xE2\x82", "\xF0\x9F\x98", "\xC3", "\xC3(", "\xE2(\xA1"}) {
    EXPECT_EQ(invalid_utf8_at(lead + std::string(broken)), lead.size()) << testing::PrintToString(broken);
    EXPECT_EQ(invalid_utf8_at(lead + std::string(broken) + lead), lead.size()) << testing::PrintToString(broken);
  }
  const std::string message = message_of<InputError>([] { check_utf8("abc\xFFz", "notes.txt"); });
  EXPECT_THAT(message, testing::HasSubstr("notes.txt"));
  EXPECT_THAT(message, testing::HasSubstr("byte 3"));
}

TEST(Utf8Test, replacement_takes_maximal_parts) {
  // Unicode 15, table 3-8 and the examples around it.
  EXPECT_EQ(replace_invalid_utf8("a\xF1\x80\x80\xE1\x80\xC2"
                                 "b\x80"
                                 "c"),
            "a\uFFFD\uFFFD\uFFFDb\uFFFDc");
  EXPECT_EQ(replace_invalid_utf8("\xC0\xAF\xE0\x80\xBF"), "\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD");
  EXPECT_EQ(replace_invalid_utf8("whole €"), "whole €");
  EXPECT_EQ(replace_invalid_utf8("cut \xE2\x82"), "cut \uFFFD");
}

TEST(BloomSplitTest, exactly_these_characters_are_outside_words) {
  std::set<char32_t> outside = {U'(',   U')',   U'|',   U'.',   U',',   U'!',   U'?',
                                0x2026, 0x3002, 0xFF0C, 0x3001, 0x0964, 0x06D4, 0x060C};
  for (char32_t space :
       {0x09, 0x0A, 0x0B, 0x0C, 0x0D, 0x20, 0x85, 0xA0, 0x1680, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000})
    outside.insert(space);
  for (char32_t space = 0x2000; space <= 0x200A; ++space) outside.insert(space);
  for (char32_t value = 0; value <= 0x10FFFF; ++value)
    ASSERT_EQ(in_bloom_word(value), outside.count(value) == 0) << std::hex << static_cast<std::uint32_t>(value);
  // The brackets that close the nested class and the outer one are part of no set; nor are zero-width and
  // information-separator characters.
  for (char32_t value : {U'[', U']', U'^', U'\\', U's', U'+', U';', U':', U'-', U'\x1C', U'\x1F', U'\u200B', U'\u180E',
                         U'\uFEFF', U'\uFF0E'})
    EXPECT_TRUE(in_bloom_word(value)) << std::hex << static_cast<std::uint32_t>(value);
}

TEST(BloomSplitTest, words_take_one_space_and_stretches_stay_whole) {
  EXPECT_THAT(split_bloom(""), ElementsAre());
  EXPECT_THAT(split_bloom("Hello world"), ElementsAre("Hello", " world"));
  EXPECT_THAT(split_bloom("Hello!"), ElementsAre("Hello", "!"));
  EXPECT_THAT(split_bloom("a  b"), ElementsAre("a", " ", " b"));
  EXPECT_THAT(split_bloom("a   b"), ElementsAre("a", "  ", " b"));
  EXPECT_THAT(split_bloom("   "), ElementsAre("   "));
  EXPECT_THAT(split_bloom(" "), ElementsAre(" "));
  EXPECT_THAT(split_bloom("end. \nNext"), ElementsAre("end", ". \n", "Next"));
  EXPECT_THAT(split_bloom("end. Next"), ElementsAre("end", ".", " Next"));
  EXPECT_THAT(split_bloom("f(x | y)..."), ElementsAre("f", "(", "x", " |", " y", ")..."));
  EXPECT_THAT(split_bloom("a\tb"), ElementsAre("a", "\t", "b"));
  EXPECT_THAT(split_bloom("[x]^;: y"), ElementsAre("[x]^;:", " y"));
  EXPECT_THAT(split_bloom("猫。犬，鳥、"), ElementsAre("猫", "。", "犬", "，", "鳥", "、"));
  EXPECT_THAT(split_bloom("नमस्ते। ہے۔ نعم، x…"), ElementsAre("नमस्ते", "।", " ہے", "۔", " نعم", "،", " x", "…"));
  EXPECT_THAT(split_bloom("a\u00A0b\u3000c"), ElementsAre("a", "\u00A0", "b", "\u3000", "c"));
  EXPECT_THAT(split_bloom("a\u00A0 b"), ElementsAre("a", "\u00A0", " b"));
}

TEST(BloomSplitTest, pieces_cover_the_text_and_alternate) {
  std::mt19937 generator(7);
  for (int round = 0; round < 300; ++round) {
    const std::string text = random_text(generator, generator() % 60);
    const auto pieces = split_bloom(text);
    std::string joined;
    bool previous_was_word = true;
    for (const std::string_view piece : pieces) {
      joined += piece;
      std::string_view body = piece;
      std::size_t words = 0, others = 0;
      for (std::size_t i = 0; i < body.size(); i += code_point_at(body, i).bytes)
        (in_bloom_word(code_point_at(body, i).value) ? words : others) += 1;
      const bool is_word = words > 0;
      if (is_word) {
        EXPECT_EQ(others, body[0] == ' ' ? 1U : 0U) << text;
      } else {
        EXPECT_TRUE(previous_was_word || piece.data() == text.data()) << "two stretches side by side in " << text;
      }
      previous_was_word = is_word;
    }
    ASSERT_EQ(joined, text);
  }
}

TEST(BloomSplitTest, known_patterns_only) {
  EXPECT_TRUE(is_bloom_pattern(R"( ?[^(\s|[.,!?…。，、।۔،])]+)"));
  EXPECT_TRUE(is_bloom_pattern(R"( ?[^(\s|.,!?…。，、।۔،)]+)"));
  EXPECT_FALSE(is_bloom_pattern(R"( ?[^(\s|[.,!?…。，、।۔،])]*)"));
  EXPECT_FALSE(is_bloom_pattern(""));
}

TEST(ByteMapTest, is_gpt2s) {
  const auto& symbols = byte_symbols();
  // Written out as GPT-2's encoder.py does it.
  std::set<int> kept;
  for (int b = '!'; b <= '~'; ++b) kept.insert(b);
  for (int b = 0xA1; b <= 0xAC; ++b) kept.insert(b);
  for (int b = 0xAE; b <= 0xFF; ++b) kept.insert(b);
  char32_t extra = 0;
  for (int b = 0; b < 256; ++b) {
    const char32_t expected = kept.count(b) != 0 ? static_cast<char32_t>(b) : 256 + extra++;
    EXPECT_EQ(symbols[static_cast<std::size_t>(b)], utf8(expected)) << b;
    EXPECT_EQ(byte_of_symbol(expected), b);
  }
  EXPECT_EQ(extra, 68U);
  EXPECT_EQ(symbols[' '], "Ġ");
  EXPECT_EQ(symbols['\n'], "Ċ");
  for (char32_t none : {U' ', U'\n', U'\u00AD', static_cast<char32_t>(256 + 68), U'猫'})
    EXPECT_EQ(byte_of_symbol(none), -1);
}

TEST(MergeRulesTest, equals_the_definition_on_random_rules) {
  std::mt19937 generator(11);
  for (int round = 0; round < 60; ++round) {
    // Symbols are strings over {a, b, c}; ids are their places in a list.
    std::vector<std::string> vocabulary = {"a", "b", "c"};
    std::map<std::string, std::int32_t> ids = {{"a", 0}, {"b", 1}, {"c", 2}};
    std::map<std::pair<std::string, std::string>, std::size_t> ranks;
    MergeRules rules;
    const std::size_t wanted = 1 + generator() % 40;
    while (ranks.size() < wanted) {
      const std::string left = vocabulary[generator() % vocabulary.size()],
                        right = vocabulary[generator() % vocabulary.size()];
      if (ranks.count({left, right}) != 0 || left.size() + right.size() > 12) continue;
      const auto [entry, fresh] = ids.emplace(left + right, static_cast<std::int32_t>(vocabulary.size()));
      if (fresh) vocabulary.push_back(left + right);
      const auto rank = ranks.size();
      ranks[{left, right}] = rank;
      rules.add(ids[left], ids[right], {static_cast<std::int32_t>(rank), entry->second});
    }
    ASSERT_EQ(rules.size(), ranks.size());
    // Short pieces take the scan, long ones the heap; 24 is where the two meet.
    for (const std::size_t length : {0U, 1U, 2U, 5U, 23U, 24U, 25U, 26U, 400U}) {
      std::vector<std::string> symbols;
      std::vector<std::int32_t> numbers;
      for (std::size_t i = 0; i < length; ++i) {
        symbols.push_back(vocabulary[generator() % 3]);
        numbers.push_back(ids[symbols.back()]);
      }
      rules.merge(numbers);
      std::vector<std::string> merged;
      for (const std::int32_t id : numbers) merged.push_back(vocabulary[static_cast<std::size_t>(id)]);
      ASSERT_EQ(merged, merge_naively(symbols, ranks)) << "round " << round << ", length " << length;
    }
  }
}

TEST(MergeRulesTest, of_two_rules_for_one_pair_the_later_holds) {
  MergeRules rules;
  rules.add(1, 2, {5, 3});
  rules.add(1, 2, {0, 4});
  EXPECT_EQ(rules.size(), 1U);
  std::vector<std::int32_t> symbols = {1, 2, 1};
  rules.merge(symbols);
  EXPECT_THAT(symbols, ElementsAre(4, 1));
}

}  // namespace
}  // namespace headfold::tokenizer
