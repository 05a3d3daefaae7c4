// calibrate -> convert -> evaluate -> report on the demo model with two ranks and few samples.

#include <gmock/gmock.h>
#include <headfold/base/json.h>

#include "program.h"

namespace headfold::end_to_end {
namespace {

using testing_support::ScratchFolder;

/// The newest results file below a folder.
Json results_below(const fs::path& folder) {
  for (const auto& entry : fs::recursive_directory_iterator(folder))
    if (entry.path().filename().string().starts_with("results_")) return read_json(entry.path());
  throw InputError("no results file below " + folder.string());
}

TEST(Pipeline, from_calibration_to_report_on_two_ranks) {
  const ScratchFolder run;
  const std::string model = demo_model("prose-llama");
  const auto step = [&](int ranks, std::vector<std::string> arguments) {
    const Outcome outcome = run_headfold(ranks, arguments, run / ("log-" + arguments[0] + ".txt"), 120);
    ASSERT_EQ(outcome.code, 0) << arguments[0] << ":\n" << outcome.output;
  };
  ASSERT_NO_FATAL_FAILURE(
      step(2, {"calibrate", "--model", model, "--data", demo_text("calibration.jsonl"), "--samples", "24", "--seq-len",
               "128", "--pipeline-ranks", "2", "--out", run / "calibration.h5"}));
  EXPECT_TRUE(fs::exists(run / "calibration.h5.json"));

  const std::vector<std::pair<std::string, std::vector<std::string>>> folds = {
      {"paper", {"--keys", "post-rotation", "--key-metric", "act"}},
      {"stock", {"--keys", "rope-commuting", "--key-metric", "act+query"}},
      {"pooled", {"--keys", "meanpool", "--values", "meanpool"}},
  };
  const auto evaluated = [&](const std::string& name, const std::string& folder) {
    step(2, {"evaluate", "--model", folder, "--reference", model, "--data", demo_text("heldout.jsonl"), "--seq-len",
             "128", "--limit", "24", "--dtype", "float32", "--out", run / ("eval-" + name)});
    return testing::Test::HasFatalFailure() ? Json() : results_below(run / ("eval-" + name));
  };
  const Json original = evaluated("original", model);
  ASSERT_TRUE(original.is_object());
  const Json& base = original["results"]["ppl_blocks@128"];
  const double perplexity = base["perplexity,none"];
  EXPECT_GT(perplexity, 20);
  EXPECT_LT(perplexity, 50);
  EXPECT_EQ(base["kl,none"], 0.0);
  EXPECT_EQ(base["top1_agreement,none"], 1.0);
  EXPECT_EQ(original["headfold"]["world_size"], 2);

  std::map<std::string, double> ratio;
  for (const auto& [name, options] : folds) {
    std::vector<std::string> arguments = {"convert",    "--model", model,   "--calibration", run / "calibration.h5",
                                          "--kv-heads", "4",       "--out", run / name};
    arguments.insert(arguments.end(), options.begin(), options.end());
    ASSERT_NO_FATAL_FAILURE(step(2, arguments));
    const Json provenance = read_json(run / name / "headfold.json");
    EXPECT_EQ(provenance["kv_heads"]["before"], 8);
    EXPECT_EQ(provenance["kv_heads"]["after"], 4);
    const Json results = evaluated(name, run / name);
    ASSERT_TRUE(results.is_object());
    const Json& values = results["results"]["ppl_blocks@128"];
    ratio[name] = values["perplexity,none"].get<double>() / perplexity;
    EXPECT_GT(values["kl,none"].get<double>(), 0.0);
    EXPECT_LT(values["top1_agreement,none"].get<double>(), 1.0);
    EXPECT_NEAR(values["reference_perplexity,none"].get<double>(), perplexity, 1e-6 * perplexity);
    EXPECT_EQ(2 * results["headfold"]["model"]["cache_bytes_per_token"].get<std::int64_t>(),
              results["headfold"]["reference"]["cache_bytes_per_token"].get<std::int64_t>());
  }
  // Few samples: wider bounds than the demo's, the same order.
  EXPECT_GT(ratio["paper"], 0.99);
  EXPECT_LT(ratio["paper"], 1.08);
  EXPECT_LT(ratio["paper"], ratio["stock"]);
  EXPECT_LT(ratio["stock"], 1.2);
  EXPECT_GT(ratio["pooled"], 1.5);

  ASSERT_NO_FATAL_FAILURE(step(1, {"report", "--run", run.path()}));
  std::vector<fs::path> pages;
  for (const auto& entry : fs::recursive_directory_iterator(run.path()))
    if (entry.path().extension() == ".html") pages.push_back(entry.path());
  ASSERT_EQ(pages.size(), 1U);
  const std::string page = read_file(pages[0]);
  for (const auto& [name, options] : folds) EXPECT_THAT(page, testing::HasSubstr(name));
  EXPECT_THAT(page, testing::HasSubstr("<svg"));
  EXPECT_THAT(page, testing::Not(testing::HasSubstr("NaN")));
}

TEST(Pipeline, folds_from_fewer_tokens_than_channels) {
  const ScratchFolder run;
  const auto step = [&](const std::vector<std::string>& arguments) {
    const Outcome outcome = run_headfold(1, arguments, run / "log.txt", 120);
    EXPECT_EQ(outcome.code, 0) << outcome.output;
    return outcome.output;
  };
  for (const auto& [name, samples, length, keys] :
       {std::tuple{"prose-llama", "2", "32", "rope-commuting"}, std::tuple{"prose-llama", "1", "64", "post-rotation"},
        std::tuple{"prose-bloom", "2", "32", "norope"}}) {
    const std::string tag = fmt::format("{}-{}", name, keys);
    step({"calibrate", "--model", demo_model(name), "--data", demo_text("calibration.jsonl"), "--samples", samples,
          "--seq-len", length, "--attention-statistics", "on", "--out", run / (tag + ".h5")});
    for (const char* metric : {"act", "act+out"}) {
      const fs::path out = run.path() / (tag + metric);
      const std::string output =
          step({"convert", "--model", demo_model(name), "--calibration", run / (tag + ".h5"), "--kv-heads", "2",
                "--keys", keys, "--value-metric", metric, "--out", out.string()});
      EXPECT_THAT(output, testing::ContainsRegex("condition|more tokens|tokens would")) << tag << metric;
      for (const Json& layer : read_json(out / "headfold.json")["layers"]) {
        EXPECT_GE(layer["value_relative_loss"].get<double>(), 0.0);
        EXPECT_LT(layer["value_relative_loss"].get<double>(), 1.0);
      }
    }
  }
}

TEST(Pipeline, a_damaged_result_is_made_again_by_the_same_command) {
  const ScratchFolder run;
  const std::vector<std::string> command{"convert",    "--model",   demo_model("prose-llama"),
                                         "--kv-heads", "4",         "--keys",
                                         "meanpool",   "--values",  "meanpool",
                                         "--out",      run / "made"};
  const auto again = [&] { return run_headfold(1, command, run / "log.txt", 120); };
  ASSERT_EQ(again().code, 0);
  const fs::path folder = run.path() / "made", weights = folder / "model.safetensors",
                 record = folder / "headfold.json";
  const std::string tensors = read_file(weights), provenance = read_file(record);
  EXPECT_THAT(again().output, testing::HasSubstr("nothing to do"));
  write_file(weights, tensors.substr(0, tensors.size() - 5000));
  Outcome outcome = again();
  EXPECT_EQ(outcome.code, 0) << outcome.output;
  EXPECT_THAT(outcome.output, testing::HasSubstr("is damaged"));
  EXPECT_TRUE(read_file(weights) == tensors);
  write_file(record, provenance.substr(0, 100));
  outcome = again();
  EXPECT_EQ(outcome.code, 0) << outcome.output;
  EXPECT_EQ(read_json(record)["source"], Json::parse(provenance)["source"]);
}

TEST(Evaluate, gives_the_held_out_figures_of_the_demo_models) {
  const ScratchFolder run;
  for (const auto& [name, expected] : {std::pair{"prose-llama", 29.5}, std::pair{"prose-bloom", 37.6}}) {
    const Outcome outcome = run_headfold(2,
                                         {"evaluate", "--model", demo_model(name), "--data", demo_text("heldout.jsonl"),
                                          "--limit", "120", "--out", run / name},
                                         run / "log.txt", 120);
    ASSERT_EQ(outcome.code, 0) << outcome.output;
    const double perplexity = results_below(run / name)["results"]["ppl_blocks@256"]["perplexity,none"];
    EXPECT_NEAR(perplexity, expected, 0.1) << name;  // published to one digit; bfloat16 where the machine is fast at it
  }
}

}  // namespace
}  // namespace headfold::end_to_end
