// SentencePiece BPE models, encoded and decoded as libsentencepiece does. The library itself cannot be linked: Debian's
// build carries an old protobuf with exported symbols, and libtorch loads a newer one under the same names; a process
// with both dies before main(). The tests compare this file with the library in a program of their own, without
// libtorch.

#include <headfold/base/files.h>
#include <headfold/tokenizer/byte_pair.h>
#include <headfold/tokenizer/loaders.h>
#include <headfold/tokenizer/pieces.h>
#include <headfold/tokenizer/utf8.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <unordered_map>

namespace headfold::tokenizer {
namespace {

using Ids = std::vector<std::int32_t>;

/// Walks the fields of one protobuf message.
class ProtobufFields {
 public:
  ProtobufFields(std::string_view bytes, const std::string& file) : bytes_(bytes), file_(file) {}

  struct Field {
    std::uint64_t number = 0;
    unsigned wire_type = 0;
    std::uint64_t value = 0;   ///< of numbers
    std::string_view content;  ///< of length-delimited fields

    bool flag() const { return value != 0; }
    float real() const {
      const auto bits = static_cast<std::uint32_t>(value);
      float result = 0;
      std::memcpy(&result, &bits, sizeof result);
      return result;
    }
  };

  bool next(Field& field) {
    if (position_ == bytes_.size()) return false;
    const std::uint64_t tag = varint();
    field = {tag >> 3, static_cast<unsigned>(tag & 7), 0, {}};
    if (field.number == 0) fail("field number 0 does not exist");
    switch (field.wire_type) {
      case 0:
        field.value = varint();
        break;
      case 1:
        field.value = fixed(8);
        break;
      case 2:
        field.content = take(varint());
        break;
      case 5:
        field.value = fixed(4);
        break;
      default:
        fail(fmt::format("field type {} does not exist", field.wire_type));
    }
    return true;
  }

  /// Refuses a known field of another type than its own.
  void expect(const Field& field, unsigned wire_type) const {
    if (field.wire_type != wire_type)
      fail(fmt::format("field {} has type {}, not {}", field.number, field.wire_type, wire_type));
  }

 private:
  [[noreturn]] void fail(const std::string& why) const {
    throw CorruptFile(file_, fmt::format("is not a whole SentencePiece model (byte {} of a part: {})", position_, why),
                      "copy the file again; files of other tokenizers are sometimes called tokenizer.model too");
  }
  std::uint64_t varint() {
    std::uint64_t value = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
      if (position_ == bytes_.size()) fail("it ends inside a number");
      const auto byte = static_cast<unsigned char>(bytes_[position_++]);
      value |= static_cast<std::uint64_t>(byte & 0x7F) << shift;
      if ((byte & 0x80) == 0) return value;
    }
    fail("a number has more than ten bytes");
  }
  std::uint64_t fixed(std::size_t count) {
    std::uint64_t value = 0;
    const std::string_view bytes = take(count);
    for (std::size_t i = 0; i < count; ++i)
      value |= static_cast<std::uint64_t>(static_cast<unsigned char>(bytes[i])) << (8 * i);
    return value;
  }
  std::string_view take(std::uint64_t count) {
    if (count > bytes_.size() - position_)
      fail(fmt::format("a field says it has {} bytes, {} are left", count, bytes_.size() - position_));
    const std::string_view content = bytes_.substr(position_, count);
    position_ += count;
    return content;
  }

