#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <dlfcn.h>
#include <headfold/base/files.h>
#include <headfold/base/log.h>
#include <headfold/device/device.h>
#include <malloc.h>
#include <sched.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <new>
#include <thread>
#include <utility>

namespace headfold::device {
namespace {

/// Tensors in blocks of malloc, aligned inside. It has what libtorch 1.13 (allocate is const) and 2.x (it is not, and
/// there is copy_data) ask for.
class PlainBlocks : public c10::Allocator {  // NOLINT(cppcoreguidelines-virtual-class-destructor)
 public:
  c10::DataPtr allocate(std::size_t bytes) const {  // NOLINT(modernize-use-override)
    constexpr std::size_t kAlignment = 64;
    if (bytes == 0) return {nullptr, nullptr, &std::free, c10::Device(c10::kCPU)};
    void* const block = std::malloc(bytes + kAlignment);
    if (block == nullptr) throw std::bad_alloc();
    const std::size_t past = reinterpret_cast<std::uintptr_t>(block) % kAlignment;
    char* const aligned = static_cast<char*>(block) + (past == 0 ? 0 : kAlignment - past);
    return {aligned, block, &std::free, c10::Device(c10::kCPU)};
  }
  c10::DataPtr allocate(std::size_t bytes) { return std::as_const(*this).allocate(bytes); }              // NOLINT
  void copy_data(void* to, const void* from, std::size_t bytes) const { std::memcpy(to, from, bytes); }  // NOLINT
};

}  // namespace

void reuse_freed_tensors() {
  static PlainBlocks blocks;
  c10::SetCPUAllocator(&blocks, 1);
}

void keep_freed_memory(int largest) {
  constexpr int largest_threshold = 32 << 20;  // what glibc accepts on 64-bit machines
  ::mallopt(M_MMAP_THRESHOLD, std::min(largest, largest_threshold));
  ::mallopt(M_TRIM_THRESHOLD, 512 << 20);
  ::mallopt(M_TOP_PAD, 16 << 20);
}

void release_freed_memory() {
  ::malloc_trim(0);
}

std::string blas_kernels() {
  using CoreName = char* (*)();
  const auto core_name = reinterpret_cast<CoreName>(::dlsym(RTLD_DEFAULT, "openblas_get_corename"));
  return core_name == nullptr ? std::string() : std::string(core_name());
}

void restart_with_fast_blas([[maybe_unused]] char** argv) {
#if defined(__x86_64__)
  if (std::getenv("OPENBLAS_CORETYPE") != nullptr || std::getenv("HEADFOLD_RESTARTED") != nullptr) return;
  const std::string kernels = blas_kernels();
  bool old = false;
  for (const char* name : {"Prescott", "Core2", "Penryn", "Dunnington", "Nehalem", "Generic"})
    old = old || kernels == name;
  if (!old) return;
  const char* better = nullptr;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) better = "Haswell";
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    better = "SkylakeX";
  if (better == nullptr) return;
  ::setenv("OPENBLAS_CORETYPE", better, 1);
  ::setenv("HEADFOLD_RESTARTED", "1", 1);
  ::execv("/proc/self/exe",
          argv);  // returns only when it failed; then the slow kernels still compute the right numbers
#endif
}

int usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (::sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  return std::max(1, CPU_COUNT(&set));
}

std::string cores_text() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (::sched_getaffinity(0, sizeof(set), &set) != 0) return "unknown";
  std::string text;
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (!CPU_ISSET(core, &set)) continue;
    int last = core;
    while (last + 1 < CPU_SETSIZE && CPU_ISSET(last + 1, &set)) ++last;
    text += fmt::format("{}{}", text.empty() ? "" : ",", core);
    if (last > core) text += fmt::format("-{}", last);
    core = last;
  }
  return text;
}

int use_threads(const comm::Communicator& world, int threads) {
  if (threads == 0) {
    const comm::Communicator host = world.split_by_host();
    // Under a launcher that binds ranks to cores the affinity mask is already this rank's own share.
    const int cores = usable_cores();
    const auto widest = static_cast<int>(host.all_reduce(static_cast<std::int64_t>(cores), comm::Reduce::max));
    const bool bound = host.size() > 1 && widest * host.size() <= static_cast<int>(std::thread::hardware_concurrency());
    threads = std::max(1, bound ? cores : cores / host.size());
  }
  at::set_num_threads(threads);
  return threads;
}

std::string blas_library() {
  // The loader's own answer to "whose sgemm is this?"; the file behind the link names the vendor.
  void* symbol = ::dlsym(RTLD_DEFAULT, "sgemm_");
  Dl_info info{};
  if (symbol == nullptr || ::dladdr(symbol, &info) == 0 || info.dli_fname == nullptr) return "unknown";
  std::error_code code;
  const fs::path real = fs::canonical(info.dli_fname, code);
  return code ? std::string(info.dli_fname) : real.string();
}

namespace {
/// The last folder and the file name: Debian's libraries of all vendors are called libblas.so.3.
std::string blas_name() {
  const fs::path library = blas_library();
  const std::string kernels = blas_kernels();
  return (library.parent_path().filename() / library.filename()).string() +
         (kernels.empty() ? std::string() : fmt::format(" ({} kernels)", kernels));
}
}  // namespace

void warn_about_slow_blas() {
  const std::string library = blas_library();
  for (const char* fast : {"openblas", "mkl", "blis", "atlas", "nvpl", "armpl"})
    if (library.find(fast) != std::string::npos) return;
  if (library == "unknown" || library.find("libblas") == std::string::npos) return;  // built into libtorch
  spdlog::warn(
      "libtorch runs on the reference BLAS ({}), tens of times slower than OpenBLAS; install libopenblas-openmp-dev",
      library);
}

bool fast_bfloat16() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);)
    if (line.rfind("flags", 0) == 0)
      return line.find(" amx_bf16") != std::string::npos || line.find(" avx512_bf16") != std::string::npos;
  return false;
}

std::string describe_device() {
  return fmt::format("{}: {} thread(s), {} memory available, BLAS {}", comm::Environment::host(), at::get_num_threads(),
                     human_bytes(static_cast<double>(available_memory_bytes())), blas_name());
}

}  // namespace headfold::device
