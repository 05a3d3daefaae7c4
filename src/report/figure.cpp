#include <fmt/format.h>
#include <headfold/base/error.h>
#include <headfold/report/figure.h>
#include <headfold/report/text.h>

#include <algorithm>
#include <cmath>

namespace headfold::report {
namespace {

/// A coordinate with at most two decimals, without trailing zeros.
std::string co(double value) {
  std::string text = fmt::format("{:.2f}", value);
  while (text.back() == '0') text.pop_back();
  if (text.back() == '.') text.pop_back();
  return text == "-0" ? "0" : text;
}

constexpr double kLabelGap = 15, kLineGap = 13;
/// Longest line of a label behind a curve, in glyphs.
constexpr std::size_t kLabelGlyphs = 20;

std::size_t glyphs(const std::string& text) {
  return static_cast<std::size_t>(
      std::count_if(text.begin(), text.end(), [](unsigned char c) { return (c & 0xC0) != 0x80; }));
}

/// Width of a text in a common sans-serif face; an estimate on the generous side, there is no font to ask.
double text_width(const std::string& text, double size) {
  return 0.56 * size * static_cast<double>(glyphs(text));
}

/// Collects elements; everything that goes in as text is escaped.
class Svg {
 public:
  Svg(const std::string& id, const std::string& title, const std::string& description, double width, double height) {
    text_ = fmt::format(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" role=\"img\" aria-labelledby=\"{0}-t {0}-d\" viewBox=\"0 0 {1} "
        "{2}\" width=\"{1}\" height=\"{2}\">"
        "<title id=\"{0}-t\">{3}</title><desc id=\"{0}-d\">{4}</desc>\n",
        escape_markup(id), co(width), co(height), escape_markup(title), escape_markup(description));
  }
  void line(double x1, double y1, double x2, double y2, const std::string& css) {
    text_ += fmt::format("<line class=\"{}\" x1=\"{}\" y1=\"{}\" x2=\"{}\" y2=\"{}\"/>\n", css, co(x1), co(y1), co(x2),
                         co(y2));
  }
  void rect(double x, double y, double width, double height, const std::string& css, double radius = 0,
            const std::string& hint = {}) {
    text_ += fmt::format("<rect class=\"{}\" x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\"", css, co(x), co(y),
                         co(width), co(height));
    if (radius > 0) text_ += fmt::format(" rx=\"{}\"", co(radius));
    text_ += hint.empty() ? "/>\n" : fmt::format("><title>{}</title></rect>\n", escape_markup(hint));
  }
  void text(double x, double y, const std::string& content, const std::string& css, const char* anchor = "start",
            bool turned = false) {
    text_ += fmt::format("<text class=\"{}\" x=\"{}\" y=\"{}\" text-anchor=\"{}\"", css, co(x), co(y), anchor);
    if (turned) text_ += fmt::format(" transform=\"rotate(-90 {} {})\"", co(x), co(y));
    text_ += fmt::format(">{}</text>\n", escape_markup(content));
  }
  void path(const std::string& d, const std::string& css, const std::string& hint = {}) {
    text_ += fmt::format("<path class=\"{}\" d=\"{}\"", css, d);
    text_ += hint.empty() ? "/>\n" : fmt::format("><title>{}</title></path>\n", escape_markup(hint));
  }
  /// Marker of a series: colours have shapes of their own, so that a reader who sees no colour tells them apart.
  void marker(double x, double y, int shape, double r, const std::string& css, const std::string& hint) {
    const auto polygon = [&](std::initializer_list<std::pair<double, double>> corners) {
      std::string d;
      for (const auto& [cx, cy] : corners)
        d += fmt::format("{}{} {}", d.empty() ? "M" : "L", co(x + cx * r), co(y + cy * r));
      path(d + "Z", css, hint);
    };
    switch (shape) {
      case 1:
        return polygon({{-.9, -.9}, {.9, -.9}, {.9, .9}, {-.9, .9}});
      case 2:
        return polygon({{0, -1.2}, {1.15, .85}, {-1.15, .85}});
      case 3:
        return polygon({{0, -1.3}, {1.3, 0}, {0, 1.3}, {-1.3, 0}});
      case 4:
        return polygon({{0, 1.2}, {1.15, -.85}, {-1.15, -.85}});
      case 5:
        return polygon({{-.4, -1.2},
                        {.4, -1.2},
                        {.4, -.4},
                        {1.2, -.4},
                        {1.2, .4},
                        {.4, .4},
                        {.4, 1.2},
                        {-.4, 1.2},
                        {-.4, .4},
                        {-1.2, .4},
                        {-1.2, -.4},
                        {-.4, -.4}});
      default:
        return path(
            fmt::format("M{0} {1}a{2} {2} 0 1 0 {3} 0a{2} {2} 0 1 0 -{3} 0Z", co(x - r), co(y), co(r), co(2 * r)), css,
            hint);
    }
  }
  std::string finish() { return text_ + "</svg>\n"; }

