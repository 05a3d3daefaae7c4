#include <headfold/base/error.h>
#include <headfold/base/index.h>
#include <headfold/base/progress.h>
#include <headfold/comm/stopping.h>
#include <headfold/folding/budget.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace headfold::folding {

namespace {

/// Sum of the smallest choices. Checks the tables.
std::int64_t least_budget(const std::vector<LayerChoices>& layers, std::int64_t budget) {
  std::int64_t least = 0;
  for (const LayerChoices& layer : layers) {
    if (layer.heads.empty() || layer.heads.size() != layer.cost.size())
      throw InternalError("a layer of the budget has no choices, or not one cost for each");
    for (std::size_t i = 0; i < layer.heads.size(); ++i) {
      if (layer.heads[i] <= 0 || (i > 0 && layer.heads[i] <= layer.heads[i - 1]))
        throw InternalError("the choices of a layer must be positive and ascending");
      if (!std::isfinite(layer.cost[i])) throw InternalError("a cost of the budget is not finite");
    }
    least += layer.heads[0];
  }
  if (least > budget)
    throw UsageError(fmt::format("a budget of {} KV heads over all layers is too small: {} layers need {} at least",
                                 budget, layers.size(), least),
                     "raise --kv-heads");
  return least;
}

/// Every rank's entries of a table dealt in blocks, in order.
std::vector<Json> gathered(const comm::Communicator& world, const Json& mine) {
  // Shortest round-trip decimal text: every rank reads back the very same doubles.
  std::vector<Json> all;
  for (const std::string& text : world.all_gather(mine.dump()))
    for (Json& one : Json::parse(text)) all.push_back(std::move(one));
  return all;
}

}  // namespace

std::vector<std::int64_t> allocate_exactly(const std::vector<LayerChoices>& layers, std::int64_t budget) {
  std::int64_t most = 0;
  least_budget(layers, budget);
  for (const LayerChoices& layer : layers) most += layer.heads.back();
  const std::int64_t top = std::min(budget, most);
  constexpr double kNone = std::numeric_limits<double>::infinity();
  // best[b]: least cost of the layers so far with exactly b heads; choice[layer][b]: what the layer took.
  std::vector<double> best(ix(top) + 1, kNone);
  best[0] = 0;
  std::vector<std::vector<int>> choice;
  for (const LayerChoices& layer : layers) {
    std::vector<double> next(best.size(), kNone);
    std::vector<int> took(best.size(), -1);
    for (std::int64_t b = 0; b <= top; ++b) {
      if (best[ix(b)] == kNone) continue;
      for (std::size_t i = 0; i < layer.heads.size() && b + layer.heads[i] <= top; ++i) {
        const std::size_t sum = ix(b + layer.heads[i]);
        const double cost = best[ix(b)] + layer.cost[i];
        if (cost < next[sum]) {
          next[sum] = cost;
          took[sum] = static_cast<int>(i);
        }
      }
    }
    best = std::move(next);
    choice.push_back(std::move(took));
  }
  std::int64_t at_end = std::min_element(best.begin(), best.end()) - best.begin();  // the first: fewest heads
  std::vector<std::int64_t> heads(layers.size());
  for (std::size_t l = layers.size(); l-- > 0;) {
    heads[l] = layers[l].heads[ix(choice[l][ix(at_end)])];
    at_end -= heads[l];
  }
  return heads;
}

std::vector<std::int64_t> allocate_greedily(const std::vector<LayerChoices>& layers, std::int64_t budget) {
  std::int64_t left = budget - least_budget(layers, budget);
  std::vector<std::size_t> now(layers.size(), 0);
  while (true) {
    double best = 0;
    std::size_t layer = layers.size(), choice = 0;
    for (std::size_t l = 0; l < layers.size(); ++l) {
      const LayerChoices& one = layers[l];
      // Any larger choice, not only the next: a step that gains nothing may lead to one that does.
      for (std::size_t i = now[l] + 1; i < one.heads.size(); ++i) {
        const std::int64_t heads = one.heads[i] - one.heads[now[l]];
        if (heads > left) break;
        const double gain = (one.cost[now[l]] - one.cost[i]) / static_cast<double>(heads);
        if (gain > best) {
          best = gain;
          layer = l;
          choice = i;
        }
      }
    }
    if (layer == layers.size()) break;
    left -= layers[layer].heads[choice] - layers[layer].heads[now[layer]];
    now[layer] = choice;
  }
  std::vector<std::int64_t> heads;
  for (std::size_t l = 0; l < layers.size(); ++l) heads.push_back(layers[l].heads[now[l]]);
  return heads;
}

