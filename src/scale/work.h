#pragma once
// Operations and bytes of the work that jobs do: what a prediction multiplies with rates, and `headfold bench` divides
// measured seconds by. Counts are of what is carried out, not of what would be necessary.

#include <headfold/calibration/collect.h>
#include <headfold/finetune/lora.h>
#include <headfold/scale/rates.h>

namespace headfold::scale {

using checkpoint::ModelConfig;

/// Work of one rank in one compute dtype; FLOP but for bytes.
struct Work {
  double product = 0, attention = 0, gram = 0, attention_statistics = 0, head = 0;
  double element_bytes = 0;
  double flops() const { return product + attention + gram + attention_statistics + head; }
  Work& operator+=(const Work& other);
  Work operator*(double factor) const;
};
/// Seconds at these rates, by figure ("product", "element_wise", …), in a fixed order; zero work is left out.
std::vector<std::pair<std::string, double>> seconds_by_figure(const Work& work, const Rates& rates,
                                                              at::ScalarType dtype);
double seconds_of(const Work& work, const Rates& rates, at::ScalarType dtype);

/// One layer's forward pass over `sequences` of `tokens`: 2 FLOP per weight and token; attention 2 t^2 heads head_dim
/// per sequence, the causal half of scores and attended values; bytes that norms, residuals, rotations and activations
/// read and write.
Work layer_work(const ModelConfig& config, std::int64_t layer, double sequences, std::int64_t tokens,
                at::ScalarType dtype);
/// A layer's statistics of `sequences`: Grams as linalg::gram_operations() counts them, attention statistics as
/// calibration::attention_statistics_share().
Work statistics_work(const ModelConfig& config, const calibration::StatisticsShape& shape, double sequences);
/// Output projection for `rows` positions: 2 FLOP per weight and row.
Work head_work(const ModelConfig& config, double rows);
/// Forward and backward passes of training over `sequences` of `tokens`, head included: every layer's forward pass
/// (twice unless activations are kept; the last layer's once), the gradient of its inputs, with `full` also those of
/// its weights; attention's backward pass forms five products where the forward pass forms two; adapters three times
/// their forward products.
Work training_work(const ModelConfig& config, const finetune::LoraOptions& lora, bool keep_activations,
                   double sequences, std::int64_t tokens, at::ScalarType dtype);
/// Elements that training changes.
double trained_elements(const ModelConfig& config, const finetune::LoraOptions& lora);

/// A conversion to `kv_heads` KV heads with the default folds and layout gqa, per layer. float64 FLOP; 8 are counted
/// for each element of weights and statistics that is unpacked, scaled or converted.
struct FoldWork {
  double plan = 0, plan_eigen = 0;               ///< of all groups
  double keys = 0, values = 0;                   ///< new weights of either half layer
  double read_weights = 0, read_statistics = 0;  ///< bytes: attention weights once; statistics once
  double written = 0;                            ///< bytes of changed tensors
};
/// `shape`: of the statistics; hidden 0: there are none. `held_out`: bases are also fitted to the even half.
FoldWork fold_work(const ModelConfig& config, std::int64_t kv_heads, const calibration::StatisticsShape& shape,
                   bool held_out);
/// Bytes of a model's tensors as its checkpoint stores them.
double checkpoint_bytes(const ModelConfig& config);
/// The configuration after such a conversion.
ModelConfig folded(const ModelConfig& config, std::int64_t kv_heads);

}  // namespace headfold::scale
