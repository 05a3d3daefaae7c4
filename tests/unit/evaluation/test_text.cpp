// Text rules, windows and tasks: everything before a model is asked.

#include <gmock/gmock.h>
#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/evaluation/tasks.h>
#include <headfold/evaluation/text.h>

#include "world.h"

namespace headfold::evaluation {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing_support::data_folder;
using testing_support::ScratchFolder;

/// One token per byte: id = byte + 3, BOS 1, EOS 2.
class ByteTokenizer : public tokenizer::Tokenizer {
 public:
  using Tokenizer::encode;
  std::vector<std::int64_t> encode(std::string_view text) const override {
    std::vector<std::int64_t> ids;
    for (const char c : text) ids.push_back(static_cast<unsigned char>(c) + 3);
    return ids;
  }
  std::string decode(const std::vector<std::int64_t>& ids) const override {
    std::string text;
    for (const std::int64_t id : ids)
      if (id >= 3) text.push_back(static_cast<char>(id - 3));
    return text;
  }
  std::string token_text(std::int64_t id) const override { return decode({id}); }
  std::int64_t vocab_size() const override { return 259; }
  std::int64_t bos() const override { return bos_; }
  std::int64_t eos() const override { return eos_; }
  bool adds_bos() const override { return true; }
  std::string kind() const override { return "bytes"; }
  std::int64_t bos_ = 1, eos_ = 2;
};

template <class E, class Work>
std::string message_of(const Work& work) {
  try {
    work();
  } catch (const E& error) {
    return error.what();
  }
  return "nothing was thrown";
}

TEST(Words, count_pieces_of_a_split_on_unicode_whitespace) {
  EXPECT_EQ(count_words("a b"), 2);
  EXPECT_EQ(count_words("a \n\t b"), 2);
  EXPECT_EQ(count_words(" a "), 3);  // empty pieces at both ends count
  EXPECT_EQ(count_words(""), 1);
  EXPECT_EQ(count_words("  "), 2);
  // NEL, no-break space, ogham space, en quad, line separator, narrow no-break, medium mathematical, ideographic, file
  // separator
  for (const char* space : {"\xC2\x85", "\xC2\xA0", "\xE1\x9A\x80", "\xE2\x80\x80", "\xE2\x80\x8A", "\xE2\x80\xA8",
                            "\xE2\x80\xA9", "\xE2\x80\xAF", "\xE2\x81\x9F", "\xE3\x80\x80", "\x1C", "\x1F"})
    EXPECT_EQ(count_words(std::string("a") + space + "b"), 2) << testing::PrintToString(space);
  // zero-width space, word joiner, degree sign, and characters that share their first bytes with a space are none
  for (const char* other : {"\xE2\x80\x8B", "\xE2\x81\xA0", "\xC2\xB0", "\xE3\x80\x81", "\xE2\x82\xAC"})
    EXPECT_EQ(count_words(std::string("a") + other + "b"), 1) << testing::PrintToString(other);
}

TEST(Words, strip_removes_unicode_whitespace_at_both_ends_only) {
  EXPECT_EQ(strip("\xE3\x80\x80 a b\xC2\xA0\n"), "a b");
  EXPECT_EQ(strip(" \xC2\xA0"), "");
  EXPECT_EQ(strip("\xC3\xA0"), "\xC3\xA0");  // its last byte is A0, it is no space
}

TEST(Wikitext, pages_begin_at_titles_of_the_first_level) {
  const std::string raw =
      " \n = First = \n \n text of first \n = = Section = = \n more \n = = = Deep = = = \n \n = Second page = \n text "
      "= of = second \n";
  const std::vector<std::string> pages = wikitext_pages(raw);
  ASSERT_EQ(pages.size(), 2U);
  EXPECT_EQ(pages[0], " = First = \n \n text of first \n = = Section = = \n more \n = = = Deep = = = \n ");
  EXPECT_EQ(pages[1], " = Second page = \n text = of = second \n");
  EXPECT_THAT(wikitext_pages("no title\nat all"), ElementsAre("no title\nat all"));
  EXPECT_TRUE(wikitext_pages(" \n\n").empty());
}

TEST(Wikitext, detokeniser_follows_every_rule) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"the boys ' dogs", "the boys' dogs"},
      {"/' 5/ x", "/'[0-9]/ x"},
      {"ten @-@ year 1 @,@ 000 3 @.@ 5", "ten-year 1,000 3.5"},
      {"a : b ; c . d ! e ? f , g", "a: b; c. d! e? f, g"},
      {"( x ) [ y  ] { z}", "(x) [y] {z}"},
      {"( a ( b ) c )", "(a ( b) c )"},  // the first closing bracket ends the match
      {"( never closed", "( never closed"},
      {"(\xC2\xA0 x\n)", "(x)"},
      {"(   )", "()"},
      {"said \" hello there \" and \" bye \"", "said \"hello there\" and \"bye\""},
      {"x ' quoted ' y", "x 'quoted' y"},
      {" = = = = T = = = = ", " ====T ===="},
      {" = = = T = = = ", " ===T ==="},
      {" = = T = = ", " ==T =="},
      {"20 \xC2\xB0 C",
       "20\xC2\xB0"
       "C"},
      {"end \n start", "end\nstart"},
      {"about N people", "about 1 people"},
      {"dog 's tail", "dog's tail"},
      {"", ""},
  };
  for (const auto& [page, expected] : cases) {
    if (page.starts_with(" =")) continue;  // headings below: the spaces around the text stay
    EXPECT_EQ(wikitext_detokenize(page), expected) << page;
  }
  EXPECT_EQ(wikitext_detokenize(" = = = = T = = = = "), " ==== T ==== ");
  EXPECT_EQ(wikitext_detokenize(" = = = T = = = \n"), " === T ===\n");
  EXPECT_EQ(wikitext_detokenize(" = = T = = \n x"), " == T ==\nx");
}

