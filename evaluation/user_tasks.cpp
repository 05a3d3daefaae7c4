// Tasks of the user's own, described by a JSON file (docs/evaluation.md).

#include <headfold/base/json.h>
#include <headfold/evaluation/definitions.h>
#include <headfold/evaluation/metrics.h>
#include <headfold/evaluation/python_text.h>
#include <headfold/evaluation/text.h>

#include <algorithm>
#include <charconv>
#include <memory>
#include <set>

namespace headfold::evaluation {
namespace {

/// Text with {{field}} in it.
class Template {
 public:
  Template() = default;
  /// `source` names file and key. InputError for broken syntax.
  Template(const std::string& text, std::string source) : source_(std::move(source)) {
    if (text.find("{%") != std::string::npos)
      throw InputError(fmt::format("{}: \"{{%\" is not known here; templates have {{{{field}}}} only", source_));
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t open = text.find("{{", at);
      parts_.push_back({text.substr(at, open == std::string::npos ? open : open - at), {}});
      if (open == std::string::npos) break;
      const std::size_t close = text.find("}}", open + 2);
      if (close == std::string::npos)
        throw InputError(fmt::format("{}: \"{{{{\" at byte {} is not closed by \"}}}}\"", source_, open));
      const std::string path(strip(std::string_view(text).substr(open + 2, close - open - 2)));
      parts_.push_back({"", parse_path(path, source_)});
      at = close + 2;
    }
  }

  /// Names between dots.
  static std::vector<std::string> parse_path(const std::string& path, const std::string& source) {
    std::vector<std::string> names = split_on(path, ".");
    for (const std::string& name : names)
      if (name.empty() || name.find_first_of("{}|()[]'\" \t\n") != std::string::npos)
        throw InputError(
            fmt::format("{}: {} is no field; write a name, or names with dots between", source, shown(path)));
    return names;
  }

  /// The value a path leads to; a list of objects gives the list of their fields. InputError naming document and path.
  static OrderedJson value_at(const Record& record, const std::vector<std::string>& path, const std::string& source) {
    OrderedJson value = record.fields;
    for (std::size_t i = 0; i < path.size(); ++i) value = step(value, path[i], record, path, source);
    return value;
  }

  std::string render(const Record& record) const {
    std::string text;
    for (const Part& part : parts_) {
      text += part.text;
      if (!part.path.empty()) text += as_text(value_at(record, part.path, source_), record, part.path, source_);
    }
    return text;
  }

  static std::string as_text(const OrderedJson& value, const Record& record, const std::vector<std::string>& path,
                             const std::string& source) {
    if (value.is_string()) return value.get<std::string>();
    if (value.is_boolean()) return value.get<bool>() ? "True" : "False";
    if (value.is_number()) return value.dump();
    throw InputError(fmt::format("{}: field \"{}\" is {}, expected a text or number ({})", record.where,
                                 fmt::join(path, "."), shown(value), source));
  }

 private:
  struct Part {
    std::string text;
    std::vector<std::string> path;
  };
  static OrderedJson step(const OrderedJson& value, const std::string& name, const Record& record,
                          const std::vector<std::string>& path, const std::string& source) {
    if (value.is_array()) {
      std::size_t index = 0;
      const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), index);
      if (error == std::errc() && end == name.data() + name.size()) {
        if (index < value.size()) return value[index];
      } else {
        OrderedJson list = OrderedJson::array();
        for (const OrderedJson& member : value) list.push_back(step(member, name, record, path, source));
        return list;
      }
    } else if (value.is_object()) {
      if (const auto found = value.find(name); found != value.end() && !found->is_null()) return *found;
    }
    throw InputError(fmt::format("{}: field \"{}\" is undefined ({})", record.where, fmt::join(path, "."), source));
  }
  std::string source_;
  std::vector<Part> parts_;
};

/// A list that is a field of the documents, or given by templates.
struct ListSource {
  std::vector<std::string> path;
  std::vector<Template> templates;
  std::string source;
  std::vector<std::string> of(const Record& record) const {
    std::vector<std::string> texts;
    for (const Template& entry : templates) texts.push_back(entry.render(record));
    if (path.empty()) return texts;
    const OrderedJson value = Template::value_at(record, path, source);
    if (!value.is_array())
      throw InputError(fmt::format("{}: field \"{}\" is {}, expected a list ({})", record.where, fmt::join(path, "."),
                                   shown(value), source));
    for (const OrderedJson& member : value) texts.push_back(Template::as_text(member, record, path, source));
    return texts;
  }
};

