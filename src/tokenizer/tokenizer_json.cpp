#include <headfold/base/files.h>
#include <headfold/base/json.h>
#include <headfold/tokenizer/byte_pair.h>
#include <headfold/tokenizer/loaders.h>
#include <headfold/tokenizer/pieces.h>
#include <headfold/tokenizer/utf8.h>

#include <algorithm>
#include <mutex>

namespace headfold::tokenizer {
namespace {

using Ids = std::vector<std::int32_t>;

std::string shortened(const std::string& text) {
  return text.size() > 80 ? text.substr(0, 80) + "…" : text;
}

/// One token of the "added_tokens" list, matched in the text before anything else happens to it.
struct AddedToken {
  std::int32_t id = 0;
  std::string content;
  bool single_word = false, lstrip = false, rstrip = false, normalized = false, special = false;
};

/// A stretch of text, or an added token in it (id >= 0).
struct Segment {
  std::string_view text;
  std::int32_t id = -1;
};

bool is_word_character(char32_t value) {
  if (value < 0x80)
    return (value >= '0' && value <= '9') || (value >= 'A' && value <= 'Z') || (value >= 'a' && value <= 'z') ||
           value == '_';
  // Without Unicode tables: letters and marks are what is neither white space nor in the blocks of punctuation and
  // symbols.
  if (value < 0xC0) return value == 0xAA || value == 0xB5 || value == 0xBA;
  return !is_white_space(value) && value != 0xD7 && value != 0xF7 && !(value >= 0x2010 && value <= 0x2BFF) &&
         !(value >= 0x3001 && value <= 0x3004) && !(value >= 0x3008 && value <= 0x3020) && value < 0x1F000;
}

/// Start of the character that ends at `end`.
std::size_t previous_character(std::string_view text, std::size_t end) {
  do {
    --end;
  } while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80);
  return end;
}

/// Finds added tokens in a text: leftmost first, longest of those that start at one place, as the tokenizers library
/// does.
class AddedTokenMatcher {
 public:
  void add(AddedToken token) { tokens_.push_back(std::move(token)); }
  void finish() {
    std::stable_sort(tokens_.begin(), tokens_.end(), [](const AddedToken& a, const AddedToken& b) {
      return a.content[0] != b.content[0] ? a.content[0] < b.content[0] : a.content.size() > b.content.size();
    });
    for (std::size_t i = 0; i < tokens_.size(); ++i) {
      auto& range = first_byte_[static_cast<unsigned char>(tokens_[i].content[0])];
      if (range.second == 0) range.first = i;
      range.second = i + 1;
    }
  }

  std::vector<Segment> split(std::string_view text) const {
    std::vector<Segment> segments;
    std::size_t pending = 0;
    for (std::size_t position = 0; position < text.size() && !tokens_.empty();) {
      const AddedToken* token = match(text, position);
      if (token == nullptr) {
        ++position;
        continue;
      }
      std::size_t begin = position, end = position + token->content.size();
      position = end;
      if (token->single_word &&
          ((begin > 0 && is_word_character(code_point_at(text, previous_character(text, begin)).value)) ||
           (end < text.size() && is_word_character(code_point_at(text, end).value))))
        continue;
      if (token->lstrip)
        while (begin > pending) {
          const std::size_t previous = previous_character(text, begin);
          if (previous < pending || !is_white_space(code_point_at(text, previous).value)) break;
          begin = previous;
        }
      if (token->rstrip)
        while (end < text.size()) {
          const CodePoint next = code_point_at(text, end);
          if (!is_white_space(next.value)) break;
          end += next.bytes;
        }
      if (begin < pending) begin = pending;
      if (pending < begin) segments.push_back({text.substr(pending, begin - pending), -1});
      segments.push_back({text.substr(begin, end - begin), token->id});
      pending = end;
      position = std::max(position, end);
    }
    if (pending < text.size()) segments.push_back({text.substr(pending), -1});
    return segments;
  }

 private:
  const AddedToken* match(std::string_view text, std::size_t position) const {
    const auto [begin, end] = first_byte_[static_cast<unsigned char>(text[position])];
    for (std::size_t i = begin; i < end; ++i)
      if (text.substr(position).starts_with(tokens_[i].content)) return &tokens_[i];
    return nullptr;
  }

