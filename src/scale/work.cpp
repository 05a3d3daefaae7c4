#include <headfold/checkpoint/layout.h>
#include <headfold/finetune/trainable.h>
#include <headfold/folding/apply.h>
#include <headfold/linalg/linalg.h>
#include <headfold/scale/work.h>

namespace headfold::scale {
namespace {

double size_of(at::ScalarType dtype) {
  return static_cast<double>(c10::elementSize(dtype));
}

/// Elements of a layer's tensors of at least two dimensions, only those of attention if asked for.
double matrix_elements(const ModelConfig& config, std::int64_t layer, bool attention_only = false) {
  double sum = 0;
  for (const checkpoint::TensorShape& tensor : checkpoint::layer_tensors(config, layer)) {
    const bool attention = tensor.name.find("self_att") != std::string::npos;
    if (tensor.shape.size() >= 2 && (attention || !attention_only)) sum += static_cast<double>(tensor.elements());
  }
  return sum;
}

}  // namespace

Work& Work::operator+=(const Work& other) {
  product += other.product;
  attention += other.attention;
  gram += other.gram;
  attention_statistics += other.attention_statistics;
  head += other.head;
  element_bytes += other.element_bytes;
  return *this;
}

Work Work::operator*(double factor) const {
  return {product * factor, attention * factor,    gram * factor, attention_statistics * factor,
          head * factor,    element_bytes * factor};
}

std::vector<std::pair<std::string, double>> seconds_by_figure(const Work& work, const Rates& rates,
                                                              at::ScalarType dtype) {
  std::vector<std::pair<std::string, double>> seconds;
  const auto add = [&](const char* name, double amount, const char* instead = nullptr) {
    if (amount <= 0) return;
    const bool there = rates.has(Rates::of(name, dtype)) || instead == nullptr;
    seconds.emplace_back(name, amount / rates.value(Rates::of(there ? name : instead, dtype)));
  };
  add("product", work.product);
  add("attention", work.attention);
  add("element_wise", work.element_bytes);
  add("gram", work.gram);
  add("attention_statistics", work.attention_statistics, "gram");
  add("head", work.head);
  return seconds;
}

double seconds_of(const Work& work, const Rates& rates, at::ScalarType dtype) {
  double sum = 0;
  for (const auto& [name, seconds] : seconds_by_figure(work, rates, dtype)) sum += seconds;
  return sum;
}

Work layer_work(const ModelConfig& config, std::int64_t layer, double sequences, std::int64_t tokens,
                at::ScalarType dtype) {
  const double rows = sequences * static_cast<double>(tokens);
  const auto width = static_cast<double>(config.heads * config.head_dim);
  const checkpoint::LayerShape shape = config.shape_of(layer);
  const auto cached = static_cast<double>(shape.kv_heads * (shape.key_width + shape.value_width));
  Work work;
  work.product = 2 * matrix_elements(config, layer) * rows;
  work.attention = 2 * rows * static_cast<double>(tokens) * width;
  // Two norms (in, out), two residual sums (two in, one out), queries and keys turned in place, gate times up.
  work.element_bytes =
      size_of(dtype) * rows *
      (10 * static_cast<double>(config.hidden) + 2 * (width + cached) + 3 * static_cast<double>(config.ffn));
  return work;
}

Work statistics_work(const ModelConfig& config, const calibration::StatisticsShape& shape, double sequences) {
  const double rows = sequences * static_cast<double>(shape.sequence_length);
  Work work;
  work.gram = rows * (linalg::gram_operations(shape.hidden) + linalg::gram_operations(shape.key_width) +
                      linalg::gram_operations(shape.value_width));
  if (shape.attention) {
    const Work forward = layer_work(config, 0, sequences, shape.sequence_length, at::kFloat);
    work.attention_statistics =
        calibration::attention_statistics_share(config, shape) * (forward.product + forward.attention + work.gram);
  }
  return work;
}

Work head_work(const ModelConfig& config, double rows) {
  Work work;
  work.head = 2 * static_cast<double>(config.vocab) * static_cast<double>(config.hidden) * rows;
  return work;
}

double trained_elements(const ModelConfig& config, const finetune::LoraOptions& lora) {
  return static_cast<double>(finetune::memory_of(config, lora, at::kFloat, 1, 2, true, 1, false, nullptr).gradients) /
         4;
}

Work training_work(const ModelConfig& config, const finetune::LoraOptions& lora, bool keep_activations,
                   double sequences, std::int64_t tokens, at::ScalarType dtype) {
  const double rows = sequences * static_cast<double>(tokens);
  const double forwards = keep_activations ? 1 : 2;
  Work work;
  for (std::int64_t layer = 0; layer < config.layers; ++layer) {
    const Work once = layer_work(config, layer, sequences, tokens, dtype);
    // What the last layer leaves is still there when its backward pass begins.
    const double passes = layer + 1 < config.layers ? forwards : 1;
    work.product += once.product * (passes + (lora.full ? 2 : 1));
    work.attention += once.attention * (passes + 2.5);
    work.element_bytes += once.element_bytes * (passes + 2);
  }
  if (!lora.full) work.product += 2 * trained_elements(config, lora) * rows * (forwards + 2);
  work += head_work(config, rows) * (lora.full ? 3 : 2);
  return work;
}

double checkpoint_bytes(const ModelConfig& config) {
  return static_cast<double>(checkpoint::parameter_count(config)) *
         static_cast<double>(folding::bytes_per_element(config.dtype));
}

ModelConfig folded(const ModelConfig& config, std::int64_t kv_heads) {
  if (kv_heads == config.kv_heads) return config;
  return checkpoint::parse_config(checkpoint::folded_config(config, kv_heads, checkpoint::KvLayout::gqa),
                                  config.file + " after conversion");
}

FoldWork fold_work(const ModelConfig& config, std::int64_t kv_heads, const calibration::StatisticsShape& shape,
                   bool held_out) {
  constexpr double kMoved = 8;  // operations counted per element that is unpacked, scaled or converted
  const auto n = static_cast<double>(config.hidden), d = static_cast<double>(config.head_dim);
  const auto source = static_cast<double>(config.kv_heads), kept = static_cast<double>(kv_heads);
  const double queries = static_cast<double>(config.heads) * d, keys = source * d;
  const double p = source / kept * d;  // channels of a group
  const double halves = held_out && shape.halves ? 2 : 1;
  const bool rotates = config.family == checkpoint::Family::llama;
  const auto element = static_cast<double>(folding::bytes_per_element(config.dtype));
  FoldWork work;
  work.read_weights = element * matrix_elements(config, 0, true);
  if (shape.hidden > 0) {
    work.read_statistics = static_cast<double>(calibration::layer_statistics_bytes(shape));
    work.plan += kMoved * work.read_statistics / 8;
    // Grams of queries, and of keys and values where calibration kept none.
    const bool measured = rotates && shape.attention && shape.key_width > 0;
    if (!measured) {
      work.plan += 2 * n * n * queries + 2 * n * d * queries;
      if (rotates || shape.key_width == 0) work.plan += halves * (2 * n * n * keys + 2 * n * p * keys);
    }
    if (shape.value_width == 0) work.plan += halves * (2 * n * n * keys + 2 * n * p * keys);
  }
  work.plan += kMoved * (2 * n * queries + 2 * n * keys);
  // Values: eigenvectors (9 p^3), residual check and measured loss (10 p^3); the spectrum alone of keys and values for
  // their condition (4/3 p^3 each). Keys: one Hermitian problem [g, g] per frequency, or as values without rotation.
  const double cube = p * p * p, group = source / kept;
  const double of_keys = rotates ? d / 2 * 100 * group * group * group : 19 * cube;
  work.plan_eigen = kept * (halves * (19 * cube + of_keys) + (shape.hidden > 0 ? 8.0 / 3 * cube : 0));
  // New weights: keys and queries turned two entries per row where the map commutes with rotation, densely otherwise;
  // values through their encoder, the output projection through the decoder.
  work.keys =
      rotates ? kMoved * n * (queries + keys) : 2 * n * p * kept * d + 2 * n * d * queries + kMoved * n * queries;
  work.values = 2 * n * p * kept * d + 2 * n * queries * d + kMoved * n * (queries + keys);
  work.written = element * matrix_elements(folded(config, kv_heads), 0, true);
  return work;
}

}  // namespace headfold::scale
