#include "product.h"

#include <ATen/Parallel.h>
#include <headfold/base/error.h>
#include <headfold/base/onednn.h>
#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <optional>
#include <unordered_map>
#include <vector>

#include "kernels.h"

namespace headfold::model {
namespace {

#ifdef HEADFOLD_WITH_ONEDNN
std::atomic<bool> onednn_on{true};
#else
std::atomic<bool> onednn_on{false};
#endif

}  // namespace

bool uses_onednn() {
  return onednn_on;
}

void use_onednn([[maybe_unused]] bool on) {
#ifdef HEADFOLD_WITH_ONEDNN
  onednn_on = on;
#endif
}

#ifdef HEADFOLD_WITH_ONEDNN
namespace {

using onednn::engine;

dnnl::stream& stream() {
  thread_local dnnl::stream own(engine());
  return own;
}

dnnl::memory::data_type type_of(at::ScalarType type) {
  return type == at::kBFloat16 ? dnnl::memory::data_type::bf16 : dnnl::memory::data_type::f32;
}

/// Row-major matrix of `rows` x `columns`, or its transpose, as oneDNN describes it.
dnnl::memory::desc describe_matrix(std::int64_t rows, std::int64_t columns, std::int64_t stride, at::ScalarType type,
                                   bool transposed) {
  using Dims = dnnl::memory::dims;
  // A single row's stride is meaningless, but oneDNN compares it with the dense one.
  if (rows == 1) stride = columns;
  return transposed ? dnnl::memory::desc(Dims{columns, rows}, type_of(type), Dims{1, stride})
                    : dnnl::memory::desc(Dims{rows, columns}, type_of(type), Dims{stride, 1});
}

dnnl::matmul describe_product(const dnnl::memory::desc& a, const dnnl::memory::desc& b, const dnnl::memory::desc* bias,
                              const dnnl::memory::desc& c, bool accumulate) {
  dnnl::primitive_attr attributes;
  if (accumulate) {
    dnnl::post_ops sum;
    sum.append_sum(1.0F);
    attributes.set_post_ops(sum);
  }
  return dnnl::matmul(onednn::describe_product(a, b, bias, c, attributes));
}

/// oneDNN's kernels from before AVX-512 split long sums among threads: what comes out depends on their number. There
/// products are cut into tiles that are one thread's, the same for any number of threads.
constexpr std::int64_t kTileOfThread = 256;
bool splits_sums() {
  return !onednn::multiplies_bfloat16();
}

/// One thread for what is started in its scope.
class SingleThread {
 public:
  SingleThread() : before_(omp_get_max_threads()) { omp_set_num_threads(1); }
  ~SingleThread() { omp_set_num_threads(before_); }
  SingleThread(const SingleThread&) = delete;
  SingleThread& operator=(const SingleThread&) = delete;

 private:
  int before_;
};

/// A primitive is built for one number of threads, so that number is part of its key.
int threads_here() {
  return omp_in_parallel() != 0 ? 1 : omp_get_max_threads();
}

using Key = std::array<std::int64_t, 12>;
struct KeyHash {
  std::size_t operator()(const Key& key) const {
    std::uint64_t hash = 1469598103934665603U;
    for (const std::int64_t value : key)
      hash = (hash ^ static_cast<std::uint64_t>(value)) * 1099511628211U + (hash >> 29);
    return hash;
  }
};

/// Primitives of this thread: looking one up costs far less than describing it again. Dropped all at once when there
/// are too many (sequences of hundreds of different lengths).
template <class Value>
class PrimitiveCache {
 public:
  template <class Make>
  Value& get(const Key& key, const Make& make) {
    const auto found = entries_.find(key);
    if (found != entries_.end()) return found->second;
    if (entries_.size() >= 1024) entries_.clear();
    return entries_.emplace(key, make()).first->second;
  }

