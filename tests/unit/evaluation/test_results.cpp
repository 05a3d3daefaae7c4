// Results files: the harness's schema, honest values, and numbers that come back.

#include <gmock/gmock.h>
#include <headfold/base/files.h>
#include <headfold/base/hash.h>
#include <headfold/calibration/text.h>
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

/// Top-level keys of a results file without groups (docs/formats.md; the harness's own and `headfold`).
std::set<std::string> top_level_keys() {
  return {"results",
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
}

std::set<std::string> config_keys() {
  return {"model",      "model_args",      "model_num_parameters", "model_dtype", "model_revision",
          "model_sha",  "batch_size",      "batch_sizes",          "device",      "use_cache",
          "limit",      "bootstrap_iters", "gen_kwargs",           "random_seed", "numpy_seed",
          "torch_seed", "fewshot_seed"};
}

std::vector<Json> lines_of(const fs::path& file) {
  const std::string text = read_file(file);
  std::vector<Json> lines;
  for (std::size_t at = 0; at < text.size(); at = text.find('\n', at) + 1)
    lines.push_back(Json::parse(text.substr(at, text.find('\n', at) - at)));
  return lines;
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
  Results results;
  for (const Task* task : {&blocks, &rolling})
    results.texts.push_back(make_result(*task, scorer.score(task->windows, task->name), true));
  if (!world().root()) return;

  RunInfo run;
  run.model = &reader;
  run.tokenizer = tokenizer.get();
  run.limit = 3;
  run.max_length = 64;
  run.headfold["format"] = "headfold-results";
  const fs::path path = write_results(scratch / "out", run, results);
  const Json file = read_json(path);
  EXPECT_EQ(keys_of(file), top_level_keys());
  EXPECT_EQ(keys_of(file["config"]), config_keys());
  EXPECT_EQ(file["model_name"], "prose-llama");
  for (const Task* task : {&blocks, &rolling}) {
    const Json& config = file["configs"][task->name];
    EXPECT_EQ(config["data_files"], Json::array({heldout().files[0].filename().string()}));
    EXPECT_EQ(config["data_hash"], calibration::data_hash(heldout().files, "text"));
    EXPECT_EQ(config["bos"], "default");
  }
  EXPECT_EQ(file["n-samples"]["rolling"]["effective"], 2);
  EXPECT_EQ(file["n-samples"]["rolling"]["original"], rolling.items_original);
  EXPECT_EQ(file["tokenizer_bos_token"][1], "1");
  EXPECT_EQ(file["tokenizer_eos_token"][1], "2");
  EXPECT_EQ(file["tokenizer_bos_token"][0], "<s>");  // from tokenizer.model, as there is no tokenizer_config.json
  EXPECT_EQ(file["tokenizer_eos_token"][0], "</s>");
  EXPECT_EQ(file["higher_is_better"]["ppl_blocks@32"]["perplexity"], false);
  EXPECT_EQ(file["higher_is_better"]["ppl_blocks@32"]["top1_agreement"], true);
  EXPECT_EQ(file["config"]["model_num_parameters"], 6843648) << "parameters of the demo model, counted from its shapes";

  // Recompute both tasks from the sample lines.
  const std::string time = path.filename().string().substr(8, 26);
  const auto samples_of = [&](const std::string& task) {
    return lines_of(scratch / "out" / ("samples_" + task + "_" + time + ".jsonl"));
  };
  double loss = 0;
  const std::vector<Json> windows = samples_of("ppl_blocks@32");
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
  const std::vector<Json> documents = samples_of("rolling");
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

/// Two documents of two choices, one of them answered rightly.
BenchmarkTask choices_task(const std::string& name) {
  BenchmarkTask task;
  task.name = name;
  task.alias = name + " (alias)";
  task.version = "1.0";
  task.output_type = "multiple_choice";
  task.shots = 3;
  task.documents_original = 9;
  task.config = {{"task", name}, {"output_type", "multiple_choice"}};
  for (std::int64_t d = 0; d < 2; ++d) {
    task.documents.push_back({d + 4, {{"question", "Où?"}, {"n", d}}, std::to_string(d)});
    for (std::int64_t c = 0; c < 2; ++c)
      task.requests.push_back({RequestType::log_likelihood, d, c, "Question: Où?", c == 0 ? " là" : " ici", {}, 0});
  }
  task.score = [](const BenchmarkTask&, const std::vector<Answer>& answers) {
    Scored scored;
    double sum = 0;
    for (std::int64_t d = 0; d < 2; ++d) {
      const auto at = static_cast<std::size_t>(2 * d);
      const double right = (answers[at].log_likelihood >= answers[at + 1].log_likelihood ? 0 : 1) == d ? 1.0 : 0.0;
      scored.samples.push_back({d, "none", {}, {{"acc", right}}});
      sum += right;
    }
    scored.metrics = {{"acc", "none", sum / 2, 0.5, true}, {"loss", "none", 0.25, std::nullopt, false}};
    return scored;
  };
  return task;
}

TEST(Results, benchmarks_stand_beside_perplexities_key_by_key) {
  if (!world().root()) return;
  const checkpoint::Reader reader(demo_model("prose-llama"));
  const auto tokenizer = tokenizer::load_tokenizer(reader.folder());
  const fs::path folder = fs::temp_directory_path() / fmt::format("headfold-results-{}", ::getpid());
  fs::remove_all(folder);
  const Task blocks = blocks_task(*tokenizer, heldout(), 32, 2);
  const BenchmarkTask choices = choices_task("choices");
  BenchmarkTask generation = choices_task("generation");
  generation.output_type = "generate_until";
  generation.version = "3";
  generation.config["generation_kwargs"] = {{"until", {"\n"}}, {"do_sample", false}};
  generation.score = [](const BenchmarkTask&, const std::vector<Answer>&) {
    Scored scored;
    for (const char* filter : {"strict-match", "flexible-extract"}) {
      for (std::int64_t d = 0; d < 2; ++d) scored.samples.push_back({d, filter, {"18", "19"}, {{"exact_match", 1}}});
      scored.metrics.push_back({"exact_match", filter, 1.0, 0.0, true});
    }
    return scored;
  };
  Results results;
  results.texts.push_back(make_result(blocks, {{31, 100.0}, {31, 110.0}}, false));
  results.benchmarks.push_back(make_result(
      choices, {{-1.5, true, 2, 7, ""}, {-20, false, 3, 7, ""}, {-1, false, 1, 7, ""}, {-3, false, 1, 7, ""}}));
  results.benchmarks.push_back(make_result(
      generation, {{0, false, 5, 7, "a"}, {0, false, 5, 7, "b"}, {0, false, 5, 7, "c"}, {0, false, 5, 7, "d"}}));
  GroupResult group;
  group.name = group.alias = "both";
  group.version = "2";
  group.metrics = {{"acc", "none", 0.5, 0.25, true}};
  group.sample_count = 4;
  group.subtasks = {"choices", "generation"};
  results.groups.push_back(group);

  RunInfo run;
  run.model = &reader;
  run.tokenizer = tokenizer.get();
  run.limit = 0.5;
  run.bootstrap_iterations = 100;
  run.headfold["format"] = "headfold-results";
  const fs::path path = write_results(folder, run, results);
  const Json file = read_json(path);
  std::set<std::string> expected = top_level_keys();
  expected.insert("groups");
  EXPECT_EQ(keys_of(file), expected);
  EXPECT_EQ(keys_of(file["config"]), config_keys());
  EXPECT_EQ(file["config"]["limit"], 0.5);
  EXPECT_EQ(file["config"]["bootstrap_iters"], 100);
  EXPECT_EQ(file["config"]["fewshot_seed"], 1234);
  const Json& own = file["results"]["choices"];
  EXPECT_EQ(keys_of(own), (std::set<std::string>{"name", "alias", "sample_len", "acc,none", "acc_stderr,none",
                                                 "loss,none", "loss_stderr,none"}));
  EXPECT_EQ(own["alias"], "choices (alias)");
  EXPECT_EQ(own["sample_len"], 2);
  EXPECT_EQ(own["acc,none"], 0.5);
  EXPECT_EQ(own["acc_stderr,none"], 0.5);
  EXPECT_EQ(own["loss_stderr,none"], "N/A");
  EXPECT_EQ(keys_of(file["results"]["generation"]),
            (std::set<std::string>{"name", "alias", "sample_len", "exact_match,strict-match",
                                   "exact_match_stderr,strict-match", "exact_match,flexible-extract",
                                   "exact_match_stderr,flexible-extract"}));
  EXPECT_EQ(file["results"]["both"], file["groups"]["both"]);
  EXPECT_EQ(file["groups"]["both"]["sample_count"], (Json{{"acc,none", 4}}));
  EXPECT_EQ(file["groups"]["both"]["acc_stderr,none"], 0.25);
  EXPECT_EQ(keys_of(file["groups"]), std::set<std::string>{"both"});
  EXPECT_EQ(file["group_subtasks"]["both"], (Json{"choices", "generation"}));
  EXPECT_EQ(file["group_subtasks"]["choices"], Json::array());
  for (const char* key : {"results", "group_subtasks", "versions", "higher_is_better"})
    EXPECT_EQ(keys_of(file[key]), (std::set<std::string>{"ppl_blocks@32", "choices", "generation", "both"})) << key;
  for (const char* key : {"configs", "n-shot", "n-samples", "task_hashes"})
    EXPECT_EQ(keys_of(file[key]), (std::set<std::string>{"ppl_blocks@32", "choices", "generation"})) << key;
  EXPECT_EQ(file["versions"]["choices"].dump(), "1.0");
  EXPECT_EQ(file["versions"]["generation"].dump(), "3");
  EXPECT_EQ(file["n-shot"]["choices"], 3);
  EXPECT_EQ(file["n-samples"]["choices"], (Json{{"original", 9}, {"effective", 2}}));
  EXPECT_EQ(file["higher_is_better"]["choices"], (Json{{"acc", true}, {"loss", false}}));
  EXPECT_EQ(file["configs"]["choices"]["output_type"], "multiple_choice");

  const std::string time = path.filename().string().substr(8, 26);
  const std::vector<Json> lines = lines_of(folder / ("samples_choices_" + time + ".jsonl"));
  ASSERT_EQ(lines.size(), 2U);
  const Json& line = lines[0];
  EXPECT_EQ(keys_of(line),
            (std::set<std::string>{"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter",
                                   "metrics", "doc_hash", "prompt_hash", "target_hash", "acc", "response_tokens"}));
  EXPECT_EQ(line["doc_id"], 4);
  EXPECT_EQ(line["doc"]["question"], "Où?");
  EXPECT_EQ(line["target"], "0");
  EXPECT_EQ(line["arguments"], (Json{{"gen_args_0", {{"arg_0", "Question: Où?"}, {"arg_1", " là"}}},
                                     {"gen_args_1", {{"arg_0", "Question: Où?"}, {"arg_1", " ici"}}}}));
  EXPECT_EQ(line["resps"].dump(), R"([[["-1.5","True"]],[["-20.0","False"]]])");
  EXPECT_EQ(line["filtered_resps"].dump(), R"([["-1.5","True"],["-20.0","False"]])");
  EXPECT_EQ(line["metrics"], Json{"acc"});
  EXPECT_EQ(line["acc"], 1.0);
  EXPECT_EQ(lines[1]["acc"], 0.0);
  EXPECT_EQ(line["doc_hash"], sha256_hex("{\n  \"question\": \"Où?\",\n  \"n\": 0\n}"));
  EXPECT_EQ(line["prompt_hash"], sha256_hex("Question: Où?"));
  EXPECT_EQ(line["target_hash"], sha256_hex("0"));
  std::string hashes;
  for (const Json& each : lines)
    for (const char* key : {"doc_hash", "prompt_hash", "target_hash"}) hashes += each[key].get<std::string>();
  EXPECT_EQ(file["task_hashes"]["choices"], sha256_hex(hashes));
  const std::vector<Json> texts = lines_of(folder / ("samples_generation_" + time + ".jsonl"));
  ASSERT_EQ(texts.size(), 4U);
  EXPECT_EQ(texts[2]["filter"], "flexible-extract");
  EXPECT_EQ(texts[2]["arguments"]["gen_args_1"]["arg_1"], (Json{{"until", {"\n"}}, {"do_sample", false}}));
  EXPECT_EQ(texts[2]["resps"], (Json{{"a"}, {"b"}}));
  EXPECT_EQ(texts[2]["filtered_resps"], (Json{"18", "19"}));

  const std::string table = results_table(results);
  EXPECT_THAT(table, testing::ContainsRegex("task +version +filter +n-shot +metric +value +stderr"));
  EXPECT_THAT(table, testing::HasSubstr("flexible-extract"));
  EXPECT_THAT(table, testing::ContainsRegex("acc +↑ +0.5000 +± +0.5000"));
  EXPECT_THAT(table, testing::ContainsRegex("loss +↓ +0.2500 +± +N/A"));
  fs::remove_all(folder);
}

TEST(WikiText, with_other_pages_is_not_comparable) {
  const ScratchFolder folder;
  if (world().root()) write_file(folder / "wiki.test.raw", " = A = \r\n One page .\r\n = B = \n Another page .\n");
  world().barrier("written");
  const auto tokenizer = tokenizer::load_tokenizer(demo_model("prose-llama"));
  PerplexityText text;
  text.name = "wikitext";
  text.rolling = true;
  text.file = folder / "wiki.test.raw";
  text.published = 62;
  const Task two = perplexity_task(*tokenizer, text, 64, tokenizer::Bos::model_default, 0);
  EXPECT_EQ(two.items_original, 2);
  EXPECT_EQ(two.documents.at(0).original, " = A = \n One page .");
  EXPECT_THAT(two.recipe, testing::HasSubstr("2 pages, the published text has 62: not comparable"));
  text.published = 2;
  EXPECT_THAT(perplexity_task(*tokenizer, text, 64, tokenizer::Bos::model_default, 0).recipe,
              testing::Not(testing::HasSubstr("comparable")));
}

}  // namespace
}  // namespace headfold::evaluation
