#pragma once
// samples_<task>_<time>.jsonl of the evaluation harness: what every document scored. Private to src/report.

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>

namespace headfold::report {

/// One document of a task.
struct SampleDocument {
  std::string prompt, target;            ///< hashes; empty when not recorded
  std::map<std::string, double> values;  ///< by "metric,filter": finite numbers only
  std::optional<double> length, depth;   ///< of retrieval tasks: tokens, and place of what is hidden (0 first, 1 last)
};

/// The samples of one task and model.
struct Samples {
  std::string file;     ///< relative to the run folder
  std::string problem;  ///< why they cannot be used; empty: nothing
  /// By doc_hash; equal documents are told apart by the order in which they come ("HASH 2").
  std::map<std::string, SampleDocument> documents;
};

/// Reads a samples file. Never throws for what is in it: a file that is cut off, edited or not of this form has a
/// `problem` that names the line.
std::shared_ptr<const Samples> read_samples(const std::filesystem::path& path, const std::string& shown_as);

}  // namespace headfold::report
