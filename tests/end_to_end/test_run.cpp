// headfold run: one configuration file, interrupted and not, on one rank and on several.

#include <gmock/gmock.h>
#include <headfold/base/json.h>

#include "program.h"

namespace headfold::end_to_end {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing_support::ScratchFolder;

class RunTest : public testing::Test {
 protected:
  void SetUp() override { configure("run"); }
  /// Writes NAME.ini, whose results go to the folder NAME.
  void configure(const std::string& name, const std::string& kv_heads = "4") const {
    write_file(scratch_ / (name + ".ini"),
               fmt::format(R"(# small
[run]
folder = {}
model = {}
threads = 1
[calibrate]
data = {}
samples = 12
seq-len = 32
dtype = float32
save-every = 2
[convert half]
kv-heads = {}
[finetune healed]
of = half
data = {}
steps = 4
batch = 4
seq-len = 32
dtype = float32
targets = q,v
checkpoint-every = 1
[evaluate text]
models = original, half, healed
data = {}
seq-len = 32
limit = 12
micro-batch = 2
dtype = float32
[evaluate questions]
models = half
task-file = {}
tasks = glosses
limit = 2
dtype = float32
[report]
[resources]
time = 1:00:00
nodes = 1
[resources evaluate]
nodes = 2
)",
                           name, demo_model("prose-llama").string(), text(), kv_heads, text(),
                           demo_text("heldout.jsonl").string(),
                           (testing_support::source_folder() / "demo/tasks/glosses.json").string()));
  }
  /// A part of the demo's text: tokenising all of it would take most of the time.
  std::string text() const {
    const fs::path part = scratch_ / "text.jsonl";
    if (!fs::exists(part)) {
      const std::string all = read_file(demo_text("calibration.jsonl"));
      std::size_t end = 0;
      for (int line = 0; line < 30; ++line) end = all.find('\n', end) + 1;
      write_file(part, all.substr(0, end));
    }
    return part.string();
  }
  Outcome run(int ranks, const std::string& name = "run", std::vector<std::string> more = {}) const {
    std::vector<std::string> arguments = {"run", "--config", scratch_ / (name + ".ini")};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return run_headfold(ranks, arguments, scratch_ / "log.txt", 120);
  }
  Json listed(const std::string& name = "run") const {
    const Outcome outcome = run(1, name, {"--list", "--json"});
    EXPECT_EQ(outcome.code, 0) << outcome.output;
    return Json::parse(outcome.output.substr(outcome.output.find('{')));
  }
  static Json results_below(const fs::path& folder) {
    std::vector<fs::path> found;
    for (const auto& entry : fs::recursive_directory_iterator(folder))
      if (entry.path().filename().string().starts_with("results_")) found.push_back(entry.path());
    EXPECT_EQ(found.size(), 1U) << folder;
    return found.empty() ? Json() : read_json(found.front());
  }
  Json scores(const std::string& name, const std::string& element) const {
    return results_below(scratch_ / name / "evaluation" / element)["results"];
  }
  std::string bytes(const std::string& name, const std::string& file) const {
    return read_file(scratch_ / name / file);
  }
  ScratchFolder scratch_;
};

class RanksOfRunTest : public RunTest, public testing::WithParamInterface<int> {};
INSTANTIATE_TEST_SUITE_P(Run, RanksOfRunTest, testing::Values(1, 2, 4), testing::PrintToStringParamName());

