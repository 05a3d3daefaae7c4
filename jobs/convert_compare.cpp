#include "convert_compare.h"

#include <headfold/base/files.h>
#include <headfold/base/log.h>
#include <headfold/base/progress.h>
#include <headfold/base/table.h>
#include <headfold/calibration/text.h>
#include <headfold/comm/stopping.h>
#include <headfold/evaluation/trial.h>
#include <headfold/folding/folded_layers.h>
#include <headfold/folding/refit.h>

#include <algorithm>
#include <cmath>
#include <iostream>
#include <set>

#include "convert_folds.h"
#include "convert_plan.h"

namespace headfold::jobs {

namespace {

using folding::LayerTarget;
using folding::NewTensors;

/// One row of the comparison.
struct Row {
  FoldRequest request;
  std::string failure;  ///< why the fold was not scored; empty when it was
  bool stock = false;
  std::string layout;
  std::vector<std::int64_t> kv_heads;            ///< by layer
  std::int64_t cache_bytes = 0;                  ///< per token, at the checkpoint's own dtype
  double key_loss = 0, value_loss = 0;           ///< predicted relative losses, means over layers
  std::vector<double> key_losses, value_losses;  ///< by layer
  evaluation::Totals totals;
  double seconds = 0;                      ///< deciding, folding, refit
  double seconds_score = 0;                ///< windows through the folded layers
  std::vector<std::string> near_singular;  ///< what a plan says of its Grams
};

/// A failure that every rank knows of: the fold is left out, the others go on. Any other error on one of several ranks
/// ends the job, since the rest waits.
using AgreedFailure = folding::AgreedError;

std::string message_of(const Error& error) {
  return error.hint().empty() ? error.what() : fmt::format("{} ({})", error.what(), error.hint());
}

/// Stored dtype of every tensor of a folded model by layer and last two parts of its name.
class StoredTypes {
 public:
  explicit StoredTypes(const std::vector<checkpoint::TensorSpec>& specs) {
    for (const checkpoint::TensorSpec& spec : specs) types_[key_of(spec.name)] = checkpoint::scalar_type(spec.dtype);
  }
  /// `tensors` as the checkpoint would hold them.
  void round(std::int64_t layer, NewTensors& tensors) const {
    for (auto& [tail, tensor] : tensors) {
      const auto found = types_.find(fmt::format("{}/{}", layer, tail));
      if (found == types_.end()) continue;  // the fold's tensors that this checkpoint does not store (a zero bias)
      tensor = tensor.to(found->second);
      if (!at::isfinite(tensor).all().item<bool>())
        throw AgreedFailure(
            fmt::format("layer {}: {} has values that {} cannot hold", layer, tail, c10::toString(found->second)));
    }
  }

