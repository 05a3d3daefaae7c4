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
};

/// Cost of one group of source heads (any order of heads gives the same cost).
using GroupCost = std::function<double(const std::vector<std::int64_t>& heads)>;

struct GroupingResult {
  Groups groups;               ///< heads ascending inside a group, groups by their first head
  double cost = 0;             ///< of these groups
  double contiguous_cost = 0;  ///< of contiguous_groups(): never less than `cost`
  std::int64_t evaluations = 0;
};

/// Starts from contiguous groups, from greedy groups by pairwise cost, and from random ones; improves each by swaps
/// (accepted when the cost falls, then by annealing); the best, ties broken by the lexicographically smallest groups.
/// Costs are remembered by group. One process, deterministic for a seed.
GroupingResult search_groups(std::int64_t source_kv_heads, const GroupingOptions& options, const GroupCost& cost);

/// One search per layer, work items (layer x seed) spread over `world`; every rank gets the same groups, the same at
/// any rank and thread count. Cost of a group: key loss over the layer's key total plus value loss over the layer's
/// value total, `key_balance` times the former. Collective.
std::vector<GroupingResult> search_all_layers(const comm::Communicator& world, const checkpoint::Reader& reader,
                                              const calibration::StatisticsFile* statistics, const FoldOptions& options,
                                              const GroupingOptions& grouping, double key_balance = 1.0);

}  // namespace headfold::folding
