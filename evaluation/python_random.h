#pragma once
// Python's random.Random, bit for bit: few-shot examples are drawn with it (docs/evaluation.md).

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace headfold::evaluation {

/// MT19937 seeded like `random.Random(seed)`; the methods are those of CPython 3.11 for non-negative integer seeds.
class PythonRandom {
 public:
  explicit PythonRandom(std::uint32_t seed);
  /// The next 32 bits.
  std::uint32_t next();
  /// The top `bits` bits of one output, 1 to 32 (InternalError otherwise).
  std::uint32_t getrandbits(int bits);
  /// Uniform below `limit`, 1 to 2^32 - 1 (InternalError otherwise): draws again until a value fits.
  std::uint32_t randbelow(std::uint32_t limit);
  /// Uniform in [0, 1) with 53 bits.
  double random();
  /// Indices of `count` different members of a population of `size`, in the order drawn. InternalError when there are
  /// fewer.
  std::vector<std::size_t> sample(std::size_t size, std::size_t count);
  /// Indices of `count` members drawn with replacement. `size` at least 1.
  std::vector<std::size_t> choices(std::size_t size, std::size_t count);

 private:
  void refill();
  std::array<std::uint32_t, 624> state_{};
  std::size_t position_ = 0;
};

}  // namespace headfold::evaluation
