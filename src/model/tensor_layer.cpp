#include "tensor_layer.h"

#include <headfold/model/compute.h>

#include <mutex>

#include "attention.h"
#include "tensor_math.h"

namespace headfold::model {
namespace {

using checkpoint::Family;
using checkpoint::KvLayout;

/// Rows that pass through the MLP together: its inner activations are what takes most memory.
constexpr std::int64_t kRowsTogether = 16384;

struct Map {
  at::Tensor weight, bias;  // [out, in], [out] or undefined
  at::Tensor apply(const at::Tensor& x) const { return at::linear(x, weight, bias); }
  std::int64_t bytes() const {
    return static_cast<std::int64_t>(weight.nbytes()) + (bias.defined() ? static_cast<std::int64_t>(bias.nbytes()) : 0);
  }
};

/// cos and sin [positions, head_dim / 2] float32 of rope_table() on a device.
struct DeviceRope {
  at::Tensor cosine, sine;
};

/// Kept per table: every layer of a model asks for the same one.
DeviceRope device_rope(const std::shared_ptr<const RopeTable>& table, at::Device device) {
  if (device.is_cpu()) return {table->cosine, table->sine};
  static std::mutex mutex;
  static std::shared_ptr<const RopeTable> last;
  static at::Device last_device(at::kCPU);
  static DeviceRope copy;
  const std::lock_guard lock(mutex);
  if (last != table || last_device != device) {
    copy = {table->cosine.to(device), table->sine.to(device)};
    last = table;
    last_device = device;
  }
  return copy;
}

/// x [..., tokens, head_dim] rotated at positions start, start + 1, ...: products in float32, rounded once.
at::Tensor rotate(const at::Tensor& x, const DeviceRope& rope, std::int64_t start) {
  const std::int64_t half = x.size(-1) / 2;
  const at::Tensor cosine = rope.cosine.slice(0, start, start + x.size(-2));
  const at::Tensor sine = rope.sine.slice(0, start, start + x.size(-2));
  const at::Tensor a = x.slice(-1, 0, half).to(at::kFloat);
  const at::Tensor b = x.slice(-1, half).to(at::kFloat);
  return at::cat({a * cosine - b * sine, b * cosine + a * sine}, -1).to(x.scalar_type());
}

/// Heads [batch, heads, tokens, width] repeated `readers` times each.
at::Tensor repeated(const at::Tensor& heads, std::int64_t readers) {
  if (readers == 1) return heads;
  const auto s = heads.sizes();
  return heads.unsqueeze(2).expand({s[0], s[1], readers, s[2], s[3]}).reshape({s[0], s[1] * readers, s[2], s[3]});
}

#ifdef HEADFOLD_TORCH_FUSED_ATTENTION
/// Whether fused attention applies: bfloat16 on a GPU without ALiBi, where nothing (one new token) or the usual
/// triangle is masked.
bool fused_attention(const at::Tensor& queries, const at::Tensor& slopes, std::int64_t start) {
  return queries.is_cuda() && queries.scalar_type() == at::kBFloat16 && !slopes.defined() &&
         (start == 0 || queries.size(2) == 1);
}
#endif

/// softmax(scale q k^T + ALiBi, causal) v. Queries [batch, heads, tokens, key_width] at positions start .., keys
/// [batch, key heads, start + tokens, key_width], values [batch, value heads, start + tokens, value_width] -> [batch,
/// tokens, heads * value_width]. Scores and softmax in float32, in blocks of rows below attention_block_bytes() (one
/// row of all heads at least).
at::Tensor attend_tensors(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values, double scale,
                          const at::Tensor& slopes, std::int64_t start) {
  const std::int64_t batch = queries.size(0), heads = queries.size(1), tokens = queries.size(2);
  const std::int64_t key_heads = keys.size(1), value_heads = values.size(1), value_width = values.size(3);
  const auto joined = [&](const at::Tensor& y) { return y.transpose(1, 2).reshape({batch, -1, heads * value_width}); };
#ifdef HEADFOLD_TORCH_FUSED_ATTENTION
  // Its kernels want equally many heads, and values as wide as keys or less.
  if (fused_attention(queries, slopes, start))
    return joined(at::scaled_dot_product_attention(queries, repeated(keys, heads / key_heads),
                                                   repeated(values, heads / value_heads), {}, 0.0,
                                                   /*is_causal=*/tokens > 1, scale));
#endif
  const at::ScalarType dtype = queries.scalar_type();
  const std::int64_t per_row = std::max<std::int64_t>(1, batch * heads * (start + tokens) * 16);
  const std::int64_t rows = std::clamp<std::int64_t>(attention_block_bytes() / per_row, 1, tokens);
  std::vector<at::Tensor> outputs;
  for (std::int64_t first = 0; first < tokens; first += rows) {
    const std::int64_t count = std::min(rows, tokens - first);
    const std::int64_t visible = start + first + count;
    const at::Tensor q = queries.slice(2, first, first + count);
    const at::Tensor scores = wide_matmul(q.reshape({batch, key_heads, heads / key_heads * count, q.size(3)}),
                                          keys.slice(2, 0, visible).transpose(2, 3))
                                  .reshape({batch, heads, count, visible});
    const at::Tensor probabilities = causal_probabilities(scores, scale, slopes, start + first, dtype);
    outputs.push_back(narrow_matmul(probabilities.reshape({batch, value_heads, heads / value_heads * count, visible}),
                                    values.slice(2, 0, visible))
                          .reshape({batch, heads, count, value_width}));
  }
  return joined(outputs.size() == 1 ? outputs[0] : at::cat(outputs, 2));
}

/// What attention gives, and what observers may want of it, all [batch, heads, tokens, channels].
struct Attended {
  at::Tensor output;                 // [batch, tokens, heads * attended_width]
  at::Tensor queries, keys, values;  // as they enter the scores; keys and values of every token so far
  at::Tensor rotated_keys;           // of the new tokens
};

class TensorLayer final : public Layer {
 public:
  TensorLayer(const ModelConfig& config, std::int64_t layer, at::ScalarType dtype, const Source& source)
      : config_(config), widths_(config, layer), dtype_(dtype) {
    config_.layer_shapes.clear();  // of the other layers
    config_.raw = nullptr;
    if (config.family == Family::llama) {
      load_llama(fmt::format("model.layers.{}.", layer), source);
      inverse_frequencies_ = rope_inverse_frequencies(config);
    } else {
      load_bloom(fmt::format("transformer.h.{}.", layer), source);
      slopes_ = alibi_slopes(config.heads).to(compute().device);
    }
  }