  std::vector<AddedToken> tokens_;
  std::array<std::pair<std::size_t, std::size_t>, 256> first_byte_{};
};

struct NormalizerStep {
  bool prepend = false;  ///< else replace
  std::string from, to;
};

enum class PrependScheme { always, first, never };

struct DecoderStep {
  enum class Kind { byte_level, metaspace, replace, byte_fallback, fuse, strip } kind;
  std::string from, to;
  std::size_t start = 0, stop = 0;
  PrependScheme scheme = PrependScheme::always;
};

/// Byte-pair encoding from a tokenizer.json. The behaviour follows the tokenizers library, part by part.
class JsonTokenizer final : public Tokenizer {
 public:
  JsonTokenizer(const std::filesystem::path& path, const FolderSettings& settings) : file_(path.string()) {
    const std::string content = read_file(path, std::uint64_t{1} << 28);
    refuse_placeholder(content, file_);
    const Json root = parse_json(content, file_);
    if (!root.is_object()) throw CorruptFile(file_, fmt::format("holds a JSON {}, not an object", root.type_name()));
    read_normalizer(part(root, "normalizer"));
    read_pre_tokenizer(part(root, "pre_tokenizer"));
    read_model(root);
    read_added_tokens(root);
    read_post_processor(part(root, "post_processor"));
    read_decoder(part(root, "decoder"));
    find_exact_splits();
    const auto find = [&](const std::string& token) -> std::int64_t {
      const auto found = ids_.find(token);
      return found == ids_.end() ? -1 : found->second;
    };
    const std::int64_t template_bos = special_.bos;
    special_ = resolve_special_ids(settings, special_, vocab_size(), find);
    // LlamaTokenizerFast rebuilds its template from its configuration; other classes use the file's.
    if (settings.add_bos_token.has_value() && settings.tokenizer_class.starts_with("Llama"))
      adds_bos_ = *settings.add_bos_token && special_.bos >= 0;
    else if (adds_bos_)
      special_.bos = template_bos;
  }

  using Tokenizer::encode;
  std::vector<std::int64_t> encode(std::string_view text) const override {
    check_utf8(text, "the text to encode");
    std::vector<std::int64_t> ids;
    ids.reserve(text.size() / 3);
    // The cache is shared by all calls; a call is short, and calls on one tokenizer from several threads are rare.
    const std::lock_guard<std::mutex> lock(cache_mutex_);
    for (const Segment& raw : plain_matcher_.split(text)) {
      if (raw.id >= 0) {
        ids.push_back(raw.id);
        continue;
      }
      const bool at_start = raw.text.data() == text.data();
      std::string normalized_storage;
      const std::string_view normalized = normalize(raw.text, normalized_storage);
      for (const Segment& segment : normalized_matcher_.split(normalized)) {
        if (segment.id >= 0)
          ids.push_back(segment.id);
        else
          encode_segment(segment.text, at_start && segment.text.data() == normalized.data(), ids);
      }
    }
    return ids;
  }

  std::string decode(const std::vector<std::int64_t>& ids) const override {
    std::vector<std::string> parts;
    parts.reserve(ids.size());
    for (const std::int64_t id : ids) {
      if (id < 0 || id >= vocab_size() || kinds_[static_cast<std::size_t>(id)] == TokenKind::absent)
        throw InputError(fmt::format("token id {} is not in the vocabulary of {} ({} ids)", id, file_, vocab_size()));
      if (kinds_[static_cast<std::size_t>(id)] != TokenKind::special)
        parts.push_back(tokens_[static_cast<std::size_t>(id)]);
    }
    const auto bytes = [&] {
      std::size_t sum = 0;
      for (const std::string& token : parts) sum += token.size();
      return sum;
    };
    const std::size_t before = bytes();
    for (const DecoderStep& step : decoder_) {
      apply(step, parts);
      if (step.kind == DecoderStep::Kind::replace) check_growth(before, bytes());
    }
    std::string text;
    for (std::size_t i = 0; i < parts.size(); ++i) {
      // Without a decoder the library puts a space between tokens.
      if (decoder_.empty() && i > 0) text += ' ';
      text += parts[i];
    }
    return text;
  }

