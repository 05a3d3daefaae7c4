#include <ATen/Parallel.h>
#include <headfold/base/error.h>
#include <headfold/model/compute.h>
#include <headfold/model/model.h>

#include "attention.h"
#include "kernels.h"
#include "product.h"
#include "source.h"
#include "tensor_layer.h"

namespace headfold::model {
namespace {

using checkpoint::Family;
using checkpoint::KvLayout;

/// Rows of activations that pass through a layer's products together: enough for full speed, few enough to bound the
/// memory.
constexpr std::int64_t kRows = 2048;

/// Memory that this thread's forward passes share: fresh pages for every product would cost as much as a pass over the
/// data.
enum Slot {
  slot_norm,
  slot_qkv,
  slot_queries,
  slot_folded_queries,
  slot_keys,
  slot_values,
  slot_source_keys,
  slot_rebuilt_keys,
  slot_key_rows,
  slot_attended_latents,
  slot_attention,
  slot_gate,
  slot_up,
  slot_count
};

/// A tensor of `sizes` in a slot; valid until the slot is asked for again on this thread.
at::Tensor scratch(Slot slot, at::IntArrayRef sizes, at::ScalarType dtype) {
  thread_local std::array<at::Tensor, slot_count> slots;
  std::int64_t bytes = static_cast<std::int64_t>(c10::elementSize(dtype));
  for (const std::int64_t size : sizes) bytes *= size;
  at::Tensor& buffer = slots[slot];
  if (!buffer.defined() || buffer.numel() < bytes) {
    buffer.reset();
    buffer = large_empty({bytes}, at::kByte);
  }
  return at::from_blob(buffer.data_ptr(), sizes, at::TensorOptions().dtype(dtype));
}

/// RMSNorm or LayerNorm (with bias) of every row of x [rows, hidden] into y.
void normalise(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps, const at::Tensor& y) {
  const auto& kernel = kernels::table(x.scalar_type());
  const std::int64_t hidden = x.size(1);
  const auto row_bytes = hidden * static_cast<std::int64_t>(x.element_size());
  const auto* from = static_cast<const char*>(x.data_ptr());
  auto* to = static_cast<char*>(y.data_ptr());
  at::parallel_for(0, x.size(0), std::max<std::int64_t>(1, 16384 / hidden), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      if (bias.defined()) {
        kernel.layer_norm(from + row * row_bytes, weight.data_ptr(), bias.data_ptr(), to + row * row_bytes, hidden,
                          static_cast<float>(eps));
      } else {
        kernel.rms_norm(from + row * row_bytes, weight.data_ptr(), to + row * row_bytes, hidden,
                        static_cast<float>(eps));
      }
    }
  });
}

/// Elementwise kernel over all rows in parallel: body(first element, count).
template <class Body>
void for_elements(std::int64_t count, const Body& body) {
  at::parallel_for(0, count, 8192, [&](std::int64_t begin, std::int64_t end) { body(begin, end - begin); });
}

/// What an observer asked for of one forward pass, filled sequence by sequence; undefined what it did not ask for.
struct Observed {
  at::Tensor rotated_keys;           // [batch, tokens, source_kv_heads, head_dim]
  at::Tensor queries, keys, values;  // [batch, tokens, heads, head_dim]; with every earlier token, kv_heads instead
  at::Tensor attended;               // [batch, tokens, heads * head_dim]; widths of latents are their own
  at::Tensor inner;                  // [batch * tokens, ffn]
};

class DecoderLayer final : public Layer {
 public:
  DecoderLayer(const ModelConfig& config, std::int64_t layer, at::ScalarType dtype, const Source& source)
      : config_(config), widths_(config, layer), dtype_(dtype) {
    config_.layer_shapes.clear();  // of the other layers
    config_.raw = nullptr;
    if (config.family == Family::llama) {
      load_llama(fmt::format("model.layers.{}.", layer), source);
      inverse_frequencies_ = rope_inverse_frequencies(config);
    } else {
      load_bloom(fmt::format("transformer.h.{}.", layer), source);
      slopes_ = alibi_slopes(config.heads);
    }
  }

  at::Tensor forward(const at::Tensor& hidden, LayerCache* cache, LayerObserver* observer) const override;
  at::Tensor forward_packed(const at::Tensor& hidden, const std::vector<Segment>& segments,
                            LayerCache* cache) const override;

  std::int64_t bytes() const override {
    std::int64_t sum = 0;
    for (const auto* product : {&qkv_, &output_, &gate_, &up_, &down_})
      if (*product) sum += (*product)->bytes();
    for (const auto* folds : {&key_folds_, &query_folds_, &key_up_, &value_up_})
      for (const auto& fold : *folds) sum += fold->bytes();
    for (const at::Tensor* tensor : {&norm1_weight_, &norm1_bias_, &norm2_weight_, &norm2_bias_})
      if (tensor->defined()) sum += static_cast<std::int64_t>(tensor->nbytes());
    return sum;
  }

 private:
  using ProductPtr = std::unique_ptr<const Product>;

  void load_llama(const std::string& prefix, const Source& source);
  void load_bloom(const std::string& prefix, const Source& source);
  /// One product of several matrices that read the same input, stacked in order.
  ProductPtr load_stacked(const std::vector<std::string>& names, const std::vector<std::int64_t>& rows, std::int64_t in,
                          bool bias, const Source& source) const;
  ProductPtr load_product(const std::string& name, std::int64_t out, std::int64_t in, bool bias,
                          const Source& source) const {
    return load_stacked({name}, {out}, in, bias, source);
  }
  /// Products with the matrices of a tensor [count, out, in], or with their transposes.
  std::vector<ProductPtr> load_folds(const std::string& name, std::int64_t count, std::int64_t out, std::int64_t in,
                                     const Source& source, bool transposed = false) const;
  void load_latent_decoders(const std::string& attention, const Source& source);
  at::Tensor rebuild_keys(const at::Tensor& latents, std::int64_t first, std::int64_t count,
                          const RopeTable& table) const;
  void attend_latents(Attention attention, const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values,
                      const RopeTable* table, const at::Tensor& attended, const Observed& observed) const;
  at::Tensor project_inputs(const at::Tensor& x) const;
  void attend_rows(const at::Tensor& qkv, std::int64_t first, std::int64_t tokens, const at::Tensor& keys,
                   const at::Tensor& values, const Observed& observed, const at::Tensor& attended) const;
  void attend_sequences(const at::Tensor& x, std::int64_t first, std::int64_t count, std::int64_t tokens,
                        LayerCache* cache, const Observed& observed, const at::Tensor& out) const;
  void feed_forward(const at::Tensor& x, const at::Tensor& observed_inner, const at::Tensor& out) const;

