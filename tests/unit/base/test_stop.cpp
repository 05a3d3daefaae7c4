#include <headfold/base/files.h>
#include <headfold/base/stop.h>

#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <functional>
#include <thread>

#include "world.h"

namespace headfold {
namespace {

bool soon(const std::function<bool()>& condition) {
  for (int i = 0; i < 20000; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return false;
}

TEST(Stop, signals_and_the_file_are_seen_and_do_not_end_the_process) {
  const testing_support::ScratchFolder folder;
  listen_for_stop();
  EXPECT_FALSE(stop_requested());
  EXPECT_FALSE(stop_requested(folder.path()));
  EXPECT_FALSE(stop_requested(folder / "absent"));
  write_file(folder / "STOP", "");
  EXPECT_TRUE(stop_requested(folder.path()));
  EXPECT_FALSE(stop_requested());
  watch_stop_file(folder / "elsewhere");
  EXPECT_FALSE(stop_requested());
  watch_stop_file(stop_file_beside(folder / "result"));
  EXPECT_TRUE(stop_requested());
  fs::remove(folder / "STOP");
  EXPECT_TRUE(stop_requested()) << "once said, it stands";
  forget_stop_files();
  EXPECT_FALSE(stop_requested());
  EXPECT_EQ(stop_file_beside(folder / "result/"), folder / "STOP");
  ASSERT_EQ(::kill(::getpid(), SIGUSR1), 0);
  EXPECT_TRUE(soon([] { return stop_requested(); }));
  EXPECT_TRUE(stop_requested(folder.path()));
  ASSERT_EQ(::kill(::getpid(), SIGTERM), 0);
  listen_for_stop();  // again: nothing new
  EXPECT_TRUE(stop_requested());
}

TEST(Stop, signals_do_not_come_to_threads_that_compute) {
  listen_for_stop();
  const auto blocked = [](int signal) {
    sigset_t set;
    return pthread_sigmask(SIG_BLOCK, nullptr, &set) == 0 && sigismember(&set, signal) == 1;
  };
  EXPECT_TRUE(blocked(SIGUSR1) && blocked(SIGTERM));
  EXPECT_FALSE(blocked(SIGINT));
  bool inherited = false;
  std::thread([&] { inherited = blocked(SIGUSR1) && blocked(SIGTERM); }).join();
  EXPECT_TRUE(inherited);
}

TEST(Stop, processes_started_from_here_can_be_ended_as_ever) {
  listen_for_stop();
  int ready[2] = {-1, -1};
  ASSERT_EQ(::pipe(ready), 0);
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    std::signal(SIGTERM, SIG_DFL);  // as after exec
    if (::write(ready[1], "x", 1) != 1) ::_exit(1);
    while (true) ::pause();
  }
  char byte = 0;
  EXPECT_EQ(::read(ready[0], &byte, 1), 1);
  ::close(ready[0]);
  ::close(ready[1]);
  ASSERT_EQ(::kill(child, SIGTERM), 0);
  int status = 0;
  const bool ended = soon([&] { return ::waitpid(child, &status, WNOHANG) == child; });
  if (!ended) ::kill(child, SIGKILL);
  ASSERT_TRUE(ended);
  EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM) << status;
}

}  // namespace
}  // namespace headfold
