#include <headfold/base/error.h>
#include <headfold/base/log.h>
#include <headfold/base/test_point.h>
#include <headfold/comm/communicator.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <limits>
#include <map>
#include <thread>

#include "board.h"
#include "mpi_backend.h"

namespace headfold::comm {
namespace {

std::atomic<double> timeout{1800.0};

/// Throws what rank 0 threw: an error of the same class where it can be made from what what() and hint() say, else an
/// Error of that code.
[[noreturn]] void throw_of_kind(const std::string& kind, ExitCode code, const std::string& message,
                                const std::string& hint) {
  // Errors about a file begin with its name.
  const std::size_t colon = message.find(": ");
  if (colon != std::string::npos) {
    const std::string file = message.substr(0, colon), rest = message.substr(colon + 2);
    if (kind == "IoError") throw IoError(file, rest, hint);
    if (kind == "CorruptFile") throw CorruptFile(file, rest, hint);
  }
  if (kind == "UsageError") throw UsageError(message, hint);
  if (kind == "InputError") throw InputError(message, hint);
  if (kind == "MpiFailure") throw MpiFailure(message, hint);
  if (kind == "DeviceFailure") throw DeviceFailure(message, hint);
  if (kind == "NumericalError") throw NumericalError(message, hint);
  if (kind == "InternalError") throw InternalError(message, hint);
  if (kind == "Stopped") throw Stopped(message);
  throw Error(code, message, hint);
}

/// The group of one process. Messages to itself are queued by tag. Nothing waits, so nothing goes on the board; test
/// points are where the other backend has them.
class SelfBackend : public Backend, public std::enable_shared_from_this<SelfBackend> {
 public:
  std::string_view name() const override { return "self"; }
  int rank() const override { return 0; }
  int size() const override { return 1; }
  void barrier(std::string_view what) override {
    if (has_test_points()) test_point(fmt::format("barrier '{}'", what));
  }
  void all_reduce(std::span<double>, Reduce) override { test_point("all-reduce"); }
  void all_reduce(std::span<std::int64_t>, Reduce) override { test_point("all-reduce"); }
  void broadcast(std::span<std::byte>, int) override { test_point("broadcast"); }
  std::vector<std::string> all_gather(std::string_view text) override {
    test_point("all-gather");
    return {std::string(text)};
  }
  std::unique_ptr<Request::State> isend(std::span<const std::byte> bytes, int, int tag) override {
    queues_[tag].emplace_back(bytes.begin(), bytes.end());
    return std::make_unique<Done>();
  }
  std::unique_ptr<Request::State> irecv(std::span<std::byte> bytes, int, int tag) override {
    return std::make_unique<Receive>(shared_from_this(), bytes, tag);
  }
  std::unique_ptr<Request::State> start_sum(std::span<float>) override { return std::make_unique<Done>(); }
  std::unique_ptr<Request::State> start_reduce_scatter(std::span<const float> values, std::span<float> own,
                                                       const std::vector<std::int64_t>&) override {
    std::copy(values.begin(), values.end(), own.begin());
    return std::make_unique<Done>();
  }
  std::unique_ptr<Request::State> start_all_gather(std::span<float>, const std::vector<std::int64_t>&) override {
    return std::make_unique<Done>();
  }
  std::shared_ptr<Backend> split(int, int) override { return std::make_shared<SelfBackend>(); }
  std::shared_ptr<Backend> split_by_host() override { return std::make_shared<SelfBackend>(); }
  const void* mpi_comm() const override { return nullptr; }
  const std::shared_ptr<Group>& group() const override { return group_; }

 private:
  static std::shared_ptr<Group> alone() {
    auto group = std::make_shared<Group>();
    group->name = "this rank alone";
    group->world_ranks = {0};
    return group;
  }
  struct Done : Request::State {
    void wait() override {}
    bool test() override { return true; }
  };
  struct Receive : Request::State {
    Receive(std::shared_ptr<SelfBackend> backend, std::span<std::byte> bytes, int tag)
        : backend_(std::move(backend)), bytes_(bytes), tag_(tag) {}
    void wait() override {
      auto& queue = backend_->queues_[tag_];
      if (queue.empty()) throw MpiFailure("a process waits for a message from itself that was never sent");
      if (queue.front().size() != bytes_.size())
        throw MpiFailure("a message to oneself has another size than expected");
      std::memcpy(bytes_.data(), queue.front().data(), bytes_.size());
      queue.pop_front();
    }
    bool test() override { return !backend_->queues_[tag_].empty(); }
    std::shared_ptr<SelfBackend> backend_;
    std::span<std::byte> bytes_;
    int tag_;
  };
  std::map<int, std::deque<std::vector<std::byte>>> queues_;
  std::shared_ptr<Group> group_ = alone();
};

bool started_by_launcher() {
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "PMI_SIZE"})
    if (std::getenv(name) != nullptr) return true;
  return false;
}

