#pragma once
// Private: the lower triangle of a symmetric [n, n] matrix as column blocks, the form in which a GPU keeps a Gram's
// sums. Block k holds columns [k * block, ...) of the rows from k * block on, row-major; blocks follow one another in
// one float64 tensor. Entries above the diagonal within a block are there too and equal those below.

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>

namespace headfold::linalg {

/// Columns per block on a GPU unless asked otherwise. Wide blocks waste products above the diagonal, narrow ones do not
/// fill a GPU; bench_gpu measures it.
constexpr std::int64_t kDeviceBlock = 1024;

/// One block: columns [first, first + width) of rows [first, n), at `offset` of the tensor.
struct GramBlock {
  std::int64_t first = 0, width = 0, height = 0, offset = 0;
  at::Tensor of(const at::Tensor& blocks) const {
    return blocks.narrow(0, offset, height * width).view({height, width});
  }
};

template <class Work>
void for_each_gram_block(std::int64_t n, std::int64_t block, const Work& work) {
  std::int64_t offset = 0;
  for (std::int64_t first = 0; first < n; first += block) {
    const GramBlock part{first, std::min(block, n - first), n - first, offset};
    offset += part.width * part.height;
    work(part);
  }
}

/// Entries of all blocks together.
std::int64_t gram_blocks_size(std::int64_t n, std::int64_t block);
/// Blocks on the CPU, float64 -> the packed lower triangle [n (n + 1) / 2].
at::Tensor pack_gram_blocks(const at::Tensor& blocks, std::int64_t n, std::int64_t block);
/// The other way round; entries above the diagonal are mirrored.
at::Tensor unpack_gram_blocks(const at::Tensor& packed, std::int64_t n, std::int64_t block);
/// blocks += x^T x, x [tokens, n] contiguous on the blocks' device, float32, bfloat16 or float64. `vendor`: products of
/// the GPU's library (cublas.h), otherwise ATen's.
void add_gram_blocks(at::Tensor& blocks, const at::Tensor& x, std::int64_t block, bool vendor);

}  // namespace headfold::linalg
