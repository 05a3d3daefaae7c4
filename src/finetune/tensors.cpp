#include "tensors.h"

#include <headfold/base/error.h>
#include <headfold/model/compute.h>
#include <headfold/model/kernels.h>
#include <headfold/model/model.h>
#include <headfold/model/tensor_layer.h>
#include <headfold/model/tensor_math.h>

#ifdef HEADFOLD_TORCH_FUSED_ATTENTION
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>
#endif

namespace headfold::finetune::tensors {
namespace {

using model::narrow_matmul;
using model::wide_matmul;
using model::wide_type;

at::Tensor wide(const at::Tensor& x) {
  return x.to(wide_type(x.scalar_type()));
}

at::Tensor long_tensor(const std::vector<std::int64_t>& values, at::Device device) {
  return at::tensor(values, at::kLong).to(device);
}

/// Items [n, rows, width] of columns [rows, n * width].
at::Tensor items_of(const at::Tensor& x, std::int64_t width) {
  return x.reshape({x.size(0), x.size(1) / width, width}).transpose(0, 1);
}
at::Tensor columns_of(const at::Tensor& items) {
  return items.transpose(0, 1).reshape({items.size(1), items.size(0) * items.size(2)});
}
/// Every item `times` times, one after the other.
at::Tensor repeated(const at::Tensor& items, std::int64_t times) {
  return times == 1 ? items : items.repeat_interleave(times, 0);
}
/// Sums of `times` neighbours.
at::Tensor summed(const at::Tensor& items, std::int64_t times) {
  return times == 1 ? items : items.reshape({items.size(0) / times, times, items.size(1), items.size(2)}).sum(1);
}

}  // namespace

bool in_use() {
  return model::compute().engine == model::Engine::tensors;
}

void product(const at::Tensor& a, const at::Tensor& b, const model::Operation& operation, const at::Tensor& c) {
  const at::Tensor left = operation.transpose_a ? a.t() : a;
  const at::Tensor right = operation.transpose_b ? b.t() : b;
  at::Tensor result = c;
  if (c.scalar_type() != a.scalar_type()) {
    const at::Tensor sum = wide_matmul(left, right);
    operation.accumulate ? result.add_(sum) : result.copy_(sum);
  } else if (a.is_cuda() || a.scalar_type() != at::kBFloat16) {
    if (operation.accumulate)
      at::addmm_out(result, c, left, right);
    else
      at::mm_out(result, left, right);
  } else {
    const at::Tensor sum = wide_matmul(left, right);
    operation.accumulate ? result.copy_(sum + wide(c)) : result.copy_(sum);
  }
}

at::Tensor normalise(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps) {
  return model::normalise_tensor(x, weight, bias, eps);
}

void normalise_backward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps,
                        const at::Tensor& dy, const at::Tensor& dx, const at::Tensor& dweight,
                        const at::Tensor& dbias) {
  at::Tensor centred = wide(x);
  if (bias.defined()) centred = centred - centred.mean(-1, true);
  const at::Tensor factor = at::rsqrt(centred.square().mean(-1, true) + eps);
  const at::Tensor outer = wide(dy);
  const at::Tensor g = outer * wide(weight);
  at::Tensor inner = g - centred * ((centred * g).mean(-1, true) * factor.square());
  if (bias.defined()) inner = inner - g.mean(-1, true);
  dx.copy_(wide(dx) + inner * factor);
  if (dweight.defined()) dweight.add_((outer * centred * factor).sum(0));
  if (dbias.defined()) dbias.add_(outer.sum(0));
}

void rotate(const at::Tensor& x, const Rotation& rotation, bool inverse) {
  const std::int64_t half = x.size(2) / 2;
  const at::Tensor rows = long_tensor(rotation.positions, x.device());
  const at::Tensor cosine = rotation.cosine.to(x.device()).index_select(0, rows).unsqueeze(1);
  at::Tensor sine = rotation.sine.to(x.device()).index_select(0, rows).unsqueeze(1);
  if (inverse) sine = sine.neg();
  const at::Tensor a = wide(x.slice(2, 0, half)), b = wide(x.slice(2, half));
  x.copy_(at::cat({a * cosine - b * sine, b * cosine + a * sine}, 2));
}

at::Tensor silu_times(const at::Tensor& gate, const at::Tensor& up) {
  return at::silu(wide(gate)).mul_(up).to(gate.scalar_type());
}

