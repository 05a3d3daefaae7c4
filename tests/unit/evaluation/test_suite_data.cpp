// Bad data: every defect is refused with file, line and field. Users' own tasks.

#include <gmock/gmock.h>
#include <headfold/base/files.h>
#include <headfold/evaluation/data_files.h>
#include <headfold/evaluation/registry.h>
#include <headfold/tokenizer/utf8.h>

#include "world.h"

namespace headfold::evaluation {
namespace {

using namespace testing_support;
using testing::ElementsAre;
using testing::HasSubstr;

struct Bad {
  const char *task, *file, *content;
  std::vector<std::string> said;  ///< all of these are in the message
  const char* labels = nullptr;   ///< name of a second file
  const char* labels_content = "";
};

TEST(BadData, is_refused_with_file_line_and_field) {
  const std::string arc = R"({"id":"1","question":{"stem":"q","choices":[{"text":"a","label":"A"}]},"answerKey":"A"})";
  const std::string twice = arc + "\n" + arc + "\n";
  const std::string broken = arc + "\n{\"id\":";
  const std::string unnamed = arc + "\n{" + arc.substr(arc.find("\"question\""));
  const std::string piqa = R"({"goal":"g","sol1":"a","sol2":"b","label":0})",
                    bare = R"({"goal":"g","sol1":"a","sol2":"b"})";
  const std::string third_bare = piqa + "\n" + piqa + "\n" + bare + "\n", first_bare = bare + "\n" + piqa + "\n";
  const std::string wino = R"({"sentence":"a _","option1":"a","option2":"b","answer":"1"})";
  const std::string third_wino = wino + "\n" + wino + "\n" + wino.substr(0, wino.find(",\"answer\"")) + "}\n" + wino;
  const std::string numbered = R"({"goal":"g","sol1":"a","sol2":"b","label":0,"id":"x"})";
  const std::string same = numbered + "\n" + numbered, one_numbered = piqa + "\n" + numbered;
  const std::vector<Bad> cases = {
      {"arc_easy",
       "arc/ARC-Easy-Test.jsonl",
       R"({"id":"1","question":{"choices":[{"text":"a","label":"A"}]},"answerKey":"A"})",
       {"line 1", "\"question\"", "\"stem\" is missing"}},
      {"arc_easy",
       "arc/ARC-Easy-Test.jsonl",
       R"({"id":"1","question":{"stem":5,"choices":[{"text":"a","label":"A"}]},"answerKey":"A"})",
       {"line 1", "\"stem\" has the wrong type"}},
      {"arc_easy",
       "arc/ARC-Easy-Test.jsonl",
       R"({"id":"1","question":{"stem":"q","choices":[{"text":"a","label":"A"}]},"answerKey":"E"})",
       {"line 1", "\"answerKey\" is \"E\"", "[\"A\"]"}},
      {"arc_easy",
       "arc/ARC-Easy-Test.jsonl",
       R"({"id":"1","question":{"stem":"q","choices":[{"text":"a","label":"A"},{"text":"b","label":"A"}]},"answerKey":"A"})",
       {"line 1", "two choices have this label"}},
      {"arc_easy", "arc/ARC-Easy-Test.jsonl", twice.c_str(), {"line 2", "\"id\" is \"1\"", "earlier"}},
      {"arc_easy", "arc/ARC-Easy-Test.jsonl", broken.c_str(), {"line 2", "not valid JSON"}},
      {"arc_easy", "arc/ARC-Easy-Test.jsonl", "", {"holds no document"}},
      {"arc_easy", "arc/ARC-Easy-Test.jsonl", "\n \n", {"holds no document"}},
      {"arc_easy", "arc/ARC-Easy-Test.jsonl", "\n7\n", {"line 2", "is a JSON object"}},
      {"arc_easy", "arc/ARC-Easy-Test.jsonl", "{\"id\":\"\xFF\"}", {"line 1", "not UTF-8", "0xFF"}},
      {"arc_easy", "arc/ARC-Easy-Test.jsonl", "\xC3\xA9", {"line 1", "not valid JSON", "\\xC3"}},
      {"arc_easy", "arc/ARC-Easy-Test.jsonl", unnamed.c_str(), {"line 2", "\"id\" is missing"}},
      {"arc_easy", "arc/ARC-Easy-Test.jsonl", R"({"id":"\ud800"})", {"line 1", "not valid JSON"}},
      {"arc_easy", "arc/ARC-Easy-Test.jsonl", R"({"id":1,"id":2})", {"line 1", "\"id\" appears twice"}},
      {"piqa",
       "piqa/valid.jsonl",
       R"({"goal":"g","sol1":"a","sol2":"b","label":2})",
       {"line 1", "\"label\" is 2", "0 to 1"}},
      {"piqa", "piqa/valid.jsonl", R"({"goal":"g","sol1":"a","sol2":"b"})", {"no key \"label\"", "valid-labels.lst"}},
      {"piqa", "piqa/valid.jsonl", third_bare.c_str(), {"line 3: key \"label\" is missing", "other documents"}},
      {"piqa", "piqa/validation.jsonl", first_bare.c_str(), {"line 1: key \"label\" is missing"}},
      {"piqa", "piqa/validation.jsonl", bare.c_str(), {"line 1: key \"label\" is missing"}},
      // Labels beside do not make up for it: which of the two would be right?
      {"piqa", "piqa/valid.jsonl", third_bare.c_str(), {"line 3"}, "piqa/valid-labels.lst", "0\n1\n1\n"},
      {"piqa", "piqa/valid.jsonl", same.c_str(), {"line 2", "\"id\" is \"x\"", "earlier"}},
      {"piqa", "piqa/valid.jsonl", one_numbered.c_str(), {"line 1: key \"id\" is missing", "other documents"}},
      {"winogrande", "winogrande/dev.jsonl", third_wino.c_str(), {"line 3: key \"answer\" is missing"}},
      {"piqa",
       "piqa/valid.jsonl",
       R"({"goal":"g","sol1":"a","sol2":"b"})",
       {"valid-labels.lst has 2 labels, and there are 1 documents"},
       "piqa/valid-labels.lst",
       "0\n1\n"},
      {"piqa",
       "piqa/valid.jsonl",
       R"({"goal":"g","sol1":"a","sol2":"b"})",
       {"valid-labels.lst, line 1", "label \"2\"", "0 to 1"},
       "piqa/valid-labels.lst",
       "2\n"},
      {"piqa",
       "piqa/valid.jsonl",
       R"({"goal":"g","sol1":"a","sol2":"b"})",
       {"valid-labels.lst, line 1", "blank"},
       "piqa/valid-labels.lst",
       "\n1\n"},
      {"winogrande",
       "winogrande/dev.jsonl",
       R"({"qID":"1","sentence":"no blank","option1":"a","option2":"b","answer":"1"})",
       {"line 1", "\"sentence\"", "no blank \"_\""}},
      {"winogrande",
       "winogrande/dev.jsonl",
       R"({"qID":"1","sentence":"a _","option1":"a","option2":"b","answer":"3"})",
       {"line 1", "\"answer\" is \"3\"", "1 to 2"}},
      {"hellaswag",
       "hellaswag/hellaswag_val.jsonl",
       R"({"activity_label":"A","ctx_a":"b","ctx_b":"c","endings":["1","2","3"],"label":1})",
       {"line 1", "\"endings\" has 3"}},
      {"hellaswag",
       "hellaswag/hellaswag_val.jsonl",
       R"({"activity_label":"A","ctx_a":"b","ctx_b":"c","endings":["1","2","3","4"],"label":""})",
       {"line 1", "\"label\" is \"\""}},
      {"boolq",
       "boolq/val.jsonl",
       R"({"question":"q","passage":"p","idx":0,"label":"maybe"})",
       {"line 1", "\"label\" is \"maybe\""}},
      {"mmlu_anatomy", "mmlu/test/anatomy_test.csv", "q,1,2,3,4,A\nq,1,2,3,A\n", {"line 2", "5 cells, expected 6"}},
      {"mmlu_anatomy",
       "mmlu/test/anatomy_test.csv",
       "\"q\n2\",1,2,3,4,A\nq,1,2,3,4,E\n",
       {"line 3", "\"E\"", "A, B, C or D"}},
      {"mmlu_anatomy", "mmlu/test/anatomy_test.csv", "q,1,2,3,4,A\n\"q,1,2,3,4,A\n", {"line 2", "not closed"}},
      {"mmlu_anatomy", "mmlu/test/anatomy_test.csv", "\"q\"x,1,2,3,4,A\n", {"line 1", "closing quote"}},
      {"mmlu_anatomy", "mmlu/test/anatomy_test.csv", "q,1,2,3,4,A\n\xC3,1,2,3,4,A\n", {"line 2", "not UTF-8"}},
      {"mmlu_anatomy", "mmlu/test/anatomy_test.csv", "", {"holds no document"}},
      {"mmlu_anatomy",
       "mmlu/test/anatomy_test.csv",
       "question,choice0,choice1,choice2,choice3,answer\n",
       {"holds no document"}},
      {"truthfulqa_mc1",
       "truthfulqa/mc_task.json",
       R"([{"question":"q","mc1_targets":{"a":0},"mc2_targets":{"a":1}}])",
       {"document 1", "\"mc1_targets\"", "no choice has the label 1"}},
      {"truthfulqa_mc1",
       "truthfulqa/mc_task.json",
       R"([{"question":"q","mc1_targets":{"a":1,"b":1},"mc2_targets":{"a":1}}])",
       {"document 1", "more than one"}},
      {"truthfulqa_mc2",
       "truthfulqa/mc_task.json",
       R"([{"question":"q","mc1_targets":{"a":1},"mc2_targets":{"choices":["a"],"labels":[1,0]}}])",
       {"\"mc2_targets\"", "1 choices and 2 labels"}},
      {"lambada_openai", "lambada/lambada_test.jsonl", R"({"text":"ends here "})", {"line 1", "ends with a space"}},
      {"gsm8k_cot", "gsm8k/test.jsonl", R"({"question":"q","answer":"7"})", {"line 1", "\"answer\"", "####"}},
      {"openbookqa", "openbookqa/test.tsv", "ID\tQuestion Stem\tChoices\n1\tq\t(A) a\n", {"line 1", "\"Answer Key\""}},
      {"openbookqa",
       "openbookqa/test.tsv",
       "ID\tQuestion Stem\tChoices\tAnswer Key\n1\tq\t(A) a (B) b\tC\n",
       {"line 2", "\"C\""}},
      {"longbench_trec",
       "longbench/trec.jsonl",
       R"({"input":"i","context":"c","answers":["x"],"all_classes":null})",
       {"line 1", "\"all_classes\""}},
      {"longbench_passage_retrieval_en",
       "longbench/passage_retrieval_en.jsonl",
       R"({"input":"i","context":"c","answers":["No. 4"]})",
       {"line 1", "\"answers\"", "Paragraph"}},
      {"longbench_hotpotqa",
       "longbench/hotpotqa.jsonl",
       R"({"input":"i","context":"c","answers":[]})",
       {"line 1", "\"answers\" is empty"}},
      {"xsum", "xsum/test.jsonl", R"({"document":"d","summary":null})", {"line 1", "\"summary\" is missing"}},
  };
  for (const Bad& bad : cases) {
    ScratchFolder scratch;
    write_file(scratch / bad.file, bad.content);
    if (bad.labels != nullptr) write_file(scratch / bad.labels, bad.labels_content);
    SuiteOptions options;
    options.data_dir = scratch.path();
    try {
      make_tasks({bad.task}, options);
      ADD_FAILURE() << bad.task << " accepts " << bad.content;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::bad_input);
      EXPECT_EQ(tokenizer::invalid_utf8_at(error.what()), std::string_view::npos) << error.what();
      EXPECT_THAT(error.what(), HasSubstr(scratch.path().string())) << bad.content;
      for (const std::string& said : bad.said) EXPECT_THAT(error.what(), HasSubstr(said)) << bad.content;
    }
  }
}

TEST(Documents, of_truthfulqa_have_the_harness_target) {
  ScratchFolder folder;
  write_file(folder / "truthfulqa/mc_task.json",
             R"([{"question":"q","mc1_targets":{"a":0,"b":1},"mc2_targets":{"a":0,"b":1,"c":1}}])");
  SuiteOptions options;
  options.data_dir = folder.path();
  const Suite suite = make_tasks({"truthfulqa_mc1", "truthfulqa_mc2"}, options);
  EXPECT_EQ(suite.tasks.at(0).documents.at(0).target, "1");
  EXPECT_EQ(suite.tasks.at(1).documents.at(0).target, "0");  // doc_to_target: 0, whatever is true
  for (const BenchmarkTask& task : suite.tasks)
    for (const Request& request : task.requests) {
      EXPECT_THAT(request.source, HasSubstr(task.name + ", "));
      EXPECT_THAT(request.source, HasSubstr("mc_task.json"));
    }
}

/// A file that lacks something is damaged; --skip-missing is for files that are not there.
TEST(BadData, skip_missing_does_not_pass_over_it) {
  ScratchFolder scratch;
  SuiteOptions options;
  options.data_dir = scratch.path();
  options.skip_missing = true;
  const std::string sound = R"({"sentence":"a _","option1":"a","option2":"b","answer":"1"})";
  const std::string unlabelled = R"({"sentence":"a _","option1":"a","option2":"b"})";
  write_file(scratch / "winogrande/dev.jsonl", sound + "\n" + unlabelled + "\n");
  try {
    make_tasks({"winogrande"}, options);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), "InputError");
    EXPECT_THAT(error.what(), HasSubstr("line 2: key \"answer\" is missing"));
  }
  write_file(scratch / "winogrande/dev.jsonl", unlabelled + "\n" + unlabelled + "\n");
  const Suite suite = make_tasks({"winogrande"}, options);
  ASSERT_EQ(suite.skipped.size(), 1U);
  EXPECT_THAT(suite.skipped[0].reason, HasSubstr("dev-labels.lst"));
}

