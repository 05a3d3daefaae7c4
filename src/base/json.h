#pragma once
// JSON files with errors that name the file and the key.

#include <fmt/format.h>

#include <headfold/base/error.h>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

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

/// `object[key]` as T. Throws InputError naming `file` and the key when it is absent or of another type.
template <class T, class J>
T required(const J& object, const std::string& key, const std::string& file) {
  const auto found = object.find(key);
  if (found == object.end() || found->is_null()) throw InputError(fmt::format("{}: key \"{}\" is missing", file, key));
  try {
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
