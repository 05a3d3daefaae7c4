// Adapter folders in PEFT's format (docs/formats.md, "PEFT LoRA adapter").

#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/base/hash.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/checkpoint/safetensors.h>
#include <headfold/finetune/lora.h>

#include <set>

namespace headfold::finetune {
namespace {

using checkpoint::ModelConfig;

constexpr const char* kConfig = "adapter_config.json";
/// Beside what PEFT writes: PEFT reads no metadata, so that this does not disturb it.
constexpr const char* kBaseFingerprint = "headfold_base_fingerprint";
constexpr const char* kTensors = "adapter_model.safetensors";

std::string last_name(const std::string& module) {
  return module.substr(module.rfind('.') + 1);
}

/// Last names of all modules that can be adapted.
std::vector<std::string> every_target(const ModelConfig& config) {
  LoraOptions all;
  all.targets = {"q", "k", "v", "o", "gate", "up", "down"};
  return target_modules(all, config);
}

/// Every projection of a model by its full name, with its shape [out, in].
std::map<std::string, std::vector<std::int64_t>> projections(const ModelConfig& config) {
  const std::vector<std::string> names = every_target(config);
  std::map<std::string, std::vector<std::int64_t>> found;
  for (std::int64_t layer = 0; layer < config.layers; ++layer)
    for (const checkpoint::TensorShape& tensor : checkpoint::layer_tensors(config, layer)) {
      if (!tensor.name.ends_with(".weight") || tensor.shape.size() != 2) continue;
      const std::string module = tensor.name.substr(0, tensor.name.rfind('.'));
      if (std::find(names.begin(), names.end(), last_name(module)) != names.end()) found[module] = tensor.shape;
    }
  return found;
}

/// Options of PEFT that change what an adapter computes and that headfold does not apply.
void refuse_unknown_arithmetic(const Json& json, const std::string& file) {
  const auto refuse = [&](const std::string& key, const Json& value, const std::string& why) {
    throw InputError(fmt::format("{}: \"{}\" is {}: {}", file, key, value.dump().substr(0, 80), why),
                     "headfold applies plain LoRA: W + scale B A; merge the adapter with PEFT instead");
  };
  const auto value_of = [&](const char* key) { return json.contains(key) ? json.at(key) : Json(); };
  const auto empty = [](const Json& value) {
    return value.is_null() || value == false || ((value.is_array() || value.is_object()) && value.empty());
  };
  const std::pair<const char*, const char*> must_be_empty[] = {
      {"use_dora", "DoRA scales weights by their norms"},
      {"rank_pattern", "modules with ranks of their own"},
      {"alpha_pattern", "modules with scales of their own"},
      {"modules_to_save", "whole modules trained beside the adapter"},
      {"layers_to_transform", "adapters in some layers only"},
      {"layers_pattern", "adapters in some layers only"},
      {"exclude_modules", "modules left out by name"},
      {"fan_in_fan_out", "weights stored transposed"},
      {"lora_bias", "biases in the adapter"},
      {"use_qalora", "QA-LoRA pools its inputs"},
      {"layer_replication", "layers repeated"},
      {"target_parameters", "adapters on parameters instead of modules"},
      {"trainable_token_indices", "trained rows of the embedding"},
      {"alora_invocation_tokens", "adapters that start at a token"},
      {"megatron_config", "adapters on Megatron's layers"},
  };
  for (const auto& [key, why] : must_be_empty)
    if (const Json value = value_of(key); !empty(value)) refuse(key, value, why);
  if (const Json bias = value_of("bias"); !bias.is_null() && bias != "none")
    refuse("bias", bias, "biases trained beside the adapter");
  if (const Json type = value_of("peft_type"); type != "LORA") refuse("peft_type", type, "only \"LORA\" is read");
  // These start from changed base weights, so that the adapter alone does not tell the model.
  const Json init = value_of("init_lora_weights");
  if (init.is_string() && init != "gaussian" && init != "eva" && init != "orthogonal")
    refuse("init_lora_weights", init, "this way of starting changes the base weights too");
}

/// Last names of modules that target_modules of an adapter means.
std::vector<std::string> targets_of(const Json& json, const std::string& file, const ModelConfig& base,
                                    const std::map<std::string, std::vector<std::int64_t>>& known) {
  const auto found = json.find("target_modules");
  if (found != json.end() && found->is_string()) {
    if (*found == "all-linear") return every_target(base);
    throw InputError(fmt::format("{}: \"target_modules\" is the pattern {}", file, found->dump().substr(0, 80)),
                     "give a list of module names");
  }
  const auto listed = required<std::vector<std::string>>(json, "target_modules", file);
  std::set<std::string> matched, names;
  for (const std::string& target : listed) {
    bool any = false;
    for (const auto& [module, shape] : known) {
      if (module != target && !module.ends_with("." + target)) continue;
      matched.insert(module);
      names.insert(last_name(module));
      any = true;
    }
    if (any) continue;
    std::set<std::string> have;
    for (const auto& [module, shape] : known) have.insert(last_name(module));
    throw InputError(
        fmt::format("{}: \"target_modules\" names {}, which {} does not have", file, Json(target).dump(), base.file),
        fmt::format("it has {}", fmt::join(have, ", ")));
  }
  if (matched.empty())
    throw InputError(fmt::format("{}: \"target_modules\" is empty", file), "give a list of module names");
  for (const auto& [module, shape] : known)
    if (names.contains(last_name(module)) && !matched.contains(module))
      throw InputError(fmt::format("{}: \"target_modules\" leaves out {}: adapters in some layers only", file, module),
                       "headfold adapts a projection in every layer");
  return {names.begin(), names.end()};
}

}  // namespace

void write_adapter(const std::filesystem::path& folder, const Adapter& adapter,
                   const std::vector<std::string>& modules) {
  make_folder(folder);
  // A reader that finds the configuration finds the tensors it belongs to.
  std::error_code code;
  fs::remove(folder / kConfig, code);
  if (code)
    throw IoError((folder / kConfig).string(), "the adapter of an earlier run cannot be removed: " + code.message());
  std::map<std::string, at::Tensor> tensors;
  for (const auto& [name, tensor] : adapter.tensors) tensors[name] = tensor.to(at::kFloat).contiguous();
  std::map<std::string, std::string> metadata;
  if (!adapter.base_fingerprint.empty()) metadata[kBaseFingerprint] = adapter.base_fingerprint;
  checkpoint::write_safetensors(folder / kTensors, tensors, metadata);
  OrderedJson json;
  json["peft_type"] = "LORA";
  json["task_type"] = "CAUSAL_LM";
  json["base_model_name_or_path"] = adapter.base;
  json["r"] = adapter.options.rank;
  const double alpha = adapter.options.alpha;
  if (alpha == std::floor(alpha) && std::abs(alpha) < 1e15) {
    json["lora_alpha"] = static_cast<std::int64_t>(alpha);
  } else {
    json["lora_alpha"] = alpha;
  }
  json["lora_dropout"] = adapter.options.dropout;
  json["target_modules"] = modules;
  json["bias"] = "none";
  json["fan_in_fan_out"] = false;
  json["inference_mode"] = true;
  json["init_lora_weights"] = true;
  json["use_rslora"] = adapter.options.rslora;
  json["use_dora"] = false;
  json["rank_pattern"] = OrderedJson::object();
  json["alpha_pattern"] = OrderedJson::object();
  json["modules_to_save"] = nullptr;
  json["layers_to_transform"] = nullptr;
  json["layers_pattern"] = nullptr;
  json["revision"] = nullptr;
  write_json(folder / kConfig, json);
}

Adapter read_adapter(const std::filesystem::path& folder, const ModelConfig& base) {
  std::error_code code;
  const fs::path path = folder / kTensors;
  if (!fs::is_regular_file(path, code) && fs::is_regular_file(folder / "adapter_model.bin", code))
    throw InputError(fmt::format("{}: the adapter is stored as adapter_model.bin", folder.string()),
                     "save it with safe_serialization, as adapter_model.safetensors");
  const std::string file = (folder / kConfig).string();
  const Json json = read_json(folder / kConfig, std::uint64_t{16} << 20);
  if (!json.is_object()) throw CorruptFile(file, "is no JSON object");
  refuse_unknown_arithmetic(json, file);
  const auto known = projections(base);
  Adapter adapter;
  adapter.base = optional<std::string>(json, "base_model_name_or_path", "", file);
  LoraOptions& options = adapter.options;
  options.rank = optional<std::int64_t>(json, "r", 8, file);  // PEFT's defaults
  options.alpha = optional<double>(json, "lora_alpha", 8, file);
  options.dropout = optional<double>(json, "lora_dropout", 0, file);
  options.rslora = optional<bool>(json, "use_rslora", false, file);
  if (options.rank < 1 || options.rank > (std::int64_t{1} << 20))
    throw InputError(fmt::format("{}: \"r\" is {}, expected 1 to {}", file, options.rank, std::int64_t{1} << 20),
                     "it is the number of rows of every lora_A tensor");
  // The scale is applied in float32.
  if (!(std::abs(options.alpha) < 1e38))
    throw InputError(
        fmt::format("{}: \"lora_alpha\" is {}, expected a number that float32 can hold", file, options.alpha),
        "B A is added to the weights times lora_alpha / r; PEFT's default is 8");
  if (!(options.dropout >= 0 && options.dropout < 1))
    throw InputError(fmt::format("{}: \"lora_dropout\" is {}, expected 0 to 1", file, options.dropout),
                     "it has no effect on a trained adapter: 0 will do");
  options.targets = targets_of(json, file, base, known);

  const checkpoint::SafetensorsFile tensors(path);
  if (const auto found = tensors.metadata().find(kBaseFingerprint); found != tensors.metadata().end())
    adapter.base_fingerprint = found->second.substr(0, 64);
  std::map<std::string, std::vector<std::int64_t>> expected;
  for (const auto& [module, shape] : known) {
    if (std::find(options.targets.begin(), options.targets.end(), last_name(module)) == options.targets.end()) continue;
    expected[adapter_tensor(module, 'A')] = {options.rank, shape[1]};
    expected[adapter_tensor(module, 'B')] = {shape[0], options.rank};
  }
  for (const auto& [name, info] : tensors.tensors())
    if (!expected.contains(name))
      throw InputError(fmt::format("{}: tensor {} {} belongs to no module that {} adapts", path.string(), name,
                                   checkpoint::shape_text(info.shape), kConfig),
                       fmt::format("names are like {}", expected.begin()->first));
  for (const auto& [name, shape] : expected) {
    if (!tensors.has(name))
      throw InputError(fmt::format("{}: tensor {} {} is missing", path.string(), name, checkpoint::shape_text(shape)),
                       "the file holds a part of an adapter, or one for another model");
    const checkpoint::TensorInfo& info = tensors.info(name);
    if (info.shape != shape)
      throw InputError(
          fmt::format("{}: tensor {} has shape {}, {} and rank {} ask for {}", path.string(), name,
                      checkpoint::shape_text(info.shape), base.file, options.rank, checkpoint::shape_text(shape)),
          "the adapter was made for another model");
    const at::Tensor stored = tensors.view(name);
    if (!at::isFloatingType(stored.scalar_type()))
      throw InputError(
          fmt::format("{}: tensor {} holds {} numbers, expected F32, F16 or BF16", path.string(), name, info.dtype),
          "quantised adapters cannot be read");
    const at::Tensor value = stored.to(at::kFloat, /*non_blocking=*/false, /*copy=*/true);
    if (!at::isfinite(value).all().item<bool>())
      throw InputError(fmt::format("{}: tensor {} holds values that are not finite in float32", path.string(), name),
                       "its training diverged, or the file is damaged: take an earlier checkpoint of it");
    adapter.tensors[name] = value;
  }
  return adapter;
}

std::string adapter_hash(const Adapter& adapter) {
  Sha256 hash;
  hash.update(fmt::format("scale {}\n", adapter.options.scale()));
  for (const auto& [name, tensor] : adapter.tensors) {
    const at::Tensor value = tensor.to(at::kFloat).contiguous();
    hash.update(fmt::format("{} {}\n", name, checkpoint::shape_text(value.sizes().vec())));
    hash.update(std::span(static_cast<const std::byte*>(value.data_ptr()), value.nbytes()));
  }
  return hash.hex();
}

}  // namespace headfold::finetune
