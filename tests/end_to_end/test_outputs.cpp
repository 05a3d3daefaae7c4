// What jobs do to files that are there already: results are replaced whole or not at all, inputs and foreign files
// never.

#include <gmock/gmock.h>
#include <headfold/base/json.h>
#include <headfold/checkpoint/safetensors.h>
#include <headfold/checkpoint/writer.h>

#include <map>

#include "program.h"

namespace headfold::end_to_end {
namespace {

using Arguments = std::vector<std::string>;
using testing::AllOf;
using testing::HasSubstr;
using testing_support::ScratchFolder;

class OutputsTest : public testing::Test {
 protected:
  void SetUp() override { fs::create_directories(root_ / "logs"); }
  Outcome run(const Arguments& arguments, int ranks = 1) {
    return run_headfold(ranks, arguments, root_ / "logs" / "log");
  }
  void make(const Arguments& arguments) {
    const Outcome outcome = run(arguments);
    ASSERT_EQ(outcome.code, 0) << outcome.output;
  }
  /// Exit 64 with all these words, and `folder` as it was.
  void expect_refused(const Arguments& arguments, const fs::path& folder, const std::vector<std::string>& words,
                      int ranks = 1) {
    const auto before = contents(folder);
    const Outcome outcome = run(arguments, ranks);
    EXPECT_EQ(outcome.code, 64) << outcome.output;
    for (const std::string& word : words) EXPECT_THAT(outcome.output, HasSubstr(word));
    EXPECT_EQ(contents(folder), before) << testing::PrintToString(arguments);
  }
  void expect_finished(const Arguments& arguments, const fs::path& folder) {
    const auto before = contents(folder);
    const auto written = fs::last_write_time(folder / "headfold.json");
    const Outcome outcome = run(arguments);
    EXPECT_EQ(outcome.code, 0) << outcome.output;
    EXPECT_THAT(outcome.output, HasSubstr("is already the result of this very command"));
    EXPECT_EQ(contents(folder), before);
    EXPECT_EQ(fs::last_write_time(folder / "headfold.json"), written);
  }
  static std::map<std::string, std::string> contents(const fs::path& folder) {
    std::map<std::string, std::string> files;
    for (const auto& entry : fs::directory_iterator(folder))
      if (entry.is_regular_file()) files[entry.path().filename().string()] = read_file(entry.path());
    return files;
  }
  static std::vector<std::string> names(const fs::path& folder) {
    std::vector<std::string> list;
    for (const auto& entry : fs::directory_iterator(folder)) list.push_back(entry.path().filename().string());
    std::sort(list.begin(), list.end());
    return list;
  }
  Arguments convert(const std::string& model, const std::string& out, const Arguments& more = {}) const {
    Arguments arguments = {"convert", "--model",  demo_model(model), "--keys",         "meanpool", "--key-metric",
                           "weights", "--values", "meanpool",        "--value-metric", "weights",  "--kv-heads",
                           "4",       "--out",    root_ / out};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  }
  /// A model of random weights, tiny.
  Arguments synthesize(const std::string& out, const Arguments& more = {}) const {
    Arguments arguments = {"synthesize", "--shape",  demo_model("prose-llama") / "config.json", "--layers", "1",
                           "--out",      root_ / out};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  }
  Arguments export_dense(const std::string& out, const Arguments& more = {}) const {
    Arguments arguments = {"export", "--model", root_ / "grouped", "--format", "expanded", "--out", root_ / out};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  }
  static Arguments with(Arguments arguments, const Arguments& more) {
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  }

