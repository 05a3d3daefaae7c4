#pragma once
// What a fold changed, measured: the attention of one layer with its original and with its folded weights, on the same
// inputs.

#include <headfold/folding/layer_data.h>
#include <headfold/folding/plan.h>
#include <headfold/model/model.h>

#include <array>
#include <optional>

namespace headfold::folding {

/// Sums over sequences that make relative errors; additive over ranks.
struct ErrorSums {
  enum Index {
    key_error,
    key_total,
    value_error,
    value_total,
    score_error,
    score_total,
    output_error,
    output_total,
    // Over sequences: squares and products of one sequence's error and total, from which deviations follow.
    key_error_error,
    key_error_total,
    key_total_total,
    value_error_error,
    value_error_total,
    value_total_total,
    sequences,
    count
  };
  std::array<double, count> sums{};
  double key() const { return ratio(key_error, key_total); }        ///< the quantity that the plan predicts for keys
  double value() const { return ratio(value_error, value_total); }  ///< the quantity that the plan predicts for values
  double score() const {
    return ratio(score_error, score_total);
  }  ///< squared error of scores over causal pairs, relative
  double output() const {
    return ratio(output_error, output_total);
  }  ///< squared error of the attention output, relative
  /// Standard error of key() and value() over sequences (the ratio estimator's, sequences taken as independent); 0
  /// where tokens do not enter (metric `weights`); nothing for fewer than two sequences.
  std::optional<double> key_deviation() const { return deviation(key_error, key_total, key_error_error); }
  std::optional<double> value_deviation() const { return deviation(value_error, value_total, value_error_error); }
  /// `squares`: the first of the three sums of products of that side.
  std::optional<double> deviation(int part, int whole, int squares) const;
  double ratio(int part, int whole) const {
    return sums[static_cast<std::size_t>(whole)] > 0
               ? sums[static_cast<std::size_t>(part)] / sums[static_cast<std::size_t>(whole)]
               : 0.0;
  }
};

/// Original and folded attention of one layer. Products in float32, sums in float64.
/// Keys, by the plan's metric: act+query the score error itself; act+query+dist the same, its mean at every distance
/// weighed by the original's attention mass at that distance on the same sequence; act the error of keys rebuilt by
/// the decoder (rotated ones for post-rotation); weights the same of the weight rows. Values: act and weights likewise;
/// act+out the error of every query head's values behind the output projection, attn+out the same of the values that
/// the original attention attends to. Decoders that are not stored are recovered by least squares from W_Q' = B^T W_Q
/// and W_O' = P B, so after a refit `act` and `weights` measure what the refitted projections amount to. Models without
/// rotation: keys, scores and values less `mean_input`'s (softmax drops a constant, the output bias carries one). With
/// rotation, stock heads and act+query+dist: scores less what the mean key adds to all scores of a query, in the
/// channels and to the share of which the fold leaves it out (methods.md, 3.6: all of it in a slow band).
class LayerComparison {
 public:
  /// Weights in float64 (load_layer_weights), `groups` of source KV heads, `mean_input` [hidden] mean of attention
  /// inputs: undefined unless needs_mean_input().
  LayerComparison(const checkpoint::ModelConfig& original_config, const LayerWeights& original,
                  const checkpoint::ModelConfig& folded_config, const LayerWeights& folded, const Groups& groups,
                  const FoldOptions& options, const at::Tensor& mean_input);
  /// One sequence: attention inputs [tokens, hidden], positions 0 .. tokens - 1.
  void add(const at::Tensor& inputs);
  const ErrorSums& errors() const { return errors_; }

 private:
  LayerWeights original_, folded_;  // float32
  FoldOptions options_;
  Groups groups_;
  bool rotates_ = false, projected_ = false;
  bool rotated_decoder_ = false;  // the recovered key decoder rebuilds rotated keys; else plain ones
  at::Tensor frequencies_, slopes_;
  at::Tensor key_decoder_, value_decoder_;  // [source_kv_heads, head_dim, width] float32
  at::Tensor key_mean_, folded_key_mean_, value_mean_, folded_value_mean_;  // [heads, width], zeros with rotation
  at::Tensor left_out_;  // [head_dim / 2] share of the mean key that pairs leave out; undefined when all leave out none
  at::Tensor mean_key_, folded_mean_key_;  // [heads, head_dim] float64, with left_out_ only
  std::vector<std::int64_t> group_of_head_,
      place_of_head_;  // of source KV heads: their group, their place in output order
  ErrorSums errors_;

  /// Mean keys [heads, head_dim] as they reach the query at position i on average over distances, [tokens, heads,
  /// head_dim] rotated; `law` [tokens] attention mass by distance.
  at::Tensor left_out_keys(const at::Tensor& mean_key, const at::Tensor& law) const;
};

/// Whether LayerComparison takes something off by the mean of attention inputs.
bool needs_mean_input(const checkpoint::ModelConfig& original, const FoldOptions& options);

/// Rank correlation of two equally long lists (Spearman, ties get their mean rank); 0 for fewer than two points or a
/// constant list.
double spearman(const std::vector<double>& a, const std::vector<double>& b);

/// How far a prediction orders layers that a measurement can tell apart at all.
struct LayerOrder {
  std::int64_t pairs = 0;  ///< pairs of layers
  std::int64_t told_apart =
      0;                      ///< whose measured losses differ by more than twice the standard error of the difference
  std::int64_t in_order = 0;  ///< of these, predicted in the measured order
  double spread = 0;          ///< largest less smallest measured loss, over their mean
};

/// `deviations`: standard errors of `measured`; where one is unknown no pair of that layer is told apart.
LayerOrder layer_order(const std::vector<double>& predicted, const std::vector<double>& measured,
                       const std::vector<std::optional<double>>& deviations);

}  // namespace headfold::folding
