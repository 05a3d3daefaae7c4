#include <headfold/base/error.h>
#include <headfold/folding/folds.h>

namespace headfold::folding {

Basis fold_keys_latent(const Problem& problem, std::int64_t width, double weight_ridge) {
  const std::int64_t channels = problem.sigma.size(0);
  if (width < 1 || width > channels)
    throw UsageError(fmt::format("a latent of {} channels for keys of {} in all", width, channels),
                     fmt::format("1 to {} are possible", channels));
  return linalg::weighted_low_rank(problem.sigma, problem.lambda, width, problem.lambda.empty() ? 0.0 : weight_ridge);
}

}  // namespace headfold::folding
