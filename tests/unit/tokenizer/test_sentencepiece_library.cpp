// The SentencePiece reader against libsentencepiece itself, in a process without libtorch.

#include <gtest/gtest.h>
#include <headfold/base/files.h>
#include <headfold/base/json.h>
#include <headfold/tokenizer/tokenizer.h>
#include <headfold/tokenizer/utf8.h>
#include <sentencepiece_processor.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <random>

namespace headfold::tokenizer {
namespace {

const fs::path demo = HEADFOLD_DEMO_FOLDER;

std::string demo_model() {
  return read_file(demo / "models/prose-llama/tokenizer.model");
}

std::vector<std::string> real_documents() {
  std::vector<std::string> documents;
  const std::string content = read_file(demo / "text/heldout.jsonl");
  for (std::size_t begin = 0; begin < content.size();) {
    const std::size_t end = content.find('\n', begin);
    documents.push_back(Json::parse(content.substr(begin, end - begin)).at("text").get<std::string>());
    begin = end + 1;
  }
  return documents;
}

/// Both readers of one model file.
class Pair {
 public:
  explicit Pair(const std::string& bytes) {
    const fs::path folder = fs::temp_directory_path() / ("headfold-test-sentencepiece-" + std::to_string(::getpid()));
    write_file(folder / "tokenizer.model", bytes);
    ours_ = load_tokenizer(folder);
    fs::remove_all(folder);
    EXPECT_TRUE(library_.LoadFromSerializedProto(bytes).ok());
    EXPECT_EQ(ours_->vocab_size(), library_.GetPieceSize());
    EXPECT_EQ(ours_->bos(), library_.bos_id());
    EXPECT_EQ(ours_->eos(), library_.eos_id());
  }
  std::vector<std::int64_t> expected(const std::string& text) const {
    const std::vector<int> ids = library_.EncodeAsIds(text);
    return {ids.begin(), ids.end()};
  }
  /// Same ids, and the same text from them. Returns the number of ids.
  std::size_t compare(const std::string& text) const {
    const auto ids = expected(text);
    EXPECT_EQ(ours_->encode(text), ids) << testing::PrintToString(text.substr(0, 300));
    compare_decoding(ids);
    return ids.size();
  }
  void compare_decoding(const std::vector<std::int64_t>& ids) const {
    std::vector<int> kept;  // special tokens are left out by ours; the library writes U+2047 for the unknown one
    for (const std::int64_t id : ids)
      if (!library_.IsControl(static_cast<int>(id)) && !library_.IsUnknown(static_cast<int>(id)))
        kept.push_back(static_cast<int>(id));
    EXPECT_EQ(ours_->decode(ids), library_.DecodeIds(kept)) << testing::PrintToString(ids);
  }
  const Tokenizer& ours() const { return *ours_; }
  const sentencepiece::SentencePieceProcessor& library() const { return library_; }

