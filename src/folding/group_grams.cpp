#include "group_grams.h"

#include <headfold/base/error.h>
#include <headfold/base/profile.h>
#include <headfold/linalg/linalg.h>

namespace headfold::folding {

GroupGrams::GroupGrams(const LayerProblem& problem, std::shared_ptr<GroupGrams> queries_of)
    : weights_(problem.weights),
      moment_(problem.moments.input),
      mean_(problem.moments.mean),
      all_(std::move(queries_of)) {}

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

GroupGrams::Gram GroupGrams::gram_of(const at::Tensor& rows, const Gram* of_all, const Gram* of_even) const {
  if (of_even != nullptr)
    return {all_weight_ * of_all->gram - even_weight_ * of_even->gram,
            all_weight_ * of_all->mean - even_weight_ * of_even->mean};
  if (!moment_.defined()) throw InternalError("a Gram was asked for without the input's moment");
  const Timed timed(Work::products);
  return {linalg::symmetric_part(at::matmul(at::matmul(rows, moment_), rows.t())), at::mv(rows, mean_)};
}

const GroupGrams::Gram& GroupGrams::keys(const std::vector<std::int64_t>& kv_heads) {
  Entry& found = entry(kv_heads);
  std::call_once(found.keys_once, [&] {
    found.keys = even_ != nullptr ? gram_of({}, &all_->keys(kv_heads), &even_->keys(kv_heads))
                                  : gram_of(group_of(weights_, kv_heads, Part::keys, false).key, nullptr, nullptr);
  });
  return found.keys;
}

const GroupGrams::Gram& GroupGrams::values(const std::vector<std::int64_t>& kv_heads) {
  Entry& found = entry(kv_heads);
  std::call_once(found.values_once, [&] {
    found.values = even_ != nullptr
                       ? gram_of({}, &all_->values(kv_heads), &even_->values(kv_heads))
                       : gram_of(group_of(weights_, kv_heads, Part::values, false).value, nullptr, nullptr);
  });
  return found.values;
}

const at::Tensor& GroupGrams::queries(const std::vector<std::int64_t>& kv_heads) {
  if (all_ != nullptr) return all_->queries(kv_heads);
  Entry& found = entry(kv_heads);
  std::call_once(found.queries_once, [&] {
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
                        Metric metric, bool with_queries) {
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
      group.value_gram = grams.values(kv_heads).gram;
      group.value_mean = grams.values(kv_heads).mean;
    }
    if (metric != Metric::act) group.output_grams = grams.outputs(kv_heads);
  }
  return group;
}

}  // namespace headfold::folding
