#include <fmt/format.h>
#include <headfold/base/error.h>
#include <headfold/report/paired.h>

#include <algorithm>
#include <cmath>

namespace headfold::report {

double mcnemar_p(std::int64_t a, std::int64_t b) {
  const std::int64_t n = a + b, least = std::min(a, b);
  if (a < 0 || b < 0) throw InternalError(fmt::format("discordant documents counted {} and {}", a, b));
  if (a == b) return 1;
  // The lower tail of a binomial, from its largest term down: terms fall off, so that none is lost to rounding.
  const auto log_term = [n](std::int64_t k) {
    return std::lgamma(static_cast<double>(n + 1)) - std::lgamma(static_cast<double>(k + 1)) -
           std::lgamma(static_cast<double>(n - k + 1)) - static_cast<double>(n) * std::log(2.0);
  };
  double term = std::exp(log_term(least)), tail = 0;
  for (std::int64_t k = least; k >= 0 && term > 0; --k) {
    tail += term;
    term *= static_cast<double>(k) / static_cast<double>(n - k + 1);
  }
  return std::min(1.0, 2 * tail);
}

PairedTest paired_test(const std::vector<double>& first, const std::vector<double>& second) {
  if (first.size() != second.size() || first.empty())
    throw InternalError(fmt::format("a paired test of {} and {} values", first.size(), second.size()));
  PairedTest test;
  test.documents = static_cast<std::int64_t>(first.size());
  test.exact = true;
  const auto count = static_cast<double>(first.size());
  double sum = 0;
  for (std::size_t i = 0; i < first.size(); ++i) {
    if (!std::isfinite(first[i]) || !std::isfinite(second[i]))
      throw InternalError(fmt::format("a paired test of {} and {}", first[i], second[i]));
    for (const double value : {first[i], second[i]}) test.exact = test.exact && (value == 0 || value == 1);
    test.only_first += first[i] > second[i] ? 1 : 0;
    test.only_second += second[i] > first[i] ? 1 : 0;
    sum += second[i] - first[i];
  }
  test.mean = sum / count;
  if (first.size() > 1) {
    double squares = 0;
    for (std::size_t i = 0; i < first.size(); ++i) {
      const double off = second[i] - first[i] - test.mean;
      squares += off * off;
    }
    test.error = std::sqrt(squares / (count - 1) / count);
  }
  if (test.exact)
    test.p = mcnemar_p(test.only_first, test.only_second);
  else if (first.size() == 1)
    test.p = 1;  // one document says nothing about the next
  else if (test.error > 0)
    test.p = std::erfc(std::abs(test.mean) / test.error / std::sqrt(2.0));
  else
    test.p = test.mean == 0 ? 1 : 0;
  return test;
}

}  // namespace headfold::report
