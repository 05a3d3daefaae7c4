#include <headfold/base/error.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/finetune/optimizer.h>
#include <headfold/finetune/trainable.h>
#include <headfold/folding/apply.h>
#include <headfold/folding/bases.h>
#include <headfold/model/pipeline.h>
#include <headfold/model/rounds.h>
#include <headfold/scale/predict.h>

#include <algorithm>
#include <cmath>
#include <map>

namespace headfold::scale {
namespace {

constexpr double kGradientBucket = 4 << 20;  // bytes that are summed at a time at least (finetune::Optimizer)

const char* what_of(const std::string& figure) {
  static const std::map<std::string, const char*> names = {{"product", "linear maps"},
                                                           {"attention", "attention"},
                                                           {"element_wise", "norms, rotations, activations"},
                                                           {"gram", "Grams"},
                                                           {"attention_statistics", "attention statistics"},
                                                           {"head", "output projection and loss"}};
  return names.at(figure);
}

/// Collects the parts of a prediction.
class Builder {
 public:
  Builder(const Rates& rates, const Cluster& cluster, const char* stage) : rates_(rates), cluster_(cluster) {
    if (cluster.nodes < 1 || cluster.ranks_per_node < 1) throw InternalError("a cluster without ranks");
    result_.stage = result_.name = stage;
    if (rates.cores > 0 && cluster.ranks_per_node * rates.threads > rates.cores)
      note(fmt::format("{} ranks of {} thread(s) share the {} cores of a node", cluster.ranks_per_node, rates.threads,
                       rates.cores));
    if (rates.has("job")) part("start and end of the job", "job", "waiting", rates.value("job"));
  }
  Prediction& result() { return result_; }
  void note(std::string text) { result_.notes.push_back(std::move(text)); }
  void part(std::string what, std::string figure, std::string binds, double seconds) {
    if (seconds > 0) result_.parts.push_back({std::move(what), std::move(figure), std::move(binds), seconds});
  }
  /// Seconds of work that takes the ranks of a node `busy` seconds together and the slowest of them `path`.
  double on_cores(double path, double busy) const {
    if (rates_.cores == 0) return path;
    return std::max(path, busy * rates_.threads / rates_.cores);
  }
  /// The same where every rank of a node is as busy as the slowest.
  double on_cores(double path) const { return on_cores(path, path * cluster_.ranks_per_node); }
  /// Compute of one rank, by figure, stretched to `seconds`; what is not explained is `rest`.
  void compute(const Work& work, at::ScalarType dtype, double seconds, double factor, const char* rest,
               const char* suffix = "") {
    const double own = seconds_of(work, rates_, dtype);
    const double whole = on_cores(own * factor);
    const double stretch = own > 0 ? std::min(whole, seconds) / own : 0;
    for (const auto& [figure, spent] : seconds_by_figure(work, rates_, dtype))
      part(what_of(figure) + std::string(suffix), Rates::of(figure, dtype),
           figure == "element_wise" ? "memory bandwidth" : "compute", spent * stretch);
    part(rest, "", "waiting", seconds - own * stretch);
  }
  /// Reading or writing `bytes` per rank at a figure's rate, at most the node's storage. `distinct`: what ranks of a
  /// node read of one and the same file comes from storage once.
  void files(const char* what, const std::string& figure, double bytes, double distinct = 1e300) {
    if (bytes <= 0) return;
    double seconds = on_cores(bytes / rates_.value(figure));
    std::string by = figure;
    if (rates_.has("storage")) {
      const double node = std::min(bytes * cluster_.ranks_per_node, distinct) / rates_.value("storage");
      if (node > seconds) seconds = node, by = "storage";
    }
    part(what, by, "storage", seconds);
  }
  void text(double bytes) {
    if (bytes <= 0) return;
    const double rate = rates_.has("text") ? rates_.value("text") : sheets().at("assumed").at("text").get<double>();
    part("reading and tokenising text", "text", "compute", bytes / rate);
  }
  void memory(double total_on_cpu, double device, double host) {
    const bool gpu = rates_.device_memory > 0;
    result_.device_memory = gpu ? device : 0;
    result_.host_memory = gpu ? host : total_on_cpu;
    if (gpu && device > rates_.device_memory)
      note(fmt::format("does not fit: {:.1f} GB of {:.1f} GB of the device", device / 1e9, rates_.device_memory / 1e9));
    const double node = result_.host_memory * cluster_.ranks_per_node;
    if (rates_.node_memory > 0 && node > rates_.node_memory)
      note(fmt::format("does not fit: {:.1f} GB of {:.1f} GB of a node", node / 1e9, rates_.node_memory / 1e9));
  }
  double budget() const {
    return rates_.device_memory > 0 ? rates_.device_memory : rates_.node_memory / cluster_.ranks_per_node;
  }
  Prediction finish() {
    std::map<std::string, double> by;
    for (const Part& one : result_.parts) {
      result_.seconds += one.seconds;
      by[one.binds] += one.seconds;
    }
    double most = 0;
    for (const auto& [binds, seconds] : by)
      if (seconds > most) most = seconds, result_.binds = binds;
    return std::move(result_);
  }