  std::string token_text(std::int64_t id) const override {
    if (id < 0 || id >= vocab_size() || kinds_[static_cast<std::size_t>(id)] == TokenKind::absent)
      throw InputError(fmt::format("token id {} is not in the vocabulary of {} ({} ids)", id, file_, vocab_size()));
    return tokens_[static_cast<std::size_t>(id)];
  }

  std::int64_t vocab_size() const override { return static_cast<std::int64_t>(tokens_.size()); }
  std::int64_t bos() const override { return special_.bos; }
  std::int64_t eos() const override { return special_.eos; }
  bool adds_bos() const override { return adds_bos_; }
  std::string kind() const override { return byte_level_ ? "byte-level-bpe" : "byte-fallback-bpe"; }

 private:
  enum class TokenKind : char { absent, normal, added, special };

  [[noreturn]] void corrupt(const std::string& why) const { throw CorruptFile(file_, why, "copy the file again"); }
  [[noreturn]] void unsupported(const std::string& what) const {
    throw InputError(fmt::format("{}: {} is not supported", file_, what),
                     "headfold reads byte-level BPE as BLOOM has it, and BPE with byte fallback as LLaMA has it");
  }

  /// A part of the file that may be absent or null.
  const Json& part(const Json& root, const char* key) const {
    static const Json nothing;
    const auto found = root.find(key);
    if (found == root.end() || found->is_null()) return nothing;
    if (!found->is_object()) corrupt(fmt::format("\"{}\" is a JSON {}, not an object", key, found->type_name()));
    return *found;
  }

  /// The steps of a part: itself, or the members of its Sequence.
  std::vector<const Json*> steps(const Json& value, const char* members) const {
    if (value.is_null()) return {};
    if (required<std::string>(value, "type", file_) != "Sequence") return {&value};
    const auto list = value.find(members);
    if (list == value.end() || !list->is_array()) corrupt(fmt::format("a Sequence has no list \"{}\"", members));
    std::vector<const Json*> result;
    for (const Json& step : *list) {
      if (!step.is_object()) corrupt(fmt::format("a member of \"{}\" is no object", members));
      if (required<std::string>(step, "type", file_) == "Sequence") unsupported("a Sequence inside a Sequence");
      result.push_back(&step);
    }
    return result;
  }

  /// The text of a pattern given as {"String": …}; a regular expression is refused.
  std::string literal_pattern(const Json& step, const char* where) const {
    const auto pattern = step.find("pattern");
    if (pattern == step.end() || !pattern->is_object()) corrupt(fmt::format("{} has no \"pattern\"", where));
    if (pattern->contains("Regex"))
      unsupported(fmt::format("{} with the regular expression {}", where, shortened((*pattern)["Regex"].dump())));
    std::string text = required<std::string>(*pattern, "String", file_);
    if (text.empty()) corrupt(fmt::format("{} has an empty pattern", where));
    return text;
  }

  /// A text that a step puts in: a character or two in any real file.
  std::string insertion(const Json& step, const char* key) const {
    auto text = required<std::string>(step, key, file_);
    if (text.size() > 1024) unsupported(fmt::format("a \"{}\" of {} bytes", key, text.size()));
    return text;
  }

  /// Steps that each double a text would fill any memory after a few dozen of them.
  void check_growth(std::size_t before, std::size_t after) const {
    if (after > 16 * before + 65536)
      throw InputError(fmt::format("{}: its replacements turn {} bytes of text into {} and more", file_, before, after),
                       "no real tokenizer does that: copy the file again");
  }

  void read_normalizer(const Json& value) {
    for (const Json* step : steps(value, "normalizers")) {
      const auto type = required<std::string>(*step, "type", file_);
      if (type == "Prepend")
        normalizer_.push_back({true, {}, insertion(*step, "prepend")});
      else if (type == "Replace")
        normalizer_.push_back({false, literal_pattern(*step, "normalizer Replace"), insertion(*step, "content")});
      else
        unsupported(fmt::format("normalizer \"{}\"", shortened(type)));
    }
  }