  /// Heads and channels of the keys that an observer of attention sees.
  std::pair<std::int64_t, std::int64_t> seen_keys() const {
    const bool rebuilt = config_.layout == KvLayout::latent && inverse_frequencies_.defined();
    return rebuilt ? std::pair(widths_.source_heads, config_.head_dim)
                   : std::pair(widths_.shape.kv_heads, widths_.shape.key_width);
  }

  ModelConfig config_;
  LayerWidths widths_;
  at::ScalarType dtype_;
  at::Tensor norm1_weight_, norm1_bias_, norm2_weight_, norm2_bias_;
  ProductPtr qkv_, output_, gate_, up_, down_;  // BLOOM: up_ and down_ are dense_h_to_4h and dense_4h_to_h
  std::vector<ProductPtr> key_folds_, query_folds_;
  std::vector<ProductPtr> key_up_, value_up_;  // per source head; without rotation key_up_ turns queries: transposed
  at::Tensor inverse_frequencies_;             // RoPE
  at::Tensor slopes_;                          // ALiBi
};

DecoderLayer::ProductPtr DecoderLayer::load_stacked(const std::vector<std::string>& names,
                                                    const std::vector<std::int64_t>& rows, std::int64_t in, bool bias,
                                                    const Source& source) const {
  if (names.size() == 1) {
    const at::Tensor weight = source.checked(names[0] + ".weight", {rows[0], in});
    const at::Tensor bias_vector = bias ? source.vector(names[0] + ".bias", rows[0], dtype_) : at::Tensor();
    auto product = std::make_unique<const Product>(weight, bias_vector, dtype_);
    source.done(names[0] + ".weight");
    return product;
  }
  std::int64_t out = 0;
  for (const std::int64_t count : rows) out += count;
  const at::Tensor weight = at::empty({out, in}, dtype_);
  const at::Tensor bias_vector = bias ? at::empty({out}, dtype_) : at::Tensor();
  std::int64_t begin = 0;
  for (std::size_t i = 0; i < names.size(); ++i) {
    weight.slice(0, begin, begin + rows[i]).copy_(source.checked(names[i] + ".weight", {rows[i], in}));
    source.done(names[i] + ".weight");
    if (bias) bias_vector.slice(0, begin, begin + rows[i]).copy_(source.vector(names[i] + ".bias", rows[i], dtype_));
    begin += rows[i];
  }
  return std::make_unique<const Product>(weight, bias_vector, dtype_);
}

std::vector<DecoderLayer::ProductPtr> DecoderLayer::load_folds(const std::string& name, std::int64_t count,
                                                               std::int64_t out, std::int64_t in, const Source& source,
                                                               bool transposed) const {
  const at::Tensor folds = source.checked(name, {count, out, in});
  std::vector<ProductPtr> products;
  for (std::int64_t i = 0; i < count; ++i) {
    const at::Tensor fold = folds.select(0, i);
    products.push_back(std::make_unique<const Product>(transposed ? fold.t() : fold, at::Tensor(), dtype_));
  }
  source.done(name);
  return products;
}

void DecoderLayer::load_latent_decoders(const std::string& attention, const Source& source) {
  const bool rotates = config_.family == Family::llama;
  if (rotates || widths_.shape.key_width > config_.head_dim)
    key_up_ =
        load_folds(attention + "key_up.weight", widths_.source_heads, config_.head_dim, widths_.shape.key_width, source,
                   /*transposed=*/!rotates);
  if (widths_.shape.value_width > config_.head_dim)
    value_up_ = load_folds(attention + "value_up.weight", widths_.source_heads, config_.head_dim,
                           widths_.shape.value_width, source);
}

void DecoderLayer::load_llama(const std::string& prefix, const Source& source) {
  const std::int64_t d = config_.head_dim;
  norm1_weight_ = source.vector(prefix + "input_layernorm.weight", config_.hidden, dtype_);
  norm2_weight_ = source.vector(prefix + "post_attention_layernorm.weight", config_.hidden, dtype_);
  const std::string attention = prefix + "self_attn.";
  qkv_ = load_stacked(
      {attention + "q_proj", attention + "k_proj", attention + "v_proj"},
      {config_.heads * widths_.query_width, widths_.key_rows, widths_.shape.kv_heads * widths_.shape.value_width},
      config_.hidden, config_.attention_bias, source);
  output_ = load_product(attention + "o_proj", config_.hidden, config_.heads * widths_.attended_width,
                         config_.attention_bias, source);
  if (config_.layout == KvLayout::projected) {
    const std::int64_t members = widths_.source_heads / widths_.shape.kv_heads;
    key_folds_ = load_folds(attention + "key_fold.weight", widths_.shape.kv_heads, d, members * d, source);
    query_folds_ = load_folds(attention + "query_fold.weight", widths_.source_heads, d, d, source);
  }
  if (config_.layout == KvLayout::latent) load_latent_decoders(attention, source);
  gate_ = load_product(prefix + "mlp.gate_proj", config_.ffn, config_.hidden, config_.mlp_bias, source);
  up_ = load_product(prefix + "mlp.up_proj", config_.ffn, config_.hidden, config_.mlp_bias, source);
  down_ = load_product(prefix + "mlp.down_proj", config_.hidden, config_.ffn, config_.mlp_bias, source);
}

