#include "mpi_backend.h"

#include <headfold/base/error.h>
#include <mpi.h>

#include <cstdlib>
#include <numeric>

#include "board.h"
#include "polling.h"

namespace headfold::comm {
namespace {

void check(int code, std::string_view operation) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  MPI_Error_string(code, text, &length);
  throw MpiFailure(fmt::format("MPI {} failed on {}: {}", operation, Environment::host(),
                               std::string_view(text, static_cast<std::size_t>(length))));
}

MPI_Op op_of(Reduce op) {
  switch (op) {
    case Reduce::sum:
      return MPI_SUM;
    case Reduce::min:
      return MPI_MIN;
    case Reduce::max:
      return MPI_MAX;
  }
  throw InternalError("unknown reduction");
}

/// Largest number of elements in one MPI call: Open MPI 4.1 has no large-count interface.
constexpr std::size_t kChunk = std::size_t{1} << 27;
constexpr std::size_t kByteChunk = std::size_t{1} << 30;

class MpiBackend : public Backend {
 public:
  /// Takes ownership of `comm`; `group` is named, and gets its members from `parent` (null: the world itself).
  MpiBackend(MPI_Comm comm, const std::string& name, const MpiBackend* parent) : comm_(comm) {
    check(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN), "Comm_set_errhandler");
    check(MPI_Comm_rank(comm_, &rank_), "Comm_rank");
    check(MPI_Comm_size(comm_, &size_), "Comm_size");
    group_->name = name;
    for (int rank = 0; rank < size_; ++rank) group_->world_ranks.push_back(rank);
    if (parent != nullptr) group_->world_ranks = parent->world_ranks_of(comm_, group_->world_ranks);
    Board::instance().add(group_);
  }
  ~MpiBackend() override {
    int finished = 0;
    MPI_Finalized(&finished);
    if (finished == 0) MPI_Comm_free(&comm_);
  }
  MpiBackend(const MpiBackend&) = delete;
  MpiBackend& operator=(const MpiBackend&) = delete;

  std::string_view name() const override { return "mpi"; }
  int rank() const override { return rank_; }
  int size() const override { return size_; }
  const void* mpi_comm() const override { return &comm_; }
  const std::shared_ptr<Group>& group() const override { return group_; }

