#pragma once
// Decides what every layer is folded to: groups, and the budget over layers.

#include <headfold/calibration/statistics.h>
#include <headfold/checkpoint/reader.h>
#include <headfold/evaluation/windows.h>
#include <headfold/folding/grouping.h>
#include <headfold/folding/plan.h>

#include "convert_options.h"

namespace headfold::jobs {

struct Decision {
  std::vector<folding::LayerTarget> targets;
  OrderedJson report;  ///< for Plan::decisions; null when there was nothing to decide
};

/// Collective; the same on every rank. `probe` is read for budgets that need KL probes.
Decision decide_targets(const comm::Communicator& world, const checkpoint::Reader& reader,
                        const calibration::StatisticsFile* statistics, const folding::FoldOptions& options,
                        const folding::GroupingOptions& grouping, const calibration::TextSample& probe);

/// A sentence for every layer with a near-singular Gram.
std::vector<std::string> near_singular_layers(const folding::Plan& plan);

/// Windows of held-out text for probes and trials. Collective.
std::vector<evaluation::Window> probe_windows(const comm::Communicator& world, const checkpoint::Reader& reader,
                                              const calibration::TextSample& text);

}  // namespace headfold::jobs
