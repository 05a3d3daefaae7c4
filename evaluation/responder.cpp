#include <ATen/ATen.h>
#include <headfold/base/error.h>
#include <headfold/base/json.h>
#include <headfold/evaluation/generation.h>
#include <headfold/evaluation/responder.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

namespace headfold::evaluation {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::int64_t kFewestTokens = 256;  // rows of a batch that ranks without work do not make smaller

/// A pipeline's share of a round, as one text for the exchange.
struct Found {
  std::vector<std::size_t> indices;
  std::vector<Answer> answers;
};

void put(std::string& to, const void* data, std::size_t bytes) {
  to.append(static_cast<const char*>(data), bytes);
}

std::string packed(const Found& found) {
  std::string text;
  for (std::size_t i = 0; i < found.indices.size(); ++i) {
    const Answer& answer = found.answers[i];
    const std::int64_t numbers[] = {static_cast<std::int64_t>(found.indices[i]), answer.greedy ? 1 : 0,
                                    answer.scored_tokens, answer.context_tokens, std::ssize(answer.text)};
    put(text, numbers, sizeof numbers);
    put(text, &answer.log_likelihood, sizeof answer.log_likelihood);
    text += answer.text;
  }
  return text;
}

void unpack(const std::string& text, Found& found) {
  for (std::size_t at = 0; at < text.size();) {
    std::int64_t numbers[5];
    Answer answer;
    std::memcpy(numbers, text.data() + at, sizeof numbers);
    std::memcpy(&answer.log_likelihood, text.data() + at + sizeof numbers, sizeof answer.log_likelihood);
    at += sizeof numbers + sizeof answer.log_likelihood;
    answer.greedy = numbers[1] == 1;
    answer.scored_tokens = numbers[2];
    answer.context_tokens = numbers[3];
    answer.text = text.substr(at, static_cast<std::size_t>(numbers[4]));
    at += static_cast<std::size_t>(numbers[4]);
    found.indices.push_back(static_cast<std::size_t>(numbers[0]));
    found.answers.push_back(std::move(answer));
  }
}

}  // namespace

void check_new_tokens(const std::string& what, std::int64_t new_tokens, std::int64_t max_length) {
  if (new_tokens < 1 || new_tokens >= max_length)
    throw InputError(
        fmt::format("{}: {} new tokens are asked for, and the model reads {} in all", what, new_tokens, max_length),
        "generation needs a model that reads more, or a task with a smaller limit");
}

struct Responder::State {
  const checkpoint::Reader& reader;
  const tokenizer::Tokenizer& tokenizer;
  comm::Grid grid;
  ResponderOptions options;
  Encoder encoder;
  model::Pipeline pipeline;
  Work work;

  State(const checkpoint::Reader& own_reader, const tokenizer::Tokenizer& own_tokenizer, const comm::Grid& own_grid,
        const ResponderOptions& own_options)
      : reader(own_reader),
        tokenizer(own_tokenizer),
        grid(own_grid),
        options(own_options),
        encoder(own_tokenizer, own_options.bos),
        pipeline(own_reader, own_grid, {own_options.dtype, own_options.residency, true}) {}

