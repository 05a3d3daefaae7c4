#pragma once
// Small random models in memory and on disk, and an obviously correct decoder in float64.

#include <gtest/gtest.h>
#include <headfold/base/json.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/checkpoint/safetensors.h>
#include <headfold/model/model.h>

#include <map>

namespace headfold::model::testing_models {

struct SmallModel {
  ModelConfig config;
  std::map<std::string, at::Tensor> tensors;  // float32

  TensorGetter getter() const {
    return [this](const std::string& name, const std::vector<std::int64_t>&) { return tensors.at(name); };
  }
  void write(const std::filesystem::path& folder) const {
    write_json(folder / "config.json", config.raw);
    checkpoint::write_safetensors(folder / "model.safetensors", tensors);
  }
};

/// Random weights of a size that keeps activations near one; norms near one, biases small.
inline SmallModel make_model(const Json& json, std::uint64_t seed = 1) {
  at::manual_seed(seed);
  SmallModel model;
  model.config = checkpoint::parse_config(json, "memory/config.json");
  for (const auto& tensor : checkpoint::model_tensors(model.config)) {
    const bool vector = tensor.shape.size() == 1;
    const bool norm_weight = vector && tensor.name.ends_with(".weight");
    const double spread = vector ? 0.1 : 1.5 / std::sqrt(static_cast<double>(tensor.shape.back()));
    at::Tensor value = at::randn(tensor.shape, at::kFloat) * spread;
    if (norm_weight) value = value + 1.0;
    model.tensors[tensor.name] = value;
  }
  return model;
}

inline Json llama_json(std::int64_t hidden, std::int64_t heads, std::int64_t kv_heads, std::int64_t layers = 2,
                       std::int64_t vocab = 97) {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"model_type", "llama"},
          {"hidden_act", "silu"},
          {"hidden_size", hidden},
          {"intermediate_size", hidden * 2 + 24},
          {"num_hidden_layers", layers},
          {"num_attention_heads", heads},
          {"num_key_value_heads", kv_heads},
          {"vocab_size", vocab},
          {"max_position_embeddings", 4096},
          {"rms_norm_eps", 1e-6},
          {"rope_theta", 10000.0},
          {"tie_word_embeddings", false},
          {"torch_dtype", "float32"}};
}

inline Json bloom_json(std::int64_t hidden, std::int64_t heads, std::int64_t layers = 2, std::int64_t vocab = 97) {
  return {{"architectures", {"BloomForCausalLM"}},
          {"model_type", "bloom"},
          {"hidden_size", hidden},
          {"n_layer", layers},
          {"n_head", heads},
          {"vocab_size", vocab},
          {"layer_norm_epsilon", 1e-5},
          {"torch_dtype", "float32"}};
}

/// The model's config with its KV heads folded; weights are then drawn for the new shapes.
inline Json folded(const Json& json, std::int64_t kv_heads, checkpoint::KvLayout layout) {
  return checkpoint::folded_config(checkpoint::parse_config(json, "memory/config.json"), kv_heads, layout);
}

/// The same with what every layer caches.
inline Json folded(const Json& json, const std::vector<checkpoint::LayerShape>& shapes, checkpoint::KvLayout layout) {
  return checkpoint::folded_config(checkpoint::parse_config(json, "memory/config.json"), shapes, layout);
}

