#include <headfold/base/error.h>
#include <headfold/base/index.h>
#include <headfold/base/progress.h>
#include <headfold/comm/stopping.h>
#include <headfold/folding/grouping.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <set>

namespace headfold::folding {

namespace {

using Heads = std::vector<std::int64_t>;

/// Costs by group, heads in any order. Counts the distinct groups asked for.
class Memo {
 public:
  explicit Memo(const GroupCost& cost) : cost_(cost) {}
  double operator()(Heads heads) {
    std::sort(heads.begin(), heads.end());
    const auto found = known_.find(heads);
    if (found != known_.end()) return found->second;
    const double cost = cost_(heads);
    if (!std::isfinite(cost))
      throw NumericalError(fmt::format("the cost of merging KV heads {} is {}", fmt::join(heads, ", "), cost));
    known_.emplace(std::move(heads), cost);
    return cost;
  }
  std::int64_t evaluations() const { return static_cast<std::int64_t>(known_.size()); }

 private:
  const GroupCost& cost_;
  std::map<Heads, double> known_;
};

/// Heads ascending inside a group, groups by their first head.
Groups canonical(Groups groups) {
  for (Heads& group : groups) std::sort(group.begin(), group.end());
  std::sort(groups.begin(), groups.end());
  return groups;
}

/// Summed in canonical order, so that equal partitions have equal costs.
double cost_of(const Groups& groups, const GroupCost& cost) {
  double sum = 0;
  for (const Heads& group : groups) sum += cost(group);
  return sum;
}

/// Whether (cost, groups) precedes what is there: cheaper, or as cheap and lexicographically smaller.
bool precedes(double cost, const Groups& groups, double other_cost, const Groups& other) {
  return cost < other_cost || (cost == other_cost && groups < other);
}

/// Random numbers that are the same with every standard library.
class Dice {
 public:
  Dice(std::uint64_t seed, std::uint64_t stream) : engine_(seed * 0x9E3779B97F4A7C15ULL + stream) {}
  std::int64_t below(std::int64_t n) { return static_cast<std::int64_t>(unit() * static_cast<double>(n)); }
  double unit() { return static_cast<double>(engine_() >> 11) * 0x1.0p-53; }

