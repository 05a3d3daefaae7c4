#pragma once
// Texts of a report: escaping for each output format, numbers with sensible digits, paths without the machine they come
// from.

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace headfold::report {

/// Well-formed UTF-8 without control characters: broken bytes and controls become U+FFFD, tabs and line ends a space.
std::string clean_text(std::string_view text);
/// clean_text() with &, <, >, " and ' as entities: safe in HTML and XML content and in quoted attributes.
std::string escape_markup(std::string_view text);
/// clean_text() with markup as entities and Markdown's own characters behind backslashes; safe in a table cell.
std::string escape_markdown(std::string_view text);

/// What stands in a cell when there is no value.
inline constexpr const char* kNone = "–";
/// What stands in a cell when a value was recorded but is no finite number.
inline constexpr const char* kNotFinite = "not finite";

/// `value` rounded to `digits` significant digits, thousands separated: "0.0951", "32.4", "12,340". Non-finite gives
/// kNotFinite.
std::string format_significant(double value, int digits);
/// Thousands separated: "6,815,744".
std::string format_count(std::int64_t value);
/// A perplexity: "29.48", "1,234".
std::string format_perplexity(double value);
/// A factor: "1.099", "13.42".
std::string format_ratio(double value);
/// A share in per cent: 0.5 → "50 %", 0.375 → "37.5 %" (no-break space).
std::string format_share(double share);
/// A ratio as signed change in per cent: 1.0994 → "+9.9 %", 0.99 → "−1.0 %".
std::string format_change(double ratio);
/// "2026-01-31 12:34 UTC" of UNIX seconds; kNone outside the years 1970 … 9999.
std::string format_date(double unix_seconds);
/// A share in words: 0.5 → "half", 0.25 → "a quarter", else format_share(). For use before "of the KV cache" or "the KV
/// cache".
std::string words_for_share(double share);

/// Replaces absolute paths in a command line or value: below one of `roots` they become relative to it, others keep
/// their last part behind "…/".
std::string hide_paths(std::string_view text, const std::vector<std::string>& roots);
/// Last part of a path given as text, trailing slashes ignored: "/models/llama/" → "llama".
std::string last_part(const std::string& path);

/// Spearman's rank correlation (mean ranks for ties) of two equally long lists; nothing below three pairs or when one
/// list is constant.
std::optional<double> spearman(const std::vector<double>& a, const std::vector<double>& b);

}  // namespace headfold::report
