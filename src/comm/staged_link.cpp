// Tensors that travel by MPI: those of the host where they lie, those of a GPU through page-locked copies.

#include <headfold/base/cuda.h>
#include <headfold/base/error.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "link_backend.h"

namespace headfold::comm {
namespace {

std::size_t size_in_bytes(const at::Tensor& values) {
  return static_cast<std::size_t>(values.numel()) * values.element_size();
}

#ifdef HEADFOLD_WITH_CUDA
/// Page-locked buffers that are not in use: locking pages takes longer than copying them.
class PinnedPool {
 public:
  cuda::PinnedMemory take(std::size_t bytes) {
    const auto found = std::find_if(free_.begin(), free_.end(),
                                    [&](const cuda::PinnedMemory& memory) { return memory.size() >= bytes; });
    if (found == free_.end()) return cuda::PinnedMemory(bytes);
    cuda::PinnedMemory memory = std::move(*found);
    free_.erase(found);
    return memory;
  }
  void give_back(cuda::PinnedMemory memory) { free_.push_back(std::move(memory)); }

 private:
  std::vector<cuda::PinnedMemory> free_;
};
#else
class PinnedPool {};
#endif

/// The host's side of a tensor: its own memory, or a page-locked copy.
class HostSide {
 public:
  HostSide(at::Tensor tensor, std::shared_ptr<PinnedPool> pool) : tensor_(std::move(tensor)), pool_(std::move(pool)) {
#ifdef HEADFOLD_WITH_CUDA
    if (tensor_.is_cuda()) copy_ = pool_->take(std::max<std::size_t>(size_in_bytes(tensor_), 1));
#endif
  }
  ~HostSide() {
#ifdef HEADFOLD_WITH_CUDA
    if (copy_.size() > 0) pool_->give_back(std::move(copy_));
#endif
  }
  HostSide(HostSide&&) = default;
  HostSide& operator=(HostSide&&) = delete;

  template <class T>
  std::span<T> values() const {
    return {static_cast<T*>(memory()), size_in_bytes(tensor_) / sizeof(T)};
  }
  /// From the GPU, `count` elements from `begin` on; waits for all that its default stream was given.
  void fetch(std::int64_t begin, std::int64_t count) {
    copy(begin, count, false);
  }
  void fetch() {
    copy(0, tensor_.numel(), false);
  }
  /// To the GPU.
  void store() {
    copy(0, tensor_.numel(), true);
  }

 private:
  void* memory() const {
#ifdef HEADFOLD_WITH_CUDA
    if (tensor_.is_cuda()) return copy_.as();
#endif
    return tensor_.data_ptr();
  }
  void copy([[maybe_unused]] std::int64_t begin, [[maybe_unused]] std::int64_t count, [[maybe_unused]] bool to_device) {
#ifdef HEADFOLD_WITH_CUDA
    if (!tensor_.is_cuda() || count == 0) return;
    const cuda::UseDevice use(tensor_.device().index());
    const std::size_t at = static_cast<std::size_t>(begin) * tensor_.element_size();
    const std::size_t bytes = static_cast<std::size_t>(count) * tensor_.element_size();
    char* there = static_cast<char*>(tensor_.data_ptr()) + at;
    char* here = copy_.as<char>() + at;
    if (to_device)
      cuda::check(cudaMemcpy(there, here, bytes, cudaMemcpyHostToDevice), "copy to the device");
    else
      cuda::check(cudaMemcpy(here, there, bytes, cudaMemcpyDeviceToHost), "copy from the device");
#endif
  }

  at::Tensor tensor_;
  std::shared_ptr<PinnedPool> pool_;
#ifdef HEADFOLD_WITH_CUDA
  cuda::PinnedMemory copy_;
#endif
};

/// Transfers under way, and the tensors that receive something by them.
struct StagedRequest : Request::State {
  void wait() override {
    for (Request& transfer : transfers) transfer.wait();
    for (HostSide& side : received) side.store();
  }
  bool test() override {
    return std::all_of(transfers.begin(), transfers.end(), [](Request& transfer) { return transfer.test(); });
  }
  // Destroyed last to first: transfers end before their memory does.
  std::vector<HostSide> received, sent;
  std::vector<Request> transfers;
};

class StagedLink : public LinkBackend {
 public:
  explicit StagedLink(const Communicator& group) : group_(group) {}

  Started all_reduce(const at::Tensor& values) override {
    auto request = std::make_unique<StagedRequest>();
    HostSide& side = request->received.emplace_back(values, pool_);
    side.fetch();
    if (values.scalar_type() == at::kDouble)
      group_.all_reduce(side.values<double>());
    else
      request->transfers.push_back(group_.start_sum(side.values<float>()));
    return request;
  }

  Started reduce_scatter(const at::Tensor& values, const at::Tensor& own,
                         const std::vector<std::int64_t>& counts) override {
    auto request = std::make_unique<StagedRequest>();
    HostSide& from = request->sent.emplace_back(values, pool_);
    HostSide& to = request->received.emplace_back(own, pool_);
    from.fetch();
    request->transfers.push_back(group_.start_reduce_scatter(from.values<float>(), to.values<float>(), counts));
    return request;
  }

  Started all_gather(const at::Tensor& values, const std::vector<std::int64_t>& counts) override {
    auto request = std::make_unique<StagedRequest>();
    HostSide& side = request->received.emplace_back(values, pool_);
    const auto rank = static_cast<std::size_t>(group_.rank());
    side.fetch(std::accumulate(counts.begin(), counts.begin() + group_.rank(), std::int64_t{0}), counts[rank]);
    request->transfers.push_back(group_.start_all_gather(side.values<float>(), counts));
    return request;
  }

  Started broadcast(const at::Tensor& values, int root) override {
    auto request = std::make_unique<StagedRequest>();
    auto& sides = group_.rank() == root ? request->sent : request->received;
    HostSide& side = sides.emplace_back(values, pool_);
    if (group_.rank() == root) side.fetch();
    group_.broadcast(side.values<std::byte>(), root);
    return request;
  }

  Started exchange(const std::vector<Transfer>& transfers, int tag) override {
    auto request = std::make_unique<StagedRequest>();
    // MPI keeps addresses of their memory, not of the sides.
    for (const Transfer& transfer : transfers) {
      if (transfer.kind != Transfer::Kind::receive) continue;
      HostSide& side = request->received.emplace_back(transfer.values, pool_);
      request->transfers.push_back(group_.irecv(side.values<std::byte>(), transfer.peer, tag));
    }
    for (const Transfer& transfer : transfers) {
      if (transfer.kind != Transfer::Kind::send) continue;
      HostSide& side = request->sent.emplace_back(transfer.values, pool_);
      side.fetch();
      request->transfers.push_back(group_.isend(side.values<std::byte>(), transfer.peer, tag));
    }
    return request;
  }

 private:
  Communicator group_;
  std::shared_ptr<PinnedPool> pool_ = std::make_shared<PinnedPool>();
};

}  // namespace

std::unique_ptr<LinkBackend> make_staged_link(const Communicator& group, [[maybe_unused]] int device) {
#ifndef HEADFOLD_WITH_CUDA
  if (device >= 0) throw NotCompiled("CUDA", "HEADFOLD_CUDA=ON");
#endif
  return std::make_unique<StagedLink>(group);
}

}  // namespace headfold::comm
