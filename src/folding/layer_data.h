#pragma once
// What a fold works on: the attention weights of one layer and the moments of its input, in float64.

#include <ATen/ATen.h>
#include <headfold/calibration/statistics.h>
#include <headfold/checkpoint/reader.h>

#include <cstdint>
#include <vector>

namespace headfold::folding {

/// Attention projections of one layer, `y = W x`. Biases are undefined where the model has none.
struct LayerWeights {
  std::int64_t heads = 0, kv_heads = 0, head_dim = 0, hidden = 0;
  at::Tensor query;   ///< [heads * head_dim, hidden]
  at::Tensor key;     ///< [kv_heads * head_dim, hidden]; `projected`: of all source KV heads
  at::Tensor value;   ///< [kv_heads * head_dim, hidden]
  at::Tensor output;  ///< [hidden, heads * head_dim]
  at::Tensor query_bias, key_bias, value_bias, output_bias;
  at::Tensor key_fold;    ///< `projected` only: encoder A of each group, [kv_heads, head_dim, group_size * head_dim]
  at::Tensor query_fold;  ///< `projected` only: B_k^T of each source KV head, [source_kv_heads, head_dim, head_dim]
  std::int64_t source_kv_heads() const { return key.defined() ? key.size(0) / head_dim : kv_heads; }
  std::int64_t key_repeat() const { return heads / source_kv_heads(); }  ///< query heads per head of `key`
  std::int64_t value_repeat() const { return heads / kv_heads; }         ///< query heads per head of `value`
};

/// Which projections to load; the others stay undefined.
enum class Part { keys, values, both };  ///< keys: query and key; values: value and output

/// Reads the attention weights of a layer in `dtype` (LLaMA; BLOOM with fused or split projections; layout
/// `projected`). Throws InputError for tensors of another shape than the config's.
LayerWeights load_layer_weights(const checkpoint::Reader& reader, std::int64_t layer, Part part = Part::both,
                                at::ScalarType dtype = at::kDouble);

/// Means over calibration tokens of the augmented input x~ = [x; 1] (methods.md 2.1), sinks weighted. Float64.
struct LayerMoments {
  at::Tensor input;         ///< E[x~ x~^T], [hidden + 1, hidden + 1]
  at::Tensor centred;       ///< E[x~ x~^T] - E[x~] E[x~]^T; its last row and column are zero
  at::Tensor mean;          ///< E[x~], [hidden + 1]
  at::Tensor rotated_keys;  ///< E[(R(n)k)(R(n)k)^T], [kv_heads * head_dim, same]; undefined unless the statistics and
                            ///< the key weights were given
  // From the attention statistics; undefined without them.
  at::Tensor rotated_queries;  ///< E[(R(n)q)(R(n)q)^T] of every query head, [heads, head_dim, head_dim]
  at::Tensor distance_law;     ///< attention mass by distance, mean over heads, sums to 1, [sequence length]
  at::Tensor attended;         ///< E[y_h y_h^T] of every query head (methods.md 2.3), [heads, block, block], block =
                               ///< attended_heads * head_dim: attention of head h applied to the values of its block
  at::Tensor attended_mean;    ///< E[y_h], [heads, block]
  std::int64_t attended_heads = 0;  ///< source KV heads of one block: block b holds heads b * n .. b * n + n - 1
};
/// `weights.key` (with its bias) gives the rotated-key moment of position 0, which statistics files do not store.
LayerMoments moments_of(const calibration::LayerStatistics& statistics, const LayerWeights& weights,
                        double sink_weight);

/// The rows of one group, every projection with its bias as a last column (zero where there is none). Float64.
struct GroupWeights {
  std::int64_t size = 0;  ///< source KV heads in the group
  std::int64_t head_dim = 0;
  at::Tensor key;    ///< [size * head_dim, hidden + 1]; undefined when not loaded
  at::Tensor value;  ///< [size * head_dim, hidden + 1]; undefined when not loaded
  std::vector<at::Tensor>
      queries;  ///< per source KV head: the rows of its query heads, [repeat * head_dim, hidden + 1]
};
GroupWeights group_of(const LayerWeights& weights, const std::vector<std::int64_t>& kv_heads);

/// Row (or column) numbers of `heads` blocks of `head_dim`, int64.
at::Tensor block_index(const std::vector<std::int64_t>& heads, std::int64_t head_dim);
/// Query heads of the KV heads in `kv_heads`, in order: kv * repeat .. kv * repeat + repeat - 1 each (methods.md 8).
std::vector<std::int64_t> query_heads_of(const std::vector<std::int64_t>& kv_heads, std::int64_t repeat);

}  // namespace headfold::folding
