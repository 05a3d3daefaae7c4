// Grams of a whole layer, so that one group among thousands costs an index_select instead of products with the input
// moment.

#include <headfold/base/error.h>
#include <headfold/folding/bases.h>

namespace headfold::folding {

namespace {

/// rows M rows^T, head by head and only the lower triangle of heads: half the work, and the bytes do not depend on the
/// number of threads. An undefined moment stands for the identity.
at::Tensor gram(const at::Tensor& rows, const at::Tensor& moment, std::int64_t head_dim) {
  const std::int64_t n = rows.size(0);
  at::Tensor lower = at::zeros({n, n}, at::kDouble);
  for_each_item(n / head_dim, [&](std::int64_t head) {
    const std::int64_t begin = head * head_dim, end = begin + head_dim;
    at::Tensor left = rows.slice(0, begin, end);
    if (moment.defined()) left = at::matmul(left, moment);
    lower.slice(0, begin, end).slice(1, 0, end).copy_(at::matmul(left, rows.slice(0, 0, end).t()));
  });
  const at::Tensor strict = at::tril(lower, -1);
  return strict + strict.t() + at::diag(lower.diagonal());
}

}  // namespace

void add_grams(LayerProblem& problem, const FoldOptions& options) {
  const LayerWeights& w = problem.weights;
  if (!w.key.defined() || !w.value.defined()) throw InternalError("the Grams of a layer need its keys and values");
  auto grams = std::make_shared<LayerGrams>();
  const std::int64_t d = w.head_dim;
  if (options.key_metric == Metric::weights) grams->key_weights = gram(w.key, {}, d);
  if (options.value_metric == Metric::weights) grams->value_weights = gram(w.value, {}, d);
  if (problem.has_moments) {
    const LayerMoments& moments = problem.moments;
    const at::Tensor query = augmented(w.query, w.query_bias);
    const at::Tensor key = augmented(w.key, w.key_bias);
    const at::Tensor value = augmented(w.value, w.value_bias);
    // Grams that calibration formed itself are taken as group_grams.h takes them.
    const bool keys = !problem.rotates && moments.rotated_keys.defined();
    grams->key = keys ? moments.rotated_keys.full() : gram(key, moments.input, d);
    grams->value = moments.values.defined() ? moments.values.full() : gram(value, moments.input, d);
    const bool queries = problem.measured_queries && moments.rotated_queries.defined();
    grams->queries = queries ? moments.rotated_queries : at::empty({w.heads, d, d}, at::kDouble);
    for_each_item(queries ? 0 : w.heads, [&](std::int64_t head) {
      const at::Tensor rows = query.slice(0, head * d, (head + 1) * d);
      const at::Tensor product = at::matmul(at::matmul(rows, moments.input), rows.t());
      grams->queries[head].copy_(0.5 * (product + product.t()));
    });
    for_each_item(1, [&](std::int64_t) {
      grams->key_mean = at::mv(key, moments.mean);
      grams->value_mean = at::mv(value, moments.mean);
    });
  }
  grams->outputs = at::empty({w.heads, d, d}, at::kDouble);
  for_each_item(w.heads, [&](std::int64_t head) {
    const at::Tensor columns = w.output.slice(1, head * d, (head + 1) * d).contiguous();
    grams->outputs[head].copy_(at::matmul(columns.t(), columns));
  });
  problem.grams = std::move(grams);
}

GroupWeights group_of(const LayerProblem& problem, const std::vector<std::int64_t>& kv_heads, Part part) {
  if (problem.grams == nullptr) return group_of(problem.weights, kv_heads, part);
  const LayerGrams& grams = *problem.grams;
  const LayerWeights& w = problem.weights;
  GroupWeights group;
  group.size = static_cast<std::int64_t>(kv_heads.size());
  group.head_dim = w.head_dim;
  const at::Tensor rows = block_index(kv_heads, w.head_dim);
  const auto block = [&](const at::Tensor& square) {
    return square.defined() ? square.index_select(0, rows).index_select(1, rows) : at::Tensor();
  };
  const auto entries = [&](const at::Tensor& vector) {
    return vector.defined() ? vector.index_select(0, rows) : at::Tensor();
  };
  const auto by_head = [&](const at::Tensor& blocks, std::int64_t repeat) {
    if (!blocks.defined()) return at::Tensor();
    const at::Tensor heads = at::tensor(query_heads_of(kv_heads, repeat), at::kLong);
    return blocks.index_select(0, heads).view({group.size, repeat, w.head_dim, w.head_dim});
  };
  group.key_gram = block(grams.key);
  group.key_mean = entries(grams.key_mean);
  group.key_weight_gram = block(grams.key_weights);
  group.query_grams = by_head(grams.queries, w.key_repeat());
  group.value_gram = block(grams.value);
  group.value_mean = entries(grams.value_mean);
  group.value_weight_gram = block(grams.value_weights);
  group.output_grams = by_head(grams.outputs, w.value_repeat());
  return group;
}

}  // namespace headfold::folding
