#pragma once
// Seconds, memory and bytes of the stages of a run on a cluster, before anything is loaded (docs/scale.md).

#include <headfold/scale/memory.h>
#include <headfold/scale/work.h>

#include <string>
#include <vector>

namespace headfold::scale {

/// Nodes and ranks; ranks of a node follow one another.
struct Cluster {
  int nodes = 1;
  int ranks_per_node = 1;    ///< GPUs: one rank each
  double process_bytes = 0;  ///< program and libraries of one rank
  int world() const { return nodes * ranks_per_node; }
  int node_of(int rank) const { return rank / ranks_per_node; }
};

/// Bytes that all ranks together move.
struct Moved {
  double inside = 0;   ///< between ranks of a node
  double network = 0;  ///< between nodes
  double read = 0, written = 0;
};

/// One share of a stage's time.
struct Part {
  std::string what;    ///< "linear maps"
  std::string figure;  ///< "product.bfloat16"; empty: follows from others
  std::string binds;   ///< compute, memory bandwidth, link, storage, waiting
  double seconds = 0;
};

struct Prediction {
  std::string stage, name;
  std::vector<Part> parts;
  double seconds = 0;
  double device_memory = 0, host_memory = 0;  ///< of the rank that needs most, bytes
  Moved moved;
  double flops = 0;  ///< of all ranks
  int stages = 1, replicas = 1;
  double bubble =
      0;  ///< share of rank time lost while a pipeline fills and drains, or without a micro-batch to work on
  std::string binds;  ///< what most of the time goes into
  std::vector<std::string> notes;
};

struct CalibrateStage {
  ModelConfig config;
  CalibrationSettings settings;
  std::int64_t samples = 128;
  int stages = 0;         ///< 0: the fewest that fit
  double data_bytes = 0;  ///< of text
};
struct ConvertStage {
  ModelConfig config;
  std::int64_t kv_heads = 0;
  calibration::StatisticsShape shape;  ///< of the statistics; hidden 0: there are none
  bool held_out = true;
};
struct FinetuneStage {
  ModelConfig config;
  std::optional<ModelConfig> teacher;  ///< runs beside the student
  finetune::LoraOptions lora;
  at::ScalarType dtype = at::kFloat;
  std::int64_t batch = 32, micro_batch = 1, length = 2048, steps = 0, checkpoint_every = 100;
  std::int64_t validation_sequences = 0, validations = 0;
  bool keep_activations = false, shard_optimizer = false, merge = false;
  double data_bytes = 0;
};
struct EvaluateStage {
  ModelConfig config;
  std::optional<ModelConfig> reference;
  at::ScalarType dtype = at::kFloat;
  std::int64_t windows = 0, length = 2048, micro_batch = 0;  ///< micro_batch 0: 4096 tokens' worth
  int stages = 0;
  bool streamed = false;
  double data_bytes = 0;
};

/// UsageError when rates lack a figure, or ranks and layers do not go together.
Prediction predict(const Rates& rates, const Cluster& cluster, const CalibrateStage& stage);
Prediction predict(const Rates& rates, const Cluster& cluster, const ConvertStage& stage);
Prediction predict(const Rates& rates, const Cluster& cluster, const FinetuneStage& stage);
Prediction predict(const Rates& rates, const Cluster& cluster, const EvaluateStage& stage);

/// Micro-batches of every stage's seconds through a pipeline in the rounds of model::RoundSize: seconds from the first
/// to the last, draining after every round.
double pipeline_seconds(const std::vector<double>& stage_seconds, std::int64_t micro_batches, std::int64_t tokens,
                        bool streamed, std::int64_t most_per_round);
/// Bytes of hidden states that all replicas' stages send.
Moved pipeline_bytes(const Cluster& cluster, int stages, int replicas, double bytes_per_replica);
/// A ring over `ranks` of `payload` bytes each: 2 (n - 1) times the payload in all, over n hops.
struct Reduction {
  double seconds = 0;
  Moved moved;
};
Reduction all_reduce(const Rates& rates, const Cluster& cluster, const std::vector<int>& ranks, double payload);

OrderedJson to_json(const Prediction& prediction);

}  // namespace headfold::scale
