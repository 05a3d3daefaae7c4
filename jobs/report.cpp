#include <headfold/report/page.h>
#include <headfold/report/run_data.h>

#include <spdlog/spdlog.h>

#include <iostream>

#include "job.h"

namespace headfold::jobs {

po::options_description report_options() {
  po::options_description own("report options");
  own.add_options()("run", po::value<std::string>()->required(),
                    "folder of a run: calibrations, converted models and results anywhere below it")(
      "out", po::value<std::string>(), "folder for the report (default: RUN/report)")(
      "title", po::value<std::string>()->default_value(""), "heading of the page")(
      "dry-run", "say what was found and what would be written, and stop");
  return own;
}

void report(const Context& context, const std::vector<std::string>& arguments) {
  const auto values =
      parse(context, "report", "headfold report --run DIR [--out DIR] [--title TEXT]", report_options(), arguments);
  // Reading a few JSON files gains nothing from ranks: rank 0 does it.
  if (!context.world.root()) return;
  namespace fs = std::filesystem;
  const fs::path run = values["run"].as<std::string>();
  const fs::path out = values.count("out") > 0 ? fs::path(values["out"].as<std::string>()) : run / "report";
  if (out.empty()) throw UsageError("--out is empty", "name a folder");
  const report::RunData data = report::read_run(run);
  for (const report::Section& section : data.sections) {
    std::size_t conversions = 0, evaluated = 0;
    for (const report::ModelRow& row : section.models) {
      conversions += row.conversion ? 1 : 0;
      evaluated += row.evaluation ? 1 : 0;
    }
    spdlog::info("{}: {} calibration{}, {} conversion{}, {} evaluated model{}", section.name,
                 section.calibrations.size(), section.calibrations.size() == 1 ? "" : "s", conversions,
                 conversions == 1 ? "" : "s", evaluated, evaluated == 1 ? "" : "s");
    for (const auto* sentences : {&section.missing, &section.benchmarks.notes})
      for (const std::string& sentence : *sentences) spdlog::info("  {}", sentence);
  }
  if (values.count("dry-run") > 0) {
    std::cout << fmt::format(
        "would write index.html, report.md, quality.csv, layers.csv, timing.csv, refit.csv, compare.csv and "
        "benchmarks.csv into {}\n",
        out.string());
    return;
  }
  const fs::path page = report::write_report(out, report::make_page(data, values["title"].as<std::string>()));
  for (const report::Section& section : data.sections) std::cout << report::headline(section) << "\n";
  std::cout << page.string() << "\n";
}

}  // namespace headfold::jobs
