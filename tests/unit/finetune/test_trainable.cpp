#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <gtest/gtest.h>
#include <headfold/base/error.h>
#include <headfold/model/compute.h>
#include <headfold/model/product.h>

#include <cstring>
#include <set>
#include <utility>

#include "elementwise.h"
#include "loss.h"
#include "models.h"

namespace headfold::finetune {
namespace {

using namespace testing_support;
using headfold::testing_support::ScratchFolder;

/// Teachers of both kinds for the scored positions of a batch.
TeacherView logits_teacher(std::int64_t positions, std::int64_t vocab) {
  at::Generator generator = at::detail::createCPUGenerator(21);
  const at::Tensor logits = at::randn({positions, vocab}, generator, at::TensorOptions().dtype(at::kDouble)) * 2;
  TeacherView view;
  view.logits = [logits](std::int64_t begin, std::int64_t end) { return logits.slice(0, begin, end); };
  return view;
}

TeacherView top_teacher(std::int64_t positions, std::int64_t vocab, std::int64_t k) {
  at::Generator generator = at::detail::createCPUGenerator(22);
  const at::Tensor logits = at::randn({positions, vocab}, generator, at::TensorOptions().dtype(at::kDouble)) * 2;
  TeacherView view;
  std::tie(view.top_log_probs, view.top_tokens) = at::topk(at::log_softmax(logits, -1), k, -1);
  return view;
}

std::int64_t scored(const Batch& batch) {
  return batch.targets.ge(0).sum().item<std::int64_t>();
}

// -----------------------------------------------------------------------------------------------------------------------------
// Gradients

/// Every form, by the native engine and by the one in libtorch's operations.
class GradientTest : public testing::TestWithParam<std::tuple<Form, model::Engine>> {
 protected:
  const Json& json() const { return form_.json; }

  Form form_ = std::get<0>(GetParam());
  model::Engine engine_ = std::get<1>(GetParam());

  /// Central differences along a random direction, for every parameter.
  static void check(TrainableModel& model, const Batch& batch, const TeacherView* teacher, const LossOptions& loss) {
    constexpr double kScale = 0.7;
    constexpr double kStep = 1e-5;
    const auto value = [&] {
      const LossSums sums = model.forward_backward(batch, teacher, loss, kScale, 99);
      return kScale * sums.loss(loss) * static_cast<double>(sums.tokens);
    };
    clear_gradients(model);
    value();
    const std::vector<at::Tensor> found = gradients(model);
    at::Generator generator = at::detail::createCPUGenerator(5);
    std::size_t number = 0;
    int moving = 0;
    for (Parameter& parameter : model.parameters()) {
      const at::Tensor& gradient = found[number++];
      at::Tensor direction = at::randn(gradient.sizes(), generator, gradient.options());
      direction /= direction.norm();
      const at::Tensor before = parameter.value.clone();
      parameter.value.copy_(before + kStep * direction);
      const double above = value();
      parameter.value.copy_(before - kStep * direction);
      const double below = value();
      parameter.value.copy_(before);
      const double expected = (above - below) / (2 * kStep);
      const double analytic = (gradient * direction).sum().item<double>();
      // Differences carry step^2 of the third derivative and 1e-16 of the loss over the step.
      ASSERT_NEAR(analytic, expected, 2e-7 * (gradient.norm().item<double>() + 1)) << parameter.name;
      if (gradient.abs().max().item<double>() > 1e-6) ++moving;
    }
    // Only a key bias of models without rotation has no effect: it adds the same to all scores of a row.
    EXPECT_GE(moving, static_cast<int>(model.parameters().size()) - 2 * static_cast<int>(model.config().layers));
  }