 private:
  std::mt19937_64 engine_;
};

Groups random_groups(const Heads& heads, std::int64_t size, Dice& dice) {
  Heads order = heads;
  for (std::size_t i = order.size(); i > 1; --i)
    std::swap(order[i - 1], order[ix(dice.below(static_cast<std::int64_t>(i)))]);
  Groups groups;
  for (std::size_t i = 0; i < order.size(); i += ix(size))
    groups.emplace_back(order.begin() + static_cast<std::ptrdiff_t>(i),
                        order.begin() + static_cast<std::ptrdiff_t>(i) + static_cast<std::ptrdiff_t>(size));
  return groups;
}

/// Sum of the costs of a group's pairs: what merging costs to second order, known after n (n - 1) / 2 evaluations.
double pairwise(const Heads& group, const GroupCost& pair) {
  double sum = 0;
  for (std::size_t i = 0; i < group.size(); ++i)
    for (std::size_t j = i + 1; j < group.size(); ++j) sum += pair({group[i], group[j]});
  return sum;
}

/// Every group grows from the cheapest pair left by the head that adds the least pairwise cost.
Groups greedy_groups(const Heads& heads, std::int64_t size, const GroupCost& pair) {
  std::set<std::int64_t> left(heads.begin(), heads.end());
  Groups groups;
  while (!left.empty()) {
    Heads group;
    double best = std::numeric_limits<double>::infinity();
    for (auto i = left.begin(); i != left.end(); ++i)
      for (auto j = std::next(i); j != left.end(); ++j)
        if (const double cost = pair({*i, *j}); cost < best) {
          best = cost;
          group = {*i, *j};
        }
    for (const std::int64_t head : group) left.erase(head);
    while (static_cast<std::int64_t>(group.size()) < size) {
      std::int64_t next = -1;
      double least = std::numeric_limits<double>::infinity();
      for (const std::int64_t head : left) {
        double cost = 0;
        for (const std::int64_t member : group) cost += pair({member, head});
        if (cost < least) {
          least = cost;
          next = head;
        }
      }
      group.push_back(next);
      left.erase(next);
    }
    groups.push_back(std::move(group));
  }
  return groups;
}

double swap_change(const Groups& groups, std::size_t a, std::size_t i, std::size_t b, std::size_t j,
                   const GroupCost& cost) {
  Heads first = groups[a], second = groups[b];
  std::swap(first[i], second[j]);
  return cost(first) + cost(second) - cost(groups[a]) - cost(groups[b]);
}

/// Takes every swap that lowers the cost by more than rounding, until none does.
void descend(Groups& groups, std::int64_t sweeps, const GroupCost& cost) {
  for (std::int64_t sweep = 0; sweep < sweeps; ++sweep) {
    bool moved = false;
    for (std::size_t a = 0; a < groups.size(); ++a)
      for (std::size_t b = a + 1; b < groups.size(); ++b)
        for (std::size_t i = 0; i < groups[a].size(); ++i)
          for (std::size_t j = 0; j < groups[b].size(); ++j) {
            const double scale = std::abs(cost(groups[a])) + std::abs(cost(groups[b]));
            if (swap_change(groups, a, i, b, j, cost) >= -1e-12 * scale) continue;
            std::swap(groups[a][i], groups[b][j]);
            moved = true;
          }
    if (!moved) return;
  }
}

/// Random swaps at a temperature that falls geometrically by 1000, from the mean size of a swap's change.
void anneal(Groups& groups, std::int64_t proposals, Dice& dice, const GroupCost& cost) {
  const auto propose = [&] {
    const auto a = ix(dice.below(static_cast<std::int64_t>(groups.size())));
    auto b = ix(dice.below(static_cast<std::int64_t>(groups.size()) - 1));
    if (b >= a) ++b;
    const auto size = static_cast<std::int64_t>(groups[a].size());
    return std::array<std::size_t, 4>{a, ix(dice.below(size)), b, ix(dice.below(size))};
  };
  constexpr std::int64_t kSamples = 16;
  double scale = 0;
  for (std::int64_t s = 0; s < kSamples; ++s) {
    const auto [a, i, b, j] = propose();
    scale += std::abs(swap_change(groups, a, i, b, j, cost)) / static_cast<double>(kSamples);
  }
  if (!(scale > 0)) return;
  for (std::int64_t step = 0; step < proposals; ++step) {
    const double temperature = scale * std::pow(1e-3, static_cast<double>(step) / static_cast<double>(proposals));
    const auto [a, i, b, j] = propose();
    const double change = swap_change(groups, a, i, b, j, cost);
    if (change <= 0 || dice.unit() < std::exp(-change / temperature)) std::swap(groups[a][i], groups[b][j]);
  }
}

/// One seed's search among `heads`.
Groups search_from(std::uint64_t which, const Heads& heads, std::int64_t size, const GroupingOptions& options,
                   const GroupCost& cost) {
  const auto n = static_cast<std::int64_t>(heads.size());
  if (size <= 1 || size == n) {
    Groups only;
    for (std::size_t i = 0; i < heads.size(); i += ix(size))
      only.emplace_back(heads.begin() + static_cast<std::ptrdiff_t>(i),
                        heads.begin() + static_cast<std::ptrdiff_t>(i) + static_cast<std::ptrdiff_t>(size));
    return only;
  }
  Dice dice(options.seed, which);
  const GroupCost model = [&](const Heads& group) { return pairwise(group, cost); };
  Groups groups;
  if (which == 0) {
    for (std::int64_t i = 0; i < n; i += size) groups.emplace_back(heads.begin() + i, heads.begin() + i + size);
  } else {
    groups = which == 1 ? greedy_groups(heads, size, cost) : random_groups(heads, size, dice);
    // Pairs are all known by now, so steps on their sums cost nothing; with groups of two they are the cost itself.
    if (which > 1) anneal(groups, 400 * n, dice, model);
    if (size > 2) {
      descend(groups, options.sweeps, model);
      if (which > 1) anneal(groups, 4 * n, dice, cost);
    }
  }
  descend(groups, options.sweeps, cost);
  return groups;
}

/// All groups of `size` among `heads`, lexicographic.
std::vector<Heads> all_groups(const Heads& heads, std::int64_t size) {
  std::vector<Heads> groups;
  std::vector<bool> chosen(heads.size(), false);
  std::fill(chosen.begin(), chosen.begin() + static_cast<std::ptrdiff_t>(size), true);
  do {
    Heads group;
    for (std::size_t i = 0; i < heads.size(); ++i)
      if (chosen[i]) group.push_back(heads[i]);
    groups.push_back(std::move(group));
  } while (std::prev_permutation(chosen.begin(), chosen.end()));
  return groups;
}

double binomial(std::int64_t n, std::int64_t k) {
  double value = 1;
  for (std::int64_t i = 1; i <= k; ++i) value *= static_cast<double>(n - k + i) / static_cast<double>(i);
  return value;
}

constexpr std::size_t kMostForPartition = 16;

/// The cheapest partition: best[set] over sets of heads already placed, the next group always holding the first head
/// left.
Groups best_partition(const Heads& heads, std::int64_t size, const GroupCost& cost) {
  const std::size_t n = heads.size();
  struct Candidate {
    std::uint32_t mask = 0;
    double cost = 0;
    Heads heads;
  };
  std::vector<std::vector<Candidate>> by_first(n);
  for (Heads& group : all_groups(heads, size)) {
    Candidate one;
    for (const std::int64_t head : group)
      one.mask |= 1U << (std::find(heads.begin(), heads.end(), head) - heads.begin());
    one.cost = cost(group);
    const auto first = static_cast<std::size_t>(std::find(heads.begin(), heads.end(), group[0]) - heads.begin());
    one.heads = std::move(group);
    by_first[first].push_back(std::move(one));
  }
  const std::uint32_t full = static_cast<std::uint32_t>((1ULL << n) - 1);
  std::vector<double> best(std::size_t{full} + 1, std::numeric_limits<double>::infinity());
  std::vector<const Candidate*> choice(best.size(), nullptr);
  best[full] = 0;
  for (std::uint32_t set = full; set-- > 0;) {
    std::size_t first = 0;
    while ((set >> first & 1U) != 0) ++first;
    for (const Candidate& one : by_first[first]) {
      if ((set & one.mask) != 0 || !(one.cost + best[set | one.mask] < best[set])) continue;
      best[set] = one.cost + best[set | one.mask];
      choice[set] = &one;
    }
  }
  Groups groups;
  for (std::uint32_t set = 0; set != full; set |= choice[set]->mask) groups.push_back(choice[set]->heads);
  return groups;
}

/// How a search of n heads is cut up: blocks that groups stay in, and whether a block is small enough to try all.
struct Layout {
  std::int64_t heads = 0, size = 0;
  std::vector<Heads> blocks;
  bool exhaustive = false;
};

Layout layout_of(std::int64_t n, const GroupingOptions& options) {
  if (options.kv_heads <= 0 || n <= 0 || n % options.kv_heads != 0)
    throw InputError(fmt::format("{} KV heads do not split into {} groups of equal size", n, options.kv_heads));
  Layout layout;
  layout.heads = n;
  layout.size = n / options.kv_heads;
  const std::int64_t block = options.block > 0 ? std::min(options.block, n) : n;
  if (n % block != 0 || block % layout.size != 0)
    throw InputError(
        fmt::format("groups of {} KV heads do not fit into the blocks of {} heads that the attention-weighted value "
                    "statistics know",
                    layout.size, block),
        "use --value-metric act+out, or calibrate again with larger blocks");
  for (std::int64_t first = 0; first < n; first += block) {
    Heads heads(ix(block));
    std::iota(heads.begin(), heads.end(), first);
    layout.blocks.push_back(std::move(heads));
  }
  layout.exhaustive = static_cast<std::size_t>(block) <= kMostForPartition &&
                      binomial(block, layout.size) <= static_cast<double>(options.exhaustive);
  return layout;
}

/// One seed over all blocks; exhaustive layouts have one seed.
Groups search_seed(const Layout& layout, std::uint64_t which, const GroupingOptions& options, const GroupCost& cost) {
  Groups groups;
  for (std::size_t b = 0; b < layout.blocks.size(); ++b) {
    const Groups part = layout.exhaustive ? best_partition(layout.blocks[b], layout.size, cost)
                                          : search_from(which, layout.blocks[b], layout.size, options, cost);
    groups.insert(groups.end(), part.begin(), part.end());
  }
  return canonical(std::move(groups));
}

std::int64_t seeds_of(const Layout& layout, const GroupingOptions& options) {
  return layout.exhaustive || layout.size <= 1 || layout.blocks[0].size() == ix(layout.size)
             ? 1
             : std::max<std::int64_t>(1, options.seeds);
}

}  // namespace

GroupingResult search_groups(std::int64_t source_kv_heads, const GroupingOptions& options, const GroupCost& cost) {
  const Layout layout = layout_of(source_kv_heads, options);
  Memo memo(cost);
  const GroupCost known = [&](const Heads& heads) { return memo(heads); };
  GroupingResult result;
  result.groups = contiguous_groups(source_kv_heads, options.kv_heads);
  result.contiguous_cost = result.cost = cost_of(result.groups, known);
  result.exhaustive = layout.exhaustive;
  for (std::int64_t seed = 0; seed < seeds_of(layout, options); ++seed) {
    Groups groups = search_seed(layout, static_cast<std::uint64_t>(seed), options, known);
    const double found = cost_of(groups, known);
    if (precedes(found, groups, result.cost, result.groups)) {
      result.cost = found;
      result.groups = std::move(groups);
    }
  }
  result.evaluations = memo.evaluations();
  return result;
}

namespace {

/// Costs shared by threads; a cost depends on its group alone, so who computes it does not matter.
class SharedMemo {
 public:
  explicit SharedMemo(GroupCost cost) : cost_(std::move(cost)) {}
  double operator()(const Heads& heads) {
    {
      const std::lock_guard lock(mutex_);
      const auto found = known_.find(heads);
      if (found != known_.end()) return found->second;
    }
    const double cost = cost_(heads);
    const std::lock_guard lock(mutex_);
    known_.emplace(heads, cost);
    return cost;
  }

