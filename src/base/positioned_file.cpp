#include <fcntl.h>
#include <unistd.h>

#include <headfold/base/error.h>
#include <headfold/base/positioned_file.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

namespace headfold {
namespace {
constexpr const char* kFull = "check the free space and quota of that file system";
constexpr std::uint64_t kMost = std::uint64_t{1} << 30;  // one call of the system moves less than 2 GiB
std::string reason() {
  return std::strerror(errno);
}
}  // namespace

PositionedFile PositionedFile::create(const std::filesystem::path& path, std::uint64_t bytes) {
  ::unlink(path.c_str());
  const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  if (fd < 0) throw IoError(path.string(), "cannot be created: " + reason());
  PositionedFile file(path, fd);
  if (::ftruncate(fd, static_cast<off_t>(bytes)) != 0)
    throw IoError(path.string(), "cannot be given its size: " + reason(), kFull);
  file.reserve(bytes);
  return file;
}

PositionedFile PositionedFile::temporary(const std::filesystem::path& folder, std::uint64_t bytes) {
  std::string name = (folder / ".headfold-XXXXXX").string();
  const int fd = ::mkstemp(name.data());
  if (fd < 0) throw IoError(folder.string(), "no temporary file can be made there: " + reason());
  ::unlink(name.c_str());
  PositionedFile file(folder, fd, false);
  file.reserve(bytes);
  return file;
}

void PositionedFile::reserve(std::uint64_t bytes) const {
  // Reserving makes a full disk fail now, not after hours; a file system that cannot do it says EOPNOTSUPP.
  if (bytes > 0 && ::fallocate(fd_, 0, 0, static_cast<off_t>(bytes)) != 0 &&
      (errno == ENOSPC || errno == EDQUOT || errno == EFBIG))
    throw IoError(path_.string(), fmt::format("{} bytes cannot be reserved: {}", bytes, reason()), kFull);
}

PositionedFile PositionedFile::open(const std::filesystem::path& path) {
  const int fd = ::open(path.c_str(), O_WRONLY | O_CLOEXEC);
  if (fd < 0) throw IoError(path.string(), "cannot be written: " + reason());
  return {path, fd};
}

PositionedFile::PositionedFile(PositionedFile&& other) noexcept
    : path_(std::move(other.path_)), fd_(other.fd_), kept_(other.kept_) {
  other.fd_ = -1;
}

PositionedFile::~PositionedFile() {
  if (fd_ >= 0) ::close(fd_);
}

void PositionedFile::write(const void* data, std::uint64_t bytes, std::uint64_t offset) const {
  const char* from = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n = ::pwrite(fd_, from, static_cast<std::size_t>(std::min(bytes, kMost)), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw IoError(path_.string(), "writing failed: " + reason(), kFull);
    from += n;
    bytes -= static_cast<std::uint64_t>(n);
#ifdef __linux__
    // The disk starts at once instead of when fsync asks for everything; what this returns does not matter.
    if (kept_) (void)::sync_file_range(fd_, static_cast<off_t>(offset), static_cast<off_t>(n), SYNC_FILE_RANGE_WRITE);
#endif
    offset += static_cast<std::uint64_t>(n);
  }
}

void PositionedFile::read(void* data, std::uint64_t bytes, std::uint64_t offset) const {
  char* to = static_cast<char*>(data);
  while (bytes > 0) {
    const ssize_t n = ::pread(fd_, to, static_cast<std::size_t>(std::min(bytes, kMost)), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) throw IoError(path_.string(), "reading failed: " + (n < 0 ? reason() : "the file ends early"));
    to += n;
    bytes -= static_cast<std::uint64_t>(n);
    offset += static_cast<std::uint64_t>(n);
  }
}

void PositionedFile::sync() const {
  if (::fsync(fd_) != 0) throw IoError(path_.string(), "fsync failed: " + reason(), kFull);
}

void PositionedFile::close() {
  const int fd = fd_;
  fd_ = -1;
  if (fd >= 0 && ::close(fd) != 0) throw IoError(path_.string(), "closing failed: " + reason(), kFull);
}

int process_id() {
  return ::getpid();
}

}  // namespace headfold
