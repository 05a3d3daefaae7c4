#pragma once
// Closed-form refits from two streams (methods.md 4.4): the folded model's inputs, the original model's outputs, layer
// by layer, data-parallel.

#include <headfold/base/json.h>
#include <headfold/comm/communicator.h>
#include <headfold/folding/apply.h>

#include <functional>
#include <string>
#include <vector>

namespace headfold::folding {

/// What the attention block of the folded stream is fitted to.
enum class RefitTarget {
  attention,  ///< the original attention output: o = W_O y + b
  stream      ///< o + (original residual stream before the layer - folded one): repairs what upstream layers left, too
};

struct RefitOptions {
  /// Candidates for eps, as shares of the mean diagonal of E[y' y'^T]; it pulls towards the absorbed W_O, and the one
  /// with the smallest held-out error is taken, layer by layer.
  std::vector<double> ridges = {1e-4, 1e-3, 1e-2, 1e-1};
  double held_out_share = 0.25;  ///< of the sequences, to choose eps and to decide whether a layer's refit is kept
  std::int64_t chunks = 64;      ///< sequences are summed in so many fixed parts, so that sums do not depend on ranks
  RefitTarget target = RefitTarget::stream;
  bool output = true;  ///< refit W_O (and its bias, where the model has one)
  bool down = false;   ///< refit the MLP's down projection to the original stream after the layer
  /// Refit W_Q (and its bias) so that attention rows stay as they were, before W_O.
  bool queries = true;
  /// Then so many times W_K and W_Q again (layout gqa only; needs `queries`).
  std::int64_t key_sweeps = 2;
  double score_ridge = 0.02;     ///< of the queries' and keys' normal equations, as a share of their mean eigenvalue
  std::int64_t score_rows = 32;  ///< attention rows (and columns) of every sequence and head that these look at
  /// Per layer: the original query head that each folded query head stands for; empty where grouping moved none.
  std::vector<std::vector<std::int64_t>> query_heads;
};

/// RefitOptions::query_heads of these groups: empty when no layer moves heads.
std::vector<std::vector<std::int64_t>> query_order(const std::vector<LayerTarget>& targets,
                                                   const checkpoint::ModelConfig& config);

/// What the refit of one matrix did. Errors are shares of the target's energy; for queries and keys they are
/// KL(original || folded) of attention rows in nats, mean over the held-out sequences' tokens and all heads.
struct PartRefit {
  std::string part;                          ///< last part of the name: "o_proj", "dense", "down_proj", "q_proj", …;
                                             ///< "k_proj + q_proj": one sweep over both
  double error_before = 0, error_after = 0;  ///< over all sequences; after: with the matrix that was kept
  /// Over the held-out sequences; after: with a matrix fitted to the others alone (kept matrices are then fitted to all
  /// sequences).
  double held_out_before = 0, held_out_after = 0;
  bool divergence = false;  ///< errors are divergences in nats (queries, keys), not shares of energy
  bool kept = false;        ///< whether the held-out error fell
  double ridge = 0;         ///< chosen candidate
  double condition = 0;     ///< of E[y' y'^T] + eps I
};
/// What the refit of one layer did: its output projection, and the other matrices in the order in which they were
/// fitted.
struct LayerRefit : PartRefit {
  std::int64_t layer = 0;
  std::vector<PartRefit> others;
  /// Energy of (folded - original) residual stream after the layer as a share of the original's, all sequences.
  double stream_error = 0;
};

/// Last parts of the names of the tensors that refit_layers() hands back in every layer besides what `folded` gave.
std::vector<std::string> refitted_tensors(const checkpoint::ModelConfig& folded_config, const RefitOptions& options);

/// "refit" objects of headfold.json: options (without query_heads), and what was done to one layer.
OrderedJson to_json(const RefitOptions& options);
OrderedJson to_json(const LayerRefit& report);

/// All folded tensors of one layer by the last part of their name, float64 (folded_keys and folded_values merged).
using LayerTensors = NewTensors;

/// Runs the original and the folded model side by side over `sequences` [samples, tokens] (the same on every rank,
/// dealt to ranks), one layer of each in memory at a time, and replaces the output projection (and its bias) of every
/// folded layer by the least-squares map from the folded stream's head outputs to the original stream's target.
/// `folded(layer)` gives the layer's folded tensors; `done(layer, tensors, report)` receives them with the refitted
/// matrices (also those the fold itself left alone: "o_proj.weight", "down_proj.weight", …; they hold values of the
/// stored dtype), in order of layers, the same on every rank, bit by bit the same at any rank and thread count.
/// Activations are float32; every rank keeps three hidden states per token of its sequences (original and folded
/// stream, target): samples / ranks * tokens * hidden * 12 bytes; the refit of queries adds the folded layer's
/// input and the original queries and keys: two to three more. Works for every KV layout. Collective. UsageError for
/// options out of range; InputError for too few sequences and activations that are not finite; warns when there are
/// fewer than four tokens per unknown of a row.
void refit_layers(const comm::Communicator& world, const checkpoint::Reader& reader,
                  const checkpoint::ModelConfig& folded_config, const at::Tensor& sequences,
                  const RefitOptions& options, const std::function<LayerTensors(std::int64_t layer)>& folded,
                  const std::function<void(std::int64_t layer, const LayerTensors&, const LayerRefit&)>& done);

}  // namespace headfold::folding
