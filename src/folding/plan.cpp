#include <headfold/base/error.h>
#include <headfold/folding/plan.h>

#include <algorithm>
#include <set>

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

constexpr std::pair<const char*, double GroupPlan::*> kGroupNumbers[] = {
    {"key_loss", &GroupPlan::key_loss},
    {"key_total", &GroupPlan::key_total},
    {"value_loss", &GroupPlan::value_loss},
    {"value_total", &GroupPlan::value_total},
    {"key_fitted", &GroupPlan::key_fitted},
    {"key_held_out", &GroupPlan::key_held_out},
    {"value_fitted", &GroupPlan::value_fitted},
    {"value_held_out", &GroupPlan::value_held_out},
    {"key_condition", &GroupPlan::key_condition},
    {"key_dropped", &GroupPlan::key_dropped},
    {"value_condition", &GroupPlan::value_condition},
    {"value_dropped", &GroupPlan::value_dropped}};
constexpr std::pair<const char*, std::vector<double> GroupPlan::*> kGroupLists[] = {
    {"key_energy", &GroupPlan::key_energy},
    {"value_energy", &GroupPlan::value_energy},
    {"imaginary_share", &GroupPlan::imaginary_share},
    {"leading_share", &GroupPlan::leading_share}};

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

namespace {

double mean_of(const std::vector<GroupPlan>& groups, double GroupPlan::*share, double GroupPlan::*total) {
  double sum = 0, weight = 0;
  for (const GroupPlan& group : groups) {
    if (group.*share < 0) return -1;
    sum += group.*share * group.*total;
    weight += group.*total;
  }
  return ratio(sum, weight);
}

}  // namespace

