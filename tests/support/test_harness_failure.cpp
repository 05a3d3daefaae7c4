// Fails on the last rank only, on purpose: CTest checks that the harness reports it.
#include "world.h"

namespace headfold::testing_support {
namespace {

TEST(HarnessTest, fails_on_last_rank) {
  EXPECT_NE(world().rank(), world().size() - 1) << "failing on purpose";
}

}  // namespace
}  // namespace headfold::testing_support
