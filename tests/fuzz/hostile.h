#pragma once
// What the tests with hostile files share: reproducible mutations, the count of their outcomes, and a lid on memory.

#include <gtest/gtest.h>
#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/base/json.h>

#include <sys/resource.h>

#include <fstream>
#include <random>

#include "world.h"

namespace headfold::testing_support {

/// Random changes to a text or a binary file; the same ones for the same seed.
class Mutator {
 public:
  explicit Mutator(std::uint64_t seed) : random_(seed) {}

  std::uint64_t below(std::uint64_t limit) { return limit == 0 ? 0 : random_() % limit; }

  /// A few random changes, at places where a format is likely to break.
  std::string mutate(std::string text) {
    for (std::uint64_t n = 1 + below(3); n > 0; --n) text = once(std::move(text));
    return text;
  }

  /// Up to four bytes changed, the length kept.
  std::string flip(std::string bytes) {
    for (std::uint64_t n = 1 + below(4); n > 0 && !bytes.empty(); --n) {
      char& byte = bytes[below(bytes.size())];
      byte = static_cast<char>(below(2) == 0 ? byte ^ (1 << below(8)) : static_cast<int>(below(256)));
    }
    return bytes;
  }

 private:
  std::string once(std::string text) {
    static constexpr char special[] = "{}[]\",:-+.0123456789eE\\/utrnfls \xff\xc0\x80";  // and the final zero
    static const std::vector<std::string> words = {"0",
                                                   "-1",
                                                   "1",
                                                   "4",
                                                   "18446744073709551615",
                                                   "18446744073709551616",
                                                   "9223372036854775807",
                                                   "9223372036854775808",
                                                   "4294967296",
                                                   "1e308",
                                                   "0.5",
                                                   "null",
                                                   "true",
                                                   "[]",
                                                   "{}",
                                                   "\"\"",
                                                   "\"F32\"",
                                                   "\"BF16\"",
                                                   "\"BOOL\"",
                                                   "\"F64\"",
                                                   "\\u0000",
                                                   "\\ud800",
                                                   "../",
                                                   "__metadata__"};
    const std::uint64_t at = below(text.size());
    const std::uint64_t length = 1 + below(std::min<std::uint64_t>(24, text.size()));
    switch (below(8)) {
      case 0:
        if (!text.empty()) text[at] = static_cast<char>(text[at] ^ (1 << below(8)));
        return text;
      case 1:
        if (!text.empty()) text[at] = special[below(sizeof(special))];
        return text;
      case 2:
        return text.erase(std::min<std::size_t>(at, text.size()), length);
      case 3:
        return text.insert(at, text.substr(below(text.size() + 1), length));
      case 4:
        return text.substr(0, at);
      case 5:
        return text.insert(at, words[below(words.size())]);
      default: {  // replace a number, the likeliest way to lie
        std::size_t from = text.find_first_of("0123456789", at);
        if (from == std::string::npos) from = text.find_first_of("0123456789");
        if (from == std::string::npos) return text;
        const std::size_t to = text.find_first_not_of("0123456789", from);
        return text.replace(from, to == std::string::npos ? std::string::npos : to - from, words[below(words.size())]);
      }
    }
  }