 private:
  GroupCost cost_;
  std::mutex mutex_;
  std::map<Heads, double> known_;
};

/// Losses of the closed forms from the layer's Grams, without their vectors: keys under `rope-commuting` exactly as
/// (2) of methods.md 6.1.2, all other problems on each head's leading directions.
class Surrogate {
 public:
  Surrogate(const LayerProblem& problem, const FoldOptions& options, std::int64_t size, std::int64_t width) {
    const LayerWeights& w = problem.weights;
    const LayerGrams& grams = *problem.grams;
    const std::int64_t d = w.head_dim;
    const bool query_aware = options.key_metric != Metric::weights && options.key_metric != Metric::act;
    at::Tensor key = options.key_metric == Metric::weights ? grams.key_weights : grams.key;
    if (options.keys == KeyFold::post_rotation && options.key_metric != Metric::weights &&
        problem.moments.rotated_keys.defined())
      key = problem.moments.rotated_keys.full();
    const bool by_frequency =
        problem.rotates && options.keys != KeyFold::latent && options.keys != KeyFold::post_rotation;
    if (by_frequency) {
      frequencies_ = by_frequency_of(key, query_aware ? grams.queries : at::Tensor(), w.kv_heads, d);
    } else {
      if (!problem.rotates && options.key_metric != Metric::weights)
        key = key - at::outer(grams.key_mean, grams.key_mean);
      at::Tensor weights;
      if (query_aware) {
        weights = grams.queries.view({w.kv_heads, w.key_repeat(), d, d}).sum(1) / static_cast<double>(d);
        if (problem.rotates) {  // phases averaged: both halves of a pair weigh the same
          const at::Tensor diagonal = weights.diagonal(0, 1, 2).reshape({w.kv_heads, 2, d / 2}).mean(1);
          weights = at::diag_embed(at::cat({diagonal, diagonal}, 1));
        }
      }
      keys_ = compressed(key, weights, d, size, width);
    }
    at::Tensor value = options.value_metric == Metric::weights ? grams.value_weights : grams.value;
    if (options.value_metric == Metric::attn_out) {
      value = at::zeros({w.kv_heads * d, w.kv_heads * d}, at::kDouble);
      const std::int64_t block = problem.moments.attended.size(1);
      const std::int64_t per_block = problem.moments.attended_heads * w.value_repeat();
      for (std::int64_t b = 0; b * block < w.kv_heads * d; ++b)
        value.slice(0, b * block, (b + 1) * block)
            .slice(1, b * block, (b + 1) * block)
            .copy_(problem.moments.attended.slice(0, b * per_block, (b + 1) * per_block).mean(0));
    } else if (problem.centred_values && options.value_metric != Metric::weights) {
      value = value - at::outer(grams.value_mean, grams.value_mean);
    }
    at::Tensor weights;
    if (options.value_metric == Metric::act_out || options.value_metric == Metric::attn_out)
      weights = grams.outputs.view({w.kv_heads, w.value_repeat(), d, d}).sum(1);
    values_ = compressed(value, weights, d, size, width);
  }

