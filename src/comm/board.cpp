#include "board.h"

#include <fmt/format.h>
#include <headfold/base/test_point.h>
#include <headfold/comm/operation.h>

#include <algorithm>
#include <atomic>

namespace headfold::comm {
namespace {

std::atomic<bool> board_watched{false};

}  // namespace

std::string Place::text() const {
  switch (kind) {
    case Wait::local:
      return what;
    case Wait::collective:
      return fmt::format("{} (operation {} of {}, {} ranks)", what, number, group->name, group->world_ranks.size());
    case Wait::send:
    case Wait::receive:
      break;
  }
  return fmt::format("{} {} rank {} (message {} of {}, tag {})", what, kind == Wait::send ? "to" : "from",
                     group->world_ranks[static_cast<std::size_t>(peer)], number, group->name, tag);
}

Board& Board::instance() {
  static Board one;
  return one;
}

void Board::add(const std::shared_ptr<Group>& group) {
  const std::lock_guard lock(mutex_);
  groups_[group->name] = group;
}
std::uint64_t Board::begin_collective(Group& group) {
  const std::lock_guard lock(mutex_);
  return ++group.entered;
}
std::uint64_t Board::begin_message(Group& group, bool send, int peer, int tag) {
  const std::lock_guard lock(mutex_);
  return ++(send ? group.sent : group.awaited)[{peer, tag}];
}
std::uint64_t Board::begin_split(Group& group) {
  const std::lock_guard lock(mutex_);
  return ++group.splits;
}

std::uint64_t Board::enter(Place place) {
  place.since = Place::Clock::now();
  const std::lock_guard lock(mutex_);
  place.id = next_++;
  places_.push_back(std::move(place));
  return places_.back().id;
}
void Board::restart(std::uint64_t id) {
  const std::lock_guard lock(mutex_);
  for (Place& place : places_)
    if (place.id == id) place.since = Place::Clock::now();
}
void Board::leave(std::uint64_t id) {
  const std::lock_guard lock(mutex_);
  const auto found = std::find_if(places_.begin(), places_.end(), [&](const Place& place) { return place.id == id; });
  if (found == places_.end()) return;
  latest_ = std::move(*found);
  latest_time_ = Place::Clock::now();
  places_.erase(found);
}
bool Board::is_in(std::uint64_t id) const {
  const std::lock_guard lock(mutex_);
  return std::any_of(places_.begin(), places_.end(), [&](const Place& place) { return place.id == id; });
}

std::optional<Place> Board::overdue(double seconds) const {
  const std::lock_guard lock(mutex_);
  for (const Place& place : places_)
    if (place.seconds() > seconds) return place;
  return std::nullopt;
}
std::optional<Place> Board::innermost() const {
  const std::lock_guard lock(mutex_);
  if (places_.empty()) return std::nullopt;
  return places_.back();
}
std::optional<std::pair<Place, double>> Board::latest() const {
  const std::lock_guard lock(mutex_);
  if (!latest_) return std::nullopt;
  return std::pair(*latest_, std::chrono::duration<double>(Place::Clock::now() - latest_time_).count());
}
void Board::forgive(double seconds) {
  const std::lock_guard lock(mutex_);
  for (Place& place : places_)
    place.since += std::chrono::duration_cast<Place::Clock::duration>(std::chrono::duration<double>(seconds));
}

bool Board::has_arrived(const std::string& group, Wait kind, std::uint64_t number, int from, int tag) const {
  const std::lock_guard lock(mutex_);
  const auto found = groups_.find(group);
  if (found == groups_.end()) return false;
  if (kind == Wait::collective) return found->second->entered >= number;
  // Who receives waits for what was sent; who sends a large message waits for the receive.
  const auto& begun = kind == Wait::receive ? found->second->sent : found->second->awaited;
  const auto messages = begun.find({from, tag});
  return messages != begun.end() && messages->second >= number;
}

Place collective_place(const std::shared_ptr<Group>& group, std::string_view what) {
  if (has_test_points()) test_point(what);
  Place place;
  place.kind = Wait::collective;
  place.what = what;
  place.group = group;
  place.number = Board::instance().begin_collective(*group);
  return place;
}

Place message_place(const std::shared_ptr<Group>& group, Wait kind, int peer, int tag) {
  const bool send = kind == Wait::send;
  Place place;
  place.kind = kind;
  place.what = send ? "send" : "receive";
  if (has_test_points()) test_point(place.what);
  place.group = group;
  place.number = Board::instance().begin_message(*group, send, peer, tag);
  place.peer = peer;
  place.tag = tag;
  return place;
}

bool watched() {
  return board_watched.load();
}
void set_watched(bool watched) {
  board_watched.store(watched);
}

Operation::Operation(const Communicator& group, const std::string& what)
    : place_(Board::instance().enter(collective_place(group.group(), what))) {}
Operation::Operation(const std::string& what) {
  Place place;
  place.what = what;
  place_ = Board::instance().enter(std::move(place));
  // Inside: this rank hangs in it, nobody waits for it to begin.
  if (has_test_points()) test_point(what);
}
Operation::~Operation() {
  Board::instance().leave(place_);
}

}  // namespace headfold::comm
