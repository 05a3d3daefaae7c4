#include <ATen/Parallel.h>
#include <headfold/base/error.h>
#include <headfold/base/onednn.h>
#include <headfold/linalg/linalg.h>

#include "cublas.h"
#include "gram_blocks.h"

#if !defined(HEADFOLD_WITH_ONEDNN) && defined(HEADFOLD_WITH_CBLAS)
#include <cblas.h>
#endif

namespace headfold::linalg {
namespace {

/// packed rows [first, last) += scratch [last - first, at least last] (row-major, leading dimension `stride`), lower
/// triangle only.
template <class T>
void add_rows(double* packed, const T* scratch, std::int64_t stride, std::int64_t first, std::int64_t last) {
  const std::int64_t grain = std::max<std::int64_t>(1, 65536 / std::max<std::int64_t>(last, 1));
  at::parallel_for(first, last, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      double* to = packed + i * (i + 1) / 2;
      const T* from = scratch + (i - first) * stride;
#pragma omp simd
      for (std::int64_t j = 0; j <= i; ++j) to[j] += static_cast<double>(from[j]);
    }
  });
}

/// float32 scratch that all accumulators of a thread share: one Gram is formed at a time.
[[maybe_unused]] at::Tensor scratch(std::int64_t elements) {
  thread_local at::Tensor buffer;
  if (!buffer.defined() || buffer.numel() < elements) buffer = at::empty({elements}, at::kFloat);
  return buffer;
}

/// Rows per block of the lower triangle: blocks on the diagonal waste half their products, small ones waste the pace of
/// the product.
std::int64_t block_rows(std::int64_t n, std::int64_t wanted) {
  return std::min(n, wanted);
}

void add_product(at::Tensor& packed, const at::Tensor& x, std::int64_t rows) {
  const std::int64_t n = x.size(1);
  for (std::int64_t first = 0; first < n; first += rows) {
    const std::int64_t last = std::min(n, first + rows);
    const at::Tensor block = at::matmul(x.narrow(1, first, last - first).transpose(0, 1), x.narrow(1, 0, last));
    if (x.scalar_type() == at::kDouble)
      add_rows(packed.data_ptr<double>(), block.data_ptr<double>(), last, first, last);
    else
      add_rows(packed.data_ptr<double>(), block.data_ptr<float>(), last, first, last);
  }
}

#ifdef HEADFOLD_WITH_ONEDNN
/// Columns [first, last) of the packed lower triangle += scratch [n - first, last - first], whose rows are those from
/// `first` on.
void add_columns(double* packed, const float* scratch, std::int64_t n, std::int64_t first, std::int64_t last) {
  const std::int64_t width = last - first;
  at::parallel_for(first, n, std::max<std::int64_t>(1, 32768 / width), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      double* to = packed + i * (i + 1) / 2 + first;
      const float* from = scratch + (i - first) * width;
      const std::int64_t count = std::min(width, i + 1 - first);
#pragma omp simd
      for (std::int64_t j = 0; j < count; ++j) to[j] += static_cast<double>(from[j]);
    }
  });
}

