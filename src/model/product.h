#pragma once
// Internal: matrix products at the full rate of the processor. oneDNN where it is compiled in (its own kernels for
// AVX-512 and AMX), ATen otherwise. Processors without products of bfloat16 (x86 before AVX-512) widen it in tiles.

#include <ATen/ATen.h>

#include <cstdint>

namespace headfold::model {

/// Uninitialised tensor whose memory asks for huge pages: matrix products walk far-apart rows, and small pages cost
/// them several percent.
at::Tensor large_empty(at::IntArrayRef sizes, at::ScalarType dtype);

/// A weight matrix [out, in] with an optional bias. The weight stays as it is stored: oneDNN's packed layouts were
/// measured 25 % slower for thousands of rows (bfloat16, AMX), and single rows are served by a kernel of our own.
class Product {
 public:
  /// `weight` [out, in] and `bias` [out] (may be undefined) of any floating-point dtype; both are copied to `dtype`.
  Product(const at::Tensor& weight, const at::Tensor& bias, at::ScalarType dtype);
  /// y = x W^T + bias, or y += x W^T + bias. x [rows, in] and y [rows, out] with contiguous rows, in the product's
  /// dtype; accumulation in float32 with one rounding at the end (bias and old y included where oneDNN is compiled in).
  /// Safe for many threads.
  void apply(const at::Tensor& x, const at::Tensor& y, bool accumulate = false) const;
  std::int64_t out() const { return weight_.size(0); }
  std::int64_t in() const { return weight_.size(1); }
  std::int64_t bytes() const;

 private:
  void apply_to_few_rows(const at::Tensor& x, const at::Tensor& y, bool accumulate) const;
  at::Tensor weight_, bias_;
};

/// A row-major matrix operand: `rows` x `columns` with `stride` elements between rows. Densely stored ones are fastest.
struct Matrix {
  const void* data = nullptr;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  std::int64_t stride = 0;
};

/// c = a b, or a b^T with `transposed`; a and b of type `dtype`, c [m, n] of type `result` (`dtype` or float32), row
/// stride c_stride. Runs on the threads that the calling context has: one inside at::parallel_for.
void multiply(const Matrix& a, const Matrix& b, bool transposed, at::ScalarType dtype, void* c, std::int64_t c_stride,
              at::ScalarType result);
/// The general form: c = op(a) op(b), or c += op(a) op(b) with `accumulate`, where op transposes on demand. Matrices
/// are described as they are stored. float64 is possible too (`dtype` and `result` both), for tests.
struct Operation {
  bool transpose_a = false;
  bool transpose_b = false;
  bool accumulate = false;
};
void multiply(const Matrix& a, const Matrix& b, const Operation& operation, at::ScalarType dtype, void* c,
              std::int64_t c_stride, at::ScalarType result);

/// Whether new products use oneDNN; settable by tests so that both paths are compared. False when it is not compiled
/// in.
bool uses_onednn();
void use_onednn(bool on);

}  // namespace headfold::model
