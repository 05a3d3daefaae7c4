#include <headfold/base/files.h>
#include <headfold/base/log.h>
#include <headfold/base/progress.h>
#include <headfold/base/stop.h>
#include <headfold/base/table.h>
#include <headfold/calibration/text.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/comm/stopping.h>
#include <headfold/evaluation/tasks.h>
#include <headfold/folding/apply.h>
#include <headfold/folding/comparison.h>
#include <headfold/model/pipeline.h>

#include <cstring>
#include <iostream>

#include "values.h"

namespace headfold::jobs {

namespace {

using checkpoint::Reader;
using folding::ErrorSums;
using folding::Groups;

constexpr const char* kVerifyStopped = "while verifying; the same command measures anew";

po::options_description verify_options() {
  po::options_description options("verify options");
  options.add_options()("model", po::value<std::string>()->required(), "folder of the folded model")(
      "original", po::value<std::string>()->required(), "folder of the model it was made from")(
      "data", po::value<std::vector<std::string>>()->required()->multitoken(), "held-out text, .txt or .jsonl")(
      "field", po::value<std::string>()->default_value("text"), "field of .jsonl files")(
      "samples", po::value<std::int64_t>()->default_value(8), "sequences")(
      "seq-len", po::value<std::int64_t>()->default_value(256), "tokens per sequence")(
      "seed", po::value<std::int64_t>()->default_value(1), "seed that draws them")(
      "bos", po::value<std::string>()->default_value("default"), "default, always or never: BOS before every document")(
      "dry-run", "say what would be done and stop")("out", po::value<std::string>(),
                                                    "result file (default MODEL/verification.json)");
  return options;
}

/// What headfold.json says about the fold.
struct Fold {
  folding::FoldOptions options;
  std::vector<folding::LayerTarget> targets;
  std::vector<std::string> refitted;  ///< last parts of names that a refit changed
  std::vector<double> keys, values;   ///< predicted relative losses per layer
};

Fold read_fold(const Reader& folded, const Reader& original) {
  const fs::path path = folded.folder() / "headfold.json";
  const std::string file = path.string();
  if (!fs::exists(path))
    throw InputError(fmt::format("{} is absent: {} was not made by headfold convert", file, folded.folder().string()));
  const Json json = read_json(path);
  if (const auto format = required<std::string>(json, "format", file); format != "headfold-model")
    throw InputError(fmt::format("{}: format is \"{}\", expected \"headfold-model\"", file, format),
                     "verify takes a folder written by headfold convert");
  const auto source = required<std::string>(required<Json>(json, "source", file), "fingerprint", file);
  if (source != original.fingerprint())
    throw InputError(
        fmt::format("{}: made from a model with fingerprint {}..., {} has {}...", file, source.substr(0, 12),
                    original.folder().string(), original.fingerprint().substr(0, 12)),
        "give the model it was made from as --original");
  Fold fold;
  const auto options = required<Json>(json, "fold", file);
  fold.options = folding::options_from_json(options, file);
  fold.options.kv_heads = required<std::int64_t>(required<Json>(json, "kv_heads", file), "after", file);
  for (const Json& layer : required<Json>(json, "layers", file)) {
    folding::LayerTarget target;
    target.groups = required<Groups>(layer, "groups", file);
    target.key_width = optional<std::int64_t>(layer, "key_width", original.config().head_dim, file);
    target.value_width = optional<std::int64_t>(layer, "value_width", original.config().head_dim, file);
    fold.targets.push_back(std::move(target));
    fold.keys.push_back(required<double>(layer, "key_relative_loss", file));
    fold.values.push_back(required<double>(layer, "value_relative_loss", file));
  }
  if (const auto refit = json.find("refit"); refit != json.end())
    fold.refitted = required<std::vector<std::string>>(*refit, "tensors", file);
  const checkpoint::ModelConfig& config = original.config();
  folding::check_options(fold.options, config);
  folding::check_targets(fold.targets, fold.options, config, file);
  return fold;
}

/// Everything about the folded model that can be checked exactly; one sentence per fault. Byte comparisons are spread
/// over the ranks.
std::vector<std::string> exact_faults(const comm::Communicator& world, const Reader& folded, const Reader& original,
                                      const Fold& fold, std::size_t& compared) {
  std::string faults;
  const Json expected = folding::folded_model_config(original.config(), fold.targets, folding::layout_of(fold.options));
  if (world.root()) {
    if (folded.config().raw != expected) faults += "config.json is not the original's with its KV heads changed\n";
    for (const std::string& problem : checkpoint::layout_problems(folded)) faults += problem + "\n";
    const auto tensors = folding::folded_tensors(original, fold.options, fold.targets, fold.refitted);
    for (const checkpoint::TensorSpec& spec : tensors) {
      if (!folded.has(spec.name))
        faults += fmt::format("tensor {} is missing\n", spec.name);
      else if (folded.info(spec.name).dtype != spec.dtype || folded.info(spec.name).shape != spec.shape)
        faults += fmt::format("tensor {}: {} [{}], expected {} [{}]\n", spec.name, folded.info(spec.name).dtype,
                              fmt::join(folded.info(spec.name).shape, ", "), spec.dtype, fmt::join(spec.shape, ", "));
    }
    if (folded.names().size() != tensors.size())
      faults += fmt::format("{} tensors, expected {}\n", folded.names().size(), tensors.size());
  }
  const std::vector<std::string> untouched =
      folding::untouched_tensors(original, fold.options, fold.targets, fold.refitted);
  compared = untouched.size();
  for (std::size_t i = static_cast<std::size_t>(world.rank()); i < untouched.size();
       i += static_cast<std::size_t>(world.size())) {
    const std::string& name = untouched[i];
    if (!folded.has(name)) continue;
    const at::Tensor a = original.view(name), b = folded.view(name);
    if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes() ||
        std::memcmp(a.data_ptr(), b.data_ptr(), a.nbytes()) != 0)
      faults += fmt::format("tensor {} should be the original's, byte for byte, and is not\n", name);
    original.done_with(name);
    folded.done_with(name);
  }
  std::vector<std::string> all;
  for (const std::string& text : world.all_gather(faults))
    for (std::size_t begin = 0; begin < text.size();) {
      const std::size_t end = text.find('\n', begin);
      all.push_back(text.substr(begin, end - begin));
      begin = end + 1;
    }
  return all;
}

/// Sum of attention inputs of one layer.
class MeanObserver : public model::LayerObserver {
 public:
  MeanObserver(double* sums, double* count) : sums_(sums), count_(count) {}
  void attention_input(const at::Tensor& x) override {
    const at::Tensor sum = x.to(at::kDouble).sum(at::IntArrayRef{0, 1}).contiguous();
    for (std::int64_t i = 0; i < sum.numel(); ++i) sums_[i] += sum.data_ptr<double>()[i];
    *count_ += static_cast<double>(x.size(0) * x.size(1));
  }
  void rotated_keys(const at::Tensor&) override {}
  bool wants_rotated_keys() const override { return false; }

