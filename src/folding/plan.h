#pragma once
// A fold is planned (what will be merged with what, how, at which predicted loss), then applied (new weights).
// The plan is a JSON file that a person can read and edit; bases are a pure function of plan, statistics and weights
// and are recomputed by apply.

#include <headfold/base/json.h>
#include <headfold/calibration/statistics.h>
#include <headfold/checkpoint/reader.h>
#include <headfold/comm/communicator.h>

#include <string>
#include <vector>

namespace headfold::folding {

class KeptBases;  // bases.h

enum class KeyFold { meanpool, procrustes, norope, post_rotation, rope_commuting, latent };
enum class ValueFold { meanpool, procrustes, svd };
/// methods.md 3.1. Keys: weights, act, act+query, act+query+dist. Values: weights, act, act+out, attn+out.
enum class Metric { weights, act, act_query, act_query_dist, act_out, attn_out };
/// Which source heads share one head of the result (methods.md 8).
enum class Grouping { contiguous, search };
/// How the budget is spread over layers (methods.md 9): the same everywhere; LoRC's reconstructed rule on widths; KV
/// heads per layer by predicted losses times measured exchange rates, greedily or exactly.
enum class Allocation { uniform, lorc_progressive, greedy, dp };

/// FoldOptions::slow_band: as many pairs as turn by less than half a radian over the context (methods.md 6.1.3).
inline constexpr std::int64_t kSlowBandAuto = -1;

KeyFold parse_key_fold(const std::string& name);  ///< UsageError lists the names
ValueFold parse_value_fold(const std::string& name);
Metric parse_metric(const std::string& name);
Grouping parse_grouping(const std::string& name);
Allocation parse_allocation(const std::string& name);
std::string name_of(KeyFold);
std::string name_of(ValueFold);
std::string name_of(Metric);
std::string name_of(Grouping);
std::string name_of(Allocation);

struct FoldOptions {
  KeyFold keys = KeyFold::rope_commuting;
  Metric key_metric = Metric::act_query;
  ValueFold values = ValueFold::svd;
  Metric value_metric = Metric::act;
  std::int64_t kv_heads = 0;  ///< KV heads of the result; allocations by layer: their mean
  double sink_weight = 1.0;   ///< w_sink of methods.md 2.1
  double mean_weight = 1.0;   ///< rho of methods.md 2.1, where it is a choice: keys under RoPE, values
  double weight_ridge = 0.0;
  std::int64_t slow_band = 0;  ///< slowest RoPE pairs folded without rotation (rope-commuting); kSlowBandAuto
  std::int64_t polish = 0;     ///< sweeps of alternating least squares after the closed form (rope-commuting, attn+out)
  std::int64_t context = 0;    ///< tokens, for slow_band auto and distance laws; 0: the calibration sequences' length
  std::int64_t latent_groups = 0;  ///< `latent`: latents per layer, each of kv_heads * head_dim / latent_groups
                                   ///< channels; 0: kv_heads
  std::int64_t min_width = 0;      ///< lorc-progressive: narrowest latent in channels (0: an eighth of the widest)
  std::int64_t max_width = 0;      ///< lorc-progressive: widest latent in channels (0: the uniform width)
  Grouping grouping = Grouping::contiguous;
  Allocation allocation = Allocation::uniform;
  bool refit = false;  ///< the output projection is fitted again to the folded model's own inputs (refit.h)
};

/// Predicted loss of one group of one layer.
struct GroupPlan {
  std::vector<std::int64_t> kv_heads;  ///< source KV heads merged into one
  double key_loss = 0, key_total = 0;  ///< J and tr F of the key kernel
  double value_loss = 0, value_total = 0;
  /// Cumulative share of singular-value energy: point i of n (i = 1 .. n, n = min(64, channels)) is what the first
  /// ceil(i * channels / n) of the group's channels (group size * head_dim) keep, in the order in which the fold keeps
  /// them. A merge to one head keeps head_dim channels.
  std::vector<double> key_energy, value_energy;
  /// Relative losses on one half of the calibration sequences of a basis fitted to the other half, and of the same
  /// basis on its own half (statistics with half samples; negative: unknown).
  double key_held_out = -1, key_fitted = -1, value_held_out = -1, value_fitted = -1;
  /// `rope-commuting`, per frequency: ||Im A_l|| / ||A_l|| and lambda_1 / tr A_l (methods.md 6.1.2); else empty.
  std::vector<double> imaginary_share, leading_share;
  /// Spectral condition of the key and value Grams after truncation, and what share of their directions was dropped.
  double key_condition = 0, value_condition = 0, key_dropped = 0, value_dropped = 0;
};
struct LayerPlan {
  std::int64_t layer = 0;
  std::int64_t key_width = 0, value_width = 0;  ///< channels cached per group: head_dim but for `latent`
  std::vector<GroupPlan> groups;                ///< as many as the layer keeps KV heads (or latents)
  /// Sum of losses over sum of totals; 0 when the total is 0.
  double key_relative_loss() const;
  double value_relative_loss() const;
  /// Means over groups weighted by totals; negative when unknown.
  double key_held_out() const;
  double key_fitted() const;
  double value_held_out() const;
  double value_fitted() const;
};
struct Plan {
  FoldOptions options;
  std::string model_hash, statistics_hash;  ///< statistics_hash is empty when no statistics were used
  std::vector<LayerPlan> layers;
  OrderedJson decisions;  ///< how groups and budget were chosen, for people: search costs, exchange rates, widths
};

/// What a layer is folded to. `key_width` and `value_width` are channels cached per group.
struct LayerTarget {
  std::vector<std::vector<std::int64_t>> groups;
  std::int64_t key_width = 0, value_width = 0;
};

/// Groups of one layer, in output order.
using Groups = std::vector<std::vector<std::int64_t>>;
/// 0 .. g-1, g .. 2g-1, … : `kv_heads` groups of equal size.
Groups contiguous_groups(std::int64_t source_kv_heads, std::int64_t kv_heads);
/// Throws InputError naming `what` unless `groups` is a partition of 0 .. source_kv_heads-1 into `kv_heads` groups of
/// equal size; with `in_order` (ALiBi: slopes belong to head numbers) only contiguous_groups() passes.
void check_groups(const Groups& groups, std::int64_t source_kv_heads, std::int64_t kv_heads, bool in_order,
                  const std::string& what);

/// Whether the fold's metrics need calibration statistics.
bool needs_statistics(const FoldOptions& options);
/// Throws UsageError naming the legal choices when fold, metric or kv_heads do not suit the model, InputError when the
/// model itself cannot be folded.
void check_options(const FoldOptions& options, const checkpoint::ModelConfig& config);
/// Mean pooling has no metric of its own: its loss is reported in the strongest one the statistics allow.
FoldOptions with_effective_metrics(FoldOptions options, bool has_statistics);
/// Cache layout of the result.
checkpoint::KvLayout layout_of(const FoldOptions& options);
/// Whether a stock Hugging Face loader reads the result.
bool is_stock(const FoldOptions& options, const checkpoint::ModelConfig& config);

/// Channels of one latent (or merged head) when all layers are alike: head_dim but for `latent` with latent_groups.
std::int64_t latent_width(const FoldOptions& options, std::int64_t head_dim);
/// Every layer alike: contiguous groups; head_dim channels, or `latent`'s width. Allocation::lorc_progressive,
/// Grouping::search and budgets by layer are decided by their own functions (budget.h, grouping.h).
std::vector<LayerTarget> uniform_targets(const FoldOptions& options, const checkpoint::ModelConfig& config);
/// Throws UsageError or InputError naming `what` and the layer unless every layer's groups partition its source heads
/// evenly and the widths suit the layout.
void check_targets(const std::vector<LayerTarget>& targets, const FoldOptions& options,
                   const checkpoint::ModelConfig& config, const std::string& what);

/// Plans a fold: losses and energies of every group, work items (layer x group) spread over `world` in blocks.
/// `statistics` may be null when needs_statistics() is false. `targets` holds one entry per layer; empty means
/// uniform_targets(). With `held_out`, and statistics that keep half samples, bases are also fitted to one half and
/// priced on the other. Bases go to `keep` for apply_plan() when it is given. Collective; every rank gets the same
/// plan, bit by bit the same at any rank and thread count. Throws UsageError / InputError as check_options() and
/// check_targets(); InputError when the statistics are those of another model.
Plan make_plan(const comm::Communicator& world, const checkpoint::Reader& reader,
               const calibration::StatisticsFile* statistics, FoldOptions options,
               const std::vector<LayerTarget>& targets = {}, bool held_out = false, KeptBases* keep = nullptr);
/// What a plan folds every layer to.
std::vector<LayerTarget> targets_of(const Plan& plan);
/// What every layer of the result caches.
std::vector<checkpoint::LayerShape> shapes_of(const std::vector<LayerTarget>& targets);

/// "fold" object of headfold.json and plan.json.
OrderedJson to_json(const FoldOptions& options);
/// The inverse, without kv_heads, which stands beside it. InputError naming the file.
FoldOptions options_from_json(const Json& fold, const std::string& file);
OrderedJson to_json(const GroupPlan& group);
GroupPlan group_from_json(const Json& item, const std::string& where);
OrderedJson to_json(const Plan& plan);
/// Throws InputError naming the file and what is wrong (unknown fold, group that is no partition, …).
Plan plan_from_json(const Json& json, const std::string& file);

/// Legal targets for this model: divisors of its KV heads, ascending; for stock BLOOM, which has no split form with all
/// its heads, less that number itself.
std::vector<std::int64_t> legal_kv_heads(const checkpoint::ModelConfig& config);

}  // namespace headfold::folding
