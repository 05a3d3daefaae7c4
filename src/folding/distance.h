#pragma once
// What RoPE does to second moments when queries and keys meet at random distances (methods.md 6.1.4).

#include <ATen/ATen.h>

#include <cstdint>

namespace headfold::folding {

/// p(tau), tau = 0 .. context - 1, of uniform causal attention over `context` tokens: 2 (L - tau) / (L (L + 1)). [L]
/// float64. InternalError for context < 1.
at::Tensor triangular_law(std::int64_t context);

/// The linear map Y -> E[Z Y Z^T] on [d, d] matrices, Z the real form of diag(z_l) on the pairs (l, l + d/2) of a head,
/// and its adjoint. With z_l = e^{-i theta_l tau} it is Y -> sum_tau p(tau) R(-tau) Y R(-tau)^T: how a key moment looks
/// from a query that is tau positions later. In complex coordinates it multiplies E[z_l conj z_l'] and E[z_l z_l']
/// entry by entry with chi(theta_l -+ theta_l'), chi(w) = sum_tau p(tau) e^{iw tau}.
class Twist {
 public:
  /// `frequencies` [d/2], `law` p(tau) [T] summing to one; both float64.
  static Twist rotation(const at::Tensor& frequencies, const at::Tensor& law);
  /// The same for the part of a key that is equal in all tokens. A number added to all scores of a query changes
  /// nothing, so what this part adds on average over distances need not count: the `band` slowest pairs have z_l less
  /// its mean over distances, the others z_l less (1 - sqrt(mean_weight)) of it.
  static Twist of_constants(const at::Tensor& frequencies, const at::Tensor& law, std::int64_t band,
                            double mean_weight);
  at::Tensor forward(const at::Tensor& y) const { return apply(y, same_, opposite_); }
  /// tr(W forward(Y)) = tr(adjoint(W) Y). For rotation(): W -> sum_tau p(tau) R(tau) W R(tau)^T, which takes the
  /// moment of the queries of a head to the weight M of its keys' errors.
  at::Tensor adjoint(const at::Tensor& w) const;

 private:
  static at::Tensor apply(const at::Tensor& y, const at::Tensor& same, const at::Tensor& opposite);
  at::Tensor same_, opposite_;  ///< E[z_l conj z_l'], E[z_l z_l'] of the multipliers, complex [d/2, d/2]
};

}  // namespace headfold::folding
