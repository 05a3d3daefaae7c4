#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <headfold/base/error.h>
#include <headfold/base/log.h>
#include <headfold/base/progress.h>
#include <headfold/checkpoint/safetensors.h>
#include <headfold/comm/stopping.h>
#include <headfold/folding/refit.h>
#include <headfold/linalg/linalg.h>
#include <headfold/model/model.h>

#include "refit_sums.h"

namespace headfold::folding {
namespace {

using checkpoint::Family;
using checkpoint::ModelConfig;
using checkpoint::Reader;

/// Below this share of the target's energy an error is rounding noise of float32 activations: nothing to repair.
constexpr double kExact = 1e-10;
constexpr double kExactDivergence = 1e-9;  // nats per attention row
/// Eigenvalues below this share of the largest are no direction the data knows.
constexpr double kTruncation = 1e-10;
/// Above this width the normal equations are factorised instead of diagonalised: the ridge bounds their condition, and
/// an eigen-decomposition would cost minutes.
constexpr std::int64_t kWidestEigen = 4096;

/// What one forward pass shows, one sequence.
class Capture final : public model::LayerObserver {
 public:
  Capture(bool attention, bool attended, bool activated)
      : wants_attention_(attention), wants_attended_(attended), wants_activated_(activated) {}
  void attention_input(const at::Tensor& x) override { input = x.select(0, 0); }
  void rotated_keys(const at::Tensor&) override {}
  bool wants_rotated_keys() const override { return false; }
  void attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor&) override {
    queries = q.select(0, 0);
    keys = k.select(0, 0);
  }
  bool wants_attention() const override { return wants_attention_; }
  void attended(const at::Tensor& y) override { heads = y.select(0, 0); }
  bool wants_attended() const override { return wants_attended_; }
  void activated(const at::Tensor& a) override { inner = a.select(0, 0); }
  bool wants_activated() const override { return wants_activated_; }

  at::Tensor input;          // [tokens, hidden]
  at::Tensor queries, keys;  // [tokens, heads, head_dim], [tokens, KV heads, head_dim]
  at::Tensor heads;          // [tokens, heads * head_dim]
  at::Tensor inner;          // [tokens, ffn]

 private:
  bool wants_attention_, wants_attended_, wants_activated_;
};

/// A linear map y -> W y + b; `bias` is undefined where there is none.
struct Linear {
  at::Tensor weight, bias;
  /// Rows x [tokens, in], float32.
  at::Tensor apply(const at::Tensor& x) const {
    const at::Tensor w = weight.to(at::kFloat).t();
    return bias.defined() ? at::addmm(bias.to(at::kFloat), x, w) : at::mm(x, w);
  }
};

/// Moments of inputs y and residuals r = target - (W y + b).
enum : std::size_t { m_gram, m_cross, m_input_sum, m_residual_sum, m_scalars, m_count };
enum : std::int64_t { s_tokens, s_residual, s_target, s_scalars };

Sums empty_moments(std::int64_t inputs, std::int64_t outputs) {
  return {at::zeros({inputs, inputs}, at::kDouble), at::zeros({outputs, inputs}, at::kDouble),
          at::zeros({inputs}, at::kDouble), at::zeros({outputs}, at::kDouble), at::zeros({s_scalars}, at::kDouble)};
}

void add_moments(Sums& sums, const at::Tensor& y, const at::Tensor& residual, const at::Tensor& target) {
  sums[m_gram].add_(at::mm(y.t(), y));
  sums[m_cross].add_(at::mm(residual.t(), y));
  sums[m_input_sum].add_(y.sum(0, false, at::kDouble));
  sums[m_residual_sum].add_(residual.sum(0, false, at::kDouble));
  auto* scalars = sums[m_scalars].data_ptr<double>();
  scalars[s_tokens] += static_cast<double>(y.size(0));
  scalars[s_residual] += linalg::square_sum(residual);
  scalars[s_target] += linalg::square_sum(target);
}

double scalar(const Sums& sums, std::int64_t index) {
  return sums[m_scalars].data_ptr<double>()[index];
}

Sums joined(const Sums& a, const Sums& b) {
  Sums sum;
  for (std::size_t i = 0; i < a.size(); ++i) sum.push_back(a[i] + b[i]);
  return sum;
}

/// Share of the target's energy that is missing after the map changes by `change`.
double error_of(const Sums& sums, const Linear& change) {
  double error = scalar(sums, s_residual);
  if (change.weight.defined()) {
    const at::Tensor& d = change.weight;
    error += (d * (at::mm(d, sums[m_gram]) - 2 * sums[m_cross])).sum().item<double>();
    if (change.bias.defined()) {
      const at::Tensor shift = at::mv(d, sums[m_input_sum]) - sums[m_residual_sum];
      error += (change.bias * (2 * shift + scalar(sums, s_tokens) * change.bias)).sum().item<double>();
    }
  }
  const double total = scalar(sums, s_target);
  return total > 0 ? std::max(0.0, error) / total : 0;
}

/// Normal equations (G + eps I) solved for several eps. An intercept is not penalised: it goes through centred moments.
class NormalEquations {
 public:
  NormalEquations(const Sums& sums, bool intercept) : sums_(sums), intercept_(intercept) {
    gram_ = sums[m_gram];
    cross_ = sums[m_cross];
    if (intercept) {
      const double tokens = scalar(sums, s_tokens);
      gram_ = gram_ - at::outer(sums[m_input_sum], sums[m_input_sum]) / tokens;
      cross_ = cross_ - at::outer(sums[m_residual_sum], sums[m_input_sum]) / tokens;
    }
    mean_ = gram_.diagonal().mean().item<double>();
    if (gram_.size(0) > kWidestEigen) return;
    eigen_ = linalg::eigh(gram_);
    largest_ = std::max(0.0, eigen_.values[0].item<double>());
    kept_ = (eigen_.values > kTruncation * largest_).sum().item<std::int64_t>();
    turned_ = at::mm(cross_, eigen_.vectors.slice(1, 0, kept_));
  }

