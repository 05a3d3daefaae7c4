#include <headfold/base/cuda.h>
#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/base/json.h>
#include <headfold/base/log.h>
#include <headfold/comm/device_link.h>

#include <algorithm>
#include <map>
#include <numeric>

#include "link_backend.h"

namespace headfold::comm {
namespace {

/// Machine and address of this process's GPU `device`: the same for two ranks that would share it.
std::string gpu_identity(int device) {
  if (device < 0) return {};
#ifdef HEADFOLD_WITH_CUDA
  char address[32] = {};
  cuda::check(cudaDeviceGetPCIBusId(address, sizeof(address), device), "cudaDeviceGetPCIBusId");
  // Names of hosts may be virtual; the kernel's number is not.
  return read_file("/proc/sys/kernel/random/boot_id") + address;
#else
  throw NotCompiled("CUDA", "HEADFOLD_CUDA=ON");
#endif
}

/// What every rank knows of itself, and whether it cannot use its GPU: told to all, so that none waits for it.
std::vector<LinkSeat> seats_of(const Communicator& group, int device) {
  Json own;
  own["host"] = host_name();
  try {
    own["gpu"] = gpu_identity(device);
  } catch (const Error& error) {
    own["failure"] = error.what();
  }
  std::vector<LinkSeat> seats;
  for (const std::string& text : group.all_gather(own.dump(-1, ' ', false, Json::error_handler_t::replace))) {
    const Json one = Json::parse(text);
    const auto host = one.at("host").get<std::string>();
    if (one.contains("failure"))
      throw DeviceFailure(
          fmt::format("rank {} on {} cannot use its GPU: {}", seats.size(), host, one.at("failure").get<std::string>()),
          "--device cpu computes without; nvidia-smi shows whether the driver works");
    seats.push_back({host, one.at("gpu").get<std::string>()});
  }
  return seats;
}

/// Why NCCL cannot link these ranks; empty when it can.
std::string obstacle(const std::vector<LinkSeat>& seats) {
  std::map<std::string, std::size_t> takers;
  for (std::size_t rank = 0; rank < seats.size(); ++rank) {
    if (seats[rank].gpu.empty()) return fmt::format("rank {} on {} has no GPU", rank, seats[rank].host);
    const auto [taker, first] = takers.try_emplace(seats[rank].gpu, rank);
    if (!first) return fmt::format("ranks {} and {} on {} share a GPU", taker->second, rank, seats[rank].host);
  }
  return {};
}

}  // namespace

std::string_view name_of(Transport transport) {
  switch (transport) {
    case Transport::automatic:
      return "auto";
    case Transport::nccl:
      return "nccl";
    case Transport::mpi:
      return "mpi";
  }
  throw InternalError("unknown transport");
}

Transport transport_of(std::string_view name) {
  for (const Transport transport : {Transport::automatic, Transport::nccl, Transport::mpi})
    if (name_of(transport) == name) return transport;
  throw UsageError(fmt::format("unknown transport '{}'", name), "one of auto, nccl, mpi");
}

Transport choose_transport(Transport asked, const std::vector<LinkSeat>& seats, bool compiled) {
  if (asked == Transport::mpi) return asked;
  if (!compiled) {
    if (asked == Transport::nccl) throw NotCompiled("NCCL", "HEADFOLD_CUDA=ON");
    return Transport::mpi;
  }
  const std::string why_not = obstacle(seats);
  if (why_not.empty()) return Transport::nccl;
  if (asked == Transport::nccl)
    throw UsageError(fmt::format("NCCL cannot link these ranks: {}", why_not),
                     "give every rank a GPU of its own, or let tensors travel by MPI (transport auto or mpi)");
  return Transport::mpi;
}

DeviceLink::DeviceLink(const Communicator& group, int device, Transport transport)
    : group_(group),
      device_(device),
      transport_(choose_transport(transport, seats_of(group, device), nccl_compiled())),
      backend_(transport_ == Transport::nccl ? make_nccl_link(group, device) : make_staged_link(group, device)) {}

DeviceLink::~DeviceLink() = default;

void DeviceLink::require_here(const at::Tensor& values, std::string_view what) const {
  if (!values.defined()) throw InternalError(fmt::format("{} of an undefined tensor", what));
  const bool here = device_ < 0 ? values.device().is_cpu() : values.is_cuda() && values.device().index() == device_;
  if (!here || !values.is_contiguous())
    throw InternalError(fmt::format("{} of a tensor on {}{}; the link's are contiguous, on {}", what,
                                    values.device().str(), values.is_contiguous() ? "" : ", not contiguous",
                                    device_ < 0 ? "the CPU" : fmt::format("cuda:{}", device_)));
}

void DeviceLink::require_counts(const at::Tensor& values, const std::vector<std::int64_t>& counts,
                                std::string_view what) const {
  require_here(values, what);
  if (values.scalar_type() != at::kFloat)
    throw InternalError(fmt::format("{} of {}, wants float32", what, c10::toString(values.scalar_type())));
  const std::int64_t sum = std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
  const bool negative = std::any_of(counts.begin(), counts.end(), [](std::int64_t count) { return count < 0; });
  if (static_cast<int>(counts.size()) != group_.size() || sum != values.numel() || negative)
    throw InternalError(fmt::format("{} of {} values on {} ranks with {} counts that add up to {}", what,
                                    values.numel(), group_.size(), counts.size(), sum));
}

Request DeviceLink::all_reduce(const at::Tensor& values) const {
  require_here(values, "all-reduce");
  if (values.scalar_type() != at::kFloat && values.scalar_type() != at::kDouble)
    throw InternalError(fmt::format("all-reduce of {}, wants float32 or float64", c10::toString(values.scalar_type())));
  return Request(backend_->all_reduce(values));
}

Request DeviceLink::reduce_scatter(const at::Tensor& values, const at::Tensor& own,
                                   const std::vector<std::int64_t>& counts) const {
  require_counts(values, counts, "reduce-scatter");
  require_here(own, "reduce-scatter");
  const std::int64_t wanted = counts[static_cast<std::size_t>(group_.rank())];
  if (own.numel() != wanted || own.scalar_type() != at::kFloat)
    throw InternalError(fmt::format("reduce-scatter: rank {} has room for {} values of {}, not {} of float32",
                                    group_.rank(), own.numel(), c10::toString(own.scalar_type()), wanted));
  return Request(backend_->reduce_scatter(values, own, counts));
}

Request DeviceLink::all_gather(const at::Tensor& values, const std::vector<std::int64_t>& counts) const {
  require_counts(values, counts, "all-gather");
  return Request(backend_->all_gather(values, counts));
}

void DeviceLink::broadcast(const at::Tensor& values, int root) const {
  require_here(values, "broadcast");
  if (root < 0 || root >= group_.size())
    throw InternalError(fmt::format("broadcast from rank {} of {}", root, group_.size()));
  Request(backend_->broadcast(values, root)).wait();
}

Request DeviceLink::exchange(const std::vector<Transfer>& transfers, int tag) const {
  for (const Transfer& transfer : transfers) {
    require_here(transfer.values, "exchange");
    if (transfer.peer < 0 || transfer.peer >= group_.size() || transfer.peer == group_.rank())
      throw InternalError(
          fmt::format("rank {} of {} exchanges a tensor with rank {}", group_.rank(), group_.size(), transfer.peer));
  }
  return Request(backend_->exchange(transfers, tag));
}

}  // namespace headfold::comm