TEST(Wikitext, published_counts_of_the_test_split) {
  const auto file = data_folder() / "wikitext-2" / "wiki.test.raw";
  if (data_folder().empty() || !std::filesystem::exists(file))
    GTEST_SKIP()
        << "no WikiText-2 here: put wiki.test.raw into $HEADFOLD_DATA/wikitext-2 to check the published counts";
  const std::string raw = read_file(file);
  std::int64_t words = 0, bytes = 0;
  const std::vector<std::string> pages = wikitext_pages(raw);
  for (const std::string& page : pages) {
    words += count_words(page);
    bytes += static_cast<std::int64_t>(page.size());
  }
  EXPECT_EQ(pages.size(), 62U);
  EXPECT_EQ(words, 241335);
  EXPECT_EQ(bytes, 1290527);
  EXPECT_EQ(text_rows(raw).size(), 4358U);
}

TEST(PaperText, rows_keep_their_newline_and_blank_rows_are_empty) {
  EXPECT_THAT(text_rows(" a \n \n\n b"), ElementsAre(" a \n", "", "", " b"));
  EXPECT_TRUE(text_rows("").empty());
  EXPECT_EQ(join_rows(text_rows(" a \n \n b\n")), " a \n\n\n\n\n b\n");
  EXPECT_EQ(join_rows({}), "");
}

TEST(Blocks, cut_the_stream_and_drop_the_remainder) {
  const std::vector<Window> windows = block_windows({10, 11, 12, 13, 14, 15, 16}, 3);
  ASSERT_EQ(windows.size(), 2U);
  EXPECT_THAT(windows[0].inputs, ElementsAre(10, 11));
  EXPECT_THAT(windows[0].targets, ElementsAre(11, 12));
  EXPECT_THAT(windows[1].inputs, ElementsAre(13, 14));
  EXPECT_THAT(windows[1].targets, ElementsAre(14, 15));
  EXPECT_EQ(windows[1].document, 1);
  EXPECT_TRUE(block_windows({1, 2}, 3).empty());
  EXPECT_THROW(block_windows({1, 2}, 1), UsageError);
}

