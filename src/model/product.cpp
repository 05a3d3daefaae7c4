#include "product.h"

#include <ATen/Parallel.h>
#include <headfold/base/error.h>
#include <omp.h>

#include <atomic>
#include <list>
#include <mutex>
#include <string_view>
#include <tuple>
#include <unordered_map>

#ifdef HEADFOLD_WITH_ONEDNN
#include <oneapi/dnnl/dnnl.hpp>
#endif

namespace headfold::model {
namespace {

#ifdef HEADFOLD_WITH_ONEDNN
std::atomic<bool> onednn_on{true};
#else
std::atomic<bool> onednn_on{false};
#endif

}  // namespace

bool uses_onednn() { return onednn_on; }

void use_onednn([[maybe_unused]] bool on) {
#ifdef HEADFOLD_WITH_ONEDNN
  onednn_on = on;
#endif
}

#ifdef HEADFOLD_WITH_ONEDNN
namespace {

const dnnl::engine& engine() {
  static const dnnl::engine cpu(dnnl::engine::kind::cpu, 0);
  return cpu;
}

dnnl::stream& stream() {
  thread_local dnnl::stream own(engine());
  return own;
}

dnnl::memory::data_type type_of(at::ScalarType type) {
  return type == at::kBFloat16 ? dnnl::memory::data_type::bf16 : dnnl::memory::data_type::f32;
}

/// Row-major matrix of `rows` x `columns`, or its transpose, as oneDNN describes it.
dnnl::memory::desc describe_matrix(std::int64_t rows, std::int64_t columns, std::int64_t stride, at::ScalarType type, bool transposed) {
  using Dims = dnnl::memory::dims;
  // A single row's stride is meaningless, but oneDNN compares it with the dense one.
  if (rows == 1) stride = columns;
  return transposed ? dnnl::memory::desc(Dims{columns, rows}, type_of(type), Dims{1, stride})
                    : dnnl::memory::desc(Dims{rows, columns}, type_of(type), Dims{stride, 1});
}

dnnl::matmul::primitive_desc describe_product(const dnnl::memory::desc& a, const dnnl::memory::desc& b, const dnnl::memory::desc* bias,
                                              const dnnl::memory::desc& c, bool accumulate) {
  dnnl::primitive_attr attributes;
  if (accumulate) {
    dnnl::post_ops sum;
    sum.append_sum(1.0F);
    attributes.set_post_ops(sum);
  }
#if DNNL_VERSION_MAJOR >= 3
  return bias != nullptr ? dnnl::matmul::primitive_desc(engine(), a, b, *bias, c, attributes)
                         : dnnl::matmul::primitive_desc(engine(), a, b, c, attributes);
#else
  return bias != nullptr ? dnnl::matmul::primitive_desc(dnnl::matmul::desc(a, b, *bias, c), attributes, engine())
                         : dnnl::matmul::primitive_desc(dnnl::matmul::desc(a, b, c), attributes, engine());
#endif
}

/// A primitive is built for one number of threads, so that number is part of its key.
int threads_here() { return omp_in_parallel() != 0 ? 1 : omp_get_max_threads(); }

using Key = std::array<std::int64_t, 12>;
struct KeyHash {
  std::size_t operator()(const Key& key) const {
    std::uint64_t hash = 1469598103934665603U;
    for (const std::int64_t value : key) hash = (hash ^ static_cast<std::uint64_t>(value)) * 1099511628211U + (hash >> 29);
    return hash;
  }
};

/// Primitives of this thread: looking one up costs far less than describing it again. Dropped all at once when there are too many
/// (sequences of hundreds of different lengths).
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

struct PackedProduct {
  dnnl::matmul primitive;
  dnnl::memory::desc x, weight, y;
};

}  // namespace

struct Product::State {
  at::Tensor plain_weight, plain_bias;  // without oneDNN
  dnnl::memory bias;
  std::mutex mutex;
  // The first is the packing for long inputs; a few shapes want another one.
  std::list<dnnl::memory> packings;

