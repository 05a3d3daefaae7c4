#include <headfold/comm/board.h>
#include <headfold/comm/operation.h>
#include <headfold/comm/watchdog.h>

#include <gmock/gmock.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>

#include "world.h"

namespace headfold::comm {
namespace {

using testing::HasSubstr;
using testing::Not;
using testing_support::world;
using Clock = std::chrono::steady_clock;

/// What the watchdog of this rank reported.
class Reports {
 public:
  void add(const std::string& text) {
    const std::lock_guard lock(mutex_);
    texts_.push_back(text);
    when_.push_back(Clock::now());
  }
  std::vector<std::string> texts() const {
    const std::lock_guard lock(mutex_);
    return texts_;
  }
  double seconds_after(Clock::time_point start) const {
    const std::lock_guard lock(mutex_);
    return std::chrono::duration<double>(when_.at(0) - start).count();
  }

 private:
  mutable std::mutex mutex_;
  std::vector<std::string> texts_;
  std::vector<Clock::time_point> when_;
};

class WatchdogTest : public testing::Test {
 protected:
  void SetUp() override { before_ = timeout_seconds(); }
  void TearDown() override { set_timeout_seconds(before_); }
  static constexpr double kLimit = 0.5;
  Reports reports_;

 private:
  double before_ = 0;
};

void sleep_seconds(double seconds) {
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
}

TEST_F(WatchdogTest, names_the_rank_that_does_not_come_to_a_collective) {
  if (world().size() == 1) GTEST_SKIP() << "needs two ranks";
  const int late = world().size() - 1;
  const Watchdog watchdog(world(), [&](const MpiFailure& failure) {
    EXPECT_EQ(failure.code(), ExitCode::internal);
    EXPECT_THAT(failure.hint(), HasSubstr("--comm-timeout"));
    reports_.add(failure.what());
  });
  ASSERT_TRUE(watchdog.can_ask());
  world().barrier("the one before");
  const auto start = Clock::now();
  set_timeout_seconds(kLimit);
  if (world().rank() == late) sleep_seconds(kLimit + 2);
  world().barrier("the meeting");
  set_timeout_seconds(120);
  const std::vector<std::string> texts = reports_.texts();
  // Only the lowest of those that wait speaks.
  if (world().rank() != 0) {
    EXPECT_TRUE(texts.empty()) << texts[0];
    return;
  }
  ASSERT_EQ(texts.size(), 1u);
  EXPECT_THAT(texts[0], HasSubstr(fmt::format("rank 0 on {} has been in barrier 'the meeting'", Environment::host())));
  EXPECT_THAT(texts[0], HasSubstr(fmt::format("of world, {} ranks", world().size())));
  EXPECT_THAT(texts[0], HasSubstr("one rank has not come:"));
  EXPECT_THAT(texts[0], HasSubstr(fmt::format("rank {} on {} is in no operation", late, Environment::host())));
  EXPECT_THAT(texts[0], HasSubstr("left barrier 'the one before'"));
  EXPECT_GT(reports_.seconds_after(start), kLimit);
  EXPECT_LT(reports_.seconds_after(start), kLimit + 2);  // everybody answers at once
}

TEST_F(WatchdogTest, follows_a_chain_of_messages_to_the_rank_that_waits_for_nobody) {
  if (world().size() < 4) GTEST_SKIP() << "needs four ranks";
  const Watchdog watchdog(world(), [&](const MpiFailure& failure) { reports_.add(failure.what()); });
  const Communicator pair = world().split(world().rank() / 2, world().rank());  // 0 1, 2 3
  world().barrier("begin");
  set_timeout_seconds(kLimit);
  std::byte byte{};
  const auto one = std::span(&byte, 1);
  // 0 waits for 1, which waits for 2, which waits for 3, which sleeps.
  if (world().rank() == 3) sleep_seconds(kLimit + 2);
  if (world().rank() == 2) pair.recv(one, 1, 5);
  if (world().rank() == 3) pair.send(one, 0, 5);
  if (world().rank() == 1) world().recv(one, 2, 6);
  if (world().rank() == 2) world().send(one, 1, 6);
  if (world().rank() == 0) pair.recv(one, 1, 7);
  if (world().rank() == 1) pair.send(one, 0, 7);
  set_timeout_seconds(120);
  world().barrier("end");
  const std::vector<std::string> texts = reports_.texts();
  if (world().rank() != 0) {
    EXPECT_TRUE(texts.empty());
    return;
  }
  ASSERT_EQ(texts.size(), 1u);
  EXPECT_THAT(texts[0], testing::ContainsRegex("receive from rank 1 .message 1 of world/split[0-9]+:0, tag 7"));
  EXPECT_THAT(texts[0], HasSubstr("rank 1 on " + Environment::host() + " waits in receive from rank 2"));
  EXPECT_THAT(texts[0], HasSubstr("wait for nobody:\n  rank 3 on " + Environment::host() + " is in no operation"));
  EXPECT_THAT(texts[0], Not(HasSubstr("rank 2 on")));
}

TEST_F(WatchdogTest, sees_through_calls_that_do_not_return) {
  const Watchdog watchdog(world(), [&](const MpiFailure& failure) { reports_.add(failure.what()); });
  EXPECT_EQ(watchdog.can_ask(), world().size() > 1);
  world().barrier("begin");
  set_timeout_seconds(kLimit);
  {
    const Operation scope("reading the shared file");
    if (world().root()) sleep_seconds(kLimit + 2);
  }
  set_timeout_seconds(120);
  world().barrier("end");
  const std::vector<std::string> texts = reports_.texts();
  if (!world().root()) return;
  ASSERT_EQ(texts.size(), 1u);
  EXPECT_THAT(texts[0], HasSubstr("has been in reading the shared file for"));
  if (world().size() > 1) return;
  EXPECT_THAT(texts[0], HasSubstr("a file system or a device does not answer"));
}

TEST_F(WatchdogTest, a_collective_of_another_library_counts_who_has_come) {
  if (world().size() == 1) GTEST_SKIP() << "needs two ranks";
  const Watchdog watchdog(world(), [&](const MpiFailure& failure) { reports_.add(failure.what()); });
  world().barrier("begin");
  set_timeout_seconds(kLimit);
  if (world().rank() == 1) sleep_seconds(kLimit + 2);
  {
    const Operation scope(world(), "HDF5 create of x.h5");
    world().barrier("inside");
  }
  set_timeout_seconds(120);
  world().barrier("end");
  if (!world().root()) return;
  const std::vector<std::string> texts = reports_.texts();
  ASSERT_EQ(texts.size(), 1u);
  EXPECT_THAT(texts[0], HasSubstr("barrier 'inside'"));
  EXPECT_THAT(texts[0], HasSubstr("within HDF5 create of x.h5"));
  EXPECT_THAT(texts[0], HasSubstr("rank 1 on"));
}

TEST_F(WatchdogTest, operations_within_the_limit_are_not_reported) {
  const Watchdog watchdog(world(), [&](const MpiFailure& failure) { reports_.add(failure.what()); });
  set_timeout_seconds(kLimit);
  // Together far longer than the limit.
  for (int turn = 0; turn < 10; ++turn) {
    if (world().rank() == turn % world().size()) sleep_seconds(0.12);
    world().barrier("turn");
  }
  EXPECT_TRUE(reports_.texts().empty());
  set_timeout_seconds(0);  // for ever
  if (world().root()) sleep_seconds(1);
  world().barrier("end");
  EXPECT_TRUE(reports_.texts().empty());
}

TEST(BoardTest, time_in_which_the_process_was_stopped_does_not_count) {
  Board board;
  Place place;
  place.what = "waiting";
  const std::uint64_t id = board.enter(place);
  sleep_seconds(0.05);
  EXPECT_TRUE(board.overdue(0.04).has_value());
  board.forgive(0.05);
  EXPECT_FALSE(board.overdue(0.04).has_value());
  EXPECT_TRUE(board.is_in(id));
  board.leave(id);
  EXPECT_FALSE(board.is_in(id));
  ASSERT_TRUE(board.latest().has_value());
  EXPECT_EQ(board.latest()->first.text(), "waiting");
}

TEST(BoardTest, who_has_arrived) {
  Board board;
  const auto group = std::make_shared<Group>();
  group->name = "few";
  group->world_ranks = {4, 7};
  EXPECT_FALSE(board.has_arrived("few", Wait::collective, 1, 0, 0));
  board.add(group);
  EXPECT_FALSE(board.has_arrived("few", Wait::collective, 1, 0, 0));
  EXPECT_EQ(board.begin_collective(*group), 1u);
  EXPECT_TRUE(board.has_arrived("few", Wait::collective, 1, 0, 0));
  EXPECT_FALSE(board.has_arrived("few", Wait::collective, 2, 0, 0));
  EXPECT_EQ(board.begin_message(*group, true, 1, 9), 1u);
  EXPECT_EQ(board.begin_message(*group, true, 1, 9), 2u);
  EXPECT_TRUE(board.has_arrived("few", Wait::receive, 2, 1, 9));
  EXPECT_FALSE(board.has_arrived("few", Wait::receive, 3, 1, 9));
  EXPECT_FALSE(board.has_arrived("few", Wait::receive, 1, 1, 8));
  EXPECT_FALSE(board.has_arrived("few", Wait::send, 1, 1, 9));
}

TEST(DescribeHangTest, silent_ranks_and_transfers_that_do_not_end) {
  RankState silent;
  silent.rank = 3;
  silent.host = "n4";
  silent.concerned = true;
  const std::string text = describe_hang(0, "n1", "all-reduce", 12.3, {silent}, "");
  EXPECT_THAT(text, HasSubstr("rank 0 on n1 has been in all-reduce for 12.3 s; one rank has not come:"));
  EXPECT_THAT(text, HasSubstr("rank 3 on n4 does not answer"));
  RankState there = silent;
  there.answered = there.arrived = there.waits = true;
  there.doing = "waits in all-reduce";
  EXPECT_THAT(describe_hang(0, "n1", "all-reduce", 1, {there}, ""), HasSubstr("all ranks have come"));
  EXPECT_THAT(describe_hang(0, "n1", "all-reduce", 1, {}, "nobody can be asked"), HasSubstr("; nobody can be asked"));
  EXPECT_THAT(describe_hang(0, "n1", "all-reduce", 1, std::vector<RankState>(20, silent), ""),
              HasSubstr("and 12 ranks more"));
}

}  // namespace
}  // namespace headfold::comm
