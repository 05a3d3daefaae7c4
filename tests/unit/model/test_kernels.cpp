#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <headfold/base/onednn.h>
#include <headfold/base/stop.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"
#include "product.h"
#include "small_models.h"

namespace headfold::model {
namespace {

using testing_models::relative_difference;

TEST(ProductTest, operands_are_transposed_and_results_added_on_demand) {
  at::manual_seed(6);
  for (const bool onednn : {false, true}) {
    use_onednn(onednn);
    for (const auto& [dtype, result] : {std::pair(at::kFloat, at::kFloat),
                                        {at::kDouble, at::kDouble},
                                        {at::kBFloat16, at::kFloat},
                                        {at::kBFloat16, at::kBFloat16}}) {
      for (const int bits : {0, 1, 2, 3, 4, 5, 6, 7}) {
        const Operation operation{(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0};
        const at::Tensor a = at::randn({17, 9}, at::kDouble).to(dtype), b = at::randn({9, 13}, at::kDouble).to(dtype);
        // Both stand in wider matrices.
        const at::Tensor own_a = at::cat(
            {operation.transpose_a ? a.t() : a, at::zeros({operation.transpose_a ? 9 : 17, 3}, a.options())}, 1);
        const at::Tensor own_b = at::cat(
            {operation.transpose_b ? b.t() : b, at::zeros({operation.transpose_b ? 13 : 9, 2}, b.options())}, 1);
        const at::Tensor c = at::randn({17, 16}, at::kDouble).to(result);
        const at::Tensor expected = at::matmul(a.to(at::kDouble), b.to(at::kDouble)) +
                                    (operation.accumulate ? 1 : 0) * c.slice(1, 0, 13).to(at::kDouble);
        multiply({own_a.data_ptr(), own_a.size(0), own_a.size(1) - 3, own_a.size(1)},
                 {own_b.data_ptr(), own_b.size(0), own_b.size(1) - 2, own_b.size(1)}, operation, dtype, c.data_ptr(),
                 16, result);
        EXPECT_LE(relative_difference(c.slice(1, 0, 13), expected), result == at::kBFloat16 ? 1e-2 : 1e-5)
            << onednn << " " << c10::toString(dtype) << " " << bits;
      }
    }
  }
  use_onednn(true);
}

// oneDNN before 3.12 does not bear handlers that run on its threads' stacks (base/stop.cpp): as on a processor without
// AVX-512 this ended in wrong numbers and a damaged heap within a few signals.
TEST(ProductTest, signals_that_ask_to_stop_do_not_disturb_products) {
  listen_for_stop();
  at::manual_seed(9);
  const at::Tensor x = at::randn({63, 256}), weight = at::randn({256, 256});
  const auto product = [&] {
    at::Tensor y = at::empty({63, 256});
    multiply({x.data_ptr(), 63, 256, 256}, {weight.data_ptr(), 256, 256, 256}, true, at::kFloat, y.data_ptr(), 256,
             at::kFloat);
    return y;
  };
  const at::Tensor expected = product();
  std::atomic<bool> done{false};
  std::atomic<int> sent{0};
  std::thread sender([&] {
    while (!done) {
      if (::kill(::getpid(), SIGUSR1) == 0) ++sent;
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
  });
  int computed = 0, wrong = 0;
  // What lies around the kernels' own memory.
  std::vector<std::vector<unsigned char>> neighbours(200);
  std::mt19937 random(3);
  for (; sent < 1000 && computed < 1000000; ++computed) {
    if (!at::equal(product(), expected)) ++wrong;
    std::vector<unsigned char>& one = neighbours[random() % neighbours.size()];
    if (std::any_of(one.begin(), one.end(), [](unsigned char byte) { return byte != 0xA5; })) ++wrong;
    one = std::vector<unsigned char>(1 + random() % 9000, 0xA5);
  }
  done = true;
  sender.join();
  EXPECT_EQ(wrong, 0) << "of " << computed;
  EXPECT_GE(sent, 1000);
  EXPECT_TRUE(stop_requested());
}

TEST(KernelsTest, exponential_is_std_exp_to_the_last_bits) {
  std::vector<float> x, y;
  for (float v = -87.0F; v <= 88.0F; v += 0.00137F) x.push_back(v);
  for (const float v : {0.0F, -0.0F, 1e-30F, -200.0F, -std::numeric_limits<float>::infinity()}) x.push_back(v);
  y.resize(x.size());
  for (const auto& kernel : kernels::variants(at::kFloat)) {
    kernel.exponential(x.data(), y.data(), static_cast<std::int64_t>(x.size()));
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double expected = x[i] < -87.0F ? 0.0 : std::exp(static_cast<double>(x[i]));
      ASSERT_LE(std::abs(y[i] - expected), 3e-7 * expected) << kernel.isa << " exp(" << x[i] << ")";
    }
    float nan = std::numeric_limits<float>::quiet_NaN();
    kernel.exponential(&nan, &nan, 1);
    EXPECT_TRUE(std::isnan(nan)) << kernel.isa;
  }
}

/// Every kernel of every instruction set against ATen in float64, at lengths with and without remainders.
class KernelsOfType : public testing::TestWithParam<at::ScalarType> {};

TEST_P(KernelsOfType, agree_with_plain_formulas) {
  const at::ScalarType dtype = GetParam();
  const double bound =
      dtype == at::kFloat ? 2e-6 : 8e-3;  // bfloat16: one rounding is 2^-9, RMSNorm and products have two
  at::manual_seed(3);
  for (const auto& kernel : kernels::variants(dtype)) {
    for (const std::int64_t n : {1, 2, 15, 64, 333}) {
      SCOPED_TRACE(fmt::format("{} n={}", kernel.isa, n));
      const at::Tensor x = (at::randn({n}, at::kFloat) * 3).to(dtype);
      const at::Tensor w = at::randn({n}, at::kFloat).to(dtype);
      const at::Tensor b = at::randn({n}, at::kFloat).to(dtype);
      const at::Tensor X = x.to(at::kDouble), W = w.to(at::kDouble), B = b.to(at::kDouble);
      at::Tensor y = at::empty_like(x);

      kernel.rms_norm(x.data_ptr(), w.data_ptr(), y.data_ptr(), n, 1e-5F);
      EXPECT_LE(relative_difference(y, X / at::sqrt((X * X).mean() + 1e-5) * W), bound);
      if (n > 2) {  // one or two elements: the variance cancels
        kernel.layer_norm(x.data_ptr(), w.data_ptr(), b.data_ptr(), y.data_ptr(), n, 1e-5F);
        const at::Tensor centred = X - X.mean();
        EXPECT_LE(relative_difference(y, centred / at::sqrt((centred * centred).mean() + 1e-5) * W + B), bound);
      }
      // Derivatives: dy = u, what stands in dx (v) stays.
      const at::Tensor u = at::randn({n}, at::kFloat).to(dtype), v = at::randn({n}, at::kFloat).to(dtype);
      const at::Tensor U = u.to(at::kDouble), V = v.to(at::kDouble);
      at::Tensor dw = at::ones({n}, at::kFloat), db = at::ones({n}, at::kFloat);
      const at::Tensor r = 1 / at::sqrt((X * X).mean() + 1e-5);
      y.copy_(v);
      kernel.rms_norm_backward(x.data_ptr(), w.data_ptr(), u.data_ptr(), y.data_ptr(), dw.data_ptr<float>(), n, 1e-5F);
      EXPECT_LE(relative_difference(y, V + r * (U * W - X * r * r * (X * U * W).mean())), bound);
      EXPECT_LE(relative_difference(dw, 1 + U * X * r), bound);
      if (n > 2) {
        const at::Tensor c = X - X.mean(), q = 1 / at::sqrt((c * c).mean() + 1e-5), g = U * W;
        y.copy_(v);
        dw.fill_(1);
        kernel.layer_norm_backward(x.data_ptr(), w.data_ptr(), u.data_ptr(), y.data_ptr(), dw.data_ptr<float>(),
                                   db.data_ptr<float>(), n, 1e-5F);
        EXPECT_LE(relative_difference(y, V + q * (g - g.mean() - c * q * q * (c * g).mean())), bound);
        EXPECT_LE(relative_difference(dw, 1 + U * c * q), bound);
        EXPECT_LE(relative_difference(db, 1 + U), bound);
      }
      const at::Tensor gate = x.clone(), up = w.clone(), sigmoid = 1 / (1 + at::exp(-X));
      kernel.silu_times_backward(gate.data_ptr(), up.data_ptr(), u.data_ptr(), n);
      EXPECT_LE(relative_difference(gate, U * W * sigmoid * (1 + X * (1 - sigmoid))), bound);
      EXPECT_LE(relative_difference(up, U * X * sigmoid), bound);
      const at::Tensor tanh = at::tanh(0.79788456 * X * (1 + 0.044715 * X * X));
      y.copy_(x);
      kernel.gelu_backward(y.data_ptr(), u.data_ptr(), n);
      EXPECT_LE(relative_difference(
                    y, U * 0.5 * (1 + tanh + X * (1 - tanh * tanh) * 0.79788456 * (1 + 3 * 0.044715 * X * X))),
                bound);
      const at::Tensor p = at::softmax(X, 0).to(dtype), dp = U.to(at::kFloat), P = p.to(at::kDouble);
      kernel.softmax_backward(p.data_ptr(), dp.data_ptr<float>(), y.data_ptr(), n, 0.7F);
      // What is left of the difference may be rounding, of one or two entries it is.
      if (n > 2) {
        EXPECT_LE(relative_difference(y, 0.7 * P * (U - (P * U).sum())), 2 * bound);
      }
      y.copy_(x);
      kernel.drop(y.data_ptr(), n, 12345, 20000, 2.0F);
      for (std::int64_t i = 0; i < n; ++i) {
        const bool drops =
            (kernels::mixed_bits(12345 + static_cast<std::uint64_t>(i / 4 * 4)) >> (i % 4 * 16) & 0xffff) < 20000;
        EXPECT_EQ(y[i].item<float>(), drops ? 0 : 2 * x[i].item<float>()) << i;
      }

      y.copy_(x);
      kernel.silu_times(y.data_ptr(), w.data_ptr(), n);
      EXPECT_LE(relative_difference(y, X / (1 + at::exp(-X)) * W), bound);
      y.copy_(x);
      kernel.gelu(y.data_ptr(), n);
      EXPECT_LE(relative_difference(y, 0.5 * X * (1 + at::tanh(0.79788456 * X * (1 + 0.044715 * X * X)))), bound);

      const at::Tensor angles = at::randn({n}, at::kFloat);
      const at::Tensor cosine = angles.cos(), sine = angles.sin();
      const at::Tensor pairs = at::randn({2 * n}, at::kFloat).to(dtype);
      at::Tensor rotated = at::empty_like(pairs);
      kernel.rotate(pairs.data_ptr(), cosine.data_ptr<float>(), sine.data_ptr<float>(), rotated.data_ptr(), n);
      const at::Tensor low = pairs.slice(0, 0, n).to(at::kDouble), high = pairs.slice(0, n).to(at::kDouble);
      EXPECT_LE(relative_difference(rotated, at::cat({low * cosine - high * sine, high * cosine + low * sine})), bound);

      const at::Tensor rows = at::randn({7, n + 3}, at::kFloat).to(dtype);
      at::Tensor sums = at::empty({7}, at::kFloat);
      kernel.dots(x.data_ptr(), rows.data_ptr(), n + 3, 7, n, sums.data_ptr<float>());
      const at::Tensor terms = rows.slice(1, 0, n).to(at::kDouble) * X;
      EXPECT_LE(((sums - terms.sum(1)).abs() / terms.abs().sum(1)).max().item<double>(), 1e-5);
      at::Tensor loaded = at::empty({n}, at::kFloat);
      kernel.load(x.data_ptr(), loaded.data_ptr<float>(), n);
      EXPECT_TRUE(at::equal(loaded, x.to(at::kFloat)));
      at::Tensor sum = at::ones({n}, at::kFloat);
      kernel.add_scaled(sum.data_ptr<float>(), 0.5F, x.data_ptr(), n);
      EXPECT_LE(relative_difference(sum, 1 + 0.5 * X), 1e-6);
      kernel.store(sum.data_ptr<float>(), y.data_ptr(), n);
      EXPECT_TRUE(at::equal(y, sum.to(dtype)));  // ties and all: ATen's own rounding

      for (const float slope : {0.0F, 0.3F}) {
        at::Tensor scores = at::randn({n + 5}, at::kFloat) * 4;
        at::Tensor visible = scores.slice(0, 0, n).to(at::kDouble) * 0.125;
        if (slope != 0) visible = visible + (at::arange(n, at::kFloat) * slope).to(dtype).to(at::kDouble);
        at::Tensor probabilities = at::empty({n + 5}, dtype);
        kernel.softmax(scores.data_ptr<float>(), probabilities.data_ptr(), {n, n + 5, 0.125F, slope});
        // Scores reach 100, whose float rounding alone moves a probability by 100 * 2^-24.
        EXPECT_LE(relative_difference(probabilities.slice(0, 0, n), at::softmax(visible, 0)), std::max(bound, 1e-5));
        EXPECT_EQ(probabilities.slice(0, n).abs().max().item<float>(), 0);
      }
    }
  }
}

TEST_P(KernelsOfType, rounding_keeps_special_values) {
  const at::ScalarType dtype = GetParam();
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> values = {0.0F, -0.0F, infinity, -infinity, 1.00390625F, 3.3e38F, 1e-40F};
  for (const auto& kernel : kernels::variants(dtype)) {
    at::Tensor stored = at::empty({7}, dtype);
    kernel.store(values.data(), stored.data_ptr(), 7);
    const at::Tensor expected = at::tensor(values, at::kFloat).to(dtype);
    EXPECT_TRUE(at::equal(stored, expected)) << kernel.isa;
    const float nan = std::numeric_limits<float>::signaling_NaN();
    kernel.store(&nan, stored.data_ptr(), 1);
    EXPECT_TRUE(std::isnan(stored[0].item<float>())) << kernel.isa;
  }
}

INSTANTIATE_TEST_SUITE_P(Types, KernelsOfType, testing::Values(at::kFloat, at::kBFloat16),
                         [](const auto& instance) { return std::string(c10::toString(instance.param)); });

/// Products on both backends against ATen in float64.
TEST(ProductTest, both_backends_agree_with_float64) {
  at::manual_seed(5);
  const bool before = uses_onednn();
  for (const bool onednn : {true, false}) {
    use_onednn(onednn);
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      const double bound = dtype == at::kFloat ? 4e-6 : 1e-2;
      for (const auto& [rows, in, out] : {std::tuple{1, 64, 96},
                                          {3, 40, 70},
                                          {5, 33, 7},
                                          {48, 96, 100},
                                          {300, 64, 200},
                                          {1, 1, 1},
                                          {1100, 24, 1050},
                                          {70, 17000, 6}}) {
        SCOPED_TRACE(fmt::format("oneDNN {} {} {}x{}x{}", uses_onednn(), c10::toString(dtype), rows, in, out));
        const at::Tensor w = at::randn({out, in}, at::kFloat).to(dtype), b = at::randn({out}, at::kFloat).to(dtype);
        // Rows inside a wider matrix, on both sides.
        const at::Tensor x = at::randn({rows, in + 8}, at::kFloat).to(dtype).slice(1, 4, 4 + in);
        const at::Tensor y = at::randn({rows, out + 3}, at::kFloat).to(dtype).slice(1, 1, 1 + out);
        const at::Tensor old = y.to(at::kDouble).clone();
        const at::Tensor exact = at::matmul(x.to(at::kDouble), w.to(at::kDouble).t());
        Product(w, at::Tensor(), dtype).apply(x, y);
        EXPECT_LE(relative_difference(y, exact), bound);
        y.copy_(old);
        const Product biased(w, b, dtype);
        biased.apply(x, y, true);
        EXPECT_LE(relative_difference(y, old + exact + b.to(at::kDouble)), bound);
        biased.apply(x, y);
        EXPECT_LE(relative_difference(y, exact + b.to(at::kDouble)), bound);
        EXPECT_GE(biased.bytes(), out * (in + 1) * static_cast<std::int64_t>(c10::elementSize(dtype)));

        const at::Tensor k = at::randn({out, in}, at::kFloat).to(dtype);
        const at::Tensor q = x.contiguous();
        at::Tensor scores = at::empty({rows, out}, at::kFloat);
        multiply({q.data_ptr(), rows, in, in}, {k.data_ptr(), out, in, in}, true, dtype, scores.data_ptr(), out,
                 at::kFloat);
        EXPECT_LE(relative_difference(scores, at::matmul(q.to(at::kDouble), k.to(at::kDouble).t())), 2e-6);
        const at::Tensor v = k.t().contiguous();
        multiply({q.data_ptr(), rows, in, in}, {v.data_ptr(), in, out, out}, false, dtype, scores.data_ptr(), out,
                 at::kFloat);
        EXPECT_LE(relative_difference(scores, at::matmul(q.to(at::kDouble), v.to(at::kDouble))), 2e-6);
      }
    }
  }
  use_onednn(before);
}

#if defined(HEADFOLD_WITH_ONEDNN) && defined(__x86_64__)
/// What the same tests without AVX-512 rest on.
TEST(ProductTest, bfloat16_needs_avx512) {
  const char* most = std::getenv("ONEDNN_MAX_CPU_ISA");
  EXPECT_EQ(onednn::multiplies_bfloat16(),
            (most == nullptr || std::string(most) != "AVX2") && __builtin_cpu_supports("avx512bw") != 0);
}
#endif

TEST(ProductTest, result_does_not_depend_on_the_number_of_threads) {
  at::manual_seed(6);
  const int before = at::get_num_threads();
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const auto& [rows, in, out] : {std::tuple{1, 512, 640}, {17, 1024, 256}, {256, 300, 64}, {64, 4096, 32}}) {
      const Product product(at::randn({out, in}, at::kFloat), at::Tensor(), dtype);
      const at::Tensor x = at::randn({rows, in}, at::kFloat).to(dtype);
      std::vector<at::Tensor> results;
      for (const int threads : {1, 2, 3}) {
        at::set_num_threads(threads);
        results.push_back(at::empty({rows, out}, dtype));
        product.apply(x, results.back());
      }
      EXPECT_TRUE(at::equal(results[0], results[1])) << c10::toString(dtype) << " " << rows << "x" << in << "x" << out;
      EXPECT_TRUE(at::equal(results[0], results[2])) << c10::toString(dtype) << " " << rows << "x" << in << "x" << out;
    }
  }
  at::set_num_threads(before);
}

}  // namespace
}  // namespace headfold::model
