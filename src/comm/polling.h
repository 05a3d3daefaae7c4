#pragma once
// Private: waiting without load.

#include <headfold/base/error.h>
#include <headfold/base/log.h>
#include <headfold/comm/communicator.h>

#include <chrono>
#include <string>
#include <string_view>
#include <thread>

#include "board.h"

namespace headfold::comm {

/// Calls `done` until it is true, with growing sleeps: a blocking call would spin at full load beside the ranks that
/// still compute. MpiFailure past timeout_seconds() in a process without a watchdog, which knows more.
template <class Done>
void poll_until(const Done& done, std::string_view operation) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  for (int turn = 0;; ++turn) {
    if (done()) return;
    if (turn < 200) continue;
    std::this_thread::sleep_for(std::chrono::microseconds(turn < 2000 ? 20 : 200));
    if (watched()) continue;
    const double waited = std::chrono::duration<double>(Clock::now() - start).count();
    if (timeout_seconds() <= 0 || waited <= timeout_seconds()) continue;
    const std::optional<Place> place = Board::instance().innermost();
    throw MpiFailure(fmt::format("{} waited {:.0f} s in {}: another rank died or hangs", host_name(), waited,
                                 place ? place->text() : std::string(operation)),
                     "look at the logs of the other ranks; --comm-timeout sets the limit in seconds");
  }
}

}  // namespace headfold::comm
