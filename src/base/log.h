#pragma once
// Logging: rank 0 speaks on the terminal, every rank may keep a file. Use spdlog's own functions (spdlog::info, …)
// everywhere.

#include <spdlog/spdlog.h>

#include <filesystem>
#include <string>

namespace headfold {

/// Name of this host: Slurm's name of the node where there is one (two virtual nodes of a test cluster share a host
/// name), otherwise the host's own.
std::string host_name();

/// Sets up the default logger. Rank 0 logs at info to standard error, other ranks at error only; with `folder` every
/// rank also appends to `folder/HOST-RANK.log`. `verbose` lowers the level to debug. IoError when that file cannot be
/// written.
void start_logging(int rank, int size, const std::filesystem::path& folder = {}, bool verbose = false);

/// "1.5 GiB", "640 KiB", … for a number of bytes.
std::string human_bytes(double bytes);
/// "1 h 02 min", "3 min 10 s", "4.2 s", "310 ms" for seconds.
std::string human_seconds(double seconds);

}  // namespace headfold