  /// Adds the scores of a batch from its final hidden states [rows, hidden].
  void score(const ScoringBatch& batch, const at::Tensor& hidden, const std::vector<ScoredSequence>& sequences,
             std::vector<Answer>& answers) const {
    const model::Head& head = pipeline.head();
    const std::int64_t most = std::max<std::int64_t>(1, options.logits_bytes / (head.vocabulary() * 4));
    for (std::size_t begin = 0; begin < batch.tokens.size();) {
      // Predictions of the same row share its logits.
      std::vector<std::int64_t> rows;
      std::vector<std::int64_t> row_of, targets;
      std::size_t end = begin;
      for (; end < batch.tokens.size(); ++end) {
        const ScoredToken& token = batch.tokens[end];
        if (rows.empty() || rows.back() != token.row) {
          if (std::ssize(rows) == most) break;
          rows.push_back(token.row);
        }
        row_of.push_back(std::ssize(rows) - 1);
        targets.push_back(token.token);
      }
      const auto on_device = [&](const std::vector<std::int64_t>& list) {
        return at::tensor(list, at::kLong).to(hidden.device());
      };
      const at::Tensor log_probabilities =
          at::log_softmax(head.logits(hidden.index_select(0, on_device(rows))), -1, at::kFloat);
      const at::Tensor likeliest = model::to_host(log_probabilities.argmax(-1)).contiguous();
      // Of a vocabulary's numbers one per prediction is wanted: what is computed on a device is picked there.
      const at::Tensor picked = model::to_host(log_probabilities.index({on_device(row_of), on_device(targets)}));
      const auto* values = picked.data_ptr<float>();
      for (std::size_t i = begin; i < end; ++i) {
        const std::int64_t row = row_of[i - begin];
        const std::int64_t target = targets[i - begin];
        Answer& answer = answers[batch.tokens[i].sequence];
        if (answer.scored_tokens == 0) answer.greedy = true;
        answer.log_likelihood += static_cast<double>(values[i - begin]);
        answer.greedy = answer.greedy && likeliest.data_ptr<std::int64_t>()[row] == target;
        answer.context_tokens = sequences[batch.tokens[i].sequence].context_tokens();
        ++answer.scored_tokens;
      }
      begin = end;
    }
  }

  /// InputError for what the model cannot read, before anything is computed.
  void check(const std::vector<const Request*>& requests, const std::vector<EncodedRequest>& encoded) {
    for (std::size_t i = 0; i < requests.size(); ++i) {
      const Request& request = *requests[i];
      if (request.type == RequestType::generation) {
        check_new_tokens(name_of(request), request.max_new_tokens, options.max_length);
      } else if (std::ssize(encoded[i].continuation) > options.max_length && work.cut++ == 0 && grid.world.root()) {
        spdlog::warn(
            "{}: a continuation of {} tokens, and the model reads {}: only its end is scored (the harness refuses it)",
            name_of(request), encoded[i].continuation.size(), options.max_length);
      }
    }
  }

  /// What a replica found becomes known to all; true when the run is to end.
  bool exchange(const std::vector<const Request*>& requests, Found own, std::vector<Answer>& answers,
                const ResponderHooks& hooks) const {
    if (!grid.last_stage()) own = {};  // the last stage speaks for its pipeline
    Found all;
    for (const std::string& share : grid.world.all_gather(packed(own))) unpack(share, all);
    for (std::size_t i = 0; i < all.indices.size(); ++i) {
      const Answer& answer = all.answers[i];
      if (!std::isfinite(answer.log_likelihood))
        throw InputError(
            fmt::format("{}: the log-likelihood of {} is not finite (NaN or infinite logits)", reader.folder().string(),
                        name_of(*requests[all.indices[i]])),
            "the weights or the compute dtype are at fault: try --dtype float32, or headfold inspect on the model");
      answers[all.indices[i]] = answer;
    }
    const bool stop = hooks.finished && hooks.finished(all.indices, all.answers);
    if (hooks.progress) hooks.progress(static_cast<double>(all.indices.size()));
    return grid.world.all_reduce(std::int64_t{stop ? 1 : 0}, comm::Reduce::max) != 0;
  }

  /// Work per second so far -> work for the next round; the same on every rank.
  double next_budget(double done, Clock::time_point start) const {
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    return grid.world.all_reduce(done / std::max(seconds, 1e-3) * options.round_seconds, comm::Reduce::min);
  }

  bool score_all(const std::vector<const Request*>& requests, const std::vector<std::size_t>& which,
                 const std::vector<EncodedRequest>& encoded, std::vector<Answer>& answers, const ResponderHooks& hooks);
  bool generate_all(const std::vector<const Request*>& requests, const std::vector<std::size_t>& which,
                    const std::vector<EncodedRequest>& encoded, std::vector<Answer>& answers,
                    const ResponderHooks& hooks);
};

