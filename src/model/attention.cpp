#include "attention.h"

#include <ATen/Parallel.h>
#include <headfold/base/error.h>

#include <atomic>
#include <mutex>

#include "kernels.h"
#include "product.h"

namespace headfold::model {
namespace {

std::atomic<std::int64_t> block_bytes{std::int64_t{256} << 20};

/// Memory of this thread that grows as needed and stays.
template <class T>
T* scratch(std::vector<T>& buffer, std::int64_t size) {
  if (static_cast<std::int64_t>(buffer.size()) < size) {
    buffer.clear();
    buffer.shrink_to_fit();
    buffer.resize(static_cast<std::size_t>(size));
  }
  return buffer.data();
}

char* at_byte(void* data, std::int64_t elements, std::int64_t element_size) {
  return static_cast<char*>(data) + elements * element_size;
}

/// Key (or value) heads that the query heads of `a` read, from the first one's on.
std::int64_t heads_read(const Attention& a, std::int64_t readers) {
  return (a.head_end - 1) / readers - a.head_begin / readers + 1;
}

/// Few query rows: one pass over keys and values, products by hand (a matrix product would spend its time on being set
/// up).
void attend_directly(const Attention& a) {
  const auto& kernel = kernels::table(a.dtype);
  const auto size = static_cast<std::int64_t>(c10::elementSize(a.dtype));
  const std::int64_t keys = a.start + a.tokens;
  at::parallel_for(a.head_begin, a.head_end, 1, [&](std::int64_t begin, std::int64_t end) {
    thread_local std::vector<float> score_buffer;
    thread_local std::vector<char> probability_buffer;
    thread_local std::vector<float> sum_buffer;
    float* scores = scratch(score_buffer, keys);
    char* probabilities = scratch(probability_buffer, keys * size);
    float* sum = scratch(sum_buffer, a.value_width);
    for (std::int64_t head = begin; head < end; ++head) {
      const std::int64_t own = head - a.head_begin;
      const std::int64_t key = head / a.key_readers - a.head_begin / a.key_readers;
      const std::int64_t value = head / a.value_readers - a.head_begin / a.value_readers;
      for (std::int64_t row = 0; row < a.tokens; ++row) {
        const std::int64_t visible = a.start + row + 1;
        const void* query = at_byte(a.queries.data, own * a.queries.head_stride + row * a.queries.token_stride, size);
        kernel.dots(query, at_byte(a.keys.data, key * a.keys.head_stride, size), a.keys.token_stride, visible,
                    a.key_width, scores);
        const kernels::ScoreRow score_row{visible, visible, a.scale, a.slopes != nullptr ? a.slopes[head] : 0};
        kernel.softmax(scores, probabilities, score_row);
        std::fill_n(sum, a.value_width, 0.0F);
        for (std::int64_t j = 0; j < visible; ++j) {
          const float p = size == 4 ? reinterpret_cast<const float*>(probabilities)[j]
                                    : static_cast<float>(reinterpret_cast<const c10::BFloat16*>(probabilities)[j]);
          kernel.add_scaled(sum, p,
                            at_byte(a.values.data, value * a.values.head_stride + j * a.values.token_stride, size),
                            a.value_width);
        }
        kernel.store(sum, at_byte(a.output, row * a.output_stride + own * a.value_width, size), a.value_width);
      }
    }
  });
}

/// Keys or values as the product kernels like them: every head's tokens densely after one another.
Heads dense(const Heads& heads, std::int64_t count, std::int64_t tokens, std::int64_t head_dim, std::int64_t size,
            std::vector<char>& buffer) {
  if (heads.token_stride == head_dim) return heads;
  char* to = scratch(buffer, count * tokens * head_dim * size);
  at::parallel_for(0, count, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t head = begin; head < end; ++head)
      for (std::int64_t token = 0; token < tokens; ++token)
        std::memcpy(at_byte(to, (head * tokens + token) * head_dim, size),
                    at_byte(heads.data, head * heads.head_stride + token * heads.token_stride, size),
                    static_cast<std::size_t>(head_dim * size));
  });
  return {to, tokens * head_dim, head_dim};
}