TEST_P(RanksOfRunTest, all_stages_then_none) {
  const Outcome first = run(GetParam());
  ASSERT_EQ(first.code, 0) << first.output;
  EXPECT_THAT(first.output, HasSubstr("8 of 8 elements were run"));
  const fs::path folder = scratch_ / "run";
  for (const char* file : {"calibration.h5", "half/model.safetensors", "healed/merged/config.json", "report/index.html",
                           "finished/evaluate-3", "events.jsonl"})
    EXPECT_TRUE(fs::exists(folder / file)) << file;
  EXPECT_FALSE(fs::exists(folder / "calibration.h5.partial"));
  std::size_t logs = 0;
  for (const auto& entry : fs::directory_iterator(folder / "logs" / "convert-0"))
    logs += entry.is_regular_file() ? 1 : 0;
  EXPECT_EQ(logs, static_cast<std::size_t>(GetParam()));
  EXPECT_THAT(bytes("run", "events.jsonl"),
              AllOf(HasSubstr(R"("stage":"calibrate-0")"), HasSubstr(R"("stage":"report-0")")));
  // The same numbers on any number of ranks: those of the stages run by hand on one.
  const double perplexity = scores("run", "text/half")["ppl_blocks@32"]["perplexity,none"];
  const double original = scores("run", "text/half")["ppl_blocks@32"]["reference_perplexity,none"];
  EXPECT_NEAR(scores("run", "text/original")["ppl_blocks@32"]["perplexity,none"].get<double>() / original, 1, 1e-6);
  EXPECT_NE(perplexity, original);
  EXPECT_NEAR(perplexity / original, 1, 0.2);
  for (const Json& stage : listed()["stages"])
    for (const Json& element : stage["elements"]) EXPECT_TRUE(element["finished"].get<bool>()) << element["name"];
  const Outcome second = run(GetParam());
  EXPECT_EQ(second.code, 0) << second.output;
  EXPECT_THAT(second.output, HasSubstr("0 of 8 elements were run"));
  EXPECT_LT(second.seconds, first.seconds);
}

TEST_F(RunTest, its_own_operations_end_within_the_limit_of_the_file) {
  const fs::path file = scratch_ / "run.ini";
  std::string text = read_file(file);
  text.replace(text.find("threads = 1"), 11, "threads = 1\ncomm-timeout = 2");
  write_file(file, text);
  const Variable hook("HEADFOLD_TEST_HANG", "1:all-reduce:1");
  const Outcome outcome = run(2, "run", {"--stage", "calibrate"});
  EXPECT_EQ(outcome.code, 70) << outcome.output;
  EXPECT_THAT(outcome.output, HasSubstr("rank 1 on "));
  EXPECT_LT(outcome.seconds, 2 + 10 + 5) << outcome.output;
}

TEST_F(RunTest, list_says_what_a_batch_system_needs) {
  const Json list = listed();
  EXPECT_EQ(list["folder"], (scratch_ / "run").string());
  std::vector<std::string> stages;
  for (const Json& stage : list["stages"]) stages.push_back(stage["stage"]);
  EXPECT_THAT(stages, testing::ElementsAre("calibrate", "convert", "finetune", "evaluate", "report"));
  EXPECT_EQ(list["stages"][0]["after"], Json::array());
  EXPECT_EQ(list["stages"][3]["after"], Json::array({"finetune"}));
  EXPECT_EQ(list["stages"][0]["resources"], (Json{{"nodes", "1"}, {"time", "1:00:00"}}));
  EXPECT_EQ(list["stages"][3]["resources"]["nodes"], "2");
  const Json& elements = list["stages"][3]["elements"];
  ASSERT_EQ(elements.size(), 4U);
  EXPECT_EQ(elements[1]["name"], "text/half");
  EXPECT_FALSE(elements[1]["finished"].get<bool>());
  const auto command = elements[1]["command"].get<std::vector<std::string>>();
  EXPECT_THAT(command, testing::IsSupersetOf({(scratch_ / "run" / "half").string(), std::string("--reference"),
                                              demo_model("prose-llama").string()}));
  EXPECT_EQ(command[1], "evaluate");
  // A dry run reads everything that is there and writes nothing.
  const Outcome dry = run(1, "run", {"--dry-run"});
  EXPECT_EQ(dry.code, 0) << dry.output;
  EXPECT_THAT(dry.output,
              AllOf(HasSubstr("waits for calibrate-0"), HasSubstr("dry run: nothing was loaded or written")));
  EXPECT_FALSE(fs::exists(scratch_ / "run"));
  // A stage alone does not make up what it needs.
  const Outcome early = run(1, "run", {"--stage", "evaluate", "--element", "1"});
  EXPECT_EQ(early.code, 65) << early.output;
  EXPECT_THAT(early.output, HasSubstr("convert-0"));
  EXPECT_EQ(run(1, "run", {"--stage", "evaluate", "--element", "4"}).code, 64);
  EXPECT_EQ(run(1, "run", {"--stage", "fold"}).code, 64);
}

