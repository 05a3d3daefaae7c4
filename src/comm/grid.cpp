#include <headfold/base/error.h>
#include <headfold/comm/grid.h>

#include <algorithm>
#include <limits>
#include <numeric>

namespace headfold::comm {

Grid make_grid(const Communicator& world, int stages) {
  if (stages < 1) throw UsageError(fmt::format("--pipeline-ranks {}: at least 1 is needed", stages));
  if (world.size() % stages != 0)
    throw UsageError(fmt::format("{} ranks cannot form pipelines of {} ranks each", world.size(), stages),
                     "choose --pipeline-ranks so that it divides the number of ranks");
  Grid grid;
  grid.world = world;
  grid.stages = stages;
  grid.replicas = world.size() / stages;
  grid.stage = world.rank() % stages;
  grid.replica = world.rank() / stages;
  grid.pipeline = world.split(grid.replica, grid.stage);
  grid.peers = world.split(grid.stage, grid.replica);
  return grid;
}

std::vector<LayerRange> split_layers(std::int64_t layers, int stages, double first_extra, double last_extra) {
  return split_layers(std::vector<double>(static_cast<std::size_t>(layers), 1.0), stages, first_extra, last_extra);
}

std::vector<LayerRange> split_layers(const std::vector<double>& costs, int stages, double first_extra,
                                     double last_extra) {
  const auto layers = static_cast<std::int64_t>(costs.size());
  if (stages < 1 || stages > layers)
    throw UsageError(
        fmt::format("{} layers cannot be spread over {} pipeline ranks: every rank needs at least one layer", layers,
                    stages),
        fmt::format("use at most {} pipeline ranks; more ranks than that can only work as replicas", layers));
  // Minimise the heaviest stage exactly by dynamic programming; both numbers are small.
  const auto n = static_cast<std::size_t>(layers);
  const auto s = static_cast<std::size_t>(stages);
  std::vector<double> before(n + 1, 0.0);
  std::partial_sum(costs.begin(), costs.end(), before.begin() + 1);
  const auto cost = [&](std::size_t stage, std::size_t begin, std::size_t end) {
    return before[end] - before[begin] + (stage == 0 ? first_extra : 0) + (stage + 1 == s ? last_extra : 0);
  };
  std::vector<std::vector<double>> best(s, std::vector<double>(n + 1, std::numeric_limits<double>::infinity()));
  std::vector<std::vector<std::size_t>> cut(s, std::vector<std::size_t>(n + 1, 0));
  for (std::size_t end = 1; end <= n; ++end) best[0][end] = cost(0, 0, end);
  for (std::size_t stage = 1; stage < s; ++stage) {
    for (std::size_t end = stage + 1; end <= n; ++end) {
      for (std::size_t begin = stage; begin < end; ++begin) {
        const double value = std::max(best[stage - 1][begin], cost(stage, begin, end));
        if (value < best[stage][end]) {
          best[stage][end] = value;
          cut[stage][end] = begin;
        }
      }
    }
  }
  std::vector<LayerRange> ranges(s);
  std::size_t end = n;
  for (std::size_t stage = s; stage-- > 0;) {
    const std::size_t begin = stage == 0 ? 0 : cut[stage][end];
    ranges[stage] = {static_cast<std::int64_t>(begin), static_cast<std::int64_t>(end)};
    end = begin;
  }
  return ranges;
}

double pipeline_bubble(int stages, std::int64_t micro_batches) {
  if (stages <= 1) return 0;
  return static_cast<double>(stages - 1) / static_cast<double>(micro_batches + stages - 1);
}

}  // namespace headfold::comm
