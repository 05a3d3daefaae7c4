#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/base/log.h>
#include <headfold/base/table.h>
#include <headfold/report/benchmarks.h>
#include <headfold/report/cells.h>
#include <headfold/report/document.h>
#include <headfold/report/figure.h>
#include <headfold/report/fold_sections.h>
#include <headfold/report/page.h>
#include <headfold/report/style.h>
#include <headfold/report/text.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <tuple>

namespace headfold::report {
namespace {

constexpr const char* kMarkdownMark = "<!-- headfold report -->";
constexpr const char* kHtmlMark = "<meta name=\"generator\" content=\"headfold report\">";
/// Above this many layers one curve each is a tangle; a heat map shows them.
constexpr std::size_t kMostCurves = 12;

/// "7.85 M" for parameters.
std::string short_count(std::int64_t value) {
  const auto number = static_cast<double>(value);
  if (number >= 1e9) return format_significant(number / 1e9, 3) + kNbsp + "B";
  if (number >= 1e6) return format_significant(number / 1e6, 3) + kNbsp + "M";
  return format_count(value);
}

std::string short_hash(const std::string& hash) {
  return hash.empty() ? std::string(kNone) : hash.size() > 16 ? hash.substr(0, 16) + "…" : hash;
}

/// Predicted and measured loss of one side (keys or values), by layer.
struct SideLoss {
  std::vector<double> layers, predicted, measured;  ///< pairs: layers where both are known
  std::vector<Point> all_predicted, all_measured;
};

/// A layer as planned and as verified; `check` says how far the plan held.
struct Layer {
  LayerFold fold;
  LayerCheck check;  ///< its predictions are the verification's own where that has them, else the plan's
};

std::vector<Layer> layers_of(const Conversion& conversion) {
  std::map<std::int64_t, Layer> by_number;
  for (const LayerFold& fold : conversion.layers) {
    Layer& layer = by_number[fold.layer];
    layer.fold = fold;
    layer.check.key_predicted = fold.key_loss;
    layer.check.value_predicted = fold.value_loss;
  }
  if (conversion.verification) {
    for (const LayerCheck& check : conversion.verification->layers) {
      LayerCheck& merged = by_number[check.layer].check;
      if (check.key_predicted) merged.key_predicted = check.key_predicted;
      if (check.value_predicted) merged.value_predicted = check.value_predicted;
      merged.key_measured = check.key_measured;
      merged.value_measured = check.value_measured;
      merged.score_error = check.score_error;
      merged.output_error = check.output_error;
    }
  }
  std::vector<Layer> layers;
  for (auto& [number, layer] : by_number) {
    layer.fold.layer = layer.check.layer = number;
    layers.push_back(std::move(layer));
  }
  return layers;
}

/// Whether a row has losses of its own: those of a healed model are its fold's, which has its own row.
bool has_losses(const ModelRow& row) {
  return row.conversion && (!row.conversion->extras.healed || row.conversion->verification);
}

SideLoss losses_of(const Conversion& conversion, bool keys) {
  SideLoss loss;
  for (const Layer& layer : layers_of(conversion)) {
    const Maybe& predicted = keys ? layer.check.key_predicted : layer.check.value_predicted;
    const Maybe& measured = keys ? layer.check.key_measured : layer.check.value_measured;
    const auto x = static_cast<double>(layer.fold.layer);
    const auto point = [&](const Maybe& value, const char* what) {
      return Point{x, *value * 100, fmt::format("layer {}, {}: {}", layer.fold.layer, what, loss_percent(*value))};
    };
    if (predicted) loss.all_predicted.push_back(point(predicted, "predicted"));
    if (measured) loss.all_measured.push_back(point(measured, "measured"));
    if (!predicted || !measured) continue;
    loss.layers.push_back(x);
    loss.predicted.push_back(*predicted);
    loss.measured.push_back(*measured);
  }
  return loss;
}

/// What the verification says about the order of layers; empty where there is none.
std::optional<PairOrder> order_of(const Conversion& conversion, bool keys) {
  if (!conversion.verification) return std::nullopt;
  return keys ? conversion.verification->key_order : conversion.verification->value_order;
}

std::vector<double> values_of(const std::vector<Point>& points) {
  std::vector<double> values;
  values.reserve(points.size());
  for (const Point& point : points) values.push_back(point.y);
  return values;
}

/// Best conversion per KV share, stock or not. "Best": lowest perplexity ratio.
const ModelRow* best_at(const Section& section, double share, bool stock) {
  const ModelRow* best = nullptr;
  for (const ModelRow& row : section.models)
    if (row.conversion && row.ratio && row.share && std::abs(*row.share - share) < 1e-9 &&
        row.conversion->stock == stock && (best == nullptr || *row.ratio < *best->ratio))
      best = &row;
  return best;
}

std::string cost(double ratio) {
  if (ratio > 2) return format_significant(ratio, 3) + " times the perplexity";
  return format_change(ratio) + " perplexity";
}

std::string of_cache(double share) {
  const std::string words = words_for_share(share);
  return words == "half" ? "half the KV cache" : words + " of the KV cache";
}

std::vector<double> folded_shares(const Section& section) {
  std::vector<double> shares;
  for (const ModelRow& row : section.models)
    if (row.conversion && row.ratio && row.share &&
        std::none_of(shares.begin(), shares.end(), [&](double s) { return std::abs(s - *row.share) < 1e-9; }))
      shares.push_back(*row.share);
  std::sort(shares.rbegin(), shares.rend());
  return shares;
}

Words headline_words(const Section& section) {
  Words words;
  std::vector<std::int64_t> sizes;
  std::size_t conversions = 0;
  for (const ModelRow& row : section.models) {
    if (!row.conversion) continue;
    ++conversions;
    if (std::find(sizes.begin(), sizes.end(), row.conversion->kv_heads_after) == sizes.end())
      sizes.push_back(row.conversion->kv_heads_after);
  }
  if (conversions == 0) {
    const bool evaluated = std::any_of(section.models.begin(), section.models.end(),
                                       [](const ModelRow& row) { return row.evaluation.has_value(); });
    words.add(section.name).add(": nothing has been folded yet");
    if (!section.calibrations.empty() && section.calibrations[0].tokens)
      words.add(fmt::format("; calibrated on {} tokens", format_count(*section.calibrations[0].tokens)));
    if (evaluated) words.add("; evaluated");
    return words.add(".");
  }
  struct Best {
    double share;
    const ModelRow *stock, *own;
  };
  std::vector<Best> bests;
  for (const double share : folded_shares(section))
    bests.push_back({share, best_at(section, share, true), best_at(section, share, false)});
  if (bests.empty()) {
    std::string heads;
    for (std::size_t i = 0; i < sizes.size(); ++i)
      heads += (i == 0 ? "" : i + 1 == sizes.size() ? " and " : ", ") + fmt::format("{}", sizes[i]);
    return words.add(fmt::format(
        "{}: {} conversion{} to {} KV head{}, none with a perplexity to compare with the original's yet.", section.name,
        conversions, conversions == 1 ? "" : "s", heads, sizes.size() == 1 && sizes[0] == 1 ? "" : "s"));
  }
  words.add(section.name).add(": ");
  bool stock = false, own = false;
  std::string named;
  // Names the fold where it is another than the one named last.
  const auto by_fold = [&](const ModelRow& row) {
    if (row.fold == named) return std::string();
    named = row.fold;
    return fmt::format(" ({})", named);
  };
  for (const Best& best : bests) {
    if (best.stock == nullptr) continue;
    const double ratio = *best.stock->ratio;
    if (stock) {
      words.add(fmt::format("; {} costs {}", words_for_share(best.share), cost(ratio)));
    } else {
      words.strong(fmt::format("{} costs {} as a stock checkpoint", of_cache(best.share), cost(ratio)));
    }
    words.add(by_fold(*best.stock));
    stock = true;
  }
  if (stock) words.add(".");
  for (const Best& best : bests) {
    if (best.own == nullptr || (best.stock != nullptr && *best.own->ratio >= *best.stock->ratio)) continue;
    const double ratio = *best.own->ratio;
    if (own) {
      words.add(fmt::format("; {} costs {}", words_for_share(best.share), cost(ratio)));
    } else {
      words.add(stock ? " In headfold's own runtime, which stock engines do not have, " : "in headfold's own runtime ");
      words.strong(fmt::format("{} costs {}", of_cache(best.share), cost(ratio)));
    }
    words.add(by_fold(*best.own));
    own = true;
  }
  if (own) words.add(".");
  return words;
}

class Builder {
 public:
  Builder(const RunData& run, const std::string& title)
      : run_(run), title_(title.empty() ? "headfold report: " + run.name : title) {}

