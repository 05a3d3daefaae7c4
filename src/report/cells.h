#pragma once
// Small texts that the parts of a page share. Private to src/report.

#include <fmt/format.h>
#include <headfold/base/log.h>
#include <headfold/report/document.h>
#include <headfold/report/figure.h>
#include <headfold/report/run_data.h>
#include <headfold/report/text.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

namespace headfold::report {

inline constexpr const char* kNbsp = "\xC2\xA0";

using Maybe = std::optional<double>;

template <class F>
std::string shown(const std::optional<double>& value, F format) {
  return value ? format(*value) : std::string(kNone);
}
template <class F>
std::string shown(const std::optional<Maybe>& value, F format) {
  if (!value) return kNone;
  return *value ? format(**value) : std::string(kNotFinite);
}
inline std::string count(const std::optional<std::int64_t>& value) {
  return value ? format_count(*value) : std::string(kNone);
}
inline std::string loss_percent(double loss) {
  return format_significant(loss * 100, 3) + kNbsp + "%";
}
inline std::string seconds_text(const Maybe& value) {
  return value && *value >= 0 ? human_seconds(*value) : std::string(kNone);
}
inline std::string bytes_text(std::int64_t bytes) {
  return human_bytes(static_cast<double>(bytes));
}
/// A number for a CSV cell: enough digits to read it back exactly; empty when there is none.
inline std::string raw(const Maybe& value) {
  return value && std::isfinite(*value) ? fmt::format("{}", *value) : std::string();
}
inline std::string raw(const std::optional<Maybe>& value) {
  return value ? raw(*value) : std::string();
}
inline std::string raw(const std::optional<std::int64_t>& value) {
  return value ? fmt::format("{}", *value) : std::string();
}
/// A list in one CSV cell, separated by spaces.
inline std::string raw(const std::vector<double>& values) {
  std::string text;
  for (const double value : values) text += (text.empty() ? "" : " ") + fmt::format("{:.6g}", value);
  return text;
}

inline std::string with_metric(const std::string& fold, const std::string& metric) {
  // An average is the same by any metric.
  return metric.empty() || fold == "meanpool" ? fold : fmt::format("{} ({})", fold, metric);
}

inline std::string joined(const std::vector<std::string>& parts, const std::string& separator) {
  std::string text;
  for (const std::string& part : parts) text += (text.empty() ? "" : separator) + part;
  return text;
}

inline Maybe mean(const std::vector<double>& values) {
  if (values.empty()) return std::nullopt;
  double sum = 0;
  for (const double value : values) sum += value;
  return sum / static_cast<double>(values.size());
}

inline Cell name_cell(const ModelRow& row) {
  Cell cell;
  cell.text = row.name;
  cell.key = row.original ? -1 : row.series;
  if (row.original) cell.small = "original";
  return cell;
}

/// "4", or "2 to 8" where layers differ.
inline std::string heads_text(const Conversion& conversion) {
  const auto [least, most] = conversion.kv_heads_range();
  return least == most ? fmt::format("{}", conversion.kv_heads_after) : fmt::format("{} to {}", least, most);
}

/// The horizontal axis of a figure over layers `first` … `last`.
inline Axis layer_axis(double first, double last, int most_ticks) {
  Axis axis;
  axis.low = first - 0.5;
  axis.high = last + 0.5;
  axis.title = "layer";
  const double step = std::max(1.0, std::ceil((last - first + 1) / most_ticks));
  for (double layer = first; layer <= last; layer += step) axis.ticks.emplace_back(layer, fmt::format("{:.0f}", layer));
  return axis;
}

}  // namespace headfold::report
