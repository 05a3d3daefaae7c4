#include <headfold/checkpoint/safetensors.h>

#include "files.h"
#include "world.h"

namespace headfold::checkpoint {
namespace {

using testing_support::expect_error;
using testing_support::ScratchFolder;
using testing_support::write_raw;

TEST(SafetensorsTest, every_dtype_returns_as_it_went) {
  const ScratchFolder folder;
  std::map<std::string, at::Tensor> tensors;
  for (const at::ScalarType type : {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16, at::kLong, at::kInt, at::kShort,
                                    at::kChar, at::kByte, at::kBool})
    tensors[std::string("t_") + c10::toString(type)] = (at::arange(6, at::kFloat) - 2).to(type).view({2, 3});
  tensors["transposed"] = at::arange(12, at::kFloat).view({3, 4}).t();
  tensors["scalar"] = at::scalar_tensor(2.5);
  tensors["empty"] = at::empty({0, 7}, at::kBFloat16);
  tensors["complex"] = at::complex(at::arange(3, at::kFloat), at::ones({3}));
  write_safetensors(folder / "a.safetensors", tensors, {{"made_by", "tests"}});
  const SafetensorsFile file(folder / "a.safetensors");
  EXPECT_EQ(file.tensors().size(), tensors.size());
  EXPECT_EQ(file.metadata().at("format"), "pt");
  EXPECT_EQ(file.metadata().at("made_by"), "tests");
  for (const auto& [name, tensor] : tensors) {
    const at::Tensor read = file.view(name);
    EXPECT_EQ(read.scalar_type(), tensor.scalar_type()) << name;
    EXPECT_TRUE(at::equal(read, tensor)) << name;
  }
  // Data begins 8-aligned and wide types come first, so that every element is aligned in the map.
  for (const auto& [name, info] : file.tensors()) EXPECT_EQ(info.begin % element_size(info.dtype), 0U) << name;
  expect_error<InputError>([&] { file.info("nobody"); }, {"a.safetensors", "nobody"});
  EXPECT_TRUE(std::filesystem::exists(folder / "a.safetensors"));
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 1) << "a temporary was left";
}

TEST(SafetensorsTest, view_outlives_the_file_object_and_the_name) {
  const ScratchFolder folder;
  write_safetensors(folder / "a.safetensors", {{"x", at::arange(1000, at::kFloat)}});
  at::Tensor view;
  {
    const SafetensorsFile file(folder / "a.safetensors");
    view = file.view("x");
  }
  std::filesystem::remove(folder / "a.safetensors");
  EXPECT_EQ(view.sum().item<float>(), 499500.0F);
}

TEST(SafetensorsTest, bytes_are_those_of_the_reference_library) {
  const ScratchFolder folder;
  write_safetensors(
      folder / "a.safetensors",
      {{"b", at::ones({2}, at::kByte)}, {"a", at::ones({1}, at::kByte)}, {"c", at::ones({1}, at::kFloat)}});
  const std::string content = read_file(folder / "a.safetensors");
  const std::string header =
      R"({"__metadata__":{"format":"pt"},"c":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
      R"("a":{"dtype":"U8","shape":[1],"data_offsets":[4,5]},"b":{"dtype":"U8","shape":[2],"data_offsets":[5,7]}})";
  ASSERT_GT(content.size(), header.size() + 8);
  EXPECT_EQ(content.substr(8, header.size()), header);
  const auto length = static_cast<std::size_t>(static_cast<unsigned char>(content[0]));
  EXPECT_EQ(length % 8, 0U);
  EXPECT_EQ(content.size(), 8 + length + 7);
  EXPECT_EQ(content.substr(8 + header.size(), length - header.size()), std::string(length - header.size(), ' '));
}

TEST(SafetensorsTest, unaligned_data_is_read) {
  const ScratchFolder folder;
  // 61 bytes of header: the reference library's reader accepts it, so this one does.
  std::string header = R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  while (header.size() % 4 != 1) header += ' ';
  write_raw(folder / "a.safetensors", header, 8);
  const SafetensorsFile file(folder / "a.safetensors");
  const at::Tensor view = file.view("x");
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(view.data_ptr()) % 4, 0U);
  EXPECT_EQ(view.view(at::kInt)[1].item<int>(), 0x01010101);
}

TEST(SafetensorsTest, zero_size_tensors_and_empty_files) {
  const ScratchFolder folder;
  write_raw(
      folder / "a.safetensors",
      R"({"e":{"dtype":"F32","shape":[0],"data_offsets":[4,4]},"x":{"dtype":"F32","shape":[],"data_offsets":[0,4]},)"
      R"("z":{"dtype":"F32","shape":[3,0,4611686018],"data_offsets":[0,0]}})",
      4);
  const SafetensorsFile file(folder / "a.safetensors");
  EXPECT_EQ(file.view("z").numel(), 0);
  EXPECT_EQ(file.view("x").dim(), 0);
  write_safetensors(folder / "none.safetensors", {});
  EXPECT_TRUE(SafetensorsFile(folder / "none.safetensors").tensors().empty());
}

