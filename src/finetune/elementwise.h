#pragma once
// Private: row-wise steps of a layer and their derivatives, over the vectorised kernels of headfold::model (float32,
// bfloat16) or plain loops (float64, for tests). Rows run in parallel.

#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

namespace headfold::finetune {

/// RMSNorm of the rows of x [rows, n], or LayerNorm where `bias` is defined. New tensor.
at::Tensor normalise(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps);
/// dx += gradient with respect to x; dweight and dbias [n] (float32 or float64) += theirs where defined.
void normalise_backward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps,
                        const at::Tensor& dy, const at::Tensor& dx, const at::Tensor& dweight, const at::Tensor& dbias);

/// cos and sin of positions 0, 1, … and frequencies [positions, head_dim / 2], float32, rounded to a compute dtype.
struct Rotation {
  at::Tensor cosine, sine;
  std::vector<std::int64_t> positions;  ///< of every row
};
/// Rotates x [rows, heads, head_dim] (contiguous channels) in place; backwards with `inverse`, which is also the
/// gradient's way.
void rotate(const at::Tensor& x, const Rotation& rotation, bool inverse);

/// silu(gate) * up, new tensor.
at::Tensor silu_times(const at::Tensor& gate, const at::Tensor& up);
/// gate and up become their gradients.
void silu_times_backward(const at::Tensor& gate, const at::Tensor& up, const at::Tensor& dy);
/// GELU in its tanh form, new tensor.
at::Tensor gelu_of(const at::Tensor& x);
/// x becomes its gradient.
void gelu_gradient(const at::Tensor& x, const at::Tensor& dy);

/// One row of scores [n] in place: probabilities = softmax(scale * scores + slope * position) into `probabilities` of
/// type `dtype`; both may be the same memory when `dtype` is the scores' own.
void softmax_row(at::ScalarType dtype, void* scores, void* probabilities, std::int64_t n, double scale, double slope);
/// dscores = scale * p * (dp - sum of p dp), of type `dtype`; dp is float32 (float64), may be dscores itself.
void softmax_row_backward(at::ScalarType dtype, const void* probabilities, const void* dp, void* dscores,
                          std::int64_t n, double scale);
/// y = exp((x - shift) * factor), gives the sum.
double exponential_sum(const float* x, float* y, std::int64_t n, double shift, double factor);
double exponential_sum(const double* x, double* y, std::int64_t n, double shift, double factor);

/// LoRA dropout: elements are dropped with probability p, the others divided by what p is exactly 1 - p of (p is
/// rounded to 1/65536). The mask of an element is a hash of key, its sequence's number, its token and its channel, so
/// it can be made again at any time, on any rank.
struct DropoutMask {
  double p = 0;
  std::uint64_t key = 0;
  std::int64_t tokens = 1;                             ///< rows of one sequence
  const std::vector<std::int64_t>* numbers = nullptr;  ///< of each sequence
};
/// x with dropped elements 0, new tensor [rows, n].
at::Tensor drop(const at::Tensor& x, const DropoutMask& mask);
/// dx += what passes through the mask of dy; dy is overwritten.
void add_dropped(const at::Tensor& dx, const at::Tensor& dy, const DropoutMask& mask);

}  // namespace headfold::finetune
