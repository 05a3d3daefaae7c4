#include <headfold/base/error.h>

#include "values_problem.h"

namespace headfold::folding {

Problem value_problem(const GroupWeights& group, const LayerMoments* moments, Metric metric, bool centred) {
  Problem problem;
  if (metric == Metric::weights) {
    const at::Tensor weight = group.value.slice(1, 0, group.value.size(1) - 1);
    problem.sigma = at::matmul(weight, weight.t());
    return problem;
  }
  if (moments == nullptr)
    throw InternalError("a value fold with metric act was asked for without calibration statistics");
  const at::Tensor product =
      at::matmul(at::matmul(group.value, centred ? moments->centred : moments->input), group.value.t());
  problem.sigma = 0.5 * (product + product.t());
  return problem;
}

Basis fold_values_svd(const GroupWeights& group, const LayerMoments* moments, Metric metric, bool centred) {
  const Problem problem = value_problem(group, moments, metric, centred);
  return linalg::weighted_low_rank(problem.sigma, problem.lambda, group.head_dim);
}

}  // namespace headfold::folding
