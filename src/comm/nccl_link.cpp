// Tensors that travel by NCCL. The communicator does not block: every call is polled until NCCL has taken it, so that a
// rank that never comes, or a broken network, ends in the watchdog's message instead of a hang.

#include <headfold/base/cuda.h>
#include <headfold/base/error.h>
#include <headfold/base/log.h>

#include "link_backend.h"

#ifdef HEADFOLD_WITH_NCCL
#include <nccl.h>

#include <exception>
#include <functional>
#include <list>
#include <numeric>

#include "polling.h"
#endif

namespace headfold::comm {

#ifdef HEADFOLD_WITH_NCCL
namespace {

static_assert(NCCL_VERSION_CODE >= NCCL_VERSION(2, 14, 0), "communicators that do not block came with NCCL 2.14");

constexpr const char* kNcclHint = "NCCL_DEBUG=INFO says more; NCCL_SOCKET_IFNAME names the network (slurm/site.env)";

bool is_failure(ncclResult_t result) {
  return result != ncclSuccess && result != ncclInProgress;
}

/// Calls that NCCL starts together.
ncclResult_t grouped(const std::function<ncclResult_t()>& calls) {
  if (const ncclResult_t begun = ncclGroupStart(); begun != ncclSuccess) return begun;
  const ncclResult_t first = calls();
  const ncclResult_t end = ncclGroupEnd();  // ends the group whatever became of the calls
  return is_failure(first) ? first : end;
}

/// An NCCL communicator and the stream its work is in. Shared by the link and its requests; the last one ends it.
class NcclRanks {
 public:
  NcclRanks(const Communicator& group, int device) : group_(group), device_(device), stream_(device) {
    ncclUniqueId id{};
    group.on_root([&] {
      if (const ncclResult_t result = ncclGetUniqueId(&id); result != ncclSuccess)
        throw MpiFailure(fmt::format("NCCL start failed on {}: {}", host_name(), ncclGetErrorString(result)),
                         kNcclHint);
    });
    group.broadcast(std::as_writable_bytes(std::span(&id, 1)), 0);
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    const cuda::UseDevice use(device_);
    const Waiting waiting(collective_place(group_.group(), "NCCL start"));
    try {
      check(ncclCommInitRankConfig(&comm_, group.size(), id, group.rank(), &config), "start");
      settle("start");
    } catch (...) {
      abort();
      throw;
    }
  }

  /// Collective, unless an exception is on its way: a rank that just aborted could take back what it still has to send.
  ~NcclRanks() {
    try {
      if (comm_ != nullptr && std::uncaught_exceptions() == 0) finish();
    } catch (const std::exception& error) {
      spdlog::warn("{}", error.what());
    }
    abort();
  }
  NcclRanks(const NcclRanks&) = delete;
  NcclRanks& operator=(const NcclRanks&) = delete;

  const Communicator& group() const { return group_; }
  int device() const { return device_; }
  ncclComm_t comm() const { return comm_; }
  cudaStream_t stream() const { return stream_.get(); }

  /// Lets `launch` give NCCL work that comes behind everything the default stream has, and waits until NCCL has taken
  /// it. The GPU's.
  void give(const std::function<ncclResult_t()>& launch, std::string_view what) {
    if (comm_ == nullptr) throw MpiFailure(fmt::format("NCCL {}: an earlier failure has ended this link", what));
    cuda::order(nullptr, stream_.get());
    try {
      check(launch(), what);
      settle(what);
    } catch (...) {
      abort();
      throw;
    }
  }

  /// Throws an error that came up since, of this rank or of one it is connected to. True when NCCL has taken all calls.
  bool taken(std::string_view what) {
    if (comm_ == nullptr) throw MpiFailure(fmt::format("NCCL {}: an earlier failure has ended this link", what));
    ncclResult_t state = ncclSuccess;
    check(ncclCommGetAsyncError(comm_, &state), what);
    check(state, what);
    return state != ncclInProgress;
  }

