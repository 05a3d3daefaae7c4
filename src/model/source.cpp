#include "source.h"

namespace headfold::model {

void check_cache(const checkpoint::LayerShape& shape, at::ScalarType dtype, const LayerCache& cache,
                 std::int64_t batch) {
  for (const auto& [tensor, width] :
       {std::pair(&cache.keys, shape.key_width), std::pair(&cache.values, shape.value_width)})
    if (!tensor->defined() || tensor->dim() != 4 || tensor->size(0) != batch || tensor->size(2) != shape.kv_heads ||
        tensor->size(3) != width || tensor->scalar_type() != dtype || !tensor->is_contiguous())
      throw InternalError(fmt::format("KV cache {} for a batch of {}, expected [{}, capacity, {}, {}]",
                                      tensor->defined() ? shape_text(tensor->sizes()) : "none", batch, batch,
                                      shape.kv_heads, width));
}

void check_forward(const ModelConfig& config, const checkpoint::LayerShape& shape, at::ScalarType dtype,
                   const at::Tensor& hidden, const LayerCache* cache) {
  if (hidden.dim() != 3 || hidden.size(2) != config.hidden || hidden.scalar_type() != dtype)
    throw InternalError(fmt::format("layer input {} {}, expected [batch, tokens, {}] {}", shape_text(hidden.sizes()),
                                    c10::toString(hidden.scalar_type()), config.hidden, c10::toString(dtype)));
  if (cache == nullptr) return;
  check_cache(shape, dtype, *cache, hidden.size(0));
  if (cache->length + hidden.size(1) > std::min(cache->keys.size(1), cache->values.size(1)))
    throw InputError(fmt::format("the KV cache has room for {} tokens: {} are in it and {} more do not fit",
                                 cache->keys.size(1), cache->length, hidden.size(1)));
}

PackedSizes check_packed(const ModelConfig& config, at::ScalarType dtype, const at::Tensor& hidden,
                         const std::vector<Segment>& segments) {
  PackedSizes sizes;
  for (const Segment& segment : segments) {
    if (segment.start < 0 || segment.tokens < 1)
      throw InternalError(fmt::format("a segment of {} tokens at {}", segment.tokens, segment.start));
    sizes.rows += segment.tokens;
    sizes.capacity = std::max(sizes.capacity, segment.start + segment.tokens);
  }
  if (hidden.dim() != 2 || hidden.size(0) != sizes.rows || hidden.size(1) != config.hidden ||
      hidden.scalar_type() != dtype)
    throw InternalError(fmt::format("packed layer input {} {}, expected [{}, {}] {}", shape_text(hidden.sizes()),
                                    c10::toString(hidden.scalar_type()), sizes.rows, config.hidden,
                                    c10::toString(dtype)));
  return sizes;
}

void check_slots(const std::vector<Segment>& segments, std::int64_t slots) {
  for (const Segment& segment : segments)
    if (segment.slot < 0 || segment.slot >= slots || segment.copied_from >= slots)
      throw InternalError(fmt::format("a segment in slot {} from {} of {}", segment.slot, segment.copied_from, slots));
}

}  // namespace headfold::model
