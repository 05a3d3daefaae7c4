#pragma once
// Benchmarks from requests to results: what is known is read, the rest is asked, tasks count.

#include <headfold/evaluation/answers.h>
#include <headfold/evaluation/responder.h>
#include <headfold/evaluation/suite.h>

#include <functional>
#include <vector>

namespace headfold::evaluation {

struct AskOptions {
  AnswerStore* store = nullptr;                        ///< where answers are kept; null: nowhere
  std::function<bool()> stop = {};                     ///< asked between shards on every rank; true ends the run
  std::function<void(double requests)> progress = {};  ///< new answers, over all ranks
  std::function<void(double requests)> skipped = {};   ///< what needs no new answer, told once
};

struct Asked {
  std::vector<std::vector<Answer>> answers;  ///< by task, by request
  std::int64_t requests = 0;                 ///< of all tasks
  std::int64_t known = 0;                    ///< of them answered in the store beforehand
  std::int64_t repeated = 0;                 ///< asked elsewhere in the same words, so not asked twice
};

/// Answers to the requests of every task. Equal questions are asked once. Collective. Stopped, with everything finished
/// in the store, once `stop` says so on any rank while requests are left.
Asked ask(const comm::Communicator& world, const Responder& responder, const std::vector<BenchmarkTask>& tasks,
          const AskOptions& options = {});

}  // namespace headfold::evaluation
