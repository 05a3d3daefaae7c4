#include <headfold/evaluation/definitions.h>
#include <headfold/evaluation/metrics.h>
#include <headfold/evaluation/python_text.h>
#include <headfold/evaluation/text.h>

namespace headfold::evaluation {
namespace {

std::vector<Item> read_gsm8k(const FoundSplit& split, bool chain_of_thought) {
  std::vector<Item> items;
  for (const Record& record : read_records(split.documents)) {
    Item item;
    item.where = record.where;
    const std::string question = text_field(record, "question"), answer = text_field(record, "answer");
    const std::size_t mark = answer.rfind("####");
    if (mark == std::string::npos)
      throw InputError(fmt::format("{}: key \"answer\" has no result after \"####\"", record.where));
    item.context =
        fmt::format("{}: {}\n{}:", chain_of_thought ? "Q" : "Question", question, chain_of_thought ? "A" : "Answer");
    item.target = chain_of_thought ? std::string(strip(std::string_view(answer).substr(mark + 4))) : answer;
    item.answer = answer;
    item.references = {item.target};
    item.fields = {{"question", question}, {"answer", answer}};
    items.push_back(std::move(item));
  }
  return items;
}

/// The eight worked examples of Wei et al. 2022, table 20.
std::vector<Item> worked_examples() {
  const std::vector<std::pair<std::string, std::string>> examples = {
      {"There are 15 trees in the grove. Grove workers will plant trees in the grove today. After they are done, there "
       "will be 21 trees. How many trees did the grove workers plant today?",
       "There are 15 trees originally. Then there were 21 trees after some more were planted. So there must have been "
       "21 - 15 = 6. The answer is 6."},
      {"If there are 3 cars in the parking lot and 2 more cars arrive, how many cars are in the parking lot?",
       "There are originally 3 cars. 2 more cars arrive. 3 + 2 = 5. The answer is 5."},
      {"Leah had 32 chocolates and her sister had 42. If they ate 35, how many pieces do they have left in total?",
       "Originally, Leah had 32 chocolates. Her sister had 42. So in total they had 32 + 42 = 74. After eating 35, "
       "they "
       "had 74 - 35 = 39. The answer is 39."},
      {"Jason had 20 lollipops. He gave Denny some lollipops. Now Jason has 12 lollipops. How many lollipops did Jason "
       "give to Denny?",
       "Jason started with 20 lollipops. Then he had 12 after giving some to Denny. So he gave Denny 20 - 12 = 8. The "
       "answer is 8."},
      {"Shawn has five toys. For Christmas, he got two toys each from his mom and dad. How many toys does he have now?",
       "Shawn started with 5 toys. If he got 2 toys each from his mom and dad, then that is 4 more toys. 5 + 4 = 9. "
       "The "
       "answer is 9."},
      {"There were nine computers in the server room. Five more computers were installed each day, from monday to "
       "thursday. How many computers are now in the server room?",
       "There were originally 9 computers. For each of 4 days, 5 more computers were added. So 5 * 4 = 20 computers "
       "were "
       "added. 9 + 20 is 29. The answer is 29."},
      {"Michael had 58 golf balls. On tuesday, he lost 23 golf balls. On wednesday, he lost 2 more. How many golf "
       "balls "
       "did he have at the end of wednesday?",
       "Michael started with 58 golf balls. After losing 23 on tuesday, he had 58 - 23 = 35. After losing 2 more, he "
       "had "
       "35 - 2 = 33 golf balls. The answer is 33."},
      {"Olivia has $23. She bought five bagels for $3 each. How much money does she have left?",
       "Olivia had 23 dollars. 5 bagels for 3 dollars each will be 5 x 3 = 15 dollars. So she has 23 - 15 dollars "
       "left. "
       "23 - 15 is 8. The answer is 8."}};
  std::vector<Item> items;
  for (const auto& [question, answer] : examples) {
    Item item;
    item.where = "the task's own examples";
    item.fields = {{"question", question}, {"target", answer}};
    item.context = "Q: " + question + "\nA:";
    item.answer = answer;
    items.push_back(std::move(item));
  }
  return items;
}

Definition gsm8k(bool chain_of_thought) {
  Definition task;
  task.name = chain_of_thought ? "gsm8k_cot" : "gsm8k";
  task.about = chain_of_thought ? "grade-school mathematics after eight worked examples"
                                : "grade-school mathematics, solved in writing";
  task.version = "3.0";
  task.metrics = {"exact_match"};
  task.score = gsm8k_scorer(chain_of_thought);
  task.evaluated = {
      "test",
      {{"gsm8k/test.jsonl", ""}, {"gsm8k/main/test.jsonl", ""}, {"grade_school_math/data/test.jsonl", ""}},
      1319};
  task.rules.type = OutputType::generation;
  if (chain_of_thought) {
    task.fixed = worked_examples();
    task.rules.sampler = Sampler::first_n;
  } else {
    task.shots = {"train",
                  {{"gsm8k/train.jsonl", ""},
                   {"gsm8k/main/train.jsonl", ""},
                   {"grade_school_math/data/train.jsonl", ""},
                   {"gsm8k/train-first1000.jsonl", ""}},
                  7473};
  }
  task.rules.shots = chain_of_thought ? 8 : 5;
  task.rules.stops = {chain_of_thought ? "Q:" : "Question:", "</s>", "<|im_end|>"};
  task.rules.max_new_tokens = 256;
  task.dataset_path = "openai/gsm8k";
  task.dataset_name = "main";
  task.text_template = chain_of_thought ? "Q: {{question}}\nA:" : "Question: {{question}}\nAnswer:";
  task.target_template =
      chain_of_thought ? "{{answer.split('####')[-1].strip() if answer is defined else target}}" : "{{answer}}";
  task.obtain = "https://github.com/openai/grade-school-math (data/test.jsonl, data/train.jsonl)";
  task.read = [chain_of_thought](const FoundSplit& split) { return read_gsm8k(split, chain_of_thought); };
  return task;
}

std::vector<Item> read_xsum(const FoundSplit& split) {
  std::vector<Item> items;
  UniqueIds ids;
  for (const Record& record : read_records(split.documents)) {
    ids.check(record, "id");
    Item item;
    item.where = record.where;
    const std::string document = text_field(record, "document");
    item.answer = item.target = text_field(record, "summary");
    item.context = "Article: " + document + "\nSummary:";
    item.references = {item.answer};
    item.fields = {{"document", document}, {"summary", item.answer}};
    if (has_field(record, "id")) item.fields["id"] = record.fields["id"];
    items.push_back(std::move(item));
  }
  return items;
}

/// LongBench's prompts, answer lengths and metrics (its dataset2prompt.json, dataset2maxlen.json, eval.py).
struct LongTask {
  const char* name;
  const char* about;
  const char* prompt;  ///< {context} and {input}
  std::int64_t max_new_tokens;
  const char* metric;
  bool one_line;           ///< generation ends with the line
  std::int64_t documents;  ///< published
};

constexpr const char* kPassages =
    "Answer the question based on the given passages. Only give me the answer and do not output any other "
    "words.\n\nThe "
    "following are given passages.\n{context}\n\nAnswer the question based on the given passages. Only give me the "
    "answer "
    "and do not output any other words.\n\nQuestion: {input}\nAnswer:";

const std::vector<LongTask>& long_tasks() {
  static const std::vector<LongTask> tasks = {
      {"qasper", "questions about a scientific article",
       "You are given a scientific article and a question. Answer the question as concisely as you can, using a single "
       "phrase or sentence if possible. If the question cannot be answered based on the information in the article, "
       "write "
       "\"unanswerable\". If the question is a yes/no question, answer \"yes\", \"no\", or \"unanswerable\". Do not "
       "provide any explanation.\n\nArticle: {context}\n\n Answer the question based on the above article as concisely "
       "as "
       "you can, using a single phrase or sentence if possible. If the question cannot be answered based on the "
       "information in the article, write \"unanswerable\". If the question is a yes/no question, answer \"yes\", "
       "\"no\", "
       "or \"unanswerable\". Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
       128, "qa_f1_score", false, 200},
      {"multifieldqa_en", "questions about articles of many fields",
       "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the "
       "above "
       "text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
       64, "qa_f1_score", false, 150},
      {"hotpotqa", "questions over several passages", kPassages, 32, "qa_f1_score", false, 200},
      {"2wikimqa", "questions over several passages", kPassages, 32, "qa_f1_score", false, 200},
      {"musique", "questions over several passages", kPassages, 32, "qa_f1_score", false, 200},
      {"gov_report", "summary of a government report",
       "You are given a report by a government agency. Write a one-page summary of the "
       "report.\n\nReport:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
       512, "rouge_score", false, 200},
      {"qmsum", "questions about a meeting",
       "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one "
       "or "
       "more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript in "
       "one or "
       "more sentences.\n\nQuery: {input}\nAnswer:",
       512, "rouge_score", false, 200},
      {"multi_news", "summary of several news articles",
       "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\nNow, write "
       "a "
       "one-page summary of all the news.\n\nSummary:",
       512, "rouge_score", false, 200},
      {"trec", "type of a question after many examples",
       "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
       64, "classification_score", true, 200},
      {"triviaqa", "trivia after many examples",
       "Answer the question based on the given passage. Only give me the answer and do not output any other words. The "
       "following are some examples.\n\n{context}\n\n{input}",
       32, "qa_f1_score", true, 200},
      {"samsum", "summary of a dialogue after many examples",
       "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
       128, "rouge_score", true, 200},
      {"passage_count", "how many different paragraphs there are",
       "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read "
       "these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other words, "
       "how "
       "many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of unique "
       "paragraphs after removing duplicates. The output format should only contain the number, such as 1, 2, 3, and "
       "so "
       "on.\n\nThe final answer is: ",
       32, "count_score", false, 200},
      {"passage_retrieval_en", "which paragraph a summary is of",
       "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract "
       "is "
       "from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph "
       "that the "
       "abstract is from. The answer format must be like \"Paragraph 1\", \"Paragraph 2\", etc.\n\nThe answer is: ",
       32, "retrieval_score", false, 200}};
  return tasks;
}

std::vector<Item> read_long(const FoundSplit& split, const LongTask& task) {
  std::vector<Item> items;
  UniqueIds ids;
  const std::string metric = task.metric;
  for (const Record& record : read_records(split.documents)) {
    ids.check(record, "_id");
    Item item;
    item.where = record.where;
    item.fields = record.fields;
    // Some dumps of the data set call the field "question".
    const std::string input =
        text_field(record, has_field(record, "input") || !has_field(record, "question") ? "input" : "question");
    const std::string context = text_field(record, "context");
    const std::string prompt = task.prompt;
    for (std::size_t at = 0; at < prompt.size();) {
      const std::string_view rest = std::string_view(prompt).substr(at);
      if (rest.starts_with("{context}")) {
        item.context += context;
        at += 9;
      } else if (rest.starts_with("{input}")) {
        item.context += input;
        at += 7;
      } else {
        item.context.push_back(prompt[at++]);
      }
    }
    item.references = text_list_field(record, "answers");
    if (item.references.empty()) throw InputError(fmt::format("{}: key \"answers\" is empty", record.where));
    item.target = python_list(item.references);
    item.answer = item.references[0];
    if (metric == "classification_score") item.classes = text_list_field(record, "all_classes");
    for (const std::string& reference : item.references)
      if (metric == "retrieval_score" && !retrieval_score("", reference))
        throw InputError(fmt::format("{}: key \"answers\" has {}, expected \"Paragraph\" and a number", record.where,
                                     shown(reference)));
    items.push_back(std::move(item));
  }
  return items;
}

double long_score(const std::string& metric, const std::string& prediction, const std::string& reference,
                  const Item& item) {
  if (metric == "qa_f1_score") return qa_f1(prediction, reference);
  if (metric == "rouge_score") return longbench_rouge(prediction, reference);
  if (metric == "count_score") return count_score(prediction, reference);
  if (metric == "retrieval_score") return retrieval_score(prediction, reference).value_or(0);
  return classification_score(prediction, reference, item.classes);
}

}  // namespace

std::vector<Definition> generation_definitions() {
  std::vector<Definition> all = {gsm8k(false), gsm8k(true)};
  Definition task;
  task.name = "xsum";
  task.about = "one sentence that sums up a news article";
  task.version = "headfold-1";
  task.metrics = {"rouge1", "rouge2", "rougeL"};
  task.score = rouge_scorer();
  task.evaluated = {"test", {{"xsum/test.jsonl", ""}, {"EdinburghNLP/xsum/test.jsonl", ""}}, 11334};
  task.shots = {"train", {{"xsum/train.jsonl", ""}, {"EdinburghNLP/xsum/train.jsonl", ""}}, 204045};
  task.rules.type = OutputType::generation;
  task.rules.stops = {"\n"};
  task.rules.max_new_tokens = 64;
  task.dataset_path = "EdinburghNLP/xsum";
  task.text_template = "Article: {{document}}\nSummary:";
  task.target_template = "{{summary}}";
  task.obtain = "the hub's EdinburghNLP/xsum as JSON lines (document, summary, id)";
  task.read = read_xsum;
  all.push_back(std::move(task));
  return all;
}

std::vector<Definition> longbench_definitions() {
  std::vector<Definition> all;
  for (const LongTask& entry : long_tasks()) {
    Definition task;
    const std::string name = entry.name, metric = entry.metric;
    task.name = "longbench_" + name;
    task.about = std::string("LongBench: ") + entry.about;
    task.version = "5.0";
    task.metrics = {"score", metric};
    task.score = best_reference_scorer(
        metric, true, [metric](const std::string& prediction, const std::string& reference, const Item& item) {
          return long_score(metric, prediction, reference, item);
        });
    task.evaluated = {"test",
                      {{"longbench/" + name + ".jsonl", ""},
                       {"LongBench/data/" + name + ".jsonl", ""},
                       {"LongBench/" + name + ".jsonl", ""},
                       {"longbench/data/" + name + ".jsonl", ""}},
                      entry.documents};
    task.rules.type = OutputType::generation;
    if (entry.one_line) task.rules.stops = {"\n"};
    task.rules.max_new_tokens = entry.max_new_tokens;
    task.dataset_path = "Xnhyacinth/LongBench";
    task.dataset_name = name;
    task.text_template = replaced(replaced(entry.prompt, "{context}", "{{context}}"), "{input}", "{{question}}");
    task.target_template = "{{answers}}";
    task.obtain = "https://huggingface.co/datasets/THUDM/LongBench (data.zip: data/" + name + ".jsonl)";
    task.read = [&entry](const FoundSplit& split) { return read_long(split, entry); };
    all.push_back(std::move(task));
  }
  return all;
}

}  // namespace headfold::evaluation
