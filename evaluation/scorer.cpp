#include <ATen/ATen.h>
#include <headfold/base/error.h>
#include <headfold/evaluation/scorer.h>
#include <headfold/model/rounds.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

namespace headfold::evaluation {
namespace {

/// Windows that go through the model together: indices into the list of windows, and their right-padded ids.
struct Batch {
  std::vector<std::size_t> windows;
  std::int64_t length = 0;
};

std::vector<Batch> make_batches(const std::vector<Window>& windows, std::int64_t micro_batch) {
  std::vector<std::size_t> order(windows.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return windows[a].inputs.size() > windows[b].inputs.size(); });
  std::vector<Batch> batches;
  for (std::size_t begin = 0; begin < order.size(); begin += static_cast<std::size_t>(micro_batch)) {
    const std::size_t end = std::min(order.size(), begin + static_cast<std::size_t>(micro_batch));
    batches.push_back(
        {{order.begin() + static_cast<std::ptrdiff_t>(begin), order.begin() + static_cast<std::ptrdiff_t>(end)},
         static_cast<std::int64_t>(windows[order[begin]].inputs.size())});
  }
  return batches;
}

/// ids [windows, longest]; shorter windows are padded on the right, which causal attention never sees.
at::Tensor padded_ids(const Batch& batch, const std::vector<Window>& windows) {
  at::Tensor ids = at::zeros({static_cast<std::int64_t>(batch.windows.size()), batch.length}, at::kLong);
  auto* data = ids.data_ptr<std::int64_t>();
  for (std::size_t row = 0; row < batch.windows.size(); ++row)
    std::copy(windows[batch.windows[row]].inputs.begin(), windows[batch.windows[row]].inputs.end(),
              data + static_cast<std::int64_t>(row) * batch.length);
  return ids;
}

constexpr std::size_t kFields = 5;  // of WindowScore, as doubles for the reduction (counts below 2^53 are exact)

}  // namespace

WindowScore score_window(const Window& window, const at::Tensor& hidden, const model::Head& head,
                         const at::Tensor& reference_hidden, const model::Head* reference, std::int64_t logits_bytes) {
  WindowScore result;
  result.tokens = static_cast<std::int64_t>(window.targets.size());
  const auto inputs = static_cast<std::int64_t>(window.inputs.size());
  const std::int64_t first = inputs - result.tokens;
  const std::int64_t block = std::max<std::int64_t>(1, logits_bytes / (head.vocabulary() * 4));
  for (std::int64_t begin = first; begin < inputs; begin += block) {
    const std::int64_t end = std::min(inputs, begin + block);
    const at::Tensor targets =
        at::from_blob(const_cast<std::int64_t*>(window.targets.data()) + (begin - first), {end - begin, 1}, at::kLong)
            .to(hidden.device());
    const at::Tensor log_q = at::log_softmax(head.logits(hidden.slice(0, begin, end)), -1, at::kFloat);
    const auto add = [&](double& sum, const at::Tensor& log_probabilities) {
      const at::Tensor picked = model::to_host(log_probabilities.gather(1, targets)).contiguous();
      const auto* values = picked.data_ptr<float>();
      for (std::int64_t i = 0; i < end - begin; ++i) sum -= static_cast<double>(values[i]);
    };
    add(result.loss, log_q);
    if (reference == nullptr) continue;
    const at::Tensor log_p = at::log_softmax(reference->logits(reference_hidden.slice(0, begin, end)), -1, at::kFloat);
    add(result.reference_loss, log_p);
    // KL(p || q) = sum p (log p - log q)
    const at::Tensor divergence =
        model::to_host(at::sum(at::exp(log_p).mul_(at::sub(log_p, log_q)), {-1}, false, at::kDouble)).contiguous();
    const auto* values = divergence.data_ptr<double>();
    for (std::int64_t i = 0; i < end - begin; ++i) result.divergence += values[i];
    result.agreements += log_p.argmax(-1).eq(log_q.argmax(-1)).sum().item<std::int64_t>();
  }
  return result;
}

