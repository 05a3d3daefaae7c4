#include <headfold/base/error.h>
#include <headfold/linalg/linalg.h>

#include <limits>

namespace headfold::linalg {
namespace {

constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
constexpr double kDeadChannel = 1e-14;   // of its block's largest weight
constexpr double kLossMismatch = 1e-8;   // of the total
constexpr double kNegativeShare = 1e-4;  // of the total; sums of bfloat16 products leave up to some 1e-6

double real_trace(const at::Tensor& m) {
  return at::real(m.diagonal()).sum().to(at::kDouble).item<double>();
}

/// Lw, a factor of Lambda, applied block by block: Lambda is never formed. Lw_k = root(D^-1 Lambda_k D^-1) D.
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
      trace += real_trace(block);
    }
    if (!blocks.empty() && rows != p)
      throw InternalError(fmt::format("weight blocks have {} rows in all, Sigma has {}", rows, p));
    if (!std::isfinite(trace)) throw NumericalError("the weights of a fold contain NaN or Inf");
    for (const at::Tensor& block : blocks) {
      if (dtype == at::kDouble && block.is_complex()) throw InternalError("complex weights on a real Sigma");
      at::Tensor m = block.to(dtype).clone();
      if (ridge > 0) m.diagonal().add_(ridge * trace / static_cast<double>(p));
      // The largest diagonal entry is within a factor of the block size of the largest eigenvalue: enough for the
      // floor.
      if (m.numel() > 0) largest = std::max(largest, at::real(m.diagonal()).max().item<double>());
      blocks_.push_back(m);
    }
    for (const at::Tensor& m : blocks_) factors_.push_back(factor_of(m, tau, tau * tau * largest));
  }

  /// Lw x; rows of x follow the blocks.
  at::Tensor apply(const at::Tensor& x) const {
    return each(x, [](const Factor& f, const at::Tensor& part) { return at::matmul(f.root, f.scale * part); });
  }
  /// Lw^H x
  at::Tensor apply_adjoint(const at::Tensor& x) const {
    return each(x, [](const Factor& f, const at::Tensor& part) { return f.scale * at::matmul(f.root, part); });
  }
  /// G x with Lw G = the projector on the directions that weigh something.
  at::Tensor apply_inverse(const at::Tensor& x) const {
    return each(x,
                [](const Factor& f, const at::Tensor& part) { return f.inverse_scale * at::matmul(f.inverse, part); });
  }

  struct Cost {
    double value = 0, magnitude = 0;  ///< tr(Lambda m); the same of absolute values, which bounds its rounding
  };
  Cost cost_of(const at::Tensor& m) const {
    if (blocks_.empty()) {
      const double trace = real_trace(m);
      return {trace, std::abs(trace)};
    }
    Cost cost;
    std::int64_t row = 0;
    for (const at::Tensor& block : blocks_) {
      const std::int64_t n = block.size(0);
      const at::Tensor products = block.conj().resolve_conj() * m.narrow(0, row, n).narrow(1, row, n);
      cost.value += at::real(products.sum()).item<double>();
      cost.magnitude += products.abs().sum().item<double>();
      row += n;
    }
    return cost;
  }

 private:
  struct Factor {
    at::Tensor root, inverse;         // of the equilibrated block
    at::Tensor scale, inverse_scale;  // D and its pseudo-inverse, [n, 1]
  };

  static Factor factor_of(const at::Tensor& m, double tau, double floor) {
    const at::Tensor diagonal = at::real(m.diagonal()).to(at::kDouble).contiguous();
    const double largest = diagonal.numel() == 0 ? 0 : diagonal.max().item<double>();
    // A diagonal entry rounded to zero or below, like one far below its neighbours, holds rounding errors only.
    const at::Tensor alive = diagonal > std::max({floor, kDeadChannel * largest, 0.0});
    const at::Tensor scale = at::where(alive, diagonal.clamp_min(0).sqrt(), at::zeros_like(diagonal));
    const at::Tensor inverse = at::where(alive, 1.0 / scale, at::zeros_like(diagonal));
    Factor factor{{}, {}, scale.unsqueeze(1), inverse.unsqueeze(1)};
    if (m.size(0) == 1) {
      factor.root = factor.inverse = at::ones_like(m);
      return factor;
    }
    const PsdRoot root = psd_root(factor.inverse_scale * m * inverse, tau);
    factor.root = root.root;
    factor.inverse = root.inverse_root;
    return factor;
  }

  template <class Work>
  at::Tensor each(const at::Tensor& x, const Work& work) const {
    if (factors_.empty()) return x;
    std::vector<at::Tensor> parts;
    std::int64_t row = 0;
    for (const Factor& factor : factors_) {
      const std::int64_t n = factor.scale.size(0);
      parts.push_back(work(factor, x.narrow(0, row, n)));
      row += n;
    }
    return at::cat(parts, 0);
  }

  std::vector<at::Tensor> blocks_;
  std::vector<Factor> factors_;
};

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
  const at::Tensor half = roots.apply(sigma);                   // Lw Sigma
  const at::Tensor f = roots.apply(conjugate_transpose(half));  // Lw Sigma^H Lw^H: Hermitian, so no adjoint is needed
  const Eigen eigen = eigh(f);
  // A Gram of few tokens or of an outlier is indefinite by the rounding of what was summed: directions of negative
  // energy hold nothing, and are as far from the truth as their energy is from zero.
  result.energies = eigen.values.clamp_min(0);
  result.total = result.energies.sum().item<double>();
  const double negative = result.total - eigen.values.sum().item<double>();
  const auto beyond = [&](const at::Tensor& values) { return values.narrow(0, width, p - width).sum().item<double>(); };
  result.loss = beyond(result.energies);
  // Of directions that are kept nothing remains to be measured, of a negative energy neither.
  const double negative_lost = result.loss - beyond(eigen.values);
  const at::Tensor u = eigen.vectors.narrow(1, 0, width).contiguous();
  result.encoder = conjugate_transpose(roots.apply_adjoint(u)).contiguous();  // U^H Lw = (Lw^H U)^H
  result.decoder = roots.apply_inverse(u).contiguous();

  // What truncation left out of F is lost all the same.
  const auto whole = roots.cost_of(sigma);
  const double rounding = 8 * static_cast<double>(p) * kEpsilon * std::max(whole.magnitude, result.total);
  const double left_out = whole.value - (result.total - negative);
  if (left_out > rounding) {
    result.loss += left_out;
    result.total += left_out;
  }
  // (I - BA) Sigma (I - BA)^H, by products with the thin factors.
  const at::Tensor once = sigma - at::matmul(result.decoder, at::matmul(result.encoder, sigma));
  const at::Tensor error =
      once - at::matmul(at::matmul(once, conjugate_transpose(result.encoder)), conjugate_transpose(result.decoder));
  const double measured = roots.cost_of(error).value;
  const double scale = std::max(whole.magnitude, result.total);
  if (!(negative <= kNegativeShare * scale))
    throw NumericalError(fmt::format("the covariance of a fold has negative energy, {:.3e} of {:.3e}", negative, scale),
                         "no sum of squares does: the statistics are damaged, or not what they claim to be");
  if (!(std::abs(measured + negative_lost - result.loss) <= kLossMismatch * scale))
    throw NumericalError(
        fmt::format("a fold of {} channels to {} has loss {:.6e} by its eigenvalues, {:.6e} when "
                    "measured (total {:.6e}, negative energy {:.1e})",
                    p, width, result.loss, measured, result.total, negative),
        "its covariance or weights span more decades than float64 resolves: --weight-ridge 1e-6 helps");
  return result;
}

}  // namespace headfold::linalg
