#pragma once
// Internal: elementwise kernels of a decoder layer, one pass over memory each, float32 inside. Compiled for AVX-512,
// AVX2 and the baseline; the best one that this processor has is chosen at run time.

#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

namespace headfold::model::kernels {

/// What the kernels need to know about one row of attention scores.
struct ScoreRow {
  std::int64_t visible = 0;  ///< leading entries that the causal mask lets through
  std::int64_t total = 0;    ///< entries of the row; those from `visible` on become 0
  float scale = 1;           ///< 1 / sqrt(head_dim)
  float slope =
      0;  ///< ALiBi slope of the head; 0 = none. The bias is slope * position, rounded to the row's output type
};

/// Kernels over elements of one type: float, or bfloat16 passed as std::uint16_t bits. Pointers are void so that one
/// table serves both.
struct Table {
  const char* isa;
  /// y = round(x / sqrt(mean(x^2) + eps)) * weight, n elements (RMSNorm, docs/formats.md "Arithmetic that must match").
  void (*rms_norm)(const void* x, const void* weight, void* y, std::int64_t n, float eps);
  /// y = (x - mean) / sqrt(var + eps) * weight + bias, biased variance.
  void (*layer_norm)(const void* x, const void* weight, const void* bias, void* y, std::int64_t n, float eps);
  /// rotate_half rotation of one head: y[i] = x[i] cos[i] - x[i + half] sin[i], y[i + half] = x[i + half] cos[i] + x[i]
  /// sin[i].
  void (*rotate)(const void* x, const float* cosine, const float* sine, void* y, std::int64_t half);
  /// gate = silu(gate) * up.
  void (*silu_times)(void* gate, const void* up, std::int64_t n);
  /// x = 0.5 x (1 + tanh(0.79788456 x (1 + 0.044715 x^2))).
  void (*gelu)(void* x, std::int64_t n);
  /// probabilities = softmax(scale * scores + bias) over the visible entries; scores (float) are overwritten.
  void (*softmax)(float* scores, void* probabilities, const ScoreRow& row);
  /// sums[j] = sum over i < n of a[i] * b[j * stride + i], j < count, in float.
  void (*dots)(const void* a, const void* b, std::int64_t stride, std::int64_t count, std::int64_t n, float* sums);
  /// sum[i] += factor * x[i], sum in float.
  void (*add_scaled)(float* sum, float factor, const void* x, std::int64_t n);
  /// values = x, to float.
  void (*load)(const void* x, float* values, std::int64_t n);
  /// x = round(values), float to the element type.
  void (*store)(const float* values, void* x, std::int64_t n);
  /// Derivatives, for training. dx += the gradient of rms_norm with respect to x given dy; dweight += the weight's own
  /// (float, of this row alone) unless null.
  void (*rms_norm_backward)(const void* x, const void* weight, const void* dy, void* dx, float* dweight, std::int64_t n,
                            float eps);
  /// The same of layer_norm; dweight and dbias are both given or both null.
  void (*layer_norm_backward)(const void* x, const void* weight, const void* dy, void* dx, float* dweight, float* dbias,
                              std::int64_t n, float eps);
  /// gate and up become their gradients, given that of silu(gate) * up.
  void (*silu_times_backward)(void* gate, void* up, const void* dy, std::int64_t n);
  /// x becomes its gradient, given that of gelu(x).
  void (*gelu_backward)(void* x, const void* dy, std::int64_t n);
  /// dscores[j] = scale * p[j] * (dp[j] - sum of p * dp) over n entries: gradient of the raw scores given that of the
  /// probabilities (float). May overwrite dp.
  void (*softmax_backward)(const void* probabilities, const float* dp, void* dscores, std::int64_t n, float scale);
  /// y = exp((x - shift) * factor), gives the sum of y (float whatever the table's type).
  float (*exponential_sum)(const float* x, float* y, std::int64_t n, float shift, float factor);
  /// Dropout of one row: x[i] becomes 0 or keep * x[i]. Four elements share a hash of key + i (i of the first of them);
  /// an element is dropped when its 16 bits of it are below `threshold`. See mixed_bits().
  void (*drop)(void* x, std::int64_t n, std::uint64_t key, std::uint32_t threshold, float keep);
  /// y = exp(x) as the other kernels compute it: relative error below 3e-7 within [-87, 88], 0 below. For tests.
  void (*exponential)(const float* x, float* y, std::int64_t n);
};

/// splitmix64: every bit of x changes every bit of the result.
constexpr std::uint64_t mixed_bits(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15U;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31);
}

/// The table for `dtype` (float32 or bfloat16).
const Table& table(at::ScalarType dtype);
/// Every variant that this processor can run, best first; for tests.
std::vector<Table> variants(at::ScalarType dtype);

}  // namespace headfold::model::kernels
