#include "convert_plan.h"

#include <headfold/comm/stopping.h>
#include <headfold/evaluation/trial.h>
#include <headfold/folding/apply.h>
#include <headfold/folding/budget.h>
#include <spdlog/spdlog.h>

#include <set>

namespace headfold::jobs {

namespace {

using folding::Allocation;
using folding::FoldOptions;
using folding::LayerTarget;

/// KL of the model with one part of one layer folded, against the original.
class KlProbe {
 public:
  KlProbe(const comm::Communicator& world, const checkpoint::Reader& reader,
          const calibration::StatisticsFile* statistics, const FoldOptions& options,
          const calibration::TextSample& text)
      : world_(world),
        reader_(reader),
        statistics_(statistics),
        options_(options),
        trial_(world, reader, probe_windows(world, reader, text), at::kFloat) {}

  double operator()(std::int64_t layer, folding::Part part, std::int64_t heads) const {
    comm::stop_if_requested(world_, "while measuring layers; nothing was written");
    // Folded heads repeated in the source's own shapes: the other part stays as it is.
    const std::map<std::string, at::Tensor> tensors = folding::expanded_part(
        reader_, statistics_, folding::targets_for({heads}, reader_.config()).at(0), layer, part, options_);
    return trial_
        .score(
            layer,
            [&](std::int64_t l) {
              return l == layer ? evaluation::ReplacedLayer{&reader_.config(), &tensors} : evaluation::ReplacedLayer{};
            })
        .mean_divergence();
  }

 private:
  comm::Communicator world_;
  const checkpoint::Reader& reader_;
  const calibration::StatisticsFile* statistics_;
  FoldOptions options_;
  evaluation::Trial trial_;
};

std::vector<folding::Groups> searched_groups(const comm::Communicator& world, const checkpoint::Reader& reader,
                                             const calibration::StatisticsFile* statistics, const FoldOptions& options,
                                             folding::GroupingOptions grouping, std::int64_t kv_heads,
                                             OrderedJson& report) {
  grouping.kv_heads = kv_heads;
  // Sweeps of polish would cost a search more than they change its order of groups.
  FoldOptions plain = options;
  plain.polish = 0;
  const auto results = folding::search_all_layers(world, reader, statistics, plain, grouping);
  report.push_back(folding::grouping_report(results, grouping));
  return folding::groups_of(results);
}

}  // namespace

std::vector<evaluation::Window> probe_windows(const comm::Communicator& world, const checkpoint::Reader& reader,
                                              const calibration::TextSample& text) {
  if (text.files.empty()) throw UsageError("this needs held-out text", "give --probe-data FILE (.txt or .jsonl)");
  const at::Tensor sequences = calibration::read_sequences(world, reader.folder(), reader.config().vocab, text);
  std::vector<evaluation::Window> windows;
  windows.reserve(static_cast<std::size_t>(sequences.size(0)));
  for (std::int64_t i = 0; i < sequences.size(0); ++i) {
    const auto* ids = sequences.data_ptr<std::int64_t>() + i * sequences.size(1);
    evaluation::Window window;
    window.document = i;
    window.inputs.assign(ids, ids + sequences.size(1) - 1);
    window.targets.assign(ids + 1, ids + sequences.size(1));
    windows.push_back(std::move(window));
  }
  return windows;
}

Decision decide_targets(const comm::Communicator& world, const checkpoint::Reader& reader,
                        const calibration::StatisticsFile* statistics, const FoldOptions& options,
                        const folding::GroupingOptions& grouping, const calibration::TextSample& probe) {
  const checkpoint::ModelConfig& config = reader.config();
  Decision decision;
  OrderedJson budget, searches = OrderedJson::array();
  if (options.allocation == Allocation::lorc_progressive) {
    decision.targets = folding::lorc_targets(world, reader, options, &budget);
  } else if (options.allocation != Allocation::uniform) {
    const folding::LossTable table = folding::loss_table(world, reader, statistics, options);
    const KlProbe kl(world, reader, statistics, options, probe);
    // A probe deals its windows to the ranks: it is collective, and all ranks run the same ones.
    const auto rates = folding::exchange_rates_by_choice(comm::Communicator::self(), table, std::cref(kl));
    const auto list = folding::choices(table, rates);
    const std::int64_t total = options.kv_heads * config.layers;
    const auto heads = options.allocation == Allocation::dp ? folding::allocate_exactly(list, total)
                                                            : folding::allocate_greedily(list, total);
    decision.targets = folding::targets_for(heads, config);
    budget = folding::budget_report(table, rates, heads, options.allocation);
  } else {
    decision.targets = folding::uniform_targets(options, config);
  }
  if (options.grouping == folding::Grouping::search) {
    std::set<std::size_t> counts;
    for (const LayerTarget& target : decision.targets) counts.insert(target.groups.size());
    for (const std::size_t count : counts) {
      const auto groups =
          searched_groups(world, reader, statistics, options, grouping, static_cast<std::int64_t>(count), searches);
      for (std::size_t l = 0; l < decision.targets.size(); ++l)
        if (decision.targets[l].groups.size() == count) decision.targets[l].groups = groups[l];
    }
  }
  if (!budget.is_null()) decision.report["budget"] = budget;
  if (!searches.empty()) decision.report["grouping"] = searches;
  return decision;
}

std::vector<std::string> near_singular_layers(const folding::Plan& plan) {
  std::vector<std::string> all;
  for (const folding::LayerPlan& layer : plan.layers) {
    double condition = 0, dropped = 0;
    const char* what = "keys";
    for (const folding::GroupPlan& group : layer.groups) {
      if (group.key_condition > condition) condition = group.key_condition, dropped = group.key_dropped, what = "keys";
      if (group.value_condition > condition)
        condition = group.value_condition, dropped = group.value_dropped, what = "values";
    }
    if (condition > 1e9 || dropped > 0)
      all.push_back(fmt::format(
          "layer {}: the Gram of the {} is near-singular (condition number {:.1e}, {:.2g} % of its directions dropped)",
          layer.layer, what, condition, 100 * dropped));
  }
  return all;
}

}  // namespace headfold::jobs
