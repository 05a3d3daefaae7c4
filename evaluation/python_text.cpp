#include <headfold/evaluation/case_tables.h>
#include <headfold/evaluation/python_text.h>
#include <headfold/evaluation/text.h>
#include <headfold/tokenizer/utf8.h>

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <iterator>

namespace headfold::evaluation {
namespace {

using tokenizer::append_utf8;
using tokenizer::code_point_at;

template <std::size_t N>
char32_t mapped(const std::array<CaseRange, N>& table, char32_t character) {
  const auto after = std::upper_bound(table.begin(), table.end(), character,
                                      [](char32_t value, const CaseRange& range) { return value < range.first; });
  // Ranges of step 2 interleave, so the one that holds a character may lie a few before.
  for (auto range = after; range != table.begin();) {
    --range;
    if (character <= range->last && (character - range->first) % range->step == 0)
      return static_cast<char32_t>(static_cast<std::int64_t>(character) + range->delta);
    if (character - range->first > 256) break;
  }
  return character;
}

template <std::size_t N>
bool is_in(const std::array<CharacterRange, N>& table, char32_t character) {
  const auto after = std::upper_bound(table.begin(), table.end(), character,
                                      [](char32_t value, const CharacterRange& range) { return value < range.first; });
  return after != table.begin() && character <= std::prev(after)->last;
}

constexpr char32_t kSigma = 0x3A3;

/// Unicode's Final_Sigma: a letter before the sigma at `at` and none after it, marks and points between not counted.
bool ends_word(std::string_view text, std::size_t at) {
  bool letter_before = false;
  for (std::size_t end = at; end > 0;) {
    std::size_t begin = end - 1;
    while (begin > 0 && (static_cast<unsigned char>(text[begin]) & 0xC0U) == 0x80U) --begin;
    const char32_t character = code_point_at(text, begin).value;
    end = begin;
    if (is_in(kCaseIgnorable, character)) continue;
    letter_before = is_in(kCased, character);
    break;
  }
  if (!letter_before) return false;
  for (std::size_t next = at + code_point_at(text, at).bytes; next < text.size();) {
    const auto character = code_point_at(text, next);
    next += character.bytes;
    if (is_in(kCaseIgnorable, character.value)) continue;
    return !is_in(kCased, character.value);
  }
  return true;
}

void append_lower(std::string& text, char32_t character) {
  if (character < 0x80) {
    text.push_back(static_cast<char>(character >= 'A' && character <= 'Z' ? character + 32 : character));
  } else if (character == 0x130) {  // the one character whose lower case is two
    text += "i\xCC\x87";
  } else {
    append_utf8(text, mapped(kLower, character));
  }
}

/// What follows `begin`, in lower case; what is before it counts as its beginning all the same.
std::string lower_from(std::string_view text, std::size_t begin) {
  std::string result;
  result.reserve(text.size());
  for (std::size_t at = begin; at < text.size();) {
    const auto character = code_point_at(text, at);
    if (character.value == kSigma) {
      result += ends_word(text, at) ? "ς" : "σ";
    } else {
      append_lower(result, character.value);
    }
    at += character.bytes;
  }
  return result;
}

void append_title(std::string& text, char32_t character) {
  if (character < 0x80) {
    text.push_back(static_cast<char>(character >= 'a' && character <= 'z' ? character - 32 : character));
    return;
  }
  const auto found = std::find_if(kTitleExpansions.begin(), kTitleExpansions.end(),
                                  [&](const CaseExpansion& expansion) { return expansion.from == character; });
  if (found == kTitleExpansions.end()) {
    append_utf8(text, mapped(kTitle, character));
    return;
  }
  for (const char32_t part : found->to)
    if (part != 0) append_utf8(text, part);
}

}  // namespace

bool is_digit_character(char32_t character) {
  return is_in(kDigits, character);
}

std::int64_t code_points(std::string_view text) {
  return std::count_if(text.begin(), text.end(),
                       [](char byte) { return (static_cast<unsigned char>(byte) & 0xC0U) != 0x80U; });
}

std::string lower(std::string_view text) {
  return lower_from(text, 0);
}

std::string capitalize(std::string_view text) {
  if (text.empty()) return {};
  const auto first = code_point_at(text, 0);
  std::string result;
  append_title(result, first.value);
  return result + lower_from(text, first.bytes);
}

std::vector<std::string> split_words(std::string_view text) {
  std::vector<std::string> words;
  std::size_t begin = 0;
  const auto close = [&](std::size_t end) {
    if (end > begin) words.emplace_back(text.substr(begin, end - begin));
  };
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t space = leading_space_bytes(text.substr(at));
    if (space > 0) {
      close(at);
      begin = at + space;
    }
    at += std::max<std::size_t>(space, 1);
  }
  close(text.size());
  return words;
}

