#pragma once
// Sums of a calibration that is under way, kept on disk so that it can go on after an interruption.

#include <headfold/calibration/collect.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

namespace headfold::calibration {

/// A folder with one file of every rank's own sums and `state.json`, which says what they are of and how many sequences
/// are in them. state.json is replaced last, when all files of a generation are on disk: a job that is killed at any
/// moment finds one whole generation or none. On the grid that wrote them every rank gets its own sums back, bit for
/// bit; on another grid sums are added up, which changes their rounding alone.
class PartialSums {
 public:
  /// `identity` is what decides the sums (model, data, options). Touches nothing.
  PartialSums(comm::Grid grid, std::filesystem::path folder, const std::string& identity);
  /// Reads what was saved into this rank's `layers`, of which `first` is the index of the first one. Collective.
  /// Returns the number of sequences, from the first of the drawn list on, that are in the sums; 0 when nothing was
  /// saved, when it belongs to another calibration (said in a log line) or when it is damaged (a warning).
  std::int64_t restore(const std::vector<std::unique_ptr<LayerAccumulator>>& layers, std::int64_t first);
  /// Saves the sums over the first `sequences` sequences. Collective; IoError on every rank when one cannot write, and
  /// what was saved before is then still there.
  void save(const std::vector<std::unique_ptr<LayerAccumulator>>& layers, std::int64_t first, std::int64_t sequences);
  /// Removes the folder. Rank 0 alone.
  static void remove(const std::filesystem::path& folder);
  const std::filesystem::path& folder() const { return folder_; }

 private:
  /// Sums of one rank: its stage's layers, its replica's sequences.
  struct Part {
    std::string file;
    int replica = 0;
    std::int64_t begin = 0, end = 0;     ///< layers
    std::vector<std::string> checksums;  ///< by layer
  };
  void add(const Part& part, const std::vector<std::unique_ptr<LayerAccumulator>>& layers, std::int64_t first) const;
  void remove_others(std::int64_t generation) const;
  comm::Grid grid_;
  std::filesystem::path folder_;
  std::string identity_;
  std::int64_t generation_ = 0;
};

}  // namespace headfold::calibration
