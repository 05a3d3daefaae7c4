#include <headfold/base/error.h>
#include <headfold/base/stop.h>
#include <headfold/base/test_point.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <deque>
#include <string>
#include <thread>

namespace headfold {
namespace {

enum class Mishap { hang, kill, freeze, stop };

struct TestHook {
  Mishap mishap;
  std::string text;
  std::int64_t visit = 1;  ///< the visit that counts
  std::atomic<std::int64_t> visits{0};
  TestHook(Mishap which, std::string name, std::int64_t number) : mishap(which), text(std::move(name)), visit(number) {}
};

/// Filled before other threads start, then only read. A deque because atomics do not move.
std::deque<TestHook>& test_hooks() {
  static std::deque<TestHook> all;
  return all;
}

bool is_number(std::string_view text, std::int64_t& value) {
  const auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), value);
  return code == std::errc() && end == text.data() + text.size() && value >= 0;
}

}  // namespace

void set_test_points(int rank) {
  test_hooks().clear();
  constexpr std::pair<const char*, Mishap> kinds[] = {{"HEADFOLD_TEST_HANG", Mishap::hang},
                                                      {"HEADFOLD_TEST_KILL", Mishap::kill},
                                                      {"HEADFOLD_TEST_FREEZE", Mishap::freeze},
                                                      {"HEADFOLD_TEST_STOP", Mishap::stop}};
  for (const auto& [variable, mishap] : kinds) {
    const char* value = std::getenv(variable);
    if (value == nullptr || *value == '\0') continue;
    const std::string all = value;
    const std::size_t colon = std::min(all.find(':'), all.size());
    std::string text = all.substr(std::min(colon + 1, all.size()));
    std::int64_t whose = 0, visit = 1;
    if (const std::size_t last = text.rfind(':'); last != std::string::npos) {
      if (is_number(std::string_view(text).substr(last + 1), visit)) text.resize(last);
    }
    if (!is_number(std::string_view(all).substr(0, colon), whose) || text.empty() || visit < 1)
      throw UsageError(fmt::format("{}={}: expected RANK:TEXT or RANK:TEXT:N", variable, all),
                       "this variable is for tests only; unset it");
    if (whose == rank) test_hooks().emplace_back(mishap, text, visit);
  }
}

bool has_test_points() {
  return !test_hooks().empty();
}

void test_point(std::string_view name) {
  for (TestHook& hook : test_hooks()) {
    if (name.find(hook.text) == std::string_view::npos || ++hook.visits != hook.visit) continue;
    spdlog::warn("test hook: this rank {} at '{}'",
                 hook.mishap == Mishap::hang   ? "sleeps for ever"
                 : hook.mishap == Mishap::kill ? "dies"
                 : hook.mishap == Mishap::stop ? "is asked to stop"
                                               : "stops",
                 name);
    if (hook.mishap == Mishap::kill) std::raise(SIGKILL);
    if (hook.mishap == Mishap::freeze) std::raise(SIGSTOP);
    if (hook.mishap == Mishap::stop) {
      ::kill(::getpid(), SIGUSR1);
      while (!stop_requested()) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // another thread takes it
    }
    while (hook.mishap == Mishap::hang) std::this_thread::sleep_for(std::chrono::hours(1));
  }
}

}  // namespace headfold
