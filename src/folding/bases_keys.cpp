// Key folds of a layer: from options and statistics to the problem, the fold and its loss.

#include <headfold/base/error.h>
#include <headfold/folding/bases.h>
#include <headfold/folding/distance.h>

namespace headfold::folding {

namespace {

struct KeySide {
  GroupWeights group;
  const LayerMoments* moments = nullptr;
  KeyContext context;
};

KeySide key_side(const LayerProblem& problem, const std::vector<std::int64_t>& kv_heads, const FoldOptions& options) {
  KeySide side;
  side.moments = problem.moments_or_null();
  const auto read_group = [&] { side.group = fold_group(problem, kv_heads, Part::keys, options.key_metric); };
  if (!problem.rotates) {
    read_group();
    return side;
  }
  side.context.frequencies = problem.frequencies;
  side.context.mean_weight = options.mean_weight;
  side.context.polish = options.polish;
  if (options.keys == KeyFold::rope_commuting) side.context.band = slow_band_of(problem, options);
  if (!problem.has_moments) {
    read_group();
    return side;
  }
  const LayerMoments& moments = problem.moments;
  side.context.polish =
      moments.polish_sweeps(options.polish, static_cast<std::int64_t>(kv_heads.size()) * problem.weights.head_dim);
  if (options.key_metric == Metric::act_query_dist)
    side.context.distance_law = moments.distance_law.defined() ? moments.distance_law : triangular_law(problem.context);
  if (moments.rotated_keys.defined()) {
    const at::Tensor rows = block_index(kv_heads, problem.weights.head_dim);
    side.context.rotated_keys = moments.rotated_keys.block(rows);
  }
  // Query Grams hold position 0 with weight one: they stand for the energies of E[x x^T] only where it does, too.
  if (moments.rotated_queries.defined() && (options.keys == KeyFold::post_rotation || options.sink_weight == 1.0))
    for (const std::int64_t head : kv_heads) {
      const std::int64_t repeat = problem.weights.key_repeat();
      side.context.rotated_queries.push_back(
          moments.rotated_queries.slice(0, head * repeat, (head + 1) * repeat).sum(0));
    }
  const KeyContext& context = side.context;
  const bool rotated_grams =
      context.rotated_keys.defined() && (!context.rotated_queries.empty() || options.key_metric == Metric::act);
  if (problem.grams == nullptr && context.mean_weight == 1.0 && rotated_grams &&
      ((options.keys == KeyFold::rope_commuting && options.key_metric == Metric::act_query && context.band == 0) ||
       (options.keys == KeyFold::post_rotation && options.key_metric != Metric::weights))) {
    side.group.size = std::ssize(kv_heads);  // rotated Grams say it all: nothing of the input's moment is multiplied
    side.group.head_dim = problem.weights.head_dim;
  } else {
    read_group();
  }
  return side;
}

/// The problem in which a fold's loss is measured; not for rope-commuting.
Problem key_problem(const LayerProblem& problem, const KeySide& side, const FoldOptions& options, Metric metric) {
  if (!problem.rotates || options.keys == KeyFold::norope)
    return unrotated_key_problem(side.group, side.moments, metric);
  if (options.keys == KeyFold::post_rotation)
    return rotated_key_problem(side.group, side.moments, metric, side.context);
  return rotating_key_problem(side.group, side.moments, metric, side.context);
}

}  // namespace

std::int64_t slow_band_of(const at::Tensor& frequencies, std::int64_t context, const FoldOptions& options) {
  if (options.slow_band != kSlowBandAuto) return options.slow_band;
  if (!frequencies.defined()) throw InternalError("a slow band was asked for without frequencies");
  return (frequencies * static_cast<double>(context) < 0.5).sum().item<std::int64_t>();
}

std::int64_t slow_band_of(const LayerProblem& problem, const FoldOptions& options) {
  return slow_band_of(problem.frequencies, problem.context, options);
}

Basis key_basis(const LayerProblem& problem, const std::vector<std::int64_t>& kv_heads, const FoldOptions& options,
                std::int64_t width) {
  const KeySide side = key_side(problem, kv_heads, options);
  const std::int64_t head_dim = side.group.head_dim;
  if (options.keys != KeyFold::latent && width != 0 && width != head_dim)
    throw InternalError(
        fmt::format("a key fold to {} channels; only latents may differ from head_dim {}", width, head_dim));
  if (options.keys == KeyFold::rope_commuting)
    return fold_keys_rope_commuting(side.group, side.moments, options.key_metric, options.weight_ridge, side.context);
  const Problem folded = key_problem(problem, side, options, options.key_metric);
  switch (options.keys) {
    case KeyFold::meanpool:
      return fold_keys_meanpool(side.group, folded);
    case KeyFold::procrustes:
      return fold_keys_procrustes(side.group, folded, problem.rotates);
    case KeyFold::norope:
    case KeyFold::post_rotation:
    case KeyFold::latent: {
      Basis basis = fold_keys_latent(folded, width == 0 ? head_dim : width, options.weight_ridge);
      // Rotated keys of an unweighted fold are stored as the orthonormal projections they are.
      if (options.keys != KeyFold::post_rotation || !folded.lambda.empty())
        normalise_scale(basis, folded.sigma, head_dim);
      return basis;
    }
    case KeyFold::rope_commuting:
      break;
  }
  throw InternalError("unknown key fold");
}

double key_loss(const LayerProblem& problem, const std::vector<std::int64_t>& kv_heads, const FoldOptions& options,
                const Basis& basis) {
  const KeySide side = key_side(problem, kv_heads, options);
  if (options.keys == KeyFold::rope_commuting)
    return rope_commuting_loss(side.group, side.moments, options.key_metric, side.context, &basis);
  return loss_of(key_problem(problem, side, options, options.key_metric), basis.encoder, basis.decoder);
}

double key_total(const LayerProblem& problem, const std::vector<std::int64_t>& kv_heads, const FoldOptions& options) {
  const KeySide side = key_side(problem, kv_heads, options);
  if (options.keys == KeyFold::rope_commuting)
    return rope_commuting_loss(side.group, side.moments, options.key_metric, side.context, nullptr);
  return total_of(key_problem(problem, side, options, options.key_metric));
}

linalg::Conditioning key_conditioning(const LayerProblem& problem, const std::vector<std::int64_t>& kv_heads,
                                      const FoldOptions& options) {
  const KeySide side = key_side(problem, kv_heads, options);
  if (options.keys == KeyFold::rope_commuting)
    return rope_commuting_conditioning(side.group, side.moments, options.key_metric, side.context);
  return linalg::conditioning(
      key_problem(problem, side, options, options.key_metric == Metric::weights ? Metric::weights : Metric::act).sigma);
}

}  // namespace headfold::folding
