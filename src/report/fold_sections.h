#pragma once
// The parts of a base model's section that look into its folds: frequencies, held-out losses, refit, what each layer
// keeps, trainings, plans compared. Each writes nothing where the run has nothing to say. Private to src/report.

#include <headfold/report/document.h>
#include <headfold/report/run_data.h>

#include <functional>
#include <string>

namespace headfold::report {

/// Gives a name that no other figure of the page has.
using NewId = std::function<std::string(const std::string& name)>;

/// Leading-eigenvalue share and imaginary share by layer and RoPE frequency, two heat maps per rope-commuting fold.
void frequency_maps(Document& document, const Section& section, const NewId& id);
/// Held-out against fitted predicted loss, and whether more calibration tokens would matter.
void held_out_losses(Document& document, const Section& section, const NewId& id);
/// What the refit did: a table per conversion, one line per layer.
void refit_tables(Document& document, const Section& section, const NewId& id);
/// What every layer keeps, where layers differ; exchange rates where they were measured.
void layer_budgets(Document& document, const Section& section, const NewId& id);
/// Trainings: what they brought, validation perplexity and training loss by step.
void trainings(Document& document, const Section& section, const NewId& id);
/// Plans that convert --compare tried, ranked.
void compared_plans(Document& document, const Section& section);

std::string refit_csv(const RunData& run);
std::string compare_csv(const RunData& run);

}  // namespace headfold::report
