#include <headfold/base/error.h>
#include <headfold/checkpoint/config.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/checkpoint/safetensors.h>

#include <algorithm>
#include <cmath>
#include <tuple>

namespace headfold::checkpoint {
namespace {

/// Larger than any model there is, small enough that no product of two of them overflows.
constexpr std::int64_t kMostWidth = std::int64_t{1} << 24;
constexpr std::int64_t kMostLayers = 10000;  // there are lists with an entry for every tensor of every layer
constexpr std::int64_t kMostHeads = 1 << 16;
constexpr std::int64_t kMostVocabulary = std::int64_t{1} << 28;
constexpr std::int64_t kMostPositions = std::int64_t{1} << 31;

bool present(const Json& json, const std::string& key) {
  const auto found = json.find(key);
  return found != json.end() && !found->is_null();
}

/// First spelling of a key that the file has; the first one when it has none.
std::string spelling(const Json& json, std::initializer_list<const char*> names) {
  for (const char* name : names)
    if (present(json, name)) return name;
  return *names.begin();
}

/// A whole number: nlohmann would cut 4096.5 to 4096 and wrap what exceeds 64 bits.
std::int64_t whole(const Json& value, const std::string& key, const std::string& file) {
  const bool fits = value.is_number_integer() && (!value.is_number_unsigned() ||
                                                  value.get<std::uint64_t>() <= static_cast<std::uint64_t>(INT64_MAX));
  if (!fits)
    throw InputError(
        fmt::format("{}: key \"{}\" must be a whole number, found {}", file, key, value.dump().substr(0, 80)));
  return value.get<std::int64_t>();
}

std::int64_t bounded(const Json& json, const std::string& key, std::int64_t most, const std::string& file) {
  if (!present(json, key)) throw InputError(fmt::format("{}: key \"{}\" is missing", file, key));
  const std::int64_t value = whole(json[key], key, file);
  if (value < 1 || value > most)
    throw InputError(fmt::format("{}: key \"{}\" is {}; must be 1 to {}", file, key, value, most));
  return value;
}

double positive(const Json& json, const std::string& key, double fallback, const std::string& file) {
  if (!present(json, key)) return fallback;
  if (!json[key].is_number())
    throw InputError(
        fmt::format("{}: key \"{}\" must be a number, found {}", file, key, json[key].dump().substr(0, 80)));
  const double value = json[key].get<double>();
  if (!std::isfinite(value) || value <= 0)
    throw InputError(fmt::format("{}: key \"{}\" is {}; must be positive and finite", file, key, value));
  return value;
}

double required_positive(const Json& json, const std::string& key, const std::string& file) {
  if (!present(json, key)) throw InputError(fmt::format("{}: rope_scaling lacks \"{}\"", file, key));
  return positive(json, key, 0, file);
}

/// A token id, the first one of a list, or -1 for null.
std::int64_t token_id(const Json& json, const std::string& key, std::int64_t fallback, const std::string& file) {
  const auto found = json.find(key);
  if (found == json.end()) return fallback;
  if (found->is_null()) return -1;
  if (!found->is_array()) return whole(*found, key, file);
  return found->empty() ? -1 : whole(found->front(), key, file);
}

std::string read_dtype(const Json& json, const std::string& file) {
  const std::string key = spelling(json, {"torch_dtype", "dtype"});
  std::string dtype = optional<std::string>(json, key, "float32", file);
  if (dtype.rfind("torch.", 0) == 0) dtype = dtype.substr(6);
  if (dtype == "half") dtype = "float16";
  if (dtype == "float") dtype = "float32";
  if (dtype != "float32" && dtype != "float16" && dtype != "bfloat16")
    throw InputError(
        fmt::format("{}: key \"{}\" is \"{}\"; headfold reads float32, float16 and bfloat16", file, key, dtype));
  return dtype;
}

/// The frequency rule that `json[key]` states; the default one when it is absent.
RopeScaling read_scaling(const Json& json, const std::string& key, const std::string& file) {
  RopeScaling scaling;
  if (!present(json, key)) return scaling;
  const Json& rope = json[key];
  if (!rope.is_object())
    throw InputError(fmt::format("{}: key \"{}\" must be an object, found {}", file, key, rope.dump().substr(0, 80)));
  const std::string type = spelling(rope, {"rope_type", "type"});
  scaling.type = optional<std::string>(rope, type, "default", file);
  if (!present(rope, type) && positive(rope, "factor", 1.0, file) != 1.0)
    throw InputError(fmt::format("{}: {} has factor {} but no type, so headfold does not apply it", file, key,
                                 rope["factor"].get<double>()),
                     "supported are default, linear and llama3");
  if (scaling.type == "linear") {
    scaling.factor = required_positive(rope, "factor", file);
  } else if (scaling.type == "llama3") {
    scaling.factor = required_positive(rope, "factor", file);
    scaling.low_freq_factor = required_positive(rope, "low_freq_factor", file);
    scaling.high_freq_factor = required_positive(rope, "high_freq_factor", file);
    scaling.original_max_positions = bounded(rope, "original_max_position_embeddings", kMostPositions, file);
    if (scaling.high_freq_factor <= scaling.low_freq_factor)
      throw InputError(fmt::format("{}: {}: high_freq_factor {} must exceed low_freq_factor {}", file, key,
                                   scaling.high_freq_factor, scaling.low_freq_factor));
  } else if (scaling.type != "default") {
    throw InputError(fmt::format("{}: {} has type \"{}\", which headfold does not apply", file, key, scaling.type),
                     "supported are default, linear and llama3");
  }
  if (positive(rope, "partial_rotary_factor", 1.0, file) != 1.0)
    throw InputError(fmt::format("{}: {}: partial_rotary_factor other than 1 is not supported", file, key));
  return scaling;
}

bool same_scaling(const RopeScaling& a, const RopeScaling& b) {
  const auto all = [](const RopeScaling& s) {
    return std::tie(s.type, s.factor, s.low_freq_factor, s.high_freq_factor, s.original_max_positions);
  };
  return all(a) == all(b);
}

void read_rope(const Json& json, ModelConfig& config, const std::string& file) {
  // New transformers keep theta and scaling in one object; old ones apart.
  const bool modern = present(json, "rope_parameters");
  config.rope_theta = positive(json, "rope_theta", 10000.0, file);
  config.rope_scaling = read_scaling(json, "rope_scaling", file);
  if (modern) {
    const RopeScaling scaling = read_scaling(json, "rope_parameters", file);
    // Which of the two counts depends on the version of the library.
    if (present(json, "rope_scaling") && !same_scaling(scaling, config.rope_scaling))
      throw InputError(
          fmt::format("{}: rope_scaling (type \"{}\", factor {}) and rope_parameters (type \"{}\", factor "
                      "{}) disagree",
                      file, config.rope_scaling.type, config.rope_scaling.factor, scaling.type, scaling.factor),
          "keep the one that the model was trained with");
    config.rope_scaling = scaling;
    config.rope_theta = positive(json["rope_parameters"], "rope_theta", config.rope_theta, file);
  }
  if (positive(json, "partial_rotary_factor", 1.0, file) != 1.0)
    throw InputError(fmt::format("{}: partial_rotary_factor other than 1 is not supported", file));
  if (config.rope_theta < 1.0)
    throw InputError(fmt::format("{}: rope_theta is {}; must be at least 1", file, config.rope_theta));
}

/// Refuses what would silently change the arithmetic.
void refuse_unsupported(const Json& json, const std::string& file) {
  for (const char* key : {"use_qk_norm", "qk_norm", "qk_layernorm"}) {
    if (present(json, key) && json[key] != false)
      throw InputError(
          fmt::format("{}: \"{}\": the model normalises queries and keys per head, which headfold does not support",
                      file, key),
          "a norm between projection and score does not commute with a fold of the projection");
  }
  if (present(json, "quantization_config"))
    throw InputError(fmt::format("{}: the checkpoint is quantised (quantization_config)", file),
                     "use the unquantised original");
  if (present(json, "alibi_head_order"))
    throw InputError(fmt::format("{}: \"alibi_head_order\": reordered ALiBi heads are not supported", file));
}

struct Kind {
  const char* model_type;
  const char* architecture;
  const char* base_architecture;
  Family family;
  bool own;     ///< headfold's own variant that stock loaders refuse
  bool decilm;  ///< a number of KV heads per layer
};

constexpr Kind kKinds[] = {
    {"llama", "LlamaForCausalLM", "LlamaModel", Family::llama, false, false},
    {"headfold_llama", "HeadfoldLlamaForCausalLM", "", Family::llama, true, false},
    {"bloom", "BloomForCausalLM", "BloomModel", Family::bloom, false, false},
    {"headfold_bloom", "HeadfoldBloomForCausalLM", "", Family::bloom, true, false},
    {"nemotron-nas", "DeciLMForCausalLM", "", Family::llama, false, true},
    {"deci", "DeciLMForCausalLM", "", Family::llama, false, true},
};

const Kind& kind_of(const Json& json, const std::string& file) {
  std::string architecture;
  if (present(json, "architectures")) {
    const Json& list = json["architectures"];
    if (!list.is_array() || list.size() != 1 || !list[0].is_string())
      throw InputError(
          fmt::format("{}: key \"architectures\" must list one name, found {}", file, list.dump().substr(0, 120)));
    architecture = list[0].get<std::string>();
  }
  const auto type = optional<std::string>(json, "model_type", "", file);
  if (architecture.empty() && type.empty())
    throw InputError(fmt::format("{}: neither \"architectures\" nor \"model_type\" is given", file),
                     "is this the config.json of a language model?");
  const auto names = [&](const Kind& kind) {
    return (type.empty() || type == kind.model_type) &&
           (architecture.empty() || architecture == kind.architecture || architecture == kind.base_architecture);
  };
  for (const Kind& kind : kKinds)
    if (names(kind)) return kind;
  const std::string seen = fmt::format("architectures [\"{}\"], model_type \"{}\"", architecture, type);
  for (const char* family : {"qwen3", "olmo2", "gemma3", "cohere", "stablelm", "chameleon"}) {
    if (type.rfind(family, 0) == 0)
      throw InputError(
          fmt::format(
              "{}: {}: this family normalises queries and keys per head (QK-norm), which headfold does not support",
              file, seen),
          "a norm between projection and score does not commute with a fold of the projection");
  }
  throw InputError(
      fmt::format("{}: {} is not supported", file, seen),
      "headfold reads LlamaForCausalLM (llama), BloomForCausalLM (bloom) and DeciLMForCausalLM (deci, nemotron-nas)");
}

void check_heads(const ModelConfig& config, const std::string& file) {
  for (std::int64_t layer = 0; layer < (config.layer_shapes.empty() ? 1 : config.layers); ++layer) {
    const LayerShape shape = config.shape_of(layer);
    const std::int64_t source = config.source_heads_of(layer);
    const std::string where = config.layer_shapes.empty() ? std::string() : fmt::format("layer {}: ", layer);
    if (config.heads % source != 0 || source % shape.kv_heads != 0)
      throw InputError(fmt::format("{}: {}{} query heads cannot be shared evenly by {} KV heads", file, where,
                                   config.heads, source % shape.kv_heads != 0 ? shape.kv_heads : source),
                       "num_attention_heads must be a multiple of num_key_value_heads");
    if (std::max(shape.key_width, shape.value_width) > kMostWidth / shape.kv_heads)
      throw InputError(fmt::format("{}: {}{} latents of {} and {} channels are wider than {}", file, where,
                                   shape.kv_heads, shape.key_width, shape.value_width, kMostWidth));
  }
}

/// So that the number of parameters, and of their bytes, fits 64 bits.
void check_size(const ModelConfig& config, const std::string& file) {
  double parameters = 2.0 * static_cast<double>(config.vocab) * static_cast<double>(config.hidden);
  const std::int64_t different = config.layer_shapes.empty() ? 1 : config.layers;
  const std::int64_t alike = config.layers / different;
  for (std::int64_t layer = 0; layer < different; ++layer)
    for (const TensorShape& tensor : layer_tensors(config, layer))
      parameters += static_cast<double>(alike) * static_cast<double>(tensor.elements());
  if (parameters > 1e17)
    throw InputError(fmt::format("{}: its sizes make {:.2g} parameters, more than any model has", file, parameters));
}

/// Takes one shape per layer; models whose layers are all the ordinary ones keep no list.
void set_shapes(ModelConfig& c, std::vector<LayerShape> shapes) {
  c.kv_heads = 0;
  for (const LayerShape& shape : shapes) c.kv_heads = std::max(c.kv_heads, shape.kv_heads);
  const LayerShape ordinary{c.kv_heads, c.head_dim, c.head_dim};
  if (std::all_of(shapes.begin(), shapes.end(), [&](const LayerShape& shape) { return shape == ordinary; }))
    shapes.clear();
  c.layer_shapes = std::move(shapes);
}

/// Object "headfold" of headfold's own models: layout, source_kv_heads, layers.
void read_own(const Json& json, ModelConfig& c, const std::string& file) {
  const Json& own = json["headfold"];
  if (!own.is_object())
    throw InputError(fmt::format("{}: key \"headfold\" must be an object, found {}", file, own.dump().substr(0, 80)));
  const auto layout = required<std::string>(own, "layout", file);
  bool known = false;
  for (const KvLayout each : {KvLayout::gqa, KvLayout::projected, KvLayout::latent}) {
    if (layout != name_of(each)) continue;
    c.layout = each;
    known = true;
  }
  if (!known)
    throw InputError(
        fmt::format("{}: headfold.layout is \"{}\"; known are \"gqa\", \"projected\" and \"latent\"", file, layout),
        "was it written by a newer headfold?");
  if (c.layout == KvLayout::projected && c.family == Family::bloom)
    throw InputError(fmt::format("{}: BLOOM has no rotation, so layout \"projected\" does not apply", file));
  const bool latent = c.layout == KvLayout::latent;
  if (c.layout != KvLayout::gqa) c.source_kv_heads = bounded(own, "source_kv_heads", kMostHeads, file);
  if (!present(own, "layers")) {
    if (latent || (c.layout == KvLayout::gqa && c.family == Family::llama))
      throw InputError(
          fmt::format("{}: headfold.layout \"{}\" needs headfold.layers, one entry per layer", file, layout));
    return;
  }
  const Json& layers = own["layers"];
  if (!layers.is_array() || static_cast<std::int64_t>(layers.size()) != c.layers)
    throw InputError(fmt::format("{}: headfold.layers must have {} entries, one per layer, found {}", file, c.layers,
                                 layers.is_array() ? std::to_string(layers.size()) : layers.type_name()));
  std::vector<LayerShape> shapes;
  shapes.reserve(layers.size());
  for (const Json& entry : layers) {
    const std::string where = fmt::format("{}: headfold.layers[{}]", file, shapes.size());
    if (!entry.is_object()) throw InputError(fmt::format("{} must be an object", where));
    LayerShape shape{bounded(entry, "kv_heads", kMostHeads, where), c.head_dim, c.head_dim};
    for (const auto& [key, width] :
         {std::pair("key_width", &shape.key_width), std::pair("value_width", &shape.value_width)}) {
      if (latent || present(entry, key)) *width = bounded(entry, key, kMostWidth, where);
      if (!latent && *width != c.head_dim)
        throw InputError(fmt::format("{}: {} is {}, but layout \"{}\" caches head_dim = {} channels", where, key,
                                     *width, layout, c.head_dim));
    }
    shapes.push_back(shape);
  }
  const bool stated = present(json, "num_key_value_heads");
  const std::int64_t largest = c.kv_heads;
  set_shapes(c, std::move(shapes));
  if (stated && largest != c.kv_heads)
    throw InputError(fmt::format("{}: num_key_value_heads is {}, but the largest of headfold.layers is {}", file,
                                 largest, c.kv_heads));
  if (c.layout == KvLayout::gqa) c.source_kv_heads = c.kv_heads;
}

/// Width that DeciLM's engines make of a multiplier: truncated, then the next multiple of 256 (vLLM nemotron_nas.py,
/// llama.cpp conversion of DeciLMForCausalLM).
std::int64_t decilm_ffn(double multiplier, std::int64_t hidden) {
  const auto width = static_cast<std::int64_t>(2 * multiplier * static_cast<double>(hidden) / 3);
  return (width + 255) / 256 * 256;
}

/// Parts of a DeciLM block that would change the arithmetic.
void refuse_block(const Json& part, const std::string& where) {
  if (!part.is_object()) throw InputError(fmt::format("{} must be an object", where));
  for (const char* key : {"no_op", "replace_with_linear", "sparsify", "window_length", "num_sink_tokens",
                          "unshifted_sink", "use_prefill_window_in_sink_attention", "mamba", "llama4", "moe"}) {
    if (present(part, key) && part[key] != false)
      throw InputError(
          fmt::format("{}: \"{}\" is {}: blocks without ordinary attention and a gated feed-forward part are "
                      "not supported",
                      where, key, part[key].dump().substr(0, 80)));
  }
  if (present(part, "hidden_act") && part["hidden_act"] != "silu" && part["hidden_act"] != "swish")
    throw InputError(fmt::format("{}: hidden_act is {}; the LLaMA decoder here computes silu", where,
                                 part["hidden_act"].dump().substr(0, 80)));
}

/// KV heads per layer: block_configs (Nemotron-NAS) or num_key_value_heads_per_layer (DeciLM-7B).
void read_decilm(const Json& json, ModelConfig& c, const std::string& file) {
  std::vector<LayerShape> shapes;
  const bool blocks = present(json, "block_configs");
  const char* key = blocks ? "block_configs" : "num_key_value_heads_per_layer";
  if (!present(json, key))
    throw InputError(fmt::format(
        "{}: DeciLM needs \"block_configs\" or \"num_key_value_heads_per_layer\", one entry per layer", file));
  const Json& list = json[key];
  if (!list.is_array() || static_cast<std::int64_t>(list.size()) != c.layers)
    throw InputError(fmt::format("{}: \"{}\" must have {} entries, one per layer, found {}", file, key, c.layers,
                                 list.is_array() ? std::to_string(list.size()) : list.type_name()));
  shapes.reserve(list.size());
  c.ffn = blocks ? 0 : bounded(json, "intermediate_size", kMostWidth, file);
  for (const Json& entry : list) {
    const std::string where = fmt::format("{}: {}[{}]", file, key, shapes.size());
    std::int64_t kv_heads = 0;
    if (blocks) {
      if (!entry.is_object()) throw InputError(fmt::format("{} must be an object", where));
      if (present(entry, "parallel_blocks"))
        throw InputError(fmt::format("{}: parallel blocks are not supported", where));
      for (const char* part : {"attention", "ffn"})
        refuse_block(present(entry, part) ? entry[part] : Json(), fmt::format("{}.{}", where, part));
      const Json &attention = entry["attention"], &ffn = entry["ffn"];
      if (present(attention, "num_key_value_heads") && !present(attention, "n_heads_in_group")) {
        kv_heads = bounded(attention, "num_key_value_heads", kMostHeads, where + ".attention");
      } else {
        const std::int64_t group = bounded(attention, "n_heads_in_group", kMostHeads, where + ".attention");
        if (c.heads % group != 0)
          throw InputError(
              fmt::format("{}: {} query heads are no multiple of n_heads_in_group {}", where, c.heads, group));
        kv_heads = c.heads / group;
      }
      std::int64_t width = 0;
      if (present(ffn, "ffn_mult")) {
        const double multiplier = positive(ffn, "ffn_mult", 0, where + ".ffn");
        if (multiplier > static_cast<double>(kMostWidth) / static_cast<double>(c.hidden))
          throw InputError(
              fmt::format("{}: ffn_mult {} makes a feed-forward part wider than {}", where, multiplier, kMostWidth));
        width = decilm_ffn(multiplier, c.hidden);
      } else {
        width = bounded(ffn, "intermediate_size", kMostWidth, where + ".ffn");
      }
      if (c.ffn != 0 && width != c.ffn)
        throw InputError(
            fmt::format("{}: the feed-forward part is {} wide, that of layer 0 {}: layers of different inner "
                        "width are not supported",
                        where, width, c.ffn));
      c.ffn = width;
    } else {
      kv_heads = whole(entry, key, file);
      if (kv_heads < 1 || kv_heads > kMostHeads)
        throw InputError(fmt::format("{} is {}; must be 1 to {}", where, kv_heads, kMostHeads));
    }
    shapes.push_back({kv_heads, c.head_dim, c.head_dim});
  }
  if (present(json, "o_proj_bias") && optional<bool>(json, "o_proj_bias", false, file) != c.attention_bias)
    throw InputError(fmt::format("{}: o_proj_bias differs from attention_bias, which is not supported", file));
  set_shapes(c, std::move(shapes));
  c.source_kv_heads = c.kv_heads;
}

void read_llama(const Json& json, const Kind& kind, ModelConfig& c, const std::string& file) {
  c.hidden = bounded(json, spelling(json, {"hidden_size", "n_embd", "n_embed"}), kMostWidth, file);
  c.layers = bounded(json, spelling(json, {"num_hidden_layers", "n_layer", "n_layers"}), kMostLayers, file);
  c.heads = bounded(json, spelling(json, {"num_attention_heads", "n_head", "n_heads"}), kMostHeads, file);
  c.kv_heads = !kind.decilm && present(json, "num_key_value_heads")
                   ? bounded(json, "num_key_value_heads", kMostHeads, file)
                   : c.heads;
  c.source_kv_heads = c.kv_heads;
  if (!kind.decilm) {
    for (const char* key : {"num_key_value_heads_per_layer", "block_configs"})
      if (present(json, key))
        throw InputError(fmt::format("{}: \"{}\" in a model of type \"{}\"", file, key, kind.model_type),
                         "models with a number of KV heads per layer have the architecture DeciLMForCausalLM");
  }
  if (present(json, "head_dim")) {
    c.head_dim = bounded(json, "head_dim", kMostHeads, file);
  } else {
    if (c.hidden % c.heads != 0)
      throw InputError(
          fmt::format("{}: hidden_size {} is no multiple of num_attention_heads {} and head_dim is not given", file,
                      c.hidden, c.heads));
    c.head_dim = c.hidden / c.heads;
  }
  if (c.head_dim % 2 != 0)
    throw InputError(fmt::format("{}: head_dim {} is odd; rotary embeddings turn pairs of entries", file, c.head_dim));
  if (!kind.decilm) c.ffn = bounded(json, "intermediate_size", kMostWidth, file);
  c.max_positions =
      present(json, "max_position_embeddings") ? bounded(json, "max_position_embeddings", kMostPositions, file) : 2048;
  c.norm_eps = positive(json, "rms_norm_eps", 1e-6, file);  // LlamaConfig's default; LLaMA2 files state 1e-5
  c.tied_embeddings = optional<bool>(json, "tie_word_embeddings", false, file);
  c.attention_bias = optional<bool>(json, "attention_bias", false, file);
  c.mlp_bias = optional<bool>(json, "mlp_bias", false, file);
  c.bos = token_id(json, "bos_token_id", 1, file);
  c.eos = token_id(json, "eos_token_id", 2, file);
  const auto activation = optional<std::string>(json, "hidden_act", "silu", file);
  if (activation != "silu" && activation != "swish")
    throw InputError(fmt::format("{}: hidden_act is \"{}\"; the LLaMA decoder here computes silu", file, activation));
  read_rope(json, c, file);
  if (kind.decilm) read_decilm(json, c, file);
  if (kind.own) {
    if (!present(json, "headfold"))
      throw InputError(fmt::format("{}: model_type \"{}\" needs an object \"headfold\"", file, kind.model_type));
    read_own(json, c, file);
  }
}

void read_bloom(const Json& json, const Kind& kind, ModelConfig& c, const std::string& file) {
  c.hidden = bounded(json, spelling(json, {"hidden_size", "n_embed"}), kMostWidth / 4, file);
  c.layers = bounded(json, spelling(json, {"n_layer", "num_hidden_layers"}), kMostLayers, file);
  c.heads = bounded(json, spelling(json, {"n_head", "num_attention_heads"}), kMostHeads, file);
  if (c.hidden % c.heads != 0)
    throw InputError(fmt::format("{}: hidden size {} is no multiple of {} heads", file, c.hidden, c.heads));
  c.head_dim = c.hidden / c.heads;
  c.split_qkv = kind.own;
  if (kind.own) {
    const bool per_layer = present(json, "headfold") && json["headfold"].is_object() &&
                           present(json["headfold"], "layers") && !present(json, "num_key_value_heads");
    c.kv_heads = per_layer ? c.heads : bounded(json, "num_key_value_heads", kMostHeads, file);
  } else {
    c.kv_heads = c.heads;
    if (present(json, "num_key_value_heads") &&
        whole(json["num_key_value_heads"], "num_key_value_heads", file) != c.heads)
      throw InputError(fmt::format("{}: stock BLOOM has no num_key_value_heads other than n_head", file),
                       "headfold's own grouped BLOOM has model_type \"headfold_bloom\"");
  }
  c.source_kv_heads = c.kv_heads;
  c.ffn = 4 * c.hidden;
  c.max_positions = present(json, "seq_length") ? bounded(json, "seq_length", kMostPositions, file) : 2048;
  c.norm_eps = positive(json, "layer_norm_epsilon", 1e-5, file);
  c.tied_embeddings = optional<bool>(json, "tie_word_embeddings", true, file);
  c.attention_bias = true;
  c.mlp_bias = true;
  c.post_layernorm_residual = optional<bool>(json, "apply_residual_connection_post_layernorm", false, file);
  c.bos = token_id(json, "bos_token_id", 1, file);
  c.eos = token_id(json, "eos_token_id", 2, file);
  if (kind.own && present(json, "headfold")) read_own(json, c, file);
}

/// Names of headfold's own variant of a family.
void set_own(Json& json, Family family) {
  const bool llama = family == Family::llama;
  json["architectures"] = Json::array({llama ? "HeadfoldLlamaForCausalLM" : "HeadfoldBloomForCausalLM"});
  json["model_type"] = llama ? "headfold_llama" : "headfold_bloom";
}

/// "headfold".layers: what every layer caches.
Json layer_list(const std::vector<LayerShape>& shapes) {
  Json list = Json::array();
  for (const LayerShape& shape : shapes)
    list.push_back({{"kv_heads", shape.kv_heads}, {"key_width", shape.key_width}, {"value_width", shape.value_width}});
  return list;
}

/// The configuration in the spellings that every version of transformers reads (reference: "read both, write the old
/// names"): a loader that does not know a new one would take its default without a word.
Json in_old_names(const ModelConfig& config) {
  Json json = config.raw;
  const auto rename = [&](const char* old_name, std::initializer_list<const char*> others) {
    for (const char* other : others) {
      if (!json.contains(other)) continue;
      if (!present(json, old_name)) json[old_name] = json[other];
      json.erase(other);
    }
  };
  rename("torch_dtype", {"dtype"});
  if (config.family == Family::bloom) {
    rename("n_layer", {"num_hidden_layers"});
    rename("n_head", {"num_attention_heads"});
    rename("hidden_size", {"n_embed"});
    return json;
  }
  rename("hidden_size", {"n_embd", "n_embed"});
  rename("num_hidden_layers", {"n_layer", "n_layers"});
  rename("num_attention_heads", {"n_head", "n_heads"});
  if (present(json, "rope_parameters")) {
    Json scaling = json["rope_parameters"];
    json["rope_theta"] = config.rope_theta;
    scaling.erase("rope_theta");
    if (config.rope_scaling.type == "default") {
      scaling = nullptr;
    } else {
      scaling["rope_type"] = config.rope_scaling.type;
      if (config.rope_scaling.type == "linear") scaling["type"] = "linear";  // before version 4.43 only this was read
    }
    json["rope_scaling"] = scaling;
  }
  json.erase("rope_parameters");
  return json;
}

/// DeciLM (Nemotron-NAS) config with the KV heads of `shapes`: the key set of NVIDIA's published files.
Json decilm_config(const ModelConfig& source, const std::vector<LayerShape>& shapes) {
  Json json = in_old_names(source);
  // Rounded to six digits (mlx does); the truncated product may then end one below the width, which the step to the
  // next multiple of 256 makes good.
  const double exact = 1.5 * static_cast<double>(source.ffn) / static_cast<double>(source.hidden);
  double multiplier = std::floor(exact * 1e6) / 1e6;
  if (decilm_ffn(multiplier, source.hidden) != source.ffn) multiplier = exact;
  json["architectures"] = Json::array({"DeciLMForCausalLM"});
  json["model_type"] = "nemotron-nas";
  // transformers and vLLM have no such class of their own: they fetch NVIDIA's when the user trusts remote code.
  const std::string code = "nvidia/Llama-3_3-Nemotron-Super-49B-v1_5--";
  json["auto_map"] = {{"AutoConfig", code + "configuration_decilm.DeciLMConfig"},
                      {"AutoModelForCausalLM", code + "modeling_decilm.DeciLMForCausalLM"}};
  json.erase("num_key_value_heads_per_layer");
  json["num_key_value_heads"] = nullptr;
  json["intermediate_size"] = nullptr;
  json["block_configs"] = Json::array();
  for (const LayerShape& shape : shapes) {
    json["block_configs"].push_back(
        {{"attention",
          {{"n_heads_in_group", source.heads / shape.kv_heads},
           {"no_op", false},
           {"num_sink_tokens", nullptr},
           {"replace_with_linear", false},
           {"sparsify", nullptr},
           {"unshifted_sink", false},
           {"use_prefill_window_in_sink_attention", false},
           {"window_length", nullptr}}},
         {"ffn", {{"ffn_mult", multiplier}, {"no_op", false}, {"replace_with_linear", false}, {"sparsify", nullptr}}}});
  }
  return json;
}

/// Refuses shapes that `source` cannot be folded to.
void check_target(const ModelConfig& source, const std::vector<LayerShape>& shapes, KvLayout layout) {
  if (source.layout != KvLayout::gqa)
    throw InputError(fmt::format("{}: the model has the {} layout already and cannot be folded again", source.file,
                                 name_of(source.layout)),
                     "fold the original model");
  if (static_cast<std::int64_t>(shapes.size()) != source.layers)
    throw InternalError(fmt::format("{} layer shapes for {} layers", shapes.size(), source.layers));
  if (layout == KvLayout::projected && source.family == Family::bloom)
    throw InputError(fmt::format("{}: BLOOM rotates no keys; its projected layout would equal gqa", source.file),
                     "use layout gqa");
  if (layout != KvLayout::gqa && source.uneven())
    throw InputError(
        fmt::format("{}: layers with different numbers of KV heads can be folded to layout gqa only, not {}",
                    source.file, name_of(layout)));
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    const LayerShape& to = shapes[i];
    const std::int64_t from = source.shape_of(static_cast<std::int64_t>(i)).kv_heads;
    if (to.kv_heads < 1 || from % to.kv_heads != 0)
      throw InputError(fmt::format("{}: {} KV heads cannot be folded to {}", source.file, from, to.kv_heads),
                       "the target must divide the number of KV heads");
    const bool widths = layout == KvLayout::latent
                            ? to.key_width >= 1 && to.value_width >= 1
                            : to.key_width == source.head_dim && to.value_width == source.head_dim;
    if (!widths)
      throw InputError(fmt::format("{}: keys of {} and values of {} channels do not fit layout {}, head_dim is {}",
                                   source.file, to.key_width, to.value_width, name_of(layout), source.head_dim));
  }
}

}  // namespace