 private:
  double* sums_;
  double* count_;
};

class ComparisonObserver : public model::LayerObserver {
 public:
  explicit ComparisonObserver(folding::LayerComparison comparison) : comparison_(std::move(comparison)) {}
  void attention_input(const at::Tensor& x) override {
    for (std::int64_t b = 0; b < x.size(0); ++b) comparison_.add(x[b]);
  }
  void rotated_keys(const at::Tensor&) override {}
  bool wants_rotated_keys() const override { return false; }
  const ErrorSums& errors() const { return comparison_.errors(); }

 private:
  folding::LayerComparison comparison_;
};

/// Ends a rank's own pass through the layers.
struct PassStopped {};

/// Runs `observer_of(layer)` over this rank's sequences, one layer resident at a time; `finish` is called when a layer
/// is done with. Returns early once this rank is asked to stop.
void stream(const Reader& reader, const comm::Grid& grid, const std::vector<at::Tensor>& sequences,
            const std::function<std::unique_ptr<model::LayerObserver>(std::int64_t)>& observer_of,
            const std::function<void(std::int64_t, const model::LayerObserver&)>& finish, Progress& progress) {
  if (sequences.empty()) return;
  model::PipelineOptions options;
  options.residency = model::Residency::streamed;
  options.head = false;
  const model::Pipeline pipeline(reader, grid, options);
  std::unique_ptr<model::LayerObserver> current;
  std::int64_t current_layer = -1;
  const auto close = [&] {
    if (current && finish) finish(current_layer, *current);
    current.reset();
  };
  model::PipelineHooks hooks;
  hooks.observer = [&](std::int64_t layer) {
    close();
    current_layer = layer;
    current = observer_of(layer);
    return current.get();
  };
  hooks.before_layer = [](std::int64_t, std::int64_t) {
    if (stop_requested()) throw PassStopped{};
  };
  hooks.progress = [&](double done) { progress.advance(done); };
  try {
    pipeline.run(sequences, hooks);
  } catch (const PassStopped&) {  // the caller agrees with the other ranks
    return;
  }
  close();
}

}  // namespace