  double key_loss(const Heads& heads) const {
    if (!frequencies_.defined()) return loss_of(keys_, heads);
    const at::Tensor index = at::tensor(heads, at::kLong);
    const at::Tensor block = frequencies_.index_select(1, index).index_select(2, index);
    const at::Tensor values = at::linalg_eigvalsh(block);  // ascending
    return values.slice(1, 0, values.size(1) - 1).clamp_min(0).sum().item<double>();
  }
  double value_loss(const Heads& heads) const { return loss_of(values_, heads); }

 private:
  struct Compressed {
    at::Tensor gram;           ///< [kv_heads * kept, same]: weighted Gram on each head's leading directions
    std::vector<double> lost;  ///< per head: what those directions miss
    std::int64_t kept = 0, width = 0;
  };

  static at::Tensor by_frequency_of(const at::Tensor& sigma, const at::Tensor& queries, std::int64_t n,
                                    std::int64_t d) {
    const std::int64_t half = d / 2;
    const at::Tensor blocks = sigma.reshape({n, 2, half, n, 2, half});
    const auto part = [&](std::int64_t a, std::int64_t b) {
      return blocks.select(1, a).select(3, b).diagonal(0, 1, 3).permute({2, 0, 1});
    };
    at::Tensor real = part(0, 0) + part(1, 1), imaginary = part(1, 0) - part(0, 1);
    if (queries.defined()) {
      const at::Tensor root =
          (queries.diagonal(0, 1, 2).reshape({n, -1, 2, half}).sum(2).sum(1) / (2.0 * static_cast<double>(d)))
              .clamp_min(0)
              .sqrt()
              .t();  // [half, n]
      const at::Tensor scale = root.unsqueeze(2) * root.unsqueeze(1);
      real = real * scale;
      imaginary = imaginary * scale;
    }
    return at::complex(real.contiguous(), imaginary.contiguous());
  }

