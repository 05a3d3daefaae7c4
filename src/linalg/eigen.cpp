#include <c10/util/Exception.h>
#include <headfold/base/error.h>
#include <headfold/base/log.h>
#include <headfold/base/profile.h>
#include <headfold/linalg/linalg.h>

#include <ATen/Context.h>

#include <atomic>
#include <complex>
#include <limits>

#include "cusolver.h"
#include "eigen_batch.h"

namespace headfold::linalg {
namespace {

constexpr double kResidual = 1e-10;          // of ||A||
constexpr double kSameValue = 1e-12;         // eigenvalues this close (times the largest) span one eigenspace
constexpr double kSameModulus = 1e-9;        // entries this close in modulus count as equal
constexpr std::int64_t kWidestSpace = 1024;  // the canonical basis of k vectors costs n k^2

std::atomic<Backend> chosen{Backend::lapack};
/// A guess: no GPU has been measured yet (docs/gpu.md, bench_gpu eigen).
std::atomic<std::int64_t> smallest_for_gpu{512};

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

/// ||A V - V L||, Frobenius.
double residual(const at::Tensor& a, const at::Tensor& values, const at::Tensor& vectors) {
  return (at::matmul(a, vectors) - vectors * values).norm().abs().item<double>();
}

void require_hermitian_dtype(const at::Tensor& matrix, const char* what) {
  if (matrix.scalar_type() != at::kComplexDouble && matrix.scalar_type() != at::kDouble)
    throw InternalError(
        fmt::format("{} wants float64 or complex128, got {}", what, c10::toString(matrix.scalar_type())));
}

/// What is factorised instead of a matrix: Hermitian to the last bit, largest entry about 1.
struct Prepared {
  at::Tensor matrix;
  double scale = 0;  ///< the matrix is so many times larger; 0: it is zero
};

Prepared prepare(const at::Tensor& matrix) {
  const bool is_complex = matrix.is_complex();
  // By parts: the modulus of a complex number overflows where its parts do not. NaN propagates through max().
  const at::Tensor parts = is_complex ? at::view_as_real(matrix.resolve_conj()) : matrix;
  const double scale = parts.abs().max().item<double>();
  if (!std::isfinite(scale))
    throw NumericalError(
        fmt::format("a {} x {} matrix to be factorised contains NaN or Inf", matrix.size(0), matrix.size(1)),
        "look for overflow in the activations: calibrate in float32, and check the checkpoint");
  if (scale == 0) return {at::zeros(matrix.sizes(), matrix.options()), 0};
  const at::Tensor scaled = is_complex ? at::view_as_complex(parts / scale) : parts / scale;
  return {((scaled + scaled.transpose(0, 1).conj()) * 0.5).contiguous(), scale};
}

/// Descending and with fixed phases, from what a library hands back on the CPU.
Eigen ordered(const at::Tensor& ascending, const at::Tensor& columns) {
  Eigen result{ascending.flip({0}).contiguous(), columns.flip({1}).contiguous()};
  const std::int64_t n = ascending.numel();
  if (columns.is_complex())
    fix_gauge(reinterpret_cast<std::complex<double>*>(result.vectors.data_ptr<c10::complex<double>>()),
              result.values.data_ptr<double>(), n);
  else
    fix_gauge(result.vectors.data_ptr<double>(), result.values.data_ptr<double>(), n);
  return result;
}

Eigen zero_eigen(const at::Tensor& matrix) {
  const std::int64_t n = matrix.size(0);
  return {at::zeros({n}, matrix.options().dtype(at::kDouble)), at::eye(n, matrix.options())};
}

Eigen lapack_eigh(const Prepared& prepared) {
  const at::Tensor a = prepared.matrix.to(at::kCPU);
  const std::int64_t n = a.size(0);
  const double norm = a.norm().abs().item<double>();
  at::Tensor ascending, columns;
  try {
    std::tie(ascending, columns) = at::linalg_eigh(a, "L");
  } catch (const c10::Error& error) {
    throw NumericalError(
        fmt::format("the eigen-decomposition of a {} x {} matrix failed: {}", n, n, error.what_without_backtrace()));
  }
  Eigen result = ordered(ascending.resolve_conj(), columns.resolve_conj());
  const double error = residual(a, result.values, result.vectors);
  if (!(error <= kResidual * norm))
    throw NumericalError(
        fmt::format("the eigen-decomposition of a {} x {} matrix has a relative residual of {:.2e}, allowed are {:.0e}",
                    n, n, error / norm, kResidual),
        "the LAPACK library of this machine is suspect: headfold --version names it");
  result.values.mul_(prepared.scale);
  return {result.values.to(prepared.matrix.device()), result.vectors.to(prepared.matrix.device())};
}

/// Whether the GPU factorises `batch` matrices of n rows (n^3 stands for the work).
bool for_gpu(const at::Tensor& x, double batch, double n) {
  const auto threshold = static_cast<double>(gpu_threshold());
  return backend() == Backend::cusolver && (x.is_cuda() || batch * n * n * n >= threshold * threshold * threshold);
}

/// Where a matrix of the host goes for cuSOLVER: to the GPU already where libtorch can compute there as well, so that
/// residuals are computed on it too.
at::Tensor near_gpu(const at::Tensor& x) {
  return x.is_cuda() || !at::hasCUDA() ? x : x.to(at::kCUDA);
}

}  // namespace

void set_backend(Backend value) {
  if (value == Backend::cusolver) require_cusolver();
  chosen = value;
}
Backend backend() {
  return chosen;
}
void set_gpu_threshold(std::int64_t rows) {
  smallest_for_gpu = rows;
}
std::int64_t gpu_threshold() {
  return smallest_for_gpu;
}

Eigen eigh_batched_by(const at::Tensor& matrices, const BatchSolver& solver) {
  const std::int64_t batch = matrices.size(0);
  std::vector<Prepared> prepared;
  std::vector<at::Tensor> scaled, values, vectors;
  for (std::int64_t i = 0; i < batch; ++i) scaled.push_back(prepared.emplace_back(prepare(matrices[i])).matrix);
  const at::Tensor a = near_gpu(at::stack(scaled));
  const auto found = solver(a);
  const at::Tensor columns = found ? found->second.to(at::kCPU) : at::Tensor();
  const at::Tensor ascending = found ? found->first.to(at::kCPU) : at::Tensor();
  for (std::int64_t i = 0; i < batch; ++i) {
    const Prepared& one = prepared[static_cast<std::size_t>(i)];
    Eigen result;
    if (one.scale == 0) {
      result = zero_eigen(one.matrix);
    } else if (found) {
      result = ordered(ascending[i], columns[i]);
      const double norm = one.matrix.norm().abs().item<double>();
      const at::Tensor l = result.values.to(a.device()), v = result.vectors.to(a.device());
      const double error = residual(a[i], l, v);
      if (error <= kResidual * norm) {
        result = {result.values.to(one.matrix.device()).mul_(one.scale), result.vectors.to(one.matrix.device())};
      } else {
        // Known to happen with matrices that span many decades (methods.md 12.1).
        spdlog::warn("cuSOLVER: residual {:.1e} on a {} x {} matrix; computing it again with LAPACK", error / norm,
                     one.matrix.size(0), one.matrix.size(1));
        result = lapack_eigh(one);
      }
    } else {
      result = lapack_eigh(one);
    }
    values.push_back(result.values);
    vectors.push_back(result.vectors);
  }
  return {at::stack(values), at::stack(vectors)};
}

Eigen eigh(const at::Tensor& matrix) {
  const Timed timed(Work::eigen);
  if (matrix.dim() != 2 || matrix.size(0) != matrix.size(1))
    throw InternalError(fmt::format("eigh wants a square matrix, got {}", fmt::join(matrix.sizes(), " x ")));
  require_hermitian_dtype(matrix, "eigh");
  const std::int64_t n = matrix.size(0);
  if (n == 0) return {at::empty({0}, matrix.options().dtype(at::kDouble)), at::empty_like(matrix)};
  if (for_gpu(matrix, 1, static_cast<double>(n))) {
    const Eigen all = eigh_batched_by(matrix.unsqueeze(0), cusolver_eigh);
    return {all.values[0], all.vectors[0]};
  }
  const Prepared prepared = prepare(matrix);
  return prepared.scale == 0 ? zero_eigen(matrix) : lapack_eigh(prepared);
}

Eigen eigh_batched(const at::Tensor& matrices) {
  if (matrices.dim() != 3 || matrices.size(1) != matrices.size(2))
    throw InternalError(
        fmt::format("eigh_batched wants square matrices [batch, n, n], got {}", fmt::join(matrices.sizes(), " x ")));
  require_hermitian_dtype(matrices, "eigh_batched");
  const std::int64_t batch = matrices.size(0), n = matrices.size(1);
  if (matrices.numel() == 0)
    return {at::empty({batch, n}, matrices.options().dtype(at::kDouble)), at::empty_like(matrices)};
  if (for_gpu(matrices, static_cast<double>(batch), static_cast<double>(n))) {
    const Timed timed(Work::eigen);
    return eigh_batched_by(matrices, cusolver_eigh);
  }
  std::vector<at::Tensor> values, vectors;
  for (std::int64_t i = 0; i < batch; ++i) {
    const Eigen one = eigh(matrices[i]);
    values.push_back(one.values);
    vectors.push_back(one.vectors);
  }
  return {at::stack(values), at::stack(vectors)};
}

ThinSvd thin_svd(const at::Tensor& matrix) {
  if (matrix.dim() != 2) throw InternalError(fmt::format("thin_svd of a tensor {}", fmt::join(matrix.sizes(), " x ")));
  require_hermitian_dtype(matrix, "thin_svd");
  const at::Tensor a = matrix.resolve_conj();
  const auto sizes = fmt::format("{} x {}", a.size(0), a.size(1));
  const double scale = a.numel() == 0 ? 0 : a.abs().max().item<double>();
  if (!std::isfinite(scale))
    throw NumericalError(fmt::format("a {} matrix to be factorised contains NaN, Inf or too large numbers", sizes));
  const at::Tensor scaled = scale > 0 ? a / scale : a;
  const double norm = scaled.norm().abs().item<double>();
  const auto error_of = [&](const ThinSvd& result) {
    const at::Tensor s = result.s / (scale > 0 ? scale : 1.0);
    return (at::matmul(result.u * s, result.vh) - scaled.to(s.device())).norm().abs().item<double>();
  };
  // n in the sense of the threshold: the work is that of a square matrix of as many entries times rows.
  const double longer = static_cast<double>(std::max(a.size(0), a.size(1)));
  const double shorter = static_cast<double>(std::min(a.size(0), a.size(1)));
  if (scale > 0 && for_gpu(a, longer / std::max(shorter, 1.0), shorter)) {
    if (const auto found = cusolver_svd(near_gpu(a))) {
      const ThinSvd result{std::get<0>(*found), std::get<1>(*found), std::get<2>(*found)};
      const double error = error_of(result);
      if (error <= kResidual * norm)
        return {result.u.to(a.device()), result.s.to(a.device()), result.vh.to(a.device())};
      spdlog::warn("cuSOLVER: SVD residual {:.1e} on a {} matrix; computing it again with LAPACK", error / norm, sizes);
    }
  }
  ThinSvd result;
  try {
    std::tie(result.u, result.s, result.vh) = at::linalg_svd(a.to(at::kCPU), /*full_matrices=*/false);
  } catch (const c10::Error& error) {
    throw NumericalError(
        fmt::format("the singular values of a {} matrix were not found: {}", sizes, error.what_without_backtrace()));
  }
  result = {result.u.to(a.device()), result.s.to(a.device()), result.vh.resolve_conj().to(a.device())};
  if (const double error = error_of(result); !(error <= kResidual * norm))
    throw NumericalError(fmt::format("the singular value decomposition of a {} matrix has a relative residual of "
                                     "{:.2e}, allowed are {:.0e}",
                                     sizes, error / norm, kResidual),
                         "the LAPACK library of this machine is suspect: headfold --version names it");
  return result;
}

PsdRoot psd_root(const at::Tensor& matrix, double tau, double floor) {
  const Eigen eigen = eigh(matrix);
  const std::int64_t n = matrix.size(0);
  PsdRoot result;
  at::Tensor root = at::zeros({n}, at::kDouble), inverse = at::zeros({n}, at::kDouble);
  const at::Tensor on_host = eigen.values.to(at::kCPU);
  const double* values = on_host.data_ptr<double>();
  for (std::int64_t i = 0; i < n; ++i) {
    // A PSD matrix has its largest eigenvalue first; rounding makes the smallest ones negative.
    if (!(values[i] > std::max({tau * values[0], floor, 0.0}))) break;
    root.data_ptr<double>()[i] = std::sqrt(values[i]);
    inverse.data_ptr<double>()[i] = 1 / std::sqrt(values[i]);
    ++result.width;
  }
  root = root.to(matrix.device());
  inverse = inverse.to(matrix.device());
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
    const at::Tensor a = ((scaled + scaled.transpose(0, 1).conj()) * 0.5).contiguous();
    ascending = at::linalg_eigvalsh(a.to(at::kCPU), "L").contiguous();
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
