// Broken statistics files, plans, configurations, indices and tensor headers, seeds fixed: each is read, or refused
// with a typed error that names the file.

#include <hdf5.h>
#include <headfold/calibration/statistics.h>
#include <headfold/checkpoint/layout.h>
#include <headfold/checkpoint/reader.h>
#include <headfold/folding/plan.h>

#include "hostile.h"

namespace headfold {
namespace {

using namespace testing_support;
using calibration::StatisticsFile;

// ----------------------------------------------------------------------------------------------------------
// Statistics
// ----------------------------------------------------------------------------------------------------------

constexpr std::int64_t kHidden = 6, kHeads = 2, kHeadDim = 2, kLayers = 2;
constexpr std::int64_t kPacked = kHidden * (kHidden + 1) / 2,
                       kKeyPacked = kHeads * kHeadDim * (kHeads * kHeadDim + 1) / 2;

void write_sound(const fs::path& path) {
  calibration::StatisticsHeader header;
  header.headfold_version = "1.2.3";
  header.model_hash = "model";
  header.data_hash = "data";
  header.family = "llama";
  header.layers = kLayers;
  header.hidden = kHidden;
  header.kv_heads = kHeads;
  header.head_dim = kHeadDim;
  header.samples = 3;
  header.sequence_length = 5;
  header.dtype = "float32";
  header.options = "{}";
  header.has_rotated_keys = true;
  header.has_values = true;
  calibration::PackedStatistics packed;
  packed.count = 12;
  packed.count_0 = 3;
  packed.sum = at::arange(kHidden, at::kDouble);
  packed.sum_0 = at::ones({kHidden}, at::kDouble);
  packed.moment = at::arange(kPacked, at::kDouble) + 1;
  packed.moment_0 = at::arange(kPacked, at::kDouble) * 0.5 + 1;
  packed.rotated_keys = at::arange(kKeyPacked, at::kDouble) + 2;
  packed.values = at::arange(kKeyPacked, at::kDouble) + 3;
  std::vector<calibration::OwnedLayer> own;
  for (std::int64_t layer = 0; layer < kLayers; ++layer) own.push_back({layer, &packed});
  calibration::write_statistics(path, header, comm::Communicator::self(), own);
}

class StatisticsFuzz : public testing::Test {
 protected:
  StatisticsFuzz() {
    write_sound(path_);
    sound_ = read_file(path_);
  }
  /// Opens the file and reads all of it.
  void load(const std::string& what) {
    outcomes_.run(what, [&] {
      const StatisticsFile file(path_);
      ASSERT_FALSE(file.content_hash().empty());
      for (std::int64_t i = 0; i < file.header().layers; ++i) {
        const auto layer = file.layer(i);
        ASSERT_EQ(layer.moment.size(0), file.header().hidden);
        ASSERT_TRUE(std::isfinite(layer.second_moment(0.5).sum().item<double>()));
      }
    });
  }
  void load(const std::string& content, const std::string& what) {
    put(path_, content);
    load(what);
  }
  /// A sound file after `change`, which HDF5 itself makes.
  void edited(const std::string& what, const std::function<void(hid_t)>& change) {
    put(path_, sound_);
    const hid_t file = H5Fopen(path_.c_str(), H5F_ACC_RDWR, H5P_DEFAULT);
    ASSERT_GE(file, 0) << what;
    change(file);
    ASSERT_GE(H5Fclose(file), 0) << what;
    load(what);
  }
  /// As edited(), and the file must be refused.
  void refused(const std::string& what, const std::function<void(hid_t)>& change) {
    const std::int64_t before = outcomes_.refused;
    edited(what, change);
    EXPECT_EQ(outcomes_.refused, before + 1) << what;
  }