  /// Change of the map that minimises |r - dW y - db|^2 + eps |dW|^2.
  Linear solve(double ridge) const {
    Linear change;
    const double eps = ridge * mean_;
    if (eigen_.values.defined()) {
      change.weight = at::mm(turned_ / (eigen_.values.slice(0, 0, kept_) + eps), eigen_.vectors.slice(1, 0, kept_).t());
    } else {
      at::Tensor ridged = gram_.clone();
      ridged.diagonal().add_(eps);
      try {
        change.weight = at::cholesky_solve(cross_.t(), at::linalg_cholesky(ridged)).t().contiguous();
      } catch (const c10::Error&) {
        throw NumericalError(
            fmt::format("normal equations of width {} are not positive definite with ridge {:g}", gram_.size(0), ridge),
            "use more tokens");
      }
    }
    if (intercept_)
      change.bias = (sums_[m_residual_sum] - at::mv(change.weight, sums_[m_input_sum])) / scalar(sums_, s_tokens);
    return change;
  }
  /// Spectral condition of G + eps I on the directions in use; without an eigen-decomposition its bound n / ridge.
  double condition(double ridge) const {
    const double eps = ridge * mean_;
    if (!eigen_.values.defined()) return static_cast<double>(gram_.size(0)) / ridge;
    if (kept_ == 0) return 1;
    return (largest_ + eps) / (eigen_.values[kept_ - 1].item<double>() + eps);
  }
  bool degenerate() const { return !(mean_ > 0); }

 private:
  Sums sums_;
  bool intercept_;
  at::Tensor gram_, cross_, turned_;
  linalg::Eigen eigen_;
  double mean_ = 0, largest_ = 0;
  std::int64_t kept_ = 0;
};

at::Tensor rounded(const at::Tensor& tensor, at::ScalarType dtype) {
  return tensor.defined() ? tensor.to(dtype).to(at::kDouble) : tensor;
}

/// Ridge regression with the choice of eps and the decision on held-out moments. `map` (values of the stored dtype)
/// becomes the refitted one when that is kept.
PartRefit regress(const Sums& fit, const Sums& held, Linear& map, const RefitOptions& options, at::ScalarType dtype) {
  PartRefit report;
  const Sums all = joined(fit, held);
  report.error_before = report.error_after = error_of(all, {});
  report.held_out_before = report.held_out_after = error_of(held, {});
  if (report.held_out_before <= kExact) return report;
  const bool intercept = map.bias.defined();
  const auto change_to = [&](const Linear& step, Linear& moved) {
    moved.weight = rounded(map.weight + step.weight, dtype);
    moved.bias = intercept ? rounded(map.bias + step.bias, dtype) : at::Tensor();
    return Linear{moved.weight - map.weight, intercept ? moved.bias - map.bias : at::Tensor()};
  };
  Linear moved;
  for_each_item(1, [&](std::int64_t) {
    const NormalEquations equations(fit, intercept);
    if (equations.degenerate()) return;
    double best = report.held_out_before;
    for (const double ridge : options.ridges) {
      const double error = error_of(held, change_to(equations.solve(ridge), moved));
      if (error < best) best = error, report.ridge = ridge;
    }
    report.kept = report.ridge > 0;
    if (!report.kept) return;
    report.held_out_after = best;
    const NormalEquations final_equations(all, intercept);
    report.condition = final_equations.condition(report.ridge);
    report.error_after = error_of(all, change_to(final_equations.solve(report.ridge), moved));
  });
  if (!report.kept) return report;
  if (!at::isfinite(moved.weight).all().item<bool>() || (intercept && !at::isfinite(moved.bias).all().item<bool>()))
    throw NumericalError("the refit gives values that the checkpoint's dtype cannot hold",
                         "refit with larger ridges, or convert from a float32 or bfloat16 checkpoint");
  map = moved;
  return report;
}

/// Names of the matrices that a refit may change, without ".weight", in layer `layer`.
struct Names {
  std::string query, key, output, down;
  bool attention_bias = false, down_bias = false;
};
Names names_of(const ModelConfig& config, std::int64_t layer) {
  const bool llama = config.family == Family::llama;
  const std::string prefix = llama ? fmt::format("model.layers.{}.", layer) : fmt::format("transformer.h.{}.", layer);
  return {prefix + (llama ? "self_attn.q_proj" : "self_attention.query"),
          prefix + (llama ? "self_attn.k_proj" : "self_attention.key"),
          prefix + (llama ? "self_attn.o_proj" : "self_attention.dense"),
          prefix + (llama ? "mlp.down_proj" : "mlp.dense_4h_to_h"),
          !llama || config.attention_bias,
          !llama || config.mlp_bias};
}

/// "o_proj" of "model.layers.3.self_attn.o_proj".
std::string last_part(const std::string& name) {
  return name.substr(name.rfind('.') + 1);
}

class Refitter {
 public:
  Refitter(const comm::Communicator& world, const Reader& reader, const ModelConfig& folded,
           const at::Tensor& sequences, const RefitOptions& options)
      : world_(world),
        reader_(reader),
        config_(reader.config()),
        folded_(folded),
        options_(options),
        samples_(sequences.size(0)),
        held_count_(std::clamp<std::int64_t>(std::llround(options.held_out_share * static_cast<double>(samples_)), 1,
                                             samples_ - 1)),
        fit_(world, 0, samples_ - held_count_, options.chunks),
        held_(world, samples_ - held_count_, held_count_, options.chunks),
        progress_("refit", "layer", static_cast<double>(config_.layers), world.root()) {
    own_ = fit_.own();
    own_.insert(own_.end(), held_.own().begin(), held_.own().end());
    const auto n = static_cast<std::size_t>(samples_);
    for (auto* list :
         {&original_, &compressed_, &aim_, &input_, &keys_, &original_queries_, &original_keys_, &row_norms_})
      list->resize(n);
    const model::Embedding embedding(reader, at::kFloat);
    for (const std::int64_t s : own_) {
      original_[index(s)] = embedding.forward(sequences.slice(0, s, s + 1));
      compressed_[index(s)] = original_[index(s)];
    }
    tokens_ = static_cast<double>(samples_ * sequences.size(1));
    mask_ =
        at::full({sequences.size(1), sequences.size(1)}, -std::numeric_limits<float>::infinity(), at::kFloat).triu(1);
    const bool rotates = config_.family == Family::llama;
    if (rotates) {
      frequencies_ = model::rope_inverse_frequencies(config_);
    } else {
      slopes_ = model::alibi_slopes(config_.heads);
    }
  }

