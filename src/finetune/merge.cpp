#include <headfold/base/error.h>
#include <headfold/base/progress.h>
#include <headfold/base/version.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/checkpoint/writer.h>
#include <headfold/finetune/lora.h>

#include <filesystem>

namespace headfold::finetune {
namespace {

/// Canonical names by stored ones. A table that is stored although it is tied to the embedding goes with it.
std::map<std::string, std::string> canonical_names(const checkpoint::Reader& base) {
  std::map<std::string, std::string> canonical;
  std::string embedding;
  for (const checkpoint::TensorShape& tensor : checkpoint::model_tensors(base.config())) {
    if (embedding.empty()) embedding = tensor.name;  // it comes first
    const std::string stored = base.resolve(tensor.name);
    if (!stored.empty()) canonical[stored] = tensor.name;
  }
  if (base.config().tied_embeddings)
    for (const std::string& stored : base.names())
      if (stored == "lm_head.weight") canonical[stored] = embedding;
  return canonical;
}

OrderedJson record_of(const checkpoint::Reader& base, const OrderedJson& record) {
  OrderedJson json;
  std::error_code code;
  const auto made = base.folder() / "headfold.json";
  if (std::filesystem::is_regular_file(made, code)) {
    json = OrderedJson::parse(read_json(made, std::uint64_t{256} << 20).dump());
  } else {
    json["format"] = "headfold-merged";
    json["format_version"] = 1;
  }
  OrderedJson entry = record;
  entry["headfold_version"] = version();
  entry["base_fingerprint"] = base.fingerprint();
  json["merged"] = entry;
  return json;
}

}  // namespace

void write_merged(const comm::Communicator& world, const checkpoint::Reader& base,
                  const std::function<at::Tensor(const std::string& name)>& changed, const OrderedJson& record,
                  const std::filesystem::path& out, std::int64_t max_shard_bytes) {
  std::vector<checkpoint::TensorSpec> specs;
  for (const std::string& name : base.names()) {
    const checkpoint::TensorInfo& info = base.info(name);
    specs.push_back({name, info.dtype, info.shape});
  }
  const std::map<std::string, std::string> canonical = canonical_names(base);
  checkpoint::ParallelWriter writer(world, out, specs, static_cast<std::uint64_t>(max_shard_bytes));
  const auto ranks = static_cast<std::size_t>(world.size());
  const auto rank = static_cast<std::size_t>(world.rank());
  const std::size_t own = (specs.size() + ranks - 1 - rank) / ranks;
  Progress progress("merge", "tensors", static_cast<double>(own), world.root());
  for (std::size_t i = rank; i < specs.size(); i += ranks) {
    const std::string& name = specs[i].name;
    const auto known = canonical.find(name);
    const at::Tensor value = known == canonical.end() ? at::Tensor() : changed(known->second);
    if (!value.defined()) {
      writer.write(name, base.view(name));
    } else {
      const at::Tensor rounded = value.to(checkpoint::scalar_type(specs[i].dtype)).view(specs[i].shape);
      if (!at::isfinite(rounded).all().item<bool>())
        throw InputError(fmt::format("{}: the merged tensor {} has values that {} cannot hold", base.folder().string(),
                                     name, specs[i].dtype));
      writer.write(name, rounded);
    }
    base.done_with(name);
    progress.advance(1);
  }
  // Copied after it is written: byte for byte the base's.
  auto copies = checkpoint::companion_files(base.folder());
  copies.push_back(base.folder() / "config.json");
  writer.finish(base.config().raw, record_of(base, record), copies);
}

void write_merged(const comm::Communicator& world, const checkpoint::Reader& base, const Adapter& adapter,
                  const std::filesystem::path& out, std::int64_t max_shard_bytes) {
  const auto changed = [&](const std::string& name) -> at::Tensor {
    const std::string module = name.substr(0, name.rfind('.'));
    if (!name.ends_with(".weight")) return {};
    const auto a = adapter.tensors.find(adapter_tensor(module, 'A'));
    const auto b = adapter.tensors.find(adapter_tensor(module, 'B'));
    if (a == adapter.tensors.end() && b == adapter.tensors.end()) return {};
    if (a == adapter.tensors.end() || b == adapter.tensors.end())
      throw InternalError(fmt::format("the adapter has one of two tensors for {}", module));
    const at::Tensor weight = base.load(name, {b->second.size(0), a->second.size(1)}, at::kFloat);
    return weight.addmm_(b->second, a->second, 1, adapter.options.scale());
  };
  OrderedJson record;
  record["adapter"] = {{"sha256", adapter_hash(adapter)},
                       {"rank", adapter.options.rank},
                       {"alpha", adapter.options.alpha},
                       {"rslora", adapter.options.rslora},
                       {"targets", adapter.options.targets}};
  write_merged(world, base, changed, record, out, max_shard_bytes);
}

}  // namespace headfold::finetune
