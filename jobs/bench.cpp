// headfold bench: how fast this machine does what jobs consist of. A prediction (run --dry-run --nodes) multiplies
// these rates with the work it counts.

#include <ATen/Parallel.h>
#include <headfold/base/files.h>
#include <headfold/base/log.h>
#include <headfold/base/profile.h>
#include <headfold/base/table.h>
#include <headfold/base/version.h>
#include <headfold/calibration/collect.h>
#include <headfold/checkpoint/synthetic.h>
#include <headfold/device/device.h>
#include <headfold/device/measure.h>
#include <headfold/evaluation/scorer.h>
#include <headfold/finetune/trainable.h>
#include <headfold/folding/apply.h>
#include <headfold/folding/bases.h>
#include <headfold/model/product.h>
#include <headfold/scale/memory.h>
#include <headfold/scale/work.h>

#include <chrono>
#include <iostream>
#include <set>
#include <thread>

#include "session.h"
#include "values.h"

namespace headfold::jobs {
namespace {

using bench::median;
using checkpoint::ModelConfig;
using scale::Rates;

constexpr std::int64_t kMostVocab = 32000;  // rows of the head that are measured
constexpr std::int64_t kMostTokens = 2048;  // of a sequence
constexpr double kLongest = 1.2;            // seconds of one pass through a layer's linear maps
constexpr double kBeyondCaches = 400e6;     // bytes of weights that are gone through in turn: models do not fit caches
constexpr std::int64_t kMostCopies = 8;
constexpr std::size_t kMessage = 16 << 20;  // bytes of a message, and of a reduction
constexpr std::int64_t kFoldSequences = 8, kFoldTokens = 64;
constexpr double kFoldSeconds = 4;  // conversions are repeated so long
constexpr int kMostFolds = 8;

struct Settings {
  ModelConfig config;  // one layer
  std::string shape;
  at::ScalarType dtype = at::kFloat;
  std::int64_t length = 0;  // 0: by time
  int repeat = 3;
};

/// Measures on this rank; all ranks measure the same at the same time.
class Bench {
 public:
  Bench(const comm::Communicator& world, Settings settings, const fs::path& scratch)
      : world_(world), settings_(std::move(settings)), folder_(scratch) {}

  void run() {
    step("a layer of random weights", [&] {
      checkpoint::write_synthetic(comm::Communicator::self(), model(), settings_.config, 0, std::uint64_t{5} << 30,
                                  OrderedJson{{"format", "headfold-synthetic"}}, {});
    });
    const checkpoint::Reader reader(model());
    step("memory", [&] { memory(); });
    step("linear maps", [&] { linear_maps(); });
    step("a layer", [&] { layer(reader); });
    step("output projection", [&] { head(reader); });
    step("training", [&] { training(reader); });
    step("a conversion", [&] { conversion(reader); });
    step("links", [&] { links(); });
  }
  /// Name to value, of this rank.
  const std::map<std::string, double>& values() const { return values_; }
  std::int64_t length() const { return settings_.length; }

 private:
  fs::path model() const { return folder_.path() / "model"; }
  void step(const char* what, const std::function<void()>& work) {
    world_.barrier("benchmark");
    if (world_.root()) spdlog::info("measuring {}", what);
    work();
  }
  std::string name(const char* figure) const { return Rates::of(figure, settings_.dtype); }
  /// Median of the repetitions after one that is not counted.
  double timed(const std::function<void()>& work) const {
    work();
    std::vector<double> times;
    times.reserve(static_cast<std::size_t>(settings_.repeat));
    for (int i = 0; i < settings_.repeat; ++i) times.push_back(bench::seconds(work));
    return std::max(1e-9, median(times));
  }
  at::Tensor random(std::initializer_list<std::int64_t> sizes) const {
    return at::randn(at::IntArrayRef(sizes)).to(settings_.dtype);
  }
  std::vector<std::int64_t> random_ids(std::int64_t count) const {
    const at::Tensor ids = at::randint(settings_.config.vocab, {count}, at::kLong);
    return {ids.data_ptr<std::int64_t>(), ids.data_ptr<std::int64_t>() + count};
  }

  void memory() {
    const at::Tensor from = at::ones({std::int64_t{32} << 20}), to = at::empty_like(from);
    values_["memory"] = 2 * static_cast<double>(from.nbytes()) / timed([&] { at::Tensor(to).copy_(from); });
  }

