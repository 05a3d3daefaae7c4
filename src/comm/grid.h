#pragma once
// The process grid: world = stages x replicas. A replica is a pipeline of `stages` ranks that share the layers of one
// model copy.

#include <headfold/comm/communicator.h>

#include <cstdint>
#include <vector>

namespace headfold::comm {

/// Half-open range of layer indices.
struct LayerRange {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  std::int64_t size() const { return end - begin; }
  bool contains(std::int64_t layer) const { return layer >= begin && layer < end; }
};

/// Where this rank stands. World rank = replica * stages + stage, so that neighbours of a pipeline are neighbours in
/// rank.
struct Grid {
  Communicator world = Communicator::self();
  Communicator pipeline = Communicator::self();  ///< the stages of this replica; its rank is `stage`
  Communicator peers = Communicator::self();     ///< the same stage of every replica; its rank is `replica`
  int stages = 1;
  int replicas = 1;
  int stage = 0;
  int replica = 0;
  bool first_stage() const { return stage == 0; }
  bool last_stage() const { return stage == stages - 1; }
};

/// Splits `world` into pipelines of `stages` ranks. Throws UsageError when the world size is no multiple of `stages`.
Grid make_grid(const Communicator& world, int stages);

/// Contiguous ranges of `layers` layers over `stages` stages, sizes differing by at most one, with `first_extra` and
/// `last_extra` (weight of embedding and head in units of one layer) taken into account. Throws UsageError when stages
/// > layers.
std::vector<LayerRange> split_layers(std::int64_t layers, int stages, double first_extra = 0, double last_extra = 0);
/// The same for layers of different `costs`, in the unit of the extras: the heaviest stage is as light as can be.
std::vector<LayerRange> split_layers(const std::vector<double>& costs, int stages, double first_extra = 0,
                                     double last_extra = 0);

/// Share of rank-time lost while a pipeline fills and drains: (stages - 1) / (micro_batches + stages - 1).
double pipeline_bubble(int stages, std::int64_t micro_batches);

}  // namespace headfold::comm
