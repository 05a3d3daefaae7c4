// headfold finetune as a user runs it: training, resuming, stopping by signal and by file, a rank that is killed, and
// input that is wrong.

#include <gmock/gmock.h>
#include <headfold/base/json.h>
#include <headfold/checkpoint/reader.h>
#include <headfold/finetune/lora.h>
#include <headfold/finetune/trainable.h>
#include <signal.h>
#include <sys/types.h>
#include <unistd.h>

#include <cmath>
#include <fstream>
#include <regex>
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
    fs::copy(base(), root_ / "folded");
    std::ifstream text(demo_text("calibration.jsonl"));
    std::ofstream part(root_ / "train.jsonl");
    std::string line;
    for (int i = 0; i < 24 && std::getline(text, line); ++i) part << line << '\n';
    std::ofstream held(root_ / "validation.jsonl");
    for (int i = 0; i < 2 && std::getline(text, line); ++i) held << line << '\n';
  }
  ~FinetuneTest() override {
    std::error_code code;
    fs::remove_all(root_, code);
  }
  /// A folded model to heal, the folds in it poor on purpose; made once.
  static const fs::path& base() {
    static const struct Folded {
      Folded() : path(fs::temp_directory_path() / fmt::format("headfold-folded-{}", ::getpid())) {
        const Outcome made = run_headfold(1,
                                          {"convert", "--model", demo_model("prose-llama"), "--kv-heads", "4", "--keys",
                                           "meanpool", "--values", "meanpool", "--out", path},
                                          path.string() + ".log");
        EXPECT_EQ(made.code, 0) << made.output;
      }
      fs::path path;
    } folded;
    return folded.path;
  }
  static void TearDownTestSuite() {
    std::error_code code;
    fs::remove_all(base(), code);
    fs::remove(base().string() + ".log", code);
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
  /// Runs a long training on two ranks and sends `signal` to one of them once it has trained some steps.
  /// Outcome::seconds is the time from the signal to the end.
  Outcome disturbed(const std::string& out, int signal, const Arguments& more) const {
    Outcome outcome;
    std::chrono::steady_clock::time_point when;
    std::thread job([&] { outcome = run(training(out, more), 2); });
    const fs::path lines = root_ / out / "train.jsonl";
    const auto begun = fs::file_time_type::clock::now();
    bool sent = false;
    for (int i = 0; i < 900 && !sent; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
      std::error_code code;
      if (!fs::exists(lines, code) || fs::file_size(lines, code) < 2000 || fs::last_write_time(lines, code) < begun)
        continue;
      const std::vector<pid_t> ranks = running_ranks((root_ / out).string());
      when = std::chrono::steady_clock::now();
      if (!ranks.empty()) sent = ::kill(ranks.back(), signal) == 0;
    }
    job.join();
    outcome.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - when).count();
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
  // What is missing is made again from the checkpoints, the same.
  const fs::path tensors = root_ / "healed" / "adapter" / "adapter_model.safetensors";
  const std::string bytes = read_file(tensors);
  fs::remove(tensors);
  const Outcome remade = run(command, 2);
  EXPECT_EQ(remade.code, 0) << remade.output;
  ASSERT_TRUE(fs::exists(tensors)) << remade.output;
  EXPECT_EQ(read_file(tensors), bytes);
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

TEST_F(FinetuneTest, a_damaged_result_of_a_finished_training_is_made_again) {
  const auto contents = [](const fs::path& folder) {
    std::map<std::string, std::string> found;
    for (const auto& entry : fs::recursive_directory_iterator(folder))
      if (entry.is_regular_file()) found[fs::relative(entry.path(), folder).string()] = read_file(entry.path());
    return found;
  };
  const auto cut = [](const fs::path& file) { fs::resize_file(file, fs::file_size(file) - 100); };
  const auto gone = [](const fs::path& file) { ASSERT_TRUE(fs::remove(file)) << file; };
  using Damage = std::function<void(const fs::path&)>;
  struct Case {
    std::string file;
    Damage damage;
    int ranks;
  };
  const auto check = [&](const std::string& out, const Arguments& command, const std::vector<Case>& cases) {
    const Outcome trained = run(command, 2);
    ASSERT_EQ(trained.code, 0) << trained.output;
    std::map<std::string, std::map<std::string, std::string>> whole;
    for (const char* name : {"adapter", "merged"})
      if (fs::exists(root_ / out / name)) whole[name] = contents(root_ / out / name);
    const std::string lines = read_file(root_ / out / "train.jsonl");
    const Json results = read_json(root_ / out / "finetune.json").at("results");
    for (const Case& one : cases) {
      one.damage(root_ / out / one.file);
      const Outcome remade = run(command, one.ranks);
      EXPECT_EQ(remade.code, 0) << one.file << remade.output;
      EXPECT_THAT(remade.output, HasSubstr("it is made again")) << one.file;
      for (const auto& [name, files] : whole) EXPECT_TRUE(contents(root_ / out / name) == files) << one.file;
      EXPECT_EQ(read_file(root_ / out / "train.jsonl"), lines) << "it was trained anew";
      EXPECT_EQ(read_json(root_ / out / "finetune.json").at("results"), results);
      const Outcome again = run(command);
      EXPECT_EQ(again.code, 0) << again.output;
      EXPECT_THAT(again.output, HasSubstr("nothing to do")) << one.file;
    }
  };
  const Arguments merging = training(
      "whole", {"--steps", "4", "--validation", root_ / "validation.jsonl", "--validate-every", "2", "--merge"});
  check("whole", merging,
        {{"adapter/adapter_model.safetensors", cut, 2},
         {"adapter/adapter_config.json",
          [](const fs::path& file) {
            Json json = read_json(file);
            json["lora_alpha"] = 7;
            write_json(file, json);
          },
          1},
         {"merged/model.safetensors", cut, 1},
         {"merged/model.safetensors", gone, 2},
         {"merged/tokenizer.model", gone, 1},
         {"merged/tokenizer.model", [](const fs::path& file) { write_file(file, "other"); }, 1},
         {"merged/config.json", gone, 1},
         {"merged/headfold.json", gone, 1}});
  const Arguments full = training("full", {"--steps", "2", "--full", "--max-shard-size", "5MB"});
  const Outcome first = run(full, 2);
  ASSERT_EQ(first.code, 0) << first.output;
  std::string shard;
  for (const auto& entry : fs::directory_iterator(root_ / "full" / "merged"))
    if (entry.path().filename().string().starts_with("model-00002-of")) shard = entry.path().filename().string();
  ASSERT_FALSE(shard.empty());
  check("full", full,
        {{"merged/" + shard, gone, 2}, {"merged/" + shard, cut, 1}, {"merged/model.safetensors.index.json", gone, 1}});
  // What another command put there stays.
  fs::remove_all(root_ / "full" / "merged");
  fs::copy(root_ / "whole" / "merged", root_ / "full" / "merged");
  const Outcome foreign = run(full, 2);
  EXPECT_EQ(foreign.code, 64) << foreign.output;
  EXPECT_THAT(foreign.output, HasSubstr("holds another model"));
  // Without a checkpoint there is nothing to make it from, and nothing is trained unasked.
  cut(root_ / "whole" / "merged" / "model.safetensors");
  const auto checkpoints = root_ / "whole" / "checkpoints";
  fs::resize_file(checkpoints / "step-4" / "parameters.safetensors", 1000);
  const Outcome unreadable = run(merging, 2);
  EXPECT_EQ(unreadable.code, 65) << unreadable.output;
  EXPECT_THAT(unreadable.output, testing::AllOf(HasSubstr("step-4"), HasSubstr("to train anew")));
  fs::remove_all(checkpoints);
  const Outcome lost = run(merging, 2);
  EXPECT_EQ(lost.code, 65) << lost.output;
  EXPECT_THAT(lost.output, testing::AllOf(HasSubstr("step-4"), HasSubstr("is gone"), HasSubstr("to train anew")));
}

TEST_F(FinetuneTest, a_checkpoint_of_nan_is_suspected_itself) {
  const checkpoint::Reader folded(root_ / "folded");
  std::map<std::string, at::Tensor> tensors;
  for (const std::string& name : folded.names()) tensors[name] = folded.view(name).clone();
  tensors.at("model.norm.weight")[3] = NAN;
  fs::copy(root_ / "folded", root_ / "broken");
  checkpoint::write_safetensors(root_ / "broken" / "model.safetensors", tensors);
  Arguments command = training("unsound", {"--steps", "2"});
  command[2] = root_ / "broken";
  const Outcome outcome = run(command, 2);
  EXPECT_EQ(outcome.code, 70) << outcome.output;
  EXPECT_THAT(outcome.output, testing::AllOf(HasSubstr("before anything is trained"), HasSubstr("is broken"),
                                             testing::Not(HasSubstr("--learning-rate"))));
  const Outcome taught = run(training(
      "taught", {"--steps", "2", "--teacher", root_ / "broken", "--cache-teacher", root_ / "teacher.safetensors"}));
  EXPECT_EQ(taught.code, 70) << taught.output;
  EXPECT_THAT(taught.output, testing::AllOf(HasSubstr("the teacher gives NaN for sequence 0"),
                                            testing::Not(HasSubstr("the 0 after it"))));
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
  const Arguments more = {"--steps", "3000", "--checkpoint-every", "2", "--comm-timeout", "50"};
  const Outcome killed = disturbed("killed", SIGKILL, more);
  EXPECT_NE(killed.code, 0);
  EXPECT_NE(killed.code, 124) << "it hung: " << killed.output;
  EXPECT_LT(killed.seconds, 60) << killed.output;
  EXPECT_THAT(killed.output,
              testing::AnyOf(HasSubstr("signal 9"), HasSubstr("Killed"), HasSubstr("rank has not come")));
  EXPECT_TRUE(running_ranks((root_ / "killed").string()).empty());
  const Outcome resumed = disturbed("killed", SIGUSR1, more);
  EXPECT_EQ(resumed.code, 75) << resumed.output;
  EXPECT_THAT(resumed.output, HasSubstr("resuming after step"));
}

TEST_F(FinetuneTest, memory_is_what_the_plan_says) {
  // Sizes at which tensors outweigh what the process itself takes, or at least count.
  write_file(
      root_ / "shape" / "config.json",
      R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024, "num_hidden_layers": 2,
                 "intermediate_size": 2816, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 16384,
                 "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
                 "tie_word_embeddings": false, "torch_dtype": "bfloat16"})");
  ASSERT_EQ(run({"synthesize", "--shape", root_ / "shape" / "config.json", "--tokenizer", demo_model("prose-llama"),
                 "--out", root_ / "wide"})
                .code,
            0);
  struct Case {
    std::string name;
    fs::path model;
    Arguments more;
    int ranks;
  };
  const fs::path wide = root_ / "wide";
  // Blocks below the 8 MiB that go back to the kernel, over several steps: places of freed ones must be taken again.
  const fs::path projected = root_ / "folded-projected";
  const Outcome folded =
      run({"convert", "--model", demo_model("prose-llama"), "--kv-heads", "4", "--keys", "post-rotation",
           "--key-metric", "weights", "--values", "svd", "--value-metric", "weights", "--out", projected});
  ASSERT_EQ(folded.code, 0) << folded.output;
  const Arguments once = {"--steps", "1", "--batch", "2"};
  const auto with = [](Arguments some, const Arguments& more) {
    some.insert(some.end(), more.begin(), more.end());
    return some;
  };
  const std::vector<Case> cases = {
      {"float32", wide, with(once, {"--dtype", "float32", "--seq-len", "512"}), 1},
      {"bfloat16", wide, with(once, {"--dtype", "bfloat16", "--seq-len", "1024", "--micro-batch", "2", "--merge"}), 2},
      {"teacher", wide, with(once, {"--dtype", "float32", "--seq-len", "256", "--teacher", wide}), 1},
      {"full", wide, with(once, {"--dtype", "float32", "--seq-len", "256", "--full"}), 1},
      {"projected",
       projected,
       {"--steps", "4", "--batch", "32", "--micro-batch", "32", "--dtype", "float32", "--seq-len", "96"},
       1},
  };
  for (const Case& one : cases) {
    const Arguments arguments = with({"finetune", "--model", one.model, "--data", root_ / "train.jsonl", "--threads",
                                      "1", "--out", root_ / one.name},
                                     one.more);
    Arguments planned = arguments;
    planned.emplace_back("--dry-run");
    const Outcome plan = run(planned, one.ranks);
    ASSERT_EQ(plan.code, 0) << plan.output;
    const Outcome done = run(arguments, one.ranks);
    ASSERT_EQ(done.code, 0) << done.output;
    const Json memory = read_json(root_ / one.name / "finetune.json").at("memory");
    const auto measured = memory.at("measured_peak").get<double>();
    std::smatch total;
    ASSERT_TRUE(std::regex_search(plan.output, total, std::regex("total +([0-9]+)"))) << plan.output;
    // 10 % is what docs/performance.md promises for models; here the process is most of it.
    EXPECT_NEAR(std::stod(total[1]) / measured, 1, 0.1) << one.name << '\n' << plan.output << memory;
    EXPECT_NEAR(memory.at("estimated").at("total").get<double>() / std::stod(total[1]), 1, 0.05) << one.name;
  }
}

