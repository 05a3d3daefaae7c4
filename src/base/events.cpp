#include <fcntl.h>
#include <headfold/base/events.h>
#include <headfold/base/files.h>
#include <headfold/base/log.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <mutex>

namespace headfold {
namespace {

std::mutex events_mutex;
EventStream events_stream;
std::atomic<bool> events_complained{false};

/// Empty when the line was written, otherwise the reason. A line that an earlier process could not finish (full disk)
/// is closed first, so that at most that one is lost.
std::string append_line(const fs::path& file, std::string line) {
  const int fd = ::open(file.c_str(), O_RDWR | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
  if (fd < 0) return std::strerror(errno);
  struct stat status {};
  char last = '\n';
  if (::fstat(fd, &status) == 0 && status.st_size > 0 && ::pread(fd, &last, 1, status.st_size - 1) == 1 && last != '\n')
    line.insert(line.begin(), '\n');
  const ssize_t written = ::write(fd, line.data(), line.size());
  std::string failure = written < 0 ? std::strerror(errno) : "";
  if (written >= 0 && written != static_cast<ssize_t>(line.size())) failure = "the line was cut: no space left";
  ::close(fd);
  return failure;
}

}  // namespace

void set_event_stream(EventStream stream) {
  if (stream.speaks && stream.file.has_parent_path()) make_folder(stream.file.parent_path());
  const std::lock_guard lock(events_mutex);
  events_stream = std::move(stream);
}

const EventStream& event_stream() {
  return events_stream;
}

void emit_event(std::string_view event, const OrderedJson& fields, bool anyone) {
  const std::lock_guard lock(events_mutex);
  if (events_stream.file.empty() || !(events_stream.speaks || anyone)) return;
  using Seconds = std::chrono::duration<double>;
  const double now = Seconds(std::chrono::system_clock::now().time_since_epoch()).count();
  OrderedJson line;
  line["time"] = std::round(now * 1000) / 1000;
  line["stage"] = events_stream.stage;
  line["job"] = events_stream.job;
  line["event"] = event;
  for (const auto& [key, value] : fields.items()) line[key] = value;
  if (!line.contains("resident_bytes")) line["resident_bytes"] = resident_bytes();
  const std::string failure =
      append_line(events_stream.file, line.dump(-1, ' ', false, OrderedJson::error_handler_t::replace) + "\n");
  if (!failure.empty() && !events_complained.exchange(true))
    spdlog::warn("{}: events are lost: {}", events_stream.file.string(), failure);
}

}  // namespace headfold