 private:
  /// "model.layers.3.self_attn.k_proj.weight" -> "3/k_proj.weight"; other names stay.
  static std::string key_of(const std::string& name) {
    const std::size_t tail = name.rfind('.', name.rfind('.') - 1);
    std::size_t begin = 0;
    while (begin < name.size()) {
      const std::size_t end = std::min(name.find('.', begin), name.size());
      const std::string part = name.substr(begin, end - begin);
      if (!part.empty() && std::all_of(part.begin(), part.end(), [](unsigned char c) { return std::isdigit(c) != 0; }))
        return part + "/" + name.substr(tail + 1);
      begin = end + 1;
    }
    return name;
  }
  std::map<std::string, at::ScalarType> types_;
};

/// Checks that need no collective work and give the same answer on every rank; throws what is wrong with this fold.
void check_request(Row& row, const checkpoint::Reader& reader, const calibration::StatisticsFile* statistics,
                   std::int64_t tensor_parallel) {
  const checkpoint::ModelConfig& config = reader.config();
  folding::FoldOptions& options = row.request.options;
  folding::check_options(options, config);
  if (folding::needs_statistics(options) && statistics == nullptr)
    throw UsageError("needs --calibration", "metric weights does without");
  options = folding::with_effective_metrics(options, statistics != nullptr);
  if (tensor_parallel > 0 && options.allocation == folding::Allocation::uniform)
    folding::check_tensor_parallel(std::vector<std::int64_t>(static_cast<std::size_t>(config.layers), options.kv_heads),
                                   config.heads, tensor_parallel);
  // One group of one layer on every rank alike: what this model or these statistics do not have is found here, where
  // all ranks find it.
  const LayerTarget target = folding::uniform_targets(options, config).at(0);
  folding::for_each_item(1, [&](std::int64_t) {
    const folding::LayerProblem problem = folding::load_problem(reader, statistics, 0, folding::Part::both, options);
    folding::key_basis(problem, target.groups.at(0), options, target.key_width);
    folding::value_basis(problem, target.groups.at(0), options, target.value_width);
  });
}

struct Setting {
  const checkpoint::Reader& reader;
  const calibration::StatisticsFile* statistics;
  const evaluation::Trial& trial;
  calibration::TextSample probe;  ///< of measured budgets: other windows than those that are scored
  at::Tensor refit;               ///< sequences; undefined when no fold asks for a refit
  std::int64_t tensor_parallel = 0;
};

void run_fold(const comm::Communicator& world, const Setting& setting, Row& row) {
  const Progress clock("compare", "", 1, false);
  const checkpoint::Reader& reader = setting.reader;
  const checkpoint::ModelConfig& config = reader.config();
  const folding::FoldOptions& options = row.request.options;
  const Decision decision =
      decide_targets(world, reader, setting.statistics, options, row.request.grouping, setting.probe);
  const std::vector<LayerTarget>& targets = decision.targets;
  for (const LayerTarget& target : targets) row.kv_heads.push_back(std::ssize(target.groups));
  if (setting.tensor_parallel > 0) folding::check_tensor_parallel(row.kv_heads, config.heads, setting.tensor_parallel);
  const folding::Plan plan = folding::make_plan(world, reader, setting.statistics, options, targets);
  for (const folding::LayerPlan& layer : plan.layers) {
    row.key_losses.push_back(layer.key_relative_loss());
    row.value_losses.push_back(layer.value_relative_loss());
    row.key_loss += layer.key_relative_loss() / static_cast<double>(plan.layers.size());
    row.value_loss += layer.value_relative_loss() / static_cast<double>(plan.layers.size());
  }
  row.near_singular = near_singular_layers(plan);
  const checkpoint::KvLayout layout = folding::layout_of(options);
  const checkpoint::ModelConfig folded = checkpoint::parse_config(folding::folded_model_config(config, targets, layout),
                                                                  "config.json of the folded model");
  row.layout = checkpoint::name_of(layout);
  row.stock = folding::is_stock(options, config) && !folded.uneven();
  row.cache_bytes = folded.cache_bytes_per_token(folding::bytes_per_element(config.dtype));

  folding::RefitOptions refit = row.request.refit;
  refit.query_heads = folding::query_order(targets, config);
  std::vector<std::string> refitted;
  if (options.refit) refitted = folding::refitted_tensors(folded, refit);
  const StoredTypes types(folding::folded_tensors(reader, options, targets, refitted));

  evaluation::Trial::Run run = setting.trial.begin(0);
  folding::FoldedLayers folded_layer(world, config.layers, [&](std::int64_t layer) {
    try {
      return folding::folded_layer(reader, setting.statistics, targets[static_cast<std::size_t>(layer)], layer,
                                   options);
    } catch (const Error& error) {
      throw AgreedFailure(fmt::format("layer {}: {}", layer, message_of(error)));
    }
  });
  const auto score = [&](std::int64_t layer, NewTensors tensors) {
    const Progress scoring("score", "", 1, false);
    types.round(layer, tensors);
    run.advance({&folded, &tensors});
    row.seconds_score += scoring.seconds();
  };
  if (options.refit) {
    folding::refit_layers(
        world, reader, folded, setting.refit, refit, [&](std::int64_t layer) { return folded_layer(layer); },
        [&](std::int64_t layer, const NewTensors& tensors, const folding::LayerRefit&) { score(layer, tensors); });
  } else {
    for (std::int64_t layer = 0; layer < config.layers; ++layer) {
      comm::stop_if_requested(world, "while comparing folds; nothing was written");
      score(layer, folded_layer(layer));
    }
  }
  const Progress scoring("score", "", 1, false);
  try {
    row.totals = run.finish();
  } catch (const InputError& error) {
    throw AgreedFailure(message_of(error));
  }
  row.seconds_score += scoring.seconds();
  row.seconds = clock.seconds() - row.seconds_score;
}

/// Runs `work`; what it throws becomes the row's failure where every rank knows of it.
void guarded(const comm::Communicator& world, Row& row, const std::function<void()>& work) {
  try {
    work();
  } catch (const MpiFailure&) {
    throw;
  } catch (const Stopped&) {
    throw;
  } catch (const InternalError&) {
    throw;
  } catch (const IoError&) {
    throw;
  } catch (const UsageError& error) {
    row.failure = message_of(error);
  } catch (const AgreedFailure& error) {
    row.failure = error.what();
  } catch (const Error& error) {
    if (world.size() > 1)
      throw InputError(fmt::format("--compare {}: {}", row.request.text, error.what()), error.hint());
    row.failure = message_of(error);
  }
}

double perplexity(const evaluation::Totals& totals) {
  return std::exp(totals.mean_loss());
}

std::string kv_heads_text(const Row& row) {
  const auto [least, most] = std::minmax_element(row.kv_heads.begin(), row.kv_heads.end());
  return *least == *most ? std::to_string(*least) : fmt::format("{} to {}", *least, *most);
}

Table table_of(const std::vector<Row>& rows, const evaluation::Totals& original) {
  Table table({"fold", "heads", "key loss", "value loss", "KL", "perplexity", "ratio", "top-1 agreement",
               "KV bytes/token", "stock", "seconds"});
  for (const Row& row : rows) {
    if (!row.failure.empty()) {
      table.add({row.request.text, "-", "-", "-", "-", "-", "-", "-", "-", "-", "-"});
      continue;
    }
    table.add({row.request.text, kv_heads_text(row), fmt::format("{:.2f} %", 100 * row.key_loss),
               fmt::format("{:.2f} %", 100 * row.value_loss), fmt::format("{:.4f}", row.totals.mean_divergence()),
               fmt::format("{:.3f}", perplexity(row.totals)),
               fmt::format("{:.4f}", perplexity(row.totals) / perplexity(original)),
               fmt::format("{:.1f} %", 100 * row.totals.agreement()), std::to_string(row.cache_bytes),
               row.stock ? "yes" : "no", fmt::format("{:.1f}", row.seconds)});
  }
  return table;
}

/// Rows in the order of the table: by divergence, equal ones as they were given, failures last.
void rank(std::vector<Row>& rows) {
  std::stable_sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) {
    if (a.failure.empty() != b.failure.empty()) return a.failure.empty();
    return a.failure.empty() && a.totals.divergence < b.totals.divergence;
  });
}

