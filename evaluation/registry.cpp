#include <headfold/base/files.h>
#include <headfold/base/hash.h>
#include <headfold/base/table.h>
#include <headfold/evaluation/definitions.h>
#include <headfold/evaluation/metrics.h>
#include <headfold/evaluation/perplexity_texts.h>
#include <headfold/evaluation/python_text.h>
#include <headfold/evaluation/registry.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <set>

namespace headfold::evaluation {
namespace {

/// Names that stand for several.
struct NamedGroup {
  std::string name;
  std::vector<std::string> members;  ///< tasks or groups
  bool reports = false;              ///< has a value of its own in the results
  std::string version;
  bool weight_by_size = true;
};

const std::vector<NamedGroup>& named_groups() {
  static const std::vector<NamedGroup> groups = [] {
    std::vector<NamedGroup> all = {
        {"zero-shot",
         {"piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "boolq"},
         false,
         "",
         true},
        {"lorc", {"boolq", "openbookqa", "xsum", "gsm8k"}, false, "", true},
        {"paper", {"wikitext2", "c4-palu", "ptb-svdllm"}, false, "", true},
        {"arc", {"arc_easy", "arc_challenge"}, false, "", true},
        {"truthfulqa", {"truthfulqa_mc1", "truthfulqa_mc2"}, false, "", true},
        {"retrieval", {"passkey", "needle"}, false, "", true}};
    NamedGroup mmlu{"mmlu", {}, true, "2", true};
    for (const MmluCategory& category : mmlu_categories()) {
      NamedGroup group{"mmlu_" + category.name, {}, true, "2", true};
      for (const MmluSubject& subject : category.subjects) group.members.push_back("mmlu_" + subject.name);
      mmlu.members.push_back(group.name);
      all.push_back(std::move(group));
    }
    all.push_back(std::move(mmlu));
    NamedGroup longbench{"longbench", {}, true, "headfold-1", false};
    for (const Definition& task : longbench_definitions()) longbench.members.push_back(task.name);
    all.push_back(std::move(longbench));
    return all;
  }();
  return groups;
}

/// Short names for one of several recipes.
std::string full_name(const std::string& name) {
  if (name == "c4") return "c4-palu";
  if (name == "ptb") return "ptb-svdllm";
  return name;
}

const NamedGroup* find_group(const std::string& name) {
  for (const NamedGroup& group : named_groups())
    if (group.name == name) return &group;
  return nullptr;
}

std::vector<Definition> built_in_definitions() {
  std::vector<Definition> all = choice_definitions();
  for (auto more : {mmlu_definitions(), generation_definitions(), longbench_definitions(), retrieval_definitions()})
    for (Definition& definition : more) all.push_back(std::move(definition));
  return all;
}

std::vector<Definition> all_definitions(const SuiteOptions& options) {
  static const std::vector<Definition> built_in = built_in_definitions();
  std::vector<Definition> all = built_in;
  for (const fs::path& file : options.user_tasks) {
    Definition own = user_definition(file, options.data_dir);
    const auto same = [&](const auto& entry) { return entry.name == own.name; };
    const bool is_text = std::any_of(named_texts().begin(), named_texts().end(),
                                     [&](const NamedText& entry) { return entry.text.name == own.name; });
    if (std::any_of(all.begin(), all.end(), same) || find_group(own.name) != nullptr || is_text ||
        full_name(own.name) != own.name)
      throw InputError(fmt::format("{}: key \"task\" is \"{}\", and there is a task or group of this name already",
                                   file.string(), own.name));
    all.push_back(std::move(own));
  }
  return all;
}

/// Edits that turn one name into the other, for suggestions.
std::size_t distance(const std::string& a, const std::string& b) {
  std::vector<std::size_t> row(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t above = row[j];
      row[j] = std::min({above + 1, row[j - 1] + 1, diagonal + (a[i - 1] == b[j - 1] ? 0U : 1U)});
      diagonal = above;
    }
  }
  return row[b.size()];
}

[[noreturn]] void refuse_name(const std::string& name, const std::vector<std::string>& known) {
  std::vector<std::string> alike;
  for (const std::string& candidate : known)
    if (distance(name, candidate) <= 2 || (name.size() >= 3 && candidate.find(name) != std::string::npos))
      alike.push_back(candidate);
  if (alike.size() > 8) alike.resize(8);
  throw UsageError(fmt::format("--tasks: there is no task or group \"{}\"", name.substr(0, 80)),
                   alike.empty() ? "headfold evaluate --list shows all of them"
                                 : fmt::format("did you mean {}?", fmt::join(alike, ", ")));
}

fs::path place_path(const SuiteOptions& options, const std::string& place) {
  return options.data_dir / place;
}

bool is_there(const fs::path& path) {
  std::error_code code;
  return fs::is_regular_file(path, code);
}

FoundSplit find_split(const std::string& task, const std::string& obtain, const Split& split,
                      const std::string& purpose, const SuiteOptions& options) {
  std::vector<std::string> looked;
  for (const Place& place : split.places) {
    if (options.data_dir.empty() && !fs::path(place.documents).is_absolute()) continue;
    const fs::path path = place_path(options, place.documents);
    looked.push_back(path.string());
    if (!is_there(path)) continue;
    FoundSplit found;
    found.documents = path;
    found.task = task;
    found.obtain = obtain;
    if (!place.labels.empty()) {
      found.wanted_labels = place_path(options, place.labels);
      if (is_there(found.wanted_labels)) found.labels = found.wanted_labels;
    }
    return found;
  }
  if (looked.empty())
    throw MissingData(task, fmt::format("{}: the {} come from a file, and no --data-dir says where", task, purpose),
                      fmt::format("obtain it: {}", obtain));
  throw MissingData(task, fmt::format("{}: no file with the {}; looked for {}", task, purpose, fmt::join(looked, ", ")),
                    fmt::format("obtain it: {}; or leave such tasks out with --skip-missing", obtain));
}

OrderedJson configuration(const Definition& definition, const SuiteOptions& options, std::int64_t shots,
                          const std::string& output_type) {
  const PromptRules& rules = definition.rules;
  OrderedJson config;
  config["task"] = definition.name;
  config["dataset_path"] = definition.dataset_path;
  if (!definition.dataset_name.empty()) config["dataset_name"] = definition.dataset_name;
  const bool has_pool = !definition.shots.places.empty();
  if (has_pool && definition.shots.name == "train") config["training_split"] = "train";
  if (definition.evaluated.name == "validation") config["validation_split"] = "validation";
  if (definition.evaluated.name == "test") config["test_split"] = "test";
  if (has_pool && definition.shots.name == "dev") config["fewshot_split"] = "dev";
  config["doc_to_text"] = definition.text_template;
  config["doc_to_target"] = definition.target_template;
  config["description"] = rules.description;
  config["target_delimiter"] = rules.target_delimiter;
  config["fewshot_delimiter"] = rules.fewshot_delimiter;
  config["fewshot_config"] = {{"sampler", rules.sampler == Sampler::random ? "default" : "first_n"},
                              {"seed", options.fewshot_seed}};
  config["num_fewshot"] = shots;
  config["metric_list"] = OrderedJson::array();
  for (const std::string& metric : definition.metrics) {
    const bool perplexity_metric = metric == "perplexity";
    config["metric_list"].push_back({{"metric", metric},
                                     {"aggregation", perplexity_metric ? "perplexity" : "mean"},
                                     {"higher_is_better", !perplexity_metric}});
  }
  config["output_type"] = output_type;
  if (rules.type == OutputType::generation)
    config["generation_kwargs"] = {
        {"until", rules.stops}, {"do_sample", false}, {"temperature", 0.0}, {"max_gen_toks", rules.max_new_tokens}};
  config["repeats"] = 1;
  config["should_decontaminate"] = false;
  config["metadata"] = {{"version", definition.version}};
  return config;
}

void note_count(BenchmarkTask& task, const Split& split, std::size_t found, const fs::path& file,
                const std::string& what) {
  if (split.published == 0 || static_cast<std::int64_t>(found) == split.published) return;
  task.notes.push_back(fmt::format("{} has {} {}, the published {} split {}: numbers are not comparable with others'",
                                   file.filename().string(), found, what, split.name, split.published));
}

/// Examples before every question.
std::int64_t shots_of(const Definition& definition, const SuiteOptions& options) {
  const PromptRules& rules = definition.rules;
  const std::int64_t shots = rules.fixed_shots ? rules.shots : options.shots.value_or(rules.shots);
  if (shots < 0) throw UsageError(fmt::format("--num-fewshot {}: 0 or more", shots));
  return shots;
}

/// Where the files of a task are; nothing for what it makes itself.
struct TaskFiles {
  std::optional<FoundSplit> documents, shots;
};
TaskFiles find_files(const Definition& definition, const SuiteOptions& options) {
  TaskFiles files;
  if (!definition.make)
    files.documents = find_split(definition.name, definition.obtain, definition.evaluated, "documents", options);
  if (shots_of(definition, options) > 0 && !definition.shots.places.empty())
    files.shots = find_split(definition.name, definition.obtain, definition.shots, "examples for the prompt", options);
  return files;
}

BenchmarkTask make_task(const Definition& definition, const SuiteOptions& options) {
  BenchmarkTask task;
  task.name = definition.name;
  task.alias = definition.alias.empty() ? definition.name : definition.alias;
  task.version = definition.version;
  task.description = definition.about;
  const PromptRules& rules = definition.rules;
  task.output_type = rules.type == OutputType::multiple_choice
                         ? "multiple_choice"
                         : (rules.type == OutputType::log_likelihood ? "loglikelihood" : "generate_until");
  task.shots = shots_of(definition, options);
  if (rules.fixed_shots && options.shots && *options.shots != rules.shots)
    task.notes.push_back(fmt::format("{} examples, whatever --num-fewshot says", rules.shots));

  const TaskFiles files = find_files(definition, options);
  auto items = std::make_shared<std::vector<Item>>();
  if (definition.make) {
    *items = definition.make(options);
  } else {
    const FoundSplit& found = *files.documents;
    *items = definition.read(found);
    task.files.push_back(found.documents);
    if (!found.labels.empty()) task.files.push_back(found.labels);
    note_count(task, definition.evaluated, items->size(), found.documents, "documents");
  }
  task.documents_original = static_cast<std::int64_t>(items->size());
  const std::int64_t count = limited_count(task.documents_original, options.limit);
  // Elsewhere the first documents stand for all of them; here lengths and depths come one after the other.
  if (definition.make && count < task.documents_original)
    task.notes.push_back(fmt::format("the first {} of {} documents only: other lengths and depths are left out", count,
                                     task.documents_original));

  std::vector<std::string> shots;
  if (files.shots) {
    const FoundSplit& pool_file = *files.shots;
    const std::vector<Item> pool = definition.read(pool_file);
    task.files.push_back(pool_file.documents);
    if (!pool_file.labels.empty()) task.files.push_back(pool_file.labels);
    note_count(task, definition.shots, pool.size(), pool_file.documents, "examples to draw from");
    shots = shot_texts(definition.name, *items, count, pool, rules, task.shots, options.fewshot_seed);
  } else {
    shots = shot_texts(definition.name, *items, count, definition.fixed.empty() ? *items : definition.fixed, rules,
                       task.shots, options.fewshot_seed);
  }
  items->resize(static_cast<std::size_t>(count));
  task.requests = make_requests(*items, count, shots, rules);
  for (Request& request : task.requests) {
    const std::string& where = (*items)[static_cast<std::size_t>(request.document)].where;
    request.source = definition.name + (where.empty() ? "" : ", " + where);
  }
  task.config = configuration(definition, options, task.shots, task.output_type);
  for (std::int64_t d = 0; d < count; ++d) {
    Item& item = (*items)[static_cast<std::size_t>(d)];
    task.documents.push_back({d, std::move(item.fields), std::move(item.target)});
    // What the scorer needs stays; the prompt is in the requests.
    item.fields = OrderedJson();
    item.context = std::string();  // its memory too: LongBench's are long
    if (definition.by) item.fields = task.documents.back().fields;
  }
  task.score = [items, scorer = definition.score, by = definition.by, iterations = options.bootstrap_iterations](
                   const BenchmarkTask& self, const std::vector<Answer>& answers) {
    return aggregate(self, *items, answers, scorer, iterations, by);
  };
  return task;
}

FileListing list_place(const std::string& purpose, const Split& split, bool labels, const SuiteOptions& options,
                       bool checksums) {
  FileListing listing;
  listing.purpose = purpose;
  for (const Place& place : split.places) {
    const std::string& name = labels ? place.labels : place.documents;
    if (name.empty()) continue;
    listing.wanted.push_back(name);
    const fs::path path = place_path(options, name);
    const bool searched = !options.data_dir.empty() || fs::path(name).is_absolute();
    // Labels belong to the documents beside them.
    if (listing.found.empty() && searched && is_there(path) &&
        (!labels || is_there(place_path(options, place.documents))))
      listing.found = path;
  }
  if (checksums && !listing.found.empty()) {
    Sha256 hash;
    hash.update(MappedFile(listing.found).bytes());
    listing.sha256 = hash.hex();
  }
  return listing;
}

/// The files of one purpose over all subjects of mmlu, for one row of the listing.
struct SubjectFiles {
  std::string purpose;
  std::int64_t subjects = 0;
  std::vector<std::string> wanted;               ///< places, with <subject> for its name
  std::vector<std::string> missing;              ///< subjects
  std::map<std::string, std::string> checksums;  ///< by subject
  std::string obtain;

