// headfold evaluate: perplexity of a model on a text, and its divergence from a reference model on the same windows.

#include <headfold/base/files.h>
#include <headfold/base/log.h>
#include <headfold/base/progress.h>
#include <headfold/base/table.h>
#include <headfold/base/version.h>
#include <headfold/calibration/text.h>
#include <headfold/device/device.h>
#include <headfold/evaluation/results.h>

#include <unistd.h>

#include <chrono>
#include <iostream>

#include "job.h"

namespace headfold::jobs {
namespace {

struct Options {
  fs::path model, reference, out;
  evaluation::TextSource source;
  bool blocks = false, rolling = false;
  std::int64_t seq_len = 0, limit = 0, micro_batch = 0;
  std::string dtype;
  int pipeline_ranks = 0;
  bool streamed = false, dry_run = false;
};

Options read_options(const Context& context, const std::vector<std::string>& arguments) {
  po::options_description own("options of evaluate");
  own.add_options()("model", po::value<std::string>()->required(), "model folder (Hugging Face form)")(
      "reference", po::value<std::string>(),
      "model to compare with, usually the original: adds KL divergence and top-1 agreement")(
      "data", po::value<std::vector<std::string>>()->multitoken()->composing()->required(),
      "text files: .jsonl, .txt, .raw (WikiText)")("field", po::value<std::string>()->default_value("text"),
                                                   "field of .jsonl lines that holds the text")(
      "tasks", po::value<std::string>()->default_value("ppl_blocks"),
      "comma-separated: ppl_blocks (the papers' windows), rolling (the harness's word, "
      "byte and bit rates; `wikitext` for .raw files)")("seq-len", po::value<std::int64_t>()->default_value(2048),
                                                        "tokens per window; clipped to what the model can take")(
      "joiner", po::value<std::string>()->default_value("auto"),
      "how ppl_blocks joins texts: documents, paper, auto (documents for .jsonl)")(
      "limit", po::value<std::int64_t>()->default_value(0), "at most this many windows (rolling: documents); 0 = all")(
      "bos", po::value<std::string>()->default_value("default"), "beginning-of-sequence token: default, always, never")(
      "dtype", po::value<std::string>()->default_value("auto"), "compute in float32, bfloat16, or auto")(
      "pipeline-ranks", po::value<int>()->default_value(0),
      "ranks that share one copy of the layers; 0 = as few as memory needs")(
      "micro-batch", po::value<std::int64_t>()->default_value(0), "windows per forward pass; 0 = 4096 tokens' worth")(
      "streamed", po::bool_switch(), "keep one layer in memory at a time")(
      "dry-run", po::bool_switch(), "say what would be done and stop")("out", po::value<std::string>()->required(),
                                                                       "folder for results_*.json and samples_*.jsonl");
  const po::variables_map values =
      parse(context, "evaluate", "headfold evaluate --model DIR --data FILE… --out DIR [--reference DIR] [options]",
            own, arguments);
  Options options;
  options.model = values["model"].as<std::string>();
  if (values.count("reference") > 0) options.reference = values["reference"].as<std::string>();
  options.out = values["out"].as<std::string>();
  for (const std::string& file : values["data"].as<std::vector<std::string>>()) options.source.files.emplace_back(file);
  options.source.field = values["field"].as<std::string>();
  options.source.joiner = evaluation::parse_joiner(values["joiner"].as<std::string>());
  options.source.bos = evaluation::parse_bos(values["bos"].as<std::string>());
  const std::string tasks = values["tasks"].as<std::string>();
  for (std::size_t at = 0; at <= tasks.size();) {
    const std::size_t end = std::min(tasks.find(',', at), tasks.size());
    const std::string task = tasks.substr(at, end - at);
    if (task == "ppl_blocks") {
      options.blocks = true;
    } else if (task == "rolling" || task == "wikitext") {
      options.rolling = true;
    } else {
      throw UsageError(fmt::format("--tasks {}: there is no task '{}'; tasks are ppl_blocks and rolling", tasks, task));
    }
    at = end + 1;
  }
  options.seq_len = values["seq-len"].as<std::int64_t>();
  if (options.seq_len < 2)
    throw UsageError(fmt::format("--seq-len {}: a window needs at least 2 tokens", options.seq_len));
  options.limit = values["limit"].as<std::int64_t>();
  if (options.limit < 0) throw UsageError(fmt::format("--limit {}: must be 0 (all) or more", options.limit));
  options.micro_batch = values["micro-batch"].as<std::int64_t>();
  if (options.micro_batch < 0)
    throw UsageError(fmt::format("--micro-batch {}: must be 0 (automatic) or more", options.micro_batch));
  options.dtype = values["dtype"].as<std::string>();
  parse_dtype(options.dtype, "float32");  // an unknown name is refused before any file is opened
  options.pipeline_ranks = values["pipeline-ranks"].as<int>();
  if (options.pipeline_ranks < 0)
    throw UsageError(fmt::format("--pipeline-ranks {}: must be 0 (automatic) or more", options.pipeline_ranks));
  options.streamed = values["streamed"].as<bool>();
  options.dry_run = values["dry-run"].as<bool>();
  return options;
}

/// A folder that cannot be written to is found out now, not after hours of scoring.
void check_writable(const fs::path& out) {
  fs::path existing = fs::absolute(out);
  while (!existing.empty() && !fs::exists(existing) && existing != existing.parent_path())
    existing = existing.parent_path();
  if (!fs::is_directory(existing))
    throw IoError(existing.string(), "is not a folder, so no results can be written below it", "choose another --out");
  if (::access(existing.c_str(), W_OK) != 0)
    throw IoError(existing.string(), "this user may not write here", "choose another --out");
}

/// Weights of the largest stage when `stages` ranks share the layers, over all models.
std::int64_t largest_stage(const std::vector<std::pair<const checkpoint::Reader*, at::ScalarType>>& models,
                           int stages) {
  std::int64_t largest = 0;
  for (int stage = 0; stage < stages; ++stage) {
    std::int64_t bytes = 0;
    for (const auto& [reader, dtype] : models)
      bytes += model::stage_weight_bytes(reader->config(), stages, stage, dtype);
    largest = std::max(largest, bytes);
  }
  return largest;
}

/// Two models can only be compared token by token when a text is the same tokens to both. A reference without tokenizer
/// files is taken to share the model's.
void require_same_tokenizer(const tokenizer::Tokenizer& own, const Options& options) {
  bool has_files = false;
  for (const char* name : {"tokenizer.model", "tokenizer.json"})
    has_files = has_files || fs::exists(options.reference / name);
  if (!has_files) return;
  const std::unique_ptr<tokenizer::Tokenizer> other = tokenizer::load_tokenizer(options.reference);
  const std::string probe = "The quick brown fox, 1234 times; na\u00efve caf\u00e9.\n  Then \"it\" stopped: why?";
  if (own.vocab_size() == other->vocab_size() && own.encode(probe) == other->encode(probe)) return;
  throw InputError(fmt::format("the tokenizers of {} and of the reference {} differ", options.model.string(),
                               options.reference.string()),
                   "KL divergence compares distributions over the same tokens: give the model this one was made from");
}

}  // namespace

void evaluate(const Context& context, const std::vector<std::string>& arguments) {
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  const Options options = read_options(context, arguments);
  const bool speaks = context.world.root();

  const checkpoint::Reader model(options.model);
  std::unique_ptr<checkpoint::Reader> reference;
  if (!options.reference.empty()) reference = std::make_unique<checkpoint::Reader>(options.reference);
  const checkpoint::ModelConfig& config = model.config();
  const std::unique_ptr<tokenizer::Tokenizer> tokenizer = tokenizer::load_tokenizer(options.model);
  if (reference && reference->config().vocab != config.vocab)
    throw InputError(
        fmt::format("vocabularies differ: {} has {} tokens, the reference {} has {}", options.model.string(),
                    config.vocab, options.reference.string(), reference->config().vocab),
        "KL divergence compares distributions over the same tokens: give the model this one was made from");
  if (reference) require_same_tokenizer(*tokenizer, options);
  std::int64_t length = std::min(options.seq_len, config.max_positions);
  if (reference) length = std::min(length, reference->config().max_positions);
  if (length < options.seq_len && speaks) spdlog::info("windows of {} tokens: the longest this model takes", length);

  std::vector<evaluation::Task> tasks;
  if (options.blocks) tasks.push_back(evaluation::blocks_task(*tokenizer, options.source, length, options.limit));
  if (options.rolling) tasks.push_back(evaluation::rolling_task(*tokenizer, options.source, length, options.limit));
  for (const evaluation::Task& task : tasks) evaluation::check_ids(task, config.vocab, options.model.string());
  context.world.on_root([&] { check_writable(options.out); });

  evaluation::ScorerOptions scoring;
  scoring.dtype = parse_dtype(options.dtype, config.dtype);
  scoring.reference_dtype = reference ? parse_dtype(options.dtype, reference->config().dtype) : scoring.dtype;
  scoring.micro_batch = options.micro_batch > 0 ? options.micro_batch : std::max<std::int64_t>(1, 4096 / length);

  // The grid: one pipeline stage when the weights fit this rank's share of the host's memory, else the fewest that do.
  std::vector<std::pair<const checkpoint::Reader*, at::ScalarType>> models = {{&model, scoring.dtype}};
  if (reference) models.emplace_back(reference.get(), scoring.reference_dtype);
  const comm::Communicator host = context.world.split_by_host();
  const std::int64_t memory = context.world.all_reduce(
      static_cast<std::int64_t>(available_memory_bytes()) / host.size() / 10 * 8, comm::Reduce::min);
  std::int64_t most_stages = std::min<std::int64_t>(context.world.size(), config.layers);
  if (reference) most_stages = std::min(most_stages, reference->config().layers);
  int stages = options.pipeline_ranks;
  if (stages == 0) {
    stages = 1;
    const auto fits = [&](int count) { return largest_stage(models, count) <= memory; };
    while (!options.streamed && !fits(stages) && stages < most_stages) {
      do ++stages;
      while (stages < most_stages && context.world.size() % stages != 0);
    }
    if (context.world.size() % stages != 0) stages = 1;
    if (options.streamed || !fits(stages)) scoring.residency = model::Residency::streamed;
  } else if (stages > most_stages) {
    throw UsageError(fmt::format("--pipeline-ranks {}: there are {} ranks and {} layers to share", stages,
                                 context.world.size(), config.layers),
                     fmt::format("use at most {}", most_stages));
  } else if (options.streamed) {
    scoring.residency = model::Residency::streamed;
  }
  const comm::Grid grid = comm::make_grid(context.world, stages);
  const bool streamed = scoring.residency == model::Residency::streamed;

  if (speaks) {
    Table plan({"what", "value"});
    plan.add({"model", fmt::format("{} ({}, {} layers, hidden {}, {} heads, {} KV heads, {})", options.model.string(),
                                   checkpoint::name_of(config.family), config.layers, config.hidden, config.heads,
                                   config.kv_heads_text(), checkpoint::name_of(config.layout))});
    plan.add({"reference", reference ? fmt::format("{} ({} KV heads, {})", options.reference.string(),
                                                   reference->config().kv_heads_text(),
                                                   checkpoint::name_of(reference->config().layout))
                                     : std::string("none")});
    for (const evaluation::Task& task : tasks) {
      plan.add({task.name, fmt::format("{} of {} {}, {} windows, {} tokens scored", task.items, task.items_original,
                                       task.kind == evaluation::TaskKind::blocks ? "windows" : "documents",
                                       task.windows.size(), task.predictions())});
      plan.add({"  text", task.recipe});
    }
    plan.add({"compute", fmt::format("{}, {} windows per micro-batch, log-softmax float32, sums float64",
                                     scoring.dtype == at::kFloat ? "float32" : "bfloat16", scoring.micro_batch)});
    plan.add({"ranks", fmt::format("{} = {} pipeline stages x {} replicas, {}", context.world.size(), grid.stages,
                                   grid.replicas, device::describe_device())});
    std::string ranges;
    for (const comm::LayerRange& range : model::stage_layers(config, stages))
      ranges += fmt::format("{}{}..{}", ranges.empty() ? "" : ", ", range.begin, range.end - 1);
    plan.add({"layers per stage", ranges});
    plan.add({"weights per rank",
              streamed ? std::string("one layer at a time (streamed)")
                       : fmt::format("{} of {} usable", human_bytes(static_cast<double>(largest_stage(models, stages))),
                                     human_bytes(static_cast<double>(memory)))});
    plan.add({"out", options.out.string()});
    std::cout << plan.text() << std::flush;
  }
  if (options.dry_run) return;

  const evaluation::Scorer scorer(model, reference.get(), grid, scoring);
  std::int64_t tokens = 0;
  for (const evaluation::Task& task : tasks) tokens += task.input_tokens();
  Progress progress("evaluate", "token", static_cast<double>(tokens), speaks);
  const auto scoring_start = elapsed();
  std::vector<evaluation::TaskResult> results;
  results.reserve(tasks.size());
  for (const evaluation::Task& task : tasks)
    results.push_back(evaluation::make_result(
        task, scorer.score(task.windows, task.name, [&](double amount) { progress.advance(amount); }),
        reference != nullptr));
  context.world.barrier("end of scoring");
  const double scoring_seconds = elapsed() - scoring_start;

  OrderedJson record = run_record(context, "evaluate", arguments, elapsed());
  context.world.on_root([&] {
    evaluation::RunInfo run;
    run.model = &model;
    run.tokenizer = tokenizer.get();
    run.model_args = fmt::format("pretrained={},dtype={},max_length={},bos={}", options.model.string(), options.dtype,
                                 length, evaluation::name_of(options.source.bos));
    run.dtype = scoring.dtype;
    run.micro_batch = scoring.micro_batch;
    run.limit = options.limit;
    run.max_length = length;
    run.seconds = elapsed();
    run.date =
        std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
    run.environment = build_description() + device::describe_device();
    run.source = options.source;
    run.headfold["format"] = "headfold-results";
    run.headfold["format_version"] = 1;
    run.headfold["model"] = evaluation::describe_model(model, scoring.dtype);
    run.headfold["reference"] =
        reference ? evaluation::describe_model(*reference, scoring.reference_dtype) : OrderedJson(nullptr);
    run.headfold["bos"] = evaluation::name_of(options.source.bos);
    run.headfold["world_size"] = context.world.size();
    run.headfold["stages"] = grid.stages;
    run.headfold["replicas"] = grid.replicas;
    run.headfold["micro_batch"] = scoring.micro_batch;
    run.headfold["data_hash"] = calibration::data_hash(options.source.files, options.source.field);
    run.headfold["record"] = record;
    run.headfold["tokens_per_second"] = static_cast<double>(tokens) / scoring_seconds;
    const std::string name = run.headfold["model"]["name"].get<std::string>();
    const fs::path path = evaluation::write_results(options.out / evaluation::sanitized(name), run, results);

    Table table({"task", "metric", "value"});
    for (const evaluation::TaskResult& result : results)
      for (const auto& [metric, value] : result.metrics())
        table.add({result.task->name, metric, fmt::format("{:.6g}", value)});
    std::cout << "\n"
              << table.text()
              << fmt::format("\n{:.0f} tokens/s over {} ranks, {}\n", static_cast<double>(tokens) / scoring_seconds,
                             context.world.size(), human_seconds(elapsed()))
              << fmt::format("results: {}\nnext:    headfold report --run {}\n", path.string(), options.out.string())
              << std::flush;
  });
}

}  // namespace headfold::jobs
