#include <headfold/base/error.h>
#include <headfold/base/log.h>
#include <headfold/base/profile.h>
#include <headfold/base/progress.h>
#include <headfold/comm/stopping.h>
#include <headfold/folding/bases.h>

#include <algorithm>
#include <cmath>

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

GroupPlan plan_group(const LayerProblem& problem, const LayerTarget& target, std::size_t group,
                     const FoldOptions& options, KeptBases* keep) {
  const Timed timed(Work::other);
  GroupPlan plan;
  plan.kv_heads = target.groups[group];
  const Basis keys = key_basis(problem, plan.kv_heads, options, target.key_width);
  plan.key_loss = clipped(keys.loss);
  plan.key_total = keys.total;
  plan.key_energy = cumulative_share(keys.energies);
  plan.imaginary_share = keys.imaginary_share;
  plan.leading_share = keys.leading_share;
  const Basis values = value_basis(problem, plan.kv_heads, options, target.value_width);
  plan.value_loss = clipped(values.loss);
  plan.value_total = values.total;
  plan.value_energy = cumulative_share(values.energies);
  if (needs_statistics(options) && problem.has_moments) {
    const linalg::Conditioning of_keys = key_conditioning(problem, plan.kv_heads, options);
    plan.key_condition = of_keys.condition;
    plan.key_dropped = of_keys.dropped;
    const linalg::Conditioning of_values = value_conditioning(problem, plan.kv_heads, options);
    plan.value_condition = of_values.condition;
    plan.value_dropped = of_values.dropped;
  }
  if (keep != nullptr) {
    keep->keep(problem.layer, Part::keys, plan.kv_heads, keys);
    keep->keep(problem.layer, Part::values, plan.kv_heads, values);
  }
  return plan;
}

double share(double part, double whole) {
  return whole > 0 ? clipped(part) / whole : 0.0;
}

/// Fits the group's bases to one half of the calibration sequences and prices them on the other.
void price_held_out(const LayerProblem& fitted, const LayerProblem& other, const LayerTarget& target,
                    const FoldOptions& options, GroupPlan& plan) {
  const Timed timed(Work::other);
  const Basis keys = key_basis(fitted, plan.kv_heads, options, target.key_width);
  plan.key_fitted = share(keys.loss, keys.total);
  plan.key_held_out = share(key_loss(other, plan.kv_heads, options, keys), key_total(other, plan.kv_heads, options));
  // Half samples keep no attention statistics: attention-weighted values are priced by their unweighted form.
  FoldOptions plain = options;
  if (plain.value_metric == Metric::attn_out) plain.value_metric = Metric::act_out;
  const Basis values = value_basis(fitted, plan.kv_heads, plain, target.value_width);
  plan.value_fitted = share(values.loss, values.total);
  plan.value_held_out =
      share(value_loss(other, plan.kv_heads, plain, values), value_total(other, plan.kv_heads, plain));
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
               const calibration::StatisticsFile* statistics, FoldOptions options,
               const std::vector<LayerTarget>& targets, bool held_out, KeptBases* keep) {
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
    const auto tokens = static_cast<double>(statistics->header().samples * (statistics->header().sequence_length - 1));
    const std::int64_t channels = config.kv_heads / std::max<std::int64_t>(1, options.kv_heads) * config.head_dim;
    if (world.root() && options.polish > 0 && !LayerMoments::enough_to_polish(tokens, channels))
      spdlog::warn(
          "--polish {}: {:.0f} calibration tokens are too few for groups of {} channels, which are not polished (at "
          "least {:.0f})",
          options.polish, tokens, channels, std::ceil(1.5 * static_cast<double>(channels)));
  }
  std::vector<LayerTarget> lists = targets;
  if (lists.empty()) lists = uniform_targets(options, config);
  const std::int64_t width = latent_width(options, config.head_dim);
  for (LayerTarget& target : lists) {
    if (target.key_width == 0) target.key_width = width;  // plans of older versions name no widths
    if (target.value_width == 0) target.value_width = width;
  }
  check_targets(lists, options, config, "the plan");
  const bool halves = held_out && statistics != nullptr && statistics->header().has_halves &&
                      statistics->header().samples > 1 && needs_statistics(options);  // one sequence has no other half

  std::vector<std::pair<std::size_t, std::size_t>> items;  // (layer, group)
  for (std::size_t l = 0; l < lists.size(); ++l)
    for (std::size_t g = 0; g < lists[l].groups.size(); ++g) items.emplace_back(l, g);
  const auto [begin, end] = share_of(std::ssize(items), world.rank(), world.size());
  Progress progress("plan", "group", static_cast<double>(end - begin), world.root());
  OrderedJson mine = OrderedJson::array();
  for (auto item = static_cast<std::size_t>(begin); item < static_cast<std::size_t>(end) && !stop_requested();) {
    const std::size_t layer = items[item].first;
    std::size_t count = 0;
    while (item + count < static_cast<std::size_t>(end) && items[item + count].first == layer) ++count;
    const LayerTarget& target = lists[layer];
    std::vector<GroupPlan> results(count);
    const auto guarded = [&](const std::function<void()>& work) {
      try {
        work();
      } catch (const NumericalError& error) {
        throw InputError(
            fmt::format("{}: layer {}: {}{}", reader.folder().string(), layer, error.what(),
                        statistics == nullptr ? "" : fmt::format(" (statistics: {})", statistics->path().string())),
            "the attention weights of that layer or its statistics are not finite or not what they claim to be");
      }
    };
    const FoldProblems problems =
        load_problems(reader, statistics, static_cast<std::int64_t>(layer), Part::both, options, halves);
    if (keep != nullptr && problems.all.centred_values && problems.all.has_moments)
      keep->keep_means(problems.all.layer, problems.all.moments);
    for_each_item(static_cast<std::int64_t>(count), [&](std::int64_t i) {
      const auto at = static_cast<std::size_t>(i);
      guarded([&] { results[at] = plan_group(problems.all, target, items[item + at].second, options, keep); });
    });
    if (halves) {
      for_each_item(static_cast<std::int64_t>(count), [&](std::int64_t i) {
        guarded([&] {
          price_held_out(problems.even, problems.odd, target, options, results[static_cast<std::size_t>(i)]);
        });
      });
    }
    for (const GroupPlan& group : results) mine.push_back(to_json(group));
    item += count;
    progress.advance(static_cast<double>(count));
  }
  comm::stop_if_requested(world, "while planning; nothing was written");
  // Shortest round-trip decimal text: every rank reads back the very same doubles.
  std::vector<Json> all;
  for (const std::string& text : world.all_gather(mine.dump()))
    for (Json& one : Json::parse(text)) all.push_back(std::move(one));
  for (std::size_t l = 0, next = 0; l < lists.size(); ++l) {
    LayerPlan layer;
    layer.layer = static_cast<std::int64_t>(l);
    layer.key_width = lists[l].key_width;
    layer.value_width = lists[l].value_width;
    for (std::size_t g = 0; g < lists[l].groups.size(); ++g)
      layer.groups.push_back(group_from_json(all.at(next++), "a plan of another rank"));
    plan.layers.push_back(std::move(layer));
  }
  return plan;
}

}  // namespace headfold::folding