/// The file's keys, with the names of file and key in every error.
class Description {
 public:
  explicit Description(const std::filesystem::path& file)
      : file_(file), json_(parse_text(read_text(file, 1U << 20), file.string())) {
    if (!json_.is_object()) throw InputError(fmt::format("{}: a task is a JSON object", file.string()));
  }
  std::string source(const std::string& key) const { return fmt::format("{}, key \"{}\"", file_.string(), key); }
  const std::filesystem::path& file() const { return file_; }

  bool has(const std::string& key) {
    known_.insert(key);
    return json_.contains(key) && !json_[key].is_null();
  }
  std::string text(const std::string& key) {
    known_.insert(key);
    return required<std::string>(json_, key, file_.string());
  }
  std::string text(const std::string& key, const std::string& fallback) { return has(key) ? text(key) : fallback; }
  std::int64_t number(const std::string& key, std::int64_t fallback, std::int64_t least, std::int64_t most) {
    known_.insert(key);
    const auto value = optional<std::int64_t>(json_, key, fallback, file_.string());
    if (value < least || value > most)
      throw InputError(fmt::format("{} is {}, expected {} to {}", source(key), value, least, most));
    return value;
  }
  std::vector<std::string> texts(const std::string& key, const std::vector<std::string>& fallback) {
    known_.insert(key);
    return optional<std::vector<std::string>>(json_, key, fallback, file_.string());
  }
  std::string one_of(const std::string& key, const std::vector<std::string>& allowed) {
    std::string value = text(key, allowed[0]);
    if (std::find(allowed.begin(), allowed.end(), value) == allowed.end())
      throw InputError(
          fmt::format("{} is {}, expected one of: {}", source(key), shown(value), fmt::join(allowed, ", ")));
    return value;
  }
  /// A field's name, or a list of templates.
  ListSource list(const std::string& key) {
    known_.insert(key);
    ListSource result;
    result.source = source(key);
    if (has(key) && json_[key].is_string()) {
      result.path = Template::parse_path(json_[key].get<std::string>(), result.source);
      return result;
    }
    const auto entries = required<std::vector<std::string>>(json_, key, file_.string());
    if (entries.empty()) throw InputError(fmt::format("{} is an empty list", result.source));
    for (const std::string& entry : entries) result.templates.emplace_back(entry, result.source);
    return result;
  }
  void refuse_unknown() const {
    for (const auto& [key, value] : json_.items())
      if (known_.count(key) == 0)
        throw InputError(fmt::format("{}: unknown key \"{}\"", file_.string(), key),
                         fmt::format("known here: {}", fmt::join(known_, ", ")));
  }

 private:
  std::filesystem::path file_;
  Json json_;
  std::set<std::string> known_;
};

/// Rows of a table as documents: the first row names the fields.
std::vector<Record> read_table(const std::filesystem::path& file, bool csv) {
  const std::vector<TableRow> rows = csv ? read_csv(file) : read_tsv(file);
  const std::vector<std::string>& names = rows[0].cells;
  if (std::set<std::string>(names.begin(), names.end()).size() != names.size())
    throw InputError(fmt::format("{}: two columns have the same name", rows[0].where));
  std::vector<Record> records;
  for (std::size_t r = 1; r < rows.size(); ++r) {
    if (rows[r].cells.size() != names.size())
      throw InputError(fmt::format("{}: {} cells, expected {}", rows[r].where, rows[r].cells.size(), names.size()));
    Record record;
    record.where = rows[r].where;
    for (std::size_t c = 0; c < names.size(); ++c) record.fields[names[c]] = rows[r].cells[c];
    records.push_back(std::move(record));
  }
  if (records.empty()) throw InputError(fmt::format("{} holds no document", file.string()));
  return records;
}

/// How a document of a user's task is read.
struct UserReader {
  std::string format, gold_is, gold_source;
  std::string gold_name;  ///< the field, or the template of several
  std::string delimiter;  ///< before a choice
  Template context, gold;
  ListSource choices, labels;
  std::vector<std::string> id;
  bool generation = false;