TEST_F(RunTest, refuses_what_the_file_gets_wrong) {
  const std::string good = read_file(scratch_ / "run.ini");
  const auto refused = [&](const std::string& from, const std::string& to, const std::vector<std::string>& said) {
    std::string text = good;
    const std::size_t at = text.find(from);
    ASSERT_NE(at, std::string::npos) << from;
    write_file(scratch_ / "wrong.ini", text.replace(at, from.size(), to));
    const Outcome outcome = run(1, "wrong", {"--list"});
    EXPECT_EQ(outcome.code, 65) << to << outcome.output;
    for (const std::string& part : said) EXPECT_THAT(outcome.output, HasSubstr(part)) << to;
  };
  refused("[convert half]", "[covert half]", {"wrong.ini:12", "[covert]", "did you mean convert"});
  refused("samples = 12", "sample = 12", {"wrong.ini:8", "no key sample", "samples"});
  refused("samples = 12", "samples = many", {"wrong.ini:8", "samples = many"});
  refused("samples = 12", "model = elsewhere", {"[run] says model"});
  refused("of = half", "of = halt", {"no model halt", "half"});
  refused("models = original, half, healed", "models = original, cured", {"no model cured"});
  refused("[convert half]", "[convert healed]", {"healed is taken"});
  refused("[convert half]", "[convert]", {"needs a name"});
  refused("nodes = 2", "node = 2", {"did you mean nodes"});
  refused("nodes = 2", "nodes = two", {"whole number"});
  refused("samples = 12", "samples = 12\nsamples = 13", {"wrong.ini:9", "stands twice"});
  refused("[report]", "[report", {"does not end with ]"});
  refused("# small", "# sm\xff", {"UTF-8"});
  refused("model = ", "#", {"[run] needs model"});
}

TEST_F(RunTest, refuses_at_its_start_what_later_stages_would_refuse) {
  const std::string good = read_file(scratch_ / "run.ini");
  const std::string heldout = "data = " + demo_text("heldout.jsonl").string(), model = "model = ";
  using Changes = std::vector<std::pair<std::string, std::string>>;
  // Each section names its first fault; the first section's decides the exit code.
  const auto refused = [&](const Changes& changes, int code, const std::vector<std::string>& said, int ranks = 1,
                           const std::vector<std::string>& more = {"--list"}) {
    std::string text = good;
    for (const auto& [from, to] : changes) {
      const std::size_t at = text.find(from);
      ASSERT_NE(at, std::string::npos) << from;
      text.replace(at, from.size(), to);
    }
    write_file(scratch_ / "wrong.ini", text);
    const Outcome outcome = run(ranks, "wrong", more);
    EXPECT_EQ(outcome.code, code) << outcome.output;
    for (const std::string& part : said) EXPECT_THAT(outcome.output, HasSubstr(part));
    EXPECT_FALSE(fs::exists(scratch_ / "run"));
  };
  refused({{"kv-heads = 4", "kv-heads = 3"},
           {"steps = 4", "steps = -5"},
           {"micro-batch = 2\ndtype = float32", "dtype = float99"},
           {"tasks = glosses", "tasks = nonesuch"}},
          64,
          {"wrong.ini:13: [convert half]: kv-heads = 3", "legal numbers are 1, 2, 4",
           "wrong.ini:17: [finetune healed]: steps = -5", "at least 0", "[evaluate text]: dtype = float99", "bfloat16",
           "[evaluate questions]: tasks = nonesuch", "--list shows all"},
          2, {});
  refused({{"kv-heads = 4", "kv-heads = 0"}, {"batch = 4", "batch = 0"}, {heldout, "data = gone.jsonl"}}, 64,
          {"[convert half]: kv-heads = 0", "legal numbers are 1, 2, 4", "wrong.ini:18: [finetune healed]: batch = 0",
           "at least 1", "[evaluate text]: data = gone.jsonl", "there is no such file"},
          1, {"--dry-run"});
  refused({{"kv-heads = 4", "kv-heads = 4\nratio = 0.5"}, {"steps = 4", "learning-rate = nan"}}, 64,
          {"[convert half]: kv-heads = 4", "--ratio", "give one", "[finetune healed]: learning-rate = nan",
           "positive number"});
  refused({{"save-every = 2", "device = abacus"},
           {"kv-heads = 4", "kv-heads = 4\nkey-metric = bananas"},
           {"targets = q,v", "targets = q,w"},
           {"tasks = glosses", "tasks = arc_easy"}},
          64,
          {"[calibrate]: device = abacus", "cpu, cuda", "[convert half]: key-metric = bananas", "act+query",
           "[finetune healed]: targets = q,w", "q_proj (q)", "[evaluate questions]: tasks = arc_easy", "--data-dir"});
  refused({{model, "model = gone"}, {"task-file = ", "task-file = gone"}}, 74,
          {"wrong.ini:4: [run]: model = ", "does not exist", "[evaluate questions]: task-file = gone",
           "there is no such file"});
  // The first alone, with its own code.
  refused({{heldout, "data = gone.jsonl"}}, 74, {"[evaluate text]: data = gone.jsonl", "there is no such file"});
  // Of a run's own files nothing is asked before they are made.
  write_file(scratch_ / "wrong.ini", good + "[convert again]\nplan = run/half/convert.json\n");
  EXPECT_EQ(run(1, "wrong", {"--list"}).code, 0);
}