  std::string_view bytes_;
  const std::string& file_;
  std::size_t position_ = 0;
};

/// sentencepiece_model.proto: ModelProto.SentencePiece.Type
enum class PieceType : std::uint64_t { normal = 1, unknown = 2, control = 3, user_defined = 4, unused = 5, byte = 6 };

struct Piece {
  std::string text;
  float score = 0;
  PieceType type = PieceType::normal;
};

/// The parts of ModelProto that encoding and decoding need; the defaults are the schema's.
struct ModelFile {
  std::vector<Piece> pieces;
  std::uint64_t model_type = 1;  ///< 1 unigram, 2 BPE, 3 word, 4 character
  bool byte_fallback = false, space_as_suffix = false;
  std::string bos_piece = "<s>", eos_piece = "</s>";
  bool has_character_map = false;
  bool add_dummy_prefix = true, remove_extra_spaces = true, escape_spaces = true;
};

ModelFile parse_model(std::string_view bytes, const std::string& file) {
  refuse_placeholder(bytes, file);
  ModelFile model;
  ProtobufFields fields(bytes, file);
  ProtobufFields::Field field;
  bool trainer = false, normalizer = false;
  while (fields.next(field)) {
    if (field.number > 3) continue;  // self_test_data, denormalizer_spec, extensions
    fields.expect(field, 2);
    ProtobufFields part(field.content, file);
    ProtobufFields::Field inner;
    if (field.number == 1) {
      Piece piece;
      while (part.next(inner)) {
        if (inner.number == 1) part.expect(inner, 2), piece.text = inner.content;
        if (inner.number == 2) part.expect(inner, 5), piece.score = inner.real();
        if (inner.number == 3) part.expect(inner, 0), piece.type = static_cast<PieceType>(inner.value);
      }
      model.pieces.push_back(std::move(piece));
    } else if (field.number == 2) {
      trainer = true;
      while (part.next(inner)) {
        if (inner.number == 3) part.expect(inner, 0), model.model_type = inner.value;
        if (inner.number == 24) part.expect(inner, 0), model.space_as_suffix = inner.flag();
        if (inner.number == 35) part.expect(inner, 0), model.byte_fallback = inner.flag();
        if (inner.number == 46) part.expect(inner, 2), model.bos_piece = inner.content;
        if (inner.number == 47) part.expect(inner, 2), model.eos_piece = inner.content;
      }
    } else {
      normalizer = true;
      while (part.next(inner)) {
        if (inner.number == 2) part.expect(inner, 2), model.has_character_map = !inner.content.empty();
        if (inner.number == 3) part.expect(inner, 0), model.add_dummy_prefix = inner.flag();
        if (inner.number == 4) part.expect(inner, 0), model.remove_extra_spaces = inner.flag();
        if (inner.number == 5) part.expect(inner, 0), model.escape_spaces = inner.flag();
      }
    }
  }
  // The order in the file is pieces, trainer_spec, normalizer_spec. A file cut between two fields is well-formed
  // protobuf, but lacks the later ones.
  if (model.pieces.empty() || !trainer || !normalizer)
    throw CorruptFile(file,
                      fmt::format("is not a whole SentencePiece model: {} pieces, {} trainer_spec, {} normalizer_spec",
                                  model.pieces.size(), trainer ? "a" : "no", normalizer ? "a" : "no"),
                      "copy the file again");
  return model;
}

class SentencePieceTokenizer final : public Tokenizer {
 public:
  SentencePieceTokenizer(const std::filesystem::path& path, const FolderSettings& settings) : file_(path.string()) {
    const std::string bytes = read_file(path, std::uint64_t{1} << 28);
    model_ = parse_model(bytes, file_);
    refuse_unsupported();
    enter_pieces();
    make_rules();
    const auto find = [&](const std::string& token) -> std::int64_t { return id_of(token); };
    const auto control = [&](const std::string& token) -> std::int64_t {
      const std::int32_t id = id_of(token);
      return id >= 0 && type(id) == PieceType::control ? id : -1;
    };
    special_ =
        resolve_special_ids(settings, {control(model_.bos_piece), control(model_.eos_piece)}, vocab_size(), find);
    // LlamaTokenizer puts BOS first unless its configuration says otherwise.
    adds_bos_ = settings.add_bos_token.value_or(true) && special_.bos >= 0;
  }

  using Tokenizer::encode;
  std::vector<std::int64_t> encode(std::string_view text) const override {
    check_utf8(text, "the text to encode");
    std::vector<std::int64_t> ids;
    const std::string normalized = normalize(text);
    ids.reserve(normalized.size() / 3);
    const auto encode_part = [&](std::string_view part) {
      const auto encode_new = [this](std::string_view fresh) { return encode_piece(fresh); };
      if (!cut_exact_) return append_merged(part, ids);
      for (const std::string_view piece : cut_before_spaces(part)) cache_.append(piece, ids, encode_new);
    };
    // The cache is shared by all calls; a call is short, and calls on one tokenizer from several threads are rare.
    const std::lock_guard<std::mutex> lock(cache_mutex_);
    // User-defined pieces are found first, the longest at each place, and nothing merges with them.
    const std::string_view whole = normalized;
    std::size_t pending = 0;
    for (std::size_t position = 0; position < whole.size() && !user_defined_.empty();) {
      const std::string* found = user_defined_at(whole.substr(position));
      if (found == nullptr) {
        position += code_point_at(whole, position).bytes;
        continue;
      }
      encode_part(whole.substr(pending, position - pending));
      ids.push_back(id_of(*found));
      pending = position += found->size();
    }
    encode_part(whole.substr(pending));
    return ids;
  }

