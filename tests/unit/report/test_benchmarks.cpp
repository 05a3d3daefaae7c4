// Benchmarks in the report. Expected statistics were computed apart from this code, with exact fractions.

#include <gtest/gtest.h>
#include <headfold/report/paired.h>

#include <cmath>

#include "run_folder.h"

namespace headfold::report {
namespace {

using namespace testing_support;
using headfold::testing_support::ScratchFolder;

// Statistics ----------------------------------------------------------------------------------------------------------

TEST(PairedTest, mcnemar_is_the_exact_binomial) {
  EXPECT_EQ(mcnemar_p(0, 0), 1.0);
  EXPECT_EQ(mcnemar_p(3, 3), 1.0);
  EXPECT_EQ(mcnemar_p(0, 1), 1.0);
  EXPECT_NEAR(mcnemar_p(0, 6), 0.03125, 1e-14);
  EXPECT_NEAR(mcnemar_p(8, 1), 0.0390625, 1e-14);
  EXPECT_NEAR(mcnemar_p(5, 15), 0.04138946533203125, 1e-13);
  EXPECT_NEAR(mcnemar_p(40, 60), 0.05688793364098079, 1e-12);
  EXPECT_NEAR(mcnemar_p(160, 100), 0.00023894190306814023, 1e-14);
  EXPECT_NEAR(mcnemar_p(3, 900) / 3.629598428509171e-264, 1, 1e-9);
  EXPECT_EQ(mcnemar_p(0, 2000), 0.0) << "smaller than a float64 can be";
}

TEST(PairedTest, right_and_wrong_documents) {
  std::vector<double> first, second;
  const auto add = [&](int count, double a, double b) {
    for (int i = 0; i < count; ++i) {
      first.push_back(a);
      second.push_back(b);
    }
  };
  add(10, 1, 1);
  add(7, 0, 0);
  add(15, 1, 0);
  add(5, 0, 1);
  const PairedTest test = paired_test(first, second);
  EXPECT_TRUE(test.exact);
  EXPECT_EQ(test.documents, 37);
  EXPECT_EQ(test.only_first, 15);
  EXPECT_EQ(test.only_second, 5);
  EXPECT_NEAR(test.mean, -10.0 / 37, 1e-15);
  // Differences: 20 of size one and a mean of -10/37; sum of squares 20 - 100/37.
  EXPECT_NEAR(test.error, std::sqrt((20 - 100.0 / 37) / 36 / 37), 1e-15);
  EXPECT_NEAR(test.p, 0.04138946533203125, 1e-13);
  EXPECT_TRUE(test.significant());
}

TEST(PairedTest, other_values_get_a_z_test) {
  const PairedTest test = paired_test({-1.5, -2.25, -0.5, -3.0, -1.0}, {-2.0, -2.5, -1.5, -2.75, -2.0});
  EXPECT_FALSE(test.exact);
  EXPECT_NEAR(test.mean, -0.5, 1e-15);
  EXPECT_NEAR(test.error, 0.23717082451262841, 1e-15);
  EXPECT_NEAR(test.p, 0.03501498101966251, 1e-14);
  EXPECT_EQ(paired_test({0.5, 0.25}, {0.5, 0.25}).p, 1);
  EXPECT_EQ(paired_test({0.5, 0.25}, {1.0, 0.75}).p, 0) << "the same change everywhere";
  EXPECT_EQ(paired_test({0.5}, {0.75}).p, 1);
  EXPECT_EQ(paired_test({0.5}, {0.75}).error, 0);
  EXPECT_THROW(paired_test({}, {}), InternalError);
  EXPECT_THROW(paired_test({1}, {1, 0}), InternalError);
  EXPECT_THROW(paired_test({1, std::nan("")}, {1, 0}), InternalError);
}

// Files ---------------------------------------------------------------------------------------------------------------

struct Benchmark {
  std::string task;
  std::string answers;  ///< one character per document: '1' right, '0' wrong
  std::string metric = "acc_norm";
  std::vector<std::string> subtasks = {};  ///< a group: no samples; `answers` gives value and count
};

double share_of(const std::string& answers) {
  return static_cast<double>(std::count(answers.begin(), answers.end(), '1')) / static_cast<double>(answers.size());
}

OrderedJson sample(const std::string& task, std::size_t index, const std::string& metric, double value) {
  return OrderedJson{{"doc_id", index},
                     {"doc", {{"question", index}}},
                     {"target", "0"},
                     {"arguments", OrderedJson::object()},
                     {"resps", OrderedJson::array()},
                     {"filtered_resps", OrderedJson::array()},
                     {"filter", "none"},
                     {"metrics", OrderedJson::array({metric})},
                     {"doc_hash", fmt::format("{}-{}", task, index)},
                     {"prompt_hash", fmt::format("p{}", index)},
                     {"target_hash", fmt::format("t{}", index)},
                     {metric, value}};
}

/// A results file and its samples in the harness's schema.
class Results {
 public:
  Results(fs::path folder, std::string time = "2026-10-01T10-00-00.000000")
      : folder_(std::move(folder)), time_(std::move(time)) {}

