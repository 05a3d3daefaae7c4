#include <gtest/gtest.h>
#include <headfold/base/error.h>
#include <headfold/checkpoint/safetensors.h>
#include <headfold/finetune/lora.h>

#include "models.h"

namespace headfold::finetune {
namespace {

using namespace testing_support;
using headfold::testing_support::ScratchFolder;
using headfold::testing_support::world;

/// The adapter of a model as it stands.
Adapter adapter_of(TrainableModel& model, const LoraOptions& options) {
  Adapter adapter;
  adapter.options = options;
  adapter.options.targets = target_modules(options, model.config());
  adapter.base = "somewhere/model";
  for (const Parameter& parameter : model.parameters()) adapter.tensors[parameter.name] = parameter.value;
  return adapter;
}

std::string message_of(const std::function<void()>& work) {
  try {
    work();
  } catch (const Error& error) {
    return describe(error);
  }
  return "no error";
}

TEST(LoraTest, targets_mean_projections_of_each_family) {
  const auto config = [](const Json& json) { return checkpoint::parse_config(json, "memory/config.json"); };
  const auto llama = config(forms::llama_json(64, 4, 2));
  const auto bloom = config(forms::bloom_json(64, 4));
  const auto grouped = config(forms::folded(forms::bloom_json(64, 4), 2, checkpoint::KvLayout::gqa));
  using Names = std::vector<std::string>;
  LoraOptions options;
  EXPECT_EQ(target_modules(options, llama), (Names{"q_proj", "k_proj", "v_proj", "o_proj"}));
  EXPECT_EQ(target_modules(options, bloom), (Names{"query_key_value", "dense"}));
  EXPECT_EQ(target_modules(options, grouped), (Names{"query", "key", "value", "dense"}));
  options.targets = {"down", "v_proj", "q"};
  EXPECT_EQ(target_modules(options, llama), (Names{"q_proj", "v_proj", "down_proj"}));
  options.targets = {"query_key_value", "up"};
  EXPECT_EQ(target_modules(options, bloom), (Names{"query_key_value", "dense_h_to_4h"}));
  EXPECT_EQ(target_modules(options, grouped), (Names{"query", "key", "value", "dense_h_to_4h"}));
  options.targets = {"w1"};
  EXPECT_NE(message_of([&] { target_modules(options, llama); }).find("\"w1\""), std::string::npos);
  options.targets = {"query_key_value"};
  EXPECT_THROW(target_modules(options, llama), InputError);
  options.rank = 16, options.alpha = 32;
  EXPECT_EQ(options.scale(), 2);
  options.rslora = true;
  EXPECT_EQ(options.scale(), 8);
}

TEST(LoraTest, adapters_start_as_pefts_do) {
  const ScratchFolder folder;
  const checkpoint::Reader reader = write_model(folder / "model", forms::llama_json(64, 4, 2));
  LoraOptions options = adapt_all(16);
  TrainableModel model(reader, options, at::kFloat);
  ASSERT_EQ(model.parameters().size(), 2U * 7 * 2);
  for (const Parameter& parameter : model.parameters()) {
    if (parameter.name.ends_with(".lora_B.weight")) {
      EXPECT_EQ(parameter.value.abs().max().item<float>(), 0) << parameter.name;
      continue;
    }
    const auto bound = static_cast<float>(1 / std::sqrt(static_cast<double>(parameter.value.size(1))));
    EXPECT_LE(parameter.value.abs().max().item<float>(), bound);
    EXPECT_GT(parameter.value.abs().max().item<float>(), 0.95F * bound);
    EXPECT_NEAR(parameter.value.mean().item<float>(), 0, 0.1F * bound);
  }
  const Batch batch = plain_batch(2, 12, 97);
  const TrainableModel plain(reader, frozen(), at::kFloat);
  EXPECT_EQ(model.evaluate(batch, nullptr, {}).cross_entropy, plain.evaluate(batch, nullptr, {}).cross_entropy);
  TrainableModel again(reader, options, at::kFloat);
  options.seed = 1;
  TrainableModel other(reader, options, at::kFloat);
  EXPECT_TRUE(at::equal(model.parameters()[0].value, again.parameters()[0].value));
  EXPECT_FALSE(at::equal(model.parameters()[0].value, other.parameters()[0].value));
  EXPECT_FALSE(at::equal(model.parameters()[0].value, model.parameters()[2].value));
}

class AdapterTest : public testing::Test {
 protected:
  /// Folder with a good adapter, written by hand from the format's description: q_proj and v_proj, rank 2.
  std::filesystem::path write_by_hand(const std::string& name) {
    const std::filesystem::path path = folder_ / name;
    at::manual_seed(9);
    std::map<std::string, at::Tensor> tensors;
    for (const int layer : {0, 1})
      for (const auto& [module, out] : {std::pair("q_proj", 64), std::pair("v_proj", 32)}) {
        const std::string stem = fmt::format("base_model.model.model.layers.{}.self_attn.{}", layer, module);
        tensors[stem + ".lora_A.weight"] = at::randn({2, 64}, at::kFloat);
        tensors[stem + ".lora_B.weight"] = at::randn({out, 2}, at::kFloat);
      }
    tensors_ = tensors;
    config_ = {{"peft_type", "LORA"},
               {"r", 2},
               {"lora_alpha", 4},
               {"target_modules", {"v_proj", "q_proj"}},
               {"lora_dropout", 0.1},
               {"bias", "none"},
               {"fan_in_fan_out", false},
               {"task_type", "CAUSAL_LM"},
               {"modules_to_save", nullptr},
               {"rank_pattern", Json::object()},
               {"use_dora", false},
               {"base_model_name_or_path", "base"}};
    write(path);
    return path;
  }
  void write(const std::filesystem::path& path) const {
    world().on_root([&] {
      make_folder(path);
      write_json(path / "adapter_config.json", config_);
      checkpoint::write_safetensors(path / "adapter_model.safetensors", tensors_);
    });
    world().barrier("adapter written");
  }
  /// The message that reading the changed adapter gives.
  std::string refused(const std::function<void()>& change) {
    write_by_hand("changed");
    change();
    write(folder_ / "changed");
    const std::string message = message_of([&] { read_adapter(folder_ / "changed", reader_.config()); });
    world().barrier("read");  // before the folder is written anew
    return message;
  }

