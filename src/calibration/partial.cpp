#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/base/hash.h>
#include <headfold/base/json.h>
#include <headfold/base/log.h>
#include <headfold/calibration/partial.h>
#include <headfold/checkpoint/safetensors.h>

#include <algorithm>

namespace headfold::calibration {
namespace {

constexpr const char* kPartialFormat = "headfold-calibration-partial";
constexpr std::int64_t kPartialVersion = 1;
constexpr const char* kState = "state.json";

std::string generation_prefix(std::int64_t generation) {
  return fmt::format("sums-{:06}-", generation);
}

/// Of all tensors of one layer, in the order of their names.
std::string layer_checksum(const SumTensors& tensors) {
  std::string text;
  for (const auto& [name, tensor] : tensors)
    text += fmt::format("{} {} {:.0f};", name, tensor.numel(), value_checksum(tensor));
  return sha256_hex(text);
}

/// Throws on every rank what went wrong on any.
void agree(const comm::Communicator& world, const fs::path& folder, const std::string& own_failure) {
  const std::vector<std::string> all = world.all_gather(own_failure);
  for (std::size_t rank = 0; rank < all.size(); ++rank)
    if (!all[rank].empty())
      throw IoError(folder.string(), fmt::format("sums of rank {}: {}", rank, all[rank]),
                    "free some space or choose another --out");
}

}  // namespace

PartialSums::PartialSums(comm::Grid grid, fs::path folder, const std::string& identity)
    : grid_(std::move(grid)), folder_(std::move(folder)), identity_(sha256_hex(identity)) {}

void PartialSums::add(const Part& part, const std::vector<std::unique_ptr<LayerAccumulator>>& layers,
                      std::int64_t first) const {
  const fs::path path = folder_ / part.file;
  const checkpoint::SafetensorsFile file(path);
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const std::int64_t layer = first + static_cast<std::int64_t>(i);
    if (layer < part.begin || layer >= part.end) continue;
    const std::string prefix = fmt::format("layer.{}.", layer);
    SumTensors sums;
    for (const auto& [name, info] : file.tensors())
      if (name.starts_with(prefix)) {
        if (info.dtype != "F64")
          throw CorruptFile(path.string(), fmt::format("{} is {}, expected F64", name, info.dtype));
        sums[name.substr(prefix.size())] = file.view(name);
      }
    if (layer_checksum(sums) != part.checksums.at(static_cast<std::size_t>(layer - part.begin)))
      throw CorruptFile(path.string(), fmt::format("the sums of layer {} are not those that were saved", layer));
    try {
      layers[i]->add(sums);
    } catch (const InputError& error) {
      throw CorruptFile(path.string(), fmt::format("layer {}: {}", layer, error.what()));
    }
  }
}