  PrependScheme read_scheme(const Json& step) const {
    // Files before 2024 say add_prefix_space, later ones prepend_scheme.
    const auto fallback = optional<bool>(step, "add_prefix_space", true, file_) ? "always" : "never";
    const auto scheme = optional<std::string>(step, "prepend_scheme", fallback, file_);
    if (scheme == "always") return PrependScheme::always;
    if (scheme == "first") return PrependScheme::first;
    if (scheme == "never") return PrependScheme::never;
    unsupported(fmt::format("Metaspace prepend_scheme \"{}\"", shortened(scheme)));
  }

  void read_pre_tokenizer(const Json& value) {
    const auto list = steps(value, "pretokenizers");
    for (std::size_t i = 0; i < list.size(); ++i) {
      const Json& step = *list[i];
      const auto type = required<std::string>(step, "type", file_);
      if (type == "Split") {
        const auto pattern = step.find("pattern");
        if (pattern == step.end() || !pattern->is_object()) corrupt("pre-tokenizer Split has no \"pattern\"");
        const std::string name = pattern->contains("Regex") ? "Regex" : "String";
        const auto text = required<std::string>(*pattern, name, file_);
        if (name != "Regex" || !is_bloom_pattern(text))
          unsupported(fmt::format("the pre-tokenizer pattern {} \"{}\"", name, text.substr(0, 400)));
        const auto behavior = required<std::string>(step, "behavior", file_);
        if (behavior != "Isolated" || optional<bool>(step, "invert", false, file_))
          unsupported(fmt::format("a Split with behavior \"{}\" (only Isolated, not inverted)", shortened(behavior)));
        if (bloom_split_ || byte_level_ || i + 2 != list.size()) unsupported("this order of pre-tokenizers");
        bloom_split_ = true;
      } else if (type == "ByteLevel") {
        if (optional<bool>(step, "use_regex", true, file_))
          unsupported("pre-tokenizer ByteLevel with use_regex (GPT-2's own pattern)");
        if (i + 1 != list.size()) unsupported("this order of pre-tokenizers");
        byte_level_ = true;
        prefix_space_ = optional<bool>(step, "add_prefix_space", true, file_);
      } else if (type == "Metaspace") {
        if (list.size() != 1) unsupported("Metaspace together with other pre-tokenizers");
        if (const auto symbol = optional<std::string>(step, "replacement", std::string(space_symbol), file_);
            symbol != space_symbol)
          unsupported(fmt::format("Metaspace with the replacement \"{}\"", shortened(symbol)));
        metaspace_ = true;
        metaspace_scheme_ = read_scheme(step);
        metaspace_split_ = optional<bool>(step, "split", true, file_);
      } else {
        unsupported(fmt::format("pre-tokenizer \"{}\"", shortened(type)));
      }
    }
    if (bloom_split_ && !byte_level_) unsupported("a Split that no ByteLevel follows");
  }

  /// A token id from JSON. Ids may have gaps, but an id far beyond the number of tokens is nonsense and would cost
  /// memory.
  std::int32_t checked_id(const Json& value, const std::string& token, std::size_t tokens_in_file) const {
    if (!value.is_number_integer())
      corrupt(fmt::format("the id of token \"{}\" is {}", shortened(token), shortened(value.dump())));
    const std::uint64_t limit = std::uint64_t{8} * tokens_in_file + 4096;
    if ((value.is_number_integer() && !value.is_number_unsigned() && value.get<std::int64_t>() < 0) ||
        value.get<std::uint64_t>() >= limit)
      corrupt(fmt::format("the id of token \"{}\" is {}, which is out of range for {} tokens", shortened(token),
                          value.dump(), tokens_in_file));
    return value.get<std::int32_t>();
  }

  /// Enters a token. CorruptFile when its id or its text is taken by another one.
  void enter(const std::string& token, std::int32_t id, TokenKind kind) {
    const auto index = static_cast<std::size_t>(id);
    if (index >= tokens_.size()) {
      tokens_.resize(index + 1);
      kinds_.resize(index + 1, TokenKind::absent);
    }
    if (kinds_[index] != TokenKind::absent && tokens_[index] != token)
      corrupt(
          fmt::format("tokens \"{}\" and \"{}\" have the same id {}", shortened(tokens_[index]), shortened(token), id));
    const auto [known, fresh] = ids_.emplace(token, id);
    if (!fresh && known->second != id)
      corrupt(fmt::format("token \"{}\" has the ids {} and {}", shortened(token), known->second, id));
    tokens_[index] = token;
    kinds_[index] = kind;
  }

