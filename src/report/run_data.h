#pragma once
// What a run folder holds: calibrations, converted models, verifications and evaluations, read from the files their
// jobs left and put together by base model. File formats: docs/formats.md, section "Files of a run".

#include <headfold/report/paired.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace headfold::report {

/// How one job ran (jobs/job.h run_record). Absent values stay empty.
struct Record {
  std::string job;
  std::string command;  ///< without machine paths
  double date = 0;      ///< UNIX seconds; 0: not recorded
  std::optional<double> seconds;
  std::optional<std::int64_t> ranks, hosts, threads_per_rank;
  std::optional<double> peak_resident_bytes;
  std::string version;
};

struct Calibration {
  std::string file;  ///< relative to the run folder
  Record record;
  std::string model, fingerprint, data_hash;
  std::vector<std::pair<std::string, std::string>> options;
  std::optional<std::int64_t> tokens, stages, replicas;
  std::optional<double> tokens_per_second, pipeline_bubble;
};

/// One layer of a conversion. Losses are relative: lost over total energy in the fold's own weighted norm.
struct LayerFold {
  std::int64_t layer = 0;
  std::int64_t groups = 0;
  std::optional<double> key_loss, value_loss;
  std::vector<double> key_energy, value_energy;  ///< cumulative share kept, by channel count; empty when not recorded
  std::optional<std::int64_t> kv_heads, key_width, value_width;  ///< groups cached, channels of each
  /// Losses of bases fitted to one half of the calibration sequences: on that half, and on the other.
  std::optional<double> key_fitted, key_held_out, value_fitted, value_held_out;
  std::vector<double> imaginary_share, leading_share;  ///< per RoPE frequency, fastest first; empty when not recorded
};

/// What the refit did to one matrix of a layer (folding/refit.h). Errors are shares of the target's energy, or with
/// `divergence` nats per token. The held-out ones are of a matrix fitted to the other sequences.
struct RefitPart {
  std::string part;
  bool divergence = false;
  std::optional<double> error_before, error_after, held_out_before, held_out_after;
  std::optional<bool> kept;
};
struct RefitLayer {
  std::int64_t layer = 0;
  std::optional<double> stream_error;  ///< share of the residual stream's energy that is off behind the layer
  std::vector<RefitPart> parts;        ///< in the order in which they were fitted
};
struct Refit {
  std::optional<std::int64_t> sequences, tokens;  ///< tokens of each sequence
  std::vector<RefitLayer> layers;
};

/// How a budget over layers was chosen: KL per relative loss, measured layer by layer.
struct BudgetLayer {
  std::int64_t layer = 0;
  std::optional<double> key_rate, value_rate;
};
struct Decisions {
  std::optional<double> predicted_kl, predicted_kl_uniform;
  std::vector<BudgetLayer> budget;
  std::optional<double> grouping_gain;  ///< share of contiguous groups' cost that searched ones save
  std::optional<std::int64_t> grouping_changed, grouping_layers;  ///< layers whose groups are not contiguous, of all
};

/// A fold's options beyond folds and metrics; empty texts: not recorded, or the default that needs no word.
struct FoldExtras {
  std::string slow_band, polish, grouping, budget, latents, widths, mean_weight;
  bool refit = false;
  bool healed = false;  ///< trained after the fold
};

/// One layer of a verification.
struct LayerCheck {
  std::int64_t layer = 0;
  std::optional<double> key_predicted, key_measured, value_predicted, value_measured, score_error, output_error;
};

/// Which pairs of layers a verification's text tells apart, and how many of them were predicted in that order
/// (folding/comparison.h LayerOrder).
struct PairOrder {
  std::int64_t pairs = 0, told_apart = 0, in_order = 0;
  std::optional<double> spread;  ///< largest less smallest measured loss, over their mean
};

struct Verification {
  std::string file, model, text;
  Record record;
  std::vector<LayerCheck> layers;
  std::optional<PairOrder> key_order, value_order;  ///< absent in files of older versions
};

struct Shapes {
  std::int64_t hidden = 0, layers = 0, heads = 0, head_dim = 0, vocab = 0;
  std::string family;
};