void silu_times_backward(const at::Tensor& gate, const at::Tensor& up, const at::Tensor& dy) {
  const at::Tensor g = wide(gate), d = wide(dy), sigmoid = at::sigmoid(g);
  const at::Tensor du = d * g * sigmoid;  // g may be the gate's own memory
  gate.copy_(d * up * sigmoid * (1 + g * (1 - sigmoid)));
  up.copy_(du);
}

at::Tensor gelu_of(const at::Tensor& x) {
  return at::gelu(x, "tanh");
}

void gelu_gradient(const at::Tensor& x, const at::Tensor& dy) {
  x.copy_(at::gelu_backward(wide(dy), wide(x), "tanh"));
}

at::Tensor drop(const at::Tensor& x, const DropoutMask& mask) {
  // splitmix64 of kernels.h in signed integers, whose products and sums wrap the same way; shifts are made logical.
  const auto shifted = [](const at::Tensor& h, std::int64_t bits) {
    return at::bitwise_and(at::bitwise_right_shift(h, bits), (std::int64_t{1} << (64 - bits)) - 1);
  };
  const auto signed_of = [](std::uint64_t value) { return static_cast<std::int64_t>(value); };
  const auto threshold = std::lround(mask.p * 65536);
  const double keep = 65536.0 / static_cast<double>(65536 - threshold);
  const std::int64_t rows = x.size(0), n = x.size(1), groups = (n + 3) / 4;
  std::vector<std::int64_t> keys;
  keys.reserve(static_cast<std::size_t>(rows));
  for (std::int64_t row = 0; row < rows; ++row) {
    using model::kernels::mixed_bits;
    const auto number = static_cast<std::uint64_t>((*mask.numbers)[static_cast<std::size_t>(row / mask.tokens)]);
    keys.push_back(signed_of(
        mixed_bits(mixed_bits(mask.key ^ mixed_bits(number)) + static_cast<std::uint64_t>(row % mask.tokens))));
  }
  const at::Tensor first = at::arange(0, 4 * groups, 4, at::TensorOptions().dtype(at::kLong).device(x.device()));
  at::Tensor h = long_tensor(keys, x.device()).unsqueeze(1) + first + signed_of(0x9e3779b97f4a7c15U);
  h = at::bitwise_xor(h, shifted(h, 30)) * signed_of(0xbf58476d1ce4e5b9U);
  h = at::bitwise_xor(h, shifted(h, 27)) * signed_of(0x94d049bb133111ebU);
  h = at::bitwise_xor(h, shifted(h, 31));
  std::vector<at::Tensor> lanes;
  for (std::int64_t lane = 0; lane < 4; ++lane)
    lanes.push_back(at::bitwise_and(at::bitwise_right_shift(h, 16 * lane), std::int64_t{0xffff}).ge(threshold));
  const at::Tensor kept = at::stack(lanes, 2).view({rows, 4 * groups}).slice(1, 0, n);
  return (wide(x) * kept * keep).to(x.scalar_type());
}

at::Tensor head_products(const at::Tensor& x, const at::Tensor& matrices, const HeadShape& shape) {
  const at::Tensor inputs = repeated(items_of(x, matrices.size(shape.transposed ? 1 : 2)), shape.inputs_shared);
  const at::Tensor factors = repeated(matrices, shape.matrices_shared);
  return columns_of(narrow_matmul(inputs, shape.transposed ? factors : factors.transpose(1, 2)));
}

