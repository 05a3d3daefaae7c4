#include "values.h"

#include <headfold/checkpoint/synthetic.h>

#include <algorithm>

namespace headfold::jobs {

std::int64_t at_least(const po::variables_map& values, const char* name, std::int64_t least,
                      const std::string& meaning) {
  const auto value = values[name].as<std::int64_t>();
  if (value < least)
    throw UsageError(fmt::format("--{} {}: {}", name, value,
                                 meaning.empty() ? fmt::format("at least {} is needed", least) : meaning));
  return value;
}

namespace {
bool is(const po::variables_map& values, const char* name, const char* yes, const char* no) {
  const auto value = values[name].as<std::string>();
  if (value != yes && value != no) throw UsageError(fmt::format("--{} {}: choose {} or {}", name, value, yes, no));
  return value == yes;
}
}  // namespace

bool is_on(const po::variables_map& values, const char* name) {
  return is(values, name, "on", "off");
}

bool is_yes(const po::variables_map& values, const char* name) {
  return is(values, name, "yes", "no");
}

std::vector<std::filesystem::path> paths(const po::variables_map& values, const char* name) {
  std::vector<std::filesystem::path> files;
  if (values.count(name) > 0)
    for (const std::string& file : values[name].as<std::vector<std::string>>()) files.emplace_back(file);
  return files;
}

Json read_shape(const std::string& shape) {
  const std::vector<std::string> names = checkpoint::shape_names();
  if (std::find(names.begin(), names.end(), shape) != names.end()) return checkpoint::shape_config(shape);
  if (fs::is_directory(shape)) return read_json(fs::path(shape) / "config.json");
  if (fs::exists(shape)) return read_json(shape);
  return checkpoint::shape_config(shape);  // throws, listing the names
}

}  // namespace headfold::jobs
