#include <headfold/checkpoint/config.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/checkpoint/safetensors.h>

#include <functional>
#include <map>
#include <set>

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
    // Written with the old spellings, which every loader knows.
    const Json written = folded_config(config, 1, KvLayout::gqa);
    EXPECT_EQ(parse(written).rope_scaling.original_max_positions, 8192);
    EXPECT_DOUBLE_EQ(written.at("rope_theta").get<double>(), 500000.0);
    EXPECT_FALSE(written.contains("rope_parameters") || written.contains("dtype")) << written;
    EXPECT_THAT(written.at("torch_dtype").get<std::string>(), testing::EndsWith("bfloat16"));
    EXPECT_DOUBLE_EQ(written.at("rope_scaling").at("factor").get<double>(), 8.0);
  }
  modern["rope_parameters"] = {{"rope_type", "linear"}, {"rope_theta", 10000.0}, {"factor", 4.0}};
  modern["n_head"] = modern["num_attention_heads"];
  modern.erase("num_attention_heads");
  const Json linear = folded_config(parse(modern), 1, KvLayout::projected);
  EXPECT_EQ(linear.at("rope_scaling"), Json({{"rope_type", "linear"}, {"type", "linear"}, {"factor", 4.0}}));
  EXPECT_EQ(linear.at("num_attention_heads"), 4);
  EXPECT_FALSE(linear.contains("n_head"));
  modern["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 250000.0}};
  EXPECT_TRUE(folded_config(parse(modern), 1, KvLayout::gqa).at("rope_scaling").is_null());
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
  // A factor that no type tells how to apply.
  for (const Json& untyped : {Json{{"factor", 8.0}}, Json{{"type", nullptr}, {"factor", 8.0}}}) {
    refused(with(llama_json(), "rope_scaling", untyped), {"rope_scaling", "factor 8", "no type", "does not apply"});
    refused(with(llama_json(), "rope_parameters", untyped), {"rope_parameters", "factor 8", "no type"});
  }
  for (const Json& nothing : {Json{{"factor", 1.0}}, Json{{"type", nullptr}}, Json::object()})
    EXPECT_EQ(parse(with(llama_json(), "rope_scaling", nothing)).rope_scaling.type, "default") << nothing;
  // Both spellings: what one of them says must not be lost.
  const Json both = with(llama_json(), "rope_parameters", {{"rope_type", "default"}, {"rope_theta", 1e4}});
  refused(with(both, "rope_scaling", {{"type", "dynamic"}, {"factor", 2.0}}), {"rope_scaling", "dynamic"});
  refused(with(both, "rope_scaling", {{"type", "linear"}, {"factor", 2.0}}), {"rope_parameters", "disagree"});
  Json same = with(both, "rope_scaling", {{"type", "linear"}, {"factor", 2.0}});
  same["rope_parameters"] = {{"rope_type", "linear"}, {"factor", 2.0}};
  EXPECT_EQ(parse(same).rope_scaling.type, "linear");
  refused(with(with(llama_json(), "model_type", "qwen3"), "architectures", {"Qwen3ForCausalLM"}), {"qwen3", "QK-norm"});
  refused(with(llama_json(), "use_qk_norm", true), {"use_qk_norm"});
  refused(with(llama_json(), "hidden_act", "gelu"), {"hidden_act", "gelu"});
  refused(with(with(llama_json(), "model_type", "mistral"), "architectures", Json::array({"MistralForCausalLM"})),
          {"mistral", "not supported"});
  refused(with(llama_json(), "architectures", Json::array({"BloomForCausalLM"})), {"BloomForCausalLM", "llama"});
  refused(without(without(llama_json(), "model_type"), "architectures"), {"architectures"});
  refused(with(llama_json(), "num_key_value_heads_per_layer", {1, 2}), {"num_key_value_heads_per_layer"});
  refused(with(llama_json(), "block_configs", Json::array()), {"block_configs"});
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

std::map<std::string, std::vector<std::int64_t>> shapes_of(const ModelConfig& config, std::int64_t layer) {
  std::map<std::string, std::vector<std::int64_t>> shapes;
  for (const TensorShape& tensor : layer_tensors(config, layer))
    shapes[tensor.name.substr(tensor.name.find(std::to_string(layer) + ".") + 2)] = tensor.shape;
  return shapes;
}
using Extents = std::vector<std::int64_t>;

/// llama_json() with a feed-forward part that DeciLM can state.
Json decilm_source() {
  return with(with(llama_json(), "intermediate_size", 512), "num_key_value_heads", 4);
}

TEST(ConfigTest, uneven_llama_becomes_decilm_and_comes_back) {
  const ModelConfig source = parse(decilm_source());
  const Json json = folded_config(source, {{1, 4, 4}, {4, 4, 4}}, KvLayout::gqa);
  EXPECT_EQ(json["model_type"], "nemotron-nas");
  EXPECT_EQ(json["architectures"], Json::array({"DeciLMForCausalLM"}));
  EXPECT_EQ(json["block_configs"][0]["attention"]["n_heads_in_group"], 4);
  EXPECT_EQ(json["block_configs"][1]["attention"]["n_heads_in_group"], 1);
  EXPECT_EQ(json["my_own_key"], source.raw["my_own_key"]);
  // What engines compute (vLLM nemotron_nas.py, llama.cpp conversion): int(2 mult hidden / 3), next multiple of 256.
  const double multiplier = json["block_configs"][0]["ffn"]["ffn_mult"];
  const auto truncated = static_cast<std::int64_t>(2 * multiplier * 16 / 3);
  EXPECT_EQ((truncated + 255) / 256 * 256, 512);

  const ModelConfig uneven = parse(json);
  EXPECT_EQ(uneven.layout, KvLayout::gqa);
  EXPECT_TRUE(uneven.uneven());
  EXPECT_EQ(uneven.ffn, 512);
  EXPECT_EQ(uneven.kv_heads, 4);
  EXPECT_EQ(uneven.kv_heads_text(), "1 to 4");
  EXPECT_EQ(uneven.source_heads_of(0), 1);
  EXPECT_EQ(uneven.cache_bytes_per_token(2), (1 + 4) * 8 * 2);
  EXPECT_EQ(shapes_of(uneven, 0).at("self_attn.k_proj.weight"), (Extents{4, 16}));
  EXPECT_EQ(shapes_of(uneven, 1).at("self_attn.v_proj.weight"), (Extents{16, 16}));
  EXPECT_EQ(shapes_of(uneven, 0).at("self_attn.o_proj.weight"), (Extents{16, 16}));
  EXPECT_EQ(parameter_count(source) - parameter_count(uneven), 2 * 3 * 4 * 16);
  // Folded on: evenly to a stock file, unevenly to another DeciLM one; never to something finer.
  const ModelConfig stock = parse(folded_config(uneven, 1, KvLayout::gqa));
  EXPECT_EQ(stock.raw["model_type"], "llama");
  EXPECT_EQ(stock.raw["intermediate_size"], 512);
  EXPECT_TRUE(stock.layer_shapes.empty());
  EXPECT_EQ(parse(folded_config(uneven, {{1, 4, 4}, {2, 4, 4}}, KvLayout::gqa)).kv_heads, 2);
  EXPECT_THROW(folded_config(uneven, 2, KvLayout::gqa), InputError);
  EXPECT_THROW(folded_config(uneven, {{1, 4, 4}, {1, 4, 4}}, KvLayout::latent), InputError);
  EXPECT_THROW(folded_config(source, {{1, 4, 4}}, KvLayout::gqa), InternalError);
  EXPECT_THROW(folded_config(source, {{1, 4, 4}, {2, 4, 5}}, KvLayout::gqa), InputError);

  // Real sizes: the multipliers of Llama-3.1-Nemotron-51B (5.25 gives 28672) and LLaMA2 7B (11008 = 43 * 256).
  for (const auto& [hidden, heads, ffn] : {std::tuple{8192, 64, 28672}, {4096, 32, 11008}, {5120, 40, 13824}}) {
    Json real = decilm_source();
    real["hidden_size"] = hidden, real["intermediate_size"] = ffn;
    real["num_attention_heads"] = real["num_key_value_heads"] = heads;
    const Json written = folded_config(parse(real), {{heads, 128, 128}, {2, 128, 128}}, KvLayout::gqa);
    EXPECT_EQ(parse(written).ffn, ffn);
    if (hidden == 8192) {
      EXPECT_EQ(written["block_configs"][0]["ffn"]["ffn_mult"], 5.25);
    }
  }
}

TEST(ConfigTest, sizes_decilm_cannot_state_get_headfolds_own_config) {
  const ModelConfig narrow = parse(with(llama_json(), "num_key_value_heads", 4));  // 24 is no multiple of 256
  EXPECT_THAT(decilm_obstacle(narrow), testing::HasSubstr("256"));
  EXPECT_THAT(decilm_obstacle(parse(with(decilm_source(), "head_dim", 8))), testing::HasSubstr("hidden_size"));
  EXPECT_THAT(decilm_obstacle(parse(bloom_json())), testing::HasSubstr("LLaMA"));
  EXPECT_EQ(decilm_obstacle(parse(decilm_source())), "");
  const ModelConfig own = parse(folded_config(narrow, {{2, 4, 4}, {1, 4, 4}}, KvLayout::gqa));
  EXPECT_EQ(own.raw["model_type"], "headfold_llama");
  EXPECT_EQ(own.layout, KvLayout::gqa);
  EXPECT_EQ(own.shape_of(1), (LayerShape{1, 4, 4}));
  EXPECT_EQ(own.source_kv_heads, 2);
  const ModelConfig bloom = parse(folded_config(parse(bloom_json()), {{6, 4, 4}, {3, 4, 4}}, KvLayout::gqa));
  EXPECT_EQ(bloom.raw["model_type"], "headfold_bloom");
  EXPECT_EQ(bloom.shape_of(1), (LayerShape{3, 4, 4}));
  EXPECT_EQ(shapes_of(bloom, 1).at("self_attention.key.weight"), (Extents{12, 24}));
  EXPECT_EQ(shapes_of(bloom, 0).at("self_attention.key.bias"), (Extents{24}));
}

TEST(ConfigTest, published_decilm_files_are_read_as_llama) {
  Json deci = without(without(llama_json(), "num_key_value_heads"), "my_own_key");
  deci["model_type"] = "deci", deci["architectures"] = {"DeciLMForCausalLM"};
  deci["num_key_value_heads_per_layer"] = {4, 2};
  const ModelConfig config = parse(deci);
  EXPECT_EQ(config.family, Family::llama);
  EXPECT_EQ(config.ffn, 24);
  EXPECT_EQ(config.shape_of(0), (LayerShape{4, 4, 4}));
  EXPECT_EQ(config.shape_of(1), (LayerShape{2, 4, 4}));
  EXPECT_FALSE(parse(with(deci, "num_key_value_heads_per_layer", {2, 2})).uneven());

  Json nas = folded_config(parse(decilm_source()), {{1, 4, 4}, {4, 4, 4}}, KvLayout::gqa);
  // Newer files state the numbers themselves.
  nas["block_configs"][0] = {{"attention", {{"num_key_value_heads", 2}, {"no_op", false}}},
                             {"ffn", {{"intermediate_size", 512}, {"no_op", false}, {"hidden_act", "silu"}}}};
  EXPECT_EQ(parse(nas).shape_of(0).kv_heads, 2);
  const auto refused = [&](const Json& json, const std::vector<std::string>& parts) {
    std::vector<std::string> all = parts;
    all.emplace_back("here/config.json");
    expect_error<InputError>([&] { parse(json); }, all);
  };
  const auto block = [&](const char* part, const char* key, const Json& value) {
    Json json = nas;
    json["block_configs"][1][part][key] = value;
    return json;
  };
  refused(block("attention", "no_op", true), {"block_configs[1].attention", "no_op"});
  refused(block("attention", "replace_with_linear", true), {"block_configs[1].attention", "replace_with_linear"});
  refused(block("ffn", "no_op", true), {"block_configs[1].ffn", "no_op"});
  refused(block("ffn", "replace_with_linear", true), {"block_configs[1].ffn", "replace_with_linear"});
  refused(block("attention", "window_length", 64), {"window_length"});
  refused(block("attention", "sparsify", {"0.5"}), {"sparsify"});
  refused(block("ffn", "moe", Json::object()), {"moe"});
  refused(block("ffn", "ffn_mult", 1e9), {"ffn_mult"});
  refused(block("ffn", "ffn_mult", 23.0), {"inner width"});
  refused(block("ffn", "ffn_mult", -1.0), {"ffn_mult"});
  for (const Json& value : {Json(3), Json(0), Json("4"), Json(2.5), Json(nullptr), Json(INT64_MAX)})
    refused(block("attention", "n_heads_in_group", value), {"n_heads_in_group"});
  refused(with(nas, "block_configs", Json::array()), {"block_configs", "2 entries"});
  refused(with(nas, "block_configs", 7), {"block_configs", "2 entries"});
  refused(with(nas, "block_configs", {1, 2}), {"block_configs[0]"});
  refused(without(nas, "block_configs"), {"block_configs", "num_key_value_heads_per_layer"});
  refused(with(nas, "o_proj_bias", true), {"o_proj_bias"});
  refused(with(deci, "num_key_value_heads_per_layer", {4, 3}), {"layer 1", "3 KV heads"});
  refused(with(deci, "num_key_value_heads_per_layer", {4, 0}), {"num_key_value_heads_per_layer[1]"});
  refused(with(deci, "num_key_value_heads_per_layer", {4, "2"}), {"num_key_value_heads_per_layer"});
  refused(with(deci, "num_key_value_heads_per_layer", {4, 2, 2}), {"2 entries"});
  refused(without(deci, "intermediate_size"), {"intermediate_size"});
}

TEST(ConfigTest, latent_layers_have_their_own_widths) {
  const ModelConfig source = parse(llama_json());  // 4 query heads on 2 KV heads of 4
  const Json json = folded_config(source, {{2, 3, 4}, {1, 7, 9}}, KvLayout::latent);
  EXPECT_EQ(json["model_type"], "headfold_llama");
  const ModelConfig llama = parse(json);
  EXPECT_EQ(llama.layout, KvLayout::latent);
  EXPECT_EQ(llama.kv_heads, 2);
  EXPECT_EQ(llama.source_kv_heads, 2);
  EXPECT_EQ(llama.cache_bytes_per_token(4), (2 * 7 + 16) * 4);
  auto shapes = shapes_of(llama, 0);
  EXPECT_EQ(shapes.at("self_attn.q_proj.weight"), (Extents{16, 16}));
  EXPECT_EQ(shapes.at("self_attn.k_proj.weight"), (Extents{6, 16}));
  EXPECT_EQ(shapes.at("self_attn.key_up.weight"), (Extents{2, 4, 3}));
  EXPECT_EQ(shapes.at("self_attn.v_proj.weight"), (Extents{8, 16}));
  EXPECT_EQ(shapes.at("self_attn.o_proj.weight"), (Extents{16, 16}));
  EXPECT_FALSE(shapes.contains("self_attn.value_up.weight"));
  shapes = shapes_of(llama, 1);
  EXPECT_EQ(shapes.at("self_attn.key_up.weight"), (Extents{2, 4, 7}));
  EXPECT_EQ(shapes.at("self_attn.value_up.weight"), (Extents{2, 4, 9}));
  EXPECT_EQ(shapes.at("self_attn.o_proj.weight"), (Extents{16, 16}));
  // Small values shrink the output projection.
  EXPECT_EQ(shapes_of(parse(folded_config(source, {{1, 2, 3}, {1, 2, 3}}, KvLayout::latent)), 1)
                .at("self_attn.o_proj.weight"),
            (Extents{16, 12}));

  const ModelConfig bloom = parse(folded_config(parse(bloom_json()), {{3, 2, 1}, {2, 5, 6}}, KvLayout::latent));
  shapes = shapes_of(bloom, 0);
  EXPECT_EQ(shapes.at("self_attention.query.weight"), (Extents{12, 24}));
  EXPECT_EQ(shapes.at("self_attention.key.bias"), (Extents{6}));
  EXPECT_EQ(shapes.at("self_attention.dense.weight"), (Extents{24, 6}));
  EXPECT_FALSE(shapes.contains("self_attention.key_up.weight"));
  shapes = shapes_of(bloom, 1);
  EXPECT_EQ(shapes.at("self_attention.query.weight"), (Extents{24, 24}));
  EXPECT_EQ(shapes.at("self_attention.key_up.weight"), (Extents{6, 4, 5}));
  EXPECT_EQ(shapes.at("self_attention.value_up.weight"), (Extents{6, 4, 6}));

  EXPECT_THROW(folded_config(llama, 1, KvLayout::gqa), InputError);
  EXPECT_THROW(folded_config(source, {{2, 0, 4}, {1, 7, 9}}, KvLayout::latent), InputError);
  EXPECT_THROW(folded_config(source, {{4, 3, 4}, {1, 7, 9}}, KvLayout::latent), InputError);
  const auto refused = [&](const std::function<void(Json&)>& change, const std::vector<std::string>& parts) {
    Json changed = json;
    change(changed);
    expect_error<InputError>([&] { parse(changed); }, parts);
  };
  refused([](Json& j) { j.erase("headfold"); }, {"headfold"});
  refused([](Json& j) { j["headfold"] = 3; }, {"headfold"});
  refused([](Json& j) { j["headfold"]["layout"] = "woven"; }, {"woven", "latent"});
  refused([](Json& j) { j["headfold"].erase("layers"); }, {"headfold.layers"});
  refused([](Json& j) { j["headfold"]["layers"].erase(0); }, {"headfold.layers", "2 entries"});
  refused([](Json& j) { j["headfold"]["layers"][0] = "x"; }, {"headfold.layers[0]"});
  refused([](Json& j) { j["headfold"].erase("source_kv_heads"); }, {"source_kv_heads"});
  refused([](Json& j) { j["headfold"]["source_kv_heads"] = 3; }, {"KV heads"});
  refused([](Json& j) { j["headfold"]["layers"][1]["kv_heads"] = 3; }, {"num_key_value_heads"});
  refused([](Json& j) { j["headfold"]["layers"][0].erase("key_width"); }, {"headfold.layers[0]", "key_width"});
  for (const char* key : {"kv_heads", "key_width", "value_width"})
    for (const Json& value : {Json(0), Json(-1), Json(2.5), Json("2"), Json(INT64_MAX), Json(nullptr)})
      refused([&](Json& j) { j["headfold"]["layers"][1][key] = value; }, {"headfold.layers[1]", key});
  refused([](Json& j) { j["headfold"]["layers"][0]["value_width"] = 1 << 24; }, {"layer 0", "wider"});
  refused([](Json& j) { j["headfold"]["layout"] = "gqa"; }, {"key_width", "head_dim"});
  Json woven = folded_config(parse(bloom_json()), {{3, 2, 1}, {2, 5, 6}}, KvLayout::latent);
  woven["headfold"]["layout"] = "projected";
  expect_error<InputError>([&] { parse(woven); }, {"BLOOM", "rotation"});
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
