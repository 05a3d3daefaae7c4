#include <headfold/base/error.h>
#include <headfold/base/log.h>
#include <headfold/checkpoint/writer.h>

#include <headfold/base/positioned_file.h>

#include <algorithm>
#include <array>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <set>

#include "file_names.h"

namespace headfold::checkpoint {
namespace {

/// "model.safetensors" or "model-00001-of-00002.safetensors": a file this writer may have written here before.
bool is_shard_name(const std::string& name) {
  if (name == kSingle) return true;
  constexpr std::string_view pattern = "model-#####-of-#####.safetensors";
  if (name.size() != pattern.size()) return false;
  for (std::size_t i = 0; i < name.size(); ++i)
    if (pattern[i] == '#' ? name[i] < '0' || name[i] > '9' : name[i] != pattern[i]) return false;
  return true;
}

constexpr std::array kCompanions = {
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json",  "special_tokens_map.json", "added_tokens.json",
    "vocab.json",      "merges.txt",     "generation_config.json", "chat_template.jinja",     "chat_template.json"};

/// Removes the files of `folder` that `chosen` names, those without which the rest is no model first.
void remove_files(const fs::path& folder, const std::function<bool(const std::string& name)>& chosen) {
  std::vector<fs::path> old;
  std::error_code listing;
  for (fs::directory_iterator entry(folder, listing), end; !listing && entry != end; entry.increment(listing))
    if (chosen(entry->path().filename().string())) old.push_back(entry->path());
  if (listing) throw IoError(folder.string(), "cannot be listed: " + listing.message());
  const auto order = [](const fs::path& path) {
    const std::string name = path.filename().string();
    return name == kIndex ? 0 : is_shard_name(name) ? 1 : 2;
  };
  std::stable_sort(old.begin(), old.end(), [&](const fs::path& a, const fs::path& b) { return order(a) < order(b); });
  for (const fs::path& path : old) {
    std::error_code code;
    fs::remove(path, code);
    if (code) throw IoError(path.string(), "the file of an earlier run cannot be removed: " + code.message());
  }
}

/// What a writer that was killed leaves: NAME.tmp of shards, NAME.PROCESS.tmp (write_file) of other files.
bool is_temporary(const std::string& name) {
  if (!name.ends_with(".tmp")) return false;
  const std::string base = name.substr(0, name.size() - 4);
  const std::size_t dot = base.rfind('.');
  return is_shard_name(base) ||
         (dot != std::string::npos && dot + 1 < base.size() &&
          base.find_first_not_of("0123456789", dot + 1) == std::string::npos && is_model_file(base.substr(0, dot)));
}

}  // namespace

ShardPlan plan_shards(const std::vector<TensorSpec>& tensors, std::uint64_t max_shard_bytes) {
  ShardPlan plan;
  std::uint64_t filled = 0;
  std::size_t shards = 1;
  bool empty = true;
  for (const TensorSpec& tensor : tensors) {
    const std::uint64_t bytes = tensor.bytes();
    if (!empty && (bytes > max_shard_bytes || filled > max_shard_bytes - bytes)) {
      ++shards;
      filled = 0;
    }
    empty = false;
    filled += bytes;
    plan.tensor_bytes += bytes;
    plan.shard_of.push_back(shards - 1);
  }
  if (shards > 99999)
    throw UsageError(fmt::format("the model would be cut into {} shards; file names have room for 99999", shards),
                     "choose larger shards");
  if (shards == 1) {
    plan.files.emplace_back(kSingle);
  } else {
    for (std::size_t i = 1; i <= shards; ++i)
      plan.files.push_back(fmt::format("model-{:05}-of-{:05}.safetensors", i, shards));
  }
  return plan;
}

struct ParallelWriter::State {
  comm::Communicator world;
  fs::path folder;
  std::vector<TensorSpec> tensors;
  std::map<std::string, std::size_t> number;  ///< name -> index into tensors
  ShardPlan plan;
  std::vector<std::uint64_t> offset;  ///< of each tensor in its file
  std::vector<std::uint64_t> shard_bytes;
  std::vector<std::int64_t> written;  ///< elements of each tensor written by this rank
  std::vector<std::optional<PositionedFile>> open;
  std::mutex mutex;
  bool finished = false;
  bool made_folder = false;

  fs::path final_path(std::size_t shard) const { return folder / plan.files[shard]; }
  fs::path temporary(std::size_t shard) const { return folder / (plan.files[shard] + ".tmp"); }

  void remove_temporaries() const {
    for (std::size_t i = 0; i < plan.files.size(); ++i) {
      std::error_code code;
      fs::remove(temporary(i), code);
    }
    std::error_code code;
    fs::remove(folder / kUnfinishedMarker, code);
    if (made_folder) fs::remove(folder, code);  // unless something else has come to stand there
  }

