#pragma once
// What a benchmark asks of a model: continuations to score and texts to generate, by document.

#include <fmt/format.h>

#include <cstdint>
#include <string>
#include <vector>

namespace headfold::evaluation {

enum class RequestType { log_likelihood, generation };

/// One question to the model. Strings, not tokens: how they are encoded is the harness's pair encoding
/// (docs/evaluation.md), the same for every task.
struct Request {
  RequestType type = RequestType::log_likelihood;
  std::int64_t document = 0;  ///< index into the task's evaluated documents
  std::int64_t index = 0;     ///< of this request within its document: the choice
  std::string context;
  std::string continuation;         ///< log_likelihood only; brings its own leading space
  std::vector<std::string> stops;   ///< generation only: the task's stop strings, in order; the end of text is added
  std::int64_t max_new_tokens = 0;  ///< generation only
  std::string source = {};  ///< for messages: the task, and where in which file the document stands; may be empty
};

/// What messages call a request: "request 2 of document 7", after its source; both are counted from 0.
inline std::string name_of(const Request& request) {
  return fmt::format("{}{}request {} of document {}", request.source, request.source.empty() ? "" : ": ", request.index,
                     request.document);
}

/// What the model said, in the order of the requests.
struct Answer {
  double log_likelihood = 0;        ///< sum over the continuation's tokens, nats (log-softmax in float32)
  bool greedy = false;              ///< every token of the continuation was the most likely one
  std::int64_t scored_tokens = 0;   ///< of the continuation, or generated
  std::int64_t context_tokens = 0;  ///< that the model read before them, after truncation from the left
  std::string text;                 ///< generation only: without the stop string and what follows it
};

}  // namespace headfold::evaluation
