#include <headfold/base/error.h>
#include <headfold/base/hash.h>
#include <headfold/base/log.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/checkpoint/reader.h>

#include <algorithm>
#include <map>
#include <set>

#include "file_names.h"

namespace headfold::checkpoint {
namespace {

bool is_file(const fs::path& path) {
  std::error_code code;
  return fs::is_regular_file(path, code);
}

/// Buffers that old LLaMA checkpoints carry along; every loader recomputes them.
bool ignorable(const std::string& name) {
  return name.ends_with("rotary_emb.inv_freq");
}

/// A shard must be a plain file name: the index comes from outside and must not lead anywhere else.
void check_shard_name(const std::string& index, const std::string& tensor, const std::string& shard) {
  const bool plain = !shard.empty() && shard.find_first_of("/\\") == std::string::npos &&
                     shard.find('\0') == std::string::npos && shard.ends_with(".safetensors") && shard.front() != '.';
  if (!plain)
    throw CorruptFile(index,
                      fmt::format("tensor {} is said to be in {}, which is no plain name of a .safetensors file",
                                  Json(tensor).dump(), Json(shard).dump()),
                      "shards must stand beside their index; a path may be an attempt to read other files");
}

/// weight_map of an index file: tensor -> shard.
std::map<std::string, std::string> read_index(const fs::path& path) {
  const std::string file = path.string();
  const Json json = read_json(path);
  const auto map = json.is_object() ? json.find("weight_map") : json.end();
  if (map == json.end() || !map->is_object()) throw CorruptFile(file, "has no object \"weight_map\"");
  std::map<std::string, std::string> shards;
  for (const auto& [tensor, shard] : map->items()) {
    if (!shard.is_string())
      throw CorruptFile(file, fmt::format("the shard of tensor {} is no text", Json(tensor).dump()));
    check_shard_name(file, tensor, shard.get<std::string>());
    shards.emplace(tensor, shard.get<std::string>());
  }
  if (shards.empty()) throw CorruptFile(file, "\"weight_map\" is empty");
  return shards;
}

}  // namespace

struct Reader::State {
  std::vector<SafetensorsFile> shards;         ///< by file name
  std::map<std::string, std::size_t> tensors;  ///< stored name -> shard, ignorable ones included
  std::set<std::string> unused;                ///< stored names that config.json has no place for
  std::string config_text;

