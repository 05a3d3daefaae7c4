// Answers against a plain scorer of the tests' own (one request after the other, the whole sequence, no batch, no
// cache, nothing shared), over rank counts, batches, grids and layouts; what is on disk; what a text becomes.

#include <gmock/gmock.h>
#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/base/json.h>
#include <headfold/evaluation/benchmark.h>

#include <cmath>
#include <cstring>
#include <random>

#include "../model/small_models.h"
#include "models.h"
#include "world.h"

namespace headfold::evaluation {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing_support::ScratchFolder;
using testing_support::world;

// ---------------------------------------------------------------------------------------------------------------------
// Requests

const std::vector<std::string>& heldout_words() {
  static const std::vector<std::string> words = [] {
    std::vector<std::string> list;
    const std::string text = read_file(heldout().files.front());
    for (std::size_t at = 0; at < text.size() && list.size() < 30000;) {
      const std::size_t end = std::min(text.find('\n', at), text.size());
      const std::string line = Json::parse(text.substr(at, end - at)).at("text").get<std::string>();
      for (std::size_t word = 0; word < line.size();) {
        const std::size_t space = std::min(line.find_first_of(" \n", word), line.size());
        if (space > word) list.push_back(line.substr(word, space - word));
        word = space + 1;
      }
      at = end + 1;
    }
    return list;
  }();
  return words;
}

std::string words(std::size_t first, std::size_t count) {
  const std::vector<std::string>& all = heldout_words();
  std::string text;
  for (std::size_t i = 0; i < count; ++i) text += (i > 0 ? " " : "") + all.at((first + i) % all.size());
  return text;
}

Request scored(std::int64_t document, std::int64_t index, std::string context, std::string continuation) {
  Request request;
  request.document = document;
  request.index = index;
  request.context = std::move(context);
  request.continuation = std::move(continuation);
  return request;
}

/// Questions of four choices: long endings, single letters, contexts per choice, a common few-shot prefix.
std::vector<Request> choices(std::int64_t documents) {
  std::vector<Request> requests;
  const std::string shots = "Question: " + words(9000, 25) + "\nAnswer: " + words(9100, 5) + "\n\n";
  for (std::int64_t d = 0; d < documents; ++d) {
    const auto at = static_cast<std::size_t>(d) * 83;
    for (std::int64_t c = 0; c < 4; ++c) {
      const auto choice = static_cast<std::size_t>(c);
      const std::string question = words(at, 12 + static_cast<std::size_t>(d % 5) * 6);
      switch (d % 4) {
        case 0:
          requests.push_back(
              scored(d, c, "Question: " + question + "\nAnswer:", " " + words(at + 50 * choice, 2 + choice)));
          break;
        case 1:  // one token each: all of them need one forward pass
          requests.push_back(scored(d, c, shots + question + "\nAnswer:", std::string(" ") + "ABCD"[choice]));
          break;
        case 2:  // the context is what differs
          requests.push_back(scored(d, c, question + " " + words(at + 31 * choice, 2), " " + words(at + 40, 4)));
          break;
        default:  // white space at the end of the context, and few-shot prefix
          requests.push_back(scored(d, c, shots + question + "\n ", words(at + 20 * choice, 5)));
      }
    }
  }
  return requests;
}

/// One continuation per document, of any length; contexts empty, short, and longer than the model reads.
std::vector<Request> continuations(std::int64_t documents) {
  std::vector<Request> requests;
  for (std::int64_t d = 0; d < documents; ++d) {
    const auto at = static_cast<std::size_t>(d) * 59 + 7;
    const std::size_t context = d % 20 == 0 ? 0 : d % 23 == 0 ? 400 : 5 + static_cast<std::size_t>(d % 7) * 9;
    requests.push_back(scored(d, 0, words(at, context),
                              " " + words(at + context, d % 90 == 61 ? 330 : 1 + static_cast<std::size_t>(d % 11))));
  }
  return requests;
}

std::vector<Request> prompts(std::int64_t documents, std::int64_t new_tokens) {
  std::vector<Request> requests;
  for (std::int64_t d = 0; d < documents; ++d) {
    Request request;
    request.type = RequestType::generation;
    request.document = d;
    request.context =
        (d % 3 == 0 ? words(9000, 20) + ". " : "") +
        words(static_cast<std::size_t>(d) * 47, d % 50 == 49 ? 350 : 4 + static_cast<std::size_t>(d % 6) * 3);
    // The last one mostly spans two tokens.
    request.stops = {"\n", ". ", d % 2 == 0 ? " the" : "e of"};
    request.max_new_tokens = new_tokens - d % 3;
    requests.push_back(std::move(request));
  }
  return requests;
}

// ---------------------------------------------------------------------------------------------------------------------
// The plain scorer

struct Plain {
  const model::Decoder& decoder;
  const tokenizer::Tokenizer& tokenizer;
  bool bos;
  std::int64_t max_length;