 private:
  const Rates& rates_;
  const Cluster& cluster_;
  Prediction result_;
};

/// Fewest stages that divide the ranks, are no more than the layers, and fit.
int choose_stages(int given, int world, std::int64_t layers, double budget, const std::function<double(int)>& needs) {
  if (given > 0) {
    if (world % given != 0 || given > layers)
      throw UsageError(fmt::format("{} pipeline ranks do not go with {} ranks and {} layers", given, world, layers),
                       "choose a divisor of the ranks that is no more than the layers");
    return given;
  }
  int most = 1;
  for (int stages = 1; stages <= world && stages <= layers; ++stages) {
    if (world % stages != 0) continue;
    most = stages;
    if (needs(stages) <= budget) return stages;
  }
  return most;
}

std::vector<int> peers_of(int stage, int stages, int replicas) {
  std::vector<int> ranks;
  ranks.reserve(static_cast<std::size_t>(replicas));
  for (int replica = 0; replica < replicas; ++replica) ranks.push_back(replica * stages + stage);
  return ranks;
}

std::vector<int> all_ranks(int world) {
  std::vector<int> ranks(static_cast<std::size_t>(world));
  for (int rank = 0; rank < world; ++rank) ranks[static_cast<std::size_t>(rank)] = rank;
  return ranks;
}

void add(Moved& sum, const Moved& more) {
  sum.inside += more.inside;
  sum.network += more.network;
  sum.read += more.read;
  sum.written += more.written;
}

double element_of(const ModelConfig& config) {
  return static_cast<double>(folding::bytes_per_element(config.dtype));
}

/// Bytes of a stage's layers in the checkpoint, embedding and head where they belong.
double stage_file_bytes(const ModelConfig& config, int stages, int stage, bool head) {
  const auto range = model::stage_layers(config, stages)[static_cast<std::size_t>(stage)];
  double elements = 0;
  for (std::int64_t layer = range.begin; layer < range.end; ++layer)
    for (const checkpoint::TensorShape& tensor : checkpoint::layer_tensors(config, layer))
      elements += static_cast<double>(tensor.elements());
  const double table = static_cast<double>(config.vocab) * static_cast<double>(config.hidden);
  if (stage == 0) elements += table;
  if (head && stage + 1 == stages) elements += table;
  return elements * element_of(config);
}

double largest_layer_bytes(const ModelConfig& config, at::ScalarType dtype) {
  double most = 0;
  for (std::int64_t layer = 0; layer < config.layers; ++layer) {
    double elements = 0;
    for (const checkpoint::TensorShape& tensor : checkpoint::layer_tensors(config, layer))
      elements += static_cast<double>(tensor.elements());
    most = std::max(most, elements);
  }
  return most * static_cast<double>(c10::elementSize(dtype));
}

/// A message between two stages that follow one another, on the slowest link that any pipeline has.
double hop_seconds(const Rates& rates, const Cluster& cluster, int stages, int replicas, double bytes) {
  if (stages < 2) return 0;
  bool crosses = false;
  for (int replica = 0; replica < replicas; ++replica)
    for (int stage = 0; stage + 1 < stages; ++stage)
      crosses = crosses || cluster.node_of(replica * stages + stage) != cluster.node_of(replica * stages + stage + 1);
  const std::string link = crosses ? "network" : "inside";
  return bytes / rates.value(link) + rates.value(link + "_latency");
}

/// Micro-batches through the layers of a grid: what calibration and evaluation share.
struct Passage {
  std::vector<Work> work;          ///< of one micro-batch, by stage
  std::int64_t micro_batches = 0;  ///< of a replica
  std::int64_t tokens = 0;         ///< of one micro-batch
  double total = 0;                ///< micro-batches of all replicas
  double message = 0;              ///< bytes of its hidden states
  std::int64_t most_per_round = std::int64_t{1} << 40;
  bool streamed = false;
};

void pass(Builder& builder, const Rates& rates, const Cluster& cluster, const Passage& passage, at::ScalarType dtype,
          int stages, int replicas, const char* suffix) {
  Prediction& result = builder.result();
  const double hop = hop_seconds(rates, cluster, stages, replicas, passage.message);
  std::vector<double> seconds;
  std::size_t slowest = 0;
  double busy = 0;  // of all stages of one replica, per micro-batch
  for (std::size_t s = 0; s < passage.work.size(); ++s) {
    const double own = seconds_of(passage.work[s], rates, dtype);
    busy += own;
    // Sends and receives go on beside computing: a stage is as slow as the slower of the two.
    seconds.push_back(std::max(own, s + 1 < passage.work.size() ? hop : 0.0));
    if (seconds_of(passage.work[slowest], rates, dtype) < own) slowest = s;
  }
  const auto count = static_cast<double>(passage.micro_batches);
  const double path =
      pipeline_seconds(seconds, passage.micro_batches, passage.tokens, passage.streamed, passage.most_per_round) +
      hop * (stages - 1);
  const double node_busy = busy * count / stages * cluster.ranks_per_node;
  const double whole = builder.on_cores(path, node_busy);
  const double own = seconds_of(passage.work[slowest], rates, dtype) * count;
  if (hop > seconds_of(passage.work[slowest], rates, dtype))
    builder.part("hidden states between stages", "network", "link", whole - own);
  const double explained = hop > seconds_of(passage.work[slowest], rates, dtype) ? own : whole;
  // The slowest stage's work as it would be alone on a core, stretched to what its node gives it.
  const double stretched = builder.on_cores(own, node_busy);
  for (const auto& [figure, spent] : seconds_by_figure(passage.work[slowest] * count, rates, dtype))
    builder.part(what_of(figure) + std::string(suffix), Rates::of(figure, dtype),
                 figure == "element_wise" ? "memory bandwidth" : "compute",
                 spent / own * std::min(stretched, explained));
  builder.part(std::string("filling and draining the pipeline") + suffix, "", "waiting",
               explained - std::min(stretched, explained));
  // Of all ranks' time while micro-batches run, filling, draining and replicas without a last one included.
  result.bubble = std::max(result.bubble,
                           path > 0 ? 1 - busy * passage.total / (static_cast<double>(replicas * stages) * path) : 0.0);
  for (const Work& one : passage.work) result.flops += one.flops() * passage.total;
  add(result.moved, pipeline_bytes(cluster, stages, replicas, passage.message * passage.total / replicas));
}

}  // namespace

double pipeline_seconds(const std::vector<double>& stage_seconds, std::int64_t micro_batches, std::int64_t tokens,
                        bool streamed, std::int64_t most_per_round) {
  double sum = 0, slowest = 0;
  for (const double seconds : stage_seconds) sum += seconds, slowest = std::max(slowest, seconds);
  if (streamed) return sum * static_cast<double>(micro_batches);  // a stage begins when the one before it is through
  comm::Grid grid;
  grid.stages = static_cast<int>(stage_seconds.size());
  model::RoundSize round(grid, streamed, tokens);
  double total = 0;
  constexpr int kRounds = 100000;  // those after them are like them
  int rounds = 0;
  for (std::int64_t done = 0; done < micro_batches;) {
    const std::int64_t size = std::max<std::int64_t>(1, std::min({round.size(), micro_batches - done, most_per_round}));
    const double took = sum + static_cast<double>(size - 1) * slowest;
    round.took(took, size);
    total += took;
    done += size;
    if (++rounds == kRounds)
      total *= static_cast<double>(micro_batches) / static_cast<double>(done), done = micro_batches;
  }
  return total;
}

Moved pipeline_bytes(const Cluster& cluster, int stages, int replicas, double bytes_per_replica) {
  Moved moved;
  for (int replica = 0; replica < replicas; ++replica)
    for (int stage = 0; stage + 1 < stages; ++stage) {
      const int rank = replica * stages + stage;
      (cluster.node_of(rank) == cluster.node_of(rank + 1) ? moved.inside : moved.network) += bytes_per_replica;
    }
  return moved;
}

Reduction all_reduce(const Rates& rates, const Cluster& cluster, const std::vector<int>& ranks, double payload) {
  Reduction result;
  const auto n = static_cast<double>(ranks.size());
  if (ranks.size() < 2 || payload <= 0) return result;
  const double per_hop = 2 * (n - 1) / n * payload;
  bool crosses = false;
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    const bool hop_crosses = cluster.node_of(ranks[i]) != cluster.node_of(ranks[(i + 1) % ranks.size()]);
    crosses = crosses || hop_crosses;
    (hop_crosses ? result.moved.network : result.moved.inside) += per_hop;
  }
  const std::string link = crosses ? "network" : "inside";
  const std::string own = "all_reduce_" + link;
  result.seconds = per_hop / rates.value(rates.has(own) ? own : link) + 2 * (n - 1) * rates.value(link + "_latency");
  return result;
}

