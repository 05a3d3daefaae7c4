// Requests per second on four-choice questions with long contexts: headfold's responder against a plain scorer that
// runs one request after the other, whole sequence, no batch, nothing shared (docs/performance.md, section
// "Evaluation").
//
//   bench_evaluate --model DIR [--text FILE.jsonl] [--questions 50] [--context 200] [--choice 6] [--dtype float32]
//                  [--max-batch-tokens 4096] [--threads N] [--repeat 3]
//                  [--task NAME --data-dir DIR [--shots K]]
//
// With --task, the first --questions documents of a task of the suite, or of each task of a group. --context and
// --choice count words of the text. Both scorers answer the same requests right after one another in every repetition,
// so that a busy machine slows both; the median ratio is printed. The plain scorer computes logits of the scored
// positions alone, like headfold; "all logits" is what it takes with those of every position, as is common.

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <headfold/base/error.h>
#include <headfold/calibration/text.h>
#include <headfold/device/measure.h>
#include <headfold/evaluation/registry.h>
#include <headfold/evaluation/responder.h>

#include <time.h>

#include <cstdlib>
#include <iostream>

namespace {

using namespace headfold;
using bench::median;
using bench::seconds;

std::vector<evaluation::Request> questions(const std::filesystem::path& file, std::int64_t count, std::int64_t context,
                                           std::int64_t choice, std::int64_t shots) {
  std::vector<std::string> words;
  for (const std::string& document : calibration::read_documents({file}, "text"))
    for (std::size_t at = 0; at < document.size();) {
      const std::size_t end = std::min(document.find_first_of(" \n", at), document.size());
      if (end > at) words.push_back(document.substr(at, end - at));
      at = end + 1;
    }
  std::size_t next = 0;
  const auto take = [&](std::int64_t number) {
    std::string text;
    for (std::int64_t i = 0; i < number; ++i) text += (i > 0 ? " " : "") + words[next++ % words.size()];
    return text;
  };
  std::vector<evaluation::Request> requests;
  const std::string beginning = shots > 0 ? take(shots) + "\n\n" : "";
  for (std::int64_t q = 0; q < count; ++q) {
    evaluation::Request request;
    request.document = q;
    request.context = beginning + take(context);
    for (request.index = 0; request.index < 4; ++request.index) {
      request.continuation = choice > 0 ? " " + take(choice) : std::string(" ") + "ABCD"[request.index];
      requests.push_back(request);
    }
  }
  return requests;
}

/// Requests of a task of the suite.
std::vector<evaluation::Request> task_requests(const std::string& name, const std::string& data_dir,
                                               std::int64_t questions, const std::string& shots) {
  evaluation::SuiteOptions options;
  options.data_dir = data_dir;
  options.limit = static_cast<double>(questions);
  if (!shots.empty()) options.shots = std::strtoll(shots.c_str(), nullptr, 10);
  std::vector<evaluation::Request> requests;
  for (const evaluation::BenchmarkTask& task : evaluation::make_tasks({name}, options).tasks)
    requests.insert(requests.end(), task.requests.begin(), task.requests.end());
  return requests;
}

/// One request after the other through the layers.
class Plain {
 public:
  Plain(const checkpoint::Reader& reader, at::ScalarType dtype, std::int64_t max_length)
      : decoder_(reader, dtype), embedding_(reader, dtype), head_(reader, dtype), max_length_(max_length) {}
  double score(const evaluation::EncodedRequest& request, bool all_logits) const {
    std::vector<std::int64_t> ids(request.context->begin(), request.context->end());
    ids.insert(ids.end(), request.continuation.begin(), request.continuation.end());
    if (std::ssize(ids) > max_length_ + 1) ids.erase(ids.begin(), ids.end() - max_length_ - 1);
    const std::int64_t inputs = std::ssize(ids) - 1;
    const std::int64_t scored = std::ssize(request.continuation);
    at::Tensor hidden = embedding_.forward(at::tensor(ids, at::kLong).slice(0, 0, inputs).unsqueeze(0));
    for (const auto& layer : decoder_.layers()) hidden = layer->forward(hidden);
    at::Tensor logits = head_.logits(all_logits ? hidden[0] : hidden[0].slice(0, inputs - scored));
    if (all_logits) logits = logits.slice(0, inputs - scored);
    const at::Tensor log_p = at::log_softmax(logits, -1, at::kFloat);
    const at::Tensor targets =
        at::tensor(std::vector<std::int64_t>(ids.end() - scored, ids.end()), at::kLong).unsqueeze(1);
    return log_p.gather(1, targets).sum().item<double>();
  }

