// Broken benchmark files and task descriptions, seeds fixed: each becomes a task whose scores are numbers, or is
// refused with a typed error that names the file.

#include <headfold/evaluation/data_files.h>
#include <headfold/evaluation/metrics.h>
#include <headfold/evaluation/registry.h>

#include <cmath>

#include "hostile.h"

namespace headfold::evaluation {
namespace {

using namespace testing_support;

/// A sound file of every format.
struct Format {
  const char *task, *file, *content;
};
const std::vector<Format>& formats() {
  static const std::vector<Format> all = {
      {"arc_easy", "arc/ARC-Easy-Test.jsonl",
       R"({"id":"1","question":{"stem":"q?","choices":[{"text":"a","label":"A"},{"text":"b","label":"B"}]},"answerKey":"B"}
{"id":"2","question":{"stem":"é","choices":[{"text":"c","label":"1"},{"text":"d","label":"2"}]},"answerKey":"1"}
)"},
      {"openbookqa", "openbookqa/main/test.jsonl",
       R"({"id":"1","question_stem":"q","choices":{"text":["a","b"],"label":["A","B"]},"answerKey":"B"})"},
      {"openbookqa", "openbookqa/test.tsv",
       "ID\tQuestion Stem\tChoices\tComplete Question\tAnswer Key\n"
       "7\tq\t(A) a (B) b (C) c (D) d\tx\tB\n"},
      {"piqa", "piqa/validation.jsonl", R"({"goal":"g","sol1":"a","sol2":"b","label":1})"},
      {"hellaswag", "hellaswag/hellaswag_val.jsonl",
       R"({"ind":1,"activity_label":"A","ctx_a":"b [title] [x]","ctx_b":"éc","ctx":"b c","endings":["1","[2","3]","4"],"label":"3"})"},
      {"winogrande", "winogrande/dev.jsonl",
       R"({"qID":"1","sentence":"a _ b.","option1":"x","option2":"y","answer":"2"})"},
      {"winogrande", "winogrande/validation.jsonl", R"({"context_options":["a","b"],"continuation":" c","gold":1})"},
      {"boolq", "boolq/val.jsonl", R"({"question":"q","passage":"t -- p","idx":0,"label":true})"},
      {"boolq", "boolq/dev.jsonl", R"({"question":"q","title":"t","answer":false,"passage":"p"})"},
      {"mmlu_anatomy", "mmlu/test/anatomy_test.csv", "\"q \"\"x\"\"\n2\",1,2,3,4,A\r\nquestion,\"a,b\",c,d,e,D\n"},
      {"mmlu_virology", "mmlu/virology/test.jsonl",
       R"({"question":"q","subject":"virology","choices":["a","b","c","d"],"answer":2})"},
      {"truthfulqa_mc2", "truthfulqa/mc_task.json",
       R"([{"question":"q","mc1_targets":{"a":1,"b":0},"mc2_targets":{"a":1,"b":0,"c":1}}])"},
      {"truthfulqa_mc1", "truthfulqa/validation.jsonl",
       R"({"question":"q","mc1_targets":{"choices":["a","b"],"labels":[1,0]},"mc2_targets":{"choices":["a"],"labels":[1]}})"},
      {"lambada_openai", "lambada/lambada_test.jsonl", R"({"text":"one two\nthree four"})"},
      {"gsm8k", "gsm8k/test.jsonl", R"({"question":"q","answer":"so\n#### 1,200"})"},
      {"xsum", "xsum/test.jsonl", R"({"document":"d","summary":"s","id":"1"})"},
      {"longbench_trec", "longbench/trec.jsonl",
       R"({"input":"i","context":"c","answers":["x"],"all_classes":["x","y"],"_id":"a"})"},
      {"longbench_passage_retrieval_en", "longbench/passage_retrieval_en.jsonl",
       R"({"input":"i","context":"c","answers":["Paragraph 3"],"_id":"a"})"}};
  return all;
}

/// Makes the task and scores made-up answers.
void use(const std::string& name, const SuiteOptions& options) {
  for (const BenchmarkTask& task : make_tasks({name}, options).tasks) {
    ASSERT_FALSE(task.requests.empty());
    std::vector<Answer> answers(task.requests.size());
    for (std::size_t i = 0; i < answers.size(); ++i) {
      answers[i].log_likelihood = -1.5 - static_cast<double>(i % 7);
      answers[i].text = task.documents.at(static_cast<std::size_t>(task.requests[i].document)).target;
    }
    for (const Metric& metric : task.score(task, answers).metrics) ASSERT_TRUE(std::isfinite(metric.value));
    for (const BenchmarkDocument& document : task.documents)
      ASSERT_EQ(sample_hashes(task, document.id).document.size(), 64U);
  }
}

class SuiteFuzz : public testing::Test {
 protected:
  SuiteFuzz() {
    options_.data_dir = scratch_.path();
    options_.shots = 0;
    options_.bootstrap_iterations = 10;
  }
  void with_content(const Format& format, const std::string& content, Outcomes& outcomes, const std::string& what) {
    const fs::path path = scratch_ / format.file;
    fs::create_directories(path.parent_path());
    put(path, content);
    outcomes.run(what, [&] { use(format.task, options_); });
    fs::remove(path);
  }
  ScratchFolder scratch_;
  MemoryLid lid_;
  SuiteOptions options_;
};

TEST_F(SuiteFuzz, files_cut_short) {
  for (const Format& format : formats()) {
    Outcomes outcomes(fs::path(format.file).filename().string());
    const std::string sound = format.content;
    for (std::size_t length = 0; length <= sound.size(); ++length)
      with_content(format, sound.substr(0, length), outcomes, fmt::format("{} cut at {}", format.file, length));
    EXPECT_GT(outcomes.opened, 0) << format.file;
    EXPECT_GT(outcomes.refused, 0) << format.file;
  }
}

TEST_F(SuiteFuzz, files_changed) {
  Mutator mutator(41);
  for (const Format& format : formats()) {
    Outcomes outcomes(fs::path(format.file).filename().string());
    for (int i = 0; i < 250; ++i) {
      const std::string changed = mutator.mutate(format.content);
      with_content(format, changed, outcomes, fmt::format("{}, change {}: {}", format.file, i, changed));
    }
    EXPECT_GT(outcomes.opened + outcomes.refused, 0);
  }
}

TEST_F(SuiteFuzz, fields_of_other_types) {
  for (const Format& format : formats()) {
    const std::string name = format.file, content = format.content;
    if (!name.ends_with("jsonl")) continue;
    Outcomes outcomes(fs::path(format.file).filename().string());
    const Json document = Json::parse(content.substr(0, content.find('\n')));
    for_each_edit(document, [&](const Json& edited, const std::string& what) {
      with_content(format, edited.dump(-1, ' ', false, Json::error_handler_t::replace), outcomes, name + what);
    });
    EXPECT_GT(outcomes.refused, 0) << name;
  }
}

TEST_F(SuiteFuzz, label_files) {
  Mutator mutator(43);
  put(scratch_ / "labels.lst", "");
  Outcomes outcomes("labels.lst");
  for (int i = 0; i < 2000; ++i) {
    const std::string changed = mutator.mutate("0\n1\n1\n0\n");
    put(scratch_ / "labels.lst", changed);
    outcomes.run(changed, [&] { ASSERT_EQ(read_labels(scratch_ / "labels.lst", 0, 1, 4).size(), 4U); });
  }
  EXPECT_GT(outcomes.opened, 0);
  EXPECT_GT(outcomes.refused, 0);
}

TEST_F(SuiteFuzz, descriptions_of_own_tasks) {
  const std::string folder = scratch_.path().filename().string();
  put(scratch_ / "w.jsonl", R"({"d":"x","o":[{"t":"a","l":"A"},{"t":"b","l":"B"}],"g":"B","i":1})"
                            "\n"
                            R"({"d":"y","o":[{"t":"c","l":"A"},{"t":"d","l":"B"}],"g":"A","i":2})"
                            "\n");
  const Json sound =
      Json::parse(R"({"task":"own","version":"1","file":"w.jsonl","format":"auto","id":"i","context":"Q {{d}}\n",
    "choices":"o.t","gold":"g","gold_is":"label","labels":["A","B"],"shots":1,"sampler":"random","description":"D",
    "target_delimiter":" ","fewshot_delimiter":"\n","metrics":["acc","acc_norm"],"about":"a","type":"multiple_choice"})");
  options_.user_tasks = {scratch_ / "own.json"};
  options_.shots.reset();
  Outcomes outcomes(folder);
  const auto run = [&](const std::string& content, const std::string& name, const std::string& what) {
    put(scratch_ / "own.json", content);
    outcomes.run(what, [&] { use(name, options_); });
  };
  run(sound.dump(), "own", "as it is");
  ASSERT_EQ(outcomes.opened, 1);
  for_each_edit(sound, [&](const Json& edited, const std::string& what) {
    const bool named = edited.is_object() && edited.contains("task") && edited["task"].is_string();
    run(edited.dump(-1, ' ', false, Json::error_handler_t::replace), named ? edited["task"].get<std::string>() : "own",
        what);
  });
  Mutator mutator(47);
  const std::string text = sound.dump();
  for (int i = 0; i < 2000; ++i) {
    // The name itself stays, so that the task is asked for by it.
    const std::string changed = R"({"task":"own",)" + mutator.mutate(text.substr(1, text.find(R"("task")") - 1)) +
                                text.substr(text.find(R"("task")") + std::string(R"("task":"own",)").size());
    run(changed, "own", changed);
  }
  EXPECT_GT(outcomes.refused, 0);
}

/// Answers of a model are any bytes of UTF-8: metrics neither fail nor take long.
TEST_F(SuiteFuzz, texts_of_a_model) {
  Mutator mutator(53);
  for (int i = 0; i < 5000; ++i) {
    std::string text = mutator.mutate("The answer is 1,200. #### $5\nParagraph 3 is. a.b..");
    text = Json(text).dump(-1, ' ', false, Json::error_handler_t::replace);
    for (const double value :
         {rouge_n(text, "a b", 2), rouge_l("x 3", text), qa_f1(text, "the 3"), longbench_rouge(text, "a. b"),
          count_score(text, "3"), classification_score(text, "a", {"a", "an", "answer"})}) {
      ASSERT_GE(value, 0) << text;
      ASSERT_LE(value, 1) << text;
    }
    ASSERT_FALSE(gsm8k_flexible(text).empty());
    ASSERT_FALSE(gsm8k_strict(text).empty());
    gsm8k_normalized(text);
  }
}

}  // namespace
}  // namespace headfold::evaluation
