#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/base/test_point.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>
#include <sstream>
#include <utility>

namespace headfold {
namespace {

/// Opening a pipe would wait for a writer; that it is no regular file is found out right afterwards.
constexpr int kToRead = O_RDONLY | O_CLOEXEC | O_NONBLOCK;

std::string reason() {
  return std::strerror(errno);
}

/// Owns a file descriptor.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

void fsync_path(const fs::path& path, int flags) {
  const Descriptor fd(::open(path.c_str(), flags | O_CLOEXEC));
  if (fd.get() < 0) throw IoError(path.string(), "cannot be opened to be synchronised: " + reason());
  // Some file systems do not support fsync on folders; that is no reason to fail.
  if (::fsync(fd.get()) != 0 && errno != EINVAL) throw IoError(path.string(), "fsync failed: " + reason());
}

fs::path parent_of(const fs::path& path) {
  const fs::path parent = path.parent_path();
  return parent.empty() ? fs::path(".") : parent;
}

/// A "name:   123 kB" line of a /proc file, in bytes; 0 when absent.
std::uint64_t proc_value(const char* file, std::string_view name) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    if (line.rfind(name, 0) == 0 && line.size() > name.size() && line[name.size()] == ':')
      return std::strtoull(line.c_str() + name.size() + 1, nullptr, 10) * 1024;
  }
  return 0;
}

std::uint64_t number_in(const char* file) {
  std::ifstream in(file);
  std::uint64_t value = 0;
  if (in >> value) return value;
  return std::numeric_limits<std::uint64_t>::max();  // absent, or the word "max"
}

}  // namespace

std::string read_file(const fs::path& path, std::uint64_t max_bytes) {
  const Descriptor fd(::open(path.c_str(), kToRead));
  if (fd.get() < 0) throw IoError(path.string(), "cannot be read: " + reason());
  struct stat info {};
  if (::fstat(fd.get(), &info) != 0) throw IoError(path.string(), "cannot be read: " + reason());
  if (!S_ISREG(info.st_mode)) throw IoError(path.string(), "is not a regular file");
  if (static_cast<std::uint64_t>(info.st_size) > max_bytes)
    throw InputError(fmt::format("{}: has {} bytes, more than the {} that can be right here", path.string(),
                                 info.st_size, max_bytes));
  std::string content(static_cast<std::size_t>(info.st_size), '\0');
  std::size_t got = 0;
  while (got < content.size()) {
    const ssize_t n = ::read(fd.get(), content.data() + got, content.size() - got);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw IoError(path.string(), "reading failed: " + reason());
    if (n == 0) break;
    got += static_cast<std::size_t>(n);
  }
  content.resize(got);
  return content;
}

void write_file(const fs::path& path, std::string_view content) {
  make_folder(parent_of(path));
  const fs::path temporary = fmt::format("{}.{}.tmp", path.string(), ::getpid());
  {
    const Descriptor fd(::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
    if (fd.get() < 0) throw IoError(path.string(), "cannot be written: " + reason());
    std::size_t put = 0;
    while (put < content.size()) {
      const ssize_t n = ::write(fd.get(), content.data() + put, content.size() - put);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) {
        const std::string why = reason();
        ::unlink(temporary.c_str());
        throw IoError(path.string(), "writing failed: " + why, "check the free space and quota of that file system");
      }
      put += static_cast<std::size_t>(n);
    }
  }
  publish(temporary, path);
}

void copy_file(const fs::path& from, const fs::path& to) {
  write_file(to, read_file(from));
}

void publish(const fs::path& temporary, const fs::path& final_path) {
  fsync_path(temporary, O_RDONLY);
  if (has_test_points()) test_point("publish " + final_path.string());
  if (::rename(temporary.c_str(), final_path.c_str()) != 0) {
    const std::string why = reason();
    ::unlink(temporary.c_str());
    throw IoError(final_path.string(), "cannot be put in place: " + why);
  }
  fsync_path(parent_of(final_path), O_RDONLY | O_DIRECTORY);
}

void make_folder(const fs::path& path) {
  std::error_code code;
  fs::create_directories(path, code);
  if (code) throw IoError(path.string(), "the folder cannot be created: " + code.message());
}