  at::Tensor forward(const at::Tensor& hidden, LayerCache* cache, LayerObserver* observer) const override;
  at::Tensor forward_packed(const at::Tensor& hidden, const std::vector<Segment>& segments,
                            LayerCache* cache) const override;
  std::int64_t bytes() const override {
    std::int64_t sum = 0;
    for (const Map* map : {&qkv_, &output_, &gate_, &up_, &down_})
      if (map->weight.defined()) sum += map->bytes();
    for (const at::Tensor* tensor :
         {&key_fold_, &query_fold_, &key_up_, &value_up_, &norm1_weight_, &norm1_bias_, &norm2_weight_, &norm2_bias_})
      if (tensor->defined()) sum += static_cast<std::int64_t>(tensor->nbytes());
    return sum;
  }

 private:
  at::Tensor load(const std::string& name, const std::vector<std::int64_t>& shape, const Source& source) const {
    at::Tensor copy = to_device(source.checked(name, shape), dtype_);
    source.done(name);
    return copy;
  }
  /// Matrices that read the same input, stacked in order.
  Map load_stacked(const std::vector<std::string>& names, const std::vector<std::int64_t>& rows, std::int64_t in,
                   bool bias, const Source& source) const {
    std::vector<at::Tensor> weights, biases;
    for (std::size_t i = 0; i < names.size(); ++i) {
      weights.push_back(load(names[i] + ".weight", {rows[i], in}, source));
      if (bias) biases.push_back(load(names[i] + ".bias", {rows[i]}, source));
    }
    return {names.size() == 1 ? weights[0] : at::cat(weights), !bias               ? at::Tensor()
                                                               : names.size() == 1 ? biases[0]
                                                                                   : at::cat(biases)};
  }
  void load_llama(const std::string& prefix, const Source& source);
  void load_bloom(const std::string& prefix, const Source& source);
  void load_latent_decoders(const std::string& attention, const Source& source);

