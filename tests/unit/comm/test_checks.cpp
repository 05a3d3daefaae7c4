#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/comm/checks.h>

#include <gmock/gmock.h>

#include <fstream>

#include <cstdlib>

#include "world.h"

namespace headfold::comm {
namespace {

using testing::HasSubstr;
using testing_support::world;

TEST(FileIdentityTest, samples_large_files) {
  const testing_support::ScratchFolder folder;
  const fs::path file = folder / fmt::format("file{}", world().rank());
  write_file(file, "");
  fs::resize_file(file, (std::uintmax_t{65} << 20) + 5);  // sparse
  const std::string first = file_identity(file);
  EXPECT_THAT(first, HasSubstr("68157445 bytes, "));
  std::fstream(file, std::ios::in | std::ios::out | std::ios::binary).seekp(std::streamoff{40} << 20) << 'x';
  EXPECT_NE(file_identity(file), first);
}

TEST(FileIdentityTest, sees_size_head_and_tail) {
  const testing_support::ScratchFolder folder;
  const fs::path file = folder / fmt::format("file{}", world().rank());
  EXPECT_EQ(file_identity(file), "not there");
  EXPECT_EQ(file_identity(folder.path()), "not there");
  write_file(file, "");
  EXPECT_THAT(file_identity(file), HasSubstr("0 bytes, "));
  std::string content(300000, 'a');
  write_file(file, content);
  const std::string first = file_identity(file);
  EXPECT_THAT(first, HasSubstr("300000 bytes, "));
  content.front() = 'b';
  write_file(file, content);
  EXPECT_NE(file_identity(file), first);
  content.front() = 'a';
  content[150000] = 'b';
  write_file(file, content);
  EXPECT_NE(file_identity(file), first);
  content[150000] = 'a';
  content.back() = 'b';
  write_file(file, content);
  EXPECT_NE(file_identity(file), first);
}

TEST(RequireSameFilesTest, difference_is_named_with_ranks_and_hosts) {
  const testing_support::ScratchFolder folder;
  const fs::path model = folder / "model";
  world().on_root([&] {
    write_file(model / "config.json", "{}");
    write_file(model / "model.safetensors", "weights");
    write_file(folder / "plan.json", "plan");
  });
  EXPECT_NO_THROW(require_same_files(world(), {model, folder / "plan.json", folder / "absent"}));
  if (world().size() == 1) GTEST_SKIP() << "needs two ranks";
  // Every rank its own folder under one name: as node-local disks would be.
  const fs::path before = fs::current_path();
  const fs::path own = folder / fmt::format("node{}", world().rank());
  write_file(own / "model" / "config.json", world().rank() == 1 ? "{ }" : "{}");
  fs::current_path(own);
  std::string message;
  try {
    require_same_files(world(), {"model"});
  } catch (const InputError& error) {
    message = error.what();
  }
  EXPECT_THAT(message, HasSubstr("model/config.json is not the same file for all ranks"));
  EXPECT_THAT(message, HasSubstr("rank 1 on " + Environment::host() + ": 3 bytes"));
  EXPECT_THAT(message, HasSubstr(": 2 bytes"));
  world().barrier("first difference seen");
  // Weights of the same size, as two folds of one model are.
  write_file(own / "model" / "config.json", "{}");
  write_file(own / "model" / "model.safetensors", world().rank() == 1 ? "one" : "two");
  message.clear();
  try {
    require_same_files(world(), {"model"});
  } catch (const InputError& error) {
    message = error.what();
  }
  EXPECT_THAT(message, HasSubstr("model/model.safetensors is not the same file for all ranks"));
  world().barrier("second difference seen");
  // A folder that one rank does not see.
  if (world().rank() == 0) fs::remove_all(own / "model");
  message.clear();
  try {
    require_same_files(world(), {"model"});
  } catch (const InputError& error) {
    message = error.what();
  }
  EXPECT_THAT(message, HasSubstr("rank 0 on " + Environment::host() + ": not there"));
  fs::current_path(before);
  world().barrier("back");
}

}  // namespace
}  // namespace headfold::comm
