#pragma once
// Private: hidden states of micro-batches between two layers of a streamed run.

#include <ATen/ATen.h>
#include <headfold/base/positioned_file.h>

#include <cstdint>
#include <filesystem>
#include <optional>
#include <vector>

namespace headfold::model {

/// Hidden states of known shapes, in memory or in a file without a name, so that what is held does not grow with the
/// number of micro-batches.
class HiddenStates {
 public:
  /// Memory for an empty `folder` or a single micro-batch; otherwise a temporary file in `folder` that disappears with
  /// the process. Throws IoError, also when the space does not suffice.
  HiddenStates(const std::filesystem::path& folder, std::vector<std::vector<std::int64_t>> shapes,
               at::ScalarType dtype);
  /// Keeps the states of micro-batch `index`, of its shape and dtype (InternalError otherwise). IoError.
  void put(std::size_t index, const at::Tensor& states);
  /// Hands them out; memory is given up. IoError.
  at::Tensor take(std::size_t index);

 private:
  std::vector<std::vector<std::int64_t>> shapes_;
  at::ScalarType dtype_;
  std::vector<at::Tensor> memory_;
  std::vector<std::uint64_t> offsets_;
  std::optional<PositionedFile> file_;
};

}  // namespace headfold::model
