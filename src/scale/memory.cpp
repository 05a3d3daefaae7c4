#include <headfold/checkpoint/layout.h>
#include <headfold/model/pipeline.h>
#include <headfold/scale/memory.h>

namespace headfold::scale {
namespace {

/// The most that `auto` lets attention statistics take: this share of calibration's other arithmetic, and this memory
/// per layer unless the other sums take more.
constexpr double kMostShare = 1.0;
constexpr std::uint64_t kMostBytes = std::uint64_t{64} << 20;

double layer_bytes(const checkpoint::ModelConfig& config, std::int64_t layer, double element) {
  double elements = 0;
  for (const checkpoint::TensorShape& tensor : checkpoint::layer_tensors(config, layer))
    elements += static_cast<double>(tensor.elements());
  return elements * element;
}

}  // namespace

bool collects_attention(const checkpoint::ModelConfig& config, const calibration::CollectOptions& options,
                        std::int64_t length) {
  if (config.layout != checkpoint::KvLayout::gqa) return false;
  calibration::CollectOptions tried = options;
  tried.attention_statistics = false;
  const std::uint64_t without =
      calibration::layer_statistics_bytes(calibration::collected_shape(config, tried, length));
  tried.attention_statistics = true;
  const calibration::StatisticsShape shape = calibration::collected_shape(config, tried, length);
  return calibration::attention_statistics_share(config, shape) <= kMostShare &&
         calibration::layer_statistics_bytes(shape) - without <= std::max(without, kMostBytes);
}

CalibrationMemory calibration_memory(const checkpoint::ModelConfig& config, const CalibrationSettings& settings,
                                     const comm::LayerRange& range, bool first_stage) {
  CalibrationMemory memory;
  const bool streamed = settings.collect.residency == model::Residency::streamed;
  const auto element = static_cast<double>(c10::elementSize(settings.collect.dtype));
  const auto hidden = static_cast<double>(config.hidden);
  for (std::int64_t layer = range.begin; layer < range.end; ++layer) {
    const double bytes = layer_bytes(config, layer, element);
    memory.weights = streamed ? std::max(memory.weights, bytes) : memory.weights + bytes;
  }
  if (first_stage) memory.weights += static_cast<double>(config.vocab) * hidden * element;
  const std::int64_t key_width = config.source_kv_heads * config.head_dim;
  const calibration::StatisticsShape shape = calibration::collected_shape(config, settings.collect, settings.length);
  // Per layer the packed sums and the buffers of position-0 rows; once, the float32 blocks of a Gram.
  memory.statistics =
      static_cast<double>(range.size()) *
          (static_cast<double>(calibration::layer_statistics_bytes(shape)) + (shape.halves ? 2 : 1) * 64 * 8 * hidden) +
      1024 * 4 * static_cast<double>(std::max(config.hidden, key_width));
  const double tokens = static_cast<double>(settings.collect.micro_batch * settings.length);
  // Hidden states in, out, normalised, residual and two in flight; queries, keys, values and their attention; three MLP
  // widths.
  const double widths = 6 * hidden + 2 * static_cast<double>(config.heads * config.head_dim) +
                        2 * static_cast<double>(key_width) + 3 * static_cast<double>(config.ffn);
  // Attention scores are float32, in blocks of bounded size.
  const double scores = 4 * tokens * static_cast<double>(settings.length) * static_cast<double>(config.heads);
  memory.activations =
      tokens * widths * element + std::min(scores, static_cast<double>(model::attention_block_bytes()));
  // Values as the heads see them, for their Gram.
  if (shape.value_width > 0 && !shape.attention)
    memory.activations += tokens * static_cast<double>(shape.value_width) * element;
  if (shape.attention) {
    // Queries, keys and values as the heads see them, and once more for one sequence; attended values of every thread.
    const auto length = static_cast<double>(settings.length);
    memory.activations +=
        (tokens + length) * static_cast<double>((config.heads + 2 * shape.kv_heads) * config.head_dim) * element +
        settings.threads * length * static_cast<double>(shape.block()) * 4 +
        std::min(scores, static_cast<double>(model::attention_block_bytes()));
  }
  return memory;
}

CalibrationMemory widest_stage(const checkpoint::ModelConfig& config, const CalibrationSettings& settings, int stages) {
  CalibrationMemory widest;
  const auto ranges = model::stage_layers(config, stages);
  for (std::size_t stage = 0; stage < ranges.size(); ++stage) {
    const CalibrationMemory memory = calibration_memory(config, settings, ranges[stage], stage == 0);
    if (memory.total() > widest.total()) widest = memory;
  }
  return widest;
}

double conversion_memory(const checkpoint::ModelConfig& config) {
  const auto hidden = static_cast<double>(config.hidden), width = static_cast<double>(config.heads * config.head_dim),
             kv = static_cast<double>(config.kv_width());
  return 8 * (2 * hidden * width * 2 + 2 * hidden * kv * 2 + 6 * hidden * hidden + 2 * kv * kv);
}

}  // namespace headfold::scale
