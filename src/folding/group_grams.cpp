#include "group_grams.h"

#include <headfold/base/error.h>
#include <headfold/base/profile.h>
#include <headfold/linalg/linalg.h>

namespace headfold::folding {

GroupGrams::GroupGrams(const LayerProblem& problem, std::shared_ptr<GroupGrams> queries_of)
    : weights_(problem.weights),
      moment_(problem.moments.input),
      mean_(problem.moments.mean),
      value_moments_(problem.moments.values),
      all_(std::move(queries_of)) {
  if (!problem.rotates) key_moments_ = problem.moments.rotated_keys;
  if (problem.measured_queries) query_moments_ = problem.moments.rotated_queries;
}

GroupGrams::GroupGrams(const LayerProblem& problem, std::shared_ptr<GroupGrams> all, std::shared_ptr<GroupGrams> even,
                       double all_weight, double even_weight)
    : weights_(problem.weights),
      mean_(problem.moments.mean),
      all_(std::move(all)),
      even_(std::move(even)),
      all_weight_(all_weight),
      even_weight_(even_weight) {}

GroupGrams::Entry& GroupGrams::entry(const std::vector<std::int64_t>& kv_heads) {
  const std::lock_guard lock(mutex_);
  std::unique_ptr<Entry>& found = entries_[kv_heads];
  if (found == nullptr) found = std::make_unique<Entry>();
  return *found;
}

at::Tensor GroupGrams::other(const at::Tensor& all, const at::Tensor& even) const {
  return all_weight_ * all - even_weight_ * even;
}

at::Tensor GroupGrams::gram_of(const std::vector<std::int64_t>& kv_heads, const HeadMoments& measured,
                               const std::function<at::Tensor()>& rows) const {
  if (measured.defined()) return measured.block(block_index(kv_heads, weights_.head_dim));
  if (!moment_.defined()) throw InternalError("a Gram was asked for without the input's moment");
  const Timed timed(Work::products);
  const at::Tensor own = rows();
  return linalg::symmetric_part(at::matmul(at::matmul(own, moment_), own.t()));
}

const GroupGrams::Gram& GroupGrams::keys(const std::vector<std::int64_t>& kv_heads) {
  Entry& found = entry(kv_heads);
  std::call_once(found.keys_once, [&] {
    if (even_ != nullptr) {
      const Gram &all = all_->keys(kv_heads), &even = even_->keys(kv_heads);
      found.keys = {other(all.gram, even.gram), other(all.mean, even.mean)};
      return;
    }
    at::Tensor rows = group_of(weights_, kv_heads, Part::keys, false).key;
    found.keys = {gram_of(kv_heads, key_moments_, [&] { return rows; }), at::mv(rows, mean_)};
  });
  return found.keys;
}

const at::Tensor& GroupGrams::values(const std::vector<std::int64_t>& kv_heads) {
  Entry& found = entry(kv_heads);
  std::call_once(found.values_once, [&] {
    found.values = even_ != nullptr ? other(all_->values(kv_heads), even_->values(kv_heads))
                                    : gram_of(kv_heads, value_moments_,
                                              [&] { return group_of(weights_, kv_heads, Part::values, false).value; });
  });
  return found.values;
}

const at::Tensor& GroupGrams::value_mean(const std::vector<std::int64_t>& kv_heads) {
  Entry& found = entry(kv_heads);
  std::call_once(found.value_mean_once, [&] {
    found.value_mean = even_ != nullptr ? other(all_->value_mean(kv_heads), even_->value_mean(kv_heads))
                                        : at::mv(group_of(weights_, kv_heads, Part::values, false).value, mean_);
  });
  return found.value_mean;
}

const at::Tensor& GroupGrams::queries(const std::vector<std::int64_t>& kv_heads) {
  if (all_ != nullptr) return all_->queries(kv_heads);
  Entry& found = entry(kv_heads);
  std::call_once(found.queries_once, [&] {
    if (query_moments_.defined()) {
      const std::int64_t repeat = weights_.key_repeat();
      const at::Tensor heads = at::tensor(query_heads_of(kv_heads, repeat), at::kLong);
      found.queries = query_moments_.index_select(0, heads).view(
          {std::ssize(kv_heads), repeat, weights_.head_dim, weights_.head_dim});
      return;
    }
    if (!moment_.defined()) throw InternalError("a query Gram was asked for without the input's moment");
    const Timed timed(Work::products);
    const std::int64_t d = weights_.head_dim, repeat = weights_.key_repeat();
    found.queries = at::empty({std::ssize(kv_heads), repeat, d, d}, at::kDouble);
    const GroupWeights group = group_of(weights_, kv_heads, Part::keys);
    for (std::size_t k = 0; k < kv_heads.size(); ++k) {
      const at::Tensor once = at::matmul(group.queries[k], moment_);
      for (std::int64_t i = 0; i < repeat; ++i)
        found.queries[static_cast<std::int64_t>(k)][i].copy_(linalg::symmetric_part(
            at::matmul(once.slice(0, i * d, (i + 1) * d), group.queries[k].slice(0, i * d, (i + 1) * d).t())));
    }
  });
  return found.queries;
}

const at::Tensor& GroupGrams::outputs(const std::vector<std::int64_t>& kv_heads) {
  if (all_ != nullptr) return all_->outputs(kv_heads);
  Entry& found = entry(kv_heads);
  std::call_once(found.outputs_once, [&] {
    const Timed timed(Work::products);
    const std::int64_t d = weights_.head_dim, repeat = weights_.value_repeat();
    found.outputs = at::empty({std::ssize(kv_heads), repeat, d, d}, at::kDouble);
    const std::vector<std::int64_t> heads = query_heads_of(kv_heads, repeat);
    for (std::size_t h = 0; h < heads.size(); ++h) {
      const at::Tensor p = weights_.output.slice(1, heads[h] * d, (heads[h] + 1) * d)
                               .to(at::kDouble, false, false, at::MemoryFormat::Contiguous);
      found.outputs.view({-1, d, d})[static_cast<std::int64_t>(h)].copy_(at::matmul(p.t(), p));
    }
  });
  return found.outputs;
}

std::shared_ptr<GroupGrams> make_group_grams(const LayerProblem& problem) {
  return problem.has_moments ? std::make_shared<GroupGrams>(problem) : nullptr;
}

GroupWeights fold_group(const LayerProblem& problem, const std::vector<std::int64_t>& kv_heads, Part part,
                        Metric metric, bool with_queries, bool with_value_mean) {
  if (problem.grams != nullptr || problem.group_grams == nullptr || metric == Metric::weights)
    return group_of(problem, kv_heads, part);
  GroupGrams& grams = *problem.group_grams;
  GroupWeights group;
  group.size = std::ssize(kv_heads);
  group.head_dim = problem.weights.head_dim;
  if (part == Part::keys) {
    group.key_gram = grams.keys(kv_heads).gram;
    group.key_mean = grams.keys(kv_heads).mean;
    if (with_queries && metric != Metric::act) group.query_grams = grams.queries(kv_heads);
  } else {
    if (metric != Metric::attn_out) {
      group.value_gram = grams.values(kv_heads);
      if (with_value_mean) group.value_mean = grams.value_mean(kv_heads);
    }
    if (metric != Metric::act) group.output_grams = grams.outputs(kv_heads);
  }
  return group;
}

}  // namespace headfold::folding
