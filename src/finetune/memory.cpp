#include <ATen/Parallel.h>
#include <headfold/base/files.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/finetune/optimizer.h>
#include <headfold/finetune/teacher.h>
#include <headfold/finetune/trainable.h>
#include <headfold/model/product.h>

#include <set>

#include "layer.h"
#include "loss.h"

namespace headfold::finetune {
namespace {

using checkpoint::Family;
using checkpoint::KvLayout;
using checkpoint::ModelConfig;

/// Bytes per token that are alive in a layer's passes, counted in the order in which layer.cpp takes and gives them
/// back. Without the layer's input and the gradient of its output, which the caller counts.
struct LayerBytes {
  std::int64_t kept = 0;      ///< after a forward pass that keeps its state (LayerState)
  std::int64_t forward = 0;   ///< the most during that pass, its output included
  std::int64_t backward = 0;  ///< the most during the backward pass, the kept included
};

/// What is alive, and the most that ever was.
class Alive {
 public:
  void take(std::int64_t bytes) { most_ = std::max(most_, now_ += bytes); }
  void give(std::int64_t bytes) { now_ -= bytes; }
  /// Something that comes and goes at once.
  void pass(std::int64_t bytes) { most_ = std::max(most_, now_ + bytes); }
  std::int64_t now() const { return now_; }
  std::int64_t most() const { return most_; }