  void add(const TaskListing& task) {
    const auto file = std::find_if(task.files.begin(), task.files.end(),
                                   [&](const FileListing& entry) { return entry.purpose == purpose; });
    if (file == task.files.end()) throw InternalError(fmt::format("{} has no {}", task.name, purpose));
    const std::string subject = task.name.substr(std::string_view("mmlu_").size());
    if (subjects++ == 0)
      for (const std::string& place : file->wanted) wanted.push_back(replaced(place, subject, "<subject>"));
    obtain = task.obtain;
    if (file->found.empty()) missing.push_back(subject);
    if (!file->sha256.empty()) checksums[subject] = file->sha256;
  }
  std::string checksum() const {
    if (checksums.empty()) return {};
    Sha256 hash;
    for (const auto& [subject, checksum] : checksums) hash.update(checksum);
    return hash.hex();
  }
};

std::vector<std::string> groups_of(const std::string& task) {
  std::vector<std::string> names;
  for (const NamedGroup& group : named_groups())
    if (std::find(group.members.begin(), group.members.end(), task) != group.members.end()) names.push_back(group.name);
  return names;
}

/// What is done with what names stand for.
struct NameUser {
  std::function<void(const NamedGroup&)> group;  ///< after its members
  std::function<void(const NamedText&, const fs::path&)> text;
  std::function<void(const Definition&)> task;
  std::function<void(const std::string&, const MissingData&)> skipped;
};

/// In the order asked for, each once. UsageError for unknown names; MissingData unless it may be skipped.
void use_names(const std::vector<std::string>& names, const SuiteOptions& options, const NameUser& user) {
  const std::vector<Definition> definitions = all_definitions(options);
  const auto definition_of = [&](const std::string& name) {
    return std::find_if(definitions.begin(), definitions.end(), [&](const Definition& d) { return d.name == name; });
  };
  std::set<std::string> done;
  const std::function<void(const std::string&)> add = [&](const std::string& given) {
    const std::string name = full_name(given);
    if (!done.insert(name).second) return;
    if (const NamedGroup* group = find_group(name)) {
      for (const std::string& member : group->members) add(member);
      user.group(*group);
      return;
    }
    try {
      const auto text = std::find_if(named_texts().begin(), named_texts().end(),
                                     [&](const NamedText& entry) { return entry.text.name == name; });
      if (text != named_texts().end()) {
        user.text(*text, find_split(name, text->obtain, text->split, "text", options).documents);
        return;
      }
      const auto definition = definition_of(name);
      if (definition == definitions.end()) {
        std::vector<std::string> known;
        for (const NamedGroup& group : named_groups()) known.push_back(group.name);
        for (const NamedText& entry : named_texts()) known.push_back(entry.text.name);
        for (const Definition& entry : definitions) known.push_back(entry.name);
        refuse_name(name, known);
      }
      user.task(*definition);
    } catch (const MissingData& error) {
      if (!options.skip_missing) throw;
      user.skipped(name, error);
    }
  };
  for (const std::string& name : names) add(name);
}

}  // namespace

void check_tasks(const std::vector<std::string>& names, const SuiteOptions& options) {
  use_names(names, options,
            {[](const NamedGroup&) {}, [](const NamedText&, const fs::path&) {},
             [&](const Definition& definition) { find_files(definition, options); },
             [](const std::string&, const MissingData&) {}});
}

Suite make_tasks(const std::vector<std::string>& names, const SuiteOptions& options) {
  Suite suite;
  NameUser user;
  user.group = [&](const NamedGroup& group) {
    if (group.reports)
      suite.groups.push_back({group.name, group.name, group.version, {}, {}, group.weight_by_size, {}});
  };
  user.text = [&](const NamedText& text, const fs::path& file) {
    suite.texts.push_back(text.text);
    suite.texts.back().file = file;
  };
  user.task = [&](const Definition& definition) { suite.tasks.push_back(make_task(definition, options)); };
  user.skipped = [&](const std::string& name, const MissingData& error) {
    suite.skipped.push_back({name, error.what()});
  };
  use_names(names, options, user);
  // The total before its parts, as it is printed.
  std::stable_sort(suite.groups.begin(), suite.groups.end(),
                   [](const TaskGroup& a, const TaskGroup& b) { return a.name == "mmlu" && b.name != "mmlu"; });
  for (TaskGroup& group : suite.groups) {
    std::vector<std::string> lacking;
    const std::function<void(const std::string&)> collect = [&](const std::string& name) {
      if (const NamedGroup* inner = find_group(name)) {
        for (const std::string& member : inner->members) collect(member);
        return;
      }
      const bool there = std::any_of(suite.tasks.begin(), suite.tasks.end(),
                                     [&](const BenchmarkTask& task) { return task.name == name; });
      (there ? group.leaves : lacking).push_back(name);
    };
    for (const std::string& member : find_group(group.name)->members) {
      const std::size_t before = group.leaves.size();
      collect(member);
      if (group.leaves.size() > before) group.subtasks.push_back(member);
    }
    if (!lacking.empty() && !group.leaves.empty())
      group.notes.push_back(
          fmt::format("{} of {} tasks are left out: {}: the value is that of the others, and not "
                      "comparable with others' numbers",
                      lacking.size(), lacking.size() + group.leaves.size(), fmt::join(lacking, ", ")));
    if (const std::string prefix = "mmlu_"; group.name.starts_with(prefix))
      group.alias = group.name.substr(prefix.size());
  }
  return suite;
}

std::vector<GroupResult> group_results(const Suite& suite, const std::map<std::string, Scored>& scored) {
  std::vector<GroupResult> results;
  for (const TaskGroup& group : suite.groups) {
    GroupResult result;
    result.name = group.name;
    result.alias = group.alias;
    result.version = group.version;
    result.subtasks = group.subtasks;
    result.notes = group.notes;
    struct Column {
      Metric metric;
      std::vector<GroupPart> parts;
    };
    std::vector<Column> columns;
    std::int64_t leaves = 0;
    for (const std::string& leaf : group.leaves) {
      const auto found = scored.find(leaf);
      if (found == scored.end()) continue;
      const auto task = std::find_if(suite.tasks.begin(), suite.tasks.end(),
                                     [&](const BenchmarkTask& candidate) { return candidate.name == leaf; });
      const auto count = static_cast<std::int64_t>(task->documents.size());
      ++leaves;
      result.sample_count += count;
      for (const Metric& metric : found->second.metrics) {
        auto column = std::find_if(columns.begin(), columns.end(), [&](const Column& known) {
          return known.metric.name == metric.name && known.metric.filter == metric.filter;
        });
        if (column == columns.end()) column = columns.insert(columns.end(), {metric, {}});
        column->parts.push_back({metric.value, metric.error, count});
      }
    }
    if (leaves == 0) continue;
    for (Column& column : columns) {
      // A metric that only some tasks have says nothing about the group.
      if (static_cast<std::int64_t>(column.parts.size()) != leaves) continue;
      column.metric.value = group_mean(column.parts, group.weight_by_size);
      column.metric.error = group.weight_by_size ? group_error(column.parts) : std::nullopt;
      result.metrics.push_back(column.metric);
    }
    results.push_back(std::move(result));
  }
  return results;
}

bool TaskListing::ready() const {
  return std::all_of(files.begin(), files.end(),
                     [](const FileListing& file) { return file.purpose != "documents" || !file.found.empty(); });
}

std::vector<TaskListing> list_tasks(const SuiteOptions& options, bool checksums,
                                    const std::vector<std::string>& names) {
  std::set<std::string> chosen;
  SuiteOptions whatever_is_there = options;
  whatever_is_there.skip_missing = true;
  use_names(names, whatever_is_there,
            {[](const NamedGroup&) {}, [&](const NamedText& text, const fs::path&) { chosen.insert(text.text.name); },
             [&](const Definition& definition) { chosen.insert(definition.name); },
             [&](const std::string& name, const MissingData&) { chosen.insert(name); }});
  const auto wanted = [&](const std::string& name) { return names.empty() || chosen.contains(name); };
  std::vector<TaskListing> all;
  for (const NamedText& entry : named_texts()) {
    if (!wanted(entry.text.name)) continue;
    TaskListing listing{entry.text.name, entry.about, groups_of(entry.text.name), {}, entry.obtain};
    listing.files.push_back(list_place("documents", entry.split, false, options, checksums));
    all.push_back(std::move(listing));
  }
  for (const Definition& task : all_definitions(options)) {
    if (!wanted(task.name)) continue;
    TaskListing listing{task.name, task.about, groups_of(task.name), {}, task.obtain};
    const auto add = [&](const std::string& purpose, const Split& split, bool labels) {
      FileListing file = list_place(purpose, split, labels, options, checksums);
      if (!file.wanted.empty()) listing.files.push_back(std::move(file));
    };
    add("documents", task.evaluated, false);
    add("labels", task.evaluated, true);
    add("shots", task.shots, false);
    add("shots' labels", task.shots, true);
    all.push_back(std::move(listing));
  }
  return all;
}

std::string listing_text(const std::vector<TaskListing>& tasks) {
  Table table({"task", "file", "found", "sha256", "about"});
  std::string places;
  std::vector<std::string> missing;
  SubjectFiles documents, shots;
  documents.purpose = "documents";
  shots.purpose = "shots";
  for (const TaskListing& task : tasks) {
    const bool subject = std::any_of(task.groups.begin(), task.groups.end(),
                                     [](const std::string& group) { return group.starts_with("mmlu_"); });
    if (subject) {
      documents.add(task);
      shots.add(task);
      continue;
    }
    if (task.files.empty()) table.add({task.name, "none needed", "yes", "", task.about});
    for (const FileListing& file : task.files) {
      const bool first = &file == &task.files.front();
      const bool labels = file.purpose.ends_with("labels");
      table.add({first ? task.name : "",
                 fmt::format("{}: {}", labels ? file.purpose + " (unless inside)" : file.purpose, file.wanted[0]),
                 file.found.empty() ? "no" : file.found.string(), file.sha256, first ? task.about : ""});
      places += fmt::format("  {}, {}: {}\n", task.name, file.purpose, fmt::join(file.wanted, ", "));
    }
    if (!task.ready()) {
      missing.push_back(fmt::format("  {}: {}", task.name, task.obtain));
      continue;
    }
    for (const FileListing& file : task.files)
      if (file.purpose == "shots" && file.found.empty())
        missing.push_back(fmt::format("  {}, examples for the prompt ({}): {}", task.name,
                                      fs::path(file.wanted[0]).filename().string(), task.obtain));
  }
  if (documents.subjects > 0) {
    for (const SubjectFiles* files : {&documents, &shots}) {
      table.add(
          {files == &documents ? "mmlu" : "", fmt::format("{}: {}", files->purpose, files->wanted.at(0)),
           fmt::format("{} of {} subjects", files->subjects - std::ssize(files->missing), files->subjects),
           files->checksum(),
           files == &documents ? "exam questions, mmlu_<subject>, in four groups; one checksum over theirs" : ""});
      places += fmt::format("  mmlu, {}: {}\n", files->purpose, fmt::join(files->wanted, ", "));
      if (!files->missing.empty())
        missing.push_back(
            fmt::format("  mmlu, {} of {}: {}", files->purpose, fmt::join(files->missing, ", "), files->obtain));
    }
  }
  std::string text = table.text();
  text += "\nWhere files are looked for under --data-dir, in this order\n" + places;
  text += "\nGroups\n";
  for (const NamedGroup& group : named_groups()) {
    const bool long_list = group.name.starts_with("mmlu_");
    text += fmt::format("  {}: {}\n", group.name,
                        long_list ? fmt::format("{} subjects", group.members.size())
                                  : fmt::format("{}", fmt::join(group.members, ", ")));
  }
  if (!missing.empty())
    text += fmt::format("\nHow to obtain what is missing (on a connected machine, then copy it under --data-dir)\n{}\n",
                        fmt::join(missing, "\n"));
  return text;
}

SampleHashes sample_hashes(const BenchmarkTask& task, std::int64_t document) {
  const BenchmarkDocument& own = task.documents.at(static_cast<std::size_t>(document));
  const auto request = std::lower_bound(task.requests.begin(), task.requests.end(), document,
                                        [](const Request& r, std::int64_t wanted) { return r.document < wanted; });
  if (request == task.requests.end() || request->document != document)
    throw InternalError(fmt::format("{}: document {} has no request", task.name, document));
  return {sha256_hex(own.fields.dump(2, ' ', false, OrderedJson::error_handler_t::replace)),
          sha256_hex(request->context), sha256_hex(own.target)};
}

std::string task_hash(const BenchmarkTask& task, const std::vector<Sample>& samples) {
  Sha256 hash;
  for (const Sample& sample : samples) {
    const SampleHashes hashes = sample_hashes(task, sample.document);
    hash.update(hashes.document);
    hash.update(hashes.prompt);
    hash.update(hashes.target);
  }
  return hash.hex();
}

}  // namespace headfold::evaluation