double cost_of(const std::vector<LayerChoices>& layers, const std::vector<std::int64_t>& heads) {
  if (heads.size() != layers.size()) throw InternalError("an allocation must name every layer once");
  double cost = 0;
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const auto found = std::find(layers[l].heads.begin(), layers[l].heads.end(), heads[l]);
    if (found == layers[l].heads.end())
      throw InternalError(fmt::format("layer {} has no choice of {} KV heads", l, heads[l]));
    cost += layers[l].cost[static_cast<std::size_t>(found - layers[l].heads.begin())];
  }
  return cost;
}

std::vector<std::int64_t> progressive_widths(const std::vector<double>& log_condition, std::int64_t min_width,
                                             std::int64_t max_width, std::int64_t step) {
  if (step <= 0) throw InternalError("widths need a positive step");
  const std::int64_t low = (std::max<std::int64_t>(min_width, 1) + step - 1) / step * step;
  const std::int64_t high = max_width / step * step;
  if (low > high)
    throw UsageError(fmt::format("no multiple of {} lies between the narrowest width {} and the widest {}", step,
                                 min_width, max_width),
                     "set --min-width and --max-width further apart");
  std::vector<double> product(log_condition.size());  // log kappa~_l: the layer itself and all later ones
  double sum = 0;
  for (std::size_t l = product.size(); l-- > 0;) {
    if (!std::isfinite(log_condition[l]))
      throw NumericalError(fmt::format("the condition number of layer {} is not finite", l));
    product[l] = sum += log_condition[l];
  }
  std::vector<std::int64_t> widths(product.size(), high);
  if (product.empty()) return widths;
  const auto [least, most] = std::minmax_element(product.begin(), product.end());
  const double spread = *most - *least;
  if (!(spread > 0)) return widths;
  for (std::size_t l = 0; l < widths.size(); ++l) {
    const double share = (*most - product[l]) / spread;
    const double width =
        static_cast<double>(max_width) - share * static_cast<double>(max_width - std::max<std::int64_t>(min_width, 1));
    widths[l] = std::clamp(std::llround(width / static_cast<double>(step)) * step, static_cast<long long>(low),
                           static_cast<long long>(high));
  }
  return widths;
}

namespace {

/// Squared singular values, descending, of a matrix without its smallest side's null space: min(rows, columns) of them.
/// Through the Gram (a fifth of an SVD's time) unless the matrix is so ill-conditioned that squaring would show.
at::Tensor squared_singular_values(const at::Tensor& matrix) {
  const at::Tensor m = matrix.size(0) <= matrix.size(1) ? matrix.to(at::kDouble) : matrix.t().to(at::kDouble);
  const double norm = m.abs().max().item<double>();
  if (!std::isfinite(norm)) throw NumericalError("attention weights contain NaN or Inf");
  if (norm == 0) return at::zeros({m.size(0)}, at::kDouble);
  const at::Tensor scaled = m / norm;
  at::Tensor values = at::linalg_eigvalsh(at::matmul(scaled, scaled.t())).flip(0);
  // Eigenvalues carry an absolute error of about 1e-16 n times the largest.
  if (values[-1].item<double>() < 1e-9 * values[0].item<double>()) values = at::linalg_svdvals(scaled).square();
  return values * (norm * norm);
}

double log_condition_of(const at::Tensor& squares) {
  const double largest = squares[0].item<double>(), smallest = squares[-1].item<double>();
  if (!(largest > 0)) return 0;
  return 0.5 * std::log(largest / std::max(smallest, 1e-24 * largest));
}

}  // namespace

double log_condition(const at::Tensor& matrix) {
  if (matrix.dim() != 2 || matrix.numel() == 0) throw InternalError("a condition number needs a matrix");
  return log_condition_of(squared_singular_values(matrix));
}