  void linear_maps() {
    const ModelConfig& config = settings_.config;
    std::vector<std::unique_ptr<model::Product>> products;  // of one layer after the other
    double weights = 0;
    for (const checkpoint::TensorShape& tensor : checkpoint::layer_tensors(config, 0))
      if (tensor.shape.size() == 2) weights += static_cast<double>(tensor.elements());
    copies_ = std::clamp<std::int64_t>(
        std::llround(kBeyondCaches / (weights * static_cast<double>(c10::elementSize(settings_.dtype)))), 1,
        kMostCopies);
    std::vector<at::Tensor> matrices;
    for (const checkpoint::TensorShape& tensor : checkpoint::layer_tensors(config, 0))
      if (tensor.shape.size() == 2) matrices.push_back(random({tensor.shape[0], tensor.shape[1]}));
    for (std::int64_t copy = 0; copy < copies_; ++copy)
      for (const at::Tensor& matrix : matrices)
        products.push_back(std::make_unique<model::Product>(matrix.clone(), at::Tensor(), settings_.dtype));
    const auto pass = [&](std::int64_t rows) {
      std::vector<at::Tensor> inputs, outputs;
      for (const at::Tensor& matrix : matrices) {
        inputs.push_back(random({rows, matrix.size(1)}));
        outputs.push_back(model::large_empty({rows, matrix.size(0)}, settings_.dtype));
      }
      return timed([&] {
               for (std::size_t i = 0; i < products.size(); ++i)
                 products[i]->apply(inputs[i % matrices.size()], outputs[i % matrices.size()]);
             }) /
             static_cast<double>(copies_);
    };
    if (settings_.length == 0) {
      constexpr std::int64_t kTried = 128;
      const double tried = world_.all_reduce(pass(kTried), comm::Reduce::max);
      std::int64_t length = kTried;
      while (2 * length <= std::min(kMostTokens, config.max_positions) &&
             tried * static_cast<double>(2 * length) / kTried < kLongest)
        length *= 2;
      settings_.length = std::min(length, config.max_positions);
    }
    product_seconds_ = pass(settings_.length);
    values_[name("product")] = 2 * weights * static_cast<double>(settings_.length) / product_seconds_;
  }

  void layer(const checkpoint::Reader& reader) {
    const ModelConfig& config = settings_.config;
    const std::int64_t tokens = settings_.length, parts = tokens >= 8 ? 4 : 1;
    double bytes = 0;
    for (const checkpoint::TensorShape& tensor : checkpoint::layer_tensors(config, 0))
      bytes += static_cast<double>(tensor.elements() * folding::bytes_per_element(config.dtype));
    // Layers are kept, as jobs keep them: memory that was used before is faster than new memory.
    std::vector<std::unique_ptr<model::Layer>> layers;
    std::vector<double> loads;
    for (std::int64_t copy = 0; copy < std::max<std::int64_t>(2, copies_); ++copy)
      loads.push_back(wall([&] { layers.push_back(model::load_layer(reader, 0, settings_.dtype)); }));
    loads.erase(loads.begin());  // compiles kernels
    values_[name("load")] = bytes / median(loads);
    layers.resize(static_cast<std::size_t>(copies_));
    const auto through = [&](const at::Tensor& hidden, model::LayerObserver* observer) {
      return bench::seconds([&] {
               for (const auto& each : layers) each->forward(hidden, nullptr, observer);
             }) /
             static_cast<double>(copies_);
    };
    const at::Tensor one = random({1, tokens, config.hidden});
    const at::Tensor many = one.view({parts, tokens / parts, config.hidden});
    // As many tokens in one sequence and in four: all but attention is the same.
    std::vector<double> whole, difference;
    double plain = 0;
    for (int i = -1; i < settings_.repeat; ++i) {
      const double a = through(one, nullptr);
      const double b = through(many, nullptr);
      if (i < 0) continue;
      whole.push_back(a);
      difference.push_back(a - b);
    }
    plain = median(whole);
    const scale::Work work = scale::layer_work(config, 0, 1, tokens, settings_.dtype);
    const double share = 1 - 1 / static_cast<double>(parts);
    // In noise a difference may vanish: attention is no faster than products, nor the rest than memory.
    const double attention =
        std::max(share > 0 ? median(difference) / share : 0.0, work.attention / values_.at(name("product")));
    values_[name("attention")] = work.attention / attention;
    values_[name("element_wise")] =
        work.element_bytes / std::max(plain - product_seconds_ - attention, work.element_bytes / values_.at("memory"));

    calibration::CollectOptions options;
    options.dtype = settings_.dtype;
    options.half_samples = true;
    const auto extra = [&](const calibration::StatisticsShape& shape) {
      const at::Tensor slopes = shape.attention && config.family == checkpoint::Family::bloom
                                    ? model::alibi_slopes(config.heads)
                                    : at::Tensor();
      calibration::LayerAccumulator sums(shape, slopes);
      std::vector<double> times;
      for (int i = -1; i < settings_.repeat; ++i) {
        const double with = through(one, &sums);
        const double without = through(one, nullptr);
        if (i >= 0) times.push_back(with - without);
      }
      return median(times);
    };
    const calibration::StatisticsShape shape = calibration::collected_shape(config, options, tokens);
    sums(shape);
    const double ops = scale::statistics_work(config, shape, 1).gram;
    const double grams = std::max(extra(shape), 0.5 * ops / values_.at(name("product")));
    values_[name("gram")] = ops / grams;
    options.attention_statistics = scale::collects_attention(config, options, tokens);
    if (!options.attention_statistics) return;
    const calibration::StatisticsShape all = calibration::collected_shape(config, options, tokens);
    const scale::Work statistics = scale::statistics_work(config, all, 1);
    values_[name("attention_statistics")] =
        statistics.attention_statistics /
        std::max(extra(all) - grams, 0.5 * statistics.attention_statistics / values_.at(name("product")));
  }