void DecoderLayer::load_bloom(const std::string& prefix, const Source& source) {
  if (config_.layout == KvLayout::projected)
    throw InputError(fmt::format("{}: BLOOM has no rotation, so layout \"projected\" does not apply", config_.file));
  const std::int64_t d = config_.head_dim;
  const std::int64_t hidden = config_.hidden;
  norm1_weight_ = source.vector(prefix + "input_layernorm.weight", hidden, dtype_);
  norm1_bias_ = source.vector(prefix + "input_layernorm.bias", hidden, dtype_);
  norm2_weight_ = source.vector(prefix + "post_attention_layernorm.weight", hidden, dtype_);
  norm2_bias_ = source.vector(prefix + "post_attention_layernorm.bias", hidden, dtype_);
  const std::string attention = prefix + "self_attention.";
  if (config_.split_qkv) {
    qkv_ = load_stacked(
        {attention + "query", attention + "key", attention + "value"},
        {config_.heads * widths_.query_width, widths_.key_rows, widths_.shape.kv_heads * widths_.shape.value_width},
        hidden, true, source);
  } else {
    // Stored as [heads, 3, head_dim, hidden]; wanted are all of Q, then K, then V.
    const std::string name = attention + "query_key_value";
    const std::int64_t heads = config_.heads;
    const at::Tensor weight = at::empty({3, heads, d, hidden}, dtype_);
    weight.copy_(source.checked(name + ".weight", {3 * heads * d, hidden}).view({heads, 3, d, hidden}).transpose(0, 1));
    source.done(name + ".weight");
    const at::Tensor bias =
        source.vector(name + ".bias", 3 * heads * d, dtype_).view({heads, 3, d}).transpose(0, 1).contiguous();
    qkv_ = std::make_unique<const Product>(weight.view({3 * heads * d, hidden}), bias.view({3 * heads * d}), dtype_);
  }
  output_ = load_product(attention + "dense", hidden, config_.heads * widths_.attended_width, true, source);
  if (config_.layout == KvLayout::latent) load_latent_decoders(attention, source);
  up_ = load_product(prefix + "mlp.dense_h_to_4h", config_.ffn, hidden, true, source);
  down_ = load_product(prefix + "mlp.dense_4h_to_h", hidden, config_.ffn, true, source);
}

/// Copies the heads of `from` [sequences * tokens, width], columns offset .. offset + heads * head_dim, to `to`
/// [sequences, heads, tokens, head_dim] of any strides (contiguous channels); rotated when a table is given.
struct HeadMove {
  std::int64_t offset = 0;
  at::Tensor to;
  const RopeTable* table = nullptr;
};

void move_heads(const at::Tensor& from, std::int64_t tokens, std::int64_t start, const std::vector<HeadMove>& moves) {
  const auto& kernel = kernels::table(from.scalar_type());
  const auto size = static_cast<std::int64_t>(from.element_size());
  const auto* source = static_cast<const char*>(from.data_ptr());
  at::parallel_for(
      0, from.size(0), std::max<std::int64_t>(1, 16384 / from.size(1)), [&](std::int64_t begin, std::int64_t end) {
        for (const HeadMove& move : moves) {
          const std::int64_t heads = move.to.size(1);
          const std::int64_t d = move.to.size(3);
          auto* target = static_cast<char*>(move.to.data_ptr());
          for (std::int64_t row = begin; row < end; ++row) {
            const std::int64_t sequence = row / tokens;
            const std::int64_t token = row % tokens;
            const char* x = source + (row * from.stride(0) + move.offset) * size;
            char* y = target + (sequence * move.to.stride(0) + token * move.to.stride(2)) * size;
            for (std::int64_t head = 0; head < heads; ++head, x += d * size, y += move.to.stride(1) * size) {
              if (move.table == nullptr) {
                std::memcpy(y, x, static_cast<std::size_t>(d * size));
              } else {
                const std::int64_t angle = (start + token) * move.table->half;
                kernel.rotate(x, move.table->cosine.data_ptr<float>() + angle,
                              move.table->sine.data_ptr<float>() + angle, y, move.table->half);
              }
            }
          }
        }
      });
}

/// Elements of one sequence's tensor [heads, tokens, channels].
Heads heads_of(const at::Tensor& own) {
  return {own.data_ptr(), own.stride(0), own.stride(1)};
}

/// Keys of source heads first .. first + count for every cached token, rebuilt from `latents` [kv_heads, tokens,
/// key_width] and rotated at their own positions: [count, tokens, head_dim].
at::Tensor DecoderLayer::rebuild_keys(const at::Tensor& latents, std::int64_t first, std::int64_t count,
                                      const RopeTable& table) const {
  constexpr std::int64_t kBlock = 128;
  const auto& kernel = kernels::table(dtype_);
  const std::int64_t d = config_.head_dim;
  const std::int64_t tokens = latents.size(1);
  const std::int64_t members = widths_.source_heads / widths_.shape.kv_heads;
  const std::int64_t blocks = (tokens + kBlock - 1) / kBlock;
  at::Tensor keys = scratch(slot_rebuilt_keys, {count, tokens, d}, dtype_);
  const auto row_bytes = d * static_cast<std::int64_t>(keys.element_size());
  at::parallel_for(0, count * blocks, 1, [&](std::int64_t from, std::int64_t to) {
    for (std::int64_t task = from; task < to; ++task) {
      const std::int64_t head = task / blocks;
      const std::int64_t begin = task % blocks * kBlock;
      const std::int64_t rows = std::min(kBlock, tokens - begin);
      const at::Tensor plain = scratch(slot_key_rows, {rows, d}, dtype_);
      key_up_[static_cast<std::size_t>(first + head)]->apply(
          latents.select(0, (first + head) / members).slice(0, begin, begin + rows), plain);
      const auto* x = static_cast<const char*>(plain.data_ptr());
      auto* y = static_cast<char*>(keys.data_ptr()) + (head * tokens + begin) * row_bytes;
      for (std::int64_t row = 0; row < rows; ++row) {
        const std::int64_t angle = (begin + row) * table.half;
        kernel.rotate(x + row * row_bytes, table.cosine.data_ptr<float>() + angle, table.sine.data_ptr<float>() + angle,
                      y + row * row_bytes, table.half);
      }
    }
  });
  return keys;
}

