// Whole models: calibrated, planned, folded, written, read back and run.

#include <ATen/CPUGeneratorImpl.h>
#include <gtest/gtest.h>
#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/calibration/collect.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/folding/apply.h>
#include <headfold/folding/comparison.h>
#include <headfold/model/model.h>

#include "instances.h"
#include "models.h"
#include "world.h"

namespace headfold::folding {
namespace {

using headfold::testing_support::ScratchFolder;
using headfold::testing_support::world;
using testing_support::Random;
using testing_support::small_tensors;
using testing_support::times_complex;
using testing_support::unit_phases;
using testing_support::write_model;
using Tensors = std::map<std::string, at::Tensor>;

constexpr std::int64_t kVocab = 64, kDim = 8, kLayers = 2;

Json llama_config(std::int64_t heads, std::int64_t kv_heads, bool biased = false,
                  const std::string& dtype = "float32") {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"model_type", "llama"},
          {"hidden_act", "silu"},
          {"hidden_size", heads * kDim},
          {"intermediate_size", 48},
          {"num_hidden_layers", kLayers},
          {"num_attention_heads", heads},
          {"num_key_value_heads", kv_heads},
          {"vocab_size", kVocab},
          {"max_position_embeddings", 64},
          {"rms_norm_eps", 1e-5},
          {"rope_theta", 10000.0},
          {"tie_word_embeddings", false},
          {"attention_bias", biased},
          {"bos_token_id", 1},
          {"eos_token_id", 2},
          {"torch_dtype", dtype}};
}

Json bloom_config(std::int64_t heads) {
  return {{"architectures", {"BloomForCausalLM"}},
          {"model_type", "bloom"},
          {"vocab_size", kVocab},
          {"hidden_size", heads * kDim},
          {"n_layer", kLayers},
          {"n_head", heads},
          {"layer_norm_epsilon", 1e-5},
          {"apply_residual_connection_post_layernorm", false},
          {"tie_word_embeddings", true},
          {"bos_token_id", 1},
          {"eos_token_id", 2},
          {"torch_dtype", "float32"}};
}

at::Tensor random_ids(std::uint64_t seed, std::int64_t batch, std::int64_t tokens) {
  at::Generator generator = at::detail::createCPUGenerator(seed);
  return at::randint(kVocab, {batch, tokens}, generator, at::TensorOptions().dtype(at::kLong));
}

/// Calibrates on 24 x 32 random tokens. Collective.
void calibrate(const fs::path& model, const fs::path& file) {
  const checkpoint::Reader reader(model);
  const checkpoint::ModelConfig& config = reader.config();
  const comm::Grid grid = comm::make_grid(world(), 1);
  const auto layers = calibration::collect(reader, grid, random_ids(5, 24, 32), {});
  calibration::StatisticsHeader header = calibration::header_of(config, {}, 24, 32);
  header.model_hash = reader.fingerprint();
  header.data_hash = "random";
  header.headfold_version = "test";
  calibration::write_statistics(file, header, world(), calibration::layers_to_write(layers, 0, grid));
}

FoldOptions fold_of(KeyFold keys, Metric key_metric, std::int64_t kv_heads) {
  FoldOptions options;
  options.keys = keys;
  options.key_metric = key_metric;
  options.kv_heads = kv_heads;
  if (keys == KeyFold::meanpool) options.values = ValueFold::meanpool;
  return options;
}

/// Calibrates `model` and folds it into `out`. Collective. Returns the plan.
Plan fold(const fs::path& model, const fs::path& out, const FoldOptions& options,
          const std::vector<Groups>& groups = {}) {
  const fs::path file = out.string() + ".h5";
  calibrate(model, file);
  const checkpoint::Reader reader(model);
  const calibration::StatisticsFile statistics(file);
  std::vector<LayerTarget> targets;
  targets.reserve(groups.size());
  for (const Groups& one : groups) targets.push_back({one, kDim, kDim});
  const Plan plan = make_plan(world(), reader, &statistics, options, targets);
  apply_plan(world(), reader, &statistics, plan, out);
  world().barrier("folded");
  return plan;
}

at::Tensor logits_of(const fs::path& folder) {
  const checkpoint::Reader reader(folder);
  const model::Decoder decoder(reader, at::kFloat);
  return decoder.logits(random_ids(9, 2, 24));
}

/// max |a - b| / max |b|.
double difference(const fs::path& a, const fs::path& b) {
  const at::Tensor x = logits_of(a), y = logits_of(b);
  return ((x - y).abs().max() / y.abs().max()).item<double>();
}

std::string llama_name(std::int64_t layer, const char* name) {
  return fmt::format("model.layers.{}.self_attn.{}.weight", layer, name);
}

