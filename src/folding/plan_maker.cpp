#include <headfold/base/error.h>
#include <headfold/base/log.h>
#include <headfold/base/progress.h>
#include <headfold/folding/bases.h>

#include <algorithm>

namespace headfold::folding {

namespace {

constexpr std::size_t kEnergyPoints = 64;

std::vector<double> cumulative_share(const at::Tensor& energies) {
  const at::Tensor values = energies.contiguous();
  const double* e = values.data_ptr<double>();
  const auto channels = static_cast<std::size_t>(values.numel());
  double total = 0;
  for (std::size_t i = 0; i < channels; ++i) total += e[i];
  const std::size_t points = std::min(kEnergyPoints, channels);
  std::vector<double> share;
  double sum = 0;
  std::size_t next = 0;
  for (std::size_t i = 1; i <= points; ++i) {
    for (const std::size_t end = (i * channels + points - 1) / points; next < end; ++next) sum += e[next];
    share.push_back(total > 0 ? std::min(1.0, sum / total) : 1.0);
  }
  return share;
}

/// An exact fold leaves rounding noise of either sign.
double clipped(double loss) {
  return std::max(0.0, loss);
}

GroupPlan plan_group(const LayerProblem& problem, const std::vector<std::int64_t>& kv_heads,
                     const FoldOptions& options) {
  GroupPlan plan;
  plan.kv_heads = kv_heads;
  const Basis keys = key_basis(problem, kv_heads, options);
  plan.key_loss = clipped(keys.loss);
  plan.key_total = keys.total;
  plan.key_energy = cumulative_share(keys.energies);
  const Basis values = value_basis(problem, kv_heads, options);
  plan.value_loss = clipped(values.loss);
  plan.value_total = values.total;
  plan.value_energy = cumulative_share(values.energies);
  return plan;
}

void check_statistics(const calibration::StatisticsFile& statistics, const checkpoint::ModelConfig& config,
                      const std::string& fingerprint) {
  const calibration::StatisticsHeader& header = statistics.header();
  const std::string file = statistics.path().string();
  const auto same = [&](const char* what, std::int64_t found, std::int64_t expected) {
    if (found != expected)
      throw InputError(
          fmt::format("{}: statistics of a model with {} {}, the model has {}", file, what, found, expected),
          "calibrate this model");
  };
  same("layers", header.layers, config.layers);
  same("hidden size", header.hidden, config.hidden);
  same("KV heads", header.kv_heads, config.kv_heads);
  same("head_dim", header.head_dim, config.head_dim);
  if (header.family != checkpoint::name_of(config.family))
    throw InputError(fmt::format("{}: statistics of a {} model, the model is {}", file, header.family,
                                 checkpoint::name_of(config.family)),
                     "calibrate this model");
  if (header.model_hash != fingerprint)
    throw InputError(fmt::format("{}: statistics of another model (fingerprint {}..., expected {}...)", file,
                                 header.model_hash.substr(0, 12), fingerprint.substr(0, 12)),
                     "calibrate this model");
}

}  // namespace

Plan make_plan(const comm::Communicator& world, const checkpoint::Reader& reader,
               const calibration::StatisticsFile* statistics, FoldOptions options, const std::vector<Groups>& groups) {
  const checkpoint::ModelConfig& config = reader.config();
  check_options(options, config);
  if (needs_statistics(options) && statistics == nullptr)
    throw UsageError(fmt::format("--keys {} --key-metric {} --values {} --value-metric {} needs --calibration",
                                 name_of(options.keys), name_of(options.key_metric), name_of(options.values),
                                 name_of(options.value_metric)),
                     "headfold calibrate makes the file; metric weights does without");
  options = with_effective_metrics(options, statistics != nullptr);
  Plan plan;
  plan.options = options;
  plan.model_hash = reader.fingerprint();
  if (statistics != nullptr) {
    check_statistics(*statistics, config, plan.model_hash);
    if (options.keys == KeyFold::post_rotation && options.key_metric != Metric::weights &&
        !statistics->header().has_rotated_keys)
      throw InputError(
          fmt::format("{}: no Gram of rotated keys, which --keys post-rotation needs", statistics->path().string()),
          "calibrate the model again");
    plan.statistics_hash = statistics->content_hash();
  }
  const bool in_order = config.family == checkpoint::Family::bloom;
  std::vector<Groups> lists = groups;
  if (lists.empty())
    lists.assign(static_cast<std::size_t>(config.layers), contiguous_groups(config.kv_heads, options.kv_heads));
  if (static_cast<std::int64_t>(lists.size()) != config.layers)
    throw InputError(fmt::format("the plan has {} layers, the model {}", lists.size(), config.layers));
  for (std::size_t l = 0; l < lists.size(); ++l)
    check_groups(lists[l], config.kv_heads, options.kv_heads, in_order, fmt::format("layer {}", l));

  const std::int64_t per_layer = options.kv_heads;
  const auto [begin, end] = share_of(config.layers * per_layer, world.rank(), world.size());
  Progress progress("plan", "group", static_cast<double>(end - begin), world.root());
  Json mine = Json::array();
  for (std::int64_t item = begin; item < end;) {
    const std::int64_t layer = item / per_layer;
    const std::int64_t first = item % per_layer;
    const std::int64_t count = std::min(end, (layer + 1) * per_layer) - item;
    std::vector<GroupPlan> results(static_cast<std::size_t>(count));
    LayerProblem problem;
    for_each_item(1, [&](std::int64_t) { problem = load_problem(reader, statistics, layer, Part::both, options); });
    for_each_item(count, [&](std::int64_t i) {
      try {
        results[static_cast<std::size_t>(i)] =
            plan_group(problem, lists[static_cast<std::size_t>(layer)][static_cast<std::size_t>(first + i)], options);
      } catch (const NumericalError& error) {
        throw InputError(
            fmt::format("{}: layer {}: {}{}", reader.folder().string(), layer, error.what(),
                        statistics == nullptr ? "" : fmt::format(" (statistics: {})", statistics->path().string())),
            "the attention weights of that layer or its statistics are not finite or not what they claim to be");
      }
    });
    for (const GroupPlan& group : results)
      mine.push_back(
          {group.key_loss, group.key_total, group.value_loss, group.value_total, group.key_energy, group.value_energy});
    item += count;
    progress.advance(static_cast<double>(count));
  }
  // Shortest round-trip decimal text: every rank reads back the very same doubles.
  std::vector<Json> all;
  for (const std::string& text : world.all_gather(mine.dump()))
    for (Json& one : Json::parse(text)) all.push_back(std::move(one));
  for (std::int64_t l = 0; l < config.layers; ++l) {
    LayerPlan layer;
    layer.layer = l;
    for (std::int64_t g = 0; g < per_layer; ++g) {
      const Json& one = all.at(static_cast<std::size_t>(l * per_layer + g));
      GroupPlan group;
      group.kv_heads = lists[static_cast<std::size_t>(l)][static_cast<std::size_t>(g)];
      group.key_loss = one[0];
      group.key_total = one[1];
      group.value_loss = one[2];
      group.value_total = one[3];
      group.key_energy = one[4].get<std::vector<double>>();
      group.value_energy = one[5].get<std::vector<double>>();
      layer.groups.push_back(std::move(group));
    }
    plan.layers.push_back(std::move(layer));
  }
  return plan;
}

}  // namespace headfold::folding
