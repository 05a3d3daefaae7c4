#pragma once
// Private: the Grams of a layer's groups, computed on first use and kept.

#include <headfold/folding/bases.h>

namespace headfold::folding {

class GroupGrams {
 public:
  /// Of the problem's own moments: from Grams that calibration formed where it did (values; keys and queries without
  /// rotation), otherwise by products with the input's moment; queries are asked of `queries_of` when it is given (one
  /// half of the sequences).
  explicit GroupGrams(const LayerProblem& problem, std::shared_ptr<GroupGrams> queries_of = nullptr);
  /// `all_weight` times those of `all` less `even_weight` times those of `even`: the other half's, by linearity.
  GroupGrams(const LayerProblem& problem, std::shared_ptr<GroupGrams> all, std::shared_ptr<GroupGrams> even,
             double all_weight, double even_weight);
  struct Gram {
    at::Tensor gram, mean;  ///< W~ E[x~ x~^T] W~^T of the group's rows [g d, g d], W~ E[x~] [g d]
  };
  const Gram& keys(const std::vector<std::int64_t>& kv_heads);
  const at::Tensor& values(const std::vector<std::int64_t>& kv_heads);      ///< Gram::gram
  const at::Tensor& value_mean(const std::vector<std::int64_t>& kv_heads);  ///< Gram::mean
  const at::Tensor& queries(const std::vector<std::int64_t>& kv_heads);     ///< [g, repeat, d, d]
  const at::Tensor& outputs(const std::vector<std::int64_t>& kv_heads);     ///< P_h^T P_h, [g, repeat, d, d]

 private:
  struct Entry {
    std::once_flag keys_once, values_once, value_mean_once, queries_once, outputs_once;
    Gram keys;
    at::Tensor values, value_mean, queries, outputs;
  };
  Entry& entry(const std::vector<std::int64_t>& kv_heads);
  /// That of the other half from `all` and `even`.
  at::Tensor other(const at::Tensor& all, const at::Tensor& even) const;
  /// The group's block of `measured`, or rows E[x~ x~^T] rows^T.
  at::Tensor gram_of(const std::vector<std::int64_t>& kv_heads, const HeadMoments& measured,
                     const std::function<at::Tensor()>& rows) const;
  LayerWeights weights_;
  at::Tensor moment_, mean_;
  HeadMoments key_moments_, value_moments_;
  at::Tensor query_moments_;  // [heads, d, d]
  std::shared_ptr<GroupGrams> all_, even_;
  double all_weight_ = 1, even_weight_ = 0;
  std::mutex mutex_;
  std::map<std::vector<std::int64_t>, std::unique_ptr<Entry>> entries_;
};

}  // namespace headfold::folding
