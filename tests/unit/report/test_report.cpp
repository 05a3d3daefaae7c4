#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/base/json.h>
#include <headfold/report/page.h>
#include <headfold/report/run_data.h>
#include <headfold/report/text.h>

#include <gmock/gmock.h>

#include <regex>
#include <sstream>

#include "run_folder.h"

namespace headfold::report {
namespace {

using headfold::testing_support::ScratchFolder;
using headfold::testing_support::svgs_of;
using headfold::testing_support::xml_error;
using testing::HasSubstr;
using testing::Not;
using testing_support::expect_sound;
using testing_support::page_of;
using testing_support::parse_csv;
using testing_support::row_with;
using testing_support::RunFolder;

TEST(ReportTest, complete_run_shows_every_model_in_every_table) {
  const ScratchFolder scratch;
  RunFolder run(scratch / "run");
  run.complete();
  const RunData data = read_run(run.folder());
  ASSERT_EQ(data.sections.size(), 2U);
  EXPECT_EQ(data.sections[0].name, "prose-llama");
  EXPECT_EQ(data.sections[1].name, "prose-bloom");
  ASSERT_EQ(data.sections[0].models.size(), 7U);
  ASSERT_EQ(data.sections[1].models.size(), 2U);
  EXPECT_TRUE(data.ignored.empty());
  const Page page = make_page(data, "A report");
  expect_sound(page, run);
  for (const Section& section : data.sections) {
    EXPECT_TRUE(section.missing.empty()) << section.missing[0];
    for (const ModelRow& row : section.models) {
      for (const char* table : {"Quality of the original and of every conversion of ", "Further metrics of ",
                                "Parameters and seconds of every model of "})
        EXPECT_NE(row_with(page.html, table + section.name, row.name), "") << table << row.name;
      if (!row.original) {
        EXPECT_NE(row_with(page.html, "Mean loss of every conversion of " + section.name, row.name), "") << row.name;
      }
      EXPECT_THAT(page.markdown, HasSubstr("| " + escape_markdown(row.name) + " "));
    }
  }
  // Bars, quality, 2 × loss for 7 conversions, energy for the distinct folds; all are there.
  EXPECT_GE(svgs_of(page.html).size(), 2U + 14U + 8U);
  EXPECT_THAT(page.html, HasSubstr("d47aaaaa"));
  EXPECT_THAT(
      page.html,
      HasSubstr(
          "mpirun -np 2 headfold calibrate --model …/prose-llama --data …/text.jsonl --out llama/calibration.h5"));
  EXPECT_THAT(page.html, HasSubstr("prefers-color-scheme:dark"));
  EXPECT_THAT(page.html, HasSubstr("@media print"));
}

TEST(ReportTest, arithmetic_of_the_quality_table) {
  const ScratchFolder scratch;
  RunFolder run(scratch / "run");
  run.complete();
  const RunData data = read_run(run.folder());
  const auto& models = data.sections[0].models;
  EXPECT_TRUE(models[0].original);
  EXPECT_EQ(models[1].name, "post-rotation-4") << "ordered by KV heads, then quality";
  EXPECT_EQ(models[2].name, "rope-commuting-4");
  EXPECT_NEAR(*models[2].ratio, 32.97 / 30.0, 1e-12);
  EXPECT_DOUBLE_EQ(*models[2].share, 0.5);
  EXPECT_DOUBLE_EQ(*models[5].share, 0.25);
  // The bloom conversion of the same folder name got its own result.
  EXPECT_NEAR(*data.sections[1].models[1].ratio, 41.0 / 40.0, 1e-12);
  const Page page = make_page(data);
  const std::string row =
      row_with(page.html, "Quality of the original and of every conversion of prose-llama", "rope-commuting-4");
  for (const char* cell :
       {"|rope-commuting|", "|act+query; values svd (act)|", "|4|", "|of 8|", "|stock|", "|gqa|", "|3.0 KiB|",
        "|50\xC2\xA0%|", "|32.97|", "|1.099|", "|+9.9\xC2\xA0%|", "|0.0951|", "|87.3\xC2\xA0%|"})
    EXPECT_THAT(row, HasSubstr(cell));
  EXPECT_THAT(row_with(page.html, "Quality of the original and of every conversion of prose-llama", "post-rotation-4"),
              HasSubstr("|headfold only|"));
  // Keys: spread and pairs in order, as the verification has them; values: not recorded.
  EXPECT_THAT(row_with(page.html, "Mean loss of every conversion of prose-llama", "rope-commuting-4"),
              HasSubstr("||1.00||25.0\xC2\xA0%||12 of 13||"));
  EXPECT_EQ(
      headline(data.sections[0]),
      "prose-llama: half the KV cache costs +9.9\xC2\xA0% perplexity as a stock checkpoint (rope-commuting); a quarter "
      "costs "
      "+33.0\xC2\xA0% perplexity. In headfold's own runtime, which stock engines do not have, half the KV cache costs "
      "+3.4\xC2\xA0% perplexity (post-rotation); a quarter costs +16.0\xC2\xA0% perplexity.");
  // Another fold is named where another fold is best.
  fs::remove_all(run.folder() / "llama/rope-commuting-2");
  EXPECT_THAT(headline(read_run(run.folder()).sections[0]),
              HasSubstr("(rope-commuting); a quarter costs 6.60 times the perplexity (meanpool). In"));
}

TEST(ReportTest, csv_reads_back) {
  const ScratchFolder scratch;
  RunFolder run(scratch / "run");
  run.complete();
  const Page page = page_of(run);
  const auto quality = parse_csv(page.quality_csv), layers = parse_csv(page.layers_csv),
             timing = parse_csv(page.timing_csv);
  for (const auto* table : {&quality, &layers, &timing})
    for (const auto& row : *table) ASSERT_EQ(row.size(), (*table)[0].size());
  ASSERT_EQ(quality.size(), 1U + 7 + 2);
  ASSERT_EQ(layers.size(), 1U + 7 * 6);
  ASSERT_EQ(timing.size(), 1U + 2 + 7 + 7 + 9);
  const auto column = [](const auto& table, const std::string& name) {
    return static_cast<std::size_t>(std::find(table[0].begin(), table[0].end(), name) - table[0].begin());
  };
  for (const auto& row : quality) {
    if (row[column(quality, "model")] != "rope-commuting-2") continue;
    EXPECT_DOUBLE_EQ(std::stod(row[column(quality, "perplexity_ratio")]), 39.9 / 30.0);
    EXPECT_EQ(row[column(quality, "cache_bytes_per_token")], "1536");
    EXPECT_EQ(row[column(quality, "word_perplexity")], "120.5");
    EXPECT_EQ(row[column(quality, "result_file")].substr(0, 33), "llama/eval/rope-commuting-2/resul");
  }
  EXPECT_DOUBLE_EQ(std::stod(layers[1][column(layers, "key_loss_measured")]), 0.011);
  EXPECT_EQ(timing[1][column(timing, "seconds")], "12.5");
}

TEST(ReportTest, hostile_names_stay_text) {
  const ScratchFolder scratch;
  RunFolder run(scratch / "run");
  const std::string evil = "<script>alert('x')<\\script>\"&|`*";
  run.calibration("c.h5", evil, evil);
  run.results("eval/base", evil, evil, {30.0, nullptr, nullptr, false, 8, "gqa", "1", ""});
  run.conversion("a " + std::string("<img src=x onerror=1>"), evil, evil, {"<b>\"keys", "m'", "gqa", true, 4, 3});
  run.results("eval/c", "a <img src=x onerror=1>", "zz", {33.0, 0.1, 0.9, true, 4, "gqa", "1", evil});
  write_file(run.folder() / "bad\xff\xfename" / "headfold.json",
             run.model_json(evil, evil, {"x\ny", "", "gqa", true, 2, 3}).dump());
  const Page page = make_page(read_run(run.folder()), "</title><script>1</script>");
  for (const std::string& svg : svgs_of(page.html)) EXPECT_EQ(xml_error(svg), std::nullopt) << svg.substr(0, 2000);
  std::string body = page.html.substr(page.html.find("<body>"));
  EXPECT_EQ(xml_error(body.substr(0, body.find("</html>"))), std::nullopt);
  EXPECT_THAT(page.html, Not(HasSubstr("<script")));
  EXPECT_THAT(page.html, Not(HasSubstr("<img")));
  // Markdown keeps markup only in indented code, where it is text.
  std::istringstream lines(page.markdown);
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("    ") || line == "<!-- headfold report -->") continue;
    EXPECT_THAT(line, Not(HasSubstr("<")));
  }
  EXPECT_THAT(page.html, HasSubstr("<title>&lt;/title&gt;&lt;script&gt;1&lt;/script&gt;</title>"));
  const auto quality = parse_csv(page.quality_csv);
  ASSERT_EQ(quality.size(), 4U);
  EXPECT_EQ(quality[2][3], "<b>\"keys") << "CSV keeps the name as it is, quoted";
}

