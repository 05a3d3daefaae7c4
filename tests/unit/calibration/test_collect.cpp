#include <ATen/Parallel.h>
#include <gmock/gmock.h>
#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/base/json.h>
#include <headfold/base/log.h>
#include <headfold/calibration/collect.h>
#include <headfold/checkpoint/safetensors.h>
#include <headfold/model/compute.h>

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

/// Every tensor of the statistics, with its name.
const std::vector<std::pair<const char*, at::Tensor PackedStatistics::*>>& tensors() {
  using Packed = PackedStatistics;
  static const std::vector<std::pair<const char*, at::Tensor Packed::*>> all{
      {"sum", &Packed::sum},
      {"sum_0", &Packed::sum_0},
      {"moment", &Packed::moment},
      {"moment_0", &Packed::moment_0},
      {"rotated_keys", &Packed::rotated_keys},
      {"values", &Packed::values},
      {"sum_even", &Packed::sum_even},
      {"sum_0_even", &Packed::sum_0_even},
      {"moment_even", &Packed::moment_even},
      {"moment_0_even", &Packed::moment_0_even},
      {"rotated_keys_even", &Packed::rotated_keys_even},
      {"values_even", &Packed::values_even},
      {"rotated_queries", &Packed::rotated_queries},
      {"distance_mass", &Packed::distance_mass},
      {"attended", &Packed::attended},
      {"attended_sum", &Packed::attended_sum}};
  return all;
}

/// Largest relative difference of any sum.
double difference(const PackedStatistics& a, const PackedStatistics& b) {
  EXPECT_EQ(a.count, b.count);
  EXPECT_EQ(a.count_0, b.count_0);
  EXPECT_EQ(a.count_even, b.count_even);
  EXPECT_EQ(a.count_0_even, b.count_0_even);
  EXPECT_EQ(a.attention_count, b.attention_count);
  double worst = 0;
  for (const auto& [name, tensor] : tensors()) {
    EXPECT_EQ((a.*tensor).defined(), (b.*tensor).defined()) << name;
    if ((a.*tensor).defined()) worst = std::max(worst, relative(a.*tensor, b.*tensor));
  }
  return worst;
}

CollectOptions options_of(std::int64_t micro_batch, model::Residency residency = model::Residency::resident,
                          at::ScalarType dtype = at::kFloat) {
  CollectOptions options;
  options.micro_batch = micro_batch;
  options.residency = residency;
  options.dtype = dtype;
  options.half_samples = true;
  options.attention_statistics = true;
  return options;
}

class CollectTest : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Golden, CollectTest, testing::Values("llama-mha", "llama-gqa", "bloom"), [](const auto& test) {
  std::string name = test.param;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

/// The statistics of every grid of this world, resident and streamed, differ from those of one rank alone
/// by less than `most`. `collected(grid, residency)` makes them.
template <class Collect>
void expect_every_grid(const checkpoint::Reader& reader, const Layers& alone, double most, const Collect& collected) {
  for (int stages = 1; stages <= std::min(3, world().size()); ++stages) {
    if (world().size() % stages != 0) continue;
    const comm::Grid grid = comm::make_grid(world(), stages);
    const std::int64_t first = model::stage_layers(reader.config(), stages)[static_cast<std::size_t>(grid.stage)].begin;
    for (const auto residency : {model::Residency::resident, model::Residency::streamed}) {
      const Layers found = collected(grid, residency);
      for (std::size_t i = 0; i < found.size(); ++i)
        EXPECT_LT(difference(found[i]->statistics(), alone[static_cast<std::size_t>(first) + i]->statistics()), most)
            << "layer " << first << " + " << i << ", " << stages << " stages";
    }
  }
}

TEST_P(CollectTest, every_grid_agrees_with_one_rank) {
  const checkpoint::Reader reader(golden_folder() / GetParam());
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const Layers alone = collect(reader, comm::Grid{}, sequences(), options_of(2, model::Residency::resident, dtype));
    ASSERT_EQ(alone.size(), 3U);
    EXPECT_EQ(alone[0]->statistics().count, 7 * 32);
    EXPECT_EQ(alone[0]->statistics().count_0, 7);
    EXPECT_EQ(alone[0]->statistics().count_even, 4 * 32);
    EXPECT_EQ(alone[0]->statistics().count_0_even, 4);
    EXPECT_EQ(alone[0]->statistics().attention_count, 7 * 33);
    EXPECT_TRUE(alone[0]->statistics().rotated_keys.defined() && alone[0]->statistics().values_even.defined());
    expect_every_grid(reader, alone, 1e-10, [&](const comm::Grid& grid, model::Residency residency) {
      return collect(reader, grid, sequences(), options_of(2, residency, dtype));
    });
  }
}