double LayerPlan::key_held_out() const {
  return mean_of(groups, &GroupPlan::key_held_out, &GroupPlan::key_total);
}
double LayerPlan::key_fitted() const {
  return mean_of(groups, &GroupPlan::key_fitted, &GroupPlan::key_total);
}
double LayerPlan::value_held_out() const {
  return mean_of(groups, &GroupPlan::value_held_out, &GroupPlan::value_total);
}
double LayerPlan::value_fitted() const {
  return mean_of(groups, &GroupPlan::value_fitted, &GroupPlan::value_total);
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
  for (std::int64_t layer = 1; layer < config.layers; ++layer)
    if (config.shape_of(layer) != config.shape_of(0))
      throw InputError(fmt::format("{}: layers 0 and {} have different numbers of KV heads: it was folded before",
                                   config.file, layer),
                       "fold the model that it was made from");
  const bool llama = config.family == Family::llama;
  const bool rotating = options.keys == KeyFold::post_rotation || options.keys == KeyFold::rope_commuting;
  const bool fits = options.keys == KeyFold::norope ? !llama : llama || !rotating;
  if (!fits)
    throw UsageError(fmt::format("--keys {} does not suit a {} model, whose positions are {}; choose one of {}",
                                 name_of(options.keys), checkpoint::name_of(config.family),
                                 llama ? "rotations (RoPE)" : "ALiBi biases, without rotation",
                                 llama ? "meanpool, procrustes, post-rotation, rope-commuting, latent"
                                       : "meanpool, procrustes, norope, latent"));
  const auto one_of = [](Metric metric, std::initializer_list<Metric> legal) {
    return std::find(legal.begin(), legal.end(), metric) != legal.end();
  };
  if (!one_of(options.key_metric, {Metric::weights, Metric::act, Metric::act_query, Metric::act_query_dist}))
    throw UsageError(
        fmt::format("--key-metric {}: that is a metric of values; keys take weights, act, act+query, "
                    "act+query+dist",
                    name_of(options.key_metric)));
  if (!one_of(options.value_metric, {Metric::weights, Metric::act, Metric::act_out, Metric::attn_out}))
    throw UsageError(
        fmt::format("--value-metric {}: no query looks at values; they take weights, act, act+out, "
                    "attn+out",
                    name_of(options.value_metric)));
  if (options.key_metric == Metric::act_query_dist && !llama)
    throw UsageError("--key-metric act+query+dist: without rotation the distance does not matter",
                     "act+query is exact for this model");
  if (options.key_metric == Metric::act_query_dist && options.keys == KeyFold::post_rotation)
    throw UsageError(
        "--key-metric act+query+dist: the basis of post-rotation is fitted after the rotation, where "
        "distances do not enter",
        "act+query is its query-aware metric");
  if (options.slow_band != 0 && options.keys != KeyFold::rope_commuting)
    throw UsageError(fmt::format("--slow-band is part of --keys rope-commuting, not of {}", name_of(options.keys)));
  if (options.slow_band < kSlowBandAuto || options.slow_band > config.head_dim / 2)
    throw UsageError(fmt::format("--slow-band {}: must be auto, off or 1 to {} (pairs of a head)", options.slow_band,
                                 config.head_dim / 2));
  if (options.polish < 0 || options.polish > 1000)
    throw UsageError(fmt::format("--polish {}: must be 0 to 1000 sweeps", options.polish));
  if (options.context < 0) throw UsageError(fmt::format("--context {}: must be 1 or more tokens", options.context));
  if (!(options.mean_weight >= 0 && options.mean_weight <= 1))
    throw UsageError(fmt::format("--mean-weight {}: must be between 0 and 1", options.mean_weight));
  const bool latent = options.keys == KeyFold::latent;
  if (!latent && (options.latent_groups != 0 || options.min_width != 0 || options.max_width != 0))
    throw UsageError("--latent-groups, --min-width and --max-width belong to --keys latent");
  if (options.allocation == Allocation::lorc_progressive && !latent)
    throw UsageError("--budget lorc-progressive sets widths of latents",
                     "add --keys latent; budgets of whole KV heads are greedy and dp");
  if ((options.allocation == Allocation::greedy || options.allocation == Allocation::dp) && latent)
    throw UsageError(fmt::format("--budget {} counts KV heads, which latents do not have", name_of(options.allocation)),
                     "use --budget lorc-progressive with --keys latent");
  if ((options.allocation == Allocation::greedy || options.allocation == Allocation::dp) &&
      (options.keys == KeyFold::post_rotation || !llama))
    throw UsageError(fmt::format("--budget {} needs layers with different numbers of KV heads, which {} cannot hold",
                                 name_of(options.allocation), llama ? "layout projected" : "BLOOM's folder format"),
                     "use --budget uniform, or --keys rope-commuting on a LLaMA model");
  if (options.grouping == Grouping::search && !llama)
    throw UsageError(
        "--grouping search: this model uses ALiBi, whose slopes belong to head numbers, so its groups "
        "stay contiguous");
  const std::vector<std::int64_t> legal = legal_kv_heads(config);
  if (std::find(legal.begin(), legal.end(), options.kv_heads) == legal.end())
    throw UsageError(fmt::format("--kv-heads {0}: {1} KV heads cannot be folded to {0}; legal numbers are {2}",
                                 options.kv_heads, config.kv_heads, fmt::join(legal, ", ")));
  if (options.latent_groups < 0 || (options.latent_groups > 0 && config.kv_heads % options.latent_groups != 0))
    throw UsageError(
        fmt::format("--latent-groups {}: must divide the {} KV heads", options.latent_groups, config.kv_heads));
  const std::int64_t channels = latent_width(options, config.head_dim);
  const std::int64_t most = options.latent_groups > 0 ? config.kv_heads / options.latent_groups * config.head_dim
                                                      : config.kv_heads / options.kv_heads * config.head_dim;
  if (latent && options.allocation == Allocation::lorc_progressive) {
    const std::int64_t widest = options.max_width > 0 ? options.max_width : channels;
    if (options.min_width < 0 || options.max_width < 0 || widest > most || options.min_width > widest)
      throw UsageError(
          fmt::format("--min-width {} --max-width {}: must be 1 to {} channels, the least not above the most",
                      options.min_width, options.max_width, most));
  }
  if (!(options.sink_weight >= 0 && options.sink_weight <= 1))
    throw UsageError(fmt::format("--sink-weight {}: must be between 0 and 1", options.sink_weight));
  if (!(options.weight_ridge >= 0 && std::isfinite(options.weight_ridge)))
    throw UsageError(fmt::format("--weight-ridge {}: must be 0 or more", options.weight_ridge));
}

std::int64_t latent_width(const FoldOptions& options, std::int64_t head_dim) {
  if (options.keys != KeyFold::latent || options.latent_groups == 0) return head_dim;
  return options.kv_heads * head_dim / options.latent_groups;
}

std::vector<LayerTarget> uniform_targets(const FoldOptions& options, const checkpoint::ModelConfig& config) {
  const std::int64_t groups =
      options.keys == KeyFold::latent && options.latent_groups > 0 ? options.latent_groups : options.kv_heads;
  const std::int64_t width = latent_width(options, config.head_dim);
  return std::vector<LayerTarget>(static_cast<std::size_t>(config.layers),
                                  {contiguous_groups(config.kv_heads, groups), width, width});
}

