#pragma once
// Private: sums over sequences whose bits do not depend on how many ranks and threads share the work.

#include <ATen/ATen.h>
#include <headfold/comm/communicator.h>

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace headfold::folding {

/// Float64 tensors that are added up together.
using Sums = std::vector<at::Tensor>;

/// Sequences first .. first + count, cut into a fixed number of chunks; every rank owns a contiguous run of chunks.
class DealtSequences {
 public:
  DealtSequences(const comm::Communicator& world, std::int64_t first, std::int64_t count, std::int64_t chunks);
  std::int64_t count() const { return count_; }
  /// Sequences of this rank, ascending.
  const std::vector<std::int64_t>& own() const { return own_; }
  /// Sum over all sequences of all ranks. `empty()` makes zeros; `add(sequence, sums)` adds one of the own sequences,
  /// on one thread with single-threaded products. Sequences of a chunk are added in order, chunks along a binary tree
  /// over their numbers. Collective; the same bits on every rank, at any number of ranks and threads. A thread holds
  /// one set of sums at a time.
  Sums sum(const std::function<Sums()>& empty, const std::function<void(std::int64_t, Sums&)>& add) const;

 private:
  comm::Communicator world_;
  std::int64_t first_, count_, chunks_;
  std::vector<std::int64_t> own_;
};

}  // namespace headfold::folding
