#include "elementwise.h"

#include <ATen/Parallel.h>
#include <headfold/base/error.h>
#include <headfold/model/kernels.h>

#include <cmath>
#include <mutex>

#include "tensors.h"

namespace headfold::finetune {
namespace {

namespace kernels = model::kernels;

/// Body(first row, last row + 1) over the rows of a matrix in parallel.
template <class Body>
void for_rows(const at::Tensor& x, const Body& body) {
  const std::int64_t grain = std::max<std::int64_t>(1, 16384 / std::max<std::int64_t>(1, x.size(1)));
  at::parallel_for(0, x.size(0), grain, body);
}

char* row_of(const at::Tensor& x, std::int64_t row) {
  return static_cast<char*>(x.data_ptr()) + row * x.size(1) * static_cast<std::int64_t>(x.element_size());
}

void require_dense(const at::Tensor& x) {
  if (!x.is_contiguous()) throw InternalError("a step of a layer got a tensor that is not contiguous");
}

/// Chunks of a flat range: body(first byte offset, elements).
template <class Body>
void for_elements(const at::Tensor& x, const Body& body) {
  const auto size = static_cast<std::int64_t>(x.element_size());
  at::parallel_for(0, x.numel(), 8192, [&](std::int64_t begin, std::int64_t end) { body(begin * size, end - begin); });
}

char* bytes_of(const at::Tensor& x) {
  return static_cast<char*>(x.data_ptr());
}

bool is_double(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble;
}

// -----------------------------------------------------------------------------------------------------------------------------
// float64, plain

void norm_row(const double* x, const double* weight, const double* bias, double* y, std::int64_t n, double eps) {
  double mean = 0;
  for (std::int64_t i = 0; bias != nullptr && i < n; ++i) mean += x[i] / static_cast<double>(n);
  double squares = 0;
  for (std::int64_t i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const double factor = 1 / std::sqrt(squares / static_cast<double>(n) + eps);
  for (std::int64_t i = 0; i < n; ++i) y[i] = (x[i] - mean) * factor * weight[i] + (bias != nullptr ? bias[i] : 0.0);
}

void norm_row_backward(const double* x, const double* weight, bool centred, const double* dy, double* dx,
                       double* dweight, double* dbias, std::int64_t n, double eps) {
  const auto count = static_cast<double>(n);
  double mean = 0, level = 0, squares = 0, product = 0;
  for (std::int64_t i = 0; centred && i < n; ++i) mean += x[i] / count;
  for (std::int64_t i = 0; i < n; ++i) {
    squares += (x[i] - mean) * (x[i] - mean);
    product += (x[i] - mean) * dy[i] * weight[i];
    if (centred) level += dy[i] * weight[i] / count;
  }
  const double factor = 1 / std::sqrt(squares / count + eps);
  for (std::int64_t i = 0; i < n; ++i) {
    dx[i] += factor * (dy[i] * weight[i] - level - (x[i] - mean) * product * factor * factor / count);
    if (dweight != nullptr) dweight[i] += dy[i] * (x[i] - mean) * factor;
    if (dbias != nullptr) dbias[i] += dy[i];
  }
}

}  // namespace

at::Tensor normalise(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps) {
  if (tensors::in_use()) return tensors::normalise(x, weight, bias, eps);
  require_dense(x);
  at::Tensor y = at::empty_like(x);
  const std::int64_t n = x.size(1);
  for_rows(x, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      if (is_double(x)) {
        norm_row(x.data_ptr<double>() + row * n, weight.data_ptr<double>(),
                 bias.defined() ? bias.data_ptr<double>() : nullptr, y.data_ptr<double>() + row * n, n, eps);
      } else if (bias.defined()) {
        kernels::table(x.scalar_type())
            .layer_norm(row_of(x, row), weight.data_ptr(), bias.data_ptr(), row_of(y, row), n, static_cast<float>(eps));
      } else {
        kernels::table(x.scalar_type())
            .rms_norm(row_of(x, row), weight.data_ptr(), row_of(y, row), n, static_cast<float>(eps));
      }
    }
  });
  return y;
}