 private:
  std::int64_t now_ = 0, most_ = 0;
};

LayerBytes bytes_of(const ModelConfig& c, std::int64_t layer, const LoraOptions& options,
                    const std::set<std::string>& modules, std::int64_t size, std::int64_t wide) {
  const checkpoint::LayerShape shape = c.shape_of(layer);
  const bool llama = c.family == Family::llama;
  const std::int64_t d = c.head_dim;
  const std::int64_t sources = c.source_heads_of(layer);
  const bool latent = c.layout == KvLayout::latent;
  const bool projected = c.layout == KvLayout::projected;
  const bool key_up = latent && !checkpoint::keys_absorbed(c, layer);
  const bool value_up = latent && !checkpoint::values_absorbed(c, layer);
  const bool rebuilds = key_up && llama;
  const bool turns = key_up && !llama;
  const auto trains = [&](std::initializer_list<const char*> names) {
    if (options.full) return true;
    return std::any_of(names.begin(), names.end(), [&](const char* name) { return modules.contains(name); });
  };
  const bool attention_trains = trains({"q_proj", "k_proj", "v_proj", "query", "key", "value", "query_key_value"});
  const bool output_trains = trains({"o_proj", "dense"});
  const bool mlp_trains = trains({"gate_proj", "up_proj", "dense_h_to_4h"});
  const bool down_trains = trains({"down_proj", "dense_4h_to_h"});
  const bool drops = !options.full && options.dropout > 0;

  const std::int64_t hidden = c.hidden * size;
  const std::int64_t ffn = c.ffn * size;
  const std::int64_t gates = (llama ? 2 : 1) * ffn;
  const std::int64_t query = c.heads * (checkpoint::keys_absorbed(c, layer) ? shape.key_width : d) * size;
  const std::int64_t key = (projected ? sources : shape.kv_heads) * shape.key_width * size;
  const std::int64_t value = shape.kv_heads * shape.value_width * size;
  const std::int64_t attended = c.heads * shape.value_width * size;
  const std::int64_t rebuilt = value_up ? c.heads * d * size : 0;
  // What enters the scores.
  const std::int64_t scores_query = turns ? c.heads * shape.key_width * size : query;
  const std::int64_t scores_key = rebuilds ? sources * d * size : (projected ? shape.kv_heads * d * size : key);
  std::int64_t low = 0;
  if (!options.full) low = static_cast<std::int64_t>(modules.size()) * options.rank * size;

  LayerBytes bytes;
  Alive forward;
  forward.take(hidden + query + key + value + low);  // norm, projections, what is between the factors of all adapters
  if (rebuilds || projected) forward.take(scores_key);
  if (turns || projected) forward.take(scores_query);
  forward.take(attended + rebuilt);
  forward.take(hidden);  // middle
  if (drops && output_trains) forward.pass(rebuilt > 0 ? rebuilt : attended);
  forward.take(2 * hidden + gates);  // norm, output
  forward.take(ffn);                 // activated inner values
  if (drops && down_trains) forward.pass(ffn);
  forward.give(ffn + hidden);
  if (!attention_trains) forward.give(hidden);
  if (!mlp_trains) forward.give(hidden);
  bytes.forward = forward.most();
  bytes.kept = forward.now();

  Alive backward;
  backward.take(bytes.kept);
  backward.take((down_trains ? ffn : 0) + ffn);
  if (drops && down_trains) backward.pass(ffn);
  if (down_trains) backward.give(ffn);
  backward.take(hidden);
  if (drops && mlp_trains) backward.pass(hidden);
  // A trained bias sums a wide copy of its gradients.
  if (options.full && wide != size && (!llama || c.mlp_bias)) backward.pass(ffn / size * wide);
  backward.give(ffn + gates);
  if (c.post_layernorm_residual) backward.take(hidden);
  backward.give(hidden);
  const std::int64_t entering = rebuilt > 0 ? rebuilt : attended;
  backward.take(entering);
  if (drops && output_trains) backward.pass(entering);
  if (value_up) backward.take(attended);
  backward.take(scores_query + scores_key + value);
  backward.pass((scores_key + value) / size * wide);  // sums over the queries
  if (projected || turns) {
    backward.take(query);
    backward.give(scores_query);
  }
  if (projected || rebuilds) {
    backward.take(key);
    backward.give(scores_key);
  }
  backward.take(hidden);
  if (drops && attention_trains) backward.pass(hidden);
  if (options.full && wide != size && (!llama || c.attention_bias)) backward.pass(query / size * wide);
  bytes.backward = backward.most();
  return bytes;
}

std::int64_t trained_elements(const ModelConfig& config, const LoraOptions& options,
                              const std::set<std::string>& modules) {
  if (options.full) return checkpoint::parameter_count(config);
  std::int64_t count = 0;
  for (std::int64_t layer = 0; layer < config.layers; ++layer)
    for (const checkpoint::TensorShape& tensor : checkpoint::layer_tensors(config, layer)) {
      const std::string parts = checkpoint::last_parts(tensor.name);
      if (tensor.shape.size() == 2 && parts.ends_with(".weight") && modules.contains(parts.substr(0, parts.rfind('.'))))
        count += options.rank * (tensor.shape[0] + tensor.shape[1]);
    }
  return count;
}

}  // namespace

std::int64_t process_bytes() {
  // Libraries are mapped, but become resident as they are used; threads start with the first product.
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    const at::Tensor a = at::ones({256, 256}, type), b = at::empty({256, 256}, type);
    model::multiply({a.data_ptr(), 256, 256, 256}, {a.data_ptr(), 256, 256, 256}, model::Operation{.transpose_b = true},
                    type, b.data_ptr(), 256, type);
    b.add_(at::softmax(b, -1)).mul_(a.sum().to(type));
  }
  // Kernels compiled for its shapes and what else the first step touches: measured at the smallest training.
  constexpr std::int64_t kFirstStep = std::int64_t{12} << 20;
  return static_cast<std::int64_t>(resident_bytes()) + kFirstStep;
}

