#include <headfold/base/error.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/folding/layer_data.h>

#include <map>

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

/// Loads tensors of one layer by the last part of their name, in the shape that the configuration asks for; undefined
/// where it knows none of that name.
class LayerLoader {
 public:
  LayerLoader(const checkpoint::Reader& reader, std::int64_t layer, std::string prefix, at::ScalarType dtype)
      : reader_(reader), prefix_(std::move(prefix)), dtype_(dtype) {
    for (checkpoint::TensorShape& tensor : checkpoint::layer_tensors(reader.config(), layer))
      if (tensor.name.starts_with(prefix_)) shapes_[tensor.name.substr(prefix_.size())] = std::move(tensor.shape);
  }
  at::Tensor operator()(const std::string& tail) const {
    const auto found = shapes_.find(tail);
    return found == shapes_.end() ? at::Tensor() : reader_.load(prefix_ + tail, found->second, dtype_);
  }

 private:
  const checkpoint::Reader& reader_;
  std::string prefix_;
  at::ScalarType dtype_;
  std::map<std::string, std::vector<std::int64_t>> shapes_;
};

}  // namespace

LayerWeights load_layer_weights(const checkpoint::Reader& reader, std::int64_t layer, Part part, at::ScalarType dtype) {
  const ModelConfig& config = reader.config();
  LayerWeights w;
  w.heads = config.heads;
  w.kv_heads = config.shape_of(layer).kv_heads;
  w.head_dim = config.head_dim;
  w.hidden = config.hidden;
  const bool keys = part != Part::values;
  const bool values = part != Part::keys;
  const bool llama = config.family == Family::llama;
  const LayerLoader load(
      reader, layer,
      llama ? fmt::format("model.layers.{}.self_attn.", layer) : fmt::format("transformer.h.{}.self_attention.", layer),
      dtype);
  if (!llama && !config.split_qkv) {
    // Fused rows are [heads, (query, key, value), head_dim].
    const std::int64_t rows = w.heads * w.head_dim;
    const at::Tensor weight = load("query_key_value.weight").view({w.heads, 3, w.head_dim, w.hidden});
    const at::Tensor bias = load("query_key_value.bias").view({w.heads, 3, w.head_dim});
    const auto pick = [&](std::int64_t which, at::Tensor& matrix, at::Tensor& constants) {
      matrix = weight.select(1, which).reshape({rows, w.hidden});
      constants = bias.select(1, which).reshape({rows});
    };
    if (keys) pick(0, w.query, w.query_bias), pick(1, w.key, w.key_bias);
    if (values) pick(2, w.value, w.value_bias);
  } else {
    const auto name = [&](const char* of_llama, const char* of_bloom) {
      return std::string(llama ? of_llama : of_bloom);
    };
    const auto both = [&](const std::string& module, at::Tensor& matrix, at::Tensor& constants) {
      matrix = load(module + ".weight");
      constants = load(module + ".bias");
    };
    if (keys) {
      both(name("q_proj", "query"), w.query, w.query_bias);
      both(name("k_proj", "key"), w.key, w.key_bias);
      w.key_fold = load("key_fold.weight");
      w.query_fold = load("query_fold.weight");
      w.key_up = load("key_up.weight");
    }
    if (values) {
      both(name("v_proj", "value"), w.value, w.value_bias);
      w.value_up = load("value_up.weight");
    }
  }
  if (values) {
    w.output = load(llama ? "o_proj.weight" : "dense.weight");
    w.output_bias = load(llama ? "o_proj.bias" : "dense.bias");
  }
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
  if (statistics.has_attention()) {
    if (statistics.rotated_queries.size(0) != weights.heads || statistics.rotated_queries.size(1) != weights.head_dim ||
        weights.kv_heads % statistics.attended_heads != 0)
      throw InputError(
          fmt::format(
              "the attention statistics are of {} heads of {} with values in blocks of {}; the model has {} heads "
              "of {} and {} KV heads",
              statistics.rotated_queries.size(0), statistics.rotated_queries.size(1), statistics.attended_heads,
              weights.heads, weights.head_dim, weights.kv_heads),
          "calibrate this model");
    moments.rotated_queries = statistics.rotated_queries / statistics.attention_count;
    const at::Tensor mass = statistics.distance_mass.sum(0);
    moments.distance_law = mass / mass.sum();
    moments.attended = statistics.attended / statistics.attention_count;
    moments.attended_mean = statistics.attended_sum / statistics.attention_count;
    moments.attended_heads = statistics.attended_heads;
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

GroupWeights group_of(const LayerWeights& weights, const std::vector<std::int64_t>& kv_heads, Part part) {
  GroupWeights group;
  group.size = static_cast<std::int64_t>(kv_heads.size());
  group.head_dim = weights.head_dim;
  const at::Tensor rows = block_index(kv_heads, weights.head_dim);
  const auto pick = [](const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& index) {
    return augmented(weight.index_select(0, index), bias.defined() ? bias.index_select(0, index) : at::Tensor());
  };
  if (weights.key.defined() && part != Part::values) {
    group.key = pick(weights.key, weights.key_bias, rows);
    for (const std::int64_t kv : kv_heads)
      group.queries.push_back(pick(weights.query, weights.query_bias,
                                   block_index(query_heads_of({kv}, weights.key_repeat()), weights.head_dim)));
  }
  if (weights.value.defined() && part != Part::keys) {
    group.value = pick(weights.value, weights.value_bias, rows);
    if (weights.output.defined())
      for (const std::int64_t h : query_heads_of(kv_heads, weights.value_repeat()))
        group.outputs.push_back(weights.output.slice(1, h * weights.head_dim, (h + 1) * weights.head_dim));
  }
  return group;
}

}  // namespace headfold::folding
