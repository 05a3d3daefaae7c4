#include <headfold/base/error.h>
#include <headfold/folding/plan.h>

#include <algorithm>

namespace headfold::folding {

using checkpoint::Family;
using checkpoint::KvLayout;

namespace {

template <class Value>
struct Named {
  Value value;
  const char* name;
};
constexpr Named<KeyFold> kKeyFolds[] = {{KeyFold::meanpool, "meanpool"},
                                        {KeyFold::procrustes, "procrustes"},
                                        {KeyFold::norope, "norope"},
                                        {KeyFold::post_rotation, "post-rotation"},
                                        {KeyFold::rope_commuting, "rope-commuting"},
                                        {KeyFold::latent, "latent"}};
constexpr Named<ValueFold> kValueFolds[] = {
    {ValueFold::meanpool, "meanpool"}, {ValueFold::procrustes, "procrustes"}, {ValueFold::svd, "svd"}};
constexpr Named<Metric> kMetrics[] = {{Metric::weights, "weights"},     {Metric::act, "act"},
                                      {Metric::act_query, "act+query"}, {Metric::act_query_dist, "act+query+dist"},
                                      {Metric::act_out, "act+out"},     {Metric::attn_out, "attn+out"}};
constexpr Named<Grouping> kGroupings[] = {{Grouping::contiguous, "contiguous"}, {Grouping::search, "search"}};
constexpr Named<Allocation> kAllocations[] = {{Allocation::uniform, "uniform"},
                                              {Allocation::lorc_progressive, "lorc-progressive"},
                                              {Allocation::greedy, "greedy"},
                                              {Allocation::dp, "dp"}};

template <class Table>
auto parse_name(const Table& table, const std::string& name, const char* what) {
  std::string names;
  for (const auto& entry : table) {
    if (name == entry.name) return entry.value;
    names += fmt::format("{}{}", names.empty() ? "" : ", ", entry.name);
  }
  throw UsageError(fmt::format("there is no {} '{}'; choose one of {}", what, name, names));
}

template <class Table, class Value>
std::string name_in(const Table& table, Value value) {
  for (const auto& entry : table)
    if (entry.value == value) return entry.name;
  throw InternalError("a fold or metric without a name");
}

double ratio(double part, double whole) {
  return whole > 0 ? part / whole : 0.0;
}

}  // namespace

KeyFold parse_key_fold(const std::string& name) {
  return parse_name(kKeyFolds, name, "key fold");
}
ValueFold parse_value_fold(const std::string& name) {
  return parse_name(kValueFolds, name, "value fold");
}
Metric parse_metric(const std::string& name) {
  return parse_name(kMetrics, name, "metric");
}
Grouping parse_grouping(const std::string& name) {
  return parse_name(kGroupings, name, "grouping");
}
Allocation parse_allocation(const std::string& name) {
  return parse_name(kAllocations, name, "budget");
}
std::string name_of(Grouping grouping) {
  return name_in(kGroupings, grouping);
}
std::string name_of(Allocation allocation) {
  return name_in(kAllocations, allocation);
}
std::string name_of(KeyFold fold) {
  return name_in(kKeyFolds, fold);
}
std::string name_of(ValueFold fold) {
  return name_in(kValueFolds, fold);
}
std::string name_of(Metric metric) {
  return name_in(kMetrics, metric);
}

double LayerPlan::key_relative_loss() const {
  double loss = 0, total = 0;
  for (const GroupPlan& group : groups) loss += group.key_loss, total += group.key_total;
  return ratio(loss, total);
}

double LayerPlan::value_relative_loss() const {
  double loss = 0, total = 0;
  for (const GroupPlan& group : groups) loss += group.value_loss, total += group.value_total;
  return ratio(loss, total);
}

std::vector<std::int64_t> legal_kv_heads(const checkpoint::ModelConfig& config) {
  std::vector<std::int64_t> legal;
  // BLOOM with as many KV heads as heads has no split form: a fold to itself could not be stored.
  const bool itself = config.family == Family::llama || config.split_qkv;
  for (std::int64_t n = 1; n <= config.kv_heads; ++n)
    if (config.kv_heads % n == 0 && (itself || n < config.kv_heads)) legal.push_back(n);
  return legal;
}

Groups contiguous_groups(std::int64_t source_kv_heads, std::int64_t kv_heads) {
  Groups groups(static_cast<std::size_t>(kv_heads));
  const std::int64_t size = source_kv_heads / kv_heads;
  for (std::int64_t k = 0; k < size * kv_heads; ++k) groups[static_cast<std::size_t>(k / size)].push_back(k);
  return groups;
}

void check_groups(const Groups& groups, std::int64_t source_kv_heads, std::int64_t kv_heads, bool in_order,
                  const std::string& what) {
  if (static_cast<std::int64_t>(groups.size()) != kv_heads)
    throw InputError(
        fmt::format("{}: {} groups, expected {} (one per KV head of the result)", what, groups.size(), kv_heads));
  const auto size = static_cast<std::size_t>(source_kv_heads / kv_heads);
  std::vector<bool> seen(static_cast<std::size_t>(source_kv_heads), false);
  for (std::size_t g = 0; g < groups.size(); ++g) {
    if (groups[g].size() != size)
      throw InputError(
          fmt::format("{}, group {}: {} heads, expected {}: groups have equal size", what, g, groups[g].size(), size));
    for (const std::int64_t head : groups[g]) {
      if (head < 0 || head >= source_kv_heads)
        throw InputError(
            fmt::format("{}, group {}: there is no KV head {}; heads are 0 to {}", what, g, head, source_kv_heads - 1));
      if (seen[static_cast<std::size_t>(head)])
        throw InputError(fmt::format("{}, group {}: KV head {} is in two places", what, g, head));
      seen[static_cast<std::size_t>(head)] = true;
    }
  }
  if (in_order && groups != contiguous_groups(source_kv_heads, kv_heads))
    throw InputError(fmt::format("{}: this model uses ALiBi, whose slopes belong to head numbers: its groups must stay "
                                 "contiguous and in order",
                                 what),
                     fmt::format("group i holds the heads {0}*i .. {0}*i + {1}", size, size - 1));
}

bool needs_statistics(const FoldOptions& options) {
  return (options.keys != KeyFold::meanpool && options.key_metric != Metric::weights) ||
         (options.values != ValueFold::meanpool && options.value_metric != Metric::weights);
}

void check_options(const FoldOptions& options, const checkpoint::ModelConfig& config) {
  if (config.layout != KvLayout::gqa)
    throw InputError(fmt::format("{} has the cache layout {}: it was folded before", config.file,
                                 checkpoint::name_of(config.layout)),
                     "fold the original model instead");
  const bool llama = config.family == Family::llama;
  const bool fits = options.keys == KeyFold::meanpool || (options.keys == KeyFold::norope ? !llama : llama);
  if (!fits)
    throw UsageError(fmt::format("--keys {} does not suit a {} model, whose positions are {}; choose one of {}",
                                 name_of(options.keys), checkpoint::name_of(config.family),
                                 llama ? "rotations (RoPE)" : "ALiBi biases, without rotation",
                                 llama ? "meanpool, post-rotation, rope-commuting" : "meanpool, norope"));
  if (options.value_metric == Metric::act_query)
    throw UsageError("--value-metric act+query: no query looks at values; choose weights or act");
  const std::vector<std::int64_t> legal = legal_kv_heads(config);
  if (std::find(legal.begin(), legal.end(), options.kv_heads) == legal.end())
    throw UsageError(fmt::format("{} KV heads cannot be folded to {}; legal numbers are {}", config.kv_heads,
                                 options.kv_heads, fmt::join(legal, ", ")));
  if (!(options.sink_weight >= 0 && options.sink_weight <= 1))
    throw UsageError(fmt::format("--sink-weight {}: must be between 0 and 1", options.sink_weight));
  if (!(options.weight_ridge >= 0 && std::isfinite(options.weight_ridge)))
    throw UsageError(fmt::format("--weight-ridge {}: must be 0 or more", options.weight_ridge));
}

FoldOptions with_effective_metrics(FoldOptions options, bool has_statistics) {
  if (options.keys == KeyFold::meanpool) options.key_metric = has_statistics ? Metric::act_query : Metric::weights;
  if (options.values == ValueFold::meanpool) options.value_metric = has_statistics ? Metric::act : Metric::weights;
  return options;
}

KvLayout layout_of(const FoldOptions& options) {
  return options.keys == KeyFold::post_rotation ? KvLayout::projected : KvLayout::gqa;
}

bool is_stock(const FoldOptions& options, const checkpoint::ModelConfig& config) {
  return config.family == Family::llama && layout_of(options) == KvLayout::gqa;
}

std::vector<Groups> groups_of(const Plan& plan) {
  std::vector<Groups> all;
  for (const LayerPlan& layer : plan.layers) {
    Groups groups;
    for (const GroupPlan& group : layer.groups) groups.push_back(group.kv_heads);
    all.push_back(std::move(groups));
  }
  return all;
}

OrderedJson to_json(const FoldOptions& options) {
  OrderedJson json;
  json["keys"] = name_of(options.keys);
  json["key_metric"] = name_of(options.key_metric);
  json["values"] = name_of(options.values);
  json["value_metric"] = name_of(options.value_metric);
  json["sink_weight"] = options.sink_weight;
  json["weight_ridge"] = options.weight_ridge;
  return json;
}

OrderedJson to_json(const Plan& plan) {
  OrderedJson json;
  json["format"] = "headfold-plan";
  json["format_version"] = 1;
  json["model"] = OrderedJson{{"fingerprint", plan.model_hash}};
  json["statistics"] =
      plan.statistics_hash.empty() ? OrderedJson() : OrderedJson{{"content_hash", plan.statistics_hash}};
  json["fold"] = to_json(plan.options);
  json["kv_heads"] = plan.options.kv_heads;
  json["layers"] = OrderedJson::array();
  for (const LayerPlan& layer : plan.layers) {
    OrderedJson one;
    one["layer"] = layer.layer;
    one["key_relative_loss"] = layer.key_relative_loss();
    one["value_relative_loss"] = layer.value_relative_loss();
    one["groups"] = OrderedJson::array();
    for (const GroupPlan& group : layer.groups) {
      OrderedJson item;
      item["kv_heads"] = group.kv_heads;
      item["key_loss"] = group.key_loss;
      item["key_total"] = group.key_total;
      item["value_loss"] = group.value_loss;
      item["value_total"] = group.value_total;
      item["key_energy"] = group.key_energy;
      item["value_energy"] = group.value_energy;
      one["groups"].push_back(std::move(item));
    }
    json["layers"].push_back(std::move(one));
  }
  return json;
}

Plan plan_from_json(const Json& json, const std::string& file) {
  if (!json.is_object()) throw InputError(fmt::format("{}: not a JSON object", file));
  if (const auto format = required<std::string>(json, "format", file); format != "headfold-plan")
    throw InputError(fmt::format("{}: format is \"{}\", expected \"headfold-plan\"", file, format),
                     "headfold convert --plan-only writes such a file");
  if (const auto version = required<std::int64_t>(json, "format_version", file); version != 1)
    throw InputError(fmt::format("{}: format_version {}, this headfold reads 1", file, version));
  Plan plan;
  plan.model_hash = required<std::string>(required<Json>(json, "model", file), "fingerprint", file);
  if (const auto statistics = json.find("statistics"); statistics != json.end() && !statistics->is_null())
    plan.statistics_hash = required<std::string>(*statistics, "content_hash", file);
  const auto fold = required<Json>(json, "fold", file);
  if (!fold.is_object()) throw InputError(fmt::format("{}: key \"fold\" is not an object", file));
  try {
    plan.options.keys = parse_key_fold(required<std::string>(fold, "keys", file));
    plan.options.key_metric = parse_metric(required<std::string>(fold, "key_metric", file));
    plan.options.values = parse_value_fold(required<std::string>(fold, "values", file));
    plan.options.value_metric = parse_metric(required<std::string>(fold, "value_metric", file));
  } catch (const UsageError& error) {
    throw InputError(fmt::format("{}: {}", file, error.what()));
  }
  plan.options.sink_weight = required<double>(fold, "sink_weight", file);
  plan.options.weight_ridge = required<double>(fold, "weight_ridge", file);
  plan.options.kv_heads = required<std::int64_t>(json, "kv_heads", file);
  const auto layers = required<Json>(json, "layers", file);
  if (!layers.is_array() || layers.empty())
    throw InputError(fmt::format("{}: key \"layers\" is not a list of layers", file));
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const std::string where = fmt::format("{}, layer {}", file, l);
    LayerPlan layer;
    layer.layer = required<std::int64_t>(layers[l], "layer", where);
    if (layer.layer != static_cast<std::int64_t>(l))
      throw InputError(
          fmt::format("{}: key \"layer\" is {}: layers must be listed from 0 without gaps", where, layer.layer));
    const auto groups = required<Json>(layers[l], "groups", where);
    if (!groups.is_array()) throw InputError(fmt::format("{}: key \"groups\" is not a list", where));
    for (const Json& item : groups) {
      GroupPlan group;
      group.kv_heads = required<std::vector<std::int64_t>>(item, "kv_heads", where);
      group.key_loss = optional<double>(item, "key_loss", 0, where);
      group.key_total = optional<double>(item, "key_total", 0, where);
      group.value_loss = optional<double>(item, "value_loss", 0, where);
      group.value_total = optional<double>(item, "value_total", 0, where);
      group.key_energy = optional<std::vector<double>>(item, "key_energy", {}, where);
      group.value_energy = optional<std::vector<double>>(item, "value_energy", {}, where);
      layer.groups.push_back(std::move(group));
    }
    std::int64_t heads = 0;
    for (const GroupPlan& group : layer.groups) heads += static_cast<std::int64_t>(group.kv_heads.size());
    Groups list;
    for (const GroupPlan& group : layer.groups) list.push_back(group.kv_heads);
    if (plan.options.kv_heads < 1 || heads % plan.options.kv_heads != 0)
      throw InputError(
          fmt::format("{}: {} source heads do not make {} equal groups", where, heads, plan.options.kv_heads));
    check_groups(list, heads, plan.options.kv_heads, false, where);
    plan.layers.push_back(std::move(layer));
  }
  return plan;
}

}  // namespace headfold::folding