bool ModelConfig::uneven() const {
  return std::any_of(layer_shapes.begin(), layer_shapes.end(),
                     [&](const LayerShape& shape) { return !(shape == layer_shapes.front()); });
}

std::int64_t ModelConfig::cache_bytes_per_token(std::int64_t element_size) const {
  if (layer_shapes.empty()) return layers * 2 * kv_width() * element_size;
  std::int64_t channels = 0;
  for (const LayerShape& shape : layer_shapes) channels += shape.kv_heads * (shape.key_width + shape.value_width);
  return channels * element_size;
}

std::string ModelConfig::kv_heads_text() const {
  std::int64_t least = kv_heads;
  for (const LayerShape& shape : layer_shapes) least = std::min(least, shape.kv_heads);
  return least == kv_heads ? std::to_string(kv_heads) : fmt::format("{} to {}", least, kv_heads);
}

ModelConfig parse_config(const Json& json, const std::string& file) {
  if (!json.is_object()) throw InputError(fmt::format("{}: must hold a JSON object", file));
  const Kind& kind = kind_of(json, file);
  refuse_unsupported(json, file);
  ModelConfig config;
  config.family = kind.family;
  config.raw = json;
  config.file = file;
  config.vocab = bounded(json, "vocab_size", kMostVocabulary, file);
  config.dtype = read_dtype(json, file);
  if (kind.family == Family::llama)
    read_llama(json, kind, config, file);
  else
    read_bloom(json, kind, config, file);
  if (config.heads * config.head_dim > kMostWidth)
    throw InputError(
        fmt::format("{}: {} heads of {} are wider than {}", file, config.heads, config.head_dim, kMostWidth));
  if (config.norm_eps >= 1)
    throw InputError(fmt::format("{}: the norm's epsilon is {}; must be below 1", file, config.norm_eps));
  check_heads(config, file);
  check_size(config, file);
  return config;
}

