#pragma once
// Answers requests with a model over a process grid: continuations scored, texts generated.

#include <headfold/checkpoint/reader.h>
#include <headfold/comm/grid.h>
#include <headfold/evaluation/encoding.h>
#include <headfold/evaluation/packing.h>
#include <headfold/model/pipeline.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace headfold::evaluation {

struct ResponderOptions {
  at::ScalarType dtype = at::kFloat;
  model::Residency residency = model::Residency::resident;
  tokenizer::Bos bos = tokenizer::Bos::model_default;
  std::int64_t max_length = 0;                         ///< tokens the model reads at most; 0: harness_max_length()
  std::int64_t max_tokens = 4096;                      ///< rows of a batch; fewer where ranks would otherwise be idle
  bool share = true;                                   ///< compute common beginnings once
  std::int64_t logits_bytes = std::int64_t{64} << 20;  ///< bound on one float32 block of logits
  std::int64_t hidden_bytes = std::int64_t{1} << 30;   ///< bound on waiting hidden states per rank (streamed layers)
  std::int64_t cache_bytes = std::int64_t{2} << 30;    ///< bound on the KV cache of generation per replica
  std::int64_t most_slots = 64;                        ///< texts that are generated together at most
  double round_seconds = 10;                           ///< aimed at between two calls of `finished`
};

/// InputError naming `what` unless 1 <= new_tokens < max_length.
void check_new_tokens(const std::string& what, std::int64_t new_tokens, std::int64_t max_length);

/// What a run calls back.
struct ResponderHooks {
  /// Answers that have just become known, by index into the requests, the same on every rank; true ends the run with
  /// the rest unanswered, once any rank says so. Collective.
  std::function<bool(const std::vector<std::size_t>& indices, const std::vector<Answer>& answers)> finished;
  /// Work done since the last call over all ranks, in requests.
  std::function<void(double requests)> progress;
};

/// Continuations are scored without padding: sequences of a batch stand one after the other, and what two of them
/// begin with alike is computed once (the choices of a question, a few-shot prefix). Texts are generated greedily with
/// a KV cache, as many at a time as fit; a finished one makes room for the next at once. Log-softmax in float32, sums
/// in float64 in order of position. What is batched together depends on options and rank count; scores do not, beyond
/// rounding of the compute dtype.
class Responder {
 public:
  /// Loads the model. Collective over grid.world. `reader` and `tokenizer` must outlive the responder.
  Responder(const checkpoint::Reader& reader, const tokenizer::Tokenizer& tokenizer, const comm::Grid& grid,
            ResponderOptions options);
  ~Responder();
  /// Answers in the order of `requests`, the same on every rank; those after an early end are empty. Collective.
  /// InputError for a request that cannot be encoded, for generation that does not fit the model, and when the model
  /// gives NaN. A warning for continuations longer than the model reads.
  std::vector<Answer> answer(const std::vector<const Request*>& requests, const ResponderHooks& hooks = {}) const;
  std::vector<Answer> answer(const std::vector<Request>& requests, const ResponderHooks& hooks = {}) const;
  std::int64_t max_length() const;

  /// Tokens that went through the model since construction on this replica, without shared ones, and the tokens that
  /// the requests would have read one by one.
  struct Work {
    std::int64_t computed = 0;
    std::int64_t asked = 0;
    std::int64_t cut = 0;  ///< continuations longer than the model reads, of which only the end was scored (all ranks)
  };
  Work work() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// `text` cut at the first of each stop string in turn, as the harness does.
std::string cut_at_stops(std::string text, const std::vector<std::string>& stops);

}  // namespace headfold::evaluation
