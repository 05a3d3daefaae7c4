// Refits from two streams: planted cases that have an exact answer, what must stay as it is, and the same bits at any
// number of ranks.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/folding/refit.h>

#include "instances.h"
#include "models.h"
#include "world.h"

namespace headfold::folding {
namespace {

using headfold::testing_support::ScratchFolder;
using headfold::testing_support::world;
using testing_support::Random;
using testing_support::small_tensors;
using testing_support::write_model;
using Tensors = std::map<std::string, at::Tensor>;

constexpr std::int64_t kVocab = 64, kDim = 8, kLayers = 2, kHeads = 4, kTokens = 24;

Json llama_config(std::int64_t kv_heads, bool biased = false) {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"model_type", "llama"},
          {"hidden_act", "silu"},
          {"hidden_size", kHeads * kDim},
          {"intermediate_size", 48},
          {"num_hidden_layers", kLayers},
          {"num_attention_heads", kHeads},
          {"num_key_value_heads", kv_heads},
          {"vocab_size", kVocab},
          {"max_position_embeddings", 64},
          {"rms_norm_eps", 1e-5},
          {"rope_theta", 100.0},
          {"tie_word_embeddings", false},
          {"attention_bias", biased},
          {"torch_dtype", "float32"}};
}

Json bloom_config() {
  return {{"architectures", {"BloomForCausalLM"}},
          {"model_type", "bloom"},
          {"vocab_size", kVocab},
          {"hidden_size", kHeads * kDim},
          {"n_layer", kLayers},
          {"n_head", kHeads},
          {"layer_norm_epsilon", 1e-5},
          {"apply_residual_connection_post_layernorm", false},
          {"tie_word_embeddings", true},
          {"torch_dtype", "float32"}};
}

at::Tensor sequences(std::int64_t count = 24, std::int64_t tokens = kTokens) {
  at::Generator generator = at::detail::createCPUGenerator(11);
  return at::randint(kVocab, {count, tokens}, generator, at::TensorOptions().dtype(at::kLong));
}

/// Makes the second head of every pair a copy of the first, keys and values, so that halving loses nothing.
void duplicate_heads(Tensors& tensors, const std::vector<std::pair<std::int64_t, std::int64_t>>& pairs) {
  for (auto& [name, tensor] : tensors)
    for (const auto& [from, to] : pairs) {
      if (name.find("k_proj") != std::string::npos || name.find("v_proj") != std::string::npos)
        tensor.slice(0, to * kDim, (to + 1) * kDim).copy_(tensor.slice(0, from * kDim, (from + 1) * kDim));
      if (name.find("query_key_value") != std::string::npos) {  // [heads, (q, k, v), head_dim, ...]
        const at::Tensor heads = tensor.view({kHeads, 3, kDim, -1});
        heads.select(0, to).slice(0, 1, 3).copy_(heads.select(0, from).slice(0, 1, 3));
      }
    }
}

/// A fold by weights alone.
struct Fold {
  FoldOptions options;
  std::vector<LayerTarget> targets;
  checkpoint::ModelConfig config;
};
Fold fold_of(const checkpoint::Reader& reader, std::int64_t kv_heads, const Groups& groups = {},
             KeyFold keys = KeyFold::rope_commuting) {
  Fold fold;
  fold.options.keys = reader.config().family == checkpoint::Family::bloom ? KeyFold::norope : keys;
  fold.options.key_metric = fold.options.value_metric = Metric::weights;
  fold.options.kv_heads = kv_heads;
  fold.targets = uniform_targets(fold.options, reader.config());
  if (!groups.empty())
    for (LayerTarget& target : fold.targets) target.groups = groups;
  fold.config = checkpoint::parse_config(folded_model_config(reader.config(), fold.targets, layout_of(fold.options)),
                                         "config.json of the fold");
  return fold;
}

