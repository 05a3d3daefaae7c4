#include <headfold/base/table.h>
#include <headfold/report/benchmarks.h>
#include <headfold/report/cells.h>
#include <headfold/report/figure.h>

#include <map>
#include <set>

namespace headfold::report {
namespace {

/// Half the width of a 95 % interval in standard errors.
constexpr double kInterval = 1.96;

std::string percent(double share) {
  return fmt::format("{:.1f}{}%", share * 100, kNbsp);
}

/// "−13.8 pp": a change of a share.
std::string points(double delta) {
  const std::string digits = fmt::format("{:.1f}", std::abs(delta) * 100);
  const std::string sign = digits == "0.0" ? "±" : delta < 0 ? "−" : "+";
  return sign + digits + kNbsp + "pp";
}

std::string score(const BenchmarkColumn& column, double value) {
  return column.share() ? percent(value) : format_significant(value, 4);
}

/// A change of a metric in the metric's own terms. Perplexities are compared as factors.
std::string change(const BenchmarkColumn& column, const BenchmarkCell& cell) {
  if (column.share()) return points(*cell.delta);
  const double value = **cell.value, base = value - *cell.delta;
  if (column.metric == "perplexity" && base > 0) return "×" + format_ratio(value / base);
  return (*cell.delta < 0 ? "−" : "+") + format_significant(std::abs(*cell.delta), 3);
}

bool better(const BenchmarkColumn& column, const BenchmarkCell& cell) {
  return (*cell.delta > 0) == column.higher_is_better;
}

/// The mark of a significant change; empty for any other.
std::string mark(const BenchmarkColumn& column, const BenchmarkCell& cell) {
  if (!cell.test || !cell.delta || !cell.test->significant() || *cell.delta == 0) return {};
  return better(column, cell) ? " ▲" : " ▼";
}

bool has_value(const BenchmarkCell& cell) {
  return cell.value && *cell.value;
}

/// A table's cell: value, and below it the change.
Cell score_cell(const BenchmarkColumn& column, const BenchmarkCell& own) {
  Cell cell{kNone};
  if (!own.value) return cell;
  cell.text = *own.value ? score(column, **own.value) : std::string(kNotFinite);
  if (own.delta)
    cell.small = change(column, own) + mark(column, own);
  else if (own.error && column.share())
    cell.small = fmt::format("±{}{:.1f}", kNbsp, *own.error * 100);
  return cell;
}

std::string documents_text(const BenchmarkColumn& column) {
  std::set<std::int64_t> counts;
  for (const BenchmarkCell& cell : column.cells)
    if (cell.documents) counts.insert(*cell.documents);
  if (counts.empty()) return {};
  if (counts.size() > 1)
    return fmt::format("{} to {} documents", format_count(*counts.begin()), format_count(*counts.rbegin()));
  return fmt::format("{} document{}", format_count(*counts.begin()), *counts.begin() == 1 ? "" : "s");
}

std::string metric_text(const BenchmarkColumn& column) {
  return column.metric + (column.filter == "none" ? "" : ", " + column.filter);
}

/// "high school physics" of mmlu_high_school_physics in mmlu.
std::string part_name(const std::string& group, const std::string& part) {
  std::string name = part.starts_with(group + "_") ? part.substr(group.size() + 1) : part;
  std::replace(name.begin(), name.end(), '_', ' ');
  return name;
}

/// What stands in the way of "×": axes and words of a test.
std::string test_text(const PairedTest& test) {
  return test.exact ? "McNemar" : "paired z";
}

std::string p_text(double p) {
  return p < 1e-4 ? std::string("<0.0001") : fmt::format("{:.{}f}", p, p < 0.001 ? 4 : 3);
}

/// Models with at least one benchmark, as indices.
std::vector<std::size_t> models_of(const Section& section, const std::vector<const BenchmarkColumn*>& columns) {
  std::vector<std::size_t> models;
  for (std::size_t m = 0; m < section.models.size(); ++m)
    if (std::any_of(columns.begin(), columns.end(),
                    [m](const auto* column) { return column->cells[m].value.has_value(); }))
      models.push_back(m);
  return models;
}

/// Mean over columns, where a model has them all.
Maybe average(const std::vector<const BenchmarkColumn*>& columns, std::size_t model, bool delta) {
  double sum = 0;
  for (const BenchmarkColumn* column : columns) {
    const BenchmarkCell& cell = column->cells[model];
    if (!has_value(cell) || (delta && !cell.delta)) return std::nullopt;
    sum += delta ? *cell.delta : **cell.value;
  }
  return sum / static_cast<double>(columns.size());
}

std::string heads_heading(const std::optional<std::int64_t>& heads) {
  return heads ? fmt::format("{} KV head{}", *heads, *heads == 1 ? "" : "s") : std::string("other models");
}

class Writer {
 public:
  Writer(Document& document, const Section& section, const NewId& id)
      : document_(document), section_(section), id_(id) {
    for (const BenchmarkColumn& column : section_.benchmarks.columns)
      if (column.above.empty()) top_.push_back(&column);
    for (const BenchmarkColumn* column : top_)
      if (column->main || column->metric == "perplexity") shown_.push_back(column);
    for (const BenchmarkColumn* column : top_)
      if (column->main && column->share()) averaged_.push_back(column);
    models_ = models_of(section_, top_);
  }

