#include "cusolver.h"

#include <headfold/base/cuda.h>
#include <headfold/base/error.h>
#include <headfold/base/log.h>

#ifdef HEADFOLD_WITH_CUDA
#include <cusolverDn.h>

#include <atomic>
#include <limits>
#include <map>
#include <vector>
#endif

namespace headfold::linalg {

#ifdef HEADFOLD_WITH_CUDA
namespace {

/// Says once per process why the device is not used.
void warn_once(const std::string& reason) {
  static std::atomic<bool> said{false};
  if (!said.exchange(true)) spdlog::warn("cuSOLVER is not used: {}; falling back to LAPACK", reason);
}

void check_solver(cusolverStatus_t status, const char* what) {
  if (status != CUSOLVER_STATUS_SUCCESS)
    throw DeviceFailure(fmt::format("cuSOLVER {}: status {}", what, static_cast<int>(status)));
}

struct SolverHandle {
  SolverHandle() {
    check_solver(cusolverDnCreate(&handle), "cusolverDnCreate");
    const cusolverStatus_t status = cusolverDnCreateParams(&params);
    if (status != CUSOLVER_STATUS_SUCCESS) cusolverDnDestroy(handle);
    check_solver(status, "cusolverDnCreateParams");
  }
  ~SolverHandle() {
    cusolverDnDestroyParams(params);
    cusolverDnDestroy(handle);
  }
  SolverHandle(const SolverHandle&) = delete;
  SolverHandle& operator=(const SolverHandle&) = delete;
  cusolverDnHandle_t handle = nullptr;
  cusolverDnParams_t params = nullptr;
};

cudaDataType type_of(const at::Tensor& x) {
  return x.is_complex() ? CUDA_C_64F : CUDA_R_64F;
}

/// One per thread and GPU, on the legacy default stream, where libtorch computes.
class Solver {
 public:
  /// Of the current GPU.
  static Solver& of_thread() {
    thread_local std::map<int, Solver> solvers;
    int device = 0;
    cuda::check(cudaGetDevice(&device), "cudaGetDevice");
    return solvers[device];
  }

  /// Column-major matrices at `a` are replaced by their eigenvectors; `w` [batch, n]. Both in device memory.
  void eigen(void* a, double* w, std::int64_t n, std::int64_t batch, cudaDataType type) {
    info_.reserve(sizeof(int) * static_cast<std::size_t>(batch));
    if (batch == 1)
      eigen_of_one(a, w, n, type);
    else
      eigen_of_many(a, w, n, batch, type);
    require_converged(batch);
  }

  /// a [rows, columns], column-major, rows >= columns, is destroyed; u [rows, columns], vh [columns, columns].
  void svd(void* a, double* s, void* u, void* vh, std::int64_t rows, std::int64_t columns, cudaDataType type) {
    info_.reserve(sizeof(int));
    std::size_t device_bytes = 0, host_bytes = 0;
    check_solver(
        cusolverDnXgesvd_bufferSize(solver_.handle, solver_.params, 'S', 'S', rows, columns, type, a, rows, CUDA_R_64F,
                                    s, type, u, rows, type, vh, columns, type, &device_bytes, &host_bytes),
        "cusolverDnXgesvd_bufferSize");
    reserve(device_bytes, host_bytes);
    check_solver(cusolverDnXgesvd(solver_.handle, solver_.params, 'S', 'S', rows, columns, type, a, rows, CUDA_R_64F, s,
                                  type, u, rows, type, vh, columns, type, work_.as(), device_bytes, host_work_.data(),
                                  host_bytes, info_.as<int>()),
                 "cusolverDnXgesvd");
    require_converged(1);
  }

  cuda::DeviceMemory matrix, vectors, more_vectors, values;  // what tensors of the host are copied to

 private:
  void reserve(std::size_t device_bytes, std::size_t host_bytes) {
    work_.reserve(std::max<std::size_t>(device_bytes, 1));
    if (host_work_.size() < host_bytes) host_work_.resize(host_bytes);
  }

