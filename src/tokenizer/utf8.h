#pragma once
// UTF-8, as far as tokenizers need it.

#include <cstddef>
#include <string>
#include <string_view>

namespace headfold::tokenizer {

/// Position of the first byte of `text` that is not part of well-formed UTF-8 (overlong forms, surrogates and values
/// above U+10FFFF are not), or std::string_view::npos.
std::size_t invalid_utf8_at(std::string_view text);

/// Throws InputError naming `what` and the byte position when `text` is not well-formed UTF-8.
void check_utf8(std::string_view text, std::string_view what);

/// Well-formed UTF-8 from any bytes: each maximal broken part becomes one U+FFFD, as the Unicode standard recommends.
std::string replace_invalid_utf8(std::string_view bytes);

/// `text` with the line ends CR LF and CR as LF, as Python reads text files.
std::string unix_lines(std::string_view text);

struct CodePoint {
  char32_t value;
  std::size_t bytes;  ///< length of its UTF-8 form, 1 to 4
};

/// The character at byte `position` of well-formed UTF-8. The position must be the first byte of a character.
inline CodePoint code_point_at(std::string_view text, std::size_t position) {
  const auto byte = [&](std::size_t i) {
    return static_cast<char32_t>(static_cast<unsigned char>(text[position + i]));
  };
  const char32_t first = byte(0);
  if (first < 0x80) return {first, 1};
  if (first < 0xE0) return {((first & 0x1F) << 6) | (byte(1) & 0x3F), 2};
  if (first < 0xF0) return {((first & 0x0F) << 12) | ((byte(1) & 0x3F) << 6) | (byte(2) & 0x3F), 3};
  return {((first & 0x07) << 18) | ((byte(1) & 0x3F) << 12) | ((byte(2) & 0x3F) << 6) | (byte(3) & 0x3F), 4};
}

/// Appends the UTF-8 form of a character.
void append_utf8(std::string& text, char32_t value);

/// Unicode property White_Space. This is what `\s` means in the regular-expression engines of the tokenizers library;
/// Python's str.isspace() has U+001C to U+001F as well.
bool is_white_space(char32_t value);

}  // namespace headfold::tokenizer
