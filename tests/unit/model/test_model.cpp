#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <headfold/base/error.h>
#include <headfold/base/files.h>

#include <thread>

#include "product.h"
#include "small_models.h"
#include "world.h"

namespace headfold::model {
namespace {

using testing_models::all_forms;
using testing_models::bloom_json;
using testing_models::llama_json;
using testing_models::make_model;
using testing_models::ReferenceDecoder;
using testing_models::relative_difference;
using testing_models::SmallModel;

/// Every form, by the native engine and by the one in libtorch's operations.
using FormAndEngine = std::tuple<std::size_t, Engine>;

class Forms : public testing::TestWithParam<FormAndEngine> {
 protected:
  std::size_t form_ = std::get<0>(GetParam());
  Engine engine_ = std::get<1>(GetParam());
  SmallModel model_ = make_model(all_forms()[form_].second, 11 + form_);
  testing_support::ScratchFolder scratch_;
  void SetUp() override {
    model_.write(scratch_.path());
    set_compute({engine_, at::kCPU});
  }
  void TearDown() override { set_compute({}); }
};

TEST_P(Forms, logits_agree_with_the_plain_decoder) {
  const checkpoint::Reader reader(scratch_.path());
  const at::Tensor ids = at::randint(model_.config.vocab, {2, 23}, at::kLong);
  const ReferenceDecoder reference(model_);
  const at::Tensor expected = at::stack({reference.logits(ids[0]), reference.logits(ids[1])});
  const bool before = uses_onednn();
  for (const bool onednn : {true, false}) {
    use_onednn(onednn);
    EXPECT_LE(relative_difference(Decoder(reader, at::kFloat).logits(ids), expected), 2e-5);
    // Rounding errors of bfloat16 add up over two layers and the head; libtorch's own products round more often on
    // processors without AVX-512.
    EXPECT_LE(relative_difference(Decoder(reader, at::kBFloat16).logits(ids), expected),
              engine_ == Engine::native ? 6e-2 : 1e-1);
  }
  use_onednn(before);
}

TEST_P(Forms, cache_agrees_with_one_forward) {
  const checkpoint::Reader reader(scratch_.path());
  const Decoder decoder(reader, at::kFloat);
  const at::Tensor ids = at::randint(model_.config.vocab, {3, 40}, at::kLong);
  const at::Tensor expected = decoder.logits(ids);
  auto caches = decoder.make_cache(3, 40);
  std::int64_t done = 0;
  for (const std::int64_t chunk : {7, 3, 1, 1, 20, 1, 1, 6}) {
    const at::Tensor last = decoder.step(ids.slice(1, done, done + chunk), caches);
    done += chunk;
    EXPECT_EQ(last.sizes(), at::IntArrayRef({3, model_.config.vocab}));
    EXPECT_LE(relative_difference(last, expected.select(1, done - 1)), 1e-5) << "after " << done;
  }
  EXPECT_EQ(caches.front().length, 40);
  EXPECT_THROW(decoder.step(ids.slice(1, 0, 1), caches), InputError);
}

TEST_P(Forms, packed_sequences_agree_with_each_alone) {
  const checkpoint::Reader reader(scratch_.path());
  const Decoder decoder(reader, at::kFloat);
  const Embedding embedding(reader, at::kFloat);
  const Head head(reader, at::kFloat);
  const auto draw = [&](std::int64_t tokens) { return at::randint(model_.config.vocab, {tokens}, at::kLong); };
  const auto run = [&](const std::vector<at::Tensor>& ids, const std::vector<Segment>& segments,
                       std::vector<LayerCache>* caches) {
    at::Tensor hidden = embedding.forward(at::cat(ids).unsqueeze(0)).squeeze(0);
    for (std::size_t l = 0; l < decoder.layers().size(); ++l)
      hidden = decoder.layers()[l]->forward_packed(hidden, segments, caches != nullptr ? &(*caches)[l] : nullptr);
    return head.logits(hidden);
  };
  const auto alone = [&](const std::vector<at::Tensor>& ids) { return decoder.logits(at::cat(ids).unsqueeze(0))[0]; };

  // A tree in one slot: a prefix, a question on it with three endings, a second question, and a stranger.
  const at::Tensor prefix = draw(21), question = draw(12), other = draw(9), stranger = draw(30);
  const std::vector<at::Tensor> endings = {draw(1), draw(10), draw(3)};
  const at::Tensor tree = run({prefix, question, endings[0], endings[1], endings[2], other, stranger},
                              {{0, 21}, {21, 12}, {33, 1}, {33, 10}, {33, 3}, {21, 9}, {0, 30}}, nullptr);
  std::int64_t row = 33;
  for (const at::Tensor& ending : endings) {
    const at::Tensor expected = alone({prefix, question, ending});
    EXPECT_LE(relative_difference(tree.slice(0, 0, 33), expected.slice(0, 0, 33)), 1e-5);
    EXPECT_LE(relative_difference(tree.slice(0, row, row + ending.numel()), expected.slice(0, 33)), 1e-5);
    row += ending.numel();
  }
  EXPECT_LE(relative_difference(tree.slice(0, row, row + 9), alone({prefix, other}).slice(0, 21)), 1e-5);
  EXPECT_LE(relative_difference(tree.slice(0, row + 9), alone({stranger})), 1e-5);

  // Slots that live on: two texts of different length, and a third that copies the beginning of the second.
  auto caches = decoder.make_cache(3, 40);
  run({prefix, other}, {{0, 21, 2}, {0, 9, 0}}, &caches);
  const at::Tensor later = run({endings[1], endings[0], endings[2]}, {{21, 10, 2}, {9, 1, 0}, {25, 3, 1, 2}}, &caches);
  EXPECT_LE(relative_difference(later.slice(0, 0, 10), alone({prefix, endings[1]}).slice(0, 21)), 1e-5);
  EXPECT_LE(relative_difference(later.slice(0, 10, 11), alone({other, endings[0]}).slice(0, 9)), 1e-5);
  EXPECT_LE(
      relative_difference(later.slice(0, 11), alone({prefix, endings[1].slice(0, 0, 4), endings[2]}).slice(0, 25)),
      1e-5);

  const at::Tensor few = draw(3);
  EXPECT_THROW(run({few}, {{0, 2}}, nullptr), InternalError);
  EXPECT_THROW(run({few}, {{38, 3}}, &caches), InputError);
  EXPECT_THROW(run({few}, {{0, 3, 3}}, &caches), InternalError);
}

class Recorder : public LayerObserver {
 public:
  explicit Recorder(bool keys) : keys_(keys) {}
  void attention_input(const at::Tensor& x) override { inputs.push_back(x); }
  void rotated_keys(const at::Tensor& keys) override { rotated.push_back(keys); }
  bool wants_rotated_keys() const override { return keys_; }
  std::vector<at::Tensor> inputs, rotated;