/// Makes head 2i + 1 of keys and values a copy of head 2i (per layer), so that halving loses nothing.
void duplicate_heads(Tensors& tensors, const std::vector<std::pair<std::int64_t, std::int64_t>>& pairs) {
  for (std::int64_t l = 0; l < kLayers; ++l)
    for (const char* name : {"k_proj", "v_proj"}) {
      at::Tensor& weight = tensors.at(llama_name(l, name));
      for (const auto& [from, to] : pairs)
        weight.slice(0, to * kDim, (to + 1) * kDim).copy_(weight.slice(0, from * kDim, (from + 1) * kDim));
    }
}

std::map<std::string, std::string> files_of(const fs::path& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::directory_iterator(folder))
    files[entry.path().filename().string()] = read_file(entry.path());
  return files;
}

// ------------------------------------------------------------------------------------------- exactness

TEST(FoldedModelTest, equal_heads_merge_without_changing_logits) {
  const ScratchFolder scratch;
  Tensors tensors = small_tensors(llama_config(4, 4), 1);
  duplicate_heads(tensors, {{0, 1}, {2, 3}});
  write_model(scratch / "model", llama_config(4, 4), tensors);
  for (const KeyFold keys : {KeyFold::rope_commuting, KeyFold::post_rotation, KeyFold::meanpool})
    for (const Metric metric : {Metric::act_query, Metric::act, Metric::weights}) {
      if (keys == KeyFold::meanpool && metric != Metric::act) continue;
      const fs::path out = scratch / (name_of(keys) + "-" + name_of(metric));
      const Plan plan = fold(scratch / "model", out, fold_of(keys, metric, 2));
      EXPECT_LT(difference(out, scratch / "model"), 1e-5) << out;
      for (const LayerPlan& layer : plan.layers)
        EXPECT_LT(layer.key_relative_loss() + layer.value_relative_loss(), 5e-9) << out;
    }
}

TEST(FoldedModelTest, heads_equal_up_to_a_complex_number_per_frequency_merge_without_changing_logits) {
  const ScratchFolder scratch;
  Tensors tensors = small_tensors(llama_config(4, 4), 2);
  duplicate_heads(tensors, {{0, 1}, {2, 3}});
  Random random(3);
  for (std::int64_t l = 0; l < kLayers; ++l) {
    at::Tensor& key = tensors.at(llama_name(l, "k_proj"));
    key = times_complex(key.to(at::kDouble),
                        (0.5 + random.uniform({4, kDim / 2})).to(at::kComplexDouble) * unit_phases(random, 4, kDim / 2))
              .to(at::kFloat);
  }
  write_model(scratch / "model", llama_config(4, 4), tensors);
  fold(scratch / "model", scratch / "folded", fold_of(KeyFold::rope_commuting, Metric::act_query, 2));
  EXPECT_LT(difference(scratch / "folded", scratch / "model"), 1e-5);
  FoldOptions mean = fold_of(KeyFold::meanpool, Metric::act_query, 2);
  mean.values = ValueFold::svd;
  fold(scratch / "model", scratch / "mean", mean);
  EXPECT_GT(difference(scratch / "mean", scratch / "model"), 1e-2);
}

TEST(FoldedModelTest, groups_of_one_change_nothing) {
  const ScratchFolder scratch;
  write_model(scratch / "model", llama_config(4, 2), small_tensors(llama_config(4, 2), 4));
  fold(scratch / "model", scratch / "folded", fold_of(KeyFold::rope_commuting, Metric::act_query, 2));
  EXPECT_LT(difference(scratch / "folded", scratch / "model"), 1e-5);
  write_model(scratch / "bloom", bloom_config(4), small_tensors(bloom_config(4), 5));
  EXPECT_THROW(fold(scratch / "bloom", scratch / "bloom-folded", fold_of(KeyFold::norope, Metric::act_query, 4)),
               UsageError);
  EXPECT_FALSE(fs::exists(scratch / "bloom-folded"));
}

