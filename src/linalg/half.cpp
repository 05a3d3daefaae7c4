// float16 <-> float64. ATen converts half precision one element at a time; a checkpoint has billions.

#include <headfold/linalg/linalg.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace headfold::linalg {

#if defined(__x86_64__)
namespace {

bool has_half_instructions() {
  static const bool has = __builtin_cpu_supports("avx") != 0 && __builtin_cpu_supports("f16c") != 0;
  return has;
}

__attribute__((target("avx,f16c"))) void widen_half(const at::Half* from, double* to, std::int64_t count) {
  std::int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256 eight = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    _mm256_storeu_pd(to + i, _mm256_cvtps_pd(_mm256_castps256_ps128(eight)));
    _mm256_storeu_pd(to + i + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(eight, 1)));
  }
  for (; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

/// By way of float32, as ATen does: the same bits.
__attribute__((target("avx,f16c"))) void narrow_half(const double* from, at::Half* to, std::int64_t count) {
  std::int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256 eight =
        _mm256_set_m128(_mm256_cvtpd_ps(_mm256_loadu_pd(from + i + 4)), _mm256_cvtpd_ps(_mm256_loadu_pd(from + i)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(eight, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  for (; i < count; ++i) to[i] = at::Half(static_cast<float>(from[i]));
}

}  // namespace
#endif

at::Tensor widened(const at::Tensor& tensor) {
#if defined(__x86_64__)
  if (tensor.scalar_type() == at::kHalf && tensor.is_cpu() && has_half_instructions()) {
    const at::Tensor source = tensor.contiguous();
    at::Tensor result = at::empty(source.sizes(), at::kDouble);
    widen_half(source.data_ptr<at::Half>(), result.data_ptr<double>(), source.numel());
    return result;
  }
#endif
  return tensor.to(at::kDouble);
}

at::Tensor narrowed(const at::Tensor& tensor, at::ScalarType dtype) {
#if defined(__x86_64__)
  if (tensor.scalar_type() == at::kDouble && dtype == at::kHalf && tensor.is_cpu() && has_half_instructions()) {
    const at::Tensor source = tensor.contiguous();
    at::Tensor result = at::empty(source.sizes(), at::kHalf);
    narrow_half(source.data_ptr<double>(), result.data_ptr<at::Half>(), source.numel());
    return result;
  }
#endif
  return tensor.to(dtype).contiguous();
}

}  // namespace headfold::linalg
