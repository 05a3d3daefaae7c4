#include <ATen/Parallel.h>
#include <headfold/base/error.h>
#include <headfold/folding/bases.h>
#include <headfold/model/model.h>

namespace headfold::folding {

LayerProblem load_problem(const checkpoint::Reader& reader, const calibration::StatisticsFile* statistics,
                          std::int64_t layer, Part part, const FoldOptions& options, Half half) {
  LayerProblem problem;
  problem.weights = load_layer_weights(reader, layer, part);
  problem.rotates = reader.config().family == checkpoint::Family::llama;
  problem.centred_values = reader.config().family == checkpoint::Family::bloom;
  if (problem.rotates) problem.frequencies = model::rope_inverse_frequencies(reader.config());
  problem.context = options.context > 0     ? options.context
                    : statistics != nullptr ? statistics->header().sequence_length
                                            : reader.config().max_positions;
  if (statistics != nullptr) {
    calibration::LayerStatistics sums = statistics->layer(layer);
    if (half != Half::all) sums = sums.half(half == Half::even ? 0 : 1);
    problem.moments = moments_of(sums, problem.weights, options.sink_weight);
    problem.has_moments = true;
  }
  return problem;
}

Basis key_basis(const LayerProblem& problem, const std::vector<std::int64_t>& kv_heads, const FoldOptions& options,
                std::int64_t /*width*/) {
  const GroupWeights group = group_of(problem.weights, kv_heads);
  const LayerMoments* moments = problem.moments_or_null();
  switch (options.keys) {
    case KeyFold::meanpool:
      return fold_keys_meanpool(group, moments, options.key_metric, problem.rotates);
    case KeyFold::rope_commuting:
      return fold_keys_rope_commuting(group, moments, options.key_metric, options.weight_ridge);
    case KeyFold::procrustes:
    case KeyFold::latent:
      break;
    case KeyFold::norope: {
      Basis basis = fold_keys_norope(group, moments, options.key_metric, options.weight_ridge);
      normalise_scale(
          basis,
          unrotated_key_problem(group, moments, options.key_metric == Metric::weights ? Metric::weights : Metric::act)
              .sigma,
          group.head_dim);
      return basis;
    }
    case KeyFold::post_rotation: {
      at::Tensor gram;
      if (problem.has_moments && problem.moments.rotated_keys.defined()) {
        const at::Tensor rows = block_index(kv_heads, group.head_dim);
        gram = problem.moments.rotated_keys.index_select(0, rows).index_select(1, rows);
      }
      Basis basis = fold_keys_post_rotation(group, moments, gram, options.key_metric, options.weight_ridge);
      if (options.key_metric == Metric::act_query) normalise_scale(basis, gram, group.head_dim);
      return basis;
    }
  }
  throw InternalError("unknown key fold");
}

Basis value_basis(const LayerProblem& problem, const std::vector<std::int64_t>& kv_heads, const FoldOptions& options,
                  std::int64_t /*width*/) {
  const GroupWeights group = group_of(problem.weights, kv_heads);
  if (options.values == ValueFold::meanpool)
    return fold_values_meanpool(group, problem.moments_or_null(), options.value_metric, problem.centred_values);
  return fold_values_svd(group, problem.moments_or_null(), options.value_metric, problem.centred_values);
}

void for_each_item(std::int64_t count, const std::function<void(std::int64_t)>& work) {
  struct Threads {
    int before = at::get_num_threads();
    ~Threads() { at::set_num_threads(before); }
  };
  const Threads restore;
  if (count <= 1 || restore.before <= 1) {
    at::set_num_threads(1);
    for (std::int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  // Inside a parallel region libtorch and an OpenMP BLAS run on the calling thread alone.
  at::parallel_for(0, count, 1, [&](std::int64_t begin, std::int64_t end) {
    const at::NoGradGuard no_grad;
    for (std::int64_t i = begin; i < end; ++i) work(i);
  });
}

std::pair<std::int64_t, std::int64_t> share_of(std::int64_t items, int rank, int size) {
  return {items * rank / size, items * (rank + 1) / size};
}

}  // namespace headfold::folding
