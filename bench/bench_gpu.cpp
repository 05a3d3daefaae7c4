// Rates of what runs on a GPU, and the sizes from which it pays. Wall clock, median of several runs after one that
// warms up. What cannot be measured here ends with exit code 69.
//
// bench_gpu eigen [largest]: seconds of eigen-decompositions on the host and on the GPU (there and back), by size;
// without a GPU the host's. The smallest size from which the GPU is always faster is what set_gpu_threshold() wants.
//
// bench_gpu gram [tokens]: Grams of bfloat16 rows on the GPU by width and block, beside the plain product.
//
// bench_gpu product HIDDEN FFN [ROWS] [cpu|cuda]: bfloat16 products of a layer's shapes, x W^T, in FLOP/s (default: of
// a GPU where there is one, else of the CPU): what tests/gpu/scale measures the jobs by.
//
// bench_gpu link: bytes per second of an all-reduce between two ranks or more (mpirun), by size and transport.

#include <fmt/format.h>
#include <headfold/base/cuda.h>
#include <headfold/comm/device_link.h>
#include <headfold/device/device.h>
#include <headfold/device/gpu.h>
#include <headfold/linalg/cusolver.h>
#include <headfold/linalg/linalg.h>
#include <headfold/model/product.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <string>
#include <vector>