  void SetUp() override {
    model::set_compute({engine_, at::kCPU});
    model::set_attention_block_bytes(5 * 11 * 16 * at::get_num_threads());  // a few rows of scores at a time
  }
  void TearDown() override {
    model::set_attention_block_bytes(std::int64_t{256} << 20);
    model::set_compute({});
  }
};

TEST_P(GradientTest, of_adapters_are_finite_differences) {
  const ScratchFolder folder;
  const checkpoint::Reader reader = write_model(folder / "model", json());
  const Batch batch = segmented_batch(97);
  TrainableModel model(reader, adapt_all(3, 0.2), at::kDouble);
  fill_adapters(model);
  check(model, batch, nullptr, {});
  const TeacherView top = top_teacher(scored(batch), 97, 5);
  check(model, batch, &top, {0.6, 1});
}

TEST_P(GradientTest, of_all_weights_are_finite_differences) {
  const ScratchFolder folder;
  const checkpoint::Reader reader = write_model(folder / "model", json());
  const Batch batch = segmented_batch(97);
  TrainableModel model(reader, train_all(), at::kDouble);
  std::set<std::string> names;
  for (const Parameter& parameter : model.parameters()) names.insert(parameter.name);
  for (const checkpoint::TensorShape& tensor : checkpoint::model_tensors(reader.config()))
    EXPECT_TRUE(names.contains(tensor.name)) << tensor.name;
  EXPECT_EQ(names.size(), checkpoint::model_tensors(reader.config()).size());
  const TeacherView teacher = logits_teacher(scored(batch), 97);
  model.set_activation_checkpointing(false);
  check(model, batch, &teacher, {0.7, 2.5});
}

TEST_P(GradientTest, of_float32_and_bfloat16_follow_float64) {
  const ScratchFolder folder;
  const checkpoint::Reader reader = write_model(folder / "model", json());
  const Batch batch = segmented_batch(97);
  const TeacherView teacher = logits_teacher(scored(batch), 97);
  for (const LoraOptions& options : {adapt_all(4, 0.1), train_all()}) {
    TrainableModel exact(reader, options, at::kDouble);
    fill_adapters(exact);
    const LossSums sums = exact.forward_backward(batch, &teacher, {0.5, 2}, 1, 4);
    for (const auto& [dtype, bound] : {std::pair(at::kFloat, 2e-5), std::pair(at::kBFloat16, 0.2)}) {
      SCOPED_TRACE(c10::toString(dtype));
      TrainableModel model(reader, options, dtype);
      for (std::size_t i = 0; i < model.parameters().size(); ++i)
        model.parameters()[i].value.copy_(exact.parameters()[i].value);
      const LossSums own = model.forward_backward(batch, &teacher, {0.5, 2}, 1, 4);
      EXPECT_NEAR(own.cross_entropy, sums.cross_entropy, bound * sums.cross_entropy);
      EXPECT_NEAR(own.divergence, sums.divergence, bound * sums.divergence);
      EXPECT_LE(difference(gradients(model), gradients(exact)), bound);
    }
  }
}

TEST_P(GradientTest, are_the_same_bits_with_and_without_kept_activations) {
  const ScratchFolder folder;
  const checkpoint::Reader reader = write_model(folder / "model", json());
  const Batch batch = segmented_batch(97);
  for (const LoraOptions& options : {adapt_all(4, 0.25), train_all()}) {
    TrainableModel model(reader, options, at::kFloat);
    fill_adapters(model);
    model.set_activation_checkpointing(true);
    const LossSums first = model.forward_backward(batch, nullptr, {}, 1, 4);
    const std::vector<at::Tensor> recomputed = gradients(model);
    clear_gradients(model);
    model.set_activation_checkpointing(false);
    const LossSums second = model.forward_backward(batch, nullptr, {}, 1, 4);
    EXPECT_EQ(first.cross_entropy, second.cross_entropy);
    const std::vector<at::Tensor> kept = gradients(model);
    for (std::size_t i = 0; i < kept.size(); ++i)
      EXPECT_TRUE(at::equal(kept[i], recomputed[i])) << model.parameters()[i].name;
  }
}

TEST_P(GradientTest, logits_are_those_of_the_decoder) {
  const ScratchFolder folder;
  const checkpoint::Reader reader = write_model(folder / "model", json());
  Batch batch = plain_batch(2, 40, 97);
  batch.targets = batch.ids;
  // libtorch's own products of bfloat16 round more often on processors without AVX-512.
  const double narrow = std::get<model::Engine>(GetParam()) == model::Engine::native ? 5e-2 : 1e-1;
  for (const auto& [dtype, bound] : {std::pair(at::kFloat, 1e-5), std::pair(at::kBFloat16, narrow)}) {
    const TrainableModel model(reader, frozen(), dtype);
    const at::Tensor logits = model.logits(model.hidden(batch));
    const at::Tensor expected = model::Decoder(reader, dtype).logits(batch.ids).view({-1, 97});
    EXPECT_EQ(logits.scalar_type(), at::kFloat);
    EXPECT_LE(forms::relative_difference(logits, expected), bound) << c10::toString(dtype);
  }
}

std::string form_name(const testing::TestParamInfo<std::tuple<Form, model::Engine>>& given) {
  return std::get<0>(given.param).name;
}
INSTANTIATE_TEST_SUITE_P(Forms, GradientTest,
                         testing::Combine(testing::ValuesIn(all_forms()), testing::Values(model::Engine::native)),
                         form_name);

/// One form of every path through a layer; EngineTest has all of them.
std::vector<Form> some_forms() {
  std::vector<Form> some;
  for (const Form& form : all_forms())
    for (const char* name : {"llama_gqa", "llama_projected", "llama_latent", "bloom_six_heads", "bloom_latent_wide"})
      if (form.name == name) some.push_back(form);
  return some;
}
INSTANTIATE_TEST_SUITE_P(Tensors, GradientTest,
                         testing::Combine(testing::ValuesIn(some_forms()), testing::Values(model::Engine::tensors)),
                         form_name);

class EngineTest : public testing::TestWithParam<Form> {};

TEST_P(EngineTest, gradients_of_both_agree) {
  const ScratchFolder folder;
  const checkpoint::Reader reader = write_model(folder / "model", GetParam().json);
  const Batch batch = segmented_batch(97);
  const TeacherView top = top_teacher(scored(batch), 97, 5);
  for (const LoraOptions& options : {adapt_all(4, 0.3), train_all()}) {
    std::vector<std::vector<at::Tensor>> found;
    std::vector<LossSums> sums;
    for (const model::Engine engine : {model::Engine::native, model::Engine::tensors}) {
      model::set_compute({engine, at::kCPU});
      TrainableModel model(reader, options, at::kDouble);
      fill_adapters(model);
      sums.push_back(model.forward_backward(batch, &top, {0.4, 1}, 1, 8));
      found.push_back(gradients(model));
    }
    model::set_compute({});
    EXPECT_EQ(sums[0].tokens, sums[1].tokens);
    EXPECT_EQ(sums[0].agreements, sums[1].agreements);
    EXPECT_NEAR(sums[1].cross_entropy, sums[0].cross_entropy, 1e-6 * sums[0].cross_entropy);
    EXPECT_NEAR(sums[1].divergence, sums[0].divergence, 1e-6 * sums[0].divergence);
    // Dropout takes the same elements; the constants of GELU differ in the eighth digit.
    EXPECT_LE(difference(found[1], found[0]), 1e-6);
  }
}

INSTANTIATE_TEST_SUITE_P(Forms, EngineTest, testing::ValuesIn(all_forms()),
                         [](const auto& given) { return given.param.name; });

// -----------------------------------------------------------------------------------------------------------------------------
// Batches

class BatchTest : public testing::Test {
 protected:
  const ScratchFolder folder_;
  const checkpoint::Reader reader_ = write_model(folder_ / "model", forms::llama_json(64, 4, 2));
};

TEST_F(BatchTest, a_packed_document_computes_what_it_does_alone) {
  for (const Json& json : {forms::llama_json(64, 4, 2), forms::bloom_json(64, 4)}) {
    const checkpoint::Reader reader = write_model(folder_ / "packed", json);
    TrainableModel model(reader, adapt_all(), at::kDouble);
    fill_adapters(model);
    const Batch whole = plain_batch(1, 24, 97);
    Batch packed = whole;
    packed.segments = at::zeros({1, 24}, at::kLong);
    packed.segments.slice(1, 9).fill_(1);
    packed.targets[0][8] = -1;
    const LossSums together = model.forward_backward(packed, nullptr, {}, 1, 0);
    const std::vector<at::Tensor> expected = gradients(model);
    clear_gradients(model);
    double sum = 0;
    for (const auto& [begin, end] : {std::pair(0, 9), std::pair(9, 24)}) {
      Batch alone;
      alone.ids = whole.ids.slice(1, begin, end);
      alone.targets = packed.targets.slice(1, begin, end);
      sum += model.forward_backward(alone, nullptr, {}, 1, 0).cross_entropy;
    }
    EXPECT_NEAR(together.cross_entropy, sum, 1e-11 * sum);
    EXPECT_LE(difference(gradients(model), expected), 1e-11);
    // Without segments the second document would see the first.
    EXPECT_GT(std::abs(model.evaluate(whole, nullptr, {}).cross_entropy - sum), 1e-3);
  }
}

TEST_F(BatchTest, dropout_depends_on_the_number_of_a_sequence_and_not_on_its_micro_batch) {
  TrainableModel model(reader_, adapt_all(4, 0.3), at::kDouble);
  fill_adapters(model);
  Batch all = plain_batch(4, 16, 97);
  const LossSums sums = model.forward_backward(all, nullptr, {}, 1, 8);
  const std::vector<at::Tensor> expected = gradients(model);
  clear_gradients(model);
  LossSums parts;
  for (const std::int64_t first : {2, 0}) {
    Batch half;
    half.ids = all.ids.slice(0, first, first + 2);
    half.targets = all.targets.slice(0, first, first + 2);
    half.numbers = at::arange(first, first + 2, at::kLong);
    parts.cross_entropy += model.forward_backward(half, nullptr, {}, 1, 8).cross_entropy;
  }
  EXPECT_NEAR(parts.cross_entropy, sums.cross_entropy, 1e-11 * sums.cross_entropy);
  EXPECT_LE(difference(gradients(model), expected), 1e-11);
  clear_gradients(model);
  EXPECT_NE(model.forward_backward(all, nullptr, {}, 1, 9).cross_entropy, sums.cross_entropy);
  EXPECT_GT(difference(gradients(model), expected), 1e-3);
  EXPECT_NE(model.evaluate(all, nullptr, {}).cross_entropy, sums.cross_entropy);
}

TEST_F(BatchTest, layers_are_reported_as_soon_as_their_gradients_are_complete) {
  for (const LoraOptions& options : {adapt_all(), train_all()}) {
    TrainableModel model(reader_, options, at::kFloat);
    fill_adapters(model);
    const Batch batch = plain_batch(2, 12, 97);
    std::vector<std::int64_t> order;
    std::vector<at::Tensor> seen(model.parameters().size());
    model.forward_backward(batch, nullptr, {}, 1, 0, [&](std::int64_t layer) {
      order.push_back(layer);
      for (std::size_t i = 0; i < seen.size(); ++i)
        if (model.parameters()[i].layer == layer) seen[i] = model.parameters()[i].gradient.clone();
    });
    EXPECT_EQ(order, (std::vector<std::int64_t>{2, 1, 0, -1}));
    for (std::size_t i = 0; i < seen.size(); ++i) {
      ASSERT_TRUE(seen[i].defined()) << model.parameters()[i].name;
      EXPECT_TRUE(at::equal(seen[i], model.parameters()[i].gradient)) << model.parameters()[i].name;
    }
  }
}

TEST_F(BatchTest, gradients_add_up_in_buffers_of_the_caller) {
  TrainableModel model(reader_, adapt_all(), at::kFloat);
  fill_adapters(model);
  const Batch batch = plain_batch(2, 12, 97);
  model.forward_backward(batch, nullptr, {}, 1, 0);
  const std::vector<at::Tensor> once = gradients(model);
  std::int64_t size = 0;
  for (const Parameter& parameter : model.parameters()) size += parameter.value.numel();
  const at::Tensor flat = at::zeros({size}, at::kFloat);
  std::int64_t begin = 0;
  for (Parameter& parameter : model.parameters()) {
    const std::int64_t n = parameter.value.numel();
    parameter.gradient = flat.slice(0, begin, begin + n).view(parameter.value.sizes());
    begin += n;
  }
  model.forward_backward(batch, nullptr, {}, 0.25, 0);
  model.forward_backward(batch, nullptr, {}, 0.75, 0);
  EXPECT_LE(difference(gradients(model), once), 1e-5);
  EXPECT_GT(flat.abs().max().item<float>(), 0);
}

TEST_F(BatchTest, nothing_scored_gives_no_loss_and_no_gradient) {
  TrainableModel model(reader_, adapt_all(), at::kFloat);
  Batch batch = plain_batch(2, 12, 97);
  batch.targets.fill_(-1);
  const LossSums sums = model.forward_backward(batch, nullptr, {}, 1, 0);
  EXPECT_EQ(sums.tokens, 0);
  EXPECT_EQ(sums.loss({}), 0);
  for (const at::Tensor& gradient : gradients(model)) EXPECT_EQ(gradient.abs().max().item<float>(), 0);
}

TEST_F(BatchTest, frozen_weights_stay_in_the_mapped_file) {
  Json json = forms::llama_json(64, 4, 2);
  json["torch_dtype"] = "bfloat16";
  const std::filesystem::path folder = folder_ / "bf16";
  forms::SmallModel made = forms::make_model(json);
  for (auto& [name, tensor] : made.tensors) tensor = tensor.to(at::kBFloat16);
  make_folder(folder);
  made.write(folder);
  const checkpoint::Reader reader(folder);
  TrainableModel model(reader, adapt_all(), at::kBFloat16);
  std::int64_t adapter = 0;
  for (const Parameter& parameter : model.parameters()) {
    EXPECT_EQ(parameter.value.scalar_type(), at::kFloat);
    adapter += 8 * parameter.value.numel();
  }
  EXPECT_EQ(model.bytes() - adapter, static_cast<std::int64_t>(reader.total_bytes()));
  const std::string before = reader.fingerprint();
  const LossSums sums = model.forward_backward(plain_batch(2, 12, 97), nullptr, {}, 1, 0);
  EXPECT_GT(sums.cross_entropy, 0);
  EXPECT_EQ(checkpoint::Reader(folder).fingerprint(), before);
}

TEST_F(BatchTest, a_teacher_of_nan_is_blamed_itself) {
  const Batch batch = segmented_batch(97);
  TrainableModel model(reader_, adapt_all(), at::kFloat);
  TeacherView teacher = logits_teacher(scored(batch), 97);
  teacher.logits(0, scored(batch))[3][5] = std::numeric_limits<double>::quiet_NaN();
  EXPECT_THROW(model.forward_backward(batch, &teacher, {0.5, 1}, 1, 1), NumericalError);
}

TEST_F(BatchTest, bad_batches_and_options_are_named) {
  TrainableModel model(reader_, adapt_all(), at::kFloat);
  Batch batch = plain_batch(2, 12, 97);
  Batch wrong = batch;
  wrong.targets = batch.targets.slice(1, 1);
  EXPECT_THROW(model.evaluate(wrong, nullptr, {}), InputError);
  wrong = batch;
  wrong.targets = at::full({2, 12}, 97, at::kLong);
  EXPECT_THROW(model.evaluate(wrong, nullptr, {}), InputError);
  wrong = batch;
  wrong.ids = at::full({2, 12}, 97, at::kLong);
  EXPECT_THROW(model.evaluate(wrong, nullptr, {}), InputError);
  wrong = batch;
  wrong.numbers = at::zeros({3}, at::kLong);
  EXPECT_THROW(model.evaluate(wrong, nullptr, {}), InputError);
  EXPECT_THROW(model.evaluate(batch, nullptr, {0.5, 1}), InternalError);
  const TeacherView small = logits_teacher(scored(batch), 96);
  EXPECT_THROW(model.evaluate(batch, &small, {0.5, 1}), InputError);
  const TeacherView short_view = top_teacher(scored(batch) - 1, 97, 4);
  EXPECT_THROW(model.evaluate(batch, &short_view, {0.5, 1}), InputError);
  TeacherView top = top_teacher(scored(batch), 97, 4);
  EXPECT_THROW(model.evaluate(batch, &top, {0.5, 2}), UsageError);
  top.top_tokens[0][0] = 97;
  EXPECT_THROW(model.evaluate(batch, &top, {0.5, 1}), InputError);
  EXPECT_THROW(TrainableModel(reader_, adapt_all(), at::kHalf), UsageError);
  EXPECT_THROW(TrainableModel(reader_, adapt_all(0), at::kFloat), UsageError);
  EXPECT_THROW(TrainableModel(reader_, adapt_all(2, 1.0), at::kFloat), UsageError);
  TrainableModel teacher(reader_, frozen(), at::kFloat);
  EXPECT_TRUE(teacher.parameters().empty());
  EXPECT_THROW(teacher.forward_backward(batch, nullptr, {}, 1, 0), InternalError);
}

// -----------------------------------------------------------------------------------------------------------------------------
// Loss

TEST(LossTest, of_equal_logits_the_first_is_the_choice) {
  const at::Tensor targets = at::arange(4, at::kLong);
  for (const model::Engine engine : {model::Engine::native, model::Engine::tensors}) {
    model::set_compute({engine, at::kCPU});
    EXPECT_EQ(loss_of_rows(at::zeros({4, 53}), targets, {}, {}, 1, false).agreements, 1);
    // Row i has its largest logits at 1, 2 and 3.
    at::Tensor three = at::zeros({4, 53});
    three.slice(1, 1, 4).fill_(2);
    EXPECT_EQ(loss_of_rows(three, targets, {}, {}, 1, false).agreements, 1);
  }
  model::set_compute({});
}

TEST(LossTest, is_cross_entropy_and_divergence_at_a_temperature) {
  at::manual_seed(4);
  const at::Tensor z = at::randn({7, 53}, at::kDouble) * 3;
  const at::Tensor t = at::randn({7, 53}, at::kDouble) * 3;
  const at::Tensor targets = at::randint(53, {7}, at::kLong);
  targets[3] = z[3].argmax();
  for (const at::ScalarType type : {at::kDouble, at::kFloat}) {
    const double bound = type == at::kDouble ? 1e-12 : 1e-5;
    const LossOptions options{0.3, 2.5};
    TeacherRows teacher;
    teacher.logits = t.to(type);
    const at::Tensor logits = z.to(type, false, /*copy=*/true);
    const LossSums sums = loss_of_rows(logits, targets, teacher, options, 2, true);
    const at::Tensor log_s = at::log_softmax(z, -1);
    const double entropy = -log_s.gather(1, targets.unsqueeze(1)).sum().item<double>();
    const at::Tensor soft_s = at::log_softmax(z / 2.5, -1), soft_p = at::log_softmax(t / 2.5, -1);
    const double divergence = (soft_p.exp() * (soft_p - soft_s)).sum().item<double>();
    EXPECT_NEAR(sums.cross_entropy, entropy, bound * entropy);
    EXPECT_NEAR(sums.divergence, divergence, bound * divergence);
    EXPECT_NEAR(sums.loss(options), (0.7 * entropy + 0.3 * 2.5 * 2.5 * divergence) / 7, bound * 10);
    EXPECT_EQ(sums.agreements, z.argmax(1).eq(targets).sum().item<std::int64_t>());
    EXPECT_EQ(sums.tokens, 7);
    at::Tensor one_hot = at::zeros_like(z).scatter(1, targets.unsqueeze(1), 1.0);
    const at::Tensor expected = 2 * (0.7 * (log_s.exp() - one_hot) + 0.3 * 2.5 * (soft_s.exp() - soft_p.exp()));
    EXPECT_LE((logits.to(at::kDouble) - expected).abs().max().item<double>(), bound * 10);
  }
}

TEST(LossTest, what_a_teacher_did_not_list_is_one_further_class) {
  at::manual_seed(5);
  const at::Tensor z = at::randn({6, 40}, at::kDouble) * 3;
  const at::Tensor targets = at::randint(40, {6}, at::kLong);
  const at::Tensor log_p = at::log_softmax(at::randn({6, 40}, at::kDouble) * 2, -1);
  const at::Tensor s = at::softmax(z, -1);
  for (const std::int64_t k : {1, 7, 40}) {
    TeacherRows teacher;
    std::tie(teacher.top_log_probs, teacher.top_tokens) = at::topk(log_p, k, -1);
    const LossSums sums = loss_of_rows(z.clone(), targets, teacher, {1, 1}, 1, false);
    const at::Tensor p = teacher.top_log_probs.exp();
    const at::Tensor q = s.gather(1, teacher.top_tokens);
    double expected = (p * (teacher.top_log_probs - q.log())).sum().item<double>();
    if (k < 40) {
      const at::Tensor rest_p = 1 - p.sum(1), rest_q = 1 - q.sum(1);
      expected += (rest_p * (rest_p.log() - rest_q.log())).sum().item<double>();
    }
    EXPECT_NEAR(sums.divergence, expected, 1e-10) << k;
  }
  // All tokens listed: the same as the teacher's logits.
  TeacherRows all, logits;
  std::tie(all.top_log_probs, all.top_tokens) = at::topk(log_p, 40, -1);
  logits.logits = log_p;
  const at::Tensor a = z.clone(), b = z.clone();
  const double first = loss_of_rows(a, targets, all, {0.5, 1}, 1, true).divergence;
  EXPECT_NEAR(first, loss_of_rows(b, targets, logits, {0.5, 1}, 1, true).divergence, 1e-10);
  EXPECT_LE((a - b).abs().max().item<double>(), 1e-12);
}

TEST(LossTest, a_teacher_of_itself_has_nothing_to_teach) {
  const ScratchFolder folder;
  const checkpoint::Reader reader = write_model(folder / "model", forms::llama_json(64, 4, 2));
  TrainableModel model(reader, adapt_all(), at::kFloat);
  const TrainableModel teacher(reader, frozen(), at::kFloat);
  const Batch batch = plain_batch(2, 20, 97);
  const at::Tensor hidden = teacher.hidden(batch);
  EXPECT_EQ(hidden.size(0), scored(batch));
  TeacherView view;
  view.logits = [&](std::int64_t begin, std::int64_t end) { return teacher.logits(hidden.slice(0, begin, end)); };
  const LossSums sums = model.forward_backward(batch, &view, {1, 2}, 1, 0);
  EXPECT_NEAR(sums.divergence, 0, 1e-4);
  for (const at::Tensor& gradient : gradients(model)) EXPECT_LE(gradient.abs().max().item<float>(), 1e-4);
}

TEST(DropoutTest, keeps_the_stated_share_and_the_mean) {
  const std::vector<std::int64_t> numbers = {0, 1, 2, 3};
  const at::Tensor ones = at::ones({4 * 250, 103}, at::kFloat);
  const DropoutMask mask{0.3, 77, 250, &numbers};
  const at::Tensor dropped = drop(ones, mask);
  const double share = dropped.eq(0).to(at::kDouble).mean().item<double>();
  EXPECT_NEAR(share, 0.3, 0.01);  // 103,000 draws: 0.0014 is one deviation
  EXPECT_NEAR(dropped.mean().item<double>(), 1, 0.01);
  EXPECT_TRUE(at::equal(dropped, drop(ones, mask)));
  EXPECT_FALSE(at::equal(dropped.slice(0, 0, 250), dropped.slice(0, 250, 500)));
  EXPECT_FALSE(at::equal(dropped, drop(ones, {0.3, 78, 250, &numbers})));
  const at::Tensor sum = at::ones_like(ones);
  add_dropped(sum, ones.clone(), mask);
  EXPECT_TRUE(at::equal(sum, dropped + 1));
}

// -----------------------------------------------------------------------------------------------------------------------------
// Memory

/// Counts what ATen allocates on this process, on top of its own allocator.
/// libtorch 2.x has an allocate() that is not const, and copy_data().
class CountingAllocator final : public at::Allocator {
 public:
  explicit CountingAllocator(at::Allocator* base) : base_(base) {}
  at::DataPtr allocate(std::size_t bytes) { return std::as_const(*this).allocate(bytes); }               // NOLINT
  void copy_data(void* to, const void* from, std::size_t bytes) const { std::memcpy(to, from, bytes); }  // NOLINT
  at::DataPtr allocate(std::size_t bytes) const {  // NOLINT(modernize-use-override)
    auto* held = new Held{base_->allocate(bytes), bytes};
    now_ += static_cast<std::int64_t>(bytes);
    peak_ = std::max(peak_, now_);
    return {held->data.get(), held, &release, held->data.device()};
  }
  static void reset() { peak_ = now_; }
  static std::int64_t now() { return now_; }
  static std::int64_t peak() { return peak_; }

