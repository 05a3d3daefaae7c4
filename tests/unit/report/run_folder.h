#pragma once
// A made-up run folder, and what must hold of any page made from one.

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <headfold/base/files.h>
#include <headfold/base/json.h>
#include <headfold/report/page.h>
#include <headfold/report/run_data.h>
#include <headfold/report/text.h>

#include <regex>
#include <set>

#include "markup.h"
#include "world.h"

namespace headfold::report::testing_support {

using headfold::testing_support::svgs_of;
using headfold::testing_support::xml_error;
using testing::HasSubstr;
using testing::Not;

/// A made-up run folder in the agreed formats.
class RunFolder {
 public:
  explicit RunFolder(fs::path folder) : folder_(std::move(folder)) {}
  const fs::path& folder() const { return folder_; }

  OrderedJson record(const std::string& job, const std::string& command, double seconds) {
    OrderedJson json;
    json["job"] = job;
    json["command"] = "headfold " + job + " " + command;
    json["date"] = 1790000000 + 60 * ++clock_;
    json["seconds"] = seconds;
    json["ranks"] = 2;
    json["hosts"] = 1;
    json["threads_per_rank"] = 1;
    json["peak_resident_bytes"] = 123456789;
    json["headfold_version"] = "0.1.0";
    return json;
  }

  void calibration(const std::string& file, const std::string& model, const std::string& fingerprint) {
    OrderedJson json = record(
        "calibrate",
        fmt::format("--model /secret/models/{} --data /secret/text.jsonl --out {}", model, (folder_ / file).string()),
        12.5);
    json["format"] = "headfold-calibration";
    json["model"] = {{"folder", "/secret/models/" + model}, {"fingerprint", fingerprint}};
    json["data_hash"] = "d47a" + fingerprint;
    json["options"] = {{"samples", 64}, {"seq_len", 256}, {"data", OrderedJson::array({"/secret/text.jsonl"})}};
    json["tokens"] = 16384;
    json["tokens_per_second"] = 3456.7;
    json["stages"] = 2;
    json["replicas"] = 1;
    json["pipeline_bubble"] = 0.03;
    write_json(folder_ / (file + ".json"), json);
  }

  struct Fold {
    std::string keys = "rope-commuting", key_metric = "act+query", layout = "gqa";
    bool stock = true;
    int kv_heads = 4, layers = 6;
  };

  OrderedJson model_json(const std::string& source, const std::string& fingerprint, const Fold& fold) {
    OrderedJson json;
    json["format"] = "headfold-model";
    json["format_version"] = 1;
    json["headfold_version"] = "0.1.0";
    json["source"] = {{"folder", source}, {"fingerprint", fingerprint}};
    json["statistics"] = {{"file", "calibration.h5"}, {"content_hash", "5747"}};
    json["fold"] = {{"keys", fold.keys},
                    {"key_metric", fold.key_metric},
                    {"values", fold.keys == "meanpool" ? "meanpool" : "svd"},
                    {"value_metric", "act"},
                    {"sink_weight", 1.0},
                    {"weight_ridge", 0.0}};
    json["layout"] = fold.layout;
    json["stock"] = fold.stock;
    json["kv_heads"] = {{"before", 8}, {"after", fold.kv_heads}};
    json["heads"] = 8;
    json["layers_total"] = fold.layers;
    json["cache_bytes_per_token"] = {{"before", 6144}, {"after", 768 * fold.kv_heads}};
    json["parameters"] = {{"before", 6815744}, {"after", 6815744 - 65536 * (8 - fold.kv_heads)}};
    json["layers"] = OrderedJson::array();
    for (int l = 0; l < fold.layers; ++l) {
      OrderedJson layer;
      layer["layer"] = l;
      layer["groups"] = {{0, 1}, {2, 3}, {4, 5}, {6, 7}};
      layer["key_relative_loss"] = 0.01 * (l + 1) * (8.0 / fold.kv_heads);
      layer["value_relative_loss"] = 0.02 * (6 - l) / 10.0 + 0.01;
      std::vector<double> energy;
      for (int i = 1; i <= 32; ++i) energy.push_back(1 - (0.6 - 0.05 * (l % 6)) * (1 - i / 32.0) * (1 - i / 32.0));
      layer["key_energy"] = energy;
      layer["value_energy"] = energy;
      json["layers"].push_back(layer);
    }
    return json;
  }