struct Result {
  std::vector<LayerTensors> folded, refitted;
  std::vector<LayerRefit> reports;
  double error() const { return reports.back().stream_error; }
};
/// `spoil` may change what the fold made.
Result refit(const comm::Communicator& ranks, const checkpoint::Reader& reader, const Fold& fold,
             const RefitOptions& options, const at::Tensor& text,
             const std::function<void(std::int64_t, LayerTensors&)>& spoil = {}) {
  Result result;
  refit_layers(
      ranks, reader, fold.config, text, options,
      [&](std::int64_t layer) {
        LayerTensors tensors =
            folded_layer(reader, nullptr, fold.targets[static_cast<std::size_t>(layer)], layer, fold.options);
        if (spoil) spoil(layer, tensors);
        LayerTensors copy;
        for (const auto& [name, tensor] : tensors) copy[name] = tensor.clone();
        result.folded.push_back(std::move(copy));
        return tensors;
      },
      [&](std::int64_t layer, const LayerTensors& tensors, const LayerRefit& report) {
        EXPECT_EQ(layer, report.layer);
        result.refitted.push_back(tensors);
        result.reports.push_back(report);
      });
  EXPECT_EQ(result.reports.size(), static_cast<std::size_t>(kLayers));
  return result;
}

std::vector<PartRefit> parts_of(const LayerRefit& report) {
  std::vector<PartRefit> parts = report.others;
  if (!report.part.empty()) parts.push_back(report);
  return parts;
}

double difference(const at::Tensor& a, const at::Tensor& b) {
  return ((a.to(at::kDouble) - b.to(at::kDouble)).norm() / b.to(at::kDouble).norm()).item<double>();
}

RefitOptions only(bool output, bool queries, std::int64_t sweeps) {
  RefitOptions options;
  options.output = output;
  options.queries = queries;
  options.key_sweeps = sweeps;
  return options;
}

const Groups kMoved{{2, 0}, {3, 1}};

// --------------------------------------------------------------------------------------------- what stays

TEST(RefitTest, a_fold_that_loses_nothing_stays_as_it_is) {
  const ScratchFolder scratch;
  write_model(scratch / "model", llama_config(2), small_tensors(llama_config(2), 1));
  const checkpoint::Reader reader(scratch / "model");
  RefitOptions options;
  options.down = true;
  const Result result = refit(world(), reader, fold_of(reader, 2), options, sequences());
  for (std::size_t l = 0; l < kLayers; ++l) {
    for (const PartRefit& part : parts_of(result.reports[l])) EXPECT_FALSE(part.kept) << part.part;
    for (const auto& [name, tensor] : result.folded[l])
      EXPECT_TRUE(at::equal(result.refitted[l].at(name), tensor.to(at::kFloat).to(at::kDouble))) << name;
    for (const std::string& name : refitted_tensors(reader.config(), options))
      EXPECT_EQ(result.refitted[l].count(name), 1U) << name;
  }
  EXPECT_LT(result.error(), 1e-9);
}

TEST(RefitTest, held_out_errors_never_rise_and_every_part_helps) {
  const ScratchFolder scratch;
  for (const bool biased : {false, true}) {
    const fs::path folder = scratch / (biased ? "biased" : "plain");
    write_model(folder, llama_config(4, biased), small_tensors(llama_config(4, biased), 2));
    const checkpoint::Reader reader(folder);
    const Fold fold = fold_of(reader, 2);
    const at::Tensor text = sequences(48);
    std::vector<double> errors;
    for (const RefitOptions& options : {only(false, false, 0), only(true, false, 0), only(true, true, 2)}) {
      const Result result = refit(world(), reader, fold, options, text);
      for (const LayerRefit& layer : result.reports)
        for (const PartRefit& part : parts_of(layer)) {
          EXPECT_LE(part.held_out_after, part.held_out_before) << part.part;
          EXPECT_LE(part.error_after, part.error_before * 1.0001) << part.part;
          EXPECT_TRUE(!part.kept || part.held_out_after < part.held_out_before) << part.part;
        }
      errors.push_back(result.error());
    }
    EXPECT_LT(errors[1], 0.9 * errors[0]);
    EXPECT_LT(errors[2], 0.95 * errors[1]);
  }
}

// --------------------------------------------------------------------------------------------- planted answers

