#pragma once
// Text to token ids and back, over SentencePiece and tokenizer.json files.

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace headfold::tokenizer {

/// Whether encode() puts the beginning-of-sequence token first. `model_default`: LLaMA yes, BLOOM no.
enum class Bos { model_default, always, never };

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  /// Token ids of a UTF-8 text, without any added special token. Special tokens written in the text (such as "</s>")
  /// are recognised only where the format's own loader does (tokenizer.json: yes; SentencePiece: no).
  virtual std::vector<std::int64_t> encode(std::string_view text) const = 0;
  /// Text of the ids, special tokens left out.
  virtual std::string decode(const std::vector<std::int64_t>& ids) const = 0;
  /// A token as its file spells it ("<s>", "\u2581the"); InputError for an id outside the vocabulary.
  virtual std::string token_text(std::int64_t id) const = 0;
  virtual std::int64_t vocab_size() const = 0;
  virtual std::int64_t bos() const = 0;  ///< -1 when there is none
  virtual std::int64_t eos() const = 0;  ///< -1 when there is none
  /// Whether the format's own loader puts BOS before every text.
  virtual bool adds_bos() const = 0;
  virtual std::string kind() const = 0;  ///< "sentencepiece", "byte-level-bpe", "byte-fallback-bpe"

  /// encode() with the BOS policy applied.
  std::vector<std::int64_t> encode(std::string_view text, Bos policy) const;
};

/// Loads tokenizer.model, else tokenizer.json, of a model folder. Throws IoError when neither exists, CorruptFile /
/// InputError when it is broken or of an unsupported kind (the message names the part that is not supported).
std::unique_ptr<Tokenizer> load_tokenizer(const std::filesystem::path& folder);

}  // namespace headfold::tokenizer