std::uint64_t free_bytes(const fs::path& path) {
  fs::path probe = fs::absolute(path);
  while (!fs::exists(probe) && probe.has_parent_path() && probe != probe.parent_path()) probe = probe.parent_path();
  struct statvfs info {};
  if (::statvfs(probe.c_str(), &info) != 0) throw IoError(probe.string(), "free space cannot be read: " + reason());
  return static_cast<std::uint64_t>(info.f_bavail) * info.f_frsize;
}

std::uint64_t peak_resident_bytes() {
  return proc_value("/proc/self/status", "VmHWM");
}
void reset_peak_resident_bytes() {
  std::ofstream("/proc/self/clear_refs") << "5";
}
MovedBytes moved_bytes() {
  MovedBytes moved;
  std::uint64_t cancelled = 0;
  const std::pair<std::string_view, std::uint64_t*> wanted[] = {{"rchar:", &moved.read},
                                                                {"wchar:", &moved.written},
                                                                {"read_bytes:", &moved.storage_read},
                                                                {"write_bytes:", &moved.storage_written},
                                                                {"cancelled_write_bytes:", &cancelled}};
  std::ifstream in("/proc/self/io");
  std::uint64_t value = 0;
  for (std::string name; in >> name >> value;)
    for (const auto& [known, into] : wanted)
      if (name == known) *into = value;
  moved.storage_written -= std::min(cancelled, moved.storage_written);
  return moved;
}
std::uint64_t resident_bytes() {
  return proc_value("/proc/self/status", "VmRSS");
}
std::uint64_t resident_anonymous_bytes() {
  return proc_value("/proc/self/status", "RssAnon");
}

std::uint64_t available_memory_bytes() {
  std::uint64_t available = proc_value("/proc/meminfo", "MemAvailable");
  const std::uint64_t limit = number_in("/sys/fs/cgroup/memory.max");
  const std::uint64_t used = number_in("/sys/fs/cgroup/memory.current");
  if (limit != std::numeric_limits<std::uint64_t>::max() && used < limit) available = std::min(available, limit - used);
  return available;
}

struct MappedFile::State {
  fs::path path;
  void* data = nullptr;
  std::size_t size = 0;
  ~State() {
    if (data != nullptr) ::munmap(data, size);
  }
};

MappedFile::MappedFile(const fs::path& path) {
  auto state = std::make_shared<State>();
  state->path = path;
  const Descriptor fd(::open(path.c_str(), kToRead));
  if (fd.get() < 0) throw IoError(path.string(), "cannot be read: " + reason());
  struct stat info {};
  if (::fstat(fd.get(), &info) != 0) throw IoError(path.string(), "cannot be read: " + reason());
  if (!S_ISREG(info.st_mode)) throw IoError(path.string(), "is not a regular file");
  state->size = static_cast<std::size_t>(info.st_size);
  if (state->size > 0) {
    void* data = ::mmap(nullptr, state->size, PROT_READ, MAP_SHARED, fd.get(), 0);
    if (data == MAP_FAILED) throw IoError(path.string(), "cannot be mapped into memory: " + reason());
    state->data = data;
  }
  state_ = std::move(state);
}

std::span<const std::byte> MappedFile::bytes() const {
  return {static_cast<const std::byte*>(state_->data), state_->size};
}
std::uint64_t MappedFile::size() const {
  return state_->size;
}
const fs::path& MappedFile::path() const {
  return state_->path;
}

void MappedFile::will_need(std::uint64_t begin, std::uint64_t end) const {
  const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  end = std::min<std::uint64_t>(end, state_->size);
  begin = begin / page * page;
  if (begin < end) ::madvise(static_cast<char*>(state_->data) + begin, end - begin, MADV_WILLNEED);
}

void MappedFile::done_with(std::uint64_t begin, std::uint64_t end) const {
  const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  end = std::min<std::uint64_t>(end, state_->size);
  begin = (begin + page - 1) / page * page;
  end = end / page * page;
  if (begin < end) ::madvise(static_cast<char*>(state_->data) + begin, end - begin, MADV_DONTNEED);
}

std::shared_ptr<const void> MappedFile::owner() const {
  return state_;
}

}  // namespace headfold