void check_targets(const std::vector<LayerTarget>& targets, const FoldOptions& options,
                   const checkpoint::ModelConfig& config, const std::string& what) {
  if (static_cast<std::int64_t>(targets.size()) != config.layers)
    throw InputError(fmt::format("{} has {} layers, the model {}", what, targets.size(), config.layers));
  const bool in_order = config.family == Family::bloom;
  const bool latent = options.keys == KeyFold::latent;
  for (std::size_t l = 0; l < targets.size(); ++l) {
    const LayerTarget& target = targets[l];
    const std::string where = fmt::format("{}, layer {}", what, l);
    const auto count = static_cast<std::int64_t>(target.groups.size());
    if (count < 1 || config.kv_heads % count != 0)
      throw InputError(fmt::format("{}: {} groups do not divide {} KV heads evenly", where, count, config.kv_heads));
    check_groups(target.groups, config.kv_heads, count, in_order, where);
    const std::int64_t most = config.kv_heads / count * config.head_dim;
    for (const std::int64_t width : {target.key_width, target.value_width})
      if (width < 1 || width > most || (!latent && width != config.head_dim))
        throw InputError(latent ? fmt::format("{}: a width of {} channels; must be 1 to {}", where, width, most)
                                : fmt::format("{}: a width of {} channels; this layout keeps whole heads of {}", where,
                                              width, config.head_dim));
    if (count != options.kv_heads && options.allocation != Allocation::greedy && options.allocation != Allocation::dp &&
        !latent)
      throw InputError(fmt::format("{}: {} groups where the budget is {} everywhere", where, count, options.kv_heads),
                       "layers may differ where the plan's \"budget\" is \"dp\" or \"greedy\"");
  }
}

std::vector<checkpoint::LayerShape> shapes_of(const std::vector<LayerTarget>& targets) {
  std::vector<checkpoint::LayerShape> shapes;
  shapes.reserve(targets.size());
  for (const LayerTarget& target : targets)
    shapes.push_back({static_cast<std::int64_t>(target.groups.size()), target.key_width, target.value_width});
  return shapes;
}

FoldOptions with_effective_metrics(FoldOptions options, bool has_statistics) {
  if (options.keys == KeyFold::meanpool && (!has_statistics || options.key_metric == Metric::weights))
    options.key_metric = has_statistics ? Metric::act_query : Metric::weights;
  if (options.values == ValueFold::meanpool && (!has_statistics || options.value_metric == Metric::weights))
    options.value_metric = has_statistics ? Metric::act : Metric::weights;
  return options;
}

KvLayout layout_of(const FoldOptions& options) {
  return options.keys == KeyFold::post_rotation ? KvLayout::projected
         : options.keys == KeyFold::latent      ? KvLayout::latent
                                                : KvLayout::gqa;
}

bool is_stock(const FoldOptions& options, const checkpoint::ModelConfig& config) {
  return config.family == Family::llama && layout_of(options) == KvLayout::gqa;
}

