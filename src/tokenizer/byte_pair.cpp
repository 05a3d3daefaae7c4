#include <headfold/tokenizer/byte_pair.h>

#include <algorithm>
#include <bit>

namespace headfold::tokenizer {

MergeRules::MergeRules(std::size_t expected_rules) {
  grow(std::bit_ceil(std::max<std::size_t>(16, expected_rules * 2)));
}

std::size_t MergeRules::slot_of(std::uint64_t pair) const {
  std::uint64_t hash = pair * 0x9E3779B97F4A7C15ULL;
  hash ^= hash >> 32;
  const std::size_t mask = slots_.size() - 1;
  std::size_t slot = static_cast<std::size_t>(hash) & mask;
  while (slots_[slot].pair != pair && slots_[slot].pair != empty_pair) slot = (slot + 1) & mask;
  return slot;
}

void MergeRules::grow(std::size_t slots) {
  std::vector<Slot> old(slots);
  old.swap(slots_);
  for (const Slot& slot : old)
    if (slot.pair != empty_pair) slots_[slot_of(slot.pair)] = slot;
}

void MergeRules::add(std::int32_t left, std::int32_t right, Rule rule) {
  if ((used_ + 1) * 2 > slots_.size()) grow(slots_.size() * 2);
  Slot& slot = slots_[slot_of(key(left, right))];
  if (slot.pair == empty_pair) ++used_;
  slot = {key(left, right), rule};
}

const MergeRules::Rule* MergeRules::find(std::int32_t left, std::int32_t right) const {
  const Slot& slot = slots_[slot_of(key(left, right))];
  return slot.pair == empty_pair ? nullptr : &slot.rule;
}

void MergeRules::merge(std::vector<std::int32_t>& symbols) const {
  const std::size_t count = symbols.size();
  if (count < 2) return;

  // A short piece (a word) is fastest with a plain scan for the best pair; a long one needs the heap.
  if (count <= 24) {
    while (symbols.size() > 1) {
      const Rule* best = nullptr;
      std::size_t at = 0;
      for (std::size_t i = 0; i + 1 < symbols.size(); ++i) {
        const Rule* rule = find(symbols[i], symbols[i + 1]);
        if (rule != nullptr && (best == nullptr || rule->rank < best->rank)) {
          best = rule;
          at = i;
        }
      }
      if (best == nullptr) return;
      symbols[at] = best->result;
      symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(at) + 1);
    }
    return;
  }

  struct Node {
    std::int64_t before, after;  // neighbours still alive, -1 at the ends
  };
  struct Candidate {
    std::int32_t rank, result;
    std::int64_t at;
    std::int32_t left, right;  // the symbols it was made for; stale when they have changed
    bool operator>(const Candidate& other) const { return rank != other.rank ? rank > other.rank : at > other.at; }
  };
  constexpr std::int32_t dead = -1;
  std::vector<Node> nodes(count);
  for (std::size_t i = 0; i < count; ++i)
    nodes[i] = {static_cast<std::int64_t>(i) - 1, i + 1 < count ? static_cast<std::int64_t>(i) + 1 : -1};
  std::vector<Candidate> storage;
  storage.reserve(count);
  const auto symbol = [&](std::int64_t i) -> std::int32_t& { return symbols[static_cast<std::size_t>(i)]; };
  const auto node = [&](std::int64_t i) -> Node& { return nodes[static_cast<std::size_t>(i)]; };
  for (std::size_t i = 0; i + 1 < count; ++i)
    if (const Rule* rule = find(symbols[i], symbols[i + 1]))
      storage.push_back({rule->rank, rule->result, static_cast<std::int64_t>(i), symbols[i], symbols[i + 1]});
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue(std::greater<>{}, std::move(storage));
  const auto offer = [&](std::int64_t left, std::int64_t right) {
    if (left < 0 || right < 0) return;
    if (const Rule* rule = find(symbol(left), symbol(right)))
      queue.push({rule->rank, rule->result, left, symbol(left), symbol(right)});
  };
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    if (symbol(best.at) != best.left) continue;
    const std::int64_t right = node(best.at).after;
    if (right < 0 || symbol(right) != best.right) continue;
    const std::int64_t next = node(right).after;
    symbol(best.at) = best.result;
    symbol(right) = dead;
    node(best.at).after = next;
    if (next >= 0) node(next).before = best.at;
    offer(node(best.at).before, best.at);
    offer(best.at, next);
  }
  std::size_t kept = 0;
  for (std::size_t i = 0; i < count; ++i)
    if (symbols[i] != dead) symbols[kept++] = symbols[i];
  symbols.resize(kept);
}

}  // namespace headfold::tokenizer
