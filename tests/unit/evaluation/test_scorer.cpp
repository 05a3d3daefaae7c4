// The scorer against a plain one, over rank counts, micro-batches and grids. Every test runs on all ranks.

#include <ATen/Parallel.h>
#include <gmock/gmock.h>
#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/checkpoint/safetensors.h>
#include <headfold/evaluation/results.h>
#include <headfold/evaluation/score_store.h>

#include <cmath>

#include "models.h"
#include "world.h"

namespace headfold::evaluation {
namespace {

using testing::HasSubstr;
using testing_support::ScratchFolder;
using testing_support::world;

/// The definition, one window at a time through one process's decoder, float64 throughout after the logits.
WindowScore plain_score(const model::Decoder& decoder, const model::Decoder* reference, const Window& window) {
  const at::Tensor ids = at::tensor(window.inputs, at::kLong).unsqueeze(0);
  const at::Tensor log_q = at::log_softmax(decoder.logits(ids)[0].to(at::kDouble), -1);
  const at::Tensor log_p =
      reference != nullptr ? at::log_softmax(reference->logits(ids)[0].to(at::kDouble), -1) : at::Tensor();
  WindowScore score;
  const std::size_t first = window.inputs.size() - window.targets.size();
  for (std::size_t t = 0; t < window.targets.size(); ++t) {
    const auto row = static_cast<std::int64_t>(first + t);
    ++score.tokens;
    score.loss -= log_q[row][window.targets[t]].item<double>();
    if (reference == nullptr) continue;
    score.reference_loss -= log_p[row][window.targets[t]].item<double>();
    score.divergence += (log_p[row].exp() * (log_p[row] - log_q[row])).sum().item<double>();
    score.agreements += log_p[row].argmax().item<std::int64_t>() == log_q[row].argmax().item<std::int64_t>() ? 1 : 0;
  }
  return score;
}

std::vector<WindowScore> scores_of(const checkpoint::Reader& model, const checkpoint::Reader* reference,
                                   const comm::Grid& grid, const Task& task, ScorerOptions options) {
  double told = 0;
  auto scores =
      Scorer(model, reference, grid, options).score(task.windows, task.name, [&](double tokens) { told += tokens; });
  if (world().root()) {
    EXPECT_NEAR(told, static_cast<double>(task.input_tokens()), 1e-6 * told) << "tokens by progress";
  }
  return scores;
}

void expect_equal_bits(const std::vector<WindowScore>& a, const std::vector<WindowScore>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t w = 0; w < a.size(); ++w) {
    EXPECT_EQ(a[w].tokens, b[w].tokens) << w;
    EXPECT_EQ(a[w].loss, b[w].loss) << w;
    EXPECT_EQ(a[w].reference_loss, b[w].reference_loss) << w;
    EXPECT_EQ(a[w].divergence, b[w].divergence) << w;
    EXPECT_EQ(a[w].agreements, b[w].agreements) << w;
  }
}

void expect_close(const std::vector<WindowScore>& a, const std::vector<WindowScore>& b, double relative) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t w = 0; w < a.size(); ++w) {
    ASSERT_EQ(a[w].tokens, b[w].tokens) << w;
    EXPECT_NEAR(a[w].loss, b[w].loss, relative * b[w].loss) << w;
    EXPECT_NEAR(a[w].reference_loss, b[w].reference_loss, relative * b[w].reference_loss) << w;
    EXPECT_NEAR(a[w].divergence, b[w].divergence, 1e-4 * b[w].divergence + 1e-6 * static_cast<double>(b[w].tokens))
        << w;
    EXPECT_EQ(a[w].agreements, b[w].agreements) << w;
  }
}

class ScorerOn : public testing::TestWithParam<const char*> {};

TEST_P(ScorerOn, equals_a_plain_scorer_for_both_metrics) {
  const checkpoint::Reader reader(demo_model(GetParam()));
  const auto tokenizer = tokenizer::load_tokenizer(reader.folder());
  const model::Decoder decoder(reader, at::kFloat);
  const Task blocks = blocks_task(*tokenizer, heldout(), 64, 5);
  const Task rolling = rolling_task(*tokenizer, heldout(), 96, 1);
  ASSERT_GT(rolling.windows.size(), 2U);
  for (const Task& task : {blocks, rolling}) {
    std::vector<WindowScore> expected;
    for (const Window& window : task.windows) expected.push_back(plain_score(decoder, nullptr, window));
    // Small blocks of logits, so that windows are cut between blocks.
    const auto scores = scores_of(reader, nullptr, comm::make_grid(world(), 1), task,
                                  {.micro_batch = 2, .logits_bytes = 20 * 4 * reader.config().vocab});
    expect_close(scores, expected, 1e-5);
    EXPECT_EQ(total(scores).tokens, task.predictions());
  }
}

