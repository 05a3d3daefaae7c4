#include <headfold/base/files.h>
#include <headfold/base/json.h>

#include <set>

namespace headfold {

Json parse_json(std::string_view text, const std::string& name) {
  // The parser keeps the last of two equal keys without a word; a checkpoint header with two tensors of one name must
  // be refused.
  std::vector<std::set<std::string>> keys;
  std::string duplicate;
  const nlohmann::json::parser_callback_t watch = [&](int depth, nlohmann::json::parse_event_t event, Json& parsed) {
    using Event = nlohmann::json::parse_event_t;
    if (depth > 200) throw CorruptFile(name, "JSON is nested more than 200 levels deep");
    if (event == Event::object_start) keys.emplace_back();
    if (event == Event::object_end && !keys.empty()) keys.pop_back();
    if (event == Event::key && !keys.empty() && !keys.back().insert(parsed.get<std::string>()).second &&
        duplicate.empty())
      duplicate = parsed.get<std::string>();
    return true;
  };
  Json value;
  try {
    value = Json::parse(text.begin(), text.end(), watch);
  } catch (const nlohmann::json::exception& error) {
    throw CorruptFile(name, fmt::format("is not valid JSON: {}", error.what()));
  }
  if (!duplicate.empty()) throw CorruptFile(name, fmt::format("JSON key \"{}\" appears twice", duplicate));
  return value;
}

Json read_json(const std::filesystem::path& path, std::uint64_t max_bytes) {
  return parse_json(read_file(path, max_bytes), path.string());
}

namespace {
template <class J>
void write_any(const std::filesystem::path& path, const J& value) {
  write_file(path, value.dump(2, ' ', false, J::error_handler_t::replace) + "\n");
}
}  // namespace

void write_json(const std::filesystem::path& path, const Json& value) {
  write_any(path, value);
}
void write_json(const std::filesystem::path& path, const OrderedJson& value) {
  write_any(path, value);
}

}  // namespace headfold
