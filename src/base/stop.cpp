#include <headfold/base/stop.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <mutex>
#include <system_error>
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

}  // namespace

void listen_for_stop() {
  std::signal(SIGTERM, request_stop);
  std::signal(SIGUSR1, request_stop);
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
