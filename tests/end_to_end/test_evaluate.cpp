// Benchmarks as a user runs them: self-made items in the original formats, two ranks, a stop, a rerun, other options.

#include <gmock/gmock.h>
#include <headfold/base/json.h>

#include "program.h"

namespace headfold::end_to_end {
namespace {

using testing::HasSubstr;
using testing_support::ScratchFolder;

std::vector<fs::path> results_in(const fs::path& folder) {
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(folder))
    if (entry.path().filename().string().starts_with("results_")) files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  return files;
}

/// Questions in the original formats of ARC, PIQA and LAMBADA, from words of the held-out text.
void write_items(const fs::path& folder, int count) {
  std::vector<std::string> words;
  const std::string text = read_file(demo_text("heldout.jsonl"));
  const std::string first = Json::parse(text.substr(0, text.find('\n'))).at("text").get<std::string>();
  for (std::size_t at = 0; at < first.size();) {
    const std::size_t end = std::min(first.find_first_of(" \n", at), first.size());
    if (end > at) words.push_back(first.substr(at, end - at));
    at = end + 1;
  }
  std::size_t next = 0;
  const auto take = [&](std::size_t number) {
    std::string piece;
    for (std::size_t i = 0; i < number; ++i) piece += (i > 0 ? " " : "") + words[next++ % words.size()];
    return piece;
  };
  std::string arc, piqa, labels, lambada;
  for (int d = 0; d < count; ++d) {
    Json choices = Json::array();
    for (const char* label : {"A", "B", "C", "D"}) choices.push_back({{"text", take(3)}, {"label", label}});
    arc += Json{{"id", fmt::format("item-{}", d)},
                {"question", {{"stem", take(15)}, {"choices", choices}}},
                {"answerKey", std::string(1, "ABCD"[d % 4])}}
               .dump() +
           "\n";
    piqa += Json{{"goal", take(8)}, {"sol1", take(5)}, {"sol2", take(4)}}.dump() + "\n";
    labels += fmt::format("{}\n", d % 2);
    lambada += Json{{"text", take(20)}}.dump() + "\n";
  }
  write_file(folder / "arc" / "ARC-Easy-Test.jsonl", arc);
  write_file(folder / "piqa" / "valid.jsonl", piqa);
  write_file(folder / "piqa" / "valid-labels.lst", labels);
  write_file(folder / "lambada" / "lambada_test.jsonl", lambada);
}

TEST(Evaluate, benchmarks_and_texts_in_one_file_on_any_ranks_stopped_and_resumed) {
  const ScratchFolder run;
  const fs::path data = run / "data";
  write_items(data, 40);
  const auto evaluate = [&](int ranks, const std::string& out, std::vector<std::string> more) {
    std::vector<std::string> arguments = {"evaluate",
                                          "--model",
                                          demo_model("prose-llama"),
                                          "--tasks",
                                          "arc_easy,piqa",
                                          "lambada_openai",
                                          "ppl_blocks",
                                          "--data",
                                          demo_text("heldout.jsonl"),
                                          "--data-dir",
                                          data,
                                          "--limit",
                                          "30",
                                          "--dtype",
                                          "float32",
                                          "--bootstrap-iters",
                                          "100",
                                          "--out",
                                          run / out};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return run_headfold(ranks, arguments, run / "log.txt", 120);
  };
  const auto newest = [&](const std::string& out) { return read_json(results_in(run / out / "prose-llama").back()); };

  Outcome outcome = evaluate(1, "one", {});
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  const Json one = newest("one");
  for (const char* task : {"arc_easy", "piqa", "lambada_openai", "ppl_blocks@256"}) {
    EXPECT_TRUE(one["results"].contains(task)) << task;
    EXPECT_THAT(outcome.output, HasSubstr(task));
  }
  EXPECT_EQ(one["results"]["arc_easy"]["sample_len"], 30);
  EXPECT_EQ(one["n-samples"]["arc_easy"]["original"], 40);
  EXPECT_EQ(one["headfold"]["benchmarks"]["requests"], 30 * 4 + 30 * 2 + 30);
  EXPECT_EQ(one["headfold"]["benchmarks"]["answered_before"], 0);
  EXPECT_EQ(one["headfold"]["harness"]["adds_bos"], true);
  EXPECT_LT(one["headfold"]["benchmarks"]["tokens_computed"].get<double>(),
            one["headfold"]["benchmarks"]["tokens_one_by_one"].get<double>());
  EXPECT_EQ(one["max_length"], 256);
  EXPECT_TRUE(one["results"]["lambada_openai"]["perplexity_stderr,none"].is_number());

  // Two ranks, replicas and a pipeline, small batches: the same scores.
  const auto expect_same = [&](const Json& other) {
    for (const auto& [task, values] : one["results"].items())
      for (const auto& [metric, value] : values.items()) {
        if (!value.is_number()) continue;
        EXPECT_NEAR(other["results"][task][metric].get<double>(), value.get<double>(),
                    1e-4 * std::abs(value.get<double>()))
            << task << " " << metric;
      }
    EXPECT_EQ(other["task_hashes"]["arc_easy"], one["task_hashes"]["arc_easy"]);
  };
  outcome = evaluate(2, "two", {"--max-batch-tokens", "300"});
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  expect_same(newest("two"));

  // A file STOP ends it before the first question; without it the same command goes on, and again has nothing to ask.
  write_file(run / "stopped" / "STOP", "");
  outcome = evaluate(2, "stopped", {"--pipeline-ranks", "2"});
  EXPECT_EQ(outcome.code, 75) << outcome.output;
  EXPECT_THAT(outcome.output, HasSubstr("before the first question"));
  EXPECT_FALSE(fs::exists(run / "stopped" / "prose-llama"));
  fs::remove(run / "stopped" / "STOP");
  outcome = evaluate(2, "stopped", {"--pipeline-ranks", "2"});
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  expect_same(newest("stopped"));
  outcome = evaluate(1, "stopped", {});
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  EXPECT_THAT(outcome.output, HasSubstr("210 of 210 requests were answered before"));
  expect_same(newest("stopped"));
  EXPECT_EQ(results_in(run / "stopped" / "prose-llama").size(), 2U);

  // The older harness puts no BOS: other questions, and it is said why nothing is used.
  outcome = evaluate(1, "stopped", {"--harness-compat", "0.4.9.1"});
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  EXPECT_THAT(outcome.output, HasSubstr("bos was \"default\" and is \"never\""));
  const Json older = newest("stopped");
  EXPECT_EQ(older["headfold"]["harness"]["adds_bos"], false);
  EXPECT_NE(older["results"]["lambada_openai"]["perplexity,none"], one["results"]["lambada_openai"]["perplexity,none"]);
  EXPECT_EQ(older["results"]["ppl_blocks@256"]["perplexity,none"], one["results"]["ppl_blocks@256"]["perplexity,none"]);
}

TEST(Evaluate, rolling_windows_are_as_long_as_questions) {
  const ScratchFolder run;
  const auto plan = [&](std::vector<std::string> more) {
    std::vector<std::string> arguments = {"evaluate",
                                          "--model",
                                          demo_model("prose-bloom"),
                                          "--data",
                                          demo_text("heldout.jsonl"),
                                          "--limit",
                                          "2",
                                          "--dry-run",
                                          "--out",
                                          run / "out"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return run_headfold(1, arguments, run / "log.txt");
  };
  // BLOOM states no length: the harness takes 2048 tokens, while the papers' blocks keep to what it was trained on.
  Outcome outcome = plan({"--tasks", "rolling,ppl_blocks"});
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  EXPECT_THAT(outcome.output, HasSubstr("rolling windows of 2048 tokens"));
  EXPECT_THAT(outcome.output, HasSubstr("ppl_blocks@256"));
  outcome = plan({"--tasks", "rolling", "--max-length", "300"});
  EXPECT_THAT(outcome.output, HasSubstr("rolling windows of 300 tokens"));
  outcome = plan({"--tasks", "rolling", "--seq-len", "128"});
  EXPECT_THAT(outcome.output, HasSubstr("rolling windows of 128 tokens"));
}

TEST(Evaluate, what_cannot_be_generated_is_refused_before_texts_are_scored) {
  const ScratchFolder run;
  write_file(run / "data/gsm8k/test.jsonl", "{\"question\":\"1 + 1?\",\"answer\":\"easy\\n#### 2\"}\n");
  for (const char* dry : {"--dry-run", "--skip-missing"}) {
    const Outcome outcome =
        run_headfold(1,
                     {"evaluate", "--model", demo_model("prose-llama"), "--data", demo_text("heldout.jsonl"), "--tasks",
                      "ppl_blocks,gsm8k", "--num-fewshot", "0", "--data-dir", run / "data", "--out", run / "out", dry},
                     run / "log.txt");
    EXPECT_EQ(outcome.code, 65) << outcome.output;
    EXPECT_THAT(outcome.output, HasSubstr("gsm8k: 256 new tokens are asked for, and the model reads 256 in all"));
    EXPECT_THAT(outcome.output, testing::Not(HasSubstr("texts are scored")));
  }
}

TEST(Evaluate, a_rolling_text_records_bos_files_and_harness) {
  const ScratchFolder run;
  const Outcome outcome =
      run_headfold(1,
                   {"evaluate", "--model", demo_model("prose-llama"), "--data", demo_text("heldout.jsonl"), "--tasks",
                    "rolling", "--limit", "1", "--harness-compat", "0.4.9.1", "--out", run / "out"},
                   run / "log.txt");
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  const Json results = read_json(results_in(run / "out" / "prose-llama").back());
  EXPECT_EQ(results["headfold"]["harness"]["compat"], "0.4.9.1");
  EXPECT_EQ(results["headfold"]["harness"]["adds_bos"], false);
  EXPECT_EQ(results["configs"]["rolling"]["bos"], "never");
  EXPECT_EQ(results["configs"]["rolling"]["data_files"], Json::array({"heldout.jsonl"}));
  EXPECT_THAT(results["config"]["model_args"].get<std::string>(), HasSubstr("bos=never"));
}

TEST(Evaluate, refuses_texts_and_documents_that_differ_between_ranks) {
  const ScratchFolder run;
  for (const char* rank : {"a", "b"}) {
    write_items(run / rank / "data", 20);
    fs::copy_file(demo_text("heldout.jsonl"), run / rank / "text.jsonl");
  }
  const auto evaluate = [&](const std::vector<std::string>& what) {
    std::vector<std::string> arguments = {
        "evaluate", "--model", demo_model("prose-llama"), "--out", run / "out", "--limit", "2", "--dtype", "float32"};
    arguments.insert(arguments.end(), what.begin(), what.end());
    return run_headfold_in({run / "a", run / "b"}, arguments, run / "log.txt");
  };
  const std::vector<std::string> text = {"--data", "text.jsonl", "--seq-len", "64"},
                                 task = {"--tasks", "arc_easy", "--data-dir", "data"};
  for (const auto& what : {text, task}) {
    const Outcome outcome = evaluate(what);
    EXPECT_EQ(outcome.code, 0) << outcome.output;
  }
  // As long as before.
  for (const char* name : {"text.jsonl", "data/arc/ARC-Easy-Test.jsonl"}) {
    std::string content = read_file(run / "b" / name);
    const std::size_t place = content.find(" a");
    ASSERT_NE(place, std::string::npos) << name;
    content[place + 1] = 'e';
    write_file(run / "b" / name, content);
  }
  for (const auto& what : {text, task}) {
    const Outcome outcome = evaluate(what);
    EXPECT_EQ(outcome.code, 65) << outcome.output;
    EXPECT_THAT(outcome.output, HasSubstr(what == text ? "text.jsonl" : "ARC-Easy-Test.jsonl"));
  }
}

TEST(Evaluate, lists_tasks_and_skips_only_when_asked) {
  const ScratchFolder run;
  write_items(run / "data", 4);
  Outcome outcome = run_headfold(1, {"evaluate", "--list", "--data-dir", run / "data"}, run / "log.txt");
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  for (const char* expected : {"arc_easy", "mmlu", "gsm8k", "ARC-Easy-Test.jsonl"})
    EXPECT_THAT(outcome.output, HasSubstr(expected));
  EXPECT_THAT(outcome.output, HasSubstr("arc_easy, examples for the prompt (ARC-Easy-Train.jsonl): https"));
  outcome = run_headfold(1, {"evaluate", "--list", "--tasks", "arc,piqa,c4,mmlu", "--data-dir", run / "data"},
                         run / "log.txt");
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  EXPECT_THAT(
      outcome.output,
      testing::AllOf(HasSubstr("\narc_challenge "), HasSubstr("\npiqa "), HasSubstr("\nc4-palu "), HasSubstr("\nmmlu "),
                     testing::Not(HasSubstr("\ngsm8k ")), testing::Not(HasSubstr("\nc4-svdllm "))));
  outcome = run_headfold(1, {"evaluate", "--list", "--tasks", "arc_hard"}, run / "log.txt");
  EXPECT_EQ(outcome.code, 64) << outcome.output;
  outcome = run_headfold(1, {"evaluate", "--list", "--data-dir", run / "nowhere"}, run / "log.txt");
  EXPECT_EQ(outcome.code, 74) << outcome.output;
  EXPECT_THAT(outcome.output, HasSubstr("nowhere"));
  const auto evaluate = [&](std::vector<std::string> more) {
    std::vector<std::string> arguments = {"evaluate",   "--model",        demo_model("prose-llama"),
                                          "--tasks",    "arc_easy,boolq", "--data-dir",
                                          run / "data", "--out",          run / "out"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return run_headfold(1, arguments, run / "log.txt");
  };
  outcome = evaluate({});
  EXPECT_EQ(outcome.code, 65) << outcome.output;
  EXPECT_THAT(outcome.output, HasSubstr("boolq"));
  outcome = evaluate({"--skip-missing", "--limit", "0.5"});
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  EXPECT_THAT(outcome.output, HasSubstr("boolq is left out"));
  const Json results = read_json(results_in(run / "out" / "prose-llama").back());
  EXPECT_EQ(results["headfold"]["benchmarks"]["skipped"][0]["task"], "boolq");
  EXPECT_EQ(results["n-samples"]["arc_easy"]["effective"], 2);
  EXPECT_EQ(results["config"]["limit"], 0.5);
  // A group with a value of its own says what it lacks.
  write_file(run / "data/longbench/hotpotqa.jsonl",
             R"({"input": "Who built it?", "context": "Anna built it.", "answers": ["Anna"], "_id": "a"})"
             "\n");
  outcome = run_headfold(1,
                         {"evaluate", "--model", demo_model("prose-llama"), "--tasks", "longbench", "--data-dir",
                          run / "data", "--skip-missing", "--out", run / "group"},
                         run / "log.txt");
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  const Json group = read_json(results_in(run / "group" / "prose-llama").back());
  EXPECT_THAT(group["headfold"]["benchmarks"]["notes"]["longbench"].dump(), HasSubstr("longbench_qasper"));
  EXPECT_EQ(group["group_subtasks"]["longbench"], Json::array({"longbench_hotpotqa"}));
}

}  // namespace
}  // namespace headfold::end_to_end