TEST_P(CollectTest, saves_often_through_many_short_rounds) {
  const ScratchFolder folder;
  const checkpoint::Reader reader(golden_folder() / GetParam());
  const std::int64_t samples = 100 * world().size();
  const at::Tensor ids = sequences(samples, 4);
  const comm::Grid grid = comm::make_grid(world(), 1);
  CollectOptions options = options_of(1);
  const Layers expected = collect(reader, grid, ids, options);
  options.save_every = 2;
  options.partial = folder / "partial";
  options.identity = "a model, data and options";
  const Layers found = collect(reader, grid, ids, options);
  for (std::size_t i = 0; i < found.size(); ++i)
    EXPECT_LE(difference(found[i]->statistics(), expected[i]->statistics()), 1e-12) << "layer " << i;
}

TEST_P(CollectTest, goes_on_after_an_interruption) {
  const ScratchFolder folder;
  const checkpoint::Reader reader(golden_folder() / GetParam());
  const at::Tensor ids = sequences(17);  // nine micro-batches
  CollectOptions plain = options_of(2);
  plain.save_every = 1;
  CollectOptions kept = plain;
  kept.partial = folder / "partial";
  kept.identity = "a model, data and options";
  std::int64_t known = -1, left = -1;
  kept.resumed = [&](std::int64_t dealt_with, std::int64_t micro_batches) {
    known = dealt_with;
    left = micro_batches;
  };
  for (int stages = 1; stages <= std::min(3, world().size()); ++stages) {
    if (world().size() % stages != 0) continue;
    const comm::Grid grid = comm::make_grid(world(), stages);
    const Layers undisturbed = collect(reader, grid, ids, plain);
    const auto interrupt = [&](int groups) {
      int asked = 0;
      CollectOptions stopping = kept;
      // One rank is asked; all of them stop.
      stopping.stop = [&] { return world().root() && ++asked == groups; };
      EXPECT_THROW(collect(reader, grid, ids, stopping), Stopped);
      world().barrier("interrupted");
    };
    interrupt(1);
    EXPECT_EQ(known, 0);
    interrupt(1);
    EXPECT_EQ(known, 2 * grid.replicas);
    const Layers resumed = collect(reader, grid, ids, kept);
    EXPECT_EQ(known, 4 * grid.replicas);
    EXPECT_EQ(left, (9 - 2 * grid.replicas - grid.replica + grid.replicas - 1) / grid.replicas);
    ASSERT_EQ(resumed.size(), undisturbed.size());
    for (std::size_t i = 0; i < resumed.size(); ++i)
      EXPECT_EQ(difference(resumed[i]->statistics(), undisturbed[i]->statistics()), 0) << "layer " << i;

    // On another grid: every rank by itself, from sums of several.
    CollectOptions alone = kept;
    alone.save_every = -1;
    const Layers own = collect(reader, comm::Grid{}, ids, alone);
    EXPECT_GT(known, 0);
    const Layers expected = collect(reader, comm::Grid{}, ids, plain);
    for (std::size_t i = 0; i < own.size(); ++i)
      EXPECT_LT(difference(own[i]->statistics(), expected[i]->statistics()), 1e-12) << "layer " << i;
    // Another micro-batch: the rest is cut anew from where it stopped.
    alone.micro_batch = 3;
    const Layers cut = collect(reader, comm::Grid{}, ids, alone);
    for (std::size_t i = 0; i < cut.size(); ++i)
      EXPECT_LT(difference(cut[i]->statistics(), expected[i]->statistics()), 1e-6) << "layer " << i;

    // Sums of something else, and damaged ones, are not used.
    world().barrier("before damage");
    alone.micro_batch = 2;
    alone.identity = "another model";
    const Layers other = collect(reader, comm::Grid{}, ids, alone);
    EXPECT_EQ(known, 0);
    EXPECT_EQ(difference(other[0]->statistics(), expected[0]->statistics()), 0);
    alone.identity = kept.identity;
    world().barrier("before damage");
    if (world().root())
      for (const auto& entry : fs::directory_iterator(folder / "partial"))
        if (entry.path().extension() == ".safetensors") {
          std::string bytes = read_file(entry.path());
          bytes[bytes.size() - 100] = static_cast<char>(bytes[bytes.size() - 100] ^ 1);
          write_file(entry.path(), bytes);
        }
    world().barrier("damaged");
    const Layers anew = collect(reader, comm::Grid{}, ids, alone);
    EXPECT_EQ(known, 0);
    for (std::size_t i = 0; i < anew.size(); ++i)
      EXPECT_EQ(difference(anew[i]->statistics(), expected[i]->statistics()), 0) << "layer " << i;
    world().barrier("done");
    if (world().root()) fs::remove_all(folder / "partial");
    world().barrier("removed");
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

// The code that GPUs run, on the CPU: layers, Grams in column blocks, attention statistics of all heads at once.
TEST_P(CollectTest, tensor_engine_gives_the_native_sums) {
  const checkpoint::Reader reader(golden_folder() / GetParam());
  for (const auto& [dtype, most] : {std::pair(at::kFloat, 2e-5), std::pair(at::kBFloat16, 5e-2)}) {
    const Layers native = collect(reader, comm::Grid{}, sequences(), options_of(2, model::Residency::resident, dtype));
    expect_every_grid(reader, native, most, [&](const comm::Grid& grid, model::Residency residency) {
      model::set_compute({model::Engine::tensors, at::kCPU});
      Layers found = collect(reader, grid, sequences(), options_of(2, residency, dtype));
      model::set_compute({});
      return found;
    });
  }
}

TEST_P(CollectTest, tensor_engine_hands_its_sums_over_and_takes_them_back) {
  const checkpoint::Reader reader(golden_folder() / GetParam());
  const CollectOptions options = options_of(2);
  StatisticsShape shape = collected_shape(reader.config(), options, 33);
  const at::Tensor slopes =
      reader.config().family == checkpoint::Family::bloom ? model::alibi_slopes(reader.config().heads) : at::Tensor();
  model::set_compute({model::Engine::tensors, at::kCPU});
  const model::Embedding embedding(reader, at::kFloat);
  const auto layer = model::load_layer(reader, 0, at::kFloat);
  LayerAccumulator straight(shape, slopes), moved(shape, slopes), resumed(shape, slopes);
  const at::Tensor ids = sequences(6);
  for (std::int64_t i = 0; i < 6; ++i) {
    const at::Tensor hidden = embedding.forward(ids.slice(0, i, i + 1));
    layer->forward(hidden, nullptr, &straight);
    LayerAccumulator& other = i < 3 ? moved : resumed;
    other.expect(i);
    layer->forward(hidden, nullptr, &other);
    if (i == 1) moved.leave_device();
    if (i == 2) resumed.add(moved.sums());
  }
  model::set_compute({});
  straight.finish(comm::Communicator::self(), 0);
  resumed.finish(comm::Communicator::self(), 0);
  EXPECT_LT(difference(resumed.statistics(), straight.statistics()), 1e-13);
}

// On GPUs sums over ranks begin on the device while later layers run; here the link is MPI's.
TEST_P(CollectTest, sums_that_meet_on_the_device_are_those_that_meet_on_the_host) {
  const checkpoint::Reader reader(golden_folder() / GetParam());
  const CollectOptions options = options_of(2);
  const StatisticsShape shape = collected_shape(reader.config(), options, 33);
  const at::Tensor slopes =
      reader.config().family == checkpoint::Family::bloom ? model::alibi_slopes(reader.config().heads) : at::Tensor();
  model::set_compute({model::Engine::tensors, at::kCPU});
  const model::Embedding embedding(reader, at::kFloat);
  const auto layer = model::load_layer(reader, 0, at::kFloat);
  const comm::DeviceLink link(world(), -1);
  LayerAccumulator on_host(shape, slopes), on_device(shape, slopes), before(shape, slopes), resumed(shape, slopes);
  const std::int64_t mine = world().rank() == 2 ? 0 : 2 + world().rank();  // one rank of four has none
  const at::Tensor ids = sequences(8 * world().size()).slice(0, 8 * world().rank(), 8 * world().rank() + 8);
  for (std::int64_t i = 0; i < mine; ++i) {
    const at::Tensor hidden = embedding.forward(ids.slice(0, i, i + 1));
    for (LayerAccumulator* into : {&on_host, &on_device, i == 0 ? &before : &resumed}) {
      into->expect(i);
      layer->forward(hidden, nullptr, into);
    }
    if (i == 0) resumed.add(before.sums());  // some sums are on the host
  }
  EXPECT_FALSE(on_device.sums_started());
  on_device.start_sums(link);
  EXPECT_TRUE(on_device.sums_started());
  EXPECT_THROW(on_device.start_sums(link), InternalError);
  resumed.start_sums(link);
  model::set_compute({});
  for (LayerAccumulator* each : {&on_host, &on_device, &resumed}) each->finish(world(), 0);
  EXPECT_GT(on_host.statistics().count, 0);
  EXPECT_LT(difference(on_device.statistics(), on_host.statistics()), 1e-13);
  EXPECT_LT(difference(resumed.statistics(), on_host.statistics()), 1e-13);
  // A link of devices does not take sums of the host.
  LayerAccumulator native(shape, slopes);
  EXPECT_THROW(native.start_sums(link), InternalError);
}

TEST_P(CollectTest, replicas_with_less_to_do_meet_the_others_on_the_device) {
  const checkpoint::Reader reader(golden_folder() / GetParam());
  for (const std::int64_t samples : {1, 3, 9}) {
    const at::Tensor ids = sequences(samples);
    const Layers alone = collect(reader, comm::Grid{}, ids, options_of(1));
    expect_every_grid(reader, alone, 2e-5, [&](const comm::Grid& grid, model::Residency residency) {
      model::set_compute({model::Engine::tensors, at::kCPU});
      Layers found = collect(reader, grid, ids, options_of(1, residency));
      model::set_compute({});
      for (const auto& each : found) EXPECT_EQ(each->sums_started(), grid.peers.size() > 1);
      return found;
    });
  }
}

TEST_P(CollectTest, first_layer_sums_are_those_of_the_layer_run_by_hand) {
  // An independent path: the layer alone, all observations kept, products in float64.
  struct Keep : model::LayerObserver {
    void attention_input(const at::Tensor& x) override { input = x.to(at::kDouble); }
    void rotated_keys(const at::Tensor& k) override { keys = k.to(at::kDouble); }
    bool wants_rotated_keys() const override { return true; }
    void values(const at::Tensor& v) override { seen_values = v.to(at::kDouble); }
    bool wants_values() const override { return true; }
    at::Tensor input, keys, seen_values;
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
  const at::Tensor values = keep.seen_values.narrow(1, 1, 19).reshape({57, -1});
  EXPECT_LT(relative(statistics.values, at::matmul(values.t(), values)), 1e-6);
  const at::Tensor keys = keep.keys.narrow(1, 1, 19).reshape({57, -1});
  EXPECT_LT(relative(statistics.rotated_keys, at::matmul(keys.t(), keys)), 1e-6);
  // Rotation keeps norms: the trace is that of the plain keys W_K S2 W_K^T.
  const auto& config = reader.config();
  if (config.family != checkpoint::Family::llama) return;
  const std::int64_t width = config.kv_heads * config.head_dim;
  const at::Tensor v = reader.load("model.layers.0.self_attn.v_proj.weight", {width, config.hidden}, at::kDouble);
  EXPECT_LT(relative(statistics.values, at::matmul(at::matmul(v, statistics.moment), v.t())), 1e-5);
  const at::Tensor w = reader.load("model.layers.0.self_attn.k_proj.weight", {width, config.hidden}, at::kDouble);
  EXPECT_NEAR(statistics.rotated_keys.trace().item<double>() /
                  at::matmul(at::matmul(w, statistics.moment), w.t()).trace().item<double>(),
              1, 1e-5);
}

/// What attention statistics are by definition, in float64, from a layer's input and its weights alone.
struct Reference {
  at::Tensor rotated_queries, distance_mass, attended, attended_sum;
};

/// R(n) x for x [tokens, heads, d], float64.
at::Tensor rotated(const at::Tensor& x, double theta) {
  const std::int64_t d = x.size(2);
  const at::Tensor frequencies =
      at::pow(at::full({d / 2}, theta, at::kDouble), at::arange(d / 2, at::kDouble) * (-2.0 / static_cast<double>(d)));
  const at::Tensor angles = at::outer(at::arange(x.size(0), at::kDouble), frequencies).unsqueeze(1);
  const at::Tensor a = x.slice(2, 0, d / 2), b = x.slice(2, d / 2, d);
  return at::cat({a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()}, 2);
}

Reference reference_of(const checkpoint::Reader& reader, std::int64_t layer, const at::Tensor& inputs) {
  const auto& config = reader.config();
  const std::int64_t heads = config.heads, kv_heads = config.kv_heads, d = config.head_dim, hidden = config.hidden;
  const std::int64_t tokens = inputs.size(1), width = kv_heads * d;
  const bool bloom = config.family == checkpoint::Family::bloom;
  Reference sums{at::zeros({heads, d, d}, at::kDouble), at::zeros({heads, tokens}, at::kDouble),
                 at::zeros({heads, width, width}, at::kDouble), at::zeros({heads, width}, at::kDouble)};
  for (std::int64_t s = 0; s < inputs.size(0); ++s) {
    const at::Tensor x = inputs.select(0, s).to(at::kDouble);
    at::Tensor q, k, v;
    if (bloom) {
      const std::string name = fmt::format("transformer.h.{}.self_attention.query_key_value.", layer);
      const at::Tensor all = (at::matmul(x, reader.load(name + "weight", {3 * heads * d, hidden}, at::kDouble).t()) +
                              reader.load(name + "bias", {3 * heads * d}, at::kDouble))
                                 .view({tokens, heads, 3, d});
      q = all.select(2, 0);
      k = all.select(2, 1);
      v = all.select(2, 2);
    } else {
      const auto project = [&](const char* part, std::int64_t count) {
        const std::string name = fmt::format("model.layers.{}.self_attn.{}_proj.weight", layer, part);
        return at::matmul(x, reader.load(name, {count * d, hidden}, at::kDouble).t()).view({tokens, count, d});
      };
      q = rotated(project("q", heads), config.rope_theta);
      k = rotated(project("k", kv_heads), config.rope_theta);
      v = project("v", kv_heads);
    }
    const at::Tensor flat = v.reshape({tokens, width});
    // Slopes of 6 heads: those of 4, then every other one of 8.
    const std::array<double, 6> slopes{1.0 / 4, 1.0 / 16, 1.0 / 64, 1.0 / 256, 1.0 / 2, 1.0 / 8};
    for (std::int64_t h = 0; h < heads; ++h) {
      const at::Tensor own = q.select(1, h);
      sums.rotated_queries.select(0, h).add_(at::matmul(own.t(), own));
      at::Tensor scores = at::matmul(own, k.select(1, h / (heads / kv_heads)).t()) / std::sqrt(static_cast<double>(d));
      if (bloom) scores = scores + slopes.at(static_cast<std::size_t>(h)) * at::arange(tokens, at::kDouble);
      const at::Tensor hidden_keys = at::ones({tokens, tokens}, at::kBool).triu(1);
      const at::Tensor p = at::softmax(scores.masked_fill(hidden_keys, -1e300), 1);
      for (std::int64_t distance = 0; distance < tokens; ++distance)
        sums.distance_mass.select(0, h).select(0, distance).add_(p.diagonal(-distance).sum());
      const at::Tensor y = at::matmul(p, flat);
      sums.attended.select(0, h).add_(at::matmul(y.t(), y));
      sums.attended_sum.select(0, h).add_(y.sum(0));
    }
  }
  return sums;
}

TEST_P(CollectTest, attention_statistics_are_those_of_the_definition) {
  struct Keep : model::LayerObserver {
    void attention_input(const at::Tensor& x) override { input = x; }
    void rotated_keys(const at::Tensor&) override {}
    bool wants_rotated_keys() const override { return false; }
    at::Tensor input;
  };
  const checkpoint::Reader reader(golden_folder() / GetParam());
  const auto& config = reader.config();
  const at::Tensor ids = sequences(5, 40);
  const comm::Grid grid = comm::make_grid(world(), 1);
  const Layers found = collect(reader, grid, ids, options_of(2));
  CollectOptions narrow = options_of(2);
  narrow.attended_heads = 1;
  const Layers blocks = collect(reader, grid, ids, narrow);
  at::Tensor hidden = model::Embedding(reader, at::kFloat).forward(ids);
  for (std::int64_t layer = 0; layer < config.layers; ++layer) {
    Keep keep;
    hidden = model::load_layer(reader, layer, at::kFloat)->forward(hidden, nullptr, &keep);
    const Reference expected = reference_of(reader, layer, keep.input);
    const LayerStatistics statistics = found[static_cast<std::size_t>(layer)]->statistics().full();
    ASSERT_TRUE(statistics.has_attention());
    EXPECT_EQ(statistics.attention_count, 200);
    EXPECT_EQ(statistics.attended_heads, config.kv_heads);  // small enough for all of them
    EXPECT_LT(relative(statistics.rotated_queries, expected.rotated_queries), 1e-5);
    EXPECT_LT(relative(statistics.distance_mass, expected.distance_mass), 1e-5);
    EXPECT_LT(relative(statistics.attended, expected.attended), 1e-5);
    EXPECT_LT(relative(statistics.attended_sum, expected.attended_sum), 1e-5);
    // Attention is a distribution: each head spreads one unit per query, and the farthest pair is one of 40 tokens.
    EXPECT_LT((statistics.distance_mass.sum(1) / 200 - 1).abs().max().item<double>(), 1e-5);
    EXPECT_GT(statistics.distance_mass.select(1, 39).min().item<double>(), 0);
    // Smaller blocks are parts of the large one.
    const LayerStatistics parts = blocks[static_cast<std::size_t>(layer)]->statistics().full();
    EXPECT_EQ(parts.attended_heads, 1);
    for (std::int64_t h = 0; h < config.heads; ++h) {
      const std::int64_t first = h / (config.heads / config.kv_heads) * config.head_dim;
      const std::int64_t last = first + config.head_dim;
      EXPECT_LT(relative(parts.attended.select(0, h),
                         statistics.attended.select(0, h).slice(0, first, last).slice(1, first, last)),
                1e-5);
      EXPECT_LT(relative(parts.attended_sum.select(0, h), statistics.attended_sum.select(0, h).slice(0, first, last)),
                1e-5);
    }
  }
}

TEST_P(CollectTest, attention_statistics_do_not_depend_on_the_size_of_score_blocks) {
  const checkpoint::Reader reader(golden_folder() / GetParam());
  const Layers one = collect(reader, comm::Grid{}, sequences(2, 21), options_of(1));
  const std::int64_t before = model::attention_block_bytes();
  model::set_attention_block_bytes(4 * 21 * 3 * at::get_num_threads());
  const Layers more = collect(reader, comm::Grid{}, sequences(2, 21), options_of(1));
  model::set_attention_block_bytes(before);
  for (std::size_t i = 0; i < one.size(); ++i) EXPECT_LT(difference(more[i]->statistics(), one[i]->statistics()), 1e-5);
}

TEST_P(CollectTest, bfloat16_attention_statistics_are_close_to_float32_ones) {
  const checkpoint::Reader reader(golden_folder() / GetParam());
  const Layers exact = collect(reader, comm::Grid{}, sequences(3, 30), options_of(1));
  const Layers coarse =
      collect(reader, comm::Grid{}, sequences(3, 30), options_of(1, model::Residency::resident, at::kBFloat16));
  // The first layer: later ones see another input.
  const LayerStatistics a = coarse[0]->statistics().full(), b = exact[0]->statistics().full();
  EXPECT_LT(relative(a.rotated_queries, b.rotated_queries), 0.02);
  EXPECT_LT(relative(a.distance_mass, b.distance_mass), 0.02);
  EXPECT_LT(relative(a.attended, b.attended), 0.02);
  EXPECT_GT(relative(a.attended, b.attended), 0);
}

TEST_P(CollectTest, halves_are_the_even_and_the_odd_sequences_whoever_runs_them) {
  const checkpoint::Reader reader(golden_folder() / GetParam());
  const at::Tensor all = sequences(9, 12);
  CollectOptions plain;
  const at::Tensor even = all.index_select(0, at::arange(0, 9, 2)), odd = all.index_select(0, at::arange(1, 9, 2));
  const std::array<Layers, 2> apart{collect(reader, comm::Grid{}, even, plain),
                                    collect(reader, comm::Grid{}, odd, plain)};
  const Layers together = collect(reader, comm::Grid{}, all, plain);
  for (const std::int64_t micro_batch : {1, 2, 3, 9}) {
    const comm::Grid grid = comm::make_grid(world(), micro_batch == 2 && world().size() % 2 == 0 ? 2 : 1);
    const std::int64_t first =
        model::stage_layers(reader.config(), grid.stages)[static_cast<std::size_t>(grid.stage)].begin;
    CollectOptions options;
    options.half_samples = true;
    options.micro_batch = micro_batch;
    const Layers found = collect(reader, grid, all, options);
    for (std::size_t i = 0; i < found.size(); ++i) {
      const auto layer = static_cast<std::size_t>(first) + i;
      const LayerStatistics whole = found[i]->statistics().full();
      EXPECT_EQ(whole.count_even, 55);
      EXPECT_EQ(whole.count_0_even, 5);
      EXPECT_LT(relative(whole.moment, together[layer]->statistics().full().moment), 1e-6);
      for (int which = 0; which < 2; ++which) {
        const LayerStatistics half = whole.half(which);
        const LayerStatistics expected = apart[static_cast<std::size_t>(which)][layer]->statistics().full();
        EXPECT_EQ(half.count, expected.count);
        EXPECT_EQ(half.count_0, expected.count_0);
        EXPECT_LT(relative(half.sum, expected.sum), 1e-5);
        EXPECT_LT(relative(half.sum_0, expected.sum_0), 1e-5);
        EXPECT_LT(relative(half.moment, expected.moment), 1e-6);
        EXPECT_LT(relative(half.moment_0, expected.moment_0), 1e-6);
        ASSERT_EQ(half.rotated_keys.defined(), expected.rotated_keys.defined());
        if (half.rotated_keys.defined()) {
          EXPECT_LT(relative(half.rotated_keys, expected.rotated_keys), 1e-6);
        }
        EXPECT_FALSE(half.has_halves() || half.has_attention());
        EXPECT_LT(relative(half.second_moment(1), expected.second_moment(1)), 1e-6);
      }
    }
  }
}

TEST(CollectShapeTest, blocks_of_attended_values_by_size) {
  checkpoint::ModelConfig config;
  config.hidden = 4096;
  config.layers = 1;
  config.heads = config.kv_heads = config.source_kv_heads = 32;
  config.head_dim = 128;
  config.ffn = 11008;
  EXPECT_EQ(default_attended_heads(config), 4);
  // Seven KV heads fall into no blocks of four, three or two.
  config.kv_heads = config.source_kv_heads = 7;
  config.heads = 28;
  EXPECT_EQ(default_attended_heads(config), 1);
  config.kv_heads = config.source_kv_heads = 6;
  config.heads = 48;
  EXPECT_EQ(default_attended_heads(config), 3);
  config.head_dim = 16;
  EXPECT_EQ(default_attended_heads(config), 6);
  CollectOptions options;
  options.attention_statistics = true;
  EXPECT_EQ(collected_shape(config, options, 64).attended_heads, 6);
  options.attended_heads = 4;
  EXPECT_THROW(collected_shape(config, options, 64), UsageError);
  options.attended_heads = 2;
  EXPECT_EQ(collected_shape(config, options, 64).block(), 32);
  config.layout = checkpoint::KvLayout::projected;
  EXPECT_THROW(collected_shape(config, options, 64), InputError);
  options.attention_statistics = false;
  EXPECT_FALSE(collected_shape(config, options, 64).attention);
  config.layout = checkpoint::KvLayout::gqa;
  config.layers = 2;
  config.layer_shapes = {{6, 16, 16}, {3, 16, 16}};
  EXPECT_THROW(collected_shape(config, options, 64), InputError);
  config.layer_shapes.clear();
  EXPECT_EQ(collected_shape(config, options, 64).sequence_length, 64);
  config.layout = checkpoint::KvLayout::latent;
  EXPECT_THROW(collected_shape(config, options, 64), InputError);
}

TEST(CollectShapeTest, share_of_arithmetic_at_7b_shapes) {
  const checkpoint::Reader reader(golden_folder() / "llama-mha");
  checkpoint::ModelConfig config = reader.config();
  config.hidden = 4096;
  config.heads = config.kv_heads = config.source_kv_heads = 32;
  config.head_dim = 128;
  config.ffn = 11008;
  CollectOptions options;
  options.attention_statistics = true;
  options.attended_heads = 4;
  const StatisticsShape shape = collected_shape(config, options, 2048);
  // 202e6 parameters: 0.4216 Gflop per token forward, and three Grams of 4096. Scores in blocks of 256 rows: the mean
  // row sees 1152 tokens. Per head 2 x 1152 x (128 + 512) and Grams of 512 and 128.
  const double grams = 3 * linalg::gram_operations(4096);
  EXPECT_GE(grams, 3.0 * 4096 * 4096);
  EXPECT_LE(grams, 3.0 * 4096 * (4096 + 1024));
  const double added = 32 * (2.0 * 1152 * 640 + linalg::gram_operations(512) + linalg::gram_operations(128));
  EXPECT_NEAR(attention_statistics_share(config, shape), added / (0.42153e9 + grams), 0.001);
  options.attended_heads = 32;
  EXPECT_GT(attention_statistics_share(config, collected_shape(config, options, 2048)), 1);
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
  const at::Tensor ids = at::randint(3, vocab, {16, length}, at::kLong);
  const std::uint64_t before = reset_peak();
  if (before == 0) GTEST_SKIP() << "/proc/self/clear_refs cannot be written here";
  CollectOptions options;
  options.residency = model::Residency::streamed;
  options.hidden_folder = folder.path();
  const Layers found = collect(reader, comm::Grid{}, ids, options);
  const double used = static_cast<double>(peak_resident_bytes()) - static_cast<double>(before);
  const double layer_bytes = 4.0 * (4.0 * hidden * hidden + 3.0 * hidden * ffn);
  const double embedding = 4.0 * hidden * vocab;
  const double statistics =
      static_cast<double>(layers) *
      static_cast<double>(layer_statistics_bytes(collected_shape(reader.config(), options, length)));
  // One micro-batch's hidden states, queries, keys, values, scores and MLP widths are in flight.
  const double activations = 4.0 * length * (6 * hidden + 3 * ffn) + 4.0 * 8 * length * length;
  const double bound = 1.25 * (layer_bytes + embedding + statistics + activations);
  EXPECT_LT(used, bound) << human_bytes(used) << " used, bound " << human_bytes(bound) << ", all weights "
                         << human_bytes(weights);
  EXPECT_GT(weights, bound) << "the test would not notice a resident model";
  EXPECT_EQ(found.size(), static_cast<std::size_t>(layers));
}

}  // namespace
}  // namespace headfold::calibration
