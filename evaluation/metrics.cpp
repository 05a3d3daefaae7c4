#include <headfold/base/error.h>
#include <headfold/evaluation/metrics.h>
#include <headfold/evaluation/python_random.h>
#include <headfold/evaluation/python_text.h>
#include <headfold/evaluation/text.h>
#include <headfold/tokenizer/utf8.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

namespace headfold::evaluation {
namespace {

using Words = std::vector<std::string>;

double harmonic(double precision, double recall) {
  return precision + recall > 0 ? 2 * precision * recall / (precision + recall) : 0;
}

bool is_digit(char c) {
  return c >= '0' && c <= '9';
}
bool is_number_part(char c) {
  return is_digit(c) || c == '.' || c == ',';
}

/// End of the longest run of characters from `begin` that `belongs` accepts.
template <class P>
std::size_t run_end(std::string_view text, std::size_t begin, P&& belongs) {
  while (begin < text.size() && belongs(text[begin])) ++begin;
  return begin;
}

Words ascii_words(std::string_view text) {
  Words words;
  std::string word;
  const auto close = [&] {
    if (!word.empty()) words.push_back(std::move(word));
    word.clear();
  };
  for (const char c : lower(text)) {
    if (is_digit(c) || (c >= 'a' && c <= 'z')) {
      word.push_back(c);
    } else {
      close();
    }
  }
  close();
  return words;
}

/// Table of longest common subsequences, [x.size() + 1][y.size() + 1].
std::vector<std::vector<std::int32_t>> subsequences(const Words& x, const Words& y) {
  std::vector<std::vector<std::int32_t>> table(x.size() + 1, std::vector<std::int32_t>(y.size() + 1, 0));
  for (std::size_t i = 1; i <= x.size(); ++i)
    for (std::size_t j = 1; j <= y.size(); ++j)
      table[i][j] = x[i - 1] == y[j - 1] ? table[i - 1][j - 1] + 1 : std::max(table[i - 1][j], table[i][j - 1]);
  return table;
}

std::map<Words, std::int64_t> n_grams(const Words& words, std::size_t n) {
  std::map<Words, std::int64_t> grams;
  for (std::size_t i = 0; i + n <= words.size(); ++i)
    ++grams[Words(words.begin() + static_cast<std::ptrdiff_t>(i), words.begin() + static_cast<std::ptrdiff_t>(i + n))];
  return grams;
}

/// Words equal in both, each as often as in the rarer.
template <class T>
std::int64_t overlap(const std::map<T, std::int64_t>& a, const std::map<T, std::int64_t>& b) {
  std::int64_t common = 0;
  for (const auto& [key, count] : a)
    if (const auto found = b.find(key); found != b.end()) common += std::min(count, found->second);
  return common;
}

/// LongBench's normalisation: lower case, no ASCII punctuation, "a", "an" and "the" as whole words removed.
Words answer_words(std::string_view text) {
  std::string bare;
  for (const char c : lower(text)) {
    const auto byte = static_cast<unsigned char>(c);
    const bool punctuation =
        byte > 0x20 && byte < 0x7F && !is_digit(c) && !(c >= 'a' && c <= 'z') && !(c >= 'A' && c <= 'Z');
    if (!punctuation) bare.push_back(c);
  }
  // Whole words between characters that belong to no word.
  std::string kept, word;
  const auto close = [&] {
    kept += word == "a" || word == "an" || word == "the" ? " " : word;
    word.clear();
  };
  for (std::size_t at = 0; at < bare.size();) {
    const auto character = tokenizer::code_point_at(bare, at);
    const std::string_view bytes = std::string_view(bare).substr(at, character.bytes);
    if (is_word_character(character.value)) {
      word += bytes;
    } else {
      close();
      kept += bytes;
    }
    at += character.bytes;
  }
  close();
  return split_words(kept);
}

/// End of the run of Python's \d from `begin`.
std::size_t digits_end(std::string_view text, std::size_t begin) {
  while (begin < text.size()) {
    const auto character = tokenizer::code_point_at(text, begin);
    if (!is_digit_character(character.value)) break;
    begin += character.bytes;
  }
  return begin;
}

/// re.findall(r"\d+", text)
std::vector<std::string> numbers_in(std::string_view text) {
  std::vector<std::string> numbers;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = digits_end(text, at);
    if (end > at) numbers.emplace_back(text.substr(at, end - at));
    at = end < text.size() ? end + tokenizer::code_point_at(text, end).bytes : end;
  }
  return numbers;
}

double share_equal(const std::vector<std::string>& numbers, std::string_view wanted) {
  if (numbers.empty()) return 0;
  return static_cast<double>(std::count(numbers.begin(), numbers.end(), wanted)) / static_cast<double>(numbers.size());
}

/// The package rouge: sentences are what stands between full stops, words what stands between single spaces.
std::vector<Words> rouge_sentences(std::string_view text) {
  std::vector<Words> sentences;
  for (const std::string& piece : split_on(text, ".")) {
    if (piece.empty()) continue;
    Words words = split_words(piece);
    if (words.empty()) words.emplace_back();  // "".split(" ") is one empty word
    sentences.push_back(std::move(words));
  }
  return sentences;
}

std::set<std::string> all_words(const std::vector<Words>& sentences) {
  std::set<std::string> words;
  for (const Words& sentence : sentences) words.insert(sentence.begin(), sentence.end());
  return words;
}

}  // namespace

