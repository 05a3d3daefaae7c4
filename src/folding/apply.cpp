#include <headfold/base/error.h>
#include <headfold/base/log.h>
#include <headfold/base/profile.h>
#include <headfold/base/progress.h>
#include <headfold/base/version.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/comm/stopping.h>
#include <headfold/folding/apply.h>
#include <headfold/folding/folded_layers.h>
#include <headfold/folding/refit.h>
#include <headfold/linalg/linalg.h>

#include <algorithm>
#include <cmath>
#include <set>

namespace headfold::folding {

using checkpoint::Family;
using checkpoint::KvLayout;
using checkpoint::ModelConfig;
using checkpoint::Reader;
using checkpoint::TensorSpec;

namespace {

constexpr const char* kStoppedWriting = "while writing the folded model; what was written of it is removed";

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
  return tensor.defined() ? tensor.index_select(0, rows).to(at::kDouble) : tensor;
}

Basis basis_of(const LayerProblem& problem, Part part, const std::vector<std::int64_t>& kv_heads,
               const FoldOptions& options, std::int64_t width) {
  if (problem.kept != nullptr)
    if (const Basis* kept = problem.kept->find(problem.layer, part, kv_heads)) return *kept;
  return part == Part::keys ? key_basis(problem, kv_heads, options, width)
                            : value_basis(problem, kv_heads, options, width);
}

/// Rounds the pieces of a tensor to be joined.
void round_all(const Rounding& rounding, const std::string& tail, at::Tensor& piece) {
  if (rounding && piece.defined()) piece = rounding(tail, piece);
}

/// Means that the centred value folds leave to the output bias: of the attended values of every query head's group
/// where the metric is attention-weighted, of the values themselves otherwise. [query heads, group size * head_dim].
at::Tensor value_means(const LayerProblem& problem, const std::vector<std::int64_t>& kv_heads,
                       const std::vector<std::int64_t>& query_heads, const FoldOptions& options,
                       const at::Tensor& source, const at::Tensor& source_bias) {
  const std::int64_t d = problem.weights.head_dim;
  const auto count = static_cast<std::int64_t>(query_heads.size());
  if (options.value_metric == Metric::attn_out && problem.has_moments && problem.moments.attended_mean.defined()) {
    const std::int64_t block = problem.moments.attended_heads;
    std::vector<std::int64_t> inside;
    inside.reserve(kv_heads.size());
    for (const std::int64_t head : kv_heads) inside.push_back(head % block);
    return problem.moments.attended_mean.index_select(0, at::tensor(query_heads, at::kLong))
        .index_select(1, block_index(inside, d));
  }
  at::Tensor mean = at::zeros({static_cast<std::int64_t>(kv_heads.size()) * d}, at::kDouble);
  if (problem.has_moments) mean = at::matmul(source, problem.moments.mean.slice(0, 0, problem.weights.hidden));
  if (source_bias.defined()) mean = mean + source_bias;
  return mean.unsqueeze(0).expand({count, mean.size(0)});
}

at::Tensor joined(const std::vector<at::Tensor>& parts, std::int64_t dim) {
  return parts.empty() || !parts[0].defined() ? at::Tensor() : at::cat(parts, dim);
}

/// Which tensors (last part of the name) a fold makes in one layer, with their shapes.
std::map<std::string, std::vector<std::int64_t>> made_tensors(const ModelConfig& config, const FoldOptions& options,
                                                              const LayerTarget& target, Part part) {
  const bool rotates = config.family == Family::llama;
  const Names names = names_of(rotates);
  const bool biased = !rotates || config.attention_bias;
  const KvLayout layout = layout_of(options);
  const bool moved = moves_heads(target.groups);
  const std::int64_t d = config.head_dim, query_rows = config.heads * d;
  const auto count = static_cast<std::int64_t>(target.groups.size());
  std::map<std::string, std::vector<std::int64_t>> made;
  const auto add = [&](const char* name, std::int64_t rows, std::int64_t columns) {
    made[std::string(name) + ".weight"] = {rows, columns};
    if (biased) made[std::string(name) + ".bias"] = {rows};
  };
  const bool fused = !rotates && !config.split_qkv;
  if (part != Part::values) {
    if (layout == KvLayout::projected) {
      if (moved) add(names.query, query_rows, config.hidden), add(names.key, config.kv_heads * d, config.hidden);
      made["key_fold.weight"] = {count, d, config.kv_heads / count * d};
      made["query_fold.weight"] = {config.kv_heads, d, d};
    } else if (layout == KvLayout::latent) {
      const bool absorbed = checkpoint::absorbs_keys(config.family, target.key_width, d);
      if (absorbed)
        add(names.query, config.heads * target.key_width, config.hidden);
      else
        made["key_up.weight"] = {config.kv_heads, d, target.key_width};
      if (!absorbed && (moved || fused)) add(names.query, query_rows, config.hidden);
      add(names.key, count * target.key_width, config.hidden);
    } else {
      if (fused || moved || options.keys != KeyFold::meanpool) add(names.query, query_rows, config.hidden);
      add(names.key, count * d, config.hidden);
    }
  }
  if (part != Part::keys) {
    const bool absorbed = checkpoint::absorbs_values(target.value_width, d);
    add(names.value, count * target.value_width, config.hidden);
    if (!absorbed) made["value_up.weight"] = {config.kv_heads, d, target.value_width};
    if (moved || options.refit || options.values != ValueFold::meanpool) {
      if (absorbed)
        made[std::string(names.output) + ".weight"] = {config.hidden, config.heads * target.value_width};
      else if (moved || options.refit)
        made[std::string(names.output) + ".weight"] = {config.hidden, query_rows};
      if (biased) made[std::string(names.output) + ".bias"] = {config.hidden};  // takes the mean of what is left out
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

/// Tensors that no source model has: they replace none.
bool adds_tensor(const std::string& tail) {
  return tail == "key_fold.weight" || tail == "query_fold.weight" || tail == "key_up.weight" ||
         tail == "value_up.weight";
}

/// Tensor that decides the dtype of a made one.
std::string origin_of(const Reader& reader, const std::string& prefix, const std::string& tail) {
  if (reader.has(prefix + tail)) return prefix + tail;
  if (adds_tensor(tail)) {
    for (const char* key : {"k_proj.weight", "key.weight"})
      if (reader.has(prefix + key)) return prefix + key;
    return prefix + "query_key_value.weight";
  }
  return prefix + (tail.ends_with(".bias") ? "query_key_value.bias" : "query_key_value.weight");
}

/// Rounds once, from float64 to the stored dtype; a value that does not fit is an error, not an infinity.
at::Tensor rounded(const at::Tensor& tensor, const std::string& dtype, const Reader& reader, const std::string& name) {
  at::Tensor result = tensor.to(checkpoint::scalar_type(dtype)).contiguous();
  // A sum that is finite has finite terms, at a tenth of the time that looking at each takes.
  const double sum = result.sum(at::kFloat).item<double>();
  if (!std::isfinite(sum) && !at::isfinite(result).all().item<bool>()) {
    if (!at::isfinite(tensor).all().item<bool>())
      throw InputError(fmt::format("{}: {} would have NaN or Inf; the model's tensors that it is made of contain it",
                                   reader.folder().string(), name),
                       "headfold inspect the model, and copy or download its damaged files again");
    throw NumericalError(fmt::format("{}: the fold gives values that {} cannot hold", name, dtype),
                         "convert from a float32 or bfloat16 checkpoint");
  }
  return result;
}

struct Layout {
  std::vector<TensorSpec> tensors;
  std::vector<std::string> untouched;
};

/// Name of a changed tensor from its last part: attention, or the MLP's down projection.
std::string full_name(const std::string& attention, const std::string& tail) {
  if (!tail.starts_with("down_proj.") && !tail.starts_with("dense_4h_to_h.")) return attention + tail;
  const std::size_t layer = attention.rfind('.', attention.size() - 2);
  return attention.substr(0, layer + 1) + "mlp." + tail;
}

Layout layout(const Reader& reader, const FoldOptions& options, const std::vector<LayerTarget>& targets,
              const std::vector<std::string>& refitted) {
  const ModelConfig& config = reader.config();
  std::set<std::string> replaced;
  Layout result;
  for (std::int64_t l = 0; l < config.layers; ++l) {
    const std::string prefix = attention_prefix(reader, l);
    for (const auto& [tail, shape] :
         made_tensors(config, options, targets.at(static_cast<std::size_t>(l)), Part::both)) {
      const std::string origin = origin_of(reader, prefix, tail);
      result.tensors.push_back({prefix + tail, reader.info(origin).dtype, shape});
      replaced.insert(prefix + tail);
      if (!adds_tensor(tail)) replaced.insert(origin);
    }
    for (const std::string& tail : refitted) {
      const std::string name = full_name(prefix, tail);
      if (replaced.contains(name)) continue;
      result.tensors.push_back({name, reader.info(name).dtype, reader.info(name).shape});
      replaced.insert(name);
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

NewTensors folded_keys(const LayerProblem& problem, const LayerTarget& target, const FoldOptions& options,
                       const Rounding& rounding) {
  const LayerWeights& w = problem.weights;
  const Groups& groups = target.groups;
  const std::int64_t d = w.head_dim, repeat = w.key_repeat(), r = target.key_width;
  const Names names = names_of(problem.rotates);
  const KvLayout layout = layout_of(options);
  const bool projected = layout == KvLayout::projected;
  const bool rebuilt =
      layout == KvLayout::latent && !checkpoint::absorbs_keys(problem.rotates ? Family::llama : Family::bloom, r, d);
  const auto count = groups.size();
  std::vector<at::Tensor> key(count), key_bias(count), query(count), query_bias(count), key_fold(count),
      query_fold(count), key_up(count);
  for_each_item(static_cast<std::int64_t>(count), [&](std::int64_t index) {
    const auto g = static_cast<std::size_t>(index);
    const Timed timed(Work::new_weights);
    const Basis basis = basis_of(problem, Part::keys, groups[g], options, r);
    const auto size = static_cast<std::int64_t>(groups[g].size());
    const at::Tensor rows = block_index(groups[g], d);
    const at::Tensor query_rows = block_index(query_heads_of(groups[g], repeat), d);
    key[g] = rows_of(w.key, rows);
    key_bias[g] = rows_of(w.key_bias, rows);
    query[g] = rows_of(w.query, query_rows);
    query_bias[g] = rows_of(w.query_bias, query_rows);
    const auto round = [&] {
      round_all(rounding, std::string(names.key) + ".weight", key[g]);
      round_all(rounding, std::string(names.query) + ".weight", query[g]);
    };
    const at::Tensor decoder = basis.decoder.view({size, d, r});
    const at::Tensor decoder_t = decoder.transpose(1, 2);  // B_k^T
    if (projected) {
      key_fold[g] = basis.encoder;
      query_fold[g] = decoder_t.contiguous();
      round();
      return;
    }
    key[g] = linalg::map_rows(basis.encoder, key[g]);
    // Without rotation a key bias adds the same number to every score of a query: it drops out of the softmax
    // (methods.md 2.1). Folds that keep it merge it like the weights.
    const bool drops_bias = options.keys == KeyFold::norope || (options.keys == KeyFold::latent && !problem.rotates);
    if (key_bias[g].defined())
      key_bias[g] = drops_bias ? at::zeros({r}, at::kDouble) : at::matmul(basis.encoder, key_bias[g]);
    if (rebuilt) {
      key_up[g] = decoder.contiguous();
      round();
      return;
    }
    if (options.keys == KeyFold::meanpool) {
      round();
      return;
    }
    std::vector<at::Tensor> turned;
    for (std::int64_t head = 0; head < size * repeat; ++head)
      turned.push_back(linalg::map_rows(decoder_t[head / repeat], query[g].slice(0, head * d, (head + 1) * d)));
    query[g] = at::cat(turned, 0);
    if (query_bias[g].defined())
      query_bias[g] = at::matmul(decoder_t.unsqueeze(1), query_bias[g].view({size, repeat, d, 1})).reshape({-1});
    round();
  });
  NewTensors made;
  put(made, names.query, joined(query, 0), joined(query_bias, 0));
  put(made, names.key, joined(key, 0), joined(key_bias, 0));
  if (projected) {
    made["key_fold.weight"] = at::stack(key_fold);
    made["query_fold.weight"] = at::cat(query_fold, 0);
  }
  if (rebuilt) made["key_up.weight"] = at::cat(key_up, 0);
  return made;
}

NewTensors folded_values(const LayerProblem& problem, const LayerTarget& target, const FoldOptions& options,
                         const Rounding& rounding) {
  const LayerWeights& w = problem.weights;
  const Groups& groups = target.groups;
  const std::int64_t d = w.head_dim, repeat = w.value_repeat(), r = target.value_width;
  const bool absorbed = checkpoint::absorbs_values(r, d);
  const Names names = names_of(problem.rotates);
  const auto count = groups.size();
  std::vector<at::Tensor> value(count), value_bias(count), output(count), correction(count), value_up(count);
  for_each_item(static_cast<std::int64_t>(count), [&](std::int64_t index) {
    const auto g = static_cast<std::size_t>(index);
    const Timed timed(Work::new_weights);
    const Basis basis = basis_of(problem, Part::values, groups[g], options, r);
    const auto size = static_cast<std::int64_t>(groups[g].size());
    const at::Tensor rows = block_index(groups[g], d);
    const std::vector<std::int64_t> query_heads = query_heads_of(groups[g], repeat);
    const at::Tensor source = rows_of(w.value, rows);
    const at::Tensor source_bias = rows_of(w.value_bias, rows);
    output[g] = w.output.index_select(1, block_index(query_heads, d)).to(at::kDouble);
    value[g] = at::matmul(basis.encoder, source);
    if (source_bias.defined()) value_bias[g] = at::matmul(basis.encoder, source_bias);
    round_all(rounding, std::string(names.value) + ".weight", value[g]);
    if (options.values == ValueFold::meanpool) return;
    const at::Tensor heads = output[g].view({w.hidden, size, repeat, d});
    // B_h of every query head, [size, repeat, d, r]: its source head's decoder, or its own (methods.md 4.3, tier 2b).
    const bool own = basis.head_decoders.defined() && absorbed;
    const at::Tensor decoders = own ? basis.head_decoders.view({size, repeat, d, r})
                                    : basis.decoder.view({size, 1, d, r}).expand({size, repeat, d, r});
    if (problem.centred_values) {
      // What attention leaves of (E_h - B_h A) v on average is constant, since attention rows sum to one: it goes
      // through W_O into the output bias (methods.md 4.5).
      const at::Tensor means = value_means(problem, groups[g], query_heads, options, source, source_bias);
      const at::Tensor kept =
          at::matmul(decoders.reshape({size * repeat, d, r}), at::matmul(means, basis.encoder.t()).unsqueeze(2));
      at::Tensor wanted = at::empty({size * repeat, d}, at::kDouble);
      for (std::int64_t k = 0; k < size; ++k)
        for (std::int64_t i = 0; i < repeat; ++i)
          wanted.select(0, k * repeat + i).copy_(means.select(0, k * repeat + i).slice(0, k * d, (k + 1) * d));
      const at::Tensor missing = (wanted - kept.squeeze(2)).view({1, size * repeat * d});
      correction[g] = (output[g] * missing).sum(1);
    }
    if (absorbed)
      output[g] = at::matmul(heads.permute({1, 2, 0, 3}), decoders)
                      .permute({2, 0, 1, 3})
                      .reshape({w.hidden, size * repeat * r});
    round_all(rounding, std::string(names.output) + ".weight", output[g]);
    if (!absorbed) value_up[g] = basis.decoder.view({size, d, r});
  });
  NewTensors made;
  put(made, names.value, joined(value, 0), joined(value_bias, 0));
  at::Tensor bias = w.output_bias.defined() ? w.output_bias.to(at::kDouble) : w.output_bias;
  if (problem.centred_values && options.values != ValueFold::meanpool)
    for (const at::Tensor& part : correction) bias = bias + part;
  put(made, names.output, joined(output, 1), bias);
  if (!absorbed) made["value_up.weight"] = at::cat(value_up, 0);
  return made;
}

std::vector<TensorSpec> folded_tensors(const Reader& reader, const FoldOptions& options,
                                       const std::vector<LayerTarget>& targets,
                                       const std::vector<std::string>& refitted) {
  return layout(reader, options, targets, refitted).tensors;
}

std::vector<std::string> untouched_tensors(const Reader& reader, const FoldOptions& options,
                                           const std::vector<LayerTarget>& targets,
                                           const std::vector<std::string>& refitted) {
  return layout(reader, options, targets, refitted).untouched;
}

std::int64_t bytes_per_element(const std::string& dtype) {
  return dtype == "float32" ? 4 : 2;
}

Json folded_model_config(const ModelConfig& source, const std::vector<LayerTarget>& targets, KvLayout layout) {
  const std::vector<checkpoint::LayerShape> shapes = shapes_of(targets);
  const bool even = std::all_of(shapes.begin(), shapes.end(), [&](const auto& one) { return one == shapes.front(); });
  if (even && layout != KvLayout::latent) return checkpoint::folded_config(source, shapes.front().kv_heads, layout);
  return checkpoint::folded_config(source, shapes, layout);
}

OrderedJson headfold_record(const Reader& reader, const calibration::StatisticsFile* statistics, const Plan& plan) {
  const ModelConfig& before = reader.config();
  const std::vector<LayerTarget> targets = targets_of(plan);
  const ModelConfig after = checkpoint::parse_config(folded_model_config(before, targets, layout_of(plan.options)),
                                                     "config.json of the folded model");
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
  json["stock"] = is_stock(plan.options, before) && !after.uneven();
  json["kv_heads"] = OrderedJson{{"before", before.kv_heads}, {"after", plan.options.kv_heads}};
  if (after.uneven() || after.layout == KvLayout::latent) {
    json["kv_heads"]["per_layer"] = OrderedJson::array();
    for (const LayerTarget& target : targets) json["kv_heads"]["per_layer"].push_back(target.groups.size());
  }
  json["heads"] = before.heads;
  json["layers_total"] = before.layers;
  if (!plan.decisions.is_null()) json["decisions"] = plan.decisions;
  json["cache_bytes_per_token"] =
      OrderedJson{{"before", before.cache_bytes_per_token(element)}, {"after", after.cache_bytes_per_token(element)}};
  json["parameters"] =
      OrderedJson{{"before", checkpoint::parameter_count(before)}, {"after", checkpoint::parameter_count(after)}};
  json["layers"] = OrderedJson::array();
  for (const LayerPlan& layer : plan.layers) {
    OrderedJson one;
    one["layer"] = layer.layer;
    one["kv_heads"] = layer.groups.size();
    one["key_width"] = layer.key_width;
    one["value_width"] = layer.value_width;
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
    if (layer.key_held_out() >= 0) {
      one["key_fitted"] = layer.key_fitted();
      one["key_held_out"] = layer.key_held_out();
      one["value_fitted"] = layer.value_fitted();
      one["value_held_out"] = layer.value_held_out();
    }
    for (const auto& [name, member] : {std::pair{"imaginary_share", &GroupPlan::imaginary_share},
                                       std::pair{"leading_share", &GroupPlan::leading_share}}) {
      std::vector<double> mean((layer.groups[0].*member).size(), 0.0);
      for (const GroupPlan& group : layer.groups)
        for (std::size_t i = 0; i < mean.size(); ++i)
          mean[i] += (group.*member).at(i) / static_cast<double>(layer.groups.size());
      if (!mean.empty()) one[name] = mean;
    }
    json["layers"].push_back(std::move(one));
  }
  return json;
}

NewTensors folded_layer(const Reader& reader, const calibration::StatisticsFile* statistics, const LayerTarget& target,
                        std::int64_t layer, const FoldOptions& options, const KeptBases* kept) {
  const LayerProblem problem = load_for_apply(reader, statistics, layer, Part::both, options, target.groups, kept);
  NewTensors made = folded_keys(problem, target, options);
  made.merge(folded_values(problem, target, options));
  return made;
}

NewTensors expanded_part(const Reader& reader, const calibration::StatisticsFile* statistics, const LayerTarget& target,
                         std::int64_t layer, Part part, const FoldOptions& options) {
  const ModelConfig& config = reader.config();
  if (part == Part::both || layout_of(options) != KvLayout::gqa || moves_heads(target.groups))
    throw InternalError("only one side of a fold to contiguous groups of a gqa model can be expanded");
  LayerProblem problem;
  for_each_item(1, [&](std::int64_t) { problem = load_problem(reader, statistics, layer, part, options); });
  NewTensors made =
      part == Part::keys ? folded_keys(problem, target, options) : folded_values(problem, target, options);
  const Names names = names_of(problem.rotates);
  const auto count = static_cast<std::int64_t>(target.groups.size());
  for (const char* suffix : {".weight", ".bias"}) {
    const auto found = made.find((part == Part::keys ? names.key : names.value) + std::string(suffix));
    if (found == made.end()) continue;
    const at::Tensor heads = found->second.reshape({count, 1, config.head_dim, -1});
    const at::Tensor repeated = heads.expand({count, config.kv_heads / count, config.head_dim, heads.size(3)});
    found->second = repeated.reshape({config.kv_heads * config.head_dim, -1});
    if (suffix == std::string(".bias")) found->second = found->second.view({-1});
  }
  return made;
}

void apply_plan(const comm::Communicator& world, const Reader& reader, const calibration::StatisticsFile* statistics,
                const Plan& plan, const std::filesystem::path& folder, std::uint64_t max_shard_bytes,
                const Refit* refit, const KeptBases* kept, const OrderedJson& request,
                const std::vector<std::filesystem::path>& keep) {
  const ModelConfig& config = reader.config();
  if (plan.options.refit != (refit != nullptr))
    throw InternalError("the plan and apply_plan's arguments disagree on the refit");
  const std::vector<LayerTarget> targets = targets_of(plan);
  const Json folded_json = folded_model_config(config, targets, layout_of(plan.options));
  const ModelConfig folded = checkpoint::parse_config(folded_json, "config.json of the folded model");
  const std::vector<std::string> refitted =
      refit == nullptr ? std::vector<std::string>{} : refitted_tensors(folded, *refit->options);
  const Layout target = layout(reader, plan.options, targets, refitted);
  OrderedJson record = headfold_record(reader, statistics, plan);
  if (!request.is_null()) record["request"] = request;
  std::map<std::string, std::string> dtypes;
  for (const TensorSpec& spec : target.tensors) dtypes[spec.name] = spec.dtype;

  checkpoint::ParallelWriter writer(world, folder, target.tensors, max_shard_bytes);
  const auto write = [&](const std::string& name, const at::Tensor& tensor) {
    const std::string& dtype = dtypes.at(name);
    // What a fold rounded piece by piece was checked then.
    const at::Tensor stored = tensor.scalar_type() == at::kDouble ? rounded(tensor, dtype, reader, name) : tensor;
    const Timed timed(Work::writing);
    writer.write(name, stored);
  };
  if (refit != nullptr) {
    record["refit"] = OrderedJson{{"options", to_json(*refit->options)},
                                  {"sequences", refit->sequences.size(0)},
                                  {"tokens", refit->sequences.size(1)},
                                  {"tensors", refitted},
                                  {"layers", OrderedJson::array()}};
    RefitOptions options = *refit->options;
    options.query_heads = query_order(targets, config);
    FoldedLayers folded_layers(world, config.layers, [&](std::int64_t layer) {
      return folded_layer(reader, statistics, targets[static_cast<std::size_t>(layer)], layer, plan.options, kept);
    });
    refit_layers(
        world, reader, folded, refit->sequences, options, [&](std::int64_t layer) { return folded_layers(layer); },
        [&](std::int64_t layer, const NewTensors& tensors, const LayerRefit& report) {
          record["refit"]["layers"].push_back(to_json(report));
          if (refit->report) refit->report(report);
          if (layer % world.size() != world.rank()) return;
          const std::string prefix = attention_prefix(reader, layer);
          std::set<std::string> names(refitted.begin(), refitted.end());
          for (const auto& [tail, shape] :
               made_tensors(config, plan.options, targets[static_cast<std::size_t>(layer)], Part::both))
            names.insert(tail);
          for (const std::string& tail : names) write(full_name(prefix, tail), tensors.at(tail));
        });
  } else {
    const auto [begin, end] = share_of(2 * config.layers, world.rank(), world.size());
    Progress progress("fold", "half layer", static_cast<double>(end - begin), world.root());
    for (std::int64_t item = begin; item < end && !stop_requested(); ++item) {
      const std::int64_t layer = item / 2;
      const Part part = item % 2 == 0 ? Part::keys : Part::values;
      const LayerTarget& list = targets[static_cast<std::size_t>(layer)];
      const LayerProblem problem = load_for_apply(reader, statistics, layer, part, plan.options, list.groups, kept);
      const std::string prefix = attention_prefix(reader, layer);
      // Piece by piece: a quarter of the memory that whole matrices in float64 would pass through.
      const Rounding rounding = [&](const std::string& tail, const at::Tensor& piece) {
        const auto dtype = dtypes.find(prefix + tail);
        return dtype == dtypes.end() ? piece : rounded(piece, dtype->second, reader, dtype->first);
      };
      const NewTensors made = part == Part::keys ? folded_keys(problem, list, plan.options, rounding)
                                                 : folded_values(problem, list, plan.options, rounding);
      for (const auto& [tail, shape] : made_tensors(config, plan.options, list, part))
        write(prefix + tail, made.at(tail));
      progress.advance(1);
    }
  }
  comm::stop_if_requested(world, kStoppedWriting);
  // Untouched tensors: every rank copies an equal share of their bytes, whole tensors.
  std::uint64_t total = 0;
  for (const std::string& name : target.untouched) total += reader.info(name).end - reader.info(name).begin;
  std::vector<std::string> own;
  std::uint64_t before = 0;
  for (const std::string& name : target.untouched) {
    const std::uint64_t bytes = reader.info(name).end - reader.info(name).begin;
    const double middle = static_cast<double>(before) + 0.5 * static_cast<double>(bytes);
    const int owner =
        total == 0 ? 0
                   : std::min(world.size() - 1, static_cast<int>(middle / static_cast<double>(total) * world.size()));
    before += bytes;
    if (owner == world.rank()) own.push_back(name);
  }
  for_each_item(std::ssize(own), [&](std::int64_t i) {
    if (stop_requested()) return;
    const Timed timed(Work::copying);
    const std::string& name = own[static_cast<std::size_t>(i)];
    reader.will_need(name);
    writer.write(name, reader.view(name));
    reader.done_with(name);
  });
  comm::stop_if_requested(world, kStoppedWriting);
  const Timed timed(Work::sync);
  std::vector<std::filesystem::path> copies = checkpoint::companion_files(reader.folder());
  copies.insert(copies.end(), keep.begin(), keep.end());
  writer.finish(folded_json, record, copies);
}

}  // namespace headfold::folding
