#include <headfold/base/error.h>
#include <headfold/device/gpu.h>

#include <map>
#include <utility>

#ifdef HEADFOLD_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace headfold::device {

std::vector<std::string> visible_gpus() {
  std::vector<std::string> gpus;
#ifdef HEADFOLD_WITH_CUDA
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // clears the sticky "no device"
    return gpus;
  }
  for (int device = 0; device < count; ++device) {
    char address[32] = {};
    if (cudaDeviceGetPCIBusId(address, sizeof(address), device) == cudaSuccess) gpus.emplace_back(address);
  }
#endif
  return gpus;
}

std::vector<int> choose_gpus(const std::vector<RankGpus>& ranks, bool share) {
  std::vector<int> chosen;
  std::map<std::string, std::size_t> placed;                          // ranks so far, by machine
  std::map<std::pair<std::string, std::string>, std::size_t> takers;  // first rank, by machine and GPU
  for (std::size_t rank = 0; rank < ranks.size(); ++rank) {
    const auto& [machine, gpus] = ranks[rank];
    const std::size_t place = placed[machine]++;
    if (gpus.empty()) {
      chosen.push_back(-1);
      continue;
    }
    const std::size_t index = place % gpus.size();
    chosen.push_back(static_cast<int>(index));
    const auto [taker, first] = takers.try_emplace({machine, gpus[index]}, rank);
    if (!first && !share)
      throw UsageError(
          fmt::format("ranks {} and {} on {} would share the GPU {}", taker->second, rank, machine, gpus[index]),
          "start as many ranks per node as it has GPUs (--ntasks-per-node), give each its own (--gpus-per-task=1), or "
          "allow it with --share-gpus");
  }
  return chosen;
}

GpuMemory gpu_memory([[maybe_unused]] int index) {
#ifdef HEADFOLD_WITH_CUDA
  int before = 0;
  std::size_t free = 0, total = 0;
  cudaError_t status = cudaGetDevice(&before);
  if (status == cudaSuccess) status = cudaSetDevice(index);
  if (status == cudaSuccess) status = cudaMemGetInfo(&free, &total);
  if (status == cudaSuccess) status = cudaSetDevice(before);
  if (status != cudaSuccess) {
    cudaGetLastError();  // clears a sticky "no device"
    throw Error(ExitCode::internal, fmt::format("memory of GPU {}: {}", index, cudaGetErrorString(status)));
  }
  return {total, free};
#else
  throw NotCompiled("CUDA", "HEADFOLD_CUDA=ON");
#endif
}

void use_gpu(int index) {
  if (index < 0) return;
#ifdef HEADFOLD_WITH_CUDA
  if (const cudaError_t status = cudaSetDevice(index); status != cudaSuccess)
    throw Error(ExitCode::internal, fmt::format("GPU {} cannot be used: {}", index, cudaGetErrorString(status)));
#else
  throw NotCompiled("CUDA", "HEADFOLD_CUDA=ON");
#endif
}

}  // namespace headfold::device
