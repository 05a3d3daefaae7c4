#pragma once
// Plan + statistics + weights -> a new model folder.

#include <headfold/checkpoint/writer.h>
#include <headfold/folding/bases.h>

#include <filesystem>
#include <functional>
#include <map>

namespace headfold::folding {

/// New attention tensors of one layer, float64, by the last part of their name ("k_proj.weight", "dense.bias", …). Only
/// what the fold changes.
using NewTensors = std::map<std::string, at::Tensor>;

/// Rounds one piece of a new tensor, named by its tail, to what is stored; empty: float64 stays.
using Rounding = std::function<at::Tensor(const std::string& tail, const at::Tensor& piece)>;

/// Query and key side (methods.md 5, 6): merged keys and rotated queries; `projected`: key_fold.weight and
/// query_fold.weight. Source heads that a grouping moves take their query heads along (methods.md 8). `problem` needs
/// its keys loaded. Independent of thread count.
NewTensors folded_keys(const LayerProblem& problem, const LayerTarget& target, const FoldOptions& options,
                       const Rounding& rounding = {});
/// Value side (methods.md 4): merged values, output projection with the decoder absorbed, biases. `problem` needs its
/// values loaded.
NewTensors folded_values(const LayerProblem& problem, const LayerTarget& target, const FoldOptions& options,
                         const Rounding& rounding = {});

/// Tensors of the result: name, dtype (that of the tensor it was made from) and shape, in writing order.
/// `refitted`: last parts of names that a refit changes beside what the fold itself makes.
std::vector<checkpoint::TensorSpec> folded_tensors(const checkpoint::Reader& reader, const FoldOptions& options,
                                                   const std::vector<LayerTarget>& targets,
                                                   const std::vector<std::string>& refitted = {});
/// Stored names of the tensors that the fold leaves alone, byte for byte.
std::vector<std::string> untouched_tensors(const checkpoint::Reader& reader, const FoldOptions& options,
                                           const std::vector<LayerTarget>& targets,
                                           const std::vector<std::string>& refitted = {});

/// config.json of the result: stock for even LLaMA + gqa, otherwise as checkpoint::folded_config() says.
Json folded_model_config(const checkpoint::ModelConfig& source, const std::vector<LayerTarget>& targets,
                         checkpoint::KvLayout layout);
/// The content of headfold.json (docs/formats.md, section "headfold.json"). `statistics` may be null. No times, nothing
/// that depends on ranks.
OrderedJson headfold_record(const checkpoint::Reader& reader, const calibration::StatisticsFile* statistics,
                            const Plan& plan);

struct RefitOptions;
struct LayerRefit;
/// A refit (refit.h) that goes with applying a plan.
struct Refit {
  const RefitOptions* options = nullptr;
  at::Tensor sequences;                                  ///< [samples, tokens] int64, the same on every rank
  std::function<void(const LayerRefit& report)> report;  ///< called on every rank, layer by layer; may be empty
};

/// All folded tensors of one layer, float64: folded_keys() and folded_values().
NewTensors folded_layer(const checkpoint::Reader& reader, const calibration::StatisticsFile* statistics,
                        const LayerTarget& target, std::int64_t layer, const FoldOptions& options,
                        const KeptBases* kept = nullptr);

/// One side of a folded layer (layout gqa, contiguous groups; InternalError otherwise) in the source's own shapes:
/// every head of the result repeated for the source heads it stands for. With the other side left alone this is the
/// model in which only the keys, or only the values, of one layer are folded.
NewTensors expanded_part(const checkpoint::Reader& reader, const calibration::StatisticsFile* statistics,
                         const LayerTarget& target, std::int64_t layer, Part part, const FoldOptions& options);

/// Writes the folded model into `folder`: half layers (key side, value side; with a refit whole layers) and untouched
/// tensors are spread over `world`; bases are computed again from the plan's options and groups. The same bytes at any
/// rank and thread count. Collective. Throws IoError; NumericalError when a value does not fit the checkpoint's dtype.
/// After an error the folder holds no part of the new model. `refit` is needed when plan.options.refit says so
/// (InternalError otherwise). `kept`: bases of the make_plan() that made this very plan. headfold.json then says what
/// it did; `request`, unless null, is what decides the result, for recognising it. `keep`: files of the folder that
/// stay although they are no part of the model.
void apply_plan(const comm::Communicator& world, const checkpoint::Reader& reader,
                const calibration::StatisticsFile* statistics, const Plan& plan, const std::filesystem::path& folder,
                std::uint64_t max_shard_bytes = std::uint64_t{5} << 30, const Refit* refit = nullptr,
                const KeptBases* kept = nullptr, const OrderedJson& request = {},
                const std::vector<std::filesystem::path>& keep = {});

/// Bytes per element of a config's dtype ("float32", "float16", "bfloat16").
std::int64_t bytes_per_element(const std::string& dtype);

}  // namespace headfold::folding
