#pragma once
// What is trained on: token sequences of equal length from text or from instructions, the same on every rank.

#include <headfold/comm/communicator.h>
#include <headfold/finetune/trainable.h>
#include <headfold/tokenizer/tokenizer.h>

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

namespace headfold::finetune {

enum class DataFormat {
  automatic,     ///< instructions where the first row has a prompt and an answer, text otherwise
  text,          ///< .txt: one document; .jsonl: one a line, in a field
  instructions,  ///< .jsonl rows or a .json array: instruction / input / output (Alpaca) or prompt / response
};
DataFormat parse_data_format(const std::string& name);  ///< auto, text, instructions; UsageError otherwise

struct DataOptions {
  std::vector<std::filesystem::path> files;
  DataFormat format = DataFormat::automatic;
  std::string field = "text";  ///< of text rows
  std::int64_t length = 0;     ///< tokens of a sequence, >= 2
  tokenizer::Bos bos = tokenizer::Bos::model_default;
  /// Text: attention stays inside a document (Batch::segments), and the step from one document to the next is not
  /// scored. Instructions are always kept apart.
  bool separate_documents = false;
  /// As `evaluate` scores: sequences are blocks of `length` tokens whose first token is not predicted. Otherwise the
  /// last position of a sequence predicts the first token of the next one, so that every token is predicted once.
  bool blocks = false;
  /// Instructions: leave rows out, with a count in the log, whose prompt leaves no room for an answer. Otherwise they
  /// are an error.
  bool skip_long = false;
  std::int64_t limit = 0;  ///< text: only the first so many sequences; 0: all
};

/// Token sequences of equal length. 5 bytes of memory per token.
class Dataset {
 public:
  /// `tokens` [sequences * length + 1] in order of the text; `flags` [sequences * length], bits of Flag.
  Dataset(std::int64_t length, std::vector<std::int32_t> tokens, std::vector<std::uint8_t> flags);
  enum Flag : std::uint8_t {
    unscored = 1,       ///< what this position predicts is not scored
    segment_start = 2,  ///< attention does not reach back beyond this position
  };
  std::int64_t sequences() const { return sequences_; }
  std::int64_t length() const { return length_; }
  /// Scored positions of a sequence, and of all.
  std::int64_t scored(std::int64_t sequence) const { return scored_[static_cast<std::size_t>(sequence)]; }
  std::int64_t scored() const;
  /// The given sequences, in that order. Segments are defined only where a sequence of the data set has more than one.
  Batch batch(std::span<const std::int64_t> sequences) const;
  /// Memory it takes.
  std::int64_t bytes() const;
  /// SHA-256 of tokens, flags and length: two data sets with equal fingerprints train alike.
  const std::string& fingerprint() const { return fingerprint_; }

  /// What became of the files, for the log.
  struct Origin {
    std::string kind;                        ///< "text", "instructions"
    std::int64_t documents = 0;              ///< or rows
    std::int64_t tokens = 0;                 ///< of the whole text
    std::int64_t cut = 0;                    ///< rows longer than a sequence, cut
    std::int64_t skipped = 0;                ///< rows left out
    std::int64_t left_out = 0, padding = 0;  ///< tokens of the text's end that fill no sequence; padding of rows
  };
  Origin origin;

 private:
  std::int64_t length_, sequences_;
  std::vector<std::int32_t> tokens_;
  std::vector<std::uint8_t> flags_;
  std::vector<std::int32_t> scored_;
  bool segments_ = false;
  std::string fingerprint_;
};

/// Rank 0 reads, tokenises with the tokenizer of `model_folder` and packs; all ranks receive. Collective. Rows of
/// instructions become prompt and answer with EOS behind it, scored on the answer alone, as many to a sequence as fit;
/// rows longer than a sequence are cut. InputError (file, row): no text or rows, text shorter than one sequence, fields
/// that are missing or no text, an empty answer, a prompt so long that nothing of its answer is left, token ids of
/// `vocab` or above.
Dataset read_dataset(const comm::Communicator& world, const std::filesystem::path& model_folder, std::int64_t vocab,
                     const DataOptions& options);

/// The prompt that Alpaca was trained with, up to and with "### Response:".
std::string alpaca_prompt(const std::string& instruction, const std::string& input);

/// Order of training: sequence number `index` of an endless series that runs through all sequences once per epoch, each
/// epoch in its own order, a function of (seed, epoch) alone.
class Sampler {
 public:
  Sampler(std::int64_t sequences, std::uint64_t seed) : sequences_(sequences), seed_(seed) {}
  /// Sequences [begin, begin + count) of the series. Repeats within one call where it spans epochs.
  std::vector<std::int64_t> draw(std::int64_t begin, std::int64_t count);
  std::int64_t epoch_of(std::int64_t index) const { return index / sequences_; }

 private:
  std::int64_t sequences_;
  std::uint64_t seed_;
  std::int64_t epoch_ = -1;
  std::vector<std::int64_t> order_;
};

/// A number that depends on all bits of its arguments (splitmix64): seeds of single steps from the seed of a run.
std::uint64_t mixed(std::uint64_t seed, std::uint64_t a, std::uint64_t b = 0);

}  // namespace headfold::finetune
