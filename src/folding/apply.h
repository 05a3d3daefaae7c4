#pragma once
// Plan + statistics + weights -> a new model folder.

#include <headfold/checkpoint/writer.h>
#include <headfold/folding/bases.h>

#include <filesystem>
#include <map>

namespace headfold::folding {

/// New attention tensors of one layer, float64, by the last part of their name ("k_proj.weight", "dense.bias", …). Only
/// what the fold changes.
using NewTensors = std::map<std::string, at::Tensor>;

/// Query and key side (methods.md 5, 6): merged keys and rotated queries; `projected`: key_fold.weight and
/// query_fold.weight. Source heads that a grouping moves take their query heads along (methods.md 8). `problem` needs
/// its keys loaded. Independent of thread count.
NewTensors folded_keys(const LayerProblem& problem, const Groups& groups, const FoldOptions& options);
/// Value side (methods.md 4): merged values, output projection with the decoder absorbed, biases. `problem` needs its
/// values loaded.
NewTensors folded_values(const LayerProblem& problem, const Groups& groups, const FoldOptions& options);

/// Tensors of the result: name, dtype (that of the tensor it was made from) and shape, in writing order.
std::vector<checkpoint::TensorSpec> folded_tensors(const checkpoint::Reader& reader, const FoldOptions& options,
                                                   const std::vector<Groups>& groups);
/// Stored names of the tensors that the fold leaves alone, byte for byte.
std::vector<std::string> untouched_tensors(const checkpoint::Reader& reader, const FoldOptions& options,
                                           const std::vector<Groups>& groups);

/// The content of headfold.json (docs/formats.md, section "headfold.json"). `statistics` may be null. No times, nothing
/// that depends on ranks.
OrderedJson headfold_record(const checkpoint::Reader& reader, const calibration::StatisticsFile* statistics,
                            const Plan& plan);

/// Writes the folded model into `folder`: half layers (key side, value side) and untouched tensors are spread over
/// `world`; bases are computed again from the plan's options and groups. The same bytes at any rank and thread count.
/// Collective. Throws IoError; NumericalError when a value does not fit the checkpoint's dtype. After an error the
/// folder holds no part of the new model.
void apply_plan(const comm::Communicator& world, const checkpoint::Reader& reader,
                const calibration::StatisticsFile* statistics, const Plan& plan, const std::filesystem::path& folder,
                std::uint64_t max_shard_bytes = std::uint64_t{5} << 30);

/// Bytes per element of a config's dtype ("float32", "float16", "bfloat16").
std::int64_t bytes_per_element(const std::string& dtype);

}  // namespace headfold::folding
