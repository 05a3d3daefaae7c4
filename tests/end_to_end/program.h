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

/// A command of the shell; both output streams together.
inline Outcome run_command(const std::string& command, const std::filesystem::path& log, int limit_seconds = 60) {
  const auto start = std::chrono::steady_clock::now();
  const int status =
      std::system(fmt::format("timeout -k 5 {} {} > {} 2>&1", limit_seconds, command, quoted(log.string())).c_str());
  Outcome outcome;
  outcome.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  outcome.output = read_file(log);
  outcome.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return outcome;
}

/// headfold `arguments`, as the shell takes them.
inline std::string headfold_command(const std::vector<std::string>& arguments) {
  std::string command = quoted(HEADFOLD_PROGRAM);
  for (const std::string& argument : arguments) command += " " + quoted(argument);
  return command;
}

/// headfold `arguments` on `ranks` ranks (1: without mpirun).
inline Outcome run_headfold(int ranks, const std::vector<std::string>& arguments, const std::filesystem::path& log,
                            int limit_seconds = 60) {
  const std::string launcher = ranks > 1 ? fmt::format("{} -np {} ", HEADFOLD_MPIRUN, ranks) : "";
  return run_command(launcher + headfold_command(arguments), log, limit_seconds);
}

/// The same on one rank in each of `folders`: relative paths are other files for each.
inline Outcome run_headfold_in(const std::vector<std::filesystem::path>& folders,
                               const std::vector<std::string>& arguments, const std::filesystem::path& log,
                               int limit_seconds = 60) {
  std::string command = HEADFOLD_MPIRUN;
  for (std::size_t i = 0; i < folders.size(); ++i)
    command += fmt::format("{} -np 1 -wdir {} {}", i > 0 ? " :" : "", quoted(folders[i].string()),
                           headfold_command(arguments));
  return run_command(command, log, limit_seconds);
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
