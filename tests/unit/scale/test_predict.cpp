// Laws of predictions: what doubles when work doubles, bubbles, links, what fits.

#include <gmock/gmock.h>
#include <headfold/checkpoint/synthetic.h>
#include <headfold/linalg/linalg.h>
#include <headfold/scale/predict.h>

#include <algorithm>

namespace headfold::scale {
namespace {

ModelConfig shape(const char* name) {
  return checkpoint::parse_config(checkpoint::shape_config(name), name);
}

/// One processor node with round figures.
Rates processor(int cores = 1 << 20) {
  Rates rates;
  rates.device = "cpu";
  rates.cores = cores;
  rates.node_memory = 1e15;
  for (const char* name : {"product", "attention", "element_wise", "gram", "attention_statistics", "head", "load"})
    rates.figures[std::string(name) + ".bfloat16"] = {1e12, "", "measured"};
  rates.figures["training.bfloat16"] = {1, "x", "measured"};
  for (const char* name : {"fold", "eigen", "memory", "read", "copy", "write", "statistics", "inside", "network"})
    rates.figures[name] = {1e11, "", "measured"};
  for (const char* name : {"inside_latency", "network_latency"}) rates.figures[name] = {1e-9, "s", "measured"};
  return rates;
}

CalibrateStage calibration(const char* name, std::int64_t samples, int stages) {
  CalibrateStage stage;
  stage.config = shape(name);
  stage.settings.collect.dtype = at::kBFloat16;
  stage.settings.length = 1024;
  stage.samples = samples;
  stage.stages = stages;
  return stage;
}
FinetuneStage training(const char* name) {
  FinetuneStage stage;
  stage.config = shape(name);
  stage.dtype = at::kBFloat16;
  stage.steps = 10;
  return stage;
}

double seconds_of(const Prediction& prediction, const std::string& what) {
  for (const Part& part : prediction.parts)
    if (part.what == what) return part.seconds;
  return 0;
}

TEST(Work, twice_the_tokens_are_twice_the_work_but_for_attention) {
  const ModelConfig config = shape("llama2-7b");
  const Work one = layer_work(config, 0, 1, 512, at::kBFloat16), two = layer_work(config, 0, 2, 512, at::kBFloat16),
             longer = layer_work(config, 0, 1, 1024, at::kBFloat16);
  EXPECT_DOUBLE_EQ(two.product, 2 * one.product);
  EXPECT_DOUBLE_EQ(longer.product, 2 * one.product);
  EXPECT_DOUBLE_EQ(two.attention, 2 * one.attention);
  EXPECT_DOUBLE_EQ(longer.attention, 4 * one.attention);
  EXPECT_DOUBLE_EQ(longer.element_bytes, 2 * one.element_bytes);
  // Known by hand: 4 h^2 + 3 h f weights, 2 FLOP each.
  EXPECT_DOUBLE_EQ(one.product, 2.0 * 512 * (4.0 * 4096 * 4096 + 3.0 * 4096 * 11008));
  EXPECT_DOUBLE_EQ(one.attention, 2.0 * 512 * 512 * 4096);
  EXPECT_DOUBLE_EQ(layer_work(config, 0, 1, 512, at::kFloat).element_bytes, 2 * one.element_bytes);
}

TEST(Work, training_takes_three_times_a_forward_pass_where_activations_are_kept) {
  const ModelConfig config = shape("llama2-7b");
  finetune::LoraOptions full;
  full.full = true;
  const Work kept = training_work(config, full, true, 1, 512, at::kBFloat16);
  const Work again = training_work(config, full, false, 1, 512, at::kBFloat16);
  const double forward = 32 * layer_work(config, 0, 1, 512, at::kBFloat16).product;
  EXPECT_DOUBLE_EQ(kept.product, 3 * forward);
  EXPECT_DOUBLE_EQ(again.product, (3 + 31.0 / 32) * forward);  // all layers but the last once more
  EXPECT_DOUBLE_EQ(kept.head, 3 * head_work(config, 512).head);
  finetune::LoraOptions lora;
  const double trained = trained_elements(config, lora);
  EXPECT_DOUBLE_EQ(trained, 32.0 * 4 * 16 * (4096 + 4096));
  EXPECT_DOUBLE_EQ(training_work(config, lora, true, 1, 512, at::kBFloat16).product, 2 * forward + 6 * trained * 512);
}

TEST(Work, a_conversion_writes_what_its_configuration_says) {
  for (const char* name : {"llama2-7b", "llama2-70b", "bloomz-7b1"}) {
    const ModelConfig config = shape(name);
    const FoldWork work = fold_work(config, config.kv_heads / 2, {}, false);
    const double untouched = checkpoint_bytes(config) - static_cast<double>(config.layers) * work.read_weights;
    const double after = checkpoint_bytes(folded(config, config.kv_heads / 2));
    // Biases of attention are counted with what is copied.
    EXPECT_NEAR((untouched + static_cast<double>(config.layers) * work.written) / after, 1, 1e-4) << name;
  }
}

TEST(Pipeline, seconds_follow_the_bubble_s_formula) {
  // A round of 16 per stage boundary at least: one round here.
  for (const int stages : {1, 2, 4})
    for (const std::int64_t count : {1, 5, 16}) {
      const std::vector<double> each(static_cast<std::size_t>(stages), 100.0);
      const double path = pipeline_seconds(each, count, 1024, false, 1000);
      if (stages > 1) {
        EXPECT_DOUBLE_EQ(path, 100.0 * static_cast<double>(count + stages - 1));
        EXPECT_NEAR(1 - 100.0 * static_cast<double>(count) / path, comm::pipeline_bubble(stages, count), 1e-12);
      } else {
        EXPECT_DOUBLE_EQ(path, 100.0 * static_cast<double>(count));
      }
    }
  EXPECT_DOUBLE_EQ(pipeline_seconds({1, 3, 2}, 10, 1024, false, 1000), 6 + 9 * 3.0);  // the slowest sets the pace
  EXPECT_DOUBLE_EQ(pipeline_seconds({1, 3, 2}, 10, 1024, true, 1000), 60);            // streamed: one after the other
  const Prediction prediction = predict(processor(), {1, 4, 0}, calibration("llama2-7b", 8, 4));
  EXPECT_NEAR(prediction.bubble, comm::pipeline_bubble(4, 8), 0.01);
}

TEST(Links, a_ring_crosses_nodes_as_often_as_its_ranks_do) {
  const Rates rates = processor();
  const Reduction inside = all_reduce(rates, {1, 4, 0}, {0, 1, 2, 3}, 1e9);
  EXPECT_DOUBLE_EQ(inside.moved.inside, 2 * 3 * 1e9);
  EXPECT_DOUBLE_EQ(inside.moved.network, 0);
  EXPECT_NEAR(inside.seconds, 2 * 0.75 * 1e9 / 1e11, 1e-6);
  const Reduction across = all_reduce(rates, {2, 2, 0}, {0, 1, 2, 3}, 1e9);
  EXPECT_DOUBLE_EQ(across.moved.inside, 2 * 1.5e9);
  EXPECT_DOUBLE_EQ(across.moved.network, 2 * 1.5e9);
  EXPECT_DOUBLE_EQ(all_reduce(rates, {2, 2, 0}, {3}, 1e9).seconds, 0);
  const Moved hops = pipeline_bytes({2, 4, 0}, 8, 1, 100);
  EXPECT_DOUBLE_EQ(hops.inside, 600);
  EXPECT_DOUBLE_EQ(hops.network, 100);
}

TEST(Predictions, compute_doubles_with_the_sequences_and_halves_with_the_ranks) {
  const Rates rates = processor();
  const Prediction one = predict(rates, {1, 1, 0}, calibration("llama2-7b", 64, 1)),
                   two = predict(rates, {1, 1, 0}, calibration("llama2-7b", 128, 1)),
                   shared = predict(rates, {1, 2, 0}, calibration("llama2-7b", 64, 1));
  for (const char* what : {"linear maps", "attention", "Grams"}) {
    ASSERT_GT(seconds_of(one, what), 0);
    EXPECT_NEAR(seconds_of(two, what), 2 * seconds_of(one, what), 1e-6);
    EXPECT_NEAR(seconds_of(shared, what), seconds_of(one, what) / 2, 1e-6);
  }
  EXPECT_DOUBLE_EQ(two.flops, 2 * one.flops);
  EXPECT_DOUBLE_EQ(shared.flops, one.flops);
  EXPECT_DOUBLE_EQ(one.moved.written, two.moved.written);
  double sum = 0;
  for (const Part& part : one.parts) sum += part.seconds;
  EXPECT_NEAR(one.seconds, sum, 1e-9 * sum);
  EXPECT_EQ(one.binds, "compute");
}

TEST(Predictions, ranks_beyond_the_cores_share_them) {
  const Prediction two = predict(processor(2), {1, 2, 0}, calibration("llama2-7b", 64, 1)),
                   four = predict(processor(2), {1, 4, 0}, calibration("llama2-7b", 64, 1));
  EXPECT_NEAR(seconds_of(four, "linear maps"), seconds_of(two, "linear maps"), 1e-6);
  EXPECT_THAT(four.notes, testing::Contains(testing::HasSubstr("share the 2 cores")));
  const Prediction steps = predict(processor(2), {1, 4, 0}, training("llama2-7b")),
                   apart = predict(processor(4), {1, 4, 0}, training("llama2-7b"));
  const char* what = "linear maps, forward and backward";
  EXPECT_NEAR(seconds_of(steps, what), 2 * seconds_of(apart, what), 1e-6);
}

TEST(Predictions, slower_figures_never_make_a_stage_faster) {
  const Prediction base = predict(processor(), {2, 2, 0}, calibration("llama2-7b", 64, 2));
  const Rates rates = processor();
  for (const auto& [name, figure] : rates.figures) {
    Rates slower = processor();
    const bool time = name.ends_with("latency") || name.starts_with("training");
    slower.figures[name].value *= time ? 10 : 0.1;
    EXPECT_GE(predict(slower, {2, 2, 0}, calibration("llama2-7b", 64, 2)).seconds, base.seconds * (1 - 1e-12)) << name;
  }
}

TEST(Predictions, sums_over_ranks_are_those_of_a_ring_over_what_is_trained) {
  const Prediction steps = predict(processor(), {2, 2, 0}, training("llama2-7b"));
  const double payload = 4 * trained_elements(shape("llama2-7b"), {});
  EXPECT_DOUBLE_EQ(steps.moved.inside + steps.moved.network, 10 * 2 * 3 * payload);
  EXPECT_DOUBLE_EQ(predict(processor(), {1, 1, 0}, training("llama2-7b")).moved.inside, 0);
  FinetuneStage few = training("llama2-7b");
  few.batch = 2;
  EXPECT_DOUBLE_EQ(predict(processor(), {1, 4, 0}, few).bubble, 0.5);
}

TEST(Predictions, what_statistics_cost_at_any_number_of_sequences_is_every_replica_s_where_it_was_measured) {
  const char* what = "memory for statistics, bringing halves together";
  const auto seconds = [&](Rates rates, int ranks, std::int64_t samples, int stages) {
    rates.figures["sums"] = {1e10, "B/s", "measured"};
    return seconds_of(predict(rates, {1, ranks, 0}, calibration("llama2-7b", samples, stages)), what);
  };
  const CalibrateStage stage = calibration("llama2-7b", 64, 1);
  const double bytes = 32 * static_cast<double>(calibration::layer_statistics_bytes(
                                calibration::collected_shape(stage.config, stage.settings.collect, 1024)));
  EXPECT_NEAR(seconds(processor(), 1, 64, 1), bytes / 1e10, 1e-9 * bytes / 1e10);
  EXPECT_DOUBLE_EQ(seconds(processor(), 4, 64, 1), seconds(processor(), 1, 64, 1));       // replicas, a core each
  EXPECT_DOUBLE_EQ(seconds(processor(2), 4, 64, 1), 2 * seconds(processor(), 1, 64, 1));  // four on two cores
  EXPECT_DOUBLE_EQ(seconds(processor(), 4, 64, 4), seconds(processor(), 1, 64, 1) / 4);   // a quarter of the layers
  EXPECT_DOUBLE_EQ(seconds(processor(), 1, 640, 1), seconds(processor(), 1, 64, 1));
  EXPECT_EQ(seconds_of(predict(processor(), {1, 1, 0}, stage), what), 0);
}

TEST(Predictions, a_model_that_does_not_fit_is_shared_or_named) {
  const Rates h100 = sheet_rates("h100");
  const Prediction calibrated = predict(h100, {1, 8, 0}, calibration("llama2-70b", 64, 0));
  EXPECT_GT(calibrated.stages, 1);
  EXPECT_LE(calibrated.device_memory, h100.device_memory);
  const Prediction trained = predict(h100, {1, 8, 0}, training("llama2-70b"));
  EXPECT_GT(trained.device_memory, h100.device_memory);
  EXPECT_THAT(trained.notes, testing::Contains(testing::HasSubstr("does not fit")));
  EXPECT_THROW(predict(h100, {1, 8, 0}, calibration("llama2-7b", 64, 3)), UsageError);
  // Evaluation leaves a fifth of the memory to all else, as the job does: 2 x 69 GB of 141 GB are too much.
  EvaluateStage evaluation;
  evaluation.config = shape("llama2-70b");
  evaluation.dtype = at::kBFloat16;
  evaluation.windows = 64;
  EXPECT_EQ(predict(sheet_rates("h200"), {1, 2, 0}, evaluation).stages, 2);
  EXPECT_EQ(predict(sheet_rates("h200"), {1, 8, 0}, evaluation).stages, 2);
  EXPECT_EQ(predict(h100, {1, 8, 0}, evaluation).stages, 4);
  // What fits nowhere is streamed.
  const Prediction alone = predict(h100, {1, 1, 0}, evaluation);
  EXPECT_THAT(alone.notes, testing::Contains(testing::HasSubstr("streamed")));
  EXPECT_LT(alone.device_memory, h100.device_memory);
}

TEST(Predictions, evaluation_takes_the_stages_and_micro_batches_that_its_job_takes) {
  EvaluateStage stage;
  stage.config = shape("llama2-7b");  // 32 layers
  stage.dtype = at::kBFloat16;
  stage.windows = 2;
  Rates tiny = processor();
  tiny.node_memory = 1e6;
  EXPECT_EQ(predict(tiny, {1, 32, 0}, stage).stages, 32);  // nothing fits: as many as can be
  EXPECT_EQ(predict(tiny, {1, 48, 0}, stage).stages, 1);   // 32 do not divide 48
  stage.streamed = true;
  EXPECT_EQ(predict(tiny, {1, 32, 0}, stage).stages, 1);
  EvaluateStage wide = stage;
  wide.micro_batch = 4096;
  EvaluateStage narrow = stage;
  narrow.micro_batch = 2;
  EXPECT_EQ(predict(processor(), {1, 1, 0}, wide).host_memory, predict(processor(), {1, 1, 0}, narrow).host_memory);
}

TEST(Predictions, conversions_and_full_training_are_the_host_s) {
  const Rates h100 = sheet_rates("h100");
  ConvertStage half;
  half.config = shape("llama2-7b");
  half.kv_heads = 16;
  const Prediction converted = predict(h100, {1, 8, 0}, half);
  EXPECT_EQ(converted.device_memory, 0);
  EXPECT_GT(converted.host_memory, 0);
  FinetuneStage full = training("llama2-7b");
  full.lora.full = true;
  const Prediction trained = predict(h100, {1, 8, 0}, full);
  const double parameters = static_cast<double>(checkpoint::parameter_count(full.config));
  EXPECT_GT(trained.host_memory, 16 * parameters);
  EXPECT_LT(trained.device_memory, h100.device_memory);
  EXPECT_GT(trained.device_memory, 2 * parameters);
  EXPECT_GT(seconds_of(trained, "optimiser"), 10 * 32 * parameters / h100.value("memory"));
}

TEST(Predictions, absurd_numbers_of_sequences_do_not_take_for_ever) {
  const double some = predict(processor(), {1, 1, 0}, calibration("llama2-7b", 1'000'000'000, 1)).seconds;
  const double many = predict(processor(), {1, 1, 0}, calibration("llama2-7b", 1'000'000'000'000'000, 1)).seconds;
  EXPECT_NEAR(many / some, 1e6, 1e3);
}

TEST(Predictions, what_was_not_measured_is_refused) {
  EXPECT_THROW(predict(processor(), {1, 8, 0},
                       [] {
                         CalibrateStage stage = calibration("llama2-7b", 64, 1);
                         stage.settings.collect.dtype = at::kFloat;  // not measured
                         return stage;
                       }()),
               UsageError);
}

}  // namespace
}  // namespace headfold::scale
