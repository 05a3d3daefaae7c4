// Seconds that folding one layer takes, part by part, without a checkpoint: random weights and moments of the given
// shape. One thread is timed by its CPU time, so that other work on the machine does not count; several by the clock on
// the wall. Prints what a plan needs (bases of all groups; not the held-out losses) and what applying it needs (bases
// again, and the new tensors). usage: bench_fold [threads] [group size] [hidden] [heads] [kv_heads] [polish sweeps]

#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <headfold/device/device.h>
#include <headfold/folding/apply.h>
#include <headfold/linalg/linalg.h>

#include <cstdlib>
#include <ctime>
#include <thread>

namespace {

using namespace headfold::folding;

/// Seconds of this thread, or of the wall clock when several work.
double now() {
  timespec time{};
  clock_gettime(at::get_num_threads() == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

LayerProblem layer(std::int64_t hidden, std::int64_t heads, std::int64_t kv_heads, std::int64_t block) {
  LayerProblem problem;
  LayerWeights& w = problem.weights;
  w.heads = heads;
  w.kv_heads = kv_heads;
  w.hidden = hidden;
  w.head_dim = hidden / heads;
  const auto random = [&](std::int64_t rows, std::int64_t columns) {
    return at::randn({rows, columns}, at::kFloat).mul_(0.02).to(at::kDouble);
  };
  w.query = random(heads * w.head_dim, hidden);
  w.key = random(kv_heads * w.head_dim, hidden);
  w.value = random(kv_heads * w.head_dim, hidden);
  w.output = random(hidden, heads * w.head_dim);
  LayerMoments& m = problem.moments;
  // Half as many samples as channels, and a floor: singular directions and a spectrum of some decades.
  const at::Tensor x =
      at::cat({at::randn({hidden / 2, hidden}, at::kDouble).add_(0.3), at::ones({hidden / 2, 1}, at::kDouble)}, 1);
  m.input = at::matmul(x.t(), x) / static_cast<double>(hidden / 2);
  m.mean = x.mean(0);
  m.centred = m.input - at::outer(m.mean, m.mean);
  const std::int64_t wide = block * w.head_dim;
  std::vector<at::Tensor> attended, means;
  for (std::int64_t h = 0; h < heads; ++h) {
    const at::Tensor y = at::randn({wide, wide}, at::kDouble);
    attended.push_back(at::matmul(y.t(), y) / static_cast<double>(wide));
    means.push_back(y.mean(0));
  }
  m.attended = at::stack(attended);
  m.attended_mean = at::stack(means);
  m.attended_heads = block;
  problem.has_moments = problem.rotates = true;
  problem.context = 4096;
  problem.frequencies =
      at::pow(10000.0, -2.0 * at::arange(w.head_dim / 2, at::kDouble) / static_cast<double>(w.head_dim));
  return problem;
}

}  // namespace

int main(int argc, char** argv) {
  headfold::device::restart_with_fast_blas(argv);
  headfold::device::keep_freed_memory();
  const auto option = [&](int index, std::int64_t fallback) {
    return argc > index ? std::atoll(argv[index]) : fallback;
  };
  const std::int64_t threads = option(1, std::max(1U, std::thread::hardware_concurrency()));
  const std::int64_t size = option(2, 2), hidden = option(3, 4096), heads = option(4, 32), kv_heads = option(5, heads);
  const std::int64_t sweeps = option(6, 3);
  at::set_num_threads(static_cast<int>(threads));
  at::manual_seed(1);
  LayerProblem problem = layer(hidden, heads, kv_heads, size);
  const std::int64_t d = problem.weights.head_dim;
  const Groups groups = contiguous_groups(kv_heads, kv_heads / size);
  const LayerTarget target{groups, d, d};
  fmt::print("hidden {}, {} heads, {} KV heads to {}, {} threads, {} {}\n", hidden, heads, kv_heads, groups.size(),
             threads, headfold::device::blas_library(), headfold::device::blas_kernels());
  const auto timed = [&](const std::string& what, const auto& work) {
    const double start = now();
    work();
    fmt::print("{:<58} {:8.3f} s\n", what, now() - start);
    std::fflush(stdout);
  };
  const auto count = static_cast<std::int64_t>(groups.size());
  const auto each_group = [&](const auto& work) {
    for_each_item(count, [&](std::int64_t g) { work(groups[static_cast<std::size_t>(g)]); });
  };
  FoldOptions options;
  options.kv_heads = kv_heads / size;

  timed("a product W M (the yardstick)", [&] {
    for_each_item(kv_heads, [&](std::int64_t k) {
      at::matmul(problem.weights.value.slice(0, k * d, (k + 1) * d),
                 problem.moments.input.slice(0, 0, hidden).slice(1, 0, hidden));
    });
  });
  {
    FoldOptions plain = options;
    plain.value_metric = Metric::act;
    const auto plan = [&](const LayerProblem& of) {
      each_group([&](const auto& g) {
        value_basis(of, g, plain);
        value_conditioning(of, g, plain);
      });
    };
    LayerProblem measured = problem;
    at::Tensor gram = at::empty({kv_heads * d, kv_heads * d}, at::kDouble);
    const at::Tensor rows = augmented(problem.weights.value, problem.weights.value_bias);
    gram.copy_(at::matmul(at::matmul(rows, problem.moments.input), rows.t()));
    measured.moments.values.add(1, headfold::linalg::pack_lower(headfold::linalg::symmetric_part(gram)));
    measured.moments.input = at::Tensor();
    measured.group_grams = make_group_grams(measured);
    timed("plan: values, act, Gram of values in the statistics", [&] { plan(measured); });
    LayerProblem products = problem;
    products.group_grams = make_group_grams(products);
    timed("plan: values, act, without it", [&] { plan(products); });
  }
  timed("plan: keys, rope-commuting act+query",
        [&] { each_group([&](const auto& g) { key_basis(problem, g, options); }); });
  problem.group_grams = make_group_grams(problem);
  options.value_metric = Metric::act_out;
  timed("plan: values, act+out", [&] { each_group([&](const auto& g) { value_basis(problem, g, options); }); });
  timed("  again, products kept", [&] { each_group([&](const auto& g) { value_basis(problem, g, options); }); });
  options.value_metric = Metric::attn_out;
  timed("plan: values, attn+out", [&] { each_group([&](const auto& g) { value_basis(problem, g, options); }); });
  options.polish = sweeps;
  timed(fmt::format("plan: values, attn+out, {} sweeps", sweeps),
        [&] { each_group([&](const auto& g) { value_basis(problem, g, options); }); });
  options.polish = 0;
  timed("conditioning of the values",
        [&] { each_group([&](const auto& g) { value_conditioning(problem, g, options); }); });
  timed("apply: keys", [&] { folded_keys(problem, target, options); });
  options.value_metric = Metric::act_out;
  timed("apply: values, act+out, products kept", [&] { folded_values(problem, target, options); });
  options.values = ValueFold::procrustes;
  timed("plan: values, procrustes, products kept",
        [&] { each_group([&](const auto& g) { value_basis(problem, g, options); }); });
  return 0;
}
