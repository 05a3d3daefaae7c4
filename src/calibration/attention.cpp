#include <ATen/Parallel.h>
#include <headfold/base/error.h>
#include <headfold/calibration/attention.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/model/kernels.h>
#include <headfold/model/model.h>
#include <headfold/model/product.h>
#include <headfold/model/tensor_math.h>

#include <bit>

namespace headfold::calibration {
namespace {

namespace kernels = model::kernels;

/// Rows of scores that are formed together: enough for the pace of the products, few enough that the causal half is
/// most of what is computed. No sum runs over rows, so that results do not depend on it.
std::int64_t rows_of(std::int64_t tokens) {
  return std::clamp<std::int64_t>((tokens + 3) / 4, 32, 256);
}

void* at_byte(const at::Tensor& tensor, std::int64_t elements) {
  return static_cast<char*>(tensor.data_ptr()) + elements * static_cast<std::int64_t>(tensor.element_size());
}

/// Memory of this thread that grows as needed and stays.
float* scratch(std::vector<float>& buffer, std::int64_t size) {
  if (static_cast<std::int64_t>(buffer.size()) < size) buffer.resize(static_cast<std::size_t>(size));
  return buffer.data();
}

/// mass[distance] += probability of every pair of a row: query at `position`, keys 0 .. position.
void add_distances(const float* probabilities, std::int64_t position, double* mass) {
  for (std::int64_t distance = 0; distance <= position; ++distance)
    mass[distance] += static_cast<double>(probabilities[position - distance]);
}

double wide(float value) {
  return static_cast<double>(value);
}
double wide(c10::BFloat16 value) {
  return static_cast<double>(std::bit_cast<float>(static_cast<std::uint32_t>(value.x) << 16U));
}

/// sum[j] += sum over rows of x [rows, n], in float64 and in row order.
template <class T>
void add_column_sums(double* sum, const T* x, std::int64_t rows, std::int64_t n) {
  at::parallel_for(0, n, 512, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = 0; i < rows; ++i) {
      const T* row = x + i * n;
#pragma omp simd
      for (std::int64_t j = begin; j < end; ++j) sum[j] += wide(row[j]);
    }
  });
}

at::Tensor joined(std::vector<linalg::GramAccumulator>& grams) {
  std::vector<at::Tensor> parts;
  parts.reserve(grams.size());
  for (linalg::GramAccumulator& gram : grams) parts.push_back(gram.packed());
  at::Tensor all = at::cat(parts);
  grams.clear();
  return all;
}

}  // namespace

void add_sums(const SumTensors& into, const SumTensors& sums) {
  for (const auto& [name, tensor] : into) {
    const auto found = sums.find(name);
    if (found == sums.end() || found->second.sizes() != tensor.sizes())
      throw InputError(fmt::format("{} is missing or of another shape", name));
  }
  if (sums.size() != into.size()) throw InputError(fmt::format("{} sums, expected {}", sums.size(), into.size()));
  for (const auto& [name, tensor] : into) at::Tensor(tensor).add_(sums.at(name).to(tensor.device()));
}

void add_column_sums(at::Tensor& sum, const at::Tensor& rows) {
  const at::Tensor x = rows.contiguous();
  if (!x.is_cpu())
    sum.add_(x.sum({0}, false, at::kDouble));
  else if (x.scalar_type() == at::kFloat)
    add_column_sums(sum.data_ptr<double>(), x.data_ptr<float>(), x.size(0), x.size(1));
  else if (x.scalar_type() == at::kBFloat16)
    add_column_sums(sum.data_ptr<double>(), x.data_ptr<at::BFloat16>(), x.size(0), x.size(1));
  else
    sum.add_(x.to(at::kDouble).sum(0));
}