  LayerRefit run(std::int64_t layer, LayerTensors& tensors) {
    layer_ = layer;
    tensors_ = &tensors;
    names_ = names_of(config_, layer);
    // What will be stored is what must be run.
    for (auto& [tail, tensor] : tensors) tensor = rounded(tensor, stored_dtype());
    LayerRefit report;
    report.layer = layer;
    {
      const auto original = model::load_layer(reader_, layer, at::kFloat);
      const auto folded = load_folded();
      const Linear output = original_output();
      for_each_item(static_cast<std::int64_t>(own_.size()),
                    [&](std::int64_t i) { open_layer(own_[index(i)], *original, *folded, output); });
    }
    if (options_.queries) report.others = refit_scores();
    if (options_.output) {
      static_cast<PartRefit&>(report) = refit_output();
    }
    if (options_.down) report.others.push_back(refit_down());
    report.stream_error = close_layer();
    progress_.advance(1);
    return report;
  }

 private:
  static std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }
  at::ScalarType stored_dtype() const { return checkpoint::scalar_type(reader_.info(names_.output + ".weight").dtype); }

  /// Current matrix of the folded layer, float64.
  Linear folded_map(const std::string& name, std::int64_t out, std::int64_t in, bool biased) const {
    const auto get = [&](const std::string& tensor, const std::vector<std::int64_t>& shape) {
      const auto found = tensors_->find(checkpoint::last_parts(tensor));
      return found != tensors_->end() ? found->second : reader_.load(tensor, shape, at::kDouble);
    };
    return {get(name + ".weight", {out, in}), biased ? get(name + ".bias", {out}) : at::Tensor()};
  }
  void put(const std::string& name, const Linear& map) const {
    (*tensors_)[checkpoint::last_parts(name + ".weight")] = map.weight;
    if (map.bias.defined()) (*tensors_)[checkpoint::last_parts(name + ".bias")] = map.bias;
  }
  Linear original_output() const {
    const std::int64_t width = config_.heads * config_.head_dim;
    return {reader_.load(names_.output + ".weight", {config_.hidden, width}, at::kFloat),
            names_.attention_bias ? reader_.load(names_.output + ".bias", {config_.hidden}, at::kFloat) : at::Tensor()};
  }
  std::unique_ptr<model::Layer> load_folded() const {
    return model::load_layer(folded_, layer_, at::kFloat, model::replaced_tensors(reader_, *tensors_));
  }
  /// The residual stream that attention adds to.
  at::Tensor base(const at::Tensor& hidden, const Capture& seen) const {
    return config_.post_layernorm_residual ? seen.input : hidden.select(0, 0);
  }

  /// Original stream through the layer; what the folded attention block should add up to; what the refit of queries
  /// needs.
  void open_layer(std::int64_t s, const model::Layer& original, const model::Layer& folded, const Linear& output) {
    const bool queries = options_.queries;
    Capture seen(queries, true, false);
    const at::Tensor before = original_[index(s)];
    original_[index(s)] = original.forward(before, nullptr, &seen);
    at::Tensor start = base(before, seen);
    if (queries || options_.target == RefitTarget::attention) {
      Capture own(queries && !refits_keys(), false, false);
      folded.forward(compressed_[index(s)], nullptr, &own);
      if (options_.target == RefitTarget::attention) start = base(compressed_[index(s)], own);
      if (queries) {
        input_[index(s)] = names_.attention_bias ? at::cat({own.input, at::ones({own.input.size(0), 1}, at::kFloat)}, 1)
                                                 : own.input.contiguous();
        if (!refits_keys()) keys_[index(s)] = own.keys.transpose(0, 1).contiguous();
        original_queries_[index(s)] = seen.queries.transpose(0, 1).contiguous();
        original_keys_[index(s)] = seen.keys.transpose(0, 1).contiguous();
        at::Tensor& norms = row_norms_[index(s)];
        norms = at::empty({config_.heads, seen.queries.size(0)}, at::kFloat);
        for (std::int64_t h = 0; h < config_.heads; ++h)
          norms.select(0, h).copy_(
              at::logsumexp(masked_scores(original_queries_[index(s)].select(0, h),
                                          original_keys_[index(s)].select(0, h / original_repeat()), h),
                            1));
      }
    }
    aim_[index(s)] = start + output.apply(seen.heads);
  }

