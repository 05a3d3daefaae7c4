#include <headfold/base/error.h>
#include <headfold/base/profile.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/folding/bases.h>
#include <headfold/linalg/linalg.h>

#include <map>

namespace headfold::folding {

using checkpoint::Family;
using checkpoint::ModelConfig;

namespace {

/// W~ S~ W~^T of keys and of values, S~ [hidden + 1, hidden + 1] the sum of x~ x~^T over position 0: through one thin
/// factor of S~ where few sequences make one.
class SinkSums {
 public:
  explicit SinkSums(const calibration::LayerStatistics& statistics)
      : moment_(statistics.moment_0),
        sum_(statistics.sum_0),
        count_(statistics.count_0),
        size_(statistics.sum_0.numel() + 1) {
    if (!moment_.defined()) throw InternalError("moments with a sink weight need the sums of position 0");
    if (count_ <= static_cast<double>(size_) / 4)
      for_each_item(1, [&](std::int64_t) { factor_ = thin_factor(static_cast<std::int64_t>(count_)); });
    if (factor_.defined()) return;
    whole_ = at::empty({size_, size_}, at::kDouble);
    const at::Tensor square = moment_.dim() == 1 ? linalg::unpack_lower(moment_, size_ - 1) : moment_;
    whole_.slice(0, 0, size_ - 1).slice(1, 0, size_ - 1).copy_(square);
    whole_.select(0, size_ - 1).copy_(row(size_ - 1));
    whole_.select(1, size_ - 1).copy_(row(size_ - 1));
  }

  /// `to` += share * W~ S~ W~^T of a projection [rows, hidden] with or without bias, heads of `d` rows.
  void add_to(HeadMoments& to, double share, const at::Tensor& weight, const at::Tensor& bias, std::int64_t d) const {
    const std::int64_t rows = weight.size(0);
    const auto head = [&](std::int64_t k) {
      return augmented(weight.slice(0, k * d, (k + 1) * d),
                       bias.defined() ? bias.slice(0, k * d, (k + 1) * d) : at::Tensor());
    };
    const at::Tensor right = factor_.defined() ? factor_ : whole_;
    at::Tensor once = at::empty({rows, right.size(1)}, at::kDouble);
    for_each_item(rows / d,
                  [&](std::int64_t k) { once.slice(0, k * d, (k + 1) * d).copy_(at::matmul(head(k), right)); });
    if (factor_.defined()) return to.add_factor(share, once);
    at::Tensor gram = at::empty({rows, rows}, at::kDouble);
    for_each_item(rows / d,
                  [&](std::int64_t k) { gram.slice(1, k * d, (k + 1) * d).copy_(at::matmul(once, head(k).t())); });
    to.add(share, gram);
  }

 private:
  /// Row of S~.
  at::Tensor row(std::int64_t i) const {
    if (i == size_ - 1) return at::cat({sum_, at::full({1}, count_, at::kDouble)});
    const at::Tensor own = moment_.dim() == 1 ? linalg::packed_row(moment_, size_ - 1, i) : moment_.select(0, i);
    return at::cat({own, sum_.slice(0, i, i + 1)});
  }

  /// L [n, r] with L L^T = S~, the sum over at most `most` vectors: pivoted Cholesky, n r^2 operations. Undefined when
  /// such a factor leaves more than rounding of calibration's own precision.
  at::Tensor thin_factor(std::int64_t most) const {
    const at::Tensor left =
        at::cat({moment_.dim() == 1 ? linalg::packed_diagonal(moment_, size_ - 1) : moment_.diagonal(),
                 at::full({1}, count_, at::kDouble)});
    const double largest = left.max().item<double>();
    if (!(largest > 0)) return at::zeros({size_, 1}, at::kDouble);
    at::Tensor columns = at::zeros({most, size_}, at::kDouble);  // L^T
    std::int64_t rank = 0;
    for (; rank < most; ++rank) {
      const auto pivot = left.argmax().item<std::int64_t>();
      const double height = left[pivot].item<double>();
      if (!(height > 1e-15 * largest)) break;
      const at::Tensor known = columns.slice(0, 0, rank);
      const at::Tensor column =
          (row(pivot) - at::mv(known.t(), known.select(1, pivot).contiguous())) / std::sqrt(height);
      columns.select(0, rank).copy_(column);
      left.sub_(column.square()).clamp_min_(0);
      left.select(0, pivot).zero_();
    }
    if (left.max().item<double>() > 1e-6 * largest) return {};
    return columns.slice(0, 0, std::max<std::int64_t>(rank, 1)).t();
  }

