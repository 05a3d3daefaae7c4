#pragma once
// Which code and which device run the layers of a model.

#include <ATen/ATen.h>

#include <string>

namespace headfold::model {

enum class Engine {
  native,   ///< headfold's kernels, oneDNN and the BLAS: the CPU
  tensors,  ///< libtorch's operations: GPUs. On the CPU, slower, the same code is its own check
};

struct Compute {
  Engine engine = Engine::native;
  at::Device device = at::Device(at::kCPU);
  bool on_host() const { return device.is_cpu(); }
};

/// How layers, embeddings, heads and caches made from now on compute; one for a process, since a rank has one device.
const Compute& compute();
void set_compute(const Compute& compute);

/// Meaning of --device: "cpu" (native), "cpu:tensors" (the code of GPUs on the CPU), "cuda" (`own_gpu`, the GPU that is
/// this rank's), "cuda:N", or "auto": the rank's GPU where there is one that libtorch can use, else the CPU. `own_gpu`
/// is -1 on ranks without one. UsageError for anything else and for a GPU that is not there; NotCompiled when this
/// libtorch has no CUDA.
Compute parse_device(const std::string& text, int own_gpu);
/// "cpu", "cpu:tensors", "cuda:0".
std::string device_text(const Compute& compute);

/// A copy of `host` (any strides, often a view of a mapped file) on the device of compute(), in `dtype`, contiguous. To
/// a GPU it travels through two pinned buffers, so that the pages of the file are read while the one before is on its
/// way; it is converted there.
at::Tensor to_device(const at::Tensor& host, at::ScalarType dtype);
/// The tensor itself, or its copy in host memory.
at::Tensor to_host(const at::Tensor& tensor);

}  // namespace headfold::model
