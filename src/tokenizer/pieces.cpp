#include <headfold/tokenizer/pieces.h>
#include <headfold/tokenizer/utf8.h>

#include <algorithm>

namespace headfold::tokenizer {
namespace {

constexpr bool maps_to_itself(int byte) {
  return (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || (byte >= 174 && byte <= 255);
}

/// Character of each byte, and the byte of each character below 0x144 (the map needs 68 characters from U+0100 on).
struct ByteMap {
  std::array<char32_t, 256> character{};
  std::array<int, 0x144> byte{};
};

constexpr ByteMap make_byte_map() {
  ByteMap map;
  for (int& byte : map.byte) byte = -1;
  char32_t next = 0x100;
  for (int byte = 0; byte < 256; ++byte) {
    const char32_t character = maps_to_itself(byte) ? static_cast<char32_t>(byte) : next++;
    map.character[static_cast<std::size_t>(byte)] = character;
    map.byte[character] = byte;
  }
  return map;
}

constexpr ByteMap byte_map = make_byte_map();

}  // namespace

std::string replace_all(std::string_view text, std::string_view from, std::string_view to) {
  std::string result;
  result.reserve(text.size() + text.size() / 4);
  for (std::size_t begin = 0;;) {
    const std::size_t found = text.find(from, begin);
    result.append(text.substr(begin, found == std::string_view::npos ? found : found - begin));
    if (found == std::string_view::npos) return result;
    result.append(to);
    begin = found + from.size();
  }
}

bool crosses_space(std::string_view token) {
  for (std::size_t at = token.find(space_symbol); at != std::string_view::npos;
       at = token.find(space_symbol, at + space_symbol.size()))
    if (at > 0 && !token.substr(0, at).ends_with(space_symbol)) return true;
  return false;
}

std::vector<std::string_view> cut_before_spaces(std::string_view text) {
  std::vector<std::string_view> parts;
  for (std::size_t begin = 0; begin < text.size();) {
    std::size_t end = begin;
    while (text.substr(end).starts_with(space_symbol)) end += space_symbol.size();
    end = std::min(text.size(), text.find(space_symbol, end));
    parts.push_back(text.substr(begin, end - begin));
    begin = end;
  }
  return parts;
}

bool in_bloom_word(char32_t value) {
  switch (value) {
    case U'(':
    case U')':
    case U'|':
    case U'.':
    case U',':
    case U'!':
    case U'?':
    case U'\u2026':  // horizontal ellipsis
    case U'\u3002':  // ideographic full stop
    case U'\uFF0C':  // fullwidth comma
    case U'\u3001':  // ideographic comma
    case U'\u0964':  // devanagari danda
    case U'\u06D4':  // arabic full stop
    case U'\u060C':  // arabic comma
      return false;
    default:
      return !is_white_space(value);
  }
}

std::vector<std::string_view> split_bloom(std::string_view text) {
  std::vector<std::string_view> pieces;
  std::size_t pending = 0;  // start of the stretch that belongs to no word so far
  std::size_t position = 0;
  while (position < text.size()) {
    std::size_t end = position + (text[position] == ' ' ? 1 : 0);
    const std::size_t word = end;
    while (end < text.size()) {
      const CodePoint character = code_point_at(text, end);
      if (!in_bloom_word(character.value)) break;
      end += character.bytes;
    }
    if (end == word) {
      position += code_point_at(text, position).bytes;
      continue;
    }
    if (pending < position) pieces.push_back(text.substr(pending, position - pending));
    pieces.push_back(text.substr(position, end - position));
    position = pending = end;
  }
  if (pending < text.size()) pieces.push_back(text.substr(pending));
  return pieces;
}

bool is_bloom_pattern(std::string_view pattern) {
  // The published spelling, and the same set written without the nested class.
  static constexpr std::array<std::string_view, 2> known = {R"( ?[^(\s|[.,!?…。，、।۔،])]+)",
                                                            R"( ?[^(\s|.,!?…。，、।۔،)]+)"};
  return std::find(known.begin(), known.end(), pattern) != known.end();
}

const std::array<std::string, 256>& byte_symbols() {
  static const std::array<std::string, 256> symbols = [] {
    std::array<std::string, 256> result;
    for (std::size_t byte = 0; byte < 256; ++byte) append_utf8(result[byte], byte_map.character[byte]);
    return result;
  }();
  return symbols;
}

int byte_of_symbol(char32_t value) {
  return value < byte_map.byte.size() ? byte_map.byte[value] : -1;
}

}  // namespace headfold::tokenizer