TEST_F(FinetuneTest, validation_tells_the_divergence_from_a_cached_teacher) {
  const Arguments more = {"--steps",          "4", "--teacher-top", "16", "--validation", root_ / "validation.jsonl",
                          "--validate-every", "2"};
  const auto with = [&](const std::string& out, const Arguments& others) {
    Arguments all = training(out, more);
    all.insert(all.end(), others.begin(), others.end());
    return all;
  };
  const std::string cache = root_ / "teacher.safetensors";
  const std::string teacher = demo_model("prose-llama");
  const Outcome live = run(with("live", {"--teacher", teacher}));
  ASSERT_EQ(live.code, 0) << live.output;
  const Outcome cached = run(with("cached", {"--teacher", teacher, "--cache-teacher", cache}), 2);
  ASSERT_EQ(cached.code, 0) << cached.output;
  EXPECT_THAT(cached.output, HasSubstr("KL over the top 16 tokens"));
  EXPECT_TRUE(fs::exists(root_ / "teacher-validation.safetensors"));
  const Json all = read_json(root_ / "live" / "finetune.json").at("results");
  const Json top = read_json(root_ / "cached" / "finetune.json").at("results");
  EXPECT_FALSE(all.contains("validation_kl_top"));
  EXPECT_EQ(top.at("validation_kl_top"), 16);
  // Tokens taken together hide divergence; most of it lies in the first ones.
  const auto whole = all.at("validation_kl_before").get<double>(), part = top.at("validation_kl_before").get<double>();
  EXPECT_LE(part, whole * 1.0001);
  EXPECT_GT(part, whole * 0.5);
  EXPECT_LT(top.at("validation_kl_last").get<double>(), part);
  const Outcome report = run({"report", "--run", root_.string(), "--out", root_ / "report"});
  ASSERT_EQ(report.code, 0) << report.output;
  EXPECT_THAT(read_file(root_ / "report" / "report.md"), HasSubstr("(top 16)"));
  // From the files alone.
  const Outcome alone = run(with("alone", {"--cache-teacher", cache}));
  ASSERT_EQ(alone.code, 0) << alone.output;
  EXPECT_NEAR(read_json(root_ / "alone" / "finetune.json").at("results").at("validation_kl_before").get<double>(), part,
              1e-6);
  // An absent file is no other training.
  fs::rename(cache, root_ / "kept");
  const Outcome absent = run(with("alone", {"--cache-teacher", cache}), 2);
  EXPECT_EQ(absent.code, 74) << absent.output;
  EXPECT_THAT(absent.output, testing::AllOf(HasSubstr("teacher.safetensors: there is no such file"),
                                            testing::Not(HasSubstr("another training"))));
  fs::rename(root_ / "kept", cache);
  // A file that another teacher speaks from is another training, though no teacher is named.
  const std::string other = root_ / "other.safetensors";
  const Outcome filled = run(with("filled", {"--teacher", root_ / "folded", "--cache-teacher", other}));
  ASSERT_EQ(filled.code, 0) << filled.output;
  const Outcome swapped = run(with("alone", {"--cache-teacher", other}));
  EXPECT_EQ(swapped.code, 64) << swapped.output;
  EXPECT_THAT(swapped.output, testing::AllOf(HasSubstr("holds another training"), HasSubstr("teacher")));
  // Without that of the validation text: no divergence, and said so.
  fs::rename(root_ / "teacher-validation.safetensors", root_ / "away");
  const Outcome without = run(with("without", {"--cache-teacher", cache}));
  ASSERT_EQ(without.code, 0) << without.output;
  EXPECT_THAT(without.output, HasSubstr("teacher-validation.safetensors does not exist"));
  EXPECT_FALSE(read_json(root_ / "without" / "finetune.json").at("results").contains("validation_kl_before"));
  // Cut, or of other text.
  const std::string bytes = read_file(root_ / "away");
  for (const auto& [content, mentions] :
       {std::pair(bytes.substr(0, bytes.size() - 8), "teacher-validation.safetensors"),
        std::pair(read_file(cache), "the fingerprint of the data")}) {
    write_file(root_ / "teacher-validation.safetensors", content);
    const Outcome damaged = run(with("damaged", {"--cache-teacher", cache}), 2);
    EXPECT_EQ(damaged.code, 65) << damaged.output;
    EXPECT_THAT(damaged.output, HasSubstr(mentions));
    EXPECT_FALSE(fs::exists(root_ / "damaged"));
  }
}