 private:
  struct Held {
    at::DataPtr data;
    std::size_t bytes;
  };
  static void release(void* held) {
    now_ -= static_cast<std::int64_t>(static_cast<Held*>(held)->bytes);
    delete static_cast<Held*>(held);
  }
  at::Allocator* base_;
  static inline std::int64_t now_ = 0, peak_ = 0;
};

TEST(MemoryTest, estimates_are_what_tensors_take) {
  const ScratchFolder folder;
  at::Allocator* const usual = c10::GetCPUAllocator();
  CountingAllocator counting(usual);
  using checkpoint::KvLayout;
  // Narrow between gate and down, with few tokens to choose from: then attention's backward pass is the most.
  Json narrow = forms::llama_json(128, 8, 8, 4);
  narrow["intermediate_size"] = 32;
  const std::vector<checkpoint::LayerShape> latents(4, {2, 48, 40});
  for (const Json& json :
       {forms::llama_json(128, 4, 2, 4, 601), forms::bloom_json(128, 4, 4, 601), narrow,
        forms::folded(narrow, 2, KvLayout::projected), forms::folded(narrow, latents, KvLayout::latent),
        forms::folded(forms::bloom_json(128, 8, 4), 2, KvLayout::gqa),
        forms::folded(forms::bloom_json(128, 8, 4), latents, KvLayout::latent)}) {
    const checkpoint::Reader reader = write_model(folder / "model", json);
    for (const LoraOptions& options : {adapt_all(8, 0.05), LoraOptions{}, train_all()}) {
      for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
        for (const bool checkpointing : {true, false}) {
          SCOPED_TRACE(fmt::format("{} {} {} full {} targets {} checkpointing {}",
                                   checkpoint::name_of(reader.config().family),
                                   checkpoint::name_of(reader.config().layout), c10::toString(dtype), options.full,
                                   options.targets.size(), checkpointing));
          const std::int64_t batch = 4, tokens = 96;
          const MemoryEstimate estimate =
              memory_of(reader.config(), options, dtype, batch, tokens, checkpointing, 1, false, nullptr);
          TrainableModel model(reader, options, dtype);
          EXPECT_EQ(model.bytes(), estimate.weights + estimate.adapter + estimate.gradients);
          EXPECT_EQ(estimate.optimizer, 2 * estimate.gradients);
          model.set_activation_checkpointing(checkpointing);
          const Batch made = plain_batch(batch, tokens, reader.config().vocab);
          c10::SetCPUAllocator(&counting, 100);
          CountingAllocator::reset();
          const std::int64_t before = CountingAllocator::now();
          model.forward_backward(made, nullptr, {}, 1, 0);
          c10::SetCPUAllocator(usual, 100);
          const auto measured = static_cast<double>(CountingAllocator::peak() - before);
          EXPECT_EQ(CountingAllocator::now(), before);
          const auto expected = static_cast<double>(estimate.activations + estimate.logits);
          EXPECT_NEAR(expected / measured, 1, 0.06) << expected << " estimated, " << measured << " measured";
        }
      }
    }
  }
  // A shard of the optimiser, a teacher.
  const checkpoint::Reader reader = write_model(folder / "model", forms::llama_json(128, 4, 2, 4, 601));
  const MemoryEstimate alone = memory_of(reader.config(), adapt_all(), at::kFloat, 2, 32, true, 1, false, nullptr);
  const MemoryEstimate taught =
      memory_of(reader.config(), adapt_all(), at::kFloat, 2, 32, true, 4, true, &reader.config());
  EXPECT_EQ(taught.optimizer * 4, alone.optimizer);
  EXPECT_EQ(taught.teacher, alone.weights + 2 * 32 * 128 * 4);
  EXPECT_GT(taught.total(), alone.total());
}

}  // namespace
}  // namespace headfold::finetune
