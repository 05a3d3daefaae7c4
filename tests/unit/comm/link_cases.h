#pragma once
// What a DeviceLink must do, wherever its tensors lie. Collective over world().

#include <gtest/gtest.h>
#include <headfold/comm/device_link.h>

#include <numeric>

#include "world.h"

namespace headfold::comm::link_cases {

using testing_support::world;

inline at::TensorOptions options_of(const DeviceLink& link, at::ScalarType dtype = at::kFloat) {
  const auto options = at::TensorOptions().dtype(dtype);
  return link.device() < 0 ? options
                           : options.device(at::Device(at::kCUDA, static_cast<at::DeviceIndex>(link.device())));
}
inline at::Tensor ramp(const DeviceLink& link, std::int64_t n, at::ScalarType dtype) {
  return at::arange(n, at::kDouble).remainder(97).add_(world().rank()).to(options_of(link, dtype));
}
/// The sum over ranks of ramp(), on the CPU.
inline at::Tensor ramp_sum(std::int64_t n, at::ScalarType dtype) {
  const double ranks = world().size();
  return at::arange(n, at::kDouble).remainder(97).mul_(ranks).add_(ranks * (ranks - 1) / 2).to(dtype);
}
inline bool holds(const at::Tensor& values, const at::Tensor& expected) {
  return at::equal(values.to(at::kCPU), expected);
}

inline void check_sums(const DeviceLink& link) {
  std::vector<at::Tensor> tensors;
  std::vector<Request> requests;
  for (const std::int64_t n : {1, 0, 70001, 333})
    for (const auto dtype : {at::kFloat, at::kDouble}) tensors.push_back(ramp(link, n, dtype));
  tensors.push_back(ramp(link, 60, at::kFloat).view({3, 4, 5}));
  for (const at::Tensor& values : tensors) requests.push_back(link.all_reduce(values));
  for (Request& request : requests) request.test();
  for (Request& request : requests) request.wait();
  for (const at::Tensor& values : tensors)
    EXPECT_TRUE(holds(values.reshape({-1}), ramp_sum(values.numel(), values.scalar_type())));
}

inline void check_parts(const DeviceLink& link) {
  const int ranks = world().size();
  for (const bool equal : {true, false}) {
    std::vector<std::int64_t> counts(static_cast<std::size_t>(ranks), 11);
    for (std::size_t r = 0; !equal && r < counts.size(); ++r) counts[r] = r == 1 ? 0 : 5 + 3 * static_cast<int>(r);
    const std::int64_t n = std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
    const std::int64_t begin = std::accumulate(counts.begin(), counts.begin() + world().rank(), std::int64_t{0});
    const std::int64_t count = counts[static_cast<std::size_t>(world().rank())];
    const at::Tensor values = ramp(link, n, at::kFloat), own = at::full({count}, -1.0F, options_of(link));
    link.reduce_scatter(values, own, counts).wait();
    EXPECT_TRUE(holds(own, ramp_sum(n, at::kFloat).narrow(0, begin, count)));
    const at::Tensor all = at::full({n}, -1.0F, options_of(link));
    all.narrow(0, begin, count).copy_(own);
    link.all_gather(all, counts).wait();
    EXPECT_TRUE(holds(all, ramp_sum(n, at::kFloat)));
  }
}

inline void check_broadcast(const DeviceLink& link) {
  for (int root = 0; root < world().size(); ++root)
    for (const auto dtype : {at::kBFloat16, at::kLong, at::kDouble}) {
      const at::Tensor values = at::full({3, 5}, world().rank() + 1).to(options_of(link, dtype));
      link.broadcast(values, root);
      EXPECT_TRUE(holds(values, at::full({3, 5}, root + 1).to(dtype)));
    }
}

inline void check_exchange(const DeviceLink& link) {
  const int ranks = world().size(), rank = world().rank();
  const int next = (rank + 1) % ranks, previous = (rank + ranks - 1) % ranks;
  using enum Transfer::Kind;
  std::vector<Transfer> transfers;
  const at::Tensor out = at::full({4097}, rank).to(options_of(link, at::kBFloat16));
  const at::Tensor back = at::full({7}, 100.0 + rank).to(options_of(link));
  const at::Tensor from_previous = at::zeros({4097}, options_of(link, at::kBFloat16));
  const at::Tensor from_next = at::zeros({7}, options_of(link));
  // With two ranks both neighbours are the same one: tensors are matched in order.
  if (ranks > 1)
    transfers = {
        {send, out, next}, {send, back, previous}, {receive, from_previous, previous}, {receive, from_next, next}};
  link.exchange(transfers, 5).wait();
  if (ranks == 1) return;
  EXPECT_TRUE(holds(from_previous, at::full({4097}, previous).to(at::kBFloat16)));
  EXPECT_TRUE(holds(from_next, at::full({7}, 100.0 + next)));
}

}  // namespace headfold::comm::link_cases
