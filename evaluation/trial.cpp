#include <ATen/core/grad_mode.h>
#include <headfold/base/error.h>
#include <headfold/evaluation/trial.h>

#include <cmath>

namespace headfold::evaluation {

namespace {

constexpr std::int64_t kLogitsBytes = std::int64_t{64} << 20;

}  // namespace

struct Trial::State {
  comm::Communicator world;
  const checkpoint::Reader& reader;
  std::vector<Window> windows;
  std::vector<std::size_t> own;  // indices of the windows of this rank
  at::ScalarType dtype;
  model::Head head;
  std::vector<std::unique_ptr<model::Layer>> layers;  // null where they are read each time
  std::vector<std::vector<at::Tensor>> before;        // [layer or layers][own window] hidden states [1, tokens, hidden]
  Totals original;

  State(const comm::Communicator& group, const checkpoint::Reader& source, std::vector<Window> list,
        at::ScalarType type)
      : world(group), reader(source), windows(std::move(list)), dtype(type), head(source, type) {}

  Totals gather(const std::function<WindowScore(std::size_t index)>& score) const {
    std::vector<double> table(windows.size() * 5, 0.0);
    for (std::size_t i = 0; i < own.size(); ++i) {
      const WindowScore s = score(i);
      double* row = &table[own[i] * 5];
      row[0] = static_cast<double>(s.tokens), row[1] = s.loss, row[2] = s.reference_loss, row[3] = s.divergence;
      row[4] = static_cast<double>(s.agreements);
    }
    // Exactly one rank holds a window's score; the others add zeros, so the sums are exact.
    world.all_reduce(table);
    std::vector<WindowScore> all;
    all.reserve(windows.size());
    for (std::size_t w = 0; w < windows.size(); ++w) {
      const double* row = &table[w * 5];
      if (!std::isfinite(row[1]) || !std::isfinite(row[3]))
        throw InputError(fmt::format("{}: the loss of probe window {} is not finite", reader.folder().string(), w),
                         "the weights or the compute dtype are at fault: headfold inspect on the model");
      all.push_back({static_cast<std::int64_t>(row[0]), row[1], row[2], row[3], static_cast<std::int64_t>(row[4])});
    }
    return total(all);
  }
};

Trial::Trial(const comm::Communicator& world, const checkpoint::Reader& reader, std::vector<Window> windows,
             at::ScalarType dtype, std::int64_t resident_bytes, Keep keep) {
  if (windows.empty()) throw InternalError("a trial without windows");
  const at::NoGradGuard no_grad;
  state_ = std::make_unique<State>(world, reader, std::move(windows), dtype);
  State& state = *state_;
  const auto layers = static_cast<std::size_t>(reader.config().layers);
  state.layers.resize(layers);
  state.before.resize(layers + 1);
  for (std::size_t w = static_cast<std::size_t>(world.rank()); w < state.windows.size();
       w += static_cast<std::size_t>(world.size()))
    state.own.push_back(w);
  {
    const model::Embedding embedding(reader, dtype);
    for (const std::size_t w : state.own) {
      std::vector<std::int64_t>& inputs = state.windows[w].inputs;
      const at::Tensor ids = at::from_blob(inputs.data(), {1, static_cast<std::int64_t>(inputs.size())}, at::kLong);
      state.before[0].push_back(embedding.forward(ids));
    }
  }
  std::int64_t held = 0;
  for (std::size_t l = 0; l < layers; ++l) {
    std::unique_ptr<model::Layer> layer = model::load_layer(reader, static_cast<std::int64_t>(l), dtype);
    state.before[l + 1].reserve(state.own.size());
    for (const at::Tensor& hidden : state.before[l]) state.before[l + 1].push_back(layer->forward(hidden));
    if (keep == Keep::ends && l > 0) state.before[l] = {};
    if (held + layer->bytes() <= resident_bytes) {
      held += layer->bytes();
      state.layers[l] = std::move(layer);
    }
  }
  state.original = state.gather([&](std::size_t i) {
    return score_window(state.windows[state.own[i]], state.before.back()[i].select(0, 0), state.head, at::Tensor(),
                        nullptr, kLogitsBytes);
  });
}

Trial::~Trial() = default;

const Totals& Trial::original() const {
  return state_->original;
}

Trial::Run::Run(const Trial& trial, std::int64_t first_layer) : trial_(&trial), next_(first_layer) {
  const State& state = *trial.state_;
  const std::int64_t layers = std::ssize(state.layers);
  if (first_layer < 0 || first_layer > layers)
    throw InternalError(fmt::format("a trial from layer {} of {}", first_layer, layers));
  hidden_ = state.before[static_cast<std::size_t>(first_layer)];
  if (hidden_.size() != state.own.size())
    throw InternalError(fmt::format("a trial from layer {}, whose hidden states were not kept", first_layer));
}

void Trial::Run::advance(const ReplacedLayer& change) {
  const State& state = *trial_->state_;
  if (next_ >= std::ssize(state.layers)) throw InternalError("a trial beyond its last layer");
  const at::NoGradGuard no_grad;
  const auto index = static_cast<std::size_t>(next_);
  std::unique_ptr<model::Layer> fresh;
  if (!hidden_.empty() && change.tensors != nullptr) {
    fresh =
        model::load_layer(*change.config, next_, state.dtype, model::replaced_tensors(state.reader, *change.tensors));
  } else if (!hidden_.empty() && state.layers[index] == nullptr) {
    fresh = model::load_layer(state.reader, next_, state.dtype);
  }
  const model::Layer* layer = fresh ? fresh.get() : state.layers[index].get();
  for (at::Tensor& states : hidden_) states = layer->forward(states);
  ++next_;
}

Totals Trial::Run::finish() {
  const State& state = *trial_->state_;
  while (next_ < std::ssize(state.layers)) advance({});
  const at::NoGradGuard no_grad;
  return state.gather([&](std::size_t i) {
    return score_window(state.windows[state.own[i]], hidden_[i].select(0, 0), state.head,
                        state.before.back()[i].select(0, 0), &state.head, kLogitsBytes);
  });
}

Trial::Run Trial::begin(std::int64_t first_layer) const {
  return {*this, first_layer};
}

Totals Trial::score(std::int64_t first_layer, const std::function<ReplacedLayer(std::int64_t layer)>& replaced) const {
  Run run = begin(first_layer);
  for (std::int64_t layer = first_layer; layer < std::ssize(state_->layers); ++layer) run.advance(replaced(layer));
  return run.finish();
}

}  // namespace headfold::evaluation