  Page build() {
    opening();
    for (std::size_t s = 0; s < run_.sections.size(); ++s) section(run_.sections[s], fmt::format("m{}", s + 1));
    reproduce();
    glossary();
    files();
    Page page;
    page.html = fmt::format(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" "
        "content=\"width=device-width, initial-scale=1\">\n"
        "<meta name=\"color-scheme\" content=\"light dark\">\n{}\n"
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        "<title>{}</title>\n<style>{}</style>\n</head>\n<body>\n<main>\n{}</main>\n</body>\n</html>\n",
        kHtmlMark, escape_markup(title_), kStyle, document_.html());
    page.markdown = std::string(kMarkdownMark) + "\n" + document_.markdown();
    page.quality_csv = quality_csv();
    page.layers_csv = layers_csv();
    page.timing_csv = timing_csv();
    page.refit_csv = refit_csv(run_);
    page.compare_csv = compare_csv(run_);
    page.benchmarks_csv = benchmarks_csv(run_);
    return page;
  }

 private:
  std::string id(const std::string& name) { return fmt::format("{}-{}", name, ++figures_); }

  void opening() {
    document_.heading(1, title_);
    std::set<std::string> versions;
    double first = 0, last = 0;
    each_record([&](const Section&, const std::string&, const std::string&, const Record& record, Maybe) {
      if (!record.version.empty()) versions.insert(record.version);
      if (record.date > 0) {
        first = first == 0 ? record.date : std::min(first, record.date);
        last = std::max(last, record.date);
      }
    });
    std::vector<std::string> parts;
    if (!versions.empty()) parts.push_back("headfold " + joined({versions.begin(), versions.end()}, ", "));
    if (first > 0)
      parts.push_back(format_date(first).substr(0, 10) == format_date(last).substr(0, 10)
                          ? format_date(first).substr(0, 10)
                          : format_date(first).substr(0, 10) + " to " + format_date(last).substr(0, 10));
    if (!parts.empty()) document_.paragraph(joined(parts, " · "), "sub");
    for (const Section& one : run_.sections) document_.paragraph(headline_words(one), "lead");
    document_.html("<nav aria-label=\"Contents\"><ul>");
    for (std::size_t s = 0; s < run_.sections.size(); ++s)
      document_.html(fmt::format("<li><a href=\"#m{}\">{}</a></li>", s + 1, escape_markup(run_.sections[s].name)));
    document_.html(
        "<li><a href=\"#reproduce\">Reproduce</a></li><li><a href=\"#words\">Words used here</a></li><li><a "
        "href=\"#files\">Files</a></li></ul></nav>\n");
  }

  void section(const Section& one, const std::string& anchor) {
    document_.html("<section>\n");
    document_.heading(2, one.name, anchor);
    shape_line(one);
    document_.missing(one.missing);
    const bool folded = std::any_of(one.models.begin(), one.models.end(),
                                    [](const ModelRow& row) { return row.conversion.has_value(); });
    const bool evaluated = std::any_of(one.models.begin(), one.models.end(),
                                       [](const ModelRow& row) { return row.evaluation.has_value(); });
    if (folded || evaluated) {
      quality(one);
      further_metrics(one);
      benchmark_sections(document_, one, [this](const std::string& name) { return id(name); });
    }
    if (folded) {
      document_.heading(3, "What was saved, and what it cost");
      document_.html("<div class=\"pair\">\n");
      cache_figure(one);
      quality_figure(one);
      document_.html("</div>\n");
      const auto new_id = [this](const std::string& name) { return id(name); };
      loss_figures(one);
      held_out_losses(document_, one, new_id);
      refit_tables(document_, one, new_id);
      layer_budgets(document_, one, new_id);
      frequency_maps(document_, one, new_id);
      energy_figure(one);
    }
    trainings(document_, one, [this](const std::string& name) { return id(name); });
    compared_plans(document_, one);
    if (folded || evaluated) budget(one);
    done(one);
    document_.html("</section>\n");
  }

  void shape_line(const Section& one) {
    std::vector<std::string> parts;
    if (one.shapes && !one.shapes->family.empty()) parts.push_back(one.shapes->family + " form");
    if (one.layers) parts.push_back(fmt::format("{} layers", *one.layers));
    if (one.shapes && one.shapes->hidden > 0)
      parts.push_back(fmt::format("hidden size {}", format_count(one.shapes->hidden)));
    if (one.heads && one.kv_heads) parts.push_back(fmt::format("{} heads on {} KV heads", *one.heads, *one.kv_heads));
    if (one.shapes && one.shapes->head_dim > 0) parts.push_back(fmt::format("head size {}", one.shapes->head_dim));
    if (one.parameters) parts.push_back(short_count(*one.parameters) + " parameters");
    if (one.cache_bytes) parts.push_back(bytes_text(*one.cache_bytes) + " of KV cache per token");
    if (!parts.empty()) document_.paragraph(joined(parts, " · "), "sub");
  }

  /// What the evaluation harness itself measured of a model that is not ours has scores and nothing else.
  static bool only_benchmarks(const ModelRow& row) {
    return !row.original && !row.conversion && row.evaluation && row.evaluation->harness;
  }

  static Cell stock_cell(const ModelRow& row) {
    Cell cell;
    if (!row.stock) {
      cell.text = kNone;
    } else {
      cell.text = *row.stock ? "stock" : "headfold only";
      cell.pill = *row.stock ? 1 : 0;
    }
    return cell;
  }

  void quality(const Section& one) {
    document_.heading(3, "Quality");
    std::map<std::int64_t, double> best;
    for (const ModelRow& row : one.models)
      if (!row.original && row.ratio && row.kv_heads &&
          (best.count(*row.kv_heads) == 0 || *row.ratio < best[*row.kv_heads]))
        best[*row.kv_heads] = *row.ratio;
    Grid grid;
    grid.name = "Quality of the original and of every conversion of " + one.name;
    grid.mark_first = true;
    grid.columns = {{"Model", "", false},
                    {"Key fold", "metric; value fold", false, true},
                    {"KV heads", "", true},
                    {"Checkpoint", "KV layout", false},
                    {"KV bytes/token", "of original", true},
                    {"Perplexity", one.perplexity_task, true},
                    {"Ratio", "to original", true},
                    {"KL", "nats/token", true},
                    {"Top-1", "agreement", true}};
    for (const ModelRow& row : one.models) {
      if (only_benchmarks(row)) continue;
      std::vector<Cell> cells(grid.columns.size());
      cells[0] = name_cell(row);
      cells[1].text = row.conversion ? row.conversion->keys : row.original ? "none" : "unknown";
      if (row.conversion) {
        const Conversion& c = *row.conversion;
        if (c.keys != "meanpool" && !c.key_metric.empty()) cells[1].small = c.key_metric + "; ";
        cells[1].small += "values " + with_metric(c.values, c.value_metric);
        if (const std::string extras = words_of(c.extras); !extras.empty()) cells[1].small += "; " + extras;
      }
      cells[2].text = row.kv_heads ? fmt::format("{}", *row.kv_heads) : std::string(kNone);
      if (row.kv_heads && one.kv_heads && !row.original) cells[2].small = fmt::format("of {}", *one.kv_heads);
      if (row.conversion && row.conversion->extras.latents.empty())
        if (const auto [least, most] = row.conversion->kv_heads_range(); least != most)
          cells[2].small = fmt::format("{} to {} by layer", least, most);
      cells[3] = stock_cell(row);
      cells[3].small = row.layout;
      cells[4].text = row.cache_bytes ? bytes_text(*row.cache_bytes) : std::string(kNone);
      if (row.share) cells[4].small = format_share(*row.share);
      cells[5].text = shown(row.perplexity, format_perplexity);
      cells[6].text = shown(row.ratio, format_ratio);
      if (!row.original && row.ratio) {
        cells[6].small = format_change(*row.ratio);
        cells[6].best = row.kv_heads && *row.ratio == best[*row.kv_heads];
      }
      // The original against itself is not a measurement.
      cells[7].text = row.original && !row.kl ? std::string(kNone)
                                              : shown(row.kl, [](double v) { return format_significant(v, 3); });
      cells[8].text = shown(row.top1, [](double v) { return fmt::format("{:.1f}{}%", v * 100, kNbsp); });
      grid.rows.push_back(std::move(cells));
    }
    document_.table(grid);
    document_.paragraph(
        "Lower perplexity and KL are better, higher top-1 agreement is better. Bold: the lowest ratio at that number "
        "of KV heads. "
        "“Stock” checkpoints load in any engine that knows grouped-query attention; “headfold only” ones need this "
        "program's runtime.",
        "note");
  }

