#pragma once
// Tensors count in signed numbers, containers of the standard library in unsigned ones.

#include <cstddef>
#include <cstdint>

namespace headfold {

/// A count or position that is not negative, as an index of a container.
inline std::size_t ix(std::int64_t index) {
  return static_cast<std::size_t>(index);
}

}  // namespace headfold