 private:
  std::string text_;
};

std::string colour_class(int colour, int shade) {
  if (shade >= 0) return fmt::format("q{}", std::min(shade, kShades - 1));
  return colour < 0 ? "cn" : fmt::format("c{}", colour % kSeriesColours);
}

int decimals_for(double step) {
  int decimals = 0;
  while (decimals < 8 && std::abs(step * std::pow(10.0, decimals) - std::round(step * std::pow(10.0, decimals))) > 1e-6)
    ++decimals;
  return decimals;
}

std::string with_unit(std::string number, const std::string& unit) {
  if (unit.empty()) return number;
  return number + (unit == "×" ? "" : "\xC2\xA0") + unit;
}

/// Moves label positions apart to `gaps` (behind each) at least, keeping their order and the range [low, high] where it
/// is wide enough.
void spread(std::vector<double>& positions, const std::vector<double>& gaps, double low, double high) {
  std::vector<std::size_t> order(positions.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return positions[a] < positions[b]; });
  double next = low;
  for (const std::size_t i : order) {
    positions[i] = std::max(positions[i], next);
    next = positions[i] + gaps[i];
  }
  next = high;
  for (auto i = order.rbegin(); i != order.rend(); ++i) {
    // `high` is for the last line of a label, positions are of first lines.
    if (i == order.rbegin()) next = high - gaps[*i] + kLabelGap;
    positions[*i] = std::min(positions[*i], next);
    if (i + 1 != order.rend()) next = positions[*i] - gaps[*(i + 1)];
  }
}

/// A label in lines of about `most` glyphs, broken at spaces; a "+" begins a line rather than ending one.
std::vector<std::string> wrapped(const std::string& label, std::size_t most) {
  std::vector<std::string> lines;
  const std::string text = clean_text(label);
  for (std::size_t at = 0; at < text.size();) {
    std::size_t end = std::min(text.find(' ', at), text.size());
    if (text.substr(at, end - at) == "+" && end < text.size()) end = std::min(text.find(' ', end + 1), text.size());
    const std::string word = text.substr(at, end - at);
    at = end + 1;
    if (lines.empty() || glyphs(lines.back()) + 1 + glyphs(word) > most)
      lines.push_back(word);
    else
      lines.back() += " " + word;
  }
  return lines;
}

}  // namespace

std::vector<double> nice_ticks(double low, double high, int most) {
  if (!std::isfinite(low) || !std::isfinite(high) || !(low < high))
    throw InternalError(fmt::format("ticks asked for the range {} to {}", low, high));
  most = std::max(most, 2);
  const double raw = (high - low) / most;
  double power = std::pow(10.0, std::floor(std::log10(raw)));
  if (!(power > 0) || !std::isfinite(power)) return {low, high};
  for (int guard = 0; guard < 4; ++guard, power *= 10) {
    for (const double mantissa : {1.0, 2.0, 5.0}) {
      const double step = mantissa * power;
      const double slack = step * 1e-9;
      const double first = std::ceil((low - slack) / step), last = std::floor((high + slack) / step);
      if (last - first + 1 > most) continue;
      std::vector<double> ticks;
      for (double k = first; k <= last; ++k) ticks.push_back(k == 0 ? 0.0 : k * step);
      return ticks;
    }
  }
  return {low, high};
}

