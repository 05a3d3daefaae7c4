#include <ATen/Parallel.h>
#include <gmock/gmock.h>
#include <headfold/base/error.h>
#include <headfold/linalg/eigen_batch.h>
#include <headfold/linalg/linalg.h>

#include <limits>

#include "world.h"

namespace headfold::linalg {
namespace {

at::Tensor random_matrix(std::int64_t rows, std::int64_t columns, at::ScalarType dtype, std::int64_t seed) {
  at::manual_seed(static_cast<std::uint64_t>(seed));
  return at::randn({rows, columns}, at::TensorOptions().dtype(dtype));
}
at::Tensor hermitian(const at::Tensor& x) {
  return x.transpose(-2, -1).conj().resolve_conj();
}
double largest(const at::Tensor& x) {
  return x.numel() == 0 ? 0 : x.abs().max().item<double>();
}
double relative(const at::Tensor& a, const at::Tensor& b) {
  return largest(a - b) / std::max(largest(b), std::numeric_limits<double>::min());
}
/// A random PSD matrix of numerical rank `rank`.
at::Tensor random_psd(std::int64_t n, std::int64_t rank, at::ScalarType dtype, std::int64_t seed) {
  const at::Tensor x = random_matrix(n, rank, dtype, seed);
  return at::matmul(x, hermitian(x));
}
at::Tensor block_diagonal(const std::vector<at::Tensor>& blocks, at::ScalarType dtype) {
  std::int64_t n = 0;
  for (const auto& block : blocks) n += block.size(0);
  at::Tensor all = at::zeros({n, n}, at::TensorOptions().dtype(dtype));
  std::int64_t row = 0;
  for (const auto& block : blocks) {
    all.narrow(0, row, block.size(0)).narrow(1, row, block.size(0)).copy_(block);
    row += block.size(0);
  }
  return all;
}

class EighTest : public testing::TestWithParam<at::ScalarType> {};
INSTANTIATE_TEST_SUITE_P(Types, EighTest, testing::Values(at::kDouble, at::kComplexDouble),
                         [](const auto& test) { return test.param == at::kDouble ? "real" : "complex"; });

TEST_P(EighTest, decomposes_and_orders) {
  for (const double scale : {1.0, 1e-200, 1e200}) {
    const at::Tensor m = random_psd(37, 50, GetParam(), 1);
    Eigen eigen = eigh(m * scale);
    eigen.values.div_(scale);
    EXPECT_EQ(eigen.vectors.scalar_type(), GetParam());
    EXPECT_LT(relative(at::matmul(eigen.vectors * eigen.values, hermitian(eigen.vectors)), m), 1e-13);
    EXPECT_LT(largest(at::matmul(hermitian(eigen.vectors), eigen.vectors) - at::eye(37, m.options())), 1e-13);
    for (std::int64_t i = 1; i < 37; ++i) EXPECT_GE(eigen.values[i - 1].item<double>(), eigen.values[i].item<double>());
  }
}

TEST_P(EighTest, phases_are_fixed) {
  const at::Tensor m = random_psd(24, 30, GetParam(), 2);
  const Eigen eigen = eigh(m);
  for (std::int64_t j = 0; j < 24; ++j) {
    const at::Tensor column = eigen.vectors.select(1, j);
    const at::Tensor entry = column[column.abs().argmax().item<std::int64_t>()];
    EXPECT_GT(at::real(entry).item<double>(), 0);
    if (entry.is_complex()) {
      EXPECT_LT(std::abs(at::imag(entry).item<double>()), 1e-15);
    }
  }
  // A diagonal change of phase S conjugates the matrix: vectors become S v up to the gauge, which only depends on |v|.
  at::Tensor phases = at::ones({24}, m.options());
  for (std::int64_t i = 0; i < 24; i += 3) phases[i].mul_(-1);
  const Eigen turned = eigh(phases.unsqueeze(1) * m * phases);
  EXPECT_LT(relative(turned.vectors.abs(), eigen.vectors.abs()), 1e-10);
  EXPECT_LT(relative(turned.values, eigen.values), 1e-12);
}

TEST_P(EighTest, equal_eigenvalues_give_one_basis_whatever_the_path) {
  // Three eigenspaces of several dimensions; the same operator reached through two factorisations that differ in
  // rounding.
  const at::Tensor q = std::get<0>(at::linalg_qr(random_matrix(30, 30, GetParam(), 3)));
  at::Tensor values = at::zeros({30}, at::kDouble);
  values.narrow(0, 0, 4).fill_(5);
  values.narrow(0, 4, 6).fill_(2);
  const at::Tensor a = at::matmul(q * values, hermitian(q));
  at::Tensor b = at::zeros_like(a);
  for (std::int64_t j = 29; j >= 0; --j) {
    const at::Tensor column = q.narrow(1, j, 1);
    b += values[j] * at::matmul(column, hermitian(column));
  }
  at::set_num_threads(2);
  const Eigen first = eigh(a);
  at::set_num_threads(1);
  const Eigen second = eigh(b);
  EXPECT_LT(largest(first.vectors - second.vectors), 1e-9);
}

TEST_P(EighTest, zero_and_empty_and_single) {
  const auto options = at::TensorOptions().dtype(GetParam());
  const Eigen zero = eigh(at::zeros({5, 5}, options));
  EXPECT_EQ(largest(zero.values), 0);
  EXPECT_EQ(largest(zero.vectors - at::eye(5, options)), 0);
  EXPECT_EQ(eigh(at::zeros({0, 0}, options)).values.numel(), 0);
  EXPECT_DOUBLE_EQ(eigh(at::full({1, 1}, 3.5, options)).values.item<double>(), 3.5);
}

TEST_P(EighTest, nan_inf_and_wrong_shapes_are_refused) {
  for (const double bad : {std::nan(""), std::numeric_limits<double>::infinity()}) {
    at::Tensor m = random_psd(8, 8, GetParam(), 4);
    m[2][3].fill_(bad);
    EXPECT_THROW(eigh(m), NumericalError);
    EXPECT_THROW(weighted_low_rank(m, {}, 2), NumericalError);
    EXPECT_THROW(weighted_low_rank(random_psd(8, 8, GetParam(), 4), {m}, 2), NumericalError);
  }
  EXPECT_THROW(eigh(at::zeros({3, 4}, at::kDouble)), InternalError);
  EXPECT_THROW(eigh(at::zeros({3, 3}, at::kFloat)), InternalError);
}

TEST(BackendTest, falls_back_to_lapack_or_names_the_option) {
  const at::Tensor m = random_psd(12, 12, at::kComplexDouble, 5);
  const Eigen expected = eigh(m);
  try {
    set_backend(Backend::cusolver);
    // Below the threshold, then above it.
    for (const std::int64_t rows : {gpu_threshold(), std::int64_t{1}}) {
      set_gpu_threshold(rows);
      EXPECT_LT(relative(eigh(m).vectors, expected.vectors), 1e-9);
      EXPECT_LT(relative(eigh_batched(m.unsqueeze(0)).vectors[0], expected.vectors), 1e-9);
      const ThinSvd parts = thin_svd(m);
      EXPECT_LT(relative(at::matmul(parts.u * parts.s, parts.vh), m), 1e-12);
    }
    set_gpu_threshold(512);
  } catch (const NotCompiled& error) {
    EXPECT_THAT(error.hint(), testing::HasSubstr("HEADFOLD_CUDA=ON"));
  }
  set_backend(Backend::lapack);
  EXPECT_EQ(backend(), Backend::lapack);
}

TEST_P(EighTest, a_batch_has_the_bits_of_each_matrix) {
  std::vector<at::Tensor> list = {random_psd(9, 12, GetParam(), 41), at::zeros({9, 9}, GetParam()),
                                  random_psd(9, 4, GetParam(), 42) * 1e150};
  const Eigen all = eigh_batched(at::stack(list));
  for (std::int64_t i = 0; i < 3; ++i) {
    const Eigen one = eigh(list[static_cast<std::size_t>(i)]);
    EXPECT_TRUE(at::equal(all.values[i], one.values));
    EXPECT_TRUE(at::equal(all.vectors[i], one.vectors));
  }
  EXPECT_EQ(eigh_batched(at::zeros({0, 4, 4}, GetParam())).vectors.numel(), 0);
  EXPECT_THROW(eigh_batched(at::zeros({3, 3}, GetParam())), InternalError);
  EXPECT_THROW(eigh_batched(at::zeros({1, 3, 4}, GetParam())), InternalError);
  EXPECT_THROW(eigh_batched(at::zeros({1, 3, 3}, at::kFloat)), InternalError);
  list[1].fill_(std::nan(""));
  EXPECT_THROW(eigh_batched(at::stack(list)), NumericalError);
}

TEST_P(EighTest, another_library_is_held_to_the_same_contract) {
  const at::Tensor batch = at::stack({random_psd(10, 20, GetParam(), 43), at::zeros({10, 10}, GetParam()),
                                      random_psd(10, 10, GetParam(), 44) * 1e-90});
  const Eigen expected = eigh_batched(batch);
  const auto expect_same = [&](const Eigen& found) {
    for (std::int64_t i = 0; i < 3; ++i) {
      EXPECT_LT(largest(found.values[i] - expected.values[i]), 1e-13 * largest(batch[i]) + 1e-300);
      EXPECT_LT(largest(found.vectors[i] - expected.vectors[i]), 1e-9);
    }
  };
  // One that chooses other phases; its second matrix, which is zero, comes back as nonsense.
  int called = 0;
  const BatchSolver other = [&](const at::Tensor& a) {
    ++called;
    EXPECT_LE(largest(a), 1.5);
    auto [values, vectors] = at::linalg_eigh(a, "L");
    vectors = vectors.resolve_conj() * -1.0;
    vectors[1].fill_(7.0);
    return std::make_optional(std::make_pair(values, vectors));
  };
  expect_same(eigh_batched_by(batch, other));
  EXPECT_EQ(called, 1);
  // One whose vectors of the last matrix are not good enough: LAPACK takes that one over.
  expect_same(eigh_batched_by(batch, [](const at::Tensor& a) {
    auto [values, vectors] = at::linalg_eigh(a, "L");
    vectors = vectors.resolve_conj().clone();
    vectors[2].add_(1e-6);
    return std::make_optional(std::make_pair(values, vectors));
  }));
  // One that gives up.
  expect_same(eigh_batched_by(batch, [](const at::Tensor&) { return std::nullopt; }));
}

TEST_P(EighTest, singular_values_rebuild_the_matrix) {
  for (const auto& [m, n] : {std::pair{7, 12}, {12, 7}, {9, 9}, {1, 5}}) {
    for (const double scale : {1.0, 1e-140, 0.0}) {
      const at::Tensor a = random_matrix(m, n, GetParam(), 45) * scale;
      const ThinSvd parts = thin_svd(a);
      const std::int64_t k = std::min(m, n);
      ASSERT_EQ(parts.u.sizes(), at::IntArrayRef({m, k}));
      ASSERT_EQ(parts.vh.sizes(), at::IntArrayRef({k, n}));
      EXPECT_LE(largest(at::matmul(parts.u * parts.s, parts.vh) - a), 1e-13 * scale);
      EXPECT_LT(largest(at::matmul(hermitian(parts.u), parts.u) - at::eye(k, a.options())), 1e-13);
      EXPECT_LT(largest(at::matmul(parts.vh, hermitian(parts.vh)) - at::eye(k, a.options())), 1e-13);
      for (std::int64_t i = 1; i < k; ++i) EXPECT_GE(parts.s[i - 1].item<double>(), parts.s[i].item<double>());
    }
  }
  at::Tensor bad = random_matrix(4, 5, GetParam(), 46);
  bad[1][2].fill_(std::numeric_limits<double>::infinity());
  EXPECT_THROW(thin_svd(bad), NumericalError);
  EXPECT_THROW(thin_svd(at::zeros({3, 3, 3}, GetParam())), InternalError);
  EXPECT_THROW(thin_svd(at::zeros({3, 3}, at::kFloat)), InternalError);
}

TEST(PsdRootTest, squares_to_the_matrix_and_drops_small_directions) {
  for (const auto dtype : {at::kDouble, at::kComplexDouble}) {
    const at::Tensor m = random_psd(20, 7, dtype, 6);
    const PsdRoot root = psd_root(m);
    EXPECT_EQ(root.width, 7);
    EXPECT_LT(relative(at::matmul(hermitian(root.root), root.root), m), 1e-12);
    // Moore-Penrose: R R^+ R = R, and R R^+ is Hermitian.
    EXPECT_LT(relative(at::matmul(at::matmul(root.root, root.inverse_root), root.root), root.root), 1e-10);
    const at::Tensor projector = at::matmul(root.root, root.inverse_root);
    EXPECT_LT(largest(projector - hermitian(projector)), 1e-10);
  }
  EXPECT_EQ(psd_root(at::zeros({4, 4}, at::kDouble)).width, 0);
  EXPECT_EQ(psd_root(at::eye(4, at::kDouble), 1e-10, 2.0).width, 0);
}

/// The oracle: SVD of Lw T M^{1/2}, no squaring of the condition number.
struct Problem {
  at::Tensor t, moment_root, sigma, lambda;
  std::vector<at::Tensor> blocks;
};
Problem random_problem(at::ScalarType dtype, std::int64_t seed) {
  Problem problem;
  const std::int64_t p = 24, d = 40;
  problem.t = random_matrix(p, d, dtype, seed);
  problem.moment_root = random_matrix(d, d, dtype, seed + 1);  // M = R R^H
  const at::Tensor map = at::matmul(problem.t, problem.moment_root);
  problem.sigma = at::matmul(map, hermitian(map));
  for (std::int64_t block = 0; block < 3; ++block) problem.blocks.push_back(random_psd(8, 12, dtype, seed + 2 + block));
  problem.lambda = block_diagonal(problem.blocks, dtype);
  return problem;
}

class LowRankTest : public testing::TestWithParam<at::ScalarType> {};
INSTANTIATE_TEST_SUITE_P(Types, LowRankTest, testing::Values(at::kDouble, at::kComplexDouble),
                         [](const auto& test) { return test.param == at::kDouble ? "real" : "complex"; });

TEST_P(LowRankTest, agrees_with_the_svd) {
  for (std::int64_t seed = 10; seed < 40; seed += 10) {
    const Problem problem = random_problem(GetParam(), seed);
    const std::int64_t width = 5 + seed / 10;
    const LowRank found = weighted_low_rank(problem.sigma, problem.blocks, width);
    const at::Tensor root = psd_root(problem.lambda).root;
    const auto [u, s, v] = at::linalg_svd(at::matmul(at::matmul(root, problem.t), problem.moment_root), false);
    EXPECT_LT(relative(found.energies, s * s), 1e-10);
    const at::Tensor best = u.narrow(1, 0, width);
    // B A is unique: Lw^+ U_r U_r^H Lw.
    const at::Tensor expected =
        at::matmul(psd_root(problem.lambda).inverse_root, at::matmul(at::matmul(best, hermitian(best)), root));
    EXPECT_LT(relative(at::matmul(found.decoder, found.encoder), expected), 1e-8);
    EXPECT_NEAR(found.loss / (s * s).narrow(0, width, 24 - width).sum().item<double>(), 1, 1e-10);
    EXPECT_NEAR(found.total / (s * s).sum().item<double>(), 1, 1e-12);
  }
}

TEST_P(LowRankTest, loss_is_the_measured_one_and_channels_are_decorrelated) {
  const Problem problem = random_problem(GetParam(), 50);
  // The fitting sample: columns x with (1/N) sum x x^H = R R^H.
  const at::Tensor x = problem.moment_root * std::sqrt(40.0);
  const LowRank found = weighted_low_rank(problem.sigma, problem.blocks, 6);
  const at::Tensor root = psd_root(problem.lambda).root;
  const at::Tensor mapped = at::matmul(problem.t, x);
  const at::Tensor merged = at::matmul(found.encoder, mapped);
  const at::Tensor error = at::matmul(root, mapped - at::matmul(found.decoder, merged));
  const double measured = (error.abs() * error.abs()).sum().item<double>() / 40;
  EXPECT_NEAR(measured / found.loss, 1, 1e-10);
  const at::Tensor second = at::matmul(merged, hermitian(merged)) / 40;
  EXPECT_LT(
      largest(second - at::diag(found.energies.narrow(0, 0, 6)).to(GetParam())) / found.energies[0].item<double>(),
      1e-10);
  EXPECT_NEAR(found.relative_loss(), found.loss / found.total, 1e-15);
}

TEST_P(LowRankTest, singular_and_nearly_singular_covariances) {
  const Problem problem = random_problem(GetParam(), 60);
  const at::Tensor sigma = random_psd(24, 5, GetParam(), 61);
  const LowRank exact = weighted_low_rank(sigma, problem.blocks, 5);
  EXPECT_LT(exact.relative_loss(), 1e-13);
  EXPECT_LT(relative(at::matmul(at::matmul(exact.decoder, exact.encoder), sigma), sigma), 1e-8);
  // Far more channels than directions: still finite, and no worse.
  const LowRank wide = weighted_low_rank(sigma, problem.blocks, 24);
  EXPECT_TRUE(at::isfinite(at::abs(wide.decoder)).all().item<bool>());
  EXPECT_EQ(wide.loss, 0);
  const LowRank near = weighted_low_rank(sigma + at::eye(24, sigma.options()) * 1e-12, {}, 5);
  EXPECT_LT(near.relative_loss(), 1e-11);
  // A Gram of few rows has negative eigenvalues by the rounding of its sums. Widths that keep their directions, too,
  // are as legal as those that lose them.
  const at::Tensor rounded =
      linalg::symmetric_part(random_psd(24, 5, at::kDouble, 62) * (1 + 1e-6 * at::randn({24, 24}, at::kDouble)));
  EXPECT_LT(eigh(rounded).values[23].item<double>(), -1e-7 * rounded.abs().max().item<double>());
  for (const std::int64_t width : {4, 12, 20, 23, 24}) {
    const LowRank kept = weighted_low_rank(rounded.to(sigma.scalar_type()), {}, width);
    EXPECT_LT(kept.relative_loss(), width == 4 ? 1.0 : 1e-4) << width;
  }
  // One channel 1e4 times as loud as the others takes the first width and leaves the others right.
  at::Tensor loud = at::ones({24}, sigma.options());
  loud[7].fill_(1e4);
  const at::Tensor outlier = loud.unsqueeze(1) * problem.sigma * loud;
  const LowRank kept = weighted_low_rank(outlier, {}, 1);
  EXPECT_GT(kept.encoder.select(1, 7).abs().item<double>(), 0.999);
  const at::Tensor map = at::matmul(at::diag(loud), at::matmul(problem.t, problem.moment_root));
  const at::Tensor s = std::get<1>(at::linalg_svd(map, false));
  EXPECT_LT(largest((weighted_low_rank(outlier, {}, 3).energies - s * s) / (s[0] * s[0])), 1e-12);
}

/// W X of the weighted problem with Lambda_k = P_k^H P_k: its singular values squared are the energies, without
/// squaring the condition number.
at::Tensor energies_by_svd(const std::vector<at::Tensor>& outputs, const at::Tensor& map) {
  std::vector<at::Tensor> rows;
  std::int64_t row = 0;
  for (const at::Tensor& p : outputs) {
    rows.push_back(at::matmul(p, map.narrow(0, row, p.size(1))));
    row += p.size(1);
  }
  const at::Tensor s = std::get<1>(at::linalg_svd(at::cat(rows, 0), false));
  return s * s;
}

TEST_P(LowRankTest, hard_covariances_and_weights_agree_with_the_svd) {
  const std::int64_t p = 24, d = 40;
  for (int which = 0; which < 7; ++which) {
    at::Tensor map = random_matrix(p, which == 2 ? 7 : d, GetParam(), 110 + which);  // 2: fewer tokens than channels
    std::vector<at::Tensor> outputs;
    for (int k = 0; k < 3; ++k) outputs.push_back(random_matrix(12, 8, GetParam(), 120 + 10 * which + k));
    const auto channel = [&](std::int64_t row, double factor) { map.select(0, row).mul_(factor); };
    const auto column = [&](int k, std::int64_t c, double factor) {
      outputs[static_cast<std::size_t>(k)].select(1, c).mul_(factor);
    };
    if (which == 0) channel(3, 0), channel(20, 0);        // dead directions
    if (which == 1) channel(7, 1e4);                      // one outlier channel
    if (which == 3) column(0, 2, 1e4);                    // one outlier weight
    if (which == 4) channel(7, 1e6), column(0, 7, 1e-6);  // loud channel that the output all but ignores
    if (which == 5) map = at::logspace(0, -9, p, 10.0, at::kDouble).unsqueeze(1) * map;  // nine decades of amplitude
    if (which == 6) {
      column(1, 3, 0);
      outputs[2].select(1, 1).copy_(outputs[2].select(1, 0));  // dependent columns
      column(0, 5, 1e4);
    }
    const at::Tensor sigma = at::matmul(map, hermitian(map));
    std::vector<at::Tensor> blocks;
    for (const at::Tensor& o : outputs) blocks.push_back(at::matmul(hermitian(o), o));
    const at::Tensor energies = energies_by_svd(outputs, map);
    const double total = energies.sum().item<double>();
    const std::vector<std::int64_t> widths = {1, 4, 8, 20};
    for (const std::int64_t width : widths) {
      const LowRank found = weighted_low_rank(sigma, blocks, width);
      const double best =
          width >= energies.numel() ? 0 : energies.narrow(0, width, energies.numel() - width).sum().item<double>();
      EXPECT_LT(std::abs(found.loss - best), 1e-12 * total) << which;
      EXPECT_NEAR(found.total / total, 1, 1e-12) << which;
      // The loss of what is handed back, from the factors: no covariance, no squares.
      const at::Tensor error = map - at::matmul(found.decoder, at::matmul(found.encoder, map));
      const double measured = energies_by_svd(outputs, error).sum().item<double>();
      EXPECT_LT(std::abs(measured - best), 1e-11 * total) << which;
      EXPECT_TRUE(at::isfinite(at::abs(found.decoder)).all().item<bool>());
    }
  }
}

TEST_P(LowRankTest, what_truncated_weights_hide_counts_as_lost) {
  // Two channels that the weight sees as one, up to 1e-6: the difference is truncated, but it is loud.
  const auto options = at::TensorOptions().dtype(GetParam());
  at::Tensor lambda = at::ones({2, 2}, options);
  lambda.diagonal().add_(1e-12);
  at::Tensor sigma = at::ones({2, 2}, options) * 1e10;
  sigma[0][1].fill_(-1e10);
  sigma[1][0].fill_(-1e10);
  sigma.diagonal().add_(1.0);
  const LowRank found = weighted_low_rank(sigma, {lambda}, 1);
  // tr(Lambda Sigma) = 2e10 * 1e-12 + 2 = 2.02; the sum of the channels, 2, is kept, their difference is not.
  EXPECT_NEAR(found.total, 2.02, 1e-3);
  EXPECT_NEAR(found.loss, 0.02, 1e-3);
}

TEST_P(LowRankTest, conditioning_of_known_spectra) {
  const at::Tensor v = eigh(random_psd(10, 20, GetParam(), 130)).vectors;
  const at::Tensor spectrum = at::tensor({8.0, 4.0, 2.0, 1.0, 0.5, 1e-3, 1e-6, 1e-12, 1e-14, 0.0}, at::kDouble);
  const auto found = conditioning(at::matmul(v * spectrum, hermitian(v)));
  EXPECT_NEAR(found.condition / 8e6, 1, 1e-6);
  EXPECT_DOUBLE_EQ(found.dropped, 0.3);
  EXPECT_DOUBLE_EQ(conditioning(at::matmul(v * spectrum, hermitian(v)), 1e-2).dropped, 0.5);
  const auto zero = conditioning(at::zeros({4, 4}, v.options()));
  EXPECT_EQ(zero.condition, 1);
  EXPECT_EQ(zero.dropped, 1);
  EXPECT_EQ(conditioning(at::eye(4, v.options())).dropped, 0);
  EXPECT_THROW(conditioning(at::full({2, 2}, std::numeric_limits<double>::quiet_NaN(), v.options())), NumericalError);
  EXPECT_THROW(conditioning(at::zeros({2, 3}, v.options())), InternalError);
}

TEST_P(LowRankTest, zero_covariance_gives_unit_vectors) {
  const auto options = at::TensorOptions().dtype(GetParam());
  const LowRank found = weighted_low_rank(at::zeros({6, 6}, options), {at::eye(6, options) * 3}, 2);
  EXPECT_EQ(found.loss, 0);
  EXPECT_EQ(found.relative_loss(), 0);
  EXPECT_EQ(largest(found.encoder - at::eye(2, 6, options)), 0);
  EXPECT_EQ(largest(found.decoder - at::eye(6, 2, options)), 0);
}

TEST_P(LowRankTest, dead_heads_are_left_out_without_division) {
  const Problem problem = random_problem(GetParam(), 70);
  for (const double weight : {0.0, 1e-40}) {
    std::vector<at::Tensor> blocks = problem.blocks;
    blocks[1] = blocks[1] * weight;
    const LowRank found = weighted_low_rank(problem.sigma, blocks, 16);
    EXPECT_LT(found.relative_loss(), 1e-12);
    EXPECT_EQ(largest(found.decoder.narrow(0, 8, 8)), 0);
    EXPECT_EQ(largest(found.encoder.narrow(1, 8, 8)), 0);
  }
  const LowRank none = weighted_low_rank(problem.sigma, {at::zeros_like(problem.sigma)}, 3);
  EXPECT_EQ(none.total, 0);
  EXPECT_EQ(largest(none.decoder), 0);
  // The ridge brings a dead head back.
  std::vector<at::Tensor> blocks = problem.blocks;
  blocks[1] = blocks[1] * 0;
  EXPECT_GT(largest(weighted_low_rank(problem.sigma, blocks, 16, 1e-6).decoder.narrow(0, 8, 8)), 1e-3);
}

TEST_P(LowRankTest, ridge_is_a_share_of_the_mean_weight) {
  const Problem problem = random_problem(GetParam(), 80);
  const double mean = at::real(problem.lambda.diagonal()).sum().item<double>() / 24;
  std::vector<at::Tensor> ridged;
  for (const auto& block : problem.blocks) ridged.push_back(block + at::eye(8, block.options()) * (0.1 * mean));
  const LowRank a = weighted_low_rank(problem.sigma, problem.blocks, 7, 0.1);
  const LowRank b = weighted_low_rank(problem.sigma, ridged, 7);
  EXPECT_LT(relative(a.encoder, b.encoder), 1e-10);
  EXPECT_NEAR(a.loss / b.loss, 1, 1e-10);
}

TEST_P(LowRankTest, duplicated_rows_fold_without_loss) {
  const at::Tensor half = random_psd(12, 30, GetParam(), 90);
  const at::Tensor sigma = at::cat({at::cat({half, half}, 1), at::cat({half, half}, 1)}, 0);
  const LowRank found = weighted_low_rank(sigma, {}, 12);
  EXPECT_LT(found.relative_loss(), 1e-13);
  EXPECT_LT(relative(at::matmul(at::matmul(found.decoder, found.encoder), sigma), sigma), 1e-10);
}

TEST(LowRankShapesTest, real_weights_on_complex_covariance_and_wrong_shapes) {
  const Problem problem = random_problem(at::kComplexDouble, 100);
  std::vector<at::Tensor> real, complex;
  for (int k = 0; k < 24; ++k) {
    real.push_back(at::full({1, 1}, 0.5 + k, at::kDouble));
    complex.push_back(real.back().to(at::kComplexDouble));
  }
  EXPECT_LT(
      relative(weighted_low_rank(problem.sigma, real, 4).encoder, weighted_low_rank(problem.sigma, complex, 4).encoder),
      1e-15);
  EXPECT_THROW(weighted_low_rank(problem.sigma, {at::eye(3, at::kDouble)}, 4), InternalError);
  EXPECT_THROW(weighted_low_rank(problem.sigma, {}, 25), InternalError);
  EXPECT_THROW(weighted_low_rank(at::real(problem.sigma).contiguous(), problem.blocks, 4), InternalError);
}

class GramTest : public testing::TestWithParam<std::int64_t> {};
// Widths on both sides of every block size, and odd ones.
INSTANTIATE_TEST_SUITE_P(Widths, GramTest, testing::Values(1, 3, 64, 255, 513, 1100),
                         testing::PrintToStringParamName());

TEST_P(GramTest, equals_the_float64_product_for_every_dtype) {
  const std::int64_t n = GetParam();
  for (const auto dtype : {at::kFloat, at::kBFloat16, at::kDouble}) {
    GramAccumulator gram(n);
    at::Tensor expected = at::zeros({n, n}, at::kDouble);
    for (const std::int64_t tokens : {97, 1, 64}) {
      // The first row is left out as calibration does, by a view or by `skip`.
      const at::Tensor all = random_matrix(tokens + 1, n, at::kFloat, 200 + tokens).to(dtype);
      const at::Tensor x = all.narrow(0, 1, tokens);
      if (tokens == 64) {
        gram.add(x);
      } else {
        gram.add(all, 1);
      }
      const at::Tensor wide = x.to(at::kDouble);
      expected += at::matmul(wide.transpose(0, 1), wide);
    }
    const at::Tensor full = gram.full();
    EXPECT_LT(relative(full, expected), dtype == at::kDouble ? 1e-14 : 1e-6) << c10::toString(dtype);
    EXPECT_EQ(largest(full - full.transpose(0, 1)), 0);
    EXPECT_EQ(largest(pack_lower(full) - gram.packed()), 0);
  }
}

TEST(GramAccumulatorTest, refuses_other_shapes_and_dtypes) {
  GramAccumulator gram(8);
  EXPECT_THROW(gram.add(at::zeros({4, 7})), InternalError);
  EXPECT_THROW(gram.add(at::zeros({8})), InternalError);
  EXPECT_THROW(gram.add(at::zeros({4, 8}, at::kHalf)), InternalError);
  EXPECT_THROW(gram.add(at::zeros({4, 8}), 5), InternalError);
  gram.add(at::zeros({0, 8}));
  gram.add(at::ones({2, 8}), 2);
  EXPECT_EQ(largest(gram.packed()), 0);
  EXPECT_THROW(unpack_lower(at::zeros({5}, at::kDouble), 3), InternalError);
}

/// A Gram in a GPU's blocks, on the CPU: `block` columns each.
GramAccumulator in_blocks(std::int64_t n, std::int64_t block) {
  return GramAccumulator(n, at::kCPU, GramEngine::tensors, block);
}

TEST_P(GramTest, column_blocks_stay_within_the_bound_of_float32_sums) {
  const std::int64_t n = GetParam();
  for (const std::int64_t block : {std::int64_t{0}, std::int64_t{64}, std::int64_t{100}})
    for (const auto dtype : {at::kFloat, at::kBFloat16, at::kDouble}) {
      GramAccumulator gram = in_blocks(n, block);
      at::Tensor expected = at::zeros({n, n}, at::kDouble), bound = at::zeros({n, n}, at::kDouble);
      for (const std::int64_t tokens : {97, 1, 64}) {
        const at::Tensor x = random_matrix(tokens, n, at::kFloat, 200 + tokens).to(dtype);
        gram.add(at::cat({at::ones({1, n}, dtype), x}), 1);
        const at::Tensor wide = x.to(at::kDouble);
        expected += at::matmul(wide.t(), wide);
        // t u / (1 - t u) |X|^T |X| of each call; the additions in float64 and `expected` itself are off by far less.
        const double unit = static_cast<double>(tokens) * (dtype == at::kDouble ? 0x1p-52 : 0x1p-24);
        bound += unit / (1 - unit) * at::matmul(wide.abs().t(), wide.abs());
      }
      const at::Tensor full = gram.full();
      EXPECT_TRUE(((full - expected).abs() <= bound).all().item<bool>()) << c10::toString(dtype) << " " << block;
      EXPECT_EQ(largest(full - full.transpose(0, 1)), 0);
      GramAccumulator usual(n);
      for (const std::int64_t tokens : {97, 1, 64})
        usual.add(random_matrix(tokens, n, at::kFloat, 200 + tokens).to(dtype));
      EXPECT_TRUE(((full - usual.full()).abs() <= 2 * bound).all().item<bool>()) << c10::toString(dtype);
    }
}

TEST(GramAccumulatorTest, sums_that_move_to_the_host_and_back_keep_their_bits) {
  const std::int64_t n = 150;
  GramAccumulator moved = in_blocks(n, 64), stayed = in_blocks(n, 64);
  for (std::int64_t call = 0; call < 5; ++call) {
    const at::Tensor x = random_matrix(31, n, at::kFloat, 300 + call);
    stayed.add(x);
    moved.add(x);
    // Reading keeps the sums where they are, changing moves them: both are gone on from.
    const at::Tensor read = call % 2 == 0 ? std::as_const(moved).packed() : moved.packed();
    ASSERT_EQ(read.numel(), packed_size(n));
  }
  EXPECT_TRUE(at::equal(moved.packed(), stayed.packed()));
  // What is changed on the host counts.
  moved.packed().zero_();
  EXPECT_EQ(largest(moved.full()), 0);
  moved.packed().add_(stayed.packed());
  const at::Tensor more = random_matrix(8, n, at::kDouble, 310);
  moved.add(more);
  stayed.add(more);
  EXPECT_TRUE(at::equal(moved.packed(), stayed.packed()));
  EXPECT_EQ(largest(in_blocks(3, 0).packed()), 0);
}

TEST(GramAccumulatorTest, a_gpu_is_refused_where_it_cannot_be_used) {
  GramAccumulator gram(8);
  EXPECT_THROW(gram.add(at::empty({4, 8}, at::TensorOptions().device(at::kMeta))), InternalError);
#ifdef HEADFOLD_WITH_CUDA
  GramAccumulator device(8, at::kCUDA);
  EXPECT_THROW(device.add(at::zeros({4, 8})), InternalError);
#else
  EXPECT_THROW(GramAccumulator(8, at::kCUDA), NotCompiled);
#endif
}

TEST(GramAccumulatorTest, long_sums_keep_float64_precision) {
  // 1 + many tiny additions: a float32 accumulator would lose them all.
  GramAccumulator gram(2);
  gram.add(at::full({1, 2}, 4096.0F));
  for (int i = 0; i < 1000; ++i) gram.add(at::full({1, 2}, 0.0078125F));
  EXPECT_NEAR(gram.full()[0][1].item<double>() - 4096.0 * 4096.0, 1000.0 / 16384.0, 1e-9);
}

TEST(LowRankTest, a_gram_that_rounding_made_indefinite_is_folded) {
  // Six vectors in 24 channels, one channel 10^4 times the rest, entries rounded as sums in lower precision leave them.
  at::Tensor x = random_matrix(24, 6, at::kDouble, 71);
  x[3].mul_(1e4);
  const at::Tensor exact = at::matmul(x, x.t());
  at::Tensor noise = random_matrix(24, 24, at::kDouble, 72);
  noise = (noise + noise.t()) * (1e-8 * largest(exact));
  const at::Tensor rounded = exact + noise;
  ASSERT_LT(eigh(rounded).values[23].item<double>(), -1e-8 * largest(exact));
  const LowRank found = weighted_low_rank(rounded, {}, 8);
  EXPECT_TRUE(at::isfinite(found.encoder).all().item<bool>() && at::isfinite(found.decoder).all().item<bool>());
  EXPECT_GE(found.loss, 0);
  EXPECT_LT(found.loss, 1e-6 * found.total);
  EXPECT_LT(relative(at::matmul(found.decoder, at::matmul(found.encoder, exact)), exact), 1e-6);
  // What no rounding explains is refused.
  EXPECT_THROW(weighted_low_rank(exact - 0.01 * largest(exact) * at::eye(24, at::kDouble), {}, 8), NumericalError);
}

/// Two entries per row and block, as maps that commute with a rotation have them.
at::Tensor pairs_map(std::int64_t heads, std::int64_t dim, std::int64_t seed) {
  at::Tensor map = at::zeros({heads, dim, dim}, at::kDouble);
  const at::Tensor values = random_matrix(heads * dim, 2, at::kDouble, seed);
  for (std::int64_t h = 0; h < heads; ++h)
    for (std::int64_t i = 0; i < dim; ++i) {
      map[h][i][i] = values[h * dim + i][0];
      map[h][i][(i + dim / 2) % dim] = values[h * dim + i][1];
    }
  return map.permute({1, 0, 2}).reshape({dim, heads * dim});
}

TEST(MapRows, sparse_and_dense_maps_give_the_product) {
  const at::Tensor rows = random_matrix(3 * 64, 37, at::kDouble, 11);
  const at::Tensor sparse = pairs_map(3, 64, 12), dense = random_matrix(5, 3 * 64, at::kDouble, 13);
  EXPECT_LT(relative(map_rows(sparse, rows), at::matmul(sparse, rows)), 1e-14);
  EXPECT_LT(relative(map_rows(dense, rows), at::matmul(dense, rows)), 1e-14);
  // Views: a transposed map and every other column.
  EXPECT_LT(relative(map_rows(sparse.t(), rows.slice(0, 0, 64).slice(1, 0, 37, 2)),
                     at::matmul(sparse.t(), rows.slice(0, 0, 64).slice(1, 0, 37, 2))),
            1e-14);
  EXPECT_EQ(largest(map_rows(at::zeros({4, 192}, at::kDouble), rows)), 0);
}

TEST(MapRows, sparse_maps_read_only_the_rows_they_name) {
  at::Tensor rows = random_matrix(64, 8, at::kDouble, 14);
  rows[5].fill_(std::numeric_limits<double>::quiet_NaN());
  at::Tensor map = at::zeros({2, 64}, at::kDouble);
  map[0][3] = 2.0;
  map[1][5] = 1.0;
  const at::Tensor result = map_rows(map, rows);
  EXPECT_TRUE(at::equal(result[0], 2.0 * rows[3]));
  EXPECT_TRUE(at::isnan(result[1]).all().item<bool>());
}

TEST(MapRows, refuses_shapes_that_do_not_fit) {
  EXPECT_THROW(map_rows(at::zeros({2, 3}, at::kDouble), at::zeros({4, 3}, at::kDouble)), InternalError);
  EXPECT_THROW(map_rows(at::zeros({2, 3}, at::kFloat), at::zeros({3, 3}, at::kFloat)), InternalError);
}

}  // namespace
}  // namespace headfold::linalg
