#pragma once
// What a fold works on: the attention weights of one layer and the moments of its input, in float64.

#include <ATen/ATen.h>
#include <headfold/calibration/statistics.h>
#include <headfold/checkpoint/reader.h>

#include <cstdint>
#include <limits>
#include <vector>

namespace headfold::folding {

/// Attention projections of one layer, `y = W x`, in float64 or as stored. Biases are undefined where the model has
/// none.
struct LayerWeights {
  std::int64_t heads = 0, kv_heads = 0, head_dim = 0, hidden = 0;
  at::Tensor query;   ///< [heads * head_dim, hidden]
  at::Tensor key;     ///< [kv_heads * head_dim, hidden]; `projected`: of all source KV heads
  at::Tensor value;   ///< [kv_heads * head_dim, hidden]
  at::Tensor output;  ///< [hidden, heads * head_dim]
  at::Tensor query_bias, key_bias, value_bias, output_bias;
  at::Tensor key_fold;    ///< `projected` only: encoder A of each group, [kv_heads, head_dim, group_size * head_dim]
  at::Tensor query_fold;  ///< `projected` only: B_k^T of each source KV head, [source_kv_heads, head_dim, head_dim]
  /// `latent` only: key and value hold latents [kv_heads * width, hidden]; query and output hold absorbed decoders, or
  /// these rebuild every source head, in stored order, [source_kv_heads, head_dim, width].
  at::Tensor key_up, value_up;
  std::int64_t source_kv_heads() const { return key.defined() ? key.size(0) / head_dim : kv_heads; }
  std::int64_t key_repeat() const { return heads / source_kv_heads(); }  ///< query heads per head of `key`
  std::int64_t value_repeat() const { return heads / kv_heads; }         ///< query heads per head of `value`
};

/// Which projections to load; the others stay undefined.
enum class Part { keys, values, both };  ///< keys: query and key; values: value and output

/// Reads the attention weights of a layer in `dtype` (LLaMA; BLOOM with fused or split projections; any layout;
/// kv_heads is the layer's own number); ScalarType::Undefined: every tensor as it is stored. Throws InputError for
/// tensors of another shape than the config's.
LayerWeights load_layer_weights(const checkpoint::Reader& reader, std::int64_t layer, Part part = Part::both,
                                at::ScalarType dtype = at::kDouble);

/// E[u u^T] of all heads' keys or values u, [heads * head_dim, same] float64, as a weighted sum of what the statistics
/// hold. Groups take their blocks; the whole matrix is formed for none of them.
class HeadMoments {
 public:
  HeadMoments() = default;
  /// A matrix as it is.
  HeadMoments(const at::Tensor& square);  // NOLINT(google-explicit-constructor): tests and callers have matrices
  /// += weight * M: [n, n], or its packed lower triangle [n (n + 1) / 2].
  void add(double weight, const at::Tensor& matrix);
  /// += weight * F F^T, F [n, any].
  void add_factor(double weight, const at::Tensor& factor);
  void add(double weight, const HeadMoments& other);
  bool defined() const { return !matrices_.empty() || !factors_.empty(); }
  /// Rows and columns `index` [m] int64, [m, m].
  at::Tensor block(const at::Tensor& index) const;
  at::Tensor full() const;

