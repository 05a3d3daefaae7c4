#include <headfold/folding/folds.h>

namespace headfold::folding {

Basis fold_keys_post_rotation(const GroupWeights& group, const LayerMoments* moments, const at::Tensor& rotated_keys,
                              Metric metric, double weight_ridge, const std::vector<at::Tensor>& rotated_queries) {
  KeyContext context;
  context.rotated_keys = rotated_keys;
  context.rotated_queries = rotated_queries;
  const Problem problem = rotated_key_problem(group, moments, metric, context);
  return linalg::weighted_low_rank(problem.sigma, problem.lambda, group.head_dim,
                                   problem.lambda.empty() ? 0.0 : weight_ridge);
}

}  // namespace headfold::folding
