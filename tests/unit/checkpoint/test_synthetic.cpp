#include <ATen/Parallel.h>
#include <headfold/checkpoint/reader.h>
#include <headfold/checkpoint/synthetic.h>

#include "files.h"
#include "world.h"

namespace headfold::checkpoint {
namespace {

using testing_support::bloom_json;
using testing_support::digest;
using testing_support::llama_json;
using testing_support::ScratchFolder;
using testing_support::world;

TEST(SyntheticTest, same_bytes_at_any_number_of_ranks_and_threads) {
  const ScratchFolder folder;
  const int threads = at::get_num_threads();
  // Large enough for several chunks of the embedding.
  const ModelConfig config =
      change_shape(llama_json(), {.layers = 3, .kv_heads = 4, .vocab = 600000, .dtype = "bfloat16"}, "test");
  write_synthetic(world(), folder / "all", config, 17, 10000000, OrderedJson{{"seed", 17}}, {});
  at::set_num_threads(2);
  if (world().root())
    write_synthetic(comm::Communicator::self(), folder / "one", config, 17, 10000000, OrderedJson{{"seed", 17}}, {});
  at::set_num_threads(threads);
  world().barrier("written");
  EXPECT_EQ(digest(folder / "all"), digest(folder / "one"));
  const Reader reader(folder / "all");
  EXPECT_GT(reader.files().size(), 1U);
  EXPECT_EQ(reader.config().kv_heads, 4);
  EXPECT_EQ(reader.config().layers, 3);
  EXPECT_EQ(layout_problems(reader), std::vector<std::string>{});
  // The generator is part of the format of a measurement: these bytes must not change between versions.
  const TensorShape tensor{"model.layers.0.mlp.up_proj.weight", {24, 16}};
  EXPECT_TRUE(at::equal(reader.view(tensor.name).flatten(), synthetic_elements(tensor, 17, 0, 384, at::kBFloat16)));
  EXPECT_TRUE(at::equal(synthetic_elements(tensor, 17, 100, 200, at::kFloat),
                        synthetic_elements(tensor, 17, 0, 384, at::kFloat).slice(0, 100, 200)));
}

TEST(SyntheticTest, weights_have_the_stated_distribution) {
  const TensorShape linear{"model.layers.0.self_attn.q_proj.weight", {1000, 400}};
  const at::Tensor x =
      synthetic_elements(linear, 3, 0, linear.elements(), at::kFloat).to(at::kDouble) * 20.0;  // standard deviation 1
  const double n = 400000;
  EXPECT_NEAR(x.mean().item<double>(), 0, 5 / std::sqrt(n));
  EXPECT_NEAR(x.pow(2).mean().item<double>(), 1, 5 * std::sqrt(1.7 / n));
  EXPECT_NEAR(x.pow(4).mean().item<double>(), 2.7, 0.05);  // four uniforms: kurtosis 3 - 1.2 / 4
  EXPECT_LT(x.abs().max().item<double>(), 3.4642);
  // Neighbours and other streams are not correlated.
  const auto correlation = [&](const at::Tensor& a, const at::Tensor& b) { return (a * b).mean().item<double>(); };
  EXPECT_NEAR(correlation(x.slice(0, 1, 400000), x.slice(0, 0, 399999)), 0, 5 / std::sqrt(n));
  const TensorShape other{"model.layers.1.self_attn.q_proj.weight", {1000, 400}};
  EXPECT_NEAR(correlation(x, synthetic_elements(other, 3, 0, linear.elements(), at::kFloat).to(at::kDouble) * 20.0), 0,
              5 / std::sqrt(n));
  EXPECT_NEAR(correlation(x, synthetic_elements(linear, 4, 0, linear.elements(), at::kFloat).to(at::kDouble) * 20.0), 0,
              5 / std::sqrt(n));
  EXPECT_TRUE(at::equal(synthetic_elements({"model.norm.weight", {5}}, 3, 0, 5, at::kFloat), at::ones({5})));
  EXPECT_TRUE(at::equal(synthetic_elements({"transformer.ln_f.bias", {5}}, 3, 0, 5, at::kFloat), at::zeros({5})));
}

TEST(SyntheticTest, known_shapes_have_their_published_sizes) {
  EXPECT_EQ(parameter_count(parse_config(shape_config("llama2-7b"), "shape")), 6738415616);
  EXPECT_EQ(parameter_count(parse_config(shape_config("llama2-13b"), "shape")), 13015864320);
  EXPECT_EQ(parameter_count(parse_config(shape_config("llama2-70b"), "shape")), 68976648192);
  EXPECT_EQ(parameter_count(parse_config(shape_config("bloomz-7b1"), "shape")), 7069016064);
  EXPECT_THROW(shape_config("gpt5"), UsageError);
}

TEST(SyntheticTest, shapes_change_consistently) {
  const ModelConfig bloom = change_shape(bloom_json(), {.layers = 1, .kv_heads = 2, .vocab = 0, .dtype = ""}, "test");
  EXPECT_TRUE(bloom.split_qkv);
  EXPECT_EQ(bloom.kv_heads, 2);
  EXPECT_EQ(bloom.layers, 1);
  Json modern = llama_json();
  modern.erase("torch_dtype");
  modern["dtype"] = "float32";
  EXPECT_EQ(change_shape(modern, {.layers = 0, .kv_heads = 0, .vocab = 99, .dtype = "bfloat16"}, "test").dtype,
            "bfloat16");
  EXPECT_THROW(change_shape(llama_json(), {.layers = 0, .kv_heads = 3, .vocab = 0, .dtype = ""}, "test"), InputError);
  EXPECT_THROW(change_shape(llama_json(), {.layers = -1, .kv_heads = 0, .vocab = 0, .dtype = ""}, "test"), InputError);
}

}  // namespace
}  // namespace headfold::checkpoint
