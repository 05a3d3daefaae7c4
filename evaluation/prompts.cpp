#include <headfold/base/error.h>
#include <headfold/evaluation/metrics.h>
#include <headfold/evaluation/prompts.h>
#include <headfold/evaluation/python_random.h>
#include <headfold/evaluation/python_text.h>
#include <headfold/evaluation/text.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace headfold::evaluation {
namespace {

std::size_t as_index(std::int64_t value) {
  return static_cast<std::size_t>(value);
}

std::string only_text(const std::vector<Answer>& answers) {
  if (answers.size() != 1) throw InternalError(fmt::format("{} answers to one prompt", answers.size()));
  return answers[0].text;
}

double as_number(bool right) {
  return right ? 1.0 : 0.0;
}

}  // namespace

std::int64_t limited_count(std::int64_t documents, double limit) {
  if (!(limit >= 0) || !std::isfinite(limit) || (limit >= 1 && limit != std::floor(limit)))
    throw UsageError(fmt::format("--limit {}: a whole number of documents, or a fraction below 1", limit));
  if (limit == 0) return documents;
  const double wanted = limit < 1 ? std::ceil(static_cast<double>(documents) * limit) : limit;
  return wanted >= static_cast<double>(documents) ? documents : static_cast<std::int64_t>(wanted);
}

std::string shot_text(const Item& item, const PromptRules& rules) {
  const std::string& question = item.contexts.empty() ? item.context : item.contexts[as_index(item.gold)];
  return question + rules.target_delimiter + item.answer + rules.fewshot_delimiter;
}

std::vector<std::string> shot_texts(const std::string& name, const std::vector<Item>& items, std::int64_t count,
                                    const std::vector<Item>& pool, const PromptRules& rules, std::int64_t shots,
                                    std::uint32_t seed) {
  std::vector<std::string> texts(as_index(count));
  if (shots == 0) return texts;
  const std::int64_t wanted = shots + (rules.draws_one_more && rules.sampler == Sampler::random ? 1 : 0);
  if (wanted > static_cast<std::int64_t>(pool.size()))
    throw InputError(
        fmt::format("{}: {} shots are drawn from {} documents{}", name, wanted, pool.size(),
                    pool.empty() ? std::string() : fmt::format(" ({} and what follows)", pool.front().where)),
        "choose fewer with --num-fewshot");
  if (rules.sampler == Sampler::first_n) {
    std::string text;
    for (std::int64_t i = 0; i < shots; ++i) text += shot_text(pool[as_index(i)], rules);
    std::fill(texts.begin(), texts.end(), text);
    return texts;
  }
  PythonRandom random(seed);
  for (std::int64_t d = 0; d < count; ++d) {
    std::int64_t kept = 0;
    for (const std::size_t index : random.sample(pool.size(), as_index(wanted))) {
      // The harness compares whole documents, so a twin of the evaluated one is dropped too.
      if (kept == shots || pool[index].fields == items[as_index(d)].fields) continue;
      texts[as_index(d)] += shot_text(pool[index], rules);
      ++kept;
    }
  }
  return texts;
}

std::vector<Request> make_requests(const std::vector<Item>& items, std::int64_t count,
                                   const std::vector<std::string>& shots, const PromptRules& rules) {
  std::vector<Request> requests;
  for (std::int64_t d = 0; d < count; ++d) {
    const Item& item = items[as_index(d)];
    const std::string before = rules.description + shots[as_index(d)];
    Request request;
    request.document = d;
    switch (rules.type) {
      case OutputType::multiple_choice:
        for (std::size_t i = 0; i < std::max(item.contexts.size(), item.choices.size()); ++i) {
          request.index = static_cast<std::int64_t>(i);
          request.context = before + (item.contexts.empty() ? item.context : item.contexts[i]);
          request.continuation = rules.target_delimiter + (item.contexts.empty() ? item.choices[i] : item.answer);
          requests.push_back(request);
        }
        break;
      case OutputType::log_likelihood:
        request.context = before + item.context;
        request.continuation = item.answer;
        requests.push_back(request);
        break;
      case OutputType::generation:
        request.type = RequestType::generation;
        request.context = before + item.context;
        request.stops = rules.stops;
        request.max_new_tokens = rules.max_new_tokens;
        requests.push_back(request);
        break;
    }
  }
  return requests;
}

DocumentScorer choice_scorer(std::vector<std::string> metrics) {
  return [metrics = std::move(metrics)](const Item& item, const std::vector<Answer>& answers) {
    std::vector<double> plain, by_character, by_byte;
    for (std::size_t i = 0; i < answers.size(); ++i) {
      plain.push_back(answers[i].log_likelihood);
      if (!item.contexts.empty()) continue;
      by_character.push_back(plain[i] / static_cast<double>(code_points(item.choices[i])));
      by_byte.push_back(plain[i] / static_cast<double>(item.choices[i].size()));
    }
    DocumentScore score;
    for (const std::string& metric : metrics) {
      const std::vector<double>& values = metric == "acc" ? plain : (metric == "acc_norm" ? by_character : by_byte);
      score.metrics.emplace_back(metric, as_number(first_largest(values) == item.gold));
    }
    return std::vector<DocumentScore>{score};
  };
}

