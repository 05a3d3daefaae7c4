#include <headfold/base/files.h>
#include <headfold/base/log.h>
#include <headfold/base/progress.h>
#include <headfold/base/table.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/device/device.h>
#include <headfold/folding/apply.h>

#include <cmath>
#include <iostream>

#include "job.h"

namespace headfold::jobs {

namespace {

using folding::FoldOptions;
using folding::KeyFold;

po::options_description convert_options() {
  po::options_description options("convert options");
  options.add_options()("model", po::value<std::string>()->required(), "folder of the model to fold")(
      "calibration", po::value<std::string>(),
      "statistics file of headfold calibrate; not needed for metric weights and for meanpool")(
      "kv-heads", po::value<std::int64_t>(), "KV heads of the result")(
      "ratio", po::value<double>(), "the same as a share of the model's KV heads, for example 0.5")(
      "keys", po::value<std::string>(),
      "meanpool, norope (BLOOM; its default), post-rotation, rope-commuting (LLaMA; its default)")(
      "key-metric", po::value<std::string>(), "weights, act, act+query (default act+query)")(
      "values", po::value<std::string>(), "meanpool, svd (default svd)")("value-metric", po::value<std::string>(),
                                                                         "weights, act (default act)")(
      "sink-weight", po::value<double>(),
      "weight of the first token of every sequence in the statistics, 0 to 1 (default 1)")(
      "weight-ridge", po::value<double>(), "added to the query weights, as a share of their mean (default 0)")(
      "plan-only", "write OUT/plan.json and stop")(
      "plan", po::value<std::string>(), "apply this plan (its groups may have been edited) instead of planning")(
      "max-shard-size", po::value<std::string>()->default_value("5GB"),
      "largest shard of the result, for example 500MB or 5GB")("dry-run", "say what would be done and stop")(
      "overwrite", "replace another conversion that stands in --out")("out", po::value<std::string>()->required(),
                                                                      "folder of the result");
  return options;
}

std::uint64_t parse_size(const std::string& text) {
  std::size_t used = 0;
  double number = 0;
  try {
    number = std::stod(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  const std::string unit = text.substr(used);
  const double factor = unit.empty() || unit == "B" ? 1
                        : unit == "KB"              ? 1e3
                        : unit == "MB"              ? 1e6
                        : unit == "GB"              ? 1e9
                        : unit == "KiB"             ? 1024.0
                        : unit == "MiB"             ? 1048576.0
                        : unit == "GiB"             ? 1073741824.0
                                                    : 0;
  if (used == 0 || factor == 0 || !(number > 0) || !(number * factor >= 1) || number * factor > 9e18)
    throw UsageError(fmt::format("--max-shard-size {}: expected a number with B, KB, MB, GB, KiB, MiB or GiB", text));
  return static_cast<std::uint64_t>(number * factor);
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
  const bool rotates = config.family == checkpoint::Family::llama;
  options.keys = folding::parse_key_fold(text("keys", rotates ? "rope-commuting" : "norope"));
  options.key_metric = folding::parse_metric(text("key-metric", "act+query"));
  options.values = folding::parse_value_fold(text("values", "svd"));
  options.value_metric = folding::parse_metric(text("value-metric", "act"));
  if (values.count("sink-weight") > 0) options.sink_weight = values["sink-weight"].as<double>();
  if (values.count("weight-ridge") > 0) options.weight_ridge = values["weight-ridge"].as<double>();
  options.kv_heads = target_heads(values, config);
  return options;
}

std::string percent(double share) {
  return fmt::format("{:.3g} %", 100 * share);
}

double energy_at(const std::vector<double>& energy, std::int64_t kept_one_of) {
  // Point i of n stands for the share i / n of the channels; one head of a group keeps 1 / group size of them.
  const auto n = static_cast<std::int64_t>(energy.size());
  return energy.at(static_cast<std::size_t>(std::max<std::int64_t>(1, n / kept_one_of) - 1));
}

void print_plan(const folding::Plan& plan, const checkpoint::ModelConfig& config) {
  const std::int64_t size = config.kv_heads / plan.options.kv_heads;
  Table table({"layer", "key loss", "value loss", "key energy kept", "value energy kept"});
  for (const folding::LayerPlan& layer : plan.layers) {
    double keys = 0, values = 0;
    for (const folding::GroupPlan& group : layer.groups) {
      keys += energy_at(group.key_energy, size) / static_cast<double>(layer.groups.size());
      values += energy_at(group.value_energy, size) / static_cast<double>(layer.groups.size());
    }
    table.add({std::to_string(layer.layer), percent(layer.key_relative_loss()), percent(layer.value_relative_loss()),
               percent(keys), percent(values)});
  }
  const char* key_quantity = plan.options.key_metric == folding::Metric::act_query ? "squared error of scores"
                             : plan.options.key_metric == folding::Metric::act     ? "squared error of keys"
                                                                                   : "squared error of key weights";
  const char* value_quantity =
      plan.options.value_metric == folding::Metric::act ? "squared error of values" : "squared error of value weights";
  std::cout << fmt::format(
      "\npredicted relative loss per layer (keys: {}; values: {})\nand share of singular-value energy in the strongest "
      "1/{} of the channels\n{}\n",
      key_quantity, value_quantity, size, table.text());
}

void describe(const FoldOptions& options, const checkpoint::Reader& reader, const fs::path& out, std::uint64_t shard) {
  const checkpoint::ModelConfig& config = reader.config();
  const std::int64_t element = folding::bytes_per_element(config.dtype);
  const auto before = config.cache_bytes_per_token(element);
  const auto after = before / config.kv_heads * options.kv_heads;
  std::cout << fmt::format(
      "model          {} ({}, {} layers, hidden {}, {} heads, {} KV heads of {}, {})\n"
      "keys           {} with metric {}\n"
      "values         {} with metric {}\n"
      "KV heads       {} -> {} (groups of {})\n"
      "KV cache       {} -> {} per token\n"
      "layout         {}; loads in {}\n"
      "shards of at most {}, free space {}\n"
      "output         {}\n",
      reader.folder().string(), checkpoint::name_of(config.family), config.layers, config.hidden, config.heads,
      config.kv_heads, config.head_dim, config.dtype, name_of(options.keys), name_of(options.key_metric),
      name_of(options.values), name_of(options.value_metric), config.kv_heads, options.kv_heads,
      config.kv_heads / options.kv_heads, human_bytes(static_cast<double>(before)),
      human_bytes(static_cast<double>(after)), checkpoint::name_of(layout_of(options)),
      is_stock(options, config) ? "any Hugging Face LLaMA loader (stock grouped-query attention) and headfold"
                                : "headfold only",
      human_bytes(static_cast<double>(shard)), human_bytes(static_cast<double>(free_bytes(out))), out.string());
}

/// Memory of one rank while it folds a layer: weights of one layer's attention, its moments and their working copies,
/// in float64.
double layer_memory(const checkpoint::ModelConfig& config) {
  const auto hidden = static_cast<double>(config.hidden), width = static_cast<double>(config.heads * config.head_dim),
             kv = static_cast<double>(config.kv_width());
  return 8 * (2 * hidden * width * 2 + 2 * hidden * kv * 2 + 6 * hidden * hidden + 2 * kv * kv);
}

bool finished(const fs::path& out, const OrderedJson& request) {
  if (!fs::exists(out / "convert.json") || !fs::exists(out / "headfold.json") || !fs::exists(out / "config.json"))
    return false;
  if (!fs::exists(out / "model.safetensors") && !fs::exists(out / "model.safetensors.index.json")) return false;
  try {
    const Json record = read_json(out / "convert.json");
    const auto found = record.find("request");
    return found != record.end() && *found == Json::parse(request.dump());
  } catch (const Error&) {
    return false;
  }
}

}  // namespace

void convert(const Context& context, const std::vector<std::string>& arguments) {
  const comm::Communicator& world = context.world;
  const po::variables_map values =
      parse(context, "convert",
            "headfold convert --model DIR --calibration F.h5 --kv-heads N --out DIR\n"
            "       headfold convert --model DIR --calibration F.h5 --plan plan.json --out DIR",
            convert_options(), arguments);
  const Progress clock("convert", "", 1, false);
  const fs::path out = values["out"].as<std::string>();
  const bool speaks = world.root();
  const std::uint64_t shard = parse_size(values["max-shard-size"].as<std::string>());
  const checkpoint::Reader reader(values["model"].as<std::string>());
  const checkpoint::ModelConfig& config = reader.config();
  if (const auto problems = checkpoint::layout_problems(reader); !problems.empty())
    throw InputError(fmt::format("{}: {} fault(s): {}", reader.folder().string(), problems.size(),
                                 fmt::join(problems.begin(),
                                           problems.begin() + std::min<std::ptrdiff_t>(3, std::ssize(problems)), "; ")),
                     "weights and config.json do not belong together; headfold inspect lists every fault");
  if (fs::exists(out) && fs::equivalent(out, reader.folder()))
    throw UsageError("--out is the model folder itself", "choose another --out");

  folding::Plan given;
  const bool from_plan = values.count("plan") > 0;
  if (from_plan) {
    for (const char* name : {"keys", "key-metric", "values", "value-metric", "kv-heads", "ratio", "sink-weight",
                             "weight-ridge", "plan-only"})
      if (values.count(name) > 0)
        throw UsageError(fmt::format("--{} and --plan exclude each other: the plan decides", name),
                         "edit the plan, or leave --plan out");
    const std::string file = values["plan"].as<std::string>();
    given = folding::plan_from_json(read_json(file), file);
    if (given.model_hash != reader.fingerprint())
      throw InputError(
          fmt::format("{}: a plan for another model (fingerprint {}..., {} has {}...)", file,
                      given.model_hash.substr(0, 12), reader.folder().string(), reader.fingerprint().substr(0, 12)),
          "plan again with headfold convert --plan-only");
  }
  FoldOptions options = from_plan ? given.options : fold_options(values, config);
  folding::check_options(options, config);
  const bool has_statistics = values.count("calibration") > 0;
  if (!has_statistics && folding::needs_statistics(options))
    throw UsageError(fmt::format("--keys {} --key-metric {} --values {} --value-metric {} needs --calibration",
                                 name_of(options.keys), name_of(options.key_metric), name_of(options.values),
                                 name_of(options.value_metric)),
                     fmt::format("headfold calibrate --model {} makes the file; metric weights does without",
                                 reader.folder().string()));
  options = folding::with_effective_metrics(options, has_statistics);
  check_output_folder(out);

  if (speaks) {
    describe(options, reader, out, shard);
    const std::int64_t items = config.layers * options.kv_heads;
    std::cout << fmt::format("work           {} groups in {} layers over {} rank(s), about {} each per rank\n\n", items,
                             config.layers, world.size(), human_bytes(layer_memory(config)))
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

  OrderedJson request;
  request["model"] = reader.fingerprint();
  request["statistics"] = statistics ? OrderedJson(statistics->content_hash()) : OrderedJson();
  request["fold"] = to_json(options);
  request["kv_heads"] = options.kv_heads;
  request["groups"] = from_plan ? OrderedJson(folding::groups_of(given)) : OrderedJson("contiguous");
  request["max_shard_bytes"] = shard;
  const bool plan_only = values.count("plan-only") > 0;
  std::int64_t done = 0;
  world.on_root([&] { done = !plan_only && finished(out, request) ? 1 : 0; });
  if (world.all_reduce(done) > 0) {
    if (speaks)
      std::cout << fmt::format("{} is already the result of this very command; nothing to do\n", out.string());
    return;
  }

  world.on_root([&] {
    if (!plan_only && values.count("overwrite") == 0 && fs::exists(out / "headfold.json") &&
        fs::exists(out / "convert.json"))
      throw UsageError(fmt::format("{} holds another conversion", out.string()),
                       "choose another --out, or replace it with --overwrite");
  });

  // A given plan brings decisions only: its losses may be those of groups that were edited since, so all are computed
  // again.
  const folding::Plan plan = make_plan(world, reader, statistics.get(), options,
                                       from_plan ? folding::groups_of(given) : std::vector<folding::Groups>{});
  const double seconds_plan = clock.seconds();
  if (speaks) print_plan(plan, config);
  if (plan_only) {
    const fs::path file = out / "plan.json";
    world.on_root([&] { write_json(file, to_json(plan)); });
    if (speaks)
      std::cout << fmt::format(
          "wrote {}\nnext: edit its groups if you like, then\n  headfold convert --model {}{} --plan {} --out DIR\n",
          file.string(), reader.folder().string(),
          has_statistics ? " --calibration " + values["calibration"].as<std::string>() : "", file.string());
    return;
  }
  // From here on what an earlier run left no longer describes this folder.
  world.on_root([&] {
    for (const char* stale : {"convert.json", "verification.json"}) {
      std::error_code code;
      fs::remove(out / stale, code);
    }
  });
  folding::apply_plan(world, reader, statistics.get(), plan, out, shard);
  const double seconds = clock.seconds();
  OrderedJson record = run_record(context, "convert", arguments, seconds);
  record["seconds_plan"] = seconds_plan;
  record["seconds_apply"] = seconds - seconds_plan;
  record["request"] = request;
  world.on_root([&] { write_json(out / "convert.json", record); });
  if (speaks) {
    const std::int64_t element = folding::bytes_per_element(config.dtype);
    const auto before = config.cache_bytes_per_token(element);
    std::cout << fmt::format(
        "KV cache {} -> {} per token; {}\nwrote {} in {}\nnext:\n  headfold verify --model {} --original {} --data "
        "FILE\n"
        "  headfold evaluate --model {} --reference {} --data FILE\n",
        human_bytes(static_cast<double>(before)),
        human_bytes(static_cast<double>(before / config.kv_heads * options.kv_heads)),
        is_stock(options, config) ? "a stock grouped-query checkpoint" : "loads in headfold only", out.string(),
        human_seconds(seconds), out.string(), reader.folder().string(), out.string(), reader.folder().string());
  }
}

}  // namespace headfold::jobs