TEST_F(FinetuneTest, an_exported_merge_is_the_trained_model) {
  // In float32: merging rounds to the stored type.
  const checkpoint::Reader folded(root_ / "folded");
  std::map<std::string, at::Tensor> tensors;
  for (const std::string& name : folded.names()) tensors[name] = folded.view(name).to(at::kFloat);
  checkpoint::write_safetensors(root_ / "base" / "model.safetensors", tensors);
  Json config = read_json(root_ / "folded" / "config.json");
  config["torch_dtype"] = "float32";
  write_json(root_ / "base" / "config.json", config);
  headfold::copy_file(root_ / "folded" / "tokenizer.model", root_ / "base" / "tokenizer.model");
  Arguments command = training("trained", {"--steps", "6", "--merge"});
  command[2] = root_ / "base";
  const Outcome trained = run(command);
  ASSERT_EQ(trained.code, 0) << trained.output;

  const checkpoint::Reader base(root_ / "base");
  const finetune::Adapter adapter = finetune::read_adapter(root_ / "trained" / "adapter", base.config());
  finetune::TrainableModel model(base, adapter.options, at::kFloat);
  finetune::Batch batch;
  batch.ids = at::arange(60, at::kLong).mul(67).remainder(base.config().vocab).view({2, 30});
  batch.targets = batch.ids;
  const at::Tensor before = model.logits(model.hidden(batch));
  for (finetune::Parameter& parameter : model.parameters()) parameter.value.copy_(adapter.tensors.at(parameter.name));
  const at::Tensor expected = model.logits(model.hidden(batch));
  const auto size = expected.abs().max().item<double>();
  EXPECT_GT((before - expected).abs().max().item<double>(), 1e-2 * size) << "nothing was learned";
  checkpoint::write_safetensors(root_ / "ids.safetensors", {{"input_ids", batch.ids}});

  const auto exported = [&](const fs::path& adapter_folder, const fs::path& model_folder, const std::string& out) {
    return Arguments{"export",       "--model",   model_folder, "--format", "merged",   "--adapter",
                     adapter_folder, "--threads", "1",          "--out",    root_ / out};
  };
  for (const int ranks : {1, 2, 4}) {
    const std::string out = fmt::format("merged-{}", ranks);
    const Outcome outcome = run(exported(root_ / "trained" / "adapter", root_ / "base", out), ranks);
    ASSERT_EQ(outcome.code, 0) << outcome.output;
    EXPECT_EQ(read_file(root_ / out / "model.safetensors"),
              read_file(root_ / "trained" / "merged" / "model.safetensors"))
        << ranks;
    const fs::path logits = root_ / (out + ".safetensors");
    const Outcome computed =
        run({"logits", "--model", root_ / out, "--ids", root_ / "ids.safetensors", "--threads", "1", "--out", logits});
    ASSERT_EQ(computed.code, 0) << computed.output;
    const checkpoint::SafetensorsFile file(logits);
    EXPECT_LE((file.view("logits").view(expected.sizes()) - expected).abs().max().item<double>(), 1e-5 * size) << ranks;
  }

  // What does not fit, or is broken.
  fs::resize_file(root_ / "trained" / "finetune.json", 100);
  const Outcome torn = run(command);
  EXPECT_EQ(torn.code, 65) << torn.output;
  EXPECT_THAT(torn.output, testing::AllOf(HasSubstr("finetune.json"), HasSubstr("to begin anew")));
  const fs::path sound = root_ / "trained" / "adapter";
  const Outcome foreign = run(exported(sound, root_ / "folded", "foreign"));
  EXPECT_EQ(foreign.code, 65) << foreign.output;
  EXPECT_THAT(foreign.output, HasSubstr("was trained on a model with fingerprint"));
  EXPECT_FALSE(fs::exists(root_ / "foreign"));
  const auto damaged = [&](const char* name, const std::function<void(const fs::path&)>& damage) {
    fs::copy(sound, root_ / name);
    damage(root_ / name);
    return root_ / name;
  };
  const auto cut = damaged("cut", [](const fs::path& folder) {
    fs::resize_file(folder / "adapter_model.safetensors", fs::file_size(folder / "adapter_model.safetensors") - 100);
  });
  const auto unset = damaged("unset", [](const fs::path& folder) { fs::remove(folder / "adapter_config.json"); });
  const auto wider = damaged("wider", [](const fs::path& folder) {
    Json json = read_json(folder / "adapter_config.json");
    json["r"] = 5;
    write_json(folder / "adapter_config.json", json);
  });
  const auto unsound = damaged("unsound", [&](const fs::path& folder) {
    auto values = adapter.tensors;
    values.begin()->second = at::full_like(values.begin()->second, NAN);
    checkpoint::write_safetensors(folder / "adapter_model.safetensors", values);
  });
  struct Case {
    fs::path adapter, model;
    int code;
    std::string mentions;
    int ranks;
  };
  for (const Case& one : std::vector<Case>{
           {cut, root_ / "base", 65, "adapter_model.safetensors", 1},
           {cut, root_ / "base", 65, "adapter_model.safetensors", 2},
           {unset, root_ / "base", 74, "adapter_config.json", 4},
           {wider, root_ / "base", 65, "lora_A.weight has shape [4, 256]", 2},
           {unsound, root_ / "base", 65, "not finite", 1},
           {root_ / "nowhere", root_ / "base", 74, "nowhere", 1},
           {sound, demo_model("prose-llama"), 65, "the adapter was made for another model", 2},
           {sound, demo_model("prose-bloom"), 65, "which", 1},
       }) {
    const Outcome outcome = run(exported(one.adapter, one.model, "refused"), one.ranks);
    EXPECT_EQ(outcome.code, one.code) << one.adapter << outcome.output;
    EXPECT_THAT(outcome.output, HasSubstr(one.mentions));
    EXPECT_FALSE(fs::exists(root_ / "refused" / "config.json")) << one.adapter;
  }
}

