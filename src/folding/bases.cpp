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
  problem.centred_values = reader.config().family == checkpoint::Family::bloom || reader.config().attention_bias;
  if (problem.rotates) problem.frequencies = model::rope_inverse_frequencies(reader.config());
  problem.context = options.context > 0     ? options.context
                    : statistics != nullptr ? statistics->header().sequence_length
                                            : reader.config().max_positions;
  if (statistics != nullptr) {
    calibration::LayerStatistics sums = statistics->layer(layer);
    if (half != Half::all) sums = sums.half(half == Half::even ? 0 : 1);
    problem.moments = moments_of(sums, problem.weights, options.sink_weight);
    problem.has_moments = true;
    problem.value_rows = make_value_rows(problem);
  }
  return problem;
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
