#pragma once
// Products of tensors on any device with the precision that headfold's own have. Private to libraries above model.

#include <ATen/ATen.h>

#if __has_include(<torch/version.h>)
#include <torch/version.h>
#endif
#if defined(TORCH_VERSION_MAJOR) && (TORCH_VERSION_MAJOR > 2 || (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 8))
#define HEADFOLD_TORCH_WIDE_PRODUCTS  // products of bfloat16 with float32 results (GPUs)
#endif
#if defined(TORCH_VERSION_MAJOR) && (TORCH_VERSION_MAJOR > 2 || (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 1))
#define HEADFOLD_TORCH_FUSED_ATTENTION  // with a scale of its own
#endif

namespace headfold::model {

/// What products of `dtype` are accumulated in: float64 for itself, else float32.
inline at::ScalarType wide_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

/// a b (2-d, or batches of equal shape, 3-d and more) in wide_type(): nothing is rounded to bfloat16 on the way.
inline at::Tensor wide_matmul(const at::Tensor& a, const at::Tensor& b) {
#ifdef HEADFOLD_TORCH_WIDE_PRODUCTS
  if (a.is_cuda() && a.scalar_type() == at::kBFloat16) {
    if (a.dim() == 2) return at::mm(a, b, at::kFloat);
    std::vector<std::int64_t> sizes = a.sizes().vec();
    sizes.back() = b.size(-1);
    return at::bmm(a.reshape({-1, a.size(-2), a.size(-1)}), b.reshape({-1, b.size(-2), b.size(-1)}), at::kFloat)
        .view(sizes);
  }
#endif
  const at::ScalarType wide = wide_type(a.scalar_type());
  return at::matmul(a.to(wide), b.to(wide));
}

/// The same, rounded once to the operands' dtype: by the units for it on a GPU, and over float32 on the CPU, where
/// libtorch's own bfloat16 products are slow.
inline at::Tensor narrow_matmul(const at::Tensor& a, const at::Tensor& b) {
  return a.is_cuda() ? at::matmul(a, b) : wide_matmul(a, b).to(a.scalar_type());
}

/// softmax(scale * scores + ALiBi) of scores [.., heads, rows, keys], float32, which are overwritten: row i stands at
/// position first + i and sees the keys up to its own. `slopes` [heads] float32 on their device, or undefined; the bias
/// is rounded to `dtype` as the native kernels do, and so is the result.
at::Tensor causal_probabilities(const at::Tensor& scores, double scale, const at::Tensor& slopes, std::int64_t first,
                                at::ScalarType dtype);

}  // namespace headfold::model