  void write() {
    if (section_.benchmarks.columns.empty()) return;
    document_.heading(3, "Benchmarks");
    document_.paragraph(best_words(), "say");
    if (!section_.benchmarks.notes.empty()) document_.missing(section_.benchmarks.notes, "Not compared, or not tested");
    overview();
    changes(averaged_, {}, "benchmarks",
            "Change of every benchmark against the original, in percentage points, with 95 % intervals of the paired "
            "differences. Filled: significant.");
    details();
    for (const BenchmarkColumn* column : top_)
      if (column->main && column->group) parts(*column);
    retrieval();
  }

 private:
  const ModelRow& row(std::size_t model) const { return section_.models[model]; }

  /// The best model of every number of KV heads, in a sentence each.
  Words best_words() const {
    Words words;
    std::map<std::int64_t, std::size_t, std::greater<>> best;
    std::map<std::int64_t, int> candidates;
    const auto change_of = [&](std::size_t model) { return average(averaged_, model, true).value_or(0); };
    for (const std::size_t m : models_) {
      if (averaged_.empty() || row(m).original || !row(m).kv_heads || !average(averaged_, m, true)) continue;
      ++candidates[*row(m).kv_heads];
      const auto found = best.find(*row(m).kv_heads);
      if (found == best.end() || change_of(m) > change_of(found->second)) best[*row(m).kv_heads] = m;
    }
    for (const auto& [heads, m] : best) {
      std::size_t lost = 0, tested = 0;
      for (const BenchmarkColumn* column : averaged_) {
        const BenchmarkCell& cell = column->cells[m];
        tested += cell.test ? 1 : 0;
        lost += cell.test && cell.test->significant() && *cell.delta < 0 ? 1 : 0;
      }
      words.add(fmt::format("{} KV head{}: ", heads, heads == 1 ? "" : "s"));
      words.strong(row(m).name);
      words.add(fmt::format("{}{} on average over {} benchmark{} ({})", candidates[heads] > 1 ? " does best, " : ": ",
                            points(change_of(m)), averaged_.size(), averaged_.size() == 1 ? "" : "s",
                            percent(*average(averaged_, m, false))));
      if (tested > 0)
        words.add((lost == 0 ? "; no loss is significant"
                             : fmt::format("; the loss is significant on {} of {}", lost, tested)) +
                  (tested < averaged_.size() ? fmt::format(" ({} of {} could be tested)", tested, averaged_.size())
                                             : std::string()));
      words.add(". ");
    }
    if (words.empty())
      words.add(models_.size() > 1 ? "Scores of each model; no average can be compared with the original's."
                                   : "Scores of one model; there is nothing to compare them with yet.");
    return words;
  }

  void overview() {
    Grid grid;
    grid.name = "Benchmarks of " + section_.name;
    grid.columns.push_back({"Model", "", false});
    for (const BenchmarkColumn* column : shown_) {
      const std::string documents = documents_text(*column);
      grid.columns.push_back({column->task, metric_text(*column) + (documents.empty() ? "" : "; " + documents), true});
    }
    const bool mean = averaged_.size() > 1;
    if (mean) grid.columns.push_back({"Average", fmt::format("{} benchmarks", averaged_.size()), true});
    for (const std::size_t m : models_) {
      std::vector<Cell> cells = {name_cell(row(m))};
      for (const BenchmarkColumn* column : shown_) {
        Cell cell = score_cell(*column, column->cells[m]);
        cell.best = best_of_its_size(*column, m);
        cells.push_back(std::move(cell));
      }
      if (mean) {
        const Maybe value = average(averaged_, m, false), delta = average(averaged_, m, true);
        cells.push_back({shown(value, percent), delta ? points(*delta) : std::string()});
      }
      grid.mark_first = grid.mark_first || row(m).original;
      grid.rows.push_back(std::move(cells));
    }
    document_.table(grid);
    document_.paragraph(
        fmt::format(
            "Below each score: its change against the original on the same documents, in percentage points (pp); below "
            "the original's: its standard error. ▼ and ▲: a significant loss or gain, two-sided p < {} in a paired "
            "test over documents: McNemar's exact test where a document is right or wrong, else a z test on the mean "
            "difference. No correction for the number of comparisons: of twenty changes that are none, one is marked. "
            "Bold: the best score at that number of KV heads.",
            kSignificance),
        "note");
  }

