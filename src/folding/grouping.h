#pragma once
// Which source KV heads share one head of the result (methods.md 8).

#include <headfold/comm/communicator.h>
#include <headfold/folding/bases.h>

#include <functional>

namespace headfold::folding {

struct GroupingOptions {
  std::int64_t kv_heads = 0;  ///< groups per layer
  std::int64_t seeds = 16;    ///< independent searches per layer, spread over ranks
  std::int64_t sweeps = 50;   ///< most passes over all swaps per seed
  std::uint64_t seed = 0;
  /// When all equal-size groups of a layer number at most this many, every one is priced and the best partition is
  /// found exactly (dynamic programming over subsets, at most 16 heads); 0: always search.
  std::int64_t exhaustive = 600;
  /// > 0: groups must not straddle blocks of so many consecutive heads (attention-weighted values, whose statistics
  /// know only heads of one block). search_all_layers() sets it from the statistics.
  std::int64_t block = 0;
};

/// Cost of one group of source heads (any order of heads gives the same cost).
using GroupCost = std::function<double(const std::vector<std::int64_t>& heads)>;

struct GroupingResult {
  Groups groups;                 ///< heads ascending inside a group, groups by their first head
  double cost = 0;               ///< of these groups
  double contiguous_cost = 0;    ///< of contiguous_groups(): never less than `cost`
  std::int64_t evaluations = 0;  ///< distinct groups priced, summed over the seeds of a layer
  bool exhaustive = false;       ///< whether every partition was considered
};

/// Starts from contiguous groups (seed 0), from greedy groups by pairwise cost (seed 1), and from random ones; anneals
/// all but the first, then swaps single heads while the cost falls; the best, ties broken by the lexicographically
/// smallest groups, which contiguous ones are. Costs are remembered by group. One process, deterministic for a seed.
/// InputError when kv_heads does not divide the heads, or blocks do not split into groups; NumericalError when a cost
/// is not finite.
GroupingResult search_groups(std::int64_t source_kv_heads, const GroupingOptions& options, const GroupCost& cost);

/// One search per layer, work items (layer x seed) spread over `world`; every rank gets the same groups, the same at
/// any rank and thread count. Cost of a group: key loss over the layer's key total plus value loss over the layer's
/// value total (totals of contiguous groups), `key_balance` times the former. `grouping.kv_heads` 0 means
/// options.kv_heads. Many groups (GroupingOptions::exhaustive) are searched with a surrogate of the closed form's loss
/// on each head's leading directions; what it finds is then priced exactly and kept only where that beats contiguous
/// groups. Collective. UsageError for models with ALiBi.
std::vector<GroupingResult> search_all_layers(const comm::Communicator& world, const checkpoint::Reader& reader,
                                              const calibration::StatisticsFile* statistics, const FoldOptions& options,
                                              const GroupingOptions& grouping, double key_balance = 1.0);

/// Groups of every layer, for make_plan().
std::vector<Groups> groups_of(const std::vector<GroupingResult>& results);
/// What the search did, for Plan::decisions: costs against contiguous groups per layer and in all.
OrderedJson grouping_report(const std::vector<GroupingResult>& results, const GroupingOptions& options);

/// Throws UsageError unless `ranks` (> 0) tensor-parallel ranks divide the query heads and every layer's KV heads.
void check_tensor_parallel(const std::vector<std::int64_t>& kv_heads_per_layer, std::int64_t heads, std::int64_t ranks);

}  // namespace headfold::folding
