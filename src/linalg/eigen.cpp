#include <c10/util/Exception.h>
#include <headfold/base/error.h>
#include <headfold/base/log.h>
#include <headfold/base/profile.h>
#include <headfold/linalg/linalg.h>

#include <atomic>
#include <complex>
#include <limits>

#include "cusolver.h"

namespace headfold::linalg {
namespace {

constexpr double kResidual = 1e-10;          // of ||A||
constexpr double kSameValue = 1e-12;         // eigenvalues this close (times the largest) span one eigenspace
constexpr double kSameModulus = 1e-9;        // entries this close in modulus count as equal
constexpr std::int64_t kWidestSpace = 1024;  // the canonical basis of k vectors costs n k^2

std::atomic<Backend> chosen{Backend::lapack};

double squared_modulus(double x) {
  return x * x;
}
double squared_modulus(std::complex<double> x) {
  return std::norm(x);
}
double conjugate(double x) {
  return x;
}
std::complex<double> conjugate(std::complex<double> x) {
  return std::conj(x);
}

/// Index of the largest value; the first one among those within kSameModulus of it.
std::int64_t first_largest(const std::vector<double>& squares) {
  double largest = 0;
  for (const double value : squares) largest = std::max(largest, value);
  const double enough = largest * (1 - kSameModulus) * (1 - kSameModulus);
  for (std::size_t i = 0; i < squares.size(); ++i)
    if (squares[i] >= enough) return static_cast<std::int64_t>(i);
  return 0;
}

/// Replaces columns [begin, end) of `v` (row-major [n, n]), an orthonormal basis of one eigenspace, by the basis that
/// follows from the projector alone: the normalised column of the projector at its largest diagonal entry, deflate,
/// repeat (pivoted Cholesky).
template <class T>
void canonical_basis(T* v, std::int64_t n, std::int64_t begin, std::int64_t end) {
  const std::int64_t k = end - begin;
  std::vector<T> space(static_cast<std::size_t>(n * k));
  std::vector<double> squares(static_cast<std::size_t>(n));
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < k; ++j) space[static_cast<std::size_t>(i * k + j)] = v[i * n + begin + j];
  }
  std::vector<T> pivot(static_cast<std::size_t>(k));
  for (std::int64_t column = 0; column < k; ++column) {
    for (std::int64_t i = 0; i < n; ++i) {
      double square = 0;
      for (std::int64_t j = 0; j < k; ++j) square += squared_modulus(space[static_cast<std::size_t>(i * k + j)]);
      squares[static_cast<std::size_t>(i)] = square;
    }
    const std::int64_t row = first_largest(squares);
    const double length = std::sqrt(squares[static_cast<std::size_t>(row)]);
    for (std::int64_t j = 0; j < k; ++j)
      pivot[static_cast<std::size_t>(j)] = conjugate(space[static_cast<std::size_t>(row * k + j)]) / length;
    for (std::int64_t i = 0; i < n; ++i) {
      T* line = space.data() + i * k;
      T entry{};
      for (std::int64_t j = 0; j < k; ++j) entry += line[j] * pivot[static_cast<std::size_t>(j)];
      v[i * n + begin + column] = entry;
      for (std::int64_t j = 0; j < k; ++j) line[j] -= entry * conjugate(pivot[static_cast<std::size_t>(j)]);
    }
  }
}

template <class T>
void fix_gauge(T* v, const double* values, std::int64_t n) {
  const double largest = std::max(std::abs(values[0]), std::abs(values[n - 1]));
  for (std::int64_t begin = 0; begin < n;) {
    std::int64_t end = begin + 1;
    while (end < n && values[begin] - values[end] <= kSameValue * largest) ++end;
    if (end - begin > 1 && end - begin <= kWidestSpace) canonical_basis(v, n, begin, end);
    begin = end;
  }
  std::vector<double> squares(static_cast<std::size_t>(n));
  for (std::int64_t j = 0; j < n; ++j) {
    for (std::int64_t i = 0; i < n; ++i) squares[static_cast<std::size_t>(i)] = squared_modulus(v[i * n + j]);
    const T entry = v[first_largest(squares) * n + j];
    const double modulus = std::sqrt(squared_modulus(entry));
    if (modulus == 0) continue;
    const T phase = conjugate(entry) / modulus;
    for (std::int64_t i = 0; i < n; ++i) v[i * n + j] *= phase;
  }
}

double residual(const at::Tensor& a, const at::Tensor& values, const at::Tensor& vectors) {
  return (at::matmul(a, vectors) - vectors * values).norm().abs().item<double>();
}

}  // namespace

void set_backend(Backend value) {
  if (value == Backend::cusolver) require_cusolver();
  chosen = value;
}
Backend backend() {
  return chosen;
}

