#pragma once
// cuSOLVER behind one function; private to linalg.

#include <ATen/ATen.h>

#include <optional>
#include <utility>

namespace headfold::linalg {

/// Throws NotCompiled in a build without CUDA.
void require_cusolver();
/// Eigenvalues ascending [n] and eigenvectors (columns) of a Hermitian float64 / complex128 matrix on the current
/// device, results on the CPU; nothing when no device is usable or the library reports a failure (the reason is logged
/// once).
std::optional<std::pair<at::Tensor, at::Tensor>> cusolver_eigh(const at::Tensor& matrix);

}  // namespace headfold::linalg
