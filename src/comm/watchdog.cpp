#include <headfold/base/json.h>
#include <headfold/base/log.h>
#include <headfold/base/progress.h>
#include <headfold/comm/watchdog.h>
#include <mpi.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <thread>

#include "board.h"

namespace headfold::comm {
namespace {

using WatchClock = std::chrono::steady_clock;

double seconds_since(WatchClock::time_point start) {
  return std::chrono::duration<double>(WatchClock::now() - start).count();
}

constexpr int kQuestionTag = 1, kAnswerTag = 2;
/// How long ranks have to answer, and how much longer a rank leaves the word to a lower one that waits as well.
constexpr double kAnswerSeconds = 3, kDeferSeconds = 3;

/// What this process does, as others are told.
RankState own_state() {
  const Board& board = Board::instance();
  RankState state;
  const std::string progress = latest_progress();
  const std::string suffix = progress.empty() ? "" : fmt::format("; it had counted {}", progress);
  const std::optional<Place> place = board.innermost();
  if (place) {
    state.waits = place->kind != Wait::local;
    state.seconds = place->seconds();
    state.doing =
        fmt::format("{} {} since {:.1f} s{}", state.waits ? "waits in" : "is in", place->text(), state.seconds, suffix);
  } else if (const auto latest = board.latest()) {
    state.seconds = latest->second;
    state.doing = fmt::format("is in no operation since {:.1f} s, when it left {}{}", state.seconds,
                              latest->first.text(), suffix);
  } else {
    state.doing = fmt::format("has been in no operation yet{}", suffix);
  }
  if (const std::optional<Place> longest = board.overdue(0)) state.overdue = longest->seconds();
  return state;
}

}  // namespace

/// Asks and answers on a communicator of its own, on a thread of its own. Not in the unnamed namespace: Watchdog::State
/// owns one.
class Messenger {
 public:
  Messenger(MPI_Comm comm, std::vector<std::string> hosts) : comm_(comm), hosts_(std::move(hosts)) {
    MPI_Comm_rank(comm_, &rank_);
    MPI_Comm_size(comm_, &size_);
    thread_ = std::thread([this] { work(); });
  }
  ~Messenger() {
    stop_ = true;
    thread_.join();
    int finished = 0;
    MPI_Finalized(&finished);
    if (finished == 0) MPI_Comm_free(&comm_);
  }
  Messenger(const Messenger&) = delete;
  Messenger& operator=(const Messenger&) = delete;
  int size() const { return size_; }

  /// What all other ranks answer within `seconds`; those that do not, in the same list with `answered` false.
  std::vector<RankState> ask(const Place& place, double seconds) {
    Json question;
    const auto group_rank = [&](int world_rank) {
      const auto& members = place.group->world_ranks;
      return static_cast<int>(std::find(members.begin(), members.end(), world_rank) - members.begin());
    };
    std::unique_lock lock(mutex_);
    question["id"] = ++question_id_;
    question["kind"] = static_cast<int>(place.kind);
    question["number"] = place.number;
    question["tag"] = place.tag;
    question["group"] = place.group ? place.group->name : "";
    question["from"] = place.group ? group_rank(rank_) : 0;
    answers_.assign(static_cast<std::size_t>(size_), {});
    for (int rank = 0; rank < size_; ++rank) {
      RankState& state = answers_[static_cast<std::size_t>(rank)];
      state.rank = rank;
      state.host = hosts_.at(static_cast<std::size_t>(rank));
      if (!place.group) continue;
      const auto& members = place.group->world_ranks;
      state.concerned = place.kind == Wait::collective
                            ? std::find(members.begin(), members.end(), rank) != members.end()
                            : members.at(static_cast<std::size_t>(place.peer)) == rank;
    }
    outbox_ = question.dump();
    const auto complete = [&] {
      return std::all_of(answers_.begin(), answers_.end(),
                         [&](const RankState& state) { return state.answered || state.rank == rank_; });
    };
    answered_.wait_for(lock, std::chrono::duration<double>(seconds), complete);
    std::vector<RankState> others = answers_;
    others.erase(others.begin() + rank_);
    return others;
  }

 private:
  struct Parcel {
    std::string text;
    MPI_Request request = MPI_REQUEST_NULL;
  };

  void send(const std::string& text, int to, int tag) {
    Parcel& parcel = parcels_.emplace_back();
    parcel.text = text;
    MPI_Isend(parcel.text.data(), static_cast<int>(parcel.text.size()), MPI_CHAR, to, tag, comm_, &parcel.request);
  }

