#include "hidden_states.h"

#include <fcntl.h>
#include <headfold/base/error.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <numeric>

namespace headfold::model {
namespace {

constexpr const char* kFull = "free space there, or choose another folder for the output";

std::string reason() {
  return std::strerror(errno);
}

/// Calls `transfer(data, bytes, offset)`, which moves some bytes and says how many, until all are moved.
template <typename Transfer>
void move_all(const std::filesystem::path& folder, const char* what, char* data, std::uint64_t bytes,
              std::uint64_t offset, const Transfer& transfer) {
  constexpr std::uint64_t kMost = std::uint64_t{1} << 30;  // one call of the system moves less than 2 GiB
  while (bytes > 0) {
    const ssize_t n = transfer(data, static_cast<std::size_t>(std::min(bytes, kMost)), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0)
      throw IoError(folder.string(),
                    fmt::format("hidden states cannot be {}: {}", what, n < 0 ? reason() : "the file ends early"),
                    kFull);
    data += n;
    bytes -= static_cast<std::uint64_t>(n);
    offset += static_cast<std::uint64_t>(n);
  }
}

}  // namespace

HiddenStates::HiddenStates(const std::filesystem::path& folder, std::vector<std::vector<std::int64_t>> shapes,
                           at::ScalarType dtype)
    : folder_(folder), shapes_(std::move(shapes)), dtype_(dtype), memory_(shapes_.size()) {
  if (folder.empty() || shapes_.size() < 2) return;
  std::uint64_t bytes = 0;
  for (const auto& shape : shapes_) {
    offsets_.push_back(bytes);
    bytes += std::accumulate(
                 shape.begin(), shape.end(), std::uint64_t{1},
                 [](std::uint64_t product, std::int64_t size) { return product * static_cast<std::uint64_t>(size); }) *
             c10::elementSize(dtype);
  }
  std::string name = (folder / ".headfold-hidden-XXXXXX").string();
  fd_ = ::mkstemp(name.data());
  if (fd_ < 0) throw IoError(folder.string(), "no temporary file can be made there: " + reason());
  ::unlink(name.c_str());
  // A full disk shows now, not in the middle of a layer; a file system that cannot reserve says EOPNOTSUPP.
  if (::fallocate(fd_, 0, 0, static_cast<off_t>(bytes)) != 0 &&
      (errno == ENOSPC || errno == EDQUOT || errno == EFBIG)) {
    const std::string why = reason();
    ::close(fd_);
    throw IoError(folder.string(), fmt::format("{} bytes of hidden states cannot be kept there: {}", bytes, why),
                  kFull);
  }
}

HiddenStates::~HiddenStates() {
  if (fd_ >= 0) ::close(fd_);
}

void HiddenStates::put(std::size_t index, const at::Tensor& states) {
  if (states.sizes() != at::IntArrayRef(shapes_.at(index)) || states.scalar_type() != dtype_)
    throw InternalError("hidden states of another shape or type than announced");
  if (fd_ < 0) {
    memory_[index] = states;
    return;
  }
  const at::Tensor whole = states.contiguous();
  move_all(folder_, "written", static_cast<char*>(whole.data_ptr()), whole.nbytes(), offsets_[index],
           [this](char* data, std::size_t bytes, off_t offset) { return ::pwrite(fd_, data, bytes, offset); });
}

at::Tensor HiddenStates::take(std::size_t index) {
  if (fd_ < 0) return std::move(memory_.at(index));
  at::Tensor states = at::empty(shapes_.at(index), dtype_);
  move_all(folder_, "read", static_cast<char*>(states.data_ptr()), states.nbytes(), offsets_[index],
           [this](char* data, std::size_t bytes, off_t offset) { return ::pread(fd_, data, bytes, offset); });
  return states;
}

}  // namespace headfold::model