AttentionAccumulator::AttentionAccumulator(const StatisticsShape& shape, const at::Tensor& slopes)
    : shape_(shape), slopes_(slopes) {
  if (shape.heads < 1 || shape.kv_heads < 1 || shape.heads % shape.kv_heads != 0 || shape.attended_heads < 1 ||
      shape.kv_heads % shape.attended_heads != 0 || shape.head_dim < 1 || shape.sequence_length < 1 ||
      (slopes.defined() && (slopes.numel() != shape.heads || slopes.scalar_type() != at::kFloat)))
    throw InternalError(
        fmt::format("attention statistics of {} heads, {} KV heads of {}, {} in a block, up to {} tokens", shape.heads,
                    shape.kv_heads, shape.head_dim, shape.attended_heads, shape.sequence_length));
  for (std::int64_t head = 0; head < shape.heads; ++head) {
    queries_.emplace_back(shape.head_dim);
    attended_.emplace_back(shape.block());
  }
  distance_mass_ = at::zeros({shape.heads, shape.sequence_length}, at::kDouble);
  attended_sum_ = at::zeros({shape.heads, shape.block()}, at::kDouble);
  count_ = at::zeros({1}, at::kDouble);
}

AttentionAccumulator::~AttentionAccumulator() = default;

void AttentionAccumulator::add(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values) {
  const std::int64_t tokens = queries.size(0);
  const std::int64_t heads = shape_.heads;
  const std::int64_t kv_heads = shape_.kv_heads;
  const std::int64_t d = shape_.head_dim;
  const std::int64_t block = shape_.block();
  const std::int64_t blocks = kv_heads / shape_.attended_heads;
  const at::ScalarType dtype = queries.scalar_type();
  if (queries.sizes() != at::IntArrayRef({tokens, heads, d}) ||
      keys.sizes() != at::IntArrayRef({tokens, kv_heads, d}) || values.sizes() != keys.sizes() ||
      keys.scalar_type() != dtype || values.scalar_type() != dtype || tokens > shape_.sequence_length ||
      attended_.empty())
    throw InternalError(
        fmt::format("attention of queries [{}], keys [{}] and values [{}], expected {} heads and {} KV heads of {}, up "
                    "to {} tokens",
                    fmt::join(queries.sizes(), ", "), fmt::join(keys.sizes(), ", "), fmt::join(values.sizes(), ", "),
                    heads, kv_heads, d, shape_.sequence_length));
  if (tokens == 0) return;
  count_.add_(static_cast<double>(tokens));
  if (model::compute().engine == model::Engine::tensors) {
    add_tensors(queries, keys, values);
    return;
  }
  const auto& kernel = kernels::table(dtype);
  const auto size = static_cast<std::int64_t>(queries.element_size());
  // Every head's (block's) tokens one after the other: what products read fastest.
  const at::Tensor q = queries.transpose(0, 1).contiguous();
  const at::Tensor k = keys.transpose(0, 1).contiguous();
  const at::Tensor v = values.reshape({tokens, blocks, block}).transpose(0, 1).contiguous();
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(d)));
  const float* slopes = slopes_.defined() ? slopes_.data_ptr<float>() : nullptr;
  const std::int64_t by_limit =
      model::attention_block_bytes() / (tokens * (4 + (size == 4 ? 0 : size + 4)) * at::get_num_threads());
  const std::int64_t rows = std::clamp<std::int64_t>(std::min(rows_of(tokens), by_limit), 1, tokens);

  at::parallel_for(0, heads, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t head = begin; head < end; ++head) queries_[static_cast<std::size_t>(head)].add(q.select(0, head));
  });
  at::parallel_for(0, heads, 1, [&](std::int64_t begin, std::int64_t end) {
    thread_local std::vector<float> score_buffer, row_buffer;
    thread_local std::vector<char> probability_buffer;
    float* scores = scratch(score_buffer, rows * tokens);
    void* probabilities = scores;
    if (size != 4) {
      if (static_cast<std::int64_t>(probability_buffer.size()) < rows * tokens * size)
        probability_buffer.resize(static_cast<std::size_t>(rows * tokens * size));
      probabilities = probability_buffer.data();
    }
    const at::Tensor y = at::empty({tokens, block}, q.options());
    for (std::int64_t head = begin; head < end; ++head) {
      const std::int64_t kv = head / (heads / kv_heads);
      double* mass = distance_mass_.data_ptr<double>() + head * shape_.sequence_length;
      for (std::int64_t first = 0; first < tokens; first += rows) {
        const std::int64_t count = std::min(rows, tokens - first);
        const std::int64_t visible = first + count;
        model::multiply({at_byte(q, (head * tokens + first) * d), count, d, d},
                        {at_byte(k, kv * tokens * d), visible, d, d}, true, dtype, scores, visible, at::kFloat);
        for (std::int64_t row = 0; row < count; ++row) {
          float* own = scores + row * visible;
          void* rounded = static_cast<char*>(probabilities) + row * visible * size;
          kernel.softmax(own, rounded, {first + row + 1, visible, scale, slopes != nullptr ? slopes[head] : 0.0F});
          if (size != 4) {
            own = scratch(row_buffer, tokens);
            kernel.load(rounded, own, first + row + 1);
          }
          add_distances(own, first + row, mass);
        }
        model::multiply({probabilities, count, visible, visible},
                        {at_byte(v, kv / shape_.attended_heads * tokens * block), visible, block, block}, false, dtype,
                        at_byte(y, first * block), block, dtype);
      }
      attended_[static_cast<std::size_t>(head)].add(y);
      at::Tensor sum = attended_sum_.select(0, head);
      add_column_sums(sum, y);
    }
  });
}

