#pragma once
// Ends a job whose ranks wait for one that will not come, and says which one, where it is and what it does.

#include <headfold/base/error.h>
#include <headfold/comm/communicator.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace headfold::comm {

/// What a rank answers to the watchdog of another.
struct RankState {
  int rank = 0;  ///< of the world
  std::string host;
  bool answered = false;
  bool concerned = false;  ///< is waited for: a member of the group, the other side of a message
  bool arrived = false;    ///< has begun the operation that is waited for
  bool waits = false;      ///< is itself in an operation that waits for ranks
  std::string doing;       ///< "is in receive from rank 2 (…)", "computes since …", as a sentence after its name
  double seconds = 0;      ///< for so long
  double overdue = 0;      ///< its longest wait
};

/// The sentence about a rank that has waited `seconds` in `operation`: who is missing, what they do, and who else waits
/// for nobody. Hosts and ranks of `others` in rank order; empty `others` when nobody could be asked.
std::string describe_hang(int rank, const std::string& host, const std::string& operation, double seconds,
                          const std::vector<RankState>& others, const std::string& why_not_asked);

/// Two threads of this process. The guard looks at the operations this rank is in; when one takes longer than
/// timeout_seconds(), it lets the messenger ask all ranks where they are and calls `on_hang` with an MpiFailure (exit
/// code 70) that names the operation, its number, and the ranks and hosts that have not come. That happens at most 7
/// seconds after the time-out, on one rank: of several that wait, the lowest speaks. The messenger answers and asks on
/// a communicator of its own; where the MPI library gives no threads, or in a single process, there is none, and only
/// the operation is named. Time in which the whole process was stopped (a suspended job) does not count.
class Watchdog {
 public:
  /// Collective over `world`, all ranks of the job. `on_hang` runs on a thread of the watchdog, at most once per
  /// operation, and usually ends the process.
  Watchdog(const Communicator& world, std::function<void(const MpiFailure&)> on_hang);
  /// Ends the threads. Collective: nobody may still be asked.
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;
  /// Whether other ranks can be asked.
  bool can_ask() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace headfold::comm
