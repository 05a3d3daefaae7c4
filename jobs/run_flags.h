#pragma once
// Which elements of a run are finished: a flag for each, which says what it was made from.

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "run_config.h"

namespace headfold::jobs {

/// What is known about the elements of a run, by id ("convert-0").
class RunFlags {
 public:
  /// Reads the flags in `plan.folder`/finished and takes fingerprints of all inputs. Touches nothing. One process.
  explicit RunFlags(const RunPlan& plan);
  /// Whether the element was finished by this configuration on these inputs, and its result is there.
  bool finished(const std::string& id) const;
  /// Whether it was finished once, and the configuration or an input has changed since.
  bool stale(const std::string& id) const;
  /// Says that it is finished: FOLDER/finished/ID (docs/formats.md). IoError.
  void finish(const std::string& id, double seconds);
  /// Elements whose results `id` reads and that are not finished.
  std::vector<std::string> missing(const std::string& id) const;

 private:
  struct Known {
    const RunElement* element = nullptr;
    std::string identity;                       ///< of what decides the result
    std::map<std::string, std::string> inputs;  ///< fingerprints
    std::optional<std::string> flag;            ///< identity in the flag's file
  };
  bool result_is_there(const RunElement& element) const;
  std::filesystem::path folder_;
  std::map<std::string, Known> known_;
};

/// SHA-256 over names, sizes and content of a file, or of all files below a folder; of files over 16 MiB samples of the
/// content. "absent" where there is none.
std::string input_fingerprint(const std::filesystem::path& path);

/// Removes temporaries (NAME.PROCESS.tmp) that a killed job left in the folder `output`, or beside the file `output`
/// and named after it. Only for what no other job writes to.
void remove_temporaries(const std::filesystem::path& output);

/// Results of an earlier evaluation in the folder of an element, so that they do not stand beside the new ones.
std::vector<std::filesystem::path> results_below(const std::filesystem::path& folder);

}  // namespace headfold::jobs
