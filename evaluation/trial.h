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
/// at layer l. Layers of the original stay in memory when they take less than `resident_bytes`, and are read from the
/// file each time otherwise. Scores do not depend on the rank count.
class Trial {
 public:
  /// `windows` the same on every rank, at least one. Runs the original once. Collective.
  Trial(const comm::Communicator& world, const checkpoint::Reader& reader, std::vector<Window> windows,
        at::ScalarType dtype, std::int64_t resident_bytes = std::int64_t{4} << 30);
  ~Trial();
  /// Totals of the original alone (divergence 0).
  const Totals& original() const;
  /// `replaced(layer)` returns an empty ReplacedLayer for layers that stay. Each layer is asked for once, in order, from
  /// `first_layer` (the first replaced one), on every rank; what it points to must live until the next call. Collective.
  /// Loss, KL(original || folded), agreement. InputError when a loss is not finite.
  Totals score(std::int64_t first_layer, const std::function<ReplacedLayer(std::int64_t layer)>& replaced) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace headfold::evaluation
