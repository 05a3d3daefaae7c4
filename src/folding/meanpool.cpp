#include "meanpool.h"

namespace headfold::folding {

Basis mean_basis(const Problem& problem, std::int64_t size, std::int64_t head_dim) {
  Basis basis = linalg::weighted_low_rank(problem.sigma, problem.lambda, head_dim);
  basis.decoder = at::eye(head_dim, at::kDouble).repeat({size, 1});
  basis.encoder = basis.decoder.t() / static_cast<double>(size);
  basis.loss = loss_of(problem, basis.encoder, basis.decoder);
  return basis;
}

}  // namespace headfold::folding
