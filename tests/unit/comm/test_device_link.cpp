#include <gmock/gmock.h>
#include <headfold/base/error.h>
#include <headfold/comm/device_link.h>

#include "link_cases.h"
#include "world.h"

namespace headfold::comm {
namespace {

using testing_support::world;

/// Tensors in host memory.
DeviceLink host_link() {
  return DeviceLink(world(), -1);
}

TEST(DeviceLinkTest, host_memory_travels_by_mpi) {
  const DeviceLink link = host_link();
  EXPECT_EQ(link.transport(), Transport::mpi);
  EXPECT_EQ(link.device(), -1);
  EXPECT_EQ(link.group().size(), world().size());
}

TEST(DeviceLinkTest, sums_of_both_dtypes_under_way_at_once) {
  link_cases::check_sums(host_link());
}
TEST(DeviceLinkTest, parts_of_any_size_are_scattered_and_gathered) {
  link_cases::check_parts(host_link());
}
TEST(DeviceLinkTest, broadcasts_any_dtype_from_any_rank) {
  link_cases::check_broadcast(host_link());
}
TEST(DeviceLinkTest, tensors_go_both_ways_round_a_ring) {
  link_cases::check_exchange(host_link());
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