namespace {

/// Squared singular values of W_K and W_V: of all heads together, and of each latent's heads.
struct LayerSpectra {
  double log_key = 0, log_value = 0;
  std::vector<std::vector<double>> key, value;  ///< per group, descending
};

std::vector<LayerSpectra> spectra(const comm::Communicator& world, const checkpoint::Reader& reader,
                                  std::int64_t groups) {
  const std::int64_t layers = reader.config().layers;
  const auto [begin, end] = share_of(2 * layers, world.rank(), world.size());  // keys and values apart
  Progress progress("spectra", "projection", static_cast<double>(end - begin), world.root());
  std::vector<Json> found(ix(end - begin));
  for_each_item(end - begin, [&, first = begin](std::int64_t i) {
    const std::int64_t layer = (first + i) / 2;
    const bool keys = (first + i) % 2 == 0;
    const LayerWeights w = load_layer_weights(reader, layer, keys ? Part::keys : Part::values);
    const at::Tensor& rows = keys ? w.key : w.value;
    try {
      const at::Tensor whole = squared_singular_values(rows);
      Json lists = Json::array();
      const std::int64_t per_group = rows.size(0) / groups;
      for (std::int64_t g = 0; g < groups; ++g) {
        const at::Tensor values =
            (groups == 1 ? whole : squared_singular_values(rows.slice(0, g * per_group, (g + 1) * per_group)))
                .contiguous();
        lists.push_back(std::vector<double>(values.data_ptr<double>(), values.data_ptr<double>() + values.numel()));
      }
      found[ix(i)] = {log_condition_of(whole), std::move(lists)};
    } catch (const NumericalError& error) {
      throw InputError(fmt::format("{}: layer {}: {}", reader.folder().string(), layer, error.what()));
    }
  });
  progress.advance(static_cast<double>(end - begin));
  Json mine = Json::array();
  for (Json& one : found) mine.push_back(std::move(one));
  const std::vector<Json> all = gathered(world, mine);
  std::vector<LayerSpectra> result(ix(layers));
  for (std::int64_t l = 0; l < layers; ++l) {
    LayerSpectra& layer = result[ix(l)];
    layer.log_key = all.at(ix(2 * l))[0];
    layer.key = all.at(ix(2 * l))[1].get<std::vector<std::vector<double>>>();
    layer.log_value = all.at(ix(2 * l + 1))[0];
    layer.value = all.at(ix(2 * l + 1))[1].get<std::vector<std::vector<double>>>();
  }
  return result;
}

double kept_share(const std::vector<std::vector<double>>& groups, std::int64_t width) {
  double kept = 0, total = 0;
  for (const std::vector<double>& values : groups) {
    for (std::size_t j = 0; j < values.size(); ++j) {
      total += values[j];
      if (j < ix(width)) kept += values[j];
    }
  }
  return total > 0 ? kept / total : 1.0;
}

}  // namespace

std::vector<double> log_conditions(const comm::Communicator& world, const checkpoint::Reader& reader) {
  std::vector<double> sums;
  for (const LayerSpectra& layer : spectra(world, reader, 1)) sums.push_back(layer.log_key + layer.log_value);
  return sums;
}

