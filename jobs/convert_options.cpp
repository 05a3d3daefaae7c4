#include "convert_options.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <sstream>

#include "values.h"

namespace headfold::jobs {

using folding::FoldOptions;

namespace {

/// "auto", "off" or a number of pairs.
std::int64_t parse_slow_band(const std::string& text) {
  if (text == "auto") return folding::kSlowBandAuto;
  if (text == "off") return 0;
  std::size_t used = 0;
  std::int64_t pairs = -1;
  try {
    pairs = std::stoll(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  if (used != text.size() || pairs < 0)
    throw UsageError(fmt::format("--slow-band {}: give auto, off or a number of RoPE pairs", text));
  return pairs;
}

}  // namespace

po::options_description convert_options() {
  po::options_description fold("fold");
  fold.add_options()("model", po::value<std::string>()->required(), "folder of the model to fold")(
      "calibration", po::value<std::string>(),
      "statistics file of headfold calibrate; not needed for metric weights and for meanpool")(
      "kv-heads", po::value<std::int64_t>(), "KV heads of the result")(
      "ratio", po::value<double>(), "the same as a share of the model's KV heads, for example 0.5")(
      "keys", po::value<std::string>(),
      "meanpool, procrustes, latent; LLaMA: rope-commuting (default), post-rotation; BLOOM: norope (default)")(
      "key-metric", po::value<std::string>(), "weights, act, act+query (default), act+query+dist")(
      "values", po::value<std::string>(), "meanpool, procrustes, svd (default)")(
      "value-metric", po::value<std::string>(), "weights, act (default), act+out, attn+out")(
      "slow-band", po::value<std::string>(),
      "slowest RoPE pairs that rope-commuting folds as if they did not rotate: a number, auto (those that turn by less "
      "than half a radian over the context) or off (default)")(
      "polish", po::value<std::int64_t>(),
      "sweeps of alternating least squares after the closed form (rope-commuting keys, attn+out values; default 0)")(
      "context", po::value<std::int64_t>(),
      "tokens for which slow band and distance weights are meant (default: the calibration sequences' length)")(
      "sink-weight", po::value<double>(),
      "weight of the first token of every sequence in the statistics, 0 to 1 (default 1)")(
      "mean-weight", po::value<double>(),
      "weight of the mean direction in keys under RoPE and in values without output bias, 0 to 1 (default 1)")(
      "weight-ridge", po::value<double>(), "added to the query weights, as a share of their mean (default 0)")(
      "latent-groups", po::value<std::int64_t>(),
      "--keys latent: latents per layer, together as wide as --kv-heads heads (default: one per KV head)")(
      "min-width", po::value<std::int64_t>(), "--budget lorc-progressive: narrowest latent in channels")(
      "max-width", po::value<std::int64_t>(), "--budget lorc-progressive: widest latent in channels");

  po::options_description choice("groups and budget");
  choice.add_options()("grouping", po::value<std::string>(),
                       "contiguous (default), or search: the groups with the least predicted loss")(
      "grouping-seeds", po::value<std::int64_t>()->default_value(16), "independent searches per layer")(
      "grouping-seed", po::value<std::int64_t>()->default_value(0), "seed of the searches")(
      "budget", po::value<std::string>(),
      "uniform (default); greedy or dp: KV heads per layer by predicted loss and measured KL, --kv-heads on average; "
      "lorc-progressive: widths of latents per layer")(
      "probe-data", po::value<std::vector<std::string>>()->composing(),
      "text for KL probes (--budget greedy, dp) and --compare; may be repeated")(
      "probe-windows", po::value<std::int64_t>()->default_value(8), "windows of that text")(
      "tensor-parallel", po::value<std::int64_t>(),
      "ranks of the runtime that will load the result: refuse KV heads that they cannot share evenly")(
      "stock", "refuse what a stock Hugging Face loader cannot read");

  po::options_description refit("refit");
  refit.add_options()("refit",
                      "fit projections again to the folded model's own inputs (two streams, closed form; needs "
                      "--refit-data)")("refit-data", po::value<std::vector<std::string>>()->composing(),
                                       ".txt or .jsonl text for the refit; may be repeated")(
      "refit-samples", po::value<std::int64_t>()->default_value(128), "sequences of the refit")(
      "refit-sweeps", po::value<std::int64_t>(),
      "rounds of keys and queries after the first fit of the queries (default 2; stock layout only)")(
      "refit-parts", po::value<std::string>(),
      "what is fitted again, joined by '+': queries, keys (with queries; stock layout only), output, down (the MLP's "
      "last matrix); default queries+keys+output")(
      "refit-ridge", po::value<double>(),
      "pull towards the folded weights, as a share of the mean input energy (default: the best of several, by "
      "held-out error)")("field", po::value<std::string>()->default_value("text"), "field of .jsonl lines")(
      "data-seed", po::value<std::int64_t>()->default_value(0), "seed that draws sequences and windows")(
      "seq-len", po::value<std::int64_t>()->default_value(0),
      "tokens of a sequence (default 0: as in calibration, 2048 without statistics)");

  po::options_description run("run");
  run.add_options()(
      "compare", po::value<std::string>(),
      "FOLD,FOLD,...: score several folds on --probe-data instead of writing one; a FOLD is "
      "KEYS[:METRIC][/VALUES[:METRIC]][@option=value...], a name (meanpool, weights, query, paper, latent, "
      "...), or all; writes OUT/compare.json and OUT/compare.md")("plan-only", "write OUT/plan.json and stop")(
      "plan", po::value<std::string>(), "apply this plan (its groups may have been edited) instead of planning")(
      "held-out", po::value<std::string>()->default_value("on"),
      "on or off: price bases fitted to one half of the calibration sequences on the other half")(
      "max-shard-size", po::value<std::string>()->default_value("5GB"),
      "largest shard of the result, for example 500MB or 5GB")("dry-run", "say what would be done and stop")(
      "overwrite", "replace another model or plan of headfold that stands in --out")(
      "out", po::value<std::string>()->required(), "folder of the result");
  po::options_description options("convert options");
  options.add(fold).add(choice).add(refit).add(run);
  options.add_options()("device", po::value<std::string>()->default_value("cpu"),
                        "where matrices are factorised: cpu (LAPACK), cuda (cuSOLVER on the rank's GPU), cuda:N, auto; "
                        "plans of the two agree to rounding, not to the byte");
  return options;
}

const std::vector<const char*>& plan_options() {
  static const std::vector<const char*> names = {
      "keys",          "key-metric",   "values",      "value-metric", "kv-heads", "ratio",
      "sink-weight",   "weight-ridge", "mean-weight", "slow-band",    "polish",   "context",
      "latent-groups", "min-width",    "max-width",   "grouping",     "budget",   "plan-only"};
  return names;
}

std::int64_t target_heads(const po::variables_map& values, const checkpoint::ModelConfig& config) {
  const bool heads = values.count("kv-heads") > 0, ratio = values.count("ratio") > 0;
  const std::string legal = fmt::format("{}", fmt::join(folding::legal_kv_heads(config), ", "));
  if (heads == ratio)
    throw UsageError(
        heads ? "--kv-heads and --ratio say the same thing; give one of them" : "give --kv-heads or --ratio",
        fmt::format("this model has {} KV heads; legal numbers are {}", config.kv_heads, legal));
  if (heads) return values["kv-heads"].as<std::int64_t>();
  const double share = values["ratio"].as<double>();
  const double exact = share * static_cast<double>(config.kv_heads);
  const double whole = std::round(exact);
  if (!(share > 0 && share <= 1) || std::abs(exact - whole) > 1e-6 * static_cast<double>(config.kv_heads) ||
      whole < 1 || config.kv_heads % static_cast<std::int64_t>(whole) != 0) {
    std::string ratios;
    for (const std::int64_t n : folding::legal_kv_heads(config))
      ratios += fmt::format("{}{:.4g}", ratios.empty() ? "" : ", ",
                            static_cast<double>(n) / static_cast<double>(config.kv_heads));
    throw UsageError(fmt::format("--ratio {} of {} KV heads gives no equal groups; legal ratios are {} (KV heads {})",
                                 share, config.kv_heads, ratios, legal));
  }
  return static_cast<std::int64_t>(whole);
}

FoldOptions fold_options(const po::variables_map& values, const checkpoint::ModelConfig& config) {
  FoldOptions options;
  const auto text = [&](const char* name, const std::string& fallback) {
    return values.count(name) > 0 ? values[name].as<std::string>() : fallback;
  };
  const auto number = [&](const char* name, auto& value) {
    if (values.count(name) > 0) value = values[name].as<std::decay_t<decltype(value)>>();
  };
  // Names are read by functions that know no options.
  const auto named = [&](const char* name, const std::string& fallback, auto read) {
    try {
      return read(text(name, fallback));
    } catch (const UsageError& error) {
      throw UsageError(fmt::format("--{} {}: {}", name, text(name, fallback), error.what()), error.hint());
    }
  };
  const bool rotates = config.family == checkpoint::Family::llama;
  options.keys = named("keys", rotates ? "rope-commuting" : "norope", folding::parse_key_fold);
  options.key_metric = named("key-metric", "act+query", folding::parse_metric);
  options.values = named("values", "svd", folding::parse_value_fold);
  options.value_metric = named("value-metric", "act", folding::parse_metric);
  options.grouping = named("grouping", "contiguous", folding::parse_grouping);
  options.allocation = named("budget", "uniform", folding::parse_allocation);
  options.slow_band = parse_slow_band(text("slow-band", "off"));
  options.refit = values.count("refit") > 0;
  number("sink-weight", options.sink_weight);
  number("mean-weight", options.mean_weight);
  number("weight-ridge", options.weight_ridge);
  number("polish", options.polish);
  number("context", options.context);
  number("latent-groups", options.latent_groups);
  number("min-width", options.min_width);
  number("max-width", options.max_width);
  options.kv_heads = target_heads(values, config);
  return options;
}

folding::GroupingOptions grouping_options(const po::variables_map& values) {
  folding::GroupingOptions options;
  options.seeds = at_least(values, "grouping-seeds", 1);
  options.seed = static_cast<std::uint64_t>(at_least(values, "grouping-seed", 0));
  return options;
}

folding::RefitOptions refit_options(const po::variables_map& values) {
  folding::RefitOptions options;
  if (values.count("refit-sweeps") > 0) options.key_sweeps = at_least(values, "refit-sweeps", 0);
  if (values.count("refit-ridge") > 0) {
    const double ridge = values["refit-ridge"].as<double>();
    if (!(ridge > 0 && std::isfinite(ridge))) throw UsageError(fmt::format("--refit-ridge {}: must be above 0", ridge));
    options.ridges = {ridge};
  }
  if (values.count("refit-parts") > 0) {
    const std::string text = values["refit-parts"].as<std::string>();
    std::set<std::string> parts;
    std::string part;
    for (std::istringstream stream(text + "+"); std::getline(stream, part, '+');)
      if (!parts.insert(part).second || (part != "queries" && part != "keys" && part != "output" && part != "down"))
        throw UsageError(fmt::format("--refit-parts {}: join one or more of queries, keys, output, down by '+'", text));
    if (parts.contains("keys") && !parts.contains("queries"))
      throw UsageError(fmt::format("--refit-parts {}: keys are fitted together with queries", text),
                       "write queries+keys");
    options.queries = parts.contains("queries");
    if (!parts.contains("keys")) options.key_sweeps = 0;
    options.output = parts.contains("output");
    options.down = parts.contains("down");
  }
  return options;
}

calibration::TextSample refit_text(const po::variables_map& values) {
  return {paths(values, "refit-data"), values["field"].as<std::string>(), at_least(values, "refit-samples", 2),
          at_least(values, "seq-len", 0), at_least(values, "data-seed", 0)};
}

calibration::TextSample held_out_text(const po::variables_map& values) {
  return {paths(values, "probe-data"), values["field"].as<std::string>(), at_least(values, "probe-windows", 1),
          at_least(values, "seq-len", 0), at_least(values, "data-seed", 0)};
}

void settle_length(calibration::TextSample& text, const checkpoint::ModelConfig& config,
                   const calibration::StatisticsFile* statistics) {
  if (text.length == 0) text.length = statistics != nullptr ? statistics->header().sequence_length : 2048;
  text.length = std::min(text.length, config.max_positions);
}

}  // namespace headfold::jobs