struct Conversion {
  std::string folder;  ///< relative to the run folder
  std::string source, source_fingerprint, statistics_file, statistics_hash;
  std::string keys, key_metric, values, value_metric;
  std::optional<double> sink_weight, weight_ridge;
  FoldExtras extras;
  std::string layout;
  bool stock = false;
  std::int64_t kv_heads_before = 0, kv_heads_after = 0, heads = 0, layers_total = 0;
  std::int64_t cache_before = 0, cache_after = 0;  ///< bytes per token
  std::int64_t parameters_before = 0, parameters_after = 0;
  std::vector<LayerFold> layers;
  Decisions decisions;
  std::optional<Refit> refit;
  std::optional<Shapes> shapes;  ///< from config.json beside it, when that can be read
  std::optional<Record> record;  ///< convert.json
  std::optional<double> seconds_plan, seconds_apply;
  std::optional<Verification> verification;

  double share() const { return static_cast<double>(cache_after) / static_cast<double>(cache_before); }
  /// Whether layers differ in what they keep.
  bool uneven() const;
  /// Fewest and most KV heads (latents) of a layer; both kv_heads_after when layers do not say.
  std::pair<std::int64_t, std::int64_t> kv_heads_range() const;
};

/// One line of `convert --compare`.
struct ComparedPlan {
  std::string name;           ///< as compare gave it; made from the fold where it gave none
  std::string fold;           ///< options in words
  std::string kv_heads_text;  ///< "4", or "2 to 8" where layers differ; may be empty
  std::optional<std::int64_t> kv_heads, cache_bytes;
  std::optional<bool> stock;
  std::optional<double> key_loss, value_loss, perplexity, kl, top1, seconds;
  std::string error;  ///< why this plan could not be tried; usually empty
};
struct Comparison {
  std::string file, model, fingerprint;
  Record record;
  std::optional<double> original_perplexity;
  std::optional<std::int64_t> windows, tokens, original_cache_bytes;
  std::vector<ComparedPlan> plans;  ///< best first: by KL, then perplexity; those without either last
};

/// One training (headfold finetune).
struct Training {
  std::string folder;  ///< relative to the run folder
  Record record;
  bool finished = false;
  std::string model, fingerprint, source_fingerprint;  ///< what was trained; the last one empty for models not folded
  std::string teacher;                                 ///< name of the teacher's folder; empty: none
  bool full = false;                                   ///< all weights instead of adapters
  std::optional<std::int64_t> width, batch, sequence, steps, chosen_step, tokens;
  std::optional<std::int64_t> kl_top;  ///< KL is over so many tokens per position and the rest as one class
  std::optional<double> distill, learning_rate, tokens_per_second;
  std::optional<double> perplexity_before, perplexity_best, kl_before, kl_last;  ///< on the validation text
  std::vector<std::pair<double, double>> losses;       ///< step, cross-entropy of the training text in nats per token
  std::vector<std::pair<double, double>> validations;  ///< step, perplexity
};

struct Samples;  // samples.h

/// One task or group of a results file. A metric that was recorded but is no finite number has an empty value.
struct TaskResult {
  std::string file;
  double date = 0;
  std::string text_hash;                                 ///< of the evaluated samples; empty when not recorded
  std::map<std::string, std::optional<double>> metrics;  ///< by the harness's "metric,filter" name
  std::map<std::string, double> errors;                  ///< standard errors by the same names, where recorded
  std::map<std::string, bool> higher_is_better;          ///< by metric; where recorded
  std::optional<std::int64_t> documents, shots;
  /// How it was computed, where recorded: rule for the first token, tokens of a window or question at most, dtype.
  std::string bos, dtype;
  std::optional<std::int64_t> max_length;
  std::vector<std::string> subtasks;       ///< of a group: tasks or groups right below it
  std::shared_ptr<const Samples> samples;  ///< of a benchmark task; null: there is no file of them
  /// Perplexity of a text: no benchmark.
  bool of_text(const std::string& task) const;
  /// Why numbers of the two mean different things: "BOS never, the original BOS default"; empty: they do not.
  std::string differs_from(const TaskResult& original) const;
};

