// Sigma and Lambda of the key problems, and the pieces that several folds share.

#include <headfold/base/error.h>
#include <headfold/folding/distance.h>
#include <headfold/folding/folds.h>

namespace headfold::folding {

namespace {

at::Tensor covariance(const at::Tensor& rows, const at::Tensor& moment) {
  const at::Tensor product = at::matmul(at::matmul(rows, moment), rows.t());
  return 0.5 * (product + product.t());
}

/// The rows without their bias column: a metric on weights knows no input and so no constant.
at::Tensor weight_gram(const at::Tensor& rows) {
  const at::Tensor weight = rows.slice(1, 0, rows.size(1) - 1);
  return at::matmul(weight, weight.t());
}

const LayerMoments& needed(const LayerMoments* moments) {
  if (moments == nullptr)
    throw InternalError("a fold with an activation metric was asked for without calibration statistics");
  return *moments;
}

}  // namespace

std::pair<at::Tensor, at::Tensor> rotation_of(const KeyContext& context) {
  if (!context.frequencies.defined() || !context.distance_law.defined())
    throw InternalError("a fold that knows distances was asked for without frequencies or distance law");
  return {context.frequencies, context.distance_law};
}

std::vector<std::int64_t> band_rows(std::int64_t head_dim, std::int64_t band) {
  std::vector<std::int64_t> rows;
  for (std::int64_t l = head_dim / 2 - 1; l >= head_dim / 2 - band; --l) {
    rows.push_back(l);
    rows.push_back(l + head_dim / 2);
  }
  return rows;
}

at::Tensor key_gram(const GroupWeights& group, const LayerMoments& moments) {
  return group.key_gram.defined() ? group.key_gram : covariance(group.key, moments.input);
}

at::Tensor centred_key_gram(const GroupWeights& group, const LayerMoments& moments,
                            const std::vector<std::int64_t>& rows) {
  std::vector<std::int64_t> all;
  for (std::int64_t k = 0; k < group.size && !rows.empty(); ++k)
    for (const std::int64_t row : rows) all.push_back(k * group.head_dim + row);
  const at::Tensor index = at::tensor(all, at::kLong);
  if (!group.key_gram.defined())
    return covariance(rows.empty() ? group.key : group.key.index_select(0, index), moments.centred);
  const at::Tensor gram = group.key_gram - at::outer(group.key_mean, group.key_mean);
  return rows.empty() ? gram : gram.index_select(0, index).index_select(1, index);
}

at::Tensor key_mean(const GroupWeights& group, const LayerMoments& moments) {
  return group.key_mean.defined() ? group.key_mean : at::mv(group.key, moments.mean);
}

at::Tensor key_weight_gram(const GroupWeights& group) {
  return group.key_weight_gram.defined() ? group.key_weight_gram : weight_gram(group.key);
}

at::Tensor query_gram(const GroupWeights& group, std::int64_t k, const LayerMoments& moments,
                      const std::vector<std::int64_t>& rows) {
  const at::Tensor chosen = rows.empty() ? at::arange(group.head_dim, at::kLong) : at::tensor(rows, at::kLong);
  if (group.query_grams.defined()) return group.query_grams[k].sum(0).index_select(0, chosen).index_select(1, chosen);
  at::Tensor gram = at::zeros({chosen.size(0), chosen.size(0)}, at::kDouble);
  const at::Tensor& queries = group.queries[static_cast<std::size_t>(k)];
  for (std::int64_t row = 0; row < queries.size(0); row += group.head_dim)
    gram += covariance(queries.slice(0, row, row + group.head_dim).index_select(0, chosen), moments.input);
  return gram;
}

Problem unrotated_key_problem(const GroupWeights& group, const LayerMoments* moments, Metric metric) {
  Problem problem;
  if (metric == Metric::weights) {
    problem.sigma = key_weight_gram(group);
    return problem;
  }
  problem.sigma = centred_key_gram(group, needed(moments));
  if (metric == Metric::act_query || metric == Metric::act_query_dist)  // no rotation: distances change nothing
    for (std::int64_t k = 0; k < group.size; ++k)
      problem.lambda.push_back(query_gram(group, k, *moments) / static_cast<double>(group.head_dim));
  return problem;
}

at::Tensor query_energies(const GroupWeights& group, const at::Tensor& input_moment) {
  const std::int64_t half = group.head_dim / 2;
  at::Tensor energies = at::zeros({group.size, half}, at::kDouble);
  for (std::int64_t k = 0; k < group.size; ++k) {
    at::Tensor diagonal;
    if (group.query_grams.defined()) {
      diagonal = group.query_grams[k].diagonal(0, 1, 2).reshape({-1});
    } else {
      const at::Tensor& rows = group.queries[static_cast<std::size_t>(k)];
      diagonal = (at::matmul(rows, input_moment) * rows).sum(1);
    }
    energies.select(0, k).copy_(diagonal.view({-1, 2, half}).sum(0).sum(0));
  }
  return energies;
}

namespace {

/// diag(lam_{k,l} / 2d) twice: the phase average of the query Gram over head_dim.
std::vector<at::Tensor> phase_averaged(const GroupWeights& group, const LayerMoments& moments) {
  std::vector<at::Tensor> lambda;
  const at::Tensor energies = query_energies(group, moments.input) / (2.0 * static_cast<double>(group.head_dim));
  for (std::int64_t k = 0; k < group.size; ++k) lambda.push_back(at::diag(at::cat({energies[k], energies[k]})));
  return lambda;
}

}  // namespace

Problem rotating_key_problem(const GroupWeights& group, const LayerMoments* moments, Metric metric,
                             const KeyContext& context) {
  Problem problem;
  if (metric == Metric::weights) {
    problem.sigma = key_weight_gram(group);
    return problem;
  }
  if (context.mean_weight == 1.0) {
    problem.sigma = key_gram(group, needed(moments));
  } else {
    const at::Tensor mean = key_mean(group, needed(moments));
    problem.sigma = centred_key_gram(group, *moments) + context.mean_weight * at::outer(mean, mean);
  }
  if (metric == Metric::act_query) {
    problem.lambda = phase_averaged(group, *moments);
  } else if (metric == Metric::act_query_dist) {
    const auto [frequencies, law] = rotation_of(context);
    const Twist twist = Twist::rotation(frequencies, law);
    for (std::int64_t k = 0; k < group.size; ++k) {
      const at::Tensor block = twist.adjoint(query_gram(group, k, *moments)) / static_cast<double>(group.head_dim);
      problem.lambda.push_back(0.5 * (block + block.t()));
    }
  }
  return problem;
}

Problem rotated_key_problem(const GroupWeights& group, const LayerMoments* moments, Metric metric,
                            const KeyContext& context) {
  Problem problem;
  if (metric == Metric::weights) {
    problem.sigma = key_weight_gram(group);
    return problem;
  }
  if (!context.rotated_keys.defined())
    throw InputError("the statistics hold no Gram of rotated keys, which --keys post-rotation needs",
                     "calibrate the model again");
  problem.sigma = context.rotated_keys;
  if (metric == Metric::act_query || metric == Metric::act_query_dist) {
    if (context.rotated_queries.empty()) {
      problem.lambda = phase_averaged(group, needed(moments));
    } else {
      for (const at::Tensor& gram : context.rotated_queries)
        problem.lambda.push_back(gram / static_cast<double>(group.head_dim));
    }
  }
  return problem;
}

double total_of(const Problem& problem) {
  if (problem.lambda.empty()) return problem.sigma.trace().item<double>();
  double total = 0;
  std::int64_t row = 0;
  for (const at::Tensor& block : problem.lambda) {
    const std::int64_t n = block.size(0);
    total += (block * problem.sigma.slice(0, row, row + n).slice(1, row, row + n)).sum().item<double>();
    row += n;
  }
  return total;
}

double loss_of(const Problem& problem, const at::Tensor& encoder, const at::Tensor& decoder) {
  const at::Tensor residual = at::eye(problem.sigma.size(0), at::kDouble) - at::matmul(decoder, encoder);
  const at::Tensor error = at::matmul(at::matmul(residual, problem.sigma), residual.t());
  if (problem.lambda.empty()) return error.trace().item<double>();
  double loss = 0;
  std::int64_t row = 0;
  for (const at::Tensor& block : problem.lambda) {
    const std::int64_t n = block.size(0);
    loss += (block * error.slice(0, row, row + n).slice(1, row, row + n)).sum().item<double>();
    row += n;
  }
  return loss;
}

void normalise_scale(Basis& basis, const at::Tensor& sigma, std::int64_t head_dim) {
  const double heads = static_cast<double>(sigma.size(0)) / static_cast<double>(head_dim);
  const double merged = at::matmul(at::matmul(basis.encoder, sigma), basis.encoder.t()).trace().item<double>();
  const double source =
      sigma.trace().item<double>() / heads * static_cast<double>(basis.encoder.size(0)) / static_cast<double>(head_dim);
  if (!(merged > 0) || !(source > 0)) return;
  const double scale = std::sqrt(source / merged);
  basis.encoder = basis.encoder * scale;
  basis.decoder = basis.decoder / scale;
  if (basis.head_decoders.defined()) basis.head_decoders = basis.head_decoders / scale;
}

}  // namespace headfold::folding
