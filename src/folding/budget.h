#pragma once
// How many KV heads, or latent channels, each layer keeps (methods.md 7, 9).

#include <headfold/comm/communicator.h>
#include <headfold/folding/bases.h>

#include <array>
#include <functional>

namespace headfold::folding {

/// What a layer may keep and what that costs: choice i keeps heads[i] KV heads at cost[i]; heads ascending.
struct LayerChoices {
  std::vector<std::int64_t> heads;
  std::vector<double> cost;
};
/// Heads per layer with a sum of at most `budget` and the least total cost; among equals the fewest heads. Exact
/// (dynamic programming over the budget). UsageError when not even the smallest choices fit; InternalError for choices
/// that are empty, not ascending or have costs that are not finite.
std::vector<std::int64_t> allocate_exactly(const std::vector<LayerChoices>& layers, std::int64_t budget);
/// The same by marginal gain per head, starting from the smallest choices; ties go to the earlier layer.
std::vector<std::int64_t> allocate_greedily(const std::vector<LayerChoices>& layers, std::int64_t budget);
/// Cost of an allocation. InternalError when a layer has no such choice.
double cost_of(const std::vector<LayerChoices>& layers, const std::vector<std::int64_t>& heads);

/// LoRC's progressive widths from cumulative condition numbers: the *reconstructed* rule of methods.md 7, not a quoted
/// one. `log_condition` per layer: log kappa(W_K) + log kappa(W_V). Widths are multiples of `step` within [min_width,
/// max_width]; equal products give max_width everywhere. UsageError when no multiple of step lies in that range.
std::vector<std::int64_t> progressive_widths(const std::vector<double>& log_condition, std::int64_t min_width,
                                             std::int64_t max_width, std::int64_t step);
/// log(sigma_max / sigma_min) of a matrix [rows, columns], sigma_min (of min(rows, columns) of them) clamped at 1e-12
/// sigma_max; float64. 0 for a zero matrix; NumericalError for NaN or Inf.
double log_condition(const at::Tensor& matrix);
/// Per layer log kappa(W_K) + log kappa(W_V), layers spread over `world`. Collective; the same on every rank.
std::vector<double> log_conditions(const comm::Communicator& world, const checkpoint::Reader& reader);

/// LoRC (methods.md 7): what every layer is folded to. Options: latent_groups latents per layer (0: one over all heads,
/// LoRC's own), uniform widths kv_heads * head_dim / latents, or Allocation::lorc_progressive between min_width and
/// max_width. `report` receives, per layer, widths, logarithms of the condition numbers and the share of squared
/// singular values of W_K and W_V that is kept, for Plan::decisions. Weights only: no statistics. Layers spread over
/// `world`; collective, the same on every rank at any rank count. UsageError for widths beyond the heads' channels.
std::vector<LayerTarget> lorc_targets(const comm::Communicator& world, const checkpoint::Reader& reader,
                                      const FoldOptions& options, OrderedJson* report = nullptr);

/// Relative key and value losses (key loss / key total, value loss / value total, summed over groups) of every layer at
/// every number of heads that divides the source's.
struct LossTable {
  std::vector<std::int64_t> heads;                       ///< ascending, source KV heads last (which lose nothing)
  std::vector<std::vector<std::array<double, 2>>> loss;  ///< [layer][choice] -> {key, value}
};
/// Contiguous groups, or `groups_of(layer, heads)` when given (the same on every rank); work items (layer x choice)
/// spread over `world`. Collective; the same on every rank, at any rank and thread count.
LossTable loss_table(const comm::Communicator& world, const checkpoint::Reader& reader,
                     const calibration::StatisticsFile* statistics, const FoldOptions& options,
                     const std::function<Groups(std::int64_t layer, std::int64_t heads)>& groups_of = {});

/// KL divergence from the original of the model in which one part of one layer alone is folded, nats per token.
using Probe = std::function<double(std::int64_t layer, Part part)>;
/// rates[layer] = {KL per relative key loss, KL per relative value loss}, measured at `reference` heads (an entry of
/// table.heads): probe(layer, part) / loss. Probes (layer x part) are spread over `world`; a probe that is itself
/// collective wants Communicator::self() here. A part that loses nothing has rate 0; negative KLs (noise) count as 0.
/// Collective; the same on every rank. NumericalError when a probe is not finite.
std::vector<std::array<double, 2>> exchange_rates(const comm::Communicator& world, const LossTable& table,
                                                  std::int64_t reference, const Probe& probe);
/// Rates at every choice: KL is not proportional to the predicted loss (a layer folded to one head costs more than its
/// loss at half the heads suggests), so each choice is probed at its own number of heads. probe(layer, part, heads);
/// the source's own number of heads costs nothing and is not probed. [choice][layer]. Otherwise as exchange_rates().
using ChoiceProbe = std::function<double(std::int64_t layer, Part part, std::int64_t heads)>;
std::vector<std::vector<std::array<double, 2>>> exchange_rates_by_choice(const comm::Communicator& world,
                                                                         const LossTable& table,
                                                                         const ChoiceProbe& probe);
/// Cost of a layer at n heads with that choice's rates.
std::vector<LayerChoices> choices(const LossTable& table,
                                  const std::vector<std::vector<std::array<double, 2>>>& rates_by_choice);
/// Cost of a layer at n heads: rates[layer][0] * key loss + rates[layer][1] * value loss, a prediction of the KL.
std::vector<LayerChoices> choices(const LossTable& table, const std::vector<std::array<double, 2>>& rates);

/// Contiguous groups of every layer at its number of heads.
std::vector<LayerTarget> targets_for(const std::vector<std::int64_t>& heads, const checkpoint::ModelConfig& config);
/// How heads were dealt, for Plan::decisions: rates, heads, predicted KL of this allocation and of the uniform one.
OrderedJson budget_report(const LossTable& table, const std::vector<std::array<double, 2>>& rates,
                          const std::vector<std::int64_t>& heads, Allocation allocation);
OrderedJson budget_report(const LossTable& table,
                          const std::vector<std::vector<std::array<double, 2>>>& rates_by_choice,
                          const std::vector<std::int64_t>& heads, Allocation allocation);
/// Refusal for configurations that know one number of KV heads: UsageError naming the layers that differ.
void check_even_budget(const std::vector<std::int64_t>& heads);

}  // namespace headfold::folding
