// Logits against those of Hugging Face transformers, at 1, 2 and 3 pipeline ranks.

#include <headfold/base/files.h>
#include <headfold/comm/grid.h>
#include <headfold/model/pipeline.h>

#include "world.h"

namespace headfold::model {
namespace {

using testing_support::world;

/// max |a - b| / max |b|, in float64.
double relative_difference(const at::Tensor& a, const at::Tensor& b) {
  return ((a.to(at::kDouble) - b.to(at::kDouble)).abs().max() / b.to(at::kDouble).abs().max()).item<double>();
}

class Parity : public testing::TestWithParam<const char*> {
 protected:
  std::filesystem::path folder_ = testing_support::golden_folder() / GetParam();
  checkpoint::Reader reader_{folder_};
  checkpoint::SafetensorsFile expected_{folder_ / "expected.safetensors"};
  at::Tensor ids_ = expected_.view("input_ids").clone();
  at::Tensor logits_ = expected_.view("logits").clone();

  /// Largest difference over micro-batches of unequal shapes; 0 on ranks without output.
  double pipeline_difference(at::ScalarType dtype, Residency residency) {
    const comm::Grid grid = comm::make_grid(world(), world().size());
    PipelineOptions options;
    options.dtype = dtype;
    options.residency = residency;
    const Pipeline pipeline(reader_, grid, options);
    const std::vector<at::Tensor> batches = {ids_, ids_.slice(0, 1, 2), ids_.slice(1, 0, 17)};
    const std::vector<at::Tensor> targets = {logits_, logits_.slice(0, 1, 2), logits_.slice(1, 0, 17)};
    double worst = 0;
    std::size_t outputs = 0;
    PipelineHooks hooks;
    hooks.output = [&](std::int64_t index, const at::Tensor& hidden) {
      const auto i = static_cast<std::size_t>(index);
      EXPECT_EQ(i, outputs++);
      const double difference = relative_difference(pipeline.head().logits(hidden), targets[i]);
      EXPECT_TRUE(std::isfinite(difference));
      worst = std::max(worst, difference);
    };
    pipeline.run(batches, hooks);
    EXPECT_EQ(outputs, grid.last_stage() ? batches.size() : 0);
    return worst;
  }
};

TEST_P(Parity, float32_resident) {
  EXPECT_LE(pipeline_difference(at::kFloat, Residency::resident), 1e-4);
}
TEST_P(Parity, float32_streamed) {
  EXPECT_LE(pipeline_difference(at::kFloat, Residency::streamed), 1e-4);
}

// The yardstick is what rounding the weights alone to bfloat16 does to float32 logits: rounding activations too adds
// about half as much (measured 1.4 to 1.6 in all).
TEST_P(Parity, bfloat16_within_its_rounding) {
  const double difference = pipeline_difference(at::kBFloat16, Residency::resident);
  testing_support::ScratchFolder scratch;
  if (world().root()) {
    std::map<std::string, at::Tensor> rounded;
    for (const std::string& name : reader_.names()) rounded[name] = reader_.view(name).to(at::kBFloat16);
    checkpoint::write_safetensors(scratch / "model.safetensors", rounded);
    headfold::copy_file(folder_ / "config.json", scratch / "config.json");
  }
  world().barrier("rounded weights");
  const double of_weights =
      relative_difference(Decoder(checkpoint::Reader(scratch.path()), at::kFloat).logits(ids_), logits_);
  EXPECT_LE(difference, 2.5 * of_weights) << of_weights;
  EXPECT_LE(difference, 6e-2);
  if (world().rank() == world().size() - 1) {
    EXPECT_GT(difference, 1e-5);
  }
}

// The code that GPUs run, on the CPU.
TEST_P(Parity, tensor_engine) {
  set_compute({Engine::tensors, at::kCPU});
  const double resident = pipeline_difference(at::kFloat, Residency::resident);
  const double streamed = pipeline_difference(at::kFloat, Residency::streamed);
  const double rounded = pipeline_difference(at::kBFloat16, Residency::resident);
  set_compute({});
  EXPECT_LE(resident, 1e-4);
  EXPECT_LE(streamed, 1e-4);
  EXPECT_LE(rounded, 6e-2);
  if (world().rank() == world().size() - 1) {
    EXPECT_GT(rounded, 1e-5);
  }
}

TEST_P(Parity, decoder_and_its_cache) {
  const Decoder decoder(reader_, at::kFloat);
  EXPECT_LE(relative_difference(decoder.logits(ids_), logits_), 1e-4);
  auto caches = decoder.make_cache(2, 48);
  std::int64_t done = 0;
  for (const std::int64_t chunk : {20, 1, 5, 1, 21}) {
    const at::Tensor last = decoder.step(ids_.slice(1, done, done + chunk), caches);
    done += chunk;
    EXPECT_LE(relative_difference(last, logits_.select(1, done - 1)), 1e-4) << "after " << done;
  }
}

INSTANTIATE_TEST_SUITE_P(Golden, Parity, testing::Values("llama-mha", "llama-gqa", "bloom"), [](const auto& instance) {
  std::string name = instance.param;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

}  // namespace
}  // namespace headfold::model
