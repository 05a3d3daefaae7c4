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

/// What the key folds of a rotating model may need besides weights and moments. Folds that need none of it do with the
/// default.
struct KeyContext {
  at::Tensor frequencies;    ///< RoPE inverse frequencies [head_dim / 2]
  at::Tensor distance_law;   ///< p(tau) [T] summing to one: how far queries look back (act+query+dist)
  double mean_weight = 1.0;  ///< rho: Sigma = (Cx - mu mu^T) + rho mu mu^T outside the slow band; rope-commuting with
                             ///< act+query+dist: Twist::of_constants()
  std::int64_t band = 0;     ///< slowest pairs that rope-commuting folds without rotation
  std::int64_t polish = 0;   ///< sweeps of alternating least squares (rope-commuting with act+query+dist)
  at::Tensor rotated_keys;   ///< the group's block of the rotated-key Gram [g d, g d]
  std::vector<at::Tensor> rotated_queries;  ///< per source head: E[(R(n)q)(R(n)q)^T] summed over its query heads [d, d]
};
/// Frequencies and distance law; InternalError when they are not there.
std::pair<at::Tensor, at::Tensor> rotation_of(const KeyContext& context);
/// The rows of a head that its `band` slowest pairs fill, slowest pair first: h-1, 2h-1, h-2, 2h-2, ...
std::vector<std::int64_t> band_rows(std::int64_t head_dim, std::int64_t band);

/// E[x~ x~^T] as the group's keys and queries see it, from cached Grams where the group has them, else from its rows;
/// with `rows`, of these rows of each head only.
at::Tensor key_gram(const GroupWeights& group, const LayerMoments& moments);  ///< [g d, g d]
at::Tensor centred_key_gram(const GroupWeights& group, const LayerMoments& moments,
                            const std::vector<std::int64_t>& rows = {});      ///< [g d, g d]
at::Tensor key_mean(const GroupWeights& group, const LayerMoments& moments);  ///< W~_K E[x~] [g d]
/// W_K W_K^T without the biases: a metric on weights knows no input and so no constant.
at::Tensor key_weight_gram(const GroupWeights& group);
/// Sum over the query heads of source head k of Sigma_q,h, [d, d].
at::Tensor query_gram(const GroupWeights& group, std::int64_t k, const LayerMoments& moments,
                      const std::vector<std::int64_t>& rows = {});

/// Keys without rotation (methods.md 5): centred covariance, exact because softmax drops a constant shift of all keys;
/// Lambda = query covariances. `moments` may be null for Metric::weights.
Problem unrotated_key_problem(const GroupWeights& group, const LayerMoments* moments, Metric metric);
/// Keys before their rotation: Sigma(rho); Lambda of act+query = diag(lam_{k,l} / 2) twice, its average over phases
/// (methods.md 3.1 "latent, phase-averaged"); of act+query+dist = sum_h sum_tau p(tau) R(tau) Sigma_q,h R(tau)^T
/// (6.1.4), exact for any map that acts before the rotation at its own frequencies. Both divided by head_dim.
Problem rotating_key_problem(const GroupWeights& group, const LayerMoments* moments, Metric metric,
                             const KeyContext& context = {});
/// Keys after their rotation (methods.md 6.2): Sigma = `context`.rotated_keys; Lambda of act+query = the rotated query
/// Grams, or their average over phases where the statistics have none. InputError without rotated keys.
Problem rotated_key_problem(const GroupWeights& group, const LayerMoments* moments, Metric metric,
                            const KeyContext& context);
/// lam_{k,l} of methods.md 2.2: [size, head_dim / 2].
at::Tensor query_energies(const GroupWeights& group, const at::Tensor& input_moment);
/// tr(Lambda (I - BA) Sigma (I - BA)^T): the loss of any encoder and decoder.
double loss_of(const Problem& problem, const at::Tensor& encoder, const at::Tensor& decoder);
/// tr(Lambda Sigma): the loss of keeping nothing.
double total_of(const Problem& problem);

/// methods.md 6.4, plain mean; queries unchanged. Loss, total and spectrum in `problem`.
Basis fold_keys_meanpool(const GroupWeights& group, const Problem& problem);
/// The same in the problem that `rotates` selects.
Basis fold_keys_meanpool(const GroupWeights& group, const LayerMoments* moments, Metric metric, bool rotates);
/// methods.md 6.4: heads aligned (one unit phase per head and frequency; without rotation one orthogonal matrix per
/// head), averaged, and the mean scaled so that merged keys have the mean energy of the source keys. `problem.sigma` is
/// what is aligned.
Basis fold_keys_procrustes(const GroupWeights& group, const Problem& problem, bool rotates);
/// methods.md 6.3: `width` channels (1 .. g d) from which the group's keys are rebuilt before they are rotated.
Basis fold_keys_latent(const Problem& problem, std::int64_t width, double weight_ridge);
/// methods.md 5. J_K is in units of the squared score: divided by head_dim for act+query.
Basis fold_keys_norope(const GroupWeights& group, const LayerMoments* moments, Metric metric, double weight_ridge);
/// methods.md 6.2, in rotated_key_problem(). `rotated_keys` is the group's block of the rotated-key Gram, [g d, g d]
/// (null for weights); `rotated_queries` as in KeyContext.
Basis fold_keys_post_rotation(const GroupWeights& group, const LayerMoments* moments, const at::Tensor& rotated_keys,
                              Metric metric, double weight_ridge, const std::vector<at::Tensor>& rotated_queries = {});