TEST(ReportTest, numbers_that_are_none_are_said_so) {
  const ScratchFolder scratch;
  RunFolder run(scratch / "run");
  run.results("e/base", "/secret/models/base", "aaaa", {30.0, nullptr, nullptr, false, 8, "gqa", "1", ""});
  run.conversion("a-4", "base", "aaaa", {});
  run.results("e/a", "a-4", "c1", {nullptr, "NaN", "Infinity", true, 4, "gqa", "1", "aaaa"});
  run.conversion("b-4", "base", "aaaa", {"meanpool", "weights", "gqa", true, 4, 6}, false);
  run.results("e/b", "b-4", "c2", {"inf", "nan", 0.5, true, 4, "gqa", "1", "aaaa"});
  // Another text: no ratio.
  run.conversion("c-2", "base", "aaaa", {"meanpool", "weights", "gqa", true, 2, 6}, false);
  run.results("e/c", "c-2", "c3", {60.0, 0.1, 0.5, true, 2, "gqa", "other", "aaaa"});
  const RunData data = read_run(run.folder());
  const Page page = make_page(data, "A report");
  expect_sound(page, run);
  const std::string row = row_with(page.html, "Quality of the original", "a-4");
  EXPECT_EQ(std::count(row.begin(), row.end(), 'f') > 2, true) << row;
  EXPECT_THAT(row, HasSubstr("|not finite|"));
  for (const ModelRow& model : data.sections[0].models)
    if (!model.original) {
      EXPECT_FALSE(model.ratio) << model.name;
    }
  EXPECT_THAT(page.html, HasSubstr("c-2 was evaluated on another text"));
  EXPECT_THAT(headline(data.sections[0]), HasSubstr("3 conversions to 4 and 2 KV heads, none with a perplexity"));
}