bool Responder::State::score_all(const std::vector<const Request*>& requests, const std::vector<std::size_t>& which,
                                 const std::vector<EncodedRequest>& encoded, std::vector<Answer>& answers,
                                 const ResponderHooks& hooks) {
  std::vector<ScoredSequence> sequences;
  sequences.reserve(which.size());
  for (const std::size_t index : which) sequences.emplace_back(encoded[index], options.max_length);
  PackingOptions packing{options.max_tokens, options.share};
  std::vector<BatchPlan> plans = plan_batches(sequences, packing, pipeline.config());
  // Ranks without work are worse than small batches.
  const std::int64_t busy = std::int64_t{2} * grid.replicas;
  if (std::ssize(plans) < busy) {
    std::int64_t rows = 0;
    for (const BatchPlan& plan : plans) rows += plan.rows;
    packing.max_tokens = std::min(packing.max_tokens, std::max(kFewestTokens, rows / busy));
    plans = plan_batches(sequences, packing, pipeline.config());
  }
  const auto replicas = static_cast<std::size_t>(grid.replicas);
  const std::int64_t row_bytes = pipeline.config().hidden * static_cast<std::int64_t>(c10::elementSize(options.dtype));
  const bool streamed = options.residency == model::Residency::streamed;
  double budget = 0;
  double done = 0;
  const auto start = Clock::now();
  for (std::size_t round = 0; round < plans.size();) {
    // Streamed layers are read once per round, so a round is as large as memory allows. Otherwise it is a matter of
    // time: the first one finds out how much.
    std::size_t end = round;
    double cost = 0;
    std::int64_t rows = 0;
    while (
        end < plans.size() &&
        (end - round < replicas ||
         (streamed ? rows * row_bytes < options.hidden_bytes * static_cast<std::int64_t>(replicas) : cost < budget))) {
      cost += plans[end].cost;
      rows += plans[end++].rows;
    }
    std::vector<double> costs;
    for (std::size_t p = round; p < end; ++p) costs.push_back(plans[p].cost);
    const std::vector<int> owner = deal(costs, grid.replicas);
    std::vector<ScoringBatch> own;
    Found found;
    for (std::size_t p = round; p < end; ++p) {
      if (owner[p - round] != grid.replica) continue;
      own.push_back(make_batch(plans[p], sequences, packing));
      work.computed += plans[p].rows;
      for (const std::size_t member : plans[p].members) {
        found.indices.push_back(member);
        work.asked += sequences[member].size();
      }
    }
    std::vector<Answer> scores(sequences.size());
    std::vector<model::PackedBatch> packed_batches;
    packed_batches.reserve(own.size());
    for (const ScoringBatch& batch : own) packed_batches.push_back(batch.packed);
    model::PipelineHooks inner;
    inner.output = [&](std::int64_t index, const at::Tensor& hidden) {
      score(own[static_cast<std::size_t>(index)], hidden, sequences, scores);
    };
    if (!own.empty()) pipeline.run_packed(packed_batches, inner);
    for (std::size_t& index : found.indices) {
      found.answers.push_back(scores[index]);
      index = which[index];
    }
    if (exchange(requests, std::move(found), answers, hooks)) return true;
    round = end;
    done += cost;
    budget = next_budget(done, start);
  }
  return false;
}

