#include <headfold/base/error.h>
#include <headfold/linalg/linalg.h>

namespace headfold::linalg {

at::Tensor map_rows(const at::Tensor& map, const at::Tensor& rows) {
  if (map.dim() != 2 || rows.dim() != 2 || map.size(1) != rows.size(0) || map.scalar_type() != at::kDouble ||
      rows.scalar_type() != at::kDouble)
    throw InternalError(fmt::format("a map of shape {} cannot be applied to rows of shape {}",
                                    fmt::join(map.sizes().vec(), " x "), fmt::join(rows.sizes().vec(), " x ")));
  // Reading a row costs what a few dozen multiplications per element cost a dense product.
  if (map.count_nonzero().item<std::int64_t>() * 16 > map.numel()) return at::matmul(map, rows);
  const at::Tensor weights = map.contiguous(), source = rows.contiguous();
  const std::int64_t made = map.size(0), given = map.size(1), columns = rows.size(1);
  at::Tensor result = at::zeros({made, columns}, at::kDouble);
  for (std::int64_t i = 0; i < made; ++i) {
    double* const out = result.data_ptr<double>() + i * columns;
    for (std::int64_t j = 0; j < given; ++j) {
      const double weight = weights.data_ptr<double>()[i * given + j];
      if (weight == 0) continue;
      const double* const in = source.data_ptr<double>() + j * columns;
#pragma omp simd
      for (std::int64_t k = 0; k < columns; ++k) out[k] += weight * in[k];
    }
  }
  return result;
}

}  // namespace headfold::linalg