  /// Sums of the fitted part and of the held-out part.
  std::pair<Sums, Sums> sums(const std::function<Sums()>& empty,
                             const std::function<void(std::int64_t, Sums&)>& add) const {
    return {fit_.sum(empty, add), held_.sum(empty, add)};
  }
  void check(const Sums& moments, const std::string& part) const {
    for (std::size_t i = 0; i < m_count; ++i)
      if (!std::isfinite(moments[i].sum().item<double>()))
        throw InputError(fmt::format("the activations at layer {} ({}) contain NaN or Inf", layer_, part),
                         "the fold or the checkpoint itself is broken: try the fold without --refit");
  }
  void warn_of_few_tokens(std::int64_t width, const std::string& part) {
    const double fitted = tokens_ * static_cast<double>(fit_.count()) / static_cast<double>(samples_);
    if (layer_ > 0 || fitted >= 4.0 * static_cast<double>(width) || !world_.root()) return;
    spdlog::warn("refit of {}: {:.0f} tokens for {} unknowns per row; at least {} are advisable (more --refit-samples)",
                 part, fitted, width, 4 * width);
  }

  PartRefit refit_output() {
    const std::string name = names_.output;
    const std::int64_t width = config_.heads * checkpoint::attended_width(folded_, layer_);
    Linear map = folded_map(name, config_.hidden, width, names_.attention_bias);
    warn_of_few_tokens(width, last_part(name));
    const Linear single{map.weight.to(at::kFloat), map.bias.defined() ? map.bias.to(at::kFloat) : map.bias};
    const auto folded = load_folded();
    const auto [fit, held] = sums([&] { return empty_moments(width, config_.hidden); },
                                  [&](std::int64_t s, Sums& moments) {
                                    Capture seen(false, true, false);
                                    folded->forward(compressed_[index(s)], nullptr, &seen);
                                    const at::Tensor target = aim_[index(s)] - base(compressed_[index(s)], seen);
                                    add_moments(moments, seen.heads, target - single.apply(seen.heads), target);
                                  });
    check(fit, last_part(name)), check(held, last_part(name));
    PartRefit report = regress(fit, held, map, options_, stored_dtype());
    report.part = last_part(name);
    put(name, map);
    return report;
  }

  PartRefit refit_down() {
    const std::string name = names_.down;
    const bool biased = names_.down_bias;
    Linear map = folded_map(name, config_.hidden, config_.ffn, biased);
    warn_of_few_tokens(config_.ffn, last_part(name));
    const Linear single{map.weight.to(at::kFloat), map.bias.defined() ? map.bias.to(at::kFloat) : map.bias};
    const auto folded = load_folded();
    const auto [fit, held] = sums([&] { return empty_moments(config_.ffn, config_.hidden); },
                                  [&](std::int64_t s, Sums& moments) {
                                    Capture seen(false, false, true);
                                    const at::Tensor after = folded->forward(compressed_[index(s)], nullptr, &seen);
                                    const at::Tensor missing = (original_[index(s)] - after).select(0, 0);
                                    add_moments(moments, seen.inner, missing, missing + single.apply(seen.inner));
                                  });
    check(fit, last_part(name)), check(held, last_part(name));
    PartRefit report = regress(fit, held, map, options_, stored_dtype());
    report.part = last_part(name);
    put(name, map);
    return report;
  }

  /// Folded stream through the refitted layer; energy of its difference from the original's.
  double close_layer() {
    const auto folded = load_folded();
    const auto [fit, held] = sums([] { return Sums{at::zeros({2}, at::kDouble)}; },
                                  [&](std::int64_t s, Sums& energy) {
                                    compressed_[index(s)] = folded->forward(compressed_[index(s)]);
                                    auto* values = energy[0].data_ptr<double>();
                                    values[0] += linalg::square_sum(compressed_[index(s)] - original_[index(s)]);
                                    values[1] += linalg::square_sum(original_[index(s)]);
                                  });
    const at::Tensor energy = fit[0] + held[0];
    const double total = energy[1].item<double>(), error = energy[0].item<double>();
    if (!std::isfinite(total) || !std::isfinite(error))
      throw InputError(fmt::format("the {} model's activations after layer {} contain NaN or Inf",
                                   std::isfinite(total) ? "folded" : "original", layer_));
    return total > 0 ? error / total : 0;
  }

  // ---------------------------------------------------------------------------------------- queries and keys
  // Attention rows of head h: p original (keys k, queries q of the original stream), p' folded (k', q' of the folded
  // stream). Around p the divergence is the p-weighted variance of the scores' error, row by row. With queries
  // independent of the keys' covariances it is minimal for W_Q' = M1^-1 M2 W_Q,
  //   M1 = sum_m R_m^T cov_m(k', k') R_m,  M2 = sum_m R_m^T cov_m(k', k) R_m,  cov_m weighted by row m of p;
  // the same with roles exchanged gives W_K' = N1^-1 sum_h N2 W_K with weights p (1 - p) along columns.
  // Both are ridge regressions around the present matrices. (Reconstructed here: a distance-aware map measured
  // exactly.)

  /// Folded projections [heads, width, inputs], biases as a last column of inputs, float64. `key` is undefined where
  /// keys are not to be changed.
  struct Scores {
    at::Tensor query, key;
  };