TEST(ByteOrderMark, is_no_part_of_the_data) {
  const std::string mark = "\xEF\xBB\xBF";
  ScratchFolder scratch;
  write_file(scratch / "t.csv", mark + "\"a\",b\nc,d\n");
  EXPECT_THAT(read_csv(scratch / "t.csv").at(0).cells, ElementsAre("a", "b"));
  write_file(scratch / "t.tsv", mark + "a\tb\n");
  EXPECT_THAT(read_tsv(scratch / "t.tsv").at(0).cells, ElementsAre("a", "b"));
  write_file(scratch / "labels.lst", mark + "1\n");
  EXPECT_THAT(read_labels(scratch / "labels.lst", 0, 1, 1), ElementsAre(1));
  for (const char* json : {"{\"a\":1}", "[{\"a\":1}]", "\n[\n{\"a\":1}]"}) {
    write_file(scratch / "t.json", mark + json);
    EXPECT_EQ(read_records(scratch / "t.json").at(0).fields["a"], 1) << json;
  }
  // With a header of names, and without one.
  SuiteOptions options;
  options.data_dir = scratch.path();
  for (const char* rows : {"Q?,1,2,3,4,B\n", "question,choice0,choice1,choice2,choice3,answer\nQ?,1,2,3,4,1\n"}) {
    write_file(scratch / "mmlu/test/anatomy_test.csv", mark + rows);
    const Suite suite = make_tasks({"mmlu_anatomy"}, options);
    ASSERT_EQ(suite.tasks.at(0).documents.size(), 1U);
    EXPECT_EQ(suite.tasks[0].documents[0].fields["question"], "Q?");
    EXPECT_EQ(suite.tasks[0].documents[0].target, "1");
  }
}

