#include "run_flags.h"

#include <headfold/base/files.h>
#include <headfold/base/hash.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <chrono>

namespace headfold::jobs {

namespace {

constexpr std::string_view kFlagFormat = "headfold-finished";

void add_file(Sha256& hash, const fs::path& path) {
  constexpr std::uint64_t kWhole = std::uint64_t{16} << 20, kSample = std::uint64_t{64} << 10, kSamples = 64;
  const MappedFile file(path);
  const auto bytes = file.bytes();
  hash.update(fmt::format("{}|", bytes.size()));
  if (bytes.size() <= kWhole) {
    hash.update(bytes);
    return;
  }
  const std::uint64_t step = (bytes.size() - kSample) / (kSamples - 1);
  for (std::uint64_t i = 0; i < kSamples; ++i) hash.update(bytes.subspan(i * step, kSample));
}

}  // namespace

std::string input_fingerprint(const fs::path& path) {
  std::error_code code;
  Sha256 hash;
  if (fs::is_regular_file(path, code)) {
    add_file(hash, path);
    return hash.hex();
  }
  if (!fs::is_directory(path, code)) return "absent";
  std::vector<fs::path> files;
  for (const auto& entry : fs::recursive_directory_iterator(path, fs::directory_options::skip_permission_denied, code))
    if (entry.is_regular_file(code)) files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  for (const fs::path& file : files) {
    hash.update(fmt::format("{}|", file.lexically_relative(path).generic_string()));
    add_file(hash, file);
  }
  return hash.hex();
}

void remove_temporaries(const fs::path& output) {
  const auto temporary = [](const std::string& name) {
    if (!name.ends_with(".tmp")) return false;
    const std::string stem = name.substr(0, name.size() - 4);
    const std::size_t dot = stem.rfind('.');
    return dot != std::string::npos && dot + 1 < stem.size() &&
           stem.find_first_not_of("0123456789", dot + 1) == std::string::npos;
  };
  std::vector<fs::path> old;
  std::error_code code;
  if (fs::is_directory(output, code)) {
    for (const auto& entry : fs::recursive_directory_iterator(output, code))
      if (temporary(entry.path().filename().string())) old.push_back(entry.path());
  } else {
    const std::string prefix = output.filename().string() + ".";
    for (const auto& entry : fs::directory_iterator(output.parent_path(), code))
      if (const std::string name = entry.path().filename().string(); name.starts_with(prefix) && temporary(name))
        old.push_back(entry.path());
  }
  for (const fs::path& path : old) fs::remove(path, code);
}

std::vector<fs::path> results_below(const fs::path& folder) {
  std::vector<fs::path> found;
  std::error_code code;
  for (const auto& entry : fs::recursive_directory_iterator(folder, code)) {
    const std::string name = entry.path().filename().string();
    if ((name.starts_with("results_") && name.ends_with(".json")) ||
        (name.starts_with("samples_") && name.ends_with(".jsonl")))
      found.push_back(entry.path());
  }
  return found;
}

RunFlags::RunFlags(const RunPlan& plan) : folder_(plan.folder / "finished") {
  std::map<fs::path, std::string> fingerprints;
  for (const RunStage& stage : plan.stages)
    for (std::size_t i = 0; i < stage.elements.size(); ++i) {
      Known known;
      known.element = &stage.elements[i];
      std::string all = known.element->described;
      for (const fs::path& input : known.element->inputs) {
        const auto [found, fresh] = fingerprints.try_emplace(input);
        if (fresh) found->second = input_fingerprint(input);
        known.inputs[input.string()] = found->second;
        all += "\n" + found->second;
      }
      // What it reads of other elements is as they are described: their results follow from that.
      for (const std::string& id : known.element->upstream) all += "\n" + known_.at(id).identity;
      known.identity = sha256_hex(all);
      const std::string id = stage.id(i);
      const fs::path flag = folder_ / id;
      std::error_code code;
      if (fs::exists(flag, code)) {
        try {
          const Json json = read_json(flag);
          if (optional<std::string>(json, "format", "", flag.string()) == std::string(kFlagFormat))
            known.flag = required<std::string>(json, "identity", flag.string());
        } catch (const Error& error) {
          spdlog::warn("{}: {} is made again", error.what(), id);
        }
      }
      known_[id] = std::move(known);
    }
}

bool RunFlags::result_is_there(const RunElement& element) const {
  std::error_code code;
  if (element.evidence.empty()) {
    const std::vector<fs::path> results = results_below(element.output);
    return std::any_of(results.begin(), results.end(),
                       [](const fs::path& path) { return path.extension() == ".json"; });
  }
  return std::all_of(element.evidence.begin(), element.evidence.end(),
                     [&](const fs::path& path) { return fs::exists(path, code); });
}

bool RunFlags::finished(const std::string& id) const {
  const Known& known = known_.at(id);
  return known.flag == known.identity && result_is_there(*known.element);
}

bool RunFlags::stale(const std::string& id) const {
  const Known& known = known_.at(id);
  return known.flag && known.flag != known.identity;
}

std::vector<std::string> RunFlags::missing(const std::string& id) const {
  std::vector<std::string> open;
  for (const std::string& other : known_.at(id).element->upstream)
    if (!finished(other)) open.push_back(other);
  return open;
}

void RunFlags::finish(const std::string& id, double seconds) {
  Known& known = known_.at(id);
  OrderedJson json;
  json["format"] = kFlagFormat;
  json["format_version"] = 1;
  json["name"] = known.element->name;
  json["identity"] = known.identity;
  json["described"] = known.element->described;
  json["inputs"] = known.inputs;
  json["upstream"] = known.element->upstream;
  json["output"] = known.element->output.string();
  json["date"] =
      std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
  json["seconds"] = seconds;
  write_json(folder_ / id, json);
  known.flag = known.identity;
}

}  // namespace headfold::jobs
