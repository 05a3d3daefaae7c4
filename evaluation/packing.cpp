#include <headfold/base/error.h>
#include <headfold/evaluation/packing.h>

#include <algorithm>
#include <numeric>

namespace headfold::evaluation {
namespace {

/// Tokens of `next` that need no rows of their own after `before`.
std::int64_t shared_tokens(const ScoredSequence& before, const ScoredSequence& next, const PackingOptions& options) {
  if (!options.share) return 0;
  const std::int64_t common = before.common(next);
  return common >= options.shortest_shared || common == next.size() ? common : 0;
}

/// Multiplications of a batch: products with weights per row, scores and their products per pair, the head per
/// prediction.
struct CostModel {
  double per_row = 0, per_pair = 0, per_prediction = 0;
  explicit CostModel(const checkpoint::ModelConfig& config) {
    const auto table = static_cast<double>(config.vocab) * static_cast<double>(config.hidden);
    per_row = static_cast<double>(checkpoint::parameter_count(config)) - table * (config.tied_embeddings ? 1 : 2);
    per_pair = 2.0 * static_cast<double>(config.layers) * static_cast<double>(config.heads) *
               static_cast<double>(config.head_dim);
    per_prediction = table;
  }
  double of(std::int64_t start, std::int64_t tokens, std::int64_t predictions) const {
    const auto rows = static_cast<double>(tokens);
    return per_row * rows + per_pair * rows * (static_cast<double>(start) + rows / 2) +
           per_prediction * static_cast<double>(predictions);
  }
};

}  // namespace

ScoredSequence::ScoredSequence(const EncodedRequest& request, std::int64_t max_length) : request_(&request) {
  const auto context = static_cast<std::int64_t>(request.context->size());
  const auto continuation = static_cast<std::int64_t>(request.continuation.size());
  if (max_length < 1) throw InternalError(fmt::format("a sequence of at most {} tokens", max_length));
  size_ = std::min(context + continuation - 1, max_length);
  skipped_ = context + continuation - 1 - size_;
}

std::int64_t ScoredSequence::common(const ScoredSequence& other) const {
  const std::int64_t most = std::min(size_, other.size_);
  std::int64_t position = 0;
  if (request_->context == other.request_->context && skipped_ == other.skipped_)
    position = std::clamp<std::int64_t>(std::ssize(*request_->context) - skipped_, 0, most);
  while (position < most && (*this)[position] == other[position]) ++position;
  return position;
}

bool operator<(const ScoredSequence& a, const ScoredSequence& b) {
  const std::int64_t common = a.common(b);
  if (common == a.size_ || common == b.size_) return a.size_ < b.size_;
  return a[common] < b[common];
}

std::vector<BatchPlan> plan_batches(const std::vector<ScoredSequence>& sequences, const PackingOptions& options,
                                    const checkpoint::ModelConfig& config) {
  std::vector<std::size_t> order(sequences.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return sequences[a] < sequences[b]; });
  const CostModel cost(config);
  std::vector<BatchPlan> batches;
  std::int64_t limit = 0;
  for (std::size_t i = 0; i < order.size(); ++i) {
    const ScoredSequence& sequence = sequences[order[i]];
    std::int64_t shared = 0;
    bool fits = false;
    if (!batches.empty()) {
      shared = shared_tokens(sequences[order[i - 1]], sequence, options);
      const std::int64_t rows = batches.back().rows + sequence.size() - shared;
      fits = rows <= options.max_tokens || (options.share && 2 * shared > sequence.size() && rows <= limit + limit / 2);
    }
    if (!fits) {
      batches.emplace_back();
      shared = 0;
      limit = std::max(options.max_tokens, sequence.size());
    }
    BatchPlan& batch = batches.back();
    batch.members.push_back(order[i]);
    batch.rows += sequence.size() - shared;
    batch.cost += cost.of(shared, sequence.size() - shared, sequence.scored());
  }
  std::stable_sort(batches.begin(), batches.end(),
                   [](const BatchPlan& a, const BatchPlan& b) { return a.cost > b.cost; });
  return batches;
}

ScoringBatch make_batch(const BatchPlan& plan, const std::vector<ScoredSequence>& sequences,
                        const PackingOptions& options) {
  ScoringBatch batch;
  std::vector<std::int64_t> ids;
  ids.reserve(static_cast<std::size_t>(plan.rows));
  std::vector<std::int64_t> row_of;  // of every position of the sequence at hand
  for (std::size_t i = 0; i < plan.members.size(); ++i) {
    const ScoredSequence& sequence = sequences[plan.members[i]];
    const std::int64_t shared = i == 0 ? 0 : shared_tokens(sequences[plan.members[i - 1]], sequence, options);
    row_of.resize(static_cast<std::size_t>(shared));
    for (std::int64_t position = shared; position < sequence.size(); ++position) {
      row_of.push_back(std::ssize(ids));
      ids.push_back(sequence[position]);
    }
    if (sequence.size() > shared) batch.packed.segments.push_back({shared, sequence.size() - shared});
    // The token after position p is predicted there; the last one is no input.
    for (std::int64_t position = sequence.size() - sequence.scored(); position < sequence.size(); ++position)
      batch.tokens.push_back({row_of[static_cast<std::size_t>(position)], sequence[position + 1], plan.members[i]});
  }
  std::stable_sort(batch.tokens.begin(), batch.tokens.end(),
                   [](const ScoredToken& a, const ScoredToken& b) { return a.row < b.row; });
  batch.packed.ids = at::tensor(ids, at::kLong);
  return batch;
}

std::vector<int> deal(const std::vector<double>& costs, int workers) {
  std::vector<std::size_t> order(costs.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return costs[a] > costs[b]; });
  std::vector<double> load(static_cast<std::size_t>(workers), 0.0);
  std::vector<int> worker(costs.size());
  for (const std::size_t item : order) {
    const auto least = std::min_element(load.begin(), load.end());
    worker[item] = static_cast<int>(least - load.begin());
    *least += costs[item];
  }
  return worker;
}

}  // namespace headfold::evaluation