void attend_in_blocks(const Attention& a) {
  const auto& kernel = kernels::table(a.dtype);
  const auto size = static_cast<std::int64_t>(c10::elementSize(a.dtype));
  const std::int64_t all_keys = a.start + a.tokens;
  thread_local std::vector<char> key_buffer, value_buffer;
  const Heads keys = dense(a.keys, heads_read(a, a.key_readers), all_keys, a.key_width, size, key_buffer);
  const Heads values = dense(a.values, heads_read(a, a.value_readers), all_keys, a.value_width, size, value_buffer);

  // A block of scores should stay in the core's own cache (about a megabyte), and all threads' blocks below the limit.
  const std::int64_t row_bytes = all_keys * (4 + (size == 4 ? 0 : size));
  const std::int64_t by_cache = std::clamp<std::int64_t>((std::int64_t{1} << 20) / row_bytes, 32, 256);
  const std::int64_t by_limit = attention_block_bytes() / (row_bytes * at::get_num_threads());
  const std::int64_t rows = std::clamp<std::int64_t>(std::min(by_cache, by_limit), 1, a.tokens);
  const std::int64_t blocks = (a.tokens + rows - 1) / rows;

  at::parallel_for(0, (a.head_end - a.head_begin) * blocks, 1, [&](std::int64_t begin, std::int64_t end) {
    thread_local std::vector<float> score_buffer, output_buffer;
    thread_local std::vector<char> probability_buffer;
    float* scores = scratch(score_buffer, rows * all_keys);
    float* output = scratch(output_buffer, rows * a.value_width);
    char* probabilities =
        size == 4 ? reinterpret_cast<char*>(scores) : scratch(probability_buffer, rows * all_keys * size);
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t own = task / blocks;
      const std::int64_t head = a.head_begin + own;
      // First and last blocks alternate, so that any run of tasks is as costly as any other: late rows see more keys.
      const std::int64_t turn = task % blocks;
      const std::int64_t block = turn % 2 == 0 ? turn / 2 : blocks - 1 - turn / 2;
      const std::int64_t first = block * rows;
      const std::int64_t count = std::min(rows, a.tokens - first);
      const std::int64_t visible = a.start + first + count;  // of the block's last row
      const std::int64_t key = head / a.key_readers - a.head_begin / a.key_readers;
      const std::int64_t value = head / a.value_readers - a.head_begin / a.value_readers;
      const Matrix q{at_byte(a.queries.data, own * a.queries.head_stride + first * a.queries.token_stride, size), count,
                     a.key_width, a.queries.token_stride};
      const Matrix k{at_byte(keys.data, key * keys.head_stride, size), visible, a.key_width, keys.token_stride};
      const Matrix v{at_byte(values.data, value * values.head_stride, size), visible, a.value_width,
                     values.token_stride};
      multiply(q, k, true, a.dtype, scores, visible, at::kFloat);
      const float slope = a.slopes != nullptr ? a.slopes[head] : 0;
      for (std::int64_t row = 0; row < count; ++row)
        kernel.softmax(scores + row * visible, at_byte(probabilities, row * visible, size),
                       {a.start + first + row + 1, visible, a.scale, slope});
      multiply({probabilities, count, visible, visible}, v, false, a.dtype, output, a.value_width, at::kFloat);
      for (std::int64_t row = 0; row < count; ++row)
        kernel.store(output + row * a.value_width,
                     at_byte(a.output, (first + row) * a.output_stride + own * a.value_width, size), a.value_width);
    }
  });
}

}  // namespace

std::int64_t attention_block_bytes() {
  return block_bytes;
}

void set_attention_block_bytes(std::int64_t bytes) {
  if (bytes < 1) throw UsageError(fmt::format("attention block of {} bytes: at least 1 is needed", bytes));
  block_bytes = bytes;
}

