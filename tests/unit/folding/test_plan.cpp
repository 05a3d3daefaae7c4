#include <gtest/gtest.h>
#include <headfold/base/error.h>
#include <headfold/folding/plan.h>

#include <limits>

namespace headfold::folding {
namespace {

checkpoint::ModelConfig config_of(checkpoint::Family family, std::int64_t kv_heads) {
  checkpoint::ModelConfig config;
  config.family = family;
  config.heads = kv_heads;
  config.kv_heads = config.source_kv_heads = kv_heads;
  config.head_dim = 8;
  config.hidden = 8 * kv_heads;
  config.layers = 2;
  config.file = "config.json";
  return config;
}

/// Text of the error that `work` must throw.
template <class Expected, class Work>
std::string message_of(const Work& work) {
  try {
    work();
  } catch (const Expected& error) {
    return error.what();
  } catch (const std::exception& error) {
    return std::string("another type of error: ") + error.what();
  }
  return "no error";
}

TEST(FoldNamesTest, round_trip_and_unknown_names_list_the_known) {
  for (const char* name : {"meanpool", "procrustes", "norope", "post-rotation", "rope-commuting", "latent"})
    EXPECT_EQ(name_of(parse_key_fold(name)), name);
  for (const char* name : {"meanpool", "procrustes", "svd"}) EXPECT_EQ(name_of(parse_value_fold(name)), name);
  for (const char* name : {"weights", "act", "act+query", "act+query+dist", "act+out", "attn+out"})
    EXPECT_EQ(name_of(parse_metric(name)), name);
  for (const char* name : {"contiguous", "search"}) EXPECT_EQ(name_of(parse_grouping(name)), name);
  for (const char* name : {"uniform", "lorc-progressive", "greedy", "dp"})
    EXPECT_EQ(name_of(parse_allocation(name)), name);
  EXPECT_NE(message_of<UsageError>([] {
              parse_key_fold("rope");
            }).find("meanpool, procrustes, norope, post-rotation, rope-commuting, latent"),
            std::string::npos);
  EXPECT_NE(message_of<UsageError>([] { parse_metric(""); }).find("weights, act, act+query"), std::string::npos);
}

TEST(LegalHeadsTest, are_the_divisors) {
  EXPECT_EQ(legal_kv_heads(config_of(checkpoint::Family::llama, 40)),
            (std::vector<std::int64_t>{1, 2, 4, 5, 8, 10, 20, 40}));
  EXPECT_EQ(legal_kv_heads(config_of(checkpoint::Family::llama, 1)), (std::vector<std::int64_t>{1}));
  auto bloom = config_of(checkpoint::Family::bloom, 8);
  EXPECT_EQ(legal_kv_heads(bloom), (std::vector<std::int64_t>{1, 2, 4}));
  bloom.split_qkv = true;
  EXPECT_EQ(legal_kv_heads(bloom), (std::vector<std::int64_t>{1, 2, 4, 8}));
}

TEST(CheckOptionsTest, refuses_what_makes_no_sense_and_names_the_choices) {
  const auto llama = config_of(checkpoint::Family::llama, 8), bloom = config_of(checkpoint::Family::bloom, 8);
  FoldOptions options;
  options.kv_heads = 4;
  EXPECT_NO_THROW(check_options(options, llama));
  EXPECT_NE(message_of<UsageError>([&] { check_options(options, bloom); }).find("meanpool, procrustes, norope, latent"),
            std::string::npos);
  options.keys = KeyFold::norope;
  EXPECT_NO_THROW(check_options(options, bloom));
  EXPECT_NE(message_of<UsageError>([&] {
              check_options(options, llama);
            }).find("meanpool, procrustes, post-rotation, rope-commuting, latent"),
            std::string::npos);
  options.keys = KeyFold::post_rotation;
  EXPECT_NO_THROW(check_options(options, llama));
  EXPECT_NE(message_of<UsageError>([&] { check_options(options, bloom); }).find("meanpool, procrustes, norope, latent"),
            std::string::npos);
  options.value_metric = Metric::act_query;
  EXPECT_NE(message_of<UsageError>([&] { check_options(options, llama); }).find("weights, act, act+out, attn+out"),
            std::string::npos);
  options.value_metric = Metric::act;
  for (const std::int64_t heads : {3, 0, -4, 16}) {
    options.kv_heads = heads;
    EXPECT_NE(message_of<UsageError>([&] { check_options(options, llama); }).find("1, 2, 4, 8"), std::string::npos)
        << heads;
  }
  options.kv_heads = 4;
  auto uneven = llama;
  uneven.layer_shapes.assign(static_cast<std::size_t>(uneven.layers), uneven.shape_of(0));
  EXPECT_NO_THROW(check_options(options, uneven));
  uneven.layer_shapes.back().kv_heads = 4;
  EXPECT_NE(message_of<InputError>([&] { check_options(options, uneven); }).find("layers 0 and"), std::string::npos);
  options.sink_weight = 1.5;
  EXPECT_THROW(check_options(options, llama), UsageError);
  options.sink_weight = 1;
  options.weight_ridge = -1;
  EXPECT_THROW(check_options(options, llama), UsageError);
  options.weight_ridge = 0;
  auto folded = llama;
  folded.layout = checkpoint::KvLayout::projected;
  EXPECT_THROW(check_options(options, folded), InputError);
}

TEST(CheckOptionsTest, refuses_impossible_combinations_and_nonsense_numbers) {
  const auto llama = config_of(checkpoint::Family::llama, 8), bloom = config_of(checkpoint::Family::bloom, 8);
  struct Wrong {
    const char* mentions;
    void (*change)(FoldOptions&);
    bool bloom = false;
  };
  using Options = FoldOptions&;
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const std::vector<Wrong> list = {
      {"act+query", [](Options o) { o.key_metric = Metric::act_out; }},
      {"act+query", [](Options o) { o.key_metric = Metric::act_query_dist; }, true},
      {"act+query", [](Options o) { o.keys = KeyFold::post_rotation, o.key_metric = Metric::act_query_dist; }},
      {"rope-commuting", [](Options o) { o.keys = KeyFold::post_rotation, o.slow_band = 2; }},
      {"1 to 4", [](Options o) { o.slow_band = 5; }},
      {"1 to 4", [](Options o) { o.slow_band = -2; }},
      {"--polish", [](Options o) { o.polish = -1; }},
      {"--polish", [](Options o) { o.polish = 1001; }},
      {"--context", [](Options o) { o.context = -1; }},
      {"--mean-weight", [](Options o) { o.mean_weight = 1.5; }},
      {"--mean-weight", [](Options o) { o.mean_weight = -0.1; }},
      {"--sink-weight", [](Options o) { o.sink_weight = 2; }},
      {"--latent-groups", [](Options o) { o.latent_groups = 2; }},
      {"divide the 8", [](Options o) { o.keys = KeyFold::latent, o.latent_groups = 3; }},
      {"divide the 8", [](Options o) { o.keys = KeyFold::latent, o.latent_groups = -1; }},
      {"--min-width",
       [](Options o) {
         o.keys = KeyFold::latent, o.latent_groups = 1, o.allocation = Allocation::lorc_progressive;
         o.min_width = 40, o.max_width = 20;
       }},
      {"--min-width",
       [](Options o) {
         o.keys = KeyFold::latent, o.latent_groups = 1, o.allocation = Allocation::lorc_progressive, o.max_width = 65;
       }},
      {"latent", [](Options o) { o.allocation = Allocation::lorc_progressive; }},
      {"counts KV heads", [](Options o) { o.keys = KeyFold::latent, o.allocation = Allocation::dp; }},
      {"projected", [](Options o) { o.keys = KeyFold::post_rotation, o.allocation = Allocation::greedy; }},
      {"BLOOM", [](Options o) { o.allocation = Allocation::dp; }, true},
      {"ALiBi", [](Options o) { o.grouping = Grouping::search; }, true},
      {"--weight-ridge", [](Options o) { o.weight_ridge = -1; }},
  };
  for (std::size_t i = 0; i < list.size(); ++i) {
    FoldOptions options;
    options.kv_heads = 4;
    if (list[i].bloom) options.keys = KeyFold::norope;
    EXPECT_NO_THROW(check_options(options, list[i].bloom ? bloom : llama)) << i;
    list[i].change(options);
    const std::string message = message_of<UsageError>([&] { check_options(options, list[i].bloom ? bloom : llama); });
    EXPECT_NE(message.find(list[i].mentions), std::string::npos) << i << ": " << message;
  }
  for (double FoldOptions::*number :
       {&FoldOptions::mean_weight, &FoldOptions::sink_weight, &FoldOptions::weight_ridge}) {
    FoldOptions options;
    options.kv_heads = 4;
    options.*number = nan;
    EXPECT_THROW(check_options(options, llama), UsageError);
  }
}

TEST(NeedsStatisticsTest, only_metrics_on_activations_do) {
  FoldOptions options;
  EXPECT_TRUE(needs_statistics(options));
  options.keys = KeyFold::meanpool;
  EXPECT_TRUE(needs_statistics(options));
  options.values = ValueFold::meanpool;
  EXPECT_FALSE(needs_statistics(options));
  options.keys = KeyFold::rope_commuting;
  options.key_metric = Metric::weights;
  EXPECT_FALSE(needs_statistics(options));
}

TEST(CheckGroupsTest, accepts_partitions_only) {
  const auto check = [](const Groups& groups, bool in_order = false) {
    check_groups(groups, 4, 2, in_order, "layer 7");
  };
  EXPECT_EQ(contiguous_groups(4, 2), (Groups{{0, 1}, {2, 3}}));
  EXPECT_NO_THROW(check({{0, 1}, {2, 3}}, true));
  EXPECT_NO_THROW(check({{3, 1}, {0, 2}}));
  EXPECT_NE(message_of<InputError>([&] { check({{0, 2}, {1, 3}}, true); }).find("ALiBi"), std::string::npos);
  EXPECT_NE(message_of<InputError>([&] { check({{1, 0}, {2, 3}}, true); }).find("ALiBi"), std::string::npos);
  for (const Groups& bad : {Groups{{0, 1}}, Groups{{0, 1, 2}, {3}}, Groups{{0, 1}, {1, 2}}, Groups{{0, 1}, {2, 4}},
                            Groups{{0, 1}, {2, -1}}})
    EXPECT_NE(message_of<InputError>([&] { check(bad); }).find("layer 7"), std::string::npos);
}

Plan example() {
  Plan plan;
  plan.options.kv_heads = 2;
  plan.options.sink_weight = 0.1;
  plan.model_hash = "model";
  plan.statistics_hash = "statistics";
  for (std::int64_t l = 0; l < 2; ++l) {
    LayerPlan layer;
    layer.layer = l;
    layer.key_width = layer.value_width = 16;
    GroupPlan first, second;
    first.kv_heads = {0, 2};
    first.key_loss = 1.0 / 3.0;
    first.key_total = 2.0;
    first.value_loss = 0.1;
    first.value_total = 0.7;
    first.key_energy = {0.5, 1.0};
    first.value_energy = {0.25, 1.0};
    first.key_held_out = 0.2;
    first.imaginary_share = {0.1, 0.9};
    second.kv_heads = {3, 1};
    second.key_loss = 1e-300;
    second.key_total = 1.0;
    second.value_loss = 0.2;
    second.value_total = 0.3;
    second.key_energy = second.value_energy = {1.0};
    layer.groups = {first, second};
    plan.layers.push_back(layer);
  }
  return plan;
}

TEST(PlanJsonTest, round_trip_keeps_every_bit) {
  const Plan plan = example();
  const std::string text = to_json(plan).dump(2);
  const Plan back = plan_from_json(Json::parse(text), "plan.json");
  EXPECT_EQ(to_json(back).dump(2), text);
  EXPECT_EQ(back.layers[1].groups[0].key_loss, 1.0 / 3.0);
  EXPECT_EQ(targets_of(back)[0].groups, (Groups{{0, 2}, {3, 1}}));
  EXPECT_DOUBLE_EQ(plan.layers[0].key_relative_loss(), (1.0 / 3.0) / 3.0);
  EXPECT_DOUBLE_EQ(plan.layers[0].value_relative_loss(), 0.3);
}

TEST(PlanJsonTest, broken_plans_are_refused_with_file_and_place) {
  const Json good = Json::parse(to_json(example()).dump());
  const auto refused = [&](const std::function<void(Json&)>& damage, const std::string& words) {
    Json bad = good;
    damage(bad);
    const std::string message = message_of<InputError>([&] { plan_from_json(bad, "plan.json"); });
    EXPECT_NE(message.find("plan.json"), std::string::npos) << message;
    EXPECT_NE(message.find(words), std::string::npos) << message;
  };
  refused([](Json& j) { j["format"] = "other"; }, "headfold-plan");
  refused([](Json& j) { j["format_version"] = 2; }, "format_version");
  refused([](Json& j) { j.erase("model"); }, "model");
  refused([](Json& j) { j["fold"]["keys"] = "turn"; }, "rope-commuting");
  refused([](Json& j) { j["fold"]["sink_weight"] = "much"; }, "sink_weight");
  refused([](Json& j) { j["fold"]["sink-weight"] = 0.5; }, "unknown key \"sink-weight\"");
  refused([](Json& j) { j["layers"][0]["group"] = Json::array(); }, "unknown key \"group\"");
  refused([](Json& j) { j["layers"][0]["groups"][0]["heads"] = {0}; }, "unknown key \"heads\"");
  refused([](Json& j) { j["kv_heads"] = 0; }, "equal groups");
  refused([](Json& j) { j["layers"] = 3; }, "layers");
  refused([](Json& j) { j["layers"][1]["layer"] = 5; }, "layer 1");
  refused([](Json& j) { j["layers"][0]["groups"][0]["kv_heads"] = {0, 3}; }, "two places");
  refused([](Json& j) { j["layers"][0]["groups"][0]["kv_heads"] = {0, 9}; }, "no KV head 9");
  refused([](Json& j) { j["layers"][0]["groups"].erase(0); }, "layer 0");
  refused([](Json& j) { j["layers"][0]["groups"][1]["kv_heads"] = "all"; }, "kv_heads");
  EXPECT_THROW(plan_from_json(Json::array(), "plan.json"), InputError);
}

}  // namespace
}  // namespace headfold::folding
