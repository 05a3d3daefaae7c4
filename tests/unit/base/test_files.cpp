#include <sys/stat.h>

#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/base/hash.h>

#include "world.h"

namespace headfold {
namespace {

using testing_support::ScratchFolder;

TEST(FilesTest, write_replaces_whole_content_and_leaves_no_temporary) {
  const ScratchFolder folder;
  write_file(folder / "a/b.txt", "first, longer content");
  write_file(folder / "a/b.txt", "second");
  EXPECT_EQ(read_file(folder / "a/b.txt"), "second");
  EXPECT_EQ(std::distance(fs::directory_iterator(folder / "a"), fs::directory_iterator()), 1);
}

TEST(FilesTest, missing_file_and_folder_are_io_errors_that_name_them) {
  const ScratchFolder folder;
  try {
    read_file(folder / "absent");
    FAIL() << "no error";
  } catch (const IoError& error) {
    EXPECT_NE(std::string(error.what()).find("absent"), std::string::npos);
    EXPECT_EQ(error.code(), ExitCode::io);
  }
  EXPECT_THROW(read_file(folder.path()), IoError);
  EXPECT_THROW(MappedFile(folder / "absent"), IoError);
  write_file(folder / "plain", "x");
  EXPECT_THROW(write_file(folder / "plain/below", "x"), IoError);
}

TEST(FilesTest, a_pipe_is_refused_without_waiting_for_a_writer) {
  const ScratchFolder folder;
  const fs::path pipe = folder / "pipe";
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  EXPECT_THROW(read_file(pipe), IoError);
  EXPECT_THROW(MappedFile{pipe}, IoError);
}

TEST(FilesTest, read_refuses_more_than_allowed) {
  const ScratchFolder folder;
  write_file(folder / "big", std::string(100, 'x'));
  EXPECT_THROW(read_file(folder / "big", 99), InputError);
  EXPECT_EQ(read_file(folder / "big", 100).size(), 100U);
}

TEST(FilesTest, map_sees_content_and_outlives_its_object) {
  const ScratchFolder folder;
  write_file(folder / "data", "hello");
  std::shared_ptr<const void> owner;
  const std::byte* data = nullptr;
  {
    const MappedFile map(folder / "data");
    ASSERT_EQ(map.size(), 5U);
    data = map.bytes().data();
    owner = map.owner();
  }
  EXPECT_EQ(std::to_integer<char>(data[4]), 'o');
  write_file(folder / "empty", "");
  EXPECT_EQ(MappedFile(folder / "empty").size(), 0U);
}

TEST(HashTest, sha256_of_known_text) {
  EXPECT_EQ(sha256_hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  Sha256 parts;
  parts.update("a");
  parts.update("bc");
  EXPECT_EQ(parts.hex(), sha256_hex("abc"));
}

}  // namespace
}  // namespace headfold
