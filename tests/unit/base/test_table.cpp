#include <headfold/base/error.h>
#include <headfold/base/log.h>
#include <headfold/base/table.h>

#include "world.h"

namespace headfold {
namespace {

TEST(TableTest, numbers_align_right_and_text_left) {
  Table table({"name", "value"});
  table.add({"a", "1.5"});
  table.add({"long", "10"});
  EXPECT_EQ(table.text(), "name  value\na       1.5\nlong     10\n");
  EXPECT_EQ(table.markdown(), "| name | value |\n| --- | --- |\n| a | 1.5 |\n| long | 10 |\n");
  EXPECT_THROW(table.add({"too few"}), InternalError);
}

TEST(TableTest, csv_quotes_what_needs_it) {
  Table table({"a", "b"});
  table.add({"x,y", "say \"hi\""});
  EXPECT_EQ(table.csv(), "a,b\n\"x,y\",\"say \"\"hi\"\"\"\n");
}

TEST(FormatTest, bytes_and_seconds) {
  EXPECT_EQ(human_bytes(512), "512 B");
  EXPECT_EQ(human_bytes(1536), "1.5 KiB");
  EXPECT_EQ(human_bytes(3.0 * 1024 * 1024 * 1024), "3.0 GiB");
  EXPECT_EQ(human_seconds(0.31), "310 ms");
  EXPECT_EQ(human_seconds(190), "3 min 10 s");
  EXPECT_EQ(human_seconds(3720), "1 h 02 min");
  EXPECT_EQ(human_seconds(1e24), "1e+24 s");
}

}  // namespace
}  // namespace headfold
