// cuSOLVER and cuBLAS against LAPACK and float64. Needs a GPU; what is tested of the same code without one stands in
// tests/unit/linalg.

#include <headfold/base/error.h>
#include <headfold/linalg/cusolver.h>
#include <headfold/linalg/linalg.h>

#include <iostream>

#include "gpu.h"

namespace headfold::linalg {
namespace {

using testing_support::GpuTensorTest;
using testing_support::GpuTest;

constexpr double kAgreement = 1e-10;

at::Tensor random_matrix(std::int64_t rows, std::int64_t columns, at::ScalarType dtype, std::uint64_t seed) {
  at::manual_seed(seed);
  return at::randn({rows, columns}, at::TensorOptions().dtype(dtype));
}
double frobenius(const at::Tensor& x) {
  return x.norm().abs().item<double>();
}
at::Tensor orthonormal(std::int64_t rows, std::int64_t columns, at::ScalarType dtype, std::uint64_t seed) {
  return std::get<0>(at::linalg_qr(random_matrix(rows, columns, dtype, seed)));
}

struct Spectrum {
  const char* name;
  std::function<at::Tensor(std::int64_t)> values;  ///< descending, [n]
};
/// Well-conditioned, sixteen decades, half of it zero, and all but one equal.
std::vector<Spectrum> spectra() {
  return {{"even", [](std::int64_t n) { return at::linspace(2, 1, n, at::kDouble); }},
          {"decades", [](std::int64_t n) { return at::pow(10.0, at::linspace(0, -16, n, at::kDouble)); }},
          {"singular",
           [](std::int64_t n) {
             at::Tensor values = at::linspace(1, 0.5, n, at::kDouble);
             values.slice(0, n / 2).zero_();
             return values;
           }},
          {"equal", [](std::int64_t n) {
             at::Tensor values = at::ones({n}, at::kDouble);
             values[0] = 3.0;
             return values;
           }}};
}
at::Tensor with_spectrum(const at::Tensor& values, at::ScalarType dtype, std::uint64_t seed) {
  const at::Tensor q = orthonormal(values.numel(), values.numel(), dtype, seed);
  const at::Tensor m = at::matmul(q * values, conjugate_transpose(q));
  return 0.5 * (m + conjugate_transpose(m));
}

/// What a decomposition must satisfy, whatever its phases: descending values as LAPACK's, residual, orthonormality.
void expect_eigen(const at::Tensor& matrix, const at::Tensor& values, const at::Tensor& vectors) {
  const at::Tensor expected = std::get<0>(at::linalg_eigh(matrix, "L")).flip({0});
  const std::int64_t n = matrix.size(0);
  EXPECT_LE((values - expected).abs().max().item<double>(), kAgreement * expected.abs().max().item<double>());
  EXPECT_LE(frobenius(at::matmul(matrix, vectors) - vectors * values), kAgreement * frobenius(matrix));
  EXPECT_LE(frobenius(at::matmul(conjugate_transpose(vectors), vectors) - at::eye(n, matrix.options())),
            kAgreement * n);
}

/// cuSOLVER for all sizes in a scope.
struct OnGpu {
  OnGpu() {
    set_backend(Backend::cusolver);
    set_gpu_threshold(1);
  }
  ~OnGpu() {
    set_backend(Backend::lapack);
    set_gpu_threshold(before);
  }
  std::int64_t before = gpu_threshold();
};

class GpuEigen : public GpuTest {};

TEST_F(GpuEigen, cusolver_itself_agrees_with_lapack) {
  for (const auto dtype : {at::kDouble, at::kComplexDouble})
    for (const std::int64_t n : {1, 2, 33, 300, 1024})
      for (const Spectrum& spectrum : spectra()) {
        SCOPED_TRACE(fmt::format("{} {} {}", c10::toString(dtype), n, spectrum.name));
        const at::Tensor matrix = with_spectrum(spectrum.values(n), dtype, static_cast<std::uint64_t>(n));
        const auto found = cusolver_eigh(matrix.unsqueeze(0));  // not eigh(), which would fall back to LAPACK
        ASSERT_TRUE(found.has_value());
        expect_eigen(matrix, found->first[0].flip({0}), found->second[0].flip({1}));
      }
}

TEST_F(GpuEigen, cusolver_itself_agrees_with_lapack_in_batches) {
  for (const auto dtype : {at::kDouble, at::kComplexDouble})
    for (const auto& [batch, n] : {std::pair<std::int64_t, std::int64_t>{64, 2}, {64, 8}, {7, 33}, {32, 128}})
      for (const Spectrum& spectrum : spectra()) {
        SCOPED_TRACE(fmt::format("{} {} x {} {}", c10::toString(dtype), batch, n, spectrum.name));
        std::vector<at::Tensor> list;
        for (std::int64_t i = 0; i < batch; ++i)
          list.push_back(with_spectrum(spectrum.values(n) * (1.0 + i), dtype, static_cast<std::uint64_t>(i + 1)));
        const at::Tensor matrices = at::stack(list);
        const auto found = cusolver_eigh(matrices);
        ASSERT_TRUE(found.has_value());
        for (std::int64_t i = 0; i < batch; ++i)
          expect_eigen(matrices[i], found->first[i].flip({0}), found->second[i].flip({1}));
      }
}

TEST_F(GpuEigen, eigh_keeps_its_contract) {
  for (const auto dtype : {at::kDouble, at::kComplexDouble}) {
    // Distinct eigenvalues: phases are fixed, so that vectors agree too.
    const at::Tensor matrix = with_spectrum(at::linspace(2, 1, 60, at::kDouble), dtype, 5) * 1e30;
    const Eigen expected = eigh(matrix);
    const OnGpu on_gpu;
    for (const Eigen& found : {eigh(matrix), [&] {
                                 const Eigen all = eigh_batched(at::stack({matrix, matrix}));
                                 return Eigen{all.values[1], all.vectors[1]};
                               }()}) {
      EXPECT_LE(frobenius(found.values - expected.values), kAgreement * frobenius(expected.values));
      EXPECT_LE(frobenius(found.vectors - expected.vectors), 1e-8 * frobenius(expected.vectors));
    }
    EXPECT_TRUE(at::equal(eigh(at::zeros({5, 5}, matrix.options())).vectors, at::eye(5, matrix.options())));
    EXPECT_THROW(eigh(matrix * std::numeric_limits<double>::quiet_NaN()), NumericalError);
  }
}

TEST_F(GpuEigen, singular_values_agree_with_lapack) {
  for (const auto dtype : {at::kDouble, at::kComplexDouble})
    for (const auto& [m, n] : {std::pair<std::int64_t, std::int64_t>{128, 128}, {300, 70}, {70, 300}, {1, 9}})
      for (const Spectrum& spectrum : spectra()) {
        SCOPED_TRACE(fmt::format("{} {} x {} {}", c10::toString(dtype), m, n, spectrum.name));
        const std::int64_t k = std::min(m, n);
        const at::Tensor s = spectrum.values(k);
        const at::Tensor matrix =
            at::matmul(orthonormal(m, k, dtype, 3) * s, conjugate_transpose(orthonormal(n, k, dtype, 4)));
        const auto found = cusolver_svd(matrix);
        ASSERT_TRUE(found.has_value());
        const auto& [u, values, vh] = *found;
        const double largest = at::linalg_svdvals(matrix)[0].item<double>();
        EXPECT_LE((values - at::linalg_svdvals(matrix)).abs().max().item<double>(), kAgreement * largest);
        EXPECT_LE(frobenius(at::matmul(u * values, vh) - matrix), kAgreement * frobenius(matrix));
        EXPECT_LE(frobenius(at::matmul(conjugate_transpose(u), u) - at::eye(k, matrix.options())), kAgreement * k);
        EXPECT_LE(frobenius(at::matmul(vh, conjugate_transpose(vh)) - at::eye(k, matrix.options())), kAgreement * k);
      }
}

class GpuTensors : public GpuTensorTest {};

TEST_F(GpuTensors, matrices_on_the_gpu_are_factorised_there) {
  const OnGpu on_gpu;
  for (const auto dtype : {at::kDouble, at::kComplexDouble}) {
    const at::Tensor matrix = with_spectrum(at::linspace(2, 1, 90, at::kDouble), dtype, 6);
    const at::Tensor there = matrix.to(at::kCUDA), before = there.clone();
    const Eigen found = eigh(there);
    EXPECT_TRUE(found.values.is_cuda() && found.vectors.is_cuda());
    EXPECT_TRUE(at::equal(there, before));  // the input is not what cuSOLVER overwrites
    expect_eigen(matrix, found.values.cpu(), found.vectors.cpu());
    const ThinSvd parts = thin_svd(there);
    EXPECT_TRUE(parts.u.is_cuda());
    EXPECT_LE(frobenius(at::matmul(parts.u * parts.s, parts.vh) - there), kAgreement * frobenius(matrix));
    EXPECT_EQ(psd_root(there).width, 90);
  }
}

/// |found - sum x^T x| <= sum of t u / (1 - t u) |x|^T |x| over calls, entry by entry; prints how much of it is used.
void expect_within_bound(const at::Tensor& found, const std::vector<at::Tensor>& rows, double unit, const char* what) {
  const std::int64_t n = found.size(0);
  at::Tensor expected = at::zeros({n, n}, at::kDouble), bound = at::zeros({n, n}, at::kDouble);
  for (const at::Tensor& x : rows) {
    const at::Tensor wide = x.cpu().to(at::kDouble);
    const double share = static_cast<double>(x.size(0)) * unit;
    expected += at::matmul(wide.t(), wide);
    bound += share / (1 - share) * at::matmul(wide.abs().t(), wide.abs());
  }
  const at::Tensor error = (found - expected).abs();
  std::cout << fmt::format("  {}: largest error {:.1e} of the bound, {:.1e} of the largest entry\n", what,
                           (error / bound.clamp_min(1e-300)).max().item<double>(),
                           error.max().item<double>() / expected.abs().max().item<double>());
  EXPECT_TRUE((error <= bound).all().item<bool>()) << what;
}

TEST_F(GpuTensors, grams_stay_within_the_bound_of_float32_sums) {
  for (const auto& [n, block] : {std::pair<std::int64_t, std::int64_t>{1024, 0}, {1000, 256}, {130, 64}, {3, 0}})
    for (const auto dtype : {at::kBFloat16, at::kFloat, at::kDouble}) {
      GramAccumulator gram(n, at::kCUDA, GramEngine::automatic, block);
      std::vector<at::Tensor> rows;
      for (const std::int64_t tokens : {2047, 1, 512}) {
        // Uneven columns, some far louder than others, and a mean: sums that cancel and sums that do not.
        const at::Tensor scale = at::pow(10.0, at::linspace(-2, 2, n)).to(at::kFloat);
        const at::Tensor all =
            (random_matrix(tokens + 1, n, at::kFloat, 7 + static_cast<std::uint64_t>(tokens)) + 0.3) * scale;
        const at::Tensor there = all.to(dtype).to(at::kCUDA);
        gram.add(there, 1);
        rows.push_back(there.narrow(0, 1, tokens));
        if (tokens == 1) (void)gram.packed();  // to the host and back
      }
      const double unit = dtype == at::kDouble ? 0x1p-52 : dtype == at::kBFloat16 ? 0x1p-23 : 0x1p-24;
      expect_within_bound(gram.full(), rows, unit, fmt::format("{} n {}", c10::toString(dtype), n).c_str());
    }
}

TEST_F(GpuTensors, grams_have_the_same_bits_in_every_run) {
  const at::Tensor x = random_matrix(2047, 1024, at::kFloat, 9).to(at::kBFloat16).to(at::kCUDA);
  GramAccumulator first(1024, at::kCUDA), second(1024, at::kCUDA);
  for (int i = 0; i < 3; ++i) {
    first.add(x);
    second.add(x);
    if (i == 1) (void)second.packed();
  }
  EXPECT_TRUE(at::equal(first.packed(), second.packed()));
}

}  // namespace
}  // namespace headfold::linalg