void AttentionAccumulator::open_device() {
  if (device_.queries.defined()) return;
  const auto zeros = [&](at::IntArrayRef sizes) {
    return at::zeros(sizes, at::TensorOptions().dtype(at::kDouble).device(model::compute().device));
  };
  const std::int64_t heads = shape_.heads, block = shape_.block();
  device_ = {zeros({heads, shape_.head_dim, shape_.head_dim}), zeros({heads, block, block}),
             zeros({heads, shape_.sequence_length}), zeros({heads, block})};
}

void AttentionAccumulator::add_tensors(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values) {
  const std::int64_t tokens = queries.size(0), heads = shape_.heads, kv_heads = shape_.kv_heads, block = shape_.block();
  const std::int64_t blocks = kv_heads / shape_.attended_heads;
  const at::ScalarType dtype = queries.scalar_type();
  const at::Device device = queries.device();
  open_device();
  const auto gram = [](const at::Tensor& x) { return model::wide_matmul(x.transpose(1, 2), x); };
  const at::Tensor q = queries.transpose(0, 1).contiguous();
  const at::Tensor k = keys.transpose(0, 1).contiguous();
  const at::Tensor v = values.reshape({tokens, blocks, block}).transpose(0, 1).contiguous();
  device_.queries.add_(gram(q));
  const at::Tensor positions = at::arange(tokens, at::TensorOptions().dtype(at::kLong).device(device));
  const at::Tensor slopes = slopes_.defined() ? slopes_.to(device) : slopes_;
  // Per element: scores, probabilities, their copy by distance, and an index of 8 bytes.
  const std::int64_t rows = std::clamp<std::int64_t>(model::attention_block_bytes() / (heads * tokens * 24), 1,
                                                     std::max<std::int64_t>(1, tokens));
  std::vector<at::Tensor> outputs;
  for (std::int64_t first = 0; first < tokens; first += rows) {
    const std::int64_t count = std::min(rows, tokens - first), visible = first + count;
    const at::Tensor scores =
        model::wide_matmul(q.slice(1, first, visible).reshape({kv_heads, heads / kv_heads * count, q.size(2)}),
                           k.slice(1, 0, visible).transpose(1, 2))
            .reshape({heads, count, visible});
    const at::Tensor probabilities = model::causal_probabilities(
        scores, 1.0 / std::sqrt(static_cast<double>(shape_.head_dim)), slopes, first, dtype);
    outputs.push_back(
        model::narrow_matmul(probabilities.reshape({blocks, heads / blocks * count, visible}), v.slice(1, 0, visible))
            .reshape({heads, count, block}));
    // Entry [head, row, distance] is the probability of the key so far back; nothing is farther back than the first.
    const at::Tensor back = positions.slice(0, first, visible).view({count, 1}) - positions.slice(0, 0, visible);
    const at::Tensor by_distance =
        probabilities.gather(2, back.clamp_min(0).unsqueeze(0).expand({heads, count, visible}))
            .masked_fill_(back.lt(0), 0.0);
    device_.distance_mass.slice(1, 0, visible).add_(by_distance.sum({1}, false, at::kDouble));
  }
  const at::Tensor y = at::cat(outputs, 1);
  device_.attended.add_(gram(y));
  device_.attended_sum.add_(y.sum({1}, false, at::kDouble));
}

