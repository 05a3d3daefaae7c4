#include <ATen/Parallel.h>
#include <headfold/base/error.h>
#include <headfold/base/progress.h>
#include <headfold/checkpoint/synthetic.h>
#include <headfold/checkpoint/writer.h>

#include <cmath>

namespace headfold::checkpoint {
namespace {

constexpr std::int64_t kChunk = std::int64_t{1} << 23;  // elements made and written at once

/// Finaliser of splitmix64: a bijection of 64 bits that passes the usual statistical batteries.
constexpr std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

/// FNV-1a over the name, then mixed with the seed: one stream per (seed, tensor).
std::uint64_t stream_key(const std::string& name, std::uint64_t seed) {
  std::uint64_t key = 0xcbf29ce484222325ULL;
  for (const char c : name) key = (key ^ static_cast<unsigned char>(c)) * 0x100000001b3ULL;
  return mix(key ^ mix(seed + 0x9e3779b97f4a7c15ULL));
}

/// What a tensor is filled with: a constant, or noise of a standard deviation.
struct Filling {
  float constant = 0;
  double deviation = 0;
};
Filling filling(const TensorShape& tensor) {
  const std::string& name = tensor.name;
  const bool bias = name.ends_with(".bias");
  if (name.find("norm") != std::string::npos || name.find("ln_f") != std::string::npos) return {bias ? 0.0F : 1.0F, 0};
  if (bias || name.find("embed") != std::string::npos) return {0, 0.02};
  return {0, 1 / std::sqrt(static_cast<double>(tensor.shape.back()))};
}

const Json& shapes() {
  static const Json all = Json::parse(R"json({
    "llama2-7b": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096,
      "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
      "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "rope_scaling": null, "tie_word_embeddings": false, "bos_token_id": 1,
      "eos_token_id": 2, "torch_dtype": "float16"},
    "llama2-13b": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 5120,
      "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32000,
      "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "rope_scaling": null, "tie_word_embeddings": false, "bos_token_id": 1,
      "eos_token_id": 2, "torch_dtype": "float16"},
    "llama2-70b": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 8192,
      "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000,
      "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "rope_scaling": null, "tie_word_embeddings": false, "bos_token_id": 1,
      "eos_token_id": 2, "torch_dtype": "float16"},
    "bloomz-7b1": {"architectures": ["BloomForCausalLM"], "model_type": "bloom", "hidden_size": 4096, "n_layer": 30, "n_head": 32,
      "vocab_size": 250880, "layer_norm_epsilon": 1e-05, "apply_residual_connection_post_layernorm": false, "seq_length": 2048,
      "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "unk_token_id": 0, "torch_dtype": "float16"}
  })json");
  return all;
}

/// Sets every spelling of a key that the file has, or the first one.
void set_key(Json& json, std::initializer_list<const char*> names, const Json& value) {
  bool set = false;
  for (const char* name : names) {
    if (!json.contains(name)) continue;
    json[name] = value;
    set = true;
  }
  if (!set) json[*names.begin()] = value;
}

}  // namespace

std::vector<std::string> shape_names() {
  std::vector<std::string> names;
  for (const auto& [name, config] : shapes().items()) names.push_back(name);
  return names;
}

Json shape_config(const std::string& shape) {
  if (!shapes().contains(shape))
    throw UsageError(fmt::format("there is no shape '{}'", shape),
                     fmt::format("choose {}, or the path of a config.json", fmt::join(shape_names(), ", ")));
  return shapes()[shape];
}