  Results& add(const Benchmark& one) {
    json_["results"][one.task] = {{"name", one.task},
                                  {"alias", one.task},
                                  {one.metric + ",none", share_of(one.answers)},
                                  {one.metric + "_stderr,none", 0.025}};
    json_["group_subtasks"][one.task] = one.subtasks;
    json_["higher_is_better"][one.task] = {{one.metric, true}};
    json_["n-shot"][one.task] = 0;
    if (!one.subtasks.empty()) return *this;
    json_["n-samples"][one.task] = {{"original", one.answers.size()}, {"effective", one.answers.size()}};
    std::string lines;
    for (std::size_t i = 0; i < one.answers.size(); ++i)
      lines += sample(one.task, i, one.metric, one.answers[i] == '1' ? 1 : 0).dump() + "\n";
    write_file(samples_of(one.task), lines);
    return *this;
  }
  Results& headfold(const std::string& model_folder, const std::string& fingerprint, int kv_heads,
                    const std::string& reference = {}) {
    json_["headfold"] = {{"format", "headfold-results"},
                         {"format_version", 1},
                         {"model",
                          {{"name", fs::path(model_folder).filename().string()},
                           {"folder", model_folder},
                           {"fingerprint", fingerprint},
                           {"layout", "gqa"},
                           {"kv_heads", kv_heads},
                           {"heads", 8},
                           {"cache_bytes_per_token", 768 * kv_heads}}},
                         {"reference", reference.empty() ? OrderedJson(nullptr)
                                                         : OrderedJson{{"name", "base"}, {"fingerprint", reference}}},
                         {"record", {{"date", 1790009000}}}};
    return *this;
  }
  Results& harness(const std::string& model_name) {
    json_["model_name"] = model_name;
    json_["config"] = {{"model", "hf"}, {"model_args", "pretrained=" + model_name}, {"model_num_parameters", 1000}};
    json_["date"] = 1790009000.5;
    json_["lm_eval_version"] = "0.4.9.2";
    return *this;
  }
  OrderedJson& json() { return json_; }
  fs::path file() const { return folder_ / fmt::format("results_{}.json", time_); }
  fs::path samples_of(const std::string& task) const {
    return folder_ / fmt::format("samples_{}_{}.jsonl", task, time_);
  }
  void write() const { write_json(file(), json_); }