  static std::string metric_name(const std::string& key) {
    static const std::map<std::string, std::string> kNames = {{"word_perplexity", "word perplexity"},
                                                              {"byte_perplexity", "byte perplexity"},
                                                              {"bits_per_byte", "bits per byte"},
                                                              {"kl", "KL, nats/token"},
                                                              {"top1_agreement", "top-1 agreement"},
                                                              {"loss", "loss, nats/token"},
                                                              {"reference_perplexity", "reference perplexity"}};
    const std::size_t comma = key.find(',');
    const std::string name = key.substr(0, comma), filter = comma == std::string::npos ? "" : key.substr(comma + 1);
    const auto found = kNames.find(name);
    return (found == kNames.end() ? name : found->second) + (filter.empty() || filter == "none" ? "" : ", " + filter);
  }

  /// Tasks and metrics beyond the quality table: the harness's rolling form first of all.
  void further_metrics(const Section& one) {
    std::vector<std::pair<std::string, std::string>> keys;
    for (const ModelRow& row : one.models) {
      if (!row.evaluation) continue;
      for (const auto& [task, result] : row.evaluation->tasks) {
        if (!result.of_text(task)) continue;
        for (const auto& [metric, value] : result.metrics) {
          if (metric.starts_with("loss,") || metric.starts_with("reference_perplexity,")) continue;
          if (task == one.perplexity_task &&
              (metric == "perplexity,none" || metric == "kl,none" || metric == "top1_agreement,none"))
            continue;
          if (std::find(keys.begin(), keys.end(), std::pair(task, metric)) == keys.end())
            keys.emplace_back(task, metric);
        }
      }
    }
    if (keys.empty()) return;
    const auto order = [](const std::pair<std::string, std::string>& key) {
      static constexpr const char* kOrder[] = {"perplexity,", "word_perplexity,", "byte_perplexity,", "bits_per_byte,",
                                               "kl,",         "top1_agreement,"};
      std::size_t place = 0;
      while (place < std::size(kOrder) && !key.second.starts_with(kOrder[place])) ++place;
      return std::tuple(key.first, place, key.second);
    };
    std::sort(keys.begin(), keys.end(), [&](const auto& a, const auto& b) { return order(a) < order(b); });
    Grid grid;
    grid.name = "Further metrics of " + one.name;
    grid.columns.push_back({"Model", "", false});
    for (const auto& [task, metric] : keys) grid.columns.push_back({metric_name(metric), task, true});
    for (const ModelRow& row : one.models) {
      std::vector<Cell> cells = {name_cell(row)};
      cells[0].small.clear();
      bool any = false;
      for (const auto& [task, metric] : keys) {
        Cell cell{kNone};
        if (row.evaluation)
          if (const auto found = row.evaluation->tasks.find(task); found != row.evaluation->tasks.end())
            if (const auto value = found->second.metrics.find(metric); value != found->second.metrics.end()) {
              any = true;
              cell.text = !value->second ? std::string(kNotFinite)
                          : metric.starts_with("top1_agreement,")
                              ? fmt::format("{:.1f}{}%", *value->second * 100, kNbsp)
                              : format_significant(*value->second, 4);
            }
        cells.push_back(std::move(cell));
      }
      if (!any) continue;
      grid.mark_first = grid.mark_first || row.original;
      grid.rows.push_back(std::move(cells));
    }
    document_.heading(3, "Further metrics");
    document_.table(grid);
    if (std::any_of(keys.begin(), keys.end(), [](const auto& key) { return key.first == "rolling"; }))
      document_.paragraph(
          "“rolling” is the evaluation harness's form: every document on its own, every token scored once with as much "
          "context as fits. Its word perplexity "
          "counts words of the text, not tokens, so it is far larger than the block form above and only comparable "
          "with itself.",
          "note");
  }

  void cache_figure(const Section& one) {
    struct Group {
      std::int64_t bytes, heads;
      std::vector<std::string> folds;
      bool original = false;
    };
    std::vector<Group> groups;
    for (const ModelRow& row : one.models) {
      if (!row.cache_bytes) continue;
      auto found = std::find_if(groups.begin(), groups.end(), [&](const Group& g) {
        return g.bytes == *row.cache_bytes && g.heads == row.kv_heads.value_or(0);
      });
      if (found == groups.end())
        found = groups.insert(groups.end(), Group{*row.cache_bytes, row.kv_heads.value_or(0), {}, false});
      found->original = found->original || row.original;
      if (!row.original && std::find(found->folds.begin(), found->folds.end(), row.fold) == found->folds.end())
        found->folds.push_back(row.fold);
    }
    if (groups.empty() || !one.cache_bytes) return;
    std::sort(groups.begin(), groups.end(), [](const Group& a, const Group& b) {
      return std::tuple(!a.original, -a.bytes) < std::tuple(!b.original, -b.bytes);
    });
    std::vector<Bar> bars;
    std::string description;
    for (Group& group : groups) {
      std::sort(group.folds.begin(), group.folds.end());
      Bar bar;
      bar.label =
          group.heads > 0 ? fmt::format("{} KV head{}", group.heads, group.heads == 1 ? "" : "s") : "unknown KV heads";
      bar.detail = group.original ? "original" : joined(group.folds, "; ");
      const double share = static_cast<double>(group.bytes) / static_cast<double>(*one.cache_bytes);
      bar.value = bytes_text(group.bytes) + (group.original ? "" : ", " + format_share(share));
      bar.length = static_cast<double>(group.bytes);
      bar.colour = group.original ? -1 : 0;
      description += fmt::format("{}: {}. ", bar.label, bar.value);
      bars.push_back(std::move(bar));
    }
    Words caption;
    caption.strong("KV cache per token, before and after.");
    const std::int64_t context = 4096;
    const std::int64_t least = std::min_element(groups.begin(), groups.end(), [](const Group& a, const Group& b) {
                                 return a.bytes < b.bytes;
                               })->bytes;
    caption.add(
        fmt::format(" Over all layers. A context of {} tokens takes {} with the original and {} with the smallest "
                    "conversion, for each sequence of a batch.",
                    format_count(context), bytes_text(*one.cache_bytes * context), bytes_text(least * context)));
    document_.figure({bar_chart(id("kv"), "KV cache bytes per token of " + one.name, description, bars, 440)}, "big",
                     caption);
  }