 private:
  bool keys_;
};

TEST_P(Forms, observer_sees_inputs_and_rotated_keys_without_changing_the_output) {
  const auto layer = load_layer(model_.config, 1, at::kFloat, model_.getter());
  const at::Tensor hidden = at::randn({2, 19, model_.config.hidden}, at::kFloat);
  const at::Tensor plain = layer->forward(hidden);
  Recorder both(true), inputs_only(false);
  EXPECT_TRUE(at::equal(layer->forward(hidden, nullptr, &both), plain));
  layer->forward(hidden * 2, nullptr, &inputs_only);  // must not disturb what the first observer kept
  ASSERT_EQ(both.inputs.size(), 1U);
  ASSERT_EQ(both.rotated.size(), 1U);
  EXPECT_TRUE(inputs_only.rotated.empty());
  EXPECT_EQ(both.inputs[0].sizes(), hidden.sizes());
  const ReferenceDecoder reference(model_);
  for (std::int64_t b = 0; b < 2; ++b) {
    at::Tensor rotated;
    const at::Tensor expected = reference.layer(hidden[b].to(at::kDouble), 1, &rotated);
    EXPECT_LE(relative_difference(plain[b], expected), 2e-5);
    EXPECT_LE(relative_difference(both.rotated[0][b], rotated), 1e-5);
  }
}

TEST_P(Forms, result_depends_neither_on_threads_nor_on_the_batch) {
  const auto layer = load_layer(model_.config, 0, at::kFloat, model_.getter());
  const at::Tensor hidden = at::randn({3, 37, model_.config.hidden}, at::kFloat);
  const int before = at::get_num_threads();
  at::set_num_threads(1);
  const at::Tensor one = layer->forward(hidden);
  at::set_num_threads(2);
  const at::Tensor two = layer->forward(hidden);
  if (engine_ == Engine::native) {
    EXPECT_TRUE(at::equal(two, one));
  } else {
    EXPECT_LE(relative_difference(two, one), 3e-6);  // libtorch's sums are its own affair
  }
  at::set_num_threads(before);
  for (std::int64_t b = 0; b < 3; ++b)
    EXPECT_LE(relative_difference(layer->forward(hidden.slice(0, b, b + 1)), one.slice(0, b, b + 1)), 3e-6);
}

INSTANTIATE_TEST_SUITE_P(All, Forms,
                         testing::Combine(testing::Range(std::size_t{0}, all_forms().size()),
                                          testing::Values(Engine::native, Engine::tensors)),
                         [](const auto& instance) {
                           return all_forms()[std::get<0>(instance.param)].first +
                                  (std::get<1>(instance.param) == Engine::native ? "" : "_tensors");
                         });

class AttentionRecorder : public LayerObserver {
 public:
  void attention_input(const at::Tensor&) override {}
  void rotated_keys(const at::Tensor&) override {}
  bool wants_rotated_keys() const override { return false; }
  void attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) override {
    queries = q, keys = k, values = v;
  }
  bool wants_attention() const override { return true; }
  void attended(const at::Tensor& y) override { outputs = y; }
  bool wants_attended() const override { return true; }
  at::Tensor queries, keys, values, outputs;
};

/// softmax(q k^T / sqrt(head_dim)) v of what the observer was shown is what it was shown as output.
TEST_P(Forms, observed_attention_explains_the_observed_output) {
  for (std::int64_t index = 0; index < 2; ++index) {
    const auto layer = load_layer(model_.config, index, at::kFloat, model_.getter());
    const at::Tensor hidden = at::randn({2, 17, model_.config.hidden}, at::kFloat);
    AttentionRecorder seen;
    layer->forward(hidden, nullptr, &seen);
    const std::int64_t heads = model_.config.heads;
    ASSERT_EQ(seen.queries.size(2), heads);
    ASSERT_EQ(seen.queries.size(3), seen.keys.size(3));
    const auto of_head = [&](const at::Tensor& all, std::int64_t head) {
      return all.select(2, head / (heads / all.size(2))).to(at::kDouble);
    };
    const at::Tensor slopes = alibi_slopes(heads);
    const bool llama = model_.config.family == checkpoint::Family::llama;
    const std::string value_up = (llama ? "model.layers." : "transformer.h.") + std::to_string(index) +
                                 (llama ? ".self_attn" : ".self_attention") + ".value_up.weight";
    std::vector<at::Tensor> outputs;
    for (std::int64_t head = 0; head < heads; ++head) {
      at::Tensor scores = at::matmul(of_head(seen.queries, head), of_head(seen.keys, head).transpose(1, 2)) /
                          std::sqrt(static_cast<double>(model_.config.head_dim));
      if (!llama) scores = scores + slopes[head].item<double>() * at::arange(17, at::kDouble);
      scores = scores.masked_fill(at::ones({17, 17}, at::kBool).triu(1), -1e300);
      at::Tensor output = at::matmul(at::softmax(scores, -1), of_head(seen.values, head));
      if (model_.tensors.contains(value_up))
        output = at::matmul(
            output, model_.tensors.at(value_up)[head / (heads / model_.config.source_kv_heads)].to(at::kDouble).t());
      outputs.push_back(output);
    }
    EXPECT_LE(relative_difference(seen.outputs, at::cat(outputs, 2)), 1e-5) << "layer " << index;
  }
}

TEST_P(Forms, output_does_not_depend_on_the_block_size) {
  const auto layer = load_layer(model_.config, 1, at::kFloat, model_.getter());
  const at::Tensor hidden = at::randn({2, 70, model_.config.hidden}, at::kFloat);
  const std::int64_t before = attention_block_bytes();
  const at::Tensor expected = layer->forward(hidden);
  for (const std::int64_t bytes : {1, 20000, 60000}) {
    set_attention_block_bytes(bytes);
    EXPECT_LE(relative_difference(layer->forward(hidden), expected), 1e-6) << bytes;
  }
  set_attention_block_bytes(before);
}

TEST(AttentionTest, output_does_not_depend_on_the_block_size) {
  const SmallModel model = make_model(llama_json(64, 4, 2));
  const auto layer = load_layer(model.config, 0, at::kFloat, model.getter());
  const at::Tensor hidden = at::randn({2, 300, 64}, at::kFloat);
  const std::int64_t before = attention_block_bytes();
  EXPECT_EQ(before, std::int64_t{256} << 20);
  const at::Tensor expected = layer->forward(hidden);
  for (const std::int64_t bytes : {1, 5000, 40000, 300000}) {
    set_attention_block_bytes(bytes);
    EXPECT_LE(relative_difference(layer->forward(hidden), expected), 1e-6) << bytes;
  }
  set_attention_block_bytes(before);
  EXPECT_THROW(set_attention_block_bytes(0), UsageError);
}

TEST(AttentionTest, long_sequences_run_in_bounded_memory) {
  // 32 heads x 4096 x 4096 float32 scores would be 2 GiB.
  const SmallModel model = make_model(llama_json(256, 32, 32, 1));
  const auto layer = load_layer(model.config, 0, at::kFloat, model.getter());
  const at::Tensor hidden = at::randn({1, 4096, 256}, at::kFloat);
  const std::int64_t before = attention_block_bytes();
  set_attention_block_bytes(std::int64_t{4} << 20);
  layer->forward(hidden.slice(1, 0, 64));
  const auto start = static_cast<double>(peak_resident_bytes());
  const at::Tensor out = layer->forward(hidden);
  const double grown = static_cast<double>(peak_resident_bytes()) - start;
  set_attention_block_bytes(before);
  EXPECT_TRUE(at::isfinite(out).all().item<bool>());
  // Activations: about ten buffers of 4096 x 256 floats (4 MiB each), MLP blocks and scores.
  EXPECT_LE(grown, 100.0 * (1 << 20));
}

TEST(AttentionTest, rebuilt_keys_stay_within_the_limit) {
  // 32 heads x 4096 positions x 64 channels would be 32 MiB of keys; 8 MiB are allowed, the scores' blocks besides.
  Json json = llama_json(256, 32, 32, 1);
  json["head_dim"] = 64;
  const SmallModel model = make_model(testing_models::folded(json, {{1, 100, 20}}, checkpoint::KvLayout::latent));
  const auto layer = load_layer(model.config, 0, at::kFloat, model.getter());
  LayerCache cache{at::randn({1, 4096, 1, 100}, at::kFloat), at::randn({1, 4096, 1, 20}, at::kFloat), 4095};
  const at::Tensor hidden = at::randn({1, 1, 256}, at::kFloat);
  const std::int64_t before = attention_block_bytes();
  set_attention_block_bytes(std::int64_t{8} << 20);
  at::Tensor out;
  double grown = 0;
  // Scratch memory belongs to threads: a new one has none yet.
  std::thread([&] {
    const at::NoGradGuard no_grad;
    const auto start = static_cast<double>(resident_anonymous_bytes());
    out = layer->forward(hidden, &cache);
    grown = static_cast<double>(resident_anonymous_bytes()) - start;
  }).join();
  set_attention_block_bytes(before);
  EXPECT_TRUE(at::isfinite(out).all().item<bool>());
  EXPECT_GE(grown, 2.0 * (1 << 20)) << "the measurement sees nothing";
  EXPECT_LE(grown, 16.0 * (1 << 20));
}

TEST(PositionsTest, alibi_slopes_are_the_documented_ones) {
  const at::Tensor s32 = alibi_slopes(32);
  ASSERT_EQ(s32.numel(), 32);
  EXPECT_NEAR(s32[0].item<double>(), 0.840896, 1e-6);
  EXPECT_NEAR(s32[1].item<double>(), 0.707107, 1e-6);
  EXPECT_NEAR(s32[31].item<double>(), 0.00390625, 1e-8);
  const std::vector<double> expected = {0.5,        0.25,       0.125,      0.0625,     0.03125,
                                        0.015625,   0.0078125,  0.00390625, 0.70710678, 0.35355339,
                                        0.17677670, 0.08838835, 0.04419417, 0.02209709};
  const at::Tensor s14 = alibi_slopes(14);
  ASSERT_EQ(s14.numel(), 14);
  for (std::int64_t i = 0; i < 14; ++i)
    EXPECT_NEAR(s14[i].item<double>(), expected[static_cast<std::size_t>(i)], 1e-7) << i;
  EXPECT_THROW(alibi_slopes(0), InputError);
}

TEST(PositionsTest, rope_frequencies_follow_each_scaling_rule) {
  Json json = llama_json(256, 2, 2);
  json["rope_theta"] = 500000.0;
  const auto plain = rope_inverse_frequencies(checkpoint::parse_config(json, "c"));
  ASSERT_EQ(plain.numel(), 64);
  for (std::int64_t i = 0; i < 64; ++i)
    EXPECT_NEAR(plain[i].item<double>() * std::pow(500000.0, static_cast<double>(i) / 64.0), 1.0, 1e-12);
  json["rope_scaling"] = {{"rope_type", "linear"}, {"factor", 8.0}};
  EXPECT_LE(relative_difference(rope_inverse_frequencies(checkpoint::parse_config(json, "c")) * 8, plain), 1e-14);

  json["rope_scaling"] = {{"rope_type", "llama3"},
                          {"factor", 8.0},
                          {"low_freq_factor", 1.0},
                          {"high_freq_factor", 4.0},
                          {"original_max_position_embeddings", 8192}};
  const auto scaled = rope_inverse_frequencies(checkpoint::parse_config(json, "c"));
  int unchanged = 0, divided = 0, between = 0;
  for (std::int64_t i = 0; i < 64; ++i) {
    const double f = plain[i].item<double>(), g = scaled[i].item<double>();
    const double turns = 8192.0 * f / (2 * std::acos(-1.0));  // over the original context
    if (turns > 4) {
      EXPECT_DOUBLE_EQ(g, f) << i;
      ++unchanged;
    } else if (turns < 1) {
      EXPECT_DOUBLE_EQ(g, f / 8) << i;
      ++divided;
    } else {
      const double s = (turns - 1) / 3;
      EXPECT_NEAR(g / f, (1 - s) / 8 + s, 1e-12) << i;
      ++between;
    }
  }
  EXPECT_GT(unchanged, 10);
  EXPECT_GT(divided, 10);
  EXPECT_GT(between, 2);
}

TEST(PositionsTest, rotation_keeps_norms_and_depends_on_relative_position_alone) {
  const at::Tensor frequencies = rope_inverse_frequencies(checkpoint::parse_config(llama_json(128, 4, 4), "c"));
  const at::Tensor q = at::randn({1, 1, 3, 32}, at::kFloat), k = at::randn({1, 1, 3, 32}, at::kFloat);
  const auto score = [&](std::int64_t m, std::int64_t n) {
    return (apply_rope(q, frequencies, m).to(at::kDouble) * apply_rope(k, frequencies, n).to(at::kDouble)).sum(-1);
  };
  EXPECT_LE(relative_difference(apply_rope(q, frequencies, 777).norm(2, -1), q.norm(2, -1)), 1e-6);
  EXPECT_TRUE(at::equal(apply_rope(q, frequencies, 0), q));
  EXPECT_LE((score(5, 2) - score(405, 402)).abs().max().item<double>(), 2e-4);
  EXPECT_GT((score(5, 2) - score(5, 3)).abs().max().item<double>(), 1e-2);
  // Pair (i, i + 16) turns by position * frequency: the first channel at position 1 by one radian.
  at::Tensor e = at::zeros({1, 2, 1, 32}, at::kFloat);
  e.select(3, 0).fill_(1);
  const at::Tensor turned = apply_rope(e, frequencies, 0);
  EXPECT_NEAR(turned[0][1][0][0].item<double>(), std::cos(1.0), 1e-6);
  EXPECT_NEAR(turned[0][1][0][16].item<double>(), std::sin(1.0), 1e-6);
  // Long tables grow without changing what was there.
  const at::Tensor x = at::randn({2, 5, 3, 32}, at::kFloat);
  const at::Tensor early = apply_rope(x, frequencies, 100);
  apply_rope(x, frequencies, 5000);
  EXPECT_TRUE(at::equal(apply_rope(x, frequencies, 100), early));
}

TEST(ErrorsTest, missing_and_misshapen_tensors_and_bad_ids_are_named) {
  testing_support::ScratchFolder scratch;
  SmallModel model = make_model(llama_json(64, 4, 2));
  const std::string name = "model.layers.1.self_attn.k_proj.weight";
  model.tensors[name] = at::zeros({32, 60}, at::kFloat);
  model.write(scratch.path());
  const auto message = [](const auto& work) -> std::string {
    try {
      work();
    } catch (const InputError& error) {
      return error.what();
    }
    return "no InputError";
  };
  {
    const checkpoint::Reader reader(scratch.path());
    const std::string text = message([&] { load_layer(reader, 1, at::kFloat); });
    for (const char* part : {"model.safetensors", "self_attn.k_proj.weight", "[32, 60]", "[32, 64]"})
      EXPECT_NE(text.find(part), std::string::npos) << text;
    EXPECT_NO_THROW(load_layer(reader, 0, at::kFloat));
    EXPECT_THROW(load_layer(reader, 0, at::kDouble), UsageError);
  }
  // Numbers that are no weights are not taken for any, whichever part of the model asks.
  for (const at::ScalarType type : {at::kShort, at::kBool, at::kLong}) {
    model.tensors[name] = at::ones({32, 64}).to(type);
    model.tensors["model.embed_tokens.weight"] = model.tensors["model.embed_tokens.weight"].to(type);
    model.tensors["lm_head.weight"] = model.tensors["lm_head.weight"].to(type);
    model.write(scratch.path());
    const checkpoint::Reader reader(scratch.path());
    for (const std::string& text :
         {message([&] { load_layer(reader, 1, at::kFloat); }), message([&] { Embedding(reader, at::kFloat); }),
          message([&] { Head(reader, at::kFloat); })}) {
      EXPECT_NE(text.find("expected F32, F16, BF16 or F64"), std::string::npos) << text;
      EXPECT_NE(text.find(".weight has dtype"), std::string::npos) << text;
    }
  }
  model = make_model(llama_json(64, 4, 2));
  model.tensors.erase(name);
  model.write(scratch.path());
  const checkpoint::Reader reader(scratch.path());
  const std::string text = message([&] { load_layer(reader, 1, at::kFloat); });
  EXPECT_NE(text.find(name), std::string::npos) << text;

  const Embedding embedding(reader, at::kFloat);
  EXPECT_NE(message([&] {
              embedding.forward(at::tensor({1, 2, 97, 3}, at::kLong).view({2, 2}));
            }).find("97 at [1, 0]"),
            std::string::npos);
  EXPECT_NE(message([&] { embedding.forward(at::full({1, 1}, -1, at::kLong)); }).find("-1"), std::string::npos);
  EXPECT_NE(message([&] { embedding.forward(at::zeros({1, 1}, at::kFloat)); }).find("int64"), std::string::npos);
  EXPECT_THROW(
      load_layer(model.config, 0, at::kFloat, [](const auto&, const auto&) { return at::zeros({2}, at::kFloat); }),
      InputError);
}

}  // namespace
}  // namespace headfold::model
