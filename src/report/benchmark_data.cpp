// What the results files of several models say about the same benchmarks, compared on the same documents.

#include <fmt/format.h>
#include <headfold/report/benchmarks.h>
#include <headfold/report/samples.h>
#include <headfold/report/text.h>

#include <algorithm>
#include <cmath>
#include <set>

namespace headfold::report {
namespace {

/// Results and samples may be rounded differently when they were written.
constexpr double kRounding = 1e-6;

std::pair<std::string, std::string> split_key(const std::string& key) {
  const std::size_t comma = key.find(',');
  return {key.substr(0, comma), comma == std::string::npos ? std::string("none") : key.substr(comma + 1)};
}

/// The metric that stands for a task, by preference.
std::size_t preference(const std::string& metric, const std::string& filter) {
  static constexpr const char* kOrder[] = {"acc_norm", "acc", "exact_match", "score", "rougeL", "rouge1"};
  std::size_t place = 0;
  while (place < std::size(kOrder) && metric != kOrder[place]) ++place;
  return 2 * place + (filter == "none" || filter == "strict-match" ? 0 : 1);
}

/// Means of zeros and ones: here results and samples must agree.
bool plain_mean(const std::string& metric) {
  return metric == "acc" || metric == "acc_norm" || metric == "acc_bytes" || metric == "exact_match";
}

/// "a, b and 3 more".
std::string some_of(const std::vector<std::string>& names) {
  constexpr std::size_t kMost = 4;
  std::string text;
  const std::size_t shown = names.size() > kMost + 1 ? kMost : names.size();
  for (std::size_t i = 0; i < shown; ++i)
    text += (i == 0 ? "" : i + 1 == names.size() && shown == names.size() ? " and " : ", ") + names[i];
  if (shown < names.size()) text += fmt::format(" and {} more", names.size() - shown);
  return text;
}

/// Sentences about several tasks of one model for the same reason become one.
class Notes {
 public:
  /// "{tasks}" in `sentence` is replaced.
  void add(const std::string& sentence, const std::string& task) {
    for (auto& [text, tasks] : notes_)
      if (text == sentence) {
        if (std::find(tasks.begin(), tasks.end(), task) == tasks.end()) tasks.push_back(task);
        return;
      }
    notes_.push_back({sentence, {task}});
  }
  std::vector<std::string> sentences() const {
    std::vector<std::string> list;
    for (const auto& [text, tasks] : notes_) {
      const std::size_t at = text.find("{tasks}");
      list.push_back(at == std::string::npos ? text : text.substr(0, at) + some_of(tasks) + text.substr(at + 7));
    }
    return list;
  }