std::vector<LayerTarget> lorc_targets(const comm::Communicator& world, const checkpoint::Reader& reader,
                                      const FoldOptions& options, OrderedJson* report) {
  const checkpoint::ModelConfig& config = reader.config();
  const std::int64_t latents = options.latent_groups > 0 ? options.latent_groups : 1;
  if (config.kv_heads % latents != 0)
    throw UsageError(fmt::format("{} latents per layer: the model has {} KV heads", latents, config.kv_heads),
                     "the number of latents must divide the KV heads");
  const std::int64_t channels = config.kv_heads / latents * config.head_dim;
  if (options.kv_heads <= 0 || options.kv_heads * config.head_dim % latents != 0)
    throw UsageError(fmt::format("the cache of {} KV heads of {} channels does not split over {} latents",
                                 options.kv_heads, config.head_dim, latents));
  const std::int64_t uniform = options.kv_heads * config.head_dim / latents;
  const std::int64_t widest = options.max_width > 0 ? options.max_width : uniform;
  const std::int64_t narrowest = options.min_width > 0 ? options.min_width : std::max<std::int64_t>(1, widest / 8);
  if (widest > channels)
    throw UsageError(
        fmt::format("a latent of {} channels for heads of {} channels in all saves nothing", widest, channels),
        fmt::format("set --max-width to at most {}", channels));
  const bool progressive = options.allocation == Allocation::lorc_progressive;
  if (progressive && narrowest > widest)
    throw UsageError(fmt::format("--min-width {} is above the widest latent, {}", narrowest, widest));
  std::vector<LayerSpectra> layers;
  if (progressive || report != nullptr) layers = spectra(world, reader, latents);
  std::vector<std::int64_t> widths(ix(config.layers), uniform);
  // Widths that vector units like, where the ends allow it.
  const std::int64_t step = widest % 8 == 0 && narrowest % 8 == 0 ? 8 : 1;
  if (progressive) {
    std::vector<double> conditions;
    conditions.reserve(layers.size());
    for (const LayerSpectra& layer : layers) conditions.push_back(layer.log_key + layer.log_value);
    widths = progressive_widths(conditions, narrowest, widest, step);
  }
  std::vector<LayerTarget> targets;
  targets.reserve(widths.size());
  for (const std::int64_t width : widths)
    targets.push_back({contiguous_groups(config.kv_heads, latents), width, width});
  if (report != nullptr) {
    OrderedJson list = OrderedJson::array();
    double product = 0;
    for (const LayerSpectra& layer : layers) product += layer.log_key + layer.log_value;
    for (std::size_t l = 0; l < layers.size(); ++l) {
      list.push_back({{"layer", l},
                      {"width", widths[l]},
                      {"log_condition_key", layers[l].log_key},
                      {"log_condition_value", layers[l].log_value},
                      {"log_cumulative_condition", product},
                      {"key_energy_kept", kept_share(layers[l].key, widths[l])},
                      {"value_energy_kept", kept_share(layers[l].value, widths[l])}});
      product -= layers[l].log_key + layers[l].log_value;
    }
    OrderedJson out;
    out["method"] = "LoRC (arXiv 2410.03111): truncated SVD of W_K and W_V per latent, no calibration";
    out["latents_per_layer"] = latents;
    out["channels_per_latent"] = channels;
    if (progressive) {
      out["rule"] =
          "reconstructed rule, not quoted: widths fall with the cumulative condition numbers of this and later layers "
          "(docs/methods.md, LoRC)";
      out["min_width"] = narrowest;
      out["max_width"] = widest;
      out["step"] = step;
    } else {
      out["rule"] = "uniform width";
    }
    std::int64_t sum = std::accumulate(widths.begin(), widths.end(), std::int64_t{0});
    out["mean_width"] = static_cast<double>(sum) / static_cast<double>(widths.size());
    out["layers"] = std::move(list);
    *report = std::move(out);
  }
  return targets;
}

LossTable loss_table(const comm::Communicator& world, const checkpoint::Reader& reader,
                     const calibration::StatisticsFile* statistics, const FoldOptions& options,
                     const std::function<Groups(std::int64_t layer, std::int64_t heads)>& groups_of) {
  const checkpoint::ModelConfig& config = reader.config();
  const FoldOptions effective = with_effective_metrics(options, statistics != nullptr);
  LossTable table;
  for (const std::int64_t heads : legal_kv_heads(config))
    if (heads < config.kv_heads) table.heads.push_back(heads);
  const auto per_layer = static_cast<std::int64_t>(table.heads.size());
  table.heads.push_back(config.kv_heads);

  const auto [begin, end] = share_of(config.layers * per_layer, world.rank(), world.size());
  Progress progress("losses", "choice", static_cast<double>(end - begin), world.root());
  Json mine = Json::array();
  for (std::int64_t item = begin; item < end && !stop_requested();) {
    const std::int64_t layer = item / per_layer, first = item % per_layer;
    const std::int64_t count = std::min(end, (layer + 1) * per_layer) - item;
    LayerProblem problem;
    for_each_item(1, [&](std::int64_t) { problem = load_problem(reader, statistics, layer, Part::both, effective); });
    add_grams(problem, effective);
    // One item per group: choices differ in how many they have.
    std::vector<std::pair<std::int64_t, std::vector<std::int64_t>>> work;
    for (std::int64_t c = 0; c < count; ++c) {
      const std::int64_t heads = table.heads[ix(first + c)];
      for (std::vector<std::int64_t>& group :
           groups_of ? groups_of(layer, heads) : contiguous_groups(config.kv_heads, heads))
        work.emplace_back(c, std::move(group));
    }
    std::vector<std::array<double, 4>> sums(work.size());
    for_each_item(static_cast<std::int64_t>(work.size()), [&](std::int64_t i) {
      const Basis key = key_basis(problem, work[ix(i)].second, effective);
      const Basis value = value_basis(problem, work[ix(i)].second, effective);
      sums[ix(i)] = {std::max(0.0, key.loss), key.total, std::max(0.0, value.loss), value.total};
    });
    std::vector<std::array<double, 4>> by_choice(ix(count), {0, 0, 0, 0});
    for (std::size_t i = 0; i < work.size(); ++i)
      for (std::size_t j = 0; j < 4; ++j) by_choice[ix(work[i].first)][j] += sums[i][j];
    const auto share = [](double loss, double total) { return total > 0 ? loss / total : 0.0; };
    for (const auto& s : by_choice) mine.push_back({share(s[0], s[1]), share(s[2], s[3])});
    item += count;
    progress.advance(static_cast<double>(count));
  }
  comm::stop_if_requested(world, "while pricing choices of KV heads; nothing was written");
  const std::vector<Json> all = gathered(world, mine);
  for (std::int64_t l = 0; l < config.layers; ++l) {
    std::vector<std::array<double, 2>> layer;
    for (std::int64_t c = 0; c < per_layer; ++c) {
      const Json& one = all.at(ix(l * per_layer + c));
      layer.push_back({one[0].get<double>(), one[1].get<double>()});
    }
    layer.push_back({0.0, 0.0});
    table.loss.push_back(std::move(layer));
  }
  return table;
}

