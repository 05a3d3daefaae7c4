#include <gmock/gmock.h>
#include <headfold/base/error.h>
#include <headfold/comm/device_link.h>

#include <numeric>

#include "world.h"

namespace headfold::comm {
namespace {

using testing_support::world;

/// Tensors in host memory.
DeviceLink host_link() {
  return DeviceLink(world(), -1);
}
at::Tensor ramp(std::int64_t n, at::ScalarType dtype) {
  return at::arange(n, at::kDouble).remainder(97).add_(world().rank()).to(dtype);
}
/// The sum over ranks of ramp().
at::Tensor ramp_sum(std::int64_t n, at::ScalarType dtype) {
  const double ranks = world().size();
  return at::arange(n, at::kDouble).remainder(97).mul_(ranks).add_(ranks * (ranks - 1) / 2).to(dtype);
}

TEST(DeviceLinkTest, host_memory_travels_by_mpi) {
  const DeviceLink link = host_link();
  EXPECT_EQ(link.transport(), Transport::mpi);
  EXPECT_EQ(link.device(), -1);
  EXPECT_EQ(link.group().size(), world().size());
}

TEST(DeviceLinkTest, sums_of_both_dtypes_under_way_at_once) {
  const DeviceLink link = host_link();
  std::vector<at::Tensor> tensors;
  std::vector<Request> requests;
  for (const std::int64_t n : {1, 0, 70001, 333})
    for (const auto dtype : {at::kFloat, at::kDouble}) tensors.push_back(ramp(n, dtype));
  tensors.push_back(ramp(60, at::kFloat).view({3, 4, 5}));
  for (const at::Tensor& values : tensors) requests.push_back(link.all_reduce(values));
  for (Request& request : requests) request.test();
  for (Request& request : requests) request.wait();
  for (const at::Tensor& values : tensors)
    EXPECT_TRUE(at::equal(values.reshape({-1}), ramp_sum(values.numel(), values.scalar_type())));
}

TEST(DeviceLinkTest, parts_of_any_size_are_scattered_and_gathered) {
  const DeviceLink link = host_link();
  const int ranks = world().size();
  for (const bool equal : {true, false}) {
    std::vector<std::int64_t> counts(static_cast<std::size_t>(ranks), 11);
    for (std::size_t r = 0; !equal && r < counts.size(); ++r) counts[r] = r == 1 ? 0 : 5 + 3 * static_cast<int>(r);
    const std::int64_t n = std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
    const std::int64_t begin = std::accumulate(counts.begin(), counts.begin() + world().rank(), std::int64_t{0});
    const std::int64_t count = counts[static_cast<std::size_t>(world().rank())];
    const at::Tensor values = ramp(n, at::kFloat), own = at::full({count}, -1.0F);
    link.reduce_scatter(values, own, counts).wait();
    EXPECT_TRUE(at::equal(own, ramp_sum(n, at::kFloat).narrow(0, begin, count)));
    const at::Tensor all = at::full({n}, -1.0F);
    all.narrow(0, begin, count).copy_(own);
    link.all_gather(all, counts).wait();
    EXPECT_TRUE(at::equal(all, ramp_sum(n, at::kFloat)));
  }
}

TEST(DeviceLinkTest, broadcasts_any_dtype_from_any_rank) {
  const DeviceLink link = host_link();
  for (int root = 0; root < world().size(); ++root)
    for (const auto dtype : {at::kBFloat16, at::kLong, at::kDouble}) {
      const at::Tensor values = at::full({3, 5}, world().rank() + 1).to(dtype);
      link.broadcast(values, root);
      EXPECT_TRUE(at::equal(values, at::full({3, 5}, root + 1).to(dtype)));
    }
}

TEST(DeviceLinkTest, tensors_go_both_ways_round_a_ring) {
  const DeviceLink link = host_link();
  const int ranks = world().size(), rank = world().rank();
  const int next = (rank + 1) % ranks, previous = (rank + ranks - 1) % ranks;
  using enum Transfer::Kind;
  std::vector<Transfer> transfers;
  const at::Tensor out = at::full({4097}, rank).to(at::kBFloat16), back = at::full({7}, 100.0 + rank);
  const at::Tensor from_previous = at::zeros({4097}, at::kBFloat16), from_next = at::zeros({7});
  // With two ranks both neighbours are the same one: tensors are matched in order.
  if (ranks > 1)
    transfers = {
        {send, out, next}, {send, back, previous}, {receive, from_previous, previous}, {receive, from_next, next}};
  link.exchange(transfers, 5).wait();
  if (ranks == 1) return;
  EXPECT_TRUE(at::equal(from_previous, at::full({4097}, previous).to(at::kBFloat16)));
  EXPECT_TRUE(at::equal(from_next, at::full({7}, 100.0 + next)));
}

TEST(DeviceLinkTest, what_does_not_fit_is_refused_before_it_starts) {
  const DeviceLink link = host_link();
  const auto ranks = static_cast<std::size_t>(world().size());
  const at::Tensor values = at::zeros({static_cast<std::int64_t>(2 * ranks)});
  const std::vector<std::int64_t> counts(ranks, 2), too_many(ranks, 3), too_few_ranks(ranks + 1, 2);
  EXPECT_THROW((void)link.all_reduce(values.to(at::kBFloat16)), InternalError);
  EXPECT_THROW((void)link.all_reduce(at::zeros({4, 4}).t().narrow(0, 0, 2)), InternalError);
  EXPECT_THROW((void)link.all_reduce(at::Tensor()), InternalError);
  EXPECT_THROW((void)link.all_reduce(at::empty({2}, at::TensorOptions().device(at::kMeta))), InternalError);
  EXPECT_THROW((void)link.reduce_scatter(values, at::zeros({3}), counts), InternalError);
  EXPECT_THROW((void)link.reduce_scatter(values, at::zeros({2}, at::kDouble), counts), InternalError);
  EXPECT_THROW((void)link.all_gather(values, too_many), InternalError);
  EXPECT_THROW((void)link.all_gather(values, too_few_ranks), InternalError);
  EXPECT_THROW((void)link.all_gather(values.to(at::kDouble), counts), InternalError);
  EXPECT_THROW(link.broadcast(values, world().size()), InternalError);
  EXPECT_THROW((void)link.exchange({{Transfer::Kind::send, values, world().size()}}, 0), InternalError);
  EXPECT_THROW((void)link.exchange({{Transfer::Kind::send, values, world().rank()}}, 0), InternalError);
  world().barrier("nothing is left over");
}

TEST(TransportTest, a_rank_that_cannot_use_its_gpu_is_named_on_every_rank) {
  // The last rank asks for a GPU that no machine has.
  const int last = world().size() - 1;
  try {
    const DeviceLink link(world(), world().rank() == last ? 1000 : -1, Transport::mpi);
    ADD_FAILURE() << "GPU 1000 was accepted";
  } catch (const DeviceFailure& failure) {
    EXPECT_THAT(failure.what(), testing::HasSubstr(fmt::format("rank {} on ", last)));
  }
}

TEST(TransportTest, nccl_links_ranks_that_have_a_gpu_each) {
  const LinkSeat a{"node1", "m1 0"}, b{"node1", "m1 1"}, c{"node2", "m2 0"}, none{"node3", ""};
  const auto automatic = [](const std::vector<LinkSeat>& seats, bool compiled = true) {
    return choose_transport(Transport::automatic, seats, compiled);
  };
  EXPECT_EQ(automatic({a}), Transport::nccl);
  EXPECT_EQ(automatic({a, b, c}), Transport::nccl);
  EXPECT_EQ(automatic({a, b, c}, false), Transport::mpi);
  EXPECT_EQ(automatic({a, c, a}), Transport::mpi);
  EXPECT_EQ(automatic({a, none}), Transport::mpi);
  EXPECT_EQ(choose_transport(Transport::mpi, {a, b}, true), Transport::mpi);
  EXPECT_THROW(choose_transport(Transport::nccl, {a, b}, false), NotCompiled);
  try {
    choose_transport(Transport::nccl, {a, c, a}, true);
    ADD_FAILURE() << "two ranks on one GPU were accepted";
  } catch (const UsageError& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("ranks 0 and 2 on node1 share a GPU"));
  }
  EXPECT_THROW(choose_transport(Transport::nccl, {a, none}, true), UsageError);
}

TEST(TransportTest, asking_for_nccl_without_gpus_names_what_is_missing) {
  if (nccl_compiled()) {
    EXPECT_THROW(DeviceLink(world(), -1, Transport::nccl), UsageError);
    EXPECT_THAT(nccl_version(), testing::StartsWith("2."));
  } else {
    EXPECT_THROW(DeviceLink(world(), -1, Transport::nccl), NotCompiled);
    EXPECT_EQ(nccl_version(), "");
  }
}

TEST(TransportTest, names) {
  for (const auto transport : {Transport::automatic, Transport::nccl, Transport::mpi})
    EXPECT_EQ(transport_of(name_of(transport)), transport);
  EXPECT_THROW(transport_of("carrier pigeon"), UsageError);
}

}  // namespace
}  // namespace headfold::comm
