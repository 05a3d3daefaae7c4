#include <headfold/base/error.h>
#include <headfold/comm/device_link.h>
#include <headfold/model/pipeline.h>

#include "hidden_states.h"

#include <deque>
#include <future>
#include <optional>
#include <utility>

namespace headfold::model {
namespace {

constexpr int kTag = 7301;         // hidden states; messages of one pair of ranks arrive in the order they were sent
constexpr std::size_t kAhead = 2;  // micro-batches that may wait on either side of a stage

std::span<std::byte> bytes_of(const at::Tensor& tensor) {
  return {static_cast<std::byte*>(tensor.data_ptr()), tensor.nbytes()};
}

double parameters_of(const std::vector<checkpoint::TensorShape>& tensors) {
  double sum = 0;
  for (const auto& tensor : tensors) sum += static_cast<double>(tensor.elements());
  return sum;
}

/// Parameters of the parts that balancing looks at; `layer` is the mean one.
struct Weights {
  double layer = 0, embedding = 0, head = 0;
};

double layer_parameters(const ModelConfig& config, std::int64_t begin, std::int64_t end) {
  if (!config.uneven()) return static_cast<double>(end - begin) * parameters_of(checkpoint::layer_tensors(config, 0));
  double sum = 0;
  for (std::int64_t layer = begin; layer < end; ++layer) sum += parameters_of(checkpoint::layer_tensors(config, layer));
  return sum;
}

Weights weights_of(const ModelConfig& config) {
  Weights weights;
  weights.layer = layer_parameters(config, 0, config.layers) / static_cast<double>(config.layers);
  const auto table = static_cast<double>(config.vocab) * static_cast<double>(config.hidden);
  const bool bloom = config.family == checkpoint::Family::bloom;
  weights.embedding = table + (bloom ? 2.0 * static_cast<double>(config.hidden) : 0.0);
  weights.head =
      table + static_cast<double>(config.hidden) * (bloom ? 2.0 : 1.0);  // a tied head is a copy on its own rank
  return weights;
}

/// How hidden states travel along the pipeline: through its communicator, or between GPUs.
struct Route {
  const comm::Communicator* pipeline = nullptr;
  const comm::DeviceLink* link = nullptr;  ///< instead, where layers are on a device

  comm::Request send(const at::Tensor& tensor, int to) const {
    if (link != nullptr) return link->exchange({{comm::Transfer::Kind::send, tensor, to}}, kTag);
    return pipeline->isend(bytes_of(tensor), to, kTag);
  }
  comm::Request receive(const at::Tensor& tensor, int from) const {
    if (link != nullptr) return link->exchange({{comm::Transfer::Kind::receive, tensor, from}}, kTag);
    return pipeline->irecv(bytes_of(tensor), from, kTag);
  }
};

/// Sends with a bounded number in flight; keeps the tensors alive meanwhile.
class Sender {
 public:
  Sender(const Route& route, int to, std::size_t limit) : route_(route), to_(to), limit_(limit) {}
  void send(at::Tensor tensor) {
    while (flights_.size() >= limit_) settle();
    tensor = tensor.contiguous();
    comm::Request request = route_.send(tensor, to_);
    flights_.push_back({std::move(tensor), std::move(request)});
  }
  void finish() {
    while (!flights_.empty()) settle();
  }

 private:
  struct Flight {
    at::Tensor tensor;
    comm::Request request;  // after the tensor: destroyed, and so waited for, first
  };
  void settle() {
    flights_.front().request.wait();
    flights_.pop_front();
  }
  Route route_;
  int to_;
  std::size_t limit_;
  std::deque<Flight> flights_;
};

/// Receives of known shapes, posted ahead.
class Receiver {
 public:
  Receiver(const Route& route, int from, std::vector<std::vector<std::int64_t>> shapes, at::ScalarType dtype)
      : route_(route), from_(from), shapes_(std::move(shapes)), dtype_(dtype) {
    while (posted_.size() < kAhead && next_ < shapes_.size()) post();
  }
  at::Tensor receive() {
    posted_.front().request.wait();
    at::Tensor tensor = std::move(posted_.front().tensor);
    posted_.pop_front();
    if (next_ < shapes_.size()) post();
    return tensor;
  }

 private:
  struct Flight {
    at::Tensor tensor;
    comm::Request request;
  };
  void post() {
    at::Tensor tensor = at::empty(shapes_[next_++], at::TensorOptions().dtype(dtype_).device(compute().device));
    comm::Request request = route_.receive(tensor, from_);
    posted_.push_back({std::move(tensor), std::move(request)});
  }
  Route route_;
  int from_;
  std::vector<std::vector<std::int64_t>> shapes_;
  at::ScalarType dtype_;
  std::size_t next_ = 0;
  std::deque<Flight> posted_;
};

}  // namespace

struct Pipeline::State {
  const checkpoint::Reader* reader = nullptr;
  comm::Grid grid;
  PipelineOptions options;
  std::optional<Embedding> embedding;
  std::vector<std::unique_ptr<Layer>> layers;
  std::optional<Head> head;
  /// Between stages s and s + 1 goes link s % 2: what a stage expects from before does not hold up what it sends on.
  std::unique_ptr<comm::DeviceLink> links[2];

