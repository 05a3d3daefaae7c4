#include <headfold/base/files.h>
#include <headfold/base/log.h>
#include <headfold/base/profile.h>
#include <headfold/base/progress.h>
#include <headfold/base/stop.h>
#include <headfold/base/table.h>
#include <headfold/calibration/text.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/checkpoint/writer.h>
#include <headfold/comm/stopping.h>
#include <headfold/device/device.h>
#include <headfold/folding/apply.h>
#include <headfold/linalg/linalg.h>
#include <headfold/model/compute.h>
#include <headfold/scale/memory.h>

#include <algorithm>
#include <cmath>
#include <iostream>
#include <optional>

#include "convert_compare.h"
#include "convert_options.h"
#include "convert_plan.h"

namespace headfold::jobs {

namespace {

using folding::FoldOptions;

std::string percent(double share) {
  return fmt::format("{:.3g} %", 100 * share);
}

/// Share of energy that the kept channels hold: point i of n stands for the share i / n of the channels.
double energy_at(const std::vector<double>& energy, std::int64_t kept, std::int64_t channels) {
  const auto n = static_cast<std::int64_t>(energy.size());
  if (n == 0 || channels == 0) return 0;
  return energy.at(static_cast<std::size_t>(std::clamp<std::int64_t>(kept * n / channels, 1, n) - 1));
}

const char* quantity_of(folding::Metric metric, bool keys) {
  switch (metric) {
    case folding::Metric::weights:
      return keys ? "squared error of key weights" : "squared error of value weights";
    case folding::Metric::act:
      return keys ? "squared error of keys" : "squared error of values";
    case folding::Metric::act_query:
    case folding::Metric::act_query_dist:
      return "squared error of scores";
    case folding::Metric::act_out:
      return "squared error of values behind the output projection";
    case folding::Metric::attn_out:
      return "squared error of attended values behind the output projection";
  }
  throw InternalError("unknown metric");
}

void print_plan(const folding::Plan& plan, const checkpoint::ModelConfig& config) {
  const bool held_out = plan.layers.at(0).key_held_out() >= 0;
  const bool uneven = [&] {
    for (const folding::LayerPlan& layer : plan.layers)
      if (layer.groups.size() != plan.layers[0].groups.size() || layer.key_width != plan.layers[0].key_width)
        return true;
    return false;
  }();
  std::vector<std::string> head = {"layer"};
  if (uneven) head.insert(head.end(), {"groups", "channels"});
  head.insert(head.end(), {"key loss", "value loss", "key energy kept", "value energy kept"});
  if (held_out) head.insert(head.end(), {"keys held out", "values held out"});
  Table table(head);
  for (const folding::LayerPlan& layer : plan.layers) {
    const std::int64_t channels = config.kv_heads / std::ssize(layer.groups) * config.head_dim;
    double keys = 0, values = 0;
    for (const folding::GroupPlan& group : layer.groups) {
      keys += energy_at(group.key_energy, layer.key_width, channels) / static_cast<double>(layer.groups.size());
      values += energy_at(group.value_energy, layer.value_width, channels) / static_cast<double>(layer.groups.size());
    }
    std::vector<std::string> row = {std::to_string(layer.layer)};
    if (uneven) row.insert(row.end(), {std::to_string(layer.groups.size()), std::to_string(layer.key_width)});
    row.insert(row.end(), {percent(layer.key_relative_loss()), percent(layer.value_relative_loss()), percent(keys),
                           percent(values)});
    if (held_out)
      row.insert(row.end(),
                 {fmt::format("{} ({} fitted)", percent(layer.key_held_out()), percent(layer.key_fitted())),
                  fmt::format("{} ({} fitted)", percent(layer.value_held_out()), percent(layer.value_fitted()))});
    table.add(row);
  }
  std::cout << fmt::format(
      "\npredicted relative loss per layer (keys: {}; values: {}){}\nand share of singular-value energy in the kept "
      "channels\n{}\n",
      quantity_of(plan.options.key_metric, true), quantity_of(plan.options.value_metric, false),
      held_out ? ",\nalso of bases fitted to one half of the calibration sequences on the other half," : "",
      table.text());
}

/// Says what a person should know about the statistics: too few tokens, near-singular Grams.
void warn_about(const folding::Plan& plan) {
  // A gap below a tenth is what a different draw of the same text would give.
  constexpr double kGap = 1.1;
  std::string layers;
  double worst = 1;
  for (const folding::LayerPlan& layer : plan.layers)
    for (const auto& [held_out, fitted] :
         {std::pair(layer.key_held_out(), layer.key_fitted()), std::pair(layer.value_held_out(), layer.value_fitted())})
      if (held_out > 1e-6 && held_out > kGap * fitted) {
        const std::string name = std::to_string(layer.layer);
        if (layers.empty() || !layers.ends_with(name)) layers += (layers.empty() ? "" : ", ") + name;
        worst = std::max(worst, held_out / std::max(fitted, 1e-12));
      }
  if (!layers.empty())
    spdlog::warn(
        "more calibration tokens would matter: in layers {} the loss on held-out sequences is up to {:.2f} times that "
        "on "
        "the fitted ones",
        layers, worst);
  for (const std::string& layer : near_singular_layers(plan))
    spdlog::warn("{}: directions that the calibration text hardly uses are not preserved", layer);
}

void print_refit(const folding::LayerRefit& layer) {
  std::string text = fmt::format("refit layer {}:", layer.layer);
  const auto add = [&](const folding::PartRefit& part) {
    // Queries and keys are judged by the divergence of attention rows, projections by their error.
    const auto shown = [&](double value) {
      return part.divergence ? fmt::format("{:.3g} nats", value) : percent(value);
    };
    text += fmt::format(" {} held out {} -> {}{};", part.part, shown(part.held_out_before), shown(part.held_out_after),
                        part.kept ? "" : " (not kept)");
  };
  if (!layer.part.empty()) add(layer);
  for (const folding::PartRefit& part : layer.others) add(part);
  text += fmt::format(" residual stream error {}", percent(layer.stream_error));
  std::cout << text << std::endl;
}

std::string loads_in(const FoldOptions& options, const checkpoint::ModelConfig& config) {
  if (options.allocation == folding::Allocation::greedy || options.allocation == folding::Allocation::dp) {
    const std::string obstacle = checkpoint::decilm_obstacle(config);
    if (!is_stock(options, config) || !obstacle.empty())
      return fmt::format("headfold only (KV heads may differ by layer{})", obstacle.empty() ? "" : "; " + obstacle);
    return "headfold and engines that read DeciLM configs (KV heads may differ by layer)";
  }
  return is_stock(options, config) ? "any Hugging Face LLaMA loader (stock grouped-query attention) and headfold"
                                   : "headfold only";
}

void describe(const FoldOptions& options, const checkpoint::Reader& reader, const fs::path& out, std::uint64_t shard) {
  const checkpoint::ModelConfig& config = reader.config();
  const std::int64_t element = folding::bytes_per_element(config.dtype);
  const auto before = config.cache_bytes_per_token(element);
  const auto after =
      static_cast<double>(before) * static_cast<double>(options.kv_heads) / static_cast<double>(config.kv_heads);
  std::string details;
  if (options.slow_band != 0)
    details += fmt::format("slow band      {} pairs\n",
                           options.slow_band < 0 ? std::string("auto") : std::to_string(options.slow_band));
  if (options.polish > 0) details += fmt::format("polish         {} sweeps\n", options.polish);
  if (options.refit) details += "refit          projections, from two streams\n";
  std::cout << fmt::format(
      "model          {} ({}, {} layers, hidden {}, {} heads, {} KV heads of {}, {})\n"
      "keys           {} with metric {}\n"
      "values         {} with metric {}\n"
      "{}"
      "KV heads       {} -> {} (groups of {}; {}; budget {})\n"
      "KV cache       {} -> {} per token\n"
      "layout         {}; loads in {}\n"
      "shards of at most {}, free space {}\n"
      "output         {}\n",
      reader.folder().string(), checkpoint::name_of(config.family), config.layers, config.hidden, config.heads,
      config.kv_heads, config.head_dim, config.dtype, name_of(options.keys), name_of(options.key_metric),
      name_of(options.values), name_of(options.value_metric), details, config.kv_heads, options.kv_heads,
      config.kv_heads / options.kv_heads, name_of(options.grouping), name_of(options.allocation),
      human_bytes(static_cast<double>(before)), human_bytes(after), checkpoint::name_of(layout_of(options)),
      loads_in(options, config), human_bytes(static_cast<double>(shard)),
      human_bytes(static_cast<double>(free_bytes(out))), out.string());
}

/// Whether `file` is the plan of this very command. UsageError when it is there, is not, and may not be replaced.
bool is_planned(const fs::path& file, const OrderedJson& request, bool overwrite) {
  if (!fs::exists(file)) return false;
  try {
    if (read_json(file).at("request") == Json::parse(request.dump())) return true;
  } catch (const std::exception&) {  // no plan, or one without what it was made for
  }
  if (overwrite) return false;
  throw UsageError(fmt::format("{} was planned otherwise", file.string()),
                   "choose another --out, or replace it with --overwrite");
}

/// What the options say, held against the model. Nothing of the statistics, which may not be made yet.
struct ConvertSettings {
  FoldOptions options;
  std::vector<folding::LayerTarget> given_targets;  ///< of a plan; empty without one
  folding::GroupingOptions grouping;
  folding::RefitOptions refit;
  calibration::TextSample refit_source, probe_source;
  std::string held_out;
  std::uint64_t shard = 0;
  bool by_layer = false, has_statistics = false;
};

/// The plan of --plan. UsageError beside options that it decides; IoError, InputError.
std::optional<folding::Plan> given_plan(const po::variables_map& values) {
  if (values.count("plan") == 0) return std::nullopt;
  for (const char* name : plan_options())
    if (values.count(name) > 0)
      throw UsageError(fmt::format("--{} and --plan exclude each other: the plan decides", name),
                       "edit the plan, or leave --plan out");
  const std::string file = values["plan"].as<std::string>();
  return folding::plan_from_json(read_json(file), file);
}

ConvertSettings read_settings(const po::variables_map& values, const checkpoint::ModelConfig& config,
                              const std::optional<folding::Plan>& given) {
  ConvertSettings s;
  s.shard = parse_bytes("max-shard-size", values["max-shard-size"].as<std::string>());
  s.options = given ? given->options : fold_options(values, config);
  if (values.count("refit") > 0) s.options.refit = true;
  folding::check_options(s.options, config);
  if (given) {
    s.given_targets = folding::targets_of(*given);
    folding::check_targets(s.given_targets, s.options, config, values["plan"].as<std::string>());
  }
  s.by_layer = s.options.allocation == folding::Allocation::greedy || s.options.allocation == folding::Allocation::dp;
  if (values.count("stock") > 0 && (!is_stock(s.options, config) || s.by_layer))
    throw UsageError(
        fmt::format("--stock: {} gives {}, which no stock Hugging Face loader reads",
                    s.by_layer ? "--budget " + name_of(s.options.allocation) : "--keys " + name_of(s.options.keys),
                    s.by_layer ? "layers with different numbers of KV heads (a DeciLM config)"
                               : fmt::format("cache layout {}", checkpoint::name_of(layout_of(s.options)))),
        "use --keys rope-commuting --budget uniform on a LLaMA model, or leave --stock out");
  s.refit_source = refit_text(values);
  s.probe_source = held_out_text(values);
  if (s.options.refit && s.refit_source.files.empty())
    throw UsageError("--refit needs text to run both models on", "give --refit-data FILE (.txt or .jsonl)");
  if (!s.options.refit && !s.refit_source.files.empty())
    throw UsageError("--refit-data without --refit", "add --refit, or leave --refit-data out");
  if (s.by_layer && !given && s.probe_source.files.empty())
    throw UsageError(
        fmt::format("--budget {} measures what each layer matters on held-out text", name_of(s.options.allocation)),
        "give --probe-data FILE (.txt or .jsonl)");
  s.held_out = values["held-out"].as<std::string>();
  if (s.held_out != "on" && s.held_out != "off")
    throw UsageError(fmt::format("--held-out {}: give on or off", s.held_out));
  s.grouping = grouping_options(values);
  s.refit = refit_options(values);
  if (values.count("tensor-parallel") > 0) {
    std::vector<std::int64_t> heads(static_cast<std::size_t>(config.layers), s.options.kv_heads);
    for (std::size_t l = 0; l < s.given_targets.size(); ++l) heads[l] = std::ssize(s.given_targets[l].groups);
    folding::check_tensor_parallel(heads, config.heads, values["tensor-parallel"].as<std::int64_t>());
  }
  s.has_statistics = values.count("calibration") > 0;
  if (!s.has_statistics && folding::needs_statistics(s.options))
    throw UsageError(fmt::format("--keys {} --key-metric {} --values {} --value-metric {} needs --calibration",
                                 name_of(s.options.keys), name_of(s.options.key_metric), name_of(s.options.values),
                                 name_of(s.options.value_metric)),
                     fmt::format("headfold calibrate --model {} makes the file; metric weights does without",
                                 values["model"].as<std::string>()));
  return s;
}

}  // namespace

void check_convert(const Planned& planned, const std::vector<std::string>& arguments) {
  const po::variables_map values = read_values("convert", convert_options(), arguments);
  if (values.count("plan") > 0 && planned.is_made(values["plan"].as<std::string>())) return;  // it decides the rest
  read_settings(values, planned.config_of(values["model"].as<std::string>()), given_plan(values));
}

void convert(const Context& context, const std::vector<std::string>& arguments) {
  const comm::Communicator& world = context.world;
  const po::variables_map values =
      parse(context, "convert",
            "headfold convert --model DIR --calibration F.h5 --kv-heads N --out DIR\n"
            "       headfold convert --model DIR --calibration F.h5 --plan plan.json --out DIR\n"
            "       headfold convert --model DIR --calibration F.h5 --kv-heads N --compare FOLD,FOLD,... --probe-data "
            "FILE --out DIR",
            convert_options(), arguments);
  // Models that are run on the way (refit, probes) compute on the CPU.
  linalg::set_backend(model::compute().on_host() ? linalg::Backend::lapack : linalg::Backend::cusolver);
  model::set_compute({});
  const Progress clock("convert", "", 1, false);
  const std::vector<Spent> spent_before = profile();
  const fs::path out = values["out"].as<std::string>();
  const bool speaks = world.root();
  const checkpoint::Reader reader(values["model"].as<std::string>());
  const checkpoint::ModelConfig& config = reader.config();
  if (const auto problems = checkpoint::layout_problems(reader); !problems.empty())
    throw InputError(fmt::format("{}: {} fault(s): {}", reader.folder().string(), problems.size(),
                                 fmt::join(problems.begin(),
                                           problems.begin() + std::min<std::ptrdiff_t>(3, std::ssize(problems)), "; ")),
                     "weights and config.json do not belong together; headfold inspect lists every fault");
  if (fs::exists(out) && fs::equivalent(out, reader.folder()))
    throw UsageError("--out is the model folder itself", "choose another --out");
  // From here on a signal, or a file STOP beside the output, ends the job in good order: between two layers.
  listen_for_stop();
  watch_stop_file(stop_file_beside(out));
  if (values.count("compare") > 0) {
    compare(context, reader, values, arguments);
    return;
  }

  const std::optional<folding::Plan> given = given_plan(values);
  if (given && given->model_hash != reader.fingerprint())
    throw InputError(
        fmt::format("{}: a plan for another model (fingerprint {}..., {} has {}...)", values["plan"].as<std::string>(),
                    given->model_hash.substr(0, 12), reader.folder().string(), reader.fingerprint().substr(0, 12)),
        "plan again with headfold convert --plan-only");
  const bool from_plan = given.has_value();
  const ConvertSettings settings = read_settings(values, config, given);
  FoldOptions options = settings.options;
  const bool by_layer = settings.by_layer, has_statistics = settings.has_statistics;
  const std::vector<folding::LayerTarget>& given_targets = settings.given_targets;
  calibration::TextSample refit_source = settings.refit_source, probe_source = settings.probe_source;
  const folding::GroupingOptions& grouping = settings.grouping;
  const folding::RefitOptions& refit_settings = settings.refit;
  const std::string& held_out = settings.held_out;
  const std::uint64_t shard = settings.shard;
  options = folding::with_effective_metrics(options, has_statistics);
  world.on_root([&] { check_own_folder(out); });

  if (speaks) {
    describe(options, reader, out, shard);
    const std::int64_t items = config.layers * options.kv_heads;
    std::cout << fmt::format("work           {} groups in {} layers over {} rank(s), about {} each per rank\n\n", items,
                             config.layers, world.size(), human_bytes(scale::conversion_memory(config)))
              << std::flush;
  }
  if (values.count("dry-run") > 0) {
    if (has_statistics && !fs::exists(values["calibration"].as<std::string>()))
      throw IoError(values["calibration"].as<std::string>(), "there is no such file", "headfold calibrate makes it");
    if (speaks) std::cout << "dry run: nothing was written\n";
    return;
  }

  std::unique_ptr<calibration::StatisticsFile> statistics;
  if (has_statistics)
    statistics = std::make_unique<calibration::StatisticsFile>(values["calibration"].as<std::string>());
  settle_length(refit_source, config, statistics.get());
  settle_length(probe_source, config, statistics.get());

  OrderedJson request;
  request["model"] = reader.fingerprint();
  request["statistics"] = statistics ? OrderedJson(statistics->content_hash()) : OrderedJson();
  request["fold"] = to_json(options);
  request["kv_heads"] = options.kv_heads;
  request["groups"] = OrderedJson::array();
  for (const folding::LayerTarget& target : given_targets)
    request["groups"].push_back({target.groups, target.key_width, target.value_width});
  if (options.grouping == folding::Grouping::search) request["search"] = {grouping.seeds, grouping.seed};
  const auto describe_text = [&](const calibration::TextSample& text) {
    OrderedJson json{{"samples", text.samples}, {"length", text.length}, {"seed", text.seed}, {"field", text.field}};
    world.on_root([&] { json["data"] = calibration::data_hash(text.files, text.field); });
    return json;
  };
  if (options.refit)
    request["refit"] = OrderedJson{{"options", to_json(refit_settings)}, {"text", describe_text(refit_source)}};
  if (by_layer && !from_plan) request["probe"] = describe_text(probe_source);
  request["max_shard_bytes"] = shard;
  const bool plan_only = values.count("plan-only") > 0;
  const bool overwrite = values.count("overwrite") > 0;
  const fs::path plan_file = out / "plan.json";
  if (plan_only) {
    std::int64_t planned = 0;
    world.on_root([&] { planned = is_planned(plan_file, request, overwrite) ? 1 : 0; });
    if (world.all_reduce(planned) == 1) {  // zeros on the other ranks
      if (speaks)
        std::cout << fmt::format("{} is already the plan of this very command; nothing to do\n", plan_file.string());
      return;
    }
  }
  OutputFolder output;
  output.folder = out;
  output.overwrite = overwrite;
  output.is_own = [&](const Json& made) {
    // Either file may be damaged.
    const Json known = made.contains("request") ? made["request"] : read_json(out / "convert.json").at("request");
    return known == Json::parse(request.dump());
  };
  output.companions = checkpoint::companion_files(reader.folder());
  output.others = {"convert.json"};
  // A plan may be applied where it lies.
  std::error_code elsewhere;
  if (from_plan && fs::equivalent(values["plan"].as<std::string>(), plan_file, elsewhere)) output.keep = {plan_file};
  if (!plan_only && is_made(context, output)) return;

  if (given && statistics && !given->statistics_hash.empty() && given->statistics_hash != statistics->content_hash() &&
      speaks)
    spdlog::warn("{}: planned from other statistics than {}; its groups are applied, its losses computed again",
                 values["plan"].as<std::string>(), statistics->path().string());
  // A given plan brings decisions only: its losses may be those of groups that were edited since, so all are computed
  // again.
  Decision decision{given_targets, given ? given->decisions : OrderedJson()};
  if (!from_plan) decision = decide_targets(world, reader, statistics.get(), options, grouping, probe_source);
  folding::KeptBases bases;
  folding::Plan plan = make_plan(world, reader, statistics.get(), options, decision.targets, held_out == "on", &bases);
  plan.decisions = decision.report;
  if (values.count("tensor-parallel") > 0) {
    std::vector<std::int64_t> heads;
    for (const folding::LayerTarget& target : decision.targets) heads.push_back(std::ssize(target.groups));
    folding::check_tensor_parallel(heads, config.heads, values["tensor-parallel"].as<std::int64_t>());
  }
  const double seconds_plan = clock.seconds();
  if (speaks) {
    print_plan(plan, config);
    warn_about(plan);
  }
  if (plan_only) {
    OrderedJson json = to_json(plan);
    json["request"] = request;
    world.on_root([&] { write_json(plan_file, json); });
    if (speaks)
      std::cout << fmt::format(
          "wrote {}\nnext: edit its groups if you like, then\n  headfold convert --model {}{} --plan {} --out DIR\n",
          plan_file.string(), shell_word(reader.folder().string()),
          has_statistics ? " --calibration " + shell_word(values["calibration"].as<std::string>()) : "",
          shell_word(plan_file.string()));
    return;
  }
  folding::Refit refit{&refit_settings, {}, {}};
  if (options.refit) {
    refit.sequences = calibration::read_sequences(world, reader.folder(), config.vocab, refit_source);
    if (speaks) refit.report = print_refit;
  }
  folding::apply_plan(world, reader, statistics.get(), plan, out, shard, options.refit ? &refit : nullptr, &bases,
                      request, output.keep);
  const double seconds = clock.seconds();
  OrderedJson record = run_record(context, "convert", arguments, seconds);
  record["seconds_plan"] = seconds_plan;
  record["seconds_apply"] = seconds - seconds_plan;
  // Seconds of all threads of all ranks by kind of work (base/profile.h).
  std::vector<Spent> spent = profile();
  for (std::size_t i = 0; i < spent.size(); ++i) {  // other conversions of this process are not this one's
    spent[i].seconds -= spent_before[i].seconds;
    spent[i].processor_seconds -= spent_before[i].processor_seconds;
  }
  std::vector<std::int64_t> milliseconds;
  for (const Spent& one : spent)
    for (const double part : {one.seconds, one.processor_seconds}) milliseconds.push_back(std::lround(part * 1000));
  world.all_reduce(std::span(milliseconds));
  record["profile"] = record["profile_processor"] = OrderedJson::object();
  for (std::size_t i = 0; i < spent.size(); ++i) {
    record["profile"][spent[i].work] = static_cast<double>(milliseconds[2 * i]) / 1000;
    record["profile_processor"][spent[i].work] = static_cast<double>(milliseconds[2 * i + 1]) / 1000;
  }
  record["request"] = request;
  world.on_root([&] { write_json(out / "convert.json", record); });
  if (speaks) {
    const std::int64_t element = folding::bytes_per_element(config.dtype);
    const checkpoint::ModelConfig after = checkpoint::read_config(out);
    std::cout << fmt::format(
        "KV cache {} -> {} per token; loads in {}\nwrote {} in {}\nnext:\n  headfold verify --model {} --original {} "
        "--data "
        "FILE\n"
        "  headfold evaluate --model {} --reference {} --data FILE\n",
        human_bytes(static_cast<double>(config.cache_bytes_per_token(element))),
        human_bytes(static_cast<double>(after.cache_bytes_per_token(element))), loads_in(options, config), out.string(),
        human_seconds(seconds), shell_word(out.string()), shell_word(reader.folder().string()),
        shell_word(out.string()), shell_word(reader.folder().string()));
  }
}

}  // namespace headfold::jobs