std::vector<double> log_ticks(double low, double high, int most) {
  if (!std::isfinite(low) || !std::isfinite(high) || !(low > 0) || !(low < high))
    throw InternalError(fmt::format("logarithmic ticks asked for the range {} to {}", low, high));
  const int first = static_cast<int>(std::floor(std::log10(low))), last = static_cast<int>(std::ceil(std::log10(high)));
  const auto collect = [&](std::initializer_list<double> mantissas, int every) {
    std::vector<double> ticks;
    for (int k = first; k <= last; ++k) {
      if ((k - first) % every != 0) continue;
      for (const double m : mantissas) {
        const double tick = m * std::pow(10.0, k);
        if (tick >= low * (1 - 1e-9) && tick <= high * (1 + 1e-9)) ticks.push_back(tick);
      }
    }
    return ticks;
  };
  const auto limit = static_cast<std::size_t>(std::max(most, 3));
  for (const std::vector<double>& ticks :
       {collect({1, 2, 3, 5, 7}, 1), collect({1, 2, 5}, 1), collect({1, 3}, 1), collect({1}, 1)})
    if (ticks.size() >= 3 && ticks.size() <= limit) return ticks;
  for (int every = 2; every < 700; ++every)
    if (auto ticks = collect({1}, every); last - first > 2 && ticks.size() <= limit) return ticks;
  return nice_ticks(low, high, most);
}

double Axis::at(double value) const {
  double t = log ? (std::log(value) - std::log(low)) / (std::log(high) - std::log(low)) : (value - low) / (high - low);
  if (!std::isfinite(t)) t = 0;
  t = std::clamp(t, 0.0, 1.0);
  return reversed ? 1 - t : t;
}

Axis make_axis(const std::vector<double>& values, std::string title, const std::string& unit, bool log, bool from_zero,
               int ticks) {
  double low = INFINITY, high = -INFINITY;
  for (const double value : values) {
    if (!std::isfinite(value)) continue;
    low = std::min(low, value);
    high = std::max(high, value);
  }
  if (low > high) low = 0, high = 1;
  Axis axis;
  axis.title = std::move(title);
  axis.log = log && low > 0;
  if (axis.log) {
    if (high / low < 1.2) low /= 1.1, high *= 1.1;
    const double pad = std::pow(high / low, 0.05);
    axis.low = low / pad;
    axis.high = high * pad;
    for (const double tick : log_ticks(axis.low, axis.high, ticks))
      axis.ticks.emplace_back(tick, with_unit(fmt::format("{:.4g}", tick), unit));
    return axis;
  }
  if (from_zero) low = std::min(low, 0.0), high = std::max(high, 0.0);
  if (low == high) {
    const double pad = low == 0 ? 1 : std::abs(low) * 0.1;
    if (!from_zero || low != 0) low -= pad;
    high += pad;
  }
  // Widened to the next tick outside, so that curves do not touch the frame.
  const auto inner = nice_ticks(low, high, ticks);
  const double step = inner.size() > 1 ? inner[1] - inner[0] : high - low;
  axis.low = std::floor(low / step + 1e-9) * step;
  axis.high = std::ceil(high / step - 1e-9) * step;
  if (!(axis.low < axis.high)) axis.low = low, axis.high = high;
  auto shown = nice_ticks(axis.low, axis.high, ticks + 1);
  const double shown_step = shown.size() > 1 ? shown[1] - shown[0] : step;
  for (const double tick : shown) {
    const bool plain = std::abs(tick) < 1e6 && shown_step > 1e-7;
    axis.ticks.emplace_back(
        tick,
        with_unit(plain ? fmt::format("{:.{}f}", tick, decimals_for(shown_step)) : fmt::format("{:.3g}", tick), unit));
  }
  return axis;
}

