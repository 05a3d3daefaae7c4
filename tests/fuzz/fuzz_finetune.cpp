// Broken adapters, training checkpoints and teacher caches, seeds fixed: each is read, or refused with a typed error
// that names the file.

#include <headfold/checkpoint/layout.h>
#include <headfold/finetune/lora.h>
#include <headfold/finetune/teacher.h>
#include <headfold/finetune/training_state.h>

#include <cmath>

#include "../../src/finetune/teacher_cache.h"
#include "hostile.h"

namespace headfold::finetune {
namespace {

using namespace testing_support;
using Tensors = std::map<std::string, at::Tensor>;

at::Tensor some(std::vector<std::int64_t> shape) {
  std::int64_t count = 1;
  for (const std::int64_t n : shape) count *= n;
  return (at::arange(count, at::kFloat) / 7).sin().view(shape);
}

std::string safetensors(const ScratchFolder& folder, const Tensors& tensors,
                        const std::map<std::string, std::string>& metadata = {}) {
  checkpoint::write_safetensors(folder / "made.safetensors", tensors, metadata);
  return read_file(folder / "made.safetensors");
}

/// What the tests of all three kinds of file share: how often something was read and refused, and why.
class HostileFinetune : public testing::Test {
 protected:
  /// Sizes at which a file is cut: all of the header, and samples of the data.
  static void cut(const std::string& whole, const std::function<void(const std::string&, const std::string&)>& with) {
    for (std::size_t length = 0; length < whole.size(); length += 1 + length / 61)
      with(whole.substr(0, length), fmt::format("{} of {} bytes", length, whole.size()));
    with(whole + "x", "something behind it");
  }
  ScratchFolder folder_;
};

// ----------------------------------------------------------------------------------------------------------
// Adapters
// ----------------------------------------------------------------------------------------------------------

class HostileAdapter : public HostileFinetune {
 protected:
  HostileAdapter() {
    put(folder_ / "config.json",
        R"({"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4,
            "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 32, "max_position_embeddings": 64})");
    base_ = checkpoint::read_config(folder_.path());
    config_ = Json::parse(R"({"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "x", "r": 2,
      "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"], "bias": "none", "use_rslora": false,
      "use_dora": false, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": null, "init_lora_weights": true,
      "inference_mode": true, "fan_in_fan_out": false, "layers_to_transform": null})");
    for (int layer = 0; layer < 2; ++layer)
      for (const auto& [module, rows] : {std::pair("q_proj", 16), std::pair("v_proj", 8)}) {
        const std::string stem = fmt::format("base_model.model.model.layers.{}.self_attn.{}.lora_", layer, module);
        tensors_[stem + "A.weight"] = some({2, 16});
        tensors_[stem + "B.weight"] = some({rows, 2});
      }
    make_folder(adapter_);
    sound_ = safetensors(folder_, tensors_);
    put(adapter_ / "adapter_model.safetensors", sound_);
    put(adapter_ / "adapter_config.json", config_.dump());
  }
  void read(const std::string& what) {
    outcomes_.run(what, [&] {
      const Adapter adapter = read_adapter(adapter_, base_);
      // What passes must be usable: the scale and every number finite, shapes those of the base.
      ASSERT_TRUE(std::isfinite(static_cast<float>(adapter.options.alpha))) << what;
      ASSERT_TRUE(std::isfinite(adapter.options.scale())) << what;
      for (const auto& [name, tensor] : adapter.tensors) ASSERT_TRUE(at::isfinite(tensor).all().item<bool>()) << name;
      ASSERT_FALSE(adapter_hash(adapter).empty());
    });
  }
  void read_config_text(const std::string& text, const std::string& what) {
    put(adapter_ / "adapter_config.json", text);
    read(what);
  }
  void read_tensor_bytes(const std::string& bytes, const std::string& what) {
    put(adapter_ / "adapter_model.safetensors", bytes);
    read(what);
  }
  void must_refuse(const std::string& what, const std::string& mention) {
    try {
      read_adapter(adapter_, base_);
      ADD_FAILURE() << what << ": read";
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(mention), std::string::npos) << what << ": " << error.what();
      EXPECT_NE(std::string(error.what()).find(adapter_.string()), std::string::npos) << error.what();
      EXPECT_TRUE(error.code() == ExitCode::bad_input || error.code() == ExitCode::io) << what;
    }
    put(adapter_ / "adapter_model.safetensors", sound_);
    put(adapter_ / "adapter_config.json", config_.dump());
  }

  std::filesystem::path adapter_ = folder_ / "adapter";
  checkpoint::ModelConfig base_;
  Json config_;
  Tensors tensors_;
  std::string sound_;
  Outcomes outcomes_{adapter_.string()};
  MemoryLid lid_;
};