  /// What statistics of a layer cost whatever the number of sequences.
  void sums(const calibration::StatisticsShape& shape) {
    const at::Tensor first = random({2, 1, shape.hidden});  // first tokens of a sequence of either half
    std::vector<std::unique_ptr<calibration::LayerAccumulator>> kept;
    double spent = 0;
    for (int i = 0; i < 2; ++i)  // in new memory both times; the first time compiles kernels
      spent = wall([&] {
        kept.push_back(std::make_unique<calibration::LayerAccumulator>(shape));
        kept.back()->attention_input(first);
        kept.back()->finish(comm::Communicator::self(), 0);
      });
    values_["sums"] = static_cast<double>(calibration::layer_statistics_bytes(shape)) / spent;
  }

  void head(const checkpoint::Reader& reader) {
    const model::Head projection(reader, settings_.dtype);
    const at::Tensor hidden = random({settings_.length, settings_.config.hidden});
    evaluation::Window window;
    window.inputs = window.targets = random_ids(settings_.length);
    const double spent = timed([&] {
      evaluation::score_window(window, hidden, projection, {}, nullptr, evaluation::ScorerOptions{}.logits_bytes);
    });
    values_[name("head")] = scale::head_work(settings_.config, static_cast<double>(settings_.length)).head / spent;
  }

  void training(const checkpoint::Reader& reader) {
    finetune::LoraOptions lora;
    lora.dropout = 0;
    finetune::TrainableModel trained(reader, lora, settings_.dtype);
    const std::vector<std::int64_t> ids = random_ids(settings_.length);
    finetune::Batch batch;
    batch.ids = at::tensor(ids, at::kLong).unsqueeze(0);
    batch.targets = batch.ids;
    const double spent = timed([&] { trained.forward_backward(batch, nullptr, {}, 1, 0); });
    Rates own;
    own.figures = figures();
    const scale::Work work = scale::training_work(settings_.config, lora, false, 1, settings_.length, settings_.dtype);
    values_[name("training")] = spent / scale::seconds_of(work, own, settings_.dtype);
  }

