#pragma once
// Names for stretches of work that the watchdog cannot see by itself: calls of other libraries that wait for other
// ranks or for a file system.

#include <headfold/comm/communicator.h>

#include <cstdint>
#include <string>

namespace headfold::comm {

/// In its scope this rank is in `what` ("HDF5 create of FILE"). When that takes longer than timeout_seconds(), the
/// watchdog ends the job and names it. A test point (base/test_point.h) of that name.
class Operation {
 public:
  /// Collective: every member of `group` enters it, at the same place among the group's other operations; the watchdog
  /// says which have not.
  Operation(const Communicator& group, const std::string& what);
  /// Of this rank alone: a file system that may hang.
  explicit Operation(const std::string& what);
  ~Operation();
  Operation(const Operation&) = delete;
  Operation& operator=(const Operation&) = delete;

 private:
  std::uint64_t place_;
};

}  // namespace headfold::comm
