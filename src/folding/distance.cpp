#include <headfold/base/error.h>
#include <headfold/folding/distance.h>

namespace headfold::folding {

at::Tensor triangular_law(std::int64_t context) {
  if (context < 1) throw InternalError(fmt::format("a distance law over {} tokens", context));
  const auto length = static_cast<double>(context);
  return (length - at::arange(context, at::kDouble)) * (2.0 / (length * (length + 1)));
}

namespace {

/// e^{-i theta_l tau}: [d/2, T].
at::Tensor multipliers(const at::Tensor& frequencies, std::int64_t distances) {
  const at::Tensor angle = at::outer(frequencies, at::arange(distances, at::kDouble));
  return at::complex(at::cos(angle), -at::sin(angle));
}

}  // namespace

Twist Twist::rotation(const at::Tensor& frequencies, const at::Tensor& law) {
  const at::Tensor z = multipliers(frequencies, law.size(0));
  const at::Tensor weighted = z * law;
  Twist twist;
  twist.same_ = at::matmul(weighted, z.conj().resolve_conj().t());
  twist.opposite_ = at::matmul(weighted, z.t());
  return twist;
}

Twist Twist::of_constants(const at::Tensor& frequencies, const at::Tensor& law, std::int64_t band, double mean_weight) {
  const std::int64_t half = frequencies.size(0);
  at::Tensor z = multipliers(frequencies, law.size(0));
  const at::Tensor mean = at::matmul(z, law.to(at::kComplexDouble)).unsqueeze(1);
  at::Tensor dropped = at::full({half, 1}, 1.0 - std::sqrt(mean_weight), at::kDouble);
  dropped.slice(0, half - band).fill_(1.0);
  z = z - dropped * mean;
  const at::Tensor weighted = z * law;
  Twist twist;
  twist.same_ = at::matmul(weighted, z.conj().resolve_conj().t());
  twist.opposite_ = at::matmul(weighted, z.t());
  return twist;
}

at::Tensor Twist::adjoint(const at::Tensor& w) const {
  // Z^T is the real form of diag(conj z_l).
  return apply(w, same_.conj().resolve_conj(), opposite_.conj().resolve_conj());
}

at::Tensor Twist::apply(const at::Tensor& y, const at::Tensor& same, const at::Tensor& opposite) {
  const std::int64_t half = same.size(0);
  const at::Tensor blocks = y.reshape({2, half, 2, half});
  const auto part = [&](std::int64_t a, std::int64_t b) { return blocks.select(0, a).select(1, b); };
  const at::Tensor xx = part(0, 0), xy = part(0, 1), yx = part(1, 0), yy = part(1, 1);
  // z conj z' = (xx + yy) + i (yx - xy), z z' = (xx - yy) + i (xy + yx).
  const at::Tensor c = at::complex((xx + yy).contiguous(), (yx - xy).contiguous()) * same;
  const at::Tensor o = at::complex((xx - yy).contiguous(), (xy + yx).contiguous()) * opposite;
  const at::Tensor sum = 0.5 * (c + o), difference = 0.5 * (o - c);
  return at::stack({at::stack({at::real(sum), at::imag(difference)}, 1),
                    at::stack({at::imag(sum), -at::real(difference)}, 1)},
                   0)
      .reshape({2 * half, 2 * half});
}

}  // namespace headfold::folding