std::string Chart::svg() const {
  double tick_width = 0;
  for (const auto& [value, label] : y.ticks) tick_width = std::max(tick_width, text_width(label, 11));
  double label_width = 0;
  for (const Series& one : series)
    for (const std::string& line : wrapped(one.label, kLabelGlyphs))
      label_width = std::max(label_width, text_width(line, 12));
  const double left = tick_width + 12 + (y.title.empty() ? 0 : 18);
  // The last tick's label is centred on the end of the axis.
  double overhang = 0;
  for (const auto& [value, label] : x.ticks)
    if (x.at(value) > 0.9) overhang = std::max(overhang, text_width(label, 11) / 2 + 2);
  const double right = std::max(label_width > 0 ? label_width + 18 : 10, overhang);
  const double top = heading.empty() ? 12 : 30, bottom = x.title.empty() ? 24 : 44;
  const double plot_width = width - left - right, plot_height = height - top - bottom;
  const auto px = [&](double value) { return left + x.at(value) * plot_width; };
  const auto py = [&](double value) { return top + (1 - y.at(value)) * plot_height; };

  Svg out(id, title, description, width, height);
  if (!heading.empty()) out.text(2, 16, heading, "th");
  for (const auto& [value, label] : y.ticks) {
    out.line(left, py(value), left + plot_width, py(value), "grid");
    out.text(left - 7, py(value) + 4, label, "tick", "end");
  }
  // A tick label that would run into the one before it is left out; its tick stays.
  double free_from = -1e9;
  std::vector<std::pair<double, std::string>> x_ticks = x.ticks;
  std::sort(x_ticks.begin(), x_ticks.end(), [&](const auto& a, const auto& b) { return px(a.first) < px(b.first); });
  for (const auto& [value, label] : x_ticks) {
    const double half = text_width(label, 11) / 2;
    out.line(px(value), top + plot_height, px(value), top + plot_height + 4, "axis");
    if (px(value) - half < free_from) continue;
    out.text(px(value), top + plot_height + 17, label, "tick", "middle");
    free_from = px(value) + half + 6;
  }
  out.line(left, top + plot_height, left + plot_width, top + plot_height, "axis");
  if (!x.title.empty()) out.text(left + plot_width / 2, height - 6, x.title, "at", "middle");
  if (!y.title.empty()) out.text(13, top + plot_height / 2, y.title, "at", "middle", true);
  for (const Rule& rule : rules) {
    out.line(px(rule.x), top, px(rule.x), top + plot_height, "rule");
    const bool at_left = px(rule.x) - left > plot_width * 0.6;
    if (!rule.label.empty())
      out.text(px(rule.x) + (at_left ? -5 : 5), top + plot_height - 7, rule.label, "tick", at_left ? "end" : "start");
  }
  for (const auto& [from, to] : stems)
    out.line(px(from.x), py(from.y), px(to.x), py(to.y), "stem " + colour_class(stem_colour, -1));

  for (const Series& one : series) {
    const std::string colour = colour_class(one.colour, one.shade);
    std::string d;
    for (const Point& point : one.points)
      if (std::isfinite(point.x) && std::isfinite(point.y))
        d += fmt::format("{}{} {}", d.empty() ? "M" : "L", co(px(point.x)), co(py(point.y)));
    if (one.line && d.find('L') != std::string::npos)
      out.path(d, std::string(one.dashed ? "ln dash " : "ln ") + colour, one.marker == Marker::none ? one.name : "");
  }
  for (const Series& one : series) {
    if (one.marker == Marker::none) continue;
    const std::string css =
        std::string(one.marker == Marker::filled ? "dot " : "ring ") + colour_class(one.colour, one.shade);
    for (const Point& point : one.points)
      if (std::isfinite(point.x) && std::isfinite(point.y))
        out.marker(px(point.x), py(point.y), one.colour < 0 ? 0 : one.colour % kSeriesColours, one.marker_size, css,
                   point.hint.empty() ? one.name : point.hint);
  }

  std::vector<double> label_y, gaps;
  std::vector<const Series*> labelled;
  std::vector<std::vector<std::string>> label_lines;
  for (const Series& one : series) {
    if (one.label.empty() || one.points.empty()) continue;
    labelled.push_back(&one);
    label_lines.push_back(wrapped(one.label, kLabelGlyphs));
    const double further = kLineGap * (static_cast<double>(label_lines.back().size()) - 1);
    gaps.push_back(kLabelGap + further);
    label_y.push_back(py(one.points.back().y) + 4 - further / 2);
  }
  spread(label_y, gaps, top + 8, top + plot_height);
  for (std::size_t i = 0; i < labelled.size(); ++i) {
    const double end_x = px(labelled[i]->points.back().x), end_y = py(labelled[i]->points.back().y);
    const double label_x = left + plot_width + 12;
    // A thin line leads to a label that had to move away from its point, or whose line ends early.
    const double middle = label_y[i] - 4 + (gaps[i] - kLabelGap) / 2;
    if (std::abs(middle - end_y) > 3 || label_x - end_x > 24) out.line(end_x + 7, end_y, label_x - 3, middle, "lead");
    for (std::size_t line = 0; line < label_lines[i].size(); ++line)
      out.text(label_x, label_y[i] + kLineGap * static_cast<double>(line), label_lines[i][line],
               "lab " + colour_class(labelled[i]->colour, labelled[i]->shade));
  }

  if (shade_labels.size() == 2) {
    const double cell = 6, key_width = cell * kShades, key_right = left + plot_width - 4,
                 key_y = top + plot_height - 16;
    const double last_width = text_width(shade_labels[1], 11);
    const double first_width = text_width(shade_labels[0], 11);
    out.rect(key_right - last_width - 14 - key_width - first_width, key_y - 4,
             first_width + key_width + last_width + 18, 15, "back");
    for (int s = 0; s < kShades; ++s)
      out.rect(key_right - last_width - 5 - key_width + cell * s, key_y, cell, 8, fmt::format("box q{}", s));
    out.text(key_right, key_y + 8, shade_labels[1], "tick", "end");
    out.text(key_right - last_width - 10 - key_width, key_y + 8, shade_labels[0], "tick", "end");
  }
  return out.finish();
}