double mean(const std::vector<double>& values) {
  if (values.empty()) throw InternalError("the mean of nothing");
  double sum = 0;
  for (const double value : values) sum += value;
  return sum / static_cast<double>(values.size());
}

std::optional<double> sample_deviation(const std::vector<double>& values) {
  if (values.size() < 2) return std::nullopt;
  const double middle = mean(values);
  double sum = 0;
  for (const double value : values) sum += (value - middle) * (value - middle);
  return std::sqrt(sum / static_cast<double>(values.size() - 1));
}

std::optional<double> mean_error(const std::vector<double>& values) {
  const auto deviation = sample_deviation(values);
  if (!deviation) return std::nullopt;
  return *deviation / std::sqrt(static_cast<double>(values.size()));
}

double perplexity(const std::vector<double>& log_likelihoods) {
  return std::exp(-mean(log_likelihoods));
}

std::optional<double> bootstrap_error(const std::vector<double>& values, std::int64_t iterations,
                                      const std::function<double(const std::vector<double>&)>& statistic) {
  if (iterations <= 0 || values.size() < 2) return std::nullopt;
  const std::int64_t chunk = std::min<std::int64_t>(1000, iterations);
  const std::int64_t chunks = iterations / chunk;
  std::vector<double> replicates(static_cast<std::size_t>(chunks * chunk));
#pragma omp parallel for schedule(dynamic)
  for (std::int64_t c = 0; c < chunks; ++c) {
    PythonRandom random(static_cast<std::uint32_t>(c));
    std::vector<double> drawn(values.size());
    for (std::int64_t i = 0; i < chunk; ++i) {
      for (double& value : drawn)
        value = values[static_cast<std::size_t>(random.random() * static_cast<double>(values.size()))];
      replicates[static_cast<std::size_t>(c * chunk + i)] = statistic(drawn);
    }
  }
  return sample_deviation(replicates);
}

double group_mean(const std::vector<GroupPart>& parts, bool weight_by_size) {
  double sum = 0, weight = 0;
  for (const GroupPart& part : parts) {
    const double share = weight_by_size ? static_cast<double>(part.count) : 1.0;
    sum += part.value * share;
    weight += share;
  }
  if (weight <= 0) throw InternalError("a group without a sample");
  return sum / weight;
}

std::optional<double> group_error(const std::vector<GroupPart>& parts) {
  double sum = 0, count = 0;
  for (const GroupPart& part : parts) {
    if (!part.error) return std::nullopt;
    const auto n = static_cast<double>(part.count);
    sum += (n - 1) * *part.error * *part.error * n;
    count += n;
  }
  const double freedom = count - static_cast<double>(parts.size());
  if (freedom <= 0) return std::nullopt;
  return std::sqrt(sum / freedom / count);
}

std::int64_t first_largest(const std::vector<double>& values) {
  return values.empty() ? -1 : std::max_element(values.begin(), values.end()) - values.begin();
}

double true_probability(const std::vector<double>& log_likelihoods, const std::vector<std::int64_t>& labels) {
  if (log_likelihoods.empty() || log_likelihoods.size() != labels.size())
    throw InternalError(fmt::format("{} log-likelihoods with {} labels", log_likelihoods.size(), labels.size()));
  const double largest = *std::max_element(log_likelihoods.begin(), log_likelihoods.end());
  double correct = 0, all = 0;
  for (std::size_t i = 0; i < labels.size(); ++i) {
    const double probability = std::exp(log_likelihoods[i] - largest);
    all += probability;
    if (labels[i] == 1) correct += probability;
  }
  return correct / all;
}

std::string gsm8k_strict(std::string_view text) {
  constexpr std::string_view kMark = "#### ";
  for (std::size_t at = text.find(kMark); at != std::string_view::npos; at = text.find(kMark, at + 1)) {
    const std::size_t begin = at + kMark.size();
    const std::size_t digits = begin < text.size() && text[begin] == '-' ? begin + 1 : begin;
    const std::size_t end = run_end(text, digits, is_number_part);
    if (end > digits) return std::string(text.substr(begin, end - begin));
  }
  return "[invalid]";
}

std::string gsm8k_cot_strict(std::string_view text) {
  constexpr std::string_view kMark = "The answer is ";
  for (std::size_t at = text.find(kMark); at != std::string_view::npos; at = text.find(kMark, at + 1)) {
    const std::size_t begin = at + kMark.size();
    const std::size_t digits = begin < text.size() && text[begin] == '-' ? begin + 1 : begin;
    std::size_t end = run_end(text, digits, is_number_part);
    if (end == text.size() || text[end] == '\n') {
      if (end <= digits) continue;
      --end;  // the expression ends with "any character"
    }
    if (end > digits) return std::string(text.substr(begin, end - begin));
  }
  return "[invalid]";
}