void attend(const Attention& attention) {
  if (attention.tokens == 0 || attention.head_begin >= attention.head_end) return;
  constexpr std::int64_t kFewRows = 8;
  if (attention.tokens <= kFewRows) {
    attend_directly(attention);
  } else {
    attend_in_blocks(attention);
  }
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Positions

at::Tensor rope_inverse_frequencies(const ModelConfig& config) {
  const std::int64_t half = config.head_dim / 2;
  at::Tensor result = at::empty({half}, at::kDouble);
  auto* inverse = result.data_ptr<double>();
  const auto& scaling = config.rope_scaling;
  const double pi = std::acos(-1.0);
  for (std::int64_t i = 0; i < half; ++i) {
    double f = std::pow(config.rope_theta, -2.0 * static_cast<double>(i) / static_cast<double>(config.head_dim));
    if (scaling.type == "linear") {
      f /= scaling.factor;
    } else if (scaling.type == "llama3") {
      const auto old = static_cast<double>(scaling.original_max_positions);
      const double wavelength = 2 * pi / f;
      if (wavelength > old / scaling.low_freq_factor) {
        f /= scaling.factor;
      } else if (wavelength >= old / scaling.high_freq_factor) {
        const double s =
            (old / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor);
        f = (1 - s) * f / scaling.factor + s * f;
      }
    } else if (scaling.type != "default") {
      throw InputError(fmt::format("{}: rope_scaling type \"{}\" is not supported", config.file, scaling.type),
                       "default, linear and llama3 are");
    }
    inverse[i] = f;
  }
  return result;
}

at::Tensor alibi_slopes(std::int64_t heads) {
  if (heads < 1) throw InputError(fmt::format("ALiBi over {} heads", heads));
  std::int64_t power = 1;
  while (power * 2 <= heads) power *= 2;
  at::Tensor result = at::empty({heads}, at::kFloat);
  auto* slopes = result.data_ptr<float>();
  // As transformers does it: bases in float32, powers of them.
  const auto base = static_cast<float>(std::exp2(-8.0 / static_cast<double>(power)));
  const auto extra_base = static_cast<float>(std::exp2(-8.0 / static_cast<double>(2 * power)));
  for (std::int64_t i = 0; i < power; ++i) slopes[i] = std::pow(base, static_cast<float>(i + 1));
  for (std::int64_t i = power; i < heads; ++i)
    slopes[i] = std::pow(extra_base, static_cast<float>(2 * (i - power) + 1));
  return result;
}

std::shared_ptr<const RopeTable> rope_table(const at::Tensor& inverse_frequencies, at::ScalarType dtype,
                                            std::int64_t positions) {
  struct Entry {
    std::vector<double> frequencies;
    at::ScalarType dtype;
    std::shared_ptr<const RopeTable> table;
  };
  static std::mutex mutex;
  static std::vector<Entry> entries;
  const at::Tensor wanted = inverse_frequencies.to(at::kDouble).contiguous();
  const std::vector<double> frequencies(wanted.data_ptr<double>(), wanted.data_ptr<double>() + wanted.numel());
  const std::lock_guard lock(mutex);
  auto found = std::find_if(entries.begin(), entries.end(), [&](const Entry& entry) {
    return entry.dtype == dtype && entry.frequencies == frequencies;
  });
  if (found != entries.end() && found->table->cosine.size(0) >= positions) return found->table;
  std::int64_t length = 256;
  while (length < positions) length *= 2;
  // Inverse frequencies, angles, cos and sin in float32, as the reference implementation does; then the compute dtype's
  // rounding.
  const at::Tensor angles = at::outer(at::arange(length, at::kFloat), wanted.to(at::kFloat));
  const auto half = static_cast<std::int64_t>(frequencies.size());
  auto table = std::make_shared<const RopeTable>(
      RopeTable{at::cos(angles).to(dtype).to(at::kFloat), at::sin(angles).to(dtype).to(at::kFloat), half});
  if (found != entries.end()) {
    found->table = table;
  } else {
    if (entries.size() >= 8) entries.erase(entries.begin());
    entries.push_back({frequencies, dtype, table});
  }
  return table;
}

at::Tensor apply_rope(const at::Tensor& x, const at::Tensor& inverse_frequencies, std::int64_t start) {
  if (x.dim() != 4 || x.size(3) != 2 * inverse_frequencies.numel() || start < 0)
    throw InternalError(fmt::format("rotation of [{}] by {} frequencies from position {}", fmt::join(x.sizes(), ", "),
                                    inverse_frequencies.numel(), start));
  const at::Tensor source = x.contiguous();
  at::Tensor result = at::empty_like(source);
  const std::int64_t tokens = x.size(1);
  const std::int64_t heads = x.size(2);
  const std::int64_t half = inverse_frequencies.numel();
  const auto table = rope_table(inverse_frequencies, x.scalar_type(), start + tokens);
  const auto& kernel = kernels::table(x.scalar_type());
  const auto size = static_cast<std::int64_t>(x.element_size());
  at::parallel_for(0, x.size(0) * tokens, std::max<std::int64_t>(1, 32768 / (heads * half)),
                   [&](std::int64_t begin, std::int64_t end) {
                     for (std::int64_t row = begin; row < end; ++row) {
                       const std::int64_t position = start + row % tokens;
                       for (std::int64_t head = 0; head < heads; ++head) {
                         const std::int64_t offset = (row * heads + head) * 2 * half;
                         kernel.rotate(at_byte(source.data_ptr(), offset, size),
                                       table->cosine.data_ptr<float>() + position * half,
                                       table->sine.data_ptr<float>() + position * half,
                                       at_byte(result.data_ptr(), offset, size), half);
                       }
                     }
                   });
  return result;
}

}  // namespace headfold::model