std::string bar_chart(const std::string& id, const std::string& title, const std::string& description,
                      const std::vector<Bar>& bars, double width) {
  const double step = 54, top = 4;
  double longest = 0, value_width = 0;
  for (const Bar& bar : bars) {
    if (std::isfinite(bar.length)) longest = std::max(longest, bar.length);
    value_width = std::max(value_width, text_width(bar.value, 12));
  }
  const double room = std::max(60.0, width - value_width - 18);
  Svg out(id, title, description, width, top + step * static_cast<double>(bars.size()));
  const auto most_glyphs = static_cast<std::size_t>(width / (0.56 * 12));
  for (std::size_t i = 0; i < bars.size(); ++i) {
    const Bar& bar = bars[i];
    const double y = top + step * static_cast<double>(i);
    std::string detail = clean_text(bar.detail);
    const std::size_t left_over = most_glyphs > glyphs(bar.label) + 4 ? most_glyphs - glyphs(bar.label) - 4 : 0;
    if (glyphs(detail) > left_over) {
      // Cut at a character, not inside one.
      std::size_t keep = 0, seen = 0;
      while (keep < detail.size() && seen + 1 < left_over) {
        ++keep;
        while (keep < detail.size() && (static_cast<unsigned char>(detail[keep]) & 0xC0) == 0x80) ++keep;
        ++seen;
      }
      detail = detail.substr(0, keep) + "…";
    }
    out.text(0, y + 14, bar.label, "lab");
    if (!detail.empty() && left_over > 4) out.text(text_width(bar.label, 12.5) + 12, y + 14, detail, "tick");
    const double length = longest > 0 && std::isfinite(bar.length) ? std::max(1.5, bar.length / longest * room) : 1.5;
    out.rect(0, y + 21, length, 18, "box " + colour_class(bar.colour, -1), 2, bar.label + ": " + bar.value);
    out.text(length + 8, y + 34.5, bar.value, "lab");
  }
  return out.finish();
}

