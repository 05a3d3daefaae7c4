// Bytes that predictions state against those that the libraries send.

#include <gtest/gtest.h>
#include <headfold/checkpoint/reader.h>
#include <headfold/checkpoint/synthetic.h>
#include <headfold/scale/predict.h>

#include "world.h"

namespace headfold::scale {
namespace {

using testing_support::world;

/// Passes everything on and counts what is sent.
class CountingBackend : public comm::Backend {
 public:
  explicit CountingBackend(comm::Communicator inner) : inner_(std::move(inner)) {}
  std::string_view name() const override { return inner_.backend(); }
  int rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }
  void barrier(std::string_view what) override { inner_.barrier(what); }
  void all_reduce(std::span<double> values, comm::Reduce op) override {
    reduced += static_cast<double>(values.size_bytes());
    inner_.all_reduce(values, op);
  }
  void all_reduce(std::span<std::int64_t> values, comm::Reduce op) override { inner_.all_reduce(values, op); }
  void broadcast(std::span<std::byte> bytes, int root) override { inner_.broadcast(bytes, root); }
  std::vector<std::string> all_gather(std::string_view text) override { return inner_.all_gather(text); }
  std::unique_ptr<comm::Request::State> isend(std::span<const std::byte> bytes, int to, int tag) override {
    sent += static_cast<double>(bytes.size());
    return std::make_unique<Held>(inner_.isend(bytes, to, tag));
  }
  std::unique_ptr<comm::Request::State> irecv(std::span<std::byte> bytes, int from, int tag) override {
    return std::make_unique<Held>(inner_.irecv(bytes, from, tag));
  }
  std::unique_ptr<comm::Request::State> start_sum(std::span<float> values) override {
    return std::make_unique<Held>(inner_.start_sum(values));
  }
  std::unique_ptr<comm::Request::State> start_reduce_scatter(std::span<const float> values, std::span<float> own,
                                                             const std::vector<std::int64_t>& counts) override {
    return std::make_unique<Held>(inner_.start_reduce_scatter(values, own, counts));
  }
  std::unique_ptr<comm::Request::State> start_all_gather(std::span<float> values,
                                                         const std::vector<std::int64_t>& counts) override {
    return std::make_unique<Held>(inner_.start_all_gather(values, counts));
  }
  std::shared_ptr<comm::Backend> split(int color, int key) override {
    return std::make_shared<CountingBackend>(inner_.split(color, key));
  }
  std::shared_ptr<comm::Backend> split_by_host() override {
    return std::make_shared<CountingBackend>(inner_.split_by_host());
  }
  const void* mpi_comm() const override { return inner_.mpi_comm(); }
  const std::shared_ptr<comm::Group>& group() const override { return inner_.group(); }

  double sent = 0, reduced = 0;

 private:
  struct Held : comm::Request::State {
    explicit Held(comm::Request held) : request(std::move(held)) {}
    void wait() override { request.wait(); }
    bool test() override { return request.test(); }
    comm::Request request;
  };
  comm::Communicator inner_;
};

TEST(Bytes, calibration_sends_and_sums_what_was_predicted) {
  testing_support::ScratchFolder scratch;
  const Json json = Json::parse(R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 101, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "torch_dtype": "float32"})");
  const ModelConfig config = checkpoint::change_shape(json, {}, "shape");
  checkpoint::write_synthetic(world(), scratch.path(), config, 0, 1 << 30, {}, {});
  const checkpoint::Reader reader(scratch.path());
  Rates rates;
  rates.device = "cpu";
  rates.cores = 64;
  rates.node_memory = 1e12;
  for (const char* name : {"product", "attention", "element_wise", "gram", "load"})
    rates.figures[std::string(name) + ".float32"] = {1e9, "", "measured"};
  for (const char* name : {"inside", "statistics", "inside_latency"}) rates.figures[name] = {1, "", "measured"};
  for (int stages = 1; stages <= world().size(); ++stages) {
    if (world().size() % stages != 0) continue;
    CalibrateStage stage;
    stage.config = config;
    stage.samples = 8;
    stage.stages = stages;
    stage.settings.length = 16;
    stage.settings.collect.half_samples = true;
    const Prediction said = predict(rates, {1, world().size(), 0}, stage);
    EXPECT_EQ(said.stages, stages);

    comm::Grid grid = comm::make_grid(world(), stages);
    const auto pipeline = std::make_shared<CountingBackend>(grid.pipeline);
    const auto peers = std::make_shared<CountingBackend>(grid.peers);
    grid.pipeline = comm::Communicator(pipeline);
    grid.peers = comm::Communicator(peers);
    at::manual_seed(1);
    calibration::collect(reader, grid, at::randint(101, {8, 16}, at::kLong), stage.settings.collect);
    const double sent = world().all_reduce(pipeline->sent);
    // A ring over n ranks sends 2 (n - 1) / n of the payload from each.
    const auto n = static_cast<double>(grid.replicas);
    const double summed = world().all_reduce(peers->reduced * 2 * (n - 1) / n);
    const double hidden = 8.0 * 16 * 64 * 4 * (stages - 1);
    EXPECT_DOUBLE_EQ(sent, hidden);
    EXPECT_EQ(said.moved.network, 0);
    // Of every layer the file, whose size is predicted, keeps some counts and traces beside the sums.
    EXPECT_NEAR(said.moved.inside, sent + summed, 6 * 32 * sizeof(double) * 2 * (n - 1) * stages) << stages;
    EXPECT_GT(said.moved.inside + said.moved.network, world().size() > 1 ? 1e4 : -1);
  }
}

}  // namespace
}  // namespace headfold::scale
