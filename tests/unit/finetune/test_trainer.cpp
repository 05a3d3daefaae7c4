// Whole training runs on a tiny model: the same at any rank count, resumable, stoppable, with teachers.

#include <gmock/gmock.h>
#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/base/json.h>
#include <headfold/checkpoint/safetensors.h>
#include <headfold/finetune/trainer.h>

#include <cmath>
#include <fstream>

#include "world.h"

namespace headfold::finetune {
namespace {

using testing::HasSubstr;
using testing_support::ScratchFolder;
using testing_support::world;

constexpr std::int64_t kVocab = 128;

fs::path model_folder() {
  return testing_support::golden_folder() / "llama-mha";
}

/// Sequences with a rule in them, so that there is something to learn.
Dataset dataset(std::int64_t sequences, std::int64_t length, bool blocks = false) {
  std::vector<std::int32_t> tokens;
  std::uint64_t noise = 1;
  for (std::int64_t i = 0; i <= sequences * length; ++i) {
    noise = mixed(noise, static_cast<std::uint64_t>(i));
    const std::int64_t last = tokens.empty() ? 1 : tokens.back();
    tokens.push_back(static_cast<std::int32_t>(noise % 4 == 0 ? noise / 4 % kVocab : (last * 5 + 3) % kVocab));
  }
  std::vector<std::uint8_t> flags(static_cast<std::size_t>(sequences * length), 0);
  for (std::size_t i = 0; i < flags.size(); ++i) {
    if (i % 13 == 5) flags[i] = Dataset::unscored;  // unequal numbers of scored positions
    if (blocks && (i + 1) % static_cast<std::size_t>(length) == 0) flags[i] = Dataset::unscored;
  }
  return Dataset(length, std::move(tokens), std::move(flags));
}

LoraOptions lora() {
  LoraOptions options;
  options.rank = 4;
  options.alpha = 8;
  options.dropout = 0.1;
  options.seed = 5;
  return options;
}

TrainOptions train_options(const fs::path& folder, std::int64_t steps) {
  TrainOptions options;
  options.batch = 8;
  options.micro_batch = 2;
  options.seed = 7;
  options.schedule.peak = 1e-2;
  options.schedule.warm_up = 3;
  options.schedule.steps = steps;
  options.adam.weight_decay = 0.01;
  options.folder = folder;
  options.identity = "{\"test\": 1}";
  return options;
}

struct Trained {
  TrainState state;
  std::map<std::string, at::Tensor> values;
};

/// One start of the job. `stop_after` 0: not stopped. InternalError when it should have stopped and did not.
Trained train(const comm::Communicator& ranks, const TrainOptions& options, const Dataset& data,
              const Dataset* validation = nullptr, std::int64_t stop_after = 0, const Teacher* teacher = nullptr,
              const LoraOptions& adapters = lora()) {
  const checkpoint::Reader reader(model_folder());
  TrainableModel model(reader, adapters, at::kFloat);
  Trainer trainer(ranks, model, data, validation, teacher, nullptr, options);
  trainer.resume();
  std::int64_t calls = trainer.state().step;
  Trained run;
  try {
    trainer.run([&] { return ++calls == stop_after && ranks.root(); });  // one rank alone is told
    if (stop_after > 0) throw InternalError("it did not stop");
  } catch (const Stopped&) {
    if (stop_after == 0) throw;
  }
  run.state = trainer.state();
  for (const Parameter& parameter : model.parameters()) run.values[parameter.name] = parameter.value.clone();
  return run;
}

std::vector<Json> lines_of(const fs::path& folder) {
  std::vector<Json> lines;
  std::ifstream file(folder / "train.jsonl");
  for (std::string line; std::getline(file, line);) lines.push_back(Json::parse(line));
  return lines;
}
std::vector<double> losses_of(const fs::path& folder) {
  std::vector<double> losses;
  for (const Json& line : lines_of(folder))
    if (line.contains("loss")) losses.push_back(line["loss"].get<double>());
  return losses;
}

TEST(TrainerTest, loss_curve_does_not_depend_on_the_number_of_ranks) {
  const ScratchFolder scratch;
  const Dataset data = dataset(24, 16);
  // Every rank trains alone as well, in a folder of its own.
  const fs::path alone = scratch / ("alone-" + std::to_string(world().rank()));
  train(comm::Communicator::self(), train_options(alone, 50), data);
  const std::vector<double> expected = losses_of(alone);
  ASSERT_EQ(expected.size(), 50U);
  EXPECT_LT(expected.back(), expected.front() - 0.1);  // it learns
  for (const bool shard : {false, true}) {
    const fs::path together = scratch / (shard ? "shards" : "together");
    TrainOptions options = train_options(together, 50);
    options.shard_optimizer = shard;
    train(world(), options, data);
    world().barrier("trained");
    const std::vector<double> losses = losses_of(together);
    ASSERT_EQ(losses.size(), expected.size());
    for (std::size_t i = 0; i < losses.size(); ++i)
      EXPECT_NEAR(losses[i], expected[i], 1e-5 * expected[i]) << "step " << i + 1 << " shard " << shard;
  }
}

TEST(TrainerTest, a_resumed_run_has_the_bits_of_an_uninterrupted_one) {
  const ScratchFolder scratch;
  const Dataset data = dataset(20, 16), held_out = dataset(4, 16, true);
  TrainOptions whole = train_options(scratch / "whole", 9), parts = train_options(scratch / "parts", 9);
  whole.validate_every = parts.validate_every = 2;
  whole.checkpoint_every = parts.checkpoint_every = 3;
  const Trained expected = train(world(), whole, data, &held_out);
  EXPECT_EQ(expected.state.step, 9);
  EXPECT_EQ(train(world(), parts, data, &held_out, 4).state.step, 4);
  // A rank that was killed between checkpoints leaves lines of steps that will be trained again.
  world().on_root([&] {
    std::ofstream(scratch / "parts" / "train.jsonl", std::ios::app)
        << "{\"step\": 5, \"loss\": 1}\n{\"step\": 6, \"loss\": 1}\n{\"step\": 7, \"lo";
  });
  EXPECT_EQ(train(world(), parts, data, &held_out, 7).state.step, 7);
  const Trained resumed = train(world(), parts, data, &held_out);
  ASSERT_EQ(resumed.state.step, 9);
  for (const auto& [name, value] : expected.values) EXPECT_TRUE(at::equal(value, resumed.values.at(name))) << name;
  EXPECT_EQ(resumed.state.best_step, expected.state.best_step);
  EXPECT_EQ(resumed.state.best_loss, expected.state.best_loss);
  EXPECT_EQ(resumed.state.tokens, expected.state.tokens);
  EXPECT_EQ(losses_of(scratch / "parts"), losses_of(scratch / "whole"));
  if (world().root()) {
    // Two latest, nothing half-written.
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(scratch / "parts" / "checkpoints"))
      if (!entry.path().filename().string().starts_with("best-")) names.push_back(entry.path().filename().string());
    EXPECT_THAT(names, testing::UnorderedElementsAre("step-7", "step-9"));
    EXPECT_TRUE(fs::exists(scratch / "parts" / "checkpoints" / fmt::format("best-{}", expected.state.best_step)));
  }
  // At another rank count to rounding: what all ranks began, rank 0 ends alone.
  TrainOptions other = train_options(scratch / "other", 9);
  train(world(), other, data, nullptr, 4);
  if (world().root()) {
    const Trained alone = train(comm::Communicator::self(), other, data);
    EXPECT_EQ(alone.state.step, 9);
    for (const auto& [name, value] : expected.values)
      EXPECT_TRUE(at::allclose(value, alone.values.at(name), 1e-3, 1e-5)) << name;
  }
}

TEST(TrainerTest, a_torn_checkpoint_gives_way_to_the_one_before) {
  const ScratchFolder scratch;
  const Dataset data = dataset(20, 16);
  TrainOptions options = train_options(scratch / "run", 8);
  const Trained expected = train(world(), train_options(scratch / "whole", 8), data);
  options.checkpoint_every = 2;
  train(world(), options, data, nullptr, 4);
  world().on_root([&] {
    const fs::path file = scratch / "run" / "checkpoints" / "step-4" / "moments-second.safetensors";
    const std::string bytes = read_file(file);
    write_file(file, bytes.substr(0, bytes.size() / 2));
  });
  const Trained resumed = train(world(), options, data);
  for (const auto& [name, value] : expected.values) EXPECT_TRUE(at::equal(value, resumed.values.at(name))) << name;
}

TEST(TrainerTest, whatever_is_wrong_with_a_checkpoint_the_one_before_is_taken) {
  const ScratchFolder scratch;
  const Dataset data = dataset(20, 16);
  const Trained expected = train(world(), train_options(scratch / "whole", 6), data);
  const auto edit = [](const fs::path& file, const std::function<void(std::map<std::string, at::Tensor>&)>& change) {
    std::map<std::string, at::Tensor> tensors;
    {
      const checkpoint::SafetensorsFile stored(file);
      for (const auto& [name, info] : stored.tensors()) tensors[name] = stored.view(name).clone();
    }
    change(tensors);
    checkpoint::write_safetensors(file, tensors);
  };
  const std::vector<std::pair<const char*, std::function<void(const fs::path&)>>> damages = {
      {"NaN",
       [&](const fs::path& f) {
         edit(f / "parameters.safetensors", [](auto& t) { t.begin()->second.view({-1})[0] = NAN; });
       }},
      {"negative square",
       [&](const fs::path& f) {
         edit(f / "moments-second.safetensors", [](auto& t) { t.begin()->second.view({-1})[0] = -1; });
       }},
      {"tensor missing",
       [&](const fs::path& f) { edit(f / "moments-first.safetensors", [](auto& t) { t.erase(t.begin()); }); }},
      {"another model's",
       [&](const fs::path& f) {
         edit(f / "parameters.safetensors", [](auto& t) { t.begin()->second = at::zeros({3, 3}); });
       }},
      {"step of another",
       [&](const fs::path& f) {
         Json json = read_json(f / "state.json");
         json["state"]["step"] = json["adam_steps"] = 3;
         write_json(f / "state.json", json);
       }},
      {"steps that differ",
       [&](const fs::path& f) {
         Json json = read_json(f / "state.json");
         json["adam_steps"] = -1;
         write_json(f / "state.json", json);
       }},
      {"damaged identity",
       [&](const fs::path& f) {
         Json json = read_json(f / "state.json");
         json["identity"]["test"] = 77;
         write_json(f / "state.json", json);
       }},
      {"state of text", [&](const fs::path& f) { write_file(f / "state.json", "[1, 2"); }},
      {"no state", [&](const fs::path& f) { fs::remove(f / "state.json"); }},
  };
  int number = 0;
  for (const auto& [what, damage] : damages) {
    TrainOptions options = train_options(scratch / fmt::format("run-{}", ++number), 6);
    options.checkpoint_every = 2;
    train(world(), options, data, nullptr, 4);
    world().on_root([&, &harm = damage] { harm(options.folder / "checkpoints" / "step-4"); });
    const Trained resumed = train(world(), options, data);
    for (const auto& [name, value] : expected.values)
      EXPECT_TRUE(at::equal(value, resumed.values.at(name))) << what << ' ' << name;
  }
}

TEST(TrainerTest, another_training_is_not_resumed) {
  const ScratchFolder scratch;
  const Dataset data = dataset(10, 16);
  TrainOptions options = train_options(scratch / "run", 2);
  train(world(), options, data);
  options.identity = "{\"test\": 2}";
  try {
    train(world(), options, data);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::bad_input);
    EXPECT_THAT(error.what(), HasSubstr("other options"));
  }
}

