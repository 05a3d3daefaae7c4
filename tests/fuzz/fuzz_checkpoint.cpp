// Mutated checkpoint files, thousands of them, seeds fixed: whatever a file holds, opening it succeeds or throws a
// typed error. Run under the sanitizers (preset asan-ubsan) it also shows that nothing reads outside the file.

#include <headfold/checkpoint/layout.h>
#include <headfold/checkpoint/reader.h>

#include "hostile.h"

namespace headfold::checkpoint {
namespace {

using namespace testing_support;

std::string with_length(const std::string& header) {
  std::string content;
  for (int shift = 0; shift < 64; shift += 8) content.push_back(static_cast<char>(header.size() >> shift & 0xff));
  return content + header;
}

/// Reads every byte that the file says a tensor has.
std::uint64_t touch(const at::Tensor& tensor) {
  std::uint64_t sum = 0;
  const auto* bytes = static_cast<const unsigned char*>(tensor.data_ptr());
  for (std::size_t i = 0; i < tensor.nbytes(); ++i) sum += bytes[i];
  return sum;
}

constexpr const char* kHeader =
    R"({"__metadata__":{"format":"pt"},"model.embed_tokens.weight":{"dtype":"F32","shape":[4,4],"data_offsets":[0,64]},)"
    R"("model.norm.weight":{"dtype":"F32","shape":[4],"data_offsets":[64,80]},"b":{"dtype":"BF16","shape":[2,2],"data_offsets":[80,88]},)"
    R"("empty":{"dtype":"F32","shape":[0,3],"data_offsets":[88,88]},"flags":{"dtype":"BOOL","shape":[8],"data_offsets":[88,96]}})";

TEST(CheckpointFuzz, safetensors) {
  const ScratchFolder folder;
  const MemoryLid lid;
  const fs::path path = folder / "fuzz.safetensors";
  Mutator mutator(20240610);
  Outcomes outcomes("fuzz.safetensors");
  std::uint64_t sum = 0;
  const auto open = [&](std::uint64_t i, const std::string& content) {
    put(path, content);
    outcomes.run(fmt::format("iteration {}: {}", i, content.substr(std::min<std::size_t>(8, content.size()))), [&] {
      const SafetensorsFile file(path);
      for (const auto& [name, info] : file.tensors())
        sum += info.dtype == "U16" || info.dtype == "U32" || info.dtype == "U64" ? 0 : touch(file.view(name));
    });
  };
  open(0, with_length(kHeader) + std::string(96, '\1'));
  ASSERT_EQ(outcomes.opened, 1);
  for (std::uint64_t i = 1; i <= 4000; ++i) {
    // Half of the time the length stays right, so that mutations reach beyond the first check.
    std::string content = i % 2 == 0 ? mutator.mutate(with_length(kHeader) + std::string(96, '\1'))
                                     : with_length(mutator.mutate(kHeader)) + std::string(96, '\1');
    if (i % 16 == 0 && content.size() >= 8) content[mutator.below(8)] = static_cast<char>(mutator.below(256));
    open(i, content);
  }
  EXPECT_GT(outcomes.refused, 3000);
  EXPECT_GT(outcomes.opened, 20) << "the mutations are too coarse to reach the inside";
  EXPECT_GT(sum, 0U);
}

constexpr const char* kConfigs[] = {
    R"({"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_act":"silu","hidden_size":16,"intermediate_size":24,"num_hidden_layers":2,)"
    R"("num_attention_heads":4,"num_key_value_heads":2,"vocab_size":11,"max_position_embeddings":64,"rms_norm_eps":1e-5,"rope_theta":10000.0,)"
    R"("rope_scaling":{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":32},)"
    R"("eos_token_id":[2,3],"tie_word_embeddings":false,"torch_dtype":"float32"})",
    R"({"architectures":["HeadfoldLlamaForCausalLM"],"model_type":"headfold_llama","hidden_size":16,"intermediate_size":24,"num_hidden_layers":2,)"
    R"("num_attention_heads":4,"num_key_value_heads":2,"vocab_size":11,"headfold":{"layout":"projected","source_kv_heads":4},"dtype":"bfloat16"})",
    R"({"architectures":["BloomForCausalLM"],"model_type":"bloom","vocab_size":11,"n_embed":24,"n_layer":2,"n_head":6,"layer_norm_epsilon":1e-5})",
    R"({"architectures":["HeadfoldLlamaForCausalLM"],"model_type":"headfold_llama","hidden_size":16,"intermediate_size":24,"num_hidden_layers":2,)"
    R"("num_attention_heads":4,"vocab_size":11,"headfold":{"layout":"latent","source_kv_heads":4,"layers":[)"
    R"({"kv_heads":2,"key_width":3,"value_width":9},{"kv_heads":1,"key_width":5,"value_width":1}]}})",
    R"({"architectures":["DeciLMForCausalLM"],"model_type":"nemotron-nas","hidden_size":16,"num_hidden_layers":2,"num_attention_heads":4,)"
    R"("vocab_size":11,"block_configs":[{"attention":{"n_heads_in_group":2,"no_op":false},"ffn":{"ffn_mult":24.0,"no_op":false}},)"
    R"({"attention":{"n_heads_in_group":4},"ffn":{"ffn_mult":24.0}}]})"};