std::vector<std::string> split_on(std::string_view text, std::string_view separator) {
  std::vector<std::string> pieces;
  std::size_t at = 0;
  for (std::size_t found = text.find(separator); found != std::string_view::npos; found = text.find(separator, at)) {
    pieces.emplace_back(text.substr(at, found - at));
    at = found + separator.size();
  }
  pieces.emplace_back(text.substr(at));
  return pieces;
}

std::string replaced(std::string_view text, std::string_view from, std::string_view to) {
  std::string result;
  std::size_t at = 0;
  for (std::size_t found = text.find(from); found != std::string_view::npos; found = text.find(from, at)) {
    result.append(text.substr(at, found - at)).append(to);
    at = found + from.size();
  }
  return result.append(text.substr(at));
}

std::string python_list(const std::vector<std::string>& items) {
  std::string text = "[";
  for (std::size_t i = 0; i < items.size(); ++i) {
    const std::string& item = items[i];
    const bool apostrophe = item.find('\'') != std::string::npos;
    const char quote = apostrophe && item.find('"') == std::string::npos ? '"' : '\'';
    text += i > 0 ? ", " : "";
    text += quote;
    for (const char c : item) {
      if (c == '\\' || c == quote) {
        text += '\\';
        text += c;
      } else if (c == '\n') {
        text += "\\n";
      } else if (c == '\r') {
        text += "\\r";
      } else if (c == '\t') {
        text += "\\t";
      } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) {
        text += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
      } else {
        text += c;
      }
    }
    text += quote;
  }
  return text + "]";
}

bool is_word_character(char32_t character) {
  if (character < 0x80)
    return (character >= '0' && character <= '9') || (character >= 'a' && character <= 'z') ||
           (character >= 'A' && character <= 'Z') || character == '_';
  if (character < 0xC0)
    return character == 0xAA || character == 0xB5 || character == 0xBA || character == 0xB2 || character == 0xB3 ||
           character == 0xB9 || (character >= 0xBC && character <= 0xBE);
  if (character == 0xD7 || character == 0xF7 || character == 0x1680) return false;
  if (character >= 0x2000 && character <= 0x206F) return false;
  if (character >= 0x20A0 && character <= 0x20FF) return false;
  if (character >= 0x2190 && character <= 0x245F) return false;
  if (character >= 0x2500 && character <= 0x2775) return false;
  if (character >= 0x2794 && character <= 0x2BFF) return false;
  if (character >= 0x3000 && character <= 0x3004) return false;
  if (character >= 0x3008 && character <= 0x3020) return false;
  if (character >= 0xFF00 && character <= 0xFF0F) return false;
  return character < 0x1F000 || character > 0x1FAFF;
}

std::string hellaswag_text(std::string_view text) {
  const std::string titled = replaced(strip(text), " [title]", ". ");
  std::string cleaned;
  for (std::size_t at = 0; at < titled.size();) {
    if (titled[at] == '[') {
      const std::size_t end = titled.find_first_of("]\n", at + 1);
      if (end != std::string::npos && titled[end] == ']') {
        at = end + 1;
        continue;
      }
    }
    cleaned.push_back(titled[at++]);
  }
  return replaced(cleaned, "  ", " ");
}

}  // namespace headfold::evaluation