struct Scorer::State {
  const checkpoint::Reader* model_reader;
  const checkpoint::Reader* reference_reader;
  comm::Grid grid;
  ScorerOptions options;
  model::Pipeline model;
  std::unique_ptr<model::Pipeline> reference;

  State(const checkpoint::Reader& reader, const checkpoint::Reader* other, const comm::Grid& own_grid,
        const ScorerOptions& own_options)
      : model_reader(&reader),
        reference_reader(other),
        grid(own_grid),
        options(own_options),
        model(reader, own_grid, {own_options.dtype, own_options.residency, true}) {
    if (other != nullptr)
      reference = std::make_unique<model::Pipeline>(
          *other, own_grid, model::PipelineOptions{own_options.reference_dtype, own_options.residency, true});
  }
};

Scorer::Scorer(const checkpoint::Reader& model, const checkpoint::Reader* reference, const comm::Grid& grid,
               ScorerOptions options) {
  if (options.micro_batch < 1)
    throw UsageError(fmt::format("--micro-batch {}: at least 1 is needed", options.micro_batch));
  if (reference != nullptr && reference->config().vocab != model.config().vocab)
    throw InputError(
        fmt::format("vocabularies differ: {} has {} tokens, the reference {} has {}", model.folder().string(),
                    model.config().vocab, reference->folder().string(), reference->config().vocab),
        "KL divergence compares distributions over the same tokens: give the model this one was made from");
  state_ = std::make_unique<State>(model, reference, grid, options);
}

Scorer::~Scorer() = default;

