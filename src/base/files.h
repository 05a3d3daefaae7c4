#pragma once
// Files as headfold treats them: read whole with a clear error, mapped for large ones, written atomically.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace headfold {

namespace fs = std::filesystem;

/// Whole content of a file. Throws IoError (missing, unreadable), InputError when it is larger than `max_bytes`.
std::string read_file(const fs::path& path, std::uint64_t max_bytes = std::uint64_t{1} << 32);

/// Writes `content` to a temporary beside `path`, fsyncs, renames and fsyncs the folder: a reader sees the old file or
/// the whole new one. Creates missing parent folders. Throws IoError.
void write_file(const fs::path& path, std::string_view content);

/// Copies a file byte for byte through the same atomic path.
void copy_file(const fs::path& from, const fs::path& to);

/// fsync of a finished temporary, then rename to its final name and fsync of the folder. Throws IoError.
void publish(const fs::path& temporary, const fs::path& final_path);

/// Creates a folder and its parents. Throws IoError that names it.
void make_folder(const fs::path& path);

/// Bytes free for an unprivileged user on the file system of `path` (or of its nearest existing parent).
std::uint64_t free_bytes(const fs::path& path);

/// Largest resident set of this process so far, in bytes (VmHWM).
std::uint64_t peak_resident_bytes();
/// From here on peak_resident_bytes() counts anew, where the kernel allows it.
void reset_peak_resident_bytes();
/// Bytes this process has moved so far (/proc/self/io; zeros where that cannot be read): through system calls, and
/// those of them and of mapped files that came from or went to storage.
struct MovedBytes {
  std::uint64_t read = 0, written = 0;                  ///< through system calls
  std::uint64_t storage_read = 0, storage_written = 0;  ///< from and to storage
};
MovedBytes moved_bytes();
/// Current resident set of this process in bytes (VmRSS): what it allocated, and pages of files it has mapped.
std::uint64_t resident_bytes();
/// Current resident anonymous memory of this process in bytes (RssAnon): what it allocated, without file-backed pages.
std::uint64_t resident_anonymous_bytes();
/// Memory this process may still use, in bytes: MemAvailable, or the cgroup's limit less its use where that is smaller.
std::uint64_t available_memory_bytes();

/// A read-only memory map of a whole file. Copies share the map.
class MappedFile {
 public:
  /// Maps `path`. Throws IoError when it cannot be opened or is not a regular file. An empty file gives an empty span.
  explicit MappedFile(const fs::path& path);
  std::span<const std::byte> bytes() const;
  std::uint64_t size() const;
  const fs::path& path() const;
  /// Tells the kernel that `[begin, end)` will be read soon (readahead) or is no longer needed (drops its pages).
  void will_need(std::uint64_t begin, std::uint64_t end) const;
  void done_with(std::uint64_t begin, std::uint64_t end) const;
  /// Keeps the map alive as long as the pointer lives; for tensors that view the map.
  std::shared_ptr<const void> owner() const;

 private:
  struct State;
  std::shared_ptr<const State> state_;
};

}  // namespace headfold
