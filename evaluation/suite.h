#pragma once
// Benchmark tasks with the harness's semantics: documents from local files, prompts, few-shot draws, metrics.

#include <headfold/base/json.h>
#include <headfold/evaluation/requests.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace headfold::evaluation {

/// One metric of a task or group, key "metric,filter" as the harness writes it.
struct Metric {
  std::string name;    ///< "acc", "acc_norm", "exact_match", "perplexity", ...
  std::string filter;  ///< "none", "strict-match", "flexible-extract"
  double value = 0;
  std::optional<double> error;  ///< standard error; none: "N/A"
  bool higher_is_better = true;
};

/// One line of samples_<task>.jsonl before the harness's common fields are added: a document under one filter.
struct Sample {
  std::int64_t document = 0;  ///< index into BenchmarkTask::documents
  std::string filter = "none";
  std::vector<std::string> filtered;  ///< filtered_resps of generation tasks, one per request; empty for others, where
                                      ///< the harness repeats the answers
  std::vector<std::pair<std::string, double>> metrics;  ///< name and value for this document, in the harness's order
};

struct Scored {
  std::vector<Metric> metrics;
  std::vector<Sample> samples;
};

/// An evaluated document.
struct BenchmarkDocument {
  std::int64_t id = 0;  ///< doc_id: index within the evaluated split, before any limit
  OrderedJson fields;   ///< the document as the harness would write it
  std::string target;   ///< as the harness writes `target`
};

/// A task whose documents are read and whose prompts are built. Everything here is a function of the files and options
/// alone, so every rank holds the same.
struct BenchmarkTask {
  std::string name;  ///< "arc_easy", "mmlu_anatomy", ...
  std::string alias;
  std::string version;      ///< "1.0"
  std::string output_type;  ///< "multiple_choice", "loglikelihood", "generate_until"
  std::string description;  ///< of the task, for people
  std::int64_t shots = 0;
  std::int64_t documents_original = 0;  ///< before the limit
  std::vector<BenchmarkDocument> documents;
  std::vector<Request> requests;  ///< by document, then by index
  std::vector<std::filesystem::path> files;
  OrderedJson config;              ///< the harness's configs[task]; "generation_kwargs" for generation tasks
  std::vector<std::string> notes;  ///< why numbers may differ from the harness's (fewer documents than published, …)
  /// Metrics and samples from the answers to `requests`, in their order. InternalError when their number differs.
  std::function<Scored(const BenchmarkTask&, const std::vector<Answer>&)> score;
};

}  // namespace headfold::evaluation
