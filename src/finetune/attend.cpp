#include "attend.h"

#include <ATen/Parallel.h>
#include <headfold/base/error.h>
#include <headfold/model/model.h>
#include <headfold/model/product.h>

#include "elementwise.h"
#include "tensors.h"

namespace headfold::finetune {
namespace {

using model::Matrix;
using model::multiply;
using model::Operation;

/// float32 for float32 and bfloat16, float64 for itself: what scores and sums are held in.
at::ScalarType wide(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

std::int64_t size_of(at::ScalarType dtype) {
  return static_cast<std::int64_t>(c10::elementSize(dtype));
}

void require_channels(const at::Tensor& x, std::int64_t rows, std::int64_t heads) {
  if (x.dim() != 3 || x.size(0) != rows || x.size(1) != heads || x.stride(2) != 1)
    throw InternalError(
        fmt::format("attention over [{}], expected [{}, {}, channels]", fmt::join(x.sizes(), ", "), rows, heads));
}

char* at_head(const at::Tensor& x, std::int64_t row, std::int64_t head) {
  return static_cast<char*>(x.data_ptr()) + (row * x.stride(0) + head * x.stride(1)) * size_of(x.scalar_type());
}

/// Rows [first, first + count) of a head of a sequence as an operand where they stand.
Matrix rows_of(const at::Tensor& x, std::int64_t first, std::int64_t count, std::int64_t head) {
  return {at_head(x, first, head), count, x.size(2), x.stride(0)};
}

/// Memory of this thread that grows as needed and stays.
class Buffer {
 public:
  char* get(std::int64_t bytes) {
    if (static_cast<std::int64_t>(bytes_.size()) < bytes) {
      bytes_.clear();
      bytes_.shrink_to_fit();
      bytes_.resize(static_cast<std::size_t>(bytes));
    }
    return bytes_.data();
  }

 private:
  std::vector<char> bytes_;
};

/// A head of a sequence copied densely: products of many blocks read it.
Matrix dense(const at::Tensor& x, std::int64_t first, std::int64_t count, std::int64_t head, Buffer& buffer) {
  const std::int64_t width = x.size(2);
  if (x.stride(0) == width) return rows_of(x, first, count, head);
  const std::int64_t bytes = width * size_of(x.scalar_type());
  char* to = buffer.get(count * bytes);
  for (std::int64_t row = 0; row < count; ++row)
    std::memcpy(to + row * bytes, at_head(x, first + row, head), static_cast<std::size_t>(bytes));
  return {to, count, width, width};
}

Matrix part(const Matrix& whole, std::int64_t first, std::int64_t count, std::int64_t size) {
  return {static_cast<const char*>(whole.data) + first * whole.stride * size, count, whole.columns, whole.stride};
}

/// Query rows that are worked on together: enough for the products, few enough that their scores stay in the core's
/// cache and that little is computed beyond the diagonal.
std::int64_t block_rows(const AttentionPlan& plan, at::ScalarType dtype, std::int64_t score_buffers) {
  const std::int64_t row_bytes =
      plan.tokens * (score_buffers * size_of(wide(dtype)) + (dtype == at::kBFloat16 ? 2 * size_of(dtype) : 0));
  const std::int64_t by_cache = std::clamp<std::int64_t>((std::int64_t{1} << 20) / row_bytes, 32, 128);
  const std::int64_t by_limit = model::attention_block_bytes() / (row_bytes * at::get_num_threads());
  return std::clamp<std::int64_t>(std::min(by_cache, by_limit), 1, plan.tokens);
}

/// The keys that rows [first, first + count) of a sequence see together.
struct Window {
  std::int64_t begin = 0;
  std::int64_t end = 0;
};
Window window_of(const AttentionPlan& plan, std::int64_t sequence, std::int64_t first, std::int64_t count) {
  return {plan.segment_begin[static_cast<std::size_t>(sequence * plan.tokens + first)], first + count};
}

/// scores (wide type) [count, window] -> probabilities of type `dtype`, zero outside each row's segment and beyond the
/// diagonal.
void probabilities_of(const AttentionPlan& plan, at::ScalarType dtype, std::int64_t sequence, std::int64_t head,
                      std::int64_t first, std::int64_t count, const Window& window, char* scores, char* probabilities) {
  const std::int64_t columns = window.end - window.begin;
  const std::int64_t score_size = size_of(wide(dtype));
  const std::int64_t size = size_of(dtype);
  const double slope = plan.slopes.empty() ? 0 : plan.slopes[static_cast<std::size_t>(head)];
  for (std::int64_t row = 0; row < count; ++row) {
    const std::int64_t begin =
        plan.segment_begin[static_cast<std::size_t>(sequence * plan.tokens + first + row)] - window.begin;
    const std::int64_t visible = first + row + 1 - window.begin - begin;
    char* own = probabilities + row * columns * size;
    softmax_row(dtype, scores + (row * columns + begin) * score_size, own + begin * size, visible, plan.scale, slope);
    std::memset(own, 0, static_cast<std::size_t>(begin * size));
    std::memset(own + (begin + visible) * size, 0, static_cast<std::size_t>((columns - begin - visible) * size));
  }
}

}  // namespace

void attend(const AttentionPlan& plan, const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values,
            const at::Tensor& output) {
  const at::ScalarType dtype = queries.scalar_type();
  const at::ScalarType score_type = wide(dtype);
  const std::int64_t size = size_of(dtype);
  const std::int64_t rows_all = plan.batch * plan.tokens;
  require_channels(queries, rows_all, plan.heads);
  require_channels(keys, rows_all, plan.heads / plan.key_readers);
  require_channels(values, rows_all, plan.heads / plan.value_readers);
  require_channels(output, rows_all, plan.heads);
  if (tensors::in_use()) {
    tensors::attend(plan, queries, keys, values, output);
    return;
  }
  const std::int64_t rows = block_rows(plan, dtype, 1);
  at::parallel_for(0, plan.batch * plan.heads, 1, [&](std::int64_t begin, std::int64_t end) {
    thread_local Buffer key_buffer, value_buffer, score_buffer, probability_buffer;
    char* scores = score_buffer.get(rows * plan.tokens * size_of(score_type));
    char* probabilities = dtype == score_type ? scores : probability_buffer.get(rows * plan.tokens * size);
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t sequence = task / plan.heads;
      const std::int64_t head = task % plan.heads;
      const std::int64_t origin = sequence * plan.tokens;
      const Matrix k = dense(keys, origin, plan.tokens, head / plan.key_readers, key_buffer);
      const Matrix v = dense(values, origin, plan.tokens, head / plan.value_readers, value_buffer);
      for (std::int64_t first = 0; first < plan.tokens; first += rows) {
        const std::int64_t count = std::min(rows, plan.tokens - first);
        const Window window = window_of(plan, sequence, first, count);
        const std::int64_t columns = window.end - window.begin;
        multiply(rows_of(queries, origin + first, count, head), part(k, window.begin, columns, size),
                 Operation{.transpose_b = true}, dtype, scores, columns, score_type);
        probabilities_of(plan, dtype, sequence, head, first, count, window, scores, probabilities);
        multiply({probabilities, count, columns, columns}, part(v, window.begin, columns, size), Operation{}, dtype,
                 at_head(output, origin + first, head), output.stride(0), dtype);
      }
    }
  });
}

void attend_backward(const AttentionPlan& plan, const at::Tensor& queries, const at::Tensor& keys,
                     const at::Tensor& values, const at::Tensor& doutput, const at::Tensor& dqueries,
                     const at::Tensor& dkeys, const at::Tensor& dvalues) {
  const at::ScalarType dtype = queries.scalar_type();
  const at::ScalarType sum_type = wide(dtype);
  const std::int64_t size = size_of(dtype);
  const std::int64_t sum_size = size_of(sum_type);
  const std::int64_t rows_all = plan.batch * plan.tokens;
  const std::int64_t value_heads = plan.heads / plan.value_readers;
  require_channels(doutput, rows_all, plan.heads);
  require_channels(dqueries, rows_all, plan.heads);
  if (tensors::in_use()) {
    tensors::attend_backward(plan, queries, keys, values, doutput, dqueries, dkeys, dvalues);
    return;
  }
  const std::int64_t rows = block_rows(plan, dtype, 2);

  // A task holds the query heads of one value head, so that it alone adds to that head's gradients. Where these tasks
  // are fewer than threads, query heads are spread further and their sums added afterwards.
  const std::int64_t groups = plan.batch * value_heads;
  std::int64_t split = 1;
  while (groups * split < at::get_num_threads() && plan.value_readers % (split * 2) == 0) split *= 2;
  const std::int64_t readers = plan.value_readers / split;
  const at::Tensor key_sums = at::zeros({split, rows_all, keys.size(1), keys.size(2)}, sum_type);
  const at::Tensor value_sums = at::zeros({split, rows_all, values.size(1), values.size(2)}, sum_type);

  at::parallel_for(0, groups * split, 1, [&](std::int64_t begin, std::int64_t end) {
    thread_local Buffer key_buffer, value_buffer, score_buffer, gradient_buffer, probability_buffer, narrow_buffer;
    char* scores = score_buffer.get(rows * plan.tokens * sum_size);
    char* dprobabilities = gradient_buffer.get(rows * plan.tokens * sum_size);
    const bool narrow = dtype != sum_type;
    char* probabilities = narrow ? probability_buffer.get(rows * plan.tokens * size) : scores;
    char* dscores = narrow ? narrow_buffer.get(rows * plan.tokens * size) : dprobabilities;
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t sequence = task / (value_heads * split);
      const std::int64_t value_head = task / split % value_heads;
      const std::int64_t turn = task % split;
      const std::int64_t origin = sequence * plan.tokens;
      const Matrix v = dense(values, origin, plan.tokens, value_head, value_buffer);
      const at::Tensor dvalue = value_sums.select(0, turn);
      const at::Tensor dkey = key_sums.select(0, turn);
      std::int64_t held = -1;
      Matrix k;
      for (std::int64_t own = 0; own < readers; ++own) {
        const std::int64_t head = value_head * plan.value_readers + turn * readers + own;
        const std::int64_t key_head = head / plan.key_readers;
        if (key_head != held) k = dense(keys, origin, plan.tokens, key_head, key_buffer);
        held = key_head;
        for (std::int64_t first = 0; first < plan.tokens; first += rows) {
          const std::int64_t count = std::min(rows, plan.tokens - first);
          const Window window = window_of(plan, sequence, first, count);
          const std::int64_t columns = window.end - window.begin;
          const Matrix q = rows_of(queries, origin + first, count, head);
          const Matrix d = rows_of(doutput, origin + first, count, head);
          const Matrix seen_keys = part(k, window.begin, columns, size);
          multiply(q, seen_keys, Operation{.transpose_b = true}, dtype, scores, columns, sum_type);
          probabilities_of(plan, dtype, sequence, head, first, count, window, scores, probabilities);
          const Matrix p{probabilities, count, columns, columns};
          multiply(p, d, Operation{.transpose_a = true, .accumulate = true}, dtype,
                   at_head(dvalue, origin + window.begin, value_head), dvalue.stride(0), sum_type);
          multiply(d, part(v, window.begin, columns, size), Operation{.transpose_b = true}, dtype, dprobabilities,
                   columns, sum_type);
          // Masked entries have probability 0 and so get gradient 0.
          for (std::int64_t row = 0; row < count; ++row)
            softmax_row_backward(dtype, probabilities + row * columns * size, dprobabilities + row * columns * sum_size,
                                 dscores + row * columns * size, columns, plan.scale);
          const Matrix ds{dscores, count, columns, columns};
          multiply(ds, seen_keys, Operation{}, dtype, at_head(dqueries, origin + first, head), dqueries.stride(0),
                   dtype);
          multiply(ds, q, Operation{.transpose_a = true, .accumulate = true}, dtype,
                   at_head(dkey, origin + window.begin, key_head), dkey.stride(0), sum_type);
        }
      }
    }
  });
  const auto total = [&](const at::Tensor& sums, const at::Tensor& to) {
    const at::Tensor& result = to;
    result.copy_(split == 1 ? sums.select(0, 0) : sums.sum(0));
  };
  total(key_sums, dkeys);
  total(value_sums, dvalues);
}

}  // namespace headfold::finetune
