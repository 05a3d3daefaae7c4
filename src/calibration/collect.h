#pragma once
// Collecting sufficient statistics while calibration sequences run through a model.

#include <headfold/calibration/statistics.h>
#include <headfold/comm/grid.h>
#include <headfold/linalg/linalg.h>
#include <headfold/model/model.h>
#include <headfold/model/pipeline.h>

#include <functional>
#include <memory>

namespace headfold::calibration {

/// Statistics of one layer, fed by the running model. Grams are taken sequence by sequence, in order: neither the
/// summation order nor the length of a float32 accumulation depends on the micro-batch size. Position-0 rows are
/// buffered and their products formed in float64, since how many share one product depends on the number of replicas.
class LayerAccumulator : public model::LayerObserver {
 public:
  /// `key_width` = kv_heads * head_dim of the rotated keys, 0 to leave them out.
  LayerAccumulator(std::int64_t hidden, std::int64_t key_width);
  void attention_input(const at::Tensor& x) override;
  void rotated_keys(const at::Tensor& keys) override;
  bool wants_rotated_keys() const override { return keys_ != nullptr; }
  /// Adds what is still buffered, sums over `peers` (collective, in float64, in place) and checks that everything is
  /// finite. InputError naming `layer` otherwise. Once, after the last forward.
  void finish(const comm::Communicator& peers, std::int64_t layer);
  /// Valid after finish(); shares memory with the accumulator.
  const PackedStatistics& statistics() const;

 private:
  void flush();
  linalg::GramAccumulator moment_, moment_0_;
  std::unique_ptr<linalg::GramAccumulator> keys_;
  PackedStatistics statistics_;
  at::Tensor first_rows_;         // [64, hidden] float64, position-0 rows not yet in moment_0_
  std::int64_t first_count_ = 0;  // how many of them are filled
  bool finished_ = false;
};

struct CollectOptions {
  at::ScalarType dtype = at::kFloat;
  model::Residency residency = model::Residency::resident;
  std::int64_t micro_batch = 1;  ///< sequences per micro-batch
  bool rotated_keys = true;      ///< ignored for models without RoPE
  /// Work done since the last call, in micro-batches of this replica (model::PipelineHooks::progress).
  std::function<void(double done)> progress;
};

/// Whether statistics of this model hold a rotated-key Gram.
bool collects_rotated_keys(const checkpoint::ModelConfig& config, bool wanted);

/// Micro-batch m (of ceil(samples / micro_batch)) is run by replica m % replicas. The list of one replica, ids [batch,
/// tokens] each.
std::vector<at::Tensor> micro_batches_of(const at::Tensor& sequences, std::int64_t micro_batch, int replica,
                                         int replicas);

/// Runs `sequences` [samples, tokens] int64 (the same on every rank) through the model. Collective over grid.world.
/// Returns the finished accumulators of this rank's layers in order, equal on all peers.
std::vector<std::unique_ptr<LayerAccumulator>> collect(const checkpoint::Reader& reader, const comm::Grid& grid,
                                                       const at::Tensor& sequences, const CollectOptions& options);

/// Which of this rank's layers it writes: layer l falls to replica l % replicas. `first` is the index of the first
/// layer.
std::vector<OwnedLayer> layers_to_write(const std::vector<std::unique_ptr<LayerAccumulator>>& layers,
                                        std::int64_t first, const comm::Grid& grid);

}  // namespace headfold::calibration
