#include <headfold/base/error.h>
#include <headfold/evaluation/windows.h>

#include <algorithm>

namespace headfold::evaluation {

std::vector<Window> block_windows(const std::vector<std::int64_t>& stream, std::int64_t length) {
  if (length < 2) throw UsageError(fmt::format("a window of {} tokens predicts nothing: it needs at least 2", length));
  std::vector<Window> windows;
  const auto size = static_cast<std::int64_t>(stream.size());
  for (std::int64_t begin = 0; begin + length <= size; begin += length) {
    const auto first = stream.begin() + begin;
    windows.push_back({begin / length, {first, first + length - 1}, {first + 1, first + length}});
  }
  return windows;
}

std::vector<Window> rolling_windows(const std::vector<std::int64_t>& ids, std::int64_t prefix, std::int64_t max_length,
                                    std::int64_t document) {
  if (max_length < 1) throw UsageError(fmt::format("rolling windows of {} tokens: at least 1 is needed", max_length));
  std::vector<Window> windows;
  const auto size = static_cast<std::int64_t>(ids.size());
  if (size == 0) return windows;
  std::int64_t predicted = std::min(max_length, size);
  Window first{document, {prefix}, {ids.begin(), ids.begin() + predicted}};
  first.inputs.insert(first.inputs.end(), ids.begin(), ids.begin() + predicted - 1);
  windows.push_back(std::move(first));
  while (predicted < size) {
    const std::int64_t end = std::min(predicted + max_length, size);
    // predicted >= max_length here, so end - max_length - 1 >= 0: the inputs are always max_length tokens.
    windows.push_back({document,
                       {ids.begin() + end - max_length - 1, ids.begin() + end - 1},
                       {ids.begin() + predicted, ids.begin() + end}});
    predicted = end;
  }
  return windows;
}

}  // namespace headfold::evaluation