  std::vector<std::int64_t> encode(const std::string& text) const {
    std::vector<std::int64_t> ids = tokenizer.encode(text);
    if (bos) ids.insert(ids.begin(), 1);
    return ids;
  }

  Answer score(const Request& request) const {
    std::string context = request.context;
    std::string continuation = request.continuation;
    while (!context.empty() && std::strchr(" \n\t", context.back()) != nullptr) {
      continuation.insert(continuation.begin(), context.back());
      context.pop_back();
    }
    std::vector<std::int64_t> before, after;
    if (context.empty()) {
      before = {1};
      after = tokenizer.encode(continuation);
    } else {
      before = encode(context);
      const std::vector<std::int64_t> whole = encode(context + continuation);
      after.assign(whole.begin() + static_cast<std::ptrdiff_t>(before.size()), whole.end());
    }
    std::vector<std::int64_t> all = before;
    all.insert(all.end(), after.begin(), after.end());
    if (std::ssize(all) > max_length + 1) all.erase(all.begin(), all.end() - max_length - 1);
    const auto inputs = static_cast<std::int64_t>(all.size()) - 1;
    const at::Tensor logits = decoder.logits(at::tensor(all, at::kLong).slice(0, 0, inputs).unsqueeze(0))[0];
    const at::Tensor log_p = at::log_softmax(logits.to(at::kDouble), -1);
    Answer answer;
    answer.greedy = true;
    answer.scored_tokens = std::min<std::int64_t>(std::ssize(after), inputs);
    after.erase(after.begin(), after.end() - answer.scored_tokens);
    answer.context_tokens = inputs + 1 - answer.scored_tokens;
    for (std::int64_t i = 0; i < answer.scored_tokens; ++i) {
      const at::Tensor row = log_p[answer.context_tokens - 1 + i];
      const std::int64_t id = after[static_cast<std::size_t>(i)];
      answer.log_likelihood += row[id].item<double>();
      answer.greedy = answer.greedy && row.argmax().item<std::int64_t>() == id;
    }
    return answer;
  }

  Answer generate(const Request& request) const {
    std::vector<std::int64_t> ids = encode(request.context);
    const std::int64_t room = max_length - request.max_new_tokens;
    if (std::ssize(ids) > room) ids.erase(ids.begin(), ids.end() - room);
    Answer answer;
    answer.context_tokens = std::ssize(ids);
    std::vector<std::int64_t> fresh;
    while (answer.scored_tokens < request.max_new_tokens) {
      const at::Tensor logits = decoder.logits(at::tensor(ids, at::kLong).unsqueeze(0))[0];
      const std::int64_t next = logits[std::ssize(ids) - 1].argmax().item<std::int64_t>();
      ++answer.scored_tokens;
      if (next == 2) break;
      ids.push_back(next);
      fresh.push_back(next);
      answer.text = tokenizer.decode(fresh);
      const std::size_t whole = answer.text.size();
      for (const std::string& stop : request.stops) answer.text = answer.text.substr(0, answer.text.find(stop));
      if (answer.text.size() < whole) break;
    }
    return answer;
  }

