#include <headfold/base/error.h>
#include <headfold/evaluation/benchmark.h>

#include <unordered_map>

namespace headfold::evaluation {

Asked ask(const comm::Communicator& world, const Responder& responder, const std::vector<BenchmarkTask>& tasks,
          const AskOptions& options) {
  Asked result;
  std::vector<const Request*> open;  // one of each question without an answer
  std::vector<std::string> open_keys;
  std::unordered_map<std::string, std::size_t> position;
  constexpr auto kKnown = static_cast<std::size_t>(-1);
  std::vector<std::vector<std::size_t>> source(tasks.size());  // by task and request: index into `open`
  result.answers.resize(tasks.size());
  for (std::size_t t = 0; t < tasks.size(); ++t) {
    const std::vector<Request>& requests = tasks[t].requests;
    result.answers[t].resize(requests.size());
    source[t].assign(requests.size(), kKnown);
    result.requests += std::ssize(requests);
    for (std::size_t r = 0; r < requests.size(); ++r) {
      const std::string key = request_key(requests[r]);
      if (const Answer* answer = options.store != nullptr ? options.store->find(key) : nullptr) {
        result.answers[t][r] = *answer;
        ++result.known;
        continue;
      }
      const auto [found, fresh] = position.emplace(key, open.size());
      if (fresh) {
        open.push_back(&requests[r]);
        open_keys.push_back(key);
      } else {
        ++result.repeated;
      }
      source[t][r] = found->second;
    }
  }
  if (options.skipped) options.skipped(static_cast<double>(result.known + result.repeated));

  std::size_t answered = 0;
  ResponderHooks hooks;
  hooks.progress = options.progress;
  hooks.finished = [&](const std::vector<std::size_t>& indices, const std::vector<Answer>& answers) {
    answered += indices.size();
    if (options.store != nullptr) {
      std::vector<std::string> keys;
      keys.reserve(indices.size());
      for (const std::size_t index : indices) keys.push_back(open_keys[index]);
      options.store->add(keys, answers);
    }
    return options.stop && options.stop();
  };
  const bool stop_now = world.all_reduce(std::int64_t{options.stop && options.stop() ? 1 : 0}, comm::Reduce::max) != 0;
  std::vector<Answer> fresh;
  if (!open.empty() && !stop_now) fresh = responder.answer(open, hooks);
  if (answered < open.size())
    throw Stopped(fmt::format("stopped on request with {} of {} requests answered{}",
                              result.requests - std::ssize(open) + static_cast<std::int64_t>(answered), result.requests,
                              options.store != nullptr ? ", saved in " + options.store->folder().string() : ""));
  for (std::size_t t = 0; t < tasks.size(); ++t)
    for (std::size_t r = 0; r < source[t].size(); ++r)
      if (source[t][r] != kKnown) result.answers[t][r] = fresh[source[t][r]];
  return result;
}

}  // namespace headfold::evaluation