void normalise_backward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps,
                        const at::Tensor& dy, const at::Tensor& dx, const at::Tensor& dweight,
                        const at::Tensor& dbias) {
  if (tensors::in_use()) {
    tensors::normalise_backward(x, weight, bias, eps, dy, dx, dweight, dbias);
    return;
  }
  for (const at::Tensor* each : {&x, &dy, &dx}) require_dense(*each);
  const std::int64_t n = x.size(1);
  const bool trains = dweight.defined();
  const at::ScalarType sums = is_double(x) ? at::kDouble : at::kFloat;
  // Blocks of rows sum weight gradients by themselves and are added in order: the result does not depend on which
  // thread took which.
  constexpr std::int64_t kBlock = 256;
  const std::int64_t blocks = (x.size(0) + kBlock - 1) / kBlock;
  const at::Tensor partial = trains ? at::zeros({2, blocks, n}, sums) : at::Tensor();
  at::parallel_for(0, blocks, 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t block = first; block < last; ++block) {
      for (std::int64_t row = block * kBlock; row < std::min(x.size(0), (block + 1) * kBlock); ++row) {
        if (is_double(x)) {
          auto* own = trains ? partial.data_ptr<double>() + block * n : nullptr;
          norm_row_backward(x.data_ptr<double>() + row * n, weight.data_ptr<double>(), bias.defined(),
                            dy.data_ptr<double>() + row * n, dx.data_ptr<double>() + row * n, own,
                            trains && bias.defined() ? own + blocks * n : nullptr, n, eps);
          continue;
        }
        const auto& kernel = kernels::table(x.scalar_type());
        auto* own = trains ? partial.data_ptr<float>() + block * n : nullptr;
        if (bias.defined()) {
          kernel.layer_norm_backward(row_of(x, row), weight.data_ptr(), row_of(dy, row), row_of(dx, row), own,
                                     trains ? own + blocks * n : nullptr, n, static_cast<float>(eps));
        } else {
          kernel.rms_norm_backward(row_of(x, row), weight.data_ptr(), row_of(dy, row), row_of(dx, row), own, n,
                                   static_cast<float>(eps));
        }
      }
    }
  });
  if (!trains) return;
  at::Tensor sum = dweight;
  sum.add_(partial[0].sum(0));
  if (!dbias.defined()) return;
  sum = dbias;
  sum.add_(partial[1].sum(0));
}

void rotate(const at::Tensor& x, const Rotation& rotation, bool inverse) {
  const std::int64_t heads = x.size(1);
  const std::int64_t half = x.size(2) / 2;
  if (x.stride(2) != 1 || rotation.cosine.size(1) != half ||
      static_cast<std::int64_t>(rotation.positions.size()) != x.size(0))
    throw InternalError(fmt::format("rotation of [{}] by {} frequencies at {} positions", fmt::join(x.sizes(), ", "),
                                    rotation.cosine.size(1), rotation.positions.size()));
  if (tensors::in_use()) {
    tensors::rotate(x, rotation, inverse);
    return;
  }
  const float* cosine = rotation.cosine.data_ptr<float>();
  const at::Tensor turned = inverse ? rotation.sine.neg() : rotation.sine;
  const float* sine = turned.data_ptr<float>();
  const auto size = static_cast<std::int64_t>(x.element_size());
  at::parallel_for(0, x.size(0), std::max<std::int64_t>(1, 16384 / (heads * half)),
                   [&](std::int64_t begin, std::int64_t end) {
                     for (std::int64_t row = begin; row < end; ++row) {
                       const std::int64_t angle = rotation.positions[static_cast<std::size_t>(row)] * half;
                       for (std::int64_t head = 0; head < heads; ++head) {
                         char* own = bytes_of(x) + (row * x.stride(0) + head * x.stride(1)) * size;
                         if (is_double(x)) {
                           auto* v = reinterpret_cast<double*>(own);
                           for (std::int64_t i = 0; i < half; ++i) {
                             const double a = v[i], b = v[i + half];
                             const double c = cosine[angle + i], s = sine[angle + i];
                             v[i] = a * c - b * s;
                             v[i + half] = b * c + a * s;
                           }
                         } else {
                           kernels::table(x.scalar_type()).rotate(own, cosine + angle, sine + angle, own, half);
                         }
                       }
                     }
                   });
}

