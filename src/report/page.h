#pragma once
// The report itself: one HTML page that needs nothing beside it, the same content as Markdown, and the figures' numbers
// as CSV.

#include <headfold/report/run_data.h>

#include <filesystem>
#include <string>

namespace headfold::report {

struct Page {
  std::string html, markdown, quality_csv, layers_csv, timing_csv, refit_csv, compare_csv, benchmarks_csv;
};

/// Lays out what read_run() found. The same data gives the same bytes. `title` is the page's heading; empty: one from
/// the run's name.
Page make_page(const RunData& run, const std::string& title = {});

/// What a base model's section opens with: the best result in one or two sentences, computed from the data.
std::string headline(const Section& section);

/// Writes index.html, report.md, quality.csv, layers.csv, timing.csv, refit.csv, compare.csv and benchmarks.csv into
/// `folder`, each atomically, the page last. Returns the page's path. Throws UsageError when the folder holds files of
/// these names that are not from an earlier report, IoError.
std::filesystem::path write_report(const std::filesystem::path& folder, const Page& page);

}  // namespace headfold::report