  void barrier(std::string_view what) override {
    const Waiting waiting(collective_place(group_, fmt::format("barrier '{}'", what)));
    MPI_Request request = MPI_REQUEST_NULL;
    check(MPI_Ibarrier(comm_, &request), "barrier");
    poll(request, "barrier");
  }
  void all_reduce(std::span<double> values, Reduce op) override { reduce_any(values, MPI_DOUBLE, op); }
  void all_reduce(std::span<std::int64_t> values, Reduce op) override { reduce_any(values, MPI_INT64_T, op); }
  void broadcast(std::span<std::byte> bytes, int root) override {
    const Waiting waiting(collective_place(group_, "broadcast"));
    for (std::size_t at = 0; at < bytes.size(); at += kByteChunk) {
      const std::size_t n = std::min(kByteChunk, bytes.size() - at);
      MPI_Request request = MPI_REQUEST_NULL;
      check(MPI_Ibcast(bytes.data() + at, static_cast<int>(n), MPI_BYTE, root, comm_, &request), "broadcast");
      poll(request, "broadcast");
      waiting.restart();
    }
  }
  std::vector<std::string> all_gather(std::string_view text) override {
    const auto own = static_cast<std::int64_t>(text.size());
    std::vector<std::int64_t> lengths(static_cast<std::size_t>(size_));
    {
      const Waiting waiting(collective_place(group_, "all-gather"));
      MPI_Request request = MPI_REQUEST_NULL;
      check(MPI_Iallgather(&own, 1, MPI_INT64_T, lengths.data(), 1, MPI_INT64_T, comm_, &request), "all-gather");
      poll(request, "all-gather");
    }
    std::vector<std::string> all(lengths.size());
    const std::int64_t total = std::accumulate(lengths.begin(), lengths.end(), std::int64_t{0});
    if (total > static_cast<std::int64_t>(kByteChunk)) {
      for (std::size_t r = 0; r < all.size(); ++r) {
        all[r].resize(static_cast<std::size_t>(lengths[r]));
        if (static_cast<int>(r) == rank_) all[r] = text;
        broadcast(std::as_writable_bytes(std::span(all[r].data(), all[r].size())), static_cast<int>(r));
      }
      return all;
    }
    std::string joined(static_cast<std::size_t>(total), '\0');
    std::vector<int> counts, begins;
    for (const std::int64_t length : lengths) {
      begins.push_back(begins.empty() ? 0 : begins.back() + counts.back());
      counts.push_back(static_cast<int>(length));
    }
    const Waiting waiting(collective_place(group_, "all-gather of texts"));
    MPI_Request request = MPI_REQUEST_NULL;
    check(MPI_Iallgatherv(text.data(), static_cast<int>(own), MPI_CHAR, joined.data(), counts.data(), begins.data(),
                          MPI_CHAR, comm_, &request),
          "all-gather");
    poll(request, "all-gather");
    for (std::size_t r = 0; r < all.size(); ++r)
      all[r] = joined.substr(static_cast<std::size_t>(begins[r]), static_cast<std::size_t>(counts[r]));
    return all;
  }
  std::unique_ptr<Request::State> isend(std::span<const std::byte> bytes, int to, int tag) override {
    auto state = std::make_unique<Pending>(message_place(group_, Wait::send, to, tag));
    for (std::size_t at = 0; at < bytes.size() || at == 0; at += kByteChunk) {
      const std::size_t n = std::min(kByteChunk, bytes.size() - at);
      state->requests.emplace_back(MPI_REQUEST_NULL);
      check(MPI_Isend(bytes.data() + at, static_cast<int>(n), MPI_BYTE, to, tag, comm_, &state->requests.back()),
            "send");
    }
    return state;
  }
  std::unique_ptr<Request::State> irecv(std::span<std::byte> bytes, int from, int tag) override {
    auto state = std::make_unique<Pending>(message_place(group_, Wait::receive, from, tag));
    for (std::size_t at = 0; at < bytes.size() || at == 0; at += kByteChunk) {
      const std::size_t n = std::min(kByteChunk, bytes.size() - at);
      state->requests.emplace_back(MPI_REQUEST_NULL);
      check(MPI_Irecv(bytes.data() + at, static_cast<int>(n), MPI_BYTE, from, tag, comm_, &state->requests.back()),
            "receive");
    }
    return state;
  }
  std::unique_ptr<Request::State> start_sum(std::span<float> values) override {
    auto state = std::make_unique<Pending>(collective_place(group_, "all-reduce of gradients"));
    for (std::size_t at = 0; at < values.size(); at += kChunk) {
      const std::size_t n = std::min(kChunk, values.size() - at);
      state->requests.emplace_back(MPI_REQUEST_NULL);
      check(MPI_Iallreduce(MPI_IN_PLACE, values.data() + at, static_cast<int>(n), MPI_FLOAT, MPI_SUM, comm_,
                           &state->requests.back()),
            "all-reduce");
    }
    return state;
  }
  std::unique_ptr<Request::State> start_reduce_scatter(std::span<const float> values, std::span<float> own,
                                                       const std::vector<std::int64_t>& counts) override {
    auto state = std::make_unique<Pending>(collective_place(group_, "reduce-scatter of gradients"));
    state->counts.assign(counts.begin(), counts.end());
    state->requests.emplace_back(MPI_REQUEST_NULL);
    check(MPI_Ireduce_scatter(values.data(), own.data(), state->counts.data(), MPI_FLOAT, MPI_SUM, comm_,
                              &state->requests.back()),
          "reduce-scatter");
    return state;
  }
  std::unique_ptr<Request::State> start_all_gather(std::span<float> values,
                                                   const std::vector<std::int64_t>& counts) override {
    auto state = std::make_unique<Pending>(collective_place(group_, "all-gather of values"));
    int at = 0;
    for (const std::int64_t count : counts) {
      state->counts.push_back(static_cast<int>(count));
      state->begins.push_back(at);
      at += static_cast<int>(count);
    }
    state->requests.emplace_back(MPI_REQUEST_NULL);
    check(MPI_Iallgatherv(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, values.data(), state->counts.data(), state->begins.data(),
                          MPI_FLOAT, comm_, &state->requests.back()),
          "all-gather");
    return state;
  }
  std::shared_ptr<Backend> split(int color, int key) override {
    MPI_Comm out = MPI_COMM_NULL;
    const std::string child = fmt::format("{}/split{}:{}", group_->name, Board::instance().begin_split(*group_), color);
    const Waiting waiting(collective_place(group_, "split"));
    check(MPI_Comm_split(comm_, color, key, &out), "Comm_split");
    return std::make_shared<MpiBackend>(out, child, this);
  }
  std::shared_ptr<Backend> split_by_host() override {
    MPI_Comm out = MPI_COMM_NULL;
    const std::string child = fmt::format("{}/host{}", group_->name, Board::instance().begin_split(*group_));
    const Waiting waiting(collective_place(group_, "split by host"));
    check(MPI_Comm_split_type(comm_, MPI_COMM_TYPE_SHARED, rank_, MPI_INFO_NULL, &out), "Comm_split_type");
    return std::make_shared<MpiBackend>(out, child, this);
  }