  /// Frees the communicator and ends what is under way in it.
  void abort() noexcept {
    if (comm_ != nullptr) ncclCommAbort(std::exchange(comm_, nullptr));
  }

 private:
  void check(ncclResult_t result, std::string_view what) {
    if (is_failure(result))
      throw MpiFailure(fmt::format("NCCL {} failed on {}: {}: {}", what, host_name(), ncclGetErrorString(result),
                                   ncclGetLastError(comm_)),
                       kNcclHint);
  }
  void settle(std::string_view what) {
    poll_until([&] { return taken(what); }, what);
  }
  void finish() {
    const cuda::UseDevice use(device_);
    const Waiting waiting(collective_place(group_.group(), "NCCL end"));
    check(ncclCommFinalize(comm_), "end");
    settle("end");
    check(ncclCommDestroy(std::exchange(comm_, nullptr)), "end");
  }

  Communicator group_;
  int device_;
  cuda::Stream stream_;
  ncclComm_t comm_ = nullptr;
};

/// Work in the link's stream. The tensors stay until it is done.
class NcclRequest : public Request::State {
 public:
  NcclRequest(std::shared_ptr<NcclRanks> ranks, std::vector<Place> places, std::vector<at::Tensor> held,
              const std::function<ncclResult_t()>& launch)
      : ranks_(std::move(ranks)), places_(std::move(places)), held_(std::move(held)), use_(ranks_->device()) {
    const std::list<Waiting> waiting = on_board();
    ranks_->give(launch, what());
    event_.record(ranks_->stream());
    use_.end();
  }
  void wait() override {
    const cuda::UseDevice use(ranks_->device());
    const std::list<Waiting> waiting = on_board();
    try {
      poll_until([&] { return done(); }, what());
    } catch (...) {
      ranks_->abort();
      throw;
    }
  }
  bool test() override {
    const cuda::UseDevice use(ranks_->device());
    return done();
  }

 private:
  bool done() {
    ranks_->taken(what());
    return event_.done();
  }
  const std::string& what() const { return places_.front().what; }
  std::list<Waiting> on_board() const {
    std::list<Waiting> waiting;
    for (const Place& place : places_) waiting.emplace_back(place);
    return waiting;
  }

  std::shared_ptr<NcclRanks> ranks_;
  std::vector<Place> places_;
  std::vector<at::Tensor> held_;
  cuda::UseDevice use_;  // while events are made and work is given
  cuda::Event event_;
};

class NcclLink : public LinkBackend {
 public:
  NcclLink(const Communicator& group, int device) : ranks_(std::make_shared<NcclRanks>(group, device)) {}

  Started all_reduce(const at::Tensor& values) override {
    return collective("all-reduce", {values}, [&] {
      return ncclAllReduce(values.data_ptr(), values.data_ptr(), static_cast<std::size_t>(values.numel()),
                           values.scalar_type() == at::kDouble ? ncclFloat64 : ncclFloat32, ncclSum, ranks_->comm(),
                           ranks_->stream());
    });
  }

  Started reduce_scatter(const at::Tensor& values, const at::Tensor& own,
                         const std::vector<std::int64_t>& counts) override {
    return collective("reduce-scatter", {values, own}, [&] {
      if (equal(counts))
        return ncclReduceScatter(values.data_ptr(), own.data_ptr(), static_cast<std::size_t>(counts[0]), ncclFloat32,
                                 ncclSum, ranks_->comm(), ranks_->stream());
      return of_each_rank(values, counts, [&](float* part, std::size_t count, int rank) {
        return ncclReduce(part, own.data_ptr(), count, ncclFloat32, ncclSum, rank, ranks_->comm(), ranks_->stream());
      });
    });
  }

