#include <ATen/Parallel.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <headfold/base/error.h>
#include <headfold/folding/grouping.h>

#include "models.h"

namespace headfold::folding {
namespace {

using headfold::testing_support::ScratchFolder;
using headfold::testing_support::world;
using testing_support::Random;

/// Scatter of a group of random points: cheap groups are clusters.
class Points {
 public:
  Points(std::uint64_t seed, std::int64_t count) : points_(Random(seed).normal({count, 3})) {}
  double operator()(const std::vector<std::int64_t>& heads) const {
    std::vector<std::int64_t> sorted = heads;
    std::sort(sorted.begin(), sorted.end());
    const at::Tensor chosen = points_.index_select(0, at::tensor(sorted, at::kLong));
    return (chosen - chosen.mean(0)).square().sum().item<double>();
  }

 private:
  at::Tensor points_;
};

/// All partitions into groups of equal size, by recursion on the first head left.
void every_partition(std::vector<std::int64_t> left, std::size_t size, Groups& so_far,
                     const std::function<void(const Groups&)>& visit) {
  if (left.empty()) return visit(so_far);
  std::vector<bool> chosen(left.size() - 1, false);
  std::fill(chosen.begin(), chosen.begin() + static_cast<std::ptrdiff_t>(size - 1), true);
  do {
    std::vector<std::int64_t> group{left[0]}, rest;
    for (std::size_t i = 1; i < left.size(); ++i) (chosen[i - 1] ? group : rest).push_back(left[i]);
    so_far.push_back(group);
    every_partition(rest, size, so_far, visit);
    so_far.pop_back();
  } while (std::prev_permutation(chosen.begin(), chosen.end()));
}

double brute_force(std::int64_t heads, std::int64_t size, const GroupCost& cost, std::int64_t* partitions) {
  std::vector<std::int64_t> all;
  for (std::int64_t h = 0; h < heads; ++h) all.push_back(h);
  double best = std::numeric_limits<double>::infinity();
  Groups so_far;
  *partitions = 0;
  every_partition(all, static_cast<std::size_t>(size), so_far, [&](const Groups& groups) {
    ++*partitions;
    double sum = 0;
    for (const auto& group : groups) sum += cost(group);
    best = std::min(best, sum);
  });
  return best;
}

TEST(SearchGroups, FindsTheCheapestOfAllPartitions) {
  for (const auto& [heads, groups, partitions] :
       {std::tuple{8, 4, 105}, {8, 2, 35}, {6, 3, 15}, {9, 3, 280}, {8, 1, 1}, {8, 8, 1}}) {
    for (std::uint64_t seed = 0; seed < 4; ++seed) {
      const Points points(seed, heads);
      GroupingOptions options;
      options.kv_heads = groups;
      std::int64_t count = 0;
      const double best = brute_force(heads, heads / groups, points, &count);
      ASSERT_EQ(count, partitions);
      const GroupingResult exact = search_groups(heads, options, points);
      EXPECT_NEAR(exact.cost, best, 1e-12 * best + 1e-300) << heads << " into " << groups;
      EXPECT_TRUE(exact.exhaustive);
      options.exhaustive = 0;  // swaps and annealing find it too
      const GroupingResult searched = search_groups(heads, options, points);
      EXPECT_FALSE(searched.exhaustive);
      EXPECT_NEAR(searched.cost, best, 1e-12 * best + 1e-300) << heads << " into " << groups;
      EXPECT_NO_THROW(check_groups(searched.groups, heads, groups, false, "searched"));
    }
  }
}

TEST(SearchGroups, LargeSearchesStayCloseToWhatIsBestAndNeverBelowContiguous) {
  // 16 heads in groups of 4: 2 627 625 partitions, 1820 groups; dynamic programming gives the truth.
  double gap = 0;
  for (std::uint64_t seed = 0; seed < 5; ++seed) {
    const Points points(100 + seed, 16);
    GroupingOptions options;
    options.kv_heads = 4;
    options.exhaustive = 1820;
    const GroupingResult exact = search_groups(16, options, points);
    ASSERT_TRUE(exact.exhaustive);
    EXPECT_EQ(exact.evaluations, 1820);
    options.exhaustive = 0;
    const GroupingResult found = search_groups(16, options, points);
    EXPECT_LE(found.evaluations, 1820 + 120);  // groups and pairs, each once
    EXPECT_GE(found.cost, exact.cost * (1 - 1e-12));
    EXPECT_LE(found.cost, found.contiguous_cost);
    EXPECT_EQ(found.contiguous_cost, exact.contiguous_cost);
    gap = std::max(gap, found.cost / exact.cost - 1);
  }
  EXPECT_LT(gap, 0.02);
}

TEST(SearchGroups, OneSeedIsDescentFromContiguousGroups) {
  const Points points(7, 32);
  GroupingOptions options;
  options.kv_heads = 16;
  options.seeds = 1;
  options.sweeps = 0;
  const GroupingResult none = search_groups(32, options, points);
  EXPECT_EQ(none.groups, contiguous_groups(32, 16));
  EXPECT_EQ(none.cost, none.contiguous_cost);
  options.sweeps = 50;
  const GroupingResult one = search_groups(32, options, points);
  EXPECT_LT(one.cost, none.cost);
  options.seeds = 12;
  EXPECT_LE(search_groups(32, options, points).cost, one.cost);
}

TEST(SearchGroups, SameSeedSameGroups) {
  const Points points(8, 24);
  GroupingOptions options;
  options.kv_heads = 6;
  options.seeds = 4;
  options.seed = 3;
  const GroupingResult first = search_groups(24, options, points), second = search_groups(24, options, points);
  EXPECT_EQ(first.groups, second.groups);
  EXPECT_EQ(first.cost, second.cost);
  EXPECT_EQ(first.evaluations, second.evaluations);
}

TEST(SearchGroups, TiesKeepContiguousGroups) {
  GroupingOptions options;
  options.kv_heads = 4;
  for (const std::int64_t exhaustive : {std::int64_t{600}, std::int64_t{0}}) {
    options.exhaustive = exhaustive;
    const GroupingResult result = search_groups(8, options, [](const auto&) { return 1.0; });
    EXPECT_EQ(result.groups, contiguous_groups(8, 4));
    EXPECT_EQ(result.cost, 4.0);
  }
}

TEST(SearchGroups, BlocksAreNotLeft) {
  const Points points(11, 12);
  GroupingOptions options;
  options.kv_heads = 6;
  options.block = 4;
  for (const std::int64_t exhaustive : {std::int64_t{600}, std::int64_t{0}}) {
    options.exhaustive = exhaustive;
    const GroupingResult result = search_groups(12, options, points);
    for (const auto& group : result.groups) EXPECT_EQ(group[0] / 4, group[1] / 4);
    EXPECT_LE(result.cost, result.contiguous_cost);
  }
  options.kv_heads = 2;  // groups of six
  EXPECT_THROW(search_groups(12, options, points), InputError);
}

TEST(SearchGroups, RefusesNonsense) {
  GroupingOptions options;
  options.kv_heads = 3;
  EXPECT_THROW(search_groups(8, options, [](const auto&) { return 1.0; }), InputError);
  options.kv_heads = 4;
  EXPECT_THROW(search_groups(8, options, [](const auto&) { return std::nan(""); }), NumericalError);
}

FoldOptions weights_only(std::int64_t kv_heads) {
  FoldOptions options;
  options.kv_heads = kv_heads;
  options.key_metric = Metric::weights;
  options.value_metric = Metric::weights;
  return options;
}

/// The same on every rank.
void expect_equal_everywhere(const std::vector<GroupingResult>& results) {
  Json text = Json::array();
  for (const GroupingResult& result : results)
    text.push_back({result.groups, result.cost, result.contiguous_cost, result.evaluations});
  EXPECT_NO_THROW(world().require_equal(text.dump(), "groups"));
}

TEST(SearchAllLayers, PlantedGroupsAreFoundExactly) {
  const ScratchFolder folder;
  const std::vector<Groups> pairs{{{0, 5}, {1, 3}, {2, 7}, {4, 6}}, {{0, 7}, {1, 6}, {2, 5}, {3, 4}}};
  const std::vector<Groups> quads{{{0, 3, 5, 6}, {1, 2, 4, 7}}, {{0, 2, 4, 6}, {1, 3, 5, 7}}};
  for (const auto& planted : {pairs, quads}) {
    const auto groups = static_cast<std::int64_t>(planted[0].size());
    const Json config = testing_support::small_llama(8, 8, 8, 2);
    auto tensors = testing_support::small_tensors(config, 1);
    testing_support::plant(tensors, planted, 8, 0.05, 2);
    const fs::path model = folder / fmt::format("{}-groups", groups);
    testing_support::write_model(model, config, tensors);
    const checkpoint::Reader reader(model);
    GroupingOptions grouping;
    for (const std::int64_t exhaustive : {std::int64_t{600}, std::int64_t{0}}) {
      grouping.exhaustive = exhaustive;
      grouping.seeds = 5;
      const auto found = search_all_layers(world(), reader, nullptr, weights_only(groups), grouping);
      EXPECT_EQ(groups_of(found), planted);
      for (const GroupingResult& layer : found) {
        EXPECT_LT(layer.cost, 0.1 * layer.contiguous_cost);
        EXPECT_EQ(layer.exhaustive, exhaustive > 0);
      }
      expect_equal_everywhere(found);
      const OrderedJson report = grouping_report(found, grouping);
      EXPECT_EQ(report["layers_changed"], 2);
      EXPECT_GT(report["gain"].get<double>(), 0.9);
    }
  }
}

TEST(SearchAllLayers, EveryMetricFindsPlantedGroupsAndPricesThemAsThePlanDoes) {
  const ScratchFolder folder;
  const std::vector<Groups> planted{{{0, 5}, {1, 3}, {2, 7}, {4, 6}}};
  const Json config = testing_support::small_llama(16, 8, 8, 1);
  auto tensors = testing_support::small_tensors(config, 3);
  testing_support::plant(tensors, planted, 8, 0.02, 4);
  testing_support::write_model(folder / "model", config, tensors);
  testing_support::calibrate(folder / "model", folder / "statistics.h5", 8);
  const checkpoint::Reader reader(folder / "model");
  const calibration::StatisticsFile statistics(folder / "statistics.h5");
  for (const auto& [keys, key_metric, value_metric] :
       {std::tuple{KeyFold::rope_commuting, Metric::act, Metric::act},
        {KeyFold::rope_commuting, Metric::act_query, Metric::act_out},
        {KeyFold::rope_commuting, Metric::act_query_dist, Metric::attn_out},
        {KeyFold::post_rotation, Metric::act, Metric::act},
        {KeyFold::latent, Metric::act_query, Metric::act_out}}) {
    FoldOptions options;
    options.kv_heads = 4;
    options.keys = keys;
    options.key_metric = key_metric;
    options.value_metric = value_metric;
    for (const std::int64_t exhaustive : {std::int64_t{600}, std::int64_t{0}}) {
      SCOPED_TRACE(fmt::format("{} {} {}, {}", name_of(keys), name_of(key_metric), name_of(value_metric), exhaustive));
      GroupingOptions grouping;
      grouping.seeds = 6;
      grouping.exhaustive = exhaustive;
      const auto found = search_all_layers(world(), reader, &statistics, options, grouping);
      // Phases of keys after their rotation, and values under attention, still tell the pairs; the fold may see them
      // less sharply.
      EXPECT_EQ(found.at(0).groups, planted[0]);
      EXPECT_LT(found[0].cost, 0.5 * found[0].contiguous_cost);
      expect_equal_everywhere(found);
      // The cost is the plan's losses of these groups over the contiguous groups' totals, without the cached Grams.
      const LayerProblem problem = load_problem(reader, &statistics, 0, Part::both, options);
      double losses[2] = {0, 0}, totals[2] = {0, 0};
      for (const auto& group : found[0].groups) {
        losses[0] += key_basis(problem, group, options).loss;
        losses[1] += value_basis(problem, group, options).loss;
      }
      for (const auto& group : contiguous_groups(8, 4)) {
        totals[0] += key_basis(problem, group, options).total;
        totals[1] += value_basis(problem, group, options).total;
      }
      EXPECT_NEAR(found[0].cost, losses[0] / totals[0] + losses[1] / totals[1], 1e-9 * found[0].contiguous_cost);
    }
  }
}

TEST(Loading, EveryFoldOfRotatedKeysSeesTheMeasuredDistances) {
  const ScratchFolder folder;
  const Json config = testing_support::small_llama(4, 4, 8, 1);
  testing_support::write_model(folder / "model", config, testing_support::small_tensors(config, 31));
  testing_support::calibrate(folder / "model", folder / "model.h5");
  world().barrier("calibrated");
  const checkpoint::Reader reader(folder / "model");
  const calibration::StatisticsFile statistics(folder / "model.h5");
  for (const KeyFold keys : {KeyFold::meanpool, KeyFold::procrustes, KeyFold::rope_commuting, KeyFold::latent}) {
    FoldOptions options;
    options.keys = keys;
    options.values = keys == KeyFold::meanpool ? ValueFold::meanpool : ValueFold::svd;
    options.key_metric = Metric::act_query_dist;
    options.kv_heads = 2;
    // All of the statistics, against what planning reads of them.
    LayerProblem whole = load_problem(reader, &statistics, 0, Part::keys, options);
    const LayerProblem planned = load_problems(reader, &statistics, 0, Part::keys, options, false).all;
    const double loss = key_basis(whole, {0, 1}, options).loss;
    EXPECT_NEAR(key_basis(planned, {0, 1}, options).loss / loss, 1.0, 1e-6) << name_of(keys);
    whole.moments.distance_law = at::Tensor();  // all pairs alike
    EXPECT_GT(std::abs(key_basis(whole, {0, 1}, options).loss / loss - 1.0), 1e-4) << name_of(keys);
  }
}

TEST(SearchAllLayers, RandomModelsNeverGetWorseAtAnyThreadCount) {
  const ScratchFolder folder;
  const Json config = testing_support::small_llama(24, 24, 4, 2);
  testing_support::write_model(folder / "model", config, testing_support::small_tensors(config, 9));
  const checkpoint::Reader reader(folder / "model");
  GroupingOptions grouping;
  grouping.seeds = 3;
  grouping.sweeps = 2;
  const int threads = at::get_num_threads();
  const auto found = search_all_layers(world(), reader, nullptr, weights_only(6), grouping);
  at::set_num_threads(threads == 1 ? 2 : 1);
  const auto again = search_all_layers(world(), reader, nullptr, weights_only(6), grouping);
  at::set_num_threads(threads);
  const auto alone = search_all_layers(comm::Communicator::self(), reader, nullptr, weights_only(6), grouping);
  for (std::size_t l = 0; l < found.size(); ++l) {
    EXPECT_FALSE(found[l].exhaustive);
    EXPECT_LT(found[l].cost, found[l].contiguous_cost);
    EXPECT_EQ(found[l].groups, again[l].groups);
    EXPECT_EQ(found[l].cost, again[l].cost);
    EXPECT_EQ(found[l].groups, alone[l].groups);
    EXPECT_EQ(found[l].cost, alone[l].cost);
    EXPECT_EQ(found[l].evaluations, alone[l].evaluations);
  }
  // Keys alone and values alone are cheaper for what they count.
  const auto values = search_all_layers(world(), reader, nullptr, weights_only(6), grouping, 0.0);
  EXPECT_LT(values[0].contiguous_cost, found[0].contiguous_cost);
  EXPECT_THROW(search_all_layers(world(), reader, nullptr, weights_only(6), grouping, -1.0), UsageError);
}

TEST(SearchAllLayers, TheDemoModelNeverGetsWorse) {
  const checkpoint::Reader reader(headfold::testing_support::source_folder() / "demo/models/prose-llama");
  for (const std::int64_t kv_heads : {4, 2}) {
    const auto found = search_all_layers(world(), reader, nullptr, weights_only(kv_heads), {});
    const Plan contiguous = make_plan(world(), reader, nullptr, weights_only(kv_heads));
    const Plan searched = make_plan(world(), reader, nullptr, weights_only(kv_heads), [&] {
      auto targets = targets_of(contiguous);
      for (std::size_t l = 0; l < targets.size(); ++l) targets[l].groups = found[l].groups;
      return targets;
    }());
    double before = 0, after = 0;
    for (std::size_t l = 0; l < found.size(); ++l) {
      EXPECT_TRUE(found[l].exhaustive);
      const LayerPlan &old = contiguous.layers[l], &now = searched.layers[l];
      before += old.key_relative_loss() + old.value_relative_loss();
      after += now.key_relative_loss() + now.value_relative_loss();
      EXPECT_NEAR(now.key_relative_loss() + now.value_relative_loss(), found[l].cost, 1e-9);
      EXPECT_LE(found[l].cost, found[l].contiguous_cost);
    }
    EXPECT_LT(after, 0.999 * before);
  }
}

TEST(SearchAllLayers, RefusesAlibiAndMissingStatistics) {
  const ScratchFolder folder;
  const Json config = testing_support::small_bloom(4, 8, 1);
  testing_support::write_model(folder / "bloom", config, testing_support::small_tensors(config, 1));
  FoldOptions options = weights_only(2);
  options.keys = KeyFold::norope;
  try {
    search_all_layers(world(), checkpoint::Reader(folder / "bloom"), nullptr, options, {});
    FAIL() << "ALiBi groups were searched";
  } catch (const UsageError& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("ALiBi"));
  }
  const Json llama = testing_support::small_llama(4, 4, 8, 1);
  testing_support::write_model(folder / "llama", llama, testing_support::small_tensors(llama, 1));
  FoldOptions needy;
  needy.kv_heads = 2;
  EXPECT_THROW(search_all_layers(world(), checkpoint::Reader(folder / "llama"), nullptr, needy, {}), UsageError);
}

TEST(TensorParallel, RanksDivideQueryHeadsAndEveryLayersKvHeads) {
  EXPECT_NO_THROW(check_tensor_parallel({8, 4, 8}, 32, 4));
  EXPECT_NO_THROW(check_tensor_parallel({3, 5}, 15, 1));
  EXPECT_THROW(check_tensor_parallel({8, 8}, 12, 8), UsageError);
  EXPECT_THROW(check_tensor_parallel({8}, 8, 0), UsageError);
  try {
    check_tensor_parallel({8, 4, 8, 2}, 32, 8);
    FAIL() << "4 and 2 KV heads over 8 ranks";
  } catch (const UsageError& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("1 (4), 3 (2)"));
  }
}

}  // namespace
}  // namespace headfold::folding
