#include <headfold/base/profile.h>

#include <time.h>

#include <array>
#include <atomic>
#include <chrono>

namespace headfold {

namespace {

constexpr std::size_t kKinds = static_cast<std::size_t>(Work::other) + 1;
std::array<std::atomic<std::int64_t>, kKinds> on_the_wall{}, of_the_processor{};
thread_local Timed* innermost = nullptr;

}  // namespace

std::string name_of(Work work) {
  constexpr std::array<const char*, kKinds> names{"read_weights", "read_statistics", "moments", "products", "eigen",
                                                  "new_weights",  "copying",         "writing", "sync",     "other"};
  return names.at(static_cast<std::size_t>(work));
}

Timed::Moment Timed::now() {
  timespec used{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
  const auto wall = std::chrono::steady_clock::now().time_since_epoch();
  return {std::chrono::duration_cast<std::chrono::nanoseconds>(wall).count(),
          static_cast<std::int64_t>(used.tv_sec) * 1000000000 + used.tv_nsec};
}

void Timed::count(Work work, const Moment& since, const Moment& until) {
  on_the_wall[static_cast<std::size_t>(work)] += until.wall - since.wall;
  of_the_processor[static_cast<std::size_t>(work)] += until.processor - since.processor;
}

Timed::Timed(Work work) : work_(work), outer_(innermost), since_(now()) {
  if (outer_ != nullptr) count(outer_->work_, outer_->since_, since_);
  innermost = this;
}

Timed::~Timed() {
  const Moment until = now();
  count(work_, since_, until);
  if (outer_ != nullptr) outer_->since_ = until;
  innermost = outer_;
}

std::vector<Spent> profile() {
  std::vector<Spent> all;
  for (std::size_t i = 0; i < kKinds; ++i)
    all.push_back({name_of(static_cast<Work>(i)), static_cast<double>(on_the_wall[i]) * 1e-9,
                   static_cast<double>(of_the_processor[i]) * 1e-9});
  return all;
}

}  // namespace headfold