  ScratchFolder root_;
};

TEST_F(OutputsTest, what_replaces_a_model_leaves_nothing_of_it) {
  ASSERT_NO_FATAL_FAILURE(make(convert("prose-llama", "f")));
  write_file(root_ / "f" / "verification.json", "{}");
  write_file(root_ / "f" / "notes.txt", "the user's own");
  ASSERT_NO_FATAL_FAILURE(make(convert("prose-bloom", "f", {"--overwrite"})));
  ASSERT_NO_FATAL_FAILURE(make(convert("prose-bloom", "grouped")));
  auto replaced = contents(root_ / "f"), fresh = contents(root_ / "grouped");
  EXPECT_EQ(replaced.erase("notes.txt"), 1U);
  for (auto* files : {&replaced, &fresh}) EXPECT_EQ(files->erase("convert.json"), 1U);  // it holds times
  EXPECT_EQ(replaced, fresh);
  // Another kind of model, in several shards, and one without shards after it.
  ASSERT_NO_FATAL_FAILURE(make(synthesize("f", {"--overwrite", "--max-shard-size", "1MB"})));
  EXPECT_THAT(names(root_ / "f"), testing::Contains("model.safetensors.index.json"));
  EXPECT_THAT(names(root_ / "f"), testing::Not(testing::Contains("model.safetensors")));
  ASSERT_NO_FATAL_FAILURE(make(export_dense("f", {"--overwrite"})));
  EXPECT_THAT(names(root_ / "f"),
              testing::ElementsAre("config.json", "headfold.json", "model.safetensors", "notes.txt", "tokenizer.json"));
  ASSERT_NO_FATAL_FAILURE(make(synthesize("f", {"--overwrite"})));
  EXPECT_THAT(names(root_ / "f"),
              testing::ElementsAre("config.json", "headfold.json", "model.safetensors", "notes.txt"));
}

TEST_F(OutputsTest, another_model_is_replaced_only_when_asked) {
  ASSERT_NO_FATAL_FAILURE(make(convert("prose-bloom", "grouped")));
  ASSERT_NO_FATAL_FAILURE(make(synthesize("random", {"--tokenizer", demo_model("prose-llama")})));
  ASSERT_NO_FATAL_FAILURE(make(export_dense("dense")));
  const std::map<std::string, std::string> kinds = {
      {"grouped", "another conversion"}, {"random", "a synthetic model"}, {"dense", "an exported model"}};
  for (const auto& [folder, kind] : kinds) {
    const std::vector<std::string> words = {"holds " + kind, "--overwrite"};
    expect_refused(convert("prose-llama", folder), root_ / folder, words);
    expect_refused(synthesize(folder, {"--seed", "5"}), root_ / folder, words);
    if (folder != "grouped") expect_refused(export_dense(folder, {"--dtype", "bfloat16"}), root_ / folder, words);
  }
  expect_refused(synthesize("grouped"), root_ / "grouped", {"another conversion"}, 2);
  // The very same commands have nothing to do.
  expect_finished(convert("prose-bloom", "grouped"), root_ / "grouped");
  expect_finished(synthesize("random", {"--tokenizer", demo_model("prose-llama")}), root_ / "random");
  expect_finished(export_dense("dense"), root_ / "dense");
  // Folders of earlier versions have the request in convert.json alone.
  OrderedJson made = OrderedJson::parse(read_file(root_ / "grouped" / "headfold.json"));
  made.erase("request");
  write_json(root_ / "grouped" / "headfold.json", made);
  expect_finished(convert("prose-bloom", "grouped"), root_ / "grouped");
  // Without what says which command it was, a whole model is somebody's still.
  fs::remove(root_ / "dense" / "headfold.json");
  expect_refused(convert("prose-llama", "dense", {"--overwrite"}), root_ / "dense", {"not written by headfold"});
}

TEST_F(OutputsTest, a_result_with_damaged_companions_is_made_again) {
  const fs::path folder = root_ / "f";
  const auto repaired = [&](const Arguments& command, const std::string& word) {
    const Outcome outcome = run(command);
    EXPECT_EQ(outcome.code, 0) << outcome.output;
    EXPECT_THAT(outcome.output, AllOf(HasSubstr("damaged"), HasSubstr(word), HasSubstr("is made again")));
  };
  const std::string tokenizer = read_file(demo_model("prose-llama") / "tokenizer.model");
  for (const Arguments& command :
       {convert("prose-llama", "f"), synthesize("f", {"--overwrite", "--tokenizer", demo_model("prose-llama")})}) {
    ASSERT_NO_FATAL_FAILURE(make(command));
    fs::remove(folder / "tokenizer.model");
    repaired(command, "tokenizer.model is missing");
    EXPECT_EQ(read_file(folder / "tokenizer.model"), tokenizer);
    write_file(folder / "tokenizer.model", "changed");
    repaired(command, "differs");
    EXPECT_EQ(read_file(folder / "tokenizer.model"), tokenizer);
    write_file(folder / "tokenizer.json", "{}");
    repaired(command, "tokenizer.json");
    EXPECT_FALSE(fs::exists(folder / "tokenizer.json"));
  }
}

TEST_F(OutputsTest, a_job_that_is_killed_leaves_the_former_model_or_none) {
  const fs::path folder = root_ / "f";
  ASSERT_NO_FATAL_FAILURE(make(convert("prose-llama", "f")));
  const auto before = contents(folder);
  const Arguments other = convert("prose-bloom", "f", {"--overwrite"});
  {
    const Variable hook("HEADFOLD_TEST_KILL", "0:progress fold:1");
    EXPECT_EQ(run(other).code, 137);
  }
  for (const auto& [name, bytes] : before) EXPECT_EQ(read_file(folder / name), bytes) << name;
  EXPECT_TRUE(fs::exists(folder / checkpoint::kUnfinishedMarker));
  EXPECT_EQ(run(synthesize("f")).code, 64) << "the former model is whole";
  {
    const Variable hook("HEADFOLD_TEST_KILL", "0:publish " + (folder / "tokenizer.json").string());
    EXPECT_EQ(run(other).code, 137);
  }
  EXPECT_FALSE(checkpoint::holds_model(folder));
  EXPECT_FALSE(fs::exists(folder / "tokenizer.model"));
  // The same command goes on without being asked for anything.
  ASSERT_NO_FATAL_FAILURE(make(convert("prose-bloom", "f")));
  {
    const Variable hook("HEADFOLD_TEST_KILL", "0:publish " + (root_ / "g" / "convert.json").string());
    EXPECT_EQ(run(convert("prose-bloom", "g")).code, 137);
  }
  ASSERT_NO_FATAL_FAILURE(make(convert("prose-bloom", "g")));
  EXPECT_EQ(names(folder), names(root_ / "g"));
}

TEST_F(OutputsTest, a_plan_is_applied_in_its_own_folder_and_replaced_when_asked) {
  const fs::path folder = root_ / "t", plan = folder / "plan.json";
  const Arguments planning = convert("prose-llama", "t", {"--plan-only"});
  Arguments others = planning;
  *std::find(others.begin(), others.end(), "4") = "2";
  ASSERT_NO_FATAL_FAILURE(make(planning));
  const Outcome again = run(planning);
  EXPECT_EQ(again.code, 0);
  EXPECT_THAT(again.output, HasSubstr("is already the plan of this very command"));
  expect_refused(others, folder, {"plan.json was planned otherwise", "--overwrite"});
  expect_refused(convert("prose-llama", "t"), folder, {"holds a plan", "--overwrite"});
  expect_refused(synthesize("t"), folder, {"holds a plan", "--overwrite"});
  ASSERT_NO_FATAL_FAILURE(make(with(others, {"--overwrite"})));
  EXPECT_EQ(read_json(plan).at("kv_heads"), 2);
  const std::string bytes = read_file(plan);
  const Arguments apply = {"convert", "--model", demo_model("prose-llama"), "--plan", plan, "--out", folder};
  ASSERT_NO_FATAL_FAILURE(make(apply));
  EXPECT_EQ(read_file(plan), bytes);
  EXPECT_EQ(read_json(folder / "config.json").at("num_key_value_heads"), 2);
  expect_finished(apply, folder);
  // Another fold that replaces it takes the plan away.
  ASSERT_NO_FATAL_FAILURE(make(convert("prose-llama", "t", {"--overwrite"})));
  EXPECT_FALSE(fs::exists(plan));
}

TEST_F(OutputsTest, printed_commands_can_be_pasted_into_a_shell) {
  const fs::path folder = root_ / "it's #1";
  const Outcome outcome = run(convert("prose-llama", folder.filename()));
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  const std::string said = "headfold verify --model ";
  const std::size_t begin = outcome.output.find(said);
  ASSERT_NE(begin, std::string::npos) << outcome.output;
  std::string command = outcome.output.substr(begin, outcome.output.find('\n', begin) - begin);
  command.replace(command.find("FILE"), 4, demo_text("heldout.jsonl").string() + " --samples 1 --seq-len 32");
  command.replace(0, std::string("headfold").size(), HEADFOLD_PROGRAM);
  const Outcome pasted = run_command(command, root_ / "logs" / "log");
  EXPECT_EQ(pasted.code, 0) << command << "\n" << pasted.output;
  EXPECT_TRUE(fs::exists(folder / "verification.json"));
}

TEST_F(OutputsTest, inputs_and_foreign_files_are_never_written_to) {
  const fs::path model = root_ / "model", data = root_ / "data.jsonl", ids = root_ / "ids.safetensors";
  fs::create_directories(model);
  for (const auto& entry : fs::directory_iterator(demo_model("prose-llama")))
    headfold::copy_file(entry.path(), model / entry.path().filename());
  headfold::copy_file(demo_text("heldout.jsonl"), data);
  headfold::copy_file(data, root_ / "stats.h5.json");
  checkpoint::write_safetensors(ids, {{"input_ids", at::ones({1, 4}, at::kLong)}});
  write_file(root_ / "foreign.json", "{\"mine\": 1}");
  ASSERT_NO_FATAL_FAILURE(make(convert("prose-llama", "f")));
  fs::create_symlink(model / "model.safetensors", root_ / "soft.safetensors");
  fs::create_hard_link(model / "config.json", root_ / "hard.json");

  const Arguments logits = {"logits", "--model", model, "--ids", ids};
  const Arguments verify = {"verify", "--model",   root_ / "f", "--original", model, "--data",
                            data,     "--samples", "1",         "--seq-len",  "16"};
  const Arguments calibrate = {"calibrate", "--model", model,       "--data", data,
                               "--samples", "1",       "--seq-len", "16",     "--overwrite"};
  const std::vector<std::string> reads = {"is a file that this job reads"};
  for (const fs::path& target :
       {model / "model.safetensors", model / "config.json", root_ / "soft.safetensors", root_ / "hard.json", ids})
    expect_refused(with(logits, {"--out", target}), target.parent_path(), reads);
  for (const fs::path& target : {data, model / "config.json", root_ / "f" / "model.safetensors", root_ / "hard.json"})
    expect_refused(with(verify, {"--out", target}), target.parent_path(), reads);
  for (const fs::path& target : {data, model / "model.safetensors", root_ / "soft.safetensors"})
    expect_refused(with(calibrate, {"--out", target}), target.parent_path(), reads);
  // The record beside the statistics counts as well; so do events.
  expect_refused({"calibrate", "--model", model, "--data", root_ / "stats.h5.json", "--samples", "1", "--seq-len", "16",
                  "--out", root_ / "stats.h5"},
                 root_.path(), reads);
  expect_refused(with(logits, {"--out", root_ / "new.safetensors", "--events", model / "config.json"}), model, reads);
  // A place where a loader would look.
  expect_refused(with(logits, {"--out", model / "more.safetensors"}), model, {"stands among the files of a model"});
  expect_refused(with(verify, {"--out", model / "tokenizer.json"}), model, {"stands among the files of a model"});
  // What is no former result.
  for (const Arguments& job : {logits, verify})
    expect_refused(with(job, {"--out", root_ / "foreign.json"}), root_.path(), {"exists and holds no"});
  expect_refused(with(logits, {"--out", root_ / "new.safetensors", "--events", root_ / "foreign.json"}), root_.path(),
                 {"exists and holds no events"});
  expect_refused(with(logits, {"--out", data}), root_.path(), {"exists and holds no logits"}, 2);

  // Former results are replaced.
  for (int time = 0; time < 2; ++time) {
    ASSERT_NO_FATAL_FAILURE(
        make(with(logits, {"--out", root_ / "logits.safetensors", "--events", root_ / "events.jsonl"})));
    ASSERT_NO_FATAL_FAILURE(make(verify));
  }
  EXPECT_TRUE(fs::exists(root_ / "f" / "verification.json"));
}

}  // namespace
}  // namespace headfold::end_to_end
