#include <headfold/base/error.h>
#include <headfold/comm/grid.h>

#include "world.h"

namespace headfold::comm {
namespace {

using testing_support::world;

TEST(GridTest, every_rank_stands_at_its_place) {
  for (int stages = 1; stages <= world().size(); ++stages) {
    if (world().size() % stages != 0) {
      EXPECT_THROW(make_grid(world(), stages), UsageError);
      continue;
    }
    const Grid grid = make_grid(world(), stages);
    EXPECT_EQ(grid.stages * grid.replicas, world().size());
    EXPECT_EQ(grid.pipeline.size(), stages);
    EXPECT_EQ(grid.pipeline.rank(), grid.stage);
    EXPECT_EQ(grid.peers.size(), grid.replicas);
    EXPECT_EQ(grid.peers.rank(), grid.replica);
    EXPECT_EQ(grid.replica * stages + grid.stage, world().rank());
  }
}

TEST(SplitLayersTest, covers_all_layers_in_order_and_balances) {
  for (const std::int64_t layers : {1, 6, 7, 32}) {
    for (int stages = 1; stages <= layers && stages <= 8; ++stages) {
      const auto ranges = split_layers(layers, stages);
      std::int64_t next = 0;
      for (const LayerRange& range : ranges) {
        EXPECT_EQ(range.begin, next);
        EXPECT_GE(range.size(), layers / stages);
        EXPECT_LE(range.size(), (layers + stages - 1) / stages);
        next = range.end;
      }
      EXPECT_EQ(next, layers);
    }
  }
}

TEST(SplitLayersTest, heavy_ends_get_fewer_layers) {
  const auto ranges = split_layers(12, 3, 2.0, 2.0);
  EXPECT_LT(ranges[0].size(), ranges[1].size());
  EXPECT_LT(ranges[2].size(), ranges[1].size());
}

TEST(SplitLayersTest, more_stages_than_layers_is_refused_with_the_limit) {
  try {
    split_layers(3, 4);
    FAIL() << "no error";
  } catch (const UsageError& error) {
    EXPECT_NE(error.hint().find("at most 3"), std::string::npos);
  }
}

TEST(PipelineBubbleTest, known_values) {
  EXPECT_DOUBLE_EQ(pipeline_bubble(1, 10), 0.0);
  EXPECT_DOUBLE_EQ(pipeline_bubble(4, 9), 0.25);
}

}  // namespace
}  // namespace headfold::comm