  std::mt19937_64 random_;
};

/// Values of every type, and numbers at the edges of every width: what a key of a JSON file may be replaced by.
inline const std::vector<Json>& nasty_values() {
  static const std::vector<Json> values = [] {
    Json deep = 1;
    for (int i = 0; i < 150; ++i) deep = i % 2 == 0 ? Json::array({deep}) : Json{{"k", deep}};
    std::vector<Json> all = {nullptr, true, false, 0, 1, -1, 2, 7, 0.5, -0.0, 1e300, -1e300, 5e-324, "", "0", "x"};
    for (const std::int64_t edge : {INT64_MIN, INT64_MAX, std::int64_t{INT32_MIN}, std::int64_t{INT32_MAX} + 1,
                                    std::int64_t{1} << 16, std::int64_t{1} << 24, std::int64_t{100000}})
      all.emplace_back(edge);
    all.emplace_back(UINT64_MAX);
    all.emplace_back(std::string(5000, 'z'));
    all.emplace_back(std::string("a\0b", 3));
    all.emplace_back("../../etc/passwd");
    for (const char* text : {"[]", "{}", "[[]]", "[{}]", "[null]", "[-1]", "[1e300]", "[0,0]", R"(["a","a"])",
                             R"({"type":"Sequence"})", R"({"id":-1,"content":"x"})"})
      all.push_back(Json::parse(text));
    all.push_back(deep);
    return all;
  }();
  return values;
}

/// Places in a JSON document; of a list longer than six only the first three and the last members.
inline void places_in(const Json& value, const Json::json_pointer& here, std::vector<Json::json_pointer>& places) {
  places.push_back(here);
  if (value.is_object())
    for (const auto& [key, member] : value.items()) {
      places_in(member, here / key, places);
      if (places.size() > 4000) return;
    }
  if (value.is_array())
    for (std::size_t i = 0; i < value.size(); ++i)
      if (i < 3 || i + 1 == value.size()) places_in(value[i], here / i, places);
}

/// Calls `with(document, description)` with every place of `document` replaced by every nasty value, and left out; with
/// `every` > 1, by one of so many values, from the `first`.
template <class F>
void for_each_edit(const Json& document, F&& with, std::size_t every = 1, std::size_t first = 0) {
  std::vector<Json::json_pointer> places;
  places_in(document, Json::json_pointer(), places);
  std::size_t edit = first;
  for (const Json::json_pointer& place : places) {
    for (const Json& value : nasty_values()) {
      if (edit++ % every != 0) continue;
      Json edited = document;
      edited[place] = value;
      with(edited, place.to_string() + " = " + value.dump().substr(0, 60));
    }
    if (place.empty()) continue;
    Json edited = document;
    Json& parent = edited[place.parent_pointer()];
    if (parent.is_object())
      parent.erase(place.back());
    else
      parent.erase(std::stoul(place.back()));
    with(edited, place.to_string() + " left out");
  }
}

/// Without fsync: thousands of files. Removed first, because some file systems flush a file that is cut and written
/// again.
inline void put(const fs::path& path, const std::string& content) {
  std::error_code code;
  fs::remove(path, code);
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out.write(content.data(), static_cast<std::streamsize>(content.size()));
  if (!out) throw IoError(path.string(), "cannot be written");
}

/// Counts outcomes; anything but success or a headfold::Error about the input that names `file` fails the test.
class Outcomes {
 public:
  explicit Outcomes(std::string file) : file_(std::move(file)) {}

  template <class F>
  void run(const std::string& what, F&& work) {
    try {
      work();
      ++opened;
    } catch (const Error& error) {
      ++refused;
      const std::string text = error.what();
      if (text.find(file_) == std::string::npos) fail(what, "the error does not name " + file_ + ": " + text);
      if (error.code() != ExitCode::bad_input && error.code() != ExitCode::io)
        fail(what, fmt::format("{} is no error of the input: {}", error.kind(), text));
      if (text.size() > 8000) fail(what, fmt::format("a message of {} bytes", text.size()));
    } catch (const std::exception& error) {
      fail(what, std::string("untyped ") + error.what());
    }
  }
  std::int64_t opened = 0;
  std::int64_t refused = 0;

 private:
  void fail(const std::string& what, const std::string& why) {
    // A hundred failures of one cause say no more than ten.
    if (++failures_ <= 10) ADD_FAILURE() << what.substr(0, 400) << "\n" << why.substr(0, 800);
  }
  std::string file_;
  int failures_ = 0;
};

/// While it lives, memory beyond what the process has now is short: an allocation by a file's word fails at once. Under
/// the sanitizers address space is theirs; there max_allocation_size_mb (cmake/HeadfoldTest.cmake) does this.
class MemoryLid {
 public:
  MemoryLid() {
#if !defined(__SANITIZE_ADDRESS__)
    std::ifstream statm("/proc/self/statm");
    rlim_t pages = 0;
    statm >> pages;
    ::getrlimit(RLIMIT_AS, &before_limit_);
    rlimit limit = before_limit_;
    limit.rlim_cur = pages * static_cast<rlim_t>(::sysconf(_SC_PAGESIZE)) + (rlim_t{1} << 30);
    if (limit.rlim_max == RLIM_INFINITY || limit.rlim_cur < limit.rlim_max) ::setrlimit(RLIMIT_AS, &limit);
#endif
  }
  ~MemoryLid() {
#if !defined(__SANITIZE_ADDRESS__)
    ::setrlimit(RLIMIT_AS, &before_limit_);
    EXPECT_LT(peak_resident_bytes(), before_ + (std::uint64_t{200} << 20)) << "memory was allocated by the file's word";
#endif
  }
  MemoryLid(const MemoryLid&) = delete;
  MemoryLid& operator=(const MemoryLid&) = delete;

 private:
  rlimit before_limit_{};
  std::uint64_t before_ = peak_resident_bytes();
};

}  // namespace headfold::testing_support
