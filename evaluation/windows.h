#pragma once
// Token windows: what a model reads and which of its predictions count.

#include <cstdint>
#include <vector>

namespace headfold::evaluation {

/// A model reads `inputs` from position 0; its predictions at the last targets.size() positions are scored against
/// `targets`.
struct Window {
  std::int64_t document = 0;         ///< index of the document it came from
  std::vector<std::int64_t> inputs;  ///< at least as long as targets
  std::vector<std::int64_t> targets;
};

/// Cuts a stream into consecutive blocks of `length` tokens (>= 2) and drops the remainder. Within a block every token
/// but the first is predicted from those before it: length - 1 predictions (the papers' perplexity). `document` is the
/// block's index.
std::vector<Window> block_windows(const std::vector<std::int64_t>& stream, std::int64_t length);

/// The harness's rolling windows with a context of one token: every token of `ids` is predicted exactly once. The first
/// window reads `prefix` first; the last, short window is filled up to `max_length` inputs with the tokens before it.
/// No window for an empty list.
std::vector<Window> rolling_windows(const std::vector<std::int64_t>& ids, std::int64_t prefix, std::int64_t max_length,
                                    std::int64_t document = 0);

}  // namespace headfold::evaluation
