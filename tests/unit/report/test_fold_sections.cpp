#include <headfold/base/error.h>
#include <headfold/report/figure.h>

#include "run_folder.h"

namespace headfold::report {
namespace {

using headfold::testing_support::ScratchFolder;
using testing::HasSubstr;
using testing::Not;
using testing_support::expect_sound;
using testing_support::page_of;
using testing_support::parse_csv;
using testing_support::row_with;
using testing_support::RunFolder;
using testing_support::svgs_of;

constexpr const char* kPercent = "\xC2\xA0%";

/// Changes the headfold.json of a conversion.
void edit(const RunFolder& run, const std::string& path, const std::function<void(Json&)>& change) {
  const fs::path file = run.folder() / path / "headfold.json";
  Json json = read_json(file);
  change(json);
  write_json(file, json);
}

void add_fold(RunFolder& run, const std::string& name, const Json& options, int kv_heads = 4,
              const std::string& keys = "rope-commuting") {
  run.conversion(name, "base", "aaaa", {keys, "act+query", "gqa", true, kv_heads, 6}, false);
  edit(run, name, [&](Json& json) {
    if (!options.is_null()) json["fold"].update(options);
  });
}

Json refit_part(const std::string& name, bool divergence, double before, double after, bool kept) {
  return {{"part", name},
          {"quantity", divergence ? "divergence" : "relative squared error"},
          {"error_before", before},
          {"error_after", after},
          {"held_out_before", before},
          {"held_out_after", after},
          {"kept", kept}};
}

void add_refit(Json& json, int layers) {
  json["fold"]["refit"] = true;
  json["refit"] = {{"sequences", 48}, {"tokens", 256}, {"layers", Json::array()}};
  for (int l = 0; l < layers; ++l)
    json["refit"]["layers"].push_back(
        {{"layer", l},
         {"stream_error", 0.01 * (l + 1)},
         {"parts",
          {refit_part("q_proj", true, 0.4, 0.2, true), refit_part("k_proj + q_proj", true, 0.2, 0.1, true),
           refit_part("k_proj + q_proj", true, 0.1, 0.15, l % 2 == 0),
           refit_part("o_proj", false, 0.08, 0.05, true)}}});
}

std::vector<std::string> folds_of(const RunFolder& run) {
  return read_run(run.folder()).sections.at(0).folds;
}

/// Text of the page from a heading to the next one of its level or above.
std::string part_of(const std::string& html, const std::string& heading) {
  const std::size_t at = html.find("<h3>" + heading + "</h3>");
  if (at == std::string::npos) return {};
  return html.substr(at, std::min(html.find("<h3>", at + 4), html.find("</section>", at)) - at);
}

TEST(FoldLabelTest, options_that_differ_tell_conversions_apart) {
  const ScratchFolder scratch;
  {
    RunFolder run(scratch / "refit");
    add_fold(run, "plain-4", {{"refit", false}, {"slow_band", 0}});
    add_fold(run, "refit-4", {{"refit", true}, {"slow_band", 0}});
    add_fold(run, "refit-2", {{"refit", true}, {"slow_band", 0}}, 2);
    EXPECT_EQ(folds_of(run), (std::vector<std::string>{"rope-commuting", "rope-commuting + refit"}));
  }
  {
    RunFolder run(scratch / "all");
    add_fold(run, "a", {});
    add_fold(run, "b", {{"slow_band", "auto"}, {"grouping", "search"}});
    add_fold(run, "c", {{"slow_band", 5}, {"budget", "dp"}, {"refit", true}});
    add_fold(run, "d", {{"polish", 3}, {"value_metric", "act+out"}, {"mean_weight", 0.5}});
    // Another key fold is told apart by its name alone.
    add_fold(run, "e", {{"latent_groups", 2}}, 4, "latent");
    EXPECT_EQ(folds_of(run), (std::vector<std::string>{"latent", "rope-commuting, values act",
                                                       "rope-commuting, values act + slow band 5 + dp budget + refit",
                                                       "rope-commuting, values act + slow band auto + searched groups",
                                                       "rope-commuting, values act+out, mean weight 0.5 + polish 3"}));
    const Page page = page_of(run);
    expect_sound(page, run);
    EXPECT_THAT(row_with(page.html, "Quality of the original", "c"),
                HasSubstr("|act+query; values svd (act); slow band 5; dp budget; refit|"));
    EXPECT_THAT(row_with(page.html, "Quality of the original", "a"), HasSubstr("|act+query; values svd (act)|"));
    const auto quality = parse_csv(page.quality_csv);
    ASSERT_EQ(quality[0][9], "options");
    ASSERT_EQ(quality[0][10], "refit");
    for (const auto& row : quality) {
      if (row[1] != "c") continue;
      EXPECT_EQ(row[9], "slow band 5; dp budget; refit");
      EXPECT_EQ(row[10], "true");
    }
  }
  {
    // Values that are none of ours stay text and disturb nothing.
    RunFolder run(scratch / "hostile");
    add_fold(run, "a", {});
    add_fold(run, "b", {{"slow_band", "<i>&"}, {"grouping", Json::array()}, {"budget", nullptr}, {"polish", "x|y"}});
    const Page page = page_of(run);
    expect_sound(page, run);
    EXPECT_EQ(folds_of(run),
              (std::vector<std::string>{"rope-commuting", "rope-commuting + slow band <i>& + polish x|y"}));
  }
}

TEST(FrequencyTest, maps_of_layers_by_frequencies) {
  const ScratchFolder scratch;
  RunFolder run(scratch / "run");
  const auto shares = [](Json& json) {
    for (std::size_t l = 0; l < json["layers"].size(); ++l) {
      std::vector<double> leading, imaginary;
      for (int f = 0; f < 16; ++f) {
        leading.push_back(f < 8 ? 0.95 : 0.45);
        imaginary.push_back(f < 8 ? 0.02 : 0.55);
      }
      json["layers"][l]["leading_share"] = leading;
      json["layers"][l]["imaginary_share"] = imaginary;
    }
  };
  add_fold(run, "a-4", {});
  EXPECT_EQ(part_of(page_of(run).html, "RoPE frequencies"), "") << "nothing recorded, nothing shown";
  edit(run, "a-4", shares);
  add_fold(run, "b-4", {{"refit", true}});
  edit(run, "b-4", shares);
  const Page page = page_of(run);
  expect_sound(page, run);
  const std::string part = part_of(page.html, "RoPE frequencies");
  const auto maps = svgs_of(part);
  ASSERT_EQ(maps.size(), 2U) << "conversions with the same shares have one figure";
  EXPECT_THAT(part, HasSubstr("<strong>a-4, b-4.</strong>"));
  EXPECT_THAT(page.markdown, HasSubstr("leading share"));
  // Six rows of two runs of one shade each, and the eight boxes of the key.
  const auto boxes = [](const std::string& svg, int shade) {
    const std::string css = fmt::format("class=\"box q{}\"", shade);
    int count = 0;
    for (std::size_t at = svg.find(css); at != std::string::npos; at = svg.find(css, at + 1)) ++count;
    return count;
  };
  EXPECT_EQ(boxes(maps[0], 7), 6 + 1);
  EXPECT_EQ(boxes(maps[0], 2), 6 + 1);
  EXPECT_EQ(boxes(maps[0], 3), 1);
  EXPECT_EQ(boxes(maps[1], 0), 6 + 1);
  EXPECT_EQ(boxes(maps[1], 6), 6 + 1);
  EXPECT_THAT(maps[0], HasSubstr("6 layers, 16 frequencies; from 45"));
  const auto layers = parse_csv(page.layers_csv);
  const auto column = std::find(layers[0].begin(), layers[0].end(), "leading_share") - layers[0].begin();
  EXPECT_EQ(layers[1][static_cast<std::size_t>(column)].substr(0, 9), "0.95 0.95");
  // A share that is no number leaves that layer white; lists of other lengths and values out of range do no harm.
  edit(run, "a-4", [](Json& json) {
    json["layers"][0]["leading_share"] = {0.5, nullptr};
    json["layers"][1]["leading_share"] = {-3, 1e300, 0.5};
    json["layers"][2]["imaginary_share"] = Json::array();
  });
  expect_sound(page_of(run), run);
}

TEST(HeldOutTest, says_whether_more_tokens_would_matter) {
  const ScratchFolder scratch;
  RunFolder run(scratch / "run");
  add_fold(run, "a-4", {});
  add_fold(run, "m-4", {{"values", "meanpool"}}, 4, "meanpool");
  const auto set = [&](const std::string& name, double keys, double values) {
    edit(run, name, [&](Json& json) {
      for (std::size_t l = 0; l < json["layers"].size(); ++l) {
        json["layers"][l]["key_fitted"] = 0.1;
        json["layers"][l]["key_held_out"] = l == 3 ? keys : 0.1;
        json["layers"][l]["value_fitted"] = 0.2;
        json["layers"][l]["value_held_out"] = l == 5 ? values : 0.2;
      }
    });
  };
  EXPECT_EQ(part_of(page_of(run).html, "Held-out against fitted loss"), "");
  set("a-4", 0.105, 0.214);
  set("m-4", 0.9, 0.9);  // an average is fitted to nothing, so its halves say nothing
  Page page = page_of(run);
  expect_sound(page, run);
  std::string part = part_of(page.html, "Held-out against fitted loss");
  EXPECT_THAT(part, HasSubstr("More calibration tokens would hardly matter:"));
  EXPECT_THAT(part, HasSubstr(fmt::format("+7.0{} (values of layer 5 of a-4)", kPercent)));
  EXPECT_EQ(svgs_of(part).size(), 3U) << "two panels and the marker before a name";
  const std::string row = row_with(page.html, "Held-out loss of every conversion of base", "a-4");
  for (const std::string& cell :
       {fmt::format("|10.0{}|", kPercent), fmt::format("|+5.0{}|", kPercent), std::string("|layer 3|"),
        fmt::format("|20.2{}|", kPercent), std::string("|layer 5|")})
    EXPECT_THAT(row, HasSubstr(cell));
  EXPECT_EQ(row_with(page.html, "Held-out loss of every conversion of base", "m-4"), "");
  EXPECT_THAT(page.html, HasSubstr("Keys held out"));
  EXPECT_THAT(page.markdown, HasSubstr("**More calibration tokens would hardly matter:**"));

  set("a-4", 0.15, 0.214);
  page = page_of(run);
  part = part_of(page.html, "Held-out against fitted loss");
  EXPECT_THAT(part, HasSubstr("<strong>More calibration tokens would matter:</strong>"));
  EXPECT_THAT(part, HasSubstr(fmt::format("+50.0{} (keys of layer 3 of a-4)", kPercent)));
  const auto layers = parse_csv(page.layers_csv);
  const auto column = [&](const std::string& name) {
    return static_cast<std::size_t>(std::find(layers[0].begin(), layers[0].end(), name) - layers[0].begin());
  };
  EXPECT_EQ(layers[4][column("key_loss_held_out_half")], "0.15");
  EXPECT_EQ(layers[4][column("value_loss_fitted_half")], "0.2");

  // Unknown (negative), null and rounding noise are no losses.
  edit(run, "a-4", [](Json& json) {
    for (std::size_t l = 0; l < json["layers"].size(); ++l) {
      json["layers"][l]["key_held_out"] = l % 2 == 0 ? Json(-1) : Json(nullptr);
      json["layers"][l]["value_fitted"] = 0.0;
      json["layers"][l]["value_held_out"] = 1e-12;
    }
  });
  page = page_of(run);
  expect_sound(page, run);
  EXPECT_THAT(page.html, HasSubstr("nothing is lost on the other half"));
}

TEST(RefitTest, a_line_per_layer_and_a_column_per_fit) {
  const ScratchFolder scratch;
  RunFolder run(scratch / "run");
  add_fold(run, "a-4", {});
  EXPECT_EQ(part_of(page_of(run).html, "Refit"), "");
  add_fold(run, "r-4", {});
  edit(run, "r-4", [](Json& json) { add_refit(json, 6); });
  Page page = page_of(run);
  expect_sound(page, run);
  const std::string part = part_of(page.html, "Refit");
  ASSERT_EQ(svgs_of(part).size(), 1U + 1U) << "the figure, and the marker before the name";
  const std::string summary = row_with(page.html, "Refit of the conversions of base", "r-4");
  // Of 24 fits three are not kept: attention rows end at 0.1 nats in all layers.
  for (const std::string& cell : {std::string("|48 × 256|"), std::string("|21 of 24|"), std::string("|0.400 → 0.125|"),
                                  fmt::format("|8.00{0} → 5.00{0}|", kPercent), fmt::format("|6.00{}|", kPercent)})
    EXPECT_THAT(summary, HasSubstr(cell));
  const std::string third = row_with(page.html, "Refit of every layer of r-4", "1");
  EXPECT_THAT(third, HasSubstr("|0.100 → 0.150|not kept|"));
  EXPECT_THAT(third, HasSubstr("|0.400 → 0.200|kept|"));
  EXPECT_THAT(part, HasSubstr("k_proj + q_proj (2)"));
  EXPECT_THAT(page.markdown, HasSubstr("Refit of every layer of r-4"));
  const auto csv = parse_csv(page.refit_csv);
  ASSERT_EQ(csv.size(), 1U + 24U);
  EXPECT_EQ(csv[4], (std::vector<std::string>{"base", "r-4", "0", "4", "o_proj", "relative squared error", "0.08",
                                              "0.05", "0.08", "0.05", "true", "0.01"}));
  EXPECT_EQ(csv[7][10], "false");
  // The best conversion is named with its refit.
  run.results("e/base", "/secret/models/base", "aaaa", {30.0, nullptr, nullptr, false, 8, "gqa", "1", ""});
  run.results("e/r", "r-4", "c1", {31.0, 0.01, 0.9, true, 4, "gqa", "1", "aaaa"});
  EXPECT_THAT(headline(read_run(run.folder()).sections[0]), HasSubstr("(rope-commuting + refit)"));

  edit(run, "r-4", [](Json& json) {
    json["refit"]["layers"][0]["stream_error"] = nullptr;
    json["refit"]["layers"][1]["parts"][0] = {{"part", "<b>|x"}, {"held_out_before", "NaN"}, {"kept", 1}};
    json["refit"]["layers"][2]["parts"] = Json::array();
    json["refit"]["sequences"] = -5;
    json["refit"]["layers"].erase(5);
  });
  page = page_of(run);
  expect_sound(page, run);
  EXPECT_THAT(row_with(page.html, "Refit of every layer of r-4", "1"), HasSubstr("|– → –|"));
  edit(run, "r-4", [](Json& json) { json["refit"]["layers"] = Json::array(); });
  expect_sound(page_of(run), run);
  edit(run, "r-4", [](Json& json) { json["refit"] = nullptr; });
  EXPECT_EQ(part_of(page_of(run).html, "Refit"), "");
}

TEST(BudgetTest, layers_that_differ_are_drawn_and_evaluated_ones_are_found) {
  const ScratchFolder scratch;
  RunFolder run(scratch / "run");
  add_fold(run, "even-4", {});
  edit(run, "even-4", [](Json& json) {
    for (auto& layer : json["layers"]) layer.update({{"kv_heads", 4}, {"key_width", 32}, {"value_width", 32}});
  });
  EXPECT_EQ(part_of(page_of(run).html, "What each layer keeps"), "");
  const int heads[] = {8, 4, 4, 4, 2, 2};
  add_fold(run, "dp-4", {{"budget", "dp"}});
  edit(run, "dp-4", [&](Json& json) {
    for (std::size_t l = 0; l < 6; ++l)
      json["layers"][l].update({{"kv_heads", heads[l]}, {"key_width", 32}, {"value_width", 32}});
    json["kv_heads"]["per_layer"] = heads;
    json["decisions"]["budget"] = {{"method", "dp"}, {"predicted_kl", 0.05}, {"predicted_kl_uniform", 0.0713}};
    for (std::size_t l = 0; l < 6; ++l)
      json["decisions"]["budget"]["layers"].push_back({{"layer", l},
                                                       {"kv_heads", heads[l]},
                                                       {"kl_per_key_loss", 0.5 + 0.1 * static_cast<double>(l)},
                                                       {"kl_per_value_loss", 0.25}});
  });
  run.results("e/base", "/secret/models/base", "aaaa", {30.0, nullptr, nullptr, false, 8, "gqa", "1", ""});
  // An evaluation of such a model names its largest number of KV heads.
  run.results("e/dp", "dp-4", "c1", {31.0, 0.01, 0.9, true, 8, "gqa", "1", "aaaa"});
  const RunData data = read_run(run.folder());
  for (const ModelRow& row : data.sections[0].models) {
    if (row.name != "dp-4") continue;
    EXPECT_TRUE(row.conversion->uneven());
    EXPECT_EQ(row.conversion->kv_heads_range(), (std::pair<std::int64_t, std::int64_t>{2, 8}));
    ASSERT_TRUE(row.ratio);
  }
  Page page = make_page(data, "A report");
  expect_sound(page, run);
  const std::string part = part_of(page.html, "What each layer keeps");
  ASSERT_EQ(svgs_of(part).size(), 2U);
  EXPECT_THAT(part,
              HasSubstr("Predicted KL 0.0500 nats per token, 0.0713 with the same number of KV heads everywhere."));
  EXPECT_THAT(row_with(page.html, "What every layer of dp-4 keeps", "5"), HasSubstr("|2|"));
  EXPECT_THAT(row_with(page.html, "What every layer of dp-4 keeps", "5"), HasSubstr("|1.00|"));
  EXPECT_THAT(row_with(page.html, "Quality of the original", "dp-4"), HasSubstr("|2 to 8 by layer|"));
  EXPECT_THAT(page.html, HasSubstr("Keys, 2 to 8 KV heads"));
  const auto layers = parse_csv(page.layers_csv);
  for (const auto& row : layers) {
    ASSERT_EQ(row.size(), layers[0].size());
    if (row[1] != "dp-4" || row[3] != "0") continue;
    EXPECT_EQ(row[13], "8");
    EXPECT_EQ(row[22], "0.5");
    EXPECT_EQ(row[23], "0.25");
  }
  // Widths instead of heads: keys and values get a step line each.
  add_fold(run, "latent-4", {{"budget", "lorc-progressive"}, {"latent_groups", 1}}, 4, "latent");
  edit(run, "latent-4", [&](Json& json) {
    for (std::size_t l = 0; l < 6; ++l)
      json["layers"][l].update({{"kv_heads", 1}, {"key_width", 160 - 16 * l}, {"value_width", 160 - 8 * l}});
  });
  page = page_of(run);
  expect_sound(page, run);
  EXPECT_THAT(page.html, HasSubstr("Channels cached by layer, latent-4"));
  // Decisions are for people: whatever form they have, the report is made.
  const Json odd[] = {3,
                      Json::array({1}),
                      {{"budget", {{"layers", {3, {{"layer", -1}, {"kl_per_key_loss", 1}}}}}}},
                      {{"budget", {{"layers", {{{"layer", 1e17}, {"kl_per_key_loss", 1}}}}}}},
                      {{"grouping", {{{"gain", "x"}, {"layers", 3}}}}}};
  for (const Json& decisions : odd) {
    edit(run, "dp-4", [&](Json& json) { json["decisions"] = decisions; });
    expect_sound(page_of(run), run);
  }
  edit(run, "dp-4", [&](Json& json) {
    json["layers"][0]["kv_heads"] = -4;
    json["layers"][1]["kv_heads"] = 1e300;
    json["layers"][2]["kv_heads"] = "8";
  });
  expect_sound(page_of(run), run);
}

TEST(CompareTest, plans_are_ranked_by_kl) {
  const ScratchFolder scratch;
  RunFolder run(scratch / "run");
  Json json = Json::parse(run.record("convert", "--compare a,b --model /secret/models/base --out x", 12).dump());
  json["format"] = "headfold-comparison";
  json["format_version"] = 1;
  json["model"] = {{"folder", "/secret/models/base"}, {"fingerprint", "aaaa"}};
  json["text"] = {{"windows", 8}, {"tokens", 256}};
  json["original_perplexity"] = 30.0;
  json["original_cache_bytes_per_token"] = 6144;
  const auto plan = [](const std::string& name, const Json& kl, const Json& perplexity) {
    return Json{{"name", name},
                {"fold",
                 {{"keys", "rope-commuting"},
                  {"key_metric", "act"},
                  {"values", "svd"},
                  {"value_metric", "act"},
                  {"refit", name == "good"}}},
                {"kv_heads", 4},
                {"stock", true},
                {"cache_bytes_per_token", 3072},
                {"predicted_key_loss", 0.12},
                {"predicted_value_loss", 0.034},
                {"kl", kl},
                {"perplexity", perplexity},
                {"top1_agreement", 0.9},
                {"seconds", 1.5}};
  };
  json["plans"] = {plan("bad", 0.3, 40.0),
                   plan("good", 0.02, 31.5),
                   plan("none", nullptr, nullptr),
                   {{"name", "<b>failed"}, {"fold", {{"keys", "latent"}}}, {"error", "no /secret/file"}}};
  json["plans"][0]["kv_heads_per_layer"] = {8, 2};
  write_json(run.folder() / "tried/compare.json", json);
  // A comparison alone is a run.
  Page page = page_of(run);
  expect_sound(page, run);
  const std::string table = "Plans compared in tried/compare.json";
  EXPECT_THAT(row_with(page.html, table, "1"), HasSubstr("|good|rope-commuting (act); values svd (act); refit|"));
  for (const std::string& cell :
       {fmt::format("|50{}|", kPercent), fmt::format("|12.0{}|", kPercent), std::string("|0.0200|"),
        std::string("|31.50|"), std::string("|1.050|"), fmt::format("|90.0{}|", kPercent), std::string("|stock|")})
    EXPECT_THAT(row_with(page.html, table, "1"), HasSubstr(cell));
  EXPECT_THAT(row_with(page.html, table, "2"), HasSubstr("|bad|"));
  EXPECT_THAT(row_with(page.html, table, "2"), HasSubstr("|2 to 8|"));
  EXPECT_EQ(row_with(page.html, table, "3"), "") << "what was not measured has no place";
  EXPECT_THAT(page.html, HasSubstr("failed: no …/file"));
  EXPECT_THAT(page.html, HasSubstr("8 windows of 256 tokens; the original&#39;s perplexity on them is 30.00"));
  EXPECT_THAT(page.html, HasSubstr("headfold convert --compare a,b --model …/base --out x"));
  const auto csv = parse_csv(page.compare_csv);
  ASSERT_EQ(csv.size(), 5U);
  EXPECT_EQ(csv[1][2], "1");
  EXPECT_EQ(csv[1][3], "good");
  EXPECT_EQ(csv[1][9], "0.02");
  EXPECT_EQ(csv[4][14], "no …/file");
  // It joins the section of its model.
  run.results("e/base", "/secret/models/base", "aaaa", {30.0, nullptr, nullptr, false, 8, "gqa", "1", ""});
  add_fold(run, "a-4", {});
  const RunData data = read_run(run.folder());
  ASSERT_EQ(data.sections.size(), 1U);
  EXPECT_EQ(data.sections[0].comparisons.size(), 1U);
  EXPECT_EQ(data.sections[0].models.size(), 2U);
}

TEST(ChartTest, long_labels_are_broken_and_stay_apart) {
  Chart chart;
  chart.id = "l";
  chart.width = 440;
  chart.x = make_axis({0, 1}, "x", "", false, true);
  chart.y = make_axis({1, 10}, "y", "", false, true);
  for (int s = 0; s < 4; ++s) {
    Series series;
    series.label = fmt::format("rope-commuting {} + slow band 5 + refit", s);
    series.points = {{0, 1, {}}, {1, 5 + 0.01 * s, {}}};
    chart.series.push_back(series);
  }
  const std::string svg = chart.svg();
  EXPECT_EQ(headfold::testing_support::xml_error(svg), std::nullopt);
  // Every line of every label, in the order of the file.
  std::vector<double> lines;
  for (std::size_t at = svg.find("class=\"lab "); at != std::string::npos; at = svg.find("class=\"lab ", at + 1)) {
    lines.push_back(std::stod(svg.substr(svg.find(" y=\"", at) + 4)));
    const std::size_t text = svg.find('>', at) + 1;
    EXPECT_LE(svg.find('<', text) - text, 20U) << svg.substr(text, 40);
  }
  ASSERT_EQ(lines.size(), 4U * 3U);
  std::sort(lines.begin(), lines.end());
  for (std::size_t i = 1; i < lines.size(); ++i) EXPECT_GE(lines[i] - lines[i - 1], 12.9);
  EXPECT_GE(lines.front(), 12);
  EXPECT_LE(lines.back(), chart.height);
}

}  // namespace
}  // namespace headfold::report
