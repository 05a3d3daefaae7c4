#pragma once
// From documents to requests with the harness's rules (docs/evaluation.md): contexts, few-shot draws, limits.

#include <headfold/evaluation/suite.h>

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace headfold::evaluation {

/// A document as prompts and metrics see it.
struct Item {
  OrderedJson fields;                 ///< as the harness would write it
  std::string where;                  ///< "FILE, line 12"
  std::string context;                ///< the question as it ends the prompt, without trailing delimiter
  std::vector<std::string> contexts;  ///< one per choice where those differ (winogrande); `context` is not used then
  std::vector<std::string> choices;   ///< bare, without the delimiter before them
  std::int64_t gold = 0;              ///< index of the right choice
  std::vector<std::int64_t> labels;   ///< truthfulqa_mc2: 1 for true choices
  std::string answer;                 ///< what follows the question in a shot; the continuation of loglikelihood tasks
  std::string target;                 ///< as the harness writes it
  std::vector<std::string> references;  ///< generation: any of them is right
  std::vector<std::string> classes;     ///< classification over texts
};

enum class OutputType { multiple_choice, log_likelihood, generation };
enum class Sampler {
  random,   ///< Python's Random(seed).sample, once per evaluated document
  first_n,  ///< the first ones of the pool
};

/// How items become prompts.
struct PromptRules {
  OutputType type = OutputType::multiple_choice;
  std::string description;  ///< before everything else, verbatim
  std::string target_delimiter = " ";
  std::string fewshot_delimiter = "\n\n";
  std::int64_t shots = 0;    ///< unless the user says otherwise
  bool fixed_shots = false;  ///< truthfulqa: the user's number is not heeded
  Sampler sampler = Sampler::random;
  bool draws_one_more = false;     ///< one shot more is drawn and the evaluated document dropped
  std::vector<std::string> stops;  ///< generation
  std::int64_t max_new_tokens = 256;
};

/// Documents evaluated under --limit: all for 0, the fraction rounded up below 1, else that many. UsageError for a
/// negative or not finite limit, or one above 1 that is no whole number.
std::int64_t limited_count(std::int64_t documents, double limit);

/// The shots' texts in front of the questions of items 0 .. count - 1, drawn in this order. InputError when the pool is
/// too small (`name` for the message). A pool that is the evaluated split itself may be passed as such.
std::vector<std::string> shot_texts(const std::string& name, const std::vector<Item>& items, std::int64_t count,
                                    const std::vector<Item>& pool, const PromptRules& rules, std::int64_t shots,
                                    std::uint32_t seed);

/// One shot: question, delimiter, answer, delimiter.
std::string shot_text(const Item& item, const PromptRules& rules);

/// Requests of items 0 .. count - 1 with their shots in front, by document, then by choice.
std::vector<Request> make_requests(const std::vector<Item>& items, std::int64_t count,
                                   const std::vector<std::string>& shots, const PromptRules& rules);

// How answers become metrics.
// ------------------------------------------------------------------------------------------

/// Values of one document under one filter.
struct DocumentScore {
  std::string filter = "none";
  std::vector<std::string> filtered;
  std::vector<std::pair<std::string, double>> metrics;
};
/// The answers to a document's requests, in order.
using DocumentScorer = std::function<std::vector<DocumentScore>(const Item&, const std::vector<Answer>&)>;

/// acc and, as asked, acc_norm, acc_bytes (argmax of the log-likelihood, per code point, per byte).
DocumentScorer choice_scorer(std::vector<std::string> metrics);
/// truthfulqa_mc2's probability of the true answers, under the name acc.
DocumentScorer true_probability_scorer();
/// lambada: perplexity (the value is the log-likelihood, see aggregate()) and acc (greedy).
DocumentScorer word_scorer();
/// gsm8k's exact_match under its two filters.
DocumentScorer gsm8k_scorer(bool chain_of_thought);
/// rouge1, rouge2, rougeL.
DocumentScorer rouge_scorer();
/// Largest value over the references, under `name` and, for LongBench, as "score" before it.
DocumentScorer best_reference_scorer(
    std::string name, bool as_score,
    std::function<double(const std::string& prediction, const std::string& reference, const Item& item)> metric);

/// Documents' values to metrics with errors, in document order: means, but "perplexity" is exp(-mean) with a bootstrap
/// error. `by` (may be empty) adds the mean over the documents of each label: metric "name@label".
Scored aggregate(const BenchmarkTask& task, const std::vector<Item>& items, const std::vector<Answer>& answers,
                 const DocumentScorer& scorer, std::int64_t bootstrap_iterations,
                 const std::function<std::string(const Item&)>& by = {});

}  // namespace headfold::evaluation