  dnnl::memory packed(const dnnl::memory::desc& wanted) {
    const std::lock_guard lock(mutex);
    for (const dnnl::memory& packing : packings)
      if (packing.get_desc() == wanted) return packing;
    dnnl::memory fresh(wanted, engine());
    dnnl::memory from = packings.front();
    dnnl::reorder(from, fresh).execute(stream(), from, fresh);
    stream().wait();
    packings.push_back(fresh);
    return fresh;
  }
};
#else
struct Product::State {
  at::Tensor plain_weight, plain_bias;
};
#endif

Product::Product(const at::Tensor& weight, const at::Tensor& bias, at::ScalarType dtype)
    : out_(weight.size(0)), in_(weight.size(1)), dtype_(dtype), state_(std::make_unique<State>()) {
  at::Tensor plain = weight.to(dtype).contiguous();
  const at::Tensor plain_bias = bias.defined() ? bias.to(dtype).contiguous() : bias;
#ifdef HEADFOLD_WITH_ONEDNN
  if (uses_onednn() && out_ > 0 && in_ > 0) {
    using Tag = dnnl::memory::format_tag;
    constexpr std::int64_t kLong = 1024;  // rows the packing is chosen for; it hardly depends on them
    const dnnl::memory::desc x({kLong, in_}, type_of(dtype), Tag::ab);
    const dnnl::memory::desc any({in_, out_}, type_of(dtype), Tag::any);
    const dnnl::memory::desc y({kLong, out_}, type_of(dtype), Tag::ab);
    const auto described = describe_product(x, any, nullptr, y, false);
    dnnl::memory from(describe_matrix(out_, in_, in_, dtype, true), engine(), plain.data_ptr());
    dnnl::memory packing(described.weights_desc(), engine());
    dnnl::reorder(from, packing).execute(stream(), from, packing);
    stream().wait();
    state_->packings.push_back(packing);
    if (plain_bias.defined()) {
      state_->bias = dnnl::memory({{1, out_}, type_of(dtype), Tag::ab}, engine());
      std::memcpy(state_->bias.get_data_handle(), plain_bias.data_ptr(), plain_bias.nbytes());
    }
    return;
  }
#endif
  // A view of a mapped file must not be kept: its pages are given back.
  state_->plain_weight = plain.is_alias_of(weight) ? plain.clone() : plain;
  if (plain_bias.defined()) state_->plain_bias = plain_bias.is_alias_of(bias) ? plain_bias.clone() : plain_bias;
}

Product::~Product() = default;

std::int64_t Product::bytes() const {
#ifdef HEADFOLD_WITH_ONEDNN
  if (!state_->packings.empty()) {
    std::size_t sum = state_->bias ? state_->bias.get_desc().get_size() : 0;
    const std::lock_guard lock(state_->mutex);
    for (const dnnl::memory& packing : state_->packings) sum += packing.get_desc().get_size();
    return static_cast<std::int64_t>(sum);
  }
#endif
  return static_cast<std::int64_t>(state_->plain_weight.nbytes() + (state_->plain_bias.defined() ? state_->plain_bias.nbytes() : 0));
}

void Product::apply(const at::Tensor& x, const at::Tensor& y, bool accumulate) const {
  if (x.dim() != 2 || y.dim() != 2 || x.size(1) != in_ || y.size(1) != out_ || x.size(0) != y.size(0) || x.scalar_type() != dtype_ ||
      y.scalar_type() != dtype_ || (x.size(0) > 0 && (x.stride(1) != 1 || y.stride(1) != 1)))
    throw InternalError(fmt::format("product [{}, {}] applied to [{}] giving [{}]", out_, in_, fmt::join(x.sizes(), ", "),
                                    fmt::join(y.sizes(), ", ")));
  const std::int64_t rows = x.size(0);
  if (rows == 0) return;
#ifdef HEADFOLD_WITH_ONEDNN
  if (!state_->packings.empty()) {
    thread_local PrimitiveCache<PackedProduct> cache;
    const bool biased = static_cast<bool>(state_->bias);
    // Keyed by shape, not by weight: all layers share the entries, and no entry keeps a weight alive.
    const Key key{out_, in_, rows, x.stride(0), y.stride(0), accumulate, biased, static_cast<int>(dtype_), threads_here()};
    PackedProduct& product = cache.get(key, [&] {
      const auto a = describe_matrix(rows, in_, x.stride(0), dtype_, false);
      const auto c = describe_matrix(rows, out_, y.stride(0), dtype_, false);
      const dnnl::memory::desc any({in_, out_}, type_of(dtype_), dnnl::memory::format_tag::any);
      const auto bias = biased ? state_->bias.get_desc() : dnnl::memory::desc();
      const auto described = describe_product(a, any, biased ? &bias : nullptr, c, accumulate);
      return PackedProduct{dnnl::matmul(described), a, described.weights_desc(), c};
    });
    std::unordered_map<int, dnnl::memory> arguments{{DNNL_ARG_SRC, dnnl::memory(product.x, engine(), x.data_ptr())},
                                                    {DNNL_ARG_WEIGHTS, state_->packed(product.weight)},
                                                    {DNNL_ARG_DST, dnnl::memory(product.y, engine(), y.data_ptr())}};
    if (biased) arguments.emplace(DNNL_ARG_BIAS, state_->bias);
    product.primitive.execute(stream(), arguments);
    stream().wait();
    return;
  }
#endif
  at::Tensor result = y;
  const at::Tensor transposed = state_->plain_weight.t();
  if (accumulate) {
    result.addmm_(x, transposed);
    if (state_->plain_bias.defined()) result.add_(state_->plain_bias);
  } else if (state_->plain_bias.defined()) {
    at::addmm_out(result, state_->plain_bias, x, transposed);
  } else {
    at::mm_out(result, x, transposed);
  }
}

void multiply(const Matrix& a, const Matrix& b, bool transposed, at::ScalarType dtype, void* c, std::int64_t c_stride, at::ScalarType result) {
  const std::int64_t m = a.rows;
  const std::int64_t k = a.columns;
  const std::int64_t n = transposed ? b.rows : b.columns;
  if ((transposed ? b.columns : b.rows) != k)
    throw InternalError(fmt::format("product of [{}, {}] and [{}, {}]{}", a.rows, a.columns, b.rows, b.columns, transposed ? "^T" : ""));
  if (m == 0 || n == 0) return;
#ifdef HEADFOLD_WITH_ONEDNN
  if (uses_onednn()) {
    thread_local PrimitiveCache<PlainProduct> cache;
    const Key key{m, n, k, a.stride, b.stride, c_stride, transposed, static_cast<int>(dtype), static_cast<int>(result), threads_here()};
    PlainProduct& product = cache.get(key, [&] {
      const auto x = describe_matrix(m, k, a.stride, dtype, false);
      const auto w = describe_matrix(b.rows, b.columns, b.stride, dtype, transposed);
      const auto y = describe_matrix(m, n, c_stride, result, false);
      return PlainProduct{dnnl::matmul(describe_product(x, w, nullptr, y, false)), x, w, y};
    });
    product.primitive.execute(stream(), {{DNNL_ARG_SRC, dnnl::memory(product.a, engine(), const_cast<void*>(a.data))},
                                         {DNNL_ARG_WEIGHTS, dnnl::memory(product.b, engine(), const_cast<void*>(b.data))},
                                         {DNNL_ARG_DST, dnnl::memory(product.c, engine(), c)}});
    stream().wait();
    return;
  }
#endif
  const auto options = at::TensorOptions().dtype(dtype);
  const at::Tensor x = at::from_blob(const_cast<void*>(a.data), {m, k}, {a.stride, 1}, options);
  at::Tensor w = at::from_blob(const_cast<void*>(b.data), {b.rows, b.columns}, {b.stride, 1}, options);
  if (transposed) w = w.t();
  at::Tensor y = at::from_blob(c, {m, n}, {c_stride, 1}, options.dtype(result));
  if (result == dtype) {
    at::mm_out(y, x, w);
  } else {
    // Scores keep float32 as oneDNN does, at the price of a wider copy of the operands.
    at::mm_out(y, x.to(result), w.to(result));
  }
}

}  // namespace headfold::model
