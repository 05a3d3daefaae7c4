#pragma once
// Sufficient statistics of one layer and the HDF5 file that holds them (docs/formats.md, section "Statistics").

#include <ATen/ATen.h>
#include <headfold/checkpoint/config.h>
#include <headfold/comm/communicator.h>

#include <filesystem>
#include <string>
#include <vector>

namespace headfold::calibration {

/// What the statistics of a layer hold, and how wide it is.
struct StatisticsShape {
  std::int64_t hidden = 0;
  std::int64_t key_width = 0;    ///< kv_heads * head_dim of the rotated keys; 0: none are kept
  std::int64_t value_width = 0;  ///< kv_heads * head_dim of the values; 0: none are kept
  bool halves = false;           ///< half-sample sums
  bool attention = false;        ///< attention statistics, for which the rest is needed
  std::int64_t heads = 0, kv_heads = 0, head_dim = 0;
  std::int64_t attended_heads = 0;  ///< KV heads per block; divides kv_heads
  std::int64_t sequence_length = 0;
  std::int64_t block() const { return attended_heads * head_dim; }
};

/// Sums over calibration tokens, float64. Position 0 of every sequence (the attention sink) is kept apart (suffix _0).
/// The Grams of keys and values at position 0 need no storage: rotation is the identity there, so they are W S2_0 W^T.
struct LayerStatistics {
  double count = 0, count_0 = 0;  ///< tokens
  at::Tensor sum, sum_0;          ///< S1 [hidden]
  at::Tensor moment, moment_0;    ///< S2 = sum x x^T [hidden, hidden], full symmetric
  at::Tensor rotated_keys;  ///< sum (R(n)k)(R(n)k)^T [kv_heads*head_dim, same], positions > 0; without RoPE sum k k^T
  at::Tensor values;        ///< sum v v^T [kv_heads*head_dim, same], positions > 0, biases included
  /// The even sequences' share of the sums above (sequence s of the drawn list, s even); undefined when no halves were
  /// kept. The odd half is the difference.
  double count_even = 0, count_0_even = 0;
  at::Tensor sum_even, sum_0_even, moment_even, moment_0_even, rotated_keys_even, values_even;
  /// Attention statistics, over all positions (position 0 included); undefined when not collected.
  double attention_count = 0;       ///< queries
  at::Tensor rotated_queries;       ///< sum (R(n)q)(R(n)q)^T per query head [heads, head_dim, head_dim]; without RoPE
                                    ///< sum q q^T
  at::Tensor distance_mass;         ///< sum over queries of attention probability at distance tau, [heads, sequence
                                    ///< length]
  at::Tensor attended;              ///< sum y_h y_h^T, y_h = sum_j a_hj v_j over the values of the head's block,
                                    ///< [heads, block, block], block = attended_heads * head_dim
  at::Tensor attended_sum;          ///< sum y_h, [heads, block]
  std::int64_t attended_heads = 0;  ///< source KV heads of one block; query head h belongs to block kv(h) /
                                    ///< attended_heads
  bool has_halves() const { return sum_even.defined(); }
  bool has_attention() const { return rotated_queries.defined(); }
  /// One half as statistics of its own (which: 0 even, 1 odd), without attention statistics. InternalError without
  /// halves.
  LayerStatistics half(int which) const;
  /// Cx(w) = (S2 + w S2_0) / (N + w N_0)  (methods.md 2.1). InputError when no token is left.
  at::Tensor second_moment(double sink_weight) const;
  /// mu(w) [hidden]
  at::Tensor mean(double sink_weight) const;
};

/// The same sums as they are accumulated, reduced and stored: symmetric matrices as packed lower triangles
/// (linalg::GramAccumulator), those of all heads one after the other.
struct PackedStatistics {
  double count = 0, count_0 = 0;
  at::Tensor sum, sum_0;        ///< [hidden]
  at::Tensor moment, moment_0;  ///< [hidden (hidden + 1) / 2]
  at::Tensor rotated_keys;      ///< [k (k + 1) / 2], k = kv_heads*head_dim; undefined when not collected
  at::Tensor values;            ///< likewise
  double count_even = 0, count_0_even = 0;
  at::Tensor sum_even, sum_0_even, moment_even, moment_0_even, rotated_keys_even,
      values_even;  ///< undefined without halves
  double attention_count = 0;
  at::Tensor rotated_queries;       ///< [heads * head_dim (head_dim + 1) / 2]; this and all below: undefined when not
                                    ///< collected
  at::Tensor distance_mass;         ///< [heads * sequence length]
  at::Tensor attended;              ///< [heads * block (block + 1) / 2]
  at::Tensor attended_sum;          ///< [heads * block]
  std::int64_t heads = 0;           ///< query heads
  std::int64_t attended_heads = 0;  ///< source KV heads of one block
  /// `packed` leaves moment_0, keys and values (and their even halves) as the packed lower triangles they are.
  LayerStatistics full(bool packed = false) const;
};

/// What a statistics file says about itself.
struct StatisticsHeader {
  std::int64_t format_version = 3;  ///< of the file that was read; files are written in the newest version
  std::string headfold_version;
  std::string model_hash, data_hash;
  std::string family;
  std::int64_t layers = 0, hidden = 0, kv_heads = 0, head_dim = 0;
  std::int64_t samples = 0, sequence_length = 0, seed = 0;
  std::string dtype;    ///< compute dtype
  std::string options;  ///< JSON text of the options
  bool has_rotated_keys = false;
  bool has_values = false;          ///< Gram of values
  bool has_halves = false;          ///< half-sample sums
  bool has_attention = false;       ///< attention statistics
  std::int64_t heads = 0;           ///< query heads; 0 without attention statistics
  std::int64_t attended_heads = 0;  ///< source KV heads of one block of attended values; 0 without them
  std::int64_t key_width() const { return kv_heads * head_dim; }
  StatisticsShape shape() const;
};

/// Opens and validates a statistics file; layers are read on demand, so a rank reads only what it needs. Throws
/// IoError, CorruptFile. No handle stays open between calls.
class StatisticsFile {
 public:
  explicit StatisticsFile(const std::filesystem::path& path);
  ~StatisticsFile();
  const StatisticsHeader& header() const { return header_; }
  /// What to read of a layer: what is left out, or not in the file, stays undefined.
  struct Selection {
    bool halves = true;
    bool attention = true;  ///< rotated queries and distances, and with `attended` attended values
    bool moment = true;     ///< S2 of positions > 0, in a half only with `halves`
    bool moment_0 = true;   ///< that of position 0, likewise
    bool rotated_keys = true;
    bool values = true;
    bool attended = true;
    bool packed = false;  ///< moment_0, keys and values stay packed lower triangles (PackedStatistics::full())
  };
  /// InputError for an index outside the file; CorruptFile naming the dataset for NaN, Inf or sums that contradict each
  /// other.
  LayerStatistics layer(std::int64_t index) const { return layer(index, Selection()); }
  LayerStatistics layer(std::int64_t index, const Selection& selection) const;
  const std::filesystem::path& path() const { return path_; }
  /// SHA-256 of header and of every layer's counts and traces (to 9 digits, so that it does not depend on the number of
  /// ranks): identifies the content.
  std::string content_hash() const;

 private:
  std::filesystem::path path_;
  StatisticsHeader header_;
};

/// One layer that this rank writes.
struct OwnedLayer {
  std::int64_t layer = 0;
  const PackedStatistics* statistics = nullptr;
};

/// Collective: every rank passes the same header and its own layers; together they must name every layer once
/// (InternalError). Written through parallel HDF5 (one rank: serial) to `path`.tmp, then fsync and rename by rank 0.
/// Throws IoError, also when the free space does not suffice.
void write_statistics(const std::filesystem::path& path, const StatisticsHeader& header,
                      const comm::Communicator& world, const std::vector<OwnedLayer>& own);

/// 53 bits that any changed or moved word of float64 values changes (but for a chance of 2^-53), as a whole number. One
/// pass at the speed of memory: a cryptographic hash would cost more than reading the file.
double value_checksum(const at::Tensor& values);

/// Bytes of the file that write_statistics() makes, without HDF5's own few KiB per layer.
std::uint64_t statistics_file_bytes(const StatisticsHeader& header);
/// Bytes of one layer's packed statistics.
std::uint64_t layer_statistics_bytes(const StatisticsShape& shape);

}  // namespace headfold::calibration
