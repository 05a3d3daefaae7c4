#pragma once
// Private: the plain mean as a basis of any problem.
#include <headfold/folding/folds.h>

namespace headfold::folding {
/// A = [I ... I] / g, B = [I; ...; I]; loss, total and spectrum in `problem`.
Basis mean_basis(const Problem& problem, std::int64_t size, std::int64_t head_dim);
}  // namespace headfold::folding