  static Compressed compressed(const at::Tensor& sigma, const at::Tensor& weights, std::int64_t d, std::int64_t size,
                               std::int64_t width) {
    const std::int64_t n = sigma.size(0) / d;
    Compressed result;
    result.width = width;
    // Half as many directions again as the merged head has channels, spread over the group's heads.
    result.kept = std::min(d, std::max<std::int64_t>(1, (3 * width + 2 * size - 1) / (2 * size)));
    std::vector<at::Tensor> maps(ix(n));
    result.lost.resize(ix(n));
    for_each_item(n, [&](std::int64_t k) {
      at::Tensor f = sigma.slice(0, k * d, (k + 1) * d).slice(1, k * d, (k + 1) * d);
      at::Tensor root = at::eye(d, at::kDouble);
      if (weights.defined()) root = linalg::psd_root(weights[k]).root;
      f = at::matmul(at::matmul(root, f), root);
      const linalg::Eigen eigen = linalg::eigh(0.5 * (f + f.t()));
      const at::Tensor directions = eigen.vectors.slice(1, 0, result.kept);
      result.lost[ix(k)] = eigen.values.slice(0, result.kept).clamp_min(0).sum().item<double>();
      maps[ix(k)] = at::matmul(root, directions);  // [d, kept]
    });
    result.gram = at::zeros({n * result.kept, n * result.kept}, at::kDouble);
    for_each_item(n, [&](std::int64_t k) {
      const at::Tensor left = at::matmul(maps[ix(k)].t(), sigma.slice(0, k * d, (k + 1) * d));
      for (std::int64_t j = 0; j < n; ++j)
        result.gram.slice(0, k * result.kept, (k + 1) * result.kept)
            .slice(1, j * result.kept, (j + 1) * result.kept)
            .copy_(at::matmul(left.slice(1, j * d, (j + 1) * d), maps[ix(j)]));
    });
    return result;
  }