std::int64_t PartialSums::restore(const std::vector<std::unique_ptr<LayerAccumulator>>& layers, std::int64_t first) {
  const comm::Communicator& world = grid_.world;
  std::string text;
  world.on_root([&] {
    std::error_code code;
    const fs::path file = folder_ / kState;
    if (!fs::exists(file, code)) return;
    try {
      const Json json = read_json(file);
      if (required<std::string>(json, "format", file.string()) != kPartialFormat ||
          required<std::int64_t>(json, "format_version", file.string()) != kPartialVersion)
        throw CorruptFile(file.string(), "is of another format or version");
      // Later generations must not be mistaken for this one's files.
      generation_ = std::max<std::int64_t>(0, required<std::int64_t>(json, "generation", file.string()));
      if (required<std::string>(json, "identity", file.string()) != identity_) {
        spdlog::info("{} holds sums of another model, other data or other options: they are not used",
                     folder_.string());
        return;
      }
      text = json.dump();
    } catch (const Error& error) {
      spdlog::warn("saved sums cannot be read, calibration begins anew: {}", error.what());
    }
  });
  world.broadcast(text);
  if (text.empty()) return 0;
  std::int64_t sequences = 0;
  std::string failure;
  try {
    const std::string file = (folder_ / kState).string();
    const Json json = parse_json(text, file);
    sequences = required<std::int64_t>(json, "sequences", file);
    std::vector<Part> parts;
    for (const Json& one : required<std::vector<Json>>(json, "parts", file)) {
      Part part;
      part.file = required<std::string>(one, "file", file);
      part.replica = required<int>(one, "replica", file);
      part.begin = required<std::int64_t>(one, "begin", file);
      part.end = required<std::int64_t>(one, "end", file);
      part.checksums = required<std::vector<std::string>>(one, "checksums", file);
      if (part.file.find('/') != std::string::npos || part.begin < 0 || part.end < part.begin || part.replica < 0 ||
          std::ssize(part.checksums) != part.end - part.begin)
        throw CorruptFile(file, "speaks of a part that cannot be");
      parts.push_back(std::move(part));
    }
    // Old replicas are dealt to the new ones; with as many of them each gets its own back.
    for (const Part& part : parts)
      if (part.replica % grid_.replicas == grid_.replica) add(part, layers, first);
  } catch (const std::exception& error) {
    failure = error.what();
  }
  for (const std::string& one : world.all_gather(failure))
    if (!one.empty()) {
      if (world.root()) spdlog::warn("saved sums cannot be read, calibration begins anew: {}", one);
      for (const auto& layer : layers) layer->clear();
      return 0;
    }
  return sequences;
}

void PartialSums::save(const std::vector<std::unique_ptr<LayerAccumulator>>& layers, std::int64_t first,
                       std::int64_t sequences) {
  const comm::Communicator& world = grid_.world;
  ++generation_;
  world.broadcast(std::as_writable_bytes(std::span(&generation_, 1)));
  Part own;
  own.file = generation_prefix(generation_) + fmt::format("{:05}.safetensors", world.rank());
  own.replica = grid_.replica;
  own.begin = first;
  own.end = first + std::ssize(layers);
  std::string failure;
  try {
    std::map<std::string, at::Tensor> tensors;
    for (std::size_t i = 0; i < layers.size(); ++i) {
      const SumTensors sums = layers[i]->sums();
      own.checksums.push_back(layer_checksum(sums));
      for (const auto& [name, tensor] : sums)
        tensors[fmt::format("layer.{}.{}", first + static_cast<std::int64_t>(i), name)] = tensor;
    }
    checkpoint::write_safetensors(folder_ / own.file, tensors);
  } catch (const std::exception& error) {
    failure = error.what();
  }
  const OrderedJson described = {{"file", own.file},
                                 {"replica", own.replica},
                                 {"begin", own.begin},
                                 {"end", own.end},
                                 {"checksums", own.checksums}};
  const std::vector<std::string> parts = world.all_gather(described.dump());
  try {
    agree(world, folder_, failure);
    world.on_root([&] {
      OrderedJson json;
      json["format"] = kPartialFormat;
      json["format_version"] = kPartialVersion;
      json["identity"] = identity_;
      json["generation"] = generation_;
      json["sequences"] = sequences;
      json["stages"] = grid_.stages;
      json["replicas"] = grid_.replicas;
      json["parts"] = OrderedJson::array();
      for (const std::string& part : parts) json["parts"].push_back(OrderedJson::parse(part));
      write_json(folder_ / kState, json);
      remove_others(generation_);
    });
  } catch (...) {
    std::error_code code;
    fs::remove(folder_ / own.file, code);
    throw;
  }
}

void PartialSums::remove_others(std::int64_t generation) const {
  std::error_code code;
  std::vector<fs::path> old;
  for (const auto& entry : fs::directory_iterator(folder_, code)) {
    const std::string name = entry.path().filename().string();
    if (name != kState && !name.starts_with(generation_prefix(generation))) old.push_back(entry.path());
  }
  for (const fs::path& path : old) fs::remove(path, code);
}

void PartialSums::remove(const fs::path& folder) {
  std::error_code code;
  fs::remove_all(folder, code);
}

}  // namespace headfold::calibration
