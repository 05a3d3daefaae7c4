#include "kernels.h"

#include <headfold/base/error.h>

namespace headfold::model::kernels {
namespace {

struct Bf16 {
  std::uint16_t bits;
};

#define HEADFOLD_INLINE inline __attribute__((always_inline))

HEADFOLD_INLINE float get(const float& x) {
  return x;
}
HEADFOLD_INLINE float get(const Bf16& x) {
  const std::uint32_t wide = static_cast<std::uint32_t>(x.bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, sizeof(value));
  return value;
}
HEADFOLD_INLINE void put(float& x, float value) {
  x = value;
}
HEADFOLD_INLINE void put(Bf16& x, float value) {
  // Round to nearest, ties to even; a NaN stays one.
  std::uint32_t wide;
  __builtin_memcpy(&wide, &value, sizeof(wide));
  const std::uint32_t nearest = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
  x.bits = static_cast<std::uint16_t>(value == value ? nearest : 0x7fc0u);
}
/// `value` rounded to the type of the first argument, as float.
HEADFOLD_INLINE float rounded(const float&, float value) {
  return value;
}
HEADFOLD_INLINE float rounded(const Bf16&, float value) {
  Bf16 x;
  put(x, value);
  return get(x);
}

// The same source for each instruction set: the pragma region makes the compiler vectorise the plain loops for it.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HEADFOLD_MANY_ISAS 1
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace avx512_f32 {
#define HEADFOLD_ELEMENT float
#include "kernels_body.inl"
#undef HEADFOLD_ELEMENT
}  // namespace avx512_f32
namespace avx512_bf16 {
#define HEADFOLD_ELEMENT Bf16
#include "kernels_body.inl"
#undef HEADFOLD_ELEMENT
}  // namespace avx512_bf16
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2_f32 {
#define HEADFOLD_ELEMENT float
#include "kernels_body.inl"
#undef HEADFOLD_ELEMENT
}  // namespace avx2_f32
namespace avx2_bf16 {
#define HEADFOLD_ELEMENT Bf16
#include "kernels_body.inl"
#undef HEADFOLD_ELEMENT
}  // namespace avx2_bf16
#pragma GCC pop_options
#endif
namespace base_f32 {
#define HEADFOLD_ELEMENT float
#include "kernels_body.inl"
#undef HEADFOLD_ELEMENT
}  // namespace base_f32
namespace base_bf16 {
#define HEADFOLD_ELEMENT Bf16
#include "kernels_body.inl"
#undef HEADFOLD_ELEMENT
}  // namespace base_bf16

}  // namespace

std::vector<Table> variants(at::ScalarType dtype) {
  if (dtype != at::kFloat && dtype != at::kBFloat16)
    throw InternalError(fmt::format("no kernels for dtype {}", c10::toString(dtype)));
  const bool f32 = dtype == at::kFloat;
  std::vector<Table> found;
#ifdef HEADFOLD_MANY_ISAS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    found.push_back(f32 ? avx512_f32::make_table("avx512") : avx512_bf16::make_table("avx512"));
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    found.push_back(f32 ? avx2_f32::make_table("avx2") : avx2_bf16::make_table("avx2"));
#endif
  found.push_back(f32 ? base_f32::make_table("baseline") : base_bf16::make_table("baseline"));
  return found;
}

const Table& table(at::ScalarType dtype) {
  static const Table f32 = variants(at::kFloat).front();
  static const Table bf16 = variants(at::kBFloat16).front();
  if (dtype == at::kFloat) return f32;
  if (dtype == at::kBFloat16) return bf16;
  throw InternalError(fmt::format("no kernels for dtype {}", c10::toString(dtype)));
}

}  // namespace headfold::model::kernels