TEST(TrainerTest, a_stop_file_stops_after_the_step_at_hand) {
  const ScratchFolder scratch;
  const Dataset data = dataset(10, 16);
  const TrainOptions options = train_options(scratch / "run", 5);
  world().on_root([&] { write_file(scratch / "run" / "STOP", ""); });
  EXPECT_THROW(train(world(), options, data), Stopped);
  EXPECT_TRUE(fs::exists(scratch / "run" / "checkpoints" / "step-1" / "state.json"));
  world().barrier("seen");
  world().on_root([&] { fs::remove(scratch / "run" / "STOP"); });
  EXPECT_EQ(train(world(), options, data).state.step, 5);
}

TEST(TrainerTest, patience_ends_a_run_and_the_best_step_is_taken) {
  const ScratchFolder scratch;
  const Dataset data = dataset(20, 16), held_out = dataset(4, 16, true);
  TrainOptions options = train_options(scratch / "run", 200);
  options.schedule.peak = 0.3;  // soon worse than at the start
  options.schedule.warm_up = 0;
  options.validate_every = 1;
  options.patience = 3;
  const checkpoint::Reader reader(model_folder());
  TrainableModel model(reader, lora(), at::kFloat);
  Trainer trainer(world(), model, data, &held_out, nullptr, nullptr, options);
  const TrainState state = trainer.run();
  EXPECT_TRUE(state.early);
  EXPECT_LT(state.step, 200);
  EXPECT_EQ(state.step, state.best_step + 3);
  EXPECT_EQ(trainer.take_best(), state.best_step);
  std::vector<std::int64_t> all = {0, 1, 2, 3};
  const LossSums sums = model.evaluate(held_out.batch(all), nullptr, {});
  EXPECT_NEAR(sums.cross_entropy / static_cast<double>(sums.tokens), state.best_loss, 1e-5);
}