 private:
  std::unordered_map<Key, Value, KeyHash> entries_;
};

struct PlainProduct {
  dnnl::matmul primitive;
  dnnl::memory::desc a, b, c;
};

struct WeightProduct {
  dnnl::matmul primitive;
  dnnl::memory::desc x, weight, bias, y;
};

/// multiply() of float32, tile by tile.
void multiply_in_tiles(const Matrix& a, const Matrix& b, const Operation& operation, float* c, std::int64_t c_stride) {
  const std::int64_t m = operation.transpose_a ? a.columns : a.rows;
  const std::int64_t n = operation.transpose_b ? b.rows : b.columns;
  const auto part = [](const Matrix& matrix, bool columns, std::int64_t first, std::int64_t count) {
    return Matrix{static_cast<const float*>(matrix.data) + first * (columns ? 1 : matrix.stride),
                  columns ? matrix.rows : count, columns ? count : matrix.columns, matrix.stride};
  };
  const std::int64_t across = (n + kTileOfThread - 1) / kTileOfThread;
  const std::int64_t tiles = (m + kTileOfThread - 1) / kTileOfThread * across;
  at::parallel_for(0, tiles, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t tile = begin; tile < end; ++tile) {
      const std::int64_t i = tile / across * kTileOfThread, j = tile % across * kTileOfThread;
      multiply(part(a, operation.transpose_a, i, std::min(kTileOfThread, m - i)),
               part(b, !operation.transpose_b, j, std::min(kTileOfThread, n - j)), operation, at::kFloat,
               c + i * c_stride + j, c_stride, at::kFloat);
    }
  });
}

}  // namespace
#endif

namespace {

/// Whether the library at hand has kernels for bfloat16 on this processor. ATen's, without them, are plain loops.
bool multiplies_bfloat16() {
#ifdef HEADFOLD_WITH_ONEDNN
  if (uses_onednn()) return onednn::multiplies_bfloat16();
#endif
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return true;
#endif
}

/// multiply() of bfloat16 operands by products of float32 (x86 before AVX-512), and `bias` [n] if it is defined, with
/// one rounding at the end. In tiles: a wider copy of a whole weight would cost twice its memory, and widening a tile
/// costs little beside the products it takes part in. At most five MiB a thread are kept for them.
void multiply_widened(const Matrix& a, const Matrix& b, const Operation& operation, const at::Tensor& bias, void* c,
                      std::int64_t c_stride, at::ScalarType result) {
  const std::int64_t m = operation.transpose_a ? a.columns : a.rows;
  const std::int64_t k = operation.transpose_a ? a.rows : a.columns;
  const std::int64_t n = operation.transpose_b ? b.rows : b.columns;
  constexpr std::int64_t kTile = std::int64_t{1} << 19;  // elements of an operand's tile
  constexpr std::int64_t kDeepest = 8192;                // summed at once
  const std::int64_t deep = std::clamp<std::int64_t>(k, 1, kDeepest);
  const std::int64_t step = std::clamp<std::int64_t>(kTile / deep, 64, 512);
  const auto view = [](const void* data, at::IntArrayRef sizes, std::int64_t stride, at::ScalarType type) {
    return at::from_blob(const_cast<void*>(data), sizes, {stride, 1}, at::TensorOptions().dtype(type));
  };
  thread_local std::array<std::vector<float>, 3> tiles;
  const auto tile = [](std::vector<float>& memory, at::IntArrayRef sizes) {
    const auto wanted = static_cast<std::size_t>(sizes[0] * sizes[1]);
    if (memory.size() < wanted) memory.resize(wanted);
    return at::from_blob(memory.data(), sizes, at::kFloat);
  };
  // Rows or columns of an operand, and of those what is summed now, as the float32 product takes them.
  const auto widened = [&](std::vector<float>& memory, const at::Tensor& operand, bool across, std::int64_t first,
                           std::int64_t count, std::int64_t from, std::int64_t depth) {
    const at::Tensor part = operand.narrow(across ? 1 : 0, first, count).narrow(across ? 0 : 1, from, depth);
    return tile(memory, part.sizes()).copy_(part);
  };
  const auto matrix = [](const at::Tensor& part) {
    return Matrix{part.data_ptr(), part.size(0), part.size(1), part.size(1)};
  };
  const at::Tensor left = view(a.data, {a.rows, a.columns}, a.stride, at::kBFloat16);
  const at::Tensor right = view(b.data, {b.rows, b.columns}, b.stride, at::kBFloat16);
  const at::Tensor out = view(c, {m, n}, c_stride, result);
  for (std::int64_t i = 0; i < m; i += step) {
    const std::int64_t rows = std::min(step, m - i);
    at::Tensor x;
    if (k <= deep) x = widened(tiles[0], left, operation.transpose_a, i, rows, 0, k);
    for (std::int64_t j = 0; j < n; j += step) {
      const std::int64_t columns = std::min(step, n - j);
      const at::Tensor part = out.narrow(0, i, rows).narrow(1, j, columns);
      const at::Tensor sum = result == at::kFloat ? part : tile(tiles[2], {rows, columns});
      if (operation.accumulate && result != at::kFloat) sum.copy_(part);
      Operation piece = operation;
      for (std::int64_t from = 0; from < std::max<std::int64_t>(k, 1); from += deep) {
        const std::int64_t depth = std::min(deep, k - from);
        if (k > deep) x = widened(tiles[0], left, operation.transpose_a, i, rows, from, depth);
        const at::Tensor w = widened(tiles[1], right, !operation.transpose_b, j, columns, from, depth);
        multiply(matrix(x), matrix(w), piece, at::kFloat, sum.data_ptr(), sum.stride(0), at::kFloat);
        piece.accumulate = true;
      }
      if (bias.defined()) sum.add_(bias.narrow(0, j, columns));
      if (result != at::kFloat) part.copy_(sum);
    }
  }
}

}  // namespace

