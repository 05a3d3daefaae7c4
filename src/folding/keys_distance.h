#pragma once
// Private: the score error of maps that the rotation acts between, over a law of distances, and its minimisation.

#include <headfold/folding/distance.h>
#include <headfold/folding/folds.h>

namespace headfold::folding {

/// Encoder A [d, g d] and decoder B [g d, d] that act before the rotation, at the slots of a stock head. The score of
/// source head k at distance tau errs by q^T X k / sqrt(d), X = R(-tau) E_k - B_k R(-tau) A, so that
///   J = (1/d) sum_k sum_h sum_tau p(tau) tr(Sigma_q,h X Sigma X^T)                                  (methods.md 6.1.4)
/// whether or not A and B commute with the rotation. Where they do, this is tr(M (I - BA) Sigma (I - BA)^T).
class DistanceObjective {
 public:
  /// The moments of `group` over `context`.distance_law; the `context.band` slowest pairs' constants as
  /// Twist::of_constants() says.
  DistanceObjective(const GroupWeights& group, const LayerMoments& moments, const KeyContext& context);
  double total() const { return total_; }  ///< of keeping nothing
  double loss(const at::Tensor& encoder, const at::Tensor& decoder) const;
  /// M_k = sum_tau p R(tau) Sigma_q R(tau)^T / d of source head k.
  at::Tensor key_weight(std::int64_t k) const;
  /// The best decoder (encoder) for the given other one, inside the structure: complex numbers per (head, frequency)
  /// outside the band, any [2 band, 2 band] block inside it. Linear least squares.
  at::Tensor best_decoder(const at::Tensor& encoder, const at::Tensor& decoder) const;
  at::Tensor best_encoder(const at::Tensor& encoder, const at::Tensor& decoder) const;

 private:
  std::int64_t size_, head_dim_, band_;
  std::vector<at::Tensor> queries_;  ///< sum_h Sigma_q,h / d of every source head [d, d]
  std::vector<at::Tensor> sigma_;    ///< moments of the stacked keys [g d, g d]: centred, constant
  std::vector<Twist> twists_;        ///< of each of them
  double total_ = 0;
};

/// Half steps by turns, decoder first, then `sweeps` times encoder and decoder; stops early when a sweep gains nothing.
/// The loss never rises: a step that does not lower it is not taken. Returns the loss.
double polish(const DistanceObjective& objective, std::int64_t sweeps, at::Tensor& encoder, at::Tensor& decoder);

/// Minimises tr(sum_i G_i X S_i X^T) - 2 tr(rhs^T X) over X [d, blocks d] of that structure, G_i [d, d] and S_i
/// symmetric positive semidefinite, starting from `start`, which directions without curvature keep. Dense factorisation
/// up to `dense_limit` real unknowns, conjugate gradients above.
at::Tensor structured_minimum(const std::vector<std::pair<at::Tensor, at::Tensor>>& terms, const at::Tensor& rhs,
                              std::int64_t band, const at::Tensor& start, std::int64_t dense_limit = 1536);

}  // namespace headfold::folding
