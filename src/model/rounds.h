#pragma once
// How much work lies between two moments at which all ranks agree whether to stop or to save.

#include <headfold/comm/grid.h>

#include <algorithm>
#include <cstdint>

namespace headfold::model {

/// Micro-batches of each replica in the next round: enough that draining a pipeline, or reading streamed layers again,
/// costs little; beyond that as many as take some seconds. Ranks' clocks differ: rank 0's size must be broadcast.
class RoundSize {
 public:
  /// `tokens`: of one micro-batch.
  RoundSize(const comm::Grid& grid, bool streamed, std::int64_t tokens) {
    constexpr std::int64_t kStreamedTokens = 32768;
    if (grid.stages > 1) least_ = 16 * (grid.stages - 1);
    if (streamed) least_ = std::max(least_, (kStreamedTokens + tokens - 1) / std::max<std::int64_t>(tokens, 1));
    seconds_ = streamed ? 60 : grid.stages > 1 ? 10 : 2;
    size_ = least_;
  }
  std::int64_t size() const { return size_; }
  /// The round that has just ended ran `micro_batches` of a replica, whatever size() was, and took so long. The next
  /// one has at most four times as many.
  void took(double seconds, std::int64_t micro_batches) {
    const auto ran = static_cast<double>(std::max<std::int64_t>(micro_batches, 1));
    const auto least = static_cast<double>(least_);
    const double wanted = ran * seconds_ / std::max(seconds, 1e-3);
    size_ = static_cast<std::int64_t>(std::clamp(wanted, least, std::max(least, 4 * ran)));
  }

 private:
  std::int64_t least_ = 1, size_ = 1;
  double seconds_ = 2;  ///< aimed at
};

}  // namespace headfold::model
