#pragma once
// Private: pairs (l, l + d/2) of a head as complex numbers.

#include <ATen/ATen.h>

namespace headfold::folding {

/// E[z z^H] of every frequency, [d/2, heads, heads], from the real Gram of stacked heads [heads d, heads d]:
/// (x_a + i y_a) conj(x_b + i y_b) = (xx + yy) + i (yx - xy).
inline at::Tensor complex_grams(const at::Tensor& gram, std::int64_t heads) {
  const std::int64_t half = gram.size(0) / heads / 2;
  const at::Tensor blocks = gram.reshape({heads, 2, half, heads, 2, half});
  const auto part = [&](std::int64_t a, std::int64_t b) {
    return blocks.select(1, a).select(3, b).diagonal(0, 1, 3).permute({2, 0, 1});
  };
  return at::complex((part(0, 0) + part(1, 1)).contiguous(), (part(1, 0) - part(0, 1)).contiguous());
}

/// Writes complex coefficients [heads] of frequency l as 2 x 2 real blocks [[re, -im], [im, re]] into rows l and l +
/// d/2 of a map [d, heads d].
inline void write_complex(at::Tensor& map, const at::Tensor& coefficients, std::int64_t l) {
  const std::int64_t heads = coefficients.size(0), half = map.size(0) / 2;
  const at::Tensor view = map.view({2 * half, heads, 2 * half});
  const at::Tensor real = at::real(coefficients);
  const at::Tensor imaginary = at::imag(coefficients);
  view.select(0, l).select(1, l).copy_(real);
  view.select(0, l).select(1, l + half).copy_(-imaginary);
  view.select(0, l + half).select(1, l).copy_(imaginary);
  view.select(0, l + half).select(1, l + half).copy_(real);
}

/// Complex coefficients [d/2, heads] of a map [d, heads d] of 2 x 2 blocks as write_complex() makes them; other entries
/// are ignored.
inline at::Tensor read_complex(const at::Tensor& map) {
  const std::int64_t half = map.size(0) / 2, heads = map.size(1) / (2 * half);
  const at::Tensor view = map.reshape({2, half, heads, 2, half});
  const auto part = [&](std::int64_t a, std::int64_t b) {
    return view.select(0, a).select(2, b).diagonal(0, 0, 2).permute({1, 0});
  };
  return at::complex((0.5 * (part(0, 0) + part(1, 1))).contiguous(), (0.5 * (part(1, 0) - part(0, 1))).contiguous());
}

}  // namespace headfold::folding
