#include <fmt/format.h>
#include <headfold/report/text.h>

#include <algorithm>
#include <cmath>
#include <ctime>
#include <numeric>

namespace headfold::report {
namespace {

constexpr const char* kReplacement = "\xEF\xBF\xBD";
constexpr const char* kNarrow = "\xC2\xA0";  // no-break space

/// Length of the valid UTF-8 sequence at the head of `text`, 0 when it is broken (overlong, surrogate, beyond U+10FFFF,
/// cut short).
std::size_t sequence_length(std::string_view text) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte(0);
  if (first < 0x80) return 1;
  const std::size_t length = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
  if (first < 0xC2 || first > 0xF4 || text.size() < length) return 0;
  for (std::size_t i = 1; i < length; ++i)
    if ((byte(i) & 0xC0) != 0x80) return 0;
  if ((first == 0xE0 && byte(1) < 0xA0) || (first == 0xED && byte(1) > 0x9F)) return 0;
  if ((first == 0xF0 && byte(1) < 0x90) || (first == 0xF4 && byte(1) > 0x8F)) return 0;
  return length;
}

/// U+FFFE and U+FFFF are no XML characters.
bool no_character(std::string_view sequence) {
  return sequence == "\xEF\xBF\xBE" || sequence == "\xEF\xBF\xBF";
}

std::string group_thousands(const std::string& number) {
  const std::size_t point = std::min(number.find('.'), number.size());
  std::string grouped;
  for (std::size_t i = 0; i < number.size(); ++i) {
    const bool between_digits = i > 0 && number[i - 1] != '-';
    if (i < point && between_digits && (point - i) % 3 == 0) grouped += ',';
    grouped += number[i];
  }
  return grouped;
}

std::vector<double> ranks_of(const std::vector<double>& values) {
  std::vector<std::size_t> order(values.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return values[a] < values[b]; });
  std::vector<double> ranks(values.size());
  for (std::size_t begin = 0; begin < order.size();) {
    std::size_t end = begin;
    while (end < order.size() && values[order[end]] == values[order[begin]]) ++end;
    for (std::size_t i = begin; i < end; ++i) ranks[order[i]] = 0.5 * static_cast<double>(begin + end - 1);
    begin = end;
  }
  return ranks;
}

}  // namespace

std::string clean_text(std::string_view text) {
  std::string clean;
  clean.reserve(text.size());
  while (!text.empty()) {
    const std::size_t length = sequence_length(text);
    const auto first = static_cast<unsigned char>(text[0]);
    if (length == 1 && (first == '\t' || first == '\n' || first == '\r')) {
      clean += ' ';
    } else if (length == 0 || (length == 1 && (first < 0x20 || first == 0x7F)) ||
               no_character(text.substr(0, length))) {
      clean += kReplacement;
    } else {
      clean += text.substr(0, length);
    }
    text.remove_prefix(std::max<std::size_t>(length, 1));
  }
  return clean;
}

std::string escape_markup(std::string_view text) {
  std::string escaped;
  for (const char c : clean_text(text)) {
    switch (c) {
      case '&':
        escaped += "&amp;";
        break;
      case '<':
        escaped += "&lt;";
        break;
      case '>':
        escaped += "&gt;";
        break;
      case '"':
        escaped += "&quot;";
        break;
      case '\'':
        escaped += "&#39;";
        break;
      default:
        escaped += c;
    }
  }
  return escaped;
}

std::string escape_markdown(std::string_view text) {
  std::string escaped;
  for (const char c : clean_text(text)) {
    if (c == '&') {
      escaped += "&amp;";
    } else if (c == '<') {
      escaped += "&lt;";
    } else if (c == '>') {
      escaped += "&gt;";
    } else {
      if (std::string_view("\\`*_[]|#").find(c) != std::string_view::npos) escaped += '\\';
      escaped += c;
    }
  }
  return escaped;
}

std::string format_significant(double value, int digits) {
  if (!std::isfinite(value)) return kNotFinite;
  if (value == 0) return "0";
  int magnitude = static_cast<int>(std::floor(std::log10(std::abs(value))));
  // 9.996 with three digits is 10.0: round first, then count.
  const double scale = std::pow(10.0, digits - 1 - magnitude);
  if (std::isfinite(scale) && scale > 0 && std::round(std::abs(value) * scale) >= std::pow(10.0, digits)) ++magnitude;
  if (magnitude < -5 || magnitude > 14) return fmt::format("{:.{}e}", value, digits - 1);
  const int decimals = std::max(0, digits - 1 - magnitude);
  return group_thousands(fmt::format("{:.{}f}", value, decimals));
}