  /// Statistics of one layer, a fold to half the KV heads, the new checkpoint.
  void conversion(const checkpoint::Reader& reader) {
    const ModelConfig& config = settings_.config;
    const comm::Communicator self = comm::Communicator::self();
    const std::int64_t tokens = std::min(kFoldTokens, config.max_positions);
    calibration::CollectOptions options;
    options.dtype = settings_.dtype;
    options.half_samples = true;
    options.attention_statistics = scale::collects_attention(config, options, tokens);
    const comm::Grid grid = comm::make_grid(self, 1);
    const at::Tensor sequences = at::randint(config.vocab, {kFoldSequences, tokens}, at::kLong);
    const auto layers = calibration::collect(reader, grid, sequences, options);
    calibration::StatisticsHeader header = calibration::header_of(config, options, kFoldSequences, tokens);
    header.headfold_version = version();
    header.model_hash = reader.fingerprint();
    header.data_hash = std::string(64, '0');
    const fs::path file = folder_.path() / "calibration.h5";
    const auto bytes = static_cast<double>(calibration::statistics_file_bytes(header));
    values_["statistics"] =
        bytes /
        wall([&] { calibration::write_statistics(file, header, self, calibration::layers_to_write(layers, 0, grid)); });
    const std::vector<std::int64_t> legal = folding::legal_kv_heads(config);
    const std::int64_t half = config.kv_heads / 2;
    if (std::find(legal.begin(), legal.end(), half) == legal.end()) return;  // one head cannot be folded
    folding::FoldOptions fold;
    if (config.family == checkpoint::Family::bloom) fold.keys = folding::KeyFold::norope;
    fold.kv_heads = half;
    const calibration::StatisticsFile statistics(file);
    fold = folding::with_effective_metrics(fold, true);
    std::map<std::string, double> run;  // of all that count
    int counted = 0;
    double total = 0;  // seconds
    for (int i = 0; counted == 0 || (total < kFoldSeconds && counted < kMostFolds); ++i) {
      const std::vector<Spent> before = profile();
      const double seconds = wall([&] {
        folding::KeptBases kept;
        const folding::Plan plan = folding::make_plan(self, reader, &statistics, fold, {}, true, &kept);
        const fs::path folded = folder_.path() / fmt::format("folded{}", i);
        folding::apply_plan(self, reader, &statistics, plan, folded, std::uint64_t{5} << 30, nullptr, &kept);
        fs::remove_all(folded);
      });
      if (i == 0) continue;  // compiles kernels and grows the heap
      ++counted;
      total = world_.all_reduce(total + seconds, comm::Reduce::max);  // ranks go on alike
      const std::vector<Spent> after = profile();
      for (std::size_t w = 0; w < after.size(); ++w) {
        const bool files = after[w].work == name_of(Work::writing) || after[w].work == name_of(Work::sync) ||
                           after[w].work == name_of(Work::copying);
        const bool processor = at::get_num_threads() == 1 && !files;
        run[after[w].work] += (processor ? after[w].processor_seconds - before[w].processor_seconds
                                         : after[w].seconds - before[w].seconds) /
                              at::get_num_threads();
      }
    }
    const auto spent = [&](std::initializer_list<Work> works) {
      double sum = 0;
      for (const Work one : works) sum += run.at(name_of(one));
      return std::max(sum / counted, 1e-9);
    };
    const scale::FoldWork work =
        scale::fold_work(config, half, calibration::collected_shape(config, options, tokens), true);
    values_["read"] =
        (2 * work.read_weights + work.read_statistics) / spent({Work::read_weights, Work::read_statistics});
    values_["fold"] =
        (work.plan + work.keys + work.values) / spent({Work::moments, Work::products, Work::new_weights, Work::other});
    values_["eigen"] = work.plan_eigen / spent({Work::eigen});
    values_["copy"] = (scale::checkpoint_bytes(config) - work.read_weights) / spent({Work::copying});
    values_["write"] = work.written / spent({Work::writing, Work::sync});
  }

