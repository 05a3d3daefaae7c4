#pragma once
// Helpers for tests.

#include <gtest/gtest.h>
#include <headfold/comm/communicator.h>

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <string>

namespace headfold::testing_support {

/// All ranks of this test.
const comm::Communicator& world();

/// A folder for this test, shared by its ranks: emptied by rank 0 at construction, removed at destruction. Collective.
class ScratchFolder {
 public:
  ScratchFolder() {
    const auto* info = testing::UnitTest::GetInstance()->current_test_info();
    std::string name = std::string(info->test_suite_name()) + "." + info->name() + "." + std::to_string(world().size());
    for (char& c : name)
      if (c == '/') c = '_';
    // The test's own process id tells parallel ctest runs apart; rank 0's is the one that counts.
    std::string id = std::to_string(::getpid());
    world().broadcast(id);
    path_ = std::filesystem::temp_directory_path() / ("headfold-test-" + id) / name;
    if (world().root()) {
      std::filesystem::remove_all(path_);
      std::filesystem::create_directories(path_);
    }
    world().barrier("scratch folder");
  }
  ~ScratchFolder() {
    try {
      world().barrier("scratch folder");
    } catch (...) {
    }
    std::error_code code;
    if (world().root()) {
      std::filesystem::remove_all(path_, code);
      std::filesystem::remove(path_.parent_path(), code);  // unless another test of this process has its folder there
    }
  }
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

/// tests/ folder of the source tree.
inline std::filesystem::path tests_folder() {
  return HEADFOLD_TESTS_FOLDER;
}
/// Root of the source tree.
inline std::filesystem::path source_folder() {
  return tests_folder().parent_path();
}
/// tests/golden: checkpoints whose logits Hugging Face transformers computed.
inline std::filesystem::path golden_folder() {
  return tests_folder() / "golden";
}

/// Real benchmark files that are not part of the repository: $HEADFOLD_DATA or ../shared/data. Empty when absent.
inline std::filesystem::path data_folder() {
  if (const char* folder = std::getenv("HEADFOLD_DATA")) return folder;
  const auto beside = source_folder().parent_path() / "shared" / "data";
  return std::filesystem::is_directory(beside) ? beside : std::filesystem::path();
}

}  // namespace headfold::testing_support