  ScratchFolder folder_;
  fs::path path_ = folder_ / "statistics.h5";
  Outcomes outcomes_{"statistics.h5"};
  std::string sound_;
  MemoryLid lid_;
};

TEST_F(StatisticsFuzz, cut_short) {
  load("sound");
  ASSERT_EQ(outcomes_.opened, 1);
  for (std::size_t length = 0; length < sound_.size(); length += 1 + length / 97)
    load(sound_.substr(0, length), fmt::format("{} of {} bytes", length, sound_.size()));
  EXPECT_EQ(outcomes_.opened, 1) << "a part passed for the whole";
  load(sound_ + std::string(100, 'x'), "something behind it");
}

TEST_F(StatisticsFuzz, changed) {
  Mutator mutator(17);
  for (int i = 0; i < 1500; ++i) load(mutator.flip(sound_), fmt::format("iteration {}", i));
  for (int i = 0; i < 500; ++i) {
    std::string moved = sound_;  // bytes go missing in the middle, or appear
    const std::size_t at = mutator.below(moved.size());
    if (i % 2 == 0)
      moved.erase(at, 1 + mutator.below(600));
    else
      moved.insert(at, std::string(1 + mutator.below(600), static_cast<char>(mutator.below(256))));
    load(moved, fmt::format("moved {}", i));
  }
  EXPECT_GT(outcomes_.refused, 1000);
  EXPECT_GT(outcomes_.opened, 20) << "changes of values below the diagonal pass, if no more";
}

/// Replaces a dataset by one of another type, shape or storage; `storage` sets its creation properties.
void remake(hid_t file, const std::string& name, hid_t type, std::vector<hsize_t> shape,
            const std::function<void(hid_t)>& storage = {}) {
  H5Ldelete(file, name.c_str(), H5P_DEFAULT);
  const hid_t properties = H5Pcreate(H5P_DATASET_CREATE);
  H5Pset_fill_time(properties, H5D_FILL_TIME_NEVER);
  if (storage) storage(properties);
  const hid_t space =
      shape.empty() ? H5Screate(H5S_SCALAR) : H5Screate_simple(static_cast<int>(shape.size()), shape.data(), nullptr);
  const hid_t made = H5Dcreate2(file, name.c_str(), type, space, H5P_DEFAULT, properties, H5P_DEFAULT);
  EXPECT_GE(made, 0) << name;
  H5Dclose(made);
  H5Sclose(space);
  H5Pclose(properties);
}

const std::vector<std::pair<std::string, std::int64_t>>& sizes() {
  static const std::vector<std::pair<std::string, std::int64_t>> all = {
      {"count", 2},          {"traces", 11},      {"checksums", 6},      {"sum", kHidden},
      {"sum_0", kHidden},    {"moment", kPacked}, {"moment_0", kPacked}, {"rotated_keys", kKeyPacked},
      {"values", kKeyPacked}};
  return all;
}

TEST_F(StatisticsFuzz, datasets_of_other_shapes_types_and_storage) {
  for (const auto& [dataset, size] : sizes()) {
    const std::string name = "/layer_0001/" + dataset;
    const auto n = static_cast<hsize_t>(size);
    const std::vector<std::vector<hsize_t>> shapes = {{},     {0},    {1},    {n - 1},           {n + 1},
                                                      {n, 1}, {1, n}, {n, 0}, {hsize_t{1} << 20}};
    for (const auto& shape : shapes)
      if (shape != std::vector<hsize_t>{n})
        refused(name + " of shape " + fmt::format("{}", fmt::join(shape, "x")),
                [&](hid_t file) { remake(file, name, H5T_IEEE_F64LE, shape); });
    for (const hid_t type : {H5T_IEEE_F32LE, H5T_STD_I64LE, H5T_STD_U8LE, H5T_STD_REF_OBJ, H5T_C_S1, H5T_UNIX_D64LE})
      refused(name + " of another type", [&](hid_t file) { remake(file, name, type, {n}); });
    // Chunks, never written: gigabytes by the file's word.
    refused(name + " that is only promised", [&](hid_t file) {
      remake(file, name, H5T_IEEE_F64LE, {n}, [&](hid_t properties) { H5Pset_chunk(properties, 1, &n); });
    });
    refused(name + " in another file", [&](hid_t file) {
      remake(file, name, H5T_IEEE_F64LE, {n}, [&](hid_t properties) {
        H5Pset_external(properties, (folder_ / "outside.bin").c_str(), 0, n * sizeof(double));
      });
    });
    refused(name + " in another HDF5 file", [&](hid_t file) {
      const hid_t space = H5Screate_simple(1, &n, nullptr);
      remake(file, name, H5T_IEEE_F64LE, {n}, [&](hid_t properties) {
        H5Pset_virtual(properties, space, (folder_ / "other.h5").c_str(), name.c_str(), space);
      });
      H5Sclose(space);
    });
    refused(name + " missing", [&](hid_t file) { H5Ldelete(file, name.c_str(), H5P_DEFAULT); });
    refused(name + " that is a group", [&](hid_t file) {
      H5Ldelete(file, name.c_str(), H5P_DEFAULT);
      H5Gclose(H5Gcreate2(file, name.c_str(), H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
    });
    refused(name + " that is a type", [&](hid_t file) {
      H5Ldelete(file, name.c_str(), H5P_DEFAULT);
      const hid_t type = H5Tcopy(H5T_IEEE_F64LE);
      H5Tcommit2(file, name.c_str(), type, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
      H5Tclose(type);
    });
    for (const double bad : {std::nan(""), static_cast<double>(INFINITY), -static_cast<double>(INFINITY)})
      for (const std::size_t index : {std::size_t{0}, static_cast<std::size_t>(size) - 1})
        refused(fmt::format("{}[{}] = {}", name, index, bad), [&](hid_t file) {
          const hid_t set = H5Dopen2(file, name.c_str(), H5P_DEFAULT);
          const hid_t space = H5Dget_space(set);
          std::vector<double> values(static_cast<std::size_t>(H5Sget_simple_extent_npoints(space)));
          H5Sclose(space);
          ASSERT_GT(values.size(), index) << name;
          H5Dread(set, H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data());
          values[index] = bad;
          H5Dwrite(set, H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data());
          H5Dclose(set);
        });
  }
  EXPECT_EQ(outcomes_.opened, 0);
}

TEST_F(StatisticsFuzz, links_to_elsewhere) {
  write_sound(folder_ / "other.h5");
  for (const std::string& name : {std::string("/layer_0001"), std::string("/layer_0001/moment")}) {
    refused(name + " in another file", [&](hid_t file) {
      H5Ldelete(file, name.c_str(), H5P_DEFAULT);
      ASSERT_GE(H5Lcreate_external((folder_ / "other.h5").c_str(), name.c_str(), file, name.c_str(), H5P_DEFAULT,
                                   H5P_DEFAULT),
                0);
    });
    for (const std::string& target : {name, std::string("/nowhere"), "/layer_0000" + name.substr(11)})
      refused(name + " -> " + target, [&](hid_t file) {
        H5Ldelete(file, name.c_str(), H5P_DEFAULT);
        ASSERT_GE(H5Lcreate_soft(target.c_str(), file, name.c_str(), H5P_DEFAULT, H5P_DEFAULT), 0);
      });
  }
}

/// Replaces an attribute of the file.
void attribute(hid_t file, const char* name, hid_t type, hid_t memory, const void* value,
               std::vector<hsize_t> shape = {}) {
  H5Adelete(file, name);
  const hid_t space =
      shape.empty() ? H5Screate(H5S_SCALAR) : H5Screate_simple(static_cast<int>(shape.size()), shape.data(), nullptr);
  const hid_t made = H5Acreate2(file, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
  EXPECT_GE(made, 0) << name;
  H5Awrite(made, memory, value);
  H5Aclose(made);
  H5Sclose(space);
}

TEST_F(StatisticsFuzz, attributes_of_other_types_and_values) {
  const std::vector<std::string> texts = {"format", "headfold_version", "model_hash", "data_hash", "family",
                                          "dtype",  "options"};
  const std::vector<std::string> numbers = {"format_version",   "layers",    "hidden",          "kv_heads",
                                            "head_dim",         "samples",   "sequence_length", "seed",
                                            "has_rotated_keys", "has_values"};
  const hid_t variable = H5Tcopy(H5T_C_S1), fixed = H5Tcopy(H5T_C_S1), longer = H5Tcopy(H5T_C_S1);
  H5Tset_size(variable, H5T_VARIABLE);
  H5Tset_size(fixed, 5);
  H5Tset_size(longer, 61 * 1024);
  const char* text = "12";
  const std::string filler(61 * 1024, 'y');
  const std::vector<std::int64_t> integers(8, 1);
  const std::vector<double> reals(8, 1.0);
  for (const auto& name : texts) {
    const char* key = name.c_str();
    refused(name + " left out", [&](hid_t file) { H5Adelete(file, key); });
    refused(name + " a number",
            [&](hid_t file) { attribute(file, key, H5T_STD_I64LE, H5T_NATIVE_INT64, integers.data()); });
    refused(name + " of variable length", [&](hid_t file) { attribute(file, key, variable, variable, &text); });
    refused(name + " a list", [&](hid_t file) { attribute(file, key, fixed, fixed, filler.data(), {8}); });
    refused(name + " of 61 KiB", [&](hid_t file) { attribute(file, key, longer, longer, filler.data()); });
    refused(name + " an empty list", [&](hid_t file) { attribute(file, key, fixed, fixed, filler.data(), {0}); });
    edited(name + " without an end", [&](hid_t file) { attribute(file, key, fixed, fixed, filler.data()); });
  }
  for (const auto& name : numbers) {
    const char* key = name.c_str();
    refused(name + " left out", [&](hid_t file) { H5Adelete(file, key); });
    refused(name + " a real number",
            [&](hid_t file) { attribute(file, key, H5T_IEEE_F64LE, H5T_NATIVE_DOUBLE, reals.data()); });
    refused(name + " a text", [&](hid_t file) { attribute(file, key, fixed, fixed, filler.data()); });
    refused(name + " a list",
            [&](hid_t file) { attribute(file, key, H5T_STD_I64LE, H5T_NATIVE_INT64, integers.data(), {8}); });
    refused(name + " a pair of a pair", [&](hid_t file) {
      attribute(file, key, H5T_STD_I64LE, H5T_NATIVE_INT64, integers.data(), {2, 2});
    });
    for (const std::int64_t value : {INT64_MIN, std::int64_t{-1}, std::int64_t{0}, std::int64_t{1}, std::int64_t{3},
                                     std::int64_t{1} << 20, std::int64_t{1} << 32, std::int64_t{1} << 62, INT64_MAX})
      edited(fmt::format("{} = {}", name, value),
             [&](hid_t file) { attribute(file, key, H5T_STD_I64LE, H5T_NATIVE_INT64, &value); });
    const std::uint64_t most = UINT64_MAX;
    edited(name + " beyond 63 bits",
           [&](hid_t file) { attribute(file, key, H5T_STD_U64LE, H5T_NATIVE_UINT64, &most); });
  }
  for (const hid_t type : {variable, fixed, longer}) H5Tclose(type);
  EXPECT_GT(outcomes_.opened, 10);
}

// ----------------------------------------------------------------------------------------------------------
// JSON
// ----------------------------------------------------------------------------------------------------------

/// Every edit of `document` (or one of `every`), then random mutations of its text, through `load`.
void hammer(const Json& document, int mutations, Outcomes& outcomes,
            const std::function<void(const std::string&)>& load, std::size_t every = 1) {
  const auto run = [&](const std::string& text, const std::string& what) { outcomes.run(what, [&] { load(text); }); };
  const std::string sound = document.dump();
  run(sound, "sound");
  ASSERT_EQ(outcomes.opened, 1);
  const auto edit = [&](const Json& edited, const std::string& what) { run(edited.dump(), what); };
  for_each_edit(document, edit, every);
  EXPECT_GT(outcomes.opened, 1);
  EXPECT_GT(outcomes.refused, 100);
  for (std::size_t length = 0; length < sound.size(); length += 3) run(sound.substr(0, length), "cut short");
  Mutator mutator(23);
  for (int i = 0; i < mutations; ++i) {
    const std::string text = mutator.mutate(sound);
    run(text, text);
  }
}

TEST(ReaderFuzz, config) {
  const MemoryLid lid;
  for (
      const char* text :
      {R"({"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_act":"silu","hidden_size":16,"intermediate_size":24,
            "num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,"head_dim":4,"vocab_size":11,
            "max_position_embeddings":64,"rms_norm_eps":1e-5,"rope_theta":10000.0,"rope_scaling":{"rope_type":"llama3","factor":8.0,
            "low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":32},"bos_token_id":1,"eos_token_id":[2,3],
            "attention_bias":true,"mlp_bias":false,"tie_word_embeddings":false,"torch_dtype":"float32"})",
       R"({"architectures":["HeadfoldLlamaForCausalLM"],"model_type":"headfold_llama","hidden_size":16,"intermediate_size":24,
            "num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,"vocab_size":11,
            "headfold":{"layout":"projected","source_kv_heads":4},"rope_parameters":{"rope_theta":5e5,"rope_type":"linear","factor":2.0},
            "dtype":"bfloat16"})",
       R"({"architectures":["BloomForCausalLM"],"model_type":"bloom","vocab_size":11,"n_embed":24,"n_layer":2,"n_head":6,
            "seq_length":32,"layer_norm_epsilon":1e-5,"apply_residual_connection_post_layernorm":false})",
       R"({"architectures":["HeadfoldBloomForCausalLM"],"model_type":"headfold_bloom","vocab_size":11,"n_embed":24,"n_layer":2,
            "n_head":6,"num_key_value_heads":3})"}) {
    Outcomes outcomes("some/config.json");
    hammer(Json::parse(text), 1000, outcomes, [](const std::string& content) {
      const auto config = checkpoint::parse_config(parse_json(content, "some/config.json"), "some/config.json");
      ASSERT_TRUE(config.layers > 0 && config.kv_heads > 0 && config.head_dim > 0 && config.vocab > 0);
      ASSERT_EQ(config.heads % config.kv_heads, 0);
      ASSERT_GT(checkpoint::parameter_count(config), 0);
      ASSERT_GT(config.cache_bytes_per_token(4), 0);
    });
  }
}

