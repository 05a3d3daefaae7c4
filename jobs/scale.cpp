#include "scale.h"

#include <headfold/base/files.h>
#include <headfold/base/log.h>
#include <headfold/base/table.h>
#include <headfold/device/device.h>
#include <headfold/finetune/trainable.h>
#include <headfold/folding/plan.h>
#include <headfold/scale/predict.h>

#include <algorithm>
#include <cmath>
#include <iostream>
#include <map>
#include <sstream>

#include "convert_options.h"
#include "values.h"

namespace headfold::jobs {
namespace {

using checkpoint::ModelConfig;

/// What a text is taken to hold where nobody has tokenised it, and WikiText-2's test set for a text that is not there.
constexpr double kBytesPerToken = 4, kAbsentTokens = 341469;

double text_bytes(const po::variables_map& values) {
  double bytes = 0;
  std::error_code code;
  for (const fs::path& file : paths(values, "data"))
    if (fs::is_regular_file(file, code)) bytes += static_cast<double>(fs::file_size(file, code));
  return bytes;
}

/// A number from `least` on that a prediction can reckon with.
std::int64_t amount(const po::variables_map& values, const char* name, std::int64_t least) {
  constexpr std::int64_t kMost = std::int64_t{1} << 40;
  const std::int64_t value = at_least(values, name, least);
  if (value > kMost) throw UsageError(fmt::format("--{} {}: at most {}", name, value, kMost));
  return value;
}

/// Turns elements into predictions; knows the models that earlier elements make.
class Planner {
 public:
  Planner(scale::Rates rates, scale::Cluster cluster, std::optional<ModelConfig> original)
      : rates_(std::move(rates)), cluster_(cluster), original_(std::move(original)) {}

  std::vector<scale::Prediction> predict(const std::vector<PredictedElement>& elements) {
    std::vector<scale::Prediction> all;
    for (const PredictedElement& element : elements) {
      notes_.clear();
      check(element);
      std::optional<scale::Prediction> one;
      if (element.stage == "calibrate") one = calibrate(element);
      if (element.stage == "convert") one = convert(element);
      if (element.stage == "finetune") one = finetune(element);
      if (element.stage == "evaluate") one = evaluate(element);
      if (!one) continue;  // the report takes seconds and is not predicted
      one->name = element.name;
      one->notes.insert(one->notes.end(), notes_.begin(), notes_.end());
      all.push_back(std::move(*one));
    }
    return all;
  }

 private:
  /// What the job itself refuses because of its arguments alone.
  void check(const PredictedElement& element) {
    const Job& job = find_job(element.stage);
    if (job.check == nullptr) return;
    const auto model = std::find(element.arguments.begin(), element.arguments.end(), "--model");
    if (model == element.arguments.end() || model + 1 == element.arguments.end()) return;
    Planned planned;
    planned.model = *(model + 1);
    planned.original = config_of(planned.model);
    planned.is_made = [](const fs::path&) { return true; };
    job.check(planned, element.arguments);
  }

  ModelConfig config_of(const fs::path& folder) {
    const std::string key = folder.lexically_normal().string();
    if (const auto found = models_.find(key); found != models_.end()) return found->second;
    if (original_) return *original_;
    return checkpoint::read_config(folder);
  }
  at::ScalarType dtype_of(const po::variables_map& values, const ModelConfig& config) const {
    const auto text = values["dtype"].as<std::string>();
    if (text == "auto" && rates_.cores == 0) return config.dtype == "float32" ? at::kFloat : at::kBFloat16;
    return parse_dtype(text, config.dtype);
  }
  std::int64_t clipped(std::int64_t length, const ModelConfig& config) {
    if (length > config.max_positions) notes_.push_back(fmt::format("sequences of {} tokens", config.max_positions));
    return std::min(length, config.max_positions);
  }
  /// Tokens of --data; says what was taken for granted.
  double tokens_of(const po::variables_map& values) {
    const double bytes = text_bytes(values);
    if (bytes > 0) {
      notes_.push_back(fmt::format("text of {}: {:g} bytes per token assumed", human_bytes(bytes), kBytesPerToken));
      return bytes / kBytesPerToken;
    }
    notes_.push_back(fmt::format("the text is not there: {:.0f} tokens assumed", kAbsentTokens));
    return kAbsentTokens;
  }

