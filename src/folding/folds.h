#pragma once
// The folds: pure functions from one group's weights and moments to a basis. Each lives in its own file.
//
// Every fold, whatever its objective, is a pair of real matrices on the stacked heads of the group: the encoder A [d, g
// d] makes the merged head k' = A [k_1; ...; k_g], the decoder B [g d, d] gives every source head back, k_k ~ B_k k'.
// Weights follow from it the same way for all of them (apply.h): W_K' = A W_K, W_Q,h' = B_k^T W_Q,h; W_V' = A W_V,
// W_O,h' = P_h B_k.

#include <headfold/folding/layer_data.h>
#include <headfold/folding/plan.h>
#include <headfold/linalg/linalg.h>

namespace headfold::folding {

/// Basis of one group. loss and total are in the fold's metric: mean squared score error (summed over the group's query
/// heads) for act+query, mean squared error of keys or values for act, squared Frobenius norm for weights. `energies`
/// are real channels in the order in which the fold would keep them, so that the first d of them sum to total - loss
/// (meanpool apart, which keeps none of them: there they are the spectrum).
struct Basis : linalg::LowRank {
  Basis() = default;
  Basis(linalg::LowRank low_rank) : linalg::LowRank(std::move(low_rank)) {}  // NOLINT: a kernel's result is a basis
  /// Values, tier 2b (methods.md 4.3): B_h of every query head of the group, in the order of its source heads, [query
  /// heads, head_dim, r]. Undefined: query head h reads the decoder rows of its source head.
  at::Tensor head_decoders;
  std::vector<double> imaginary_share, leading_share;  ///< per frequency (GroupPlan)
};

/// A weighted low-rank problem on stacked heads: Sigma and the diagonal blocks of Lambda (empty = identity),
/// methods.md 3.1.
struct Problem {
  at::Tensor sigma;
  std::vector<at::Tensor> lambda;
};

/// Keys without rotation (methods.md 5): centred covariance, exact because softmax drops a constant shift of all keys;
/// Lambda = query covariances. `moments` may be null for Metric::weights.
Problem unrotated_key_problem(const GroupWeights& group, const LayerMoments* moments, Metric metric);
/// Keys before their rotation, phases averaged (methods.md 3.1 "latent, phase-averaged"): uncentred moment, Lambda =
/// diag(lam_{k,l} / 2) twice.
Problem rotating_key_problem(const GroupWeights& group, const LayerMoments* moments, Metric metric);
/// lam_{k,l} of methods.md 2.2: [size, head_dim / 2].
at::Tensor query_energies(const GroupWeights& group, const at::Tensor& input_moment);
/// tr(Lambda (I - BA) Sigma (I - BA)^T): the loss of any encoder and decoder.
double loss_of(const Problem& problem, const at::Tensor& encoder, const at::Tensor& decoder);

/// methods.md 6.4, plain mean; queries unchanged. `rotates` selects the problem in which the loss is measured.
Basis fold_keys_meanpool(const GroupWeights& group, const LayerMoments* moments, Metric metric, bool rotates);
/// methods.md 5. J_K is in units of the squared score: divided by head_dim for act+query.
Basis fold_keys_norope(const GroupWeights& group, const LayerMoments* moments, Metric metric, double weight_ridge);
/// methods.md 6.2. `rotated_keys` is the group's block of the rotated-key Gram, [g d, g d] (null for weights).
/// act+query weighs by the phase-averaged query energy: rotation mixes entries l and l + d/2 evenly, so this diagonal
/// is the mean over phases of the rotated query Gram.
Basis fold_keys_post_rotation(const GroupWeights& group, const LayerMoments* moments, const at::Tensor& rotated_keys,
                              Metric metric, double weight_ridge);
/// methods.md 6.1.1-6.1.2: one complex component per frequency, gauge (largest coefficient real positive) and scale
/// (mean energy of the source keys) fixed.
Basis fold_keys_rope_commuting(const GroupWeights& group, const LayerMoments* moments, Metric metric,
                               double weight_ridge);

/// Values: plain mean, output projection unchanged. `centred`: the loss is that of values less their mean.
Basis fold_values_meanpool(const GroupWeights& group, const LayerMoments* moments, Metric metric, bool centred);
/// methods.md 4.1 (SVD-w, SVD-a). `centred` compresses values less their mean; the constant goes to the output bias
/// (4.5).
Basis fold_values_svd(const GroupWeights& group, const LayerMoments* moments, Metric metric, bool centred);

/// Multiplies the encoder by one positive number and divides the decoder by it so that merged heads carry the mean
/// energy of the source heads in `sigma`: 16-bit ranges stay healthy (methods.md 12.9). Products BA, and so scores, do
/// not change.
void normalise_scale(Basis& basis, const at::Tensor& sigma, std::int64_t head_dim);

}  // namespace headfold::folding
