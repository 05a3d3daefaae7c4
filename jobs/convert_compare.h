#pragma once
// `convert --compare`: several folds of one model, scored without being written.

#include <headfold/checkpoint/reader.h>

#include "convert_options.h"

namespace headfold::jobs {

/// Plans every fold of --compare, scores it on --probe-windows windows of --probe-data, and prints the folds by rising
/// divergence from the original; writes OUT/compare.json and OUT/compare.md (docs/formats.md) and no weights. A fold
/// that the model or the statistics do not allow is a row that says why. Collective; figures do not depend on the
/// number of ranks (but for seconds). UsageError when no fold can be scored.
void compare(const Context& context, const checkpoint::Reader& reader, const po::variables_map& values,
             const std::vector<std::string>& arguments);

}  // namespace headfold::jobs