ModelConfig read_config(const std::filesystem::path& folder) {
  const std::filesystem::path file = folder / "config.json";
  std::error_code code;
  if (!std::filesystem::exists(file, code))
    throw IoError(file.string(), "does not exist",
                  "is this a Hugging Face model folder? It holds config.json and *.safetensors");
  return parse_config(read_json(file, std::uint64_t{16} << 20), file.string());
}

Json stock_config(const ModelConfig& config, std::int64_t kv_heads) {
  Json json = in_old_names(config);
  for (const char* key : {"headfold", "block_configs", "num_key_value_heads_per_layer"}) json.erase(key);
  const bool llama = config.family == Family::llama;
  if (!json.contains("model_type") || json["model_type"] != name_of(config.family)) {
    json["architectures"] = Json::array({llama ? "LlamaForCausalLM" : "BloomForCausalLM"});
    json["model_type"] = name_of(config.family);
    json.erase("auto_map");
  }
  if (llama) {
    json["intermediate_size"] = config.ffn;
    json["num_key_value_heads"] = kv_heads;
  } else {
    json.erase("num_key_value_heads");
  }
  return json;
}

std::string decilm_obstacle(const ModelConfig& source) {
  if (source.family != Family::llama) return "the DeciLM format is for LLaMA models";
  if (source.ffn % 256 != 0)
    return fmt::format(
        "the DeciLM format states the feed-forward width as a multiplier that engines round up to a "
        "multiple of 256, and {} is none",
        source.ffn);
  if (source.heads * source.head_dim != source.hidden)
    return fmt::format(
        "DeciLM engines take hidden_size / num_attention_heads for the head width, and {} heads of {} do "
        "not make {}",
        source.heads, source.head_dim, source.hidden);
  return {};
}

