// Documents from files, token streams and the drawing of calibration sequences.

#include <headfold/calibration/text.h>

#include <set>

#include "tokenizer_support.h"

namespace headfold::calibration {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using namespace testing_support;

/// One token per byte, with BOS 256 and EOS 257 where asked for.
class ByteTokenizer final : public tokenizer::Tokenizer {
 public:
  ByteTokenizer(bool adds_bos, bool has_eos, bool has_bos = true)
      : adds_bos_(adds_bos), has_eos_(has_eos), has_bos_(has_bos) {}
  using Tokenizer::encode;
  std::vector<std::int64_t> encode(std::string_view text) const override {
    std::vector<std::int64_t> ids;
    for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
    return ids;
  }
  std::string decode(const std::vector<std::int64_t>&) const override { return {}; }
  std::string token_text(std::int64_t id) const override { return decode({id}); }
  std::int64_t vocab_size() const override { return 258; }
  std::int64_t bos() const override { return has_bos_ ? 256 : -1; }
  std::int64_t eos() const override { return has_eos_ ? 257 : -1; }
  bool adds_bos() const override { return adds_bos_; }
  std::string kind() const override { return "bytes"; }

 private:
  bool adds_bos_, has_eos_, has_bos_;
};

TEST(ReadDocumentsTest, text_files_are_one_document_and_lines_many) {
  const ScratchFolder folder;
  write_file(folder / "a.txt", "first\nsecond\n");
  write_file(folder / "b.jsonl",
             "{\"text\": \"one\"}\n\n  \r\n{\"other\": 3, \"text\": \"tw\\u00f6\\n\"}\r\n{\"text\": \"last line "
             "without end\"}");
  write_file(folder / "c.raw", "\xEF\xBB\xBFmark");
  EXPECT_THAT(read_documents({folder / "a.txt", folder / "b.jsonl", folder / "c.raw"}),
              ElementsAre("first\nsecond\n", "one", "twö\n", "last line without end", "mark"));
  EXPECT_THAT(read_documents({folder / "b.jsonl", folder / "a.txt"}),
              ElementsAre("one", "twö\n", "last line without end", "first\nsecond\n"));
  // Line ends as Python reads them; JSON says itself what it means.
  write_file(folder / "ends.txt", "a\r\nb\rc\r\r\n\nd\r");
  write_file(folder / "ends.jsonl", "{\"text\": \"a\\r\\nb\"}\r\n");
  EXPECT_THAT(read_documents({folder / "ends.txt", folder / "ends.jsonl"}), ElementsAre("a\nb\nc\n\n\nd\n", "a\r\nb"));
  write_file(folder / "d.jsonl", "\xEF\xBB\xBF{\"prompt\": \"p\", \"text\": \"t\"}\n{\"prompt\": \"\"}\n");
  EXPECT_THAT(read_documents({folder / "d.jsonl"}, "prompt"), ElementsAre("p", ""));
}

TEST(ReadDocumentsTest, reads_the_demo) {
  EXPECT_EQ(read_documents({demo_folder() / "text/heldout.jsonl"}), real_documents(100000));
  EXPECT_EQ(real_documents(100000).size(), 256U);
}

TEST(ReadDocumentsTest, errors_name_file_and_line) {
  const ScratchFolder folder;
  const auto lines = [&](const std::string& content) {
    write_file(folder / "x.jsonl", content);
    return std::vector<fs::path>{folder / "x.jsonl"};
  };
  const auto corrupt = [&](const std::string& content) {
    return message_of<CorruptFile>([&] { read_documents(lines(content)); });
  };
  const auto unusable = [&](const std::string& content) {
    return message_of<InputError>([&] { read_documents(lines(content)); });
  };
  EXPECT_THAT(corrupt("{\"text\": \"a\"}\n\n{\"text\": \"b\"\n"), HasSubstr("x.jsonl:3"));
  EXPECT_THAT(corrupt("{\"text\": \"a\"}\n[\"b\"]\n"), HasSubstr("x.jsonl:2"));
  EXPECT_THAT(corrupt("{\"text\": \"a\"} {\"text\": \"b\"}\n"), HasSubstr("x.jsonl:1"));
  EXPECT_THAT(corrupt("{\"text\": \"\\ud800\"}\n"), HasSubstr("x.jsonl:1"));
  EXPECT_THAT(unusable("{\"text\": \"a\"}\n{\"body\": \"b\", \"n\": 1}\n"),
              testing::AllOf(HasSubstr("x.jsonl:2"), HasSubstr("\"text\""), HasSubstr("\"body\" (string)"),
                             HasSubstr("\"n\" (number)")));
  EXPECT_THAT(unusable("{\"text\": 5}\n"), testing::AllOf(HasSubstr("x.jsonl:1"), HasSubstr("number")));
  EXPECT_THAT(unusable("{}\n"), HasSubstr("none"));
  EXPECT_THAT(unusable("{\"text\": \"a\"}\n{\"text\": \"\xC3(\"}\n"),
              testing::AllOf(HasSubstr("x.jsonl:2"), HasSubstr("byte 10")));
  write_file(folder / "y.txt", "good\xFF");
  EXPECT_THAT(message_of<InputError>([&] { read_documents({folder / "y.txt"}); }),
              testing::AllOf(HasSubstr("y.txt"), HasSubstr("byte 4")));
}

TEST(ReadDocumentsTest, nothing_to_read_is_an_error) {
  const ScratchFolder folder;
  EXPECT_THROW(read_documents({}), InputError);
  EXPECT_THAT(message_of<IoError>([&] { read_documents({folder / "absent.txt"}); }), HasSubstr("absent.txt"));
  EXPECT_THROW(read_documents({folder.path()}), Error);
  write_file(folder / "empty.txt", "");
  write_file(folder / "blank.jsonl", "\n\n{\"text\": \"\"}\n");
  EXPECT_THAT(message_of<InputError>([&] {
                read_documents({folder / "empty.txt", folder / "blank.jsonl"});
              }),
              testing::AllOf(HasSubstr("empty.txt"), HasSubstr("blank.jsonl")));
  write_file(folder / "table.parquet", "PAR1");
  EXPECT_THAT(message_of<InputError>([&] { read_documents({folder / "table.parquet"}); }), HasSubstr(".parquet"));
}

TEST(DataHashTest, follows_content_order_and_field_but_not_names) {
  const ScratchFolder folder;
  write_file(folder / "a.txt", "one");
  write_file(folder / "b.txt", "two");
  write_file(folder / "copy.txt", "one");
  write_file(folder / "c.txt", "onet");
  write_file(folder / "d.txt", "wo");
  const std::string hash = data_hash({folder / "a.txt", folder / "b.txt"}, "text");
  EXPECT_EQ(hash.size(), 64U);
  EXPECT_EQ(data_hash({folder / "copy.txt", folder / "b.txt"}, "text"), hash);
  EXPECT_NE(data_hash({folder / "b.txt", folder / "a.txt"}, "text"), hash);
  EXPECT_NE(data_hash({folder / "c.txt", folder / "d.txt"}, "text"), hash) << "text moved from one file to the next";
  EXPECT_NE(data_hash({folder / "a.txt", folder / "b.txt"}, "body"), hash);
  EXPECT_THROW(data_hash({folder / "absent.txt"}, "text"), IoError);
}

TEST(TokenStreamTest, one_token_marks_each_boundary) {
  const std::vector<std::string> documents = {"ab", "", "c"};
  using tokenizer::Bos;
  for (const bool adds_bos : {true, false}) {
    for (const Bos policy : {Bos::model_default, Bos::always})
      EXPECT_THAT(token_stream(ByteTokenizer(adds_bos, true), documents, policy),
                  ElementsAre(256, 'a', 'b', 256, 256, 'c'));
    EXPECT_THAT(token_stream(ByteTokenizer(adds_bos, true), documents, Bos::never),
                ElementsAre('a', 'b', 257, 257, 'c', 257));
    EXPECT_THAT(token_stream(ByteTokenizer(adds_bos, false), documents, Bos::never), ElementsAre('a', 'b', 'c'));
  }
  const ByteTokenizer without_bos(false, true, false);
  EXPECT_THAT(token_stream(without_bos, documents), ElementsAre('a', 'b', 257, 257, 'c', 257));
  EXPECT_THROW(token_stream(without_bos, documents, Bos::always), InputError);
}

std::vector<std::int64_t> counting(std::int64_t tokens) {
  std::vector<std::int64_t> stream(static_cast<std::size_t>(tokens));
  for (std::int64_t i = 0; i < tokens; ++i) stream[static_cast<std::size_t>(i)] = i;
  return stream;
}

/// Indices of the windows that were drawn.
std::vector<std::int64_t> windows_of(const at::Tensor& sequences) {
  std::vector<std::int64_t> windows;
  for (std::int64_t i = 0; i < sequences.size(0); ++i) {
    const auto first = sequences[i][0].item<std::int64_t>();
    EXPECT_EQ(first % sequences.size(1), 0);
    EXPECT_TRUE(sequences[i].equal(at::arange(first, first + sequences.size(1), at::kLong)));
    windows.push_back(first / sequences.size(1));
  }
  return windows;
}

TEST(DrawSequencesTest, the_same_windows_everywhere) {
  const auto drawn = draw_sequences(counting(1003), 8, 10, 0);
  EXPECT_EQ(drawn.scalar_type(), at::kLong);
  EXPECT_EQ(drawn.sizes(), at::IntArrayRef({8, 10}));
  // Fixed for good: calibration files of one seed must be comparable between machines and versions.
  EXPECT_THAT(windows_of(drawn), ElementsAre(94, 6, 19, 89, 80, 8, 49, 70));
  EXPECT_THAT(windows_of(draw_sequences(counting(1003), 8, 10, 1)), ElementsAre(28, 79, 62, 45, 0, 59, 80, 10));
  EXPECT_THAT(windows_of(draw_sequences(counting(1003), 8, 10, 0xFFFFFFFFFFFFFFFFULL)),
              ElementsAre(20, 96, 29, 37, 26, 99, 22, 9));
}

TEST(DrawSequencesTest, without_replacement_and_evenly) {
  const auto all = windows_of(draw_sequences(counting(505), 101, 5, 42));
  EXPECT_EQ(std::set<std::int64_t>(all.begin(), all.end()).size(), 101U);
  // Every window is drawn first about equally often: 4000 draws from 10, standard deviation 19.
  std::vector<int> first(10, 0);
  for (std::uint64_t seed = 0; seed < 4000; ++seed)
    ++first[static_cast<std::size_t>(windows_of(draw_sequences(counting(20), 1, 2, seed))[0])];
  for (const int count : first) EXPECT_NEAR(count, 400, 100);
}

TEST(DrawSequencesTest, fewer_samples_are_the_first_of_more) {
  const auto few = draw_sequences(counting(5000), 16, 16, 3), many = draw_sequences(counting(5000), 64, 16, 3);
  EXPECT_TRUE(few.equal(many.slice(0, 0, 16)));
}

TEST(DrawSequencesTest, too_little_text_is_told_with_both_numbers) {
  EXPECT_THAT(message_of<InputError>([] { draw_sequences(counting(999), 10, 100, 0); }),
              testing::AllOf(HasSubstr("999"), HasSubstr("9 sequences of 100"), HasSubstr("10 were asked for")));
  EXPECT_NO_THROW(draw_sequences(counting(1000), 10, 100, 0));
  EXPECT_THROW(draw_sequences({}, 1, 1, 0), InputError);
  EXPECT_THROW(draw_sequences(counting(10), 0, 1, 0), InputError);
  EXPECT_THROW(draw_sequences(counting(10), 1, 0, 0), InputError);
  EXPECT_THROW(draw_sequences(counting(10), -1, 5, 0), InputError);
  EXPECT_THROW(draw_sequences(counting(10), std::int64_t{1} << 40, std::int64_t{1} << 40, 0), InputError);
}

}  // namespace
}  // namespace headfold::calibration