 private:
  std::vector<std::pair<double, at::Tensor>> matrices_, factors_;
};

/// Means over calibration tokens of the augmented input x~ = [x; 1] (methods.md 2.1), sinks weighted. Float64.
struct LayerMoments {
  at::Tensor input;          ///< E[x~ x~^T], [hidden + 1, hidden + 1]
  at::Tensor centred;        ///< E[x~ x~^T] - E[x~] E[x~]^T; its last row and column are zero
  at::Tensor mean;           ///< E[x~], [hidden + 1]
  HeadMoments rotated_keys;  ///< E[(R(n)k)(R(n)k)^T], without RoPE E[k k^T]; undefined unless the statistics and the
                             ///< key weights were given
  HeadMoments values;        ///< E[v v^T], likewise
  // From the attention statistics; undefined without them.
  at::Tensor rotated_queries;  ///< E[(R(n)q)(R(n)q)^T] of every query head, [heads, head_dim, head_dim]
  at::Tensor distance_law;     ///< attention mass by distance, mean over heads, sums to 1, [sequence length]
  at::Tensor attended;         ///< E[y_h y_h^T] of every query head (methods.md 2.3), [heads, block, block], block =
                               ///< attended_heads * head_dim: attention of head h applied to the values of its block
  at::Tensor attended_mean;    ///< E[y_h], [heads, block]
  std::int64_t attended_heads = 0;  ///< source KV heads of one block: block b holds heads b * n .. b * n + n - 1
  /// That they are means of; moments made otherwise are exact.
  double tokens = std::numeric_limits<double>::infinity();
  /// Sweeps that a polish of so many channels gets: 0 where the moments are of too few tokens. Alternating least
  /// squares then finds maps that are right for those tokens alone, and huge.
  std::int64_t polish_sweeps(std::int64_t sweeps, std::int64_t channels) const {
    return enough_to_polish(tokens, channels) ? sweeps : 0;
  }
  static bool enough_to_polish(double tokens, std::int64_t channels) {
    return tokens >= 1.5 * static_cast<double>(channels);
  }
};
/// Which moments of the input to form: each is a matrix of (hidden + 1)^2 numbers.
struct MomentsWanted {
  bool input = true;
  bool centred = true;
};
/// `weights.key` and `weights.value` (with their biases) give the moments of keys and values at position 0, which
/// statistics files do not store. Packed statistics (LayerStatistics of a Selection with `packed`) stay packed. Bytes
/// do not depend on the number of threads.
LayerMoments moments_of(const calibration::LayerStatistics& statistics, const LayerWeights& weights, double sink_weight,
                        const MomentsWanted& wanted = {});

/// The rows of one group, every projection with its bias as a last column (zero where there is none). Float64.
struct GroupWeights {
  std::int64_t size = 0;  ///< source KV heads in the group
  std::int64_t head_dim = 0;
  at::Tensor key;    ///< [size * head_dim, hidden + 1]; undefined when not loaded
  at::Tensor value;  ///< [size * head_dim, hidden + 1]; undefined when not loaded
  std::vector<at::Tensor>
      queries;  ///< per source KV head: the rows of its query heads, [repeat * head_dim, hidden + 1]
  std::vector<at::Tensor> outputs;  ///< P_h of every query head, by source KV head, [hidden, head_dim]; empty when not
                                    ///< loaded
  // Taken from LayerGrams instead of the rows above when those are at hand (grouping.h: thousands of groups of one
  // layer). Undefined otherwise.
  at::Tensor key_gram, key_mean;      ///< [size * head_dim, same], [size * head_dim]
  at::Tensor key_weight_gram;         ///< W_K W_K^T without the bias
  at::Tensor query_grams;             ///< [size, repeat, head_dim, head_dim]
  at::Tensor value_gram, value_mean;  ///< as for keys
  at::Tensor value_weight_gram;       ///< W_V W_V^T without the bias
  at::Tensor output_grams;            ///< [size, repeat, head_dim, head_dim]: P_h^T P_h
};

/// What the folds' losses need of a whole layer, computed once: a group takes its rows and columns. Float64.
struct LayerGrams {
  at::Tensor key;       ///< W~_K E[x~ x~^T] W~_K^T, uncentred, bias included, [kv_heads * head_dim, same]
  at::Tensor key_mean;  ///< W~_K E[x~]: the centred Gram is key - key_mean key_mean^T
  at::Tensor queries;   ///< W~_Q,h E[x~ x~^T] W~_Q,h^T of every query head, [heads, head_dim, head_dim]
  at::Tensor value;     ///< as `key`, of values
  at::Tensor value_mean;
  at::Tensor outputs;                     ///< P_h^T P_h of every query head, [heads, head_dim, head_dim]
  at::Tensor key_weights, value_weights;  ///< W W^T without biases; defined for Metric::weights only
};
/// `part` leaves the other side's rows undefined although they are loaded, `with_others` = false queries and outputs.
GroupWeights group_of(const LayerWeights& weights, const std::vector<std::int64_t>& kv_heads, Part part = Part::both,
                      bool with_others = true);

/// [weight | bias], [rows, hidden + 1] float64: acts on [x; 1]. An undefined bias is zero.
at::Tensor augmented(const at::Tensor& weight, const at::Tensor& bias);
/// Row (or column) numbers of `heads` blocks of `head_dim`, int64.
at::Tensor block_index(const std::vector<std::int64_t>& heads, std::int64_t head_dim);
/// Query heads of the KV heads in `kv_heads`, in order: kv * repeat .. kv * repeat + repeat - 1 each (methods.md 8).
std::vector<std::int64_t> query_heads_of(const std::vector<std::int64_t>& kv_heads, std::int64_t repeat);

}  // namespace headfold::folding