Json folded_config(const ModelConfig& source, std::int64_t kv_heads, KvLayout layout) {
  return folded_config(
      source,
      std::vector<LayerShape>(static_cast<std::size_t>(source.layers), {kv_heads, source.head_dim, source.head_dim}),
      layout);
}

Json folded_config(const ModelConfig& source, const std::vector<LayerShape>& shapes, KvLayout layout) {
  check_target(source, shapes, layout);
  std::int64_t most = 0;
  for (const LayerShape& shape : shapes) most = std::max(most, shape.kv_heads);
  const bool even = std::all_of(shapes.begin(), shapes.end(), [&](const LayerShape& s) { return s == shapes.front(); });
  const bool llama = source.family == Family::llama;
  const bool decilm = present(source.raw, "block_configs") || present(source.raw, "num_key_value_heads_per_layer");
  if (layout == KvLayout::gqa && even) {
    if (!llama && most == source.heads && !source.split_qkv) return in_old_names(source);
    Json json = in_old_names(source);
    if (decilm || present(json, "headfold")) json = stock_config(source, most);
    if (!llama) set_own(json, source.family);
    json["num_key_value_heads"] = most;
    return json;
  }
  if (layout == KvLayout::gqa && decilm_obstacle(source).empty()) return decilm_config(source, shapes);
  Json json = decilm ? stock_config(source, most) : in_old_names(source);
  set_own(json, source.family);
  json["num_key_value_heads"] = most;
  json["headfold"] = {{"layout", name_of(layout)}};
  if (layout != KvLayout::gqa) json["headfold"]["source_kv_heads"] = source.kv_heads;
  if (layout != KvLayout::projected || !even) json["headfold"]["layers"] = layer_list(shapes);
  return json;
}

const char* name_of(Family family) {
  return family == Family::llama ? "llama" : "bloom";
}
const char* name_of(KvLayout layout) {
  switch (layout) {
    case KvLayout::projected:
      return "projected";
    case KvLayout::latent:
      return "latent";
    case KvLayout::gqa:
      break;
  }
  return "gqa";
}

}  // namespace headfold::checkpoint
