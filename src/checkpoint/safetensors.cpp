#include <headfold/base/error.h>
#include <headfold/base/json.h>
#include <headfold/checkpoint/safetensors.h>

#include <headfold/base/positioned_file.h>

#include <algorithm>
#include <cstring>
#include <numeric>

namespace headfold::checkpoint {
namespace {

constexpr std::uint64_t kMostHeaderBytes = 100'000'000;  // the reference library's limit
constexpr std::size_t kMostDimensions = 32;

struct DtypeRow {
  const char* name;
  std::size_t bytes;
  int scalar;  ///< at::ScalarType, or -1 where ATen has none
};
constexpr DtypeRow kDtypes[] = {
    {"F64", 8, static_cast<int>(at::kDouble)},
    {"F32", 4, static_cast<int>(at::kFloat)},
    {"F16", 2, static_cast<int>(at::kHalf)},
    {"BF16", 2, static_cast<int>(at::kBFloat16)},
    {"I64", 8, static_cast<int>(at::kLong)},
    {"I32", 4, static_cast<int>(at::kInt)},
    {"I16", 2, static_cast<int>(at::kShort)},
    {"I8", 1, static_cast<int>(at::kChar)},
    {"U8", 1, static_cast<int>(at::kByte)},
    {"BOOL", 1, static_cast<int>(at::kBool)},
    {"C64", 8, static_cast<int>(at::kComplexFloat)},
    {"U16", 2, -1},
    {"U32", 4, -1},
    {"U64", 8, -1},
    {"F8_E4M3", 1, -1},
    {"F8_E5M2", 1, -1},
    {"F8_E8M0", 1, -1},
};

const DtypeRow* find_dtype(const std::string& name) {
  for (const DtypeRow& row : kDtypes)
    if (name == row.name) return &row;
  return nullptr;
}

/// A name as it may stand in a message: quoted, control characters escaped.
std::string quote_name(const std::string& name) {
  std::string text = Json(name).dump(-1, ' ', false, Json::error_handler_t::replace);
  if (text.size() > 200) text = text.substr(0, 200) + "…\"";
  return text;
}

/// A whole number >= 0 that fits int64.
bool count(const Json& value, std::uint64_t& out) {
  if (!value.is_number_unsigned()) return false;  // the parser stores every whole number without a sign as unsigned
  out = value.get<std::uint64_t>();
  return out <= static_cast<std::uint64_t>(INT64_MAX);
}

/// One header entry, checked against itself and the size of the data section.
TensorInfo read_entry(const std::string& file, const std::string& name, const Json& entry, std::uint64_t data_bytes) {
  const auto fail = [&](const std::string& what) {
    return CorruptFile(file, fmt::format("tensor {}: {}", quote_name(name), what));
  };
  if (!entry.is_object()) throw fail("its header entry is no object");
  TensorInfo info;
  const auto dtype = entry.find("dtype");
  if (dtype == entry.end() || !dtype->is_string()) throw fail("\"dtype\" is missing or no text");
  info.dtype = dtype->get<std::string>();
  const std::size_t size = element_size(info.dtype);
  if (size == 0) throw fail(fmt::format("unknown dtype {}", quote_name(info.dtype)));
  const auto shape = entry.find("shape");
  if (shape == entry.end() || !shape->is_array()) throw fail("\"shape\" is missing or no list");
  if (shape->size() > kMostDimensions) throw fail(fmt::format("its shape has {} dimensions", shape->size()));
  std::uint64_t elements = 1;
  std::int64_t strides = 1;  // what a tensor library multiplies: extents of zero count as one
  for (const Json& extent : *shape) {
    std::uint64_t value = 0;
    if (!count(extent, value))
      throw fail(fmt::format("its shape holds {}, which is no extent", extent.dump().substr(0, 60)));
    if (__builtin_mul_overflow(strides, static_cast<std::int64_t>(std::max<std::uint64_t>(value, 1)), &strides) ||
        __builtin_mul_overflow(elements, value, &elements))
      throw fail("the product of its shape overflows");
    info.shape.push_back(static_cast<std::int64_t>(value));
  }
  std::uint64_t bytes = 0;
  if (__builtin_mul_overflow(elements, size, &bytes)) throw fail("the size of its shape in bytes overflows");
  const auto offsets = entry.find("data_offsets");
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
  if (offsets == entry.end() || !offsets->is_array() || offsets->size() != 2 || !count((*offsets)[0], begin) ||
      !count((*offsets)[1], end))
    throw fail("\"data_offsets\" is missing or no pair of offsets");
  if (begin > end) throw fail(fmt::format("its data ends at {} before it begins at {}", end, begin));
  if (end > data_bytes)
    throw CorruptFile(file,
                      fmt::format("tensor {}: its data ends at byte {} of a data section of {} bytes", quote_name(name),
                                  end, data_bytes),
                      "the file may be truncated: copy or download it again");
  if (end - begin != bytes)
    throw fail(fmt::format("shape {} of {} needs {} bytes, its offsets span {}", shape_text(info.shape), info.dtype,
                           bytes, end - begin));
  info.begin = begin;
  info.end = end;
  return info;
}

/// The tensors must cover the data section without gap or overlap.
void check_cover(const std::string& file, const std::map<std::string, TensorInfo>& tensors, std::uint64_t data_bytes) {
  std::vector<const std::pair<const std::string, TensorInfo>*> order;
  order.reserve(tensors.size());
  for (const auto& entry : tensors) order.push_back(&entry);
  std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end);
  });
  std::uint64_t next = 0;
  const std::string* before = nullptr;
  for (const auto* entry : order) {
    const auto& [name, info] = *entry;
    if (info.begin < next)
      throw CorruptFile(file, fmt::format("tensors {} and {} overlap", quote_name(*before), quote_name(name)));
    if (info.begin > next)
      throw CorruptFile(file, fmt::format("tensor {}: bytes {} to {} before it belong to no tensor", quote_name(name),
                                          next, info.begin));
    next = info.end;
    before = &name;
  }
  if (next != data_bytes)
    throw CorruptFile(
        file, fmt::format("the tensors cover {} bytes of a data section of {} bytes{}", next, data_bytes,
                          before == nullptr ? std::string() : fmt::format(" (last tensor {})", quote_name(*before))));
}

}  // namespace

