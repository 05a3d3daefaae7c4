// headfold logits: logits for given token ids, the parity tool for any other engine.

#include <headfold/base/log.h>
#include <headfold/base/progress.h>
#include <headfold/comm/grid.h>
#include <headfold/model/pipeline.h>

#include <iostream>

#include "session.h"

namespace headfold::jobs {
namespace {

constexpr int kTag = 7302;

std::span<std::byte> bytes_of(const at::Tensor& tensor) {
  return {static_cast<std::byte*>(tensor.data_ptr()), tensor.nbytes()};
}

/// Ids of the input file, checked against the model.
at::Tensor read_ids(const std::filesystem::path& path, const model::ModelConfig& config) {
  const checkpoint::SafetensorsFile file(path);
  if (!file.has("input_ids"))
    throw InputError(fmt::format("{}: there is no tensor input_ids", path.string()),
                     "expected is \"input_ids\", int64 [batch, length]");
  const auto& info = file.info("input_ids");
  if (info.dtype != "I64" || info.shape.size() != 2 || info.shape[0] < 1 || info.shape[1] < 1)
    throw InputError(fmt::format("{}: tensor input_ids is {} [{}], expected I64 [batch, length]", path.string(),
                                 info.dtype, fmt::join(info.shape, ", ")));
  at::Tensor ids = file.view("input_ids").clone();
  try {
    model::check_ids(ids, config);
  } catch (const InputError& error) {
    throw InputError(fmt::format("{}: {}", path.string(), error.what()), error.hint());
  }
  if (config.family == checkpoint::Family::llama && ids.size(1) > config.max_positions)
    throw InputError(fmt::format("{}: sequences of {} tokens, but {} has max_position_embeddings {}", path.string(),
                                 ids.size(1), config.file, config.max_positions));
  return ids;
}

}  // namespace

void logits(const Context& context, const std::vector<std::string>& arguments) {
  po::options_description own("options");
  own.add_options()("model", po::value<std::string>()->required(), "model folder")(
      "ids", po::value<std::string>()->required(), "safetensors file with \"input_ids\", int64 [batch, length]")(
      "out", po::value<std::string>()->required(),
      "safetensors file to write: \"logits\", float32 [batch, length, vocabulary]")(
      "dtype", po::value<std::string>()->default_value("float32"), "compute dtype: float32, bfloat16 or auto")(
      "pipeline-ranks", po::value<int>()->default_value(0),
      "ranks that share the layers; 0 = all ranks when there are that many layers")(
      "streamed", po::bool_switch(), "keep one layer at a time in memory")(
      "micro-batch", po::value<std::int64_t>()->default_value(1), "sequences that pass through the layers together")(
      "dry-run", po::bool_switch(), "print what would be done, and stop");
  add_device_option(own);
  const auto options =
      parse(context, "logits", "headfold logits --model DIR --ids IN.safetensors --out OUT.safetensors [options]", own,
            arguments);
  const comm::Communicator& world = context.world;
  const std::filesystem::path out = options["out"].as<std::string>();
  if (std::filesystem::is_directory(out))
    throw UsageError(fmt::format("--out {} is a folder", out.string()), "name a file to write");
  world.on_root([&] {
    check_output_file(options, out, "logits", [](const std::filesystem::path& file) {
      const checkpoint::SafetensorsFile former(file);
      return former.tensors().size() == 1 && former.has("logits");
    });
  });
  const auto micro_batch = options["micro-batch"].as<std::int64_t>();
  if (micro_batch < 1) throw UsageError(fmt::format("--micro-batch {}: must be at least 1", micro_batch));

  const checkpoint::Reader reader(options["model"].as<std::string>());
  const model::ModelConfig& config = reader.config();
  const at::ScalarType dtype = parse_dtype(options["dtype"].as<std::string>(), config.dtype);
  const at::Tensor ids = read_ids(options["ids"].as<std::string>(), config);
  int stages = options["pipeline-ranks"].as<int>();
  if (stages == 0) {
    stages = world.size();
    if (stages > config.layers)
      throw UsageError(fmt::format("{} ranks for the {} layers of {}", stages, config.layers, reader.folder().string()),
                       fmt::format("start at most {} ranks, or give --pipeline-ranks", config.layers));
  }
  const comm::Grid grid = comm::make_grid(world, stages);
  log_grid(grid, model::stage_layers(config, stages));

  const std::int64_t batches = (ids.size(0) + micro_batch - 1) / micro_batch;
  // Micro-batch b belongs to replica b mod replicas.
  std::vector<at::Tensor> own_batches;
  std::vector<std::int64_t> own_numbers;
  for (std::int64_t b = grid.replica; b < batches; b += grid.replicas) {
    own_numbers.push_back(b);
    own_batches.push_back(ids.slice(0, b * micro_batch, std::min(ids.size(0), (b + 1) * micro_batch)));
  }
  if (world.root()) {
    const auto ranges = model::stage_layers(config, stages);
    std::string layers;
    for (const auto& range : ranges)
      layers += fmt::format("{}{}-{}", layers.empty() ? "" : ", ", range.begin, range.end - 1);
    spdlog::info(
        "logits of {} sequences of {} tokens with {} in {}: {} pipeline(s) of {} rank(s), layers {}; {} output",
        ids.size(0), ids.size(1), reader.folder().string(), dtype_name(dtype), grid.replicas, stages, layers,
        human_bytes(static_cast<double>(ids.numel() * config.vocab * 4)));
  }
  if (options["dry-run"].as<bool>()) return;

  model::PipelineOptions pipeline_options;
  pipeline_options.dtype = dtype;
  pipeline_options.residency = options["streamed"].as<bool>() ? model::Residency::streamed : model::Residency::resident;
  const model::Pipeline pipeline(reader, grid, pipeline_options);

  std::vector<at::Tensor> own_logits;
  Progress progress("logits", "sequences", static_cast<double>(ids.size(0)), world.root());
  model::PipelineHooks hooks;
  hooks.output = [&](std::int64_t, const at::Tensor& hidden) {
    own_logits.push_back(model::to_host(pipeline.head().logits(hidden)).to(at::kFloat).contiguous());
  };
  hooks.progress = [&](double done) { progress.advance(done * static_cast<double>(micro_batch) * grid.replicas); };
  pipeline.run(own_batches, hooks);

  // The last stages hand their logits to rank 0, one micro-batch after another.
  at::Tensor all;
  if (world.root()) all = at::empty({ids.size(0), ids.size(1), config.vocab}, at::kFloat);
  for (std::int64_t b = 0; b < batches; ++b) {
    const auto replica = static_cast<int>(b % grid.replicas);
    const int owner = replica * stages + stages - 1;
    const auto local = static_cast<std::size_t>(b / grid.replicas);
    if (world.root()) {
      const at::Tensor rows = all.slice(0, b * micro_batch, std::min(ids.size(0), (b + 1) * micro_batch));
      if (owner == world.rank()) {
        rows.copy_(own_logits[local]);
      } else {
        world.recv(bytes_of(rows), owner, kTag);
      }
    } else if (owner == world.rank()) {
      world.send(bytes_of(own_logits[local]), 0, kTag);
    }
  }
  world.on_root([&] {
    if (!at::isfinite(all).all().item<bool>())
      spdlog::warn("some logits are not finite{}", dtype == at::kFloat ? "" : ": try --dtype float32");
    if (out.has_parent_path()) make_folder(out.parent_path());
    checkpoint::write_safetensors(out, {{"logits", all}});
    fmt::print("{}\n", out.string());
  });
}

}  // namespace headfold::jobs