  Started all_gather(const at::Tensor& values, const std::vector<std::int64_t>& counts) override {
    return collective("all-gather", {values}, [&] {
      if (equal(counts))
        return ncclAllGather(values.data_ptr<float>() + counts[0] * ranks_->group().rank(), values.data_ptr(),
                             static_cast<std::size_t>(counts[0]), ncclFloat32, ranks_->comm(), ranks_->stream());
      return of_each_rank(values, counts, [&](float* part, std::size_t count, int rank) {
        return ncclBroadcast(part, part, count, ncclFloat32, rank, ranks_->comm(), ranks_->stream());
      });
    });
  }

  Started broadcast(const at::Tensor& values, int root) override {
    return collective("broadcast", {values}, [&] {
      return ncclBroadcast(values.data_ptr(), values.data_ptr(), bytes_of(values), ncclUint8, root, ranks_->comm(),
                           ranks_->stream());
    });
  }

  Started exchange(const std::vector<Transfer>& transfers, int tag) override {
    if (transfers.empty()) return nullptr;
    std::vector<Place> places;
    std::vector<at::Tensor> held;
    for (const Transfer& transfer : transfers) {
      const bool send = transfer.kind == Transfer::Kind::send;
      places.push_back(message_place(ranks_->group().group(), send ? Wait::send : Wait::receive, transfer.peer, tag));
      held.push_back(transfer.values);
    }
    return std::make_unique<NcclRequest>(ranks_, std::move(places), std::move(held), [&] {
      return grouped([&] {
        for (const Transfer& transfer : transfers)
          if (const ncclResult_t result = move(transfer); is_failure(result)) return result;
        return ncclSuccess;
      });
    });
  }

 private:
  static std::size_t bytes_of(const at::Tensor& values) {
    return static_cast<std::size_t>(values.numel()) * values.element_size();
  }
  static bool equal(const std::vector<std::int64_t>& counts) {
    return std::all_of(counts.begin(), counts.end(), [&](std::int64_t count) { return count == counts[0]; });
  }
  ncclResult_t move(const Transfer& transfer) {
    void* data = transfer.values.data_ptr();
    const std::size_t bytes = bytes_of(transfer.values);
    return transfer.kind == Transfer::Kind::send
               ? ncclSend(data, bytes, ncclUint8, transfer.peer, ranks_->comm(), ranks_->stream())
               : ncclRecv(data, bytes, ncclUint8, transfer.peer, ranks_->comm(), ranks_->stream());
  }
  /// NCCL's own operations want equal parts; unequal ones are one operation per rank.
  template <class Work>
  static ncclResult_t of_each_rank(const at::Tensor& values, const std::vector<std::int64_t>& counts,
                                   const Work& work) {
    return grouped([&] {
      float* part = values.data_ptr<float>();
      for (std::size_t rank = 0; rank < counts.size(); ++rank) {
        const auto count = static_cast<std::size_t>(counts[rank]);
        if (count > 0)
          if (const ncclResult_t result = work(part, count, static_cast<int>(rank)); is_failure(result)) return result;
        part += count;
      }
      return ncclSuccess;
    });
  }
  Started collective(const char* name, std::vector<at::Tensor> held, const std::function<ncclResult_t()>& launch) {
    return std::make_unique<NcclRequest>(
        ranks_, std::vector{collective_place(ranks_->group().group(), fmt::format("NCCL {}", name))}, std::move(held),
        launch);
  }

  std::shared_ptr<NcclRanks> ranks_;
};

}  // namespace

std::unique_ptr<LinkBackend> make_nccl_link(const Communicator& group, int device) {
  return std::make_unique<NcclLink>(group, device);
}
bool nccl_compiled() {
  return true;
}
std::string nccl_version() {
  int version = 0;
  if (ncclGetVersion(&version) != ncclSuccess) return {};
  return fmt::format("{}.{}.{}", version / 10000, version / 100 % 100, version % 100);
}
#else
std::unique_ptr<LinkBackend> make_nccl_link(const Communicator&, int) {
  throw NotCompiled("NCCL", "HEADFOLD_CUDA=ON");
}
bool nccl_compiled() {
  return false;
}
std::string nccl_version() {
  return {};
}
#endif

}  // namespace headfold::comm
