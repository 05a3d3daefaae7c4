#pragma once
// A file that is written and read at given offsets.

#include <cstddef>
#include <cstdint>
#include <filesystem>

namespace headfold {

class PositionedFile {
 public:
  /// Creates `path` (an older file of that name is removed first) with `bytes` bytes; takes the space from the file
  /// system where that is cheap. Throws IoError, also when the space does not suffice.
  static PositionedFile create(const std::filesystem::path& path, std::uint64_t bytes);
  /// A file of `bytes` bytes in `folder` that has no name and disappears with the process; can be read. Throws IoError,
  /// also when the space does not suffice.
  static PositionedFile temporary(const std::filesystem::path& folder, std::uint64_t bytes);
  /// Opens an existing file for writing.
  static PositionedFile open(const std::filesystem::path& path);
  PositionedFile(PositionedFile&& other) noexcept;
  PositionedFile& operator=(PositionedFile&&) = delete;
  ~PositionedFile();
  /// Writes all of `[data, data + bytes)` at `offset`. Many threads may write at once.
  void write(const void* data, std::uint64_t bytes, std::uint64_t offset) const;
  /// Fills all of `[data, data + bytes)` from `offset`; temporary files only. IoError, also where the file ends early.
  void read(void* data, std::uint64_t bytes, std::uint64_t offset) const;
  void sync() const;
  /// Throws IoError: some file systems report a full disk only here.
  void close();

 private:
  PositionedFile(std::filesystem::path path, int fd, bool kept = true) : path_(std::move(path)), fd_(fd), kept_(kept) {}
  void reserve(std::uint64_t bytes) const;
  std::filesystem::path path_;
  int fd_;
  bool kept_;  // not temporary: the disk may as well start writing
};

int process_id();

}  // namespace headfold
