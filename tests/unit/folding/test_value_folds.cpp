// Value folds against what the mathematics promises (methods.md 4, 6.4, 12, 13.1).

#include <ATen/Parallel.h>
#include <gmock/gmock.h>
#include <headfold/base/error.h>
#include <headfold/folding/apply.h>

#include "instances.h"

namespace headfold::folding {
namespace {

using namespace testing_support;

constexpr std::int64_t kDim = 8, kHidden = 40, kTokens = 400;

at::Tensor product(const Basis& basis) {
  return at::matmul(basis.decoder, basis.encoder);
}

/// A layer with the sample its moments were taken from, so that a loss can be measured instead of computed.
struct Sample {
  LayerProblem problem;
  at::Tensor values;    // [tokens, kv_heads * d]
  at::Tensor attended;  // [heads, tokens, block * d]
  std::int64_t block = 0;
};

/// `tokens` fewer than channels leave every Gram singular.
Sample sample_of(std::uint64_t seed, std::int64_t heads, std::int64_t kv_heads, std::int64_t block, bool biased,
                 std::int64_t tokens = kTokens) {
  Sample s;
  Random random(seed);
  s.block = block;
  s.problem.weights = random_layer(seed + 1, heads, kv_heads, kDim, kHidden, biased, 1.0);
  const at::Tensor x = at::cat(
      {random.normal({tokens, kHidden}) * at::logspace(0.5, -1, kHidden, 10.0, at::kDouble) + random.normal({kHidden}),
       at::ones({tokens, 1}, at::kDouble)},
      1);
  LayerMoments& m = s.problem.moments;
  const auto count = static_cast<double>(tokens);
  m.mean = x.mean(0);
  m.input = at::matmul(x.t(), x) / count;
  m.centred = m.input - at::outer(m.mean, m.mean);
  std::vector<std::int64_t> all;
  for (std::int64_t k = 0; k < kv_heads; ++k) all.push_back(k);
  s.values = at::matmul(x, group_of(s.problem.weights, all).value.t());
  // Every head attends in its own way: sharply or broadly, over tokens of its choice.
  std::vector<at::Tensor> outputs, moments, means;
  for (std::int64_t h = 0; h < heads; ++h) {
    const double sharpness = 0.5 + 1.5 * static_cast<double>(h % 3);
    const at::Tensor rows = at::softmax(sharpness * random.normal({tokens, tokens}), 1);
    const std::int64_t first = h / (heads / kv_heads) / block * block * kDim;
    const at::Tensor y = at::matmul(rows, s.values.slice(1, first, first + block * kDim));
    outputs.push_back(y);
    moments.push_back(at::matmul(y.t(), y) / count);
    means.push_back(y.mean(0));
  }
  s.attended = at::stack(outputs);
  m.attended = at::stack(moments);
  m.attended_mean = at::stack(means);
  m.attended_heads = block;
  s.problem.has_moments = true;
  return s;
}

/// Mean over tokens of sum_h |P_h (y_h - B_h A y)|^2, y the group's values as head h attends them (or as they are).
double measured_loss(const Sample& s, const std::vector<std::int64_t>& group, const Basis& basis, bool attended,
                     bool centred) {
  const LayerWeights& w = s.problem.weights;
  const std::int64_t repeat = w.value_repeat();
  double sum = 0;
  std::int64_t place = 0;
  for (const std::int64_t h : query_heads_of(group, repeat)) {
    std::vector<std::int64_t> inside;
    for (const std::int64_t k : group) inside.push_back(attended ? k % s.block : k);
    at::Tensor y = (attended ? s.attended[h] : s.values).index_select(1, block_index(inside, kDim));
    if (centred) y = y - y.mean(0);
    const std::int64_t row = place / repeat * kDim;
    const at::Tensor decoder =
        basis.head_decoders.defined() ? basis.head_decoders[place] : basis.decoder.slice(0, row, row + kDim);
    const at::Tensor error = y.slice(1, row, row + kDim) - at::matmul(at::matmul(y, basis.encoder.t()), decoder.t());
    sum += at::matmul(error, w.output.slice(1, h * kDim, (h + 1) * kDim).t()).square().sum(1).mean().item<double>();
    ++place;
  }
  return sum;
}

FoldOptions options_of(ValueFold fold, Metric metric, std::int64_t polish = 0) {
  FoldOptions options;
  options.values = fold;
  options.value_metric = metric;
  options.polish = polish;
  return options;
}

bool finite(const Basis& basis) {
  bool all = std::isfinite(basis.loss) && std::isfinite(basis.total);
  for (const at::Tensor& t : {basis.encoder, basis.decoder, basis.head_decoders, basis.energies})
    if (t.defined()) all = all && at::isfinite(t).all().item<bool>();
  return all;
}

struct Case {
  ValueFold fold;
  Metric metric;
  std::int64_t polish;
};
const std::vector<Case> kCases = {
    {ValueFold::svd, Metric::weights, 0},         {ValueFold::svd, Metric::act, 0},
    {ValueFold::svd, Metric::act_out, 0},         {ValueFold::svd, Metric::attn_out, 0},
    {ValueFold::svd, Metric::attn_out, 4},        {ValueFold::meanpool, Metric::act, 0},
    {ValueFold::meanpool, Metric::attn_out, 0},   {ValueFold::procrustes, Metric::weights, 0},
    {ValueFold::procrustes, Metric::act, 0},      {ValueFold::procrustes, Metric::act_out, 0},
    {ValueFold::procrustes, Metric::attn_out, 0},
};

// ------------------------------------------------------------------------------------------- losses are measured ones

TEST(ValueLossTest, output_metrics_equal_the_error_on_the_fitting_sample) {
  for (const std::int64_t heads : {4, 8}) {  // MHA and GQA
    for (const bool centred : {false, true}) {
      Sample s = sample_of(100, heads, 4, 2, true);
      s.problem.centred_values = centred;
      for (const Case& one : kCases) {
        if (one.metric != Metric::act_out && one.metric != Metric::attn_out) continue;
        const FoldOptions options = options_of(one.fold, one.metric, one.polish);
        for (const std::vector<std::int64_t>& group : {std::vector<std::int64_t>{0, 1}, {3, 2}}) {
          const Basis basis = value_basis(s.problem, group, options);
          const double measured = measured_loss(s, group, basis, one.metric == Metric::attn_out, centred);
          EXPECT_LT(relative(basis.loss, measured), 1e-10) << name_of(one.fold) << name_of(one.metric);
          EXPECT_GT(basis.loss, 1e-6 * basis.total);
          EXPECT_LT(basis.loss, basis.total);
        }
      }
    }
  }
}

TEST(ValueLossTest, the_loss_of_a_basis_can_be_asked_for_again) {
  for (const double mean_weight : {1.0, 0.25, 0.0}) {
    const Sample s = sample_of(110, 8, 4, 4, false);
    for (const Case& one : kCases) {
      FoldOptions options = options_of(one.fold, one.metric, one.polish);
      options.mean_weight = mean_weight;
      const Basis basis = value_basis(s.problem, {0, 2}, options);
      EXPECT_LT(relative(value_loss(s.problem, {0, 2}, options, basis), basis.loss), 1e-10) << name_of(one.metric);
      EXPECT_LT(relative(value_total(s.problem, {0, 2}, options), basis.total), 1e-10) << name_of(one.metric);
      // Decoders per query head are priced in the metric without attention, too.
      if (!basis.head_decoders.defined()) continue;
      FoldOptions plain = options;
      plain.value_metric = Metric::act_out;
      if (mean_weight == 1.0) {
        EXPECT_LT(relative(value_loss(s.problem, {0, 2}, plain, basis), measured_loss(s, {0, 2}, basis, false, false)),
                  1e-10);
      }
      EXPECT_GT(value_loss(s.problem, {0, 2}, plain, basis), value_basis(s.problem, {0, 2}, plain).loss);
    }
  }
}

// ------------------------------------------------------------------------------------------- metrics agree where they
// must, and each is best in its own

TEST(ValueMetricTest, metrics_coincide_where_their_weights_do) {
  Sample s = sample_of(120, 4, 4, 4, false);
  LayerWeights& w = s.problem.weights;
  // Orthonormal output columns per head: output-aware = activations.
  std::vector<at::Tensor> columns;
  for (std::int64_t h = 0; h < 4; ++h) {
    const auto [u, sv, v] = at::svd(w.output.slice(1, h * kDim, (h + 1) * kDim));
    columns.push_back(u);
  }
  w.output = at::cat(columns, 1);
  const Basis act = value_basis(s.problem, {0, 1, 2}, options_of(ValueFold::svd, Metric::act));
  const Basis out = value_basis(s.problem, {0, 1, 2}, options_of(ValueFold::svd, Metric::act_out));
  EXPECT_LT(relative(product(out), product(act)), 1e-10);
  EXPECT_LT(relative(out.loss, act.loss), 1e-10);
  // Attention that looks at one token only, the same for all heads: attended values = values.
  w = random_layer(121, 4, 4, kDim, kHidden, false, 1.0);
  LayerMoments& m = s.problem.moments;
  const at::Tensor sigma = at::matmul(s.values.t(), s.values) / static_cast<double>(kTokens);
  m.attended = sigma.unsqueeze(0).repeat({4, 1, 1});
  const at::Tensor rows = group_of(w, {0, 1, 2, 3}).value;
  m.attended = at::matmul(at::matmul(rows, m.input), rows.t()).unsqueeze(0).repeat({4, 1, 1});
  m.attended_mean = at::matmul(rows, m.mean).unsqueeze(0).repeat({4, 1});
  const Basis tier1 = value_basis(s.problem, {0, 1, 2}, options_of(ValueFold::svd, Metric::act_out));
  const Basis tier2 = value_basis(s.problem, {0, 1, 2}, options_of(ValueFold::svd, Metric::attn_out));
  EXPECT_LT(relative(product(tier2), product(tier1)), 1e-8);
  EXPECT_LT(relative(tier2.loss, tier1.loss), 1e-9);
  // ... and the closed form is the optimum: polishing finds nothing.
  const Basis polished = value_basis(s.problem, {0, 1, 2}, options_of(ValueFold::svd, Metric::attn_out, 5));
  EXPECT_LT(relative(polished.loss, tier1.loss), 1e-9);
}

TEST(ValueMetricTest, every_metric_is_best_in_itself) {
  const Sample s = sample_of(130, 8, 4, 4, true);
  const std::vector<std::int64_t> group = {0, 1, 2, 3};
  const FoldOptions act = options_of(ValueFold::svd, Metric::act), out = options_of(ValueFold::svd, Metric::act_out),
                    attended = options_of(ValueFold::svd, Metric::attn_out),
                    polished = options_of(ValueFold::svd, Metric::attn_out, 6);
  const auto loss_in = [&](const FoldOptions& made, const FoldOptions& metric) {
    return value_loss(s.problem, group, metric, value_basis(s.problem, group, made));
  };
  EXPECT_LT(loss_in(act, act), 0.999 * loss_in(out, act));
  EXPECT_LT(loss_in(out, out), 0.999 * loss_in(act, out));
  EXPECT_LT(loss_in(attended, attended), 0.999 * loss_in(out, attended));
  EXPECT_LT(loss_in(polished, attended), 0.999 * loss_in(attended, attended));
  // No baseline is better than the optimum, in any metric.
  for (const Metric metric : {Metric::weights, Metric::act, Metric::act_out})
    for (const ValueFold fold : {ValueFold::meanpool, ValueFold::procrustes})
      EXPECT_GT(value_basis(s.problem, group, options_of(fold, metric)).loss,
                value_basis(s.problem, group, options_of(ValueFold::svd, metric)).loss);
}

TEST(ValueMetricTest, merged_channels_are_decorrelated) {
  const Sample s = sample_of(140, 8, 4, 4, true);
  for (const Metric metric : {Metric::weights, Metric::act, Metric::act_out, Metric::attn_out}) {
    const FoldOptions options = options_of(ValueFold::svd, metric);
    const ValueProblem problem = value_problem(s.problem, {0, 1}, options);
    const Basis basis = value_basis(s.problem, {0, 1}, options);
    const at::Tensor second = at::matmul(at::matmul(basis.encoder, problem.sigma), basis.encoder.t());
    const at::Tensor expected = basis.energies.slice(0, 0, kDim);
    // Up to the one number that gives merged heads the energy of their sources.
    const double scale = second.trace().item<double>() / expected.sum().item<double>();
    EXPECT_LT(relative(second, scale * at::diag(expected)), 1e-10) << name_of(metric);
    if (metric == Metric::act_out) {
      EXPECT_LT(relative(second.trace().item<double>(), problem.sigma.trace().item<double>() / 2), 1e-12);
    }
  }
}

TEST(ValueMetricTest, mean_weight_zero_is_the_centred_problem) {
  Sample s = sample_of(150, 4, 4, 4, true);
  for (const Metric metric : {Metric::act, Metric::act_out, Metric::attn_out}) {
    FoldOptions options = options_of(ValueFold::svd, metric);
    options.mean_weight = 0;
    const Basis without = value_basis(s.problem, {0, 1}, options);
    options.mean_weight = 1;
    const Basis plain = value_basis(s.problem, {0, 1}, options);
    s.problem.centred_values = true;
    const Basis centred = value_basis(s.problem, {0, 1}, options);
    s.problem.centred_values = false;
    EXPECT_LT(relative(product(without), product(centred)), 1e-8) << name_of(metric);
    EXPECT_LT(relative(without.loss, centred.loss), 1e-9);
    EXPECT_GT(relative(product(plain), product(centred)), 1e-2);
  }
}

// ------------------------------------------------------------------------------------------- widths, groups, sources

TEST(ValueWidthTest, any_width_from_one_to_all_channels) {
  const Sample s = sample_of(160, 8, 4, 4, true);
  for (const Case& one : kCases) {
    if (one.fold != ValueFold::svd) {
      EXPECT_THROW(value_basis(s.problem, {1, 3}, options_of(one.fold, one.metric), kDim + 1), InternalError);
      continue;
    }
    const FoldOptions options = options_of(one.fold, one.metric, one.polish);
    double before = std::numeric_limits<double>::infinity();
    for (const std::int64_t width : {1, 3, 8, 11, 16}) {
      const Basis basis = value_basis(s.problem, {1, 3}, options, width);
      ASSERT_EQ(basis.encoder.sizes(), at::IntArrayRef({width, 2 * kDim}));
      ASSERT_EQ(basis.decoder.sizes(), at::IntArrayRef({2 * kDim, width}));
      ASSERT_EQ(basis.head_decoders.defined(), one.polish > 0);
      if (one.polish > 0) {
        ASSERT_EQ(basis.head_decoders.sizes(), at::IntArrayRef({4, kDim, width}));
        EXPECT_LT(relative(basis.decoder.slice(0, 0, kDim), basis.head_decoders.slice(0, 0, 2).mean(0)), 1e-14);
      }
      EXPECT_LT(basis.loss, before);
      before = basis.loss;
    }
    EXPECT_LT(before, 1e-12 * value_total(s.problem, {1, 3}, options)) << name_of(one.metric);
    EXPECT_THROW(value_basis(s.problem, {1, 3}, options, 17), InternalError);
    EXPECT_EQ(value_basis(s.problem, {1, 3}, options).encoder.size(0), kDim);
  }
}

TEST(ValueGroupTest, attended_groups_lie_in_one_block_in_any_order) {
  const Sample s = sample_of(170, 8, 8, 4, false);
  const FoldOptions options = options_of(ValueFold::svd, Metric::attn_out, 3);
  EXPECT_NO_THROW(value_basis(s.problem, {4, 7}, options));
  const Basis ab = value_basis(s.problem, {1, 3}, options), ba = value_basis(s.problem, {3, 1}, options);
  EXPECT_LT(relative(ab.loss, ba.loss), 1e-9);
  EXPECT_LT(relative(measured_loss(s, {1, 3}, ab, true, false), ab.loss), 1e-10);
  const auto message = [&](const std::vector<std::int64_t>& group) -> std::string {
    try {
      value_basis(s.problem, group, options);
    } catch (const InputError& error) {
      return std::string(error.what()) + " " + error.hint();
    }
    return "accepted";
  };
  EXPECT_THAT(message({3, 4}), testing::AllOf(testing::HasSubstr("KV heads 3, 4"), testing::HasSubstr("block of 4"),
                                              testing::HasSubstr("--attended-heads 8")));
  Sample none = s;
  none.problem.moments.attended = at::Tensor();
  EXPECT_THROW(value_basis(none.problem, {0, 1}, options), InputError);
}

TEST(ValueGroupTest, duplicated_heads_fold_without_loss) {
  for (const std::int64_t heads : {4, 8}) {
    Sample s = sample_of(180, heads, 4, 4, false);
    LayerWeights& w = s.problem.weights;
    w.value.slice(0, kDim, 2 * kDim).copy_(w.value.slice(0, 0, kDim));
    LayerMoments& m = s.problem.moments;
    const at::Tensor rows = block_index({0, 0, 2, 3}, kDim);
    m.attended = m.attended.index_select(1, rows).index_select(2, rows);
    m.attended_mean = m.attended_mean.index_select(1, rows);
    for (const Case& one : kCases) {
      const Basis basis = value_basis(s.problem, {0, 1}, options_of(one.fold, one.metric, one.polish));
      EXPECT_LT(std::abs(basis.relative_loss()), 1e-12) << name_of(one.fold) << name_of(one.metric);
      const at::Tensor v = s.values.slice(1, 0, kDim);
      const at::Tensor back = at::matmul(at::cat({v, v}, 1), product(basis).t());
      EXPECT_LT(relative(back, at::cat({v, v}, 1)), 1e-5) << name_of(one.fold) << name_of(one.metric);
    }
  }
}

TEST(ValueRowsTest, kept_products_change_nothing_and_threads_neither) {
  Sample s = sample_of(190, 8, 8, 4, true);
  for (const bool centred : {false, true}) {
    s.problem.centred_values = centred;
    const FoldOptions options = options_of(ValueFold::svd, Metric::act_out);
    s.problem.group_grams = nullptr;
    const Basis plain = value_basis(s.problem, {2, 5}, options);
    std::vector<Basis> kept(8);
    const int before = at::get_num_threads();
    for (const int threads : {1, 2}) {
      at::set_num_threads(threads);
      s.problem.group_grams = make_group_grams(s.problem);
      for_each_item(8, [&](std::int64_t i) {
        kept[static_cast<std::size_t>(i)] = value_basis(s.problem, {2, 5}, options);
      });
      for (const Basis& one : kept) EXPECT_TRUE(one.encoder.equal(kept[0].encoder));
      EXPECT_LT(relative(product(kept[0]), product(plain)), 1e-10);
      EXPECT_LT(relative(kept[0].loss, plain.loss), 1e-10);
    }
    at::set_num_threads(before);
    s.problem.group_grams = nullptr;
    FoldOptions both = options;
    both.key_metric = Metric::act_query;
    add_grams(s.problem, both);
    const Basis cached = value_basis(s.problem, {2, 5}, options);
    EXPECT_LT(relative(product(cached), product(plain)), 1e-8);
    EXPECT_LT(relative(cached.loss, plain.loss), 1e-9);
    s.problem.grams = nullptr;
  }
}

// ------------------------------------------------------------------------------------------- alternating least squares

TEST(ValuePolishTest, no_step_raises_the_loss) {
  for (std::uint64_t seed = 200; seed < 206; ++seed) {
    const std::int64_t heads = seed % 2 == 0 ? 4 : 8;
    // Plenty of tokens, fewer than channels, and one.
    for (const std::int64_t tokens : {kTokens, std::int64_t{12}, std::int64_t{1}}) {
      const Sample s = sample_of(seed, heads, 4, 4, seed % 3 == 0, tokens);
      const ValueProblem problem = value_problem(s.problem, {0, 1, 3}, options_of(ValueFold::svd, Metric::attn_out));
      for (const std::int64_t width : {3, 8}) {
        Basis basis = fold_values_svd(problem, width);
        const double start = basis.loss;
        const std::vector<double> losses = polish_values(problem, basis, 6);
        EXPECT_LT(std::abs(losses.front() - start), 1e-9 * basis.total) << tokens;
        for (std::size_t i = 1; i < losses.size(); ++i) EXPECT_LE(losses[i], losses[i - 1]);
        basis.loss = loss_of(problem, basis);
        EXPECT_TRUE(finite(basis));
        EXPECT_LE(std::abs(basis.loss - losses.back()), 1e-10 * basis.total);
        if (tokens == kTokens) {
          EXPECT_LT(losses.back(), 0.99 * start);
        }
      }
    }
  }
}

TEST(ValuePolishTest, both_steps_end_where_the_gradient_vanishes) {
  const Sample s = sample_of(210, 8, 4, 2, false);
  const ValueProblem problem = value_problem(s.problem, {2, 3}, options_of(ValueFold::svd, Metric::attn_out));
  Basis basis = fold_values_svd(problem, kDim);
  polish_values(problem, basis, 400);
  // Central differences of the loss along random directions of encoder and decoders.
  Random random(211);
  const auto slope = [&](bool encoder) {
    const double step = 1e-4;
    const at::Tensor base = encoder ? basis.encoder : basis.head_decoders;
    const at::Tensor direction =
        random.normal(base.sizes()) * base.norm() / std::sqrt(static_cast<double>(base.numel()));
    double at_ends[2];
    for (const int side : {0, 1}) {
      Basis moved = basis;
      (encoder ? moved.encoder : moved.head_decoders) = base + (side == 0 ? -step : step) * direction;
      at_ends[side] = loss_of(problem, moved);
    }
    return std::abs(at_ends[1] - at_ends[0]) / (2 * step);
  };
  for (int i = 0; i < 5; ++i) {
    EXPECT_LT(slope(false), 1e-3 * basis.total);
    EXPECT_LT(slope(true), 1e-3 * basis.total);
  }
  EXPECT_THROW(polish_values(value_problem(s.problem, {2, 3}, options_of(ValueFold::svd, Metric::act_out)), basis, 1),
               InternalError);
}

// ------------------------------------------------------------------------------------------- procrustes

TEST(ValueProcrustesTest, turned_copies_of_one_head_are_found) {
  Sample s = sample_of(220, 4, 4, 4, false);
  LayerWeights& w = s.problem.weights;
  Random random(221);
  for (std::int64_t k = 1; k < 4; ++k) {
    const auto [u, sv, v] = at::svd(random.normal({kDim, kDim}));
    w.value.slice(0, k * kDim, (k + 1) * kDim).copy_(at::matmul(u, w.value.slice(0, 0, kDim)));
  }
  for (const Metric metric : {Metric::weights, Metric::act, Metric::act_out}) {
    const Basis turned = value_basis(s.problem, {0, 1, 2, 3}, options_of(ValueFold::procrustes, metric));
    EXPECT_LT(turned.relative_loss(), 1e-10) << name_of(metric);
    const Basis mean = value_basis(s.problem, {0, 1, 2, 3}, options_of(ValueFold::meanpool, metric));
    EXPECT_GT(mean.relative_loss(), 0.3);
    for (std::int64_t k = 0; k < 4; ++k) {
      const at::Tensor o = turned.decoder.slice(0, k * kDim, (k + 1) * kDim);
      EXPECT_LT(relative(at::matmul(o.t(), o), at::eye(kDim, at::kDouble)), 1e-12);
    }
  }
}

TEST(ValueProcrustesTest, merged_heads_keep_the_energy_of_their_sources) {
  const Sample s = sample_of(230, 8, 4, 4, true);
  for (const Metric metric : {Metric::weights, Metric::act, Metric::act_out, Metric::attn_out}) {
    const FoldOptions options = options_of(ValueFold::procrustes, metric);
    const at::Tensor sigma = value_problem(s.problem, {0, 1, 2}, options).sigma;
    const Basis basis = value_basis(s.problem, {0, 1, 2}, options);
    const at::Tensor second = at::matmul(at::matmul(basis.encoder, sigma), basis.encoder.t());
    EXPECT_LT(relative(second.trace().item<double>(), sigma.trace().item<double>() / 3), 1e-12);
    // The iteration raised what it raises: turned heads agree more than plain ones.
    const at::Tensor identity = at::eye(kDim, at::kDouble).repeat({3, 1});
    const auto agreement = [&](const at::Tensor& o) { return (o * at::matmul(sigma, o)).sum().item<double>(); };
    EXPECT_GT(agreement(basis.decoder), 1.05 * agreement(identity));
  }
}

// ------------------------------------------------------------------------------------------- hard moments

/// Rows Z of a factor of the weighted problem: F and Z Z^T have the same eigenvalues, without squaring the condition.
at::Tensor weighted_rows(const Sample& s, const std::vector<std::int64_t>& group) {
  const LayerWeights& w = s.problem.weights;
  std::vector<at::Tensor> rows;
  for (const std::int64_t h : query_heads_of(group, w.value_repeat())) {
    const std::int64_t k = h / w.value_repeat();
    rows.push_back(
        at::matmul(w.output.slice(1, h * kDim, (h + 1) * kDim), s.values.slice(1, k * kDim, (k + 1) * kDim).t()));
  }
  return at::cat(rows, 0) / std::sqrt(static_cast<double>(s.values.size(0)));
}

TEST(HardValuesTest, singular_and_nearly_singular_moments) {
  const std::vector<std::int64_t> group = {0, 1, 2, 3};
  for (int which = 0; which < 6; ++which) {
    Sample s = sample_of(240, 8, 4, 4, false, which == 2 ? 9 : kTokens);
    LayerWeights& w = s.problem.weights;
    const auto scale_channel = [&](std::int64_t channel, double factor) {
      w.value[channel] *= factor;
      s.values.select(1, channel).mul_(factor);
      at::Tensor diagonal = at::ones({4 * kDim}, at::kDouble);
      diagonal[channel].fill_(factor);
      s.problem.moments.attended = diagonal.unsqueeze(1) * s.problem.moments.attended * diagonal;
      s.problem.moments.attended_mean = s.problem.moments.attended_mean * diagonal;
    };
    if (which == 0) scale_channel(5, 0), scale_channel(17, 0);  // dead value channels
    if (which == 1) scale_channel(11, 1e4);                     // one outlier
    // which == 2: fewer tokens than channels
    if (which == 3)
      w.output.select(1, 3).mul_(1e4), w.output.slice(1, 8, 16).mul_(0);  // loud column, silent query head
    if (which == 4) scale_channel(11, 1e5), w.output.select(1, 2 * kDim + 3).mul_(1e-5);  // loud values, quiet outputs
    if (which == 5)
      w.output.select(1, 9).copy_(w.output.select(1, 8)), w.value.slice(0, 0, kDim).mul_(0),
          s.values.slice(1, 0, kDim).mul_(0);  // dependent columns, a dead head
    for (const Case& one : kCases) {
      const Basis basis = value_basis(s.problem, group, options_of(one.fold, one.metric, one.polish));
      EXPECT_TRUE(finite(basis)) << which << name_of(one.fold) << name_of(one.metric);
      EXPECT_GE(basis.loss, -1e-12 * basis.total);
      if (one.metric == Metric::act_out && one.fold == ValueFold::svd) {
        const at::Tensor sv = std::get<1>(at::linalg_svd(weighted_rows(s, group), false));
        const double total = sv.square().sum().item<double>(),
                     best = sv.slice(0, std::min<std::int64_t>(kDim, sv.numel())).square().sum().item<double>();
        EXPECT_LT(std::abs(basis.loss - best), 1e-12 * total) << which;
        EXPECT_LT(std::abs(measured_loss(s, group, basis, false, false) - best), 1e-10 * total) << which;
      }
    }
    const linalg::Conditioning conditioning =
        value_conditioning(s.problem, group, options_of(ValueFold::svd, Metric::act));
    if (which == 0) {
      EXPECT_DOUBLE_EQ(conditioning.dropped, 2.0 / 32);
    }
    if (which == 2) {
      EXPECT_GE(conditioning.dropped, 23.0 / 32);
    }
    if (which == 5) {
      EXPECT_DOUBLE_EQ(conditioning.dropped, 8.0 / 32);
    }
    if (which == 1) {
      EXPECT_GT(conditioning.condition, 1e7);
    }
  }
}

// ------------------------------------------------------------------------------------------- the folded layer

/// Output of the folded layer for values v [n, kv_heads * d] attended by head h as it likes: y_h given per query head
/// over all heads, [heads, kv_heads * d]; W_O' reads A_g y_h.
at::Tensor output_of(const at::Tensor& attended, const Groups& groups, const at::Tensor& value_map,
                     const at::Tensor& output, const at::Tensor& bias, std::int64_t repeat) {
  at::Tensor sum = bias.defined() ? bias.clone() : at::zeros({output.size(0)}, at::kDouble);
  std::int64_t place = 0;
  for (std::size_t g = 0; g < groups.size(); ++g) {
    for (const std::int64_t h : query_heads_of(groups[g], repeat)) {
      const at::Tensor merged = at::matmul(value_map[static_cast<std::int64_t>(g)],
                                           attended[h].index_select(0, block_index(groups[g], kDim)));
      sum += at::matmul(output.slice(1, place * kDim, (place + 1) * kDim), merged);
      ++place;
    }
  }
  return sum;
}

TEST(FoldedValuesTest, attended_means_pass_a_centred_fold_exactly_and_decoders_are_absorbed) {
  for (const std::int64_t heads : {4, 8}) {
    Sample s = sample_of(250, heads, 4, 4, true);
    LayerProblem& problem = s.problem;
    problem.centred_values = true;
    const LayerWeights& w = problem.weights;
    const Groups groups = {{0, 1}, {2, 3}};
    for (const std::int64_t polish : {0, 3}) {
      FoldOptions options = options_of(ValueFold::svd, Metric::attn_out, polish);
      options.keys = KeyFold::norope;
      options.kv_heads = 2;
      const NewTensors made = folded_values(problem, {groups, kDim, kDim}, options);
      std::vector<at::Tensor> encoders;
      for (const auto& group : groups) encoders.push_back(value_basis(problem, group, options).encoder);
      const at::Tensor maps = at::stack(encoders);
      const at::Tensor weight = w.value.view({2, 2 * kDim, kHidden});
      EXPECT_LT(relative(made.at("value.weight"), at::matmul(maps, weight).reshape({2 * kDim, kHidden})), 1e-12);
      const auto original = [&](const at::Tensor& attended) {
        at::Tensor sum = w.output_bias.clone();
        for (std::int64_t h = 0; h < heads; ++h) {
          const std::int64_t k = h / w.value_repeat();
          sum +=
              at::matmul(w.output.slice(1, h * kDim, (h + 1) * kDim), attended[h].slice(0, k * kDim, (k + 1) * kDim));
        }
        return sum;
      };
      const at::Tensor mean = problem.moments.attended_mean;
      const auto folded = [&](const at::Tensor& attended) {
        return output_of(attended, groups, maps, made.at("dense.weight"), made.at("dense.bias"), w.value_repeat());
      };
      EXPECT_LT(relative(folded(mean), original(mean)), 1e-12);
      // Away from the mean the error is the predicted one: sum over tokens of |sum_h e_h|^2 is not sum_h |e_h|^2, but
      // for one head alone it is that head's share.
      double error = 0, predicted = 0;
      for (std::int64_t h = 0; h < heads; ++h)
        for (std::int64_t t = 0; t < 5; ++t) {
          at::Tensor one = mean.clone();
          one[h] = s.attended[h][t];
          error += (folded(one) - original(one)).square().sum().item<double>();
        }
      for (const auto& group : groups) {
        const Basis basis = value_basis(problem, group, options);
        std::int64_t place = 0;
        for (const std::int64_t h : query_heads_of(group, w.value_repeat())) {
          const at::Tensor rows = block_index(group, kDim);
          const at::Tensor y = (s.attended[h].slice(0, 0, 5) - mean[h]).index_select(1, rows);
          const std::int64_t row = place / w.value_repeat() * kDim;
          const at::Tensor decoder = polish > 0 ? basis.head_decoders[place] : basis.decoder.slice(0, row, row + kDim);
          const at::Tensor e = y.slice(1, row, row + kDim) - at::matmul(at::matmul(y, basis.encoder.t()), decoder.t());
          predicted += at::matmul(e, w.output.slice(1, h * kDim, (h + 1) * kDim).t()).square().sum().item<double>();
          ++place;
        }
      }
      EXPECT_LT(relative(error, predicted), 1e-9);
    }
  }
}

}  // namespace
}  // namespace headfold::folding
