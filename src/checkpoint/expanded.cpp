#include <headfold/base/error.h>
#include <headfold/base/progress.h>
#include <headfold/base/version.h>
#include <headfold/checkpoint/expanded.h>
#include <headfold/checkpoint/writer.h>

#include <numeric>
#include <set>

namespace headfold::checkpoint {
namespace {

/// KV heads of the ordinary model.
std::int64_t expanded_heads(const ModelConfig& config) {
  if (config.family == Family::bloom) return config.heads;
  if (config.layout == KvLayout::latent) return config.source_kv_heads;
  std::int64_t common = 1;
  for (std::int64_t layer = 0; layer < (config.uneven() ? config.layers : 1); ++layer)
    common = std::lcm(common, config.shape_of(layer).kv_heads);
  return common;
}

/// A projection with its bias as last column, float64.
at::Tensor load_augmented(const Reader& reader, const std::string& name, std::int64_t rows, bool bias) {
  at::Tensor weight = reader.load(name + ".weight", {rows, reader.config().hidden}, at::kDouble);
  if (!bias) return weight;
  return at::cat({weight, reader.load(name + ".bias", {rows}, at::kDouble).view({rows, 1})}, 1);
}

/// `rows` [n, ..] with zeros below up to `count` rows.
at::Tensor padded(const at::Tensor& rows, std::int64_t count) {
  if (rows.size(0) == count) return rows;
  return at::cat({rows, at::zeros({count - rows.size(0), rows.size(1)}, rows.options())}, 0);
}

/// Head after head, each padded to `width` rows.
at::Tensor padded_heads(const at::Tensor& rows, std::int64_t heads, std::int64_t width) {
  std::vector<at::Tensor> parts;
  for (const at::Tensor& head : rows.chunk(heads, 0)) parts.push_back(padded(head, width));
  return at::cat(parts, 0);
}

void put(std::map<std::string, at::Tensor>& tensors, const std::string& name, const at::Tensor& rows, bool bias,
         std::int64_t hidden) {
  tensors[name + ".weight"] = rows.slice(1, 0, hidden).contiguous();
  if (bias) tensors[name + ".bias"] = rows.select(1, hidden).contiguous();
}

at::ScalarType scalar_of(const std::string& dtype) {
  if (dtype == "float32") return at::kFloat;
  if (dtype == "float16") return at::kHalf;
  if (dtype == "bfloat16") return at::kBFloat16;
  throw UsageError(fmt::format("checkpoints are written as float32, float16 or bfloat16, not {}", dtype));
}

std::string layer_prefix(Family family, std::int64_t layer) {
  return family == Family::llama ? fmt::format("model.layers.{}.self_attn.", layer)
                                 : fmt::format("transformer.h.{}.self_attention.", layer);
}

}  // namespace

ModelConfig expanded_config(const ModelConfig& config, const std::string& dtype) {
  scalar_of(dtype);
  if (config.layout == KvLayout::projected)
    throw InputError(
        fmt::format(
            "{}: layout \"projected\" has no dense equivalent: its matrices mix keys after the rotation, which no "
            "projection of the input can do",
            config.file),
        "evaluate it with headfold, or convert with --keys latent or rope-commuting");
  const std::string type = config.raw.value("model_type", std::string(name_of(config.family)));
  if (type == name_of(config.family))
    throw InputError(fmt::format("{}: is an ordinary {} model already (model_type \"{}\"); there is nothing to expand",
                                 config.file, name_of(config.family), type));
  Json json = stock_config(config, expanded_heads(config));
  for (const char* key : {"torch_dtype", "dtype"})
    if (json.contains(key)) json[key] = dtype;
  if (!json.contains("torch_dtype") && !json.contains("dtype")) json["torch_dtype"] = dtype;
  return parse_config(json, "config.json of the expanded model");
}

std::map<std::string, at::Tensor> expanded_layer(const Reader& reader, std::int64_t layer) {
  const ModelConfig& c = reader.config();
  const bool llama = c.family == Family::llama;
  const bool bias = !llama || c.attention_bias;
  const bool latent = c.layout == KvLayout::latent;
  const std::string prefix = layer_prefix(c.family, layer);
  const LayerShape shape = c.shape_of(layer);
  const std::int64_t d = c.head_dim;
  const std::int64_t heads = expanded_heads(c);
  const std::int64_t sources = c.source_heads_of(layer);
  const at::Tensor key =
      load_augmented(reader, prefix + (llama ? "k_proj" : "key"), shape.kv_heads * shape.key_width, bias);
  const at::Tensor value =
      load_augmented(reader, prefix + (llama ? "v_proj" : "value"), shape.kv_heads * shape.value_width, bias);
  const bool rebuild_keys = latent && !keys_absorbed(c, layer);
  const bool rebuild_values = latent && !values_absorbed(c, layer);
  at::Tensor key_up, value_up;
  if (rebuild_keys) key_up = reader.load(prefix + "key_up.weight", {sources, d, shape.key_width}, at::kDouble);
  if (rebuild_values) value_up = reader.load(prefix + "value_up.weight", {sources, d, shape.value_width}, at::kDouble);

  std::vector<at::Tensor> keys, values;
  for (std::int64_t head = 0; head < heads; ++head) {
    const std::int64_t source = head / (heads / sources);
    const std::int64_t group = head / (heads / shape.kv_heads);
    const at::Tensor k = key.slice(0, group * shape.key_width, (group + 1) * shape.key_width);
    const at::Tensor v = value.slice(0, group * shape.value_width, (group + 1) * shape.value_width);
    keys.push_back(rebuild_keys ? at::matmul(key_up.select(0, source), k) : padded(k, d));
    values.push_back(rebuild_values ? at::matmul(value_up.select(0, source), v) : padded(v, d));
  }
  std::map<std::string, at::Tensor> made;
  if (llama) {
    put(made, prefix + "k_proj", at::cat(keys, 0), bias, c.hidden);
    put(made, prefix + "v_proj", at::cat(values, 0), bias, c.hidden);
  } else {
    const std::int64_t width = keys_absorbed(c, layer) ? shape.key_width : d;
    const auto queries =
        padded_heads(load_augmented(reader, prefix + "query", c.heads * width, true), c.heads, d).chunk(c.heads, 0);
    std::vector<at::Tensor> fused;
    for (std::size_t head = 0; head < queries.size(); ++head)
      fused.insert(fused.end(), {queries[head], keys[head], values[head]});
    put(made, prefix + "query_key_value", at::cat(fused, 0), true, c.hidden);
  }
  if (values_absorbed(c, layer)) {
    const std::string name = prefix + (llama ? "o_proj.weight" : "dense.weight");
    const at::Tensor output = reader.load(name, {c.hidden, c.heads * shape.value_width}, at::kDouble);
    made[name] = padded_heads(output.t(), c.heads, d).t().contiguous();
  }
  return made;
}

OrderedJson expanded_record(const Reader& reader, const ModelConfig& after, const std::string& dtype) {
  const ModelConfig& before = reader.config();
  const auto bytes = [](const ModelConfig& config) {
    return config.cache_bytes_per_token(config.dtype == "float32" ? 4 : 2);
  };
  OrderedJson json;
  json["format"] = "headfold-expanded";
  json["format_version"] = 1;
  json["headfold_version"] = version();
  json["note"] =
      "dense equivalent of a folded model, for scoring in runtimes that do not know its layout; the KV cache is not "
      "smaller than that of the model that was folded";
  json["source"] = {
      {"folder",
       std::filesystem::absolute(reader.folder() / "config.json").parent_path().lexically_normal().filename().string()},
      {"fingerprint", reader.fingerprint()},
      {"layout", name_of(before.layout)},
      {"cache_bytes_per_token", bytes(before)}};
  json["layout"] = name_of(after.layout);
  json["kv_heads"] = after.kv_heads;
  json["heads"] = after.heads;
  json["dtype"] = dtype;
  json["cache_bytes_per_token"] = bytes(after);
  json["parameters"] = parameter_count(after);
  std::error_code code;
  const auto made = reader.folder() / "headfold.json";
  if (std::filesystem::is_regular_file(made, code))
    json["folded"] = OrderedJson::parse(read_json(made, std::uint64_t{256} << 20).dump());
  return json;
}

std::vector<TensorSpec> expanded_specs(const ModelConfig& after, const std::string& dtype) {
  std::vector<TensorSpec> specs;
  for (const TensorShape& tensor : model_tensors(after))
    specs.push_back({tensor.name, dtype_name(scalar_of(dtype)), tensor.shape});
  return specs;
}

void write_expanded(const comm::Communicator& world, const Reader& reader, const std::filesystem::path& folder,
                    const std::string& dtype, std::uint64_t max_shard_bytes) {
  const ModelConfig after = expanded_config(reader.config(), dtype);
  const at::ScalarType type = scalar_of(dtype);
  ParallelWriter writer(world, folder, expanded_specs(after, dtype), max_shard_bytes);
  const auto write = [&](const std::string& name, const at::Tensor& tensor) {
    const at::Tensor rounded = tensor.to(type);
    if (!at::isfinite(rounded).all().item<bool>())
      throw InputError(fmt::format("tensor {} has values that {} cannot hold", name, dtype), "choose another --dtype");
    writer.write(name, rounded);
  };
  // Layers by turns; what stands outside of them is taken as one more layer.
  const std::int64_t layers = after.layers;
  std::vector<std::vector<TensorShape>> items(static_cast<std::size_t>(layers) + 1);
  std::set<std::string> inside;
  for (std::int64_t layer = 0; layer < layers; ++layer) {
    items[static_cast<std::size_t>(layer)] = layer_tensors(after, layer);
    for (const TensorShape& tensor : items[static_cast<std::size_t>(layer)]) inside.insert(tensor.name);
  }
  for (const TensorShape& tensor : model_tensors(after))
    if (!inside.contains(tensor.name)) items.back().push_back(tensor);
  std::int64_t mine = 0;
  for (std::int64_t item = world.rank(); item <= layers; item += world.size()) ++mine;
  Progress progress("expand", "layers", static_cast<double>(mine), world.root());
  for (std::int64_t item = world.rank(); item <= layers; item += world.size()) {
    const auto made = item < layers ? expanded_layer(reader, item) : std::map<std::string, at::Tensor>();
    for (const TensorShape& tensor : items[static_cast<std::size_t>(item)]) {
      const auto found = made.find(tensor.name);
      if (found != made.end()) {
        write(tensor.name, found->second);
        continue;
      }
      write(tensor.name, reader.load(tensor.name, tensor.shape, at::kFloat));
      reader.done_with(tensor.name);
    }
    progress.advance(1);
  }
  writer.finish(after.raw, expanded_record(reader, after, dtype), companion_files(reader.folder()));
}

}  // namespace headfold::checkpoint