std::int64_t environment_number(const char* name) {
  const char* value = std::getenv(name);
  std::int64_t number = -1;
  if (value != nullptr) std::from_chars(value, value + std::strlen(value), number);
  return number;
}

/// Tasks of the Slurm step that this process is one of; 0 outside a step.
std::int64_t tasks_of_step() {
  if (std::getenv("SLURM_PROCID") == nullptr) return 0;
  if (const std::int64_t tasks = environment_number("SLURM_STEP_NUM_TASKS"); tasks >= 0) return tasks;
  // The batch script itself runs in a step too, with a number from the top of 32 bits, and is no task of it.
  const std::int64_t step = environment_number("SLURM_STEP_ID");
  constexpr std::int64_t kFirstSpecialStep = 0xfffffff0;
  return step >= 0 && step < kFirstSpecialStep ? std::max<std::int64_t>(0, environment_number("SLURM_NTASKS")) : 0;
}

[[noreturn]] void refuse_lonely_tasks(std::int64_t tasks) {
  throw UsageError(fmt::format("this Slurm step has {} tasks that cannot find each other (no PMI): each of them would "
                               "run the whole job alone and write the same files",
                               tasks),
                   "start the program with srun --mpi=pmix; srun --mpi=list must show pmix");
}

}  // namespace

