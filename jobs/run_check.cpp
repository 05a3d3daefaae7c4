#include "run_check.h"

#include <headfold/base/files.h>
#include <headfold/checkpoint/reader.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>

#include "session.h"

namespace headfold::jobs {

namespace {

/// What is wrong, and where the file says it.
struct Fault {
  ExitCode code = ExitCode::bad_input;
  std::string place, message, hint;  ///< "run.ini:13", "[convert half]: kv-heads = 3: ..."
  std::string text() const {
    return fmt::format("{}: {}{}", place, message, hint.empty() ? "" : fmt::format(" ({})", hint));
  }
};

/// Throws the error that the first one is; its message ends with the others.
[[noreturn]] void refuse(const std::vector<Fault>& faults) {
  const Fault& first = faults.front();
  std::string message = first.message;
  std::vector<std::string> said = {first.text()};
  for (const Fault& fault : faults)  // every model of an evaluation has the same
    if (const std::string text = fault.text(); std::find(said.begin(), said.end(), text) == said.end()) {
      message += "\n  and " + text;
      said.push_back(text);
    }
  if (first.code == ExitCode::io) throw IoError(first.place, message, first.hint);
  const std::string whole = fmt::format("{}: {}", first.place, message);
  if (first.code == ExitCode::usage) throw UsageError(whole, first.hint);
  if (first.code == ExitCode::bad_input) throw InputError(whole, first.hint);
  throw Error(first.code, whole, first.hint);
}

/// Where `word` stands in `text` and is not part of a longer one.
std::size_t find_word(const std::string& text, const std::string& word) {
  const auto inside = [&](std::size_t at) {
    return at < text.size() && (std::isalnum(static_cast<unsigned char>(text[at])) != 0 || text[at] == '-' ||
                                text[at] == '_' || text[at] == '/');
  };
  for (std::size_t at = text.find(word); at != std::string::npos; at = text.find(word, at + 1))
    if ((at == 0 || !inside(at - 1)) && !inside(at + word.size())) return at;
  return std::string::npos;
}

/// The entry of the section that a job's message is about: the option that it names first, else the value.
const IniEntry* entry_of(const IniSection& section, const std::string& message) {
  const IniEntry* found = nullptr;
  std::size_t first = std::string::npos;
  for (const IniEntry& one : section.entries)
    if (const std::size_t at = find_word(message, "--" + one.key); at < first) {
      first = at;
      found = &one;
    }
  if (found != nullptr) return found;
  for (const IniEntry& one : section.entries) {
    for (const std::string& word : split_words(one.value))
      if ((word.size() > 1 && find_word(message, word) != std::string::npos) ||
          message.find('"' + word + '"') != std::string::npos)
        return &one;
  }
  return nullptr;
}

Fault fault_of(const RunPlan& plan, const IniSection& section, const IniEntry* one, const Error& error) {
  const int line = one == nullptr ? section.line : one->line;
  return {error.code(), fmt::format("{}:{}", plan.file.string(), line),
          one == nullptr ? fmt::format("{}: {}", title(section), error.what())
                         : fmt::format("{}: {} = {}: {}", title(section), one->key, one->value, error.what()),
          error.hint()};
}

void check_readable(const fs::path& file) {
  std::error_code code;
  if (!fs::exists(file, code)) throw IoError(file.string(), "there is no such file");
  if (fs::is_directory(file, code)) throw IoError(file.string(), "is a folder, not a file");
  if (::access(file.c_str(), R_OK) != 0) throw IoError(file.string(), "this user may not read it");
}

}  // namespace

void check_run(const RunPlan& plan, const std::vector<std::pair<std::string, const RunElement*>>& elements) {
  Planned planned;
  planned.model = plan.model;
  planned.is_made = [&](const fs::path& path) {
    for (const RunStage& stage : plan.stages)
      for (const RunElement& element : stage.elements) {
        const fs::path inside = path.lexically_relative(element.output);
        if (!inside.empty() && *inside.begin() != "..") return true;
      }
    return false;
  };
  std::vector<Fault> faults;
  bool known = false;
  try {
    planned.original = checkpoint::Reader(plan.model).config();
    known = true;
  } catch (const Error& error) {
    faults.push_back({error.code(), fmt::format("{}:{}", plan.file.string(), plan.model_line),
                      fmt::format("[run]: model = {}: {}", plan.model.string(), error.what()), error.hint()});
  }
  for (const auto& [job, element] : elements) {
    const IniSection& section = element->said;
    const std::size_t before = faults.size();
    for (const auto& [key, file] : element->files) {
      try {
        if (!planned.is_made(file)) check_readable(file);
      } catch (const Error& error) {
        const auto named = std::find_if(section.entries.begin(), section.entries.end(),
                                        [&name = key](const IniEntry& one) { return one.key == name; });
        faults.push_back(fault_of(plan, section, named == section.entries.end() ? nullptr : &*named, error));
      }
    }
    const auto check = find_job(job).check;
    if (check == nullptr || !known || faults.size() > before) continue;  // it would miss the same
    try {
      check(planned, element->arguments);
    } catch (const Error& error) {
      faults.push_back(fault_of(plan, section, entry_of(section, error.what()), error));
    }
  }
  if (!faults.empty()) refuse(faults);
}

}  // namespace headfold::jobs