/// All results of one model; for every task the newest file wins.
struct Evaluation {
  bool harness = false;  ///< measured by the evaluation harness itself, not by headfold
  std::string name, folder, fingerprint, layout, dtype;
  std::string reference;  ///< name of the reference model, may be empty
  std::string reference_fingerprint;
  std::optional<std::int64_t> kv_heads, heads, parameters, cache_bytes_per_token;
  std::map<std::string, TaskResult> tasks;
  std::vector<std::pair<std::string, Record>>
      records;                              ///< file and how it ran, oldest first; only files that still contribute
  std::optional<double> tokens_per_second;  ///< of the newest file
};

/// One line of every table: the original or a conversion, with what was measured on it.
struct ModelRow {
  std::string name;  ///< unique within its section
  bool original = false;
  std::optional<Conversion> conversion;
  std::optional<Evaluation> evaluation;
  std::string
      fold;  ///< short label of the fold, equal for conversions that differ only in the number of KV heads; "original"
  int series = -1;  ///< index of the fold among the section's folds; -1 for the original
  std::string layout;
  std::optional<bool> stock;
  std::optional<std::int64_t> kv_heads, cache_bytes, parameters;
  std::optional<double> share;  ///< of the original's KV bytes
  /// Metrics of the section's perplexity task, absent when not evaluated. Inner empty: recorded, but no finite number.
  std::optional<std::optional<double>> perplexity, kl, top1;
  std::optional<double> ratio;  ///< to the original's perplexity on the same text
};

/// What a model scored by one metric of one benchmark.
struct BenchmarkCell {
  std::optional<std::optional<double>> value;  ///< absent: not evaluated; inner empty: no finite number
  std::optional<double> error;                 ///< standard error as recorded
  std::optional<std::int64_t> documents;
  std::optional<double> delta;     ///< value less the original's; only where both saw the same documents and prompts
  std::optional<PairedTest> test;  ///< original first, from both models' samples
  std::string file, samples_file;
};
/// One metric of one benchmark over all models.
struct BenchmarkColumn {
  std::string task, metric, filter;
  bool higher_is_better = true;
  bool group = false;                ///< a mean over tasks
  bool main = false;                 ///< the metric that stands for its task
  std::vector<std::string> above;    ///< groups that this task or group is part of, the outermost first
  std::vector<BenchmarkCell> cells;  ///< by Section::models
  /// A share of documents, shown in per cent.
  bool share() const;
};
/// Mean scores of a retrieval task by depth and length, of one model.
struct RetrievalMap {
  std::string task, metric;
  std::size_t model = 0;                                  ///< index into Section::models
  std::vector<double> lengths, depths;                    ///< ascending
  std::vector<std::vector<std::optional<double>>> means;  ///< by depth, then length
};
struct Benchmarks {
  std::vector<BenchmarkColumn> columns;  ///< by task, its main metric first; parts of groups behind their group
  std::vector<RetrievalMap> retrieval;
  std::vector<std::string> notes;  ///< sentences: what could not be compared, and why
};

/// All that was done with one base model.
struct Section {
  std::string name, fingerprint;
  std::optional<std::int64_t> heads, kv_heads, layers, cache_bytes, parameters;
  std::optional<Shapes> shapes;
  std::vector<Calibration> calibrations;
  std::vector<Comparison> comparisons;
  std::vector<Training> trainings;
  std::vector<ModelRow> models;    ///< the original first, then by KV heads and quality
  std::vector<std::string> folds;  ///< labels, index = ModelRow::series
  Benchmarks benchmarks;
  std::string perplexity_task;  ///< the task of ModelRow::perplexity, e.g. "ppl_blocks@256"; empty when there is none
  std::vector<std::string> missing;  ///< sentences: what a complete report would have and this run does not
  double first_date = 0;
};

struct RunData {
  std::string name;  ///< last part of the run folder's path
  std::vector<Section> sections;
  std::vector<std::string> files;    ///< read, relative to the run folder
  std::vector<std::string> ignored;  ///< had a name we look for but not our content
};

/// A fold's options beyond key fold, metrics and number of KV heads, in words: "slow band 5; refit". Empty: all
/// default.
std::string words_of(const FoldExtras& extras);

/// Reads every agreed file below `run`. Files are never followed through links to folders. Throws InputError when `run`
/// is no folder, CorruptFile / InputError naming the file for one that claims a headfold format and breaks it,
/// InputError saying what was looked for when there is nothing to report.
RunData read_run(const std::filesystem::path& run);

}  // namespace headfold::report