TEST_F(HostileAdapter, every_option_replaced_by_everything) {
  read("sound");
  ASSERT_EQ(outcomes_.opened, 1);
  for_each_edit(config_, [&](const Json& edited, const std::string& what) {
    read_config_text(edited.dump(-1, ' ', false, Json::error_handler_t::replace), what);
  });
  EXPECT_GT(outcomes_.refused, 300);
  EXPECT_GT(outcomes_.opened, 30) << "keys that change nothing may hold anything";
}

TEST_F(HostileAdapter, configurations_cut_and_changed) {
  const std::string whole = config_.dump(1);
  for (std::size_t length = 0; length < whole.size(); ++length)
    read_config_text(whole.substr(0, length), fmt::format("{} bytes", length));
  EXPECT_EQ(outcomes_.opened, 0) << "a part passed for the whole";
  Mutator mutator(5);
  for (int i = 0; i < 1500; ++i) read_config_text(mutator.mutate(whole), fmt::format("iteration {}", i));
  EXPECT_GT(outcomes_.opened, 10);
}

TEST_F(HostileAdapter, tensors_cut_and_changed) {
  cut(sound_, [&](const std::string& bytes, const std::string& what) { read_tensor_bytes(bytes, what); });
  EXPECT_EQ(outcomes_.opened, 0) << "a part passed for the whole";
  Mutator mutator(6);
  const std::size_t header = sound_.find("base_model") + 1200;
  for (int i = 0; i < 1500; ++i)
    read_tensor_bytes(mutator.mutate(sound_.substr(0, header)) + sound_.substr(header), fmt::format("iteration {}", i));
  for (int i = 0; i < 500; ++i) read_tensor_bytes(mutator.flip(sound_), fmt::format("flipped {}", i));
  EXPECT_GT(outcomes_.opened, 10) << "changed values are values";
}

TEST_F(HostileAdapter, nonsense_is_named) {
  for (const auto& [key, value] : std::vector<std::pair<const char*, Json>>{{"r", 0},
                                                                            {"r", -2},
                                                                            {"r", std::int64_t{1} << 40},
                                                                            {"r", INT64_MAX},
                                                                            {"lora_alpha", "NaN"},
                                                                            {"lora_alpha", 1e300},
                                                                            {"lora_dropout", -0.5},
                                                                            {"target_modules", Json{"c_attn"}},
                                                                            {"target_modules", Json{""}},
                                                                            {"peft_type", "IA3"},
                                                                            {"use_dora", true}}) {
    Json edited = config_;
    edited[key] = value;
    put(adapter_ / "adapter_config.json", edited.dump());
    must_refuse(edited.dump(), fmt::format("\"{}\"", key));
  }
  // JSON has no NaN; Python writes one all the same.
  std::string text = config_.dump();
  text.replace(text.find("\"lora_alpha\":4"), 14, "\"lora_alpha\":NaN");
  put(adapter_ / "adapter_config.json", text);
  must_refuse("NaN", "adapter_config.json");
  fs::remove(adapter_ / "adapter_config.json");
  must_refuse("no configuration", "adapter_config.json");
  fs::remove(adapter_ / "adapter_model.safetensors");
  must_refuse("no tensors", "adapter_model.safetensors");

  const std::string a = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight";
  const auto with = [&](const char* what, const std::function<void(Tensors&)>& change, const std::string& mention) {
    Tensors tensors = tensors_;
    change(tensors);
    put(adapter_ / "adapter_model.safetensors", safetensors(folder_, tensors));
    must_refuse(what, mention);
  };
  with(
      "missing", [&](Tensors& t) { t.erase(a); }, a);
  with(
      "extra",
      [&](Tensors& t) {
        t["base_model.model.lm_head.weight"] = some({2, 2});
      },
      "lm_head");
  with(
      "transposed",
      [&](Tensors& t) {
        t[a] = some({16, 2});
      },
      a);
  with(
      "a dimension more",
      [&](Tensors& t) {
        t[a] = some({2, 16, 1});
      },
      a);
  with(
      "another base",
      [&](Tensors& t) {
        t[a] = some({2, 32});
      },
      "ask for [2, 16]");
  with(
      "integers",
      [&](Tensors& t) {
        t[a] = at::ones({2, 16}, at::kInt);
      },
      "I32");
  with(
      "NaN", [&](Tensors& t) { t[a][1][3] = NAN; }, "not finite");
  with(
      "infinite", [&](Tensors& t) { t[a][0][0] = INFINITY; }, "not finite");
  with(
      "beyond float32",
      [&](Tensors& t) {
        t[a] = at::full({2, 16}, 1e300, at::kDouble);
      },
      "not finite");
  with(
      "nothing at all", [&](Tensors& t) { t.clear(); }, "missing");
  EXPECT_NO_THROW(read_adapter(adapter_, base_));
}