/// Every configuration the decoder knows, small.
inline std::vector<std::pair<std::string, Json>> all_forms() {
  using checkpoint::KvLayout;
  std::vector<std::pair<std::string, Json>> forms;
  forms.emplace_back("llama_mha", llama_json(64, 4, 4));
  forms.emplace_back("llama_gqa", llama_json(96, 6, 2));
  Json biased = llama_json(64, 8, 4);
  biased["attention_bias"] = true;
  biased["mlp_bias"] = true;
  biased["tie_word_embeddings"] = true;
  forms.emplace_back("llama_biased_tied", biased);
  Json wide = llama_json(64, 3, 1);
  wide["head_dim"] = 32;  // 3 * 32 != 64
  wide["rope_scaling"] = {{"type", "linear"}, {"factor", 4.0}};
  forms.emplace_back("llama_wide_heads_linear_rope", wide);
  forms.emplace_back("llama_projected", folded(llama_json(64, 4, 4), 2, KvLayout::projected));
  Json grouped_source = llama_json(96, 12, 6);
  grouped_source["attention_bias"] = true;
  forms.emplace_back("llama_projected_from_gqa", folded(grouped_source, 2, KvLayout::projected));
  forms.emplace_back("bloom_six_heads", bloom_json(96, 6));
  Json post = bloom_json(64, 4);
  post["apply_residual_connection_post_layernorm"] = true;
  forms.emplace_back("bloom_post_layernorm", post);
  forms.emplace_back("bloom_grouped", folded(bloom_json(96, 6), 2, KvLayout::gqa));
  // Layers that cache different things; head_dim is 16 in all.
  Json decilm = llama_json(96, 6, 6);
  decilm["intermediate_size"] = 256;
  forms.emplace_back("llama_uneven_decilm", folded(decilm, {{2, 16, 16}, {3, 16, 16}}, KvLayout::gqa));
  forms.emplace_back("llama_uneven_own", folded(llama_json(64, 4, 4), {{1, 16, 16}, {4, 16, 16}}, KvLayout::gqa));
  forms.emplace_back("bloom_uneven", folded(bloom_json(96, 6), {{6, 16, 16}, {2, 16, 16}}, KvLayout::gqa));
  // Widths that divide nothing; the second layer has one latent for all heads, wider than a head.
  forms.emplace_back("llama_latent", folded(llama_json(64, 4, 4), {{2, 21, 13}, {1, 43, 37}}, KvLayout::latent));
  Json biased_source = llama_json(96, 12, 6);
  biased_source["attention_bias"] = true;
  biased_source["head_dim"] = 16;
  forms.emplace_back("llama_latent_from_gqa_biased",
                     folded(biased_source, {{3, 1, 40}, {6, 16, 16}}, KvLayout::latent));
  forms.emplace_back("bloom_latent_absorbed", folded(bloom_json(96, 6), {{3, 11, 5}, {2, 16, 16}}, KvLayout::latent));
  forms.emplace_back("bloom_latent_wide", folded(bloom_json(96, 6), {{1, 50, 70}, {2, 23, 1}}, KvLayout::latent));
  forms.emplace_back("bloom_latent_from_grouped",
                     folded(folded(bloom_json(96, 6), 3, KvLayout::gqa), {{3, 8, 20}, {1, 31, 9}}, KvLayout::latent));
  return forms;
}

/// The decoder written down once more, head by head, in float64.
class ReferenceDecoder {
 public:
  explicit ReferenceDecoder(const SmallModel& model) : config_(model.config) {
    for (const auto& [name, tensor] : model.tensors) weights_[name] = tensor.to(at::kDouble);
  }

  /// hidden [tokens, hidden] of one sequence -> same shape. `rotated` receives the rotated keys [tokens, source heads,
  /// head_dim].
  at::Tensor layer(const at::Tensor& hidden, std::int64_t index, at::Tensor* rotated = nullptr) const {
    const bool llama = config_.family == checkpoint::Family::llama;
    const std::string p = llama ? fmt::format("model.layers.{}.", index) : fmt::format("transformer.h.{}.", index);
    const at::Tensor x = norm(hidden, p + "input_layernorm");
    const at::Tensor attended = attention(x, p + (llama ? "self_attn." : "self_attention."), index, rotated);
    at::Tensor y = (config_.post_layernorm_residual ? x : hidden) +
                   linear(attended, p + (llama ? "self_attn.o_proj" : "self_attention.dense"));
    const at::Tensor z = norm(y, p + "post_attention_layernorm");
    if (config_.post_layernorm_residual) y = z;
    if (llama) {
      const at::Tensor gate = linear(z, p + "mlp.gate_proj");
      return y + linear(gate / (1 + at::exp(-gate)) * linear(z, p + "mlp.up_proj"), p + "mlp.down_proj");
    }
    const at::Tensor inner = linear(z, p + "mlp.dense_h_to_4h");
    return y + linear(0.5 * inner * (1 + at::tanh(0.79788456 * inner * (1 + 0.044715 * inner * inner))),
                      p + "mlp.dense_4h_to_h");
  }