std::vector<std::array<double, 2>> exchange_rates(const comm::Communicator& world, const LossTable& table,
                                                  std::int64_t reference, const Probe& probe) {
  const auto found = std::find(table.heads.begin(), table.heads.end(), reference);
  if (found == table.heads.end())
    throw UsageError(fmt::format("exchange rates cannot be measured at {} KV heads: the choices are {}", reference,
                                 fmt::join(table.heads, ", ")));
  const auto choice = static_cast<std::size_t>(found - table.heads.begin());
  const auto layers = static_cast<std::int64_t>(table.loss.size());
  const auto [begin, end] = share_of(2 * layers, world.rank(), world.size());
  Progress progress("probes", "probe", static_cast<double>(end - begin), world.root());
  Json mine = Json::array();
  for (std::int64_t item = begin; item < end; ++item) {
    const std::int64_t layer = item / 2;
    const bool keys = item % 2 == 0;
    const double loss = table.loss[ix(layer)][choice][keys ? 0 : 1];
    double rate = 0;
    if (loss > 0) {
      const double divergence = probe(layer, keys ? Part::keys : Part::values);
      if (!std::isfinite(divergence))
        throw NumericalError(
            fmt::format("the probe of layer {}, {}, gave {}", layer, keys ? "keys" : "values", divergence));
      rate = std::max(0.0, divergence) / loss;
    }
    mine.push_back(rate);
    progress.advance(1);
  }
  const std::vector<Json> all = gathered(world, mine);
  std::vector<std::array<double, 2>> rates;
  for (std::int64_t l = 0; l < layers; ++l)
    rates.push_back({all.at(ix(2 * l)).get<double>(), all.at(ix(2 * l + 1)).get<double>()});
  return rates;
}

std::vector<LayerChoices> choices(const LossTable& table, const std::vector<std::array<double, 2>>& rates) {
  if (rates.size() != table.loss.size()) throw InternalError("exchange rates must name every layer once");
  std::vector<LayerChoices> layers;
  for (std::size_t l = 0; l < rates.size(); ++l) {
    LayerChoices layer;
    layer.heads = table.heads;
    for (const auto& [key, value] : table.loss[l]) layer.cost.push_back(rates[l][0] * key + rates[l][1] * value);
    layers.push_back(std::move(layer));
  }
  return layers;
}

std::vector<LayerTarget> targets_for(const std::vector<std::int64_t>& heads, const checkpoint::ModelConfig& config) {
  std::vector<LayerTarget> targets;
  targets.reserve(heads.size());
  for (const std::int64_t n : heads)
    targets.push_back({contiguous_groups(config.kv_heads, n), config.head_dim, config.head_dim});
  return targets;
}

std::vector<std::vector<std::array<double, 2>>> exchange_rates_by_choice(const comm::Communicator& world,
                                                                         const LossTable& table,
                                                                         const ChoiceProbe& probe) {
  std::vector<std::vector<std::array<double, 2>>> rates;
  rates.reserve(table.heads.size());
  for (const std::int64_t heads : table.heads) {
    if (heads == table.heads.back()) {  // loses nothing
      rates.emplace_back(table.loss.size(), std::array<double, 2>{0.0, 0.0});
      continue;
    }
    rates.push_back(
        exchange_rates(world, table, heads, [&](std::int64_t layer, Part part) { return probe(layer, part, heads); }));
  }
  return rates;
}

