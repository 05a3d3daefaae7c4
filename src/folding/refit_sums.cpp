#include "refit_sums.h"

#include <ATen/Parallel.h>
#include <headfold/base/error.h>
#include <headfold/folding/bases.h>

namespace headfold::folding {
namespace {

/// Threads that work on chunks at a time are limited so that their sums stay below this.
constexpr double kBytesInFlight = 8.0 * (1 << 30);

/// Sum of the chunks begin .. begin + 2^level - 1; `begin` is a multiple of 2^level.
struct Node {
  std::int64_t begin = 0;
  int level = 0;
  Sums sums;
};

/// Appends a node and joins neighbours that are the two halves of an aligned block. Which additions happen depends on
/// chunk numbers alone.
void push(std::vector<Node>& nodes, Node node) {
  nodes.push_back(std::move(node));
  while (nodes.size() > 1) {
    Node &left = nodes[nodes.size() - 2], &right = nodes.back();
    if (left.level != right.level || left.begin % (std::int64_t{2} << left.level) != 0) return;
    for (std::size_t i = 0; i < left.sums.size(); ++i) left.sums[i].add_(right.sums[i]);
    ++left.level;
    nodes.pop_back();
  }
}

std::span<std::byte> bytes_of(const at::Tensor& tensor) {
  return {static_cast<std::byte*>(tensor.data_ptr()), static_cast<std::size_t>(tensor.nbytes())};
}

}  // namespace

DealtSequences::DealtSequences(const comm::Communicator& world, std::int64_t first, std::int64_t count,
                               std::int64_t chunks)
    : world_(world), first_(first), count_(count), chunks_(std::min(chunks, count)) {
  if (count < 1 || chunks < 1) throw InternalError(fmt::format("{} sequences in {} chunks", count, chunks));
  const auto [begin, end] = share_of(chunks_, world.rank(), world.size());
  for (std::int64_t chunk = begin; chunk < end; ++chunk) {
    const auto [from, to] = share_of(count_, static_cast<int>(chunk), static_cast<int>(chunks_));
    for (std::int64_t i = from; i < to; ++i) own_.push_back(first_ + i);
  }
}

Sums DealtSequences::sum(const std::function<Sums()>& empty,
                         const std::function<void(std::int64_t, Sums&)>& add) const {
  const auto [begin, end] = share_of(chunks_, world_.rank(), world_.size());
  double bytes = 1;
  for (const at::Tensor& tensor : empty()) bytes += static_cast<double>(tensor.nbytes());
  const auto wave = std::clamp<std::int64_t>(static_cast<std::int64_t>(kBytesInFlight / bytes), 1,
                                             std::max(1, at::get_num_threads()));
  std::vector<Node> own;
  for (std::int64_t first = begin; first < end; first += wave) {
    const std::int64_t count = std::min(wave, end - first);
    std::vector<Sums> parts(static_cast<std::size_t>(count));
    for_each_item(count, [&](std::int64_t i) {
      Sums sums = empty();
      const auto [from, to] = share_of(count_, static_cast<int>(first + i), static_cast<int>(chunks_));
      for (std::int64_t s = from; s < to; ++s) add(first_ + s, sums);
      parts[static_cast<std::size_t>(i)] = std::move(sums);
    });
    for (std::int64_t i = 0; i < count; ++i) push(own, {first + i, 0, std::move(parts[static_cast<std::size_t>(i)])});
  }
  std::vector<Node> all;
  if (world_.size() == 1) {
    all = std::move(own);
  } else {
    for (int rank = 0; rank < world_.size(); ++rank) {
      // What `rank` holds follows from its share.
      const auto [from, to] = share_of(chunks_, rank, world_.size());
      std::vector<Node> held;
      for (std::int64_t chunk = from; chunk < to; ++chunk) push(held, {chunk, 0, {}});
      for (std::size_t i = 0; i < held.size(); ++i) {
        Node node = rank == world_.rank() ? std::move(own.at(i)) : Node{held[i].begin, held[i].level, empty()};
        for (const at::Tensor& tensor : node.sums) world_.broadcast(bytes_of(tensor), rank);
        push(all, std::move(node));
      }
    }
  }
  while (all.size() > 1) {  // a number of chunks that is no power of two leaves blocks of falling size
    const Node last = std::move(all.back());
    all.pop_back();
    for (std::size_t i = 0; i < last.sums.size(); ++i) all.back().sums[i].add_(last.sums[i]);
  }
  return std::move(all.at(0).sums);
}

}  // namespace headfold::folding
