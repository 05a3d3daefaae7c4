#pragma once
// A Hugging Face model folder: config, one or many safetensors shards, tensors by name.

#include <headfold/checkpoint/config.h>
#include <headfold/checkpoint/safetensors.h>

#include <memory>
#include <string>
#include <vector>

namespace headfold::checkpoint {

/// Opens a folder with config.json and model.safetensors, or else model.safetensors.index.json and its shards. All
/// shards are mapped and their headers checked at once (pages are read on use). Throws IoError (missing folder, file or
/// shard), CorruptFile (index and shard disagree, path traversal in the index). A name is looked up as given, then with
/// and without the family's prefix ("model." / "transformer."), and with tied embeddings the other one of the two tied
/// tables stands in for an absent one. Safe for many threads.
class Reader {
 public:
  explicit Reader(const std::filesystem::path& folder);
  const std::filesystem::path& folder() const { return folder_; }
  const ModelConfig& config() const { return config_; }
  /// Stored names of the model's tensors, sorted: without rotary_emb.inv_freq and those that config.json has no place
  /// for (a warning told of them when the folder was opened), which no other loader would look at either.
  std::vector<std::string> names() const;
  bool has(const std::string& name) const;
  const TensorInfo& info(const std::string& name) const;
  /// Stored name for a canonical one, or empty when absent.
  std::string resolve(const std::string& name) const;
  /// View of the mapped data in the stored dtype.
  at::Tensor view(const std::string& name) const;
  /// File that holds a tensor.
  const std::filesystem::path& file_of(const std::string& name) const;
  /// The files that hold tensors, in order of name.
  std::vector<std::filesystem::path> files() const;
  /// view() of a weight: InputError naming file and tensor where it is absent, has another shape (both are named) or a
  /// dtype other than F64, F32, F16, BF16.
  at::Tensor weight(const std::string& name, const std::vector<std::int64_t>& shape) const;
  /// A copy of weight() in `dtype`. Pages of the file are let go while a large tensor is copied.
  at::Tensor load(const std::string& name, const std::vector<std::int64_t>& shape, at::ScalarType dtype) const;
  /// Tells the kernel that a tensor's pages will be read soon.
  void will_need(const std::string& name) const;
  /// Tells the kernel that a tensor's pages are no longer needed (streaming through models larger than memory).
  void done_with(const std::string& name) const;
  /// Total bytes of all tensors.
  std::uint64_t total_bytes() const;
  /// SHA-256 over config.json, and of each shard its size, header and evenly spaced samples (whole content up to 64
  /// MiB): identifies a checkpoint in seconds even on a network file system.
  std::string fingerprint() const;

 private:
  struct State;
  void finish();
  std::filesystem::path folder_;
  ModelConfig config_;
  std::shared_ptr<State> state_;
};

}  // namespace headfold::checkpoint