std::vector<LayerChoices> choices(const LossTable& table,
                                  const std::vector<std::vector<std::array<double, 2>>>& rates_by_choice) {
  if (rates_by_choice.size() != table.heads.size())
    throw InternalError(
        fmt::format("rates of {} choices for a table of {}", rates_by_choice.size(), table.heads.size()));
  std::vector<LayerChoices> layers(table.loss.size());
  for (std::size_t c = 0; c < rates_by_choice.size(); ++c) {
    const std::vector<LayerChoices> at_choice = choices(table, rates_by_choice[c]);
    for (std::size_t l = 0; l < layers.size(); ++l) {
      layers[l].heads.push_back(at_choice[l].heads[c]);
      layers[l].cost.push_back(at_choice[l].cost[c]);
    }
  }
  return layers;
}

namespace {

OrderedJson report_of(const LossTable& table, const std::vector<LayerChoices>& layers,
                      const std::vector<std::int64_t>& heads, Allocation allocation) {
  OrderedJson report;
  report["method"] = name_of(allocation);
  report["cost_is"] =
      "predicted KL: rate * relative loss, keys and values, summed over layers (docs/methods.md, Budget)";
  const std::int64_t sum = std::accumulate(heads.begin(), heads.end(), std::int64_t{0});
  report["kv_heads"] = heads;
  report["kv_heads_in_all"] = sum;
  report["predicted_kl"] = cost_of(layers, heads);
  const auto count = static_cast<std::int64_t>(layers.size());
  if (count > 0 && sum % count == 0 &&
      std::find(table.heads.begin(), table.heads.end(), sum / count) != table.heads.end())
    report["predicted_kl_uniform"] = cost_of(layers, std::vector<std::int64_t>(layers.size(), sum / count));
  report["choices"] = table.heads;
  return report;
}

}  // namespace

OrderedJson budget_report(const LossTable& table, const std::vector<std::array<double, 2>>& rates,
                          const std::vector<std::int64_t>& heads, Allocation allocation) {
  const std::vector<LayerChoices> layers = choices(table, rates);
  OrderedJson report = report_of(table, layers, heads, allocation);
  OrderedJson list = OrderedJson::array();
  for (std::size_t l = 0; l < layers.size(); ++l)
    list.push_back({{"layer", l},
                    {"kv_heads", heads[l]},
                    {"kl_per_key_loss", rates[l][0]},
                    {"kl_per_value_loss", rates[l][1]},
                    {"predicted_kl_by_choice", layers[l].cost}});
  report["layers"] = std::move(list);
  return report;
}

OrderedJson budget_report(const LossTable& table,
                          const std::vector<std::vector<std::array<double, 2>>>& rates_by_choice,
                          const std::vector<std::int64_t>& heads, Allocation allocation) {
  const std::vector<LayerChoices> layers = choices(table, rates_by_choice);
  OrderedJson report = report_of(table, layers, heads, allocation);
  OrderedJson list = OrderedJson::array();
  for (std::size_t l = 0; l < layers.size(); ++l) {
    // Rates at the number of heads that was chosen; of a layer left whole, at the number next to it.
    std::size_t chosen =
        static_cast<std::size_t>(std::find(table.heads.begin(), table.heads.end(), heads[l]) - table.heads.begin());
    if (chosen + 1 >= rates_by_choice.size() && rates_by_choice.size() > 1) chosen = rates_by_choice.size() - 2;
    list.push_back({{"layer", l},
                    {"kv_heads", heads[l]},
                    {"kl_per_key_loss", rates_by_choice[chosen][l][0]},
                    {"kl_per_value_loss", rates_by_choice[chosen][l][1]},
                    {"predicted_kl_by_choice", layers[l].cost}});
  }
  report["layers"] = std::move(list);
  return report;
}

void check_even_budget(const std::vector<std::int64_t>& heads) {
  if (heads.empty() || std::all_of(heads.begin(), heads.end(), [&](std::int64_t n) { return n == heads[0]; })) return;
  throw UsageError(
      fmt::format("a stock configuration knows one number of KV heads for all layers, this plan keeps {} per layer",
                  fmt::join(heads, ", ")),
      "use --budget uniform, or let convert write the DeciLM (Nemotron-NAS) form");
}

}  // namespace headfold::folding