  const SafetensorsFile& shard(const std::string& stored) const { return shards[tensors.at(stored)]; }
};

namespace {
/// A config.json may not tell of them: some models have the tensors under a plain model_type.
void refuse_head_norms(const Reader& reader) {
  for (const std::string& name : reader.names())
    if (name.ends_with("self_attn.q_norm.weight") || name.ends_with("self_attn.k_norm.weight"))
      throw InputError(fmt::format("{}: tensor {}: the model normalises queries and keys per head, which headfold does "
                                   "not support",
                                   reader.folder().string(), name),
                       "a norm between projection and score does not commute with a fold of the projection");
}
}  // namespace

Reader::Reader(const std::filesystem::path& folder) : folder_(folder), state_(std::make_shared<State>()) {
  std::error_code code;
  if (!fs::is_directory(folder, code))
    throw IoError(folder.string(), fs::exists(folder, code) ? "is no folder" : "does not exist",
                  "give the folder of a Hugging Face model");
  config_ = read_config(folder);
  state_->config_text = read_file(folder / "config.json");
  State& state = *state_;
  if (is_file(folder / kSingle)) {
    state.shards.emplace_back(folder / kSingle);
    for (const auto& [name, info] : state.shards[0].tensors()) state.tensors.emplace(name, 0);
    finish();
    return;
  }
  const fs::path index_path = folder / kIndex;
  if (!is_file(index_path)) {
    if (is_file(folder / "pytorch_model.bin") || is_file(folder / "pytorch_model.bin.index.json"))
      throw InputError(fmt::format("{}: holds pytorch_model.bin but no safetensors", folder.string()),
                       "convert the checkpoint to safetensors first");
    throw IoError(folder.string(), fmt::format("holds neither {} nor {}", kSingle, kIndex),
                  "is the download complete?");
  }
  const std::map<std::string, std::string> index = read_index(index_path);
  std::map<std::string, std::size_t> shard_number;
  for (const auto& [tensor, shard] : index) shard_number.emplace(shard, 0);
  for (auto& [shard, number] : shard_number) {
    if (!is_file(folder / shard)) {
      const auto first =
          std::find_if(index.begin(), index.end(), [&name = shard](const auto& entry) { return entry.second == name; });
      throw IoError((folder / shard).string(),
                    fmt::format("does not exist, but {} expects tensor {} there", kIndex, Json(first->first).dump()),
                    "is the download complete?");
    }
    number = state.shards.size();
    state.shards.emplace_back(folder / shard);
  }
  for (const auto& [tensor, shard] : index) {
    const std::size_t number = shard_number.at(shard);
    if (!state.shards[number].has(tensor)) {
      if (ignorable(tensor)) continue;
      throw CorruptFile(index_path.string(),
                        fmt::format("expects tensor {} in {}, which does not hold it", Json(tensor).dump(), shard),
                        "index and shards are of different checkpoints");
    }
    state.tensors.emplace(tensor, number);
  }
  for (const SafetensorsFile& shard : state.shards) {
    const std::string name = shard.map().path().filename().string();
    for (const auto& [tensor, info] : shard.tensors()) {
      const auto entry = index.find(tensor);
      if (entry == index.end() ? !ignorable(tensor) : entry->second != name)
        throw CorruptFile(
            shard.map().path().string(),
            fmt::format("holds tensor {}, which {} {}", Json(tensor).dump(), kIndex,
                        entry == index.end() ? std::string("does not name") : "expects in " + entry->second),
            "index and shards are of different checkpoints");
    }
  }
  finish();
}

void Reader::finish() {
  refuse_head_norms(*this);
  // A file that promises more layers than it has tensors is refused where they are looked for.
  if (config_.layers > static_cast<std::int64_t>(state_->tensors.size())) return;
  std::set<std::string> used = {resolve("lm_head.weight")};  // a tied table may be stored twice
  for (const TensorShape& tensor : model_tensors(config_)) used.insert(resolve(tensor.name));
  for (const std::string& name : names())
    if (!used.contains(name)) state_->unused.insert(name);
  if (!state_->unused.empty())
    spdlog::warn("{}: {} tensors that config.json has no place for are left out, first {}", folder_.string(),
                 state_->unused.size(), *state_->unused.begin());
}

std::vector<std::string> Reader::names() const {
  std::vector<std::string> all;
  for (const auto& [name, shard] : state_->tensors)
    if (!ignorable(name) && !state_->unused.contains(name)) all.push_back(name);
  return all;
}

std::string Reader::resolve(const std::string& name) const {
  const auto& tensors = state_->tensors;
  const std::string prefix = tensor_prefix(config_.family);
  const auto plain = [&](const std::string& wanted) -> std::string {
    if (tensors.contains(wanted)) return wanted;
    const std::string other = wanted.starts_with(prefix) ? wanted.substr(prefix.size()) : prefix + wanted;
    return tensors.contains(other) ? other : std::string();
  };
  std::string found = plain(name);
  if (!found.empty() || !config_.tied_embeddings) return found;
  const std::string table = config_.family == Family::llama ? "embed_tokens.weight" : "word_embeddings.weight";
  if (name == "lm_head.weight") return plain(prefix + table);
  if (name == table || name == prefix + table) return plain("lm_head.weight");
  return {};
}

bool Reader::has(const std::string& name) const {
  return !resolve(name).empty();
}

namespace {
std::string stored_name(const Reader& reader, const std::string& name) {
  std::string stored = reader.resolve(name);
  if (stored.empty())
    throw InputError(fmt::format("{}: there is no tensor {}", reader.folder().string(),
                                 Json(name).dump(-1, ' ', false, Json::error_handler_t::replace)),
                     "the checkpoint does not hold what its config.json promises");
  return stored;
}
}  // namespace

const TensorInfo& Reader::info(const std::string& name) const {
  const std::string stored = stored_name(*this, name);
  return state_->shard(stored).info(stored);
}

const std::filesystem::path& Reader::file_of(const std::string& name) const {
  return state_->shard(stored_name(*this, name)).map().path();
}

std::vector<std::filesystem::path> Reader::files() const {
  std::vector<std::filesystem::path> all;
  for (const SafetensorsFile& shard : state_->shards) all.push_back(shard.map().path());
  return all;
}

at::Tensor Reader::view(const std::string& name) const {
  const std::string stored = stored_name(*this, name);
  return state_->shard(stored).view(stored);
}

at::Tensor Reader::weight(const std::string& name, const std::vector<std::int64_t>& shape) const {
  const std::string stored = stored_name(*this, name);
  const SafetensorsFile& shard = state_->shard(stored);
  const TensorInfo& where = shard.info(stored);
  if (where.shape != shape)
    throw InputError(fmt::format("{}: tensor {} has shape {}, expected {}", shard.map().path().string(), stored,
                                 shape_text(where.shape), shape_text(shape)),
                     fmt::format("the expected shape follows from {}", config_.file));
  if (where.dtype != "F32" && where.dtype != "F16" && where.dtype != "BF16" && where.dtype != "F64")
    throw InputError(fmt::format("{}: tensor {} has dtype {}, expected F32, F16, BF16 or F64",
                                 shard.map().path().string(), stored, where.dtype),
                     "quantised checkpoints cannot be read; use the original");
  return shard.view(stored);
}

at::Tensor Reader::load(const std::string& name, const std::vector<std::int64_t>& shape, at::ScalarType dtype) const {
  const at::Tensor stored = weight(name, shape).reshape({-1});
  will_need(name);
  at::Tensor copy = at::empty(shape, at::TensorOptions().dtype(dtype));
  // Piece by piece, each piece's pages let go once it is copied: otherwise a large table would be resident twice.
  constexpr std::int64_t kPieceBytes = std::int64_t{32} << 20;
  const SafetensorsFile& shard = state_->shard(stored_name(*this, name));
  const std::uint64_t begin = info(name).begin;
  const auto element = static_cast<std::int64_t>(stored.element_size());
  const std::int64_t piece = kPieceBytes / element;
  const at::Tensor flat = copy.view({-1});
  for (std::int64_t from = 0; from < stored.numel(); from += piece) {
    const std::int64_t to = std::min(stored.numel(), from + piece);
    flat.slice(0, from, to).copy_(stored.slice(0, from, to));
    if (to < stored.numel()) shard.map().done_with(begin, begin + static_cast<std::uint64_t>(to * element));
  }
  return copy;
}

void Reader::will_need(const std::string& name) const {
  const std::string stored = stored_name(*this, name);
  const SafetensorsFile& shard = state_->shard(stored);
  const TensorInfo& where = shard.info(stored);
  shard.map().will_need(where.begin, where.end);
}

void Reader::done_with(const std::string& name) const {
  const std::string stored = stored_name(*this, name);
  const SafetensorsFile& shard = state_->shard(stored);
  const TensorInfo& where = shard.info(stored);
  shard.map().done_with(where.begin, where.end);
}

std::uint64_t Reader::total_bytes() const {
  std::uint64_t total = 0;
  for (const auto& [name, number] : state_->tensors) {
    const TensorInfo& where = state_->shards[number].info(name);
    total += where.end - where.begin;
  }
  return total;
}

std::string Reader::fingerprint() const {
  constexpr std::uint64_t kWhole = std::uint64_t{64} << 20;
  constexpr std::uint64_t kSample = std::uint64_t{64} << 10;
  constexpr std::uint64_t kSamples = 256;
  Sha256 hash;
  hash.update(state_->config_text);
  for (const SafetensorsFile& shard : state_->shards) {
    const auto bytes = shard.map().bytes();
    hash.update(fmt::format("|{}|{}|", shard.map().path().filename().string(), bytes.size()));
    if (bytes.size() <= kWhole) {
      hash.update(bytes);
      continue;
    }
    std::uint64_t header = bytes.size();
    for (const auto& [name, info] : shard.tensors()) header = std::min(header, info.begin);
    hash.update(bytes.first(header));
    const std::uint64_t step = (bytes.size() - header - kSample) / (kSamples - 1);
    for (std::uint64_t i = 0; i < kSamples; ++i) {
      hash.update(bytes.subspan(header + i * step, kSample));
      // The kernel maps far more around a page that is touched than the page.
      shard.map().done_with(0, bytes.size());
    }
  }
  return hash.hex();
}

}  // namespace headfold::checkpoint
