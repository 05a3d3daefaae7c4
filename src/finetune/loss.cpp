#include "loss.h"

#include <ATen/Parallel.h>
#include <headfold/base/error.h>

#include <algorithm>

#include "elementwise.h"
#include "tensors.h"

namespace headfold::finetune {
namespace {

struct RowResult {
  double cross_entropy = 0, divergence = 0;
  bool agrees = false;
};

template <class T>
struct Scratch {
  std::vector<T> exponentials, student, teacher, gradient;
  void resize(std::int64_t n) {
    for (auto* each : {&exponentials, &student, &teacher, &gradient}) each->resize(static_cast<std::size_t>(n));
  }
};

template <class T>
T largest_of(const T* x, std::int64_t n) {
  T largest = x[0];
#pragma omp simd reduction(max : largest)
  for (std::int64_t i = 0; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

/// T^2 KL(teacher || student) is what the loss takes; its gradient with respect to the logits is T (s - p), s and p the
/// softmax of both at temperature T (Hinton et al., arXiv 1503.02531). Gives KL.
template <class T>
double divergence_of_logits(const T* z, T largest, const T* t, std::int64_t vocab, double temperature, T weight,
                            Scratch<T>& s, bool gradient) {
  const double inverse = 1 / temperature;
  const double student_sum = exponential_sum(z, s.student.data(), vocab, largest, inverse);
  const T teacher_largest = largest_of(t, vocab);
  const double teacher_sum = exponential_sum(t, s.teacher.data(), vocab, teacher_largest, inverse);
  // log p - log s = ((t - max t) - (z - max z)) / T - log(sum p) + log(sum s)
  const T offset = static_cast<T>(std::log(student_sum) - std::log(teacher_sum) +
                                  (static_cast<double>(largest) - static_cast<double>(teacher_largest)) * inverse);
  const T rate = static_cast<T>(inverse);
  const T teacher_factor = static_cast<T>(1 / teacher_sum);
  T sum = 0;
  const T* p = s.teacher.data();
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < vocab; ++i) {
    const T term = p[i] * teacher_factor * ((t[i] - z[i]) * rate + offset);
    sum += p[i] > 0 ? term : T(0);  // a token the teacher excludes (logit -inf) adds nothing
  }
  if (gradient) {
    const T slope = weight * static_cast<T>(temperature);
    const T student_factor = static_cast<T>(1 / student_sum);
    T* g = s.gradient.data();
    const T* e = s.student.data();
#pragma omp simd
    for (std::int64_t i = 0; i < vocab; ++i) g[i] += slope * (e[i] * student_factor - p[i] * teacher_factor);
  }
  return static_cast<double>(sum);
}

/// The same from the k most probable tokens: what is missing to 1 is one further class, whose student probability is
/// that of all other tokens together. exponentials: exp(z - max z), sum `total`.
template <class T>
double divergence_of_top(const T* z, T largest, const double* log_probs, const std::int64_t* tokens, std::int64_t k,
                         std::int64_t vocab, double total, T weight, Scratch<T>& s, bool gradient) {
  const T* e = s.exponentials.data();
  double kept = 0, divergence = 0;
  std::vector<double> kept_exponentials(static_cast<std::size_t>(k));
  // The rest is summed with the kept ones taken out, not as a difference: a sure student would leave only rounding.
  T* masked = s.student.data();
  std::copy_n(e, vocab, masked);
  for (std::int64_t i = 0; i < k; ++i) {
    const std::int64_t token = tokens[i];
    if (token < 0 || token >= vocab)
      throw InputError(fmt::format("the teacher's token {} is outside the vocabulary of {} entries", token, vocab),
                       "its log-probabilities were made with another tokenizer");
    const double p = std::exp(log_probs[i]);
    // From the logit, not its exponential: that of a token the student rules out is 0.
    if (p > 0)
      divergence +=
          p * (log_probs[i] - (static_cast<double>(z[token]) - static_cast<double>(largest)) + std::log(total));
    kept += p;
    masked[token] = 0;
  }
  double rest_student = 0;
  T partial = 0;
#pragma omp simd reduction(+ : partial)
  for (std::int64_t i = 0; i < vocab; ++i) partial += masked[i];
  rest_student = static_cast<double>(partial);
  const double rest = rest_student > 0 ? std::max(0.0, 1 - kept) : 0;
  if (rest > 0) divergence += rest * (std::log(rest) - std::log(rest_student) + std::log(total));
  if (gradient) {
    // d/dz_j: s_j (kept + rest) - p_j for kept tokens; s_j (kept + rest) - rest s_j / s_rest for the others.
    T* g = s.gradient.data();
    const T student_factor = static_cast<T>((kept + rest) / total) * weight;
    const T rest_factor = rest > 0 ? static_cast<T>(rest / rest_student) * weight : T(0);
#pragma omp simd
    for (std::int64_t i = 0; i < vocab; ++i) g[i] += student_factor * e[i] - rest_factor * masked[i];
    for (std::int64_t i = 0; i < k; ++i) g[tokens[i]] -= weight * static_cast<T>(std::exp(log_probs[i]));
  }
  return divergence;
}

template <class T>
RowResult loss_of_row(T* z, std::int64_t vocab, std::int64_t target, const T* teacher, const double* log_probs,
                      const std::int64_t* tokens, std::int64_t k, const LossOptions& options, double scale,
                      bool gradient) {
  thread_local Scratch<T> s;
  s.resize(vocab);
  RowResult result;
  const T largest = largest_of(z, vocab);
  const double sum = exponential_sum(z, s.exponentials.data(), vocab, largest, 1);
  result.cross_entropy = std::log(sum) + static_cast<double>(largest) - static_cast<double>(z[target]);
  result.agrees = z[target] == largest && std::find(z, z + target, largest) == z + target;  // argmax takes the first
  const T plain = static_cast<T>(1 - options.distill_weight);
  if (gradient) {
    T* g = s.gradient.data();
    const T* e = s.exponentials.data();
    const T factor = plain * static_cast<T>(1 / sum);
#pragma omp simd
    for (std::int64_t i = 0; i < vocab; ++i) g[i] = factor * e[i];
    g[target] -= plain;
  }
  const T weight = static_cast<T>(options.distill_weight);
  const bool pulls = gradient && options.distill_weight > 0;
  if (teacher != nullptr)
    result.divergence = divergence_of_logits(z, largest, teacher, vocab, options.temperature, weight, s, pulls);
  if (log_probs != nullptr)
    result.divergence = divergence_of_top(z, largest, log_probs, tokens, k, vocab, sum, weight, s, pulls);
  if (!gradient) return result;
  const T* g = s.gradient.data();
  const T factor = static_cast<T>(scale);
#pragma omp simd
  for (std::int64_t i = 0; i < vocab; ++i) z[i] = factor * g[i];
  return result;
}

template <class T>
LossSums all_rows(const at::Tensor& logits, const at::Tensor& targets, const TeacherRows& teacher,
                  const LossOptions& options, double scale, bool gradient) {
  const std::int64_t rows = logits.size(0);
  const std::int64_t vocab = logits.size(1);
  const std::int64_t k = teacher.top_log_probs.defined() ? teacher.top_log_probs.size(1) : 0;
  const auto* target = targets.data_ptr<std::int64_t>();
  std::vector<RowResult> results(static_cast<std::size_t>(rows));
  at::parallel_for(0, rows, std::max<std::int64_t>(1, 16384 / vocab), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row)
      results[static_cast<std::size_t>(row)] = loss_of_row<T>(
          logits.data_ptr<T>() + row * vocab, vocab, target[row],
          teacher.logits.defined() ? teacher.logits.data_ptr<T>() + row * vocab : nullptr,
          k > 0 ? teacher.top_log_probs.data_ptr<double>() + row * k : nullptr,
          k > 0 ? teacher.top_tokens.data_ptr<std::int64_t>() + row * k : nullptr, k, options, scale, gradient);
  });
  LossSums sums;
  sums.tokens = rows;
  for (const RowResult& result : results) {
    sums.cross_entropy += result.cross_entropy;
    sums.divergence += result.divergence;
    sums.agreements += result.agrees ? 1 : 0;
  }
  return sums;
}

}  // namespace

double LossSums::loss(const LossOptions& options) const {
  if (tokens == 0) return 0;
  const double w = options.distill_weight;
  return ((1 - w) * cross_entropy + w * options.temperature * options.temperature * divergence) /
         static_cast<double>(tokens);
}

std::int64_t logit_chunk_rows(std::int64_t vocab, at::ScalarType compute, std::int64_t rows) {
  constexpr std::int64_t kBytes = std::int64_t{64} << 20;
  const std::int64_t row_bytes = vocab * (compute == at::kDouble ? 8 : 4);
  return std::clamp<std::int64_t>(kBytes / row_bytes, 16, std::max<std::int64_t>(16, rows));
}

LossSums loss_of_rows(const at::Tensor& logits, const at::Tensor& targets, const TeacherRows& teacher,
                      const LossOptions& options, double scale, bool gradient) {
  if (tensors::in_use()) return tensors::loss_of_rows(logits, targets, teacher, options, scale, gradient);
  return logits.scalar_type() == at::kDouble ? all_rows<double>(logits, targets, teacher, options, scale, gradient)
                                             : all_rows<float>(logits, targets, teacher, options, scale, gradient);
}

}  // namespace headfold::finetune
