// `convert --compare` as a user runs it: the same table at every number of ranks, and the figures of checkpoints that
// are really written.

#include <ATen/Parallel.h>
#include <gmock/gmock.h>
#include <headfold/base/json.h>
#include <headfold/calibration/text.h>
#include <headfold/evaluation/scorer.h>

#include "program.h"

namespace headfold::end_to_end {
namespace {

using testing::HasSubstr;
using testing_support::ScratchFolder;

constexpr int kWindows = 3, kLength = 32;

/// KL, mean loss and agreement of a written model on the windows that --compare draws.
evaluation::Totals scored(const fs::path& model, const fs::path& original) {
  const checkpoint::Reader folded(model), reference(original);
  const auto tokenizer = tokenizer::load_tokenizer(original);
  const at::Tensor drawn = calibration::draw_sequences(
      calibration::token_stream(*tokenizer, calibration::read_documents({demo_text("heldout.jsonl")})), kWindows,
      kLength, 0);
  std::vector<evaluation::Window> windows;
  for (std::int64_t i = 0; i < drawn.size(0); ++i) {
    const auto* ids = drawn.data_ptr<std::int64_t>() + i * kLength;
    windows.push_back({i, {ids, ids + kLength - 1}, {ids + 1, ids + kLength}});
  }
  return total(evaluation::Scorer(folded, &reference, comm::Grid{}, {}).score(windows, "written"));
}

class Compare : public testing::TestWithParam<const char*> {};

TEST_P(Compare, gives_the_figures_of_written_checkpoints_at_every_rank_count) {
  at::set_num_threads(1);
  const std::string name = GetParam();
  const bool llama = name == "prose-llama";
  const ScratchFolder run;
  const fs::path model = demo_model(name);
  const auto step = [&](int ranks, const std::vector<std::string>& arguments) {
    const Outcome outcome = run_headfold(ranks, arguments, run / "log.txt", 240);
    EXPECT_EQ(outcome.code, 0) << outcome.output;
    return outcome.output;
  };
  step(2, {"calibrate", "--model", model, "--data", demo_text("calibration.jsonl"), "--samples", "12", "--seq-len",
           "32", "--attention-statistics", "on", "--threads", "1", "--out", run / "calibration.h5"});
  const std::string keys = llama ? "rope-commuting" : "norope";
  const std::string other = llama ? "norope" : "post-rotation";  // does not suit this model
  const std::vector<std::string> shared = {"convert",
                                           "--model",
                                           model,
                                           "--threads",
                                           "1",
                                           "--calibration",
                                           run / "calibration.h5",
                                           "--refit-data",
                                           demo_text("calibration.jsonl"),
                                           "--refit-samples",
                                           "6",
                                           "--seq-len",
                                           std::to_string(kLength)};
  const std::string folds = fmt::format(
      "meanpool,{0}:weights/svd:weights@kv-heads=2,{1},{0}/svd:act+out@refit-sweeps=1@refit,latent@sink-weight=0.5",
      keys, other);
  Json first;
  for (const int ranks : llama ? std::vector<int>{1, 2, 4} : std::vector<int>{2}) {
    const fs::path out = run / fmt::format("compared-{}", ranks);
    std::vector<std::string> arguments = shared;
    arguments.insert(arguments.end(), {"--kv-heads", "4", "--probe-data", demo_text("heldout.jsonl"), "--probe-windows",
                                       std::to_string(kWindows), "--compare", folds, "--out", out});
    const std::string output = step(ranks, arguments);
    ASSERT_TRUE(fs::exists(out / "compare.json")) << output;
    EXPECT_FALSE(fs::exists(out / "model.safetensors"));
    Json json = read_json(out / "compare.json");
    EXPECT_EQ(json["format"], "headfold-comparison");
    EXPECT_EQ(json["ranks"], ranks);
    ASSERT_EQ(json["plans"].size(), 5U);
    double before = -1;
    for (Json& plan : json["plans"]) {
      plan.erase("seconds");
      plan.erase("seconds_score");
      if (plan.contains("error")) continue;
      EXPECT_GE(plan["kl"].get<double>(), before) << "not ranked";
      before = plan["kl"];
      EXPECT_THAT(output, HasSubstr(plan["name"].get<std::string>()));
    }
    const Json& last = json["plans"].back();
    EXPECT_EQ(last["name"], other);
    EXPECT_THAT(last["error"].get<std::string>(), HasSubstr("does not suit"));
    EXPECT_THAT(output, HasSubstr("not scored: " + other));
    EXPECT_THAT(read_file(out / "compare.md"), HasSubstr("| " + other + " | - |"));
    if (first.is_null()) first = json;
    EXPECT_EQ(json["plans"], first["plans"]) << ranks << " ranks";
    EXPECT_EQ(json["original_loss"], first["original_loss"]);
  }

  // The same folds, written.
  const std::map<std::string, std::vector<std::string>> written = {
      {"meanpool", {"--keys", "meanpool", "--values", "meanpool", "--kv-heads", "4"}},
      {keys + ":weights/svd:weights@kv-heads=2",
       {"--keys", keys, "--key-metric", "weights", "--value-metric", "weights", "--kv-heads", "2"}},
      {keys + "/svd:act+out@refit-sweeps=1@refit",
       {"--keys", keys, "--value-metric", "act+out", "--kv-heads", "4", "--refit-sweeps", "1", "--refit"}},
      {"latent@sink-weight=0.5",
       {"--keys", "latent", "--value-metric", "act+out", "--kv-heads", "4", "--sink-weight", "0.5"}}};
  int compared = 0;
  for (const Json& plan : first["plans"]) {
    if (plan.contains("error")) continue;
    const std::string fold = plan["name"];
    if (!llama && fold != "latent@sink-weight=0.5" && !fold.ends_with("@refit")) continue;  // time
    const std::vector<std::string>& options = written.at(fold);
    std::vector<std::string> arguments = shared;
    if (options.back() != "--refit") {  // text for a refit without one is refused
      const auto at = std::find(arguments.begin(), arguments.end(), "--refit-data");
      arguments.erase(at, at + 4);
    }
    arguments.insert(arguments.end(), options.begin(), options.end());
    const fs::path out = run / fmt::format("written-{}", compared++);
    arguments.insert(arguments.end(), {"--out", out});
    step(2, arguments);
    const evaluation::Totals totals = scored(out, model);
    EXPECT_EQ(plan["kl"].get<double>(), totals.mean_divergence()) << fold;
    EXPECT_EQ(plan["loss"].get<double>(), totals.mean_loss()) << fold;
    EXPECT_EQ(plan["top1_agreement"].get<double>(), totals.agreement()) << fold;
    EXPECT_EQ(first["original_loss"].get<double>(), totals.mean_reference_loss()) << fold;
    const Json record = read_json(out / "headfold.json");
    EXPECT_EQ(plan["cache_bytes_per_token"], record["cache_bytes_per_token"]["after"]) << fold;
    EXPECT_EQ(plan["stock"], record["stock"]) << fold;
    EXPECT_EQ(plan["fold"], record["fold"]) << fold;
    ASSERT_EQ(plan["key_relative_loss"].size(), record["layers"].size()) << fold;
    for (std::size_t l = 0; l < record["layers"].size(); ++l) {
      EXPECT_EQ(plan["key_relative_loss"][l], record["layers"][l]["key_relative_loss"]) << fold;
      EXPECT_EQ(plan["value_relative_loss"][l], record["layers"][l]["value_relative_loss"]) << fold;
    }
  }
  EXPECT_EQ(compared, llama ? 4 : 2);

  if (!llama) return;
  // An earlier comparison may be replaced; the list alone is shown by --dry-run.
  std::vector<std::string> again = {"convert",
                                    "--model",
                                    model,
                                    "--kv-heads",
                                    "4",
                                    "--compare",
                                    "meanpool,all@mean-weight=0.5",
                                    "--probe-data",
                                    demo_text("heldout.jsonl"),
                                    "--out",
                                    run / "compared-1",
                                    "--dry-run"};
  const std::string listed = step(1, again);
  EXPECT_THAT(listed, HasSubstr("lorc@mean-weight=0.5 = latent:weights/svd:weights@latent-groups=1@mean-weight=0.5"));
  EXPECT_THAT(listed, testing::Not(HasSubstr("@refit")));  // no text for it
  EXPECT_EQ(read_json(run / "compared-1" / "compare.json")["plans"].size(), 5U);
  again.erase(again.end() - 1);
  again[6] = "meanpool";
  again.insert(again.end(), {"--probe-windows", "2", "--seq-len", "32"});
  step(1, again);
  EXPECT_EQ(read_json(run / "compared-1" / "compare.json")["plans"].size(), 1U);
}

INSTANTIATE_TEST_SUITE_P(Demo, Compare, testing::Values("prose-llama", "prose-bloom"),
                         [](const auto& model) { return std::string(model.param).substr(6); });

}  // namespace
}  // namespace headfold::end_to_end
