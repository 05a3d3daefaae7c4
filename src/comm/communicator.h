#pragma once
// One communicator interface over two backends: `self` (a single process, no MPI started) and `mpi`.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace headfold::comm {

enum class Reduce { sum, min, max };

struct Group;  // private: board.h

/// A started non-blocking transfer. wait() must be called before the buffer is touched or freed; the destructor waits
/// too, but all of them together no longer than a second while an exception is on its way.
class Request {
 public:
  class State {
   public:
    virtual ~State() = default;
    /// Blocks until the transfer is complete. Throws MpiFailure on time-out.
    virtual void wait() = 0;
    /// Whether the transfer is complete; gives the library a chance to carry it on. Returns at once.
    virtual bool test() = 0;
  };
  Request() = default;
  explicit Request(std::unique_ptr<State> state) : state_(std::move(state)) {}
  Request(Request&&) noexcept = default;
  Request& operator=(Request&& other) noexcept;
  ~Request();
  void wait();
  /// Whether the transfer is complete. Many MPI libraries move data only inside calls: a rank that computes while
  /// transfers are under way calls this now and then.
  bool test() { return state_ == nullptr || state_->test(); }
  bool active() const { return state_ != nullptr; }

 private:
  std::unique_ptr<State> state_;
};

/// What a transport must provide; ranks and counts are checked by Communicator.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string_view name() const = 0;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual void barrier(std::string_view what) = 0;
  virtual void all_reduce(std::span<double> values, Reduce op) = 0;
  virtual void all_reduce(std::span<std::int64_t> values, Reduce op) = 0;
  virtual void broadcast(std::span<std::byte> bytes, int root) = 0;
  virtual std::vector<std::string> all_gather(std::string_view text) = 0;
  virtual std::unique_ptr<Request::State> isend(std::span<const std::byte> bytes, int to, int tag) = 0;
  virtual std::unique_ptr<Request::State> irecv(std::span<std::byte> bytes, int from, int tag) = 0;
  virtual std::unique_ptr<Request::State> start_sum(std::span<float> values) = 0;
  virtual std::unique_ptr<Request::State> start_reduce_scatter(std::span<const float> values, std::span<float> own,
                                                               const std::vector<std::int64_t>& counts) = 0;
  virtual std::unique_ptr<Request::State> start_all_gather(std::span<float> values,
                                                           const std::vector<std::int64_t>& counts) = 0;
  virtual std::shared_ptr<Backend> split(int color, int key) = 0;
  virtual std::shared_ptr<Backend> split_by_host() = 0;
  /// Pointer to the MPI_Comm, or nullptr for a backend without MPI. For libraries such as HDF5.
  virtual const void* mpi_comm() const = 0;
  /// What the watchdog knows this group by.
  virtual const std::shared_ptr<Group>& group() const = 0;
};

/// A group of ranks. A small value: copies share one underlying communicator, which is freed with the last copy.
/// All calls but rank/size/host are collective over the group unless said otherwise. While a call waits it polls with
/// short sleeps, so that waiting ranks leave the cores to working ones. When it waits longer than `timeout_seconds()`,
/// the Watchdog ends the job and says who has not come; in a process without one the call throws MpiFailure.
class Communicator {
 public:
  /// The group of this process alone; needs no MPI.
  static Communicator self();
  explicit Communicator(std::shared_ptr<Backend> backend) : backend_(std::move(backend)) {}

  int rank() const { return backend_->rank(); }
  int size() const { return backend_->size(); }
  bool root() const { return rank() == 0; }
  std::string_view backend() const { return backend_->name(); }
  const void* mpi_comm() const { return backend_->mpi_comm(); }
  const std::shared_ptr<Group>& group() const { return backend_->group(); }