TEST(ReportTest, perplexities_with_other_settings_have_no_ratio) {
  struct Case {
    const char *own, *original;  ///< merged into the files
    bool ratio;
    const char* note;
  };
  const auto settings = [](const char* bos, int length) {
    return Json{{"configs", {{"ppl_blocks@256", {{"bos", bos}, {"max_length", length}}}}}}.dump();
  };
  const std::string never = settings("never", 256), usual = settings("default", 256), wide = settings("default", 512);
  for (const Case& one : std::vector<Case>{
           {usual.c_str(), usual.c_str(), true, ""},
           {never.c_str(), usual.c_str(), false, "a-4 was evaluated with BOS never, the original with BOS default"},
           {wide.c_str(), usual.c_str(), false, "with at most 512 tokens at a time, the original with 256"},
           {R"({"headfold": {"model": {"dtype": "float32"}}})", R"({"headfold": {"model": {"dtype": "bfloat16"}}})",
            true, "a-4 was computed in float32, the original in bfloat16"}}) {
    const ScratchFolder scratch;
    RunFolder run(scratch / "run");
    run.results("e/base", "/secret/models/base", "aaaa", {30.0, nullptr, nullptr, false, 8, "gqa", "1", ""});
    run.conversion("a-4", "base", "aaaa", {});
    run.results("e/a", "a-4", "c1", {33.0, 0.1, 0.9, true, 4, "gqa", "1", "aaaa"});
    for (const auto& [folder, more] : {std::pair("e/a", one.own), std::pair("e/base", one.original)})
      for (const auto& entry : fs::recursive_directory_iterator(run.folder() / folder))
        if (entry.path().filename().string().starts_with("results_")) {
          Json file = read_json(entry.path());
          ASSERT_TRUE(file["results"].contains("ppl_blocks@256")) << file["results"].dump();
          file.merge_patch(Json::parse(more));
          write_file(entry.path(), file.dump());
        }
    const RunData data = read_run(run.folder());
    for (const ModelRow& row : data.sections.at(0).models)
      EXPECT_EQ(row.ratio.has_value(), row.original || one.ratio) << row.name << " " << one.own;
    EXPECT_THAT(make_page(data, "A report").html, HasSubstr(one.note));
  }
}

