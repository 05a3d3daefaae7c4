// headfold evaluate: benchmarks, perplexity of a model on a text, and its divergence from a reference model on the same
// windows.

#include <headfold/base/events.h>
#include <headfold/base/files.h>
#include <headfold/base/hash.h>
#include <headfold/base/log.h>
#include <headfold/base/progress.h>
#include <headfold/base/stop.h>
#include <headfold/base/table.h>
#include <headfold/base/version.h>
#include <headfold/calibration/text.h>
#include <headfold/comm/checks.h>
#include <headfold/comm/stopping.h>
#include <headfold/device/device.h>
#include <headfold/evaluation/benchmark.h>
#include <headfold/evaluation/results.h>
#include <headfold/evaluation/score_store.h>

#include <unistd.h>

#include <chrono>
#include <iostream>

#include "evaluate_options.h"
#include "session.h"

namespace headfold::jobs {
namespace {

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
void require_same_tokenizer(const tokenizer::Tokenizer& own, const EvaluateOptions& options) {
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

/// What is evaluated, and on which model.
struct Work {
  std::unique_ptr<checkpoint::Reader> model, reference;
  std::unique_ptr<tokenizer::Tokenizer> tokenizer;
  std::vector<evaluation::Task> texts;
  evaluation::Suite suite;
  std::int64_t length = 0;           ///< of windows of the papers' form
  std::int64_t rolling_length = 0;   ///< of windows of the harness's form
  std::int64_t question_length = 0;  ///< that questions are cut to
  evaluation::ScorerOptions scoring;
  std::int64_t requests() const {
    std::int64_t count = 0;
    for (const evaluation::BenchmarkTask& task : suite.tasks) count += std::ssize(task.requests);
    return count;
  }
  std::int64_t longest_window() const {
    std::int64_t longest = 0;
    for (const evaluation::Task& task : texts) longest = std::max(longest, task.max_length);
    return longest;
  }
  /// Whether something is scored that has the harness's BOS rule.
  bool follows_harness() const {
    return !suite.tasks.empty() || std::any_of(texts.begin(), texts.end(), [](const evaluation::Task& task) {
      return task.kind == evaluation::TaskKind::rolling;
    });
  }
  std::int64_t documents() const {
    std::int64_t count = 0;
    for (const evaluation::BenchmarkTask& task : suite.tasks) count += std::ssize(task.documents);
    return count;
  }
};

/// Tokens that questions are cut to. UsageError when the model does not take so many.
std::int64_t question_length(const EvaluateOptions& options, const checkpoint::ModelConfig& config) {
  const std::int64_t length = options.max_length > 0 ? options.max_length : evaluation::harness_max_length(config);
  if (config.family == checkpoint::Family::llama && length > config.max_positions)
    throw UsageError(fmt::format("--max-length {}: {} takes {} tokens", options.max_length, options.model.string(),
                                 config.max_positions));
  return length;
}

/// A task with a limit that may be a fraction of its items.
evaluation::Task limited(double limit, const std::function<evaluation::Task(std::int64_t limit)>& make) {
  if (limit == 0 || limit >= 1) return make(static_cast<std::int64_t>(limit));
  const std::int64_t all = make(0).items_original;
  return make(static_cast<std::int64_t>(std::ceil(limit * static_cast<double>(all))));
}

/// Every rank reads texts and documents itself: what it reads must be what the others read.
void require_same_documents(const comm::Communicator& world, const Work& work) {
  if (world.size() == 1) return;
  std::vector<fs::path> files;
  for (const evaluation::Task& text : work.texts) files.insert(files.end(), text.files.begin(), text.files.end());
  for (const evaluation::BenchmarkTask& task : work.suite.tasks)
    files.insert(files.end(), task.files.begin(), task.files.end());
  std::sort(files.begin(), files.end());
  files.erase(std::unique(files.begin(), files.end()), files.end());
  std::string names;
  for (const fs::path& file : files) names += file.string() + "\n";
  world.require_equal(names, "the files of the tasks");
  comm::require_same_files(world, files);
}

Work read_work(const Context& context, const EvaluateOptions& options) {
  Work work;
  work.model = std::make_unique<checkpoint::Reader>(options.model);
  const checkpoint::ModelConfig& config = work.model->config();
  if (!options.reference.empty()) work.reference = std::make_unique<checkpoint::Reader>(options.reference);
  work.tokenizer = tokenizer::load_tokenizer(options.model);
  if (work.reference && work.reference->config().vocab != config.vocab)
    throw InputError(
        fmt::format("vocabularies differ: {} has {} tokens, the reference {} has {}", options.model.string(),
                    config.vocab, options.reference.string(), work.reference->config().vocab),
        "KL divergence compares distributions over the same tokens: give the model this one was made from");
  if (work.reference) require_same_tokenizer(*work.tokenizer, options);
  work.length = std::min(options.seq_len, config.max_positions);
  if (work.reference) work.length = std::min(work.length, work.reference->config().max_positions);
  work.question_length = question_length(options, config);

  // The harness's rolling windows are as long as its questions. ALiBi has no longest position, a LLaMA reference has.
  work.rolling_length = options.seq_len_given ? work.length : work.question_length;
  if (work.reference && work.reference->config().family == checkpoint::Family::llama)
    work.rolling_length = std::min(work.rolling_length, work.reference->config().max_positions);
  // What follows the harness has its BOS rule; the papers' blocks have none of it.
  evaluation::TextSource rolling = options.source;
  rolling.bos = options.harness_bos();
  if (options.blocks)
    work.texts.push_back(limited(options.limit, [&](std::int64_t limit) {
      return evaluation::blocks_task(*work.tokenizer, options.source, work.length, limit);
    }));
  if (options.rolling)
    work.texts.push_back(limited(options.limit, [&](std::int64_t limit) {
      return evaluation::rolling_task(*work.tokenizer, rolling, work.rolling_length, limit);
    }));
  if (!options.names.empty()) {
    evaluation::SuiteOptions suite = options.suite;
    const auto encoder = std::make_shared<const evaluation::Encoder>(*work.tokenizer, options.harness_bos());
    suite.tokens = [encoder](std::string_view text) { return std::ssize(encoder->encode(text)); };
    suite.max_length = work.question_length;
    work.suite = evaluation::make_tasks(options.names, suite);
    for (const evaluation::PerplexityText& text : work.suite.texts)
      work.texts.push_back(limited(options.limit, [&](std::int64_t limit) {
        return evaluation::perplexity_task(*work.tokenizer, text, text.rolling ? work.rolling_length : work.length,
                                           text.rolling ? options.harness_bos() : options.source.bos, limit);
      }));
    for (const evaluation::SkippedTask& skipped : work.suite.skipped)
      if (context.world.root()) spdlog::warn("{} is left out: {}", skipped.name, skipped.reason);
    if (work.texts.empty() && work.suite.tasks.empty())
      throw InputError("every task was left out: none of their files is there",
                       "headfold evaluate --list shows where they are looked for");
  }
  require_same_documents(context.world, work);
  const bool blocks = std::any_of(work.texts.begin(), work.texts.end(), [](const evaluation::Task& task) {
    return task.kind == evaluation::TaskKind::blocks;
  });
  if (work.length < options.seq_len && (blocks || options.seq_len_given) && !work.texts.empty() && context.world.root())
    spdlog::info("windows of {} tokens: the longest this model takes", work.length);
  for (const evaluation::Task& task : work.texts) evaluation::check_ids(task, config.vocab, options.model.string());

  work.scoring.dtype = parse_dtype(options.dtype, config.dtype);
  work.scoring.reference_dtype =
      work.reference ? parse_dtype(options.dtype, work.reference->config().dtype) : work.scoring.dtype;
  work.scoring.micro_batch = options.micro_batch > 0
                                 ? options.micro_batch
                                 : std::max<std::int64_t>(1, 4096 / std::max<std::int64_t>(1, work.longest_window()));
  // Before anything is computed, as everything that can be refused.
  for (const evaluation::BenchmarkTask& task : work.suite.tasks)
    for (const evaluation::Request& request : task.requests)
      if (request.type == evaluation::RequestType::generation)
        evaluation::check_new_tokens(task.name, request.max_new_tokens, work.question_length);
  return work;
}

using Models = std::vector<std::pair<const checkpoint::Reader*, at::ScalarType>>;

/// One pipeline stage when the weights fit this rank's share of the host's memory, else the fewest that do; streamed
/// layers when none does. Collective.
int choose_stages(const Context& context, const EvaluateOptions& options, const Models& models, std::int64_t memory,
                  model::Residency& residency) {
  std::int64_t most_stages = context.world.size();
  for (const auto& [reader, dtype] : models) most_stages = std::min(most_stages, reader->config().layers);
  if (options.pipeline_ranks > 0) {
    if (options.pipeline_ranks > most_stages)
      throw UsageError(fmt::format("--pipeline-ranks {}: there are {} ranks and {} layers to share",
                                   options.pipeline_ranks, context.world.size(), models.front().first->config().layers),
                       fmt::format("use at most {}", most_stages));
    if (options.streamed) residency = model::Residency::streamed;
    return options.pipeline_ranks;
  }
  int stages = 1;
  const auto fits = [&](int count) { return largest_stage(models, count) <= memory; };
  while (!options.streamed && !fits(stages) && stages < most_stages) {
    do ++stages;
    while (stages < most_stages && context.world.size() % stages != 0);
  }
  if (context.world.size() % stages != 0) stages = 1;
  if (options.streamed || !fits(stages)) residency = model::Residency::streamed;
  return stages;
}

void print_plan(const Context& context, const EvaluateOptions& options, const Work& work, const comm::Grid& grid,
                const Models& models, std::int64_t memory) {
  const checkpoint::ModelConfig& config = work.model->config();
  Table plan({"what", "value"});
  plan.add({"model", fmt::format("{} ({}, {} layers, hidden {}, {} heads, {} KV heads, {})", options.model.string(),
                                 checkpoint::name_of(config.family), config.layers, config.hidden, config.heads,
                                 config.kv_heads_text(), checkpoint::name_of(config.layout))});
  plan.add({"reference", work.reference ? fmt::format("{} ({} KV heads, {})", options.reference.string(),
                                                      work.reference->config().kv_heads_text(),
                                                      checkpoint::name_of(work.reference->config().layout))
                                        : std::string("none")});
  for (const evaluation::Task& task : work.texts) {
    plan.add({task.name, fmt::format("{} of {} {}, {} windows, {} tokens scored", task.items, task.items_original,
                                     task.kind == evaluation::TaskKind::blocks ? "windows" : "documents",
                                     task.windows.size(), task.predictions())});
    plan.add({"  text", task.recipe});
  }
  constexpr std::size_t kShown = 12;
  const std::vector<evaluation::BenchmarkTask>& tasks = work.suite.tasks;
  for (std::size_t t = 0; t < std::min(tasks.size(), kShown); ++t)
    plan.add({tasks[t].name, fmt::format("{} of {} documents, {} requests, {} shots", tasks[t].documents.size(),
                                         tasks[t].documents_original, tasks[t].requests.size(), tasks[t].shots)});
  if (tasks.size() > kShown) plan.add({"…", fmt::format("{} tasks more", tasks.size() - kShown)});
  if (!tasks.empty()) {
    plan.add({"questions", fmt::format("{} requests about {} documents, at most {} tokens each, {} tokens at a time",
                                       work.requests(), work.documents(), work.question_length, options.max_tokens)});
    plan.add({"BOS", fmt::format("{} (harness {})", evaluation::name_of(options.harness_bos()),
                                 evaluation::name_of(options.harness))});
  }
  plan.add({"compute", fmt::format("{}, {} windows per micro-batch, log-softmax float32, sums float64",
                                   dtype_name(work.scoring.dtype), work.scoring.micro_batch)});
  plan.add({"ranks", fmt::format("{} = {} pipeline stages x {} replicas, {}", context.world.size(), grid.stages,
                                 grid.replicas, device::describe_device())});
  std::string ranges;
  for (const comm::LayerRange& range : model::stage_layers(config, grid.stages))
    ranges += fmt::format("{}{}..{}", ranges.empty() ? "" : ", ", range.begin, range.end - 1);
  plan.add({"layers per stage", ranges});
  plan.add({"weights per rank",
            work.scoring.residency == model::Residency::streamed
                ? std::string("one layer at a time (streamed)")
                : fmt::format("{} of {} usable", human_bytes(static_cast<double>(largest_stage(models, grid.stages))),
                              human_bytes(static_cast<double>(memory)))});
  plan.add({"out", options.out.string()});
  std::cout << plan.text() << std::flush;
  for (const evaluation::BenchmarkTask& task : tasks)
    for (const std::string& note : task.notes) spdlog::warn("{}: {}", task.name, note);
  for (const evaluation::TaskGroup& group : work.suite.groups)
    for (const std::string& note : group.notes) spdlog::warn("{}: {}", group.name, note);
}

/// What answers depend on: the model, how questions become tokens, and how it computes.
OrderedJson answer_identity(const Context& context, const EvaluateOptions& options, const Work& work) {
  std::string hashes;
  context.world.on_root([&] {
    Sha256 tokenizer;
    for (const char* name : {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "config.json"})
      if (fs::exists(options.model / name))
        tokenizer.update(std::string(name) + sha256_hex(read_file(options.model / name)));
    hashes = work.model->fingerprint() + " " + tokenizer.hex();
  });
  context.world.broadcast(hashes);
  const std::size_t space = hashes.find(' ');
  OrderedJson identity;
  identity["format_version"] = 1;
  identity["model"] = hashes.substr(0, space);
  identity["tokenizer"] = hashes.substr(space + 1);
  identity["bos"] = evaluation::name_of(options.harness_bos());
  identity["max_length"] = work.question_length;
  identity["dtype"] = dtype_name(work.scoring.dtype);
  identity["device"] = device_kind();
  return identity;
}

/// How the answers came about, for the results file.
struct Run {
  double tokens = 0, seconds = 0;  ///< of texts
  std::int64_t requests = 0, known = 0, repeated = 0;
  double request_seconds = 0;
  std::int64_t computed_tokens = 0, asked_tokens = 0, cut = 0;
};

/// What scores of windows depend on: both models, how they compute, and what goes through them together.
OrderedJson score_identity(const Context& context, const Work& work) {
  std::string hashes;
  context.world.on_root([&] {
    hashes = work.model->fingerprint() + " " + (work.reference ? work.reference->fingerprint() : std::string("none"));
  });
  context.world.broadcast(hashes);
  const std::size_t space = hashes.find(' ');
  OrderedJson identity;
  identity["format_version"] = 1;
  identity["model"] = hashes.substr(0, space);
  identity["reference"] = hashes.substr(space + 1);
  identity["dtype"] = dtype_name(work.scoring.dtype);
  identity["device"] = device_kind();
  identity["reference_dtype"] = dtype_name(work.scoring.reference_dtype);
  identity["micro_batch"] = work.scoring.micro_batch;
  return identity;
}

/// Scores of every text. `kept` is where they are while texts are scored, in `folder`; opened once the models load.
std::vector<evaluation::TaskResult> score_texts(const Context& context, const EvaluateOptions& options,
                                                const Work& work, const comm::Grid& grid, const fs::path& folder,
                                                std::optional<evaluation::ScoreStore>& kept, Run& run) {
  std::vector<evaluation::TaskResult> results;
  if (work.texts.empty()) return results;
  const evaluation::Scorer scorer(*work.model, work.reference.get(), grid, work.scoring);
  evaluation::ScoreStore& store = kept.emplace(context.world, folder / "scores", score_identity(context, work));
  std::vector<evaluation::ScoreHooks> hooks(work.texts.size());
  std::size_t windows = 0, done = 0;
  for (std::size_t t = 0; t < work.texts.size(); ++t) {
    const evaluation::Task& task = work.texts[t];
    hooks[t].known = store.known(task);
    windows += task.windows.size();
    for (std::size_t w = 0; w < task.windows.size(); ++w) {
      if (hooks[t].known[w])
        ++done;
      else
        run.tokens += static_cast<double>(task.windows[w].inputs.size());
    }
  }
  if (done > 0) emit_event("resume", {{"step", done}, {"of", windows}, {"unit", "window"}});
  if (done > 0 && context.world.root())
    spdlog::info("{} of {} windows were scored before, their scores are in {}", done, windows, store.folder().string());
  Progress progress("evaluate", "token", run.tokens, context.world.root());
  const auto start = std::chrono::steady_clock::now();
  for (std::size_t t = 0; t < work.texts.size(); ++t) {
    const evaluation::Task& task = work.texts[t];
    hooks[t].scored = [&](const std::vector<std::size_t>& fresh, const std::vector<evaluation::WindowScore>& scores) {
      done = std::min(windows, done + fresh.size());
      const bool stop = comm::stop_agreed(context.world);
      store.add(task, fresh, scores, stop);
      if (stop && done < windows)
        throw Stopped(fmt::format("stopped on request with {} of {} windows scored, which are kept in {}", done,
                                  windows, store.folder().string()));
    };
    results.push_back(evaluation::make_result(
        task,
        scorer.score(
            task.windows, task.name, [&](double amount) { progress.advance(amount); }, hooks[t]),
        work.reference != nullptr));
  }
  context.world.barrier("end of scoring");
  run.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (!options.names.empty() && context.world.root()) spdlog::info("texts are scored");
  return results;
}

std::vector<evaluation::BenchmarkResult> ask_benchmarks(const Context& context, const EvaluateOptions& options,
                                                        const Work& work, const comm::Grid& grid,
                                                        const fs::path& folder, Run& run) {
  std::vector<evaluation::BenchmarkResult> results;
  if (work.suite.tasks.empty()) return results;
  const comm::Communicator& world = context.world;
  evaluation::AnswerStore store(world, folder / "answers", answer_identity(context, options, work));
  evaluation::ResponderOptions responding;
  responding.dtype = work.scoring.dtype;
  responding.residency = work.scoring.residency;
  responding.bos = options.harness_bos();
  responding.max_length = work.question_length;
  responding.max_tokens = options.max_tokens;
  const evaluation::Responder responder(*work.model, *work.tokenizer, grid, responding);
  if (store.size() > 0 && world.root())
    spdlog::info("{} answers of earlier runs are in {}", store.size(), store.folder().string());
  Progress progress("evaluate", "request", static_cast<double>(work.requests()), world.root());
  const auto start = std::chrono::steady_clock::now();
  evaluation::AskOptions asking;
  asking.store = &store;
  asking.stop = [] { return stop_requested(); };
  asking.progress = [&](double requests) { progress.advance(requests); };
  asking.skipped = [&](double requests) { progress.skip(requests); };
  evaluation::Asked asked = evaluation::ask(world, responder, work.suite.tasks, asking);
  run.request_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  run.requests = asked.requests;
  run.known = asked.known;
  run.repeated = asked.repeated;
  // Every stage of a pipeline counts the same tokens.
  const evaluation::Responder::Work done = responder.work();
  run.computed_tokens = world.all_reduce(done.computed) / grid.stages;
  run.cut = done.cut;
  run.asked_tokens = world.all_reduce(done.asked) / grid.stages;
  if (asked.known > 0 && world.root())
    spdlog::info("{} of {} requests were answered before", asked.known, asked.requests);
  world.on_root([&] {
    for (std::size_t t = 0; t < work.suite.tasks.size(); ++t)
      results.push_back(evaluation::make_result(work.suite.tasks[t], std::move(asked.answers[t])));
  });
  return results;
}

/// Our own key of the results file.
OrderedJson own_facts(const Context& context, const EvaluateOptions& options, const Work& work, const comm::Grid& grid,
                      const Run& run, const OrderedJson& record) {
  OrderedJson facts;
  facts["format"] = "headfold-results";
  facts["format_version"] = 1;
  facts["model"] = evaluation::describe_model(*work.model, work.scoring.dtype);
  facts["reference"] =
      work.reference ? evaluation::describe_model(*work.reference, work.scoring.reference_dtype) : OrderedJson(nullptr);
  facts["bos"] = evaluation::name_of(options.source.bos);  // as asked for; each text's rule stands in its configs
  if (work.follows_harness()) {
    const auto letter = evaluation::Encoder(*work.tokenizer, options.harness_bos()).encode("a");
    facts["harness"] = OrderedJson{{"prompts_of", "0.4.13.dev0 (4e7e0d47)"},
                                   {"compat", evaluation::name_of(options.harness)},
                                   {"bos", evaluation::name_of(options.harness_bos())},
                                   {"adds_bos", !letter.empty() && letter.front() == work.tokenizer->bos()}};
  }
  facts["world_size"] = context.world.size();
  facts["stages"] = grid.stages;
  facts["replicas"] = grid.replicas;
  facts["micro_batch"] = work.scoring.micro_batch;
  facts["data_hash"] = options.source.files.empty()
                           ? OrderedJson(nullptr)
                           : OrderedJson(calibration::data_hash(options.source.files, options.source.field));
  facts["record"] = record;
  if (run.seconds > 0) facts["tokens_per_second"] = run.tokens / run.seconds;
  if (work.suite.tasks.empty() && work.suite.skipped.empty()) return facts;
  OrderedJson& benchmarks = facts["benchmarks"];
  benchmarks["max_length"] = work.question_length;
  benchmarks["max_batch_tokens"] = options.max_tokens;
  benchmarks["requests"] = run.requests;
  benchmarks["answered_before"] = run.known;
  benchmarks["repeated"] = run.repeated;
  benchmarks["seconds"] = run.request_seconds;
  benchmarks["tokens_computed"] = run.computed_tokens;
  if (run.request_seconds > 0 && run.computed_tokens > 0)
    benchmarks["tokens_per_second"] = static_cast<double>(run.computed_tokens) / run.request_seconds;
  benchmarks["tokens_one_by_one"] = run.asked_tokens;
  benchmarks["continuations_cut"] = run.cut;
  benchmarks["skipped"] = OrderedJson::array();
  for (const evaluation::SkippedTask& skipped : work.suite.skipped)
    benchmarks["skipped"].push_back({{"task", skipped.name}, {"reason", skipped.reason}});
  benchmarks["files"] = OrderedJson::object();
  benchmarks["notes"] = OrderedJson::object();
  for (const evaluation::BenchmarkTask& task : work.suite.tasks) {
    OrderedJson files = OrderedJson::array();
    for (const fs::path& file : task.files) files.push_back(file.string());
    benchmarks["files"][task.name] = files;
    if (!task.notes.empty()) benchmarks["notes"][task.name] = task.notes;
  }
  for (const evaluation::TaskGroup& group : work.suite.groups)
    if (!group.notes.empty()) benchmarks["notes"][group.name] = group.notes;
  return facts;
}

/// All tasks, or those that --tasks names.
void list_tasks(const EvaluateOptions& options) {
  const fs::path& folder = options.suite.data_dir;
  if (!folder.empty() && !fs::is_directory(folder)) throw IoError(folder.string(), "--data-dir names no folder");
  std::cout << evaluation::listing_text(evaluation::list_tasks(options.suite, !folder.empty(), options.names))
            << std::flush;
}

}  // namespace

void check_evaluate(const Planned& planned, const std::vector<std::string>& arguments) {
  const EvaluateOptions options = read_evaluate_options(read_values("evaluate", evaluate_job_options(), arguments));
  question_length(options, planned.config_of(options.model));
  evaluation::check_tasks(options.names, options.suite);
}

void evaluate(const Context& context, const std::vector<std::string>& arguments) {
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  const EvaluateOptions options = read_evaluate_options(
      parse(context, "evaluate",
            "headfold evaluate --model DIR --tasks NAME,… --data-dir DIR --out DIR [options]\n"
            "       headfold evaluate --model DIR --data FILE… --out DIR [--reference DIR] [options]\n"
            "       headfold evaluate --list [--data-dir DIR]",
            evaluate_job_options(), arguments));
  const bool speaks = context.world.root();
  if (options.list) {
    context.world.on_root([&] { list_tasks(options); });
    return;
  }
  // From here on a signal, or a file STOP in the output folder, ends the job in good order: with everything that is
  // known saved.
  listen_for_stop();
  watch_stop_file(options.out / "STOP");

  Work work = read_work(context, options);
  context.world.on_root([&] { check_writable(options.out); });
  Models models = {{work.model.get(), work.scoring.dtype}};
  if (work.reference) models.emplace_back(work.reference.get(), work.scoring.reference_dtype);
  const comm::Communicator host = context.world.split_by_host();
  const std::int64_t memory = context.world.all_reduce(
      memory_for_model(static_cast<std::int64_t>(available_memory_bytes()) / host.size()) / 10 * 8, comm::Reduce::min);
  const comm::Grid grid =
      comm::make_grid(context.world, choose_stages(context, options, models, memory, work.scoring.residency));
  log_grid(grid, model::stage_layers(work.model->config(), grid.stages));
  if (speaks) print_plan(context, options, work, grid, models, memory);
  if (options.dry_run) return;

  fs::path model_folder = fs::weakly_canonical(fs::absolute(options.model));
  if (model_folder.filename().empty()) model_folder = model_folder.parent_path();  // the path ended with a slash
  const fs::path folder = options.out / evaluation::sanitized(model_folder.filename().string());
  Run run;
  evaluation::Results results;
  comm::stop_if_requested(context.world, "before the first question");
  std::optional<evaluation::ScoreStore> scores;
  results.texts = score_texts(context, options, work, grid, folder, scores, run);
  results.benchmarks = ask_benchmarks(context, options, work, grid, folder, run);

  const OrderedJson record = run_record(context, "evaluate", arguments, elapsed());
  context.world.on_root([&] {
    std::map<std::string, evaluation::Scored> scored;
    for (const evaluation::BenchmarkResult& result : results.benchmarks) scored[result.task->name] = result.scored;
    results.groups = evaluation::group_results(work.suite, scored);
    evaluation::RunInfo info;
    const std::int64_t length = work.suite.tasks.empty() ? work.longest_window() : work.question_length;
    info.model = work.model.get();
    info.tokenizer = work.tokenizer.get();
    info.model_args =
        fmt::format("pretrained={},dtype={},max_length={},bos={}", options.model.string(), options.dtype, length,
                    evaluation::name_of(work.follows_harness() ? options.harness_bos() : options.source.bos));
    info.dtype = work.scoring.dtype;
    info.micro_batch = work.scoring.micro_batch;
    info.limit = options.limit;
    info.max_length = length;
    info.seconds = elapsed();
    info.date =
        std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
    info.environment = build_description() + device::describe_device();
    info.bootstrap_iterations = options.suite.bootstrap_iterations;
    info.fewshot_seed = options.suite.fewshot_seed;
    info.headfold = own_facts(context, options, work, grid, run, record);
    const fs::path path = evaluation::write_results(folder, info, results);
    if (scores) scores->remove();

    std::cout << "\n" << evaluation::results_table(results) << "\n";
    if (run.seconds > 0)
      std::cout << fmt::format("{:.0f} tokens/s of text over {} ranks\n", run.tokens / run.seconds,
                               context.world.size());
    if (run.requests > run.known)
      std::cout << fmt::format(
          "{} requests in {}, {:.1f} requests/s; {} tokens computed where one by one would take {}\n",
          run.requests - run.known, human_seconds(run.request_seconds),
          static_cast<double>(run.requests - run.known) / run.request_seconds, run.computed_tokens, run.asked_tokens);
    std::cout << fmt::format("{} in all\nresults: {}\nnext:    headfold report --run {}\n", human_seconds(elapsed()),
                             path.string(), shell_word(options.out.string()))
              << std::flush;
  });
}

}  // namespace headfold::jobs