TEST(FoldedModelTest, injected_phases_change_neither_loss_nor_folded_model) {
  const ScratchFolder scratch;
  Tensors tensors = small_tensors(llama_config(8, 4), 6);
  write_model(scratch / "model", llama_config(8, 4), tensors);
  const FoldOptions options = fold_of(KeyFold::rope_commuting, Metric::act_query, 2);
  const Plan before = fold(scratch / "model", scratch / "folded", options);
  fold(scratch / "model", scratch / "mean", fold_of(KeyFold::meanpool, Metric::act_query, 2));
  Random random(7);
  for (std::int64_t l = 0; l < kLayers; ++l) {
    const at::Tensor phases = unit_phases(random, 4, kDim / 2);
    at::Tensor &key = tensors.at(llama_name(l, "k_proj")), &query = tensors.at(llama_name(l, "q_proj"));
    key = times_complex(key.to(at::kDouble), phases).to(at::kFloat);
    query = times_complex(query.to(at::kDouble), phases.repeat_interleave(2, 0)).to(at::kFloat);
  }
  write_model(scratch / "turned", llama_config(8, 4), tensors);
  EXPECT_LT(difference(scratch / "turned", scratch / "model"), 1e-5);
  const Plan after = fold(scratch / "turned", scratch / "turned-folded", options);
  fold(scratch / "turned", scratch / "turned-mean", fold_of(KeyFold::meanpool, Metric::act_query, 2));
  for (std::size_t l = 0; l < kLayers; ++l)
    EXPECT_NEAR(after.layers[l].key_relative_loss(), before.layers[l].key_relative_loss(), 1e-5);
  EXPECT_LT(difference(scratch / "turned-folded", scratch / "folded"), 1e-4);
  EXPECT_GT(difference(scratch / "turned-mean", scratch / "mean"), 1e-2);
  EXPECT_GT(difference(scratch / "folded", scratch / "model"), 1e-2);  // the fold does lose something here
}

TEST(FoldedModelTest, stock_form_equals_the_dense_equivalent) {
  const ScratchFolder scratch;
  for (const bool biased : {false, true}) {
    const std::string tag = biased ? "-biased" : "";
    const Json config = llama_config(4, 4, biased);
    Tensors tensors = small_tensors(config, 8);
    const fs::path model = scratch / ("model" + tag), out = scratch / ("folded" + tag);
    write_model(model, config, tensors);
    const FoldOptions options = fold_of(KeyFold::rope_commuting, Metric::act_query, 2);
    const Plan plan = fold(model, out, options);
    // Dense-equivalent multi-head model: every head rebuilt from its group, k^ = B A k, v^ = B A v.
    const checkpoint::Reader reader(model);
    const calibration::StatisticsFile statistics(out.string() + ".h5");
    for (std::int64_t l = 0; l < kLayers; ++l) {
      const LayerProblem problem = load_problem(reader, &statistics, l, Part::both, FoldOptions{});
      for (const GroupPlan& group : plan.layers[static_cast<std::size_t>(l)].groups) {
        const Basis keys = key_basis(problem, group.kv_heads, options),
                    values = value_basis(problem, group.kv_heads, options);
        const at::Tensor rows = block_index(group.kv_heads, kDim);
        const auto rebuild = [&](const std::string& name, const Basis& basis) {
          at::Tensor& weight = tensors.at(name);
          const at::Tensor source = weight.index_select(0, rows).to(at::kDouble);
          weight.index_copy_(0, rows, at::matmul(basis.decoder, at::matmul(basis.encoder, source)).to(at::kFloat));
        };
        const std::string prefix = fmt::format("model.layers.{}.self_attn.", l);
        rebuild(prefix + "k_proj.weight", keys);
        rebuild(prefix + "v_proj.weight", values);
        if (!biased) continue;
        rebuild(prefix + "k_proj.bias", keys);
        // The output projection has a bias, so values are folded less their mean: v^ = B A (v - m) + m.
        const at::Tensor mean = at::matmul(problem.weights.value.index_select(0, rows),
                                           problem.moments.mean.slice(0, 0, problem.weights.hidden)) +
                                problem.weights.value_bias.index_select(0, rows);
        rebuild(prefix + "v_proj.bias", values);
        const at::Tensor left_out = mean - at::matmul(values.decoder, at::matmul(values.encoder, mean));
        tensors.at(prefix + "v_proj.bias").index_add_(0, rows, left_out.to(at::kFloat));
      }
    }
    write_model(scratch / ("dense" + tag), config, tensors);
    EXPECT_LT(difference(out, scratch / ("dense" + tag)), 1e-5);
    EXPECT_GT(difference(out, model), 1e-3);
    const Json folded = read_json(out / "config.json");
    EXPECT_EQ(folded.at("num_key_value_heads"), 2);
    EXPECT_EQ(folded.at("architectures"), Json({"LlamaForCausalLM"}));
    Json same = folded;
    same["num_key_value_heads"] = 4;
    EXPECT_EQ(same, config);
  }
}

