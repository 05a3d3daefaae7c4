#pragma once
// From options to a fold, and work spread over threads so that results do not depend on how many there are.

#include <headfold/folding/folds.h>

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>

namespace headfold::folding {

/// Grams of a layer's groups, computed on first use and kept: products with the input's moment are most of the work at
/// 7B shapes. Safe to ask for from several threads.
class GroupGrams;
class KeptBases;

/// Everything the groups of one layer share. `moments` is null when no statistics are given.
struct LayerProblem {
  LayerWeights weights;
  LayerMoments moments;
  bool has_moments = false;
  bool rotates = false;  ///< RoPE
  /// Query Grams of the statistics stand for W~_Q E[x~ x~^T] W~_Q^T: no rotation, and position 0 weighs one as in them.
  bool measured_queries = false;
  bool centred_values = false;  ///< the output projection has a bias that takes the values' mean (BLOOM, LLaMA with
                                ///< attention biases; methods.md 4.5)
  at::Tensor frequencies;       ///< RoPE inverse frequencies [head_dim / 2], float64; undefined without RoPE
  std::int64_t context = 0;     ///< tokens that distances and the slow band are meant for
  /// Null: products are formed again every time. Made by load_problem(): weights and moments must not change
  /// afterwards.
  std::shared_ptr<GroupGrams> group_grams;
  std::shared_ptr<const LayerGrams> grams;  ///< null unless add_grams() was called
  std::int64_t layer = -1;
  const KeptBases* kept = nullptr;  ///< bases of make_plan(), which folded_keys() and folded_values() then take
  const LayerMoments* moments_or_null() const { return has_moments ? &moments : nullptr; }
};
/// Computes the Grams that the options' metrics need; items spread over threads, bytes independent of their number.
/// `problem` has both parts loaded. Worth it when many groups of one layer are tried.
void add_grams(LayerProblem& problem, const FoldOptions& options);
/// The group's blocks of the layer's Grams when these were added (its rows then stay undefined), else its rows, of
/// `part` alone.
GroupWeights group_of(const LayerProblem& problem, const std::vector<std::int64_t>& kv_heads, Part part = Part::both);
/// Which calibration sequences: all, or one half of them (held-out losses).
enum class Half { all, even, odd };
/// For a problem whose weights and moments are set (tensors are shared).
std::shared_ptr<GroupGrams> make_group_grams(const LayerProblem& problem);
/// What a fold reads of a group: the Grams above where the problem has any (rows then stay undefined), else its rows.
/// `metric` is that of `part`, keys or values; `with_queries`: query Grams, too; `with_value_mean`: the mean of values.
GroupWeights fold_group(const LayerProblem& problem, const std::vector<std::int64_t>& kv_heads, Part part,
                        Metric metric, bool with_queries = true, bool with_value_mean = true);
/// `half` other than all needs statistics with halves (InternalError).
LayerProblem load_problem(const checkpoint::Reader& reader, const calibration::StatisticsFile* statistics,
                          std::int64_t layer, Part part, const FoldOptions& options, Half half = Half::all);

/// What planning a layer reads, and not more: weights as stored, moments and statistics that the options use. `even`
/// and `odd` (with `halves`): both halves' moments, with queries and distances of all sequences; they share weights
/// and, by linearity, products.
struct FoldProblems {
  LayerProblem all, even, odd;
};
FoldProblems load_problems(const checkpoint::Reader& reader, const calibration::StatisticsFile* statistics,
                           std::int64_t layer, Part part, const FoldOptions& options, bool halves);

/// Encoders and decoders that a process found while planning, for apply_plan() to take. Safe for many threads.
class KeptBases {
 public:
  /// Beyond `most_bytes` nothing more is kept: it is computed again then.
  explicit KeptBases(std::uint64_t most_bytes = std::uint64_t{1} << 30) : most_bytes_(most_bytes) {}
  void keep(std::int64_t layer, Part part, const std::vector<std::int64_t>& kv_heads, const Basis& basis);
  /// Means that output biases need.
  void keep_means(std::int64_t layer, const LayerMoments& moments);
  /// Null when it was not kept.
  const Basis* find(std::int64_t layer, Part part, const std::vector<std::int64_t>& kv_heads) const;
  /// Null likewise.
  const LayerMoments* means(std::int64_t layer) const;

 private:
  std::uint64_t most_bytes_, bytes_ = 0;
  std::map<std::tuple<std::int64_t, Part, std::vector<std::int64_t>>, Basis> bases_;
  std::map<std::int64_t, LayerMoments> means_;
  mutable std::mutex mutex_;
};
/// A problem to apply kept bases to, without statistics; all of the layer's groups must be there, otherwise this is
/// load_problems().all. `kept` may be null.
LayerProblem load_for_apply(const checkpoint::Reader& reader, const calibration::StatisticsFile* statistics,
                            std::int64_t layer, Part part, const FoldOptions& options,
                            const std::vector<std::vector<std::int64_t>>& groups, const KeptBases* kept);

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

/// Pairs that FoldOptions::slow_band stands for in this layer; auto: those that turn by less than half a radian over
/// the context.
std::int64_t slow_band_of(const LayerProblem& problem, const FoldOptions& options);
/// The same for `frequencies` [head_dim / 2] over `context` tokens.
std::int64_t slow_band_of(const at::Tensor& frequencies, std::int64_t context, const FoldOptions& options);
/// Condition and dropped share of the Sigma in which the group's keys are folded.
linalg::Conditioning key_conditioning(const LayerProblem& problem, const std::vector<std::int64_t>& kv_heads,
                                      const FoldOptions& options);
/// Sigma, Lambda and attention statistics of a group's values in the metric of `options` (methods.md 3.1, 4.5). Moments
/// are centred where the constant can go to an output bias, else C(mean_weight). attn+out: InputError when the
/// statistics hold no attended values or the group does not lie inside one block of them.
ValueProblem value_problem(const LayerProblem& problem, const std::vector<std::int64_t>& kv_heads,
                           const FoldOptions& options);
/// Condition and dropped share of that Sigma.
linalg::Conditioning value_conditioning(const LayerProblem& problem, const std::vector<std::int64_t>& kv_heads,
                                        const FoldOptions& options);

/// Calls work(0 .. count-1), each item on one thread with single-threaded products, so that bytes do not depend on the
/// thread count.
void for_each_item(std::int64_t count, const std::function<void(std::int64_t)>& work);

/// Block [begin, end) of `items` that `rank` of `size` works on; sizes differ by at most one.
std::pair<std::int64_t, std::int64_t> share_of(std::int64_t items, int rank, int size);

}  // namespace headfold::folding