/// Attention of one sequence over latents: queries [heads, tokens, query_width], keys and values [kv_heads, start +
/// tokens, width], attended [tokens, heads * attended_width]. What is rebuilt, and queries and outputs as wide as
/// latents, is made for as many source heads at a time as fit attention_block_bytes(). `observed` is this sequence's.
void DecoderLayer::attend_latents(Attention attention, const at::Tensor& queries, const at::Tensor& keys,
                                  const at::Tensor& values, const RopeTable* table, const at::Tensor& attended,
                                  const Observed& observed) const {
  const std::int64_t tokens = attention.tokens;
  const std::int64_t total = attention.start + tokens;
  const std::int64_t repeat = config_.heads / widths_.source_heads;
  const std::int64_t members = widths_.source_heads / widths_.shape.kv_heads;
  const std::int64_t value_width = widths_.shape.value_width;
  const bool rebuilds = table != nullptr;
  const bool turns_queries = !rebuilds && !key_up_.empty();
  const bool rebuilds_values = !value_up_.empty();
  const std::int64_t per_head = (rebuilds ? total * config_.head_dim : 0) +
                                (turns_queries ? repeat * tokens * widths_.shape.key_width : 0) +
                                (rebuilds_values ? repeat * tokens * value_width : 0);
  const std::int64_t bytes = per_head * static_cast<std::int64_t>(c10::elementSize(dtype_));
  const std::int64_t together =
      bytes == 0 ? widths_.source_heads
                 : std::clamp<std::int64_t>(attention_block_bytes() / bytes, 1, widths_.source_heads);
  const auto each_head = [&](std::int64_t first, std::int64_t count, const auto& work) {
    at::parallel_for(0, count * repeat, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i)
        work(i, first * repeat + i, static_cast<std::size_t>(first + i / repeat));
    });
  };
  attention.key_readers = rebuilds ? repeat : repeat * members;
  attention.value_readers = repeat * members;
  attention.value_width = value_width;
  for (std::int64_t first = 0; first < widths_.source_heads; first += together) {
    const std::int64_t count = std::min(together, widths_.source_heads - first);
    attention.head_begin = first * repeat;
    attention.head_end = (first + count) * repeat;
    attention.values = heads_of(values.slice(0, first / members));
    attention.queries = heads_of(queries.slice(0, first * repeat));
    attention.keys = heads_of(keys.slice(0, first / members));
    attention.key_width = widths_.shape.key_width;
    if (rebuilds) {
      const at::Tensor rebuilt = rebuild_keys(keys, first, count, *table);
      attention.keys = heads_of(rebuilt);
      attention.key_width = config_.head_dim;
      if (observed.keys.defined()) observed.keys.slice(1, first, first + count).copy_(rebuilt.transpose(0, 1));
      if (observed.rotated_keys.defined())
        observed.rotated_keys.slice(1, first, first + count).copy_(rebuilt.slice(1, total - tokens).transpose(0, 1));
    } else if (turns_queries) {
      const at::Tensor turned = scratch(slot_folded_queries, {count * repeat, tokens, widths_.shape.key_width}, dtype_);
      each_head(first, count, [&](std::int64_t own, std::int64_t head, std::size_t source) {
        key_up_[source]->apply(queries.select(0, head), turned.select(0, own));
      });
      attention.queries = heads_of(turned);
      if (observed.queries.defined())
        observed.queries.slice(1, first * repeat, (first + count) * repeat).copy_(turned.transpose(0, 1));
    }
    if (!rebuilds_values) {
      attention.output = attended.slice(1, first * repeat * value_width).data_ptr();
      attention.output_stride = attended.stride(0);
      attend(attention);
      continue;
    }
    const at::Tensor latents = scratch(slot_attended_latents, {tokens, count * repeat * value_width}, dtype_);
    attention.output = latents.data_ptr();
    attention.output_stride = latents.stride(0);
    attend(attention);
    const std::int64_t d = config_.head_dim;
    each_head(first, count, [&](std::int64_t own, std::int64_t head, std::size_t source) {
      value_up_[source]->apply(latents.slice(1, own * value_width, (own + 1) * value_width),
                               attended.slice(1, head * d, (head + 1) * d));
    });
  }
}

/// Queries, keys and values of rows of x, side by side; valid until the next call on this thread.
at::Tensor DecoderLayer::project_inputs(const at::Tensor& x) const {
  at::Tensor qkv = scratch(slot_qkv, {x.size(0), widths_.columns(config_)}, dtype_);
  qkv_->apply(x, qkv);
  return qkv;
}