TEST(FoldedModelTest, moved_heads_take_their_queries_and_outputs_along) {
  const ScratchFolder scratch;
  Tensors tensors = small_tensors(llama_config(8, 4), 10);
  duplicate_heads(tensors, {{0, 2}, {1, 3}});
  write_model(scratch / "model", llama_config(8, 4), tensors);
  const std::vector<Groups> groups(kLayers, Groups{{2, 0}, {3, 1}});
  for (const KeyFold keys : {KeyFold::rope_commuting, KeyFold::post_rotation, KeyFold::meanpool}) {
    const fs::path out = scratch / name_of(keys);
    fold(scratch / "model", out, fold_of(keys, Metric::act, 2), groups);
    EXPECT_LT(difference(out, scratch / "model"), 1e-5) << out;
  }
  fold(scratch / "model", scratch / "contiguous", fold_of(KeyFold::rope_commuting, Metric::act, 2));
  EXPECT_GT(difference(scratch / "contiguous", scratch / "model"), 1e-2);
}

TEST(FoldedModelTest, bloom_with_equal_heads_keeps_its_logits) {
  const ScratchFolder scratch;
  Tensors tensors = small_tensors(bloom_config(6), 11);  // six heads: ALiBi slopes of a number that is no power of two
  for (std::int64_t l = 0; l < kLayers; ++l)
    for (const char* part : {"weight", "bias"}) {
      at::Tensor fused = tensors.at(fmt::format("transformer.h.{}.self_attention.query_key_value.{}", l, part));
      const at::Tensor view = fused.view({3, 2, 3, kDim, -1});  // [pair, head, (q, k, v), d, hidden]
      for (const int which : {1, 2}) view.select(1, 1).select(1, which).copy_(view.select(1, 0).select(1, which));
    }
  // Keys may differ by a constant: softmax does not see it.
  tensors.at("transformer.h.0.self_attention.query_key_value.bias").view({6, 3, kDim})[1][1].add_(0.7);
  write_model(scratch / "model", bloom_config(6), tensors);
  for (const Metric metric : {Metric::act_query, Metric::act, Metric::weights}) {
    const fs::path out = scratch / ("norope-" + name_of(metric));
    fold(scratch / "model", out, fold_of(KeyFold::norope, metric, 3));
    EXPECT_LT(difference(out, scratch / "model"), 1e-5) << out;
  }
  EXPECT_THROW(fold(scratch / "model", scratch / "moved", fold_of(KeyFold::norope, Metric::act, 3),
                    std::vector<Groups>(kLayers, Groups{{0, 2}, {1, 3}, {4, 5}})),
               InputError);
}

// ------------------------------------------------------------------------------------------- statistics in use

TEST(FoldStatisticsTest, measured_grams_of_values_give_the_plan_of_the_input_moments) {
  const ScratchFolder scratch;
  for (const char* family : {"llama", "llama-biased", "bloom"}) {
    const bool llama = family != std::string("bloom");
    const Json config = llama ? llama_config(8, 4, family == std::string("llama-biased")) : bloom_config(4);
    const fs::path model = scratch / family;
    write_model(model, config, small_tensors(config, 31));
    const checkpoint::Reader reader(model);
    calibration::CollectOptions collected;
    collected.half_samples = collected.attention_statistics = true;
    const comm::Grid grid = comm::make_grid(world(), 1);
    const auto layers = calibration::collect(reader, grid, random_ids(5, 24, 32), collected);
    calibration::StatisticsHeader header = calibration::header_of(reader.config(), collected, 24, 32);
    header.model_hash = reader.fingerprint();
    const auto written = [&](const char* name, const std::function<void(calibration::PackedStatistics&)>& change) {
      std::vector<calibration::OwnedLayer> own = calibration::layers_to_write(layers, 0, grid);
      std::vector<calibration::PackedStatistics> changed;
      for (const auto& layer : own) changed.push_back(*layer.statistics);
      for (std::size_t i = 0; i < own.size(); ++i) {
        change(changed[i]);
        own[i].statistics = &changed[i];
      }
      const fs::path file = model.string() + name;
      calibration::write_statistics(file, header, world(), own);
      return calibration::StatisticsFile(file);
    };
    const calibration::StatisticsFile measured = written("-measured.h5", [](auto&) {});
    const calibration::StatisticsFile blind = written("-blind.h5", [](auto& packed) {
      packed.moment = at::zeros_like(packed.moment);
      packed.moment_even = at::zeros_like(packed.moment);
    });
    header.has_values = false;
    header.has_rotated_keys = llama;
    const calibration::StatisticsFile before = written("-before.h5", [&](auto& packed) {
      packed.values = packed.values_even = at::Tensor();
      if (!llama) packed.rotated_keys = packed.rotated_keys_even = at::Tensor();
    });
    for (const double sink_weight : {1.0, 0.5, 0.0})
      for (const Metric metric : {Metric::act, Metric::act_out}) {
        FoldOptions options = fold_of(llama ? KeyFold::rope_commuting : KeyFold::norope, Metric::act_query, 2);
        options.value_metric = metric;
        options.sink_weight = sink_weight;
        const Plan found = make_plan(world(), reader, &measured, options, {}, true),
                   expected = make_plan(world(), reader, &before, options, {}, true);
        for (std::size_t l = 0; l < found.layers.size(); ++l)
          for (std::size_t g = 0; g < found.layers[l].groups.size(); ++g) {
            const GroupPlan &a = found.layers[l].groups[g], &b = expected.layers[l].groups[g];
            for (const auto number : {&GroupPlan::key_loss, &GroupPlan::key_total, &GroupPlan::key_fitted,
                                      &GroupPlan::key_held_out, &GroupPlan::value_loss, &GroupPlan::value_total,
                                      &GroupPlan::value_fitted, &GroupPlan::value_held_out})
              EXPECT_NEAR(a.*number, b.*number, 1e-5 * b.*number) << family << " " << sink_weight;
            EXPECT_GT(b.value_held_out, 0);
          }
        if (sink_weight != 1) continue;
        // The input's second moments are not looked at: zeros in their place change nothing.
        Plan without = make_plan(world(), reader, &blind, options, {}, true);
        without.statistics_hash = found.statistics_hash;
        EXPECT_EQ(to_json(without).dump(), to_json(found).dump());
      }
    // Where the measured Grams do not suffice, the moments are looked at.
    const FoldOptions options = fold_of(KeyFold::latent, Metric::act, 2);
    if (family != std::string("llama")) continue;
    EXPECT_NE(to_json(make_plan(world(), reader, &blind, options)).dump(),
              to_json(make_plan(world(), reader, &measured, options)).dump());
  }
}

