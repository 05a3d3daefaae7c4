#pragma once
// A folded model scored without being written: the original's layers with some replaced, on a few held-out windows.

#include <headfold/checkpoint/reader.h>
#include <headfold/comm/communicator.h>
#include <headfold/evaluation/scorer.h>
#include <headfold/model/model.h>

#include <functional>
#include <map>
#include <memory>

namespace headfold::evaluation {

/// Tensors that replace or join those of one layer, by the last part of their name ("k_proj.weight"), and the layer's
/// configuration (ModelConfig of the folded model).
struct ReplacedLayer {
  const checkpoint::ModelConfig* config = nullptr;
  const std::map<std::string, at::Tensor>* tensors = nullptr;
};

/// Windows are dealt to ranks, each rank runs all layers of its own. Hidden states of the original model before every
/// layer are kept (layers x tokens x hidden values per window), so a trial that replaces layer l and later ones begins
/// at layer l; `Keep::ends` keeps only those before the first and after the last layer, for trials from layer 0. Layers
/// of the original stay in memory when they take less than `resident_bytes`, and are read from the file each time
/// otherwise. Scores do not depend on the rank count.
class Trial {
 public:
  enum class Keep { every_layer, ends };
  /// `windows` the same on every rank, at least one (InternalError). `reader` must outlive the trial. Runs the original
  /// once. Collective. InputError when a loss of the original is not finite.
  Trial(const comm::Communicator& world, const checkpoint::Reader& reader, std::vector<Window> windows,
        at::ScalarType dtype, std::int64_t resident_bytes = std::int64_t{4} << 30, Keep keep = Keep::every_layer);
  ~Trial();
  /// Totals of the original alone (divergence 0).
  const Totals& original() const;

  /// One folded model on its way through the layers: for callers that make its layers one after the other and keep
  /// none. Uses the trial, which must outlive it.
  class Run {
   public:
    /// Takes this rank's windows through the next layer: `layer`'s tensors, or the original's when it is empty. Nothing
    /// it points to is used afterwards. Not collective. InternalError after the last layer.
    void advance(const ReplacedLayer& layer);
    /// Takes them through the remaining layers of the original. Loss, KL(original || folded), agreement. Collective;
    /// once. InputError, on every rank, when a loss is not finite.
    Totals finish();

   private:
    friend class Trial;
    Run(const Trial& trial, std::int64_t first_layer);
    const Trial* trial_;
    std::int64_t next_;
    std::vector<at::Tensor> hidden_;  // by own window
  };
  /// InternalError for a layer whose hidden states were not kept.
  Run begin(std::int64_t first_layer) const;

  /// begin(), advance() and finish() in one: `replaced(layer)` returns an empty ReplacedLayer for layers that stay.
  /// Each layer is asked for once, in order, from `first_layer` (the first replaced one), on every rank, also on those
  /// without a window; what it points to must live until the next call. Collective.
  Totals score(std::int64_t first_layer, const std::function<ReplacedLayer(std::int64_t layer)>& replaced) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace headfold::evaluation
