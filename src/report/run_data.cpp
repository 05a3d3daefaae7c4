#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/base/json.h>
#include <headfold/report/benchmarks.h>
#include <headfold/report/run_data.h>
#include <headfold/report/samples.h>
#include <headfold/report/text.h>

#include <algorithm>
#include <cmath>
#include <regex>
#include <set>
#include <tuple>

namespace headfold::report {
namespace {

constexpr std::int64_t kFormatVersion = 1;
/// No file of ours comes near this; a larger one is not ours or is broken.
constexpr std::uint64_t kLargestFile = std::uint64_t{256} << 20;

/// A number as harnesses write it: null and the strings "NaN", "Infinity", … stand for what JSON cannot say.
std::optional<double> finite_number(const Json& value) {
  if (!value.is_number()) return std::nullopt;
  const double number = value.get<double>();
  return std::isfinite(number) ? std::optional<double>(number) : std::nullopt;
}

std::optional<double> number_at(const Json& object, const std::string& key) {
  const auto found = object.find(key);
  return found == object.end() ? std::nullopt : finite_number(*found);
}

std::optional<std::int64_t> integer_at(const Json& object, const std::string& key) {
  const auto number = number_at(object, key);
  if (!number || std::abs(*number) > 9e15) return std::nullopt;
  return static_cast<std::int64_t>(std::llround(*number));
}

std::string text_at(const Json& object, const std::string& key) {
  const auto found = object.find(key);
  return found != object.end() && found->is_string() ? found->get<std::string>() : std::string();
}

/// A member that is an object; an empty one otherwise.
Json in_object(const Json& object, const std::string& key) {
  const auto found = object.find(key);
  return found != object.end() && found->is_object() ? *found : Json::object();
}

std::int64_t positive(const Json& object, const std::string& key, const std::string& file) {
  const auto value = required<std::int64_t>(object, key, file);
  if (value <= 0) throw InputError(fmt::format("{}: \"{}\" is {}, expected a positive number", file, key, value));
  return value;
}

Json object_at(const Json& parent, const std::string& key, const std::string& file) {
  auto value = required<Json>(parent, key, file);
  if (!value.is_object()) throw InputError(fmt::format("{}: \"{}\" is no JSON object", file, key));
  return value;
}

std::vector<double> energy_at(const Json& layer, const std::string& key, const std::string& file) {
  const auto found = layer.find(key);
  if (found == layer.end() || found->is_null()) return {};
  if (!found->is_array()) throw InputError(fmt::format("{}: \"{}\" is no list", file, key));
  std::vector<double> energy;
  for (const Json& value : *found) {
    const auto number = finite_number(value);
    if (!number) return {};
    energy.push_back(*number);
  }
  return energy;
}

/// Layer numbers place marks on axes: a number that no model has is a broken file.
constexpr std::int64_t kMostLayers = 100000;
std::int64_t layer_at(const Json& entry, const std::string& file) {
  const auto layer = required<std::int64_t>(entry, "layer", file);
  if (layer < 0 || layer >= kMostLayers)
    throw InputError(fmt::format("{}: \"layer\" is {}, expected 0 to {}", file, layer, kMostLayers - 1));
  return layer;
}

/// A share or loss; what is negative is "unknown" in the files.
std::optional<double> share_at(const Json& object, const std::string& key) {
  const auto number = number_at(object, key);
  return number && *number >= 0 ? number : std::nullopt;
}

std::optional<std::int64_t> count_at(const Json& object, const std::string& key) {
  const auto number = integer_at(object, key);
  return number && *number > 0 ? number : std::nullopt;
}

Json list_at(const Json& parent, const std::string& key, const std::string& file) {
  auto value = required<Json>(parent, key, file);
  if (!value.is_array()) throw InputError(fmt::format("{}: \"{}\" is no list", file, key));
  return value;
}

/// One option in words, empty for `usual` and for what was not recorded.
std::string option_words(const Json& fold, const std::string& key, const std::string& usual) {
  const auto found = fold.find(key);
  if (found == fold.end()) return {};
  std::string text;
  if (found->is_string()) text = found->get<std::string>();
  if (const auto number = finite_number(*found)) text = fmt::format("{:g}", *number);
  return text == usual ? std::string() : text;
}

FoldExtras extras_of(const Json& fold) {
  FoldExtras extras;
  const auto worded = [&](const char* key, const char* usual, const std::string& before, const std::string& behind) {
    const std::string text = option_words(fold, key, usual);
    return text.empty() ? text : before + text + behind;
  };
  extras.slow_band = worded("slow_band", "0", "slow band ", "");
  extras.polish = worded("polish", "0", "polish ", "");
  extras.grouping =
      text_at(fold, "grouping") == "search" ? "searched groups" : worded("grouping", "contiguous", "", " groups");
  extras.budget = worded("budget", "uniform", "", " budget");
  extras.latents = worded("latent_groups", "0", "", " per layer");
  if (!extras.latents.empty()) extras.latents = "latents: " + extras.latents;
  const std::string least = option_words(fold, "min_width", "0"), most = option_words(fold, "max_width", "0");
  if (!least.empty() || !most.empty())
    extras.widths = fmt::format("widths {} to {}", least.empty() ? "…" : least, most.empty() ? "…" : most);
  extras.mean_weight = worded("mean_weight", "1", "mean weight ", "");
  const auto refit = fold.find("refit");
  extras.refit = refit != fold.end() && refit->is_boolean() && refit->get<bool>();
  return extras;
}

void check_version(const Json& json, const std::string& file) {
  const auto version = optional<std::int64_t>(json, "format_version", kFormatVersion, file);
  if (version != kFormatVersion)
    throw InputError(fmt::format("{}: format_version is {}, this headfold reads {}", file, version, kFormatVersion),
                     "use the headfold that wrote it, or make the file again");
}

class Reader {
 public:
  explicit Reader(const fs::path& run) : run_(run) {
    std::error_code code;
    for (const fs::path& root : {run, fs::absolute(run, code), fs::weakly_canonical(run, code)}) {
      std::string text = root.lexically_normal().string();
      while (text.size() > 1 && text.back() == '/') text.pop_back();
      if (text.starts_with('/')) roots_.push_back(text);
    }
    data_.name = last_part(roots_.empty() ? run.string() : roots_.back());
  }

  void scan() {
    std::vector<fs::path> folders = {run_};
    std::vector<fs::path> found;
    while (!folders.empty()) {
      const fs::path folder = folders.back();
      folders.pop_back();
      std::error_code code;
      fs::directory_iterator entries(folder, code);
      if (code) throw IoError(folder.string(), fmt::format("cannot list the folder: {}", code.message()));
      for (const fs::directory_entry& entry : entries) {
        const std::string name = entry.path().filename().string();
        if (name.starts_with('.')) continue;
        if (entry.is_directory(code) && !entry.is_symlink(code)) {
          folders.push_back(entry.path());
        } else if (entry.is_regular_file(code) &&
                   (name == "headfold.json" || name == "verification.json" || name == "compare.json" ||
                    name == "finetune.json" || name.ends_with(".h5.json") ||
                    (name.starts_with("results_") && name.ends_with(".json")))) {
          found.push_back(entry.path());
        }
      }
    }
    std::sort(found.begin(), found.end());
    for (const fs::path& path : found) read(path);
  }

  RunData take() {
    attach_verifications();
    attach_evaluations();
    build_sections();
    std::sort(data_.files.begin(), data_.files.end());
    return std::move(data_);
  }

