#include <headfold/base/json.h>
#include <headfold/tokenizer/loaders.h>

namespace headfold::tokenizer {
namespace {

/// A token's text in tokenizer_config.json: a string, or an object with "content".
std::optional<std::string> token_text(const Json& config, const std::string& key, const std::string& file) {
  const auto found = config.find(key);
  if (found == config.end() || found->is_null()) return std::nullopt;
  if (found->is_object()) return required<std::string>(*found, "content", file);
  return required<std::string>(config, key, file);
}

/// A token id in config.json: a number, or a list of which the first counts.
std::optional<std::int64_t> token_id(const Json& config, const std::string& key, const std::string& file) {
  const auto found = config.find(key);
  if (found == config.end() || found->is_null()) return std::nullopt;
  const Json* value = &*found;
  if (value->is_array()) {
    if (value->empty()) return std::nullopt;
    value = &value->front();
  }
  if (!value->is_number_integer())
    throw InputError(fmt::format("{}: key \"{}\" is no token id: {}", file, key, found->dump().substr(0, 80)));
  return value->get<std::int64_t>();
}

FolderSettings read_settings(const std::filesystem::path& folder) {
  FolderSettings settings;
  const std::filesystem::path tokenizer_config = folder / "tokenizer_config.json", config = folder / "config.json";
  settings.tokenizer_config_file = tokenizer_config.string();
  settings.config_file = config.string();
  const auto read_object = [](const std::filesystem::path& path) {
    Json value = read_json(path, std::uint64_t{1} << 26);
    if (!value.is_object()) throw CorruptFile(path.string(), "holds no JSON object");
    return value;
  };
  if (std::filesystem::exists(tokenizer_config)) {
    const Json value = read_object(tokenizer_config);
    const std::string& file = settings.tokenizer_config_file;
    settings.tokenizer_class = optional<std::string>(value, "tokenizer_class", "", file);
    settings.bos_token = token_text(value, "bos_token", file);
    settings.eos_token = token_text(value, "eos_token", file);
    if (const auto found = value.find("add_bos_token"); found != value.end() && !found->is_null())
      settings.add_bos_token = required<bool>(value, "add_bos_token", file);
  }
  if (std::filesystem::exists(config)) {
    const Json value = read_object(config);
    settings.bos_id = token_id(value, "bos_token_id", settings.config_file);
    settings.eos_id = token_id(value, "eos_token_id", settings.config_file);
  }
  return settings;
}

}  // namespace

SpecialIds resolve_special_ids(const FolderSettings& settings, SpecialIds own, std::int64_t vocab_size,
                               const std::function<std::int64_t(const std::string&)>& find) {
  const auto resolve = [&](const char* name, const std::optional<std::string>& text, std::int64_t own_id,
                           const std::optional<std::int64_t>& config_id) -> std::int64_t {
    if (text.has_value()) {
      const std::int64_t id = find(*text);
      if (id < 0)
        throw InputError(fmt::format("{}: {}_token is \"{}\", which the tokenizer does not have",
                                     settings.tokenizer_config_file, name, text->substr(0, 80)),
                         "the files of the model folder do not belong together");
      return id;
    }
    if (own_id >= 0) return own_id;
    if (!config_id.has_value()) return -1;
    if (*config_id < 0 || *config_id >= vocab_size)
      throw InputError(fmt::format("{}: {}_token_id is {}, but the tokenizer's ids are 0 to {}", settings.config_file,
                                   name, *config_id, vocab_size - 1),
                       "the files of the model folder do not belong together");
    return *config_id;
  };
  return {resolve("bos", settings.bos_token, own.bos, settings.bos_id),
          resolve("eos", settings.eos_token, own.eos, settings.eos_id)};
}

void refuse_placeholder(std::string_view content, const std::string& file) {
  if (content.empty()) throw CorruptFile(file, "is empty", "copy the model folder again");
  if (content.starts_with("version https://git-lfs"))
    throw CorruptFile(file, "is a Git LFS pointer, not the file itself", "run git lfs pull in the model's repository");
}

std::vector<std::int64_t> Tokenizer::encode(std::string_view text, Bos policy) const {
  std::vector<std::int64_t> ids = encode(text);
  if (policy == Bos::always || (policy == Bos::model_default && adds_bos())) {
    if (bos() < 0)
      throw InputError("a beginning-of-sequence token was asked for, but this tokenizer has none",
                       "set bos_token_id in config.json, or encode without one");
    ids.insert(ids.begin(), bos());
  }
  return ids;
}

std::unique_ptr<Tokenizer> load_tokenizer(const std::filesystem::path& folder) {
  const std::filesystem::path model = folder / "tokenizer.model", json = folder / "tokenizer.json";
  const bool has_model = std::filesystem::exists(model);
  if (!has_model && !std::filesystem::exists(json))
    throw IoError(folder.string(), "has neither tokenizer.model nor tokenizer.json",
                  "--model takes a Hugging Face model folder with its tokenizer files");
  const FolderSettings settings = read_settings(folder);
  return has_model ? load_sentencepiece(model, settings) : load_tokenizer_json(json, settings);
}

}  // namespace headfold::tokenizer