at::Tensor silu_times(const at::Tensor& gate, const at::Tensor& up) {
  if (tensors::in_use()) return tensors::silu_times(gate, up);
  require_dense(up);
  at::Tensor y = gate.clone();
  for_elements(y, [&](std::int64_t offset, std::int64_t n) {
    if (is_double(y)) {
      auto* g = reinterpret_cast<double*>(bytes_of(y) + offset);
      const auto* u = reinterpret_cast<const double*>(bytes_of(up) + offset);
      for (std::int64_t i = 0; i < n; ++i) g[i] = g[i] / (1 + std::exp(-g[i])) * u[i];
    } else {
      kernels::table(y.scalar_type()).silu_times(bytes_of(y) + offset, bytes_of(up) + offset, n);
    }
  });
  return y;
}

void silu_times_backward(const at::Tensor& gate, const at::Tensor& up, const at::Tensor& dy) {
  if (tensors::in_use()) {
    tensors::silu_times_backward(gate, up, dy);
    return;
  }
  for (const at::Tensor* each : {&gate, &up, &dy}) require_dense(*each);
  for_elements(gate, [&](std::int64_t offset, std::int64_t n) {
    if (is_double(gate)) {
      auto* g = reinterpret_cast<double*>(bytes_of(gate) + offset);
      auto* u = reinterpret_cast<double*>(bytes_of(up) + offset);
      const auto* d = reinterpret_cast<const double*>(bytes_of(dy) + offset);
      for (std::int64_t i = 0; i < n; ++i) {
        const double sigmoid = 1 / (1 + std::exp(-g[i]));
        const double silu = g[i] * sigmoid;
        g[i] = d[i] * u[i] * sigmoid * (1 + g[i] * (1 - sigmoid));
        u[i] = d[i] * silu;
      }
    } else {
      kernels::table(gate.scalar_type())
          .silu_times_backward(bytes_of(gate) + offset, bytes_of(up) + offset, bytes_of(dy) + offset, n);
    }
  });
}

at::Tensor gelu_of(const at::Tensor& x) {
  if (tensors::in_use()) return tensors::gelu_of(x);
  at::Tensor y = x.clone();
  for_elements(y, [&](std::int64_t offset, std::int64_t n) {
    if (is_double(y)) {
      auto* v = reinterpret_cast<double*>(bytes_of(y) + offset);
      for (std::int64_t i = 0; i < n; ++i)
        v[i] = 0.5 * v[i] * (1 + std::tanh(0.79788456 * v[i] * (1 + 0.044715 * v[i] * v[i])));
    } else {
      kernels::table(y.scalar_type()).gelu(bytes_of(y) + offset, n);
    }
  });
  return y;
}

void gelu_gradient(const at::Tensor& x, const at::Tensor& dy) {
  if (tensors::in_use()) {
    tensors::gelu_gradient(x, dy);
    return;
  }
  for (const at::Tensor* each : {&x, &dy}) require_dense(*each);
  for_elements(x, [&](std::int64_t offset, std::int64_t n) {
    if (is_double(x)) {
      auto* v = reinterpret_cast<double*>(bytes_of(x) + offset);
      const auto* d = reinterpret_cast<const double*>(bytes_of(dy) + offset);
      for (std::int64_t i = 0; i < n; ++i) {
        const double t = std::tanh(0.79788456 * v[i] * (1 + 0.044715 * v[i] * v[i]));
        const double slope = 0.79788456 * (1 + 3 * 0.044715 * v[i] * v[i]);
        v[i] = d[i] * (0.5 * (1 + t) + 0.5 * v[i] * (1 - t * t) * slope);
      }
    } else {
      kernels::table(x.scalar_type()).gelu_backward(bytes_of(x) + offset, bytes_of(dy) + offset, n);
    }
  });
}

