#include <headfold/base/stop.h>

#include <atomic>
#include <csignal>
#include <system_error>

namespace headfold {
namespace {

std::atomic<bool> requested{false};
static_assert(std::atomic<bool>::is_always_lock_free, "signal handlers may only touch lock-free atomics");

void request_stop(int) {
  requested.store(true);
}

}  // namespace

void listen_for_stop() {
  std::signal(SIGTERM, request_stop);
  std::signal(SIGUSR1, request_stop);
}

bool stop_requested() {
  return requested.load();
}

bool stop_requested(const std::filesystem::path& folder) {
  std::error_code code;
  return stop_requested() || std::filesystem::exists(folder / "STOP", code);
}

}  // namespace headfold
