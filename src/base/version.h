#pragma once
#include <string>

namespace headfold {

/// The version, "0.1.0".
std::string version();
/// Several lines: version, compiler, build type, libraries and which backends are compiled in.
std::string build_description();

}  // namespace headfold
