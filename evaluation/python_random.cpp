#include <headfold/base/error.h>
#include <headfold/evaluation/python_random.h>

#include <bit>
#include <cmath>
#include <unordered_set>

namespace headfold::evaluation {
namespace {

constexpr std::size_t kState = 624, kShift = 397;

}  // namespace

PythonRandom::PythonRandom(std::uint32_t seed) {
  // init_genrand(19650218), then init_by_array with one key, as CPython does for an integer below 2^32.
  state_[0] = 19650218U;
  for (std::size_t i = 1; i < kState; ++i)
    state_[i] = 1812433253U * (state_[i - 1] ^ (state_[i - 1] >> 30)) + static_cast<std::uint32_t>(i);
  std::size_t i = 1;
  for (std::size_t k = 0; k < kState; ++k) {
    state_[i] = (state_[i] ^ ((state_[i - 1] ^ (state_[i - 1] >> 30)) * 1664525U)) + seed;
    if (++i >= kState) {
      state_[0] = state_[kState - 1];
      i = 1;
    }
  }
  for (std::size_t k = 0; k + 1 < kState; ++k) {
    state_[i] = (state_[i] ^ ((state_[i - 1] ^ (state_[i - 1] >> 30)) * 1566083941U)) - static_cast<std::uint32_t>(i);
    if (++i >= kState) {
      state_[0] = state_[kState - 1];
      i = 1;
    }
  }
  state_[0] = 0x80000000U;
  position_ = kState;
}

void PythonRandom::refill() {
  const auto twist = [&](std::size_t at, std::size_t next, std::size_t far) {
    const std::uint32_t y = (state_[at] & 0x80000000U) | (state_[next] & 0x7FFFFFFFU);
    state_[at] = state_[far] ^ (y >> 1) ^ ((y & 1U) != 0 ? 0x9908B0DFU : 0U);
  };
  for (std::size_t k = 0; k < kState - kShift; ++k) twist(k, k + 1, k + kShift);
  for (std::size_t k = kState - kShift; k < kState - 1; ++k) twist(k, k + 1, k + kShift - kState);
  twist(kState - 1, 0, kShift - 1);
  position_ = 0;
}

std::uint32_t PythonRandom::next() {
  if (position_ >= kState) refill();
  std::uint32_t y = state_[position_++];
  y ^= y >> 11;
  y ^= (y << 7) & 0x9D2C5680U;
  y ^= (y << 15) & 0xEFC60000U;
  return y ^ (y >> 18);
}

std::uint32_t PythonRandom::getrandbits(int bits) {
  if (bits < 1 || bits > 32) throw InternalError(fmt::format("getrandbits({}): 1 to 32 bits", bits));
  return next() >> (32 - bits);
}

std::uint32_t PythonRandom::randbelow(std::uint32_t limit) {
  if (limit == 0) throw InternalError("randbelow(0)");
  const int bits = std::bit_width(limit);
  std::uint32_t value = getrandbits(bits);
  while (value >= limit) value = getrandbits(bits);
  return value;
}

double PythonRandom::random() {
  const std::uint32_t a = next() >> 5, b = next() >> 6;
  return (a * 67108864.0 + b) * (1.0 / 9007199254740992.0);
}

std::vector<std::size_t> PythonRandom::sample(std::size_t size, std::size_t count) {
  if (count > size || size > UINT32_MAX)
    throw InternalError(fmt::format("a sample of {} from a population of {}", count, size));
  // CPython takes the pool while it is smaller than the set of the indices seen would be.
  std::size_t set_size = 21;
  if (count > 5)
    set_size += std::size_t{1} << (2 * static_cast<std::size_t>(
                                           std::ceil(std::log(static_cast<double>(count) * 3.0) / std::log(4.0))));
  std::vector<std::size_t> drawn(count);
  if (size <= set_size) {
    std::vector<std::size_t> pool(size);
    for (std::size_t i = 0; i < size; ++i) pool[i] = i;
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t j = randbelow(static_cast<std::uint32_t>(size - i));
      drawn[i] = pool[j];
      pool[j] = pool[size - i - 1];
    }
  } else {
    std::unordered_set<std::size_t> seen;
    for (std::size_t& index : drawn) {
      do {
        index = randbelow(static_cast<std::uint32_t>(size));
      } while (!seen.insert(index).second);
    }
  }
  return drawn;
}

std::vector<std::size_t> PythonRandom::choices(std::size_t size, std::size_t count) {
  if (size == 0) throw InternalError("choices from nothing");
  std::vector<std::size_t> drawn(count);
  for (std::size_t& index : drawn) index = static_cast<std::size_t>(std::floor(random() * static_cast<double>(size)));
  return drawn;
}

}  // namespace headfold::evaluation
