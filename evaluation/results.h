#pragma once
// Results in the evaluation harness's schema (docs/evaluation.md), so that existing tools read them.

#include <headfold/base/json.h>
#include <headfold/checkpoint/reader.h>
#include <headfold/evaluation/registry.h>
#include <headfold/evaluation/scorer.h>
#include <headfold/evaluation/tasks.h>

#include <filesystem>
#include <string>
#include <vector>

namespace headfold::evaluation {

/// What a task reports besides its windows' scores: metric values by "name,none", in the harness's order.
struct TaskResult {
  const Task* task = nullptr;
  std::vector<WindowScore> scores;  ///< by window
  Totals totals;
  std::int64_t words = 0, bytes = 0;  ///< rolling only, of the original documents
  bool has_reference = false;
  double perplexity() const;       ///< exp(mean loss per token)
  double word_perplexity() const;  ///< exp(loss / words)
  double byte_perplexity() const;  ///< exp(loss / bytes)
  double bits_per_byte() const;    ///< loss / bytes / ln 2
  /// {metric, value} in the order they are reported: blocks: perplexity, loss; rolling: word_perplexity,
  /// byte_perplexity, bits_per_byte; with a reference also kl, top1_agreement and reference_perplexity (blocks) .
  std::vector<std::pair<std::string, double>> metrics() const;
};
TaskResult make_result(const Task& task, std::vector<WindowScore> scores, bool has_reference);

/// A benchmark task with what the model answered and how it counts.
struct BenchmarkResult {
  const BenchmarkTask* task = nullptr;
  std::vector<Answer> answers;  ///< to task->requests
  Scored scored;
};
BenchmarkResult make_result(const BenchmarkTask& task, std::vector<Answer> answers);

/// What a results file says about a model: name, folder, fingerprint, layout, kv_heads, heads, dtype (of the
/// computation), parameters, cache_bytes_per_token (at the checkpoint's own dtype).
OrderedJson describe_model(const checkpoint::Reader& reader, at::ScalarType compute_dtype);

/// Everything about a run that is not a task.
struct RunInfo {
  const checkpoint::Reader* model = nullptr;
  const tokenizer::Tokenizer* tokenizer = nullptr;
  std::string model_args;  ///< the options, as one text
  at::ScalarType dtype = at::kFloat;
  std::int64_t micro_batch = 1;
  double limit = 0;  ///< 0: none
  std::int64_t max_length = 0;
  double seconds = 0;                     ///< the whole evaluation
  std::int64_t date = 0;                  ///< UNIX seconds
  std::string environment;                ///< build and machine
  std::int64_t bootstrap_iterations = 0;  ///< of benchmarks
  std::uint32_t fewshot_seed = 1234;      ///< of benchmarks
  OrderedJson headfold;                   ///< our own top-level key
};

/// Everything a results file reports.
struct Results {
  std::vector<TaskResult> texts;
  std::vector<BenchmarkResult> benchmarks;
  std::vector<GroupResult> groups;
};

/// One sample line per window (blocks) or document (rolling), keys as the harness writes them plus per-window losses.
std::vector<OrderedJson> sample_lines(const TaskResult& result);
/// One sample line per document and filter, as the harness writes them, plus `response_tokens` {scored, context} of
/// every request.
std::vector<OrderedJson> sample_lines(const BenchmarkResult& result);

/// The whole results file. Every top-level key of the harness is present (`groups` only with groups); what headfold has
/// no value for is null.
OrderedJson harness_results(const RunInfo& run, const Results& results);

/// The harness's table: task, version, filter, n-shot, metric, direction, value, standard error.
std::string results_table(const Results& results);

/// The harness's folder name of a model: runs of "<>:/|\?*[] become "__".
std::string sanitized(const std::string& model_name);
/// Local time as the harness puts it in file names: 2026-08-01T12-34-56.789012.
std::string file_time();

/// Writes results_<time>.json and samples_<task>_<time>.jsonl into `folder`; returns the results file's path. Throws
/// IoError.
std::filesystem::path write_results(const std::filesystem::path& folder, const RunInfo& run, const Results& results);

}  // namespace headfold::evaluation
