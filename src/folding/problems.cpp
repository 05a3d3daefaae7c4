// Sigma and Lambda of the key problems, and the pieces that several folds share.

#include <headfold/base/error.h>
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

Problem unrotated_key_problem(const GroupWeights& group, const LayerMoments* moments, Metric metric) {
  Problem problem;
  if (metric == Metric::weights) {
    problem.sigma = weight_gram(group.key);
    return problem;
  }
  problem.sigma = covariance(group.key, needed(moments).centred);
  if (metric == Metric::act_query) {
    for (const at::Tensor& queries : group.queries) {
      at::Tensor block = at::zeros({group.head_dim, group.head_dim}, at::kDouble);
      for (std::int64_t row = 0; row < queries.size(0); row += group.head_dim)
        block += covariance(queries.slice(0, row, row + group.head_dim), moments->input);
      problem.lambda.push_back(block / static_cast<double>(group.head_dim));
    }
  }
  return problem;
}

at::Tensor query_energies(const GroupWeights& group, const at::Tensor& input_moment) {
  const std::int64_t half = group.head_dim / 2;
  at::Tensor energies = at::zeros({group.size, half}, at::kDouble);
  for (std::int64_t k = 0; k < group.size; ++k) {
    const at::Tensor& rows = group.queries[static_cast<std::size_t>(k)];
    const at::Tensor diagonal = (at::matmul(rows, input_moment) * rows).sum(1);
    energies.select(0, k).copy_(diagonal.view({-1, 2, half}).sum(0).sum(0));
  }
  return energies;
}

Problem rotating_key_problem(const GroupWeights& group, const LayerMoments* moments, Metric metric) {
  Problem problem;
  if (metric == Metric::weights) {
    problem.sigma = weight_gram(group.key);
    return problem;
  }
  problem.sigma = covariance(group.key, needed(moments).input);
  if (metric == Metric::act_query) {
    const at::Tensor energies = query_energies(group, moments->input) / (2.0 * static_cast<double>(group.head_dim));
    for (std::int64_t k = 0; k < group.size; ++k)
      problem.lambda.push_back(at::diag(at::cat({energies[k], energies[k]})));
  }
  return problem;
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
  const double source = sigma.trace().item<double>() / heads;
  if (!(merged > 0) || !(source > 0)) return;
  const double scale = std::sqrt(source / merged);
  basis.encoder = basis.encoder * scale;
  basis.decoder = basis.decoder / scale;
}

}  // namespace headfold::folding
