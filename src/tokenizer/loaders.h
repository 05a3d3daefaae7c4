#pragma once
// Private to src/tokenizer: what the loaders of the two file formats share.

#include <headfold/base/error.h>
#include <headfold/tokenizer/tokenizer.h>

#include <functional>
#include <optional>

namespace headfold::tokenizer {

/// What the JSON files beside a tokenizer say about its special tokens; everything may be absent.
struct FolderSettings {
  std::string tokenizer_config_file, config_file;   ///< for messages
  std::string tokenizer_class;                      ///< tokenizer_config.json
  std::optional<std::string> bos_token, eos_token;  ///< tokenizer_config.json, as text
  std::optional<bool> add_bos_token;                ///< tokenizer_config.json
  std::optional<std::int64_t> bos_id, eos_id;       ///< config.json; the first of a list
};

struct SpecialIds {
  std::int64_t bos = -1, eos = -1;
};

/// The ids of BOS and EOS: tokenizer_config.json's token if given, else the tokenizer file's own id (-1: none), else
/// config.json's id. `find` gives the id of a token's text, -1 when unknown. InputError when a file names a token or id
/// outside the vocabulary.
SpecialIds resolve_special_ids(const FolderSettings& settings, SpecialIds own, std::int64_t vocab_size,
                               const std::function<std::int64_t(const std::string&)>& find);

std::unique_ptr<Tokenizer> load_sentencepiece(const std::filesystem::path& file, const FolderSettings& settings);
std::unique_ptr<Tokenizer> load_tokenizer_json(const std::filesystem::path& file, const FolderSettings& settings);

/// CorruptFile with a fitting hint when `content` is empty or a Git LFS pointer instead of the file itself.
void refuse_placeholder(std::string_view content, const std::string& file);

}  // namespace headfold::tokenizer
