#pragma once
// Cutting text into the pieces that byte-pair merging works on, and GPT-2's byte map.

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace headfold::tokenizer {

/// Lets a map with string keys be searched by string_view.
struct TextHash {
  using is_transparent = void;
  std::size_t operator()(std::string_view text) const { return std::hash<std::string_view>{}(text); }
};
template <class T>
using TextMap = std::unordered_map<std::string, T, TextHash, std::equal_to<>>;

/// U+2581, which stands for a space in SentencePiece vocabularies.
inline constexpr std::string_view space_symbol = "\xE2\x96\x81";

std::string replace_all(std::string_view text, std::string_view from, std::string_view to);

/// Whether a token has a U+2581 after another character, so that a merge can join what comes before a space with what
/// comes after.
bool crosses_space(std::string_view token);

/// Cuts text at the start of every run of U+2581. When no token crosses_space(), merging the parts gives what merging
/// the whole does.
std::vector<std::string_view> cut_before_spaces(std::string_view text);

/// The ids of pieces met before. Not thread-safe.
class PieceCache {
 public:
  /// Ids of `piece`, from the cache when it is short and was seen before, else by `encode(piece)`.
  template <class Encode>
  void append(std::string_view piece, std::vector<std::int64_t>& ids, const Encode& encode) {
    if (piece.size() > longest) {
      const std::vector<std::int32_t> fresh = encode(piece);
      ids.insert(ids.end(), fresh.begin(), fresh.end());
      return;
    }
    auto found = known_.find(piece);
    if (found == known_.end()) {
      if (known_.size() >= most) known_.clear();
      found = known_.emplace(std::string(piece), encode(piece)).first;
    }
    ids.insert(ids.end(), found->second.begin(), found->second.end());
  }

 private:
  static constexpr std::size_t longest = 64, most = 200000;  // bytes of a piece, pieces
  TextMap<std::vector<std::int32_t>> known_;
};

/// Whether BLOOM's pre-tokenizer counts a character as part of a word: its pattern ` ?[^(\s|[.,!?…。，、।۔،])]+` has a
/// nested class, so white space, ( ) | and the punctuation . , ! ? U+2026 U+3002 U+FF0C U+3001 U+0964 U+06D4 U+060C are
/// not (docs/formats.md, "BLOOM").
bool in_bloom_word(char32_t value);

/// BLOOM's Split: a word with the U+0020 before it is a piece, and so is every stretch between two words. The pieces
/// view `text`, which must be well-formed UTF-8, and cover all of it.
std::vector<std::string_view> split_bloom(std::string_view text);

/// Whether a pattern found in a tokenizer.json is one of the spellings of BLOOM's.
bool is_bloom_pattern(std::string_view pattern);

/// GPT-2's byte map: the character (as UTF-8) that stands for each byte in a byte-level vocabulary. Printable bytes
/// stand for themselves, the others for U+0100, U+0101, … in order.
const std::array<std::string, 256>& byte_symbols();

/// The byte a character stands for, or -1.
int byte_of_symbol(char32_t value);

}  // namespace headfold::tokenizer
