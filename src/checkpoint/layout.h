#pragma once
// Which tensors a model of a given configuration holds (docs/formats.md, section "Models").

#include <headfold/checkpoint/config.h>

#include <cstdint>
#include <string>
#include <vector>

namespace headfold::checkpoint {

class Reader;

/// Name (with the family's prefix, "model." or "transformer.") and shape of one tensor.
struct TensorShape {
  std::string name;
  std::vector<std::int64_t> shape;
  /// Product of the shape.
  std::int64_t elements() const;
};

/// The last two parts of a tensor's name: "o_proj.weight" of "model.layers.3.self_attn.o_proj.weight".
std::string last_parts(const std::string& name);

/// Prefix of all tensors of a family but the output projection: "model." or "transformer.".
std::string tensor_prefix(Family family);

/// The rule of keys_absorbed() and values_absorbed() for a width that no configuration states yet.
bool absorbs_keys(Family family, std::int64_t key_width, std::int64_t head_dim);
bool absorbs_values(std::int64_t value_width, std::int64_t head_dim);
/// `latent`: whether the decoder of keys is part of the query projection: without rotation (BLOOM) and when latents are
/// no wider than heads. The query projection then has heads * key_width rows and there is no key_up.
bool keys_absorbed(const ModelConfig& config, std::int64_t layer);
/// `latent`: whether the decoder of values is part of the output projection (latents no wider than heads), which then
/// has heads * value_width columns; otherwise value_up rebuilds head_dim channels per query head.
bool values_absorbed(const ModelConfig& config, std::int64_t layer);
/// Channels per query head that enter the output projection.
std::int64_t attended_width(const ModelConfig& config, std::int64_t layer);

/// Tensors of layer `layer` (0-based) in canonical order. `projected` adds, after the attention projections,
/// self_attn.key_fold.weight [kv_heads, head_dim, g * head_dim] with g = source_kv_heads / kv_heads (per group, encoder
/// of the stacked rotated keys) and self_attn.query_fold.weight [source_kv_heads, head_dim, head_dim] (applied to the
/// rotated query heads of that source KV head). `latent` adds, after the attention projections and where not absorbed,
/// {self_attn, self_attention}.key_up.weight [source_kv_heads, head_dim, key_width] and value_up.weight
/// [source_kv_heads, head_dim, value_width]: key or value of source head k = its matrix times the latent of its group k
/// / (source_kv_heads / kv_heads). k_proj (key) and v_proj (value) have kv_heads * width rows. Grouped BLOOM has
/// self_attention.{query,key,value} instead of the fused query_key_value.
std::vector<TensorShape> layer_tensors(const ModelConfig& config, std::int64_t layer);
/// Embedding, all layers, final norm, output projection (absent when tied).
std::vector<TensorShape> model_tensors(const ModelConfig& config);
/// Parameters of the whole model; a tied table counts once.
std::int64_t parameter_count(const ModelConfig& config);

/// What a checkpoint lacks or has in another shape than its configuration asks for, one sentence each; empty when all
/// is well.
std::vector<std::string> layout_problems(const Reader& reader);

}  // namespace headfold::checkpoint