  scale::Prediction calibrate(const PredictedElement& element) {
    const po::variables_map values = read_values("calibrate", calibrate_options(), element.arguments);
    scale::CalibrateStage stage;
    stage.config = config_of(values["model"].as<std::string>());
    stage.samples = amount(values, "samples", 1);
    stage.settings.length = clipped(amount(values, "seq-len", 2), stage.config);
    calibration::CollectOptions& collect = stage.settings.collect;
    collect.micro_batch = std::min(amount(values, "micro-batch", 1), stage.samples);
    collect.dtype = dtype_of(values, stage.config);
    if (values["streamed"].as<bool>()) collect.residency = model::Residency::streamed;
    collect.rotated_keys = is_yes(values, "rotated-keys");
    collect.values = is_yes(values, "value-gram");
    collect.half_samples = is_on(values, "half-samples");
    collect.attended_heads = amount(values, "attended-heads", 0);
    const auto attention = values["attention-statistics"].as<std::string>();
    collect.attention_statistics = attention == "auto"
                                       ? scale::collects_attention(stage.config, collect, stage.settings.length)
                                       : is_on(values, "attention-statistics");
    stage.stages = values["pipeline-ranks"].as<int>();
    stage.data_bytes = text_bytes(values);
    statistics_ = calibration::collected_shape(stage.config, collect, stage.settings.length);
    return scale::predict(rates_, cluster_, stage);
  }

  scale::Prediction convert(const PredictedElement& element) {
    const po::variables_map values = read_values("convert", convert_options(), element.arguments);
    scale::ConvertStage stage;
    stage.config = config_of(values["model"].as<std::string>());
    const folding::FoldOptions fold = fold_options(values, stage.config);
    folding::check_options(fold, stage.config);
    stage.kv_heads = fold.kv_heads;
    if (values.count("calibration") > 0) {
      const fs::path file = values["calibration"].as<std::string>();
      if (statistics_)
        stage.shape = *statistics_;
      else if (fs::exists(file))
        stage.shape = calibration::StatisticsFile(file).header().shape();
      else
        stage.shape =
            calibration::collected_shape(stage.config, {}, std::min<std::int64_t>(2048, stage.config.max_positions));
    }
    stage.held_out = is_on(values, "held-out");
    if (values.count("refit") > 0 || fold.grouping == folding::Grouping::search ||
        fold.allocation != folding::Allocation::uniform || fold.polish > 0)
      notes_.emplace_back("--refit, --grouping search, --budget and --polish are not predicted: the fold alone");
    if (!element.output.empty())
      models_[element.output.lexically_normal().string()] = scale::folded(stage.config, fold.kv_heads);
    return scale::predict(rates_, cluster_, stage);
  }

  scale::Prediction finetune(const PredictedElement& element) {
    const po::variables_map values = read_values("finetune", finetune_options(), element.arguments);
    scale::FinetuneStage stage;
    stage.config = config_of(values["model"].as<std::string>());
    if (values.count("teacher") > 0 && values.count("cache-teacher") == 0)
      stage.teacher = config_of(values["teacher"].as<std::string>());
    if (values.count("cache-teacher") > 0) notes_.emplace_back("filling the teacher's cache is not predicted");
    stage.lora.dropout = values["dropout"].as<double>();
    stage.lora.rank = amount(values, "rank", 1);
    stage.lora.full = values["full"].as<bool>();
    stage.lora.targets.clear();
    std::istringstream names(values["targets"].as<std::string>());
    for (std::string name; std::getline(names, name, ',');)
      if (!name.empty()) stage.lora.targets.push_back(name);
    stage.dtype = dtype_of(values, stage.config);
    stage.batch = amount(values, "batch", 1);
    stage.micro_batch = std::min(amount(values, "micro-batch", 1), stage.batch);
    stage.length = clipped(amount(values, "seq-len", 2), stage.config);
    stage.steps = amount(values, "steps", 0);
    stage.data_bytes = text_bytes(values);
    if (stage.steps == 0) {
      const double sequences = values["epochs"].as<double>() * tokens_of(values) / static_cast<double>(stage.length);
      stage.steps = std::max<std::int64_t>(1, std::llround(sequences / static_cast<double>(stage.batch)));
    }
    stage.checkpoint_every = amount(values, "checkpoint-every", 0);
    stage.keep_activations = values["keep-activations"].as<bool>();
    stage.shard_optimizer = values["shard-optimizer"].as<bool>();
    stage.merge = values["merge"].as<bool>();
    if (values.count("validation") > 0) {
      stage.validation_sequences = amount(values, "validation-sequences", 0);
      const std::int64_t every = amount(values, "validate-every", -1);
      const std::int64_t period = every >= 0 ? every : std::max<std::int64_t>(1, stage.steps / 10);
      stage.validations = 1 + (period > 0 ? stage.steps / period : 1);
    }
    if (!element.output.empty()) models_[(element.output / "merged").lexically_normal().string()] = stage.config;
    return scale::predict(rates_, cluster_, stage);
  }

