#include "meanpool.h"

namespace headfold::folding {

Basis fold_values_meanpool(const ValueProblem& problem) {
  Basis basis = mean_basis(problem, problem.size, problem.head_dim);
  basis.loss = loss_of(problem, basis);
  basis.total = total_of(problem);
  return basis;
}

}  // namespace headfold::folding
