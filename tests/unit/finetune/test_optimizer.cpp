// AdamW against its formulas, sums over ranks, sharding, schedules, snapshots.

#include <headfold/base/error.h>
#include <headfold/finetune/optimizer.h>
#include <headfold/model/compute.h>

#include <cmath>

#include "world.h"

namespace headfold::finetune {
namespace {

using testing_support::world;

std::vector<Parameter> parameters() {
  std::vector<Parameter> list;
  const std::vector<std::tuple<std::int64_t, std::vector<std::int64_t>, bool>> shapes = {
      {-1, {7, 3}, true}, {0, {5}, false}, {0, {4, 6}, true}, {1, {11, 2}, true}, {1, {1}, false}, {2, {3}, false}};
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    const auto& [layer, shape, decays] = shapes[i];
    Parameter parameter;
    parameter.name = "p" + std::to_string(i);
    parameter.layer = layer;
    std::int64_t n = 1;
    for (const std::int64_t d : shape) n *= d;
    parameter.value = (at::arange(n, at::kFloat) * 0.1 - 0.3 * static_cast<double>(i)).view(shape);
    parameter.gradient = at::zeros(shape, at::kFloat);
    parameter.decays = decays;
    list.push_back(parameter);
  }
  return list;
}

/// Gradient of parameter p at step t on one of `ranks` ranks; their sum is the same for any number of ranks.
at::Tensor gradient(const at::Tensor& value, std::size_t p, int t, int rank, int ranks) {
  const at::Tensor whole =
      (at::arange(value.numel(), at::kFloat) * 0.37 + static_cast<double>(p) + t).sin().view(value.sizes());
  return whole * (2.0 * (rank + 1) / (ranks * (ranks + 1)));
}

struct Reference {
  std::vector<at::Tensor> value, first, second;
};

/// Algorithm 2 of arXiv 1711.05101 in float64.
Reference reference_after(int steps, const AdamOptions& options, double rate, double scale) {
  Reference reference;
  const auto list = parameters();
  for (const Parameter& parameter : list) {
    reference.value.push_back(parameter.value.to(at::kDouble));
    reference.first.push_back(at::zeros_like(reference.value.back()));
    reference.second.push_back(at::zeros_like(reference.value.back()));
  }
  for (int t = 1; t <= steps; ++t) {
    for (std::size_t p = 0; p < list.size(); ++p) {
      const at::Tensor g = gradient(list[p].value, p, t, 0, 1).to(at::kDouble) * scale;
      at::Tensor &v = reference.value[p], &m = reference.first[p], &s = reference.second[p];
      m = options.beta1 * m + (1 - options.beta1) * g;
      s = options.beta2 * s + (1 - options.beta2) * g * g;
      const at::Tensor mean = m / (1 - std::pow(options.beta1, t)), square = s / (1 - std::pow(options.beta2, t));
      if (list[p].decays) v = v - rate * options.weight_decay * v;
      v = v - rate * mean / (square.sqrt() + options.epsilon);
    }
  }
  return reference;
}

void run(Optimizer& optimizer, std::vector<Parameter>& list, int from, int steps, double rate, double scale) {
  for (int t = from; t < from + steps; ++t) {
    optimizer.zero_gradients();
    for (std::size_t p = list.size(); p-- > 0;) {
      list[p].gradient.add_(gradient(list[p].value, p, t, world().rank(), world().size()));
      // Rank 1 has no work, as it were: it never reports a layer.
      if (world().rank() != 1 && (p == 0 || list[p - 1].layer != list[p].layer)) optimizer.layer_done(list[p].layer);
    }
    optimizer.finish_gradients();
    optimizer.step(rate, scale);
  }
}

/// The step of the host's own loops, and that of GPUs, in libtorch's operations.
class OptimizerTest : public testing::TestWithParam<model::Engine> {
 protected:
  void SetUp() override { model::set_compute({GetParam(), at::kCPU}); }
  void TearDown() override { model::set_compute({}); }
};
INSTANTIATE_TEST_SUITE_P(Engines, OptimizerTest, testing::Values(model::Engine::native, model::Engine::tensors),
                         [](const auto& engine) {
                           return engine.param == model::Engine::native ? "native" : "tensors";
                         });

TEST_P(OptimizerTest, follows_adamw_with_and_without_shards) {
  AdamOptions options;
  options.weight_decay = 0.1;
  const Reference reference = reference_after(7, options, 1e-2, 0.5);
  for (const bool shard : {false, true}) {
    for (const std::int64_t bucket_bytes : {1, 8, 100, 1 << 20}) {
      auto list = parameters();
      Optimizer optimizer(world(), list, options, shard, bucket_bytes);
      if (bucket_bytes == 1) {
        EXPECT_GT(optimizer.buckets(), 10U);  // layers in pieces
      } else {
        EXPECT_EQ(optimizer.buckets(), bucket_bytes == 8 ? 4U : bucket_bytes == 100 ? 3U : 1U) << bucket_bytes;
      }
      run(optimizer, list, 1, 7, 1e-2, 0.5);
      for (std::size_t p = 0; p < list.size(); ++p) {
        EXPECT_TRUE(at::allclose(list[p].value.to(at::kDouble), reference.value[p], 1e-5, 1e-6)) << p << ' ' << shard;
        EXPECT_TRUE(list[p].value.is_contiguous());
      }
      EXPECT_EQ(optimizer.steps(), 7);
      const auto first = optimizer.first_moments(), second = optimizer.second_moments();
      for (std::size_t p = 0; p < list.size(); ++p) {
        const std::string name = "p" + std::to_string(p);
        EXPECT_TRUE(at::allclose(first.at(name).to(at::kDouble), reference.first[p], 1e-5, 1e-7));
        EXPECT_TRUE(at::allclose(second.at(name).to(at::kDouble), reference.second[p], 1e-5, 1e-7));
      }
      EXPECT_NO_THROW(world().require_equal(optimizer.fingerprint(), "values"));
      const std::int64_t ranks = world().size();
      if (shard && ranks > 1) {
        EXPECT_LE(optimizer.own_elements(),
                  optimizer.elements() / ranks + static_cast<std::int64_t>(optimizer.buckets()));
        EXPECT_EQ(world().all_reduce(optimizer.own_elements()), optimizer.elements());
      } else {
        EXPECT_EQ(optimizer.own_elements(), optimizer.elements());
      }
    }
  }
}

TEST_P(OptimizerTest, norm_is_that_of_the_summed_gradient) {
  for (const bool shard : {false, true}) {
    auto list = parameters();
    Optimizer optimizer(world(), list, {}, shard, 64);
    double expected = 0;
    optimizer.zero_gradients();
    for (std::size_t p = 0; p < list.size(); ++p) {
      list[p].gradient.add_(gradient(list[p].value, p, 1, world().rank(), world().size()));
      expected += gradient(list[p].value, p, 1, 0, 1).to(at::kDouble).square().sum().item<double>();
    }
    optimizer.finish_gradients();
    EXPECT_NEAR(optimizer.gradient_norm(), std::sqrt(expected), 1e-5);
  }
}

TEST_P(OptimizerTest, a_restored_one_goes_on_bit_by_bit) {
  for (const bool shard : {false, true}) {
    auto whole = parameters(), first = parameters(), second = parameters();
    Optimizer through(world(), whole, {}, shard, 64);
    run(through, whole, 1, 6, 1e-2, 1);
    Optimizer before(world(), first, {}, shard, 64);
    run(before, first, 1, 3, 1e-2, 1);
    Optimizer after(world(), second, {}, shard, 64);
    // What other ranks are given must not matter.
    const auto source = [](std::map<std::string, at::Tensor> tensors) -> TensorSource {
      for (auto& [name, tensor] : tensors) tensor = world().root() ? tensor.clone() : at::Tensor();
      return [tensors](const std::string& name) { return tensors.at(name); };
    };
    after.restore(source(before.values()), source(before.first_moments()), source(before.second_moments()),
                  world().root() ? before.steps() : -7, "memory");
    EXPECT_EQ(after.steps(), 3);
    run(after, second, 4, 3, 1e-2, 1);
    for (std::size_t p = 0; p < whole.size(); ++p) EXPECT_TRUE(at::equal(whole[p].value, second[p].value)) << p;
  }
}

TEST_P(OptimizerTest, a_snapshot_of_another_model_is_refused_with_the_tensor_named) {
  auto list = parameters();
  Optimizer optimizer(world(), list, {}, false);
  const auto values = optimizer.values();
  const auto sound = [&](const std::string& name) { return values.at(name); };
  const auto other = [&](const std::string& name) { return name == "p2" ? at::zeros({3, 3}) : values.at(name); };
  const auto less = [&](const std::string& name) { return name == "p2" ? at::Tensor() : values.at(name); };
  EXPECT_THROW(optimizer.restore(sound, sound, less, 1, "the-folder"), Error);
  try {
    optimizer.restore(sound, other, sound, 1, "the-folder");
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::bad_input);
    EXPECT_NE(std::string(error.what()).find("the-folder: tensor p2 has shape [3, 3], expected [4, 6]"),
              std::string::npos)
        << error.what();
  }
}

TEST(ScheduleTest, rises_then_falls) {
  Schedule schedule;
  schedule.peak = 2;
  schedule.warm_up = 4;
  schedule.steps = 24;
  schedule.final_share = 0.1;
  EXPECT_DOUBLE_EQ(schedule.rate(1), 0.5);
  EXPECT_DOUBLE_EQ(schedule.rate(4), 2);
  EXPECT_DOUBLE_EQ(schedule.rate(14), 2 * (0.1 + 0.9 * 0.5));
  EXPECT_NEAR(schedule.rate(24), 0.2, 1e-12);
  schedule.decay = Schedule::Decay::linear;
  EXPECT_DOUBLE_EQ(schedule.rate(9), 2 * (0.1 + 0.9 * 0.75));
  schedule.decay = Schedule::Decay::constant;
  EXPECT_DOUBLE_EQ(schedule.rate(20), 2);
  schedule.warm_up = 0;
  EXPECT_DOUBLE_EQ(schedule.rate(1), 2);
  EXPECT_THROW(parse_decay("square"), UsageError);
}

}  // namespace
}  // namespace headfold::finetune
