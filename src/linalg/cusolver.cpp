#include "cusolver.h"

#include <headfold/base/error.h>
#include <headfold/base/log.h>

#ifdef HEADFOLD_WITH_CUDA
#include <cuda_runtime_api.h>
#include <cusolverDn.h>

#include <limits>
#endif

namespace headfold::linalg {

#ifdef HEADFOLD_WITH_CUDA
namespace {

/// Says once per process why the device is not used.
void warn_once(const std::string& reason) {
  static bool said = false;
  if (!said) spdlog::warn("cuSOLVER is not used: {}; falling back to LAPACK", reason);
  said = true;
}

class Failure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw Failure(fmt::format("{}: {}", what, cudaGetErrorString(status)));
}
void check(cusolverStatus_t status, const char* what) {
  if (status != CUSOLVER_STATUS_SUCCESS) throw Failure(fmt::format("{}: status {}", what, static_cast<int>(status)));
}

/// Device memory of one call.
class Buffer {
 public:
  explicit Buffer(std::size_t bytes) { check(cudaMalloc(&data_, std::max<std::size_t>(bytes, 1)), "cudaMalloc"); }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  template <class T>
  T* as() {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

struct Handle {
  Handle() { check(cusolverDnCreate(&value), "cusolverDnCreate"); }
  ~Handle() { cusolverDnDestroy(value); }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  cusolverDnHandle_t value = nullptr;
};

}  // namespace

void require_cusolver() {}

std::optional<std::pair<at::Tensor, at::Tensor>> cusolver_eigh(const at::Tensor& matrix) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    cudaGetLastError();  // clears the sticky "no device"
    warn_once("no CUDA device is usable");
    return std::nullopt;
  }
  try {
    const bool is_complex = matrix.is_complex();
    if (matrix.size(0) > std::numeric_limits<int>::max()) throw Failure("the matrix is too large");
    const int n = static_cast<int>(matrix.size(0));
    // Column-major for the library: A^T row-major is A column-major.
    at::Tensor host = matrix.transpose(0, 1).clone(at::MemoryFormat::Contiguous);
    at::Tensor values = at::empty({n}, at::kDouble);
    const std::size_t bytes = static_cast<std::size_t>(host.numel()) * host.element_size();
    Handle handle;
    Buffer a(bytes), w(sizeof(double) * static_cast<std::size_t>(n)), info(sizeof(int));
    check(cudaMemcpy(a.as<void>(), host.data_ptr(), bytes, cudaMemcpyHostToDevice), "copy to the device");
    int work_size = 0;
    const auto mode = CUSOLVER_EIG_MODE_VECTOR;
    const auto half = CUBLAS_FILL_MODE_LOWER;
    if (is_complex) {
      auto* data = a.as<cuDoubleComplex>();
      check(cusolverDnZheevd_bufferSize(handle.value, mode, half, n, data, n, w.as<double>(), &work_size), "zheevd");
      Buffer work(sizeof(cuDoubleComplex) * static_cast<std::size_t>(work_size));
      check(cusolverDnZheevd(handle.value, mode, half, n, data, n, w.as<double>(), work.as<cuDoubleComplex>(),
                             work_size, info.as<int>()),
            "zheevd");
      check(cudaDeviceSynchronize(), "zheevd");
    } else {
      auto* data = a.as<double>();
      check(cusolverDnDsyevd_bufferSize(handle.value, mode, half, n, data, n, w.as<double>(), &work_size), "dsyevd");
      Buffer work(sizeof(double) * static_cast<std::size_t>(work_size));
      check(cusolverDnDsyevd(handle.value, mode, half, n, data, n, w.as<double>(), work.as<double>(), work_size,
                             info.as<int>()),
            "dsyevd");
      check(cudaDeviceSynchronize(), "dsyevd");
    }
    int failed = 0;
    check(cudaMemcpy(&failed, info.as<int>(), sizeof(int), cudaMemcpyDeviceToHost), "copy from the device");
    if (failed != 0) throw Failure(fmt::format("no convergence (info {})", failed));
    check(cudaMemcpy(host.data_ptr(), a.as<void>(), bytes, cudaMemcpyDeviceToHost), "copy from the device");
    check(cudaMemcpy(values.data_ptr(), w.as<void>(), sizeof(double) * static_cast<std::size_t>(n),
                     cudaMemcpyDeviceToHost),
          "copy from the device");
    return std::make_pair(values, host.transpose(0, 1).contiguous());
  } catch (const Failure& failure) {
    warn_once(failure.what());
    return std::nullopt;
  }
}
#else
void require_cusolver() {
  throw NotCompiled("cuSOLVER", "HEADFOLD_CUDA=ON");
}
std::optional<std::pair<at::Tensor, at::Tensor>> cusolver_eigh(const at::Tensor&) {
  throw NotCompiled("cuSOLVER", "HEADFOLD_CUDA=ON");
}
#endif

}  // namespace headfold::linalg
