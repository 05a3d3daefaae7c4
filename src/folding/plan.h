#pragma once
// A fold is planned (what will be merged with what, how, at which predicted loss), then applied (new weights).
// The plan is a JSON file that a person can read and edit; bases are a pure function of plan, statistics and weights and are recomputed by apply.

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

KeyFold parse_key_fold(const std::string& name);      ///< UsageError lists the names
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
  double sink_weight = 1.0;   ///< w_sink of methods.md 2.1
  double weight_ridge = 0.0;
};

/// Predicted loss of one group of one layer.
struct GroupPlan {
  std::vector<std::int64_t> kv_heads;  ///< source KV heads merged into one
  double key_loss = 0, key_total = 0;      ///< J and tr F of the key kernel
  double value_loss = 0, value_total = 0;
  std::vector<double> key_energy, value_energy;  ///< cumulative share of singular-value energy kept by 1, 2, … channels (at most 64 points)
};
struct LayerPlan {
  std::int64_t layer = 0;
  std::vector<GroupPlan> groups;
  double key_relative_loss() const;
  double value_relative_loss() const;
};
struct Plan {
  FoldOptions options;
  std::string model_hash, statistics_hash;
  std::vector<LayerPlan> layers;
};

OrderedJson to_json(const Plan& plan);
/// Throws InputError naming the file and what is wrong (unknown fold, group that is no partition, …).
Plan plan_from_json(const Json& json, const std::string& file);

/// Legal targets for this model: divisors of its KV heads, ascending.
std::vector<std::int64_t> legal_kv_heads(const checkpoint::ModelConfig& config);

}  // namespace headfold::folding
