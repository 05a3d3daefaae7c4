#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/calibration/text.h>
#include <headfold/evaluation/registry.h>
#include <headfold/evaluation/tasks.h>
#include <headfold/evaluation/text.h>

#include <algorithm>

namespace headfold::evaluation {
namespace {

bool is_jsonl(const fs::path& file) {
  return file.extension() == ".jsonl";
}
bool is_wikitext(const fs::path& file) {
  return file.extension() == ".raw";
}

std::string file_list(const std::vector<fs::path>& files) {
  std::string text;
  for (const fs::path& file : files) text += (text.empty() ? "" : ", ") + file.string();
  return text;
}

std::int64_t limited(std::int64_t count, std::int64_t limit) {
  return limit > 0 ? std::min(limit, count) : count;
}

/// The first `limit` windows of a stream (0: all). `where` names the text.
void cut_blocks(Task& task, const std::vector<std::int64_t>& stream, std::int64_t limit, const std::string& where) {
  task.stream_tokens = static_cast<std::int64_t>(stream.size());
  task.windows = block_windows(stream, task.max_length);
  if (task.windows.empty())
    throw InputError(fmt::format("the text is shorter than one window: {} tokens, and a window has {} ({})",
                                 stream.size(), task.max_length, where),
                     "choose a smaller --seq-len or more text");
  task.items_original = static_cast<std::int64_t>(task.windows.size());
  task.items = limited(task.items_original, limit);
  task.windows.resize(static_cast<std::size_t>(task.items));
}

}  // namespace

Joiner parse_joiner(const std::string& name) {
  if (name == "auto") return Joiner::automatic;
  if (name == "documents") return Joiner::documents;
  if (name == "paper") return Joiner::paper;
  throw UsageError(fmt::format("--joiner {}: choose auto, documents or paper", name));
}

tokenizer::Bos parse_bos(const std::string& name) {
  if (name == "default") return tokenizer::Bos::model_default;
  if (name == "always") return tokenizer::Bos::always;
  if (name == "never") return tokenizer::Bos::never;
  throw UsageError(fmt::format("--bos {}: choose default, always or never", name));
}

const char* name_of(tokenizer::Bos bos) {
  switch (bos) {
    case tokenizer::Bos::model_default:
      return "default";
    case tokenizer::Bos::always:
      return "always";
    case tokenizer::Bos::never:
      return "never";
  }
  throw InternalError("unknown BOS policy");
}

std::int64_t Task::predictions() const {
  std::int64_t count = 0;
  for (const Window& window : windows) count += static_cast<std::int64_t>(window.targets.size());
  return count;
}

std::int64_t Task::input_tokens() const {
  std::int64_t count = 0;
  for (const Window& window : windows) count += static_cast<std::int64_t>(window.inputs.size());
  return count;
}

Task blocks_task(const tokenizer::Tokenizer& tokenizer, const TextSource& source, std::int64_t length,
                 std::int64_t limit) {
  Joiner joiner = source.joiner;
  if (joiner == Joiner::automatic) {
    const auto jsonl = std::count_if(source.files.begin(), source.files.end(), is_jsonl);
    if (jsonl != 0 && jsonl != static_cast<std::ptrdiff_t>(source.files.size()))
      throw UsageError(
          fmt::format("--data mixes .jsonl and plain text, which are joined differently: {}", file_list(source.files)),
          "say --joiner documents or --joiner paper, or evaluate them one at a time");
    joiner = jsonl != 0 ? Joiner::documents : Joiner::paper;
  }
  Task task;
  task.kind = TaskKind::blocks;
  task.name = fmt::format("ppl_blocks@{}", length);
  task.max_length = length;
  std::vector<std::int64_t> stream;
  if (joiner == Joiner::documents) {
    stream = calibration::token_stream(tokenizer, calibration::read_documents(source.files, source.field), source.bos);
    const bool leads = source.bos != tokenizer::Bos::never && tokenizer.bos() >= 0;
    task.recipe = fmt::format("documents tokenised one by one, {}, cut into windows of {} tokens, remainder dropped",
                              leads ? "BOS before each" : "EOS after each where there is one", length);
  } else {
    std::vector<std::string> rows;
    for (const fs::path& file : source.files) {
      for (std::string& document : calibration::read_documents({file}, source.field)) {
        if (is_jsonl(file)) {
          rows.push_back(std::move(document));
        } else {
          for (std::string& row : text_rows(document)) rows.push_back(std::move(row));
        }
      }
    }
    stream = tokenizer.encode(join_rows(rows), source.bos);
    task.recipe = fmt::format(
        "rows with their own newline joined by two newlines, tokenised once (BOS {}, once), cut into windows of {} "
        "tokens, "
        "remainder dropped",
        name_of(source.bos), length);
  }
  task.bos = source.bos;
  task.files = source.files;
  task.field = source.field;
  cut_blocks(task, stream, limit, file_list(source.files));
  return task;
}

Task perplexity_task(const tokenizer::Tokenizer& tokenizer, const PerplexityText& text, std::int64_t length,
                     tokenizer::Bos bos, std::int64_t limit) {
  if (text.rolling) {
    TextSource source;
    source.files = {text.file};
    source.bos = bos;
    Task task = rolling_task(tokenizer, source, length, limit);
    if (text.published > 0 && task.items_original != text.published)
      task.recipe += fmt::format("; {} pages, the published text has {}: not comparable with published figures",
                                 task.items_original, text.published);
    return task;
  }
  Task task;
  task.kind = TaskKind::blocks;
  task.name = fmt::format("{}_ppl_blocks@{}", text.name, length);
  task.max_length = length;
  task.recipe = fmt::format("{}, tokenised once (BOS {}), cut into windows of {} tokens, remainder dropped",
                            text.recipe, name_of(bos), length);
  task.bos = bos;
  task.files = {text.file};
  task.field = "text";
  const std::int64_t most = text.blocks > 0 && limit > 0 ? std::min(text.blocks, limit) : std::max(text.blocks, limit);
  cut_blocks(task, tokenizer.encode(joined_text(text), bos), most, text.file.string());
  return task;
}

Task rolling_task(const tokenizer::Tokenizer& tokenizer, const TextSource& source, std::int64_t max_length,
                  std::int64_t limit) {
  const auto raw = std::count_if(source.files.begin(), source.files.end(), is_wikitext);
  if (raw != 0 && raw != static_cast<std::ptrdiff_t>(source.files.size()))
    throw UsageError(fmt::format("--data mixes WikiText (.raw) with other text, which are scored differently: {}",
                                 file_list(source.files)),
                     "evaluate them one at a time");
  const std::int64_t prefix = tokenizer.bos() >= 0 ? tokenizer.bos() : tokenizer.eos();
  if (prefix < 0) throw InputError("rolling perplexity needs a first token, and the tokenizer has neither BOS nor EOS");
  std::vector<std::string> texts;
  if (raw != 0) {
    for (const std::string& file : calibration::read_documents(source.files, source.field))
      for (std::string& page : wikitext_pages(file)) texts.push_back(std::move(page));
  } else {
    texts = calibration::read_documents(source.files, source.field);
  }
  Task task;
  task.kind = TaskKind::rolling;
  task.name = raw != 0 ? "wikitext" : "rolling";
  task.recipe = fmt::format(
      "{}, rolling windows of {} tokens with one token of context (BOS {}); words and bytes of the original text",
      raw != 0 ? "WikiText pages, detokenised" : "documents as they stand", max_length, name_of(source.bos));
  task.max_length = max_length;
  task.bos = source.bos;
  task.files = source.files;
  task.field = source.field;
  task.items_original = static_cast<std::int64_t>(texts.size());
  task.items = limited(task.items_original, limit);
  texts.resize(static_cast<std::size_t>(task.items));
  for (std::string& text : texts) {
    Document document;
    document.scored = raw != 0 ? wikitext_detokenize(text) : text;
    document.words = count_words(text);
    document.bytes = static_cast<std::int64_t>(text.size());
    document.original = std::move(text);
    const std::vector<std::int64_t> ids = tokenizer.encode(document.scored, source.bos);
    task.stream_tokens += static_cast<std::int64_t>(ids.size());
    for (Window& window : rolling_windows(ids, prefix, max_length, static_cast<std::int64_t>(task.documents.size())))
      task.windows.push_back(std::move(window));
    task.documents.push_back(std::move(document));
  }
  if (task.windows.empty())
    throw InputError(fmt::format("the text is empty: {} documents without a single token ({})", task.items,
                                 file_list(source.files)));
  return task;
}

void check_ids(const Task& task, std::int64_t vocab, const std::string& model) {
  for (std::size_t w = 0; w < task.windows.size(); ++w) {
    for (const std::vector<std::int64_t>* ids : {&task.windows[w].inputs, &task.windows[w].targets}) {
      const auto bad = std::find_if(ids->begin(), ids->end(), [&](std::int64_t id) { return id < 0 || id >= vocab; });
      if (bad != ids->end())
        throw InputError(fmt::format("{}: token id {} in window {} of {} is outside the model's vocabulary of {}",
                                     model, *bad, w, task.name, vocab),
                         "do the tokenizer files in the model folder belong to this model?");
    }
  }
}

}  // namespace headfold::evaluation
