// headfold run: all stages that one configuration file asks for, in this process and on its ranks. A batch job of one
// stage calls it with --stage.

#include <headfold/base/files.h>
#include <headfold/base/log.h>
#include <headfold/base/stop.h>
#include <headfold/base/table.h>
#include <headfold/device/device.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <iostream>
#include <optional>

#include "run_check.h"
#include "run_flags.h"
#include "scale.h"
#include "session.h"

namespace headfold::jobs {

namespace {

po::options_description run_options() {
  po::options_description own("run options");
  own.add_options()("config", po::value<std::string>(), "configuration file (docs/user-guide.md)")(
      "stage", po::value<std::string>(), "run this stage alone: calibrate, convert, finetune, evaluate, report")(
      "element", po::value<std::int64_t>(), "run one element of --stage alone, from 0 (--list shows them)")(
      "list", po::bool_switch(), "show stages and elements, and what is finished; then stop")(
      "unchecked", po::bool_switch(),
      "with --list: do not look whether stages would refuse their values, or models and files are there")(
      "json", po::value<std::string>()->implicit_value(""),
      "print the list, or a prediction, as JSON; --json FILE writes it to a file")(
      "dry-run", po::bool_switch(),
      "check the configuration and say what would be done, as far as "
      "it can be known now; then stop");
  own.add(scale_options());
  return own;
}

/// One element and where it stands.
struct Task {
  const RunStage* stage = nullptr;
  std::size_t number = 0;
  std::string id;
  const RunElement& element() const { return stage->elements[number]; }
};

std::vector<Task> chosen_tasks(const RunPlan& plan, const po::variables_map& values) {
  const bool one_stage = values.count("stage") > 0, one_element = values.count("element") > 0;
  if (one_element && !one_stage) throw UsageError("--element needs --stage", "headfold run --list shows both");
  std::vector<std::string> names;
  for (const RunStage& stage : plan.stages) names.push_back(stage.name);
  std::vector<Task> tasks;
  for (const RunStage& stage : plan.stages) {
    if (one_stage && stage.name != values["stage"].as<std::string>()) continue;
    for (std::size_t i = 0; i < stage.elements.size(); ++i)
      if (!one_element || static_cast<std::int64_t>(i) == values["element"].as<std::int64_t>())
        tasks.push_back({&stage, i, stage.id(i)});
    if (tasks.empty())
      throw UsageError(fmt::format("--element {}: stage {} has elements 0 to {}", values["element"].as<std::int64_t>(),
                                   stage.name, stage.elements.size() - 1));
  }
  if (tasks.empty())
    throw UsageError(
        fmt::format("--stage {}: the configuration has {}", values["stage"].as<std::string>(), fmt::join(names, ", ")));
  return tasks;
}

OrderedJson list_json(const RunPlan& plan, const RunFlags& flags) {
  OrderedJson json;
  json["folder"] = plan.folder.string();
  json["stages"] = OrderedJson::array();
  for (const RunStage& stage : plan.stages) {
    OrderedJson one;
    one["stage"] = stage.name;
    one["after"] = stage.after;
    one["resources"] = OrderedJson::object();
    for (const auto& [key, value] : stage.resources) one["resources"][key] = value;
    one["elements"] = OrderedJson::array();
    for (std::size_t i = 0; i < stage.elements.size(); ++i) {
      const RunElement& element = stage.elements[i];
      std::vector<std::string> command = {"headfold", stage.name};
      command.insert(command.end(), element.arguments.begin(), element.arguments.end());
      one["elements"].push_back({{"name", element.name},
                                 {"command", command},
                                 {"output", element.output.string()},
                                 {"finished", flags.finished(stage.id(i))}});
    }
    json["stages"].push_back(std::move(one));
  }
  return json;
}

void print_list(const RunPlan& plan, const RunFlags& flags) {
  Table table({"stage", "element", "name", "state", "output"});
  for (const RunStage& stage : plan.stages)
    for (std::size_t i = 0; i < stage.elements.size(); ++i) {
      const std::string id = stage.id(i);
      table.add({stage.name, std::to_string(i), stage.elements[i].name,
                 flags.finished(id) ? "finished"
                 : flags.stale(id)  ? "changed since"
                                    : "open",
                 stage.elements[i].output.lexically_relative(plan.folder).string()});
    }
  std::cout << fmt::format("{}\n{}", plan.folder.string(), table.text()) << std::flush;
}

/// A job's arguments with those that `run` gives it: where logs and events go, and the options of every job that `run`
/// was given itself (`values`), which overrule the file's.
std::vector<std::string> arguments_of(const RunPlan& plan, const Task& task, bool again,
                                      const po::variables_map& values) {
  std::vector<std::string> arguments = task.element().arguments;
  const po::options_description common = common_options();
  const auto give = [&](const char* name, const std::string& value) {
    arguments.insert(arguments.end(), {"--" + std::string(name), value});
  };
  give("log-dir", (plan.folder / "logs" / task.id).string());
  give("events", (plan.folder / "events.jsonl").string());
  give("stage-name", task.id);
  std::vector<std::string> given;
  for (const char* name : {"threads", "comm-timeout"})
    if (!values[name].defaulted()) given.emplace_back(name);
  if (values.count("verbose") > 0) given.emplace_back("verbose");
  if (values["share-gpus"].as<bool>()) given.emplace_back("share-gpus");
  for (const std::string& name : given) {
    if (const auto old = std::find(arguments.begin(), arguments.end(), "--" + name); old != arguments.end())
      arguments.erase(old, old + (common.find(name, false).semantic()->max_tokens() > 0 ? 2 : 1));
    arguments.push_back("--" + name);
    if (values[name].value().type() == typeid(int)) arguments.push_back(std::to_string(values[name].as<int>()));
    if (values[name].value().type() == typeid(double))
      arguments.push_back(fmt::format("{}", values[name].as<double>()));
  }
  const bool replaces =
      task.stage->name == "calibrate" || task.stage->name == "convert" || task.stage->name == "finetune";
  if (again && replaces && std::find(arguments.begin(), arguments.end(), "--overwrite") == arguments.end())
    arguments.emplace_back("--overwrite");
  return arguments;
}

/// Text of the file on rank 0, on every rank.
std::string shared_text(const comm::Communicator& world, const fs::path& file) {
  std::string text;
  world.on_root([&] {
    if (fs::is_directory(file))
      throw UsageError(fmt::format("--config {} is a folder", file.string()), "name the file in it");
    text = read_file(file, std::uint64_t{1} << 20);
  });
  world.broadcast(text);
  return text;
}

/// What every rank must know about a task before it begins.
struct Standing {
  bool stop = false, finished = false, stale = false;
  std::string missing;
};

Standing standing_of(const comm::Communicator& world, const RunPlan& plan, const RunFlags* flags, const Task& task) {
  std::array<std::int64_t, 3> known{};
  Standing standing;
  if (flags != nullptr) {
    known = {stop_requested(plan.folder) ? 1 : 0, flags->finished(task.id) ? 1 : 0, flags->stale(task.id) ? 1 : 0};
    standing.missing = fmt::format("{}", fmt::join(flags->missing(task.id), ", "));
  } else {
    known[0] = stop_requested() ? 1 : 0;
  }
  world.all_reduce(std::span(known), comm::Reduce::max);
  world.broadcast(standing.missing);
  standing.stop = known[0] != 0;
  standing.finished = known[1] != 0;
  standing.stale = known[2] != 0;
  return standing;
}

void run_task(const Context& context, const RunPlan& plan, const Task& task, bool again,
              const po::variables_map& values, RunFlags* flags) {
  const comm::Communicator& world = context.world;
  const std::vector<std::string> arguments = arguments_of(plan, task, again, values);
  if (world.root()) {
    if (again) spdlog::warn("{}: its options or inputs have changed since it was finished; it is made again", task.id);
    std::cout << fmt::format("\n== {} ({} of {}{})\n$ {}\n", task.stage->name, task.number + 1,
                             task.stage->elements.size(),
                             task.element().name == task.stage->name ? "" : ": " + task.element().name,
                             command_line(task.stage->name, task.element().arguments))
              << std::flush;
  }
  world.on_root([&] {
    remove_temporaries(task.element().output);
    remove_temporaries(plan.folder / "finished" / task.id);
    if (task.stage->name == "evaluate")
      for (const fs::path& old : results_below(task.element().output)) fs::remove(old);
  });
  forget_stop_files();  // those of the element before
  watch_stop_file(plan.folder / "STOP");
  const auto start = std::chrono::steady_clock::now();
  run_job(context, find_job(task.stage->name), arguments);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  world.on_root([&] { flags->finish(task.id, seconds); });
  device::release_freed_memory();
}

/// The job's own dry run where what it reads is there.
void preview(const Context& context, const Task& task, const Standing& standing) {
  if (context.world.root())
    std::cout << fmt::format("\n== {} ({} of {}: {})\n$ {}\n", task.stage->name, task.number + 1,
                             task.stage->elements.size(), task.element().name,
                             command_line(task.stage->name, task.element().arguments))
              << (standing.finished          ? "finished before\n"
                  : standing.missing.empty() ? ""
                                             : "waits for " + standing.missing + "\n")
              << std::flush;
  if (standing.finished || !standing.missing.empty()) return;
  std::vector<std::string> arguments = task.element().arguments;
  arguments.emplace_back("--dry-run");
  run_job(context, find_job(task.stage->name), arguments);
}

/// comm-timeout of the file's [run], as this rank reads it: it holds for what ranks do before they have agreed upon the
/// file, too. What is wrong with the file is told later.
std::optional<double> own_timeout(const std::vector<std::string>& arguments) {
  const po::variables_map values = read_values("run", run_options(), arguments);
  if (values.count("help") > 0 || values.count("config") == 0) return {};
  try {
    const fs::path file = values["config"].as<std::string>();
    if (!fs::is_regular_file(file)) return {};  // a pipe can be read once
    for (const IniSection& section : parse_ini(read_file(file), file.string()))
      for (const IniEntry& entry : section.entries)
        if (section.kind == "run" && entry.key == "comm-timeout") {
          const double seconds = std::stod(entry.value);
          if (std::isfinite(seconds) && seconds >= 0) return seconds;
        }
  } catch (const std::exception&) {
  }
  return {};
}

}  // namespace

void run_pipeline(const Context& context, const std::vector<std::string>& arguments) {
  const po::variables_map values = parse(
      context, "run",
      "headfold run --config pipeline.ini [--stage STAGE [--element N]] [--dry-run]\n"
      "       headfold run --config pipeline.ini --list [--json]\n"
      "       headfold run --dry-run --nodes N --gpu h100 [--gpus-per-node G] [--config pipeline.ini | --shape SHAPE]",
      run_options(), arguments, {}, own_timeout(arguments));
  const comm::Communicator& world = context.world;
  const bool predicts = asks_for_prediction(values);
  if (predicts && !values["dry-run"].as<bool>())
    throw UsageError("--nodes, --gpu, --rates, --model and --shape predict a run", "add --dry-run");
  if (values.count("config") == 0) {
    if (!predicts) throw UsageError("the option '--config' is required but missing", "headfold run --help");
    world.on_root([&] { predict_run(values, {}); });
    return;
  }
  if (values["unchecked"].as<bool>() && !values["list"].as<bool>())
    throw UsageError("--unchecked is for --list: what runs is checked", "leave it out");
  const fs::path file = values["config"].as<std::string>();
  const RunPlan plan = read_run_plan(shared_text(world, file), file);
  const std::vector<Task> tasks = chosen_tasks(plan, values);
  if (predicts) {
    std::vector<PredictedElement> elements;
    elements.reserve(tasks.size());
    for (const Task& task : tasks)
      elements.push_back({task.stage->name, task.element().name, task.element().arguments, task.element().output});
    world.on_root([&] { predict_run(values, elements); });
    return;
  }
  std::unique_ptr<RunFlags> flags;
  world.on_root([&] {
    flags = std::make_unique<RunFlags>(plan);
    std::vector<std::pair<std::string, const RunElement*>> elements;  // what is finished may have lost its inputs
    for (const Task& task : tasks)
      if (!flags->finished(task.id)) elements.emplace_back(task.stage->name, &task.element());
    if (!elements.empty() && !values["unchecked"].as<bool>()) check_run(plan, elements);
  });
  const bool as_json = values.count("json") > 0;
  if (values["list"].as<bool>() || as_json) {
    if (!world.root()) return;
    const auto target = as_json ? values["json"].as<std::string>() : std::string();
    if (!target.empty())
      write_json(fs::path(target), list_json(plan, *flags));
    else if (as_json)
      std::cout << list_json(plan, *flags).dump(2) << "\n" << std::flush;
    else
      print_list(plan, *flags);
    return;
  }
  const bool dry = values["dry-run"].as<bool>();
  if (dry) {
    for (const Task& task : tasks) preview(context, task, standing_of(world, plan, flags.get(), task));
    if (world.root()) std::cout << "\ndry run: nothing was written\n";
    return;
  }
  listen_for_stop();
  std::size_t done = 0;
  for (const Task& task : tasks) {
    const Standing standing = standing_of(world, plan, flags.get(), task);
    if (standing.stop) throw Stopped(fmt::format("stopped on request before {}", task.id));
    if (standing.finished) {
      if (world.root()) spdlog::info("{} ({}) was finished before", task.id, task.element().name);
      continue;
    }
    if (!standing.missing.empty())
      throw InputError(fmt::format("{} reads the results of {}, which is not finished", task.id, standing.missing),
                       "run the stages in their order, or all of them without --stage");
    run_task(context, plan, task, standing.stale, values, flags.get());
    ++done;
  }
  if (world.root())
    std::cout << fmt::format("\n{} of {} elements were run, the others had been finished before: {}\n", done,
                             tasks.size(), plan.folder.string())
              << std::flush;
}

}  // namespace headfold::jobs
