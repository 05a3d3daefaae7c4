#include "meanpool.h"

namespace headfold::folding {

Basis fold_keys_meanpool(const GroupWeights& group, const Problem& problem) {
  return mean_basis(problem, group.size, group.head_dim);
}

Basis fold_keys_meanpool(const GroupWeights& group, const LayerMoments* moments, Metric metric, bool rotates) {
  // Averaging treats every frequency and both halves alike, so it commutes with the rotation and the phase-averaged
  // loss is formula (1) of 6.1.1.
  return fold_keys_meanpool(
      group, rotates ? rotating_key_problem(group, moments, metric) : unrotated_key_problem(group, moments, metric));
}

}  // namespace headfold::folding
