#pragma once
// Text rules of the evaluation harness and of the compression papers that move numbers (docs/evaluation.md): pages of
// WikiText, their detokeniser, the counts perplexities are divided by, and the papers' joined text.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace headfold::evaluation {

/// Pages of a raw WikiText file (`wiki.test.raw`): a page begins at a line " = Title = ". Blank pages are left out.
std::vector<std::string> wikitext_pages(std::string_view raw);

/// Undoes WikiText's tokenisation (" @-@ ", " , ", "= =", spaces inside brackets and quotes, …), rule by rule in the
/// harness's order.
std::string wikitext_detokenize(std::string_view page);

/// Pieces of a split on runs of Unicode whitespace, empty first and last pieces counted (Python's len(re.split(r"\s+",
/// text))).
std::int64_t count_words(std::string_view text);

/// Lines of a text, each with its own newline; blank lines (whitespace only) become empty strings, as in the published
/// data set rows.
std::vector<std::string> text_rows(std::string_view raw);

/// The papers' one text: rows joined with "\n\n".
std::string join_rows(const std::vector<std::string>& rows);

/// Bytes of the Unicode whitespace character at the start of `text` (Python's \s), 0 when there is none.
std::size_t leading_space_bytes(std::string_view text);

/// `text` without Unicode whitespace at both ends.
std::string_view strip(std::string_view text);

}  // namespace headfold::evaluation