TEST(ReaderFuzz, plan) {
  const MemoryLid lid;
  folding::Plan plan;
  plan.model_hash = "m";
  plan.statistics_hash = "s";
  plan.options.kv_heads = 2;
  for (std::int64_t layer = 0; layer < 2; ++layer) {
    folding::LayerPlan one;
    one.layer = layer;
    for (std::int64_t g = 0; g < 2; ++g) {
      folding::GroupPlan group;
      group.kv_heads = {2 * g, 2 * g + 1};
      group.key_loss = 0.25;
      group.key_total = 1;
      group.value_loss = 0.5;
      group.value_total = 2;
      group.key_energy = group.value_energy = {0.5, 0.75, 1};
      one.groups.push_back(group);
    }
    plan.layers.push_back(one);
  }
  const Json json = Json::parse(folding::to_json(plan).dump());
  Outcomes outcomes("some/plan.json");
  hammer(
      json, 1000, outcomes,
      [](const std::string& content) {
        const auto read = folding::plan_from_json(parse_json(content, "some/plan.json"), "some/plan.json");
        ASSERT_FALSE(read.layers.empty());
        for (const auto& layer : read.layers) {
          ASSERT_GT(layer.groups.size(), 0U);
          ASSERT_FALSE(std::isnan(layer.key_relative_loss()) || std::isnan(layer.value_relative_loss()));
        }
        // What was read can be written, and reads back as the same.
        const std::string again = folding::to_json(read).dump();
        ASSERT_EQ(folding::to_json(folding::plan_from_json(Json::parse(again), "again")).dump(), again);
      },
      4);
}

