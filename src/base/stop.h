#pragma once
// Signals that ask a job to end in good order: SIGTERM and SIGUSR1, as batch systems send them before time is up.

#include <filesystem>

namespace headfold {

/// From here on SIGTERM and SIGUSR1 are remembered instead of ending the process.
void listen_for_stop();
/// Whether one has come, to this process.
bool stop_requested();
/// Whether one has come or the file STOP exists in `folder`.
bool stop_requested(const std::filesystem::path& folder);

}  // namespace headfold
