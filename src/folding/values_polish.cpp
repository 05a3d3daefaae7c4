// Alternating least squares on attention-weighted values (methods.md 4.3, tier 2b):
//   minimise  sum_h tr(G_h (E_h - B_h A) Y_h (E_h - B_h A)^T),   G_h = P_h^T P_h,  Y_h = E[y_h y_h^T].

#include <headfold/base/error.h>
#include <headfold/folding/folds.h>

namespace headfold::folding {

namespace {

constexpr int kSteps = 20;                // of conjugate gradients
constexpr double kGradientTarget = 1e-3;  // of the first gradient, in the preconditioner's norm
constexpr double kSmallGain = 1e-7;       // of the loss: a sweep that gains less is the last one

double dot_of(const at::Tensor& a, const at::Tensor& b) {
  return (a * b).sum().item<double>();
}

at::Tensor pseudo_inverse(const at::Tensor& psd) {
  const at::Tensor root = linalg::psd_root(psd).inverse_root;
  return at::matmul(root, root);
}

class Polish {
 public:
  Polish(const ValueProblem& problem, const Basis& basis)
      : problem_(problem), d_(problem.head_dim), encoder_(basis.encoder) {
    const bool own = basis.head_decoders.defined();
    for (std::int64_t h = 0; h < heads(); ++h)
      decoders_.push_back(own ? basis.head_decoders[h] : rows_of(basis.decoder, h));
    inverse_moment_ = pseudo_inverse(problem.sigma);
    whiten();
    for (std::int64_t h = 0; h < heads(); ++h) losses_.push_back(loss(h, decoders_[index(h)], encoder_));
  }

  double total_loss() const {
    double sum = 0;
    for (const double loss : losses_) sum += loss;
    return sum;
  }

  /// B_h = E_h Y_h A^T (A Y_h A^T)^+
  void fit_decoders() {
    for (std::int64_t h = 0; h < heads(); ++h) {
      const at::Tensor seen = at::matmul(moment(h), encoder_.t());  // Y_h A^T
      const at::Tensor decoder = at::matmul(rows_of(seen, h), pseudo_inverse(at::matmul(encoder_, seen)));
      const double now = loss(h, decoder, encoder_);
      // The pseudo-inverse drops directions: what it gives may be worse by rounding.
      if (!(now < losses_[index(h)])) continue;
      decoders_[index(h)] = decoder;
      losses_[index(h)] = now;
    }
  }

  /// sum_h (B_h^T G_h B_h) A Y_h = sum_h B_h^T G_h E_h Y_h. Were all Y_h alike the preconditioner would be the inverse.
  void fit_encoder() {
    std::vector<at::Tensor> weights;
    at::Tensor weight_sum = at::zeros({encoder_.size(0), encoder_.size(0)}, at::kDouble);
    at::Tensor wanted = at::zeros_like(encoder_);
    for (std::int64_t h = 0; h < heads(); ++h) {
      const at::Tensor back = at::matmul(decoders_[index(h)].t(), problem_.outputs[index(h)]);  // B_h^T G_h
      weights.push_back(at::matmul(back, decoders_[index(h)]));
      weight_sum += weights.back();
      wanted += at::matmul(back, rows_of(moment(h), h));
    }
    const at::Tensor inverse_weight = pseudo_inverse(weight_sum);
    const auto apply = [&](const at::Tensor& x) {
      at::Tensor y = at::zeros_like(x);
      for (std::int64_t h = 0; h < heads(); ++h) y += at::matmul(weights[index(h)], at::matmul(x, moment(h)));
      return y;
    };
    const auto precondition = [&](const at::Tensor& x) {
      return at::matmul(at::matmul(inverse_weight, x), inverse_moment_);
    };
    at::Tensor x = encoder_.clone();
    at::Tensor residual = wanted - apply(x);
    at::Tensor z = precondition(residual);
    at::Tensor direction = z.clone();
    double size = dot_of(residual, z);
    const double target = kGradientTarget * kGradientTarget * size;
    for (int step = 0; step < kSteps && size > target && size > 0; ++step) {
      const at::Tensor image = apply(direction);
      const double curvature = dot_of(direction, image);
      if (!(curvature > 0)) break;
      const double length = size / curvature;
      x += length * direction;
      residual -= length * image;
      z = precondition(residual);
      const double next = dot_of(residual, z);
      direction = z + (next / size) * direction;
      size = next;
    }
    std::vector<double> now;
    double sum = 0;
    for (std::int64_t h = 0; h < heads(); ++h) {
      now.push_back(loss(h, decoders_[index(h)], x));
      sum += now.back();
    }
    if (!(sum < total_loss())) return;
    encoder_ = x;
    losses_ = now;
  }

  void store(Basis& basis) const {
    basis.encoder = encoder_;
    basis.head_decoders = at::stack(decoders_);
    basis.decoder = basis.head_decoders.view({problem_.size, problem_.repeat, d_, -1})
                        .mean(1)
                        .reshape({problem_.size * d_, -1})
                        .contiguous();
  }

 private:
  static std::size_t index(std::int64_t h) { return static_cast<std::size_t>(h); }
  std::int64_t heads() const { return static_cast<std::int64_t>(problem_.outputs.size()); }
  const at::Tensor& moment(std::int64_t h) const { return problem_.attended[index(h)]; }
  /// E_h m
  at::Tensor rows_of(const at::Tensor& m, std::int64_t h) const {
    const std::int64_t row = h / problem_.repeat * d_;
    return m.slice(0, row, row + d_);
  }
  double loss(std::int64_t h, const at::Tensor& decoder, const at::Tensor& encoder) const {
    at::Tensor residual = -at::matmul(decoder, encoder);
    const std::int64_t row = h / problem_.repeat * d_;
    residual.slice(1, row, row + d_).diagonal().add_(1.0);
    return dot_of(problem_.outputs[index(h)], at::matmul(at::matmul(residual, moment(h)), residual.t()));
  }
  /// Merged channels of unit energy, uncorrelated: the normal equations of both steps are then well scaled. Channels
  /// without energy stay as they are.
  void whiten() {
    const at::Tensor energy = at::matmul(at::matmul(encoder_, problem_.sigma), encoder_.t());
    const at::Tensor size = at::where(energy.diagonal() > 0, energy.diagonal().clamp_min(0).sqrt(),
                                      at::ones({energy.size(0)}, at::kDouble));
    encoder_ = encoder_ / size.unsqueeze(1);
    for (at::Tensor& decoder : decoders_) decoder = decoder * size;
  }

  const ValueProblem& problem_;
  std::int64_t d_;
  at::Tensor encoder_;
  std::vector<at::Tensor> decoders_;
  std::vector<double> losses_;
  at::Tensor inverse_moment_;
};

}  // namespace

std::vector<double> polish_values(const ValueProblem& problem, Basis& basis, std::int64_t sweeps) {
  if (problem.attended.empty()) throw InternalError("alternating least squares on values needs attended values");
  Polish polish(problem, basis);
  std::vector<double> losses = {polish.total_loss()};
  for (std::int64_t sweep = 0; sweep < sweeps; ++sweep) {
    const double before = losses.back();
    polish.fit_decoders();
    losses.push_back(polish.total_loss());
    polish.fit_encoder();
    losses.push_back(polish.total_loss());
    if (!(before - losses.back() > kSmallGain * before)) break;
  }
  // A last closed form: decoders that match the last encoder.
  polish.fit_decoders();
  losses.push_back(polish.total_loss());
  polish.store(basis);
  return losses;
}

}  // namespace headfold::folding
