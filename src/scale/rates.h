#pragma once
// How fast a device computes and moves bytes: measured by `headfold bench`, or stated by data sheets.

#include <ATen/ATen.h>
#include <headfold/base/json.h>

#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace headfold::scale {

/// Names of figures and their units. `.float32` and `.bfloat16` are the compute dtype.
///
/// | name | unit | what |
/// | --- | --- | --- |
/// | product.DTYPE | FLOP/s | a layer's linear maps |
/// | attention.DTYPE | FLOP/s | causal attention, of its causal half |
/// | element_wise.DTYPE | B/s | norms, rotations, activations (work.h counts their bytes) |
/// | gram.DTYPE | FLOP/s | calibration's Grams, of the operations carried out |
/// | attention_statistics.DTYPE | FLOP/s | rotated queries, attended values (optional: that of gram) |
/// | sums | B/s | statistics: memory for them, first tokens, halves brought together, checks (optional: not counted) |
/// | head.DTYPE | FLOP/s | output projection with the loss (evaluation) |
/// | training.DTYPE | x | time of forward and backward passes as a multiple of their parts at the rates above |
/// | load.DTYPE | B/s | weights from files into a layer |
/// | fold | FLOP/s | float64 products of a conversion and all else but reading, factorising and writing |
/// | eigen | FLOP/s | float64 factorisations |
/// | memory | B/s | memory bandwidth |
/// | host_memory | B/s | GPUs: of a rank's share of the host's |
/// | read, copy, write, statistics | B/s | of a conversion: reading, copying tensors, writing; writing a statistics
/// file | | inside, network | B/s | a message between two ranks of a node, of two nodes (per rank) | | inside_latency,
/// network_latency | s | of such a message | | all_reduce_inside, all_reduce_network | B/s | payload sent per rank
/// while sums are formed (optional: those above) | | storage | B/s | file system, per node | | job | s | start and end
/// of a job: ranks meet, files are opened, records written | | text | B/s | text into tokens |
struct Figure {
  double value = 0;
  std::string unit;
  std::string source;  ///< "measured", "data sheet x 0.60", "assumed"
  bool measured() const { return source == "measured"; }
};

/// What one rank of a device reaches.
struct Rates {
  std::string device;  ///< "cpu", "h100", …
  std::string file;    ///< where measured figures come from; empty: none
  std::map<std::string, Figure> figures;
  int cores = 0;             ///< cores of a node; 0: GPUs, on which ranks do not share
  int threads = 1;           ///< of a rank when it was measured
  double device_memory = 0;  ///< bytes of one device; 0: ranks share the node's memory
  double node_memory = 0;    ///< bytes of a node
  bool has(const std::string& name) const { return figures.contains(name); }
  /// UsageError naming the figure, the file and how to measure it.
  const Figure& at(const std::string& name) const;
  double value(const std::string& name) const { return at(name).value; }
  /// "product.bfloat16"
  static std::string of(const std::string& name, at::ScalarType dtype);
};

/// Names of the devices in the table of data sheets: "a100", "h100", "h200".
std::vector<std::string> sheet_names();
/// The table itself: stated figures, attainable shares, where they stand.
const Json& sheets();
/// Figures of a data sheet times the attainable shares. UsageError that lists the names.
Rates sheet_rates(const std::string& device);

/// Reads what `headfold bench` wrote (docs/formats.md, "rates.json"). IoError, CorruptFile, or InputError naming file
/// and field for what is missing, not finite, not above zero, or of a unit other than the name's.
Rates read_rates(const std::filesystem::path& file);
/// As read_rates() reads it. `facts`: what is written beside the figures (host, shape, date).
OrderedJson to_json(const Rates& rates, const OrderedJson& facts);
/// Unit of a figure; empty for an unknown name.
std::string unit_of(const std::string& name);

}  // namespace headfold::scale
