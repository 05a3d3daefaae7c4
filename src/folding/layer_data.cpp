#include <headfold/base/error.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/folding/layer_data.h>

namespace headfold::folding {

using checkpoint::Family;
using checkpoint::KvLayout;
using checkpoint::ModelConfig;

namespace {

/// [rows, hidden + 1]: the bias as last column.
at::Tensor augmented(const at::Tensor& weight, const at::Tensor& bias) {
  const at::Tensor column = bias.defined() ? bias.reshape({-1, 1}) : at::zeros({weight.size(0), 1}, weight.options());
  return at::cat({weight, column}, 1);
}

void load_llama(const checkpoint::Reader& reader, const std::string& prefix, bool keys, bool values,
                at::ScalarType dtype, LayerWeights& w) {
  const ModelConfig& config = reader.config();
  const std::int64_t query_rows = w.heads * w.head_dim;
  const std::int64_t key_rows = config.source_kv_heads * w.head_dim;
  const std::int64_t value_rows = w.kv_heads * w.head_dim;
  const auto bias = [&](const char* name, std::int64_t rows) {
    return config.attention_bias ? reader.load(prefix + name, {rows}, dtype) : at::Tensor();
  };
  if (keys) {
    w.query = reader.load(prefix + "q_proj.weight", {query_rows, w.hidden}, dtype);
    w.key = reader.load(prefix + "k_proj.weight", {key_rows, w.hidden}, dtype);
    w.query_bias = bias("q_proj.bias", query_rows);
    w.key_bias = bias("k_proj.bias", key_rows);
    if (config.layout == KvLayout::projected) {
      const std::int64_t size = config.source_kv_heads / w.kv_heads;
      w.key_fold = reader.load(prefix + "key_fold.weight", {w.kv_heads, w.head_dim, size * w.head_dim}, dtype);
      w.query_fold = reader.load(prefix + "query_fold.weight", {config.source_kv_heads, w.head_dim, w.head_dim}, dtype);
    }
  }
  if (values) {
    w.value = reader.load(prefix + "v_proj.weight", {value_rows, w.hidden}, dtype);
    w.output = reader.load(prefix + "o_proj.weight", {w.hidden, query_rows}, dtype);
    w.value_bias = bias("v_proj.bias", value_rows);
    w.output_bias = bias("o_proj.bias", w.hidden);
  }
}

void load_bloom(const checkpoint::Reader& reader, const std::string& prefix, bool keys, bool values,
                at::ScalarType dtype, LayerWeights& w) {
  const ModelConfig& config = reader.config();
  const std::int64_t query_rows = w.heads * w.head_dim;
  const std::int64_t kv_rows = w.kv_heads * w.head_dim;
  if (config.split_qkv) {
    const auto load = [&](const char* name, std::int64_t rows, at::Tensor& weight, at::Tensor& bias) {
      weight = reader.load(prefix + name + ".weight", {rows, w.hidden}, dtype);
      bias = reader.load(prefix + name + ".bias", {rows}, dtype);
    };
    if (keys) load("query", query_rows, w.query, w.query_bias);
    if (keys) load("key", kv_rows, w.key, w.key_bias);
    if (values) load("value", kv_rows, w.value, w.value_bias);
  } else {
    // Fused rows are [heads, (query, key, value), head_dim].
    const at::Tensor weight = reader.load(prefix + "query_key_value.weight", {3 * query_rows, w.hidden}, dtype)
                                  .view({w.heads, 3, w.head_dim, w.hidden});
    const at::Tensor bias =
        reader.load(prefix + "query_key_value.bias", {3 * query_rows}, dtype).view({w.heads, 3, w.head_dim});
    const auto part = [&](std::int64_t which, at::Tensor& rows, at::Tensor& constants) {
      rows = weight.select(1, which).reshape({query_rows, w.hidden});
      constants = bias.select(1, which).reshape({query_rows});
    };
    if (keys) part(0, w.query, w.query_bias);
    if (keys) part(1, w.key, w.key_bias);
    if (values) part(2, w.value, w.value_bias);
  }
  if (values) {
    w.output = reader.load(prefix + "dense.weight", {w.hidden, query_rows}, dtype);
    w.output_bias = reader.load(prefix + "dense.bias", {w.hidden}, dtype);
  }
}

}  // namespace

LayerWeights load_layer_weights(const checkpoint::Reader& reader, std::int64_t layer, Part part, at::ScalarType dtype) {
  const ModelConfig& config = reader.config();
  LayerWeights w;
  w.heads = config.heads;
  w.kv_heads = config.kv_heads;
  w.head_dim = config.head_dim;
  w.hidden = config.hidden;
  const bool keys = part != Part::values;
  const bool values = part != Part::keys;
  if (config.family == Family::llama)
    load_llama(reader, fmt::format("model.layers.{}.self_attn.", layer), keys, values, dtype, w);
  else
    load_bloom(reader, fmt::format("transformer.h.{}.self_attention.", layer), keys, values, dtype, w);
  return w;
}

LayerMoments moments_of(const calibration::LayerStatistics& statistics, const LayerWeights& weights,
                        double sink_weight) {
  const at::Tensor second = statistics.second_moment(sink_weight);
  const at::Tensor mean = statistics.mean(sink_weight);
  const std::int64_t hidden = weights.hidden;
  if (second.dim() != 2 || second.size(0) != hidden || mean.numel() != hidden)
    throw InputError(
        fmt::format("the statistics are for inputs of width {}, the model has hidden size {}", second.size(0), hidden),
        "calibrate this model");
  LayerMoments moments;
  const auto augment = [&](const at::Tensor& square, const at::Tensor& vector, double corner) {
    at::Tensor full = at::empty({hidden + 1, hidden + 1}, at::kDouble);
    full.slice(0, 0, hidden).slice(1, 0, hidden).copy_(square);
    full.select(0, hidden).slice(0, 0, hidden).copy_(vector);
    full.select(1, hidden).slice(0, 0, hidden).copy_(vector);
    full.select(0, hidden).select(0, hidden).fill_(corner);
    return full;
  };
  moments.input = augment(second, mean, 1.0);
  moments.mean = at::cat({mean, at::ones({1}, at::kDouble)});
  moments.centred = moments.input - at::outer(moments.mean, moments.mean);
  if (statistics.rotated_keys.defined() && weights.key.defined()) {
    at::Tensor gram = statistics.rotated_keys;
    if (sink_weight != 0 && statistics.count_0 > 0) {
      const at::Tensor key = augmented(weights.key, weights.key_bias);
      const at::Tensor sinks = augment(statistics.moment_0, statistics.sum_0, statistics.count_0);
      gram = gram + sink_weight * at::matmul(at::matmul(key, sinks), key.t());
    }
    moments.rotated_keys = gram / (statistics.count + sink_weight * statistics.count_0);
  }
  return moments;
}

at::Tensor block_index(const std::vector<std::int64_t>& heads, std::int64_t head_dim) {
  std::vector<std::int64_t> rows;
  rows.reserve(heads.size() * static_cast<std::size_t>(head_dim));
  for (const std::int64_t head : heads)
    for (std::int64_t i = 0; i < head_dim; ++i) rows.push_back(head * head_dim + i);
  return at::tensor(rows, at::kLong);
}

std::vector<std::int64_t> query_heads_of(const std::vector<std::int64_t>& kv_heads, std::int64_t repeat) {
  std::vector<std::int64_t> heads;
  for (const std::int64_t kv : kv_heads)
    for (std::int64_t i = 0; i < repeat; ++i) heads.push_back(kv * repeat + i);
  return heads;
}

GroupWeights group_of(const LayerWeights& weights, const std::vector<std::int64_t>& kv_heads) {
  GroupWeights group;
  group.size = static_cast<std::int64_t>(kv_heads.size());
  group.head_dim = weights.head_dim;
  const at::Tensor rows = block_index(kv_heads, weights.head_dim);
  const auto pick = [](const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& index) {
    return augmented(weight.index_select(0, index), bias.defined() ? bias.index_select(0, index) : at::Tensor());
  };
  if (weights.key.defined()) {
    group.key = pick(weights.key, weights.key_bias, rows);
    for (const std::int64_t kv : kv_heads)
      group.queries.push_back(pick(weights.query, weights.query_bias,
                                   block_index(query_heads_of({kv}, weights.key_repeat()), weights.head_dim)));
  }
  if (weights.value.defined()) group.value = pick(weights.value, weights.value_bias, rows);
  return group;
}

}  // namespace headfold::folding