TEST(TrainerTest, a_loss_that_is_no_number_names_step_and_sequences_and_keeps_the_last_good_state) {
  const ScratchFolder scratch;
  const Dataset data = dataset(10, 16);
  TrainOptions options = train_options(scratch / "run", 20);
  options.schedule.peak = 1e25;
  options.schedule.warm_up = 0;
  options.clip = 0;
  options.checkpoint_every = 1;
  try {
    train(world(), options, data);
    FAIL() << "no error";
  } catch (const NumericalError& error) {
    EXPECT_THAT(error.what(), testing::AllOf(HasSubstr("step "), HasSubstr("sequences ")));
    EXPECT_THAT(error.hint(), HasSubstr("holds the state after step"));
  }
  world().barrier("failed");
  const std::size_t lines = lines_of(scratch / "run").size();
  EXPECT_TRUE(fs::exists(scratch / "run" / "checkpoints" / fmt::format("step-{}", lines) / "state.json"));
}

TEST(TeacherTest, cached_predictions_train_as_the_live_teacher_does) {
  const ScratchFolder scratch;
  const Dataset data = dataset(10, 16);
  const checkpoint::Reader reader(model_folder());
  // A student that is off: only then is there something to learn from the teacher.
  LoraOptions adapters = lora();
  adapters.dropout = 0;
  const LiveTeacher live(reader, at::kFloat);
  TrainOptions options = train_options(scratch / "live", 12);
  options.loss.distill_weight = 0.5;
  train(world(), options, data, nullptr, 0, &live, adapters);
  write_teacher_cache(world(), scratch / "teacher.safetensors", live, "the-teacher", data, kVocab, 3);
  const CachedTeacher cached(scratch / "teacher.safetensors", data, kVocab, "the-teacher");
  EXPECT_EQ(cached.width(), kVocab);
  options.folder = scratch / "cached";
  train(world(), options, data, nullptr, 0, &cached, adapters);
  write_teacher_cache(world(), scratch / "few.safetensors", live, "the-teacher", data, 8, 3);
  const CachedTeacher few(scratch / "few.safetensors", data, kVocab, "");
  options.folder = scratch / "few";
  train(world(), options, data, nullptr, 0, &few, adapters);
  world().barrier("trained");
  const std::vector<Json> from_live = lines_of(scratch / "live"), from_file = lines_of(scratch / "cached"),
                          from_few = lines_of(scratch / "few");
  ASSERT_EQ(from_live.size(), from_file.size());
  for (std::size_t i = 0; i < from_live.size(); ++i) {
    EXPECT_NEAR(from_live[i]["loss"].get<double>(), from_file[i]["loss"].get<double>(), 2e-5);
    EXPECT_NEAR(from_live[i]["kl"].get<double>(), from_file[i]["kl"].get<double>(), 2e-5);
    // Merging classes can only hide divergence.
    if (i < 3) {
      EXPECT_LE(from_few[i]["kl"].get<double>(), from_live[i]["kl"].get<double>() + 1e-4);
    }
  }
  EXPECT_NEAR(from_live.front()["kl"].get<double>(), 0, 1e-5);  // at the start the student is the teacher
  // The same file at another rank count.
  if (world().root()) {
    const comm::Communicator self = comm::Communicator::self();
    write_teacher_cache(self, scratch / "alone.safetensors", live, "the-teacher", data, 8, 3);
    EXPECT_EQ(read_file(scratch / "alone.safetensors"), read_file(scratch / "few.safetensors"));
  }
  // Validation text of its own, with a file of its own: over the whole vocabulary the divergence is the live teacher's.
  const Dataset held_out = dataset(5, 12, true);
  EXPECT_EQ(validation_cache(scratch / "x.y.safetensors"), scratch / "x.y-validation.safetensors");
  write_teacher_cache(world(), scratch / "held.safetensors", live, "the-teacher", held_out, kVocab, 2);
  write_teacher_cache(world(), scratch / "held-few.safetensors", live, "the-teacher", held_out, 8, 2);
  const CachedTeacher held(scratch / "held.safetensors", held_out, kVocab, "the-teacher");
  const CachedTeacher held_few(scratch / "held-few.safetensors", held_out, kVocab, "the-teacher");
  const auto validated = [&](const char* name, const Teacher& validation_teacher) {
    TrainOptions own = train_options(scratch / name, 4);
    own.loss.distill_weight = 0.5;
    const checkpoint::Reader again(model_folder());
    TrainableModel model(again, adapters, at::kFloat);
    Trainer trainer(world(), model, data, &held_out, &cached, &validation_teacher, own);
    return trainer.run();
  };
  const TrainState by_live = validated("by-live", live), by_file = validated("by-file", held),
                   by_few = validated("by-few", held_few);
  EXPECT_GT(by_live.last_divergence, 1e-5);
  EXPECT_NEAR(by_file.last_divergence, by_live.last_divergence, 1e-6);
  EXPECT_LE(by_few.last_divergence, by_live.last_divergence + 1e-6);
  EXPECT_GT(by_few.last_divergence, 0);
  world().barrier("validated");
  EXPECT_FALSE(lines_of(scratch / "by-live").back().contains("validation_kl_top"));
  EXPECT_EQ(lines_of(scratch / "by-few").back().at("validation_kl_top"), 8);
  EXPECT_EQ(lines_of(scratch / "by-few").back().at("validation_kl").get<double>(), by_few.last_divergence);
  const Dataset other = dataset(11, 16);
  EXPECT_THROW(CachedTeacher(scratch / "few.safetensors", other, kVocab, ""), InputError);
  EXPECT_THROW(CachedTeacher(scratch / "few.safetensors", data, kVocab + 1, ""), InputError);
  EXPECT_THROW(CachedTeacher(scratch / "few.safetensors", data, kVocab, "another"), InputError);
}

TEST(TeacherTest, another_vocabulary_or_tokenizer_is_refused) {
  const fs::path models = testing_support::source_folder() / "demo" / "models";
  const checkpoint::ModelConfig llama = checkpoint::read_config(models / "prose-llama");
  const checkpoint::ModelConfig bloom = checkpoint::read_config(models / "prose-bloom");
  const std::string text = "It was a bright day in the garden.";
  EXPECT_NO_THROW(check_teacher(models / "prose-llama", llama, models / "prose-llama", llama, text));
  ASSERT_EQ(llama.vocab, bloom.vocab);  // sizes alone would not tell
  EXPECT_THROW(check_teacher(models / "prose-llama", llama, models / "prose-bloom", bloom, text), InputError);
  checkpoint::ModelConfig wider = llama;
  wider.vocab += 1;
  EXPECT_THROW(check_teacher(models / "prose-llama", llama, models / "prose-llama", wider, text), InputError);
}

}  // namespace
}  // namespace headfold::finetune
