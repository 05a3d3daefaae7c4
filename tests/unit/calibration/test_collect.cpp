#include <ATen/Parallel.h>
#include <gmock/gmock.h>
#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/base/json.h>
#include <headfold/base/log.h>
#include <headfold/calibration/collect.h>
#include <headfold/checkpoint/safetensors.h>

#include <fstream>

#include "world.h"

namespace headfold::calibration {
namespace {

using testing_support::golden_folder;
using testing_support::ScratchFolder;
using testing_support::world;

using Layers = std::vector<std::unique_ptr<LayerAccumulator>>;

/// An odd number of sequences, so that the last micro-batch is short and replicas have unequal shares.
at::Tensor sequences(std::int64_t samples = 7, std::int64_t length = 33) {
  at::manual_seed(77);
  return at::randint(3, 128, {samples, length}, at::kLong);
}

double relative(const at::Tensor& a, const at::Tensor& b) {
  return ((a - b).abs().max() / b.abs().max()).item<double>();
}

/// Largest relative difference of any sum.
double difference(const PackedStatistics& a, const PackedStatistics& b) {
  EXPECT_EQ(a.count, b.count);
  EXPECT_EQ(a.count_0, b.count_0);
  double worst = std::max({relative(a.sum, b.sum), relative(a.sum_0, b.sum_0), relative(a.moment, b.moment),
                           relative(a.moment_0, b.moment_0)});
  EXPECT_EQ(a.rotated_keys.defined(), b.rotated_keys.defined());
  if (a.rotated_keys.defined()) worst = std::max(worst, relative(a.rotated_keys, b.rotated_keys));
  return worst;
}

CollectOptions options_of(std::int64_t micro_batch, model::Residency residency = model::Residency::resident,
                          at::ScalarType dtype = at::kFloat) {
  CollectOptions options;
  options.micro_batch = micro_batch;
  options.residency = residency;
  options.dtype = dtype;
  return options;
}

class CollectTest : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Golden, CollectTest, testing::Values("llama-mha", "llama-gqa", "bloom"), [](const auto& test) {
  std::string name = test.param;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

TEST_P(CollectTest, every_grid_agrees_with_one_rank) {
  const checkpoint::Reader reader(golden_folder() / GetParam());
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const Layers alone = collect(reader, comm::Grid{}, sequences(), options_of(2, model::Residency::resident, dtype));
    ASSERT_EQ(alone.size(), 3U);
    EXPECT_EQ(alone[0]->statistics().count, 7 * 32);
    EXPECT_EQ(alone[0]->statistics().count_0, 7);
    EXPECT_EQ(alone[0]->statistics().rotated_keys.defined(), reader.config().family == checkpoint::Family::llama);
    for (int stages = 1; stages <= std::min(3, world().size()); ++stages) {
      if (world().size() % stages != 0) continue;
      const comm::Grid grid = comm::make_grid(world(), stages);
      const std::int64_t first =
          model::stage_layers(reader.config(), stages)[static_cast<std::size_t>(grid.stage)].begin;
      for (const auto residency : {model::Residency::resident, model::Residency::streamed}) {
        const Layers found = collect(reader, grid, sequences(), options_of(2, residency, dtype));
        for (std::size_t i = 0; i < found.size(); ++i)
          EXPECT_LT(difference(found[i]->statistics(), alone[static_cast<std::size_t>(first) + i]->statistics()), 1e-10)
              << "layer " << first << " + " << i << ", " << stages << " stages";
      }
    }
  }
}

TEST_P(CollectTest, micro_batch_size_changes_rounding_only) {
  const checkpoint::Reader reader(golden_folder() / GetParam());
  const comm::Grid grid = comm::make_grid(world(), world().size() % 2 == 0 ? 2 : 1);
  const Layers one = collect(reader, grid, sequences(), options_of(1));
  for (const std::int64_t micro_batch : {2, 4}) {
    const Layers more = collect(reader, grid, sequences(), options_of(micro_batch));
    for (std::size_t i = 0; i < one.size(); ++i)
      EXPECT_LT(difference(more[i]->statistics(), one[i]->statistics()), 1e-6);
  }
}

TEST_P(CollectTest, first_layer_sums_are_those_of_the_layer_run_by_hand) {
  // An independent path: the layer alone, all observations kept, products in float64.
  struct Keep : model::LayerObserver {
    void attention_input(const at::Tensor& x) override { input = x.to(at::kDouble); }
    void rotated_keys(const at::Tensor& k) override { keys = k.to(at::kDouble); }
    bool wants_rotated_keys() const override { return true; }
    at::Tensor input, keys;
  };
  const checkpoint::Reader reader(golden_folder() / GetParam());
  const at::Tensor ids = sequences(3, 20);
  Keep keep;
  const model::Embedding embedding(reader, at::kFloat);
  model::load_layer(reader, 0, at::kFloat)->forward(embedding.forward(ids), nullptr, &keep);
  const Layers found = collect(reader, comm::Grid{}, ids, options_of(3));
  const LayerStatistics statistics = found[0]->statistics().full();
  const at::Tensor rest = keep.input.narrow(1, 1, 19).reshape({57, -1});
  EXPECT_LT(relative(statistics.moment, at::matmul(rest.t(), rest)), 1e-6);
  EXPECT_LT(relative(statistics.sum, rest.sum(0)), 1e-5);
  const at::Tensor first = keep.input.select(1, 0);
  EXPECT_LT(relative(statistics.moment_0, at::matmul(first.t(), first)), 1e-6);
  if (!statistics.rotated_keys.defined()) return;
  const at::Tensor keys = keep.keys.narrow(1, 1, 19).reshape({57, -1});
  EXPECT_LT(relative(statistics.rotated_keys, at::matmul(keys.t(), keys)), 1e-6);
  // Rotation keeps norms: the trace is that of the plain keys W_K S2 W_K^T.
  const auto& config = reader.config();
  const std::int64_t width = config.kv_heads * config.head_dim;
  const at::Tensor w = reader.load("model.layers.0.self_attn.k_proj.weight", {width, config.hidden}, at::kDouble);
  EXPECT_NEAR(statistics.rotated_keys.trace().item<double>() /
                  at::matmul(at::matmul(w, statistics.moment), w.t()).trace().item<double>(),
              1, 1e-5);
}

TEST(CollectGridTest, more_pipeline_ranks_than_layers_is_a_usage_error) {
  const checkpoint::Reader reader(golden_folder() / "llama-mha");
  if (world().size() < 4) GTEST_SKIP() << "needs four ranks";
  const comm::Grid grid = comm::make_grid(world(), 4);
  EXPECT_THROW(collect(reader, grid, sequences(), options_of(1)), UsageError);
}

TEST(CollectGridTest, owners_cover_every_layer_once) {
  for (int stages = 1; stages <= std::min(3, world().size()); ++stages) {
    if (world().size() % stages != 0) continue;
    const comm::Grid grid = comm::make_grid(world(), stages);
    const checkpoint::Reader reader(golden_folder() / "llama-mha");
    const Layers found = collect(reader, grid, sequences(2, 5), options_of(1));
    const std::int64_t first = model::stage_layers(reader.config(), stages)[static_cast<std::size_t>(grid.stage)].begin;
    std::vector<std::int64_t> owners(3, 0);
    for (const OwnedLayer& own : layers_to_write(found, first, grid)) ++owners[static_cast<std::size_t>(own.layer)];
    world().all_reduce(std::span(owners));
    EXPECT_THAT(owners, testing::Each(1));
  }
}

TEST(MicroBatchTest, every_sequence_goes_to_one_replica_in_order) {
  const at::Tensor all = sequences(11, 4);
  for (const std::int64_t size : {1, 2, 4, 20}) {
    for (const int replicas : {1, 2, 3}) {
      std::vector<std::size_t> next(static_cast<std::size_t>(replicas), 0);
      for (std::int64_t first = 0, m = 0; first < 11; first += size, ++m) {
        const auto replica = static_cast<int>(m % replicas);
        const auto own = micro_batches_of(all, size, replica, replicas);
        const auto index = next[static_cast<std::size_t>(replica)]++;
        ASSERT_LT(index, own.size());
        EXPECT_TRUE(at::equal(own[index], all.narrow(0, first, std::min<std::int64_t>(size, 11 - first))));
      }
      for (int r = 0; r < replicas; ++r)
        EXPECT_EQ(micro_batches_of(all, size, r, replicas).size(), next[static_cast<std::size_t>(r)]);
    }
  }
  EXPECT_THROW(micro_batches_of(all, 0, 0, 1), UsageError);
}

/// Starts the measurement of peak memory afresh and returns what is resident now; 0 where the kernel does not allow it.
std::uint64_t reset_peak() {
  std::ofstream file("/proc/self/clear_refs");
  file << "5" << std::flush;
  return file.good() ? peak_resident_bytes() : 0;
}

TEST(StreamedMemoryTest, peak_stays_below_one_layer_embedding_statistics_and_a_micro_batch) {
  if (world().size() > 1) GTEST_SKIP() << "measured on one rank";
  const ScratchFolder folder;
  const std::int64_t hidden = 1024, ffn = 2816, layers = 8, vocab = 1024, length = 128;
  write_json(folder / "config.json", Json{{"architectures", {"LlamaForCausalLM"}},
                                          {"model_type", "llama"},
                                          {"hidden_act", "silu"},
                                          {"hidden_size", hidden},
                                          {"intermediate_size", ffn},
                                          {"num_hidden_layers", layers},
                                          {"num_attention_heads", 8},
                                          {"num_key_value_heads", 8},
                                          {"vocab_size", vocab},
                                          {"max_position_embeddings", 256},
                                          {"rms_norm_eps", 1e-5},
                                          {"tie_word_embeddings", false},
                                          {"bos_token_id", 1},
                                          {"eos_token_id", 2},
                                          {"torch_dtype", "bfloat16"}});
  double weights = 0;
  {
    std::map<std::string, at::Tensor> tensors;
    std::map<std::vector<std::int64_t>, at::Tensor> by_shape;
    for (const auto& tensor : checkpoint::model_tensors(checkpoint::read_config(folder.path()))) {
      at::Tensor& values = by_shape[tensor.shape];
      if (!values.defined()) values = (at::rand(tensor.shape) * 0.02).to(at::kBFloat16);
      tensors[tensor.name] = values;
      weights += static_cast<double>(values.numel()) * 4;
    }
    checkpoint::write_safetensors(folder / "model.safetensors", tensors);
  }
  // Threads, library buffers and code pages are there before the measurement starts.
  collect(checkpoint::Reader(golden_folder() / "llama-mha"), comm::Grid{}, sequences(), options_of(1));
  const checkpoint::Reader reader(folder.path());
  const at::Tensor ids = at::randint(3, vocab, {4, length}, at::kLong);
  const std::uint64_t before = reset_peak();
  if (before == 0) GTEST_SKIP() << "/proc/self/clear_refs cannot be written here";
  const Layers found = collect(reader, comm::Grid{}, ids, options_of(1, model::Residency::streamed));
  const double used = static_cast<double>(peak_resident_bytes()) - static_cast<double>(before);
  const double layer_bytes = 4.0 * (4.0 * hidden * hidden + 3.0 * hidden * ffn);
  const double embedding = 4.0 * hidden * vocab;
  const double statistics =
      static_cast<double>(layers) * static_cast<double>(layer_statistics_bytes(hidden, hidden, true));
  // Hidden states of all four micro-batches are held; one micro-batch's queries, keys, values, scores and MLP widths
  // are in flight.
  const double activations = 4.0 * length * (4 * hidden + 6 * hidden + 3 * ffn) + 4.0 * 8 * length * length;
  const double bound = 1.25 * (layer_bytes + embedding + statistics + activations);
  EXPECT_LT(used, bound) << human_bytes(used) << " used, bound " << human_bytes(bound) << ", all weights "
                         << human_bytes(weights);
  EXPECT_GT(weights, bound) << "the test would not notice a resident model";
  EXPECT_EQ(found.size(), static_cast<std::size_t>(layers));
}

}  // namespace
}  // namespace headfold::calibration
