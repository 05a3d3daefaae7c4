#pragma once
// Private: what this process does at the moment, in operations that wait for other ranks. Kept by the main thread, read
// by the watchdog's.

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace headfold::comm {

/// A group of ranks and how far this process has come in it. Counters are the board's to change.
struct Group {
  std::string name;              ///< the same on every member: "world", "world/split2:0"
  std::vector<int> world_ranks;  ///< of the members, by their rank in the group
  std::uint64_t entered = 0;     ///< collective operations begun
  std::uint64_t splits = 0;
  /// Messages begun, by (other rank of the group, tag).
  std::map<std::pair<int, int>, std::uint64_t> sent, awaited;
};

enum class Wait { collective, send, receive, local };

/// An operation this process is in.
struct Place {
  using Clock = std::chrono::steady_clock;
  std::uint64_t id = 0;
  Wait kind = Wait::local;
  std::string what;              ///< "all-reduce", "barrier 'end of job'"
  std::shared_ptr<Group> group;  ///< null: local
  std::uint64_t number = 0;      ///< which collective of the group, or which message to or from `peer` with `tag`
  int peer = -1, tag = 0;        ///< of a message: rank in the group
  Clock::time_point since{};
  double seconds() const { return std::chrono::duration<double>(Clock::now() - since).count(); }
  /// "all-reduce (operation 41 of world, 4 ranks)", "receive from rank 3 (message 2 of world, tag 7)".
  std::string text() const;
};

/// One per process. Safe for many threads.
class Board {
 public:
  static Board& instance();

  /// A group that this process belongs to from now on; kept for questions about it.
  void add(const std::shared_ptr<Group>& group);
  /// Counts a collective of `group` as begun and returns its number, from 1.
  std::uint64_t begin_collective(Group& group);
  /// Counts a message to (`send`) or from `peer` as begun and returns its number among those of that peer and tag, from
  /// 1.
  std::uint64_t begin_message(Group& group, bool send, int peer, int tag);
  /// Counts a split and returns its number, from 1.
  std::uint64_t begin_split(Group& group);

  /// This process is in `place` until leave(); sets its `since`. Returns its id.
  std::uint64_t enter(Place place);
  /// The time of `id` counts from now: it got on.
  void restart(std::uint64_t id);
  void leave(std::uint64_t id);
  bool is_in(std::uint64_t id) const;

  /// The place that this process is in for more than `seconds`, if any (the first entered).
  std::optional<Place> overdue(double seconds) const;
  /// The place entered last, if any.
  std::optional<Place> innermost() const;
  /// The operation left last and how many seconds ago; none before the first.
  std::optional<std::pair<Place, double>> latest() const;
  /// Moves the beginning of all places `seconds` later: the process was stopped meanwhile (a suspended job).
  void forgive(double seconds);

  /// Whether this process has begun what rank `from` of the group named `group` waits for: collective `number`, the
  /// `number`-th message to it (it receives) or from it (it sends).
  bool has_arrived(const std::string& group, Wait kind, std::uint64_t number, int from, int tag) const;

 private:
  mutable std::mutex mutex_;
  std::vector<Place> places_;
  std::map<std::string, std::shared_ptr<Group>> groups_;
  std::optional<Place> latest_;
  Place::Clock::time_point latest_time_{};
  std::uint64_t next_ = 1;
};

/// A place for the length of a scope.
class Waiting {
 public:
  explicit Waiting(Place place) : id_(Board::instance().enter(std::move(place))) {}
  ~Waiting() { Board::instance().leave(id_); }
  Waiting(const Waiting&) = delete;
  Waiting& operator=(const Waiting&) = delete;
  void restart() const { Board::instance().restart(id_); }

 private:
  std::uint64_t id_;
};

/// A collective of `group` that begins now: the test point, then the count.
Place collective_place(const std::shared_ptr<Group>& group, std::string_view what);

/// A message to (`kind` send) or from (receive) rank `peer` of `group` that begins now: the test point, then the count.
Place message_place(const std::shared_ptr<Group>& group, Wait kind, int peer, int tag);

/// Whether a watchdog of this process looks at the board; otherwise operations watch their time themselves.
bool watched();
void set_watched(bool watched);

}  // namespace headfold::comm