TEST(FoldedModelTest, a_polish_needs_more_tokens_than_channels) {
  const ScratchFolder scratch;
  const Json config = llama_config(4, 4, false, "float32");
  write_model(scratch / "model", config, small_tensors(config, 18));
  const checkpoint::Reader reader(scratch / "model");
  FoldOptions options = fold_of(KeyFold::rope_commuting, Metric::act_query_dist, 2);
  options.value_metric = Metric::attn_out;
  FoldOptions polished = options;
  polished.polish = 3;
  const std::int64_t channels = 2 * reader.config().head_dim;
  for (const bool enough : {false, true}) {
    const std::int64_t samples = 2, tokens = (enough ? 3 : 1) * channels / 2;  // at position 0 there is nothing to fit
    const fs::path file = scratch / (enough ? "many.h5" : "few.h5");
    world().on_root([&] {
      const at::Tensor ids =
          at::randint(48, {samples, tokens}, at::detail::createCPUGenerator(6), at::TensorOptions().dtype(at::kLong));
      calibration::CollectOptions collected;
      collected.attention_statistics = true;
      const comm::Grid grid = comm::make_grid(comm::Communicator::self(), 1);
      const auto layers = calibration::collect(reader, grid, ids, collected);
      calibration::StatisticsHeader header = calibration::header_of(reader.config(), collected, samples, tokens);
      header.model_hash = reader.fingerprint();
      header.data_hash = "random";
      calibration::write_statistics(file, header, comm::Communicator::self(),
                                    calibration::layers_to_write(layers, 0, grid));
    });
    world().barrier("statistics written");
    const calibration::StatisticsFile statistics(file);
    const Plan plain = make_plan(world(), reader, &statistics, options);
    const Plan fitted = make_plan(world(), reader, &statistics, polished);
    for (std::size_t l = 0; l < plain.layers.size(); ++l) {
      const auto losses = [&](const Plan& plan) {
        return std::pair(plan.layers[l].key_relative_loss(), plan.layers[l].value_relative_loss());
      };
      if (enough)
        EXPECT_LT(losses(fitted).first, losses(plain).first);
      else
        EXPECT_EQ(losses(fitted), losses(plain));
    }
  }
}

// ------------------------------------------------------------------------------------------- what is written