 private:
  std::unique_ptr<Tokenizer> ours_;
  sentencepiece::SentencePieceProcessor library_;
};

std::string random_text(std::mt19937& generator, std::size_t characters, const std::vector<std::string>& fragments) {
  std::string text;
  for (std::size_t i = 0; i < characters; ++i) {
    switch (generator() % 7) {
      case 0:
        text += ' ';
        break;
      case 1:
        append_utf8(text, 0x20 + generator() % 0x5F);
        break;
      case 2:
        append_utf8(text, 0x80 + generator() % 0xD000);
        break;
      case 3:
        append_utf8(text, 0x10000 + generator() % 0x10000);
        break;
      case 4:
        text += fragments[generator() % fragments.size()];
        break;
      default:
        append_utf8(text, U'a' + generator() % 26);
    }
  }
  return text;
}

const std::vector<std::string> fragments = {"  ",   "\n",    "\t",     "▁",    "the ",   " the",    "<s>",
                                            "</s>", "<unk>", "<0x41>", "1234", "e t",    "<sep>",   "<sepsep>",
                                            "✓",    "✗",     "✓✗",     "s ",   "\u3000", "\xC2\xA0"};

void compare_widely(const Pair& pair, std::size_t rounds) {
  for (const char* text : {"",
                           " ",
                           "  ",
                           "\n",
                           "\t",
                           "a",
                           " a",
                           "a ",
                           "a  b",
                           "  a  b  ",
                           "▁",
                           "▁▁a",
                           "<s>",
                           "a</s>b",
                           "Hello world",
                           "1234",
                           "👍",
                           "naïve café",
                           "日本語 テキスト",
                           "✓✗✓",
                           "<sep><sepsep>",
                           "the\u3000end",
                           "\x01\x7F"})
    pair.compare(text);
  std::mt19937 generator(17);
  for (std::size_t round = 0; round < rounds; ++round)
    pair.compare(random_text(generator, generator() % 60, fragments));
  for (std::size_t round = 0; round < rounds; ++round) {
    std::vector<std::int64_t> ids(generator() % 30);
    // Half of the ids are byte pieces, which the decoder joins to characters or replaces.
    for (auto& id : ids)
      id = static_cast<std::int64_t>(generator() % 2 == 0
                                         ? 3 + generator() % 256
                                         : generator() % static_cast<std::uint32_t>(pair.ours().vocab_size()));
    pair.compare_decoding(ids);
  }
}

/// A piece in protobuf, to be put after the end of a model: repeated fields may be anywhere.
std::string piece(const std::string& text, float score, char type) {
  std::string body = "\x0A" + std::string(1, static_cast<char>(text.size())) + text + "\x15";
  const auto bits = std::bit_cast<std::uint32_t>(score);
  for (int i = 0; i < 4; ++i) body += static_cast<char>(bits >> (8 * i));
  body += std::string("\x18") + type;
  return "\x0A" + std::string(1, static_cast<char>(body.size())) + body;
}

/// The demo model with bytes changed: `from` must be there once.
std::string changed(const std::string& from, const std::string& to) {
  std::string bytes = demo_model();
  const std::size_t at = bytes.rfind(from);
  EXPECT_NE(at, std::string::npos);
  return bytes.replace(at, from.size(), to);
}

const std::string normalizer_flags("\x18\x01\x20\x00", 4);  // add_dummy_prefix 1, remove_extra_whitespaces 0

TEST(SentencePieceLibraryTest, all_of_the_held_out_text) {
  const Pair pair(demo_model());
  std::size_t tokens = 0;
  for (const std::string& document : real_documents()) tokens += pair.compare(document);
  EXPECT_GT(tokens, 150000U);
  compare_widely(pair, 2000);
}

TEST(SentencePieceLibraryTest, normaliser_flags) {
  for (const std::string& flags :
       {std::string("\x18\x00\x20\x00", 4), std::string("\x18\x01\x20\x01", 4), std::string("\x18\x00\x20\x01", 4)}) {
    const Pair pair(changed(normalizer_flags, flags));
    compare_widely(pair, 500);
  }
}

TEST(SentencePieceLibraryTest, without_byte_fallback) {
  std::string bytes = changed("\x98\x02\x01", std::string("\x98\x02\x00", 3));
  // Byte pieces become plain ones: the library refuses them without byte_fallback. Text, tag and four bytes of score,
  // then tag and type.
  std::size_t at = 0;
  for (int byte = 0; byte < 256; ++byte) {
    at = bytes.find("<0x", at) + 12;
    ASSERT_EQ(bytes.substr(at - 1, 2), "\x18\x06");
    bytes[at] = 1;
  }
  const Pair pair(bytes);
  compare_widely(pair, 500);
  const auto ids = pair.ours().encode("日本 a");
  EXPECT_EQ(std::count(ids.begin(), ids.end(), 0), 1) << "neighbouring unknown characters are one token";
}

TEST(SentencePieceLibraryTest, user_defined_pieces) {
  const Pair pair(demo_model() + piece("<sep>", 0, 4) + piece("<sepsep>", 0, 4) + piece("e▁t", 0, 4));
  compare_widely(pair, 1000);
}

TEST(SentencePieceLibraryTest, pieces_across_spaces_and_of_characters_that_are_no_pieces) {
  const Pair pair(demo_model() + piece("s▁", 10, 1) + piece("s▁t", 9, 1) + piece("✓✗", 5, 1) + piece("▁✓✗", 6, 1));
  compare_widely(pair, 1000);
  for (const std::string& document : real_documents()) pair.compare(document.substr(0, document.find(' ', 300)));
}

TEST(SentencePieceLibraryTest, equal_scores_merge_the_leftmost) {
  const Pair pair(demo_model() + piece("qxq", 3, 1) + piece("qx", 4, 1) + piece("xq", 4, 1) + piece("qxqx", 3, 1));
  std::mt19937 generator(23);
  for (int round = 0; round < 500; ++round) {
    std::string text;
    for (std::size_t i = 0; i < 40; ++i) text += "qx q"[generator() % 4];
    pair.compare(text);
  }
}

TEST(SentencePieceLibraryTest, speed) {
  const Pair pair(demo_model());
  std::string prose;
  const auto documents = real_documents();
  while (prose.size() < 4000000)
    for (const std::string& document : documents) prose += document;
  const auto rate = [&](const std::string& text, const auto& encode) {
    const auto start = std::chrono::steady_clock::now();
    const auto ids = encode(text);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    EXPECT_LT(seconds, 30);
    EXPECT_GT(ids.size(), 0U);
    return static_cast<double>(text.size()) / 1e6 / seconds;
  };
  const auto ours = [&](const std::string& text) { return pair.ours().encode(text); };
  fmt::print("prose: ours {:.1f} MB/s, libsentencepiece {:.1f} MB/s\n", rate(prose, ours),
             rate(prose.substr(0, 500000), [&](const std::string& text) { return pair.library().EncodeAsIds(text); }));
  std::mt19937 generator(1);
  std::string letters(1000000, ' ');
  for (char& c : letters) c = static_cast<char>('a' + generator() % 26);
  fmt::print("a million letters without a space: {:.1f} MB/s\n", rate(letters, ours));
  EXPECT_EQ(pair.ours().decode(pair.ours().encode(letters)), letters);
}

}  // namespace
}  // namespace headfold::tokenizer