  static double loss_of(const Compressed& problem, const Heads& heads) {
    double loss = 0;
    for (const std::int64_t head : heads) loss += problem.lost[ix(head)];
    const at::Tensor rows = block_index(heads, problem.kept);
    const at::Tensor block = problem.gram.index_select(0, rows).index_select(1, rows);
    if (block.size(0) <= problem.width) return loss;
    const at::Tensor values = at::linalg_eigvalsh(block);  // ascending
    return loss + values.slice(0, 0, values.size(0) - problem.width).clamp_min(0).sum().item<double>();
  }

  at::Tensor frequencies_;  ///< S C_l S / 2d of every frequency, [half, n, n] complex
  Compressed keys_, values_;
};

/// Everything the groups of one layer cost, exactly and approximately, relative to the layer's totals.
class LayerCosts {
 public:
  LayerCosts(const LayerProblem& problem, const FoldOptions& options, const Layout& layout, std::int64_t groups,
             double key_balance)
      : problem_(problem),
        options_(options),
        width_(options.keys == KeyFold::latent ? options.kv_heads * problem.weights.head_dim / groups : 0),
        exact_([this](const Heads& heads) { return price(heads); }) {
    const Groups contiguous = contiguous_groups(layout.heads, groups);
    std::vector<std::array<double, 2>> totals(contiguous.size());
    for_each_item(groups, [&](std::int64_t g) {
      const Heads& heads = contiguous[ix(g)];
      totals[ix(g)] = {key_basis(problem_, heads, options_, width_).total,
                       value_basis(problem_, heads, options_, width_).total};
    });
    double key = 0, value = 0;
    for (const auto& [k, v] : totals) {
      key += k;
      value += v;
    }
    key_unit_ = key > 0 ? key_balance / key : 0;
    value_unit_ = value > 0 ? 1 / value : 0;
    if (!layout.exhaustive)
      surrogate_ =
          std::make_unique<Surrogate>(problem, options, layout.size, width_ > 0 ? width_ : problem.weights.head_dim);
  }

  double exact(const Heads& heads) { return exact_(heads); }
  /// Exact where all groups are tried.
  double cheap(const Heads& heads) const {
    return key_unit_ * surrogate_->key_loss(heads) + value_unit_ * surrogate_->value_loss(heads);
  }

 private:
  double price(const Heads& heads) const {
    return key_unit_ * std::max(0.0, key_basis(problem_, heads, options_, width_).loss) +
           value_unit_ * std::max(0.0, value_basis(problem_, heads, options_, width_).loss);
  }

