#pragma once
// Model folders on disk for tests of grouping and budgets.

#include <headfold/base/files.h>
#include <headfold/calibration/collect.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/checkpoint/safetensors.h>

#include "instances.h"
#include "world.h"

namespace headfold::folding::testing_support {

inline Json small_llama(std::int64_t heads, std::int64_t kv_heads, std::int64_t d, std::int64_t layers) {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"model_type", "llama"},
          {"hidden_act", "silu"},
          {"hidden_size", heads * d},
          {"intermediate_size", 32},
          {"num_hidden_layers", layers},
          {"num_attention_heads", heads},
          {"num_key_value_heads", kv_heads},
          {"vocab_size", 48},
          {"max_position_embeddings", 64},
          {"rms_norm_eps", 1e-5},
          {"rope_theta", 10000.0},
          {"tie_word_embeddings", false},
          {"bos_token_id", 1},
          {"eos_token_id", 2},
          {"torch_dtype", "float32"}};
}

inline Json small_bloom(std::int64_t heads, std::int64_t d, std::int64_t layers) {
  return {{"architectures", {"BloomForCausalLM"}},
          {"model_type", "bloom"},
          {"vocab_size", 48},
          {"hidden_size", heads * d},
          {"n_layer", layers},
          {"n_head", heads},
          {"layer_norm_epsilon", 1e-5},
          {"apply_residual_connection_post_layernorm", false},
          {"tie_word_embeddings", true},
          {"bos_token_id", 1},
          {"eos_token_id", 2},
          {"torch_dtype", "float32"}};
}

/// Random float32 tensors for every name of the configuration.
inline std::map<std::string, at::Tensor> small_tensors(const Json& config, std::uint64_t seed) {
  Random random(seed);
  std::map<std::string, at::Tensor> tensors;
  for (const auto& tensor : checkpoint::model_tensors(checkpoint::parse_config(config, "config.json"))) {
    at::Tensor value = random.normal(tensor.shape);
    if (tensor.shape.size() == 1)
      value =
          value * 0.2 + (tensor.name.find("norm") != std::string::npos && tensor.name.ends_with(".weight") ? 1.0 : 0.0);
    else
      value = value * (1.5 / std::sqrt(static_cast<double>(tensor.shape.back())));
    tensors[tensor.name] = value.to(at::kFloat);
  }
  return tensors;
}

/// Makes the KV heads of every group of every layer alike: keys up to a complex factor per frequency, values up to an
/// invertible map of the head's channels, both up to `own` of their size.
inline void plant(std::map<std::string, at::Tensor>& tensors, const std::vector<Groups>& layers, std::int64_t d,
                  double own, std::uint64_t seed) {
  Random random(seed);
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const std::string prefix = fmt::format("model.layers.{}.self_attn.", l);
    at::Tensor& keys = tensors.at(prefix + "k_proj.weight");
    at::Tensor& values = tensors.at(prefix + "v_proj.weight");
    for (const auto& group : layers[l]) {
      const at::Tensor key = keys.slice(0, group[0] * d, (group[0] + 1) * d).to(at::kDouble);
      const at::Tensor value = values.slice(0, group[0] * d, (group[0] + 1) * d).to(at::kDouble);
      for (const std::int64_t head : group) {
        const auto rows = [&](at::Tensor& all) { return all.slice(0, head * d, (head + 1) * d); };
        const at::Tensor factors =
            (0.7 + 0.6 * random.uniform({1, d / 2})).to(at::kComplexDouble) * unit_phases(random, 1, d / 2);
        const at::Tensor noise_k = own * key.std() * random.normal(key.sizes());
        rows(keys).copy_(times_complex(key, factors) + noise_k);
        const at::Tensor mix =
            at::eye(d, at::kDouble) + 0.3 * random.normal({d, d}) / std::sqrt(static_cast<double>(d));
        rows(values).copy_(at::matmul(mix, value) + own * value.std() * random.normal(value.sizes()));
      }
    }
  }
}

/// Collective: rank 0 writes the model folder.
inline void write_model(const std::filesystem::path& folder, const Json& config,
                        const std::map<std::string, at::Tensor>& tensors) {
  headfold::testing_support::world().on_root([&] {
    make_folder(folder);
    write_json(folder / "config.json", config);
    checkpoint::write_safetensors(folder / "model.safetensors", tensors);
  });
  headfold::testing_support::world().barrier("model written");
}

/// Calibrates on 24 x 32 random tokens with attention statistics. Collective. The file is made by one rank, so that it
/// has the same bytes at any rank count.
inline void calibrate(const std::filesystem::path& model, const std::filesystem::path& file,
                      std::int64_t attended_heads = 0) {
  headfold::testing_support::world().on_root([&] {
    const comm::Communicator alone = comm::Communicator::self();
    const checkpoint::Reader reader(model);
    at::Generator generator = at::detail::createCPUGenerator(5);
    const at::Tensor ids = at::randint(48, {24, 32}, generator, at::TensorOptions().dtype(at::kLong));
    calibration::CollectOptions options;
    options.attention_statistics = true;
    options.half_samples = true;
    options.attended_heads = attended_heads;
    const comm::Grid grid = comm::make_grid(alone, 1);
    const auto layers = calibration::collect(reader, grid, ids, options);
    calibration::StatisticsHeader header = calibration::header_of(reader.config(), options, 24, 32);
    header.model_hash = reader.fingerprint();
    header.data_hash = "random";
    header.headfold_version = "test";
    header.dtype = "float32";
    header.options = "{}";
    calibration::write_statistics(file, header, alone, calibration::layers_to_write(layers, 0, grid));
  });
}

}  // namespace headfold::folding::testing_support
