#include <ATen/Parallel.h>
#include <headfold/base/files.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/finetune/optimizer.h>
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

/// Elements per token of what a layer keeps (LayerState without its input), and of the largest temporaries beside it.
struct LayerElements {
  std::int64_t kept = 0;
  std::int64_t feed_forward = 0;  ///< of `kept`: gate and up, gone before attention's backward pass
  std::int64_t forward = 0;       ///< temporaries at the end of a forward pass that keeps its state
  std::int64_t backward_mlp = 0;
  std::int64_t backward_attention = 0;
  std::int64_t sums = 0;  ///< of backward_attention in the wide type
};

LayerElements elements_of(const ModelConfig& c, std::int64_t layer, const LoraOptions& options,
                          const std::set<std::string>& modules) {
  const checkpoint::LayerShape shape = c.shape_of(layer);
  const bool llama = c.family == Family::llama;
  const std::int64_t d = c.head_dim;
  const std::int64_t sources = c.source_heads_of(layer);
  const bool latent = c.layout == KvLayout::latent;
  const bool projected = c.layout == KvLayout::projected;
  const std::int64_t query = c.heads * (checkpoint::keys_absorbed(c, layer) ? shape.key_width : d);
  const std::int64_t key = (projected ? sources : shape.kv_heads) * shape.key_width;
  const std::int64_t value = shape.kv_heads * shape.value_width;
  const bool key_up = latent && !checkpoint::keys_absorbed(c, layer);
  const bool value_up = latent && !checkpoint::values_absorbed(c, layer);
  const std::int64_t attended = c.heads * shape.value_width;
  const auto trains = [&](std::initializer_list<const char*> names) {
    if (options.full) return true;
    return std::any_of(names.begin(), names.end(), [&](const char* name) { return modules.contains(name); });
  };
  LayerElements e;
  std::int64_t scores_queries = query, scores_keys = key;
  e.kept += query + key + value + attended;
  if (key_up && llama) {
    scores_keys = sources * d;
    e.kept += scores_keys;
  } else if (key_up) {
    scores_queries = c.heads * shape.key_width;
    e.kept += scores_queries;
  }
  if (projected) {
    scores_keys = shape.kv_heads * d;
    e.kept += query + scores_keys;
  }
  if (value_up) e.kept += c.heads * d;
  const bool attention_trains = trains({"q_proj", "k_proj", "v_proj", "query", "key", "value", "query_key_value"});
  const bool mlp_trains = trains({"gate_proj", "up_proj", "dense_h_to_4h"});
  const bool down_trains = trains({"down_proj", "dense_4h_to_h"});
  if (attention_trains) e.kept += c.hidden;
  e.kept += c.hidden;  // middle
  if (mlp_trains) e.kept += c.hidden;
  e.feed_forward = (llama ? 2 : 1) * c.ffn;
  e.kept += e.feed_forward;
  if (!options.full) {
    const auto low = [&](const char* name) { return modules.contains(name) ? options.rank : 0; };
    for (const char* name : {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "query",
                             "key", "value", "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"})
      e.kept += low(name);
  }
  const bool drops = !options.full && options.dropout > 0;
  // out, the activated inner values (and what dropout makes of them), norms that are not kept.
  e.forward = c.hidden + c.ffn + (drops && down_trains ? c.ffn : 0) + (attention_trains ? 0 : c.hidden) +
              (mlp_trains ? 0 : c.hidden);
  // The gradients of the output and of the inner values, and at the widest either the inner values made again with what
  // passes through dropout, or the gradient of the norm's output.
  e.backward_mlp = c.hidden + c.ffn +
                   std::max((down_trains ? c.ffn : 0) + (drops && down_trains ? c.ffn : 0),
                            c.hidden + (drops && mlp_trains ? c.hidden : 0));
  // Gradients of middle, of attended (twice where values are rebuilt), of normed, of what enters the scores.
  e.backward_attention =
      c.hidden + c.heads * d + (value_up ? attended : 0) + c.hidden + scores_queries + scores_keys + value;
  e.sums = scores_keys + value;
  return e;
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
  return static_cast<std::int64_t>(resident_bytes());
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

  // Without anything to train there is no backward pass: one layer's values at a time.
  const bool trains = trained > 0;
  std::int64_t kept = trains ? config.layers * rows * config.hidden * size : 0;  // inputs of all layers
  std::int64_t state = 0, temporary = 0, state_elements = 0;
  for (std::int64_t layer = 0; layer < config.layers; ++layer) {
    const LayerElements e = elements_of(config, layer, options, modules);
    const std::int64_t own = rows * e.kept * size;
    if (!activation_checkpointing && trains) state_elements += own;
    state = std::max(state, own);
    const std::int64_t backward =
        std::max(e.backward_mlp * size, (e.backward_attention - e.feed_forward) * size + e.sums * wide);
    temporary = std::max(temporary, rows * std::max(e.forward * size, trains ? backward : 0));
  }
  if (!activation_checkpointing && trains) state = state_elements;
  // A float32 master is cast for each product that reads it, the output projection's for all of the head's pass.
  const bool casts = options.full && dtype != parameter_type(dtype);
  if (casts) temporary += config.ffn * config.hidden * size;
  const std::int64_t ids = rows * 8 * 4;
  m.activations = kept + state + temporary + ids;

  // During the head's pass: the layers' output, its gradient, one chunk of logits with its gradient and the teacher's.
  // Its peak and that of a layer's backward pass come at different times; only what exceeds the latter is added.
  const std::int64_t chunk = std::min(rows, logit_chunk_rows(config.vocab, dtype, rows));
  std::int64_t head = rows * config.hidden * size * (trains ? 2 : 1) + chunk * config.vocab * wide;
  if (dtype != parameter_type(dtype)) head += chunk * config.vocab * size;
  if (teacher != nullptr) head += chunk * config.vocab * wide;
  head += chunk * config.hidden * size * 4;
  if (casts) head += config.vocab * config.hidden * size;
  m.logits = std::max<std::int64_t>(0, head - temporary);
  if (shards > 1) m.saving = std::max<std::int64_t>(0, trained * wide - m.activations - m.logits - m.messages);
  return m;
}

}  // namespace headfold::finetune
