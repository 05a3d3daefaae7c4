#pragma once
// Random layers and moments with the structure real ones have: correlated heads with phases and magnitudes of their
// own.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <headfold/folding/bases.h>

namespace headfold::folding::testing_support {

/// Draws float64 tensors from one seed.
class Random {
 public:
  explicit Random(std::uint64_t seed) : generator_(at::detail::createCPUGenerator(seed)) {}
  at::Tensor normal(at::IntArrayRef shape) {
    return at::randn(shape, generator_, at::TensorOptions().dtype(at::kDouble));
  }
  at::Tensor uniform(at::IntArrayRef shape) {
    return at::rand(shape, generator_, at::TensorOptions().dtype(at::kDouble));
  }

 private:
  at::Generator generator_;
};

/// Multiplies the complex rows (l, l + half) of every head by coefficients [heads, half]; rows [heads * d, n].
inline at::Tensor times_complex(const at::Tensor& rows, const at::Tensor& coefficients) {
  const std::int64_t heads = coefficients.size(0), half = coefficients.size(1);
  const at::Tensor view = rows.view({heads, 2, half, -1});
  const at::Tensor re = at::real(coefficients).unsqueeze(2), im = at::imag(coefficients).unsqueeze(2);
  const at::Tensor x = view.select(1, 0), y = view.select(1, 1);
  return at::stack({re * x - im * y, im * x + re * y}, 1).reshape_as(rows);
}

inline at::Tensor unit_phases(Random& random, std::int64_t heads, std::int64_t half) {
  const at::Tensor angle = random.uniform({heads, half}) * (2 * M_PI);
  return at::complex(at::cos(angle), at::sin(angle));
}

/// A layer whose KV heads share a component: key head k = (magnitude, phase) x common + own part of relative size
/// `own`.
inline LayerWeights random_layer(std::uint64_t seed, std::int64_t heads, std::int64_t kv_heads, std::int64_t d,
                                 std::int64_t hidden, bool biased, double own = 0.5) {
  Random random(seed);
  LayerWeights w;
  w.heads = heads;
  w.kv_heads = kv_heads;
  w.head_dim = d;
  w.hidden = hidden;
  const double unit = 1.0 / std::sqrt(static_cast<double>(hidden));
  const at::Tensor common = random.normal({d, hidden}).repeat({kv_heads, 1});
  const at::Tensor magnitude = (0.5 + random.uniform({kv_heads, d / 2})).to(at::kComplexDouble);
  w.key = unit * (times_complex(common, magnitude * unit_phases(random, kv_heads, d / 2)) +
                  own * random.normal({kv_heads * d, hidden}));
  w.query = unit * random.normal({heads * d, hidden}) * (0.3 + random.uniform({heads * d, 1}));
  w.value = unit * (random.normal({d, hidden}).repeat({kv_heads, 1}) + own * random.normal({kv_heads * d, hidden}));
  w.output = unit * random.normal({hidden, heads * d});
  if (biased) {
    w.query_bias = random.normal({heads * d});
    w.key_bias = random.normal({kv_heads * d});
    w.value_bias = random.normal({kv_heads * d});
    w.output_bias = random.normal({hidden});
  }
  return w;
}

/// Moments of Gaussian inputs with a spectrum of three decades and mean `mean_size` x random.
inline LayerMoments random_moments(std::uint64_t seed, std::int64_t hidden, double mean_size = 1.0) {
  Random random(seed);
  const at::Tensor root = random.normal({hidden, hidden}) * at::logspace(0.5, -1, hidden, 10.0, at::kDouble) /
                          std::sqrt(static_cast<double>(hidden));
  const at::Tensor mean = at::cat({mean_size * random.normal({hidden}), at::ones({1}, at::kDouble)});
  LayerMoments moments;
  moments.mean = mean;
  moments.centred = at::zeros({hidden + 1, hidden + 1}, at::kDouble);
  moments.centred.slice(0, 0, hidden).slice(1, 0, hidden).copy_(at::matmul(root, root.t()));
  moments.input = moments.centred + at::outer(mean, mean);
  return moments;
}

/// Cx = I, mean 0.
inline LayerMoments white_moments(std::int64_t hidden) {
  LayerMoments moments;
  moments.input = at::eye(hidden + 1, at::kDouble);
  moments.mean = at::zeros({hidden + 1}, at::kDouble);
  moments.mean[hidden].fill_(1.0);
  moments.centred = moments.input - at::outer(moments.mean, moments.mean);
  return moments;
}

/// Values of a whole layer as one group.
inline ValueProblem values_of(const LayerWeights& w, const LayerMoments* moments, Metric metric, bool centred = false) {
  LayerProblem problem;
  problem.weights = w;
  problem.centred_values = centred;
  problem.has_moments = moments != nullptr;
  if (moments != nullptr) problem.moments = *moments;
  FoldOptions options;
  options.value_metric = metric;
  std::vector<std::int64_t> heads;
  for (std::int64_t k = 0; k < w.kv_heads; ++k) heads.push_back(k);
  return value_problem(problem, heads, options);
}

inline double relative(double found, double expected) {
  return std::abs(found - expected) / std::max(std::abs(expected), 1e-300);
}
inline double relative(const at::Tensor& found, const at::Tensor& expected) {
  return ((found - expected).norm() / expected.norm().clamp_min(1e-300)).item<double>();
}

}  // namespace headfold::folding::testing_support
