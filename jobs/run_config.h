#pragma once
// The configuration file of `headfold run`: which jobs make up a run, with which options, in which order.

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "job.h"

namespace headfold::jobs {

/// Sections and keys of an INI file.
struct IniEntry {
  std::string key, value;
  int line = 0;
};
struct IniSection {
  std::string kind, name;  ///< of "[convert half]": convert, half
  int line = 0;
  std::vector<IniEntry> entries;
};

/// One thing that a stage does: one command of a job.
struct RunElement {
  std::string name;                           ///< "half", "text/half"; of stages with one element the stage's name
  std::vector<std::string> arguments;         ///< of the job, without the job's own name
  std::string described;                      ///< what decides the result, as the file says it: job, options, models
  std::vector<std::filesystem::path> inputs;  ///< files and folders that it reads and that no stage makes
  std::vector<std::string> upstream;          ///< elements whose results it reads, "convert-0"
  std::filesystem::path output;               ///< file or folder that it makes
  IniSection said;                            ///< what it comes from; after its own entries those of [run]
  std::vector<std::pair<std::string, std::filesystem::path>>
      files;  ///< files that it reads, by the key that names them
  std::vector<std::filesystem::path>
      evidence;  ///< files that exist once it is done; none: a results file below `output`
};

/// A stage has the name of the job that it runs.
struct RunStage {
  std::string name;
  std::vector<std::string> after;                              ///< stages that must be finished before
  std::vector<std::pair<std::string, std::string>> resources;  ///< of a batch system, as the file says them
  std::vector<RunElement> elements;
  /// "convert-0": how flags, logs and events call an element.
  std::string id(std::size_t element) const { return name + "-" + std::to_string(element); }
};

/// What a configuration file asks for. All paths are absolute.
struct RunPlan {
  std::filesystem::path file, folder;
  std::filesystem::path model;   ///< the original
  int model_line = 0;            ///< where the file names it
  std::vector<RunStage> stages;  ///< in the order in which they run
};

/// Reads the text of a configuration file (docs/user-guide.md, section "run"). `file` is the path it was read from:
/// paths in it are relative to that file's folder. InputError naming file and line for unknown sections and keys (with
/// the nearest legal ones), for values that the job's own options refuse, and for names that clash or are not there.
RunPlan read_run_plan(std::string_view text, const std::filesystem::path& file);

/// Lines "key = value" under "[kind name]"; what follows `#` or `;` at the beginning of a line or after a space is a
/// comment. InputError naming file and line for anything else, and for a key or section that appears twice.
std::vector<IniSection> parse_ini(std::string_view text, const std::string& file);

/// "[convert half]".
std::string title(const IniSection& section);

/// Words of a list: separated by spaces or commas, in double quotes where they contain them.
std::vector<std::string> split_words(const std::string& text);

/// Those of `names` that `word` may have meant, most alike first; at most three.
std::vector<std::string> nearest_names(const std::string& word, const std::vector<std::string>& names);

}  // namespace headfold::jobs
