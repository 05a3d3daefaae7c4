#pragma once
// config.json of a Hugging Face model folder, understood. Keys and defaults: docs/formats.md, section "Models".

#include <headfold/base/json.h>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace headfold::checkpoint {

enum class Family { llama, bloom };

/// What a layer caches per token, and how scores are formed from it.
enum class KvLayout {
  gqa,        ///< kv_heads keys and values of head_dim each: stock grouped-query attention (MHA when kv_heads == heads)
  projected,  ///< arXiv 2406.07056 section 3.4: full keys, rotated, projected to kv_heads x head_dim before they are
              ///< cached
  latent,     ///< LoRC, Palu: a low-rank latent per group of heads, keys rebuilt from it and then rotated
};

/// What one layer caches. Uniform models have the same in every layer.
struct LayerShape {
  std::int64_t kv_heads = 0;     ///< cached KV heads; `latent`: latents (groups)
  std::int64_t key_width = 0;    ///< channels of one cached key: head_dim but for `latent`
  std::int64_t value_width = 0;  ///< channels of one cached value: head_dim but for `latent`
  bool operator==(const LayerShape&) const = default;
};

/// RoPE frequency rule; type is "default", "linear" or "llama3".
struct RopeScaling {
  std::string type = "default";
  double factor = 1.0;
  double low_freq_factor = 1.0;
  double high_freq_factor = 4.0;
  std::int64_t original_max_positions = 8192;
};

struct ModelConfig {
  Family family = Family::llama;
  KvLayout layout = KvLayout::gqa;
  std::int64_t hidden = 0;
  std::int64_t layers = 0;
  std::int64_t heads = 0;     ///< query heads
  std::int64_t kv_heads = 0;  ///< KV heads that are cached
  /// `projected`: heads of the full key projection; `latent`: KV heads of the model that was folded, each rebuilt from
  /// the latent of its group; otherwise == kv_heads.
  std::int64_t source_kv_heads = 0;
  std::int64_t head_dim = 0;
  /// One entry per layer; empty: all layers alike, {kv_heads, head_dim, head_dim}. Uneven models have kv_heads = the
  /// largest of their layers.
  std::vector<LayerShape> layer_shapes;
  std::int64_t ffn = 0;  ///< inner width of the MLP
  std::int64_t vocab = 0;
  std::int64_t max_positions = 0;  ///< longest sequence; BLOOM: seq_length, else 2048
  double norm_eps = 1e-5;
  double rope_theta = 10000.0;
  RopeScaling rope_scaling;
  bool tied_embeddings = false;
  bool attention_bias = false;  ///< LLaMA: biases on q, k, v and o; BLOOM: always true
  bool mlp_bias = false;
  bool post_layernorm_residual = false;  ///< BLOOM apply_residual_connection_post_layernorm
  /// BLOOM: K and V stored apart from Q because their head count differs (native grouped BLOOM, key
  /// num_key_value_heads).
  bool split_qkv = false;
  std::int64_t bos = -1;          ///< -1: none
  std::int64_t eos = -1;          ///< first one when the file gives a list; -1: none
  std::string dtype = "float32";  ///< torch_dtype / dtype of the file: "float32", "float16", "bfloat16"
  Json raw;                       ///< the whole file, unknown keys included
  std::string file;               ///< where it came from, for messages

  std::int64_t kv_width() const { return kv_heads * head_dim; }
  LayerShape shape_of(std::int64_t layer) const {
    return layer_shapes.empty() ? LayerShape{kv_heads, head_dim, head_dim}
                                : layer_shapes.at(static_cast<std::size_t>(layer));
  }
  /// KV heads whose keys layer `layer` compares with queries: kv_heads of that layer, but source_kv_heads where keys
  /// are rebuilt or projected from more.
  std::int64_t source_heads_of(std::int64_t layer) const {
    return layout == KvLayout::gqa ? shape_of(layer).kv_heads : source_kv_heads;
  }
  bool uneven() const;  ///< whether layers differ in what they cache
  /// Bytes of KV cache per token: sum over layers of kv_heads * (key_width + value_width) * element_size.
  std::int64_t cache_bytes_per_token(std::int64_t element_size) const;
  /// Largest and smallest of the layers' KV heads, "4" or "2 to 8", for messages.
  std::string kv_heads_text() const;
};

/// Parses and validates. Throws CorruptFile / InputError naming the file and the key; unsupported architectures, rope
/// types (dynamic, yarn, longrope), activations and per-head QK-norm are refused with the reason.
ModelConfig parse_config(const Json& json, const std::string& file);
/// Reads `folder`/config.json. Throws IoError when it is absent (hint: is this a model folder?).
ModelConfig read_config(const std::filesystem::path& folder);

/// config.json of `source` with its KV heads changed to `kv_heads` and `layout`; every other key is kept as it stands.
/// LLaMA + gqa gives a stock file. `projected` renames architecture and model_type ("headfold_llama") so that stock
/// loaders refuse it. Grouped BLOOM becomes "headfold_bloom" with num_key_value_heads.
Json folded_config(const ModelConfig& source, std::int64_t kv_heads, KvLayout layout);
/// The same with a shape for every layer. Uneven LLaMA + gqa gives a DeciLM (Nemotron-NAS) config with one block per
/// layer, which headfold, vLLM and llama.cpp's converter read; where decilm_obstacle() has something to say, and for
/// `latent`, it is headfold's own. InputError unless the shapes are legal for `source`.
Json folded_config(const ModelConfig& source, const std::vector<LayerShape>& shapes, KvLayout layout);
/// Why a DeciLM config cannot state `source`'s sizes (feed-forward width no multiple of 256, heads that do not fill the
/// hidden size); empty when it can.
std::string decilm_obstacle(const ModelConfig& source);
/// The config with headfold's and DeciLM's own keys taken out: stock LLaMA or BLOOM with `kv_heads` KV heads.
Json stock_config(const ModelConfig& config, std::int64_t kv_heads);

const char* name_of(Family family);
const char* name_of(KvLayout layout);

}  // namespace headfold::checkpoint
