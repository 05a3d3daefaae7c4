#include <headfold/base/events.h>
#include <headfold/base/log.h>
#include <headfold/base/progress.h>
#include <headfold/base/test_point.h>

#include <algorithm>
#include <cmath>
#include <mutex>

namespace headfold {
namespace {

struct LatestProgress {
  std::mutex mutex;
  std::string what, unit;
  double done = 0, total = 0;
};
LatestProgress& latest() {
  static LatestProgress one;
  return one;
}

}  // namespace

Progress::Progress(std::string what, std::string unit, double total, bool active, double every_seconds)
    : what_(std::move(what)), unit_(std::move(unit)), total_(total), active_(active), every_seconds_(every_seconds) {}

double Progress::seconds() const {
  return std::chrono::duration<double>(Clock::now() - start_).count();
}

void Progress::skip(double amount) {
  done_ += amount;
  skipped_ += amount;
}

void Progress::advance(double amount) {
  done_ += amount;
  set_latest_progress(what_, unit_, done_, total_);
  if (has_test_points()) test_point("progress " + what_);
  if (!active_) return;
  const auto now = Clock::now();
  const bool due = std::chrono::duration<double>(now - last_).count() >= every_seconds_;
  const bool ended = !told_end_ && done_ >= total_ * (1 - 1e-9);
  if (!due && told_first_ && !ended) return;
  const double elapsed = seconds();
  const double rate = elapsed > 0 ? (done_ - skipped_) / elapsed : 0;
  emit_progress(what_, unit_, done_, total_, rate);
  told_first_ = true;
  told_end_ = told_end_ || ended;
  if (!due) return;
  last_ = now;
  spdlog::info("{}: {:.0f}/{:.0f} {}, {:.4g} {}/s, {} left", what_, done_, total_, unit_, rate, unit_,
               human_seconds(rate > 0 ? (total_ - done_) / rate : 0));
}

void emit_progress(const std::string& what, const std::string& unit, double done, double total, double rate) {
  // Whole numbers look like that.
  const auto number = [](double value) {
    return std::floor(value) == value && std::abs(value) < 1e15 ? OrderedJson(static_cast<std::int64_t>(value))
                                                                : OrderedJson(value);
  };
  OrderedJson fields;
  fields["what"] = what;
  fields["step"] = number(done);
  fields["of"] = number(total);
  fields["unit"] = unit;
  if (rate > 0) {
    fields["rate"] = rate;
    fields["eta_s"] = std::max(0.0, (total - done) / rate);
  }
  emit_event("progress", fields);
}

std::string latest_progress() {
  LatestProgress& one = latest();
  const std::lock_guard lock(one.mutex);
  if (one.what.empty()) return {};
  return fmt::format("{}: {:.0f}/{:.0f} {}", one.what, one.done, one.total, one.unit);
}

void set_latest_progress(const std::string& what, const std::string& unit, double done, double total) {
  LatestProgress& one = latest();
  const std::lock_guard lock(one.mutex);
  if (one.what != what) one.what = what;
  if (one.unit != unit) one.unit = unit;
  one.done = done;
  one.total = total;
}

}  // namespace headfold