/// Attention of sequences of `tokens` rows each, whose projections are `qkv` [sequences * tokens, columns]. Keys and
/// values [sequences, kv_heads, start + tokens, width] hold every earlier token and receive the new ones. `attended`
/// [sequences * tokens, heads * attended_width]. The sequences are first, first + 1, ... of what `observed` holds.
void DecoderLayer::attend_rows(const at::Tensor& qkv, std::int64_t first, std::int64_t tokens, const at::Tensor& keys,
                               const at::Tensor& values, const Observed& observed, const at::Tensor& attended) const {
  const at::Tensor& observed_keys = observed.rotated_keys;
  const std::int64_t d = config_.head_dim;
  const std::int64_t heads = config_.heads;
  const std::int64_t kv_heads = widths_.shape.kv_heads;
  const std::int64_t source_heads = widths_.source_heads;
  const std::int64_t count = keys.size(0);
  const std::int64_t start = keys.size(2) - tokens;
  const bool projected = config_.layout == KvLayout::projected;
  const bool latent = config_.layout == KvLayout::latent;
  const std::shared_ptr<const RopeTable> table =
      inverse_frequencies_.defined() ? rope_table(inverse_frequencies_, dtype_, start + tokens) : nullptr;
  const std::int64_t key_column = heads * widths_.query_width;
  const std::int64_t value_column = key_column + widths_.key_rows;

  // All as [sequences, heads, tokens, channels].
  at::Tensor queries = scratch(slot_queries, {count, heads, tokens, widths_.query_width}, dtype_);
  const at::Tensor new_keys = keys.slice(2, start, start + tokens);
  std::vector<HeadMove> moves = {{0, queries, table.get()},
                                 {value_column, values.slice(2, start, start + tokens), nullptr}};
  at::Tensor source_keys;
  if (projected) {
    source_keys = observed_keys.defined() ? observed_keys.slice(0, first, first + count)
                                          : scratch(slot_source_keys, {count, tokens, source_heads, d}, dtype_);
    moves.push_back({key_column, source_keys.transpose(1, 2), table.get()});
  } else {
    moves.push_back({key_column, new_keys, latent ? nullptr : table.get()});
  }
  move_heads(qkv, tokens, start, moves);
  const bool keys_as_cached = !projected && !(latent && table != nullptr);
  if (observed_keys.defined() && keys_as_cached) {
    const at::Tensor seen = observed_keys.slice(0, first, first + count);
    if (seen.data_ptr() != new_keys.data_ptr()) seen.copy_(new_keys.transpose(1, 2));  // else they were made there
  }

  if (projected) {
    const std::int64_t members = source_heads / kv_heads;
    const at::Tensor stacked = source_keys.view({count, tokens, source_heads * d});
    const at::Tensor folded = scratch(slot_folded_queries, {count, heads, tokens, d}, dtype_);
    const std::int64_t readers = heads / source_heads;
    at::parallel_for(0, count * (kv_heads + heads), 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t sequence = task / (kv_heads + heads);
        const std::int64_t item = task % (kv_heads + heads);
        if (item < kv_heads) {
          key_folds_[static_cast<std::size_t>(item)]->apply(
              stacked.select(0, sequence).slice(1, item * members * d, (item + 1) * members * d),
              new_keys.select(0, sequence).select(0, item));
        } else {
          const std::int64_t head = item - kv_heads;
          query_folds_[static_cast<std::size_t>(head / readers)]->apply(queries.select(0, sequence).select(0, head),
                                                                        folded.select(0, sequence).select(0, head));
        }
      }
    });
    queries = folded;
  }

  Attention attention;
  attention.dtype = dtype_;
  attention.head_end = heads;
  attention.key_readers = attention.value_readers = heads / kv_heads;
  attention.key_width = attention.value_width = d;
  attention.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(d)));
  attention.tokens = tokens;
  attention.start = start;
  attention.output_stride = attended.stride(0);
  attention.slopes = slopes_.defined() ? slopes_.data_ptr<float>() : nullptr;
  for (std::int64_t sequence = 0; sequence < count; ++sequence) {
    const at::Tensor own = attended.slice(0, sequence * tokens, (sequence + 1) * tokens);
    if (latent) {
      Observed mine;
      for (const auto& [to, from] : {std::pair(&mine.queries, &observed.queries), std::pair(&mine.keys, &observed.keys),
                                     std::pair(&mine.rotated_keys, &observed.rotated_keys)})
        if (from->defined()) *to = from->select(0, first + sequence);
      attend_latents(attention, queries.select(0, sequence), keys.select(0, sequence), values.select(0, sequence),
                     table.get(), own, mine);
      continue;
    }
    attention.queries = heads_of(queries.select(0, sequence));
    attention.keys = heads_of(keys.select(0, sequence));
    attention.values = heads_of(values.select(0, sequence));
    attention.output = own.data_ptr();
    attend(attention);
  }
  const auto keep = [&](const at::Tensor& all, const at::Tensor& own) {
    if (all.defined()) all.slice(0, first, first + count).copy_(own);
  };
  // attend_latents() has kept the queries and keys that it made itself.
  if (!latent || key_up_.empty() || table != nullptr) keep(observed.queries, queries.transpose(1, 2));
  if (keys_as_cached || projected) keep(observed.keys, keys.transpose(1, 2));
  keep(observed.values, values.transpose(1, 2));
  keep(observed.attended, attended.view({count, tokens, heads * widths_.attended_width}));
}

/// Attention of sequences first .. first + count: `out` [count * tokens, hidden] += output projection.
void DecoderLayer::attend_sequences(const at::Tensor& x, std::int64_t first, std::int64_t count, std::int64_t tokens,
                                    LayerCache* cache, const Observed& observed, const at::Tensor& out) const {
  const std::int64_t end = (cache != nullptr ? cache->length : 0) + tokens;
  const at::Tensor qkv = project_inputs(x);
  at::Tensor keys, values;
  if (cache != nullptr) {
    keys = cache->keys.slice(0, first, first + count).slice(1, 0, end).transpose(1, 2);
    values = cache->values.slice(0, first, first + count).slice(1, 0, end).transpose(1, 2);
  } else {
    // Rotated keys that an observer wants stand as [sequences, tokens, heads, head_dim]; attention can use them where
    // they are.
    keys = observed.rotated_keys.defined() && config_.layout == KvLayout::gqa
               ? observed.rotated_keys.slice(0, first, first + count).transpose(1, 2)
               : scratch(slot_keys, {count, widths_.shape.kv_heads, tokens, widths_.shape.key_width}, dtype_);
    values = scratch(slot_values, {count, widths_.shape.kv_heads, tokens, widths_.shape.value_width}, dtype_);
  }
  const at::Tensor attended = scratch(slot_attention, {count * tokens, config_.heads * widths_.attended_width}, dtype_);
  attend_rows(qkv, first, tokens, keys, values, observed, attended);
  output_->apply(attended, out, /*accumulate=*/true);
}