ModelConfig change_shape(const Json& json, const ShapeChange& change, const std::string& file) {
  const ModelConfig original = parse_config(json, file);
  const bool llama = original.family == Family::llama;
  Json changed = json;
  if (!original.layer_shapes.empty() && (change.layers != 0 || change.kv_heads != 0))
    throw InputError(fmt::format("{}: states what every layer caches; layers and KV heads cannot be changed", file),
                     "start from the config.json of an unfolded model");
  if (change.layers != 0)
    llama ? set_key(changed, {"num_hidden_layers", "n_layer", "n_layers"}, change.layers)
          : set_key(changed, {"n_layer", "num_hidden_layers"}, change.layers);
  if (change.vocab != 0) changed["vocab_size"] = change.vocab;
  if (!change.dtype.empty()) set_key(changed, {"torch_dtype", "dtype"}, change.dtype);
  if (change.kv_heads != 0) {
    if (llama) {
      changed["num_key_value_heads"] = change.kv_heads;
    } else if (change.kv_heads != original.kv_heads) {
      changed = folded_config(parse_config(changed, file), change.kv_heads, KvLayout::gqa);
    }
  }
  return parse_config(changed, file);
}

at::Tensor synthetic_elements(const TensorShape& tensor, std::uint64_t seed, std::int64_t begin, std::int64_t end,
                              at::ScalarType dtype) {
  const Filling fill = filling(tensor);
  at::Tensor values = at::empty({end - begin}, at::kFloat);
  if (fill.deviation == 0) return values.fill_(fill.constant).to(dtype);
  const std::uint64_t key = stream_key(tensor.name, seed);
  // Four 16-bit uniforms per hash: mean 2 * 65535, variance 4 * (2^32 - 1) / 12. Sums are whole numbers below 2^18,
  // exact in float32, so that one rounded product is all the arithmetic there is: the same on every processor.
  const auto scale = static_cast<float>(fill.deviation / std::sqrt(4.0 * 4294967295.0 / 12.0));
  float* out = values.data_ptr<float>();
  at::parallel_for(0, end - begin, 1 << 16, [&](std::int64_t from, std::int64_t to) {
    for (std::int64_t i = from; i < to; ++i) {
      const std::uint64_t h = mix(key + static_cast<std::uint64_t>(begin + i) * 0x9e3779b97f4a7c15ULL);
      const auto sum = static_cast<std::int32_t>((h & 0xffff) + (h >> 16 & 0xffff) + (h >> 32 & 0xffff) + (h >> 48));
      out[i] = static_cast<float>(sum - 2 * 65535) * scale;
    }
  });
  return values.to(dtype);
}

std::vector<TensorSpec> synthetic_specs(const ModelConfig& config) {
  const std::string dtype = config.dtype == "float32" ? "F32" : config.dtype == "float16" ? "F16" : "BF16";
  std::vector<TensorSpec> specs;
  for (const TensorShape& tensor : model_tensors(config)) specs.push_back({tensor.name, dtype, tensor.shape});
  return specs;
}

void write_synthetic(const comm::Communicator& world, const std::filesystem::path& folder, const ModelConfig& config,
                     std::uint64_t seed, std::uint64_t max_shard_bytes, const OrderedJson& headfold,
                     const std::vector<std::filesystem::path>& copies) {
  const std::vector<TensorSpec> specs = synthetic_specs(config);
  const at::ScalarType dtype = scalar_type(specs.front().dtype);
  ParallelWriter writer(world, folder, specs, max_shard_bytes);
  double mine = 0;
  std::int64_t item = 0;
  const auto each_of_mine = [&](const auto& work) {
    item = 0;
    for (const TensorShape& tensor : model_tensors(config))
      for (std::int64_t begin = 0; begin < tensor.elements(); begin += kChunk)
        if (item++ % world.size() == world.rank()) work(tensor, begin, std::min(begin + kChunk, tensor.elements()));
  };
  each_of_mine([&](const TensorShape&, std::int64_t begin, std::int64_t end) {
    mine += static_cast<double>(end - begin) * 1e-6;
  });
  Progress progress("random weights", "million", mine, world.root());
  each_of_mine([&](const TensorShape& tensor, std::int64_t begin, std::int64_t end) {
    writer.write_part(tensor.name, begin, synthetic_elements(tensor, seed, begin, end, dtype));
    progress.advance(static_cast<double>(end - begin) * 1e-6);
  });
  writer.finish(config.raw, headfold, copies);
}

}  // namespace headfold::checkpoint