TEST(FoldedModelTest, bytes_and_plans_do_not_depend_on_ranks) {
  const ScratchFolder scratch;
  const Json config = llama_config(4, 4, false, "bfloat16");
  Tensors tensors = small_tensors(config, 12);
  for (auto& [name, tensor] : tensors) tensor = tensor.to(at::kBFloat16);
  write_model(scratch / "llama", config, tensors);
  write_model(scratch / "bloom", bloom_config(4), small_tensors(bloom_config(4), 13));
  for (const KeyFold keys : {KeyFold::rope_commuting, KeyFold::post_rotation, KeyFold::norope}) {
    const fs::path model = scratch / (keys == KeyFold::norope ? "bloom" : "llama"), out = scratch / name_of(keys);
    const fs::path alone = out.string() + "-alone";
    const FoldOptions options = fold_of(keys, keys == KeyFold::post_rotation ? Metric::act : Metric::act_query, 2);
    calibrate(model, out.string() + ".h5");
    const checkpoint::Reader reader(model);
    const calibration::StatisticsFile statistics(out.string() + ".h5");
    const Plan together = make_plan(world(), reader, &statistics, options);
    apply_plan(world(), reader, &statistics, together, out, 20000);  // several shards
    world().on_root([&] {
      const Plan single = make_plan(comm::Communicator::self(), reader, &statistics, options);
      EXPECT_EQ(to_json(single).dump(), to_json(together).dump());
      apply_plan(comm::Communicator::self(), reader, &statistics, single, alone, 20000);
      const auto a = files_of(out), b = files_of(alone);
      EXPECT_GT(a.size(), 5U);
      ASSERT_EQ(a.size(), b.size());
      for (const auto& [name, content] : a) EXPECT_TRUE(b.contains(name) && b.at(name) == content) << name;
    });
    // Every untouched tensor is the source's, byte for byte; every changed one is in the source's dtype.
    const checkpoint::Reader folded(out);
    const auto targets = targets_of(together);
    const auto untouched = untouched_tensors(reader, options, targets);
    EXPECT_GT(untouched.size(), 10U);
    for (const std::string& name : untouched) {
      EXPECT_EQ(folded.info(name).dtype, reader.info(name).dtype);
      EXPECT_TRUE(folded.view(name).equal(reader.view(name))) << name;
    }
    for (const auto& spec : folded_tensors(reader, options, targets))
      EXPECT_EQ(folded.info(spec.name).dtype, keys == KeyFold::norope ? "F32" : "BF16");
    EXPECT_TRUE(checkpoint::layout_problems(folded).empty());
    EXPECT_EQ(folded.names().size(), folded_tensors(reader, options, targets).size());
    const Json record = read_json(out / "headfold.json");
    EXPECT_EQ(record.at("format"), "headfold-model");
    EXPECT_EQ(record.at("stock"), keys == KeyFold::rope_commuting);
    EXPECT_EQ(record.at("cache_bytes_per_token").at("after").get<double>() * 2,
              record.at("cache_bytes_per_token").at("before").get<double>());
    EXPECT_EQ(record.at("layers").size(), static_cast<std::size_t>(kLayers));
  }
}