/// methods.md 6.1: one complex component per frequency, gauge (largest coefficient real positive) and scale (mean
/// energy of the source keys) fixed; the `context.band` slowest pairs as one real block (6.1.3). act+query reads Grams
/// and energies from `context`.rotated_keys and rotated_queries when both are there: within one frequency they do not
/// change under rotation. act+query+dist starts there and improves the score error over distances by least squares
/// (6.1.7), the decoder once and then both by turns for `context.polish` sweeps; the loss is that of the stock model,
/// which rotates at the slots' frequencies (keys_distance.h).
Basis fold_keys_rope_commuting(const GroupWeights& group, const LayerMoments* moments, Metric metric,
                               double weight_ridge, const KeyContext& context = {});
/// Loss, in the quantity of fold_keys_rope_commuting(), of any basis of its structure; of keeping nothing for null.
double rope_commuting_loss(const GroupWeights& group, const LayerMoments* moments, Metric metric,
                           const KeyContext& context, const Basis* basis);

/// Condition and dropped share (linalg::conditioning) of the Gram in which keys of different frequencies are
/// uncorrelated, as rotation makes them: the spectra of all frequencies together.
linalg::Conditioning rope_commuting_conditioning(const GroupWeights& group, const LayerMoments* moments, Metric metric,
                                                 const KeyContext& context, double tau = 1e-10);

/// A group's values: the kernel's Sigma and Lambda, and what the other metrics need beside them.
struct ValueProblem : Problem {
  std::int64_t size = 0, head_dim = 0;  ///< source KV heads, their channels
  std::int64_t repeat = 1;              ///< query heads per source KV head
  std::vector<at::Tensor> outputs;   ///< P_h^T P_h of every query head, [head_dim, head_dim]; act+out and attn+out only
  std::vector<at::Tensor> attended;  ///< attn+out: E[y_h y_h^T] of every query head, mean treated as Sigma's; Sigma is
                                     ///< their mean
  bool has_own_decoders() const { return !outputs.empty(); }
};
/// Error of a value fold in the problem's metric: sum_h tr(P_h^T P_h R_h Y_h R_h^T), R_h = E_kv(h) - B_h A, with Y_h
/// the attended moment (attn+out) or Sigma (act+out); tr((I - BA) Sigma (I - BA)^T) for weights and act.
double loss_of(const ValueProblem& problem, const Basis& basis);
/// The same for keeping nothing.
double total_of(const ValueProblem& problem);

/// Plain mean, output projection unchanged. Its spectrum is the kernel's.
Basis fold_values_meanpool(const ValueProblem& problem);
/// methods.md 6.4 (mha2gqa, arXiv 2412.20677): the mean of heads turned by orthogonal maps O_k towards each other, then
/// scaled to the root mean square of its sources; decoder O_k.
Basis fold_values_procrustes(const ValueProblem& problem);
/// methods.md 4.1 to 4.3: the kernel, `width` channels; with attention statistics and `sweeps` > 0 polished by
/// alternating least squares (polish_values), which gives every query head its own decoder. loss and total are
/// loss_of() and total_of(); energies are the kernel's, which for attn+out weighs all heads' attention alike.
Basis fold_values_svd(const ValueProblem& problem, std::int64_t width, std::int64_t sweeps = 0);
/// methods.md 4.3, tier 2b, from `basis`. Decoders in closed form, encoder by preconditioned conjugate gradients; a
/// step that does not lower the loss is not taken. Ends early when a sweep gains less than 1e-7 of the loss. Returns
/// the losses after each half step, the first one before all.
std::vector<double> polish_values(const ValueProblem& problem, Basis& basis, std::int64_t sweeps);

/// Multiplies the encoder by one positive number and divides the decoder by it so that merged channels carry the mean
/// energy of the source channels in `sigma`: 16-bit ranges stay healthy (methods.md 12.9). Products BA, and so scores,
/// do not change. Per-query-head decoders are divided too.
void normalise_scale(Basis& basis, const at::Tensor& sigma, std::int64_t head_dim);

}  // namespace headfold::folding
