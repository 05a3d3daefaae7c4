// What a value fold costs, whatever made it.

#include <headfold/folding/folds.h>

namespace headfold::folding {

double loss_of(const ValueProblem& problem, const Basis& basis) {
  if (!problem.has_own_decoders() || (problem.attended.empty() && !basis.head_decoders.defined()))
    return loss_of(static_cast<const Problem&>(problem), basis.encoder, basis.decoder);
  const std::int64_t d = problem.head_dim;
  double loss = 0;
  for (std::size_t h = 0; h < problem.outputs.size(); ++h) {
    const std::int64_t row = static_cast<std::int64_t>(h) / problem.repeat * d;
    const at::Tensor decoder = basis.head_decoders.defined() ? basis.head_decoders[static_cast<std::int64_t>(h)]
                                                             : basis.decoder.slice(0, row, row + d);
    at::Tensor residual = -at::matmul(decoder, basis.encoder);
    residual.slice(1, row, row + d).diagonal().add_(1.0);
    const at::Tensor& moment = problem.attended.empty() ? problem.sigma : problem.attended[h];
    const at::Tensor error = at::matmul(at::matmul(residual, moment), residual.t());
    loss += (problem.outputs[h] * error).sum().item<double>();
  }
  return loss;
}

double total_of(const ValueProblem& problem) {
  if (problem.attended.empty()) return total_of(static_cast<const Problem&>(problem));
  const std::int64_t d = problem.head_dim;
  double total = 0;
  for (std::size_t h = 0; h < problem.outputs.size(); ++h) {
    const std::int64_t row = static_cast<std::int64_t>(h) / problem.repeat * d;
    total +=
        (problem.outputs[h] * problem.attended[h].slice(0, row, row + d).slice(1, row, row + d)).sum().item<double>();
  }
  return total;
}

}  // namespace headfold::folding