std::int64_t TensorInfo::elements() const {
  std::int64_t product = 1;
  for (const std::int64_t extent : shape) product *= extent;
  return product;
}

std::size_t element_size(const std::string& dtype) {
  const DtypeRow* row = find_dtype(dtype);
  return row == nullptr ? 0 : row->bytes;
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

at::ScalarType scalar_type(const std::string& dtype) {
  const DtypeRow* row = find_dtype(dtype);
  if (row == nullptr || row->scalar < 0)
    throw InputError(fmt::format("headfold cannot compute with tensors of dtype {}", quote_name(dtype)),
                     "a checkpoint in F32, F16 or BF16 is needed");
  return static_cast<at::ScalarType>(row->scalar);
}

std::string dtype_name(at::ScalarType type) {
  for (const DtypeRow& row : kDtypes)
    if (row.scalar == static_cast<int>(type)) return row.name;
  throw InternalError(fmt::format("safetensors has no name for the element type {}", c10::toString(type)));
}

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path) : map_(path) {
  const std::string file = path.string();
  const auto bytes = map_.bytes();
  if (bytes.size() < 8)
    throw CorruptFile(file, fmt::format("has {} bytes; a safetensors file has at least 8", bytes.size()),
                      "is it truncated?");
  std::uint64_t length = 0;
  for (int i = 7; i >= 0; --i)
    length = length << 8 | std::to_integer<std::uint64_t>(bytes[static_cast<std::size_t>(i)]);
  if (length > bytes.size() - 8)
    throw CorruptFile(
        file, fmt::format("its header claims {} bytes, the file has {} after the length", length, bytes.size() - 8),
        "the file is truncated, or is no safetensors file");
  if (length > kMostHeaderBytes)
    throw CorruptFile(file, fmt::format("its header claims {} bytes; the format allows {}", length, kMostHeaderBytes));
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + 8, static_cast<std::size_t>(length));
  if (text.empty() || text.front() != '{')
    throw CorruptFile(file, "its header does not begin with '{'", "is it a safetensors file?");
  const Json header = parse_json(text, file + " (header)");
  const std::uint64_t data_begin = 8 + length;
  const std::uint64_t data_bytes = bytes.size() - data_begin;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") {
      if (!entry.is_object()) throw CorruptFile(file, "__metadata__ is no object");
      for (const auto& [key, value] : entry.items()) {
        if (!value.is_string()) throw CorruptFile(file, fmt::format("__metadata__ key {} is no text", quote_name(key)));
        metadata_.emplace(key, value.get<std::string>());
      }
      continue;
    }
    tensors_.emplace(name, read_entry(file, name, entry, data_bytes));
  }
  check_cover(file, tensors_, data_bytes);
  for (auto& [name, info] : tensors_) {
    info.begin += data_begin;
    info.end += data_begin;
  }
}