  std::string decode(const std::vector<std::int64_t>& ids) const override {
    std::string text, bytes;
    const auto flush_bytes = [&] {
      // As the library does: what is no character becomes one U+FFFD a byte.
      for (std::string_view rest = bytes; !rest.empty();) {
        const std::size_t good = std::min(rest.size(), invalid_utf8_at(rest));
        text += rest.substr(0, good);
        rest.remove_prefix(good);
        if (rest.empty()) break;
        text += "\xEF\xBF\xBD";
        rest.remove_prefix(1);
      }
      bytes.clear();
    };
    bool at_start = true;
    for (const std::int64_t id : ids) {
      if (id < 0 || id >= vocab_size())
        throw InputError(fmt::format("token id {} is outside the vocabulary of {}", id, vocab_size()));
      const Piece& piece = model_.pieces[static_cast<std::size_t>(id)];
      if (piece.type == PieceType::control || piece.type == PieceType::unknown) continue;
      if (piece.type == PieceType::byte) {
        bytes.push_back(static_cast<char>(byte_value_.at(static_cast<std::int32_t>(id))));
        continue;
      }
      flush_bytes();
      if (!text.empty()) at_start = false;
      std::string_view surface = piece.text;
      if (at_start && (model_.add_dummy_prefix || model_.remove_extra_spaces) && surface.starts_with(space_symbol)) {
        surface.remove_prefix(space_symbol.size());
        // Only one space was put there; with extra spaces removed, all leading ones go.
        at_start = model_.remove_extra_spaces;
      }
      text += replace_all(surface, space_symbol, " ");
    }
    flush_bytes();
    return text;
  }

  std::string token_text(std::int64_t id) const override {
    if (id < 0 || id >= vocab_size())
      throw InputError(fmt::format("token id {} is outside the vocabulary of {}", id, vocab_size()));
    return model_.pieces[static_cast<std::size_t>(id)].text;
  }

  std::int64_t vocab_size() const override { return static_cast<std::int64_t>(model_.pieces.size()); }
  std::int64_t bos() const override { return special_.bos; }
  std::int64_t eos() const override { return special_.eos; }
  bool adds_bos() const override { return adds_bos_; }
  std::string kind() const override { return "sentencepiece"; }

 private:
  [[noreturn]] void unsupported(const std::string& what) const {
    throw InputError(fmt::format("{}: {} is not supported", file_, what),
                     "headfold reads SentencePiece models as LLaMA has them: BPE with the identity normaliser; a "
                     "tokenizer.json in the "
                     "same folder is read instead when tokenizer.model is moved away");
  }
  [[noreturn]] void corrupt(const std::string& why) const { throw CorruptFile(file_, why, "copy the file again"); }

  static constexpr std::size_t longest_piece = 4096;  // 16 characters is what the trainer makes unless told otherwise

  PieceType type(std::int32_t id) const { return model_.pieces[static_cast<std::size_t>(id)].type; }
  std::int32_t id_of(std::string_view text) const {
    const auto found = ids_.find(text);
    return found == ids_.end() ? -1 : found->second;
  }

  void refuse_unsupported() const {
    if (model_.model_type != 2) {
      static constexpr std::array<const char*, 5> names = {"0", "unigram", "BPE", "word", "character"};
      unsupported(fmt::format("a SentencePiece model of type {}", model_.model_type < names.size()
                                                                      ? names[model_.model_type]
                                                                      : std::to_string(model_.model_type)));
    }
    if (model_.has_character_map) unsupported("a normaliser with a character map (such as nmt_nfkc)");
    if (model_.space_as_suffix) unsupported("treat_whitespace_as_suffix");
    if (!model_.escape_spaces) unsupported("a normaliser that does not escape spaces");
  }

