#pragma once
// Options of `evaluate` and what they mean.

#include <headfold/evaluation/encoding.h>
#include <headfold/evaluation/registry.h>
#include <headfold/evaluation/tasks.h>

#include <filesystem>
#include <string>
#include <vector>

#include "job.h"

namespace headfold::jobs {

struct EvaluateOptions {
  std::filesystem::path model, reference, out;
  evaluation::TextSource source;         ///< --data and how it is read
  bool blocks = false, rolling = false;  ///< tasks over --data
  std::vector<std::string> names;        ///< every other task and group
  evaluation::SuiteOptions suite;        ///< of those; without the model's length and tokenizer
  evaluation::HarnessVersion harness = evaluation::HarnessVersion::v0_4_9_2;
  std::int64_t seq_len = 0, micro_batch = 0, max_length = 0, max_tokens = 0;
  bool seq_len_given = false;
  double limit = 0;  ///< 0: none, below 1: a fraction
  std::string dtype;
  int pipeline_ranks = 0;
  bool streamed = false, dry_run = false, list = false;

  /// BOS of everything that follows the harness: its rolling perplexity and benchmarks.
  tokenizer::Bos harness_bos() const { return evaluation::benchmark_bos(source.bos, harness); }
};

/// UsageError for values that mean nothing.
EvaluateOptions read_evaluate_options(const po::variables_map& values);

}  // namespace headfold::jobs