  std::optional<scale::Prediction> evaluate(const PredictedElement& element) {
    const po::variables_map values = read_values("evaluate", evaluate_job_options(), element.arguments);
    scale::EvaluateStage stage;
    stage.config = config_of(values["model"].as<std::string>());
    if (values.count("reference") > 0) stage.reference = config_of(values["reference"].as<std::string>());
    stage.dtype = dtype_of(values, stage.config);
    stage.length = clipped(amount(values, "seq-len", 2), stage.config);
    stage.micro_batch = amount(values, "micro-batch", 0);
    stage.stages = values["pipeline-ranks"].as<int>();
    stage.streamed = values["streamed"].as<bool>();
    stage.data_bytes = text_bytes(values);
    if (values.count("tasks") > 0) {
      const auto tasks = values["tasks"].as<std::vector<std::string>>();
      if (std::any_of(tasks.begin(), tasks.end(),
                      [](const std::string& t) { return t != "ppl_blocks" && t != "rolling"; }))
        notes_.emplace_back("questions of benchmark tasks are not predicted: texts alone");
      if (values.count("data") == 0) {
        scale::Prediction none;
        none.stage = "evaluate";
        none.binds = "-";
        return none;
      }
    }
    const double limit = values["limit"].as<double>();
    stage.windows =
        limit >= 1 ? std::llround(limit)
                   : std::llround((limit > 0 ? limit : 1.0) * tokens_of(values) / static_cast<double>(stage.length));
    return scale::predict(rates_, cluster_, stage);
  }