  /// Attention of `count` sequences of `tokens` rows each, whose projections are qkv [count * tokens, columns]. Keys
  /// and values [count, start + tokens, kv_heads, width], if defined, hold earlier tokens and receive the new ones.
  Attended attend_rows(const at::Tensor& qkv, std::int64_t count, std::int64_t start, const at::Tensor& keys,
                       const at::Tensor& values) const;
  Attended attend_latents(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values,
                          std::int64_t start) const;
  /// x [rows, hidden] -> MLP; `inner` receives what enters the down projection if given.
  at::Tensor feed_forward(const at::Tensor& x, at::Tensor* inner) const;
  double scale() const { return 1.0 / std::sqrt(static_cast<double>(config_.head_dim)); }

  ModelConfig config_;
  LayerWidths widths_;
  at::ScalarType dtype_;
  at::Tensor norm1_weight_, norm1_bias_, norm2_weight_, norm2_bias_;
  Map qkv_, output_, gate_, up_, down_;  // BLOOM: up_ and down_ are dense_h_to_4h and dense_4h_to_h
  at::Tensor key_fold_, query_fold_;     // [kv_heads, head_dim, members * head_dim], [source_heads, head_dim, head_dim]
  at::Tensor key_up_, value_up_;         // [source_heads, head_dim, width of latents]
  at::Tensor inverse_frequencies_;       // RoPE, on the host
  at::Tensor slopes_;                    // ALiBi
};

void TensorLayer::load_latent_decoders(const std::string& attention, const Source& source) {
  const checkpoint::LayerShape& shape = widths_.shape;
  const std::int64_t d = config_.head_dim;
  if (config_.family == Family::llama || shape.key_width > d)
    key_up_ = load(attention + "key_up.weight", {widths_.source_heads, d, shape.key_width}, source);
  if (shape.value_width > d)
    value_up_ = load(attention + "value_up.weight", {widths_.source_heads, d, shape.value_width}, source);
}

void TensorLayer::load_llama(const std::string& prefix, const Source& source) {
  const std::int64_t d = config_.head_dim;
  const checkpoint::LayerShape& shape = widths_.shape;
  norm1_weight_ = load(prefix + "input_layernorm.weight", {config_.hidden}, source);
  norm2_weight_ = load(prefix + "post_attention_layernorm.weight", {config_.hidden}, source);
  const std::string attention = prefix + "self_attn.";
  qkv_ = load_stacked({attention + "q_proj", attention + "k_proj", attention + "v_proj"},
                      {config_.heads * widths_.query_width, widths_.key_rows, shape.kv_heads * shape.value_width},
                      config_.hidden, config_.attention_bias, source);
  output_ = load_stacked({attention + "o_proj"}, {config_.hidden}, config_.heads * widths_.attended_width,
                         config_.attention_bias, source);
  if (config_.layout == KvLayout::projected) {
    const std::int64_t members = widths_.source_heads / shape.kv_heads;
    key_fold_ = load(attention + "key_fold.weight", {shape.kv_heads, d, members * d}, source);
    query_fold_ = load(attention + "query_fold.weight", {widths_.source_heads, d, d}, source);
  }
  if (config_.layout == KvLayout::latent) load_latent_decoders(attention, source);
  gate_ = load_stacked({prefix + "mlp.gate_proj"}, {config_.ffn}, config_.hidden, config_.mlp_bias, source);
  up_ = load_stacked({prefix + "mlp.up_proj"}, {config_.ffn}, config_.hidden, config_.mlp_bias, source);
  down_ = load_stacked({prefix + "mlp.down_proj"}, {config_.hidden}, config_.ffn, config_.mlp_bias, source);
}

void TensorLayer::load_bloom(const std::string& prefix, const Source& source) {
  if (config_.layout == KvLayout::projected)
    throw InputError(fmt::format("{}: BLOOM has no rotation, so layout \"projected\" does not apply", config_.file));
  const std::int64_t d = config_.head_dim, hidden = config_.hidden, heads = config_.heads;
  const checkpoint::LayerShape& shape = widths_.shape;
  norm1_weight_ = load(prefix + "input_layernorm.weight", {hidden}, source);
  norm1_bias_ = load(prefix + "input_layernorm.bias", {hidden}, source);
  norm2_weight_ = load(prefix + "post_attention_layernorm.weight", {hidden}, source);
  norm2_bias_ = load(prefix + "post_attention_layernorm.bias", {hidden}, source);
  const std::string attention = prefix + "self_attention.";
  if (config_.split_qkv) {
    qkv_ = load_stacked({attention + "query", attention + "key", attention + "value"},
                        {heads * widths_.query_width, widths_.key_rows, shape.kv_heads * shape.value_width}, hidden,
                        true, source);
  } else {
    // Stored as [heads, 3, head_dim, hidden]; wanted are all of Q, then K, then V.
    const Map fused = load_stacked({attention + "query_key_value"}, {3 * heads * d}, hidden, true, source);
    qkv_ = {fused.weight.view({heads, 3, d, hidden}).transpose(0, 1).reshape({3 * heads * d, hidden}),
            fused.bias.view({heads, 3, d}).transpose(0, 1).reshape({3 * heads * d})};
  }
  output_ = load_stacked({attention + "dense"}, {hidden}, heads * widths_.attended_width, true, source);
  if (config_.layout == KvLayout::latent) load_latent_decoders(attention, source);
  up_ = load_stacked({prefix + "mlp.dense_h_to_4h"}, {config_.ffn}, hidden, true, source);
  down_ = load_stacked({prefix + "mlp.dense_4h_to_h"}, {hidden}, config_.ffn, true, source);
}

/// Attention over latents: queries [count, heads, tokens, query_width], rotated; keys and values [count, kv_heads,
/// start + tokens, width].
Attended TensorLayer::attend_latents(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values,
                                     std::int64_t start) const {
  const std::int64_t count = queries.size(0), heads = config_.heads, tokens = queries.size(2);
  const std::int64_t repeat = heads / widths_.source_heads;
  const std::int64_t members = widths_.source_heads / widths_.shape.kv_heads;
  Attended result;
  result.queries = queries;
  result.keys = keys;
  result.values = values;
  if (inverse_frequencies_.defined()) {
    const auto rope = device_rope(rope_table(inverse_frequencies_, dtype_, start + tokens), queries.device());
    result.keys = rotate(at::matmul(repeated(keys, members), key_up_.transpose(1, 2)), rope, 0);
  } else if (key_up_.defined()) {
    result.queries = at::matmul(queries, key_up_.repeat_interleave(repeat, 0));
  }
  result.rotated_keys = result.keys.slice(2, start);
  result.output = attend_tensors(result.queries, result.keys, values, scale(), slopes_, start);
  if (!value_up_.defined()) return result;
  const at::Tensor latents = result.output.reshape({count, tokens, heads, widths_.shape.value_width}).transpose(1, 2);
  result.output = at::matmul(latents, value_up_.repeat_interleave(repeat, 0).transpose(1, 2))
                      .transpose(1, 2)
                      .reshape({count, tokens, heads * config_.head_dim});
  return result;
}

Attended TensorLayer::attend_rows(const at::Tensor& qkv, std::int64_t count, std::int64_t start,
                                  const at::Tensor& cached_keys, const at::Tensor& cached_values) const {
  const std::int64_t d = config_.head_dim, heads = config_.heads;
  const checkpoint::LayerShape& shape = widths_.shape;
  const std::int64_t tokens = qkv.size(0) / count;
  const bool latent = config_.layout == KvLayout::latent;
  const bool projected = config_.layout == KvLayout::projected;
  const std::int64_t key_column = heads * widths_.query_width;
  const std::int64_t value_column = key_column + widths_.key_rows;
  const auto part = [&](std::int64_t from, std::int64_t to, std::int64_t width) {
    return qkv.slice(1, from, to).reshape({count, tokens, (to - from) / width, width}).transpose(1, 2);
  };
  at::Tensor queries = part(0, key_column, widths_.query_width);
  at::Tensor keys = part(key_column, value_column, shape.key_width);
  at::Tensor values = part(value_column, qkv.size(1), shape.value_width);
  if (inverse_frequencies_.defined()) {
    const auto rope = device_rope(rope_table(inverse_frequencies_, dtype_, start + tokens), qkv.device());
    queries = rotate(queries, rope, start);
    if (!latent) keys = rotate(keys, rope, start);
  }
  Attended result;
  at::Tensor rotated = keys;
  if (projected) {
    const std::int64_t members = widths_.source_heads / shape.kv_heads;
    // A group's heads side by side: [count, kv_heads, tokens, members * head_dim].
    const at::Tensor stacked = keys.reshape({count, shape.kv_heads, members, tokens, d})
                                   .transpose(2, 3)
                                   .reshape({count, shape.kv_heads, tokens, members * d});
    keys = at::matmul(stacked, key_fold_.transpose(1, 2));
    queries = at::matmul(queries, query_fold_.repeat_interleave(heads / widths_.source_heads, 0).transpose(1, 2));
  }
  if (cached_keys.defined()) {
    cached_keys.slice(1, start, start + tokens).copy_(keys.transpose(1, 2));
    cached_values.slice(1, start, start + tokens).copy_(values.transpose(1, 2));
    keys = cached_keys.slice(1, 0, start + tokens).transpose(1, 2);
    values = cached_values.slice(1, 0, start + tokens).transpose(1, 2);
  }
  if (latent) return attend_latents(queries, keys, values, start);
  result.queries = queries;
  result.keys = keys;
  result.values = values;
  result.rotated_keys = rotated;
  result.output = attend_tensors(queries, keys, values, scale(), slopes_, start);
  return result;
}

at::Tensor TensorLayer::feed_forward(const at::Tensor& x, at::Tensor* inner) const {
  std::vector<at::Tensor> outputs, inners;
  for (std::int64_t begin = 0; begin < x.size(0) || begin == 0; begin += kRowsTogether) {
    const at::Tensor rows = x.slice(0, begin, begin + kRowsTogether);
    const at::Tensor activated =
        gate_.weight.defined() ? at::silu(gate_.apply(rows)).mul_(up_.apply(rows)) : at::gelu(up_.apply(rows), "tanh");
    if (inner != nullptr) inners.push_back(activated);
    outputs.push_back(down_.apply(activated));
  }
  if (inner != nullptr) *inner = inners.size() == 1 ? inners[0] : at::cat(inners);
  return outputs.size() == 1 ? outputs[0] : at::cat(outputs);
}

at::Tensor TensorLayer::forward(const at::Tensor& hidden, LayerCache* cache, LayerObserver* observer) const {
  check_forward(config_, widths_.shape, dtype_, hidden, cache);
  const std::int64_t batch = hidden.size(0), tokens = hidden.size(1), rows = batch * tokens;
  const std::int64_t start = cache != nullptr ? cache->length : 0;
  const at::Tensor flat = hidden.reshape({rows, config_.hidden});
  const at::Tensor x = normalise_tensor(flat, norm1_weight_, norm1_bias_, config_.norm_eps);
  if (observer != nullptr) observer->attention_input(x.view({batch, tokens, config_.hidden}));
  if (rows == 0) return hidden.clone();
  const Attended attended = attend_rows(qkv_.apply(x), batch, start, cache != nullptr ? cache->keys : at::Tensor(),
                                        cache != nullptr ? cache->values : at::Tensor());
  if (cache != nullptr) cache->length += tokens;
  if (observer != nullptr) {
    // [batch, heads, tokens, channels] here, tokens first there.
    const auto seen = [](const at::Tensor& y) { return y.transpose(1, 2).contiguous(); };
    if (observer->wants_rotated_keys()) observer->rotated_keys(seen(attended.rotated_keys));
    if (observer->wants_values()) observer->values(seen(attended.values.slice(2, start)));
    if (observer->wants_attention())
      observer->attention(seen(attended.queries), seen(attended.keys), seen(attended.values));
    if (observer->wants_attended()) observer->attended(attended.output);
  }
  at::Tensor out = (config_.post_layernorm_residual ? x : flat) +
                   output_.apply(attended.output.reshape({rows, config_.heads * widths_.attended_width}));
  const at::Tensor y = normalise_tensor(out, norm2_weight_, norm2_bias_, config_.norm_eps);
  if (config_.post_layernorm_residual) out = y;
  at::Tensor inner;
  const bool wants_inner = observer != nullptr && observer->wants_activated();
  out = out + feed_forward(y, wants_inner ? &inner : nullptr);
  if (wants_inner) observer->activated(inner.reshape({batch, tokens, config_.ffn}));
  return out.reshape({batch, tokens, config_.hidden});
}

at::Tensor TensorLayer::forward_packed(const at::Tensor& hidden, const std::vector<Segment>& segments,
                                       LayerCache* cache) const {
  const auto [rows, capacity] = check_packed(config_, dtype_, hidden, segments);
  const checkpoint::LayerShape& shape = widths_.shape;
  LayerCache own;
  if (cache == nullptr) {
    own.keys = at::empty({1, capacity, shape.kv_heads, shape.key_width}, hidden.options());
    own.values = at::empty({1, capacity, shape.kv_heads, shape.value_width}, hidden.options());
    cache = &own;
  }
  if (cache->keys.defined()) check_cache(shape, dtype_, *cache, cache->keys.size(0));
  if (capacity > std::min(cache->keys.size(1), cache->values.size(1)))
    throw InputError(
        fmt::format("the KV cache has room for {} tokens, and a sequence has {}", cache->keys.size(1), capacity));
  check_slots(segments, cache->keys.size(0));
  if (rows == 0) return hidden.clone();
  const at::Tensor x = normalise_tensor(hidden, norm1_weight_, norm1_bias_, config_.norm_eps);
  const at::Tensor qkv = qkv_.apply(x);
  std::vector<at::Tensor> outputs;
  outputs.reserve(segments.size());
  std::int64_t row = 0;
  for (const Segment& segment : segments) {
    const auto slot = [](const at::Tensor& all, std::int64_t index) { return all.slice(0, index, index + 1); };
    if (segment.copied_from >= 0 && segment.copied_from != segment.slot && segment.start > 0)
      for (const at::Tensor* all : {&cache->keys, &cache->values})
        slot(*all, segment.slot)
            .slice(1, 0, segment.start)
            .copy_(slot(*all, segment.copied_from).slice(1, 0, segment.start));
    outputs.push_back(attend_rows(qkv.slice(0, row, row + segment.tokens), 1, segment.start,
                                  slot(cache->keys, segment.slot), slot(cache->values, segment.slot))
                          .output.select(0, 0));
    row += segment.tokens;
  }
  at::Tensor out = (config_.post_layernorm_residual ? x : hidden) + output_.apply(at::cat(outputs));
  const at::Tensor y = normalise_tensor(out, norm2_weight_, norm2_bias_, config_.norm_eps);
  if (config_.post_layernorm_residual) out = y;
  return out + feed_forward(y, nullptr);
}

}  // namespace

at::Tensor causal_probabilities(const at::Tensor& scores, double scale, const at::Tensor& slopes, std::int64_t first,
                                at::ScalarType dtype) {
  const std::int64_t rows = scores.size(-2), keys = scores.size(-1);
  const at::Tensor positions = at::arange(keys, scores.options());
  scores.mul_(scale);
  if (slopes.defined()) scores.add_((slopes.view({-1, 1, 1}) * positions).to(dtype).to(scores.scalar_type()));
  const at::Tensor own = at::arange(first, first + rows, scores.options()).view({rows, 1});
  scores.masked_fill_(positions.gt(own), -std::numeric_limits<float>::infinity());
  return at::softmax(scores, -1).to(dtype);
}

at::Tensor normalise_tensor(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps) {
  if (bias.defined()) return at::layer_norm(x, weight.sizes(), weight, bias, eps);
  const at::Tensor wide = x.to(wide_type(x.scalar_type()));
  const at::Tensor factor = at::rsqrt(wide.square().mean(-1, true).add_(eps));
  return (wide * factor).to(x.scalar_type()).mul_(weight);
}

std::unique_ptr<Layer> make_tensor_layer(const ModelConfig& config, std::int64_t layer, at::ScalarType dtype,
                                         const Source& source) {
  return std::make_unique<TensorLayer>(config, layer, dtype, source);
}

}  // namespace headfold::model
