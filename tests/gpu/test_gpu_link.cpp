// Links between ranks whose tensors are on GPUs. With one GPU: NCCL at one rank, MPI at two ranks that share it; with a
// GPU for each rank, NCCL between them. What needs no GPU stands in tests/unit/comm.

#include <gmock/gmock.h>
#include <headfold/base/error.h>

#include "gpu.h"
#include "link_cases.h"

namespace headfold::comm {
namespace {

using testing_support::world;

class GpuLink : public testing_support::GpuTensorTest {
 protected:
  void SetUp() override {
    GpuTensorTest::SetUp();
    if (IsSkipped()) return;
    const auto gpus = static_cast<int>(device::visible_gpus().size());
    device_ = world().rank() % gpus;
    shared_ = world().size() > gpus;
    device::use_gpu(device_);
  }
  /// The transports that work here.
  std::vector<Transport> transports() const {
    if (shared_ || !nccl_compiled()) return {Transport::mpi};
    return {Transport::nccl, Transport::mpi};
  }
  int device_ = 0;
  bool shared_ = false;
};

TEST_F(GpuLink, nccl_is_taken_where_every_rank_has_a_gpu) {
  const DeviceLink link(world(), device_);
  EXPECT_EQ(link.transport(), transports().front());
  if (shared_ && nccl_compiled()) {
    EXPECT_THROW(DeviceLink(world(), device_, Transport::nccl), UsageError);
  }
}

TEST_F(GpuLink, every_operation_by_every_transport) {
  for (const Transport transport : transports()) {
    SCOPED_TRACE(name_of(transport));
    const DeviceLink link(world(), device_, transport);
    link_cases::check_sums(link);
    link_cases::check_parts(link);
    link_cases::check_broadcast(link);
    link_cases::check_exchange(link);
  }
}

TEST_F(GpuLink, transfers_wait_for_what_computes_their_tensors) {
  for (const Transport transport : transports()) {
    SCOPED_TRACE(name_of(transport));
    const DeviceLink link(world(), device_, transport);
    const auto options = link_cases::options_of(link);
    // Long products in the default stream, and at their end the values that are summed.
    at::Tensor long_work = at::eye(4096, options);
    const at::Tensor factor = at::eye(4096, options);
    for (int i = 0; i < 20; ++i) long_work = at::matmul(long_work, factor);
    const at::Tensor values = long_work.mul(world().rank() + 1.0);
    Request sum = link.all_reduce(values);
    // Meanwhile other work, and then work that needs the sum.
    const at::Tensor meanwhile = at::matmul(factor, factor);
    sum.wait();
    const double ranks = world().size();
    EXPECT_TRUE(at::equal(values + 0, at::eye(4096, options) * (ranks * (ranks + 1) / 2)));
    EXPECT_TRUE(at::equal(meanwhile, factor));
  }
}

TEST_F(GpuLink, tensors_elsewhere_are_refused) {
  const DeviceLink link(world(), device_);
  EXPECT_THROW((void)link.all_reduce(at::zeros({4})), InternalError);
}

TEST_F(GpuLink, a_rank_that_never_comes_ends_the_wait) {
  if (transports().front() != Transport::nccl || world().size() == 1)
    GTEST_SKIP() << "needs a GPU for each of two ranks";
  struct Limit {
    Limit() { set_timeout_seconds(5); }
    ~Limit() { set_timeout_seconds(before); }
    double before = timeout_seconds();
  } const limit;
  const DeviceLink link(world(), device_, Transport::nccl);
  const at::Tensor values = at::ones({1000}, link_cases::options_of(link));
  link.all_reduce(values).wait();
  if (world().rank() != 0) return;
  // Each of: NCCL does not take it, it is never complete, the other rank's end is noticed.
  EXPECT_THROW(link.all_reduce(values).wait(), MpiFailure);
  EXPECT_THROW(link.all_reduce(values).wait(), MpiFailure);  // the link stays unusable
}

}  // namespace
}  // namespace headfold::comm