std::vector<WindowScore> Scorer::score(const std::vector<Window>& windows, const std::string& what,
                                       const std::function<void(double)>& advance, const ScoreHooks& hooks) const {
  const State& state = *state_;
  const comm::Grid& grid = state.grid;
  std::vector<Batch> batches = make_batches(windows, state.options.micro_batch);
  std::vector<WindowScore> scores(windows.size());
  if (!hooks.known.empty()) {
    if (hooks.known.size() != windows.size())
      throw InternalError(fmt::format("{} known scores for {} windows", hooks.known.size(), windows.size()));
    // A batch runs again as a whole when any of its windows is open.
    std::erase_if(batches, [&](const Batch& batch) {
      return std::all_of(batch.windows.begin(), batch.windows.end(),
                         [&](std::size_t window) { return hooks.known[window].has_value(); });
    });
    for (std::size_t w = 0; w < windows.size(); ++w)
      if (hooks.known[w]) scores[w] = *hooks.known[w];
  }
  if (batches.empty()) return scores;

  std::vector<char> computed(windows.size(), 0);  // by this rank

  // Rounds bound the hidden states that wait (streamed layers, reference) and show a broken model early instead of at
  // the end.
  const bool two = state.reference != nullptr;
  const auto replicas = static_cast<std::size_t>(grid.replicas);
  const std::int64_t batch_bytes = state.options.micro_batch * batches.front().length * state.model.config().hidden *
                                   static_cast<std::int64_t>(c10::elementSize(state.options.dtype));
  const std::int64_t fitting =
      std::max<std::int64_t>(1, state.options.hidden_bytes / std::max<std::int64_t>(1, batch_bytes));
  const bool streamed = state.options.residency == model::Residency::streamed;
  const auto per_replica = static_cast<std::size_t>(streamed ? fitting
                                                    : two    ? std::min<std::int64_t>(64, fitting)
                                                             : 64);

  model::RoundSize size(grid, streamed, state.options.micro_batch * batches.front().length);
  for (std::size_t round = 0, round_end = 0; round < batches.size(); round = round_end) {
    std::int64_t own_count = static_cast<std::int64_t>(per_replica);
    if (hooks.scored) {
      own_count = std::min(own_count, size.size());
      grid.world.broadcast(std::as_writable_bytes(std::span(&own_count, 1)));  // by rank 0's clock
    }
    const auto begun = std::chrono::steady_clock::now();
    round_end = std::min(batches.size(), round + static_cast<std::size_t>(own_count) * replicas);
    std::vector<const Batch*> own;
    std::vector<at::Tensor> ids;
    for (std::size_t b = round; b < round_end; ++b) {
      if (b % replicas != static_cast<std::size_t>(grid.replica)) continue;
      own.push_back(&batches[b]);
      ids.push_back(padded_ids(batches[b], windows));
    }
    double round_tokens = 0;  // of all replicas
    for (std::size_t b = round; b < round_end; ++b)
      for (const std::size_t window : batches[b].windows)
        round_tokens += static_cast<double>(windows[window].inputs.size());
    const auto progress = [&](double micro_batches_done) {
      if (advance) advance(micro_batches_done / static_cast<double>(own.size()) * round_tokens / (two ? 2.0 : 1.0));
    };
    std::vector<at::Tensor> reference_hidden(own.size());
    if (!own.empty()) {
      if (two) {
        model::PipelineHooks calls;
        calls.output = [&](std::int64_t index, const at::Tensor& hidden) {
          reference_hidden[static_cast<std::size_t>(index)] = hidden;
        };
        calls.progress = progress;
        state.reference->run(ids, calls);
      }
      model::PipelineHooks calls;
      calls.output = [&](std::int64_t index, const at::Tensor& hidden) {
        const auto i = static_cast<std::size_t>(index);
        for (std::size_t row = 0; row < own[i]->windows.size(); ++row) {
          const std::size_t window = own[i]->windows[row];
          const auto r = static_cast<std::int64_t>(row);
          computed[window] = 1;
          scores[window] = score_window(windows[window], hidden.select(0, r), state.model.head(),
                                        two ? reference_hidden[i].select(0, r) : at::Tensor(),
                                        two ? &state.reference->head() : nullptr, state.options.logits_bytes);
        }
        reference_hidden[i] = at::Tensor();
      };
      calls.progress = progress;
      state.model.run(ids, calls);
    }

    // Exactly one rank holds a window's score; the others add zeros, so the sum is exact.
    std::vector<std::size_t> members;
    for (std::size_t b = round; b < round_end; ++b)
      members.insert(members.end(), batches[b].windows.begin(), batches[b].windows.end());
    std::sort(members.begin(), members.end());
    std::vector<double> table;
    table.reserve(members.size() * kFields);
    for (const std::size_t w : members) {
      const bool here = computed[w] != 0;
      const WindowScore s = here ? scores[w] : WindowScore{};
      table.insert(table.end(), {static_cast<double>(s.tokens), s.loss, s.reference_loss, s.divergence,
                                 static_cast<double>(s.agreements)});
    }
    grid.world.all_reduce(table);
    for (std::size_t i = 0; i < members.size(); ++i) {
      const double* row = &table[i * kFields];
      if (!std::isfinite(row[1]) || !std::isfinite(row[2]) || !std::isfinite(row[3])) {
        const checkpoint::Reader& culprit = std::isfinite(row[2]) ? *state.model_reader : *state.reference_reader;
        throw InputError(
            fmt::format("{}: the loss of window {} of {} is not finite (NaN or infinite logits)",
                        culprit.folder().string(), members[i], what),
            "the weights or the compute dtype are at fault: try --dtype float32, or headfold inspect on the model");
      }
      scores[members[i]] = {static_cast<std::int64_t>(row[0]), row[1], row[2], row[3],
                            static_cast<std::int64_t>(row[4])};
    }
    if (hooks.scored) {
      std::vector<WindowScore> fresh;
      fresh.reserve(members.size());
      for (const std::size_t w : members) fresh.push_back(scores[w]);
      hooks.scored(members, fresh);
      size.took(std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count(), own_count);
    }
  }
  return scores;
}

Totals total(const std::vector<WindowScore>& scores) {
  Totals sum;
  for (const WindowScore& score : scores) {
    sum.tokens += score.tokens;
    sum.loss += score.loss;
    sum.reference_loss += score.reference_loss;
    sum.divergence += score.divergence;
    sum.agreements += score.agreements;
  }
  return sum;
}

}  // namespace headfold::evaluation
