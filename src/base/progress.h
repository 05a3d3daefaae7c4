#pragma once
// Progress lines with rate and remaining time, one every few seconds: readable in a batch log, unlike a bar.

#include <chrono>
#include <string>

namespace headfold {

/// Logs "what: 12/128 unit, 3.4 unit/s, 35 s left" at most every `every_seconds`, through the rank-0 logger.
class Progress {
 public:
  /// `active` is false on ranks that stay silent.
  Progress(std::string what, std::string unit, double total, bool active, double every_seconds = 10.0);
  /// Adds finished work.
  void advance(double amount);
  /// Seconds since construction.
  double seconds() const;
  double done() const { return done_; }

 private:
  using Clock = std::chrono::steady_clock;
  std::string what_;
  std::string unit_;
  double total_;
  double done_ = 0;
  bool active_;
  double every_seconds_;
  Clock::time_point start_ = Clock::now();
  Clock::time_point last_ = start_;
};

}  // namespace headfold
