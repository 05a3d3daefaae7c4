#pragma once
// Gradients of all parameters in one buffer, summed over ranks while the backward pass still runs, and AdamW on them.

#include <ATen/ATen.h>
#include <headfold/comm/communicator.h>
#include <headfold/comm/device_link.h>
#include <headfold/finetune/trainable.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace headfold::finetune {

/// Learning rate by step.
struct Schedule {
  enum class Decay { cosine, linear, constant };
  Decay decay = Decay::cosine;
  double peak = 2e-4;
  std::int64_t warm_up = 0;  ///< steps of a linear rise to `peak`
  std::int64_t steps = 1;    ///< of the whole run
  double final_share = 0.1;  ///< of `peak`, at the last step; constant: without meaning
  /// Rate of step `step`, 1 .. steps.
  double rate(std::int64_t step) const;
};
Schedule::Decay parse_decay(const std::string& name);  ///< cosine, linear, constant; UsageError otherwise
const char* name_of(Schedule::Decay decay);

/// Loshchilov, Hutter: Decoupled weight decay regularization (arXiv 1711.05101), algorithm 2, with the decay scaled by
/// the learning rate.
struct AdamOptions {
  double beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8;
  double weight_decay = 0;  ///< of parameters that decay (Parameter::decays)
};

/// Gives a tensor by its name, undefined when there is none; called once per name, in the parameters' order. The tensor
/// is not used after the next call, so that a source may let its memory go.
using TensorSource = std::function<at::Tensor(const std::string& name)>;

/// Bytes of gradients whose sums over ranks may be under way at a time.
std::int64_t bytes_under_way();

/// Takes the parameters' values and gradients into two flat float32 buffers, of which Parameter::value and ::gradient
/// become views, on the parameters' device: on a GPU sums over ranks go by NCCL (comm::DeviceLink) and AdamW runs in
/// libtorch's operations, whose rounding differs from the host's. Buckets of whole layers, at least `bucket_bytes`
/// each, are summed over ranks as soon as a backward pass has finished them. With `shard` a rank receives the sum of
/// its slice of every bucket only, holds the moments of its slices only, and gathers the other ranks' new values.
class Optimizer {
 public:
  /// Collective. Buckets of more than 16 `bucket_bytes` are cut. `parameters` must outlive it. InternalError unless all
  /// are float32, on one device and in order of layer.
  Optimizer(const comm::Communicator& world, std::vector<Parameter>& parameters, const AdamOptions& options, bool shard,
            std::int64_t bucket_bytes = std::int64_t{4} << 20);
  Optimizer(const Optimizer&) = delete;
  Optimizer& operator=(const Optimizer&) = delete;

  void zero_gradients();
  /// This rank's gradients of layer `layer` are complete; to be called from the last layer down.
  void layer_done(std::int64_t layer);
  /// Starts what layer_done() did not, on ranks without work, and waits for all sums.
  void finish_gradients();
  /// Norm of the summed gradient of all parameters; the same on every rank. Collective with `shard`.
  double gradient_norm() const;
  /// One step of AdamW with gradients times `gradient_scale`. Collective with `shard`.
  void step(double rate, double gradient_scale);

  /// Elements of all parameters, and of this rank's moments.
  std::int64_t elements() const { return values_.numel(); }
  std::int64_t own_elements() const { return own_elements_; }
  std::int64_t steps() const { return steps_; }
  std::size_t buckets() const { return buckets_.size(); }
  /// SHA-256 of all values: ranks that trained alike have the same.
  std::string fingerprint() const;

  /// What a checkpoint needs, by name of the parameter, on the host; moments are whole (collective with `shard`, which
  /// gathers them into memory of their own; otherwise all are views of what lies on the host).
  std::map<std::string, at::Tensor> values() const;
  std::map<std::string, at::Tensor> first_moments() const;
  std::map<std::string, at::Tensor> second_moments() const;
  /// Collective: what rank 0's sources give is taken by all, and rank 0's `steps`. InputError naming `source` and the
  /// tensor when one is missing or has another shape.
  void restore(const TensorSource& values, const TensorSource& first, const TensorSource& second, std::int64_t steps,
               const std::string& source);
  /// The same for values alone; moments stay.
  void restore_values(const TensorSource& values, const std::string& source);

 private:
  struct Bucket {
    std::int64_t lowest_layer = 0;
    std::int64_t begin = 0, end = 0;            // in the flat buffers
    std::vector<std::int64_t> counts;           // by rank, with shard
    std::int64_t own_begin = 0, own_count = 0;  // this rank's slice: where it begins in the flat buffers
    std::int64_t own_offset = 0;                // and in the buffers of own slices
  };
  struct Segment {  // a stretch of one parameter and one slice
    std::int64_t begin = 0, offset = 0, count = 0;
    bool decays = true;
  };
  void start(Bucket& bucket);
  void step_on_host(const Segment& segment, double rate, double gradient_scale);
  void step_in_tensors(const Segment& segment, double rate, double gradient_scale);
  at::Tensor gathered(const at::Tensor& own) const;
  void gather(const at::Tensor& flat) const;
  void copy_in(const TensorSource& tensors, const at::Tensor& flat, const std::string& source) const;
  void copy_in_moments(const TensorSource& tensors, const at::Tensor& own, const std::string& source) const;
  std::map<std::string, at::Tensor> by_name(const at::Tensor& flat) const;

  comm::Communicator world_;
  std::unique_ptr<comm::DeviceLink> link_;  // of world_, on the parameters' device
  std::vector<Parameter>* parameters_;
  AdamOptions options_;
  bool shard_;
  bool in_tensors_ = false;           // norm and step run in libtorch's operations
  std::vector<std::int64_t> begins_;  // of the parameters in the flat buffers
  at::Tensor values_, gradients_;     // flat, float32
  at::Tensor own_gradients_;          // with shard: own slices one after the other; otherwise gradients_
  at::Tensor first_, second_;         // moments of own slices
  std::int64_t own_elements_ = 0;
  std::vector<Bucket> buckets_;    // from the last layer down
  std::vector<Segment> segments_;  // of own slices
  std::size_t started_ = 0;
  std::vector<comm::Request> requests_;
  std::vector<std::int64_t> request_bytes_;  // of each
  std::size_t waited_ = 0;                   // requests that are complete, the first ones
  std::int64_t steps_ = 0;
};

}  // namespace headfold::finetune
