#include "teacher_cache.h"

#include <headfold/base/error.h>

#include <cmath>

namespace headfold::finetune {
namespace {

constexpr const char* kCacheHint = "remove the file and run again with --teacher to make it anew";

}  // namespace

std::vector<checkpoint::TensorSpec> teacher_cache_tensors(const Dataset& data, std::int64_t width) {
  const std::vector<std::int64_t> shape = {data.sequences(), data.length(), width};
  return {{"log_probs", "F32", shape}, {"tokens", "I32", shape}};
}

std::map<std::string, std::string> teacher_cache_metadata(const Dataset& data, std::int64_t width, std::int64_t vocab,
                                                          const std::string& teacher) {
  return {{"format", kTeacherCacheFormat},     {"version", kTeacherCacheVersion},   {"data", data.fingerprint()},
          {"vocab", fmt::format("{}", vocab)}, {"width", fmt::format("{}", width)}, {"teacher", teacher}};
}

std::uint64_t teacher_cache_bytes(const Dataset& data, std::int64_t width) {
  return checkpoint::lay_out(teacher_cache_tensors(data, width),
                             teacher_cache_metadata(data, width, 1, std::string(64, '0')))
      .file_bytes;
}

std::filesystem::path validation_cache(const std::filesystem::path& file) {
  std::filesystem::path other = file;
  return other.replace_filename(file.stem().string() + "-validation" + file.extension().string());
}

CachedTeacher::CachedTeacher(const std::filesystem::path& path, const Dataset& data, std::int64_t vocab,
                             const std::string& teacher)
    : file_(path), length_(data.length()), vocab_(vocab) {
  const auto value = [&](const char* key) {
    const auto found = file_.metadata().find(key);
    return found == file_.metadata().end() ? std::string("nothing") : found->second.substr(0, 80);
  };
  const auto expect = [&](const char* key, const std::string& expected, const char* what) {
    if (value(key) != expected)
      throw InputError(
          fmt::format("{}: {} is {}, expected {}", path.string(), what, Json(value(key)).dump(-1, ' ', true), expected),
          kCacheHint);
  };
  expect("format", kTeacherCacheFormat, "its format");
  expect("version", kTeacherCacheVersion, "its version");
  expect("data", data.fingerprint(), "the fingerprint of the data it was made from");
  expect("vocab", fmt::format("{}", vocab), "the teacher's vocabulary");
  if (!teacher.empty()) expect("teacher", teacher, "the fingerprint of its teacher");
  teacher_ = value("teacher");
  for (const char* name : {"log_probs", "tokens"})
    if (!file_.has(name)) throw CorruptFile(path.string(), fmt::format("tensor {} is missing", name), kCacheHint);
  const std::vector<std::int64_t> shape = file_.info("log_probs").shape;
  if (shape.size() != 3 || shape[0] != data.sequences() || shape[1] != length_ || shape[2] < 1 || shape[2] > vocab ||
      file_.info("tokens").shape != shape || file_.info("log_probs").dtype != "F32" ||
      file_.info("tokens").dtype != "I32")
    throw CorruptFile(
        path.string(),
        fmt::format("log_probs {} {} and tokens {} {} do not fit {} sequences of {} tokens and a "
                    "vocabulary of {}, expected F32 and I32",
                    file_.info("log_probs").dtype, checkpoint::shape_text(shape), file_.info("tokens").dtype,
                    checkpoint::shape_text(file_.info("tokens").shape), data.sequences(), length_, vocab),
        kCacheHint);
  width_ = shape[2];
  log_probs_ = file_.view("log_probs");
  tokens_ = file_.view("tokens");
}

void CachedTeacher::check_rows(std::int64_t sequence, const at::Tensor& log_probs, const at::Tensor& tokens) const {
  const auto* p = log_probs.data_ptr<float>();
  const auto* token = tokens.data_ptr<std::int32_t>();
  for (std::int64_t row = 0; row < length_; ++row) {
    double sum = 0;
    for (std::int64_t i = row * width_; i < (row + 1) * width_; ++i) {
      if (!(p[i] <= 1e-4F) || token[i] < 0 || token[i] >= vocab_)
        throw CorruptFile(
            file_.map().path().string(),
            fmt::format("sequence {}, position {}: token {} of a vocabulary of {} with log-probability {}", sequence,
                        row, token[i], vocab_, p[i]),
            kCacheHint);
      sum += std::exp(static_cast<double>(p[i]));
    }
    // Positions that are not scored hold zeros.
    const bool unscored = p[row * width_] == 0 && p[(row + 1) * width_ - 1] == 0 && token[row * width_] == 0;
    if (sum > 1.001 && !unscored)
      throw CorruptFile(file_.map().path().string(),
                        fmt::format("sequence {}, position {}: probabilities add up to {}", sequence, row, sum),
                        kCacheHint);
  }
}

TeacherView CachedTeacher::view(const Batch& batch, std::span<const std::int64_t> sequences) const {
  std::vector<at::Tensor> log_probs, tokens;
  for (const std::int64_t sequence : sequences) {
    log_probs.push_back(log_probs_.select(0, sequence).clone());
    tokens.push_back(tokens_.select(0, sequence).clone());
    check_rows(sequence, log_probs.back(), tokens.back());
    // The next epoch comes back to these pages: until then they would only count as this process's memory.
    const auto bytes = static_cast<std::uint64_t>(length_ * width_ * 4);
    for (const char* name : {"log_probs", "tokens"}) {
      const std::uint64_t begin = file_.info(name).begin + static_cast<std::uint64_t>(sequence) * bytes;
      file_.map().done_with(begin, begin + bytes);
    }
  }
  const at::Tensor scored = batch.targets.reshape({-1}).ge(0).nonzero().squeeze(1);
  TeacherView view;
  view.top_log_probs = at::cat(log_probs).index_select(0, scored);
  view.top_tokens = at::cat(tokens).index_select(0, scored).to(at::kLong);
  return view;
}

}  // namespace headfold::finetune