std::string ChangeRows::svg() const {
  std::vector<double> values = {0, low, high};
  std::size_t most = 1;
  double label_width = 0;
  for (const Row& row : rows) {
    most = std::max(most, row.marks.size());
    label_width = std::max(label_width, text_width(row.label, row.strong ? 12.5 : 11.5));
    for (const Mark& mark : row.marks)
      for (const double value : {mark.value - mark.error, mark.value + mark.error}) values.push_back(value);
  }
  const Axis x = make_axis(values, x_title, unit, false, true, 7);
  // Many rows: markers of one row lie over each other rather than the figure becoming a wall.
  const double mark_step = rows.size() > 24 ? 2.5 : 9;
  const double row_height = std::max(17.0, mark_step * static_cast<double>(most) + 8);
  const double left = std::min(label_width, width * 0.45) + 14, right = 20;
  const double plot_width = width - left - right;
  // The key, in as many lines as it takes.
  std::vector<std::pair<double, double>> key_places;
  double key_x = 0, key_y = heading.empty() ? 10 : 32;
  for (const auto& [name, colour] : key) {
    const double needed = text_width(name, 12) + 26;
    if (key_x > 0 && key_x + needed > width) {
      key_x = 0;
      key_y += 18;
    }
    key_places.emplace_back(key_x, key_y);
    key_x += needed;
  }
  const double top = key_y + (key.empty() ? (heading.empty() ? 0 : -6) : 16);
  const double plot_height = row_height * static_cast<double>(rows.size()), height = top + plot_height + 44;
  const auto px = [&](double value) { return left + x.at(value) * plot_width; };
  Svg out(id, title, description, width, height);
  if (!heading.empty()) out.text(0, 14, heading, "th");
  for (std::size_t k = 0; k < key.size(); ++k) {
    out.marker(key_places[k].first + 6, key_places[k].second, key[k].second % kSeriesColours, 4.4,
               "dot " + colour_class(key[k].second, -1), key[k].first);
    out.text(key_places[k].first + 15, key_places[k].second + 4, key[k].first, "lab");
  }
  for (const auto& [value, label] : x.ticks) {
    out.line(px(value), top, px(value), top + plot_height, "grid");
    out.text(px(value), top + plot_height + 17, label, "tick", "middle");
  }
  out.line(px(0), top - 3, px(0), top + plot_height, "rule strong");
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const Row& row = rows[r];
    const double y = top + row_height * (static_cast<double>(r) + 0.5);
    if (r > 0) out.line(0, y - row_height / 2, left + plot_width, y - row_height / 2, row.strong ? "axis" : "grid");
    out.text(left - 10, y + 4, row.label, row.strong ? "th" : "at", "end");
    for (std::size_t m = 0; m < row.marks.size(); ++m) {
      const Mark& mark = row.marks[m];
      if (!std::isfinite(mark.value)) continue;
      const double my = y + (static_cast<double>(m) - (static_cast<double>(row.marks.size()) - 1) / 2) * mark_step;
      const std::string colour = colour_class(mark.colour, -1);
      if (mark.error > 0 && std::isfinite(mark.error))
        out.line(px(mark.value - mark.error), my, px(mark.value + mark.error), my, "stem " + colour);
      out.marker(px(mark.value), my, mark.colour % kSeriesColours, 4.2, (mark.filled ? "dot " : "ring ") + colour,
                 mark.hint);
    }
  }
  out.text(left + plot_width / 2, height - 6, x_title, "at", "middle");
  return out.finish();
}