Prediction predict(const Rates& rates, const Cluster& cluster, const CalibrateStage& stage) {
  Builder builder(rates, cluster, "calibrate");
  Prediction& result = builder.result();
  const ModelConfig& config = stage.config;
  CalibrationSettings settings = stage.settings;
  settings.threads = rates.threads;
  const calibration::CollectOptions& collect = settings.collect;
  const calibration::StatisticsShape shape = calibration::collected_shape(config, collect, settings.length);
  const int world = cluster.world();
  const int stages = choose_stages(stage.stages, world, config.layers, builder.budget(),
                                   [&](int count) { return widest_stage(config, settings, count).total(); });
  const int replicas = world / stages;
  result.stages = stages;
  result.replicas = replicas;
  const auto ranges = model::stage_layers(config, stages);

  builder.text(stage.data_bytes);
  const bool streamed = collect.residency == model::Residency::streamed;
  double load = 0;
  for (int s = 0; s < stages; ++s) {
    const double bytes = stage_file_bytes(config, stages, s, false);
    load = std::max(load, bytes);
    result.moved.read += bytes * replicas;
  }
  builder.files("loading weights", Rates::of("load", collect.dtype), load, checkpoint_bytes(config));

  const std::int64_t batches = (stage.samples + collect.micro_batch - 1) / collect.micro_batch;
  Passage passage;
  passage.micro_batches = (batches + replicas - 1) / replicas;
  passage.total = static_cast<double>(batches);
  passage.tokens = collect.micro_batch * settings.length;
  passage.streamed = streamed;
  passage.message =
      static_cast<double>(passage.tokens * config.hidden) * static_cast<double>(c10::elementSize(collect.dtype));
  const double sequences =  // of a micro-batch, the last one's shortness spread over all
      static_cast<double>(stage.samples) / static_cast<double>(batches);
  for (const comm::LayerRange& range : ranges) {
    Work work;
    for (std::int64_t layer = range.begin; layer < range.end; ++layer) {
      work += layer_work(config, layer, sequences, settings.length, collect.dtype);
      work += statistics_work(config, shape, sequences);
    }
    passage.work.push_back(work);
  }
  pass(builder, rates, cluster, passage, collect.dtype, stages, replicas, "");
  if (batches < replicas)
    builder.note(fmt::format("{} micro-batches keep only so many of {} replicas busy", batches, replicas));

  double sums = 0;
  const auto layer_bytes = static_cast<double>(calibration::layer_statistics_bytes(shape));
  for (int s = 0; s < stages; ++s) {
    const auto layers = static_cast<double>(ranges[static_cast<std::size_t>(s)].size());
    const Reduction reduction = all_reduce(rates, cluster, peers_of(s, stages, replicas), layers * layer_bytes);
    sums = std::max(sums, reduction.seconds);
    add(result.moved, reduction.moved);
  }
  // Whatever the number of sequences, and by every replica.
  if (rates.has("sums")) {
    double most = 0;
    for (const comm::LayerRange& range : ranges) most = std::max(most, static_cast<double>(range.size()));
    builder.part("memory for statistics, bringing halves together", "sums", "memory bandwidth",
                 builder.on_cores(most * layer_bytes / rates.value("sums")));
  }
  builder.part("summing statistics over replicas", cluster.nodes > 1 ? "network" : "inside", "link",
               builder.on_cores(sums));
  const std::int64_t most_layers =
      ranges.empty() ? 0 : std::max_element(ranges.begin(), ranges.end(), [](const auto& a, const auto& b) {
                             return a.size() < b.size();
                           })->size();
  const std::int64_t written_layers = (most_layers + replicas - 1) / replicas;  // by one rank
  builder.files("writing statistics", "statistics", static_cast<double>(written_layers) * layer_bytes);
  result.moved.written = static_cast<double>(config.layers) * layer_bytes;

  const double device = widest_stage(config, settings, stages).total();
  builder.memory(device + cluster.process_bytes, device,
                 cluster.process_bytes + 2 * largest_layer_bytes(config, collect.dtype) + layer_bytes);
  return builder.finish();
}