  std::int64_t original_repeat() const { return config_.heads / config_.kv_heads; }
  std::int64_t original_head(std::int64_t h) const { return order_.empty() ? h : order_[index(h)]; }
  /// x W^T of every head, rotated: [heads, tokens, width].
  at::Tensor project(std::int64_t s, const at::Tensor& weight) const {
    const at::Tensor& x = input_[index(s)];
    return turned(at::mm(x, weight.to(at::kFloat).reshape({-1, weight.size(2)}).t())
                      .view({x.size(0), weight.size(0), weight.size(1)}));
  }
  /// [tokens, heads, width] -> rotated, [heads, tokens, width].
  at::Tensor turned(const at::Tensor& x) const {
    if (!frequencies_.defined()) return x.transpose(0, 1).contiguous();
    return model::apply_rope(x.unsqueeze(0), frequencies_, 0).select(0, 0).transpose(0, 1).contiguous();
  }
  /// Keys that folded query heads see, [KV heads, tokens, width].
  at::Tensor folded_keys_of(std::int64_t s, const Scores& scores) const {
    return scores.key.defined() ? project(s, scores.key) : keys_[index(s)];
  }
  /// Those of one query head, as its query before any folding of queries sees them.
  at::Tensor key_of(const at::Tensor& keys, std::int64_t h) const {
    at::Tensor own = keys.select(0, h / (config_.heads / keys.size(0)));
    if (!query_fold_.defined()) return own;
    return at::mm(own, query_fold_.select(0, h / (config_.heads / query_fold_.size(0))));
  }
  /// Scores of head h, not yet normalised, [tokens, tokens].
  at::Tensor masked_scores(const at::Tensor& queries, const at::Tensor& keys, std::int64_t h) const {
    at::Tensor scores = at::mm(queries, keys.t()).mul_(scale()).add_(mask_);
    if (slopes_.defined()) scores.add_(slopes_[h] * at::arange(keys.size(0), at::kFloat));
    return scores;
  }
  double scale() const { return 1.0 / std::sqrt(static_cast<double>(config_.head_dim)); }
  at::Tensor original_query(std::int64_t s, std::int64_t h) const {
    return original_queries_[index(s)].select(0, original_head(h));
  }
  at::Tensor original_key(std::int64_t s, std::int64_t h) const {
    return original_keys_[index(s)].select(0, original_head(h) / original_repeat());
  }
  at::Tensor original_scores(std::int64_t s, std::int64_t h) const {
    return masked_scores(original_query(s, h), original_key(s, h), original_head(h));
  }
  /// Rows (or, transposed, columns) `picked` of the original attention of folded query head h, [positions, tokens].
  at::Tensor original_attention(std::int64_t s, std::int64_t h, const at::Tensor& picked, bool columns) const {
    const at::Tensor q = original_query(s, h), k = original_key(s, h);
    const at::Tensor norm = row_norms_[index(s)].select(0, original_head(h));
    at::Tensor scores = columns ? at::mm(k.index_select(0, picked), q.t()) : at::mm(q.index_select(0, picked), k.t());
    scores.mul_(scale()).add_(columns ? mask_.index_select(1, picked).t() : mask_.index_select(0, picked));
    if (slopes_.defined()) {
      const at::Tensor bias = slopes_[original_head(h)] * at::arange(q.size(0), at::kFloat);
      scores.add_(columns ? bias.index_select(0, picked).unsqueeze(1) : bias);
    }
    return scores.sub_(columns ? norm : norm.index_select(0, picked).unsqueeze(1)).exp_();
  }

  /// KL of every head, mean over tokens of a part, under every candidate: [candidates, heads] float64.
  at::Tensor divergences(const DealtSequences& part, const std::vector<Scores>& candidates) const {
    const auto count = static_cast<std::int64_t>(candidates.size());
    const Sums sums = part.sum(
        [&] {
          return Sums{at::zeros({count, config_.heads}, at::kDouble)};
        },
        [&](std::int64_t s, Sums& sum) {
          for (std::int64_t i = 0; i < count; ++i) {
            const at::Tensor queries = project(s, candidates[index(i)].query);
            const at::Tensor keys = folded_keys_of(s, candidates[index(i)]);
            for (std::int64_t h = 0; h < config_.heads; ++h) {
              const at::Tensor wanted = at::log_softmax(original_scores(s, h), 1);
              const at::Tensor rows = at::log_softmax(masked_scores(queries.select(0, h), key_of(keys, h), h), 1);
              // tril: above the diagonal both are -inf.
              sum[0][i][h].add_((wanted.exp() * at::tril(wanted - rows)).sum(at::kDouble));
            }
          }
        });
    return sums[0] / (tokens_ * static_cast<double>(part.count()) / static_cast<double>(samples_));
  }
  /// Positions to look at in a sequence, with weights that make up for the others: the first, which is unlike all
  /// others, and evenly spaced ones from a place that depends on the sequence.
  std::pair<at::Tensor, at::Tensor> positions(std::int64_t s, std::int64_t tokens) const {
    const std::int64_t count = std::min(options_.score_rows, tokens);
    const at::Tensor picked = at::zeros({count}, at::kLong), weight = at::ones({count}, at::kFloat);
    for (std::int64_t i = 1; i < count; ++i) {
      const double place = static_cast<double>(i - 1) + std::fmod(static_cast<double>(s) * 0.6180339887498949, 1.0);
      picked[i] =
          1 + static_cast<std::int64_t>(place / static_cast<double>(count - 1) * static_cast<double>(tokens - 1));
      weight[i] = static_cast<double>(tokens - 1) / static_cast<double>(count - 1);
    }
    return {picked, weight};
  }
  /// R_t^T of the given positions, [positions, width, width]; undefined without rotation.
  at::Tensor rotations(const at::Tensor& picked, std::int64_t tokens) const {
    if (!frequencies_.defined()) return {};
    const std::int64_t d = config_.head_dim;
    const at::Tensor units = at::eye(d, at::kFloat).unsqueeze(0).expand({tokens, d, d});
    return model::apply_rope(units.unsqueeze(0), frequencies_, 0).select(0, 0).index_select(0, picked);
  }
  /// sum_i w_i R_i^T M_i R_i for M [positions, width, width].
  static at::Tensor turned_sum(const at::Tensor& moments, const at::Tensor& turns, const at::Tensor& weight) {
    const at::Tensor back = turns.defined() ? at::matmul(at::matmul(turns, moments), turns.transpose(1, 2)) : moments;
    return (back * weight.view({-1, 1, 1})).sum(0);
  }
  /// sum_n p_in a_n b_n^T for p [positions, tokens], a and b [tokens, width].
  static at::Tensor moments(const at::Tensor& p, const at::Tensor& a, const at::Tensor& b) {
    return at::matmul((p.unsqueeze(2) * a).transpose(1, 2), b);
  }
  static at::Tensor covariances(const at::Tensor& p, const at::Tensor& a, const at::Tensor& b) {
    return moments(p, a, b) - at::mm(p, a).unsqueeze(2) * at::mm(p, b).unsqueeze(1);
  }