bool Responder::State::generate_all(const std::vector<const Request*>& requests, const std::vector<std::size_t>& which,
                                    const std::vector<EncodedRequest>& encoded, std::vector<Answer>& answers,
                                    const ResponderHooks& hooks) {
  GenerationOptions generation;
  generation.max_tokens = options.max_tokens;
  generation.share = options.share;
  for (const std::int64_t id : {tokenizer.eos(), pipeline.config().eos})
    if (id >= 0) generation.end_ids.push_back(id);
  std::vector<Prompt> prompts;
  prompts.reserve(which.size());
  std::int64_t longest = 1;
  for (const std::size_t index : which) {
    const Request& request = *requests[index];
    const std::int64_t room = options.max_length - request.max_new_tokens;
    const std::vector<std::int32_t>& context = *encoded[index].context;
    Prompt prompt;
    prompt.ids.assign(context.end() - std::min<std::ptrdiff_t>(std::ssize(context), room), context.end());
    prompt.stops = request.stops;
    if (tokenizer.eos() >= 0) prompt.stops.push_back(tokenizer.token_text(tokenizer.eos()));
    prompt.max_new_tokens = request.max_new_tokens;
    longest = std::max(longest, std::ssize(prompt.ids) + request.max_new_tokens);
    prompts.push_back(std::move(prompt));
  }
  const std::int64_t text_bytes =
      longest * pipeline.config().cache_bytes_per_token(static_cast<std::int64_t>(c10::elementSize(options.dtype)));
  generation.slots = std::clamp<std::int64_t>(options.cache_bytes / text_bytes, 1, options.most_slots);
  generation.slots = std::min(generation.slots, std::max<std::int64_t>(1, options.max_tokens / 8));

  // Longest first: the last round then has the short ones to fill gaps with.
  const auto cost_of = [&](std::size_t p) {
    return static_cast<double>(prompts[p].ids.size()) + static_cast<double>(prompts[p].max_new_tokens);
  };
  std::vector<std::size_t> order(prompts.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return cost_of(a) > cost_of(b); });
  double budget = 0;
  double done = 0;
  const auto start = Clock::now();
  for (std::size_t round = 0; round < order.size();) {
    const std::size_t fewest = static_cast<std::size_t>(grid.replicas) * static_cast<std::size_t>(generation.slots);
    std::size_t end = round;
    std::vector<double> costs;
    double cost = 0;
    while (end < order.size() && (end - round < fewest || cost < budget)) {
      costs.push_back(cost_of(order[end++]));
      cost += costs.back();
    }
    const std::vector<int> owner = deal(costs, grid.replicas);
    Found found;
    std::vector<Prompt> own;
    for (std::size_t p = round; p < end; ++p) {
      if (owner[p - round] != grid.replica) continue;
      found.indices.push_back(which[order[p]]);
      own.push_back(prompts[order[p]]);
    }
    const std::vector<Generated> texts = generate_texts(pipeline, grid, tokenizer, own, generation, &work.computed);
    for (std::size_t i = 0; i < texts.size(); ++i) {
      Answer answer;
      answer.text = texts[i].text;
      answer.scored_tokens = texts[i].tokens;
      answer.context_tokens = std::ssize(own[i].ids);
      work.asked += answer.scored_tokens + answer.context_tokens;
      found.answers.push_back(std::move(answer));
    }
    if (exchange(requests, std::move(found), answers, hooks)) return true;
    round = end;
    done += cost;
    budget = next_budget(done, start);
  }
  return false;
}

Responder::Responder(const checkpoint::Reader& reader, const tokenizer::Tokenizer& tokenizer, const comm::Grid& grid,
                     ResponderOptions options) {
  if (options.max_length == 0) options.max_length = harness_max_length(reader.config());
  if (options.max_length < 1)
    throw UsageError(fmt::format("--max-length {}: at least 1 is needed", options.max_length));
  if (options.max_tokens < 1)
    throw UsageError(fmt::format("--max-batch-tokens {}: at least 1 is needed", options.max_tokens));
  state_ = std::make_unique<State>(reader, tokenizer, grid, options);
}

Responder::~Responder() = default;

std::int64_t Responder::max_length() const {
  return state_->options.max_length;
}

Responder::Work Responder::work() const {
  return state_->work;
}

std::vector<Answer> Responder::answer(const std::vector<Request>& requests, const ResponderHooks& hooks) const {
  std::vector<const Request*> pointers;
  pointers.reserve(requests.size());
  for (const Request& request : requests) pointers.push_back(&request);
  return answer(pointers, hooks);
}

std::vector<Answer> Responder::answer(const std::vector<const Request*>& requests, const ResponderHooks& hooks) const {
  std::vector<Answer> answers(requests.size());
  const std::vector<EncodedRequest> encoded = encode_requests(state_->grid.world, state_->encoder, requests);
  state_->check(requests, encoded);
  std::vector<std::size_t> scored, generated;
  for (std::size_t i = 0; i < requests.size(); ++i)
    (requests[i]->type == RequestType::generation ? generated : scored).push_back(i);
  if (!scored.empty() && state_->score_all(requests, scored, encoded, answers, hooks)) return answers;
  if (!generated.empty()) state_->generate_all(requests, generated, encoded, answers, hooks);
  return answers;
}

}  // namespace headfold::evaluation
