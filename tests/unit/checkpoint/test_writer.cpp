#include <headfold/checkpoint/layout.h>
#include <headfold/checkpoint/reader.h>
#include <headfold/checkpoint/writer.h>

#include "files.h"
#include "world.h"

namespace headfold::checkpoint {
namespace {

using testing_support::digest;
using testing_support::expect_error;
using testing_support::llama_json;
using testing_support::ScratchFolder;
using testing_support::world;

std::vector<TensorSpec> specs(const Json& json) {
  std::vector<TensorSpec> list;
  for (const TensorShape& tensor : model_tensors(parse_config(json, "test")))
    list.push_back({tensor.name, tensor.name.ends_with("layernorm.weight") ? "F32" : "BF16", tensor.shape});
  return list;
}

at::Tensor content(const TensorSpec& spec) {
  std::int64_t elements = 1;
  for (const std::int64_t extent : spec.shape) elements *= extent;
  const auto start = static_cast<double>(spec.name.size());
  return (at::arange(elements, at::kDouble).view(spec.shape) * 0.125 - start).to(scalar_type(spec.dtype));
}

/// Writes the whole model from all ranks of `group`, round robin, the largest tensor in parts.
void write_all(const comm::Communicator& group, const fs::path& folder, std::uint64_t max_shard_bytes,
               const std::vector<fs::path>& copies = {}) {
  const std::vector<TensorSpec> list = specs(llama_json());
  ParallelWriter writer(group, folder, list, max_shard_bytes);
  for (std::size_t i = 0; i < list.size(); ++i) {
    const at::Tensor tensor = content(list[i]);
    if (list[i].name == "lm_head.weight") {
      const at::Tensor flat = tensor.flatten();
      const std::int64_t begin = flat.numel() * group.rank() / group.size();
      const std::int64_t end = flat.numel() * (group.rank() + 1) / group.size();
      writer.write_part(list[i].name, begin, flat.slice(0, begin, end));
    } else if (static_cast<int>(i) % group.size() == group.rank()) {
      writer.write(list[i].name, tensor);
    }
  }
  writer.finish(llama_json(), OrderedJson{{"format", "headfold-model"}}, copies);
}

TEST(WriterTest, any_number_of_ranks_writes_the_same_bytes) {
  for (const std::uint64_t max_shard_bytes : {std::uint64_t{1} << 30, std::uint64_t{1500}}) {
    const ScratchFolder folder;
    write_all(world(), folder / "all", max_shard_bytes);
    if (world().root()) write_all(comm::Communicator::self(), folder / "one", max_shard_bytes);
    const comm::Communicator pairs = world().split(world().rank() / 2, world().rank());
    write_all(pairs, folder / fmt::format("pair{}", world().rank() / 2), max_shard_bytes);
    world().barrier("written");
    const auto expected = digest(folder / "one");
    EXPECT_EQ(digest(folder / "all"), expected);
    EXPECT_EQ(digest(folder / fmt::format("pair{}", world().rank() / 2)), expected);

    const Reader reader(folder / "all");
    EXPECT_EQ(reader.files().size() > 1, max_shard_bytes == 1500U);
    EXPECT_EQ(expected.contains("model.safetensors.index.json"), max_shard_bytes == 1500U);
    EXPECT_EQ(layout_problems(reader), std::vector<std::string>{});
    for (const TensorSpec& spec : specs(llama_json()))
      EXPECT_TRUE(at::equal(reader.view(spec.name), content(spec))) << spec.name;
    world().barrier("read");
  }
}

TEST(WriterTest, shards_keep_the_order_of_the_list_and_the_index_counts) {
  const ScratchFolder folder;
  write_all(world(), folder / "m", 1500);
  const Json index = read_json(folder / "m" / "model.safetensors.index.json");
  std::uint64_t total = 0;
  std::string last;
  for (const TensorSpec& spec : specs(llama_json())) {
    total += spec.bytes();
    const std::string shard = index["weight_map"][spec.name];
    EXPECT_GE(shard, last);
    last = shard;
  }
  EXPECT_EQ(index["metadata"]["total_size"], total);
  EXPECT_EQ(index["weight_map"].size(), specs(llama_json()).size());
  const ShardPlan plan = plan_shards(specs(llama_json()), 1500);
  EXPECT_EQ(last, plan.files.back());
  for (const std::string& file : plan.files) {
    std::uint64_t bytes = 0;
    const SafetensorsFile shard(folder / "m" / file);
    for (const auto& [name, info] : shard.tensors()) bytes += info.end - info.begin;
    EXPECT_TRUE(bytes <= 1500 || shard.tensors().size() == 1) << file;
  }
}

TEST(WriterTest, stale_files_of_an_earlier_run_disappear) {
  const ScratchFolder folder;
  const fs::path target = folder / "m";
  write_all(world(), target, 1500);
  world().barrier("first");
  if (world().root()) {
    write_file(target / "model-00007-of-00009.safetensors.tmp", "left by a crash");
    write_file(target / "tokenizer.json.4711.tmp", "left by a crash");
    write_file(target / "notes.4711.tmp", "the user's own");
    write_file(target / "notes.txt", "the user's own");
  }
  world().barrier("stale");
  write_all(world(), target, std::uint64_t{1} << 30);
  std::set<std::string> names;
  for (const auto& [name, hash] : digest(target)) names.insert(name);
  EXPECT_EQ(names, (std::set<std::string>{"config.json", "headfold.json", "model.safetensors", "notes.4711.tmp",
                                          "notes.txt"}));
  world().barrier("looked");
  write_all(world(), target, 1500);
  EXPECT_FALSE(fs::exists(target / "model.safetensors"));
  EXPECT_NO_THROW(Reader{target});
}

TEST(WriterTest, an_earlier_model_stays_whole_until_the_new_one_takes_all_of_its_place) {
  const ScratchFolder folder;
  const fs::path target = folder / "m";
  if (world().root()) {
    write_file(folder / "src" / "tokenizer.model", "old");
    write_file(folder / "src" / "merges.txt", "old");
    write_file(folder / "new" / "tokenizer.json", "new");
  }
  world().barrier("made");
  write_all(world(), target, 1500, companion_files(folder / "src"));
  world().barrier("first");
  if (world().root()) {
    for (const char* name : {"convert.json", "verification.json", "plan.json", "results_1.json", "notes.txt"})
      write_file(target / name, "{}");
  }
  world().barrier("beside");
  auto before = digest(target);
  world().barrier("read");
  {
    const std::vector<TensorSpec> list = specs(llama_json());
    ParallelWriter writer(world(), target, list);
    if (world().root())
      for (const TensorSpec& spec : list) writer.write(spec.name, content(spec));
    world().barrier("written");
    auto now = digest(target);
    now.erase(kUnfinishedMarker);
    now.erase("model.safetensors.tmp");
    EXPECT_EQ(now, before) << "the earlier model was touched before the new one was whole";
    EXPECT_TRUE(holds_model(target));
    world().barrier("looked");
    std::vector<fs::path> copies = companion_files(folder / "new");
    copies.push_back(target / "plan.json");
    writer.finish(llama_json(), OrderedJson(), copies);
  }
  std::set<std::string> names;
  for (const auto& [name, hash] : digest(target)) names.insert(name);
  EXPECT_EQ(names, (std::set<std::string>{"config.json", "model.safetensors", "notes.txt", "plan.json",
                                          "results_1.json", "tokenizer.json"}));
}

TEST(WriterTest, companions_that_differ_are_told) {
  const ScratchFolder folder;
  if (!world().root()) return;
  write_file(folder / "src" / "tokenizer.model", "one");
  write_file(folder / "src" / "merges.txt", "two");
  const std::vector<fs::path> sources = companion_files(folder / "src");
  for (const fs::path& source : sources) headfold::copy_file(source, folder / "m" / source.filename());
  EXPECT_EQ(companion_problems(folder / "m", sources), std::vector<std::string>{});
  write_file(folder / "m" / "merges.txt", "twp");
  fs::remove(folder / "m" / "tokenizer.model");
  write_file(folder / "m" / "vocab.json", "{}");
  const std::vector<std::string> problems = companion_problems(folder / "m", sources);
  ASSERT_EQ(problems.size(), 3U);
  EXPECT_THAT(problems[0], testing::HasSubstr("tokenizer.model is missing"));
  EXPECT_THAT(problems[1], testing::HasSubstr("merges.txt differs"));
  EXPECT_THAT(problems[2], testing::HasSubstr("vocab.json is of another model"));
}

TEST(WriterTest, companions_are_copied_byte_for_byte) {
  const ScratchFolder folder;
  if (world().root()) {
    write_file(folder / "src" / "tokenizer.model", std::string("\0\1\2\xff", 4));
    write_file(folder / "src" / "generation_config.json", "{ }");
    write_file(folder / "src" / "training_args.bin", "not a companion");
  }
  world().barrier("made");
  std::vector<fs::path> copies = companion_files(folder / "src");
  EXPECT_EQ(copies.size(), 2U);
  copies.push_back(folder / "src" / "absent.json");
  write_all(world(), folder / "m", std::uint64_t{1} << 30, copies);
  EXPECT_EQ(read_file(folder / "m" / "tokenizer.model"), std::string("\0\1\2\xff", 4));
  EXPECT_EQ(read_file(folder / "m" / "generation_config.json"), "{ }");
  EXPECT_FALSE(fs::exists(folder / "m" / "training_args.bin"));
}

TEST(WriterTest, incomplete_or_doubled_writes_are_refused_on_every_rank_and_leave_nothing) {
  const ScratchFolder folder;
  const std::vector<TensorSpec> list = {{"a", "F32", {4}}, {"b", "F32", {2, 2}}, {"none", "F32", {0}}};
  for (const bool twice : {false, true}) {
    {
      ParallelWriter writer(world(), folder / "m", list);
      if (world().root()) writer.write("a", at::ones({4}));
      if (twice && world().root()) writer.write("b", at::ones({2, 2}));
      if (twice && world().rank() == world().size() - 1) writer.write("b", at::ones({2, 2}));
      expect_error<InternalError>([&] { writer.finish(llama_json(), {}, {}); }, {"b (", "of 4 elements", "1 tensors"});
    }
    world().barrier("destroyed");
    EXPECT_FALSE(fs::exists(folder / "m"));
    world().barrier("looked");
  }
}

TEST(WriterTest, an_error_on_one_rank_removes_the_temporaries_without_waiting_for_anybody) {
  const ScratchFolder folder;
  try {
    ParallelWriter writer(world(), folder / "m", {{"a", "F32", {4}}});
    EXPECT_TRUE(fs::exists(folder / "m" / "model.safetensors.tmp"));
    world().barrier("seen");
    throw InputError("something else failed");
  } catch (const InputError&) {
  }
  world().barrier("destroyed");
  EXPECT_FALSE(fs::exists(folder / "m"));
}

TEST(WriterTest, what_does_not_match_the_list_is_refused) {
  const ScratchFolder folder;
  ParallelWriter writer(world(), folder / "m", {{"a", "F32", {4}}});
  expect_error<InternalError>([&] { writer.write("b", at::ones({4})); }, {"b"});
  expect_error<InternalError>([&] { writer.write("a", at::ones({2, 2})); }, {"[2, 2]", "[4]"});
  expect_error<InternalError>([&] { writer.write("a", at::ones({4}, at::kDouble)); }, {"F64", "F32"});
  expect_error<InternalError>([&] { writer.write_part("a", 3, at::ones({2})); }, {"3 to 5"});
  EXPECT_THROW(ParallelWriter(world(), folder / "n", {{"a", "F32", {4}}, {"a", "F32", {4}}}), InternalError);
  if (world().size() > 1) {
    EXPECT_THROW(ParallelWriter(world(), folder / "n", {{"a", "F32", {world().rank() + 1}}}), InputError);
  }
}

TEST(WriterTest, impossible_places_and_sizes_fail_alike_on_every_rank) {
  const ScratchFolder folder;
  if (world().root()) write_file(folder / "file", "x");
  world().barrier("made");
  // Ranks other than 0 see rank 0's failure with its code and text.
  const auto refused = [&](const std::string& name, std::int64_t elements, const std::string& part) {
    try {
      ParallelWriter(world(), folder / name, {{"a", "F32", {elements}}});
      ADD_FAILURE() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::io);
      EXPECT_THAT(std::string(error.what()), testing::HasSubstr(part));
    }
  };
  refused("file", 4, "/file");
  refused("m", std::int64_t{1} << 55, "free");
  EXPECT_FALSE(fs::exists(folder / "m" / "model.safetensors.tmp"));
}

}  // namespace
}  // namespace headfold::checkpoint