TEST(ReportTest, partial_runs_say_what_is_missing) {
  const ScratchFolder scratch;
  {
    RunFolder run(scratch / "calibration-only");
    run.calibration("calibration.h5", "prose-llama", "aaaa");
    const Page page = page_of(run);
    expect_sound(page, run);
    EXPECT_THAT(page.html, HasSubstr("nothing has been folded yet"));
    EXPECT_THAT(page.html, HasSubstr("No converted model was found"));
    EXPECT_THAT(page.html, HasSubstr("The original model was not evaluated"));
    EXPECT_THAT(page.html, HasSubstr("16,384 tokens"));
  }
  {
    RunFolder run(scratch / "conversion-only");
    run.conversion("x-4", "prose-llama", "aaaa", {}, false);
    fs::remove(run.folder() / "x-4" / "convert.json");
    const Page page = page_of(run);
    expect_sound(page, run);
    for (const char* text : {"No calibration of this model", "Not evaluated: x-4", "Not verified", "No convert.json",
                             "The original model was not evaluated", "3.0 KiB, 50", "Predicted loss, layer by layer"})
      EXPECT_THAT(page.html, HasSubstr(text));
    EXPECT_THAT(page.html, Not(HasSubstr("measured; a stem")));
    // What training made of a fold has no prediction to verify.
    Json record = read_json(run.folder() / "x-4" / "headfold.json");
    record["merged"] = Json::object();
    write_file(run.folder() / "x-4" / "headfold.json", record.dump());
    const Page healed = page_of(run);
    expect_sound(healed, run);
    EXPECT_THAT(healed.html, HasSubstr("Not evaluated: x-4"));
    for (const char* text : {"Not verified", "No convert.json", "Predicted loss, layer by layer"})
      EXPECT_THAT(healed.html, Not(HasSubstr(text)));
  }
  {
    RunFolder run(scratch / "results-only");
    run.results("e/x", "/secret/x-4", "c1", {33.0, 0.1, 0.9, true, 4, "gqa", "1", "aaaa"});
    const Page page = page_of(run);
    expect_sound(page, run);
    EXPECT_THAT(page.html, HasSubstr("its fold is unknown"));
    EXPECT_THAT(row_with(page.html, "Quality of the original", "x-4"), HasSubstr("|33.00|"));
  }
  {
    RunFolder run(scratch / "root");
    run.conversion(".", "prose-llama", "aaaa", {});
    const Page page = page_of(run);
    expect_sound(page, run);
    EXPECT_THAT(page.html, HasSubstr("converted"));
  }
}

TEST(ReportTest, the_newest_result_wins_task_by_task) {
  const ScratchFolder scratch;
  RunFolder run(scratch / "run");
  run.results("e/base", "/secret/base", "aaaa", {30.0, nullptr, nullptr, false, 8, "gqa", "1", ""});
  run.conversion("x-4", "base", "aaaa", {});
  run.results("e/x", "x-4", "c1", {99.0, 0.1, 0.9, true, 4, "gqa", "1", "aaaa"}, "2026-12-31T00-00-00");
  const std::string newer =
      run.results("e/x", "x-4", "c2", {33.0, 0.1, 0.9, true, 4, "gqa", "1", "aaaa"}, "2026-01-01T00-00-00");
  Json json = read_json(run.folder() / newer);
  json["results"].erase("rolling");
  write_json(run.folder() / newer, json);
  const RunData data = read_run(run.folder());
  ASSERT_EQ(data.sections[0].models.size(), 2U);
  const ModelRow& row = data.sections[0].models[1];
  EXPECT_EQ(*row.perplexity, 33.0) << "the recorded date decides, not the file name";
  EXPECT_EQ(row.evaluation->tasks.at("rolling").metrics.at("word_perplexity,none"), 120.5);
  EXPECT_EQ(row.evaluation->records.size(), 2U);
}