TEST_P(ScorerOn, is_bit_identical_at_every_rank_count_and_grid) {
  const checkpoint::Reader reader(demo_model(GetParam()));
  const auto tokenizer = tokenizer::load_tokenizer(reader.folder());
  const ScratchFolder scratch;
  const checkpoint::Reader reference(perturbed(reader.folder(), scratch / "reference", 0.05));
  at::set_num_threads(1);
  for (const Task& task : {blocks_task(*tokenizer, heldout(), 32, 9), rolling_task(*tokenizer, heldout(), 48, 1)}) {
    for (const checkpoint::Reader* other : {static_cast<const checkpoint::Reader*>(nullptr), &reference}) {
      const ScorerOptions options{.micro_batch = 2};
      const auto alone = scores_of(reader, other, comm::Grid{}, task, options);
      for (const int stages : {1, world().size()})
        expect_equal_bits(scores_of(reader, other, comm::make_grid(world(), stages), task, options), alone);
      if (world().size() == 4)
        expect_equal_bits(scores_of(reader, other, comm::make_grid(world(), 2), task, options), alone);
      ScorerOptions streamed = options;
      streamed.residency = model::Residency::streamed;
      expect_equal_bits(scores_of(reader, other, comm::make_grid(world(), 1), task, streamed), alone);
      streamed.hidden_bytes = 1;  // one micro-batch a round
      expect_equal_bits(scores_of(reader, other, comm::make_grid(world(), 1), task, streamed), alone);
    }
  }
}

TEST_P(ScorerOn, does_not_depend_on_the_micro_batch) {
  const checkpoint::Reader reader(demo_model(GetParam()));
  const auto tokenizer = tokenizer::load_tokenizer(reader.folder());
  const comm::Grid grid = comm::make_grid(world(), 1);
  for (const Task& task : {blocks_task(*tokenizer, heldout(), 32, 7), rolling_task(*tokenizer, heldout(), 48, 1)}) {
    const auto one = scores_of(reader, nullptr, grid, task, {.micro_batch = 1});
    expect_close(scores_of(reader, nullptr, grid, task, {.micro_batch = 3}), one, 1e-5);
    expect_close(scores_of(reader, nullptr, grid, task, {.micro_batch = 100}), one, 1e-5);  // padded to the longest
  }
}

TEST_P(ScorerOn, goes_on_from_saved_scores_with_the_same_bits) {
  const checkpoint::Reader reader(demo_model(GetParam()));
  const auto tokenizer = tokenizer::load_tokenizer(reader.folder());
  const ScratchFolder scratch;
  const checkpoint::Reader reference(perturbed(reader.folder(), scratch / "reference", 0.05));
  const Task task = rolling_task(*tokenizer, heldout(), 24, 3);
  const ScorerOptions options{.micro_batch = 2};
  const comm::Grid grid = comm::make_grid(world(), world().size() == 4 ? 2 : 1);
  ASSERT_GT(std::ssize(task.windows), 2 * (grid.stages > 1 ? 16 : 1) * grid.replicas);  // one round is not all
  const auto undisturbed = scores_of(reader, &reference, grid, task, options);
  const Scorer scorer(reader, &reference, grid, options);
  const OrderedJson identity{{"model", "one"}};
  std::size_t before = 0;
  {
    ScoreStore store(world(), scratch / "scores", identity);
    ScoreHooks hooks;
    hooks.scored = [&](const std::vector<std::size_t>& windows, const std::vector<WindowScore>& scores) {
      ASSERT_EQ(windows.size(), scores.size());
      store.add(task, windows, scores, true);
      throw Stopped("after the first round");
    };
    EXPECT_THROW(scorer.score(task.windows, task.name, {}, hooks), Stopped);
    before = store.size();
  }
  EXPECT_GT(before, 0U);
  EXPECT_LT(before, task.windows.size());
  const auto again = [&](const OrderedJson& of) {
    ScoreStore store(world(), scratch / "scores", of);
    ScoreHooks hooks;
    hooks.known = store.known(task);
    std::size_t fresh = 0;
    hooks.scored = [&](const std::vector<std::size_t>& windows, const std::vector<WindowScore>&) {
      fresh += windows.size();
    };
    expect_equal_bits(scorer.score(task.windows, task.name, {}, hooks), undisturbed);
    return fresh;
  };
  EXPECT_EQ(again(identity), task.windows.size() - before);
  // Another text knows none of them; another model removes them.
  const Task other = rolling_task(*tokenizer, heldout(), 25, 3);
  for (const auto& score : ScoreStore(world(), scratch / "scores", identity).known(other)) EXPECT_FALSE(score);
  EXPECT_EQ(again({{"model", "another"}}), task.windows.size());
}

