#pragma once
// Memory of a rank by job, without loading anything. That of finetune: headfold/finetune/trainable.h.

#include <headfold/calibration/collect.h>
#include <headfold/comm/grid.h>

namespace headfold::scale {

/// Memory of one rank in bytes.
struct CalibrationMemory {
  double weights = 0, statistics = 0, activations = 0;
  double total() const { return weights + statistics + activations; }
};

/// A calibration: what decides its memory and its arithmetic.
struct CalibrationSettings {
  calibration::CollectOptions collect;  ///< dtype, residency, micro_batch, what is collected
  std::int64_t length = 0;              ///< tokens of a sequence
  int threads = 1;
};

/// Whether `--attention-statistics auto` collects them: where they at most double calibration's other arithmetic, and
/// take 64 MiB per layer at most or no more than the other sums.
bool collects_attention(const checkpoint::ModelConfig& config, const calibration::CollectOptions& options,
                        std::int64_t length);

/// Of a rank with the layers `range`; the first stage holds the embedding as well.
CalibrationMemory calibration_memory(const checkpoint::ModelConfig& config, const CalibrationSettings& settings,
                                     const comm::LayerRange& range, bool first_stage);
/// That of the stage which needs most.
CalibrationMemory widest_stage(const checkpoint::ModelConfig& config, const CalibrationSettings& settings, int stages);

/// Of a conversion while it folds a layer: weights of its attention, its moments and their working copies, in float64.
double conversion_memory(const checkpoint::ModelConfig& config);

}  // namespace headfold::scale
