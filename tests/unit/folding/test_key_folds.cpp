// Keys under rotation: what the losses promise, measured by brute force over distances and by sampling.

#include <gtest/gtest.h>
#include <headfold/base/error.h>
#include <headfold/folding/apply.h>
#include <headfold/folding/distance.h>

#include "../../../src/folding/complex_pairs.h"
#include "../../../src/folding/keys_distance.h"
#include "instances.h"

namespace headfold::folding {
namespace {

using namespace testing_support;

constexpr std::int64_t kHeads = 4, kDim = 8, kHidden = 48, kContext = 40;

/// Frequencies from fast to slow: the last pair turns by 0.12 over the context, the first by 40.
at::Tensor frequencies(std::int64_t dim = kDim) {
  return at::pow(at::full({dim / 2}, 0.145, at::kDouble), at::arange(dim / 2, at::kDouble));
}

LayerProblem problem_of(std::uint64_t seed, std::int64_t heads, std::int64_t kv_heads, bool biased, double mean = 1.0,
                        std::int64_t dim = kDim, double own = 0.5) {
  LayerProblem problem;
  problem.weights = random_layer(seed, heads, kv_heads, dim, kHidden, biased, own);
  problem.moments = random_moments(seed + 1000, kHidden, mean);
  problem.has_moments = true;
  problem.rotates = true;
  problem.frequencies = frequencies(dim);
  problem.context = kContext;
  return problem;
}

FoldOptions options_of(KeyFold fold, Metric metric, std::int64_t band = 0, std::int64_t polish = 0) {
  FoldOptions options;
  options.keys = fold;
  options.key_metric = metric;
  options.slow_band = band;
  options.polish = polish;
  options.kv_heads = 1;
  return options;
}

std::vector<std::int64_t> heads_of(const LayerProblem& problem) {
  std::vector<std::int64_t> heads;
  for (std::int64_t k = 0; k < problem.weights.kv_heads; ++k) heads.push_back(k);
  return heads;
}

/// R(n) of one head, [d, d].
at::Tensor rotation(const at::Tensor& frequency, double position) {
  const at::Tensor c = at::diag(at::cos(frequency * position)), s = at::diag(at::sin(frequency * position));
  return at::cat({at::cat({c, -s}, 1), at::cat({s, c}, 1)}, 0);
}

at::Tensor with_ones(const at::Tensor& weight, const at::Tensor& bias) {
  return at::cat({weight, bias.defined() ? bias.unsqueeze(1) : at::zeros({weight.size(0), 1}, at::kDouble)}, 1);
}

/// Mean squared score error over distances, written down as the definition says: every distance with its own rotations,
/// keys and queries independent. Constants of keys count in the band by how they vary with the distance; outside it
/// 1 - sqrt(mean_weight) of their mean over distances is left out.
double brute_force(const LayerProblem& problem, const Basis& basis, const at::Tensor& law, std::int64_t band,
                   double mean_weight = 1.0) {
  const LayerWeights& w = problem.weights;
  const std::int64_t d = w.head_dim, g = w.kv_heads, half = d / 2;
  const at::Tensor key = with_ones(w.key, w.key_bias), query = with_ones(w.query, w.query_bias);
  const at::Tensor sigma = at::matmul(at::matmul(key, problem.moments.centred), key.t());
  const at::Tensor in_band = (at::arange(d, at::kLong).remainder(half) >= half - band).to(at::kDouble);
  const at::Tensor mean = at::mv(key, problem.moments.mean);
  const at::Tensor slow = mean * in_band.repeat({g}), fast = mean - slow;
  const double dropped = 1 - std::sqrt(mean_weight);
  double loss = 0;
  for (std::int64_t k = 0; k < g; ++k) {
    at::Tensor weight = at::zeros({d, d}, at::kDouble);
    for (std::int64_t h = 0; h < w.key_repeat(); ++h) {
      const at::Tensor rows = query.slice(0, (k * w.key_repeat() + h) * d, (k * w.key_repeat() + h + 1) * d);
      weight += at::matmul(at::matmul(rows, problem.moments.input), rows.t());
    }
    const at::Tensor b = basis.decoder.slice(0, k * d, (k + 1) * d);
    std::vector<at::Tensor> errors;
    at::Tensor average = at::zeros({d, g * d}, at::kDouble);
    for (std::int64_t tau = 0; tau < law.size(0); ++tau) {
      // Query at m, key at m - tau: both rotated to absolute positions and compared.
      const at::Tensor r = at::matmul(rotation(problem.frequencies, 50).t(),
                                      rotation(problem.frequencies, 50.0 - static_cast<double>(tau)));
      at::Tensor x = -at::matmul(at::matmul(b, r), basis.encoder);
      x.slice(1, k * d, (k + 1) * d) += r;
      average += law[tau] * x;
      errors.push_back(x);
    }
    for (std::int64_t tau = 0; tau < law.size(0); ++tau) {
      const at::Tensor& x = errors[static_cast<std::size_t>(tau)];
      const at::Tensor constant = at::mv(x - dropped * average, fast) + at::mv(x - average, slow);
      const at::Tensor error = at::matmul(at::matmul(x, sigma), x.t()) + at::outer(constant, constant);
      loss += (law[tau] * (weight * error).sum()).item<double>();
    }
  }
  return loss / static_cast<double>(d);
}

TEST(DistanceTest, triangular_law_is_that_of_uniform_causal_attention) {
  const at::Tensor law = triangular_law(5);
  at::Tensor count = at::zeros({5}, at::kDouble);
  for (std::int64_t m = 0; m < 5; ++m)
    for (std::int64_t n = 0; n <= m; ++n) count[m - n] += 1.0;
  EXPECT_LT(relative(law, count / count.sum()), 1e-14);
  EXPECT_THROW(triangular_law(0), InternalError);
}

TEST(DistanceTest, weight_of_keys_is_the_query_moment_seen_from_them) {
  const LayerProblem problem = problem_of(1, 8, kHeads, true);
  const GroupWeights group = group_of(problem.weights, {0, 1, 2, 3});
  KeyContext context;
  context.frequencies = problem.frequencies;
  context.distance_law = triangular_law(kContext);
  const Problem scores = rotating_key_problem(group, &problem.moments, Metric::act_query_dist, context);
  for (std::int64_t k = 0; k < kHeads; ++k) {
    at::Tensor expected = at::zeros({kDim, kDim}, at::kDouble);
    for (std::int64_t tau = 0; tau < kContext; ++tau) {
      const at::Tensor r = rotation(problem.frequencies, -static_cast<double>(tau));  // score = q^T R(n - m) k
      expected += context.distance_law[tau] * at::matmul(at::matmul(r.t(), query_gram(group, k, problem.moments)), r);
    }
    EXPECT_LT(relative(scores.lambda[static_cast<std::size_t>(k)], expected / kDim), 1e-12);
  }
  // A wrong sign of the distance would show.
  const Twist twist = Twist::rotation(problem.frequencies, context.distance_law);
  const at::Tensor gram = query_gram(group, 0, problem.moments);
  EXPECT_GT(relative(twist.forward(gram), twist.adjoint(gram)), 1e-3);
}

TEST(DistanceTest, loss_is_the_mean_over_all_distances) {
  for (const std::int64_t heads : {4, 8, 16})
    for (const std::int64_t band : {0, 1, 2, 4})
      for (const double mean_weight : {1.0, 0.1, 0.0}) {
        const LayerProblem problem = problem_of(2, heads, kHeads, true);
        FoldOptions options = options_of(KeyFold::rope_commuting, Metric::act_query_dist, band, 2);
        options.mean_weight = mean_weight;
        const Basis basis = key_basis(problem, heads_of(problem), options);
        const double expected = brute_force(problem, basis, triangular_law(kContext), band, mean_weight);
        EXPECT_LT(relative(basis.loss, expected), 1e-9) << heads << " " << band << " " << mean_weight;
        EXPECT_LT(relative(key_loss(problem, heads_of(problem), options, basis), expected), 1e-9);
        Basis nothing = basis;
        nothing.encoder = at::zeros_like(basis.encoder);
        EXPECT_LT(relative(basis.total, brute_force(problem, nothing, triangular_law(kContext), band, mean_weight)),
                  1e-9);
        EXPECT_LT(relative(basis.energies.slice(0, 0, kDim).sum().item<double>(), basis.total - basis.loss), 1e-9);
        EXPECT_LT(relative(basis.energies.sum().item<double>(), basis.total), 1e-9);
      }
}

TEST(DistanceTest, loss_of_every_fold_before_rotation_is_exact_for_the_measured_law) {
  LayerProblem problem = problem_of(3, 8, kHeads, true);
  at::Tensor law = at::exp(-0.2 * at::arange(25, at::kDouble));
  problem.moments.distance_law = law / law.sum();
  for (const KeyFold fold : {KeyFold::meanpool, KeyFold::procrustes, KeyFold::rope_commuting}) {
    const FoldOptions options = options_of(fold, Metric::act_query_dist);
    const Basis basis = key_basis(problem, heads_of(problem), options);
    EXPECT_LT(relative(basis.loss, brute_force(problem, basis, problem.moments.distance_law, 0)), 1e-9);
    EXPECT_LT(relative(key_total(problem, heads_of(problem), options), basis.total), 1e-9);
  }
}

/// Squared score errors of samples of Gaussian inputs at random distances, from folded weights as apply writes them.
struct Sampled {
  double loss, deviation;  ///< mean over samples and its standard error
};
Sampled sample_loss(const LayerProblem& problem, const Basis& basis, const at::Tensor& law, bool spread_phases) {
  const LayerWeights& w = problem.weights;
  const std::int64_t d = w.head_dim, g = w.kv_heads, repeat = w.key_repeat(), samples = 40000;
  Random random(77);
  const at::Tensor root = linalg::psd_root(problem.moments.input).root;
  const auto inputs = [&] {
    // E[x~ x~^T] is all that the loss knows of x~.
    return at::matmul(random.normal({samples, kHidden + 1}), root);
  };
  const at::Tensor key = at::matmul(inputs(), with_ones(w.key, w.key_bias).t());  // [n, g d]
  const at::Tensor query = at::matmul(inputs(), with_ones(w.query, w.query_bias).t()).view({samples, -1, d});
  const at::Tensor merged = at::matmul(key, basis.encoder.t());
  const std::int64_t half = d / 2;
  at::Tensor angle;
  if (spread_phases) {
    angle = random.uniform({samples, half}) * (2 * M_PI);
  } else {
    const at::Tensor tau = at::searchsorted(law.cumsum(0), random.uniform({samples})).to(at::kDouble);
    angle = -tau.unsqueeze(1) * problem.frequencies;
  }
  const at::Tensor c = at::cos(angle), s = at::sin(angle);
  const auto rotated = [&](const at::Tensor& x) {
    const at::Tensor a = x.slice(1, 0, half), b = x.slice(1, half);
    return at::cat({a * c - b * s, a * s + b * c}, 1);
  };
  at::Tensor squares = at::zeros({samples}, at::kDouble);
  const at::Tensor turned = rotated(merged);
  for (std::int64_t k = 0; k < g; ++k) {
    const at::Tensor plain = rotated(key.slice(1, k * d, (k + 1) * d));
    const at::Tensor b = basis.decoder.slice(0, k * d, (k + 1) * d);
    for (std::int64_t r = 0; r < repeat; ++r) {
      const at::Tensor q = query.select(1, k * repeat + r);
      squares += ((q * plain).sum(1) - (at::matmul(q, b) * turned).sum(1)).square() / static_cast<double>(d);
    }
  }
  return {squares.mean().item<double>(), (squares.std() / std::sqrt(static_cast<double>(samples))).item<double>()};
}

TEST(SampledTest, losses_are_the_score_error_of_samples) {
  for (const std::uint64_t seed : {11, 12}) {
    const LayerProblem problem = problem_of(seed, 8, kHeads, true, 0.0);
    const at::Tensor law = triangular_law(kContext);
    const auto check = [&](const FoldOptions& options, bool spread) {
      const Basis basis = key_basis(problem, heads_of(problem), options);
      const Sampled sampled = sample_loss(problem, basis, law, spread);
      EXPECT_LT(std::abs(sampled.loss - basis.loss), 4 * sampled.deviation) << name_of(options.key_metric);
      EXPECT_LT(sampled.deviation, 0.02 * basis.loss);
    };
    check(options_of(KeyFold::rope_commuting, Metric::act_query), true);
    check(options_of(KeyFold::rope_commuting, Metric::act_query_dist), false);
    check(options_of(KeyFold::rope_commuting, Metric::act_query_dist, 0, 3), false);
  }
  // In the band constants count by their variation alone: without constants nothing distinguishes them.
  LayerProblem problem = problem_of(13, 8, kHeads, false, 0.0);
  problem.moments.mean.zero_();
  problem.moments.input = problem.moments.centred;
  const FoldOptions options = options_of(KeyFold::rope_commuting, Metric::act_query_dist, 2, 3);
  const Basis basis = key_basis(problem, heads_of(problem), options);
  const Sampled sampled = sample_loss(problem, basis, triangular_law(kContext), false);
  EXPECT_LT(std::abs(sampled.loss - basis.loss), 4 * sampled.deviation);
}

TEST(SampledTest, a_rebuilt_latent_has_the_loss_of_its_metric) {
  const LayerProblem problem = problem_of(14, 8, kHeads, true, 0.0);
  for (const std::int64_t width : {3, 8, 20}) {
    const FoldOptions options = options_of(KeyFold::latent, Metric::act_query_dist);
    const Basis basis = key_basis(problem, heads_of(problem), options, width);
    ASSERT_EQ(basis.encoder.sizes(), (std::vector<std::int64_t>{width, kHeads * kDim}));
    // Rebuilt, then rotated: the encoder is the identity on what is compared, the decoder product does the work.
    const at::Tensor map = at::matmul(basis.decoder, basis.encoder);
    const at::Tensor law = triangular_law(kContext);
    double expected = 0;
    const at::Tensor key = with_ones(problem.weights.key, problem.weights.key_bias);
    const at::Tensor residual = at::matmul(at::eye(kHeads * kDim, at::kDouble) - map, key);
    const at::Tensor error = at::matmul(at::matmul(residual, problem.moments.input), residual.t());
    const GroupWeights group = group_of(problem.weights, heads_of(problem));
    for (std::int64_t k = 0; k < kHeads; ++k)
      for (std::int64_t tau = 0; tau < kContext; ++tau) {
        const at::Tensor r = rotation(problem.frequencies, -static_cast<double>(tau));
        const at::Tensor block = error.slice(0, k * kDim, (k + 1) * kDim).slice(1, k * kDim, (k + 1) * kDim);
        expected += (law[tau] * (query_gram(group, k, problem.moments) * at::matmul(at::matmul(r, block), r.t())).sum())
                        .item<double>() /
                    kDim;
      }
    EXPECT_LT(relative(basis.loss, expected), 1e-9);
  }
  // More channels than needed leave nothing; none or too many are refused.
  const FoldOptions act = options_of(KeyFold::latent, Metric::act);
  EXPECT_LT(key_basis(problem, heads_of(problem), act, kHeads * kDim).loss, 1e-9);
  EXPECT_THROW(key_basis(problem, heads_of(problem), act, kHeads * kDim + 1), UsageError);
  EXPECT_THROW(key_basis(problem, heads_of(problem), options_of(KeyFold::rope_commuting, Metric::act), 3),
               InternalError);
}

TEST(LatentTest, wider_is_better_and_metrics_win_at_what_they_measure) {
  const LayerProblem problem = problem_of(15, 8, kHeads, true);
  const auto heads = heads_of(problem);
  const FoldOptions scores = options_of(KeyFold::latent, Metric::act_query_dist);
  for (const std::int64_t width : {4, 8, 16}) {
    double last = 0;
    for (const Metric metric : {Metric::act_query_dist, Metric::act_query, Metric::act, Metric::weights}) {
      const double loss =
          key_loss(problem, heads, scores, key_basis(problem, heads, options_of(KeyFold::latent, metric), width));
      EXPECT_GT(loss, 1.0001 * last) << width << " " << name_of(metric);
      last = loss;
    }
    EXPECT_LT(key_basis(problem, heads, scores, width + 1).loss, key_basis(problem, heads, scores, width).loss);
  }
  // A latent of head_dim channels has more freedom than a commuting merge.
  EXPECT_LT(key_basis(problem, heads, scores, kDim).loss,
            key_basis(problem, heads, options_of(KeyFold::rope_commuting, Metric::act_query_dist, 0, 5)).loss);
}

TEST(OrderTest, better_metrics_give_smaller_score_errors) {
  for (std::uint64_t seed = 20; seed < 24; ++seed) {
    const LayerProblem problem = problem_of(seed, 8, kHeads, false);
    const auto heads = heads_of(problem);
    const FoldOptions scores = options_of(KeyFold::rope_commuting, Metric::act_query_dist);
    const auto loss = [&](const FoldOptions& options) {
      return key_loss(problem, heads, scores, key_basis(problem, heads, options));
    };
    const double weights = loss(options_of(KeyFold::rope_commuting, Metric::weights));
    const double act = loss(options_of(KeyFold::rope_commuting, Metric::act));
    const double query = loss(options_of(KeyFold::rope_commuting, Metric::act_query));
    const double distance = loss(scores);
    const double polished = loss(options_of(KeyFold::rope_commuting, Metric::act_query_dist, 0, 8));
    EXPECT_LT(act, weights) << seed;
    EXPECT_LT(query, act) << seed;
    EXPECT_LT(distance, query) << seed;
    EXPECT_LT(polished, 0.9999 * distance) << seed;
    EXPECT_LT(weights, loss(options_of(KeyFold::meanpool, Metric::act))) << seed;
    EXPECT_LT(query, loss(options_of(KeyFold::procrustes, Metric::act))) << seed;
  }
}

/// methods.md 10 and 13.1: heads of rank two over twice the heads (wide heads) hold every pair of heads of rank one.
TEST(OrderTest, rank_two_over_four_heads_is_never_worse_than_any_two_pairs) {
  const std::vector<std::pair<std::vector<std::int64_t>, std::vector<std::int64_t>>> partitions = {
      {{0, 1}, {2, 3}}, {{0, 2}, {1, 3}}, {{0, 3}, {1, 2}}};
  for (std::uint64_t seed = 30; seed < 36; ++seed) {
    const LayerProblem problem = problem_of(seed, 12, kHeads, false);
    const LayerWeights& w = problem.weights;
    const at::Tensor keys = at::matmul(w.key, problem.moments.input.slice(0, 0, kHidden).slice(1, 0, kHidden));
    const at::Tensor grams = complex_grams(at::matmul(keys, w.key.t()), kHeads);
    const at::Tensor queries = at::matmul(w.query, problem.moments.input.slice(0, 0, kHidden).slice(1, 0, kHidden));
    const at::Tensor energies = (queries * w.query).sum(1).view({kHeads, w.key_repeat(), 2, kDim / 2}).sum(1).sum(1);
    const auto loss_of_width = [&](std::int64_t width) {
      double loss = 0;
      for (std::int64_t l = 0; l < kDim / 2; ++l) {
        std::vector<at::Tensor> lambda;
        for (std::int64_t k = 0; k < kHeads; ++k) lambda.push_back(energies[k][l].view({1, 1}).to(at::kComplexDouble));
        loss += linalg::weighted_low_rank(grams[l], lambda, width).loss / (2.0 * kDim);
      }
      return loss;
    };
    const FoldOptions options = options_of(KeyFold::rope_commuting, Metric::act_query);
    // The problem written down here is the one that the fold solves.
    const double one = key_basis(problem, {0, 1, 2, 3}, options).loss;
    ASSERT_NEAR(loss_of_width(1), one, 1e-9 * one) << seed;
    const double wide = loss_of_width(2);
    for (const auto& [first, second] : partitions) {
      const double pairs = key_basis(problem, first, options).loss + key_basis(problem, second, options).loss;
      EXPECT_LE(wide, pairs * (1 + 1e-12)) << seed;
      EXPECT_LT(pairs, one) << seed;
    }
  }
}

TEST(PolishTest, no_sweep_raises_the_loss_and_a_band_never_hurts) {
  for (std::uint64_t seed = 30; seed < 32; ++seed) {
    const LayerProblem problem = problem_of(seed, kHeads, kHeads, true);
    const auto heads = heads_of(problem);
    std::vector<double> without;
    for (const std::int64_t band : {0, 1, 2, 4}) {
      double last = std::numeric_limits<double>::infinity();
      for (std::int64_t sweeps = 0; sweeps < 4; ++sweeps) {
        const double loss =
            key_basis(problem, heads, options_of(KeyFold::rope_commuting, Metric::act_query_dist, band, sweeps)).loss;
        EXPECT_LE(loss, last) << band << " " << sweeps;
        EXPECT_GT(loss, 0);
        last = loss;
      }
    }
    // Measured in one and the same quantity (constants of no pair dropped), a band's optimum is lower.
    LayerProblem centred = problem;
    centred.moments.mean = at::zeros({kHidden + 1}, at::kDouble);
    centred.moments.input = centred.moments.centred;
    centred.weights.query_bias = at::Tensor();
    centred.weights.key_bias = at::Tensor();
    double last = std::numeric_limits<double>::infinity();
    for (const std::int64_t band : {0, 1, 2, 4}) {
      const double loss =
          key_basis(centred, heads, options_of(KeyFold::rope_commuting, Metric::act_query_dist, band, 10)).loss;
      EXPECT_LT(loss, last * (1 + 1e-3)) << band;
      last = loss;
    }
  }
}

TEST(BandTest, a_band_that_does_not_turn_is_the_fold_without_rotation) {
  LayerProblem problem = problem_of(40, 8, kHeads, true);
  problem.frequencies = at::full({kDim / 2}, 1e-9, at::kDouble);
  const auto heads = heads_of(problem);
  LayerProblem still = problem;
  still.rotates = false;
  const Basis unrotated = key_basis(still, heads, options_of(KeyFold::norope, Metric::act_query));
  for (const Metric metric : {Metric::act_query, Metric::act_query_dist}) {
    const Basis band = key_basis(problem, heads, options_of(KeyFold::rope_commuting, metric, kDim / 2));
    EXPECT_LT(relative(band.loss, unrotated.loss), 1e-6);
    EXPECT_LT(relative(at::matmul(band.decoder, band.encoder), at::matmul(unrotated.decoder, unrotated.encoder)), 1e-5);
  }
}

TEST(BandTest, strongest_channels_sit_in_the_slowest_slots) {
  const LayerProblem problem = problem_of(41, kHeads, kHeads, false);
  const auto heads = heads_of(problem);
  const FoldOptions options = options_of(KeyFold::rope_commuting, Metric::act_query, 2);
  const Basis basis = key_basis(problem, heads, options);
  // Weighted energy of slot channels: b_j^T Lambda b_j a_j^T Sigma a_j = s_j^2 of the kernel.
  const GroupWeights group = group_of(problem.weights, heads);
  const at::Tensor centred = centred_key_gram(group, problem.moments);
  std::vector<double> strength;
  for (const std::int64_t row : band_rows(kDim, 2)) {
    double weight = 0;
    for (std::int64_t k = 0; k < kHeads; ++k) {
      const at::Tensor b = basis.decoder.slice(0, k * kDim, (k + 1) * kDim).select(1, row);
      weight += at::dot(b, at::mv(query_gram(group, k, problem.moments), b)).item<double>() / kDim;
    }
    const at::Tensor a = basis.encoder[row];
    strength.push_back(weight * at::dot(a, at::mv(centred, a)).item<double>());
  }
  EXPECT_EQ(band_rows(kDim, 2), (std::vector<std::int64_t>{3, 7, 2, 6}));
  for (std::size_t i = 1; i < strength.size(); ++i) EXPECT_LT(strength[i], strength[i - 1]);
  EXPECT_LT(relative(key_loss(problem, heads, options, basis), basis.loss), 1e-9);
  EXPECT_LT(relative(key_total(problem, heads, options), basis.total), 1e-9);
  // Nothing mixes band and other pairs.
  const at::Tensor view = basis.encoder.view({2, kDim / 2, kHeads, 2, kDim / 2});
  EXPECT_EQ(view.slice(1, 0, 2).slice(4, 2).abs().max().item<double>(), 0.0);
  EXPECT_EQ(view.slice(1, 2).slice(4, 0, 2).abs().max().item<double>(), 0.0);
}

TEST(BandTest, auto_takes_the_pairs_that_turn_by_less_than_half_a_radian) {
  LayerProblem problem = problem_of(42, kHeads, kHeads, false);
  FoldOptions options = options_of(KeyFold::rope_commuting, Metric::act_query, kSlowBandAuto);
  EXPECT_EQ(slow_band_of(problem, options), 1);  // 40 * 0.145^3 = 0.12; 40 * 0.145^2 = 0.84
  problem.context = 20;
  EXPECT_EQ(slow_band_of(problem, options), 2);
  options.slow_band = 3;
  EXPECT_EQ(slow_band_of(problem, options), 3);
}

TEST(GaugeTest, phases_that_the_model_does_not_see_change_no_loss_with_distances) {
  for (const std::int64_t band : {0, 2}) {
    LayerProblem problem = problem_of(50, 8, kHeads, false);
    const auto heads = heads_of(problem);
    const FoldOptions options = options_of(KeyFold::rope_commuting, Metric::act_query_dist, band, 2);
    const FoldOptions query = options_of(KeyFold::rope_commuting, Metric::act_query, band);
    const double before = key_basis(problem, heads, options).loss, plain = key_basis(problem, heads, query).loss;
    Random random(51);
    const at::Tensor phases = unit_phases(random, kHeads, kDim / 2);
    problem.weights.key = times_complex(problem.weights.key, phases);
    problem.weights.query = times_complex(problem.weights.query, phases.repeat_interleave(2, 0));
    EXPECT_LT(relative(key_basis(problem, heads, options).loss, before), 1e-7) << band;
    EXPECT_LT(relative(key_basis(problem, heads, query).loss, plain), 1e-10) << band;
  }
}

TEST(ExactTest, equal_heads_and_single_heads_lose_nothing) {
  LayerProblem problem = problem_of(60, 8, kHeads, false, 1.0, kDim, 0.0);  // equal up to complex numbers
  const auto heads = heads_of(problem);
  for (const std::int64_t band : {0, 2})
    for (const Metric metric : {Metric::weights, Metric::act, Metric::act_query, Metric::act_query_dist}) {
      const Basis basis = key_basis(problem, heads, options_of(KeyFold::rope_commuting, metric, band, 3));
      EXPECT_LT(std::abs(basis.loss), 1e-10 * basis.total) << band << name_of(metric);
      const Basis one =
          key_basis(problem_of(61, 8, 4, true), {2}, options_of(KeyFold::rope_commuting, metric, band, 3));
      EXPECT_LT(std::abs(one.loss), 1e-10 * one.total) << band << name_of(metric);
    }
  LayerProblem phases = problem;
  const at::Tensor common = problem.weights.key.slice(0, 0, kDim).repeat({kHeads, 1});
  Random random(62);
  phases.weights.key = times_complex(common, unit_phases(random, kHeads, kDim / 2));
  const Basis aligned = key_basis(phases, heads, options_of(KeyFold::procrustes, Metric::act_query));
  EXPECT_LT(std::abs(aligned.loss), 1e-10 * aligned.total);
  EXPECT_GT(key_basis(phases, heads, options_of(KeyFold::meanpool, Metric::act_query)).loss, 0.1 * aligned.total);
}

TEST(ExactTest, dead_heads_and_frequencies_give_finite_maps_in_every_fold) {
  LayerProblem problem = problem_of(63, kHeads, kHeads, false);
  LayerWeights& w = problem.weights;
  w.query.slice(0, 0, kDim).zero_();
  w.key.slice(0, kDim, 2 * kDim).zero_();
  w.key.view({kHeads, 2, kDim / 2, kHidden}).select(2, 1).zero_();
  w.query.view({kHeads, 2, kDim / 2, kHidden}).select(2, 2).zero_();
  w.query.view({kHeads, 2, kDim / 2, kHidden}).select(2, 3).zero_();
  const auto heads = heads_of(problem);
  for (const KeyFold fold : {KeyFold::rope_commuting, KeyFold::procrustes, KeyFold::latent, KeyFold::meanpool})
    for (const std::int64_t band : {0, 2, 4})
      for (const Metric metric : {Metric::weights, Metric::act, Metric::act_query, Metric::act_query_dist}) {
        const Basis basis =
            key_basis(problem, heads, options_of(fold, metric, fold == KeyFold::rope_commuting ? band : 0, 2));
        EXPECT_TRUE(at::isfinite(basis.encoder).all().item<bool>());
        EXPECT_TRUE(at::isfinite(basis.decoder).all().item<bool>());
        EXPECT_TRUE(std::isfinite(basis.loss));
        EXPECT_LT(basis.decoder.abs().max().item<double>(), 1e6);
        EXPECT_LT(basis.encoder.abs().max().item<double>(), 1e6);
        if (fold != KeyFold::meanpool && fold != KeyFold::procrustes) {
          EXPECT_LE(basis.loss, basis.total);
        }
      }
  // No keys at all.
  w.key.zero_();
  const Basis none = key_basis(problem, heads, options_of(KeyFold::rope_commuting, Metric::act_query_dist, 2, 2));
  EXPECT_TRUE(at::isfinite(none.encoder).all().item<bool>());
  EXPECT_EQ(none.loss, 0.0);
}

TEST(ExactTest, degenerate_eigenvalues_give_the_same_maps_again) {
  LayerProblem problem = problem_of(64, kHeads, kHeads, false);
  problem.moments = white_moments(kHidden);
  const auto [q, r] = at::linalg_qr(Random(65).normal({kHidden, kHeads * kDim}));
  problem.weights.key = q.t().contiguous();  // every Gram is the identity
  problem.weights.query = q.t().contiguous();
  for (const std::int64_t band : {0, 2}) {
    const FoldOptions options = options_of(KeyFold::rope_commuting, Metric::act_query_dist, band, 2);
    const Basis first = key_basis(problem, heads_of(problem), options),
                second = key_basis(problem, heads_of(problem), options);
    EXPECT_TRUE(first.encoder.equal(second.encoder));
    EXPECT_LT(relative(first.total, 4.0), 1e-9);  // sum over 4 heads of tr I / d
    EXPECT_LT(first.loss, 3.0 + 1e-9);            // one head's worth is kept at least
  }
}

TEST(FastPathTest, rotated_grams_give_the_same_fold) {
  for (const std::int64_t heads : {4, 16}) {
    LayerProblem problem = problem_of(70, heads, kHeads, true);
    const auto all = heads_of(problem);
    FoldOptions options = options_of(KeyFold::rope_commuting, Metric::act_query);
    for (const double mean_weight : {1.0, 0.1}) {
      options.mean_weight = mean_weight;
      const Basis slow = key_basis(problem, all, options);
      LayerProblem with_grams = problem;
      const at::Tensor key = with_ones(problem.weights.key, problem.weights.key_bias);
      const at::Tensor query = with_ones(problem.weights.query, problem.weights.query_bias);
      // Rotated Grams of tokens at three positions.
      at::Tensor keys = at::zeros({kHeads * kDim, kHeads * kDim}, at::kDouble);
      at::Tensor queries = at::zeros({heads, kDim, kDim}, at::kDouble);
      for (const double position : {1.0, 4.0, 17.0}) {
        const at::Tensor r = rotation(problem.frequencies, position);
        const auto rotated = [&](const at::Tensor& rows) {
          return at::matmul(r, rows.view({-1, kDim, kHidden + 1})).reshape({-1, kHidden + 1});
        };
        const at::Tensor k = rotated(key), q = rotated(query);
        keys += at::matmul(at::matmul(k, problem.moments.input), k.t()) / 3.0;
        for (std::int64_t h = 0; h < heads; ++h) {
          const at::Tensor rows = q.slice(0, h * kDim, (h + 1) * kDim);
          queries[h] += at::matmul(at::matmul(rows, problem.moments.input), rows.t()) / 3.0;
        }
      }
      with_grams.moments.rotated_keys = keys;
      with_grams.moments.rotated_queries = queries;
      const Basis fast = key_basis(with_grams, all, options);
      EXPECT_LT(relative(fast.loss, slow.loss), 1e-9);
      EXPECT_LT(relative(fast.encoder, slow.encoder), 1e-9);
      EXPECT_LT(relative(fast.decoder, slow.decoder), 1e-9);
      // The products with E[x x^T] are not formed: garbage there goes unnoticed.
      with_grams.moments.input = at::full({kHidden + 1, kHidden + 1}, std::nan(""), at::kDouble);
      EXPECT_LT(relative(key_basis(with_grams, all, options).loss, slow.loss), 1e-9);
      EXPECT_LT(relative(key_loss(with_grams, all, options, fast), slow.loss), 1e-9);
    }
    EXPECT_EQ(key_basis(problem, all, options).imaginary_share.size(), static_cast<std::size_t>(kDim / 2));
  }
}

TEST(SharesTest, of_planted_heads) {
  // Two heads: equal but for a phase of 90 degrees, so that the Gram's off-diagonal is imaginary.
  LayerProblem problem = problem_of(71, 2, 2, false, 0.0, kDim, 0.0);
  const at::Tensor common = problem.weights.key.slice(0, 0, kDim).repeat({2, 1});
  at::Tensor phases = at::ones({2, kDim / 2}, at::kComplexDouble);
  phases[1] *= at::complex(at::zeros({}, at::kDouble), at::ones({}, at::kDouble));
  problem.weights.key = times_complex(common, phases);
  const Basis basis = key_basis(problem, {0, 1}, options_of(KeyFold::rope_commuting, Metric::act));
  for (std::size_t l = 0; l < 4; ++l) {
    EXPECT_NEAR(basis.leading_share[l], 1.0, 1e-12);
    EXPECT_NEAR(basis.imaginary_share[l], std::sqrt(0.5), 1e-12);
  }
}

TEST(PostRotationTest, true_rotated_queries_are_used_when_they_are_there) {
  LayerProblem problem = problem_of(72, 8, kHeads, false);
  Random random(73);
  const at::Tensor x = random.normal({300, kHeads * kDim}) * at::logspace(0, -1, kHeads * kDim, 10.0, at::kDouble);
  problem.moments.rotated_keys = at::matmul(x.t(), x) / 300.0;
  const auto heads = heads_of(problem);
  const FoldOptions options = options_of(KeyFold::post_rotation, Metric::act_query);
  const Basis averaged = key_basis(problem, heads, options);
  at::Tensor queries = random.normal({8, kDim, 3});
  problem.moments.rotated_queries = at::matmul(queries, queries.transpose(1, 2));
  const Basis exact = key_basis(problem, heads, options);
  const auto score_error = [&](const Basis& basis) {
    const at::Tensor residual = at::eye(kHeads * kDim, at::kDouble) - at::matmul(basis.decoder, basis.encoder);
    const at::Tensor e = at::matmul(x, residual.t()).view({300, kHeads, 1, kDim, 1});
    const at::Tensor q = queries.view({1, kHeads, 2, kDim, 3});
    return ((q * e).sum(3).square().sum() / (300.0 * kDim)).item<double>();
  };
  EXPECT_LT(relative(exact.loss, score_error(exact)), 1e-9);
  EXPECT_LT(relative(key_loss(problem, heads, options, averaged), score_error(averaged)), 1e-9);
  EXPECT_LT(exact.loss, 0.99 * score_error(averaged));
}

TEST(ProcrustesTest, merged_keys_have_the_energy_of_their_sources) {
  const LayerProblem problem = problem_of(80, 8, kHeads, true);
  for (const bool rotates : {true, false}) {
    LayerProblem one = problem;
    one.rotates = rotates;
    const FoldOptions options = options_of(KeyFold::procrustes, Metric::act);
    const Basis basis = key_basis(one, heads_of(problem), options);
    const GroupWeights group = group_of(problem.weights, heads_of(problem));
    const at::Tensor sigma = rotates ? key_gram(group, problem.moments) : centred_key_gram(group, problem.moments);
    const double merged = at::matmul(at::matmul(basis.encoder, sigma), basis.encoder.t()).trace().item<double>();
    EXPECT_LT(relative(merged, sigma.trace().item<double>() / kHeads), 1e-10);
    for (std::int64_t k = 0; k < kHeads; ++k) {
      const at::Tensor turn = basis.decoder.slice(0, k * kDim, (k + 1) * kDim);
      EXPECT_LT(relative(at::matmul(turn, turn.t()), at::eye(kDim, at::kDouble)), 1e-10);
      if (rotates) {
        const at::Tensor r = rotation(problem.frequencies, 7);
        EXPECT_LT(relative(at::matmul(turn, r), at::matmul(r, turn)), 1e-10);
      }
    }
    EXPECT_LT(basis.loss, key_basis(one, heads_of(problem), options_of(KeyFold::meanpool, Metric::act)).loss);
  }
}

TEST(MeanWeightTest, constants_of_keys_count_as_asked) {
  const LayerProblem problem = problem_of(81, 8, kHeads, true, 4.0);
  const auto heads = heads_of(problem);
  const GroupWeights group = group_of(problem.weights, heads);
  for (const double rho : {1.0, 0.1, 0.0}) {
    for (const KeyFold fold : {KeyFold::rope_commuting, KeyFold::latent, KeyFold::meanpool}) {
      FoldOptions options = options_of(fold, Metric::act_query);
      options.mean_weight = rho;
      const at::Tensor mean = key_mean(group, problem.moments);
      Problem expected = rotating_key_problem(group, &problem.moments, Metric::act_query);
      expected.sigma = centred_key_gram(group, problem.moments) + rho * at::outer(mean, mean);
      const Basis basis = key_basis(problem, heads, options);
      EXPECT_LT(relative(basis.loss, loss_of(expected, basis.encoder, basis.decoder)), 1e-9);
      EXPECT_LT(relative(basis.total, total_of(expected)), 1e-9);
    }
  }
}

TEST(MinimumTest, conjugate_gradients_find_what_the_factorisation_finds) {
  Random random(90);
  const auto psd = [&](std::int64_t n) {
    const at::Tensor x = random.normal({2 * n, n});
    return at::matmul(x.t(), x);
  };
  for (const std::int64_t band : {0, 1, 4}) {
    const std::vector<std::pair<at::Tensor, at::Tensor>> terms = {{psd(kDim), psd(3 * kDim)},
                                                                  {psd(kDim), psd(3 * kDim)}};
    const at::Tensor rhs = random.normal({kDim, 3 * kDim}), start = at::zeros_like(rhs);
    const auto objective = [&](const at::Tensor& x) {
      double sum = -2 * (rhs * x).sum().item<double>();
      for (const auto& [left, right] : terms) sum += (at::matmul(left, x) * at::matmul(x, right)).sum().item<double>();
      return sum;
    };
    const at::Tensor dense = structured_minimum(terms, rhs, band, start);
    const at::Tensor iterated = structured_minimum(terms, rhs, band, start, 0);
    EXPECT_LT(relative(iterated, dense), 1e-6) << band;
    EXPECT_LT(objective(dense), 0);
    // A minimum: no small step inside the structure goes lower.
    for (int i = 0; i < 20; ++i) {
      const at::Tensor goal = random.normal({kDim, 3 * kDim});
      const at::Tensor inside =
          structured_minimum({{at::eye(kDim, at::kDouble), at::eye(3 * kDim, at::kDouble)}}, goal, band, start);
      EXPECT_GT(objective(dense + 1e-3 * inside), objective(dense));
      EXPECT_LE(inside.norm().item<double>(), goal.norm().item<double>() * (1 + 1e-9));  // a projection
    }
  }
}

}  // namespace
}  // namespace headfold::folding