TEST(RefitTest, a_spoiled_output_projection_is_recovered) {
  const ScratchFolder scratch;
  for (const bool bloom : {false, true}) {
    const Json config = bloom ? bloom_config() : llama_config(4, true);
    Tensors tensors = small_tensors(config, 3);
    duplicate_heads(tensors, {{0, 1}, {2, 3}});
    const fs::path folder = scratch / (bloom ? "bloom" : "llama");
    write_model(folder, config, tensors);
    const checkpoint::Reader reader(folder);
    const Fold fold = fold_of(reader, 2);
    const std::string name = bloom ? "dense" : "o_proj";
    Random random(4);
    std::vector<LayerTensors> right;
    RefitOptions options = only(true, false, 0);
    options.ridges = {1e-8};
    const auto spoil = [&](std::int64_t, LayerTensors& layer) {
      LayerTensors copy;
      for (const auto& [tail, tensor] : layer) copy[tail] = tensor.clone();
      right.push_back(copy);
      at::Tensor& weight = layer.at(name + ".weight");
      weight = weight + 0.3 * weight.std() * random.normal(weight.sizes());
      if (layer.count(name + ".bias") > 0) layer[name + ".bias"] = layer[name + ".bias"] + 1.0;
    };
    const Result result = refit(world(), reader, fold, options, sequences(64), spoil);
    for (std::size_t l = 0; l < kLayers; ++l) {
      EXPECT_TRUE(result.reports[l].kept);
      EXPECT_EQ(result.reports[l].part, name);
      EXPECT_GT(result.reports[l].held_out_before, 1e-2);
      EXPECT_LT(result.reports[l].held_out_after, 1e-7) << l;
      // Heads that share a KV head with queries of their own span all directions: the answer is unique.
      EXPECT_LT(difference(result.refitted[l].at(name + ".weight"), right[l].at(name + ".weight")), 5e-3) << l;
      if (bloom) {
        EXPECT_LT(difference(result.refitted[l].at("dense.bias"), right[l].at("dense.bias")), 5e-3) << l;
      }
    }
    EXPECT_LT(result.error(), 1e-7);
  }
}

TEST(RefitTest, a_spoiled_down_projection_is_recovered) {
  const ScratchFolder scratch;
  Tensors tensors = small_tensors(llama_config(2), 5);
  write_model(scratch / "model", llama_config(2), tensors);
  const checkpoint::Reader reader(scratch / "model");
  RefitOptions options = only(false, false, 0);
  options.down = true;
  options.ridges = {1e-8};
  Random random(6);
  const Result result =
      refit(world(), reader, fold_of(reader, 2), options, sequences(64), [&](std::int64_t layer, LayerTensors& made) {
        const at::Tensor weight =
            tensors.at(fmt::format("model.layers.{}.mlp.down_proj.weight", layer)).to(at::kDouble);
        made["down_proj.weight"] = weight + 0.3 * weight.std() * random.normal(weight.sizes());
      });
  for (std::size_t l = 0; l < kLayers; ++l)
    EXPECT_LT(difference(result.refitted[l].at("down_proj.weight"),
                         tensors.at(fmt::format("model.layers.{}.mlp.down_proj.weight", l))),
              5e-3);
  EXPECT_LT(result.error(), 1e-7);
}

TEST(RefitTest, queries_that_went_through_another_basis_are_recovered) {
  const ScratchFolder scratch;
  for (const KeyFold keys : {KeyFold::rope_commuting, KeyFold::post_rotation}) {
    Tensors tensors = small_tensors(llama_config(4, true), 7);
    duplicate_heads(tensors, {{0, 2}, {1, 3}});
    const fs::path folder = scratch / name_of(keys);
    write_model(folder, llama_config(4, true), tensors);
    const checkpoint::Reader reader(folder);
    const Fold fold = fold_of(reader, 2, kMoved, keys);
    RefitOptions options = only(false, true, 0);
    options.score_ridge = 1e-8;
    options.query_heads.assign(kLayers, {2, 0, 3, 1});
    Random random(8);
    const auto spoil = [&](std::int64_t, LayerTensors& layer) {
      const at::Tensor turn = at::eye(kDim, at::kDouble) + 0.3 * random.normal({kHeads, kDim, kDim});
      for (const char* name : {"q_proj.weight", "q_proj.bias"}) {
        at::Tensor& all = layer.at(name);
        all = at::matmul(turn, all.view({kHeads, kDim, -1})).reshape(all.sizes());
      }
    };
    const Result exact = refit(world(), reader, fold, options, sequences(48));
    const Result result = refit(world(), reader, fold, options, sequences(48), spoil);
    for (std::size_t l = 0; l < kLayers; ++l) {
      // Heads are compared with those they stand for: an exact fold has nothing to repair.
      EXPECT_LT(exact.reports[l].others.at(0).held_out_before, 1e-8);
      EXPECT_GT(result.reports[l].others.at(0).held_out_before, 1e-3);
      EXPECT_LT(result.reports[l].others.at(0).held_out_after, 1e-7);
    }
    EXPECT_LT(result.error(), 1e-7);
    if (keys != KeyFold::rope_commuting) continue;
    // With the order of heads unknown they are compared with others.
    options.query_heads.clear();
    EXPECT_GT(refit(world(), reader, fold, options, sequences(48)).reports[0].others.at(0).held_out_before, 1e-3);
  }
}

