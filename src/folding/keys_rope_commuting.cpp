#include <headfold/folding/folds.h>

namespace headfold::folding {

namespace {

/// Writes complex coefficients [size] as 2 x 2 real blocks [[a, -b], [b, a]] on rows (l, l + half) of a [2 half, size *
/// 2 half] map.
void write_blocks(at::Tensor& map, const at::Tensor& coefficients, std::int64_t l, std::int64_t half) {
  const std::int64_t size = coefficients.size(0);
  const at::Tensor view = map.view({2 * half, size, 2 * half});
  const at::Tensor real = at::real(coefficients);
  const at::Tensor imaginary = at::imag(coefficients);
  view.select(0, l).select(1, l).copy_(real);
  view.select(0, l).select(1, l + half).copy_(-imaginary);
  view.select(0, l + half).select(1, l).copy_(imaginary);
  view.select(0, l + half).select(1, l + half).copy_(real);
}

}  // namespace

Basis fold_keys_rope_commuting(const GroupWeights& group, const LayerMoments* moments, Metric metric,
                               double weight_ridge) {
  const std::int64_t size = group.size;
  const std::int64_t half = group.head_dim / 2;
  // Complex Gram of frequency l from the real covariance: E[(x_a + i y_a) conj(x_b + i y_b)] = (xx + yy) + i (yx - xy).
  const at::Tensor sigma =
      rotating_key_problem(group, moments, Metric::weights == metric ? Metric::weights : Metric::act).sigma;
  const at::Tensor blocks = sigma.view({size, 2, half, size, 2, half});
  const auto part = [&](std::int64_t a, std::int64_t b) {
    return blocks.select(1, a).select(3, b).diagonal(0, 1, 3).permute({2, 0, 1});
  };  // [half, size, size]
  const at::Tensor gram = at::complex((part(0, 0) + part(1, 1)).contiguous(), (part(1, 0) - part(0, 1)).contiguous());

  at::Tensor weights = at::ones({size, half}, at::kDouble);
  const bool weighted = metric == Metric::act_query;
  if (weighted) weights = query_energies(group, moments->input);
  // (1): (1 / 2d) lam |k - b c|^2 is the mean squared score error.
  const double unit = weighted ? 1.0 / (2.0 * static_cast<double>(group.head_dim)) : 1.0;

  Basis basis;
  basis.encoder = at::zeros({2 * half, size * 2 * half}, at::kDouble);
  at::Tensor decoder_t = at::zeros({2 * half, size * 2 * half}, at::kDouble);
  at::Tensor energies = at::zeros({size, half}, at::kDouble);
  for (std::int64_t l = 0; l < half; ++l) {
    at::Tensor lambda = weights.select(1, l);
    const double largest = lambda.max().item<double>();
    const bool dead =
        !(largest > 0);  // no query of the group looks at this frequency: it costs nothing, whatever is merged
    lambda = dead ? at::ones_like(lambda) : lambda.clamp_min(1e-12 * largest);
    std::vector<at::Tensor> lambda_blocks;
    if (weighted)
      for (std::int64_t k = 0; k < size; ++k)
        lambda_blocks.push_back(lambda.slice(0, k, k + 1).view({1, 1}).to(at::kComplexDouble));
    const at::Tensor matrix = gram[l];
    const linalg::LowRank one = linalg::weighted_low_rank(matrix, lambda_blocks, 1, weighted ? weight_ridge : 0.0);
    const double kept = one.energies[0].item<double>();
    if (!dead) {
      basis.loss += unit * one.loss;
      basis.total += unit * one.total;
      energies.select(1, l).copy_(one.energies * unit);
    }
    if (!(kept > 0)) continue;  // no key energy: zeros (methods.md 12.6)
    const double scale = std::sqrt(at::real(matrix.diagonal()).mean().item<double>() / kept);
    write_blocks(basis.encoder, one.encoder[0] * scale, l, half);
    // B_k holds [[re, -im], [im, re]]; its transpose is the block of the conjugate.
    write_blocks(decoder_t, at::conj(one.decoder.select(1, 0)).resolve_conj() / scale, l, half);
  }
  basis.decoder = decoder_t.t().contiguous();
  // Channels in the order the fold keeps them: the strongest component of every frequency (two real channels each),
  // then the second ones.
  basis.energies = at::cat({energies, energies}, 1).view({-1}) / 2.0;
  return basis;
}

}  // namespace headfold::folding
