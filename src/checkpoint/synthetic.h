#pragma once
// Checkpoints of random weights at real shapes, for measuring without a trained model.

#include <ATen/ATen.h>
#include <headfold/base/json.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/checkpoint/safetensors.h>
#include <headfold/comm/communicator.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace headfold::checkpoint {

/// config.json of a well-known model: "llama2-7b", "llama2-13b", "llama2-70b", "bloomz-7b1". Throws UsageError that
/// lists the names.
Json shape_config(const std::string& shape);
std::vector<std::string> shape_names();

/// `config` with other sizes; 0 or an empty text leaves one as it is. Throws InputError when they do not fit together.
struct ShapeChange {
  std::int64_t layers = 0;
  std::int64_t kv_heads = 0;
  std::int64_t vocab = 0;
  std::string dtype;  ///< "float32", "float16", "bfloat16"
};
ModelConfig change_shape(const Json& config, const ShapeChange& change, const std::string& file);

/// Elements `[begin, end)` (row-major) of a synthetic tensor, 1-d, in `dtype`. They are a function of seed, name, shape
/// and index alone: element i hashes a counter, so that any rank or thread makes any part. Norm weights are 1, biases
/// of norms 0, other biases and embeddings have standard deviation 0.02, linear weights 1 / sqrt(inputs). Distribution:
/// sum of four uniforms (within ±3.46 deviations).
at::Tensor synthetic_elements(const TensorShape& tensor, std::uint64_t seed, std::int64_t begin, std::int64_t end,
                              at::ScalarType dtype);

/// Tensors of `config` as they will be written, dtype that of the configuration.
std::vector<TensorSpec> synthetic_specs(const ModelConfig& config);

/// Collective. Writes the model folder: chunks of all tensors are spread over ranks, and over the threads of a rank.
/// Same bytes at any number of either. Throws IoError.
void write_synthetic(const comm::Communicator& world, const std::filesystem::path& folder, const ModelConfig& config,
                     std::uint64_t seed, std::uint64_t max_shard_bytes, const OrderedJson& headfold,
                     const std::vector<std::filesystem::path>& copies);

}  // namespace headfold::checkpoint