MemoryEstimate memory_of(const ModelConfig& config, const LoraOptions& options, at::ScalarType dtype,
                         std::int64_t batch, std::int64_t tokens, bool activation_checkpointing, std::int64_t ranks,
                         bool shard_optimizer, const ModelConfig* teacher) {
  const auto size = static_cast<std::int64_t>(c10::elementSize(dtype));
  const auto wide = static_cast<std::int64_t>(c10::elementSize(parameter_type(dtype)));
  std::set<std::string> modules;
  if (!options.full)
    for (const std::string& module : target_modules(options, config)) modules.insert(module);
  const std::int64_t rows = batch * tokens;
  const std::int64_t trained = trained_elements(config, options, modules);
  const std::int64_t parameters = checkpoint::parameter_count(config);

  MemoryEstimate m;
  m.weights = parameters * (options.full ? wide : size);
  m.adapter = options.full ? 0 : trained * wide;
  m.gradients = trained * wide;
  const std::int64_t shards = shard_optimizer ? std::max<std::int64_t>(1, ranks) : 1;
  m.optimizer = 2 * trained * wide / shards;
  if (shards > 1) m.gradients += trained * wide / shards;  // a rank's own sums stand beside the whole buffer
  if (ranks > 1) m.messages = std::min(m.gradients, bytes_under_way());
  if (teacher != nullptr) m.teacher = checkpoint::parameter_count(*teacher) * size + rows * teacher->hidden * size;

  // Layer by layer, forward and backward; without anything to train there is no backward pass.
  const bool trains = trained > 0;
  const std::int64_t hidden = config.hidden * size;
  std::int64_t most = 0, states = 0, last_state = 0;
  for (std::int64_t layer = 0; layer < config.layers; ++layer) {
    const LayerBytes own = bytes_of(config, layer, options, modules, size, wide);
    // Inputs of this layer and those below it, states of those below it, the gradient of the output.
    const std::int64_t inputs = (trains ? layer + 1 : 1) * hidden;
    const std::int64_t below = activation_checkpointing || !trains ? 0 : states;
    const bool again = activation_checkpointing && layer + 1 < config.layers;
    most = std::max(most, inputs + below + own.forward + (trains && again ? hidden : 0));
    if (trains) most = std::max(most, inputs + below + hidden + own.backward);
    states += own.kept;
    last_state = own.kept;
  }
  const std::int64_t ids = rows * 8 * 4;
  m.activations = rows * most + ids;
  // A float32 master is cast for each product that reads it, the output projection's for all of the head's pass.
  const bool casts = options.full && dtype != parameter_type(dtype);
  if (casts) m.activations += config.ffn * config.hidden * size;

  // During the head's pass: what layers keep, their output, its gradient, one chunk of logits with its gradient and the
  // teacher's. Its peak and that of a layer's backward pass come at different times; only what exceeds the latter is
  // added.
  const std::int64_t chunk = std::min(rows, logit_chunk_rows(config.vocab, dtype, rows));
  std::int64_t head = rows * hidden * (trains ? config.layers + 2 : 1) + ids + chunk * config.vocab * wide;
  if (trains) head += rows * (activation_checkpointing ? last_state : states);
  const std::int64_t narrow = dtype != parameter_type(dtype) ? chunk * config.vocab * size : 0;
  // The teacher's logits, and where they are not numbers.
  if (teacher != nullptr) head += chunk * config.vocab * wide;
  head += std::max(narrow, teacher != nullptr ? chunk * config.vocab : 0);
  head += chunk * hidden * 4;
  if (casts) head += config.vocab * config.hidden * size;
  m.logits = std::max<std::int64_t>(0, head - m.activations);
  if (shards > 1) m.saving = std::max<std::int64_t>(0, trained * wide - m.activations - m.logits - m.messages);
  return m;
}

void add_cached_teacher(MemoryEstimate& memory, const ModelConfig& config, at::ScalarType dtype, std::int64_t batch,
                        std::int64_t tokens, std::int64_t width, const ModelConfig* writer) {
  const std::int64_t rows = batch * tokens;
  width = std::min(width, config.vocab);
  const std::int64_t row = width * 4;  // log-probabilities, float32; tokens are int32 in the file
  // A step holds log-probabilities and tokens as int64. While it takes them from the file, before any activation, they
  // are there as copies, joined, taken where they are scored, and widened.
  const std::int64_t held = rows * row * 3, taking = rows * row * 7;
  const std::int64_t chunk = std::min(rows, logit_chunk_rows(config.vocab, dtype, rows));
  memory.logits += chunk * width * 8;  // log-probabilities of a chunk in float64
  memory.teacher += std::max(held, taking - memory.activations - memory.logits);
  if (writer == nullptr) return;
  // Before anything else is loaded the file is written: the teacher, final hidden states, logits of a chunk and their
  // log-probabilities, what was chosen of them. The teacher's layers need less than those that train.
  const auto size = static_cast<std::int64_t>(c10::elementSize(dtype));
  const std::int64_t scored = std::min(rows, teacher_chunk_rows(writer->vocab));
  const std::int64_t writing = checkpoint::parameter_count(*writer) * size + 2 * rows * writer->hidden * size +
                               scored * (writer->vocab * 4 * 2 + writer->hidden * size + width * 12) + rows * row * 2;
  memory.teacher += std::max<std::int64_t>(0, writing - (memory.total() - memory.process - memory.data));
}

}  // namespace headfold::finetune
