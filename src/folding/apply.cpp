#include <headfold/base/error.h>
#include <headfold/base/log.h>
#include <headfold/base/progress.h>
#include <headfold/base/version.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/folding/apply.h>

#include <algorithm>
#include <set>

namespace headfold::folding {

using checkpoint::Family;
using checkpoint::KvLayout;
using checkpoint::ModelConfig;
using checkpoint::Reader;
using checkpoint::TensorSpec;

namespace {

std::vector<std::int64_t> flattened(const Groups& groups) {
  std::vector<std::int64_t> all;
  for (const auto& group : groups) all.insert(all.end(), group.begin(), group.end());
  return all;
}

bool moves_heads(const Groups& groups) {
  const auto all = flattened(groups);
  return !std::is_sorted(all.begin(), all.end());
}

/// Names of one family's attention tensors.
struct Names {
  const char *query, *key, *value, *output;
};
Names names_of(bool rotates) {
  return rotates ? Names{"q_proj", "k_proj", "v_proj", "o_proj"} : Names{"query", "key", "value", "dense"};
}

void put(NewTensors& tensors, const std::string& name, const at::Tensor& weight, const at::Tensor& bias) {
  tensors[name + ".weight"] = weight;
  if (bias.defined()) tensors[name + ".bias"] = bias;
}

at::Tensor rows_of(const at::Tensor& tensor, const at::Tensor& rows) {
  return tensor.defined() ? tensor.index_select(0, rows) : tensor;
}

at::Tensor joined(const std::vector<at::Tensor>& parts, std::int64_t dim) {
  return parts.empty() || !parts[0].defined() ? at::Tensor() : at::cat(parts, dim);
}

/// Which tensors (last part of the name) a fold makes in one layer, with their shapes.
std::map<std::string, std::vector<std::int64_t>> made_tensors(const ModelConfig& config, const FoldOptions& options,
                                                              const Groups& groups, Part part) {
  const bool rotates = config.family == Family::llama;
  const Names names = names_of(rotates);
  const bool biased = !rotates || config.attention_bias;
  const bool projected = layout_of(options) == KvLayout::projected;
  const bool moved = moves_heads(groups);
  const std::int64_t d = config.head_dim, query_rows = config.heads * d, kv_rows = options.kv_heads * d;
  std::map<std::string, std::vector<std::int64_t>> made;
  const auto add = [&](const char* name, std::int64_t rows, std::int64_t columns) {
    made[std::string(name) + ".weight"] = {rows, columns};
    if (biased) made[std::string(name) + ".bias"] = {rows};
  };
  const bool fused = !rotates && !config.split_qkv;
  if (part != Part::values) {
    if (projected) {
      if (moved) add(names.query, query_rows, config.hidden), add(names.key, config.kv_heads * d, config.hidden);
      made["key_fold.weight"] = {options.kv_heads, d, config.kv_heads / options.kv_heads * d};
      made["query_fold.weight"] = {config.kv_heads, d, d};
    } else {
      if (fused || moved || options.keys != KeyFold::meanpool) add(names.query, query_rows, config.hidden);
      add(names.key, kv_rows, config.hidden);
    }
  }
  if (part != Part::keys) {
    add(names.value, kv_rows, config.hidden);
    if (moved || options.values != ValueFold::meanpool) {
      made[std::string(names.output) + ".weight"] = {config.hidden, query_rows};
      if (!rotates) made[std::string(names.output) + ".bias"] = {config.hidden};  // takes the mean of what is left out
    }
  }
  return made;
}

/// "model.layers.3.self_attn." as this checkpoint stores it (the family's prefix may be absent).
std::string attention_prefix(const Reader& reader, std::int64_t layer) {
  const ModelConfig& config = reader.config();
  const std::string prefix = config.family == Family::llama ? fmt::format("model.layers.{}.self_attn.", layer)
                                                            : fmt::format("transformer.h.{}.self_attention.", layer);
  const std::string tail = config.family == Family::llama ? "k_proj.weight"
                           : config.split_qkv             ? "key.weight"
                                                          : "query_key_value.weight";
  const std::string stored = reader.resolve(prefix + tail);
  if (stored.empty())
    throw InputError(fmt::format("{}: tensor {} is missing", reader.folder().string(), prefix + tail));
  return stored.substr(0, stored.size() - tail.size());
}

/// Tensor that decides the dtype of a made one.
std::string origin_of(const Reader& reader, const std::string& prefix, const std::string& tail) {
  if (reader.has(prefix + tail)) return prefix + tail;
  if (tail == "key_fold.weight" || tail == "query_fold.weight") return prefix + "k_proj.weight";
  return prefix + (tail.ends_with(".bias") ? "query_key_value.bias" : "query_key_value.weight");
}

/// Rounds once, from float64 to the stored dtype; a value that does not fit is an error, not an infinity.
at::Tensor rounded(const at::Tensor& tensor, const std::string& dtype, const std::string& name) {
  const at::Tensor result = tensor.to(checkpoint::scalar_type(dtype)).contiguous();
  if (!at::isfinite(result).all().item<bool>())
    throw NumericalError(fmt::format("{}: the fold gives values that {} cannot hold", name, dtype),
                         "convert from a float32 or bfloat16 checkpoint");
  return result;
}

struct Layout {
  std::vector<TensorSpec> tensors;
  std::vector<std::string> untouched;
};

Layout layout(const Reader& reader, const FoldOptions& options, const std::vector<Groups>& groups) {
  const ModelConfig& config = reader.config();
  std::set<std::string> replaced;
  Layout result;
  for (std::int64_t l = 0; l < config.layers; ++l) {
    const std::string prefix = attention_prefix(reader, l);
    for (const auto& [tail, shape] :
         made_tensors(config, options, groups.at(static_cast<std::size_t>(l)), Part::both)) {
      const std::string origin = origin_of(reader, prefix, tail);
      result.tensors.push_back({prefix + tail, reader.info(origin).dtype, shape});
      replaced.insert(prefix + tail);
      if (!tail.starts_with("key_fold") && !tail.starts_with("query_fold")) replaced.insert(origin);
    }
  }
  for (const std::string& name : reader.names()) {
    if (replaced.contains(name)) continue;
    result.tensors.push_back({name, reader.info(name).dtype, reader.info(name).shape});
    result.untouched.push_back(name);
  }
  std::sort(result.tensors.begin(), result.tensors.end(),
            [](const TensorSpec& a, const TensorSpec& b) { return a.name < b.name; });
  return result;
}

}  // namespace

NewTensors folded_keys(const LayerProblem& problem, const Groups& groups, const FoldOptions& options) {
  const LayerWeights& w = problem.weights;
  const std::int64_t d = w.head_dim, repeat = w.key_repeat();
  const Names names = names_of(problem.rotates);
  const bool projected = layout_of(options) == KvLayout::projected;
  const auto count = groups.size();
  std::vector<at::Tensor> key(count), key_bias(count), query(count), query_bias(count), key_fold(count),
      query_fold(count);
  for_each_item(static_cast<std::int64_t>(count), [&](std::int64_t index) {
    const auto g = static_cast<std::size_t>(index);
    const Basis basis = key_basis(problem, groups[g], options);
    const auto size = static_cast<std::int64_t>(groups[g].size());
    const at::Tensor rows = block_index(groups[g], d);
    const at::Tensor query_rows = block_index(query_heads_of(groups[g], repeat), d);
    key[g] = rows_of(w.key, rows);
    key_bias[g] = rows_of(w.key_bias, rows);
    query[g] = rows_of(w.query, query_rows);
    query_bias[g] = rows_of(w.query_bias, query_rows);
    const at::Tensor decoder_t = basis.decoder.view({size, d, d}).transpose(1, 2);  // B_k^T
    if (projected) {
      key_fold[g] = basis.encoder;
      query_fold[g] = decoder_t.contiguous();
      return;
    }
    key[g] = at::matmul(basis.encoder, key[g]);
    // Without rotation a key bias adds the same number to every score of a query: it drops out of the softmax
    // (methods.md 2.1).
    if (key_bias[g].defined())
      key_bias[g] =
          options.keys == KeyFold::norope ? at::zeros({d}, at::kDouble) : at::matmul(basis.encoder, key_bias[g]);
    if (options.keys == KeyFold::meanpool) return;
    query[g] =
        at::matmul(decoder_t.unsqueeze(1), query[g].view({size, repeat, d, -1})).reshape({size * repeat * d, -1});
    if (query_bias[g].defined())
      query_bias[g] = at::matmul(decoder_t.unsqueeze(1), query_bias[g].view({size, repeat, d, 1})).reshape({-1});
  });
  NewTensors made;
  put(made, names.query, joined(query, 0), joined(query_bias, 0));
  put(made, names.key, joined(key, 0), joined(key_bias, 0));
  if (projected) {
    made["key_fold.weight"] = at::stack(key_fold);
    made["query_fold.weight"] = at::cat(query_fold, 0);
  }
  return made;
}

NewTensors folded_values(const LayerProblem& problem, const Groups& groups, const FoldOptions& options) {
  const LayerWeights& w = problem.weights;
  const std::int64_t d = w.head_dim, repeat = w.value_repeat();
  const Names names = names_of(problem.rotates);
  const auto count = groups.size();
  std::vector<at::Tensor> value(count), value_bias(count), output(count), correction(count);
  for_each_item(static_cast<std::int64_t>(count), [&](std::int64_t index) {
    const auto g = static_cast<std::size_t>(index);
    const Basis basis = value_basis(problem, groups[g], options);
    const auto size = static_cast<std::int64_t>(groups[g].size());
    const at::Tensor rows = block_index(groups[g], d);
    const at::Tensor source = rows_of(w.value, rows);
    const at::Tensor source_bias = rows_of(w.value_bias, rows);
    output[g] = w.output.index_select(1, block_index(query_heads_of(groups[g], repeat), d));
    value[g] = at::matmul(basis.encoder, source);
    if (source_bias.defined()) value_bias[g] = at::matmul(basis.encoder, source_bias);
    if (options.values == ValueFold::meanpool) return;
    const at::Tensor heads = output[g].view({w.hidden, size, repeat, d});
    if (problem.centred_values) {
      // (I - BA) v_mean is constant and attention rows sum to one: what is left out goes through W_O into the output
      // bias (methods.md 4.5).
      at::Tensor mean = at::zeros({size * d}, at::kDouble);
      if (problem.has_moments) mean = at::matmul(source, problem.moments.mean.slice(0, 0, w.hidden));
      if (source_bias.defined()) mean = mean + source_bias;
      const at::Tensor missing = (mean - at::matmul(basis.decoder, at::matmul(basis.encoder, mean))).view({size, d});
      correction[g] = (heads.sum(2) * missing).sum(2).sum(1);
    }
    output[g] = at::matmul(heads.permute({1, 2, 0, 3}), basis.decoder.view({size, 1, d, d}))
                    .permute({2, 0, 1, 3})
                    .reshape({w.hidden, size * repeat * d});
  });
  NewTensors made;
  put(made, names.value, joined(value, 0), joined(value_bias, 0));
  at::Tensor bias = w.output_bias;
  if (problem.centred_values && options.values != ValueFold::meanpool)
    for (const at::Tensor& part : correction) bias = bias + part;
  put(made, names.output, joined(output, 1), bias);
  return made;
}

std::vector<TensorSpec> folded_tensors(const Reader& reader, const FoldOptions& options,
                                       const std::vector<Groups>& groups) {
  return layout(reader, options, groups).tensors;
}

std::vector<std::string> untouched_tensors(const Reader& reader, const FoldOptions& options,
                                           const std::vector<Groups>& groups) {
  return layout(reader, options, groups).untouched;
}

std::int64_t bytes_per_element(const std::string& dtype) {
  return dtype == "float32" ? 4 : 2;
}

OrderedJson headfold_record(const Reader& reader, const calibration::StatisticsFile* statistics, const Plan& plan) {
  const ModelConfig& before = reader.config();
  const Json folded = checkpoint::folded_config(before, plan.options.kv_heads, layout_of(plan.options));
  const ModelConfig after = checkpoint::parse_config(folded, "config.json of the folded model");
  const std::int64_t element = bytes_per_element(before.dtype);
  OrderedJson json;
  json["format"] = "headfold-model";
  json["format_version"] = 1;
  json["headfold_version"] = version();
  json["source"] = OrderedJson{
      {"folder",
       std::filesystem::absolute(reader.folder() / "config.json").parent_path().lexically_normal().filename().string()},
      {"fingerprint", plan.model_hash}};
  json["statistics"] = statistics == nullptr ? OrderedJson()
                                             : OrderedJson{{"file", statistics->path().filename().string()},
                                                           {"content_hash", plan.statistics_hash}};
  json["fold"] = to_json(plan.options);
  json["layout"] = checkpoint::name_of(layout_of(plan.options));
  json["stock"] = is_stock(plan.options, before);
  json["kv_heads"] = OrderedJson{{"before", before.kv_heads}, {"after", plan.options.kv_heads}};
  json["heads"] = before.heads;
  json["layers_total"] = before.layers;
  json["cache_bytes_per_token"] =
      OrderedJson{{"before", before.cache_bytes_per_token(element)}, {"after", after.cache_bytes_per_token(element)}};
  json["parameters"] =
      OrderedJson{{"before", checkpoint::parameter_count(before)}, {"after", checkpoint::parameter_count(after)}};
  json["layers"] = OrderedJson::array();
  for (const LayerPlan& layer : plan.layers) {
    OrderedJson one;
    one["layer"] = layer.layer;
    one["groups"] = OrderedJson::array();
    std::vector<double> key_energy(layer.groups.at(0).key_energy.size(), 0.0),
        value_energy(layer.groups.at(0).value_energy.size(), 0.0);
    for (const GroupPlan& group : layer.groups) {
      one["groups"].push_back(group.kv_heads);
      for (std::size_t i = 0; i < key_energy.size(); ++i)
        key_energy[i] += group.key_energy.at(i) / static_cast<double>(layer.groups.size());
      for (std::size_t i = 0; i < value_energy.size(); ++i)
        value_energy[i] += group.value_energy.at(i) / static_cast<double>(layer.groups.size());
    }
    one["key_relative_loss"] = layer.key_relative_loss();
    one["value_relative_loss"] = layer.value_relative_loss();
    one["key_energy"] = key_energy;
    one["value_energy"] = value_energy;
    json["layers"].push_back(std::move(one));
  }
  return json;
}

void apply_plan(const comm::Communicator& world, const Reader& reader, const calibration::StatisticsFile* statistics,
                const Plan& plan, const std::filesystem::path& folder, std::uint64_t max_shard_bytes) {
  const ModelConfig& config = reader.config();
  const std::vector<Groups> groups = groups_of(plan);
  const Layout target = layout(reader, plan.options, groups);
  const OrderedJson record = headfold_record(reader, statistics, plan);
  std::map<std::string, std::string> dtypes;
  for (const TensorSpec& spec : target.tensors) dtypes[spec.name] = spec.dtype;

  checkpoint::ParallelWriter writer(world, folder, target.tensors, max_shard_bytes);
  const auto [begin, end] = share_of(2 * config.layers, world.rank(), world.size());
  Progress progress("fold", "half layer", static_cast<double>(end - begin), world.root());
  for (std::int64_t item = begin; item < end; ++item) {
    const std::int64_t layer = item / 2;
    const Part part = item % 2 == 0 ? Part::keys : Part::values;
    const Groups& list = groups[static_cast<std::size_t>(layer)];
    LayerProblem problem;
    for_each_item(1, [&](std::int64_t) { problem = load_problem(reader, statistics, layer, part, plan.options); });
    const NewTensors made =
        part == Part::keys ? folded_keys(problem, list, plan.options) : folded_values(problem, list, plan.options);
    const std::string prefix = attention_prefix(reader, layer);
    for (const auto& [tail, shape] : made_tensors(config, plan.options, list, part))
      writer.write(prefix + tail, rounded(made.at(tail), dtypes.at(prefix + tail), prefix + tail));
    progress.advance(1);
  }
  // Untouched tensors: every rank copies an equal share of their bytes, whole tensors.
  std::uint64_t total = 0;
  for (const std::string& name : target.untouched) total += reader.info(name).end - reader.info(name).begin;
  std::uint64_t before = 0;
  for (const std::string& name : target.untouched) {
    const std::uint64_t bytes = reader.info(name).end - reader.info(name).begin;
    const double middle = static_cast<double>(before) + 0.5 * static_cast<double>(bytes);
    const int owner =
        total == 0 ? 0
                   : std::min(world.size() - 1, static_cast<int>(middle / static_cast<double>(total) * world.size()));
    before += bytes;
    if (owner != world.rank()) continue;
    writer.write(name, reader.view(name));
    reader.done_with(name);
  }
  writer.finish(checkpoint::folded_config(config, plan.options.kv_heads, layout_of(plan.options)), record,
                checkpoint::companion_files(reader.folder()));
}

}  // namespace headfold::folding