  const LayerProblem& problem_;
  const FoldOptions& options_;
  std::int64_t width_;
  double key_unit_ = 0, value_unit_ = 0;
  SharedMemo exact_;
  std::unique_ptr<Surrogate> surrogate_;
};

struct SeedResult {
  Groups groups;
  double cost = 0;
  std::int64_t evaluations = 0;
};

/// The search of some seeds of one layer; the first pair is what contiguous groups cost.
std::pair<double, std::vector<SeedResult>> search_layer(const LayerProblem& problem, const FoldOptions& options,
                                                        const GroupingOptions& grouping, const Layout& layout,
                                                        std::int64_t first_seed, std::int64_t seeds,
                                                        double key_balance) {
  LayerCosts costs(problem, options, layout, grouping.kv_heads, key_balance);
  const GroupCost exact = [&](const Heads& heads) { return costs.exact(heads); };
  const auto price_all = [&](const std::vector<Heads>& groups, const GroupCost& cost) {
    for_each_item(static_cast<std::int64_t>(groups.size()), [&](std::int64_t i) { cost(groups[ix(i)]); });
  };
  SharedMemo cheap([&](const Heads& heads) { return costs.cheap(heads); });
  const GroupCost shared = layout.exhaustive ? exact : GroupCost([&](const Heads& heads) { return cheap(heads); });
  // In parallel what every seed needs: all groups, or all pairs.
  for (const Heads& block : layout.blocks)
    if (layout.size > 1 && block.size() > ix(layout.size))
      price_all(all_groups(block, layout.exhaustive ? layout.size : 2), shared);
  std::vector<SeedResult> results(ix(seeds));
  for_each_item(seeds, [&](std::int64_t i) {
    Memo memo(shared);
    const GroupCost cost = [&](const Heads& heads) { return memo(heads); };
    SeedResult& result = results[ix(i)];
    result.groups = search_seed(layout, static_cast<std::uint64_t>(first_seed + i), grouping, cost);
    result.evaluations = memo.evaluations();
  });
  const Groups contiguous = contiguous_groups(layout.heads, grouping.kv_heads);
  std::set<Heads> finalists(contiguous.begin(), contiguous.end());
  for (const SeedResult& result : results) finalists.insert(result.groups.begin(), result.groups.end());
  price_all({finalists.begin(), finalists.end()}, exact);
  for (SeedResult& result : results) result.cost = cost_of(result.groups, exact);
  return {cost_of(contiguous, exact), std::move(results)};
}

}  // namespace

std::vector<GroupingResult> search_all_layers(const comm::Communicator& world, const checkpoint::Reader& reader,
                                              const calibration::StatisticsFile* statistics, const FoldOptions& options,
                                              const GroupingOptions& grouping_options, double key_balance) {
  const checkpoint::ModelConfig& config = reader.config();
  if (config.family == checkpoint::Family::bloom)
    throw UsageError(
        "--grouping search is not possible for this model: it uses ALiBi, whose slopes belong to head numbers, so its "
        "groups must stay contiguous",
        "use --grouping contiguous");
  if (!std::isfinite(key_balance) || key_balance < 0)
    throw UsageError(
        fmt::format("the weight of key losses in the grouping search must not be negative, got {}", key_balance));
  GroupingOptions grouping = grouping_options;
  if (grouping.kv_heads == 0) grouping.kv_heads = options.kv_heads;
  const FoldOptions effective = with_effective_metrics(options, statistics != nullptr);
  if (needs_statistics(effective) && statistics == nullptr)
    throw UsageError("--grouping search with these metrics needs --calibration");
  if (effective.value_metric == Metric::attn_out && grouping.block == 0) {
    const std::int64_t known = statistics->header().attended_heads;
    if (known > 0 && known < config.kv_heads) grouping.block = known;
  }
  const Layout layout = layout_of(config.kv_heads, grouping);
  const std::int64_t seeds = seeds_of(layout, grouping);

  const auto [begin, end] = share_of(config.layers * seeds, world.rank(), world.size());
  Progress progress("group", "search", static_cast<double>(end - begin), world.root());
  Json mine = Json::array();
  for (std::int64_t item = begin; item < end && !stop_requested();) {
    const std::int64_t layer = item / seeds, first = item % seeds;
    const std::int64_t count = std::min(end, (layer + 1) * seeds) - item;
    LayerProblem problem;
    for_each_item(1, [&](std::int64_t) { problem = load_problem(reader, statistics, layer, Part::both, effective); });
    add_grams(problem, effective);
    const auto [contiguous, results] = search_layer(problem, effective, grouping, layout, first, count, key_balance);
    for (const SeedResult& result : results)
      mine.push_back({layer, contiguous, result.cost, result.evaluations, result.groups});
    item += count;
    progress.advance(static_cast<double>(count));
  }

  comm::stop_if_requested(world, "while searching groups; nothing was written");
  std::vector<GroupingResult> all(ix(config.layers));
  // Shortest round-trip decimal text: every rank reads back the very same doubles.
  for (const std::string& text : world.all_gather(mine.dump()))
    for (const Json& one : Json::parse(text)) {
      GroupingResult& result = all[one[0].get<std::size_t>()];
      if (result.groups.empty()) {
        result.groups = contiguous_groups(config.kv_heads, grouping.kv_heads);
        result.cost = result.contiguous_cost = one[1];
        result.exhaustive = layout.exhaustive;
      }
      result.evaluations += one[3].get<std::int64_t>();
      Groups groups = one[4].get<Groups>();
      if (!precedes(one[2], groups, result.cost, result.groups)) continue;
      result.cost = one[2];
      result.groups = std::move(groups);
    }
  return all;
}

std::vector<Groups> groups_of(const std::vector<GroupingResult>& results) {
  std::vector<Groups> groups;
  groups.reserve(results.size());
  for (const GroupingResult& result : results) groups.push_back(result.groups);
  return groups;
}

OrderedJson grouping_report(const std::vector<GroupingResult>& results, const GroupingOptions& options) {
  OrderedJson report;
  double cost = 0, contiguous = 0;
  std::int64_t evaluations = 0, moved = 0;
  OrderedJson layers = OrderedJson::array();
  for (const GroupingResult& result : results) {
    cost += result.cost;
    contiguous += result.contiguous_cost;
    evaluations += result.evaluations;
    if (result.cost < result.contiguous_cost) ++moved;
    layers.push_back({{"cost", result.cost}, {"contiguous_cost", result.contiguous_cost}});
  }
  report["method"] = !results.empty() && results[0].exhaustive
                         ? "every partition (dynamic programming over subsets)"
                         : "contiguous, greedy and random starts; annealing; swaps";
  report["cost_is"] = "key loss / key total + value loss / value total, summed over a layer's groups";
  report["seeds"] = options.seeds;
  report["seed"] = options.seed;
  report["groups_priced"] = evaluations;
  report["cost"] = cost;
  report["contiguous_cost"] = contiguous;
  report["gain"] = contiguous > 0 ? 1 - cost / contiguous : 0.0;
  report["layers_changed"] = moved;
  report["layers"] = std::move(layers);
  return report;
}

void check_tensor_parallel(const std::vector<std::int64_t>& kv_heads_per_layer, std::int64_t heads,
                           std::int64_t ranks) {
  if (ranks <= 0) throw UsageError(fmt::format("--tensor-parallel must be positive, got {}", ranks));
  if (heads % ranks != 0)
    throw UsageError(
        fmt::format("--tensor-parallel {}: {} query heads cannot be split over {} ranks", ranks, heads, ranks),
        "the number of ranks must divide the query heads and the KV heads of every layer");
  std::vector<std::string> wrong;
  for (std::size_t l = 0; l < kv_heads_per_layer.size(); ++l)
    if (kv_heads_per_layer[l] % ranks != 0) wrong.push_back(fmt::format("{} ({})", l, kv_heads_per_layer[l]));
  if (wrong.empty()) return;
  constexpr std::size_t kShown = 8;
  const std::size_t hidden = wrong.size() > kShown ? wrong.size() - kShown : 0;
  if (hidden > 0) wrong.resize(kShown);
  throw UsageError(
      fmt::format("--tensor-parallel {}: the KV heads of these layers cannot be split over {} ranks: {}{}", ranks,
                  ranks, fmt::join(wrong, ", "), hidden > 0 ? fmt::format(" and {} more", hidden) : ""),
      fmt::format("layer (KV heads) above; choose KV heads that are multiples of {}", ranks));
}

}  // namespace headfold::folding
