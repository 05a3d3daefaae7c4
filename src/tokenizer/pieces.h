#pragma once
// Cutting text into the pieces that byte-pair merging works on, and GPT-2's byte map.

#include <array>
#include <string>
#include <string_view>
#include <vector>

namespace headfold::tokenizer {

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
