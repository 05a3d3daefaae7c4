#pragma once
// Scores of a text's windows on disk while the text is being scored, so that an interrupted evaluation goes on.

#include <headfold/evaluation/answers.h>
#include <headfold/evaluation/scorer.h>
#include <headfold/evaluation/tasks.h>

#include <chrono>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace headfold::evaluation {

/// Scores go to an AnswerStore of their own, every so many seconds. They are kept by task, window and everything that
/// the windows say, so that another limit or text finds none of them.
class ScoreStore {
 public:
  /// `identity`: models, how they compute and what is computed together. Collective.
  ScoreStore(const comm::Communicator& world, std::filesystem::path folder, OrderedJson identity,
             double save_seconds = 20);
  /// Scores of the task's windows that earlier runs saved.
  std::vector<std::optional<WindowScore>> known(const Task& task) const;
  /// Remembers scores (ScoreHooks::scored) and saves them when it is time, or with `now` at once. Collective.
  void add(const Task& task, const std::vector<std::size_t>& windows, const std::vector<WindowScore>& scores, bool now);
  std::size_t size() const { return store_.size(); }
  const std::filesystem::path& folder() const { return store_.folder(); }
  /// Removes the folder, once the results are written. Rank 0 alone.
  void remove() const;

 private:
  const std::string& hash_of(const Task& task) const;
  comm::Communicator world_;
  AnswerStore store_;
  double save_seconds_;
  std::chrono::steady_clock::time_point saved_ = std::chrono::steady_clock::now();
  mutable std::map<const Task*, std::string> hashes_;
  std::vector<std::string> keys_;  ///< not saved yet
  std::vector<Answer> answers_;
};

}  // namespace headfold::evaluation
