#pragma once
// cuSOLVER behind two functions; private to linalg. Handles and workspace are kept per thread and GPU.

#include <ATen/ATen.h>

#include <optional>
#include <tuple>
#include <utility>

namespace headfold::linalg {

/// Throws NotCompiled in a build without CUDA.
void require_cusolver();

/// Eigenvalues ascending [batch, n] float64 and eigenvectors (columns) [batch, n, n] of Hermitian matrices [batch, n,
/// n], float64 or complex128, contiguous, finite. Tensors on a GPU are factorised there, in memory of their own, and
/// the results stay there; those of the host go through the current GPU and come back. Nothing when no GPU is usable or
/// the library reports a failure (the reason is logged once).
std::optional<std::pair<at::Tensor, at::Tensor>> cusolver_eigh(const at::Tensor& matrices);

/// Thin SVD of a matrix [m, n], float64 or complex128, finite: U [m, k], values [k] descending float64, V^H [k, n], k =
/// min(m, n). Where they lie, and when there is none, as above.
std::optional<std::tuple<at::Tensor, at::Tensor, at::Tensor>> cusolver_svd(const at::Tensor& matrix);

}  // namespace headfold::linalg