  bool empty() const {
    return calibrations_.empty() && conversions_.empty() && results_.empty() && verifications_.empty() &&
           comparisons_.empty() && trainings_.empty();
  }

 private:
  struct Result {
    Evaluation model;  ///< with the tasks of one file
    Record record;
    std::string file;
    double date = 0;
  };

  std::string relative(const fs::path& path) const { return path.lexically_relative(run_).generic_string(); }
  std::string hide(const std::string& text) const { return hide_paths(text, roots_); }

  /// Text that Python reads as JSON and JSON's grammar does not: the harness writes NaN for what it did not compute.
  static bool python_json(const std::string& text) { return Json::accept(without_constants(text)); }
  static std::string without_constants(const std::string& text) {
    static const std::regex constants("-?\\b(NaN|Infinity)\\b");
    return std::regex_replace(text, constants, "null");
  }

  /// The file as JSON, or nothing when it is another program's.
  std::optional<Json> open(const fs::path& path, bool ours_by_name) {
    const std::string text = read_file(path, kLargestFile);
    try {
      return parse_json(text, path.string());
    } catch (const CorruptFile& error) {
      // Harness results with NaN in them are none of our business; a file cut off is, whoever wrote it: left out in
      // silence, a line would be missing from the tables.
      if (ours_by_name || text.find("\"headfold-") != std::string::npos || !python_json(text))
        throw CorruptFile(path.string(), std::string(error.what()).substr(path.string().size() + 2),
                          "make it again or remove it from the run folder");
      return Json::parse(without_constants(text));
    }
  }

  void ignore(const fs::path& path) { data_.ignored.push_back(relative(path)); }

  void read(const fs::path& path) {
    const std::string name = path.filename().string();
    std::error_code code;
    const bool in_model = fs::exists(path.parent_path() / "headfold.json", code);
    const bool ours_by_name =
        name == "headfold.json" || name.ends_with(".h5.json") || (name == "verification.json" && in_model);
    const std::optional<Json> json = open(path, ours_by_name);
    if (!json || !json->is_object()) return ignore(path);
    const std::string file = path.string();
    const std::string format = text_at(*json, "format");
    if (name == "headfold.json") {
      // Models of random weights and those written out for other engines are no conversions of this run.
      if (format != "headfold-model" && format != "headfold-synthetic" && format != "headfold-expanded")
        return ignore(path);
      if (format == "headfold-model") read_conversion(path, *json, file);
    } else if (name == "verification.json") {
      if (format != "headfold-verification") return ignore(path);
      read_verification(path, *json, file);
    } else if (name == "compare.json") {
      if (format != "headfold-comparison") return ignore(path);
      read_comparison(path, *json, file);
    } else if (name == "finetune.json") {
      if (format != "headfold-finetune") return ignore(path);
      read_training(path, *json, file);
    } else if (name.ends_with(".h5.json")) {
      if (format != "headfold-calibration") return ignore(path);
      read_calibration(path, *json, file);
    } else {
      const auto own = json->find("headfold");
      if (own != json->end() && text_at(*own, "format") == "headfold-results")
        read_result(path, *json, *own, file);
      else if (!read_harness_result(path, *json, file))
        return ignore(path);
    }
    data_.files.push_back(relative(path));
  }

  Record record_of(const Json& json) const {
    const auto nested = json.find("record");
    const Json& source = nested != json.end() && nested->is_object() ? *nested : json;
    Record record;
    record.job = text_at(source, "job");
    record.command = hide(text_at(source, "command"));
    record.date = number_at(source, "date").value_or(0);
    record.seconds = number_at(source, "seconds");
    record.ranks = integer_at(source, "ranks");
    record.hosts = integer_at(source, "hosts");
    record.threads_per_rank = integer_at(source, "threads_per_rank");
    record.peak_resident_bytes = number_at(source, "peak_resident_bytes");
    record.version = text_at(source, "headfold_version");
    return record;
  }

  std::string value_text(const Json& value) const {
    if (value.is_string()) return hide(value.get<std::string>());
    if (value.is_boolean()) return value.get<bool>() ? "yes" : "no";
    if (value.is_array()) {
      std::string text;
      for (const Json& item : value) text += (text.empty() ? "" : ", ") + value_text(item);
      return text;
    }
    return value.is_null() ? std::string(kNone) : value.dump(-1, ' ', false, Json::error_handler_t::replace);
  }

  void read_calibration(const fs::path& path, const Json& json, const std::string& file) {
    check_version(json, file);
    Calibration calibration;
    calibration.file = relative(path);
    calibration.record = record_of(json);
    const Json model = object_at(json, "model", file);
    calibration.model = last_part(required<std::string>(model, "folder", file));
    calibration.fingerprint = required<std::string>(model, "fingerprint", file);
    calibration.data_hash = text_at(json, "data_hash");
    if (const auto options = json.find("options"); options != json.end() && options->is_object())
      for (const auto& [key, value] : options->items()) calibration.options.emplace_back(key, value_text(value));
    calibration.tokens = integer_at(json, "tokens");
    calibration.stages = integer_at(json, "stages");
    calibration.replicas = integer_at(json, "replicas");
    calibration.tokens_per_second = number_at(json, "tokens_per_second");
    calibration.pipeline_bubble = number_at(json, "pipeline_bubble");
    calibrations_.push_back(std::move(calibration));
  }

  void read_conversion(const fs::path& path, const Json& json, const std::string& file) {
    check_version(json, file);
    Conversion conversion;
    conversion.folder = relative(path.parent_path());
    if (conversion.folder.empty()) conversion.folder = ".";
    const Json source = object_at(json, "source", file), fold = object_at(json, "fold", file);
    conversion.source = last_part(required<std::string>(source, "folder", file));
    conversion.source_fingerprint = required<std::string>(source, "fingerprint", file);
    if (const auto statistics = json.find("statistics"); statistics != json.end() && statistics->is_object()) {
      conversion.statistics_file = last_part(text_at(*statistics, "file"));
      conversion.statistics_hash = text_at(*statistics, "content_hash");
    }
    conversion.keys = required<std::string>(fold, "keys", file);
    conversion.key_metric = text_at(fold, "key_metric");
    conversion.values = required<std::string>(fold, "values", file);
    conversion.value_metric = text_at(fold, "value_metric");
    conversion.sink_weight = number_at(fold, "sink_weight");
    conversion.weight_ridge = number_at(fold, "weight_ridge");
    conversion.extras = extras_of(fold);
    conversion.extras.healed = json.contains("merged");
    conversion.layout = required<std::string>(json, "layout", file);
    conversion.stock = required<bool>(json, "stock", file);
    const Json heads = object_at(json, "kv_heads", file), cache = object_at(json, "cache_bytes_per_token", file),
               parameters = object_at(json, "parameters", file);
    conversion.kv_heads_before = positive(heads, "before", file);
    conversion.kv_heads_after = positive(heads, "after", file);
    conversion.heads = positive(json, "heads", file);
    conversion.layers_total = positive(json, "layers_total", file);
    conversion.cache_before = positive(cache, "before", file);
    conversion.cache_after = positive(cache, "after", file);
    conversion.parameters_before = positive(parameters, "before", file);
    conversion.parameters_after = positive(parameters, "after", file);
    for (const Json& entry : list_at(json, "layers", file)) {
      LayerFold layer;
      layer.layer = layer_at(entry, file);
      if (const auto groups = entry.find("groups"); groups != entry.end())
        layer.groups = static_cast<std::int64_t>(groups->size());
      layer.key_loss = number_at(entry, "key_relative_loss");
      layer.value_loss = number_at(entry, "value_relative_loss");
      layer.key_energy = energy_at(entry, "key_energy", file);
      layer.value_energy = energy_at(entry, "value_energy", file);
      layer.kv_heads = count_at(entry, "kv_heads");
      layer.key_width = count_at(entry, "key_width");
      layer.value_width = count_at(entry, "value_width");
      layer.key_fitted = share_at(entry, "key_fitted");
      layer.key_held_out = share_at(entry, "key_held_out");
      layer.value_fitted = share_at(entry, "value_fitted");
      layer.value_held_out = share_at(entry, "value_held_out");
      layer.imaginary_share = energy_at(entry, "imaginary_share", file);
      layer.leading_share = energy_at(entry, "leading_share", file);
      conversion.layers.push_back(std::move(layer));
    }
    std::sort(conversion.layers.begin(), conversion.layers.end(),
              [](const auto& a, const auto& b) { return a.layer < b.layer; });

    if (const auto decisions = json.find("decisions"); decisions != json.end() && decisions->is_object())
      conversion.decisions = decisions_of(*decisions);
    if (const auto refit = json.find("refit"); refit != json.end() && refit->is_object())
      conversion.refit = refit_of(*refit, file);

    std::error_code code;
    const fs::path convert = path.parent_path() / "convert.json";
    if (fs::is_regular_file(convert, code)) {
      const Json timing = read_json(convert, kLargestFile);
      if (text_at(timing, "job") == "convert" || timing.contains("seconds_plan") || timing.contains("record")) {
        conversion.record = record_of(timing);
        conversion.seconds_plan = number_at(timing, "seconds_plan");
        conversion.seconds_apply = number_at(timing, "seconds_apply");
        data_.files.push_back(relative(convert));
      } else {
        ignore(convert);
      }
    }
    conversion.shapes = read_shapes(path.parent_path() / "config.json");
    conversions_.push_back(std::move(conversion));
  }

