#pragma once
// Which tasks there are, where their files lie, and the tasks and groups a list of names stands for.

#include <headfold/base/error.h>
#include <headfold/evaluation/suite.h>

#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace headfold::evaluation {

/// A file that a task needs is nowhere under the data folder. The message names every place looked at, the hint how to
/// obtain it.
class MissingData : public InputError {
 public:
  MissingData(const std::string& task, const std::string& message, std::string hint)
      : InputError(message, std::move(hint)), task_(task) {}
  const std::string& task() const { return task_; }
  std::string_view kind() const override { return "MissingData"; }

 private:
  std::string task_;
};

/// The grid of the retrieval tasks: `samples` documents for every length and depth.
struct RetrievalOptions {
  std::vector<std::int64_t> lengths;  ///< tokens of prompt and answer; empty: 256, 512, … up to the model's length
  std::vector<double> depths = {0, 0.25, 0.5, 0.75, 1};  ///< of the hidden sentence: 0 first, 1 last
  std::int64_t samples = 4;
};

struct SuiteOptions {
  std::filesystem::path data_dir;                 ///< empty: only tasks without files
  std::vector<std::filesystem::path> user_tasks;  ///< JSON descriptions (docs/evaluation.md, Your own tasks)
  std::optional<std::int64_t> shots;              ///< instead of every task's own number of shots
  double limit = 0;                               ///< documents of each task: 0 all, below 1 a fraction, else a count
  std::uint32_t fewshot_seed = 1234;
  std::int64_t bootstrap_iterations = 100000;  ///< 0: no bootstrap errors
  bool skip_missing = false;                   ///< tasks without their file go to Suite::skipped instead of MissingData
  std::function<std::int64_t(std::string_view)> tokens;  ///< tokens the model reads for a text; retrieval tasks only
  std::int64_t max_length = 0;                           ///< of the model in tokens; retrieval tasks only
  RetrievalOptions retrieval;
};

/// A text whose perplexity is a task; tasks.h makes windows of it (perplexity_task()).
struct PerplexityText {
  std::string name;      ///< "wikitext", "wikitext2", "c4-palu", …
  bool rolling = false;  ///< the harness's rolling form; else the papers' blocks
  std::filesystem::path file;
  std::string joiner;          ///< between documents (blocks)
  bool rows = false;           ///< documents are the file's lines, each with its newline, blank ones empty (blocks)
  std::int64_t documents = 0;  ///< only the first so many, which the file must have; 0: all
  std::int64_t blocks = 0;     ///< only the first so many windows; 0: all
  std::int64_t published = 0;  ///< documents of the published text (rolling); 0: not known
  std::string recipe;          ///< for people
};
/// The one text of a blocks form. IoError, CorruptFile (file, line), InputError (too few documents, no text).
std::string joined_text(const PerplexityText& text);

/// A task left out because its file is not there.
struct SkippedTask {
  std::string name;
  std::string reason;
};

/// A group that was asked for by name and reports a value of its own.
struct TaskGroup {
  std::string name;
  std::string alias;
  std::string version;
  std::vector<std::string> subtasks;  ///< the harness's group_subtasks: groups or tasks right below, without those of
                                      ///< which everything was skipped
  std::vector<std::string> leaves;    ///< all tasks below, without those skipped
  bool weight_by_size = true;         ///< false: the plain mean over tasks
  std::vector<std::string> notes;     ///< which tasks its value lacks
};

struct Suite {
  std::vector<BenchmarkTask> tasks;
  std::vector<PerplexityText> texts;
  std::vector<SkippedTask> skipped;
  std::vector<TaskGroup> groups;
};

/// Tasks and groups by name, in the order asked for, each task once. Throws UsageError for an unknown name (with those
/// that look alike), MissingData, and InputError / CorruptFile (file, line, field) for what the files hold.
Suite make_tasks(const std::vector<std::string>& names, const SuiteOptions& options);

/// Throws what make_tasks() would because of names and missing files; reads nothing but `options.user_tasks`.
void check_tasks(const std::vector<std::string>& names, const SuiteOptions& options);

/// A group's metrics over its leaves.
struct GroupResult {
  std::string name;
  std::string alias;
  std::string version;
  std::vector<Metric> metrics;
  std::int64_t sample_count = 0;
  std::vector<std::string> subtasks;
  std::vector<std::string> notes;  ///< of the group
};
/// Of every group of the suite, from its tasks' scores by name: mean weighted by samples and pooled standard error
/// (docs/evaluation.md). Groups without a scored leaf are left out.
std::vector<GroupResult> group_results(const Suite& suite, const std::map<std::string, Scored>& scored);

/// One file a task reads.
struct FileListing {
  std::string purpose;              ///< "documents", "labels", "shots"
  std::vector<std::string> wanted;  ///< places under the data folder, in the order they are tried
  std::filesystem::path found;      ///< empty: none of them is there
  std::string sha256;               ///< of the found file; empty unless asked for
};
struct TaskListing {
  std::string name;
  std::string about;
  std::vector<std::string> groups;
  std::vector<FileListing> files;  ///< none: the task makes its documents itself
  std::string obtain;              ///< where to get them on a connected machine
  bool ready() const;              ///< all files but those of shots are there
};
/// Every task, those of `options.user_tasks` too, or those that `names` stand for, as in make_tasks(). `checksums`:
/// hash the found files (large ones take a while). UsageError for unknown names.
std::vector<TaskListing> list_tasks(const SuiteOptions& options, bool checksums,
                                    const std::vector<std::string>& names = {});
/// The same as a table for the terminal: a row per file, the subjects of mmlu together; below it all places, the
/// groups, and how to obtain what is missing. The checksum of several files is the SHA-256 of their checksums, one
/// after the other in the order of their names.
std::string listing_text(const std::vector<TaskListing>& tasks);

/// Hashes of samples_<task>.jsonl: SHA-256 of the document's JSON with indent 2, of the first request's context and of
/// the target.
struct SampleHashes {
  std::string document;
  std::string prompt;
  std::string target;
};
SampleHashes sample_hashes(const BenchmarkTask& task, std::int64_t document);
/// task_hashes[task]: SHA-256 of the hashes of all samples, in order, one after the other.
std::string task_hash(const BenchmarkTask& task, const std::vector<Sample>& samples);

}  // namespace headfold::evaluation
