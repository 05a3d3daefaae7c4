#include <headfold/base/error.h>
#include <headfold/device/device.h>
#include <headfold/device/gpu.h>

#include <gmock/gmock.h>

#include "world.h"

namespace headfold::device {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using Chosen = std::vector<int>;

const std::vector<std::string> kTwo = {"0000:3b:00.0", "0000:86:00.0"};

TEST(ChooseGpusTest, a_rank_takes_the_gpu_of_its_place_on_the_machine) {
  EXPECT_EQ(choose_gpus({{"a", kTwo}, {"a", kTwo}, {"b", kTwo}, {"b", kTwo}}, false), (Chosen{0, 1, 0, 1}));
  // Ranks dealt out in turn.
  EXPECT_EQ(choose_gpus({{"a", kTwo}, {"b", kTwo}, {"a", kTwo}, {"b", kTwo}}, false), (Chosen{0, 0, 1, 1}));
}

TEST(ChooseGpusTest, a_launcher_that_gave_each_rank_one_is_obeyed) {
  EXPECT_EQ(choose_gpus({{"a", {kTwo[1]}}, {"a", {kTwo[0]}}}, false), (Chosen{0, 0}));
}

TEST(ChooseGpusTest, sharing_is_refused_unless_asked_for) {
  try {
    choose_gpus({{"a", kTwo}, {"a", kTwo}, {"a", kTwo}}, false);
    FAIL() << "no error";
  } catch (const UsageError& error) {
    EXPECT_THAT(error.what(), AllOf(HasSubstr("ranks 0 and 2 on a"), HasSubstr(kTwo[0])));
    EXPECT_THAT(error.hint(), HasSubstr("--share-gpus"));
  }
  // The same variable for all ranks: they see one GPU, and it is the same.
  EXPECT_THROW(choose_gpus({{"a", {kTwo[0]}}, {"a", {kTwo[0]}}}, false), UsageError);
  EXPECT_EQ(choose_gpus({{"a", kTwo}, {"a", kTwo}, {"a", kTwo}}, true), (Chosen{0, 1, 0}));
  // The same address on another machine is another GPU.
  EXPECT_EQ(choose_gpus({{"a", {kTwo[0]}}, {"b", {kTwo[0]}}}, false), (Chosen{0, 0}));
}

TEST(ChooseGpusTest, machines_without_gpus_have_none) {
  EXPECT_EQ(choose_gpus({{"a", {}}, {"b", kTwo}, {"a", {}}}, false), (Chosen{-1, 0, -1}));
}

TEST(CoresTextTest, lists_as_many_cores_as_are_usable) {
  const std::string text = cores_text();
  int cores = 0;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find(',', at), text.size());
    const std::string part = text.substr(at, end - at);
    const std::size_t dash = part.find('-');
    cores += dash == std::string::npos ? 1 : std::stoi(part.substr(dash + 1)) - std::stoi(part) + 1;
    at = end + 1;
  }
  EXPECT_EQ(cores, usable_cores()) << text;
}

}  // namespace
}  // namespace headfold::device