  void answer(const Json& question, int from) {
    const RankState state = own_state();
    Json reply;
    reply["id"] = question.at("id");
    reply["arrived"] = Board::instance().has_arrived(
        question.at("group").get<std::string>(), static_cast<Wait>(question.at("kind").get<int>()),
        question.at("number").get<std::uint64_t>(), question.at("from").get<int>(), question.at("tag").get<int>());
    reply["waits"] = state.waits;
    reply["doing"] = state.doing;
    reply["seconds"] = state.seconds;
    reply["overdue"] = state.overdue;
    send(reply.dump(-1, ' ', false, Json::error_handler_t::replace), from, kAnswerTag);
  }

  void note(const Json& reply, int from) {
    const std::lock_guard lock(mutex_);
    if (reply.at("id").get<std::int64_t>() != question_id_) return;  // an answer that came too late
    RankState& state = answers_.at(static_cast<std::size_t>(from));
    state.answered = true;
    state.arrived = reply.at("arrived").get<bool>();
    state.waits = reply.at("waits").get<bool>();
    state.doing = reply.at("doing").get<std::string>();
    state.seconds = reply.at("seconds").get<double>();
    state.overdue = reply.at("overdue").get<double>();
    answered_.notify_all();
  }

  void receive() {
    for (;;) {
      int there = 0;
      MPI_Status status;
      if (MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, comm_, &there, &status) != MPI_SUCCESS || there == 0) return;
      int length = 0;
      MPI_Get_count(&status, MPI_CHAR, &length);
      std::string text(static_cast<std::size_t>(length), '\0');
      MPI_Recv(text.data(), length, MPI_CHAR, status.MPI_SOURCE, status.MPI_TAG, comm_, MPI_STATUS_IGNORE);
      const Json message = Json::parse(text, nullptr, false);
      if (message.is_discarded()) continue;
      if (status.MPI_TAG == kQuestionTag)
        answer(message, status.MPI_SOURCE);
      else
        note(message, status.MPI_SOURCE);
    }
  }