/// One broken header and what the error must name.
struct Hostile {
  const char* title;
  std::string header;
  std::size_t data;
  std::vector<std::string> parts;
};

class HostileTest : public testing::TestWithParam<Hostile> {};

TEST_P(HostileTest, is_refused_naming_file_and_tensor) {
  const ScratchFolder folder;
  write_raw(folder / "h.safetensors", GetParam().header, GetParam().data);
  std::vector<std::string> parts = GetParam().parts;
  parts.emplace_back("h.safetensors");
  expect_error<CorruptFile>([&] { SafetensorsFile(folder / "h.safetensors"); }, parts);
}

std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
  return fmt::format(R"("{}":{{"dtype":"{}","shape":{},"data_offsets":{}}})", name, dtype, shape, offsets);
}

INSTANTIATE_TEST_SUITE_P(
    Headers, HostileTest,
    testing::Values(
        Hostile{"truncated_data", "{" + entry("a", "F32", "[4]", "[0,16]") + "}", 12, {"\"a\"", "12 bytes"}},
        Hostile{"trailing_data", "{" + entry("a", "F32", "[4]", "[0,16]") + "}", 20, {"cover 16 bytes", "20 bytes"}},
        Hostile{"overlap",
                "{" + entry("a", "F32", "[2]", "[0,8]") + "," + entry("b", "F32", "[2]", "[4,12]") + "}",
                12,
                {"\"a\"", "\"b\"", "overlap"}},
        Hostile{"same_place",
                "{" + entry("a", "F32", "[2]", "[0,8]") + "," + entry("b", "F32", "[2]", "[0,8]") + "}",
                8,
                {"\"b\"", "overlap"}},
        Hostile{"gap",
                "{" + entry("a", "F32", "[1]", "[0,4]") + "," + entry("b", "F32", "[1]", "[8,12]") + "}",
                12,
                {"\"b\"", "4 to 8"}},
        Hostile{"gap_at_start", "{" + entry("a", "F32", "[1]", "[4,8]") + "}", 8, {"\"a\"", "0 to 4"}},
        Hostile{"empty_inside_other",
                "{" + entry("a", "F32", "[2]", "[0,8]") + "," + entry("z", "F32", "[0]", "[4,4]") + "}",
                8,
                {"\"z\"", "overlap"}},
        Hostile{"reversed", "{" + entry("a", "F32", "[1]", "[4,0]") + "}", 4, {"\"a\"", "before it begins"}},
        Hostile{"wrong_shape", "{" + entry("a", "F32", "[3]", "[0,16]") + "}", 16, {"\"a\"", "[3]", "12 bytes", "16"}},
        Hostile{"wrong_dtype", "{" + entry("a", "F64", "[4]", "[0,16]") + "}", 16, {"\"a\"", "F64", "32 bytes"}},
        Hostile{"unknown_dtype", "{" + entry("a", "F128", "[1]", "[0,16]") + "}", 16, {"\"a\"", "F128"}},
        Hostile{"dtype_no_text", R"({"a":{"dtype":4,"shape":[1],"data_offsets":[0,4]}})", 4, {"\"a\"", "dtype"}},
        Hostile{"product_overflows",
                "{" + entry("a", "F32", "[4294967296,4294967296]", "[0,16]") + "}",
                16,
                {"\"a\"", "overflow"}},
        Hostile{"product_wraps_to_size",
                "{" + entry("a", "U8", "[4294967297,4294967296,4294967296]", "[0,16]") + "}",
                16,
                {"\"a\"", "overflow"}},
        Hostile{"bytes_overflow",
                "{" + entry("a", "F64", "[2305843009213693953]", "[0,8]") + "}",
                8,
                {"\"a\"", "overflow"}},
        Hostile{"zero_hides_overflow",
                "{" + entry("a", "F32", "[0,9223372036854775807,9223372036854775807]", "[0,0]") + "}",
                0,
                {"\"a\"", "overflow"}},
        Hostile{"terabytes",
                "{" + entry("a", "F32", "[1099511627776]", "[0,4398046511104]") + "}",
                16,
                {"\"a\"", "4398046511104"}},
        Hostile{"negative_extent", "{" + entry("a", "F32", "[-1,-4]", "[0,16]") + "}", 16, {"\"a\"", "-1"}},
        Hostile{"fractional_extent", "{" + entry("a", "F32", "[4.0]", "[0,16]") + "}", 16, {"\"a\"", "4.0"}},
        Hostile{
            "extent_beyond_64_bits", "{" + entry("a", "F32", "[36893488147419103232]", "[0,16]") + "}", 16, {"\"a\""}},
        Hostile{"extent_is_text", "{" + entry("a", "F32", "[\"4\"]", "[0,16]") + "}", 16, {"\"a\"", "extent"}},
        Hostile{"shape_no_list", "{" + entry("a", "F32", "4", "[0,16]") + "}", 16, {"\"a\"", "shape"}},
        Hostile{
            "many_dimensions",
            "{" + entry("a", "F32", "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]", "[0,4]") +
                "}",
            4,
            {"\"a\"", "34 dimensions"}},
        Hostile{"negative_offset", "{" + entry("a", "F32", "[4]", "[-16,0]") + "}", 16, {"\"a\"", "data_offsets"}},
        Hostile{"offset_beyond_63_bits",
                "{" + entry("a", "F32", "[4]", "[18446744073709551600,18446744073709551615]") + "}",
                16,
                {"\"a\"", "data_offsets"}},
        Hostile{"three_offsets", "{" + entry("a", "F32", "[4]", "[0,8,16]") + "}", 16, {"\"a\"", "data_offsets"}},
        Hostile{"duplicate_name",
                "{" + entry("a", "F32", "[1]", "[0,4]") + "," + entry("a", "F32", "[1]", "[4,8]") + "}",
                8,
                {"\"a\"", "twice"}},
        Hostile{"duplicate_by_escape",
                "{" + entry("a", "F32", "[1]", "[0,4]") + "," + entry("\\u0061", "F32", "[1]", "[4,8]") + "}",
                8,
                {"\"a\"", "twice"}},
        Hostile{"name_not_utf8", "{" + entry("\xff\xfe", "F32", "[1]", "[0,4]") + "}", 4, {"JSON"}},
        Hostile{"overlong_utf8", "{" + entry("\xc0\xaf", "F32", "[1]", "[0,4]") + "}", 4, {"JSON"}},
        Hostile{"lone_surrogate", "{" + entry("\\ud800", "F32", "[1]", "[0,4]") + "}", 4, {"JSON"}},
        Hostile{"entry_no_object", R"({"a":3})", 0, {"\"a\"", "object"}},
        Hostile{"metadata_no_text", R"({"__metadata__":{"format":{"x":1}}})", 0, {"__metadata__", "format"}},
        Hostile{"metadata_no_object", R"({"__metadata__":"pt"})", 0, {"__metadata__"}},
        Hostile{"header_is_list", "[1,2,3]", 0, {"'{'"}},
        Hostile{"header_is_cut", "{" + entry("a", "F32", "[4]", "[0,16]"), 16, {"JSON"}},
        Hostile{"two_documents", "{}{}", 0, {"JSON"}},
        Hostile{"deep_nesting", R"({"a":)" + std::string(100000, '['), 0, {"nested"}}),
    [](const auto& instance) { return instance.param.title; });

