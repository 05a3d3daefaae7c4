#pragma once
// Private: what a DeviceLink's transport must provide. Tensors, counts and ranks are checked by DeviceLink.

#include <headfold/comm/device_link.h>

#include <memory>
#include <vector>

namespace headfold::comm {

class LinkBackend {
 public:
  using Started = std::unique_ptr<Request::State>;
  virtual ~LinkBackend() = default;
  virtual Started all_reduce(const at::Tensor& values) = 0;
  virtual Started reduce_scatter(const at::Tensor& values, const at::Tensor& own,
                                 const std::vector<std::int64_t>& counts) = 0;
  virtual Started all_gather(const at::Tensor& values, const std::vector<std::int64_t>& counts) = 0;
  virtual Started broadcast(const at::Tensor& values, int root) = 0;
  virtual Started exchange(const std::vector<Transfer>& transfers, int tag) = 0;
};

/// Through host memory by MPI. NotCompiled for a GPU in a build without CUDA.
std::unique_ptr<LinkBackend> make_staged_link(const Communicator& group, int device);
/// Collective. NotCompiled in a build without NCCL.
std::unique_ptr<LinkBackend> make_nccl_link(const Communicator& group, int device);

}  // namespace headfold::comm