 private:
  std::vector<std::pair<std::string, std::vector<std::string>>> notes_;
};

/// What two models' files of one task have in common.
struct Pairing {
  bool comparable = true;  ///< as far as the files tell, both answered the same questions
  bool tested = false;     ///< the samples say so, document by document
  std::string why;         ///< a sentence for the notes, with {tasks}; empty: nothing to say
};

std::string times(std::size_t count, const char* what) {
  return fmt::format("{} {}{}", format_count(static_cast<std::int64_t>(count)), what, count == 1 ? "" : "s");
}

/// Whether the samples of one model can be used at all; a sentence when not.
std::string unusable(const std::string& model, const TaskResult& result) {
  const std::string consequence = "Differences on {tasks} are shown untested.";
  if (!result.samples)
    return fmt::format("{}: there are no samples of {{tasks}} beside {}. {}", model, result.file,
                       "Differences are shown untested.");
  if (!result.samples->problem.empty())
    return fmt::format("{}: {} {}. {}", model, result.samples->file, result.samples->problem, consequence);
  return {};
}

/// Whether results and samples of one model tell the same story; a sentence when not.
std::string contradiction(const std::string& model, const TaskResult& result) {
  if (!result.samples || !result.samples->problem.empty()) return {};
  const auto& documents = result.samples->documents;
  if (result.documents && *result.documents != static_cast<std::int64_t>(documents.size()))
    return fmt::format("{}: {} says that {{tasks}} had {}, {} holds {}. It is not compared.", model, result.file,
                       times(static_cast<std::size_t>(*result.documents), "document"), result.samples->file,
                       documents.size());
  for (const auto& [key, value] : result.metrics) {
    if (!value || !plain_mean(split_key(key).first)) continue;
    double sum = 0;
    std::size_t count = 0;
    for (const auto& [hash, document] : documents) {
      const auto found = document.values.find(key);
      if (found == document.values.end()) continue;
      sum += found->second;
      ++count;
    }
    if (count == 0) continue;
    const double mean = sum / static_cast<double>(count);
    if (std::abs(mean - *value) > kRounding)
      return fmt::format(
          "{}: {} gives {{tasks}} {} {}, its samples in {} average {}: one of the two was changed. It is not compared.",
          model, result.file, split_key(key).first, format_significant(*value, 4), result.samples->file,
          format_significant(mean, 4));
  }
  return {};
}

Pairing pair_up(const std::string& name, const TaskResult& result, const std::string& original_name,
                const TaskResult& original) {
  Pairing pairing;
  for (const auto& [model, one] : {std::pair(name, &result), std::pair(original_name, &original)}) {
    pairing.why = contradiction(model, *one);
    if (pairing.why.empty()) continue;
    pairing.comparable = false;
    return pairing;
  }
  if (result.shots && original.shots && *result.shots != *original.shots) {
    pairing.comparable = false;
    pairing.why = fmt::format("{}: {{tasks}} with {} before each question, the original with {}. Not compared.", name,
                              times(static_cast<std::size_t>(std::max<std::int64_t>(0, *result.shots)), "example"),
                              *original.shots);
    return pairing;
  }
  if (const std::string why = result.differs_from(original); !why.empty()) {
    pairing.comparable = false;
    pairing.why = fmt::format("{}: {{tasks}} with {}. Not compared.", name, why);
    return pairing;
  }
  for (const auto& [model, one] : {std::pair(name, &result), std::pair(original_name, &original)}) {
    pairing.why = unusable(model, *one);
    if (pairing.why.empty()) continue;
    if (result.documents && original.documents && *result.documents != *original.documents) {
      pairing.comparable = false;
      pairing.why =
          fmt::format("{}: {{tasks}} on {}, the original on {}. Not compared.", name,
                      times(static_cast<std::size_t>(std::max<std::int64_t>(0, *result.documents)), "document"),
                      *original.documents);
    }
    return pairing;
  }
  const auto &own = result.samples->documents, &other = original.samples->documents;
  std::size_t shared = 0, prompts = 0, targets = 0;
  for (const auto& [hash, document] : own) {
    const auto found = other.find(hash);
    if (found == other.end()) continue;
    ++shared;
    prompts += document.prompt != found->second.prompt ? 1 : 0;
    targets += document.target != found->second.target ? 1 : 0;
  }
  if (shared != own.size() || shared != other.size()) {
    pairing.comparable = false;
    pairing.why = fmt::format(
        "{}: {{tasks}} on other documents than the original's ({} and {}, {} in common). Not compared: evaluate both "
        "on the same files with the same --limit.",
        name, times(own.size(), "document"), other.size(), shared);
  } else if (targets > 0) {
    pairing.comparable = false;
    pairing.why = fmt::format("{}: {} of {{tasks}} had another right answer than for the original. Not compared.", name,
                              times(targets, "document"));
  } else if (prompts > 0) {
    pairing.comparable = false;
    pairing.why = fmt::format(
        "{}: {} of {{tasks}} had another prompt than for the original (examples, their order or the template). Not "
        "compared.",
        name, times(prompts, "document"));
  }
  pairing.tested = pairing.comparable;
  if (pairing.comparable && !result.dtype.empty() && !original.dtype.empty() && result.dtype != original.dtype)
    pairing.why =
        fmt::format("{}: {{tasks}} computed in {}, for the original in {}: part of the difference is rounding.", name,
                    result.dtype, original.dtype);
  return pairing;
}

/// Values of both models on the same documents, original first.
void append_pairs(const TaskResult& original, const TaskResult& result, const std::string& key,
                  std::vector<double>& first, std::vector<double>& second) {
  for (const auto& [hash, document] : original.samples->documents) {
    const auto other = result.samples->documents.find(hash);
    const auto a = document.values.find(key);
    if (other == result.samples->documents.end() || a == document.values.end()) continue;
    const auto b = other->second.values.find(key);
    if (b == other->second.values.end()) continue;
    first.push_back(a->second);
    second.push_back(b->second);
  }
}

class Collector {
 public:
  explicit Collector(const std::vector<ModelRow>& models) : models_(models) {
    for (const ModelRow& row : models_) {
      if (!row.evaluation) continue;
      for (const auto& [task, result] : row.evaluation->tasks) {
        if (result.of_text(task)) continue;
        tasks_.insert(task);
        for (const std::string& part : result.subtasks) parts_[task].insert(part);
      }
    }
    // Groups that were asked for without their parts, or that name themselves, are tasks like any other.
    for (auto& [name, parts] : parts_) {
      const std::string& group = name;
      std::erase_if(parts, [&](const std::string& part) { return part == group || !tasks_.contains(part); });
      for (const std::string& part : parts) above_[part].insert(group);
    }
  }