  void eigen_of_one(void* a, double* w, std::int64_t n, cudaDataType type) {
    std::size_t device_bytes = 0, host_bytes = 0;
    check_solver(
        cusolverDnXsyevd_bufferSize(solver_.handle, solver_.params, CUSOLVER_EIG_MODE_VECTOR, CUBLAS_FILL_MODE_LOWER, n,
                                    type, a, n, CUDA_R_64F, w, type, &device_bytes, &host_bytes),
        "cusolverDnXsyevd_bufferSize");
    reserve(device_bytes, host_bytes);
    check_solver(cusolverDnXsyevd(solver_.handle, solver_.params, CUSOLVER_EIG_MODE_VECTOR, CUBLAS_FILL_MODE_LOWER, n,
                                  type, a, n, CUDA_R_64F, w, type, work_.as(), device_bytes, host_work_.data(),
                                  host_bytes, info_.as<int>()),
                 "cusolverDnXsyevd");
  }

#if CUSOLVER_VERSION >= 11701
  void eigen_of_many(void* a, double* w, std::int64_t n, std::int64_t batch, cudaDataType type) {
    std::size_t device_bytes = 0, host_bytes = 0;
    check_solver(cusolverDnXsyevBatched_bufferSize(solver_.handle, solver_.params, CUSOLVER_EIG_MODE_VECTOR,
                                                   CUBLAS_FILL_MODE_LOWER, n, type, a, n, CUDA_R_64F, w, type,
                                                   &device_bytes, &host_bytes, batch),
                 "cusolverDnXsyevBatched_bufferSize");
    reserve(device_bytes, host_bytes);
    check_solver(cusolverDnXsyevBatched(solver_.handle, solver_.params, CUSOLVER_EIG_MODE_VECTOR,
                                        CUBLAS_FILL_MODE_LOWER, n, type, a, n, CUDA_R_64F, w, type, work_.as(),
                                        device_bytes, host_work_.data(), host_bytes, info_.as<int>(), batch),
                 "cusolverDnXsyevBatched");
  }
#else
  /// Before CUDA 12.6.2: one after the other.
  void eigen_of_many(void* a, double* w, std::int64_t n, std::int64_t batch, cudaDataType type) {
    const std::int64_t bytes = n * n * (type == CUDA_C_64F ? 16 : 8);
    for (std::int64_t i = 0; i < batch; ++i) {
      eigen_of_one(static_cast<char*>(a) + i * bytes, w + i * n, n, type);
      require_converged(1);
    }
    cuda::check(cudaMemset(info_.as(), 0, sizeof(int) * static_cast<std::size_t>(batch)), "cudaMemset");
  }
#endif

  /// Waits for the factorisation.
  void require_converged(std::int64_t batch) {
    std::vector<int> info(static_cast<std::size_t>(batch));
    cuda::check(cudaMemcpy(info.data(), info_.as(), sizeof(int) * info.size(), cudaMemcpyDeviceToHost),
                "copy from the device");
    for (const int one : info)
      if (one != 0) throw DeviceFailure(fmt::format("cuSOLVER: no convergence (info {})", one));
  }

