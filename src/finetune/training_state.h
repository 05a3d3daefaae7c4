#pragma once
// Where a training stands, and the files that say so (docs/formats.md, "Training state").

#include <headfold/base/json.h>
#include <headfold/finetune/optimizer.h>
#include <headfold/finetune/trainable.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace headfold::finetune {

/// Where a run stands after `step` steps.
struct TrainState {
  std::int64_t step = 0;
  std::int64_t tokens = 0;                           ///< input tokens so far
  double seconds = 0;                                ///< in steps and validations, over all starts of the job
  std::int64_t best_step = -1;                       ///< -1: not validated yet
  double best_loss = 0;                              ///< cross-entropy on the validation text, nats per token
  std::int64_t worse = 0;                            ///< validations since
  double first_validation = 0, last_validation = 0;  ///< cross-entropy; 0 without validation
  double first_divergence = 0, last_divergence = 0;  ///< nats per token, with a teacher
  double last_loss = 0;                              ///< training loss of the last step
  bool early = false;                                ///< ended by patience
};
OrderedJson to_json(const TrainState& state);
/// CorruptFile naming `file` for counts and losses that no run can have.
TrainState state_from(const Json& json, const std::string& file);

/// `state.json` of a checkpoint.
struct StoredState {
  TrainState state;
  std::int64_t adam_steps = 0;
  Json identity;  ///< of the training (TrainOptions::identity)
};
OrderedJson to_json(const StoredState& stored);
/// Reads folder/state.json. CorruptFile, IoError, InputError naming it.
StoredState read_state(const std::filesystem::path& folder);

/// Source of the tensors in a file of a training state. Everything is looked at before it returns: CorruptFile naming
/// file and tensor unless the file holds float32 tensors of just the parameters' names and shapes, all numbers finite,
/// and none negative with `squares` (second moments). Pages of the file are let go tensor by tensor.
TensorSource stored_tensors(const std::filesystem::path& file, const std::vector<Parameter>& parameters,
                            bool squares = false);

}  // namespace headfold::finetune
