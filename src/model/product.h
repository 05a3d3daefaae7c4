#pragma once
// Private: matrix products at the full rate of the processor. oneDNN where it is compiled in (its own kernels for AVX-512 and AMX, weights
// packed once), ATen otherwise.

#include <ATen/ATen.h>

#include <cstdint>
#include <memory>

namespace headfold::model {

/// A weight matrix [out, in] with an optional bias, kept in the layout that the product kernel reads.
class Product {
 public:
  /// `weight` [out, in] and `bias` [out] (may be undefined) of any floating-point dtype; both are copied to `dtype`.
  Product(const at::Tensor& weight, const at::Tensor& bias, at::ScalarType dtype);
  ~Product();
  /// y = x W^T + bias, or y += x W^T + bias. x [rows, in] and y [rows, out] with contiguous rows, in the product's dtype; accumulation in
  /// float32 with one rounding at the end. Safe for many threads.
  void apply(const at::Tensor& x, const at::Tensor& y, bool accumulate = false) const;
  std::int64_t out() const { return out_; }
  std::int64_t in() const { return in_; }
  std::int64_t bytes() const;

 private:
  struct State;
  std::int64_t out_ = 0;
  std::int64_t in_ = 0;
  at::ScalarType dtype_;
  std::unique_ptr<State> state_;
};

/// A row-major matrix operand: `rows` x `columns` with `stride` elements between rows. Densely stored ones are fastest.
struct Matrix {
  const void* data = nullptr;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  std::int64_t stride = 0;
};

/// c = a b, or a b^T with `transposed`; a and b of type `dtype`, c [m, n] of type `result` (`dtype` or float32), row stride c_stride.
/// Runs on the threads that the calling context has: one inside at::parallel_for.
void multiply(const Matrix& a, const Matrix& b, bool transposed, at::ScalarType dtype, void* c, std::int64_t c_stride, at::ScalarType result);

/// Whether new products use oneDNN; settable by tests so that both paths are compared. False when it is not compiled in.
bool uses_onednn();
void use_onednn(bool on);

}  // namespace headfold::model