TEST(FoldedModelTest, statistics_of_another_model_are_refused) {
  const ScratchFolder scratch;
  write_model(scratch / "model", llama_config(4, 4), small_tensors(llama_config(4, 4), 14));
  write_model(scratch / "other", llama_config(4, 4), small_tensors(llama_config(4, 4), 15));
  write_model(scratch / "wide", llama_config(6, 6), small_tensors(llama_config(6, 6), 16));
  calibrate(scratch / "model", scratch / "model.h5");
  const calibration::StatisticsFile statistics(scratch / "model.h5");
  const FoldOptions options = fold_of(KeyFold::rope_commuting, Metric::act, 2);
  const auto message = [&](const char* folder, const calibration::StatisticsFile* file) -> std::string {
    try {
      make_plan(world(), checkpoint::Reader(scratch / folder), file, options);
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  EXPECT_NE(message("other", &statistics).find("fingerprint"), std::string::npos);
  EXPECT_NE(message("wide", &statistics).find("hidden size 32"), std::string::npos) << message("wide", &statistics);
  EXPECT_NE(message("model", nullptr).find("--calibration"), std::string::npos);
  EXPECT_EQ(message("model", &statistics), "no error");
}

// ------------------------------------------------------------------------------------------- measured against
// predicted

class InputRecorder : public model::LayerObserver {
 public:
  void attention_input(const at::Tensor& x) override { inputs = x.clone(); }
  void rotated_keys(const at::Tensor&) override {}
  bool wants_rotated_keys() const override { return false; }
  at::Tensor inputs;
};

/// Errors of layer 0 on the calibration sequences themselves.
ErrorSums measured_on_calibration(const fs::path& model, const fs::path& folded_folder, const Plan& plan) {
  const checkpoint::Reader original(model), folded(folded_folder);
  InputRecorder recorder;
  const at::Tensor ids = random_ids(5, 24, 32);
  const auto layer = model::load_layer(original, 0, at::kFloat);
  layer->forward(model::Embedding(original, at::kFloat).forward(ids), nullptr, &recorder);
  const at::Tensor mean = recorder.inputs.to(at::kDouble).mean(at::IntArrayRef{0, 1});
  LayerComparison comparison(original.config(), load_layer_weights(original, 0), folded.config(),
                             load_layer_weights(folded, 0), targets_of(plan)[0].groups, plan.options, mean);
  for (std::int64_t s = 0; s < ids.size(0); ++s) comparison.add(recorder.inputs[s]);
  return comparison.errors();
}

TEST(ComparisonTest, errors_on_the_calibration_tokens_are_those_predicted) {
  const ScratchFolder scratch;
  write_model(scratch / "llama", llama_config(8, 4), small_tensors(llama_config(8, 4), 17));
  write_model(scratch / "bloom", bloom_config(4), small_tensors(bloom_config(4), 18));
  const std::vector<Groups> moved(kLayers, Groups{{3, 1}, {0, 2}});
  struct Case {
    const char* model;
    KeyFold keys;
    Metric metric;
    bool regrouped;
  };
  for (const Case& c :
       {Case{"llama", KeyFold::rope_commuting, Metric::act, false},
        Case{"llama", KeyFold::rope_commuting, Metric::act, true},
        Case{"llama", KeyFold::post_rotation, Metric::act, true},
        Case{"llama", KeyFold::post_rotation, Metric::weights, false},
        Case{"llama", KeyFold::rope_commuting, Metric::weights, true},
        Case{"bloom", KeyFold::norope, Metric::act, false}, Case{"bloom", KeyFold::norope, Metric::weights, false}}) {
    const fs::path out = scratch / fmt::format("{}-{}-{}-{}", c.model, name_of(c.keys), name_of(c.metric), c.regrouped);
    FoldOptions options = fold_of(c.keys, c.metric, 2);
    if (c.metric == Metric::weights) options.value_metric = Metric::weights;
    const Plan plan = fold(scratch / c.model, out, options, c.regrouped ? moved : std::vector<Groups>{});
    const ErrorSums errors = measured_on_calibration(scratch / c.model, out, plan);
    EXPECT_GT(plan.layers[0].key_relative_loss(), 0.01) << out;
    EXPECT_NEAR(errors.key() / plan.layers[0].key_relative_loss(), 1.0, 2e-3) << out;
    EXPECT_NEAR(errors.value() / plan.layers[0].value_relative_loss(), 1.0, 2e-3) << out;
    EXPECT_GT(errors.score(), 1e-3);
    EXPECT_GT(errors.output(), 1e-3);
    // The estimate scatters a little from one to the next, unless no token enters it.
    EXPECT_EQ(errors.sums[ErrorSums::sequences], 24);
    ASSERT_TRUE(errors.key_deviation() && errors.value_deviation()) << out;
    if (c.metric == Metric::weights) {
      EXPECT_EQ(*errors.key_deviation() + *errors.value_deviation(), 0) << out;
    } else {
      EXPECT_GT(*errors.key_deviation(), 1e-4 * errors.key()) << out;
      EXPECT_LT(*errors.key_deviation(), 0.5 * errors.key()) << out;
      EXPECT_GT(*errors.value_deviation(), 1e-4 * errors.value()) << out;
      EXPECT_LT(*errors.value_deviation(), 0.5 * errors.value()) << out;
    }
  }
}

/// Pair by pair. In the slow band, what the mean key adds to all scores of a query does not count.
TEST(ComparisonTest, distance_aware_errors_weigh_pairs_by_the_attention_at_their_distance) {
  const ScratchFolder scratch;
  write_model(scratch / "model", llama_config(4, 4, true), small_tensors(llama_config(4, 4, true), 23));
  for (const std::int64_t band : {0, 3}) {
    const fs::path out = scratch / fmt::format("folded{}", band);
    FoldOptions options = fold_of(KeyFold::rope_commuting, Metric::act_query_dist, 2);
    options.slow_band = band;
    const Plan plan = fold(scratch / "model", out, options);
    const checkpoint::Reader original(scratch / "model"), folded(out);
    const LayerWeights before = load_layer_weights(original, 0), after = load_layer_weights(folded, 0);
    InputRecorder recorder;
    const std::int64_t tokens = 12;
    model::load_layer(original, 0, at::kFloat)
        ->forward(model::Embedding(original, at::kFloat).forward(random_ids(6, 2, tokens)), nullptr, &recorder);
    const at::Tensor mean = recorder.inputs.to(at::kDouble).mean(at::IntArrayRef{0, 1});
    ASSERT_TRUE(needs_mean_input(original.config(), options));
    LayerComparison comparison(original.config(), before, folded.config(), after, targets_of(plan)[0].groups,
                               plan.options, mean);
    const at::Tensor frequencies = model::rope_inverse_frequencies(original.config()).to(at::kDouble);
    // y [kDim] turned as at `position`, in the slow band only.
    const auto turned_slow = [&](const at::Tensor& y, std::int64_t position) {
      at::Tensor result = at::zeros({kDim}, at::kDouble);
      for (std::int64_t pair = kDim / 2 - band; pair < kDim / 2; ++pair) {
        const double angle = frequencies[pair].item<double>() * static_cast<double>(position);
        const double x = y[pair].item<double>(), z = y[pair + kDim / 2].item<double>();
        result[pair] = x * std::cos(angle) - z * std::sin(angle);
        result[pair + kDim / 2] = x * std::sin(angle) + z * std::cos(angle);
      }
      return result;
    };
    const at::Tensor mean_key = (at::matmul(before.key, mean) + before.key_bias).view({-1, kDim}),
                     folded_mean_key = (at::matmul(after.key, mean) + after.key_bias).view({-1, kDim});
    double error = 0, total = 0;
    for (std::int64_t s = 0; s < 2; ++s) {
      comparison.add(recorder.inputs[s]);
      const auto heads = [&](const at::Tensor& weight, const at::Tensor& bias) {  // rotated, [tokens, heads, head_dim]
        const at::Tensor y = at::matmul(recorder.inputs[s].to(at::kDouble), weight.t()) + bias;
        return model::apply_rope(y.to(at::kFloat).view({1, tokens, -1, kDim}).contiguous(),
                                 model::rope_inverse_frequencies(original.config()), 0)[0]
            .to(at::kDouble);
      };
      const at::Tensor q = heads(before.query, before.query_bias), k = heads(before.key, before.key_bias),
                       folded_q = heads(after.query, after.query_bias), folded_k = heads(after.key, after.key_bias);
      const auto score = [&](const at::Tensor& query, const at::Tensor& key) {
        return at::dot(query, key).item<double>() / std::sqrt(kDim);
      };
      std::vector<double> mass(tokens);
      for (std::int64_t h = 0; h < 4; ++h)
        for (std::int64_t n = 0; n < tokens; ++n) {
          double sum = 0;
          for (std::int64_t m = 0; m <= n; ++m) sum += std::exp(score(q[n][h], k[m][h]));
          for (std::int64_t m = 0; m <= n; ++m)
            mass[static_cast<std::size_t>(n - m)] += std::exp(score(q[n][h], k[m][h])) / sum;
        }
      std::vector<double> errors(tokens), squares(tokens);
      for (std::int64_t h = 0; h < 4; ++h)
        for (std::int64_t n = 0; n < tokens; ++n) {
          double constant = 0, folded_constant = 0;
          for (std::int64_t t = 0; t < tokens; ++t) {
            const double share = mass[static_cast<std::size_t>(t)] / static_cast<double>(4 * tokens);
            constant += share * score(q[n][h], turned_slow(mean_key[h], n - t));
            folded_constant += share * score(folded_q[n][h], turned_slow(folded_mean_key[h / 2], n - t));
          }
          for (std::int64_t m = 0; m <= n; ++m) {
            const double kept = score(q[n][h], k[m][h]) - constant;
            const double changed = score(folded_q[n][h], folded_k[m][h / 2]) - folded_constant;
            const auto distance = static_cast<std::size_t>(n - m);
            errors[distance] += (kept - changed) * (kept - changed);
            squares[distance] += kept * kept;
          }
        }
      for (std::int64_t distance = 0; distance < tokens; ++distance) {
        const auto t = static_cast<std::size_t>(distance);
        const double weight = mass[t] / static_cast<double>(4 * tokens * (tokens - distance));
        error += weight * errors[t];
        total += weight * squares[t];
      }
    }
    EXPECT_GT(error, 1e-3 * total) << band;
    EXPECT_NEAR(comparison.errors().key() / (error / total), 1.0, 1e-4) << band;
    // Not what all pairs alike would give.
    EXPECT_GT(std::abs(comparison.errors().score() / comparison.errors().key() - 1), 1e-3) << band;
  }
}

TEST(ComparisonTest, a_lossless_fold_measures_nothing) {
  const ScratchFolder scratch;
  Tensors tensors = small_tensors(llama_config(8, 4), 19);
  duplicate_heads(tensors, {{0, 1}, {2, 3}});
  write_model(scratch / "model", llama_config(8, 4), tensors);
  for (const KeyFold keys : {KeyFold::rope_commuting, KeyFold::post_rotation, KeyFold::meanpool}) {
    const fs::path out = scratch / name_of(keys);
    const Plan plan = fold(scratch / "model", out, fold_of(keys, Metric::act_query, 2));
    const ErrorSums errors = measured_on_calibration(scratch / "model", out, plan);
    EXPECT_LT(errors.key() + errors.value() + errors.score() + errors.output(), 1e-9) << out;
    EXPECT_GT(errors.sums[ErrorSums::score_total], 0);
    EXPECT_GT(errors.sums[ErrorSums::output_total], 0);
  }
}

}  // namespace
}  // namespace headfold::folding