at::Tensor head_products_backward(const at::Tensor& x, const at::Tensor& matrices, const HeadShape& shape,
                                  const at::Tensor& dy, const at::Tensor& dmatrices) {
  const at::Tensor outer = items_of(dy, matrices.size(shape.transposed ? 2 : 1));
  const at::Tensor factors = repeated(matrices, shape.matrices_shared);
  const at::Tensor dx =
      summed(wide_matmul(outer, shape.transposed ? factors.transpose(1, 2) : factors), shape.inputs_shared);
  if (dmatrices.defined()) {
    const at::Tensor inputs = repeated(items_of(x, matrices.size(shape.transposed ? 1 : 2)), shape.inputs_shared);
    const at::Tensor& rows = shape.transposed ? inputs : outer;
    dmatrices.add_(summed(wide_matmul(rows.transpose(1, 2), shape.transposed ? outer : inputs), shape.matrices_shared));
  }
  return columns_of(dx).to(dy.scalar_type());
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Attention

namespace {

/// [batch * tokens, heads, width] as [batch, heads, tokens, width].
at::Tensor heads_first(const AttentionPlan& plan, const at::Tensor& x) {
  return x.unflatten(0, {plan.batch, plan.tokens}).transpose(1, 2);
}

#ifdef HEADFOLD_TORCH_FUSED_ATTENTION
/// Whether libtorch's fused attention applies: bfloat16 on a GPU, no ALiBi.
bool fused(const AttentionPlan& plan, const at::Tensor& queries) {
  return queries.is_cuda() && queries.scalar_type() == at::kBFloat16 && plan.slopes.empty();
}

/// Rows of one segment as [1, heads, tokens, width], heads repeated for their readers.
at::Tensor of_segment(const at::Tensor& x, std::int64_t begin, std::int64_t end, std::int64_t readers) {
  const at::Tensor own = x.slice(0, begin, end).transpose(0, 1);
  return repeated(own, readers).unsqueeze(0);
}

at::Tensor fused_attention(const AttentionPlan& plan, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  return at::scaled_dot_product_attention(q, k, v, {}, 0.0, /*is_causal=*/true, plan.scale);
}

/// body(first row, row behind the last) of every segment: causal attention of its own.
template <class Body>
void for_segments(const AttentionPlan& plan, const Body& body) {
  for (std::int64_t sequence = 0; sequence < plan.batch; ++sequence) {
    const std::int64_t origin = sequence * plan.tokens;
    for (std::int64_t begin = 0; begin < plan.tokens;) {
      std::int64_t end = begin + 1;
      while (end < plan.tokens && plan.segment_begin[static_cast<std::size_t>(origin + end)] == begin) ++end;
      body(origin + begin, origin + end);
      begin = end;
    }
  }
}
#endif

/// Blocks of query rows whose scores stay below the limit, and what they see.
class Scores {
 public:
  Scores(const AttentionPlan& plan, const at::Tensor& queries, const at::Tensor& keys, std::int64_t buffers)
      : plan_(plan),
        dtype_(queries.scalar_type()),
        queries_(heads_first(plan, queries)),
        keys_(heads_first(plan, keys)) {
    const at::Device device = queries.device();
    positions_ = at::arange(plan.tokens, at::TensorOptions().dtype(at::kLong).device(device));
    begins_ = long_tensor(plan.segment_begin, device).view({plan.batch, plan.tokens, 1});
    if (!plan.slopes.empty()) slopes_ = at::tensor(plan.slopes, at::kFloat).to(device).view({plan.heads, 1, 1});
    const auto size = static_cast<std::int64_t>(c10::elementSize(wide_type(dtype_)));
    const std::int64_t per_row = plan.batch * plan.heads * plan.tokens * size * buffers;
    rows_ = std::clamp<std::int64_t>(model::attention_block_bytes() / std::max<std::int64_t>(1, per_row), 1,
                                     std::max<std::int64_t>(1, plan.tokens));
  }
  std::int64_t rows() const { return rows_; }
  /// Rows [first, first + count) of all query heads, [batch, key heads, readers * count, width].
  at::Tensor queries(std::int64_t first, std::int64_t count) const { return grouped(queries_, first, count); }
  at::Tensor keys(std::int64_t visible) const { return keys_.slice(2, 0, visible); }
  /// Rows of x [batch, heads, tokens, width] by the heads they read, as queries().
  at::Tensor grouped(const at::Tensor& x, std::int64_t first, std::int64_t count, std::int64_t readers = 0) const {
    const std::int64_t shared = readers > 0 ? readers : plan_.key_readers;
    return x.slice(2, first, first + count).reshape({plan_.batch, plan_.heads / shared, shared * count, x.size(3)});
  }
  /// Probabilities of rows [first, first + count) for keys 0 .. first + count, in the compute dtype, [batch, heads,
  /// count, first + count]; zero where nothing is seen.
  at::Tensor probabilities(std::int64_t first, std::int64_t count) const {
    const std::int64_t visible = first + count;
    at::Tensor scores = wide_matmul(queries(first, count), keys(visible).transpose(2, 3))
                            .reshape({plan_.batch, plan_.heads, count, visible})
                            .mul_(plan_.scale);
    const at::Tensor seen = positions_.slice(0, 0, visible);
    const at::Tensor begins = begins_.slice(1, first, visible);  // [batch, count, 1]
    if (slopes_.defined()) {
      // Distances from the segment's beginning, rounded as the model does.
      const at::Tensor alibi = slopes_ * (seen - begins).unsqueeze(1).to(wide_type(dtype_));
      scores.add_(alibi.to(dtype_).to(scores.scalar_type()));
    }
    const at::Tensor hidden =
        at::logical_or(seen.lt(begins), seen.gt(positions_.slice(0, first, visible).view({1, count, 1})));
    scores.masked_fill_(hidden.unsqueeze(1), -std::numeric_limits<double>::infinity());
    return at::softmax(scores, -1).to(dtype_);
  }

 private:
  const AttentionPlan& plan_;
  at::ScalarType dtype_;
  at::Tensor queries_, keys_, positions_, begins_, slopes_;
  std::int64_t rows_ = 1;
};

/// Rows [first, ..) of `to` [batch * tokens, heads, width] become x [batch, heads, count, width].
void put_rows(const AttentionPlan& plan, const at::Tensor& to, std::int64_t first, const at::Tensor& x) {
  heads_first(plan, to).slice(2, first, first + x.size(2)).copy_(x);
}

}  // namespace

void attend(const AttentionPlan& plan, const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values,
            const at::Tensor& output) {
  if (plan.batch * plan.tokens == 0) return;
#ifdef HEADFOLD_TORCH_FUSED_ATTENTION
  if (fused(plan, queries)) {
    for_segments(plan, [&](std::int64_t begin, std::int64_t end) {
      const at::Tensor y =
          fused_attention(plan, of_segment(queries, begin, end, 1), of_segment(keys, begin, end, plan.key_readers),
                          of_segment(values, begin, end, plan.value_readers));
      output.slice(0, begin, end).copy_(y.squeeze(0).transpose(0, 1));
    });
    return;
  }
#endif
  const Scores scores(plan, queries, keys, 3);
  const at::Tensor v = heads_first(plan, values);
  for (std::int64_t first = 0; first < plan.tokens; first += scores.rows()) {
    const std::int64_t count = std::min(scores.rows(), plan.tokens - first), visible = first + count;
    const at::Tensor p =
        scores.probabilities(first, count)
            .reshape({plan.batch, plan.heads / plan.value_readers, plan.value_readers * count, visible});
    put_rows(plan, output, first,
             narrow_matmul(p, v.slice(2, 0, visible)).reshape({plan.batch, plan.heads, count, values.size(2)}));
  }
}

void attend_backward(const AttentionPlan& plan, const at::Tensor& queries, const at::Tensor& keys,
                     const at::Tensor& values, const at::Tensor& doutput, const at::Tensor& dqueries,
                     const at::Tensor& dkeys, const at::Tensor& dvalues) {
  if (plan.batch * plan.tokens == 0) return;
#ifdef HEADFOLD_TORCH_FUSED_ATTENTION
  if (fused(plan, queries)) {
    for_segments(plan, [&](std::int64_t begin, std::int64_t end) {
      const c10::AutoGradMode on(true);
      const auto leaf = [](const at::Tensor& x) { return x.detach().contiguous().requires_grad_(); };
      const at::Tensor q = leaf(of_segment(queries, begin, end, 1));
      const at::Tensor k = leaf(of_segment(keys, begin, end, 1)), v = leaf(of_segment(values, begin, end, 1));
      const auto shared = [](const at::Tensor& x, std::int64_t readers) {
        return readers == 1 ? x : x.repeat_interleave(readers, 1);
      };
      const at::Tensor y = fused_attention(plan, q, shared(k, plan.key_readers), shared(v, plan.value_readers));
      const auto found = torch::autograd::grad({y}, {q, k, v}, {of_segment(doutput, begin, end, 1)});
      const auto put = [&](const at::Tensor& to, const at::Tensor& x) {
        const c10::AutoGradMode off(false);
        to.slice(0, begin, end).copy_(x.squeeze(0).transpose(0, 1));
      };
      put(dqueries, found[0]);
      put(dkeys, found[1]);
      put(dvalues, found[2]);
    });
    return;
  }
#endif
  const Scores scores(plan, queries, keys, 5);
  const at::Tensor v = heads_first(plan, values), d = heads_first(plan, doutput);
  const auto sums = [&](const at::Tensor& x) {
    return at::zeros({plan.batch, x.size(1), plan.tokens, x.size(2)}, x.options().dtype(wide_type(x.scalar_type())));
  };
  const at::Tensor key_sums = sums(keys), value_sums = sums(values);
  const std::int64_t key_heads = plan.heads / plan.key_readers, value_heads = plan.heads / plan.value_readers;
  for (std::int64_t first = 0; first < plan.tokens; first += scores.rows()) {
    const std::int64_t count = std::min(scores.rows(), plan.tokens - first), visible = first + count;
    const at::Tensor p = scores.probabilities(first, count);
    const at::Tensor by_value = p.reshape({plan.batch, value_heads, plan.value_readers * count, visible});
    const at::Tensor outer = scores.grouped(d, first, count, plan.value_readers);
    value_sums.slice(2, 0, visible).add_(wide_matmul(by_value.transpose(2, 3), outer));
    const at::Tensor dp = wide_matmul(outer, v.slice(2, 0, visible).transpose(2, 3)).reshape(p.sizes());
    const at::Tensor wide_p = wide(p);
    // Masked entries have probability 0 and so get gradient 0.
    const at::Tensor ds = (wide_p * (dp - (wide_p * dp).sum(-1, true)))
                              .mul_(plan.scale)
                              .to(p.scalar_type())
                              .reshape({plan.batch, key_heads, plan.key_readers * count, visible});
    put_rows(plan, dqueries, first,
             narrow_matmul(ds, scores.keys(visible)).reshape({plan.batch, plan.heads, count, queries.size(2)}));
    key_sums.slice(2, 0, visible).add_(wide_matmul(ds.transpose(2, 3), scores.queries(first, count)));
  }
  put_rows(plan, dkeys, 0, key_sums);
  put_rows(plan, dvalues, 0, value_sums);
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Loss

LossSums loss_of_rows(const at::Tensor& logits, const at::Tensor& targets, const TeacherRows& teacher,
                      const LossOptions& options, double scale, bool gradient) {
  const std::int64_t rows = logits.size(0), vocab = logits.size(1);
  const at::Tensor target = targets.to(logits.device()).view({rows, 1});
  const at::Tensor log_s = at::log_softmax(logits, -1);
  const at::Tensor own = logits.gather(1, target);
  LossSums sums;
  sums.tokens = rows;
  sums.cross_entropy = -log_s.gather(1, target).sum(at::kDouble).item<double>();
  sums.agreements = logits.argmax(-1, true).eq(target).sum().item<std::int64_t>();
  const double weight = options.distill_weight;
  at::Tensor slope;
  if (gradient) {
    slope = at::exp(log_s).mul_(1 - weight);
    slope.scatter_add_(1, target, at::full({rows, 1}, weight - 1, logits.options()));
  }
  const bool pulls = gradient && weight > 0;
  if (teacher.logits.defined()) {
    const double t = options.temperature;
    const at::Tensor log_p = at::log_softmax(teacher.logits.to(logits.device()) / t, -1);
    const at::Tensor log_q = t == 1 ? log_s : at::log_softmax(logits / t, -1);
    const at::Tensor p = at::exp(log_p);
    // A token the teacher excludes (logit -inf) adds nothing.
    sums.divergence = at::where(p.gt(0), p * (log_p - log_q), at::zeros_like(p)).sum(at::kDouble).item<double>();
    if (pulls) slope.add_(at::exp(log_q).sub_(p), weight * t);
  }
  if (teacher.top_log_probs.defined()) {
    const at::Tensor tokens = teacher.top_tokens.to(logits.device());
    if (tokens.min().item<std::int64_t>() < 0 || tokens.max().item<std::int64_t>() >= vocab)
      throw InputError(fmt::format("a token of the teacher is outside the vocabulary of {} entries", vocab),
                       "its log-probabilities were made with another tokenizer");
    const at::Tensor log_p = teacher.top_log_probs.to(logits.device());  // float64
    const at::Tensor p = at::exp(log_p);
    const at::Tensor s = at::exp(log_s);
    // The rest is summed with the kept ones taken out, not as a difference: a sure student would leave only rounding.
    const at::Tensor others = s.scatter(1, tokens, 0.0);
    const at::Tensor rest_s = others.sum({1}, true, at::kDouble);
    const at::Tensor kept = p.sum(1, true);
    const at::Tensor zero = at::zeros_like(kept);
    const at::Tensor rest = at::where(rest_s.gt(0), (1 - kept).clamp_min(0), zero);
    const at::Tensor student = log_s.gather(1, tokens).to(at::kDouble);
    sums.divergence = at::where(p.gt(0), p * (log_p - student), at::zeros_like(p)).sum().item<double>() +
                      at::where(rest.gt(0), rest * (at::log(rest) - at::log(rest_s)), zero).sum().item<double>();
    if (pulls) {
      // d/dz_j: s_j (kept + rest) - p_j for kept tokens; s_j (kept + rest) - rest s_j / s_rest for the others.
      const at::ScalarType type = logits.scalar_type();
      const at::Tensor share = at::where(rest.gt(0), rest / rest_s, zero);
      slope.add_(s * (kept + rest).to(type) - others * share.to(type), weight);
      slope.scatter_add_(1, tokens, (p * -weight).to(type));
    }
  }
  if (gradient) logits.copy_(slope.mul_(scale));
  return sums;
}

}  // namespace headfold::finetune::tensors