// ----------------------------------------------------------------------------------------------------------
// Training checkpoints
// ----------------------------------------------------------------------------------------------------------

class HostileState : public HostileFinetune {
 protected:
  HostileState() {
    for (const auto& [name, shape] : {std::pair<const char*, std::vector<std::int64_t>>{"a.lora_A.weight", {2, 8}},
                                      {"a.lora_B.weight", {6, 2}},
                                      {"norm.weight", {8}}}) {
      Parameter parameter;
      parameter.name = name;
      parameter.value = at::zeros(shape, at::kFloat);
      parameters_.push_back(parameter);
      tensors_[name] = some(shape).abs();
    }
    StoredState stored;
    stored.state.step = stored.adam_steps = 7;
    stored.state.best_step = 5;
    stored.state.best_loss = 2.5;
    stored.identity = {{"model", "x"}, {"steps", 20}};
    json_ = Json::parse(to_json(stored).dump());
    sound_ = safetensors(folder_, tensors_);
  }
  void read_tensors(const std::string& bytes, const std::string& what) {
    put(folder_ / "moments-second.safetensors", bytes);
    outcomes_.run(what, [&] {
      const TensorSource source = stored_tensors(folder_ / "moments-second.safetensors", parameters_, true);
      for (const Parameter& parameter : parameters_) {
        const at::Tensor tensor = source(parameter.name);
        ASSERT_EQ(tensor.sizes(), parameter.value.sizes());
        ASSERT_TRUE(tensor.ge(0).all().item<bool>() && at::isfinite(tensor).all().item<bool>()) << what;
      }
      ASSERT_FALSE(source("nothing").defined());
    });
  }
  std::string refusal(const std::function<void(Tensors&)>& change, bool squares = true) {
    Tensors tensors = tensors_;
    change(tensors);
    put(folder_ / "moments-second.safetensors", safetensors(folder_, tensors));
    try {
      stored_tensors(folder_ / "moments-second.safetensors", parameters_, squares);
    } catch (const CorruptFile& error) {
      EXPECT_NE(std::string(error.hint()).find("resumes from the one before"), std::string::npos);
      return error.what();
    }
    return "read";
  }
  std::vector<Parameter> parameters_;
  Tensors tensors_;
  Json json_;
  std::string sound_;
  Outcomes outcomes_{folder_.path().string()};
  MemoryLid lid_;
};

TEST_F(HostileState, states) {
  const auto read = [&](const std::string& text, const std::string& what) {
    put(folder_ / "state.json", text);
    outcomes_.run(what, [&] {
      const StoredState stored = read_state(folder_.path());
      ASSERT_GE(stored.state.step, 0);
      ASSERT_EQ(stored.adam_steps, stored.state.step);
      ASSERT_LE(stored.state.best_step, stored.state.step);
      ASSERT_TRUE(std::isfinite(stored.state.best_loss) && std::isfinite(stored.state.last_loss));
    });
  };
  read(json_.dump(), "sound");
  ASSERT_EQ(outcomes_.opened, 1);
  for_each_edit(json_, [&](const Json& edited, const std::string& what) {
    read(edited.dump(-1, ' ', false, Json::error_handler_t::replace), what);
  });
  EXPECT_GT(outcomes_.refused, 300);
  const std::string whole = json_.dump();
  const std::int64_t opened = outcomes_.opened;
  for (std::size_t length = 0; length < whole.size(); ++length) read(whole.substr(0, length), "cut");
  EXPECT_EQ(outcomes_.opened, opened) << "a part passed for the whole";
  Mutator mutator(8);
  for (int i = 0; i < 1000; ++i) read(mutator.mutate(whole), fmt::format("iteration {}", i));
  fs::remove(folder_ / "state.json");
  EXPECT_THROW(read_state(folder_.path()), IoError);
}