TEST(Csv, quoting_and_line_numbers) {
  ScratchFolder scratch;
  write_file(scratch / "t.csv", "a,\"b\r\n\"\"c\"\"\",\r\n\r\n\"\",x,\"y\"\r\nlast,,");
  const std::vector<TableRow> rows = read_csv(scratch / "t.csv");
  ASSERT_EQ(rows.size(), 3U);
  EXPECT_THAT(rows[0].cells, ElementsAre("a", "b\r\n\"c\"", ""));
  EXPECT_THAT(rows[1].cells, ElementsAre("", "x", "y"));
  EXPECT_THAT(rows[1].where, HasSubstr("line 4"));
  EXPECT_THAT(rows[2].cells, ElementsAre("last", "", ""));
}

class OwnTask : public testing::Test {
 protected:
  BenchmarkTask make(const std::string& description, std::optional<std::int64_t> shots = {}) {
    write_file(scratch_ / "own.json", description);
    SuiteOptions options;
    options.data_dir = scratch_ / "data";
    options.user_tasks = {scratch_ / "own.json"};
    options.shots = shots;
    Suite suite = make_tasks({"own"}, options);
    return std::move(suite.tasks.at(0));
  }
  void refuse(const std::string& description, const std::vector<std::string>& said) {
    try {
      make(description);
      ADD_FAILURE() << "accepts " << description;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::bad_input) << description;
      EXPECT_EQ(tokenizer::invalid_utf8_at(error.what()), std::string_view::npos) << error.what();
      for (const std::string& text : said) EXPECT_THAT(error.what(), HasSubstr(text)) << description;
    }
  }
  ScratchFolder scratch_;
};

