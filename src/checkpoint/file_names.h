#pragma once
// Private to checkpoint: how Hugging Face names the files of a model.

namespace headfold::checkpoint {

constexpr const char* kSingle = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";

}  // namespace headfold::checkpoint