  /// Decisions are recorded for people: what is not of the expected form is left out.
  static Decisions decisions_of(const Json& json) {
    Decisions decisions;
    if (const auto budget = json.find("budget"); budget != json.end() && budget->is_object()) {
      decisions.predicted_kl = share_at(*budget, "predicted_kl");
      decisions.predicted_kl_uniform = share_at(*budget, "predicted_kl_uniform");
      if (const auto layers = budget->find("layers"); layers != budget->end() && layers->is_array())
        for (const Json& entry : *layers) {
          if (!entry.is_object()) continue;
          BudgetLayer layer;
          const auto number = integer_at(entry, "layer");
          layer.key_rate = number_at(entry, "kl_per_key_loss");
          layer.value_rate = number_at(entry, "kl_per_value_loss");
          if (!number || *number < 0 || *number >= kMostLayers || (!layer.key_rate && !layer.value_rate)) continue;
          layer.layer = *number;
          decisions.budget.push_back(layer);
        }
    }
    // One report per number of groups; with several, only layers that took that number count, which is not recorded.
    if (const auto grouping = json.find("grouping");
        grouping != json.end() && grouping->is_array() && grouping->size() == 1 && grouping->front().is_object()) {
      decisions.grouping_gain = number_at(grouping->front(), "gain");
      decisions.grouping_changed = integer_at(grouping->front(), "layers_changed");
      if (const auto layers = grouping->front().find("layers"); layers != grouping->front().end() && layers->is_array())
        decisions.grouping_layers = static_cast<std::int64_t>(layers->size());
    }
    return decisions;
  }

  static Refit refit_of(const Json& json, const std::string& file) {
    Refit refit;
    refit.sequences = count_at(json, "sequences");
    refit.tokens = count_at(json, "tokens");
    for (const Json& entry : list_at(json, "layers", file)) {
      RefitLayer layer;
      layer.layer = layer_at(entry, file);
      layer.stream_error = share_at(entry, "stream_error");
      for (const Json& one : list_at(entry, "parts", file)) {
        RefitPart part;
        part.part = required<std::string>(one, "part", file);
        part.divergence = text_at(one, "quantity") == "divergence";
        part.error_before = share_at(one, "error_before");
        part.error_after = share_at(one, "error_after");
        part.held_out_before = share_at(one, "held_out_before");
        part.held_out_after = share_at(one, "held_out_after");
        if (const auto kept = one.find("kept"); kept != one.end() && kept->is_boolean()) part.kept = kept->get<bool>();
        layer.parts.push_back(std::move(part));
      }
      refit.layers.push_back(std::move(layer));
    }
    std::sort(refit.layers.begin(), refit.layers.end(), [](const auto& a, const auto& b) { return a.layer < b.layer; });
    return refit;
  }

  void read_training(const fs::path& path, const Json& json, const std::string& file) {
    check_version(json, file);
    Training training;
    training.folder = relative(path.parent_path());
    training.record = record_of(json);
    training.finished = optional<bool>(json, "finished", false, file);
    const Json model = object_at(json, "model", file), how = object_at(json, "identity", file);
    training.model = last_part(required<std::string>(model, "folder", file));
    training.fingerprint = required<std::string>(model, "fingerprint", file);
    training.source_fingerprint = text_at(model, "source_fingerprint");
    if (const auto teacher = json.find("teacher"); teacher != json.end() && teacher->is_object())
      training.teacher = last_part(text_at(*teacher, "folder"));
    training.full = optional<bool>(how, "full", false, file);
    training.width = count_at(how, "rank");
    training.batch = count_at(how, "batch");
    training.sequence = count_at(how, "seq_len");
    training.distill = share_at(how, "distill");
    training.learning_rate = share_at(how, "learning_rate");
    if (const auto results = json.find("results"); results != json.end() && results->is_object()) {
      training.steps = integer_at(*results, "steps");
      training.chosen_step = integer_at(*results, "chosen_step");
      training.tokens = integer_at(*results, "tokens");
      training.tokens_per_second = number_at(*results, "tokens_per_second");
      training.perplexity_before = number_at(*results, "validation_perplexity_before");
      training.perplexity_best = number_at(*results, "validation_perplexity_best");
      training.kl_before = number_at(*results, "validation_kl_before");
      training.kl_last = number_at(*results, "validation_kl_last");
      training.kl_top = integer_at(*results, "validation_kl_top");
    }
    const fs::path lines = path.parent_path() / "train.jsonl";
    std::error_code code;
    if (fs::is_regular_file(lines, code)) {
      const std::string text = read_file(lines, kLargestFile);
      std::size_t number = 0;
      for (std::size_t begin = 0, end = 0; (end = text.find('\n', begin)) != std::string::npos; begin = end + 1) {
        const std::string place = fmt::format("{}:{}", lines.string(), ++number);
        const Json line = parse_json(std::string_view(text).substr(begin, end - begin), place);
        if (!line.is_object()) throw CorruptFile(place, "is no JSON object");
        const auto step = number_at(line, "step");
        const auto loss = number_at(line, "cross_entropy"), perplexity = number_at(line, "validation_perplexity");
        if (step && loss) training.losses.emplace_back(*step, *loss);
        if (step && perplexity) training.validations.emplace_back(*step, *perplexity);
      }
      data_.files.push_back(relative(lines));
    }
    trainings_.push_back(std::move(training));
  }

