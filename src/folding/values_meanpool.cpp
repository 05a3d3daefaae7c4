#include "meanpool.h"
#include "values_problem.h"

namespace headfold::folding {

Basis fold_values_meanpool(const GroupWeights& group, const LayerMoments* moments, Metric metric, bool centred) {
  return mean_basis(value_problem(group, moments, metric, centred), group.size, group.head_dim);
}

}  // namespace headfold::folding
