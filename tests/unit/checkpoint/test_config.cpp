#include <headfold/checkpoint/config.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/checkpoint/safetensors.h>

#include "files.h"
#include "world.h"

namespace headfold::checkpoint {
namespace {

using testing_support::bloom_json;
using testing_support::expect_error;
using testing_support::llama_json;

ModelConfig parse(const Json& json) {
  return parse_config(json, "here/config.json");
}

Json with(Json json, const std::string& key, const Json& value) {
  json[key] = value;
  return json;
}
Json without(Json json, const std::string& key) {
  json.erase(key);
  return json;
}

TEST(ConfigTest, reads_the_golden_files) {
  const ModelConfig mha = read_config(testing_support::golden_folder() / "llama-mha");
  EXPECT_EQ(mha.family, Family::llama);
  EXPECT_EQ(mha.layers, 3);
  EXPECT_EQ(mha.heads, 4);
  EXPECT_EQ(mha.kv_heads, 4);
  EXPECT_EQ(mha.head_dim, 16);
  EXPECT_EQ(mha.ffn, 160);
  EXPECT_DOUBLE_EQ(mha.norm_eps, 1e-5);
  EXPECT_EQ(mha.cache_bytes_per_token(4), 3 * 2 * 4 * 16 * 4);
  const ModelConfig gqa = read_config(testing_support::golden_folder() / "llama-gqa");
  EXPECT_EQ(gqa.kv_heads, 2);
  EXPECT_EQ(gqa.source_kv_heads, 2);
  EXPECT_DOUBLE_EQ(gqa.rope_theta, 500000.0);
  const ModelConfig bloom = read_config(testing_support::golden_folder() / "bloom");
  EXPECT_EQ(bloom.family, Family::bloom);
  EXPECT_EQ(bloom.heads, 6);
  EXPECT_EQ(bloom.head_dim, 16);
  EXPECT_EQ(bloom.ffn, 384);
  EXPECT_EQ(bloom.max_positions, 2048);
  EXPECT_TRUE(bloom.tied_embeddings);
  EXPECT_FALSE(bloom.split_qkv);
}

TEST(ConfigTest, layout_is_that_of_the_golden_tensors) {
  for (const char* name : {"llama-mha", "llama-gqa", "bloom"}) {
    const auto folder = testing_support::golden_folder() / name;
    const SafetensorsFile file(folder / "model.safetensors");
    std::set<std::string> expected;
    for (const TensorShape& tensor : model_tensors(read_config(folder))) {
      expected.insert(tensor.name);
      std::string stored = tensor.name;
      if (!file.has(stored)) stored = stored.substr(stored.find('.') + 1);
      ASSERT_TRUE(file.has(stored)) << name << " lacks " << tensor.name;
      EXPECT_EQ(file.info(stored).shape, tensor.shape) << tensor.name;
    }
    EXPECT_EQ(expected.size(), file.tensors().size()) << name;
  }
}

TEST(ConfigTest, defaults_of_absent_keys) {
  Json json = llama_json();
  for (const char* key :
       {"num_key_value_heads", "rope_theta", "tie_word_embeddings", "torch_dtype", "architectures", "rms_norm_eps"})
    json.erase(key);
  const ModelConfig config = parse(json);
  EXPECT_EQ(config.kv_heads, config.heads);
  EXPECT_DOUBLE_EQ(config.rope_theta, 10000.0);
  EXPECT_FALSE(config.tied_embeddings);
  EXPECT_EQ(config.dtype, "float32");
  EXPECT_DOUBLE_EQ(config.norm_eps, 1e-6);
  EXPECT_EQ(config.bos, 1);
  EXPECT_EQ(config.eos, 2);
  EXPECT_EQ(parse(with(json, "head_dim", nullptr)).head_dim, 4);
  EXPECT_EQ(parse(with(json, "head_dim", 8)).head_dim, 8);  // wider than hidden / heads is legal
  EXPECT_EQ(parse(with(json, "eos_token_id", {7, 8})).eos, 7);
  EXPECT_EQ(parse(with(json, "eos_token_id", nullptr)).eos, -1);
  EXPECT_TRUE(parse(with(json, "attention_bias", true)).attention_bias);
  EXPECT_EQ(parse(with(bloom_json(), "seq_length", 512)).max_positions, 512);
  EXPECT_FALSE(parse(with(bloom_json(), "tie_word_embeddings", false)).tied_embeddings);
}

TEST(ConfigTest, old_and_new_spellings_mean_the_same) {
  Json modern = without(without(llama_json(), "rope_theta"), "torch_dtype");
  modern["dtype"] = "bfloat16";
  modern["rope_parameters"] = {{"rope_type", "llama3"},   {"rope_theta", 500000.0},
                               {"factor", 8.0},           {"low_freq_factor", 1.0},
                               {"high_freq_factor", 4.0}, {"original_max_position_embeddings", 8192}};
  Json old = with(with(llama_json(), "rope_theta", 500000.0), "torch_dtype", "torch.bfloat16");
  old["rope_scaling"] = {{"type", "llama3"},
                         {"factor", 8.0},
                         {"low_freq_factor", 1.0},
                         {"high_freq_factor", 4.0},
                         {"original_max_position_embeddings", 8192}};
  for (const Json& json : {modern, old}) {
    const ModelConfig config = parse(json);
    EXPECT_EQ(config.dtype, "bfloat16");
    EXPECT_DOUBLE_EQ(config.rope_theta, 500000.0);
    EXPECT_EQ(config.rope_scaling.type, "llama3");
    EXPECT_DOUBLE_EQ(config.rope_scaling.factor, 8.0);
    EXPECT_EQ(config.rope_scaling.original_max_positions, 8192);
  }
  Json bloom = bloom_json();
  for (const auto& [from, to] : {std::pair("hidden_size", "n_embed"), std::pair("n_layer", "num_hidden_layers"),
                                 std::pair("n_head", "num_attention_heads")}) {
    bloom[to] = bloom[from];
    bloom.erase(from);
  }
  EXPECT_EQ(parse(bloom).hidden, 24);
  EXPECT_EQ(parse(bloom).layers, 2);
  EXPECT_EQ(parse(bloom).heads, 6);
  EXPECT_EQ(parse(with(llama_json(), "rope_scaling", nullptr)).rope_scaling.type, "default");
  EXPECT_DOUBLE_EQ(
      parse(with(llama_json(), "rope_scaling", {{"rope_type", "linear"}, {"factor", 2.5}})).rope_scaling.factor, 2.5);
}

TEST(ConfigTest, what_would_change_the_arithmetic_is_refused_with_the_reason) {
  const auto refused = [](const Json& json, const std::vector<std::string>& parts) {
    std::vector<std::string> all = parts;
    all.emplace_back("here/config.json");
    expect_error<InputError>([&] { parse(json); }, all);
  };
  for (const char* type : {"dynamic", "yarn", "longrope", "nonsense"})
    refused(with(llama_json(), "rope_scaling", {{"type", type}, {"factor", 2.0}}), {type, "does not apply"});
  refused(with(llama_json(), "rope_parameters", {{"rope_type", "yarn"}, {"rope_theta", 1e4}}),
          {"rope_parameters", "yarn"});
  refused(with(llama_json(), "rope_scaling", {{"rope_type", "linear"}}), {"factor"});
  refused(with(llama_json(), "rope_scaling", {{"rope_type", "linear"}, {"factor", 0}}), {"factor"});
  refused(with(llama_json(), "rope_scaling", {{"rope_type", "llama3"}, {"factor", 8.0}}), {"low_freq_factor"});
  refused(with(llama_json(), "rope_scaling", 3), {"rope_scaling"});
  refused(with(with(llama_json(), "model_type", "qwen3"), "architectures", {"Qwen3ForCausalLM"}), {"qwen3", "QK-norm"});
  refused(with(llama_json(), "use_qk_norm", true), {"use_qk_norm"});
  refused(with(llama_json(), "hidden_act", "gelu"), {"hidden_act", "gelu"});
  refused(with(with(llama_json(), "model_type", "mistral"), "architectures", Json::array({"MistralForCausalLM"})),
          {"mistral", "not supported"});
  refused(with(llama_json(), "architectures", Json::array({"BloomForCausalLM"})), {"BloomForCausalLM", "llama"});
  refused(without(without(llama_json(), "model_type"), "architectures"), {"architectures"});
  refused(with(llama_json(), "num_key_value_heads_per_layer", {1, 2}), {"num_key_value_heads_per_layer"});
  refused(with(llama_json(), "quantization_config", Json::object()), {"quantised"});
  refused(with(llama_json(), "torch_dtype", "int8"), {"torch_dtype", "int8"});
  refused(with(bloom_json(), "num_key_value_heads", 3), {"num_key_value_heads"});
  refused(Json::array(), {"object"});
}

TEST(ConfigTest, numbers_are_checked) {
  const auto refused = [](const Json& json, const std::string& key) {
    expect_error<InputError>([&] { parse(json); }, {key, "here/config.json"});
  };
  for (const char* key : {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                          "num_key_value_heads", "vocab_size", "max_position_embeddings", "head_dim"}) {
    for (const Json& value : {Json(0), Json(-4), Json(4.5), Json("4"), Json(1e300), Json(INT64_MAX), Json(UINT64_MAX),
                              Json::array({4}), Json(true)})
      refused(with(llama_json(), key, value), key);
  }
  for (const char* key : {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"})
    refused(without(llama_json(), key), key);
  for (const Json& value : {Json(0), Json(-1e-5), Json("1e-5"), Json(2)})
    refused(with(llama_json(), "rms_norm_eps", value), value == 2 ? "epsilon" : "rms_norm_eps");
  refused(with(llama_json(), "rope_theta", 0.5), "rope_theta");
  refused(with(llama_json(), "num_key_value_heads", 3), "KV heads");
  refused(with(llama_json(), "num_attention_heads", 3), "num_attention_heads");
  refused(with(llama_json(), "head_dim", 3), "head_dim");
  refused(with(llama_json(), "tie_word_embeddings", "yes"), "tie_word_embeddings");
  refused(with(bloom_json(), "n_head", 5), "heads");
}

TEST(ConfigTest, folding_changes_only_what_it_must) {
  const ModelConfig llama = parse(llama_json());
  EXPECT_EQ(folded_config(llama, 1, KvLayout::gqa), with(llama_json(), "num_key_value_heads", 1));
  // A file without the key gets it; head_dim stays absent.
  const ModelConfig old = parse(without(llama_json(), "num_key_value_heads"));
  EXPECT_EQ(folded_config(old, 2, KvLayout::gqa), llama_json());

  const ModelConfig projected = parse(folded_config(old, 2, KvLayout::projected));
  EXPECT_EQ(projected.layout, KvLayout::projected);
  EXPECT_EQ(projected.kv_heads, 2);
  EXPECT_EQ(projected.source_kv_heads, 4);
  EXPECT_EQ(projected.raw["model_type"], "headfold_llama");
  EXPECT_EQ(projected.raw["architectures"], Json::array({"HeadfoldLlamaForCausalLM"}));
  EXPECT_EQ(projected.raw["my_own_key"], llama_json()["my_own_key"]);
  std::map<std::string, std::vector<std::int64_t>> shapes;
  for (const TensorShape& tensor : layer_tensors(projected, 1)) shapes[tensor.name] = tensor.shape;
  EXPECT_EQ(shapes.at("model.layers.1.self_attn.k_proj.weight"), (std::vector<std::int64_t>{16, 16}));
  EXPECT_EQ(shapes.at("model.layers.1.self_attn.v_proj.weight"), (std::vector<std::int64_t>{8, 16}));
  EXPECT_EQ(shapes.at("model.layers.1.self_attn.key_fold.weight"), (std::vector<std::int64_t>{2, 4, 8}));
  EXPECT_EQ(shapes.at("model.layers.1.self_attn.query_fold.weight"), (std::vector<std::int64_t>{4, 4, 4}));
  EXPECT_THROW(folded_config(projected, 1, KvLayout::gqa), InputError);

  const ModelConfig bloom = parse(bloom_json());
  EXPECT_EQ(folded_config(bloom, 6, KvLayout::gqa), bloom_json());
  const ModelConfig grouped = parse(folded_config(bloom, 2, KvLayout::gqa));
  EXPECT_EQ(grouped.raw["model_type"], "headfold_bloom");
  EXPECT_TRUE(grouped.split_qkv);
  EXPECT_EQ(grouped.kv_heads, 2);
  shapes.clear();
  for (const TensorShape& tensor : layer_tensors(grouped, 0)) shapes[tensor.name] = tensor.shape;
  EXPECT_EQ(shapes.at("transformer.h.0.self_attention.query.weight"), (std::vector<std::int64_t>{24, 24}));
  EXPECT_EQ(shapes.at("transformer.h.0.self_attention.value.bias"), (std::vector<std::int64_t>{8}));
  EXPECT_FALSE(shapes.contains("transformer.h.0.self_attention.query_key_value.weight"));
  EXPECT_THROW(folded_config(bloom, 2, KvLayout::projected), InputError);
  for (const std::int64_t target : {0, 3, 8, -2}) EXPECT_THROW(folded_config(llama, target, KvLayout::gqa), InputError);
}

TEST(ConfigTest, parameter_count_of_llama2_7b) {
  Json json = llama_json();
  for (const auto& [key, value] :
       {std::pair("hidden_size", 4096), std::pair("intermediate_size", 11008), std::pair("num_hidden_layers", 32),
        std::pair("num_attention_heads", 32), std::pair("num_key_value_heads", 32), std::pair("vocab_size", 32000)})
    json[key] = value;
  EXPECT_EQ(parameter_count(parse(json)), 6738415616);  // the published figure
}

TEST(ConfigTest, folder_without_config_has_a_hint) {
  const testing_support::ScratchFolder folder;
  try {
    read_config(folder.path());
    FAIL() << "no error";
  } catch (const IoError& error) {
    EXPECT_THAT(error.hint(), testing::HasSubstr("model folder"));
  }
  write_file(folder / "config.json", R"({"model_type": "llama", "model_type": "bloom"})");
  EXPECT_THROW(read_config(folder.path()), CorruptFile);
  write_file(folder / "config.json", R"({"model_type": "llama")");
  EXPECT_THROW(read_config(folder.path()), CorruptFile);
}

}  // namespace
}  // namespace headfold::checkpoint
