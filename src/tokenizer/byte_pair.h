#pragma once
// Byte-pair merging: a piece of text, already turned into symbol ids, becomes the ids that the merge rules leave.

#include <cstdint>
#include <queue>
#include <vector>

namespace headfold::tokenizer {

/// The merge rules of one vocabulary. merge() is O(n log n) in the number of symbols and thread-safe.
class MergeRules {
 public:
  struct Rule {
    std::int32_t rank;    ///< lower merges first
    std::int32_t result;  ///< id of the merged symbol
  };

  explicit MergeRules(std::size_t expected_rules = 0);
  /// Adds a rule; of two rules for one pair the later one holds.
  void add(std::int32_t left, std::int32_t right, Rule rule);
  /// The rule for a pair, or nullptr.
  const Rule* find(std::int32_t left, std::int32_t right) const;
  std::size_t size() const { return used_; }

  /// Applies the rules: always the pair of lowest rank, the leftmost of equal ones, until no rule applies.
  void merge(std::vector<std::int32_t>& symbols) const;

 private:
  // Open addressing: a text without spaces to split at is merged as one piece, and then this table is the inner loop.
  struct Slot {
    std::uint64_t pair = empty_pair;
    Rule rule{0, 0};
  };
  static constexpr std::uint64_t empty_pair = ~std::uint64_t{0};
  static std::uint64_t key(std::int32_t left, std::int32_t right) {
    return (static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32) | static_cast<std::uint32_t>(right);
  }
  std::size_t slot_of(std::uint64_t pair) const;
  void grow(std::size_t slots);

  std::vector<Slot> slots_;
  std::size_t used_ = 0;
};

}  // namespace headfold::tokenizer
