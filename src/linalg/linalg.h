#pragma once
// Dense float64 / complex128 factorisations on Hermitian positive semi-definite matrices, and the one low-rank kernel every fold uses.

#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

namespace headfold::linalg {

/// Eigen-decomposition of a Hermitian matrix: values [n] descending float64; vectors [n, n], columns, same dtype as the input.
struct Eigen {
  at::Tensor values;
  at::Tensor vectors;
};

/// `matrix` [n, n] float64 or complex128, Hermitian. Symmetrised and divided by its largest absolute entry before LAPACK; the result's residual
/// ||A V - V L|| <= 1e-10 ||A|| is checked (NumericalError). Each column's phase is fixed: its entry of largest modulus (first among equals
/// within 1e-9) is real and positive, so that results do not depend on rank or thread count. NaN or Inf input: NumericalError.
Eigen eigh(const at::Tensor& matrix);

/// Symmetric root L (L^H L = M) of a PSD matrix and its pseudo-inverse; eigenvalues <= tau * max are dropped (methods.md 3, 12.1).
struct PsdRoot {
  at::Tensor root;          ///< [n, n]
  at::Tensor inverse_root;  ///< [n, n], pseudo-inverse
  std::int64_t width = 0;   ///< numerical rank
};
PsdRoot psd_root(const at::Tensor& matrix, double tau = 1e-10);

/// Result of weighted_low_rank. p = rows of the stacked map, r = width.
struct LowRank {
  at::Tensor encoder;   ///< A [r, p]
  at::Tensor decoder;   ///< B [p, r]
  at::Tensor energies;  ///< s_j^2, all p of them, descending, float64
  double loss = 0;      ///< J = sum_{j > r} s_j^2, in the weighted norm
  double total = 0;     ///< tr F
  double relative_loss() const { return total > 0 ? loss / total : 0; }
};

/// methods.md section 3: minimise E || Lw (T x - B A T x) ||^2 over A [r, p], B [p, r], given Sigma = T M T^H [p, p] and the diagonal blocks of
/// Lambda = Lw^H Lw (square, sizes summing to p; an empty list means the identity). Real or complex. A zero Sigma gives zero loss and the
/// first r unit vectors. `weight_ridge` adds weight_ridge * tr(Lambda)/p to the diagonal of Lambda.
LowRank weighted_low_rank(const at::Tensor& sigma, const std::vector<at::Tensor>& lambda_blocks, std::int64_t width,
                          double weight_ridge = 0.0, double tau = 1e-10);

/// C += X^T X for X [tokens, n] float32 or bfloat16, C [n, n] float64: only the lower triangle of C is kept up to date.
/// Products are accumulated in float32 over at most `tokens` rows (one call), then added in float64.
class GramAccumulator {
 public:
  explicit GramAccumulator(std::int64_t n);
  void add(const at::Tensor& x);
  /// Full symmetric matrix, float64 [n, n].
  at::Tensor full() const;
  /// The lower-triangular accumulator itself; the strict upper triangle is unspecified.
  at::Tensor& lower() { return lower_; }
  std::int64_t size() const { return n_; }

 private:
  std::int64_t n_;
  at::Tensor lower_;
  at::Tensor scratch_;
};

}  // namespace headfold::linalg
