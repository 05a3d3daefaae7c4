#include <headfold/base/error.h>
#include <headfold/folding/bases.h>
#include <headfold/folding/comparison.h>
#include <headfold/linalg/linalg.h>

#include <algorithm>
#include <cmath>
#include <numeric>

namespace headfold::folding {

using checkpoint::Family;
using checkpoint::KvLayout;

namespace {

at::Tensor float_of(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.to(at::kFloat) : tensor;
}

LayerWeights in_float(const LayerWeights& w) {
  LayerWeights result = w;
  for (at::Tensor LayerWeights::*member :
       {&LayerWeights::query, &LayerWeights::key, &LayerWeights::value, &LayerWeights::output,
        &LayerWeights::query_bias, &LayerWeights::key_bias, &LayerWeights::value_bias, &LayerWeights::output_bias,
        &LayerWeights::key_fold, &LayerWeights::query_fold, &LayerWeights::key_up, &LayerWeights::value_up})
    result.*member = float_of(w.*member);
  return result;
}

/// [tokens, heads, rows / heads].
at::Tensor projected_heads(const at::Tensor& inputs, const at::Tensor& weight, const at::Tensor& bias,
                           std::int64_t heads) {
  at::Tensor y = at::matmul(inputs, weight.t());
  if (bias.defined()) y = y + bias;
  return y.view({inputs.size(0), heads, -1});
}

at::Tensor with_bias(const at::Tensor& weight, const at::Tensor& bias) {
  return bias.defined() ? at::cat({weight, bias.reshape({-1, 1})}, 1) : weight;
}

/// X [r, d] that brings X S closest to T (S [d, n], T [r, n]).
at::Tensor least_squares(const at::Tensor& target, const at::Tensor& source) {
  const linalg::PsdRoot root = linalg::psd_root(at::matmul(source, source.t()));
  return at::matmul(at::matmul(target, source.t()), at::matmul(root.inverse_root, root.inverse_root));
}

/// The same for maps that commute with every rotation: one complex number per frequency.
at::Tensor commuting_least_squares(const at::Tensor& target, const at::Tensor& source) {
  const std::int64_t half = source.size(0) / 2;
  const at::Tensor x = source.slice(0, 0, half), y = source.slice(0, half), u = target.slice(0, 0, half),
                   v = target.slice(0, half);
  const at::Tensor norm = (x * x + y * y).sum(1).clamp_min(1e-300);
  const at::Tensor re = at::diag((x * u + y * v).sum(1) / norm), im = at::diag((x * v - y * u).sum(1) / norm);
  return at::cat({at::cat({re, -im}, 1), at::cat({im, re}, 1)}, 0);
}

/// Rows of several query heads [repeat * width, n] side by side: [width, repeat * n].
at::Tensor side_by_side(const at::Tensor& rows, std::int64_t width) {
  return rows.view({-1, width, rows.size(1)}).transpose(0, 1).reshape({width, -1});
}

at::Tensor mean_or_zero(const at::Tensor& mean_input, const at::Tensor& weight, const at::Tensor& bias,
                        std::int64_t heads, bool centred) {
  if (!centred) return at::zeros({heads, weight.size(0) / heads}, at::kFloat);
  at::Tensor mean = at::matmul(weight, mean_input.to(at::kDouble));
  if (bias.defined()) mean = mean + bias;
  return mean.view({heads, -1}).to(at::kFloat);
}

constexpr std::int64_t kQueryRows = 512;  // scores are formed [512, tokens] at a time

/// Attention mass at every distance, all heads together, sum one; query [tokens, heads, d] and key [tokens, kv_heads,
/// d] rotated.
at::Tensor attention_by_distance(const at::Tensor& query, const at::Tensor& key, double scale) {
  const std::int64_t tokens = query.size(0), heads = query.size(1), repeat = heads / key.size(1);
  const at::Tensor positions = at::arange(tokens, at::kLong);
  at::Tensor mass = at::zeros({tokens}, at::kDouble);
  for (std::int64_t begin = 0; begin < tokens; begin += kQueryRows) {
    const std::int64_t end = std::min(tokens, begin + kQueryRows);
    const at::Tensor distance = positions.slice(0, begin, end).unsqueeze(1) - positions.slice(0, 0, end).unsqueeze(0);
    at::Tensor attention = at::zeros({end - begin, end}, at::kFloat);
    for (std::int64_t h = 0; h < heads; ++h) {
      const at::Tensor scores =
          at::matmul(query.select(1, h).slice(0, begin, end), key.select(1, h / repeat).slice(0, 0, end).t()) * scale;
      attention += at::softmax(scores.masked_fill(distance < 0, -std::numeric_limits<double>::infinity()), 1);
    }
    mass.index_add_(0, distance.clamp_min(0).flatten(), attention.to(at::kDouble).flatten());
  }
  return mass / mass.sum();
}

/// Whether the fold's loss leaves out a part of the mean key under rotation.
bool leaves_out_mean_key(const FoldOptions& options) {
  return options.keys == KeyFold::rope_commuting && options.key_metric == Metric::act_query_dist &&
         (options.slow_band != 0 || options.mean_weight != 1.0);
}

}  // namespace

bool needs_mean_input(const checkpoint::ModelConfig& original, const FoldOptions& options) {
  return original.family != Family::llama || original.attention_bias || leaves_out_mean_key(options);
}

LayerComparison::LayerComparison(const checkpoint::ModelConfig& original_config, const LayerWeights& original,
                                 const checkpoint::ModelConfig& folded_config, const LayerWeights& folded,
                                 const Groups& groups, const FoldOptions& options, const at::Tensor& mean_input)
    : original_(in_float(original)), folded_(in_float(folded)), options_(options), groups_(groups) {
  rotates_ = original_config.family == Family::llama;
  projected_ = folded_config.layout == KvLayout::projected;
  if (rotates_)
    frequencies_ = model::rope_inverse_frequencies(original_config);
  else
    slopes_ = model::alibi_slopes(original_config.heads);
  const std::int64_t d = original.head_dim;
  const std::int64_t source_heads = original.kv_heads, repeat = original.heads / source_heads;
  group_of_head_.assign(static_cast<std::size_t>(source_heads), -1);
  place_of_head_.assign(static_cast<std::size_t>(source_heads), -1);
  std::int64_t place = 0;
  for (std::size_t g = 0; g < groups.size(); ++g)
    for (const std::int64_t head : groups[g]) {
      group_of_head_.at(static_cast<std::size_t>(head)) = static_cast<std::int64_t>(g);
      place_of_head_.at(static_cast<std::size_t>(head)) = place++;
    }
  const auto group_count = static_cast<std::int64_t>(groups.size());
  const bool centred_values = !rotates_ || original_config.attention_bias;
  if (centred_values && !mean_input.defined()) throw InternalError("this comparison needs the mean input");
  const std::int64_t folded_keys = projected_ ? source_heads : group_count;
  key_mean_ = mean_or_zero(mean_input, original.key, original.key_bias, source_heads, !rotates_);
  folded_key_mean_ = mean_or_zero(mean_input, folded.key, folded.key_bias, folded_keys, !rotates_);
  value_mean_ = mean_or_zero(mean_input, original.value, original.value_bias, source_heads, centred_values);
  folded_value_mean_ = mean_or_zero(mean_input, folded.value, folded.value_bias, group_count, centred_values);
  if (rotates_ && !projected_ && !folded.key_up.defined() && leaves_out_mean_key(options)) {
    if (!mean_input.defined()) throw InternalError("this comparison needs the mean input");
    left_out_ = at::full({d / 2}, 1.0 - std::sqrt(options.mean_weight), at::kDouble);
    mean_key_ = mean_or_zero(mean_input, original.key, original.key_bias, source_heads, true).to(at::kDouble);
    folded_mean_key_ = mean_or_zero(mean_input, folded.key, folded.key_bias, group_count, true).to(at::kDouble);
  }

  // Commuting maps rebuild rotated keys as well as plain ones; a slow band, or refitted queries, mix frequencies.
  const bool commuting =
      rotates_ && !projected_ && !folded.key_up.defined() && options.slow_band == 0 && !options.refit;
  rotated_decoder_ = commuting || projected_ || !rotates_;
  std::vector<at::Tensor> key_decoders, value_decoders;
  for (std::int64_t k = 0; k < source_heads; ++k) {
    const std::int64_t at_place = place_of_head_[static_cast<std::size_t>(k)];
    if (projected_) {
      key_decoders.push_back(folded.query_fold[at_place].t());
    } else if (folded.key_up.defined()) {
      key_decoders.push_back(folded.key_up[at_place]);
    } else {
      const auto rows = [&](const LayerWeights& w, std::int64_t head) {
        const std::int64_t width = w.query.size(0) / w.heads, n = repeat * width;
        return side_by_side(
            with_bias(w.query.slice(0, head * n, (head + 1) * n),
                      w.query_bias.defined() ? w.query_bias.slice(0, head * n, (head + 1) * n) : w.query_bias),
            width);
      };
      const at::Tensor target = rows(folded, at_place), source = rows(original, k);
      key_decoders.push_back((commuting ? commuting_least_squares(target, source) : least_squares(target, source)).t());
    }
    if (folded.value_up.defined()) {
      value_decoders.push_back(folded.value_up[at_place]);
      continue;
    }
    const auto columns = [&](const LayerWeights& w, std::int64_t head) {
      const std::int64_t width = w.output.size(1) / w.heads, n = repeat * width;
      return side_by_side(w.output.slice(1, head * n, (head + 1) * n).t().contiguous(), width);
    };
    // W_O' = P B: B^T takes P^T to W_O'^T.
    value_decoders.push_back(least_squares(columns(folded, at_place), columns(original, k)).t());
  }
  const at::Tensor key_decoder = at::stack(key_decoders), value_decoder = at::stack(value_decoders);
  key_decoder_ = key_decoder.to(at::kFloat);
  value_decoder_ = value_decoder.to(at::kFloat);

  const auto weight_error = [&](const at::Tensor& source, const at::Tensor& merged, const at::Tensor& decoder,
                                int error, int total) {
    const std::int64_t width = merged.size(0) / group_count;
    for (std::int64_t k = 0; k < source_heads; ++k) {
      const std::int64_t g = group_of_head_[static_cast<std::size_t>(k)];
      const at::Tensor rows = source.slice(0, k * d, (k + 1) * d);
      errors_.sums[static_cast<std::size_t>(error)] +=
          linalg::square_sum(rows - at::matmul(decoder[k], merged.slice(0, g * width, (g + 1) * width)));
      errors_.sums[static_cast<std::size_t>(total)] += linalg::square_sum(rows);
    }
  };
  // Weight errors know no tokens: the same sums on every rank leave their ratio what it is.
  if (options_.key_metric == Metric::weights) {
    at::Tensor merged = folded.key;
    if (projected_) {
      std::vector<at::Tensor> parts;
      for (std::size_t g = 0; g < groups.size(); ++g)
        parts.push_back(at::matmul(folded.key_fold[static_cast<std::int64_t>(g)],
                                   original.key.index_select(0, block_index(groups[g], d))));
      merged = at::cat(parts, 0);
    }
    weight_error(original.key, merged, key_decoder, ErrorSums::key_error, ErrorSums::key_total);
  }
  if (options_.value_metric == Metric::weights)
    weight_error(original.value, folded.value, value_decoder, ErrorSums::value_error, ErrorSums::value_total);
}

std::optional<double> ErrorSums::deviation(int part, int whole, int squares) const {
  const auto at = [&](int index) { return sums[static_cast<std::size_t>(index)]; };
  const double n = at(sequences), total = at(whole), share = ratio(part, whole);
  if (n < 2 || total <= 0) return std::nullopt;
  const double residual = at(squares) - 2 * share * at(squares + 1) + share * share * at(squares + 2);
  return std::sqrt(std::max(residual, 0.0) * n / (n - 1)) / total;
}

at::Tensor LayerComparison::left_out_keys(const at::Tensor& mean_key, const at::Tensor& law) const {
  const std::int64_t tokens = law.size(0), half = mean_key.size(1) / 2;
  const at::Tensor frequencies = frequencies_.to(at::kDouble);
  // The channels of a slow band as the plan chose them.
  at::Tensor share = left_out_.clone();
  const std::int64_t band = slow_band_of(frequencies, options_.context > 0 ? options_.context : tokens, options_);
  share.slice(0, half - band).fill_(1.0);
  // E[e^(-i theta tau)] times the mean key, pair by pair.
  const at::Tensor angles = at::outer(frequencies, at::arange(tokens, at::kDouble));
  const at::Tensor cosine = share * at::matmul(at::cos(angles), law), sine = -share * at::matmul(at::sin(angles), law);
  const at::Tensor x = mean_key.slice(1, 0, half), y = mean_key.slice(1, half);
  const at::Tensor met = at::cat({x * cosine - y * sine, x * sine + y * cosine}, 1).to(at::kFloat);
  return model::apply_rope(met.unsqueeze(0).expand({tokens, -1, -1}).contiguous().unsqueeze(0), frequencies_, 0)
      .squeeze(0);
}

void LayerComparison::add(const at::Tensor& inputs) {
  const auto before = errors_.sums;
  const std::int64_t tokens = inputs.size(0), d = original_.head_dim, heads = original_.heads,
                     source_heads = original_.kv_heads, repeat = heads / source_heads,
                     groups = static_cast<std::int64_t>(groups_.size());
  const at::Tensor x = inputs.to(at::kFloat);
  const auto rotated = [&](const at::Tensor& y) {
    return rotates_ ? model::apply_rope(y.unsqueeze(0), frequencies_, 0).squeeze(0) : y;
  };
  const at::Tensor group_index = at::tensor(group_of_head_, at::kLong),
                   place_index = at::tensor(place_of_head_, at::kLong);
  const at::Tensor plain_key = projected_heads(x, original_.key, original_.key_bias, source_heads) - key_mean_;
  const at::Tensor query = rotated(projected_heads(x, original_.query, original_.query_bias, heads));
  const at::Tensor key = rotated(plain_key);
  const at::Tensor value = projected_heads(x, original_.value, original_.value_bias, source_heads) - value_mean_;

  // What is cached per group, before and after the rotation; and what the folded queries meet, by source head.
  at::Tensor folded_plain = projected_heads(x, folded_.key, folded_.key_bias, projected_ ? source_heads : groups);
  folded_plain = folded_plain - folded_key_mean_;
  at::Tensor folded_query = projected_heads(x, folded_.query, folded_.query_bias, heads);
  at::Tensor folded_key, met_key;
  if (projected_) {
    folded_query = at::einsum("tkrd,ked->tkre",
                              {rotated(folded_query).view({tokens, source_heads, repeat, d}), folded_.query_fold})
                       .reshape({tokens, heads, d});
    folded_key = at::einsum("tgp,gep->tge", {rotated(folded_plain).reshape({tokens, groups, -1}), folded_.key_fold});
    met_key = folded_key.index_select(1, group_index);
  } else if (folded_.key_up.defined()) {
    folded_query = rotated(folded_query);
    met_key = rotated(at::einsum("tke,kde->tkd", {folded_plain.index_select(1, group_index),
                                                  folded_.key_up.index_select(0, place_index)})
                          .contiguous());
  } else {
    folded_query = rotated(folded_query);
    folded_key = rotated(folded_plain);
    met_key = folded_key.index_select(1, group_index);
  }
  const at::Tensor folded_value = projected_heads(x, folded_.value, folded_.value_bias, groups) - folded_value_mean_;
  const at::Tensor met_value = folded_value.index_select(1, group_index);  // by source head, [tokens, heads, width]

  auto& sums = errors_.sums;
  if (options_.key_metric == Metric::act) {
    const at::Tensor latent = (rotated_decoder_ ? folded_key : folded_plain).index_select(1, group_index);
    sums[ErrorSums::key_error] +=
        linalg::square_sum((rotated_decoder_ ? key : plain_key) - at::einsum("tke,kde->tkd", {latent, key_decoder_}));
    sums[ErrorSums::key_total] += linalg::square_sum(key);
  }
  if (options_.value_metric == Metric::act) {
    sums[ErrorSums::value_error] += linalg::square_sum(value - at::einsum("tke,kde->tkd", {met_value, value_decoder_}));
    sums[ErrorSums::value_total] += linalg::square_sum(value);
  }
  const double scale = 1.0 / std::sqrt(static_cast<double>(d));
  const std::int64_t width = folded_value.size(2);
  at::Tensor attended = at::empty({tokens, heads, d}, at::kFloat),
             folded_attended = at::empty({tokens, heads, width}, at::kFloat);
  // Values behind the output projection, one query head at a time: P_h v against W_O,h' v'.
  const auto add_behind = [&](std::int64_t h, std::int64_t place, const at::Tensor& wanted, const at::Tensor& given) {
    const at::Tensor columns = original_.output.slice(1, h * d, (h + 1) * d);
    const at::Tensor whole = at::matmul(wanted, columns.t());
    at::Tensor rebuilt;
    if (folded_.value_up.defined()) {
      rebuilt = at::matmul(at::matmul(given, folded_.value_up[place / repeat].t()),
                           folded_.output.slice(1, place * d, (place + 1) * d).t());
    } else {
      rebuilt = at::matmul(given, folded_.output.slice(1, place * width, (place + 1) * width).t());
    }
    sums[ErrorSums::value_error] += linalg::square_sum(whole - rebuilt);
    sums[ErrorSums::value_total] += linalg::square_sum(whole);
  };
  const at::Tensor positions = at::arange(tokens, at::kLong);
  // act+query+dist weighs pairs as the original's attention does: by distance, means over pairs times attention mass.
  const bool by_distance = options_.key_metric == Metric::act_query_dist;
  std::array<at::Tensor, 3> distances;  // sums of squared errors, squared scores and attention, [tokens]
  if (by_distance)
    for (at::Tensor& sum : distances) sum = at::zeros({tokens}, at::kDouble);
  // What is left out of every score of a query, [tokens, heads]: of the original's, of the error's.
  at::Tensor constant, constant_error;
  if (left_out_.defined()) {
    const at::Tensor law = attention_by_distance(query, key, scale);
    const auto met = [&](const at::Tensor& queries, const at::Tensor& mean_key) {
      return (queries * left_out_keys(mean_key, law).repeat_interleave(repeat, 1)).sum(-1) * scale;
    };
    constant = met(query, mean_key_);
    std::vector<std::int64_t> place;  // of query heads
    for (std::int64_t h = 0; h < heads; ++h)
      place.push_back(place_of_head_[static_cast<std::size_t>(h / repeat)] * repeat + h % repeat);
    constant_error = constant - met(folded_query.index_select(1, at::tensor(place, at::kLong)),
                                    folded_mean_key_.index_select(0, group_index));
  }
  for (std::int64_t begin = 0; begin < tokens; begin += kQueryRows) {
    const std::int64_t end = std::min(tokens, begin + kQueryRows);
    const at::Tensor future = positions.slice(0, 0, end).unsqueeze(0) > positions.slice(0, begin, end).unsqueeze(1);
    std::array<at::Tensor, 3> over_heads;
    if (by_distance)
      for (at::Tensor& sum : over_heads) sum = at::zeros({end - begin, end}, at::kFloat);
    for (std::int64_t h = 0; h < heads; ++h) {
      const std::int64_t k = h / repeat;
      const std::int64_t place = place_of_head_[static_cast<std::size_t>(k)] * repeat + h % repeat;
      const auto scores_of = [&](const at::Tensor& queries, std::int64_t q, const at::Tensor& keys) {
        return (at::matmul(queries.select(1, q).slice(0, begin, end), keys.select(1, k).slice(0, 0, end).t()) * scale)
            .masked_fill(future, 0.0);
      };
      at::Tensor scores = scores_of(query, h, key), folded_scores = scores_of(folded_query, place, met_key);
      sums[ErrorSums::score_error] += linalg::square_sum(scores - folded_scores);
      sums[ErrorSums::score_total] += linalg::square_sum(scores);
      if (by_distance) {
        const auto less = [&](const at::Tensor& all, const at::Tensor& part) {
          return part.defined() ? all - part.slice(0, begin, end).slice(1, h, h + 1) : all;
        };
        over_heads[0] += less(scores - folded_scores, constant_error).square();
        over_heads[1] += less(scores, constant).square();
      }
      if (!rotates_) {
        const at::Tensor bias = slopes_[h] * positions.slice(0, 0, end).to(at::kFloat).unsqueeze(0);
        scores = scores + bias;
        folded_scores = folded_scores + bias;
      }
      const double minus_infinity = -std::numeric_limits<double>::infinity();
      const auto attention_of = [&](const at::Tensor& s) {
        return at::softmax(s.masked_fill(future, minus_infinity), 1);
      };
      const auto attend = [&](const at::Tensor& attention, const at::Tensor& values) {
        return at::matmul(attention, values.select(1, k).slice(0, 0, end));
      };
      const at::Tensor attention = attention_of(scores);
      if (by_distance) over_heads[2] += attention;
      const at::Tensor wanted = attend(attention, value);
      attended.slice(0, begin, end).select(1, h).copy_(wanted);
      folded_attended.slice(0, begin, end).select(1, place).copy_(attend(attention_of(folded_scores), met_value));
      if (options_.value_metric == Metric::act_out)
        add_behind(h, place, value.select(1, k).slice(0, begin, end), met_value.select(1, k).slice(0, begin, end));
      if (options_.value_metric == Metric::attn_out) add_behind(h, place, wanted, attend(attention, met_value));
    }
    if (by_distance) {
      const at::Tensor distance =
          (positions.slice(0, begin, end).unsqueeze(1) - positions.slice(0, 0, end).unsqueeze(0))
              .clamp_min(0)
              .flatten();
      const at::Tensor past = at::logical_not(future);
      for (std::size_t i = 0; i < distances.size(); ++i)
        distances[i].index_add_(0, distance, (over_heads[i] * past).to(at::kDouble).flatten());
    }
  }
  // Attention rows sum to one: the means that were taken off the values come back as constants.
  const auto output = [&](const at::Tensor& y, const at::Tensor& mean, const LayerWeights& w, const at::Tensor& up) {
    at::Tensor all = y + mean;
    if (up.defined())
      all =
          at::einsum("tkre,kde->tkrd", {all.view({tokens, source_heads, repeat, -1}), up}).reshape({tokens, heads, d});
    const at::Tensor o = at::matmul(all.reshape({tokens, -1}), w.output.t());
    return w.output_bias.defined() ? o + w.output_bias : o;
  };
  // Stored order: place_of_head_ is where a source head stands.
  std::vector<std::int64_t> group_of_place(group_of_head_.size());
  for (std::size_t k = 0; k < place_of_head_.size(); ++k)
    group_of_place[static_cast<std::size_t>(place_of_head_[k])] = group_of_head_[k];
  const at::Tensor mean = value_mean_.repeat_interleave(repeat, 0);
  const at::Tensor folded_mean =
      folded_value_mean_.index_select(0, at::tensor(group_of_place, at::kLong)).repeat_interleave(repeat, 0);
  const at::Tensor result = output(attended, mean, original_, at::Tensor());
  sums[ErrorSums::output_error] +=
      linalg::square_sum(result - output(folded_attended, folded_mean, folded_, folded_.value_up));
  sums[ErrorSums::output_total] += linalg::square_sum(result);
  if (by_distance) {
    const at::Tensor law = distances[2] / distances[2].sum() / (tokens - positions).to(at::kDouble);
    sums[ErrorSums::key_error] += at::dot(law, distances[0]).item<double>();
    sums[ErrorSums::key_total] += at::dot(law, distances[1]).item<double>();
  }
  if (options_.key_metric == Metric::act_query) {
    sums[ErrorSums::key_error] = sums[ErrorSums::score_error];
    sums[ErrorSums::key_total] = sums[ErrorSums::score_total];
  }
  const auto add_products = [&](std::size_t part, std::size_t whole, std::size_t squares) {
    const double error = sums[part] - before[part], total = sums[whole] - before[whole];
    sums[squares] += error * error;
    sums[squares + 1] += error * total;
    sums[squares + 2] += total * total;
  };
  add_products(ErrorSums::key_error, ErrorSums::key_total, ErrorSums::key_error_error);
  add_products(ErrorSums::value_error, ErrorSums::value_total, ErrorSums::value_error_error);
  sums[ErrorSums::sequences] += 1;
}

double spearman(const std::vector<double>& a, const std::vector<double>& b) {
  if (a.size() != b.size()) throw InternalError("rank correlation of lists of different length");
  if (a.size() < 2) return 0;
  const auto ranks = [](const std::vector<double>& values) {
    std::vector<std::size_t> order(values.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::sort(order.begin(), order.end(), [&](std::size_t i, std::size_t j) { return values[i] < values[j]; });
    std::vector<double> result(values.size());
    for (std::size_t i = 0; i < order.size();) {
      std::size_t j = i;
      while (j < order.size() && values[order[j]] == values[order[i]]) ++j;
      for (std::size_t k = i; k < j; ++k) result[order[k]] = 0.5 * static_cast<double>(i + j - 1);
      i = j;
    }
    return result;
  };
  const std::vector<double> x = ranks(a), y = ranks(b);
  const double mean = 0.5 * static_cast<double>(a.size() - 1);
  double xy = 0, xx = 0, yy = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    xy += (x[i] - mean) * (y[i] - mean);
    xx += (x[i] - mean) * (x[i] - mean);
    yy += (y[i] - mean) * (y[i] - mean);
  }
  return xx > 0 && yy > 0 ? xy / std::sqrt(xx * yy) : 0.0;
}

LayerOrder layer_order(const std::vector<double>& predicted, const std::vector<double>& measured,
                       const std::vector<std::optional<double>>& deviations) {
  const std::size_t layers = measured.size();
  if (predicted.size() != layers || deviations.size() != layers)
    throw InternalError("order of lists of different length");
  LayerOrder order;
  if (layers == 0) return order;
  for (std::size_t i = 0; i < layers; ++i)
    for (std::size_t j = 0; j < i; ++j) {
      ++order.pairs;
      const double difference = measured[i] - measured[j];
      if (!deviations[i] || !deviations[j] || difference == 0 ||
          std::abs(difference) <= 2 * std::hypot(*deviations[i], *deviations[j]))
        continue;
      ++order.told_apart;
      if ((predicted[i] - predicted[j]) * difference > 0) ++order.in_order;
    }
  const auto [least, most] = std::minmax_element(measured.begin(), measured.end());
  const double mean = std::accumulate(measured.begin(), measured.end(), 0.0) / static_cast<double>(layers);
  order.spread = mean > 0 ? (*most - *least) / mean : 0.0;
  return order;
}

}  // namespace headfold::folding
