#pragma once
// cuBLAS behind one function; private to linalg.

#include <ATen/ATen.h>

namespace headfold::linalg {

/// Throws NotCompiled in a build without CUDA.
void require_cublas();
/// out = left^T right, float32, in the legacy default stream (returns before it is done): left [tokens, m] and right
/// [tokens, n] bfloat16 or float32, columns next to each other and rows at one stride each; out [m, n] contiguous; all
/// on one GPU. Products of bfloat16 are exact; both dtypes are accumulated in float32, float32 without TF32.
/// DeviceFailure when the library reports one; NotCompiled in a build without CUDA.
void cublas_product(const at::Tensor& left, const at::Tensor& right, at::Tensor& out);

}  // namespace headfold::linalg
