#pragma once
// Options of `convert` and what they mean.

#include <headfold/calibration/statistics.h>
#include <headfold/calibration/text.h>
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

/// Text that a conversion reads: for --refit, for KL probes and for --compare. Length 0 until it is settled.
calibration::TextSample refit_text(const po::variables_map& values);
calibration::TextSample held_out_text(const po::variables_map& values);
/// --seq-len 0 stands for the length of the calibration sequences, 2048 without statistics; no more than the model
/// takes.
void settle_length(calibration::TextSample& text, const checkpoint::ModelConfig& config,
                   const calibration::StatisticsFile* statistics);

/// The options that a given plan decides (they exclude --plan).
const std::vector<const char*>& plan_options();

}  // namespace headfold::jobs