  void quality_figure(const Section& one) {
    std::vector<Series> series(one.folds.size());
    std::vector<double> ratios = {1.0};
    std::vector<double> shares = {1.0};
    std::string description;
    for (std::size_t f = 0; f < one.folds.size(); ++f) {
      series[f].name = one.folds[f];
      series[f].label = one.folds[f];
      series[f].colour = static_cast<int>(f);
      for (const ModelRow& row : one.models) {
        if (row.series != static_cast<int>(f) || !row.ratio || !row.share) continue;
        series[f].points.push_back({*row.share * 100, *row.ratio,
                                    fmt::format("{}: {} of the KV bytes, {}× perplexity", row.name,
                                                format_share(*row.share), format_ratio(*row.ratio))});
        ratios.push_back(*row.ratio);
        shares.push_back(*row.share);
      }
      std::sort(series[f].points.begin(), series[f].points.end(),
                [](const Point& a, const Point& b) { return a.x > b.x; });
      for (const Point& point : series[f].points) description += point.hint + ". ";
    }
    std::erase_if(series, [](const Series& s) { return s.points.empty(); });
    if (series.empty()) return;
    // Every line begins at the original, where nothing is folded.
    for (Series& s : series)
      if (s.points.front().x < 100 - 1e-9) s.points.insert(s.points.begin(), {100, 1, one.name + ": the original"});
    Series original;
    original.name = one.name + ": the original";
    original.colour = -1;
    original.line = false;
    original.points = {{100, 1, original.name}};
    series.push_back(original);
    const bool log = *std::max_element(ratios.begin(), ratios.end()) /
                         std::max(1e-12, *std::min_element(ratios.begin(), ratios.end())) >
                     2;
    Chart chart;
    chart.id = id("quality");
    chart.title = "Perplexity ratio against KV bytes, " + one.name;
    chart.description = description;
    chart.width = 440;
    chart.height = 310;
    chart.series = std::move(series);
    chart.y = make_axis(ratios, log ? "perplexity, × the original (log scale)" : "perplexity, × the original", "×", log,
                        false, log ? 7 : 6);
    chart.x.low = 0;
    chart.x.high = 105;
    chart.x.reversed = true;
    chart.x.title = "KV bytes per token, % of the original";
    std::sort(shares.begin(), shares.end());
    shares.erase(std::unique(shares.begin(), shares.end(), [](double a, double b) { return std::abs(a - b) < 1e-9; }),
                 shares.end());
    chart.x.low = shares.front() > 0.3 ? shares.front() * 100 - 10 : std::max(0.0, shares.front() * 100 - 8);
    if (shares.size() <= 5) {
      for (const double share : shares) chart.x.ticks.emplace_back(share * 100, format_share(share));
    } else {
      for (const double tick : nice_ticks(chart.x.low, 100, 6))
        chart.x.ticks.emplace_back(tick, fmt::format("{:g}{}%", tick, kNbsp));
    }
    Words caption;
    caption.strong("Quality against KV bytes.");
    caption.add(
        " Each line is one fold, from the original at the left to smaller caches at the right; lower is better.");
    if (log) caption.add(" The scale is logarithmic: equal steps are equal factors.");
    document_.figure({chart.svg()}, "big", caption);
  }

  void loss_figures(const Section& one) {
    bool any = false, measured = false;
    for (const ModelRow& row : one.models) {
      any = any || (row.conversion && !row.conversion->layers.empty() && has_losses(row));
      measured = measured || (row.conversion && row.conversion->verification);
    }
    if (!any && !measured) return;
    document_.heading(3,
                      measured ? "Predicted against measured loss, layer by layer" : "Predicted loss, layer by layer");
    Words introduction(
        "The plan of a fold predicts what share of the keys' and values' energy each layer loses, in the fold's own "
        "weighted norm, from the calibration statistics. ");
    introduction.add(
        measured
            ? "Verification measures it again on another pass over text. Where both agree, the statistics describe "
              "what the model sees; Spearman's ρ says whether the order of layers was predicted (1: exactly). Read ρ "
              "with the spread: where layers lose nearly the same, the order is chance. In order: pairs of layers in "
              "the predicted order, of those whose measured losses differ by more than two standard errors."
            : "Nothing was verified in this run, so the predictions stand alone.");
    document_.paragraph(introduction, "say");

    Grid summary;
    summary.name = "Mean loss of every conversion of " + one.name;
    summary.columns = {{"Model", "", false},
                       {"Keys", "predicted", true},
                       {"Keys", "measured", true},
                       {"Keys ρ", "over layers", true},
                       {"Keys", "spread", true},
                       {"Keys", "in order", true},
                       {"Values", "predicted", true},
                       {"Values", "measured", true},
                       {"Values ρ", "over layers", true},
                       {"Values", "spread", true},
                       {"Values", "in order", true}};
    for (const ModelRow& row : one.models) {
      if (!has_losses(row)) continue;
      std::vector<Cell> cells = {name_cell(row)};
      for (const bool keys : {true, false}) {
        const SideLoss loss = losses_of(*row.conversion, keys);
        const auto average = [](const std::vector<Point>& points) {
          const Maybe value = mean(values_of(points));
          return value ? loss_percent(*value / 100) : std::string(kNone);
        };
        cells.push_back({average(loss.all_predicted)});
        cells.push_back({average(loss.all_measured)});
        cells.push_back(
            {shown(spearman(loss.predicted, loss.measured), [](double v) { return fmt::format("{:.2f}", v); })});
        const auto order = order_of(*row.conversion, keys);
        cells.push_back({order ? shown(order->spread, loss_percent) : std::string(kNone)});
        cells.push_back({order ? fmt::format("{} of {}", order->in_order, order->told_apart) : std::string(kNone)});
      }
      summary.rows.push_back(std::move(cells));
    }
    document_.table(summary);

    for (std::size_t f = 0; f < one.folds.size(); ++f) {
      std::vector<const ModelRow*> rows;
      std::vector<double> values, layers;
      for (const ModelRow& row : one.models) {
        if (row.series != static_cast<int>(f) || !has_losses(row)) continue;
        bool has = false;
        for (const bool keys : {true, false}) {
          const SideLoss loss = losses_of(*row.conversion, keys);
          for (const auto* points : {&loss.all_predicted, &loss.all_measured}) {
            for (const Point& point : *points) {
              values.push_back(point.y);
              layers.push_back(point.x);
              has = true;
            }
          }
        }
        if (has) rows.push_back(&row);
      }
      if (rows.empty()) continue;
      const double least = *std::min_element(values.begin(), values.end()),
                   most = *std::max_element(values.begin(), values.end());
      const bool log = least > 0 && most / least > 30;
      const Axis y = make_axis(values, log ? "loss (log scale)" : "loss", "%", log, true, 5);
      const double first = *std::min_element(layers.begin(), layers.end()),
                   last = *std::max_element(layers.begin(), layers.end());
      const bool many = last - first > 16;
      std::vector<std::string> panels;
      for (const ModelRow* row : rows) {
        for (const bool keys : {true, false}) {
          const SideLoss loss = losses_of(*row->conversion, keys);
          const auto rho = spearman(loss.predicted, loss.measured);
          Chart chart;
          chart.id = id("loss");
          const std::string side = keys ? "Keys" : "Values";
          chart.title = fmt::format("{}: predicted and measured loss per layer, {}", side, row->name);
          chart.description =
              fmt::format("{} layers. {}", std::max(loss.all_predicted.size(), loss.all_measured.size()),
                          rho ? fmt::format("Spearman correlation {:.2f}.", *rho)
                              : std::string("No correlation: fewer than three pairs."));
          chart.heading = fmt::format("{}, {} KV head{}{}", side, heads_text(*row->conversion),
                                      heads_text(*row->conversion) == "1" ? "" : "s",
                                      rho ? fmt::format(" · ρ = {:.2f}", *rho) : std::string());
          chart.width = many ? 480 : 250;
          chart.height = many ? 220 : 200;
          chart.y = y;
          chart.x = layer_axis(first, last, many ? 12 : 8);
          for (std::size_t i = 0; i < loss.layers.size(); ++i)
            chart.stems.push_back(
                {{loss.layers[i], loss.predicted[i] * 100, {}}, {loss.layers[i], loss.measured[i] * 100, {}}});
          chart.stem_colour = static_cast<int>(f);
          Series predicted, actual;
          predicted.name = "predicted";
          predicted.colour = actual.colour = static_cast<int>(f);
          predicted.line = actual.line = false;
          predicted.marker = Marker::hollow;
          predicted.points = loss.all_predicted;
          actual.name = "measured";
          actual.marker_size = 3.2;  // fits into the hollow one where both agree
          actual.points = loss.all_measured;
          chart.series = {predicted, actual};
          panels.push_back(chart.svg());
        }
      }
      Words caption;
      caption.strong(fmt::format("{}.", one.folds[f]));
      const bool both = std::any_of(rows.begin(), rows.end(),
                                    [](const ModelRow* row) { return row->conversion->verification.has_value(); });
      caption.add(both ? " Loss by layer, % of energy. Hollow markers: predicted; filled: measured; a stem joins the "
                         "two of one layer."
                       : " Predicted loss by layer, % of energy; not verified.");
      if (std::any_of(rows.begin(), rows.end(), [](const ModelRow* row) {
            return row->conversion->extras.refit && row->conversion->verification;
          }))
        caption.add(" The prediction is of the fold alone; what was measured includes the refit.");
      if (log) caption.add(" Logarithmic scale.");
      document_.figure(panels, many ? "panels wide" : "panels", caption);
    }

    for (const ModelRow& row : one.models) {
      if (!row.conversion || (row.conversion->layers.empty() && !row.conversion->verification)) continue;
      layer_table(row);
    }
  }

