#include <headfold/base/files.h>
#include <headfold/base/json.h>

#include "world.h"

namespace headfold {
namespace {

TEST(JsonTest, duplicate_keys_are_refused_at_any_depth) {
  EXPECT_THROW(parse_json(R"({"a": 1, "a": 2})", "f"), CorruptFile);
  EXPECT_THROW(parse_json(R"({"x": {"a": 1, "b": 2, "a": 3}})", "f"), CorruptFile);
  EXPECT_NO_THROW(parse_json(R"({"x": {"a": 1}, "y": {"a": 1}})", "f"));
}

TEST(JsonTest, broken_text_names_the_file) {
  for (const char* text : {"", "{", "{\"a\":}", "{} trailing", "{\"a\": \"\xff\"}"}) {
    try {
      parse_json(text, "some/config.json");
      FAIL() << "accepted: " << text;
    } catch (const CorruptFile& error) {
      EXPECT_EQ(error.file(), "some/config.json");
    }
  }
}

TEST(JsonTest, deep_nesting_is_an_error_not_a_crash) {
  EXPECT_THROW(parse_json(std::string(100000, '['), "f"), CorruptFile);
}

TEST(JsonTest, required_and_optional_name_key_and_file) {
  const Json json = parse_json(R"({"n": 3, "s": "x", "z": null})", "f");
  EXPECT_EQ(required<int>(json, "n", "f"), 3);
  EXPECT_EQ(optional<int>(json, "z", 7, "f"), 7);
  EXPECT_EQ(optional<int>(json, "absent", 8, "f"), 8);
  EXPECT_THROW(required<int>(json, "s", "f"), InputError);
  EXPECT_THROW(required<int>(json, "z", "f"), InputError);
  EXPECT_THROW(optional<int>(json, "s", 1, "f"), InputError);
}

}  // namespace
}  // namespace headfold
