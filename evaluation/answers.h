#pragma once
// Answers on disk, so that an interrupted evaluation continues and a repeated one asks only what is new.

#include <headfold/base/json.h>
#include <headfold/comm/communicator.h>
#include <headfold/evaluation/requests.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <unordered_map>
#include <vector>

namespace headfold::evaluation {

/// What a request asks, as 64 hexadecimal digits: equal questions have equal answers, whatever task they belong to.
std::string request_key(const Request& request);

/// A folder of shards, each a file of answers made at once: `shard_000001.jsonl`, a line that says what it is and the
/// SHA-256 of the rest, then one line per answer. `identity.json` says which model and options gave them.
class AnswerStore {
 public:
  /// Opens `folder` or creates it. Answers of another identity are removed and a warning says what differs; a damaged
  /// shard is removed with a warning. `identity` is a flat object. Collective; every rank then knows every answer.
  AnswerStore(const comm::Communicator& world, std::filesystem::path folder, OrderedJson identity);
  std::size_t size() const { return answers_.size(); }
  /// Null when not known.
  const Answer* find(const std::string& key) const;
  /// Remembers answers and writes them as a new shard on rank 0 (the only writer). Collective; IoError on every rank.
  void add(const std::vector<std::string>& keys, const std::vector<Answer>& answers);
  const std::filesystem::path& folder() const { return folder_; }
  /// What differed from the answers that were removed, empty when nothing was.
  const std::string& afresh() const { return afresh_; }

 private:
  comm::Communicator world_;
  std::filesystem::path folder_;
  std::string identity_hash_;
  std::unordered_map<std::string, Answer> answers_;
  std::int64_t last_shard_ = 0;
  std::string afresh_;
};

}  // namespace headfold::evaluation
