#include <headfold/checkpoint/layout.h>
#include <headfold/checkpoint/reader.h>
#include <headfold/checkpoint/writer.h>

#include "files.h"
#include "world.h"

namespace headfold::checkpoint {
namespace {

using testing_support::bloom_json;
using testing_support::expect_error;
using testing_support::llama_json;
using testing_support::ScratchFolder;
using Tensors = std::map<std::string, at::Tensor>;

/// Deterministic weights for every tensor of a configuration.
Tensors make_tensors(const Json& json, at::ScalarType dtype = at::kFloat) {
  Tensors tensors;
  double start = 0;
  for (const TensorShape& tensor : model_tensors(parse_config(json, "test")))
    tensors[tensor.name] = (at::arange(tensor.elements(), at::kDouble).view(tensor.shape) / 64 + ++start).to(dtype);
  return tensors;
}

void write_model(const fs::path& folder, const Json& json, const Tensors& tensors) {
  write_json(folder / "config.json", json);
  write_safetensors(folder / "model.safetensors", tensors);
}

/// Two shards and an index; `change` may spoil the index.
void write_sharded(const fs::path& folder, const Json& json, const Tensors& tensors,
                   const std::function<void(Json&)>& change = {}) {
  write_json(folder / "config.json", json);
  Tensors half[2];
  Json index;
  int i = 0;
  for (const auto& [name, tensor] : tensors) {
    const int shard = i++ % 2;
    half[shard][name] = tensor;
    index["weight_map"][name] = fmt::format("model-0000{}-of-00002.safetensors", shard + 1);
  }
  index["metadata"]["total_size"] = 0;
  for (int shard = 0; shard < 2; ++shard)
    write_safetensors(folder / fmt::format("model-0000{}-of-00002.safetensors", shard + 1), half[shard]);
  if (change) change(index);
  write_json(folder / "model.safetensors.index.json", index);
}

TEST(ReaderTest, golden_checkpoints_are_complete) {
  for (const char* name : {"llama-mha", "llama-gqa", "bloom"}) {
    const Reader reader(testing_support::golden_folder() / name);
    EXPECT_EQ(layout_problems(reader), std::vector<std::string>{}) << name;
    EXPECT_EQ(reader.total_bytes(), static_cast<std::uint64_t>(parameter_count(reader.config())) * 4) << name;
  }
}

TEST(ReaderTest, single_and_sharded_hold_the_same) {
  const ScratchFolder folder;
  const Tensors tensors = make_tensors(llama_json());
  write_model(folder / "single", llama_json(), tensors);
  write_sharded(folder / "sharded", llama_json(), tensors);
  for (const char* form : {"single", "sharded"}) {
    const Reader reader(folder / form);
    ASSERT_EQ(reader.names().size(), tensors.size());
    for (const auto& [name, tensor] : tensors) {
      EXPECT_TRUE(at::equal(reader.load(name, tensor.sizes().vec(), at::kFloat), tensor)) << name;
      reader.done_with(name);
      EXPECT_TRUE(at::equal(reader.view(name), tensor)) << name;  // dropped pages come back
    }
  }
  EXPECT_EQ(Reader(folder / "single").files().size(), 1U);
  EXPECT_EQ(Reader(folder / "sharded").files().size(), 2U);
}

TEST(ReaderTest, dtypes_are_converted_and_copied) {
  const ScratchFolder folder;
  for (const at::ScalarType stored : {at::kFloat, at::kHalf, at::kBFloat16, at::kDouble}) {
    const fs::path path = folder / c10::toString(stored);
    const Tensors tensors = make_tensors(llama_json(), stored);
    write_model(path, llama_json(), tensors);
    const Reader reader(path);
    const at::Tensor& original = tensors.at("model.norm.weight");
    for (const at::ScalarType wanted : {at::kFloat, at::kBFloat16}) {
      at::Tensor loaded = reader.load("model.norm.weight", {16}, wanted);
      EXPECT_EQ(loaded.scalar_type(), wanted);
      EXPECT_TRUE(at::equal(loaded, original.to(wanted)));
      loaded.zero_();  // a copy: the map is read-only
    }
    EXPECT_EQ(reader.view("model.norm.weight").scalar_type(), stored);
  }
  Tensors tensors = make_tensors(llama_json());
  tensors["model.norm.weight"] = at::ones({16}, at::kInt);
  write_model(folder / "int", llama_json(), tensors);
  expect_error<InputError>([&] { Reader(folder / "int").load("model.norm.weight", {16}, at::kFloat); },
                           {"model.norm.weight", "I32"});
}

TEST(ReaderTest, prefix_may_be_absent_or_present) {
  const ScratchFolder folder;
  for (const Json& json : {llama_json(), bloom_json()}) {
    const Tensors full = make_tensors(json);
    const std::string prefix = tensor_prefix(parse_config(json, "test").family);
    Tensors bare;
    for (const auto& [name, tensor] : full) bare[name.starts_with(prefix) ? name.substr(prefix.size()) : name] = tensor;
    ASSERT_NE(bare.begin()->first, full.begin()->first);
    const fs::path path = folder / prefix;
    write_model(path, json, bare);
    const Reader reader(path);
    EXPECT_EQ(layout_problems(reader), std::vector<std::string>{});
    for (const auto& [name, tensor] : full) EXPECT_TRUE(at::equal(reader.view(name), tensor)) << name;
    write_model(path, json, full);
    const Reader prefixed(path);
    for (const auto& [name, tensor] : bare) EXPECT_TRUE(at::equal(prefixed.view(name), tensor)) << name;
  }
}

TEST(ReaderTest, either_of_two_tied_tables_will_do) {
  const ScratchFolder folder;
  Json json = llama_json();
  json["tie_word_embeddings"] = true;
  Tensors tensors = make_tensors(json);
  EXPECT_FALSE(tensors.contains("lm_head.weight"));
  const at::Tensor table = tensors.at("model.embed_tokens.weight");
  write_model(folder / "embedding", json, tensors);
  tensors["lm_head.weight"] = table;
  tensors.erase("model.embed_tokens.weight");
  write_model(folder / "head", json, tensors);
  for (const char* form : {"embedding", "head"}) {
    const Reader reader(folder / form);
    EXPECT_TRUE(at::equal(reader.view("model.embed_tokens.weight"), table)) << form;
    EXPECT_TRUE(at::equal(reader.view("lm_head.weight"), table)) << form;
    EXPECT_EQ(layout_problems(reader), std::vector<std::string>{}) << form;
  }
  // Untied, nothing stands in.
  json["tie_word_embeddings"] = false;
  write_model(folder / "untied", json, tensors);
  EXPECT_FALSE(Reader(folder / "untied").has("model.embed_tokens.weight"));
}

TEST(ReaderTest, zero_size_tensors_and_old_buffers) {
  const ScratchFolder folder;
  Tensors tensors = make_tensors(llama_json());
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = at::ones({2});
  tensors["extra.empty"] = at::empty({0, 3});
  for (const bool sharded : {false, true}) {
    const fs::path path = folder / (sharded ? "sharded" : "single");
    if (sharded)
      write_sharded(path, llama_json(), tensors,
                    [](Json& index) { index["weight_map"].erase("model.layers.0.self_attn.rotary_emb.inv_freq"); });
    else
      write_model(path, llama_json(), tensors);
    const Reader reader(path);
    EXPECT_THAT(reader.names(), testing::Not(testing::Contains(testing::HasSubstr("inv_freq"))));
    EXPECT_EQ(reader.load("extra.empty", {0, 3}, at::kFloat).numel(), 0);
  }
}

TEST(ReaderTest, tensors_that_the_configuration_has_no_place_for_are_left_out) {
  const ScratchFolder folder;
  const Tensors tensors = make_tensors(llama_json());
  write_model(folder / "sound", llama_json(), tensors);
  const std::vector<std::string> expected = Reader(folder / "sound").names();
  Tensors more = tensors;
  more["model.layers.0.self_attn.q_proj.bias"] = at::ones({4});  // without attention_bias
  for (const auto& [name, tensor] : tensors)
    if (name.starts_with("model.layers.0.")) more["model.layers.99." + name.substr(15)] = tensor;
  write_model(folder / "more", llama_json(), more);
  EXPECT_EQ(Reader(folder / "more").names(), expected);
  EXPECT_THAT(expected, testing::Contains("lm_head.weight"));
  // Of two tied tables both belong to the model.
  Json tied = llama_json();
  tied["tie_word_embeddings"] = true;
  write_model(folder / "tied", tied, tensors);
  EXPECT_EQ(Reader(folder / "tied").names(), expected);
}

TEST(ReaderTest, wrong_shapes_and_absent_tensors_are_named) {
  const ScratchFolder folder;
  Tensors tensors = make_tensors(llama_json());
  tensors["model.layers.1.mlp.up_proj.weight"] = at::ones({24, 15});
  tensors.erase("model.layers.0.self_attn.k_proj.weight");
  write_model(folder.path(), llama_json(), tensors);
  const Reader reader(folder.path());
  expect_error<InputError>(
      [&] {
        reader.load("model.layers.1.mlp.up_proj.weight", {24, 16}, at::kFloat);
      },
      {"model.safetensors", "model.layers.1.mlp.up_proj.weight", "[24, 15]", "[24, 16]"});
  expect_error<InputError>(
      [&] {
        reader.load("model.layers.0.self_attn.k_proj.weight", {8, 16}, at::kFloat);
      },
      {"k_proj.weight", folder.path().string()});
  const std::vector<std::string> problems = layout_problems(reader);
  ASSERT_EQ(problems.size(), 2U);
  EXPECT_THAT(problems[0], testing::HasSubstr("k_proj.weight [8, 16] is missing"));
  EXPECT_THAT(problems[1], testing::HasSubstr("[24, 15]"));
}

TEST(ReaderTest, norms_of_heads_are_refused_whatever_the_config_says) {
  const ScratchFolder folder;
  Tensors tensors = make_tensors(llama_json());
  tensors["model.layers.1.self_attn.q_norm.weight"] = at::ones({4});
  write_model(folder.path(), llama_json(), tensors);
  expect_error<InputError>([&] { Reader reader(folder.path()); },
                           {"model.layers.1.self_attn.q_norm.weight", "normalises queries and keys per head"});
}

TEST(ReaderTest, hostile_indices) {
  const ScratchFolder folder;
  const Tensors tensors = make_tensors(llama_json());
  const std::string first = tensors.begin()->first;
  int number = 0;
  const auto spoil = [&](const std::function<void(Json&)>& change) {
    const fs::path path = folder / std::to_string(number++);
    write_sharded(path, llama_json(), tensors, change);
    return path;
  };
  const auto corrupt = [&](const std::function<void(Json&)>& change, const std::vector<std::string>& parts) {
    const fs::path path = spoil(change);
    expect_error<CorruptFile>([&] { Reader reader(path); }, parts);
  };
  // A right file outside the folder must not be reachable.
  write_safetensors(folder / "secret.safetensors", {{first, tensors.at(first)}});
  for (const std::string& target : {std::string("../secret.safetensors"), (folder / "secret.safetensors").string(),
                                    std::string("a/../../secret.safetensors"), std::string("..\\secret.safetensors"),
                                    std::string(".."), std::string(""), std::string(".hidden.safetensors"),
                                    std::string("config.json"), std::string("model\0.safetensors", 18)})
    corrupt([&](Json& index) { index["weight_map"][first] = target; }, {"index.json", first, "plain name"});
  corrupt([&](Json& index) { index["weight_map"][first] = "model-00002-of-00002.safetensors"; }, {first});
  corrupt([&](Json& index) { index["weight_map"]["invented.weight"] = "model-00001-of-00002.safetensors"; },
          {"index.json", "invented.weight"});
  corrupt([&](Json& index) { index["weight_map"].erase(first); }, {first, "does not name"});
  corrupt([&](Json& index) { index["weight_map"][first] = 3; }, {first, "text"});
  corrupt([&](Json& index) { index["weight_map"] = Json::object(); }, {"empty"});
  corrupt([&](Json& index) { index["weight_map"] = "x"; }, {"weight_map"});
  corrupt([&](Json& index) { index = Json::array(); }, {"weight_map"});
  const fs::path missing = spoil([&](Json& index) { index["weight_map"][first] = "model-00003-of-00002.safetensors"; });
  expect_error<IoError>([&] { Reader reader(missing); }, {"model-00003-of-00002.safetensors", first});
  // A truncated shard.
  const fs::path cut = spoil({});
  const fs::path shard = cut / "model-00002-of-00002.safetensors";
  fs::resize_file(shard, fs::file_size(shard) - 1);
  expect_error<CorruptFile>([&] { Reader reader(cut); }, {"model-00002-of-00002.safetensors", "tensor"});
  // Duplicate keys and bytes that are no UTF-8.
  const fs::path twice = spoil({});
  const fs::path index_file = twice / "model.safetensors.index.json";
  write_file(index_file,
             R"({"weight_map": {"a": "model-00001-of-00002.safetensors", "a": "model-00002-of-00002.safetensors"}})");
  expect_error<CorruptFile>([&] { Reader reader(twice); }, {"\"a\"", "twice"});
  write_file(index_file, "{\"weight_map\": {\"a\xff\": \"model-00001-of-00002.safetensors\"}}");
  EXPECT_THROW(Reader reader(twice), CorruptFile);
}

TEST(ReaderTest, folders_that_are_no_model) {
  const ScratchFolder folder;
  EXPECT_THROW(Reader(folder / "absent"), IoError);
  write_json(folder / "file", llama_json());
  EXPECT_THROW(Reader(folder / "file"), IoError);
  write_json(folder.path() / "config.json", llama_json());
  expect_error<IoError>([&] { Reader reader(folder.path()); }, {"model.safetensors"});
  write_file(folder / "pytorch_model.bin", "PK");
  expect_error<InputError>([&] { Reader reader(folder.path()); }, {"pytorch_model.bin"});
}

TEST(ReaderTest, fingerprint_sees_config_weights_and_nothing_else) {
  const ScratchFolder folder;
  Tensors tensors = make_tensors(llama_json());
  write_model(folder / "a", llama_json(), tensors);
  write_model(folder / "b", llama_json(), tensors);
  write_file(folder / "b" / "tokenizer.json", "{}");
  const std::string original = Reader(folder / "a").fingerprint();
  EXPECT_EQ(original.size(), 64U);
  EXPECT_EQ(Reader(folder / "b").fingerprint(), original);
  tensors["model.norm.weight"][3] += 1;
  write_model(folder / "a", llama_json(), tensors);
  EXPECT_NE(Reader(folder / "a").fingerprint(), original);
  Json json = llama_json();
  json["rms_norm_eps"] = 1e-6;
  write_json(folder.path() / "b" / "config.json", json);
  EXPECT_NE(Reader(folder / "b").fingerprint(), original);
}

}  // namespace
}  // namespace headfold::checkpoint
