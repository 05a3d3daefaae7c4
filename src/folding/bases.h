#pragma once
// From options to a fold, and work spread over threads so that results do not depend on how many there are.

#include <headfold/folding/folds.h>

#include <functional>

namespace headfold::folding {

/// Everything the groups of one layer share. `moments` is null when no statistics are given.
struct LayerProblem {
  LayerWeights weights;
  LayerMoments moments;
  bool has_moments = false;
  bool rotates = false;  ///< RoPE
  bool centred_values =
      false;                 ///< the output projection has a bias that takes the values' mean (BLOOM; methods.md 4.5)
  at::Tensor frequencies;    ///< RoPE inverse frequencies [head_dim / 2], float64; undefined without RoPE
  std::int64_t context = 0;  ///< tokens that distances and the slow band are meant for
  const LayerMoments* moments_or_null() const { return has_moments ? &moments : nullptr; }
};
/// Which calibration sequences: all, or one half of them (held-out losses).
enum class Half { all, even, odd };
/// `half` other than all needs statistics with halves (InternalError).
LayerProblem load_problem(const checkpoint::Reader& reader, const calibration::StatisticsFile* statistics,
                          std::int64_t layer, Part part, const FoldOptions& options, Half half = Half::all);

/// Basis of one group, scaled for storage; `kv_heads` are source heads, `width` channels of the merged head (0:
/// head_dim).
Basis key_basis(const LayerProblem& problem, const std::vector<std::int64_t>& kv_heads, const FoldOptions& options,
                std::int64_t width = 0);
Basis value_basis(const LayerProblem& problem, const std::vector<std::int64_t>& kv_heads, const FoldOptions& options,
                  std::int64_t width = 0);
/// The quantities in which the folds' losses are given, for any statistics: key_basis(p, …).loss equals
/// key_loss(p, …, basis) and so for values (value_loss knows per-query-head decoders), up to rounding.
double key_loss(const LayerProblem& problem, const std::vector<std::int64_t>& kv_heads, const FoldOptions& options,
                const Basis& basis);
double value_loss(const LayerProblem& problem, const std::vector<std::int64_t>& kv_heads, const FoldOptions& options,
                  const Basis& basis);
/// tr F of the same problems: the loss of keeping nothing.
double key_total(const LayerProblem& problem, const std::vector<std::int64_t>& kv_heads, const FoldOptions& options);
double value_total(const LayerProblem& problem, const std::vector<std::int64_t>& kv_heads, const FoldOptions& options);

/// Calls work(0 .. count-1), each item on one thread with single-threaded products, so that bytes do not depend on the
/// thread count.
void for_each_item(std::int64_t count, const std::function<void(std::int64_t)>& work);

/// Block [begin, end) of `items` that `rank` of `size` works on; sizes differ by at most one.
std::pair<std::int64_t, std::int64_t> share_of(std::int64_t items, int rank, int size);

}  // namespace headfold::folding
