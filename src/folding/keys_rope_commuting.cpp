#include <headfold/base/error.h>
#include <headfold/base/profile.h>
#include <headfold/linalg/linalg.h>

#include "complex_pairs.h"
#include "keys_distance.h"

#include <optional>

namespace headfold::folding {

namespace {

/// Formula (1) of methods.md 6.1.1: one Hermitian Gram [g, g] and one weight per head for every frequency.
struct CommutingProblem {
  at::Tensor gram;      ///< C_l, [d/2, g, g] complex
  at::Tensor energies;  ///< lam [g, d/2]; ones but for metrics with queries
  bool weighted = false;
  double unit = 1;  ///< (1 / 2d) lam |k - b c|^2 is the mean squared score error
};

/// Same-frequency Grams from the group's rows: half the work of the whole covariance, and no [g d, g d] product.
at::Tensor grams_of_rows(const GroupWeights& group, const at::Tensor& moment) {
  const std::int64_t half = group.head_dim / 2, size = group.size;
  const auto by_frequency = [&](const at::Tensor& rows) {  // two of [d/2, g, hidden + 1]
    const at::Tensor view = rows.view({size, 2, half, -1}).permute({1, 2, 0, 3});
    return std::pair(view[0].contiguous(), view[1].contiguous());
  };
  const auto [x, y] = by_frequency(group.key);
  const auto [mx, my] = by_frequency(at::matmul(group.key, moment));
  const at::Tensor xt = x.transpose(1, 2), yt = y.transpose(1, 2);
  const at::Tensor gram = at::complex(at::bmm(mx, xt) + at::bmm(my, yt), at::bmm(my, xt) - at::bmm(mx, yt));
  return 0.5 * (gram + linalg::conjugate_transpose(gram));
}

bool has_queries(Metric metric) {
  return metric == Metric::act_query || metric == Metric::act_query_dist;
}

CommutingProblem commuting_problem(const GroupWeights& group, const LayerMoments* moments, Metric metric,
                                   const KeyContext& context) {
  CommutingProblem problem;
  const std::int64_t half = group.head_dim / 2;
  problem.energies = at::ones({group.size, half}, at::kDouble);
  if (metric == Metric::weights) {
    problem.gram = complex_grams(key_weight_gram(group), group.size);
    return problem;
  }
  if (moments == nullptr) throw InternalError("a fold with an activation metric was asked for without statistics");
  problem.weighted = has_queries(metric);
  if (problem.weighted) problem.unit = 1.0 / (2.0 * static_cast<double>(group.head_dim));
  // k_a conj(k_b) and |q|^2 of one frequency do not feel the rotation, so that Grams of rotated keys and queries hold
  // them as well; nothing of the size of the input's moment is multiplied then.
  if (metric == Metric::act_query && context.rotated_keys.defined() && !context.rotated_queries.empty()) {
    problem.gram = complex_grams(context.rotated_keys, group.size);
    for (std::int64_t k = 0; k < group.size; ++k)
      problem.energies[k].copy_(context.rotated_queries[static_cast<std::size_t>(k)].diagonal().view({2, half}).sum(0));
  } else {
    problem.gram =
        group.key_gram.defined() ? complex_grams(group.key_gram, group.size) : grams_of_rows(group, moments->input);
    if (problem.weighted) problem.energies = query_energies(group, moments->input);
  }
  if (context.mean_weight != 1.0) {
    const at::Tensor mean = key_mean(group, *moments).view({group.size, 2, half});
    const at::Tensor z = at::complex(mean.select(1, 0).contiguous(), mean.select(1, 1).contiguous()).t().unsqueeze(2);
    problem.gram = problem.gram - (1.0 - context.mean_weight) * at::matmul(z, linalg::conjugate_transpose(z));
  }
  return problem;
}

/// Rows of the band in one head, and in all heads one after the other: the order of band_problem().
std::pair<at::Tensor, at::Tensor> band_index(const GroupWeights& group, std::int64_t band) {
  const at::Tensor slots = at::tensor(band_rows(group.head_dim, band), at::kLong);
  return {slots, (at::arange(group.size, at::kLong).unsqueeze(1) * group.head_dim + slots).reshape({-1})};
}

/// Methods.md 6.1.3: the slow pairs' rows of all heads as one problem without rotation. With `objective`
/// (act+query+dist) the weights are the exact ones over distances, else those of no rotation at all.
Problem band_problem(const GroupWeights& group, const LayerMoments* moments, Metric metric, const KeyContext& context,
                     const DistanceObjective* objective) {
  const std::vector<std::int64_t> rows = band_rows(group.head_dim, context.band);
  const at::Tensor index = at::tensor(rows, at::kLong);
  Problem problem;
  if (metric == Metric::weights) {
    const at::Tensor of_heads = band_index(group, context.band).second;
    problem.sigma = key_weight_gram(group).index_select(0, of_heads).index_select(1, of_heads);
    return problem;
  }
  problem.sigma = centred_key_gram(group, *moments, rows);
  if (!has_queries(metric)) return problem;
  for (std::int64_t k = 0; k < group.size; ++k)
    problem.lambda.push_back(objective != nullptr
                                 ? objective->key_weight(k).index_select(0, index).index_select(1, index)
                                 : query_gram(group, k, *moments, rows) / static_cast<double>(group.head_dim));
  return problem;
}

/// Puts the band's channels into its slots: the strongest two into the slowest pair, and so on.
linalg::LowRank place_band(Basis& basis, const Problem& problem, const GroupWeights& group, std::int64_t band,
                           double weight_ridge) {
  const auto [slots, of_heads] = band_index(group, band);
  linalg::LowRank kept =
      linalg::weighted_low_rank(problem.sigma, problem.lambda, 2 * band, problem.lambda.empty() ? 0.0 : weight_ridge);
  basis.encoder = basis.encoder.clone();
  basis.decoder = basis.decoder.clone();
  basis.encoder.index_put_({slots.unsqueeze(1), of_heads}, kept.encoder);
  basis.decoder.index_put_({of_heads.unsqueeze(1), slots}, kept.decoder);
  return kept;
}

/// Every slot pair gets the mean energy of the source keys at its frequency; products BA stay.
void normalise_slots(Basis& basis, const at::Tensor& gram, const at::Tensor& sigma) {
  const std::int64_t half = basis.encoder.size(0) / 2;
  const at::Tensor merged = (at::matmul(basis.encoder, sigma) * basis.encoder).sum(1).view({2, half}).sum(0);
  const at::Tensor source = at::real(gram.diagonal(0, 1, 2)).mean(1);
  const at::Tensor scale = at::where((merged > 1e-200).logical_and(source > 1e-200),
                                     (source / merged.clamp_min(1e-200)).sqrt(), at::ones_like(merged))
                               .repeat({2});
  basis.encoder = basis.encoder * scale.unsqueeze(1);
  basis.decoder = basis.decoder / scale;
}

}  // namespace

double rope_commuting_loss(const GroupWeights& group, const LayerMoments* moments, Metric metric,
                           const KeyContext& context, const Basis* basis) {
  if (metric == Metric::act_query_dist) {
    if (moments == nullptr) throw InternalError("a distance metric was asked for without calibration statistics");
    const DistanceObjective objective(group, *moments, context);
    return basis == nullptr ? objective.total() : objective.loss(basis->encoder, basis->decoder);
  }
  const std::int64_t half = group.head_dim / 2, outside = half - context.band;
  const CommutingProblem problem = commuting_problem(group, moments, metric, context);
  at::Tensor residual = at::eye(group.size, at::kComplexDouble).expand({half, group.size, group.size});
  if (basis != nullptr) {
    const at::Tensor a = read_complex(basis->encoder);
    const at::Tensor b = read_complex(basis->decoder.t()).conj().resolve_conj();
    residual = residual - at::matmul(b.unsqueeze(2), a.unsqueeze(1));
  }
  const at::Tensor error =
      at::real(at::matmul(at::matmul(residual, problem.gram), linalg::conjugate_transpose(residual))
                   .diagonal(0, 1, 2));  // [d/2, g]
  double loss = problem.unit * (error * problem.energies.t()).slice(0, 0, outside).sum().item<double>();
  if (context.band > 0) {
    const Problem band = band_problem(group, moments, metric, context, nullptr);
    const auto [slots, of_heads] = band_index(group, context.band);
    loss += basis == nullptr ? total_of(band)
                             : loss_of(band, basis->encoder.index_select(0, slots).index_select(1, of_heads),
                                       basis->decoder.index_select(0, of_heads).index_select(1, slots));
  }
  return loss;
}

linalg::Conditioning rope_commuting_conditioning(const GroupWeights& group, const LayerMoments* moments, Metric metric,
                                                 const KeyContext& context, double tau) {
  const CommutingProblem problem = commuting_problem(group, moments, metric, context);
  const at::Tensor gram = 0.5 * (problem.gram + linalg::conjugate_transpose(problem.gram));
  const double scale = at::real(gram.diagonal(0, 1, 2)).max().item<double>();
  if (!std::isfinite(scale) || !std::isfinite(at::view_as_real(gram).sum().item<double>()))
    throw NumericalError("the keys' Gram to be factorised contains NaN or Inf");
  if (!(scale > 0)) return {1.0, 1.0};
  at::Tensor values;
  {
    const Timed timed(Work::eigen);
    values = std::get<0>(at::linalg_eigvalsh((gram / scale).contiguous(), "L").reshape({-1}).sort());
  }
  const double* value = values.data_ptr<double>();
  const std::int64_t n = values.numel();
  std::int64_t first = 0;
  while (first < n - 1 && !(value[first] > tau * value[n - 1])) ++first;
  return {value[n - 1] / value[first], static_cast<double>(first) / static_cast<double>(n)};
}

Basis fold_keys_rope_commuting(const GroupWeights& group, const LayerMoments* moments, Metric metric,
                               double weight_ridge, const KeyContext& context) {
  const std::int64_t size = group.size, half = group.head_dim / 2, band = context.band, outside = half - band;
  if (band < 0 || band > half) throw InternalError(fmt::format("a slow band of {} among {} pairs", band, half));
  const CommutingProblem problem = commuting_problem(group, moments, metric, context);

  Basis basis;
  basis.encoder = at::zeros({2 * half, size * 2 * half}, at::kDouble);
  at::Tensor decoder_t = at::zeros({2 * half, size * 2 * half}, at::kDouble);
  at::Tensor energies = at::zeros({size, half}, at::kDouble);
  for (std::int64_t l = 0; l < half; ++l) {
    at::Tensor lambda = problem.energies.select(1, l);
    const double largest = lambda.max().item<double>();
    const bool dead =
        !(largest > 0);  // no query of the group looks at this frequency: it costs nothing, whatever is merged
    lambda = dead ? at::ones_like(lambda) : lambda.clamp_min(1e-12 * largest);
    std::vector<at::Tensor> lambda_blocks;
    if (problem.weighted)
      for (std::int64_t k = 0; k < size; ++k)
        lambda_blocks.push_back(lambda.slice(0, k, k + 1).view({1, 1}).to(at::kComplexDouble));
    const at::Tensor matrix = problem.gram[l];
    const at::Tensor root = lambda.sqrt();
    const at::Tensor weighed = matrix * at::outer(root, root);
    const double norm = weighed.norm().item<double>();
    basis.imaginary_share.push_back(norm > 0 ? at::imag(weighed).norm().item<double>() / norm : 0.0);
    const linalg::LowRank one =
        linalg::weighted_low_rank(matrix, lambda_blocks, 1, problem.weighted ? weight_ridge : 0.0);
    const double kept = one.energies[0].item<double>();
    basis.leading_share.push_back(one.total > 0 ? kept / one.total : 1.0);
    if (!dead && l < outside) {
      basis.loss += problem.unit * one.loss;
      basis.total += problem.unit * one.total;
      energies.select(1, l).copy_(one.energies * problem.unit);
    }
    if (!(kept > 0)) continue;  // no key energy: zeros (methods.md 12.6)
    const double scale = std::sqrt(at::real(matrix.diagonal()).mean().item<double>() / kept);
    write_complex(basis.encoder, one.encoder[0] * scale, l);
    // B_k holds [[re, -im], [im, re]]; its transpose is the block of the conjugate.
    write_complex(decoder_t, at::conj(one.decoder.select(1, 0)).resolve_conj() / scale, l);
  }
  basis.decoder = decoder_t.t().contiguous();
  const Basis commuting = basis;  // of all frequencies: where a distance metric may start, too

  const bool distances = metric == Metric::act_query_dist;
  std::optional<DistanceObjective> objective;
  if (distances) objective.emplace(group, *moments, context);
  at::Tensor band_energies = at::zeros({size * 2 * band}, at::kDouble);
  if (band > 0) {
    const linalg::LowRank kept =
        place_band(basis, band_problem(group, moments, metric, context, distances ? &*objective : nullptr), group, band,
                   weight_ridge);
    basis.loss += kept.loss;
    basis.total += kept.total;
    band_energies = kept.energies;
  }
  // Channels in the order the fold keeps them: the strongest component of every frequency (two real channels each) with
  // the strongest 2 band of the band, then the second ones.
  const at::Tensor pairs = energies.slice(1, 0, outside) / 2.0;
  basis.energies = at::cat({pairs, pairs, band_energies.view({size, 2 * band})}, 1).reshape({-1});
  if (distances) {
    basis.total = objective->total();
    basis.loss = polish(*objective, context.polish, basis.encoder, basis.decoder);
    if (band > 0) {
      // Maps that commute with every rotation are among those the band allows: never worse than no band.
      Basis other = commuting;
      const double loss = polish(*objective, context.polish, other.encoder, other.decoder);
      if (loss < basis.loss) {
        basis.encoder = other.encoder;
        basis.decoder = other.decoder;
        basis.loss = loss;
      }
    }
    // The spectrum is that of the start, scaled so that what is kept and what is lost sum up.
    const at::Tensor kept = basis.energies.slice(0, 0, 2 * half), lost = basis.energies.slice(0, 2 * half);
    const auto scaled = [](const at::Tensor& part, double sum) {
      const double now = part.sum().item<double>();
      if (now > 0) return part * (std::max(0.0, sum) / now);
      return part.numel() > 0 ? at::full_like(part, std::max(0.0, sum) / static_cast<double>(part.numel())) : part;
    };
    basis.energies = at::cat({scaled(kept, basis.total - basis.loss), scaled(lost, basis.loss)}, 0);
  }
  if (distances || band > 0)
    normalise_slots(basis, problem.gram,
                    metric == Metric::weights ? key_weight_gram(group) : key_gram(group, *moments));
  return basis;
}

}  // namespace headfold::folding
