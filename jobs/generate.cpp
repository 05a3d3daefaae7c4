// headfold generate: continues a prompt, with a KV cache.

#include <headfold/base/log.h>
#include <headfold/model/model.h>
#include <headfold/tokenizer/tokenizer.h>

#include <iostream>
#include <numeric>
#include <random>

#include "values.h"

namespace headfold::jobs {
namespace {

struct Sampling {
  double temperature = 0;  ///< 0 = always the likeliest token
  std::int64_t top_k = 0;  ///< 0 = all
  std::mt19937_64 random;
};

std::int64_t choose(const at::Tensor& logits, Sampling& sampling) {
  const at::Tensor row = model::to_host(logits).to(at::kFloat).contiguous();
  const float* data = row.data_ptr<float>();
  const std::int64_t count = row.numel();
  if (sampling.temperature == 0) return std::max_element(data, data + count) - data;
  std::vector<std::int64_t> order(static_cast<std::size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  const auto kept = static_cast<std::size_t>(sampling.top_k == 0 ? count : std::min(sampling.top_k, count));
  std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(kept), order.end(),
                    [&](std::int64_t a, std::int64_t b) { return data[a] > data[b] || (data[a] == data[b] && a < b); });
  double sum = 0;
  std::vector<double> cumulative(kept);
  for (std::size_t i = 0; i < kept; ++i) {
    sum += std::exp((static_cast<double>(data[order[i]]) - static_cast<double>(data[order[0]])) / sampling.temperature);
    cumulative[i] = sum;
  }
  // 53 random bits: the same draw on every platform.
  const double drawn = static_cast<double>(sampling.random() >> 11) * 0x1p-53 * sum;
  const auto found = std::upper_bound(cumulative.begin(), cumulative.end(), drawn);
  return order[std::min(static_cast<std::size_t>(found - cumulative.begin()), kept - 1)];
}

}  // namespace

void generate(const Context& context, const std::vector<std::string>& arguments) {
  po::options_description own("options");
  own.add_options()("model", po::value<std::string>()->required(), "model folder with its tokenizer")(
      "prompt", po::value<std::string>()->required(), "text to continue")(
      "max-new-tokens", po::value<std::int64_t>()->default_value(64), "tokens to produce at most")(
      "temperature", po::value<double>()->default_value(0), "0 = greedy; 1 = the model's own distribution")(
      "top-k", po::value<std::int64_t>()->default_value(0), "sample among the k likeliest tokens; 0 = all")(
      "seed", po::value<std::int64_t>()->default_value(0), "of the sampling")(
      "dtype", po::value<std::string>()->default_value("auto"), "compute dtype: float32, bfloat16 or auto")(
      "dry-run", po::bool_switch(), "print what would be done, and stop");
  add_device_option(own);
  const auto options =
      parse(context, "generate", "headfold generate --model DIR --prompt TEXT [options]", own, arguments);
  if (context.world.size() > 1)
    throw UsageError(fmt::format("generate runs on one rank, not {}", context.world.size()),
                     "start it without mpirun or srun");
  const auto wanted = options["max-new-tokens"].as<std::int64_t>();
  if (wanted < 1) throw UsageError(fmt::format("--max-new-tokens {}: must be at least 1", wanted));
  Sampling sampling;
  sampling.temperature = options["temperature"].as<double>();
  sampling.top_k = options["top-k"].as<std::int64_t>();
  sampling.random.seed(static_cast<std::uint64_t>(at_least(options, "seed", 0)));
  if (!(sampling.temperature >= 0) || !std::isfinite(sampling.temperature))
    throw UsageError(fmt::format("--temperature {}: must be 0 or more", sampling.temperature));
  if (sampling.top_k < 0) throw UsageError(fmt::format("--top-k {}: must be 0 or more", sampling.top_k));
  if (sampling.top_k > 0 && sampling.temperature == 0)
    throw UsageError("--top-k has no effect on greedy decoding", "give a --temperature above 0 too");

  const checkpoint::Reader reader(options["model"].as<std::string>());
  const model::ModelConfig& config = reader.config();
  const at::ScalarType dtype = parse_dtype(options["dtype"].as<std::string>(), config.dtype);
  const auto tokenizer = tokenizer::load_tokenizer(reader.folder());
  std::vector<std::int64_t> ids = tokenizer->encode(options["prompt"].as<std::string>(), tokenizer::Bos::model_default);
  if (ids.empty()) {
    if (tokenizer->bos() < 0)
      throw UsageError("the prompt is empty and the model has no beginning-of-sequence token", "give a --prompt");
    ids.push_back(tokenizer->bos());
  }
  const std::size_t prompt_tokens = ids.size();
  const auto length = static_cast<std::int64_t>(prompt_tokens) + wanted;
  if (length > config.max_positions) {
    const std::string message = fmt::format("{} prompt tokens and {} new ones exceed the {} positions of {}",
                                            prompt_tokens, wanted, config.max_positions, reader.folder().string());
    if (config.family == checkpoint::Family::llama)
      throw UsageError(message, "shorten the prompt or lower --max-new-tokens");
    spdlog::warn("{}: ALiBi extrapolates, quality may suffer", message);
  }
  const std::int64_t per_token = config.cache_bytes_per_token(static_cast<std::int64_t>(c10::elementSize(dtype)));
  spdlog::info(
      "{}: {} layers, {} query heads, {} KV heads, {}; {} prompt tokens, up to {} new; KV cache {} per token, {} in "
      "all",
      reader.folder().string(), config.layers, config.heads, config.kv_heads_text(), dtype_name(dtype), prompt_tokens,
      wanted, human_bytes(static_cast<double>(per_token)), human_bytes(static_cast<double>(per_token * length)));
  if (options["dry-run"].as<bool>()) return;

  const model::Decoder decoder(reader, dtype);
  auto caches = decoder.make_cache(1, length);
  using Clock = std::chrono::steady_clock;
  const auto seconds_since = [](Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  const auto start = Clock::now();
  at::Tensor scores = decoder.step(at::tensor(ids, at::kLong).view({1, -1}), caches);
  const double prefill = seconds_since(start);
  const auto decode_start = Clock::now();
  std::int64_t steps = 0;
  bool ended = false;
  for (std::int64_t i = 0; i < wanted && !ended; ++i) {
    if (!at::isfinite(scores).all().item<bool>())
      throw InputError(fmt::format("{}: the model gives NaN or Inf", reader.folder().string()),
                       "try --dtype float32; if it persists, the checkpoint itself is broken");
    const std::int64_t next = choose(scores[0], sampling);
    ended = next == config.eos || next == tokenizer->eos();
    ids.push_back(next);
    if (ended || i + 1 == wanted) break;
    scores = decoder.step(at::full({1, 1}, next, at::kLong), caches);
    ++steps;
  }
  const double decode = seconds_since(decode_start);
  fmt::print("{}\n", tokenizer->decode(ids));
  std::cout.flush();
  spdlog::info(
      "{} prompt tokens in {} ({:.1f} tokens/s), {} new tokens at {:.1f} tokens/s{}; KV cache holds {} ({} per token)",
      prompt_tokens, human_seconds(prefill), static_cast<double>(prompt_tokens) / prefill, ids.size() - prompt_tokens,
      steps > 0 ? static_cast<double>(steps) / decode : 0.0, ended ? ", ended by the model" : "",
      human_bytes(static_cast<double>(per_token * caches.front().length)), human_bytes(static_cast<double>(per_token)));
}

}  // namespace headfold::jobs
