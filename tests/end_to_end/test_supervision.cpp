// What surrounds every job: start-up checks, hangs and deaths of ranks, logs and events.

#include <gmock/gmock.h>
#include <headfold/base/json.h>
#include <headfold/base/log.h>
#include <unistd.h>

#include <fstream>
#include <thread>

#include "program.h"

namespace headfold::end_to_end {
namespace {

using Arguments = std::vector<std::string>;
using testing::AllOf;
using testing::HasSubstr;

std::vector<Json> events_of(const fs::path& file, const std::string& event) {
  std::vector<Json> events;
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);)
    if (Json one = Json::parse(line); one.at("event") == event) events.push_back(std::move(one));
  return events;
}

class SupervisionTest : public testing::Test {
 protected:
  SupervisionTest() : root_(fs::temp_directory_path() / fmt::format("headfold-supervision-{}", ::getpid())) {
    fs::remove_all(root_);
    fs::create_directories(root_);
    // Little text: while rank 0 reads it, the others wait.
    std::ifstream text(demo_text("calibration.jsonl"));
    std::ofstream part(root_ / "text.jsonl");
    std::string line;
    for (int i = 0; i < 20 && std::getline(text, line); ++i) part << line << '\n';
  }
  ~SupervisionTest() override {
    std::error_code code;
    fs::remove_all(root_, code);
  }
  Outcome calibrate(const std::string& name, int ranks, const Arguments& more = {}) const {
    Arguments all = {"calibrate",
                     "--model",
                     demo_model("prose-llama"),
                     "--data",
                     root_ / "text.jsonl",
                     "--samples",
                     "4",
                     "--seq-len",
                     "32",
                     "--threads",
                     "1",
                     "--out",
                     root_ / (name + ".h5")};
    all.insert(all.end(), more.begin(), more.end());
    return run_headfold(ranks, all, root_ / "log", 60);
  }
  /// Every rank of the run that wrote, or should have written, `name` is gone.
  void expect_nobody(const std::string& name) const {
    // The launcher returns when it has told them to end.
    for (int i = 0; i < 20 && !running_ranks(root_ / (name + ".h5")).empty(); ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
    EXPECT_TRUE(running_ranks(root_ / (name + ".h5")).empty());
    EXPECT_FALSE(fs::exists(root_ / (name + ".h5")));
  }
  fs::path root_;
};

constexpr double kLimit = 2.5;

class SupervisedRanksTest : public SupervisionTest, public testing::WithParamInterface<int> {};

TEST_P(SupervisedRanksTest, logs_events_and_the_map_of_ranks) {
  const int ranks = GetParam();
  const fs::path events = root_ / "run" / "events.jsonl";
  const Arguments more = {"--log-dir", root_ / "logs", "--events", events, "--stage-name", "calibrate-0"};
  const Outcome outcome = calibrate("good", ranks, more);
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  if (ranks > 1) {
    EXPECT_THAT(outcome.output, AllOf(HasSubstr("ranks:"), HasSubstr("local rank"), HasSubstr("cores")));
  }
  for (int rank = 0; rank < ranks; ++rank)
    EXPECT_TRUE(fs::exists(root_ / "logs" / fmt::format("{}-{}.log", host_name(), rank))) << rank;
  const auto start = events_of(events, "start");
  const auto progress = events_of(events, "progress");
  const auto end = events_of(events, "end");
  ASSERT_EQ(start.size(), 1u);
  ASSERT_GE(progress.size(), 1u);
  ASSERT_EQ(end.size(), 1u);
  for (const auto* list : {&start, &progress, &end})
    for (const Json& one : *list) {
      EXPECT_EQ(one.at("stage"), "calibrate-0");
      EXPECT_EQ(one.at("job"), "calibrate");
    }
  EXPECT_EQ(start[0].at("ranks"), ranks);
  EXPECT_THAT(start[0].at("command").get<std::string>(), HasSubstr("headfold calibrate --model"));
  EXPECT_EQ(progress.back().at("unit"), "tokens");
  EXPECT_EQ(progress.back().at("step"), progress.back().at("of"));
  EXPECT_EQ(end[0].at("exit_code"), 0);
  EXPECT_EQ(end[0].at("hosts"), 1);
  EXPECT_NEAR(end[0].at("node_hours").get<double>() * 3600, end[0].at("seconds").get<double>(), 1e-6);
  ASSERT_EQ(end[0].at("per_rank").size(), static_cast<std::size_t>(ranks));
  std::int64_t largest = 0;
  for (int rank = 0; rank < ranks; ++rank) {
    const Json& one = end[0].at("per_rank").at(static_cast<std::size_t>(rank));
    EXPECT_EQ(one.at("rank"), rank);
    EXPECT_EQ(one.at("host"), host_name());
    EXPECT_GT(one.at("peak_resident_bytes"), 10 << 20);
    largest = std::max(largest, one.at("peak_resident_bytes").get<std::int64_t>());
  }
  EXPECT_EQ(end[0].at("peak_resident_bytes"), largest);
  EXPECT_GT(end[0].at("per_rank").at(0).at("written_bytes"), 1000);
  // A failure is told by the rank that failed, in the same file.
  const Outcome wrong = calibrate("good", ranks, {"--seed", "7", "--events", events.string()});
  EXPECT_EQ(wrong.code, 64) << wrong.output;
  const auto failures = events_of(events, "failure");
  ASSERT_GE(failures.size(), 1u);
  EXPECT_EQ(failures[0].at("exit_code"), 64);
  EXPECT_EQ(failures[0].at("host"), host_name());
  EXPECT_THAT(failures[0].at("error").get<std::string>(), HasSubstr("holds statistics of another model"));
  for (const Json& failure : failures) {
    EXPECT_GT(failure.at("seconds"), 0);
    EXPECT_LE(failure.at("seconds"), wrong.seconds);
    EXPECT_NEAR(failure.at("node_hours").get<double>() * 3600, failure.at("seconds").get<double>(), 1e-6);
  }
  EXPECT_THAT(wrong.output, testing::Not(HasSubstr(": Error: "))) << "an error lost its kind on its way";
}

TEST_P(SupervisedRanksTest, a_rank_that_sleeps_is_named_and_all_end_in_time) {
  const int ranks = GetParam();
  const Outcome undisturbed = calibrate("undisturbed", ranks);
  ASSERT_EQ(undisturbed.code, 0) << undisturbed.output;
  const fs::path events = root_ / "events.jsonl";
  const Arguments more = {"--comm-timeout", fmt::format("{}", kLimit), "--events", events.string()};
  // Alone, a rank can only hang in a library or a file system.
  const int late = ranks - 1;
  std::vector<std::string> points = {ranks == 1 ? "HDF5 write" : "HDF5 create"};
  if (ranks == 2) points.emplace_back("barrier 'end of calibration'");
  for (const std::string& point : points) {
    const Variable hook("HEADFOLD_TEST_HANG", fmt::format("{}:{}", late, point));
    const Outcome outcome = calibrate("hanging", ranks, more);
    EXPECT_EQ(outcome.code, 70) << outcome.output;
    EXPECT_THAT(outcome.output, HasSubstr(fmt::format("rank 0 on {} has been in {}", host_name(), point)));
    if (ranks > 1) {
      EXPECT_THAT(outcome.output, AllOf(HasSubstr("one rank has not come:"),
                                        HasSubstr(fmt::format("rank {} on {} is in no operation", late, host_name()))));
    }
    EXPECT_LT(outcome.seconds, undisturbed.seconds + kLimit + 10) << outcome.output;
    expect_nobody("hanging");
  }
  const auto failures = events_of(events, "failure");
  ASSERT_EQ(failures.size(), points.size());
  EXPECT_EQ(failures[0].at("exit_code"), 70);
  EXPECT_EQ(failures[0].at("rank"), 0);
}

INSTANTIATE_TEST_SUITE_P(Ranks, SupervisedRanksTest, testing::Values(1, 2, 4));

TEST_F(SupervisionTest, a_rank_that_does_not_answer_is_named) {
  const Variable hook("HEADFOLD_TEST_FREEZE", "1:barrier 'end of calibration'");
  const Outcome outcome = calibrate("frozen", 2, {"--comm-timeout", "2"});
  EXPECT_EQ(outcome.code, 70) << outcome.output;
  EXPECT_THAT(outcome.output, HasSubstr(fmt::format("rank 1 on {} does not answer", host_name())));
  EXPECT_LT(outcome.seconds, 20) << outcome.output;
  expect_nobody("frozen");
}

TEST_F(SupervisionTest, a_rank_that_dies_ends_all) {
  for (const char* point : {"progress calibrate:2", "HDF5 create"}) {
    const Variable hook("HEADFOLD_TEST_KILL", fmt::format("1:{}", point));
    fs::remove(root_ / "killed.h5");
    const Outcome outcome = calibrate("killed", 2);
    EXPECT_NE(outcome.code, 0) << outcome.output;
    EXPECT_NE(outcome.code, 124) << "it hung: " << outcome.output;
    EXPECT_LT(outcome.seconds, 20) << outcome.output;
    EXPECT_TRUE(running_ranks(root_ / "killed.h5").empty());
  }
}

TEST_F(SupervisionTest, tasks_of_a_slurm_step_without_pmi_are_refused) {
  const Arguments inspect = {"inspect", demo_model("prose-llama")};
  const Variable rank("SLURM_PROCID", "1"), step("SLURM_STEP_ID", "0");
  {
    const Variable tasks("SLURM_STEP_NUM_TASKS", "2");
    const Outcome outcome = run_headfold(1, inspect, root_ / "log");
    EXPECT_EQ(outcome.code, 64) << outcome.output;
    EXPECT_THAT(outcome.output, AllOf(HasSubstr("has 2 tasks"), HasSubstr("srun --mpi=pmix")));
    // mpirun inside a step brings its own.
    EXPECT_EQ(calibrate("inside", 2).code, 0);
  }
  {
    const Variable tasks("SLURM_NTASKS", "4");
    EXPECT_EQ(run_headfold(1, inspect, root_ / "log").code, 64);
    // The batch script is no task of the step.
    const Variable batch("SLURM_STEP_ID", "4294967291");
    EXPECT_EQ(run_headfold(1, inspect, root_ / "log").code, 0);
  }
  const Variable tasks("SLURM_STEP_NUM_TASKS", "1");
  EXPECT_EQ(run_headfold(1, inspect, root_ / "log").code, 0);
}

/// Two ranks with command lines of their own.
Outcome run_two(const std::string& first, const std::string& second, const fs::path& log) {
  const std::string command =
      fmt::format("timeout -k 5 60 {} -np 1 {} : -np 1 {} > {} 2>&1", HEADFOLD_MPIRUN, first, second, quoted(log));
  Outcome outcome;
  const int status = std::system(command.c_str());
  outcome.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  outcome.output = read_file(log);
  return outcome;
}

TEST_F(SupervisionTest, ranks_of_different_builds_are_refused) {
  const std::string arguments = " inspect " + quoted(demo_model("prose-llama").string());
  const std::string program = quoted(HEADFOLD_PROGRAM);
  const Outcome version = run_headfold(1, {"--version"}, root_ / "log");
  const std::size_t at = version.output.find(", ID ");
  ASSERT_NE(at, std::string::npos) << version.output;
  const std::string id = version.output.substr(at + 5, 40);
  // Another build: the same program with one digit of its build ID changed.
  std::string bytes = read_file(HEADFOLD_PROGRAM), note;
  for (std::size_t i = 0; i < id.size(); i += 2) note += static_cast<char>(std::stoi(id.substr(i, 2), nullptr, 16));
  const std::size_t place = bytes.find(note);
  ASSERT_NE(place, std::string::npos);
  bytes[place] = static_cast<char>(bytes[place] ^ 1);
  const fs::path other = root_ / "other";
  write_file(other, bytes);
  fs::permissions(other, fs::perms::owner_all);
  const Outcome different = run_two(program + arguments, quoted(other.string()) + arguments, root_ / "log");
  EXPECT_EQ(different.code, 65) << different.output;
  EXPECT_THAT(different.output, AllOf(HasSubstr("the build of headfold differs between ranks"), HasSubstr(id),
                                      HasSubstr(fmt::format("rank 1 on {} has", host_name()))));
  const Outcome same = run_two(program + arguments, program + arguments, root_ / "log");
  EXPECT_EQ(same.code, 0) << same.output;
  const Outcome asked = run_two(program + arguments, program + arguments + " --json", root_ / "log");
  EXPECT_EQ(asked.code, 65) << asked.output;
  EXPECT_THAT(asked.output, HasSubstr("the command line differs between ranks"));
}

TEST_F(SupervisionTest, ranks_that_see_different_files_are_refused) {
  // A launcher that gives rank 1 another folder to stand in, as a node with a disk of its own would.
  for (const char* node : {"a", "b"}) {
    fs::create_directories(root_ / node);
    fs::copy(demo_model("prose-llama"), root_ / node / "model");
  }
  std::ofstream(root_ / "b" / "model" / "config.json", std::ios::app) << "\n";
  const std::string there = fmt::format(
      "sh -c {}", quoted(fmt::format(
                      "cd {}/$OMPI_COMM_WORLD_RANK && exec {} verify --model model --original model --data x --dry-run",
                      root_.string(), HEADFOLD_PROGRAM)));
  fs::rename(root_ / "a", root_ / "0");
  fs::rename(root_ / "b", root_ / "1");
  const Outcome outcome = run_two(there, there, root_ / "log");
  EXPECT_EQ(outcome.code, 65) << outcome.output;
  EXPECT_THAT(outcome.output, AllOf(HasSubstr("model/config.json is not the same file for all ranks"),
                                    HasSubstr(fmt::format("rank 1 on {}", host_name()))));
}

}  // namespace
}  // namespace headfold::end_to_end
