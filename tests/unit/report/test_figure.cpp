#include <headfold/base/error.h>
#include <headfold/report/figure.h>
#include <headfold/report/text.h>

#include <cmath>
#include <limits>
#include <random>

#include "markup.h"
#include "world.h"

namespace headfold::report {
namespace {

using testing_support::xml_error;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

TEST(CheckerTest, sees_what_is_no_xml) {
  EXPECT_EQ(xml_error("<a b=\"c\"><d/>x &amp; y</a>\n"), std::nullopt);
  for (const char* bad : {"", "text", "<a>", "<a></b>", "<a b=c></a>", "<a b=\"1\" b=\"2\"/>", "<a>&</a>",
                          "<a>x < y</a>", "<a/><b/>", "<a b=\"<\"/>", "<a>&nbsp;</a>", "<a x=\"1\"y=\"2\"/>"})
    EXPECT_NE(xml_error(bad), std::nullopt) << bad;
}

TEST(TicksTest, known_ranges) {
  EXPECT_EQ(nice_ticks(0, 10, 6), (std::vector<double>{0, 2, 4, 6, 8, 10}));
  EXPECT_EQ(nice_ticks(0, 1, 3), (std::vector<double>{0, 0.5, 1}));
  EXPECT_EQ(nice_ticks(-3, 3, 4), (std::vector<double>{-2, 0, 2}));
  EXPECT_EQ(log_ticks(1, 1000, 6), (std::vector<double>{1, 10, 100, 1000}));
  EXPECT_EQ(log_ticks(0.9, 11, 7), (std::vector<double>{1, 2, 3, 5, 7, 10}));
}

TEST(TicksTest, any_range_gives_even_round_ticks_inside_it) {
  std::mt19937_64 random(7);
  std::uniform_real_distribution<double> exponent(-12, 12), mantissa(-1, 1);
  std::uniform_int_distribution<int> wanted(2, 9);
  for (int trial = 0; trial < 3000; ++trial) {
    const double low = mantissa(random) * std::pow(10.0, exponent(random));
    const double high =
        low + (std::abs(mantissa(random)) + 0.01) * std::max(std::abs(low) * 1e-3, std::pow(10.0, exponent(random)));
    const int most = wanted(random);
    const auto ticks = nice_ticks(low, high, most);
    ASSERT_LE(ticks.size(), static_cast<std::size_t>(most)) << low << " " << high;
    for (std::size_t i = 0; i < ticks.size(); ++i) {
      const double slack = (high - low) * 1e-6;
      ASSERT_GE(ticks[i], low - slack);
      ASSERT_LE(ticks[i], high + slack);
      if (i > 1) {
        ASSERT_NEAR(ticks[i] - ticks[i - 1], ticks[1] - ticks[0], (high - low) * 1e-6);
      }
    }
    if (ticks.size() > 1) {
      const double step = ticks[1] - ticks[0], unit = step / std::pow(10.0, std::floor(std::log10(step) + 1e-9));
      ASSERT_TRUE(std::abs(unit - 1) < 1e-3 || std::abs(unit - 2) < 1e-3 || std::abs(unit - 5) < 1e-3) << step;
    }
    if (most >= 5) {
      ASSERT_GE(ticks.size(), 2U) << low << " " << high;
    }
  }
}

TEST(TicksTest, logarithmic_ticks_stay_inside_and_few) {
  std::mt19937_64 random(8);
  std::uniform_real_distribution<double> exponent(-30, 30), span(0.05, 40);
  for (int trial = 0; trial < 2000; ++trial) {
    const double low = std::pow(10.0, exponent(random)), high = low * std::pow(10.0, span(random));
    const auto ticks = log_ticks(low, high, 6);
    ASSERT_FALSE(ticks.empty()) << low << " " << high;
    ASSERT_LE(ticks.size(), 6U) << low << " " << high;
    for (const double tick : ticks) {
      ASSERT_GE(tick, low * (1 - 1e-6));
      ASSERT_LE(tick, high * (1 + 1e-6));
    }
  }
}

TEST(TicksTest, impossible_ranges_are_internal_errors) {
  EXPECT_THROW(nice_ticks(1, 1, 5), InternalError);
  EXPECT_THROW(nice_ticks(0, kInfinity, 5), InternalError);
  EXPECT_THROW(nice_ticks(kNan, 1, 5), InternalError);
  EXPECT_THROW(log_ticks(0, 1, 5), InternalError);
  EXPECT_THROW(log_ticks(-1, 1, 5), InternalError);
}

TEST(AxisTest, covers_its_values_and_maps_them) {
  const Axis linear = make_axis({1, 3.4, kNan}, "x", "%", false, true);
  EXPECT_EQ(linear.low, 0);
  EXPECT_GE(linear.high, 3.4);
  EXPECT_DOUBLE_EQ(linear.at(linear.low), 0);
  EXPECT_DOUBLE_EQ(linear.at(linear.high), 1);
  const Axis log = make_axis({1, 100}, "x", "×", true, false);
  ASSERT_TRUE(log.log);
  EXPECT_NEAR(log.at(10), 0.5, 1e-12);
  // No logarithm of zero: the axis falls back.
  EXPECT_FALSE(make_axis({0, 100}, "x", "", true, false).log);
  Axis reversed = linear;
  reversed.reversed = true;
  EXPECT_DOUBLE_EQ(reversed.at(1), 1 - linear.at(1));
  for (const auto& values :
       {std::vector<double>{}, {0.0}, {5.0}, {-2.0, -2.0}, {kNan, kInfinity}, {1e-12, 1.1e-12}, {1e15, 1e15 + 2}}) {
    const Axis axis = make_axis(values, "", "", false, false);
    EXPECT_LT(axis.low, axis.high);
    EXPECT_TRUE(std::isfinite(axis.low) && std::isfinite(axis.high));
    EXPECT_FALSE(axis.ticks.empty());
  }
}

TEST(SvgTest, every_figure_is_well_formed_whatever_its_texts_and_numbers) {
  const std::string hostile = "</title><script>alert(\"1\")</script>&'\x01\xff";
  Chart chart;
  chart.id = "a\"b";
  chart.title = chart.description = chart.heading = hostile;
  chart.x = make_axis({0, 100}, hostile, hostile, false, true);
  chart.y = make_axis({1, 30}, hostile, hostile, true, false);
  for (int s = 0; s < 8; ++s) {
    Series series;
    series.name = series.label = hostile;
    series.colour = s - 1;
    series.dashed = s % 2 == 0;
    series.marker = s % 3 == 0 ? Marker::hollow : Marker::filled;
    series.points = {{10, 2, hostile}, {kNan, 3, {}}, {50, kInfinity, {}}, {1e300, -5, {}}};
    chart.series.push_back(series);
  }
  chart.rules = {{50, hostile}};
  chart.stems = {{{1, 2, {}}, {1, 3, {}}}};
  chart.shade_labels = {hostile, hostile};
  const std::string bars =
      bar_chart("b", hostile, hostile,
                {{hostile, std::string(500, '<') + "é", hostile, 3, 0}, {"z", "", "0", 0, -1}, {"n", "", "", kNan, 1}});
  HeatMap map;
  map.id = "h";
  map.title = map.x_title = map.y_title = map.heading = map.description = hostile;
  map.row_labels = {hostile, "1"};
  map.shades = {{0, 0, 3, -1, 7}, {}};
  map.x_ticks = {{0.5, hostile}, {7, "out"}};
  map.key = {hostile};
  map.rule = 0.5;
  for (const std::string& svg :
       {chart.svg(), bars, map.svg(), HeatMap{}.svg(), Chart{}.svg(), bar_chart("e", "", "", {})}) {
    EXPECT_EQ(xml_error(svg), std::nullopt) << svg;
    EXPECT_EQ(svg.find("<script"), std::string::npos);
    EXPECT_EQ(svg.find("nan"), std::string::npos);
    EXPECT_EQ(svg.find("inf"), std::string::npos);
    EXPECT_NE(svg.find("role=\"img\""), std::string::npos);
    EXPECT_NE(svg.find("<title"), std::string::npos);
  }
}

TEST(SvgTest, labels_at_line_ends_do_not_overlap) {
  Chart chart;
  chart.id = "l";
  chart.x = make_axis({0, 1}, "x", "", false, true);
  chart.y = make_axis({1, 10}, "y", "", false, true);
  for (int s = 0; s < 5; ++s) {
    Series series;
    series.label = fmt::format("label{}", s);
    series.colour = s;
    series.points = {{0, 1, {}}, {1, 5 + 0.01 * s, {}}};
    chart.series.push_back(series);
  }
  const std::string svg = chart.svg();
  std::vector<double> positions;
  for (int s = 0; s < 5; ++s) {
    const std::size_t end = svg.find(fmt::format(">label{}<", s));
    ASSERT_NE(end, std::string::npos);
    const std::size_t at = svg.rfind(" y=\"", end);
    positions.push_back(std::stod(svg.substr(at + 4)));
  }
  std::sort(positions.begin(), positions.end());
  for (std::size_t i = 1; i < positions.size(); ++i) EXPECT_GE(positions[i] - positions[i - 1], 14.9);
}

TEST(TextTest, escaping) {
  EXPECT_EQ(escape_markup("<a href=\"x\">&'"), "&lt;a href=&quot;x&quot;&gt;&amp;&#39;");
  EXPECT_EQ(escape_markup("ä\xc3\n\x01"), "ä\xEF\xBF\xBD \xEF\xBF\xBD");
  EXPECT_EQ(escape_markup("\xed\xa0\x80"), "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD") << "a surrogate is no character";
  EXPECT_EQ(escape_markdown("a|b*c_<"), "a\\|b\\*c\\_&lt;");
}

TEST(TextTest, numbers_have_sensible_digits) {
  EXPECT_EQ(format_perplexity(29.4835), "29.48");
  EXPECT_EQ(format_perplexity(12345.6), "12,346");
  EXPECT_EQ(format_significant(9.996, 3), "10.0");
  EXPECT_EQ(format_significant(0.00012345, 3), "0.000123");
  EXPECT_EQ(format_significant(1e30, 3), "1.00e+30");
  EXPECT_EQ(format_significant(0, 3), "0");
  EXPECT_EQ(format_significant(kNan, 3), kNotFinite);
  EXPECT_EQ(format_ratio(1.0994), "1.099");
  EXPECT_EQ(format_ratio(13.4213), "13.42");
  EXPECT_EQ(format_count(-1234567), "-1,234,567");
  EXPECT_EQ(format_share(0.5), "50\xC2\xA0%");
  EXPECT_EQ(format_share(0.375), "37.5\xC2\xA0%");
  EXPECT_EQ(format_change(1.0994), "+9.9\xC2\xA0%");
  EXPECT_EQ(format_change(0.99), "−1.0\xC2\xA0%");
  EXPECT_EQ(format_change(1.0004), "+0.04\xC2\xA0%");
  EXPECT_EQ(format_change(1.0), "±0\xC2\xA0%");
  EXPECT_EQ(format_date(1767225600), "2026-01-01 00:00 UTC");
  EXPECT_EQ(format_date(0), kNone);
  EXPECT_EQ(format_date(kNan), kNone);
  EXPECT_EQ(words_for_share(0.5), "half");
  EXPECT_EQ(words_for_share(0.4), "40\xC2\xA0%");
}

TEST(ChangeRowsTest, markers_lie_by_value_and_nothing_breaks_it) {
  ChangeRows figure;
  figure.id = "c";
  figure.title = "t<>&";
  EXPECT_EQ(xml_error(figure.svg()), std::nullopt) << "no rows";
  figure.rows = {{"a \"row\"", false, {{-20, 5, 0, true, "low"}, {10, 0, 7, false, "high"}}},
                 {std::string(200, 'w'), true, {{kNan, 1, 0, true, "none"}, {0, kInfinity, 1, true, "endless"}}},
                 {"empty", false, {}}};
  figure.key = {{"one", 0}, {std::string(120, 'k'), 1}, {"<two>", 2}};
  const std::string svg = figure.svg();
  EXPECT_EQ(xml_error(svg), std::nullopt) << svg;
  EXPECT_EQ(svg.find("nan"), std::string::npos);
  EXPECT_EQ(svg.find("inf"), std::string::npos);
  EXPECT_EQ(svg.find("<title>none</title>"), std::string::npos) << "a value that is no number has no marker";
  // A circle of radius r begins at its left edge; the square of the other colour at its upper left corner.
  const auto left_of = [&](const std::string& hint) {
    const std::size_t at = svg.rfind("d=\"M", svg.find("<title>" + hint)) + 4;
    return std::stod(svg.substr(at));
  };
  EXPECT_LT(left_of("low") + 100, left_of("high"));
  std::vector<ChangeRows::Row> many(60, figure.rows[0]);
  figure.rows = many;
  EXPECT_EQ(xml_error(figure.svg()), std::nullopt);
}

TEST(TextTest, machine_paths_disappear) {
  const std::vector<std::string> roots = {"/tmp/run"};
  EXPECT_EQ(
      hide_paths("headfold convert --model /home/me/llama/ --out=/tmp/run/a/b --x '/tmp/run/c d/e' rel/path", roots),
      "headfold convert --model …/llama --out=a/b --x 'c d/e' rel/path");
  EXPECT_EQ(hide_paths("/tmp/run", roots), ".");
  EXPECT_EQ(hide_paths("/tmp/runner/x", roots), "…/x");
  EXPECT_EQ(hide_paths("a/b 1/2 https://x.org/y", roots), "a/b 1/2 https:…/y");
  EXPECT_EQ(last_part("/a/b//"), "b");
  EXPECT_EQ(last_part("b"), "b");
  EXPECT_EQ(last_part("/"), "");
}

TEST(TextTest, spearman_is_about_order) {
  EXPECT_NEAR(*spearman({1, 2, 3, 4}, {10, 100, 1000, 10000}), 1, 1e-12);
  EXPECT_NEAR(*spearman({1, 2, 3, 4}, {4, 3, 2, 1}), -1, 1e-12);
  // Textbook value with ties: ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
  EXPECT_NEAR(*spearman({1, 2, 2, 3}, {1, 2, 3, 4}), 4.5 / std::sqrt(4.5 * 5.0), 1e-12);
  EXPECT_FALSE(spearman({1, 2}, {1, 2}));
  EXPECT_FALSE(spearman({1, 1, 1}, {1, 2, 3}));
}

}  // namespace
}  // namespace headfold::report
