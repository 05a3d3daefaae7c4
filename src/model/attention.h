#pragma once
// Private: rotary tables and causal attention over head-major or cached keys and values.

#include <ATen/ATen.h>
#include <headfold/model/model.h>

#include <memory>

namespace headfold::model {

/// cos and sin of every position and frequency, cast to a compute dtype and held as float, [positions, head_dim / 2]
/// each.
struct RopeTable {
  at::Tensor cosine, sine;
  std::int64_t half = 0;
};
/// The table for at least `positions` positions; made once per (frequencies, dtype) and grown by doubling. Safe for
/// many threads.
std::shared_ptr<const RopeTable> rope_table(const at::Tensor& inverse_frequencies, at::ScalarType dtype,
                                            std::int64_t positions);

/// Elements [head, token, channel] of keys or values of one sequence; channels are contiguous.
struct Heads {
  void* data = nullptr;
  std::int64_t head_stride = 0;
  std::int64_t token_stride = 0;
};

/// One sequence's attention.
struct Attention {
  at::ScalarType dtype = at::kFloat;
  std::int64_t heads = 0, kv_heads = 0, head_dim = 0;
  std::int64_t tokens = 0;  ///< query tokens, at positions start .. start + tokens - 1
  std::int64_t start = 0;   ///< keys 0 .. start + tokens - 1 exist
  Heads queries, keys, values;
  void* output = nullptr;  ///< [tokens, heads * head_dim], row stride output_stride
  std::int64_t output_stride = 0;
  const float* slopes = nullptr;  ///< ALiBi, [heads], or none
};

/// output = softmax(q k^T / sqrt(head_dim) + ALiBi, causal) v, softmax in float32. Query head h reads KV head h /
/// (heads / kv_heads). Works through blocks of query rows against the keys up to the block's end; scores of all threads
/// together stay below attention_block_bytes() (at least one row per thread).
void attend(const Attention& attention);

}  // namespace headfold::model
