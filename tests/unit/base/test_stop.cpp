#include <headfold/base/files.h>
#include <headfold/base/stop.h>

#include <csignal>

#include "world.h"

namespace headfold {
namespace {

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
  std::raise(SIGUSR1);
  EXPECT_TRUE(stop_requested());
  EXPECT_TRUE(stop_requested(folder.path()));
  std::raise(SIGTERM);
  EXPECT_TRUE(stop_requested());
}

}  // namespace
}  // namespace headfold
