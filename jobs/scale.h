#pragma once
// Predictions of a run on a cluster: `headfold run --dry-run --nodes N …`.

#include "run_config.h"

namespace headfold::jobs {

/// Options of `run` that ask for a prediction.
po::options_description scale_options();
/// Whether one of them was given.
bool asks_for_prediction(const po::variables_map& values);

/// One element of a run: the job and its arguments.
struct PredictedElement {
  std::string stage, name;
  std::vector<std::string> arguments;
  std::filesystem::path output;
};
/// Predicts the elements, or without any the chain with default options for --model or --shape; prints tables, and
/// writes JSON where --json says so. Rank 0's business alone. UsageError, InputError.
void predict_run(const po::variables_map& values, std::vector<PredictedElement> elements);

}  // namespace headfold::jobs
