// headfold export: folded models for runtimes that do not know their layout.

#include <headfold/base/files.h>
#include <headfold/base/log.h>
#include <headfold/base/table.h>
#include <headfold/checkpoint/expanded.h>
#include <headfold/checkpoint/writer.h>

#include <chrono>
#include <filesystem>
#include <iostream>

#include "job.h"

namespace headfold::jobs {

void export_model(const Context& context, const std::vector<std::string>& arguments) {
  namespace fs = std::filesystem;
  po::options_description own("export");
  own.add_options()("model", po::value<std::string>()->required(), "folded model folder")(
      "format", po::value<std::string>()->required(),
      "expanded: ordinary attention of full size with the same logits, for scoring; its cache is not smaller")(
      "out", po::value<std::string>()->required(), "model folder to write")(
      "dtype", po::value<std::string>()->default_value("float32"),
      "float32, float16 or bfloat16 of the written tensors; 16 bits round the products of two stored matrices")(
      "max-shard-size", po::value<std::string>()->default_value("5GiB"),
      "largest shard, in bytes or as 500MB, 5GiB, …")("dry-run", po::bool_switch(),
                                                      "say what would be written, and stop");
  const po::variables_map values =
      parse(context, "export", "headfold export --model DIR --format expanded --out DIR [options]", own, arguments);
  const auto format = values["format"].as<std::string>();
  if (format != "expanded")
    throw UsageError(fmt::format("--format {}: there is no such format", format), "choose expanded");
  const fs::path folder = values["model"].as<std::string>();
  const fs::path out = values["out"].as<std::string>();
  const auto dtype = values["dtype"].as<std::string>();
  if (dtype != "float32" && dtype != "float16" && dtype != "bfloat16")
    throw UsageError(fmt::format("--dtype {}: choose float32, float16 or bfloat16", dtype));
  const std::uint64_t max_shard_bytes = parse_bytes("max-shard-size", values["max-shard-size"].as<std::string>());
  std::error_code code;
  if (fs::equivalent(folder, out, code)) throw UsageError("--out is the model itself", "choose another --out");
  check_output_folder(out);

  const checkpoint::Reader reader(folder);
  const checkpoint::ModelConfig& before = reader.config();
  const checkpoint::ModelConfig after = checkpoint::expanded_config(before, dtype);
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
  if (values["dry-run"].as<bool>()) {
    if (context.world.root()) spdlog::info("dry run: nothing was written");
    return;
  }
  const auto start = std::chrono::steady_clock::now();
  checkpoint::write_expanded(context.world, reader, out, dtype, max_shard_bytes);
  if (context.world.root())
    spdlog::info("wrote {} in {}: same logits as {}, for scoring; its KV cache is not smaller", out.string(),
                 human_seconds(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count()),
                 folder.string());
}

}  // namespace headfold::jobs