  void layer_table(const ModelRow& row) {
    Grid grid;
    grid.name = "Loss per layer of " + row.name;
    grid.columns = {{"Layer", "", true},
                    {"Key loss", "predicted", true},
                    {"Key loss", "measured", true},
                    {"Value loss", "predicted", true},
                    {"Value loss", "measured", true},
                    {"Score error", "", true},
                    {"Output error", "of attention", true}};
    const auto& folds = row.conversion->layers;
    const bool held_out = std::any_of(
        folds.begin(), folds.end(), [](const LayerFold& layer) { return layer.key_held_out || layer.value_held_out; });
    if (held_out) {
      grid.columns.push_back({"Keys held out", "fitted", true});
      grid.columns.push_back({"Values held out", "fitted", true});
    }
    const auto pair = [](const Maybe& unseen, const Maybe& fitted) {
      return Cell{shown(unseen, loss_percent), fitted ? loss_percent(*fitted) : std::string()};
    };
    for (const Layer& layer : layers_of(*row.conversion)) {
      const LayerCheck& check = layer.check;
      grid.rows.push_back({{fmt::format("{}", check.layer)},
                           {shown(check.key_predicted, loss_percent)},
                           {shown(check.key_measured, loss_percent)},
                           {shown(check.value_predicted, loss_percent)},
                           {shown(check.value_measured, loss_percent)},
                           {shown(check.score_error, loss_percent)},
                           {shown(check.output_error, loss_percent)}});
      if (!held_out) continue;
      grid.rows.back().push_back(pair(layer.fold.key_held_out, layer.fold.key_fitted));
      grid.rows.back().push_back(pair(layer.fold.value_held_out, layer.fold.value_fitted));
    }
    document_.folded("Every layer of " + row.name, grid);
  }

  void energy_figure(const Section& one) {
    struct Panel {
      bool keys;
      std::string title;
      std::string heads;
      double kept;  ///< share of the channels; negative: layers differ
      std::vector<std::pair<std::int64_t, std::vector<double>>> layers;
    };
    std::vector<Panel> panels;
    double least = 1;
    for (const bool keys : {true, false}) {
      for (const ModelRow& row : one.models) {
        if (!row.conversion) continue;
        const Conversion& conversion = *row.conversion;
        // Averaging chooses no channels, so there is nothing for a curve to say about it.
        if ((keys ? conversion.keys : conversion.values) == "meanpool") continue;
        Panel panel{keys,
                    keys ? with_metric(conversion.keys, conversion.key_metric)
                         : with_metric(conversion.values, conversion.value_metric),
                    heads_text(conversion),
                    conversion.uneven() ? -1.0
                                        : static_cast<double>(conversion.kv_heads_after) /
                                              static_cast<double>(conversion.kv_heads_before),
                    {}};
        for (const LayerFold& layer : conversion.layers) {
          const auto& energy = keys ? layer.key_energy : layer.value_energy;
          if (!energy.empty()) panel.layers.emplace_back(layer.layer, energy);
        }
        if (panel.layers.empty()) continue;
        // Conversions that share a fold of one side share its curves.
        if (std::any_of(panels.begin(), panels.end(), [&](const Panel& p) {
              return p.keys == keys && p.heads == panel.heads && p.title == panel.title && p.layers == panel.layers;
            }))
          continue;
        for (const auto& [layer, energy] : panel.layers)
          least = std::min(least, *std::min_element(energy.begin(), energy.end()));
        panels.push_back(std::move(panel));
      }
    }
    if (panels.empty()) return;
    std::stable_sort(panels.begin(), panels.end(), [](const Panel& a, const Panel& b) {
      return std::tuple(!a.keys, a.title, -a.kept) < std::tuple(!b.keys, b.title, -b.kept);
    });
    document_.heading(3, "Singular-value energy");
    bool curves = true;
    for (const Panel& panel : panels) curves = curves && panel.layers.size() <= kMostCurves;
    for (const bool keys : {true, false}) {
      std::vector<std::string> drawn;
      for (const Panel& panel : panels) {
        if (panel.keys != keys) continue;
        // The metric is named only where it tells two panels apart: there is little room.
        const std::string bare = panel.title.substr(0, panel.title.find(" ("));
        const bool alone = std::none_of(panels.begin(), panels.end(), [&](const Panel& p) {
          return p.keys == keys && p.title != panel.title && p.title.starts_with(bare + " (");
        });
        const std::string heading =
            fmt::format("{}, {} KV head{}", alone ? bare : panel.title, panel.heads, panel.heads == "1" ? "" : "s");
        const std::string title = fmt::format("Singular-value energy of the {}, {}", keys ? "keys" : "values", heading);
        const std::string description =
            panel.kept < 0 ? fmt::format("{} layers, which keep different shares of the channels.", panel.layers.size())
                           : fmt::format("{} layers; the fold keeps {} of the channels.", panel.layers.size(),
                                         format_share(panel.kept));
        drawn.push_back(curves ? energy_curves(panel.layers, panel.kept, least, heading, title, description)
                               : energy_map(panel.layers, panel.kept, heading, title, description));
      }
      if (drawn.empty()) continue;
      Words caption;
      caption.strong(keys ? "Keys." : "Values.");
      caption.add(
          curves ? " Share of energy held by the first channels of a group, in the order in which the fold keeps them; "
                   "one curve per layer, averaged over groups."
                 : " Each row is a layer, averaged over groups; darker (in dark mode: lighter) means that the channels "
                   "up to here hold more of the energy.");
      caption.add(
          curves
              ? " The rule marks the channels that the fold keeps: the higher the curve there, the less is lost."
              : " The rule marks the channels that the fold keeps: the more energy is held there, the less is lost.");
      if (keys && std::any_of(panels.begin(), panels.end(),
                              [](const Panel& p) { return p.keys && p.title.starts_with("rope-commuting"); }))
        caption.add(
            " rope-commuting keeps the strongest component of every frequency, so its channels stand in that order and "
            "the energy comes in steps.");
      document_.figure(drawn, curves ? "panels" : "panels wide", caption);
    }
  }

