#pragma once
// What every sub-command shares.

#include <ATen/ATen.h>
#include <headfold/base/error.h>
#include <headfold/base/json.h>
#include <headfold/checkpoint/config.h>
#include <headfold/comm/communicator.h>

#include <boost/program_options.hpp>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace headfold::jobs {

namespace po = boost::program_options;

struct Context {
  const comm::Environment& environment;
  comm::Communicator world;
};

/// What is known of a run's models and files before its first stage.
struct Planned {
  std::filesystem::path model;                                ///< the original
  checkpoint::ModelConfig original;                           ///< its config
  std::function<bool(const std::filesystem::path&)> is_made;  ///< whether a stage of the run writes that path
  /// Of a model of the run: those that stages make are the original but for their KV heads.
  checkpoint::ModelConfig config_of(const std::filesystem::path& folder) const;
};

/// A sub-command. `run` returns normally when done and throws otherwise. `check` throws what `run` would throw because
/// of the arguments alone; it opens small files only, writes nothing, and knows neither the ranks nor the machine that
/// the job will have. Null: nothing beyond what its options take.
struct Job {
  const char* name;
  const char* summary;
  void (*run)(const Context& context, const std::vector<std::string>& arguments);
  void (*check)(const Planned& planned, const std::vector<std::string>& arguments) = nullptr;
};

void bench_machine(const Context& context, const std::vector<std::string>& arguments);
void calibrate(const Context& context, const std::vector<std::string>& arguments);
void convert(const Context& context, const std::vector<std::string>& arguments);
void evaluate(const Context& context, const std::vector<std::string>& arguments);
void export_model(const Context& context, const std::vector<std::string>& arguments);
void finetune_model(const Context& context, const std::vector<std::string>& arguments);
void generate(const Context& context, const std::vector<std::string>& arguments);
void inspect(const Context& context, const std::vector<std::string>& arguments);
void logits(const Context& context, const std::vector<std::string>& arguments);
void report(const Context& context, const std::vector<std::string>& arguments);
void run_pipeline(const Context& context, const std::vector<std::string>& arguments);
void synthesize(const Context& context, const std::vector<std::string>& arguments);
void verify(const Context& context, const std::vector<std::string>& arguments);

/// Job::check of the jobs that `run` runs.
void check_calibrate(const Planned& planned, const std::vector<std::string>& arguments);
void check_convert(const Planned& planned, const std::vector<std::string>& arguments);
void check_evaluate(const Planned& planned, const std::vector<std::string>& arguments);
void check_finetune(const Planned& planned, const std::vector<std::string>& arguments);

/// Own options of the jobs that `run` runs (that of convert: convert_options.h): its configuration is checked against
/// them.
po::options_description calibrate_options();
po::options_description evaluate_job_options();
po::options_description finetune_options();
po::options_description report_options();

/// Thrown after --help was printed; ends the job with exit code 0.
struct HelpShown {};

/// Options that every job has: --help, --threads, --log-dir, --verbose, --events, --stage-name, --comm-timeout,
/// --share-gpus.
po::options_description common_options();

/// Parses `arguments` against `own` plus the common options and applies the common ones (open_session() in session.h;
/// time-out; warns once when libtorch runs on reference BLAS). `usage` is the text above the options in --help.
/// `positional` names an option that takes bare arguments. UsageError for unknown, repeated or malformed options; the
/// hint names `headfold JOB --help`. `timeout`: seconds instead of --comm-timeout's default.
po::variables_map parse(const Context& context, const std::string& job, const std::string& usage,
                        const po::options_description& own, const std::vector<std::string>& arguments,
                        const std::string& positional = {}, std::optional<double> timeout = {});

/// What parse() begins with, for Job::check: the values alone, without effect on the process. UsageError as parse(),
/// but for limits that depend on the machine.
po::variables_map read_values(const std::string& job, const po::options_description& own,
                              const std::vector<std::string>& arguments, const std::string& positional = {});

/// float32 / bfloat16 from a --dtype value; "auto" gives bfloat16 for 16-bit checkpoints on GPUs and on CPUs with AMX,
/// else float32. UsageError otherwise.
at::ScalarType parse_dtype(const std::string& text, const std::string& checkpoint_dtype);

/// Adds --device to a job's own options: parse() then sets model::compute() accordingly. Jobs without it compute on the
/// CPU.
void add_device_option(po::options_description& options);

/// What a rank may fill with a model and what goes through it, bytes: `host_share` of its host's memory, or what is
/// free on its GPU where it computes there.
std::int64_t memory_for_model(std::int64_t host_share);

/// "cpu", "cpu:tensors" or "cuda": devices of a kind give the same numbers.
std::string device_kind();

/// The name of what parse_dtype() gives.
const char* dtype_name(at::ScalarType dtype);

/// "1500000", "500MB", "2.5GiB": a positive number of bytes, fractions cut. UsageError naming the option.
std::uint64_t parse_bytes(const std::string& option, const std::string& text);

/// A word as a shell takes it: quoted where it has to be.
std::string shell_word(const std::string& text);

/// The command line as one text, for provenance.
std::string command_line(const std::string& job, const std::vector<std::string>& arguments);

/// What a job says about its own run, for the report: job, command, date (UNIX seconds), seconds, ranks, hosts,
/// threads_per_rank, peak_resident_bytes (largest over ranks), headfold_version. Collective. Callers add their own
/// keys.
OrderedJson run_record(const Context& context, const std::string& job, const std::vector<std::string>& arguments,
                       double seconds);

/// Refuses to write into a folder or file that exists and was not made by headfold. Creates nothing.
void check_own_folder(const std::filesystem::path& folder);

/// A model folder that a job is to write.
struct OutputFolder {
  std::filesystem::path folder;
  bool overwrite = false;  ///< what another command made may be replaced
  /// Whether a headfold.json that stands there is that of this very command. Null: there is none that can be read.
  std::function<bool(const Json& made)> is_own;
  std::vector<std::filesystem::path> companions;  ///< whose copies belong there (checkpoint::companion_files)
  std::vector<std::string> others;                ///< names of further files of a whole result
  std::vector<std::filesystem::path> keep;        ///< files there that are not replaced
};

/// A headfold.json as is_own compares it: another version of headfold makes the same.
Json without_version(const OrderedJson& made);
Json without_version(Json made);

/// Whether the folder holds the whole result of this very command already, and says so. UsageError when it is foreign
/// (check_own_folder), or holds another model or plan of headfold and may not be overwritten; what an interrupted job
/// left, and a damaged result of this command (with a warning), may be written again. Creates nothing. Collective.
bool is_made(const Context& context, const OutputFolder& output);

/// Refuses (UsageError) to write `file` when it is one that this job reads, or stands where a model's own files are.
/// `values`: the job's options, whatever they name is read, but for outputs. Creates nothing.
void check_output_place(const po::variables_map& values, const std::filesystem::path& file);

/// The same, and refuses a file that exists and is no former result (`is_former`) of the same kind (`kind`, for the
/// message).
void check_output_file(const po::variables_map& values, const std::filesystem::path& file, const std::string& kind,
                       const std::function<bool(const std::filesystem::path&)>& is_former);

}  // namespace headfold::jobs
