#pragma once
// The training loop: data-parallel steps, validation, checkpoints, resume and stopping on request.

#include <headfold/comm/communicator.h>
#include <headfold/finetune/data.h>
#include <headfold/finetune/optimizer.h>
#include <headfold/finetune/teacher.h>
#include <headfold/finetune/trainable.h>
#include <headfold/finetune/training_state.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace headfold::finetune {

struct TrainOptions {
  std::int64_t batch = 32;       ///< sequences of a step, over all ranks
  std::int64_t micro_batch = 1;  ///< sequences that go through the model together
  std::uint64_t seed = 0;        ///< order of the data, dropout
  Schedule schedule;             ///< with the number of steps
  AdamOptions adam;
  double clip = 1;  ///< largest norm of the gradient; 0: no limit
  LossOptions loss;
  std::int64_t validate_every = 0;    ///< steps; 0: only before the first and after the last one
  std::int64_t patience = 0;          ///< validations without a new best before training ends; 0: never
  std::int64_t checkpoint_every = 0;  ///< steps; 0: only when stopped and after the last one
  bool shard_optimizer = false;
  /// What decides the result, as one JSON text: a checkpoint of another identity is not resumed from.
  std::string identity;
  std::filesystem::path folder;  ///< gets checkpoints/ and train.jsonl; a file STOP in it stops the run
  double report_seconds = 10;    ///< between progress lines of rank 0
};

/// One training run. Micro-batches are formed from the whole batch and dealt to ranks in turn, gradients are scaled by
/// the scored tokens of the whole batch, dropout is a function of (seed, step, sequence): what is trained does not
/// depend on the number of ranks beyond the order of float32 sums. At one rank count a run that was stopped and resumed
/// has the bits of one that was not.
class Trainer {
 public:
  /// All references must outlive it. `validation` and `teacher` may be null; `validation_teacher` (whose sequences are
  /// the validation text's) adds the divergence on validation text. Collective.
  Trainer(const comm::Communicator& world, TrainableModel& model, const Dataset& data, const Dataset* validation,
          const Teacher* teacher, const Teacher* validation_teacher, TrainOptions options);
  ~Trainer();

  /// Takes the newest readable checkpoint in the folder, if there is one; returns whether. Collective. InputError when
  /// it was made with another identity.
  bool resume();
  /// Trains up to the last step or early end, then saves. Collective. Stopped, after saving, once `stop_requested` says
  /// so on any rank or the file STOP exists. NumericalError naming step and sequences when loss or gradient are not
  /// finite: values and checkpoints stay those of the last good step.
  const TrainState& run(const std::function<bool()>& stop_requested = {});
  /// Values of the best validated step, or of the last one without validation, into the model. Returns that step.
  std::int64_t take_best();
  const TrainState& state() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace headfold::finetune
