#pragma once
// Texts whose perplexity has a name of its own: which file, which documents, how they are joined (docs/evaluation.md).

#include <headfold/evaluation/definitions.h>

#include <string>
#include <vector>

namespace headfold::evaluation {

struct NamedText {
  PerplexityText text;  ///< without its file
  std::string about;
  std::string obtain;
  Split split;
};
/// wikitext (rolling), wikitext2, c4-palu, c4-svdllm, ptb-svdllm, ptb-new.
const std::vector<NamedText>& named_texts();

}  // namespace headfold::evaluation