  void enter_pieces() {
    byte_ids_.fill(-1);
    ids_.reserve(model_.pieces.size());
    for (std::size_t index = 0; index < model_.pieces.size(); ++index) {
      const Piece& piece = model_.pieces[index];
      const auto id = static_cast<std::int32_t>(index);
      if (piece.text.empty()) corrupt(fmt::format("piece {} is empty", id));
      // Rules are made for every way to cut a piece, so a long one costs its length squared.
      if (piece.text.size() > longest_piece)
        corrupt(fmt::format("piece {} has {} bytes; {} are the most", id, piece.text.size(), longest_piece));
      if (invalid_utf8_at(piece.text) != std::string_view::npos) corrupt(fmt::format("piece {} is not UTF-8", id));
      if (std::isnan(piece.score)) corrupt(fmt::format("piece {} (\"{}\") has no score", id, piece.text.substr(0, 80)));
      if (!ids_.emplace(piece.text, id).second)
        corrupt(fmt::format("piece \"{}\" is there twice", piece.text.substr(0, 80)));
      switch (piece.type) {
        case PieceType::normal:
        case PieceType::control:
          break;
        case PieceType::unknown:
          if (unknown_id_ >= 0) corrupt("there are two unknown pieces");
          unknown_id_ = id;
          break;
        case PieceType::user_defined:
          user_defined_.push_back(piece.text);
          break;
        case PieceType::unused:
          unsupported("a piece of type unused");
        case PieceType::byte: {
          if (!model_.byte_fallback) corrupt("it has byte pieces, but does not say byte_fallback");
          int value = 0;
          while (value < 256 && fmt::format("<0x{:02X}>", value) != piece.text) ++value;
          if (value == 256) corrupt(fmt::format("byte piece \"{}\" names no byte", piece.text.substr(0, 80)));
          byte_ids_[static_cast<std::size_t>(value)] = id;
          byte_value_[id] = static_cast<unsigned char>(value);
          break;
        }
        default:
          corrupt(fmt::format("piece {} has the type {}", id, static_cast<std::uint64_t>(piece.type)));
      }
    }
    if (unknown_id_ < 0) corrupt("there is no unknown piece");
    if (model_.byte_fallback && std::count(byte_ids_.begin(), byte_ids_.end(), -1) > 0)
      corrupt("it says byte_fallback, but there is not a piece for every byte");
    if (!user_defined_.empty() && model_.remove_extra_spaces)
      unsupported("user-defined pieces together with remove_extra_whitespaces");
    std::sort(user_defined_.begin(), user_defined_.end(),
              [](const std::string& a, const std::string& b) { return a.size() > b.size(); });
  }