 private:
  model::Decoder decoder_;
  model::Embedding embedding_;
  model::Head head_;
  std::int64_t max_length_;
};

int run(int argc, char** argv) {
  std::map<std::string, std::string> options = {{"--model", ""},
                                                {"--text", "demo/text/heldout.jsonl"},
                                                {"--questions", "50"},
                                                {"--context", "200"},
                                                {"--choice", "6"},
                                                {"--shots", ""},
                                                {"--task", ""},
                                                {"--data-dir", ""},
                                                {"--dtype", "float32"},
                                                {"--threads", "0"},
                                                {"--max-batch-tokens", "4096"},
                                                {"--repeat", "3"}};
  for (int i = 1; i + 1 < argc; i += 2) {
    const auto found = options.find(argv[i]);
    if (found == options.end()) throw UsageError(fmt::format("unknown option {}", argv[i]));
    found->second = argv[i + 1];
  }
  if (options["--model"].empty()) throw UsageError("--model is needed");
  const auto number = [&](const char* name) { return std::strtoll(options.at(name).c_str(), nullptr, 10); };
  if (number("--threads") > 0) at::set_num_threads(static_cast<int>(number("--threads")));
  const at::ScalarType dtype = options["--dtype"] == "bfloat16" ? at::kBFloat16 : at::kFloat;

  const checkpoint::Reader reader(options["--model"]);
  const auto tokenizer = tokenizer::load_tokenizer(reader.folder());
  const std::vector<evaluation::Request> requests =
      options["--task"].empty()
          ? questions(options["--text"], number("--questions"), number("--context"), number("--choice"),
                      number("--shots"))
          : task_requests(options["--task"], options["--data-dir"], number("--questions"), options["--shots"]);
  std::vector<const evaluation::Request*> pointers;
  for (const evaluation::Request& request : requests) pointers.push_back(&request);
  const evaluation::Responder responder(reader, *tokenizer, {},
                                        {.dtype = dtype, .max_tokens = number("--max-batch-tokens")});
  const Plain plain(reader, dtype, responder.max_length());
  const evaluation::Encoder encoder(*tokenizer, tokenizer::Bos::model_default);
  const std::vector<evaluation::EncodedRequest> encoded =
      evaluation::encode_requests(comm::Communicator::self(), encoder, pointers);
  std::int64_t context_tokens = 0;
  for (const evaluation::EncodedRequest& request : encoded) context_tokens += std::ssize(*request.context);

  std::vector<double> own, plainly, all_logits, ratios, all_ratios;
  double largest = 0;
  for (std::int64_t r = 0; r < number("--repeat"); ++r) {
    std::vector<evaluation::Answer> answers;
    own.push_back(seconds([&] { answers = responder.answer(pointers); }));
    // Encoding belongs to a request in both.
    plainly.push_back(seconds([&] {
      const auto fresh = evaluation::encode_requests(comm::Communicator::self(), encoder, pointers);
      for (std::size_t i = 0; i < fresh.size(); ++i)
        largest = std::max(largest, std::abs(plain.score(fresh[i], false) - answers[i].log_likelihood));
    }));
    all_logits.push_back(seconds([&] {
      for (const evaluation::EncodedRequest& request : encoded) plain.score(request, true);
    }));
    ratios.push_back(plainly.back() / own.back());
    all_ratios.push_back(all_logits.back() / own.back());
  }
  const auto count = static_cast<double>(requests.size());
  std::cout << fmt::format(
      "{} requests, contexts of {:.0f} tokens, {}, {} threads\n"
      "headfold     {:.1f} requests/s\nplain        {:.1f} requests/s, ratio {:.2f}\n"
      "all logits   {:.1f} requests/s, ratio {:.2f}\nlargest difference of a log-likelihood {:.2g}\n",
      requests.size(), static_cast<double>(context_tokens) / count, options["--dtype"], at::get_num_threads(),
      count / median(own), count / median(plainly), median(ratios), count / median(all_logits), median(all_ratios),
      largest);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const at::NoGradGuard no_grad;
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << headfold::describe(error) << "\n";
    return 1;
  }
}
