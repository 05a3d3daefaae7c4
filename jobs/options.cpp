#include <ATen/Parallel.h>
#include <headfold/base/files.h>
#include <headfold/base/log.h>
#include <headfold/base/version.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/checkpoint/reader.h>
#include <headfold/checkpoint/writer.h>

#include <headfold/device/device.h>
#include <headfold/device/gpu.h>
#include <headfold/model/compute.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <iostream>
#include <locale>
#include <set>
#include <sstream>

#include "session.h"

namespace headfold::jobs {

po::options_description common_options() {
  po::options_description options("common options");
  options.add_options()("help,h", "print this help")("threads", po::value<int>()->default_value(0),
                                                     "threads per rank; 0 = the host's cores divided by its ranks")(
      "log-dir", po::value<std::string>(), "folder for one log file per rank, HOST-RANK.log")("verbose", "log more")(
      "events", po::value<std::string>(), "file to which one line of JSON is appended per event: start, progress, end")(
      "stage-name", po::value<std::string>(), "name of this job in its events (default: the job's)")(
      "comm-timeout", po::value<double>()->default_value(1800),
      "seconds an operation may wait for other ranks before the job ends with an error that names them; 0 = for ever")(
      "share-gpus", po::bool_switch(), "let several ranks use the same GPU");
  return options;
}

void add_device_option(po::options_description& options) {
  options.add_options()("device", po::value<std::string>()->default_value("auto"),
                        "where a rank computes: cpu, cuda (its own GPU), cuda:N, auto (its GPU where there is one), or "
                        "cpu:tensors (the code of GPUs on the CPU, slower)");
}

std::int64_t memory_for_model(std::int64_t host_share) {
  const model::Compute& compute = model::compute();
  return compute.on_host() ? host_share : static_cast<std::int64_t>(device::gpu_memory(compute.device.index()).free);
}

std::string device_kind() {
  const std::string text = model::device_text(model::compute());
  return model::compute().on_host() ? text : text.substr(0, text.find(':'));
}

checkpoint::ModelConfig Planned::config_of(const fs::path& folder) const {
  checkpoint::ModelConfig config = original;
  if (folder != model && config.family == checkpoint::Family::bloom) config.split_qkv = true;  // as folds write it
  return config;
}

po::variables_map read_values(const std::string& job, const po::options_description& own,
                              const std::vector<std::string>& arguments, const std::string& positional) {
  po::options_description all;
  all.add(own).add(common_options());
  po::variables_map values;
  try {
    po::positional_options_description bare;
    if (!positional.empty()) bare.add(positional.c_str(), -1);
    // Abbreviations are off: a script must not change its meaning when an option is added.
    const int style = po::command_line_style::default_style & ~po::command_line_style::allow_guessing;
    po::store(po::command_line_parser(arguments).options(all).positional(bare).style(style).run(), values);
    if (values.count("help") > 0) return values;
    po::notify(values);
  } catch (const po::error& error) {
    throw UsageError(error.what(), fmt::format("headfold {} --help", job));
  }
  if (const auto threads = values["threads"].as<int>(); threads < 0)
    throw UsageError(fmt::format("--threads {}: must be 0 (automatic) or more", threads));
  const auto timeout = values["comm-timeout"].as<double>();
  if (!std::isfinite(timeout) || timeout < 0)
    throw UsageError(fmt::format("--comm-timeout {}: seconds, 0 or more", timeout), "0 waits for ever");
  // Which GPUs there are is for the machine that computes to say.
  if (values.count("device") > 0)
    if (const auto device = values["device"].as<std::string>(); device != "auto" && device.rfind("cuda", 0) != 0)
      model::parse_device(device, -1);
  return values;
}

po::variables_map parse(const Context& context, const std::string& job, const std::string& usage,
                        const po::options_description& own, const std::vector<std::string>& arguments,
                        const std::string& positional, std::optional<double> timeout) {
  po::variables_map values = read_values(job, own, arguments, positional);
  if (values.count("help") > 0) {
    po::options_description all(120, 60);
    all.add(own).add(common_options());
    if (context.world.root()) std::cout << "usage: " << usage << "\n\n" << all;
    throw HelpShown{};
  }
  const auto threads = values["threads"].as<int>();
  const int most = std::max(64, 4 * device::usable_cores());
  if (threads > most) throw UsageError(fmt::format("--threads {}: must be between 0 and {} here", threads, most));
  comm::set_timeout_seconds(timeout && values["comm-timeout"].defaulted() ? *timeout
                                                                          : values["comm-timeout"].as<double>());
  open_session(context, job, values, arguments);
  return values;
}

const char* dtype_name(at::ScalarType dtype) {
  return dtype == at::kFloat ? "float32" : "bfloat16";
}

at::ScalarType parse_dtype(const std::string& text, const std::string& checkpoint_dtype) {
  if (text == "float32") return at::kFloat;
  if (text == "bfloat16") return at::kBFloat16;
  if (text == "auto")
    return checkpoint_dtype != "float32" && (!model::compute().on_host() || device::fast_bfloat16()) ? at::kBFloat16
                                                                                                     : at::kFloat;
  throw UsageError(fmt::format("--dtype {}: choose float32, bfloat16 or auto", text));
}

std::uint64_t parse_bytes(const std::string& option, const std::string& text) {
  double number = 0;
  std::string unit;
  {
    // from_chars and stod either lack floating point in some libraries or read the user's locale.
    std::istringstream stream(text);
    stream.imbue(std::locale::classic());
    if (!(stream >> number)) number = 0;
    stream.clear();
    std::getline(stream, unit);
  }
  std::transform(unit.begin(), unit.end(), unit.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  constexpr std::pair<const char*, double> units[] = {
      {"", 1}, {"b", 1}, {"kb", 1e3}, {"mb", 1e6}, {"gb", 1e9}, {"kib", 1024}, {"mib", 1048576}, {"gib", 1073741824}};
  for (const auto& [name, factor] : units) {
    const double bytes = std::floor(number * factor);
    if (unit == name && bytes >= 1 && bytes < 1e18) return static_cast<std::uint64_t>(bytes);
  }
  throw UsageError(fmt::format("--{} {}: give bytes, or a number with KB, MB, GB, KiB, MiB or GiB", option, text));
}

std::string shell_word(const std::string& text) {
  if (!text.empty() && text.find_first_of(" \t\n\"'`#!~$&|;<>*?()[]{}\\") == std::string::npos) return text;
  std::string word = "'";
  for (const char c : text) word += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return word + "'";
}

std::string command_line(const std::string& job, const std::vector<std::string>& arguments) {
  std::string text = "headfold " + job;
  for (const std::string& argument : arguments) text += " " + shell_word(argument);
  return text;
}

OrderedJson run_record(const Context& context, const std::string& job, const std::vector<std::string>& arguments,
                       double seconds) {
  const std::vector<std::string> hosts = context.world.all_gather(comm::Environment::host());
  const auto peak = context.world.all_reduce(static_cast<std::int64_t>(peak_resident_bytes()), comm::Reduce::max);
  OrderedJson record;
  record["job"] = job;
  record["command"] = command_line(job, arguments);
  record["date"] =
      std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
  record["seconds"] = seconds;
  record["ranks"] = context.world.size();
  record["hosts"] = std::set<std::string>(hosts.begin(), hosts.end()).size();
  record["threads_per_rank"] = at::get_num_threads();
  record["device"] = model::device_text(model::compute());
  record["peak_resident_bytes"] = peak;
  record["headfold_version"] = version();
  return record;
}

namespace {

/// The plan of convert --plan-only.
bool is_plan(const fs::path& file) {
  std::error_code code;
  if (!fs::is_regular_file(file, code)) return false;
  try {
    const Json json = read_json(file);
    return json.is_object() && json.value("format", std::string()) == "headfold-plan";
  } catch (const std::exception&) {
    return false;
  }
}

std::string described(const Json& made) {
  const auto format = made.is_object() ? made.value("format", std::string()) : std::string();
  if (format == "headfold-synthetic") return "a synthetic model";
  if (format == "headfold-expanded") return "an exported model";
  if (format == "headfold-merged" || made.contains("merged")) return "a model with merged training";
  return format == "headfold-model" ? "another conversion" : "another model";
}

enum class Found : std::int64_t { other, damaged, result };

Found found_in(const OutputFolder& output) {
  const fs::path file = output.folder / "headfold.json";
  Json made;
  std::string damage;
  try {
    made = read_json(file);
  } catch (const Error& error) {
    damage = error.what();
  }
  try {
    if (!output.is_own(made)) return Found::other;
  } catch (const std::exception&) {  // nothing of this command's, whatever it is
    return Found::other;
  }
  try {
    if (!damage.empty()) throw InputError(damage);
    const checkpoint::Reader reader(output.folder);  // sizes of all shards against their headers
    std::vector<std::string> problems = checkpoint::layout_problems(reader);
    for (const std::string& problem : checkpoint::companion_problems(output.folder, output.companions))
      problems.push_back(problem);
    for (const std::string& name : output.others)
      if (!fs::exists(output.folder / name)) problems.push_back(fmt::format("{} is missing", name));
    if (!problems.empty()) throw InputError(problems.front());
  } catch (const Error& error) {
    spdlog::warn("{} was made by this very command but is damaged ({}); it is made again", output.folder.string(),
                 error.what());
    return Found::damaged;
  }
  return Found::result;
}

/// Refuses what another command made.
void refuse_other(const OutputFolder& output) {
  const fs::path& folder = output.folder;
  std::string holds;
  // Where a job was killed while it put its model in place, the former one is gone.
  if (fs::exists(folder / "headfold.json") &&
      (checkpoint::holds_model(folder) || !fs::exists(folder / checkpoint::kUnfinishedMarker))) {
    holds = "another model";
    try {
      holds = described(read_json(folder / "headfold.json"));
    } catch (const Error&) {  // it may be whole but for this file
    }
  } else if (const fs::path plan = folder / "plan.json"; is_plan(plan)) {
    const auto kept = [&](const fs::path& file) { return fs::equivalent(file, plan); };
    if (std::none_of(output.keep.begin(), output.keep.end(), kept)) holds = "a plan of headfold convert";
  }
  if (!holds.empty())
    throw UsageError(fmt::format("{} holds {}", folder.string(), holds),
                     "choose another --out, or replace it with --overwrite");
}

/// Files that loaders of a model or of an adapter take for theirs.
bool is_own_file(const fs::path& file) {
  const std::string name = file.filename().string();
  return name != "verification.json" &&
         (checkpoint::is_model_file(name) || name == "adapter_config.json" || file.extension() == ".safetensors");
}

/// Files and folders that the job's options name for reading.
std::vector<fs::path> named_inputs(const po::variables_map& values) {
  std::vector<fs::path> inputs;
  for (const auto& [name, value] : values) {
    const auto outputs = {"out", "json", "events", "log-dir", "cache-teacher"};
    if (std::find(outputs.begin(), outputs.end(), name) != outputs.end()) continue;
    // Whatever is no path names no file that exists either.
    if (const auto* text = boost::any_cast<std::string>(&value.value()); text != nullptr && !text->empty())
      inputs.emplace_back(*text);
    if (const auto* texts = boost::any_cast<std::vector<std::string>>(&value.value()))
      inputs.insert(inputs.end(), texts->begin(), texts->end());
  }
  return inputs;
}

}  // namespace

void check_own_folder(const std::filesystem::path& folder) {
  if (!fs::exists(folder)) return;
  if (!fs::is_directory(folder))
    throw UsageError(fmt::format("{} exists and is not a folder", folder.string()), "choose another --out");
  if (fs::is_empty(folder) || fs::exists(folder / "headfold.json") ||
      fs::exists(folder / checkpoint::kUnfinishedMarker) || is_plan(folder / "plan.json"))
    return;
  throw UsageError(fmt::format("{} is not empty and was not written by headfold", folder.string()),
                   "choose another --out, or empty that folder yourself: headfold does not overwrite foreign files");
}

Json without_version(Json made) {
  if (made.is_object()) made.erase("headfold_version");
  return made;
}

Json without_version(const OrderedJson& made) {
  return without_version(Json::parse(made.dump()));
}

bool is_made(const Context& context, const OutputFolder& output) {
  std::int64_t made = 0;
  context.world.on_root([&] {
    check_own_folder(output.folder);
    const Found found = found_in(output);
    made = found == Found::result ? 1 : 0;
    if (found == Found::other && !output.overwrite) refuse_other(output);
  });
  made = context.world.all_reduce(made);  // zeros on the other ranks
  if (made == 1 && context.world.root())
    std::cout << fmt::format("{} is already the result of this very command; nothing to do\n", output.folder.string());
  return made == 1;
}

void check_output_place(const po::variables_map& values, const std::filesystem::path& file) {
  const auto same = [&](const fs::path& other) {
    std::error_code code;
    return fs::equivalent(file, other, code) || fs::weakly_canonical(file, code) == fs::weakly_canonical(other, code);
  };
  std::error_code code;
  for (const fs::path& input : named_inputs(values)) {
    bool reads = false;
    if (fs::is_directory(input, code)) {
      for (fs::directory_iterator entry(input, code), end; !code && entry != end; entry.increment(code))
        reads = reads || (is_own_file(entry->path()) && same(entry->path()));
    } else {
      reads = fs::exists(input, code) && same(input);
    }
    if (reads)
      throw UsageError(fmt::format("{} is a file that this job reads ({})", file.string(), input.string()),
                       "name another file to write");
  }
  const fs::path there = fs::weakly_canonical(file, code);
  if (fs::exists(there.parent_path() / "config.json", code) && is_own_file(there))
    throw UsageError(fmt::format("{} stands among the files of a model", file.string()),
                     "name a file in another folder");
}

void check_output_file(const po::variables_map& values, const std::filesystem::path& file, const std::string& kind,
                       const std::function<bool(const std::filesystem::path&)>& is_former) {
  check_output_place(values, file);
  std::error_code code;
  if (!fs::exists(file, code)) return;
  bool former = false;
  try {
    former = fs::is_regular_file(file, code) && is_former(file);
  } catch (const std::exception&) {  // unreadable as what it would have to be
  }
  if (!former)
    throw UsageError(fmt::format("{} exists and holds no {}", file.string(), kind),
                     "name another file, or remove that one yourself: headfold does not overwrite foreign files");
}

}  // namespace headfold::jobs
