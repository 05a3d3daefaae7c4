// headfold inspect: says what a checkpoint, safetensors file, statistics file, plan or result is.

#include <headfold/base/files.h>
#include <headfold/base/log.h>
#include <headfold/base/table.h>
#include <headfold/calibration/statistics.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/checkpoint/reader.h>
#include <headfold/checkpoint/writer.h>

#include <fstream>
#include <iostream>

#include "job.h"

namespace headfold::jobs {
namespace {

/// What was found: the machine's form and the reader's form.
struct Finding {
  OrderedJson facts;
  std::string text;
  std::vector<std::string> problems;  ///< what is wrong with it; ends the job with exit code 65
};

std::string bytes_text(std::uint64_t bytes) {
  return fmt::format("{} ({})", bytes, human_bytes(static_cast<double>(bytes)));
}
std::string short_hash(const std::string& hash) {
  return hash.size() > 16 ? hash.substr(0, 16) + "…" : hash;
}

/// A number of a JSON file that may be absent, as text.
std::string number_text(const Json& object, const std::string& key, const char* format = "{:.5g}") {
  const auto found = object.find(key);
  return found == object.end() || !found->is_number() ? "-" : fmt::format(fmt::runtime(format), found->get<double>());
}

/// A text or number of a JSON file that may be absent.
std::string any_text(const Json& object, const std::string& key) {
  if (!object.is_object()) return "-";
  const auto found = object.find(key);
  if (found == object.end() || found->is_null()) return "-";
  return found->is_string() ? found->get<std::string>() : found->dump();
}

const Json& member(const Json& object, const std::string& key) {
  static const Json none = Json::object();
  if (!object.is_object()) return none;
  const auto found = object.find(key);
  return found == object.end() ? none : *found;
}

// ---- checkpoints ------------------------------------------------------------------------------------------------

std::string rope_text(const checkpoint::ModelConfig& config) {
  if (config.family == checkpoint::Family::bloom) return "ALiBi";
  std::string text = fmt::format("RoPE, theta {}", config.rope_theta);
  if (config.rope_scaling.type != "default")
    text += fmt::format(", {} scaling by {}", config.rope_scaling.type, config.rope_scaling.factor);
  return text;
}

/// Loss per layer, where a file (headfold.json, plan.json) has it.
std::string losses_text(const Json& layers) {
  if (!layers.is_array() || layers.empty()) return {};
  Table table({"layer", "groups", "key relative loss", "value relative loss"});
  for (const Json& layer : layers) {
    if (!layer.is_object()) continue;
    table.add({any_text(layer, "layer"), std::to_string(member(layer, "groups").size()),
               number_text(layer, "key_relative_loss"), number_text(layer, "value_relative_loss")});
  }
  return "\n" + table.text();
}

std::string fold_text(const Json& fold) {
  return fmt::format("keys {} ({}), values {} ({}), sink weight {}, weight ridge {}", any_text(fold, "keys"),
                     any_text(fold, "key_metric"), any_text(fold, "values"), any_text(fold, "value_metric"),
                     any_text(fold, "sink_weight"), any_text(fold, "weight_ridge"));
}

std::string provenance_text(const Json& made) {
  const std::string format = any_text(made, "format");
  if (format == "headfold-synthetic")
    return fmt::format("\nrandom weights: shape {}, seed {}\n", any_text(made, "shape"), any_text(made, "seed"));
  if (format == "headfold-expanded")
    return fmt::format(
        "\ndense equivalent of {} (fingerprint {}), for scoring in stock runtimes\n"
        "cache bytes   {} per token there, {} here: the cache is not smaller\n",
        any_text(member(made, "source"), "folder"), short_hash(any_text(member(made, "source"), "fingerprint")),
        any_text(member(made, "source"), "cache_bytes_per_token"), any_text(made, "cache_bytes_per_token"));
  if (format != "headfold-model") return fmt::format("\nheadfold.json of unknown format {}\n", format);
  const Json& statistics = member(made, "statistics");
  std::string text = fmt::format("\nfolded from   {} (fingerprint {})\n", any_text(member(made, "source"), "folder"),
                                 short_hash(any_text(member(made, "source"), "fingerprint")));
  text += fmt::format("fold          {}\n", fold_text(member(made, "fold")));
  if (statistics.is_object() && !statistics.empty())
    text += fmt::format("statistics    {} ({})\n", any_text(statistics, "file"),
                        short_hash(any_text(statistics, "content_hash")));
  text += fmt::format("KV heads      {} -> {}\n", any_text(member(made, "kv_heads"), "before"),
                      any_text(member(made, "kv_heads"), "after"));
  text += fmt::format("cache bytes   {} -> {} per token\n", any_text(member(made, "cache_bytes_per_token"), "before"),
                      any_text(member(made, "cache_bytes_per_token"), "after"));
  text += fmt::format("stock loader  {}\n", any_text(made, "stock") == "true" ? "yes" : "no: needs headfold");
  return text + losses_text(member(made, "layers"));
}

/// Table of what every layer caches, when layers differ or cache latents.
std::string cached_text(const checkpoint::ModelConfig& config) {
  if (config.layer_shapes.empty()) return {};
  const bool latent = config.layout == checkpoint::KvLayout::latent;
  Table table({"layer", latent ? "latents" : "KV heads", "key channels", "value channels", "cached per token"});
  for (std::size_t i = 0; i < config.layer_shapes.size(); ++i) {
    const checkpoint::LayerShape& shape = config.layer_shapes[i];
    table.add({std::to_string(i), std::to_string(shape.kv_heads), std::to_string(shape.key_width),
               std::to_string(shape.value_width),
               fmt::format("{} numbers", shape.kv_heads * (shape.key_width + shape.value_width))});
  }
  return "\n" + table.text();
}

Finding inspect_model(const fs::path& folder) {
  const checkpoint::Reader reader(folder);
  const checkpoint::ModelConfig& config = reader.config();
  Finding finding;
  finding.problems = checkpoint::layout_problems(reader);
  const std::int64_t element = config.dtype == "float32" ? 4 : 2;
  std::map<std::string, std::int64_t> dtypes;
  std::map<std::string, std::int64_t> tensors_in;
  for (const std::string& name : reader.names()) {
    ++dtypes[reader.info(name).dtype];
    ++tensors_in[reader.file_of(name).filename().string()];
  }
  OrderedJson& facts = finding.facts;
  facts["kind"] = "model";
  facts["folder"] = folder.string();
  facts["family"] = checkpoint::name_of(config.family);
  facts["layout"] = checkpoint::name_of(config.layout);
  facts["layers"] = config.layers;
  facts["hidden"] = config.hidden;
  facts["heads"] = config.heads;
  facts["kv_heads"] = config.kv_heads;
  facts["source_kv_heads"] = config.source_kv_heads;
  if (!config.layer_shapes.empty()) {
    facts["cached_per_layer"] = OrderedJson::array();
    for (const checkpoint::LayerShape& shape : config.layer_shapes)
      facts["cached_per_layer"].push_back(
          {{"kv_heads", shape.kv_heads}, {"key_width", shape.key_width}, {"value_width", shape.value_width}});
  }
  facts["head_dim"] = config.head_dim;
  facts["ffn"] = config.ffn;
  facts["vocab"] = config.vocab;
  facts["max_positions"] = config.max_positions;
  facts["tied_embeddings"] = config.tied_embeddings;
  facts["positions"] = rope_text(config);
  facts["dtype"] = config.dtype;
  facts["stored_dtypes"] = dtypes;
  facts["parameters"] = checkpoint::parameter_count(config);
  facts["bytes"] = reader.total_bytes();
  facts["cache_bytes_per_token"] = config.cache_bytes_per_token(element);
  facts["fingerprint"] = reader.fingerprint();
  facts["files"] = OrderedJson::array();
  Table files({"file", "bytes", "tensors"});
  for (const fs::path& file : reader.files()) {
    const std::string name = file.filename().string();
    facts["files"].push_back({{"name", name}, {"bytes", fs::file_size(file)}, {"tensors", tensors_in[name]}});
    files.add({name, bytes_text(fs::file_size(file)), std::to_string(tensors_in[name])});
  }
  facts["companions"] = OrderedJson::array();
  std::string companions;
  for (const fs::path& file : checkpoint::companion_files(folder)) {
    facts["companions"].push_back(file.filename().string());
    companions += (companions.empty() ? "" : ", ") + file.filename().string();
  }
  facts["headfold"] = nullptr;
  std::string provenance;
  if (fs::exists(folder / "headfold.json")) {
    const Json made = read_json(folder / "headfold.json", std::uint64_t{256} << 20);
    facts["headfold"] = made;
    provenance = provenance_text(made);
  }
  facts["problems"] = finding.problems;

  std::string stored;
  for (const auto& [dtype, count] : dtypes)
    stored += fmt::format("{}{} x {}", stored.empty() ? "" : ", ", count, dtype);
  std::string kv = config.kv_heads_text();
  if (config.layout == checkpoint::KvLayout::projected) kv += fmt::format(" projected from {}", config.source_kv_heads);
  if (config.layout == checkpoint::KvLayout::latent)
    kv = fmt::format("{} (rebuilt from latents)", config.source_kv_heads);
  std::string& text = finding.text;
  text += fmt::format("model         {}\n", folder.string());
  text += fmt::format("family        {}, layout {}, {}\n", checkpoint::name_of(config.family),
                      checkpoint::name_of(config.layout), rope_text(config));
  text += fmt::format("shape         {} layers, hidden {}, inner {}, vocabulary {}{}\n", config.layers, config.hidden,
                      config.ffn, config.vocab, config.tied_embeddings ? " (tied)" : "");
  text += fmt::format("heads         {} query, {} KV, {} wide; up to {} positions\n", config.heads, kv, config.head_dim,
                      config.max_positions);
  text += fmt::format("parameters    {}, {} ({} tensors)\n", checkpoint::parameter_count(config), config.dtype, stored);
  text += fmt::format("weights       {}\n", bytes_text(reader.total_bytes()));
  text += fmt::format("KV cache      {} per token ({})\n",
                      bytes_text(static_cast<std::uint64_t>(config.cache_bytes_per_token(element))), config.dtype);
  text += fmt::format("tokenizer     {}\n", companions.empty() ? "none" : companions);
  text += fmt::format("fingerprint   {}\n", facts["fingerprint"].get<std::string>());
  text += "\n" + files.text() + cached_text(config) + provenance;
  return finding;
}

Finding inspect_safetensors(const fs::path& path) {
  const checkpoint::SafetensorsFile file(path);
  Finding finding;
  finding.facts["kind"] = "safetensors";
  finding.facts["file"] = path.string();
  finding.facts["bytes"] = file.map().size();
  finding.facts["metadata"] = file.metadata();
  finding.facts["tensors"] = OrderedJson::array();
  Table table({"tensor", "dtype", "shape", "elements", "bytes"});
  std::int64_t elements = 0;
  for (const auto& [name, info] : file.tensors()) {
    finding.facts["tensors"].push_back(
        {{"name", name}, {"dtype", info.dtype}, {"shape", info.shape}, {"begin", info.begin}, {"end", info.end}});
    table.add({name, info.dtype, checkpoint::shape_text(info.shape), std::to_string(info.elements()),
               std::to_string(info.end - info.begin)});
    elements += info.elements();
  }
  finding.text = fmt::format("safetensors   {}\n{} tensors, {} elements, {}\n", path.string(), file.tensors().size(),
                             elements, bytes_text(file.map().size()));
  for (const auto& [key, value] : file.metadata()) finding.text += fmt::format("{} = {}\n", key, value);
  finding.text += "\n" + table.text();
  return finding;
}

// ---- statistics -------------------------------------------------------------------------------------------------

/// Share of the largest eigenvalue in the trace of a positive semi-definite matrix, by power iteration from the
/// diagonal: a summary needs no full factorisation. Accurate to some digits, a lower bound always.
double top_share(const at::Tensor& matrix) {
  const double trace = at::trace(matrix).item<double>();
  if (!(trace > 0)) return 0;
  at::Tensor vector = matrix.diagonal().clone();
  double value = 0;
  for (int i = 0; i < 100; ++i) {
    const double norm = vector.norm().item<double>();
    if (!(norm > 0)) break;
    vector = vector / norm;
    at::Tensor next = at::mv(matrix, vector);
    const double before = value;
    value = at::dot(vector, next).item<double>();
    vector = std::move(next);
    if (std::abs(value - before) <= 1e-9 * value) break;
  }
  return value / trace;
}

Finding inspect_statistics(const fs::path& path) {
  const calibration::StatisticsFile file(path);
  const calibration::StatisticsHeader& header = file.header();
  Finding finding;
  OrderedJson& facts = finding.facts;
  facts["kind"] = "statistics";
  facts["file"] = path.string();
  facts["bytes"] = fs::file_size(path);
  facts["format_version"] = header.format_version;
  facts["headfold_version"] = header.headfold_version;
  facts["family"] = header.family;
  facts["model_hash"] = header.model_hash;
  facts["data_hash"] = header.data_hash;
  facts["layers_total"] = header.layers;
  facts["hidden"] = header.hidden;
  facts["kv_heads"] = header.kv_heads;
  facts["head_dim"] = header.head_dim;
  facts["samples"] = header.samples;
  facts["sequence_length"] = header.sequence_length;
  facts["seed"] = header.seed;
  facts["dtype"] = header.dtype;
  facts["has_rotated_keys"] = header.has_rotated_keys;
  facts["has_values"] = header.has_values;
  facts["has_halves"] = header.has_halves;
  facts["has_attention"] = header.has_attention;
  facts["heads"] = header.heads;
  facts["attended_heads"] = header.attended_heads;
  facts["options"] = header.options;
  facts["content_hash"] = file.content_hash();
  facts["layers"] = OrderedJson::array();
  Table table({"layer", "tokens", "position 0", "trace / token", "top eigenvalue", "sink trace / token", "keys / token",
               "values / token", "even tokens", "halves differ", "mean distance", "attended / token"});
  for (std::int64_t i = 0; i < header.layers; ++i) {
    const calibration::LayerStatistics layer = file.layer(i);
    const auto per_token = [](const at::Tensor& gram, double count) {
      return count > 0 ? at::trace(gram).item<double>() / count : 0.0;
    };
    const double energy = per_token(layer.moment, layer.count);
    const double sink = per_token(layer.moment_0, layer.count_0);
    const double share = top_share(layer.moment);
    OrderedJson one{{"layer", i},
                    {"tokens", layer.count},
                    {"tokens_0", layer.count_0},
                    {"trace_per_token", energy},
                    {"top_eigenvalue_share", share},
                    {"sink_trace_per_token", sink}};
    std::string keys = "-";
    if (layer.rotated_keys.defined()) {
      one["rotated_keys_trace_per_token"] = per_token(layer.rotated_keys, layer.count);
      keys = fmt::format("{:.5g}", per_token(layer.rotated_keys, layer.count));
    }
    std::string values = "-";
    if (layer.values.defined()) {
      one["values_trace_per_token"] = per_token(layer.values, layer.count);
      values = fmt::format("{:.5g}", per_token(layer.values, layer.count));
    }
    std::string even = "-", differ = "-", distance = "-", attended = "-";
    if (layer.has_halves()) {
      const auto half = [&](int which) { return layer.half(which).second_moment(0); };
      one["tokens_even"] = layer.count_even;
      even = fmt::format("{:.0f}", layer.count_even);
      if (layer.count_even > 0 && layer.count > layer.count_even) {
        // Frobenius distance of the halves' second moments: how much more tokens could still change.
        const double gap = ((half(0) - half(1)).norm() / layer.second_moment(0).norm()).item<double>();
        one["halves_differ"] = gap;
        differ = fmt::format("{:.2g} %", 100 * gap);
      }
    }
    if (layer.has_attention()) {
      const at::Tensor mass = layer.distance_mass.sum(0);
      const double mean = (at::dot(mass, at::arange(mass.numel(), at::kDouble)) / mass.sum()).item<double>();
      const double energy_per_query = layer.attended.diagonal(0, 1, 2).sum().item<double>() / layer.attention_count /
                                      static_cast<double>(header.heads);
      one["queries"] = layer.attention_count;
      one["mean_attention_distance"] = mean;
      one["attended_trace_per_query"] = energy_per_query;
      distance = fmt::format("{:.4g}", mean);
      attended = fmt::format("{:.5g}", energy_per_query);
    }
    facts["layers"].push_back(one);
    table.add({std::to_string(i), fmt::format("{:.0f}", layer.count), fmt::format("{:.0f}", layer.count_0),
               fmt::format("{:.5g}", energy), fmt::format("{:.1f} %", share * 100), fmt::format("{:.5g}", sink), keys,
               values, even, differ, distance, attended});
  }
  std::string& text = finding.text;
  text += fmt::format("statistics    {} ({})\n", path.string(), human_bytes(static_cast<double>(fs::file_size(path))));
  text += fmt::format("model         {}, {} layers, hidden {}, {} KV heads of {} (fingerprint {})\n", header.family,
                      header.layers, header.hidden, header.kv_heads, header.head_dim, short_hash(header.model_hash));
  text += fmt::format("data          {} sequences of {} tokens, seed {} ({})\n", header.samples, header.sequence_length,
                      header.seed, short_hash(header.data_hash));
  text += fmt::format("computed in   {} by headfold {}\n", header.dtype, header.headfold_version);
  const char* keys = header.family == "llama" ? ", rotated keys" : ", keys";
  text += fmt::format("holds         input moments{}{}{}{} (format version {})\n", header.has_rotated_keys ? keys : "",
                      header.has_values ? ", values" : "", header.has_halves ? ", half-sample sums" : "",
                      header.has_attention ? fmt::format(", attention of {} heads (values in blocks of {} KV heads)",
                                                         header.heads, header.attended_heads)
                                           : "",
                      header.format_version);
  text += fmt::format("content       {}\n\n", facts["content_hash"].get<std::string>());
  text += table.text();
  return finding;
}

// ---- JSON artefacts ---------------------------------------------------------------------------------------------

std::string record_text(const Json& record) {
  if (!record.is_object() || !record.contains("job")) return {};
  return fmt::format("made by       {}\nran           {} s on {} ranks, {} hosts, {} threads each\n",
                     any_text(record, "command"), number_text(record, "seconds", "{:.4g}"), any_text(record, "ranks"),
                     any_text(record, "hosts"), any_text(record, "threads_per_rank"));
}

std::string plan_text(const Json& json) {
  return fmt::format("fold          {}\nKV heads      {}\nmodel         {}\n", fold_text(member(json, "fold")),
                     any_text(json, "kv_heads"), short_hash(any_text(member(json, "model"), "fingerprint"))) +
         losses_text(member(json, "layers"));
}

std::string results_text(const Json& json) {
  const Json& own = member(json, "headfold");
  const Json& model = member(own, "model");
  std::string text =
      fmt::format("model         {} ({}, layout {}, {} of {} KV heads, fingerprint {})\n", any_text(model, "name"),
                  any_text(model, "folder"), any_text(model, "layout"), any_text(model, "kv_heads"),
                  any_text(model, "heads"), short_hash(any_text(model, "fingerprint")));
  if (member(own, "reference").is_object() && !member(own, "reference").empty())
    text += fmt::format("reference     {}\n", any_text(member(own, "reference"), "name"));
  Table table({"task", "metric", "value"});
  const Json& results = member(json, "results");
  if (results.is_object()) {
    for (const auto& [task, metrics] : results.items()) {
      if (!metrics.is_object()) continue;
      for (const auto& [metric, value] : metrics.items())
        if (value.is_number() && metric.find("stderr") == std::string::npos)
          table.add({task, metric, fmt::format("{:.6g}", value.get<double>())});
    }
  }
  return text + record_text(member(own, "record")) + "\n" + table.text();
}

std::string verification_text(const Json& json) {
  Table table({"layer", "keys predicted", "keys measured", "values predicted", "values measured", "score error",
               "output error"});
  const Json& layers = member(json, "layers");
  if (layers.is_array()) {
    for (const Json& layer : layers) {
      if (!layer.is_object()) continue;
      table.add({any_text(layer, "layer"), number_text(layer, "key_predicted"), number_text(layer, "key_measured"),
                 number_text(layer, "value_predicted"), number_text(layer, "value_measured"),
                 number_text(layer, "score_error"), number_text(layer, "output_error")});
    }
  }
  return fmt::format("model         {}\n", any_text(json, "model")) + record_text(member(json, "record")) + "\n" +
         table.text();
}

std::string calibration_text(const Json& json) {
  return fmt::format("model         {} ({})\ntokens        {}, {} per second, {} stages x {} replicas\n",
                     any_text(member(json, "model"), "folder"),
                     short_hash(any_text(member(json, "model"), "fingerprint")), any_text(json, "tokens"),
                     number_text(json, "tokens_per_second"), any_text(json, "stages"), any_text(json, "replicas")) +
         record_text(json);
}

Finding inspect_json(const fs::path& path) {
  const Json json = read_json(path);
  const std::string file = path.string();
  const std::string format = any_text(json, "format");
  std::string kind;
  std::string text;
  if (format == "headfold-plan") {
    kind = "plan";
    text = plan_text(json);
  } else if (format == "headfold-verification") {
    kind = "verification";
    text = verification_text(json);
  } else if (format == "headfold-model" || format == "headfold-synthetic" || format == "headfold-expanded") {
    kind = "provenance";
    text = provenance_text(json);
  } else if (format == "headfold-calibration") {
    kind = "calibration record";
    text = calibration_text(json);
  } else if (any_text(member(json, "headfold"), "format") == "headfold-results" ||
             (member(json, "results").is_object() && !member(json, "results").empty())) {
    kind = "results";
    text = results_text(json);
  } else if (json.is_object() && json.contains("model_type")) {
    const checkpoint::ModelConfig config = checkpoint::parse_config(json, file);
    kind = "model configuration";
    text = fmt::format("family        {}, layout {}\nparameters    {}\nKV cache      {} bytes per token at 16 bits\n",
                       checkpoint::name_of(config.family), checkpoint::name_of(config.layout),
                       checkpoint::parameter_count(config), config.cache_bytes_per_token(2));
  } else if (json.is_object() && json.contains("weight_map")) {
    return inspect_model(path.parent_path().empty() ? fs::path(".") : path.parent_path());
  } else if (json.is_object() && json.contains("job")) {
    kind = "record of a run";
    text = record_text(json);
  } else {
    throw InputError(
        fmt::format("{}: is JSON, but of no kind headfold knows", file),
        "known are plan.json, results_*.json, verification.json, headfold.json, config.json and records of runs");
  }
  Finding finding;
  finding.facts["kind"] = kind;
  finding.facts["file"] = file;
  finding.facts["content"] = json;
  finding.text = fmt::format("{:<14}{}\n{}", kind + " ", file, text);
  return finding;
}

// ---- which of them it is ------------------------------------------------------------------------------------------

/// The artefacts below a folder that is no model itself.
Finding inspect_folder(const fs::path& folder) {
  Finding finding;
  finding.facts["kind"] = "folder";
  finding.facts["folder"] = folder.string();
  finding.facts["artefacts"] = OrderedJson::array();
  Table table({"artefact", "kind"});
  std::error_code code;
  std::vector<std::pair<std::string, std::string>> found;
  for (fs::recursive_directory_iterator entry(folder, fs::directory_options::skip_permission_denied, code), end;
       !code && entry != end; entry.increment(code)) {
    const fs::path& path = entry->path();
    const std::string name = path.filename().string();
    const std::string shown = fs::relative(path, folder, code).string();
    if (fs::is_directory(path, code) && fs::exists(path / "config.json", code)) {
      found.emplace_back(shown, "model");
      entry.disable_recursion_pending();
    } else if (name.ends_with(".h5")) {
      found.emplace_back(shown, "statistics");
    } else if (name.ends_with(".safetensors")) {
      found.emplace_back(shown, "safetensors");
    } else if (name == "plan.json" || name == "verification.json" || name == "convert.json" ||
               (name.starts_with("results_") && name.ends_with(".json"))) {
      found.emplace_back(shown, name.starts_with("results_") ? "results" : name.substr(0, name.find('.')));
    }
  }
  if (code) throw IoError(folder.string(), "cannot be listed: " + code.message());
  if (found.empty())
    throw InputError(fmt::format("{}: holds nothing that headfold knows", folder.string()),
                     "give a model folder, a run folder, a .safetensors, a statistics .h5 or a JSON file of headfold");
  std::sort(found.begin(), found.end());
  for (const auto& [path, kind] : found) {
    finding.facts["artefacts"].push_back({{"path", path}, {"kind", kind}});
    table.add({path, kind});
  }
  finding.text = fmt::format("folder        {}\n\n{}", folder.string(), table.text());
  return finding;
}

Finding inspect_path(const fs::path& path) {
  std::error_code code;
  if (!fs::exists(path, code)) throw IoError(path.string(), "does not exist");
  if (fs::is_directory(path, code))
    return fs::exists(path / "config.json", code) ? inspect_model(path) : inspect_folder(path);
  if (!fs::is_regular_file(path, code))
    throw InputError(fmt::format("{}: is neither a file nor a folder", path.string()));
  std::ifstream in(path, std::ios::binary);
  if (!in) throw IoError(path.string(), "cannot be read");
  std::string start(9, '\0');
  in.read(start.data(), static_cast<std::streamsize>(start.size()));
  start.resize(static_cast<std::size_t>(in.gcount()));
  if (start.starts_with("\x89HDF\r\n\x1a\n") || path.extension() == ".h5") return inspect_statistics(path);
  if (path.extension() == ".safetensors" || (start.size() == 9 && start[8] == '{')) return inspect_safetensors(path);
  const std::size_t first = start.find_first_not_of(" \t\r\n");
  if (path.extension() == ".json" || (first != std::string::npos && start[first] == '{')) return inspect_json(path);
  throw InputError(fmt::format("{}: is of no kind headfold knows", path.string()),
                   "known are model folders, .safetensors, statistics (.h5) and the JSON files that headfold writes");
}

}  // namespace

void inspect(const Context& context, const std::vector<std::string>& arguments) {
  po::options_description own("inspect");
  own.add_options()("path", po::value<std::vector<std::string>>()->required(), "files or folders")(
      "json", "print JSON for programs");
  const po::variables_map values =
      parse(context, "inspect", "headfold inspect FILE_OR_DIR… [--json]", own, arguments, "path");
  const auto paths = values["path"].as<std::vector<std::string>>();
  const bool as_json = values.count("json") > 0;
  context.world.on_root([&] {
    std::vector<std::string> problems;
    for (std::size_t i = 0; i < paths.size(); ++i) {
      const Finding finding = inspect_path(paths[i]);
      if (as_json)
        std::cout << finding.facts.dump(2, ' ', false, OrderedJson::error_handler_t::replace) << "\n";
      else
        std::cout << (i > 0 ? "\n" : "") << finding.text;
      for (const std::string& problem : finding.problems) problems.push_back(paths[i] + ": " + problem);
    }
    std::cout << std::flush;
    if (problems.empty()) return;
    std::string text = fmt::format("{} problems: {}", problems.size(), problems[0]);
    for (std::size_t i = 1; i < problems.size() && i < 5; ++i) text += "; " + problems[i];
    throw InputError(text, "weights and config.json do not belong together");
  });
}

}  // namespace headfold::jobs