TEST_F(OwnTask, needs_no_code) {
  write_file(scratch_ / "words.jsonl", R"({"id":1,"definition":"a small stream","options":["brook","book"],"answer":0})"
                                       "\n"
                                       R"({"id":2,"definition":"a reed","options":["rush","crush"],"answer":0})"
                                       "\n"
                                       R"({"id":3,"definition":"to look","options":["pear","peer"],"answer":1})"
                                       "\n");
  const std::string description = R"({"task":"own","file":"words.jsonl","id":"id","description":"Words.\n\n",
    "context":"Definition: {{definition}}\nWord:","choices":"options","gold":"answer"})";
  const BenchmarkTask task = make(description);
  ASSERT_EQ(task.requests.size(), 6U);
  EXPECT_EQ(task.requests[4].context, "Words.\n\nDefinition: to look\nWord:");
  EXPECT_EQ(task.requests[4].continuation, " pear");
  EXPECT_EQ(task.documents[2].target, "1");
  std::vector<Answer> answers(6);
  for (std::size_t i = 0; i < 6; ++i) answers[i].log_likelihood = task.requests[i].index == 0 ? -1 : -2;
  const Scored scored = task.score(task, answers);
  EXPECT_DOUBLE_EQ(scored.metrics.at(0).value, 2.0 / 3);
  EXPECT_EQ(scored.metrics.at(1).name, "acc_norm");
  // Shots come from the documents themselves, never the one asked.
  const BenchmarkTask shots = make(description, 1);
  for (const Request& request : shots.requests) {
    const std::string question = shots.documents[static_cast<std::size_t>(request.document)].fields["definition"];
    EXPECT_EQ(request.context.find(question), request.context.rfind(question)) << request.context;
    EXPECT_THAT(request.context, HasSubstr("\n\nDefinition: " + question + "\nWord:"));
  }
}

