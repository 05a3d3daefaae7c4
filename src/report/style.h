#pragma once

namespace headfold::report {

/// The page's style sheet. Private to src/report.
extern const char* const kStyle;

}  // namespace headfold::report
