#pragma once
// Low-rank adapters and their files in PEFT's format (docs/formats.md).

#include <ATen/ATen.h>
#include <headfold/base/json.h>
#include <headfold/checkpoint/reader.h>
#include <headfold/comm/communicator.h>

#include <cstdint>
#include <filesystem>
#include <functional>
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

/// Name of a tensor in the PEFT file: "base_model.model." + module + ".lora_A.weight" (which = 'A') or B.
std::string adapter_tensor(const std::string& module, char which);
/// Initial A [rank, in] of a module, float32, as PEFT draws it: uniform in ±1 / sqrt(in) (Kaiming with a = sqrt 5), a
/// function of options.seed and the module's name alone. B starts at 0.
at::Tensor initial_a(const std::string& module, const LoraOptions& options, std::int64_t in);

/// An adapter as PEFT stores it: names as adapter_tensor() gives them, "…lora_A.weight" [rank, in] and "…lora_B.weight"
/// [out, rank], float32. A fold that separated BLOOM's query_key_value has modules query, key and value, which no stock
/// model has: such an adapter is headfold's own and leaves it merged (write_merged).
struct Adapter {
  LoraOptions options;
  std::string base;              ///< base_model_name_or_path
  std::string base_fingerprint;  ///< of the model it was trained on, in the tensors' metadata; empty: not stated
  std::map<std::string, at::Tensor> tensors;
};
/// adapter_config.json and adapter_model.safetensors, both complete or neither; one rank writes. `modules` are the last
/// names of what the adapter changes (target_modules). IoError.
void write_adapter(const std::filesystem::path& folder, const Adapter& adapter,
                   const std::vector<std::string>& modules);
/// Reads a folder of PEFT's (docs/formats.md) and checks it against the model it is for. Errors (IoError, CorruptFile,
/// InputError) name file, tensor, found and expected shapes; what PEFT knows and headfold does not apply (DoRA, rank
/// patterns, modules_to_save, trained biases, …) is refused by name. options.targets are last names of modules.
Adapter read_adapter(const std::filesystem::path& folder, const checkpoint::ModelConfig& base);
/// SHA-256 over names, shapes and values, and the scale.
std::string adapter_hash(const Adapter& adapter);

/// Writes the base checkpoint with W + scale B A (float32, then cast to the stored dtype) in place of W, all else byte
/// for byte: config, tokenizer; headfold.json with the adapter's hash added. Collective over `world`. InputError when a
/// sum does not fit the stored dtype.
void write_merged(const comm::Communicator& world, const checkpoint::Reader& base, const Adapter& adapter,
                  const std::filesystem::path& out, std::int64_t max_shard_bytes);
/// The same with any weights in place of the base's: `changed` gives the new one (any floating-point dtype) by its
/// canonical name (checkpoint::model_tensors), or an undefined tensor. `record` goes to headfold.json under "merged".
void write_merged(const comm::Communicator& world, const checkpoint::Reader& base,
                  const std::function<at::Tensor(const std::string& name)>& changed, const OrderedJson& record,
                  const std::filesystem::path& out, std::int64_t max_shard_bytes);

}  // namespace headfold::finetune