/// out [rows, hidden] += MLP of x; what enters the down projection stays in `observed_inner` [rows, ffn] if defined.
void DecoderLayer::feed_forward(const at::Tensor& x, const at::Tensor& observed_inner, const at::Tensor& out) const {
  const auto& kernel = kernels::table(dtype_);
  const auto size = static_cast<std::int64_t>(x.element_size());
  for (std::int64_t begin = 0; begin < x.size(0); begin += kRows) {
    const std::int64_t rows = std::min(kRows, x.size(0) - begin);
    const at::Tensor input = x.slice(0, begin, begin + rows);
    const at::Tensor seen = observed_inner.defined() ? observed_inner.slice(0, begin, begin + rows) : at::Tensor();
    const at::Tensor inner = !gate_ && seen.defined() ? seen : scratch(slot_up, {rows, config_.ffn}, dtype_);
    up_->apply(input, inner);
    auto* inner_data = static_cast<char*>(inner.data_ptr());
    if (gate_) {
      const at::Tensor gate = seen.defined() ? seen : scratch(slot_gate, {rows, config_.ffn}, dtype_);
      gate_->apply(input, gate);
      auto* gate_data = static_cast<char*>(gate.data_ptr());
      for_elements(inner.numel(), [&](std::int64_t first, std::int64_t count) {
        kernel.silu_times(gate_data + first * size, inner_data + first * size, count);
      });
      down_->apply(gate, out.slice(0, begin, begin + rows), /*accumulate=*/true);
    } else {
      for_elements(inner.numel(),
                   [&](std::int64_t first, std::int64_t count) { kernel.gelu(inner_data + first * size, count); });
      down_->apply(inner, out.slice(0, begin, begin + rows), /*accumulate=*/true);
    }
  }
}

at::Tensor DecoderLayer::forward(const at::Tensor& hidden_states, LayerCache* cache, LayerObserver* observer) const {
  check_forward(config_, widths_.shape, dtype_, hidden_states, cache);
  const std::int64_t batch = hidden_states.size(0);
  const std::int64_t tokens = hidden_states.size(1);
  const at::Tensor hidden = hidden_states.contiguous();
  const std::int64_t rows = batch * tokens;
  const at::Tensor flat = hidden.view({rows, config_.hidden});
  const at::Tensor x = observer != nullptr ? large_empty({rows, config_.hidden}, dtype_)
                                           : scratch(slot_norm, {rows, config_.hidden}, dtype_);
  normalise(flat, norm1_weight_, norm1_bias_, config_.norm_eps, x);
  if (observer != nullptr) observer->attention_input(x.view({batch, tokens, config_.hidden}));
  Observed observed;
  const bool projected = config_.layout == KvLayout::projected;
  const auto [key_heads, key_width] = seen_keys();
  if (observer != nullptr && observer->wants_rotated_keys())
    observed.rotated_keys = at::empty({batch, tokens, projected ? widths_.source_heads : key_heads, key_width}, dtype_);
  if (observer != nullptr && observer->wants_attention()) {
    const std::int64_t seen = (cache != nullptr ? cache->length : 0) + tokens;
    observed.queries = large_empty({batch, tokens, config_.heads, key_width}, dtype_);
    observed.keys = large_empty({batch, seen, key_heads, key_width}, dtype_);
  }
  if (observer != nullptr && (observer->wants_attention() || observer->wants_values())) {
    const std::int64_t seen = (cache != nullptr ? cache->length : 0) + tokens;
    observed.values = large_empty({batch, seen, widths_.shape.kv_heads, widths_.shape.value_width}, dtype_);
  }
  if (observer != nullptr && observer->wants_activated()) observed.inner = large_empty({rows, config_.ffn}, dtype_);
  if (observer != nullptr && observer->wants_attended())
    observed.attended = large_empty({batch, tokens, config_.heads * widths_.attended_width}, dtype_);

  at::Tensor result = large_empty({batch, tokens, config_.hidden}, dtype_);
  const at::Tensor out = result.view({rows, config_.hidden});
  out.copy_(config_.post_layernorm_residual ? x : flat);
  if (tokens > 0) {
    const std::int64_t together = std::max<std::int64_t>(1, kRows / tokens);
    for (std::int64_t first = 0; first < batch; first += together) {
      const std::int64_t count = std::min(together, batch - first);
      attend_sequences(x.slice(0, first * tokens, (first + count) * tokens), first, count, tokens, cache, observed,
                       out.slice(0, first * tokens, (first + count) * tokens));
    }
  }
  if (cache != nullptr) cache->length += tokens;
  if (observed.rotated_keys.defined()) observer->rotated_keys(observed.rotated_keys);
  if (observer != nullptr && observer->wants_values())
    observer->values(observed.values.slice(1, observed.values.size(1) - tokens));
  if (observed.queries.defined()) observer->attention(observed.queries, observed.keys, observed.values);
  if (observed.attended.defined()) observer->attended(observed.attended);

  const at::Tensor y = scratch(slot_norm, {rows, config_.hidden}, dtype_);
  normalise(out, norm2_weight_, norm2_bias_, config_.norm_eps, y);
  if (config_.post_layernorm_residual) out.copy_(y);
  feed_forward(y, observed.inner, out);
  if (observed.inner.defined()) observer->activated(observed.inner.view({batch, tokens, config_.ffn}));
  return result;
}

