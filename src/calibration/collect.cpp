#include <ATen/Parallel.h>
#include <headfold/base/error.h>
#include <headfold/calibration/collect.h>

#include <bit>
#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace headfold::calibration {
namespace {

constexpr std::int64_t kFirstRows = 64;

std::span<double> span_of(at::Tensor& tensor) {
  return {tensor.data_ptr<double>(), static_cast<std::size_t>(tensor.numel())};
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

void add_column_sums(at::Tensor& sum, const at::Tensor& rows) {
  const at::Tensor x = rows.contiguous();
  if (x.scalar_type() == at::kFloat)
    add_column_sums(sum.data_ptr<double>(), x.data_ptr<float>(), x.size(0), x.size(1));
  else if (x.scalar_type() == at::kBFloat16)
    add_column_sums(sum.data_ptr<double>(), x.data_ptr<at::BFloat16>(), x.size(0), x.size(1));
  else
    sum.add_(x.to(at::kDouble).sum(0));
}

}  // namespace

LayerAccumulator::LayerAccumulator(std::int64_t hidden, std::int64_t key_width)
    : moment_(hidden),
      moment_0_(hidden),
      keys_(key_width > 0 ? std::make_unique<linalg::GramAccumulator>(key_width) : nullptr) {
  statistics_.sum = at::zeros({hidden}, at::kDouble);
  statistics_.sum_0 = at::zeros({hidden}, at::kDouble);
}

void LayerAccumulator::attention_input(const at::Tensor& x) {
  if (finished_) throw InternalError("statistics were finished before the last forward");
  if (x.dim() != 3 || x.size(2) != moment_.size() || x.size(1) < 1)
    throw InternalError(fmt::format("attention input of shape {}, expected [batch, tokens, {}]",
                                    fmt::join(x.sizes(), " x "), moment_.size()));
  if (!first_rows_.defined()) first_rows_ = at::empty({kFirstRows, moment_.size()}, at::kDouble);
  for (std::int64_t b = 0; b < x.size(0); ++b) {
    const at::Tensor sequence = x.select(0, b);
    first_rows_.select(0, first_count_++).copy_(sequence.select(0, 0));
    if (first_count_ == kFirstRows) flush();
    const at::Tensor rest = sequence.narrow(0, 1, x.size(1) - 1);
    add_column_sums(statistics_.sum, rest);
    moment_.add(sequence, 1);
  }
  statistics_.count_0 += static_cast<double>(x.size(0));
  statistics_.count += static_cast<double>(x.size(0) * (x.size(1) - 1));
}

void LayerAccumulator::rotated_keys(const at::Tensor& keys) {
  if (keys_ == nullptr) return;
  if (keys.dim() != 4 || keys.size(2) * keys.size(3) != keys_->size())
    throw InternalError(
        fmt::format("rotated keys of shape {}, expected [batch, tokens, heads, head_dim] with {} channels",
                    fmt::join(keys.sizes(), " x "), keys_->size()));
  for (std::int64_t b = 0; b < keys.size(0); ++b)
    keys_->add(keys.select(0, b).reshape({keys.size(1), keys_->size()}), 1);
}

void LayerAccumulator::flush() {
  if (first_count_ == 0) return;
  const at::Tensor rows = first_rows_.narrow(0, 0, first_count_);
  statistics_.sum_0.add_(rows.sum(0));
  moment_0_.add(rows);
  first_count_ = 0;
}

void LayerAccumulator::finish(const comm::Communicator& peers, std::int64_t layer) {
  if (finished_) throw InternalError("statistics are finished twice");
  flush();
  first_rows_ = at::Tensor();
  finished_ = true;
  std::array<double, 2> counts{statistics_.count, statistics_.count_0};
  peers.all_reduce(counts);
  statistics_.count = counts[0];
  statistics_.count_0 = counts[1];
  statistics_.moment = moment_.packed();
  statistics_.moment_0 = moment_0_.packed();
  if (keys_ != nullptr) statistics_.rotated_keys = keys_->packed();
  for (at::Tensor* part :
       {&statistics_.sum, &statistics_.sum_0, &statistics_.moment, &statistics_.moment_0, &statistics_.rotated_keys}) {
    if (!part->defined()) continue;
    peers.all_reduce(span_of(*part));
    if (!std::isfinite(part->sum().item<double>()))
      throw InputError(fmt::format("the activations of layer {} contain NaN or Inf", layer),
                       "calibrate with --dtype float32; if it persists, the checkpoint itself is broken");
  }
}

const PackedStatistics& LayerAccumulator::statistics() const {
  if (!finished_) throw InternalError("statistics are read before they are finished");
  return statistics_;
}

bool collects_rotated_keys(const checkpoint::ModelConfig& config, bool wanted) {
  return wanted && config.family == checkpoint::Family::llama;
}

std::vector<at::Tensor> micro_batches_of(const at::Tensor& sequences, std::int64_t micro_batch, int replica,
                                         int replicas) {
  if (micro_batch < 1) throw UsageError(fmt::format("--micro-batch {}: at least 1 is needed", micro_batch));
  std::vector<at::Tensor> mine;
  const std::int64_t samples = sequences.size(0);
  std::int64_t index = 0;
  for (std::int64_t first = 0; first < samples; first += micro_batch, ++index)
    if (index % replicas == replica)
      mine.push_back(sequences.narrow(0, first, std::min(micro_batch, samples - first)).contiguous());
  return mine;
}

std::vector<std::unique_ptr<LayerAccumulator>> collect(const checkpoint::Reader& reader, const comm::Grid& grid,
                                                       const at::Tensor& sequences, const CollectOptions& options) {
  if (sequences.dim() != 2 || sequences.scalar_type() != at::kLong || sequences.size(1) < 2)
    throw InternalError(fmt::format("calibration wants int64 sequences of at least 2 tokens, got {}",
                                    fmt::join(sequences.sizes(), " x ")));
  const at::NoGradGuard no_grad;
  model::PipelineOptions pipeline_options;
  pipeline_options.dtype = options.dtype;
  pipeline_options.residency = options.residency;
  pipeline_options.head = false;
#ifdef __GLIBC__
  // glibc learns from freed blocks to keep ever larger ones for itself (up to 32 MiB each): layers come and go here,
  // and must really go.
  if (options.residency == model::Residency::streamed) ::mallopt(M_MMAP_THRESHOLD, 1 << 20);
#endif
  const model::Pipeline pipeline(reader, grid, pipeline_options);
  const checkpoint::ModelConfig& config = pipeline.config();
  const std::int64_t key_width =
      collects_rotated_keys(config, options.rotated_keys) ? config.source_kv_heads * config.head_dim : 0;
  std::vector<std::unique_ptr<LayerAccumulator>> layers;
  for (std::int64_t layer = pipeline.layers().begin; layer < pipeline.layers().end; ++layer)
    layers.push_back(std::make_unique<LayerAccumulator>(config.hidden, key_width));

  model::PipelineHooks hooks;
  hooks.observer = [&](std::int64_t layer) -> model::LayerObserver* {
    return layers.at(static_cast<std::size_t>(layer - pipeline.layers().begin)).get();
  };
  hooks.progress = options.progress;
  pipeline.run(micro_batches_of(sequences, options.micro_batch, grid.replica, grid.replicas), hooks);
  for (std::size_t i = 0; i < layers.size(); ++i)
    layers[i]->finish(grid.peers, pipeline.layers().begin + static_cast<std::int64_t>(i));
  return layers;
}

std::vector<OwnedLayer> layers_to_write(const std::vector<std::unique_ptr<LayerAccumulator>>& layers,
                                        std::int64_t first, const comm::Grid& grid) {
  std::vector<OwnedLayer> own;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const std::int64_t layer = first + static_cast<std::int64_t>(i);
    if (layer % grid.replicas == grid.replica) own.push_back({layer, &layers[i]->statistics()});
  }
  return own;
}

}  // namespace headfold::calibration
