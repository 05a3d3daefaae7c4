// Models on a GPU: golden logits, layers of every form, caches, statistics and gradients, against the CPU.

#include <headfold/calibration/collect.h>
#include <headfold/finetune/optimizer.h>
#include <headfold/finetune/trainable.h>
#include <headfold/model/compute.h>
#include <headfold/model/pipeline.h>

#include "gpu.h"
#include "small_models.h"
#include "world.h"

namespace headfold {
namespace {

using model::testing_models::all_forms;
using model::testing_models::relative_difference;

/// model::compute() on the GPU while it lives.
class OnGpu {
 public:
  OnGpu() { model::set_compute({model::Engine::tensors, at::Device(at::kCUDA, 0)}); }
  ~OnGpu() { model::set_compute({}); }
  OnGpu(const OnGpu&) = delete;
  OnGpu& operator=(const OnGpu&) = delete;
};

class GpuModelTest : public testing_support::GpuTensorTest {};

TEST_F(GpuModelTest, golden_logits) {
  for (const char* name : {"llama-mha", "llama-gqa", "bloom"}) {
    const std::filesystem::path folder = testing_support::golden_folder() / name;
    const checkpoint::Reader reader(folder);
    const checkpoint::SafetensorsFile expected(folder / "expected.safetensors");
    const at::Tensor ids = expected.view("input_ids").clone(), logits = expected.view("logits").clone();
    const OnGpu on_gpu;
    for (const auto& [dtype, most] : {std::pair(at::kFloat, 1e-4), std::pair(at::kBFloat16, 6e-2)}) {
      const model::Decoder decoder(reader, dtype);
      EXPECT_LE(relative_difference(decoder.logits(ids).cpu(), logits), most) << name << " " << c10::toString(dtype);
      auto caches = decoder.make_cache(2, 48);
      std::int64_t done = 0;
      for (const std::int64_t chunk : {20, 1, 5, 1, 21}) {
        const at::Tensor last = decoder.step(ids.slice(1, done, done + chunk), caches);
        done += chunk;
        EXPECT_LE(relative_difference(last.cpu(), logits.select(1, done - 1)), most) << name << " after " << done;
      }
    }
    for (const model::Residency residency : {model::Residency::resident, model::Residency::streamed}) {
      model::PipelineOptions options;
      options.residency = residency;
      const model::Pipeline pipeline(reader, comm::Grid{}, options);
      model::PipelineHooks hooks;
      int outputs = 0;
      hooks.output = [&](std::int64_t, const at::Tensor& hidden) {
        ++outputs;
        EXPECT_LE(relative_difference(pipeline.head().logits(hidden).cpu(), logits), 1e-4) << name;
      };
      pipeline.run({ids, ids}, hooks);
      EXPECT_EQ(outputs, 2);
    }
  }
}

TEST_F(GpuModelTest, layers_of_every_form) {
  std::uint64_t seed = 40;
  for (const auto& [name, json] : all_forms()) {
    const auto model = model::testing_models::make_model(json, ++seed);
    const at::Tensor hidden = at::randn({2, 33, model.config.hidden}, at::kFloat);
    const std::vector<model::Segment> segments = {{0, 21}, {21, 12}, {21, 7}, {0, 26}};
    const at::Tensor packed = hidden.reshape({66, -1});
    for (std::int64_t l = 0; l < model.config.layers; ++l) {
      const auto native = model::load_layer(model.config, l, at::kFloat, model.getter());
      const at::Tensor expected = native->forward(hidden), expected_packed = native->forward_packed(packed, segments);
      const OnGpu on_gpu;
      for (const auto& [dtype, most] : {std::pair(at::kFloat, 2e-5), std::pair(at::kBFloat16, 5e-2)}) {
        const auto layer = model::load_layer(model.config, l, dtype, model.getter());
        const at::Tensor there = model::to_device(hidden, dtype);
        EXPECT_LE(relative_difference(layer->forward(there).cpu(), expected), most) << name;
        EXPECT_LE(relative_difference(layer->forward_packed(there.reshape({66, -1}), segments).cpu(), expected_packed),
                  most)
            << name;
      }
    }
  }
}

TEST_F(GpuModelTest, statistics) {
  at::manual_seed(3);
  const at::Tensor ids = at::randint(3, 128, {6, 33}, at::kLong);
  for (const char* name : {"llama-mha", "llama-gqa", "bloom"}) {
    const checkpoint::Reader reader(testing_support::golden_folder() / name);
    calibration::CollectOptions options;
    options.half_samples = true;
    options.attention_statistics = true;
    options.micro_batch = 2;
    for (const auto& [dtype, most] : {std::pair(at::kFloat, 2e-5), std::pair(at::kBFloat16, 5e-2)}) {
      options.dtype = dtype;
      const auto expected = calibration::collect(reader, comm::Grid{}, ids, options);
      const OnGpu on_gpu;
      for (const auto residency : {model::Residency::resident, model::Residency::streamed}) {
        options.residency = residency;
        const auto found = calibration::collect(reader, comm::Grid{}, ids, options);
        for (std::size_t l = 0; l < found.size(); ++l) {
          const calibration::PackedStatistics &a = found[l]->statistics(), &b = expected[l]->statistics();
          EXPECT_EQ(a.count, b.count);
          EXPECT_LE(relative_difference(a.moment, b.moment), most) << name << " layer " << l;
          EXPECT_LE(relative_difference(a.moment_0, b.moment_0), most) << name << " layer " << l;
          EXPECT_LE(relative_difference(a.rotated_keys, b.rotated_keys), most) << name << " layer " << l;
          EXPECT_LE(relative_difference(a.attended, b.attended), most) << name << " layer " << l;
          EXPECT_LE(relative_difference(a.distance_mass, b.distance_mass), most) << name << " layer " << l;
        }
      }
      options.residency = model::Residency::resident;
    }
  }
}

TEST_F(GpuModelTest, gradients_of_every_form) {
  for (const auto& [name, json] : all_forms()) {
    const testing_support::ScratchFolder folder;
    model::testing_models::make_model(json, 7).write(folder.path());
    const checkpoint::Reader reader(folder.path());
    finetune::Batch batch;
    at::manual_seed(9);
    batch.ids = at::randint(97, {2, 29}, at::kLong);
    batch.targets = at::randint(97, {2, 29}, at::kLong);
    batch.segments = at::cat({at::zeros({2, 12}, at::kLong), at::ones({2, 17}, at::kLong)}, 1);
    finetune::LoraOptions options;
    options.rank = 3;
    options.dropout = 0.2;
    options.targets = {"q", "k", "v", "o", "gate", "up", "down"};
    const auto gradients = [&](at::ScalarType dtype) {
      finetune::TrainableModel trained(reader, options, dtype);
      at::manual_seed(10);
      for (finetune::Parameter& parameter : trained.parameters())
        parameter.value.copy_(at::randn(parameter.value.sizes(), at::kFloat) * 0.1);
      trained.forward_backward(batch, nullptr, {}, 1, 5);
      std::vector<at::Tensor> all;
      for (finetune::Parameter& parameter : trained.parameters())
        all.push_back(parameter.gradient.cpu().to(at::kDouble).reshape({-1}));
      return at::cat(all);
    };
    const at::Tensor expected = gradients(at::kFloat);
    const OnGpu on_gpu;
    EXPECT_LE(relative_difference(gradients(at::kFloat), expected), 1e-4) << name;
    EXPECT_LE(relative_difference(gradients(at::kBFloat16), expected), 0.2) << name;
  }
}

TEST_F(GpuModelTest, optimiser) {
  std::vector<std::vector<at::Tensor>> found;
  for (const at::Device device : {at::Device(at::kCPU), at::Device(at::kCUDA, 0)}) {
    std::vector<finetune::Parameter> parameters(3);
    for (std::size_t p = 0; p < parameters.size(); ++p) {
      parameters[p].name = std::to_string(p);
      parameters[p].layer = static_cast<std::int64_t>(p);
      const at::Tensor value = at::arange(5000 + 17 * static_cast<std::int64_t>(p), at::kFloat).cos();
      parameters[p].value = value.to(device);
      parameters[p].gradient = at::zeros_like(parameters[p].value);
      parameters[p].decays = p != 1;
    }
    model::set_compute(device.is_cpu() ? model::Compute{} : model::Compute{model::Engine::tensors, device});
    finetune::AdamOptions options;
    options.weight_decay = 0.1;
    finetune::Optimizer optimizer(testing_support::world(), parameters, options, false, 1 << 12);
    std::vector<at::Tensor> all;
    for (int step = 1; step <= 5; ++step) {
      optimizer.zero_gradients();
      for (std::size_t p = parameters.size(); p-- > 0;) {
        parameters[p].gradient.add_((parameters[p].value * step).sin());
        optimizer.layer_done(parameters[p].layer);
      }
      optimizer.finish_gradients();
      all.push_back(at::tensor(optimizer.gradient_norm(), at::kDouble));
      optimizer.step(1e-2, 0.5);
    }
    const auto first = optimizer.first_moments(), second = optimizer.second_moments();
    for (const auto* tensors : {&first, &second})
      for (const auto& [name, tensor] : *tensors) all.push_back(tensor.to(at::kDouble));
    for (const auto& [name, tensor] : optimizer.values()) all.push_back(tensor.to(at::kDouble));
    found.push_back(all);
  }
  model::set_compute({});
  ASSERT_EQ(found[0].size(), found[1].size());
  for (std::size_t i = 0; i < found[0].size(); ++i) EXPECT_LE(relative_difference(found[1][i], found[0][i]), 1e-5) << i;
}

}  // namespace
}  // namespace headfold
