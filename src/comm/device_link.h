#pragma once
// Transfers between ranks of tensors in the memory of their GPUs: by NCCL, or through the host by MPI.

#include <ATen/ATen.h>
#include <headfold/comm/communicator.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace headfold::comm {

/// How tensors travel. `automatic`: NCCL where every rank has a GPU of its own and this build contains NCCL, otherwise
/// MPI.
enum class Transport { automatic, nccl, mpi };
/// "auto", "nccl", "mpi".
std::string_view name_of(Transport transport);
/// The transport of that name. UsageError for any other.
Transport transport_of(std::string_view name);

/// One tensor of DeviceLink::exchange().
struct Transfer {
  enum class Kind { send, receive };
  Kind kind = Kind::send;
  at::Tensor values;
  int peer = 0;  ///< rank in the link's group
};

class LinkBackend;  // private: link_backend.h

/// The ranks of a group, linked for tensors that lie on their GPUs (or all in host memory, by MPI). All tensors are
/// contiguous and lie on the rank's device: InternalError otherwise, before anything is started. Transfers see what the
/// legacy default stream (libtorch's) has been given before they are started, run beside what it is given afterwards,
/// and hold their tensors, whose content belongs to the transfer until wait() is over. All but exchange() are
/// collective: every rank starts the same ones in the same order as the group's other operations.
///
/// Every wait looks for asynchronous errors of NCCL, stands on the watchdog's board, and ends after timeout_seconds():
/// by the watchdog, or in a process without one by an MpiFailure, which also tells failures of NCCL; the link is
/// unusable then. With `mpi` and GPU tensors, starting waits for the default stream, and the result reaches the GPU in
/// wait().
class DeviceLink {
 public:
  /// Collective over `group`. `device`: this rank's GPU (device::choose_gpus), or -1 for tensors in host memory. For
  /// `nccl`: NotCompiled in a build without it, UsageError where ranks share a GPU or have none (`--share-gpus` is for
  /// `mpi`). DeviceFailure on every rank when one cannot use its GPU.
  DeviceLink(const Communicator& group, int device, Transport transport = Transport::automatic);
  /// Collective, unless an exception is on its way: NCCL's communicator is finished together, or aborted.
  ~DeviceLink();
  DeviceLink(const DeviceLink&) = delete;
  DeviceLink& operator=(const DeviceLink&) = delete;

  /// Never `automatic`.
  Transport transport() const { return transport_; }
  int device() const { return device_; }
  const Communicator& group() const { return group_; }

  /// Sum over ranks of `values`, float32 or float64 of any shape, in place; the same bits on every rank. With `mpi`,
  /// float64 is complete when the call returns.
  [[nodiscard]] Request all_reduce(const at::Tensor& values) const;
  /// Sum over ranks of `values` [n] float32; rank r receives counts[r] elements of it, those after the lower ranks', in
  /// `own` [counts[r]], another tensor. With `mpi`, n is at most 2^31 - 1.
  [[nodiscard]] Request reduce_scatter(const at::Tensor& values, const at::Tensor& own,
                                       const std::vector<std::int64_t>& counts) const;
  /// In place: rank r gives counts[r] elements of `values` [n] float32, those after the lower ranks', and receives the
  /// others. With `mpi`, n is at most 2^31 - 1.
  [[nodiscard]] Request all_gather(const at::Tensor& values, const std::vector<std::int64_t>& counts) const;
  /// `values` of `root`, of any dtype and shape, to all. Returns when they are there.
  void broadcast(const at::Tensor& values, int root) const;
  /// Tensors to and from other ranks (not to oneself) as one group, so that they may depend on one another. Not
  /// collective. Tensors between two ranks are matched in the order in which they are started; `tag`, the same on both
  /// sides, names them for MPI and the watchdog. With `nccl` the transfers of a link are done in the order in which
  /// they were started, so that a receive holds up all that comes after it until its tensor is sent (use a link for
  /// each direction), and the first exchange with a rank waits until that rank has started its part.
  [[nodiscard]] Request exchange(const std::vector<Transfer>& transfers, int tag) const;

 private:
  void require_here(const at::Tensor& values, std::string_view what) const;
  void require_counts(const at::Tensor& values, const std::vector<std::int64_t>& counts, std::string_view what) const;

  Communicator group_;
  int device_;
  Transport transport_;
  std::unique_ptr<LinkBackend> backend_;
};

/// What is known of a rank when a transport is chosen.
struct LinkSeat {
  std::string host;
  std::string gpu;  ///< machine and address of its GPU; empty: none
};
/// The transport for ranks on `seats`; `compiled`: this build contains NCCL. Errors as DeviceLink's constructor.
Transport choose_transport(Transport asked, const std::vector<LinkSeat>& seats, bool compiled);

/// Whether this build contains NCCL.
bool nccl_compiled();
/// The version of the NCCL library this process has loaded, "2.28.9"; empty without one.
std::string nccl_version();

}  // namespace headfold::comm