/// float32 or bfloat16 (exact products; widened where oneDNN has none), accumulated in float32. Its kernels are chosen
/// by what the processor can do, while OpenBLAS goes by the processor's name and takes its slowest kernels for one that
/// it does not know (virtual machines, new models). Column blocks: each part of x is packed once, and the left side is
/// read as it lies.
void add_rows_of(at::Tensor& packed, const at::Tensor& x, std::int64_t skip) {
  using dnnl::memory;
  if (x.scalar_type() == at::kBFloat16 && !onednn::multiplies_bfloat16())
    return add_rows_of(packed, x.to(at::kFloat), skip);
  const dnnl::engine& engine = onednn::engine();
  thread_local dnnl::stream stream(engine);
  const auto type = x.scalar_type() == at::kFloat ? memory::data_type::f32 : memory::data_type::bf16;
  const std::int64_t n = x.size(1);
  const std::int64_t tokens = x.size(0);
  const std::int64_t step = block_rows(n, 256);
  thread_local at::Tensor turned;  // kept: fresh pages cost as much as the transposition
  if (!turned.defined() || turned.scalar_type() != x.scalar_type() || turned.size(0) != n || turned.size(1) != tokens)
    turned = at::empty({n, tokens}, x.options());
  turned.copy_(x.transpose(0, 1));
  // Rows to leave out meet zeros: a length of 2048 is faster than one of 2047.
  if (skip > 0) turned.narrow(1, 0, skip).zero_();
  const auto element = static_cast<std::int64_t>(x.element_size());
  at::Tensor buffer = scratch(step * n);
  try {
    for (std::int64_t first = 0; first < n; first += step) {
      const std::int64_t last = std::min(n, first + step);
      const memory::desc left({n - first, tokens}, type, memory::dims{tokens, 1});
      const memory::desc right({tokens, last - first}, type, memory::dims{n, 1});
      const memory::desc wanted({tokens, last - first}, type, memory::format_tag::any);
      const memory::desc out({n - first, last - first}, memory::data_type::f32, memory::dims{last - first, 1});
      const auto description = onednn::describe_product(left, wanted, nullptr, out);
      memory a(left, engine, static_cast<char*>(turned.data_ptr()) + first * tokens * element);
      memory b(right, engine, static_cast<char*>(x.data_ptr()) + first * element);
      memory c(out, engine, buffer.data_ptr());
      if (description.weights_desc() != right) {
        memory fresh(description.weights_desc(), engine);
        dnnl::reorder(b, fresh).execute(stream, b, fresh);
        b = fresh;
      }
      dnnl::matmul(description).execute(stream, {{DNNL_ARG_SRC, a}, {DNNL_ARG_WEIGHTS, b}, {DNNL_ARG_DST, c}});
      stream.wait();
      add_columns(packed.data_ptr<double>(), buffer.data_ptr<float>(), n, first, last);
    }
  } catch (const dnnl::error& error) {
    throw InternalError(
        fmt::format("oneDNN: {} (Gram of {} x {} {})", error.what(), tokens, n, c10::toString(x.scalar_type())));
  }
}
#elif defined(HEADFOLD_WITH_CBLAS)
/// float32; bfloat16 is upcast.
void add_rows_of(at::Tensor& packed, const at::Tensor& rows, std::int64_t skip) {
  const at::Tensor x = rows.narrow(0, skip, rows.size(0) - skip).to(at::kFloat);
  const std::int64_t n = x.size(1);
  const auto tokens = static_cast<int>(x.size(0));
  const std::int64_t step = block_rows(n, 1024);
  at::Tensor buffer = scratch(step * n);
  float* out = buffer.data_ptr<float>();
  const float* in = x.data_ptr<float>();
  const auto stride = static_cast<int>(n);
  for (std::int64_t first = 0; first < n; first += step) {
    const std::int64_t last = std::min(n, first + step);
    const auto height = static_cast<int>(last - first);
    if (first > 0)
      cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, height, static_cast<int>(first), tokens, 1.0F, in + first,
                  stride, in, stride, 0.0F, out, stride);
    cblas_ssyrk(CblasRowMajor, CblasLower, CblasTrans, height, tokens, 1.0F, in + first, stride, 0.0F, out + first,
                stride);
    add_rows(packed.data_ptr<double>(), out, n, first, last);
  }
}
#else
void add_rows_of(at::Tensor& packed, const at::Tensor& x, std::int64_t skip) {
  add_product(packed, x.narrow(0, skip, x.size(0) - skip).to(at::kFloat), block_rows(x.size(1), 256));
}
#endif

}  // namespace

std::int64_t packed_size(std::int64_t n) {
  return n * (n + 1) / 2;
}