  /// W + (G + eps I)^-1 (wanted - G W) for every head; heads without energy stay.
  at::Tensor regressed(const at::Tensor& weight, const at::Tensor& gram, const at::Tensor& wanted) const {
    at::Tensor result = weight.clone();
    for_each_item(1, [&](std::int64_t) {
      std::vector<std::int64_t> alive;
      std::vector<double> means;
      for (std::int64_t h = 0; h < weight.size(0); ++h) {
        const double mean = gram[h].diagonal().mean().item<double>();
        if (!(mean > 0) || !std::isfinite(mean)) continue;
        alive.push_back(h);
        means.push_back(mean);
      }
      if (alive.empty()) return;
      const linalg::Eigen eigen = linalg::eigh_batched(gram.index_select(0, at::tensor(alive, at::kLong)));
      for (std::size_t i = 0; i < alive.size(); ++i) {
        const std::int64_t h = alive[i];
        const at::Tensor vectors = eigen.vectors[static_cast<std::int64_t>(i)].clone();
        const at::Tensor values =
            eigen.values[static_cast<std::int64_t>(i)].clamp_min(0) + options_.score_ridge * means[i];
        const at::Tensor missing = wanted[h] - at::mm(gram[h], weight[h]);
        result[h].add_(at::mm(vectors, at::mm(vectors.t(), missing) / values.unsqueeze(1)));
      }
    });
    return rounded(result, stored_dtype());
  }

  at::Tensor queries_for(const Scores& scores) const {
    const std::int64_t heads = config_.heads, width = scores.query.size(1), d = config_.head_dim;
    const Sums sums = fit_.sum(
        [&] {
          return Sums{at::zeros({heads, width, width}, at::kDouble), at::zeros({heads, width, d}, at::kDouble)};
        },
        [&](std::int64_t s, Sums& sum) {
          const at::Tensor keys = folded_keys_of(s, scores);
          const auto [picked, weight] = positions(s, keys.size(1));
          const at::Tensor turns = rotations(picked, keys.size(1));
          for (std::int64_t h = 0; h < heads; ++h) {
            const at::Tensor p = original_attention(s, h, picked, false);
            // Covariances do not know a common shift; without it float32 keeps its digits.
            at::Tensor own = key_of(keys, h), source = original_key(s, h);
            own = own - own.mean(0, true);
            source = source - source.mean(0, true);
            sum[0][h].add_(turned_sum(covariances(p, own, own), turns, weight));
            sum[1][h].add_(turned_sum(covariances(p, own, source), turns, weight));
          }
        });
    return regressed(scores.query, sums[0], at::matmul(sums[1], original_query_));
  }

  at::Tensor keys_for(const Scores& scores) const {
    const std::int64_t heads = config_.heads, kv_heads = scores.key.size(0), d = config_.head_dim;
    const std::int64_t repeat = heads / kv_heads;
    const Sums sums = fit_.sum(
        [&] {
          return Sums{at::zeros({kv_heads, d, d}, at::kDouble), at::zeros({heads, d, d}, at::kDouble)};
        },
        [&](std::int64_t s, Sums& sum) {
          const at::Tensor queries = project(s, scores.query);
          const auto [picked, weight] = positions(s, queries.size(1));
          const at::Tensor turns = rotations(picked, queries.size(1));
          for (std::int64_t h = 0; h < heads; ++h) {
            const at::Tensor p = original_attention(s, h, picked, true);
            const at::Tensor spread = p * (1 - p), own = queries.select(0, h);
            sum[0][h / repeat].add_(turned_sum(moments(spread, own, own), turns, weight));
            sum[1][h].add_(turned_sum(moments(spread, own, original_query(s, h)), turns, weight));
          }
        });
    const at::Tensor wanted =
        at::matmul(sums[1], original_key_).view({kv_heads, repeat, d, original_key_.size(2)}).sum(1);
    return regressed(scores.key, sums[0], wanted);
  }

  /// A projection with its bias as a last column, [heads, rows / heads, inputs].
  static at::Tensor stacked(const Linear& map, std::int64_t heads) {
    const at::Tensor all = map.bias.defined() ? at::cat({map.weight, map.bias.unsqueeze(1)}, 1) : map.weight;
    return all.reshape({heads, -1, all.size(1)});
  }
  void put_stacked(const std::string& name, const at::Tensor& weight) const {
    const at::Tensor rows = weight.reshape({-1, weight.size(2)});
    if (!at::isfinite(rows).all().item<bool>())
      throw NumericalError(fmt::format("the refit of {} gives values that the checkpoint's dtype cannot hold", name));
    put(name, {rows.slice(1, 0, config_.hidden).contiguous(),
               names_.attention_bias ? rows.select(1, config_.hidden).contiguous() : at::Tensor()});
  }

