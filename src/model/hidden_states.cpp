#include "hidden_states.h"

#include <headfold/base/error.h>
#include <headfold/model/compute.h>

#include <numeric>

namespace headfold::model {

HiddenStates::HiddenStates(const std::filesystem::path& folder, std::vector<std::vector<std::int64_t>> shapes,
                           at::ScalarType dtype)
    : shapes_(std::move(shapes)), dtype_(dtype), memory_(shapes_.size()) {
  if (folder.empty() || shapes_.size() < 2) return;
  std::uint64_t bytes = 0;
  for (const auto& shape : shapes_) {
    offsets_.push_back(bytes);
    bytes += std::accumulate(
                 shape.begin(), shape.end(), std::uint64_t{1},
                 [](std::uint64_t product, std::int64_t size) { return product * static_cast<std::uint64_t>(size); }) *
             c10::elementSize(dtype);
  }
  file_.emplace(PositionedFile::temporary(folder, bytes));
}

void HiddenStates::put(std::size_t index, const at::Tensor& states) {
  if (states.sizes() != at::IntArrayRef(shapes_.at(index)) || states.scalar_type() != dtype_)
    throw InternalError("hidden states of another shape or type than announced");
  if (!file_) {
    memory_[index] = to_host(states);
    return;
  }
  const at::Tensor whole = to_host(states.contiguous());
  file_->write(whole.data_ptr(), whole.nbytes(), offsets_[index]);
}

at::Tensor HiddenStates::take(std::size_t index) {
  if (!file_) return std::exchange(memory_.at(index), {}).to(compute().device);
  at::Tensor states = at::empty(shapes_.at(index), dtype_);
  file_->read(states.data_ptr(), states.nbytes(), offsets_[index]);
  return states.to(compute().device);
}

}  // namespace headfold::model
