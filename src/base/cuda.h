#pragma once
// What our own CUDA code shares: a checked status, and owners of what the runtime hands out. Host code, for .cpp files
// of libraries that link headfold_cuda; empty without CUDA.

#ifdef HEADFOLD_WITH_CUDA
#include <cuda_runtime_api.h>
#include <headfold/base/error.h>

#include <cstddef>
#include <string_view>
#include <utility>

namespace headfold::cuda {

/// DeviceFailure that names the call and what the runtime says.
inline void check(cudaError_t status, std::string_view what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // an error that is not sticky would be reported again by the next call
  throw DeviceFailure(fmt::format("CUDA {}: {} ({})", what, cudaGetErrorString(status), cudaGetErrorName(status)));
}

/// GPUs of this process; 0 when there is none or no driver.
inline int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

/// Calls of this thread are for `device` in the object's scope (nothing changes for -1).
class UseDevice {
 public:
  explicit UseDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device < 0 || device == before_) return;
    check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = true;
  }
  ~UseDevice() { end(); }
  /// Ends it before the scope does.
  void end() {
    if (std::exchange(changed_, false)) cudaSetDevice(before_);
  }
  UseDevice(const UseDevice&) = delete;
  UseDevice& operator=(const UseDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

/// Memory that grows: reserve() keeps what is large enough. Content is not kept when it grows.
template <class Allocator>
class Memory {
 public:
  Memory() = default;
  explicit Memory(std::size_t bytes) { reserve(bytes); }
  ~Memory() {
    if (data_ != nullptr) Allocator::release(data_);
  }
  Memory(Memory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Memory& operator=(Memory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  void reserve(std::size_t bytes) {
    if (bytes <= bytes_) return;
    if (data_ != nullptr) Allocator::release(std::exchange(data_, nullptr));
    bytes_ = 0;
    Allocator::allocate(&data_, bytes);
    bytes_ = bytes;
  }
  std::size_t size() const { return bytes_; }
  template <class T = void>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

struct OnDevice {
  static void allocate(void** data, std::size_t bytes) { check(cudaMalloc(data, bytes), "cudaMalloc"); }
  static void release(void* data) { cudaFree(data); }
};
struct OnHost {
  static void allocate(void** data, std::size_t bytes) {
    check(cudaHostAlloc(data, bytes, cudaHostAllocDefault), "cudaHostAlloc");
  }
  static void release(void* data) { cudaFreeHost(data); }
};
/// Memory of the current device.
using DeviceMemory = Memory<OnDevice>;
/// Page-locked memory of the host: copies to and from a GPU run at the bus's speed and beside other work.
using PinnedMemory = Memory<OnHost>;

/// A stream that does not wait for the legacy default stream by itself.
class Stream {
 public:
  /// Of GPU `device`; -1: the current one.
  explicit Stream(int device = -1) {
    const UseDevice use(device);
    check(cudaStreamCreateWithFlags(&value_, cudaStreamNonBlocking), "cudaStreamCreate");
  }
  ~Stream() { cudaStreamDestroy(value_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return value_; }

 private:
  cudaStream_t value_ = nullptr;
};

/// A point in a stream's work, without time.
class Event {
 public:
  Event() { check(cudaEventCreateWithFlags(&value_, cudaEventDisableTiming), "cudaEventCreate"); }
  ~Event() { cudaEventDestroy(value_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(cudaStream_t stream) { check(cudaEventRecord(value_, stream), "cudaEventRecord"); }
  /// Whether all work before it is done. DeviceFailure when that work failed.
  bool done() const {
    const cudaError_t status = cudaEventQuery(value_);
    if (status == cudaErrorNotReady) {
      cudaGetLastError();
      return false;
    }
    check(status, "cudaEventQuery");
    return true;
  }
  cudaEvent_t get() const { return value_; }

 private:
  cudaEvent_t value_ = nullptr;
};

/// What `stream` gets from here on waits for what `before` has got so far.
inline void order(cudaStream_t before, cudaStream_t stream) {
  Event event;  // may go while it is being waited for: the runtime frees it when that is over
  event.record(before);
  check(cudaStreamWaitEvent(stream, event.get(), 0), "cudaStreamWaitEvent");
}

}  // namespace headfold::cuda
#endif
