// headfold bench, and what run --dry-run --nodes makes of its rates.

#include <gmock/gmock.h>
#include <headfold/base/json.h>

#include "program.h"

namespace headfold::end_to_end {
namespace {

using testing::AllOf;
using testing::HasSubstr;

class ScaleTest : public testing::Test {
 protected:
  Outcome run(int ranks, const std::vector<std::string>& arguments) const {
    return run_headfold(ranks, arguments, scratch_ / "log");
  }
  void refused(const std::vector<std::string>& arguments, int code, const std::vector<std::string>& words) const {
    const Outcome outcome = run(1, arguments);
    EXPECT_EQ(outcome.code, code) << outcome.output;
    for (const std::string& word : words) EXPECT_THAT(outcome.output, HasSubstr(word));
  }
  std::string rates() const { return scratch_ / "rates.json"; }
  std::string json() const { return scratch_ / "prediction.json"; }
  testing_support::ScratchFolder scratch_;
};

TEST_F(ScaleTest, two_ranks_measure_and_a_configuration_is_predicted_with_what_they_found) {
  const Outcome measured =
      run(2, {"bench", "--shape", demo_model("prose-llama").string(), "--dtype", "float32", "--seq-len", "64",
              "--repeat", "1", "--threads", "1", "--scratch", scratch_ / "temporary", "--out", rates()});
  ASSERT_EQ(measured.code, 0) << measured.output;
  EXPECT_TRUE(fs::is_empty(scratch_ / "temporary"));
  const Json file = read_json(rates());
  for (const char* figure : {"product.float32", "attention.float32", "element_wise.float32", "gram.float32",
                             "head.float32", "training.float32", "load.float32", "fold", "eigen", "memory", "read",
                             "copy", "write", "statistics", "sums", "inside", "inside_latency", "all_reduce_inside"}) {
    ASSERT_TRUE(file.at("figures").contains(figure)) << figure;
    EXPECT_GT(file.at("figures").at(figure).at("value").get<double>(), 0) << figure;
  }
  write_file(scratch_ / "run.ini",
             fmt::format(R"([run]
folder = results
model = {0}
[calibrate]
data = {1}
samples = 16
seq-len = 64
dtype = float32
pipeline-ranks = 2
[convert half]
ratio = 0.5
[finetune healed]
of = half
data = {1}
steps = 4
batch = 4
seq-len = 64
dtype = float32
[evaluate text]
models = original, half, healed
data = {1}
limit = 8
seq-len = 64
dtype = float32
[report]
)",
                         demo_model("prose-llama").string(), demo_text("heldout.jsonl").string()));
  const std::vector<std::string> predict = {"run",     "--dry-run", "--config", scratch_ / "run.ini",
                                            "--rates", rates(),     "--json",   json()};
  const Outcome predicted = run(1, predict);
  ASSERT_EQ(predicted.code, 0) << predicted.output;
  EXPECT_THAT(predicted.output, AllOf(HasSubstr("measured"), HasSubstr("nothing was loaded or written")));
  EXPECT_FALSE(fs::exists(scratch_ / "results"));
  const Json said = read_json(json());
  ASSERT_EQ(said.at("stages").size(), 6U);
  double sum = 0;
  for (const Json& stage : said.at("stages")) {
    EXPECT_GT(stage.at("seconds").get<double>(), 0);
    EXPECT_GT(stage.at("memory").at("host_bytes_per_rank").get<double>(), 0);
    sum += stage.at("seconds").get<double>();
  }
  EXPECT_NEAR(said.at("seconds").get<double>(), sum, 1e-9 * sum);
  EXPECT_EQ(said.at("stages")[1].at("name"), "half");
  // One rank cannot hold two stages.
  std::vector<std::string> one = predict;
  one.insert(one.end(), {"--ranks-per-node", "1"});
  refused(one, 64, {"2 pipeline ranks"});
  // Bytes that the job itself reports.
  const Outcome job =
      run(2, {"calibrate", "--model", demo_model("prose-llama").string(), "--data", demo_text("heldout.jsonl").string(),
              "--samples", "16", "--seq-len", "64", "--dtype", "float32", "--threads", "1", "--pipeline-ranks", "2",
              "--out", scratch_ / "c.h5", "--events", scratch_ / "events.jsonl"});
  ASSERT_EQ(job.code, 0) << job.output;
  const std::string events = read_file(scratch_ / "events.jsonl");
  const Json end = Json::parse(events.substr(events.rfind('\n', events.size() - 2) + 1));  // the last line
  ASSERT_EQ(end.at("event"), "end");
  double written = 0;
  for (const Json& rank : end.at("per_rank")) written += rank.at("written_bytes").get<double>();
  const double expected = said.at("stages")[0].at("bytes").at("written").get<double>();
  EXPECT_NEAR(written / expected, 1, 0.05);
}

TEST_F(ScaleTest, shapes_are_planned_on_gpus_without_any_file) {
  for (const char* gpu : {"a100", "h100", "h200"}) {
    const Outcome outcome = run(1, {"run", "--dry-run", "--nodes", "2", "--gpus-per-node", "4", "--gpu", gpu, "--shape",
                                    "llama2-70b", "--json", json()});
    ASSERT_EQ(outcome.code, 0) << outcome.output;
    EXPECT_THAT(outcome.output, AllOf(HasSubstr("data sheet"), HasSubstr("none measured")));
    const Json said = read_json(json());
    EXPECT_EQ(said.at("nodes"), 2);
    EXPECT_EQ(said.at("stages").size(), 4U);
    for (const auto& [name, figure] : said.at("figures").items()) EXPECT_NE(figure.at("source"), "measured") << name;
  }
}

TEST_F(ScaleTest, nonsense_is_refused_with_its_name) {
  const std::vector<std::string> plan = {"run", "--dry-run", "--shape", "llama2-7b", "--gpu", "h100"};
  const auto with = [&](std::vector<std::string> more) {
    more.insert(more.begin(), plan.begin(), plan.end());
    return more;
  };
  for (const char* value : {"0", "-1", "100000000"}) {
    refused(with({"--nodes", value}), 64, {"--nodes", value});
    refused(with({"--gpus-per-node", value}), 64, {"--gpus-per-node", value});
  }
  refused(with({"--nodes", "two"}), 64, {"two"});
  refused(with({"--ranks-per-node", "2"}), 64, {"--ranks-per-node"});
  refused(with({"--model", demo_model("prose-llama").string()}), 64, {"--shape"});
  refused({"run", "--dry-run", "--gpu", "b300", "--shape", "llama2-7b"}, 64, {"b300", "h100"});
  refused({"run", "--dry-run", "--gpu", "h100", "--shape", "llama9"}, 64, {"llama9", "llama2-70b"});
  refused({"run", "--dry-run", "--gpu", "h100"}, 64, {"--config", "--shape"});
  refused({"run", "--dry-run", "--gpu", "cpu", "--shape", "llama2-7b"}, 64, {"headfold bench"});
  refused({"run", "--gpu", "h100", "--shape", "llama2-7b"}, 64, {"--dry-run"});
  refused({"run", "--dry-run"}, 64, {"--config"});
  refused({"run", "--dry-run", "--rates", rates(), "--shape", "llama2-7b"}, 74, {rates()});
  write_file(rates(), R"({"format": "headfold-rates", "format_version": 1, "device": "cpu", "cores": 2, "threads": 1,
    "node_memory_bytes": 1e10, "figures": {"memory": {"value": 1e10, "unit": "B/s"}}})");
  refused({"run", "--dry-run", "--rates", rates(), "--shape", "llama2-7b"}, 64, {rates(), "headfold bench"});
  refused({"run", "--dry-run", "--rates", rates(), "--gpu", "h100", "--shape", "llama2-7b"}, 65, {rates(), "device"});
  refused({"run", "--dry-run", "--rates", rates(), "--gpus-per-node", "2", "--shape", "llama2-7b"}, 64,
          {"--gpus-per-node"});
  // What the jobs refuse, their predictions refuse.
  for (const auto& [section, option, value] :
       {std::tuple("calibrate", "pipeline-ranks", "-1"), std::tuple("calibrate", "attention-statistics", "maybe"),
        std::tuple("calibrate", "half-samples", "perhaps"), std::tuple("calibrate", "rotated-keys", "on"),
        std::tuple("convert half", "held-out", "sometimes"),
        std::tuple("finetune healed", "steps", "9223372036854775807"), std::tuple("finetune healed", "dropout", "2"),
        std::tuple("finetune healed", "epochs", "1e+300"), std::tuple("finetune healed", "temperature", "0"),
        std::tuple("evaluate text", "limit", "nan"), std::tuple("evaluate text", "pipeline-ranks", "-2")}) {
    std::string text = "[run]\nfolder = results\nmodel = " + demo_model("prose-llama").string() + "\n";
    for (const std::string one : {"calibrate", "convert half", "finetune healed", "evaluate text"}) {
      text += fmt::format("[{}]\n{}", one,
                          one == "calibrate"         ? "data = a.txt\n"
                          : one == "convert half"    ? "ratio = 0.5\n"
                          : one == "finetune healed" ? "of = half\ndata = a.txt\n"
                                                     : "models = half\ndata = a.txt\n");
      if (one == section) text += fmt::format("{} = {}\n", option, value);
    }
    write_file(scratch_ / "odd.ini", text);
    refused({"run", "--dry-run", "--config", scratch_ / "odd.ini", "--gpu", "h100"}, 64,
            {std::string("--") + option, value});
  }
  refused({"bench", "--repeat", "0"}, 64, {"--repeat"});
  refused({"bench", "--seq-len", "-1"}, 64, {"--seq-len"});
  refused({"bench", "--shape", "llama9"}, 64, {"llama9"});
  refused({"bench", "--dtype", "int8"}, 64, {"int8"});
}

}  // namespace
}  // namespace headfold::end_to_end
