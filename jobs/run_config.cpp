#include "run_config.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <boost/make_shared.hpp>
#include <cctype>
#include <map>
#include <numeric>
#include <optional>
#include <set>

#include "convert_options.h"
#include "evaluate_options.h"

namespace headfold::jobs {

namespace fs = std::filesystem;

namespace {

std::string trimmed(std::string_view text) {
  const std::size_t first = text.find_first_not_of(" \t\r");
  if (first == std::string_view::npos) return {};
  return std::string(text.substr(first, text.find_last_not_of(" \t\r") + 1 - first));
}

/// The line without its comment.
std::string_view without_comment(std::string_view line) {
  bool quoted = false;
  for (std::size_t i = 0; i < line.size(); ++i) {
    if (line[i] == '"') quoted = !quoted;
    if (!quoted && (line[i] == '#' || line[i] == ';') && (i == 0 || line[i - 1] == ' ' || line[i - 1] == '\t'))
      return line.substr(0, i);
  }
  return line;
}

[[noreturn]] void wrong_line(const std::string& file, int line, const std::string& what, const std::string& hint = {}) {
  throw InputError(fmt::format("{}:{}: {}", file, line, what), hint);
}

/// Letters, digits and -_. that begin with a letter or digit: what is safe as the name of a folder.
bool is_plain_name(const std::string& name) {
  return !name.empty() && name.front() != '-' && name.front() != '.' && name.front() != '_' &&
         std::all_of(name.begin(), name.end(), [](unsigned char c) {
           return (std::isalnum(c) != 0 && c < 128) || c == '-' || c == '_' || c == '.';
         });
}

std::size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t corner = row[0];
    row[0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t replaced = corner + (a[i - 1] == b[j - 1] ? 0 : 1);
      corner = row[j];
      row[j] = std::min({replaced, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row.back();
}

std::string suggestion(const std::string& word, const std::vector<std::string>& names) {
  const std::vector<std::string> alike = nearest_names(word, names);
  return fmt::format("{} {}", alike.empty() ? "there are" : "did you mean",
                     fmt::join(alike.empty() ? names : alike, ", "));
}

/// Options of a job as keys of a section.
struct JobKeys {
  po::options_description options;
  std::set<std::string> paths;                 ///< options that name files or folders
  std::map<std::string, std::string> managed;  ///< options that `run` sets itself, and how to say what they say
  std::vector<std::string> own;                ///< keys that are no options of the job
  std::set<std::string> unimportant;           ///< options that leave the result alone
};

/// Options of every job that a configuration may set: all but those that `run` gives each job.
std::vector<std::string> common_keys() {
  std::vector<std::string> names;
  const po::options_description common = common_options();
  for (const auto& option : common.options()) {
    const std::string& name = option->long_name();
    if (name != "help" && name != "log-dir" && name != "events" && name != "stage-name") names.push_back(name);
  }
  return names;
}

JobKeys keys_of(const std::string& job) {
  JobKeys keys;
  keys.managed = {{"model", "[run] says model"},
                  {"out", "results go to the folder of [run]"},
                  {"dry-run", "use headfold run --dry-run"}};
  keys.unimportant = {"overwrite", "save-every", "checkpoint-every"};
  if (job == "calibrate") {
    keys.options.add(calibrate_options());
    keys.paths = {"data"};
  } else if (job == "convert") {
    keys.options.add(convert_options());
    keys.paths = {"calibration", "plan", "probe-data", "refit-data"};
    for (const char* name : {"compare", "plan-only"})
      keys.managed[name] = "a run converts; use headfold convert for that";
  } else if (job == "finetune") {
    keys.options.add(finetune_options());
    keys.paths = {"data", "validation"};
    keys.managed["model"] = "write of = NAME, a conversion of this run";
    keys.own = {"of"};
  } else if (job == "evaluate") {
    keys.options.add(evaluate_job_options());
    keys.paths = {"data", "data-dir", "task-file"};
    keys.managed["model"] = "write models = NAME, NAME";
    keys.managed["list"] = "use headfold evaluate --list";
    keys.own = {"models"};
  } else {
    keys.options.add(report_options());
    keys.managed["run"] = "the report is of the folder of [run]";
  }
  const po::options_description common = common_options();
  for (const std::string& name : common_keys()) {
    keys.options.add(boost::make_shared<po::option_description>(common.find(name, false)));
    keys.unimportant.insert(name);
  }
  return keys;
}

std::vector<std::string> legal_keys(const JobKeys& keys) {
  std::vector<std::string> names = keys.own;
  for (const auto& option : keys.options.options())
    if (!keys.managed.contains(option->long_name())) names.push_back(option->long_name());
  std::sort(names.begin(), names.end());
  return names;
}

/// Keys of [resources]: what slurm/submit reads. Numbers are checked, the rest is the batch system's business.
const std::vector<std::pair<std::string, bool>>& resource_keys() {
  static const std::vector<std::pair<std::string, bool>> keys = {
      {"account", false},   {"array-parallel", true}, {"constraint", false},     {"cpus-per-task", true},
      {"exclude", false},   {"exclusive", false},     {"gpus-per-node", true},   {"gres", false},
      {"mail-type", false}, {"mail-user", false},     {"max-requeues", true},    {"mem", false},
      {"nodelist", false},  {"nodes", true},          {"ntasks-per-node", true}, {"partition", false},
      {"qos", false},       {"reservation", false},   {"signal-seconds", true},  {"time", false}};
  return keys;
}

class PlanReader {
 public:
  PlanReader(std::vector<IniSection> sections, const fs::path& file)
      : sections_(std::move(sections)),
        file_(file.string()),
        base_(fs::absolute(file).lexically_normal().parent_path()) {}

  RunPlan read() {
    check_kinds();
    read_run();
    name_models();
    add_calibrate();
    add_convert();
    add_finetune();
    add_evaluate();
    add_report();
    if (plan_.stages.empty())
      wrong_line(file_, 1, "asks for no stage",
                 "add a section [calibrate], [convert NAME], [finetune NAME], [evaluate NAME] or [report]");
    add_resources();
    return std::move(plan_);
  }

 private:
  [[noreturn]] void wrong(int line, const std::string& what, const std::string& hint = {}) const {
    wrong_line(file_, line, what, hint);
  }
  fs::path resolved(const std::string& path) const {
    return (base_ / path).lexically_normal();  // an absolute path replaces the base
  }
  const IniEntry* entry(const IniSection& section, const std::string& key) const {
    for (const IniEntry& one : section.entries)
      if (one.key == key) return &one;
    return nullptr;
  }
  std::vector<const IniSection*> all(const std::string& kind) const {
    std::vector<const IniSection*> found;
    for (const IniSection& section : sections_)
      if (section.kind == kind) found.push_back(&section);
    return found;
  }

  void check_kinds() const {
    static const std::vector<std::string> kinds = {"run",      "calibrate", "convert",  "finetune",
                                                   "evaluate", "report",    "resources"};
    for (const IniSection& section : sections_) {
      if (std::find(kinds.begin(), kinds.end(), section.kind) == kinds.end())
        wrong(section.line, fmt::format("there is no section [{}]", section.kind), suggestion(section.kind, kinds));
      const bool named = section.kind == "convert" || section.kind == "finetune" || section.kind == "evaluate";
      if (named && section.name.empty())
        wrong(section.line, fmt::format("[{}] needs a name", section.kind),
              fmt::format("for example [{} half]; its result gets that name", section.kind));
      if (named && !is_plain_name(section.name))
        wrong(section.line,
              fmt::format("[{} {}]: a name is letters, digits, '-', '_' and '.'", section.kind, section.name));
      if (!named && section.kind != "resources" && !section.name.empty())
        wrong(section.line, fmt::format("[{}] has no name, found \"{}\"", section.kind, section.name));
    }
  }

  void read_run() {
    const std::vector<const IniSection*> found = all("run");
    if (found.empty())
      wrong(1, "section [run] is missing", "it says folder = DIR (for all results) and model = DIR (the original)");
    const IniSection& run = *found.front();
    std::vector<std::string> legal = common_keys();
    legal.insert(legal.end(), {"folder", "model"});
    for (const IniEntry& one : run.entries) {
      if (std::find(legal.begin(), legal.end(), one.key) == legal.end())
        wrong(one.line, fmt::format("[run] has no key {}", one.key), suggestion(one.key, legal));
      if (one.key != "folder" && one.key != "model") common_.push_back(one);
    }
    for (const char* needed : {"folder", "model"})
      if (entry(run, needed) == nullptr) wrong(run.line, fmt::format("[run] needs {} = DIR", needed));
    plan_.folder = resolved(entry(run, "folder")->value);
    model_ = resolved(entry(run, "model")->value);
    plan_.file = file_;
    plan_.model = model_;
    plan_.model_line = entry(run, "model")->line;
  }

  /// Where the models of this run stand, by name.
  struct Named {
    fs::path path;
    std::string upstream;  ///< element that makes it; empty: the original
  };

  void name_models() {
    static const std::set<std::string> taken = {"original",   "none",   "logs", "finished",
                                                "evaluation", "report", "slurm"};
    models_["original"] = {model_, ""};
    const auto add = [&](const char* kind, const fs::path& tail) {
      std::size_t number = 0;
      for (const IniSection* section : all(kind)) {
        if (taken.contains(section->name) || models_.contains(section->name))
          wrong(section->line, fmt::format("{}: the name {} is taken", title(*section), section->name),
                "choose another");
        const fs::path folder = plan_.folder / section->name;
        models_[section->name] = {tail.empty() ? folder : folder / tail, fmt::format("{}-{}", kind, number++)};
      }
    };
    add("convert", {});
    add("finetune", "merged");
  }

  std::vector<std::string> model_names(bool trained = true) const {
    std::vector<std::string> names = {"original"};
    for (const char* kind : {"convert", "finetune"})
      for (const IniSection* section : all(kind))
        if (trained || section->kind == "convert") names.push_back(section->name);
    return names;
  }

  const Named& model_named(const std::string& name, int line, const std::vector<std::string>& legal) const {
    if (std::find(legal.begin(), legal.end(), name) == legal.end())
      wrong(line, fmt::format("there is no model {} in this run", name), suggestion(name, legal));
    return models_.at(name);
  }

  /// Begins an element: the section's keys become arguments, its text what decides the result. `handled`: keys that
  /// the caller deals with.
  RunElement element_of(const IniSection& section, const std::set<std::string>& handled = {}) const {
    const JobKeys keys = keys_of(section.kind);
    RunElement element;
    element.name = section.name.empty() ? section.kind : section.name;
    element.said = section;
    std::map<std::string, std::string> said;
    for (const IniEntry& one : section.entries) {
      check_key(section, one, keys);
      if (handled.contains(one.key)) continue;
      add_option(section, one, keys, element);
      if (!keys.unimportant.contains(one.key))
        said[one.key] = fmt::format("{}", fmt::join(split_words(one.value), " "));
    }
    for (const IniEntry& one : common_)
      if (entry(section, one.key) == nullptr) {
        add_option(section, one, keys, element);
        element.said.entries.push_back(one);
      }
    OrderedJson described;
    described["job"] = section.kind;
    described["options"] = said;
    element.described = described.dump();
    return element;
  }

  void check_key(const IniSection& section, const IniEntry& one, const JobKeys& keys) const {
    if (std::find(keys.own.begin(), keys.own.end(), one.key) != keys.own.end()) return;
    if (const auto managed = keys.managed.find(one.key); managed != keys.managed.end())
      wrong(one.line, fmt::format("{}: {} is not for this file", title(section), one.key), managed->second);
    if (keys.options.find_nothrow(one.key, false) == nullptr)
      wrong(one.line, fmt::format("{} has no key {}", title(section), one.key), suggestion(one.key, legal_keys(keys)));
  }

  void add_option(const IniSection& section, const IniEntry& one, const JobKeys& keys, RunElement& element) const {
    const po::option_description& option = keys.options.find(one.key, false);
    const bool is_path = keys.paths.contains(one.key);
    std::vector<std::string> added;
    if (option.semantic()->max_tokens() == 0) {
      static const std::set<std::string> yes = {"yes", "on", "true", "1"}, no = {"no", "off", "false", "0"};
      if (!yes.contains(one.value) && !no.contains(one.value))
        wrong(one.line, fmt::format("{}: {} = {}: choose yes or no", title(section), one.key, one.value));
      if (yes.contains(one.value)) added.push_back("--" + one.key);
    } else {
      const bool list =
          dynamic_cast<const po::typed_value<std::vector<std::string>>*>(option.semantic().get()) != nullptr;
      std::vector<std::string> values = split_words(one.value);
      if (!list && (values.size() != 1 || one.value.front() != '"')) values = {one.value};
      if (is_path)
        for (std::string& value : values) {
          value = resolved(value).string();
          element.inputs.emplace_back(value);
          // Tasks know which of a folder's files they need, and whether they may go without.
          if (one.key != "data-dir") element.files.emplace_back(one.key, value);
        }
      const bool together = option.semantic()->max_tokens() > 1;
      for (std::size_t i = 0; i < values.size(); ++i) {
        if (!together && values[i].starts_with('-')) {
          added.push_back("--" + one.key + "=" + values[i]);  // a value that begins like an option
          continue;
        }
        if (i == 0 || !together) added.push_back("--" + one.key);
        added.push_back(values[i]);
      }
    }
    try {
      po::variables_map values;
      const int style = po::command_line_style::default_style & ~po::command_line_style::allow_guessing;
      po::store(po::command_line_parser(added).options(keys.options).style(style).run(), values);
    } catch (const po::error& error) {
      wrong(one.line, fmt::format("{}: {} = {}: {}", title(section), one.key, one.value, error.what()));
    }
    element.arguments.insert(element.arguments.end(), added.begin(), added.end());
  }

  /// Adds arguments before the options of the file, where people look for them.
  static void lead(RunElement& element, std::initializer_list<std::string> arguments) {
    element.arguments.insert(element.arguments.begin(), arguments);
  }
  static void give(RunElement& element, std::initializer_list<std::string> arguments) {
    element.arguments.insert(element.arguments.end(), arguments);
  }
  /// Says that the result depends on a model of this run.
  void reads(RunElement& element, const std::string& role, const std::string& name) const {
    const Named& model = models_.at(name);
    if (model.upstream.empty())
      element.inputs.push_back(model.path);
    else
      element.upstream.push_back(model.upstream);
    element.described += fmt::format("\n{} {}", role, name);
  }

  RunStage& add_stage(const std::string& name) {
    RunStage stage;
    stage.name = name;
    // Each stage waits for the one before it, which waits for those before that one.
    if (!plan_.stages.empty()) stage.after.push_back(plan_.stages.back().name);
    plan_.stages.push_back(std::move(stage));
    return plan_.stages.back();
  }

  void add_calibrate() {
    for (const IniSection* section : all("calibrate")) {
      if (entry(*section, "data") == nullptr) wrong(section->line, "[calibrate] needs data = FILE");
      RunElement element = element_of(*section);
      element.output = plan_.folder / "calibration.h5";
      element.evidence = {element.output};
      lead(element, {"--model", model_.string()});
      give(element, {"--out", element.output.string()});
      reads(element, "model", "original");
      add_stage("calibrate").elements.push_back(std::move(element));
    }
  }

  void add_convert() {
    const std::vector<const IniSection*> sections = all("convert");
    if (sections.empty()) return;
    const bool calibrated = !plan_.stages.empty();
    RunStage& stage = add_stage("convert");
    for (const IniSection* section : sections) {
      const IniEntry* statistics = entry(*section, "calibration");
      const bool none = statistics != nullptr && statistics->value == "none";
      if (statistics != nullptr && !none && calibrated)
        wrong(statistics->line,
              fmt::format("{}: calibration = {} beside a section [calibrate]", title(*section), statistics->value),
              "leave it out, or write calibration = none for folds that need no statistics");
      std::set<std::string> handled;
      if (none) handled.insert("calibration");
      RunElement element = element_of(*section, handled);
      element.output = plan_.folder / section->name;
      element.evidence = {element.output / "convert.json", element.output / "headfold.json",
                          element.output / "config.json"};
      if (calibrated && !none) {
        lead(element, {"--calibration", (plan_.folder / "calibration.h5").string()});
        element.upstream.emplace_back("calibrate-0");
      }
      lead(element, {"--model", model_.string()});
      give(element, {"--out", element.output.string()});
      reads(element, "model", "original");
      stage.elements.push_back(std::move(element));
    }
  }

  void add_finetune() {
    const std::vector<const IniSection*> sections = all("finetune");
    if (sections.empty()) return;
    RunStage& stage = add_stage("finetune");
    for (const IniSection* section : sections) {
      const IniEntry* of = entry(*section, "of");
      if (of == nullptr)
        wrong(section->line, fmt::format("{} needs of = NAME", title(*section)), "the conversion that is trained");
      if (entry(*section, "data") == nullptr)
        wrong(section->line, fmt::format("{} needs data = FILE", title(*section)));
      const std::vector<std::string> legal = model_names(false);
      const Named& trained = model_named(of->value, of->line, legal);
      // Without a word about it a folded model learns from the one before the fold.
      const IniEntry* teacher = entry(*section, "teacher");
      const IniEntry* distill = entry(*section, "distill");
      std::string teacher_name = teacher != nullptr ? teacher->value : of->value == "original" ? "none" : "original";
      if (teacher == nullptr && distill != nullptr && distill->value == "0") teacher_name = "none";
      if (teacher_name != "none") model_named(teacher_name, teacher != nullptr ? teacher->line : of->line, legal);
      RunElement element = element_of(*section, {"of", "teacher", "merge", "cache-teacher"});
      element.output = plan_.folder / section->name;
      element.evidence = {element.output / "finetune.json", element.output / "merged" / "config.json"};
      give(element, {"--merge", "--out", element.output.string()});
      reads(element, "model", of->value);
      if (teacher_name != "none") {
        lead(element, {"--teacher", models_.at(teacher_name).path.string()});
        reads(element, "teacher", teacher_name);
      }
      lead(element, {"--model", trained.path.string()});
      // Written by the training itself, hence no input of it.
      if (const IniEntry* cache = entry(*section, "cache-teacher"))
        give(element, {"--cache-teacher", resolved(cache->value).string()});
      if (const IniEntry* merge = entry(*section, "merge"); merge != nullptr && merge->value != "yes")
        wrong(merge->line,
              fmt::format("{}: merge = {}: a run evaluates the merged model", title(*section), merge->value),
              "leave it out");
      stage.elements.push_back(std::move(element));
    }
  }

  void add_evaluate() {
    const std::vector<const IniSection*> sections = all("evaluate");
    if (sections.empty()) return;
    RunStage& stage = add_stage("evaluate");
    for (const IniSection* section : sections) {
      const IniEntry* models = entry(*section, "models");
      const std::vector<std::string> legal = model_names();
      const std::vector<std::string> names = models != nullptr ? split_words(models->value) : legal;
      if (names.empty())
        wrong(models->line, fmt::format("{}: models names no model", title(*section)), suggestion("", legal));
      const IniEntry* reference = entry(*section, "reference");
      const bool text = entry(*section, "data") != nullptr;
      const std::string compared = reference != nullptr ? reference->value : text ? "original" : "none";
      if (compared != "none") model_named(compared, reference != nullptr ? reference->line : section->line, legal);
      if (!text && entry(*section, "tasks") == nullptr)
        wrong(section->line, fmt::format("{} needs data = FILE or tasks = NAME", title(*section)),
              "headfold evaluate --list");
      std::set<std::string> seen;
      for (const std::string& name : names) {
        const Named& model = model_named(name, models != nullptr ? models->line : section->line, legal);
        if (!seen.insert(name).second)
          wrong(models->line, fmt::format("{}: {} stands twice in models", title(*section), name));
        RunElement element = element_of(*section, {"models", "reference"});
        element.name = section->name + "/" + name;
        element.output = plan_.folder / "evaluation" / section->name / name;
        give(element, {"--out", element.output.string()});
        reads(element, "model", name);
        if (compared != "none" && compared != name) {
          lead(element, {"--reference", models_.at(compared).path.string()});
          reads(element, "reference", compared);
        }
        lead(element, {"--model", model.path.string()});
        stage.elements.push_back(std::move(element));
      }
    }
  }

  void add_report() {
    for (const IniSection* section : all("report")) {
      RunElement element = element_of(*section);
      element.output = plan_.folder / "report";
      element.evidence = {element.output / "index.html"};
      give(element, {"--run", plan_.folder.string(), "--out", element.output.string()});
      for (const RunStage& stage : plan_.stages)
        for (std::size_t i = 0; i < stage.elements.size(); ++i) element.upstream.push_back(stage.id(i));
      add_stage("report").elements.push_back(std::move(element));
    }
  }

  void add_resources() {
    std::vector<std::string> legal, stages;
    for (const auto& [name, number] : resource_keys()) legal.push_back(name);
    for (const char* name : {"calibrate", "convert", "finetune", "evaluate", "report"}) stages.emplace_back(name);
    for (const IniSection* section : all("resources")) {
      if (!section->name.empty() && std::find(stages.begin(), stages.end(), section->name) == stages.end())
        wrong(section->line, fmt::format("[resources {}]: there is no such stage", section->name),
              suggestion(section->name, stages));
      for (const IniEntry& one : section->entries) {
        const auto key = std::find_if(resource_keys().begin(), resource_keys().end(),
                                      [&](const auto& k) { return k.first == one.key; });
        if (key == resource_keys().end())
          wrong(one.line, fmt::format("{} has no key {}", title(*section), one.key), suggestion(one.key, legal));
        if (key->second && (one.value.size() > 9 || one.value.find_first_not_of("0123456789") != std::string::npos))
          wrong(one.line, fmt::format("{}: {} = {}: a whole number is needed", title(*section), one.key, one.value));
      }
    }
    // Of all stages first, then what a stage says of its own.
    for (RunStage& stage : plan_.stages) {
      std::map<std::string, std::string> merged;
      for (const bool own : {false, true})
        for (const IniSection* section : all("resources"))
          if (own ? section->name == stage.name : section->name.empty())
            for (const IniEntry& one : section->entries) merged[one.key] = one.value;
      stage.resources.assign(merged.begin(), merged.end());
    }
  }

  std::vector<IniSection> sections_;
  std::string file_;
  fs::path base_;
  RunPlan plan_;
  fs::path model_;
  std::vector<IniEntry> common_;  ///< options of every job, from [run]
  std::map<std::string, Named> models_;
};

}  // namespace

std::string title(const IniSection& section) {
  return section.name.empty() ? "[" + section.kind + "]" : "[" + section.kind + " " + section.name + "]";
}

std::vector<std::string> split_words(const std::string& text) {
  std::vector<std::string> words;
  std::string word;
  bool quoted = false, any = false;
  for (const char c : text) {
    if (c == '"') {
      quoted = !quoted;
      any = true;
    } else if (!quoted && (c == ' ' || c == '\t' || c == ',')) {
      if (any) words.push_back(word);
      word.clear();
      any = false;
    } else {
      word += c;
      any = true;
    }
  }
  if (any) words.push_back(word);
  return words;
}

std::vector<std::string> nearest_names(const std::string& word, const std::vector<std::string>& names) {
  std::vector<std::pair<std::size_t, std::string>> found;
  for (const std::string& name : names) {
    const std::size_t distance = edit_distance(word, name);
    const bool part = word.size() > 2 && (name.find(word) != std::string::npos || word.find(name) != std::string::npos);
    if (part || distance <= std::max<std::size_t>(2, word.size() / 3)) found.emplace_back(distance, name);
  }
  std::sort(found.begin(), found.end());
  std::vector<std::string> nearest;
  for (const auto& [distance, name] : found)
    if (nearest.size() < 3) nearest.push_back(name);
  return nearest;
}

std::vector<IniSection> parse_ini(std::string_view text, const std::string& file) {
  std::vector<IniSection> sections;
  int number = 0;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    const std::string line = trimmed(without_comment(text.substr(at, end - at)));
    at = end + 1;
    ++number;
    if (line.empty()) continue;
    if (line.front() == '[') {
      if (line.back() != ']') wrong_line(file, number, fmt::format("\"{}\" does not end with ]", line));
      const std::string inside = trimmed(std::string_view(line).substr(1, line.size() - 2));
      const std::size_t space = inside.find_first_of(" \t");
      IniSection section{
          inside.substr(0, space), space == std::string::npos ? "" : trimmed(inside.substr(space)), number, {}};
      for (const IniSection& earlier : sections)
        if (earlier.kind == section.kind && earlier.name == section.name)
          wrong_line(file, number, fmt::format("section [{}] stands twice, first in line {}", inside, earlier.line));
      sections.push_back(std::move(section));
      continue;
    }
    const std::size_t equals = line.find('=');
    if (equals == std::string::npos)
      wrong_line(file, number, fmt::format("\"{}\" is neither [section] nor key = value", line));
    if (sections.empty()) wrong_line(file, number, "a key stands before the first [section]");
    IniEntry entry{trimmed(line.substr(0, equals)), trimmed(line.substr(equals + 1)), number};
    if (entry.key.empty() || entry.value.empty())
      wrong_line(file, number, fmt::format("\"{}\": a key needs a value", line), "leave the line out for the default");
    for (const IniEntry& earlier : sections.back().entries)
      if (earlier.key == entry.key)
        wrong_line(file, number,
                   fmt::format("{} stands twice in this section, first in line {}", entry.key, earlier.line),
                   "write several values in one line");
    sections.back().entries.push_back(std::move(entry));
  }
  return sections;
}

RunPlan read_run_plan(std::string_view text, const fs::path& file) {
  try {
    const std::string encoded = Json(std::string(text)).dump();
  } catch (const nlohmann::json::exception&) {
    throw InputError(fmt::format("{} is no UTF-8 text", file.string()), "is it the right file?");
  }
  return PlanReader(parse_ini(text, file.string()), file).read();
}

}  // namespace headfold::jobs
