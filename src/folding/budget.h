#pragma once
// How many KV heads, or latent channels, each layer keeps (methods.md 7, 9).

#include <headfold/comm/communicator.h>
#include <headfold/folding/bases.h>

namespace headfold::folding {

/// What a layer may keep and what that costs: choice i keeps heads[i] KV heads at cost[i]; heads ascending.
struct LayerChoices {
  std::vector<std::int64_t> heads;
  std::vector<double> cost;
};
/// Heads per layer with a sum of at most `budget` and the least total cost. Exact (dynamic programming over the
/// budget). UsageError when not even the smallest choices fit.
std::vector<std::int64_t> allocate_exactly(const std::vector<LayerChoices>& layers, std::int64_t budget);
/// The same by marginal gain per head, starting from the smallest choices.
std::vector<std::int64_t> allocate_greedily(const std::vector<LayerChoices>& layers, std::int64_t budget);

/// LoRC's progressive widths from cumulative condition numbers: the *reconstructed* rule of methods.md 7, not a quoted
/// one. `log_condition` per layer: log kappa(W_K) + log kappa(W_V). Widths are multiples of `step` within [min_width,
/// max_width]; equal products give max_width everywhere.
std::vector<std::int64_t> progressive_widths(const std::vector<double>& log_condition, std::int64_t min_width,
                                             std::int64_t max_width, std::int64_t step);
/// log(sigma_max / sigma_min) of a matrix [rows, columns], sigma_min clamped at 1e-12 sigma_max; float64.
double log_condition(const at::Tensor& matrix);
/// Per layer log kappa(W_K) + log kappa(W_V), layers spread over `world`. Collective; the same on every rank.
std::vector<double> log_conditions(const comm::Communicator& world, const checkpoint::Reader& reader);

/// Relative key and value losses (key loss / key total, value loss / value total, summed over groups) of every layer at
/// every legal number of heads, contiguous groups or `groups_of(layer, heads)` when given; layers spread over `world`.
/// Collective; the same on every rank: [layer][choice] -> {key, value}.
struct LossTable {
  std::vector<std::int64_t> heads;                       ///< ascending, source KV heads last
  std::vector<std::vector<std::array<double, 2>>> loss;  ///< [layer][choice]
};
LossTable loss_table(const comm::Communicator& world, const checkpoint::Reader& reader,
                     const calibration::StatisticsFile* statistics, const FoldOptions& options);

}  // namespace headfold::folding
