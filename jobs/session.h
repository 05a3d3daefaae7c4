#pragma once
// What surrounds every job: start-up checks, the map of ranks, logs, events, the summary at its end.

#include <headfold/comm/grid.h>

#include <vector>

#include "job.h"

namespace headfold::jobs {

/// The job of this name. UsageError that lists all of them (main.cpp).
const Job& find_job(const std::string& name);

/// Runs a job on all ranks as `headfold NAME arguments` does, with its own logs and events, then waits for all ranks
/// and emits the "end" event. Throws what the job throws; after Stopped and HelpShown too (every rank throws them) the
/// logs and events of the job around it are back. Any other error ends the process. Collective.
void run_job(const Context& context, const Job& job, const std::vector<std::string>& arguments);

/// Exchanges what ranks are (build, host, cores, GPUs) for the checks and the map. InputError that names ranks and
/// hosts when they run different builds. Collective; first thing in main.
void meet(const Context& context);

/// Called by parse(): applies the common options to the job at hand. Opens its logs and events, emits "start", prints
/// the map of ranks (more than one rank, outermost job), binds GPUs, and refuses ranks that were given different
/// arguments, see different input files or share a GPU unasked. Collective.
void open_session(const Context& context, const std::string& job, const po::variables_map& values,
                  const std::vector<std::string>& arguments);

/// Prints which layers of which replica every rank works on. Rank 0 speaks; nothing for one rank. Not collective.
void log_grid(const comm::Grid& grid, const std::vector<comm::LayerRange>& stages);

/// The failed rank's last words: one line in the log, a "failure" event, then the end of all ranks with the error's
/// exit code. `at_once`: whether this rank alone failed; otherwise it leaves rank 0 a moment to speak for all.
[[noreturn]] void fail(const comm::Environment& environment, const std::string& job, const std::exception& error,
                       bool at_once);

}  // namespace headfold::jobs
