#pragma once
#include <string>

namespace headfold {

/// The version, "0.1.0".
std::string version();
/// Several lines: version, compiler, build type, libraries and which backends are compiled in.
std::string build_description();

/// The build ID that the linker gave this program: another one for any other code or compiler. Empty when it has none.
std::string build_id();
/// One line that all ranks of a job must agree on: version, build ID, build type, compiler, libraries.
std::string build_identity();

}  // namespace headfold