DocumentScorer true_probability_scorer() {
  return [](const Item& item, const std::vector<Answer>& answers) {
    std::vector<double> values;
    values.reserve(answers.size());
    for (const Answer& answer : answers) values.push_back(answer.log_likelihood);
    DocumentScore score;
    score.metrics.emplace_back("acc", true_probability(values, item.labels));
    return std::vector<DocumentScore>{score};
  };
}

DocumentScorer word_scorer() {
  return [](const Item&, const std::vector<Answer>& answers) {
    if (answers.size() != 1) throw InternalError(fmt::format("{} answers to one word", answers.size()));
    DocumentScore score;
    score.metrics.emplace_back("perplexity", answers[0].log_likelihood);
    score.metrics.emplace_back("acc", as_number(answers[0].greedy));
    return std::vector<DocumentScore>{score};
  };
}

DocumentScorer gsm8k_scorer(bool chain_of_thought) {
  return [chain_of_thought](const Item& item, const std::vector<Answer>& answers) {
    const std::string text = only_text(answers);
    const std::string right = gsm8k_normalized(item.references.at(0));
    std::vector<DocumentScore> scores;
    for (const char* filter : {"strict-match", "flexible-extract"}) {
      DocumentScore score;
      score.filter = filter;
      const bool strict = score.filter == "strict-match";
      score.filtered = {strict ? (chain_of_thought ? gsm8k_cot_strict(text) : gsm8k_strict(text))
                               : gsm8k_flexible(text)};
      score.metrics.emplace_back("exact_match", as_number(gsm8k_normalized(score.filtered[0]) == right));
      scores.push_back(std::move(score));
    }
    return scores;
  };
}

DocumentScorer rouge_scorer() {
  return [](const Item& item, const std::vector<Answer>& answers) {
    DocumentScore score;
    score.filtered = {only_text(answers)};
    const std::string& reference = item.references.at(0);
    score.metrics.emplace_back("rouge1", rouge_n(reference, score.filtered[0], 1));
    score.metrics.emplace_back("rouge2", rouge_n(reference, score.filtered[0], 2));
    score.metrics.emplace_back("rougeL", rouge_l(reference, score.filtered[0]));
    return std::vector<DocumentScore>{score};
  };
}

DocumentScorer best_reference_scorer(
    std::string name, bool as_score,
    std::function<double(const std::string& prediction, const std::string& reference, const Item& item)> metric) {
  return [name = std::move(name), as_score, metric = std::move(metric)](const Item& item,
                                                                        const std::vector<Answer>& answers) {
    DocumentScore score;
    score.filtered = {only_text(answers)};
    const std::string prediction(strip(score.filtered[0]));
    double best = 0;
    for (const std::string& reference : item.references) best = std::max(best, metric(prediction, reference, item));
    if (as_score) score.metrics.emplace_back("score", best);
    score.metrics.emplace_back(name, best);
    return std::vector<DocumentScore>{score};
  };
}

Scored aggregate(const BenchmarkTask& task, const std::vector<Item>& items, const std::vector<Answer>& answers,
                 const DocumentScorer& scorer, std::int64_t bootstrap_iterations,
                 const std::function<std::string(const Item&)>& by) {
  if (answers.size() != task.requests.size())
    throw InternalError(fmt::format("{}: {} answers to {} requests", task.name, answers.size(), task.requests.size()));
  Scored scored;
  struct Column {
    std::string metric, filter, label;
    std::vector<double> values;
  };
  std::vector<Column> columns;
  const auto column = [&](const std::string& metric, const std::string& filter, const std::string& label) -> Column& {
    for (Column& known : columns)
      if (known.metric == metric && known.filter == filter && known.label == label) return known;
    return columns.emplace_back(Column{metric, filter, label, {}});
  };
  std::size_t next = 0;
  for (std::size_t d = 0; d < task.documents.size(); ++d) {
    std::vector<Answer> own;
    for (; next < answers.size() && task.requests[next].document == static_cast<std::int64_t>(d); ++next)
      own.push_back(answers[next]);
    for (DocumentScore& score : scorer(items[d], own)) {
      for (const auto& [metric, value] : score.metrics) {
        column(metric, score.filter, "").values.push_back(value);
        if (by) column(metric, score.filter, by(items[d])).values.push_back(value);
      }
      scored.samples.push_back(
          {static_cast<std::int64_t>(d), score.filter, std::move(score.filtered), std::move(score.metrics)});
    }
  }
  // Samples go to the file filter by filter, as the harness writes them.
  std::stable_sort(scored.samples.begin(), scored.samples.end(), [&](const Sample& a, const Sample& b) {
    const auto order = [&](const std::string& filter) {
      for (std::size_t i = 0; i < columns.size(); ++i)
        if (columns[i].filter == filter) return i;
      return columns.size();
    };
    return order(a.filter) < order(b.filter);
  });
  std::stable_sort(columns.begin(), columns.end(),
                   [](const Column& a, const Column& b) { return a.label.empty() && !b.label.empty(); });
  for (const Column& values : columns) {
    Metric metric;
    metric.name = values.label.empty() ? values.metric : values.metric + "@" + values.label;
    metric.filter = values.filter;
    if (values.metric == "perplexity") {
      metric.value = perplexity(values.values);
      metric.error = bootstrap_error(values.values, bootstrap_iterations, perplexity);
      metric.higher_is_better = false;
    } else {
      metric.value = mean(values.values);
      metric.error = mean_error(values.values);
    }
    scored.metrics.push_back(std::move(metric));
  }
  return scored;
}

}  // namespace headfold::evaluation