at::Tensor DecoderLayer::forward_packed(const at::Tensor& hidden_states, const std::vector<Segment>& segments,
                                        LayerCache* cache) const {
  const auto [rows, capacity] = check_packed(config_, dtype_, hidden_states, segments);
  // [slots, kv_heads, capacity, width]; head by head when it is our own, as attention likes it.
  at::Tensor keys, values;
  if (cache != nullptr) {
    if (cache->keys.defined()) check_cache(widths_.shape, dtype_, *cache, cache->keys.size(0));
    keys = cache->keys.transpose(1, 2);
    values = cache->values.transpose(1, 2);
    if (capacity > std::min(keys.size(2), values.size(2)))
      throw InputError(
          fmt::format("the KV cache has room for {} tokens, and a sequence has {}", keys.size(2), capacity));
  } else {
    keys = scratch(slot_keys, {1, widths_.shape.kv_heads, capacity, widths_.shape.key_width}, dtype_);
    values = scratch(slot_values, {1, widths_.shape.kv_heads, capacity, widths_.shape.value_width}, dtype_);
  }
  check_slots(segments, keys.size(0));

  const at::Tensor hidden = hidden_states.contiguous();
  const at::Tensor x = scratch(slot_norm, {rows, config_.hidden}, dtype_);
  normalise(hidden, norm1_weight_, norm1_bias_, config_.norm_eps, x);
  at::Tensor out = large_empty({rows, config_.hidden}, dtype_);
  out.copy_(config_.post_layernorm_residual ? x : hidden);
  std::int64_t row = 0;
  for (std::size_t next = 0; next < segments.size();) {
    // As many segments at a time as make full products.
    std::size_t end = next;
    std::int64_t together = 0;
    while (end < segments.size() && (together == 0 || together + segments[end].tokens <= kRows))
      together += segments[end++].tokens;
    const at::Tensor qkv = project_inputs(x.slice(0, row, row + together));
    const at::Tensor attended = scratch(slot_attention, {together, config_.heads * widths_.attended_width}, dtype_);
    for (std::int64_t own = 0; next < end; own += segments[next++].tokens) {
      const Segment& segment = segments[next];
      const auto in_slot = [&](const at::Tensor& all, std::int64_t slot, std::int64_t tokens) {
        return all.slice(0, slot, slot + 1).slice(2, 0, tokens);
      };
      if (segment.copied_from >= 0 && segment.copied_from != segment.slot && segment.start > 0)
        for (const at::Tensor* all : {&keys, &values})
          in_slot(*all, segment.slot, segment.start).copy_(in_slot(*all, segment.copied_from, segment.start));
      const std::int64_t total = segment.start + segment.tokens;
      attend_rows(qkv.slice(0, own, own + segment.tokens), 0, segment.tokens, in_slot(keys, segment.slot, total),
                  in_slot(values, segment.slot, total), {}, attended.slice(0, own, own + segment.tokens));
    }
    output_->apply(attended, out.slice(0, row, row + together), /*accumulate=*/true);
    row += together;
  }
  if (rows == 0) return out;
  const at::Tensor y = scratch(slot_norm, {rows, config_.hidden}, dtype_);
  normalise(out, norm2_weight_, norm2_bias_, config_.norm_eps, y);
  if (config_.post_layernorm_residual) out.copy_(y);
  feed_forward(y, at::Tensor(), out);
  return out;
}

std::unique_ptr<Layer> make_layer(const ModelConfig& config, std::int64_t layer, at::ScalarType dtype,
                                  const Source& source) {
  require_dtype(dtype);
  if (layer < 0 || layer >= config.layers) throw InternalError(fmt::format("layer {} of {}", layer, config.layers));
  if (compute().engine == Engine::tensors) return make_tensor_layer(config, layer, dtype, source);
  return std::make_unique<DecoderLayer>(config, layer, dtype, source);
}

}  // namespace

TensorGetter replaced_tensors(const checkpoint::Reader& reader, const std::map<std::string, at::Tensor>& replaced) {
  return [&reader, &replaced](const std::string& name, const std::vector<std::int64_t>& shape) {
    const auto found = replaced.find(checkpoint::last_parts(name));
    if (found == replaced.end()) return reader.load(name, shape, at::kFloat);
    if (found->second.sizes() != at::IntArrayRef(shape))
      throw InternalError(fmt::format("{} was replaced by a tensor of shape [{}], expected [{}]", name,
                                      fmt::join(found->second.sizes(), ", "), fmt::join(shape, ", ")));
    return found->second;
  };
}

std::unique_ptr<Layer> load_layer(const checkpoint::Reader& reader, std::int64_t layer, at::ScalarType dtype) {
  return make_layer(reader.config(), layer, dtype, source_of(reader));
}

