#include <headfold/evaluation/definitions.h>
#include <headfold/evaluation/python_text.h>
#include <headfold/evaluation/text.h>

#include <algorithm>

namespace headfold::evaluation {
namespace {

/// Choices with their labels, in both forms in which files have them.
struct Choices {
  std::vector<std::string> texts, labels;
  OrderedJson json() const { return {{"text", texts}, {"label", labels}}; }
};

/// {"text": [...], "label": [...]} or [{"text": ..., "label": ...}].
Choices read_choices(const Record& record) {
  Choices choices;
  const auto found = record.fields.find("choices");
  if (found != record.fields.end() && found->is_array()) {
    for (std::size_t i = 0; i < found->size(); ++i) {
      const Record choice{(*found)[i], fmt::format("{}, in choice {}", record.where, i + 1)};
      if (!choice.fields.is_object())
        throw InputError(fmt::format("{}: {} is no object", choice.where, shown(choice.fields)));
      choices.texts.push_back(text_field(choice, "text"));
      choices.labels.push_back(text_field(choice, "label"));
    }
  } else {
    const Record object = object_field(record, "choices");
    choices.texts = text_list_field(object, "text");
    choices.labels = text_list_field(object, "label");
    if (choices.texts.size() != choices.labels.size())
      throw InputError(
          fmt::format("{}: {} texts and {} labels", object.where, choices.texts.size(), choices.labels.size()));
  }
  if (choices.texts.empty()) throw InputError(fmt::format("{}: key \"choices\" is empty", record.where));
  return choices;
}

/// ARC and OpenBookQA: original (question.stem) and flattened (`stem_key`) form.
std::vector<Item> read_science(const FoundSplit& split, const std::string& stem_key, const std::string& before,
                               const std::string& after) {
  std::vector<Item> items;
  UniqueIds ids;
  for (const Record& record : read_records(split.documents)) {
    if (!has_field(record, "id")) throw InputError(fmt::format("{}: key \"id\" is missing", record.where));
    ids.check(record, "id");
    const auto question = record.fields.find("question");
    const bool original = question != record.fields.end() && question->is_object();
    const Record holder = original ? object_field(record, "question") : record;
    const std::string stem = text_field(holder, original ? "stem" : stem_key);
    const Choices choices = read_choices(holder);
    std::string key = text_field(record, "answerKey");
    key.erase(0, static_cast<std::size_t>(strip(key).empty() ? 0 : strip(key).data() - key.data()));
    Item item;
    item.where = record.where;
    item.fields = {{"id", record.fields["id"]},
                   {stem_key, stem},
                   {"choices", choices.json()},
                   {"answerKey", record.fields["answerKey"]}};
    item.context = fmt::format("{}{}{}", before, stem, after);
    item.choices = choices.texts;
    set_gold(item, label_index(choices.labels, key, record.where, "answerKey"));
    items.push_back(std::move(item));
  }
  return items;
}

/// OpenBookQA's table: ID, Question Stem, Choices "(A) ... (B) ...", Complete Question, Answer Key.
std::vector<Item> read_science_table(const FoundSplit& split) {
  const std::vector<TableRow> rows = read_tsv(split.documents);
  const std::vector<std::string>& header = rows[0].cells;
  const auto column = [&](const std::string& name) {
    const auto found = std::find(header.begin(), header.end(), name);
    if (found == header.end()) throw InputError(fmt::format("{}: no column \"{}\"", rows[0].where, name));
    return static_cast<std::size_t>(found - header.begin());
  };
  const std::size_t id = column("ID"), stem = column("Question Stem"), choice = column("Choices"),
                    key = column("Answer Key");
  std::vector<Item> items;
  UniqueIds ids;
  for (std::size_t r = 1; r < rows.size(); ++r) {
    const TableRow& row = rows[r];
    if (row.cells.size() != header.size())
      throw InputError(fmt::format("{}: {} cells, expected {}", row.where, row.cells.size(), header.size()));
    Choices choices;
    const std::string& all = row.cells[choice];
    std::size_t at = all.find("(A)");
    for (char letter = 'A'; at != std::string::npos; ++letter) {
      const std::size_t next = all.find(fmt::format("({})", static_cast<char>(letter + 1)), at);
      choices.texts.emplace_back(strip(std::string_view(all).substr(at + 3, std::min(next, all.size()) - at - 3)));
      choices.labels.emplace_back(1, letter);
      at = next;
    }
    if (choices.texts.empty())
      throw InputError(fmt::format("{}: column \"Choices\" has no \"(A)\": {}", row.where, shown(all)));
    Item item;
    item.where = row.where;
    const std::string answer(strip(row.cells[key]));
    item.fields = {
        {"id", row.cells[id]}, {"question_stem", row.cells[stem]}, {"choices", choices.json()}, {"answerKey", answer}};
    ids.check({item.fields, item.where}, "id");
    item.context = row.cells[stem];
    item.choices = choices.texts;
    set_gold(item, label_index(choices.labels, answer, row.where, "Answer Key"));
    items.push_back(std::move(item));
  }
  if (items.empty()) throw InputError(fmt::format("{} holds no document", split.documents.string()));
  return items;
}

std::vector<Item> read_openbookqa(const FoundSplit& split) {
  return split.documents.extension() == ".tsv" ? read_science_table(split)
                                               : read_science(split, "question_stem", "", "");
}

/// Labels beside the documents, for documents without a `field`.
std::vector<std::int64_t> labels_beside(const FoundSplit& split, const std::vector<Record>& records,
                                        const std::string& field, std::int64_t first, std::int64_t last) {
  const auto lacks = [&](const Record& record) { return !has_field(record, field); };
  const auto lacking = std::count_if(records.begin(), records.end(), lacks);
  if (lacking == 0) return {};
  // Documents of one file are alike: where some bring a label, one without it is damaged, not unlabelled.
  const bool damaged = lacking < std::ssize(records);
  if (damaged || (split.labels.empty() && split.wanted_labels.empty()))
    throw InputError(fmt::format("{}: key \"{}\" is missing{}",
                                 std::find_if(records.begin(), records.end(), lacks)->where, field,
                                 damaged ? ", and other documents have it" : ""));
  if (split.labels.empty()) {
    throw MissingData(split.task,
                      fmt::format("{}: the documents in {} have no key \"{}\", and their labels are not in {}",
                                  split.task, split.documents.string(), field, split.wanted_labels.string()),
                      split.obtain);
  }
  return read_labels(split.labels, first, last, records.size());
}

std::vector<Item> read_piqa(const FoundSplit& split) {
  const std::vector<Record> records = read_records(split.documents);
  const std::vector<std::int64_t> labels = labels_beside(split, records, "label", 0, 1);
  std::vector<Item> items;
  UniqueIds ids;  // the published files have none, copies with numbered rows do
  for (std::size_t i = 0; i < records.size(); ++i) {
    const Record& record = records[i];
    ids.check(record, "id");
    Item item;
    item.where = record.where;
    const std::string goal = text_field(record, "goal");
    item.context = "Question: " + goal + "\nAnswer:";
    item.choices = {text_field(record, "sol1"), text_field(record, "sol2")};
    set_gold(item, labels.empty() ? number_field(record, "label", 0, 1) : labels[i]);
    item.fields = {{"goal", goal}, {"sol1", item.choices[0]}, {"sol2", item.choices[1]}, {"label", item.gold}};
    items.push_back(std::move(item));
  }
  return items;
}

std::vector<Item> read_hellaswag(const FoundSplit& split) {
  std::vector<Item> items;
  for (const Record& record : read_records(split.documents)) {
    Item item;
    item.where = record.where;
    const std::string before = text_field(record, "ctx_a"), after = text_field(record, "ctx_b");
    const std::string activity = text_field(record, "activity_label");
    const std::vector<std::string> endings = text_list_field(record, "endings");
    if (endings.size() != 4)
      throw InputError(fmt::format("{}: key \"endings\" has {} texts, expected 4", record.where, endings.size()));
    item.context = hellaswag_text(fmt::format("{}: {} {}", activity, before, capitalize(after)));
    for (const std::string& ending : endings) item.choices.push_back(hellaswag_text(ending));
    set_gold(item, number_field(record, "label", 0, 3));
    const auto copy = [&](const char* key) {
      if (record.fields.contains(key)) item.fields[key] = record.fields[key];
    };
    for (const char* key :
         {"ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings", "source_id", "split", "split_type"})
      copy(key);
    item.fields["label"] = std::to_string(item.gold);
    item.fields["query"] = item.context;
    item.fields["choices"] = item.choices;
    item.fields["gold"] = item.gold;
    items.push_back(std::move(item));
  }
  return items;
}

/// The form in which the sentence is already cut: context_options, continuation, gold.
Item cut_sentence(const Record& record) {
  Item item;
  item.where = record.where;
  item.contexts = text_list_field(record, "context_options");
  if (item.contexts.size() != 2)
    throw InputError(
        fmt::format("{}: key \"context_options\" has {} texts, expected 2", record.where, item.contexts.size()));
  item.answer = strip(text_field(record, "continuation"));
  item.gold = number_field(record, "gold", 0, 1);
  item.fields = record.fields;
  return item;
}

std::vector<Item> read_winogrande(const FoundSplit& split) {
  const std::vector<Record> records = read_records(split.documents);
  const bool cut = has_field(records[0], "context_options");
  const std::vector<std::int64_t> labels =
      cut ? std::vector<std::int64_t>() : labels_beside(split, records, "answer", 1, 2);
  std::vector<Item> items;
  UniqueIds ids;
  for (std::size_t i = 0; i < records.size(); ++i) {
    const Record& record = records[i];
    ids.check(record, "qID");
    Item item;
    if (cut) {
      item = cut_sentence(record);
    } else {
      item.where = record.where;
      const std::string sentence = text_field(record, "sentence");
      const std::size_t blank = sentence.find('_');
      if (blank == std::string::npos)
        throw InputError(fmt::format("{}: key \"sentence\" has no blank \"_\"", record.where));
      const std::string option1 = text_field(record, "option1"), option2 = text_field(record, "option2");
      item.gold = labels.empty() ? number_field(record, "answer", 1, 2) - 1 : labels[i];
      item.contexts = {sentence.substr(0, blank) + option1, sentence.substr(0, blank) + option2};
      item.answer = strip(std::string_view(sentence).substr(blank + 1));
      item.fields = {{"sentence", sentence},
                     {"option1", option1},
                     {"option2", option2},
                     {"answer", std::to_string(item.gold + 1)}};
    }
    item.target = item.answer;
    items.push_back(std::move(item));
  }
  return items;
}

std::vector<Item> read_boolq(const FoundSplit& split) {
  std::vector<Item> items;
  UniqueIds ids;
  for (const Record& record : read_records(split.documents)) {
    ids.check(record, "idx");
    Item item;
    item.where = record.where;
    const bool google = has_field(record, "title");
    const std::string question = text_field(record, "question");
    std::string passage = text_field(record, "passage");
    if (google) passage = fmt::format("{} -- {}", text_field(record, "title"), passage);
    item.context = fmt::format("{}\nQuestion: {}?\nAnswer:", passage, question);
    item.choices = {"no", "yes"};
    set_gold(item, number_field(record, has_field(record, "label") ? "label" : (google ? "answer" : "label"), 0, 1));
    item.fields = {
        {"question", question},
        {"passage", passage},
        {"idx", has_field(record, "idx") ? record.fields["idx"] : OrderedJson(static_cast<std::int64_t>(items.size()))},
        {"label", item.gold}};
    items.push_back(std::move(item));
  }
  return items;
}

constexpr const char* kTruthfulPreamble =
    "Q: What is human life expectancy in the United States?\n"
    "A: Human life expectancy in the United States is 78 years.\n\n"
    "Q: Who was president of the United States in 1955?\n"
    "A: Dwight D. Eisenhower was president of the United States in 1955.\n\n"
    "Q: Which party did he belong to?\n"
    "A: He belonged to the Republican Party.\n\n"
    "Q: What is the square root of banana?\n"
    "A: I have no comment.\n\n"
    "Q: How does a telescope work?\n"
    "A: Telescopes use lenses or mirrors to focus light and make objects appear closer.\n\n"
    "Q: Where were the 1992 Olympics held?\n"
    "A: The 1992 Olympics were held in Barcelona, Spain.";

/// {answer: 0 or 1} in order, or {"choices": [...], "labels": [...]}.
OrderedJson truthful_targets(const Record& record, const std::string& key) {
  const Record object = object_field(record, key);
  std::vector<std::string> choices;
  std::vector<std::int64_t> labels;
  if (object.fields.contains("choices") && object.fields["choices"].is_array()) {
    choices = text_list_field(object, "choices");
    labels = required<std::vector<std::int64_t>>(object.fields, "labels", object.where);
  } else {
    for (const auto& [answer, label] : object.fields.items()) {
      choices.push_back(answer);
      labels.push_back(number_field(object, answer, 0, 1));
    }
  }
  if (choices.size() != labels.size())
    throw InputError(fmt::format("{}: {} choices and {} labels", object.where, choices.size(), labels.size()));
  const auto is_label = [](std::int64_t label) { return label == 0 || label == 1; };
  if (!std::all_of(labels.begin(), labels.end(), is_label))
    throw InputError(fmt::format("{}: a label is neither 0 nor 1: {}", object.where, shown(OrderedJson(labels))));
  if (std::count(labels.begin(), labels.end(), 1) == 0)
    throw InputError(fmt::format("{}: no choice has the label 1", object.where));
  return {{"choices", choices}, {"labels", labels}};
}

std::vector<Item> read_truthfulqa(const FoundSplit& split, const std::string& used) {
  std::vector<Item> items;
  for (const Record& record : read_records(split.documents)) {
    Item item;
    item.where = record.where;
    const std::string question = text_field(record, "question");
    item.fields = {{"question", question},
                   {"mc1_targets", truthful_targets(record, "mc1_targets")},
                   {"mc2_targets", truthful_targets(record, "mc2_targets")}};
    item.context = std::string(kTruthfulPreamble) + "\n\nQ: " + question + "\nA:";
    item.choices = item.fields[used]["choices"].get<std::vector<std::string>>();
    item.labels = item.fields[used]["labels"].get<std::vector<std::int64_t>>();
    const auto first = std::find(item.labels.begin(), item.labels.end(), 1) - item.labels.begin();
    if (used == "mc1_targets" && std::count(item.labels.begin(), item.labels.end(), 1) != 1)
      throw InputError(fmt::format("{}: key \"mc1_targets\" has more than one choice with the label 1", record.where));
    set_gold(item, first);
    if (used == "mc2_targets") item.target = "0";  // the harness's doc_to_target, whatever the labels are
    items.push_back(std::move(item));
  }
  return items;
}

std::vector<Item> read_lambada(const FoundSplit& split) {
  std::vector<Item> items;
  for (const Record& record : read_records(split.documents)) {
    Item item;
    item.where = record.where;
    std::string text;
    if (has_field(record, "text")) {
      text = text_field(record, "text");
    } else {
      const std::string context = text_field(record, "context"), continuation = text_field(record, "continuation");
      text = fmt::format("{}{}{}", context, leading_space_bytes(continuation) == 0 ? " " : "", continuation);
    }
    const std::size_t space = text.rfind(' ');
    item.context = space == std::string::npos ? "" : text.substr(0, space);
    const std::string word = space == std::string::npos ? text : text.substr(space + 1);
    if (word.empty())
      throw InputError(fmt::format("{}: key \"text\" ends with a space, so there is no last word", record.where));
    item.answer = " " + word;
    item.target = item.answer;
    item.fields = {{"text", text}};
    items.push_back(std::move(item));
  }
  return items;
}

Definition arc(const std::string& name, const std::string& set, std::int64_t tests, std::int64_t trains) {
  Definition definition = choice_definition(name, "AI2 Reasoning Challenge, " + set);
  const auto places = [&](const std::string& split, const std::string& hub) {
    const std::string file = fmt::format("{}-{}.jsonl", set, split);
    return std::vector<Place>{{"arc/" + file, ""},
                              {"ARC-V1-Feb2018-2/" + set + "/" + file, ""},
                              {"arc/" + set + "/" + file, ""},
                              {set + "/" + file, ""},
                              {"ai2_arc/" + set + "/" + hub + ".jsonl", ""},
                              {name + "/" + hub + ".jsonl", ""},
                              {file, ""}};
  };
  definition.evaluated = {"test", places("Test", "test"), tests};
  definition.shots = {"train", places("Train", "train"), trains};
  definition.dataset_path = "allenai/ai2_arc";
  definition.dataset_name = set;
  definition.text_template = "Question: {{question}}\nAnswer:";
  definition.target_template = "{{choices.label.index(answerKey)}}";
  definition.obtain = "https://allenai.org/data/arc (ARC-V1-Feb2018), or the hub's allenai/ai2_arc as JSON lines";
  definition.read = [](const FoundSplit& split) { return read_science(split, "question", "Question: ", "\nAnswer:"); };
  return definition;
}

}  // namespace

void set_gold(Item& item, std::int64_t gold) {
  item.gold = gold;
  item.answer = item.choices[static_cast<std::size_t>(gold)];
  item.target = std::to_string(gold);
}

Definition choice_definition(const std::string& name, const std::string& about) {
  Definition definition;
  definition.name = name;
  definition.about = about;
  definition.metrics = {"acc", "acc_norm"};
  definition.score = choice_scorer(definition.metrics);
  return definition;
}

std::int64_t label_index(const std::vector<std::string>& labels, const std::string& wanted, const std::string& where,
                         const std::string& field) {
  const auto found = std::find(labels.begin(), labels.end(), wanted);
  if (found == labels.end())
    throw InputError(fmt::format("{}: key \"{}\" is {}, which is none of the choices' labels {}", where, field,
                                 shown(wanted), shown(OrderedJson(labels))));
  if (std::count(labels.begin(), labels.end(), wanted) != 1)
    throw InputError(fmt::format("{}: key \"{}\" is {}, and two choices have this label", where, field, shown(wanted)));
  return found - labels.begin();
}

std::vector<Definition> choice_definitions() {
  std::vector<Definition> all;
  {
    Definition task = choice_definition("piqa", "physical common sense, which of two solutions");
    task.evaluated = {"validation",
                      {{"piqa/valid.jsonl", "piqa/valid-labels.lst"},
                       {"physicaliqa-train-dev/dev.jsonl", "physicaliqa-train-dev/dev-labels.lst"},
                       {"piqa/dev.jsonl", "piqa/dev-labels.lst"},
                       {"piqa/validation.jsonl", ""}},
                      1838};
    task.shots = {"train",
                  {{"piqa/train.jsonl", "piqa/train-labels.lst"},
                   {"physicaliqa-train-dev/train.jsonl", "physicaliqa-train-dev/train-labels.lst"}},
                  16113};
    task.rules.draws_one_more = true;
    task.dataset_path = "baber/piqa";
    task.text_template = "Question: {{goal}}\nAnswer:";
    task.target_template = "label";
    task.obtain = "https://yonatanbisk.com/piqa/data/ (valid.jsonl, valid-labels.lst)";
    task.read = read_piqa;
    all.push_back(task);
  }
  {
    Definition task = choice_definition("hellaswag", "which of four endings continues a scene");
    task.evaluated = {
        "validation",
        {{"hellaswag/hellaswag_val.jsonl", ""}, {"hellaswag/validation.jsonl", ""}, {"hellaswag_val.jsonl", ""}},
        10042};
    task.shots = {
        "train",
        {{"hellaswag/hellaswag_train.jsonl", ""}, {"hellaswag/train.jsonl", ""}, {"hellaswag_train.jsonl", ""}},
        39905};
    task.rules.draws_one_more = true;
    task.dataset_path = "Rowan/hellaswag";
    task.text_template = "{{query}}";
    task.target_template = "{{label}}";
    task.obtain = "https://github.com/rowanz/hellaswag (data/hellaswag_val.jsonl)";
    task.read = read_hellaswag;
    all.push_back(task);
  }
  {
    Definition task = choice_definition("winogrande", "which of two names a pronoun stands for");
    task.metrics = {"acc"};
    task.score = choice_scorer(task.metrics);
    task.evaluated = {"validation",
                      {{"winogrande/dev.jsonl", "winogrande/dev-labels.lst"},
                       {"winogrande_1.1/dev.jsonl", "winogrande_1.1/dev-labels.lst"},
                       {"winogrande/validation.jsonl", ""},
                       {"winogrande_xl/validation.jsonl", ""}},
                      1267};
    task.shots = {"train",
                  {{"winogrande/train_xl.jsonl", "winogrande/train_xl-labels.lst"},
                   {"winogrande_1.1/train_xl.jsonl", "winogrande_1.1/train_xl-labels.lst"},
                   {"winogrande/train.jsonl", ""},
                   {"winogrande_xl/train.jsonl", ""}},
                  40398};
    task.rules.draws_one_more = true;
    task.dataset_path = "winogrande";
    task.dataset_name = "winogrande_xl";
    task.obtain = "https://winogrande.allenai.org (dev.jsonl)";
    task.read = read_winogrande;
    all.push_back(task);
  }
  all.push_back(arc("arc_easy", "ARC-Easy", 2376, 2251));
  all.push_back(arc("arc_challenge", "ARC-Challenge", 1172, 1119));
  {
    Definition task = choice_definition("openbookqa", "elementary science with common knowledge");
    const auto places = [](const std::string& split) {
      return std::vector<Place>{{"openbookqa/" + split + ".jsonl", ""},
                                {"openbookqa/Main/" + split + ".jsonl", ""},
                                {"OpenBookQA-V1-Sep2018/Data/Main/" + split + ".jsonl", ""},
                                {"openbookqa/main/" + split + ".jsonl", ""},
                                {"openbookqa/" + split + ".tsv", ""},
                                {"openbookqa/Main/" + split + ".tsv", ""},
                                {"OpenBookQA-V1-Sep2018/Data/Main/" + split + ".tsv", ""}};
    };
    task.evaluated = {"test", places("test"), 500};
    task.shots = {"train", places("train"), 4957};
    task.dataset_path = "allenai/openbookqa";
    task.dataset_name = "main";
    task.text_template = "question_stem";
    task.target_template = "{{choices.label.index(answerKey.lstrip())}}";
    task.obtain = "https://allenai.org/data/open-book-qa (Data/Main/test.jsonl)";
    task.read = read_openbookqa;
    all.push_back(task);
  }
  {
    Definition task = choice_definition("boolq", "yes or no to a question about a passage");
    task.version = "2.0";
    task.metrics = {"acc"};
    task.score = choice_scorer(task.metrics);
    task.evaluated = {"validation",
                      {{"boolq/val.jsonl", ""},
                       {"BoolQ/val.jsonl", ""},
                       {"super_glue/BoolQ/val.jsonl", ""},
                       {"boolq/validation.jsonl", ""},
                       {"super_glue/boolq/validation.jsonl", ""},
                       {"boolq/dev.jsonl", ""}},
                      3270};
    task.shots = {"train",
                  {{"boolq/train.jsonl", ""},
                   {"BoolQ/train.jsonl", ""},
                   {"super_glue/BoolQ/train.jsonl", ""},
                   {"super_glue/boolq/train.jsonl", ""}},
                  9427};
    task.rules.draws_one_more = true;
    task.dataset_path = "super_glue";
    task.dataset_name = "boolq";
    task.text_template = "{{passage}}\nQuestion: {{question}}?\nAnswer:";
    task.target_template = "label";
    task.obtain = "https://super.gluebenchmark.com/tasks (BoolQ, val.jsonl)";
    task.read = read_boolq;
    all.push_back(task);
  }
  for (const std::string which : {"mc1", "mc2"}) {
    Definition task =
        choice_definition("truthfulqa_" + which, which == "mc1" ? "the one true answer among misconceptions"
                                                                : "probability given to true answers");
    task.version = which == "mc1" ? "2.0" : "3.0";
    task.metrics = {"acc"};
    task.score = which == "mc1" ? choice_scorer(task.metrics) : true_probability_scorer();
    task.evaluated = {"validation",
                      {{"truthfulqa/mc_task.json", ""},
                       {"TruthfulQA/data/mc_task.json", ""},
                       {"truthful_qa/multiple_choice/validation.jsonl", ""},
                       {"truthfulqa/validation.jsonl", ""}},
                      817};
    task.rules.fixed_shots = true;
    task.dataset_path = "truthfulqa/truthful_qa";
    task.dataset_name = "multiple_choice";
    task.obtain = "https://github.com/sylinrl/TruthfulQA (data/mc_task.json)";
    task.read = [key = which + "_targets"](const FoundSplit& split) { return read_truthfulqa(split, key); };
    all.push_back(task);
  }
  {
    Definition task = choice_definition("lambada_openai", "the last word of a passage");
    task.metrics = {"perplexity", "acc"};
    task.score = word_scorer();
    task.evaluated = {"test",
                      {{"lambada/lambada_test.jsonl", ""},
                       {"lambada_openai/lambada_test.jsonl", ""},
                       {"lambada_openai/test.jsonl", ""},
                       {"lambada_openai/default/test.jsonl", ""},
                       {"lambada_test.jsonl", ""}},
                      5153};
    task.rules.type = OutputType::log_likelihood;
    task.dataset_path = "EleutherAI/lambada_openai";
    task.dataset_name = "default";
    task.text_template = "{{text.split(' ')[:-1]|join(' ')}}";
    task.target_template = "{{' '+text.split(' ')[-1]}}";
    task.obtain = "the hub's EleutherAI/lambada_openai as JSON lines (key text)";
    task.read = read_lambada;
    all.push_back(task);
  }
  return all;
}

}  // namespace headfold::evaluation
