// What share of the matrix-product rate calibration reaches at the layer shapes of LLaMA2-7B (docs/performance.md,
// section "Calibration").
//
//   bench_calibrate [--model DIR] [--tokens 2048] [--repeat 5] [--threads N] [--gram-only] [--all-statistics]
//
// Without --model, a checkpoint of one layer of random weights is written to a temporary folder. The rate is that of
// bare products on the layer's own shapes, the better of at::linear and the product kernel of src/model (libtorch's
// BLAS may have picked slow kernels). --all-statistics also measures what half-sample sums and attention statistics
// cost. Every repetition measures products and calibration right after one another, so
// that a busy machine slows both; medians are printed. With one thread, CPU time is measured instead of wall time:
// other processes then cost only what they take of the caches.

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <headfold/base/json.h>
#include <headfold/base/log.h>
#include <headfold/calibration/collect.h>
#include <headfold/checkpoint/reader.h>
#include <headfold/checkpoint/safetensors.h>
#include <headfold/device/measure.h>
#include <headfold/model/model.h>
#include <time.h>

#include <iostream>

#include "product.h"

namespace {

namespace fs = std::filesystem;
using namespace headfold;
using bench::median;
using bench::seconds;

void write_model(const fs::path& folder) {
  write_json(folder / "config.json", Json{{"architectures", {"LlamaForCausalLM"}},
                                          {"model_type", "llama"},
                                          {"hidden_act", "silu"},
                                          {"hidden_size", 4096},
                                          {"intermediate_size", 11008},
                                          {"num_hidden_layers", 1},
                                          {"num_attention_heads", 32},
                                          {"num_key_value_heads", 32},
                                          {"vocab_size", 256},
                                          {"max_position_embeddings", 4096},
                                          {"rms_norm_eps", 1e-5},
                                          {"rope_theta", 10000.0},
                                          {"tie_word_embeddings", false},
                                          {"bos_token_id", 1},
                                          {"eos_token_id", 2},
                                          {"torch_dtype", "bfloat16"}});
  std::map<std::string, at::Tensor> tensors;
  for (const auto& tensor : checkpoint::model_tensors(checkpoint::read_config(folder))) {
    const bool norm = tensor.shape.size() == 1;
    tensors[tensor.name] =
        norm ? at::ones(tensor.shape, at::kBFloat16) : (at::randn(tensor.shape) * 0.02).to(at::kBFloat16);
  }
  checkpoint::write_safetensors(folder / "model.safetensors", tensors);
}

void bench_gram(std::int64_t n, std::int64_t tokens, int repeat) {
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const at::Tensor x = at::randn({tokens, n}).to(dtype);
    linalg::GramAccumulator gram(n);
    gram.add(x);
    at::matmul(x.transpose(0, 1), x);
    std::vector<double> product, own;
    for (int i = 0; i < repeat; ++i) {
      product.push_back(seconds([&] { at::matmul(x.transpose(0, 1), x); }));
      own.push_back(seconds([&] { gram.add(x); }));
    }
    const double flops = static_cast<double>(n) * static_cast<double>(n) * static_cast<double>(tokens);
    std::cout << fmt::format(
                     "gram {:<9} n {} tokens {}: {:.1f} ms, {:.1f} GFLOP/s of n^2 t; at::matmul {:.1f} ms, {:.1f} "
                     "GFLOP/s of 2 n^2 t; share {:.2f}\n",
                     c10::toString(dtype), n, tokens, 1e3 * median(own), flops / median(own) / 1e9,
                     1e3 * median(product), 2 * flops / median(product) / 1e9, median(product) / median(own) / 2)
              << std::flush;
  }
}

