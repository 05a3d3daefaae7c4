#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/base/hash.h>
#include <headfold/base/json.h>
#include <headfold/calibration/text.h>
#include <headfold/tokenizer/utf8.h>

#include <spdlog/spdlog.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <span>

namespace headfold::calibration {
namespace {

constexpr std::string_view byte_order_mark = "\xEF\xBB\xBF";

bool is_json_lines(const std::filesystem::path& path) {
  const std::string extension = path.extension().string();
  if (extension == ".jsonl" || extension == ".json") return true;  // C4's .json files are JSON lines
  if (extension == ".txt" || extension == ".raw") return false;    // WikiText's .raw files are plain text
  throw InputError(fmt::format("{}: text is read from .txt (.raw) and .jsonl (.json) files, not from \"{}\"",
                               path.string(), extension),
                   "rename plain text to .txt, or write one JSON object a line to a .jsonl file");
}

std::string_view view(const MappedFile& file) {
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

/// Names and types of an object's fields, for the message about a wrong --field.
std::string fields_of(const Json& object) {
  std::string names;
  std::size_t shown = 0;
  for (const auto& [key, value] : object.items()) {
    if (shown++ == 20) return names + ", …";
    names += fmt::format("{}\"{}\" ({})", names.empty() ? "" : ", ", key.substr(0, 60), value.type_name());
  }
  return names.empty() ? "none" : names;
}

std::string document_of_line(std::string_view line, const std::string& field, const std::string& place) {
  tokenizer::check_utf8(line, place);
  const Json object = parse_json(line, place);
  if (!object.is_object())
    throw CorruptFile(place, fmt::format("holds a JSON {} where an object such as {{\"{}\": \"…\"}} is expected",
                                         object.type_name(), field));
  const auto found = object.find(field);
  if (found == object.end())
    throw InputError(fmt::format("{}: there is no field \"{}\"; fields there: {}", place, field, fields_of(object)),
                     "name the field that holds the text with --field");
  if (!found->is_string())
    throw InputError(fmt::format("{}: field \"{}\" holds a JSON {}, not a text; fields there: {}", place, field,
                                 found->type_name(), fields_of(object)),
                     "name the field that holds the text with --field");
  return found->get<std::string>();
}

/// Uniform in [0, bound) from full 64-bit draws, by rejection; std::uniform_int_distribution differs between standard
/// libraries.
std::uint64_t below(std::mt19937_64& generator, std::uint64_t bound) {
  const std::uint64_t unusable = (0 - bound) % bound;  // 2^64 mod bound
  for (;;) {
    const std::uint64_t value = generator();
    if (value >= unusable) return value % bound;
  }
}

}  // namespace

std::vector<std::string> read_documents(const std::vector<std::filesystem::path>& files, const std::string& field) {
  if (files.empty()) throw InputError("no text files were given", "name .txt or .jsonl files with --data");
  std::vector<std::string> documents;
  std::size_t bytes = 0;
  for (const auto& path : files) {
    const bool lines = is_json_lines(path);
    const MappedFile file(path);
    std::string_view text = view(file);
    if (text.starts_with(byte_order_mark)) text.remove_prefix(byte_order_mark.size());
    if (!lines) {
      tokenizer::check_utf8(text, path.string());
      documents.push_back(tokenizer::unix_lines(text));
      bytes += text.size();
      continue;
    }
    std::size_t number = 0;
    for (std::size_t begin = 0; begin < text.size();) {
      ++number;
      std::size_t end = text.find('\n', begin);
      if (end == std::string_view::npos) end = text.size();
      const std::string_view line = text.substr(begin, end - begin);
      begin = end + 1;
      if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
      documents.push_back(document_of_line(line, field, fmt::format("{}:{}", path.string(), number)));
      bytes += documents.back().size();
    }
  }
  if (bytes == 0) {
    std::string names;
    for (const auto& path : files) names += (names.empty() ? "" : ", ") + path.string();
    throw InputError(fmt::format("there is no text in {}", names), "name files with text in them with --data");
  }
  return documents;
}

std::string data_hash(const std::vector<std::filesystem::path>& files, const std::string& field) {
  // Every part is preceded by its length, so that text moved from one file's end to the next one's start changes the
  // hash.
  Sha256 hash;
  hash.update(fmt::format("field {} {}\n", field.size(), field));
  for (const auto& path : files) {
    const bool lines = is_json_lines(path);
    const MappedFile file(path);
    hash.update(fmt::format("{} {}\n", lines ? "jsonl" : "txt", file.size()));
    hash.update(file.bytes());
  }
  return hash.hex();
}

std::vector<std::int64_t> token_stream(const tokenizer::Tokenizer& tokenizer, const std::vector<std::string>& documents,
                                       tokenizer::Bos bos) {
  if (bos == tokenizer::Bos::always) tokenizer.encode({}, bos);  // refuses a tokenizer that has none
  const bool leads = bos != tokenizer::Bos::never && tokenizer.bos() >= 0;
  std::vector<std::int64_t> stream;
  for (const std::string& document : documents) {
    if (leads) stream.push_back(tokenizer.bos());
    const std::vector<std::int64_t> ids = tokenizer.encode(document);
    stream.insert(stream.end(), ids.begin(), ids.end());
    if (!leads && tokenizer.eos() >= 0) stream.push_back(tokenizer.eos());
  }
  return stream;
}

std::vector<std::int64_t> shuffled(std::int64_t count, std::uint64_t seed, std::int64_t first) {
  if (first < 0 || first > count) first = count;
  std::vector<std::int64_t> order(static_cast<std::size_t>(count));
  std::iota(order.begin(), order.end(), std::int64_t{0});
  std::mt19937_64 generator(seed);
  for (std::int64_t i = 0; i < first; ++i) {
    const auto chosen = i + static_cast<std::int64_t>(below(generator, static_cast<std::uint64_t>(count - i)));
    std::swap(order[static_cast<std::size_t>(i)], order[static_cast<std::size_t>(chosen)]);
  }
  order.resize(static_cast<std::size_t>(first));
  return order;
}

at::Tensor draw_sequences(const std::vector<std::int64_t>& stream, std::int64_t samples, std::int64_t length,
                          std::uint64_t seed) {
  if (samples < 1 || length < 1)
    throw InputError(
        fmt::format("{} sequences of {} tokens were asked for; both numbers must be at least 1", samples, length));
  const auto windows = static_cast<std::int64_t>(stream.size()) / length;
  if (windows < samples)
    throw InputError(fmt::format("the text has {} tokens, enough for {} sequences of {} tokens, but {} were asked for",
                                 stream.size(), windows, length, samples),
                     "give more text with --data, or ask for fewer (--samples) or shorter (--seq-len) sequences");
  const std::vector<std::int64_t> order = shuffled(windows, seed, samples);
  at::Tensor sequences = at::empty({samples, length}, at::kLong);
  auto* target = sequences.data_ptr<std::int64_t>();
  for (std::int64_t i = 0; i < samples; ++i) {
    const std::int64_t* source = stream.data() + order[static_cast<std::size_t>(i)] * length;
    std::copy(source, source + length, target + i * length);
  }
  return sequences;
}

at::Tensor read_sequences(const comm::Communicator& world, const std::filesystem::path& model_folder,
                          std::int64_t vocab, const TextSample& text) {
  at::Tensor sequences;
  world.on_root([&] {
    const auto tokenizer = tokenizer::load_tokenizer(model_folder);
    const std::vector<std::string> documents = read_documents(text.files, text.field);
    const std::vector<std::int64_t> stream = token_stream(*tokenizer, documents, text.bos);
    spdlog::info("{} documents, {} tokens", documents.size(), stream.size());
    sequences = draw_sequences(stream, text.skip + text.samples, text.length, static_cast<std::uint64_t>(text.seed))
                    .slice(0, text.skip)
                    .contiguous();
    const auto largest = sequences.max().item<std::int64_t>();
    if (largest >= vocab)
      throw InputError(fmt::format("{}: the tokenizer gives id {}, but the model's vocabulary has {} entries",
                                   model_folder.string(), largest, vocab),
                       "do tokenizer and weights belong together?");
  });
  // Only now is it known that the text yields that many.
  if (!sequences.defined()) sequences = at::empty({text.samples, text.length}, at::kLong);
  world.broadcast(std::as_writable_bytes(
      std::span(sequences.data_ptr<std::int64_t>(), static_cast<std::size_t>(sequences.numel()))));
  return sequences;
}

}  // namespace headfold::calibration