  std::int32_t id_of(std::string_view token) const {
    const auto found = ids_.find(token);
    return found == ids_.end() ? -1 : found->second;
  }

  void read_model(const Json& root) {
    const Json& model = part(root, "model");
    if (model.is_null()) corrupt("there is no \"model\"");
    // Old files have no type; merges tell BPE apart.
    const auto type = optional<std::string>(model, "type", model.contains("merges") ? "BPE" : "without a type", file_);
    if (type != "BPE") unsupported(fmt::format("model \"{}\"", shortened(type)));
    if (const auto dropout = model.find("dropout");
        dropout != model.end() && dropout->is_number() && dropout->get<double>() != 0)
      unsupported("BPE dropout");
    for (const char* affix : {"continuing_subword_prefix", "end_of_word_suffix"})
      if (!optional<std::string>(model, affix, "", file_).empty())
        unsupported(fmt::format("a BPE model with {}", affix));
    byte_fallback_ = optional<bool>(model, "byte_fallback", false, file_);
    fuse_unknown_ = optional<bool>(model, "fuse_unk", false, file_);
    ignore_merges_ = optional<bool>(model, "ignore_merges", false, file_);
    if (!byte_level_ && !byte_fallback_) unsupported("BPE with neither a ByteLevel pre-tokenizer nor byte_fallback");

    const auto vocab = model.find("vocab");
    if (vocab == model.end()) corrupt("the model has no \"vocab\"");
    if (!vocab->is_object() || vocab->empty()) corrupt("the model's \"vocab\" is not an object with tokens");
    ids_.reserve(vocab->size());
    for (const auto& [token, id] : vocab->items())
      enter(token, checked_id(id, token, vocab->size()), TokenKind::normal);

    const auto merges = model.find("merges");
    if (merges == model.end() || !merges->is_array()) corrupt("the model has no list \"merges\"");
    rules_ = MergeRules(merges->size());
    std::string left, right;
    for (std::size_t rank = 0; rank < merges->size(); ++rank) {
      split_merge((*merges)[rank], rank, left, right);
      const std::int32_t left_id = id_of(left), right_id = id_of(right), result = id_of(left + right);
      for (const auto& [token, id] : {std::pair{left, left_id}, {right, right_id}, {left + right, result}})
        if (id < 0)
          corrupt(fmt::format("merge {} refers to \"{}\", which is not in the vocabulary", rank, shortened(token)));
      rules_.add(left_id, right_id, {static_cast<std::int32_t>(rank), result});
      if (crosses_space(left + right)) metaspace_cut_exact_ = false;
    }

    if (const auto unknown = optional<std::string>(model, "unk_token", "", file_); !unknown.empty()) {
      unknown_id_ = id_of(unknown);
      if (unknown_id_ < 0) corrupt(fmt::format("unk_token \"{}\" is not in the vocabulary", shortened(unknown)));
    }
    for (std::size_t byte = 0; byte < 256; ++byte)
      byte_ids_[byte] = byte_level_ ? id_of(byte_symbols()[byte]) : id_of(fmt::format("<0x{:02X}>", byte));
  }

  /// A merge is written "left right" or ["left", "right"].
  void split_merge(const Json& merge, std::size_t rank, std::string& left, std::string& right) const {
    if (merge.is_string()) {
      const auto& text = merge.get_ref<const std::string&>();
      const std::size_t space = text.find(' ');
      if (space != std::string::npos && text.find(' ', space + 1) == std::string::npos) {
        left = text.substr(0, space);
        right = text.substr(space + 1);
      } else {
        left.clear();
      }
    } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      left = merge[0].get<std::string>();
      right = merge[1].get<std::string>();
    } else {
      left.clear();
    }
    if (left.empty() || right.empty())
      corrupt(fmt::format("merge {} is not a pair of tokens: {}", rank, shortened(merge.dump())));
  }

  void find_exact_splits() {
    metaspace_cut_exact_ = metaspace_cut_exact_ && !ignore_merges_ && id_of(space_symbol) >= 0;
  }