  void read_comparison(const fs::path& path, const Json& json, const std::string& file) {
    check_version(json, file);
    Comparison comparison;
    comparison.file = relative(path);
    comparison.record = record_of(json);
    const Json model = object_at(json, "model", file);
    comparison.model = last_part(required<std::string>(model, "folder", file));
    comparison.fingerprint = required<std::string>(model, "fingerprint", file);
    comparison.original_perplexity = number_at(json, "original_perplexity");
    comparison.original_cache_bytes = count_at(json, "original_cache_bytes_per_token");
    if (const auto text = json.find("text"); text != json.end() && text->is_object()) {
      comparison.windows = count_at(*text, "windows");
      comparison.tokens = count_at(*text, "tokens");
    }
    for (const Json& entry : list_at(json, "plans", file)) {
      ComparedPlan plan;
      const Json fold = object_at(entry, "fold", file);
      const std::string keys = required<std::string>(fold, "keys", file), values = text_at(fold, "values");
      const std::string key_metric = text_at(fold, "key_metric"), value_metric = text_at(fold, "value_metric");
      const std::string extras = words_of(extras_of(fold));
      const auto with = [](const std::string& name, const std::string& metric) {
        return metric.empty() || name == "meanpool" ? name : fmt::format("{} ({})", name, metric);
      };
      plan.fold = with(keys, key_metric);
      if (!values.empty()) plan.fold += "; values " + with(values, value_metric);
      if (!extras.empty()) plan.fold += "; " + extras;
      plan.name = hide(text_at(entry, "name"));
      if (plan.name.empty()) plan.name = keys;
      plan.kv_heads = count_at(entry, "kv_heads");
      if (plan.kv_heads) plan.kv_heads_text = fmt::format("{}", *plan.kv_heads);
      if (const auto heads = entry.find("kv_heads_per_layer"); heads != entry.end() && heads->is_array())
        if (const std::vector<double> list = energy_at(entry, "kv_heads_per_layer", file); !list.empty())
          if (const auto [least, most] = std::minmax_element(list.begin(), list.end()); *least != *most)
            plan.kv_heads_text = fmt::format("{:g} to {:g}", *least, *most);
      plan.cache_bytes = count_at(entry, "cache_bytes_per_token");
      if (const auto stock = entry.find("stock"); stock != entry.end() && stock->is_boolean())
        plan.stock = stock->get<bool>();
      plan.key_loss = number_at(entry, "predicted_key_loss");
      plan.value_loss = number_at(entry, "predicted_value_loss");
      plan.perplexity = number_at(entry, "perplexity");
      plan.kl = number_at(entry, "kl");
      plan.top1 = number_at(entry, "top1_agreement");
      plan.seconds = number_at(entry, "seconds");
      plan.error = hide(text_at(entry, "error"));
      comparison.plans.push_back(std::move(plan));
    }
    std::stable_sort(comparison.plans.begin(), comparison.plans.end(),
                     [](const ComparedPlan& a, const ComparedPlan& b) {
                       const auto key = [](const ComparedPlan& plan) {
                         return std::tuple(plan.kl.value_or(HUGE_VAL), plan.perplexity.value_or(HUGE_VAL));
                       };
                       return key(a) < key(b);
                     });
    comparisons_.push_back(std::move(comparison));
  }

  /// Shapes from a Hugging Face config.json; they adorn the report, so a file that cannot be read is no error here.
  static std::optional<Shapes> read_shapes(const fs::path& config) {
    std::error_code code;
    if (!fs::is_regular_file(config, code)) return std::nullopt;
    try {
      const Json json = read_json(config, std::uint64_t{16} << 20);
      if (!json.is_object()) return std::nullopt;
      const auto any = [&](std::initializer_list<const char*> keys) {
        for (const char* key : keys)
          if (const auto value = integer_at(json, key); value && *value > 0) return *value;
        return std::int64_t{0};
      };
      Shapes shapes;
      shapes.family = text_at(json, "model_type");
      // What only headfold loads says so in its type; the form is the same.
      if (shapes.family.starts_with("headfold_")) shapes.family.erase(0, 9);
      shapes.hidden = any({"hidden_size", "n_embed"});
      shapes.layers = any({"num_hidden_layers", "n_layer"});
      shapes.heads = any({"num_attention_heads", "n_head"});
      shapes.head_dim = any({"head_dim"});
      if (shapes.head_dim == 0 && shapes.heads > 0) shapes.head_dim = shapes.hidden / shapes.heads;
      shapes.vocab = any({"vocab_size"});
      if (shapes.hidden == 0 || shapes.layers == 0 || shapes.heads == 0) return std::nullopt;
      return shapes;
    } catch (const Error&) {
      return std::nullopt;
    }
  }

  void read_verification(const fs::path& path, const Json& json, const std::string& file) {
    check_version(json, file);
    Verification verification;
    verification.file = relative(path);
    verification.model = last_part(text_at(json, "model"));
    if (const auto text = json.find("text"); text != json.end() && !text->is_object())
      verification.text = value_text(*text);
    verification.record = record_of(json);
    for (const Json& entry : list_at(json, "layers", file)) {
      LayerCheck layer;
      layer.layer = layer_at(entry, file);
      layer.key_predicted = number_at(entry, "key_predicted");
      layer.key_measured = number_at(entry, "key_measured");
      layer.value_predicted = number_at(entry, "value_predicted");
      layer.value_measured = number_at(entry, "value_measured");
      layer.score_error = number_at(entry, "score_error");
      layer.output_error = number_at(entry, "output_error");
      verification.layers.push_back(layer);
    }
    const auto order_at = [&](const std::string& key) -> std::optional<PairOrder> {
      if (!json.contains(key)) return std::nullopt;
      const Json order = object_at(json, key, file);
      return PairOrder{integer_at(order, "pairs").value_or(0), integer_at(order, "told_apart").value_or(0),
                       integer_at(order, "in_order").value_or(0), number_at(order, "spread")};
    };
    verification.key_order = order_at("key_order");
    verification.value_order = order_at("value_order");
    std::sort(verification.layers.begin(), verification.layers.end(),
              [](const auto& a, const auto& b) { return a.layer < b.layer; });
    verifications_.emplace_back(relative(path.parent_path()), std::move(verification));
  }

  void read_result(const fs::path& path, const Json& json, const Json& own, const std::string& file) {
    check_version(own, file);
    Result result;
    result.file = relative(path);
    result.record = record_of(own);
    result.date = result.record.date > 0 ? result.record.date : number_at(json, "date").value_or(0);
    const Json model = object_at(own, "model", file);
    result.model.folder = text_at(model, "folder");
    result.model.name = last_part(text_at(model, "name"));
    if (result.model.name.empty()) result.model.name = last_part(result.model.folder);
    if (result.model.name.empty()) throw InputError(fmt::format("{}: key \"name\" is missing in \"model\"", file));
    result.model.fingerprint = text_at(model, "fingerprint");
    result.model.layout = text_at(model, "layout");
    result.model.dtype = text_at(model, "dtype");
    result.model.kv_heads = integer_at(model, "kv_heads");
    result.model.heads = integer_at(model, "heads");
    result.model.parameters = integer_at(model, "parameters");
    result.model.cache_bytes_per_token = integer_at(model, "cache_bytes_per_token");
    if (const auto reference = own.find("reference"); reference != own.end() && reference->is_object()) {
      result.model.reference =
          last_part(text_at(*reference, "name").empty() ? text_at(*reference, "folder") : text_at(*reference, "name"));
      result.model.reference_fingerprint = text_at(*reference, "fingerprint");
    }
    result.model.tokens_per_second = number_at(own, "tokens_per_second");
    read_tasks(path, json, file, result);
    results_.push_back(std::move(result));
  }

