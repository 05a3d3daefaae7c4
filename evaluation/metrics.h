#pragma once
// Metrics of the evaluation harness and of LongBench: on answers' numbers and on texts.

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace headfold::evaluation {

// Over documents ------------------------------------------------------------------------------------------------------

/// Sum in order divided by the count. InternalError for nothing.
double mean(const std::vector<double>& values);
/// Sample standard deviation (n - 1); none for fewer than two values.
std::optional<double> sample_deviation(const std::vector<double>& values);
/// Standard error of the mean; none for fewer than two values.
std::optional<double> mean_error(const std::vector<double>& values);
/// exp(-mean): perplexity from log-likelihoods.
double perplexity(const std::vector<double>& log_likelihoods);
/// Standard deviation of `statistic` over resamples with replacement: chunks of 1000, chunk i drawn by Random(i).
/// Chunks run on this process's threads; the result does not depend on how many. None for no iterations or one value.
std::optional<double> bootstrap_error(const std::vector<double>& values, std::int64_t iterations,
                                      const std::function<double(const std::vector<double>&)>& statistic);

/// A task's share in a group.
struct GroupPart {
  double value = 0;
  std::optional<double> error;
  std::int64_t count = 0;
};
/// Mean weighted by count, or plain.
double group_mean(const std::vector<GroupPart>& parts, bool weight_by_size);
/// sqrt(sum((n - 1) se^2 n) / (sum n - k) / sum n); none when a part has none.
std::optional<double> group_error(const std::vector<GroupPart>& parts);

// On one document -----------------------------------------------------------------------------------------------------

/// Index of the largest value, the first on ties. -1 for nothing.
std::int64_t first_largest(const std::vector<double>& values);
/// Probability of the true answers: sum of exp over those with label 1, divided by that over all.
double true_probability(const std::vector<double>& log_likelihoods, const std::vector<std::int64_t>& labels);

/// gsm8k: the number after "#### " (first occurrence), "[invalid]" when there is none.
std::string gsm8k_strict(std::string_view text);
/// gsm8k_cot: the number after "The answer is " that one more character follows.
std::string gsm8k_cot_strict(std::string_view text);
/// gsm8k: the last thing that looks like a number.
std::string gsm8k_flexible(std::string_view text);
/// What both sides of gsm8k's exact_match are compared by: without commas, dollars, everything up to "#### ", and a
/// final full stop; lower case.
std::string gsm8k_normalized(std::string_view text);

/// F1 of n-grams or of the longest common subsequence, words being runs of [a-z0-9] in lower case: ROUGE-1, ROUGE-2 and
/// ROUGE-L of Google's rouge_score without stemming.
double rouge_n(std::string_view target, std::string_view prediction, std::size_t n);
double rouge_l(std::string_view target, std::string_view prediction);

// LongBench (its metrics.py), prediction against one reference:
// ---------------------------------------------------------

/// F1 of words after lower-casing and removing punctuation, articles and white space.
double qa_f1(std::string_view prediction, std::string_view reference);
/// ROUGE-L of the Python package rouge: over sentences between full stops, on sets of words.
double longbench_rouge(std::string_view prediction, std::string_view reference);
/// Share of the numbers in the prediction that are the reference.
double count_score(std::string_view prediction, std::string_view reference);
/// The same with the number after "Paragraph " in the reference; none when the reference has no such number.
std::optional<double> retrieval_score(std::string_view prediction, std::string_view reference);
/// 1 / number of classes named in the prediction when the reference is among them.
double classification_score(std::string_view prediction, std::string_view reference,
                            const std::vector<std::string>& classes);

}  // namespace headfold::evaluation