  /// Of all requests, each rank doing its share.
  std::vector<Answer> answer(const std::vector<Request>& requests) const {
    std::string own;
    for (std::size_t i = static_cast<std::size_t>(world().rank()); i < requests.size();
         i += static_cast<std::size_t>(world().size())) {
      const Answer a = requests[i].type == RequestType::generation ? generate(requests[i]) : score(requests[i]);
      own += Json{i, a.log_likelihood, a.greedy, a.scored_tokens, a.context_tokens, a.text}.dump() + "\n";
    }
    std::vector<Answer> answers(requests.size());
    for (const std::string& share : world().all_gather(own))
      for (std::size_t at = 0; at < share.size(); at = share.find('\n', at) + 1) {
        const Json line = Json::parse(share.substr(at, share.find('\n', at) - at));
        answers[line[0].get<std::size_t>()] = {line[1].get<double>(), line[2].get<bool>(), line[3].get<std::int64_t>(),
                                               line[4].get<std::int64_t>(), line[5].get<std::string>()};
      }
    return answers;
  }
};

/// `per_token`: largest difference per scored token, in nats.
void expect_close(const std::vector<Answer>& answers, const std::vector<Answer>& expected, double per_token = 1e-5) {
  ASSERT_EQ(answers.size(), expected.size());
  for (std::size_t i = 0; i < answers.size(); ++i) {
    EXPECT_NEAR(answers[i].log_likelihood, expected[i].log_likelihood,
                per_token * static_cast<double>(std::max<std::int64_t>(1, expected[i].scored_tokens)) +
                    1e-6 * std::abs(expected[i].log_likelihood))
        << i;
    EXPECT_EQ(answers[i].scored_tokens, expected[i].scored_tokens) << i;
    EXPECT_EQ(answers[i].context_tokens, expected[i].context_tokens) << i;
    EXPECT_EQ(answers[i].text, expected[i].text) << i;
    // A greedy flag is a comparison of floats: it may only flip where rounding is coarser than float32.
    if (per_token <= 1e-4) {
      EXPECT_EQ(answers[i].greedy, expected[i].greedy) << i;
    }
  }
}

struct Model {
  checkpoint::Reader reader;
  std::unique_ptr<tokenizer::Tokenizer> tokenizer;
  explicit Model(const fs::path& folder) : reader(folder), tokenizer(tokenizer::load_tokenizer(folder)) {}
  Responder responder(const comm::Grid& grid, ResponderOptions options = {}) const {
    return {reader, *tokenizer, grid, options};
  }
};

std::vector<comm::Grid> grids(std::int64_t layers) {
  std::vector<comm::Grid> list;
  for (int stages = 1; stages <= world().size() && stages <= layers; ++stages)
    if (world().size() % stages == 0) list.push_back(comm::make_grid(world(), stages));
  return list;
}

struct Kind {
  const char* name;
  std::vector<Request> (*make)();
};
class ResponderOn : public testing::TestWithParam<Kind> {};

TEST_P(ResponderOn, equals_a_plain_scorer_for_200_requests) {
  const Model demo(demo_model("prose-llama"));
  const model::Decoder decoder(demo.reader, at::kFloat);
  const std::vector<Request> requests = GetParam().make();
  ASSERT_GE(requests.size(), 200U);
  const std::vector<Answer> expected = Plain{decoder, *demo.tokenizer, true, 256}.answer(requests);
  const Responder responder = demo.responder(comm::make_grid(world(), 1), {.max_tokens = 1024});
  EXPECT_EQ(responder.max_length(), 256);
  expect_close(responder.answer(requests), expected);
  if (world().size() == 1 && std::string(GetParam().name) == "choices") {
    EXPECT_LT(2 * responder.work().computed, responder.work().asked);
  }
  if (requests.front().type == RequestType::generation) {
    std::int64_t early = 0;
    for (std::size_t i = 0; i < requests.size(); ++i)
      early += expected[i].scored_tokens < requests[i].max_new_tokens ? 1 : 0;
    EXPECT_GT(early, 10) << "stop strings are not tested";
    EXPECT_LT(early, 190) << "limits are not tested";
  }
}
INSTANTIATE_TEST_SUITE_P(All, ResponderOn,
                         testing::Values(Kind{"choices", [] { return choices(50); }},
                                         Kind{"continuations", [] { return continuations(200); }},
                                         Kind{"prompts", [] { return prompts(200, 6); }}),
                         [](const auto& instance) { return std::string(instance.param.name); });

std::vector<Request> some_of_each() {
  std::vector<Request> requests = choices(8);
  for (const std::vector<Request>& more : {continuations(24), prompts(9, 12)})
    requests.insert(requests.end(), more.begin(), more.end());
  return requests;
}

TEST(Responder, answers_depend_neither_on_ranks_nor_on_grids_nor_on_batches) {
  const Model demo(demo_model("prose-llama"));
  const std::vector<Request> requests = some_of_each();
  const std::vector<Answer> alone =
      demo.responder({}, {.max_tokens = 1, .share = false, .most_slots = 1}).answer(requests);
  for (const comm::Grid& grid : grids(6)) {
    SCOPED_TRACE(fmt::format("{} stages", grid.stages));
    expect_close(demo.responder(grid, {.max_tokens = 1, .share = false}).answer(requests), alone);
    expect_close(demo.responder(grid, {.max_tokens = 32 * 60}).answer(requests), alone);
    expect_close(demo.responder(grid, {.max_tokens = 300, .round_seconds = 1e-6}).answer(requests), alone);
    expect_close(demo.responder(grid, {.residency = model::Residency::streamed, .max_tokens = 1500, .most_slots = 3})
                     .answer(requests),
                 alone);
  }
  // One position of logits at a time, and the order of the requests.
  std::vector<Request> reversed(requests.rbegin(), requests.rend());
  std::vector<Answer> back = demo.responder(comm::make_grid(world(), 1), {.logits_bytes = 1}).answer(reversed);
  std::reverse(back.begin(), back.end());
  expect_close(back, alone);
}

TEST(Responder, bloom_and_bfloat16_equal_a_plain_scorer) {
  std::vector<Request> requests = choices(10);
  for (const Request& request : prompts(12, 6)) requests.push_back(request);
  {
    const Model demo(demo_model("prose-bloom"));
    const model::Decoder decoder(demo.reader, at::kFloat);
    const std::vector<Answer> expected = Plain{decoder, *demo.tokenizer, false, 2048}.answer(requests);
    for (const comm::Grid& grid : grids(6)) {
      const Responder responder = demo.responder(grid);
      EXPECT_EQ(responder.max_length(), 2048);  // the harness does not look at seq_length
      expect_close(responder.answer(requests), expected);
    }
  }
  requests = choices(10);
  const Model demo(demo_model("prose-llama"));
  const model::Decoder decoder(demo.reader, at::kBFloat16);
  const std::vector<Answer> expected = Plain{decoder, *demo.tokenizer, true, 256}.answer(requests);
  for (const comm::Grid& grid : grids(6))
    expect_close(demo.responder(grid, {.dtype = at::kBFloat16}).answer(requests), expected, 0.05);
}

TEST(Responder, every_layout_equals_a_plain_scorer) {
  std::vector<Request> requests = choices(4);
  for (const Request& request : prompts(4, 5)) requests.push_back(request);
  const ScratchFolder scratch;
  for (auto [name, json] : model::testing_models::all_forms()) {
    SCOPED_TRACE(name);
    json["vocab_size"] = 4096;
    json["bos_token_id"] = 1;
    json["eos_token_id"] = 2;
    world().on_root([&, &own_name = name, &own_json = json] {
      fs::create_directories(scratch / own_name);
      model::testing_models::make_model(own_json).write(scratch / own_name);
      headfold::copy_file(demo_model("prose-llama") / "tokenizer.model", scratch / own_name / "tokenizer.model");
    });
    const Model small(scratch / name);
    const model::Decoder decoder(small.reader, at::kFloat);
    const std::int64_t length = name.starts_with("llama") ? 4096 : 2048;
    const std::vector<Answer> expected =
        Plain{decoder, *small.tokenizer, small.tokenizer->adds_bos(), length}.answer(requests);
    for (const comm::Grid& grid : grids(2)) expect_close(small.responder(grid).answer(requests), expected, 2e-5);
  }
}

TEST(Responder, a_broken_model_and_impossible_requests_are_refused) {
  const ScratchFolder scratch;
  const Model broken(perturbed(demo_model("prose-llama"), scratch / "nan", std::nan("")));
  const comm::Grid grid = comm::make_grid(world(), 1);
  const auto message_of = [](const auto& work) -> std::string {
    try {
      work();
    } catch (const InputError& error) {
      return error.what();
    }
    return "nothing";
  };
  const auto refused = [&](const Model& model, const Request& request, ResponderOptions options = {}) {
    return message_of([&] { model.responder(grid, options).answer(std::vector<Request>{request}); });
  };
  EXPECT_THAT(refused(broken, scored(7, 2, "What", " is it")), HasSubstr("request 2 of document 7 is not finite"));
  const Model demo(demo_model("prose-llama"));
  // The whole world encodes: an empty continuation fails on the rank that has it.
  if (world().size() == 1) {
    Request empty = scored(3, 1, "What", "");
    EXPECT_THAT(refused(demo, empty), HasSubstr("a continuation without a token"));
    empty.source = "lambada_openai, test.jsonl, line 4";
    EXPECT_THAT(refused(demo, empty), HasSubstr("lambada_openai, test.jsonl, line 4: request 1"));
    EXPECT_THAT(refused(demo, scored(3, 1, " ", ""), {.bos = tokenizer::Bos::never}), HasSubstr("without a token"));
  }
  Request long_one = prompts(1, 6).front();
  long_one.max_new_tokens = 256;
  EXPECT_THAT(refused(demo, long_one), HasSubstr("256 new tokens"));
}

// ---------------------------------------------------------------------------------------------------------------------
// Encoding and packing

TEST(Encoding, follows_the_harness) {
  for (const char* name : {"prose-llama", "prose-bloom"}) {
    SCOPED_TRACE(name);
    const auto tokenizer = tokenizer::load_tokenizer(demo_model(name));
    const bool llama = tokenizer->adds_bos();
    EXPECT_EQ(llama, std::string(name) == "prose-llama");
    const Encoder as_model(*tokenizer, tokenizer::Bos::model_default), with(*tokenizer, tokenizer::Bos::always),
        without(*tokenizer, tokenizer::Bos::never);
    const std::vector<std::int64_t> bare = tokenizer->encode("The sea was calm");
    std::vector<std::int64_t> led = bare;
    led.insert(led.begin(), 1);
    EXPECT_EQ(without.encode("The sea was calm"), bare);
    EXPECT_EQ(with.encode("The sea was calm"), led);
    EXPECT_EQ(as_model.encode("The sea was calm"), llama ? led : bare);
    for (const Encoder* encoder : {&as_model, &with, &without})
      EXPECT_EQ(encoder->encode("<s>The sea was calm"), led) << "BOS in the text is BOS, once";

    // White space goes to the continuation, and the continuation is what is longer than the context.
    const auto [context, continuation] = without.pair("The sea was \n ", "calm");
    EXPECT_EQ(context, tokenizer->encode("The sea was"));
    const std::vector<std::int64_t> whole = tokenizer->encode("The sea was \n calm");
    EXPECT_EQ(continuation, std::vector<std::int64_t>(whole.begin() + std::ssize(context), whole.end()));
    EXPECT_EQ(without.pair("The sea was \n ", "calm"), without.pair("The sea was", " \n calm"));

    // No context: the prefix token, which is not doubled.
    EXPECT_THAT(without.pair("", "calm").first, ElementsAre(1));
    EXPECT_EQ(with.pair("", "calm").second, tokenizer->encode("calm"));
    EXPECT_EQ(with.pair("", "<s>calm").second, tokenizer->encode("calm"));
    EXPECT_THAT(with.pair("", "<s>calm").first, ElementsAre(1));
  }
  EXPECT_EQ(benchmark_bos(tokenizer::Bos::model_default, HarnessVersion::v0_4_9_1), tokenizer::Bos::never);
  EXPECT_EQ(benchmark_bos(tokenizer::Bos::model_default, HarnessVersion::v0_4_9_2), tokenizer::Bos::model_default);
  EXPECT_EQ(benchmark_bos(tokenizer::Bos::always, HarnessVersion::v0_4_9_1), tokenizer::Bos::always);
  EXPECT_EQ(parse_harness_version("0.4.9.1"), HarnessVersion::v0_4_9_1);
  EXPECT_THROW(parse_harness_version("0.3"), UsageError);
}

TEST(Encoding, length_is_found_where_the_harness_looks) {
  const ScratchFolder scratch;
  const auto length = [&](const std::function<void(Json&)>& change, const Json& tokenizer) {
    checkpoint::ModelConfig config;
    config.file = (scratch / "config.json").string();
    config.raw = {{"seq_length", 77}};
    change(config.raw);
    world().on_root([&] {
      fs::remove(scratch / "tokenizer_config.json");
      if (!tokenizer.is_null()) write_json(scratch / "tokenizer_config.json", tokenizer);
    });
    const std::int64_t result = harness_max_length(config);
    world().barrier("read");
    return result;
  };
  EXPECT_EQ(length([](Json& c) { c["n_ctx"] = 10, c["max_position_embeddings"] = 11; }, nullptr), 11);
  EXPECT_EQ(length([](Json& c) { c["n_ctx"] = 10, c["n_positions"] = 12; }, nullptr), 12);
  EXPECT_EQ(length([](Json& c) { c["n_ctx"] = 10; }, {{"model_max_length", 99}}), 10);
  EXPECT_EQ(length([](Json&) {}, {{"model_max_length", 99}}), 99);
  EXPECT_EQ(length([](Json&) {}, {{"model_max_length", 1e30}}), 2048);
  EXPECT_EQ(length([](Json&) {}, nullptr), 2048);
}

TEST(Packing, computes_common_beginnings_once_and_every_request_is_in_one_batch) {
  std::mt19937 random(3);
  std::vector<EncodedRequest> encoded;
  const auto ids = [&](int count) {
    std::vector<std::int32_t> list;
    for (int i = 0; i < count; ++i) list.push_back(static_cast<std::int32_t>(random() % 90));
    return list;
  };
  for (int question = 0; question < 30; ++question) {
    const auto context = std::make_shared<const std::vector<std::int32_t>>(ids(20 + question * 3));
    for (int choice = 0; choice < 4; ++choice) encoded.push_back({context, ids(question % 2 == 0 ? 1 : 1 + choice)});
  }
  std::shuffle(encoded.begin(), encoded.end(), random);
  const checkpoint::Reader reader(demo_model("prose-llama"));
  std::vector<ScoredSequence> sequences;
  std::int64_t separate = 0;
  for (const EncodedRequest& request : encoded) {
    sequences.emplace_back(request, 80);
    separate += sequences.back().size();
    EXPECT_LE(sequences.back().size(), 80);
    EXPECT_EQ(sequences.back().context_tokens() + sequences.back().scored(), sequences.back().size() + 1);
  }
  for (const bool share : {false, true}) {
    const PackingOptions options{200, share};
    std::vector<int> seen(sequences.size(), 0);
    std::int64_t rows = 0;
    double last_cost = 1e300;
    for (const BatchPlan& plan : plan_batches(sequences, options, reader.config())) {
      const ScoringBatch batch = make_batch(plan, sequences, options);
      EXPECT_EQ(batch.packed.ids.numel(), plan.rows);
      EXPECT_LE(plan.rows, 300);
      EXPECT_LE(plan.cost, last_cost);
      last_cost = plan.cost;
      rows += plan.rows;
      for (const std::size_t member : plan.members) ++seen[member];
      std::int64_t tokens = 0;
      for (const model::Segment& segment : batch.packed.segments) tokens += segment.tokens;
      EXPECT_EQ(tokens, plan.rows);
      std::size_t predictions = 0;
      for (const std::size_t member : plan.members) predictions += static_cast<std::size_t>(sequences[member].scored());
      EXPECT_EQ(batch.tokens.size(), predictions);
    }
    EXPECT_EQ(seen, std::vector<int>(sequences.size(), 1));
    if (share) {
      EXPECT_LT(rows, separate / 2);
    } else {
      EXPECT_EQ(rows, separate);
    }
  }
  EXPECT_THAT(deal({1, 5, 2, 2, 4}, 2), ElementsAre(1, 0, 1, 0, 1));
  EXPECT_THROW(ScoredSequence(encoded[0], 0), InternalError);
}

TEST(Generation, texts_are_cut_at_the_stops_in_turn) {
  EXPECT_EQ(cut_at_stops("one two three", {}), "one two three");
  EXPECT_EQ(cut_at_stops("one two three", {"two", "one"}), "");
  EXPECT_EQ(cut_at_stops("one two three", {" t", "wo"}), "one");
  EXPECT_EQ(cut_at_stops("one", {"", "x"}), "one");
}

// ---------------------------------------------------------------------------------------------------------------------
// Answers on disk

std::vector<BenchmarkTask> two_tasks() {
  std::vector<BenchmarkTask> tasks(2);
  tasks[0].requests = choices(24);
  tasks[1].requests = prompts(18, 5);
  for (const Request& request : choices(3)) tasks[1].requests.push_back(request);  // asked by the first one, too
  return tasks;
}

TEST(Resume, equals_an_uninterrupted_run) {
  const Model demo(demo_model("prose-llama"));
  const comm::Grid grid = comm::make_grid(world(), 1);
  const Responder responder = demo.responder(grid, {.max_tokens = 256, .most_slots = 2, .round_seconds = 1e-9});
  const std::vector<BenchmarkTask> tasks = two_tasks();
  const Asked whole = ask(world(), responder, tasks);
  EXPECT_EQ(whole.requests, 126);
  EXPECT_EQ(whole.known, 0);
  EXPECT_EQ(whole.repeated, 12);

  const ScratchFolder scratch;
  const OrderedJson identity = {{"model", "abc"}, {"dtype", "float32"}};
  std::int64_t known = 0;
  int runs = 0;
  while (true) {
    AnswerStore store(world(), scratch / "answers", identity);
    EXPECT_EQ(store.afresh(), "");
    const auto before = static_cast<std::int64_t>(store.size());
    EXPECT_GE(before, known);
    known = before;
    int rounds = 0;
    try {
      const Asked asked = ask(world(), responder, tasks, {.store = &store, .stop = [&] { return rounds++ == 1; }});
      EXPECT_GT(runs, 0) << "nothing was interrupted";
      EXPECT_GT(asked.known, 0);
      for (std::size_t t = 0; t < tasks.size(); ++t) expect_close(asked.answers[t], whole.answers[t]);
      break;
    } catch (const Stopped& stopped) {
      EXPECT_THAT(stopped.what(), HasSubstr("of 126 requests answered, saved in"));
      EXPECT_GT(static_cast<std::int64_t>(store.size()), before) << "a stop must not lose the shard at hand";
    }
    ASSERT_LT(++runs, 60);
  }

  // All is known now; a damaged shard is asked again.
  const auto again = [&](const OrderedJson& own_identity) {
    AnswerStore store(world(), scratch / "answers", own_identity);
    double skipped = 0;
    const Asked asked =
        ask(world(), responder, tasks, {.store = &store, .skipped = [&](double requests) { skipped += requests; }});
    EXPECT_EQ(skipped, static_cast<double>(asked.known + asked.repeated)) << "what needs no answer has no rate";
    for (std::size_t t = 0; t < tasks.size(); ++t) expect_close(asked.answers[t], whole.answers[t]);
    return std::pair(asked.known, store.afresh());
  };
  EXPECT_EQ(again(identity).first, 126);
  std::vector<fs::path> shards;
  for (const auto& entry : fs::directory_iterator(scratch / "answers"))
    if (entry.path().filename().string().starts_with("shard_")) shards.push_back(entry.path());
  ASSERT_GE(shards.size(), 4U);
  std::sort(shards.begin(), shards.end());
  world().on_root([&] {
    std::string text = read_file(shards[0]);
    fs::resize_file(shards[0], text.size() - 5);
    text = read_file(shards[1]);
    const std::size_t digit = text.find("log_likelihood\":-") + 17;
    text[digit] = text[digit] == '3' ? '4' : '3';
    write_file(shards[1], text);
    write_file(shards[2], "");
  });
  const std::int64_t left = again(identity).first;
  EXPECT_LT(left, 126);
  EXPECT_GT(left, 0);
  EXPECT_EQ(again(identity).first, 126);

  // Another model: nothing is used, and it is said why.
  const auto [none, why] = again({{"model", "abd"}, {"dtype", "float32"}});
  EXPECT_EQ(none, 0);
  EXPECT_THAT(why, HasSubstr("model was \"abc\" and is \"abd\""));
  EXPECT_THAT(why, testing::Not(HasSubstr("dtype")));
}

TEST(Resume, equal_questions_have_equal_keys_and_others_do_not) {
  const Request base = scored(1, 2, "context", " continuation");
  Request same = base;
  same.document = 9;
  same.index = 0;
  EXPECT_EQ(request_key(base), request_key(same));
  std::vector<std::string> keys = {request_key(base)};
  for (const auto& change : std::vector<std::function<void(Request&)>>{
           [](Request& r) { r.context = "contex", r.continuation = "t continuation"; },
           [](Request& r) { r.type = RequestType::generation; }, [](Request& r) { r.stops = {"a"}; },
           [](Request& r) {
             r.stops = {"a", ""};
           },
           [](Request& r) { r.max_new_tokens = 1; }}) {
    Request other = base;
    change(other);
    keys.push_back(request_key(other));
  }
  std::sort(keys.begin(), keys.end());
  EXPECT_EQ(std::unique(keys.begin(), keys.end()), keys.end());
}

}  // namespace
}  // namespace headfold::evaluation