void AttentionAccumulator::collect_device() {
  if (!device_.queries.defined()) return;
  const DeviceSums found = std::exchange(device_, {});
  const at::Tensor queries = found.queries.cpu(), attended = found.attended.cpu();
  for (std::int64_t head = 0; head < shape_.heads; ++head) {
    queries_[static_cast<std::size_t>(head)].packed().add_(linalg::pack_lower(queries.select(0, head)));
    attended_[static_cast<std::size_t>(head)].packed().add_(linalg::pack_lower(attended.select(0, head)));
  }
  distance_mass_.add_(found.distance_mass.cpu());
  attended_sum_.add_(found.attended_sum.cpu());
}

std::vector<at::Tensor> AttentionAccumulator::on_device() {
  open_device();
  // What an interrupted run left is on the host: it goes there, so that everything is summed once.
  if (distance_mass_.any().item<bool>()) {
    const auto there = [&](const at::Tensor& sums) { return sums.to(device_.queries.device()); };
    for (std::int64_t head = 0; head < shape_.heads; ++head) {
      const auto move = [&](linalg::GramAccumulator& from, const at::Tensor& to) {
        to.select(0, head).add_(there(from.full()));
        from.packed().zero_();
      };
      move(queries_[static_cast<std::size_t>(head)], device_.queries);
      move(attended_[static_cast<std::size_t>(head)], device_.attended);
    }
    device_.distance_mass.add_(there(distance_mass_));
    device_.attended_sum.add_(there(attended_sum_));
    distance_mass_.zero_();
    attended_sum_.zero_();
  }
  return {device_.queries, device_.attended, device_.distance_mass, device_.attended_sum};
}

SumTensors AttentionAccumulator::sums() {
  collect_device();
  SumTensors all = {{"count", count_}, {"distance_mass", distance_mass_}, {"attended_sum", attended_sum_}};
  for (std::size_t head = 0; head < queries_.size(); ++head) {
    all[fmt::format("queries.{}", head)] = queries_[head].packed();
    all[fmt::format("attended.{}", head)] = attended_[head].packed();
  }
  return all;
}

void AttentionAccumulator::add(const SumTensors& sums) {
  add_sums(this->sums(), sums);
}

void AttentionAccumulator::take(PackedStatistics& into) {
  collect_device();
  into.attention_count = count_.item<double>();
  into.rotated_queries = joined(queries_);
  into.attended = joined(attended_);
  into.distance_mass = distance_mass_.view({-1});
  into.attended_sum = attended_sum_.view({-1});
  into.heads = shape_.heads;
  into.attended_heads = shape_.attended_heads;
}

std::int64_t default_attended_heads(const checkpoint::ModelConfig& config) {
  const std::int64_t width = config.source_kv_heads * config.head_dim;
  if (config.heads * width * width * 8 <= (std::int64_t{64} << 20)) return config.source_kv_heads;
  std::int64_t heads = 4;
  while (config.source_kv_heads % heads != 0) --heads;
  return heads;
}

double attention_statistics_share(const checkpoint::ModelConfig& config, const StatisticsShape& shape) {
  double parameters = 0;
  for (const checkpoint::TensorShape& tensor : checkpoint::layer_tensors(config, 0)) {
    if (tensor.shape.size() < 2) continue;
    double count = 1;
    for (const std::int64_t size : tensor.shape) count *= static_cast<double>(size);
    parameters += count;
  }
  const std::int64_t tokens = shape.sequence_length, rows = std::min(rows_of(tokens), tokens);
  const auto t = static_cast<double>(tokens);
  const auto heads = static_cast<double>(shape.heads);
  const auto d = static_cast<double>(shape.head_dim);
  // Pairs of tokens whose scores are formed: whole blocks of rows, up to the last token that any of them sees.
  double pairs = 0;
  for (std::int64_t first = 0; first < tokens; first += rows) {
    const std::int64_t count = std::min(rows, tokens - first);
    pairs += static_cast<double>(count) * static_cast<double>(first + count);
  }
  const double statistics = heads * (2 * pairs / t * (d + static_cast<double>(shape.block())) +
                                     linalg::gram_operations(shape.head_dim) + linalg::gram_operations(shape.block()));
  const double forward = 2 * parameters + 2 * t * static_cast<double>(config.heads) * d;
  const double grams = linalg::gram_operations(shape.hidden) + linalg::gram_operations(shape.key_width) +
                       linalg::gram_operations(shape.value_width);
  return statistics / (forward + grams);
}

}  // namespace headfold::calibration
