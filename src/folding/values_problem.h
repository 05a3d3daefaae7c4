#pragma once
// Private: Sigma of the value folds.
#include <headfold/folding/folds.h>

namespace headfold::folding {
Problem value_problem(const GroupWeights& group, const LayerMoments* moments, Metric metric, bool centred);
}  // namespace headfold::folding
