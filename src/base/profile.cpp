#include <headfold/base/profile.h>

#include <array>
#include <atomic>
#include <cstdint>

namespace headfold {

namespace {

constexpr std::size_t kKinds = static_cast<std::size_t>(Work::other) + 1;
std::array<std::atomic<std::int64_t>, kKinds> nanoseconds{};
thread_local Timed* innermost = nullptr;

}  // namespace

std::string name_of(Work work) {
  constexpr std::array<const char*, kKinds> names{"read_weights", "read_statistics", "moments", "products", "eigen",
                                                  "new_weights",  "copying",         "writing", "sync",     "other"};
  return names.at(static_cast<std::size_t>(work));
}

Timed::Timed(Work work) : work_(work), outer_(innermost), since_(Clock::now()) {
  const auto count = [](const Timed& timed, Clock::time_point now) {
    nanoseconds[static_cast<std::size_t>(timed.work_)] +=
        std::chrono::duration_cast<std::chrono::nanoseconds>(now - timed.since_).count();
  };
  if (outer_ != nullptr) count(*outer_, since_);
  innermost = this;
}

Timed::~Timed() {
  const Clock::time_point now = Clock::now();
  nanoseconds[static_cast<std::size_t>(work_)] +=
      std::chrono::duration_cast<std::chrono::nanoseconds>(now - since_).count();
  if (outer_ != nullptr) outer_->since_ = now;
  innermost = outer_;
}

std::vector<std::pair<std::string, double>> profile() {
  std::vector<std::pair<std::string, double>> seconds;
  for (std::size_t i = 0; i < kKinds; ++i)
    seconds.emplace_back(name_of(static_cast<Work>(i)), static_cast<double>(nanoseconds[i]) * 1e-9);
  return seconds;
}

}  // namespace headfold
