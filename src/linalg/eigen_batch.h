#pragma once
// Private: eigen-decompositions by any library, held to what eigh() promises.

#include <headfold/linalg/linalg.h>

#include <functional>
#include <optional>
#include <utility>

namespace headfold::linalg {

/// Hermitian matrices [batch, n, n] whose entries are at most about 1 -> eigenvalues ascending [batch, n] and
/// eigenvectors (columns) [batch, n, n] of any phase; nothing when it cannot.
using BatchSolver = std::function<std::optional<std::pair<at::Tensor, at::Tensor>>(const at::Tensor&)>;

/// eigh_batched() by `solver`; matrices it cannot solve, or not to eigh()'s residual, go to LAPACK. Results are where
/// `matrices` [batch, n, n] are, batch > 0 and n > 0.
Eigen eigh_batched_by(const at::Tensor& matrices, const BatchSolver& solver);

}  // namespace headfold::linalg
