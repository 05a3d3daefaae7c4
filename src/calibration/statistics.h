#pragma once
// Sufficient statistics of one layer and the HDF5 file that holds them (docs/formats.md, section "Statistics").

#include <ATen/ATen.h>
#include <headfold/checkpoint/config.h>
#include <headfold/comm/communicator.h>

#include <filesystem>
#include <string>
#include <vector>

namespace headfold::calibration {

/// Sums over calibration tokens, float64. Position 0 of every sequence (the attention sink) is kept apart (suffix _0).
/// The rotated-key Gram of position 0 needs no storage: rotation is the identity there, so it is W_K S2_0 W_K^T.
struct LayerStatistics {
  double count = 0, count_0 = 0;   ///< tokens
  at::Tensor sum, sum_0;           ///< S1 [hidden]
  at::Tensor moment, moment_0;     ///< S2 = sum x x^T [hidden, hidden], full symmetric
  at::Tensor rotated_keys;         ///< sum (R(n)k)(R(n)k)^T [kv_heads*head_dim, same], positions > 0; undefined for models without RoPE
  /// Cx(w) = (S2 + w S2_0) / (N + w N_0)  (methods.md 2.1)
  at::Tensor second_moment(double sink_weight) const;
  /// mu(w) [hidden]
  at::Tensor mean(double sink_weight) const;
};

/// What a statistics file says about itself.
struct StatisticsHeader {
  std::int64_t format_version = 1;
  std::string headfold_version;
  std::string model_hash, data_hash;
  std::string family;
  std::int64_t layers = 0, hidden = 0, kv_heads = 0, head_dim = 0;
  std::int64_t samples = 0, sequence_length = 0, seed = 0;
  std::string dtype;    ///< compute dtype
  std::string options;  ///< JSON text of the options
  bool has_rotated_keys = false;
};

/// Opens and validates a statistics file; layers are read on demand, so a rank reads only what it needs. Throws IoError, CorruptFile.
class StatisticsFile {
 public:
  explicit StatisticsFile(const std::filesystem::path& path);
  ~StatisticsFile();
  const StatisticsHeader& header() const { return header_; }
  LayerStatistics layer(std::int64_t index) const;
  const std::filesystem::path& path() const { return path_; }
  /// SHA-256 of header and of every layer's traces: identifies the content.
  std::string content_hash() const;

 private:
  std::filesystem::path path_;
  StatisticsHeader header_;
};

}  // namespace headfold::calibration
