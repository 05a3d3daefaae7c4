#include <headfold/base/events.h>
#include <headfold/base/files.h>
#include <headfold/base/log.h>
#include <headfold/base/progress.h>
#include <headfold/base/test_point.h>

#include <gmock/gmock.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <fstream>
#include <thread>

#include "world.h"

namespace headfold {
namespace {

using testing::HasSubstr;

std::vector<Json> lines_of(const fs::path& file) {
  std::vector<Json> lines;
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) lines.push_back(Json::parse(line, nullptr, false));
  return lines;
}

class EventsTest : public testing::Test {
 protected:
  void TearDown() override { set_event_stream({}); }
  const testing_support::ScratchFolder folder_;
  const fs::path file_ = folder_ / "deep" / "events.jsonl";
};

TEST_F(EventsTest, lines_say_who_what_and_when) {
  emit_event("start");  // nowhere yet
  set_event_stream({file_, "half", "convert", true});
  emit_event("start", {{"ranks", 2}});
  Progress progress("fold", "layer", 3, true);
  for (int step = 0; step < 3; ++step) progress.advance(1);
  emit_event("end", {{"resident_bytes", 5}});
  const std::vector<Json> lines = lines_of(file_);
  ASSERT_EQ(lines.size(), 4u);
  for (const Json& line : lines) {
    EXPECT_EQ(line.at("stage"), "half");
    EXPECT_EQ(line.at("job"), "convert");
    EXPECT_NEAR(line.at("time").get<double>(), static_cast<double>(std::time(nullptr)), 5);
  }
  EXPECT_EQ(lines[0].at("event"), "start");
  EXPECT_EQ(lines[0].at("ranks"), 2);
  EXPECT_GT(lines[0].at("resident_bytes").get<std::int64_t>(), 1 << 20);
  // The first step and the last; in between only every few seconds.
  EXPECT_EQ(lines[1].at("event"), "progress");
  EXPECT_EQ(lines[1].at("step"), 1);
  EXPECT_EQ(lines[2].at("step"), 3);
  EXPECT_EQ(lines[2].at("of"), 3);
  EXPECT_EQ(lines[2].at("unit"), "layer");
  EXPECT_EQ(lines[2].at("what"), "fold");
  EXPECT_GT(lines[2].at("rate").get<double>(), 0);
  EXPECT_EQ(lines[2].at("eta_s"), 0);
  EXPECT_EQ(lines[3].at("resident_bytes"), 5);
  EXPECT_EQ(latest_progress(), "fold: 3/3 layer");
  // What an earlier run did counts, at no rate.
  Progress resumed("fold", "layer", 1e9, true);
  resumed.skip(9e8);
  resumed.advance(1);
  const Json last = lines_of(file_).back();
  EXPECT_EQ(last.at("step"), 900000001);
  EXPECT_LT(last.at("rate").get<double>(), 1e8);
}

TEST_F(EventsTest, ranks_that_do_not_speak_only_fail) {
  set_event_stream({file_, "s", "j", true});
  set_event_stream({file_, "s", "j", false});
  emit_event("start");
  emit_event("failure", {{"rank", 3}}, true);
  ASSERT_EQ(lines_of(file_).size(), 1u);
  EXPECT_EQ(lines_of(file_)[0].at("rank"), 3);
}

TEST_F(EventsTest, a_torn_line_costs_only_itself) {
  set_event_stream({file_, "s", "j", true});
  emit_event("one");
  std::ofstream(file_, std::ios::app) << R"({"time": 1, "sta)";
  emit_event("two");
  emit_event("three");
  const std::vector<Json> lines = lines_of(file_);
  ASSERT_EQ(lines.size(), 4u);
  EXPECT_TRUE(lines[1].is_discarded());
  EXPECT_EQ(lines[2].at("event"), "two");
  EXPECT_EQ(lines[3].at("event"), "three");
}

