#pragma once
// Checkpoint files for tests, right and wrong ones.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/base/hash.h>
#include <headfold/base/json.h>

#include <filesystem>
#include <map>
#include <string>

namespace headfold::testing_support {

/// A safetensors file with this header text (its length may be claimed otherwise) and `data_bytes` bytes of data.
inline void write_raw(const std::filesystem::path& path, const std::string& header, std::size_t data_bytes,
                      std::uint64_t claimed = UINT64_MAX) {
  if (claimed == UINT64_MAX) claimed = header.size();
  std::string content;
  for (int shift = 0; shift < 64; shift += 8) content.push_back(static_cast<char>(claimed >> shift & 0xff));
  content += header;
  content.append(data_bytes, '\1');
  write_file(path, content);
}

/// Runs `work` and expects an error of type E whose text holds every one of `parts`.
template <class E, class F>
void expect_error(F&& work, const std::vector<std::string>& parts) {
  try {
    work();
    ADD_FAILURE() << "no error";
  } catch (const E& error) {
    for (const std::string& part : parts) EXPECT_THAT(std::string(error.what()), testing::HasSubstr(part));
  } catch (const std::exception& error) {
    ADD_FAILURE() << "another error: " << error.what();
  }
}

/// A small LLaMA configuration.
inline Json llama_json() {
  return Json::parse(
      R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 11,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false, "torch_dtype": "float32",
    "my_own_key": [1, 2]})");
}

/// A small BLOOM configuration.
inline Json bloom_json() {
  return Json::parse(
      R"({"architectures": ["BloomForCausalLM"], "model_type": "bloom", "vocab_size": 11, "hidden_size": 24, "n_layer": 2,
    "n_head": 6, "layer_norm_epsilon": 1e-5, "torch_dtype": "float32"})");
}

/// Name -> SHA-256 of every file in a folder.
inline std::map<std::string, std::string> digest(const std::filesystem::path& folder) {
  std::map<std::string, std::string> all;
  for (const auto& entry : std::filesystem::directory_iterator(folder))
    all[entry.path().filename().string()] = sha256_hex(read_file(entry.path()));
  return all;
}

}  // namespace headfold::testing_support