  Route route(int first_stage) const { return {&grid.pipeline, links[first_stage % 2].get()}; }
};

Pipeline::Pipeline(const checkpoint::Reader& reader, const comm::Grid& grid, PipelineOptions given)
    : state_(std::make_unique<State>()) {
  if (given.dtype != at::kFloat && given.dtype != at::kBFloat16)
    throw UsageError(fmt::format("models compute in float32 or bfloat16, not {}", c10::toString(given.dtype)));
  state_->reader = &reader;
  state_->grid = grid;
  state_->options = std::move(given);
  const PipelineOptions& options = state_->options;
  range_ = stage_layers(reader.config(), grid.stages)[static_cast<std::size_t>(grid.stage)];
  if (options.residency == Residency::resident) {
    if (grid.first_stage()) state_->embedding.emplace(reader, options.dtype);
    for (std::int64_t layer = range_.begin; layer < range_.end; ++layer)
      state_->layers.push_back(load_layer(reader, layer, options.dtype));
    if (grid.last_stage() && options.head) state_->head.emplace(reader, options.dtype);
  }
  if (grid.stages > 1 && compute().engine == Engine::tensors)
    for (auto& link : state_->links)
      link = std::make_unique<comm::DeviceLink>(grid.pipeline, compute().on_host() ? -1 : compute().device.index());
  grid.world.barrier("loading the model");
}

Pipeline::~Pipeline() = default;

const ModelConfig& Pipeline::config() const {
  return state_->reader->config();
}

const Head& Pipeline::head() const {
  if (!state_->grid.last_stage() || !state_->options.head)
    throw InternalError(
        fmt::format("the head was asked for on stage {} of {}", state_->grid.stage, state_->grid.stages));
  if (!state_->head) state_->head.emplace(*state_->reader, state_->options.dtype);
  return *state_->head;
}

void Pipeline::run(const std::vector<at::Tensor>& micro_batches, const PipelineHooks& hooks) const {
  run_batches(
      micro_batches,
      [](const Layer& layer, std::size_t, std::size_t, const at::Tensor& hidden, LayerObserver* observer) {
        return layer.forward(hidden, nullptr, observer);
      },
      hooks);
}

void Pipeline::run_packed(const std::vector<PackedBatch>& micro_batches, const PipelineHooks& hooks,
                          std::vector<LayerCache>* caches) const {
  if (hooks.observer) throw InternalError("packed micro-batches cannot be observed");
  if (caches != nullptr && std::ssize(*caches) != range_.size())
    throw InternalError(fmt::format("{} caches for {} layers", caches->size(), range_.size()));
  std::vector<at::Tensor> ids;
  ids.reserve(micro_batches.size());
  for (const PackedBatch& batch : micro_batches) ids.push_back(batch.ids.unsqueeze(0));
  PipelineHooks inner = hooks;
  if (hooks.output)
    inner.output = [&](std::int64_t index, const at::Tensor& hidden) { hooks.output(index, hidden.squeeze(0)); };
  run_batches(
      ids,
      [&](const Layer& layer, std::size_t local, std::size_t index, const at::Tensor& hidden, LayerObserver*) {
        return layer
            .forward_packed(hidden.squeeze(0), micro_batches[index].segments,
                            caches != nullptr ? &(*caches)[local] : nullptr)
            .unsqueeze(0);
      },
      inner);
}

std::vector<LayerCache> Pipeline::make_cache(std::int64_t slots, std::int64_t capacity) const {
  std::vector<LayerCache> caches;
  for (std::int64_t layer = range_.begin; layer < range_.end; ++layer) {
    const checkpoint::LayerShape shape = config().shape_of(layer);
    caches.push_back(empty_cache(shape, slots, capacity, state_->options.dtype));
  }
  return caches;
}

void Pipeline::run_batches(const std::vector<at::Tensor>& micro_batches, const Forward& forward,
                           const PipelineHooks& hooks) const {
  State& state = *state_;
  const comm::Grid& grid = state.grid;
  const std::int64_t hidden_size = config().hidden;
  std::vector<std::vector<std::int64_t>> shapes;
  // Every stage looks at every id, so that all of them refuse a bad one and none waits for another.
  for (const at::Tensor& ids : micro_batches) {
    check_ids(ids, config());
    shapes.push_back({ids.size(0), ids.size(1), hidden_size});
  }
  const std::size_t count = micro_batches.size();
  const bool streamed = state.options.residency == Residency::streamed;

  std::optional<Receiver> receiver;
  if (!grid.first_stage()) receiver.emplace(state.route(grid.stage - 1), grid.stage - 1, shapes, state.options.dtype);
  std::optional<Sender> sender;
  if (!grid.last_stage()) sender.emplace(state.route(grid.stage), grid.stage + 1, kAhead);
  const auto observer_of = [&](std::int64_t layer) { return hooks.observer ? hooks.observer(layer) : nullptr; };
  const auto enter = [&](std::int64_t layer, std::size_t index) {
    if (hooks.before_layer) hooks.before_layer(layer, static_cast<std::int64_t>(index));
  };
  const auto leave = [&](std::size_t index, at::Tensor hidden) {
    if (!grid.last_stage()) {
      sender->send(std::move(hidden));
    } else if (hooks.output) {
      hooks.output(static_cast<std::int64_t>(index), hidden);
    }
  };
  const auto progress = [&](double amount) {
    if (hooks.progress) hooks.progress(amount);
  };

  if (streamed) {
    HiddenStates states(state.options.hidden_folder, shapes, state.options.dtype);
    if (grid.first_stage()) {
      const Embedding embedding(*state.reader, state.options.dtype);
      for (std::size_t i = 0; i < count; ++i) states.put(i, embedding.forward(micro_batches[i]));
    }
    // A device computes while the host reads the layer after; on the host itself that layer would take memory and
    // cores.
    const bool ahead = !compute().on_host();
    std::future<std::unique_ptr<Layer>> coming;
    const auto load = [&](std::int64_t layer) { return load_layer(*state.reader, layer, state.options.dtype); };
    for (std::int64_t layer = range_.begin; layer < range_.end && count > 0; ++layer) {
      const auto loaded = coming.valid() ? coming.get() : load(layer);
      if (ahead && layer + 1 < range_.end) coming = std::async(std::launch::async, load, layer + 1);
      LayerObserver* observer = observer_of(layer);
      for (std::size_t i = 0; i < count; ++i) {
        at::Tensor hidden = layer == range_.begin && receiver ? receiver->receive() : states.take(i);
        enter(layer, i);
        hidden = forward(*loaded, static_cast<std::size_t>(layer - range_.begin), i, hidden, observer);
        if (layer + 1 == range_.end)
          leave(i, std::move(hidden));
        else
          states.put(i, hidden);
        progress(1.0 / static_cast<double>(range_.size()));
      }
    }
  } else {
    std::vector<LayerObserver*> observers;
    for (std::int64_t layer = range_.begin; layer < range_.end; ++layer)
      observers.push_back(count > 0 ? observer_of(layer) : nullptr);
    for (std::size_t i = 0; i < count; ++i) {
      at::Tensor hidden = receiver ? receiver->receive() : state.embedding->forward(micro_batches[i]);
      for (std::int64_t layer = range_.begin; layer < range_.end; ++layer) {
        const auto local = static_cast<std::size_t>(layer - range_.begin);
        enter(layer, i);
        hidden = forward(*state.layers[local], local, i, hidden, observers[local]);
      }
      leave(i, std::move(hidden));
      progress(1.0);
    }
  }
  if (sender) sender->finish();
}

std::vector<comm::LayerRange> stage_layers(const ModelConfig& config, int stages) {
  const Weights weights = weights_of(config);
  if (!config.uneven())
    return comm::split_layers(config.layers, stages, weights.embedding / weights.layer, weights.head / weights.layer);
  std::vector<double> costs;
  costs.reserve(static_cast<std::size_t>(config.layers));
  for (std::int64_t layer = 0; layer < config.layers; ++layer)
    costs.push_back(layer_parameters(config, layer, layer + 1));
  return comm::split_layers(costs, stages, weights.embedding, weights.head);
}

std::int64_t stage_weight_bytes(const ModelConfig& config, int stages, int stage, at::ScalarType dtype) {
  const auto ranges = stage_layers(config, stages);
  if (stage < 0 || stage >= stages) throw InternalError(fmt::format("stage {} of {}", stage, stages));
  const Weights weights = weights_of(config);
  const comm::LayerRange& range = ranges[static_cast<std::size_t>(stage)];
  const double parameters = layer_parameters(config, range.begin, range.end) + (stage == 0 ? weights.embedding : 0) +
                            (stage + 1 == stages ? weights.head : 0);
  return static_cast<std::int64_t>(parameters) * static_cast<std::int64_t>(c10::elementSize(dtype));
}

int fewest_stages(const ModelConfig& config, at::ScalarType dtype, std::int64_t extra_bytes_per_layer,
                  std::int64_t budget, int max_stages) {
  const auto most = static_cast<int>(std::min<std::int64_t>(std::max(max_stages, 1), config.layers));
  for (int stages = 1; stages < most; ++stages) {
    const auto ranges = stage_layers(config, stages);
    bool fits = true;
    for (int stage = 0; stage < stages && fits; ++stage)
      fits = stage_weight_bytes(config, stages, stage, dtype) +
                 extra_bytes_per_layer * ranges[static_cast<std::size_t>(stage)].size() <=
             budget;
    if (fits) return stages;
  }
  return most;
}

}  // namespace headfold::model