std::string format_count(std::int64_t value) {
  return group_thousands(fmt::format("{}", value));
}

std::string format_perplexity(double value) {
  return format_significant(value, 4);
}

std::string format_ratio(double value) {
  if (std::isfinite(value) && value >= 0 && value < 9.9995) return fmt::format("{:.3f}", value);
  return format_significant(value, 4);
}

std::string format_share(double share) {
  if (!std::isfinite(share)) return kNotFinite;
  const double percent = share * 100;
  const bool whole = std::abs(percent - std::round(percent)) < 0.05;
  return fmt::format("{:.{}f}{}%", percent, whole ? 0 : 1, kNarrow);
}

std::string format_change(double ratio) {
  if (!std::isfinite(ratio)) return kNotFinite;
  const double percent = (ratio - 1) * 100;
  const double size = std::abs(percent);
  const std::string digits = fmt::format("{:.{}f}", size, size < 0.995 ? 2 : size < 99.95 ? 1 : 0);
  if (digits.find_first_not_of("0.") == std::string::npos) return fmt::format("±0{}%", kNarrow);
  return fmt::format("{}{}{}%", percent < 0 ? "−" : "+", group_thousands(digits), kNarrow);
}

std::string format_date(double unix_seconds) {
  if (!(unix_seconds > 0) || unix_seconds >= 253402300800.0) return kNone;
  const auto time = static_cast<std::time_t>(unix_seconds);
  std::tm parts{};
  gmtime_r(&time, &parts);
  return fmt::format("{:04d}-{:02d}-{:02d} {:02d}:{:02d} UTC", parts.tm_year + 1900, parts.tm_mon + 1, parts.tm_mday,
                     parts.tm_hour, parts.tm_min);
}

std::string words_for_share(double share) {
  struct Word {
    double share;
    const char* text;
  };
  static constexpr Word kWords[] = {{0.5, "half"},           {0.25, "a quarter"},          {0.75, "three quarters"},
                                    {1.0 / 3, "a third"},    {2.0 / 3, "two thirds"},      {0.125, "an eighth"},
                                    {0.0625, "a sixteenth"}, {1.0 / 32, "a thirty-second"}};
  for (const Word& word : kWords)
    if (std::abs(share - word.share) < 1e-6) return word.text;
  return format_share(share);
}

std::string hide_paths(std::string_view text, const std::vector<std::string>& roots) {
  std::string hidden;
  char quote = 0;
  for (std::size_t at = 0; at < text.size();) {
    const char c = text[at];
    const char before = at == 0 ? ' ' : text[at - 1];
    const bool starts_path = c == '/' && std::string_view(" \t'\"=,:(@").find(before) != std::string_view::npos;
    if (!starts_path) {
      if (c == '\'' || c == '"') quote = quote == 0 ? c : quote == c ? 0 : quote;
      hidden += c;
      ++at;
      continue;
    }
    std::size_t end = at;
    while (end < text.size() &&
           (quote != 0 ? text[end] != quote : std::string_view(" \t,'\"").find(text[end]) == std::string_view::npos))
      ++end;
    const std::string path(text.substr(at, end - at));
    at = end;
    std::string shown;
    for (const std::string& root : roots) {
      if (root.empty() || root == "/" || !path.starts_with(root)) continue;
      const std::string rest = path.substr(root.size());
      if (!rest.empty() && rest[0] != '/') continue;
      const std::size_t name = rest.find_first_not_of('/');
      shown = name == std::string::npos ? "." : rest.substr(name);
      break;
    }
    hidden += shown.empty() ? "…/" + last_part(path) : shown;
  }
  return hidden;
}

std::string last_part(const std::string& path) {
  const std::size_t end = path.find_last_not_of('/');
  if (end == std::string::npos) return {};
  const std::size_t slash = path.find_last_of('/', end);
  return path.substr(slash == std::string::npos ? 0 : slash + 1, slash == std::string::npos ? end + 1 : end - slash);
}

std::optional<double> spearman(const std::vector<double>& a, const std::vector<double>& b) {
  if (a.size() != b.size() || a.size() < 3) return std::nullopt;
  const std::vector<double> ra = ranks_of(a), rb = ranks_of(b);
  const double mean = 0.5 * static_cast<double>(a.size() - 1);
  double ab = 0, aa = 0, bb = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    ab += (ra[i] - mean) * (rb[i] - mean);
    aa += (ra[i] - mean) * (ra[i] - mean);
    bb += (rb[i] - mean) * (rb[i] - mean);
  }
  if (aa == 0 || bb == 0) return std::nullopt;
  return ab / std::sqrt(aa * bb);
}

}  // namespace headfold::report
