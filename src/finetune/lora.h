#pragma once
// Low-rank adapters and their files in PEFT's format (docs/formats.md).

#include <ATen/ATen.h>
#include <headfold/base/json.h>
#include <headfold/checkpoint/reader.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace headfold::finetune {

struct LoraOptions {
  std::int64_t rank = 16;
  double alpha = 32;
  double dropout = 0.05;
  bool rslora = false;     ///< scale alpha / sqrt(rank) instead of alpha / rank
  bool full = false;       ///< train all weights, no adapter
  std::uint64_t seed = 0;  ///< of the initial A
  /// Projections by their last name: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj; BLOOM
  /// query_key_value (or query, key, value where a fold separated them), dense, dense_h_to_4h, dense_4h_to_h. The short
  /// names q, k, v, o, gate, up, down stand for the family's own. Empty: nothing trains (a teacher).
  std::vector<std::string> targets = {"q", "k", "v", "o"};
  double scale() const;
};

/// Module names (last part) that options.targets mean in this model, in the model's order. InputError for names it does
/// not have, with those it has.
std::vector<std::string> target_modules(const LoraOptions& options, const checkpoint::ModelConfig& config);

/// An adapter as PEFT stores it: names "base_model.model.<module>.lora_A.weight" [rank, in] and ".lora_B.weight"
/// [out, rank], float32.
struct Adapter {
  LoraOptions options;
  std::string base;  ///< base_model_name_or_path
  std::map<std::string, at::Tensor> tensors;
};
/// adapter_config.json and adapter_model.safetensors, both complete or neither; one rank writes.
void write_adapter(const std::filesystem::path& folder, const Adapter& adapter, const std::vector<std::string>& modules);
/// Errors name file, tensor, found and expected shapes; options PEFT knows and headfold does not apply (DoRA, rank
/// patterns, modules_to_save, bias) are refused by name.
Adapter read_adapter(const std::filesystem::path& folder, const checkpoint::ModelConfig& base);

/// Writes the base checkpoint with W + scale B A (float32, then cast to the stored dtype) in place of W, all else byte
/// for byte: config, tokenizer, headfold.json with the adapter's hash added. Collective over `world`.
void write_merged(const comm::Communicator& world, const checkpoint::Reader& base, const Adapter& adapter,
                  const std::filesystem::path& out, std::int64_t max_shard_bytes);

}  // namespace headfold::finetune