at::Tensor large_empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  at::Tensor tensor = at::empty(sizes, dtype);
  constexpr std::uintptr_t kPage = std::uintptr_t{2} << 20;
  auto* const data = static_cast<std::byte*>(tensor.data_ptr());
  const std::uintptr_t before = (kPage - reinterpret_cast<std::uintptr_t>(data) % kPage) % kPage;
  // Only advice: where the kernel does not follow it the memory works as before.
  if (tensor.nbytes() >= before + kPage)
    ::madvise(data + before, (tensor.nbytes() - before) / kPage * kPage, MADV_HUGEPAGE);
  return tensor;
}

Product::Product(const at::Tensor& weight, const at::Tensor& bias, at::ScalarType dtype) {
  weight_ = large_empty(weight.sizes(), dtype);
  weight_.copy_(weight);
  if (bias.defined()) bias_ = bias.to(dtype, /*non_blocking=*/false, /*copy=*/true);
}

std::int64_t Product::bytes() const {
  return static_cast<std::int64_t>(weight_.nbytes() + (bias_.defined() ? bias_.nbytes() : 0));
}

void Product::apply(const at::Tensor& x, const at::Tensor& y, bool accumulate) const {
  const at::ScalarType dtype = weight_.scalar_type();
  if (x.dim() != 2 || y.dim() != 2 || x.size(1) != in() || y.size(1) != out() || x.size(0) != y.size(0) ||
      x.scalar_type() != dtype || y.scalar_type() != dtype || (x.size(0) > 0 && (x.stride(1) != 1 || y.stride(1) != 1)))
    throw InternalError(fmt::format("product [{}, {}] applied to [{}] giving [{}]", out(), in(),
                                    fmt::join(x.sizes(), ", "), fmt::join(y.sizes(), ", ")));
  const std::int64_t rows = x.size(0);
  if (rows == 0 || out() == 0) return;
  constexpr std::int64_t kFewRows = 4;
  if (rows <= kFewRows) return apply_to_few_rows(x, y, accumulate);
#ifdef HEADFOLD_WITH_ONEDNN
  if (uses_onednn() && dtype == at::kFloat && splits_sums()) {
    multiply({x.data_ptr(), rows, in(), x.stride(0)}, {weight_.data_ptr(), out(), in(), in()},
             {.transpose_b = true, .accumulate = accumulate}, dtype, y.data_ptr(), y.stride(0), dtype);
    if (bias_.defined()) at::Tensor(y).add_(bias_);
    return;
  }
#endif
  if (dtype == at::kBFloat16 && !multiplies_bfloat16())
    return multiply_widened({x.data_ptr(), rows, in(), x.stride(0)}, {weight_.data_ptr(), out(), in(), in()},
                            {.transpose_b = true, .accumulate = accumulate}, bias_, y.data_ptr(), y.stride(0), dtype);
#ifdef HEADFOLD_WITH_ONEDNN
  if (uses_onednn()) {
    thread_local PrimitiveCache<WeightProduct> cache;
    // Keyed by shape, not by weight: all layers share the entries.
    const Key key{
        out(),         in(), rows, x.stride(0), y.stride(0), accumulate, bias_.defined(), static_cast<int>(dtype),
        threads_here()};
    WeightProduct& product = cache.get(key, [&] {
      const auto a = describe_matrix(rows, in(), x.stride(0), dtype, false);
      const auto w = describe_matrix(out(), in(), in(), dtype, true);
      const auto c = describe_matrix(rows, out(), y.stride(0), dtype, false);
      const auto b = describe_matrix(1, out(), out(), dtype, false);
      return WeightProduct{describe_product(a, w, bias_.defined() ? &b : nullptr, c, accumulate), a, w, b, c};
    });
    std::unordered_map<int, dnnl::memory> arguments{
        {DNNL_ARG_SRC, dnnl::memory(product.x, engine(), x.data_ptr())},
        {DNNL_ARG_WEIGHTS, dnnl::memory(product.weight, engine(), weight_.data_ptr())},
        {DNNL_ARG_DST, dnnl::memory(product.y, engine(), y.data_ptr())}};
    if (bias_.defined()) arguments.emplace(DNNL_ARG_BIAS, dnnl::memory(product.bias, engine(), bias_.data_ptr()));
    product.primitive.execute(stream(), arguments);
    stream().wait();
    return;
  }
#endif
  at::Tensor result = y;
  const at::Tensor transposed = weight_.t();
  if (accumulate) {
    result.addmm_(x, transposed);
    if (bias_.defined()) result.add_(bias_);
  } else if (bias_.defined()) {
    at::addmm_out(result, bias_, x, transposed);
  } else {
    at::mm_out(result, x, transposed);
  }
}