  /// Rank 0: reserves the files and writes their headers.
  void create(const std::vector<std::string>& headers) {
    made_folder = !fs::exists(folder);
    make_folder(folder);
    remove_files(folder, is_temporary);
    std::uint64_t need = 0;
    for (const std::uint64_t bytes : shard_bytes) need += bytes;
    const std::uint64_t free = free_bytes(folder);
    if (need > free)
      throw IoError(folder.string(),
                    fmt::format("{} are needed, the file system has {} free", human_bytes(static_cast<double>(need)),
                                human_bytes(static_cast<double>(free))),
                    "free some space or choose another folder");
    try {
      write_file(folder / kUnfinishedMarker, "a checkpoint is being written here\n");
      for (std::size_t i = 0; i < headers.size(); ++i) {
        PositionedFile file = PositionedFile::create(temporary(i), shard_bytes[i]);
        file.write(headers[i].data(), headers[i].size(), 0);
        file.sync();
        file.close();
      }
    } catch (...) {
      remove_temporaries();
      throw;
    }
  }

  const PositionedFile& file(std::size_t shard) {
    const std::lock_guard lock(mutex);
    if (!open[shard]) open[shard].emplace(PositionedFile::open(temporary(shard)));
    return *open[shard];
  }

  void write(std::size_t i, std::int64_t first, const at::Tensor& part) {
    const TensorSpec& spec = tensors[i];
    const at::Tensor data = part.detach().cpu().contiguous();
    const std::uint64_t size = element_size(spec.dtype);
    if (data.numel() > 0)
      file(plan.shard_of[i])
          .write(data.data_ptr(), static_cast<std::uint64_t>(data.numel()) * size,
                 offset[i] + static_cast<std::uint64_t>(first) * size);
    const std::lock_guard lock(mutex);
    written[i] += data.numel();
  }

  /// Throws on every rank what went wrong on any.
  void agree(const std::string& own_failure) const {
    for (const std::string& failure : world.all_gather(own_failure))
      if (!failure.empty()) throw IoError(folder.string(), failure);
  }

  void sync_all() {
    std::string failure;
    for (auto& each : open) {
      if (!each) continue;
      try {
        each->sync();
        each->close();
      } catch (const std::exception& error) {
        failure = error.what();
      }
    }
    open.clear();
    open.resize(plan.files.size());
    agree(failure);
  }

  void check_complete() const {
    std::vector<std::int64_t> total = written;
    world.all_reduce(std::span<std::int64_t>(total), comm::Reduce::sum);
    std::string wrong;
    int count = 0;
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const auto wanted = static_cast<std::int64_t>(tensors[i].bytes() / element_size(tensors[i].dtype));
      if (total[i] == wanted) continue;
      if (++count <= 5)
        wrong += fmt::format("{}{} ({} of {} elements)", count == 1 ? "" : ", ", tensors[i].name, total[i], wanted);
    }
    if (count > 0)
      throw InternalError(
          fmt::format("{}: {} tensors were not written exactly once: {}", folder.string(), count, wrong));
  }

  void put_in_place(const Json& config, const OrderedJson& headfold, const std::vector<fs::path>& copies) const {
    // Weights go in any case: without them what is replaced now is no model.
    std::set<std::string> replaced = {"config.json"};
    if (!headfold.is_null()) replaced.insert("headfold.json");
    std::error_code code;
    for (const fs::path& from : copies)
      if (fs::is_regular_file(from, code)) replaced.insert(from.filename().string());
    remove_files(folder, [&](const std::string& name) { return is_model_file(name) && !replaced.contains(name); });
    write_json(folder / "config.json", config);
    if (!headfold.is_null()) write_json(folder / "headfold.json", headfold);
    for (const fs::path& from : copies) {
      const fs::path to = folder / from.filename();
      if (fs::is_regular_file(from, code) && !fs::equivalent(from, to, code)) headfold::copy_file(from, to);
    }
    for (std::size_t i = 0; i < plan.files.size(); ++i) publish(temporary(i), final_path(i));
    if (plan.files.size() == 1) return;
    OrderedJson index;
    index["metadata"]["total_size"] = plan.tensor_bytes;
    index["weight_map"] = OrderedJson::object();
    for (const auto& [name, i] : number) index["weight_map"].push_back({name, plan.files[plan.shard_of[i]]});
    write_json(folder / kIndex, index);
  }
};

