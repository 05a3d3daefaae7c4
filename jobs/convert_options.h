#pragma once
// Options of `convert` and what they mean.

#include <headfold/checkpoint/config.h>
#include <headfold/folding/grouping.h>
#include <headfold/folding/plan.h>
#include <headfold/folding/refit.h>

#include "job.h"

namespace headfold::jobs {

po::options_description convert_options();

/// KV heads of the result from --kv-heads or --ratio. UsageError lists the legal values.
std::int64_t target_heads(const po::variables_map& values, const checkpoint::ModelConfig& config);
/// The fold that the options describe, checked by folding::check_options() later.
folding::FoldOptions fold_options(const po::variables_map& values, const checkpoint::ModelConfig& config);
folding::GroupingOptions grouping_options(const po::variables_map& values);
folding::RefitOptions refit_options(const po::variables_map& values);

/// Text that a conversion reads: for --refit, for KL probes and for --compare.
struct TextOptions {
  std::vector<std::filesystem::path> files;
  std::string field;
  std::int64_t samples = 0;
  std::int64_t length = 0;  ///< 0: as long as the calibration sequences
  std::int64_t seed = 0;
  std::int64_t skip = 0;  ///< sequences drawn before these: another part of the same text
};
TextOptions refit_text(const po::variables_map& values);
TextOptions held_out_text(const po::variables_map& values);
/// Token sequences [samples, length] drawn from the text, the same on every rank: rank 0 reads, the others receive.
/// Collective. InputError when the text is too short.
at::Tensor read_sequences(const comm::Communicator& world, const std::filesystem::path& model_folder,
                          const checkpoint::ModelConfig& config, const TextOptions& text);

/// The options that a given plan decides (they exclude --plan).
const std::vector<const char*>& plan_options();

}  // namespace headfold::jobs
