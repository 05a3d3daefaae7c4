// headfold export: folded models for runtimes that do not know their layout, and adapters merged into their base.

#include <headfold/base/files.h>
#include <headfold/base/log.h>
#include <headfold/base/table.h>
#include <headfold/checkpoint/expanded.h>
#include <headfold/checkpoint/writer.h>
#include <headfold/finetune/lora.h>

#include <chrono>
#include <filesystem>
#include <iostream>

#include "job.h"

namespace headfold::jobs {
namespace {

void say_dry_run(const Context& context) {
  if (context.world.root()) spdlog::info("dry run: nothing was written");
}

void say_written(const Context& context, const std::filesystem::path& out, std::chrono::steady_clock::time_point start,
                 const std::string& what) {
  if (!context.world.root()) return;
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  spdlog::info("wrote {} in {}: {}", out.string(), human_seconds(seconds), what);
}

void export_merged(const Context& context, const checkpoint::Reader& reader, const std::filesystem::path& folder,
                   OutputFolder output, std::uint64_t max_shard_bytes, bool dry_run) {
  const finetune::Adapter adapter = finetune::read_adapter(folder, reader.config());
  if (!adapter.base_fingerprint.empty() && adapter.base_fingerprint != reader.fingerprint())
    throw InputError(fmt::format("{}: was trained on a model with fingerprint {}... ({}), {} has {}...",
                                 folder.string(), adapter.base_fingerprint.substr(0, 12), adapter.base,
                                 reader.folder().string(), reader.fingerprint().substr(0, 12)),
                     "give the model it was trained on as --model");
  const std::filesystem::path& out = output.folder;
  std::vector<checkpoint::TensorSpec> specs;
  for (const std::string& name : reader.names())
    specs.push_back({name, reader.info(name).dtype, reader.info(name).shape});
  output.others = checkpoint::plan_shards(specs, max_shard_bytes).files;
  output.is_own = [&](const Json& made) {
    const Json merged = made.value("merged", Json::object());
    return merged.value("base_fingerprint", std::string()) == reader.fingerprint() &&
           merged.value("adapter", Json::object()).value("sha256", std::string()) == finetune::adapter_hash(adapter);
  };
  if (is_made(context, output)) return;
  if (context.world.root()) {
    Table table({"what", "value"});
    table.add({"base", reader.folder().string()});
    table.add({"adapter", folder.string()});
    table.add({"made for", adapter.base.empty() ? "not stated" : adapter.base});
    table.add({"modules", fmt::format("{}", fmt::join(adapter.options.targets, ", "))});
    table.add({"rank, scale", fmt::format("{}, {:g}", adapter.options.rank, adapter.options.scale())});
    table.add({"dtype", reader.config().dtype});
    table.add({"out", out.string()});
    std::cout << table.text() << std::flush;
  }
  if (dry_run) return say_dry_run(context);
  const auto start = std::chrono::steady_clock::now();
  finetune::write_merged(context.world, reader, adapter, out, static_cast<std::int64_t>(max_shard_bytes));
  say_written(context, out, start, fmt::format("{} with its adapter merged", reader.folder().string()));
}

}  // namespace

void export_model(const Context& context, const std::vector<std::string>& arguments) {
  namespace fs = std::filesystem;
  po::options_description own("export");
  own.add_options()("model", po::value<std::string>()->required(), "folded model folder")(
      "format", po::value<std::string>()->required(),
      "expanded: ordinary attention of full size with the same logits, for scoring; its cache is not smaller. merged: "
      "the model with an adapter added to its weights")("adapter", po::value<std::string>(),
                                                        "merged: adapter folder in PEFT's format")(
      "out", po::value<std::string>()->required(), "model folder to write")(
      "dtype", po::value<std::string>()->default_value("float32"),
      "expanded: float32, float16 or bfloat16 of the written tensors; 16 bits round the products of two stored "
      "matrices")("max-shard-size", po::value<std::string>()->default_value("5GiB"),
                  "largest shard, in bytes or as 500MB, 5GiB, …")(
      "overwrite", po::bool_switch(), "replace another model of headfold that stands in --out")(
      "dry-run", po::bool_switch(), "say what would be written, and stop");
  const po::variables_map values = parse(
      context, "export", "headfold export --model DIR --format expanded|merged --out DIR [options]", own, arguments);
  const auto format = values["format"].as<std::string>();
  const bool merges = format == "merged";
  if (format != "expanded" && !merges)
    throw UsageError(fmt::format("--format {}: there is no such format", format), "choose expanded or merged");
  if (merges != (values.count("adapter") > 0))
    throw UsageError(merges ? "--format merged needs --adapter" : "--adapter goes with --format merged",
                     "give the folder that finetune wrote the adapter to");
  if (merges && !values["dtype"].defaulted())
    throw UsageError("--dtype does not go with --format merged: tensors keep the dtype they are stored in");
  const fs::path folder = values["model"].as<std::string>();
  const fs::path out = values["out"].as<std::string>();
  const auto dtype = values["dtype"].as<std::string>();
  if (dtype != "float32" && dtype != "float16" && dtype != "bfloat16")
    throw UsageError(fmt::format("--dtype {}: choose float32, float16 or bfloat16", dtype));
  const std::uint64_t max_shard_bytes = parse_bytes("max-shard-size", values["max-shard-size"].as<std::string>());
  std::error_code code;
  if (fs::equivalent(folder, out, code)) throw UsageError("--out is the model itself", "choose another --out");
  context.world.on_root([&] { check_own_folder(out); });

  const checkpoint::Reader reader(folder);
  OutputFolder output;
  output.folder = out;
  output.overwrite = values["overwrite"].as<bool>();
  output.companions = checkpoint::companion_files(folder);
  const bool dry_run = values["dry-run"].as<bool>();
  if (merges)
    return export_merged(context, reader, values["adapter"].as<std::string>(), output, max_shard_bytes, dry_run);
  const checkpoint::ModelConfig& before = reader.config();
  const checkpoint::ModelConfig after = checkpoint::expanded_config(before, dtype);
  output.others = checkpoint::plan_shards(checkpoint::expanded_specs(after, dtype), max_shard_bytes).files;
  output.is_own = [&](const Json& made) {
    return without_version(made) == without_version(checkpoint::expanded_record(reader, after, dtype));
  };
  if (is_made(context, output)) return;
  if (context.world.root()) {
    const auto cache = [](const checkpoint::ModelConfig& config) {
      return human_bytes(static_cast<double>(config.cache_bytes_per_token(config.dtype == "float32" ? 4 : 2)));
    };
    Table table({"what", "folded model", "export"});
    table.add({"folder", folder.string(), out.string()});
    table.add({"layout", checkpoint::name_of(before.layout), checkpoint::name_of(after.layout)});
    table.add({"KV heads", before.kv_heads_text(), after.kv_heads_text()});
    table.add({"dtype", before.dtype, after.dtype});
    table.add({"parameters", std::to_string(checkpoint::parameter_count(before)),
               std::to_string(checkpoint::parameter_count(after))});
    table.add({"KV cache per token", cache(before), cache(after)});
    std::cout << table.text() << std::flush;
  }
  if (dry_run) return say_dry_run(context);
  const auto start = std::chrono::steady_clock::now();
  checkpoint::write_expanded(context.world, reader, out, dtype, max_shard_bytes);
  say_written(context, out, start,
              fmt::format("same logits as {}, for scoring; its KV cache is not smaller", folder.string()));
}

}  // namespace headfold::jobs