  void read_added_tokens(const Json& root) {
    const auto list = root.find("added_tokens");
    if (list == root.end() || list->is_null()) return;
    if (!list->is_array()) corrupt("\"added_tokens\" is no list");
    const std::size_t total = tokens_.size() + list->size();
    for (const Json& entry : *list) {
      if (!entry.is_object()) corrupt("a member of \"added_tokens\" is no object");
      AddedToken token;
      token.content = required<std::string>(entry, "content", file_);
      if (token.content.empty()) continue;
      if (!entry.contains("id")) corrupt(fmt::format("added token \"{}\" has no id", shortened(token.content)));
      token.id = checked_id(entry["id"], token.content, total);
      token.special = optional<bool>(entry, "special", false, file_);
      token.single_word = optional<bool>(entry, "single_word", false, file_);
      token.lstrip = optional<bool>(entry, "lstrip", false, file_);
      token.rstrip = optional<bool>(entry, "rstrip", false, file_);
      token.normalized = optional<bool>(entry, "normalized", !token.special, file_);
      enter(token.content, token.id, token.special ? TokenKind::special : TokenKind::added);
      if (token.normalized) {
        // What is searched in normalised text is normalised itself.
        std::string storage;
        token.content = std::string(normalize(token.content, storage));
        // Nothing may be left of it; an empty token would be found everywhere.
        if (!token.content.empty()) normalized_matcher_.add(std::move(token));
      } else {
        plain_matcher_.add(std::move(token));
      }
    }
    plain_matcher_.finish();
    normalized_matcher_.finish();
  }

  void read_post_processor(const Json& value) {
    for (const Json* step : steps(value, "processors")) {
      const auto type = required<std::string>(*step, "type", file_);
      if (type == "ByteLevel") continue;  // moves offsets only
      if (type != "TemplateProcessing") unsupported(fmt::format("post-processor \"{}\"", shortened(type)));
      const auto single = step->find("single");
      if (single == step->end() || !single->is_array()) corrupt("TemplateProcessing has no list \"single\"");
      for (const Json& item : *single) {
        if (item.is_object() && item.contains("Sequence"))
          break;  // what follows the text is not ours to add: see Tokenizer::encode
        if (!item.is_object() || !item.contains("SpecialToken") || !item["SpecialToken"].is_object())
          corrupt("a member of TemplateProcessing's \"single\" is neither SpecialToken nor Sequence");
        if (adds_bos_) unsupported("a template with more than one token before the text");
        const auto name = required<std::string>(item["SpecialToken"], "id", file_);
        special_.bos = id_of(name);
        if (special_.bos < 0)
          corrupt(
              fmt::format("the template's token \"{}\" is in neither vocabulary nor added tokens", shortened(name)));
        adds_bos_ = true;
      }
    }
  }

  void read_decoder(const Json& value) {
    using Kind = DecoderStep::Kind;
    for (const Json* step : steps(value, "decoders")) {
      const auto type = required<std::string>(*step, "type", file_);
      if (type == "ByteLevel") {
        decoder_.push_back({Kind::byte_level, {}, {}});
      } else if (type == "Metaspace") {
        decoder_.push_back({Kind::metaspace, {}, {}, 0, 0, read_scheme(*step)});
      } else if (type == "Replace") {
        decoder_.push_back({Kind::replace, literal_pattern(*step, "decoder Replace"), insertion(*step, "content")});
      } else if (type == "ByteFallback") {
        decoder_.push_back({Kind::byte_fallback, {}, {}});
      } else if (type == "Fuse") {
        decoder_.push_back({Kind::fuse, {}, {}});
      } else if (type == "Strip") {
        const auto content = required<std::string>(*step, "content", file_);
        if (content.size() != 1) unsupported(fmt::format("decoder Strip of \"{}\"", shortened(content)));
        const auto start = optional<std::int64_t>(*step, "start", 0, file_),
                   stop = optional<std::int64_t>(*step, "stop", 0, file_);
        if (start < 0 || stop < 0) corrupt("decoder Strip has a negative count");
        decoder_.push_back({Kind::strip, content, {}, static_cast<std::size_t>(start), static_cast<std::size_t>(stop)});
      } else {
        unsupported(fmt::format("decoder \"{}\"", shortened(type)));
      }
    }
  }