Prediction predict(const Rates& rates, const Cluster& cluster, const ConvertStage& stage) {
  Builder builder(rates, cluster, "convert");
  Prediction& result = builder.result();
  const ModelConfig& config = stage.config;
  const int world = cluster.world();
  const FoldWork work = fold_work(config, stage.kv_heads, stage.shape, stage.held_out);
  const double untouched = checkpoint_bytes(config) - static_cast<double>(config.layers) * work.read_weights;

  /// What one rank does.
  struct Share {
    double read = 0, plan = 0, eigen = 0, apply = 0, copied = 0, written = 0;
  };
  std::vector<Share> shares;
  const std::int64_t kept = stage.kv_heads;
  for (int rank = 0; rank < world; ++rank) {
    Share share;
    const auto [begin, end] = folding::share_of(config.layers * kept, rank, world);
    if (end > begin) {
      const std::int64_t touched = (end - 1) / kept - begin / kept + 1;
      const auto layers = static_cast<double>(touched);
      const double groups = static_cast<double>(end - begin) / static_cast<double>(kept);
      share.read += layers * (work.read_weights + work.read_statistics);
      share.plan = groups * work.plan;
      share.eigen = groups * work.plan_eigen;
    }
    const auto [first, last] = folding::share_of(2 * config.layers, rank, world);
    for (std::int64_t item = first; item < last; ++item) {
      share.apply += item % 2 == 0 ? work.keys : work.values;
      share.read += work.read_weights / 2;
      share.written += work.written / 2;
    }
    share.copied = untouched / world;
    shares.push_back(share);
    result.moved.read += share.read + share.copied;
    result.moved.written += share.written + share.copied;
    result.flops += share.plan + share.eigen + share.apply;
  }
  const auto most = [&](double Share::*member) {
    double value = 0;
    for (const Share& share : shares) value = std::max(value, share.*member);
    return value;
  };
  builder.files("reading weights and statistics", "read", most(&Share::read));
  builder.part("planning: products", "fold", "compute", builder.on_cores(most(&Share::plan) / rates.value("fold")));
  builder.part("planning: factorisations", "eigen", "compute",
               builder.on_cores(most(&Share::eigen) / rates.value("eigen")));
  builder.part("new weights", "fold", "compute", builder.on_cores(most(&Share::apply) / rates.value("fold")));
  builder.files("copying other tensors", "copy", most(&Share::copied));
  builder.files("writing new tensors", "write", most(&Share::written));
  const double mean = result.flops / world, worst = most(&Share::plan) + most(&Share::eigen) + most(&Share::apply);
  result.bubble = worst > 0 ? std::max(0.0, 1 - mean / worst) : 0;
  result.replicas = world;
  const double memory = conversion_memory(config);
  builder.memory(memory + cluster.process_bytes, 0, memory + cluster.process_bytes);
  return builder.finish();
}

