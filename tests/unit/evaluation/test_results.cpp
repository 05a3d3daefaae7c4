// Results files: the harness's schema, honest values, and numbers that come back.

#include <gmock/gmock.h>
#include <headfold/base/files.h>
#include <headfold/base/hash.h>
#include <headfold/evaluation/results.h>

#include <cmath>
#include <set>

#include "models.h"
#include "world.h"

namespace headfold::evaluation {
namespace {

using testing_support::ScratchFolder;
using testing_support::world;

std::set<std::string> keys_of(const Json& object) {
  std::set<std::string> keys;
  for (const auto& [key, value] : object.items()) keys.insert(key);
  return keys;
}

TEST(Results, names_are_sanitised_like_the_harness_does) {
  EXPECT_EQ(sanitized("org/model"), "org__model");
  EXPECT_EQ(sanitized("a<>:\"b"), "a__b");
  EXPECT_EQ(sanitized("a/b:c"), "a__b__c");
  EXPECT_EQ(sanitized("plain-1.2_x"), "plain-1.2_x");
  const std::string time = file_time();
  ASSERT_EQ(time.size(), 26U);
  EXPECT_EQ(time.find(':'), std::string::npos);
  EXPECT_EQ(time[10], 'T');
  EXPECT_EQ(time[19], '.');
}

TEST(Results, file_has_every_key_and_the_numbers_follow_from_the_samples) {
  const checkpoint::Reader reader(demo_model("prose-llama"));
  const auto tokenizer = tokenizer::load_tokenizer(reader.folder());
  const ScratchFolder scratch;
  const Task blocks = blocks_task(*tokenizer, heldout(), 32, 3);
  const Task rolling = rolling_task(*tokenizer, heldout(), 64, 2);
  const Scorer scorer(reader, &reader, comm::make_grid(world(), 1), {.micro_batch = 2});
  std::vector<TaskResult> results;
  for (const Task* task : {&blocks, &rolling})
    results.push_back(make_result(*task, scorer.score(task->windows, task->name), true));
  if (!world().root()) return;

  RunInfo run;
  run.model = &reader;
  run.tokenizer = tokenizer.get();
  run.source = heldout();
  run.limit = 3;
  run.max_length = 64;
  run.headfold["format"] = "headfold-results";
  const fs::path path = write_results(scratch / "out", run, results);
  const Json file = read_json(path);
  const std::set<std::string> expected = {"results",
                                          "group_subtasks",
                                          "configs",
                                          "versions",
                                          "n-shot",
                                          "higher_is_better",
                                          "n-samples",
                                          "config",
                                          "git_hash",
                                          "date",
                                          "pretty_env_info",
                                          "transformers_version",
                                          "lm_eval_version",
                                          "upper_git_hash",
                                          "tokenizer_pad_token",
                                          "tokenizer_eos_token",
                                          "tokenizer_bos_token",
                                          "eot_token_id",
                                          "max_length",
                                          "task_hashes",
                                          "model_source",
                                          "model_name",
                                          "model_name_sanitized",
                                          "system_instruction",
                                          "system_instruction_sha",
                                          "fewshot_as_multiturn",
                                          "chat_template",
                                          "chat_template_sha",
                                          "total_evaluation_time_seconds",
                                          "headfold"};
  EXPECT_EQ(keys_of(file), expected);
  const std::set<std::string> config = {
      "model",      "model_args",      "model_num_parameters", "model_dtype", "model_revision",
      "model_sha",  "batch_size",      "batch_sizes",          "device",      "use_cache",
      "limit",      "bootstrap_iters", "gen_kwargs",           "random_seed", "numpy_seed",
      "torch_seed", "fewshot_seed"};
  EXPECT_EQ(keys_of(file["config"]), config);
  EXPECT_EQ(file["model_name"], "prose-llama");
  EXPECT_EQ(file["n-samples"]["rolling"]["effective"], 2);
  EXPECT_EQ(file["n-samples"]["rolling"]["original"], rolling.items_original);
  EXPECT_EQ(file["tokenizer_bos_token"][1], "1");
  EXPECT_EQ(file["tokenizer_eos_token"][1], "2");
  EXPECT_EQ(file["higher_is_better"]["ppl_blocks@32"]["perplexity"], false);
  EXPECT_EQ(file["higher_is_better"]["ppl_blocks@32"]["top1_agreement"], true);
  EXPECT_EQ(file["config"]["model_num_parameters"], 6843648) << "parameters of the demo model, counted from its shapes";

  // Recompute both tasks from the sample lines.
  const auto lines_of = [&](const std::string& task) {
    const std::string time = path.filename().string().substr(8, 26);
    const std::string text = read_file(scratch / "out" / ("samples_" + task + "_" + time + ".jsonl"));
    std::vector<Json> lines;
    for (std::size_t at = 0; at < text.size(); at = text.find('\n', at) + 1)
      lines.push_back(Json::parse(text.substr(at, text.find('\n', at) - at)));
    return lines;
  };
  double loss = 0;
  const std::vector<Json> windows = lines_of("ppl_blocks@32");
  ASSERT_EQ(windows.size(), 3U);
  for (const Json& line : windows) loss += line["loss"].get<double>() / 3;
  const Json& block_results = file["results"]["ppl_blocks@32"];
  EXPECT_NEAR(block_results["loss,none"].get<double>(), loss, 1e-9);
  EXPECT_NEAR(block_results["perplexity,none"].get<double>(), std::exp(loss), 1e-6);
  EXPECT_EQ(block_results["kl,none"], 0.0);
  EXPECT_EQ(block_results["top1_agreement,none"], 1.0);
  EXPECT_EQ(block_results["perplexity_stderr,none"], "N/A");

  double log_likelihood = 0;
  std::int64_t words = 0, bytes = 0;
  std::string hashes;
  const std::vector<Json> documents = lines_of("rolling");
  ASSERT_EQ(documents.size(), 2U);
  for (const Json& line : documents) {
    log_likelihood += line["word_perplexity"][0].get<double>();
    words += line["word_perplexity"][1].get<std::int64_t>();
    bytes += line["byte_perplexity"][1].get<std::int64_t>();
    EXPECT_EQ(line["resps"][0][0], line["filtered_resps"][0]);
    EXPECT_EQ(line["target_hash"], sha256_hex(line["target"].get<std::string>()));
    hashes += line["doc_hash"].get<std::string>() + line["prompt_hash"].get<std::string>() +
              line["target_hash"].get<std::string>();
  }
  const Json& rolled = file["results"]["rolling"];
  EXPECT_NEAR(rolled["word_perplexity,none"].get<double>(), std::exp(-log_likelihood / static_cast<double>(words)),
              1e-6);
  EXPECT_NEAR(rolled["byte_perplexity,none"].get<double>(), std::exp(-log_likelihood / static_cast<double>(bytes)),
              1e-9);
  EXPECT_NEAR(rolled["bits_per_byte,none"].get<double>(), -log_likelihood / static_cast<double>(bytes) / std::log(2.0),
              1e-9);
  EXPECT_EQ(file["task_hashes"]["rolling"], sha256_hex(hashes));
}

}  // namespace
}  // namespace headfold::evaluation
