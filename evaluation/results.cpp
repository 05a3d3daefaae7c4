#include <headfold/base/files.h>
#include <headfold/base/hash.h>
#include <headfold/base/table.h>
#include <headfold/base/version.h>
#include <headfold/calibration/text.h>
#include <headfold/evaluation/results.h>
#include <headfold/model/compute.h>

#include <chrono>
#include <cmath>
#include <ctime>

namespace headfold::evaluation {
namespace {

/// JSON text that never throws: text files may hold bytes that are no UTF-8.
std::string dump(const OrderedJson& value, int indent) {
  return value.dump(indent, ' ', false, OrderedJson::error_handler_t::replace);
}

/// A float as Python's str() writes it: the shortest form that reads back, with a point or an exponent.
std::string python_float(double value) {
  if (!std::isfinite(value)) return std::isnan(value) ? "nan" : value > 0 ? "inf" : "-inf";
  std::string text = fmt::format("{}", value);
  if (text.find_first_of(".e") == std::string::npos) text += ".0";
  return text;
}

/// A version as the harness holds it: a number.
OrderedJson version_number(const std::string& text) {
  const bool plain = !text.empty() && text.find_first_not_of("0123456789.") == std::string::npos;
  if (!plain || std::count(text.begin(), text.end(), '.') > 1) return text;
  if (text.find('.') == std::string::npos) return std::stoll(text);
  return std::stod(text);
}

/// Infinity has no JSON form; a perplexity beyond float64 becomes null.
OrderedJson number(double value) {
  return std::isfinite(value) ? OrderedJson(value) : OrderedJson(nullptr);
}

bool higher_is_better(const std::string& metric) {
  return metric == "top1_agreement";
}

/// [text, "id"] of a special token as tokenizer_config.json or special_tokens_map.json names it, else as the tokenizer
/// itself does; null where there is none.
OrderedJson special_token(const fs::path& folder, const std::string& key, const tokenizer::Tokenizer& tokenizer,
                          std::int64_t id) {
  OrderedJson text = nullptr;
  for (const char* name : {"tokenizer_config.json", "special_tokens_map.json"}) {
    if (!text.is_null() || !fs::exists(folder / name)) continue;
    const Json file = read_json(folder / name);
    if (!file.is_object() || !file.contains(key)) continue;
    const Json& value = file.at(key);
    if (value.is_string()) text = value.get<std::string>();
    if (value.is_object() && value.contains("content") && value.at("content").is_string())
      text = value.at("content").get<std::string>();
  }
  if (text.is_null() && id < 0) return nullptr;
  if (text.is_null()) text = tokenizer.token_text(id);
  return OrderedJson::array({text, id < 0 ? OrderedJson(nullptr) : OrderedJson(std::to_string(id))});
}

OrderedJson sample_line(std::int64_t index, const OrderedJson& document, const std::string& target,
                        const std::string& prompt, double log_likelihood) {
  OrderedJson line;
  line["doc_id"] = index;
  line["doc"] = document;
  line["target"] = target;
  line["arguments"] = {{"gen_args_0", {{"arg_0", prompt}}}};
  const std::string response = fmt::format("{}", log_likelihood);
  line["resps"] = OrderedJson::array({OrderedJson::array({response})});
  line["filtered_resps"] = OrderedJson::array({response});
  line["filter"] = "none";
  line["metrics"] = OrderedJson::array();
  line["doc_hash"] = sha256_hex(dump(document, 2));
  line["prompt_hash"] = sha256_hex(prompt);
  line["target_hash"] = sha256_hex(target);
  return line;
}

}  // namespace

double TaskResult::perplexity() const {
  return std::exp(totals.mean_loss());
}
double TaskResult::word_perplexity() const {
  return std::exp(totals.loss / static_cast<double>(words));
}
double TaskResult::byte_perplexity() const {
  return std::exp(totals.loss / static_cast<double>(bytes));
}
double TaskResult::bits_per_byte() const {
  return totals.loss / static_cast<double>(bytes) / std::log(2.0);
}

std::vector<std::pair<std::string, double>> TaskResult::metrics() const {
  std::vector<std::pair<std::string, double>> list;
  if (task->kind == TaskKind::blocks) {
    list = {{"perplexity", perplexity()}, {"loss", totals.mean_loss()}};
  } else {
    list = {{"word_perplexity", word_perplexity()},
            {"byte_perplexity", byte_perplexity()},
            {"bits_per_byte", bits_per_byte()}};
  }
  if (has_reference) {
    list.emplace_back("kl", totals.mean_divergence());
    list.emplace_back("top1_agreement", totals.agreement());
    if (task->kind == TaskKind::blocks)
      list.emplace_back("reference_perplexity", std::exp(totals.mean_reference_loss()));
  }
  return list;
}

TaskResult make_result(const Task& task, std::vector<WindowScore> scores, bool has_reference) {
  TaskResult result;
  result.task = &task;
  result.scores = std::move(scores);
  result.totals = total(result.scores);
  for (const Document& document : task.documents) {
    result.words += document.words;
    result.bytes += document.bytes;
  }
  result.has_reference = has_reference;
  return result;
}

BenchmarkResult make_result(const BenchmarkTask& task, std::vector<Answer> answers) {
  BenchmarkResult result;
  result.task = &task;
  result.answers = std::move(answers);
  result.scored = task.score(task, result.answers);
  return result;
}

std::vector<OrderedJson> sample_lines(const BenchmarkResult& result) {
  const BenchmarkTask& task = *result.task;
  std::vector<std::vector<std::size_t>> requests(task.documents.size());
  for (std::size_t r = 0; r < task.requests.size(); ++r)
    requests.at(static_cast<std::size_t>(task.requests[r].document)).push_back(r);
  const bool generates = task.output_type == "generate_until";
  const OrderedJson kwargs =
      task.config.contains("generation_kwargs") ? task.config["generation_kwargs"] : OrderedJson::object();
  std::vector<OrderedJson> lines;
  lines.reserve(result.scored.samples.size());
  for (const Sample& sample : result.scored.samples) {
    const auto index = static_cast<std::size_t>(sample.document);
    const BenchmarkDocument& document = task.documents.at(index);
    OrderedJson arguments = OrderedJson::object();
    OrderedJson responses = OrderedJson::array();
    OrderedJson filtered = OrderedJson::array();
    OrderedJson tokens = OrderedJson::array();
    for (std::size_t i = 0; i < requests[index].size(); ++i) {
      const Request& request = task.requests[requests[index][i]];
      const Answer& answer = result.answers[requests[index][i]];
      arguments[fmt::format("gen_args_{}", i)] = {{"arg_0", request.context},
                                                  {"arg_1", generates ? kwargs : OrderedJson(request.continuation)}};
      // Every leaf is a text, as the harness writes it.
      const OrderedJson response =
          generates ? OrderedJson(answer.text)
                    : OrderedJson::array({python_float(answer.log_likelihood), answer.greedy ? "True" : "False"});
      responses.push_back(OrderedJson::array({response}));
      if (sample.filtered.empty()) filtered.push_back(response);
      tokens.push_back({{"scored", answer.scored_tokens}, {"context", answer.context_tokens}});
    }
    for (const std::string& text : sample.filtered) filtered.push_back(text);
    const SampleHashes hashes = sample_hashes(task, sample.document);
    OrderedJson line;
    line["doc_id"] = document.id;
    line["doc"] = document.fields;
    line["target"] = document.target;
    line["arguments"] = std::move(arguments);
    line["resps"] = std::move(responses);
    line["filtered_resps"] = std::move(filtered);
    line["filter"] = sample.filter;
    line["metrics"] = OrderedJson::array();
    for (const auto& [name, value] : sample.metrics) line["metrics"].push_back(name);
    line["doc_hash"] = hashes.document;
    line["prompt_hash"] = hashes.prompt;
    line["target_hash"] = hashes.target;
    for (const auto& [name, value] : sample.metrics) line[name] = number(value);
    line["response_tokens"] = std::move(tokens);
    lines.push_back(std::move(line));
  }
  return lines;
}

OrderedJson describe_model(const checkpoint::Reader& reader, at::ScalarType compute_dtype) {
  const checkpoint::ModelConfig& config = reader.config();
  std::int64_t parameters = 0;
  for (const std::string& name : reader.names()) parameters += reader.info(name).elements();
  fs::path folder = fs::weakly_canonical(fs::absolute(reader.folder()));
  if (folder.filename().empty()) folder = folder.parent_path();  // the path ended with a slash
  OrderedJson model;
  model["name"] = folder.filename().string();
  model["folder"] = reader.folder().string();
  model["fingerprint"] = reader.fingerprint();
  // What was done to the weights: SHA-256 of the conversion's record.
  const fs::path record = reader.folder() / "headfold.json";
  model["conversion"] = fs::exists(record) ? OrderedJson(sha256_hex(read_file(record))) : OrderedJson(nullptr);
  model["layout"] = checkpoint::name_of(config.layout);
  model["kv_heads"] = config.kv_heads;
  model["heads"] = config.heads;
  model["dtype"] = compute_dtype == at::kBFloat16 ? "bfloat16" : "float32";
  model["parameters"] = parameters;
  model["cache_bytes_per_token"] = config.cache_bytes_per_token(config.dtype == "float32" ? 4 : 2);
  return model;
}

std::vector<OrderedJson> sample_lines(const TaskResult& result) {
  const Task& task = *result.task;
  std::vector<OrderedJson> lines;
  const auto reference_fields = [&](OrderedJson& line, const WindowScore& sum) {
    if (!result.has_reference) return;
    line["metrics"].push_back("kl");
    line["metrics"].push_back("top1_agreement");
    line["kl"] = sum.tokens > 0 ? number(sum.divergence / static_cast<double>(sum.tokens)) : OrderedJson(nullptr);
    line["top1_agreement"] = sum.tokens > 0
                                 ? number(static_cast<double>(sum.agreements) / static_cast<double>(sum.tokens))
                                 : OrderedJson(nullptr);
  };
  if (task.kind == TaskKind::blocks) {
    for (std::size_t w = 0; w < task.windows.size(); ++w) {
      const WindowScore& score = result.scores[w];
      std::string ids = std::to_string(task.windows[w].inputs.front());
      for (const std::int64_t id : task.windows[w].targets) ids += " " + std::to_string(id);
      const auto index = static_cast<std::int64_t>(w);
      // A window is identified by its place in the stream and the hash of its ids: blocks begin and end inside words.
      const OrderedJson document = {{"window", index},
                                    {"first_token", index * task.max_length},
                                    {"tokens", task.max_length},
                                    {"ids_sha256", sha256_hex(ids)}};
      OrderedJson line = sample_line(index, document, "", ids, -score.loss);
      line["arguments"]["gen_args_0"]["arg_0"] = fmt::format("sha256:{}", sha256_hex(ids));
      line["metrics"] = OrderedJson::array({"perplexity", "loss"});
      line["perplexity"] = number(std::exp(score.loss / static_cast<double>(score.tokens)));
      line["loss"] = number(score.loss / static_cast<double>(score.tokens));
      line["tokens"] = score.tokens;
      reference_fields(line, score);
      lines.push_back(std::move(line));
    }
    return lines;
  }
  std::vector<WindowScore> sums(task.documents.size());
  std::vector<OrderedJson> windows(task.documents.size(), OrderedJson::array());
  for (std::size_t w = 0; w < task.windows.size(); ++w) {
    const WindowScore& score = result.scores[w];
    WindowScore& sum = sums[static_cast<std::size_t>(task.windows[w].document)];
    sum.tokens += score.tokens;
    sum.loss += score.loss;
    sum.divergence += score.divergence;
    sum.agreements += score.agreements;
    windows[static_cast<std::size_t>(task.windows[w].document)].push_back(
        {{"tokens", score.tokens}, {"loss", number(score.loss)}});
  }
  for (std::size_t d = 0; d < task.documents.size(); ++d) {
    const Document& document = task.documents[d];
    const double log_likelihood = -sums[d].loss;
    OrderedJson line =
        sample_line(static_cast<std::int64_t>(d), {{task.name == "wikitext" ? "page" : "text", document.original}},
                    document.scored, document.scored, log_likelihood);
    line["metrics"] = OrderedJson::array({"word_perplexity", "byte_perplexity", "bits_per_byte"});
    // As in the harness: the pair that the aggregation needs.
    line["word_perplexity"] = OrderedJson::array({number(log_likelihood), document.words});
    line["byte_perplexity"] = OrderedJson::array({number(log_likelihood), document.bytes});
    line["bits_per_byte"] = OrderedJson::array({number(log_likelihood), document.bytes});
    line["windows"] = windows[d];
    reference_fields(line, sums[d]);
    lines.push_back(std::move(line));
  }
  return lines;
}

OrderedJson harness_results(const RunInfo& run, const Results& all) {
  const fs::path& folder = run.model->folder();
  const OrderedJson model = describe_model(*run.model, run.dtype);
  OrderedJson file;
  for (const char* key : {"results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better",
                          "n-samples", "config"})
    if (std::string_view(key) != "groups" || !all.groups.empty()) file[key] = OrderedJson::object();
  OrderedJson hashes = OrderedJson::object();
  for (const TaskResult& result : all.texts) {
    const Task& task = *result.task;
    OrderedJson values = {{"name", task.name}, {"alias", task.name}, {"sample_len", task.items}};
    OrderedJson metric_list = OrderedJson::array();
    OrderedJson better = OrderedJson::object();
    for (const auto& [metric, value] : result.metrics()) {
      values[metric + ",none"] = number(value);
      values[metric + "_stderr,none"] = "N/A";
      metric_list.push_back({{"metric", metric}});
      better[metric] = higher_is_better(metric);
    }
    file["results"][task.name] = values;
    file["group_subtasks"][task.name] = OrderedJson::array();
    OrderedJson config;
    config["task"] = task.name;
    config["recipe"] = task.recipe;
    OrderedJson files = OrderedJson::array();
    for (const fs::path& path : task.files) files.push_back(path.filename().string());
    config["data_files"] = files;
    config["data_hash"] =
        task.files.empty() ? OrderedJson(nullptr) : OrderedJson(calibration::data_hash(task.files, task.field));
    config["data_field"] = task.field;
    config["bos"] = name_of(task.bos);
    config["output_type"] = "loglikelihood_rolling";
    config["num_fewshot"] = 0;
    config["metric_list"] = metric_list;
    config["max_length"] = task.max_length;
    config["stream_tokens"] = task.stream_tokens;
    config["scored_tokens"] = result.totals.tokens;
    if (task.kind == TaskKind::rolling) {
      config["words"] = result.words;
      config["bytes"] = result.bytes;
    }
    file["configs"][task.name] = config;
    file["versions"][task.name] = task.name == "wikitext" ? 2.0 : 1.0;
    file["n-shot"][task.name] = 0;
    file["higher_is_better"][task.name] = better;
    file["n-samples"][task.name] = {{"original", task.items_original}, {"effective", task.items}};
    std::string joined;
    for (const OrderedJson& line : sample_lines(result))
      joined += line["doc_hash"].get<std::string>() + line["prompt_hash"].get<std::string>() +
                line["target_hash"].get<std::string>();
    hashes[task.name] = sha256_hex(joined);
  }
  const auto put_metrics = [](OrderedJson& values, const std::vector<Metric>& metrics) {
    OrderedJson better = OrderedJson::object();
    for (const Metric& metric : metrics) {
      values[metric.name + "," + metric.filter] = number(metric.value);
      values[metric.name + "_stderr," + metric.filter] =
          metric.error.has_value() ? number(*metric.error) : OrderedJson("N/A");
      better[metric.name] = metric.higher_is_better;
    }
    return better;
  };
  for (const BenchmarkResult& result : all.benchmarks) {
    const BenchmarkTask& task = *result.task;
    const auto count = std::ssize(task.documents);
    OrderedJson values = {{"name", task.name}, {"alias", task.alias}, {"sample_len", count}};
    file["higher_is_better"][task.name] = put_metrics(values, result.scored.metrics);
    file["results"][task.name] = std::move(values);
    file["group_subtasks"][task.name] = OrderedJson::array();
    file["configs"][task.name] = task.config;
    file["versions"][task.name] = version_number(task.version);
    file["n-shot"][task.name] = task.shots;
    file["n-samples"][task.name] = {{"original", task.documents_original}, {"effective", count}};
    hashes[task.name] = task_hash(task, result.scored.samples);
  }
  for (const GroupResult& group : all.groups) {
    OrderedJson values = {{"name", group.name}, {"alias", group.alias}};
    file["higher_is_better"][group.name] = put_metrics(values, group.metrics);
    values["sample_count"] = OrderedJson::object();
    for (const Metric& metric : group.metrics)
      values["sample_count"][metric.name + "," + metric.filter] = group.sample_count;
    file["results"][group.name] = values;
    file["groups"][group.name] = values;
    file["group_subtasks"][group.name] = group.subtasks;
    file["versions"][group.name] = version_number(group.version);
  }
  OrderedJson& config = file["config"];
  config["model"] = "headfold";
  config["model_args"] = run.model_args;
  config["model_num_parameters"] = model["parameters"];
  config["model_dtype"] = model["dtype"];
  config["model_revision"] = nullptr;
  config["model_sha"] = model["fingerprint"];
  config["batch_size"] = std::to_string(run.micro_batch);
  config["batch_sizes"] = OrderedJson::array();
  config["device"] = model::device_text(model::compute());
  config["use_cache"] = nullptr;
  config["limit"] = run.limit > 0 ? OrderedJson(run.limit) : OrderedJson(nullptr);
  // Perplexities draw nothing at random and have no bootstrapped error bar.
  for (const char* key : {"bootstrap_iters", "gen_kwargs", "random_seed", "numpy_seed", "torch_seed", "fewshot_seed"})
    config[key] = nullptr;
  if (!all.benchmarks.empty()) {
    config["bootstrap_iters"] = run.bootstrap_iterations;
    config["fewshot_seed"] = run.fewshot_seed;
  }
  file["git_hash"] = nullptr;
  file["date"] = run.date;
  file["pretty_env_info"] = run.environment;
  for (const char* key : {"transformers_version", "lm_eval_version", "upper_git_hash"}) file[key] = nullptr;
  const std::int64_t eos = run.tokenizer->eos();
  file["tokenizer_pad_token"] = special_token(folder, "pad_token", *run.tokenizer, -1);
  file["tokenizer_eos_token"] = special_token(folder, "eos_token", *run.tokenizer, eos);
  file["tokenizer_bos_token"] = special_token(folder, "bos_token", *run.tokenizer, run.tokenizer->bos());
  file["eot_token_id"] = eos >= 0 ? OrderedJson(eos) : OrderedJson(nullptr);
  file["max_length"] = run.max_length;
  file["task_hashes"] = hashes;
  file["model_source"] = "headfold";
  file["model_name"] = model["name"];
  file["model_name_sanitized"] = sanitized(model["name"].get<std::string>());
  for (const char* key : {"system_instruction", "system_instruction_sha"}) file[key] = nullptr;
  file["fewshot_as_multiturn"] = false;
  for (const char* key : {"chat_template", "chat_template_sha"}) file[key] = nullptr;
  file["total_evaluation_time_seconds"] = fmt::format("{}", run.seconds);
  file["headfold"] = run.headfold;
  return file;
}

std::string sanitized(const std::string& model_name) {
  std::string result;
  bool in_run = false;
  for (const char c : model_name) {
    const bool bad = std::string_view("\"<>:/|\\?*[]").find(c) != std::string_view::npos;
    if (!bad) result.push_back(c);
    if (bad && !in_run) result += "__";
    in_run = bad;
  }
  return result;
}

std::string file_time() {
  const auto now = std::chrono::system_clock::now();
  const std::time_t seconds = std::chrono::system_clock::to_time_t(now);
  const auto micros = std::chrono::duration_cast<std::chrono::microseconds>(now.time_since_epoch()).count() % 1000000;
  std::tm local{};
  ::localtime_r(&seconds, &local);
  return fmt::format("{:04}-{:02}-{:02}T{:02}-{:02}-{:02}.{:06}", local.tm_year + 1900, local.tm_mon + 1, local.tm_mday,
                     local.tm_hour, local.tm_min, local.tm_sec, micros);
}

std::string results_table(const Results& results) {
  Table table({"task", "version", "filter", "n-shot", "metric", "", "value", "", "stderr"});
  const auto arrow = [](bool higher) { return higher ? "↑" : "↓"; };
  for (const TaskResult& result : results.texts) {
    std::string name = result.task->name;
    for (const auto& [metric, value] : result.metrics()) {
      table.add({name,
                 name.empty()                      ? ""
                 : result.task->name == "wikitext" ? "2"
                                                   : "1",
                 "none", "0", metric, arrow(higher_is_better(metric)), fmt::format("{:.6g}", value), "±", "N/A"});
      name.clear();
    }
  }
  const auto add = [&](std::string name, const std::string& version, const std::string& shots,
                       const std::vector<Metric>& metrics) {
    for (const Metric& metric : metrics) {
      table.add({name, name.empty() ? "" : version, metric.filter, shots, metric.name, arrow(metric.higher_is_better),
                 fmt::format("{:.4f}", metric.value), "±",
                 metric.error.has_value() ? fmt::format("{:.4f}", *metric.error) : std::string("N/A")});
      name.clear();
    }
  };
  for (const BenchmarkResult& result : results.benchmarks)
    add(result.task->name, result.task->version, std::to_string(result.task->shots), result.scored.metrics);
  for (const GroupResult& group : results.groups) add(group.name, group.version, "", group.metrics);
  return table.text();
}

fs::path write_results(const fs::path& folder, const RunInfo& run, const Results& results) {
  const std::string time = file_time();
  const auto write_samples = [&](const std::string& task, const std::vector<OrderedJson>& lines) {
    std::string text;
    for (const OrderedJson& line : lines) text += dump(line, -1) + "\n";
    write_file(folder / fmt::format("samples_{}_{}.jsonl", sanitized(task), time), text);
  };
  for (const TaskResult& result : results.texts) write_samples(result.task->name, sample_lines(result));
  for (const BenchmarkResult& result : results.benchmarks) write_samples(result.task->name, sample_lines(result));
  // The results come last: whoever sees them finds the samples too.
  fs::path path = folder / fmt::format("results_{}.json", time);
  write_file(path, dump(harness_results(run, results), 2) + "\n");
  return path;
}

}  // namespace headfold::evaluation