Prediction predict(const Rates& rates, const Cluster& cluster, const FinetuneStage& stage) {
  Builder builder(rates, cluster, "finetune");
  Prediction& result = builder.result();
  const ModelConfig& config = stage.config;
  const int world = cluster.world();
  result.replicas = world;
  const auto steps = static_cast<double>(stage.steps);
  const std::int64_t blocks = (stage.batch + stage.micro_batch - 1) / stage.micro_batch;
  const std::int64_t own_blocks = (blocks + world - 1) / world;
  const double sequences = static_cast<double>(stage.batch) / static_cast<double>(blocks);
  const double factor = rates.value(Rates::of("training", stage.dtype));

  builder.text(stage.data_bytes);
  double load = checkpoint_bytes(config);
  if (stage.teacher) load += checkpoint_bytes(*stage.teacher);
  builder.files("loading weights", Rates::of("load", stage.dtype), load, load);
  result.moved.read = load * world;

  const Work block = training_work(config, stage.lora, stage.keep_activations, sequences, stage.length, stage.dtype);
  const double block_seconds = seconds_of(block, rates, stage.dtype) * factor;
  // Ranks without a last block wait for the others; on shared cores they leave them to these.
  const double node_blocks = std::min(static_cast<double>(own_blocks * cluster.ranks_per_node),
                                      std::ceil(static_cast<double>(blocks) / cluster.nodes));
  const double step_seconds =
      builder.on_cores(static_cast<double>(own_blocks) * block_seconds, node_blocks * block_seconds);
  for (const auto& [figure, spent] : seconds_by_figure(block, rates, stage.dtype))
    builder.part(what_of(figure) + std::string(", forward and backward"), Rates::of(figure, stage.dtype),
                 figure == "element_wise" ? "memory bandwidth" : "compute",
                 steps * step_seconds * spent * factor / block_seconds);
  result.flops = steps * static_cast<double>(blocks) * block.flops();
  const auto forward_of = [&](const ModelConfig& model, double count) {
    Work work;
    for (std::int64_t layer = 0; layer < model.layers; ++layer)
      work += layer_work(model, layer, count, stage.length, stage.dtype);
    work += head_work(model, count * static_cast<double>(stage.length));
    return work;
  };
  if (stage.teacher) {
    const Work work = forward_of(*stage.teacher, sequences);
    const double seconds = seconds_of(work, rates, stage.dtype);
    builder.part("teacher", Rates::of("product", stage.dtype), "compute",
                 steps * builder.on_cores(static_cast<double>(own_blocks) * seconds, node_blocks * seconds));
    result.flops += steps * static_cast<double>(blocks) * work.flops();
  }
  const double trained = trained_elements(config, stage.lora), payload = 4 * trained;
  const Reduction reduction = all_reduce(rates, cluster, all_ranks(world), payload);
  // Layers' gradients are on their way while earlier layers are worked on: what counts is what outlasts the backward
  // pass of the last block, and the last bucket.
  const double exposed = std::max(reduction.seconds - 2.0 / 3 * block_seconds,
                                  reduction.seconds * std::min(1.0, kGradientBucket / std::max(payload, 1.0)));
  builder.part("summing gradients", cluster.nodes > 1 ? "network" : "inside", "link", steps * exposed);
  result.moved.inside = steps * reduction.moved.inside;
  result.moved.network = steps * reduction.moved.network;
  // Gradient read twice, value and both moments read and written.
  const double touched = trained * 32 / (stage.shard_optimizer ? world : 1);
  // With --full parameters and moments stay on the host; gradients come there, and weights go back.
  const bool on_host = stage.lora.full && rates.device_memory > 0;
  const char* memory_figure = on_host ? "host_memory" : "memory";
  builder.part("optimiser", memory_figure, "memory bandwidth",
               steps * builder.on_cores(touched / rates.value(memory_figure)));
  if (on_host)
    builder.part("gradients to the host, weights back", Rates::of("load", stage.dtype), "link",
                 steps * trained * (4 + static_cast<double>(c10::elementSize(stage.dtype))) /
                     rates.value(Rates::of("load", stage.dtype)));
  if (stage.validations > 0 && stage.validation_sequences > 0) {
    const double own = std::ceil(static_cast<double>(stage.validation_sequences) / world);
    const Work work = forward_of(config, own);
    builder.part("validation", Rates::of("product", stage.dtype), "compute",
                 static_cast<double>(stage.validations) * builder.on_cores(seconds_of(work, rates, stage.dtype)));
  }
  const double saves =
      1 + (stage.checkpoint_every > 0 ? std::floor((steps - 1) / static_cast<double>(stage.checkpoint_every)) : 0);
  const double saved = saves * 3 * payload + (stage.lora.full ? 0 : payload);
  builder.part("writing checkpoints and the adapter", "write", "storage", saved / rates.value("write"));
  result.moved.written = saved;
  if (stage.merge || stage.lora.full) {
    const double bytes = checkpoint_bytes(config);
    builder.files("writing the merged model", "copy", bytes / world);
    result.moved.read += bytes;
    result.moved.written += bytes;
  }
  result.bubble = 1 - static_cast<double>(blocks) / static_cast<double>(own_blocks * world);
  if (blocks < world) builder.note(fmt::format("a step has {} micro-batches for {} ranks", blocks, world));
  finetune::MemoryEstimate memory =
      finetune::memory_of(config, stage.lora, stage.dtype, stage.micro_batch, stage.length, !stage.keep_activations,
                          world, stage.shard_optimizer, stage.teacher ? &*stage.teacher : nullptr);
  auto device = static_cast<double>(memory.total());
  double host = 2 * largest_layer_bytes(config, stage.dtype);
  if (on_host) {
    const auto kept = static_cast<double>(memory.weights + memory.gradients + memory.optimizer + memory.messages);
    device += trained * static_cast<double>(c10::elementSize(stage.dtype)) - kept;
    host += kept;
  }
  builder.memory(static_cast<double>(memory.total()) + cluster.process_bytes, device, cluster.process_bytes + host);
  return builder.finish();
}