OrderedJson to_json(const Row& row) {
  OrderedJson json;
  json["name"] = row.request.text;
  json["expanded"] = row.request.expanded;
  json["fold"] = folding::to_json(row.request.options);
  json["kv_heads"] = row.request.options.kv_heads;
  if (row.request.options.refit) json["refit"] = folding::to_json(row.request.refit);
  if (!row.failure.empty()) {
    json["error"] = row.failure;
    return json;
  }
  json["kv_heads_per_layer"] = row.kv_heads;
  json["layout"] = row.layout;
  json["stock"] = row.stock;
  json["cache_bytes_per_token"] = row.cache_bytes;
  json["predicted_key_loss"] = row.key_loss;
  json["predicted_value_loss"] = row.value_loss;
  json["key_relative_loss"] = row.key_losses;
  json["value_relative_loss"] = row.value_losses;
  json["kl"] = row.totals.mean_divergence();
  json["loss"] = row.totals.mean_loss();
  json["perplexity"] = perplexity(row.totals);
  json["top1_agreement"] = row.totals.agreement();
  json["seconds"] = row.seconds;
  json["seconds_score"] = row.seconds_score;
  return json;
}

std::string failures_of(const std::vector<Row>& rows) {
  std::string text;
  for (const Row& row : rows)
    if (!row.failure.empty()) text += fmt::format("not scored: {}: {}\n", row.request.text, row.failure);
  return text;
}

