#pragma once
// Token sequences from text files: calibration samples and evaluation streams.

#include <ATen/ATen.h>
#include <headfold/comm/communicator.h>
#include <headfold/tokenizer/tokenizer.h>

#include <filesystem>
#include <string>
#include <vector>

namespace headfold::calibration {

/// Documents of .txt (whole file = one document) and .jsonl (one per line, `field`) files in order. Throws IoError,
/// CorruptFile (file, line).
std::vector<std::string> read_documents(const std::vector<std::filesystem::path>& files,
                                        const std::string& field = "text");
/// SHA-256 over the files' names-free content and the field name.
std::string data_hash(const std::vector<std::filesystem::path>& files, const std::string& field);

/// All documents tokenised one after the other, with one token to mark each boundary: BOS before every document, or,
/// with Bos::never or a tokenizer without BOS, EOS after every document where there is one. Bos::always with a
/// tokenizer that has none is an InputError. The policy `model_default` marks with BOS for every family: what a stock
/// tokenizer does to a lone prompt says nothing about how a stream of documents is joined. Perplexity on the demo's
/// held-out text (windows of 256): LLaMA form 31.6 with BOS alone, 32.7 with BOS and EOS; BLOOM form 38.5 with BOS
/// alone, 40.9 with EOS alone.
std::vector<std::int64_t> token_stream(const tokenizer::Tokenizer& tokenizer, const std::vector<std::string>& documents,
                                       tokenizer::Bos bos = tokenizer::Bos::model_default);

/// The numbers 0 .. count - 1 in an order that `seed` decides; with `first` >= 0 only the first so many of them
/// (std::mt19937_64, own Fisher-Yates; the same on every machine).
std::vector<std::int64_t> shuffled(std::int64_t count, std::uint64_t seed, std::int64_t first = -1);

/// `samples` sequences of `length` tokens [samples, length] int64: the stream is cut into windows of `length`, and
/// windows are drawn without replacement by `seed` (shuffled()). InputError when the text has fewer windows, with both
/// numbers.
at::Tensor draw_sequences(const std::vector<std::int64_t>& stream, std::int64_t samples, std::int64_t length,
                          std::uint64_t seed);

/// Sequences to draw from text.
struct TextSample {
  std::vector<std::filesystem::path> files;
  std::string field = "text";
  std::int64_t samples = 0;
  std::int64_t length = 0;  ///< tokens of a sequence
  std::int64_t seed = 0;
  std::int64_t skip = 0;  ///< sequences drawn before these: another part of the same text
  tokenizer::Bos bos = tokenizer::Bos::model_default;
};
/// The sequences [samples, length] int64, the same on every rank: rank 0 reads and tokenises with the tokenizer of
/// `model_folder`, the others receive. Collective. InputError when the text is too short or the tokenizer gives an id
/// of `vocab` or above.
at::Tensor read_sequences(const comm::Communicator& world, const std::filesystem::path& model_folder,
                          std::int64_t vocab, const TextSample& text);

}  // namespace headfold::calibration
