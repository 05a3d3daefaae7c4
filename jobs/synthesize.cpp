// headfold synthesize: a checkpoint of random weights at real shapes, in the real sharded layout, for measuring.

#include <ATen/Parallel.h>
#include <headfold/base/files.h>
#include <headfold/base/log.h>
#include <headfold/base/table.h>
#include <headfold/base/version.h>
#include <headfold/checkpoint/synthetic.h>
#include <headfold/checkpoint/writer.h>

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cmath>
#include <iostream>

#include "values.h"

namespace headfold::jobs {
namespace {

std::int64_t count_option(const po::variables_map& values, const std::string& name) {
  if (values.count(name) == 0) return 0;
  const auto value = values[name].as<std::int64_t>();
  if (value < 1) throw UsageError(fmt::format("--{} {}: must be 1 or more", name, value));
  return value;
}

}  // namespace

void synthesize(const Context& context, const std::vector<std::string>& arguments) {
  po::options_description own("synthesize");
  own.add_options()("shape", po::value<std::string>()->required(),
                    "llama2-7b, llama2-13b, llama2-70b, bloomz-7b1, or a config.json")(
      "out", po::value<std::string>()->required(), "model folder to write")("layers", po::value<std::int64_t>(),
                                                                            "number of layers, instead of the shape's")(
      "kv-heads", po::value<std::int64_t>(), "number of KV heads, instead of the shape's")(
      "vocab", po::value<std::int64_t>(), "vocabulary, instead of the shape's")(
      "dtype", po::value<std::string>()->default_value(""), "float32, float16 or bfloat16, instead of the shape's")(
      "seed", po::value<std::int64_t>()->default_value(0), "seed of the weights")(
      "max-shard-size", po::value<std::string>()->default_value("5GiB"),
      "largest shard, in bytes or as 500MB, 5GiB, …")("tokenizer", po::value<std::string>(),
                                                      "model folder whose tokenizer files are copied")(
      "overwrite", po::bool_switch(), "replace another model of headfold that stands in --out")(
      "dry-run", "say what would be written, and stop");
  const po::variables_map values =
      parse(context, "synthesize", "headfold synthesize --shape SHAPE --out DIR [options]", own, arguments);
  const auto shape = values["shape"].as<std::string>();
  const fs::path out = values["out"].as<std::string>();
  const auto seed = static_cast<std::uint64_t>(at_least(values, "seed", 0));
  const std::uint64_t max_shard_bytes = parse_bytes("max-shard-size", values["max-shard-size"].as<std::string>());
  checkpoint::ShapeChange change;
  change.layers = count_option(values, "layers");
  change.kv_heads = count_option(values, "kv-heads");
  change.vocab = count_option(values, "vocab");
  change.dtype = values["dtype"].as<std::string>();
  if (!change.dtype.empty() && change.dtype != "float32" && change.dtype != "float16" && change.dtype != "bfloat16")
    throw UsageError(fmt::format("--dtype {}: choose float32, float16 or bfloat16", change.dtype));
  const Json base = read_shape(shape);
  const std::int64_t heads = checkpoint::parse_config(base, shape).heads;
  if (change.kv_heads > 0 && heads % change.kv_heads != 0)
    throw UsageError(fmt::format("--kv-heads {}: {} query heads cannot be shared evenly", change.kv_heads, heads),
                     fmt::format("choose a divisor of {}", heads));
  const checkpoint::ModelConfig config = checkpoint::change_shape(base, change, shape);
  std::vector<fs::path> copies;
  if (values.count("tokenizer") > 0) {
    const fs::path folder = values["tokenizer"].as<std::string>();
    copies = checkpoint::companion_files(folder);
    if (copies.empty()) throw InputError(fmt::format("{}: holds no tokenizer files", folder.string()));
  }
  OrderedJson headfold;
  headfold["format"] = "headfold-synthetic";
  headfold["format_version"] = 1;
  headfold["headfold_version"] = version();
  // A path would make the bytes depend on where the file lies.
  headfold["shape"] = fs::path(shape).filename().string();
  headfold["seed"] = seed;
  headfold["dtype"] = config.dtype;
  headfold["layers"] = config.layers;
  headfold["kv_heads"] = config.kv_heads;
  headfold["vocab"] = config.vocab;
  headfold["max_shard_bytes"] = max_shard_bytes;
  headfold["parameters"] = checkpoint::parameter_count(config);
  OutputFolder output;
  output.folder = out;
  output.overwrite = values["overwrite"].as<bool>();
  output.is_own = [&](const Json& made) {
    return without_version(made) == without_version(headfold) && read_json(out / "config.json") == config.raw;
  };
  output.companions = copies;
  if (is_made(context, output)) return;

  const std::vector<checkpoint::TensorSpec> specs = checkpoint::synthetic_specs(config);
  const checkpoint::ShardPlan plan = checkpoint::plan_shards(specs, max_shard_bytes);
  const std::uint64_t free = free_bytes(out);
  if (context.world.root()) {
    Table table({"what", "value"});
    table.add({"shape", fmt::format("{} ({})", shape, checkpoint::name_of(config.family))});
    table.add({"layers", std::to_string(config.layers)});
    table.add({"heads, KV heads, head_dim", fmt::format("{}, {}, {}", config.heads, config.kv_heads, config.head_dim)});
    table.add({"hidden, inner, vocabulary", fmt::format("{}, {}, {}", config.hidden, config.ffn, config.vocab)});
    table.add({"parameters", fmt::format("{} ({:.3f} thousand million)", checkpoint::parameter_count(config),
                                         static_cast<double>(checkpoint::parameter_count(config)) * 1e-9)});
    table.add({"dtype, seed", fmt::format("{}, {}", config.dtype, seed)});
    table.add(
        {"bytes", fmt::format("{} in {} tensors", human_bytes(static_cast<double>(plan.tensor_bytes)), specs.size())});
    table.add({"files",
               plan.files.size() == 1 ? plan.files[0] : fmt::format("{} … {}", plan.files.front(), plan.files.back())});
    table.add({"free at " + out.string(), human_bytes(static_cast<double>(free))});
    table.add({"ranks x threads", fmt::format("{} x {}", context.world.size(), at::get_num_threads())});
    std::cout << table.text() << std::flush;
  }
  if (plan.tensor_bytes > free)
    throw IoError(out.string(),
                  fmt::format("{} are needed, {} are free", human_bytes(static_cast<double>(plan.tensor_bytes)),
                              human_bytes(static_cast<double>(free))),
                  "fewer --layers, or another --out");
  if (values.count("dry-run") > 0) {
    if (context.world.root()) spdlog::info("dry run: nothing was written");
    return;
  }

  const auto start = std::chrono::steady_clock::now();
  checkpoint::write_synthetic(context.world, out, config, seed, max_shard_bytes, headfold, copies);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (context.world.root()) {
    const auto bytes = static_cast<double>(plan.tensor_bytes);
    spdlog::info("wrote {} in {} ({}/s): {}", human_bytes(bytes), human_seconds(seconds),
                 human_bytes(bytes / std::max(seconds, 1e-9)), out.string());
    spdlog::info("next: headfold inspect {}", shell_word(out.string()));
  }
}

}  // namespace headfold::jobs
