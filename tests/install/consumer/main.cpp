// A second project that uses an installed headfold: one low-rank problem whose answer is known.
#include <headfold/base/version.h>
#include <headfold/checkpoint/reader.h>
#include <headfold/folding/apply.h>
#include <headfold/linalg/linalg.h>

#include <cstdio>

int main() {
  const auto sigma = at::diag(at::tensor({4.0, 3.0, 2.0, 1.0}, at::kDouble));
  const auto result = headfold::linalg::weighted_low_rank(sigma, {}, 2);
  std::printf("headfold %s: loss %.1f of %.1f\n", headfold::version().c_str(), result.loss, result.total);
  return result.loss > 2.99 && result.loss < 3.01 ? 0 : 1;
}