  void conversion(const std::string& path, const std::string& source, const std::string& fingerprint, const Fold& fold,
                  bool verified = true) {
    write_json(folder_ / path / "headfold.json", model_json(source, fingerprint, fold));
    OrderedJson timing = record("convert", fmt::format("--out {}", (folder_ / path).string()), 3.25);
    timing["seconds_plan"] = 2.0;
    timing["seconds_apply"] = 1.0;
    write_json(folder_ / path / "convert.json", timing);
    write_json(folder_ / path / "config.json", OrderedJson{{"model_type", "llama"},
                                                           {"hidden_size", 256},
                                                           {"num_hidden_layers", 6},
                                                           {"num_attention_heads", 8},
                                                           {"vocab_size", 4096}});
    if (!verified) return;
    OrderedJson check;
    check["format"] = "headfold-verification";
    check["model"] = fs::path(path).filename().string();
    check["text"] = "/secret/heldout.jsonl";
    check["layers"] = OrderedJson::array();
    for (int l = 0; l < fold.layers; ++l)
      check["layers"].push_back({{"layer", l},
                                 {"key_predicted", 0.01 * (l + 1)},
                                 {"key_measured", 0.011 * (l + 1)},
                                 {"value_predicted", 0.02},
                                 {"value_measured", 0.03 - 0.001 * l},
                                 {"score_error", 0.1},
                                 {"output_error", 0.05}});
    check["key_order"] = {{"pairs", 15}, {"told_apart", 13}, {"in_order", 12}, {"spread", 0.25}};
    check["record"] = record("verify", "--model x", 4.5);
    write_json(folder_ / path / "verification.json", check);
  }

  struct Measured {
    OrderedJson perplexity = 30.0, kl = nullptr, top1 = nullptr;
    bool reference = true;
    int kv_heads = 8;
    std::string layout = "gqa", hash = "7e87", reference_fingerprint;
  };

  std::string results(const std::string& folder, const std::string& model_folder, const std::string& fingerprint,
                      const Measured& measured, const std::string& time = {}) {
    OrderedJson json;
    OrderedJson task = {
        {"name", "ppl"}, {"alias", "ppl"}, {"perplexity,none", measured.perplexity}, {"loss,none", 3.4}};
    if (measured.reference) {
      task["kl,none"] = measured.kl;
      task["top1_agreement,none"] = measured.top1;
    }
    json["results"]["ppl_blocks@256"] = task;
    json["results"]["rolling"] = {
        {"word_perplexity,none", 120.5}, {"byte_perplexity,none", 2.25}, {"bits_per_byte,none", 1.17}};
    json["task_hashes"] = {{"ppl_blocks@256", measured.hash}, {"rolling", measured.hash}};
    const std::string name = fs::path(model_folder).filename().string();
    OrderedJson own;
    own["format"] = "headfold-results";
    own["format_version"] = 1;
    own["model"] = {{"name", name},
                    {"folder", model_folder},
                    {"fingerprint", fingerprint},
                    {"layout", measured.layout},
                    {"kv_heads", measured.kv_heads},
                    {"heads", 8},
                    {"dtype", "float32"},
                    {"parameters", 6815744},
                    {"cache_bytes_per_token", 768 * measured.kv_heads}};
    own["reference"] = measured.reference
                           ? OrderedJson{{"name", "original"}, {"fingerprint", measured.reference_fingerprint}}
                           : OrderedJson(nullptr);
    own["bos"] = true;
    own["world_size"] = 2;
    own["record"] = record("evaluate", "--model " + model_folder, 20.0);
    own["tokens_per_second"] = 2500.0;
    json["headfold"] = own;
    const std::string file = fmt::format("{}/results_{}.json", folder,
                                         time.empty() ? fmt::format("2026-09-21T10-{:02d}-00", clock_ % 60) : time);
    write_json(folder_ / file, json);
    return file;
  }

  /// Two base models, three folds of the first at two sizes, one of the second; everything present.
  void complete() {
    calibration("llama/calibration.h5", "prose-llama", "aaaa");
    results("llama/eval/prose-llama", "/secret/models/prose-llama", "aaaa",
            {30.0, nullptr, nullptr, false, 8, "gqa", "7e87", ""});
    const struct {
      const char *name, *keys, *metric, *layout;
      int heads;
      double perplexity;
    } folds[] = {{"meanpool-4", "meanpool", "weights", "gqa", 4, 79.5},
                 {"meanpool-2", "meanpool", "weights", "gqa", 2, 198.0},
                 {"post-rotation-4", "post-rotation", "act", "projected", 4, 31.02},
                 {"post-rotation-2", "post-rotation", "act", "projected", 2, 34.8},
                 {"rope-commuting-4", "rope-commuting", "act+query", "gqa", 4, 32.97},
                 {"rope-commuting-2", "rope-commuting", "act+query", "gqa", 2, 39.9}};
    for (const auto& fold : folds) {
      const std::string path = std::string("llama/") + fold.name;
      conversion(path, "prose-llama", "aaaa",
                 {fold.keys, fold.metric, fold.layout, std::string(fold.layout) == "gqa", fold.heads, 6});
      results("llama/eval/" + std::string(fold.name), (folder_ / path).string(), "cc",
              {fold.perplexity, 0.0951, 0.873, true, fold.heads, fold.layout, "7e87", "aaaa"});
    }
    calibration("bloom/calibration.h5", "prose-bloom", "bbbb");
    results("bloom/eval/prose-bloom", "/secret/models/prose-bloom", "bbbb",
            {40.0, nullptr, nullptr, false, 8, "gqa", "b100", ""});
    // The same folder name as one of the other model's conversions.
    conversion("bloom/meanpool-4", "prose-bloom", "bbbb", {"norope", "act", "gqa", true, 4, 6});
    results("bloom/eval/meanpool-4", (folder_ / "bloom/meanpool-4").string(), "dd",
            {41.0, 0.02, 0.95, true, 4, "gqa", "b100", "bbbb"});
  }