  /// Among several models with as many KV heads.
  bool best_of_its_size(const BenchmarkColumn& column, std::size_t model) const {
    if (row(model).original || !row(model).kv_heads || !has_value(column.cells[model])) return false;
    std::size_t others = 0;
    for (const std::size_t m : models_) {
      if (m == model || row(m).original || row(m).kv_heads != row(model).kv_heads || !has_value(column.cells[m]))
        continue;
      ++others;
      const double own = **column.cells[model].value, other = **column.cells[m].value;
      if (column.higher_is_better ? other > own : other < own) return false;
    }
    return others > 0;
  }

  /// One figure per number of KV heads: rows are `columns`, `group` the one whose parts they are.
  void changes(const std::vector<const BenchmarkColumn*>& columns, const std::string& group, const std::string& name,
               const std::string& caption) {
    std::map<std::int64_t, std::vector<std::size_t>, std::greater<>> sizes;
    double low = 0, high = 0;
    const bool many = columns.size() > 24;
    for (const std::size_t m : models_) {
      if (row(m).original) continue;
      bool any = false;
      for (const BenchmarkColumn* column : columns) {
        const BenchmarkCell& cell = column->cells[m];
        if (!cell.delta || !column->share()) continue;
        any = true;
        const double error = cell.test && !many ? kInterval * cell.test->error : 0;
        low = std::min(low, (*cell.delta - error) * 100);
        high = std::max(high, (*cell.delta + error) * 100);
      }
      if (any) sizes[row(m).kv_heads.value_or(0)].push_back(m);
    }
    if (sizes.empty()) return;
    std::vector<std::string> panels;
    for (const auto& [heads, models] : sizes) {
      ChangeRows figure;
      figure.id = id_(name);
      figure.heading = heads_heading(heads > 0 ? std::optional(heads) : std::nullopt);
      figure.title =
          fmt::format("Change against the original, {}, {}", group.empty() ? "all benchmarks" : group, figure.heading);
      figure.x_title = "change against the original, percentage points";
      figure.low = low;
      figure.high = high;
      figure.width = many ? 520 : 480;
      std::string description;
      for (const std::size_t m : models) figure.key.emplace_back(row(m).name, row(m).series);
      for (const BenchmarkColumn* column : columns) {
        ChangeRows::Row line;
        line.label = group.empty() ? column->task : part_name(group, column->task);
        line.strong = column->group && !group.empty();
        if (line.strong && column->above.empty()) line.label = "all";
        for (const std::size_t m : models) {
          const BenchmarkCell& cell = column->cells[m];
          if (!cell.delta || !column->share()) continue;
          ChangeRows::Mark one;
          one.value = *cell.delta * 100;
          one.error = cell.test && !many ? kInterval * cell.test->error * 100 : 0;
          one.colour = row(m).series;
          one.filled = cell.test && cell.test->significant();
          one.hint = fmt::format("{}, {}: {}{}", row(m).name, line.label, points(*cell.delta),
                                 cell.test ? ", p " + p_text(cell.test->p) : std::string(", not tested"));
          if (!many || line.strong) description += one.hint + ". ";
          line.marks.push_back(std::move(one));
        }
        // Tasks that no model of this size was asked.
        if (!line.marks.empty()) figure.rows.push_back(std::move(line));
      }
      figure.description = description;
      panels.push_back(figure.svg());
    }
    Words words;
    words.strong("Change against the original.");
    words.add(" " + caption);
    document_.figure(panels, "panels wide", words);
  }

