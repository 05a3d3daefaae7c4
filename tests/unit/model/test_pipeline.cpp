#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/checkpoint/expanded.h>
#include <headfold/device/device.h>
#include <headfold/model/pipeline.h>
#include <headfold/model/rounds.h>

#include <set>

#include "small_models.h"
#include "world.h"

namespace headfold::model {
namespace {

using testing_models::bloom_json;
using testing_models::llama_json;
using testing_models::make_model;
using testing_models::SmallModel;
using testing_support::world;

/// Resident bytes without what the allocator keeps of memory that earlier tests freed: new blocks would be taken from
/// there, unseen.
double resident_bytes_in_use() {
  device::release_freed_memory();
  return static_cast<double>(resident_anonymous_bytes());
}

class CountingObserver : public LayerObserver {
 public:
  void attention_input(const at::Tensor& x) override { rows += x.size(0) * x.size(1); }
  void rotated_keys(const at::Tensor&) override { ++keys; }
  bool wants_rotated_keys() const override { return false; }
  std::int64_t rows = 0, keys = 0;
};

class PipelineTest : public testing::Test {
 protected:
  void SetUp() override {
    if (world().root()) make_model(llama_json(64, 4, 2, 5)).write(scratch_.path());
    world().barrier("model written");
    reader_ = std::make_unique<checkpoint::Reader>(scratch_.path());
  }
  testing_support::ScratchFolder scratch_;
  std::unique_ptr<checkpoint::Reader> reader_;
};

TEST_F(PipelineTest, every_grid_gives_the_decoders_numbers_and_calls_its_hooks) {
  const Decoder decoder(*reader_, at::kFloat);
  std::vector<at::Tensor> batches;
  for (const auto& [batch, length] : {std::pair{2, 9}, {1, 30}, {3, 1}, {1, 12}, {2, 33}, {1, 2}}) {
    at::manual_seed(static_cast<std::uint64_t>(100 + length));
    batches.push_back(at::randint(97, {batch, length}, at::kLong));
  }
  std::int64_t rows = 0;
  for (const at::Tensor& batch : batches) rows += batch.numel();
  for (int stages = 1; stages <= world().size(); ++stages) {
    if (world().size() % stages != 0) continue;
    for (const auto& [residency, in_file] :
         {std::pair{Residency::resident, false}, std::pair{Residency::streamed, false},
          std::pair{Residency::streamed, true}}) {
      SCOPED_TRACE(fmt::format("{} stages, {}{}", stages, residency == Residency::resident ? "resident" : "streamed",
                               in_file ? ", hidden states in a file" : ""));
      const comm::Grid grid = comm::make_grid(world(), stages);
      PipelineOptions options;
      options.residency = residency;
      if (in_file) options.hidden_folder = scratch_.path();
      const Pipeline pipeline(*reader_, grid, options);
      std::map<std::int64_t, CountingObserver> observers;
      std::map<std::int64_t, std::vector<std::int64_t>> entered;
      std::vector<at::Tensor> kept;
      double progress = 0;
      PipelineHooks hooks;
      hooks.observer = [&](std::int64_t layer) -> LayerObserver* {
        EXPECT_TRUE(pipeline.layers().contains(layer));
        EXPECT_FALSE(observers.contains(layer));
        return &observers[layer];
      };
      hooks.before_layer = [&](std::int64_t layer, std::int64_t index) { entered[layer].push_back(index); };
      hooks.output = [&](std::int64_t index, const at::Tensor& hidden) {
        EXPECT_EQ(index, static_cast<std::int64_t>(kept.size()));
        kept.push_back(hidden);
      };
      hooks.progress = [&](double done) { progress += done; };
      pipeline.run(batches, hooks);
      EXPECT_NEAR(progress, static_cast<double>(batches.size()), 1e-9);
      EXPECT_EQ(static_cast<std::int64_t>(observers.size()), pipeline.layers().size());
      for (auto& [layer, observer] : observers) {
        EXPECT_EQ(observer.rows, rows);
        EXPECT_EQ(observer.keys, 0);
        EXPECT_EQ(entered[layer], (std::vector<std::int64_t>{0, 1, 2, 3, 4, 5}));
      }
      ASSERT_EQ(kept.size(), grid.last_stage() ? batches.size() : 0U);
      for (std::size_t i = 0; i < kept.size(); ++i)
        EXPECT_TRUE(at::equal(pipeline.head().logits(kept[i]), decoder.logits(batches[i]))) << "micro-batch " << i;
      if (!grid.last_stage()) {
        EXPECT_THROW(pipeline.head(), InternalError);
      }
      // A second run, and one without anything to do.
      pipeline.run({batches[1]}, {});
      pipeline.run({}, hooks);
    }
  }
}

TEST_F(PipelineTest, packed_batches_agree_with_the_decoder_on_every_grid) {
  const Decoder decoder(*reader_, at::kFloat);
  at::manual_seed(5);
  const at::Tensor first = at::randint(97, {14}, at::kLong), second = at::randint(97, {9}, at::kLong);
  const at::Tensor ending = at::randint(97, {4}, at::kLong), last = at::randint(97, {1}, at::kLong);
  const auto alone = [&](const std::vector<at::Tensor>& ids) { return decoder.logits(at::cat(ids).unsqueeze(0))[0]; };
  const auto difference = [](const at::Tensor& a, const at::Tensor& b) {
    return at::sub(a, b).abs().max().item<double>();
  };
  for (int stages = 1; stages <= world().size(); ++stages) {
    if (world().size() % stages != 0) continue;
    for (const Residency residency : {Residency::resident, Residency::streamed}) {
      const comm::Grid grid = comm::make_grid(world(), stages);
      const Pipeline pipeline(*reader_, grid, {at::kFloat, residency, true});
      std::vector<at::Tensor> kept;
      PipelineHooks hooks;
      hooks.output = [&](std::int64_t, const at::Tensor& hidden) { kept.push_back(pipeline.head().logits(hidden)); };
      pipeline.run_packed({{at::cat({first, ending, last}), {{0, 14}, {14, 4}, {14, 1}}}, {second, {{0, 9}}}}, hooks);
      std::vector<LayerCache> caches = pipeline.make_cache(2, 20);
      pipeline.run_packed({{at::cat({first, second}), {{0, 14, 1}, {0, 9, 0}}}}, hooks, &caches);
      pipeline.run_packed({{at::cat({last, ending}), {{9, 1, 0}, {14, 4, 1}}}}, hooks, &caches);
      if (!grid.last_stage()) continue;
      ASSERT_EQ(kept.size(), 4U);
      EXPECT_LE(difference(kept[0].slice(0, 0, 18), alone({first, ending})), 1e-4);
      EXPECT_LE(difference(kept[0].slice(0, 18), alone({first, last}).slice(0, 14)), 1e-4);
      EXPECT_LE(difference(kept[1], alone({second})), 1e-4);
      EXPECT_LE(difference(kept[3].slice(0, 0, 1), alone({second, last}).slice(0, 9)), 1e-4);
      EXPECT_LE(difference(kept[3].slice(0, 1), alone({first, ending}).slice(0, 14)), 1e-4);
    }
  }
}

/// Five layers that cache different things, wide and narrow.
std::vector<std::pair<std::string, Json>> uneven_forms() {
  using checkpoint::KvLayout;
  Json decilm = llama_json(64, 4, 4, 5);
  decilm["intermediate_size"] = 256;
  Json biased = llama_json(64, 8, 4, 5);
  biased["attention_bias"] = true;
  return {{"decilm", testing_models::folded(decilm, {{4, 16, 16}, {1, 16, 16}, {2, 16, 16}, {4, 16, 16}, {1, 16, 16}},
                                            KvLayout::gqa)},
          {"latent",
           testing_models::folded(biased, {{4, 3, 8}, {1, 30, 20}, {2, 7, 5}, {2, 9, 9}, {1, 1, 1}}, KvLayout::latent)},
          {"bloom",
           testing_models::folded(bloom_json(64, 4, 5), {{4, 16, 4}, {1, 40, 5}, {2, 20, 33}, {2, 3, 16}, {1, 16, 60}},
                                  KvLayout::latent)},
          {"bloom_gqa", testing_models::folded(bloom_json(64, 4, 5), 2, KvLayout::gqa)}};
}

TEST_F(PipelineTest, layers_of_different_shapes_give_the_decoders_numbers) {
  for (const auto& [name, json] : uneven_forms()) {
    SCOPED_TRACE(name);
    const auto folder = scratch_ / name;
    if (world().root()) make_model(json, 3).write(folder);
    world().barrier("model written");
    const checkpoint::Reader reader(folder);
    const Decoder decoder(reader, at::kFloat);
    at::manual_seed(17);
    const std::vector<at::Tensor> batches = {at::randint(97, {2, 21}, at::kLong), at::randint(97, {1, 3}, at::kLong)};
    const comm::Grid grid = comm::make_grid(world(), world().size());
    const Pipeline pipeline(reader, grid, {});
    std::int64_t outputs = 0;
    PipelineHooks hooks;
    hooks.output = [&](std::int64_t index, const at::Tensor& hidden) {
      ++outputs;
      EXPECT_TRUE(at::equal(pipeline.head().logits(hidden), decoder.logits(batches[static_cast<std::size_t>(index)])));
    };
    pipeline.run(batches, hooks);
    EXPECT_EQ(outputs, grid.last_stage() ? 2 : 0);
    // Bytes of all stages are those of the model; the table of a tied model stands on two ranks.
    std::int64_t bytes = 0;
    for (int stage = 0; stage < world().size(); ++stage)
      bytes += stage_weight_bytes(reader.config(), world().size(), stage, at::kFloat);
    const std::int64_t twice = reader.config().tied_embeddings ? 97 * 64 : 0;
    EXPECT_NEAR(static_cast<double>(bytes),
                static_cast<double>((checkpoint::parameter_count(reader.config()) + twice) * 4), 64.0);
  }
}

TEST_F(PipelineTest, expanded_models_have_the_same_logits_and_bytes_at_any_rank_count) {
  for (const auto& [name, json] : uneven_forms()) {
    SCOPED_TRACE(name);
    const auto folder = scratch_ / ("folded-" + name);
    const auto together = scratch_ / ("expanded-" + name);
    const auto alone = scratch_ / ("alone-" + name);
    if (world().root()) make_model(json, 5).write(folder);
    world().barrier("model written");
    const checkpoint::Reader reader(folder);
    checkpoint::write_expanded(world(), reader, together, "float32", 100000);
    if (world().root()) {
      checkpoint::write_expanded(comm::Communicator::self(), reader, alone, "float32", 100000);
      const checkpoint::Reader expanded(together);
      EXPECT_EQ(expanded.fingerprint(), checkpoint::Reader(alone).fingerprint());
      EXPECT_TRUE(checkpoint::layout_problems(expanded).empty());
      const ModelConfig& config = expanded.config();
      EXPECT_EQ(config.raw["model_type"], checkpoint::name_of(config.family));
      EXPECT_EQ(config.layout, checkpoint::KvLayout::gqa);
      EXPECT_FALSE(config.uneven());
      EXPECT_GE(config.cache_bytes_per_token(4), reader.config().cache_bytes_per_token(4));
      const at::Tensor ids = at::randint(97, {2, 31}, at::kLong);
      EXPECT_LE(testing_models::relative_difference(Decoder(expanded, at::kFloat).logits(ids),
                                                    Decoder(reader, at::kFloat).logits(ids)),
                1e-5);
      const Json record = read_json(together / "headfold.json");
      EXPECT_EQ(record["format"], "headfold-expanded");
      EXPECT_NE(record["note"].get<std::string>().find("not smaller"), std::string::npos);
      EXPECT_EQ(record["source"]["fingerprint"], reader.fingerprint());
    }
    world().barrier("compared");
  }
  // What cannot be expanded, or need not.
  const auto refused = [&](const Json& json, const char* part) {
    try {
      checkpoint::expanded_config(checkpoint::parse_config(json, "here"), "float32");
      ADD_FAILURE() << "no error";
    } catch (const InputError& error) {
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
  };
  refused(testing_models::folded(llama_json(64, 4, 4), 2, checkpoint::KvLayout::projected), "after the rotation");
  refused(llama_json(64, 4, 2), "nothing to expand");
  refused(bloom_json(64, 4), "nothing to expand");
  EXPECT_THROW(checkpoint::write_expanded(world(), *reader_, scratch_ / "none", "float32", 1000), InputError);
  EXPECT_FALSE(std::filesystem::exists(scratch_ / "none"));
}

TEST_F(PipelineTest, streaming_keeps_one_layer_in_memory) {
  const auto folder = scratch_ / "larger";
  // Layers so large that what MPI and the allocator take now and then does not count.
  if (world().root()) make_model(llama_json(1024, 8, 8, 8)).write(folder);
  world().barrier("model written");
  const checkpoint::Reader reader(folder);
  const comm::Grid grid = comm::make_grid(world(), 1);
  const std::vector<at::Tensor> batches(3, at::zeros({1, 16}, at::kLong));
  const auto bytes_while = [&](Residency residency) {
    PipelineOptions options;
    options.residency = residency;
    const double start = resident_bytes_in_use();
    double most = 0;
    const Pipeline pipeline(reader, grid, options);
    PipelineHooks hooks;
    hooks.before_layer = [&](std::int64_t, std::int64_t) {
      most = std::max(most, static_cast<double>(resident_anonymous_bytes()) - start);
    };
    pipeline.run(batches, hooks);
    return most;
  };
  const auto layer = static_cast<double>(load_layer(reader, 0, at::kFloat)->bytes());
  const double streamed = bytes_while(Residency::streamed);
  const double resident = bytes_while(Residency::resident);
  EXPECT_LE(streamed, 2.5 * layer);
  EXPECT_GE(resident, 6 * layer);
}

TEST_F(PipelineTest, streaming_through_a_file_keeps_no_more_states_the_more_micro_batches) {
  if (world().size() > 1) GTEST_SKIP() << "measured on one rank";
  const comm::Grid grid = comm::make_grid(world(), 1);
  const std::vector<at::Tensor> batches(48, at::zeros({16, 256}, at::kLong));
  const double all = 48.0 * 16 * 256 * static_cast<double>(reader_->config().hidden) * 4;
  const auto most_while = [&](const std::filesystem::path& folder) {
    PipelineOptions options;
    options.residency = Residency::streamed;
    options.hidden_folder = folder;
    const Pipeline pipeline(*reader_, grid, options);
    pipeline.run({batches.begin(), batches.begin() + 2}, {});  // what the allocator keeps is there
    const double start = resident_bytes_in_use();
    double most = 0;
    PipelineHooks hooks;
    hooks.before_layer = [&](std::int64_t, std::int64_t) {
      most = std::max(most, static_cast<double>(resident_anonymous_bytes()) - start);
    };
    pipeline.run(batches, hooks);
    return most;
  };
  const double in_file = most_while(scratch_.path());
  const double in_memory = most_while({});
  EXPECT_LE(in_file, 0.3 * all);
  EXPECT_GE(in_memory, 0.6 * all);
  for (const auto& entry : std::filesystem::directory_iterator(scratch_.path()))
    EXPECT_FALSE(entry.path().filename().string().starts_with(".headfold-")) << entry.path();
  PipelineOptions nowhere;
  nowhere.residency = Residency::streamed;
  nowhere.hidden_folder = scratch_ / "missing";
  EXPECT_THROW(Pipeline(*reader_, grid, nowhere).run({batches.begin(), batches.begin() + 2}, {}), IoError);
}

TEST_F(PipelineTest, bad_ids_are_refused_on_every_rank_at_once) {
  const Pipeline pipeline(*reader_, comm::make_grid(world(), world().size()), {});
  EXPECT_THROW(pipeline.run({at::zeros({1, 4}, at::kLong), at::full({1, 4}, 97, at::kLong)}, {}), InputError);
  EXPECT_NO_THROW(pipeline.run({at::zeros({1, 4}, at::kLong)}, {}));
}

TEST_F(PipelineTest, stages_share_the_layers_by_weight) {
  EXPECT_THROW(stage_layers(reader_->config(), 6), UsageError);
  Json heavy_ends = llama_json(64, 4, 2, 8);
  heavy_ends["vocab_size"] = 1000;  // tables of about two layers' parameters each
  const ModelConfig config = checkpoint::parse_config(heavy_ends, "c");
  std::int64_t total = 0;
  for (const int stages : {1, 2, 4}) {
    const auto ranges = stage_layers(config, stages);
    ASSERT_EQ(ranges.size(), static_cast<std::size_t>(stages));
    EXPECT_EQ(ranges.front().begin, 0);
    EXPECT_EQ(ranges.back().end, 8);
    std::int64_t sum = 0, most = 0;
    for (int s = 0; s < stages; ++s) {
      const std::int64_t bytes = stage_weight_bytes(config, stages, s, at::kFloat);
      sum += bytes;
      most = std::max(most, bytes);
    }
    if (total == 0) total = sum;
    EXPECT_NEAR(static_cast<double>(sum), static_cast<double>(total), 64.0);
    EXPECT_EQ(fewest_stages(config, at::kFloat, 0, most, 8), stages);
  }
  EXPECT_EQ(total, checkpoint::parameter_count(config) * 4);
  EXPECT_GT(stage_layers(config, 4)[1].size(), stage_layers(config, 4)[0].size());
  EXPECT_EQ(fewest_stages(config, at::kFloat, 0, 1, 4), 4);
  EXPECT_GT(fewest_stages(config, at::kFloat, total, total * 3, 8), 1);
}

TEST(RoundSizeTest, follows_what_ran_and_never_runs_away) {
  comm::Grid grid;
  RoundSize round(grid, false, 64);
  EXPECT_EQ(round.size(), 1);
  // Rounds that something else keeps short, for ever: savings after every four, the end of a batch.
  for (int i = 0; i < 1000; ++i) {
    round.took(1e-4, 4);
    ASSERT_EQ(round.size(), 16);
  }
  round.took(4, 16);  // two seconds are aimed at
  EXPECT_EQ(round.size(), 8);
  round.took(1000, 8);
  EXPECT_EQ(round.size(), 1);
  grid.stages = 3;
  RoundSize piped(grid, false, 64);
  const std::int64_t least = piped.size();
  EXPECT_GT(least, 3);
  piped.took(1e9, 1);  // draining the pipeline costs as much as ever
  EXPECT_EQ(piped.size(), least);
}

}  // namespace
}  // namespace headfold::model