std::string gsm8k_flexible(std::string_view text) {
  const auto is_amount = [](char c) { return is_number_part(c) || c == '$'; };
  std::string_view last;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t begin = text[at] == '-' ? at + 1 : at;
    std::size_t end = run_end(text, begin, is_amount);
    if (end < begin + 2) end = run_end(text, begin, is_digit);
    if (end > begin) {
      last = text.substr(at, end - at);
      at = end;
    } else {
      ++at;
    }
  }
  return last.empty() ? "[invalid]" : std::string(last);
}

std::string gsm8k_normalized(std::string_view text) {
  std::string bare;
  for (const char c : text)
    if (c != ',' && c != '$') bare.push_back(c);
  constexpr std::string_view kMark = "#### ";
  if (const std::size_t at = bare.rfind(kMark); at != std::string::npos) bare.erase(0, at + kMark.size());
  // \.$ matches before a final line break too.
  if (bare.ends_with(".\n")) {
    bare.erase(bare.size() - 2, 1);
  } else if (bare.ends_with('.')) {
    bare.pop_back();
  }
  return lower(bare);
}

double rouge_n(std::string_view target, std::string_view prediction, std::size_t n) {
  const Words wanted = ascii_words(target), got = ascii_words(prediction);
  const auto common = static_cast<double>(overlap(n_grams(wanted, n), n_grams(got, n)));
  const auto count = [&](const Words& words) {
    return static_cast<double>(std::max<std::size_t>(words.size() >= n ? words.size() - n + 1 : 0, 1));
  };
  return harmonic(common / count(got), common / count(wanted));
}

double rouge_l(std::string_view target, std::string_view prediction) {
  const Words wanted = ascii_words(target), got = ascii_words(prediction);
  if (wanted.empty() || got.empty()) return 0;
  const auto common = static_cast<double>(subsequences(wanted, got).back().back());
  return harmonic(common / static_cast<double>(got.size()), common / static_cast<double>(wanted.size()));
}

double qa_f1(std::string_view prediction, std::string_view reference) {
  const Words got = answer_words(prediction), wanted = answer_words(reference);
  std::map<std::string, std::int64_t> got_counts, wanted_counts;
  for (const std::string& word : got) ++got_counts[word];
  for (const std::string& word : wanted) ++wanted_counts[word];
  const auto common = static_cast<double>(overlap(got_counts, wanted_counts));
  if (common == 0) return 0;
  return harmonic(common / static_cast<double>(got.size()), common / static_cast<double>(wanted.size()));
}

double longbench_rouge(std::string_view prediction, std::string_view reference) {
  const std::vector<Words> got = rouge_sentences(prediction), wanted = rouge_sentences(reference);
  if (got.empty() || wanted.empty()) return 0;  // the package refuses empty texts, and LongBench takes that for 0
  std::set<std::string> common;
  for (const Words& sentence : wanted) {
    for (const Words& candidate : got) {
      const auto table = subsequences(sentence, candidate);
      std::size_t i = sentence.size(), j = candidate.size();
      while (i > 0 && j > 0) {
        if (sentence[i - 1] == candidate[j - 1]) {
          common.insert(sentence[i - 1]);
          --i;
          --j;
        } else if (table[i - 1][j] > table[i][j - 1]) {
          --i;
        } else {
          --j;
        }
      }
    }
  }
  const auto shared = static_cast<double>(common.size());
  const double recall = shared / static_cast<double>(all_words(wanted).size());
  const double precision = shared / static_cast<double>(all_words(got).size());
  return 2.0 * (precision * recall / (precision + recall + 1e-8));
}

double count_score(std::string_view prediction, std::string_view reference) {
  return share_equal(numbers_in(prediction), reference);
}

std::optional<double> retrieval_score(std::string_view prediction, std::string_view reference) {
  constexpr std::string_view kMark = "Paragraph ";
  for (std::size_t at = reference.find(kMark); at != std::string_view::npos; at = reference.find(kMark, at + 1)) {
    const std::size_t begin = at + kMark.size();
    const std::size_t end = digits_end(reference, begin);
    if (end > begin) return share_equal(numbers_in(prediction), reference.substr(begin, end - begin));
  }
  return std::nullopt;
}

double classification_score(std::string_view prediction, std::string_view reference,
                            const std::vector<std::string>& classes) {
  std::vector<std::string> named;
  for (const std::string& name : classes)
    if (prediction.find(name) != std::string_view::npos) named.push_back(name);
  // LongBench removes from the list it walks through, so the one after a removed name is passed over.
  for (std::size_t i = 0; i < named.size(); ++i) {
    if (reference.find(named[i]) == std::string_view::npos || named[i] == reference) continue;
    named.erase(std::find(named.begin(), named.end(), std::string(named[i])));
  }
  if (std::find(named.begin(), named.end(), reference) == named.end()) return 0;
  return 1.0 / static_cast<double>(named.size());
}

}  // namespace headfold::evaluation
