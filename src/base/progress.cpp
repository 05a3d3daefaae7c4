#include <headfold/base/log.h>
#include <headfold/base/progress.h>

namespace headfold {

Progress::Progress(std::string what, std::string unit, double total, bool active, double every_seconds)
    : what_(std::move(what)), unit_(std::move(unit)), total_(total), active_(active), every_seconds_(every_seconds) {}

double Progress::seconds() const {
  return std::chrono::duration<double>(Clock::now() - start_).count();
}

void Progress::advance(double amount) {
  done_ += amount;
  const auto now = Clock::now();
  if (!active_ || std::chrono::duration<double>(now - last_).count() < every_seconds_) return;
  last_ = now;
  const double elapsed = seconds();
  const double rate = done_ / elapsed;
  spdlog::info("{}: {:.0f}/{:.0f} {}, {:.4g} {}/s, {} left", what_, done_, total_, unit_, rate, unit_,
               human_seconds(rate > 0 ? (total_ - done_) / rate : 0));
}

}  // namespace headfold