void softmax_row(at::ScalarType dtype, void* scores, void* probabilities, std::int64_t n, double scale, double slope) {
  if (dtype != at::kDouble) {
    kernels::table(dtype).softmax(static_cast<float*>(scores), probabilities,
                                  {n, n, static_cast<float>(scale), static_cast<float>(slope)});
    return;
  }
  const auto* s = static_cast<const double*>(scores);
  auto* p = static_cast<double*>(probabilities);
  double largest = -std::numeric_limits<double>::infinity();
  for (std::int64_t i = 0; i < n; ++i) {
    p[i] = s[i] * scale + slope * static_cast<double>(i);
    largest = std::max(largest, p[i]);
  }
  const double sum = exponential_sum(p, p, n, largest, 1);
  for (std::int64_t i = 0; i < n; ++i) p[i] /= sum;
}

void softmax_row_backward(at::ScalarType dtype, const void* probabilities, const void* dp, void* dscores,
                          std::int64_t n, double scale) {
  if (dtype != at::kDouble) {
    kernels::table(dtype).softmax_backward(probabilities, static_cast<const float*>(dp), dscores, n,
                                           static_cast<float>(scale));
    return;
  }
  const auto* p = static_cast<const double*>(probabilities);
  const auto* d = static_cast<const double*>(dp);
  auto* out = static_cast<double*>(dscores);
  double sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += p[i] * d[i];
  for (std::int64_t i = 0; i < n; ++i) out[i] = scale * p[i] * (d[i] - sum);
}

double exponential_sum(const float* x, float* y, std::int64_t n, double shift, double factor) {
  return kernels::table(at::kFloat).exponential_sum(x, y, n, static_cast<float>(shift), static_cast<float>(factor));
}

double exponential_sum(const double* x, double* y, std::int64_t n, double shift, double factor) {
  double sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += y[i] = std::exp((x[i] - shift) * factor);
  return sum;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Dropout

namespace {

/// Multiplies the elements of every row by 0 or by 1 / (1 - p).
void apply_mask(const at::Tensor& x, const DropoutMask& mask) {
  using kernels::mixed_bits;
  require_dense(x);
  const auto threshold = static_cast<std::uint32_t>(std::lround(mask.p * 65536));
  const double keep = 65536.0 / static_cast<double>(65536 - threshold);
  const std::int64_t n = x.size(1);
  for_rows(x, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const auto number = static_cast<std::uint64_t>((*mask.numbers)[static_cast<std::size_t>(row / mask.tokens)]);
      const std::uint64_t key =
          mixed_bits(mixed_bits(mask.key ^ mixed_bits(number)) + static_cast<std::uint64_t>(row % mask.tokens));
      if (!is_double(x)) {
        kernels::table(x.scalar_type()).drop(row_of(x, row), n, key, threshold, static_cast<float>(keep));
        continue;
      }
      auto* v = x.data_ptr<double>() + row * n;
      for (std::int64_t i = 0; i < n; ++i) {
        const std::uint64_t bits = mixed_bits(key + static_cast<std::uint64_t>(i / 4 * 4)) >> (i % 4 * 16);
        v[i] = (bits & 0xffff) < threshold ? 0 : v[i] * keep;
      }
    }
  });
}

}  // namespace

at::Tensor drop(const at::Tensor& x, const DropoutMask& mask) {
  if (tensors::in_use()) return tensors::drop(x, mask);
  at::Tensor y = x.clone();
  apply_mask(y, mask);
  return y;
}

void add_dropped(const at::Tensor& dx, const at::Tensor& dy, const DropoutMask& mask) {
  const at::Tensor& sum = dx;
  if (tensors::in_use()) {
    sum.add_(tensors::drop(dy, mask));
    return;
  }
  apply_mask(dy, mask);
  sum.add_(dy);
}

}  // namespace headfold::finetune