  std::string energy_curves(const std::vector<std::pair<std::int64_t, std::vector<double>>>& layers, double kept,
                            double least, const std::string& heading, const std::string& title,
                            const std::string& description) {
    Chart chart;
    chart.id = id("energy");
    chart.title = title;
    chart.description = description;
    chart.heading = heading;
    chart.width = 250;
    chart.height = 200;
    chart.x.low = 0;
    chart.x.high = 100;
    chart.x.title = "channels, % of the group's";
    for (const double tick : {0.0, 25.0, 50.0, 75.0, 100.0})
      chart.x.ticks.emplace_back(tick, fmt::format("{:.0f}{}%", tick, kNbsp));
    chart.y = make_axis({least * 100, 100}, "energy held", "%", false, false, 5);
    chart.y.high = std::max(chart.y.high, 100.0);
    for (std::size_t l = 0; l < layers.size(); ++l) {
      Series series;
      series.name = fmt::format("layer {}", layers[l].first);
      series.shade = layers.size() == 1 ? kShades - 1
                                        : 1 + static_cast<int>(std::lround(static_cast<double>(l) * (kShades - 2) /
                                                                           static_cast<double>(layers.size() - 1)));
      series.marker = Marker::none;
      const auto& energy = layers[l].second;
      for (std::size_t i = 0; i < energy.size(); ++i)
        series.points.push_back(
            {100.0 * static_cast<double>(i + 1) / static_cast<double>(energy.size()), energy[i] * 100, {}});
      chart.series.push_back(std::move(series));
    }
    if (kept >= 0) chart.rules = {{kept * 100, ""}};
    if (layers.size() > 1)
      chart.shade_labels = {fmt::format("layer {}", layers.front().first), fmt::format("{}", layers.back().first)};
    return chart.svg();
  }

  std::string energy_map(const std::vector<std::pair<std::int64_t, std::vector<double>>>& layers, double kept,
                         const std::string& heading, const std::string& title, const std::string& description) {
    static constexpr double kEdges[kShades - 1] = {0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99};
    HeatMap map;
    map.id = id("energy");
    map.title = title;
    map.description = description;
    map.heading = heading;
    map.x_title = "channels, % of the group's";
    map.y_title = "layer";
    map.rule = kept;
    for (const double tick : {0.0, 0.25, 0.5, 0.75, 1.0}) map.x_ticks.emplace_back(tick, format_share(tick));
    map.key = {"<50 %", "50 %", "70 %", "80 %", "90 %", "95 %", "98 %", "≥99 %"};
    for (const auto& [layer, energy] : layers) {
      map.row_labels.push_back(fmt::format("{}", layer));
      std::vector<int> row;
      for (const double value : energy)
        row.push_back(
            static_cast<int>(std::upper_bound(std::begin(kEdges), std::end(kEdges), value) - std::begin(kEdges)));
      map.shades.push_back(std::move(row));
    }
    return map.svg();
  }

  void budget(const Section& one) {
    document_.heading(3, "Parameter and time budget");
    Grid grid;
    grid.name = "Parameters and seconds of every model of " + one.name;
    grid.mark_first = true;
    grid.columns = {{"Model", "", false},
                    {"Parameters", "", true},
                    {"Of original", "parameters", true},
                    {"Plan", "", true},
                    {"Apply", "", true},
                    {"Convert", "in all", true},
                    {"Verify", "", true},
                    {"Evaluate", "", true},
                    {"Evaluate", "tokens/s", true},
                    {"Peak memory", "of a rank", true}};
    for (const ModelRow& row : one.models) {
      if (only_benchmarks(row)) continue;
      std::vector<Cell> cells(grid.columns.size(), Cell{kNone});
      cells[0] = name_cell(row);
      Maybe peak;
      const auto higher = [&](const Maybe& value) {
        if (value && (!peak || *value > *peak)) peak = value;
      };
      if (row.parameters) {
        cells[1].text = format_count(*row.parameters);
        if (one.parameters && *one.parameters > 0)
          cells[2].text = format_share(static_cast<double>(*row.parameters) / static_cast<double>(*one.parameters));
      }
      if (row.conversion) {
        cells[3].text = seconds_text(row.conversion->seconds_plan);
        cells[4].text = seconds_text(row.conversion->seconds_apply);
        if (row.conversion->record) {
          cells[5].text = seconds_text(row.conversion->record->seconds);
          higher(row.conversion->record->peak_resident_bytes);
        }
        if (row.conversion->verification) {
          cells[6].text = seconds_text(row.conversion->verification->record.seconds);
          higher(row.conversion->verification->record.peak_resident_bytes);
        }
      }
      if (row.evaluation) {
        Maybe seconds;
        for (const auto& [file, record] : row.evaluation->records) {
          if (record.seconds) seconds = seconds.value_or(0) + *record.seconds;
          higher(record.peak_resident_bytes);
        }
        cells[7].text = seconds_text(seconds);
        cells[8].text = shown(row.evaluation->tokens_per_second, [](double v) { return format_significant(v, 3); });
      }
      cells[9].text = shown(peak, human_bytes);
      grid.rows.push_back(std::move(cells));
    }
    document_.table(grid);
    Maybe total;
    const auto add = [&](const Maybe& seconds) {
      if (seconds) total = total.value_or(0) + *seconds;
    };
    for (const Calibration& calibration : one.calibrations) add(calibration.record.seconds);
    for (const ModelRow& row : one.models) {
      if (row.conversion && row.conversion->record) add(row.conversion->record->seconds);
      if (row.conversion && row.conversion->verification) add(row.conversion->verification->record.seconds);
      if (row.evaluation)
        for (const auto& [file, record] : row.evaluation->records) add(record.seconds);
    }
    Words note;
    if (!one.calibrations.empty() && one.calibrations[0].record.seconds)
      note.add(fmt::format("One calibration ({}) serves every conversion. ",
                           human_seconds(*one.calibrations[0].record.seconds)));
    if (total) note.add(fmt::format("All recorded stages of this model together: {}. ", human_seconds(*total)));
    if (std::any_of(one.models.begin(), one.models.end(),
                    [](const ModelRow& row) { return row.conversion && row.conversion->layout == "projected"; }))
      note.add(
          "The projected layout keeps the full key projection and adds its projection matrices, so it saves cache "
          "rather than parameters.");
    if (!note.empty()) document_.paragraph(note, "note");
  }