ParallelWriter::ParallelWriter(const comm::Communicator& world, const std::filesystem::path& folder,
                               std::vector<TensorSpec> tensors, std::uint64_t max_shard_bytes)
    : state_(new State{world, folder, std::move(tensors), {}, {}, {}, {}, {}, {}, {}, false}) {
  State& state = *state_;
  if (max_shard_bytes == 0) throw UsageError("the largest shard size must be positive");
  state.plan = plan_shards(state.tensors, max_shard_bytes);
  for (std::size_t i = 0; i < state.tensors.size(); ++i) {
    if (!state.number.emplace(state.tensors[i].name, i).second)
      throw InternalError(fmt::format("tensor {} was to be written twice", state.tensors[i].name));
  }
  std::vector<std::vector<std::size_t>> members(state.plan.files.size());
  for (std::size_t i = 0; i < state.tensors.size(); ++i) members[state.plan.shard_of[i]].push_back(i);
  std::vector<std::string> headers;
  state.offset.resize(state.tensors.size());
  for (const std::vector<std::size_t>& member : members) {
    std::vector<TensorSpec> specs;
    specs.reserve(member.size());
    for (const std::size_t i : member) specs.push_back(state.tensors[i]);
    SafetensorsLayout layout = lay_out(specs);
    for (std::size_t j = 0; j < member.size(); ++j) state.offset[member[j]] = layout.begin[j];
    state.shard_bytes.push_back(layout.file_bytes);
    headers.push_back(std::move(layout.header));
  }
  state.written.assign(state.tensors.size(), 0);
  state.open.resize(state.plan.files.size());
  std::string all;
  for (const std::string& header : headers) all += header;
  world.require_equal(fmt::format("{}|{}", folder.string(), all), "the list of tensors to be written");
  world.on_root([&] { state.create(headers); });
}

ParallelWriter::~ParallelWriter() {
  if (state_->finished) return;
  // No collective here: this may run while an error unwinds on one rank only. A rank that still writes has its own
  // descriptor; what it writes into the removed file disappears with it.
  if (state_->world.root()) state_->remove_temporaries();
}

std::uint64_t ParallelWriter::total_bytes() const {
  std::uint64_t total = 0;
  for (const std::uint64_t bytes : state_->shard_bytes) total += bytes;
  return total;
}

void ParallelWriter::write(const std::string& name, const at::Tensor& tensor) {
  const auto found = state_->number.find(name);
  if (found == state_->number.end())
    throw InternalError(fmt::format("tensor {} is not among those to be written", name));
  const TensorSpec& spec = state_->tensors[found->second];
  if (tensor.sizes().vec() != spec.shape)
    throw InternalError(fmt::format("tensor {} has shape {}, to be written was {}", name,
                                    shape_text(tensor.sizes().vec()), shape_text(spec.shape)));
  write_part(name, 0, tensor);
}

void ParallelWriter::write_part(const std::string& name, std::int64_t first, const at::Tensor& part) {
  const auto found = state_->number.find(name);
  if (found == state_->number.end())
    throw InternalError(fmt::format("tensor {} is not among those to be written", name));
  const TensorSpec& spec = state_->tensors[found->second];
  if (dtype_name(part.scalar_type()) != spec.dtype)
    throw InternalError(
        fmt::format("tensor {} has dtype {}, to be written was {}", name, dtype_name(part.scalar_type()), spec.dtype));
  const auto elements = static_cast<std::int64_t>(spec.bytes() / element_size(spec.dtype));
  if (first < 0 || part.numel() > elements - first)
    throw InternalError(
        fmt::format("tensor {}: elements {} to {} are outside its {}", name, first, first + part.numel(), elements));
  state_->write(found->second, first, part);
}

void ParallelWriter::finish(const Json& config, const OrderedJson& headfold,
                            const std::vector<std::filesystem::path>& copies) {
  State& state = *state_;
  if (state.finished) throw InternalError("a checkpoint writer was finished twice");
  state.check_complete();
  state.sync_all();
  state.world.on_root([&] {
    state.put_in_place(config, headfold, copies);
    std::error_code code;
    fs::remove(state.folder / kUnfinishedMarker, code);
  });
  state.finished = true;
}

bool is_model_file(const std::string& name) {
  static const std::set<std::string> beside = {"config.json", "headfold.json", "convert.json", "plan.json",
                                               "verification.json"};
  return is_shard_name(name) || name == kIndex || beside.contains(name) ||
         std::find(kCompanions.begin(), kCompanions.end(), name) != kCompanions.end();
}

bool holds_model(const std::filesystem::path& folder) {
  std::error_code code;
  return fs::exists(folder / "config.json", code) &&
         (fs::exists(folder / kSingle, code) || fs::exists(folder / kIndex, code));
}

std::vector<std::filesystem::path> companion_files(const std::filesystem::path& folder) {
  std::vector<std::filesystem::path> found;
  for (const char* name : kCompanions) {
    std::error_code code;
    if (std::filesystem::is_regular_file(folder / name, code)) found.push_back(folder / name);
  }
  return found;
}

std::vector<std::string> companion_problems(const std::filesystem::path& folder,
                                            const std::vector<std::filesystem::path>& sources) {
  std::vector<std::string> problems;
  std::set<std::string> expected;
  for (const fs::path& source : sources) {
    const fs::path copy = folder / source.filename();
    expected.insert(source.filename().string());
    std::error_code code;
    if (!fs::is_regular_file(copy, code))
      problems.push_back(fmt::format("{} is missing", copy.string()));
    else if (read_file(copy) != read_file(source))
      problems.push_back(fmt::format("{} differs from {}", copy.string(), source.string()));
  }
  for (const fs::path& file : companion_files(folder))
    if (!expected.contains(file.filename().string()))
      problems.push_back(fmt::format("{} is of another model", file.string()));
  return problems;
}

}  // namespace headfold::checkpoint
