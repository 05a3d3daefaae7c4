// How much of the machine's matrix-product rate a decoder layer reaches. Prints, for float32 and bfloat16, the rate of
// bare products on the layer's own shapes (weighted by their flops; the better of at::linear and the layer's own
// product kernel), the layer's time, and
//   share = necessary flops (projections and the causal half of attention) / time / rate.
// One thread is timed by its CPU time, so that other work on the machine does not count; several by the clock on the
// wall. usage: bench_layer [tokens] [threads] [hidden] [ffn] [heads] [kv_heads] [repeats]

#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <headfold/model/model.h>

#include <cstdlib>
#include <ctime>
#include <memory>
#include <thread>

#include "product.h"

namespace {

using headfold::model::ModelConfig;

/// Seconds of this thread, or of the wall clock when several work.
double now() {
  timespec time{};
  clock_gettime(at::get_num_threads() == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

/// The shortest of several runs: disturbances only ever add.
class Best {
 public:
  template <class Work>
  void measure(const Work& work) {
    const double start = now();
    work();
    seconds_ = std::min(seconds_, now() - start);
  }
  double seconds() const { return seconds_; }

 private:
  double seconds_ = 1e30;
};

void measure(const ModelConfig& config, std::int64_t tokens, at::ScalarType dtype, int repeats) {
  const auto layer = headfold::model::load_layer(
      config, 0, dtype, [&](const std::string& name, const std::vector<std::int64_t>& shape) {
        return name.find("norm") != std::string::npos ? at::ones(shape, at::kFloat)
                                                      : at::randn(shape, at::kFloat).mul_(0.02);
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
  struct Subject {
    std::int64_t count;
    at::Tensor x, w, y;
    std::unique_ptr<headfold::model::Product> product;
    Best linear, own;
  };
  std::vector<Subject> subjects;
  double flops = 0;
  for (const Shape& shape : shapes) {
    const at::Tensor w = at::randn({shape.out, shape.in}, at::kFloat).mul_(0.02).to(dtype);
    subjects.push_back({shape.count,
                        at::randn({tokens, shape.in}, at::kFloat).to(dtype),
                        w,
                        at::empty({tokens, shape.out}, dtype),
                        std::make_unique<headfold::model::Product>(w, at::Tensor(), dtype),
                        {},
                        {}});
    flops += 2.0 * static_cast<double>(shape.count * tokens * shape.out) * static_cast<double>(shape.in);
  }
  Best whole;
  layer->forward(hidden);
  // Bare products and the layer take turns, so that both see the machine in the same moods.
  for (int i = 0; i <= repeats; ++i) {
    for (Subject& subject : subjects) {
      subject.own.measure([&] { subject.product->apply(subject.x, subject.y); });
      if (i <= 1) subject.linear.measure([&] { at::mm_out(subject.y, subject.x, subject.w.t()); });
    }
    whole.measure([&] { layer->forward(hidden); });
  }
  double linear_seconds = 0;
  double product_seconds = 0;
  for (const Subject& subject : subjects) {
    linear_seconds += static_cast<double>(subject.count) * subject.linear.seconds();
    product_seconds += static_cast<double>(subject.count) * subject.own.seconds();
  }
  const double attention =
      2.0 * static_cast<double>(config.heads * d) * static_cast<double>(tokens) * static_cast<double>(tokens + 1);
  const double seconds = whole.seconds();
  const double rate = flops / std::min(linear_seconds, product_seconds);
  fmt::print(
      "{:9} T={} threads={}: at::mm {:7.1f} GF/s, own products {:7.1f} GF/s, layer {:7.1f} ms ({:.0f} GF/s), share "
      "{:.3f}\n",
      dtype == at::kFloat ? "float32" : "bfloat16", tokens, at::get_num_threads(), flops / linear_seconds * 1e-9,
      flops / product_seconds * 1e-9, seconds * 1e3, (flops + attention) / seconds * 1e-9,
      (flops + attention) / seconds / rate);
}

}  // namespace

int main(int argc, char** argv) {
  const auto option = [&](int index, std::int64_t fallback) {
    return argc > index ? std::atoll(argv[index]) : fallback;
  };
  const std::int64_t tokens = option(1, 2048);
  at::set_num_threads(static_cast<int>(option(2, std::max(1U, std::thread::hardware_concurrency()))));
  ModelConfig config;
  config.hidden = option(3, 4096);
  config.ffn = option(4, 11008);
  config.heads = option(5, 32);
  config.kv_heads = config.source_kv_heads = option(6, config.heads);
  config.head_dim = config.hidden / config.heads;
  config.layers = 1;
  config.vocab = 8;
  const int repeats = static_cast<int>(option(7, 3));
  for (const at::ScalarType dtype : {at::kBFloat16, at::kFloat}) measure(config, tokens, dtype, repeats);
  return 0;
}