at::Tensor unpack_lower(const at::Tensor& packed, std::int64_t n) {
  if (packed.numel() != packed_size(n))
    throw InternalError(fmt::format("{} packed entries do not make a {} x {} matrix", packed.numel(), n, n));
  const at::Tensor source = packed.contiguous();
  at::Tensor full = at::empty({n, n}, at::kDouble);
  const double* from = source.data_ptr<double>();
  double* to = full.data_ptr<double>();
  // Tiles keep the transposed writes within cache.
  constexpr std::int64_t tile = 64;
  at::parallel_for(0, (n + tile - 1) / tile, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i0 = begin * tile; i0 < std::min(n, end * tile); i0 += tile)
      for (std::int64_t j0 = 0; j0 <= i0; j0 += tile)
        for (std::int64_t i = i0; i < std::min(n, i0 + tile); ++i)
          for (std::int64_t j = j0; j < std::min(j0 + tile, i + 1); ++j)
            to[i * n + j] = to[j * n + i] = from[i * (i + 1) / 2 + j];
  });
  return full;
}

at::Tensor packed_block(const at::Tensor& packed, const at::Tensor& index) {
  const at::Tensor source = packed.contiguous();
  const std::int64_t m = index.numel();
  const double* from = source.data_ptr<double>();
  const std::int64_t* row = index.data_ptr<std::int64_t>();
  at::Tensor block = at::empty({m, m}, at::kDouble);
  double* to = block.data_ptr<double>();
  for (std::int64_t i = 0; i < m; ++i)
    for (std::int64_t j = 0; j <= i; ++j) {
      const auto [low, high] = std::minmax(row[i], row[j]);
      if (low < 0 || packed_size(high) + low >= source.numel())
        throw InternalError(fmt::format("row {} or {} of {} packed entries", low, high, source.numel()));
      to[i * m + j] = to[j * m + i] = from[packed_size(high) + low];
    }
  return block;
}

at::Tensor packed_row(const at::Tensor& packed, std::int64_t n, std::int64_t row) {
  if (packed.numel() != packed_size(n) || row < 0 || row >= n || !packed.is_contiguous())
    throw InternalError(fmt::format("row {} of {} packed entries", row, packed.numel()));
  const double* from = packed.data_ptr<double>();
  at::Tensor values = at::empty({n}, at::kDouble);
  double* to = values.data_ptr<double>();
  std::copy_n(from + packed_size(row), row + 1, to);
  for (std::int64_t i = row + 1; i < n; ++i) to[i] = from[packed_size(i) + row];
  return values;
}

at::Tensor packed_diagonal(const at::Tensor& packed, std::int64_t n) {
  if (packed.numel() != packed_size(n) || !packed.is_contiguous())
    throw InternalError(fmt::format("the diagonal of {} packed entries, {} wide", packed.numel(), n));
  at::Tensor values = at::empty({n}, at::kDouble);
  for (std::int64_t i = 0; i < n; ++i) values.data_ptr<double>()[i] = packed.data_ptr<double>()[packed_size(i) + i];
  return values;
}

double gram_operations(std::int64_t n, at::Device device) {
  double sum = 0;
  if (device.is_cuda()) {
    for_each_gram_block(n, kDeviceBlock, [&](const GramBlock& part) {
      sum += 2.0 * static_cast<double>(part.height) * static_cast<double>(part.width);
    });
    return sum;
  }
#ifdef HEADFOLD_WITH_ONEDNN
  const std::int64_t step = block_rows(n, 256);
  for (std::int64_t first = 0; first < n; first += step)
    sum += 2.0 * static_cast<double>(n - first) * static_cast<double>(std::min(n, first + step) - first);
#elif defined(HEADFOLD_WITH_CBLAS)
  const std::int64_t step = block_rows(n, 1024);
  for (std::int64_t first = 0; first < n; first += step) {
    const auto height = static_cast<double>(std::min(n, first + step) - first);
    sum += 2 * height * static_cast<double>(first) + height * (height + 1);
  }
#else
  const std::int64_t step = block_rows(n, 256);
  for (std::int64_t first = 0; first < n; first += step) {
    const std::int64_t last = std::min(n, first + step);
    sum += 2.0 * static_cast<double>(last - first) * static_cast<double>(last);
  }
#endif
  return sum;
}

