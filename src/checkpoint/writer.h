#pragma once
// Writing a Hugging Face model folder from many ranks at once.

#include <headfold/base/json.h>
#include <headfold/checkpoint/safetensors.h>
#include <headfold/comm/communicator.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

namespace headfold::checkpoint {

/// File that stands in a folder while a checkpoint is being written to it, and stays there when the writer was killed:
/// the folder's content is then headfold's own and may be replaced by the same command run again.
inline constexpr const char* kUnfinishedMarker = ".headfold-unfinished";

/// Every rank constructs it with the same list (collective). Shards, their headers and all offsets follow from the list
/// alone, so any rank can write any tensor at its place, in any order, at the same time. Shard files appear as *.tmp
/// and are renamed in finish(); the index comes last. One shard gives "model.safetensors" without an index. Bytes do
/// not depend on the number of ranks. Throws IoError (also when the free space does not suffice, before anything is
/// written).
class ParallelWriter {
 public:
  ParallelWriter(const comm::Communicator& world, const std::filesystem::path& folder, std::vector<TensorSpec> tensors,
                 std::uint64_t max_shard_bytes = std::uint64_t{5} << 30);
  ~ParallelWriter();  ///< removes the temporaries of a write that was not finished
  /// Writes one tensor; dtype and shape must be those of its spec (InternalError otherwise). Not collective.
  void write(const std::string& name, const at::Tensor& tensor);
  /// Writes elements `[first, first + part.numel())` (row-major) of a tensor, for tensors too large for one rank or for
  /// memory. Every element must be written once over all ranks.
  void write_part(const std::string& name, std::int64_t first, const at::Tensor& part);
  /// Bytes of all files, headers included.
  std::uint64_t total_bytes() const;
  /// Collective: checks that every tensor was written exactly once over all ranks, fsyncs, renames, then rank 0 writes
  /// `config` as config.json, the files of `copies` (source paths, same file name; missing ones are skipped, those that
  /// are in the folder already stay), `headfold.json` (unless null), and the index last. What an earlier result left in
  /// the folder (is_model_file) and this one does not have is removed first, weights before all else, so that the
  /// folder never holds a mixture that loads and in the end holds this model alone. Until then it is as it was.
  void finish(const Json& config, const OrderedJson& headfold, const std::vector<std::filesystem::path>& copies);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// How tensors are cut into shards: file names in order, and for every tensor of the list its shard. Shards are filled
/// in the order of the list; one that would exceed `max_shard_bytes` of tensor data begins the next (a larger tensor
/// stands alone).
struct ShardPlan {
  std::vector<std::string> files;
  std::vector<std::size_t> shard_of;
  std::uint64_t tensor_bytes = 0;
};
ShardPlan plan_shards(const std::vector<TensorSpec>& tensors, std::uint64_t max_shard_bytes);

/// Whether a file of this name belongs to a model that headfold wrote: config.json, shards and index,
/// companion_files(), and what its jobs put beside them (headfold.json, convert.json, plan.json, verification.json).
bool is_model_file(const std::string& name);

/// Whether a folder holds a model, whole as far as the presence of its files tells.
bool holds_model(const std::filesystem::path& folder);

/// Tokenizer and generation files that a model folder may hold, as paths in `folder`; only those that exist.
std::vector<std::filesystem::path> companion_files(const std::filesystem::path& folder);

/// What distinguishes the companion files of `folder` from `sources`, whose copies they should be: one sentence per
/// file that is missing, differs or has no source. Empty when nothing does.
std::vector<std::string> companion_problems(const std::filesystem::path& folder,
                                            const std::vector<std::filesystem::path>& sources);

}  // namespace headfold::checkpoint
