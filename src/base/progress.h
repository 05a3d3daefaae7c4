#pragma once
// Progress lines with rate and remaining time, one every few seconds: readable in a batch log, unlike a bar.

#include <chrono>
#include <string>

namespace headfold {

/// Logs "what: 12/128 unit, 3.4 unit/s, 35 s left" at most every `every_seconds`, through the rank-0 logger, and emits
/// a "progress" event (base/events.h) as often, at the first step and at the end.
class Progress {
 public:
  /// `active` is false on ranks that stay silent.
  Progress(std::string what, std::string unit, double total, bool active, double every_seconds = 10.0);
  /// Adds finished work. On every rank a test point "progress WHAT" (base/test_point.h).
  void advance(double amount);
  /// Adds work that was finished before this run: it counts, but not for the rate.
  void skip(double amount);
  /// Seconds since construction.
  double seconds() const;
  double done() const { return done_; }

 private:
  using Clock = std::chrono::steady_clock;
  std::string what_;
  std::string unit_;
  double total_;
  double done_ = 0, skipped_ = 0;
  bool active_;
  bool told_first_ = false, told_end_ = false;  // by event
  double every_seconds_;
  Clock::time_point start_ = Clock::now();
  Clock::time_point last_ = start_;
};

/// Emits a "progress" event for work that is counted elsewhere: `done` of `total` units, `rate` units a second (0:
/// unknown). Jobs that use Progress need no other.
void emit_progress(const std::string& what, const std::string& unit, double done, double total, double rate);

/// "calibrate: 12/128 sequences" for what this process counted last, on whatever rank; empty before the first. Safe on
/// any thread: the watchdog tells it of a rank that others wait for.
std::string latest_progress();
/// Sets it, for work that is counted elsewhere.
void set_latest_progress(const std::string& what, const std::string& unit, double done, double total);

}  // namespace headfold