  /// Takes a candidate where it lowers the held-out divergence; heads that share keys decide together when keys
  /// change. `now`: divergences of all heads, held-out.
  PartRefit step(const std::string& part, Scores& scores, at::Tensor& now, const std::function<Scores()>& propose) {
    PartRefit report;
    report.part = part;
    report.divergence = true;
    report.held_out_before = report.held_out_after = now.mean().item<double>();
    if (!std::isfinite(report.held_out_before))
      throw InputError(fmt::format("the activations at layer {} contain NaN or Inf", layer_));
    if (report.held_out_before > kExactDivergence) {
      const Scores candidate = propose();
      const bool both = candidate.key.defined() && !candidate.key.is_same(scores.key);
      const std::int64_t blocks = both ? candidate.key.size(0) : config_.heads;
      const at::Tensor then = divergences(held_, {candidate})[0];
      const at::Tensor better = (now - then).view({blocks, -1}).sum(1) > 0;  // NaN is not
      const at::Tensor heads = better.repeat_interleave(config_.heads / blocks);
      report.kept = better.any().item<bool>();
      scores.query = at::where(heads.view({-1, 1, 1}), candidate.query, scores.query);
      if (both) scores.key = at::where(better.view({-1, 1, 1}), candidate.key, scores.key);
      now = at::where(heads, then, now);
      report.ridge = report.kept ? options_.score_ridge : 0;
      report.held_out_after = now.mean().item<double>();
    }
    report.error_before = report.held_out_before;
    report.error_after = report.held_out_after;
    return report;
  }

  std::vector<PartRefit> refit_scores() {
    const std::int64_t heads = config_.heads, d = config_.head_dim;
    const bool biased = names_.attention_bias;
    order_ = options_.query_heads.empty() ? std::vector<std::int64_t>() : options_.query_heads.at(index(layer_));
    const auto fold = tensors_->find("query_fold.weight");
    query_fold_ = fold == tensors_->end() ? at::Tensor() : fold->second.to(at::kFloat);
    const LayerWeights source = load_layer_weights(reader_, layer_, Part::keys);
    const at::Tensor head_order = order_.empty() ? at::arange(heads, at::kLong) : at::tensor(order_, at::kLong);
    original_query_ = stacked({source.query, source.query_bias}, heads).index_select(0, head_order);
    original_key_ = stacked({source.key, source.key_bias}, config_.kv_heads)
                        .index_select(0, head_order.div(original_repeat(), "floor"));
    const std::int64_t width = query_width();
    Scores scores;
    scores.query = stacked(folded_map(names_.query, heads * width, config_.hidden, biased), heads);
    if (refits_keys()) {
      const std::int64_t kv_heads = folded_.shape_of(layer_).kv_heads;
      scores.key = stacked(folded_map(names_.key, kv_heads * d, config_.hidden, biased), kv_heads);
    }
    std::vector<PartRefit> reports;
    at::Tensor now = divergences(held_, {scores})[0];
    reports.push_back(step(last_part(names_.query), scores, now, [&] {
      return Scores{queries_for(scores), scores.key};
    }));
    for (std::int64_t sweep = 0; refits_keys() && sweep < options_.key_sweeps; ++sweep) {
      reports.push_back(step(last_part(names_.key) + " + " + last_part(names_.query), scores, now, [&] {
        Scores candidate{scores.query, keys_for(scores)};
        candidate.query = queries_for(candidate);
        return candidate;
      }));
      if (!reports.back().kept) break;
    }
    put_stacked(names_.query, scores.query);
    if (refits_keys()) put_stacked(names_.key, scores.key);
    for (auto* list : {&input_, &keys_, &original_queries_, &original_keys_, &row_norms_})
      std::fill(list->begin(), list->end(), at::Tensor());
    return reports;
  }

  bool refits_keys() const { return options_.key_sweeps > 0 && folded_.layout == checkpoint::KvLayout::gqa; }
  std::int64_t query_width() const {
    return checkpoint::keys_absorbed(folded_, layer_) ? folded_.shape_of(layer_).key_width : config_.head_dim;
  }

  const comm::Communicator& world_;
  const Reader& reader_;
  const ModelConfig& config_;
  const ModelConfig& folded_;
  const RefitOptions& options_;
  std::int64_t samples_, held_count_;
  DealtSequences fit_, held_;
  std::vector<std::int64_t> own_;
  // By number of sequence; undefined for those of other ranks. Both streams [1, tokens, hidden]; aim: what the folded
  // attention block should add up to [tokens, hidden]; the rest for the refit of queries, [heads, tokens, head_dim].
  std::vector<at::Tensor> original_, compressed_, aim_, input_, keys_, original_queries_, original_keys_, row_norms_;
  double tokens_ = 0;
  at::Tensor mask_, frequencies_, slopes_;
  Progress progress_;
  // The layer at hand.
  std::int64_t layer_ = 0;
  LayerTensors* tensors_ = nullptr;
  Names names_;
  std::vector<std::int64_t> order_;           // original query head of each folded one; empty: the same
  at::Tensor query_fold_;                     // `projected`
  at::Tensor original_query_, original_key_;  // of each folded query head, biases as a last column
};

