#include <headfold/folding/folds.h>

namespace headfold::folding {

Basis fold_values_svd(const ValueProblem& problem, std::int64_t width, std::int64_t sweeps) {
  Basis basis = linalg::weighted_low_rank(problem.sigma, problem.lambda, width);
  if (problem.lambda.empty()) return basis;
  if (!problem.attended.empty()) {
    // The kernel's loss is that of one mean attention; the real one knows every head's.
    if (sweeps > 0) polish_values(problem, basis, sweeps);
    basis.loss = loss_of(problem, basis);
    basis.total = total_of(problem);
  }
  normalise_scale(basis, problem.sigma, problem.head_dim);
  return basis;
}

}  // namespace headfold::folding