/// A model folder of two files: `a` and `b` in the first, `c` in the second.
const Json& shard_header() {
  static const Json json = Json::parse(
      R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[0,3],"data_offsets":[8,8]}})");
  return json;
}
std::string with_length(const std::string& header) {
  std::string content;
  for (int shift = 0; shift < 64; shift += 8) content.push_back(static_cast<char>(header.size() >> shift & 0xff));
  return content + header;
}

TEST(ReaderFuzz, index_and_headers) {
  const ScratchFolder folder;
  const fs::path model = folder / "model", first = model / "model-00001-of-00002.safetensors",
                 second = model / "model-00002-of-00002.safetensors";
  fs::create_directories(model);
  put(folder / "outside.safetensors",
      with_length(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})") + "1234");
  put(model / "config.json",
      R"({"model_type":"llama","hidden_size":16,"intermediate_size":24,"num_hidden_layers":2,"num_attention_heads":4,"vocab_size":11})");
  put(first, with_length(shard_header().dump()) + "12345678");
  put(second, with_length(R"({"c":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}})") + "5678");
  const Json index = {
      {"metadata", {{"total_size", 12}}},
      {"weight_map",
       {{"a", first.filename().string()}, {"b", first.filename().string()}, {"c", second.filename().string()}}}};
  const MemoryLid lid;
  const auto read = [&] {
    const checkpoint::Reader reader(model);
    for (const fs::path& file : reader.files()) ASSERT_EQ(file.parent_path(), model);
    for (const std::string& name : reader.names()) {
      const auto info = reader.info(name);
      if (info.dtype == "U16" || info.dtype == "U32" || info.dtype == "U64") continue;  // ATen has no such tensors
      const at::Tensor tensor = reader.view(name);
      ASSERT_LE(tensor.nbytes(), 8U);
      std::string copy(static_cast<const char*>(tensor.data_ptr()), tensor.nbytes());
      ASSERT_EQ(copy.size(), tensor.nbytes());
    }
    ASSERT_FALSE(checkpoint::layout_problems(reader).empty());
  };
  {
    Outcomes outcomes(model.string());
    hammer(index, 1000, outcomes, [&](const std::string& content) {
      put(model / "model.safetensors.index.json", content);
      read();
    });
  }
  put(model / "model.safetensors.index.json", index.dump());
  Outcomes outcomes(model.string());
  hammer(shard_header(), 2000, outcomes, [&](const std::string& content) {
    put(first, with_length(content) + "12345678");
    read();
  });
}

}  // namespace
}  // namespace headfold