 private:
  fs::path folder_;
  int clock_ = 0;
};

inline Page page_of(const RunFolder& run) {
  return make_page(read_run(run.folder()), "A report");
}

/// Text between tags of one table row of the page.
inline std::string row_with(const std::string& html, const std::string& table, const std::string& model) {
  const std::size_t at = html.find("aria-label=\"" + table);
  if (at == std::string::npos) return {};
  const std::string body = html.substr(at, html.find("</table>", at) - at);
  for (std::size_t row = body.find("<tr"); row != std::string::npos; row = body.find("<tr", row + 1)) {
    const std::string line = body.substr(row, body.find("</tr>", row) - row);
    if (line.find(">" + model + "<") != std::string::npos || line.find("</svg>" + model + "<") != std::string::npos)
      return std::regex_replace(line, std::regex("<[^>]*>"), "|");
  }
  return {};
}

/// RFC 4180.
inline std::vector<std::vector<std::string>> parse_csv(const std::string& text) {
  std::vector<std::vector<std::string>> rows;
  std::vector<std::string> row;
  std::string cell;
  bool quoted = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (quoted) {
      if (c == '"' && i + 1 < text.size() && text[i + 1] == '"') {
        cell += '"';
        ++i;
      } else if (c == '"') {
        quoted = false;
      } else {
        cell += c;
      }
    } else if (c == '"') {
      quoted = true;
    } else if (c == ',' || c == '\n') {
      row.push_back(cell);
      cell.clear();
      if (c == '\n') {
        rows.push_back(row);
        row.clear();
      }
    } else {
      cell += c;
    }
  }
  return rows;
}

/// What must hold for any page.
inline void expect_sound(const Page& page, const RunFolder& run) {
  for (const std::string& svg : svgs_of(page.html)) EXPECT_EQ(xml_error(svg), std::nullopt) << svg.substr(0, 2000);
  for (const std::string* text : {&page.html, &page.markdown, &page.quality_csv, &page.layers_csv, &page.timing_csv,
                                  &page.refit_csv, &page.compare_csv, &page.benchmarks_csv}) {
    EXPECT_FALSE(std::regex_search(*text, std::regex("\\b(nan|inf|NaN|Infinity|null)\\b")));
    EXPECT_THAT(*text, Not(HasSubstr("<script")));
    EXPECT_THAT(*text, Not(HasSubstr(run.folder().string())));
    EXPECT_THAT(*text, Not(HasSubstr("/secret")));
    EXPECT_THAT(*text, Not(HasSubstr("/tmp")));
  }
  // Nothing is loaded from elsewhere, and nothing runs.
  EXPECT_FALSE(std::regex_search(page.html, std::regex("(src|href)=\"(?!#)|url\\(|@import|\\son[a-z]+=")));
  // Tags nest: void elements closed, doctype cut off, the page is XML but for those.
  std::string body = page.html.substr(page.html.find("<body>"));
  body = body.substr(0, body.find("</html>"));
  EXPECT_EQ(xml_error(body), std::nullopt);
  // Ids are unique and every reference has one.
  std::set<std::string> ids;
  const std::regex id_pattern("\\sid=\"([^\"]*)\"");
  for (std::sregex_iterator it(page.html.begin(), page.html.end(), id_pattern), end; it != end; ++it)
    EXPECT_TRUE(ids.insert((*it)[1]).second) << (*it)[1];
  const std::regex link_pattern("href=\"#([^\"]*)\"");
  for (std::sregex_iterator it(page.html.begin(), page.html.end(), link_pattern), end; it != end; ++it)
    EXPECT_EQ(ids.count((*it)[1]), 1U) << (*it)[1];
}

}  // namespace headfold::report::testing_support
