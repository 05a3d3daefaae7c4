// Synthetic retrieval: a sentence hidden at a chosen depth of a text of a chosen length.

#include <headfold/evaluation/definitions.h>
#include <headfold/evaluation/python_random.h>

#include <algorithm>
#include <cmath>

namespace headfold::evaluation {
namespace {

constexpr std::uint32_t kSeed = 20240229;  // documents are the same in every run

/// Sentences around the hidden one.
const std::vector<std::string>& filler() {
  static const std::vector<std::string> sentences = {"The grass is green.", "The sky is blue.", "The sun is yellow.",
                                                     "Here we go.", "There and back again."};
  return sentences;
}

/// `count` sentences of filler with `hidden` after the first depth * count of them.
std::string haystack(std::int64_t count, double depth, const std::string& hidden) {
  const auto place = static_cast<std::int64_t>(std::llround(depth * static_cast<double>(count)));
  std::string text;
  for (std::int64_t i = 0; i <= count; ++i) {
    if (i == place) text += (text.empty() ? "" : " ") + hidden;
    if (i < count) text += (text.empty() ? "" : " ") + filler()[static_cast<std::size_t>(i) % filler().size()];
  }
  return text;
}

std::vector<std::int64_t> lengths_of(const SuiteOptions& options, const std::string& task) {
  if (!options.tokens) throw InternalError(task + " needs a function that counts tokens");
  std::vector<std::int64_t> lengths = options.retrieval.lengths;
  if (lengths.empty())
    for (std::int64_t length = 256; length <= options.max_length; length *= 2) lengths.push_back(length);
  if (lengths.empty())
    throw UsageError(
        fmt::format("{}: the model reads {} tokens, and the shortest length is 256", task, options.max_length),
        "choose lengths with --retrieval-lengths");
  for (const std::int64_t length : lengths)
    if (length < 1 || (options.max_length > 0 && length > options.max_length))
      throw UsageError(
          fmt::format("{}: length {} is outside 1 to {}, what the model reads", task, length, options.max_length));
  if (options.retrieval.depths.empty() || options.retrieval.samples < 1)
    throw UsageError(fmt::format("{}: no depth, or no sample for each", task));
  for (const double depth : options.retrieval.depths)
    if (!(depth >= 0 && depth <= 1)) throw UsageError(fmt::format("{}: depth {} is outside 0 to 1", task, depth));
  return lengths;
}

struct Cell {
  std::int64_t length, sample;
  double depth;
};

/// Items for every cell of the grid. `fill(item, random, depth, count)` writes an item with `count` sentences around;
/// it draws the same from equal generators whatever the count.
template <class F>
std::vector<Item> fill_grid(const SuiteOptions& options, const std::string& task, std::int64_t answer_tokens,
                            F&& fill) {
  std::vector<Item> items;
  std::uint32_t seed = kSeed;
  for (const std::int64_t length : lengths_of(options, task)) {
    for (const double depth : options.retrieval.depths) {
      for (std::int64_t sample = 0; sample < options.retrieval.samples; ++sample, ++seed) {
        Item item;
        const auto tokens_with = [&](std::int64_t count) {
          PythonRandom random(seed);
          item = Item();
          fill(item, random, depth, count);
          return options.tokens(item.context) + answer_tokens;
        };
        // The most sentences with which prompt and answer still fit: sentences take at least one token.
        std::int64_t low = 0, high = length;
        if (tokens_with(0) > length)
          throw UsageError(
              fmt::format("{}: a prompt without any text around takes {} tokens with its answer, more than "
                          "the length {}",
                          task, tokens_with(0), length),
              "choose longer --retrieval-lengths");
        while (low < high) {
          const std::int64_t middle = low + (high - low + 1) / 2;
          if (tokens_with(middle) <= length) {
            low = middle;
          } else {
            high = middle - 1;
          }
        }
        const std::int64_t tokens = tokens_with(low);
        item.where = fmt::format("length {}, depth {}", length, depth);
        item.fields["length"] = length;
        item.fields["depth"] = depth;
        item.fields["sample"] = sample;
        item.fields["tokens"] = tokens;
        items.push_back(item);
      }
    }
  }
  return items;
}

/// Mohtashami and Jaggi 2023: a number among filler sentences, to be written out.
std::vector<Item> make_passkey(const SuiteOptions& options) {
  return fill_grid(options, "passkey", 8, [](Item& item, PythonRandom& random, double depth, std::int64_t count) {
    const std::string key = std::to_string(10000 + random.randbelow(90000));
    item.context =
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
        "it. I will quiz you about the important information there.\n" +
        haystack(count, depth, fmt::format("The pass key is {}. Remember it. {} is the pass key.", key, key)) +
        "\nWhat is the pass key? The pass key is";
    item.references = {key};
    item.answer = item.target = key;
    item.fields["key"] = key;
  });
}

/// A word told once, asked for among ten: the likeliest counts, so that small models can show what they keep.
std::vector<Item> make_needle(const SuiteOptions& options) {
  static const std::vector<std::string> words = {"apple", "bread",  "candle", "drum", "eagle",
                                                 "flute", "garden", "hammer", "iron", "jacket"};
  static const std::vector<std::string> owners = {"the captain", "the doctor",  "the farmer", "the judge",
                                                  "the miller",  "the painter", "the queen",  "the sailor"};
  return fill_grid(options, "needle", 4, [](Item& item, PythonRandom& random, double depth, std::int64_t count) {
    const std::string& owner = owners[random.randbelow(static_cast<std::uint32_t>(owners.size()))];
    item.gold = random.randbelow(static_cast<std::uint32_t>(words.size()));
    item.choices = words;
    item.answer = words[static_cast<std::size_t>(item.gold)];
    item.target = std::to_string(item.gold);
    item.context = haystack(count, depth, fmt::format("The secret word of {} is {}.", owner, item.answer)) +
                   fmt::format(" The secret word of {} is", owner);
    item.fields["key"] = item.answer;
  });
}

bool is_digit(char c) {
  return c >= '0' && c <= '9';
}

/// The first number in the text is the key.
double finds_key(const std::string& text, const std::string& key) {
  const auto begin = std::find_if(text.begin(), text.end(), is_digit);
  const auto end = std::find_if_not(begin, text.end(), is_digit);
  return std::string(begin, end) == key ? 1 : 0;
}

std::string length_of(const Item& item) {
  return std::to_string(item.fields["length"].get<std::int64_t>());
}

}  // namespace

std::vector<Definition> retrieval_definitions() {
  Definition passkey;
  passkey.name = "passkey";
  passkey.about = "a number hidden in filler text, written out";
  passkey.version = "headfold-1";
  passkey.metrics = {"acc"};
  passkey.rules.type = OutputType::generation;
  passkey.rules.fixed_shots = true;
  passkey.rules.max_new_tokens = 8;
  passkey.score = best_reference_scorer(
      "acc", false,
      [](const std::string& prediction, const std::string& key, const Item&) { return finds_key(prediction, key); });
  passkey.make = make_passkey;
  passkey.by = length_of;
  Definition needle;
  needle.name = "needle";
  needle.about = "a word told once in filler text, the likeliest of ten";
  needle.version = "headfold-1";
  needle.metrics = {"acc"};
  needle.rules.fixed_shots = true;
  needle.score = choice_scorer({"acc"});
  needle.make = make_needle;
  needle.by = length_of;
  return {passkey, needle};
}

}  // namespace headfold::evaluation
