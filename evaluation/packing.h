#pragma once
// Which continuations are scored in one pass, and how their common beginnings are computed once.

#include <headfold/evaluation/encoding.h>
#include <headfold/model/pipeline.h>

#include <cstdint>
#include <span>
#include <vector>

namespace headfold::evaluation {

/// What a log-likelihood request is to the model: it reads the last `max_length` + 1 tokens of context and continuation
/// without the last one, and its predictions at the last positions are the continuation's. Of a continuation longer
/// than `max_length`, which the harness refuses, the last `max_length` tokens are scored.
class ScoredSequence {
 public:
  /// `request` must outlive it. InternalError unless `max_length` is at least 1.
  ScoredSequence(const EncodedRequest& request, std::int64_t max_length);
  std::int64_t size() const { return size_; }  ///< tokens read
  std::int64_t scored() const { return std::min<std::int64_t>(std::ssize(request_->continuation), size_); }
  std::int64_t context_tokens() const { return size_ + 1 - scored(); }  ///< after truncation from the left
  std::int32_t operator[](std::int64_t position) const {
    const std::int64_t at = position + skipped_;
    const auto context = static_cast<std::int64_t>(request_->context->size());
    return at < context ? (*request_->context)[static_cast<std::size_t>(at)]
                        : request_->continuation[static_cast<std::size_t>(at - context)];
  }
  /// Tokens that both read at their beginning.
  std::int64_t common(const ScoredSequence& other) const;

 private:
  friend bool operator<(const ScoredSequence& a, const ScoredSequence& b);
  const EncodedRequest* request_;
  std::int64_t skipped_ = 0;  // tokens cut off on the left
  std::int64_t size_ = 0;
};
/// Order of the tokens they read, so that sequences with the same beginning stand together.
bool operator<(const ScoredSequence& a, const ScoredSequence& b);

struct PackingOptions {
  std::int64_t max_tokens = 4096;     ///< rows of a batch (a single sequence may have more)
  bool share = true;                  ///< compute common beginnings once
  std::int64_t shortest_shared = 16;  ///< beginnings shorter than this are computed again
};

/// Requests that go through the model together: indices into the list of sequences, in order of their tokens.
struct BatchPlan {
  std::vector<std::size_t> members;
  std::int64_t rows = 0;
  double cost = 0;  ///< multiplications, about
};
/// Every sequence in one batch, the costliest batches first. With `share`, sequences that continue more than half of
/// what came before may exceed max_tokens by half of it, so that questions are not torn apart.
std::vector<BatchPlan> plan_batches(const std::vector<ScoredSequence>& sequences, const PackingOptions& options,
                                    const checkpoint::ModelConfig& config);

/// A prediction that is asked for.
struct ScoredToken {
  std::int64_t row = 0;    ///< of the batch
  std::int64_t token = 0;  ///< the id whose probability counts
  std::size_t sequence = 0;
};
struct ScoringBatch {
  model::PackedBatch packed;
  std::vector<ScoredToken> tokens;  ///< by row; those of one sequence in order of position
};
ScoringBatch make_batch(const BatchPlan& plan, const std::vector<ScoredSequence>& sequences,
                        const PackingOptions& options);

/// Deals work of different cost to `workers`: each item, costliest first, to the least loaded. Gives every item's
/// worker.
std::vector<int> deal(const std::vector<double>& costs, int workers);

}  // namespace headfold::evaluation