const TensorInfo& SafetensorsFile::info(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end())
    throw InputError(fmt::format("{}: there is no tensor {}", map_.path().string(), quote_name(name)));
  return found->second;
}

at::Tensor SafetensorsFile::view(const std::string& name) const {
  const TensorInfo& where = info(name);
  const DtypeRow* row = find_dtype(where.dtype);
  if (row == nullptr || row->scalar < 0)
    throw InputError(fmt::format("{}: tensor {} has dtype {}, which headfold cannot compute with", map_.path().string(),
                                 quote_name(name), where.dtype));
  const auto options = at::TensorOptions().dtype(static_cast<at::ScalarType>(row->scalar));
  if (where.begin == where.end) return at::empty(where.shape, options);
  const std::byte* data = map_.bytes().data() + where.begin;
  if (reinterpret_cast<std::uintptr_t>(data) % row->bytes != 0) {
    at::Tensor copy = at::empty(where.shape, options);
    std::memcpy(copy.data_ptr(), data, static_cast<std::size_t>(where.end - where.begin));
    return copy;
  }
  // The map is read-only; ATen has no tensor of constant data.
  return at::from_blob(
      const_cast<std::byte*>(data), where.shape, [owner = map_.owner()](void*) {}, options);
}

std::uint64_t TensorSpec::bytes() const {
  const std::size_t size = element_size(dtype);
  if (size == 0) throw InternalError(fmt::format("tensor {}: unknown dtype {}", name, dtype));
  std::uint64_t product = size;
  for (const std::int64_t extent : shape) {
    if (extent < 0 || __builtin_mul_overflow(product, static_cast<std::uint64_t>(extent), &product) ||
        product > INT64_MAX)
      throw InternalError(fmt::format("tensor {}: shape {} is impossible", name, shape_text(shape)));
  }
  return product;
}

SafetensorsLayout lay_out(const std::vector<TensorSpec>& tensors, const std::map<std::string, std::string>& metadata) {
  SafetensorsLayout layout;
  layout.order.resize(tensors.size());
  std::iota(layout.order.begin(), layout.order.end(), std::size_t{0});
  std::sort(layout.order.begin(), layout.order.end(), [&](std::size_t a, std::size_t b) {
    const std::size_t wide_a = element_size(tensors[a].dtype);
    const std::size_t wide_b = element_size(tensors[b].dtype);
    return wide_a != wide_b ? wide_a > wide_b : tensors[a].name < tensors[b].name;
  });
  OrderedJson json;
  // Some versions of transformers refuse a file without this entry.
  json["__metadata__"]["format"] = "pt";
  for (const auto& [key, value] : metadata) json["__metadata__"][key] = value;
  layout.begin.resize(tensors.size());
  std::uint64_t next = 0;
  for (const std::size_t i : layout.order) {
    const TensorSpec& tensor = tensors[i];
    if (tensor.name == "__metadata__") throw InternalError("__metadata__ is no tensor name");
    const std::uint64_t bytes = tensor.bytes();
    layout.begin[i] = next;
    json[tensor.name] = {{"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {next, next + bytes}}};
    next += bytes;
  }
  if (json.size() != tensors.size() + 1) throw InternalError("two tensors of one name were to be written to one file");
  std::string text = json.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  for (int shift = 0; shift < 64; shift += 8) layout.header.push_back(static_cast<char>(text.size() >> shift & 0xff));
  layout.header += text;
  for (std::uint64_t& begin : layout.begin) begin += layout.header.size();
  layout.file_bytes = layout.header.size() + next;
  return layout;
}

void write_safetensors(const std::filesystem::path& path, const std::map<std::string, at::Tensor>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  std::vector<TensorSpec> specs;
  std::vector<at::Tensor> data;
  for (const auto& [name, tensor] : tensors) {
    data.push_back(tensor.detach().cpu().contiguous());
    specs.push_back({name, dtype_name(tensor.scalar_type()), tensor.sizes().vec()});
  }
  const SafetensorsLayout layout = lay_out(specs, metadata);
  if (path.has_parent_path()) make_folder(path.parent_path());
  const std::filesystem::path temporary = fmt::format("{}.{}.tmp", path.string(), process_id());
  try {
    PositionedFile file = PositionedFile::create(temporary, layout.file_bytes);
    file.write(layout.header.data(), layout.header.size(), 0);
    for (std::size_t i = 0; i < data.size(); ++i) file.write(data[i].data_ptr(), data[i].nbytes(), layout.begin[i]);
    file.close();
  } catch (...) {
    std::error_code code;
    std::filesystem::remove(temporary, code);
    throw;
  }
  publish(temporary, path);
}

}  // namespace headfold::checkpoint