  /// Results that the evaluation harness itself wrote. False: the file is something else.
  bool read_harness_result(const fs::path& path, const Json& json, const std::string& file) {
    const auto results = json.find("results"), config = json.find("config");
    if (results == json.end() || !results->is_object()) return false;
    Result result;
    std::string name = text_at(json, "model_name");
    if (name.empty() && config != json.end() && config->is_object()) {
      // Older releases name the model in its arguments only: "pretrained=NAME,dtype=…".
      const std::string arguments = text_at(*config, "model_args"), key = "pretrained=";
      if (const std::size_t at = arguments.find(key); at != std::string::npos)
        name = arguments.substr(at + key.size(), arguments.find(',', at) - at - key.size());
    }
    result.model.name = last_part(name);
    if (result.model.name.empty()) return false;
    result.model.harness = true;
    result.model.folder = hide(name);
    result.file = relative(path);
    result.date = number_at(json, "date").value_or(0);
    if (config != json.end() && config->is_object()) {
      result.model.parameters = count_at(*config, "model_num_parameters");
      result.model.dtype = text_at(*config, "model_dtype");
    }
    read_tasks(path, json, file, result);
    results_.push_back(std::move(result));
    return true;
  }

  void read_tasks(const fs::path& path, const Json& json, const std::string& file, Result& result) const {
    const Json tasks = object_at(json, "results", file);
    const auto table = [&](const char* key) {
      const auto found = json.find(key);
      return found != json.end() && found->is_object() ? *found : Json::object();
    };
    const Json hashes = table("task_hashes"), subtasks = table("group_subtasks"), better = table("higher_is_better"),
               shots = table("n-shot"), counts = table("n-samples");
    const Json configs = table("configs"), own = table("headfold"), benchmarks = in_object(own, "benchmarks");
    std::string benchmark_bos;
    for (const Json& facts : {benchmarks, in_object(own, "harness")})
      if (const auto adds = facts.find("adds_bos"); adds != facts.end() && adds->is_boolean())
        benchmark_bos = adds->get<bool>() ? "always" : "never";
    const std::string name = path.filename().string(), time = name.substr(8, name.size() - 8 - 5);
    for (const auto& [task, values] : tasks.items()) {
      if (!values.is_object()) throw InputError(fmt::format("{}: results of \"{}\" are no JSON object", file, task));
      TaskResult kept;
      kept.file = result.file;
      kept.date = result.date;
      kept.text_hash = text_at(hashes, task);
      for (const auto& [metric, value] : values.items()) {
        // "metric,filter" names a number; alias, name, sample_len and the like have no comma.
        const std::size_t comma = metric.find(',');
        if (comma == std::string::npos) continue;
        if (const std::size_t error = metric.find("_stderr,"); error == std::string::npos)
          kept.metrics[metric] = finite_number(value);
        else if (const auto number = finite_number(value))
          kept.errors[metric.substr(0, error) + metric.substr(comma)] = *number;
      }
      if (const auto found = better.find(task); found != better.end() && found->is_object())
        for (const auto& [metric, higher] : found->items())
          if (higher.is_boolean()) kept.higher_is_better[metric] = higher.get<bool>();
      kept.shots = integer_at(shots, task);
      kept.dtype = result.model.dtype;
      if (kept.of_text(task)) {
        const Json config = in_object(configs, task);
        kept.bos = text_at(config, "bos");
        kept.max_length = integer_at(config, "max_length");
      } else {
        kept.bos = benchmark_bos;
        kept.max_length = integer_at(benchmarks, "max_length");
      }
      if (const auto found = counts.find(task); found != counts.end() && found->is_object())
        kept.documents = integer_at(*found, "effective");
      if (const auto found = subtasks.find(task); found != subtasks.end() && found->is_array())
        for (const Json& part : *found)
          if (part.is_string()) kept.subtasks.push_back(part.get<std::string>());
      if (!kept.of_text(task)) kept.samples = samples_of(path.parent_path(), task, time);
      result.model.tasks[task] = std::move(kept);
    }
  }

  /// The samples that were written with a results file.
  std::shared_ptr<const Samples> samples_of(const fs::path& folder, const std::string& task,
                                            const std::string& time) const {
    // As the harness makes file names of task names.
    std::string in_file;
    for (const char c : task) {
      const bool bad = std::string_view("\"<>:/|\\?*[]").find(c) != std::string_view::npos;
      if (!bad)
        in_file += c;
      else if (!in_file.ends_with("__"))
        in_file += "__";
    }
    const fs::path path = folder / fmt::format("samples_{}_{}.jsonl", in_file, time);
    std::error_code code;
    return fs::is_regular_file(path, code) ? read_samples(path, relative(path)) : nullptr;
  }

  void attach_verifications() {
    for (auto& [folder, verification] : verifications_) {
      Conversion* owner = nullptr;
      for (Conversion& conversion : conversions_)
        if (conversion.folder == folder) owner = &conversion;
      if (owner == nullptr) {
        std::vector<Conversion*> named;
        for (Conversion& conversion : conversions_)
          if (last_part(conversion.folder) == verification.model) named.push_back(&conversion);
        if (named.size() == 1) owner = named[0];
      }
      if (owner == nullptr) {
        data_.ignored.push_back(verification.file);
        std::erase(data_.files, verification.file);
      } else if (!owner->verification || owner->verification->record.date <= verification.record.date) {
        owner->verification = std::move(verification);
      }
    }
  }

  /// Trailing path parts that two folders share.
  static int shared_tail(const std::string& a, const std::string& b) {
    const fs::path pa(a), pb(b);
    std::vector<std::string> left, right;
    for (const fs::path& part : pa)
      if (!part.empty()) left.push_back(part.string());
    for (const fs::path& part : pb)
      if (!part.empty()) right.push_back(part.string());
    int shared = 0;
    while (static_cast<std::size_t>(shared) < std::min(left.size(), right.size()) &&
           left[left.size() - 1 - static_cast<std::size_t>(shared)] ==
               right[right.size() - 1 - static_cast<std::size_t>(shared)])
      ++shared;
    return shared;
  }
  /// Leading path parts that two relative files share.
  static int shared_head(const std::string& a, const std::string& b) {
    const fs::path pa(a), pb(b);
    int shared = 0;
    for (auto ia = pa.begin(), ib = pb.begin(); ia != pa.end() && ib != pb.end() && *ia == *ib; ++ia, ++ib) ++shared;
    return shared;
  }

  /// The conversion that a result is about, or -1. Names repeat between base models, so every hint counts.
  int conversion_of(const Result& result) const {
    const Evaluation& model = result.model;
    int best = -1;
    std::tuple<int, int, int> best_score{-1, -1, -1};
    for (std::size_t c = 0; c < conversions_.size(); ++c) {
      const Conversion& conversion = conversions_[c];
      const std::string name = last_part(conversion.folder);
      if (name != last_part(model.folder) && name != model.name) continue;
      // An evaluation names the largest number of KV heads (or latents) of a layer.
      if (model.kv_heads && *model.kv_heads != conversion.kv_heads_after &&
          *model.kv_heads != conversion.kv_heads_range().second)
        continue;
      if (!model.layout.empty() && model.layout != conversion.layout) continue;
      const bool same_source =
          !model.reference_fingerprint.empty() && model.reference_fingerprint == conversion.source_fingerprint;
      const std::tuple<int, int, int> score{same_source ? 1 : 0, shared_tail(model.folder, conversion.folder),
                                            shared_head(result.file, conversion.folder)};
      if (score > best_score) {
        best = static_cast<int>(c);
        best_score = score;
      }
    }
    return best;
  }

