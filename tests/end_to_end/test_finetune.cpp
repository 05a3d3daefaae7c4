// headfold finetune as a user runs it: training, resuming, stopping by signal and by file, a rank that is killed, and
// input that is wrong.

#include <gmock/gmock.h>
#include <headfold/base/json.h>
#include <signal.h>
#include <sys/types.h>
#include <unistd.h>

#include <fstream>
#include <thread>

#include "program.h"

namespace headfold::end_to_end {
namespace {

using Arguments = std::vector<std::string>;
using testing::HasSubstr;

class FinetuneTest : public testing::Test {
 protected:
  FinetuneTest() : root_(fs::temp_directory_path() / fmt::format("headfold-finetune-{}", ::getpid())) {
    fs::remove_all(root_);
    fs::create_directories(root_);
    // A folded model to heal, the folds in it poor on purpose.
    const Outcome folded = run({"convert", "--model", demo_model("prose-llama"), "--kv-heads", "4", "--keys",
                                "meanpool", "--values", "meanpool", "--out", root_ / "folded"});
    EXPECT_EQ(folded.code, 0) << folded.output;
    std::ifstream text(demo_text("calibration.jsonl"));
    std::ofstream part(root_ / "train.jsonl");
    std::string line;
    for (int i = 0; i < 40 && std::getline(text, line); ++i) part << line << '\n';
    std::ofstream held(root_ / "validation.jsonl");
    for (int i = 0; i < 4 && std::getline(text, line); ++i) held << line << '\n';
  }
  ~FinetuneTest() override {
    std::error_code code;
    fs::remove_all(root_, code);
  }
  Outcome run(const Arguments& arguments, int ranks = 1) const {
    return run_headfold(ranks, arguments, root_ / "log", 120);
  }
  Arguments training(const std::string& out, const Arguments& more) const {
    Arguments all = {
        "finetune", "--model", root_ / "folded", "--data", root_ / "train.jsonl", "--seq-len", "32",    "--batch",  "4",
        "--rank",   "4",       "--threads",      "1",      "--learning-rate",     "0.003",     "--out", root_ / out};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }
  /// Process ids of the ranks that train into `out`.
  static std::vector<pid_t> ranks_of(const fs::path& out) {
    std::vector<pid_t> found;
    for (const auto& entry : fs::directory_iterator("/proc")) {
      const std::string name = entry.path().filename().string();
      if (name.find_first_not_of("0123456789") != std::string::npos) continue;
      std::ifstream file(entry.path() / "cmdline");
      const std::string command((std::istreambuf_iterator<char>(file)), {});
      std::error_code code;
      if (command.find(out.string()) != std::string::npos && command.find("finetune") != std::string::npos &&
          fs::read_symlink(entry.path() / "exe", code) == fs::path(HEADFOLD_PROGRAM))
        found.push_back(std::stoi(name));
    }
    return found;
  }
  /// Runs a long training on two ranks and sends `signal` to one of them once it has trained some steps.
  Outcome disturbed(const std::string& out, int signal, const Arguments& more) const {
    Outcome outcome;
    std::thread job([&] { outcome = run(training(out, more), 2); });
    const fs::path lines = root_ / out / "train.jsonl";
    const auto begun = fs::file_time_type::clock::now();
    bool sent = false;
    for (int i = 0; i < 900 && !sent; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
      std::error_code code;
      if (!fs::exists(lines, code) || fs::file_size(lines, code) < 2000 || fs::last_write_time(lines, code) < begun)
        continue;
      const std::vector<pid_t> ranks = ranks_of(root_ / out);
      if (!ranks.empty()) sent = ::kill(ranks.back(), signal) == 0;
    }
    job.join();
    EXPECT_TRUE(sent) << outcome.output;
    return outcome;
  }
  fs::path root_;
};

TEST_F(FinetuneTest, trains_merges_evaluates_and_knows_when_it_is_done) {
  const Arguments command = training("healed", {"--steps", "12", "--teacher", demo_model("prose-llama"), "--validation",
                                                root_ / "validation.jsonl", "--validate-every", "6", "--merge"});
  const Outcome plan = run(training("healed", {"--steps", "12", "--dry-run"}));
  EXPECT_EQ(plan.code, 0) << plan.output;
  EXPECT_THAT(plan.output, testing::AllOf(HasSubstr("activations"), HasSubstr("optimizer"), HasSubstr("total")));
  EXPECT_FALSE(fs::exists(root_ / "healed"));
  const Outcome first = run(command, 2);
  ASSERT_EQ(first.code, 0) << first.output;
  const Json record = read_json(root_ / "healed" / "finetune.json");
  EXPECT_TRUE(record["finished"].get<bool>());
  const Json& results = record["results"];
  EXPECT_LT(results["validation_perplexity_best"].get<double>(), results["validation_perplexity_before"].get<double>());
  EXPECT_LT(results["validation_kl_last"].get<double>(), results["validation_kl_before"].get<double>());
  EXPECT_TRUE(fs::exists(root_ / "healed" / "adapter" / "adapter_model.safetensors"));
  const Outcome again = run(command);
  EXPECT_EQ(again.code, 0) << again.output;
  EXPECT_THAT(again.output, HasSubstr("nothing to do"));
  // The merged model is what the trainer measured.
  const Outcome evaluated =
      run({"evaluate", "--model", root_ / "healed" / "merged", "--data", root_ / "validation.jsonl", "--seq-len", "32",
           "--limit", "128", "--dtype", "float32", "--out", root_ / "results"});
  ASSERT_EQ(evaluated.code, 0) << evaluated.output;
  for (const auto& entry : fs::recursive_directory_iterator(root_ / "results")) {
    if (!entry.path().filename().string().starts_with("results_")) continue;
    const Json measured = read_json(entry.path())["results"];
    for (const auto& [task, metrics] : measured.items())
      EXPECT_NEAR(metrics["perplexity,none"].get<double>() / results["validation_perplexity_best"].get<double>(), 1,
                  0.01)
          << metrics;
  }
  const Outcome report = run({"report", "--run", root_.string(), "--out", root_ / "report"});
  EXPECT_EQ(report.code, 0) << report.output;
  EXPECT_THAT(read_file(root_ / "report" / "report.md"), HasSubstr("Healing"));
  // Another training does not get into this folder.
  const Outcome other = run(training("healed", {"--steps", "13"}), 2);
  EXPECT_EQ(other.code, 64) << other.output;
  EXPECT_THAT(other.output, HasSubstr("holds another training"));
}

TEST_F(FinetuneTest, a_signal_to_one_rank_stops_all_and_the_same_command_resumes) {
  const Outcome whole = run(training("whole", {"--steps", "30"}), 2);
  ASSERT_EQ(whole.code, 0) << whole.output;
  const Arguments more = {"--steps", "3000", "--checkpoint-every", "0"};
  const Outcome stopped = disturbed("stopped", SIGUSR1, more);
  EXPECT_EQ(stopped.code, 75) << stopped.output;
  EXPECT_THAT(stopped.output, HasSubstr("run the same command again to resume"));
  // A stop file ends the resumed run at once, and keeps later ones from beginning.
  write_file(root_ / "stopped" / "STOP", "");
  const Outcome refused = run(training("stopped", more), 2);
  EXPECT_EQ(refused.code, 75) << refused.output;
  EXPECT_THAT(refused.output, HasSubstr("STOP exists"));
  fs::remove(root_ / "stopped" / "STOP");
  const Outcome resumed = disturbed("stopped", SIGTERM, more);
  EXPECT_EQ(resumed.code, 75) << resumed.output;
  EXPECT_THAT(resumed.output, HasSubstr("resuming after step"));
}

TEST_F(FinetuneTest, a_killed_rank_ends_the_job_and_the_same_command_resumes) {
  const Arguments more = {"--steps", "3000", "--checkpoint-every", "2", "--timeout", "50"};
  const Outcome killed = disturbed("killed", SIGKILL, more);
  EXPECT_NE(killed.code, 0);
  EXPECT_NE(killed.code, 124) << "it hung: " << killed.output;
  EXPECT_LT(killed.seconds, 110);
  EXPECT_THAT(killed.output,
              testing::AnyOf(HasSubstr("signal 9"), HasSubstr("Killed"), HasSubstr("another rank died")));
  EXPECT_TRUE(ranks_of(root_ / "killed").empty());
  const Outcome resumed = disturbed("killed", SIGUSR1, more);
  EXPECT_EQ(resumed.code, 75) << resumed.output;
  EXPECT_THAT(resumed.output, HasSubstr("resuming after step"));
}

TEST_F(FinetuneTest, wrong_input_is_named_and_leaves_nothing_behind) {
  write_file(root_ / "empty.jsonl", "\n");
  write_file(root_ / "short.jsonl", "{\"text\": \"Too short.\"}\n");
  write_file(root_ / "rows.jsonl", "{\"prompt\": \"" + std::string(900, 'x') + "\", \"response\": \"y\"}\n");
  write_file(root_ / "broken.jsonl", "{\"prompt\": \"a\", \"response\": \"b\"}\n{\"prompt\": \"cut o");
  struct Case {
    Arguments changed;
    int code;
    std::string mentions;
    int ranks = 1;
  };
  const auto text = [&](const char* name) { return (root_ / name).string(); };
  const std::vector<Case> cases = {
      {{"--model", text("absent")}, 74, "absent", 2},
      {{"--data", text("empty.jsonl")}, 65, "no text", 2},
      {{"--data", text("short.jsonl")}, 65, "short.jsonl"},
      {{"--data", text("rows.jsonl")}, 65, "rows.jsonl:1"},
      {{"--data", text("broken.jsonl")}, 65, "broken.jsonl:2"},
      {{"--teacher", demo_model("prose-bloom")}, 65, "tokenizer", 2},
      {{"--teacher", text("absent")}, 74, "absent"},
      {{"--cache-teacher", text("absent.safetensors")}, 74, "absent.safetensors", 2},
      {{"--cache-teacher", demo_model("prose-llama") / "model.safetensors"}, 65, "its format"},
      {{"--distill", "0.5"}, 64, "--teacher"},
      {{"--targets", "q,nonsense"}, 65, "nonsense"},
      {{"--rank", "0"}, 64, "--rank"},
      {{"--batch", "0"}, 64, "--batch"},
      {{"--learning-rate", "0"}, 64, "--learning-rate"},
      {{"--schedule", "square"}, 64, "square"},
      {{"--patience", "2"}, 64, "--validation"},
      {{"--out", root_.string()}, 64, "not written by headfold finetune", 2},
      {{"--learning-rate", "1e25", "--clip", "0", "--warm-up", "0", "--steps", "20"}, 70, "step ", 2},
  };
  for (const Case& one : cases) {
    Arguments arguments = training("wrong", {});
    for (std::size_t i = 0; i < one.changed.size(); ++i) {
      if (!one.changed[i].starts_with("--")) continue;
      const bool bare = i + 1 == one.changed.size() || one.changed[i + 1].starts_with("--");
      const auto found = std::find(arguments.begin(), arguments.end(), one.changed[i]);
      if (found != arguments.end()) {
        *(found + 1) = one.changed[i + 1];
      } else {
        arguments.push_back(one.changed[i]);
        if (!bare) arguments.push_back(one.changed[i + 1]);
      }
    }
    const Outcome outcome = run(arguments, one.ranks);
    EXPECT_EQ(outcome.code, one.code) << testing::PrintToString(one.changed) << outcome.output;
    EXPECT_THAT(outcome.output, HasSubstr(one.mentions));
    EXPECT_FALSE(fs::exists(root_ / "wrong" / "adapter"));
    if (one.code != 70) {
      EXPECT_FALSE(fs::exists(root_ / "wrong")) << testing::PrintToString(one.changed);
    }
  }
}

}  // namespace
}  // namespace headfold::end_to_end
