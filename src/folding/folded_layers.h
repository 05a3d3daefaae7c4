#pragma once
// Folded layers one after the other, the folding spread over ranks.

#include <headfold/base/error.h>
#include <headfold/comm/communicator.h>
#include <headfold/folding/apply.h>

#include <functional>

namespace headfold::folding {

/// An error that every rank of a group knows of: all of them throw, none waits.
class AgreedError : public InputError {
 public:
  using InputError::InputError;
};

/// Gives every rank every layer: each rank folds one layer of each run of `ranks` layers and sends it to the others.
/// Holds one layer of its own, float64.
class FoldedLayers {
 public:
  /// `fold` gives all tensors of one layer in float64 (folded_layer()); it is called for a rank's own layers only.
  FoldedLayers(comm::Communicator world, std::int64_t layers, std::function<NewTensors(std::int64_t layer)> fold)
      : world_(std::move(world)), layers_(layers), fold_(std::move(fold)) {}
  /// Layers 0, 1, … in order. Collective; the same bytes on every rank. Where `fold` fails its error is thrown; the
  /// other ranks throw AgreedError with its message.
  NewTensors operator()(std::int64_t layer);

 private:
  void fold_own(std::int64_t layer);
  comm::Communicator world_;
  std::int64_t layers_;
  std::function<NewTensors(std::int64_t layer)> fold_;
  NewTensors own_;
};

}  // namespace headfold::folding