TEST(ReportTest, the_reference_of_others_stands_in_for_the_original) {
  const ScratchFolder scratch;
  RunFolder run(scratch / "run");
  run.conversion("x-4", "base", "aaaa", {});
  const std::string file = run.results("e/x", "x-4", "c1", {33.0, 0.1, 0.9, true, 4, "gqa", "1", "aaaa"});
  Json json = read_json(run.folder() / file);
  json["results"]["ppl_blocks@256"]["reference_perplexity,none"] = 30.0;
  write_json(run.folder() / file, json);
  const RunData data = read_run(run.folder());
  EXPECT_EQ(*data.sections[0].models[0].perplexity, 30.0);
  EXPECT_NEAR(*data.sections[0].models[1].ratio, 1.1, 1e-12);
  EXPECT_THAT(make_page(data).html, HasSubstr("no results file of its own"));
}

TEST(ReportTest, many_layers_become_a_heat_map) {
  const ScratchFolder scratch;
  RunFolder run(scratch / "run");
  run.conversion("x-4", "big", "aaaa", {"rope-commuting", "act+query", "gqa", true, 4, 40});
  const Page page = page_of(run);
  expect_sound(page, run);
  EXPECT_THAT(page.html, HasSubstr("≥99 %"));
}

TEST(ReportTest, foreign_files_are_ignored_broken_own_ones_are_errors) {
  const ScratchFolder scratch;
  RunFolder run(scratch / "run");
  run.conversion("x-4", "base", "aaaa", {});
  write_file(run.folder() / "results_2026.json", "{\"results\": {\"a\": {\"acc,none\": NaN}}}");
  write_file(run.folder() / "sub/results_other.json", "{\"results\": {}}");
  write_file(run.folder() / "other.h5.json", "{\"format\": \"else\"}");
  write_file(run.folder() / "notes.json", "{broken");
  write_file(run.folder() / "synthetic/headfold.json", "{\"format\": \"headfold-synthetic\"}");
  write_file(run.folder() / "expanded/headfold.json", "{\"format\": \"headfold-expanded\", \"source\": 3}");
  write_file(run.folder() / "sub/compare.json", "{\"format\": \"someone's\"}");
  const RunData data = read_run(run.folder());
  EXPECT_EQ(data.ignored, (std::vector<std::string>{"other.h5.json", "results_2026.json", "sub/compare.json",
                                                    "sub/results_other.json"}));

  const Json good = read_json(run.folder() / "x-4/headfold.json");
  const auto expect_error = [&](const std::string& file, const std::string& content, const std::string& says) {
    write_file(run.folder() / file, content);
    try {
      read_run(run.folder());
      ADD_FAILURE() << "accepted: " << content.substr(0, 200);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::bad_input);
      EXPECT_THAT(error.what(), HasSubstr(file));
      EXPECT_THAT(error.what(), HasSubstr(says));
    }
    fs::remove(run.folder() / file);
  };
  expect_error("y/headfold.json", "", "not valid JSON");
  expect_error("y/headfold.json", good.dump().substr(0, 700), "not valid JSON");
  expect_error("y/c.h5.json", "{\"format\": \"headfold-cal", "not valid JSON");
  expect_error("y/c.h5.json", "{\"format\": \"headfold-calibration\"}", "\"model\"");
  // Cut off before anything says whose it is, with NaN or without.
  expect_error("results_x.json", "{\"results\": {\"a\": {\"word_perplexity,none\": 3", "not valid JSON");
  expect_error("results_x.json", "{\"results\": {\"a\": {\"acc,none\": NaN, ", "not valid JSON");
  expect_error("results_x.json", "{\"headfold\": {\"format\": \"headfold-results\", ", "not valid JSON");
  expect_error("results_x.json",
               R"({"headfold": {"format": "headfold-results", "model": {"name": "m"}}, "results": {"t": 3}})", "\"t\"");
  expect_error("x-4/verification.json", R"({"format": "headfold-verification", "layers": [{"layer": "x"}]})",
               "\"layer\"");
  const auto changed = [&](const std::string& pointer, const Json& value) {
    Json json = good;
    json[Json::json_pointer(pointer)] = value;
    return json.dump();
  };
  expect_error("y/headfold.json", changed("/format_version", 2), "format_version is 2");
  expect_error("y/headfold.json", changed("/kv_heads", 4), "\"kv_heads\"");
  expect_error("y/headfold.json", changed("/kv_heads/after", 0), "\"after\" is 0");
  expect_error("y/headfold.json", changed("/cache_bytes_per_token/before", -1), "positive");
  expect_error("y/headfold.json", changed("/stock", "yes"), "\"stock\"");
  expect_error("y/headfold.json", changed("/layers", 3), "\"layers\"");
  expect_error("y/headfold.json", changed("/layers/0/key_energy", "x"), "\"key_energy\"");
  expect_error("y/headfold.json", changed("/layers/0/layer", -1), "\"layer\" is -1");
  expect_error("y/headfold.json", changed("/layers/0/layer", 9000000000000000000), "\"layer\" is 9000000000000000000");
  expect_error("y/headfold.json", changed("/layers/0/leading_share", 1), "\"leading_share\"");
  expect_error("y/headfold.json", changed("/refit", {{"layers", 1}}), "\"layers\"");
  expect_error("y/headfold.json", changed("/refit", {{"layers", {{{"layer", 0}, {"parts", {{{"part", 1}}}}}}}}),
               "\"part\"");
  expect_error("y/compare.json", R"({"format": "headfold-comparison", "plans": []})", "\"model\"");
  expect_error("y/compare.json",
               R"({"format": "headfold-comparison", "model": {"folder": "m", "fingerprint": "f"}, "plans": {}})",
               "\"plans\"");
  expect_error("y/compare.json", R"({"format": "headfold-comparison", "model": )", "not valid JSON");
  EXPECT_NO_THROW(read_run(run.folder()));
}

