// Models that are not written, scored like written ones. Every test runs on all ranks; three windows leave one of four
// ranks without any.

#include <ATen/Parallel.h>
#include <gmock/gmock.h>
#include <headfold/base/error.h>
#include <headfold/evaluation/scorer.h>
#include <headfold/evaluation/trial.h>
#include <headfold/folding/apply.h>

#include <limits>

#include "models.h"
#include "world.h"

namespace headfold::evaluation {
namespace {

using folding::FoldOptions;
using folding::KeyFold;
using folding::LayerTarget;
using folding::Metric;
using folding::NewTensors;
using folding::ValueFold;
using testing::HasSubstr;
using testing_support::ScratchFolder;
using testing_support::world;

/// Windows of arbitrary ids; the last one scores only its second half.
std::vector<Window> few_windows(const checkpoint::Reader& reader, std::int64_t count = 3, std::int64_t length = 24) {
  std::vector<Window> windows;
  for (std::int64_t w = 0; w < count; ++w) {
    Window window{w, {}, {}};
    for (std::int64_t i = 0; i < length; ++i) {
      window.inputs.push_back((31 * i * i + 17 * i + 7 * w) % reader.config().vocab);
      if (w + 1 < count || i >= length / 2) window.targets.push_back((13 * i + 5 * w) % reader.config().vocab);
    }
    windows.push_back(std::move(window));
  }
  return windows;
}

Totals scored(const checkpoint::Reader& model, const checkpoint::Reader* reference,
              const std::vector<Window>& windows) {
  return total(Scorer(model, reference, comm::make_grid(world(), 1), {}).score(windows, "test"));
}

void expect_equal_bits(const Totals& a, const Totals& b) {
  EXPECT_EQ(a.tokens, b.tokens);
  EXPECT_EQ(a.loss, b.loss);
  EXPECT_EQ(a.reference_loss, b.reference_loss);
  EXPECT_EQ(a.divergence, b.divergence);
  EXPECT_EQ(a.agreements, b.agreements);
}

class TrialOn : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override { at::set_num_threads(1); }
  const checkpoint::Reader reader_{testing_support::golden_folder() / GetParam()};
  bool llama() const { return reader_.config().family == checkpoint::Family::llama; }
  std::string down() const { return llama() ? "down_proj.weight" : "dense_4h_to_h.weight"; }
  std::string down_of(std::int64_t layer) const {
    return llama() ? fmt::format("model.layers.{}.mlp.{}", layer, down())
                   : fmt::format("transformer.h.{}.mlp.{}", layer, down());
  }
  at::Tensor stored(std::int64_t layer) const {
    const std::string name = reader_.resolve(down_of(layer));
    return reader_.load(name, reader_.info(name).shape, at::kFloat);
  }
};

TEST_P(TrialOn, with_nothing_replaced_is_the_original) {
  const std::vector<Window> windows = few_windows(reader_);
  const Trial trial(world(), reader_, windows, at::kFloat);
  const Totals expected = scored(reader_, nullptr, windows);
  expect_equal_bits(trial.original(), expected);
  for (const std::int64_t first : {std::int64_t{0}, std::int64_t{1}, reader_.config().layers}) {
    std::int64_t asked = 0;
    const Totals same = trial.score(first, [&](std::int64_t layer) {
      EXPECT_EQ(layer, first + asked++);
      return ReplacedLayer{};
    });
    EXPECT_EQ(asked, reader_.config().layers - first);  // on ranks without windows, too
    EXPECT_EQ(same.divergence, 0.0);
    EXPECT_EQ(same.agreements, same.tokens);
    EXPECT_EQ(same.loss, expected.loss);
    EXPECT_EQ(same.reference_loss, expected.loss);
  }
}

TEST_P(TrialOn, replaced_tensors_score_like_the_written_checkpoint) {
  const ScratchFolder scratch;
  const std::vector<Window> windows = few_windows(reader_);
  std::vector<FoldOptions> list(2);
  list[0].keys = KeyFold::meanpool;
  list[0].values = ValueFold::meanpool;
  list[1].keys = llama() ? KeyFold::rope_commuting : KeyFold::norope;
  if (llama()) {
    list.resize(4);
    list[2].keys = KeyFold::post_rotation;
    list[3].keys = KeyFold::latent;
  }
  const Trial trial(world(), reader_, windows, at::kFloat);
  const Trial lean(world(), reader_, windows, at::kFloat, 0, Trial::Keep::ends);
  for (FoldOptions& options : list) {
    options.key_metric = options.value_metric = Metric::weights;
    options.kv_heads = reader_.config().kv_heads / 2;
    std::vector<LayerTarget> targets = folding::uniform_targets(options, reader_.config());
    // Heads that a grouping moves take their queries along.
    if (options.keys == KeyFold::rope_commuting) targets[1].groups = {{0, 3}, {1, 2}};
    const folding::Plan plan = make_plan(world(), reader_, nullptr, options, targets);
    const std::string name = name_of(options.keys);
    folding::apply_plan(world(), reader_, nullptr, plan, scratch / name);
    const checkpoint::Reader written(scratch / name);
    const Totals expected = scored(written, &reader_, windows);
    EXPECT_GT(expected.divergence, 1e-4 * static_cast<double>(expected.tokens)) << name;  // the fold does change it

    const checkpoint::ModelConfig folded = checkpoint::parse_config(
        folding::folded_model_config(reader_.config(), targets, folding::layout_of(options)), "folded");
    NewTensors tensors;
    const auto replaced = [&](std::int64_t layer) {
      tensors = folding::folded_layer(reader_, nullptr, targets[static_cast<std::size_t>(layer)], layer, options);
      for (auto& [tail, tensor] : tensors) tensor = tensor.to(at::kFloat);  // as the file holds them
      return ReplacedLayer{&folded, &tensors};
    };
    expect_equal_bits(trial.score(0, replaced), expected);
    expect_equal_bits(lean.score(0, replaced), expected);
  }
}

TEST_P(TrialOn, scores_do_not_depend_on_ranks_memory_or_where_it_begins) {
  const std::vector<Window> windows = few_windows(reader_, 5, 20);
  const Trial all(world(), reader_, windows, at::kFloat);
  const Trial alone(comm::Communicator::self(), reader_, windows, at::kFloat);
  const Trial streamed(world(), reader_, windows, at::kFloat, 0);
  const Trial ends(world(), reader_, windows, at::kFloat, 0, Trial::Keep::ends);
  const NewTensors changed = {{down(), stored(1).mul(1.4)}};
  const auto replaced = [&](std::int64_t layer) {
    return layer == 1 ? ReplacedLayer{&reader_.config(), &changed} : ReplacedLayer{};
  };
  const Totals expected = alone.score(0, replaced);
  EXPECT_GT(expected.divergence, 0.0);
  for (const Trial* trial : {&all, &alone, &streamed, &ends}) expect_equal_bits(trial->original(), all.original());
  for (const Trial* trial : {&all, &streamed, &ends}) expect_equal_bits(trial->score(0, replaced), expected);
  for (const Trial* trial : {&all, &streamed}) expect_equal_bits(trial->score(1, replaced), expected);
  EXPECT_THROW(ends.score(1, replaced), InternalError);  // these hidden states were not kept
  // Layer by layer, the rest left to finish(); two trials at once do not disturb each other.
  Trial::Run run = all.begin(0), other = all.begin(0);
  for (const std::int64_t layer : {0, 1}) run.advance(replaced(layer));
  expect_equal_bits(run.finish(), expected);
  EXPECT_EQ(other.finish().divergence, 0.0);
}

TEST_P(TrialOn, divergence_equals_that_of_a_perturbed_copy) {
  const ScratchFolder scratch;
  const checkpoint::Reader copy(perturbed(reader_.folder(), scratch / "copy", 0.5));
  const std::vector<Window> windows = few_windows(reader_);
  const Trial trial(world(), reader_, windows, at::kFloat);
  const NewTensors changed = {{down(), stored(0).mul(1.5)}};
  expect_equal_bits(trial.score(0,
                                [&](std::int64_t layer) {
                                  return layer == 0 ? ReplacedLayer{&reader_.config(), &changed} : ReplacedLayer{};
                                }),
                    scored(copy, &reader_, windows));
}

TEST_P(TrialOn, refuses_what_makes_no_sense) {
  const ScratchFolder scratch;
  const std::vector<Window> windows = few_windows(reader_, 2, 16);
  EXPECT_THROW(Trial(world(), reader_, {}, at::kFloat), InternalError);
  const Trial trial(world(), reader_, windows, at::kFloat);
  EXPECT_THROW(trial.begin(-1), InternalError);
  EXPECT_THROW(trial.begin(reader_.config().layers + 1), InternalError);
  Trial::Run run = trial.begin(reader_.config().layers);
  EXPECT_THROW(run.advance({}), InternalError);

  // Weights that are not finite: an error on every rank, and the trial goes on to serve others.
  NewTensors broken = {{down(), stored(1).fill_(std::numeric_limits<float>::quiet_NaN())}};
  const auto replaced = [&](std::int64_t layer) {
    return layer == 1 ? ReplacedLayer{&reader_.config(), &broken} : ReplacedLayer{};
  };
  try {
    trial.score(1, replaced);
    ADD_FAILURE() << "a loss that is no number was accepted";
  } catch (const InputError& error) {
    EXPECT_THAT(error.what(), HasSubstr("not finite"));
  }
  EXPECT_EQ(trial.score(0, [](std::int64_t) { return ReplacedLayer{}; }).divergence, 0.0);
  const checkpoint::Reader spoiled(
      perturbed(reader_.folder(), scratch / "spoiled", std::numeric_limits<double>::quiet_NaN()));
  EXPECT_THROW(Trial(world(), spoiled, windows, at::kFloat), InputError);

  // A tensor of the wrong shape is found before it is used (by ranks that have windows).
  broken[down()] = at::zeros({3, 3});
  Trial::Run misshapen = trial.begin(1);
  if (world().rank() < 2)
    EXPECT_THROW(misshapen.advance(replaced(1)), InternalError);
  else
    EXPECT_NO_THROW(misshapen.advance(replaced(1)));
}

INSTANTIATE_TEST_SUITE_P(Golden, TrialOn, testing::Values("llama-mha", "bloom"),
                         [](const auto& model) { return std::string(model.param).substr(0, 5); });

}  // namespace
}  // namespace headfold::evaluation