  const ScratchFolder folder_;
  const checkpoint::Reader reader_ = write_model(folder_ / "model", forms::llama_json(64, 4, 2));
  Json config_;
  std::map<std::string, at::Tensor> tensors_;
};

TEST_F(AdapterTest, a_folder_of_pefts_is_read) {
  const Adapter adapter = read_adapter(write_by_hand("hand"), reader_.config());
  EXPECT_EQ(adapter.options.rank, 2);
  EXPECT_EQ(adapter.options.alpha, 4);
  EXPECT_EQ(adapter.options.dropout, 0.1);
  EXPECT_EQ(adapter.options.scale(), 2);
  EXPECT_EQ(adapter.base, "base");
  EXPECT_EQ(adapter.options.targets, (std::vector<std::string>{"q_proj", "v_proj"}));
  ASSERT_EQ(adapter.tensors.size(), 8U);
  for (const auto& [name, tensor] : tensors_) EXPECT_TRUE(at::equal(adapter.tensors.at(name), tensor)) << name;
  // What stands there is what is computed: W + 2 B A.
  TrainableModel model(reader_, adapter.options, at::kFloat);
  for (Parameter& parameter : model.parameters()) parameter.value.copy_(adapter.tensors.at(parameter.name));
  const std::string stem = "base_model.model.model.layers.1.self_attn.v_proj";
  const at::Tensor weight = reader_.load("model.layers.1.self_attn.v_proj.weight", {32, 64}, at::kFloat);
  EXPECT_TRUE(at::allclose(
      model.merged("model.layers.1.self_attn.v_proj.weight"),
      weight + 2 * at::matmul(tensors_.at(stem + ".lora_B.weight"), tensors_.at(stem + ".lora_A.weight"))));
  EXPECT_FALSE(model.merged("model.layers.1.self_attn.o_proj.weight").defined());
  EXPECT_FALSE(model.merged("model.norm.weight").defined());
}

TEST_F(AdapterTest, what_is_written_is_read_back) {
  LoraOptions options = adapt_all(4, 0.25);
  options.rslora = true;
  options.alpha = 2.5;
  TrainableModel model(reader_, options, at::kFloat);
  fill_adapters(model);
  Adapter adapter = adapter_of(model, options);
  adapter.base_fingerprint = "0123abcd";
  world().on_root([&] { write_adapter(folder_ / "out", adapter, adapter.options.targets); });
  world().barrier("adapter written");
  const Adapter back = read_adapter(folder_ / "out", reader_.config());
  EXPECT_EQ(back.options.rank, 4);
  EXPECT_EQ(back.options.alpha, 2.5);
  EXPECT_EQ(back.options.dropout, 0.25);
  EXPECT_TRUE(back.options.rslora);
  EXPECT_EQ(back.base, adapter.base);
  EXPECT_EQ(back.base_fingerprint, "0123abcd");
  EXPECT_EQ(adapter_hash(back), adapter_hash(adapter));
  ASSERT_EQ(back.tensors.size(), adapter.tensors.size());
  for (const auto& [name, tensor] : adapter.tensors) EXPECT_TRUE(at::equal(back.tensors.at(name), tensor)) << name;

  const Json json = read_json(folder_ / "out" / "adapter_config.json");
  EXPECT_EQ(json.at("peft_type"), "LORA");
  EXPECT_EQ(json.at("task_type"), "CAUSAL_LM");
  EXPECT_EQ(json.at("bias"), "none");
  EXPECT_EQ(json.at("r"), 4);
  EXPECT_EQ(json.at("use_rslora"), true);
  EXPECT_EQ(json.at("inference_mode"), true);
  EXPECT_EQ(json.at("target_modules"),
            (Json{"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}));
  const checkpoint::SafetensorsFile file(folder_ / "out" / "adapter_model.safetensors");
  EXPECT_EQ(file.metadata().at("format"), "pt");
  EXPECT_EQ(file.info("base_model.model.model.layers.0.mlp.down_proj.lora_A.weight").shape,
            (std::vector<std::int64_t>{4, 152}));
  EXPECT_EQ(file.info("base_model.model.model.layers.0.mlp.down_proj.lora_B.weight").shape,
            (std::vector<std::int64_t>{64, 4}));
}

TEST_F(AdapterTest, bloom_has_pefts_names_where_query_key_value_is_one) {
  const checkpoint::Reader bloom = write_model(folder_ / "bloom", forms::bloom_json(64, 4));
  TrainableModel model(bloom, LoraOptions{}, at::kFloat);
  EXPECT_EQ(model.parameters()[0].name,
            "base_model.model.transformer.h.0.self_attention.query_key_value.lora_A.weight");
  EXPECT_EQ(model.parameters()[1].value.sizes(), (at::IntArrayRef{192, 16}));
  const checkpoint::Reader grouped =
      write_model(folder_ / "grouped", forms::folded(forms::bloom_json(64, 4), 2, checkpoint::KvLayout::gqa));
  TrainableModel own(grouped, LoraOptions{}, at::kFloat);
  EXPECT_EQ(own.parameters()[2].name, "base_model.model.transformer.h.0.self_attention.key.lora_A.weight");
  EXPECT_EQ(own.parameters()[3].value.sizes(), (at::IntArrayRef{32, 16}));
}

TEST_F(AdapterTest, what_does_not_fit_is_named) {
  const std::string stem = "base_model.model.model.layers.1.self_attn.v_proj.lora_";
  EXPECT_EQ(refused([&] {}), "no error");
  EXPECT_NE(refused([&] { config_["r"] = 3; }).find("[2, 64]"), std::string::npos);
  EXPECT_NE(refused([&] { config_["r"] = 0; }).find("\"r\""), std::string::npos);
  EXPECT_NE(refused([&] { config_["lora_alpha"] = 1e39; }).find("\"lora_alpha\""), std::string::npos);
  EXPECT_NE(refused([&] { config_["r"] = "2"; }).find("\"r\""), std::string::npos);
  std::string message = refused([&] { tensors_[stem + "B.weight"] = at::zeros({64, 2}); });
  EXPECT_NE(message.find("InputError"), std::string::npos);
  EXPECT_NE(message.find(stem + "B.weight"), std::string::npos);
  EXPECT_NE(message.find("[64, 2]"), std::string::npos);
  EXPECT_NE(message.find("[32, 2]"), std::string::npos);
  message = refused([&] { tensors_.erase(stem + "A.weight"); });
  EXPECT_NE(message.find(stem + "A.weight [2, 64] is missing"), std::string::npos);
  message = refused([&] {
    tensors_["base_model.model.model.layers.2.self_attn.v_proj.lora_A.weight"] = at::zeros({2, 64});
  });
  EXPECT_NE(message.find("layers.2"), std::string::npos);
  EXPECT_NE(refused([&] {
              tensors_[stem + "A.weight"] = at::full({2, 64}, NAN);
            }).find("not finite"),
            std::string::npos);
  EXPECT_NE(refused([&] {
              tensors_[stem + "A.weight"] = at::zeros({2, 64}, at::kLong);
            }).find("I64"),
            std::string::npos);
  EXPECT_NE(refused([&] { config_["target_modules"] = {"q_proj", "w_pack"}; }).find("w_pack"), std::string::npos);
  EXPECT_NE(refused([&] { config_["target_modules"] = ".*proj"; }).find("pattern"), std::string::npos);
  EXPECT_NE(refused([&] { config_["target_modules"] = Json::array(); }).find("empty"), std::string::npos);
  EXPECT_NE(refused([&] { config_.erase("target_modules"); }).find("missing"), std::string::npos);
  EXPECT_NE(refused([&] { config_["target_modules"] = {"layers.0.self_attn.q_proj"}; }).find("some layers"),
            std::string::npos);
}

TEST_F(AdapterTest, arithmetic_that_is_not_applied_is_refused_by_name) {
  for (const auto& [key, value] : std::map<std::string, Json>{{"use_dora", true},
                                                              {"rank_pattern", {{"q_proj", 4}}},
                                                              {"alpha_pattern", {{"q_proj", 4}}},
                                                              {"modules_to_save", {"lm_head"}},
                                                              {"layers_to_transform", {0}},
                                                              {"fan_in_fan_out", true},
                                                              {"lora_bias", true},
                                                              {"bias", "all"},
                                                              {"peft_type", "IA3"},
                                                              {"init_lora_weights", "pissa"}}) {
    const std::string message = refused([&, k = key, v = value] { config_[k] = v; });
    EXPECT_NE(message.find("InputError"), std::string::npos) << message;
    EXPECT_NE(message.find("\"" + key + "\""), std::string::npos) << message;
  }
  EXPECT_NE(refused([&] { config_.erase("peft_type"); }).find("peft_type"), std::string::npos);
}

TEST_F(AdapterTest, damaged_files_are_named) {
  const std::filesystem::path path = write_by_hand("damaged");
  const std::filesystem::path file = path / "adapter_model.safetensors";
  const std::string whole = read_file(file);
  const auto read = [&] { read_adapter(path, reader_.config()); };
  const auto put = [&](const std::string& content) {
    world().barrier("read");
    world().on_root([&] { write_file(file, content); });
  };
  for (const std::size_t size : {whole.size() - 1, whole.size() / 2, std::size_t{20}, std::size_t{0}}) {
    put(whole.substr(0, size));
    EXPECT_THROW(read(), CorruptFile) << size;
  }
  put(whole);
  EXPECT_NO_THROW(read());
  world().barrier("read");
  world().on_root([&] { write_file(path / "adapter_config.json", "{\"r\": "); });
  EXPECT_THROW(read(), CorruptFile);
  world().barrier("read");
  world().on_root([&] { std::filesystem::remove(path / "adapter_config.json"); });
  EXPECT_THROW(read(), IoError);
  EXPECT_THROW(read_adapter(folder_ / "nowhere", reader_.config()), IoError);
}

// -----------------------------------------------------------------------------------------------------------------------------
// Merging

class MergeTest : public testing::TestWithParam<Form> {};

TEST_P(MergeTest, merged_logits_are_those_of_model_and_adapter) {
  const ScratchFolder folder;
  const checkpoint::Reader reader = write_model(folder / "model", GetParam().json);
  const LoraOptions options = adapt_all(4, 0.3);
  TrainableModel model(reader, options, at::kFloat);
  fill_adapters(model);
  const Adapter adapter = adapter_of(model, options);
  write_merged(world(), reader, adapter, folder / "merged", std::int64_t{1} << 30);

  const checkpoint::Reader merged(folder / "merged");
  Batch batch = plain_batch(2, 24, 97);
  batch.targets = batch.ids;
  const at::Tensor expected = model.logits(model.hidden(batch));
  EXPECT_LE(forms::relative_difference(model::Decoder(merged, at::kFloat).logits(batch.ids).view({-1, 97}), expected),
            1e-5);
  const TrainableModel plain(reader, frozen(), at::kFloat);
  EXPECT_GT(forms::relative_difference(plain.logits(plain.hidden(batch)), expected), 1e-2);

  EXPECT_EQ(merged.names(), reader.names());
  std::size_t changed = 0;
  for (const std::string& name : reader.names()) {
    EXPECT_EQ(merged.info(name).dtype, reader.info(name).dtype);
    const at::Tensor own = model.merged(name);
    changed += own.defined() ? 1 : 0;
    EXPECT_TRUE(at::equal(merged.view(name), own.defined() ? own : reader.view(name))) << name;
  }
  EXPECT_EQ(changed * 2, adapter.tensors.size());
  EXPECT_EQ(read_file(folder / "merged" / "config.json"), read_file(folder / "model" / "config.json"));
  EXPECT_EQ(read_json(folder / "merged" / "headfold.json").at("merged").at("adapter").at("sha256"),
            adapter_hash(adapter));
}

INSTANTIATE_TEST_SUITE_P(Forms, MergeTest, testing::ValuesIn(all_forms()),
                         [](const auto& given) { return given.param.name; });

TEST(MergeFilesTest, stored_dtypes_companions_and_tied_tables_stay) {
  const ScratchFolder folder;
  Json json = forms::llama_json(64, 4, 2);
  json["tie_word_embeddings"] = true;
  json["torch_dtype"] = "bfloat16";
  forms::SmallModel made = forms::make_model(json);
  for (auto& [name, tensor] : made.tensors) tensor = tensor.to(at::kBFloat16);
  made.tensors["lm_head.weight"] = made.tensors.at("model.embed_tokens.weight").clone();
  world().on_root([&] {
    make_folder(folder / "model");
    made.write(folder / "model");
    write_file(folder / "model" / "tokenizer.json", "{ }");
    write_file(folder / "model" / "headfold.json", "{\"format\": \"headfold-fold\", \"plan\": 3}");
  });
  world().barrier("model written");
  const checkpoint::Reader reader(folder / "model");
  const LoraOptions options = adapt_all(2);
  TrainableModel model(reader, options, at::kFloat);
  fill_adapters(model);
  write_merged(world(), reader, adapter_of(model, options), folder / "merged", 20000);
  const checkpoint::Reader merged(folder / "merged");
  EXPECT_GT(merged.files().size(), 1U);
  const std::string name = "model.layers.1.mlp.up_proj.weight";
  EXPECT_TRUE(at::equal(merged.view(name), model.merged(name).to(at::kBFloat16)));
  EXPECT_EQ(read_file(folder / "merged" / "tokenizer.json"), "{ }");
  const Json record = read_json(folder / "merged" / "headfold.json");
  EXPECT_EQ(record.at("plan"), 3);
  EXPECT_EQ(record.at("merged").at("base_fingerprint"), reader.fingerprint());

  // All weights trained: the table that is stored twice stays one.
  TrainableModel whole(reader, train_all(), at::kFloat);
  for (Parameter& parameter : whole.parameters()) parameter.value.mul_(1.5);
  write_merged(
      world(), reader, [&](const std::string& tensor) { return whole.merged(tensor); }, OrderedJson::object(),
      folder / "whole", std::int64_t{1} << 30);
  const checkpoint::Reader trained(folder / "whole");
  EXPECT_TRUE(at::equal(trained.view("lm_head.weight"), trained.view("model.embed_tokens.weight")));
  for (const std::string& each : reader.names())
    EXPECT_TRUE(at::equal(trained.view(each), (reader.view(each).to(at::kFloat) * 1.5).to(at::kBFloat16))) << each;

  // Sums beyond the stored type.
  Adapter huge = adapter_of(model, options);
  huge.options.alpha = 1e37;
  for (auto& entry : huge.tensors) entry.second = at::full_like(entry.second, 1e3);
  EXPECT_THROW(write_merged(comm::Communicator::self(), reader, huge, folder / fmt::format("huge{}", world().rank()),
                            std::int64_t{1} << 30),
               InputError);
  EXPECT_FALSE(std::filesystem::exists(folder / fmt::format("huge{}", world().rank()) / "config.json"));
}

}  // namespace
}  // namespace headfold::finetune
