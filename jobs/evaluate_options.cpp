#include "evaluate_options.h"

#include <cmath>
#include <cstdlib>

#include "values.h"

namespace headfold::jobs {
namespace {

constexpr std::int64_t kMaxTokens = 4096;

}  // namespace

po::options_description evaluate_job_options() {
  po::options_description own("options of evaluate");
  auto add = own.add_options();
  add("model", po::value<std::string>(), "model folder (Hugging Face form)");
  add("out", po::value<std::string>(), "folder for results_*.json and samples_*.jsonl");
  add("tasks", po::value<std::vector<std::string>>()->multitoken()->composing(),
      "tasks and groups, separated by commas or spaces (--list shows them); over --data: ppl_blocks (the papers' "
      "windows; default), rolling (the harness's word, byte and bit rates; `wikitext` for .raw files)");
  add("list", po::bool_switch(), "show every task, its files, whether they are there and how to get them; then stop");
  add("data-dir", po::value<std::string>(), "folder with the data files of tasks");
  add("task-file", po::value<std::vector<std::string>>()->multitoken()->composing(),
      "JSON descriptions of tasks of your own");
  add("num-fewshot", po::value<std::int64_t>(), "examples before every question, instead of each task's own number");
  add("fewshot-seed", po::value<std::int64_t>()->default_value(1234), "seed that draws the examples (harness: 1234)");
  add("limit", po::value<double>()->default_value(0),
      "at most this many documents of each task (ppl_blocks: windows); below 1 a fraction; 0 = all");
  add("skip-missing", po::bool_switch(), "leave out tasks whose files are not there, instead of refusing");
  add("harness-compat", po::value<std::string>()->default_value("0.4.9.2"),
      "release of the evaluation harness whose BOS rule holds: 0.4.9.1 (none) or 0.4.9.2 (as the tokenizer does)");
  add("bos", po::value<std::string>()->default_value("default"), "beginning-of-sequence token: default, always, never");
  add("max-length", po::value<std::int64_t>()->default_value(0),
      "tokens that questions are cut to, on the left; 0 = what the harness takes");
  add("max-batch-tokens", po::value<std::int64_t>()->default_value(0),
      "tokens of questions that go through the model together; 0 = 4096");
  add("bootstrap-iters", po::value<std::int64_t>()->default_value(100000),
      "replicates for standard errors of metrics that are no means; 0 = none");
  add("retrieval-lengths", po::value<std::string>()->default_value(""),
      "passkey, needle: tokens of a question, separated by commas; empty = 256, 512, ... up to the model's length");
  add("retrieval-depths", po::value<std::string>()->default_value("0,0.25,0.5,0.75,1"),
      "passkey, needle: where the sentence is hidden, 0 (first) to 1 (last)");
  add("retrieval-samples", po::value<std::int64_t>()->default_value(4),
      "passkey, needle: questions of every length and depth");
  add("reference", po::value<std::string>(),
      "model to compare with on texts, usually the original: adds KL divergence and top-1 agreement");
  add("data", po::value<std::vector<std::string>>()->multitoken()->composing(),
      "text files: .jsonl, .txt, .raw (WikiText)");
  add("field", po::value<std::string>()->default_value("text"), "field of .jsonl lines that holds the text");
  add("seq-len", po::value<std::int64_t>()->default_value(2048),
      "tokens per window of a text, clipped to what the model can take; when not given, rolling windows are as long as "
      "questions (--max-length)");
  add("joiner", po::value<std::string>()->default_value("auto"),
      "how ppl_blocks joins texts: documents, paper, auto (documents for .jsonl)");
  add("dtype", po::value<std::string>()->default_value("auto"), "compute in float32, bfloat16, or auto");
  add("pipeline-ranks", po::value<int>()->default_value(0),
      "ranks that share one copy of the layers; 0 = as few as memory needs");
  add("micro-batch", po::value<std::int64_t>()->default_value(0),
      "windows of a text per forward pass; 0 = 4096 tokens' worth");
  add("streamed", po::bool_switch(), "keep one layer in memory at a time");
  add("dry-run", po::bool_switch(), "say what would be done and stop");
  add_device_option(own);
  return own;
}

namespace {

/// Names between commas and spaces.
std::vector<std::string> split_names(const std::vector<std::string>& values) {
  std::vector<std::string> names;
  for (const std::string& value : values) {
    for (std::size_t at = 0; at <= value.size();) {
      const std::size_t end = std::min(value.find_first_of(", ", at), value.size());
      if (end > at) names.push_back(value.substr(at, end - at));
      at = end + 1;
    }
  }
  if (names.empty()) throw UsageError("--tasks names no task", "headfold evaluate --list");
  return names;
}

/// Numbers between commas; UsageError naming the option for anything else or a value outside [least, most].
std::vector<double> numbers(const po::variables_map& values, const char* name, double least, double most) {
  const auto text = values[name].as<std::string>();
  std::vector<double> result;
  if (text.empty()) return result;
  for (std::size_t at = 0; at <= text.size();) {
    const std::size_t end = std::min(text.find(',', at), text.size());
    const std::string one = text.substr(at, end - at);
    char* rest = nullptr;
    const double value = std::strtod(one.c_str(), &rest);
    if (one.empty() || *rest != '\0' || !(value >= least && value <= most))
      throw UsageError(fmt::format("--{} {}: \"{}\" is not a number from {} to {}", name, text, one, least, most));
    result.push_back(value);
    at = end + 1;
  }
  return result;
}

}  // namespace

EvaluateOptions read_evaluate_options(const po::variables_map& values) {
  const auto texts = [&](const char* name) {
    return values.count(name) > 0 ? values[name].as<std::vector<std::string>>() : std::vector<std::string>();
  };
  EvaluateOptions options;
  options.list = values["list"].as<bool>();
  for (const char* name : {"model", "out"})
    if (values.count(name) == 0 && !options.list)
      throw UsageError(fmt::format("the option '--{}' is required but missing", name), "headfold evaluate --help");
  if (values.count("model") > 0) options.model = values["model"].as<std::string>();
  if (values.count("out") > 0) options.out = values["out"].as<std::string>();
  if (values.count("reference") > 0) options.reference = values["reference"].as<std::string>();
  for (const std::string& file : texts("data")) options.source.files.emplace_back(file);
  options.source.field = values["field"].as<std::string>();
  options.source.joiner = evaluation::parse_joiner(values["joiner"].as<std::string>());
  options.source.bos = evaluation::parse_bos(values["bos"].as<std::string>());
  options.harness = evaluation::parse_harness_version(values["harness-compat"].as<std::string>());
  const bool has_text = !options.source.files.empty();
  for (const std::string& name :
       values.count("tasks") > 0 ? split_names(texts("tasks")) : std::vector<std::string>{"ppl_blocks"}) {
    if (name == "ppl_blocks") {
      options.blocks = true;
    } else if (name == "rolling" || (name == "wikitext" && has_text)) {
      options.rolling = true;
    } else {
      options.names.push_back(name);
    }
  }
  if ((options.blocks || options.rolling) && !has_text && !options.list)
    throw UsageError(fmt::format("{} needs a text", options.blocks ? "ppl_blocks" : "rolling"),
                     "name it with --data, or choose tasks of --data-dir with --tasks");

  evaluation::SuiteOptions& suite = options.suite;
  if (values.count("data-dir") > 0) suite.data_dir = values["data-dir"].as<std::string>();
  for (const std::string& file : texts("task-file")) suite.user_tasks.emplace_back(file);
  if (values.count("num-fewshot") > 0) suite.shots = at_least(values, "num-fewshot", 0, "examples, 0 or more");
  suite.skip_missing = values["skip-missing"].as<bool>();
  suite.bootstrap_iterations = at_least(values, "bootstrap-iters", 0, "replicates, 0 or more");
  suite.fewshot_seed = static_cast<std::uint32_t>(at_least(values, "fewshot-seed", 0, "a seed is 0 or more"));
  if (values["fewshot-seed"].as<std::int64_t>() > 0xffffffffLL)
    throw UsageError("--fewshot-seed: a seed is below 4294967296");
  for (const double length : numbers(values, "retrieval-lengths", 1, 1e8)) {
    if (length != std::floor(length)) throw UsageError(fmt::format("--retrieval-lengths {}: whole tokens", length));
    suite.retrieval.lengths.push_back(static_cast<std::int64_t>(length));
  }
  suite.retrieval.depths = numbers(values, "retrieval-depths", 0, 1);
  if (suite.retrieval.depths.empty()) throw UsageError("--retrieval-depths names no depth", "for example 0,0.5,1");
  suite.retrieval.samples = at_least(values, "retrieval-samples", 1, "questions, 1 or more");
  options.limit = values["limit"].as<double>();
  if (!std::isfinite(options.limit) || options.limit < 0 ||
      (options.limit > 1 && options.limit != std::floor(options.limit)) || options.limit > 1e15)
    throw UsageError(fmt::format("--limit {}: must be 0 (all), a fraction below 1, or a count", options.limit));
  suite.limit = options.limit;
  options.max_length = at_least(values, "max-length", 0, "must be 0 (what the harness takes) or more");
  options.max_tokens = at_least(values, "max-batch-tokens", 0, "must be 0 (automatic) or more");
  if (options.max_tokens == 0) options.max_tokens = kMaxTokens;
  options.seq_len = at_least(values, "seq-len", 2, "a window needs at least 2 tokens");
  options.seq_len_given = !values["seq-len"].defaulted();
  options.micro_batch = at_least(values, "micro-batch", 0, "must be 0 (automatic) or more");
  options.dtype = values["dtype"].as<std::string>();
  parse_dtype(options.dtype, "float32");  // an unknown name is refused before any file is opened
  options.pipeline_ranks = values["pipeline-ranks"].as<int>();
  if (options.pipeline_ranks < 0)
    throw UsageError(fmt::format("--pipeline-ranks {}: must be 0 (automatic) or more", options.pipeline_ranks));
  options.streamed = values["streamed"].as<bool>();
  options.dry_run = values["dry-run"].as<bool>();
  return options;
}

}  // namespace headfold::jobs
