#include <headfold/base/error.h>
#include <headfold/base/hash.h>
#include <headfold/base/json.h>
#include <headfold/base/log.h>
#include <headfold/comm/checks.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <set>

namespace headfold::comm {
namespace {

namespace fs = std::filesystem;

constexpr const char* kAbsent = "not there";

using Identities = std::map<std::string, std::string>;

void add_identities(const fs::path& path, Identities& identities) {
  std::error_code code;
  if (!fs::is_directory(path, code)) {
    identities[path.string()] = file_identity(path);
    return;
  }
  for (const char* name : {"config.json", "headfold.json", "model.safetensors.index.json", "tokenizer.model",
                           "tokenizer.json", "tokenizer_config.json"})
    if (fs::exists(path / name, code)) identities[(path / name).string()] = file_identity(path / name);
  for (auto entry = fs::directory_iterator(path, code); !code && entry != fs::directory_iterator();
       entry.increment(code)) {
    if (entry->path().extension() == ".safetensors") identities[entry->path().string()] = file_identity(entry->path());
  }
}

}  // namespace

std::string file_identity(const fs::path& path) {
  // Weights of one shape have one size, and most of what tells two models apart may lie in a few matrices: parts are
  // closer to one another than a matrix of a large model is long.
  constexpr std::uintmax_t kWhole = std::uintmax_t{64} << 20, kPart = std::uintmax_t{1} << 16;
  constexpr std::uintmax_t kSample = 4096, kStep = std::uintmax_t{8} << 20, kMostSamples = 1024;
  std::error_code code;
  if (!fs::is_regular_file(path, code)) return kAbsent;
  const std::uintmax_t size = fs::file_size(path, code);
  std::ifstream file(path, std::ios::binary);
  if (code || !file) return kAbsent;
  Sha256 hash;
  std::string part;
  const auto add = [&](std::uintmax_t begin, std::uintmax_t bytes) {
    part.resize(static_cast<std::size_t>(bytes));
    file.seekg(static_cast<std::streamoff>(begin));
    file.read(part.data(), static_cast<std::streamsize>(bytes));
    hash.update(part);
  };
  if (size <= kWhole) {
    for (std::uintmax_t begin = 0; begin < size && file; begin += kPart) add(begin, std::min(kPart, size - begin));
  } else {
    add(0, kPart);
    const std::uintmax_t step = std::max(kStep, size / kMostSamples);
    for (std::uintmax_t begin = step; begin < size - kPart && file; begin += step) add(begin, kSample);
    add(size - kPart, kPart);
  }
  if (!file) return kAbsent;
  return fmt::format("{} bytes, {}", size, hash.hex().substr(0, 16));
}

void require_same_files(const Communicator& world, const std::vector<fs::path>& paths) {
  if (world.size() == 1 || paths.empty()) return;
  Identities own;
  for (const fs::path& path : paths) add_identities(path, own);
  Json message;
  message["host"] = host_name();
  message["files"] = own;
  const std::vector<std::string> texts = world.all_gather(message.dump(-1, ' ', false, Json::error_handler_t::replace));
  std::vector<Identities> all;
  std::vector<std::string> hosts;
  std::set<std::string> names;
  for (const std::string& text : texts) {
    const Json one = Json::parse(text);
    all.push_back(one.at("files").get<Identities>());
    hosts.push_back(one.at("host").get<std::string>());
    for (const auto& [name, identity] : all.back()) names.insert(name);
  }
  for (const std::string& name : names) {
    // Who sees what, by what is seen.
    std::map<std::string, std::vector<std::size_t>> seen;
    for (std::size_t r = 0; r < all.size(); ++r) {
      const auto found = all[r].find(name);
      seen[found == all[r].end() ? kAbsent : found->second].push_back(r);
    }
    if (seen.size() == 1) continue;
    std::string who;
    for (const auto& [identity, ranks] : seen) {
      constexpr std::size_t kMost = 4;
      if (!who.empty()) who += "; ";
      for (std::size_t i = 0; i < std::min(kMost, ranks.size()); ++i)
        who += fmt::format("{}rank {} on {}", i == 0 ? "" : ", ", ranks[i], hosts[ranks[i]]);
      if (ranks.size() > kMost) who += fmt::format(" and {} more", ranks.size() - kMost);
      who += ": " + identity;
    }
    throw InputError(fmt::format("{} is not the same file for all ranks: {}", name, who),
                     "put it on a file system that all nodes share, or the same copy on every node");
  }
}

}  // namespace headfold::comm
