#include <headfold/evaluation/definitions.h>
#include <headfold/evaluation/python_text.h>
#include <headfold/evaluation/text.h>

namespace headfold::evaluation {
namespace {

std::vector<Item> read_mmlu(const FoundSplit& split, const std::string& subject) {
  std::vector<Item> items;
  const auto add = [&](const std::string& question, const std::vector<std::string>& choices, std::int64_t gold,
                       const std::string& where) {
    Item item;
    item.where = where;
    item.fields = {{"question", question}, {"subject", subject}, {"choices", choices}, {"answer", gold}};
    item.context = std::string(strip(question)) + "\n";
    for (std::size_t i = 0; i < choices.size(); ++i)
      item.context += fmt::format("{}. {}\n", static_cast<char>('A' + static_cast<char>(i)), choices[i]);
    item.context += "Answer:";
    item.choices = {"A", "B", "C", "D"};
    set_gold(item, gold);
    items.push_back(std::move(item));
  };
  if (split.documents.extension() == ".csv") {
    const std::vector<TableRow> rows = read_csv(split.documents);
    const bool header = rows[0].cells.size() == 6 && rows[0].cells[0] == "question" && rows[0].cells[5] == "answer";
    for (std::size_t r = header ? 1 : 0; r < rows.size(); ++r) {
      const std::vector<std::string>& cells = rows[r].cells;
      if (cells.size() != 6)
        throw InputError(
            fmt::format("{}: {} cells, expected 6 (question, four choices, answer)", rows[r].where, cells.size()));
      const std::string_view answer = strip(cells[5]);
      const char zero = header ? '0' : 'A';
      if (answer.size() != 1 || answer[0] < zero || answer[0] > zero + 3)
        throw InputError(fmt::format("{}: the answer (cell 6) is {}, expected {}", rows[r].where, shown(cells[5]),
                                     header ? "0, 1, 2 or 3" : "A, B, C or D"));
      add(cells[0], {cells[1], cells[2], cells[3], cells[4]}, answer[0] - zero, rows[r].where);
    }
    if (items.empty()) throw InputError(fmt::format("{} holds no document", split.documents.string()));
    return items;
  }
  for (const Record& record : read_records(split.documents)) {
    const std::vector<std::string> choices = text_list_field(record, "choices");
    if (choices.size() != 4)
      throw InputError(fmt::format("{}: key \"choices\" has {} texts, expected 4", record.where, choices.size()));
    add(text_field(record, "question"), choices, number_field(record, "answer", 0, 3), record.where);
  }
  return items;
}

}  // namespace

const std::vector<MmluCategory>& mmlu_categories() {
  static const std::vector<MmluCategory> categories = {
      {"stem",
       {"abstract_algebra", "anatomy", "astronomy", "college_biology", "college_chemistry", "college_computer_science",
        "college_mathematics", "college_physics", "computer_security", "conceptual_physics", "electrical_engineering",
        "elementary_mathematics", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
        "high_school_mathematics", "high_school_physics", "high_school_statistics", "machine_learning"}},
      {"humanities",
       {"formal_logic", "high_school_european_history", "high_school_us_history", "high_school_world_history",
        "international_law", "jurisprudence", "logical_fallacies", "moral_disputes", "moral_scenarios", "philosophy",
        "prehistory", "professional_law", "world_religions"}},
      {"social_sciences",
       {"econometrics", "high_school_geography", "high_school_government_and_politics", "high_school_macroeconomics",
        "high_school_microeconomics", "high_school_psychology", "human_sexuality", "professional_psychology",
        "public_relations", "security_studies", "sociology", "us_foreign_policy"}},
      {"other",
       {"business_ethics", "clinical_knowledge", "college_medicine", "global_facts", "human_aging", "management",
        "marketing", "medical_genetics", "miscellaneous", "nutrition", "professional_accounting",
        "professional_medicine", "virology"}}};
  return categories;
}

std::vector<Definition> mmlu_definitions() {
  std::vector<Definition> all;
  for (const MmluCategory& category : mmlu_categories()) {
    for (const std::string& subject : category.subjects) {
      const std::string spaced = replaced(subject, "_", " ");
      Definition task = choice_definition("mmlu_" + subject, "exam questions on " + spaced);
      task.alias = subject;
      task.metrics = {"acc"};
      task.score = choice_scorer(task.metrics);
      const auto places = [&](const std::string& split) {
        const std::string file = fmt::format("{}/{}_{}.csv", split, subject, split);
        return std::vector<Place>{{"mmlu/" + file, ""},
                                  {"mmlu/data/" + file, ""},
                                  {"data/" + file, ""},
                                  {"mmlu/" + subject + "/" + split + ".jsonl", ""},
                                  {"mmlu/" + subject + "_" + split + ".jsonl", ""}};
      };
      task.evaluated = {"test", places("test"), 0};
      task.shots = {"dev", places("dev"), 5};
      task.rules.description = "The following are multiple choice questions (with answers) about " + spaced + ".\n\n";
      task.rules.sampler = Sampler::first_n;
      task.dataset_path = "cais/mmlu";
      task.dataset_name = subject;
      task.text_template =
          "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:";
      task.target_template = "answer";
      task.obtain = "https://people.eecs.berkeley.edu/~hendrycks/data.tar (dev/ and test/)";
      task.read = [subject](const FoundSplit& split) { return read_mmlu(split, subject); };
      all.push_back(std::move(task));
    }
  }
  return all;
}

}  // namespace headfold::evaluation
