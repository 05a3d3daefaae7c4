#pragma once
// Private: one decoder layer, forward and backward written out, with low-rank adapters or all of its weights trained.

#include <ATen/ATen.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/checkpoint/reader.h>
#include <headfold/finetune/trainable.h>
#include <headfold/model/source.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "attend.h"
#include "elementwise.h"

namespace headfold::finetune {

/// float32; float64 in float64 models.
at::ScalarType parameter_type(at::ScalarType compute);

/// A weight: frozen in the compute dtype (a view of the mapped file where that is its stored dtype), or a parameter.
struct Weight {
  at::Tensor frozen;
  std::ptrdiff_t parameter = -1;
  bool defined() const { return frozen.defined() || parameter >= 0; }
};

/// A projection [out, in] with optional bias and optional adapter B [out, r] A [r, in].
struct Linear {
  std::string module;  ///< checkpoint name without ".weight"
  Weight weight, bias;
  std::ptrdiff_t a = -1, b = -1;  ///< parameters of the adapter
  std::uint64_t number = 0;       ///< tells the dropout masks of projections apart
  std::int64_t out = 0, in = 0;
  bool trains() const { return a >= 0 || weight.parameter >= 0; }
};

struct Norm {
  Weight weight, bias;
};

/// Small matrices of a layout, one per head or group: [count, out, in].
struct Folds {
  Weight weight;
  bool defined() const { return weight.defined(); }
};

/// Collects parameters and reads weights while a model is built.
class Loader {
 public:
  Loader(const checkpoint::Reader& reader, const LoraOptions& options, at::ScalarType dtype,
         std::vector<Parameter>& parameters);
  Weight weight(const std::string& name, const std::vector<std::int64_t>& shape, std::int64_t layer);
  Linear linear(const std::string& module, std::int64_t out, std::int64_t in, bool bias, std::int64_t layer);
  Norm norm(const std::string& module, std::int64_t width, bool bias, std::int64_t layer);
  const checkpoint::ModelConfig& config() const { return reader_.config(); }
  at::ScalarType dtype() const { return dtype_; }

 private:
  std::ptrdiff_t add(const std::string& name, std::int64_t layer, const at::Tensor& value);
  const checkpoint::Reader& reader_;
  const LoraOptions& options_;
  at::ScalarType dtype_;
  std::vector<Parameter>& parameters_;
  std::vector<std::string> modules_;  // last names that get an adapter
  std::uint64_t projections_ = 0;
};

/// What all layers need to know about one batch.
struct Pass {
  std::vector<Parameter>* parameters = nullptr;
  at::ScalarType dtype = at::kFloat;
  double lora_scale = 1;
  double dropout = 0;  ///< 0 when evaluating
  std::uint64_t dropout_seed = 0;
  std::int64_t batch = 0, tokens = 0;
  std::vector<std::int64_t> numbers;        ///< of every sequence
  std::vector<std::int64_t> segment_begin;  ///< see AttentionPlan
  Rotation rotation;                        ///< undefined tensors for ALiBi
  /// Engine `tensors`: values in the compute dtype, made when first asked for, and the gradients of parameters that
  /// live on the host (all weights trained; adapters live on the device).
  struct OnDevice {
    std::vector<at::Tensor> values, gradients;
  };
  std::shared_ptr<OnDevice> on_device;

  /// In the compute dtype.
  at::Tensor value(const Weight& weight) const;
  at::Tensor value(std::ptrdiff_t parameter) const;
  /// Where to add a gradient; undefined when frozen.
  at::Tensor gradient(const Weight& weight) const;
  at::Tensor gradient(std::ptrdiff_t parameter) const;
  /// Adds the gradients of a layer's parameters that live on the host and wait on the device to Parameter::gradient.
  void hand_over(std::int64_t layer) const;
  DropoutMask mask(const Linear& linear) const;
};

/// Activations of one projection that its backward pass needs besides its input.
struct LinearState {
  at::Tensor low;  ///< scale * drop(x) A^T [rows, r]
};

/// y = x W^T + bias + scale * drop(x) A^T B^T for x [rows, in], or y += that.
void project(const Pass& pass, const Linear& linear, const at::Tensor& x, const at::Tensor& y, bool accumulate,
             LinearState* state);
/// Adds weight gradients; where dx is defined, dx += (or with `overwrite` =) the gradient with respect to x. `x` may be
/// undefined when nothing of the projection trains.
void project_backward(const Pass& pass, const Linear& linear, const LinearState& state, const at::Tensor& x,
                      const at::Tensor& dy, const at::Tensor& dx, bool overwrite);

/// What a layer keeps between its forward and its backward pass; all [batch * tokens, ..] in the compute dtype.
struct LayerState {
  at::Tensor input, normed, queries, keys, values;  ///< queries and keys rotated, before folds
  at::Tensor latents;                               ///< keys as cached, where they are rebuilt
  at::Tensor folded_queries, folded_keys;           ///< as they enter the scores, where these differ
  at::Tensor attended, rebuilt;                     ///< rebuilt: values decoded after attention (value_up)
  at::Tensor middle, normed2, gate, up;
  LinearState q, k, v, o, gate_low, up_low, down_low;
};

class TrainableLayer {
 public:
  TrainableLayer(Loader& loader, std::int64_t layer);
  /// hidden [batch * tokens, hidden] -> same shape. Fills `state` unless null.
  at::Tensor forward(const Pass& pass, const at::Tensor& hidden, LayerState* state) const;
  /// Adds the gradients of the layer's parameters; gives the gradient with respect to hidden, or an undefined tensor
  /// unless `wants_input`. Consumes `state` and `dout`.
  at::Tensor backward(const Pass& pass, LayerState& state, at::Tensor dout, bool wants_input) const;
  /// Frozen weights.
  std::int64_t frozen_bytes() const;

 private:
  AttentionPlan plan_of(const Pass& pass) const;
  void load_llama(Loader& loader, std::int64_t layer);
  void load_bloom(Loader& loader, std::int64_t layer);
  void attention(const Pass& pass, LayerState& state, bool keep) const;
  at::Tensor attention_backward(const Pass& pass, LayerState& state, const at::Tensor& dattended,
                                bool wants_input) const;
  at::Tensor feed_forward_backward(const Pass& pass, LayerState& state, const at::Tensor& dout) const;
  at::Tensor heads_of(const at::Tensor& x, std::int64_t width) const;

  checkpoint::ModelConfig config_;
  model::LayerWidths widths_;
  bool llama_ = true, fused_ = false;
  Norm norm1_, norm2_;
  Linear q_, k_, v_, o_;     // fused BLOOM: q_ is query_key_value
  Linear gate_, up_, down_;  // BLOOM: up_ and down_ are dense_h_to_4h and dense_4h_to_h
  Folds key_fold_, query_fold_, key_up_, value_up_;
  std::vector<float> slopes_;
};

}  // namespace headfold::finetune