std::string markdown_of(const std::vector<Row>& rows, const evaluation::Totals& original, const std::string& setting,
                        const std::string& command) {
  std::string text = "# Folds compared\n\n" + setting + "\n\n" + table_of(rows, original).markdown() + "\n";
  text +=
      "`key loss`, `value loss`: predicted, as a share of the original's energy in the fold's own metric, mean over "
      "layers, before any refit; only rows with the same metric compare. `KL`: divergence of the folded model's "
      "predictions from the original's, nats per token. `ratio`: perplexity over the original's. `top-1 agreement`: "
      "predictions where both models' most likely token is the same. `stock`: whether stock Hugging Face loaders read "
      "the result. `seconds`: to decide, fold and refit, without scoring.\n";
  if (const std::string failures = failures_of(rows); !failures.empty()) text += "\n```\n" + failures + "```\n";
  return text + "\n```\n" + command + "\n```\n";
}

/// The folder is new, empty, headfold's own, or holds an earlier comparison.
void check_comparison_folder(const fs::path& out) {
  std::error_code code;
  if (fs::exists(out / "compare.json", code) && !fs::exists(out / "headfold.json", code)) {
    try {
      const Json earlier = read_json(out / "compare.json");
      if (earlier.value("format", std::string()) == "headfold-comparison") return;
    } catch (const std::exception&) {
    }
  }
  check_own_folder(out);
}

}  // namespace

