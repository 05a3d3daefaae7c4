#include "layer.h"

#include <ATen/Parallel.h>
#include <headfold/base/error.h>
#include <headfold/model/compute.h>
#include <headfold/model/model.h>
#include <headfold/model/product.h>

#include "tensors.h"

namespace headfold::finetune {
namespace {

using checkpoint::Family;
using checkpoint::KvLayout;
using model::Matrix;
using model::multiply;
using model::Operation;

Matrix matrix(const at::Tensor& x) {
  if (x.dim() != 2 || x.stride(1) != 1)
    throw InternalError(fmt::format("operand [{}] of a product is not row-major", fmt::join(x.sizes(), ", ")));
  return {x.data_ptr(), x.size(0), x.size(1), x.stride(0)};
}

/// c = op(a) op(b) or c += …; c may be wider than a and b (gradients of bfloat16 products).
void product(const at::Tensor& a, const at::Tensor& b, const Operation& operation, const at::Tensor& c) {
  if (tensors::in_use()) {
    tensors::product(a, b, operation, c);
    return;
  }
  multiply(matrix(a), matrix(b), operation, a.scalar_type(), c.data_ptr(), c.stride(0), c.scalar_type());
}

at::Tensor rows_like(const at::Tensor& x, std::int64_t columns) {
  return at::empty({x.size(0), columns}, x.options());
}

/// Gradient of a vector added to every row.
void add_rows(const at::Tensor& gradient, const at::Tensor& dy) {
  const at::Tensor& sum = gradient;
  sum.add_(dy.sum(0, false, gradient.scalar_type()));
}

}  // namespace

at::ScalarType parameter_type(at::ScalarType compute) {
  return compute == at::kDouble ? at::kDouble : at::kFloat;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Loading

Loader::Loader(const checkpoint::Reader& reader, const LoraOptions& options, at::ScalarType dtype,
               std::vector<Parameter>& parameters)
    : reader_(reader), options_(options), dtype_(dtype), parameters_(parameters) {
  if (!options.full) modules_ = target_modules(options, reader.config());
}

std::ptrdiff_t Loader::add(const std::string& name, std::int64_t layer, const at::Tensor& value) {
  Parameter parameter;
  parameter.name = name;
  parameter.layer = layer;
  // Adapters live where they are used, and so do their gradients and optimiser; all weights at once would not leave a
  // GPU the memory to work in.
  parameter.value = tensors::in_use() && !options_.full ? value.to(model::compute().device) : value;
  parameter.gradient = at::zeros_like(parameter.value);
  parameter.decays = value.dim() > 1;
  parameters_.push_back(std::move(parameter));
  return static_cast<std::ptrdiff_t>(parameters_.size()) - 1;
}

Weight Loader::weight(const std::string& name, const std::vector<std::int64_t>& shape, std::int64_t layer) {
  Weight weight;
  if (options_.full) {
    weight.parameter = add(name, layer, reader_.load(name, shape, parameter_type(dtype_)));
    reader_.done_with(name);
    return weight;
  }
  if (tensors::in_use()) {
    weight.frozen = model::to_device(reader_.weight(name, shape), dtype_);
    reader_.done_with(name);
    return weight;
  }
  // What is stored in the compute dtype is used where it is mapped: the ranks of a host then share it.
  const bool usable = reader_.has(name) && reader_.info(name).shape == shape &&
                      checkpoint::scalar_type(reader_.info(name).dtype) == dtype_;
  weight.frozen = usable ? reader_.view(name) : reader_.load(name, shape, dtype_);
  if (!usable) reader_.done_with(name);
  return weight;
}

Linear Loader::linear(const std::string& module, std::int64_t out, std::int64_t in, bool bias, std::int64_t layer) {
  Linear linear;
  linear.module = module;
  linear.out = out;
  linear.in = in;
  linear.number = projections_++;
  linear.weight = weight(module + ".weight", {out, in}, layer);
  if (bias) linear.bias = weight(module + ".bias", {out}, layer);
  const std::string last = module.substr(module.rfind('.') + 1);
  if (std::find(modules_.begin(), modules_.end(), last) == modules_.end()) return linear;
  const std::int64_t r = options_.rank;
  linear.a = add(adapter_tensor(module, 'A'), layer, initial_a(module, options_, in).to(parameter_type(dtype_)));
  linear.b = add(adapter_tensor(module, 'B'), layer, at::zeros({out, r}, parameter_type(dtype_)));
  return linear;
}

Norm Loader::norm(const std::string& module, std::int64_t width, bool bias, std::int64_t layer) {
  Norm norm;
  norm.weight = weight(module + ".weight", {width}, layer);
  if (bias) norm.bias = weight(module + ".bias", {width}, layer);
  return norm;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Weights during a pass

at::Tensor Pass::value(std::ptrdiff_t parameter) const {
  const auto i = static_cast<std::size_t>(parameter);
  const at::Tensor& own = (*parameters)[i].value;
  if (!tensors::in_use()) return own.to(dtype);
  at::Tensor& copy = on_device->values.at(i);
  if (!copy.defined()) copy = own.device() == model::compute().device ? own.to(dtype) : model::to_device(own, dtype);
  return copy;
}

at::Tensor Pass::value(const Weight& weight) const {
  return weight.parameter < 0 ? weight.frozen : value(weight.parameter);
}

at::Tensor Pass::gradient(const Weight& weight) const {
  return weight.parameter < 0 ? at::Tensor() : gradient(weight.parameter);
}

at::Tensor Pass::gradient(std::ptrdiff_t parameter) const {
  const auto i = static_cast<std::size_t>(parameter);
  const Parameter& own = (*parameters)[i];
  if (!tensors::in_use() || own.gradient.device() == model::compute().device) return own.gradient;
  at::Tensor& sum = on_device->gradients.at(i);
  if (!sum.defined()) sum = at::zeros(own.gradient.sizes(), own.gradient.options().device(model::compute().device));
  return sum;
}

void Pass::hand_over(std::int64_t layer) const {
  if (!tensors::in_use()) return;
  for (std::size_t i = 0; i < parameters->size(); ++i) {
    Parameter& own = (*parameters)[i];
    if (own.layer != layer) continue;
    at::Tensor& sum = on_device->gradients.at(i);
    if (sum.defined()) own.gradient.add_(model::to_host(sum));
    sum.reset();
  }
}

DropoutMask Pass::mask(const Linear& linear) const {
  // Any odd multiplier keeps projections apart; the hash does the rest.
  return {dropout, dropout_seed + linear.number * 0xd1342543de82ef95U, tokens, &numbers};
}

void project(const Pass& pass, const Linear& linear, const at::Tensor& x, const at::Tensor& y, bool accumulate,
             LinearState* state) {
  if (linear.bias.defined()) {
    const at::Tensor& sum = y;
    if (accumulate) {
      sum.add_(pass.value(linear.bias));
    } else {
      sum.copy_(pass.value(linear.bias).unsqueeze(0).expand_as(y));
    }
    accumulate = true;
  }
  product(x, pass.value(linear.weight), {.transpose_b = true, .accumulate = accumulate}, y);
  if (linear.a < 0) return;
  const at::Tensor a = pass.value(linear.a);
  const at::Tensor low = rows_like(x, a.size(0));
  product(pass.dropout > 0 ? drop(x, pass.mask(linear)) : x, a, {.transpose_b = true}, low);
  low.mul_(pass.lora_scale);
  product(low, pass.value(linear.b), {.transpose_b = true, .accumulate = true}, y);
  if (state != nullptr) state->low = low;
}

void project_backward(const Pass& pass, const Linear& linear, const LinearState& state, const at::Tensor& x,
                      const at::Tensor& dy, const at::Tensor& dx, bool overwrite) {
  if (dx.defined()) product(dy, pass.value(linear.weight), {.accumulate = !overwrite}, dx);
  if (const at::Tensor gradient = pass.gradient(linear.weight); gradient.defined())
    product(dy, x, {.transpose_a = true, .accumulate = true}, gradient);
  if (const at::Tensor gradient = pass.gradient(linear.bias); gradient.defined()) add_rows(gradient, dy);
  if (linear.a < 0) return;
  const auto gradient = [&](std::ptrdiff_t index) { return pass.gradient(index); };
  product(dy, state.low, {.transpose_a = true, .accumulate = true}, gradient(linear.b));
  const at::Tensor dlow = rows_like(dy, state.low.size(1));
  product(dy, pass.value(linear.b), {}, dlow);
  dlow.mul_(pass.lora_scale);
  product(dlow, pass.dropout > 0 ? drop(x, pass.mask(linear)) : x, {.transpose_a = true, .accumulate = true},
          gradient(linear.a));
  if (!dx.defined()) return;
  const at::Tensor a = pass.value(linear.a);
  if (pass.dropout > 0) {
    const at::Tensor through = at::empty_like(dx);
    product(dlow, a, {}, through);
    add_dropped(dx, through, pass.mask(linear));
  } else {
    product(dlow, a, {.accumulate = true}, dx);
  }
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Matrices per head

namespace {

/// y = x M^T, head by head: output item i is input head i / inputs_shared times matrix i / matrices_shared (or its
/// transpose with `transposed`: y = x M). At most one of the two numbers is above 1.
struct HeadProducts {
  at::Tensor matrices;  ///< [count, out, in]
  std::int64_t items = 0;
  std::int64_t inputs_shared = 1;
  std::int64_t matrices_shared = 1;
  bool transposed = false;

  std::int64_t width_in() const { return matrices.size(transposed ? 1 : 2); }
  std::int64_t width_out() const { return matrices.size(transposed ? 2 : 1); }
  std::int64_t size() const { return static_cast<std::int64_t>(matrices.element_size()); }

  Matrix columns(const at::Tensor& x, std::int64_t head, std::int64_t width) const {
    return {static_cast<char*>(x.data_ptr()) + head * width * size(), x.size(0), width, x.stride(0)};
  }
  Matrix factor(std::int64_t item) const {
    const at::Tensor own = matrices.select(0, item / matrices_shared);
    return {own.data_ptr(), own.size(0), own.size(1), own.stride(0)};
  }
  /// body(item), items that share an input or a matrix one after another on one thread.
  template <class Body>
  void each(const Body& body) const {
    const std::int64_t group = std::max(inputs_shared, matrices_shared);
    at::parallel_for(0, items / group, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t item = begin * group; item < end * group; ++item) body(item);
    });
  }

  tensors::HeadShape shape() const { return {items, inputs_shared, matrices_shared, transposed}; }

  at::Tensor forward(const at::Tensor& x) const {
    if (tensors::in_use()) return tensors::head_products(x, matrices, shape());
    at::Tensor y = rows_like(x, items * width_out());
    each([&](std::int64_t item) {
      multiply(columns(x, item / inputs_shared, width_in()), factor(item), Operation{.transpose_b = !transposed},
               x.scalar_type(), static_cast<char*>(y.data_ptr()) + item * width_out() * size(), y.stride(0),
               x.scalar_type());
    });
    return y;
  }
  /// Gradient with respect to x; adds that of the matrices to `dmatrices` if defined.
  at::Tensor backward(const at::Tensor& x, const at::Tensor& dy, const at::Tensor& dmatrices) const {
    if (tensors::in_use()) return tensors::head_products_backward(x, matrices, shape(), dy, dmatrices);
    at::Tensor dx = rows_like(dy, items / inputs_shared * width_in());
    each([&](std::int64_t item) {
      const Matrix d = columns(dy, item, width_out());
      multiply(d, factor(item), Operation{.transpose_b = transposed, .accumulate = item % inputs_shared != 0},
               dy.scalar_type(), static_cast<char*>(dx.data_ptr()) + item / inputs_shared * width_in() * size(),
               dx.stride(0), dy.scalar_type());
      if (!dmatrices.defined()) return;
      const at::Tensor gradient = dmatrices.select(0, item / matrices_shared);
      const Matrix in = columns(x, item / inputs_shared, width_in());
      multiply(transposed ? in : d, transposed ? d : in, Operation{.transpose_a = true, .accumulate = true},
               dy.scalar_type(), gradient.data_ptr(), gradient.stride(0), gradient.scalar_type());
    });
    return dx;
  }
};

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------------------
// The layer

TrainableLayer::TrainableLayer(Loader& loader, std::int64_t layer) : config_(loader.config()) {
  widths_ = model::LayerWidths(config_, layer);
  llama_ = config_.family == Family::llama;
  config_.raw = nullptr;
  if (llama_) {
    load_llama(loader, layer);
  } else {
    load_bloom(loader, layer);
    const at::Tensor slopes = model::alibi_slopes(config_.heads);
    slopes_.assign(slopes.data_ptr<float>(), slopes.data_ptr<float>() + config_.heads);
  }
  config_.layer_shapes.clear();
}

void TrainableLayer::load_llama(Loader& loader, std::int64_t layer) {
  const checkpoint::ModelConfig& c = config_;
  const std::string prefix = fmt::format("model.layers.{}.", layer);
  const std::string attention = prefix + "self_attn.";
  const std::int64_t d = c.head_dim;
  const bool projected = c.layout == KvLayout::projected;
  norm1_ = loader.norm(prefix + "input_layernorm", c.hidden, false, layer);
  q_ = loader.linear(attention + "q_proj", c.heads * d, c.hidden, c.attention_bias, layer);
  k_ = loader.linear(attention + "k_proj", widths_.key_rows, c.hidden, c.attention_bias, layer);
  v_ = loader.linear(attention + "v_proj", widths_.shape.kv_heads * widths_.shape.value_width, c.hidden,
                     c.attention_bias, layer);
  o_ = loader.linear(attention + "o_proj", c.hidden, c.heads * widths_.attended_width, c.attention_bias, layer);
  if (projected) {
    key_fold_.weight =
        loader.weight(attention + "key_fold.weight",
                      {widths_.shape.kv_heads, d, widths_.source_heads / widths_.shape.kv_heads * d}, layer);
    query_fold_.weight = loader.weight(attention + "query_fold.weight", {widths_.source_heads, d, d}, layer);
  }
  if (c.layout == KvLayout::latent) {
    key_up_.weight =
        loader.weight(attention + "key_up.weight", {widths_.source_heads, d, widths_.shape.key_width}, layer);
    if (widths_.shape.value_width > d)
      value_up_.weight =
          loader.weight(attention + "value_up.weight", {widths_.source_heads, d, widths_.shape.value_width}, layer);
  }
  norm2_ = loader.norm(prefix + "post_attention_layernorm", c.hidden, false, layer);
  gate_ = loader.linear(prefix + "mlp.gate_proj", c.ffn, c.hidden, c.mlp_bias, layer);
  up_ = loader.linear(prefix + "mlp.up_proj", c.ffn, c.hidden, c.mlp_bias, layer);
  down_ = loader.linear(prefix + "mlp.down_proj", c.hidden, c.ffn, c.mlp_bias, layer);
}

void TrainableLayer::load_bloom(Loader& loader, std::int64_t layer) {
  const checkpoint::ModelConfig& c = config_;
  const std::string prefix = fmt::format("transformer.h.{}.", layer);
  const std::string attention = prefix + "self_attention.";
  const std::int64_t d = c.head_dim;
  norm1_ = loader.norm(prefix + "input_layernorm", c.hidden, true, layer);
  fused_ = !c.split_qkv;
  if (fused_) {
    q_ = loader.linear(attention + "query_key_value", 3 * c.heads * d, c.hidden, true, layer);
  } else {
    q_ = loader.linear(attention + "query", c.heads * widths_.query_width, c.hidden, true, layer);
    k_ = loader.linear(attention + "key", widths_.shape.kv_heads * widths_.shape.key_width, c.hidden, true, layer);
    v_ = loader.linear(attention + "value", widths_.shape.kv_heads * widths_.shape.value_width, c.hidden, true, layer);
  }
  o_ = loader.linear(attention + "dense", c.hidden, c.heads * widths_.attended_width, true, layer);
  if (c.layout == KvLayout::latent) {
    if (widths_.shape.key_width > d)
      key_up_.weight =
          loader.weight(attention + "key_up.weight", {widths_.source_heads, d, widths_.shape.key_width}, layer);
    if (widths_.shape.value_width > d)
      value_up_.weight =
          loader.weight(attention + "value_up.weight", {widths_.source_heads, d, widths_.shape.value_width}, layer);
  }
  norm2_ = loader.norm(prefix + "post_attention_layernorm", c.hidden, true, layer);
  up_ = loader.linear(prefix + "mlp.dense_h_to_4h", c.ffn, c.hidden, true, layer);
  down_ = loader.linear(prefix + "mlp.dense_4h_to_h", c.hidden, c.ffn, true, layer);
}

std::int64_t TrainableLayer::frozen_bytes() const {
  std::int64_t sum = 0;
  const auto count = [&](const Weight& weight) {
    if (weight.frozen.defined()) sum += static_cast<std::int64_t>(weight.frozen.nbytes());
  };
  for (const Linear* linear : {&q_, &k_, &v_, &o_, &gate_, &up_, &down_}) {
    count(linear->weight);
    count(linear->bias);
  }
  for (const Norm* norm : {&norm1_, &norm2_}) {
    count(norm->weight);
    count(norm->bias);
  }
  for (const Folds* folds : {&key_fold_, &query_fold_, &key_up_, &value_up_}) count(folds->weight);
  return sum;
}

AttentionPlan TrainableLayer::plan_of(const Pass& pass) const {
  AttentionPlan plan;
  plan.batch = pass.batch;
  plan.tokens = pass.tokens;
  plan.heads = config_.heads;
  // Rebuilt keys stand once per source head, all others as they are cached.
  plan.key_readers = config_.heads / (key_up_.defined() && llama_ ? widths_.source_heads : widths_.shape.kv_heads);
  plan.value_readers = config_.heads / widths_.shape.kv_heads;
  plan.scale = 1.0 / std::sqrt(static_cast<double>(config_.head_dim));
  plan.slopes = slopes_;
  plan.segment_begin = pass.segment_begin;
  return plan;
}

/// [rows, heads * width] as [rows, heads, width].
at::Tensor TrainableLayer::heads_of(const at::Tensor& x, std::int64_t width) const {
  return x.view({x.size(0), x.size(1) / width, width});
}

namespace {

/// Columns of a fused query_key_value output [rows, heads, 3, d].
at::Tensor fused_part(const at::Tensor& qkv, std::int64_t part, std::int64_t heads, std::int64_t d) {
  return qkv.view({qkv.size(0), heads, 3, d}).select(2, part);
}

}  // namespace

/// From state.normed to state.attended (and rebuilt); what the backward pass does not need is dropped unless `keep`.
void TrainableLayer::attention(const Pass& pass, LayerState& state, bool keep) const {
  const at::Tensor& x = state.normed;
  const std::int64_t d = config_.head_dim;
  const AttentionPlan plan = plan_of(pass);
  at::Tensor queries, keys, values;
  const std::int64_t latent_width = widths_.shape.value_width;
  state.queries = rows_like(x, q_.out);
  project(pass, q_, x, state.queries, false, &state.q);
  if (fused_) {
    queries = fused_part(state.queries, 0, config_.heads, d);
    keys = fused_part(state.queries, 1, config_.heads, d);
    values = fused_part(state.queries, 2, config_.heads, d);
  } else {
    state.keys = rows_like(x, k_.out);
    state.values = rows_like(x, v_.out);
    project(pass, k_, x, state.keys, false, &state.k);
    project(pass, v_, x, state.values, false, &state.v);
    if (llama_) rotate(heads_of(state.queries, d), pass.rotation, false);
    if (key_up_.defined() && llama_) {
      state.latents = state.keys;
      state.keys =
          HeadProducts{pass.value(key_up_.weight), widths_.source_heads, widths_.source_heads / widths_.shape.kv_heads}
              .forward(state.latents);
    }
    if (llama_) rotate(heads_of(state.keys, d), pass.rotation, false);
    queries = heads_of(state.queries, widths_.query_width);
    const bool rebuilt = llama_ && key_up_.defined();
    keys = heads_of(state.keys, rebuilt || query_fold_.defined() ? d : widths_.shape.key_width);
    values = heads_of(state.values, latent_width);
    if (query_fold_.defined()) {
      state.folded_queries =
          HeadProducts{pass.value(query_fold_.weight), config_.heads, 1, config_.heads / widths_.source_heads}.forward(
              state.queries);
      state.folded_keys = HeadProducts{pass.value(key_fold_.weight), widths_.shape.kv_heads}.forward(state.keys);
      queries = heads_of(state.folded_queries, d);
      keys = heads_of(state.folded_keys, d);
    } else if (key_up_.defined() && !llama_) {
      // Without rotation the decoder of keys turns queries into the latents' channels instead.
      state.folded_queries =
          HeadProducts{pass.value(key_up_.weight), config_.heads, 1, config_.heads / widths_.source_heads, true}
              .forward(state.queries);
      queries = heads_of(state.folded_queries, widths_.shape.key_width);
    }
  }
  const std::int64_t value_width = fused_ ? d : latent_width;
  state.attended = rows_like(x, config_.heads * value_width);
  attend(plan, queries, keys, values, heads_of(state.attended, value_width));
  if (value_up_.defined())
    state.rebuilt =
        HeadProducts{pass.value(value_up_.weight), config_.heads, 1, config_.heads / widths_.source_heads}.forward(
            state.attended);
  if (keep) return;
  for (at::Tensor* each :
       {&state.queries, &state.keys, &state.values, &state.latents, &state.folded_queries, &state.folded_keys})
    each->reset();
}

at::Tensor TrainableLayer::forward(const Pass& pass, const at::Tensor& hidden, LayerState* kept) const {
  LayerState own;
  LayerState& state = kept != nullptr ? *kept : own;
  const bool keep = kept != nullptr;
  const double eps = config_.norm_eps;
  state.input = hidden;
  state.normed =
      normalise(hidden, pass.value(norm1_.weight), norm1_.bias.defined() ? pass.value(norm1_.bias) : at::Tensor(), eps);
  attention(pass, state, keep);
  state.middle = config_.post_layernorm_residual ? state.normed.clone() : hidden.clone();
  project(pass, o_, value_up_.defined() ? state.rebuilt : state.attended, state.middle, true, &state.o);
  if (!keep) {
    state.input.reset();
    state.normed.reset();
    state.attended.reset();
    state.rebuilt.reset();
  }
  state.normed2 = normalise(state.middle, pass.value(norm2_.weight),
                            norm2_.bias.defined() ? pass.value(norm2_.bias) : at::Tensor(), eps);
  at::Tensor out =
      config_.post_layernorm_residual ? state.normed2.clone() : (keep ? state.middle.clone() : state.middle);
  state.up = rows_like(hidden, config_.ffn);
  project(pass, up_, state.normed2, state.up, false, &state.up_low);
  at::Tensor inner;
  if (llama_) {
    state.gate = rows_like(hidden, config_.ffn);
    project(pass, gate_, state.normed2, state.gate, false, &state.gate_low);
    inner = silu_times(state.gate, state.up);
  } else {
    inner = gelu_of(state.up);
  }
  project(pass, down_, inner, out, true, &state.down_low);
  if (keep) {
    // Made again where a gradient needs them.
    if (!up_.trains() && !gate_.trains()) state.normed2.reset();
    if (!fused_ && !q_.trains() && !k_.trains() && !v_.trains()) state.normed.reset();
    if (fused_ && !q_.trains()) state.normed.reset();
  }
  return out;
}

/// Gradient with respect to normed2.
at::Tensor TrainableLayer::feed_forward_backward(const Pass& pass, LayerState& state, const at::Tensor& dout) const {
  at::Tensor inner;
  if (down_.trains()) inner = llama_ ? silu_times(state.gate, state.up) : gelu_of(state.up);
  const at::Tensor dinner = rows_like(dout, config_.ffn);
  project_backward(pass, down_, state.down_low, inner, dout, dinner, true);
  inner.reset();
  at::Tensor dx = rows_like(dout, config_.hidden);
  if (llama_) {
    silu_times_backward(state.gate, state.up, dinner);
    project_backward(pass, gate_, state.gate_low, state.normed2, state.gate, dx, true);
    project_backward(pass, up_, state.up_low, state.normed2, state.up, dx, false);
  } else {
    gelu_gradient(state.up, dinner);
    project_backward(pass, up_, state.up_low, state.normed2, state.up, dx, true);
  }
  state.gate.reset();
  state.up.reset();
  return dx;
}

/// Gradient with respect to normed, undefined unless wanted.
at::Tensor TrainableLayer::attention_backward(const Pass& pass, LayerState& state, const at::Tensor& dattended,
                                              bool wants_input) const {
  const std::int64_t d = config_.head_dim;
  const AttentionPlan plan = plan_of(pass);
  const std::int64_t repeat = config_.heads / widths_.source_heads;
  const std::int64_t value_width = fused_ ? d : widths_.shape.value_width;
  at::Tensor dheads = dattended;
  if (value_up_.defined())
    dheads = HeadProducts{pass.value(value_up_.weight), config_.heads, 1, repeat}.backward(
        state.attended, dattended, pass.gradient(value_up_.weight));
  const auto input_gradient = [&] { return wants_input ? rows_like(dattended, config_.hidden) : at::Tensor(); };
  if (fused_) {
    const at::Tensor dqueries = rows_like(dattended, q_.out);
    const auto part = [&](const at::Tensor& x, std::int64_t i) { return fused_part(x, i, config_.heads, d); };
    attend_backward(plan, part(state.queries, 0), part(state.queries, 1), part(state.queries, 2), heads_of(dheads, d),
                    part(dqueries, 0), part(dqueries, 1), part(dqueries, 2));
    at::Tensor dx = input_gradient();
    project_backward(pass, q_, state.q, state.normed, dqueries, dx, true);
    return dx;
  }
  const bool folds = query_fold_.defined();
  const bool rebuilds = key_up_.defined() && llama_;
  const bool turns = key_up_.defined() && !llama_;
  const std::int64_t key_width = rebuilds || folds ? d : widths_.shape.key_width;
  const at::Tensor& queries = folds || turns ? state.folded_queries : state.queries;
  const at::Tensor& keys = folds ? state.folded_keys : state.keys;
  at::Tensor dq = at::empty_like(queries);
  at::Tensor dk = at::empty_like(keys);
  const at::Tensor dv = at::empty_like(state.values);
  const std::int64_t score_width = turns ? widths_.shape.key_width : (folds ? d : widths_.query_width);
  attend_backward(plan, heads_of(queries, score_width), heads_of(keys, key_width), heads_of(state.values, value_width),
                  heads_of(dheads, value_width), heads_of(dq, score_width), heads_of(dk, key_width),
                  heads_of(dv, value_width));
  if (folds) {
    dq = HeadProducts{pass.value(query_fold_.weight), config_.heads, 1, repeat}.backward(
        state.queries, dq, pass.gradient(query_fold_.weight));
    dk = HeadProducts{pass.value(key_fold_.weight), widths_.shape.kv_heads}.backward(state.keys, dk,
                                                                                     pass.gradient(key_fold_.weight));
  } else if (turns) {
    dq = HeadProducts{pass.value(key_up_.weight), config_.heads, 1, repeat, true}.backward(
        state.queries, dq, pass.gradient(key_up_.weight));
  }
  if (llama_) {
    rotate(heads_of(dq, d), pass.rotation, true);
    rotate(heads_of(dk, d), pass.rotation, true);
  }
  if (rebuilds)
    dk = HeadProducts{pass.value(key_up_.weight), widths_.source_heads, widths_.source_heads / widths_.shape.kv_heads}
             .backward(state.latents, dk, pass.gradient(key_up_.weight));
  at::Tensor dx = input_gradient();
  project_backward(pass, q_, state.q, state.normed, dq, dx, true);
  project_backward(pass, k_, state.k, state.normed, dk, dx, false);
  project_backward(pass, v_, state.v, state.normed, dv, dx, false);
  return dx;
}

at::Tensor TrainableLayer::backward(const Pass& pass, LayerState& state, at::Tensor dout, bool wants_input) const {
  const double eps = config_.norm_eps;
  const auto back = [&](const Norm& norm, const at::Tensor& x, const at::Tensor& dy, const at::Tensor& dx) {
    normalise_backward(x, pass.value(norm.weight), norm.bias.defined() ? pass.value(norm.bias) : at::Tensor(), eps, dy,
                       dx, pass.gradient(norm.weight), pass.gradient(norm.bias));
  };
  at::Tensor dnormed2 = feed_forward_backward(pass, state, dout);
  // dmiddle: past the residual, or (BLOOM's variant, whose residual starts after the norm) only through it.
  at::Tensor dmiddle;
  if (config_.post_layernorm_residual) {
    dnormed2.add_(dout);
    dmiddle = at::zeros_like(dout);
  } else {
    dmiddle = dout;
  }
  back(norm2_, state.middle, dnormed2, dmiddle);
  dnormed2.reset();
  dout.reset();
  const at::Tensor& attended = value_up_.defined() ? state.rebuilt : state.attended;
  const at::Tensor dattended = rows_like(dmiddle, o_.in);
  project_backward(pass, o_, state.o, attended, dmiddle, dattended, true);
  // A trained norm needs the gradient of what it gives even where nobody needs that of the layer's input.
  const bool through = wants_input || norm1_.weight.parameter >= 0;
  at::Tensor dnormed = attention_backward(pass, state, dattended, through);
  if (!through) return {};
  at::Tensor dinput;
  if (config_.post_layernorm_residual) {
    dnormed.add_(dmiddle);
    dinput = at::zeros_like(dmiddle);
  } else {
    dinput = dmiddle;
  }
  back(norm1_, state.input, dnormed, dinput);
  return dinput;
}

}  // namespace headfold::finetune
