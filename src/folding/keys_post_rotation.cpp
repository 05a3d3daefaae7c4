#include <headfold/base/error.h>
#include <headfold/folding/folds.h>

namespace headfold::folding {

Basis fold_keys_post_rotation(const GroupWeights& group, const LayerMoments* moments, const at::Tensor& rotated_keys,
                              Metric metric, double weight_ridge) {
  Problem problem = rotating_key_problem(group, moments, metric);  // Lambda; Sigma too for the weights
  if (metric != Metric::weights) {
    if (!rotated_keys.defined())
      throw InputError("the statistics hold no Gram of rotated keys, which --keys post-rotation needs",
                       "calibrate the model again");
    problem.sigma = rotated_keys;
  }
  return linalg::weighted_low_rank(problem.sigma, problem.lambda, group.head_dim,
                                   problem.lambda.empty() ? 0.0 : weight_ridge);
}

}  // namespace headfold::folding