  Item read(const Record& record) const {
    Item item;
    item.where = record.where;
    item.fields = record.fields;
    item.context = context.render(record);
    const std::string right = gold.render(record);
    if (generation) {
      item.references = {right};
      item.answer = item.target = right;
      return item;
    }
    item.choices = choices.of(record);
    if (item.choices.empty()) throw InputError(fmt::format("{}: no choices ({})", record.where, choices.source));
    const auto empty = std::find(item.choices.begin(), item.choices.end(), "");
    if (delimiter.empty() && empty != item.choices.end())
      throw InputError(fmt::format(
          "{}: choice {}{} is empty, and \"target_delimiter\" too: nothing to score ({})", record.where,
          empty - item.choices.begin() + 1,
          choices.path.empty() ? std::string() : fmt::format(" of field \"{}\"", fmt::join(choices.path, ".")),
          choices.source));
    const auto count = static_cast<std::int64_t>(item.choices.size());
    const std::string place = fmt::format("{} ({})", record.where, gold_source);
    if (gold_is == "label") {
      const std::vector<std::string> names = labels.of(record);
      if (names.size() != item.choices.size())
        throw InputError(
            fmt::format("{}: {} labels for {} choices ({})", record.where, names.size(), count, labels.source));
      item.gold = label_index(names, right, place, gold_name);
    } else if (gold_is == "text") {
      item.gold = label_index(item.choices, right, place, gold_name);
    } else {
      const std::int64_t first = gold_is == "number" ? 1 : 0;
      Record number{{{gold_name, right}}, place};
      item.gold = number_field(number, gold_name, first, first + count - 1) - first;
    }
    item.answer = item.choices[static_cast<std::size_t>(item.gold)];
    item.target = std::to_string(item.gold);
    return item;
  }

  std::vector<Item> operator()(const FoundSplit& split) const {
    const std::string extension = split.documents.extension().string();
    const bool csv = format == "csv" || (format == "auto" && extension == ".csv");
    const bool tsv = format == "tsv" || (format == "auto" && extension == ".tsv");
    const std::vector<Record> records = csv || tsv ? read_table(split.documents, csv) : read_records(split.documents);
    std::vector<Item> items;
    std::set<std::string> seen;
    for (const Record& record : records) {
      if (!id.empty()) {
        const OrderedJson value = Template::value_at(record, id, "key \"id\"");
        if (!seen.insert(value.dump()).second)
          throw InputError(fmt::format("{}: field \"{}\" is {}, and an earlier document has the same", record.where,
                                       fmt::join(id, "."), shown(value)));
      }
      items.push_back(read(record));
    }
    return items;
  }
};

DocumentScorer generation_scorer(const std::vector<std::string>& metrics) {
  return [metrics](const Item& item, const std::vector<Answer>& answers) {
    DocumentScore score;
    const std::string text(strip(answers.at(0).text));
    const std::string& right = item.references[0];
    score.filtered = {text};
    for (const std::string& metric : metrics) {
      double value = 0;
      if (metric == "exact_match") value = text == strip(right) ? 1 : 0;
      if (metric == "qa_f1_score") value = qa_f1(text, right);
      if (metric == "rouge1") value = rouge_n(right, text, 1);
      if (metric == "rouge2") value = rouge_n(right, text, 2);
      if (metric == "rougeL") value = rouge_l(right, text);
      score.metrics.emplace_back(metric, value);
    }
    return std::vector<DocumentScore>{score};
  };
}

}  // namespace

