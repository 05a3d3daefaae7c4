#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <headfold/base/error.h>
#include <headfold/folding/budget.h>

#include <numeric>
#include <random>

#include "models.h"

namespace headfold::folding {
namespace {

using headfold::testing_support::ScratchFolder;
using headfold::testing_support::world;
using testing_support::Random;

std::int64_t sum(const std::vector<std::int64_t>& values) {
  return std::accumulate(values.begin(), values.end(), std::int64_t{0});
}

/// Choices 1, 2, 4, 8 with falling random costs; `convex`: falling by less per head at every step.
std::vector<LayerChoices> random_choices(std::uint64_t seed, std::size_t layers, bool convex) {
  std::mt19937_64 engine(seed);
  const auto unit = [&] { return static_cast<double>(engine() >> 11) * 0x1.0p-53; };
  std::vector<LayerChoices> all(layers);
  for (LayerChoices& layer : all) {
    layer.heads = {1, 2, 4, 8};
    double slope = 1 + unit(), cost = 20;
    for (std::size_t i = 0; i < layer.heads.size(); ++i) {
      layer.cost.push_back(cost);
      if (i + 1 == layer.heads.size()) break;
      slope = convex ? slope * unit() : 0.1 + unit();
      cost -= slope * static_cast<double>(layer.heads[i + 1] - layer.heads[i]);
    }
  }
  return all;
}

/// Least cost of all allocations within the budget; nothing when none fits.
double brute_force(const std::vector<LayerChoices>& layers, std::int64_t budget, std::size_t from = 0) {
  if (from == layers.size()) return 0;
  double best = std::numeric_limits<double>::infinity();
  for (std::size_t i = 0; i < layers[from].heads.size(); ++i)
    if (layers[from].heads[i] <= budget)
      best = std::min(best, layers[from].cost[i] + brute_force(layers, budget - layers[from].heads[i], from + 1));
  return best;
}

TEST(Budget, ExactIsTheBestOfAllAllocations) {
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    const auto layers = random_choices(seed, 5, seed % 2 == 0);
    for (const std::int64_t budget : {5, 6, 11, 17, 20, 39, 40, 1000}) {
      const auto heads = allocate_exactly(layers, budget);
      EXPECT_LE(sum(heads), budget);
      EXPECT_NEAR(cost_of(layers, heads), brute_force(layers, budget), 1e-12);
      const auto greedy = allocate_greedily(layers, budget);
      EXPECT_LE(sum(greedy), budget);
      EXPECT_GE(cost_of(layers, greedy), cost_of(layers, heads) - 1e-12);
      // Never worse than the same number everywhere.
      for (const std::int64_t n : layers[0].heads)
        if (5 * n <= budget) {
          EXPECT_LE(cost_of(layers, heads), cost_of(layers, std::vector<std::int64_t>(5, n)) + 1e-12);
        }
    }
  }
}

TEST(Budget, GreedyIsExactForFallingGainsOfSingleHeads) {
  std::mt19937_64 engine(3);
  for (int trial = 0; trial < 20; ++trial) {
    std::vector<LayerChoices> layers(4);
    for (LayerChoices& layer : layers) {
      double cost = 10, slope = 4;
      for (std::int64_t n = 1; n <= 6; ++n) {
        layer.heads.push_back(n);
        layer.cost.push_back(cost);
        slope *= static_cast<double>(engine() >> 11) * 0x1.0p-53;
        cost -= slope;
      }
    }
    for (std::int64_t budget = 4; budget <= 24; ++budget)
      EXPECT_NEAR(cost_of(layers, allocate_greedily(layers, budget)), brute_force(layers, budget), 1e-12);
  }
}

TEST(Budget, GreedyCrossesAStepThatGainsNothing) {
  const std::vector<LayerChoices> layers{{{1, 2, 4}, {5, 5, 0}}, {{1, 2, 4}, {3, 2.9, 2.8}}};
  EXPECT_EQ(allocate_greedily(layers, 5), (std::vector<std::int64_t>{4, 1}));
  EXPECT_EQ(allocate_exactly(layers, 5), (std::vector<std::int64_t>{4, 1}));
}

TEST(Budget, AmongEqualsFewestHeads) {
  const std::vector<LayerChoices> layers{{{1, 2, 4}, {1, 1, 1}}, {{1, 2, 4}, {3, 2, 2}}};
  EXPECT_EQ(allocate_exactly(layers, 8), (std::vector<std::int64_t>{1, 2}));
  EXPECT_EQ(allocate_greedily(layers, 8), (std::vector<std::int64_t>{1, 2}));
}

TEST(Budget, RefusesWhatCannotBe) {
  const auto layers = random_choices(1, 3, true);
  EXPECT_THROW(allocate_exactly(layers, 2), UsageError);
  EXPECT_THROW(allocate_greedily(layers, 2), UsageError);
  EXPECT_EQ(allocate_exactly(layers, 3), (std::vector<std::int64_t>{1, 1, 1}));
  EXPECT_THROW(allocate_exactly({{{2, 1}, {1, 1}}}, 9), InternalError);
  EXPECT_THROW(allocate_greedily({{{1, 2}, {1, std::nan("")}}}, 9), InternalError);
  EXPECT_THROW(allocate_exactly({{{}, {}}}, 9), InternalError);
  EXPECT_THROW(cost_of(layers, {1, 3, 1}), InternalError);
  EXPECT_NO_THROW(check_even_budget({4, 4, 4}));
  try {
    check_even_budget({4, 2, 4});
    FAIL() << "an uneven budget passed for a stock configuration";
  } catch (const UsageError& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("4, 2, 4"));
  }
}

