#include <ATen/Parallel.h>
#include <headfold/base/files.h>
#include <headfold/base/version.h>
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

po::variables_map parse(const Context& context, const std::string& job, const std::string& usage,
                        const po::options_description& own, const std::vector<std::string>& arguments,
                        const std::string& positional) {
  po::options_description all(120, 60);
  all.add(own).add(common_options());
  po::variables_map values;
  try {
    po::positional_options_description bare;
    if (!positional.empty()) bare.add(positional.c_str(), -1);
    // Abbreviations are off: a script must not change its meaning when an option is added.
    const int style = po::command_line_style::default_style & ~po::command_line_style::allow_guessing;
    po::store(po::command_line_parser(arguments).options(all).positional(bare).style(style).run(), values);
    if (values.count("help") > 0) {
      if (context.world.root()) std::cout << "usage: " << usage << "\n\n" << all;
      throw HelpShown{};
    }
    po::notify(values);
  } catch (const po::error& error) {
    throw UsageError(error.what(), fmt::format("headfold {} --help", job));
  }
  const auto threads = values["threads"].as<int>();
  const int most = std::max(64, 4 * device::usable_cores());
  if (threads < 0 || threads > most)
    throw UsageError(fmt::format("--threads {}: must be between 0 and {} here", threads, most));
  const auto timeout = values["comm-timeout"].as<double>();
  if (!std::isfinite(timeout) || timeout < 0)
    throw UsageError(fmt::format("--comm-timeout {}: seconds, 0 or more", timeout), "0 waits for ever");
  comm::set_timeout_seconds(timeout);
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

std::string command_line(const std::string& job, const std::vector<std::string>& arguments) {
  std::string text = "headfold " + job;
  for (const std::string& argument : arguments) {
    const bool plain = !argument.empty() && argument.find_first_of(" \t\n\"'$&|;<>*?()[]{}\\") == std::string::npos;
    text += plain ? " " + argument : " '" + argument + "'";
  }
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

void check_output_folder(const std::filesystem::path& folder) {
  namespace fs = std::filesystem;
  if (!fs::exists(folder)) return;
  if (!fs::is_directory(folder))
    throw UsageError(fmt::format("{} exists and is not a folder", folder.string()), "choose another --out");
  if (fs::is_empty(folder) || fs::exists(folder / "headfold.json") ||
      fs::exists(folder / checkpoint::kUnfinishedMarker))
    return;
  throw UsageError(fmt::format("{} is not empty and was not written by headfold", folder.string()),
                   "choose another --out, or empty that folder yourself: headfold does not overwrite foreign files");
}

}  // namespace headfold::jobs