void verify(const Context& context, const std::vector<std::string>& arguments) {
  const comm::Communicator& world = context.world;
  const po::variables_map values = parse(context, "verify", "headfold verify --model FOLDED --original DIR --data FILE",
                                         verify_options(), arguments);
  const Reader folded(values["model"].as<std::string>());
  const Reader original(values["original"].as<std::string>());
  const Fold fold = read_fold(folded, original);
  const checkpoint::ModelConfig& config = original.config();
  const fs::path out =
      values.count("out") > 0 ? fs::path(values["out"].as<std::string>()) : folded.folder() / "verification.json";
  const auto samples = values["samples"].as<std::int64_t>();
  const std::int64_t length = std::min(values["seq-len"].as<std::int64_t>(), config.max_positions);
  if (samples < 1 || length < 2)
    throw UsageError(fmt::format("--samples {} --seq-len {}: at least 1 and 2", samples, length));

  const auto seed = static_cast<std::uint64_t>(at_least(values, "seed", 0));
  std::vector<fs::path> files;
  for (const std::string& file : values["data"].as<std::vector<std::string>>()) files.emplace_back(file);
  const auto field = values["field"].as<std::string>();
  const auto tokenizer = tokenizer::load_tokenizer(original.folder());
  const at::Tensor ids =
      calibration::draw_sequences(calibration::token_stream(*tokenizer, calibration::read_documents(files, field),
                                                            evaluation::parse_bos(values["bos"].as<std::string>())),
                                  samples, length, seed);
  world.on_root([&] {
    check_output_file(values, out, "verification",
                      [](const fs::path& file) { return read_json(file).at("format") == "headfold-verification"; });
  });
  if (world.root())
    std::cout << fmt::format(
        "model      {} ({} -> {} KV heads), folded from {}\n"
        "text       {} sequences of {} tokens, drawn by seed {}, spread over {} rank(s)\n"
        "checks     config, names, shapes, bytes of untouched tensors; then the losses of {} layers\n"
        "output     {}\n",
        folded.folder().string(), config.kv_heads, folded.config().kv_heads, original.folder().string(), samples,
        length, seed, world.size(), config.layers, out.string());
  if (values.count("dry-run") > 0) {
    if (world.root()) std::cout << "dry run: nothing was measured or written\n";
    return;
  }

  listen_for_stop();
  watch_stop_file(stop_file_beside(folded.folder()));
  comm::stop_if_requested(world, kVerifyStopped);
  std::size_t compared = 0;
  const std::vector<std::string> faults = exact_faults(world, folded, original, fold, compared);
  if (!faults.empty()) {
    const std::size_t shown = std::min<std::size_t>(faults.size(), 5);
    throw InputError(fmt::format("{}: {} fault(s): {}", folded.folder().string(), faults.size(),
                                 fmt::join(std::vector<std::string>(
                                               faults.begin(), faults.begin() + static_cast<std::ptrdiff_t>(shown)),
                                           "; ")),
                     "convert the original again");
  }
  if (world.root())
    std::cout << fmt::format(
        "exact checks passed: config, names, dtypes, shapes; {} untouched tensors are identical to the original's\n",
        compared);

  std::vector<at::Tensor> mine;
  for (std::int64_t s = world.rank(); s < samples; s += world.size()) mine.push_back(ids.slice(0, s, s + 1));

  const comm::Grid grid = comm::make_grid(world, 1);
  const auto layers = static_cast<std::size_t>(config.layers), hidden = static_cast<std::size_t>(config.hidden);
  const bool centred = folding::needs_mean_input(config, fold.options);
  Progress progress("verify", "sequence", static_cast<double>(mine.size()) * (centred ? 2 : 1), world.root());
  std::vector<double> means(layers * hidden, 0.0), counts(layers, 0.0);
  if (centred) {
    stream(
        original, grid, mine,
        [&](std::int64_t layer) -> std::unique_ptr<model::LayerObserver> {
          const auto l = static_cast<std::size_t>(layer);
          return std::make_unique<MeanObserver>(means.data() + l * hidden, counts.data() + l);
        },
        nullptr, progress);
    comm::stop_if_requested(world, kVerifyStopped);
    world.all_reduce(std::span(means));
    world.all_reduce(std::span(counts));
    for (std::size_t i = 0; i < means.size(); ++i) means[i] /= counts[i / hidden];
  }
  std::vector<double> sums(layers * ErrorSums::count, 0.0);
  stream(
      original, grid, mine,
      [&](std::int64_t layer) -> std::unique_ptr<model::LayerObserver> {
        const auto l = static_cast<std::size_t>(layer);
        const at::Tensor mean = at::from_blob(means.data() + l * hidden, {config.hidden}, at::kDouble).clone();
        return std::make_unique<ComparisonObserver>(folding::LayerComparison(
            config, folding::load_layer_weights(original, layer), folded.config(),
            folding::load_layer_weights(folded, layer), fold.targets[l].groups, fold.options, mean));
      },
      [&](std::int64_t layer, const model::LayerObserver& observer) {
        const ErrorSums& errors = dynamic_cast<const ComparisonObserver&>(observer).errors();
        std::copy(errors.sums.begin(), errors.sums.end(), sums.begin() + layer * ErrorSums::count);
      },
      progress);
  comm::stop_if_requested(world, kVerifyStopped);
  world.all_reduce(std::span(sums));

  OrderedJson result;
  result["format"] = "headfold-verification";
  result["format_version"] = 1;
  const auto name_of_folder = [](const Reader& reader) {
    return fs::absolute(reader.folder() / "config.json").parent_path().lexically_normal().filename().string();
  };
  result["model"] = name_of_folder(folded);
  result["original"] = name_of_folder(original);
  OrderedJson text;
  text["files"] = OrderedJson::array();
  for (const fs::path& file : files) text["files"].push_back(file.filename().string());
  text["data_hash"] = calibration::data_hash(files, field);
  text["samples"] = samples;
  text["sequence_length"] = length;
  text["seed"] = seed;
  result["text"] = text;
  result["fold"] = to_json(fold.options);
  result["exact"] = OrderedJson{{"config", true}, {"shapes", true}, {"untouched_tensors_identical", compared}};
  result["layers"] = OrderedJson::array();
  Table table({"layer", "keys predicted", "keys measured", "values predicted", "values measured", "score error",
               "output error"});
  std::vector<double> keys, value_losses;
  std::vector<std::optional<double>> key_deviations, value_deviations;
  const auto cell = [](double share) { return fmt::format("{:.4g}", share); };
  const auto measured_cell = [&](double share, const std::optional<double>& deviation) {
    return deviation ? fmt::format("{:.4g} ± {:.2g}", share, *deviation) : cell(share);
  };
  const auto or_null = [](const std::optional<double>& number) {
    return number ? OrderedJson(*number) : OrderedJson(nullptr);
  };
  for (std::size_t l = 0; l < layers; ++l) {
    ErrorSums errors;
    std::copy(sums.begin() + static_cast<std::ptrdiff_t>(l * ErrorSums::count),
              sums.begin() + static_cast<std::ptrdiff_t>((l + 1) * ErrorSums::count), errors.sums.begin());
    keys.push_back(errors.key());
    value_losses.push_back(errors.value());
    key_deviations.push_back(errors.key_deviation());
    value_deviations.push_back(errors.value_deviation());
    table.add({std::to_string(l), cell(fold.keys[l]), measured_cell(errors.key(), key_deviations.back()),
               cell(fold.values[l]), measured_cell(errors.value(), value_deviations.back()), cell(errors.score()),
               cell(errors.output())});
    OrderedJson one;
    one["layer"] = l;
    one["key_predicted"] = fold.keys[l];
    one["key_measured"] = errors.key();
    one["key_deviation"] = or_null(key_deviations.back());
    one["value_predicted"] = fold.values[l];
    one["value_measured"] = errors.value();
    one["value_deviation"] = or_null(value_deviations.back());
    one["score_error"] = errors.score();
    one["output_error"] = errors.output();
    result["layers"].push_back(std::move(one));
  }
  const double key_order = folding::spearman(fold.keys, keys),
               value_order = folding::spearman(fold.values, value_losses);
  result["key_rank_correlation"] = key_order;
  result["value_rank_correlation"] = value_order;
  const folding::LayerOrder key_layers = folding::layer_order(fold.keys, keys, key_deviations),
                            value_layers = folding::layer_order(fold.values, value_losses, value_deviations);
  const auto order_json = [](const folding::LayerOrder& order) {
    return OrderedJson{{"pairs", order.pairs},
                       {"told_apart", order.told_apart},
                       {"in_order", order.in_order},
                       {"spread", order.spread}};
  };
  result["key_order"] = order_json(key_layers);
  result["value_order"] = order_json(value_layers);
  const auto order_text = [](const folding::LayerOrder& order) {
    return fmt::format("{} of {} ({} of {} not told apart; layers differ by {:.2g} %)", order.in_order,
                       order.told_apart, order.pairs - order.told_apart, order.pairs, 100 * order.spread);
  };
  result["record"] = run_record(context, "verify", arguments, progress.seconds());
  world.on_root([&] { write_json(out, result); });
  if (world.root())
    std::cout << fmt::format(
        "\nrelative squared errors on {} held-out sequences of {} tokens, ± standard error\n{}\nSpearman rank "
        "correlation of predicted "
        "and measured over layers: keys {:.3f}, values {:.3f}\n"
        "pairs of layers more than two standard errors apart that are in the predicted order:\n"
        "  keys {}\n  values {}\n"
        "wrote {}\nnext:\n  headfold evaluate --model {} --reference {} --data FILE\n",
        samples, length, table.text(), key_order, value_order, order_text(key_layers), order_text(value_layers),
        out.string(), shell_word(folded.folder().string()), shell_word(original.folder().string()));
}

}  // namespace headfold::jobs
