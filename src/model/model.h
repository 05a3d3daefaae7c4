#pragma once
// LLaMA and BLOOM decoders for inference, layer by layer, with explicit KV layouts. Names and shapes follow
// docs/formats.md.

#include <ATen/ATen.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/checkpoint/reader.h>
#include <headfold/model/compute.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace headfold::model {

using checkpoint::ModelConfig;
class Product;

/// Sees intermediate values of a layer while it runs (calibration). Called once per forward. The tensors are fresh: an
/// observer may keep them.
class LayerObserver {
 public:
  virtual ~LayerObserver() = default;
  /// Attention input after the norm, [batch, tokens, hidden], compute dtype.
  virtual void attention_input(const at::Tensor& x) = 0;
  /// Keys as they enter the scores: rotated for RoPE models, [batch, tokens, source_kv_heads, head_dim], compute dtype.
  /// `projected`: before the projection. `latent`: rebuilt; without rotation the latents [.., kv_heads, key_width].
  virtual void rotated_keys(const at::Tensor& keys) = 0;
  virtual bool wants_rotated_keys() const = 0;
  /// Values of the new tokens, [batch, tokens, kv_heads, value_width], compute dtype; only when asked for.
  virtual void values(const at::Tensor& /*values*/) {}
  virtual bool wants_values() const { return false; }
  /// Queries and keys as they enter the scores (rotated, folded: [batch, tokens, heads, head_dim] and [batch, tokens,
  /// kv_heads, head_dim]) and values [batch, tokens, kv_heads, head_dim], compute dtype; only when asked for. With a
  /// cache, keys and values are those of every token so far. `latent`: rebuilt keys of the source_kv_heads, latents as
  /// values; without rotation latents of key_width also as keys, and queries as wide as these.
  virtual void attention(const at::Tensor& /*queries*/, const at::Tensor& /*keys*/, const at::Tensor& /*values*/) {}
  virtual bool wants_attention() const { return false; }
  /// Outputs of all heads side by side as they enter the output projection, [batch, tokens, heads *
  /// checkpoint::attended_width()].
  virtual void attended(const at::Tensor& /*y*/) {}
  virtual bool wants_attended() const { return false; }
  /// What enters the MLP's down projection, [batch, tokens, ffn].
  virtual void activated(const at::Tensor& /*inner*/) {}
  virtual bool wants_activated() const { return false; }
};

/// Keys and values of one layer for a batch of sequences of equal length.
struct LayerCache {
  at::Tensor keys;  ///< [batch, capacity, kv_heads, key_width] of the layer: what the layout caches (projected keys for
                    ///< `projected`, unrotated latents for `latent`)
  at::Tensor values;  ///< [batch, capacity, kv_heads, value_width]
  std::int64_t length = 0;
};

/// An empty cache of a layer of this shape, on the device of compute().
LayerCache empty_cache(const checkpoint::LayerShape& shape, std::int64_t slots, std::int64_t capacity,
                       at::ScalarType dtype);

/// Consecutive rows of a packed pass: tokens of one sequence at positions start .. start + tokens - 1.
struct Segment {
  std::int64_t start = 0;         ///< tokens of the sequence before these, whose keys and values are in the slot
  std::int64_t tokens = 0;        ///< at least 1
  std::int64_t slot = 0;          ///< entry of the cache's batch that holds the sequence
  std::int64_t copied_from = -1;  ///< slot whose first `start` tokens are copied to this one beforehand; -1: none
};

/// One decoder layer with its weights in the compute dtype, on the device that compute() named when it was made: hidden
/// states, caches, and what observers see are there too.
class Layer {
 public:
  virtual ~Layer() = default;
  /// hidden [batch, tokens, hidden] -> same shape. Tokens stand at positions start .. start+tokens-1 where start =
  /// cache ? cache->length : 0; with a cache the new keys and values are appended (InputError when its capacity does
  /// not suffice). Causal. Scores are formed in bounded blocks: memory stays below `attention_block_bytes()` whatever
  /// the length, and so do keys that `latent` rebuilds (of one head at least).
  virtual at::Tensor forward(const at::Tensor& hidden, LayerCache* cache = nullptr,
                             LayerObserver* observer = nullptr) const = 0;
  /// Sequences of unequal length without padding: the rows of hidden [rows, hidden] are those of the segments, in their
  /// order -> same shape. A segment writes its keys and values into its slot of the cache and attends to what stands
  /// before them there and to its own rows. Segments are worked through in order, each seeing what earlier ones wrote:
  /// siblings may follow one prefix in one slot by overwriting each other, as in a tree walked depth-first. Without a
  /// cache there is one slot, forgotten afterwards. `cache->length` is neither read nor changed. InternalError for
  /// segments that do not add up to the rows, InputError for those beyond the cache's capacity.
  virtual at::Tensor forward_packed(const at::Tensor& hidden, const std::vector<Segment>& segments,
                                    LayerCache* cache = nullptr) const = 0;
  /// Bytes of its weights.
  virtual std::int64_t bytes() const = 0;
};

