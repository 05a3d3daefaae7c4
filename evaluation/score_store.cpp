#include <headfold/base/hash.h>
#include <headfold/evaluation/score_store.h>

namespace headfold::evaluation {
namespace {

/// What a task asks of a model, as text.
std::string windows_hash(const Task& task) {
  Sha256 hash;
  hash.update(task.name);
  for (const Window& window : task.windows) {
    hash.update(fmt::format("|{} {}|", window.inputs.size(), window.targets.size()));
    for (const std::vector<std::int64_t>* ids : {&window.inputs, &window.targets})
      hash.update(std::as_bytes(std::span(*ids)));
  }
  return hash.hex();
}

std::string window_key(const std::string& task, std::size_t window) {
  return sha256_hex(fmt::format("{} {}", task, window));
}

// An answer holds one number and a text: the other numbers of a score go into the text. JSON's numbers are read back
// bit for bit.
Answer to_answer(const WindowScore& score) {
  Answer answer;
  answer.log_likelihood = -score.loss;
  answer.scored_tokens = score.tokens;
  answer.text = Json::array({score.reference_loss, score.divergence, score.agreements}).dump();
  return answer;
}

std::optional<WindowScore> to_score(const Answer& answer) {
  const Json rest = Json::parse(answer.text, nullptr, false);
  if (!rest.is_array() || rest.size() != 3 || !rest[0].is_number() || !rest[1].is_number() ||
      !rest[2].is_number_integer())
    return std::nullopt;
  WindowScore score;
  score.tokens = answer.scored_tokens;
  score.loss = -answer.log_likelihood;
  score.reference_loss = rest[0].get<double>();
  score.divergence = rest[1].get<double>();
  score.agreements = rest[2].get<std::int64_t>();
  return score;
}

}  // namespace

ScoreStore::ScoreStore(const comm::Communicator& world, std::filesystem::path folder, OrderedJson identity,
                       double save_seconds)
    : world_(world), store_(world, std::move(folder), std::move(identity)), save_seconds_(save_seconds) {}

const std::string& ScoreStore::hash_of(const Task& task) const {
  std::string& hash = hashes_[&task];
  if (hash.empty()) hash = windows_hash(task);
  return hash;
}

std::vector<std::optional<WindowScore>> ScoreStore::known(const Task& task) const {
  std::vector<std::optional<WindowScore>> scores(task.windows.size());
  if (store_.size() == 0) return scores;
  const std::string& hash = hash_of(task);
  for (std::size_t w = 0; w < scores.size(); ++w)
    if (const Answer* answer = store_.find(window_key(hash, w)))
      if (const auto score = to_score(*answer);
          score && score->tokens == static_cast<std::int64_t>(task.windows[w].targets.size()))
        scores[w] = score;
  return scores;
}

void ScoreStore::add(const Task& task, const std::vector<std::size_t>& windows, const std::vector<WindowScore>& scores,
                     bool now) {
  const std::string& hash = hash_of(task);
  for (std::size_t i = 0; i < windows.size(); ++i) {
    keys_.push_back(window_key(hash, windows[i]));
    answers_.push_back(to_answer(scores[i]));
  }
  std::int64_t due = now ? 1 : 0;
  if (world_.root() &&
      std::chrono::duration<double>(std::chrono::steady_clock::now() - saved_).count() >= save_seconds_)
    due = 1;
  if (world_.all_reduce(due, comm::Reduce::max) == 0) return;
  store_.add(keys_, answers_);
  keys_.clear();
  answers_.clear();
  saved_ = std::chrono::steady_clock::now();
}

void ScoreStore::remove() const {
  std::error_code code;
  std::filesystem::remove_all(store_.folder(), code);
}

}  // namespace headfold::evaluation
