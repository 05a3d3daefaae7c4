// `headfold logits` against transformers' logits, and `headfold generate`, as a user runs them.

#include <headfold/checkpoint/safetensors.h>

#include "program.h"

namespace headfold {
namespace {

using end_to_end::Outcome;
using end_to_end::run_headfold;

class ProgramTest : public testing::Test {
 protected:
  testing_support::ScratchFolder scratch_;
  Outcome run(int ranks, const std::vector<std::string>& arguments) {
    return run_headfold(ranks, arguments, scratch_ / "log.txt");
  }
};

TEST_F(ProgramTest, logits_equal_the_golden_ones_at_any_rank_count) {
  for (const std::string model : {"llama-gqa", "bloom"}) {
    const auto folder = testing_support::golden_folder() / model;
    const auto expected = checkpoint::SafetensorsFile(folder / "expected.safetensors").view("logits").clone();
    std::string one_rank;
    for (const int ranks : {1, 2, 3}) {
      SCOPED_TRACE(fmt::format("{} on {} ranks", model, ranks));
      const auto out = scratch_ / fmt::format("{}-{}.safetensors", model, ranks);
      std::vector<std::string> arguments = {
          "logits", "--model",    folder.string(), "--ids",  (folder / "expected.safetensors").string(),
          "--out",  out.string(), "--dtype",       "float32"};
      if (ranks == 2) arguments.emplace_back("--streamed");
      const Outcome outcome = run(ranks, arguments);
      ASSERT_EQ(outcome.code, 0) << outcome.output;
      const at::Tensor logits = checkpoint::SafetensorsFile(out).view("logits").clone();
      ASSERT_EQ(logits.sizes(), expected.sizes());
      EXPECT_LE(((logits - expected).abs().max() / expected.abs().max()).item<double>(), 1e-4);
      if (ranks == 1) one_rank = read_file(out);
      EXPECT_EQ(read_file(out), one_rank);
    }
  }
}

TEST_F(ProgramTest, more_ranks_than_layers_are_refused_with_a_way_out) {
  const auto folder = testing_support::golden_folder() / "llama-mha";
  const auto out = scratch_ / "out.safetensors";
  const std::vector<std::string> arguments = {
      "logits", "--model", folder.string(), "--ids", (folder / "expected.safetensors").string(), "--out", out.string()};
  const Outcome refused = run(4, arguments);
  EXPECT_EQ(refused.code, 64) << refused.output;
  EXPECT_NE(refused.output.find("--pipeline-ranks"), std::string::npos) << refused.output;
  EXPECT_FALSE(std::filesystem::exists(out));
  std::vector<std::string> replicas = arguments;
  replicas.insert(replicas.end(), {"--pipeline-ranks", "2"});
  EXPECT_EQ(run(4, replicas).code, 0);
  EXPECT_TRUE(std::filesystem::exists(out));
}

TEST_F(ProgramTest, generation_is_reproducible_and_samples_by_seed) {
  const auto folder = end_to_end::demo_model("prose-llama");
  if (!std::filesystem::exists(folder / "config.json")) GTEST_SKIP() << "no demo model at " << folder;
  const auto text = [&](std::vector<std::string> more) {
    std::vector<std::string> arguments = {
        "generate",         "--model", folder.string(), "--prompt", "The old man looked at",
        "--max-new-tokens", "12",      "--dtype",       "float32"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const Outcome outcome = run(1, arguments);
    EXPECT_EQ(outcome.code, 0) << outcome.output;
    EXPECT_NE(outcome.output.find("tokens/s"), std::string::npos);
    const auto begin = outcome.output.find("The old man looked at");
    EXPECT_NE(begin, std::string::npos) << outcome.output;
    return begin == std::string::npos ? std::string()
                                      : outcome.output.substr(begin, outcome.output.find('\n', begin) - begin);
  };
  const std::string greedy = text({});
  EXPECT_GT(greedy.size(), std::string("The old man looked at").size() + 12);
  EXPECT_EQ(text({"--temperature", "1", "--top-k", "1", "--seed", "9"}), greedy);
  EXPECT_EQ(text({"--temperature", "1", "--seed", "5"}), text({"--temperature", "1", "--seed", "5"}));
  EXPECT_NE(text({"--temperature", "1", "--seed", "5"}), text({"--temperature", "1", "--seed", "6"}));
  EXPECT_EQ(run(2, {"generate", "--model", folder.string(), "--prompt", "a"}).code, 64);
  EXPECT_EQ(run(1, {"generate", "--model", folder.string(), "--prompt", "a", "--max-new-tokens", "100000"}).code, 64);
}

}  // namespace
}  // namespace headfold
