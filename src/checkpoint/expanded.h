#pragma once
// Dense equivalents: models of headfold's own layouts written as ordinary ones, for scoring in stock runtimes.

#include <headfold/checkpoint/layout.h>
#include <headfold/checkpoint/reader.h>
#include <headfold/comm/communicator.h>

#include <map>

namespace headfold::checkpoint {

/// Configuration of the ordinary model that computes what `config`'s does: a `latent` LLaMA gets the KV heads of its
/// source, layers with different numbers of KV heads get a number that all of theirs divide, BLOOM becomes multi-head.
/// Its KV cache is not smaller than the source's. `dtype` is "float32", "float16" or "bfloat16". Throws InputError with
/// the reason for `projected` (its matrices act after the rotation) and for models that are ordinary already.
ModelConfig expanded_config(const ModelConfig& config, const std::string& dtype);

/// Attention tensors of layer `layer` of the ordinary model that differ from the stored ones, float64, by full name in
/// the family's naming: W_K,k = B_k A W_K (docs/methods.md, section "latent"), values likewise or padded with zeros.
std::map<std::string, at::Tensor> expanded_layer(const Reader& reader, std::int64_t layer);

/// headfold.json of the ordinary model `after` (format "headfold-expanded").
OrderedJson expanded_record(const Reader& reader, const ModelConfig& after, const std::string& dtype);
/// Its tensors.
std::vector<TensorSpec> expanded_specs(const ModelConfig& after, const std::string& dtype);

/// Writes the ordinary model into `folder` in `dtype`; layers and other tensors are spread over `world`. Collective.
/// headfold.json is expanded_record(). InputError also when a value does not fit `dtype`.
void write_expanded(const comm::Communicator& world, const Reader& reader, const std::filesystem::path& folder,
                    const std::string& dtype, std::uint64_t max_shard_bytes);

}  // namespace headfold::checkpoint