  void done(const Section& one) {
    document_.heading(3, "What was done");
    std::vector<std::pair<std::string, std::string>> facts;
    facts.emplace_back("Model", one.name);
    if (!one.fingerprint.empty()) facts.emplace_back("Model fingerprint", one.fingerprint);
    if (one.shapes && one.shapes->vocab > 0) facts.emplace_back("Vocabulary", format_count(one.shapes->vocab));
    for (const Calibration& calibration : one.calibrations) {
      const std::string which = one.calibrations.size() > 1 ? " (" + calibration.file + ")" : std::string();
      std::vector<std::string> parts;
      if (calibration.tokens) parts.push_back(format_count(*calibration.tokens) + " tokens");
      if (calibration.tokens_per_second)
        parts.push_back(format_significant(*calibration.tokens_per_second, 3) + " tokens/s");
      if (calibration.stages)
        parts.push_back(fmt::format("{} pipeline stage{}", *calibration.stages, *calibration.stages == 1 ? "" : "s"));
      if (calibration.replicas)
        parts.push_back(fmt::format("{} replica{}", *calibration.replicas, *calibration.replicas == 1 ? "" : "s"));
      if (calibration.pipeline_bubble) parts.push_back("pipeline bubble " + format_share(*calibration.pipeline_bubble));
      facts.emplace_back("Calibration" + which, parts.empty() ? std::string(kNone) : joined(parts, ", "));
      if (!calibration.options.empty()) {
        std::vector<std::string> options;
        for (const auto& [key, value] : calibration.options) options.push_back(fmt::format("{} = {}", key, value));
        facts.emplace_back("Calibration options" + which, joined(options, "; "));
      }
      if (!calibration.data_hash.empty()) facts.emplace_back("Calibration data, hash" + which, calibration.data_hash);
    }
    std::set<std::string> weights;
    for (const ModelRow& row : one.models) {
      if (!row.conversion) continue;
      std::vector<std::string> parts;
      if (row.conversion->sink_weight) parts.push_back(fmt::format("sink weight {:g}", *row.conversion->sink_weight));
      if (row.conversion->weight_ridge)
        parts.push_back(fmt::format("weight ridge {:g}", *row.conversion->weight_ridge));
      if (!row.conversion->statistics_hash.empty())
        parts.push_back("statistics " + short_hash(row.conversion->statistics_hash));
      if (!parts.empty()) weights.insert(joined(parts, ", "));
    }
    if (!weights.empty()) facts.emplace_back("Fold options", joined({weights.begin(), weights.end()}, "; "));
    document_.facts(facts);

    Grid grid;
    grid.name = "Stages of the work on " + one.name;
    grid.columns = {{"Stage", "", false},
                    {"Result", "", false},
                    {"Time", "", true},
                    {"Ranks", "", true},
                    {"Threads", "per rank", true},
                    {"Hosts", "", true},
                    {"Peak memory", "of a rank", true},
                    {"When", "UTC", true}};
    std::vector<std::pair<double, std::vector<Cell>>> rows;
    each_record(
        [&](const Section& section, const std::string& stage, const std::string& file, const Record& record, Maybe) {
          if (&section != &one) return;
          const std::string date = format_date(record.date);
          rows.emplace_back(record.date, std::vector<Cell>{{stage},
                                                           {file},
                                                           {seconds_text(record.seconds)},
                                                           {count(record.ranks)},
                                                           {count(record.threads_per_rank)},
                                                           {count(record.hosts)},
                                                           {shown(record.peak_resident_bytes, human_bytes)},
                                                           {date == kNone ? date : date.substr(0, 16)}});
        });
    if (rows.empty()) return;
    std::stable_sort(rows.begin(), rows.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    for (auto& row : rows) grid.rows.push_back(std::move(row.second));
    document_.table(grid);
  }

  /// visit(section, stage, file, record, tokens per second) for everything that says how it ran.
  template <class Visit>
  void each_record(Visit visit) const {
    for (const Section& one : run_.sections) {
      for (const Calibration& calibration : one.calibrations)
        visit(one, "calibrate", calibration.file, calibration.record, calibration.tokens_per_second);
      for (const Comparison& comparison : one.comparisons)
        visit(one, "compare", comparison.file, comparison.record, Maybe());
      for (const Training& training : one.trainings)
        visit(one, "finetune", training.folder, training.record, training.tokens_per_second);
      for (const ModelRow& row : one.models) {
        if (row.conversion) {
          if (row.conversion->record) visit(one, "convert", row.conversion->folder, *row.conversion->record, Maybe());
          if (row.conversion->verification)
            visit(one, "verify", row.conversion->verification->file, row.conversion->verification->record, Maybe());
        }
        if (row.evaluation)
          for (std::size_t i = 0; i < row.evaluation->records.size(); ++i)
            visit(one, "evaluate", row.evaluation->records[i].first, row.evaluation->records[i].second,
                  i + 1 == row.evaluation->records.size() ? row.evaluation->tokens_per_second : Maybe());
      }
    }
  }

  void reproduce() {
    document_.html("<section>\n");
    document_.heading(2, "Reproduce", "reproduce");
    std::vector<std::pair<double, std::string>> commands;
    each_record([&](const Section&, const std::string&, const std::string&, const Record& record, Maybe) {
      if (record.command.empty()) return;
      std::string line = record.command;
      if (record.ranks && *record.ranks > 1) line = fmt::format("mpirun -np {} {}", *record.ranks, line);
      if (std::none_of(commands.begin(), commands.end(), [&](const auto& c) { return c.second == line; }))
        commands.emplace_back(record.date, line);
    });
    std::stable_sort(commands.begin(), commands.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    if (commands.empty()) {
      document_.paragraph("No file of this run recorded the command that made it.");
    } else {
      document_.paragraph(
          "The recorded commands, in the order they ran. Paths inside the run folder are relative to it; “…/” stands "
          "for folders elsewhere.");
      std::vector<std::string> lines;
      lines.reserve(commands.size() + 1);
      for (const auto& [date, line] : commands) lines.push_back(clean_text(line));
      lines.push_back("headfold report --run .");
      document_.code(joined(lines, "\n"));
    }
    document_.html("</section>\n");
  }

  void glossary() {
    document_.html("<section>\n");
    document_.heading(2, "Words used here", "words");
    document_.words_explained(
        {{"KV cache, KV head",
          "While a language model writes, every layer keeps a key and a value vector of each earlier token: the KV "
          "cache. They come in heads; each pair is a KV head. Its "
          "bytes per token decide how long a context and how large a batch fit into memory."},
         {"MHA, GQA",
          "Multi-head attention has one KV head per query head; grouped-query attention lets a group of query heads "
          "share one KV head."},
         {"Fold",
          "Replaces the KV heads of a group by one that stands for all of them, and adapts queries and outputs to it."},
         {"meanpool", "Averages the heads of a group. The simplest fold, and the yardstick."},
         {"norope",
          "Best shared key subspace for models whose keys are not rotated (BLOOM, ALiBi). Gives a stock checkpoint "
          "where the architecture knows KV heads."},
         {"post-rotation",
          "The fold of arXiv 2406.07056, section 3.4: projects keys after the rotary embedding. Accurate; needs "
          "headfold's own runtime (layout “projected”)."},
         {"rope-commuting",
          "Merges keys with one complex number per head and rotary frequency, which commutes with the rotation. Gives "
          "a stock GQA checkpoint."},
         {"latent",
          "Caches fewer numbers per token than any head has, from which each head's keys and values are rebuilt. Needs "
          "headfold's own runtime."},
         {"procrustes", "Turns the heads of a group towards each other before it averages them."},
         {"svd", "The best low-rank subspace of a group's values."},
         {"weights, act, act+query, act+query+dist, act+out, attn+out",
          "What “best” is measured by: the weights alone, the activations of the calibration text, or activations "
          "weighted by what the queries look for, at the distances at which they look (dist), by what the output "
          "projection makes of values (out), after attention has averaged them (attn)."},
         {"Slow band",
          "The slowest rotary frequencies, which hardly turn over the context: rope-commuting may fold them together, "
          "as "
          "if they did not rotate."},
         {"Searched groups", "Which heads share a KV head was searched for, instead of taking neighbours."},
         {"Budget",
          "How KV heads or channels are spread over layers: the same everywhere (uniform), or more where folding costs "
          "more (greedy, dp, lorc-progressive)."},
         {"Polish", "Sweeps of alternating least squares behind the closed form."},
         {"Refit",
          "Projections fitted once more, in closed form, to the folded model's own inputs so that it does what the "
          "original did. No training."},
         {"Stock",
          "A checkpoint that any engine with grouped-query attention loads as it is. “headfold only” checkpoints need "
          "this program."},
         {"Perplexity, ratio",
          "How many tokens the model hesitates between, on average, on text it never saw; lower is better. The ratio "
          "divides by the original's: 1.10 means 10 % more."},
         {"KL divergence",
          "How far the conversion's next-token distribution is from the original's, in nats per token; 0 means "
          "identical."},
         {"Top-1 agreement", "Share of positions where conversion and original prefer the same next token."},
         {"Benchmark, acc, acc_norm",
          "A set of questions with known answers. The model takes the answer it finds likeliest (acc), or likeliest "
          "per "
          "character (acc_norm); the score is the share it has right."},
         {"Paired test, p",
          "Both models answered the same questions, so only those that one has right and the other wrong tell them "
          "apart. p is how often chance alone would tell them apart as clearly."},
         {"Energy", "Sum of squared singular values: what keys or values of a layer carry, before any is dropped."}});
    document_.html("</section>\n");
  }

  void files() {
    document_.html("<section>\n");
    document_.heading(2, "Files", "files");
    document_.paragraph(
        "The numbers of this page as tables: quality.csv, layers.csv, timing.csv, refit.csv, compare.csv and "
        "benchmarks.csv beside it; the same text without figures: report.md. It was made from these files of the run "
        "folder:");
    std::string list;
    for (const std::string& file : run_.files) list += (list.empty() ? "" : "\n") + clean_text(file);
    document_.code(list);
    if (!run_.ignored.empty()) {
      document_.paragraph("Looked at and left alone, because they are not headfold's or belong to no model here:");
      list.clear();
      for (const std::string& file : run_.ignored) list += (list.empty() ? "" : "\n") + clean_text(file);
      document_.code(list);
    }
    document_.html("</section>\n<footer>Made by headfold report.</footer>\n");
  }

  std::string quality_csv() const {
    Table table({"base_model",
                 "model",
                 "role",
                 "keys",
                 "key_metric",
                 "values",
                 "value_metric",
                 "kv_heads",
                 "kv_heads_original",
                 "options",
                 "refit",
                 "layout",
                 "stock",
                 "cache_bytes_per_token",
                 "cache_share",
                 "parameters",
                 "task",
                 "perplexity",
                 "perplexity_ratio",
                 "kl_nats_per_token",
                 "top1_agreement",
                 "word_perplexity",
                 "byte_perplexity",
                 "bits_per_byte",
                 "dtype",
                 "result_file"});
    for (const Section& one : run_.sections) {
      for (const ModelRow& row : one.models) {
        if (only_benchmarks(row)) continue;
        const TaskResult *task = nullptr, *rolling = nullptr;
        if (row.evaluation) {
          if (const auto found = row.evaluation->tasks.find(one.perplexity_task); found != row.evaluation->tasks.end())
            task = &found->second;
          if (const auto found = row.evaluation->tasks.find("rolling"); found != row.evaluation->tasks.end())
            rolling = &found->second;
        }
        const auto of_rolling = [&](const char* name) {
          if (rolling == nullptr) return std::string();
          const auto found = rolling->metrics.find(name);
          return found == rolling->metrics.end() ? std::string() : raw(found->second);
        };
        const Conversion* c = row.conversion ? &*row.conversion : nullptr;
        table.add({one.name,
                   row.name,
                   row.original ? "original" : "conversion",
                   c ? c->keys : "",
                   c ? c->key_metric : "",
                   c ? c->values : "",
                   c ? c->value_metric : "",
                   raw(row.kv_heads),
                   raw(one.kv_heads),
                   c ? words_of(c->extras) : "",
                   c ? c->extras.refit ? "true" : "false" : "",
                   row.layout,
                   row.stock ? *row.stock ? "true" : "false" : "",
                   raw(row.cache_bytes),
                   raw(row.share),
                   raw(row.parameters),
                   row.perplexity ? one.perplexity_task : "",
                   raw(row.perplexity),
                   raw(row.ratio),
                   raw(row.kl),
                   raw(row.top1),
                   of_rolling("word_perplexity,none"),
                   of_rolling("byte_perplexity,none"),
                   of_rolling("bits_per_byte,none"),
                   row.evaluation ? row.evaluation->dtype : "",
                   task != nullptr      ? task->file
                   : rolling != nullptr ? rolling->file
                                        : ""});
      }
    }
    return table.csv();
  }

  std::string layers_csv() const {
    Table table({"base_model",
                 "model",
                 "kv_heads",
                 "layer",
                 "groups",
                 "key_loss_predicted",
                 "key_loss_measured",
                 "value_loss_predicted",
                 "value_loss_measured",
                 "score_error",
                 "output_error",
                 "key_energy",
                 "value_energy",
                 "layer_kv_heads",
                 "key_width",
                 "value_width",
                 "key_loss_fitted_half",
                 "key_loss_held_out_half",
                 "value_loss_fitted_half",
                 "value_loss_held_out_half",
                 "leading_share",
                 "imaginary_share",
                 "kl_per_key_loss",
                 "kl_per_value_loss"});
    for (const Section& one : run_.sections) {
      for (const ModelRow& row : one.models) {
        if (!row.conversion) continue;
        for (const Layer& layer : layers_of(*row.conversion)) {
          const LayerCheck& check = layer.check;
          const LayerFold& fold = layer.fold;
          BudgetLayer rates;
          for (const BudgetLayer& rate : row.conversion->decisions.budget)
            if (rate.layer == check.layer) rates = rate;
          table.add({one.name,
                     row.name,
                     raw(row.kv_heads),
                     fmt::format("{}", check.layer),
                     fmt::format("{}", fold.groups),
                     raw(check.key_predicted),
                     raw(check.key_measured),
                     raw(check.value_predicted),
                     raw(check.value_measured),
                     raw(check.score_error),
                     raw(check.output_error),
                     raw(fold.key_energy),
                     raw(fold.value_energy),
                     raw(fold.kv_heads),
                     raw(fold.key_width),
                     raw(fold.value_width),
                     raw(fold.key_fitted),
                     raw(fold.key_held_out),
                     raw(fold.value_fitted),
                     raw(fold.value_held_out),
                     raw(fold.leading_share),
                     raw(fold.imaginary_share),
                     raw(rates.key_rate),
                     raw(rates.value_rate)});
        }
      }
    }
    return table.csv();
  }

  std::string timing_csv() const {
    Table table({"base_model", "stage", "file", "unix_time", "seconds", "ranks", "threads_per_rank", "hosts",
                 "peak_resident_bytes", "tokens_per_second", "headfold_version"});
    each_record(
        [&](const Section& one, const std::string& stage, const std::string& file, const Record& record, Maybe rate) {
          table.add({one.name, stage, file, record.date > 0 ? fmt::format("{:.0f}", record.date) : "",
                     raw(record.seconds), raw(record.ranks), raw(record.threads_per_rank), raw(record.hosts),
                     raw(record.peak_resident_bytes), raw(rate), record.version});
        });
    return table.csv();
  }

  const RunData& run_;
  std::string title_;
  Document document_;
  int figures_ = 0;
};

}  // namespace

std::string headline(const Section& section) {
  return headline_words(section).plain();
}

Page make_page(const RunData& run, const std::string& title) {
  return Builder(run, title).build();
}

std::filesystem::path write_report(const std::filesystem::path& folder, const Page& page) {
  const std::vector<std::pair<std::string, const std::string*>> files = {{"report.md", &page.markdown},
                                                                         {"quality.csv", &page.quality_csv},
                                                                         {"layers.csv", &page.layers_csv},
                                                                         {"timing.csv", &page.timing_csv},
                                                                         {"refit.csv", &page.refit_csv},
                                                                         {"compare.csv", &page.compare_csv},
                                                                         {"benchmarks.csv", &page.benchmarks_csv},
                                                                         {"index.html", &page.html}};
  std::error_code code;
  if (fs::exists(folder, code) && !fs::is_directory(folder, code))
    throw UsageError(fmt::format("{} exists and is not a folder", folder.string()), "choose another --out");
  // report.md is written first and names us, so an interrupted report is recognised as ours.
  const fs::path markdown = folder / "report.md";
  const bool ours = fs::is_regular_file(markdown, code) && read_file(markdown).starts_with(kMarkdownMark);
  if (!ours)
    for (const auto& [name, content] : files)
      if (fs::exists(folder / name, code))
        throw UsageError(fmt::format("{} exists and was not written by headfold report", (folder / name).string()),
                         "choose another --out, or move that file");
  // All or none: they become visible when the last one is on disk.
  const auto unfinished = [&](const std::string& name) { return folder / ("." + name + ".unfinished"); };
  const bool made = !fs::exists(folder, code);
  try {
    for (const auto& [name, content] : files) write_file(unfinished(name), *content);
  } catch (...) {
    for (const auto& [name, content] : files) fs::remove(unfinished(name), code);
    if (made) fs::remove(folder, code);
    throw;
  }
  for (const auto& [name, content] : files) fs::rename(unfinished(name), folder / name);
  return folder / "index.html";
}

}  // namespace headfold::report