 private:
  /// World ranks of `ranks` of `part`, a communicator of some of this one's members.
  std::vector<int> world_ranks_of(MPI_Comm part, const std::vector<int>& ranks) const {
    MPI_Group own = MPI_GROUP_NULL, other = MPI_GROUP_NULL;
    check(MPI_Comm_group(comm_, &own), "Comm_group");
    check(MPI_Comm_group(part, &other), "Comm_group");
    std::vector<int> here(ranks.size());
    check(MPI_Group_translate_ranks(other, static_cast<int>(ranks.size()), ranks.data(), own, here.data()),
          "Group_translate_ranks");
    MPI_Group_free(&own);
    MPI_Group_free(&other);
    for (int& rank : here) rank = group_->world_ranks.at(static_cast<std::size_t>(rank));
    return here;
  }

  static void poll(MPI_Request& request, std::string_view operation) {
    poll_until(
        [&] {
          int done = 0;
          check(MPI_Test(&request, &done, MPI_STATUS_IGNORE), operation);
          return done != 0;
        },
        operation);
  }

  template <class T>
  void reduce_any(std::span<T> values, MPI_Datatype type, Reduce op) {
    const Waiting waiting(collective_place(group_, "all-reduce"));
    for (std::size_t at = 0; at < values.size(); at += kChunk) {
      const std::size_t n = std::min(kChunk, values.size() - at);
      MPI_Request request = MPI_REQUEST_NULL;
      check(MPI_Iallreduce(MPI_IN_PLACE, values.data() + at, static_cast<int>(n), type, op_of(op), comm_, &request),
            "all-reduce");
      poll(request, "all-reduce");
      waiting.restart();
    }
  }

  struct Pending : Request::State {
    explicit Pending(Place where) : place(std::move(where)) {}
    void wait() override {
      const Waiting waiting(place);
      for (MPI_Request& request : requests) {
        poll(request, place.what);
        waiting.restart();
      }
    }
    bool test() override {
      int done = 0;
      check(MPI_Testall(static_cast<int>(requests.size()), requests.data(), &done, MPI_STATUSES_IGNORE), place.what);
      return done != 0;
    }
    std::vector<MPI_Request> requests;
    std::vector<int> counts, begins;  // of a collective with unequal parts: MPI reads them until it is complete
    Place place;
  };

  MPI_Comm comm_;
  int rank_ = 0;
  int size_ = 1;
  std::shared_ptr<Group> group_ = std::make_shared<Group>();
};

}  // namespace

std::shared_ptr<Backend> start_mpi(int* argc, char*** argv) {
  int already = 0;
  MPI_Initialized(&already);
  if (already == 0) {
    int provided = MPI_THREAD_SINGLE;
    check(MPI_Init_thread(argc, argv, MPI_THREAD_MULTIPLE, &provided), "Init_thread");
    if (provided < MPI_THREAD_SERIALIZED)
      throw MpiFailure("this MPI library offers no thread support (MPI_THREAD_SERIALIZED is needed)");
  }
  MPI_Comm world = MPI_COMM_NULL;
  check(MPI_Comm_dup(MPI_COMM_WORLD, &world), "Comm_dup");
  return std::make_shared<MpiBackend>(world, "world", nullptr);
}

void stop_mpi() {
  int finished = 0;
  MPI_Finalized(&finished);
  if (finished == 0) MPI_Finalize();
}

void abort_mpi(int exit_code) {
  MPI_Abort(MPI_COMM_WORLD, exit_code);
  std::_Exit(exit_code);
}

}  // namespace headfold::comm
