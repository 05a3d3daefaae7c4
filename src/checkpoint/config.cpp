#include <headfold/base/error.h>
#include <headfold/checkpoint/config.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/checkpoint/safetensors.h>

#include <cmath>

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

void read_rope(const Json& json, ModelConfig& config, const std::string& file) {
  // New transformers keep theta and scaling in one object; old ones apart.
  const bool modern = present(json, "rope_parameters");
  const std::string key = modern ? "rope_parameters" : "rope_scaling";
  config.rope_theta = positive(json, "rope_theta", 10000.0, file);
  RopeScaling& scaling = config.rope_scaling;
  if (present(json, key)) {
    const Json& rope = json[key];
    if (!rope.is_object())
      throw InputError(fmt::format("{}: key \"{}\" must be an object, found {}", file, key, rope.dump().substr(0, 80)));
    if (modern) config.rope_theta = positive(rope, "rope_theta", config.rope_theta, file);
    scaling.type = optional<std::string>(rope, spelling(rope, {"rope_type", "type"}), "default", file);
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
                       "supported are default, linear and llama3; the rotation of dynamic, yarn and longrope depends "
                       "on the length of the "
                       "text, so a fold of rotated keys would not be exact");
    }
    if (positive(rope, "partial_rotary_factor", 1.0, file) != 1.0)
      throw InputError(fmt::format("{}: {}: partial_rotary_factor other than 1 is not supported", file, key));
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
  for (const char* key : {"num_key_value_heads_per_layer", "block_configs"}) {
    if (present(json, key))
      throw InputError(
          fmt::format("{}: \"{}\": layers with different numbers of KV heads are not supported", file, key));
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
  bool own;  ///< headfold's own variant that stock loaders refuse
};

constexpr Kind kKinds[] = {
    {"llama", "LlamaForCausalLM", "LlamaModel", Family::llama, false},
    {"headfold_llama", "HeadfoldLlamaForCausalLM", "", Family::llama, true},
    {"bloom", "BloomForCausalLM", "BloomModel", Family::bloom, false},
    {"headfold_bloom", "HeadfoldBloomForCausalLM", "", Family::bloom, true},
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
  throw InputError(fmt::format("{}: {} is not supported", file, seen),
                   "headfold reads LlamaForCausalLM (llama) and BloomForCausalLM (bloom)");
}

void check_heads(const ModelConfig& config, const std::string& file) {
  if (config.heads % config.source_kv_heads != 0 || config.source_kv_heads % config.kv_heads != 0)
    throw InputError(
        fmt::format("{}: {} query heads cannot be shared evenly by {} KV heads", file, config.heads, config.kv_heads),
        "num_attention_heads must be a multiple of num_key_value_heads");
}

/// So that the number of parameters, and of their bytes, fits 64 bits.
void check_size(const ModelConfig& config, const std::string& file) {
  double parameters = 2.0 * static_cast<double>(config.vocab) * static_cast<double>(config.hidden);
  for (const TensorShape& tensor : layer_tensors(config, 0))
    parameters += static_cast<double>(config.layers) * static_cast<double>(tensor.elements());
  if (parameters > 1e17)
    throw InputError(fmt::format("{}: its sizes make {:.2g} parameters, more than any model has", file, parameters));
}

void read_llama(const Json& json, const Kind& kind, ModelConfig& c, const std::string& file) {
  c.hidden = bounded(json, spelling(json, {"hidden_size", "n_embd", "n_embed"}), kMostWidth, file);
  c.layers = bounded(json, spelling(json, {"num_hidden_layers", "n_layer", "n_layers"}), kMostLayers, file);
  c.heads = bounded(json, spelling(json, {"num_attention_heads", "n_head", "n_heads"}), kMostHeads, file);
  c.kv_heads = present(json, "num_key_value_heads") ? bounded(json, "num_key_value_heads", kMostHeads, file) : c.heads;
  c.source_kv_heads = c.kv_heads;
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
  c.ffn = bounded(json, "intermediate_size", kMostWidth, file);
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
  if (kind.own) {
    const auto own = json.find("headfold");
    if (own == json.end() || !own->is_object())
      throw InputError(fmt::format("{}: model_type \"{}\" needs an object \"headfold\"", file, kind.model_type));
    const auto layout = required<std::string>(*own, "layout", file);
    if (layout != name_of(KvLayout::projected))
      throw InputError(fmt::format("{}: headfold.layout is \"{}\"; known is \"projected\"", file, layout),
                       "was it written by a newer headfold?");
    c.layout = KvLayout::projected;
    c.source_kv_heads = bounded(*own, "source_kv_heads", kMostHeads, file);
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
    c.kv_heads = bounded(json, "num_key_value_heads", kMostHeads, file);
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
}

}  // namespace

std::int64_t ModelConfig::cache_bytes_per_token(std::int64_t element_size) const {
  return layers * 2 * kv_width() * element_size;
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

Json folded_config(const ModelConfig& source, std::int64_t kv_heads, KvLayout layout) {
  if (source.layout == KvLayout::projected)
    throw InputError(
        fmt::format("{}: the model has the projected layout already and cannot be folded again", source.file),
        "fold the original model");
  if (kv_heads < 1 || source.kv_heads % kv_heads != 0)
    throw InputError(fmt::format("{}: {} KV heads cannot be folded to {}", source.file, source.kv_heads, kv_heads),
                     "the target must divide the number of KV heads");
  Json json = source.raw;
  if (source.family == Family::bloom) {
    if (layout == KvLayout::projected)
      throw InputError(fmt::format("{}: BLOOM rotates no keys; its projected layout would equal gqa", source.file),
                       "use layout gqa");
    if (kv_heads == source.heads && !source.split_qkv) return json;
    json["architectures"] = Json::array({"HeadfoldBloomForCausalLM"});
    json["model_type"] = "headfold_bloom";
    json["num_key_value_heads"] = kv_heads;
    return json;
  }
  json["num_key_value_heads"] = kv_heads;
  if (layout == KvLayout::projected) {
    json["architectures"] = Json::array({"HeadfoldLlamaForCausalLM"});
    json["model_type"] = "headfold_llama";
    json["headfold"] = {{"layout", name_of(layout)}, {"source_kv_heads", source.kv_heads}};
  }
  return json;
}

const char* name_of(Family family) {
  return family == Family::llama ? "llama" : "bloom";
}
const char* name_of(KvLayout layout) {
  return layout == KvLayout::gqa ? "gqa" : "projected";
}

}  // namespace headfold::checkpoint
