#pragma once
// A decoder whose adapters (or all of whose weights) can be trained: forward and backward layer by layer.

#include <ATen/ATen.h>
#include <headfold/checkpoint/reader.h>
#include <headfold/finetune/lora.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace headfold::finetune {

/// A tensor that training changes, float32 (float64 in float64 models). `value` and `gradient` may be replaced by other
/// contiguous tensors of the same shape and type between calls.
struct Parameter {
  std::string name;         ///< as in the PEFT file, or the checkpoint's name with `full`
  std::int64_t layer = -1;  ///< -1: embedding; layers(): final norm and output projection
  at::Tensor value;         ///< changed in place by the optimiser
  at::Tensor gradient;      ///< same shape; forward_backward() adds to it
  bool decays = true;       ///< weight decay applies: matrices, not norms and biases
};

/// Token sequences of equal length.
struct Batch {
  at::Tensor ids;      ///< [batch, tokens] int64
  at::Tensor targets;  ///< [batch, tokens] int64: the token that position must predict, -1: not scored
  /// [batch, tokens] int64: attention stays inside equal, adjacent numbers, and positions start again with each such
  /// segment; undefined: one segment.
  at::Tensor segments;
  /// [batch] int64: number of each sequence in the global batch, which decides its dropout masks, so that these do not
  /// depend on how a batch is cut into micro-batches and spread over ranks; undefined: 0, 1, 2, …
  at::Tensor numbers;
};

/// What a teacher says about positions. One of the two forms.
struct TeacherView {
  /// Logits [positions, vocab] (any floating dtype) of the scored positions [begin, end) of the batch, in row-major
  /// order of Batch::targets >= 0; called chunk by chunk so that the vocabulary is never held for a whole batch.
  std::function<at::Tensor(std::int64_t begin, std::int64_t end)> logits;
  /// Or the k most probable tokens of every scored position: log-probabilities [positions, k] at temperature 1,
  /// descending, and token numbers int64; what is missing to 1 counts as one further class.
  at::Tensor top_log_probs, top_tokens;
};

struct LossOptions {
  double distill_weight = 0;  ///< w: loss = (1 - w) CE + w T^2 KL(teacher || student), mean over scored positions
  double temperature = 1;     ///< T; top-k views allow 1 only
};

/// Sums over scored positions.
struct LossSums {
  double cross_entropy = 0, divergence = 0;
  std::int64_t tokens = 0, agreements = 0;        ///< agreements: student's first choice is the target
  double loss(const LossOptions& options) const;  ///< mean; 0 without tokens
  LossSums& operator+=(const LossSums& other) {
    cross_entropy += other.cross_entropy;
    divergence += other.divergence;
    tokens += other.tokens;
    agreements += other.agreements;
    return *this;
  }
};

class TrainableModel {
 public:
  /// Base weights in `dtype` (float32, bfloat16; float64 for tests), frozen unless options.full. InputError where a
  /// target names no projection of this model.
  TrainableModel(const checkpoint::Reader& reader, const LoraOptions& options, at::ScalarType dtype);
  ~TrainableModel();
  TrainableModel(const TrainableModel&) = delete;
  TrainableModel& operator=(const TrainableModel&) = delete;

  const checkpoint::ModelConfig& config() const;
  /// In a fixed order: by layer. The same objects for the model's life.
  std::vector<Parameter>& parameters();

  /// Recompute activations of a layer in the backward pass instead of keeping them (default true).
  void set_activation_checkpointing(bool on);

  /// Adds `scale` times the gradient of the SUM over scored positions of the loss to every Parameter::gradient, and
  /// gives the sums. `dropout_seed` decides the masks of LoRA dropout (equal seeds, equal masks; also when recomputed).
  /// `layer_done(l)` is called as soon as the gradients of all parameters with Parameter::layer == l are complete, from
  /// the last layer (index layers()) down to -1, so that their reduction may overlap the rest.
  LossSums forward_backward(const Batch& batch, const TeacherView* teacher, const LossOptions& options, double scale,
                            std::uint64_t dropout_seed, const std::function<void(std::int64_t layer)>& layer_done = {});
  /// Loss without gradients and dropout.
  LossSums evaluate(const Batch& batch, const TeacherView* teacher, const LossOptions& options) const;
  /// Logits [positions, vocab] float32 of the scored positions [begin, end) after hidden(batch): for a teacher that is
  /// a TrainableModel itself (options.targets empty: nothing trains).
  at::Tensor hidden(const Batch& batch) const;  ///< final hidden states of scored positions [positions, hidden]
  at::Tensor logits(const at::Tensor& hidden) const;

  /// Base weight plus adapter of the tensor `name` (checkpoint name), float32; undefined when no adapter changes it.
  at::Tensor merged(const std::string& name) const;

  /// Bytes of all weights, adapters and gradients, those that are mapped from the checkpoint included.
  std::int64_t bytes() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Estimated bytes by component for a configuration, without loading weights.
struct MemoryEstimate {
  std::int64_t weights = 0;      ///< frozen base (or all trained weights)
  std::int64_t adapter = 0;      ///< parameters, float32
  std::int64_t gradients = 0;    ///< float32
  std::int64_t optimizer = 0;    ///< two moments, float32 (sharded: divided by ranks)
  std::int64_t activations = 0;  ///< kept layer inputs, and the live layer's intermediate values at their peak
  std::int64_t logits = 0;       ///< one chunk of logits and its gradient
  std::int64_t teacher = 0;      ///< its weights, and hidden states
  std::int64_t messages = 0;     ///< copies of gradients that the message library makes while it sums them over ranks
  std::int64_t saving = 0;       ///< moments gathered for a checkpoint, beyond what is free between steps
  std::int64_t data = 0;         ///< token sequences; the caller's to fill in
  std::int64_t process = 0;      ///< program and libraries; the caller's to fill in (process_bytes)
  std::int64_t total() const {
    return weights + adapter + gradients + optimizer + activations + logits + teacher + messages + saving + data +
           process;
  }
};
/// Resident memory of a process in which training runs, without anything that follows from model and data: what is
/// resident now (call it before anything is loaded) and what libraries add once they compute.
std::int64_t process_bytes();
MemoryEstimate memory_of(const checkpoint::ModelConfig& config, const LoraOptions& options, at::ScalarType dtype,
                         std::int64_t batch, std::int64_t tokens, bool activation_checkpointing, std::int64_t ranks,
                         bool shard_optimizer, const checkpoint::ModelConfig* teacher);
/// Adds what distillation from cached rows of `width` tokens needs to an estimate without a teacher: rows of a batch of
/// `batch` sequences of `tokens`, and, beyond all that, the writing of the file where `writer` has yet to do that.
void add_cached_teacher(MemoryEstimate& memory, const checkpoint::ModelConfig& config, at::ScalarType dtype,
                        std::int64_t batch, std::int64_t tokens, std::int64_t width,
                        const checkpoint::ModelConfig* writer);

}  // namespace headfold::finetune
