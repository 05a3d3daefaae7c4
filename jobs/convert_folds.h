#pragma once
// The grammar of `convert --compare FOLD,FOLD,…`.
//
//   FOLD = NAME or KEYS[:METRIC][/VALUES[:METRIC]], then any number of @option[=value]
//
// A NAME is a shorthand for a FOLD (shorthands()); options are convert's own.

#include <utility>
#include <vector>

#include "convert_options.h"

namespace headfold::jobs {

/// One fold of a comparison, understood but not yet held against the model (folding::check_options).
struct FoldRequest {
  std::string text;      ///< as it was given; of the name `all`: what it stands for
  std::string expanded;  ///< with shorthands spelled out
  folding::FoldOptions options;
  folding::GroupingOptions grouping;
  folding::RefitOptions refit;
};

/// Names of folds and what they stand for with this family of models, in the order of `all`.
std::vector<std::pair<std::string, std::string>> shorthands(checkpoint::Family family);

/// The folds of a comma-separated list. Options given to the job itself (`values`) hold for every fold that does not
/// set them. `all` stands for the shorthands (those with a refit only where `refit` says that there is text for it).
/// UsageError naming the fold and the legal choices.
std::vector<FoldRequest> parse_folds(const std::string& list, const po::variables_map& values,
                                     const checkpoint::ModelConfig& config, bool refit);

}  // namespace headfold::jobs
