// Prompts byte for byte, draws, groups and scores of the tasks. golden_*.json come from golden_prompts.py.

#include <gmock/gmock.h>
#include <headfold/base/files.h>
#include <headfold/base/hash.h>
#include <headfold/base/json.h>
#include <headfold/evaluation/registry.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "world.h"

namespace headfold::evaluation {
namespace {

using namespace testing_support;
using testing::ElementsAre;
using testing::HasSubstr;

fs::path own_data() {
  return tests_folder() / "unit" / "evaluation" / "data";
}

SuiteOptions options_for(const fs::path& data, std::optional<std::int64_t> shots = {}) {
  SuiteOptions options;
  options.data_dir = data;
  options.shots = shots;
  options.bootstrap_iterations = 2000;
  return options;
}

BenchmarkTask one_task(const std::string& name, const SuiteOptions& options) {
  Suite suite = make_tasks({name}, options);
  EXPECT_EQ(suite.tasks.size(), 1U) << name;
  return std::move(suite.tasks.at(0));
}

/// Requests of one document.
std::vector<Request> requests_of(const BenchmarkTask& task, std::int64_t document) {
  std::vector<Request> own;
  std::copy_if(task.requests.begin(), task.requests.end(), std::back_inserter(own),
               [&](const Request& request) { return request.document == document; });
  return own;
}

/// Where a task's real files lie under the published names, and where the validation split may stand in for a training
/// split that is not there.
struct Real {
  std::string task;
  std::vector<std::pair<std::string, std::string>> links;  ///< name in a scratch folder, file in the data folder
  bool first_n = false;
};
const std::vector<Real>& real_tasks() {
  static const std::vector<Real> tasks = [] {
    std::vector<Real> all = {
        {"arc_easy",
         {{"arc/ARC-Easy-Test.jsonl", "arc/ARC-Easy-Test.jsonl"},
          {"arc/ARC-Easy-Train.jsonl", "arc/ARC-Easy-Dev.jsonl"}}},
        {"arc_challenge",
         {{"arc/ARC-Challenge-Test.jsonl", "arc/ARC-Challenge-Test.jsonl"},
          {"arc/ARC-Challenge-Train.jsonl", "arc/ARC-Challenge-Dev.jsonl"}}},
        {"openbookqa",
         {{"openbookqa/test.jsonl", "openbookqa/test.jsonl"}, {"openbookqa/train.jsonl", "openbookqa/dev.jsonl"}}},
        {"piqa",
         {{"piqa/valid.jsonl", "piqa/valid.jsonl"},
          {"piqa/valid-labels.lst", "piqa/valid-labels.lst"},
          {"piqa/train.jsonl", "piqa/valid.jsonl"},
          {"piqa/train-labels.lst", "piqa/valid-labels.lst"}}},
        {"winogrande",
         {{"winogrande/dev.jsonl", "winogrande/dev.jsonl"}, {"winogrande/train_xl.jsonl", "winogrande/dev.jsonl"}}},
        {"boolq", {{"boolq/val.jsonl", "boolq/val.jsonl"}, {"boolq/train.jsonl", "boolq/val.jsonl"}}},
        {"gsm8k", {{"gsm8k", "gsm8k"}}},
        {"gsm8k_cot", {{"gsm8k", "gsm8k"}}}};
    const Json golden = read_json(own_data() / "golden_prompts.json");
    for (const auto& [name, pairs] : golden.items())
      if (name.starts_with("mmlu_")) all.push_back({name, {{"mmlu", "mmlu"}}});
    return all;
  }();
  return tasks;
}

class GoldenPrompts : public testing::TestWithParam<Real> {};

TEST_P(GoldenPrompts, equal_those_made_from_the_published_files) {
  const Real& real = GetParam();
  if (data_folder().empty() || !fs::exists(data_folder() / real.links[0].second))
    GTEST_SKIP() << "no " << real.links[0].second << " under $HEADFOLD_DATA or ../shared/data: the published "
                 << real.task << " was not checked";
  const Json golden = read_json(own_data() / "golden_prompts.json").at(real.task);
  ScratchFolder scratch;
  for (const auto& [name, file] : real.links) {
    fs::create_directories((scratch / name).parent_path());
    fs::create_symlink(fs::absolute(data_folder() / file), scratch / name);
  }
  std::set<std::int64_t> numbers;
  for (const auto& [key, wanted] : golden.items()) {
    if (key == "pool") continue;
    const std::int64_t shots = std::stoll(key);
    numbers.insert(shots);
    const BenchmarkTask task = one_task(real.task, options_for(scratch.path(), shots));
    ASSERT_EQ(static_cast<std::int64_t>(task.documents.size()), wanted.at("documents").get<std::int64_t>());
    // Of most subjects of mmlu only the hash over all pairs is kept.
    const bool in_full = wanted.contains("first");
    EXPECT_TRUE(in_full || real.task.starts_with("mmlu_"));
    for (std::int64_t d = 0; in_full && d < 5; ++d) {
      const std::vector<Request> own = requests_of(task, d);
      const Json& pairs = wanted.at("first").at(static_cast<std::size_t>(d));
      ASSERT_EQ(own.size(), pairs.size());
      for (std::size_t i = 0; i < own.size(); ++i) {
        EXPECT_EQ(own[i].index, static_cast<std::int64_t>(i));
        EXPECT_EQ(sha256_hex(own[i].context), pairs[i][0].get<std::string>()) << own[i].context;
        EXPECT_EQ(sha256_hex(own[i].continuation), pairs[i][1].get<std::string>()) << own[i].continuation;
      }
    }
    Sha256 all;
    for (const Request& request : task.requests)
      all.update(sha256_hex(request.context) + sha256_hex(request.continuation));
    EXPECT_EQ(all.hex(), wanted.at("all").get<std::string>()) << shots << " shots, all documents";
  }
  EXPECT_EQ(numbers, real.task == "gsm8k_cot" ? (std::set<std::int64_t>{0, 8}) : (std::set<std::int64_t>{0, 5}));
}

INSTANTIATE_TEST_SUITE_P(RealFiles, GoldenPrompts, testing::ValuesIn(real_tasks()),
                         [](const auto& instance) { return instance.param.task; });

TEST(GoldenExcerpts, self_made_items_of_the_other_tasks) {
  const Json golden = read_json(own_data() / "golden_excerpts.json");
  for (const auto& [key, documents] : golden.items()) {
    const std::size_t at = key.find('@');
    const std::optional<std::int64_t> shots =
        at == std::string::npos ? 0 : std::optional<std::int64_t>(std::stoll(key.substr(at + 1)));
    const BenchmarkTask task = one_task(key.substr(0, at), options_for(own_data() / "excerpts", shots));
    ASSERT_EQ(task.documents.size(), documents.size()) << key;
    for (std::size_t d = 0; d < documents.size(); ++d) {
      const std::vector<Request> own = requests_of(task, static_cast<std::int64_t>(d));
      ASSERT_EQ(own.size(), documents[d].size()) << key;
      for (std::size_t i = 0; i < own.size(); ++i) {
        EXPECT_EQ(own[i].context, documents[d][i][0].get<std::string>()) << key;
        EXPECT_EQ(own[i].continuation, documents[d][i][1].get<std::string>()) << key;
      }
    }
  }
}

/// Every task has golden prompts: from the published files (by hashes), from items of our own (in full), or a test of
/// its own (the retrieval grid).
TEST(GoldenExcerpts, none_is_left_out) {
  const Json full = read_json(own_data() / "golden_excerpts.json");
  std::set<std::string> covered = {"passkey", "needle",
                                   // texts, not prompts: the tests of texts below
                                   "wikitext", "wikitext2", "c4-palu", "c4-svdllm", "ptb-svdllm", "ptb-new"};
  for (const auto& [key, documents] : full.items()) covered.insert(key.substr(0, key.find('@')));
  for (const Real& real : real_tasks()) covered.insert(real.task);
  for (const TaskListing& task : list_tasks({}, false))
    EXPECT_TRUE(covered.contains(task.name)) << task.name << ": " << task.about;
}

/// Where the published questions are not there; their golden prompts hold every byte of the examples.
TEST(GoldenExcerpts, worked_examples_of_gsm8k_cot) {
  ScratchFolder scratch;
  write_file(scratch / "gsm8k/test.jsonl", R"({"question":"1 + 1?","answer":"easy\n#### 2"})"
                                           "\n");
  const BenchmarkTask task = one_task("gsm8k_cot", options_for(scratch.path()));
  const std::string& prompt = task.requests.at(0).context;
  EXPECT_EQ(task.shots, 8);
  EXPECT_TRUE(
      prompt.starts_with("Q: There are 15 trees in the grove. Grove workers will plant trees in the grove today."));
  EXPECT_TRUE(prompt.ends_with("So she has 23 - 15 dollars left. 23 - 15 is 8. The answer is 8.\n\nQ: 1 + 1?\nA:"));
  std::int64_t questions = 0;
  for (std::size_t at = prompt.find("Q: "); at != std::string::npos; at = prompt.find("Q: ", at + 1)) ++questions;
  EXPECT_EQ(questions, 9);
  EXPECT_THAT(task.requests[0].stops, ElementsAre("Q:", "</s>", "<|im_end|>"));
  EXPECT_EQ(task.documents[0].target, "2");
}

/// Rows in the other published forms give the same requests.
TEST(Formats, original_and_hub_forms_agree) {
  struct Form {
    const char *task, *first_name, *first, *second_name, *second;
  };
  const std::vector<Form> forms = {
      {"arc_easy", "arc/ARC-Easy-Test.jsonl",
       R"({"id":"x","question":{"stem":"Why?","choices":[{"text":"a","label":"1"},{"text":"b","label":"2"}]},"answerKey":"2"})",
       "arc_easy/test.jsonl",
       R"({"id":"x","question":"Why?","choices":{"text":["a","b"],"label":["1","2"]},"answerKey":"2"})"},
      {"openbookqa", "openbookqa/test.jsonl",
       R"({"id":"x","question":{"stem":"Why","choices":[{"text":"a","label":"A"},{"text":"b","label":"B"}]},"answerKey":"B"})",
       "openbookqa/main/test.jsonl",
       R"({"id":"x","question_stem":"Why","choices":{"text":["a","b"],"label":["A","B"]},"answerKey":" B"})"},
      {"boolq", "boolq/val.jsonl", R"({"question":"is it","passage":"Title -- Text.","idx":0,"label":true})",
       "boolq/dev.jsonl", R"({"question":"is it","title":"Title","answer":true,"passage":"Text."})"},
      {"mmlu_anatomy", "mmlu/test/anatomy_test.csv", "\"Why, \"\"so\"\"?\nSay \",a,b,c,d,C\r\n",
       "mmlu/data/test/anatomy_test.csv",
       "question,choice0,choice1,choice2,choice3,answer\n\"Why, \"\"so\"\"?\nSay \",a,b,c,d,2\n"},
      {"mmlu_anatomy", "mmlu/test/anatomy_test.csv", "\"Why, \"\"so\"\"?\nSay \",a,b,c,d,C", "mmlu/anatomy/test.jsonl",
       R"({"question":"Why, \"so\"?\nSay ","subject":"anatomy","choices":["a","b","c","d"],"answer":2})"},
      {"truthfulqa_mc2", "truthfulqa/mc_task.json",
       R"([{"question":"Q?","mc1_targets":{"z":1,"a":0},"mc2_targets":{"z":1,"a":0,"m":1}}])",
       "truthfulqa/validation.jsonl",
       R"({"question":"Q?","mc1_targets":{"choices":["z","a"],"labels":[1,0]},"mc2_targets":{"choices":["z","a","m"],"labels":[1,0,1]}})"},
      {"lambada_openai", "lambada/lambada_test.jsonl", R"({"text":"he saw the\ndog"})", "lambada_openai/test.jsonl",
       R"({"context":"he saw","continuation":" the\ndog"})"},
      {"hellaswag", "hellaswag/hellaswag_val.jsonl",
       R"({"ind":1,"activity_label":"A","ctx_a":"b","ctx_b":"c","ctx":"b c","endings":["1","2","3","4"],"source_id":"s","split":"val","split_type":"x","label":3})",
       "hellaswag/validation.jsonl",
       R"({"ind":1,"activity_label":"A","ctx_a":"b","ctx_b":"c","ctx":"b c","endings":["1","2","3","4"],"source_id":"s","split":"val","split_type":"x","label":"3"})"},
      {"piqa", "piqa/valid.jsonl", R"({"goal":"g","sol1":"a","sol2":"b","label":1})", "piqa/validation.jsonl",
       R"({"goal":"g","sol1":"a","sol2":"b","label":1})"}};
  for (const Form& form : forms) {
    ScratchFolder scratch;
    write_file(scratch / "first" / form.first_name, form.first);
    write_file(scratch / "second" / form.second_name, form.second);
    const BenchmarkTask first = one_task(form.task, options_for(scratch / "first", 0));
    const BenchmarkTask second = one_task(form.task, options_for(scratch / "second", 0));
    ASSERT_EQ(first.requests.size(), second.requests.size()) << form.task;
    ASSERT_EQ(first.documents.size(), 1U);
    for (std::size_t i = 0; i < first.requests.size(); ++i) {
      EXPECT_EQ(first.requests[i].context, second.requests[i].context) << form.task;
      EXPECT_EQ(first.requests[i].continuation, second.requests[i].continuation) << form.task;
    }
    EXPECT_EQ(first.documents[0].target, second.documents[0].target) << form.task;
    if (std::string(form.task) != "openbookqa") {  // its answer keys differ by a space, which the harness keeps
      EXPECT_EQ(sample_hashes(first, 0).document, sample_hashes(second, 0).document) << form.task;
    }
  }
}

TEST(Formats, lambada_splits_at_the_last_space_not_at_line_breaks) {
  ScratchFolder scratch;
  write_file(scratch / "lambada/lambada_test.jsonl", R"({"text":"he saw the\ndog"})");
  const BenchmarkTask task = one_task("lambada_openai", options_for(scratch.path()));
  EXPECT_EQ(task.requests.at(0).context, "he saw");
  EXPECT_EQ(task.requests.at(0).continuation, " the\ndog");
}

TEST(Formats, winogrande_labels_beside_and_sentences_already_cut) {
  ScratchFolder scratch;
  write_file(scratch / "a/winogrande/dev.jsonl",
             R"({"qID":"1","sentence":"Bo met Al and _ ran  home.","option1":"Bo","option2":"Al"})");
  write_file(scratch / "a/winogrande/dev-labels.lst", "2\n\n");
  const BenchmarkTask task = one_task("winogrande", options_for(scratch / "a"));
  ASSERT_EQ(task.requests.size(), 2U);
  EXPECT_EQ(task.requests[0].context, "Bo met Al and Bo");
  EXPECT_EQ(task.requests[1].context, "Bo met Al and Al");
  EXPECT_EQ(task.requests[1].continuation, " ran  home.");
  EXPECT_EQ(task.documents[0].target, "ran  home.");
  write_file(scratch / "b/winogrande/dev.jsonl",
             R"({"context_options":["Bo met Al and Bo","Bo met Al and Al"],"continuation":" ran  home.","gold":1})");
  const BenchmarkTask cut = one_task("winogrande", options_for(scratch / "b"));
  for (std::size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(cut.requests[i].context, task.requests[i].context);
    EXPECT_EQ(cut.requests[i].continuation, task.requests[i].continuation);
  }
  std::vector<Answer> answers(2);
  answers[1].log_likelihood = -1;
  answers[0].log_likelihood = -2;
  EXPECT_EQ(task.score(task, answers).metrics.at(0).value, 1);
}

/// Few-shot prompts of the first documents do not change with the limit, nor with the seed's other tasks.
TEST(FewShot, limit_keeps_the_draws_and_the_seed_changes_them) {
  SuiteOptions options = options_for(own_data() / "excerpts", 3);
  const BenchmarkTask all = one_task("hellaswag", options);
  options.limit = 2;
  const BenchmarkTask two = one_task("hellaswag", options);
  ASSERT_EQ(two.documents.size(), 2U);
  EXPECT_EQ(two.documents_original, 5);
  for (std::size_t i = 0; i < two.requests.size(); ++i) EXPECT_EQ(two.requests[i].context, all.requests[i].context);
  options.fewshot_seed = 7;
  EXPECT_NE(one_task("hellaswag", options).requests[0].context, two.requests[0].context);
  options.shots = 15;  // 16 are drawn from 15
  try {
    one_task("hellaswag", options);
    FAIL();
  } catch (const InputError& error) {
    EXPECT_THAT(error.what(), HasSubstr("16 shots are drawn from 15"));
  }
}

/// 57 subjects with few documents each.
void write_mmlu(const fs::path& folder, const std::vector<std::string>& subjects) {
  for (std::size_t s = 0; s < subjects.size(); ++s) {
    std::string test, dev;
    for (std::size_t i = 0; i < 2 + s; ++i) test += fmt::format("q{},1,2,3,4,{}\n", i, "ABCD"[i % 4]);
    for (int i = 0; i < 5; ++i) dev += fmt::format("d{},1,2,3,4,A\n", i);
    write_file(folder / "mmlu" / "test" / (subjects[s] + "_test.csv"), test);
    write_file(folder / "mmlu" / "dev" / (subjects[s] + "_dev.csv"), dev);
  }
}

TEST(Groups, mmlu_is_weighted_by_questions_and_pooled) {
  ScratchFolder scratch;
  write_mmlu(scratch.path(), {"anatomy", "astronomy", "virology"});
  SuiteOptions options = options_for(scratch.path(), 2);
  EXPECT_THROW(make_tasks({"mmlu"}, options), MissingData);
  options.skip_missing = true;
  const Suite suite = make_tasks({"mmlu", "mmlu_stem", "mmlu_anatomy"}, options);
  ASSERT_EQ(suite.tasks.size(), 3U);
  EXPECT_EQ(suite.skipped.size(), 54U);
  EXPECT_THAT(suite.skipped[0].reason, HasSubstr("abstract_algebra_test.csv"));
  EXPECT_TRUE(suite.tasks[0].requests[0].context.starts_with(
      "The following are multiple choice questions (with answers) about anatomy.\n\n"
      "d0\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: A\n\nd1\n"))
      << suite.tasks[0].requests[0].context;
  // The model that always says B.
  std::map<std::string, Scored> scored;
  for (const BenchmarkTask& task : suite.tasks) {
    std::vector<Answer> answers(task.requests.size());
    for (std::size_t i = 0; i < answers.size(); ++i) answers[i].log_likelihood = task.requests[i].index == 1 ? -1 : -2;
    scored[task.name] = task.score(task, answers);
  }
  const std::vector<GroupResult> results = group_results(suite, scored);
  ASSERT_EQ(results.size(), 3U);  // mmlu, stem, other; humanities and social sciences have no task left
  EXPECT_EQ(results[0].name, "mmlu");
  EXPECT_THAT(results[0].subtasks, ElementsAre("mmlu_stem", "mmlu_other"));  // without what was left out
  ASSERT_EQ(results[0].notes.size(), 1U);
  EXPECT_THAT(results[0].notes[0],
              HasSubstr("54 of 57 tasks are left out: mmlu_abstract_algebra, mmlu_college_biology"));
  // Subjects of another size than the published one say so, as every split does.
  ASSERT_EQ(suite.tasks[0].notes.size(), 1U);
  EXPECT_THAT(suite.tasks[0].notes[0], HasSubstr("anatomy_test.csv has 2 documents, the published test split 135"));
  EXPECT_EQ(results[0].sample_count, 2 + 3 + 4);
  EXPECT_DOUBLE_EQ(results[0].metrics.at(0).value, 3.0 / 9);  // one B among the first four of each
  const GroupResult& stem = results[1];
  EXPECT_EQ(stem.name, "mmlu_stem");
  EXPECT_EQ(stem.alias, "stem");
  EXPECT_THAT(stem.subtasks, ElementsAre("mmlu_anatomy", "mmlu_astronomy"));
  ASSERT_EQ(stem.notes.size(), 1U);
  EXPECT_THAT(stem.notes[0], HasSubstr("17 of 19 tasks are left out"));
  EXPECT_DOUBLE_EQ(stem.metrics.at(0).value, 2.0 / 5);
  // Errors of the leaves: sqrt(0.5 / 2) for 1 of 2, sqrt((2/3) / 2 / 3) for 1 of 3.
  const double first = 0.5 / 2, second = (2.0 / 3) / 2 / 3;
  EXPECT_NEAR(stem.metrics.at(0).error.value(), std::sqrt((1 * first * 2 + 2 * second * 3) / 3 / 5), 1e-12);
}

TEST(Scores, lambada_perplexity_and_greedy_accuracy) {
  const BenchmarkTask task = one_task("lambada_openai", options_for(own_data() / "excerpts"));
  EXPECT_EQ(task.output_type, "loglikelihood");
  std::vector<Answer> answers(task.requests.size());
  std::vector<double> values;
  for (std::size_t i = 0; i < answers.size(); ++i) {
    values.push_back(-0.5 * static_cast<double>(i));
    answers[i].log_likelihood = values[i];
    answers[i].greedy = i == 0;
  }
  const Scored scored = task.score(task, answers);
  ASSERT_EQ(scored.metrics.size(), 2U);
  EXPECT_EQ(scored.metrics[0].name, "perplexity");
  EXPECT_FALSE(scored.metrics[0].higher_is_better);
  EXPECT_DOUBLE_EQ(scored.metrics[0].value, std::exp(1.0));
  EXPECT_TRUE(scored.metrics[0].error.has_value());
  EXPECT_DOUBLE_EQ(scored.metrics[1].value, 0.2);
  EXPECT_EQ(scored.samples[3].metrics[0].second, -1.5);
  answers.pop_back();
  EXPECT_THROW(task.score(task, answers), InternalError);
}

TEST(Scores, gsm8k_has_two_filters) {
  ScratchFolder scratch;
  write_file(scratch / "gsm8k/test.jsonl",
             "{\"question\":\"a\",\"answer\":\"x\\n#### 1,200\"}\n{\"question\":\"b\",\"answer\":\"y\\n#### 7\"}\n");
  const BenchmarkTask task = one_task("gsm8k", options_for(scratch.path(), 0));
  EXPECT_EQ(task.requests[0].max_new_tokens, 256);
  EXPECT_THAT(task.requests[0].stops, ElementsAre("Question:", "</s>", "<|im_end|>"));
  std::vector<Answer> answers(2);
  answers[0].text = " so\n#### 1200";
  answers[1].text = " it is 7.";
  const Scored scored = task.score(task, answers);
  ASSERT_EQ(scored.metrics.size(), 2U);
  EXPECT_EQ(scored.metrics[0].filter, "strict-match");
  EXPECT_EQ(scored.metrics[0].value, 0.5);
  EXPECT_EQ(scored.metrics[1].filter, "flexible-extract");
  EXPECT_EQ(scored.metrics[1].value, 1);
  ASSERT_EQ(scored.samples.size(), 4U);  // filter by filter
  EXPECT_EQ(scored.samples[1].filter, "strict-match");
  EXPECT_THAT(scored.samples[1].filtered, ElementsAre("[invalid]"));
  EXPECT_THAT(scored.samples[3].filtered, ElementsAre("7."));
}

TEST(Scores, longbench_takes_the_best_reference) {
  const BenchmarkTask task = one_task("longbench_hotpotqa", options_for(own_data() / "excerpts"));
  EXPECT_EQ(task.documents[0].target, "['Anna', 'Anna the mason']");
  std::vector<Answer> answers(1);
  answers[0].text = "\n Anna mason";
  const Scored scored = task.score(task, answers);
  EXPECT_EQ(scored.metrics.at(0).name, "score");
  EXPECT_EQ(scored.metrics.at(1).name, "qa_f1_score");
  EXPECT_EQ(scored.metrics.at(1).value, 1);
  EXPECT_FALSE(scored.metrics.at(1).error.has_value());  // one document
}

TEST(Hashes, are_those_of_the_texts) {
  const BenchmarkTask task = one_task("lambada_openai", options_for(own_data() / "excerpts"));
  const SampleHashes hashes = sample_hashes(task, 3);
  EXPECT_EQ(hashes.document, sha256_hex("{\n  \"text\": \"They asked for two  spaces\"\n}"));
  EXPECT_EQ(hashes.prompt, sha256_hex("They asked for two "));
  EXPECT_EQ(hashes.target, sha256_hex(" spaces"));
  const std::vector<Sample> samples = {{3, "none", {}, {}}, {0, "none", {}, {}}};
  const SampleHashes other = sample_hashes(task, 0);
  EXPECT_EQ(task_hash(task, samples),
            sha256_hex(hashes.document + hashes.prompt + hashes.target + other.document + other.prompt + other.target));
}

TEST(Retrieval, prompts_fill_the_length_and_hide_at_the_depth) {
  SuiteOptions options;
  options.tokens = [](std::string_view text) { return static_cast<std::int64_t>(text.size() / 4) + 1; };
  options.max_length = 600;
  options.retrieval.depths = {0, 0.5, 1};
  options.retrieval.samples = 2;
  for (const std::string name : {"passkey", "needle"}) {
    const BenchmarkTask task = one_task(name, options);
    EXPECT_EQ(task.documents.size(), 2U * 3 * 2) << "lengths 256 and 512";
    for (const BenchmarkDocument& document : task.documents) {
      const std::string prompt = requests_of(task, document.id).at(0).context;
      const auto length = document.fields["length"].get<std::int64_t>();
      const auto depth = document.fields["depth"].get<double>();
      const auto key = document.fields["key"].get<std::string>();
      const std::int64_t tokens = options.tokens(prompt) + (name == "passkey" ? 8 : 4);
      EXPECT_LE(tokens, length);
      EXPECT_GT(tokens, length - 8);  // one more sentence would not fit
      EXPECT_EQ(document.fields["tokens"].get<std::int64_t>(), tokens);
      const std::size_t at = prompt.find(name == "passkey" ? "The pass key is " + key : " is " + key);
      ASSERT_NE(at, std::string::npos);
      const double place = static_cast<double>(at) / static_cast<double>(prompt.size());
      EXPECT_NEAR(place, depth, 0.27) << prompt;
      if (depth == 0.5) {
        EXPECT_NEAR(place, depth, 0.1);
      }
    }
    std::vector<Answer> answers(task.requests.size());
    for (std::size_t i = 0; i < answers.size(); ++i) {
      const BenchmarkDocument& document = task.documents[static_cast<std::size_t>(task.requests[i].document)];
      const bool right = document.fields["length"] == 256;
      answers[i].text = right ? " " + document.fields["key"].get<std::string>() + ". I remember 1" : " 1";
      const bool gold = std::to_string(task.requests[i].index) == document.target;
      answers[i].log_likelihood = gold == right ? -1 : -2;
    }
    const Scored scored = task.score(task, answers);
    ASSERT_EQ(scored.metrics.size(), 3U);
    EXPECT_EQ(scored.metrics[0].value, 0.5);
    EXPECT_EQ(scored.metrics[1].name, "acc@256");
    EXPECT_EQ(scored.metrics[1].value, 1);
    EXPECT_EQ(scored.metrics[2].name, "acc@512");
    EXPECT_EQ(scored.metrics[2].value, 0);
  }
  EXPECT_TRUE(one_task("needle", options).notes.empty());
  options.limit = 3;
  EXPECT_THAT(one_task("needle", options).notes, testing::ElementsAre(HasSubstr("the first 3 of")));
  options.limit = 0;
  options.retrieval.lengths = {1000};
  EXPECT_THROW(one_task("needle", options), UsageError);
  options.retrieval.lengths = {10};
  EXPECT_THROW(one_task("needle", options), UsageError);
}

TEST(Registry, names_groups_and_suggestions) {
  SuiteOptions options = options_for(own_data() / "excerpts", 0);
  options.skip_missing = true;
  const Suite suite = make_tasks({"zero-shot", "lorc", "paper", "hellaswag"}, options);
  std::vector<std::string> names;
  for (const BenchmarkTask& task : suite.tasks) names.push_back(task.name);
  EXPECT_THAT(names, ElementsAre("hellaswag", "openbookqa", "xsum"));
  EXPECT_TRUE(suite.groups.empty());
  std::vector<std::string> skipped;
  for (const SkippedTask& task : suite.skipped) skipped.push_back(task.name);
  EXPECT_THAT(skipped, ElementsAre("piqa", "winogrande", "arc_easy", "arc_challenge", "boolq", "gsm8k", "wikitext2",
                                   "c4-palu", "ptb-svdllm"));
  try {
    make_tasks({"helaswag"}, options);
    FAIL();
  } catch (const UsageError& error) {
    EXPECT_THAT(error.hint(), HasSubstr("hellaswag"));
  }
  options.skip_missing = false;
  try {
    make_tasks({"piqa"}, options);
    FAIL();
  } catch (const MissingData& error) {
    EXPECT_THAT(error.what(), HasSubstr((options.data_dir / "piqa/valid.jsonl").string()));
    EXPECT_THAT(error.what(), HasSubstr("physicaliqa-train-dev"));
    EXPECT_THAT(error.hint(), HasSubstr("yonatanbisk.com"));
    EXPECT_EQ(error.task(), "piqa");
  }
}

TEST(Registry, listing_says_what_is_there) {
  const std::vector<TaskListing> all = list_tasks(options_for(own_data() / "excerpts"), true);
  EXPECT_GT(all.size(), 57U + 20);
  const auto find = [&](const std::string& name) {
    return *std::find_if(all.begin(), all.end(), [&](const TaskListing& task) { return task.name == name; });
  };
  const TaskListing hellaswag = find("hellaswag");
  EXPECT_TRUE(hellaswag.ready());
  EXPECT_EQ(hellaswag.files.at(0).sha256, sha256_hex(read_file(own_data() / "excerpts/hellaswag/hellaswag_val.jsonl")));
  EXPECT_THAT(hellaswag.groups, ElementsAre("zero-shot"));
  EXPECT_FALSE(find("piqa").ready());
  EXPECT_EQ(find("piqa").files.at(1).purpose, "labels");
  EXPECT_TRUE(find("passkey").ready());
  const std::string text = listing_text(all);
  EXPECT_THAT(text, HasSubstr("0 of 57 subjects"));
  EXPECT_THAT(text, HasSubstr("piqa: https://yonatanbisk.com"));
  EXPECT_THAT(text, HasSubstr(hellaswag.files[0].sha256));  // all of it
  EXPECT_THAT(text, HasSubstr("piqa, documents: piqa/valid.jsonl, physicaliqa-train-dev/"));
  EXPECT_THAT(text, HasSubstr("piqa, labels: piqa/valid-labels.lst"));
  EXPECT_THAT(text, HasSubstr("mmlu, shots: mmlu/dev/<subject>_dev.csv, mmlu/data/dev/<subject>_dev.csv"));
  EXPECT_THAT(text, HasSubstr("lorc: boolq, openbookqa, xsum, gsm8k"));
}

TEST(Registry, listing_of_mmlu_names_what_is_missing_and_sums_up_the_rest) {
  ScratchFolder scratch;
  write_mmlu(scratch.path(), {"virology", "anatomy", "astronomy"});
  fs::remove(scratch / "mmlu/dev/anatomy_dev.csv");
  const std::string text = listing_text(list_tasks(options_for(scratch.path()), true));
  EXPECT_THAT(text, HasSubstr("3 of 57 subjects"));
  EXPECT_THAT(text, HasSubstr("2 of 57 subjects"));
  const auto sum = [&](const std::vector<std::string>& files) {
    std::string sums;
    for (const std::string& file : files) sums += sha256_hex(read_file(scratch / "mmlu" / file));
    return sha256_hex(sums);
  };
  EXPECT_THAT(text, HasSubstr(sum({"test/anatomy_test.csv", "test/astronomy_test.csv", "test/virology_test.csv"})));
  EXPECT_THAT(text, HasSubstr(sum({"dev/astronomy_dev.csv", "dev/virology_dev.csv"})));
  EXPECT_THAT(text, HasSubstr("mmlu, documents of abstract_algebra, college_biology, "));
  EXPECT_THAT(text, HasSubstr("mmlu, shots of abstract_algebra, anatomy, college_biology, "));
}

TEST(Texts, joined_as_the_papers_do) {
  ScratchFolder scratch;
  write_file(scratch / "ptb/ptb.test.txt", " no it was n't \n the <unk> \n");
  std::string rows;
  for (int i = 0; i < 1100; ++i) rows += fmt::format("{{\"text\":\"d{}\"}}\n", i);
  write_file(scratch / "c4/c4-validation.jsonl", rows);
  const Suite suite = make_tasks({"ptb", "ptb-new", "c4"}, options_for(scratch.path()));
  ASSERT_EQ(suite.texts.size(), 3U);
  EXPECT_EQ(joined_text(suite.texts[0]), "no it was n't\n\nthe <unk>");
  EXPECT_EQ(joined_text(suite.texts[1]), "no it was n't the <unk>");
  EXPECT_EQ(suite.texts[2].name, "c4-palu");
  EXPECT_TRUE(joined_text(suite.texts[2]).starts_with("d0 d1 d2 "));
  EXPECT_TRUE(joined_text(suite.texts[2]).ends_with(" d1099"));
  const Suite more = make_tasks({"c4-svdllm"}, options_for(scratch.path()));
  EXPECT_THROW(joined_text(more.texts.at(0)), InputError);  // 2000 documents
}

/// Counts of the published splits, and no note that says otherwise.
TEST(RealFiles, have_the_published_numbers_of_documents) {
  if (data_folder().empty() || !fs::exists(data_folder() / "mmlu"))
    GTEST_SKIP() << "no benchmark files under $HEADFOLD_DATA or ../shared/data";
  const Suite suite =
      make_tasks({"arc", "piqa", "winogrande", "openbookqa", "boolq", "mmlu"}, options_for(data_folder(), 0));
  std::int64_t mmlu = 0;
  for (const BenchmarkTask& task : suite.tasks) {
    EXPECT_TRUE(task.notes.empty()) << task.notes[0];
    if (task.name.starts_with("mmlu_")) mmlu += static_cast<std::int64_t>(task.documents.size());
  }
  EXPECT_EQ(mmlu, 14042);
  EXPECT_EQ(suite.tasks.size(), 63U);
  EXPECT_EQ(suite.groups.size(), 5U);
  // The first thousand training questions are not the published training split, and the task says so.
  const BenchmarkTask gsm8k = one_task("gsm8k", options_for(data_folder()));
  if (gsm8k.files.back().filename() == "train-first1000.jsonl") {
    ASSERT_EQ(gsm8k.notes.size(), 1U);
    EXPECT_THAT(gsm8k.notes[0], HasSubstr("1000 examples to draw from, the published train split 7473"));
  }
}

}  // namespace
}  // namespace headfold::evaluation
