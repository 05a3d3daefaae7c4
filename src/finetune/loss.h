#pragma once
// Private: cross entropy and divergence from a teacher over rows of logits, and their gradient in place.

#include <headfold/finetune/trainable.h>

namespace headfold::finetune {

/// What a teacher says about the rows at hand: logits [rows, vocab], or log-probabilities and tokens [rows, k]
/// (float64, int64); all undefined without a teacher. Contiguous.
struct TeacherRows {
  at::Tensor logits;
  at::Tensor top_log_probs, top_tokens;
};

/// Logits [rows, vocab] (float32 or float64) and the token each row must predict [rows]. With `gradient` the logits
/// become `scale` times the gradient of the rows' loss. Sums are made row by row in order.
LossSums loss_of_rows(const at::Tensor& logits, const at::Tensor& targets, const TeacherRows& teacher,
                      const LossOptions& options, double scale, bool gradient);

/// Rows of logits that are held at a time: 64 MiB of them, at least 16 rows.
std::int64_t logit_chunk_rows(std::int64_t vocab, at::ScalarType compute, std::int64_t rows);

}  // namespace headfold::finetune