/// Scratch memory attention may use for scores, in bytes (default 256 MiB); process-wide.
std::int64_t attention_block_bytes();
void set_attention_block_bytes(std::int64_t bytes);

/// Gives the tensor of a canonical name (checkpoint::layer_tensors) and shape, in any floating-point dtype; it is
/// copied.
using TensorGetter = std::function<at::Tensor(const std::string& name, const std::vector<std::int64_t>& shape)>;

/// Tensors of `replaced` by the last two parts of their name (checkpoint::last_parts), all others from the reader. Both
/// must outlive the getter.
TensorGetter replaced_tensors(const checkpoint::Reader& reader, const std::map<std::string, at::Tensor>& replaced);

/// Loads layer `layer` (0-based) in `dtype` (float32 or bfloat16; UsageError otherwise). The pages of the file are
/// given back as soon as a tensor is copied. InputError names file, tensor and both shapes when one is absent or has
/// another shape.
std::unique_ptr<Layer> load_layer(const checkpoint::Reader& reader, std::int64_t layer, at::ScalarType dtype);
/// The same from tensors in memory: for tests, benchmarks and models that are not on disk (yet).
std::unique_ptr<Layer> load_layer(const ModelConfig& config, std::int64_t layer, at::ScalarType dtype,
                                  const TensorGetter& getter);

/// Throws InputError naming the model and the first offender unless `ids` is int64 [batch, tokens] with every id in [0,
/// vocab).
void check_ids(const at::Tensor& ids, const ModelConfig& config);

/// Token embedding (BLOOM: with its LayerNorm).
class Embedding {
 public:
  Embedding(const checkpoint::Reader& reader, at::ScalarType dtype);
  /// ids [batch, tokens] int64, on the host -> [batch, tokens, hidden], on the device. InputError for ids outside the
  /// vocabulary.
  at::Tensor forward(const at::Tensor& ids) const;

 private:
  ModelConfig config_;
  Engine engine_;
  at::Tensor table_, norm_weight_, norm_bias_;
};

/// Final norm and output projection.
class Head {
 public:
  Head(const checkpoint::Reader& reader, at::ScalarType dtype);
  /// hidden [..., hidden] -> logits [..., vocab], compute dtype.
  at::Tensor logits(const at::Tensor& hidden) const;
  std::int64_t vocabulary() const { return config_.vocab; }

 private:
  ModelConfig config_;
  Engine engine_;
  at::ScalarType dtype_;
  at::Tensor norm_weight_, norm_bias_;
  std::shared_ptr<const Product> projection_;
  at::Tensor device_projection_;
};

/// RoPE inverse frequencies [head_dim / 2], float64, with rope_scaling applied (docs/formats.md).
at::Tensor rope_inverse_frequencies(const ModelConfig& config);
/// ALiBi slopes per query head [heads], float32.
at::Tensor alibi_slopes(std::int64_t heads);
/// Rotation of x [batch, tokens, heads, head_dim] (float32 or bfloat16) at positions start, start + 1, …: rotate_half
/// layout, angles, cos and sin in float32, cos and sin cast to x's dtype. Returns a new tensor.
at::Tensor apply_rope(const at::Tensor& x, const at::Tensor& inverse_frequencies, std::int64_t start);

/// A whole model in one process: for tests, generation and small evaluations.
class Decoder {
 public:
  Decoder(const checkpoint::Reader& reader, at::ScalarType dtype);
  const ModelConfig& config() const { return config_; }
  /// ids [batch, tokens] -> logits [batch, tokens, vocab].
  at::Tensor logits(const at::Tensor& ids) const;
  /// Caches for `batch` sequences of up to `capacity` tokens.
  std::vector<LayerCache> make_cache(std::int64_t batch, std::int64_t capacity) const;
  /// Appends ids [batch, tokens] to the caches; logits of the last position only, [batch, vocab].
  at::Tensor step(const at::Tensor& ids, std::vector<LayerCache>& caches) const;
  const std::vector<std::unique_ptr<Layer>>& layers() const { return layers_; }

 private:
  ModelConfig config_;
  at::ScalarType dtype_;
  Embedding embedding_;
  std::vector<std::unique_ptr<Layer>> layers_;
  Head head_;
};

}  // namespace headfold::model
