#include <headfold/base/error.h>
#include <headfold/tokenizer/utf8.h>

#include <cstdint>
#include <cstring>

namespace headfold::tokenizer {
namespace {

/// Length of the well-formed character that starts at `position`, or 0 when it is broken; `broken_length` then gets the
/// length of the maximal broken part (Unicode 15, table 3-7 and section 3.9).
std::size_t well_formed_length(std::string_view text, std::size_t position, std::size_t& broken_length) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte(position);
  broken_length = 1;
  if (first < 0x80) return 1;
  std::size_t length = 0;
  unsigned char low = 0x80, high = 0xBF;  // bounds of the second byte
  if (first >= 0xC2 && first <= 0xDF) {
    length = 2;
  } else if (first >= 0xE0 && first <= 0xEF) {
    length = 3;
    if (first == 0xE0) low = 0xA0;
    if (first == 0xED) high = 0x9F;
  } else if (first >= 0xF0 && first <= 0xF4) {
    length = 4;
    if (first == 0xF0) low = 0x90;
    if (first == 0xF4) high = 0x8F;
  } else {
    return 0;
  }
  for (std::size_t i = 1; i < length; ++i) {
    if (position + i >= text.size()) return 0;
    const unsigned char next = byte(position + i);
    if (next < low || next > high) return 0;
    low = 0x80;
    high = 0xBF;
    broken_length = i + 1;
  }
  return length;
}

}  // namespace

std::size_t invalid_utf8_at(std::string_view text) {
  std::size_t position = 0, broken = 0;
  while (position < text.size()) {
    // Eight ASCII bytes at a time: most text is ASCII.
    while (position + 8 <= text.size()) {
      std::uint64_t word = 0;
      std::memcpy(&word, text.data() + position, 8);
      if ((word & 0x8080808080808080ULL) != 0) break;
      position += 8;
    }
    if (position == text.size()) break;
    const std::size_t length = well_formed_length(text, position, broken);
    if (length == 0) return position;
    position += length;
  }
  return std::string_view::npos;
}

void check_utf8(std::string_view text, std::string_view what) {
  const std::size_t position = invalid_utf8_at(text);
  if (position == std::string_view::npos) return;
  throw InputError(fmt::format("{} is not UTF-8: byte {} (0x{:02X}) does not belong to a character", what, position,
                               static_cast<unsigned char>(text[position])),
                   "convert the text to UTF-8, for example with iconv");
}

std::string replace_invalid_utf8(std::string_view bytes) {
  std::size_t bad = invalid_utf8_at(bytes);
  if (bad == std::string_view::npos) return std::string(bytes);
  std::string result;
  result.reserve(bytes.size() + 16);
  std::size_t position = 0;
  while (position < bytes.size()) {
    std::size_t broken = 0;
    const std::size_t length = well_formed_length(bytes, position, broken);
    if (length > 0) {
      result.append(bytes.substr(position, length));
      position += length;
    } else {
      result += "\xEF\xBF\xBD";
      position += broken;
    }
  }
  return result;
}

void append_utf8(std::string& text, char32_t value) {
  const auto put = [&](char32_t byte) { text.push_back(static_cast<char>(static_cast<unsigned char>(byte))); };
  if (value < 0x80) {
    put(value);
  } else if (value < 0x800) {
    put(0xC0 | (value >> 6));
    put(0x80 | (value & 0x3F));
  } else if (value < 0x10000) {
    put(0xE0 | (value >> 12));
    put(0x80 | ((value >> 6) & 0x3F));
    put(0x80 | (value & 0x3F));
  } else {
    put(0xF0 | (value >> 18));
    put(0x80 | ((value >> 12) & 0x3F));
    put(0x80 | ((value >> 6) & 0x3F));
    put(0x80 | (value & 0x3F));
  }
}

std::string unix_lines(std::string_view text) {
  std::string lines;
  lines.reserve(text.size());
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '\r')
      lines.push_back(text[i]);
    else if (i + 1 == text.size() || text[i + 1] != '\n')
      lines.push_back('\n');
  }
  return lines;
}

bool is_white_space(char32_t value) {
  if (value < 0x80) return value == 0x20 || (value >= 0x09 && value <= 0x0D);
  switch (value) {
    case 0x85:
    case 0xA0:
    case 0x1680:
    case 0x2028:
    case 0x2029:
    case 0x202F:
    case 0x205F:
    case 0x3000:
      return true;
    default:
      return value >= 0x2000 && value <= 0x200A;
  }
}

}  // namespace headfold::tokenizer