Eigen eigh(const at::Tensor& matrix) {
  const Timed timed(Work::eigen);
  if (matrix.dim() != 2 || matrix.size(0) != matrix.size(1))
    throw InternalError(fmt::format("eigh wants a square matrix, got {}", fmt::join(matrix.sizes(), " x ")));
  const bool is_complex = matrix.scalar_type() == at::kComplexDouble;
  if (!is_complex && matrix.scalar_type() != at::kDouble)
    throw InternalError(fmt::format("eigh wants float64 or complex128, got {}", c10::toString(matrix.scalar_type())));
  const std::int64_t n = matrix.size(0);
  const auto real = at::TensorOptions().dtype(at::kDouble);
  if (n == 0) return {at::empty({0}, real), at::empty_like(matrix)};
  // By parts: the modulus of a complex number overflows where its parts do not. NaN propagates through max().
  const at::Tensor parts = is_complex ? at::view_as_real(matrix.resolve_conj()) : matrix;
  const double scale = parts.abs().max().item<double>();
  if (!std::isfinite(scale))
    throw NumericalError(fmt::format("a {} x {} matrix to be factorised contains NaN or Inf", n, n),
                         "look for overflow in the activations: calibrate in float32, and check the checkpoint");
  if (scale == 0) return {at::zeros({n}, real), at::eye(n, matrix.options())};

  const at::Tensor scaled = is_complex ? at::view_as_complex(parts / scale) : parts / scale;
  const at::Tensor a = ((scaled + scaled.transpose(0, 1).conj()) * 0.5).contiguous();
  const double norm = a.norm().abs().item<double>();
  const auto finish = [&](const at::Tensor& ascending, const at::Tensor& columns) -> Eigen {
    Eigen result{ascending.flip({0}).contiguous(), columns.flip({1}).contiguous()};
    if (is_complex)
      fix_gauge(reinterpret_cast<std::complex<double>*>(result.vectors.data_ptr<c10::complex<double>>()),
                result.values.data_ptr<double>(), n);
    else
      fix_gauge(result.vectors.data_ptr<double>(), result.values.data_ptr<double>(), n);
    return result;
  };
  if (backend() == Backend::cusolver) {
    if (const auto found = cusolver_eigh(a)) {
      Eigen result = finish(found->first, found->second);
      // Known to fail on matrices that span many decades (methods.md 12.1): LAPACK then takes over.
      const double error = residual(a, result.values, result.vectors);
      if (error <= kResidual * norm) {
        result.values.mul_(scale);
        return result;
      }
      spdlog::warn("cuSOLVER: residual {:.1e} on a {} x {} matrix; computing it again with LAPACK", error / norm, n, n);
    }
  }
  at::Tensor ascending, columns;
  try {
    std::tie(ascending, columns) = at::linalg_eigh(a, "L");
  } catch (const c10::Error& error) {
    throw NumericalError(
        fmt::format("the eigen-decomposition of a {} x {} matrix failed: {}", n, n, error.what_without_backtrace()));
  }
  Eigen result = finish(ascending.resolve_conj(), columns.resolve_conj());
  const double error = residual(a, result.values, result.vectors);
  if (!(error <= kResidual * norm))
    throw NumericalError(
        fmt::format("the eigen-decomposition of a {} x {} matrix has a relative residual of {:.2e}, allowed are {:.0e}",
                    n, n, error / norm, kResidual),
        "the LAPACK library of this machine is suspect: headfold --version names it");
  result.values.mul_(scale);
  return result;
}

PsdRoot psd_root(const at::Tensor& matrix, double tau, double floor) {
  const Eigen eigen = eigh(matrix);
  const std::int64_t n = matrix.size(0);
  PsdRoot result;
  at::Tensor root = at::zeros({n}, at::kDouble), inverse = at::zeros({n}, at::kDouble);
  const double* values = eigen.values.data_ptr<double>();
  for (std::int64_t i = 0; i < n; ++i) {
    // A PSD matrix has its largest eigenvalue first; rounding makes the smallest ones negative.
    if (!(values[i] > std::max({tau * values[0], floor, 0.0}))) break;
    root.data_ptr<double>()[i] = std::sqrt(values[i]);
    inverse.data_ptr<double>()[i] = 1 / std::sqrt(values[i]);
    ++result.width;
  }
  const at::Tensor adjoint = eigen.vectors.transpose(0, 1).conj();
  result.root = at::matmul(eigen.vectors * root, adjoint);
  result.inverse_root = at::matmul(eigen.vectors * inverse, adjoint);
  return result;
}

Conditioning conditioning(const at::Tensor& psd, double tau) {
  const Timed timed(Work::eigen);
  if (psd.dim() != 2 || psd.size(0) != psd.size(1))
    throw InternalError(fmt::format("conditioning wants a square matrix, got {}", fmt::join(psd.sizes(), " x ")));
  const double scale = psd.numel() == 0 ? 0 : psd.abs().max().item<double>();
  if (!std::isfinite(scale))
    throw NumericalError(
        fmt::format("a {} x {} matrix to be factorised contains NaN or Inf", psd.size(0), psd.size(0)));
  if (scale == 0) return {1.0, 1.0};
  const at::Tensor scaled = psd / scale;
  at::Tensor ascending;
  try {
    ascending = at::linalg_eigvalsh(((scaled + scaled.transpose(0, 1).conj()) * 0.5).contiguous(), "L").contiguous();
  } catch (const c10::Error& error) {
    throw NumericalError(fmt::format("the eigenvalues of a {} x {} matrix were not found: {}", psd.size(0), psd.size(0),
                                     error.what_without_backtrace()));
  }
  const double* values = ascending.data_ptr<double>();
  const std::int64_t n = ascending.numel();
  const double largest = values[n - 1];
  std::int64_t first = 0;
  while (first < n - 1 && !(values[first] > tau * largest)) ++first;
  return {largest / values[first], static_cast<double>(first) / static_cast<double>(n)};
}

}  // namespace headfold::linalg
