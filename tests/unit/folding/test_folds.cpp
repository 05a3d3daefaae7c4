// The folds against what the mathematics promises (docs/methods.md, section "Property tests").

#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <headfold/base/error.h>
#include <headfold/folding/apply.h>
#include <headfold/folding/comparison.h>

#include "instances.h"

namespace headfold::folding {
namespace {

LayerTarget target_of(Groups groups, const LayerProblem& problem) {
  return {std::move(groups), problem.weights.head_dim, problem.weights.head_dim};
}

using namespace testing_support;

constexpr std::int64_t kHeads = 4, kDim = 8, kHidden = 48;

at::Tensor product(const Basis& basis) {
  return at::matmul(basis.decoder, basis.encoder);
}

at::Tensor symmetric(const at::Tensor& rows, const at::Tensor& moment) {
  return at::matmul(at::matmul(rows, moment), rows.t());
}

GroupWeights whole_layer(const LayerWeights& w) {
  std::vector<std::int64_t> heads;
  for (std::int64_t k = 0; k < w.kv_heads; ++k) heads.push_back(k);
  return group_of(w, heads);
}

// ------------------------------------------------------------------------------------------- metrics agree where they
// must

TEST(MetricTest, act_with_white_inputs_equals_weights) {
  const LayerWeights w = random_layer(1, kHeads, kHeads, kDim, kHidden, false);
  const LayerMoments white = white_moments(kHidden);
  const GroupWeights group = whole_layer(w);
  const at::Tensor gram = at::matmul(w.key, w.key.t());
  const std::vector<std::pair<Basis, Basis>> pairs = {
      {fold_keys_rope_commuting(group, &white, Metric::act, 0),
       fold_keys_rope_commuting(group, nullptr, Metric::weights, 0)},
      {fold_keys_norope(group, &white, Metric::act, 0), fold_keys_norope(group, nullptr, Metric::weights, 0)},
      {fold_keys_post_rotation(group, &white, gram, Metric::act, 0),
       fold_keys_post_rotation(group, nullptr, {}, Metric::weights, 0)},
      {fold_values_svd(values_of(w, &white, Metric::act), kDim),
       fold_values_svd(values_of(w, nullptr, Metric::weights), kDim)},
      {fold_keys_meanpool(group, &white, Metric::act, true),
       fold_keys_meanpool(group, nullptr, Metric::weights, true)}};
  for (const auto& [act, weights] : pairs) {
    EXPECT_LT(relative(product(act), product(weights)), 1e-10);
    EXPECT_LT(relative(act.loss, weights.loss), 1e-10);
    EXPECT_GT(weights.loss, 0.01 * weights.total);  // the instance is not trivial
  }
}

TEST(MetricTest, weights_metric_is_the_truncated_svd_of_the_stacked_weights) {
  const LayerWeights w = random_layer(2, kHeads, kHeads, kDim, kHidden, false);
  const auto [u, s, v] = at::svd(w.value);
  const at::Tensor kept = u.slice(1, 0, kDim);
  const Basis basis = fold_values_svd(values_of(w, nullptr, Metric::weights), kDim);
  EXPECT_LT(relative(product(basis), at::matmul(kept, kept.t())), 1e-9);
  EXPECT_LT(relative(basis.loss, s.slice(0, kDim).square().sum().item<double>()), 1e-10);
}

// ------------------------------------------------------------------------------------------- keys without rotation

TEST(NoRopeTest, loss_is_the_mean_squared_score_error_of_its_own_basis) {
  const LayerWeights w = random_layer(3, 8, kHeads, kDim, kHidden, true);  // two query heads per KV head
  const LayerMoments moments = random_moments(4, kHidden);
  const GroupWeights group = whole_layer(w);
  const Basis basis = fold_keys_norope(group, &moments, Metric::act_query, 0);
  const at::Tensor residual = at::eye(kHeads * kDim, at::kDouble) - product(basis);
  const at::Tensor error = symmetric(at::matmul(residual, group.key), moments.centred);
  double expected = 0;
  for (std::int64_t k = 0; k < kHeads; ++k)
    for (std::int64_t h = 0; h < 2; ++h) {
      const at::Tensor q = group.queries[static_cast<std::size_t>(k)].slice(0, h * kDim, (h + 1) * kDim);
      expected += at::matmul(symmetric(q, moments.input),
                             error.slice(0, k * kDim, (k + 1) * kDim).slice(1, k * kDim, (k + 1) * kDim))
                      .trace()
                      .item<double>() /
                  kDim;
    }
  EXPECT_LT(relative(basis.loss, expected), 1e-10);
}

TEST(NoRopeTest, latent_channels_are_uncorrelated) {
  const LayerWeights w = random_layer(5, kHeads, kHeads, kDim, kHidden, true);
  const LayerMoments moments = random_moments(6, kHidden);
  const GroupWeights group = whole_layer(w);
  for (const Metric metric : {Metric::act, Metric::act_query}) {
    const Basis basis = fold_keys_norope(group, &moments, metric, 0);
    const at::Tensor gram = symmetric(at::matmul(basis.encoder, group.key), moments.centred);
    EXPECT_LT(relative(gram, at::diag(basis.energies.slice(0, 0, kDim))), 1e-10);
    EXPECT_LT(relative(basis.energies.slice(0, 0, kDim).sum().item<double>(), basis.total - basis.loss), 1e-10);
  }
}

TEST(NoRopeTest, query_weighting_beats_every_other_basis_in_score_error) {
  const LayerWeights w = random_layer(7, kHeads, kHeads, kDim, kHidden, true);
  const LayerMoments moments = random_moments(8, kHidden);
  const GroupWeights group = whole_layer(w);
  const Problem scores = unrotated_key_problem(group, &moments, Metric::act_query);
  const auto loss = [&](const Basis& basis) { return loss_of(scores, basis.encoder, basis.decoder); };
  const double best = loss(fold_keys_norope(group, &moments, Metric::act_query, 0));
  const double act = loss(fold_keys_norope(group, &moments, Metric::act, 0));
  const double weights = loss(fold_keys_norope(group, nullptr, Metric::weights, 0));
  const double mean = loss(fold_keys_meanpool(group, &moments, Metric::act_query, false));
  EXPECT_LT(best, 0.999 * act);
  EXPECT_LT(act, 0.999 * weights);
  EXPECT_LT(act, 0.999 * mean);
}

TEST(NoRopeTest, loss_equals_the_measured_score_error) {
  const LayerWeights w = random_layer(9, kHeads, kHeads, kDim, kHidden, false);
  const LayerMoments moments = random_moments(10, kHidden, 0.0);
  const GroupWeights group = whole_layer(w);
  const Basis basis = fold_keys_norope(group, &moments, Metric::act_query, 0);
  Random random(11);
  const std::int64_t samples = 20000;
  const at::Tensor root = linalg::psd_root(moments.centred.slice(0, 0, kHidden).slice(1, 0, kHidden)).root;
  const at::Tensor q =
      at::matmul(random.normal({samples, kHidden}), at::matmul(root, w.query.t())).view({samples, kHeads, kDim});
  const at::Tensor k = at::matmul(random.normal({samples, kHidden}), at::matmul(root, w.key.t()));
  const at::Tensor error = (k - at::matmul(k, product(basis).t())).view({samples, kHeads, kDim});
  const double measured = (q * error).sum(2).square().sum(1).mean().item<double>() / kDim;
  EXPECT_LT(relative(measured, basis.loss), 0.02);
}

TEST(GroupOfOneTest, is_reproduced) {
  const LayerWeights w = random_layer(17, 2, 1, kDim, kHidden, true);
  const LayerMoments moments = random_moments(18, kHidden);
  const GroupWeights group = whole_layer(w);
  const at::Tensor one = at::eye(kDim, at::kDouble);
  for (const Metric metric : {Metric::weights, Metric::act, Metric::act_query}) {
    EXPECT_LT(relative(product(fold_keys_norope(group, &moments, metric, 0)), one), 1e-9);
    EXPECT_LT(relative(product(fold_keys_rope_commuting(group, &moments, metric, 0)), one), 1e-9);
    if (metric == Metric::act_query) continue;
    EXPECT_LT(relative(product(fold_values_svd(values_of(w, &moments, metric, true), group.head_dim)), one), 1e-9);
  }
}

// ------------------------------------------------------------------------------------------- keys that commute with
// the rotation

TEST(RopeCommutingTest, maps_commute_with_every_rotation) {
  const LayerWeights w = random_layer(12, kHeads, kHeads, kDim, kHidden, false);
  const LayerMoments moments = random_moments(13, kHidden);
  const Basis basis = fold_keys_rope_commuting(whole_layer(w), &moments, Metric::act_query, 0);
  const at::Tensor angle = at::arange(1, kDim / 2 + 1, at::kDouble);
  const at::Tensor c = at::diag(at::cos(angle)), s = at::diag(at::sin(angle));
  const at::Tensor rotation = at::cat({at::cat({c, -s}, 1), at::cat({s, c}, 1)}, 0);
  const at::Tensor all = at::kron(at::eye(kHeads, at::kDouble), rotation);
  EXPECT_LT(relative(at::matmul(rotation, basis.encoder), at::matmul(basis.encoder, all)), 1e-12);
  EXPECT_LT(relative(at::matmul(all, basis.decoder), at::matmul(basis.decoder, rotation)), 1e-12);
}

TEST(RopeCommutingTest, loss_equals_its_basis_in_the_phase_averaged_problem) {
  const LayerWeights w = random_layer(14, 8, kHeads, kDim, kHidden, true);
  const LayerMoments moments = random_moments(15, kHidden);
  const GroupWeights group = whole_layer(w);
  for (const Metric metric : {Metric::weights, Metric::act, Metric::act_query}) {
    const Basis basis = fold_keys_rope_commuting(group, &moments, metric, 0);
    const Problem problem = rotating_key_problem(group, &moments, metric);
    EXPECT_LT(relative(basis.loss, loss_of(problem, basis.encoder, basis.decoder)), 1e-10);
    const double nothing = loss_of(problem, at::zeros_like(basis.encoder), at::zeros_like(basis.decoder));
    EXPECT_LT(relative(basis.total, nothing), 1e-10);
    EXPECT_LT(relative(basis.energies.slice(0, 0, kDim).sum().item<double>(), basis.total - basis.loss), 1e-10);
    EXPECT_EQ(basis.energies.numel(), kHeads * kDim);
  }
}

TEST(RopeCommutingTest, merged_keys_carry_the_mean_energy_of_the_source_keys) {
  const LayerWeights w = random_layer(16, kHeads, kHeads, kDim, kHidden, false);
  const LayerMoments moments = random_moments(17, kHidden);
  const GroupWeights group = whole_layer(w);
  const Basis basis = fold_keys_rope_commuting(group, &moments, Metric::act_query, 0);
  const at::Tensor merged =
      symmetric(at::matmul(basis.encoder, group.key), moments.input).diagonal().view({2, kDim / 2}).sum(0);
  const at::Tensor source = symmetric(group.key, moments.input).diagonal().view({kHeads, 2, kDim / 2}).sum(1).mean(0);
  EXPECT_LT(relative(merged, source), 1e-10);
}

/// Mean over samples of sum_h (score - folded score)^2 with independent q and k and random distances, and of sum_h
/// score^2.
std::pair<double, double> measured_score_error(const LayerWeights& w, const LayerMoments& moments, const Basis& basis,
                                               std::int64_t samples, std::uint64_t seed) {
  Random random(seed);
  const std::int64_t half = w.head_dim / 2, repeat = w.key_repeat();
  const at::Tensor root = linalg::psd_root(moments.centred.slice(0, 0, w.hidden).slice(1, 0, w.hidden)).root;
  const at::Tensor q =
      at::matmul(random.normal({samples, w.hidden}), at::matmul(root, w.query.t())).view({samples, w.heads, 2, half});
  const at::Tensor k = at::matmul(random.normal({samples, w.hidden}), at::matmul(root, w.key.t()));
  const at::Tensor rebuilt = at::matmul(k, product(basis).t());
  // Phases theta_l t of random distances: far more turns than a context has, so that they spread over the circle, which
  // (1) assumes.
  const at::Tensor t = at::floor(random.uniform({samples, 1}) * 4e6);
  const at::Tensor phase =
      t *
      at::pow(at::full({1}, 1e4, at::kDouble), -at::arange(half, at::kDouble) / static_cast<double>(half)).unsqueeze(0);
  const at::Tensor turn = at::complex(at::cos(phase), at::sin(phase)).unsqueeze(1);  // [samples, 1, half]
  const auto scores = [&](const at::Tensor& keys) {
    const at::Tensor pairs = keys.view({samples, w.kv_heads, 2, half}).repeat_interleave(repeat, 1);
    const at::Tensor key = at::complex(pairs.select(2, 0).contiguous(), pairs.select(2, 1).contiguous());
    const at::Tensor query = at::complex(q.select(2, 0).contiguous(), q.select(2, 1).contiguous());
    return at::real(at::conj(query) * key * turn).sum(2) / std::sqrt(static_cast<double>(w.head_dim));
  };
  const at::Tensor exact = scores(k);
  return {(exact - scores(rebuilt)).square().sum(1).mean().item<double>(), exact.square().sum(1).mean().item<double>()};
}

TEST(RopeCommutingTest, loss_equals_the_measured_score_error) {
  for (const std::uint64_t seed : {20, 21}) {
    const LayerWeights w = random_layer(seed, 8, kHeads, kDim, kHidden, false);
    const LayerMoments moments = random_moments(seed + 100, kHidden, 0.0);
    const Basis basis = fold_keys_rope_commuting(whole_layer(w), &moments, Metric::act_query, 0);
    const auto [error, total] = measured_score_error(w, moments, basis, 20000, seed);
    EXPECT_LT(relative(error, basis.loss), 0.02) << error << " " << basis.loss;
    EXPECT_LT(relative(total, basis.total), 0.02) << total << " " << basis.total;
  }
}

TEST(RopeCommutingTest, meanpool_loss_equals_the_measured_score_error) {
  const LayerWeights w = random_layer(22, kHeads, kHeads, kDim, kHidden, false);
  const LayerMoments moments = random_moments(23, kHidden, 0.0);
  const Basis basis = fold_keys_meanpool(whole_layer(w), &moments, Metric::act_query, true);
  const auto [error, total] = measured_score_error(w, moments, basis, 20000, 24);
  EXPECT_LT(relative(error, basis.loss), 0.02);
}

TEST(RopeCommutingTest, query_weighting_beats_activations_beats_the_mean) {
  for (const std::uint64_t seed : {30, 31, 32}) {
    const LayerWeights w = random_layer(seed, kHeads, kHeads, kDim, kHidden, false);
    const LayerMoments moments = random_moments(seed + 50, kHidden);
    const GroupWeights group = whole_layer(w);
    const Problem scores = rotating_key_problem(group, &moments, Metric::act_query);
    const auto loss = [&](const Basis& basis) { return loss_of(scores, basis.encoder, basis.decoder); };
    const double query = loss(fold_keys_rope_commuting(group, &moments, Metric::act_query, 0));
    const double act = loss(fold_keys_rope_commuting(group, &moments, Metric::act, 0));
    const double mean = loss(fold_keys_meanpool(group, &moments, Metric::act_query, true));
    EXPECT_LT(query, 0.999 * act);
    EXPECT_LT(act, 0.5 * mean);
  }
}

TEST(RopeCommutingTest, loss_does_not_see_phases_that_the_model_does_not_see) {
  LayerWeights w = random_layer(40, 8, kHeads, kDim, kHidden, false);
  const LayerMoments moments = random_moments(41, kHidden);
  const Basis before = fold_keys_rope_commuting(whole_layer(w), &moments, Metric::act_query, 0);
  const double mean_before = fold_keys_meanpool(whole_layer(w), &moments, Metric::act_query, true).loss;
  Random random(42);
  const at::Tensor phases = unit_phases(random, kHeads, kDim / 2);
  w.key = times_complex(w.key, phases);
  w.query = times_complex(w.query, phases.repeat_interleave(2, 0));
  const Basis after = fold_keys_rope_commuting(whole_layer(w), &moments, Metric::act_query, 0);
  EXPECT_LT(relative(after.loss, before.loss), 1e-10);
  EXPECT_LT(relative(after.total, before.total), 1e-10);
  EXPECT_GT(relative(fold_keys_meanpool(whole_layer(w), &moments, Metric::act_query, true).loss, mean_before), 1e-3);
}

TEST(RopeCommutingTest, heads_equal_up_to_a_complex_number_per_frequency_merge_without_loss) {
  const LayerWeights w = random_layer(43, kHeads, kHeads, kDim, kHidden, false, 0.0);
  const LayerMoments moments = random_moments(44, kHidden);
  const GroupWeights group = whole_layer(w);
  const Basis basis = fold_keys_rope_commuting(group, &moments, Metric::act_query, 0);
  EXPECT_LT(std::abs(basis.loss), 1e-12 * basis.total);
  EXPECT_LT(relative(at::matmul(product(basis), w.key), w.key), 1e-10);
  EXPECT_GT(fold_keys_meanpool(group, &moments, Metric::act_query, true).loss, 0.1 * basis.total);
}

TEST(RopeCommutingTest, dead_heads_and_frequencies_give_finite_maps) {
  LayerWeights w = random_layer(45, kHeads, kHeads, kDim, kHidden, false);
  const LayerMoments moments = random_moments(46, kHidden);
  w.query.slice(0, 0, kDim).zero_();                                  // a head that asks nothing
  w.key.view({kHeads, 2, kDim / 2, kHidden}).select(2, 1).zero_();    // a frequency without keys
  w.query.view({kHeads, 2, kDim / 2, kHidden}).select(2, 2).zero_();  // a frequency nobody asks
  const Basis basis = fold_keys_rope_commuting(whole_layer(w), &moments, Metric::act_query, 0);
  EXPECT_TRUE(at::isfinite(basis.encoder).all().item<bool>());
  EXPECT_TRUE(at::isfinite(basis.decoder).all().item<bool>());
  EXPECT_EQ(basis.encoder[1].abs().max().item<double>(), 0.0);
  EXPECT_GT(basis.encoder[0].abs().max().item<double>(), 0.0);
  EXPECT_LT(basis.loss, basis.total);
}

// ------------------------------------------------------------------------------------------- post-rotation

TEST(PostRotationTest, basis_is_the_strongest_directions_of_the_rotated_gram) {
  const LayerWeights w = random_layer(50, kHeads, kHeads, kDim, kHidden, false);
  Random random(51);
  const at::Tensor x = random.normal({300, kHeads * kDim}) * at::logspace(0, -2, kHeads * kDim, 10.0, at::kDouble);
  const at::Tensor gram = at::matmul(x.t(), x) / 300.0;
  const LayerMoments moments = random_moments(52, kHidden);
  const Basis basis = fold_keys_post_rotation(whole_layer(w), &moments, gram, Metric::act, 0);
  EXPECT_LT(relative(at::matmul(basis.encoder, basis.encoder.t()), at::eye(kDim, at::kDouble)), 1e-12);
  EXPECT_LT(relative(basis.decoder, basis.encoder.t()), 1e-12);
  const double measured = (x - at::matmul(x, product(basis).t())).square().sum(1).mean().item<double>();
  EXPECT_LT(relative(basis.loss, measured), 1e-10);
  const Basis weighted = fold_keys_post_rotation(whole_layer(w), &moments, gram, Metric::act_query, 0);
  Problem scores = rotating_key_problem(whole_layer(w), &moments, Metric::act_query);
  scores.sigma = gram;
  EXPECT_LT(relative(weighted.loss, loss_of(scores, weighted.encoder, weighted.decoder)), 1e-9);
  EXPECT_LT(weighted.loss, 0.999 * loss_of(scores, basis.encoder, basis.decoder));
  EXPECT_THROW(fold_keys_post_rotation(whole_layer(w), &moments, {}, Metric::act, 0), InputError);
}

TEST(MomentsTest, sinks_enter_the_rotated_gram_with_their_weight_and_bias) {
  const LayerWeights w = random_layer(53, 2, 2, kDim, kHidden, true);
  Random random(54);
  const at::Tensor x = random.normal({20, kHidden}), x0 = random.normal({3, kHidden});
  calibration::LayerStatistics s;
  s.count = 20;
  s.count_0 = 3;
  s.sum = x.sum(0);
  s.sum_0 = x0.sum(0);
  s.moment = at::matmul(x.t(), x);
  s.moment_0 = at::matmul(x0.t(), x0);
  const at::Tensor keys = at::matmul(x, w.key.t()) + w.key_bias, keys0 = at::matmul(x0, w.key.t()) + w.key_bias;
  s.rotated_keys = at::matmul(keys.t(), keys);
  const LayerMoments half = moments_of(s, w, 0.5);
  EXPECT_LT(relative(half.rotated_keys.full(), (s.rotated_keys + 0.5 * at::matmul(keys0.t(), keys0)) / 21.5), 1e-12);
  EXPECT_LT(relative(moments_of(s, w, 0.0).rotated_keys.full(), s.rotated_keys / 20.0), 1e-12);
  // Values likewise, from packed sums as well, by blocks; a thin factor stands for few sequences, the whole for many.
  const at::Tensor values = at::matmul(x, w.value.t()) + w.value_bias,
                   values0 = at::matmul(x0, w.value.t()) + w.value_bias;
  s.values = at::matmul(values.t(), values);
  const at::Tensor expected = (s.values + 0.5 * at::matmul(values0.t(), values0)) / 21.5;
  EXPECT_LT(relative(moments_of(s, w, 0.5).values.full(), expected), 1e-12);
  for (const double factors : {1.0, 40.0}) {  // of 3 sequences, and as if of 120
    calibration::LayerStatistics packed = s;
    packed.count_0 *= factors;
    packed.sum_0 = s.sum_0 * factors;
    packed.moment_0 = linalg::pack_lower(s.moment_0 * factors);
    packed.rotated_keys = linalg::pack_lower(s.rotated_keys);
    packed.values = linalg::pack_lower(s.values);
    const LayerMoments found = moments_of(packed, w, 0.5 / factors, {false, false});
    EXPECT_FALSE(found.input.defined());
    EXPECT_LT(relative(found.values.full(), expected), 1e-12);
    EXPECT_LT(relative(found.rotated_keys.full(), half.rotated_keys.full()), 1e-12);
    const at::Tensor rows = block_index({1}, kDim);
    EXPECT_LT(relative(found.values.block(rows), expected.index_select(0, rows).index_select(1, rows)), 1e-12);
  }
  const at::Tensor ones = at::ones({20, 1}, at::kDouble);
  const at::Tensor plain = at::cat({x, ones}, 1);
  EXPECT_LT(relative(moments_of(s, w, 0.0).input, at::matmul(plain.t(), plain) / 20.0), 1e-12);
  const at::Tensor centred = plain - plain.mean(0);
  EXPECT_LT(relative(moments_of(s, w, 0.0).centred, at::matmul(centred.t(), centred) / 20.0), 1e-10);
  LayerWeights other = w;
  other.hidden = kHidden + 1;
  EXPECT_THROW(moments_of(s, other, 1.0), InputError);

  EXPECT_FALSE(half.rotated_queries.defined() || half.distance_law.defined() || half.attended.defined());
  s.attention_count = 23;
  s.attended_heads = 2;
  s.rotated_queries = random.normal({w.heads, kDim, kDim});
  s.attended = random.normal({w.heads, 2 * kDim, 2 * kDim});
  s.attended_sum = random.normal({w.heads, 2 * kDim});
  s.distance_mass = random.normal({w.heads, 9}).abs();
  const LayerMoments all = moments_of(s, w, 0.5);
  EXPECT_LT(relative(all.rotated_queries, s.rotated_queries / 23.0), 1e-15);
  EXPECT_LT(relative(all.attended, s.attended / 23.0), 1e-15);
  EXPECT_LT(relative(all.attended_mean, s.attended_sum / 23.0), 1e-15);
  EXPECT_EQ(all.attended_heads, 2);
  EXPECT_NEAR(all.distance_law.sum().item<double>(), 1, 1e-14);
  EXPECT_LT(relative(all.distance_law * s.distance_mass.sum(), s.distance_mass.sum(0)), 1e-14);
  s.attended_heads = 3;  // does not divide two KV heads
  EXPECT_THROW(moments_of(s, w, 0.5), InputError);
  s.attended_heads = 2;
  s.rotated_queries = random.normal({w.heads + 1, kDim, kDim});
  EXPECT_THROW(moments_of(s, w, 0.5), InputError);
}

// ------------------------------------------------------------------------------------------- values

TEST(ValuesTest, loss_equals_the_error_on_the_fitting_sample) {
  const LayerWeights w = random_layer(60, kHeads, kHeads, kDim, kHidden, true);
  Random random(61);
  const at::Tensor x = at::cat({random.normal({500, kHidden}) + 1.0, at::ones({500, 1}, at::kDouble)}, 1);
  LayerMoments moments;
  moments.mean = x.mean(0);
  moments.input = at::matmul(x.t(), x) / 500.0;
  moments.centred = moments.input - at::outer(moments.mean, moments.mean);
  const GroupWeights group = whole_layer(w);
  for (const bool centred : {false, true}) {
    at::Tensor v = at::matmul(x, group.value.t());
    if (centred) v = v - v.mean(0);
    for (const bool mean : {false, true}) {
      const Basis basis = mean ? fold_values_meanpool(values_of(w, &moments, Metric::act, centred))
                               : fold_values_svd(values_of(w, &moments, Metric::act, centred), kDim);
      const double measured = (v - at::matmul(v, product(basis).t())).square().sum(1).mean().item<double>();
      EXPECT_LT(relative(basis.loss, measured), 1e-9);
    }
  }
}

/// Attention output of constant values: every head passes its value through.
at::Tensor output_of_constant(const at::Tensor& value, const at::Tensor& output, const at::Tensor& bias,
                              std::int64_t heads, std::int64_t d) {
  const at::Tensor per_head = value.view({-1, d}).repeat_interleave(heads * d / value.numel(), 0).reshape({-1});
  return at::matmul(output, per_head) + bias;
}

TEST(ValuesTest, the_mean_value_passes_a_centred_fold_exactly) {
  for (const std::int64_t heads : {4, 8}) {
    LayerProblem problem;
    problem.weights = random_layer(62, heads, 4, kDim, kHidden, true);
    problem.moments = random_moments(63, kHidden, 3.0);
    problem.has_moments = true;
    problem.centred_values = true;
    FoldOptions options;
    options.keys = KeyFold::norope;
    options.kv_heads = 2;
    const NewTensors made = folded_values(problem, target_of({{0, 1}, {2, 3}}, problem), options);
    const LayerWeights& w = problem.weights;
    const at::Tensor mu = problem.moments.mean.slice(0, 0, kHidden);
    const at::Tensor before =
        output_of_constant(at::matmul(w.value, mu) + w.value_bias, w.output, w.output_bias, heads, kDim);
    const at::Tensor after = output_of_constant(at::matmul(made.at("value.weight"), mu) + made.at("value.bias"),
                                                made.at("dense.weight"), made.at("dense.bias"), heads, kDim);
    EXPECT_LT(relative(after, before), 1e-12);
    EXPECT_GT(relative(made.at("dense.bias"), w.output_bias), 1e-3);
    // Without statistics the bias is all that is known of the mean; it passes too.
    problem.has_moments = false;
    options.value_metric = Metric::weights;
    const NewTensors plain = folded_values(problem, target_of({{0, 1}, {2, 3}}, problem), options);
    EXPECT_LT(relative(output_of_constant(plain.at("value.bias"), plain.at("dense.weight"), plain.at("dense.bias"),
                                          heads, kDim),
                       output_of_constant(w.value_bias, w.output, w.output_bias, heads, kDim)),
              1e-12);
  }
}

// ------------------------------------------------------------------------------------------- whole layers

TEST(FoldedLayerTest, bases_are_the_same_bytes_at_any_thread_count) {
  LayerProblem problem;
  problem.weights = random_layer(70, 8, 8, 16, 96, false);
  problem.moments = random_moments(71, 96);
  problem.has_moments = true;
  problem.rotates = true;
  FoldOptions options;
  options.kv_heads = 4;
  const Groups groups = contiguous_groups(8, 4);
  std::vector<NewTensors> results;
  const int before = at::get_num_threads();
  for (const int threads : {1, 2}) {
    at::set_num_threads(threads);
    NewTensors all = folded_keys(problem, target_of(groups, problem), options);
    all.merge(folded_values(problem, target_of(groups, problem), options));
    results.push_back(all);
  }
  at::set_num_threads(before);
  ASSERT_EQ(results[0].size(), 4U);
  for (const auto& [name, tensor] : results[0]) EXPECT_TRUE(tensor.equal(results[1].at(name))) << name;
}

TEST(FoldedLayerTest, mean_pooling_leaves_queries_and_output_alone) {
  LayerProblem problem;
  problem.weights = random_layer(72, 4, 4, kDim, kHidden, true);
  FoldOptions options;
  options.keys = KeyFold::meanpool;
  options.values = ValueFold::meanpool;
  options.key_metric = options.value_metric = Metric::weights;
  options.kv_heads = 2;
  const NewTensors keys = folded_keys(problem, target_of({{0, 1}, {2, 3}}, problem), options),
                   values = folded_values(problem, target_of({{0, 1}, {2, 3}}, problem), options);
  const LayerWeights& w = problem.weights;
  EXPECT_TRUE(keys.at("query.weight").equal(w.query));
  EXPECT_TRUE(values.at("dense.weight").equal(w.output));
  EXPECT_TRUE(values.at("dense.bias").equal(w.output_bias));
  const at::Tensor mean = w.key.view({2, 2, kDim, kHidden}).mean(1).reshape({2 * kDim, kHidden});
  EXPECT_LT(relative(keys.at("key.weight"), mean), 1e-14);
  EXPECT_LT(relative(keys.at("key.bias"), w.key_bias.view({2, 2, kDim}).mean(1).reshape({-1})), 1e-14);
}

TEST(FoldedLayerTest, regrouping_moves_query_heads_and_output_columns_along) {
  LayerProblem problem;
  problem.rotates = true;
  problem.weights = random_layer(73, 8, 4, kDim, kHidden, false);
  FoldOptions options;
  options.keys = KeyFold::meanpool;
  options.values = ValueFold::meanpool;
  options.key_metric = options.value_metric = Metric::weights;
  options.kv_heads = 2;
  const NewTensors keys = folded_keys(problem, target_of({{0, 2}, {1, 3}}, problem), options),
                   values = folded_values(problem, target_of({{0, 2}, {1, 3}}, problem), options);
  const LayerWeights& w = problem.weights;
  const std::vector<std::int64_t> order = {0, 1, 4, 5, 2, 3, 6, 7};
  EXPECT_TRUE(keys.at("q_proj.weight").equal(w.query.index_select(0, block_index(order, kDim))));
  EXPECT_TRUE(values.at("o_proj.weight").equal(w.output.index_select(1, block_index(order, kDim))));
  EXPECT_EQ(query_heads_of({0, 2, 1, 3}, 2), order);
}

// ------------------------------------------------------------------------------------------- rank correlation

TEST(SpearmanTest, known_values) {
  EXPECT_DOUBLE_EQ(spearman({1, 2, 3}, {10, 100, 1000}), 1.0);
  EXPECT_DOUBLE_EQ(spearman({1, 2, 3}, {3, 2, 1}), -1.0);
  EXPECT_NEAR(spearman({1, 2, 3, 4}, {2, 1, 4, 3}), 0.6, 1e-12);
  EXPECT_NEAR(spearman({1, 2, 2, 3}, {1, 2, 3, 4}), 0.9486832980505138, 1e-12);
  EXPECT_DOUBLE_EQ(spearman({1, 1}, {1, 2}), 0.0);
}

TEST(LayerOrderTest, only_pairs_that_the_measurement_tells_apart_count) {
  // 2 and 1 differ by 0.1, within two standard errors of the difference (0.1 * sqrt 2); the prediction swaps them.
  const LayerOrder order = layer_order({1, 3, 2, 5}, {1, 2, 2.1, 4}, {{0.1}, {0.1}, {0.1}, {0.1}});
  EXPECT_EQ(order.pairs, 6);
  EXPECT_EQ(order.told_apart, 5);
  EXPECT_EQ(order.in_order, 5);
  EXPECT_NEAR(order.spread, 3 / 2.275, 1e-12);
  const LayerOrder sure = layer_order({1, 3, 2, 5}, {1, 2, 2.1, 4}, {{0.01}, {0.01}, {0.01}, {0.01}});
  EXPECT_EQ(sure.told_apart, 6);
  EXPECT_EQ(sure.in_order, 5);
  EXPECT_EQ(layer_order({1, 2}, {1, 2}, {{0.0}, std::nullopt}).told_apart, 0);
  EXPECT_EQ(layer_order({2, 1}, {1, 2}, {{0.0}, {0.0}}).in_order, 0);
}

TEST(ErrorSumsTest, deviation_is_the_spread_of_the_ratio_over_sequences) {
  ErrorSums errors;
  EXPECT_FALSE(errors.key_deviation());
  const std::vector<std::pair<double, double>> sequences = {{1, 2}, {3, 4}, {2, 5}};
  for (const auto& [error, total] : sequences) {
    errors.sums[ErrorSums::key_error] += error;
    errors.sums[ErrorSums::key_total] += total;
    errors.sums[ErrorSums::key_error_error] += error * error;
    errors.sums[ErrorSums::key_error_total] += error * total;
    errors.sums[ErrorSums::key_total_total] += total * total;
    errors.sums[ErrorSums::sequences] += 1;
  }
  double squares = 0;
  for (const auto& [error, total] : sequences) squares += std::pow(error - 6.0 / 11.0 * total, 2);
  EXPECT_NEAR(*errors.key_deviation(), std::sqrt(squares * 3 / 2) / 11, 1e-12);
}

}  // namespace
}  // namespace headfold::folding
