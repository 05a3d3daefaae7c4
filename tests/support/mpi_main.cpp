// GoogleTest main for any number of ranks: rank 0 prints; a failure on any rank fails the test on rank 0 and names the
// rank.

#include <gtest/gtest.h>
#include <headfold/base/log.h>
#include <headfold/comm/communicator.h>

#include <ATen/Parallel.h>
#include <iostream>

#include "world.h"

namespace {

const headfold::comm::Environment* environment = nullptr;

/// Collects the failures of one test on this rank; at its end all ranks exchange them and every rank fails when one
/// did.
class RankListener : public testing::EmptyTestEventListener {
 public:
  void OnTestPartResult(const testing::TestPartResult& result) override {
    if (!result.failed()) return;
    text_ += fmt::format("{}:{}: {}\n", result.file_name() == nullptr ? "?" : result.file_name(), result.line_number(),
                         result.summary());
  }
  void OnTestEnd(const testing::TestInfo& info) override {
    const auto& world = environment->world();
    const std::vector<std::string> all = world.all_gather(text_);
    text_.clear();
    bool failed = false;
    for (std::size_t r = 0; r < all.size(); ++r) {
      if (all[r].empty()) continue;
      failed = true;
      if (world.root() && r != 0)
        std::cout << fmt::format("[  rank {}  ] {}.{} failed:\n{}", r, info.test_suite_name(), info.name(), all[r]);
    }
    failed_ = failed_ || failed;
  }
  bool failed() const { return failed_; }

 private:
  std::string text_;
  bool failed_ = false;
};

}  // namespace

namespace headfold::testing_support {
const comm::Communicator& world() {
  return environment->world();
}
}  // namespace headfold::testing_support

int main(int argc, char** argv) {
  const headfold::comm::Environment own(&argc, &argv);
  environment = &own;
  testing::InitGoogleTest(&argc, argv);
  headfold::start_logging(own.world().rank(), own.world().size());
  headfold::comm::set_timeout_seconds(120);
  if (own.world().size() > 1) at::set_num_threads(1);
  auto& listeners = testing::UnitTest::GetInstance()->listeners();
  if (!own.world().root()) delete listeners.Release(listeners.default_result_printer());
  auto* ranks = new RankListener;  // GoogleTest takes ownership
  listeners.Append(ranks);
  const int code = RUN_ALL_TESTS();
  // A test that every rank skipped or passed is a success; one rank's failure is everyone's.
  return own.world().all_reduce(static_cast<std::int64_t>(code != 0 || ranks->failed() ? 1 : 0),
                                headfold::comm::Reduce::max) != 0
             ? 1
             : 0;
}
