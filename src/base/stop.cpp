#include <headfold/base/stop.h>

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace headfold {
namespace {

std::atomic<bool> requested{false};
static_assert(std::atomic<bool>::is_always_lock_free, "signal handlers may only touch lock-free atomics");

struct Watched {
  std::mutex mutex;
  std::vector<std::filesystem::path> files;
  std::chrono::steady_clock::time_point next;  ///< when to look again
  bool found = false;
};
Watched watched;

void request_stop(int) {
  requested.store(true);
}

sigset_t stop_signals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  sigaddset(&set, SIGUSR1);
  return set;
}

void let_stop_signals_through() {
  const sigset_t set = stop_signals();
  pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
}

}  // namespace

// Signals must not interrupt threads that compute: oneDNN before 3.12 keeps data of its own where a handler's frame
// goes (its kernels point the stack register into the heap, github.com/uxlfoundation/oneDNN/issues/4845), so that a
// handler leaves wrong numbers and a damaged heap behind. They are blocked in the calling thread and in those that it
// starts; a thread that does nothing else takes them. The handlers are for threads that were there before.
void listen_for_stop() {
  static std::once_flag once;
  std::call_once(once, [] {
    std::signal(SIGTERM, request_stop);
    std::signal(SIGUSR1, request_stop);
    const sigset_t set = stop_signals();
    pthread_sigmask(SIG_BLOCK, &set, nullptr);
    pthread_atfork(nullptr, nullptr, let_stop_signals_through);  // helpers that MPI starts listen as ever
    try {
      std::thread([set] {
        for (int signal = 0;;)
          if (sigwait(&set, &signal) == 0) request_stop(signal);
      }).detach();
    } catch (const std::system_error&) {
      let_stop_signals_through();  // no thread to be had: the handlers take them after all
    }
  });
}

void watch_stop_file(const std::filesystem::path& file) {
  const std::lock_guard lock(watched.mutex);
  if (std::find(watched.files.begin(), watched.files.end(), file) == watched.files.end()) watched.files.push_back(file);
  watched.next = {};
}

void forget_stop_files() {
  const std::lock_guard lock(watched.mutex);
  watched.files.clear();
  watched.found = false;
}

bool stop_requested() {
  if (requested.load()) return true;
  const std::lock_guard lock(watched.mutex);
  const auto now = std::chrono::steady_clock::now();
  if (watched.found || watched.files.empty() || now < watched.next) return watched.found;
  watched.next = now + std::chrono::seconds(1);
  std::error_code code;
  for (const std::filesystem::path& file : watched.files)
    watched.found = watched.found || std::filesystem::exists(file, code);
  return watched.found;
}

std::filesystem::path stop_file_beside(const std::filesystem::path& output) {
  std::filesystem::path path = std::filesystem::absolute(output).lexically_normal();
  if (path.filename().empty()) path = path.parent_path();  // it ended with a slash
  return path.parent_path() / "STOP";
}

bool stop_requested(const std::filesystem::path& folder) {
  std::error_code code;
  return stop_requested() || std::filesystem::exists(folder / "STOP", code);
}

}  // namespace headfold
