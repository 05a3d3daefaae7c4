#pragma once
// Private: causal attention inside segments, forward and backward, in bounded memory: probabilities are formed block by
// block of query rows, and again in the backward pass.

#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

namespace headfold::finetune {

struct AttentionPlan {
  std::int64_t batch = 0, tokens = 0;
  std::int64_t heads = 0;          ///< query heads
  std::int64_t key_readers = 1;    ///< query heads that share a key head
  std::int64_t value_readers = 1;  ///< query heads that share a value head, a multiple of key_readers
  double scale = 1;
  std::vector<float> slopes;                ///< ALiBi, of every query head; empty: none
  std::vector<std::int64_t> segment_begin;  ///< [batch * tokens]: first token of the row's segment, within its sequence
};

/// queries [batch * tokens, heads, width], keys [.., heads / key_readers, width], values [.., heads / value_readers,
/// value_width] (contiguous channels) -> output, same as queries with value_width channels. Scores need at most
/// model::attention_block_bytes() over all threads.
void attend(const AttentionPlan& plan, const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values,
            const at::Tensor& output);
/// Gradients, given that of the output; dqueries, dkeys and dvalues are overwritten.
void attend_backward(const AttentionPlan& plan, const at::Tensor& queries, const at::Tensor& keys,
                     const at::Tensor& values, const at::Tensor& doutput, const at::Tensor& dqueries,
                     const at::Tensor& dkeys, const at::Tensor& dvalues);

}  // namespace headfold::finetune
