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

enum class KeyFold { meanpool, norope, post_rotation, rope_commuting };
enum class ValueFold { meanpool, svd };
enum class Metric { weights, act, act_query };

KeyFold parse_key_fold(const std::string& name);  ///< UsageError lists the names
ValueFold parse_value_fold(const std::string& name);
Metric parse_metric(const std::string& name);
std::string name_of(KeyFold);
std::string name_of(ValueFold);
std::string name_of(Metric);

struct FoldOptions {
  KeyFold keys = KeyFold::rope_commuting;
  Metric key_metric = Metric::act_query;
  ValueFold values = ValueFold::svd;
  Metric value_metric = Metric::act;
  std::int64_t kv_heads = 0;
  double sink_weight = 1.0;  ///< w_sink of methods.md 2.1
  double weight_ridge = 0.0;
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
};
struct LayerPlan {
  std::int64_t layer = 0;
  std::vector<GroupPlan> groups;
  /// Sum of losses over sum of totals; 0 when the total is 0.
  double key_relative_loss() const;
  double value_relative_loss() const;
};
struct Plan {
  FoldOptions options;
  std::string model_hash, statistics_hash;  ///< statistics_hash is empty when no statistics were used
  std::vector<LayerPlan> layers;
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

/// Plans a fold: losses and energies of every group, work items (layer x group) spread over `world` in blocks.
/// `statistics` may be null when needs_statistics() is false. `groups` holds one list per layer; empty means contiguous
/// groups everywhere. Collective; every rank gets the same plan, bit by bit the same at any rank and thread count.
/// Throws UsageError / InputError as check_options() and check_groups(); InputError when the statistics are those of
/// another model.
Plan make_plan(const comm::Communicator& world, const checkpoint::Reader& reader,
               const calibration::StatisticsFile* statistics, FoldOptions options,
               const std::vector<Groups>& groups = {});
/// Groups of every layer of a plan.
std::vector<Groups> groups_of(const Plan& plan);

/// "fold" object of headfold.json and plan.json.
OrderedJson to_json(const FoldOptions& options);
OrderedJson to_json(const Plan& plan);
/// Throws InputError naming the file and what is wrong (unknown fold, group that is no partition, …).
Plan plan_from_json(const Json& json, const std::string& file);

/// Legal targets for this model: divisors of its KV heads, ascending; for stock BLOOM, which has no split form with all
/// its heads, less that number itself.
std::vector<std::int64_t> legal_kv_heads(const checkpoint::ModelConfig& config);

}  // namespace headfold::folding
