#pragma once
// Micro-batches through the layers that a pipeline of ranks shares, or through layers streamed from disk.

#include <headfold/comm/grid.h>
#include <headfold/model/model.h>

#include <filesystem>
#include <functional>

namespace headfold::model {

enum class Residency {
  resident,  ///< this rank's layers stay in memory; micro-batches stream through them
  streamed,  ///< one layer at a time from the mapped file, all micro-batches of this replica through it before the next
};

struct PipelineOptions {
  at::ScalarType dtype = at::kFloat;
  Residency residency = Residency::resident;
  bool head = true;  ///< load the head on the last stage (calibration does without)
  /// Streamed: where the hidden states of all micro-batches wait for the next layer, in a file that has no name; empty:
  /// in memory.
  std::filesystem::path hidden_folder = {};
};

/// What a run calls back. All callbacks run on the rank that owns the thing they concern.
struct PipelineHooks {
  /// Observer of global layer index `layer`, or nullptr; asked once per layer before its first micro-batch.
  std::function<LayerObserver*(std::int64_t layer)> observer;
  /// Micro-batch `index` (index into this replica's list) is about to enter layer `layer`.
  std::function<void(std::int64_t layer, std::int64_t index)> before_layer;
  /// Last stage only: final hidden states (before the final norm) of micro-batch `index`; use head() for logits.
  std::function<void(std::int64_t index, const at::Tensor& hidden)> output;
  /// Called on every stage with work finished since the last call, in micro-batches: 1 after a micro-batch has left the
  /// stage; streamed: the reciprocal of the stage's layers after every layer x micro-batch. Sums to the number of
  /// micro-batches.
  std::function<void(double micro_batches_done)> progress;
};

/// Sequences of unequal length without padding: ids [rows] int64 of the segments in their order
/// (Layer::forward_packed).
struct PackedBatch {
  at::Tensor ids;
  std::vector<Segment> segments;
};

/// The share of one rank: its stage's layers of one model.
class Pipeline {
 public:
  /// Loads this stage's weights (resident) or only opens the file (streamed). Collective over grid.world.
  Pipeline(const checkpoint::Reader& reader, const comm::Grid& grid, PipelineOptions options);
  ~Pipeline();
  /// Pushes this replica's micro-batches (ids [batch, tokens] each, the same list on every stage of the replica)
  /// through all stages. Receives are posted ahead and sends are asynchronous, so that all stages are busy in steady
  /// state (resident; at most two micro-batches wait on either side of a stage). Streamed with several stages, a stage
  /// begins when its predecessor is in its last layer: prefer replicas then. Throws InputError on every stage, before
  /// anything is sent, when a micro-batch is not int64 [batch, tokens] within the vocabulary.
  void run(const std::vector<at::Tensor>& micro_batches, const PipelineHooks& hooks) const;
  /// The same for packed micro-batches; hooks see hidden states [rows, hidden] and may not observe. With `caches`, one
  /// for each of this stage's layers, segments read and extend what is in them.
  void run_packed(const std::vector<PackedBatch>& micro_batches, const PipelineHooks& hooks,
                  std::vector<LayerCache>* caches = nullptr) const;
  /// Caches of this stage's layers for `slots` sequences of up to `capacity` tokens.
  std::vector<LayerCache> make_cache(std::int64_t slots, std::int64_t capacity) const;
  const comm::LayerRange& layers() const { return range_; }
  const ModelConfig& config() const;
  /// Last stage only (options.head; InternalError otherwise). Streamed: loaded on first use.
  const Head& head() const;

 private:
  using Forward = std::function<at::Tensor(const Layer& layer, std::size_t local, std::size_t index,
                                           const at::Tensor& hidden, LayerObserver* observer)>;
  void run_batches(const std::vector<at::Tensor>& ids, const Forward& forward, const PipelineHooks& hooks) const;
  struct State;
  std::unique_ptr<State> state_;
  comm::LayerRange range_;
};

/// Layers of each stage, balanced by parameters (embedding and head counted).
std::vector<comm::LayerRange> stage_layers(const ModelConfig& config, int stages);
/// Bytes of weights of one stage in `dtype`.
std::int64_t stage_weight_bytes(const ModelConfig& config, int stages, int stage, at::ScalarType dtype);
/// Fewest stages whose weights plus `extra_bytes_per_layer` per layer fit `budget` bytes per rank; at most
/// config.layers.
int fewest_stages(const ModelConfig& config, at::ScalarType dtype, std::int64_t extra_bytes_per_layer,
                  std::int64_t budget, int max_stages);

}  // namespace headfold::model