  void work() {
    while (!stop_) {
      std::string question;
      {
        const std::lock_guard lock(mutex_);
        question.swap(outbox_);
      }
      for (int rank = 0; !question.empty() && rank < size_; ++rank)
        if (rank != rank_) send(question, rank, kQuestionTag);
      receive();
      while (!parcels_.empty()) {
        int done = 0;
        if (MPI_Test(&parcels_.front().request, &done, MPI_STATUS_IGNORE) != MPI_SUCCESS || done == 0) break;
        parcels_.pop_front();
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
    // Who did not take its parcel will not: it is stopped or dead.
    for (Parcel& parcel : parcels_) {
      MPI_Cancel(&parcel.request);
      MPI_Request_free(&parcel.request);
    }
  }

  MPI_Comm comm_;
  std::vector<std::string> hosts_;
  int rank_ = 0, size_ = 1;
  std::mutex mutex_;
  std::condition_variable answered_;
  std::string outbox_;
  std::int64_t question_id_ = 0;
  std::vector<RankState> answers_;
  std::deque<Parcel> parcels_;  // only the thread's; a deque because MPI holds addresses of their texts
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

namespace {

std::string listed(const std::vector<const RankState*>& states) {
  constexpr std::size_t kMost = 8;
  std::string text;
  for (std::size_t i = 0; i < std::min(kMost, states.size()); ++i) {
    const RankState& state = *states[i];
    text += state.answered ? fmt::format("\n  rank {} on {} {}", state.rank, state.host, state.doing)
                           : fmt::format(
                                 "\n  rank {} on {} does not answer: it is stopped or dead, or its host cannot "
                                 "be reached",
                                 state.rank, state.host);
  }
  if (states.size() > kMost) text += fmt::format("\n  and {} ranks more", states.size() - kMost);
  return text;
}

}  // namespace

std::string describe_hang(int rank, const std::string& host, const std::string& operation, double seconds,
                          const std::vector<RankState>& others, const std::string& why_not_asked) {
  std::string text = fmt::format("rank {} on {} has been in {} for {:.1f} s", rank, host, operation, seconds);
  if (!why_not_asked.empty()) return fmt::format("{}; {}", text, why_not_asked);
  std::vector<const RankState*> missing, idle;
  bool collective = false;
  for (const RankState& state : others) {
    collective = collective || state.concerned;
    if (state.concerned && !state.arrived)
      missing.push_back(&state);
    else if (!state.answered || !state.waits)
      idle.push_back(&state);
  }
  if (!missing.empty())
    text += fmt::format("; {} not come:{}", missing.size() == 1 ? "one rank has" : "these ranks have", listed(missing));
  else if (collective)
    text += "; all ranks have come: the transfer itself hangs, in the network or the MPI library";
  if (!idle.empty()) text += fmt::format("\nother ranks that wait for nobody:{}", listed(idle));
  return text;
}

struct Watchdog::State {
  std::function<void(const MpiFailure&)> on_hang;
  int rank = 0;
  std::string why_not_asked;
  std::unique_ptr<Messenger> messenger;
  std::mutex mutex;
  std::condition_variable wake;
  bool stop = false;
  std::thread guard;

  void look() {
    std::uint64_t told = 0;  // the operation that was reported last
    auto last = WatchClock::now();
    std::unique_lock lock(mutex);
    while (!stop) {
      const double limit = timeout_seconds();
      wake.wait_for(lock, std::chrono::duration<double>(limit > 0 ? std::clamp(limit / 20, 0.01, 0.5) : 0.5));
      // Nobody sleeps that long at this rate unless the whole process was stopped.
      const double gap = seconds_since(last);
      last = WatchClock::now();
      if (gap > 10) Board::instance().forgive(gap);
      if (stop || limit <= 0) continue;
      const std::optional<Place> place = Board::instance().overdue(limit);
      if (!place || place->id == told) continue;
      lock.unlock();
      if (report(*place, limit)) told = place->id;
      last = WatchClock::now();
      lock.lock();
    }
  }

  /// Whether `place` still was overdue after everybody was asked, and was reported.
  bool report(const Place& place, double limit) {
    const auto start = WatchClock::now();
    // What is waited for in the end: inside "HDF5 create of FILE" that may be a collective.
    const Place inner = Board::instance().innermost().value_or(place);
    std::vector<RankState> others;
    if (messenger) {
      others = messenger->ask(inner, kAnswerSeconds);
      const bool lower = std::any_of(others.begin(), others.end(), [&](const RankState& state) {
        return state.answered && state.rank < rank && state.overdue > limit - std::min(1.0, limit / 2);
      });
      while (lower && Board::instance().is_in(place.id) && seconds_since(start) < kAnswerSeconds + kDeferSeconds)
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    if (!Board::instance().is_in(place.id)) return false;
    std::string operation = inner.text();
    if (inner.id != place.id) operation += fmt::format(", within {},", place.text());
    on_hang(MpiFailure(
        describe_hang(rank, host_name(), operation, place.seconds(), others, why_not_asked),
        fmt::format("the logs of these ranks say more (--log-dir); --comm-timeout sets the limit, now {:g} s", limit)));
    return true;
  }
};

Watchdog::Watchdog(const Communicator& world, std::function<void(const MpiFailure&)> on_hang)
    : state_(std::make_unique<State>()) {
  state_->on_hang = std::move(on_hang);
  state_->rank = world.rank();
  // Signals are the main thread's.
  sigset_t all, before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  if (world.size() == 1) {
    state_->why_not_asked = "no other rank is concerned: a file system or a device does not answer";
  } else {
    int level = MPI_THREAD_SINGLE;
    MPI_Query_thread(&level);
    if (level < MPI_THREAD_MULTIPLE) {
      state_->why_not_asked =
          "which rank has not come is unknown, because this MPI library offers no threads (MPI_THREAD_MULTIPLE)";
      if (world.root()) spdlog::warn("this MPI library offers no threads: should ranks hang, none can be named");
    } else {
      MPI_Comm own = MPI_COMM_NULL;
      if (MPI_Comm_dup(*static_cast<const MPI_Comm*>(world.mpi_comm()), &own) != MPI_SUCCESS)
        throw MpiFailure("the watchdog's communicator cannot be made");
      MPI_Comm_set_errhandler(own, MPI_ERRORS_RETURN);
      state_->messenger = std::make_unique<Messenger>(own, world.all_gather(host_name()));
    }
  }
  state_->guard = std::thread([state = state_.get()] { state->look(); });
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  set_watched(true);
}

Watchdog::~Watchdog() {
  set_watched(false);
  {
    const std::lock_guard lock(state_->mutex);
    state_->stop = true;
  }
  state_->wake.notify_all();
  state_->guard.join();
}

bool Watchdog::can_ask() const {
  return state_->messenger != nullptr;
}

}  // namespace headfold::comm