Prediction predict(const Rates& rates, const Cluster& cluster, const EvaluateStage& stage) {
  Builder builder(rates, cluster, "evaluate");
  Prediction& result = builder.result();
  const int world = cluster.world();
  std::vector<const ModelConfig*> models = {&stage.config};
  if (stage.reference) models.insert(models.begin(), &*stage.reference);
  const auto weights = [&](int stages) {
    double most = 0;
    for (int s = 0; s < stages; ++s) {
      double bytes = 0;
      for (const ModelConfig* config : models)
        bytes += static_cast<double>(model::stage_weight_bytes(*config, stages, s, stage.dtype));
      most = std::max(most, bytes);
    }
    return most;
  };
  // As the job chooses: a fifth of the memory is for all else, and what does not fit is streamed.
  const double budget = 0.8 * builder.budget();
  int stages = 1;
  if (stage.stages > 0 || !stage.streamed)
    stages = choose_stages(stage.stages, world, stage.config.layers, budget, weights);
  const bool fits = weights(stages) <= budget;
  if (stage.stages == 0 && !stage.streamed && !fits) {
    const auto most = static_cast<int>(std::min<std::int64_t>(world, stage.config.layers));
    stages = world % most == 0 ? most : 1;
  }
  const bool streamed = stage.streamed || (stage.stages == 0 && !fits);
  if (streamed && !stage.streamed)
    builder.note("more than 80 % of the memory would be weights: streamed, one layer at a time");
  const int replicas = world / stages;
  result.stages = stages;
  result.replicas = replicas;
  const std::int64_t micro_batch = std::max<std::int64_t>(
      1, std::min(stage.micro_batch > 0 ? stage.micro_batch : 4096 / stage.length, stage.windows));
  const std::int64_t batches = (stage.windows + micro_batch - 1) / micro_batch;
  const double sequences = batches > 0 ? static_cast<double>(stage.windows) / static_cast<double>(batches) : 0;

  builder.text(stage.data_bytes);
  double load = 0;
  for (int s = 0; s < stages; ++s) {
    double bytes = 0;
    for (const ModelConfig* config : models) bytes += stage_file_bytes(*config, stages, s, true);
    load = std::max(load, bytes);
    result.moved.read += bytes * replicas;
  }
  double distinct = 0;
  for (const ModelConfig* config : models) distinct += checkpoint_bytes(*config);
  builder.files("loading weights", Rates::of("load", stage.dtype), load, distinct);
  for (const ModelConfig* config : models) {
    Passage passage;
    passage.micro_batches = (batches + replicas - 1) / replicas;
    passage.total = static_cast<double>(batches);
    passage.tokens = micro_batch * stage.length;
    passage.streamed = streamed;
    passage.most_per_round = 64;
    passage.message =
        static_cast<double>(passage.tokens * config->hidden) * static_cast<double>(c10::elementSize(stage.dtype));
    for (const comm::LayerRange& range : model::stage_layers(*config, stages)) {
      Work work;
      for (std::int64_t layer = range.begin; layer < range.end; ++layer)
        work += layer_work(*config, layer, sequences, stage.length, stage.dtype);
      passage.work.push_back(work);
    }
    passage.work.back() += head_work(*config, sequences * static_cast<double>(stage.length));
    pass(builder, rates, cluster, passage, stage.dtype, stages, replicas,
         models.size() > 1 && config == models.front() ? " (reference)" : "");
  }
  // Weights, hidden states of a few micro-batches, a layer's inner values, a block of scores and one of logits.
  const double element = static_cast<double>(c10::elementSize(stage.dtype));
  const double rows = static_cast<double>(micro_batch * stage.length);
  const ModelConfig& c = stage.config;
  const double widths = 6 * static_cast<double>(c.hidden) + 2 * static_cast<double>(c.heads * c.head_dim) +
                        2 * static_cast<double>(c.kv_width()) + 3 * static_cast<double>(c.ffn);
  double resident = weights(stages);
  if (streamed) {
    resident = 0;
    for (const ModelConfig* config : models)
      resident += 2 * largest_layer_bytes(*config, stage.dtype) +
                  2 * static_cast<double>(config->vocab * config->hidden) * element;
  }
  const double device = resident + rows * widths * element + 2 * static_cast<double>(model::attention_block_bytes());
  builder.memory(device + cluster.process_bytes, device,
                 cluster.process_bytes + 2 * largest_layer_bytes(c, stage.dtype));
  return builder.finish();
}

OrderedJson to_json(const Prediction& p) {
  OrderedJson json;
  json["stage"] = p.stage;
  json["name"] = p.name;
  json["seconds"] = p.seconds;
  json["binds"] = p.binds;
  json["stages"] = p.stages;
  json["replicas"] = p.replicas;
  json["bubble"] = p.bubble;
  json["flops"] = p.flops;
  json["memory"] = {{"device_bytes_per_rank", p.device_memory}, {"host_bytes_per_rank", p.host_memory}};
  json["bytes"] = {
      {"inside", p.moved.inside}, {"network", p.moved.network}, {"read", p.moved.read}, {"written", p.moved.written}};
  json["parts"] = OrderedJson::array();
  for (const Part& part : p.parts)
    json["parts"].push_back(
        OrderedJson{{"what", part.what}, {"seconds", part.seconds}, {"binds", part.binds}, {"figure", part.figure}});
  json["notes"] = p.notes;
  return json;
}

}  // namespace headfold::scale
