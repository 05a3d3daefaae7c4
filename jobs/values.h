#pragma once
// Values of options that several jobs read alike.

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "job.h"

namespace headfold::jobs {

/// A number that must be `least` or more. UsageError with `meaning` ("at least N is needed" when empty).
std::int64_t at_least(const po::variables_map& values, const char* name, std::int64_t least,
                      const std::string& meaning = {});
/// A switch. UsageError unless it is "on" or "off", "yes" or "no".
bool is_on(const po::variables_map& values, const char* name);
bool is_yes(const po::variables_map& values, const char* name);
/// The files of an option that takes several; none when it was not given.
std::vector<std::filesystem::path> paths(const po::variables_map& values, const char* name);

/// The config.json that --shape means: a name of checkpoint::shape_names(), a config.json, or a folder that holds one.
/// UsageError that lists the names otherwise.
Json read_shape(const std::string& shape);

}  // namespace headfold::jobs