INSTANTIATE_TEST_SUITE_P(Demo, ScorerOn, testing::Values("prose-llama", "prose-bloom"),
                         [](const auto& model) { return std::string(model.param).substr(6); });

TEST(Divergence, of_a_model_from_itself_is_zero) {
  const checkpoint::Reader reader(demo_model("prose-llama"));
  const auto tokenizer = tokenizer::load_tokenizer(reader.folder());
  const Task task = blocks_task(*tokenizer, heldout(), 64, 4);
  const Totals totals = total(scores_of(reader, &reader, comm::make_grid(world(), 1), task, {.micro_batch = 2}));
  EXPECT_EQ(totals.divergence, 0.0);
  EXPECT_EQ(totals.agreements, totals.tokens);
  EXPECT_EQ(totals.loss, totals.reference_loss);
}

TEST(Divergence, equals_its_definition_between_two_models) {
  const checkpoint::Reader reader(demo_model("prose-llama"));
  const auto tokenizer = tokenizer::load_tokenizer(reader.folder());
  const ScratchFolder scratch;
  const checkpoint::Reader changed(perturbed(reader.folder(), scratch / "changed", 0.3));
  const Task task = blocks_task(*tokenizer, heldout(), 64, 3);
  const model::Decoder decoder(changed, at::kFloat), reference(reader, at::kFloat);
  std::vector<WindowScore> expected;
  for (const Window& window : task.windows) expected.push_back(plain_score(decoder, &reference, window));
  const auto scores =
      scores_of(changed, &reader, comm::make_grid(world(), 1), task, {.micro_batch = 2, .logits_bytes = 1});
  expect_close(scores, expected, 1e-5);
  // The perturbation is large enough for this test to see a swapped direction or a missing term.
  const auto swapped = total(scores_of(reader, &changed, comm::make_grid(world(), 1), task, {.micro_batch = 2}));
  EXPECT_GT(total(scores).mean_divergence(), 1e-3);
  EXPECT_GT(std::abs(swapped.mean_divergence() - total(scores).mean_divergence()), 1e-4);
  EXPECT_LT(total(scores).agreements, total(scores).tokens);
}

TEST(Scorer, refuses_another_vocabulary_and_a_micro_batch_of_nothing) {
  const checkpoint::Reader reader(demo_model("prose-llama"));
  const checkpoint::Reader golden(testing_support::golden_folder() / "llama-mha");
  ASSERT_NE(reader.config().vocab, golden.config().vocab);
  try {
    const Scorer scorer(reader, &golden, comm::make_grid(world(), 1), {});
    ADD_FAILURE() << "two vocabularies were accepted";
  } catch (const InputError& error) {
    EXPECT_THAT(error.what(),
                testing::AllOf(HasSubstr("vocabularies differ"), HasSubstr("llama-mha"), HasSubstr("4096")));
  }
  EXPECT_THROW(Scorer(reader, nullptr, comm::make_grid(world(), 1), {.micro_batch = 0}), UsageError);
}

TEST(Scorer, names_model_and_window_of_a_loss_that_is_not_finite_on_every_rank) {
  const checkpoint::Reader good(demo_model("prose-llama"));
  const ScratchFolder scratch;
  const checkpoint::Reader broken(perturbed(good.folder(), scratch / "broken", std::nan("")));
  const auto tokenizer = tokenizer::load_tokenizer(good.folder());
  const Task task = blocks_task(*tokenizer, heldout(), 32, 8);
  for (const bool broken_reference : {false, true}) {
    try {
      scores_of(broken_reference ? good : broken, broken_reference ? &broken : nullptr, comm::make_grid(world(), 1),
                task, {.micro_batch = 2});
      ADD_FAILURE() << "NaN was accepted";
    } catch (const InputError& error) {
      EXPECT_THAT(error.what(), testing::AllOf(HasSubstr("broken"), HasSubstr("window 0"), HasSubstr("ppl_blocks@32")));
    }
  }
}

TEST(Totals, are_means_over_tokens_not_over_windows) {
  const Totals totals = total({{.tokens = 1, .loss = 4, .divergence = 1, .agreements = 1},
                               {.tokens = 3, .loss = 4, .divergence = 1, .agreements = 1}});
  EXPECT_DOUBLE_EQ(totals.mean_loss(), 2.0);
  EXPECT_DOUBLE_EQ(totals.mean_divergence(), 0.5);
  EXPECT_DOUBLE_EQ(totals.agreement(), 0.5);
}

}  // namespace
}  // namespace headfold::evaluation