  Benchmarks collect() {
    for (const std::string& task : tasks_)
      if (!above_.contains(task)) add_with_parts(task, {});
    retrieval();
    result_.notes = notes_.sentences();
    return std::move(result_);
  }

 private:
  const TaskResult* find(std::size_t model, const std::string& task) const {
    if (!models_[model].evaluation) return nullptr;
    const auto found = models_[model].evaluation->tasks.find(task);
    return found == models_[model].evaluation->tasks.end() ? nullptr : &found->second;
  }
  /// The original that a task is compared with, or the number of models.
  std::size_t original_of(const std::string& task) const {
    for (std::size_t m = 0; m < models_.size(); ++m)
      if (models_[m].original && find(m, task) != nullptr) return m;
    return models_.size();
  }
  bool is_group(const std::string& task) const {
    const auto found = parts_.find(task);
    return found != parts_.end() && !found->second.empty();
  }

  void add_with_parts(const std::string& task, std::vector<std::string> above) {
    // A file may claim that two groups contain each other.
    if (std::find(above.begin(), above.end(), task) != above.end()) return;
    add(task, above);
    if (!is_group(task)) return;
    above.push_back(task);
    for (const std::string& part : parts_.at(task)) add_with_parts(part, above);
  }

  std::set<std::string> leaves(const std::string& group, std::set<std::string> seen = {}) const {
    std::set<std::string> found;
    if (!seen.insert(group).second) return found;
    for (const std::string& part : parts_.at(group)) {
      if (is_group(part))
        found.merge(leaves(part, seen));
      else
        found.insert(part);
    }
    return found;
  }

  void add(const std::string& task, const std::vector<std::string>& above) {
    std::set<std::string> keys;
    std::map<std::string, bool> higher;
    for (std::size_t m = 0; m < models_.size(); ++m) {
      const TaskResult* found = find(m, task);
      if (found == nullptr) continue;
      for (const auto& [key, value] : found->metrics) keys.insert(key);
      for (const auto& [metric, better] : found->higher_is_better) higher.emplace(metric, better);
    }
    std::vector<std::string> ordered(keys.begin(), keys.end());
    std::stable_sort(ordered.begin(), ordered.end(), [](const std::string& a, const std::string& b) {
      const auto [metric_a, filter_a] = split_key(a);
      const auto [metric_b, filter_b] = split_key(b);
      return preference(metric_a, filter_a) < preference(metric_b, filter_b);
    });
    const std::size_t original = original_of(task);
    std::vector<Pairing> pairings(models_.size());
    for (std::size_t m = 0; m < models_.size(); ++m) {
      const TaskResult* own = find(m, task);
      if (own == nullptr || original == models_.size() || m == original) continue;
      pairings[m] = is_group(task) ? pair_groups(m, original, task)
                                   : pair_up(models_[m].name, *own, models_[original].name, *find(original, task));
      if (!pairings[m].why.empty()) notes_.add(pairings[m].why, task);
    }
    bool first = true;
    for (const std::string& key : ordered) {
      BenchmarkColumn column;
      column.task = task;
      std::tie(column.metric, column.filter) = split_key(key);
      const auto better = higher.find(column.metric);
      column.higher_is_better = better != higher.end() ? better->second
                                                       : column.metric.find("perplexity") == std::string::npos &&
                                                             column.metric.find("bits") == std::string::npos;
      column.group = is_group(task);
      column.main = first;
      column.above = above;
      first = false;
      for (std::size_t m = 0; m < models_.size(); ++m)
        column.cells.push_back(cell(m, original, task, key, pairings[m]));
      result_.columns.push_back(std::move(column));
    }
  }

  /// A group is compared where all its tasks are.
  Pairing pair_groups(std::size_t model, std::size_t original, const std::string& group) const {
    Pairing pairing;
    pairing.tested = true;
    for (const std::string& leaf : leaves(group)) {
      const TaskResult *own = find(model, leaf), *other = find(original, leaf);
      if (own == nullptr || other == nullptr) {
        pairing.comparable = pairing.comparable && own == other;
        pairing.tested = false;
        if (own != other)
          pairing.why = fmt::format("{}: {{tasks}} is the mean of other tasks than the original's. Not compared.",
                                    models_[model].name);
        continue;
      }
      const Pairing one = pair_up(models_[model].name, *own, models_[original].name, *other);
      pairing.comparable = pairing.comparable && one.comparable;
      pairing.tested = pairing.tested && one.tested;
    }
    pairing.tested = pairing.tested && pairing.comparable;
    return pairing;
  }