  void barrier(std::string_view what) const { backend_->barrier(what); }
  /// In place; same count on every rank. Counts above 2^31 - 1 are split.
  void all_reduce(std::span<double> values, Reduce op = Reduce::sum) const { backend_->all_reduce(values, op); }
  void all_reduce(std::span<std::int64_t> values, Reduce op = Reduce::sum) const { backend_->all_reduce(values, op); }
  double all_reduce(double value, Reduce op = Reduce::sum) const;
  std::int64_t all_reduce(std::int64_t value, Reduce op = Reduce::sum) const;
  void broadcast(std::span<std::byte> bytes, int root = 0) const { backend_->broadcast(bytes, root); }
  /// Broadcast of a text of any length from `root`; other ranks' content is replaced.
  void broadcast(std::string& text, int root = 0) const;
  /// Texts of all ranks in rank order, on every rank.
  std::vector<std::string> all_gather(std::string_view text) const { return backend_->all_gather(text); }

  /// Non-blocking collectives over float32 for gradients: every rank starts the same ones in the same order, and leaves
  /// the buffers alone until wait(). Sums are in float32, the same bits on every rank and in every run of as many
  /// ranks. In place, sum over ranks.
  [[nodiscard]] Request start_sum(std::span<float> values) const { return Request(backend_->start_sum(values)); }
  /// Sum over ranks of `values`; rank r receives `counts[r]` elements of it, those after the lower ranks', in `own`
  /// (another buffer). InternalError unless the counts (one per rank, at most 2^31 - 1 in all) add up.
  [[nodiscard]] Request start_reduce_scatter(std::span<const float> values, std::span<float> own,
                                             const std::vector<std::int64_t>& counts) const;
  /// In place: rank r gives `counts[r]` elements of `values`, those after the lower ranks', and receives all others.
  [[nodiscard]] Request start_all_gather(std::span<float> values, const std::vector<std::int64_t>& counts) const;

  /// Point to point (not collective).
  Request isend(std::span<const std::byte> bytes, int to, int tag) const {
    return Request(backend_->isend(bytes, to, tag));
  }
  Request irecv(std::span<std::byte> bytes, int from, int tag) const {
    return Request(backend_->irecv(bytes, from, tag));
  }
  void send(std::span<const std::byte> bytes, int to, int tag) const { isend(bytes, to, tag).wait(); }
  void recv(std::span<std::byte> bytes, int from, int tag) const { irecv(bytes, from, tag).wait(); }

  /// Ranks with equal `color` form a group, ordered by `key`.
  Communicator split(int color, int key) const { return Communicator(backend_->split(color, key)); }
  /// Ranks that share this host's memory.
  Communicator split_by_host() const { return Communicator(backend_->split_by_host()); }

  /// Throws InputError with `what`, the ranks and their hosts on every rank when `text` differs between ranks.
  void require_equal(std::string_view text, std::string_view what) const;
  /// Runs `work` on rank 0 and rethrows its failure on every rank, so that nobody waits for a rank that gave up.
  void on_root(const std::function<void()>& work) const;

 private:
  std::shared_ptr<Backend> backend_;
};

/// Longest time one operation may wait, in seconds (default 1800; 0 = for ever).
double timeout_seconds();
void set_timeout_seconds(double seconds);

/// Starts MPI when the process was started by mpirun or srun (asks for MPI_THREAD_MULTIPLE), otherwise nothing, and
/// ends it. UsageError when the tasks of a Slurm step cannot find each other (srun without --mpi=pmix): each of them
/// would run the whole job alone and write the same files.
class Environment {
 public:
  Environment(int* argc, char*** argv);
  ~Environment();
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;
  /// All ranks of the job (a duplicate of MPI_COMM_WORLD), or self.
  const Communicator& world() const { return world_; }
  /// Ends every rank of the job with this exit code, in seconds even where MPI itself hangs. Does not return.
  [[noreturn]] void abort(int exit_code) const;
  /// Name of this host (base/log.h).
  static std::string host();

 private:
  bool mpi_ = false;
  Communicator world_ = Communicator::self();
};

}  // namespace headfold::comm
