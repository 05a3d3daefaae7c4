#pragma once
// Private: what a teacher cache (docs/formats.md) consists of.

#include <headfold/finetune/teacher.h>

#include <map>

namespace headfold::finetune {

constexpr const char* kTeacherCacheFormat = "headfold-teacher-cache";
constexpr const char* kTeacherCacheVersion = "1";

/// log_probs and tokens, in this order.
std::vector<checkpoint::TensorSpec> teacher_cache_tensors(const Dataset& data, std::int64_t width);
std::map<std::string, std::string> teacher_cache_metadata(const Dataset& data, std::int64_t width, std::int64_t vocab,
                                                          const std::string& teacher);

}  // namespace headfold::finetune
