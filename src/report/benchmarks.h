#pragma once
// Benchmarks of a base model and of what was made from it, side by side: comparison on the same documents, tables and
// figures. Private to src/report.

#include <headfold/report/document.h>
#include <headfold/report/fold_sections.h>
#include <headfold/report/run_data.h>

#include <string>
#include <vector>

namespace headfold::report {

/// Puts the benchmark results of a section's models together and compares each with the first original's.
Benchmarks benchmarks_of(const std::vector<ModelRow>& models);

/// The part of a section about benchmarks; nothing where none was run.
void benchmark_sections(Document& document, const Section& section, const NewId& id);

std::string benchmarks_csv(const RunData& run);

}  // namespace headfold::report
