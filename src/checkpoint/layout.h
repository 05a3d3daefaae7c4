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

/// Prefix of all tensors of a family but the output projection: "model." or "transformer.".
std::string tensor_prefix(Family family);

/// Tensors of layer `layer` (0-based) in canonical order. `projected` adds, after the attention projections,
/// self_attn.key_fold.weight [kv_heads, head_dim, g * head_dim] with g = source_kv_heads / kv_heads (per group, encoder
/// of the stacked rotated keys) and self_attn.query_fold.weight [source_kv_heads, head_dim, head_dim] (applied to the
/// rotated query heads of that source KV head). Grouped BLOOM has self_attention.{query,key,value} instead of the fused
/// query_key_value.
std::vector<TensorShape> layer_tensors(const ModelConfig& config, std::int64_t layer);
/// Embedding, all layers, final norm, output projection (absent when tied).
std::vector<TensorShape> model_tensors(const ModelConfig& config);
/// Parameters of the whole model; a tied table counts once.
std::int64_t parameter_count(const ModelConfig& config);

/// What a checkpoint lacks or has in another shape than its configuration asks for, one sentence each; empty when all
/// is well.
std::vector<std::string> layout_problems(const Reader& reader);

}  // namespace headfold::checkpoint
