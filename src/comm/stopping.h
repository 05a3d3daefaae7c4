#pragma once
// Ranks agree on stopping: one that was asked to stops all of them, at the same step.

#include <headfold/base/error.h>
#include <headfold/base/stop.h>
#include <headfold/comm/communicator.h>

#include <string>

namespace headfold::comm {

/// Whether any rank was asked to stop (base/stop.h). Collective.
inline bool stop_agreed(const Communicator& world) {
  return world.all_reduce(std::int64_t{stop_requested() ? 1 : 0}, Reduce::max) != 0;
}

/// Throws Stopped on every rank when any of them was asked to: "stopped on request" and `when`. Collective. Loops of a
/// rank's own end early when stop_requested() says so; this call behind them makes sure that all ranks do.
inline void stop_if_requested(const Communicator& world, const std::string& when) {
  if (stop_agreed(world)) throw Stopped("stopped on request " + when);
}

}  // namespace headfold::comm