TEST(ProgressiveWidths, FallFromTheWidestToTheNarrowest) {
  std::mt19937_64 engine(5);
  for (int trial = 0; trial < 50; ++trial) {
    std::vector<double> log_condition;
    for (int l = 0; l < 12; ++l) log_condition.push_back(0.5 + 10 * static_cast<double>(engine() >> 11) * 0x1.0p-53);
    const auto widths = progressive_widths(log_condition, 16, 128, 8);
    EXPECT_EQ(widths.front(), 128);  // the first layer has the largest product, the last one the smallest
    EXPECT_EQ(widths.back(), 16);
    for (std::size_t l = 0; l < widths.size(); ++l) {
      EXPECT_EQ(widths[l] % 8, 0);
      EXPECT_LE(widths[l], widths[l == 0 ? 0 : l - 1]);
      // The rule itself, before rounding.
      const double all = std::accumulate(log_condition.begin(), log_condition.end(), 0.0);
      const double here =
          std::accumulate(log_condition.begin() + static_cast<std::ptrdiff_t>(l), log_condition.end(), 0.0);
      const double rule = 128 * (1 - (all - here) / (all - log_condition.back()) * (1 - 16.0 / 128));
      EXPECT_LE(std::abs(static_cast<double>(widths[l]) - rule), 4.0 + 1e-9);
    }
  }
}

TEST(ProgressiveWidths, EqualProductsKeepTheWidest) {
  EXPECT_EQ(progressive_widths({0, 0, 0}, 16, 64, 8), (std::vector<std::int64_t>{64, 64, 64}));
  EXPECT_EQ(progressive_widths({7}, 16, 64, 8), (std::vector<std::int64_t>{64}));
  EXPECT_TRUE(progressive_widths({}, 16, 64, 8).empty());
}

TEST(ProgressiveWidths, LegalMultiplesOnly) {
  EXPECT_EQ(progressive_widths({1, 1, 1}, 10, 30, 8), (std::vector<std::int64_t>{24, 24, 16}));  // 30, 20, 10
  EXPECT_EQ(progressive_widths({1, 1}, 24, 24, 8), (std::vector<std::int64_t>{24, 24}));
  EXPECT_THROW(progressive_widths({1, 1}, 9, 15, 8), UsageError);
  EXPECT_THROW(progressive_widths({1, 1}, 64, 32, 8), UsageError);
  EXPECT_THROW(progressive_widths({1, std::nan("")}, 8, 32, 8), NumericalError);
}

TEST(LogCondition, IsThatOfTheSingularValues) {
  Random random(2);
  for (const double decades : {0.0, 1.0, 3.0, 6.0, 9.0}) {
    const auto left = std::get<0>(at::linalg_qr(random.normal({12, 12})));
    const auto right = std::get<0>(at::linalg_qr(random.normal({30, 12})));
    const at::Tensor values = at::logspace(1, 1 - decades, 12, 10.0, at::kDouble);
    const at::Tensor matrix = at::matmul(left * values, right.t());
    EXPECT_NEAR(log_condition(matrix), decades * std::log(10.0), 1e-5) << decades;
    EXPECT_NEAR(log_condition(matrix.t()), decades * std::log(10.0), 1e-5) << decades;
    EXPECT_NEAR(log_condition(1e-30 * matrix), decades * std::log(10.0), 1e-5) << decades;
  }
  at::Tensor singular = random.normal({4, 9});
  singular[2].zero_();
  EXPECT_NEAR(log_condition(singular), std::log(1e12), 1e-9);
  EXPECT_EQ(log_condition(at::zeros({3, 3}, at::kDouble)), 0);
  EXPECT_THROW(log_condition(at::full({2, 2}, std::nan(""), at::kDouble)), NumericalError);
  EXPECT_THROW(log_condition(at::zeros({3}, at::kDouble)), InternalError);
}