void Product::apply_to_few_rows(const at::Tensor& x, const at::Tensor& y, bool accumulate) const {
  // Decoding reads every weight for a row or two: bound by memory, so each thread streams its own rows of the weight
  // once.
  const auto& kernel = kernels::table(weight_.scalar_type());
  const auto size = static_cast<std::int64_t>(weight_.element_size());
  constexpr std::int64_t kBlock = 64;
  const auto* weights = static_cast<const char*>(weight_.data_ptr());
  const std::int64_t blocks = (out() + kBlock - 1) / kBlock;
  at::parallel_for(
      0, blocks, std::max<std::int64_t>(1, 65536 / (kBlock * in())), [&](std::int64_t begin, std::int64_t end) {
        std::array<float, kBlock> sums{}, addends{};
        for (std::int64_t block = begin; block < end; ++block) {
          const std::int64_t first = block * kBlock;
          const std::int64_t count = std::min(kBlock, out() - first);
          for (std::int64_t row = 0; row < x.size(0); ++row) {
            kernel.dots(static_cast<const char*>(x.data_ptr()) + row * x.stride(0) * size,
                        weights + first * in() * size, in(), count, in(), sums.data());
            auto* target = static_cast<char*>(y.data_ptr()) + (row * y.stride(0) + first) * size;
            if (bias_.defined()) {
              kernel.load(static_cast<const char*>(bias_.data_ptr()) + first * size, addends.data(), count);
              for (std::int64_t i = 0; i < count; ++i)
                sums[static_cast<std::size_t>(i)] += addends[static_cast<std::size_t>(i)];
            }
            if (accumulate) {
              kernel.load(target, addends.data(), count);
              for (std::int64_t i = 0; i < count; ++i)
                sums[static_cast<std::size_t>(i)] += addends[static_cast<std::size_t>(i)];
            }
            kernel.store(sums.data(), target, count);
          }
        }
      });
}

