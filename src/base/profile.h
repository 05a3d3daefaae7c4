#pragma once
// Where a job's time goes: seconds by kind of work, summed over threads.

#include <chrono>
#include <string>
#include <utility>
#include <vector>

namespace headfold {

/// Kinds of work that are timed apart.
enum class Work { read_weights, read_statistics, moments, products, eigen, new_weights, copying, writing, sync, other };
std::string name_of(Work);

/// Times its own scope on its thread, less the scopes inside it: every second counts once. Cheap (two clock reads) and
/// safe on any thread.
class Timed {
 public:
  explicit Timed(Work work);
  ~Timed();
  Timed(const Timed&) = delete;
  Timed& operator=(const Timed&) = delete;

 private:
  using Clock = std::chrono::steady_clock;
  Work work_;
  Timed* outer_;
  Clock::time_point since_;
};

/// Seconds by kind of work since the process began, of all threads that timed something, in the order of Work.
std::vector<std::pair<std::string, double>> profile();

}  // namespace headfold
