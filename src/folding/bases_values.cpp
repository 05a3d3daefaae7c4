// The value problems of a layer's groups, and the fold that an option names.

#include <headfold/base/error.h>
#include <headfold/folding/bases.h>
#include <headfold/linalg/linalg.h>

namespace headfold::folding {

namespace {

/// The rows without their bias column: a metric on weights knows no input and so no constant.
at::Tensor without_bias(const at::Tensor& rows) {
  return rows.slice(1, 0, rows.size(1) - 1);
}

/// Second moment and mean of the group's values; the moment is centred already where the problem centres.
struct Moments {
  at::Tensor moment, mean;
};

}  // namespace

namespace {

Moments moments_of_values(const LayerProblem& problem, const GroupWeights& group) {
  if (group.value_gram.defined()) {
    const at::Tensor& mean = group.value_mean;
    return {problem.centred_values ? group.value_gram - at::outer(mean, mean) : group.value_gram, mean};
  }
  const at::Tensor rows =
      at::matmul(group.value, problem.centred_values ? problem.moments.centred : problem.moments.input);
  return {linalg::symmetric_part(at::matmul(rows, group.value.t())), at::matmul(group.value, problem.moments.mean)};
}

/// E[y_h y_h^T] of the group's query heads on the group's rows, and Sigma as their mean.
void add_attended(const LayerProblem& problem, const std::vector<std::int64_t>& kv_heads, double mean_weight,
                  ValueProblem& values) {
  const LayerMoments& moments = problem.moments;
  if (!moments.attended.defined())
    throw InputError("the statistics hold no attention-weighted values, which --value-metric attn+out needs",
                     "calibrate with --attention-statistics on, or use --value-metric act+out");
  const std::int64_t block = moments.attended_heads, d = values.head_dim;
  std::vector<std::int64_t> inside;
  for (const std::int64_t k : kv_heads) {
    if (k / block != kv_heads.front() / block) {
      std::int64_t last = kv_heads.front(), first = kv_heads.front();
      for (const std::int64_t other : kv_heads) {
        last = std::max(last, other);
        first = std::min(first, other);
      }
      std::int64_t needed = block;
      const std::int64_t all = problem.weights.kv_heads;
      while (needed < all && (all % needed != 0 || first / needed != last / needed)) ++needed;
      throw InputError(fmt::format("the group of KV heads {} does not lie inside one block of {} heads, over which the "
                                   "statistics hold attention-weighted values",
                                   fmt::join(kv_heads, ", "), block),
                       fmt::format("calibrate with --attended-heads {}, or use --value-metric act+out", needed));
    }
    inside.push_back(k % block);
  }
  const at::Tensor rows = block_index(inside, d);
  values.sigma = at::zeros({rows.numel(), rows.numel()}, at::kDouble);
  for (const std::int64_t h : query_heads_of(kv_heads, values.repeat)) {
    at::Tensor moment = moments.attended[h].index_select(0, rows).index_select(1, rows);
    if (mean_weight != 1) {
      const at::Tensor mean = moments.attended_mean[h].index_select(0, rows);
      moment = moment - (1 - mean_weight) * at::outer(mean, mean);
    }
    values.attended.push_back(linalg::symmetric_part(moment));
    values.sigma += values.attended.back();
  }
  values.sigma /= static_cast<double>(values.attended.size());
}

}  // namespace

ValueProblem value_problem(const LayerProblem& problem, const std::vector<std::int64_t>& kv_heads,
                           const FoldOptions& options) {
  const bool needs_mean = problem.centred_values || options.mean_weight != 1;
  const GroupWeights group = fold_group(problem, kv_heads, Part::values, options.value_metric, true, needs_mean);
  ValueProblem values;
  values.size = static_cast<std::int64_t>(kv_heads.size());
  values.head_dim = problem.weights.head_dim;
  values.repeat = problem.weights.value_repeat();
  const Metric metric = options.value_metric;
  if (metric == Metric::weights) {
    if (group.value_weight_gram.defined()) {
      values.sigma = group.value_weight_gram;
    } else {
      const at::Tensor weight = without_bias(group.value);
      values.sigma = at::matmul(weight, weight.t());
    }
    return values;
  }
  if (!problem.has_moments)
    throw InternalError(
        fmt::format("a value fold with metric {} was asked for without calibration statistics", name_of(metric)));
  if (metric != Metric::act && metric != Metric::act_out && metric != Metric::attn_out)
    throw InternalError(fmt::format("{} is no metric of values", name_of(metric)));
  // Centred: the constant goes to the output bias, exactly. Otherwise it is part of the values, at a weight of choice.
  const double mean_weight = problem.centred_values ? 0 : options.mean_weight;
  if (metric == Metric::attn_out) {
    add_attended(problem, kv_heads, mean_weight, values);
  } else {
    const Moments moments = moments_of_values(problem, group);
    values.sigma = moments.moment;
    if (!problem.centred_values && mean_weight != 1)
      values.sigma = values.sigma - (1 - mean_weight) * at::outer(moments.mean, moments.mean);
  }
  if (metric == Metric::act) return values;
  for (std::int64_t k = 0; k < values.size; ++k) {
    at::Tensor lambda = at::zeros({values.head_dim, values.head_dim}, at::kDouble);
    for (std::int64_t i = 0; i < values.repeat; ++i) {
      at::Tensor gram;
      if (group.output_grams.defined()) {
        gram = group.output_grams[k][i];
      } else {
        const at::Tensor& p = group.outputs.at(static_cast<std::size_t>(k * values.repeat + i));
        gram = at::matmul(p.t(), p);
      }
      values.outputs.push_back(gram);
      lambda += gram;
    }
    values.lambda.push_back(lambda);
  }
  return values;
}

linalg::Conditioning value_conditioning(const LayerProblem& problem, const std::vector<std::int64_t>& kv_heads,
                                        const FoldOptions& options) {
  return linalg::conditioning(value_problem(problem, kv_heads, options).sigma);
}

Basis value_basis(const LayerProblem& problem, const std::vector<std::int64_t>& kv_heads, const FoldOptions& options,
                  std::int64_t width) {
  const ValueProblem values = value_problem(problem, kv_heads, options);
  const std::int64_t d = values.head_dim;
  const std::int64_t channels = width == 0 ? d : width;
  if (channels < 1 || channels > values.size * d)
    throw InternalError(fmt::format("{} channels of a group of {} value heads of {}", width, values.size, d));
  if (options.values != ValueFold::svd && channels != d)
    throw InternalError(
        fmt::format("--values {} makes heads of {} channels, not of {}", name_of(options.values), d, channels));
  switch (options.values) {
    case ValueFold::meanpool:
      return fold_values_meanpool(values);
    case ValueFold::procrustes:
      return fold_values_procrustes(values);
    case ValueFold::svd:
      return fold_values_svd(values, channels, problem.moments.polish_sweeps(options.polish, values.size * d));
  }
  throw InternalError("unknown value fold");
}

double value_loss(const LayerProblem& problem, const std::vector<std::int64_t>& kv_heads, const FoldOptions& options,
                  const Basis& basis) {
  return loss_of(value_problem(problem, kv_heads, options), basis);
}

double value_total(const LayerProblem& problem, const std::vector<std::int64_t>& kv_heads, const FoldOptions& options) {
  return total_of(value_problem(problem, kv_heads, options));
}

}  // namespace headfold::folding
