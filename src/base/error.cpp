#include <headfold/base/error.h>

namespace headfold {

std::string describe(const std::exception& error) {
  if (const auto* own = dynamic_cast<const Error*>(&error)) {
    std::string line = fmt::format("{}: {}", own->kind(), own->what());
    if (!own->hint().empty()) line += fmt::format("\n  hint: {}", own->hint());
    return line;
  }
  // libtorch appends a C++ stack trace to its messages; its first line says what is wrong.
  std::string text = error.what();
  if (const auto trace = text.find("\nException raised from"); trace != std::string::npos) text.resize(trace);
  return fmt::format("InternalError: {}", text);
}

ExitCode exit_code_of(const std::exception& error) {
  if (const auto* own = dynamic_cast<const Error*>(&error)) return own->code();
  return ExitCode::internal;
}

}  // namespace headfold