TEST(Rolling, windows_of_every_edge_length) {
  constexpr std::int64_t m = 5, prefix = 99;
  for (const std::int64_t n : {std::int64_t{1}, m - 1, m, m + 1, 2 * m, 2 * m + 1}) {
    std::vector<std::int64_t> ids;
    for (std::int64_t i = 0; i < n; ++i) ids.push_back(i);
    const std::vector<Window> windows = rolling_windows(ids, prefix, m, 7);
    EXPECT_EQ(static_cast<std::int64_t>(windows.size()), (n + m - 1) / m) << n;
    std::vector<std::int64_t> predicted;
    std::int64_t before = 0;
    for (const Window& window : windows) {
      EXPECT_EQ(window.document, 7);
      const auto p = static_cast<std::int64_t>(window.targets.size());
      // inputs: the tokens right before each target; more context only in a short last window, which is filled up to m
      EXPECT_EQ(static_cast<std::int64_t>(window.inputs.size()), before == 0 ? std::min(m, n) : m) << n;
      for (std::int64_t i = 0; i < static_cast<std::int64_t>(window.inputs.size()); ++i) {
        const std::int64_t place =
            before + p - static_cast<std::int64_t>(window.inputs.size()) + i - 1;  // of the input token in the text
        EXPECT_EQ(window.inputs[static_cast<std::size_t>(i)], place < 0 ? prefix : place) << n;
      }
      predicted.insert(predicted.end(), window.targets.begin(), window.targets.end());
      before += p;
    }
    EXPECT_EQ(predicted, ids) << n;  // every token exactly once
  }
  EXPECT_TRUE(rolling_windows({}, prefix, m).empty());
  // The table of the rules, literally.
  const std::vector<Window> windows = rolling_windows({0, 1, 2, 3, 4, 5, 6}, prefix, 3);
  ASSERT_EQ(windows.size(), 3U);
  EXPECT_THAT(windows[0].inputs, ElementsAre(prefix, 0, 1));
  EXPECT_THAT(windows[1].inputs, ElementsAre(2, 3, 4));  // one token of context
  EXPECT_THAT(windows[2].inputs, ElementsAre(3, 4, 5));  // p = 1, so m - p + 1 = 3 tokens of context
  EXPECT_THAT(windows[2].targets, ElementsAre(6));
}

TEST(Tasks, ppl_blocks_follows_the_recipe_its_files_call_for) {
  const ScratchFolder scratch;
  write_file(scratch / "a.jsonl", "{\"text\": \"abc\"}\n{\"text\": \"de\"}\n");
  write_file(scratch / "b.txt", "ab\n\ncd\n");
  const ByteTokenizer tokenizer;
  const Task documents = blocks_task(tokenizer, {.files = {scratch / "a.jsonl"}}, 3);
  EXPECT_EQ(documents.name, "ppl_blocks@3");
  EXPECT_EQ(documents.stream_tokens, 3 + 2 + 2);  // BOS before each document
  EXPECT_THAT(documents.recipe, HasSubstr("BOS before each"));
  ASSERT_EQ(documents.items, 2);
  EXPECT_THAT(documents.windows[0].inputs, ElementsAre(1, 'a' + 3));
  EXPECT_THAT(documents.windows[1].inputs, ElementsAre('c' + 3, 1));
  EXPECT_THAT(documents.windows[1].targets, ElementsAre(1, 'd' + 3));

  const Task paper = blocks_task(tokenizer, {.files = {scratch / "b.txt"}}, 4);
  EXPECT_EQ(paper.stream_tokens, 1 + 10);  // "ab\n" "\n\n" "" "\n\n" "cd\n", BOS once
  EXPECT_THAT(paper.recipe, HasSubstr("own newline"));
  EXPECT_EQ(paper.items_original, 2);

  const Task never = blocks_task(tokenizer, {.files = {scratch / "b.txt"}, .bos = tokenizer::Bos::never}, 4);
  EXPECT_EQ(never.stream_tokens, 10);
  EXPECT_EQ(blocks_task(tokenizer, {.files = {scratch / "b.txt"}}, 4, 1).items, 1);
  EXPECT_EQ(blocks_task(tokenizer, {.files = {scratch / "b.txt"}}, 4, 1).items_original, 2);

  // Explicit joiners.
  EXPECT_EQ(blocks_task(tokenizer, {.files = {scratch / "a.jsonl"}, .joiner = Joiner::paper}, 3).stream_tokens,
            1 + 3 + 2 + 2);
  EXPECT_EQ(blocks_task(tokenizer, {.files = {scratch / "b.txt"}, .joiner = Joiner::documents}, 3).stream_tokens,
            7 + 1);
}

