#pragma once
// The typed errors of headfold and the exit codes they become.

#include <fmt/format.h>
#if FMT_VERSION >= 110000
#include <fmt/ranges.h>  // where join() stands since then
#endif

#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace headfold {

/// Process exit codes, after BSD sysexits; documented in docs/user-guide.md.
enum class ExitCode : int {
  done = 0,
  usage = 64,      ///< the command line is wrong
  bad_input = 65,  ///< a file or its content is wrong
  internal = 70,   ///< a defect in headfold, or a failing library
  io = 74,         ///< reading or writing failed
  stopped = 75,    ///< stopped on request; rerunning the same command resumes
};

/// Base of every error headfold throws. what() is one or more full sentences that name the file or option concerned;
/// hint() says what the user can do about it (may be empty).
class Error : public std::runtime_error {
 public:
  Error(ExitCode code, const std::string& message, std::string hint = {})
      : std::runtime_error(message), code_(code), hint_(std::move(hint)) {}
  ExitCode code() const { return code_; }
  const std::string& hint() const { return hint_; }
  /// Short name of the kind of error, for logs ("UsageError", …).
  virtual std::string_view kind() const { return "Error"; }

 private:
  ExitCode code_;
  std::string hint_;
};

/// The command line asks for something that cannot be done (exit 64).
class UsageError : public Error {
 public:
  explicit UsageError(const std::string& message, std::string hint = {})
      : Error(ExitCode::usage, message, std::move(hint)) {}
  std::string_view kind() const override { return "UsageError"; }
};

/// An input is readable but its content is not usable: wrong shape, unknown architecture, nonsense value (exit 65).
class InputError : public Error {
 public:
  explicit InputError(const std::string& message, std::string hint = {})
      : Error(ExitCode::bad_input, message, std::move(hint)) {}
  std::string_view kind() const override { return "InputError"; }
};

/// A file is not what its format demands: truncated, overlapping offsets, broken JSON (exit 65).
class CorruptFile : public Error {
 public:
  CorruptFile(const std::string& file, const std::string& message, std::string hint = {})
      : Error(ExitCode::bad_input, fmt::format("{}: {}", file, message), std::move(hint)), file_(file) {}
  const std::string& file() const { return file_; }
  std::string_view kind() const override { return "CorruptFile"; }

 private:
  std::string file_;
};

/// The operating system refused to read or write (exit 74).
class IoError : public Error {
 public:
  IoError(const std::string& file, const std::string& message, std::string hint = {})
      : Error(ExitCode::io, fmt::format("{}: {}", file, message), std::move(hint)), file_(file) {}
  const std::string& file() const { return file_; }
  std::string_view kind() const override { return "IoError"; }

 private:
  std::string file_;
};

/// A backend that this build does not contain was asked for (exit 64). The hint names the option to turn on.
class NotCompiled : public Error {
 public:
  NotCompiled(std::string_view feature, std::string_view option)
      : Error(ExitCode::usage, fmt::format("this build of headfold does not contain {}", feature),
              fmt::format("configure with -D{} and build again", option)) {}
  std::string_view kind() const override { return "NotCompiled"; }
};

/// An MPI call failed, or a peer did not answer in time (exit 70).
class MpiFailure : public Error {
 public:
  explicit MpiFailure(const std::string& message, std::string hint = {})
      : Error(ExitCode::internal, message, std::move(hint)) {}
  std::string_view kind() const override { return "MpiFailure"; }
};

/// The GPU or one of its libraries reported a failure (exit 70).
class DeviceFailure : public Error {
 public:
  explicit DeviceFailure(const std::string& message, std::string hint = {})
      : Error(ExitCode::internal, message, std::move(hint)) {}
  std::string_view kind() const override { return "DeviceFailure"; }
};

/// A numerical routine did not converge or failed its residual check (exit 70).
class NumericalError : public Error {
 public:
  explicit NumericalError(const std::string& message, std::string hint = {})
      : Error(ExitCode::internal, message, std::move(hint)) {}
  std::string_view kind() const override { return "NumericalError"; }
};

/// Broken invariant inside headfold (exit 70).
class InternalError : public Error {
 public:
  explicit InternalError(const std::string& message, std::string hint = {})
      : Error(ExitCode::internal, message, std::move(hint)) {}
  std::string_view kind() const override { return "InternalError"; }
};

/// The job was asked to stop and saved what it had (exit 75).
class Stopped : public Error {
 public:
  explicit Stopped(const std::string& message)
      : Error(ExitCode::stopped, message, "run the same command again to resume") {}
  std::string_view kind() const override { return "Stopped"; }
};

/// One line for a log: kind, message and hint.
std::string describe(const std::exception& error);
/// The exit code that `error` stands for; 70 for anything that is not a headfold::Error.
ExitCode exit_code_of(const std::exception& error);

}  // namespace headfold
