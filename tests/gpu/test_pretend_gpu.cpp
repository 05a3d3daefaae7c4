// The CUDA code on a pretend GPU (pretend_cuda.h): order of calls, layouts, errors, leaks. No real GPU is involved.

#include <gmock/gmock.h>
#include <headfold/base/error.h>
#include <headfold/comm/device_link.h>
#include <headfold/linalg/cublas.h>
#include <headfold/linalg/cusolver.h>
#include <headfold/linalg/linalg.h>

#include "pretend_cuda.h"
#include "world.h"

namespace headfold {
namespace {

using comm::DeviceLink;
using comm::Request;
using comm::Transfer;
using comm::Transport;
using testing_support::world;

/// The memory behind a tensor that libtorch takes for a GPU's.
at::Tensor seen(const at::Tensor& values) {
  return at::from_blob(values.data_ptr(), values.sizes(), values.strides(), values.scalar_type());
}

class PretendLink : public testing::TestWithParam<Transport> {
 protected:
  /// A GPU each; with MPI, one that all ranks share.
  void SetUp() override {
    pretend::set_address(GetParam() == Transport::nccl ? fmt::format("0000:{:02}:00.0", world().rank()) : "shared");
    alive_ = pretend::alive();
  }
  void TearDown() override {
    EXPECT_EQ(pretend::alive(), alive_);
    EXPECT_EQ(pretend::breaches(), "");
  }
  int alive_ = 0;
};
INSTANTIATE_TEST_SUITE_P(Transports, PretendLink, testing::Values(Transport::nccl, Transport::mpi),
                         [](const auto& test) { return std::string(comm::name_of(test.param)); });

TEST_P(PretendLink, sums_wait_for_the_default_stream) {
  const int finished = pretend::finished();
  {
    const DeviceLink link(world(), 0, GetParam());
    std::vector<at::Tensor> tensors;
    std::vector<Request> requests;
    for (const auto dtype : {at::kFloat, at::kDouble, at::kFloat}) {
      tensors.push_back(pretend::on_gpu(at::full({50}, -1.0, at::TensorOptions().dtype(dtype))));
      pretend::in_default_stream([&, values = seen(tensors.back())]() mutable {
        values.copy_(at::arange(50, at::kDouble).add_(world().rank()));
      });
      requests.push_back(link.all_reduce(tensors.back()));
    }
    for (Request& request : requests) request.wait();
    const double n = world().size();
    for (const at::Tensor& values : tensors)
      EXPECT_TRUE(at::equal(seen(values).to(at::kDouble), at::arange(50, at::kDouble).mul_(n).add_(n * (n - 1) / 2)));
  }
  EXPECT_EQ(pretend::finished(), finished + (GetParam() == Transport::nccl ? 1 : 0));
}

TEST_P(PretendLink, parts_of_any_size_are_scattered_and_gathered) {
  const DeviceLink link(world(), 0, GetParam());
  for (const bool equal : {true, false}) {
    std::vector<std::int64_t> counts;
    std::int64_t total = 0, begin = 0;
    for (int r = 0; r < world().size(); ++r) {
      if (r == world().rank()) begin = total;
      counts.push_back(equal ? 6 : r == 1 ? 0 : 4 + r);
      total += counts.back();
    }
    const std::int64_t count = counts[static_cast<std::size_t>(world().rank())];
    const double n = world().size();
    const at::Tensor expected = at::arange(total, at::kFloat).mul_(n).add_(n * (n - 1) / 2);
    const at::Tensor values = pretend::on_gpu(at::arange(total, at::kFloat).add_(world().rank()));
    const at::Tensor own = pretend::on_gpu(at::full({count}, -1.0F));
    link.reduce_scatter(values, own, counts).wait();
    EXPECT_TRUE(at::equal(seen(own), expected.narrow(0, begin, count)));
    const at::Tensor all = pretend::on_gpu(at::full({total}, -1.0F));
    seen(all).narrow(0, begin, count).copy_(seen(own));
    link.all_gather(all, counts).wait();
    EXPECT_TRUE(at::equal(seen(all), expected));
  }
}

TEST_P(PretendLink, broadcast_and_exchange) {
  const DeviceLink link(world(), 0, GetParam());
  const int ranks = world().size(), rank = world().rank();
  const at::Tensor values = pretend::on_gpu(at::full({9}, rank).to(at::kBFloat16));
  link.broadcast(values, ranks - 1);
  EXPECT_TRUE(at::equal(seen(values), at::full({9}, ranks - 1).to(at::kBFloat16)));
  if (ranks == 1) return;
  const int next = (rank + 1) % ranks, previous = (rank + ranks - 1) % ranks;
  const at::Tensor out = pretend::on_gpu(at::full({33}, rank).to(at::kBFloat16));
  const at::Tensor in = pretend::on_gpu(at::zeros({33}, at::kBFloat16));
  link.exchange({{Transfer::Kind::receive, in, previous}, {Transfer::Kind::send, out, next}}, 3).wait();
  EXPECT_TRUE(at::equal(seen(in), at::full({33}, previous).to(at::kBFloat16)));
}

TEST_P(PretendLink, an_asynchronous_error_of_nccl_ends_the_link) {
  if (GetParam() != Transport::nccl) GTEST_SKIP() << "MPI has none";
  const int aborted = pretend::aborted();
  {
    const DeviceLink link(world(), 0, GetParam());
    const at::Tensor values = pretend::on_gpu(at::ones({5}));
    Request lost = link.all_reduce(values);
    pretend::fail_nccl_after(0);
    try {
      lost.wait();
      ADD_FAILURE() << "the error was not seen";
    } catch (const MpiFailure& failure) {
      EXPECT_THAT(failure.what(), testing::HasSubstr("NCCL all-reduce failed"));
      EXPECT_THAT(failure.what(), testing::HasSubstr("pretended detail"));
    }
    EXPECT_EQ(pretend::aborted(), aborted + 1);
    EXPECT_THROW((void)link.all_reduce(values), MpiFailure);  // no second life
  }
  EXPECT_EQ(pretend::aborted(), aborted + 1);
  // Before NCCL has taken the work, and while it starts.
  {
    const DeviceLink link(world(), 0, GetParam());
    pretend::fail_nccl_after(1);
    EXPECT_THROW((void)link.all_reduce(pretend::on_gpu(at::ones({5}))), MpiFailure);
  }
  pretend::fail_nccl_after(2);
  EXPECT_THROW(DeviceLink(world(), 0, GetParam()), MpiFailure);
  EXPECT_EQ(pretend::aborted(), aborted + 3);
  world().barrier("all ranks have failed alike");
}

TEST_P(PretendLink, ranks_that_share_a_gpu_travel_by_mpi) {
  const DeviceLink link(world(), 0);
  EXPECT_EQ(link.transport(), world().size() == 1 ? Transport::nccl : GetParam());
}

TEST(PretendCublas, columns_and_rows_are_where_they_belong) {
  const std::int64_t tokens = 19, n = 12;
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    at::manual_seed(1);
    const at::Tensor x = at::randn({tokens, n}).to(dtype);
    const auto part = [&](std::int64_t first, std::int64_t count) {
      const at::Tensor columns = at::from_blob(x.data_ptr(), {tokens, n}, dtype).narrow(1, first, count);
      return at::for_blob(columns.data_ptr(), columns.sizes())
          .strides(columns.strides())
          .options(at::TensorOptions().dtype(dtype).device(at::Device(at::kCUDA, 0)))
          .target_device(at::Device(at::kCUDA, 0))
          .make_tensor();
    };
    at::Tensor out = pretend::on_gpu(at::full({8, 3}, 99.0F));
    linalg::cublas_product(part(4, 8), part(2, 3), out);
    const at::Tensor wide = x.to(at::kDouble);
    const at::Tensor expected = at::matmul(wide.narrow(1, 4, 8).t(), wide.narrow(1, 2, 3));
    EXPECT_LT((seen(out).to(at::kDouble) - expected).abs().max().item<double>(), 1e-5);
    // One row, whose stride says nothing, and columns that are not next to each other.
    const std::vector<std::int64_t> one_row = {1, n}, any_stride = {1, 1};
    const at::Tensor row = at::for_blob(x.data_ptr(), one_row)
                               .strides(any_stride)
                               .options(at::TensorOptions().dtype(dtype).device(at::Device(at::kCUDA, 0)))
                               .target_device(at::Device(at::kCUDA, 0))
                               .make_tensor();
    at::Tensor square = pretend::on_gpu(at::zeros({n, n}));
    linalg::cublas_product(row, row, square);
    const at::Tensor first = wide.narrow(0, 0, 1);
    EXPECT_LT((seen(square).to(at::kDouble) - at::matmul(first.t(), first)).abs().max().item<double>(), 1e-6);
    const at::Tensor turned = pretend::on_gpu(wide.to(dtype).t().contiguous().t());
    EXPECT_THROW(linalg::cublas_product(turned, turned, square), InternalError);
    at::Tensor wrong = pretend::on_gpu(at::zeros({3, 8}));
    EXPECT_THROW(linalg::cublas_product(part(4, 8), part(2, 3), wrong), InternalError);
  }
}

TEST(PretendCusolver, matrices_are_laid_out_as_the_library_wants_them) {
  for (const auto dtype : {at::kDouble, at::kComplexDouble}) {
    at::manual_seed(2);
    const at::Tensor x = at::randn({3, 8, 8}, at::TensorOptions().dtype(dtype));
    const at::Tensor matrices = at::matmul(x, linalg::conjugate_transpose(x));
    const linalg::Eigen expected = linalg::eigh_batched(matrices);
    linalg::set_backend(linalg::Backend::cusolver);
    const std::int64_t before = linalg::gpu_threshold();
    linalg::set_gpu_threshold(1);
    const auto found = linalg::cusolver_eigh(matrices);
    ASSERT_TRUE(found.has_value());
    EXPECT_LT(
        (at::matmul(matrices, found->second) - found->second * found->first.unsqueeze(1)).abs().max().item<double>(),
        1e-12);
    const linalg::Eigen batched = linalg::eigh_batched(matrices), one = linalg::eigh(matrices[1]);
    EXPECT_LT((batched.vectors - expected.vectors).abs().max().item<double>(), 1e-10);
    EXPECT_LT((one.vectors - expected.vectors[1]).abs().max().item<double>(), 1e-10);
    for (const at::Tensor& matrix : {x[0].slice(1, 0, 5), x[0].slice(0, 0, 5), x[0]}) {
      const auto parts = linalg::cusolver_svd(matrix);
      ASSERT_TRUE(parts.has_value());
      const auto& [u, s, vh] = *parts;
      EXPECT_LT((at::matmul(u * s, vh) - matrix).abs().max().item<double>(), 1e-12);
      EXPECT_EQ(linalg::thin_svd(matrix).u.sizes(), u.sizes());
    }
    // No convergence: LAPACK takes over.
    pretend::fail_cusolver(true);
    EXPECT_FALSE(linalg::cusolver_eigh(matrices).has_value());
    EXPECT_LT((linalg::eigh(matrices[1]).vectors - expected.vectors[1]).abs().max().item<double>(), 1e-10);
    EXPECT_EQ(linalg::thin_svd(x[0]).s.numel(), 8);
    pretend::fail_cusolver(false);
    linalg::set_backend(linalg::Backend::lapack);
    linalg::set_gpu_threshold(before);
  }
}

}  // namespace
}  // namespace headfold