TEST(CheckpointFuzz, config) {
  const MemoryLid lid;
  Mutator mutator(7);
  Outcomes outcomes("config.json");
  std::int64_t parameters = 0;
  for (std::uint64_t i = 0; i < 10000; ++i) {
    const std::string text = i < std::size(kConfigs) ? kConfigs[i] : mutator.mutate(kConfigs[i % std::size(kConfigs)]);
    outcomes.run(fmt::format("iteration {}: {}", i, text), [&] {
      const ModelConfig config = parse_config(parse_json(text, "config.json"), "config.json");
      ASSERT_GT(config.head_dim, 0);
      ASSERT_EQ(config.heads % config.kv_heads, 0);
      parameters += parameter_count(config) > 0 ? 1 : 0;
      ASSERT_GT(config.cache_bytes_per_token(4), 0);
      ASSERT_EQ(parse_config(config.raw, "again").kv_heads, config.kv_heads);
    });
  }
  EXPECT_GT(outcomes.opened, 300);
  EXPECT_GT(outcomes.refused, 2000);
  EXPECT_GT(parameters, 0);
}

TEST(CheckpointFuzz, index) {
  const ScratchFolder folder;
  const MemoryLid lid;
  put(folder / "config.json", kConfigs[0]);
  put(folder / "outside.safetensors",
      with_length(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})") + "1234");
  const fs::path model = folder / "model";
  fs::create_directories(model);
  put(model / "config.json", kConfigs[0]);
  put(model / "model-00001-of-00002.safetensors",
      with_length(
          R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}})") +
          "1234");
  put(model / "model-00002-of-00002.safetensors",
      with_length(R"({"c":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}})") + "5678");
  const std::string index =
      R"({"metadata":{"total_size":8},"weight_map":{"a":"model-00001-of-00002.safetensors","b":"model-00001-of-00002.safetensors",)"
      R"("c":"model-00002-of-00002.safetensors"}})";
  Mutator mutator(99);
  Outcomes outcomes(model.string());
  for (std::uint64_t i = 0; i < 2000; ++i) {
    const std::string text = i == 0 ? index : mutator.mutate(index);
    put(model / "model.safetensors.index.json", text);
    outcomes.run(fmt::format("iteration {}: {}", i, text), [&] {
      const Reader reader(model);
      for (const fs::path& file : reader.files()) ASSERT_EQ(file.parent_path(), model);
      for (const std::string& name : reader.names()) touch(reader.view(name));
      ASSERT_TRUE(reader.has("a") && reader.has("c"));
    });
  }
  EXPECT_GT(outcomes.opened, 50);
  EXPECT_GT(outcomes.refused, 1000);
}

}  // namespace
}  // namespace headfold::checkpoint
