#pragma once
// Which GPU a rank computes on.

#include <headfold/comm/communicator.h>

#include <cstdint>
#include <string>
#include <vector>

namespace headfold::device {

/// PCI addresses of the GPUs this process may use, in device order; empty without CUDA or without a GPU.
std::vector<std::string> visible_gpus();

/// What choose_gpus() knows of a rank: its machine (the real host, not a virtual node) and the GPUs it sees there.
struct RankGpus {
  std::string machine;
  std::vector<std::string> gpus;
};
/// For each rank the index of its GPU among those it sees, -1 for none: its own one where the launcher gave each rank
/// one, otherwise the GPU of its place among the machine's ranks. UsageError that names ranks, machine and GPU when two
/// ranks would share one, unless `share`.
std::vector<int> choose_gpus(const std::vector<RankGpus>& ranks, bool share);

/// Memory of a GPU in bytes, whoever uses it.
struct GpuMemory {
  std::uint64_t total = 0;
  std::uint64_t free = 0;
  std::uint64_t used() const { return total - free; }
};
/// Of GPU `index`. Throws NotCompiled without CUDA, Error when the GPU cannot be asked.
GpuMemory gpu_memory(int index);

/// From here on CUDA calls of this thread are for device `index` (nothing for -1). Throws NotCompiled without CUDA.
void use_gpu(int index);

}  // namespace headfold::device