  /// Byte that a "<0xHH>" token stands for, or -1.
  static int fallback_byte(std::string_view token) {
    if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return -1;
    const auto digit = [](char c) {
      return c >= '0' && c <= '9'   ? c - '0'
             : c >= 'A' && c <= 'F' ? c - 'A' + 10
             : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                    : -1;
    };
    const int high = digit(token[3]), low = digit(token[4]);
    return high < 0 || low < 0 ? -1 : high * 16 + low;
  }

  static void apply(const DecoderStep& step, std::vector<std::string>& parts) {
    using Kind = DecoderStep::Kind;
    switch (step.kind) {
      case Kind::byte_level: {
        std::string bytes;
        for (const std::string& token : parts) append_bytes(token, bytes);
        parts = {replace_invalid_utf8(bytes)};
        break;
      }
      case Kind::metaspace:
        for (std::size_t i = 0; i < parts.size(); ++i)
          parts[i] = replace_all(parts[i], space_symbol, i == 0 && step.scheme != PrependScheme::never ? "" : " ");
        break;
      case Kind::replace:
        for (std::string& token : parts) token = replace_all(token, step.from, step.to);
        break;
      case Kind::byte_fallback: {
        std::vector<std::string> result;
        std::string bytes;
        const auto flush = [&] {
          if (bytes.empty()) return;
          if (invalid_utf8_at(bytes) == std::string_view::npos)
            result.push_back(bytes);
          else
            for (std::size_t i = 0; i < bytes.size(); ++i) result.emplace_back("\xEF\xBF\xBD");
          bytes.clear();
        };
        for (std::string& token : parts) {
          if (const int byte = fallback_byte(token); byte >= 0) {
            bytes.push_back(static_cast<char>(byte));
          } else {
            flush();
            result.push_back(std::move(token));
          }
        }
        flush();
        parts = std::move(result);
        break;
      }
      case Kind::fuse: {
        std::string all;
        for (const std::string& token : parts) all += token;
        parts = {std::move(all)};
        break;
      }
      case Kind::strip:
        for (std::string& token : parts) {
          std::size_t begin = 0, end = token.size();
          while (begin < end && begin < step.start && token[begin] == step.from[0]) ++begin;
          for (std::size_t n = 0; n < step.stop && end > begin && token[end - 1] == step.from[0]; ++n) --end;
          token = token.substr(begin, end - begin);
        }
        break;
    }
  }

  /// The bytes a byte-level token stands for; a token with any other character in it (an added one) stands for its own
  /// text.
  static void append_bytes(const std::string& token, std::string& bytes) {
    const std::size_t before = bytes.size();
    for (std::size_t i = 0; i < token.size();) {
      const CodePoint character = code_point_at(token, i);
      const int byte = byte_of_symbol(character.value);
      if (byte < 0) {
        bytes.resize(before);
        bytes += token;
        return;
      }
      bytes.push_back(static_cast<char>(byte));
      i += character.bytes;
    }
  }

  std::string_view normalize(std::string_view text, std::string& storage) const {
    const std::size_t before = text.size();
    for (const NormalizerStep& step : normalizer_) {
      std::string changed =
          step.prepend ? (text.empty() ? "" : step.to + std::string(text)) : replace_all(text, step.from, step.to);
      check_growth(before, changed.size());
      storage = std::move(changed);
      text = storage;
    }
    return text;
  }

  void encode_segment(std::string_view text, bool at_start, std::vector<std::int64_t>& ids) const {
    if (byte_level_) {
      if (!bloom_split_) {
        encode_byte_piece(text, ids);
        return;
      }
      for (const std::string_view piece : split_bloom(text)) encode_byte_piece(piece, ids);
      return;
    }
    std::string storage;
    if (metaspace_) {
      storage = replace_all(text, " ", space_symbol);
      if ((metaspace_scheme_ == PrependScheme::always || (metaspace_scheme_ == PrependScheme::first && at_start)) &&
          !storage.starts_with(space_symbol))
        storage.insert(0, space_symbol);
      text = storage;
    }
    if (metaspace_ && metaspace_split_) {
      // Every U+2581 starts a piece of its own.
      for (std::size_t begin = 0; begin < text.size();) {
        const std::size_t end = std::min(text.size(), text.find(space_symbol, begin + 1));
        encode_cached(text.substr(begin, end - begin), ids);
        begin = end;
      }
    } else if (metaspace_cut_exact_) {
      // No rule can join across the start of a run of U+2581, so the text may be cut there; the result is that of the
      // whole text.
      for (const std::string_view part : cut_before_spaces(text)) encode_cached(part, ids);
    } else {
      encode_cached(text, ids);
    }
  }