TEST_F(OwnTask, nested_fields_labels_templates_and_tables) {
  write_file(scratch_ / "data/arc.jsonl",
             R"({"q":{"stem":" Why? ","choices":[{"text":"a","label":"1"},{"text":"b","label":"2"}]},"key":2})"
             "\n");
  BenchmarkTask task = make(R"({"task":"own","file":"arc.jsonl","context":"{{ q.stem }}","choices":"q.choices.text",
    "gold":"key","gold_is":"label","labels":"q.choices.label","target_delimiter":"=>","metrics":["acc_bytes"]})");
  EXPECT_EQ(task.requests.at(1).context, " Why? ");
  EXPECT_EQ(task.requests.at(1).continuation, "=>b");
  EXPECT_EQ(task.documents[0].target, "1");
  write_file(scratch_ / "t.csv", "\xEF\xBB\xBFword,a,b,right\nsun,star,fish,star\n");
  task = make(R"({"task":"own","file":"t.csv","context":"A {{word}} is a","choices":["{{a}}","{{b}}!"],
    "gold":"{{right}}","gold_is":"text"})");
  EXPECT_EQ(task.requests.at(1).continuation, " fish!");
  EXPECT_EQ(task.documents[0].target, "0");
  write_file(scratch_ / "g.jsonl", R"({"q":"2+2","a":"4"})");
  task = make(R"({"task":"own","type":"generation","file":"g.jsonl","context":"{{q}}=","gold":"a","stops":[";"],
    "max_new_tokens":3})");
  EXPECT_EQ(task.requests.at(0).max_new_tokens, 3);
  std::vector<Answer> answers(1);
  answers[0].text = " 4\n";
  EXPECT_EQ(task.score(task, answers).metrics.at(0).value, 1);
}