TEST_F(RunTest, interrupted_in_every_stage_it_ends_with_the_same_results) {
  constexpr int ranks = 2;
  const Outcome calm = run(ranks);
  ASSERT_EQ(calm.code, 0) << calm.output;
  configure("disturbed");
  const fs::path stop = scratch_ / "disturbed" / "STOP";
  fs::create_directories(stop.parent_path());
  write_file(stop, "");
  EXPECT_EQ(run(ranks, "disturbed").code, 75);
  EXPECT_FALSE(fs::exists(scratch_ / "disturbed" / "finished"));
  fs::remove(stop);
  struct Disturbance {
    const char* hook;
    std::string point;
    int code;
    std::string said;  ///< by the next start
  };
  // Ranks are asked to stop, or die, in the middle of each stage; the same command goes on each time.
  const std::vector<Disturbance> all = {{"HEADFOLD_TEST_STOP", "1:progress calibrate:2", 75, "going on after"},
                                        {"HEADFOLD_TEST_KILL", "1:progress calibrate:3", 137, "going on after"},
                                        {"HEADFOLD_TEST_KILL", "0:calibration.h5.json", 137, ""},
                                        {"HEADFOLD_TEST_STOP", "0:progress plan:2", 75, ""},
                                        {"HEADFOLD_TEST_KILL", "1:progress fold:2", 137, ""},
                                        {"HEADFOLD_TEST_KILL", "0:/model.safetensors", 137, ""},
                                        {"HEADFOLD_TEST_STOP", "1:progress finetune:2", 75, "resuming after step"},
                                        {"HEADFOLD_TEST_KILL", "1:progress finetune:1", 137, "resuming after step"},
                                        {"HEADFOLD_TEST_KILL", "0:checkpoints/step", 137, ""},
                                        {"HEADFOLD_TEST_STOP", "0:progress evaluate", 75, "windows were scored before"},
                                        {"HEADFOLD_TEST_KILL", "0:results_", 137, ""}};
  std::string said;
  for (const Disturbance& one : all) {
    const Variable hook(one.hook, one.point);
    const Outcome outcome = run(ranks, "disturbed");
    EXPECT_EQ(outcome.code, one.code) << one.hook << " " << one.point << "\n" << outcome.output;
    EXPECT_THAT(outcome.output, HasSubstr(said)) << "before " << one.point;
    said = one.said;
  }
  const Outcome last = run(ranks, "disturbed");
  ASSERT_EQ(last.code, 0) << last.output;
  EXPECT_TRUE(bytes("run", "calibration.h5") == bytes("disturbed", "calibration.h5"));
  EXPECT_EQ(read_json(scratch_ / "run" / "calibration.h5.json")["options"],
            read_json(scratch_ / "disturbed" / "calibration.h5.json")["options"]);
  for (const char* file : {"half/model.safetensors", "half/headfold.json", "half/config.json",
                           "healed/adapter/adapter_model.safetensors", "healed/merged/model.safetensors"})
    EXPECT_TRUE(bytes("run", file) == bytes("disturbed", file)) << file;
  for (const char* element : {"text/original", "text/half", "text/healed", "questions/half"})
    EXPECT_EQ(scores("run", element), scores("disturbed", element)) << element;
  // Nothing of the interruptions is left.
  for (const auto& entry : fs::recursive_directory_iterator(scratch_ / "disturbed")) {
    const std::string name = entry.path().filename().string();
    EXPECT_FALSE(name.ends_with(".tmp") || name.ends_with(".partial") || name == "scores" ||
                 name == ".headfold-unfinished")
        << entry.path();
  }
}