  void details() {
    Grid grid;
    grid.name = "Paired tests of " + section_.name;
    grid.columns = {{"Model", "", false},
                    {"Benchmark", "metric", false},
                    {"Score", "± standard error", true},
                    {"Change", "± standard error", true},
                    {"Lost", "documents", true},
                    {"Gained", "documents", true},
                    {"Test", "", false},
                    {"p", "two-sided", true}};
    for (const std::size_t m : models_) {
      for (const BenchmarkColumn* column : top_) {
        const BenchmarkCell& own = column->cells[m];
        // Means by label ("acc@0.5") are in the CSV file.
        if (!has_value(own) || row(m).original || column->metric.find('@') != std::string::npos) continue;
        std::vector<Cell> cells(grid.columns.size(), Cell{kNone});
        cells[0] = name_cell(row(m));
        cells[1] = {column->task, metric_text(*column)};
        cells[2].text = score(*column, **own.value);
        if (own.error && column->share()) cells[2].small = fmt::format("±{}{:.1f}", kNbsp, *own.error * 100);
        if (own.delta) cells[3].text = change(*column, own) + mark(*column, own);
        if (own.test) {
          const PairedTest& test = *own.test;
          if (column->share()) cells[3].small = fmt::format("±{}{:.1f}", kNbsp, test.error * 100);
          const bool higher = column->higher_is_better || column->metric == "perplexity";
          cells[4].text = format_count(higher ? test.only_first : test.only_second);
          cells[5].text = format_count(higher ? test.only_second : test.only_first);
          cells[6].text = test_text(test);
          cells[7].text = p_text(test.p);
        }
        grid.rows.push_back(std::move(cells));
      }
    }
    if (grid.rows.empty()) return;
    document_.folded("Every metric with its paired test", grid);
  }

  /// The tasks below a group: subjects of mmlu, four groups, total.
  void parts(const BenchmarkColumn& group) {
    std::vector<const BenchmarkColumn*> all = {&group}, groups = {&group};
    for (const BenchmarkColumn& column : section_.benchmarks.columns) {
      if (column.above.empty() || column.above.front() != group.task || column.metric != group.metric ||
          column.filter != group.filter)
        continue;
      all.push_back(&column);
      if (column.group) groups.push_back(&column);
    }
    if (all.size() < 2) return;
    const std::vector<std::size_t> models = models_of(section_, all);
    const bool nested = groups.size() > 1;
    document_.heading(3, group.task + " by subject");
    const auto grid_of = [&](const std::vector<const BenchmarkColumn*>& columns, const std::string& name) {
      Grid grid;
      grid.name = name;
      grid.columns.push_back({nested ? "Group or subject" : "Task", metric_text(group), false});
      grid.columns.push_back({"Documents", "", true});
      for (const std::size_t m : models) grid.columns.push_back({row(m).name, row(m).original ? "original" : "", true});
      for (const BenchmarkColumn* column : columns) {
        std::vector<Cell> cells;
        const std::string label = column == &group ? "all" : part_name(group.task, column->task);
        cells.push_back({label, column->group && column != &group ? "group" : ""});
        std::string documents = documents_text(*column);
        cells.push_back({documents.empty() ? std::string(kNone) : documents.substr(0, documents.find(" document"))});
        for (const std::size_t m : models) cells.push_back(score_cell(*column, column->cells[m]));
        grid.rows.push_back(std::move(cells));
      }
      return grid;
    };
    document_.table(grid_of(nested ? groups : all, fmt::format("{} in groups, {}", group.task, section_.name)));
    changes(all, group.task, "parts",
            nested ? "Bold rows are groups, over all documents of the subjects that follow. Filled: significant."
                   : "Filled: significant.");
    if (nested)
      document_.folded("Every subject", grid_of(all, fmt::format("{} by subject, {}", group.task, section_.name)));
  }

  void retrieval() {
    std::vector<std::string> tasks;
    for (const RetrievalMap& map : section_.benchmarks.retrieval)
      if (std::find(tasks.begin(), tasks.end(), map.task) == tasks.end()) tasks.push_back(map.task);
    for (const std::string& task : tasks) {
      document_.heading(3, task + " by depth and length");
      std::vector<std::string> panels;
      Grid grid;
      grid.name = fmt::format("{} by depth and length, {}", task, section_.name);
      std::set<double> lengths;
      for (const RetrievalMap& map : section_.benchmarks.retrieval)
        if (map.task == task) lengths.insert(map.lengths.begin(), map.lengths.end());
      grid.columns = {{"Model", "", false}, {"Depth", "0: first, 1: last", true}};
      for (const double length : lengths) grid.columns.push_back({fmt::format("{:g}", length), "tokens", true});
      for (const RetrievalMap& map : section_.benchmarks.retrieval) {
        if (map.task != task) continue;
        panels.push_back(heat_map(map));
        for (std::size_t d = 0; d < map.depths.size(); ++d) {
          std::vector<Cell> cells = {name_cell(row(map.model)), {fmt::format("{:g}", map.depths[d])}};
          for (const double length : lengths) {
            const auto at = std::find(map.lengths.begin(), map.lengths.end(), length);
            const Maybe value =
                at == map.lengths.end() ? Maybe() : map.means[d][static_cast<std::size_t>(at - map.lengths.begin())];
            cells.push_back({shown(value, percent)});
          }
          grid.rows.push_back(std::move(cells));
        }
      }
      Words words;
      words.strong(task + ".");
      words.add(
          " Share of answers that are right, by the length of the text and the place of what is hidden in it (0 % is "
          "its beginning). Darker is better on paper and light pages, lighter on dark ones; the numbers are per cent.");
      document_.figure(panels, "panels wide", words);
      document_.folded("The same as a table", grid);
    }
  }

