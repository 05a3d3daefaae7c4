#pragma once
// What can be known to fail before a run begins.

#include <string>
#include <utility>
#include <vector>

#include "run_config.h"

namespace headfold::jobs {

/// Holds the arguments of elements, each with its job's name, against the job's own checks (Job::check), and looks for
/// the original model and for files that no stage of the run writes. Errors are those of the jobs, their message begins
/// with the file, line, section and key that they come from; of several elements' errors it is the first one's kind,
/// and the others stand below it. Reads small files only and writes nothing. One process.
void check_run(const RunPlan& plan, const std::vector<std::pair<std::string, const RunElement*>>& elements);

}  // namespace headfold::jobs