TEST(SafetensorsTest, wrong_lengths_are_refused_before_anything_is_read) {
  const ScratchFolder folder;
  const std::string header = "{" + entry("a", "F32", "[1]", "[0,4]") + "}";
  const auto refused = [&](const std::vector<std::string>& parts) {
    expect_error<CorruptFile>([&] { SafetensorsFile(folder / "h.safetensors"); }, parts);
  };
  for (const std::uint64_t claimed : {UINT64_MAX - 1, std::uint64_t{1} << 63, UINT64_MAX - 8, std::uint64_t{1000}}) {
    write_raw(folder / "h.safetensors", header, 4, claimed);
    refused({"h.safetensors", fmt::format("{}", claimed)});
  }
  for (const std::size_t size : {0, 1, 7}) {
    write_file(folder / "h.safetensors", std::string(size, '\0'));
    refused({"h.safetensors", "at least 8"});
  }
  write_file(folder / "h.safetensors", std::string(8, '\0'));
  refused({"'{'"});
  // Every truncation of a right file is found.
  write_raw(folder / "h.safetensors", header, 4);
  const std::string whole = read_file(folder / "h.safetensors");
  for (std::size_t size = 0; size < whole.size(); ++size) {
    write_file(folder / "h.safetensors", whole.substr(0, size));
    EXPECT_THROW(SafetensorsFile(folder / "h.safetensors"), CorruptFile) << size;
  }
  EXPECT_THROW(SafetensorsFile(folder / "absent.safetensors"), IoError);
  EXPECT_THROW(SafetensorsFile(folder.path()), IoError);
}

TEST(SafetensorsTest, types_without_arithmetic_open_but_give_no_view) {
  const ScratchFolder folder;
  write_raw(folder / "a.safetensors", "{" + entry("q", "F8_E4M3", "[4]", "[0,4]") + "}", 4);
  const SafetensorsFile file(folder / "a.safetensors");
  expect_error<InputError>([&] { file.view("q"); }, {"a.safetensors", "\"q\"", "F8_E4M3"});
}

}  // namespace
}  // namespace headfold::checkpoint
