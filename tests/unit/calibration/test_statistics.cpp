#include <gmock/gmock.h>
#include <hdf5.h>
#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/calibration/collect.h>

#include <fstream>

#include "world.h"

namespace headfold::calibration {
namespace {

using testing::HasSubstr;
using testing_support::ScratchFolder;
using testing_support::world;

constexpr std::int64_t kHidden = 24, kHeads = 2, kHeadDim = 8, kLayers = 5, kQueryHeads = 4, kLength = 34;

double relative(const at::Tensor& a, const at::Tensor& b) {
  return ((a - b).abs().max() / b.abs().max()).item<double>();
}
at::Tensor random(at::IntArrayRef shape, std::uint64_t seed) {
  at::manual_seed(seed);
  return at::randn(shape);
}

TEST(LayerAccumulatorTest, sums_are_those_of_the_definition) {
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const at::Tensor x = random({3, 17, kHidden}, 1).to(dtype) + 0.5;
    const at::Tensor keys = random({3, 17, kHeads, kHeadDim}, 2).to(dtype);
    LayerAccumulator accumulator(kHidden, kHeads * kHeadDim);
    accumulator.attention_input(x);
    accumulator.rotated_keys(keys);
    EXPECT_THROW(accumulator.statistics(), InternalError);
    accumulator.finish(comm::Communicator::self(), 0);
    const LayerStatistics found = accumulator.statistics().full();
    const at::Tensor rest = x.narrow(1, 1, 16).reshape({-1, kHidden}).to(at::kDouble);
    const at::Tensor first = x.select(1, 0).to(at::kDouble);
    const at::Tensor turned = keys.narrow(1, 1, 16).reshape({-1, kHeads * kHeadDim}).to(at::kDouble);
    EXPECT_EQ(found.count, 48);
    EXPECT_EQ(found.count_0, 3);
    EXPECT_LT(relative(found.sum, rest.sum(0)), 1e-14);
    EXPECT_LT(relative(found.sum_0, first.sum(0)), 1e-14);
    EXPECT_LT(relative(found.moment, at::matmul(rest.t(), rest)), 1e-6);
    EXPECT_LT(relative(found.moment_0, at::matmul(first.t(), first)), 1e-14);
    EXPECT_LT(relative(found.rotated_keys, at::matmul(turned.t(), turned)), 1e-6);
    EXPECT_LT(relative(found.second_moment(0.25), (found.moment + found.moment_0 * 0.25) / 48.75), 1e-15);
    EXPECT_LT(relative(found.second_moment(0), found.moment / 48), 1e-15);
    EXPECT_LT(relative(found.mean(1), (found.sum + found.sum_0) / 51), 1e-15);
  }
}

TEST(LayerAccumulatorTest, batching_changes_no_bit) {
  const at::Tensor x = random({6, 9, kHidden}, 3);
  LayerAccumulator together(kHidden, 0), apart(kHidden, 0);
  together.attention_input(x);
  for (std::int64_t b = 0; b < 6; b += 2) apart.attention_input(x.narrow(0, b, 2));
  together.finish(comm::Communicator::self(), 0);
  apart.finish(comm::Communicator::self(), 0);
  EXPECT_TRUE(at::equal(together.statistics().moment, apart.statistics().moment));
  EXPECT_TRUE(at::equal(together.statistics().sum, apart.statistics().sum));
  EXPECT_FALSE(together.wants_rotated_keys());
  EXPECT_FALSE(together.statistics().rotated_keys.defined());
}

TEST(LayerAccumulatorTest, ranks_add_up_also_when_one_has_nothing) {
  // More position-0 rows than the buffer holds; the last rank gets no sequence.
  const std::int64_t sequences = 150;
  const at::Tensor x = random({sequences, 3, kHidden}, 4);
  LayerAccumulator whole(kHidden, 0), part(kHidden, 0);
  whole.attention_input(x);
  whole.finish(comm::Communicator::self(), 0);
  const int working = std::max(1, world().size() - 1);
  for (std::int64_t s = world().rank(); s < sequences && world().rank() < working; s += working)
    part.attention_input(x.narrow(0, s, 1));
  part.finish(world(), 0);
  EXPECT_EQ(part.statistics().count, 2 * sequences);
  EXPECT_EQ(part.statistics().count_0, sequences);
  EXPECT_LT(relative(part.statistics().moment, whole.statistics().moment), 1e-14);
  EXPECT_LT(relative(part.statistics().moment_0, whole.statistics().moment_0), 1e-14);
  EXPECT_LT(relative(part.statistics().sum, whole.statistics().sum), 1e-12);
}

TEST(LayerAccumulatorTest, nan_is_named_with_its_layer_on_every_rank) {
  LayerAccumulator accumulator(kHidden, 0);
  at::Tensor x = random({1, 4, kHidden}, 5);
  if (world().root()) x[0][2][7] = std::nan("");
  accumulator.attention_input(x);
  try {
    accumulator.finish(world(), 11);
    FAIL() << "no error";
  } catch (const InputError& error) {
    EXPECT_THAT(error.what(), HasSubstr("layer 11"));
  }
  EXPECT_THROW(accumulator.attention_input(random({1, 4, kHidden + 1}, 5)), InternalError);
}

TEST(LayerAccumulatorTest, halves_follow_the_place_in_the_list) {
  StatisticsShape shape;
  shape.hidden = kHidden;
  shape.key_width = kHeads * kHeadDim;
  shape.halves = true;
  const at::Tensor x = random({5, 9, kHidden}, 6), keys = random({5, 9, kHeads, kHeadDim}, 7);
  LayerAccumulator in_order(shape), expected_even(kHidden, kHeads * kHeadDim), other_order(shape);
  in_order.attention_input(x);
  in_order.rotated_keys(keys);
  for (const std::int64_t s : {3, 0, 4, 1, 2}) {
    other_order.expect(s);
    other_order.attention_input(x.narrow(0, s, 1));
    other_order.rotated_keys(keys.narrow(0, s, 1));
  }
  for (const std::int64_t s : {0, 2, 4}) {
    expected_even.attention_input(x.narrow(0, s, 1));
    expected_even.rotated_keys(keys.narrow(0, s, 1));
  }
  for (LayerAccumulator* accumulator : {&in_order, &expected_even, &other_order})
    accumulator->finish(comm::Communicator::self(), 0);
  const PackedStatistics &a = in_order.statistics(), &b = other_order.statistics(), &even = expected_even.statistics();
  EXPECT_EQ(a.count_even, 24);
  EXPECT_TRUE(at::equal(a.moment_even, even.moment));
  EXPECT_TRUE(at::equal(a.moment_0_even, even.moment_0));
  EXPECT_TRUE(at::equal(a.rotated_keys_even, even.rotated_keys));
  EXPECT_TRUE(at::equal(a.sum_even, even.sum));
  EXPECT_LT(relative(b.moment_even, a.moment_even), 1e-14);
  EXPECT_LT(relative(b.moment, a.moment), 1e-14);
  // Even and odd meet in the total.
  const LayerStatistics full = a.full();
  EXPECT_LT(relative(full.half(0).moment + full.half(1).moment, full.moment), 1e-15);
  EXPECT_EQ(full.half(0).count + full.half(1).count, full.count);
  const at::Tensor odd = x.index_select(0, at::tensor({1, 3})).narrow(1, 1, 8).reshape({-1, kHidden}).to(at::kDouble);
  EXPECT_LT(relative(full.half(1).moment, at::matmul(odd.t(), odd)), 1e-6);
  EXPECT_THROW(full.half(2), InternalError);
}

TEST(LayerAccumulatorTest, attention_of_another_shape_is_an_internal_error) {
  StatisticsShape shape;
  shape.hidden = kHidden;
  shape.attention = true;
  shape.heads = 4;
  shape.kv_heads = 2;
  shape.head_dim = kHeadDim;
  shape.attended_heads = 2;
  shape.sequence_length = 6;
  LayerAccumulator accumulator(shape);
  EXPECT_TRUE(accumulator.wants_attention());
  const at::Tensor q = random({1, 6, 4, kHeadDim}, 1), k = random({1, 6, 2, kHeadDim}, 2);
  accumulator.attention(q, k, k);
  EXPECT_THROW(accumulator.attention(k, q, q), InternalError);
  EXPECT_THROW(accumulator.attention(q, k, q), InternalError);
  EXPECT_THROW(accumulator.attention(q.to(at::kBFloat16), k, k), InternalError);
  EXPECT_THROW(accumulator.attention(random({1, 7, 4, kHeadDim}, 1), random({1, 7, 2, kHeadDim}, 1),
                                     random({1, 7, 2, kHeadDim}, 1)),
               InternalError);
  shape.attended_heads = 3;
  EXPECT_THROW(LayerAccumulator{shape}, InternalError);
  shape.attended_heads = 1;
  EXPECT_THROW(LayerAccumulator(shape, at::ones({3})), InternalError);
}

TEST(LayerStatisticsTest, no_token_left_is_an_error) {
  LayerStatistics empty;
  empty.count_0 = 3;
  EXPECT_THROW(empty.second_moment(0), InputError);
  EXPECT_THROW(empty.mean(0), InputError);
}

StatisticsHeader header(bool keys = true, bool more = false) {
  StatisticsHeader header;
  header.headfold_version = "9.8.7";
  header.model_hash = "model";
  header.data_hash = "data";
  header.family = "llama";
  header.layers = kLayers;
  header.hidden = kHidden;
  header.kv_heads = kHeads;
  header.head_dim = kHeadDim;
  header.samples = 12;
  header.sequence_length = kLength;
  header.seed = 56;
  header.dtype = "float32";
  header.options = R"({"text": "ünïcode"})";
  header.has_rotated_keys = keys;
  header.has_values = keys;
  header.has_halves = header.has_attention = more;
  header.heads = more ? kQueryHeads : 0;
  header.attended_heads = more ? 1 : 0;
  return header;
}

/// Deterministic statistics of all layers, the same on every rank; `more`: with halves and attention.
std::vector<std::unique_ptr<LayerAccumulator>> layers(bool keys = true, bool more = false) {
  std::vector<std::unique_ptr<LayerAccumulator>> all;
  for (std::uint64_t layer = 0; layer < kLayers; ++layer) {
    all.push_back(std::make_unique<LayerAccumulator>(header(keys, more).shape()));
    all.back()->attention_input(random({2, 6, kHidden}, 20 + layer));
    const at::Tensor k = random({2, 6, kHeads, kHeadDim}, 40 + layer);
    const at::Tensor v = random({2, 6, kHeads, kHeadDim}, 80 + layer);
    all.back()->rotated_keys(k);
    all.back()->values(v);
    all.back()->attention(random({2, 6, kQueryHeads, kHeadDim}, 60 + layer), k, v);
    all.back()->finish(comm::Communicator::self(), 0);
  }
  return all;
}

std::vector<OwnedLayer> mine(const std::vector<std::unique_ptr<LayerAccumulator>>& all) {
  std::vector<OwnedLayer> own;
  for (std::int64_t layer = world().rank(); layer < kLayers; layer += world().size())
    own.push_back({layer, &all[static_cast<std::size_t>(layer)]->statistics()});
  return own;
}

TEST(StatisticsFileTest, written_by_all_ranks_reads_back_bit_for_bit) {
  const ScratchFolder folder;
  for (const bool keys : {true, false}) {
    const auto all = layers(keys);
    const fs::path path = folder / (keys ? "sub/with.h5" : "without.h5");
    write_statistics(path, header(keys), world(), mine(all));
    EXPECT_FALSE(fs::exists(path.string() + ".tmp"));
    const StatisticsFile file(path);
    EXPECT_EQ(file.header().headfold_version, "9.8.7");
    EXPECT_EQ(file.header().model_hash, "model");
    EXPECT_EQ(file.header().options, header().options);
    EXPECT_EQ(file.header().samples, 12);
    EXPECT_EQ(file.header().sequence_length, 34);
    EXPECT_EQ(file.header().seed, 56);
    EXPECT_EQ(file.header().has_rotated_keys, keys);
    for (std::int64_t layer = 0; layer < kLayers; ++layer) {
      const LayerStatistics found = file.layer(layer);
      const LayerStatistics expected = all[static_cast<std::size_t>(layer)]->statistics().full();
      EXPECT_EQ(found.count, expected.count);
      EXPECT_EQ(found.count_0, expected.count_0);
      EXPECT_TRUE(at::equal(found.sum, expected.sum) && at::equal(found.sum_0, expected.sum_0));
      EXPECT_TRUE(at::equal(found.moment, expected.moment) && at::equal(found.moment_0, expected.moment_0));
      ASSERT_EQ(found.rotated_keys.defined(), keys);
      ASSERT_EQ(found.values.defined(), keys);
      if (keys) {
        EXPECT_TRUE(at::equal(found.rotated_keys, expected.rotated_keys) && at::equal(found.values, expected.values));
      }
    }
    EXPECT_THROW(file.layer(kLayers), InputError);
    EXPECT_THROW(file.layer(-1), InputError);
    // The same content written by one rank has the same hash; another content has not.
    world().on_root([&] {
      std::vector<OwnedLayer> whole;
      for (std::int64_t layer = 0; layer < kLayers; ++layer)
        whole.push_back({layer, &all[static_cast<std::size_t>(layer)]->statistics()});
      const fs::path alone = folder / "alone.h5";
      write_statistics(alone, header(keys), comm::Communicator::self(), whole);
      EXPECT_EQ(StatisticsFile(alone).content_hash(), file.content_hash());
      EXPECT_NEAR(static_cast<double>(fs::file_size(alone)), static_cast<double>(statistics_file_bytes(header(keys))),
                  4096.0 * kLayers + 8192);
      std::swap(whole[0].statistics, whole[1].statistics);
      write_statistics(alone, header(keys), comm::Communicator::self(), whole);
      EXPECT_NE(StatisticsFile(alone).content_hash(), file.content_hash());
    });
  }
}

TEST(StatisticsFileTest, halves_and_attention_read_back_bit_for_bit) {
  const ScratchFolder folder;
  for (const bool keys : {true, false}) {
    const auto all = layers(keys, true);
    const fs::path path = folder / (keys ? "with.h5" : "without.h5");
    write_statistics(path, header(keys, true), world(), mine(all));
    const StatisticsFile file(path);
    EXPECT_EQ(file.header().format_version, 3);
    EXPECT_TRUE(file.header().has_halves && file.header().has_attention);
    EXPECT_EQ(file.header().heads, kQueryHeads);
    EXPECT_EQ(file.header().attended_heads, 1);
    for (std::int64_t layer = 0; layer < kLayers; ++layer) {
      const LayerStatistics found = file.layer(layer);
      const LayerStatistics expected = all[static_cast<std::size_t>(layer)]->statistics().full();
      EXPECT_EQ(found.count, 10);
      EXPECT_EQ(found.count_even, 5);
      EXPECT_EQ(found.count_0_even, 1);
      EXPECT_EQ(found.attention_count, 12);
      EXPECT_EQ(found.attended_heads, 1);
      for (const auto tensor :
           {&LayerStatistics::moment, &LayerStatistics::sum_even, &LayerStatistics::sum_0_even,
            &LayerStatistics::moment_even, &LayerStatistics::moment_0_even, &LayerStatistics::rotated_queries,
            &LayerStatistics::distance_mass, &LayerStatistics::attended, &LayerStatistics::attended_sum})
        EXPECT_TRUE(at::equal(found.*tensor, expected.*tensor));
      ASSERT_EQ(found.rotated_keys_even.defined(), keys);
      if (keys) {
        EXPECT_TRUE(at::equal(found.rotated_keys_even, expected.rotated_keys_even));
        EXPECT_TRUE(at::equal(found.values_even, expected.values_even));
        const LayerStatistics packed = file.layer(layer, {.values = false, .packed = true});
        EXPECT_FALSE(packed.values.defined() || packed.values_even.defined());
        EXPECT_TRUE(at::equal(packed.rotated_keys, linalg::pack_lower(found.rotated_keys)));
        EXPECT_TRUE(at::equal(packed.half(1).moment_0, linalg::pack_lower(found.half(1).moment_0)));
      }
      EXPECT_EQ(found.attended.sizes(), at::IntArrayRef({kQueryHeads, kHeadDim, kHeadDim}));
      EXPECT_EQ(found.distance_mass.sizes(), at::IntArrayRef({kQueryHeads, kLength}));
      // Only what is asked for is read.
      const LayerStatistics base = file.layer(layer, {.halves = false, .attention = false});
      EXPECT_FALSE(base.has_halves() || base.has_attention());
      EXPECT_TRUE(at::equal(base.moment, expected.moment));
      EXPECT_TRUE(file.layer(layer, {.halves = true, .attention = false}).has_halves());
      EXPECT_TRUE(file.layer(layer, {.halves = false, .attention = true}).has_attention());
    }
    // The content is identified with all of it, whoever wrote the file.
    world().on_root([&] {
      std::vector<OwnedLayer> whole;
      std::vector<PackedStatistics> copies;
      for (const auto& layer : all) copies.push_back(layer->statistics());
      for (std::int64_t layer = 0; layer < kLayers; ++layer)
        whole.push_back({layer, &copies[static_cast<std::size_t>(layer)]});
      const fs::path alone = folder / "alone.h5";
      const auto hash = [&] {
        write_statistics(alone, header(keys, true), comm::Communicator::self(), whole);
        return StatisticsFile(alone).content_hash();
      };
      EXPECT_EQ(hash(), file.content_hash());
      EXPECT_NEAR(static_cast<double>(fs::file_size(alone)),
                  static_cast<double>(statistics_file_bytes(header(keys, true))), 8192.0 * kLayers + 8192);
      for (const auto tensor : {&PackedStatistics::moment_even, &PackedStatistics::moment_0_even,
                                &PackedStatistics::rotated_queries, &PackedStatistics::attended}) {
        const at::Tensor before = copies[3].*tensor;
        copies[3].*tensor = before * 1.01;
        EXPECT_NE(hash(), file.content_hash());
        copies[3].*tensor = before;
      }
    });
  }
}

TEST(StatisticsFileTest, files_of_version_1_are_read) {
  // Written by the program before there were halves and attention statistics.
  const StatisticsFile file(testing_support::golden_folder() / "statistics" / "version1.h5");
  EXPECT_EQ(file.header().format_version, 1);
  EXPECT_FALSE(file.header().has_halves || file.header().has_attention);
  EXPECT_TRUE(file.header().has_rotated_keys);
  EXPECT_EQ(file.header().hidden, 24);
  const LayerStatistics layer = file.layer(1);
  EXPECT_EQ(layer.count, 75);
  EXPECT_EQ(layer.count_0, 5);
  EXPECT_NEAR(layer.moment.trace().item<double>() / 75, 23.999, 1e-3);
  EXPECT_NEAR(layer.rotated_keys.trace().item<double>() / 75, 15.62, 1e-2);
  EXPECT_FALSE(layer.has_halves() || layer.has_attention());
  EXPECT_FALSE(layer.rotated_keys_even.defined() || layer.attended.defined());
  EXPECT_THROW(layer.half(0), InternalError);
  // Models folded from such files name them by this hash.
  EXPECT_EQ(file.content_hash(), "4f41d873f80bc925b59a55e93429b6f73b2b7b87d91bdec925179914c5d550ab");
}

TEST(StatisticsFileTest, files_of_version_2_are_read) {
  // Written by the program before there were Grams of values.
  const StatisticsFile file(testing_support::golden_folder() / "statistics" / "version2.h5");
  EXPECT_EQ(file.header().format_version, 2);
  EXPECT_TRUE(file.header().has_halves && file.header().has_attention && file.header().has_rotated_keys);
  EXPECT_FALSE(file.header().has_values);
  const LayerStatistics layer = file.layer(1);
  EXPECT_EQ(layer.count, 60);
  EXPECT_EQ(layer.count_even, 30);
  EXPECT_FALSE(layer.values.defined() || layer.half(1).values.defined());
  EXPECT_NEAR(layer.moment.trace().item<double>() / 60, 23.9995, 1e-4);
  EXPECT_EQ(file.content_hash(), "c91e4a08fa4e3a524a61b2ec66011e895c9b51980a738b8fd368b2c177c79e86");
}

TEST(StatisticsFileTest, layers_nobody_or_two_ranks_write_are_an_internal_error) {
  const ScratchFolder folder;
  const auto all = layers();
  auto own = mine(all);
  if (world().root()) own.pop_back();
  EXPECT_THROW(write_statistics(folder / "a.h5", header(), world(), own), InternalError);
  own = mine(all);
  if (world().root()) own.push_back(own.front());
  EXPECT_THROW(write_statistics(folder / "a.h5", header(), world(), own), InternalError);
  EXPECT_THROW(write_statistics(folder / "a.h5", header(false), world(), mine(all)), InternalError);
  EXPECT_THROW(write_statistics(folder / "a.h5", header(true, true), world(), mine(all)), InternalError);
  EXPECT_TRUE(fs::is_empty(folder.path()));
}

TEST(StatisticsFileTest, a_place_that_cannot_be_written_is_an_io_error_on_every_rank) {
  const ScratchFolder folder;
  world().on_root([&] { write_file(folder / "file", "x"); });
  const auto all = layers();
  try {
    write_statistics(folder / "file/below.h5", header(), world(), mine(all));
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::io);
  }
}

