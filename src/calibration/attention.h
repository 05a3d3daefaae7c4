#pragma once
// Sufficient statistics of one layer's attention: what it reads and at what distance.

#include <headfold/calibration/statistics.h>
#include <headfold/linalg/linalg.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace headfold::calibration {

/// Sums under way by name, float64.
using SumTensors = std::map<std::string, at::Tensor>;

/// Adds `sums` to the tensors `into`, in place. InputError unless both have the same names and shapes; nothing was
/// added then.
void add_sums(const SumTensors& into, const SumTensors& sums);

/// sum [n] += column sums of rows [tokens, n], in float64 and in row order.
void add_column_sums(at::Tensor& sum, const at::Tensor& rows);

/// Rotated query Grams, attention mass by distance and attended values of one layer (LayerStatistics has the
/// definitions), sequence by sequence. Probabilities and attended values are those of the model: scores in float32 from
/// the compute dtype's queries and keys, softmax in float32, both results rounded to the compute dtype. Products are
/// accumulated in float32 within a sequence, sums over sequences in float64 in the order of the calls; heads run in
/// parallel. Where model::compute() is the engine `tensors`, sequences are tensors on its device, all heads are worked
/// on together and the sums wait there until they are asked for: the same sums up to rounding.
class AttentionAccumulator {
 public:
  /// `slopes` [heads] float32 for ALiBi, or undefined. InternalError for a shape that makes no sense.
  AttentionAccumulator(const StatisticsShape& shape, const at::Tensor& slopes);
  ~AttentionAccumulator();
  /// One sequence from its first token: queries [tokens, heads, head_dim], keys and values [tokens, kv_heads, head_dim]
  /// as they enter the scores, float32 or bfloat16.
  void add(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values);
  /// The sums so far on the host, sharing memory; those on a device move here.
  SumTensors sums();
  /// Adds what sums() of an accumulator of the same shape gave; to nothing: the same bits. InputError when `sums` is
  /// something else.
  void add(const SumTensors& sums);
  /// All sums on the device of model::compute(), to be summed over ranks in place: contiguous float64, zeros
  /// where nothing was added. For the engine `tensors`; nothing may be added afterwards.
  std::vector<at::Tensor> on_device();
  /// Moves the sums of this rank into `into`; nothing may be added afterwards.
  void take(PackedStatistics& into);

 private:
  void add_tensors(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values);
  /// Zeros on the device, unless there are sums already.
  void open_device();
  /// Moves the sums on the device to those on the host.
  void collect_device();

  StatisticsShape shape_;
  at::Tensor slopes_;
  std::vector<linalg::GramAccumulator> queries_, attended_;  // one per query head
  at::Tensor distance_mass_;                                 // [heads, sequence length]
  at::Tensor attended_sum_;                                  // [heads, block]
  at::Tensor count_;                                         // [1] tokens
  struct DeviceSums {
    at::Tensor queries, attended, distance_mass, attended_sum;  // [heads, ..], dense Grams, float64; undefined: zero
  } device_;
};

/// Largest attended_heads that are kept whole: all KV heads when heads * (kv_heads * head_dim)^2 * 8 bytes are at most
/// 64 MiB, otherwise the largest divisor of kv_heads up to 4.
std::int64_t default_attended_heads(const checkpoint::ModelConfig& config);

/// Arithmetic of the attention statistics of `shape` as a share of all else that calibration computes in a layer: the
/// products that are carried out for scores, attended values and two Grams per head (whole blocks, not the triangles
/// alone), against the forward pass (projections, MLP, causal attention) and the other Grams.
double attention_statistics_share(const checkpoint::ModelConfig& config, const StatisticsShape& shape);

}  // namespace headfold::calibration