  void links() {
    if (world_.size() < 2) return;
    const std::vector<std::string> hosts = world_.all_gather(comm::Environment::host());
    const auto own = static_cast<std::size_t>(world_.rank());
    std::vector<std::byte> message(kMessage), answer(kMessage);
    const auto between = [&](std::size_t a, std::size_t b, const std::string& link) {
      const auto round = [&](std::size_t bytes) {
        const std::span<std::byte> out(message.data(), bytes), in(answer.data(), bytes);
        const int other = static_cast<int>(own == a ? b : a);
        return wall([&] {
          comm::Request receive = world_.irecv(in, other, 1);
          comm::Request send = world_.isend(out, other, 1);
          receive.wait();
          send.wait();
        });
      };
      std::vector<double> small, large;
      for (int i = -2; i < 5; ++i) {
        world_.barrier("benchmark of links");
        if (own != a && own != b) continue;
        const double s = round(8), l = round(kMessage);
        if (i >= 0) small.push_back(s), large.push_back(l);
      }
      if (own != a && own != b) return;
      values_[link + "_latency"] = median(small);
      values_[link] = static_cast<double>(kMessage) / std::max(1e-9, median(large) - median(small));
    };
    const auto partner = [&](bool same_host) {
      for (std::size_t rank = 1; rank < hosts.size(); ++rank)
        if ((hosts[rank] == hosts[0]) == same_host) return rank;
      return std::size_t{0};
    };
    if (const std::size_t other = partner(true); other > 0) between(0, other, "inside");
    if (const std::size_t other = partner(false); other > 0) between(0, other, "network");
    // One after the other, as a layer's statistics are: what was summed just before is not in a cache.
    constexpr std::size_t kSums = kMessage / sizeof(double), kCount = 6;
    std::vector<double> sums(kCount * kSums, 1.0), times;
    for (std::size_t i = 0; i < kCount; ++i) {
      world_.barrier("benchmark of sums");
      const double spent = wall([&] { world_.all_reduce(std::span(sums).subspan(i * kSums, kSums)); });
      if (i > 0) times.push_back(spent);
    }
    const auto n = static_cast<double>(world_.size());
    const bool one_host = std::set<std::string>(hosts.begin(), hosts.end()).size() == 1;
    values_[one_host ? "all_reduce_inside" : "all_reduce_network"] =
        2 * (n - 1) / n * static_cast<double>(kMessage) / std::max(1e-9, median(times));
  }

