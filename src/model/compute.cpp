#include <ATen/Context.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <headfold/base/error.h>
#include <headfold/model/compute.h>

#include <array>
#include <charconv>
#include <mutex>
#include <optional>
#include <thread>

namespace headfold::model {
namespace {

Compute current;

/// Two pinned buffers that copies to a GPU take turns in.
class Staging {
 public:
  explicit Staging(at::Device device) : device_(device) {
    for (Half& half : halves_)
      half.bytes = at::empty({kBytes}, at::TensorOptions().dtype(at::kByte).pinned_memory(true));
  }
  at::Device device() const { return device_; }

  /// Rows of `host` [rows, columns] to `target`, of the same dtype and on the device.
  void copy(const at::Tensor& host, const at::Tensor& target) {
    const auto stream = c10::impl::VirtualGuardImpl(device_.type()).getStream(device_);
    const std::int64_t row_bytes =
        std::max<std::int64_t>(1, host.size(1) * static_cast<std::int64_t>(host.element_size()));
    const std::int64_t rows = kBytes / row_bytes;
    if (rows == 0) {
      target.copy_(host);
      return;
    }
    for (std::int64_t begin = 0; begin < host.size(0); begin += rows) {
      const std::int64_t end = std::min(host.size(0), begin + rows);
      Half& half = halves_[next_];
      next_ = 1 - next_;
      while (half.sent && !half.sent->query()) std::this_thread::yield();  // its last copy is under way
      const at::Tensor staged =
          half.bytes.slice(0, 0, (end - begin) * row_bytes).view(host.scalar_type()).view({end - begin, host.size(1)});
      staged.copy_(host.slice(0, begin, end));
      target.slice(0, begin, end).copy_(staged, /*non_blocking=*/true);
      half.sent.emplace(device_.type());
      half.sent->record(stream);
    }
  }

 private:
  static constexpr std::int64_t kBytes = std::int64_t{64} << 20;
  struct Half {
    at::Tensor bytes;
    std::optional<c10::Event> sent;
  };
  at::Device device_;
  std::array<Half, 2> halves_;
  std::size_t next_ = 0;
};

/// GPUs that libtorch can use.
std::int64_t libtorch_gpus() {
  if (!at::hasCUDA()) return 0;
  return c10::impl::VirtualGuardImpl(at::kCUDA).deviceCount();
}

}  // namespace

const Compute& compute() {
  return current;
}

void set_compute(const Compute& compute) {
  current = compute;
}

Compute parse_device(const std::string& text, int own_gpu) {
  if (text == "cpu") return {};
  if (text == "cpu:tensors") return {Engine::tensors, at::Device(at::kCPU)};
  const std::int64_t gpus = libtorch_gpus();
  if (text == "auto") {
    if (own_gpu < 0 || own_gpu >= gpus) return {};
    return {Engine::tensors, at::Device(at::kCUDA, static_cast<at::DeviceIndex>(own_gpu))};
  }
  if (text.rfind("cuda", 0) != 0)
    throw UsageError(fmt::format("--device {}: not a device", text),
                     "use cpu, cuda (this rank's GPU), cuda:N, auto, or cpu:tensors (the code of GPUs on the CPU)");
  int index = own_gpu;
  if (text != "cuda") {
    const char* end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data() + std::min<std::size_t>(5, text.size()), end, index);
    if (text.size() < 6 || text[4] != ':' || error != std::errc() || stop != end || index < 0)
      throw UsageError(fmt::format("--device {}: not a device", text), "write cuda:0 for the first GPU");
  }
  if (!at::hasCUDA()) throw NotCompiled("CUDA in libtorch", "Torch_DIR=<cmake folder of a libtorch with CUDA>");
  if (index < 0 || index >= gpus)
    throw UsageError(
        fmt::format("--device {}: libtorch sees {} GPU(s) here", text, gpus),
        "nvidia-smi lists them; CUDA_VISIBLE_DEVICES hides some; a driver older than the toolkit hides all");
  return {Engine::tensors, at::Device(at::kCUDA, static_cast<at::DeviceIndex>(index))};
}

std::string device_text(const Compute& compute) {
  if (!compute.on_host()) return compute.device.str();
  return compute.engine == Engine::native ? "cpu" : "cpu:tensors";
}

at::Tensor to_device(const at::Tensor& host, at::ScalarType dtype) {
  const at::Device device = current.device;
  if (device.is_cpu()) return host.to(dtype, /*non_blocking=*/false, /*copy=*/true).contiguous();
  if (!host.is_cpu()) return host.to(device, dtype, /*non_blocking=*/false, /*copy=*/true);
  const at::Tensor dense = host.contiguous();
  at::Tensor target = at::empty(host.sizes(), host.options().device(device));
  if (dense.dim() == 0 || dense.numel() == 0) {
    target.copy_(dense);
  } else {
    static std::mutex mutex;
    static std::unique_ptr<Staging> staging;
    const std::lock_guard lock(mutex);
    if (staging == nullptr || staging->device() != device) staging = std::make_unique<Staging>(device);
    staging->copy(dense.view({dense.size(0), -1}), target.view({dense.size(0), -1}));
  }
  return target.to(dtype);
}

at::Tensor to_host(const at::Tensor& tensor) {
  return tensor.is_cpu() ? tensor : tensor.cpu();
}

}  // namespace headfold::model