TEST_F(EventsTest, many_threads_do_not_mix_lines) {
  set_event_stream({file_, "s", "j", true});
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([] {
      for (int i = 0; i < 25; ++i) emit_event("x", {{"text", std::string(3000, 'y')}});
    });
  for (std::thread& thread : threads) thread.join();
  const std::vector<Json> lines = lines_of(file_);
  ASSERT_EQ(lines.size(), 100u);
  for (const Json& line : lines) EXPECT_FALSE(line.is_discarded());
}

TEST_F(EventsTest, what_cannot_be_written_does_not_fail_the_job) {
  set_event_stream({file_, "s", "j", true});
  fs::create_directory(file_);  // a folder in the file's place
  EXPECT_NO_THROW(emit_event("start"));
  write_file(folder_ / "plain", "");
  EXPECT_THROW(set_event_stream({folder_ / "plain" / "events.jsonl", "s", "j", true}), IoError);
}

TEST(LogFilesTest, every_rank_has_one_named_after_its_host) {
  const testing_support::ScratchFolder folder;
  ::setenv("SLURMD_NODENAME", "n7", 1);
  EXPECT_EQ(host_name(), "n7");
  start_logging(5, 8, folder.path());
  spdlog::info("a line of rank 5");
  start_logging(0, 1);
  ::unsetenv("SLURMD_NODENAME");
  EXPECT_THAT(read_file(folder / "n7-5.log"), HasSubstr("[5/8] info a line of rank 5"));
  EXPECT_NE(host_name(), "n7");
  write_file(folder / "file", "");
  EXPECT_THROW(start_logging(0, 1, folder / "file" / "logs"), IoError);
}

TEST(MovedBytesTest, what_is_written_and_read_counts) {
  const testing_support::ScratchFolder folder;
  if (moved_bytes().read == 0) GTEST_SKIP() << "/proc/self/io cannot be read here";
  const MovedBytes before = moved_bytes();
  write_file(folder / "file", std::string(1 << 20, 'x'));
  EXPECT_EQ(read_file(folder / "file").size(), 1u << 20);
  const MovedBytes after = moved_bytes();
  EXPECT_GE(after.written - before.written, 1u << 20);
  EXPECT_GE(after.read - before.read, 1u << 20);
}

/// How a child process ends that comes to the point "reduce" twice, with one hook set.
int end_of_child(const char* variable, const char* value, int rank) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::setenv(variable, value, 1);
    try {
      set_test_points(rank);
    } catch (const UsageError&) {
      std::_Exit(64);
    }
    test_point("all-reduce");
    test_point("something else");
    test_point("all-reduce");
    std::_Exit(has_test_points() ? 2 : 3);
  }
  int status = 0;
  ::waitpid(child, &status, WUNTRACED);
  if (WIFSTOPPED(status)) {
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
    return -SIGSTOP;
  }
  return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

TEST(TestPointTest, the_named_rank_dies_at_the_named_visit) {
  EXPECT_EQ(end_of_child("HEADFOLD_TEST_KILL", "1:reduce", 1), -SIGKILL);
  EXPECT_EQ(end_of_child("HEADFOLD_TEST_KILL", "1:reduce:2", 1), -SIGKILL);
  EXPECT_EQ(end_of_child("HEADFOLD_TEST_KILL", "1:reduce:3", 1), 2);
  EXPECT_EQ(end_of_child("HEADFOLD_TEST_KILL", "1:reduce", 0), 3);
  EXPECT_EQ(end_of_child("HEADFOLD_TEST_KILL", "1:barrier", 1), 2);
  EXPECT_EQ(end_of_child("HEADFOLD_TEST_FREEZE", "0:reduce:2", 0), -SIGSTOP);
  for (const char* wrong : {"reduce", "x:reduce", "1:", "-1:reduce", "1:reduce:0"})
    EXPECT_EQ(end_of_child("HEADFOLD_TEST_HANG", wrong, 0), 64) << wrong;
}

}  // namespace
}  // namespace headfold
