#include <headfold/base/error.h>
#include <headfold/base/json.h>
#include <headfold/report/samples.h>

#include <cmath>
#include <fstream>

namespace headfold::report {
namespace {

std::string text_of(const Json& object, const char* key) {
  const auto found = object.find(key);
  return found != object.end() && found->is_string() ? found->get<std::string>() : std::string();
}

std::optional<double> number_of(const Json& value) {
  if (value.is_boolean()) return value.get<bool>() ? 1.0 : 0.0;
  if (!value.is_number()) return std::nullopt;
  const double number = value.get<double>();
  return std::isfinite(number) ? std::optional<double>(number) : std::nullopt;
}

/// What is wrong with a line, or nothing.
std::string take(const Json& line, Samples& samples, std::map<std::string, int>& uses) {
  if (!line.is_object()) return "is no JSON object";
  const std::string hash = text_of(line, "doc_hash");
  if (hash.empty()) return "has no \"doc_hash\"";
  std::string filter = text_of(line, "filter");
  if (filter.empty()) filter = "none";
  // Each filter writes a line of its own about the same document.
  const int nth = ++uses[filter + " " + hash];
  SampleDocument& document = samples.documents[nth == 1 ? hash : fmt::format("{} {}", hash, nth)];
  document.prompt = text_of(line, "prompt_hash");
  document.target = text_of(line, "target_hash");
  const auto metrics = line.find("metrics");
  if (metrics == line.end() || !metrics->is_array()) return "has no list \"metrics\"";
  for (const Json& name : *metrics) {
    if (!name.is_string()) return "\"metrics\" holds something that is no name";
    const auto value = line.find(name.get<std::string>());
    if (value == line.end()) return fmt::format("has no value of \"{}\"", name.get<std::string>());
    if (const auto number = number_of(*value)) document.values[name.get<std::string>() + "," + filter] = *number;
  }
  if (const auto doc = line.find("doc"); doc != line.end() && doc->is_object()) {
    const auto depth = doc->find("depth"), length = doc->find("length");
    if (depth != doc->end() && depth->is_number() && length != doc->end() && length->is_number()) {
      document.depth = number_of(*depth);
      document.length = number_of(*length);
    }
  }
  return {};
}

}  // namespace

std::shared_ptr<const Samples> read_samples(const std::filesystem::path& path, const std::string& shown_as) {
  auto samples = std::make_shared<Samples>();
  samples->file = shown_as;
  std::ifstream stream(path, std::ios::binary);
  if (!stream) {
    samples->problem = "cannot be opened";
    return samples;
  }
  std::map<std::string, int> uses;
  std::string line;
  for (std::int64_t number = 1; std::getline(stream, line); ++number) {
    if (line.empty()) continue;
    std::string wrong;
    try {
      wrong = take(parse_json(line, "line"), *samples, uses);
    } catch (const Error&) {
      wrong = "is not valid JSON (cut off or edited?)";
    }
    if (wrong.empty()) continue;
    samples->problem = fmt::format("line {} {}", number, wrong);
    return samples;
  }
  if (stream.bad()) samples->problem = "cannot be read to its end";
  if (samples->problem.empty() && samples->documents.empty()) samples->problem = "is empty";
  return samples;
}

}  // namespace headfold::report
