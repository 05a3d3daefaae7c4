#pragma once
// Small models on disk and batches for tests of healing.

#include <headfold/base/files.h>
#include <headfold/finetune/trainable.h>

#include "small_models.h"
#include "world.h"

namespace headfold::finetune::testing_support {

namespace forms = model::testing_models;

/// A configuration for parametrised tests.
struct Form {
  std::string name;
  Json json;
};
inline void PrintTo(const Form& form, std::ostream* out) {
  *out << form.name;
}
/// Every configuration the decoder knows, small.
inline std::vector<Form> all_forms() {
  std::vector<Form> all;
  for (auto& [name, json] : forms::all_forms()) all.push_back({name, json});
  return all;
}

/// A random model of a configuration in a folder of its own; one rank writes it.
inline checkpoint::Reader write_model(const std::filesystem::path& folder, const Json& json, std::uint64_t seed = 1) {
  headfold::testing_support::world().on_root([&] {
    make_folder(folder);
    forms::make_model(json, seed).write(folder);
  });
  headfold::testing_support::world().barrier("model written");
  return checkpoint::Reader(folder);
}

/// All projections of either family.
inline LoraOptions adapt_all(std::int64_t rank = 3, double dropout = 0) {
  LoraOptions options;
  options.rank = rank;
  options.alpha = 5;
  options.dropout = dropout;
  options.targets = {"q", "k", "v", "o", "gate", "up", "down"};
  return options;
}

inline LoraOptions train_all() {
  LoraOptions options;
  options.full = true;
  return options;
}

inline LoraOptions frozen() {
  LoraOptions options;
  options.targets.clear();
  return options;
}

inline at::Tensor random_ids(std::int64_t batch, std::int64_t tokens, std::int64_t vocab, std::uint64_t seed) {
  at::Generator generator = at::detail::createCPUGenerator(seed);
  return at::randint(vocab, {batch, tokens}, generator, at::TensorOptions().dtype(at::kLong));
}

/// Random tokens, each predicting the next; the last position of a sequence is not scored.
inline Batch plain_batch(std::int64_t batch, std::int64_t tokens, std::int64_t vocab, std::uint64_t seed = 3) {
  Batch made;
  made.ids = random_ids(batch, tokens, vocab, seed);
  made.targets = at::full({batch, tokens}, -1, at::kLong);
  made.targets.slice(1, 0, tokens - 1).copy_(made.ids.slice(1, 1));
  return made;
}

/// Two sequences of 11 tokens with segments, holes between what is scored, and numbers of their own.
inline Batch segmented_batch(std::int64_t vocab) {
  Batch made = plain_batch(2, 11, vocab);
  made.segments = at::zeros({2, 11}, at::kLong);
  made.segments[1].slice(0, 4, 9).fill_(7);
  made.segments[1].slice(0, 9).fill_(2);
  for (const auto& [sequence, token] : {std::pair(0, 0), {0, 5}, {1, 3}, {1, 8}, {1, 9}})
    made.targets[sequence][token] = -1;
  made.numbers = at::tensor({5, 2}, at::kLong);
  return made;
}

/// B of adapters starts at 0, which would hide most of what they do.
inline void fill_adapters(TrainableModel& model, std::uint64_t seed = 11, double spread = 0.1) {
  at::Generator generator = at::detail::createCPUGenerator(seed);
  for (Parameter& parameter : model.parameters())
    if (parameter.name.find(".lora_B.") != std::string::npos)
      parameter.value.copy_(at::randn(parameter.value.sizes(), generator, parameter.value.options()) * spread);
}

inline void clear_gradients(TrainableModel& model) {
  for (Parameter& parameter : model.parameters()) parameter.gradient.zero_();
}

inline std::vector<at::Tensor> gradients(TrainableModel& model) {
  std::vector<at::Tensor> all;
  for (Parameter& parameter : model.parameters()) all.push_back(parameter.gradient.clone());
  return all;
}

/// max |a - b| / max |b| over all tensors together.
inline double difference(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  double largest = 0, size = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    largest = std::max(largest, (a[i].to(at::kDouble) - b[i].to(at::kDouble)).abs().max().item<double>());
    size = std::max(size, b[i].to(at::kDouble).abs().max().item<double>());
  }
  return largest / size;
}

}  // namespace headfold::finetune::testing_support
