#pragma once
// Paired tests: do two models differ on the same documents?

#include <cstdint>
#include <vector>

namespace headfold::report {

/// Two-sided p below this is called significant; no correction for the number of comparisons.
inline constexpr double kSignificance = 0.05;

/// Differences of one metric, second model less first, document by document.
struct PairedTest {
  std::int64_t documents = 0;
  double mean = 0;   ///< of the differences
  double error = 0;  ///< standard error of that mean: sample deviation (n - 1) / sqrt n; 0 for one document
  /// Both models' values are all 0 or 1: McNemar's exact test on the documents that only one of them has right.
  /// Otherwise the z test on mean / error.
  bool exact = false;
  std::int64_t only_first = 0, only_second = 0;  ///< documents where that model has the larger value
  double p = 1;                                  ///< two-sided
  bool significant() const { return p < kSignificance; }
};

/// Throws InternalError unless both lists are equally long, not empty and finite.
PairedTest paired_test(const std::vector<double>& first, const std::vector<double>& second);

/// McNemar's exact two-sided p: the probability, were each of the `a + b` discordant documents a fair coin, of a split
/// at least as uneven. 1 without any.
double mcnemar_p(std::int64_t a, std::int64_t b);

}  // namespace headfold::report