std::unique_ptr<Layer> load_layer(const ModelConfig& config, std::int64_t layer, at::ScalarType dtype,
                                  const TensorGetter& getter) {
  return make_layer(config, layer, dtype, Source{getter});
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Embedding and head

void check_ids(const at::Tensor& ids, const ModelConfig& config) {
  if (!ids.defined() || ids.dim() != 2 || ids.scalar_type() != at::kLong)
    throw InputError(fmt::format("token ids are {} {}, expected int64 [batch, tokens]",
                                 ids.defined() ? c10::toString(ids.scalar_type()) : "none",
                                 ids.defined() ? shape_text(ids.sizes()) : ""));
  const at::Tensor dense = ids.contiguous();
  const auto* data = dense.data_ptr<std::int64_t>();
  for (std::int64_t i = 0; i < dense.numel(); ++i)
    if (data[i] < 0 || data[i] >= config.vocab)
      throw InputError(fmt::format("token id {} at [{}, {}] is outside the vocabulary of {} ({} entries)", data[i],
                                   i / dense.size(1), i % dense.size(1), config.file, config.vocab),
                       "the ids were made with the tokenizer of another model");
}

namespace {

bool bloom(const ModelConfig& config) {
  return config.family == Family::bloom;
}

at::Tensor load_table(const checkpoint::Reader& reader, const std::string& name, at::ScalarType dtype) {
  require_dtype(dtype);
  at::Tensor table = to_device(source_of(reader).checked(name, {reader.config().vocab, reader.config().hidden}), dtype);
  reader.done_with(name);
  return table;
}

/// norm1 of embedding and head: the engine's.
at::Tensor load_vector(const Source& source, const std::string& name, const ModelConfig& config, at::ScalarType dtype) {
  at::Tensor copy = to_device(source.checked(name, {config.hidden}), dtype);
  source.done(name);
  return copy;
}

}  // namespace

Embedding::Embedding(const checkpoint::Reader& reader, at::ScalarType dtype)
    : config_(reader.config()), engine_(compute().engine) {
  const Source source = source_of(reader);
  if (bloom(config_)) {
    table_ = load_table(reader, "transformer.word_embeddings.weight", dtype);
    norm_weight_ = load_vector(source, "transformer.word_embeddings_layernorm.weight", config_, dtype);
    norm_bias_ = load_vector(source, "transformer.word_embeddings_layernorm.bias", config_, dtype);
  } else {
    table_ = load_table(reader, "model.embed_tokens.weight", dtype);
  }
}

at::Tensor Embedding::forward(const at::Tensor& ids) const {
  check_ids(ids, config_);
  at::Tensor rows = at::index_select(table_, 0, ids.reshape({-1}).to(table_.device()));
  if (norm_weight_.defined() && engine_ == Engine::tensors)
    rows = normalise_tensor(rows, norm_weight_, norm_bias_, config_.norm_eps);
  else if (norm_weight_.defined())
    normalise(rows, norm_weight_, norm_bias_, config_.norm_eps, rows);
  return rows.view({ids.size(0), ids.size(1), config_.hidden});
}

Head::Head(const checkpoint::Reader& reader, at::ScalarType dtype)
    : config_(reader.config()), engine_(compute().engine), dtype_(dtype) {
  require_dtype(dtype);
  const Source source = source_of(reader);
  const std::string table = bloom(config_) ? "transformer.word_embeddings.weight" : "model.embed_tokens.weight";
  norm_weight_ = load_vector(source, bloom(config_) ? "transformer.ln_f.weight" : "model.norm.weight", config_, dtype);
  if (bloom(config_)) norm_bias_ = load_vector(source, "transformer.ln_f.bias", config_, dtype);
  const std::string name = config_.tied_embeddings ? table : "lm_head.weight";
  const at::Tensor projection = source.checked(name, {config_.vocab, config_.hidden});
  if (engine_ == Engine::tensors)
    device_projection_ = to_device(projection, dtype);
  else
    projection_ = std::make_shared<const Product>(projection, at::Tensor(), dtype);
  source.done(name);
}

at::Tensor Head::logits(const at::Tensor& hidden) const {
  if (hidden.dim() < 1 || hidden.size(-1) != config_.hidden || hidden.scalar_type() != dtype_)
    throw InternalError(fmt::format("head input {} {}, expected [..., {}] {}", shape_text(hidden.sizes()),
                                    c10::toString(hidden.scalar_type()), config_.hidden, c10::toString(dtype_)));
  if (engine_ == Engine::tensors)
    return at::linear(normalise_tensor(hidden, norm_weight_, norm_bias_, config_.norm_eps), device_projection_);
  const at::Tensor flat = hidden.contiguous().view({-1, config_.hidden});
  const at::Tensor x = scratch(slot_norm, flat.sizes(), dtype_);
  normalise(flat, norm_weight_, norm_bias_, config_.norm_eps, x);
  std::vector<std::int64_t> shape = hidden.sizes().vec();
  shape.back() = config_.vocab;
  at::Tensor result = large_empty(shape, dtype_);
  projection_->apply(x, result.view({-1, config_.vocab}));
  return result;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Whole model

Decoder::Decoder(const checkpoint::Reader& reader, at::ScalarType dtype)
    : config_(reader.config()), dtype_(dtype), embedding_(reader, dtype), head_(reader, dtype) {
  for (std::int64_t layer = 0; layer < config_.layers; ++layer) layers_.push_back(load_layer(reader, layer, dtype));
}

LayerCache empty_cache(const checkpoint::LayerShape& shape, std::int64_t slots, std::int64_t capacity,
                       at::ScalarType dtype) {
  const auto options = at::TensorOptions().dtype(dtype).device(compute().device);
  return {at::empty({slots, capacity, shape.kv_heads, shape.key_width}, options),
          at::empty({slots, capacity, shape.kv_heads, shape.value_width}, options)};
}

at::Tensor Decoder::logits(const at::Tensor& ids) const {
  at::Tensor hidden = embedding_.forward(ids);
  for (const auto& layer : layers_) hidden = layer->forward(hidden);
  return head_.logits(hidden);
}

std::vector<LayerCache> Decoder::make_cache(std::int64_t batch, std::int64_t capacity) const {
  std::vector<LayerCache> caches(layers_.size());
  for (std::size_t i = 0; i < caches.size(); ++i) {
    const checkpoint::LayerShape shape = config_.shape_of(static_cast<std::int64_t>(i));
    caches[i] = empty_cache(shape, batch, capacity, dtype_);
  }
  return caches;
}

at::Tensor Decoder::step(const at::Tensor& ids, std::vector<LayerCache>& caches) const {
  if (caches.size() != layers_.size())
    throw InternalError(fmt::format("{} caches for {} layers", caches.size(), layers_.size()));
  if (ids.dim() == 2 && ids.size(1) == 0) throw InputError("no token to continue from");
  at::Tensor hidden = embedding_.forward(ids);
  for (std::size_t i = 0; i < layers_.size(); ++i) hidden = layers_[i]->forward(hidden, &caches[i]);
  return head_.logits(hidden.slice(1, hidden.size(1) - 1).squeeze(1));
}

}  // namespace headfold::model
