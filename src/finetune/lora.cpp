#include <headfold/base/error.h>
#include <headfold/base/hash.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/finetune/lora.h>

#include <set>

namespace headfold::finetune {
namespace {

using checkpoint::Family;

/// A family's projections with the short name of each, in the model's order. Fused BLOOM: q, k and v are one.
std::vector<std::pair<std::string, std::vector<std::string>>> projections_of(const checkpoint::ModelConfig& config) {
  if (config.family == Family::llama)
    return {{"q_proj", {"q"}},       {"k_proj", {"k"}},   {"v_proj", {"v"}},      {"o_proj", {"o"}},
            {"gate_proj", {"gate"}}, {"up_proj", {"up"}}, {"down_proj", {"down"}}};
  std::vector<std::pair<std::string, std::vector<std::string>>> modules;
  if (config.split_qkv) {
    modules = {{"query", {"q"}}, {"key", {"k"}}, {"value", {"v"}}};
  } else {
    modules = {{"query_key_value", {"q", "k", "v"}}};
  }
  modules.push_back({"dense", {"o"}});
  modules.push_back({"dense_h_to_4h", {"up", "gate"}});
  modules.push_back({"dense_4h_to_h", {"down"}});
  return modules;
}

}  // namespace

double LoraOptions::scale() const {
  const auto r = static_cast<double>(rank);
  return rslora ? alpha / std::sqrt(r) : alpha / r;
}

std::vector<std::string> target_modules(const LoraOptions& options, const checkpoint::ModelConfig& config) {
  const auto projections = projections_of(config);
  std::set<std::string> wanted;
  for (const std::string& target : options.targets) {
    bool found = false;
    for (const auto& [name, short_names] : projections) {
      if (target != name && std::find(short_names.begin(), short_names.end(), target) == short_names.end()) continue;
      wanted.insert(name);
      found = true;
    }
    // PEFT's own default for BLOOM means the three projections that a fold separated.
    if (target == "query_key_value" && config.family == Family::bloom && config.split_qkv) {
      wanted.insert({"query", "key", "value"});
      found = true;
    }
    if (found) continue;
    std::vector<std::string> names;
    names.reserve(projections.size());
    for (const auto& [name, short_names] : projections)
      names.push_back(fmt::format("{} ({})", name, fmt::join(short_names, ", ")));
    throw InputError(fmt::format("target module \"{}\": {} has no such projection", target, config.file),
                     fmt::format("it has {}", fmt::join(names, ", ")));
  }
  std::vector<std::string> modules;
  for (const auto& projection : projections)
    if (wanted.contains(projection.first)) modules.push_back(projection.first);
  return modules;
}

std::string adapter_tensor(const std::string& module, char which) {
  return fmt::format("base_model.model.{}.lora_{}.weight", module, which);
}

at::Tensor initial_a(const std::string& module, const LoraOptions& options, std::int64_t in) {
  const std::string digest = sha256_hex(fmt::format("{}|{}", options.seed, module));
  at::Generator generator = at::detail::createCPUGenerator(std::stoull(digest.substr(0, 16), nullptr, 16));
  // Kaiming-uniform: sqrt(6 / ((1 + a^2) in)) with a = sqrt 5.
  const double bound = 1 / std::sqrt(static_cast<double>(in));
  return at::empty({options.rank, in}, at::kFloat).uniform_(-bound, bound, generator);
}

}  // namespace headfold::finetune
