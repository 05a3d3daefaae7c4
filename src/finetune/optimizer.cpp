#include <ATen/Parallel.h>
#include <headfold/base/error.h>
#include <headfold/base/hash.h>
#include <headfold/checkpoint/safetensors.h>
#include <headfold/finetune/optimizer.h>
#include <headfold/model/compute.h>

#include <cmath>
#include <numbers>
#include <numeric>

namespace headfold::finetune {
namespace {

std::span<float> all_of(const at::Tensor& tensor) {
  return {tensor.data_ptr<float>(), static_cast<std::size_t>(tensor.numel())};
}

}  // namespace

double Schedule::rate(std::int64_t step) const {
  if (step <= warm_up) return peak * static_cast<double>(step) / static_cast<double>(warm_up);
  if (decay == Decay::constant || steps <= warm_up) return peak;
  const double done = static_cast<double>(step - warm_up) / static_cast<double>(steps - warm_up);
  const double share = decay == Decay::linear ? 1 - done : 0.5 * (1 + std::cos(std::numbers::pi * done));
  return peak * (final_share + (1 - final_share) * share);
}

Schedule::Decay parse_decay(const std::string& name) {
  if (name == "cosine") return Schedule::Decay::cosine;
  if (name == "linear") return Schedule::Decay::linear;
  if (name == "constant") return Schedule::Decay::constant;
  throw UsageError(fmt::format("--schedule {}: choose cosine, linear or constant", name));
}
const char* name_of(Schedule::Decay decay) {
  return decay == Schedule::Decay::cosine ? "cosine" : decay == Schedule::Decay::linear ? "linear" : "constant";
}

std::int64_t bytes_under_way() {
  // MPI libraries copy what is under way: with all weights trained that would be a second buffer of gradients.
  return std::int64_t{256} << 20;
}

Optimizer::Optimizer(const comm::Communicator& world, std::vector<Parameter>& parameters, const AdamOptions& options,
                     bool shard, std::int64_t bucket_bytes)
    // A communicator of its own: sums under way must not meet the other collectives of the job.
    : world_(world.split(0, world.rank())),
      parameters_(&parameters),
      options_(options),
      shard_(shard && world.size() > 1) {
  std::int64_t total = 0;
  std::int64_t layer = std::numeric_limits<std::int64_t>::min();
  for (const Parameter& parameter : parameters) {
    if (parameter.value.scalar_type() != at::kFloat || parameter.layer < layer ||
        parameter.value.device() != parameters.front().value.device())
      throw InternalError(
          fmt::format("parameter {} is no float32 tensor, on another device or out of order", parameter.name));
    layer = parameter.layer;
    begins_.push_back(total);
    total += parameter.value.numel();
  }
  if (total == 0) throw InternalError("there is nothing to train");
  begins_.push_back(total);
  const at::TensorOptions floats = parameters.front().value.options();
  const at::Device device = floats.device();
  link_ = std::make_unique<comm::DeviceLink>(world_, device.is_cpu() ? -1 : device.index());
  in_tensors_ = model::compute().engine == model::Engine::tensors && device == model::compute().device;
  values_ = at::empty({total}, floats);
  gradients_ = at::zeros({total}, floats);
  for (std::size_t p = 0; p < parameters.size(); ++p) {
    Parameter& parameter = parameters[p];
    const auto shape = parameter.value.sizes().vec();
    at::Tensor value = values_.slice(0, begins_[p], begins_[p + 1]).view(shape);
    value.copy_(parameter.value);
    parameter.value = value;
    parameter.gradient = gradients_.slice(0, begins_[p], begins_[p + 1]).view(shape);
  }
  // Buckets from the last layer down; the layers of one are complete when its lowest is.
  for (std::size_t p = parameters.size(); p-- > 0;) {
    const bool same_layer = !buckets_.empty() && buckets_.back().lowest_layer == parameters[p].layer;
    if (buckets_.empty() || (!same_layer && (buckets_.back().end - buckets_.back().begin) * 4 >= bucket_bytes)) {
      Bucket bucket;
      bucket.end = begins_[p + 1];
      buckets_.push_back(bucket);
    }
    buckets_.back().begin = begins_[p];
    buckets_.back().lowest_layer = parameters[p].layer;
  }
  // Large ones in pieces, so that what is under way at a time can be bounded.
  const std::int64_t piece = std::max<std::int64_t>(1, 16 * bucket_bytes / 4);
  std::vector<Bucket> pieces;
  for (const Bucket& bucket : buckets_) {
    for (std::int64_t end = bucket.end; end > bucket.begin; end -= piece) {
      pieces.push_back(bucket);
      pieces.back().begin = std::max(bucket.begin, end - piece);
      pieces.back().end = end;
    }
  }
  buckets_ = std::move(pieces);
  const auto ranks = static_cast<std::int64_t>(world_.size());
  for (Bucket& bucket : buckets_) {
    const std::int64_t size = bucket.end - bucket.begin;
    if (!shard_) {
      bucket.own_begin = bucket.begin;
      bucket.own_offset = bucket.begin;
      bucket.own_count = size;
      continue;
    }
    bucket.own_begin = bucket.begin;
    for (std::int64_t r = 0; r < ranks; ++r) {
      bucket.counts.push_back(size / ranks + (r < size % ranks ? 1 : 0));
      if (r < world_.rank()) bucket.own_begin += bucket.counts.back();
    }
    bucket.own_count = bucket.counts[static_cast<std::size_t>(world_.rank())];
    bucket.own_offset = own_elements_;
    own_elements_ += bucket.own_count;
  }
  if (!shard_) own_elements_ = total;
  own_gradients_ = shard_ ? at::zeros({own_elements_}, floats) : gradients_;
  first_ = at::zeros({own_elements_}, floats);
  second_ = at::zeros({own_elements_}, floats);
  for (const Bucket& bucket : buckets_) {
    for (std::size_t p = 0; p < parameters.size(); ++p) {
      const std::int64_t begin = std::max(bucket.own_begin, begins_[p]);
      const std::int64_t end = std::min(bucket.own_begin + bucket.own_count, begins_[p + 1]);
      if (begin < end)
        segments_.push_back({begin, bucket.own_offset + begin - bucket.own_begin, end - begin, parameters[p].decays});
    }
  }
}

void Optimizer::zero_gradients() {
  gradients_.zero_();
  started_ = 0;
}

void Optimizer::start(Bucket& bucket) {
  const std::int64_t size = bucket.end - bucket.begin;
  request_bytes_.push_back(size * 4);
  const auto waiting = request_bytes_.begin() + static_cast<std::ptrdiff_t>(waited_);
  std::int64_t under_way = std::accumulate(waiting, request_bytes_.end(), std::int64_t{0});
  for (; under_way > bytes_under_way() && waited_ < requests_.size(); ++waited_) {
    requests_[waited_].wait();
    under_way -= request_bytes_[waited_];
  }
  const at::Tensor gradients = gradients_.slice(0, bucket.begin, bucket.end);
  if (shard_) {
    const at::Tensor own = own_gradients_.slice(0, bucket.own_offset, bucket.own_offset + bucket.own_count);
    requests_.push_back(link_->reduce_scatter(gradients, own, bucket.counts));
  } else {
    requests_.push_back(link_->all_reduce(gradients));
  }
}

void Optimizer::layer_done(std::int64_t layer) {
  for (std::size_t i = waited_; i < requests_.size(); ++i) requests_[i].test();
  for (; started_ < buckets_.size() && buckets_[started_].lowest_layer >= layer; ++started_) start(buckets_[started_]);
}

void Optimizer::finish_gradients() {
  for (; started_ < buckets_.size(); ++started_) start(buckets_[started_]);
  for (; waited_ < requests_.size(); ++waited_) requests_[waited_].wait();
  requests_.clear();
  request_bytes_.clear();
  waited_ = 0;
}

double Optimizer::gradient_norm() const {
  if (in_tensors_) {
    double sum = 0;
    for (const at::Tensor& piece : own_gradients_.split(std::int64_t{1} << 24))
      sum += piece.to(at::kDouble).square().sum().item<double>();
    if (shard_) return std::sqrt(world_.all_reduce(sum));
    world_.broadcast(std::as_writable_bytes(std::span(&sum, 1)));  // GPUs of several kinds may add in other orders
    return std::sqrt(sum);
  }
  // Blocks of a fixed size, added in order: the norm does not depend on the number of threads.
  constexpr std::int64_t kBlock = 1 << 14;
  const float* gradient = own_gradients_.data_ptr<float>();
  std::vector<double> sums(static_cast<std::size_t>((own_elements_ + kBlock - 1) / kBlock));
  at::parallel_for(0, static_cast<std::int64_t>(sums.size()), 4, [&](std::int64_t from, std::int64_t to) {
    for (std::int64_t b = from; b < to; ++b) {
      double sum = 0;
      for (std::int64_t i = b * kBlock; i < std::min(own_elements_, (b + 1) * kBlock); ++i)
        sum += static_cast<double>(gradient[i]) * static_cast<double>(gradient[i]);
      sums[static_cast<std::size_t>(b)] = sum;
    }
  });
  const double sum = std::accumulate(sums.begin(), sums.end(), 0.0);
  return std::sqrt(shard_ ? world_.all_reduce(sum) : sum);
}

void Optimizer::step(double rate, double gradient_scale) {
  ++steps_;
  for (const Segment& segment : segments_) {
    if (in_tensors_)
      step_in_tensors(segment, rate, gradient_scale);
    else
      step_on_host(segment, rate, gradient_scale);
  }
  if (shard_) gather(values_);
}

void Optimizer::step_on_host(const Segment& segment, double rate, double gradient_scale) {
  const auto n = static_cast<double>(steps_);
  const auto beta1 = static_cast<float>(options_.beta1), beta2 = static_cast<float>(options_.beta2);
  const auto step_size = static_cast<float>(rate / (1 - std::pow(options_.beta1, n)));
  const auto root_correction = static_cast<float>(1 / std::sqrt(1 - std::pow(options_.beta2, n)));
  const auto epsilon = static_cast<float>(options_.epsilon);
  const auto scale = static_cast<float>(gradient_scale);
  float* value = values_.data_ptr<float>() + segment.begin;
  const float* gradient = own_gradients_.data_ptr<float>() + segment.offset;
  float* first = first_.data_ptr<float>() + segment.offset;
  float* second = second_.data_ptr<float>() + segment.offset;
  const float kept = segment.decays ? static_cast<float>(1 - rate * options_.weight_decay) : 1.0F;
  at::parallel_for(0, segment.count, 1 << 14, [&](std::int64_t from, std::int64_t to) {
    for (std::int64_t i = from; i < to; ++i) {
      const float g = gradient[i] * scale;
      first[i] = beta1 * first[i] + (1 - beta1) * g;
      second[i] = beta2 * second[i] + (1 - beta2) * g * g;
      value[i] = kept * value[i] - step_size * first[i] / (std::sqrt(second[i]) * root_correction + epsilon);
    }
  });
}

void Optimizer::step_in_tensors(const Segment& segment, double rate, double gradient_scale) {
  const auto n = static_cast<double>(steps_);
  const auto own = [&](const at::Tensor& all) { return all.slice(0, segment.offset, segment.offset + segment.count); };
  at::Tensor value = values_.slice(0, segment.begin, segment.begin + segment.count);
  at::Tensor first = own(first_), second = own(second_);
  const at::Tensor gradient = own(own_gradients_) * gradient_scale;
  first.mul_(options_.beta1).add_(gradient, 1 - options_.beta1);
  second.mul_(options_.beta2).addcmul_(gradient, gradient, 1 - options_.beta2);
  const at::Tensor root = second.sqrt().div_(std::sqrt(1 - std::pow(options_.beta2, n))).add_(options_.epsilon);
  if (segment.decays) value.mul_(1 - rate * options_.weight_decay);
  value.addcdiv_(first, root, -rate / (1 - std::pow(options_.beta1, n)));
}

void Optimizer::gather(const at::Tensor& flat) const {
  std::vector<comm::Request> requests;
  for (const Bucket& bucket : buckets_)
    requests.push_back(link_->all_gather(flat.slice(0, bucket.begin, bucket.end), bucket.counts));
  for (comm::Request& request : requests) request.wait();
}

at::Tensor Optimizer::gathered(const at::Tensor& own) const {
  if (!shard_) return own;
  at::Tensor flat = at::empty_like(values_);
  for (const Bucket& bucket : buckets_)
    flat.slice(0, bucket.own_begin, bucket.own_begin + bucket.own_count)
        .copy_(own.slice(0, bucket.own_offset, bucket.own_offset + bucket.own_count));
  gather(flat);
  return flat;
}

std::string Optimizer::fingerprint() const {
  Sha256 hash;
  hash.update(std::as_bytes(all_of(model::to_host(values_))));
  return hash.hex();
}

std::map<std::string, at::Tensor> Optimizer::by_name(const at::Tensor& flat) const {
  const at::Tensor host = model::to_host(flat);
  std::map<std::string, at::Tensor> tensors;
  for (std::size_t p = 0; p < parameters_->size(); ++p)
    tensors[(*parameters_)[p].name] = host.slice(0, begins_[p], begins_[p + 1]).view((*parameters_)[p].value.sizes());
  return tensors;
}

std::map<std::string, at::Tensor> Optimizer::values() const {
  return by_name(values_);
}

std::map<std::string, at::Tensor> Optimizer::first_moments() const {
  return by_name(gathered(first_));
}
std::map<std::string, at::Tensor> Optimizer::second_moments() const {
  return by_name(gathered(second_));
}

void Optimizer::copy_in(const TensorSource& tensors, const at::Tensor& flat, const std::string& source) const {
  const at::Tensor host = flat.is_cpu() ? flat : at::empty(flat.sizes(), at::kFloat);
  world_.on_root([&] {
    for (std::size_t p = 0; p < parameters_->size(); ++p) {
      const Parameter& parameter = (*parameters_)[p];
      const at::Tensor found = tensors(parameter.name);
      if (!found.defined())
        throw InputError(fmt::format("{}: tensor {} is missing", source, parameter.name),
                         "does it belong to this model and these options?");
      if (found.sizes() != parameter.value.sizes())
        throw InputError(fmt::format("{}: tensor {} has shape {}, expected {}", source, parameter.name,
                                     checkpoint::shape_text(found.sizes().vec()),
                                     checkpoint::shape_text(parameter.value.sizes().vec())),
                         "does it belong to this model and these options?");
      host.slice(0, begins_[p], begins_[p + 1]).copy_(found.reshape({-1}));
    }
  });
  world_.broadcast(std::as_writable_bytes(all_of(host)));
  if (!flat.is_cpu()) flat.copy_(host);
}

void Optimizer::copy_in_moments(const TensorSource& tensors, const at::Tensor& own, const std::string& source) const {
  if (!shard_) return copy_in(tensors, own, source);
  const at::Tensor flat = at::empty_like(values_);
  copy_in(tensors, flat, source);
  for (const Bucket& bucket : buckets_)
    own.slice(0, bucket.own_offset, bucket.own_offset + bucket.own_count)
        .copy_(flat.slice(0, bucket.own_begin, bucket.own_begin + bucket.own_count));
}

void Optimizer::restore_values(const TensorSource& values, const std::string& source) {
  copy_in(values, values_, source);
}

void Optimizer::restore(const TensorSource& values, const TensorSource& first, const TensorSource& second,
                        std::int64_t steps, const std::string& source) {
  copy_in(values, values_, source);
  copy_in_moments(first, first_, source);
  copy_in_moments(second, second_, source);
  steps_ = steps;
  world_.broadcast(std::as_writable_bytes(std::span(&steps_, 1)));
}

}  // namespace headfold::finetune
