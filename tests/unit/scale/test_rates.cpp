// Data sheets and files of rates.

#include <gmock/gmock.h>
#include <headfold/base/files.h>
#include <headfold/scale/rates.h>

#include "world.h"

namespace headfold::scale {
namespace {

using testing::AllOf;
using testing::HasSubstr;

class RatesFile : public testing::Test {
 protected:
  static Json good() {
    return Json::parse(R"({"format": "headfold-rates", "format_version": 1, "device": "cpu", "cores": 4, "threads": 2,
      "node_memory_bytes": 8e9, "figures": {"memory": {"value": 1e10, "unit": "B/s"},
      "product.float32": {"value": 1e11, "unit": "FLOP/s"}}})");
  }
  fs::path write(const Json& json) {
    write_file(file(), json.dump());
    return file();
  }
  fs::path file() const { return scratch_ / "rates.json"; }
  /// What reading says about the file.
  std::string fault(const Json& json) {
    write(json);
    try {
      read_rates(file());
    } catch (const InputError& error) {
      return error.what();
    } catch (const CorruptFile& error) {
      return error.what();
    }
    return "none";
  }
  testing_support::ScratchFolder scratch_;
};

TEST(Sheets, every_device_has_every_figure_with_its_unit_and_says_that_nothing_was_measured) {
  for (const std::string& name : sheet_names()) {
    const Rates rates = sheet_rates(name);
    EXPECT_GT(rates.device_memory, 0) << name;
    for (const char* figure : {"product.float32",
                               "product.bfloat16",
                               "attention.bfloat16",
                               "element_wise.bfloat16",
                               "gram.bfloat16",
                               "head.bfloat16",
                               "training.bfloat16",
                               "load.bfloat16",
                               "fold",
                               "eigen",
                               "memory",
                               "read",
                               "copy",
                               "write",
                               "statistics",
                               "inside",
                               "network",
                               "inside_latency",
                               "network_latency",
                               "storage"}) {
      ASSERT_TRUE(rates.has(figure)) << name << " " << figure;
      EXPECT_GT(rates.value(figure), 0) << name << " " << figure;
      EXPECT_EQ(rates.at(figure).unit, unit_of(figure));
      EXPECT_FALSE(rates.at(figure).measured()) << name << " " << figure;
    }
    // A share of a stated figure never exceeds it.
    EXPECT_LE(rates.value("product.bfloat16"), sheets().at(name).at("product.bfloat16").get<double>());
    EXPECT_LE(rates.value("memory"), sheets().at(name).at("memory").get<double>());
  }
  EXPECT_THROW(sheet_rates("h1000"), UsageError);
  EXPECT_THROW(sheet_rates("share"), UsageError);  // a key of the table, no device
}

TEST_F(RatesFile, what_is_written_is_read_back) {
  const Rates first = read_rates(write(good()));
  EXPECT_EQ(first.cores, 4);
  EXPECT_EQ(first.threads, 2);
  EXPECT_EQ(first.value("product.float32"), 1e11);
  EXPECT_TRUE(first.at("memory").measured());
  const Rates again = read_rates(write(Json::parse(to_json(first, {}).dump())));
  EXPECT_EQ(again.value("memory"), 1e10);
  EXPECT_EQ(again.cores, first.cores);
  try {
    first.value("gram.bfloat16");
    FAIL();
  } catch (const UsageError& error) {
    EXPECT_THAT(error.what(), AllOf(HasSubstr("rates.json"), HasSubstr("gram.bfloat16")));
    EXPECT_THAT(error.hint(), HasSubstr("--dtype bfloat16"));
  }
}

TEST_F(RatesFile, a_gpu_s_file_keeps_the_data_sheet_where_nothing_was_measured) {
  Json json = good();
  json["device"] = "h100";
  const Rates rates = read_rates(write(json));
  EXPECT_TRUE(rates.at("memory").measured());
  EXPECT_FALSE(rates.at("product.bfloat16").measured());
  EXPECT_EQ(rates.cores, 0);
  EXPECT_EQ(rates.device_memory, 80e9);
}

TEST_F(RatesFile, nonsense_is_refused_with_file_and_field) {
  EXPECT_EQ(fault(good()), "none");
  const auto changed = [&](const char* pointer, const Json& value) {
    Json json = good();
    json[Json::json_pointer(pointer)] = value;
    return fault(json);
  };
  const auto names = [&](const char* field) { return AllOf(HasSubstr("rates.json"), HasSubstr(field)); };
  EXPECT_THAT(fault(Json::array()), names("format"));
  EXPECT_THAT(changed("/format", "headfold-results"), names("format"));
  EXPECT_THAT(changed("/format_version", 2), names("format_version"));
  for (const Json& value : {Json("gpu"), Json(3), Json(nullptr)})
    EXPECT_THAT(changed("/device", value), names("device"));
  for (const Json& value : {Json(0), Json(-1), Json(1.5), Json("two"), Json(1 << 30)}) {
    EXPECT_THAT(changed("/cores", value), names("cores"));
    EXPECT_THAT(changed("/threads", value), names("threads"));
  }
  for (const Json& value : {Json(0), Json(-5e9), Json("much")})
    EXPECT_THAT(changed("/node_memory_bytes", value), names("node_memory_bytes"));
  for (const Json& value :
       {Json(0), Json(-1.0), Json(1e-320), Json(1e200), Json("fast"), Json(nullptr), Json(Json::array())})
    EXPECT_THAT(changed("/figures/memory/value", value), names("memory"));
  EXPECT_THAT(changed("/figures/memory/unit", "FLOP/s"), AllOf(names("memory"), HasSubstr("B/s")));
  EXPECT_THAT(changed("/figures/memory", 1e10), names("memory"));
  EXPECT_THAT(changed("/figures/speed", {{"value", 1}, {"unit", "B/s"}}), names("speed"));
  EXPECT_THAT(changed("/figures/product", {{"value", 1}, {"unit", "FLOP/s"}}), names("product"));  // no dtype
  EXPECT_THAT(changed("/figures", Json::object()), names("figures"));
  EXPECT_THAT(changed("/figures", "all"), names("figures"));
  write_file(file(), "{\"format\": ");
  EXPECT_THROW(read_rates(file()), CorruptFile);
  EXPECT_THROW(read_rates(scratch_ / "absent.json"), IoError);
}

}  // namespace
}  // namespace headfold::scale
