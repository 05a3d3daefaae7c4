// How much of the machine's matrix-product rate a decoder layer reaches. Prints, for float32 and bfloat16, the rate of bare products on the
// layer's own shapes (weighted by their flops; the better of at::linear and the layer's own product kernel), the layer's time, and
//   share = necessary flops (projections and the causal half of attention) / time / rate.
// usage: bench_layer [tokens] [hidden] [ffn] [heads] [kv_heads] [repeats]

#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <headfold/model/model.h>

#include <chrono>
#include <cstdlib>

#include "product.h"

namespace {

using headfold::model::ModelConfig;

/// Best of several runs, in seconds: other work on the machine only ever adds.
template <class Work>
double best_seconds(int repeats, const Work& work) {
  double best = 1e30;
  for (int i = 0; i <= repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    work();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (i > 0) best = std::min(best, seconds);
  }
  return best;
}

void measure(const ModelConfig& config, std::int64_t tokens, at::ScalarType dtype, int repeats) {
  const auto layer = headfold::model::load_layer(config, 0, dtype, [&](const std::string& name, const std::vector<std::int64_t>& shape) {
    return name.find("norm") != std::string::npos ? at::ones(shape, at::kFloat) : at::randn(shape, at::kFloat).mul_(0.02);
  });
  const at::Tensor hidden = at::randn({1, tokens, config.hidden}, at::kFloat).to(dtype);

  struct Shape {
    std::int64_t out, in, count;
  };
  const std::int64_t d = config.head_dim;
  const std::vector<Shape> shapes = {{config.heads * d, config.hidden, 1},
                                     {config.kv_heads * d, config.hidden, 2},
                                     {config.hidden, config.heads * d, 1},
                                     {config.ffn, config.hidden, 2},
                                     {config.hidden, config.ffn, 1}};
  double flops = 0;
  double linear_seconds = 0;
  double product_seconds = 0;
  for (const Shape& shape : shapes) {
    const at::Tensor x = at::randn({tokens, shape.in}, at::kFloat).to(dtype);
    const at::Tensor w = at::randn({shape.out, shape.in}, at::kFloat).mul_(0.02).to(dtype);
    at::Tensor y = at::empty({tokens, shape.out}, dtype);
    const headfold::model::Product product(w, at::Tensor(), dtype);
    flops += 2.0 * static_cast<double>(shape.count * tokens * shape.out) * static_cast<double>(shape.in);
    linear_seconds += static_cast<double>(shape.count) * best_seconds(repeats, [&] { at::mm_out(y, x, w.t()); });
    product_seconds += static_cast<double>(shape.count) * best_seconds(repeats, [&] { product.apply(x, y); });
  }
  const double attention = 2.0 * static_cast<double>(config.heads * d) * static_cast<double>(tokens) * static_cast<double>(tokens + 1);
  const double seconds = best_seconds(repeats, [&] { layer->forward(hidden); });
  const double rate = flops / std::min(linear_seconds, product_seconds);
  fmt::print("{:9} T={} threads={}: at::mm {:7.1f} GF/s, own products {:7.1f} GF/s, layer {:7.1f} ms ({:.0f} GF/s), share {:.3f}\n",
             dtype == at::kFloat ? "float32" : "bfloat16", tokens, at::get_num_threads(), flops / linear_seconds * 1e-9,
             flops / product_seconds * 1e-9, seconds * 1e3, (flops + attention) / seconds * 1e-9, (flops + attention) / seconds / rate);
}

}  // namespace

int main(int argc, char** argv) {
  const auto option = [&](int index, std::int64_t fallback) { return argc > index ? std::atoll(argv[index]) : fallback; };
  const std::int64_t tokens = option(1, 2048);
  ModelConfig config;
  config.hidden = option(2, 4096);
  config.ffn = option(3, 11008);
  config.heads = option(4, 32);
  config.kv_heads = config.source_kv_heads = option(5, config.heads);
  config.head_dim = config.hidden / config.heads;
  config.layers = 1;
  config.vocab = 8;
  const int repeats = static_cast<int>(option(6, 3));
  for (const at::ScalarType dtype : {at::kBFloat16, at::kFloat}) measure(config, tokens, dtype, repeats);
  return 0;
}
