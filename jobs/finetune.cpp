// headfold finetune: trains low-rank adapters (or all weights) of a model on text or instructions, with or without a
// teacher, and writes the adapter and, when asked, the merged checkpoint.

#include <ATen/Parallel.h>
#include <headfold/base/files.h>
#include <headfold/base/log.h>
#include <headfold/base/progress.h>
#include <headfold/base/stop.h>
#include <headfold/base/table.h>
#include <headfold/base/version.h>
#include <headfold/calibration/text.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/checkpoint/writer.h>
#include <headfold/device/device.h>
#include <headfold/evaluation/tasks.h>
#include <headfold/finetune/lora.h>
#include <headfold/finetune/teacher.h>
#include <headfold/finetune/trainer.h>
#include <headfold/model/compute.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <iostream>
#include <sstream>

#include "job.h"
#include "values.h"

namespace headfold::jobs {
namespace {

constexpr const char* kFormat = "headfold-finetune";

struct Settings {
  fs::path model, teacher, cache, out;
  std::vector<fs::path> validation;
  finetune::DataOptions data;
  std::int64_t validation_limit = 0;
  std::string format_name, bos_name;
  finetune::LoraOptions lora;
  at::ScalarType dtype = at::kFloat;
  finetune::TrainOptions train;
  std::int64_t steps = 0, warm_up = -1, validate_every = -1, checkpoint_every = 0, teacher_top = 0;
  double epochs = 1;
  bool keep_activations = false, merge = false, dry_run = false, overwrite = false;
  std::uint64_t max_shard_bytes = 0;
  bool distills() const { return train.loss.distill_weight > 0; }
};

}  // namespace

po::options_description finetune_options() {
  po::options_description own("finetune");
  auto add = own.add_options();
  add("model", po::value<std::string>()->required(), "model folder to train, folded or not");
  add("data", po::value<std::vector<std::string>>()->multitoken(),
      "text (.txt, .jsonl) or instructions (.json, .jsonl) to train on");
  add("format", po::value<std::string>()->default_value("auto"),
      "what --data holds: text; instructions (instruction/input/output or prompt/response, scored on the answers); "
      "auto");
  add("field", po::value<std::string>()->default_value("text"), "field of .jsonl lines that holds the text");
  add("seq-len", po::value<std::int64_t>()->default_value(2048),
      "tokens per sequence, clipped to what the model takes");
  add("bos", po::value<std::string>()->default_value("default"),
      "beginning-of-sequence token before every document: default (what the model's own tokenizer does), always, "
      "never");
  add("separate-documents", po::bool_switch(), "keep attention inside documents that share a sequence");
  add("skip-long", po::bool_switch(), "leave out instructions whose prompt leaves no room for an answer");
  add("validation", po::value<std::vector<std::string>>()->multitoken(),
      "text whose perplexity is measured while training; the best step's weights are the result");
  add("validation-sequences", po::value<std::int64_t>()->default_value(128),
      "sequences of it that are used, from its beginning; 0 = all");
  add("validate-every", po::value<std::int64_t>()->default_value(-1), "steps between validations; -1 = a tenth of all");
  add("patience", po::value<std::int64_t>()->default_value(0),
      "end after so many validations without a better one; 0 = never");
  add("rank", po::value<std::int64_t>()->default_value(16), "width of the adapters");
  add("alpha", po::value<double>()->default_value(32), "adapters count alpha / rank");
  add("rslora", po::bool_switch(), "adapters count alpha / sqrt(rank)");
  add("dropout", po::value<double>()->default_value(0), "share of an adapter's inputs that is dropped while training");
  add("targets", po::value<std::string>()->default_value("q,k,v,o"),
      "projections that get adapters: q, k, v, o, gate, up, down, or the model's own names, separated by commas");
  add("full", po::bool_switch(), "train all weights instead of adapters");
  add("dtype", po::value<std::string>()->default_value("auto"),
      "compute in float32 or bfloat16; auto = bfloat16 for 16-bit checkpoints where the CPU has fast bfloat16");
  add("steps", po::value<std::int64_t>()->default_value(0), "training steps; 0 = by --epochs");
  add("epochs", po::value<double>()->default_value(1), "passes over the data");
  add("batch", po::value<std::int64_t>()->default_value(32), "sequences per step, over all ranks");
  add("micro-batch", po::value<std::int64_t>()->default_value(1),
      "sequences that go through the model together on a rank");
  add("learning-rate", po::value<double>()->default_value(2e-4), "highest learning rate");
  add("schedule", po::value<std::string>()->default_value("cosine"),
      "learning rate after the warm-up: cosine, linear, constant");
  add("warm-up", po::value<std::int64_t>()->default_value(-1), "steps of linear rise; -1 = 3 % of all");
  add("final-rate", po::value<double>()->default_value(0.1), "share of the learning rate at the last step");
  add("moment-decay", po::value<double>()->default_value(0.9), "AdamW: decay of the first moment");
  add("square-decay", po::value<double>()->default_value(0.999), "AdamW: decay of the second moment");
  add("weight-decay", po::value<double>()->default_value(0), "AdamW: decoupled weight decay of matrices");
  add("clip", po::value<double>()->default_value(1), "largest norm of the whole gradient; 0 = no limit");
  add("seed", po::value<std::int64_t>()->default_value(0), "seed of adapters, order of the data, and dropout");
  add("keep-activations", po::bool_switch(),
      "keep what the backward pass needs instead of computing it again: faster, more memory");
  add("teacher", po::value<std::string>(), "model folder whose predictions are learned: the model before the fold");
  add("distill", po::value<double>()->default_value(-1),
      "weight of the divergence from the teacher, the text itself gets the rest; -1 = 0.9 with a teacher");
  add("temperature", po::value<double>()->default_value(1), "temperature of teacher and student in the divergence");
  add("cache-teacher", po::value<std::string>(),
      "file of the teacher's most probable tokens: written once where it is absent, then trained from without the "
      "teacher in memory");
  add("teacher-top", po::value<std::int64_t>()->default_value(32), "tokens per position in that file");
  add("checkpoint-every", po::value<std::int64_t>()->default_value(100),
      "steps between checkpoints; 0 = only when stopped and at the end");
  add("shard-optimizer", po::bool_switch(), "divide the optimiser's state among the ranks");
  add("merge", po::bool_switch(), "also write OUT/merged, a checkpoint with the adapter in its weights");
  add("max-shard-size", po::value<std::string>()->default_value("5GB"), "largest file of OUT/merged");
  add("dry-run", po::bool_switch(), "print the plan and the memory per rank, and stop");
  add("overwrite", po::bool_switch(), "begin anew where OUT holds another training");
  add("out", po::value<std::string>()->required(), "folder to write");
  add_device_option(own);
  return own;
}

namespace {

template <class T>
T in_range(const po::variables_map& values, const char* name, T least, T most, const char* what) {
  const T value = values[name].as<T>();
  if (!(value >= least && value <= most)) throw UsageError(fmt::format("--{} {}: {}", name, value, what));
  return value;
}
std::int64_t bounded(const po::variables_map& values, const char* name, std::int64_t least) {
  return in_range<std::int64_t>(values, name, least, std::int64_t{1} << 50,
                                fmt::format("at least {} is needed", least).c_str());
}

Settings read_settings(const po::variables_map& values, const checkpoint::ModelConfig& config) {
  Settings s;
  s.model = values["model"].as<std::string>();
  s.out = values["out"].as<std::string>();
  s.dry_run = values["dry-run"].as<bool>();
  s.overwrite = values["overwrite"].as<bool>();
  s.merge = values["merge"].as<bool>();
  s.data.files = paths(values, "data");
  if (s.data.files.empty() && !s.dry_run) throw UsageError("--data is missing", "name the files to train on");
  s.format_name = values["format"].as<std::string>();
  s.data.format = finetune::parse_data_format(s.format_name);
  s.data.field = values["field"].as<std::string>();
  s.data.length = bounded(values, "seq-len", 2);
  s.bos_name = values["bos"].as<std::string>();
  s.data.bos = evaluation::parse_bos(s.bos_name);
  s.data.separate_documents = values["separate-documents"].as<bool>();
  s.data.skip_long = values["skip-long"].as<bool>();
  s.validation = paths(values, "validation");
  s.validation_limit = bounded(values, "validation-sequences", 0);
  s.validate_every = bounded(values, "validate-every", -1);
  s.train.patience = bounded(values, "patience", 0);
  if (s.train.patience > 0 && s.validation.empty())
    throw UsageError("--patience needs a validation text", "name one with --validation");
  s.lora.full = values["full"].as<bool>();
  s.lora.rank = in_range<std::int64_t>(values, "rank", 1, config.hidden, "at least 1, at most the hidden size");
  s.lora.alpha = in_range<double>(values, "alpha", 1e-6, 1e6, "a positive number is needed");
  s.lora.rslora = values["rslora"].as<bool>();
  s.lora.dropout = in_range<double>(values, "dropout", 0, 0.95, "between 0 and 0.95");
  s.lora.seed = static_cast<std::uint64_t>(bounded(values, "seed", 0));
  s.lora.targets.clear();
  std::istringstream names(values["targets"].as<std::string>());
  for (std::string name; std::getline(names, name, ',');)
    if (!name.empty()) s.lora.targets.push_back(name);
  if (s.lora.targets.empty()) throw UsageError("--targets names no projection", "for example q,k,v,o");
  s.dtype = parse_dtype(values["dtype"].as<std::string>(), config.dtype);
  s.steps = bounded(values, "steps", 0);
  s.epochs = in_range<double>(values, "epochs", 1e-6, 1e6, "a positive number is needed");
  s.train.batch = bounded(values, "batch", 1);
  s.train.micro_batch = std::min(bounded(values, "micro-batch", 1), s.train.batch);
  s.train.seed = s.lora.seed;
  s.train.schedule.peak = in_range<double>(values, "learning-rate", 1e-12, 1e30, "a positive number is needed");
  s.train.schedule.decay = finetune::parse_decay(values["schedule"].as<std::string>());
  s.train.schedule.final_share = in_range<double>(values, "final-rate", 0, 1, "between 0 and 1");
  s.warm_up = bounded(values, "warm-up", -1);
  s.train.adam.beta1 = in_range<double>(values, "moment-decay", 0, 0.999999, "between 0 and 1");
  s.train.adam.beta2 = in_range<double>(values, "square-decay", 0, 0.999999, "between 0 and 1");
  s.train.adam.weight_decay = in_range<double>(values, "weight-decay", 0, 10, "between 0 and 10");
  s.train.clip = in_range<double>(values, "clip", 0, 1e9, "0 or more");
  s.keep_activations = values["keep-activations"].as<bool>();
  if (values.count("teacher") > 0) s.teacher = values["teacher"].as<std::string>();
  if (values.count("cache-teacher") > 0) s.cache = values["cache-teacher"].as<std::string>();
  s.teacher_top = in_range<std::int64_t>(values, "teacher-top", 1, config.vocab, "between 1 and the vocabulary");
  const bool taught = !s.teacher.empty() || !s.cache.empty();
  const double weight = in_range<double>(values, "distill", -1, 1, "between 0 and 1");
  s.train.loss.distill_weight = weight < 0 ? (taught ? 0.9 : 0.0) : weight;
  if (weight > 0 && !taught)
    throw UsageError(fmt::format("--distill {} needs a teacher", weight),
                     "name the model before the fold with --teacher");
  if (taught && s.train.loss.distill_weight == 0)
    throw UsageError("--distill 0 has no use for a teacher", "leave --teacher and --cache-teacher out");
  s.train.loss.temperature = in_range<double>(values, "temperature", 0.01, 100, "a positive number is needed");
  if (!s.cache.empty() && s.train.loss.temperature != 1)
    throw UsageError("--temperature other than 1 is not possible with --cache-teacher",
                     "the file holds only the most probable tokens; use --teacher alone");
  s.checkpoint_every = bounded(values, "checkpoint-every", 0);
  s.train.checkpoint_every = s.checkpoint_every;
  s.train.shard_optimizer = values["shard-optimizer"].as<bool>();
  s.max_shard_bytes = parse_bytes("max-shard-size", values["max-shard-size"].as<std::string>());
  s.train.folder = s.out;
  if (!s.lora.full) finetune::target_modules(s.lora, config);  // refuses wrong names
  return s;
}

/// What decides the result: two commands of equal identity are one training.
OrderedJson identity_of(const Settings& s, const std::string& model, const std::string& data,
                        const std::string& validation, const std::string& teacher) {
  OrderedJson json;
  json["model"] = model;
  json["data"] = data;
  json["validation"] = validation;
  json["teacher"] = teacher;
  json["format"] = s.format_name;
  json["field"] = s.data.field;
  json["seq_len"] = s.data.length;
  json["bos"] = s.bos_name;
  json["skip_long"] = s.data.skip_long;
  json["separate_documents"] = s.data.separate_documents;
  json["validation_sequences"] = s.validation.empty() ? 0 : s.validation_limit;
  json["validate_every"] = s.validation.empty() ? 0 : s.validate_every;
  json["patience"] = s.train.patience;
  json["full"] = s.lora.full;
  if (!s.lora.full) {
    json["rank"] = s.lora.rank;
    json["alpha"] = s.lora.alpha;
    json["rslora"] = s.lora.rslora;
    json["dropout"] = s.lora.dropout;
    json["targets"] = s.lora.targets;
  }
  json["dtype"] = dtype_name(s.dtype);
  json["steps"] = s.steps;
  json["epochs"] = s.steps > 0 ? 0.0 : s.epochs;
  json["batch"] = s.train.batch;
  json["micro_batch"] = s.train.micro_batch;
  json["learning_rate"] = s.train.schedule.peak;
  json["schedule"] = finetune::name_of(s.train.schedule.decay);
  json["warm_up"] = s.warm_up;
  json["final_rate"] = s.train.schedule.final_share;
  json["beta1"] = s.train.adam.beta1;
  json["beta2"] = s.train.adam.beta2;
  json["weight_decay"] = s.train.adam.weight_decay;
  json["clip"] = s.train.clip;
  json["seed"] = s.train.seed;
  json["distill"] = s.train.loss.distill_weight;
  json["temperature"] = s.train.loss.temperature;
  json["teacher_top"] = s.cache.empty() ? 0 : s.teacher_top;
  return json;
}

/// The record of this training where OUT holds it finished. UsageError when it holds something else.
std::optional<Json> finished_record(const Settings& s, const OrderedJson& identity) {
  std::error_code code;
  if (!fs::exists(s.out, code)) return {};
  if (!fs::is_directory(s.out))
    throw UsageError(fmt::format("{} exists and is not a folder", s.out.string()), "choose another --out");
  const fs::path record = s.out / "finetune.json";
  bool ours = false;
  Json json;
  if (fs::exists(record)) {
    try {
      json = read_json(record);
    } catch (const CorruptFile& error) {  // written in one piece: a disk's fault, not an interrupted job's
      throw InputError(error.what(), fmt::format("choose another --out, or remove {} to begin anew", s.out.string()));
    }
    ours = json.is_object() && json.value("format", std::string()) == kFormat;
  }
  if (!ours) {
    // A killed job may have left nothing but what was being written; a stop file may wait for the job.
    for (const auto& entry : fs::directory_iterator(s.out))
      if (entry.path().filename() != "STOP" && !entry.path().filename().string().starts_with("finetune.json"))
        throw UsageError(
            fmt::format("{} is not empty and was not written by headfold finetune", s.out.string()),
            "choose another --out, or empty that folder yourself: headfold does not overwrite foreign files");
    return {};
  }
  if (json.value("identity", Json()) == Json(identity)) {
    if (json.value("finished", false)) return json;
    return {};
  }
  if (s.overwrite) return {};
  std::string difference;
  const Json found = json.value("identity", Json());
  for (const auto& [key, value] : identity.items()) {
    const Json was = found.is_object() ? found.value(key, Json()) : Json();
    if (was != Json(value))
      difference += fmt::format("{}{} {} instead of {}", difference.empty() ? "" : ", ", key, was.dump().substr(0, 40),
                                value.dump().substr(0, 40));
  }
  throw UsageError(fmt::format("{} holds another training: {}", s.out.string(), difference),
                   "choose another --out, or --overwrite to begin anew");
}

/// What a finished training lacks, and what it is made from again.
struct Repair {
  bool adapter = true, merged = true;  ///< to be written
  std::int64_t steps = 0, chosen = 0;  ///< of the training: its last one, and that of its weights
};

/// What is wrong with the adapter of a finished training; empty when it is whole, with its hash.
std::string adapter_problem(const Settings& s, const checkpoint::ModelConfig& config, const std::string& model,
                            std::string& hash) {
  const fs::path folder = s.out / "adapter";
  try {
    const finetune::Adapter adapter = finetune::read_adapter(folder, config);
    const finetune::LoraOptions& found = adapter.options;
    if (adapter.base_fingerprint != model || found.rank != s.lora.rank || found.alpha != s.lora.alpha ||
        found.rslora != s.lora.rslora)
      return fmt::format("{} does not state the model and the options of this training", folder.string());
    hash = finetune::adapter_hash(adapter);
  } catch (const Error& error) {
    return error.what();
  }
  return {};
}

/// The same of OUT/merged; `adapter`: hash of the adapter that is in it, empty when it is not known. UsageError when
/// another model stands there.
std::string merged_problem(const Settings& s, const std::string& model, const std::string& data,
                           const std::string& adapter) {
  const fs::path folder = s.out / "merged";
  std::string problem;
  try {
    const Json made = read_json(folder / "headfold.json", std::uint64_t{256} << 20);
    const Json merged = made.is_object() ? made.value("merged", Json()) : Json();
    const auto states = [](const Json& json, const char* key, const std::string& value) {
      return json.is_object() && json.contains(key) && json[key] == value;
    };
    const Json from = merged.is_object() ? merged.value("adapter", Json()) : Json();
    if (!states(merged, "base_fingerprint", model) ||
        (s.lora.full ? !states(merged, "data_hash", data) : !from.is_object()))
      throw UsageError(fmt::format("{} holds another model", folder.string()),
                       "choose another --out, or move that folder away");
    if (!s.lora.full && !adapter.empty() && !states(from, "sha256", adapter))
      problem = fmt::format("{} was made from another adapter", folder.string());
  } catch (const UsageError&) {
    throw;
  } catch (const Error& error) {
    problem = error.what();
  }
  if (!problem.empty()) return problem;
  try {
    const checkpoint::Reader reader(folder);  // sizes of all shards against their headers
    std::vector<std::string> problems = checkpoint::layout_problems(reader);
    auto copies = checkpoint::companion_files(s.model);
    copies.push_back(s.model / "config.json");
    for (const std::string& one : checkpoint::companion_problems(folder, copies)) problems.push_back(one);
    if (!problems.empty()) return problems.front();
  } catch (const Error& error) {
    return error.what();
  }
  return {};
}

[[noreturn]] void refuse_repair(const Settings& s, const fs::path& checkpoint, const char* state) {
  throw InputError(
      fmt::format("{}: the training is finished, but what it made is not whole, and {}, from which it "
                  "would be made again, {}",
                  s.out.string(), checkpoint.string(), state),
      fmt::format("put that checkpoint back; or remove {}, or choose another --out, to train anew", s.out.string()));
}

/// Looks at what a finished training made. InputError when something is to be made again and its checkpoint is gone.
Repair repair_of(const Settings& s, const checkpoint::ModelConfig& config, const Json& record, const std::string& model,
                 const std::string& data) {
  const Json results = record.value("results", Json());
  Repair repair{false, false, -1, -1};
  if (results.is_object()) {
    repair.steps = optional<std::int64_t>(results, "steps", -1, (s.out / "finetune.json").string());
    repair.chosen = optional<std::int64_t>(results, "chosen_step", -1, (s.out / "finetune.json").string());
  }
  const auto needs = [&](const char* name, const std::string& problem) {
    const fs::path folder = s.out / name;
    if (!fs::exists(folder)) {
      spdlog::info("{} is not there: it is made from the training's checkpoint", folder.string());
    } else if (!problem.empty()) {
      spdlog::warn("{} was made by this very command but is damaged ({}); it is made again", folder.string(), problem);
    } else {
      return false;
    }
    return true;
  };
  std::string hash;
  if (!s.lora.full) repair.adapter = needs("adapter", adapter_problem(s, config, model, hash));
  if (s.lora.full || s.merge)
    repair.merged =
        needs("merged", fs::exists(s.out / "merged") ? merged_problem(s, model, data, hash) : std::string());
  if (!repair.adapter && !repair.merged) return repair;
  // Before a model is loaded for it.
  const fs::path last = s.out / "checkpoints" / fmt::format("step-{}", repair.steps);
  const fs::path best = s.out / "checkpoints" / fmt::format("best-{}", repair.chosen);
  if (!fs::exists(last)) refuse_repair(s, last, "is gone");
  if (!s.validation.empty() && !fs::exists(best)) refuse_repair(s, best, "is gone");
  return repair;
}

/// Removes what an earlier training left in OUT, when it is not this one.
void clear_other(const Settings& s, const OrderedJson& identity) {
  const fs::path record = s.out / "finetune.json";
  if (!s.overwrite || !fs::exists(record) || read_json(record).value("identity", Json()) == Json(identity)) return;
  fs::remove(record);
  for (const char* name : {"checkpoints", "adapter", "merged", "train.jsonl"}) fs::remove_all(s.out / name);
}

finetune::MemoryEstimate estimate_of(const Context& context, const Settings& s, const checkpoint::ModelConfig& config,
                                     const checkpoint::ModelConfig* teacher, std::int64_t process) {
  const std::int64_t ranks = context.world.size();
  const bool live = teacher != nullptr && s.cache.empty();
  finetune::MemoryEstimate memory =
      finetune::memory_of(config, s.lora, s.dtype, s.train.micro_batch, s.data.length, !s.keep_activations, ranks,
                          s.train.shard_optimizer, live ? teacher : nullptr);
  memory.process = process;
  if (s.distills() && !s.cache.empty())
    finetune::add_cached_teacher(memory, config, s.dtype, s.train.micro_batch, s.data.length, s.teacher_top,
                                 fs::exists(s.cache) ? nullptr : teacher);
  return memory;
}

/// Rows of the table, and of finetune.json.
std::vector<std::pair<const char*, std::int64_t>> components_of(const finetune::MemoryEstimate& memory) {
  return {{"process", memory.process},     {"data", memory.data},
          {"weights", memory.weights},     {"adapter", memory.adapter},
          {"gradients", memory.gradients}, {"optimizer", memory.optimizer},
          {"messages", memory.messages},   {"activations", memory.activations},
          {"logits", memory.logits},       {"teacher", memory.teacher},
          {"saving", memory.saving},       {"total", memory.total()}};
}

std::string memory_text(const finetune::MemoryEstimate& memory, double budget) {
  Table table({"memory per rank", "bytes", ""});
  for (const auto& [name, bytes] : components_of(memory))
    table.add({name, fmt::format("{}", bytes), human_bytes(static_cast<double>(bytes))});
  std::string text = table.text() + fmt::format("memory      {} available to each rank\n", human_bytes(budget));
  if (static_cast<double>(memory.total()) > budget)
    spdlog::warn(
        "a rank may need {}, but only {} are available to it: it may be killed; smaller --micro-batch or --seq-len, "
        "--dtype bfloat16 and --cache-teacher need less",
        human_bytes(static_cast<double>(memory.total())), human_bytes(budget));
  return text;
}

std::string plan_text(const Context& context, const Settings& s, const checkpoint::ModelConfig& config) {
  const std::int64_t ranks = context.world.size();
  std::string text =
      fmt::format("model       {} ({}, {} layers, hidden {}, {} heads, {} KV heads, layout {}), {}\n", s.model.string(),
                  checkpoint::name_of(config.family), config.layers, config.hidden, config.heads,
                  config.kv_heads_text(), checkpoint::name_of(config.layout), dtype_name(s.dtype));
  if (s.lora.full) {
    text += "trains      all weights\n";
  } else {
    std::string modules;
    for (const std::string& module : finetune::target_modules(s.lora, config))
      modules += (modules.empty() ? "" : ", ") + module;
    text += fmt::format("trains      adapters of width {} (scale {:g}) on {}\n", s.lora.rank, s.lora.scale(), modules);
  }
  text += fmt::format("batch       {} sequences of {} tokens per step, {} at a time on each of {} rank(s)\n",
                      s.train.batch, s.data.length, s.train.micro_batch, ranks);
  if (s.distills())
    text +=
        fmt::format("teacher     {}, weight {:g}, temperature {:g}\n",
                    s.cache.empty() ? s.teacher.string() : s.cache.string() + " (most probable tokens from the file)",
                    s.train.loss.distill_weight, s.train.loss.temperature);
  return text;
}

std::string data_text(const finetune::Dataset& data, const char* name) {
  const finetune::Dataset::Origin& origin = data.origin;
  std::string text = fmt::format("{:<12}{} {}, {} tokens -> {} sequences of {}, {} scored positions", name,
                                 origin.documents, origin.kind == "text" ? "document(s)" : "rows of instructions",
                                 origin.tokens, data.sequences(), data.length(), data.scored());
  if (origin.padding > 0)
    text += fmt::format(", {:.1f} % padding", 100.0 * static_cast<double>(origin.padding) /
                                                  static_cast<double>(data.sequences() * data.length()));
  return text + "\n";
}

/// The step count and what follows from it.
void settle_steps(Settings& s, const finetune::Dataset& data) {
  if (s.train.schedule.steps = s.steps; s.steps == 0) {
    const double sequences = s.epochs * static_cast<double>(data.sequences());
    s.train.schedule.steps = std::max<std::int64_t>(
        1, static_cast<std::int64_t>(std::llround(sequences / static_cast<double>(s.train.batch))));
  }
  const std::int64_t steps = s.train.schedule.steps;
  s.train.schedule.warm_up = s.warm_up >= 0 ? std::min(s.warm_up, steps) : (steps * 3 + 99) / 100;
  s.train.validate_every = s.validate_every >= 0 ? s.validate_every : std::max<std::int64_t>(1, steps / 10);
}

OrderedJson results_of(const finetune::TrainState& state, std::int64_t chosen, const finetune::Dataset& data,
                       const Settings& s, bool validated, const finetune::Teacher* validation_teacher) {
  OrderedJson json;
  json["steps"] = state.step;
  json["chosen_step"] = chosen;
  json["ended_early"] = state.early;
  json["tokens"] = state.tokens;
  json["epochs"] = static_cast<double>(state.step * s.train.batch) / static_cast<double>(data.sequences());
  json["training_seconds"] = state.seconds;
  json["tokens_per_second"] = static_cast<double>(state.tokens) / std::max(state.seconds, 1e-9);
  json["last_training_loss"] = state.last_loss;
  if (validated) {
    json["validation_perplexity_before"] = std::exp(state.first_validation);
    json["validation_perplexity_best"] = std::exp(state.best_loss);
    json["validation_perplexity_last"] = std::exp(state.last_validation);
    if (validation_teacher != nullptr) {
      json["validation_kl_before"] = state.first_divergence;
      json["validation_kl_last"] = state.last_divergence;
      // Over so many tokens per position and the rest as one class: a lower bound of the whole divergence.
      if (validation_teacher->width() > 0) json["validation_kl_top"] = validation_teacher->width();
    }
  }
  return json;
}

/// IoError when the teacher's file is absent and no model is named that could fill it.
void require_cache(const Settings& s) {
  if (s.teacher.empty() && !fs::exists(s.cache))
    throw IoError(s.cache.string(), "there is no such file",
                  "it holds the teacher's predictions; name the model that can fill it with --teacher");
}

/// The teacher's files for training and (with `validation`) validation text, made where they are absent.
struct CachedTeachers {
  std::unique_ptr<finetune::Teacher> training, validation;
};
CachedTeachers cached_teachers(const Context& context, const Settings& s, const finetune::Dataset& data,
                               const finetune::Dataset* validation, std::int64_t vocab,
                               const std::string& fingerprint) {
  const comm::Communicator& world = context.world;
  const fs::path beside = finetune::validation_cache(s.cache);
  std::array<std::int64_t, 2> present = {0, 0};
  world.on_root([&] { present = {fs::exists(s.cache) ? 1 : 0, fs::exists(beside) ? 1 : 0}; });
  world.broadcast(std::as_writable_bytes(std::span(present)));
  if (present[0] == 0) require_cache(s);
  if (validation != nullptr && present[1] == 0 && s.teacher.empty()) {
    if (world.root())
      spdlog::warn("{} does not exist: validation will not tell the divergence from the teacher; --teacher makes it",
                   beside.string());
    validation = nullptr;
  }
  if (present[0] == 0 || (validation != nullptr && present[1] == 0)) {
    const checkpoint::Reader reader(s.teacher);
    const finetune::LiveTeacher teacher(reader, s.dtype);
    const auto write = [&](const fs::path& file, const finetune::Dataset& text, std::int64_t width) {
      Progress progress("teacher", "sequences", static_cast<double>(text.sequences()), world.root());
      if (world.root())
        spdlog::info("writing {}: {}", file.string(),
                     human_bytes(static_cast<double>(finetune::teacher_cache_bytes(text, width))));
      finetune::write_teacher_cache(world, file, teacher, fingerprint, text, width, s.train.micro_batch,
                                    [&](double done) { progress.advance(done); });
    };
    if (present[0] == 0) write(s.cache, data, s.teacher_top);
    if (validation != nullptr && present[1] == 0) write(beside, *validation, s.teacher_top);
  }
  device::release_freed_memory();
  CachedTeachers teachers;
  auto cached = std::make_unique<finetune::CachedTeacher>(s.cache, data, vocab, fingerprint);
  const std::string speaker = cached->teacher();
  if (world.root())
    spdlog::info("the teacher speaks from {}: {} tokens per position", s.cache.string(), cached->width());
  teachers.training = std::move(cached);
  if (validation != nullptr)
    teachers.validation = std::make_unique<finetune::CachedTeacher>(beside, *validation, vocab, speaker);
  return teachers;
}

}  // namespace

void check_finetune(const Planned& planned, const std::vector<std::string>& arguments) {
  const po::variables_map values = read_values("finetune", finetune_options(), arguments);
  read_settings(values, planned.config_of(values["model"].as<std::string>()));
}

void finetune_model(const Context& context, const std::vector<std::string>& arguments) {
  const po::variables_map values =
      parse(context, "finetune", "headfold finetune --model DIR --data FILE... --out DIR [options]", finetune_options(),
            arguments);
  // From here on a signal ends the job in good order: after the step at hand, with everything saved.
  listen_for_stop();
  // Activations come and go in many sizes: holes between kept ones cost a tenth of the memory at 7B shapes.
  device::keep_freed_memory(8 << 20);
  device::reuse_freed_tensors();
  const comm::Communicator& world = context.world;
  const checkpoint::ModelConfig config = checkpoint::read_config(values["model"].as<std::string>());
  Settings s = read_settings(values, config);
  if (s.data.length > config.max_positions) {
    if (world.root()) spdlog::info("sequences are clipped to the {} positions of the model", config.max_positions);
    s.data.length = config.max_positions;
  }
  std::optional<checkpoint::ModelConfig> teacher_config;
  if (!s.teacher.empty()) teacher_config = checkpoint::read_config(s.teacher);
  finetune::MemoryEstimate memory = estimate_of(context, s, config, teacher_config ? &*teacher_config : nullptr,
                                                world.all_reduce(finetune::process_bytes(), comm::Reduce::max));
  // What is free now is free beside what the process holds already.
  const double budget =
      static_cast<double>(memory.process) +
      world.all_reduce(static_cast<double>(memory_for_model(static_cast<std::int64_t>(available_memory_bytes()) /
                                                            world.split_by_host().size())),
                       comm::Reduce::min);
  if (world.root()) std::cout << plan_text(context, s, config);
  if (s.dry_run) {
    std::optional<finetune::Dataset> data;
    if (!s.data.files.empty()) {
      data = finetune::read_dataset(world, s.model, config.vocab, s.data);
      memory.data = data->bytes();
      settle_steps(s, *data);
    }
    if (world.root()) std::cout << memory_text(memory, budget);
    if (data) {
      if (world.root())
        std::cout << data_text(*data, "data")
                  << fmt::format("steps       {} ({:.2f} epochs), {} of warm-up\n", s.train.schedule.steps,
                                 static_cast<double>(s.train.schedule.steps * s.train.batch) /
                                     static_cast<double>(data->sequences()),
                                 s.train.schedule.warm_up);
    }
    if (world.root()) std::cout << "dry run: no weights were loaded, nothing was written\n";
    return;
  }

  const checkpoint::Reader reader(s.model);
  std::string model_hash, data_hash, validation_hash, teacher_hash;
  world.on_root([&] {
    model_hash = reader.fingerprint();
    data_hash = calibration::data_hash(s.data.files, s.data.field);
    if (!s.validation.empty()) validation_hash = calibration::data_hash(s.validation, s.data.field);
    if (!s.teacher.empty()) {
      teacher_hash = checkpoint::Reader(s.teacher).fingerprint();
    } else if (s.distills()) {
      require_cache(s);
      // Another cache is another training, whether or not its teacher is at hand.
      const checkpoint::SafetensorsFile cached(s.cache);
      const auto found = cached.metadata().find("teacher");
      if (found != cached.metadata().end()) teacher_hash = found->second.substr(0, 64);
    }
  });
  for (std::string* hash : {&model_hash, &data_hash, &validation_hash, &teacher_hash}) world.broadcast(*hash);
  const OrderedJson identity = identity_of(s, model_hash, data_hash, validation_hash, teacher_hash);
  const std::string next =
      fmt::format("headfold {}", s.lora.full || s.merge
                                     ? fmt::format("evaluate --model {}", shell_word((s.out / "merged").string()))
                                     : fmt::format("inspect {}", shell_word((s.out / "adapter").string())));
  std::optional<Json> former;  // on the root
  Repair repair;
  std::array<std::int64_t, 6> known = {};
  world.on_root([&] {
    former = finished_record(s, identity);
    if (former) repair = repair_of(s, config, *former, model_hash, data_hash);
    known = {former ? 1 : 0,         fs::exists(s.out / "STOP") ? 1 : 0,
             repair.adapter ? 1 : 0, repair.merged ? 1 : 0,
             repair.steps,           repair.chosen};
  });
  world.broadcast(std::as_writable_bytes(std::span(known)));
  const bool finished = known[0] == 1;
  repair = {known[2] == 1, known[3] == 1, known[4], known[5]};
  if (finished && !repair.adapter && !repair.merged) {
    if (world.root()) {
      spdlog::info("{} is already complete for this model, data and options: nothing to do", s.out.string());
      std::cout << "next: " << next << '\n';
    }
    return;
  }
  // First thing, so that a queue of jobs runs empty at once.
  if (known[1] == 1)
    throw Stopped(fmt::format("{} exists: nothing is trained before it is removed", (s.out / "STOP").string()));
  const auto start = std::chrono::steady_clock::now();
  const finetune::Dataset data = finetune::read_dataset(world, s.model, config.vocab, s.data);
  std::optional<finetune::Dataset> validation;
  if (!s.validation.empty()) {
    finetune::DataOptions held_out = s.data;
    held_out.files = s.validation;
    held_out.limit = s.validation_limit;
    held_out.blocks = true;
    held_out.separate_documents = false;
    if (data.origin.kind == "text") held_out.format = finetune::DataFormat::text;
    validation = finetune::read_dataset(world, s.model, config.vocab, held_out);
  }
  settle_steps(s, data);
  memory.data = data.bytes() + (validation ? validation->bytes() : 0);
  // Text and its tokens' making are gone; what they took must not stay beside the model.
  device::release_freed_memory();
  const std::int64_t blocks = (s.train.batch + s.train.micro_batch - 1) / s.train.micro_batch;
  if (world.root()) {
    std::cout << memory_text(memory, budget) << data_text(data, "data");
    if (validation) std::cout << data_text(*validation, "validation");
    std::cout << fmt::format("steps       {} ({:.2f} epochs), {} of warm-up, learning rate {:g}, {}\n",
                             s.train.schedule.steps,
                             static_cast<double>(s.train.schedule.steps * s.train.batch) /
                                 static_cast<double>(data.sequences()),
                             s.train.schedule.warm_up, s.train.schedule.peak, finetune::name_of(s.train.schedule.decay))
              << std::flush;
    if (blocks < world.size()) {
      spdlog::warn("a step has {} micro-batches: only so many of {} ranks have work", blocks, world.size());
    } else if (blocks % world.size() != 0) {
      spdlog::warn("the {} micro-batches of a step do not divide among {} ranks: some wait for others", blocks,
                   world.size());
    }
  }
  if (teacher_config && !finished) {
    world.on_root([&] {
      std::string sample;
      for (const fs::path& file : s.data.files) {
        std::string part(std::size_t{1} << 16, '\0');
        std::ifstream stream(file, std::ios::binary);
        stream.read(part.data(), static_cast<std::streamsize>(part.size()));
        sample += part.substr(0, static_cast<std::size_t>(stream.gcount()));
      }
      while (!sample.empty() && (static_cast<unsigned char>(sample.back()) & 0xC0U) == 0x80U) sample.pop_back();
      if (!sample.empty() && (static_cast<unsigned char>(sample.back()) & 0x80U) != 0) sample.pop_back();
      finetune::check_teacher(s.model, config, s.teacher, *teacher_config, sample);
    });
  }
  watch_stop_file(s.out / "STOP");  // a cache that is being made stops by it too
  // Before the first write: the model must load.
  std::optional<checkpoint::Reader> teacher_reader;
  std::unique_ptr<finetune::Teacher> teacher, own_validation_teacher;
  if (s.distills() && !s.cache.empty() && !finished) {
    CachedTeachers cached =
        cached_teachers(context, s, data, validation ? &*validation : nullptr, config.vocab, teacher_hash);
    teacher = std::move(cached.training);
    own_validation_teacher = std::move(cached.validation);
  }
  auto model = std::make_unique<finetune::TrainableModel>(reader, s.lora, s.dtype);
  model->set_activation_checkpointing(!s.keep_activations);
  const finetune::Teacher* validation_teacher = own_validation_teacher.get();
  if (s.distills() && s.cache.empty() && !finished) {
    teacher_reader.emplace(s.teacher);
    teacher = std::make_unique<finetune::LiveTeacher>(*teacher_reader, s.dtype);
    validation_teacher = teacher.get();
  }

  OrderedJson record;
  record["format"] = kFormat;
  record["format_version"] = 1;
  record["finished"] = false;
  record["headfold_version"] = version();
  record["model"] = {{"folder", fs::weakly_canonical(s.model).filename().string()}, {"fingerprint", model_hash}};
  // A folded model belongs to what it was folded from: the report puts both together.
  world.on_root([&] {
    const fs::path own = s.model / "headfold.json";
    if (!fs::exists(own)) return;
    const Json json = read_json(own);
    const auto source = json.find("source");
    if (source != json.end() && source->is_object())
      record["model"]["source_fingerprint"] = optional<std::string>(*source, "fingerprint", "", own.string());
  });
  record["data"] = {{"hash", data_hash},
                    {"fingerprint", data.fingerprint()},
                    {"kind", data.origin.kind},
                    {"documents", data.origin.documents},
                    {"sequences", data.sequences()},
                    {"scored_tokens", data.scored()}};
  if (!s.teacher.empty())
    record["teacher"] = {{"folder", fs::weakly_canonical(s.teacher).filename().string()},
                         {"fingerprint", teacher_hash}};
  record["identity"] = identity;
  record["options"] = {{"steps", s.train.schedule.steps},
                       {"warm_up", s.train.schedule.warm_up},
                       {"validate_every", validation ? s.train.validate_every : 0},
                       {"checkpoint_every", s.train.checkpoint_every},
                       {"shard_optimizer", s.train.shard_optimizer},
                       {"keep_activations", s.keep_activations},
                       {"cached_teacher", !s.cache.empty()}};
  // The record of a finished training stays: should this job be killed, what is damaged is found again.
  world.on_root([&] {
    if (finished) return;
    clear_other(s, identity);
    make_folder(s.out);
    write_json(s.out / "finetune.json", record);
  });

  s.train.identity = identity.dump();
  auto trainer = std::make_unique<finetune::Trainer>(world, *model, data, validation ? &*validation : nullptr,
                                                     teacher.get(), validation_teacher, s.train);
  device::release_freed_memory();
  trainer->resume();
  if (finished && trainer->state().step != repair.steps)
    refuse_repair(s, s.out / "checkpoints" / fmt::format("step-{}", repair.steps), "cannot be read");
  const finetune::TrainState state = finished ? trainer->state() : trainer->run([] { return stop_requested(); });
  const std::int64_t chosen = trainer->take_best();
  if (finished && chosen != repair.chosen)
    refuse_repair(s, s.out / "checkpoints" / fmt::format("best-{}", repair.chosen), "cannot be read");
  const auto peak = world.all_reduce(static_cast<std::int64_t>(peak_resident_bytes()), comm::Reduce::max);

  if (former) {
    record["results"] = OrderedJson::parse(former->at("results").dump());
  } else {
    record["results"] = results_of(state, chosen, data, s, validation.has_value(), validation_teacher);
  }

  // Files. What training alone needs goes first: merging has tensors of its own.
  trainer.reset();
  teacher.reset();
  for (finetune::Parameter& parameter : model->parameters()) parameter.gradient.reset();
  if (s.lora.full) {
    const OrderedJson how = {{"training", "all weights"}, {"steps", chosen}, {"data_hash", data_hash}};
    finetune::write_merged(
        world, reader, [&](const std::string& name) { return model->merged(name); }, how, s.out / "merged",
        static_cast<std::int64_t>(s.max_shard_bytes));
  } else {
    finetune::Adapter adapter;
    adapter.options = s.lora;
    adapter.base = s.model.string();
    adapter.base_fingerprint = model_hash;
    for (const finetune::Parameter& parameter : model->parameters())
      adapter.tensors[parameter.name] = headfold::model::to_host(parameter.value);
    model.reset();
    device::release_freed_memory();
    world.on_root([&] {
      if (repair.adapter) finetune::write_adapter(s.out / "adapter", adapter, finetune::target_modules(s.lora, config));
    });
    if (s.merge && repair.merged)
      finetune::write_merged(world, reader, adapter, s.out / "merged", static_cast<std::int64_t>(s.max_shard_bytes));
  }
  OrderedJson own = run_record(context, "finetune", arguments,
                               std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  record["finished"] = true;
  record["record"] = own;
  for (const auto& [name, bytes] : components_of(memory)) record["memory"]["estimated"][name] = bytes;
  record["memory"]["measured_peak_training"] = peak;
  record["memory"]["measured_peak"] = own["peak_resident_bytes"];
  world.on_root([&] {
    write_json(s.out / "finetune.json", record);
    if (validation)
      std::cout << fmt::format("validation perplexity {:.4f} -> {:.4f} at step {}\n", std::exp(state.first_validation),
                               std::exp(state.best_loss), chosen);
    std::cout << fmt::format("memory per rank: estimated {}, measured peak {} ({} in training)\n",
                             human_bytes(static_cast<double>(memory.total())),
                             human_bytes(own["peak_resident_bytes"].get<double>()),
                             human_bytes(static_cast<double>(peak)));
    std::cout << fmt::format("{}: {} steps, {} tokens, {:.0f} tokens/s\nnext: {}\n",
                             (s.out / (s.lora.full ? "merged" : "adapter")).string(), state.step, state.tokens,
                             static_cast<double>(state.tokens) / std::max(state.seconds, 1e-9), next);
  });
}

}  // namespace headfold::jobs
