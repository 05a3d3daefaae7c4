#pragma once
// JSON files with errors that name the file and the key.

#include <fmt/format.h>

#include <headfold/base/error.h>
#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace headfold {

using Json = nlohmann::json;
using OrderedJson = nlohmann::ordered_json;

/// Parses text; duplicate keys, trailing bytes and invalid UTF-8 are errors. `name` stands for the file in messages.
/// Throws CorruptFile.
Json parse_json(std::string_view text, const std::string& name);
/// Reads and parses a file of at most `max_bytes`. Throws IoError, CorruptFile.
Json read_json(const std::filesystem::path& path, std::uint64_t max_bytes = std::uint64_t{1} << 30);
/// Atomic write, indent 2, trailing newline. Non-ASCII text is kept as it is.
void write_json(const std::filesystem::path& path, const Json& value);
void write_json(const std::filesystem::path& path, const OrderedJson& value);

namespace json_detail {
template <class T>
struct Holds {
  /// Whether `value` is a T as it stands. The library would cut 1.5 to 1, wrap what exceeds T, and take true for 1.
  template <class J>
  static bool in(const J& value) {
    if constexpr (std::is_integral_v<T> && !std::is_same_v<T, bool>) {
      if (value.is_number_unsigned()) return std::in_range<T>(value.template get<std::uint64_t>());
      return value.is_number_integer() && std::in_range<T>(value.template get<std::int64_t>());
    } else if constexpr (std::is_floating_point_v<T>) {
      return value.is_number();
    } else {
      return true;  // get() itself refuses
    }
  }
};
template <class T>
struct Holds<std::vector<T>> {
  template <class J>
  static bool in(const J& value) {
    return value.is_array() && std::all_of(value.begin(), value.end(), [](const J& v) { return Holds<T>::in(v); });
  }
};
}  // namespace json_detail

/// `object[key]` as T. Throws InputError naming `file` and the key when it is absent, of another type, or a number that
/// T cannot hold.
template <class T, class J>
T required(const J& object, const std::string& key, const std::string& file) {
  const auto found = object.find(key);
  if (found == object.end() || found->is_null()) throw InputError(fmt::format("{}: key \"{}\" is missing", file, key));
  try {
    if (!json_detail::Holds<T>::in(*found))
      throw InputError(
          fmt::format("{}: key \"{}\" has the wrong type or size: {}", file, key, found->dump().substr(0, 80)));
    return found->template get<T>();
  } catch (const nlohmann::json::exception&) {
    throw InputError(fmt::format("{}: key \"{}\" has the wrong type: {}", file, key, found->dump().substr(0, 80)));
  }
}

/// Like required(), with a default for an absent or null key.
template <class T, class J>
T optional(const J& object, const std::string& key, T fallback, const std::string& file) {
  const auto found = object.find(key);
  if (found == object.end() || found->is_null()) return fallback;
  return required<T>(object, key, file);
}

}  // namespace headfold