  void attach_evaluations() {
    std::set<std::string> bases;
    for (const Conversion& conversion : conversions_) bases.insert(conversion.source_fingerprint);
    for (const Calibration& calibration : calibrations_) bases.insert(calibration.fingerprint);
    for (const Comparison& comparison : comparisons_) bases.insert(comparison.fingerprint);
    // Oldest first, so that newer files overwrite task by task.
    std::stable_sort(results_.begin(), results_.end(), [](const Result& a, const Result& b) {
      return std::tie(a.date, a.file) < std::tie(b.date, b.file);
    });
    for (Result& result : results_) {
      const bool is_base = bases.contains(result.model.fingerprint);
      // What another program measured stands beside our own measurements, not in their place.
      const int conversion = is_base || result.model.harness ? -1 : conversion_of(result);
      Evaluated key;
      key.conversion = conversion;
      if (conversion < 0)
        key.identity = result.model.harness               ? "harness " + result.model.folder
                       : result.model.fingerprint.empty() ? result.model.name
                                                          : result.model.fingerprint;
      auto found = std::find_if(evaluated_.begin(), evaluated_.end(), [&](const Evaluated& e) {
        return e.conversion == key.conversion && e.identity == key.identity;
      });
      if (found == evaluated_.end()) {
        evaluated_.push_back(key);
        found = evaluated_.end() - 1;
      }
      Evaluation merged = std::move(result.model);
      for (auto& [task, value] : found->evaluation.tasks) merged.tasks.try_emplace(task, std::move(value));
      merged.records = std::move(found->evaluation.records);
      if (!merged.harness) merged.records.emplace_back(result.file, result.record);
      found->evaluation = std::move(merged);
      found->newest = result.date;
    }
    for (Evaluated& one : evaluated_) {
      std::set<std::string> used;
      for (const auto& [task, value] : one.evaluation.tasks) used.insert(value.file);
      std::erase_if(one.evaluation.records, [&](const auto& record) { return !used.contains(record.first); });
    }
  }

  Section& section_of(const std::string& fingerprint, const std::string& name) {
    for (Section& section : data_.sections)
      if (section.fingerprint == fingerprint) {
        if (section.name.empty()) section.name = name;
        return section;
      }
    Section section;
    section.fingerprint = fingerprint;
    section.name = name;
    data_.sections.push_back(std::move(section));
    return data_.sections.back();
  }

  static void note_date(Section& section, double date) {
    if (date > 0 && (section.first_date == 0 || date < section.first_date)) section.first_date = date;
  }

  void build_sections() {
    for (Calibration& calibration : calibrations_) {
      Section& section = section_of(calibration.fingerprint, calibration.model);
      note_date(section, calibration.record.date);
      section.calibrations.push_back(std::move(calibration));
    }
    for (Comparison& comparison : comparisons_) {
      Section& section = section_of(comparison.fingerprint, comparison.model);
      note_date(section, comparison.record.date);
      section.comparisons.push_back(std::move(comparison));
    }
    for (Training& training : trainings_) {
      const bool folded = !training.source_fingerprint.empty();
      Section& section = section_of(folded ? training.source_fingerprint : training.fingerprint,
                                    folded ? training.teacher : training.model);
      note_date(section, training.record.date);
      section.trainings.push_back(std::move(training));
    }
    for (std::size_t c = 0; c < conversions_.size(); ++c) {
      Section& section = section_of(conversions_[c].source_fingerprint, conversions_[c].source);
      ModelRow row;
      row.conversion = std::move(conversions_[c]);
      if (row.conversion->record) note_date(section, row.conversion->record->date);
      for (Evaluated& one : evaluated_)
        if (one.conversion == static_cast<int>(c)) row.evaluation = std::move(one.evaluation);
      section.models.push_back(std::move(row));
    }
    std::vector<Evaluated*> rest, harness;
    for (Evaluated& one : evaluated_)
      if (one.conversion < 0) (one.evaluation.harness ? harness : rest).push_back(&one);
    const auto is_reference = [&](const Evaluated& one) {
      return std::any_of(data_.sections.begin(), data_.sections.end(),
                         [&](const Section& s) { return s.fingerprint == one.identity; }) ||
             one.evaluation.reference_fingerprint.empty() || one.evaluation.reference_fingerprint == one.identity;
    };
    std::stable_sort(rest.begin(), rest.end(),
                     [&](const Evaluated* a, const Evaluated* b) { return is_reference(*a) > is_reference(*b); });
    for (Evaluated* one : rest) {
      const bool original = is_reference(*one);
      Evaluation& evaluation = one->evaluation;
      Section& section = original ? section_of(one->identity, evaluation.name)
                                  : section_of(evaluation.reference_fingerprint, evaluation.reference);
      note_date(section, one->newest);
      ModelRow row;
      row.original = original;
      row.evaluation = std::move(evaluation);
      section.models.push_back(std::move(row));
    }
    for (Evaluated* one : harness) {
      // Beside the base model that was asked most of the same; a model that shares no task stands alone.
      Section* beside = nullptr;
      std::size_t most = 0;
      for (Section& section : data_.sections) {
        std::size_t shared = 0;
        for (const auto& [task, result] : one->evaluation.tasks)
          shared += std::any_of(section.models.begin(), section.models.end(), [&task = task](const ModelRow& row) {
            return row.evaluation && row.evaluation->tasks.contains(task);
          });
        if (shared > most) {
          beside = &section;
          most = shared;
        }
      }
      ModelRow row;
      row.original = beside == nullptr;
      if (beside == nullptr) beside = &section_of(one->identity, one->evaluation.name);
      row.evaluation = std::move(one->evaluation);
      note_date(*beside, one->newest);
      beside->models.push_back(std::move(row));
    }
    for (Section& section : data_.sections) finish(section);
    std::stable_sort(data_.sections.begin(), data_.sections.end(),
                     [](const Section& a, const Section& b) { return a.first_date < b.first_date; });
  }

  static void finish(Section& section) {
    if (section.name.empty()) section.name = "model";
    if (std::none_of(section.models.begin(), section.models.end(), [](const ModelRow& row) { return row.original; })) {
      ModelRow row;
      row.original = true;
      section.models.insert(section.models.begin(), std::move(row));
    }
    for (const ModelRow& row : section.models) {
      if (!row.conversion) continue;
      const Conversion& conversion = *row.conversion;
      if (!section.heads) section.heads = conversion.heads;
      if (!section.kv_heads) section.kv_heads = conversion.kv_heads_before;
      if (!section.layers) section.layers = conversion.layers_total;
      if (!section.cache_bytes) section.cache_bytes = conversion.cache_before;
      if (!section.parameters) section.parameters = conversion.parameters_before;
      if (!section.shapes) section.shapes = conversion.shapes;
    }
    for (const ModelRow& row : section.models) {
      if (!row.original || !row.evaluation) continue;
      const Evaluation& evaluation = *row.evaluation;
      if (!section.heads) section.heads = evaluation.heads;
      if (!section.kv_heads) section.kv_heads = evaluation.kv_heads;
      if (!section.cache_bytes) section.cache_bytes = evaluation.cache_bytes_per_token;
      if (!section.parameters) section.parameters = evaluation.parameters;
    }
    for (const Comparison& comparison : section.comparisons)
      if (!section.cache_bytes) section.cache_bytes = comparison.original_cache_bytes;
    std::stable_partition(section.models.begin(), section.models.end(),
                          [](const ModelRow& row) { return row.original; });
    fill_rows(section);
    choose_task(section);
    fill_metrics(section);
    name_folds(section);
    std::stable_sort(section.models.begin(), section.models.end(), [](const ModelRow& a, const ModelRow& b) {
      const auto key = [](const ModelRow& row) {
        return std::tuple(!row.original, -row.kv_heads.value_or(0), row.ratio.value_or(1e300), row.name);
      };
      return key(a) < key(b);
    });
    section.benchmarks = benchmarks_of(section.models);
    note_missing(section);
  }

