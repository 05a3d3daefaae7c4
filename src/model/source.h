#pragma once
// Private: where the weights of a layer come from, and what is common to both of its implementations.

#include <headfold/base/error.h>
#include <headfold/model/model.h>

#include <functional>
#include <string>

namespace headfold::model {

inline void require_dtype(at::ScalarType dtype) {
  if (dtype != at::kFloat && dtype != at::kBFloat16)
    throw UsageError(fmt::format("models compute in float32 or bfloat16, not {}", c10::toString(dtype)));
}

inline std::string shape_text(at::IntArrayRef sizes) {
  return fmt::format("[{}]", fmt::join(sizes, ", "));
}

/// Where weights come from; `done` is told when a tensor was copied.
struct Source {
  TensorGetter get;
  std::function<void(const std::string&)> done = [](const std::string&) {};

  at::Tensor checked(const std::string& name, const std::vector<std::int64_t>& shape) const {
    at::Tensor tensor = get(name, shape);
    if (!tensor.defined() || tensor.sizes() != at::IntArrayRef(shape))
      throw InputError(fmt::format("tensor {} has shape {}, expected {}", name,
                                   tensor.defined() ? shape_text(tensor.sizes()) : "none", shape_text(shape)));
    return tensor;
  }
  at::Tensor vector(const std::string& name, std::int64_t size, at::ScalarType dtype) const {
    at::Tensor copy = checked(name, {size}).to(dtype, /*non_blocking=*/false, /*copy=*/true);
    done(name);
    return copy;
  }
};

inline Source source_of(const checkpoint::Reader& reader) {
  return {
      [&reader](const std::string& name, const std::vector<std::int64_t>& shape) { return reader.weight(name, shape); },
      [&reader](const std::string& name) { reader.done_with(name); }};
}

/// Rows and columns of a layer's matrices, which follow from its config alone.
struct LayerWidths {
  checkpoint::LayerShape shape;     ///< what it caches
  std::int64_t source_heads = 0;    ///< heads whose keys are rebuilt or projected; kv_heads otherwise
  std::int64_t query_width = 0;     ///< channels of a query head as it leaves the projection
  std::int64_t attended_width = 0;  ///< channels of a head as it enters the output projection
  std::int64_t key_rows = 0;        ///< rows of the key projection

  LayerWidths() = default;
  LayerWidths(const ModelConfig& config, std::int64_t layer)
      : shape(config.shape_of(layer)),
        source_heads(config.source_heads_of(layer)),
        query_width(checkpoint::keys_absorbed(config, layer) ? shape.key_width : config.head_dim),
        attended_width(checkpoint::attended_width(config, layer)),
        key_rows((config.layout == checkpoint::KvLayout::projected ? source_heads : shape.kv_heads) * shape.key_width) {
  }
  /// Columns of queries, keys and values side by side.
  std::int64_t columns(const ModelConfig& config) const {
    return config.heads * query_width + key_rows + shape.kv_heads * shape.value_width;
  }
};

/// Rows that a packed pass needs, and tokens of its longest sequence. InternalError for segments that do not add up to
/// the rows of `hidden` [rows, hidden].
struct PackedSizes {
  std::int64_t rows = 0;
  std::int64_t capacity = 0;
};
PackedSizes check_packed(const ModelConfig& config, at::ScalarType dtype, const at::Tensor& hidden,
                         const std::vector<Segment>& segments);
/// InternalError unless every segment's slots are among `slots`.
void check_slots(const std::vector<Segment>& segments, std::int64_t slots);
/// InternalError unless hidden is [batch, tokens, hidden] of the compute dtype; with a cache also unless that fits, and
/// InputError when its capacity does not suffice.
void check_forward(const ModelConfig& config, const checkpoint::LayerShape& shape, at::ScalarType dtype,
                   const at::Tensor& hidden, const LayerCache* cache);
/// InternalError unless keys and values are [batch, capacity, kv_heads, width] of the compute dtype.
void check_cache(const checkpoint::LayerShape& shape, at::ScalarType dtype, const LayerCache& cache,
                 std::int64_t batch);

}  // namespace headfold::model