Definition user_definition(const std::filesystem::path& file, const std::filesystem::path& data_dir) {
  Description json(file);
  Definition task;
  task.name = json.text("task");
  if (task.name.empty() ||
      task.name.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-") !=
          std::string::npos)
    throw InputError(
        fmt::format("{} is {}, expected letters, digits and _ . - only", json.source("task"), shown(task.name)));
  constexpr std::size_t kLongest = 100;  // file names are made of it
  if (task.name.size() > kLongest)
    throw InputError(
        fmt::format("{} has {} characters, at most {} are allowed", json.source("task"), task.name.size(), kLongest));
  task.about = json.text("about", "described by " + file.filename().string());
  task.version = json.text("version", "1.0");
  task.obtain = json.text("obtain", "the file named in " + file.string());
  auto reader = std::make_shared<UserReader>();
  reader->generation = json.one_of("type", {"multiple_choice", "generation"}) == "generation";
  reader->format = json.one_of("format", {"auto", "json", "csv", "tsv"});
  task.text_template = json.text("context");
  reader->context = Template(task.text_template, json.source("context"));
  task.target_template = json.text("gold");
  reader->gold_source = json.source("gold");
  // A bare name is a field; anything with braces is a template.
  const std::string gold = task.target_template;
  const bool one_field = gold.starts_with("{{") && gold.find("}}") == gold.size() - 2;
  reader->gold_name = one_field ? std::string(strip(std::string_view(gold).substr(2, gold.size() - 4))) : gold;
  reader->gold = Template(gold.find("{{") == std::string::npos ? "{{" + gold + "}}" : gold, reader->gold_source);
  if (json.has("id")) reader->id = Template::parse_path(json.text("id"), json.source("id"));
  std::vector<std::string> allowed;
  if (reader->generation) {
    task.rules.type = OutputType::generation;
    task.rules.stops = json.texts("stops", {"\n"});
    task.rules.max_new_tokens = json.number("max_new_tokens", 32, 1, 1 << 20);
    allowed = {"exact_match", "qa_f1_score", "rouge1", "rouge2", "rougeL"};
    task.metrics = json.texts("metrics", {"exact_match"});
  } else {
    reader->choices = json.list("choices");
    reader->gold_is = json.one_of("gold_is", {"index", "number", "label", "text"});
    if (reader->gold_is == "label") reader->labels = json.list("labels");
    allowed = {"acc", "acc_norm", "acc_bytes"};
    task.metrics = json.texts("metrics", {"acc", "acc_norm"});
  }
  for (const std::string& metric : task.metrics) {
    if (std::count(task.metrics.begin(), task.metrics.end(), metric) > 1)
      throw InputError(fmt::format("{} has {} twice", json.source("metrics"), shown(metric)));
    if (std::find(allowed.begin(), allowed.end(), metric) == allowed.end())
      throw InputError(fmt::format("{} has {}, expected some of: {}", json.source("metrics"), shown(metric),
                                   fmt::join(allowed, ", ")));
  }
  if (task.metrics.empty()) throw InputError(fmt::format("{} is an empty list", json.source("metrics")));
  task.score = reader->generation ? generation_scorer(task.metrics) : choice_scorer(task.metrics);
  const auto places = [&](const std::string& key) {
    const std::filesystem::path named = json.text(key);
    if (named.empty() || named.native().size() > 1000)
      throw InputError(fmt::format("{} is no file name: {} bytes long", json.source(key), named.native().size()));
    std::vector<Place> found = {{(std::filesystem::absolute(file).parent_path() / named).string(), ""}};
    if (!named.is_absolute() && !data_dir.empty())
      found.push_back({(std::filesystem::absolute(data_dir) / named).string(), ""});
    return found;
  };
  task.evaluated = {"test", places("file"), 0};
  task.rules.description = json.text("description", "");
  task.rules.target_delimiter = json.text("target_delimiter", " ");
  reader->delimiter = task.rules.target_delimiter;
  task.rules.fewshot_delimiter = json.text("fewshot_delimiter", "\n\n");
  task.rules.shots = json.number("shots", 0, 0, 1000);
  task.rules.sampler = json.one_of("sampler", {"random", "first_n"}) == "first_n" ? Sampler::first_n : Sampler::random;
  if (json.has("shots_file")) {
    task.shots = {"train", places("shots_file"), 0};
  } else {
    // From the evaluated documents themselves, without the one at hand.
    task.rules.draws_one_more = true;
    if (task.rules.sampler == Sampler::first_n)
      throw InputError(
          fmt::format("{} is \"first_n\", which needs \"shots_file\": the first documents would be their own "
                      "examples",
                      json.source("sampler")));
  }
  json.refuse_unknown();
  task.dataset_path = file.filename().string();
  task.read = [reader](const FoundSplit& split) { return (*reader)(split); };
  return task;
}

}  // namespace headfold::evaluation