Request& Request::operator=(Request&& other) noexcept {
  if (this != &other) {
    const Request finished(std::move(state_));  // waits, as a destructor does
    state_ = std::move(other.state_);
  }
  return *this;
}
Request::~Request() {
  if (state_ == nullptr) return;
  try {
    if (std::uncaught_exceptions() == 0) {
      wait();
      return;
    }
    // This rank failed: its peers may never do their part, and the error at hand must be told at once. What does not
    // complete soon is left to the end of the process, which is near.
    static std::atomic<bool> waited_enough{false};
    using Clock = std::chrono::steady_clock;
    for (const auto start = Clock::now(); !waited_enough && Clock::now() - start < std::chrono::seconds(1);) {
      if (state_->test()) return;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    waited_enough = true;
  } catch (...) {  // may not throw here; the next operation on the communicator reports the failure
  }
  (void)state_.release();
}
void Request::wait() {
  if (state_ == nullptr) return;
  const std::unique_ptr<State> state = std::move(state_);
  state->wait();
}

Communicator Communicator::self() {
  return Communicator(std::make_shared<SelfBackend>());
}

double Communicator::all_reduce(double value, Reduce op) const {
  all_reduce(std::span(&value, 1), op);
  return value;
}
std::int64_t Communicator::all_reduce(std::int64_t value, Reduce op) const {
  all_reduce(std::span(&value, 1), op);
  return value;
}

void Communicator::broadcast(std::string& text, int root) const {
  std::int64_t length = rank() == root ? static_cast<std::int64_t>(text.size()) : 0;
  broadcast(std::as_writable_bytes(std::span(&length, 1)), root);
  text.resize(static_cast<std::size_t>(length));
  broadcast(std::as_writable_bytes(std::span(text.data(), text.size())), root);
}

namespace {
void check_counts(std::size_t values, const std::vector<std::int64_t>& counts, int size, std::string_view what) {
  std::int64_t sum = 0;
  for (const std::int64_t count : counts) sum += count;
  if (static_cast<int>(counts.size()) != size || sum != static_cast<std::int64_t>(values) ||
      sum > std::numeric_limits<int>::max() ||
      std::any_of(counts.begin(), counts.end(), [](std::int64_t count) { return count < 0; }))
    throw InternalError(fmt::format("{} of {} values on {} ranks with {} counts that add up to {}", what, values, size,
                                    counts.size(), sum));
}
}  // namespace

Request Communicator::start_reduce_scatter(std::span<const float> values, std::span<float> own,
                                           const std::vector<std::int64_t>& counts) const {
  check_counts(values.size(), counts, size(), "reduce-scatter");
  if (static_cast<std::int64_t>(own.size()) != counts[static_cast<std::size_t>(rank())])
    throw InternalError(fmt::format("reduce-scatter: rank {} has room for {} values, not {}", rank(), own.size(),
                                    counts[static_cast<std::size_t>(rank())]));
  return Request(backend_->start_reduce_scatter(values, own, counts));
}
Request Communicator::start_all_gather(std::span<float> values, const std::vector<std::int64_t>& counts) const {
  check_counts(values.size(), counts, size(), "all-gather");
  return Request(backend_->start_all_gather(values, counts));
}

void Communicator::require_equal(std::string_view text, std::string_view what) const {
  // The host's name goes first: who differs must be findable.
  const std::vector<std::string> all = all_gather(host_name() + '\n' + std::string(text));
  const auto host_of = [&](std::size_t r) { return all[r].substr(0, all[r].find('\n')); };
  const auto text_of = [&](std::size_t r) { return std::string_view(all[r]).substr(all[r].find('\n') + 1); };
  std::string others;
  std::size_t count = 0;
  for (std::size_t r = 1; r < all.size(); ++r) {
    if (text_of(r) == text_of(0) || ++count > 8) continue;
    others += fmt::format("{}rank {} on {} has '{}'", others.empty() ? "" : ", ", r, host_of(r), text_of(r));
  }
  if (count == 0) return;
  if (count > 8) others += fmt::format(" and {} more", count - 8);
  throw InputError(
      fmt::format("{} differs between ranks: rank 0 on {} has '{}', {}", what, host_of(0), text_of(0), others),
      "every rank must run the same build on the same files; check the module environment and the file system of each "
      "node");
}

void Communicator::on_root(const std::function<void()>& work) const {
  // The failure travels as (code, kind, message, hint): a typed error must stay typed on every rank.
  std::string failure;
  std::exception_ptr own;
  if (root()) {
    try {
      work();
    } catch (const Error& error) {
      failure =
          fmt::format("{}\n{}\n{}\x1f{}", static_cast<int>(error.code()), error.kind(), error.what(), error.hint());
      own = std::current_exception();
    } catch (const std::exception& error) {
      failure = fmt::format("{}\nInternalError\n{}\x1f", static_cast<int>(ExitCode::internal), error.what());
      own = std::current_exception();
    }
  }
  broadcast(failure);
  if (own) std::rethrow_exception(own);
  if (failure.empty()) return;
  const std::size_t line = failure.find('\n'), second = failure.find('\n', line + 1);
  const std::size_t mark = failure.rfind('\x1f');
  throw_of_kind(failure.substr(line + 1, second - line - 1), static_cast<ExitCode>(std::stoi(failure.substr(0, line))),
                failure.substr(second + 1, mark - second - 1), failure.substr(mark + 1));
}

double timeout_seconds() {
  return timeout.load();
}
void set_timeout_seconds(double seconds) {
  timeout.store(seconds);
}

Environment::Environment(int* argc, char*** argv) {
  const std::int64_t tasks = tasks_of_step();
  // mpirun inside a step sees the step's variables as well, and has ranks of its own.
  const bool by_mpirun = std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr;
  if (!started_by_launcher()) {
    set_test_points(0);
    if (tasks > 1) refuse_lonely_tasks(tasks);
    return;
  }
  if (tasks > 1 && !by_mpirun && std::getenv("PMIX_RANK") == nullptr && environment_number("SLURM_PROCID") == 0)
    spdlog::warn("srun offers PMI, but not PMIx: should MPI not start now, use srun --mpi=pmix");
  world_ = Communicator(start_mpi(argc, argv));
  mpi_ = true;
  set_test_points(world_.rank());
  if (tasks > 1 && !by_mpirun && world_.size() == 1) refuse_lonely_tasks(tasks);
}

Environment::~Environment() {
  world_ = Communicator::self();  // frees the duplicate before MPI ends
  if (mpi_) stop_mpi();
}

void Environment::abort(int exit_code) const {
  if (mpi_) {
    // Where the launcher or the library hangs as well, this process ends by itself.
    std::thread([exit_code] {
      std::this_thread::sleep_for(std::chrono::seconds(4));
      std::_Exit(exit_code);
    }).detach();
    abort_mpi(exit_code);
  }
  std::_Exit(exit_code);
}

std::string Environment::host() {
  return host_name();
}

}  // namespace headfold::comm
