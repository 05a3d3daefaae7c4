#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/base/hash.h>
#include <headfold/base/index.h>
#include <headfold/base/json.h>
#include <headfold/calibration/text.h>
#include <headfold/finetune/data.h>
#include <headfold/tokenizer/utf8.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <numeric>

namespace headfold::finetune {
namespace {

std::string names_of(const std::vector<std::filesystem::path>& files) {
  std::string names;
  for (const auto& file : files) names += (names.empty() ? "" : ", ") + file.string();
  return names;
}

// Instructions.

struct Row {
  std::string place, prompt, answer;
};

bool has_text(const Json& row, const char* key) {
  const auto found = row.find(key);
  return found != row.end() && found->is_string();
}
bool is_instruction(const Json& row) {
  return row.is_object() && ((has_text(row, "instruction") && row.contains("output")) ||
                             (has_text(row, "prompt") && row.contains("response")));
}

Row row_of(const Json& json, const std::string& place) {
  if (!json.is_object())
    throw InputError(
        fmt::format("{}: holds a JSON {} where an object with instruction and output, or prompt and response, "
                    "is expected",
                    place, json.type_name()));
  Row row;
  row.place = place;
  if (json.contains("instruction") && json.contains("output")) {
    row.prompt = alpaca_prompt(required<std::string>(json, "instruction", place),
                               optional<std::string>(json, "input", "", place));
    row.answer = required<std::string>(json, "output", place);
  } else if (json.contains("prompt") && json.contains("response")) {
    row.prompt = required<std::string>(json, "prompt", place);
    row.answer = required<std::string>(json, "response", place);
  } else {
    std::string keys;
    for (const auto& [key, value] : json.items())
      if (keys.size() < 300) keys += fmt::format("{}\"{}\"", keys.empty() ? "" : ", ", key.substr(0, 60));
    throw InputError(fmt::format("{}: has neither instruction and output nor prompt and response; fields there: {}",
                                 place, keys.empty() ? "none" : keys),
                     "plain text is trained on with --format text --field NAME");
  }
  if (row.answer.find_first_not_of(" \t\r\n") == std::string::npos)
    throw InputError(fmt::format("{}: the answer is empty, there is nothing to learn from it", place),
                     "take such rows out of the file");
  return row;
}

/// Calls `take` for every row of a .json array or a file of JSON lines, until it says false.
void each_row(const std::filesystem::path& path,
              const std::function<bool(const Json&, const std::string& place)>& take) {
  std::string text = read_file(path);
  tokenizer::check_utf8(text, path.string());
  if (text.starts_with("\xEF\xBB\xBF")) text.erase(0, 3);  // some editors begin UTF-8 with a byte-order mark
  const std::size_t first = text.find_first_not_of(" \t\r\n");
  if (path.extension() == ".json" && first != std::string::npos && text[first] == '[') {
    const Json list = parse_json(text, path.string());
    if (list.empty())
      throw InputError(fmt::format("{}: the array is empty, there are no instructions in it", path.string()),
                       "name files with rows in them with --data");
    for (std::size_t i = 0; i < list.size(); ++i)
      if (!take(list[i], fmt::format("{}: entry {}", path.string(), i))) return;
    return;
  }
  std::size_t number = 0;
  for (std::size_t begin = 0; begin < text.size();) {
    ++number;
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view line = std::string_view(text).substr(begin, end - begin);
    begin = end + 1;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const std::string place = fmt::format("{}:{}", path.string(), number);
    if (!take(parse_json(line, place), place)) return;
  }
}

bool looks_like_instructions(const std::filesystem::path& path) {
  if (path.extension() != ".json" && path.extension() != ".jsonl") return false;
  bool found = false;
  each_row(path, [&](const Json& row, const std::string&) {
    found = is_instruction(row);
    return false;
  });
  return found;
}

struct Packed {
  std::vector<std::int32_t> tokens;
  std::vector<std::uint8_t> flags;
  Dataset::Origin origin;
};

void append(Packed& packed, const std::vector<std::int64_t>& ids, std::size_t begin, std::size_t end) {
  for (std::size_t i = begin; i < end; ++i) packed.tokens.push_back(static_cast<std::int32_t>(ids[i]));
}

/// Prompt and answer are tokenised as one text, as they will be seen in use; the answer begins where this text's tokens
/// depart from those of the prompt alone.
void pack_row(Packed& packed, const Row& row, const tokenizer::Tokenizer& tokenizer, const DataOptions& options) {
  const std::vector<std::int64_t> prompt = tokenizer.encode(row.prompt, options.bos);
  std::vector<std::int64_t> ids = tokenizer.encode(row.prompt + row.answer, options.bos);
  if (tokenizer.eos() >= 0) ids.push_back(tokenizer.eos());
  const auto departed = std::mismatch(prompt.begin(), prompt.end(), ids.begin(), ids.end()).second - ids.begin();
  const std::int64_t answer = std::max<std::int64_t>(departed, 1);  // the first token of all is predicted by none
  if (answer >= options.length && options.skip_long) {
    ++packed.origin.skipped;
    return;
  }
  if (answer >= options.length)
    throw InputError(
        fmt::format("{}: the prompt alone has {} tokens, a sequence has {}: nothing of the answer would be left",
                    row.place, answer, options.length),
        "raise --seq-len, or leave such rows out with --skip-long");
  auto size = static_cast<std::int64_t>(ids.size());
  packed.origin.tokens += size;
  if (size > options.length) {
    size = options.length;
    ++packed.origin.cut;
  }
  const auto used = static_cast<std::int64_t>(packed.flags.size()) % options.length;
  if (used != 0 && used + size > options.length) {
    packed.origin.padding += options.length - used;
    packed.flags.push_back(Dataset::unscored | Dataset::segment_start);
    packed.flags.resize(packed.flags.size() + ix(options.length - used - 1), Dataset::unscored);
    packed.tokens.resize(packed.flags.size(), 0);
  }
  append(packed, ids, 0, ix(size));
  for (std::int64_t i = 0; i < size; ++i) {
    // Position i predicts token i + 1.
    const bool scored = i + 1 >= answer && i + 1 < size;
    packed.flags.push_back(
        static_cast<std::uint8_t>((scored ? 0 : Dataset::unscored) | (i == 0 ? Dataset::segment_start : 0)));
  }
}

Packed pack_instructions(const tokenizer::Tokenizer& tokenizer, const DataOptions& options) {
  Packed packed;
  packed.origin.kind = "instructions";
  for (const auto& file : options.files) {
    each_row(file, [&](const Json& json, const std::string& place) {
      pack_row(packed, row_of(json, place), tokenizer, options);
      ++packed.origin.documents;
      return true;
    });
  }
  if (packed.origin.documents == packed.origin.skipped && packed.origin.skipped > 0)
    throw InputError(fmt::format("{}: none of the {} prompts leaves room for an answer in {} tokens",
                                 names_of(options.files), packed.origin.skipped, options.length),
                     "raise --seq-len");
  if (packed.origin.documents == 0)
    throw InputError(fmt::format("there are no instructions in {}", names_of(options.files)),
                     "name files with rows in them with --data");
  const auto used = static_cast<std::int64_t>(packed.flags.size()) % options.length;
  if (used != 0) {
    packed.origin.padding += options.length - used;
    packed.flags.push_back(Dataset::unscored | Dataset::segment_start);
    packed.flags.resize(packed.flags.size() + ix(options.length - used - 1), Dataset::unscored);
  }
  packed.tokens.resize(packed.flags.size() + 1, 0);
  return packed;
}

// Text.

Packed pack_text(const tokenizer::Tokenizer& tokenizer, const DataOptions& options) {
  const std::vector<std::string> documents = calibration::read_documents(options.files, options.field);
  const std::int64_t length = options.length;
  Packed packed;
  packed.origin.kind = "text";
  packed.origin.documents = static_cast<std::int64_t>(documents.size());
  std::vector<std::uint8_t> starts;
  for (const std::string& document : documents) {
    const std::vector<std::int64_t> ids = calibration::token_stream(tokenizer, {document}, options.bos);
    if (ids.empty()) continue;
    append(packed, ids, 0, ids.size());
    if (!options.separate_documents) continue;
    starts.resize(packed.tokens.size(), 0);
    starts[packed.tokens.size() - ids.size()] = 1;
  }
  const auto tokens = static_cast<std::int64_t>(packed.tokens.size());
  packed.origin.tokens = tokens;
  std::int64_t sequences = options.blocks ? tokens / length : (tokens - 1) / length;
  if (options.limit > 0) sequences = std::min(sequences, options.limit);
  if (sequences < 1)
    throw InputError(fmt::format("{}: the text has {} tokens, fewer than one sequence of {} needs",
                                 names_of(options.files), tokens, length),
                     "give more text, or shorter sequences with --seq-len");
  packed.origin.left_out = tokens - sequences * length;
  packed.tokens.resize(ix(sequences * length + 1), 0);
  packed.flags.assign(ix(sequences * length), 0);
  for (std::int64_t s = 0; options.blocks && s < sequences; ++s)
    packed.flags[ix((s + 1) * length - 1)] |= Dataset::unscored;
  if (options.separate_documents) {
    starts.resize(std::max(starts.size(), packed.flags.size() + 1), 0);
    for (std::size_t i = 0; i < packed.flags.size(); ++i) {
      if (starts[i] != 0) packed.flags[i] |= Dataset::segment_start;
      if (starts[i + 1] != 0) packed.flags[i] |= Dataset::unscored;
    }
  }
  return packed;
}

}  // namespace

DataFormat parse_data_format(const std::string& name) {
  if (name == "auto") return DataFormat::automatic;
  if (name == "text") return DataFormat::text;
  if (name == "instructions") return DataFormat::instructions;
  throw UsageError(fmt::format("--format {}: choose auto, text or instructions", name));
}

std::string alpaca_prompt(const std::string& instruction, const std::string& input) {
  if (input.empty())
    return fmt::format(
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\n{}\n\n### Response:",
        instruction);
  return fmt::format(
      "Below is an instruction that describes a task, paired with an input that provides further context. "
      "Write a response that appropriately completes the request.\n\n### Instruction:\n{}\n\n### "
      "Input:\n{}\n\n### Response:",
      instruction, input);
}

std::uint64_t mixed(std::uint64_t seed, std::uint64_t a, std::uint64_t b) {
  const auto mix = [](std::uint64_t x) {
    x += 0x9e3779b97f4a7c15ULL;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    return x ^ (x >> 31);
  };
  return mix(mix(mix(seed) ^ a) ^ b);
}

Dataset::Dataset(std::int64_t length, std::vector<std::int32_t> tokens, std::vector<std::uint8_t> flags)
    : length_(length),
      sequences_(static_cast<std::int64_t>(flags.size()) / std::max<std::int64_t>(length, 1)),
      tokens_(std::move(tokens)),
      flags_(std::move(flags)) {
  if (length < 1 || flags_.size() != ix(sequences_ * length_) || tokens_.size() != flags_.size() + 1)
    throw InternalError(
        fmt::format("a data set of {} tokens and {} flags in sequences of {}", tokens_.size(), flags_.size(), length));
  scored_.resize(ix(sequences_));
  for (std::int64_t s = 0; s < sequences_; ++s) {
    for (std::int64_t t = s * length_; t < (s + 1) * length_; ++t) {
      if ((flags_[ix(t)] & unscored) == 0) ++scored_[ix(s)];
      if (t > s * length_ && (flags_[ix(t)] & segment_start) != 0) segments_ = true;
    }
  }
  Sha256 hash;
  hash.update(fmt::format("sequences of {}\n", length_));
  hash.update(std::as_bytes(std::span(tokens_)));
  hash.update(std::as_bytes(std::span(flags_)));
  fingerprint_ = hash.hex();
}

std::int64_t Dataset::scored() const {
  return std::accumulate(scored_.begin(), scored_.end(), std::int64_t{0});
}

std::int64_t Dataset::bytes() const {
  return static_cast<std::int64_t>(tokens_.capacity() * sizeof(tokens_[0]) + flags_.capacity() * sizeof(flags_[0]) +
                                   scored_.capacity() * sizeof(scored_[0]));
}

Batch Dataset::batch(std::span<const std::int64_t> sequences) const {
  const auto rows = static_cast<std::int64_t>(sequences.size());
  Batch batch;
  batch.ids = at::empty({rows, length_}, at::kLong);
  batch.targets = at::empty({rows, length_}, at::kLong);
  if (segments_) batch.segments = at::empty({rows, length_}, at::kLong);
  auto* ids = batch.ids.data_ptr<std::int64_t>();
  auto* targets = batch.targets.data_ptr<std::int64_t>();
  auto* segments = segments_ ? batch.segments.data_ptr<std::int64_t>() : nullptr;
  for (const std::int64_t sequence : sequences) {
    if (sequence < 0 || sequence >= sequences_)
      throw InternalError(fmt::format("sequence {} of {}", sequence, sequences_));
    std::int64_t segment = 0;
    for (std::int64_t t = sequence * length_; t < (sequence + 1) * length_; ++t) {
      *ids++ = tokens_[ix(t)];
      *targets++ = (flags_[ix(t)] & unscored) != 0 ? -1 : tokens_[ix(t) + 1];
      if (segments == nullptr) continue;
      if (t > sequence * length_ && (flags_[ix(t)] & segment_start) != 0) ++segment;
      *segments++ = segment;
    }
  }
  return batch;
}

Dataset read_dataset(const comm::Communicator& world, const std::filesystem::path& model_folder, std::int64_t vocab,
                     const DataOptions& options) {
  Packed packed;
  world.on_root([&] {
    if (options.files.empty()) throw InputError("no data files were given", "name them with --data");
    const auto tokenizer = tokenizer::load_tokenizer(model_folder);
    const bool instructions =
        options.format == DataFormat::instructions ||
        (options.format == DataFormat::automatic && looks_like_instructions(options.files.front()));
    packed = instructions ? pack_instructions(*tokenizer, options) : pack_text(*tokenizer, options);
    const auto largest = *std::max_element(packed.tokens.begin(), packed.tokens.end());
    if (largest >= vocab)
      throw InputError(fmt::format("{}: the tokenizer gives id {}, but the model's vocabulary has {} entries",
                                   model_folder.string(), largest, vocab),
                       "do tokenizer and weights belong together?");
    const Dataset::Origin& origin = packed.origin;
    if (origin.cut > 0)
      spdlog::warn("{} of {} rows are longer than a sequence of {} tokens and were cut", origin.cut, origin.documents,
                   options.length);
    if (origin.skipped > 0)
      spdlog::warn("{} of {} rows were left out: their prompts leave no room for an answer in {} tokens",
                   origin.skipped, origin.documents, options.length);
  });
  std::string origin;
  if (world.root())
    origin = Json{packed.origin.kind,     packed.origin.documents, packed.origin.tokens, packed.origin.cut,
                  packed.origin.left_out, packed.origin.padding,   packed.origin.skipped}
                 .dump();
  world.broadcast(origin);
  std::array<std::int64_t, 1> count{static_cast<std::int64_t>(packed.flags.size())};
  world.broadcast(std::as_writable_bytes(std::span(count)));
  packed.flags.resize(ix(count[0]));
  packed.tokens.resize(ix(count[0] + 1));
  world.broadcast(std::as_writable_bytes(std::span(packed.flags)));
  world.broadcast(std::as_writable_bytes(std::span(packed.tokens)));
  Dataset dataset(options.length, std::move(packed.tokens), std::move(packed.flags));
  const Json list = Json::parse(origin);
  const auto number = [&](std::size_t i) { return list[i].get<std::int64_t>(); };
  dataset.origin.kind = list[0].get<std::string>();
  dataset.origin.documents = number(1);
  dataset.origin.tokens = number(2);
  dataset.origin.cut = number(3);
  dataset.origin.left_out = number(4);
  dataset.origin.padding = number(5);
  dataset.origin.skipped = number(6);
  return dataset;
}

std::vector<std::int64_t> Sampler::draw(std::int64_t begin, std::int64_t count) {
  std::vector<std::int64_t> drawn;
  drawn.reserve(ix(count));
  for (std::int64_t index = begin; index < begin + count; ++index) {
    if (const std::int64_t epoch = epoch_of(index); epoch != epoch_) {
      order_ = calibration::shuffled(sequences_, mixed(seed_, static_cast<std::uint64_t>(epoch)));
      epoch_ = epoch;
    }
    drawn.push_back(order_[ix(index % sequences_)]);
  }
  return drawn;
}

}  // namespace headfold::finetune
