#pragma once
// Collecting sufficient statistics while calibration sequences run through a model.

#include <headfold/calibration/attention.h>
#include <headfold/calibration/statistics.h>
#include <headfold/comm/device_link.h>
#include <headfold/comm/grid.h>
#include <headfold/linalg/linalg.h>
#include <headfold/model/model.h>
#include <headfold/model/pipeline.h>

#include <filesystem>
#include <functional>
#include <memory>
#include <string>

namespace headfold::calibration {

/// Statistics of one layer, fed by the running model. Grams are taken sequence by sequence, in order: neither the
/// summation order nor the length of a float32 accumulation depends on the micro-batch size. Position-0 rows are
/// buffered and their products formed in float64, since how many share one product depends on the number of replicas.
/// With half-sample sums, even and odd sequences go to Grams of their own and meet in finish(): the same arithmetic,
/// twice the memory. Sums stand on the device of model::compute() while they grow.
class LayerAccumulator : public model::LayerObserver {
 public:
  /// `key_width` = kv_heads * head_dim of the rotated keys, 0 to leave them out. Neither values, halves nor attention.
  LayerAccumulator(std::int64_t hidden, std::int64_t key_width);
  /// `slopes` [heads] float32: ALiBi, for attention statistics.
  explicit LayerAccumulator(const StatisticsShape& shape, const at::Tensor& slopes = {});
  /// The next batch begins with sequence `index` of the drawn list. Without this call, batches follow one another from
  /// 0 on.
  void expect(std::int64_t index) { next_ = index; }
  void attention_input(const at::Tensor& x) override;
  void rotated_keys(const at::Tensor& keys) override;
  bool wants_rotated_keys() const override { return parts_[0].keys != nullptr; }
  void values(const at::Tensor& values) override;
  bool wants_values() const override { return parts_[0].values != nullptr; }
  void attention(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values) override;
  bool wants_attention() const override { return attention_ != nullptr; }
  /// The sums of this rank so far, before finish(); most of them share memory with the accumulator.
  SumTensors sums() const;
  /// Adds what sums() of an accumulator of the same shape gave. Where nothing was added before, what follows has the
  /// very bits that it would have had there. InputError when `sums` is something else; clear() then.
  void add(const SumTensors& sums);
  /// Forgets everything that was added.
  void clear();
  /// Moves the sums to the host; what is added next takes them back.
  void leave_device();
  /// Begins to sum over the link's ranks what stands on the device of model::compute(), after this layer's last
  /// forward: by NCCL it goes on beside the forwards of other layers. The link lives until finish(), which waits.
  /// Collective.
  void start_sums(const comm::DeviceLink& link);
  bool sums_started() const { return started_; }
  /// Adds what is still buffered, sums over `peers` what has not been (collective, in float64, in place) and checks
  /// that everything is finite. InputError naming `layer` otherwise. Once, after the last forward.
  void finish(const comm::Communicator& peers, std::int64_t layer);
  /// Valid after finish(); shares memory with the accumulator.
  const PackedStatistics& statistics() const;

 private:
  /// Sums over all sequences, or over those of one half.
  struct Sums {
    explicit Sums(const StatisticsShape& shape);
    void flush();
    linalg::GramAccumulator moment, moment_0;
    std::unique_ptr<linalg::GramAccumulator> keys, values;
    at::Tensor sum, sum_0;
    double count = 0, count_0 = 0;
    at::Tensor first_rows;         // [64, hidden] float64, position-0 rows not yet in moment_0
    std::int64_t first_count = 0;  // how many of them are filled
  };
  /// Adds heads' rows [batch, tokens, heads, head_dim] of the current batch, less position 0, to a Gram of every part.
  void add_heads(std::unique_ptr<linalg::GramAccumulator> Sums::*gram, const at::Tensor& rows, const char* what);
  Sums& sums_of(std::int64_t sequence) { return parts_[static_cast<std::size_t>(sequence) % parts_.size()]; }

  std::vector<Sums> parts_;  // one, or even and odd
  std::unique_ptr<AttentionAccumulator> attention_;
  PackedStatistics statistics_;
  std::int64_t next_ = 0;                // sequence that the next batch begins with
  std::int64_t first_ = 0;               // sequence that the current batch began with
  std::vector<comm::Request> requests_;  // of start_sums()
  bool started_ = false;
  bool finished_ = false;
};

struct CollectOptions {
  at::ScalarType dtype = at::kFloat;
  model::Residency residency = model::Residency::resident;
  std::filesystem::path hidden_folder;  ///< model::PipelineOptions
  std::int64_t micro_batch = 1;         ///< sequences per micro-batch
  bool rotated_keys = true;             ///< keys as they enter the scores
  bool values = true;                   ///< ignored for layout `projected`
  bool half_samples = false;            ///< keep the even sequences' share of every sum
  bool attention_statistics = false;
  std::int64_t attended_heads = 0;  ///< KV heads per block of attended values; 0 = default_attended_heads()
  /// Work done since the last call, in micro-batches of this replica (model::PipelineHooks::progress).
  std::function<void(double done)> progress;
  /// Folder that keeps the sums while they are made (partial.h); empty: they are not kept.
  std::filesystem::path partial;
  std::string identity;         ///< what decides the sums: those of another identity are not used
  std::int64_t save_every = 0;  ///< micro-batches of a replica between two saves; 0: by time; -1: only when stopped
  std::function<bool()> stop;   ///< asked on every rank now and then; true on any rank saves and throws Stopped
  /// Called on every rank before the first micro-batch: how many sequences earlier runs have dealt with, and how many
  /// micro-batches are left to this replica.
  std::function<void(std::int64_t sequences, std::int64_t micro_batches)> resumed;
};

/// What collect() gathers of every layer of this model, for sequences of `tokens`. UsageError when attended_heads does
/// not divide the KV heads; InputError for models whose layers or layouts the statistics cannot describe.
StatisticsShape collected_shape(const checkpoint::ModelConfig& config, const CollectOptions& options,
                                std::int64_t tokens);
/// The header's fields that follow from the model's shape and what is collected; the caller fills in the rest.
StatisticsHeader header_of(const checkpoint::ModelConfig& config, const CollectOptions& options, std::int64_t samples,
                           std::int64_t tokens);

/// Micro-batch m (of ceil(samples / micro_batch)) is run by replica m % replicas. The list of one replica, ids [batch,
/// tokens] each.
std::vector<at::Tensor> micro_batches_of(const at::Tensor& sequences, std::int64_t micro_batch, int replica,
                                         int replicas);

/// Runs `sequences` [samples, tokens] int64 (the same on every rank) through the model. Collective over grid.world.
/// Returns the finished accumulators of this rank's layers in order, equal on all peers. With options.partial it goes
/// on where an earlier call was interrupted: on the same grid with the same result, bit for bit. Micro-batches run in
/// groups, between which all ranks agree whether to stop or save; groups grow until they take a few seconds.
std::vector<std::unique_ptr<LayerAccumulator>> collect(const checkpoint::Reader& reader, const comm::Grid& grid,
                                                       const at::Tensor& sequences, const CollectOptions& options);

/// Which of this rank's layers it writes: layer l falls to replica l % replicas. `first` is the index of the first
/// layer.
std::vector<OwnedLayer> layers_to_write(const std::vector<std::unique_ptr<LayerAccumulator>>& layers,
                                        std::int64_t first, const comm::Grid& grid);

}  // namespace headfold::calibration