TEST_F(HostileState, tensors) {
  read_tensors(sound_, "sound");
  ASSERT_EQ(outcomes_.opened, 1);
  cut(sound_, [&](const std::string& bytes, const std::string& what) { read_tensors(bytes, what); });
  EXPECT_EQ(outcomes_.opened, 1) << "a part passed for the whole";
  Mutator mutator(9);
  for (int i = 0; i < 1500; ++i) read_tensors(mutator.flip(sound_), fmt::format("flipped {}", i));
  for (int i = 0; i < 500; ++i) read_tensors(mutator.mutate(sound_), fmt::format("iteration {}", i));
  EXPECT_GT(outcomes_.opened, 10);
  EXPECT_GT(outcomes_.refused, 100);
}

TEST_F(HostileState, what_does_not_belong_is_named) {
  const char* b = "a.lora_B.weight";
  EXPECT_EQ(refusal([](Tensors&) {}), "read");
  EXPECT_NE(refusal([&](Tensors& t) { t.erase(b); }).find("a.lora_B.weight is missing"), std::string::npos);
  EXPECT_NE(refusal([&](Tensors& t) {
              t[b] = some({2, 6}).abs();
            }).find("[2, 6], expected F32 [6, 2]"),
            std::string::npos);
  EXPECT_NE(refusal([&](Tensors& t) { t[b] = t[b].to(at::kBFloat16); }).find("BF16"), std::string::npos);
  EXPECT_NE(refusal([&](Tensors& t) { t["more"] = some({2}); }).find("more"), std::string::npos);
  EXPECT_NE(refusal([&](Tensors& t) { t[b][3][1] = NAN; }).find("not finite"), std::string::npos);
  EXPECT_NE(refusal([&](Tensors& t) { t[b][3][1] = -1; }).find("below 0"), std::string::npos);
  EXPECT_EQ(refusal([&](Tensors& t) { t[b][3][1] = -1; }, false), "read");
}

// ----------------------------------------------------------------------------------------------------------
// Teacher caches
// ----------------------------------------------------------------------------------------------------------

constexpr std::int64_t kVocab = 11, kWidth = 3, kLength = 4, kSequences = 3;

Dataset sequences(std::int32_t shift) {
  std::vector<std::int32_t> tokens;
  for (std::int32_t i = 0; i <= kLength * kSequences; ++i) tokens.push_back((i * 5 + shift) % kVocab);
  std::vector<std::uint8_t> flags(kLength * kSequences, 0);
  flags[3] = Dataset::unscored;
  return Dataset(kLength, std::move(tokens), std::move(flags));
}

class HostileCache : public HostileFinetune {
 protected:
  HostileCache() {
    tensors_["log_probs"] = at::full({kSequences, kLength, kWidth}, std::log(0.3F));
    tensors_["tokens"] = at::arange(kWidth, at::kInt).expand({kSequences, kLength, kWidth}).contiguous();
    for (auto& [name, tensor] : tensors_) tensor[0][3].zero_();  // not scored
    metadata_ = teacher_cache_metadata(data_, kWidth, kVocab, "the-teacher");
    sound_ = safetensors(folder_, tensors_, metadata_);
  }
  void use() const {
    const CachedTeacher teacher(path_, data_, kVocab, "the-teacher");
    ASSERT_GE(teacher.width(), 1);
    for (std::int64_t s = 0; s < kSequences; ++s) {
      const std::vector<std::int64_t> own = {s};
      const TeacherView view = teacher.view(data_.batch(own), own);
      // What passes can be trained from.
      ASSERT_GE(view.top_tokens.min().item<std::int64_t>(), 0);
      ASSERT_LT(view.top_tokens.max().item<std::int64_t>(), kVocab);
      ASSERT_LE(view.top_log_probs.max().item<float>(), 1e-3F);
    }
  }
  void read(const std::string& bytes, const std::string& what) {
    put(path_, bytes);
    outcomes_.run(what, [&] { use(); });
  }
  std::string refusal(const std::function<void(Tensors&, std::map<std::string, std::string>&)>& change) {
    Tensors tensors;
    for (const auto& [name, tensor] : tensors_) tensors[name] = tensor.clone();
    auto metadata = metadata_;
    change(tensors, metadata);
    put(path_, safetensors(folder_, tensors, metadata));
    try {
      use();
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find("cache.safetensors"), std::string::npos) << error.what();
      EXPECT_NE(std::string(error.hint()).find("--teacher"), std::string::npos) << error.what();
      return error.what();
    }
    return "used";
  }
  std::filesystem::path path_ = folder_ / "cache.safetensors";
  Dataset data_ = sequences(0);
  Tensors tensors_;
  std::map<std::string, std::string> metadata_;
  std::string sound_;
  Outcomes outcomes_{"cache.safetensors"};
  MemoryLid lid_;
};

