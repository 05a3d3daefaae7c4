#pragma once
// Closed-form refits from two streams (methods.md 4.4): the folded model's inputs, the original model's outputs, layer
// by layer, data-parallel.

#include <headfold/comm/communicator.h>
#include <headfold/folding/apply.h>

#include <functional>

namespace headfold::folding {

struct RefitOptions {
  double ridge = 1e-3;           ///< eps as a share of the mean diagonal of E[y' y'^T]; pulls towards the absorbed W_O
  double held_out_share = 0.25;  ///< of the sequences, to decide whether a layer's refit is kept
  std::int64_t chunks = 8;       ///< sequences are summed in so many fixed parts, so that sums do not depend on ranks
};

/// What the refit of one layer did.
struct LayerRefit {
  std::int64_t layer = 0;
  double error_before = 0, error_after = 0;        ///< relative squared error of the target, fitted part
  double held_out_before = 0, held_out_after = 0;  ///< the same on the held-out part
  bool kept = false;                               ///< whether the held-out error fell
  double condition = 0;                            ///< of E[y' y'^T] + eps I
};

/// All folded tensors of one layer by the last part of their name, float64 (folded_keys and folded_values merged).
using LayerTensors = NewTensors;

/// Runs the original and the folded model side by side over `sequences` [samples, tokens] (the same on every rank,
/// dealt to ranks), one layer of each in memory at a time, and replaces the output projection (and its bias) of every
/// folded layer by the least-squares map from the folded stream's head outputs to the original stream's target.
/// `folded(layer)` gives the layer's folded tensors; `done(layer, tensors, report)` receives them with the refitted
/// output projection, in order of layers, the same on every rank, bit by bit the same at any rank count. Collective.
void refit_layers(const comm::Communicator& world, const checkpoint::Reader& reader,
                  const checkpoint::ModelConfig& folded_config, const at::Tensor& sequences,
                  const RefitOptions& options, const std::function<LayerTensors(std::int64_t layer)>& folded,
                  const std::function<void(std::int64_t layer, const LayerTensors&, const LayerRefit&)>& done);

}  // namespace headfold::folding
