// --device: the jobs that take it give on the code of GPUs, run on the CPU, what they give on their own code.

#include <gmock/gmock.h>
#include <headfold/base/json.h>
#include <headfold/checkpoint/safetensors.h>

#include "program.h"

namespace headfold::end_to_end {
namespace {

using testing::HasSubstr;
using testing_support::ScratchFolder;

const char* const kDevices[] = {"cpu", "cpu:tensors"};

class DeviceTest : public testing::Test {
 protected:
  Outcome run(int ranks, std::vector<std::string> arguments) {
    return run_headfold(ranks, arguments, scratch_ / "log", 180);
  }
  std::string data(const char* name) { return (testing_support::source_folder() / "demo" / "text" / name).string(); }
  ScratchFolder scratch_;
};

double relative_difference(const at::Tensor& a, const at::Tensor& b) {
  return ((a - b).abs().max() / b.abs().max()).item<double>();
}

TEST_F(DeviceTest, logits_agree_at_every_rank_count) {
  const at::Tensor ids = at::randint(100, {2, 40}, at::kLong);
  checkpoint::write_safetensors(scratch_ / "ids.safetensors", {{"input_ids", ids}});
  for (const char* model : {"prose-llama", "prose-bloom"}) {
    std::vector<at::Tensor> found;
    const bool short_one = std::string(model) == "prose-bloom";
    for (const int ranks : {1, 2, 4})
      for (const char* device : kDevices) {
        if (ranks > 1 && (short_one || std::string(device) == "cpu")) continue;
        const std::string out = (scratch_ / "out.safetensors").string();
        const Outcome outcome = run(ranks, {"logits", "--model", demo_model(model).string(), "--ids",
                                            (scratch_ / "ids.safetensors").string(), "--out", out, "--device", device});
        ASSERT_EQ(outcome.code, 0) << outcome.output;
        found.push_back(checkpoint::SafetensorsFile(out).view("logits").clone());
      }
    ASSERT_EQ(found.size(), short_one ? 2U : 4U);
    for (std::size_t i = 1; i < found.size(); ++i) {
      EXPECT_LT(relative_difference(found[i], found[0]), 1e-5) << model << ", run " << i;
    }
    EXPECT_GT(relative_difference(found[1], found[0]), 0) << "the same code ran twice";
  }
}

TEST_F(DeviceTest, perplexity_and_answers_agree) {
  std::vector<Json> found;
  for (const char* device : kDevices) {
    const std::filesystem::path out = scratch_ / ("scores-" + std::to_string(found.size()));
    const Outcome outcome =
        run(2, {"evaluate", "--model", demo_model("prose-llama").string(), "--reference",
                demo_model("prose-llama").string(), "--data", data("heldout.jsonl"), "--tasks", "ppl_blocks", "--limit",
                "3", "--dtype", "float32", "--out", out.string(), "--device", device});
    ASSERT_EQ(outcome.code, 0) << outcome.output;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(out))
      if (entry.path().filename().string().rfind("results_", 0) == 0) found.push_back(read_json(entry.path()));
  }
  ASSERT_EQ(found.size(), 2U);
  const auto perplexity = [](const Json& results) {
    return results.at("results").begin().value().at("perplexity,none").get<double>();
  };
  EXPECT_GT(perplexity(found[0]), 1);
  EXPECT_NEAR(perplexity(found[1]) / perplexity(found[0]), 1, 1e-5);
  EXPECT_EQ(found[0].dump().find("cpu:tensors"), std::string::npos);
  EXPECT_NE(found[1].dump().find("cpu:tensors"), std::string::npos)
      << "the results do not say where they were computed";
}

TEST_F(DeviceTest, greedy_text_is_the_same) {
  std::vector<std::string> texts;
  for (const char* device : kDevices) {
    const Outcome outcome =
        run(1, {"generate", "--model", demo_model("prose-bloom").string(), "--prompt", "The ship was",
                "--max-new-tokens", "12", "--dtype", "float32", "--device", device});
    ASSERT_EQ(outcome.code, 0) << outcome.output;
    const std::size_t begin = outcome.output.find("\nThe ship was");
    ASSERT_NE(begin, std::string::npos) << outcome.output;
    texts.push_back(outcome.output.substr(begin + 1, outcome.output.find('\n', begin + 1) - begin));
  }
  EXPECT_EQ(texts[0], texts[1]);
}

TEST_F(DeviceTest, healing_begins_with_the_same_losses) {
  std::vector<std::vector<double>> losses;
  for (const char* device : kDevices) {
    const std::filesystem::path out = scratch_ / ("healed-" + std::to_string(losses.size()));
    const std::string model = demo_model("prose-llama").string(), text = data("calibration.jsonl");
    std::vector<std::string> arguments = {"finetune", "--model", model, "--device", device};
    for (const char* more :
         {"--teacher", model.c_str(), "--data",  text.c_str(),      "--seq-len", "64",        "--steps",
          "4",         "--batch",     "4",       "--learning-rate", "1e-3",      "--warm-up", "0",
          "--distill", "0.5",         "--dtype", "float32",         "--out",     out.c_str()})
      arguments.push_back(more);
    const Outcome outcome = run(2, arguments);
    ASSERT_EQ(outcome.code, 0) << outcome.output;
    losses.emplace_back();
    std::ifstream lines(out / "train.jsonl");
    for (std::string line; std::getline(lines, line);)
      if (const Json step = Json::parse(line); step.contains("loss")) losses.back().push_back(step.at("loss"));
  }
  ASSERT_EQ(losses[0].size(), 4U);
  ASSERT_EQ(losses[1].size(), 4U);
  for (std::size_t i = 0; i < 4; ++i)
    EXPECT_NEAR(losses[1][i], losses[0][i], 1e-4 * losses[0][i] + 1e-6) << "step " << i;
  EXPECT_NE(losses[0][3], losses[0][0]) << "nothing was trained";
}

TEST_F(DeviceTest, nonsense_is_refused) {
  for (const auto& [device, what] :
       {std::pair("gpu", "--device gpu"), std::pair("cuda:", "--device cuda:"), std::pair("cuda:x", "--device cuda:x"),
        std::pair("cuda:-1", "--device cuda:-1"), std::pair("", "--device")}) {
    const Outcome outcome =
        run(2, {"generate", "--model", demo_model("prose-llama").string(), "--prompt", "x", "--device", device});
    EXPECT_EQ(outcome.code, 64) << device << "\n" << outcome.output;
    EXPECT_THAT(outcome.output, HasSubstr(what));
  }
}

}  // namespace
}  // namespace headfold::end_to_end