  /// The library merges the pair whose joined text is the piece of highest score, the leftmost of equals. That is
  /// byte-pair merging with one rule for every way to cut a piece in two symbols, ranked by the score of the whole.
  void make_rules() {
    std::vector<std::int32_t> order;
    for (std::int32_t id = 0; id < static_cast<std::int32_t>(model_.pieces.size()); ++id)
      if (type(id) == PieceType::normal || type(id) == PieceType::user_defined) order.push_back(id);
    const auto score = [&](std::int32_t id) { return model_.pieces[static_cast<std::size_t>(id)].score; };
    std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) { return score(a) > score(b); });
    rules_ = MergeRules(2 * order.size());
    std::int32_t rank = 0;
    cut_exact_ = true;
    for (std::size_t i = 0; i < order.size(); ++i) {
      if (i > 0 && score(order[i]) != score(order[i - 1])) ++rank;
      const std::string_view text = model_.pieces[static_cast<std::size_t>(order[i])].text;
      for (std::size_t cut = code_point_at(text, 0).bytes; cut < text.size(); cut += code_point_at(text, cut).bytes) {
        const std::int32_t left = symbol_for(text.substr(0, cut)), right = symbol_for(text.substr(cut));
        if (left >= 0 && right >= 0) rules_.add(left, right, {rank, order[i]});
      }
      if (crosses_space(text)) cut_exact_ = false;
    }
    // An unknown character joins an unknown one before it; a cut between the two would be seen.
    if (!model_.byte_fallback && mergeable(id_of(space_symbol)) < 0) cut_exact_ = false;
  }

  /// `id` when text can be that piece, else -1: control, unknown and byte pieces are never made from text.
  std::int32_t mergeable(std::int32_t id) const {
    return id >= 0 && (type(id) == PieceType::normal || type(id) == PieceType::user_defined) ? id : -1;
  }

  /// The symbol of a part of a piece: a piece, or a single character that is none (numbered after the pieces); -1 for
  /// anything else, which never comes up while merging.
  std::int32_t symbol_for(std::string_view part) {
    if (const std::int32_t id = mergeable(id_of(part)); id >= 0) return id;
    if (code_point_at(part, 0).bytes != part.size()) return -1;
    const auto next = static_cast<std::int32_t>(model_.pieces.size() + lone_characters_.size());
    const auto [found, fresh] = lone_ids_.emplace(std::string(part), next);
    if (fresh) lone_characters_.emplace_back(part);
    return found->second;
  }

  const std::string* user_defined_at(std::string_view text) const {
    for (const std::string& piece : user_defined_)
      if (text.starts_with(piece)) return &piece;
    return nullptr;
  }

  std::string normalize(std::string_view text) const {
    if (!model_.remove_extra_spaces) {
      if (text.empty()) return {};
      return (model_.add_dummy_prefix ? std::string(space_symbol) : std::string()) +
             replace_all(text, " ", space_symbol);
    }
    std::string result;
    bool after_space = true;
    for (const char c : text) {
      if (c == ' ') {
        if (!after_space) result += ' ';
        after_space = true;
      } else {
        result += c;
        after_space = false;
      }
    }
    if (result.empty()) return {};
    result =
        (model_.add_dummy_prefix ? std::string(space_symbol) : std::string()) + replace_all(result, " ", space_symbol);
    // The library looks for trailing spaces in the escaped text, so a U+2581 of the text itself goes too.
    while (result.ends_with(space_symbol)) result.resize(result.size() - space_symbol.size());
    return result;
  }

  Ids encode_piece(std::string_view piece) const {
    const auto vocabulary = static_cast<std::int32_t>(model_.pieces.size());
    if (piece.size() > std::size_t{1} << 30)
      throw InputError(fmt::format("a text of {} bytes without a space to cut it at is too long", piece.size()));
    Ids symbols;
    symbols.reserve(piece.size());
    // A character that is in no piece is carried along as minus its place, less two (minus one is taken).
    for (std::size_t i = 0; i < piece.size();) {
      const std::string_view character = piece.substr(i, code_point_at(piece, i).bytes);
      std::int32_t symbol = mergeable(id_of(character));
      if (symbol < 0) {
        const auto lone = lone_ids_.find(character);
        symbol = lone != lone_ids_.end() ? lone->second : -2 - static_cast<std::int32_t>(i);
      }
      symbols.push_back(symbol);
      i += character.size();
    }
    rules_.merge(symbols);
    Ids ids;
    ids.reserve(symbols.size());
    bool after_unknown = false;
    for (const std::int32_t symbol : symbols) {
      if (symbol >= 0 && symbol < vocabulary) {
        ids.push_back(symbol);
        after_unknown = false;
        continue;
      }
      if (!model_.byte_fallback) {
        if (!after_unknown) ids.push_back(unknown_id_);
        after_unknown = true;
        continue;
      }
      std::string_view character;
      if (symbol >= vocabulary) {
        character = lone_characters_[static_cast<std::size_t>(symbol - vocabulary)];
      } else {
        const auto place = static_cast<std::size_t>(-2 - static_cast<std::int64_t>(symbol));
        character = piece.substr(place, code_point_at(piece, place).bytes);
      }
      for (const char byte : character) ids.push_back(byte_ids_[static_cast<unsigned char>(byte)]);
    }
    return ids;
  }

  void append_merged(std::string_view part, std::vector<std::int64_t>& ids) const {
    const Ids merged = encode_piece(part);
    ids.insert(ids.end(), merged.begin(), merged.end());
  }

  std::string file_;
  ModelFile model_;
  TextMap<std::int32_t> ids_;
  TextMap<std::int32_t> lone_ids_;  ///< characters that occur in pieces and are none themselves
  std::vector<std::string> lone_characters_;
  std::vector<std::string> user_defined_;  ///< longest first
  std::array<std::int32_t, 256> byte_ids_{};
  std::unordered_map<std::int32_t, unsigned char> byte_value_;
  std::int32_t unknown_id_ = -1;
  MergeRules rules_;
  bool cut_exact_ = false;
  SpecialIds special_;
  bool adds_bos_ = false;
  mutable std::mutex cache_mutex_;
  mutable PieceCache cache_;
};

}  // namespace

std::unique_ptr<Tokenizer> load_sentencepiece(const std::filesystem::path& file, const FolderSettings& settings) {
  return std::make_unique<SentencePieceTokenizer>(file, settings);
}

}  // namespace headfold::tokenizer