FoldOptions weights_only(KeyFold keys, std::int64_t kv_heads) {
  FoldOptions options;
  options.keys = keys;
  options.kv_heads = kv_heads;
  options.key_metric = Metric::weights;
  options.value_metric = Metric::weights;
  return options;
}

TEST(Lorc, WidthsAndReportOfAModel) {
  const ScratchFolder folder;
  constexpr std::int64_t kLayers = 5, kDim = 8;
  for (const std::int64_t kv_heads : {8, 4}) {  // MHA and GQA inputs
    const Json config = testing_support::small_llama(8, kv_heads, kDim, kLayers);
    const fs::path model = folder / fmt::format("{}", kv_heads);
    const auto tensors = testing_support::small_tensors(config, 4);
    testing_support::write_model(model, config, tensors);
    const checkpoint::Reader reader(model);
    const auto conditions = log_conditions(world(), reader);
    for (std::int64_t l = 0; l < kLayers; ++l) {
      double expected = 0;
      for (const char* name : {"k_proj", "v_proj"}) {
        const at::Tensor values =
            at::linalg_svdvals(tensors.at(fmt::format("model.layers.{}.self_attn.{}.weight", l, name)).to(at::kDouble));
        expected += std::log((values[0] / values[-1]).item<double>());
      }
      EXPECT_NEAR(conditions[static_cast<std::size_t>(l)], expected, 1e-6);
    }

    FoldOptions options = weights_only(KeyFold::latent, kv_heads / 2);
    OrderedJson report;
    auto targets = lorc_targets(world(), reader, options, &report);
    ASSERT_EQ(targets.size(), static_cast<std::size_t>(kLayers));
    for (const LayerTarget& target : targets) {
      EXPECT_EQ(target.groups, contiguous_groups(kv_heads, 1));
      EXPECT_EQ(target.key_width, kv_heads / 2 * kDim);
      EXPECT_EQ(target.value_width, kv_heads / 2 * kDim);
    }
    EXPECT_THAT(report.dump(), testing::Not(testing::HasSubstr("reconstructed")));

    options.allocation = Allocation::lorc_progressive;
    targets = lorc_targets(world(), reader, options, &report);
    const std::int64_t widest = kv_heads / 2 * kDim;
    EXPECT_EQ(targets.front().key_width, widest);
    EXPECT_EQ(targets.back().key_width, std::max<std::int64_t>(1, widest / 8));
    EXPECT_THAT(report["rule"].get<std::string>(), testing::HasSubstr("reconstructed"));
    EXPECT_NO_THROW(world().require_equal(report.dump(), "LoRC report"));
    OrderedJson alone;
    lorc_targets(comm::Communicator::self(), reader, options, &alone);
    EXPECT_EQ(report.dump(), alone.dump());
    for (std::int64_t l = 0; l < kLayers; ++l) {
      const OrderedJson& layer = report["layers"][static_cast<std::size_t>(l)];
      const std::int64_t width = targets[static_cast<std::size_t>(l)].key_width;
      EXPECT_EQ(layer["width"], width);
      const at::Tensor squares =
          at::linalg_svdvals(tensors.at(fmt::format("model.layers.{}.self_attn.k_proj.weight", l)).to(at::kDouble))
              .square();
      const double kept = (squares.slice(0, 0, width).sum() / squares.sum()).item<double>();
      EXPECT_NEAR(layer["key_energy_kept"].get<double>(), kept, 1e-10);
      // What the fold of that target loses.
      const LayerProblem problem = load_problem(reader, nullptr, l, Part::both, options);
      const Basis basis = key_basis(problem, targets[static_cast<std::size_t>(l)].groups[0], options, width);
      EXPECT_NEAR(1 - basis.loss / basis.total, kept, 1e-9);
      EXPECT_EQ(basis.encoder.size(0), width);
    }

    options.min_width = 10;
    options.max_width = 20;
    targets = lorc_targets(world(), reader, options);
    EXPECT_EQ(targets.front().key_width, 20);
    EXPECT_EQ(targets.back().key_width, 10);
    options.latent_groups = 2;
    options.max_width = kv_heads * kDim / 2;
    targets = lorc_targets(world(), reader, options);
    EXPECT_EQ(targets.front().groups, contiguous_groups(kv_heads, 2));
    EXPECT_EQ(targets.front().key_width, kv_heads * kDim / 2);
    options.max_width = kv_heads * kDim;
    EXPECT_THROW(lorc_targets(world(), reader, options), UsageError);
    options.max_width = 8;
    EXPECT_THROW(lorc_targets(world(), reader, options), UsageError);  // narrowest 10
    options.latent_groups = 3;
    EXPECT_THROW(lorc_targets(world(), reader, options), UsageError);
  }
}

