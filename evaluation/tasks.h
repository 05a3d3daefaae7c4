#pragma once
// Perplexity tasks: which windows a text becomes, under a name that says how.

#include <headfold/evaluation/windows.h>
#include <headfold/tokenizer/tokenizer.h>

#include <filesystem>
#include <string>
#include <vector>

namespace headfold::evaluation {

/// How documents become the one token stream of `ppl_blocks`.
enum class Joiner {
  automatic,  ///< `documents` for .jsonl, `paper` for any other file
  documents,  ///< every document tokenised by itself, a token at each boundary (calibration::token_stream)
  paper,  ///< rows joined with "\n\n" (a line of a text file with its newline, or a .jsonl document), one tokenisation,
          ///< BOS once
};
Joiner parse_joiner(const std::string& name);       ///< UsageError lists the names
tokenizer::Bos parse_bos(const std::string& name);  ///< default, always, never; UsageError otherwise
const char* name_of(tokenizer::Bos bos);

/// Files of one text.
struct TextSource {
  std::vector<std::filesystem::path> files;
  std::string field = "text";  ///< of .jsonl files
  Joiner joiner = Joiner::automatic;
  tokenizer::Bos bos = tokenizer::Bos::model_default;
};

/// A document of a rolling task. Words and bytes are counted on `original`; `scored` is what is tokenised.
struct Document {
  std::string original;
  std::string scored;
  std::int64_t words = 0;
  std::int64_t bytes = 0;
};

enum class TaskKind { blocks, rolling };

struct Task {
  TaskKind kind = TaskKind::blocks;
  std::string name;                                    ///< "ppl_blocks@256", "rolling", "wikitext"
  std::string recipe;                                  ///< how the windows were made, for people
  tokenizer::Bos bos = tokenizer::Bos::model_default;  ///< rule by which the text was tokenised
  std::vector<std::filesystem::path> files;            ///< of the text
  std::string field;                                   ///< of .jsonl files
  std::int64_t max_length = 0;                         ///< tokens of a window
  std::int64_t stream_tokens = 0;                      ///< tokens of the whole text
  std::int64_t items_original = 0;                     ///< windows (blocks) or documents (rolling) before the limit
  std::int64_t items = 0;                              ///< after it
  std::vector<Document> documents;                     ///< rolling only
  std::vector<Window> windows;
  std::int64_t predictions() const;  ///< scored tokens
  std::int64_t input_tokens() const;
};

/// The papers' perplexity (docs/evaluation.md). `limit` 0 = all windows. Throws InputError when the text is shorter
/// than one window, UsageError for a mixture of .jsonl and text files without a joiner, IoError / CorruptFile for the
/// files.
Task blocks_task(const tokenizer::Tokenizer& tokenizer, const TextSource& source, std::int64_t length,
                 std::int64_t limit = 0);

/// The harness's rolling perplexity. `.raw` files are WikiText: pages, detokenised (task `wikitext`); anything else is
/// documents as they stand (task `rolling`). `limit` 0 = all documents. InputError when no document has a token or the
/// tokenizer has neither BOS nor EOS.
Task rolling_task(const tokenizer::Tokenizer& tokenizer, const TextSource& source, std::int64_t max_length,
                  std::int64_t limit = 0);

struct PerplexityText;
/// A text that `--tasks` names (registry.h): the rolling form, or blocks named "wikitext2_ppl_blocks@2048", tokenised
/// once with BOS by policy. `limit` 0 = all windows or documents. Errors as of the two above and joined_text().
Task perplexity_task(const tokenizer::Tokenizer& tokenizer, const PerplexityText& text, std::int64_t length,
                     tokenizer::Bos bos, std::int64_t limit = 0);

/// Throws InputError naming window and model when an id is outside 0 .. vocab-1.
void check_ids(const Task& task, std::int64_t vocab, const std::string& model);

}  // namespace headfold::evaluation