  static void fill_rows(Section& section) {
    std::map<std::string, int> uses;
    const auto short_name = [&](const ModelRow& row) {
      if (row.original) return section.name;
      // A healed model is called "merged" everywhere: the name of its training says more.
      if (row.conversion && row.conversion->extras.healed && last_part(row.conversion->folder) == "merged") {
        const fs::path parent = fs::path(row.conversion->folder).parent_path();
        if (!parent.empty()) return last_part(parent.generic_string());
      }
      if (row.evaluation && row.evaluation->harness) return row.evaluation->name + " (harness)";
      return row.conversion
                 ? last_part(row.conversion->folder == "." ? row.evaluation ? row.evaluation->name : "converted"
                                                           : row.conversion->folder)
                 : row.evaluation->name;
    };
    for (const ModelRow& row : section.models) ++uses[short_name(row)];
    std::map<std::string, int> given;
    for (ModelRow& row : section.models) {
      row.name = short_name(row);
      if (uses[row.name] > 1 && row.conversion) row.name = row.conversion->folder;
      if (const int nth = ++given[row.name]; nth > 1) row.name += fmt::format(" ({})", nth);
      if (row.conversion) {
        const Conversion& conversion = *row.conversion;
        row.layout = conversion.layout;
        row.stock = conversion.stock;
        row.kv_heads = conversion.kv_heads_after;
        row.cache_bytes = conversion.cache_after;
        row.parameters = conversion.parameters_after;
        row.share = conversion.share();
        continue;
      }
      if (row.evaluation) {
        row.layout = row.evaluation->layout;
        row.kv_heads = row.evaluation->kv_heads;
        row.cache_bytes = row.evaluation->cache_bytes_per_token;
        row.parameters = row.evaluation->parameters;
      }
      if (row.original) {
        // What the conversions say of it is on the same footing as their own figures (bytes at the checkpoint's dtype).
        if (section.kv_heads) row.kv_heads = section.kv_heads;
        if (section.cache_bytes) row.cache_bytes = section.cache_bytes;
        if (section.parameters) row.parameters = section.parameters;
        row.stock = true;
        row.share = 1.0;
      } else if (row.cache_bytes && section.cache_bytes && *section.cache_bytes > 0) {
        row.share = static_cast<double>(*row.cache_bytes) / static_cast<double>(*section.cache_bytes);
      }
    }
  }

  static bool is_perplexity(const std::string& task) { return task.starts_with("ppl_blocks"); }

  static std::optional<std::optional<double>> metric(const TaskResult& task, const std::string& name) {
    const auto found = task.metrics.find(name + ",none");
    if (found == task.metrics.end()) return std::nullopt;
    return found->second;
  }

  static void choose_task(Section& section) {
    std::map<std::string, int> uses;
    for (const ModelRow& row : section.models) {
      if (!row.evaluation) continue;
      // The original decides between tasks that are equally common: without it there is no ratio.
      for (const auto& [task, result] : row.evaluation->tasks)
        if (is_perplexity(task)) uses[task] += row.original ? 3 : 2;
    }
    int most = 0;
    for (const auto& [task, count] : uses)
      if (count > most || (count == most && task.size() >= section.perplexity_task.size())) {
        most = count;
        section.perplexity_task = task;
      }
  }

  static void fill_metrics(Section& section) {
    const TaskResult* original = nullptr;
    for (ModelRow& row : section.models) {
      if (!row.evaluation || section.perplexity_task.empty()) continue;
      const auto task = row.evaluation->tasks.find(section.perplexity_task);
      if (task == row.evaluation->tasks.end()) continue;
      row.perplexity = metric(task->second, "perplexity");
      row.kl = metric(task->second, "kl");
      row.top1 = metric(task->second, "top1_agreement");
      if (row.original && original == nullptr) original = &task->second;
    }
    if (original == nullptr) {
      // An evaluation against the original as --reference measured the original too, on the same text.
      for (const ModelRow& row : section.models) {
        if (original != nullptr || row.original || !row.perplexity) continue;
        const TaskResult& task = row.evaluation->tasks.at(section.perplexity_task);
        if (metric(task, "reference_perplexity")) original = &task;
      }
      if (original == nullptr) return;
      for (ModelRow& row : section.models)
        if (row.original) row.perplexity = metric(*original, "reference_perplexity");
    }
    const auto base =
        section.models.front().original ? section.models.front().perplexity.value_or(std::nullopt) : std::nullopt;
    for (ModelRow& row : section.models) {
      if (!row.perplexity || !*row.perplexity || !base || !(*base > 0)) continue;
      if (!row.evaluation) {
        row.ratio = 1.0;
        continue;
      }
      const TaskResult& task = row.evaluation->tasks.at(section.perplexity_task);
      if (!task.text_hash.empty() && !original->text_hash.empty() && task.text_hash != original->text_hash) {
        section.missing.push_back(fmt::format(
            "{} was evaluated on another text than the original: its perplexity is shown, a ratio would mean nothing.",
            row.name));
        continue;
      }
      if (const std::string why = task.differs_from(*original); !row.original && !why.empty()) {
        section.missing.push_back(fmt::format(
            "{} was evaluated with {}: its perplexity is shown, a ratio would mean nothing.", row.name, why));
        continue;
      }
      if (!row.original && !task.dtype.empty() && !original->dtype.empty() && task.dtype != original->dtype)
        section.missing.push_back(
            fmt::format("{} was computed in {}, the original in {}: part of the difference is "
                        "rounding.",
                        row.name, task.dtype, original->dtype));
      row.ratio = **row.perplexity / *base;
    }
  }

  /// Labels folds by the key strategy, and by what else tells two folds of the same key strategy apart.
  static void name_folds(Section& section) {
    const auto parts_of = [](const Conversion& c) {
      const auto number = [](const char* what, const std::optional<double>& value) {
        return value ? fmt::format("{} {:g}", what, *value) : std::string();
      };
      const FoldExtras& extras = c.extras;
      return std::vector<std::string>{c.keys == "meanpool" ? std::string() : c.key_metric,
                                      c.values,
                                      c.values == "meanpool" ? std::string() : c.value_metric,
                                      number("sink weight", c.sink_weight),
                                      number("ridge", c.weight_ridge),
                                      extras.mean_weight,
                                      extras.latents,
                                      extras.widths,
                                      extras.slow_band,
                                      extras.polish,
                                      extras.grouping,
                                      extras.budget};
    };
    constexpr std::size_t kValues = 1, kValueMetric = 2, kFirstExtra = 8;
    std::map<std::string, std::vector<std::set<std::string>>> seen;
    for (const ModelRow& row : section.models) {
      if (!row.conversion) continue;
      const auto parts = parts_of(*row.conversion);
      auto& sets = seen[row.conversion->keys];
      sets.resize(parts.size());
      for (std::size_t p = 0; p < parts.size(); ++p) sets[p].insert(parts[p]);
    }
    for (ModelRow& row : section.models) {
      if (row.original) {
        row.fold = "original";
      } else if (row.conversion) {
        const auto parts = parts_of(*row.conversion);
        const auto& sets = seen[row.conversion->keys];
        row.fold = row.conversion->keys;
        for (std::size_t p = 0; p < parts.size(); ++p) {
          if (sets[p].size() <= 1 || parts[p].empty()) continue;
          // "values svd act+out" where both fold and metric of values differ, "values act+out" where only the metric.
          const bool behind_values = p == kValueMetric && sets[kValues].size() > 1;
          row.fold += behind_values ? " " : p < kFirstExtra ? ", " : " + ";
          if (p == kValues || (p == kValueMetric && !behind_values)) row.fold += "values ";
          row.fold += parts[p];
        }
        if (row.conversion->extras.refit) row.fold += " + refit";
        if (row.conversion->extras.healed) row.fold += " + healed";
      } else {
        row.fold = row.name;
      }
      if (!row.original && std::find(section.folds.begin(), section.folds.end(), row.fold) == section.folds.end())
        section.folds.push_back(row.fold);
    }
    std::sort(section.folds.begin(), section.folds.end());
    for (ModelRow& row : section.models)
      if (!row.original)
        row.series =
            static_cast<int>(std::find(section.folds.begin(), section.folds.end(), row.fold) - section.folds.begin());
  }

