#pragma once
// Runs the built headfold program, alone or under mpirun, with a time limit.

#include <fmt/format.h>
#include <headfold/base/files.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "world.h"

namespace headfold::end_to_end {

struct Outcome {
  int code = -1;  ///< exit status; 124 when the time limit ended it
  std::string output;
  double seconds = 0;
};

/// Sets a variable of the environment for the programs that a scope starts.
class Variable {
 public:
  Variable(const char* name, const std::string& value) : name_(name) { ::setenv(name, value.c_str(), 1); }
  ~Variable() { ::unsetenv(name_); }
  Variable(const Variable&) = delete;
  Variable& operator=(const Variable&) = delete;

 private:
  const char* name_;
};

/// Ranks share memory through files of their own folder instead of /dev/shm: those of a killed rank stay behind, and
/// the tests of slurm/, which run meanwhile, would take them for theirs.
class SharedMemoryOfRanks : public testing::Environment {
 public:
  void SetUp() override {
    folder_ = std::filesystem::temp_directory_path() / fmt::format("headfold-shared-{}", ::getpid());
    std::filesystem::create_directories(folder_);
    ::setenv("OMPI_MCA_btl_vader_backing_directory", folder_.c_str(), 1);
  }
  void TearDown() override {
    std::error_code code;
    std::filesystem::remove_all(folder_, code);
  }

 private:
  std::filesystem::path folder_;
};
inline testing::Environment* const kSharedMemoryOfRanks = testing::AddGlobalTestEnvironment(new SharedMemoryOfRanks);

inline std::string quoted(const std::string& text) {
  std::string result = "'";
  for (const char c : text) result += c == '\'' ? "'\\''" : std::string(1, c);
  return result + "'";
}

/// headfold `arguments` on `ranks` ranks (1: without mpirun); both output streams together.
inline Outcome run_headfold(int ranks, const std::vector<std::string>& arguments, const std::filesystem::path& log,
                            int limit_seconds = 60) {
  std::string command = fmt::format("timeout -k 5 {} ", limit_seconds);
  if (ranks > 1) command += fmt::format("{} -np {} ", HEADFOLD_MPIRUN, ranks);
  command += quoted(HEADFOLD_PROGRAM);
  for (const std::string& argument : arguments) command += " " + quoted(argument);
  command += " > " + quoted(log.string()) + " 2>&1";
  const auto start = std::chrono::steady_clock::now();
  const int status = std::system(command.c_str());
  Outcome outcome;
  outcome.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  outcome.output = read_file(log);
  outcome.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return outcome;
}

/// Process ids of the running headfold programs that have `text` in their command line.
inline std::vector<pid_t> running_ranks(const std::string& text) {
  std::vector<pid_t> found;
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    const std::string name = entry.path().filename().string();
    if (name.find_first_not_of("0123456789") != std::string::npos) continue;
    std::ifstream file(entry.path() / "cmdline");
    const std::string command((std::istreambuf_iterator<char>(file)), {});
    std::error_code code;
    if (command.find(text) != std::string::npos &&
        std::filesystem::read_symlink(entry.path() / "exe", code) == std::filesystem::path(HEADFOLD_PROGRAM))
      found.push_back(std::stoi(name));
  }
  return found;
}

inline std::filesystem::path demo_model(const std::string& name) {
  return testing_support::source_folder() / "demo" / "models" / name;
}
inline std::filesystem::path demo_text(const std::string& name) {
  return testing_support::source_folder() / "demo" / "text" / name;
}

}  // namespace headfold::end_to_end