 private:
  fs::path folder_;
  std::string time_;
  OrderedJson json_ = OrderedJson::object();
};

const std::string kOriginal =
    "1111111111"
    "1111111111"
    "0000000000"
    "0000000000";
/// Loses 12 documents and gains 2.
const std::string kFolded =
    "1111111100"
    "0000000000"
    "1100000000"
    "0000000000";

/// An original and one conversion with these answers to one task.
RunFolder pair_of(const fs::path& folder, const std::string& original = kOriginal,
                  const std::string& folded = kFolded) {
  RunFolder run(folder);
  Results(folder / "e/base").add({"arc", original}).headfold("/secret/base", "aaaa", 8).write();
  run.conversion("x-4", "base", "aaaa", {});
  Results(folder / "e/x").add({"arc", folded}).headfold((folder / "x-4").string(), "c1", 4, "aaaa").write();
  return run;
}

const BenchmarkCell& only_cell(const RunData& data, const std::string& task = "arc", std::size_t model = 1) {
  for (const BenchmarkColumn& column : data.sections.at(0).benchmarks.columns)
    if (column.task == task) return column.cells.at(model);
  throw std::runtime_error("no column " + task);
}

TEST(BenchmarkTest, side_by_side_with_exact_statistics) {
  const ScratchFolder scratch;
  const RunFolder run = pair_of(scratch / "run");
  const RunData data = read_run(run.folder());
  EXPECT_TRUE(data.sections[0].benchmarks.notes.empty());
  const BenchmarkCell& cell = only_cell(data);
  EXPECT_DOUBLE_EQ(**cell.value, 0.25);
  EXPECT_DOUBLE_EQ(*cell.delta, -0.25);
  EXPECT_EQ(cell.documents, 40);
  ASSERT_TRUE(cell.test);
  EXPECT_EQ(cell.test->only_first, 12);
  EXPECT_EQ(cell.test->only_second, 2);
  // 2 * (1 + 14 + 91) / 2^14
  EXPECT_NEAR(cell.test->p, 0.012939453125, 1e-14);
  EXPECT_FALSE(only_cell(data, "arc", 0).delta) << "the original is not compared with itself";
  const Page page = make_page(data, "A report");
  expect_sound(page, run);
  const std::string row = row_with(page.html, "Benchmarks of base", "x-4");
  EXPECT_THAT(row, HasSubstr("|25.0\xC2\xA0%|"));
  EXPECT_THAT(row, HasSubstr("|−25.0\xC2\xA0pp ▼|"));
  EXPECT_THAT(row_with(page.html, "Benchmarks of base", "base"), HasSubstr("|±\xC2\xA0"
                                                                           "2.5|"));
  EXPECT_THAT(row_with(page.html, "Paired tests of base", "x-4"), HasSubstr("|12||2||McNemar||0.013|"));
  EXPECT_THAT(page.markdown, HasSubstr("| 25.0\xC2\xA0% (−25.0\xC2\xA0pp ▼) |"));
  EXPECT_THAT(page.html, HasSubstr("4 KV heads: <strong>x-4</strong>: −25.0\xC2\xA0pp on average over 1 "
                                   "benchmark (25.0\xC2\xA0%); the loss is significant on 1 of 1."));
  EXPECT_THAT(page.html, Not(HasSubstr("Further metrics"))) << "benchmarks have a table of their own";
  const auto csv = parse_csv(page.benchmarks_csv);
  ASSERT_EQ(csv.size(), 3U);
  const auto at = [&](std::size_t line, const std::string& name) {
    return csv[line].at(static_cast<std::size_t>(std::find(csv[0].begin(), csv[0].end(), name) - csv[0].begin()));
  };
  EXPECT_EQ(at(1, "role"), "original");
  EXPECT_EQ(at(1, "delta"), "");
  EXPECT_DOUBLE_EQ(std::stod(at(2, "delta")), -0.25);
  EXPECT_NEAR(std::stod(at(2, "p_value")), 0.012939453125, 1e-14);
  EXPECT_EQ(at(2, "significant"), "true");
  EXPECT_EQ(at(2, "test"), "mcnemar_exact");
  EXPECT_EQ(at(2, "only_original") + "/" + at(2, "only_model"), "12/2");
  EXPECT_EQ(at(2, "samples_file"), "e/x/samples_arc_2026-10-01T10-00-00.000000.jsonl");
}

TEST(BenchmarkTest, the_best_of_a_size_is_named_and_bold) {
  const ScratchFolder scratch;
  const RunFolder pair = pair_of(scratch / "run");
  RunFolder run = pair;
  run.conversion("y-4", "base", "aaaa", {"meanpool", "weights", "gqa", true, 4, 6});
  const std::string worse = std::string(36, '0') + "1111";
  Results(run.folder() / "e/y").add({"arc", worse}).headfold("y-4", "c2", 4, "aaaa").write();
  const Page page = page_of(run);
  expect_sound(page, run);
  EXPECT_THAT(page.html, HasSubstr("4 KV heads: <strong>x-4</strong> does best, −25.0\xC2\xA0pp"));
  EXPECT_THAT(page.html, HasSubstr("<td class=\"n best\">25.0"));
  EXPECT_THAT(page.html, Not(HasSubstr("<td class=\"n best\">10.0")));
}

TEST(BenchmarkTest, small_changes_are_not_marked_and_order_of_lines_does_not_matter) {
  const ScratchFolder scratch;
  const RunFolder run = pair_of(scratch / "run", kOriginal,
                                "1111111111"
                                "1111111000"
                                "1000000000"
                                "0000000000");
  const fs::path samples = run.folder() / "e/x/samples_arc_2026-10-01T10-00-00.000000.jsonl";
  std::vector<std::string> lines;
  std::istringstream stream(read_file(samples));
  for (std::string line; std::getline(stream, line);) lines.insert(lines.begin(), line + "\n");
  std::string reversed;
  for (const std::string& line : lines) reversed += line;
  write_file(samples, reversed);
  const RunData data = read_run(run.folder());
  const BenchmarkCell& cell = only_cell(data);
  ASSERT_TRUE(cell.test);
  EXPECT_EQ(cell.test->only_first, 3);
  EXPECT_EQ(cell.test->only_second, 1);
  EXPECT_NEAR(cell.test->p, 0.625, 1e-14);
  const std::string row = row_with(make_page(data).html, "Benchmarks of base", "x-4");
  EXPECT_THAT(row, HasSubstr("|−5.0\xC2\xA0pp|"));
}

TEST(BenchmarkTest, other_settings_are_not_compared_and_other_precision_is_said) {
  struct Case {
    const char *own, *original;  ///< merged into the files' "headfold"
    bool compared;
    const char* note;
  };
  for (const Case& one : std::vector<Case>{
           {R"({"benchmarks": {"max_length": 256}, "harness": {"adds_bos": true}})",
            R"({"benchmarks": {"max_length": 256, "adds_bos": true}})", true, ""},
           {R"({"harness": {"adds_bos": false}, "benchmarks": {"max_length": 256}})",
            R"({"harness": {"adds_bos": true}, "benchmarks": {"max_length": 256}})", false,
            "arc with BOS never, the original with BOS always. Not compared."},
           {R"({"benchmarks": {"max_length": 40}})", R"({"benchmarks": {"max_length": 256}})", false,
            "arc with at most 40 tokens at a time, the original with 256. Not compared."},
           {R"({"model": {"dtype": "float32"}})", R"({"model": {"dtype": "bfloat16"}})", true,
            "arc computed in float32, for the original in bfloat16: part of the difference is rounding."}}) {
    const ScratchFolder scratch;
    const RunFolder run = pair_of(scratch / "run", "1100", "1000");
    for (const auto& [model, more] : {std::pair("x", one.own), std::pair("base", one.original)}) {
      const fs::path path = run.folder() / "e" / model / "results_2026-10-01T10-00-00.000000.json";
      Json file = read_json(path);
      file["headfold"].merge_patch(Json::parse(more));
      write_file(path, file.dump());
    }
    const RunData data = read_run(run.folder());
    EXPECT_EQ(only_cell(data).test.has_value(), one.compared) << one.own;
    EXPECT_EQ(only_cell(data).delta.has_value(), one.compared) << one.own;
    EXPECT_THAT(make_page(data).html, HasSubstr(one.note));
  }
}

TEST(BenchmarkTest, equal_documents_are_paired_one_by_one) {
  const ScratchFolder scratch;
  const RunFolder run = pair_of(scratch / "run", "1100", "1000");
  for (const char* model : {"base", "x"}) {
    const fs::path path = run.folder() / "e" / model / "samples_arc_2026-10-01T10-00-00.000000.jsonl";
    write_file(path, std::regex_replace(read_file(path), std::regex("\"([pt]|arc-)[0-9]\""), "\"same\""));
  }
  const RunData data = read_run(run.folder());
  ASSERT_TRUE(only_cell(data).test);
  EXPECT_EQ(only_cell(data).test->documents, 4);
  EXPECT_EQ(only_cell(data).test->only_first, 1);
}

TEST(BenchmarkTest, log_likelihoods_of_a_perplexity_get_a_z_test) {
  const ScratchFolder scratch;
  RunFolder run(scratch / "run");
  run.conversion("x-4", "base", "aaaa", {});
  const auto write = [&](const std::string& name, const std::string& folder, const std::string& fingerprint,
                         const std::vector<double>& values, int heads) {
    Results results(run.folder() / "e" / name);
    results.headfold(folder, fingerprint, heads, heads == 8 ? "" : "aaaa");
    double sum = 0;
    std::string lines;
    for (std::size_t i = 0; i < values.size(); ++i) {
      sum += values[i];
      OrderedJson line = sample("lambada", i, "perplexity", values[i]);
      line["metrics"].push_back("acc");
      line["acc"] = i == 0;
      lines += line.dump() + "\n";
    }
    results.json()["results"]["lambada"] = {{"perplexity,none", std::exp(-sum / static_cast<double>(values.size()))},
                                            {"perplexity_stderr,none", "N/A"},
                                            {"acc,none", 1.0 / static_cast<double>(values.size())}};
    results.json()["higher_is_better"]["lambada"] = {{"perplexity", false}, {"acc", true}};
    results.write();
    write_file(results.samples_of("lambada"), lines);
  };
  write("base", "base", "aaaa", {-1.5, -2.25, -0.5, -3.0, -1.0}, 8);
  write("x", "x-4", "c1", {-2.0, -2.5, -1.5, -2.75, -2.0}, 4);
  const RunData data = read_run(run.folder());
  const auto& columns = data.sections[0].benchmarks.columns;
  ASSERT_EQ(columns.size(), 2U);
  EXPECT_EQ(columns[0].metric, "acc") << "stands for the task";
  EXPECT_EQ(columns[1].metric, "perplexity");
  EXPECT_FALSE(columns[1].higher_is_better);
  ASSERT_TRUE(columns[1].cells[1].test);
  EXPECT_NEAR(columns[1].cells[1].test->p, 0.03501498101966251, 1e-14);
  const Page page = make_page(data, "A report");
  expect_sound(page, run);
  // exp(0.5) = 1.649
  EXPECT_THAT(row_with(page.html, "Benchmarks of base", "x-4"), HasSubstr("|×1.649 ▼|"));
}

TEST(BenchmarkTest, groups_pool_their_tasks) {
  const ScratchFolder scratch;
  RunFolder run(scratch / "run");
  run.conversion("x-4", "base", "aaaa", {});
  const auto write = [&](const std::string& name, const std::string& folder, const std::string& fingerprint, int heads,
                         const std::string& a, const std::string& b, const std::string& c) {
    Results(run.folder() / "e" / name)
        .add({"mmlu_anatomy", a, "acc"})
        .add({"mmlu_astronomy", b, "acc"})
        .add({"mmlu_philosophy", c, "acc"})
        .add({"mmlu_stem", a + b, "acc", {"mmlu_anatomy", "mmlu_astronomy"}})
        .add({"mmlu_humanities", c, "acc", {"mmlu_philosophy"}})
        .add({"mmlu", a + b + c, "acc", {"mmlu_stem", "mmlu_humanities"}})
        .headfold(folder, fingerprint, heads, heads == 8 ? "" : "aaaa")
        .write();
  };
  write("base", "base", "aaaa", 8, "11111111", "1111", "1100");
  write("x", "x-4", "c1", 4, "11110000", "1100", "1110");
  const RunData data = read_run(run.folder());
  std::vector<std::string> order;
  for (const BenchmarkColumn& column : data.sections[0].benchmarks.columns) order.push_back(column.task);
  EXPECT_EQ(order, (std::vector<std::string>{"mmlu", "mmlu_humanities", "mmlu_philosophy", "mmlu_stem", "mmlu_anatomy",
                                             "mmlu_astronomy"}));
  const BenchmarkCell& stem = only_cell(data, "mmlu_stem");
  ASSERT_TRUE(stem.test);
  EXPECT_EQ(stem.documents, 12);
  EXPECT_EQ(stem.test->only_first, 6);
  EXPECT_EQ(stem.test->only_second, 0);
  EXPECT_NEAR(stem.test->p, 0.03125, 1e-14);
  ASSERT_TRUE(only_cell(data, "mmlu").test);
  EXPECT_EQ(only_cell(data, "mmlu").test->documents, 16);
  const Page page = make_page(data, "A report");
  expect_sound(page, run);
  EXPECT_THAT(page.html, HasSubstr("mmlu by subject"));
  EXPECT_THAT(row_with(page.html, "mmlu in groups, base", "stem"), HasSubstr("|−50.0\xC2\xA0pp ▼|"));
  EXPECT_THAT(row_with(page.html, "mmlu by subject, base", "philosophy"), HasSubstr("|+25.0\xC2\xA0pp|"));
  // The table of benchmarks has the total alone.
  EXPECT_THAT(page.html, Not(HasSubstr("<th scope=\"col\" class=\"n\">mmlu_stem")));
}

TEST(BenchmarkTest, groups_that_contain_each_other_end) {
  const ScratchFolder scratch;
  RunFolder run(scratch / "run");
  Results(run.folder() / "e")
      .add({"a", "10", "acc", {"b", "a"}})
      .add({"b", "10", "acc", {"a"}})
      .add({"top", "10", "acc", {"a", "absent"}})
      .headfold("base", "aaaa", 8)
      .write();
  const Page page = make_page(read_run(run.folder()), "A report");
  expect_sound(page, run);
}

TEST(BenchmarkTest, retrieval_has_a_map_per_model) {
  const ScratchFolder scratch;
  const RunFolder run = pair_of(scratch / "run", "11111111", "11110100");
  for (const char* model : {"base", "x"}) {
    const fs::path path = run.folder() / "e" / model / "samples_arc_2026-10-01T10-00-00.000000.jsonl";
    std::string lines;
    std::istringstream stream(read_file(path));
    std::size_t i = 0;
    for (std::string text; std::getline(stream, text); ++i) {
      Json line = Json::parse(text);
      line["doc"] = {{"length", i % 4 < 2 ? 256 : 512}, {"depth", i % 2 == 0 ? 0.0 : 0.5}, {"sample", i / 4}};
      lines += line.dump() + "\n";
    }
    write_file(path, lines);
  }
  const RunData data = read_run(run.folder());
  const auto& maps = data.sections[0].benchmarks.retrieval;
  ASSERT_EQ(maps.size(), 2U);
  EXPECT_EQ(maps[1].lengths, (std::vector<double>{256, 512}));
  EXPECT_EQ(maps[1].depths, (std::vector<double>{0, 0.5}));
  // Wrong: documents 4 (256, 0), 6 (512, 0), 7 (512, 0.5).
  EXPECT_EQ(maps[1].means, (std::vector<std::vector<std::optional<double>>>{{0.5, 0.5}, {1.0, 0.5}}));
  const Page page = make_page(data, "A report");
  expect_sound(page, run);
  EXPECT_THAT(page.html, HasSubstr("arc by depth and length"));
  EXPECT_THAT(page.html, HasSubstr("2 depths, 2 lengths; 62.5\xC2\xA0% on average"));
  EXPECT_THAT(page.markdown, HasSubstr("| x-4 | 0 | 50.0\xC2\xA0% | 50.0\xC2\xA0% |"));
}

TEST(BenchmarkTest, results_of_the_harness_stand_beside_ours) {
  const ScratchFolder scratch;
  RunFolder run = pair_of(scratch / "run");
  Results other(run.folder() / "others", "2026-09-01T10-00-00.000000");
  other.add({"arc", kOriginal}).harness("someone/their-7b");
  other.json()["results"]["other"] = {{"acc,none", 0.5}};
  other.write();
  std::string text = read_file(other.file());
  text.replace(text.find("0.025"), 5, "NaN");
  write_file(other.file(), text);
  const RunData data = read_run(run.folder());
  ASSERT_EQ(data.sections.size(), 1U);
  ASSERT_EQ(data.sections[0].models.size(), 3U);
  EXPECT_EQ(data.sections[0].models[2].name, "their-7b (harness)");
  const BenchmarkCell& cell = only_cell(data, "arc", 2);
  EXPECT_DOUBLE_EQ(*cell.delta, 0);
  EXPECT_EQ(cell.test->p, 1);
  const Page page = make_page(data, "A report");
  expect_sound(page, run);
  EXPECT_THAT(row_with(page.html, "Benchmarks of base", "their-7b (harness)"), HasSubstr("|±0.0\xC2\xA0pp|"));
  EXPECT_EQ(row_with(page.html, "Quality of the original", "their-7b (harness)"), "");
  EXPECT_THAT(page.quality_csv, Not(HasSubstr("their-7b")));
  EXPECT_THAT(page.html, Not(HasSubstr("its fold is unknown")));
  // Alone it makes a report, too.
  RunFolder alone(scratch / "alone");
  Results only(alone.folder());
  only.add({"arc", kOriginal}).harness("/secret/models/their-7b/");
  only.write();
  const Page single = page_of(alone);
  expect_sound(single, alone);
  EXPECT_THAT(row_with(single.html, "Benchmarks of their-7b", "their-7b"), HasSubstr("|50.0\xC2\xA0%|"));
}

// What is wrong with files is said; nothing is compared that is not the same.

class HostileSamples : public testing::Test {
 protected:
  void expect_note(const std::string& says, bool compared, const std::string& why) {
    const RunData data = read_run(run_.folder());
    ASSERT_EQ(data.sections[0].benchmarks.notes.size(), 1U) << why;
    const std::string& note = data.sections[0].benchmarks.notes[0];
    EXPECT_THAT(note, HasSubstr(says)) << why;
    EXPECT_THAT(note, HasSubstr("arc")) << why;
    EXPECT_EQ(only_cell(data).delta.has_value(), compared) << why << ": " << note;
    EXPECT_FALSE(only_cell(data).test) << why;
    const Page page = make_page(data, "A report");
    expect_sound(page, run_);
    EXPECT_THAT(page.html, HasSubstr("Not compared, or not tested")) << why;
    EXPECT_THAT(page.html, Not(HasSubstr("pp ▼"))) << why;
  }
  std::string lines_with(std::size_t index, const std::function<void(Json&)>& edit) {
    std::string lines;
    std::istringstream stream(good_);
    std::size_t i = 0;
    for (std::string text; std::getline(stream, text); ++i) {
      Json line = Json::parse(text);
      if (i == index) edit(line);
      lines += line.dump() + "\n";
    }
    return lines;
  }
  ScratchFolder scratch_;
  RunFolder run_ = pair_of(scratch_ / "run");
  fs::path samples_ = run_.folder() / "e/x/samples_arc_2026-10-01T10-00-00.000000.jsonl";
  fs::path results_ = run_.folder() / "e/x/results_2026-10-01T10-00-00.000000.json";
  std::string good_ = read_file(samples_);
};

TEST_F(HostileSamples, missing) {
  fs::remove(samples_);
  expect_note("there are no samples of arc beside e/x/results_2026", true, "no file");
}

TEST_F(HostileSamples, cut_off_or_edited) {
  const std::string file = "e/x/samples_arc_2026-10-01T10-00-00.000000.jsonl";
  write_file(samples_, good_.substr(0, good_.size() - 30));
  expect_note(file + " line 40 is not valid JSON", true, "cut inside a line");
  write_file(samples_,
             good_.substr(0, good_.rfind("{\"arguments") == std::string::npos ? good_.rfind('\n', good_.size() - 2) + 1
                                                                              : good_.rfind("{\"arguments")));
  expect_note("says that arc had 40 documents", false, "cut between lines");
  write_file(samples_, "");
  expect_note(file + " is empty", true, "empty");
  write_file(samples_, lines_with(2, [](Json& line) { line.erase("doc_hash"); }));
  expect_note("line 3 has no \"doc_hash\"", true, "no hash");
  write_file(samples_, lines_with(2, [](Json& line) { line["metrics"] = 3; }));
  expect_note("line 3 has no list \"metrics\"", true, "metrics");
  write_file(samples_, lines_with(2, [](Json& line) { line["metrics"] = {1}; }));
  expect_note("line 3 \"metrics\" holds", true, "metric that is a number");
  write_file(samples_, lines_with(2, [](Json& line) { line.erase("acc_norm"); }));
  expect_note("line 3 has no value of \"acc_norm\"", true, "no value");
  write_file(samples_, "[]\n" + good_);
  expect_note("line 1 is no JSON object", true, "a list");
  write_file(samples_, std::string("\xff\xfe\x00garbage", 10));
  expect_note("line 1 is not valid JSON", true, "bytes");
  write_file(samples_, lines_with(0, [](Json& line) { line["acc_norm"] = 0; }));
  expect_note("gives arc acc_norm 0.2500, its samples", false, "a value changed by hand");
  write_file(samples_, good_);
  Json results = read_json(results_);
  results["results"]["arc"]["acc_norm,none"] = 0.9;
  write_json(results_, results);
  expect_note("one of the two was changed", false, "results changed by hand");
}

TEST_F(HostileSamples, of_other_documents) {
  write_file(samples_, lines_with(3, [](Json& line) { line["doc_hash"] = "else"; }));
  expect_note("arc on other documents than the original's (40 documents and 40, 39 in common)", false, "document");
  write_file(samples_, lines_with(3, [](Json& line) { line["prompt_hash"] = "else"; }));
  expect_note("1 document of arc had another prompt", false, "prompt");
  write_file(samples_, lines_with(3, [](Json& line) { line["target_hash"] = "else"; }));
  expect_note("1 document of arc had another right answer", false, "target");
  write_file(samples_, good_);
  Json results = read_json(results_);
  results["n-shot"]["arc"] = 5;
  write_json(results_, results);
  expect_note("arc with 5 examples before each question, the original with 0", false, "examples");
  results["n-shot"]["arc"] = 0;
  results["n-samples"]["arc"]["effective"] = 20;
  write_json(results_, results);
  fs::remove(samples_);
  expect_note("arc on 20 documents, the original on 40", false, "count");
}

TEST_F(HostileSamples, results_of_any_shape) {
  const Json good = read_json(results_);
  const auto with = [&](const std::string& pointer, const Json& value) {
    Json json = good;
    json[Json::json_pointer(pointer)] = value;
    write_json(results_, json);
    expect_sound(make_page(read_run(run_.folder()), "A report"), run_);
  };
  with("/n-samples", "many");
  with("/n-samples/arc", 3);
  with("/n-samples/arc/effective", -5);
  with("/n-shot", Json::array());
  with("/n-shot/arc", -3);
  with("/group_subtasks", Json::array());
  with("/group_subtasks/arc", Json::array({1, "arc", nullptr, "else"}));
  with("/higher_is_better", 1);
  with("/higher_is_better/arc", Json::array());
  with("/results/arc/acc_norm,none", "NaN");
  with("/results/arc/acc_norm,none", nullptr);
  with("/results/arc/acc_norm,none", -1e300);
  with("/results/arc/acc_norm_stderr,none", "N/A");
  with("/results/arc/,", 1);
  with("/task_hashes", 5);
}

TEST(BenchmarkTest, hostile_task_names_stay_text_and_find_no_other_file) {
  const ScratchFolder scratch;
  RunFolder run(scratch / "run");
  const std::string evil = "../<script>alert(1)</script>|`*\"'&";
  Results results(run.folder() / "e");
  results.headfold("base", "aaaa", 8);
  results.json()["results"][evil] = {{"acc,none", 0.5}};
  results.json()["group_subtasks"][evil] = {evil};
  results.write();
  const Page page = make_page(read_run(run.folder()), "A report");
  for (const std::string& svg : svgs_of(page.html)) EXPECT_EQ(xml_error(svg), std::nullopt);
  EXPECT_THAT(page.html, Not(HasSubstr("<script")));
  EXPECT_THAT(page.html, HasSubstr("&lt;script&gt;alert(1)"));
  EXPECT_EQ(parse_csv(page.benchmarks_csv).at(1).at(6), evil);
}

}  // namespace
}  // namespace headfold::report