  std::string heat_map(const RetrievalMap& map) {
    HeatMap figure;
    figure.id = id_("retrieval");
    figure.heading = row(map.model).name;
    figure.title = fmt::format("{} of {} by depth and length", map.task, row(map.model).name);
    figure.x_title = "length, tokens";
    figure.y_title = "depth";
    figure.width = 480;
    figure.key = {"<12", "12", "25", "38", "50", "62", "75", "≥88 %"};
    const bool written = map.lengths.size() <= 12;
    double sum = 0;
    std::size_t seen = 0;
    for (std::size_t d = 0; d < map.depths.size(); ++d) {
      figure.row_labels.push_back(format_share(map.depths[d]));
      std::vector<int> shades;
      std::vector<std::string> texts;
      for (const Maybe& value : map.means[d]) {
        shades.push_back(value ? std::clamp(static_cast<int>(*value * kShades), 0, kShades - 1) : -1);
        texts.push_back(value ? fmt::format("{:.0f}", *value * 100) : std::string(kNone));
        if (value) {
          sum += *value;
          ++seen;
        }
      }
      figure.shades.push_back(std::move(shades));
      if (written) figure.texts.push_back(std::move(texts));
    }
    const auto count = static_cast<double>(map.lengths.size());
    const std::size_t step = std::max<std::size_t>(1, (map.lengths.size() + 9) / 10);
    for (std::size_t l = 0; l < map.lengths.size(); l += step)
      figure.x_ticks.emplace_back((static_cast<double>(l) + 0.5) / count, fmt::format("{:g}", map.lengths[l]));
    if (seen > 0)
      figure.description = fmt::format("{} depths, {} lengths; {} on average over the cells.", map.depths.size(),
                                       map.lengths.size(), percent(sum / static_cast<double>(seen)));
    return figure.svg();
  }

  Document& document_;
  const Section& section_;
  const NewId& id_;
  std::vector<const BenchmarkColumn*> top_, shown_, averaged_;
  std::vector<std::size_t> models_;
};

}  // namespace

void benchmark_sections(Document& document, const Section& section, const NewId& id) {
  Writer(document, section, id).write();
}

std::string benchmarks_csv(const RunData& run) {
  Table table({"base_model",  "model",         "role",       "keys",      "kv_heads",    "cache_share",
               "task",        "groups",        "is_group",   "metric",    "filter",      "higher_is_better",
               "main_metric", "value",         "stderr",     "documents", "delta",       "delta_stderr",
               "test",        "only_original", "only_model", "p_value",   "significant", "result_file",
               "samples_file"});
  const auto yes = [](bool value) { return std::string(value ? "true" : "false"); };
  for (const Section& one : run.sections) {
    for (const BenchmarkColumn& column : one.benchmarks.columns) {
      for (std::size_t m = 0; m < one.models.size(); ++m) {
        const BenchmarkCell& cell = column.cells[m];
        if (!cell.value) continue;
        const ModelRow& row = one.models[m];
        const bool harness = row.evaluation && row.evaluation->harness;
        table.add({one.name,
                   row.name,
                   row.original ? "original"
                   : harness    ? "harness"
                                : "conversion",
                   row.conversion ? row.conversion->keys : "",
                   raw(row.kv_heads),
                   raw(row.share),
                   column.task,
                   joined(column.above, " "),
                   yes(column.group),
                   column.metric,
                   column.filter,
                   yes(column.higher_is_better),
                   yes(column.main),
                   raw(cell.value),
                   raw(cell.error),
                   raw(cell.documents),
                   raw(cell.delta),
                   cell.test ? raw(Maybe(cell.test->error)) : "",
                   cell.test ? cell.test->exact ? "mcnemar_exact" : "paired_z" : "",
                   cell.test ? fmt::format("{}", cell.test->only_first) : "",
                   cell.test ? fmt::format("{}", cell.test->only_second) : "",
                   cell.test ? raw(Maybe(cell.test->p)) : "",
                   cell.test ? yes(cell.test->significant()) : "",
                   cell.file,
                   cell.samples_file});
      }
    }
  }
  return table.csv();
}

}  // namespace headfold::report
