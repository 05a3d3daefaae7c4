#pragma once
// Start-up checks: do all ranks see the same files?

#include <headfold/comm/communicator.h>

#include <filesystem>
#include <string>
#include <vector>

namespace headfold::comm {

/// What tells one file from another quickly: size and a hash ("1234 bytes, 1f0c…"), of everything up to 64 MiB, else of
/// its first and last 64 KiB and of 4 KiB every 8 MiB (at most 1024 times); "not there" for what is absent or cannot be
/// read.
std::string file_identity(const std::filesystem::path& path);

/// Throws InputError on every rank when ranks see different `paths`: it names the first such file, who sees what, and
/// hosts. Of a folder that is its config.json, headfold.json, the index, and name and size of every .safetensors file.
/// What no rank sees is no difference. Collective; the same paths on every rank.
void require_same_files(const Communicator& world, const std::vector<std::filesystem::path>& paths);

}  // namespace headfold::comm
