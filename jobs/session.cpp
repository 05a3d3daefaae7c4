#include "session.h"

#include <ATen/Parallel.h>
#include <headfold/base/events.h>
#include <headfold/base/files.h>
#include <headfold/base/hash.h>
#include <headfold/base/log.h>
#include <headfold/base/table.h>
#include <headfold/base/version.h>
#include <headfold/comm/checks.h>
#include <headfold/device/device.h>
#include <headfold/device/gpu.h>
#include <headfold/model/compute.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <map>
#include <set>
#include <thread>

namespace headfold::jobs {
namespace {

using SessionClock = std::chrono::steady_clock;

/// What ranks told each other in meet(), by rank.
struct RankFacts {
  std::string host, machine, cores;
  std::vector<std::string> gpus;
  int process = 0;
};
std::vector<RankFacts> rank_facts;

/// A job at hand. Jobs nest: `run` is one around others.
struct Session {
  Session* outer = nullptr;
  bool open = false;  ///< its options are known
  std::filesystem::path log_folder;
  bool verbose = false;
  EventStream events;
  SessionClock::time_point start = SessionClock::now();
  MovedBytes moved = moved_bytes();
};
/// From the outermost to the one at hand. They outlive what a job throws: fail() says how long the job had run.
std::vector<std::unique_ptr<Session>> sessions;
Session* current_session = nullptr;

std::size_t host_count() {
  std::set<std::string> hosts;
  for (const RankFacts& facts : rank_facts) hosts.insert(facts.host);
  return std::max<std::size_t>(1, hosts.size());
}

/// Logs and events are those of `session` again.
void restore(const Context& context, const Session* session) {
  if (session == nullptr || !session->open) return;
  start_logging(context.world.rank(), context.world.size(), session->log_folder, session->verbose);
  set_event_stream(session->events);
}

/// The summary: every rank's memory and traffic, on rank 0. Collective.
void summarise(const Context& context, const Session& session, ExitCode code) {
  const comm::Communicator& world = context.world;
  world.barrier("end of job");
  if (!session.open || (session.events.file.empty() && session.log_folder.empty())) return;
  const double seconds = std::chrono::duration<double>(SessionClock::now() - session.start).count();
  const MovedBytes moved = moved_bytes();
  OrderedJson own;
  own["rank"] = world.rank();
  own["host"] = host_name();
  own["peak_resident_bytes"] = peak_resident_bytes();
  // libtorch keeps what it once took, so that what is in use at the end is the most there was.
  if (!model::compute().on_host()) own["device_bytes"] = device::gpu_memory(model::compute().device.index()).used();
  own["read_bytes"] = moved.read - session.moved.read;
  own["written_bytes"] = moved.written - session.moved.written;
  own["storage_read_bytes"] = moved.storage_read - session.moved.storage_read;
  own["storage_written_bytes"] = moved.storage_written - session.moved.storage_written;
  const std::vector<std::string> all = world.all_gather(own.dump());
  if (!world.root()) return;
  OrderedJson event;
  event["seconds"] = seconds;
  event["ranks"] = world.size();
  event["hosts"] = host_count();
  event["node_hours"] = static_cast<double>(host_count()) * seconds / 3600;
  event["exit_code"] = static_cast<int>(code);
  event["per_rank"] = OrderedJson::array();
  std::map<std::string, std::uint64_t> most, sum;
  for (const std::string& text : all) {
    OrderedJson one = OrderedJson::parse(text);
    for (const auto& [key, value] : one.items()) {
      if (!key.ends_with("_bytes")) continue;
      most[key] = std::max(most[key], value.get<std::uint64_t>());
      sum[key] += value.get<std::uint64_t>();
    }
    event["per_rank"].push_back(std::move(one));
  }
  event["peak_resident_bytes"] = most["peak_resident_bytes"];
  if (most.contains("device_bytes")) event["device_bytes"] = most["device_bytes"];
  emit_event("end", event);
  const auto bytes = [](std::uint64_t count) { return human_bytes(static_cast<double>(count)); };
  spdlog::info("{}: {} on {} rank(s) of {} host(s), {:.3g} node hours; at most {} per rank; {} read, {} written",
               session.events.stage, human_seconds(seconds), world.size(), host_count(),
               event["node_hours"].get<double>(), bytes(most["peak_resident_bytes"]), bytes(sum["read_bytes"]),
               bytes(sum["written_bytes"]));
}

/// Files that every rank reads, by the options that name them.
std::vector<std::filesystem::path> shared_inputs(const po::variables_map& values) {
  std::vector<std::filesystem::path> paths;
  for (const char* name : {"model", "original", "reference", "teacher", "calibration", "plan", "config"}) {
    if (values.count(name) == 0) continue;
    const boost::any& value = values[name].value();
    if (const auto* text = boost::any_cast<std::string>(&value); text != nullptr && !text->empty())
      paths.emplace_back(*text);
  }
  for (const char* name : {"data", "validation", "refit-data", "probe-data", "task-file"}) {
    if (values.count(name) == 0) continue;
    const boost::any& value = values[name].value();
    if (const auto* texts = boost::any_cast<std::vector<std::string>>(&value))
      paths.insert(paths.end(), texts->begin(), texts->end());
  }
  return paths;
}

/// Whether a file is empty or begins with an event.
bool holds_events(const std::filesystem::path& file) {
  std::ifstream stream(file);
  std::string line;
  if (!std::getline(stream, line)) return true;
  return line.starts_with("{\"time\":") && line.find("\"event\":") != std::string::npos;
}

std::string rank_map(const std::vector<int>& gpus) {
  constexpr std::size_t kMost = 128;
  Table table({"rank", "host", "local rank", "process", "cores", "threads", "GPU"});
  std::map<std::string, int> placed;
  for (std::size_t rank = 0; rank < std::min(kMost, rank_facts.size()); ++rank) {
    const RankFacts& facts = rank_facts[rank];
    const int gpu = gpus[rank];
    table.add({std::to_string(rank), facts.host, std::to_string(placed[facts.host]++), std::to_string(facts.process),
               facts.cores, std::to_string(at::get_num_threads()),
               gpu < 0 ? "-" : fmt::format("{} ({})", gpu, facts.gpus[static_cast<std::size_t>(gpu)])});
  }
  std::string text = table.text();
  if (rank_facts.size() > kMost) text += fmt::format("and {} ranks more\n", rank_facts.size() - kMost);
  return text;
}

bool may_share_gpus(const po::variables_map& values) {
  const char* allowed = std::getenv("HEADFOLD_SHARE_GPUS");
  return values["share-gpus"].as<bool>() || (allowed != nullptr && std::string(allowed) == "1");
}

}  // namespace

void meet(const Context& context) {
  const comm::Communicator& world = context.world;
  char machine[256] = {};
  if (::gethostname(machine, sizeof(machine) - 1) != 0) machine[0] = '\0';
  Json own;
  own["host"] = host_name();
  own["machine"] = machine;
  own["cores"] = device::cores_text();
  own["process"] = ::getpid();
  own["gpus"] = world.size() > 1 ? device::visible_gpus() : std::vector<std::string>();
  if (world.size() > 1) world.require_equal(build_identity(), "the build of headfold");
  rank_facts.clear();
  for (const std::string& text : world.all_gather(own.dump(-1, ' ', false, Json::error_handler_t::replace))) {
    const Json one = Json::parse(text);
    rank_facts.push_back({one.at("host").get<std::string>(), one.at("machine").get<std::string>(),
                          one.at("cores").get<std::string>(), one.at("gpus").get<std::vector<std::string>>(),
                          one.at("process").get<int>()});
  }
}

void open_session(const Context& context, const std::string& job, const po::variables_map& values,
                  const std::vector<std::string>& arguments) {
  const comm::Communicator& world = context.world;
  if (current_session == nullptr) throw InternalError("a job's options are read outside run_job()");
  Session& session = *current_session;
  const auto text = [&](const char* name) {
    return values.count(name) > 0 ? values[name].as<std::string>() : std::string();
  };
  session.log_folder = text("log-dir");
  session.verbose = values.count("verbose") > 0;
  session.events = {text("events"), text("stage-name").empty() ? job : text("stage-name"), job, world.root()};
  start_logging(world.rank(), world.size(), session.log_folder, session.verbose);
  if (world.size() > 1) world.require_equal(command_line(job, arguments), "the command line");
  world.on_root([&] {
    // A terminal or a pipe takes events as well.
    if (const auto& file = session.events.file;
        !file.empty() && (!std::filesystem::exists(file) || std::filesystem::is_regular_file(file)))
      check_output_file(values, file, "events", holds_events);
    for (const char* name : {"out", "json"})
      if (const auto* file = values.count(name) > 0 ? boost::any_cast<std::string>(&values[name].value()) : nullptr;
          file != nullptr && !file->empty() && !std::filesystem::is_directory(*file))
        check_output_place(values, *file);
    set_event_stream(session.events);
  });
  if (!world.root()) set_event_stream(session.events);
  session.open = true;
  require_same_files(world, shared_inputs(values));
  // Looking for GPUs starts the driver: not for nothing.
  const std::string wanted = text("device");
  const bool chooses = values.count("device") > 0;
  const bool may_use_gpu = wanted.rfind("cpu", 0) != 0;
  if (world.size() == 1 && chooses && may_use_gpu && rank_facts[0].gpus.empty())
    rank_facts[0].gpus = device::visible_gpus();
  std::vector<device::RankGpus> seen;
  seen.reserve(rank_facts.size());
  for (const RankFacts& facts : rank_facts)
    seen.push_back({facts.machine, may_use_gpu ? facts.gpus : std::vector<std::string>()});
  // A GPU named by its number is everybody's own choice.
  const std::vector<int> gpus = device::choose_gpus(seen, may_share_gpus(values) || wanted.rfind("cuda:", 0) == 0);
  const int own_gpu = gpus.at(static_cast<std::size_t>(world.rank()));
  const model::Compute compute = chooses ? model::parse_device(wanted, own_gpu) : model::Compute();
  model::set_compute(compute);
  device::use_gpu(!chooses ? own_gpu : compute.on_host() ? -1 : compute.device.index());
  device::use_threads(world, values["threads"].as<int>());
  if (world.root() && session.outer == nullptr) device::warn_about_slow_blas();
  if (world.root() && session.outer == nullptr && world.size() > 1) spdlog::info("ranks:\n{}", rank_map(gpus));
  OrderedJson start;
  start["command"] = command_line(job, arguments);
  start["ranks"] = world.size();
  start["hosts"] = host_count();
  start["threads_per_rank"] = at::get_num_threads();
  start["device"] = model::device_text(compute);
  start["headfold_version"] = version();
  if (const char* id = std::getenv("SLURM_JOB_ID")) start["slurm_job"] = id;
  if (const char* restarts = std::getenv("SLURM_RESTART_COUNT")) start["restarts"] = std::atoi(restarts);
  emit_event("start", start);
}

void log_grid(const comm::Grid& grid, const std::vector<comm::LayerRange>& stages) {
  constexpr std::size_t kMost = 128;
  if (!grid.world.root() || grid.world.size() == 1) return;
  Table table({"rank", "host", "replica", "stage", "layers"});
  for (std::size_t rank = 0; rank < std::min(kMost, rank_facts.size()); ++rank) {
    const std::size_t stage = rank % static_cast<std::size_t>(grid.stages);
    table.add({std::to_string(rank), rank_facts[rank].host,
               std::to_string(rank / static_cast<std::size_t>(grid.stages)), std::to_string(stage),
               fmt::format("{}-{}", stages[stage].begin, stages[stage].end - 1)});
  }
  spdlog::info("work of the ranks:\n{}", table.text());
}

void run_job(const Context& context, const Job& job, const std::vector<std::string>& arguments) {
  Session& session = *sessions.emplace_back(std::make_unique<Session>());
  session.outer = current_session;
  if (session.outer != nullptr) reset_peak_resident_bytes();
  current_session = &session;
  const auto leave = [&] {
    current_session = session.outer;
    sessions.pop_back();
    restore(context, current_session);
  };
  try {
    job.run(context, arguments);
    summarise(context, session, ExitCode::done);
  } catch (const HelpShown&) {
    leave();
    throw;
  } catch (const Stopped& stopped) {
    emit_event("stop", {{"reason", stopped.what()}});
    summarise(context, session, ExitCode::stopped);
    leave();
    throw;
  }
  leave();
}

void fail(const comm::Environment& environment, const std::string& job, const std::exception& error, bool at_once) {
  const comm::Communicator& world = environment.world();
  if (!world.root() && !at_once) std::this_thread::sleep_for(std::chrono::milliseconds(700));
  const std::string where = world.size() > 1 ? fmt::format(" [rank {} on {}]", world.rank(), host_name()) : "";
  spdlog::error("{}{}: {}", job, where, describe(error));
  spdlog::default_logger()->flush();
  const auto code = static_cast<int>(exit_code_of(error));
  OrderedJson event;
  event["rank"] = world.rank();
  event["host"] = host_name();
  event["exit_code"] = code;
  event["error"] = describe(error);
  if (const Session* session = current_session; session != nullptr) {
    const double seconds = std::chrono::duration<double>(SessionClock::now() - session->start).count();
    event["seconds"] = seconds;
    event["node_hours"] = static_cast<double>(host_count()) * seconds / 3600;
  }
  emit_event("failure", event, true);
  environment.abort(code);
}

}  // namespace headfold::jobs