TEST_F(FinetuneTest, wrong_input_is_named_and_leaves_nothing_behind) {
  write_file(root_ / "empty.jsonl", "\n");
  write_file(root_ / "short.jsonl", "{\"text\": \"Too short.\"}\n");
  write_file(root_ / "rows.jsonl", "{\"prompt\": \"" + std::string(900, 'x') + "\", \"response\": \"y\"}\n");
  write_file(root_ / "array.json", "[]");
  write_file(root_ / "broken.jsonl", "{\"prompt\": \"a\", \"response\": \"b\"}\n{\"prompt\": \"cut o");
  // A teacher whose tokenizer is the student's, with other tables.
  Json shape = read_json(demo_model("prose-llama") / "config.json");
  shape["vocab_size"] = 4100;
  shape["num_hidden_layers"] = 1;
  write_json(root_ / "shape" / "config.json", shape);
  ASSERT_EQ(run({"synthesize", "--shape", root_ / "shape" / "config.json", "--tokenizer", demo_model("prose-llama"),
                 "--out", root_ / "taller"})
                .code,
            0);
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
      {{"--data", text("array.json")}, 65, "array.json: the array is empty, there are no instructions in it", 2},
      {{"--data", text("broken.jsonl")}, 65, "broken.jsonl:2"},
      {{"--teacher", demo_model("prose-bloom")}, 65, "tokenizer", 2},
      {{"--teacher", text("taller")}, 65, "vocabulary has 4100 entries", 2},
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
