#pragma once
// Places in the program where a test can make one rank hang or die; without effect otherwise.

#include <string_view>

namespace headfold {

/// Reads the hooks from the environment, once per process: HEADFOLD_TEST_HANG, HEADFOLD_TEST_KILL,
/// HEADFOLD_TEST_FREEZE and HEADFOLD_TEST_STOP, each "RANK:TEXT" or "RANK:TEXT:N". Rank RANK sleeps for ever, dies of
/// SIGKILL or stops (SIGSTOP: its threads too) or is asked to stop (SIGUSR1) when it comes to a point whose name
/// contains TEXT, for the Nth time (default: the first). UsageError for anything else. `rank` is this process's.
void set_test_points(int rank);
/// Whether any hook is set: names of points need not be made up otherwise.
bool has_test_points();
/// A point that a hook may name: operations of the communicator ("barrier 'end of job'", "all-reduce", "receive", …)
/// before they begin, "progress WHAT" at every step that a job counts, "publish FILE" before a finished temporary gets
/// its name. Safe on any thread.
void test_point(std::string_view name);

}  // namespace headfold