TEST_F(HostileCache, cut_and_changed) {
  read(sound_, "sound");
  ASSERT_EQ(outcomes_.opened, 1);
  cut(sound_, [&](const std::string& bytes, const std::string& what) { read(bytes, what); });
  EXPECT_EQ(outcomes_.opened, 1) << "a part passed for the whole";
  Mutator mutator(12);
  for (int i = 0; i < 2000; ++i) read(mutator.flip(sound_), fmt::format("flipped {}", i));
  for (int i = 0; i < 1000; ++i) read(mutator.mutate(sound_), fmt::format("iteration {}", i));
  EXPECT_GT(outcomes_.opened, 10);
  EXPECT_GT(outcomes_.refused, 100);
}

TEST_F(HostileCache, what_does_not_belong_is_named) {
  using Metadata = std::map<std::string, std::string>;
  EXPECT_EQ(refusal([](Tensors&, Metadata&) {}), "used");
  for (const char* key : {"format", "version", "data", "vocab", "teacher"}) {
    EXPECT_NE(refusal([&](Tensors&, Metadata& m) { m[key] = "other"; }).find("\"other\", expected"), std::string::npos);
    EXPECT_NE(refusal([&](Tensors&, Metadata& m) {
                m.erase(key);
              }).find(key == std::string("format") ? "\"pt\", expected" : "\"nothing\", expected"),
              std::string::npos);
  }
  for (const char* name : {"log_probs", "tokens"}) {
    EXPECT_NE(refusal([&](Tensors& t, Metadata&) { t.erase(name); }).find("is missing"), std::string::npos);
    for (const auto& shape : std::vector<std::vector<std::int64_t>>{{2, 4, 3}, {3, 4, 2}, {3, 4, 0}, {3, 12}, {36}})
      EXPECT_NE(
          refusal([&](Tensors& t, Metadata&) { t[name] = at::zeros(shape, t[name].options()); }).find("do not fit"),
          std::string::npos);
    EXPECT_NE(refusal([&](Tensors& t, Metadata&) { t[name] = t[name].to(at::kDouble); }).find("do not fit"),
              std::string::npos);
  }
  EXPECT_NE(refusal([](Tensors& t, Metadata&) { t["tokens"][1][2][0] = 11; }).find("sequence 1, position 2: token 11"),
            std::string::npos);
  EXPECT_NE(refusal([](Tensors& t, Metadata&) { t["tokens"][2][0][1] = -1; }).find("token -1"), std::string::npos);
  EXPECT_NE(refusal([](Tensors& t, Metadata&) { t["log_probs"][0][1][2] = NAN; }).find("log-probability nan"),
            std::string::npos);
  EXPECT_NE(refusal([](Tensors& t, Metadata&) { t["log_probs"][0][1][2] = 0.5; }).find("log-probability 0.5"),
            std::string::npos);
  EXPECT_NE(refusal([](Tensors& t, Metadata&) { t["log_probs"][2][3].fill_(-0.5); }).find("add up to 1.8"),
            std::string::npos);
  // Other data, another vocabulary.
  put(path_, sound_);
  EXPECT_THROW(CachedTeacher(path_, sequences(1), kVocab, "the-teacher"), InputError);
  EXPECT_THROW(CachedTeacher(path_, data_, kVocab + 1, "the-teacher"), InputError);
  EXPECT_NO_THROW(CachedTeacher(path_, data_, kVocab, ""));
}

}  // namespace
}  // namespace headfold::finetune