  at::Tensor moment_, sum_;
  double count_;
  std::int64_t size_;
  at::Tensor factor_, whole_;  // one of them
};

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
    if (found == shapes_.end()) return {};
    const std::string name = prefix_ + tail;
    return reader_.load(
        name, found->second,
        dtype_ == at::ScalarType::Undefined ? checkpoint::scalar_type(reader_.info(name).dtype) : dtype_);
  }

 private:
  const checkpoint::Reader& reader_;
  std::string prefix_;
  at::ScalarType dtype_;
  std::map<std::string, std::vector<std::int64_t>> shapes_;
};

}  // namespace

LayerWeights load_layer_weights(const checkpoint::Reader& reader, std::int64_t layer, Part part, at::ScalarType dtype) {
  const Timed timed(Work::read_weights);
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

HeadMoments::HeadMoments(const at::Tensor& square) {
  if (square.defined()) add(1, square);
}

void HeadMoments::add(double weight, const at::Tensor& matrix) {
  matrices_.emplace_back(weight, matrix);
}

void HeadMoments::add_factor(double weight, const at::Tensor& factor) {
  factors_.emplace_back(weight, factor);
}

void HeadMoments::add(double weight, const HeadMoments& other) {
  for (const auto& [own, matrix] : other.matrices_) matrices_.emplace_back(weight * own, matrix);
  for (const auto& [own, factor] : other.factors_) factors_.emplace_back(weight * own, factor);
}

at::Tensor HeadMoments::block(const at::Tensor& index) const {
  at::Tensor sum = at::zeros({index.numel(), index.numel()}, at::kDouble);
  for (const auto& [weight, matrix] : matrices_)
    sum.add_(
        matrix.dim() == 1 ? linalg::packed_block(matrix, index) : matrix.index_select(0, index).index_select(1, index),
        weight);
  for (const auto& [weight, factor] : factors_) {
    const at::Tensor rows = factor.index_select(0, index);
    sum.add_(at::matmul(rows, rows.t()), weight);
  }
  return sum;
}

at::Tensor HeadMoments::full() const {
  if (!defined()) return {};
  const at::Tensor& first = matrices_.empty() ? factors_.front().second : matrices_.front().second;
  const std::int64_t n =
      first.dim() == 1
          ? static_cast<std::int64_t>(std::lround((std::sqrt(8 * static_cast<double>(first.numel()) + 1) - 1) / 2))
          : first.size(0);
  return block(at::arange(n, at::kLong));
}

LayerMoments moments_of(const calibration::LayerStatistics& statistics, const LayerWeights& weights, double sink_weight,
                        const MomentsWanted& wanted) {
  const Timed timed(Work::moments);
  const std::int64_t hidden = weights.hidden;
  if (statistics.sum.numel() != hidden)
    throw InputError(fmt::format("the statistics are for inputs of width {}, the model has hidden size {}",
                                 statistics.sum.numel(), hidden),
                     "calibrate this model");
  const at::Tensor mean = statistics.mean(sink_weight);
  LayerMoments moments;
  const double tokens = statistics.count + sink_weight * statistics.count_0;
  moments.tokens = statistics.count;
  // In place: every pass over a matrix of this size costs as much as reading it.
  const auto augment = [&](const at::Tensor& square, const at::Tensor& other, double weight, double divisor,
                           const at::Tensor& vector, double corner) {
    at::Tensor full = at::empty({hidden + 1, hidden + 1}, at::kDouble);
    at::Tensor block = full.slice(0, 0, hidden).slice(1, 0, hidden);
    block.copy_(square);
    if (weight != 0) block.add_(other, weight);
    if (divisor != 1) block.div_(divisor);
    full.select(0, hidden).slice(0, 0, hidden).copy_(vector);
    full.select(1, hidden).slice(0, 0, hidden).copy_(vector);
    full.select(0, hidden).select(0, hidden).fill_(corner);
    return full;
  };
  moments.mean = at::cat({mean, at::ones({1}, at::kDouble)});
  if (wanted.input || wanted.centred)
    moments.input = augment(statistics.moment,
                            statistics.moment_0.defined() && statistics.moment_0.dim() == 1
                                ? linalg::unpack_lower(statistics.moment_0, hidden)
                                : statistics.moment_0,
                            sink_weight, tokens, mean, 1.0);
  if (wanted.centred) moments.centred = moments.input - at::outer(moments.mean, moments.mean);
  const bool keys = statistics.rotated_keys.defined() && weights.key.defined();
  const bool values = statistics.values.defined() && weights.value.defined();
  if (keys) moments.rotated_keys.add(1 / tokens, statistics.rotated_keys);
  if (values) moments.values.add(1 / tokens, statistics.values);
  if ((keys || values) && sink_weight != 0 && statistics.count_0 > 0) {
    const SinkSums sinks(statistics);
    const double share = sink_weight / tokens;
    if (keys) sinks.add_to(moments.rotated_keys, share, weights.key, weights.key_bias, weights.head_dim);
    if (values) sinks.add_to(moments.values, share, weights.value, weights.value_bias, weights.head_dim);
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
    for_each_item(1, [&](std::int64_t) {
      const at::Tensor mass = statistics.distance_mass.sum(0);
      moments.distance_law = mass / mass.sum();
    });
    if (statistics.attended.defined()) {
      moments.attended = statistics.attended / statistics.attention_count;
      moments.attended_mean = statistics.attended_sum / statistics.attention_count;
    }
    moments.attended_heads = statistics.attended_heads;
  }
  return moments;
}

at::Tensor augmented(const at::Tensor& weight, const at::Tensor& bias) {
  at::Tensor rows = at::empty({weight.size(0), weight.size(1) + 1}, at::kDouble);
  rows.slice(1, 0, weight.size(1)).copy_(weight);
  if (bias.defined())
    rows.select(1, weight.size(1)).copy_(bias);
  else
    rows.select(1, weight.size(1)).zero_();
  return rows;
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

GroupWeights group_of(const LayerWeights& weights, const std::vector<std::int64_t>& kv_heads, Part part,
                      bool with_others) {
  GroupWeights group;
  group.size = static_cast<std::int64_t>(kv_heads.size());
  group.head_dim = weights.head_dim;
  const at::Tensor rows = block_index(kv_heads, weights.head_dim);
  const auto pick = [](const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& index) {
    return augmented(weight.index_select(0, index), bias.defined() ? bias.index_select(0, index) : at::Tensor());
  };
  if (weights.key.defined() && part != Part::values) {
    group.key = pick(weights.key, weights.key_bias, rows);
    for (const std::int64_t kv : with_others ? kv_heads : std::vector<std::int64_t>())
      group.queries.push_back(pick(weights.query, weights.query_bias,
                                   block_index(query_heads_of({kv}, weights.key_repeat()), weights.head_dim)));
  }
  if (weights.value.defined() && part != Part::keys) {
    group.value = pick(weights.value, weights.value_bias, rows);
    if (weights.output.defined() && with_others)
      for (const std::int64_t h : query_heads_of(kv_heads, weights.value_repeat()))
        group.outputs.push_back(
            weights.output.slice(1, h * weights.head_dim, (h + 1) * weights.head_dim).to(at::kDouble));
  }
  return group;
}

}  // namespace headfold::folding
