#include <headfold/base/error.h>
#include <headfold/folding/folds.h>
#include <headfold/linalg/linalg.h>

#include "meanpool.h"

namespace headfold::folding {

namespace {

constexpr int kIterations = 200;
constexpr double kConverged = 1e-9;  // of the energy that the mean keeps

/// Orthogonal factor U V^T of the polar decomposition.
at::Tensor polar(const at::Tensor& m) {
  const linalg::ThinSvd parts = linalg::thin_svd(m);
  return at::matmul(parts.u, parts.vh);
}

}  // namespace

Basis fold_values_procrustes(const ValueProblem& problem) {
  const std::int64_t g = problem.size, d = problem.head_dim;
  Basis basis = mean_basis(problem, g, d);
  at::Tensor turns = basis.decoder;  // [O_1; …; O_g], from O = I
  // sum_kj tr(O_k^T Sigma_kj O_j), which every iteration raises: the energy of the mean.
  const auto energy = [&](const at::Tensor& o, const at::Tensor& product) {
    return (o * product).sum().item<double>();
  };
  at::Tensor product = at::matmul(problem.sigma, turns);
  double before = energy(turns, product);
  for (int i = 0; i < kIterations && g > 1; ++i) {
    std::vector<at::Tensor> parts;
    for (std::int64_t k = 0; k < g; ++k) parts.push_back(polar(product.slice(0, k * d, (k + 1) * d)));
    const at::Tensor next = at::cat(parts, 0);
    const at::Tensor next_product = at::matmul(problem.sigma, next);
    const double after = energy(next, next_product);
    if (!(after > before)) break;
    const bool done = after - before <= kConverged * after;
    turns = next;
    product = next_product;
    before = after;
    if (done) break;
  }
  // The mean of turned heads is shorter than they are; restored, it has their root mean square (methods.md 6.4).
  const double source = problem.sigma.trace().item<double>() / static_cast<double>(g);
  const double merged = before / static_cast<double>(g * g);
  const double scale = merged > 0 && source > 0 ? std::sqrt(source / merged) : 1.0;
  basis.encoder = (turns.t() * (scale / static_cast<double>(g))).contiguous();
  basis.decoder = turns;
  basis.loss = loss_of(problem, basis);
  basis.total = total_of(problem);
  return basis;
}

}  // namespace headfold::folding
