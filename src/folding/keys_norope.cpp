#include <headfold/folding/folds.h>

namespace headfold::folding {

Basis fold_keys_norope(const GroupWeights& group, const LayerMoments* moments, Metric metric, double weight_ridge) {
  const Problem problem = unrotated_key_problem(group, moments, metric);
  return linalg::weighted_low_rank(problem.sigma, problem.lambda, group.head_dim,
                                   problem.lambda.empty() ? 0.0 : weight_ridge);
}

}  // namespace headfold::folding
