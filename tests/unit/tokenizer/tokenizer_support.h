#pragma once
// What the tokenizer tests share: the demo's models and texts, edited copies of tokenizer.json, and slow, obvious
// references.

#include <gmock/gmock.h>
#include <headfold/base/files.h>
#include <headfold/base/json.h>
#include <headfold/tokenizer/tokenizer.h>
#include <headfold/tokenizer/utf8.h>

#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "world.h"

namespace headfold::testing_support {

inline fs::path demo_folder() {
  return fs::path(HEADFOLD_TESTS_FOLDER).parent_path() / "demo";
}
inline fs::path demo_bloom() {
  return demo_folder() / "models/prose-bloom";
}
inline fs::path demo_llama() {
  return demo_folder() / "models/prose-llama";
}

/// Documents of the demo's held-out text, read with nothing but the JSON parser.
inline std::vector<std::string> real_documents(std::size_t most) {
  std::vector<std::string> documents;
  const std::string content = read_file(demo_folder() / "text/heldout.jsonl");
  for (std::size_t begin = 0; begin < content.size() && documents.size() < most;) {
    const std::size_t end = content.find('\n', begin);
    documents.push_back(Json::parse(content.substr(begin, end - begin)).at("text").get<std::string>());
    begin = end + 1;
  }
  return documents;
}

/// A model folder with the demo BLOOM's tokenizer.json after `edit`.
inline void write_edited(const ScratchFolder& folder, const std::function<void(Json&)>& edit) {
  Json value = Json::parse(read_file(demo_bloom() / "tokenizer.json"));
  edit(value);
  write_json(folder / "tokenizer.json", value);
}

/// Random well-formed UTF-8: ASCII, spaces, punctuation, and characters from all planes.
inline std::string random_text(std::mt19937& generator, std::size_t characters) {
  const auto below = [&](std::uint32_t bound) { return static_cast<char32_t>(generator() % bound); };
  std::string text;
  for (std::size_t i = 0; i < characters; ++i) {
    char32_t value = 0;
    switch (generator() % 8) {
      case 0:
        value = U' ';
        break;
      case 1:
        value = U"()|.,!?\u2026\u3002\uFF0C\u3001\u0964\u06D4\u060C\u00A0\u2003\u3000\t\n"[below(19)];
        break;
      case 2:
        value = below(0x80);
        break;
      case 3:
        value = below(0x800);
        break;
      case 4:
        value = 0x10000 + below(0x100000);
        break;
      case 5:
        value = below(0xD800);
        break;
      default:
        value = U'a' + below(26);
    }
    tokenizer::append_utf8(text, value);
  }
  return text;
}

/// Byte-pair merging by its definition: look at all pairs, merge the one of lowest rank that comes first, start again.
inline std::vector<std::string> merge_naively(std::vector<std::string> symbols,
                                              const std::map<std::pair<std::string, std::string>, std::size_t>& ranks) {
  for (;;) {
    std::size_t best = ranks.size(), at = 0;
    for (std::size_t i = 0; i + 1 < symbols.size(); ++i) {
      const auto found = ranks.find({symbols[i], symbols[i + 1]});
      if (found != ranks.end() && found->second < best) {
        best = found->second;
        at = i;
      }
    }
    if (best == ranks.size()) return symbols;
    symbols[at] += symbols[at + 1];
    symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(at) + 1);
  }
}

/// Message of the Error that `action` throws; a failure when it throws none or another kind than `E`.
template <class E, class F>
std::string message_of(F&& action) {
  try {
    action();
  } catch (const E& error) {
    return error.what();
  } catch (const std::exception& error) {
    ADD_FAILURE() << "another error: " << error.what();
    return {};
  }
  ADD_FAILURE() << "no error";
  return {};
}

}  // namespace headfold::testing_support
