#include <headfold/base/error.h>
#include <headfold/linalg/linalg.h>

namespace headfold::linalg {
namespace {

/// The roots of Lambda's blocks, applied block by block: Lambda is never formed.
class BlockRoots {
 public:
  BlockRoots(const std::vector<at::Tensor>& blocks, std::int64_t p, at::ScalarType dtype, double ridge, double tau) {
    std::int64_t rows = 0;
    double trace = 0;
    double largest = 0;
    for (const at::Tensor& block : blocks) {
      if (block.dim() != 2 || block.size(0) != block.size(1))
        throw InternalError(fmt::format("a weight block must be square, got {}", fmt::join(block.sizes(), " x ")));
      rows += block.size(0);
      trace += at::real(block.diagonal()).to(at::kDouble).sum().item<double>();
    }
    if (!blocks.empty() && rows != p)
      throw InternalError(fmt::format("weight blocks have {} rows in all, Sigma has {}", rows, p));
    if (!std::isfinite(trace)) throw NumericalError("the weights of a fold contain NaN or Inf");
    std::vector<at::Tensor> ridged;
    for (const at::Tensor& block : blocks) {
      if (dtype == at::kDouble && block.is_complex()) throw InternalError("complex weights on a real Sigma");
      at::Tensor m = block.to(dtype).clone();
      if (ridge > 0) m.diagonal().add_(ridge * trace / static_cast<double>(p));
      // The largest diagonal entry is within a factor of the block size of the largest eigenvalue: enough for the
      // floor.
      if (m.numel() > 0) largest = std::max(largest, at::real(m.diagonal()).max().item<double>());
      ridged.push_back(m);
    }
    for (const at::Tensor& m : ridged) roots_.push_back(psd_root(m, tau, tau * tau * largest));
  }

  /// Lw x (rows of x follow the blocks), or Lw^+ x.
  at::Tensor left(const at::Tensor& x, bool inverse) const {
    if (roots_.empty()) return x;
    std::vector<at::Tensor> parts;
    std::int64_t row = 0;
    for (const PsdRoot& root : roots_) {
      const at::Tensor& factor = inverse ? root.inverse_root : root.root;
      parts.push_back(at::matmul(factor, x.narrow(0, row, factor.size(0))));
      row += factor.size(0);
    }
    return at::cat(parts, 0);
  }

 private:
  std::vector<PsdRoot> roots_;
};

at::Tensor hermitian(const at::Tensor& x) {
  return x.transpose(-2, -1).conj().resolve_conj();
}

}  // namespace

LowRank weighted_low_rank(const at::Tensor& sigma, const std::vector<at::Tensor>& lambda_blocks, std::int64_t width,
                          double weight_ridge, double tau) {
  if (sigma.dim() != 2 || sigma.size(0) != sigma.size(1))
    throw InternalError(fmt::format("Sigma must be square, got {}", fmt::join(sigma.sizes(), " x ")));
  if (sigma.scalar_type() != at::kDouble && sigma.scalar_type() != at::kComplexDouble)
    throw InternalError("Sigma must be float64 or complex128");
  const std::int64_t p = sigma.size(0);
  if (width < 0 || width > p) throw InternalError(fmt::format("width {} of a low-rank map with {} rows", width, p));
  LowRank result;
  const double largest = p == 0 ? 0 : sigma.abs().max().item<double>();
  if (!std::isfinite(largest)) throw NumericalError("the covariance of a fold contains NaN or Inf");
  if (largest == 0) {
    result.encoder = at::eye(width, p, sigma.options());
    result.decoder = at::eye(p, width, sigma.options());
    result.energies = at::zeros({p}, at::kDouble);
    return result;
  }
  const BlockRoots roots(lambda_blocks, p, sigma.scalar_type(), weight_ridge, tau);
  const at::Tensor half = roots.left(sigma, false);         // Lw Sigma
  const at::Tensor f = roots.left(hermitian(half), false);  // Lw Sigma^H Lw^H: Hermitian, so no adjoint is needed
  const Eigen eigen = eigh(f);
  result.energies = eigen.values.clamp_min(0);
  result.total = result.energies.sum().item<double>();
  result.loss = result.energies.narrow(0, width, p - width).sum().item<double>();
  const at::Tensor u = eigen.vectors.narrow(1, 0, width).contiguous();
  result.encoder = hermitian(roots.left(u, false)).contiguous();  // U^H Lw = (Lw U)^H, Lw Hermitian
  result.decoder = roots.left(u, true).contiguous();
  return result;
}

}  // namespace headfold::linalg
