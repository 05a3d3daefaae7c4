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

/// One sequence's attention for query heads head_begin .. head_end.
struct Attention {
  at::ScalarType dtype = at::kFloat;
  std::int64_t head_begin = 0, head_end = 0;
  std::int64_t key_readers = 1;    ///< query heads that share a key head: head h reads key head h / key_readers
  std::int64_t value_readers = 1;  ///< query heads that share a value head
  std::int64_t key_width = 0;      ///< channels of queries and keys
  std::int64_t value_width = 0;
  float scale = 1;          ///< of the scores
  std::int64_t tokens = 0;  ///< query tokens, at positions start .. start + tokens - 1
  std::int64_t start = 0;   ///< keys 0 .. start + tokens - 1 exist
  Heads queries;            ///< [0] is head head_begin
  Heads keys;               ///< [0] is the key head of head_begin
  Heads values;             ///< [0] is the value head of head_begin
  void* output = nullptr;   ///< [tokens, (head_end - head_begin) * value_width], row stride output_stride
  std::int64_t output_stride = 0;
  const float* slopes = nullptr;  ///< ALiBi, of all query heads, or none
};

/// output = softmax(scale q k^T + ALiBi, causal) v, softmax in float32. Works through blocks of query rows against the
/// keys up to the block's end; scores of all threads together stay below attention_block_bytes() (at least one row per
/// thread).
void attend(const Attention& attention);

}  // namespace headfold::model