std::string HeatMap::svg() const {
  double label_width = 0;
  for (const std::string& label : row_labels) label_width = std::max(label_width, text_width(label, 11));
  const double left = label_width + 12 + (y_title.empty() ? 0 : 18), right = 22, top = heading.empty() ? 8 : 28;
  const double bottom = (x_title.empty() ? 22 : 42) + (key.empty() ? 0 : 34);
  const auto rows = static_cast<double>(std::max<std::size_t>(shades.size(), 1));
  const double row_height = std::clamp(260.0 / rows, 5.0, 22.0);
  const double plot_width = width - left - right, plot_height = row_height * rows, height = top + plot_height + bottom;
  Svg out(id, title, description, width, height);
  if (!heading.empty()) out.text(left, 16, heading, "th");
  const int every = std::max(1, static_cast<int>(std::ceil(13.0 / row_height)));
  for (std::size_t r = 0; r < shades.size(); ++r) {
    const double y = top + row_height * static_cast<double>(r);
    if (r < row_labels.size() && static_cast<int>(r) % every == 0)
      out.text(left - 7, y + row_height / 2 + 4, row_labels[r], "tick", "end");
    const double cell = plot_width / static_cast<double>(std::max<std::size_t>(shades[r].size(), 1));
    for (std::size_t c = 0; c < shades[r].size(); ++c) {
      // Neighbours of one shade become one rectangle: a page of many layers stays small.
      std::size_t end = c + 1;
      while (texts.empty() && end < shades[r].size() && shades[r][end] == shades[r][c]) ++end;
      if (shades[r][c] >= 0)
        out.rect(left + cell * static_cast<double>(c), y, cell * static_cast<double>(end - c),
                 row_height - (row_height > 8 ? 1 : 0), "box " + colour_class(0, shades[r][c]));
      if (r < texts.size() && c < texts[r].size())
        out.text(left + cell * (static_cast<double>(c) + 0.5), y + row_height / 2 + 3.5, texts[r][c],
                 shades[r][c] >= kShades / 2 ? "in far" : "in", "middle");
      c = end - 1;
    }
  }
  out.line(left, top + plot_height, left + plot_width, top + plot_height, "axis");
  for (const auto& [position, label] : x_ticks) {
    const double x = left + std::clamp(position, 0.0, 1.0) * plot_width;
    out.line(x, top + plot_height, x, top + plot_height + 4, "axis");
    out.text(x, top + plot_height + 17, label, "tick", "middle");
  }
  // A rule over cells of any shade is seen by its light edges.
  if (rule >= 0) out.line(left + rule * plot_width, top - 3, left + rule * plot_width, top + plot_height, "halo");
  if (rule >= 0)
    out.line(left + rule * plot_width, top - 3, left + rule * plot_width, top + plot_height, "rule strong");
  if (!x_title.empty()) out.text(left + plot_width / 2, top + plot_height + 36, x_title, "at", "middle");
  if (!y_title.empty()) out.text(13, top + plot_height / 2, y_title, "at", "middle", true);
  if (!key.empty()) {
    const double cell = plot_width / kShades;
    for (int s = 0; s < kShades; ++s) {
      out.rect(left + cell * s, height - 26, cell - 1, 8, fmt::format("box q{}", s));
      if (static_cast<std::size_t>(s) < key.size())
        out.text(left + cell * s + cell / 2, height - 5, key[static_cast<std::size_t>(s)], "tick", "middle");
    }
  }
  return out.finish();
}

}  // namespace headfold::report
