#include "cublas.h"

#include <headfold/base/cuda.h>
#include <headfold/base/error.h>

#ifdef HEADFOLD_WITH_CUDA
#include <cublas_v2.h>

#include <algorithm>
#include <limits>
#include <map>
#endif

namespace headfold::linalg {

#ifdef HEADFOLD_WITH_CUDA
namespace {

void check_cublas(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw DeviceFailure(fmt::format("cuBLAS {}: {}", what, cublasGetStatusString(status)));
}

struct CublasHandle {
  CublasHandle() { check_cublas(cublasCreate(&value), "cublasCreate"); }
  ~CublasHandle() { cublasDestroy(value); }
  CublasHandle(const CublasHandle&) = delete;
  CublasHandle& operator=(const CublasHandle&) = delete;
  cublasHandle_t value = nullptr;
};

/// The calling thread's handle for the current device; on the legacy default stream, where libtorch computes.
cublasHandle_t cublas_handle(int device) {
  thread_local std::map<int, CublasHandle> handles;
  return handles[device].value;
}

int narrow_to_int(std::int64_t value) {
  if (value > std::numeric_limits<int>::max()) throw InternalError(fmt::format("{} rows in one product", value));
  return static_cast<int>(value);
}

bool rows_are_contiguous(const at::Tensor& x) {
  return x.size(1) <= 1 || x.stride(1) == 1;
}
/// Elements from one row to the next; a single row may claim any.
int row_stride(const at::Tensor& x) {
  return narrow_to_int(std::max(x.stride(0), x.size(1)));
}

}  // namespace

void require_cublas() {}

void cublas_product(const at::Tensor& left, const at::Tensor& right, at::Tensor& out) {
  const auto type = left.scalar_type() == at::kBFloat16 ? CUDA_R_16BF : CUDA_R_32F;
  if ((type == CUDA_R_32F && left.scalar_type() != at::kFloat) || right.scalar_type() != left.scalar_type() ||
      out.scalar_type() != at::kFloat || left.size(0) != right.size(0) || out.size(0) != left.size(1) ||
      out.size(1) != right.size(1) || !rows_are_contiguous(left) || !rows_are_contiguous(right) ||
      !out.is_contiguous() || !out.is_cuda() || left.device() != out.device() || right.device() != out.device())
    throw InternalError(fmt::format("a device product of [{}] and [{}] into [{}]", fmt::join(left.sizes(), " x "),
                                    fmt::join(right.sizes(), " x "), fmt::join(out.sizes(), " x ")));
  const int device = out.device().index();
  const cuda::UseDevice use(device);
  const float one = 1, zero = 0;
  // Row-major [m, n] is column-major [n, m] to cuBLAS: out^T = right^T left, where a row-major [tokens, k] is already
  // the transpose.
  check_cublas(cublasGemmEx(cublas_handle(device), CUBLAS_OP_N, CUBLAS_OP_T, narrow_to_int(right.size(1)),
                            narrow_to_int(left.size(1)), narrow_to_int(left.size(0)), &one, right.data_ptr(), type,
                            row_stride(right), left.data_ptr(), type, row_stride(left), &zero, out.data_ptr(),
                            CUDA_R_32F, narrow_to_int(out.size(1)), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
               "cublasGemmEx");
}
#else
void require_cublas() {
  throw NotCompiled("cuBLAS", "HEADFOLD_CUDA=ON");
}
void cublas_product(const at::Tensor&, const at::Tensor&, at::Tensor&) {
  require_cublas();
}
#endif

}  // namespace headfold::linalg