  void encode_byte_piece(std::string_view piece, std::vector<std::int64_t>& ids) const {
    if (prefix_space_ && !piece.starts_with(' '))
      encode_cached(" " + std::string(piece), ids);
    else
      encode_cached(piece, ids);
  }

  void encode_cached(std::string_view piece, std::vector<std::int64_t>& ids) const {
    cache_.append(piece, ids, [this](std::string_view fresh) { return encode_piece(fresh); });
  }

  Ids encode_piece(std::string_view piece) const {
    if (ignore_merges_) {
      std::string token;
      if (byte_level_)
        for (const char byte : piece) token += byte_symbols()[static_cast<unsigned char>(byte)];
      else
        token = piece;
      if (const std::int32_t id = id_of(token); id >= 0) return {id};
    }
    Ids symbols;
    symbols.reserve(piece.size());
    bool after_unknown = false;
    const auto unknown = [&](std::string_view what) {
      if (unknown_id_ < 0)
        throw InputError(fmt::format("{} has no token for {} and no unk_token", file_, what),
                         "the tokenizer does not cover this text");
      if (!(fuse_unknown_ && after_unknown)) symbols.push_back(unknown_id_);
      after_unknown = true;
    };
    const auto byte_name = [](char byte) { return fmt::format("byte 0x{:02X}", static_cast<unsigned char>(byte)); };
    if (byte_level_) {
      for (const char byte : piece) {
        const std::int32_t id = byte_ids_[static_cast<unsigned char>(byte)];
        if (id < 0) {
          unknown(byte_name(byte));
        } else {
          symbols.push_back(id);
          after_unknown = false;
        }
      }
    } else {
      for (std::size_t i = 0; i < piece.size();) {
        const std::string_view character = piece.substr(i, code_point_at(piece, i).bytes);
        i += character.size();
        if (const std::int32_t id = id_of(character); id >= 0) {
          symbols.push_back(id);
          after_unknown = false;
          continue;
        }
        const bool has_bytes = byte_fallback_ && std::all_of(character.begin(), character.end(), [&](char byte) {
                                 return byte_ids_[static_cast<unsigned char>(byte)] >= 0;
                               });
        if (has_bytes) {
          for (const char byte : character) symbols.push_back(byte_ids_[static_cast<unsigned char>(byte)]);
          after_unknown = false;
        } else {
          unknown(fmt::format("the character \"{}\"", character));
        }
      }
    }
    rules_.merge(symbols);
    return symbols;
  }

  std::string file_;
  std::vector<NormalizerStep> normalizer_;
  std::vector<DecoderStep> decoder_;
  bool bloom_split_ = false, byte_level_ = false, prefix_space_ = false;
  bool metaspace_ = false, metaspace_split_ = false, metaspace_cut_exact_ = true;
  PrependScheme metaspace_scheme_ = PrependScheme::always;
  bool byte_fallback_ = false, fuse_unknown_ = false, ignore_merges_ = false;
  std::int32_t unknown_id_ = -1;
  std::array<std::int32_t, 256> byte_ids_{};
  MergeRules rules_;
  std::vector<std::string> tokens_;
  std::vector<TokenKind> kinds_;
  TextMap<std::int32_t> ids_;
  AddedTokenMatcher plain_matcher_, normalized_matcher_;
  SpecialIds special_;
  bool adds_bos_ = false;
  mutable std::mutex cache_mutex_;
  mutable PieceCache cache_;
};

}  // namespace

std::unique_ptr<Tokenizer> load_tokenizer_json(const std::filesystem::path& file, const FolderSettings& settings) {
  return std::make_unique<JsonTokenizer>(file, settings);
}

}  // namespace headfold::tokenizer
