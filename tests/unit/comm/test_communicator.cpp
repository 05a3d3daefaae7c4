#include <headfold/base/error.h>

#include <numeric>

#include "world.h"

namespace headfold::comm {
namespace {

using testing_support::world;

TEST(CommunicatorTest, all_reduce_sums_and_takes_extremes) {
  const auto n = static_cast<double>(world().size());
  std::vector<double> values(1000);
  std::iota(values.begin(), values.end(), world().rank());
  world().all_reduce(values);
  for (std::size_t i = 0; i < values.size(); ++i)
    ASSERT_DOUBLE_EQ(values[i], n * static_cast<double>(i) + n * (n - 1) / 2);
  EXPECT_EQ(world().all_reduce(std::int64_t{world().rank()}, Reduce::max), world().size() - 1);
  EXPECT_EQ(world().all_reduce(std::int64_t{world().rank()}, Reduce::min), 0);
}

TEST(CommunicatorTest, broadcast_and_gather_texts_of_unequal_length) {
  std::string text = world().root() ? std::string(3000, 'x') : "old";
  world().broadcast(text);
  EXPECT_EQ(text, std::string(3000, 'x'));
  const auto all = world().all_gather(std::string(static_cast<std::size_t>(world().rank()) * 5, 'a'));
  ASSERT_EQ(all.size(), static_cast<std::size_t>(world().size()));
  for (std::size_t r = 0; r < all.size(); ++r) EXPECT_EQ(all[r].size(), r * 5);
}

TEST(CommunicatorTest, messages_travel_round_the_ring) {
  const int next = (world().rank() + 1) % world().size();
  const int previous = (world().rank() + world().size() - 1) % world().size();
  std::vector<double> out(5000, world().rank());
  std::vector<double> in(5000, -1);
  Request sent = world().isend(std::as_bytes(std::span(out)), next, 7);
  Request received = world().irecv(std::as_writable_bytes(std::span(in)), previous, 7);
  received.wait();
  sent.wait();
  EXPECT_EQ(in.front(), previous);
  EXPECT_EQ(in.back(), previous);
}

TEST(CommunicatorTest, several_sums_under_way_at_once) {
  const int n = world().size();
  std::vector<std::vector<float>> buffers;
  std::vector<Request> requests;
  for (int b = 0; b < 5; ++b) {
    buffers.emplace_back(static_cast<std::size_t>(b == 3 ? 0 : 7001 * (b + 1)));
    for (std::size_t i = 0; i < buffers.back().size(); ++i)
      buffers.back()[i] = static_cast<float>(b + 1) * static_cast<float>(i % 97) + static_cast<float>(world().rank());
  }
  for (auto& buffer : buffers) requests.push_back(world().start_sum(buffer));
  for (auto& request : requests) request.test();
  for (auto& request : requests) request.wait();
  for (int b = 0; b < 5; ++b)
    for (std::size_t i = 0; i < buffers[static_cast<std::size_t>(b)].size(); ++i)
      ASSERT_EQ(buffers[static_cast<std::size_t>(b)][i],
                static_cast<float>(n) * static_cast<float>(b + 1) * static_cast<float>(i % 97) +
                    static_cast<float>(n * (n - 1)) / 2)
          << b << ' ' << i;
}

TEST(CommunicatorTest, sums_have_the_same_bits_on_every_rank) {
  std::vector<float> values(10007);
  for (std::size_t i = 0; i < values.size(); ++i)
    values[i] = 1.0F / static_cast<float>(3 + i + 11 * static_cast<std::size_t>(world().rank()));
  world().start_sum(values).wait();
  const std::string bytes(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
  EXPECT_NO_THROW(world().require_equal(bytes, "the sum"));
}

TEST(CommunicatorTest, reduce_scatter_and_all_gather_of_unequal_parts) {
  const auto n = static_cast<std::int64_t>(world().size());
  const auto own = static_cast<std::size_t>(world().rank());
  std::vector<std::int64_t> counts;
  std::int64_t total = 0;
  for (std::int64_t r = 0; r < n; ++r) {
    counts.push_back(r == 1 ? 0 : 10 + 3 * r);  // a rank may own nothing
    total += counts.back();
  }
  std::int64_t begin = 0;
  for (std::size_t r = 0; r < own; ++r) begin += counts[r];
  std::vector<float> values(static_cast<std::size_t>(total));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i + own);
  std::vector<float> part(static_cast<std::size_t>(counts[own]));
  world().start_reduce_scatter(values, part, counts).wait();
  for (std::size_t i = 0; i < part.size(); ++i)
    ASSERT_EQ(part[i], static_cast<float>(n * (begin + static_cast<std::int64_t>(i)) + n * (n - 1) / 2));
  std::fill(values.begin(), values.end(), -1.0F);
  std::copy(part.begin(), part.end(), values.begin() + begin);
  world().start_all_gather(values, counts).wait();
  for (std::size_t i = 0; i < values.size(); ++i)
    ASSERT_EQ(values[i], static_cast<float>(n * static_cast<std::int64_t>(i) + n * (n - 1) / 2));
  counts[0] += 1;
  EXPECT_THROW((void)world().start_all_gather(values, counts), InternalError);
  EXPECT_THROW((void)world().start_reduce_scatter(values, part, counts), InternalError);
}

TEST(CommunicatorTest, split_groups_by_color) {
  const Communicator half = world().split(world().rank() % 2, -world().rank());
  const int members = (world().size() + (world().rank() % 2 == 0 ? 1 : 0)) / 2;
  EXPECT_EQ(half.size(), members);
  // Ordered by key: the highest world rank of a colour comes first.
  EXPECT_EQ(half.all_reduce(std::int64_t{half.root() ? world().rank() : 0}),
            ((world().size() - 1 - world().rank() % 2) / 2) * 2 + world().rank() % 2);
}

TEST(CommunicatorTest, difference_between_ranks_is_named) {
  EXPECT_NO_THROW(world().require_equal("same", "the build"));
  if (world().size() == 1) GTEST_SKIP() << "needs two ranks";
  EXPECT_THROW(world().require_equal(std::to_string(world().rank()), "the build"), InputError);
}

TEST(CommunicatorTest, failure_on_root_reaches_every_rank_typed) {
  try {
    world().on_root([] { throw UsageError("no such thing", "try another"); });
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::usage);
    EXPECT_STREQ(error.what(), "no such thing");
    EXPECT_EQ(error.hint(), "try another");
  }
  const auto fails = [](const auto& error) { world().on_root([&] { throw error; }); };
  EXPECT_THROW(fails(UsageError("no such thing", "try another")), UsageError);
  EXPECT_THROW(fails(InputError("nonsense: all of it")), InputError);
  EXPECT_THROW(fails(Stopped("before the first step")), Stopped);
  try {
    fails(IoError("/a/file", "cannot be read: no", "look there"));
    FAIL() << "no error";
  } catch (const IoError& error) {
    EXPECT_EQ(describe(error), "IoError: /a/file: cannot be read: no\n  hint: look there");
    EXPECT_EQ(error.file(), "/a/file");
  }
  try {
    fails(std::runtime_error("two\nlines"));
    FAIL() << "no error";
  } catch (const std::exception& error) {
    EXPECT_EQ(describe(error), "InternalError: two\nlines");
  }
  int ran = 0;
  world().on_root([&] { ran = 1; });
  EXPECT_EQ(ran, world().root() ? 1 : 0);
}

TEST(CommunicatorTest, waiting_for_a_silent_peer_ends_with_an_error) {
  if (world().size() == 1) GTEST_SKIP() << "needs two ranks";
  const double before = timeout_seconds();
  set_timeout_seconds(0.3);
  std::byte byte{};
  const Communicator own = world().split(0, world().rank());
  Request silent = own.irecv(std::span(&byte, 1), (own.rank() + 1) % own.size(), 99);
  EXPECT_THROW(silent.wait(), MpiFailure);
  set_timeout_seconds(before);
  // Complete the pending receive so that the communicator can be freed.
  world().barrier("after time-out");
  own.send(std::span(&byte, 1), (own.rank() + own.size() - 1) % own.size(), 99);
  own.barrier("drain");
}

TEST(SelfCommunicatorTest, behaves_as_one_rank) {
  const Communicator self = Communicator::self();
  EXPECT_EQ(self.size(), 1);
  EXPECT_EQ(self.all_reduce(2.5), 2.5);
  int value = 41;
  int got = 0;
  self.send(std::as_bytes(std::span(&value, 1)), 0, 3);
  self.recv(std::as_writable_bytes(std::span(&got, 1)), 0, 3);
  EXPECT_EQ(got, 41);
  EXPECT_THROW(self.recv(std::as_writable_bytes(std::span(&got, 1)), 0, 3), MpiFailure);
}

}  // namespace
}  // namespace headfold::comm