at::Tensor pack_lower(const at::Tensor& matrix) {
  if (matrix.dim() != 2 || matrix.size(0) != matrix.size(1) || matrix.scalar_type() != at::kDouble)
    throw InternalError("pack_lower wants a square float64 matrix");
  const at::Tensor source = matrix.contiguous();
  const std::int64_t n = source.size(0);
  at::Tensor packed = at::empty({packed_size(n)}, at::kDouble);
  for (std::int64_t i = 0; i < n; ++i)
    std::copy_n(source.data_ptr<double>() + i * n, i + 1, packed.data_ptr<double>() + i * (i + 1) / 2);
  return packed;
}

GramAccumulator::GramAccumulator(std::int64_t n, at::Device device, GramEngine engine, std::int64_t block)
    : n_(n), device_(device), engine_(engine), block_(block > 0 ? block : kDeviceBlock) {
  if (device_.is_cuda() && engine == GramEngine::automatic) require_cublas();
  if (!in_blocks()) packed_ = at::zeros({packed_size(n)}, at::kDouble);
}

void GramAccumulator::add(const at::Tensor& x, std::int64_t skip) {
  if (x.dim() != 2 || x.size(1) != n_)
    throw InternalError(
        fmt::format("a Gram of width {} cannot take rows of shape {}", n_, fmt::join(x.sizes(), " x ")));
  if (x.device().type() != device_.type() || (device_.has_index() && x.device() != device_))
    throw InternalError(fmt::format("a Gram on {} cannot take rows on {}", device_.str(), x.device().str()));
  if (skip < 0 || skip > x.size(0)) throw InternalError(fmt::format("{} rows to skip of {}", skip, x.size(0)));
  const at::ScalarType dtype = x.scalar_type();
  if (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kDouble)
    throw InternalError(fmt::format("no Gram of {} rows", c10::toString(dtype)));
  if (x.size(0) == skip || n_ == 0) return;
  const at::Tensor rows = x.contiguous();
  if (in_blocks()) return add_blocks(rows.narrow(0, skip, rows.size(0) - skip));
  if (dtype == at::kDouble)
    add_product(packed_, rows.narrow(0, skip, rows.size(0) - skip), block_rows(n_, 256));
  else
    add_rows_of(packed_, rows, skip);
}

bool GramAccumulator::in_blocks() const {
  return device_.is_cuda() || engine_ == GramEngine::tensors;
}

at::Tensor GramAccumulator::blocks() {
  if (!in_blocks()) return {};
  if (!blocks_.defined()) {
    const auto options = at::TensorOptions().dtype(at::kDouble).device(device_);
    blocks_ = packed_.defined() ? unpack_gram_blocks(packed_, n_, block_).to(options)
                                : at::zeros({gram_blocks_size(n_, block_)}, options);
  }
  packed_.reset();
  return blocks_;
}

void GramAccumulator::add_blocks(const at::Tensor& x) {
  at::Tensor sums = blocks();
  add_gram_blocks(sums, x, block_, engine_ == GramEngine::automatic);
}

void GramAccumulator::download() const {
  if (packed_.defined()) return;
  packed_ = blocks_.defined() ? pack_gram_blocks(blocks_.to(at::kCPU), n_, block_)
                              : at::zeros({packed_size(n_)}, at::kDouble);
}

at::Tensor& GramAccumulator::packed() {
  download();
  blocks_.reset();
  return packed_;
}

const at::Tensor& GramAccumulator::packed() const {
  download();
  return packed_;
}

at::Tensor GramAccumulator::full() const {
  return unpack_lower(packed(), n_);
}

}  // namespace headfold::linalg