TEST_F(OwnTask, mistakes_name_file_and_key) {
  write_file(scratch_ / "w.jsonl", R"({"d":"x","o":["a","b"],"g":2,"l":[1]})");
  const auto with = [](const std::string& more) {
    return R"({"task":"own","file":"w.jsonl","context":"{{d}}","choices":"o","gold":"g")" + more + "}";
  };
  refuse(with(""), {"w.jsonl, line 1", "\"g\" is \"2\"", "0 to 1", "own.json, key \"gold\""});
  refuse(with(R"(,"gold_is":"text")"), {"w.jsonl, line 1", "\"g\" is \"2\"", "own.json, key \"gold\""});
  refuse(R"({"task":"own","file":"w.jsonl","context":"c","choices":"o","gold":"{{ g }}"})",
         {"line 1", "\"g\" is \"2\""});
  refuse(R"({"task":"own","file":"w.jsonl","context":"c","choices":"o","gold":"{{g}}{{g}}"})",
         {"line 1", "\"{{g}}{{g}}\" is \"22\""});
  refuse(with(R"(,"metrics":["acc","acc_norm","acc"])"), {"own.json", "\"metrics\"", "\"acc\" twice"});
  write_file(scratch_ / "e.jsonl", R"({"o":["a","b"],"g":0})"
                                   "\n"
                                   R"({"o":["a",""],"g":0})");
  const std::string undelimited = R"({"task":"own","file":"e.jsonl","context":"c","gold":"g","target_delimiter":"")";
  refuse(undelimited + R"(,"choices":"o"})", {"e.jsonl, line 2", "choice 2 of field \"o\" is empty", "own.json"});
  refuse(undelimited + R"(,"choices":["x","{{o.1}}"]})", {"e.jsonl, line 2", "choice 2 is empty", "own.json"});
  refuse("\xC3{", {"own.json, line 1", "not UTF-8"});
  refuse("\xC3\xA9", {"own.json", "not valid JSON", "\\xC3"});
  refuse(with(R"(,"colour":1)"), {"own.json", "unknown key \"colour\""});
  refuse(with(R"(,"gold_is":"letter")"), {"own.json", "\"gold_is\"", "index, number, label, text"});
  refuse(with(R"(,"gold_is":"label")"), {"own.json", "\"labels\" is missing"});
  refuse(with(R"(,"metrics":["bleu"])"), {"own.json", "\"metrics\"", "bleu"});
  refuse(with(R"(,"shots":-1)"), {"own.json", "\"shots\" is -1"});
  refuse(with(R"(,"shots":"two")"), {"own.json", "\"shots\"", "wrong type"});
  refuse(with(R"(,"sampler":"first_n")"), {"own.json", "\"sampler\"", "shots_file"});
  refuse(R"({"task":"own","file":"w.jsonl","context":"{{d","choices":"o","gold":"g"})",
         {"own.json", "\"context\"", "not closed"});
  refuse(R"({"task":"own","file":"w.jsonl","context":"{% if d %}","choices":"o","gold":"g"})",
         {"own.json", "\"context\"", "{%"});
  refuse(R"({"task":"own","file":"w.jsonl","context":"{{d|upper}}","choices":"o","gold":"g"})",
         {"own.json", "\"context\"", "d|upper"});
  refuse(R"({"task":"own","file":"w.jsonl","context":"{{e}}","choices":"o","gold":"g"})",
         {"w.jsonl, line 1", "\"e\" is undefined", "own.json, key \"context\""});
  refuse(R"({"task":"own","file":"w.jsonl","context":"{{o}}","choices":"o","gold":"g"})",
         {"w.jsonl, line 1", "\"o\"", "expected a text"});
  refuse(R"({"task":"own","file":"w.jsonl","context":"c","choices":"d","gold":"g"})",
         {"w.jsonl, line 1", "\"d\"", "expected a list"});
  refuse(R"({"task":"own","file":"w.jsonl","context":"c","choices":[],"gold":"g"})",
         {"own.json", "\"choices\"", "empty"});
  refuse(R"({"task":"own","file":"gone.jsonl","context":"c","choices":"o","gold":"g"})", {"gone.jsonl", "looked for"});
  refuse(R"({"task":"a/b","file":"w.jsonl","context":"c","choices":"o","gold":"g"})", {"own.json", "\"task\""});
  refuse(R"({"task":"piqa","file":"w.jsonl","context":"c","choices":"o","gold":"g"})", {"own.json", "already"});
  refuse(R"({"file":"w.jsonl"})", {"own.json", "\"task\" is missing"});
  refuse("[1]", {"own.json", "JSON object"});
}

}  // namespace
}  // namespace headfold::evaluation