  static double wall(const std::function<void()>& work) {
    const auto start = std::chrono::steady_clock::now();
    work();
    return std::max(1e-9, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::map<std::string, scale::Figure> figures() const {
    std::map<std::string, scale::Figure> all;
    for (const auto& [key, value] : values_) all[key] = {value, scale::unit_of(key), "measured"};
    return all;
  }

  comm::Communicator world_;
  Settings settings_;
  bench::TemporaryFolder folder_;
  std::map<std::string, double> values_;
  double product_seconds_ = 0;  // of one layer
  std::int64_t copies_ = 1;     // of the layer, gone through in turn
};

/// Cores that the ranks of this node share. Collective.
int node_cores(const comm::Communicator& world) {
  const comm::Communicator host = world.split_by_host();
  const auto widest =
      static_cast<int>(host.all_reduce(static_cast<std::int64_t>(device::usable_cores()), comm::Reduce::max));
  // Under a launcher that binds ranks to cores each rank has its own.
  const bool bound = host.size() > 1 && widest * host.size() <= static_cast<int>(std::thread::hardware_concurrency());
  return bound ? widest * host.size() : widest;
}

std::string shown(double value, const std::string& unit) {
  if (unit == "FLOP/s") return fmt::format("{:.1f} GFLOP/s", value / 1e9);
  if (unit == "B/s") return fmt::format("{:.2f} GB/s", value / 1e9);
  if (unit == "s") return fmt::format("{:.1f} us", value * 1e6);
  return fmt::format("{:.3f}", value);
}

}  // namespace

void bench_machine(const Context& context, const std::vector<std::string>& arguments) {
  po::options_description own("bench");
  own.add_options()("shape", po::value<std::string>()->default_value("llama2-7b"),
                    "layer shapes: llama2-7b, llama2-13b, llama2-70b, bloomz-7b1, or a config.json")(
      "dtype", po::value<std::string>()->default_value("auto"), "compute dtype: float32, bfloat16, or auto")(
      "seq-len", po::value<std::int64_t>()->default_value(0),
      "tokens of a sequence; 0 = as many as take about a second per layer, up to 2048")(
      "repeat", po::value<std::int64_t>()->default_value(3), "repetitions, of which medians count")(
      "scratch", po::value<std::string>(), "folder for temporary files (default: the system's); its speed is measured")(
      "out", po::value<std::string>(), "file of rates to write (.json)");
  const po::variables_map values =
      parse(context, "bench", "headfold bench [--shape SHAPE] [--dtype DTYPE] [--out rates.json]", own, arguments);
  const comm::Communicator& world = context.world;
  if (values.count("out") > 0)
    world.on_root([&] {
      check_output_file(values, values["out"].as<std::string>(), "rates of headfold bench",
                        [](const fs::path& file) { return read_json(file).at("format") == "headfold-rates"; });
    });
  Settings settings;
  settings.shape = values["shape"].as<std::string>();
  settings.repeat = static_cast<int>(std::min<std::int64_t>(1000, at_least(values, "repeat", 1)));
  const Json base = read_shape(settings.shape);
  const ModelConfig whole = checkpoint::parse_config(base, settings.shape);
  if (whole.layout != checkpoint::KvLayout::gqa)
    throw InputError(fmt::format("{}: layout {} cannot be measured", settings.shape, checkpoint::name_of(whole.layout)),
                     "measure the model that it was folded from");
  checkpoint::ShapeChange change;
  change.layers = 1;
  change.vocab = std::min(whole.vocab, kMostVocab);
  settings.config = checkpoint::change_shape(base, change, settings.shape);
  settings.dtype = parse_dtype(values["dtype"].as<std::string>(), whole.dtype);
  settings.length = at_least(values, "seq-len", 0);
  if (settings.length > 0) settings.length = std::clamp<std::int64_t>(settings.length, 8, whole.max_positions);
  const fs::path scratch =
      values.count("scratch") > 0 ? fs::path(values["scratch"].as<std::string>()) : fs::temp_directory_path();
  world.on_root([&] { make_folder(scratch); });
  const double needed = 2.5 * scale::checkpoint_bytes(settings.config) * world.split_by_host().size();
  if (static_cast<double>(free_bytes(scratch)) < needed)
    throw IoError(scratch.string(),
                  fmt::format("needs {}, {} are free", human_bytes(needed),
                              human_bytes(static_cast<double>(free_bytes(scratch)))),
                  "name another folder with --scratch");

  Bench bench(world, settings, scratch);
  const auto start = std::chrono::steady_clock::now();
  bench.run();
  // Ranks measure at the same time: the mean of their rates is what each of them can count on.
  OrderedJson mine = OrderedJson::object();
  for (const auto& [name, value] : bench.values()) mine[name] = value;
  std::map<std::string, std::pair<double, int>> sums;
  for (const std::string& text : world.all_gather(mine.dump())) {
    const OrderedJson of_rank = OrderedJson::parse(text);
    for (const auto& [name, value] : of_rank.items()) {
      sums[name].first += value.get<double>();
      ++sums[name].second;
    }
  }
  Rates rates;
  rates.device = "cpu";
  rates.cores = node_cores(world);
  rates.threads = at::get_num_threads();
  rates.node_memory = static_cast<double>(available_memory_bytes());
  for (const auto& [name, sum] : sums) rates.figures[name] = {sum.first / sum.second, scale::unit_of(name), "measured"};
  const OrderedJson record = run_record(
      context, "bench", arguments, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  if (!world.root()) return;
  Table table({"figure", "per rank"});
  for (const auto& [name, figure] : rates.figures) table.add({name, shown(figure.value, figure.unit)});
  std::cout << fmt::format("{} ({} layer shapes, {}, {} tokens), {} rank(s) of {} thread(s) at once, {}\n{}",
                           comm::Environment::host(), settings.shape, dtype_name(settings.dtype), bench.length(),
                           world.size(), rates.threads, human_seconds(record["seconds"].get<double>()), table.text())
            << std::flush;
  if (rates.cores < world.size() * rates.threads)
    spdlog::warn("{} ranks of {} thread(s) share {} cores: rates are those of a crowded machine", world.size(),
                 rates.threads, rates.cores);
  if (values.count("out") == 0) return;
  const fs::path out = values["out"].as<std::string>();
  OrderedJson facts;
  facts["shape"] = fs::path(settings.shape).filename().string();
  facts["hidden"] = settings.config.hidden;
  facts["dtype"] = dtype_name(settings.dtype);
  facts["sequence_length"] = bench.length();
  facts["record"] = record;
  write_json(out, scale::to_json(rates, facts));
  std::cout << fmt::format("wrote {}\nnext: headfold run --dry-run --gpu cpu --rates {} --shape {}\n", out.string(),
                           out.string(), settings.shape);
}

}  // namespace headfold::jobs