void bench_layer(const checkpoint::Reader& reader, std::int64_t tokens, int repeat, bool all_statistics) {
  const auto& config = reader.config();
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const auto layer = model::load_layer(reader, 0, dtype);
    const at::Tensor hidden = at::randn({1, tokens, config.hidden}).to(dtype);
    calibration::CollectOptions options;
    options.values = false;
    calibration::LayerAccumulator without_values(calibration::collected_shape(config, options, tokens));
    options.values = true;
    calibration::LayerAccumulator accumulator(calibration::collected_shape(config, options, tokens));
    // The layer's linear maps, [out, in].
    std::vector<at::Tensor> weights;
    double linear_flops = 0;
    for (const auto& tensor : checkpoint::layer_tensors(config, 0)) {
      if (tensor.shape.size() != 2) continue;
      weights.push_back(at::randn(tensor.shape).to(dtype));
      linear_flops += 2.0 * static_cast<double>(tokens * tensor.shape[0] * tensor.shape[1]);
    }
    std::vector<at::Tensor> inputs;
    for (const at::Tensor& weight : weights) inputs.push_back(at::randn({tokens, weight.size(1)}).to(dtype));
    std::vector<std::unique_ptr<model::Product>> products;
    std::vector<at::Tensor> outputs;
    for (const at::Tensor& weight : weights) {
      products.push_back(std::make_unique<model::Product>(weight, at::Tensor(), dtype));
      outputs.push_back(at::empty({tokens, weight.size(0)}, dtype));
    }
    const auto linear = [&] {
      for (std::size_t i = 0; i < weights.size(); ++i) at::linear(inputs[i], weights[i]);
    };
    const auto bare = [&] {
      for (std::size_t i = 0; i < weights.size(); ++i) products[i]->apply(inputs[i], outputs[i]);
    };
    linear();
    bare();
    layer->forward(hidden, nullptr, &accumulator);
    const auto t = static_cast<double>(tokens);
    const auto width = static_cast<double>(config.heads * config.head_dim);
    const auto n = static_cast<double>(config.hidden);
    const auto k = static_cast<double>(config.source_kv_heads * config.head_dim);
    const double gram_flops = t * (n * n + 2 * k * k);
    const double attention_flops = 2 * t * t * width;
    const double all_flops = linear_flops + attention_flops + gram_flops;
    std::vector<double> rates, forwards, linears, kernels, with_values;
    for (int i = 0; i < repeat; ++i) {
      linears.push_back(linear_flops / seconds(linear));
      kernels.push_back(linear_flops / seconds(bare));
      const double spent = seconds([&] { layer->forward(hidden, nullptr, &accumulator); });
      rates.push_back(all_flops / spent);
      with_values.push_back(spent / seconds([&] { layer->forward(hidden, nullptr, &without_values); }));
      forwards.push_back((linear_flops + attention_flops) / seconds([&] { layer->forward(hidden, nullptr, nullptr); }));
    }
    const std::vector<double>& peaks = median(linears) > median(kernels) ? linears : kernels;
    std::vector<double> shares, plain;
    for (std::size_t i = 0; i < peaks.size(); ++i) {
      shares.push_back(rates[i] / peaks[i]);
      plain.push_back(forwards[i] / peaks[i]);
    }
    std::cout
        << fmt::format(
               "layer {:<9} {} tokens: calibrate {:.1f} GFLOP/s, products on its shapes {:.1f} GFLOP/s (at::linear "
               "{:.1f}); share "
               "{:.3f} (forward alone {:.3f}); x {:.3f} of calibration without the Gram of values\n",
               c10::toString(dtype), tokens, median(rates) / 1e9, median(peaks) / 1e9, median(linears) / 1e9,
               median(shares), median(plain), median(with_values))
        << std::flush;
    if (!all_statistics) continue;
    options.half_samples = true;
    calibration::LayerAccumulator halves(calibration::collected_shape(config, options, tokens));
    options.attention_statistics = true;
    const calibration::StatisticsShape shape = calibration::collected_shape(config, options, tokens);
    calibration::LayerAccumulator everything(shape);
    std::vector<double> without, with_halves, with_all;
    for (int i = -1; i < repeat; ++i) {
      const double base = seconds([&] { layer->forward(hidden, nullptr, &accumulator); });
      const double half = seconds([&] { layer->forward(hidden, nullptr, &halves); });
      const double all = seconds([&] { layer->forward(hidden, nullptr, &everything); });
      if (i < 0) continue;
      without.push_back(base);
      with_halves.push_back(half / base);
      with_all.push_back(all / base);
    }
    std::cout << fmt::format(
                     "layer {:<9} {} tokens: {:.0f} ms with base statistics; with half-sample sums x {:.3f}; with "
                     "attention statistics (blocks of {} KV heads) as well x {:.3f}, of arithmetic alone x {:.3f}\n",
                     c10::toString(dtype), tokens, 1e3 * median(without), median(with_halves), shape.attended_heads,
                     median(with_all), 1 + calibration::attention_statistics_share(config, shape))
              << std::flush;
  }
}

}  // namespace

int main(int argc, char** argv) {
  const at::NoGradGuard no_grad;
  std::string folder;
  std::int64_t tokens = 2048;
  int repeat = 5;
  bool gram_only = false;
  bool all_statistics = false;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--gram-only") {
      gram_only = true;
      continue;
    }
    if (name == "--all-statistics") {
      all_statistics = true;
      continue;
    }
    if (i + 1 == argc) {
      std::cerr << name << " needs a value\n";
      return 64;
    }
    const std::string value = argv[++i];
    if (name == "--model")
      folder = value;
    else if (name == "--tokens")
      tokens = std::stoll(value);
    else if (name == "--repeat")
      repeat = std::stoi(value);
    else if (name == "--threads")
      at::set_num_threads(std::stoi(value));
    else {
      std::cerr << "unknown option " << name << '\n';
      return 64;
    }
  }
  try {
    std::cout << at::get_num_threads() << " thread(s)\n";
    bench_gram(4096, tokens, repeat);
    if (gram_only) return 0;
    std::optional<bench::TemporaryFolder> made;
    if (folder.empty()) {
      made.emplace();
      write_model(made->path());
      folder = made->path().string();
    }
    bench_layer(checkpoint::Reader(folder), tokens, repeat, all_statistics);
  } catch (const std::exception& error) {
    std::cerr << describe(error) << '\n';
    return 70;
  }
  return 0;
}
