#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <headfold/base/error.h>
#include <headfold/folding/bases.h>
#include <headfold/model/model.h>

#include <algorithm>

#include "group_grams.h"

namespace headfold::folding {

namespace {

LayerProblem problem_of(const checkpoint::Reader& reader, const calibration::StatisticsFile* statistics,
                        std::int64_t layer, Part part, const FoldOptions& options, at::ScalarType dtype) {
  LayerProblem problem;
  problem.layer = layer;
  problem.weights = load_layer_weights(reader, layer, part, dtype);
  problem.rotates = reader.config().family == checkpoint::Family::llama;
  problem.centred_values = reader.config().family == checkpoint::Family::bloom || reader.config().attention_bias;
  if (problem.rotates) problem.frequencies = model::rope_inverse_frequencies(reader.config());
  problem.measured_queries = !problem.rotates && options.sink_weight == 1.0;
  problem.context = options.context > 0     ? options.context
                    : statistics != nullptr ? statistics->header().sequence_length
                                            : reader.config().max_positions;
  return problem;
}

bool looks_at_queries(const FoldOptions& options) {
  return options.key_metric == Metric::act_query || options.key_metric == Metric::act_query_dist;
}

/// Whether folding keys needs neither W_K Cx nor W_Q Cx: Grams of keys and queries as they enter the scores say it all
/// (keys_rope_commuting.cpp, rotated_key_problem(); without rotation group_grams.cpp).
bool keys_need_no_input(const LayerProblem& problem, const FoldOptions& options,
                        const calibration::StatisticsHeader& header) {
  if (options.key_metric == Metric::weights) return true;
  if (!header.has_rotated_keys) return false;
  if (!problem.rotates) return !looks_at_queries(options) || (header.has_attention && problem.measured_queries);
  if (options.mean_weight != 1.0) return false;
  if (options.keys == KeyFold::post_rotation)
    return options.key_metric == Metric::act || (looks_at_queries(options) && header.has_attention);
  return options.keys == KeyFold::rope_commuting && options.key_metric == Metric::act_query && options.slow_band == 0 &&
         header.has_attention && options.sink_weight == 1.0;
}

}  // namespace

LayerProblem load_problem(const checkpoint::Reader& reader, const calibration::StatisticsFile* statistics,
                          std::int64_t layer, Part part, const FoldOptions& options, Half half) {
  LayerProblem problem = problem_of(reader, statistics, layer, part, options, at::kDouble);
  if (statistics != nullptr) {
    calibration::LayerStatistics sums = statistics->layer(layer);
    if (half != Half::all) sums = sums.half(half == Half::even ? 0 : 1);
    problem.moments = moments_of(sums, problem.weights, options.sink_weight);
    problem.has_moments = true;
    problem.group_grams = make_group_grams(problem);
  }
  return problem;
}

FoldProblems load_problems(const checkpoint::Reader& reader, const calibration::StatisticsFile* statistics,
                           std::int64_t layer, Part part, const FoldOptions& options, bool halves) {
  FoldProblems problems;
  LayerProblem& all = problems.all;
  all = problem_of(reader, statistics, layer, part, options, at::ScalarType::Undefined);
  if (statistics == nullptr) return problems;
  const calibration::StatisticsHeader& header = statistics->header();
  const bool keys = part != Part::values && options.key_metric != Metric::weights;
  const bool values = part != Part::keys && options.value_metric != Metric::weights;
  const bool rotated =
      keys && all.rotates && (options.keys == KeyFold::rope_commuting || options.keys == KeyFold::post_rotation);
  const bool attended = values && options.value_metric == Metric::attn_out;
  const bool value_grams = values && (!attended || halves);  // halves keep no attended values
  const bool key_input = keys && !keys_need_no_input(all, options, header);
  const bool sinks = options.sink_weight != 0;
  calibration::StatisticsFile::Selection selection;
  selection.packed = true;
  selection.halves = halves;
  // Every fold of rotated keys looks at the measured distances in act+query+dist, whatever it takes its queries from.
  selection.attention = attended || ((rotated || (keys && all.measured_queries)) && looks_at_queries(options)) ||
                        (keys && all.rotates && options.key_metric == Metric::act_query_dist);
  selection.attended = attended;
  selection.rotated_keys =
      all.rotates ? rotated && (options.keys == KeyFold::post_rotation || options.key_metric == Metric::act_query)
                  : keys;
  selection.values = value_grams;
  selection.moment = key_input || (value_grams && !header.has_values);
  selection.moment_0 =
      sinks && (selection.moment || (selection.rotated_keys && header.has_rotated_keys) || selection.values);
  const calibration::LayerStatistics sums = statistics->layer(layer, selection);
  const auto finish = [&](LayerProblem& problem, const calibration::LayerStatistics& of) {
    problem.moments = moments_of(of, problem.weights, options.sink_weight, {of.moment.defined(), false});
    problem.has_moments = true;
  };
  if (halves) problems.even = problems.odd = all;
  finish(all, sums);
  all.group_grams = make_group_grams(all);
  if (!halves) return problems;
  const calibration::LayerStatistics even = sums.half(0);
  finish(problems.even, even);
  // The other half's matrices follow from these by linearity.
  calibration::LayerStatistics rest = sums;
  for (at::Tensor* matrix : {&rest.moment, &rest.moment_even, &rest.moment_0, &rest.moment_0_even, &rest.rotated_keys,
                             &rest.rotated_keys_even, &rest.values, &rest.values_even})
    *matrix = at::Tensor();
  const calibration::LayerStatistics odd = rest.half(1);
  finish(problems.odd, odd);
  const auto tokens = [&](const calibration::LayerStatistics& of) {
    return of.count + options.sink_weight * of.count_0;
  };
  const double all_weight = tokens(sums) / tokens(odd), even_weight = tokens(even) / tokens(odd);
  problems.odd.moments.rotated_keys.add(all_weight, all.moments.rotated_keys);
  problems.odd.moments.rotated_keys.add(-even_weight, problems.even.moments.rotated_keys);
  for (LayerProblem* half : {&problems.even, &problems.odd}) {
    half->moments.rotated_queries = all.moments.rotated_queries;
    half->moments.distance_law = all.moments.distance_law;
  }
  problems.even.group_grams = std::make_shared<GroupGrams>(problems.even, all.group_grams);
  problems.odd.group_grams =
      std::make_shared<GroupGrams>(problems.odd, all.group_grams, problems.even.group_grams, all_weight, even_weight);
  return problems;
}

LayerProblem load_for_apply(const checkpoint::Reader& reader, const calibration::StatisticsFile* statistics,
                            std::int64_t layer, Part part, const FoldOptions& options,
                            const std::vector<std::vector<std::int64_t>>& groups, const KeptBases* kept) {
  const auto there = [&](Part which) {
    return std::all_of(groups.begin(), groups.end(),
                       [&](const auto& group) { return kept->find(layer, which, group) != nullptr; });
  };
  if (kept == nullptr || (part != Part::values && !there(Part::keys)) || (part != Part::keys && !there(Part::values)))
    return load_problems(reader, statistics, layer, part, options, false).all;
  LayerProblem problem = problem_of(reader, statistics, layer, part, options, at::ScalarType::Undefined);
  if (const LayerMoments* means = kept->means(layer)) {
    problem.moments = *means;
    problem.has_moments = true;
  }
  problem.kept = kept;
  return problem;
}

void KeptBases::keep(std::int64_t layer, Part part, const std::vector<std::int64_t>& kv_heads, const Basis& basis) {
  Basis thin;
  thin.encoder = basis.encoder;
  thin.decoder = basis.decoder;
  thin.head_decoders = basis.head_decoders;
  std::uint64_t bytes = 0;
  for (const at::Tensor& tensor : {thin.encoder, thin.decoder, thin.head_decoders})
    if (tensor.defined()) bytes += tensor.nbytes();
  const std::lock_guard lock(mutex_);
  if (bytes_ + bytes > most_bytes_) return;
  bytes_ += bytes;
  bases_[{layer, part, kv_heads}] = std::move(thin);
}

void KeptBases::keep_means(std::int64_t layer, const LayerMoments& moments) {
  LayerMoments means;
  means.mean = moments.mean;
  means.attended_mean = moments.attended_mean;
  means.attended_heads = moments.attended_heads;
  const std::lock_guard lock(mutex_);
  means_[layer] = std::move(means);
}

const Basis* KeptBases::find(std::int64_t layer, Part part, const std::vector<std::int64_t>& kv_heads) const {
  const std::lock_guard lock(mutex_);
  const auto found = bases_.find({layer, part, kv_heads});
  return found == bases_.end() ? nullptr : &found->second;
}

const LayerMoments* KeptBases::means(std::int64_t layer) const {
  const std::lock_guard lock(mutex_);
  const auto found = means_.find(layer);
  return found == means_.end() ? nullptr : &found->second;
}

void for_each_item(std::int64_t count, const std::function<void(std::int64_t)>& work) {
  if (at::get_num_threads() <= 1 || at::in_parallel_region()) {
    for (std::int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  // Inside a parallel region libtorch and an OpenMP BLAS run on the calling thread alone; two items at least make one.
  // Setting the number of threads to one instead would build libtorch's other thread pool anew, every time.
  at::parallel_for(0, std::max<std::int64_t>(count, 2), 1, [&](std::int64_t begin, std::int64_t end) {
    const at::NoGradGuard no_grad;
    for (std::int64_t i = begin; i < std::min(end, count); ++i) work(i);
  });
}

std::pair<std::int64_t, std::int64_t> share_of(std::int64_t items, int rank, int size) {
  return {items * rank / size, items * (rank + 1) / size};
}

}  // namespace headfold::folding
