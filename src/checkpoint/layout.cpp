#include <headfold/base/error.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/checkpoint/reader.h>

namespace headfold::checkpoint {
namespace {

/// Appends tensors of one module path.
class List {
 public:
  explicit List(std::string path) : path_(std::move(path)) {}
  void weight(const std::string& module, std::vector<std::int64_t> shape) {
    list_.push_back({path_ + module + ".weight", std::move(shape)});
  }
  /// Weight [out, in] and, on demand, bias [out].
  void linear(const std::string& module, std::int64_t out, std::int64_t in, bool bias) {
    weight(module, {out, in});
    if (bias) list_.push_back({path_ + module + ".bias", {out}});
  }
  void norm(const std::string& module, std::int64_t width, bool bias) {
    weight(module, {width});
    if (bias) list_.push_back({path_ + module + ".bias", {width}});
  }
  std::vector<TensorShape> take() { return std::move(list_); }

 private:
  std::string path_;
  std::vector<TensorShape> list_;
};

/// Latents: rows that rebuild keys (absent when the query projection has taken them up) and values (absent when the
/// output projection has).
void latent_decoders(List& list, const ModelConfig& c, const std::string& attention, std::int64_t layer) {
  const LayerShape shape = c.shape_of(layer);
  if (!keys_absorbed(c, layer)) list.weight(attention + "key_up", {c.source_kv_heads, c.head_dim, shape.key_width});
  if (!values_absorbed(c, layer))
    list.weight(attention + "value_up", {c.source_kv_heads, c.head_dim, shape.value_width});
}

std::vector<TensorShape> llama_layer(const ModelConfig& c, std::int64_t layer) {
  List list(fmt::format("model.layers.{}.", layer));
  const LayerShape shape = c.shape_of(layer);
  const bool projected = c.layout == KvLayout::projected;
  const std::int64_t query_width = c.heads * c.head_dim;
  const std::int64_t key_rows = (projected ? c.source_kv_heads : shape.kv_heads) * shape.key_width;
  list.norm("input_layernorm", c.hidden, false);
  list.linear("self_attn.q_proj", query_width, c.hidden, c.attention_bias);
  list.linear("self_attn.k_proj", key_rows, c.hidden, c.attention_bias);
  list.linear("self_attn.v_proj", shape.kv_heads * shape.value_width, c.hidden, c.attention_bias);
  list.linear("self_attn.o_proj", c.hidden, c.heads * attended_width(c, layer), c.attention_bias);
  if (projected) {
    list.weight("self_attn.key_fold", {shape.kv_heads, c.head_dim, c.source_kv_heads / shape.kv_heads * c.head_dim});
    list.weight("self_attn.query_fold", {c.source_kv_heads, c.head_dim, c.head_dim});
  }
  if (c.layout == KvLayout::latent) latent_decoders(list, c, "self_attn.", layer);
  list.norm("post_attention_layernorm", c.hidden, false);
  list.linear("mlp.gate_proj", c.ffn, c.hidden, c.mlp_bias);
  list.linear("mlp.up_proj", c.ffn, c.hidden, c.mlp_bias);
  list.linear("mlp.down_proj", c.hidden, c.ffn, c.mlp_bias);
  return list.take();
}

std::vector<TensorShape> bloom_layer(const ModelConfig& c, std::int64_t layer) {
  List list(fmt::format("transformer.h.{}.", layer));
  const LayerShape shape = c.shape_of(layer);
  list.norm("input_layernorm", c.hidden, true);
  if (c.split_qkv) {
    const std::int64_t query_width = keys_absorbed(c, layer) ? shape.key_width : c.head_dim;
    list.linear("self_attention.query", c.heads * query_width, c.hidden, true);
    list.linear("self_attention.key", shape.kv_heads * shape.key_width, c.hidden, true);
    list.linear("self_attention.value", shape.kv_heads * shape.value_width, c.hidden, true);
  } else {
    list.linear("self_attention.query_key_value", 3 * c.heads * c.head_dim, c.hidden, true);
  }
  list.linear("self_attention.dense", c.hidden, c.heads * attended_width(c, layer), true);
  if (c.layout == KvLayout::latent) latent_decoders(list, c, "self_attention.", layer);
  list.norm("post_attention_layernorm", c.hidden, true);
  list.linear("mlp.dense_h_to_4h", c.ffn, c.hidden, true);
  list.linear("mlp.dense_4h_to_h", c.hidden, c.ffn, true);
  return list.take();
}

}  // namespace

std::int64_t TensorShape::elements() const {
  std::int64_t product = 1;
  for (const std::int64_t extent : shape) product *= extent;
  return product;
}

bool absorbs_keys(Family family, std::int64_t key_width, std::int64_t head_dim) {
  return family == Family::bloom && key_width <= head_dim;
}

bool absorbs_values(std::int64_t value_width, std::int64_t head_dim) {
  return value_width <= head_dim;
}

bool keys_absorbed(const ModelConfig& config, std::int64_t layer) {
  return config.layout == KvLayout::latent &&
         absorbs_keys(config.family, config.shape_of(layer).key_width, config.head_dim);
}

bool values_absorbed(const ModelConfig& config, std::int64_t layer) {
  return config.layout == KvLayout::latent && absorbs_values(config.shape_of(layer).value_width, config.head_dim);
}

std::int64_t attended_width(const ModelConfig& config, std::int64_t layer) {
  return values_absorbed(config, layer) ? config.shape_of(layer).value_width : config.head_dim;
}

std::string last_parts(const std::string& name) {
  const std::size_t last = name.rfind('.');
  const std::size_t before = last == std::string::npos ? last : name.rfind('.', last - 1);
  return before == std::string::npos ? name : name.substr(before + 1);
}

std::string tensor_prefix(Family family) {
  return family == Family::llama ? "model." : "transformer.";
}

std::vector<TensorShape> layer_tensors(const ModelConfig& config, std::int64_t layer) {
  if (layer < 0 || layer >= config.layers)
    throw InternalError(fmt::format("layer {} was asked for, the model has layers 0 to {}", layer, config.layers - 1));
  return config.family == Family::llama ? llama_layer(config, layer) : bloom_layer(config, layer);
}

std::vector<TensorShape> model_tensors(const ModelConfig& config) {
  const bool bloom = config.family == Family::bloom;
  List first(tensor_prefix(config.family));
  first.weight(bloom ? "word_embeddings" : "embed_tokens", {config.vocab, config.hidden});
  if (bloom) first.norm("word_embeddings_layernorm", config.hidden, true);
  std::vector<TensorShape> all = first.take();
  for (std::int64_t layer = 0; layer < config.layers; ++layer) {
    std::vector<TensorShape> one = layer_tensors(config, layer);
    all.insert(all.end(), std::make_move_iterator(one.begin()), std::make_move_iterator(one.end()));
  }
  List last(tensor_prefix(config.family));
  last.norm(bloom ? "ln_f" : "norm", config.hidden, bloom);
  std::vector<TensorShape> norm = last.take();
  all.insert(all.end(), norm.begin(), norm.end());
  if (!config.tied_embeddings) all.push_back({"lm_head.weight", {config.vocab, config.hidden}});
  return all;
}

std::int64_t parameter_count(const ModelConfig& config) {
  std::int64_t count = 0;
  for (const TensorShape& tensor : model_tensors(config)) count += tensor.elements();
  return count;
}

std::vector<std::string> layout_problems(const Reader& reader) {
  std::vector<std::string> problems;
  for (const TensorShape& tensor : model_tensors(reader.config())) {
    const std::string stored = reader.resolve(tensor.name);
    if (stored.empty()) {
      problems.push_back(fmt::format("tensor {} {} is missing", tensor.name, shape_text(tensor.shape)));
      continue;
    }
    const TensorInfo& info = reader.info(stored);
    if (info.shape != tensor.shape)
      problems.push_back(fmt::format("tensor {} has shape {}, config.json asks for {}", stored, shape_text(info.shape),
                                     shape_text(tensor.shape)));
  }
  return problems;
}

}  // namespace headfold::checkpoint
