#include <headfold/base/error.h>
#include <headfold/evaluation/trial.h>

#include <cmath>

namespace headfold::evaluation {

namespace {

constexpr std::int64_t kLogitsBytes = std::int64_t{64} << 20;

/// "self_attn." tensors and those of the MLP by the last part of their name.
std::string tail_of(const std::string& name) {
  const std::size_t last = name.rfind('.');
  const std::size_t before = name.rfind('.', last - 1);
  return name.substr(before + 1);
}

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
             at::ScalarType dtype, std::int64_t resident_bytes) {
  if (windows.empty()) throw InternalError("a trial without windows");
  const at::NoGradGuard no_grad;
  state_ = std::make_unique<State>(world, reader, std::move(windows), dtype);
  State& state = *state_;
  const model::Embedding embedding(reader, dtype);
  const std::int64_t layers = reader.config().layers;
  state.layers.resize(static_cast<std::size_t>(layers));
  state.before.resize(static_cast<std::size_t>(layers) + 1);
  for (std::size_t w = static_cast<std::size_t>(world.rank()); w < state.windows.size();
       w += static_cast<std::size_t>(world.size())) {
    state.own.push_back(w);
    std::vector<std::int64_t>& inputs = state.windows[w].inputs;
    const at::Tensor ids = at::from_blob(inputs.data(), {1, static_cast<std::int64_t>(inputs.size())}, at::kLong);
    state.before[0].push_back(embedding.forward(ids));
  }
  std::int64_t held = 0;
  for (std::size_t l = 0; l < state.layers.size(); ++l) {
    std::unique_ptr<model::Layer> layer = model::load_layer(reader, static_cast<std::int64_t>(l), dtype);
    for (const at::Tensor& hidden : state.before[l]) state.before[l + 1].push_back(layer->forward(hidden));
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

Totals Trial::score(std::int64_t first_layer, const std::function<ReplacedLayer(std::int64_t layer)>& replaced) const {
  const State& state = *state_;
  const auto layers = static_cast<std::int64_t>(state.layers.size());
  if (first_layer < 0 || first_layer > layers)
    throw InternalError(fmt::format("a trial from layer {} of {}", first_layer, layers));
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> hidden = state.before[static_cast<std::size_t>(first_layer)];
  for (std::int64_t l = first_layer; l < layers; ++l) {
    const ReplacedLayer change = replaced(l);
    std::unique_ptr<model::Layer> fresh;
    if (change.tensors != nullptr) {
      const model::TensorGetter get = [&](const std::string& name, const std::vector<std::int64_t>& shape) {
        const auto found = change.tensors->find(tail_of(name));
        return found != change.tensors->end() ? found->second : state.reader.load(name, shape, at::kFloat);
      };
      fresh = model::load_layer(*change.config, l, state.dtype, get);
    } else if (state.layers[static_cast<std::size_t>(l)] == nullptr) {
      fresh = model::load_layer(state.reader, l, state.dtype);
    }
    const model::Layer& layer = fresh ? *fresh : *state.layers[static_cast<std::size_t>(l)];
    for (at::Tensor& states : hidden) states = layer.forward(states);
  }
  return state.gather([&](std::size_t i) {
    return score_window(state.windows[state.own[i]], hidden[i].select(0, 0), state.head,
                        state.before.back()[i].select(0, 0), &state.head, kLogitsBytes);
  });
}

}  // namespace headfold::evaluation