namespace {

using namespace headfold;

bool gpu_there() {
  return !device::visible_gpus().empty();
}

void synchronize() {
#ifdef HEADFOLD_WITH_CUDA
  if (gpu_there()) cuda::check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
#endif
}

/// Median seconds of `work` and of the GPU work it starts.
double measured(int repeat, const std::function<void()>& work) {
  std::vector<double> seconds;
  for (int i = -1; i < repeat; ++i) {
    synchronize();
    const auto start = std::chrono::steady_clock::now();
    work();
    synchronize();
    if (i >= 0) seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::nth_element(seconds.begin(), seconds.begin() + repeat / 2, seconds.end());
  return seconds[static_cast<std::size_t>(repeat / 2)];
}

void say(const std::string& line) {
  std::cout << line << std::endl;
}

/// Exit code of what needs something that is not here (EX_UNAVAILABLE).
int missing(const std::string& what) {
  std::cerr << what << std::endl;
  return 69;
}

bool tensors_on_gpu() {
  return gpu_there() && at::hasCUDA();
}

at::Tensor random_gram(std::int64_t batch, std::int64_t n, at::ScalarType dtype) {
  const at::Tensor x = at::randn({batch, n, n}, at::TensorOptions().dtype(dtype));
  return at::matmul(x, linalg::conjugate_transpose(x));
}

/// Both through eigh_batched(), with its checks.
void bench_eigen(std::int64_t largest) {
  const auto row = [](std::int64_t batch, std::int64_t n, at::ScalarType dtype) {
    const at::Tensor matrices = random_gram(batch, n, dtype);
    const int repeat = n >= 1024 ? 1 : 5;
    const double host = measured(repeat, [&] { linalg::eigh_batched(matrices); });
    std::string line = fmt::format("eigen {:<13} {:>3} x {:<5} host {:.2e} s", c10::toString(dtype), batch, n, host);
    if (gpu_there()) {
      linalg::set_backend(linalg::Backend::cusolver);
      linalg::set_gpu_threshold(1);
      if (!linalg::cusolver_eigh(matrices.slice(0, 0, 1)))
        line += ", the GPU cannot";
      else
        line += fmt::format(", GPU {:.2e} s", measured(repeat, [&] { linalg::eigh_batched(matrices); }));
      linalg::set_backend(linalg::Backend::lapack);
    }
    say(line);
  };
  for (const auto dtype : {at::kDouble, at::kComplexDouble}) {
    for (std::int64_t n = 32; n <= largest; n *= 2) row(1, n, dtype);
    for (const std::int64_t n : {4, 8, 32}) row(64, n, dtype);
    row(32, 128, dtype);
  }
}

int bench_gram(std::int64_t tokens) {
  if (!tensors_on_gpu()) return missing("bench_gpu gram: needs a GPU and a libtorch with CUDA");
  for (const std::int64_t n : {4096, 5120, 8192}) {
    const at::Tensor x = at::randn({tokens, n}).to(at::kBFloat16).to(at::kCUDA);
    const double flops = static_cast<double>(n) * static_cast<double>(n) * static_cast<double>(tokens);
    at::Tensor out = at::empty({n, n}, x.options());
    const double plain = measured(20, [&] { at::mm_out(out, x.t(), x); });
    say(fmt::format("gram n {} tokens {}: plain bfloat16 product {:.3f} ms, {:.0f} TFLOP/s", n, tokens, 1e3 * plain,
                    2 * flops / plain / 1e12));
    for (const std::int64_t block : {std::int64_t{512}, std::int64_t{1024}, std::int64_t{2048}, n}) {
      linalg::GramAccumulator gram(n, at::kCUDA, linalg::GramEngine::automatic, block);
      const double own = measured(20, [&] { gram.add(x); });
      say(fmt::format("  block {:<5} {:.3f} ms, {:.0f} TFLOP/s of 2 n^2 t: {:.2f} of the plain product's rate", block,
                      1e3 * own, 2 * flops / own / 1e12, plain / own));
    }
  }
  return 0;
}

int bench_link(const comm::Communicator& world) {
  if (world.size() < 2) return missing("bench_gpu link: needs two ranks or more: mpirun -np 2 bench_gpu link");
  const auto gpus = static_cast<int>(device::visible_gpus().size());
  const int own = tensors_on_gpu() ? world.rank() % gpus : -1;
  device::use_gpu(own);
  std::vector<comm::Transport> transports = {comm::Transport::mpi};
  {
    const comm::DeviceLink best(world, own);
    if (best.transport() == comm::Transport::nccl) transports.push_back(comm::Transport::nccl);
  }
  for (const comm::Transport transport : transports) {
    const comm::DeviceLink link(world, own, transport);
    for (std::int64_t count = 1 << 14; count <= 1 << 24; count <<= 5) {
      const at::Tensor values = at::zeros({count}, at::TensorOptions().device(own < 0 ? at::kCPU : at::kCUDA));
      const double seconds = measured(5, [&] { link.all_reduce(values).wait(); });
      if (world.root())
        say(fmt::format("all-reduce {:<4} {} ranks, {}: {:>9} bytes {:.2e} s, {:.2f} GB/s", name_of(transport),
                        world.size(), own < 0 ? "host" : "GPU", 4 * count, seconds,
                        4e-9 * static_cast<double>(count) / seconds));
    }
  }
  return 0;
}

int usage() {
  say("usage: bench_gpu eigen [largest] | gram [tokens] | product HIDDEN FFN [ROWS] [cpu|cuda] | link");
  return 64;
}

/// One line of JSON: the rate over the products of a layer, q, k, v and o [hidden, hidden], gate, up [ffn, hidden] and
/// down [hidden, ffn], for `rows` rows.
int bench_product(std::int64_t hidden, std::int64_t ffn, std::int64_t rows, const std::string& where) {
  if (where == "cuda" && !tensors_on_gpu()) return missing("bench_gpu product: needs a GPU and a libtorch with CUDA");
  const at::Device device(where == "cpu" || !tensors_on_gpu() ? at::kCPU : at::kCUDA);
  const auto options = at::TensorOptions().dtype(at::kBFloat16).device(device);
  double seconds = 0, operations = 0;
  for (const auto& [out, in, count] :
       {std::tuple(hidden, hidden, 4), std::tuple(ffn, hidden, 2), std::tuple(hidden, ffn, 1)}) {
    const at::Tensor x = at::randn({rows, in}, options), w = at::randn({out, in}, options);
    at::Tensor y = at::empty({rows, out}, options);
    const double one = measured(device.is_cuda() ? 20 : 3, [&, &in_features = in, &out_features = out] {
      if (device.is_cuda()) {
        at::mm_out(y, x, w.t());
      } else {
        model::multiply({x.data_ptr(), rows, in_features, in_features},
                        {w.data_ptr(), out_features, in_features, in_features}, true, at::kBFloat16, y.data_ptr(),
                        out_features, at::kBFloat16);
      }
    });
    seconds += one * count;
    operations += 2.0 * static_cast<double>(rows) * static_cast<double>(out) * static_cast<double>(in) * count;
  }
  say(fmt::format(R"({{"device": "{}", "rows": {}, "hidden": {}, "ffn": {}, "flop_per_second": {:.6g}}})", device.str(),
                  rows, hidden, ffn, operations / seconds));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  device::restart_with_fast_blas(argv);
  const comm::Environment environment(&argc, &argv);
  const std::string what = argc > 1 ? argv[1] : "";
  const std::int64_t size = argc > 2 ? std::atoll(argv[2]) : 0;
  at::manual_seed(1);
  if (what == "gram") return bench_gram(size > 0 ? size : 2048);
  if (what == "link") return bench_link(environment.world());
  if (what == "product") {
    std::vector<std::int64_t> sizes;  // hidden, ffn, rows
    std::string where;
    for (int i = 2; i < argc; ++i) {
      const std::string word = argv[i];
      if (i + 1 == argc && (word == "cpu" || word == "cuda")) {
        where = word;
        continue;
      }
      constexpr std::int64_t kMost = 1 << 20;
      char* end = nullptr;
      sizes.push_back(std::strtoll(word.c_str(), &end, 10));
      if (*end != 0 || sizes.back() < 1 || sizes.back() > kMost) return usage();
    }
    if (sizes.size() == 2) sizes.push_back(2048);
    return sizes.size() == 3 ? bench_product(sizes[0], sizes[1], sizes[2], where) : usage();
  }
  if (what != "eigen") return usage();
  bench_eigen(size > 0 ? size : 4096);
  return 0;
}
