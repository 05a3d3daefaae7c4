// headfold calibrate: sequences of calibration text through the model, sufficient statistics of every layer into one
// HDF5 file.

#include <ATen/Parallel.h>
#include <headfold/base/events.h>
#include <headfold/base/files.h>
#include <headfold/base/log.h>
#include <headfold/base/progress.h>
#include <headfold/base/stop.h>
#include <headfold/base/table.h>
#include <headfold/base/version.h>
#include <headfold/calibration/collect.h>
#include <headfold/calibration/partial.h>
#include <headfold/calibration/text.h>
#include <headfold/comm/stopping.h>
#include <headfold/device/device.h>
#include <headfold/evaluation/tasks.h>
#include <headfold/model/compute.h>
#include <headfold/scale/memory.h>
#include <headfold/tokenizer/tokenizer.h>

#include <iostream>

#include "session.h"
#include "values.h"

namespace headfold::jobs {
namespace {

struct Settings {
  fs::path model;
  std::vector<fs::path> data;
  std::string field;
  std::int64_t samples = 0, length = 0, seed = 0, micro_batch = 0;
  tokenizer::Bos bos = tokenizer::Bos::model_default;
  std::string bos_name;
  int stages = 0;  // 0: chosen by memory
  at::ScalarType dtype = at::kFloat;
  bool streamed = false, dry_run = false, overwrite = false;
  // What is collected.
  bool rotated_keys = true, value_gram = true, half_samples = true;
  std::string attention_statistics;  // auto, on, off
  std::int64_t attended_heads = 0;   // 0: chosen by size
  std::int64_t save_every = 0;
  fs::path out;
  /// Where the sums are kept while they are made.
  fs::path partial() const { return out.string() + ".partial"; }
};

}  // namespace

po::options_description calibrate_options() {
  po::options_description own("calibrate");
  own.add_options()("model", po::value<std::string>()->required(), "model folder (Hugging Face layout)")(
      "data", po::value<std::vector<std::string>>()->required()->multitoken(), "text files, .txt or .jsonl")(
      "field", po::value<std::string>()->default_value("text"), "field of .jsonl lines that holds the text")(
      "samples", po::value<std::int64_t>()->default_value(128), "number of sequences")(
      "seq-len", po::value<std::int64_t>()->default_value(2048),
      "tokens per sequence, clipped to what the model takes")("seed", po::value<std::int64_t>()->default_value(0),
                                                              "seed that draws the sequences")(
      "bos", po::value<std::string>()->default_value("default"),
      "beginning-of-sequence token before every document: default (what the model's own tokenizer does), always, "
      "never")("micro-batch", po::value<std::int64_t>()->default_value(1),
               "sequences that run through a layer together")(
      "pipeline-ranks", po::value<int>()->default_value(0),
      "ranks that share the layers of one model copy; 0 = as few as memory allows")(
      "dtype", po::value<std::string>()->default_value("auto"),
      "compute in float32 or bfloat16; auto = bfloat16 for 16-bit checkpoints where the CPU has fast bfloat16, and on "
      "GPUs")("streamed", po::bool_switch(), "keep one layer in memory at a time (models larger than memory)")(
      "rotated-keys", po::value<std::string>()->default_value("yes"),
      "collect the Gram of keys as they enter the scores, which post-rotation folds need: yes, no")(
      "value-gram", po::value<std::string>()->default_value("yes"),
      "collect the Gram of values, which spares convert most of its arithmetic: yes, no")(
      "half-samples", po::value<std::string>()->default_value("on"),
      "keep the sums of the even sequences apart, so that convert can tell how well a fold carries over to the odd "
      "ones; twice the memory and file: on, off")(
      "attention-statistics", po::value<std::string>()->default_value("auto"),
      "collect rotated queries, attention by distance and attended values: on, off; auto = on where it at most doubles "
      "calibration's arithmetic and takes little memory")(
      "attended-heads", po::value<std::int64_t>()->default_value(0),
      "KV heads per block of attended values; 0 = all where they take 64 MiB per layer at most, else up to 4")(
      "save-every", po::value<std::int64_t>()->default_value(0),
      "micro-batches of a replica after which the sums so far are saved, to go on from after an interruption; 0 = "
      "every "
      "few minutes, -1 = only when stopped")("dry-run", po::bool_switch(), "print the plan and stop")(
      "overwrite", po::bool_switch(), "replace an existing output made otherwise")(
      "out", po::value<std::string>()->required(), "statistics file to write (.h5)");
  add_device_option(own);
  return own;
}

namespace {

Settings read_settings(const po::variables_map& values, const checkpoint::ModelConfig& config) {
  Settings settings;
  settings.model = values["model"].as<std::string>();
  for (const std::string& file : values["data"].as<std::vector<std::string>>()) settings.data.emplace_back(file);
  settings.field = values["field"].as<std::string>();
  settings.samples = at_least(values, "samples", 1);
  settings.length = at_least(values, "seq-len", 2);
  settings.seed = at_least(values, "seed", 0);
  settings.micro_batch = std::min(at_least(values, "micro-batch", 1), settings.samples);
  settings.bos_name = values["bos"].as<std::string>();
  settings.bos = evaluation::parse_bos(settings.bos_name);
  settings.stages = values["pipeline-ranks"].as<int>();
  if (settings.stages < 0)
    throw UsageError(
        fmt::format("--pipeline-ranks {}: at least 1 is needed, or 0 to choose by memory", settings.stages));
  settings.dtype = parse_dtype(values["dtype"].as<std::string>(), config.dtype);
  settings.streamed = values["streamed"].as<bool>();
  settings.dry_run = values["dry-run"].as<bool>();
  settings.overwrite = values["overwrite"].as<bool>();
  settings.rotated_keys = is_yes(values, "rotated-keys");
  settings.value_gram = is_yes(values, "value-gram");
  settings.half_samples = is_on(values, "half-samples");
  settings.attention_statistics = values["attention-statistics"].as<std::string>();
  if (settings.attention_statistics != "auto") is_on(values, "attention-statistics");
  settings.attended_heads = at_least(values, "attended-heads", 0);
  settings.save_every = at_least(values, "save-every", -1);
  settings.out = values["out"].as<std::string>();
  if (settings.out.filename().empty()) throw UsageError(fmt::format("--out {}: names no file", settings.out.string()));
  if (fs::is_directory(settings.out))
    throw UsageError(fmt::format("--out {} is a folder", settings.out.string()),
                     "name a file in it, for example calibration.h5");
  return settings;
}

/// What is collected. UsageError or InputError when the model does not allow what was asked for.
calibration::CollectOptions collect_options(const Settings& settings, const checkpoint::ModelConfig& config) {
  calibration::CollectOptions options;
  options.dtype = settings.dtype;
  options.residency = settings.streamed ? model::Residency::streamed : model::Residency::resident;
  if (settings.streamed) options.hidden_folder = std::filesystem::absolute(settings.out).parent_path();
  options.micro_batch = settings.micro_batch;
  options.rotated_keys = settings.rotated_keys;
  options.values = settings.value_gram;
  options.half_samples = settings.half_samples;
  options.attended_heads = settings.attended_heads;
  options.attention_statistics = settings.attention_statistics == "on";
  if (settings.attention_statistics == "auto")
    options.attention_statistics = scale::collects_attention(config, options, settings.length);
  return options;
}

calibration::StatisticsHeader make_header(const Settings& settings, const checkpoint::ModelConfig& config) {
  const calibration::CollectOptions collected = collect_options(settings, config);
  calibration::StatisticsHeader header = calibration::header_of(config, collected, settings.samples, settings.length);
  header.headfold_version = version();
  header.seed = settings.seed;
  // Only what changes the statistics: neither the grid nor the micro-batch does, beyond rounding.
  OrderedJson json;
  json["field"] = settings.field;
  json["samples"] = settings.samples;
  json["seq_len"] = settings.length;
  json["seed"] = settings.seed;
  json["bos"] = settings.bos_name;
  json["dtype"] = header.dtype;
  if (device_kind() != "cpu") json["device"] = device_kind();
  json["rotated_keys"] = header.has_rotated_keys;
  json["values"] = header.has_values;
  json["half_samples"] = header.has_halves;
  json["attention_statistics"] = header.has_attention;
  json["attended_heads"] = header.attended_heads;
  header.options = json.dump();
  return header;
}

std::int64_t element_size(at::ScalarType dtype) {
  return static_cast<std::int64_t>(c10::elementSize(dtype));
}

/// What the memory of a rank follows from.
scale::CalibrationSettings memory_settings(const Settings& settings, const checkpoint::ModelConfig& config) {
  return {collect_options(settings, config), settings.length, at::get_num_threads()};
}

/// What would make a rank need less, given what was chosen.
std::string less_memory(const Settings& settings) {
  std::string advice = "use ";
  if (!settings.streamed) advice += "--streamed, ";
  if (settings.half_samples) advice += "--half-samples off (half of the statistics), ";
  if (settings.attention_statistics != "off") advice += "--attention-statistics off, ";
  return advice + "or more ranks on more hosts (--pipeline-ranks)";
}

/// UsageError for more stages than layers.
void check_stages(const Settings& settings, const checkpoint::ModelConfig& config) {
  if (settings.stages > config.layers)
    throw UsageError(fmt::format("--pipeline-ranks {}: {} has only {} layers, and every pipeline rank needs one",
                                 settings.stages, settings.model.string(), config.layers),
                     fmt::format("use --pipeline-ranks {} or fewer; further ranks work as replicas", config.layers));
}

/// The fewest stages that divide the world and fit the memory of the smallest host share. Collective.
int choose_stages(const Settings& settings, const checkpoint::ModelConfig& config, const comm::Communicator& world,
                  double budget) {
  if (settings.stages > 0) {
    check_stages(settings, config);
    return settings.stages;
  }
  int most = 1;
  for (int stages = 1; stages <= world.size() && stages <= config.layers; ++stages) {
    if (world.size() % stages != 0) continue;
    most = stages;
    if (scale::widest_stage(config, memory_settings(settings, config), stages).total() <= budget) return stages;
  }
  if (settings.dry_run) return most;  // the plan says what is missing
  const double needed = scale::widest_stage(config, memory_settings(settings, config), most).total();
  throw UsageError(fmt::format("a rank would need {} even with {} pipeline rank(s), but only {} are available to it",
                               human_bytes(needed), most, human_bytes(budget)),
                   less_memory(settings) + "; --pipeline-ranks N overrides this estimate");
}

bool same_content(const calibration::StatisticsHeader& a, const calibration::StatisticsHeader& b) {
  return a.model_hash == b.model_hash && a.data_hash == b.data_hash && a.options == b.options && a.layers == b.layers;
}

/// Whether the output is there already. UsageError when it is something else.
bool is_finished(const Settings& settings, const calibration::StatisticsHeader& header) {
  if (settings.overwrite || !fs::exists(settings.out)) return false;
  std::string other;
  try {
    if (same_content(calibration::StatisticsFile(settings.out).header(), header)) return true;
    other = "holds statistics of another model, other data or other options";
  } catch (const CorruptFile&) {
    other = "exists and is not a readable statistics file";
  }
  throw UsageError(fmt::format("{} {}", settings.out.string(), other),
                   "choose another --out, or --overwrite to replace it");
}

std::string plan_text(const Settings& settings, const checkpoint::ModelConfig& config,
                      const calibration::StatisticsHeader& header, int stages, int world, double budget) {
  const int replicas = world / stages;
  const std::int64_t batches = (settings.samples + settings.micro_batch - 1) / settings.micro_batch;
  const std::int64_t batches_each = (batches + replicas - 1) / replicas;
  std::string text = fmt::format("model       {} ({}, {} layers, hidden {}, {} heads, {} KV heads of {}), {}\n",
                                 settings.model.string(), header.family, config.layers, config.hidden, config.heads,
                                 header.kv_heads, config.head_dim, header.dtype);
  text += fmt::format("sequences   {} x {} tokens = {} tokens, seed {}, micro-batches of {}\n", settings.samples,
                      settings.length, settings.samples * settings.length, settings.seed, settings.micro_batch);
  const calibration::StatisticsShape shape = header.shape();
  const char* keys = config.family == checkpoint::Family::llama ? "rotated keys" : "keys";
  text += fmt::format("statistics  input moments [{0}, {0}]{1}{2}, float64, position 0 apart{3}\n", config.hidden,
                      header.has_rotated_keys ? fmt::format(", {0} [{1}, {1}]", keys, header.key_width()) : "",
                      header.has_values ? fmt::format(", values [{0}, {0}]", header.key_width()) : "",
                      header.has_rotated_keys || config.family == checkpoint::Family::bloom
                          ? ""
                          : "; no rotated keys: post-rotation folds will not be possible");
  calibration::StatisticsShape whole = shape;
  whole.halves = false;
  const auto bytes = static_cast<double>(calibration::layer_statistics_bytes(shape));
  const double halves = bytes - static_cast<double>(calibration::layer_statistics_bytes(whole));
  whole.attention = false;
  const auto base = static_cast<double>(calibration::layer_statistics_bytes(whole));
  text += fmt::format(
      "halves      {}\n",
      shape.halves ? fmt::format("even sequences' sums as well: {} per layer, which doubles the {} of the sums above",
                                 human_bytes(halves), human_bytes(base))
                   : "no half-sample sums: convert cannot report held-out losses");
  text += fmt::format(
      "attention   {}\n",
      shape.attention
          ? fmt::format("rotated queries, mass by distance, attended values of {} KV heads in blocks of {}: {} per "
                        "layer; {:.0f} % more matrix products",
                        shape.kv_heads, shape.attended_heads, human_bytes(bytes - halves - base),
                        100 * calibration::attention_statistics_share(config, shape))
          : "no attention statistics: metrics that need them will not be possible");
  text += fmt::format(
      "grid        {} rank(s) = {} pipeline rank(s) x {} replica(s); {} micro-batches per replica, {:.1f} % of rank "
      "time lost filling and draining{}\n",
      world, stages, replicas, batches_each,
      100 * (settings.streamed ? 0.0 : comm::pipeline_bubble(stages, batches_each)),
      settings.streamed && stages > 1 ? fmt::format(" micro-batches, but streamed stages work one after the other")
                                      : "");
  Table table({"stage", "layers", "weights", "statistics", "activations", "memory per rank"});
  const auto ranges = model::stage_layers(config, stages);
  for (std::size_t stage = 0; stage < ranges.size(); ++stage) {
    const scale::CalibrationMemory memory =
        scale::calibration_memory(config, memory_settings(settings, config), ranges[stage], stage == 0);
    table.add({std::to_string(stage), fmt::format("{}-{}", ranges[stage].begin, ranges[stage].end - 1),
               human_bytes(memory.weights), human_bytes(memory.statistics), human_bytes(memory.activations),
               human_bytes(memory.total())});
  }
  text += table.text();
  text += fmt::format("memory      {} available to each rank{}\n", human_bytes(budget),
                      model::compute().on_host() ? "" : " on its GPU");
  if (settings.streamed)
    text += fmt::format(
        "streamed    one layer in memory at a time; hidden states wait for the next layer in a temporary file beside "
        "the "
        "output ({} over all replicas)\n",
        human_bytes(static_cast<double>(settings.samples * settings.length * config.hidden) *
                    static_cast<double>(element_size(settings.dtype))));
  text += fmt::format("output      {}: {}, {} free\n", settings.out.string(),
                      human_bytes(static_cast<double>(calibration::statistics_file_bytes(header))),
                      human_bytes(static_cast<double>(free_bytes(settings.out))));
  return text;
}

/// What stands beside the statistics, but for how long they took. Collective.
OrderedJson record_of(const Context& context, const std::vector<std::string>& arguments, const Settings& settings,
                      const calibration::StatisticsHeader& header) {
  OrderedJson record = run_record(context, "calibrate", arguments, 0);
  record.erase("seconds");
  record["format"] = "headfold-calibration";
  record["model"] = {{"folder", fs::weakly_canonical(settings.model).filename().string()},
                     {"fingerprint", header.model_hash}};
  record["data_hash"] = header.data_hash;
  record["options"] = OrderedJson::parse(header.options);
  record["options"]["micro_batch"] = settings.micro_batch;
  record["options"]["streamed"] = settings.streamed;
  record["tokens"] = settings.samples * settings.length;
  return record;
}

}  // namespace

void check_calibrate(const Planned& planned, const std::vector<std::string>& arguments) {
  const po::variables_map values = read_values("calibrate", calibrate_options(), arguments);
  const checkpoint::ModelConfig config = planned.config_of(values["model"].as<std::string>());
  Settings settings = read_settings(values, config);
  settings.length = std::min(settings.length, config.max_positions);
  make_header(settings, config);
  check_stages(settings, config);
}

void calibrate(const Context& context, const std::vector<std::string>& arguments) {
  const po::variables_map values =
      parse(context, "calibrate", "headfold calibrate --model DIR --data FILE... --out calibration.h5 [options]",
            calibrate_options(), arguments);
  const comm::Communicator& world = context.world;
  const checkpoint::Reader reader(values["model"].as<std::string>());
  const checkpoint::ModelConfig& config = reader.config();
  Settings settings = read_settings(values, config);
  if (settings.length > config.max_positions) {
    if (world.root()) spdlog::info("sequences are clipped to the {} positions of the model", config.max_positions);
    settings.length = config.max_positions;
  }
  calibration::StatisticsHeader header = make_header(settings, config);
  world.on_root([&] {
    header.model_hash = reader.fingerprint();
    header.data_hash = calibration::data_hash(settings.data, settings.field);
  });
  world.broadcast(header.model_hash);
  world.broadcast(header.data_hash);

  std::int64_t finished = 0;
  world.on_root([&] {
    check_output_file(values, settings.out.string() + ".json", "record of headfold calibrate",
                      [](const fs::path& file) { return read_json(file).at("format") == "headfold-calibration"; });
    finished = is_finished(settings, header) ? 1 : 0;
  });
  finished = world.all_reduce(finished, comm::Reduce::max);

  const comm::Communicator host = world.split_by_host();
  const double budget = world.all_reduce(
      static_cast<double>(memory_for_model(static_cast<std::int64_t>(available_memory_bytes()) / host.size())),
      comm::Reduce::min);
  const int stages = choose_stages(settings, config, world, budget);
  const comm::Grid grid = comm::make_grid(world, stages);
  log_grid(grid, model::stage_layers(config, stages));
  if (world.root()) {
    std::cout << plan_text(settings, config, header, stages, world.size(), budget) << std::flush;
    const std::int64_t batches = (settings.samples + settings.micro_batch - 1) / settings.micro_batch;
    if (batches < grid.replicas)
      spdlog::warn("{} micro-batches keep only that many of {} replicas busy", batches, grid.replicas);
    const double needed = scale::widest_stage(config, memory_settings(settings, config), stages).total();
    if (needed > budget)
      spdlog::warn("a rank may need {}, but only {} are available to it: it may be killed; {}", human_bytes(needed),
                   human_bytes(budget), less_memory(settings));
  }
  const std::string next = fmt::format(
      "headfold convert --model {} --calibration {} --kv-heads {} --out {}", shell_word(settings.model.string()),
      shell_word(settings.out.string()), std::max<std::int64_t>(1, config.kv_heads / 2),
      shell_word(
          (settings.out.parent_path() / fmt::format("kv{}", std::max<std::int64_t>(1, config.kv_heads / 2))).string()));
  if (finished == 1) {
    std::int64_t bare = 0;  // the job that wrote it was killed before it could say how
    world.on_root([&] { bare = fs::exists(settings.out.string() + ".json") ? 0 : 1; });
    if (world.all_reduce(bare) != 0) {
      const OrderedJson record = record_of(context, arguments, settings, header);
      world.on_root([&] { write_json(settings.out.string() + ".json", record); });
    }
    if (world.root()) {
      calibration::PartialSums::remove(settings.partial());  // of a job that was killed right after its last step
      spdlog::info("{} is already complete for this model, data and options: nothing to do", settings.out.string());
      std::cout << "next: " << next << '\n';
    }
    return;
  }
  if (settings.dry_run) {
    if (world.root()) std::cout << "dry run: nothing was loaded or written\n";
    return;
  }
  // From here on a signal, or a file STOP beside the output, ends the job in good order.
  listen_for_stop();
  watch_stop_file(stop_file_beside(settings.out));
  comm::stop_if_requested(world, fmt::format("before the first sequence (a signal, or {} exists)",
                                             stop_file_beside(settings.out).string()));
  const auto needed_bytes = calibration::statistics_file_bytes(header);
  world.on_root([&] {
    // Both are known before the work starts, so that hours of it are not lost at its end.
    if (settings.out.has_parent_path()) make_folder(settings.out.parent_path());
    if (free_bytes(settings.out) < needed_bytes)
      throw IoError(settings.out.string(),
                    fmt::format("needs {}, but only {} are free", human_bytes(static_cast<double>(needed_bytes)),
                                human_bytes(static_cast<double>(free_bytes(settings.out)))),
                    "choose another --out");
  });

  const at::Tensor sequences = calibration::read_sequences(
      world, settings.model, config.vocab,
      {settings.data, settings.field, settings.samples, settings.length, settings.seed, 0, settings.bos});
  const auto start = std::chrono::steady_clock::now();
  const double tokens_all = static_cast<double>(settings.samples * settings.length);
  double tokens_here = tokens_all;  // less what earlier runs did
  std::int64_t own_batches = 0;
  std::unique_ptr<Progress> progress;
  calibration::CollectOptions collected = collect_options(settings, config);
  collected.partial = settings.partial();
  collected.identity = fmt::format("{} {} {}", header.model_hash, header.data_hash, header.options);
  collected.save_every = settings.save_every;
  collected.stop = [] { return stop_requested(); };
  collected.resumed = [&](std::int64_t dealt_with, std::int64_t micro_batches) {
    tokens_here = tokens_all - static_cast<double>(dealt_with * settings.length);
    own_batches = micro_batches;
    if (dealt_with > 0) emit_event("resume", {{"step", dealt_with}, {"of", settings.samples}, {"unit", "sequence"}});
    progress = std::make_unique<Progress>("calibrate", "tokens", tokens_all, world.root());
    progress->skip(tokens_all - tokens_here);
  };
  // Rank 0's share stands for all: the replicas have equal work.
  collected.progress = [&](double done) {
    progress->advance(tokens_here * done / static_cast<double>(std::max<std::int64_t>(1, own_batches)));
  };
  const auto layers = calibration::collect(reader, grid, sequences, collected);
  world.barrier("end of calibration");
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const std::int64_t first = model::stage_layers(config, stages)[static_cast<std::size_t>(grid.stage)].begin;
  calibration::write_statistics(settings.out, header, world, calibration::layers_to_write(layers, first, grid));

  const double rate = tokens_here / seconds;
  const double all_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  OrderedJson record = record_of(context, arguments, settings, header);
  record["seconds"] = all_seconds;
  record["tokens_per_second"] = rate;
  record["stages"] = grid.stages;
  record["replicas"] = grid.replicas;
  if (tokens_here < tokens_all) record["tokens_of_earlier_runs"] = tokens_all - tokens_here;
  record["pipeline_bubble"] = comm::pipeline_bubble(grid.stages, world.all_reduce(own_batches, comm::Reduce::max));
  world.on_root([&] {
    write_json(settings.out.string() + ".json", record);
    calibration::PartialSums::remove(settings.partial());
    std::cout << fmt::format("{}: {} layers, {} tokens, {:.0f} tokens/s\nnext: {}\n", settings.out.string(),
                             config.layers, settings.samples * settings.length, rate, next);
  });
}

}  // namespace headfold::jobs