  BenchmarkCell cell(std::size_t model, std::size_t original, const std::string& task, const std::string& key,
                     const Pairing& pairing) const {
    BenchmarkCell cell;
    const TaskResult* own = find(model, task);
    if (own == nullptr) return cell;
    const auto value = own->metrics.find(key);
    if (value == own->metrics.end()) return cell;
    cell.value = value->second;
    cell.file = own->file;
    if (own->samples) cell.samples_file = own->samples->file;
    if (const auto error = own->errors.find(key); error != own->errors.end()) cell.error = error->second;
    cell.documents = own->documents;
    if (!cell.documents && own->samples && own->samples->problem.empty())
      cell.documents = static_cast<std::int64_t>(own->samples->documents.size());
    if (is_group(task)) {
      std::int64_t sum = 0;
      for (const std::string& leaf : leaves(task))
        if (const TaskResult* part = find(model, leaf)) sum += part->documents.value_or(0);
      if (sum > 0) cell.documents = sum;
    }
    if (original == models_.size() || model == original || !pairing.comparable || !value->second) return cell;
    const TaskResult& base = *find(original, task);
    const auto base_value = base.metrics.find(key);
    if (base_value == base.metrics.end() || !base_value->second) return cell;
    cell.delta = *value->second - *base_value->second;
    if (!pairing.tested) return cell;
    std::vector<double> first, second;
    if (is_group(task)) {
      for (const std::string& leaf : leaves(task))
        append_pairs(*find(original, leaf), *find(model, leaf), key, first, second);
    } else {
      append_pairs(base, *own, key, first, second);
    }
    if (first.empty()) return cell;
    const PairedTest test = paired_test(first, second);
    // The plain mean of a group's tasks is not the mean of its documents: another question than the test's.
    if (is_group(task) && std::abs(test.mean - *cell.delta) > kRounding) return cell;
    cell.test = test;
    return cell;
  }

  void retrieval() {
    for (const BenchmarkColumn& column : result_.columns) {
      if (!column.main || column.group) continue;
      const std::string key = column.metric + "," + column.filter;
      for (std::size_t m = 0; m < models_.size(); ++m) {
        const TaskResult* found = find(m, column.task);
        if (found == nullptr || !found->samples || !found->samples->problem.empty()) continue;
        std::map<std::pair<double, double>, std::pair<double, int>> sums;
        std::set<double> lengths, depths;
        std::size_t placed = 0;
        for (const auto& [hash, document] : found->samples->documents) {
          const auto value = document.values.find(key);
          if (!document.length || !document.depth || value == document.values.end()) continue;
          lengths.insert(*document.length);
          depths.insert(*document.depth);
          auto& [sum, count] = sums[{*document.depth, *document.length}];
          sum += value->second;
          ++count;
          ++placed;
        }
        // A field of this name in some documents is no grid.
        if (placed != found->samples->documents.size() || lengths.size() * depths.size() < 2 || lengths.size() > 256 ||
            depths.size() > 256)
          continue;
        RetrievalMap map;
        map.task = column.task;
        map.metric = column.metric;
        map.model = m;
        map.lengths.assign(lengths.begin(), lengths.end());
        map.depths.assign(depths.begin(), depths.end());
        for (const double depth : map.depths) {
          std::vector<std::optional<double>> row;
          for (const double length : map.lengths) {
            const auto one = sums.find({depth, length});
            row.push_back(one == sums.end() ? std::nullopt
                                            : std::optional<double>(one->second.first / one->second.second));
          }
          map.means.push_back(std::move(row));
        }
        result_.retrieval.push_back(std::move(map));
      }
    }
  }

  const std::vector<ModelRow>& models_;
  std::set<std::string> tasks_;
  std::map<std::string, std::set<std::string>> parts_, above_;
  Benchmarks result_;
  Notes notes_;
};

}  // namespace

bool BenchmarkColumn::share() const {
  static const std::set<std::string> kShares = {"acc",    "acc_norm", "acc_bytes", "exact_match", "rouge1",
                                                "rouge2", "rougeL",   "f1",        "qa_f1_score", "em"};
  return kShares.contains(metric.substr(0, metric.find('@')));
}

Benchmarks benchmarks_of(const std::vector<ModelRow>& models) {
  return Collector(models).collect();
}

}  // namespace headfold::report