  SolverHandle solver_;
  cuda::DeviceMemory work_, info_;
  std::vector<char> host_work_;
};

std::size_t bytes_of(const at::Tensor& x) {
  return static_cast<std::size_t>(x.numel()) * x.element_size();
}
void to_device(const cuda::DeviceMemory& memory, const at::Tensor& host) {
  cuda::check(cudaMemcpy(memory.as(), host.data_ptr(), bytes_of(host), cudaMemcpyHostToDevice), "copy to the device");
}
void to_host(at::Tensor& host, const cuda::DeviceMemory& memory) {
  cuda::check(cudaMemcpy(host.data_ptr(), memory.as(), bytes_of(host), cudaMemcpyDeviceToHost), "copy from the device");
}

/// Runs `work`; nothing when it cannot be done on a GPU.
template <class Result, class Work>
std::optional<Result> on_gpu(const at::Tensor& x, const Work& work) {
  try {
    if (cuda::device_count() == 0) throw DeviceFailure("no CUDA device is usable");
    const cuda::UseDevice use(x.is_cuda() ? x.device().index() : -1);
    return work(Solver::of_thread());
  } catch (const DeviceFailure& failure) {
    warn_once(failure.what());
    return std::nullopt;
  }
}

}  // namespace

void require_cusolver() {}

std::optional<std::pair<at::Tensor, at::Tensor>> cusolver_eigh(const at::Tensor& matrices) {
  using Result = std::pair<at::Tensor, at::Tensor>;
  return on_gpu<Result>(matrices, [&](Solver& solver) -> Result {
    const std::int64_t batch = matrices.size(0), n = matrices.size(1);
    // Row-major A is column-major A^T = conj(A), whose eigenvectors are the conjugates of A's; its columns come back as
    // our rows.
    at::Tensor rows = matrices.clone(at::MemoryFormat::Contiguous);
    at::Tensor values = at::empty({batch, n}, matrices.options().dtype(at::kDouble));
    if (matrices.is_cuda()) {
      solver.eigen(rows.data_ptr(), values.data_ptr<double>(), n, batch, type_of(rows));
    } else {
      solver.matrix.reserve(bytes_of(rows));
      solver.values.reserve(bytes_of(values));
      to_device(solver.matrix, rows);
      solver.eigen(solver.matrix.as(), solver.values.as<double>(), n, batch, type_of(rows));
      to_host(rows, solver.matrix);
      to_host(values, solver.values);
    }
    return {values, rows.transpose(1, 2).conj().resolve_conj().contiguous()};
  });
}

std::optional<std::tuple<at::Tensor, at::Tensor, at::Tensor>> cusolver_svd(const at::Tensor& matrix) {
  using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
  return on_gpu<Result>(matrix, [&](Solver& solver) -> Result {
    // The library wants at least as many rows as columns. A wide row-major A [m, n] is column-major A^T [n, m], tall; a
    // tall one is transposed to be wide. A^T = U' S V' makes A = V'^T S U'^T, and row-major views are transposes.
    const bool wide = matrix.size(0) <= matrix.size(1);
    at::Tensor a = (wide ? matrix : matrix.t()).clone(at::MemoryFormat::Contiguous);
    const std::int64_t k = a.size(0), n = a.size(1);
    at::Tensor s = at::empty({k}, a.options().dtype(at::kDouble));
    at::Tensor left = at::empty({k, k}, a.options()), right = at::empty({k, n}, a.options());
    if (a.is_cuda()) {
      solver.svd(a.data_ptr(), s.data_ptr<double>(), right.data_ptr(), left.data_ptr(), n, k, type_of(a));
    } else {
      solver.matrix.reserve(bytes_of(a));
      solver.values.reserve(bytes_of(s));
      solver.vectors.reserve(bytes_of(right));
      solver.more_vectors.reserve(bytes_of(left));
      to_device(solver.matrix, a);
      solver.svd(solver.matrix.as(), solver.values.as<double>(), solver.vectors.as(), solver.more_vectors.as(), n, k,
                 type_of(a));
      to_host(s, solver.values);
      to_host(right, solver.vectors);
      to_host(left, solver.more_vectors);
    }
    if (wide) return {left, s, right};
    return {right.t().contiguous(), s, left.t().contiguous()};
  });
}
#else
void require_cusolver() {
  throw NotCompiled("cuSOLVER", "HEADFOLD_CUDA=ON");
}
std::optional<std::pair<at::Tensor, at::Tensor>> cusolver_eigh(const at::Tensor&) {
  throw NotCompiled("cuSOLVER", "HEADFOLD_CUDA=ON");
}
std::optional<std::tuple<at::Tensor, at::Tensor, at::Tensor>> cusolver_svd(const at::Tensor&) {
  throw NotCompiled("cuSOLVER", "HEADFOLD_CUDA=ON");
}
#endif

}  // namespace headfold::linalg
