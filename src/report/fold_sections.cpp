#include <headfold/base/table.h>
#include <headfold/report/cells.h>
#include <headfold/report/figure.h>
#include <headfold/report/fold_sections.h>

#include <map>
#include <set>
#include <tuple>

namespace headfold::report {
namespace {

/// Below this, held-out and fitted loss differ as two draws of the same text do (convert warns from here, too).
constexpr double kGap = 1.1;
/// Losses below this are rounding.
constexpr double kNoLoss = 1e-6;

std::string kv_heads_words(const Conversion& conversion) {
  const std::string text = heads_text(conversion);
  return fmt::format("{} KV head{}", text, text == "1" ? "" : "s");
}

std::string plural(std::int64_t number, const std::string& word) {
  return fmt::format("{} {}{}", format_count(number), word, number == 1 ? "" : "s");
}

std::vector<const ModelRow*> conversions_of(const Section& section) {
  std::vector<const ModelRow*> rows;
  for (const ModelRow& row : section.models)
    if (row.conversion) rows.push_back(&row);
  return rows;
}

// Frequencies.

struct FrequencyMaps {
  const ModelRow* row;
  std::vector<std::string> names;  ///< conversions that share these maps
  std::vector<std::int64_t> layers;
  std::vector<std::vector<double>> leading, imaginary;
};

std::string frequency_map(const FrequencyMaps& maps, bool leading, const std::string& id) {
  static constexpr double kLeading[kShades - 1] = {0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9};
  static constexpr double kImaginary[kShades - 1] = {0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6};
  const double* edges = leading ? kLeading : kImaginary;
  HeatMap map;
  map.id = id;
  map.heading =
      fmt::format("{}, {}", leading ? "Leading share" : "Imaginary share", kv_heads_words(*maps.row->conversion));
  map.title = fmt::format("{} by layer and RoPE frequency, {}",
                          leading ? "Share of the leading eigenvalue" : "Imaginary share", maps.row->name);
  map.x_title = "RoPE frequency, fastest first";
  map.y_title = "layer";
  map.width = 480;
  map.key = leading ? std::vector<std::string>{"<30 %", "30 %", "40 %", "50 %", "60 %", "70 %", "80 %", "≥90 %"}
                    : std::vector<std::string>{"<5 %", "5 %", "10 %", "20 %", "30 %", "40 %", "50 %", "≥60 %"};
  std::size_t frequencies = 0;
  double sum = 0, least = HUGE_VAL, most = 0;
  std::size_t seen = 0;
  const auto& rows = leading ? maps.leading : maps.imaginary;
  for (std::size_t l = 0; l < rows.size(); ++l) {
    map.row_labels.push_back(fmt::format("{}", maps.layers[l]));
    std::vector<int> shades;
    for (const double value : rows[l]) {
      shades.push_back(static_cast<int>(std::upper_bound(edges, edges + kShades - 1, value) - edges));
      sum += value;
      least = std::min(least, value);
      most = std::max(most, value);
      ++seen;
    }
    frequencies = std::max(frequencies, shades.size());
    map.shades.push_back(std::move(shades));
  }
  if (seen > 0)
    map.description =
        fmt::format("{} layers, {} frequencies; from {} to {}, mean {}.", rows.size(), frequencies, format_share(least),
                    format_share(most), format_share(sum / static_cast<double>(seen)));
  const std::size_t step = std::max<std::size_t>(1, (frequencies + 7) / 8);
  for (std::size_t f = 0; f < frequencies; f += step)
    map.x_ticks.emplace_back((static_cast<double>(f) + 0.5) / static_cast<double>(frequencies), fmt::format("{}", f));
  return map.svg();
}

// Held-out losses.

struct HeldOut {
  std::vector<double> layers, fitted, held_out;
  Maybe worst;  ///< largest ratio
  std::int64_t worst_layer = 0;
};

HeldOut held_out_of(const Conversion& conversion, bool keys) {
  HeldOut result;
  // An average is not fitted to anything.
  if ((keys ? conversion.keys : conversion.values) == "meanpool") return result;
  for (const LayerFold& layer : conversion.layers) {
    const Maybe& fitted = keys ? layer.key_fitted : layer.value_fitted;
    const Maybe& held_out = keys ? layer.key_held_out : layer.value_held_out;
    if (!fitted || !held_out) continue;
    result.layers.push_back(static_cast<double>(layer.layer));
    result.fitted.push_back(*fitted);
    result.held_out.push_back(*held_out);
    if (*held_out <= kNoLoss) continue;
    const double ratio = *held_out / std::max(*fitted, kNoLoss);
    if (!result.worst || ratio > *result.worst) {
      result.worst = ratio;
      result.worst_layer = layer.layer;
    }
  }
  return result;
}

// Refit.

/// Held-out error of a matrix as it stands in the written model.
Maybe kept_error(const RefitPart& part) {
  return part.kept.value_or(false) ? part.held_out_after : part.held_out_before;
}

std::string error_text(const RefitPart& part, const Maybe& error) {
  return shown(error,
               [&](double value) { return part.divergence ? format_significant(value, 3) : loss_percent(value); });
}

std::string arrow(const std::string& before, const std::string& after) {
  return before + " → " + after;
}

Grid refit_grid(const ModelRow& row) {
  // The same matrix may be fitted several times in a layer: a column each.
  std::vector<std::pair<std::string, std::size_t>> columns;
  std::map<std::pair<std::string, std::size_t>, bool> divergence;
  const auto each = [](const RefitLayer& layer, auto visit) {
    std::map<std::string, std::size_t> uses;
    for (const RefitPart& part : layer.parts) visit(std::pair(part.part, ++uses[part.part]), part);
  };
  for (const RefitLayer& layer : row.conversion->refit->layers)
    each(layer, [&](const auto& key, const RefitPart& part) {
      if (std::find(columns.begin(), columns.end(), key) == columns.end()) columns.push_back(key);
      divergence[key] = divergence[key] || part.divergence;
    });
  Grid grid;
  grid.name = "Refit of every layer of " + row.name;
  grid.columns = {{"Layer", "", true}};
  for (const auto& key : columns)
    grid.columns.push_back({key.second > 1 ? fmt::format("{} ({})", key.first, key.second) : key.first,
                            divergence[key] ? "nats per row, held out" : "error, held out", true});
  grid.columns.push_back({"Residual stream", "error behind the layer", true});
  for (const RefitLayer& layer : row.conversion->refit->layers) {
    std::vector<Cell> cells(grid.columns.size(), Cell{kNone});
    cells.front().text = fmt::format("{}", layer.layer);
    each(layer, [&](const auto& key, const RefitPart& part) {
      const auto at = static_cast<std::size_t>(std::find(columns.begin(), columns.end(), key) - columns.begin());
      Cell& cell = cells[at + 1];
      cell.text = arrow(error_text(part, part.held_out_before), error_text(part, part.held_out_after));
      if (part.kept) cell.small = *part.kept ? "kept" : "not kept";
    });
    cells.back().text = shown(layer.stream_error, loss_percent);
    grid.rows.push_back(std::move(cells));
  }
  return grid;
}

/// Mean over layers before the first and after the last fit of one kind; nothing where a layer lacks it.
std::string refit_span(const Refit& refit, bool divergence) {
  std::vector<double> before, after;
  for (const RefitLayer& layer : refit.layers) {
    Maybe first, last;
    bool any = false;
    for (const RefitPart& part : layer.parts) {
      if (part.divergence != divergence) continue;
      if (!divergence && part.part == "down_proj") continue;
      if (!any) first = part.held_out_before;
      any = true;
      last = kept_error(part);
    }
    if (!first || !last) continue;
    before.push_back(*first);
    after.push_back(*last);
  }
  const auto text = [&](const Maybe& value) {
    return shown(value, [&](double v) { return divergence ? format_significant(v, 3) : loss_percent(v); });
  };
  return before.empty() ? std::string(kNone) : arrow(text(mean(before)), text(mean(after)));
}

// Budgets over layers.

double channels_of(const LayerFold& layer, bool keys) {
  return static_cast<double>(layer.kv_heads.value_or(0)) *
         static_cast<double>((keys ? layer.key_width : layer.value_width).value_or(0));
}

bool widths_differ(const Conversion& conversion) {
  return std::any_of(conversion.layers.begin(), conversion.layers.end(), [&](const LayerFold& layer) {
    return layer.key_width != conversion.layers.front().key_width ||
           layer.value_width != conversion.layers.front().value_width;
  });
}

/// A line of one step per layer.
Series steps(const std::vector<std::pair<double, double>>& values, const std::string& unit) {
  Series series;
  series.marker = Marker::none;
  for (const auto& [layer, value] : values) {
    series.points.push_back({layer - 0.5, value, {}});
    series.points.push_back({layer + 0.5, value, {}});
  }
  series.name = unit;
  return series;
}

std::string kept_chart(const ModelRow& row, const std::string& id) {
  const Conversion& conversion = *row.conversion;
  const bool widths = widths_differ(conversion);
  Chart chart;
  chart.id = id;
  chart.title = fmt::format("{} by layer, {}", widths ? "Channels cached" : "KV heads kept", row.name);
  chart.heading = fmt::format("{}, {}", widths ? "Channels cached" : "KV heads", row.name);
  chart.width = 480;
  chart.height = 210;
  std::vector<double> all;
  double first = HUGE_VAL, last = 0;
  for (const bool keys : {true, false}) {
    std::vector<std::pair<double, double>> values;
    for (const LayerFold& layer : conversion.layers) {
      const double value = widths ? channels_of(layer, keys) : static_cast<double>(layer.kv_heads.value_or(0));
      if (!(value > 0)) continue;
      values.emplace_back(static_cast<double>(layer.layer), value);
      all.push_back(value);
      first = std::min(first, values.back().first);
      last = std::max(last, values.back().first);
      if (keys) chart.description += fmt::format("Layer {}: {}. ", layer.layer, format_significant(value, 4));
    }
    Series series = steps(values, widths ? keys ? "keys" : "values" : "KV heads");
    if (widths) series.label = series.name;
    series.colour = keys ? row.series : -1;
    series.dashed = !keys;
    if (!series.points.empty()) chart.series.push_back(std::move(series));
    if (!widths) break;
  }
  if (all.empty()) return {};
  if (!widths) {
    Series uniform;
    uniform.name = "the same everywhere";
    uniform.label = "mean";
    uniform.colour = -1;
    uniform.dashed = true;
    uniform.marker = Marker::none;
    const auto average = static_cast<double>(conversion.kv_heads_after);
    uniform.points = {{first - 0.5, average, {}}, {last + 0.5, average, {}}};
    all.push_back(average);
    chart.series.push_back(std::move(uniform));
  }
  chart.y = make_axis(all, widths ? "channels" : "KV heads", "", false, true, 5);
  chart.x = layer_axis(first, last, 16);
  return chart.svg();
}

std::string rates_chart(const ModelRow& row, const std::string& id) {
  Chart chart;
  chart.id = id;
  chart.title = "KL per relative loss by layer, " + row.name;
  chart.heading = "Exchange rates, " + row.name;
  chart.width = 480;
  chart.height = 210;
  std::vector<double> all;
  double first = HUGE_VAL, last = 0;
  for (const bool keys : {true, false}) {
    Series series;
    series.name = series.label = keys ? "keys" : "values";
    series.colour = keys ? row.series : -1;
    series.marker = keys ? Marker::filled : Marker::hollow;
    series.marker_size = 3.6;
    for (const BudgetLayer& layer : row.conversion->decisions.budget) {
      const Maybe& rate = keys ? layer.key_rate : layer.value_rate;
      if (!rate) continue;
      const auto x = static_cast<double>(layer.layer);
      series.points.push_back(
          {x, *rate, fmt::format("layer {}, {}: {}", layer.layer, series.name, format_significant(*rate, 3))});
      all.push_back(*rate);
      first = std::min(first, x);
      last = std::max(last, x);
      chart.description += series.points.back().hint + ". ";
    }
    if (!series.points.empty()) chart.series.push_back(std::move(series));
  }
  if (all.empty()) return {};
  const double least = *std::min_element(all.begin(), all.end()), most = *std::max_element(all.begin(), all.end());
  const bool log = least > 0 && most / least > 30;
  chart.y = make_axis(all, log ? "KL per loss (log scale)" : "KL per loss", "", log, true, 5);
  chart.x = layer_axis(first, last, 16);
  return chart.svg();
}

Grid budget_grid(const ModelRow& row) {
  Grid grid;
  grid.name = "What every layer of " + row.name + " keeps";
  grid.columns = {{"Layer", "", true},
                  {"KV heads", "or latents", true},
                  {"Key channels", "of each", true},
                  {"Value channels", "of each", true}};
  const auto& rates = row.conversion->decisions.budget;
  if (!rates.empty()) {
    grid.columns.push_back({"KL per key loss", "measured", true});
    grid.columns.push_back({"KL per value loss", "measured", true});
  }
  for (const LayerFold& layer : row.conversion->layers) {
    std::vector<Cell> cells = {{fmt::format("{}", layer.layer)},
                               {count(layer.kv_heads)},
                               {count(layer.key_width)},
                               {count(layer.value_width)}};
    if (!rates.empty()) {
      const auto found =
          std::find_if(rates.begin(), rates.end(), [&](const BudgetLayer& one) { return one.layer == layer.layer; });
      const auto text = [](double value) { return format_significant(value, 3); };
      cells.push_back({found == rates.end() ? std::string(kNone) : shown(found->key_rate, text)});
      cells.push_back({found == rates.end() ? std::string(kNone) : shown(found->value_rate, text)});
    }
    grid.rows.push_back(std::move(cells));
  }
  return grid;
}

// Trainings.

/// At most `most` points: means over stretches of equal length.
std::vector<std::pair<double, double>> thinned(const std::vector<std::pair<double, double>>& points, std::size_t most) {
  const std::size_t stretch = (points.size() + most - 1) / most;
  if (stretch < 2) return points;
  std::vector<std::pair<double, double>> means;
  for (std::size_t begin = 0; begin < points.size(); begin += stretch) {
    const std::size_t end = std::min(points.size(), begin + stretch);
    double x = 0, y = 0;
    for (std::size_t i = begin; i < end; ++i) {
      x += points[i].first;
      y += points[i].second;
    }
    means.emplace_back(x / static_cast<double>(end - begin), y / static_cast<double>(end - begin));
  }
  return means;
}

std::string training_chart(const Section& section, bool validation, const std::string& id) {
  Chart chart;
  chart.id = id;
  chart.heading = validation ? "Perplexity on the validation text" : "Loss on the training text";
  chart.title = chart.heading + " by step, " + section.name;
  chart.width = 440;
  std::vector<double> steps = {0}, values;
  for (std::size_t t = 0; t < section.trainings.size(); ++t) {
    const Training& training = section.trainings[t];
    const auto points = validation ? training.validations : thinned(training.losses, 60);
    if (points.empty()) continue;
    Series series;
    series.name = last_part(training.folder);
    series.colour = static_cast<int>(t) % kSeriesColours;
    series.marker = validation ? Marker::filled : Marker::none;
    for (const auto& [step, value] : points) {
      series.points.push_back(
          {step, value, fmt::format("{}: step {:.0f}, {}", series.name, step, format_significant(value, 4))});
      steps.push_back(step);
      values.push_back(value);
    }
    chart.description += fmt::format("{}: from {} to {}. ", series.name, format_significant(points.front().second, 4),
                                     format_significant(points.back().second, 4));
    chart.series.push_back(std::move(series));
  }
  if (chart.series.empty()) return {};
  chart.x = make_axis(steps, "step", "", false, true);
  chart.y = make_axis(values, validation ? "perplexity" : "nats per token", "", false, false);
  return chart.svg();
}

}  // namespace

void frequency_maps(Document& document, const Section& section, const NewId& id) {
  std::vector<FrequencyMaps> all;
  for (const ModelRow* row : conversions_of(section)) {
    FrequencyMaps maps{row, {row->name}, {}, {}, {}};
    bool any = false;
    for (const LayerFold& layer : row->conversion->layers) {
      any = any || !layer.leading_share.empty() || !layer.imaginary_share.empty();
      maps.layers.push_back(layer.layer);
      maps.leading.push_back(layer.leading_share);
      maps.imaginary.push_back(layer.imaginary_share);
    }
    if (!any) continue;
    const auto same = std::find_if(all.begin(), all.end(), [&](const FrequencyMaps& other) {
      return other.layers == maps.layers && other.leading == maps.leading && other.imaginary == maps.imaginary;
    });
    if (same != all.end())
      same->names.push_back(row->name);
    else
      all.push_back(std::move(maps));
  }
  if (all.empty()) return;
  document.heading(3, "RoPE frequencies");
  document.paragraph(
      "rope-commuting gives every group one complex number per head and rotary frequency. The leading share is the "
      "part "
      "of a frequency's energy that this keeps: at 100 % nothing is lost there, at one divided by the number of heads "
      "in "
      "a group the heads have nothing in common. The imaginary share says how far the heads are turned against each "
      "other: near 0 an average with real weights would do as well; the higher it is, the more the complex numbers "
      "save.",
      "say");
  for (const FrequencyMaps& maps : all) {
    std::vector<std::string> drawn;
    for (const bool leading : {true, false}) {
      const auto& rows = leading ? maps.leading : maps.imaginary;
      if (std::any_of(rows.begin(), rows.end(), [](const auto& row) { return !row.empty(); }))
        drawn.push_back(frequency_map(maps, leading, id("frequencies")));
    }
    Words caption;
    caption.strong(joined(maps.names, ", ") + ".");
    caption.add(
        " Each row is a layer, each column a frequency, averaged over groups; darker (in dark mode: lighter) is more. "
        "Where the leading share is low, this fold loses keys.");
    const std::string& band = maps.row->conversion->extras.slow_band;
    if (!band.empty())
      caption.add(
          fmt::format(" With its {}, the slowest frequencies are folded together without rotation, whatever "
                      "they show here.",
                      band));
    document.figure(drawn, "panels wide", caption);
  }
}

void held_out_losses(Document& document, const Section& section, const NewId& id) {
  struct Panel {
    std::string title;
    std::string heads;
    HeldOut loss;
  };
  struct Worst {
    double ratio = 0;
    std::string where;
  };
  Worst worst;
  Grid summary;
  summary.name = "Held-out loss of every conversion of " + section.name;
  summary.columns = {{"Model", "", false},           {"Keys", "fitted half", true},   {"Keys", "held-out half", true},
                     {"Keys", "worst layer", true},  {"Values", "fitted half", true}, {"Values", "held-out half", true},
                     {"Values", "worst layer", true}};
  std::map<bool, std::vector<Panel>> panels;
  for (const ModelRow* row : conversions_of(section)) {
    const Conversion& conversion = *row->conversion;
    std::vector<Cell> cells = {name_cell(*row)};
    bool any = false;
    for (const bool keys : {true, false}) {
      const HeldOut loss = held_out_of(conversion, keys);
      cells.push_back({shown(mean(loss.fitted), loss_percent)});
      cells.push_back({shown(mean(loss.held_out), loss_percent)});
      Cell cell{shown(loss.worst, [](double ratio) { return format_change(ratio); })};
      if (loss.worst) cell.small = fmt::format("layer {}", loss.worst_layer);
      cells.push_back(std::move(cell));
      if (loss.layers.empty()) continue;
      any = true;
      if (loss.worst && *loss.worst > worst.ratio)
        worst = {*loss.worst,
                 fmt::format("{} of layer {} of {}", keys ? "keys" : "values", loss.worst_layer, row->name)};
      Panel panel{keys ? conversion.keys : conversion.values, kv_heads_words(conversion), loss};
      auto& list = panels[keys];
      if (std::none_of(list.begin(), list.end(), [&](const Panel& other) {
            return other.title == panel.title && other.heads == panel.heads && other.loss.fitted == loss.fitted &&
                   other.loss.held_out == loss.held_out;
          }))
        list.push_back(std::move(panel));
    }
    if (any) summary.rows.push_back(std::move(cells));
  }
  if (summary.rows.empty()) return;
  document.heading(3, "Held-out against fitted loss");
  Words words(
      "Bases were also fitted to one half of the calibration sequences and priced on the other half, which they had "
      "not "
      "seen. ");
  if (worst.ratio > kGap)
    words.strong("More calibration tokens would matter:")
        .add(
            fmt::format(" on the other half the loss differs by up to {} ({}), more than another draw of the same text "
                        "would explain.",
                        format_change(worst.ratio), worst.where));
  else
    words.strong("More calibration tokens would hardly matter:")
        .add(worst.ratio > 0 ? fmt::format(" at worst the loss on the other half differs by {} ({}).",
                                           format_change(worst.ratio), worst.where)
                             : std::string(" nothing is lost on the other half."));
  document.paragraph(words, "say");
  document.table(summary);
  for (const bool keys : {true, false}) {
    std::vector<std::string> drawn;
    for (const Panel& panel : panels[keys]) {
      const HeldOut& loss = panel.loss;
      Chart chart;
      chart.id = id("heldout");
      chart.heading = fmt::format("{}, {}", panel.title, panel.heads);
      chart.title =
          fmt::format("Fitted and held-out loss of the {} per layer, {}", keys ? "keys" : "values", chart.heading);
      chart.description = fmt::format("{} layers.", loss.layers.size());
      const double first = loss.layers.front(), last = loss.layers.back();
      const bool many = last - first > 16;
      chart.width = many ? 480 : 250;
      chart.height = many ? 220 : 200;
      chart.x = layer_axis(first, last, many ? 12 : 8);
      Series fitted, held_out;
      fitted.name = "fitted half";
      held_out.name = "held-out half";
      fitted.colour = held_out.colour = -1;  // conversions of several folds may share a panel
      fitted.line = held_out.line = false;
      fitted.marker = Marker::hollow;
      held_out.marker_size = 3.2;
      std::vector<double> values;
      for (std::size_t i = 0; i < loss.layers.size(); ++i) {
        const auto point = [&](double value, const std::string& what) {
          values.push_back(value * 100);
          return Point{loss.layers[i], value * 100,
                       fmt::format("layer {:.0f}, {}: {}", loss.layers[i], what, loss_percent(value))};
        };
        fitted.points.push_back(point(loss.fitted[i], fitted.name));
        held_out.points.push_back(point(loss.held_out[i], held_out.name));
        chart.stems.push_back({fitted.points.back(), held_out.points.back()});
      }
      chart.stem_colour = -1;
      chart.y = make_axis(values, "loss", "%", false, true, 5);
      chart.series = {fitted, held_out};
      drawn.push_back(chart.svg());
    }
    if (drawn.empty()) continue;
    Words caption;
    caption.strong(keys ? "Keys." : "Values.");
    caption.add(
        " Predicted loss by layer, % of energy. Hollow markers: on the half that the basis was fitted to; filled: on "
        "the "
        "other half. The longer the stem between them, the more this layer would gain from more tokens.");
    document.figure(drawn, "panels", caption);
  }
}

void refit_tables(Document& document, const Section& section, const NewId& id) {
  std::vector<const ModelRow*> rows;
  for (const ModelRow* row : conversions_of(section))
    if (row->conversion->refit) rows.push_back(row);
  if (rows.empty()) return;
  document.heading(3, "Refit");
  document.paragraph(
      "After the fold, projections were fitted again in closed form, layer by layer, to what the folded model itself "
      "feeds them and what the original model made of the same text. Each fit was kept only where it also lowered the "
      "error on sequences that it had not seen. Errors of queries and keys: divergence of attention rows from the "
      "original's, in nats; of outputs: share of the target's energy.",
      "say");
  Grid summary;
  summary.name = "Refit of the conversions of " + section.name;
  summary.columns = {{"Model", "", false},
                     {"Text", "sequences × tokens", true},
                     {"Fits kept", "", true},
                     {"Attention rows", "nats, held out", true},
                     {"Attention output", "error, held out", true},
                     {"Residual stream", "error at the end", true}};
  Chart chart;
  std::vector<double> errors, layers;
  for (const ModelRow* row : rows) {
    const Refit& refit = *row->conversion->refit;
    std::int64_t kept = 0, fits = 0;
    Series series;
    series.name = row->name;
    series.label = heads_text(*row->conversion) + " KV";
    series.colour = row->series;
    series.marker_size = 3.6;
    for (const RefitLayer& layer : refit.layers) {
      for (const RefitPart& part : layer.parts) {
        ++fits;
        kept += part.kept.value_or(false) ? 1 : 0;
      }
      if (!layer.stream_error) continue;
      layers.push_back(static_cast<double>(layer.layer));
      errors.push_back(*layer.stream_error * 100);
      series.points.push_back(
          {layers.back(), errors.back(),
           fmt::format("{}, layer {}: {}", row->name, layer.layer, loss_percent(*layer.stream_error))});
    }
    summary.rows.push_back(
        {name_cell(*row),
         {refit.sequences && refit.tokens
              ? fmt::format("{} × {}", format_count(*refit.sequences), format_count(*refit.tokens))
              : std::string(kNone)},
         {fits > 0 ? fmt::format("{} of {}", kept, fits) : std::string(kNone)},
         {refit_span(refit, true)},
         {refit_span(refit, false)},
         {refit.layers.empty() ? std::string(kNone) : shown(refit.layers.back().stream_error, loss_percent)}});
    if (!series.points.empty()) chart.series.push_back(std::move(series));
  }
  document.table(summary);
  if (layers.size() > 1) {
    chart.id = id("refit");
    chart.title = "Residual stream error behind every layer after the refit, " + section.name;
    chart.description = fmt::format("{} conversions.", chart.series.size());
    chart.width = 440;
    chart.height = 230;
    chart.x = layer_axis(*std::min_element(layers.begin(), layers.end()),
                         *std::max_element(layers.begin(), layers.end()), 12);
    chart.y = make_axis(errors, "error of the residual stream", "%", false, true, 5);
    Words caption;
    caption.strong("What is left behind each layer.");
    caption.add(
        " Difference between the refitted model's residual stream and the original's, % of its energy, over the "
        "refit's "
        "text.");
    document.figure({chart.svg()}, "big", caption);
  }
  for (const ModelRow* row : rows)
    if (!row->conversion->refit->layers.empty())
      document.folded("Refit of every layer of " + row->name, refit_grid(*row));
}

void layer_budgets(Document& document, const Section& section, const NewId& id) {
  std::vector<const ModelRow*> rows;
  for (const ModelRow* row : conversions_of(section))
    if (row->conversion->uneven() || !row->conversion->decisions.budget.empty()) rows.push_back(row);
  if (rows.empty()) return;
  document.heading(3, "What each layer keeps");
  document.paragraph(
      "These conversions spend their budget unevenly: layers where folding costs more keep more. Exchange rates say "
      "how "
      "many nats per token of KL divergence the model pays for one unit of relative loss in a layer's keys or values, "
      "measured by folding that layer alone.",
      "say");
  for (const ModelRow* row : rows) {
    const Decisions& decisions = row->conversion->decisions;
    std::vector<std::string> drawn = {kept_chart(*row, id("kept")), rates_chart(*row, id("rates"))};
    std::erase_if(drawn, [](const std::string& svg) { return svg.empty(); });
    Words caption;
    caption.strong(row->name + ".");
    caption.add(widths_differ(*row->conversion)
                    ? " Channels that each layer caches per token, keys and values."
                    : " KV heads that each layer keeps; dashed: the same budget spread evenly.");
    if (decisions.predicted_kl)
      caption.add(fmt::format(" Predicted KL {} nats per token", format_significant(*decisions.predicted_kl, 3)));
    if (decisions.predicted_kl && decisions.predicted_kl_uniform)
      caption.add(fmt::format(", {} with the same number of KV heads everywhere",
                              format_significant(*decisions.predicted_kl_uniform, 3)));
    if (decisions.predicted_kl) caption.add(".");
    if (!drawn.empty()) document.figure(drawn, "panels wide", caption);
    document.folded("What every layer of " + row->name + " keeps", budget_grid(*row));
  }
}

void trainings(Document& document, const Section& section, const NewId& id) {
  if (section.trainings.empty()) return;
  document.heading(3, "Healing");
  Grid grid;
  grid.name = "Trainings of models folded from " + section.name;
  grid.columns = {{"Training", "of", false, true},
                  {"Trains", "teacher", false},
                  {"Steps", "kept", true},
                  {"Tokens", "", true},
                  {"Perplexity before", "after", true},
                  {"Change", "", true},
                  {"KL before", "after", true},
                  {"Tokens/s", "", true},
                  {"Time", "", true}};
  for (const Training& training : section.trainings) {
    std::vector<Cell> cells(grid.columns.size(), Cell{kNone});
    cells[0].text = last_part(training.folder.empty() ? training.model : training.folder);
    cells[0].small = training.model + (training.finished ? "" : "; not finished");
    cells[1].text = training.full    ? "all weights"
                    : training.width ? fmt::format("adapters of {}", *training.width)
                                     : "adapters";
    cells[1].small = training.teacher.empty() || training.distill.value_or(0) == 0
                         ? std::string("text alone")
                         : fmt::format("{}, weight {}", training.teacher, format_significant(*training.distill, 2));
    cells[2].text = count(training.steps);
    if (training.chosen_step) cells[2].small = format_count(*training.chosen_step);
    cells[3].text = count(training.tokens);
    cells[4].text = shown(training.perplexity_before, format_perplexity);
    cells[4].small = shown(training.perplexity_best, format_perplexity);
    if (training.perplexity_before && training.perplexity_best && *training.perplexity_before > 0)
      cells[5].text = format_change(*training.perplexity_best / *training.perplexity_before);
    cells[6].text = shown(training.kl_before, [&](double v) {
      return format_significant(v, 3) + (training.kl_top ? fmt::format(" (top {})", *training.kl_top) : std::string());
    });
    cells[6].small = shown(training.kl_last, [](double v) { return format_significant(v, 3); });
    cells[7].text = shown(training.tokens_per_second, [](double v) { return fmt::format("{:.0f}", v); });
    cells[8].text = seconds_text(training.record.seconds);
    grid.rows.push_back(std::move(cells));
  }
  document.table(grid);
  document.paragraph(
      "Perplexity and KL on the validation text of each training, which chose the step that was kept; compare models "
      "by "
      "the quality table, on text that chose nothing.",
      "note");
  std::vector<std::string> charts;
  for (const bool validation : {true, false})
    if (std::string svg = training_chart(section, validation, id("training")); !svg.empty())
      charts.push_back(std::move(svg));
  if (charts.empty()) return;
  Words caption;
  caption.strong("Healing, step by step.");
  caption.add(
      " Left, where there is a validation text: its perplexity. Otherwise the loss on the training text, averaged over "
      "stretches of steps.");
  document.figure(charts, "panels", caption);
}

void compared_plans(Document& document, const Section& section) {
  if (section.comparisons.empty()) return;
  document.heading(3, "Plans compared");
  document.paragraph(
      "headfold convert --compare folds in memory, scores each plan on a few held-out windows and writes no model. "
      "Best "
      "first, by KL divergence from the original. The windows are few: the order counts more than the figures, which "
      "are "
      "not those of the quality table.",
      "say");
  for (const Comparison& comparison : section.comparisons) {
    Grid grid;
    grid.name = fmt::format("Plans compared in {}", comparison.file);
    grid.columns = {{"#", "", true},
                    {"Plan", "", false, true},
                    {"KV heads", "", true},
                    {"Checkpoint", "", false},
                    {"KV bytes/token", "of original", true},
                    {"Key loss", "predicted", true},
                    {"Value loss", "predicted", true},
                    {"KL", "nats/token", true},
                    {"Perplexity", "", true},
                    {"Ratio", "to original", true},
                    {"Top-1", "agreement", true},
                    {"Time", "", true}};
    std::map<std::int64_t, double> best;
    for (const ComparedPlan& plan : comparison.plans)
      if (plan.kl && plan.kv_heads) best.try_emplace(*plan.kv_heads, *plan.kl);
    std::size_t place = 0;
    for (const ComparedPlan& plan : comparison.plans) {
      std::vector<Cell> cells(grid.columns.size(), Cell{kNone});
      const bool placed = plan.kl || plan.perplexity;
      if (placed) cells[0].text = fmt::format("{}", ++place);
      cells[1].text = plan.name;
      cells[1].small =
          plan.error.empty() ? plan.fold == plan.name ? std::string() : plan.fold : "failed: " + plan.error;
      if (!plan.kv_heads_text.empty()) cells[2].text = plan.kv_heads_text;
      if (plan.stock) {
        cells[3].text = *plan.stock ? "stock" : "headfold only";
        cells[3].pill = *plan.stock ? 1 : 0;
      }
      if (plan.cache_bytes) cells[4].text = bytes_text(*plan.cache_bytes);
      if (plan.cache_bytes && section.cache_bytes && *section.cache_bytes > 0)
        cells[4].small =
            format_share(static_cast<double>(*plan.cache_bytes) / static_cast<double>(*section.cache_bytes));
      cells[5].text = shown(plan.key_loss, loss_percent);
      cells[6].text = shown(plan.value_loss, loss_percent);
      cells[7].text = shown(plan.kl, [](double v) { return format_significant(v, 3); });
      cells[7].best = plan.kl && plan.kv_heads && *plan.kl == best[*plan.kv_heads];
      cells[8].text = shown(plan.perplexity, format_perplexity);
      if (plan.perplexity && comparison.original_perplexity && *comparison.original_perplexity > 0)
        cells[9].text = format_ratio(*plan.perplexity / *comparison.original_perplexity);
      cells[10].text = shown(plan.top1, [](double v) { return fmt::format("{:.1f}{}%", v * 100, kNbsp); });
      cells[11].text = seconds_text(plan.seconds);
      grid.rows.push_back(std::move(cells));
    }
    document.table(grid);
    std::vector<std::string> note;
    if (comparison.windows)
      note.push_back(plural(*comparison.windows, "window") +
                     (comparison.tokens ? fmt::format(" of {} tokens", format_count(*comparison.tokens)) : ""));
    if (comparison.original_perplexity)
      note.push_back("the original's perplexity on them is " + format_perplexity(*comparison.original_perplexity));
    note.push_back("from " + comparison.file);
    document.paragraph("Bold: the lowest KL at that number of KV heads. " + joined(note, "; ") + ".", "note");
  }
}

std::string refit_csv(const RunData& run) {
  Table table({"base_model", "model", "layer", "step", "part", "quantity", "error_before", "error_after",
               "held_out_before", "held_out_after", "kept", "stream_error"});
  for (const Section& section : run.sections)
    for (const ModelRow* row : conversions_of(section)) {
      if (!row->conversion->refit) continue;
      for (const RefitLayer& layer : row->conversion->refit->layers) {
        std::int64_t step = 0;
        for (const RefitPart& part : layer.parts)
          table.add({section.name, row->name, fmt::format("{}", layer.layer), fmt::format("{}", ++step), part.part,
                     part.divergence ? "divergence" : "relative squared error", raw(part.error_before),
                     raw(part.error_after), raw(part.held_out_before), raw(part.held_out_after),
                     part.kept ? *part.kept ? "true" : "false" : "", raw(layer.stream_error)});
      }
    }
  return table.csv();
}

std::string compare_csv(const RunData& run) {
  Table table({"base_model", "file", "place", "plan", "fold", "kv_heads", "cache_bytes_per_token", "key_loss_predicted",
               "value_loss_predicted", "kl_nats_per_token", "perplexity", "perplexity_original", "top1_agreement",
               "seconds", "error"});
  for (const Section& section : run.sections)
    for (const Comparison& comparison : section.comparisons) {
      std::int64_t place = 0;
      for (const ComparedPlan& plan : comparison.plans)
        table.add({section.name, comparison.file, plan.kl || plan.perplexity ? fmt::format("{}", ++place) : "",
                   plan.name, plan.fold, raw(plan.kv_heads), raw(plan.cache_bytes), raw(plan.key_loss),
                   raw(plan.value_loss), raw(plan.kl), raw(plan.perplexity), raw(comparison.original_perplexity),
                   raw(plan.top1), raw(plan.seconds), plan.error});
    }
  return table.csv();
}

}  // namespace headfold::report
