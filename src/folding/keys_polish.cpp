#include <headfold/base/error.h>

#include "keys_distance.h"

namespace headfold::folding {

namespace {

/// The free real numbers of a structured map [d, blocks d]: parameter i fills up to two entries, sign * x_i each.
struct Parameters {
  at::Tensor rows[2], columns[2], signs[2];  ///< [n]; a second sign of 0: one entry only
  std::int64_t count() const { return rows[0].size(0); }
};

Parameters parameters_of(std::int64_t head_dim, std::int64_t blocks, std::int64_t band) {
  const std::int64_t half = head_dim / 2;
  std::vector<std::int64_t> rows[2], columns[2];
  std::vector<double> signs[2];
  const auto add = [&](int which, std::int64_t row, std::int64_t column, double sign) {
    rows[which].push_back(row);
    columns[which].push_back(column);
    signs[which].push_back(sign);
  };
  for (std::int64_t k = 0; k < blocks; ++k) {
    const std::int64_t first = k * head_dim;
    for (std::int64_t l = 0; l < half - band; ++l) {
      add(0, l, first + l, 1), add(1, l + half, first + l + half, 1);   // real part
      add(0, l, first + l + half, -1), add(1, l + half, first + l, 1);  // imaginary part
    }
    for (const std::int64_t row : band_rows(head_dim, band))
      for (const std::int64_t column : band_rows(head_dim, band)) {
        add(0, row, first + column, 1);
        add(1, row, first + column, 0);
      }
  }
  Parameters p;
  for (const int i : {0, 1}) {
    p.rows[i] = at::tensor(rows[i], at::kLong);
    p.columns[i] = at::tensor(columns[i], at::kLong);
    p.signs[i] = at::tensor(signs[i], at::kDouble);
  }
  return p;
}

/// matrix[rows[i], columns[i]].
at::Tensor entries(const at::Tensor& matrix, const at::Tensor& rows, const at::Tensor& columns) {
  return matrix.reshape({-1}).index_select(0, rows * matrix.size(1) + columns);
}

at::Tensor gathered(const Parameters& p, const at::Tensor& matrix) {
  return p.signs[0] * entries(matrix, p.rows[0], p.columns[0]) + p.signs[1] * entries(matrix, p.rows[1], p.columns[1]);
}

at::Tensor scattered(const Parameters& p, const at::Tensor& x, at::IntArrayRef shape) {
  at::Tensor matrix = at::zeros({shape[0] * shape[1]}, at::kDouble);
  for (const int i : {0, 1}) matrix.index_add_(0, p.rows[i] * shape[1] + p.columns[i], p.signs[i] * x);
  return matrix.view(shape);
}

using Terms = std::vector<std::pair<at::Tensor, at::Tensor>>;

at::Tensor product(const Terms& terms, const at::Tensor& x) {
  at::Tensor sum = at::zeros_like(x);
  for (const auto& [left, right] : terms) sum = sum + at::matmul(at::matmul(left, x), right);
  return sum;
}

at::Tensor curvature(const Terms& terms, const Parameters& p) {
  at::Tensor diagonal = at::zeros({p.count()}, at::kDouble);
  for (const auto& [left, right] : terms)
    for (const int a : {0, 1})
      for (const int b : {0, 1})
        diagonal +=
            p.signs[a] * p.signs[b] * entries(left, p.rows[a], p.rows[b]) * entries(right, p.columns[a], p.columns[b]);
  return diagonal;
}

at::Tensor hessian(const Terms& terms, const Parameters& p) {
  at::Tensor h = at::zeros({p.count(), p.count()}, at::kDouble);
  for (const auto& [left, right] : terms)
    for (const int a : {0, 1})
      for (const int b : {0, 1})
        h += at::outer(p.signs[a], p.signs[b]) * left.index_select(0, p.rows[a]).index_select(1, p.rows[b]) *
             right.index_select(0, p.columns[a]).index_select(1, p.columns[b]);
  return h;
}

}  // namespace

at::Tensor structured_minimum(const Terms& terms, const at::Tensor& rhs, std::int64_t band, const at::Tensor& start,
                              std::int64_t dense_limit) {
  const std::int64_t d = start.size(0);
  const Parameters p = parameters_of(d, start.size(1) / d, band);
  // Unknowns in units of their own curvature; those that have none stay where they are.
  const at::Tensor diagonal = curvature(terms, p);
  const double largest = diagonal.max().item<double>();
  if (!std::isfinite(largest)) throw NumericalError("the moments of a fold contain NaN or Inf");
  if (!(largest > 0)) return start;
  const at::Tensor scale =
      at::where(diagonal > 1e-14 * largest, diagonal.clamp_min(1e-14 * largest).rsqrt(), at::zeros_like(diagonal));
  const auto residual = [&](const at::Tensor& x) { return scale * gathered(p, rhs - product(terms, x)); };
  at::Tensor x = start;
  if (p.count() <= dense_limit) {
    const at::Tensor h = hessian(terms, p) * at::outer(scale, scale);
    // A ridge towards the start: each step lowers the objective with any ridge, and two of them leave only directions
    // undone whose curvature is below it. Near-singular moments need it (methods.md 12.1).
    for (double ridge = 1e-11; ridge < 1; ridge *= 100) {
      at::Tensor ridged = h.clone();
      ridged.diagonal().add_(ridge);
      const auto [factor, info] = at::linalg_cholesky_ex(ridged);
      if (info.item<int>() != 0) continue;
      for (int step = 0; step < 2; ++step)
        x = x + scattered(p, scale * at::cholesky_solve(residual(x).unsqueeze(1), factor).squeeze(1), start.sizes());
      return x;
    }
    return start;
  }
  at::Tensor r = residual(x), direction = r;
  double energy = r.square().sum().item<double>();
  const double enough = 1e-18 * (scale * gathered(p, rhs)).square().sum().item<double>();
  for (int iteration = 0; iteration < 200 && energy > enough; ++iteration) {
    const at::Tensor step = scattered(p, scale * direction, start.sizes());
    const at::Tensor image = scale * gathered(p, product(terms, step));
    const double bend = (direction * image).sum().item<double>();
    if (!(bend > 0)) break;
    x = x + (energy / bend) * step;
    r = r - (energy / bend) * image;
    const double next = r.square().sum().item<double>();
    direction = r + (next / energy) * direction;
    energy = next;
  }
  return x;
}

DistanceObjective::DistanceObjective(const GroupWeights& group, const LayerMoments& moments, const KeyContext& context)
    : size_(group.size), head_dim_(group.head_dim), band_(context.band) {
  const auto [frequencies, law] = rotation_of(context);
  const at::Tensor mean = key_mean(group, moments);
  sigma_ = {centred_key_gram(group, moments), at::outer(mean, mean)};
  twists_ = {Twist::rotation(frequencies, law), Twist::of_constants(frequencies, law, band_, context.mean_weight)};
  for (std::int64_t k = 0; k < size_; ++k) {
    queries_.push_back(query_gram(group, k, moments) / static_cast<double>(head_dim_));
    const std::int64_t row = k * head_dim_, end = row + head_dim_;
    for (std::size_t i = 0; i < sigma_.size(); ++i)
      total_ +=
          (queries_.back() * twists_[i].forward(sigma_[i].slice(0, row, end).slice(1, row, end))).sum().item<double>();
  }
}

at::Tensor DistanceObjective::key_weight(std::int64_t k) const {
  return twists_[0].adjoint(queries_[static_cast<std::size_t>(k)]);
}

double DistanceObjective::loss(const at::Tensor& encoder, const at::Tensor& decoder) const {
  double loss = total_;
  for (std::size_t i = 0; i < sigma_.size(); ++i) {
    const at::Tensor encoded = at::matmul(encoder, sigma_[i]);
    const at::Tensor merged = twists_[i].forward(at::matmul(encoded, encoder.t()));
    for (std::int64_t k = 0; k < size_; ++k) {
      const at::Tensor b = decoder.slice(0, k * head_dim_, (k + 1) * head_dim_);
      const at::Tensor cross = twists_[i].forward(encoded.slice(1, k * head_dim_, (k + 1) * head_dim_).t());
      const at::Tensor change = at::matmul(at::matmul(b, merged) - 2.0 * cross, b.t());
      loss += (queries_[static_cast<std::size_t>(k)] * change).sum().item<double>();
    }
  }
  return loss;
}

at::Tensor DistanceObjective::best_decoder(const at::Tensor& encoder, const at::Tensor& decoder) const {
  at::Tensor merged = at::zeros({head_dim_, head_dim_}, at::kDouble);
  std::vector<at::Tensor> encoded;
  for (std::size_t i = 0; i < sigma_.size(); ++i) {
    encoded.push_back(at::matmul(encoder, sigma_[i]));
    merged = merged + twists_[i].forward(at::matmul(encoded.back(), encoder.t()));
  }
  merged = 0.5 * (merged + merged.t());
  std::vector<at::Tensor> blocks;
  for (std::int64_t k = 0; k < size_; ++k) {
    const std::int64_t row = k * head_dim_, end = row + head_dim_;
    const at::Tensor& weight = queries_[static_cast<std::size_t>(k)];
    at::Tensor cross = at::zeros_like(merged);
    for (std::size_t i = 0; i < sigma_.size(); ++i)
      cross = cross + twists_[i].forward(encoded[i].slice(1, row, end).t());
    blocks.push_back(
        structured_minimum({{weight, merged}}, at::matmul(weight, cross), band_, decoder.slice(0, row, end)));
  }
  return at::cat(blocks, 0);
}

at::Tensor DistanceObjective::best_encoder(const at::Tensor& encoder, const at::Tensor& decoder) const {
  Terms terms;
  at::Tensor rhs = at::zeros_like(encoder);
  for (std::size_t i = 0; i < sigma_.size(); ++i) {
    at::Tensor left = at::zeros({head_dim_, head_dim_}, at::kDouble);
    std::vector<at::Tensor> cross;
    for (std::int64_t k = 0; k < size_; ++k) {
      const at::Tensor b = decoder.slice(0, k * head_dim_, (k + 1) * head_dim_);
      const at::Tensor weighted = at::matmul(b.t(), queries_[static_cast<std::size_t>(k)]);
      left = left + at::matmul(weighted, b);
      cross.push_back(twists_[i].adjoint(weighted));
    }
    left = twists_[i].adjoint(left);
    terms.emplace_back(0.5 * (left + left.t()), sigma_[i]);
    rhs = rhs + at::matmul(at::cat(cross, 1), sigma_[i]);
  }
  return structured_minimum(terms, rhs, band_, encoder);
}

double polish(const DistanceObjective& objective, std::int64_t sweeps, at::Tensor& encoder, at::Tensor& decoder) {
  double loss = objective.loss(encoder, decoder);
  const auto step = [&](bool decoding) {
    const at::Tensor a = decoding ? encoder : objective.best_encoder(encoder, decoder);
    const at::Tensor b = decoding ? objective.best_decoder(encoder, decoder) : decoder;
    const double next = objective.loss(a, b);
    if (!(next < loss)) return;
    encoder = a;
    decoder = b;
    loss = next;
  };
  step(true);
  for (std::int64_t sweep = 0; sweep < sweeps; ++sweep) {
    const double before = loss;
    step(false);
    step(true);
    if (!(loss < before - 1e-12 * objective.total())) break;
  }
  return loss;
}

}  // namespace headfold::folding
