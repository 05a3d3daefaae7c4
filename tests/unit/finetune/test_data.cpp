// Sequences from text and instructions, and the order they are trained in.

#include <gmock/gmock.h>
#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/calibration/text.h>
#include <headfold/finetune/data.h>

#include <numeric>
#include <set>

#include "world.h"

namespace headfold::finetune {
namespace {

using testing::HasSubstr;
using testing_support::ScratchFolder;
using testing_support::world;

fs::path llama() {
  return testing_support::source_folder() / "demo" / "models" / "prose-llama";
}
constexpr std::int64_t kVocab = 4096;

void write(const fs::path& path, const std::string& text) {
  if (world().root()) write_file(path, text);
  world().barrier("file");
}

std::string error_of(const DataOptions& options, std::int64_t vocab = kVocab) {
  try {
    read_dataset(world(), llama(), vocab, options);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::bad_input);
    return std::string(error.what()) + " | " + error.hint();
  }
  return "no error";
}

const std::vector<std::string> kDocuments = {"It was a bright day in the garden, and the birds sang to one another.",
                                             "She had been gone for a year.",
                                             "Then he came home again with the horses."};

std::string lines() {
  std::string text;
  for (const std::string& document : kDocuments) text += "{\"text\": \"" + document + "\"}\n";
  return text;
}

TEST(TextDataTest, every_token_is_predicted_once_across_sequences) {
  const ScratchFolder scratch;
  write(scratch / "a.jsonl", lines());
  DataOptions options;
  options.files = {scratch / "a.jsonl"};
  options.length = 8;
  const Dataset data = read_dataset(world(), llama(), kVocab, options);
  const std::vector<std::int64_t> stream = calibration::token_stream(*tokenizer::load_tokenizer(llama()), kDocuments);
  ASSERT_EQ(data.sequences(), (static_cast<std::int64_t>(stream.size()) - 1) / 8);
  EXPECT_EQ(data.scored(), data.sequences() * 8);
  EXPECT_EQ(data.origin.documents, 3);
  for (std::int64_t s = 0; s < data.sequences(); ++s) {
    const Batch batch = data.batch(std::vector<std::int64_t>{s});
    EXPECT_FALSE(batch.segments.defined());
    for (std::int64_t t = 0; t < 8; ++t) {
      EXPECT_EQ(batch.ids[0][t].item<std::int64_t>(), stream[static_cast<std::size_t>(s * 8 + t)]);
      EXPECT_EQ(batch.targets[0][t].item<std::int64_t>(), stream[static_cast<std::size_t>(s * 8 + t + 1)]);
    }
  }
  // As evaluate scores: the first token of a block is predicted by none.
  options.blocks = true;
  options.limit = 2;
  const Dataset blocks = read_dataset(world(), llama(), kVocab, options);
  EXPECT_EQ(blocks.sequences(), 2);
  EXPECT_EQ(blocks.scored(), 2 * 7);
  EXPECT_EQ(blocks.batch(std::vector<std::int64_t>{1}).targets[0][7].item<std::int64_t>(), -1);
  EXPECT_NE(blocks.fingerprint(), data.fingerprint());
}

TEST(TextDataTest, documents_can_be_kept_apart) {
  const ScratchFolder scratch;
  write(scratch / "a.jsonl", lines());
  DataOptions options;
  options.files = {scratch / "a.jsonl"};
  options.length = 16;
  options.separate_documents = true;
  const Dataset data = read_dataset(world(), llama(), kVocab, options);
  const auto tokenizer = tokenizer::load_tokenizer(llama());
  std::vector<std::int64_t> all(static_cast<std::size_t>(data.sequences()));
  std::iota(all.begin(), all.end(), std::int64_t{0});
  const Batch batch = data.batch(all);
  ASSERT_TRUE(batch.segments.defined());
  std::int64_t boundaries = 0;
  for (std::int64_t s = 0; s < data.sequences(); ++s) {
    EXPECT_EQ(batch.segments[s][0].item<std::int64_t>(), 0);
    for (std::int64_t t = 1; t < 16; ++t) {
      const bool begins = batch.ids[s][t].item<std::int64_t>() == tokenizer->bos();
      EXPECT_EQ(batch.segments[s][t].item<std::int64_t>() - batch.segments[s][t - 1].item<std::int64_t>(),
                begins ? 1 : 0);
      // The step into another document is not scored, all others are.
      EXPECT_EQ(batch.targets[s][t - 1].item<std::int64_t>() < 0, begins);
      boundaries += begins ? 1 : 0;
    }
  }
  EXPECT_EQ(boundaries, 2);
}

TEST(InstructionDataTest, answers_alone_are_scored_and_rows_stay_apart) {
  const ScratchFolder scratch;
  write(scratch / "a.json",
        "\xEF\xBB\xBF[{\"instruction\": \"Name a colour.\", \"input\": \"\", \"output\": \"Blue.\"},\n"
        "{\"instruction\": \"Say it again.\", \"input\": \"A house\", \"output\": \"A house, a house\"}]");
  write(scratch / "b.jsonl", "{\"prompt\": \"What is the sun?\\n\", \"response\": \"A star.\"}\n\n");
  DataOptions options;
  options.files = {scratch / "a.json", scratch / "b.jsonl"};
  options.length = 256;
  const Dataset data = read_dataset(world(), llama(), kVocab, options);
  EXPECT_EQ(data.origin.kind, "instructions");
  EXPECT_EQ(data.origin.documents, 3);
  ASSERT_EQ(data.sequences(), 1);
  const auto tokenizer = tokenizer::load_tokenizer(llama());
  const Batch batch = data.batch(std::vector<std::int64_t>{0});
  // What is scored reads as the answers, each with EOS behind it.
  std::vector<std::vector<std::int64_t>> answers;
  std::int64_t eos = 0, before = -1;
  for (std::int64_t t = 0; t < 256; ++t) {
    const auto target = batch.targets[0][t].item<std::int64_t>();
    if (target < 0) continue;
    const auto segment = batch.segments[0][t].item<std::int64_t>();
    if (segment != before) answers.emplace_back();
    before = segment;
    EXPECT_EQ(batch.ids[0][t + 1].item<std::int64_t>(), target);
    EXPECT_EQ(batch.segments[0][t + 1].item<std::int64_t>(), segment);
    if (target == tokenizer->eos()) ++eos;
    answers.back().push_back(target);
  }
  ASSERT_EQ(answers.size(), 3U);
  EXPECT_EQ(eos, 3);
  EXPECT_THAT(tokenizer->decode(answers[0]), HasSubstr("Blue."));
  EXPECT_THAT(tokenizer->decode(answers[1]), HasSubstr("A house, a house"));
  EXPECT_THAT(tokenizer->decode(answers[2]), HasSubstr("A star."));
  EXPECT_EQ(tokenizer->decode(answers[0]).find("colour"), std::string::npos);
}

TEST(InstructionDataTest, long_rows_are_cut_and_vanishing_answers_refused) {
  const ScratchFolder scratch;
  write(scratch / "long.jsonl", "{\"prompt\": \"Go on: \", \"response\": \"" + std::string(200, 'a') + " b c d e\"}\n");
  DataOptions options;
  options.files = {scratch / "long.jsonl"};
  options.length = 16;
  const Dataset data = read_dataset(world(), llama(), kVocab, options);
  EXPECT_EQ(data.origin.cut, 1);
  EXPECT_EQ(data.sequences(), 1);
  EXPECT_GT(data.scored(), 0);
  write(scratch / "prompt.jsonl", lines() + "{\"prompt\": \"" + std::string(400, 'x') + "\", \"response\": \"y\"}\n");
  options.files = {scratch / "prompt.jsonl"};
  options.format = DataFormat::instructions;
  EXPECT_THAT(error_of(options), HasSubstr("prompt.jsonl:1"));  // the row of text
  write(scratch / "prompt.jsonl", "{\"prompt\": \"" + std::string(400, 'x') + "\", \"response\": \"y\"}\n");
  EXPECT_THAT(error_of(options),
              testing::AllOf(HasSubstr("prompt.jsonl:1"), HasSubstr("16"), HasSubstr("--skip-long")));
  write(scratch / "prompt.jsonl", "{\"prompt\": \"" + std::string(400, 'x') +
                                      "\", \"response\": \"y\"}\n{\"prompt\": \"A: \", \"response\": \"y\"}\n");
  options.skip_long = true;
  const Dataset rest = read_dataset(world(), llama(), kVocab, options);
  EXPECT_EQ(rest.origin.skipped, 1);
  EXPECT_EQ(rest.sequences(), 1);
}

TEST(DataErrorsTest, name_file_row_and_reason) {
  const ScratchFolder scratch;
  DataOptions options;
  options.length = 16;
  EXPECT_THAT(error_of(options), HasSubstr("--data"));
  options.files = {scratch / "x.jsonl"};
  write(scratch / "x.jsonl", "\n\n");
  EXPECT_THAT(error_of(options), HasSubstr("no text"));
  write(scratch / "x.jsonl", "{\"text\": \"short\"}\n");
  EXPECT_THAT(error_of(options), testing::AllOf(HasSubstr("x.jsonl"), HasSubstr("16")));
  write(scratch / "x.jsonl", lines());
  EXPECT_THAT(error_of(options, 100), HasSubstr("100 entries"));
  options.format = DataFormat::instructions;
  options.length = 128;
  write(scratch / "x.jsonl", "\n");
  EXPECT_THAT(error_of(options), HasSubstr("no instructions"));
  write(scratch / "x.jsonl", "{\"instruction\": \"a\", \"output\": 3}\n");
  EXPECT_THAT(error_of(options), testing::AllOf(HasSubstr("x.jsonl:1"), HasSubstr("output")));
  write(scratch / "x.jsonl",
        "{\"instruction\": \"a\", \"output\": \"b\"}\n{\"instruction\": \"a\", \"output\": \" \"}\n");
  EXPECT_THAT(error_of(options), testing::AllOf(HasSubstr("x.jsonl:2"), HasSubstr("empty")));
  write(scratch / "x.jsonl", "[1]\n");
  EXPECT_THAT(error_of(options), HasSubstr("x.jsonl:1"));
}

TEST(SamplerTest, epochs_are_permutations_that_depend_on_seed_and_epoch_alone) {
  Sampler sampler(10, 3);
  const std::vector<std::int64_t> two = sampler.draw(0, 20);
  for (const int epoch : {0, 1}) {
    const std::set<std::int64_t> seen(two.begin() + epoch * 10, two.begin() + epoch * 10 + 10);
    EXPECT_EQ(seen.size(), 10U);
  }
  EXPECT_NE(std::vector(two.begin(), two.begin() + 10), std::vector(two.begin() + 10, two.end()));
  Sampler later(10, 3);
  EXPECT_EQ(later.draw(17, 3), std::vector(two.begin() + 17, two.end()));
  EXPECT_NE(Sampler(10, 4).draw(0, 10), Sampler(10, 3).draw(0, 10));
}

}  // namespace
}  // namespace headfold::finetune