TEST(ReportTest, nothing_to_report_says_what_was_looked_for) {
  const ScratchFolder scratch;
  make_folder(scratch / "empty");
  try {
    read_run(scratch / "empty");
    FAIL();
  } catch (const InputError& error) {
    for (const char* name : {"*.h5.json", "headfold.json", "results_*.json", "verification.json"})
      EXPECT_THAT(error.what(), HasSubstr(name));
  }
  EXPECT_THROW(read_run(scratch / "absent"), IoError);
  write_file(scratch / "file", "x");
  EXPECT_THROW(read_run(scratch / "file"), InputError);
}

TEST(ReportTest, written_twice_the_bytes_are_equal_and_foreign_files_are_safe) {
  const ScratchFolder scratch;
  RunFolder run(scratch / "run");
  run.complete();
  const fs::path out = run.folder() / "report";
  const fs::path page = write_report(out, make_page(read_run(run.folder())));
  EXPECT_EQ(page, out / "index.html");
  const std::string first = read_file(page);
  write_report(out, make_page(read_run(run.folder())));
  EXPECT_EQ(read_file(page), first);
  EXPECT_EQ(std::distance(fs::directory_iterator(out), fs::directory_iterator()), 8);
  // Moving the run folder changes nothing but the names that commands recorded.
  fs::rename(run.folder(), scratch / "run2");
  fs::rename(scratch / "run2", run.folder());
  write_file(scratch / "mine/index.html", "my own page");
  EXPECT_THROW(write_report(scratch / "mine", make_page(read_run(run.folder()))), UsageError);
  EXPECT_EQ(read_file(scratch / "mine/index.html"), "my own page");
  EXPECT_FALSE(fs::exists(scratch / "mine/report.md"));
  EXPECT_THROW(write_report(scratch / "mine/index.html", make_page(read_run(run.folder()))), UsageError);
  // Beside results it hides none of them.
  const RunData data = read_run(run.folder());
  for (const fs::directory_entry& entry : fs::directory_iterator(run.folder())) {
    if (!entry.is_directory()) continue;
    write_report(entry.path(), make_page(data));
    EXPECT_EQ(make_page(read_run(run.folder())).quality_csv, make_page(data).quality_csv) << entry.path();
  }
}

TEST(ReportTest, one_that_cannot_be_written_leaves_nothing) {
  const ScratchFolder scratch;
  RunFolder run(scratch / "run");
  run.complete();
  const fs::path out = scratch / "out";
  // The last file that is written cannot be: a folder stands in its place.
  fs::create_directories(out / ".index.html.unfinished" / "x");
  EXPECT_THROW(write_report(out, make_page(read_run(run.folder()))), IoError);
  EXPECT_EQ(std::distance(fs::directory_iterator(out), fs::directory_iterator()), 1);
}

}  // namespace
}  // namespace headfold::report
