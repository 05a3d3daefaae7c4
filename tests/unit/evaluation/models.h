#pragma once
// Models and texts of the demo, and broken or altered copies of them.

#include <headfold/base/files.h>
#include <headfold/checkpoint/reader.h>
#include <headfold/evaluation/tasks.h>

#include <filesystem>

#include "world.h"

namespace headfold::evaluation {

inline std::filesystem::path demo_model(const std::string& name) {
  return testing_support::source_folder() / "demo" / "models" / name;
}
inline TextSource heldout() {
  return {.files = {testing_support::source_folder() / "demo" / "text" / "heldout.jsonl"}};
}

/// A copy of a one-file model whose first layer's MLP output weights are multiplied by 1 + `amount` (NaN breaks it).
/// Rank 0 writes; collective.
inline std::filesystem::path perturbed(const std::filesystem::path& from, const std::filesystem::path& to,
                                       double amount) {
  testing_support::world().on_root([&] {
    std::filesystem::create_directories(to);
    for (const auto& entry : std::filesystem::directory_iterator(from))
      if (entry.path().filename() != "model.safetensors")
        headfold::copy_file(entry.path(), to / entry.path().filename());
    const checkpoint::SafetensorsFile file(from / "model.safetensors");
    std::map<std::string, at::Tensor> tensors;
    bool changed = false;
    for (const auto& [name, info] : file.tensors()) {
      tensors[name] = file.view(name).clone();
      const bool target =
          name.ends_with("layers.0.mlp.down_proj.weight") || name.ends_with("h.0.mlp.dense_4h_to_h.weight");
      if (target) tensors[name].mul_(1.0 + amount);
      changed = changed || target;
    }
    if (!changed) throw InputError("no tensor to perturb in " + from.string());
    checkpoint::write_safetensors(to / "model.safetensors", tensors);
  });
  return to;
}

}  // namespace headfold::evaluation
