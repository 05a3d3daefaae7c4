#pragma once
// Requests as tokens: the harness's pair encoding and its limits (docs/evaluation.md, "Encoding").

#include <headfold/checkpoint/config.h>
#include <headfold/comm/communicator.h>
#include <headfold/evaluation/requests.h>
#include <headfold/tokenizer/tokenizer.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace headfold::evaluation {

/// Releases of the harness that put BOS before prompts or not: up to 0.4.9.1 never, from 0.4.9.2 as the tokenizer does.
enum class HarnessVersion { v0_4_9_1, v0_4_9_2 };
HarnessVersion parse_harness_version(const std::string& name);  ///< "0.4.9.1", "0.4.9.2"; UsageError otherwise
const char* name_of(HarnessVersion version);
/// The BOS policy of a benchmark: what was asked for, and for `model_default` what that release does.
tokenizer::Bos benchmark_bos(tokenizer::Bos asked, HarnessVersion version);

/// Tokens a model reads at most: config.json's n_positions, max_position_embeddings, n_ctx in this order, else
/// model_max_length of tokenizer_config.json beside it, else 2048.
std::int64_t harness_max_length(const checkpoint::ModelConfig& config);

/// A question as tokens. Choices of one question share their context.
struct EncodedRequest {
  std::shared_ptr<const std::vector<std::int32_t>> context;
  std::vector<std::int32_t> continuation;  ///< log_likelihood only
};

class Encoder {
 public:
  /// `policy` says whether BOS comes first. The tokenizer must outlive the encoder.
  Encoder(const tokenizer::Tokenizer& tokenizer, tokenizer::Bos policy);
  /// Ids of a text under the policy. A text that begins with the text of BOS gets that token once, whatever the policy.
  std::vector<std::int64_t> encode(std::string_view text) const;
  /// Context and continuation: white space at the end of the context moves to the continuation, both are encoded
  /// together, and the continuation is what is longer than the context alone. An empty context is the prefix token.
  std::pair<std::vector<std::int64_t>, std::vector<std::int64_t>> pair(const std::string& context,
                                                                       const std::string& continuation) const;
  /// pair() or, for generation, encode() of the context. InputError naming document, request and texts when context or
  /// continuation have no token.
  EncodedRequest request(const Request& request) const;
  /// BOS, else EOS. InputError when the tokenizer has neither.
  std::int64_t prefix() const;

 private:
  const tokenizer::Tokenizer& tokenizer_;
  tokenizer::Bos policy_;
  std::string bos_text_;
  // The context of the request before: choices come one after the other.
  mutable std::string last_text_;
  mutable std::vector<std::int64_t> last_ids_;
  mutable std::shared_ptr<const std::vector<std::int32_t>> last_context_;
};

/// All requests, every rank encoding a share of them; the same on every rank. Collective.
std::vector<EncodedRequest> encode_requests(const comm::Communicator& world, const Encoder& encoder,
                                            const std::vector<const Request*>& requests);

}  // namespace headfold::evaluation
