#pragma once
// Signals that ask a job to end in good order: SIGTERM and SIGUSR1, as batch systems send them before time is up.

#include <filesystem>

namespace headfold {

/// From here on SIGTERM and SIGUSR1 are remembered instead of ending the process, a moment after they were sent. They
/// interrupt neither the calling thread nor those that it starts later: call it early.
void listen_for_stop();
/// Whether one has come to this process, or a file that it watches exists. Files are looked for once a second at
/// most (file systems of clusters are slow at that); once it has said yes it goes on saying so.
bool stop_requested();
/// From here on stop_requested() looks for this file too.
void watch_stop_file(const std::filesystem::path& file);
/// Ends that for all files: another job of the same process begins.
void forget_stop_files();
/// The file STOP beside an output: in the folder that holds this file or folder.
std::filesystem::path stop_file_beside(const std::filesystem::path& output);
/// Whether one has come or the file STOP exists in `folder`.
bool stop_requested(const std::filesystem::path& folder);

}  // namespace headfold