  static std::string list(const std::vector<std::string>& names) {
    std::string text;
    for (std::size_t i = 0; i < names.size(); ++i)
      text += (i == 0 ? "" : i + 1 == names.size() ? " and " : ", ") + names[i];
    return text;
  }

  static void note_missing(Section& section) {
    std::vector<std::string> unevaluated, unreferenced, unverified, untimed, stale, unfounded;
    bool any_conversion = false;
    const ModelRow* original = nullptr;
    for (const ModelRow& row : section.models) {
      if (row.original) {
        if (original == nullptr) original = &row;
        continue;
      }
      if (row.evaluation && row.evaluation->harness) continue;
      any_conversion = true;
      if (!row.evaluation) unevaluated.push_back(row.name);
      if (row.perplexity && !row.kl) unreferenced.push_back(row.name);
      if (!row.conversion) {
        unfounded.push_back(row.name);
        continue;
      }
      // Training goes on from a fold that has its own row: nothing was predicted of what it makes.
      if (!row.conversion->verification && !row.conversion->extras.healed) unverified.push_back(row.name);
      if (!row.conversion->record && !row.conversion->extras.healed) untimed.push_back(row.name);
      if (row.evaluation && row.conversion->record && row.conversion->record->date > 0)
        for (const auto& [task, result] : row.evaluation->tasks)
          if (result.date > 0 && result.date < row.conversion->record->date) {
            stale.push_back(row.name);
            break;
          }
    }
    auto& missing = section.missing;
    if (section.calibrations.empty()) missing.push_back("No calibration of this model was found (no *.h5.json file).");
    if (!any_conversion)
      missing.push_back(
          "No converted model was found (no headfold.json with a fold of this model): nothing has been folded yet.");
    if (original != nullptr && original->evaluation) {
    } else if (original != nullptr && original->perplexity) {
      missing.push_back(
          "The original has no results file of its own: its perplexity is what the evaluations measured on it as their "
          "reference.");
    } else {
      missing.push_back(any_conversion ? "The original model was not evaluated, so there is no perplexity ratio "
                                         "(headfold evaluate on the original)."
                                       : "The original model was not evaluated (no results_*.json).");
    }
    if (!unevaluated.empty())
      missing.push_back(fmt::format("Not evaluated: {} (headfold evaluate).", list(unevaluated)));
    if (!unreferenced.empty())
      missing.push_back(fmt::format("No KL divergence and no top-1 agreement for {}: evaluated without --reference.",
                                    list(unreferenced)));
    if (!unverified.empty())
      missing.push_back(
          fmt::format("Not verified, so predicted losses stand unmeasured: {} (headfold verify).", list(unverified)));
    if (!untimed.empty()) missing.push_back(fmt::format("No convert.json, so no conversion time: {}.", list(untimed)));
    if (!unfounded.empty())
      missing.push_back(fmt::format(
          "Results without their model: the converted folder of {} is not in this run, so its fold is unknown.",
          list(unfounded)));
    if (!stale.empty())
      missing.push_back(fmt::format("Evaluated before it was last converted: {}. Evaluate again.", list(stale)));
  }

  struct Evaluated {
    int conversion = -1;
    std::string identity;  ///< fingerprint or name, when there is no conversion
    Evaluation evaluation;
    double newest = 0;
  };

  fs::path run_;
  std::vector<std::string> roots_;
  RunData data_;
  std::vector<Calibration> calibrations_;
  std::vector<Comparison> comparisons_;
  std::vector<Training> trainings_;
  std::vector<Conversion> conversions_;
  std::vector<std::pair<std::string, Verification>> verifications_;
  std::vector<Result> results_;
  std::vector<Evaluated> evaluated_;
};

}  // namespace

std::string TaskResult::differs_from(const TaskResult& original) const {
  if (!bos.empty() && !original.bos.empty() && bos != original.bos)
    return fmt::format("BOS {}, the original with BOS {}", bos, original.bos);
  if (max_length && original.max_length && *max_length != *original.max_length)
    return fmt::format("at most {} tokens at a time, the original with {}", *max_length, *original.max_length);
  return {};
}

bool TaskResult::of_text(const std::string& task) const {
  if (task.starts_with("ppl_blocks")) return true;
  const auto has = [&](const char* metric) { return metrics.contains(std::string(metric) + ",none"); };
  return has("word_perplexity") || has("byte_perplexity") || has("bits_per_byte") || has("kl") ||
         (has("perplexity") && !has("acc"));
}

bool Conversion::uneven() const {
  const auto differs = [&](auto LayerFold::*member) {
    return std::any_of(layers.begin(), layers.end(),
                       [&](const LayerFold& layer) { return layer.*member != layers.front().*member; });
  };
  return differs(&LayerFold::kv_heads) || differs(&LayerFold::key_width) || differs(&LayerFold::value_width);
}

std::pair<std::int64_t, std::int64_t> Conversion::kv_heads_range() const {
  std::optional<std::int64_t> least, most;
  for (const LayerFold& layer : layers) {
    if (!layer.kv_heads) continue;
    least = std::min(least.value_or(*layer.kv_heads), *layer.kv_heads);
    most = std::max(most.value_or(*layer.kv_heads), *layer.kv_heads);
  }
  return {least.value_or(kv_heads_after), most.value_or(kv_heads_after)};
}

std::string words_of(const FoldExtras& extras) {
  std::string text;
  for (const std::string& part :
       {extras.mean_weight, extras.latents, extras.widths, extras.slow_band, extras.polish, extras.grouping,
        extras.budget, std::string(extras.refit ? "refit" : ""), std::string(extras.healed ? "healed" : "")})
    if (!part.empty()) text += (text.empty() ? "" : "; ") + part;
  return text;
}

RunData read_run(const std::filesystem::path& run) {
  std::error_code code;
  if (!fs::exists(run, code))
    throw IoError(run.string(), "there is no such folder", "name the folder that the other jobs wrote into");
  if (!fs::is_directory(run, code))
    throw InputError(fmt::format("--run {}: is a file, expected a folder", run.string()));
  Reader reader(run.lexically_normal() / "");
  reader.scan();
  if (reader.empty())
    throw InputError(
        fmt::format(
            "{}: nothing to report. Looked in all its folders for calibrations (*.h5.json), "
            "converted models (headfold.json with "
            "format headfold-model), verifications (verification.json) and evaluations "
            "(results_*.json with format headfold-results), comparisons (compare.json) and trainings (finetune.json)",
            run.string()),
        "run headfold calibrate, convert or evaluate with --out inside this folder first");
  return reader.take();
}

}  // namespace headfold::report