  /// ids [tokens] -> logits [tokens, vocab].
  at::Tensor logits(const at::Tensor& ids) const {
    const bool llama = config_.family == checkpoint::Family::llama;
    const at::Tensor table = weights_.at(llama ? "model.embed_tokens.weight" : "transformer.word_embeddings.weight");
    at::Tensor hidden = table.index_select(0, ids);
    if (!llama) hidden = norm(hidden, "transformer.word_embeddings_layernorm");
    for (std::int64_t i = 0; i < config_.layers; ++i) hidden = layer(hidden, i);
    hidden = norm(hidden, llama ? "model.norm" : "transformer.ln_f");
    return at::matmul(hidden, (config_.tied_embeddings ? table : weights_.at("lm_head.weight")).t());
  }

 private:
  at::Tensor linear(const at::Tensor& x, const std::string& name) const {
    at::Tensor y = at::matmul(x, weights_.at(name + ".weight").t());
    const auto bias = weights_.find(name + ".bias");
    return bias == weights_.end() ? y : y + bias->second;
  }
  at::Tensor norm(const at::Tensor& x, const std::string& name) const {
    const at::Tensor weight = weights_.at(name + ".weight");
    if (config_.family == checkpoint::Family::llama)
      return x / at::sqrt((x * x).mean(-1, true) + config_.norm_eps) * weight;
    const at::Tensor centred = x - x.mean(-1, true);
    return centred / at::sqrt((centred * centred).mean(-1, true) + config_.norm_eps) * weight +
           weights_.at(name + ".bias");
  }
  /// x [tokens, head_dim] rotated at positions 0, 1, …
  at::Tensor rotate(const at::Tensor& x) const {
    const std::int64_t half = config_.head_dim / 2;
    at::Tensor y = x.clone();
    for (std::int64_t n = 0; n < x.size(0); ++n)
      for (std::int64_t i = 0; i < half; ++i) {
        double frequency =
            std::pow(config_.rope_theta, -2.0 * static_cast<double>(i) / static_cast<double>(config_.head_dim));
        if (config_.rope_scaling.type == "linear") frequency /= config_.rope_scaling.factor;
        const double angle = static_cast<double>(n) * frequency;
        const double a = x[n][i].item<double>();
        const double b = x[n][i + half].item<double>();
        y[n][i] = a * std::cos(angle) - b * std::sin(angle);
        y[n][i + half] = a * std::sin(angle) + b * std::cos(angle);
      }
    return y;
  }
  static double slope(std::int64_t head, std::int64_t heads) {
    std::int64_t power = 1;
    while (power * 2 <= heads) power *= 2;
    if (head < power) return std::pow(2.0, -8.0 / static_cast<double>(power) * static_cast<double>(head + 1));
    return std::pow(2.0, -4.0 / static_cast<double>(power) * static_cast<double>(2 * (head - power) + 1));
  }
  at::Tensor attention(const at::Tensor& x, const std::string& p, std::int64_t index, at::Tensor* rotated) const {
    const std::int64_t d = config_.head_dim;
    const std::int64_t tokens = x.size(0);
    const bool llama = config_.family == checkpoint::Family::llama;
    const auto part = [&](const at::Tensor& all, std::int64_t head, std::int64_t width) {
      return all.slice(1, head * width, (head + 1) * width);
    };
    const auto columns = [&](const at::Tensor& all, std::int64_t head) { return part(all, head, d); };
    at::Tensor q, k, v;
    if (llama) {
      q = linear(x, p + "q_proj"), k = linear(x, p + "k_proj"), v = linear(x, p + "v_proj");
    } else if (config_.split_qkv) {
      q = linear(x, p + "query"), k = linear(x, p + "key"), v = linear(x, p + "value");
    } else {
      const at::Tensor all = linear(x, p + "query_key_value");  // columns: head, then q, k, v
      std::vector<at::Tensor> parts[3];
      for (std::int64_t h = 0; h < config_.heads; ++h)
        for (std::int64_t j = 0; j < 3; ++j) parts[j].push_back(columns(all, 3 * h + j));
      q = at::cat(parts[0], 1), k = at::cat(parts[1], 1), v = at::cat(parts[2], 1);
    }
    const checkpoint::LayerShape shape = config_.shape_of(index);
    const bool projected = config_.layout == checkpoint::KvLayout::projected;
    const bool latent = config_.layout == checkpoint::KvLayout::latent;
    // Latents between whose channels nobody rotates are compared with queries as wide as they are.
    const bool absorbed = weights_.count(p + "key_up.weight") == 0;
    const std::int64_t source_heads = projected || latent ? config_.source_kv_heads : shape.kv_heads;
    const std::int64_t members = source_heads / shape.kv_heads;
    std::vector<at::Tensor> keys, latents, outputs;
    for (std::int64_t h = 0; latent && h < shape.kv_heads; ++h) latents.push_back(part(k, h, shape.key_width));
    for (std::int64_t h = 0; h < source_heads; ++h) {
      at::Tensor key = latent ? latents[static_cast<std::size_t>(h / members)] : columns(k, h);
      if (latent && !absorbed) key = at::matmul(key, weights_.at(p + "key_up.weight")[h].t());
      keys.push_back(llama ? rotate(key) : key);
    }
    if (rotated != nullptr) *rotated = at::stack(latent && !llama ? latents : keys, 1);
    for (std::int64_t h = 0; h < config_.heads; ++h) {
      const std::int64_t kv = h / (config_.heads / shape.kv_heads);
      const std::int64_t source = h / (config_.heads / source_heads);
      at::Tensor query = llama ? rotate(columns(q, h)) : part(q, h, latent && absorbed ? shape.key_width : d);
      at::Tensor key = keys[static_cast<std::size_t>(source)];
      if (projected) {
        query = at::matmul(query, weights_.at(p + "query_fold.weight")[source].t());
        std::vector<at::Tensor> stacked(keys.begin() + kv * members, keys.begin() + (kv + 1) * members);
        key = at::matmul(at::cat(stacked, 1), weights_.at(p + "key_fold.weight")[kv].t());
      }
      at::Tensor scores = at::matmul(query, key.t()) / std::sqrt(static_cast<double>(d));
      if (!llama) scores = scores + slope(h, config_.heads) * at::arange(tokens, at::kDouble);
      scores = scores.masked_fill(at::ones({tokens, tokens}, at::kBool).triu(1), -1e300);
      at::Tensor output = at::matmul(at::softmax(scores, -1), part(v, kv, shape.value_width));
      if (weights_.count(p + "value_up.weight") != 0)
        output = at::matmul(output, weights_.at(p + "value_up.weight")[source].t());
      outputs.push_back(output);
    }
    return at::cat(outputs, 1);
  }

  ModelConfig config_;
  std::map<std::string, at::Tensor> weights_;
};

/// max |a - b| / max |b|, in float64.
inline double relative_difference(const at::Tensor& a, const at::Tensor& b) {
  return ((a.to(at::kDouble) - b.to(at::kDouble)).abs().max() / b.to(at::kDouble).abs().max()).item<double>();
}

}  // namespace headfold::model::testing_models
