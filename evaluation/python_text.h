#pragma once
// String rules of Python that prompts and metrics of the harness rely on.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace headfold::evaluation {

/// Code points of well-formed UTF-8: Python's len().
std::int64_t code_points(std::string_view text);
/// str.lower(), a sigma at the end of a word included.
std::string lower(std::string_view text);
/// str.capitalize(): the first character in title case ("ß" becomes "Ss"), the rest in lower case.
std::string capitalize(std::string_view text);
/// str.split(): pieces between runs of Unicode white space, no empty ones.
std::vector<std::string> split_words(std::string_view text);
/// str.split(separator): all pieces, empty ones too. `separator` is not empty.
std::vector<std::string> split_on(std::string_view text, std::string_view separator);
/// `text` with every occurrence of `from` replaced, from the left, not recursively.
std::string replaced(std::string_view text, std::string_view from, std::string_view to);
/// A list of strings as str(list) writes it: ['a', "it's"].
std::string python_list(const std::vector<std::string>& items);
/// Whether \d matches a character in a regular expression: decimal digits of every script.
bool is_digit_character(char32_t character);
/// Whether a character counts as one of a word for \b in a regular expression: letters, digits, underscore. Beyond
/// ASCII: everything but the blocks of punctuation, symbols and spaces.
bool is_word_character(char32_t character);

/// HellaSwag's clean-up of contexts and endings: white space stripped, " [title]" to ". ", "[…]" within a line removed,
/// two spaces to one, once.
std::string hellaswag_text(std::string_view text);

}  // namespace headfold::evaluation
