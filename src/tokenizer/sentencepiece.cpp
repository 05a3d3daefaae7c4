#include <headfold/base/files.h>
#include <headfold/tokenizer/loaders.h>
#include <headfold/tokenizer/utf8.h>
#include <sentencepiece_processor.h>

#include <limits>

namespace headfold::tokenizer {
namespace {

/// Walks the fields of one protobuf message. The library's parser accepts a file that was cut between two fields, so
/// the shape of the file is checked before it sees it.
class ProtobufFields {
 public:
  ProtobufFields(std::string_view bytes, const std::string& file) : bytes_(bytes), file_(file) {}

  struct Field {
    std::uint64_t number = 0;
    std::string_view content;  ///< of length-delimited fields; empty for the others
  };

  bool next(Field& field) {
    if (position_ == bytes_.size()) return false;
    const std::uint64_t tag = varint();
    field = {tag >> 3, {}};
    switch (tag & 7) {
      case 0:
        varint();
        break;
      case 1:
        field.content = {};
        take(8);
        break;
      case 2:
        field.content = take(varint());
        break;
      case 5:
        take(4);
        break;
      default:
        fail(fmt::format("field type {} does not exist", tag & 7));
    }
    if (field.number == 0) fail("field number 0 does not exist");
    return true;
  }

 private:
  [[noreturn]] void fail(const std::string& why) const {
    throw CorruptFile(file_,
                      fmt::format("is not a whole SentencePiece model (byte {} of this part: {})", position_, why),
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

void check_model_file(std::string_view bytes, const std::string& file) {
  refuse_placeholder(bytes, file);
  ProtobufFields model(bytes, file);
  ProtobufFields::Field field;
  std::size_t pieces = 0;
  bool trainer = false, normalizer = false;
  while (model.next(field)) {
    if (field.number > 3) continue;
    ProtobufFields part(field.content, file);
    ProtobufFields::Field inner;
    while (part.next(inner)) continue;
    pieces += field.number == 1 ? 1 : 0;
    trainer = trainer || field.number == 2;
    normalizer = normalizer || field.number == 3;
  }
  // The order in the file is pieces, trainer_spec, normalizer_spec: a file cut short lacks the later ones.
  if (pieces == 0 || !trainer || !normalizer)
    throw CorruptFile(file,
                      fmt::format("is not a whole SentencePiece model: {} pieces, {} trainer_spec, {} normalizer_spec",
                                  pieces, trainer ? "a" : "no", normalizer ? "a" : "no"),
                      "copy the file again");
}

class SentencePieceTokenizer final : public Tokenizer {
 public:
  SentencePieceTokenizer(const std::filesystem::path& path, const FolderSettings& settings) {
    const std::string file = path.string();
    const std::string bytes = read_file(path, std::uint64_t{1} << 28);
    check_model_file(bytes, file);
    if (const auto status = processor_.LoadFromSerializedProto(bytes); !status.ok())
      throw CorruptFile(file, fmt::format("SentencePiece does not accept the file: {}", status.ToString()),
                        "copy the file again");
    const auto find = [&](const std::string& token) -> std::int64_t {
      const int id = processor_.PieceToId(token);
      return processor_.IdToPiece(id) == token ? id : -1;
    };
    special_ = resolve_special_ids(settings, {processor_.bos_id(), processor_.eos_id()}, vocab_size(), find);
    // LlamaTokenizer puts BOS first unless its configuration says otherwise.
    adds_bos_ = settings.add_bos_token.value_or(true) && special_.bos >= 0;
  }

  using Tokenizer::encode;
  std::vector<std::int64_t> encode(std::string_view text) const override {
    check_utf8(text, "the text to encode");
    // The library counts bytes in int.
    if (text.size() > static_cast<std::size_t>(std::numeric_limits<int>::max() / 4))
      throw InputError(fmt::format("a text of {} bytes is too long for SentencePiece", text.size()),
                       "cut it into documents");
    std::vector<int> ids;
    if (const auto status = processor_.Encode(text, &ids); !status.ok())
      throw InternalError(fmt::format("SentencePiece could not encode a text: {}", status.ToString()));
    return {ids.begin(), ids.end()};
  }

  std::string decode(const std::vector<std::int64_t>& ids) const override {
    std::vector<int> kept;
    kept.reserve(ids.size());
    for (const std::int64_t id : ids) {
      if (id < 0 || id >= vocab_size())
        throw InputError(fmt::format("token id {} is outside the vocabulary of {}", id, vocab_size()));
      const int narrow = static_cast<int>(id);
      if (!processor_.IsControl(narrow) && !processor_.IsUnknown(narrow)) kept.push_back(narrow);
    }
    std::string text;
    if (const auto status = processor_.Decode(kept, &text); !status.ok())
      throw InternalError(fmt::format("SentencePiece could not decode ids: {}", status.ToString()));
    return text;
  }

  std::int64_t vocab_size() const override { return processor_.GetPieceSize(); }
  std::int64_t bos() const override { return special_.bos; }
  std::int64_t eos() const override { return special_.eos; }
  bool adds_bos() const override { return adds_bos_; }
  std::string kind() const override { return "sentencepiece"; }

 private:
  sentencepiece::SentencePieceProcessor processor_;
  SpecialIds special_;
  bool adds_bos_ = false;
};

}  // namespace

std::unique_ptr<Tokenizer> load_sentencepiece(const std::filesystem::path& file, const FolderSettings& settings) {
  return std::make_unique<SentencePieceTokenizer>(file, settings);
}

}  // namespace headfold::tokenizer
