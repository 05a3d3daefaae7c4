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
  // clang-format off
  static const std::vector<MmluCategory> categories = {
      {"stem",
       {{"abstract_algebra", 100}, {"anatomy", 135}, {"astronomy", 152}, {"college_biology", 144},
        {"college_chemistry", 100}, {"college_computer_science", 100}, {"college_mathematics", 100},
        {"college_physics", 102}, {"computer_security", 100}, {"conceptual_physics", 235},
        {"electrical_engineering", 145}, {"elementary_mathematics", 378}, {"high_school_biology", 310},
        {"high_school_chemistry", 203}, {"high_school_computer_science", 100}, {"high_school_mathematics", 270},
        {"high_school_physics", 151}, {"high_school_statistics", 216}, {"machine_learning", 112}}},
      {"humanities",
       {{"formal_logic", 126}, {"high_school_european_history", 165}, {"high_school_us_history", 204},
        {"high_school_world_history", 237}, {"international_law", 121}, {"jurisprudence", 108},
        {"logical_fallacies", 163}, {"moral_disputes", 346}, {"moral_scenarios", 895}, {"philosophy", 311},
        {"prehistory", 324}, {"professional_law", 1534}, {"world_religions", 171}}},
      {"social_sciences",
       {{"econometrics", 114}, {"high_school_geography", 198}, {"high_school_government_and_politics", 193},
        {"high_school_macroeconomics", 390}, {"high_school_microeconomics", 238}, {"high_school_psychology", 545},
        {"human_sexuality", 131}, {"professional_psychology", 612}, {"public_relations", 110},
        {"security_studies", 245}, {"sociology", 201}, {"us_foreign_policy", 100}}},
      {"other",
       {{"business_ethics", 100}, {"clinical_knowledge", 265}, {"college_medicine", 173}, {"global_facts", 100},
        {"human_aging", 223}, {"management", 103}, {"marketing", 234}, {"medical_genetics", 100},
        {"miscellaneous", 783}, {"nutrition", 306}, {"professional_accounting", 282}, {"professional_medicine", 272},
        {"virology", 166}}}};
  // clang-format on
  return categories;
}

std::vector<Definition> mmlu_definitions() {
  std::vector<Definition> all;
  for (const MmluCategory& category : mmlu_categories()) {
    for (const auto& [subject, questions] : category.subjects) {
      const std::string spaced = replaced(subject, "_", " ");
      Definition task = choice_definition("mmlu_" + subject, "exam questions on " + spaced);
      task.alias = subject;
      task.metrics = {"acc"};
      task.score = choice_scorer(task.metrics);
      const auto places = [&, name = subject](const std::string& split) {
        const std::string file = fmt::format("{}/{}_{}.csv", split, name, split);
        return std::vector<Place>{{"mmlu/" + file, ""},
                                  {"mmlu/data/" + file, ""},
                                  {"data/" + file, ""},
                                  {fmt::format("mmlu/{}/{}.jsonl", name, split), ""},
                                  {fmt::format("mmlu/{}_{}.jsonl", name, split), ""}};
      };
      task.evaluated = {"test", places("test"), questions};
      task.shots = {"dev", places("dev"), 5};
      task.rules.description = "The following are multiple choice questions (with answers) about " + spaced + ".\n\n";
      task.rules.sampler = Sampler::first_n;
      task.dataset_path = "cais/mmlu";
      task.dataset_name = subject;
      task.text_template =
          "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:";
      task.target_template = "answer";
      task.obtain = "https://people.eecs.berkeley.edu/~hendrycks/data.tar (dev/ and test/)";
      task.read = [name = subject](const FoundSplit& split) { return read_mmlu(split, name); };
      all.push_back(std::move(task));
    }
  }
  return all;
}

}  // namespace headfold::evaluation