TEST_F(RunTest, jobs_by_themselves_stop_too) {
  const fs::path folder = scratch_ / "alone";
  fs::create_directories(folder);
  const std::string model = demo_model("prose-llama"), half = folder / "half", heldout = demo_text("heldout.jsonl");
  const auto job = [&](int ranks, const std::vector<std::string>& arguments) {
    return run_headfold(ranks, arguments, scratch_ / "log.txt", 120);
  };
  const std::vector<std::string> convert = {"convert", "--model",  model,      "--kv-heads", "4",
                                            "--keys",  "meanpool", "--values", "meanpool",   "--threads",
                                            "1",       "--out",    half},
                                 verify = {"verify", "--model",   half,        "--original", model,
                                           "--data", heldout,     "--samples", "4",          "--seq-len",
                                           "32",     "--threads", "1"};
  const auto stopped = [&](const Outcome& outcome) {
    EXPECT_EQ(outcome.code, 75) << outcome.output;
    EXPECT_THAT(outcome.output, HasSubstr("stopped on request"));
  };
  write_file(folder / "STOP", "");
  stopped(job(1, convert));
  EXPECT_TRUE(!fs::exists(half) || fs::is_empty(half));
  fs::remove(folder / "STOP");
  ASSERT_EQ(job(2, convert).code, 0);
  {
    const Variable hook("HEADFOLD_TEST_STOP", "1:progress verify:3");
    stopped(job(2, verify));
  }
  EXPECT_FALSE(fs::exists(fs::path(half) / "verification.json"));
  write_file(folder / "STOP", "");
  stopped(job(1, verify));
  stopped(job(1, {"calibrate", "--model", model, "--data", text(), "--samples", "2", "--seq-len", "32", "--threads",
                  "1", "--out", folder / "calibration.h5"}));
  stopped(job(1, {"evaluate", "--model", model, "--data", heldout, "--limit", "2", "--threads", "1", "--out", folder}));
  fs::remove(folder / "STOP");
  EXPECT_EQ(job(1, verify).code, 0);
}

TEST_F(RunTest, what_a_change_concerns_is_made_again) {
  ASSERT_EQ(run(1).code, 0);
  const std::string statistics = bytes("run", "calibration.h5"), half = bytes("run", "half/model.safetensors");
  const auto evaluated = fs::last_write_time(scratch_ / "run" / "finished" / "evaluate-0");
  configure("run", "2");
  for (const Json& stage : listed()["stages"])
    for (const Json& element : stage["elements"])
      EXPECT_EQ(element["finished"].get<bool>(), element["name"] == "calibrate" || element["name"] == "text/original")
          << element["name"];
  const Outcome again = run(1);
  EXPECT_EQ(again.code, 0) << again.output;
  EXPECT_THAT(again.output, AllOf(HasSubstr("6 of 8 elements were run"), HasSubstr("it is made again")));
  EXPECT_TRUE(bytes("run", "calibration.h5") == statistics);
  EXPECT_NE(bytes("run", "half/model.safetensors").size(), half.size());
  EXPECT_EQ(fs::last_write_time(scratch_ / "run" / "finished" / "evaluate-0"), evaluated);
  // Results that are gone are made again as well.
  fs::remove_all(scratch_ / "run" / "evaluation" / "questions");
  EXPECT_THAT(run(1).output, HasSubstr("1 of 8 elements were run"));
}

}  // namespace
}  // namespace headfold::end_to_end
