#pragma once
// Greedy decoding of many prompts with a KV cache over the ranks of one pipeline.

#include <headfold/comm/grid.h>
#include <headfold/evaluation/requests.h>
#include <headfold/model/pipeline.h>
#include <headfold/tokenizer/tokenizer.h>

#include <cstdint>
#include <string>
#include <vector>

namespace headfold::evaluation {

struct Prompt {
  std::vector<std::int64_t> ids;   ///< at least one; cut to what the model can read
  std::vector<std::string> stops;  ///< texts that end the generation
  std::int64_t max_new_tokens = 0;
};

struct Generated {
  std::string text;  ///< cut at the stops
  std::int64_t tokens = 0;
};

struct GenerationOptions {
  std::int64_t slots = 1;          ///< texts at a time
  std::int64_t max_tokens = 4096;  ///< prompt tokens read in one pass (at least one prompt)
  bool share = true;               ///< copy keys and values of beginnings that another text has
  std::int64_t shortest_shared = 16;
  std::vector<std::int64_t> end_ids;  ///< tokens that end a text and are no part of it
};

/// Texts of the prompts, in their order, on every rank of the pipeline. Collective over grid.pipeline. InputError when
/// the model gives NaN. `computed` counts the rows that went through the model.
std::vector<Generated> generate_texts(const model::Pipeline& pipeline, const comm::Grid& grid,
                                      const tokenizer::Tokenizer& tokenizer, const std::vector<Prompt>& prompts,
                                      const GenerationOptions& options, std::int64_t* computed = nullptr);

}  // namespace headfold::evaluation
