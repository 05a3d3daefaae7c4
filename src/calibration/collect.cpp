#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/base/log.h>
#include <headfold/calibration/collect.h>
#include <headfold/calibration/partial.h>
#include <headfold/model/compute.h>
#include <headfold/model/rounds.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <optional>

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace headfold::calibration {
namespace {

constexpr std::int64_t kFirstRows = 64;

/// A Gram where the model computes. On the CPU the engine `tensors` has the products that a GPU's blocks have.
linalg::GramAccumulator make_gram(std::int64_t n) {
  const model::Compute& compute = model::compute();
  const bool plain = compute.engine == model::Engine::native || !compute.on_host();
  return linalg::GramAccumulator(n, compute.device,
                                 plain ? linalg::GramEngine::automatic : linalg::GramEngine::tensors);
}

at::Tensor zeros_there(at::IntArrayRef sizes) {
  return at::zeros(sizes, at::TensorOptions().dtype(at::kDouble).device(model::compute().device));
}

std::span<double> span_of(at::Tensor& tensor) {
  return {tensor.data_ptr<double>(), static_cast<std::size_t>(tensor.numel())};
}

}  // namespace

LayerAccumulator::Sums::Sums(const StatisticsShape& shape)
    : moment(make_gram(shape.hidden)),
      moment_0(make_gram(shape.hidden)),
      keys(shape.key_width > 0 ? std::make_unique<linalg::GramAccumulator>(make_gram(shape.key_width)) : nullptr),
      values(shape.value_width > 0 ? std::make_unique<linalg::GramAccumulator>(make_gram(shape.value_width)) : nullptr),
      sum(zeros_there({shape.hidden})),
      sum_0(zeros_there({shape.hidden})) {}

void LayerAccumulator::Sums::flush() {
  if (first_count == 0) return;
  const at::Tensor rows = first_rows.narrow(0, 0, first_count);
  sum_0.add_(rows.sum(0));
  moment_0.add(rows);
  first_count = 0;
}

LayerAccumulator::LayerAccumulator(std::int64_t hidden, std::int64_t key_width)
    : LayerAccumulator([&] {
        StatisticsShape shape;
        shape.hidden = hidden;
        shape.key_width = key_width;
        return shape;
      }()) {}

LayerAccumulator::LayerAccumulator(const StatisticsShape& shape, const at::Tensor& slopes) {
  for (int part = 0; part < (shape.halves ? 2 : 1); ++part) parts_.emplace_back(shape);
  if (shape.attention) attention_ = std::make_unique<AttentionAccumulator>(shape, slopes);
}

void LayerAccumulator::attention_input(const at::Tensor& x) {
  const std::int64_t hidden = parts_[0].moment.size();
  if (finished_) throw InternalError("statistics were finished before the last forward");
  if (x.dim() != 3 || x.size(2) != hidden || x.size(1) < 1)
    throw InternalError(
        fmt::format("attention input of shape {}, expected [batch, tokens, {}]", fmt::join(x.sizes(), " x "), hidden));
  first_ = next_;
  next_ += x.size(0);
  for (std::int64_t b = 0; b < x.size(0); ++b) {
    Sums& sums = sums_of(first_ + b);
    const at::Tensor sequence = x.select(0, b);
    if (!sums.first_rows.defined()) sums.first_rows = zeros_there({kFirstRows, hidden});
    sums.first_rows.select(0, sums.first_count++).copy_(sequence.select(0, 0));
    if (sums.first_count == kFirstRows) sums.flush();
    const at::Tensor rest = sequence.narrow(0, 1, x.size(1) - 1);
    add_column_sums(sums.sum, rest);
    sums.moment.add(sequence, 1);
    sums.count_0 += 1;
    sums.count += static_cast<double>(x.size(1) - 1);
  }
}

void LayerAccumulator::add_heads(std::unique_ptr<linalg::GramAccumulator> Sums::*gram, const at::Tensor& rows,
                                 const char* what) {
  if (parts_[0].*gram == nullptr) return;
  const std::int64_t width = (parts_[0].*gram)->size();
  if (rows.dim() != 4 || rows.size(2) * rows.size(3) != width)
    throw InternalError(fmt::format("{} of shape {}, expected [batch, tokens, heads, head_dim] with {} channels", what,
                                    fmt::join(rows.sizes(), " x "), width));
  for (std::int64_t b = 0; b < rows.size(0); ++b)
    (sums_of(first_ + b).*gram)->add(rows.select(0, b).reshape({rows.size(1), width}), 1);
}

void LayerAccumulator::rotated_keys(const at::Tensor& keys) {
  add_heads(&Sums::keys, keys, "rotated keys");
}

void LayerAccumulator::values(const at::Tensor& values) {
  add_heads(&Sums::values, values, "values");
}

void LayerAccumulator::attention(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values) {
  if (attention_ == nullptr) return;
  if (queries.dim() != 4 || keys.dim() != 4 || values.dim() != 4 || keys.size(0) != queries.size(0) ||
      values.size(0) != queries.size(0))
    throw InternalError(fmt::format("attention of queries {}, keys {} and values {}", fmt::join(queries.sizes(), " x "),
                                    fmt::join(keys.sizes(), " x "), fmt::join(values.sizes(), " x ")));
  for (std::int64_t b = 0; b < queries.size(0); ++b)
    attention_->add(queries.select(0, b), keys.select(0, b), values.select(0, b));
}

SumTensors LayerAccumulator::sums() const {
  if (finished_) throw InternalError("sums are asked for after they were finished");
  SumTensors all;
  for (std::size_t i = 0; i < parts_.size(); ++i) {
    const Sums& part = parts_[i];
    const auto put = [&](const char* name, const at::Tensor& tensor) { all[fmt::format("{}.{}", i, name)] = tensor; };
    put("moment", part.moment.packed());
    put("moment_0", part.moment_0.packed());
    put("sum", model::to_host(part.sum));
    put("sum_0", model::to_host(part.sum_0));
    put("counts", at::tensor({part.count, part.count_0}, at::kDouble));
    if (part.keys != nullptr) put("keys", part.keys->packed());
    if (part.values != nullptr) put("values", part.values->packed());
    // As they stand: flushed early, their products would be rounded otherwise.
    if (part.first_count > 0) put("first_rows", model::to_host(part.first_rows.narrow(0, 0, part.first_count)));
  }
  if (attention_ != nullptr)
    for (const auto& [name, tensor] : attention_->sums()) all["attention." + name] = tensor;
  return all;
}

void LayerAccumulator::add(const SumTensors& sums) {
  std::vector<SumTensors> given(parts_.size());
  SumTensors attention;
  for (const auto& [name, tensor] : sums) {
    const std::size_t dot = name.find('.');
    const std::string head = name.substr(0, dot), tail = dot == std::string::npos ? "" : name.substr(dot + 1);
    if (head == "attention" && attention_ != nullptr)
      attention[tail] = tensor;
    else if (head == "0" || (head == "1" && parts_.size() > 1))
      given[head == "0" ? 0 : 1][tail] = tensor;
    else
      throw InputError(fmt::format("{} is not among what is collected here", name));
  }
  for (std::size_t i = 0; i < parts_.size(); ++i) {
    Sums& part = parts_[i];
    SumTensors into = {{"moment", part.moment.packed()},
                       {"moment_0", part.moment_0.packed()},
                       {"sum", part.sum},
                       {"sum_0", part.sum_0},
                       {"counts", at::zeros({2}, at::kDouble)}};
    if (part.keys != nullptr) into["keys"] = part.keys->packed();
    if (part.values != nullptr) into["values"] = part.values->packed();
    at::Tensor rows;
    if (const auto found = given[i].find("first_rows"); found != given[i].end()) {
      rows = found->second;
      given[i].erase(found);
      if (rows.dim() != 2 || rows.size(1) != part.moment.size() || rows.size(0) < 1 || rows.size(0) >= kFirstRows)
        throw InputError(fmt::format("first_rows of shape {}", fmt::join(rows.sizes(), " x ")));
    }
    add_sums(into, given[i]);
    part.count += into["counts"].data_ptr<double>()[0];
    part.count_0 += into["counts"].data_ptr<double>()[1];
    if (!rows.defined()) continue;
    part.flush();
    if (!part.first_rows.defined()) part.first_rows = zeros_there({kFirstRows, rows.size(1)});
    part.first_rows.narrow(0, 0, rows.size(0)).copy_(rows);
    part.first_count = rows.size(0);
  }
  if (attention_ != nullptr) attention_->add(attention);
}

void LayerAccumulator::clear() {
  for (Sums& part : parts_) {
    for (at::Tensor* tensor : {&part.moment.packed(), &part.moment_0.packed(), &part.sum, &part.sum_0}) tensor->zero_();
    if (part.keys != nullptr) part.keys->packed().zero_();
    if (part.values != nullptr) part.values->packed().zero_();
    part.count = part.count_0 = 0;
    part.first_count = 0;
  }
  if (attention_ != nullptr)
    for (auto& [name, tensor] : attention_->sums()) at::Tensor(tensor).zero_();
}

void LayerAccumulator::leave_device() {
  for (Sums& part : parts_) {
    part.moment.packed();
    part.moment_0.packed();
    if (part.keys != nullptr) part.keys->packed();
    if (part.values != nullptr) part.values->packed();
  }
  if (attention_ != nullptr) attention_->sums();
}

void LayerAccumulator::start_sums(const comm::DeviceLink& link) {
  if (started_ || finished_) throw InternalError("statistics are summed twice");
  started_ = true;
  std::vector<at::Tensor> tensors;
  for (Sums& sums : parts_) {
    sums.flush();
    tensors.insert(tensors.end(), {sums.sum, sums.sum_0, sums.moment.blocks(), sums.moment_0.blocks()});
    if (sums.keys != nullptr) tensors.push_back(sums.keys->blocks());
    if (sums.values != nullptr) tensors.push_back(sums.values->blocks());
  }
  if (attention_ != nullptr)
    for (const at::Tensor& tensor : attention_->on_device()) tensors.push_back(tensor);
  for (const at::Tensor& tensor : tensors) {
    if (!tensor.defined()) throw InternalError("statistics on the host are summed by a device's link");
    requests_.push_back(link.all_reduce(tensor));
  }
}

void LayerAccumulator::finish(const comm::Communicator& peers, std::int64_t layer) {
  if (finished_) throw InternalError("statistics are finished twice");
  finished_ = true;
  for (comm::Request& request : requests_) request.wait();
  requests_.clear();
  const auto sum_up = [&](at::Tensor& part) {
    if (!part.defined()) return;
    if (!started_) peers.all_reduce(span_of(part));
    if (!std::isfinite(part.sum().item<double>()))
      throw InputError(fmt::format("the activations of layer {} contain NaN or Inf", layer),
                       "calibrate with --dtype float32; if it persists, the checkpoint itself is broken");
  };
  std::vector<PackedStatistics> found;
  for (Sums& sums : parts_) {
    sums.flush();
    PackedStatistics& part = found.emplace_back();
    std::array<double, 2> counts{sums.count, sums.count_0};
    peers.all_reduce(counts);
    part.count = counts[0];
    part.count_0 = counts[1];
    part.sum = model::to_host(sums.sum);
    part.sum_0 = model::to_host(sums.sum_0);
    part.moment = sums.moment.packed();
    part.moment_0 = sums.moment_0.packed();
    if (sums.keys != nullptr) part.rotated_keys = sums.keys->packed();
    if (sums.values != nullptr) part.values = sums.values->packed();
    for (at::Tensor* tensor : {&part.sum, &part.sum_0, &part.moment, &part.moment_0, &part.rotated_keys, &part.values})
      sum_up(*tensor);
  }
  if (found.size() == 1) {
    statistics_ = found[0];
  } else {
    // The odd half's memory becomes the total's.
    const PackedStatistics& even = found[0];
    PackedStatistics& all = found[1];
    all.count += even.count;
    all.count_0 += even.count_0;
    all.sum.add_(even.sum);
    all.sum_0.add_(even.sum_0);
    all.moment.add_(even.moment);
    all.moment_0.add_(even.moment_0);
    if (all.rotated_keys.defined()) all.rotated_keys.add_(even.rotated_keys);
    if (all.values.defined()) all.values.add_(even.values);
    statistics_ = all;
    statistics_.count_even = even.count;
    statistics_.count_0_even = even.count_0;
    statistics_.sum_even = even.sum;
    statistics_.sum_0_even = even.sum_0;
    statistics_.moment_even = even.moment;
    statistics_.moment_0_even = even.moment_0;
    statistics_.rotated_keys_even = even.rotated_keys;
    statistics_.values_even = even.values;
  }
  // The buffers of position-0 rows and of the attention are no longer needed; statistics_ holds the sums.
  parts_.erase(parts_.begin() + 1, parts_.end());
  parts_[0].first_rows = at::Tensor();
  if (attention_ == nullptr) return;
  attention_->take(statistics_);
  attention_.reset();
  std::array<double, 1> queries{statistics_.attention_count};
  peers.all_reduce(queries);
  statistics_.attention_count = queries[0];
  for (at::Tensor* tensor :
       {&statistics_.rotated_queries, &statistics_.distance_mass, &statistics_.attended, &statistics_.attended_sum})
    sum_up(*tensor);
}

const PackedStatistics& LayerAccumulator::statistics() const {
  if (!finished_) throw InternalError("statistics are read before they are finished");
  return statistics_;
}

StatisticsShape collected_shape(const checkpoint::ModelConfig& config, const CollectOptions& options,
                                std::int64_t tokens) {
  if (config.layout == checkpoint::KvLayout::latent)
    throw InputError(
        fmt::format("{}: is folded to latents, and statistics are of the keys that heads have", config.file),
        "calibrate the model that it was folded from");
  for (std::int64_t layer = 1; layer < config.layers; ++layer)
    if (config.shape_of(layer) != config.shape_of(0))
      throw InputError(
          fmt::format("{}: layers 0 and {} cache different numbers of KV heads, and statistics are of models "
                      "whose layers are alike",
                      config.file, layer),
          "calibrate the model that it was folded from");
  StatisticsShape shape;
  shape.hidden = config.hidden;
  shape.kv_heads = config.source_kv_heads;
  shape.head_dim = config.head_dim;
  shape.key_width = options.rotated_keys ? shape.kv_heads * shape.head_dim : 0;
  const bool all_values = config.layout == checkpoint::KvLayout::gqa;
  shape.value_width = options.values && all_values ? shape.kv_heads * shape.head_dim : 0;
  shape.halves = options.half_samples;
  shape.sequence_length = tokens;
  if (!options.attention_statistics) return shape;
  if (config.layout != checkpoint::KvLayout::gqa)
    throw InputError(fmt::format("{}: attention statistics need keys and values as the heads have them, but layout {} "
                                 "caches something else",
                                 config.file, checkpoint::name_of(config.layout)),
                     "calibrate the model that it was folded from, or with --attention-statistics off");
  shape.attention = true;
  shape.heads = config.heads;
  shape.attended_heads = options.attended_heads > 0 ? options.attended_heads : default_attended_heads(config);
  if (shape.kv_heads % shape.attended_heads != 0)
    throw UsageError(fmt::format("--attended-heads {}: the model's {} KV heads do not fall into such blocks",
                                 shape.attended_heads, shape.kv_heads),
                     "choose a divisor of the KV heads");
  return shape;
}

StatisticsHeader header_of(const checkpoint::ModelConfig& config, const CollectOptions& options, std::int64_t samples,
                           std::int64_t tokens) {
  const StatisticsShape shape = collected_shape(config, options, tokens);
  StatisticsHeader header;
  header.family = checkpoint::name_of(config.family);
  header.layers = config.layers;
  header.hidden = config.hidden;
  header.kv_heads = shape.kv_heads;
  header.head_dim = shape.head_dim;
  header.samples = samples;
  header.sequence_length = tokens;
  header.dtype = options.dtype == at::kFloat ? "float32" : "bfloat16";
  header.options = "{}";
  header.has_rotated_keys = shape.key_width > 0;
  header.has_values = shape.value_width > 0;
  header.has_halves = shape.halves;
  header.has_attention = shape.attention;
  header.heads = shape.heads;
  header.attended_heads = shape.attended_heads;
  return header;
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

namespace {

using RoundClock = std::chrono::steady_clock;

double seconds_from(RoundClock::time_point start) {
  return std::chrono::duration<double>(RoundClock::now() - start).count();
}

/// When sums are saved if the user does not say: no more than a few minutes are lost, and no more than a twentieth of
/// the time goes into saving.
class SaveClock {
 public:
  bool due() const { return seconds_from(last_) >= std::max(300.0, 20 * seconds_); }
  void saved(double seconds) {
    seconds_ = seconds;
    last_ = RoundClock::now();
  }

 private:
  RoundClock::time_point last_ = RoundClock::now();
  double seconds_ = 0;
};

/// What sums of `peers` on GPUs meet by: NCCL, layer by layer in the same order on all ranks, while later layers run.
/// None where they meet on the host, in LayerAccumulator::finish(). On the CPU the engine `tensors` goes the way of
/// GPUs, by MPI. `stay`: the sums stay on the device. Collective.
std::unique_ptr<comm::DeviceLink> link_for_sums(const comm::Communicator& peers, bool stay) {
  std::unique_ptr<comm::DeviceLink> link;
  const bool here = stay && model::compute().engine == model::Engine::tensors;
  // Ranks without a GPU compute on the host with --device auto.
  if (peers.all_reduce(std::int64_t{here ? 0 : 1}, comm::Reduce::max) != 0 || peers.size() == 1) return link;
  const bool host = model::compute().on_host();
  link = std::make_unique<comm::DeviceLink>(peers, host ? -1 : model::compute().device.index());
  if (!host && link->transport() == comm::Transport::mpi) link.reset();
  return link;
}

}  // namespace

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
  pipeline_options.hidden_folder = options.hidden_folder;
#ifdef __GLIBC__
  // glibc learns from freed blocks to keep ever larger ones for itself (up to 32 MiB each): layers come and go here,
  // and must really go.
  if (options.residency == model::Residency::streamed) ::mallopt(M_MMAP_THRESHOLD, 1 << 20);
#endif
  collected_shape(reader.config(), options, sequences.size(1));  // refuses before anything is loaded
  const model::Pipeline pipeline(reader, grid, pipeline_options);
  const checkpoint::ModelConfig& config = pipeline.config();
  const StatisticsShape shape = collected_shape(config, options, sequences.size(1));
  const at::Tensor slopes =
      shape.attention && config.family == checkpoint::Family::bloom ? model::alibi_slopes(config.heads) : at::Tensor();
  // Of the layers that are streamed through a device, one has its sums there.
  const bool leave = options.residency == model::Residency::streamed && !model::compute().on_host();
  const std::unique_ptr<comm::DeviceLink> link = link_for_sums(grid.peers, !leave);
  std::vector<std::unique_ptr<LayerAccumulator>> layers;
  for (std::int64_t layer = pipeline.layers().begin; layer < pipeline.layers().end; ++layer)
    layers.push_back(std::make_unique<LayerAccumulator>(shape, slopes));

  const auto of_layer = [&](std::int64_t layer) -> LayerAccumulator& {
    return *layers.at(static_cast<std::size_t>(layer - pipeline.layers().begin));
  };
  model::PipelineHooks hooks;
  hooks.observer = [&](std::int64_t layer) -> model::LayerObserver* { return &of_layer(layer); };
  // Halves go by a sequence's place in the whole list, whoever runs it and together with which others.
  std::vector<std::int64_t> starts;  // first sequence of this replica's micro-batches of the current group
  std::int64_t running = -1, running_index = -1, last_index = 0;
  hooks.before_layer = [&](std::int64_t layer, std::int64_t index) {
    if (running >= 0 && running != layer) {
      if (leave) of_layer(running).leave_device();
      if (link && running_index == last_index) of_layer(running).start_sums(*link);
    }
    running = layer;
    running_index = index;
    of_layer(layer).expect(starts[static_cast<std::size_t>(index)]);
  };
  hooks.progress = options.progress;

  const std::int64_t samples = sequences.size(0), batch = std::min(options.micro_batch, samples);
  if (batch < 1) throw UsageError(fmt::format("--micro-batch {}: at least 1 is needed", options.micro_batch));
  std::optional<PartialSums> partial;
  std::int64_t done = 0;
  if (!options.partial.empty()) {
    partial.emplace(grid, options.partial, options.identity);
    done = partial->restore(layers, pipeline.layers().begin);
    if (done < 0 || done > samples) throw InternalError(fmt::format("{} of {} sequences were saved", done, samples));
    if (done > 0 && grid.world.root())
      spdlog::info("going on after {} of {} sequences, whose sums are in {}", done, samples, options.partial.string());
  }
  // As without an interruption, where the micro-batches are the same: replica m % replicas runs micro-batch m.
  const std::int64_t offset = done % batch == 0 ? done / batch : 0;
  const std::int64_t count = (samples - done + batch - 1) / batch;
  const auto own_of = [&](std::int64_t m) { return (offset + m) % grid.replicas == grid.replica; };
  if (options.resumed) {
    std::int64_t own_count = 0;
    for (std::int64_t m = 0; m < count; ++m) own_count += own_of(m) ? 1 : 0;
    options.resumed(done, own_count);
  }
  const bool in_groups = options.stop || partial;
  model::RoundSize round(grid, options.residency == model::Residency::streamed, batch * sequences.size(1));
  SaveClock clock;
  std::int64_t unsaved = 0;  // micro-batches of a replica
  for (std::int64_t next = 0; next < count;) {
    std::int64_t size = in_groups ? round.size() : count;
    if (partial && options.save_every > 0) size = std::min(size, options.save_every - unsaved);
    // Sizes follow rank 0's clock.
    if (in_groups) grid.world.broadcast(std::as_writable_bytes(std::span(&size, 1)));
    const std::int64_t end = std::min(count, next + size * grid.replicas);
    std::vector<at::Tensor> own;
    starts.clear();
    for (std::int64_t m = next; m < end; ++m) {
      if (!own_of(m)) continue;
      const std::int64_t begin = done + m * batch;
      starts.push_back(begin);
      own.push_back(sequences.narrow(0, begin, std::min(batch, samples - begin)).contiguous());
    }
    running_index = -1;  // the layer that ran last before is not done
    last_index = end == count ? std::ssize(own) - 1 : std::ssize(own);
    const auto begun = RoundClock::now();
    pipeline.run(own, hooks);
    next = end;
    unsaved += size;
    if (!in_groups) continue;
    std::array<std::int64_t, 2> wish = {options.stop && options.stop() ? 1 : 0, 0};
    if (partial && grid.world.root() && options.save_every >= 0)
      wish[1] = (options.save_every > 0 ? unsaved >= options.save_every : clock.due()) ? 1 : 0;
    grid.world.all_reduce(std::span<std::int64_t>(wish), comm::Reduce::max);
    round.took(seconds_from(begun), size);
    if (next == count) break;
    const std::int64_t sums_of = std::min(samples, done + next * batch);
    if (partial && (wish[0] != 0 || wish[1] != 0)) {
      const auto start = RoundClock::now();
      try {
        partial->save(layers, pipeline.layers().begin, sums_of);
      } catch (const IoError& error) {
        if (wish[0] != 0) throw;
        if (grid.world.root()) spdlog::warn("the sums so far could not be saved: {}", error.what());
      }
      clock.saved(seconds_from(start));
      unsaved = 0;
    }
    if (wish[0] != 0)
      throw Stopped(fmt::format("stopped on request after {} of {} sequences{}", sums_of, samples,
                                partial ? ", whose sums are in " + options.partial.string() : ""));
  }
  for (const auto& layer : layers)
    if (link && !layer->sums_started()) layer->start_sums(*link);
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