TEST(LossTable, HoldsThePlansLossesAndFeedsTheBudget) {
  const ScratchFolder folder;
  const Json config = testing_support::small_llama(8, 8, 8, 3);
  auto tensors = testing_support::small_tensors(config, 6);
  const std::vector<Groups> planted(3, Groups{{0, 5}, {1, 3}, {2, 7}, {4, 6}});
  testing_support::plant(tensors, planted, 8, 0.05, 2);
  testing_support::write_model(folder / "model", config, tensors);
  const checkpoint::Reader reader(folder / "model");
  const FoldOptions options = weights_only(KeyFold::rope_commuting, 4);
  const LossTable table = loss_table(world(), reader, nullptr, options);
  EXPECT_EQ(table.heads, (std::vector<std::int64_t>{1, 2, 4, 8}));
  ASSERT_EQ(table.loss.size(), 3U);
  EXPECT_NO_THROW(world().require_equal(Json(table.loss).dump(), "loss table"));
  EXPECT_EQ(table.loss, loss_table(comm::Communicator::self(), reader, nullptr, options).loss);
  for (std::size_t l = 0; l < 3; ++l)
    for (std::size_t part = 0; part < 2; ++part) {
      EXPECT_EQ(table.loss[l][3][part], 0);
      for (std::size_t c = 1; c < 4; ++c) EXPECT_LT(table.loss[l][c][part], table.loss[l][c - 1][part]);
    }
  const Plan plan = make_plan(world(), reader, nullptr, options);
  for (std::size_t l = 0; l < 3; ++l) {
    EXPECT_NEAR(table.loss[l][2][0], plan.layers[l].key_relative_loss(), 1e-10);
    EXPECT_NEAR(table.loss[l][2][1], plan.layers[l].value_relative_loss(), 1e-10);
  }
  const LossTable grouped = loss_table(world(), reader, nullptr, options, [&](std::int64_t layer, std::int64_t heads) {
    return heads == 4 ? planted[static_cast<std::size_t>(layer)] : contiguous_groups(8, heads);
  });
  for (std::size_t l = 0; l < 3; ++l) {
    EXPECT_LT(grouped.loss[l][2][0], 0.1 * table.loss[l][2][0]);
    EXPECT_EQ(grouped.loss[l][1], table.loss[l][1]);
  }

  // Probes that know the truth: the rates come back, whoever measured them.
  const std::vector<std::array<double, 2>> truth{{2.0, 0.5}, {0.1, 0.1}, {1.0, 3.0}};
  const auto probe = [&](std::int64_t layer, Part part) {
    const auto l = static_cast<std::size_t>(layer);
    const std::size_t p = part == Part::keys ? 0 : 1;
    return truth[l][p] * table.loss[l][2][p];
  };
  const auto rates = exchange_rates(world(), table, 4, probe);
  for (std::size_t l = 0; l < 3; ++l)
    for (std::size_t p = 0; p < 2; ++p) EXPECT_NEAR(rates[l][p], truth[l][p], 1e-12);
  const auto layers = choices(table, rates);
  EXPECT_NEAR(layers[0].cost[2], 2.0 * table.loss[0][2][0] + 0.5 * table.loss[0][2][1], 1e-12);
  const auto heads = allocate_exactly(layers, 12);
  EXPECT_LE(sum(heads), 12);
  EXPECT_LE(heads[1], heads[0]);  // a layer that hardly matters gets no more than one that does
  EXPECT_LE(heads[1], heads[2]);
  const OrderedJson report = budget_report(table, rates, heads, Allocation::dp);
  EXPECT_LE(report["predicted_kl"].get<double>(), report.value("predicted_kl_uniform", 1e300));
  const auto targets = targets_for(heads, reader.config());
  for (std::size_t l = 0; l < 3; ++l) EXPECT_EQ(targets[l].groups.size(), static_cast<std::size_t>(heads[l]));

  EXPECT_THROW(exchange_rates(comm::Communicator::self(), table, 3, probe), UsageError);
  EXPECT_THROW(exchange_rates(comm::Communicator::self(), table, 4, [](auto, auto) { return std::nan(""); }),
               NumericalError);
  // Noise below zero and parts that lose nothing count for nothing.
  for (const auto& rate : exchange_rates(world(), table, 4, [](auto, auto) { return -1e-9; }))
    EXPECT_EQ(rate, (std::array<double, 2>{0, 0}));
  for (const auto& rate : exchange_rates(world(), table, 8, [](auto, auto) { return 1.0; }))
    EXPECT_EQ(rate, (std::array<double, 2>{0, 0}));
}

}  // namespace
}  // namespace headfold::folding