/// A sound file that a test then damages; one process only.
class DamagedFileTest : public testing::Test {
 protected:
  void SetUp() override {
    if (world().size() > 1) GTEST_SKIP() << "reading is not collective: one rank suffices";
    folder_.emplace();
    path_ = *folder_ / "calibration.h5";
    all_ = layers(true, true);
    write_statistics(path_, header(true, true), world(), mine(all_));
  }
  /// Opens the file for writing, applies `change`, closes it.
  void damage(const std::function<void(hid_t)>& change) {
    const hid_t file = H5Fopen(path_.c_str(), H5F_ACC_RDWR, H5P_DEFAULT);
    ASSERT_GE(file, 0);
    change(file);
    ASSERT_GE(H5Fclose(file), 0);
  }
  /// The message of the CorruptFile that opening and reading every layer throws.
  std::string complaint() {
    try {
      const StatisticsFile file(path_);
      for (std::int64_t layer = 0; layer < kLayers; ++layer) file.layer(layer);
    } catch (const CorruptFile& error) {
      EXPECT_THAT(error.what(), HasSubstr("calibration.h5"));
      return error.what();
    }
    return "";
  }
  static void replace(hid_t file, const std::string& name, hid_t type, std::vector<hsize_t> sizes) {
    ASSERT_GE(H5Ldelete(file, name.c_str(), H5P_DEFAULT), 0);
    const hid_t space = H5Screate_simple(static_cast<int>(sizes.size()), sizes.data(), nullptr);
    const hid_t properties = H5Pcreate(H5P_DATASET_CREATE);
    H5Pset_alloc_time(properties, H5D_ALLOC_TIME_EARLY);
    H5Pset_fill_time(properties, H5D_FILL_TIME_ALLOC);  // zeros, not what stood there before
    const hid_t set = H5Dcreate2(file, name.c_str(), type, space, H5P_DEFAULT, properties, H5P_DEFAULT);
    ASSERT_GE(set, 0);
    H5Dclose(set);
    H5Pclose(properties);
    H5Sclose(space);
  }
  static void poke(hid_t file, const std::string& name, hsize_t index, double value) {
    const hid_t set = H5Dopen2(file, name.c_str(), H5P_DEFAULT);
    const hid_t space = H5Dget_space(set);
    const hsize_t one = 1;
    const hid_t memory = H5Screate_simple(1, &one, nullptr);
    H5Sselect_hyperslab(space, H5S_SELECT_SET, &index, nullptr, &one, nullptr);
    ASSERT_GE(H5Dwrite(set, H5T_NATIVE_DOUBLE, memory, space, H5P_DEFAULT, &value), 0);
    H5Sclose(memory);
    H5Sclose(space);
    H5Dclose(set);
  }
  static void set_integer(hid_t file, const char* name, std::int64_t value) {
    const hid_t attribute = H5Aopen(file, name, H5P_DEFAULT);
    ASSERT_GE(H5Awrite(attribute, H5T_NATIVE_INT64, &value), 0);
    H5Aclose(attribute);
  }