TEST(Tasks, errors_name_the_file_and_both_numbers) {
  const ScratchFolder scratch;
  write_file(scratch / "a.jsonl", "{\"text\": \"abc\"}\n");
  write_file(scratch / "b.txt", "ab\n");
  write_file(scratch / "c.raw", " = T = \n x\n");
  const ByteTokenizer tokenizer;
  const auto short_text = message_of<InputError>([&] { blocks_task(tokenizer, {.files = {scratch / "b.txt"}}, 100); });
  EXPECT_THAT(short_text, testing::AllOf(HasSubstr("4 tokens"), HasSubstr("100"), HasSubstr("b.txt")));
  EXPECT_THAT(message_of<UsageError>([&] {
                blocks_task(tokenizer, {.files = {scratch / "a.jsonl", scratch / "b.txt"}}, 3);
              }),
              HasSubstr("mixes"));
  EXPECT_THAT(message_of<UsageError>([&] {
                rolling_task(tokenizer, {.files = {scratch / "c.raw", scratch / "b.txt"}}, 3);
              }),
              HasSubstr("mixes"));
  EXPECT_THAT(message_of<IoError>([&] { blocks_task(tokenizer, {.files = {scratch / "absent.txt"}}, 3); }),
              HasSubstr("absent.txt"));
  EXPECT_THAT(
      message_of<InputError>([&] { rolling_task(tokenizer, {.files = {scratch / "a.jsonl"}, .field = "body"}, 3); }),
      HasSubstr("body"));
  ByteTokenizer bare;
  bare.bos_ = bare.eos_ = -1;
  EXPECT_THAT(message_of<InputError>([&] { rolling_task(bare, {.files = {scratch / "b.txt"}}, 3); }),
              HasSubstr("neither BOS nor EOS"));
  const Task task = blocks_task(tokenizer, {.files = {scratch / "b.txt"}}, 3);
  EXPECT_NO_THROW(check_ids(task, 259, "model"));
  EXPECT_THAT(message_of<InputError>([&] { check_ids(task, 'b' + 3, "some-model"); }),
              testing::AllOf(HasSubstr("some-model"), HasSubstr(std::to_string('b' + 3)), HasSubstr("window 0")));
  EXPECT_THROW(parse_bos("sometimes"), UsageError);
  EXPECT_THROW(parse_joiner("glue"), UsageError);
}

TEST(Tasks, rolling_counts_the_original_text_and_scores_the_detokenised_one) {
  const ScratchFolder scratch;
  write_file(scratch / "wiki.raw", " = A = \n x , y\n = B = \n z\n");
  write_file(scratch / "docs.jsonl", "{\"text\": \"a b\"}\n{\"text\": \"c\xC3\xA9 d e\"}\n");
  const ByteTokenizer tokenizer;
  const Task wiki = rolling_task(tokenizer, {.files = {scratch / "wiki.raw"}}, 4);
  EXPECT_EQ(wiki.name, "wikitext");
  ASSERT_EQ(wiki.items, 2);
  EXPECT_EQ(wiki.documents[0].original, " = A = \n x , y");
  EXPECT_EQ(wiki.documents[0].scored, " = A =\nx, y");
  EXPECT_EQ(wiki.documents[0].words, 7);
  EXPECT_EQ(wiki.documents[0].bytes, 14);
  EXPECT_EQ(wiki.documents[1].original, " = B = \n z\n");
  // BOS is part of the text and is predicted too, as the harness does.
  EXPECT_EQ(wiki.predictions(), (11 + 1) + (9 + 1));
  EXPECT_EQ(wiki.windows.front().inputs[0], 1);
  EXPECT_EQ(wiki.windows.front().targets[0], 1);

  const Task plain = rolling_task(tokenizer, {.files = {scratch / "docs.jsonl"}, .bos = tokenizer::Bos::never}, 100, 1);
  EXPECT_EQ(plain.name, "rolling");
  EXPECT_EQ(plain.items, 1);
  EXPECT_EQ(plain.items_original, 2);
  EXPECT_EQ(plain.predictions(), 3);
  const Task both = rolling_task(tokenizer, {.files = {scratch / "docs.jsonl"}}, 100);
  EXPECT_EQ(both.documents[1].words, 3);
  EXPECT_EQ(both.documents[1].bytes, 7);  // bytes, not characters
}

}  // namespace
}  // namespace headfold::evaluation
