#pragma once
// Scores windows with one model, or with two at once for their divergence, over a process grid.

#include <headfold/checkpoint/reader.h>
#include <headfold/comm/grid.h>
#include <headfold/evaluation/windows.h>
#include <headfold/model/pipeline.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace headfold::evaluation {

/// Sums over the scored predictions of one window, float64.
struct WindowScore {
  std::int64_t tokens = 0;
  double loss = 0;              ///< -log likelihood in nats
  double reference_loss = 0;    ///< the reference model's, 0 without one
  double divergence = 0;        ///< sum of KL(reference || model) in nats, 0 without a reference
  std::int64_t agreements = 0;  ///< predictions where both models' most likely token is the same
};

/// Scores one window from its final hidden states [tokens, hidden], and the reference's (null: none), in blocks of
/// positions whose logits stay below `logits_bytes`: log-softmax in float32, sums in float64 in order of position.
WindowScore score_window(const Window& window, const at::Tensor& hidden, const model::Head& head,
                         const at::Tensor& reference_hidden, const model::Head* reference, std::int64_t logits_bytes);

struct ScorerOptions {
  std::int64_t micro_batch = 1;  ///< windows that go through the model together
  at::ScalarType dtype = at::kFloat;
  at::ScalarType reference_dtype = at::kFloat;
  model::Residency residency = model::Residency::resident;
  std::int64_t logits_bytes =
      std::int64_t{64} << 20;  ///< bound on one float32 block of logits [positions, vocab] (at least one position)
  std::int64_t hidden_bytes = std::int64_t{1}
                              << 30;  ///< bound on hidden states kept per rank (streamed layers, reference)
};

/// For scoring that may be interrupted and go on.
struct ScoreHooks {
  /// Scores that are known, by window: those windows are not run again. Empty: none.
  std::vector<std::optional<WindowScore>> known;
  /// Called on every rank after each round of micro-batches, with the windows (ascending) whose scores have become
  /// known and their scores, the same everywhere. May throw, on every rank alike. Rounds then take a few seconds.
  std::function<void(const std::vector<std::size_t>& windows, const std::vector<WindowScore>& scores)> scored;
};

/// Micro-batches are formed from the whole list of windows (longest first, then by index) and dealt to replicas in
/// turn, so what is computed together, and with it every bit of every score, does not depend on the number of ranks.
/// The head and the loss run window by window in bounded blocks of positions: log-softmax in float32, sums in float64
/// in order of position.
class Scorer {
 public:
  /// Collective over grid.world. `reference` may be null. Throws InputError when the two vocabularies differ.
  Scorer(const checkpoint::Reader& model, const checkpoint::Reader* reference, const comm::Grid& grid,
         ScorerOptions options);
  ~Scorer();
  /// Scores in the order of `windows`, the same on every rank. Collective. `what` names the task for messages and
  /// progress. `advance` is called on every rank with the input tokens just finished over all replicas (estimated).
  /// Throws InputError on every rank, naming model and window, for a loss that is not finite.
  /// Known scores (hooks) change no bit of the others: what is computed together stays the same.
  std::vector<WindowScore> score(const std::vector<Window>& windows, const std::string& what,
                                 const std::function<void(double)>& advance = {}, const ScoreHooks& hooks = {}) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// What a task reports, from the scores of its windows in order.
struct Totals {
  std::int64_t tokens = 0;
  double loss = 0;            ///< sum, nats
  double reference_loss = 0;  ///< sum, nats
  double divergence = 0;      ///< sum, nats
  std::int64_t agreements = 0;
  double mean_loss() const { return loss / static_cast<double>(tokens); }
  double mean_reference_loss() const { return reference_loss / static_cast<double>(tokens); }
  double mean_divergence() const { return divergence / static_cast<double>(tokens); }
  double agreement() const { return static_cast<double>(agreements) / static_cast<double>(tokens); }
};
Totals total(const std::vector<WindowScore>& scores);

}  // namespace headfold::evaluation