std::vector<LayerTarget> targets_of(const Plan& plan) {
  std::vector<LayerTarget> all;
  all.reserve(plan.layers.size());
  for (const LayerPlan& layer : plan.layers) {
    LayerTarget target;
    target.key_width = layer.key_width;
    target.value_width = layer.value_width;
    for (const GroupPlan& group : layer.groups) target.groups.push_back(group.kv_heads);
    all.push_back(std::move(target));
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
  json["mean_weight"] = options.mean_weight;
  if (options.keys == KeyFold::rope_commuting)
    json["slow_band"] = options.slow_band == kSlowBandAuto ? OrderedJson("auto") : OrderedJson(options.slow_band);
  json["polish"] = options.polish;
  json["context"] = options.context;
  if (options.keys == KeyFold::latent) {
    json["latent_groups"] = options.latent_groups;
    json["min_width"] = options.min_width;
    json["max_width"] = options.max_width;
  }
  json["grouping"] = name_of(options.grouping);
  json["budget"] = name_of(options.allocation);
  json["refit"] = options.refit;
  return json;
}

/// A key nobody reads is a slip of whoever edited the plan: ignoring it would apply something else than is written.
void refuse_unknown(const Json& object, const std::set<std::string>& known, const std::string& where) {
  if (!object.is_object()) throw InputError(fmt::format("{}: not a JSON object", where));
  for (const auto& [key, value] : object.items())
    if (!known.contains(key))
      throw InputError(fmt::format("{}: unknown key \"{}\"", where, key),
                       fmt::format("keys are {}", fmt::join(known, ", ")));
}

FoldOptions options_from_json(const Json& fold, const std::string& file) {
  if (!fold.is_object()) throw InputError(fmt::format("{}: key \"fold\" is not an object", file));
  refuse_unknown(fold,
                 {"keys", "key_metric", "values", "value_metric", "grouping", "budget", "sink_weight", "weight_ridge",
                  "mean_weight", "slow_band", "refit", "polish", "context", "latent_groups", "min_width", "max_width"},
                 file + ", fold");
  FoldOptions options;
  try {
    options.keys = parse_key_fold(required<std::string>(fold, "keys", file));
    options.key_metric = parse_metric(required<std::string>(fold, "key_metric", file));
    options.values = parse_value_fold(required<std::string>(fold, "values", file));
    options.value_metric = parse_metric(required<std::string>(fold, "value_metric", file));
    options.grouping = parse_grouping(optional<std::string>(fold, "grouping", "contiguous", file));
    options.allocation = parse_allocation(optional<std::string>(fold, "budget", "uniform", file));
  } catch (const UsageError& error) {
    throw InputError(fmt::format("{}: {}", file, error.what()));
  }
  options.sink_weight = required<double>(fold, "sink_weight", file);
  options.weight_ridge = required<double>(fold, "weight_ridge", file);
  options.mean_weight = optional<double>(fold, "mean_weight", 1.0, file);
  if (const auto band = fold.find("slow_band"); band != fold.end() && *band == "auto")
    options.slow_band = kSlowBandAuto;
  else
    options.slow_band = optional<std::int64_t>(fold, "slow_band", 0, file);
  options.refit = optional<bool>(fold, "refit", false, file);
  options.polish = optional<std::int64_t>(fold, "polish", 0, file);
  options.context = optional<std::int64_t>(fold, "context", 0, file);
  options.latent_groups = optional<std::int64_t>(fold, "latent_groups", 0, file);
  options.min_width = optional<std::int64_t>(fold, "min_width", 0, file);
  options.max_width = optional<std::int64_t>(fold, "max_width", 0, file);
  return options;
}

OrderedJson to_json(const GroupPlan& group) {
  OrderedJson item;
  item["kv_heads"] = group.kv_heads;
  for (const auto& [name, member] : kGroupNumbers) item[name] = group.*member;
  for (const auto& [name, member] : kGroupLists)
    if (!(group.*member).empty()) item[name] = group.*member;
  return item;
}

GroupPlan group_from_json(const Json& item, const std::string& where) {
  std::set<std::string> known = {"kv_heads"};
  for (const auto& [name, member] : kGroupNumbers) known.insert(name);
  for (const auto& [name, member] : kGroupLists) known.insert(name);
  refuse_unknown(item, known, where + ", groups");
  GroupPlan group;
  group.kv_heads = required<std::vector<std::int64_t>>(item, "kv_heads", where);
  for (const auto& [name, member] : kGroupNumbers) group.*member = optional<double>(item, name, group.*member, where);
  for (const auto& [name, member] : kGroupLists) group.*member = optional<std::vector<double>>(item, name, {}, where);
  return group;
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
  if (!plan.decisions.is_null()) json["decisions"] = plan.decisions;
  json["layers"] = OrderedJson::array();
  for (const LayerPlan& layer : plan.layers) {
    OrderedJson one;
    one["layer"] = layer.layer;
    one["key_width"] = layer.key_width;
    one["value_width"] = layer.value_width;
    one["key_relative_loss"] = layer.key_relative_loss();
    one["value_relative_loss"] = layer.value_relative_loss();
    one["groups"] = OrderedJson::array();
    for (const GroupPlan& group : layer.groups) one["groups"].push_back(to_json(group));
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
  plan.options = options_from_json(fold, file);
  if (const auto decisions = json.find("decisions"); decisions != json.end())
    plan.decisions = OrderedJson::parse(decisions->dump());
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
    refuse_unknown(layers[l],
                   {"layer", "key_width", "value_width", "key_relative_loss", "value_relative_loss", "groups"}, where);
    const auto groups = required<Json>(layers[l], "groups", where);
    if (!groups.is_array()) throw InputError(fmt::format("{}: key \"groups\" is not a list", where));
    for (const Json& item : groups) layer.groups.push_back(group_from_json(item, where));
    layer.key_width = optional<std::int64_t>(layers[l], "key_width", 0, where);
    layer.value_width = optional<std::int64_t>(layers[l], "value_width", 0, where);
    std::int64_t heads = 0;
    for (const GroupPlan& group : layer.groups) heads += static_cast<std::int64_t>(group.kv_heads.size());
    Groups list;
    for (const GroupPlan& group : layer.groups) list.push_back(group.kv_heads);
    const auto count = static_cast<std::int64_t>(list.size());
    if (count < 1 || plan.options.kv_heads < 1 || heads % count != 0)
      throw InputError(fmt::format("{}: {} source heads do not make {} equal groups", where, heads, count));
    check_groups(list, heads, count, false, where);
    plan.layers.push_back(std::move(layer));
  }
  return plan;
}

}  // namespace headfold::folding
