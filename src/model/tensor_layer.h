#pragma once
// Private: the decoder layer in libtorch's operations, on the device of compute().

#include <headfold/model/model.h>

#include "source.h"

namespace headfold::model {

/// Same results as the native layer up to rounding; arguments as load_layer(), which has checked them.
std::unique_ptr<Layer> make_tensor_layer(const ModelConfig& config, std::int64_t layer, at::ScalarType dtype,
                                         const Source& source);

/// RMSNorm (no bias) or LayerNorm of the last dimension; the native kernel's rounding.
at::Tensor normalise_tensor(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps);

}  // namespace headfold::model