void multiply(const Matrix& a, const Matrix& b, bool transposed, at::ScalarType dtype, void* c, std::int64_t c_stride,
              at::ScalarType result) {
  multiply(a, b, Operation{.transpose_b = transposed}, dtype, c, c_stride, result);
}

void multiply(const Matrix& a, const Matrix& b, const Operation& operation, at::ScalarType dtype, void* c,
              std::int64_t c_stride, at::ScalarType result) {
  const std::int64_t m = operation.transpose_a ? a.columns : a.rows;
  const std::int64_t k = operation.transpose_a ? a.rows : a.columns;
  const std::int64_t n = operation.transpose_b ? b.rows : b.columns;
  if ((operation.transpose_b ? b.columns : b.rows) != k)
    throw InternalError(fmt::format("product of [{}, {}]{} and [{}, {}]{}", a.rows, a.columns,
                                    operation.transpose_a ? "^T" : "", b.rows, b.columns,
                                    operation.transpose_b ? "^T" : ""));
  if (m == 0 || n == 0) return;
  if (dtype == at::kBFloat16 && !multiplies_bfloat16())
    return multiply_widened(a, b, operation, at::Tensor(), c, c_stride, result);
#ifdef HEADFOLD_WITH_ONEDNN
  if (uses_onednn() && dtype != at::kDouble) {
    if (splits_sums() && (m > kTileOfThread || n > kTileOfThread))
      return multiply_in_tiles(a, b, operation, static_cast<float*>(c), c_stride);
    std::optional<SingleThread> single;
    if (splits_sums()) single.emplace();
    thread_local PrimitiveCache<PlainProduct> cache;
    const Key key{m,
                  n,
                  k,
                  a.stride,
                  b.stride,
                  c_stride,
                  (operation.transpose_a ? 1 : 0) + (operation.transpose_b ? 2 : 0) + (operation.accumulate ? 4 : 0),
                  static_cast<int>(dtype),
                  static_cast<int>(result),
                  threads_here()};
    PlainProduct& product = cache.get(key, [&] {
      const auto x = describe_matrix(a.rows, a.columns, a.stride, dtype, operation.transpose_a);
      const auto w = describe_matrix(b.rows, b.columns, b.stride, dtype, operation.transpose_b);
      const auto y = describe_matrix(m, n, c_stride, result, false);
      return PlainProduct{describe_product(x, w, nullptr, y, operation.accumulate), x, w, y};
    });
    product.primitive.execute(stream(),
                              {{DNNL_ARG_SRC, dnnl::memory(product.a, engine(), const_cast<void*>(a.data))},
                               {DNNL_ARG_WEIGHTS, dnnl::memory(product.b, engine(), const_cast<void*>(b.data))},
                               {DNNL_ARG_DST, dnnl::memory(product.c, engine(), c)}});
    stream().wait();
    return;
  }
#endif
  const auto options = at::TensorOptions().dtype(dtype);
  at::Tensor x = at::from_blob(const_cast<void*>(a.data), {a.rows, a.columns}, {a.stride, 1}, options);
  at::Tensor w = at::from_blob(const_cast<void*>(b.data), {b.rows, b.columns}, {b.stride, 1}, options);
  if (operation.transpose_a) x = x.t();
  if (operation.transpose_b) w = w.t();
  at::Tensor y = at::from_blob(c, {m, n}, {c_stride, 1}, options.dtype(result));
  // Scores keep float32 as oneDNN does, at the price of a wider copy of the operands.
  if (result != dtype) {
    x = x.to(result);
    w = w.to(result);
  }
  if (operation.accumulate) {
    y.addmm_(x, w);
  } else {
    at::mm_out(y, x, w);
  }
}

}  // namespace headfold::model
