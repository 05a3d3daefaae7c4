#include <headfold/folding/folds.h>

#include "complex_pairs.h"

namespace headfold::folding {

namespace {

constexpr int kIterations = 200;
constexpr double kStill = 1e-12;

/// Unit phases phi [heads] that maximise |phi^H C phi| from phi = 1, C Hermitian [heads, heads].
at::Tensor aligned_phases(const at::Tensor& gram) {
  at::Tensor phi = at::ones({gram.size(0)}, at::kComplexDouble);
  const double negligible = 1e-14 * at::real(gram.diagonal()).sum().item<double>();
  for (int i = 0; i < kIterations; ++i) {
    const at::Tensor image = at::mv(gram, phi);
    const at::Tensor size = image.abs();
    // A head that shares nothing with the others keeps its phase.
    const at::Tensor next = at::where(size > negligible, image / size.clamp_min(1e-300), phi);
    const double change = (next - phi).abs().max().item<double>();
    phi = next;
    if (change < kStill) break;
  }
  return phi;
}

/// Orthogonal O [heads, d, d], O_k <- polar((1/g) sum_j Sigma[k, j] O_j) from O = I.
at::Tensor aligned_turns(const at::Tensor& sigma, std::int64_t heads, std::int64_t d) {
  at::Tensor turns = at::eye(d, at::kDouble).repeat({heads, 1});  // stacked [heads d, d]
  for (int i = 0; i < kIterations; ++i) {
    const at::Tensor image = at::matmul(sigma, turns) / static_cast<double>(heads);
    std::vector<at::Tensor> next;
    for (std::int64_t k = 0; k < heads; ++k) {
      const at::Tensor block = image.slice(0, k * d, (k + 1) * d);
      if (!(block.abs().max().item<double>() > 0)) {
        next.push_back(turns.slice(0, k * d, (k + 1) * d));
        continue;
      }
      const linalg::ThinSvd parts = linalg::thin_svd(block);
      next.push_back(at::matmul(parts.u, parts.vh));
    }
    const at::Tensor stacked = at::cat(next, 0);
    const double change = (stacked - turns).abs().max().item<double>();
    turns = stacked;
    if (change < kStill) break;
  }
  return turns;
}

}  // namespace

Basis fold_keys_procrustes(const GroupWeights& group, const Problem& problem, bool rotates) {
  const std::int64_t size = group.size, d = group.head_dim;
  Basis basis = linalg::weighted_low_rank(problem.sigma, problem.lambda, d);  // total and spectrum
  if (rotates) {
    const at::Tensor grams = complex_grams(problem.sigma, size);
    at::Tensor decoder_t = at::zeros({d, size * d}, at::kDouble);
    for (std::int64_t l = 0; l < d / 2; ++l)
      write_complex(decoder_t, aligned_phases(grams[l]).conj().resolve_conj(), l);
    basis.decoder = decoder_t.t().contiguous();
  } else {
    basis.decoder = aligned_turns(problem.sigma, size, d);
  }
  basis.encoder = basis.decoder.t() / static_cast<double>(size);
  // Norm restoration: means of heads that agree only in part are too short and flatten attention. Queries stay, so this
  // changes scores.
  const double merged = at::matmul(at::matmul(basis.encoder, problem.sigma), basis.encoder.t()).trace().item<double>();
  const double source = problem.sigma.trace().item<double>() / static_cast<double>(size);
  if (merged > 0) basis.encoder = basis.encoder * std::sqrt(source / merged);
  basis.loss = loss_of(problem, basis.encoder, basis.decoder);
  return basis;
}

}  // namespace headfold::folding
