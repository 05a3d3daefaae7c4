#pragma once
// The safetensors container: a JSON header over contiguous raw tensors (docs/formats.md, section "safetensors").

#include <ATen/ATen.h>

#include <headfold/base/files.h>
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace headfold::checkpoint {

/// One tensor of a file. begin/end are byte offsets from the start of the file (not of the data section).
struct TensorInfo {
  std::string dtype;  ///< safetensors name: "F32", "BF16", …
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
  std::int64_t elements() const;
};

/// Bytes per element of a safetensors dtype name; 0 when unknown.
std::size_t element_size(const std::string& dtype);
/// "[2, 3]" for messages.
std::string shape_text(const std::vector<std::int64_t>& shape);
/// ATen type of a safetensors dtype name. Throws InputError for types ATen lacks.
at::ScalarType scalar_type(const std::string& dtype);
/// safetensors name of an ATen type.
std::string dtype_name(at::ScalarType type);

/// A validated, memory-mapped safetensors file. Every rule of the format is checked on opening: header length and JSON,
/// dtype, shape x dtype == bytes without overflow, no gap, overlap or duplicate, data covering the file exactly. Throws
/// CorruptFile naming file and tensor. Memory is never allocated by the file's word alone.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::filesystem::path& path);
  const std::map<std::string, TensorInfo>& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  bool has(const std::string& name) const { return tensors_.contains(name); }
  /// Throws InputError naming the file when the tensor is absent.
  const TensorInfo& info(const std::string& name) const;
  /// A view of the mapped bytes in the stored dtype; no copy (but for data that its writer did not align to the element
  /// size). The tensor keeps the map alive; it must not be written to.
  at::Tensor view(const std::string& name) const;
  const MappedFile& map() const { return map_; }

 private:
  MappedFile map_;
  std::map<std::string, TensorInfo> tensors_;
  std::map<std::string, std::string> metadata_;
};

/// Writes a whole small file atomically (one process): tensors in the reference library's order, metadata {"format":
/// "pt"} plus `metadata`.
void write_safetensors(const std::filesystem::path& path, const std::map<std::string, at::Tensor>& tensors,
                       const std::map<std::string, std::string>& metadata = {});

/// Name, dtype and shape of a tensor that will be written.
struct TensorSpec {
  std::string name;
  std::string dtype;
  std::vector<std::int64_t> shape;
  /// Product of shape and element size. Throws InternalError for an unknown dtype, a negative extent or an overflow.
  std::uint64_t bytes() const;
};

/// The header of a file with the given tensors and where their data stands; everything follows from the list.
struct SafetensorsLayout {
  std::string header;              ///< length, JSON and padding: what the file begins with
  std::vector<std::size_t> order;  ///< indices into the list in the order of the file: descending alignment, then name
  std::vector<std::uint64_t> begin;  ///< byte offset from the start of the file, by index into the list
  std::uint64_t file_bytes = 0;
};
/// Throws InternalError for a name that appears twice.
SafetensorsLayout lay_out(const std::vector<TensorSpec>& tensors,
                          const std::map<std::string, std::string>& metadata = {});

}  // namespace headfold::checkpoint