  std::optional<ScratchFolder> folder_;
  fs::path path_;
  std::vector<std::unique_ptr<LayerAccumulator>> all_;
};

TEST_F(DamagedFileTest, sound_file_has_nothing_to_complain_about) {
  EXPECT_EQ(complaint(), "");
}

TEST_F(DamagedFileTest, missing_folder_and_foreign_files) {
  EXPECT_THROW(StatisticsFile(*folder_ / "absent.h5"), IoError);
  EXPECT_THROW(StatisticsFile(folder_->path()), IoError);
  for (const std::string& content : {std::string(), std::string("x"), std::string(10000, 'x')}) {
    write_file(path_, content);
    EXPECT_THAT(complaint(), HasSubstr("not an HDF5 file"));
  }
  const hid_t foreign = H5Fcreate(path_.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
  H5Fclose(foreign);
  EXPECT_THAT(complaint(), HasSubstr("not a statistics file"));
}

TEST_F(DamagedFileTest, every_truncation_is_noticed) {
  const std::string whole = read_file(path_);
  for (std::size_t length = 0; length < whole.size(); length += 1 + length / 7) {
    write_file(path_, std::string_view(whole).substr(0, length));
    EXPECT_NE(complaint(), "") << length << " of " << whole.size() << " bytes";
  }
}

TEST_F(DamagedFileTest, version_and_sizes_are_checked) {
  damage([](hid_t file) { set_integer(file, "format_version", 4); });
  EXPECT_THAT(complaint(), HasSubstr("version 4, this build reads versions 1 to 3"));
  damage([](hid_t file) { set_integer(file, "format_version", 1); });
  EXPECT_THAT(complaint(), HasSubstr("/layer_0000/traces has 11 values, expected 3"));
  damage([](hid_t file) { set_integer(file, "format_version", 2); });
  EXPECT_THAT(complaint(), HasSubstr("/layer_0000/traces has 11 values, expected 9"));
  damage([](hid_t file) { set_integer(file, "format_version", 3); });
  const auto changed = [&](const char* name, std::int64_t bad, std::int64_t good) {
    damage([&](hid_t file) { set_integer(file, name, bad); });
    const std::string text = complaint();
    damage([&](hid_t file) { set_integer(file, name, good); });
    return text;
  };
  EXPECT_THAT(changed("heads", 3, kQueryHeads), HasSubstr("heads is 3, no multiple of 2 KV heads"));
  EXPECT_THAT(changed("heads", 6, kQueryHeads), HasSubstr("/layer_0000/rotated_queries has 144 values, expected 216"));
  EXPECT_THAT(changed("heads", 0, kQueryHeads), HasSubstr("heads is 0"));
  EXPECT_THAT(changed("attended_heads", 2, 1), HasSubstr("/layer_0000/attended has 144 values, expected 544"));
  EXPECT_THAT(changed("attended_heads", 3, 1), HasSubstr("attended_heads is 3"));
  EXPECT_THAT(changed("sequence_length", 35, kLength),
              HasSubstr("/layer_0000/distance_mass has 136 values, expected 140"));
  EXPECT_THAT(changed("has_values", 2, 1), HasSubstr("has_values is 2"));
  EXPECT_THAT(changed("has_halves", 2, 1), HasSubstr("has_halves is 2"));
  EXPECT_THAT(changed("has_attention", -1, 1), HasSubstr("has_attention is -1"));
  EXPECT_EQ(complaint(), "");
  for (const char* name : {"layers", "hidden", "kv_heads", "head_dim", "samples", "sequence_length"}) {
    std::int64_t before = 0;
    for (const std::int64_t bad : {std::int64_t{-1}, std::int64_t{0}}) {
      damage([&](hid_t file) {
        const hid_t attribute = H5Aopen(file, name, H5P_DEFAULT);
        if (bad == -1) H5Aread(attribute, H5T_NATIVE_INT64, &before);
        H5Aclose(attribute);
        set_integer(file, name, bad);
      });
      EXPECT_THAT(complaint(), HasSubstr(name));
    }
    damage([&](hid_t file) { set_integer(file, name, before); });
  }
  damage([](hid_t file) { set_integer(file, "hidden", std::int64_t{1} << 62); });
  EXPECT_THAT(complaint(), HasSubstr("hidden"));
  damage([](hid_t file) { set_integer(file, "hidden", kHidden + 1); });
  EXPECT_THAT(complaint(), HasSubstr("/layer_0000/sum has 24 values, expected 25"));
  damage([](hid_t file) {
    set_integer(file, "hidden", kHidden);
    set_integer(file, "layers", kLayers + 1);
  });
  EXPECT_THAT(complaint(), HasSubstr("/layer_0005 is missing"));
  damage([](hid_t file) {
    set_integer(file, "layers", kLayers);
    H5Adelete(file, "model_hash");
  });
  EXPECT_THAT(complaint(), HasSubstr("model_hash is missing"));
}

TEST_F(DamagedFileTest, datasets_are_checked) {
  const hsize_t packed = kHidden * (kHidden + 1) / 2;
  damage([&](hid_t file) { replace(file, "/layer_0002/moment", H5T_IEEE_F64LE, {packed - 1}); });
  EXPECT_THAT(complaint(), HasSubstr("/layer_0002/moment has 299 values, expected 300"));
  damage([&](hid_t file) { replace(file, "/layer_0002/moment", H5T_IEEE_F64LE, {packed, 1}); });
  EXPECT_THAT(complaint(), HasSubstr("/layer_0002/moment is not one-dimensional"));
  damage([&](hid_t file) { replace(file, "/layer_0002/moment", H5T_IEEE_F32LE, {packed}); });
  EXPECT_THAT(complaint(), HasSubstr("not of type float64"));
  damage([&](hid_t file) { replace(file, "/layer_0002/moment", H5T_IEEE_F64LE, {packed}); });
  EXPECT_THAT(complaint(), HasSubstr("/layer_0002/moment has trace 0"));
  damage([](hid_t file) { H5Ldelete(file, "/layer_0002/moment", H5P_DEFAULT); });
  EXPECT_THAT(complaint(), HasSubstr("/layer_0002/moment is missing"));
}

TEST_F(DamagedFileTest, new_datasets_are_checked) {
  const std::string whole = read_file(path_);
  const hsize_t packed = kHidden * (kHidden + 1) / 2;
  const std::vector<std::pair<std::string, hsize_t>> sizes{{"count_even", 2},
                                                           {"sum_even", kHidden},
                                                           {"sum_0_even", kHidden},
                                                           {"moment_even", packed},
                                                           {"moment_0_even", packed},
                                                           {"rotated_keys_even", 136},
                                                           {"values", 136},
                                                           {"values_even", 136},
                                                           {"attention_count", 1},
                                                           {"rotated_queries", kQueryHeads * 36},
                                                           {"distance_mass", kQueryHeads * kLength},
                                                           {"attended", kQueryHeads * 36},
                                                           {"attended_sum", kQueryHeads * kHeadDim}};
  for (const auto& [name, size] : sizes) {
    const std::string where = "/layer_0002/" + name;
    const auto wrong = [&](const std::string& what, const std::function<void(hid_t)>& change) {
      damage(change);
      EXPECT_THAT(complaint(), HasSubstr(where + " " + what));
      write_file(path_, whole);
    };
    wrong(fmt::format("has {} values, expected {}", size + 1, size),
          [&](hid_t file) { replace(file, where, H5T_IEEE_F64LE, {size + 1}); });
    wrong("is not one-dimensional", [&](hid_t file) { replace(file, where, H5T_IEEE_F64LE, {size, 1}); });
    wrong("is not of type float64", [&](hid_t file) { replace(file, where, H5T_STD_I64LE, {size}); });
    wrong("is missing", [&](hid_t file) { H5Ldelete(file, where.c_str(), H5P_DEFAULT); });
    wrong("contains NaN", [&](hid_t file) { poke(file, where, size - 1, std::nan("")); });
  }
  for (const char* name :
       {"moment_even", "moment_0_even", "rotated_keys_even", "values", "values_even", "rotated_queries", "attended"}) {
    damage([&](hid_t file) { poke(file, std::string("/layer_0001/") + name, 2, 1e4); });
    EXPECT_THAT(complaint(), HasSubstr(std::string("/layer_0001/") + name + " has trace"));
    write_file(path_, whole);
  }
  damage([](hid_t file) { poke(file, "/layer_0001/distance_mass", 3, 7); });
  EXPECT_THAT(complaint(), HasSubstr("/layer_0001/distance_mass has sum"));
  damage([](hid_t file) {
    // Consistent with its recorded sum, but no distribution any more.
    poke(file, "/layer_0001/distance_mass", 3, 0);
    poke(file, "/layer_0001/traces", 7, 0);
    replace(file, "/layer_0001/distance_mass", H5T_IEEE_F64LE, {kQueryHeads * kLength});
  });
  EXPECT_THAT(complaint(), HasSubstr("/layer_0001/distance_mass is no attention"));
  write_file(path_, whole);
  damage([](hid_t file) { poke(file, "/layer_0001/count_even", 0, 11); });
  EXPECT_THAT(complaint(), HasSubstr("/layer_0001/count_even holds 11"));
  damage([](hid_t file) { poke(file, "/layer_0000/attention_count", 0, 0); });
  EXPECT_THAT(complaint(), HasSubstr("/layer_0000/attention_count holds 0"));
}

TEST_F(DamagedFileTest, a_changed_value_anywhere_is_noticed) {
  const std::string whole = read_file(path_);
  // What no trace sees: sums, and entries beside a diagonal (entry 1 of a packed triangle is row 1, column 0).
  for (const char* name :
       {"sum", "sum_0", "moment", "moment_0", "rotated_keys", "values", "sum_even", "sum_0_even", "moment_even",
        "rotated_keys_even", "values_even", "rotated_queries", "attended", "attended_sum"}) {
    const std::string where = std::string("/layer_0002/") + name;
    damage([&](hid_t file) { poke(file, where, 1, 0.125); });
    EXPECT_THAT(complaint(), HasSubstr(where + " is not what calibrate wrote"));
    write_file(path_, whole);
  }
  damage([](hid_t file) { poke(file, "/layer_0002/checksums", 0, 1); });
  EXPECT_THAT(complaint(), HasSubstr("/layer_0002/sum is not what calibrate wrote"));
}

TEST_F(DamagedFileTest, values_are_checked) {
  damage([](hid_t file) { poke(file, "/layer_0003/rotated_keys", 5, std::nan("")); });
  EXPECT_THAT(complaint(), HasSubstr("/layer_0003/rotated_keys contains NaN"));
  damage([](hid_t file) { poke(file, "/layer_0003/rotated_keys", 5, 1e3); });
  EXPECT_THAT(complaint(), HasSubstr("/layer_0003/rotated_keys has trace"));
  damage([](hid_t file) { poke(file, "/layer_0001/count", 0, -4); });
  EXPECT_THAT(complaint(), HasSubstr("/layer_0001/count holds -4"));
}

}  // namespace
}  // namespace headfold::calibration