TEST(RefitTest, keys_that_went_through_another_basis_are_recovered) {
  const ScratchFolder scratch;
  Tensors tensors = small_tensors(llama_config(2), 9);
  write_model(scratch / "model", llama_config(2), tensors);
  const checkpoint::Reader reader(scratch / "model");
  RefitOptions options = only(false, true, 8);
  options.score_ridge = 1e-6;
  options.score_rows = 8;
  Random random(10);
  const Result result =
      refit(world(), reader, fold_of(reader, 2), options, sequences(48), [&](std::int64_t, LayerTensors& layer) {
        at::Tensor& all = layer.at("k_proj.weight");
        const at::Tensor turn = at::eye(kDim, at::kDouble) + 0.15 * random.normal({2, kDim, kDim});
        all = at::matmul(turn, all.view({2, kDim, -1})).reshape(all.sizes());
      });
  for (const LayerRefit& layer : result.reports) {
    const double before = layer.others.front().held_out_before, queries = layer.others.front().held_out_after;
    EXPECT_GT(before, 1e-3);
    EXPECT_LT(layer.others.back().held_out_after, 1e-2 * before);
    EXPECT_LT(layer.others.back().held_out_after, 0.1 * queries);  // queries alone cannot undo it
  }
}

// --------------------------------------------------------------------------------------------- ranks

TEST(RefitTest, results_do_not_depend_on_ranks_or_threads) {
  const ScratchFolder scratch;
  for (const bool bloom : {false, true}) {
    const Json config = bloom ? bloom_config() : llama_config(4, true);
    const fs::path folder = scratch / (bloom ? "bloom" : "llama");
    write_model(folder, config, small_tensors(config, 12));
    const checkpoint::Reader reader(folder);
    const Fold fold = fold_of(reader, 2);
    RefitOptions options;
    options.target = bloom ? RefitTarget::attention : RefitTarget::stream;
    options.down = true;
    options.chunks = bloom ? 5 : 64;
    options.score_rows = 8;
    const at::Tensor text = sequences(23);
    const Result together = refit(world(), reader, fold, options, text);
    const int threads = at::get_num_threads();
    at::set_num_threads(threads == 1 ? 2 : 1);
    const Result alone = refit(comm::Communicator::self(), reader, fold, options, text);
    at::set_num_threads(threads);
    bool changed = false;
    for (std::size_t l = 0; l < kLayers; ++l) {
      EXPECT_EQ(to_json(together.reports[l]).dump(), to_json(alone.reports[l]).dump());
      ASSERT_EQ(together.refitted[l].size(), alone.refitted[l].size());
      for (const auto& [name, tensor] : together.refitted[l])
        EXPECT_TRUE(at::equal(tensor, alone.refitted[l].at(name))) << name;
      for (const PartRefit& part : parts_of(together.reports[l])) changed = changed || part.kept;
    }
    EXPECT_TRUE(changed);
  }
}

// --------------------------------------------------------------------------------------------- nonsense

TEST(RefitTest, refuses_nonsense) {
  const ScratchFolder scratch;
  Tensors tensors = small_tensors(llama_config(4), 13);
  write_model(scratch / "model", llama_config(4), tensors);
  const checkpoint::Reader reader(scratch / "model");
  const Fold fold = fold_of(reader, 2);
  EXPECT_THROW(refit(world(), reader, fold, {}, sequences(1)), InputError);
  EXPECT_THROW(refit(world(), reader, fold, {}, sequences(8) + kVocab), InputError);
  RefitOptions options;
  options.ridges = {0.0};
  EXPECT_THROW(refit(world(), reader, fold, options, sequences(8)), UsageError);
  options = {};
  options.held_out_share = 1;
  EXPECT_THROW(refit(world(), reader, fold, options, sequences(8)), UsageError);
  const auto poison = [](std::int64_t, LayerTensors& layer) {
    layer.at("v_proj.weight").fill_(std::numeric_limits<double>::infinity());
  };
  EXPECT_THROW(refit(world(), reader, fold, only(true, false, 0), sequences(8), poison), InputError);
  EXPECT_THROW(refit(world(), reader, fold, only(false, false, 0), sequences(8), poison), InputError);
}

}  // namespace
}  // namespace headfold::folding