void compare(const Context& context, const checkpoint::Reader& reader, const po::variables_map& values,
             const std::vector<std::string>& arguments) {
  const comm::Communicator& world = context.world;
  const Progress clock("compare", "", 1, false);
  const checkpoint::ModelConfig& config = reader.config();
  const fs::path out = values["out"].as<std::string>();
  for (const char* name : {"keys", "key-metric", "values", "value-metric", "plan", "plan-only", "stock", "overwrite"})
    if (values.count(name) > 0)
      throw UsageError(fmt::format("--{} and --compare exclude each other", name),
                       "what is compared stands in the list of folds; nothing but compare.json and compare.md is "
                       "written");
  calibration::TextSample refit_source = refit_text(values), probe = held_out_text(values);
  std::vector<Row> rows;
  for (FoldRequest& request :
       parse_folds(values["compare"].as<std::string>(), values, config, !refit_source.files.empty())) {
    if (request.options.refit && refit_source.files.empty())
      throw UsageError(fmt::format("--compare {}: a refit needs text to run both models on", request.text),
                       "give --refit-data FILE (.txt or .jsonl)");
    Row row;
    row.request = std::move(request);
    rows.push_back(std::move(row));
  }
  const auto any = [&](const std::function<bool(const Row&)>& property) {
    return std::any_of(rows.begin(), rows.end(), property);
  };
  const bool refits = any([](const Row& row) { return row.request.options.refit; });
  if (!refits && !refit_source.files.empty())
    throw UsageError("--refit-data, but none of the folds is refitted", "add @refit to one, or leave --refit-data out");
  if (probe.files.empty())
    throw UsageError("--compare scores folds on held-out text", "give --probe-data FILE (.txt or .jsonl)");
  check_comparison_folder(out);

  std::unique_ptr<calibration::StatisticsFile> statistics;
  if (values.count("calibration") > 0)
    statistics = std::make_unique<calibration::StatisticsFile>(values["calibration"].as<std::string>());
  std::int64_t tensor_parallel = 0;
  if (values.count("tensor-parallel") > 0) {
    tensor_parallel = values["tensor-parallel"].as<std::int64_t>();
    if (tensor_parallel < 1) throw UsageError(fmt::format("--tensor-parallel {}: must be 1 or more", tensor_parallel));
  }
  settle_length(refit_source, config, statistics.get());
  settle_length(probe, config, statistics.get());
  const std::int64_t cache_bytes = config.cache_bytes_per_token(folding::bytes_per_element(config.dtype));
  const std::string name =
      fs::absolute(reader.folder() / "config.json").parent_path().lexically_normal().filename().string();
  const std::string setting =
      fmt::format("{} ({}, {} layers, {} KV heads of {}, {}), statistics {}, {} held-out windows of {} tokens", name,
                  checkpoint::name_of(config.family), config.layers, config.kv_heads, config.head_dim, config.dtype,
                  statistics ? statistics->path().filename().string() : "none", probe.samples, probe.length);
  if (world.root()) {
    std::cout << setting << fmt::format("; {} folds\n", rows.size());
    if (values.count("dry-run") > 0) {
      for (const Row& row : rows) std::cout << "  " << row.request.text << " = " << row.request.expanded << '\n';
      std::cout << "dry run: nothing was written\n";
    }
    std::cout << std::flush;
  }
  if (values.count("dry-run") > 0) return;

  for (Row& row : rows)
    guarded(world, row, [&] {
      // The same work on every rank, so all of them fail or none.
      try {
        check_request(row, reader, statistics.get(), tensor_parallel);
      } catch (const InputError& error) {
        throw AgreedFailure(message_of(error));
      } catch (const NumericalError& error) {
        throw AgreedFailure(message_of(error));
      }
    });
  if (!any([](const Row& row) { return row.failure.empty(); }))
    throw UsageError(
        fmt::format("no fold of --compare can be made: {}: {}", rows.at(0).request.text, rows.at(0).failure));

  std::vector<evaluation::Window> windows = probe_windows(world, reader, probe);
  const auto trial_length = static_cast<std::int64_t>(windows.at(0).inputs.size()) + 1;
  const evaluation::Trial trial(world, reader, std::move(windows), at::kFloat, 0, evaluation::Trial::Keep::ends);
  const evaluation::Totals& original = trial.original();
  Setting common{reader, statistics.get(), trial, probe, {}, tensor_parallel};
  common.probe.skip = probe.samples;  // budgets must not be measured on the windows that judge them
  if (refits) common.refit = calibration::read_sequences(world, reader.folder(), config.vocab, refit_source);
  if (world.root())
    std::cout << fmt::format("original: perplexity {:.3f} over {} predictions\n", perplexity(original), original.tokens)
              << std::flush;
  std::size_t done = 0;
  std::set<std::string> warned;  // folds with one metric have the same Grams
  for (Row& row : rows) {
    if (row.failure.empty()) guarded(world, row, [&] { run_fold(world, common, row); });
    ++done;
    if (world.root())
      std::cout << (row.failure.empty()
                        ? fmt::format("[{}/{}] {}: KL {:.4f}, perplexity {:.3f}, {}\n", done, rows.size(),
                                      row.request.text, row.totals.mean_divergence(), perplexity(row.totals),
                                      human_seconds(row.seconds + row.seconds_score))
                        : fmt::format("[{}/{}] {}: not scored\n", done, rows.size(), row.request.text))
                << std::flush;
    for (const std::string& layer : row.near_singular)
      if (world.root() && warned.insert(layer).second) spdlog::warn("{}", layer);
  }
  rank(rows);

  OrderedJson json;
  json["format"] = "headfold-comparison";
  json["format_version"] = 1;
  json.update(run_record(context, "convert", arguments, clock.seconds()));
  json["model"] = OrderedJson{{"folder", name}, {"fingerprint", reader.fingerprint()}};
  json["statistics"] = statistics ? OrderedJson{{"file", statistics->path().filename().string()},
                                                {"content_hash", statistics->content_hash()}}
                                  : OrderedJson();
  const auto describe_text = [&](const calibration::TextSample& text) {
    OrderedJson one{{"windows", text.samples}, {"tokens", text.length}, {"seed", text.seed}, {"field", text.field}};
    world.on_root([&] { one["data"] = calibration::data_hash(text.files, text.field); });
    return one;
  };
  probe.length = trial_length;
  json["text"] = describe_text(probe);
  json["refit_text"] = refits ? describe_text(refit_source) : OrderedJson();
  json["original_perplexity"] = perplexity(original);
  json["original_loss"] = original.mean_loss();
  json["original_cache_bytes_per_token"] = cache_bytes;
  json["predictions"] = original.tokens;
  json["plans"] = OrderedJson::array();
  for (const Row& row : rows) json["plans"].push_back(to_json(row));
  world.on_root([&] {
    const std::string judged =
        fmt::format("{}. Original: perplexity {:.3f}, {} bytes of KV cache per token.", setting, perplexity(original),
                    config.cache_bytes_per_token(folding::bytes_per_element(config.dtype)));
    make_folder(out);
    write_json(out / "compare.json", json);
    write_file(out / "compare.md", markdown_of(rows, original, judged, command_line("convert", arguments)));
    std::cout << '\n' << table_of(rows, original).text() << failures_of(rows);
    std::cout << fmt::format("wrote {} and compare.md in {}\n", (out / "compare.json").string(),
                             human_seconds(clock.seconds()));
  });
}

}  // namespace headfold::jobs
