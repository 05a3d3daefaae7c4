#include "gram_blocks.h"

#include <ATen/Parallel.h>
#include <headfold/linalg/linalg.h>

#include "cublas.h"

namespace headfold::linalg {

std::int64_t gram_blocks_size(std::int64_t n, std::int64_t block) {
  std::int64_t size = 0;
  for_each_gram_block(n, block, [&](const GramBlock& part) { size += part.height * part.width; });
  return size;
}

at::Tensor pack_gram_blocks(const at::Tensor& blocks, std::int64_t n, std::int64_t block) {
  at::Tensor packed = at::empty({packed_size(n)}, at::kDouble);
  double* to = packed.data_ptr<double>();
  for_each_gram_block(n, block, [&](const GramBlock& part) {
    const double* from = blocks.data_ptr<double>() + part.offset;
    at::parallel_for(0, part.height, 64, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i)
        std::copy_n(from + i * part.width, std::min(part.width, i + 1), to + packed_size(part.first + i) + part.first);
    });
  });
  return packed;
}

at::Tensor unpack_gram_blocks(const at::Tensor& packed, std::int64_t n, std::int64_t block) {
  at::Tensor blocks = at::empty({gram_blocks_size(n, block)}, at::kDouble);
  const double* from = packed.data_ptr<double>();
  for_each_gram_block(n, block, [&](const GramBlock& part) {
    double* to = blocks.data_ptr<double>() + part.offset;
    at::parallel_for(0, part.height, 64, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        std::copy_n(from + packed_size(part.first + i) + part.first, std::min(part.width, i + 1), to + i * part.width);
        for (std::int64_t j = i + 1; j < part.width; ++j)
          to[i * part.width + j] = from[packed_size(part.first + j) + part.first + i];
      }
    });
  });
  return blocks;
}

void add_gram_blocks(at::Tensor& blocks, const at::Tensor& x, std::int64_t block, bool vendor) {
  const std::int64_t n = x.size(1);
  const bool wide = x.scalar_type() == at::kDouble;
  const at::Tensor rows = vendor || x.scalar_type() != at::kBFloat16 ? x : x.to(at::kFloat);
  at::Tensor scratch;
  if (!wide) scratch = at::empty({std::min(block, n) * n}, x.options().dtype(at::kFloat));
  for_each_gram_block(n, block, [&](const GramBlock& part) {
    at::Tensor sums = part.of(blocks);
    const at::Tensor left = rows.narrow(1, part.first, part.height), right = rows.narrow(1, part.first, part.width);
    if (wide) {
      sums.addmm_(left.t(), right);
      return;
    }
    at::Tensor product = scratch.narrow(0, 0, part.height * part.width).view({part.height, part.width});
    if (vendor)
      cublas_product(left, right, product);
    else
      at::mm_out(product, left.t(), right);
    sums.add_(product);
  });
}

}  // namespace headfold::linalg