void check(const RefitOptions& options, const ModelConfig& config, const ModelConfig& folded,
           const at::Tensor& sequences) {
  if (options.ridges.empty()) throw UsageError("the refit needs at least one ridge");
  for (const double ridge : options.ridges)
    if (!(ridge > 0) || !std::isfinite(ridge)) throw UsageError(fmt::format("refit ridge {}: not above 0", ridge));
  if (!(options.held_out_share > 0 && options.held_out_share < 1))
    throw UsageError(fmt::format("share of held-out sequences {}: not between 0 and 1", options.held_out_share));
  if (options.chunks < 1) throw UsageError(fmt::format("refit in {} chunks: at least 1 is needed", options.chunks));
  if (options.key_sweeps < 0 || options.score_rows < 2 || !(options.score_ridge > 0))
    throw UsageError("the refit of queries and keys needs at least 0 sweeps, 2 rows and a ridge above 0");
  if (!options.query_heads.empty() && static_cast<std::int64_t>(options.query_heads.size()) != config.layers)
    throw InternalError("query heads are given for another number of layers");
  if (folded.layers != config.layers || folded.hidden != config.hidden || folded.heads != config.heads ||
      folded.head_dim != config.head_dim || folded.family != config.family)
    throw InternalError(fmt::format("{} is no fold of {}", folded.file, config.file));
  if (!sequences.defined() || sequences.dim() != 2 || sequences.scalar_type() != at::kLong)
    throw InternalError("the refit wants int64 sequences [samples, tokens]");
  if (sequences.size(0) < 2 || sequences.size(1) < 2)
    throw InputError(
        fmt::format("the refit was given {} sequence(s) of {} token(s)", sequences.size(0), sequences.size(1)),
        "it fits on some sequences and checks itself on others: give at least 2, better 64 or more");
  if (sequences.size(1) > config.max_positions)
    spdlog::warn("refit sequences of {} tokens, the model knows {} positions", sequences.size(1), config.max_positions);
  model::check_ids(sequences, config);
}

}  // namespace

std::vector<std::vector<std::int64_t>> query_order(const std::vector<LayerTarget>& targets, const ModelConfig& config) {
  std::vector<std::vector<std::int64_t>> order;
  bool moved = false;
  for (const LayerTarget& target : targets) {
    std::vector<std::int64_t> heads;
    for (const auto& group : target.groups)
      for (const std::int64_t head : query_heads_of(group, config.heads / config.kv_heads)) heads.push_back(head);
    moved = moved || !std::is_sorted(heads.begin(), heads.end());
    order.push_back(std::move(heads));
  }
  if (!moved) order.clear();
  return order;
}

std::vector<std::string> refitted_tensors(const ModelConfig& folded_config, const RefitOptions& options) {
  const Names names = names_of(folded_config, 0);
  std::vector<std::string> tails;
  const auto add = [&](const std::string& name, bool biased) {
    tails.push_back(checkpoint::last_parts(name + ".weight"));
    if (biased) tails.push_back(checkpoint::last_parts(name + ".bias"));
  };
  if (options.queries) add(names.query, names.attention_bias);
  if (options.queries && options.key_sweeps > 0 && folded_config.layout == checkpoint::KvLayout::gqa)
    add(names.key, names.attention_bias);
  if (options.output) add(names.output, names.attention_bias);
  if (options.down) add(names.down, names.down_bias);
  return tails;
}

OrderedJson to_json(const RefitOptions& options) {
  OrderedJson json;
  json["target"] = options.target == RefitTarget::stream ? "stream" : "attention";
  json["output"] = options.output;
  json["down"] = options.down;
  json["queries"] = options.queries;
  json["key_sweeps"] = options.key_sweeps;
  json["score_ridge"] = options.score_ridge;
  json["score_rows"] = options.score_rows;
  json["ridges"] = options.ridges;
  json["held_out_share"] = options.held_out_share;
  return json;
}

OrderedJson to_json(const LayerRefit& report) {
  const auto part = [](const PartRefit& one) {
    return OrderedJson{{"part", one.part},
                       {"quantity", one.divergence ? "divergence" : "relative squared error"},
                       {"error_before", one.error_before},
                       {"error_after", one.error_after},
                       {"held_out_before", one.held_out_before},
                       {"held_out_after", one.held_out_after},
                       {"kept", one.kept},
                       {"ridge", one.ridge},
                       {"condition", one.condition}};
  };
  OrderedJson json;
  json["layer"] = report.layer;
  json["stream_error"] = report.stream_error;
  json["parts"] = OrderedJson::array();
  for (const PartRefit& one : report.others)
    if (one.divergence) json["parts"].push_back(part(one));
  if (!report.part.empty()) json["parts"].push_back(part(report));
  for (const PartRefit& one : report.others)
    if (!one.divergence) json["parts"].push_back(part(one));
  return json;
}

void refit_layers(const comm::Communicator& world, const Reader& reader, const ModelConfig& folded_config,
                  const at::Tensor& sequences, const RefitOptions& options,
                  const std::function<LayerTensors(std::int64_t layer)>& folded,
                  const std::function<void(std::int64_t layer, const LayerTensors&, const LayerRefit&)>& done) {
  const at::NoGradGuard no_grad;
  check(options, reader.config(), folded_config, sequences);
  Refitter refitter(world, reader, folded_config, sequences, options);
  for (std::int64_t layer = 0; layer < reader.config().layers; ++layer) {
    comm::stop_if_requested(world, fmt::format("before the refit of layer {}", layer));
    LayerTensors tensors = folded(layer);
    const LayerRefit report = refitter.run(layer, tensors);
    done(layer, tensors, report);
  }
}

}  // namespace headfold::folding