  scale::Rates rates_;
  scale::Cluster cluster_;
  std::optional<ModelConfig> original_;  ///< --shape or --model: stands for every folder that no element makes
  std::optional<calibration::StatisticsShape> statistics_;
  std::map<std::string, ModelConfig> models_;
  std::vector<std::string> notes_;
};

/// The chain with default options: what `run` would do with one fold to half of the KV heads.
std::vector<PredictedElement> default_chain() {
  const fs::path half = "/half";
  return {{"calibrate", "calibrate", {"--model", "/original", "--data", "/text", "--out", "/calibration.h5"}, {}},
          {"convert",
           "convert to half",
           {"--model", "/original", "--calibration", "/calibration.h5", "--ratio", "0.5", "--out", half.string()},
           half},
          {"finetune",
           "finetune, 100 steps",
           {"--model", half.string(), "--data", "/text", "--steps", "100", "--out", "/healed"},
           "/healed"},
          {"evaluate", "evaluate, WikiText-2", {"--model", half.string(), "--data", "/text", "--out", "/results"}, {}}};
}

scale::Rates rates_of(const po::variables_map& values) {
  const bool has_file = values.count("rates") > 0, has_gpu = values.count("gpu") > 0;
  const std::string gpu = has_gpu ? values["gpu"].as<std::string>() : "cpu";
  if (has_gpu && gpu != "cpu") scale::sheet_rates(gpu);  // refuses unknown names before files are read
  if (!has_file) {
    if (gpu != "cpu") return scale::sheet_rates(gpu);
    throw UsageError("a prediction for processors needs measured rates",
                     "headfold bench --out rates.json, then --rates rates.json; or --gpu h100 for a data sheet");
  }
  const fs::path file = values["rates"].as<std::string>();
  scale::Rates rates = scale::read_rates(file);
  if (has_gpu && rates.device != gpu)
    throw InputError(fmt::format("{}: key \"device\" is \"{}\", --gpu says {}", file.string(), rates.device, gpu),
                     "leave --gpu out, or measure that device");
  return rates;
}

scale::Cluster cluster_of(const po::variables_map& values, const scale::Rates& rates) {
  const auto number = [&](const char* name, std::int64_t most) {
    const std::int64_t value = at_least(values, name, 1);
    if (value > most) throw UsageError(fmt::format("--{} {}: at most {}", name, value, most));
    return static_cast<int>(value);
  };
  scale::Cluster cluster;
  cluster.nodes = values.count("nodes") > 0 ? number("nodes", 65536) : 1;
  const bool cpu = rates.device == "cpu";
  if (values.count(cpu ? "gpus-per-node" : "ranks-per-node") > 0)
    throw UsageError(cpu ? "--gpus-per-node has no meaning for processors" : "--ranks-per-node has no meaning for GPUs",
                     cpu ? "use --ranks-per-node" : "one rank runs on each GPU: use --gpus-per-node");
  const char* ranks = cpu ? "ranks-per-node" : "gpus-per-node";
  if (values.count(ranks) > 0)
    cluster.ranks_per_node = number(ranks, 1024);
  else
    // Rates of one rank know no links.
    cluster.ranks_per_node = !cpu ? 8 : rates.has("inside") ? std::max(1, rates.cores / rates.threads) : 1;
  cluster.process_bytes = static_cast<double>(finetune::process_bytes());
  return cluster;
}

std::string bytes(double count) {
  return count > 0 ? human_bytes(count) : "-";
}

void print(const scale::Rates& rates, const scale::Cluster& cluster, const std::vector<scale::Prediction>& all) {
  std::string device =
      rates.device == "cpu"
          ? fmt::format("{} ranks of {} thread(s) on {} cores", cluster.ranks_per_node, rates.threads, rates.cores)
          : fmt::format("{} x {}", cluster.ranks_per_node,
                        scale::sheets().at(rates.device).at("name").get<std::string>());
  std::cout << fmt::format("cluster     {} node(s), each {}\nrates       {}\n", cluster.nodes, device,
                           rates.file.empty()
                               ? fmt::format("data sheets and assumed shares, none measured: {}",
                                             scale::sheets().at(rates.device).at("source").get<std::string>())
                               : rates.file);
  Table table(
      {"stage", "time", "binds", "ranks", "device", "host", "inside", "network", "read", "written", "bubble", "PFLOP"});
  double seconds = 0;
  for (const scale::Prediction& p : all) {
    seconds += p.seconds;
    table.add({p.name, human_seconds(p.seconds), p.binds,
               p.stages > 1 ? fmt::format("{} x {}", p.replicas, p.stages) : std::to_string(p.replicas),
               bytes(p.device_memory), bytes(p.host_memory), bytes(p.moved.inside), bytes(p.moved.network),
               bytes(p.moved.read), bytes(p.moved.written), fmt::format("{:.1f} %", 100 * p.bubble),
               fmt::format("{:.3g}", p.flops / 1e15)});
  }
  std::cout
      << "\nranks: replicas x stages; device and host: memory of the rank that needs most; inside, network, read, "
         "written: bytes of all ranks\n"
      << table.text() << fmt::format("all stages  {}\n", human_seconds(seconds));
  for (const scale::Prediction& p : all) {
    Table parts({"part", "seconds", "share", "binds", "figure", "value", "source"});
    for (const scale::Part& part : p.parts) {
      const bool known = rates.has(part.figure);
      parts.add({part.what, fmt::format("{:.4g}", part.seconds),
                 fmt::format("{:.1f} %", 100 * part.seconds / p.seconds), part.binds,
                 part.figure.empty() ? "-" : part.figure,
                 known ? fmt::format("{:.4g} {}", rates.value(part.figure), rates.at(part.figure).unit) : "-",
                 known                 ? rates.at(part.figure).source
                 : part.figure.empty() ? "-"
                                       : "assumed"});
    }
    std::cout << fmt::format("\n{}\n{}", p.name, parts.text());
    for (const std::string& note : p.notes) std::cout << "note: " << note << '\n';
  }
  std::cout << "\ndry run: nothing was loaded or written\n" << std::flush;
}

OrderedJson json_of(const scale::Rates& rates, const scale::Cluster& cluster,
                    const std::vector<scale::Prediction>& all) {
  OrderedJson json;
  json["format"] = "headfold-prediction";
  json["format_version"] = 1;
  json["device"] = rates.device;
  json["rates_file"] = rates.file.empty() ? OrderedJson() : OrderedJson(fs::path(rates.file).filename().string());
  json["nodes"] = cluster.nodes;
  json["ranks_per_node"] = cluster.ranks_per_node;
  json["threads"] = rates.threads;
  json["figures"] = OrderedJson::object();
  for (const auto& [name, figure] : rates.figures)
    json["figures"][name] = OrderedJson{{"value", figure.value}, {"unit", figure.unit}, {"source", figure.source}};
  json["stages"] = OrderedJson::array();
  double seconds = 0;
  for (const scale::Prediction& p : all) {
    seconds += p.seconds;
    json["stages"].push_back(scale::to_json(p));
  }
  json["seconds"] = seconds;
  return json;
}

}  // namespace

po::options_description scale_options() {
  po::options_description own("prediction (with --dry-run)");
  own.add_options()("nodes", po::value<std::int64_t>(), "predict the run on so many nodes")(
      "gpus-per-node", po::value<std::int64_t>(), "GPUs of a node, one rank each (default 8)")(
      "ranks-per-node", po::value<std::int64_t>(),
      "--gpu cpu: ranks of a node (default: as many as its cores allow, 1 where one measured the rates)")(
      "gpu", po::value<std::string>(), "a100, h100 or h200 (data sheets), or cpu (needs --rates)")(
      "rates", po::value<std::string>(), "measured rates: a file of headfold bench")(
      "model", po::value<std::string>(), "model folder that stands for the configuration's")(
      "shape", po::value<std::string>(),
      "the same by shape: llama2-7b, llama2-13b, llama2-70b, bloomz-7b1, or a config.json");
  return own;
}

bool asks_for_prediction(const po::variables_map& values) {
  const po::options_description own = scale_options();
  for (const auto& option : own.options())
    if (values.count(option->long_name()) > 0) return true;
  return false;
}

void predict_run(const po::variables_map& values, std::vector<PredictedElement> elements) {
  if (values.count("model") > 0 && values.count("shape") > 0)
    throw UsageError("--model and --shape say the same thing; give one of them");
  const scale::Rates rates = rates_of(values);
  const scale::Cluster cluster = cluster_of(values, rates);
  std::optional<ModelConfig> original;
  if (values.count("model") > 0) original = checkpoint::read_config(values["model"].as<std::string>());
  if (values.count("shape") > 0) {
    const auto shape = values["shape"].as<std::string>();
    original = checkpoint::parse_config(read_shape(shape), shape);
  }
  if (elements.empty()) {
    if (!original) throw UsageError("a prediction needs --config, --model or --shape", "for example --shape llama2-7b");
    elements = default_chain();
  }
  const std::vector<scale::Prediction> all = Planner(rates, cluster, original).predict(elements);
  const bool to_output = values.count("json") > 0 && values["json"].as<std::string>().empty();
  if (to_output) {
    std::cout << json_of(rates, cluster, all).dump(2) << '\n' << std::flush;
    return;
  }
  print(rates, cluster, all);
  if (values.count("json") > 0) write_json(fs::path(values["json"].as<std::string>()), json_of(rates, cluster, all));
}

}  // namespace headfold::jobs
