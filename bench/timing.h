#pragma once
// What benchmarks measure with.

#include <ATen/Parallel.h>

#include <algorithm>
#include <ctime>
#include <functional>
#include <vector>

namespace headfold::bench {

/// Seconds: processor time of the whole process with one thread, wall clock otherwise.
inline double now() {
  timespec time{};
  ::clock_gettime(at::get_num_threads() == 1 ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}
inline double seconds(const std::function<void()>& work) {
  const double start = now();
  work();
  return now() - start;
}
/// The upper one of two in the middle.
inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

}  // namespace headfold::bench
