#include <fmt/ranges.h>
#include <hdf5.h>
#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/base/hash.h>
#include <headfold/base/json.h>
#include <headfold/base/log.h>
#include <headfold/base/profile.h>
#include <headfold/calibration/statistics.h>
#include <headfold/comm/operation.h>
#include <headfold/linalg/linalg.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

namespace headfold::calibration {
namespace {

constexpr const char* kFormat = "headfold-statistics";
// Still read: 1 has neither halves nor attention statistics, 2 no values.
constexpr std::int64_t kVersion = 3;
constexpr hsize_t kPiece = hsize_t{1} << 27;  // doubles per transfer: 1 GiB, below the 2^31 bytes of MPI-IO counts
constexpr std::size_t kLongestText = std::size_t{60} * 1024;  // an attribute must fit an object header
constexpr std::int64_t kMostLayers = 100000;
constexpr std::int64_t kWidest = 1 << 20;  // so that no product of two sizes overflows

/// HDF5 prints its error stack to standard error by default; headfold reports through exceptions.
void silence() {
  H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
}

/// The innermost reason HDF5 gives for its last failure.
std::string reason() {
  std::string text;
  const auto take = [](unsigned, const H5E_error2_t* error, void* into) -> herr_t {
    auto* out = static_cast<std::string*>(into);
    if (out->empty() && error->desc != nullptr) *out = error->desc;
    return 0;
  };
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, take, &text);
  H5Eclear2(H5E_DEFAULT);
  return text.empty() ? "HDF5 gives no reason" : text;
}

class Handle {
 public:
  using Close = herr_t (*)(hid_t);
  Handle(hid_t id, Close how) : id_(id), close_(how) {}
  Handle(Handle&& other) noexcept : id_(std::exchange(other.id_, H5I_INVALID_HID)), close_(other.close_) {}
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  Handle& operator=(Handle&&) = delete;
  ~Handle() { close(); }
  operator hid_t() const { return id_; }
  bool valid() const { return id_ >= 0; }
  herr_t close() {
    if (id_ < 0) return 0;
    return close_(std::exchange(id_, H5I_INVALID_HID));
  }

 private:
  hid_t id_;
  Close close_;
};

std::string group_name(std::int64_t layer) {
  return fmt::format("/layer_{:04}", layer);
}

/// Part of a layer's statistics that a reader may leave out.
enum class Part { base, halves, attention };

/// Datasets of a layer: name and number of float64 values. Where the values are kept in memory: a tensor, or one of the
/// small datasets that hold numbers.
struct Dataset {
  std::string name;
  std::int64_t size = 0;
  Part part = Part::base;
  at::Tensor PackedStatistics::*tensor = nullptr;
  std::int64_t matrix = 0;  ///< width of the packed matrices in it; 1: plain sums of one sign; 0: no trace is recorded
  int trace = -1;           ///< place of its trace in `traces`
};

constexpr std::int64_t kTraces = 11;
constexpr std::int64_t traces_of(std::int64_t version) {
  return version == 1 ? 3 : version == 2 ? 9 : kTraces;
}

std::vector<Dataset> datasets(const StatisticsShape& shape, std::int64_t version = kVersion) {
  using Packed = PackedStatistics;
  const std::int64_t hidden = shape.hidden;
  const std::int64_t packed = linalg::packed_size(hidden);
  const std::int64_t keys = linalg::packed_size(shape.key_width);
  const std::int64_t values = linalg::packed_size(shape.value_width);
  std::vector<Dataset> all{{"count", 2},
                           {"traces", traces_of(version)},
                           {"sum", hidden, Part::base, &Packed::sum},
                           {"sum_0", hidden, Part::base, &Packed::sum_0},
                           {"moment", packed, Part::base, &Packed::moment, hidden, 0},
                           {"moment_0", packed, Part::base, &Packed::moment_0, hidden, 1}};
  if (shape.key_width > 0) all.push_back({"rotated_keys", keys, Part::base, &Packed::rotated_keys, shape.key_width, 2});
  if (shape.value_width > 0) all.push_back({"values", values, Part::base, &Packed::values, shape.value_width, 9});
  if (shape.halves) {
    all.push_back({"count_even", 2, Part::halves});
    all.push_back({"sum_even", hidden, Part::halves, &Packed::sum_even});
    all.push_back({"sum_0_even", hidden, Part::halves, &Packed::sum_0_even});
    all.push_back({"moment_even", packed, Part::halves, &Packed::moment_even, hidden, 3});
    all.push_back({"moment_0_even", packed, Part::halves, &Packed::moment_0_even, hidden, 4});
    if (shape.key_width > 0)
      all.push_back({"rotated_keys_even", keys, Part::halves, &Packed::rotated_keys_even, shape.key_width, 5});
    if (shape.value_width > 0)
      all.push_back({"values_even", values, Part::halves, &Packed::values_even, shape.value_width, 10});
  }
  if (shape.attention) {
    const std::int64_t d = shape.head_dim;
    const std::int64_t block = shape.block();
    all.push_back({"attention_count", 1, Part::attention});
    all.push_back(
        {"rotated_queries", shape.heads * linalg::packed_size(d), Part::attention, &Packed::rotated_queries, d, 6});
    all.push_back(
        {"distance_mass", shape.heads * shape.sequence_length, Part::attention, &Packed::distance_mass, 1, 7});
    all.push_back({"attended", shape.heads * linalg::packed_size(block), Part::attention, &Packed::attended, block, 8});
    all.push_back({"attended_sum", shape.heads * block, Part::attention, &Packed::attended_sum});
  }
  if (version > 2) {
    const auto tensors =
        std::count_if(all.begin(), all.end(), [](const Dataset& one) { return one.tensor != nullptr; });
    all.insert(all.begin() + 2, {"checksums", tensors});
  }
  return all;
}

/// Sum of the diagonals of packed lower triangles [n, n], one after the other; 0 when undefined.
double trace(const at::Tensor& packed, std::int64_t n) {
  if (!packed.defined()) return 0;
  const std::int64_t size = linalg::packed_size(n);
  double sum = 0;
  for (std::int64_t first = 0; first < packed.numel(); first += size)
    for (std::int64_t i = 0; i < n; ++i) sum += packed.data_ptr<double>()[first + i * (i + 1) / 2 + i];
  return sum;
}

/// The values of the small datasets that hold numbers.
std::vector<double> numbers(const PackedStatistics& part, const StatisticsShape& shape, const std::string& name) {
  if (name == "count") return {part.count, part.count_0};
  if (name == "count_even") return {part.count_even, part.count_0_even};
  if (name == "attention_count") return {part.attention_count};
  if (name == "checksums") {
    std::vector<double> sums;
    for (const Dataset& dataset : datasets(shape))
      if (dataset.tensor != nullptr) sums.push_back(value_checksum(part.*dataset.tensor));
    return sums;
  }
  std::vector<double> traces(kTraces, 0.0);
  for (const Dataset& dataset : datasets(shape))
    if (dataset.trace >= 0)
      traces[static_cast<std::size_t>(dataset.trace)] = trace(part.*dataset.tensor, dataset.matrix);
  return traces;
}

// ----------------------------------------------------------------------------------------------------------
// Writing
// ----------------------------------------------------------------------------------------------------------

class Writer {
 public:
  Writer(const fs::path& path, const comm::Communicator& world)
      : file_name_(path.string()),
        world_(world),
        access_(H5Pcreate(H5P_FILE_ACCESS), H5Pclose),
        file_(open(path, world), H5Fclose) {
    if (!file_.valid()) fail("cannot be created");
  }

  void text(const char* name, const std::string& value) {
    if (value.size() > kLongestText)
      throw InternalError(fmt::format("attribute {} is too long for a statistics file", name));
    const Handle type(H5Tcopy(H5T_C_S1), H5Tclose);
    H5Tset_size(type, std::max<std::size_t>(value.size(), 1));
    H5Tset_cset(type, H5T_CSET_UTF8);
    H5Tset_strpad(type, H5T_STR_NULLPAD);
    const std::string padded = value.empty() ? std::string(1, '\0') : value;
    attribute(name, type, type, padded.data());
  }
  void integer(const char* name, std::int64_t value) { attribute(name, H5T_STD_I64LE, H5T_NATIVE_INT64, &value); }

  /// Collective: all groups and datasets of the file.
  void create(const StatisticsHeader& header) {
    const comm::Operation scope(world_, "HDF5 layout of " + file_name_);
    const Handle properties(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
    // Space is taken at once and not filled: every value is written by its owner.
    H5Pset_alloc_time(properties, H5D_ALLOC_TIME_EARLY);
    H5Pset_fill_time(properties, H5D_FILL_TIME_NEVER);
    // No times: the same sums give the same bytes.
    H5Pset_obj_track_times(properties, false);
    const Handle plain_group(H5Pcreate(H5P_GROUP_CREATE), H5Pclose);
    H5Pset_obj_track_times(plain_group, false);
    for (std::int64_t layer = 0; layer < header.layers; ++layer) {
      const Handle group(H5Gcreate2(file_, group_name(layer).c_str(), H5P_DEFAULT, plain_group, H5P_DEFAULT), H5Gclose);
      if (!group.valid()) fail("a group cannot be created");
      for (const Dataset& dataset : datasets(header.shape())) {
        const auto size = static_cast<hsize_t>(dataset.size);
        const Handle space(H5Screate_simple(1, &size, nullptr), H5Sclose);
        Handle made(
            H5Dcreate2(group, dataset.name.c_str(), H5T_IEEE_F64LE, space, H5P_DEFAULT, properties, H5P_DEFAULT),
            H5Dclose);
        if (!made.valid() || made.close() < 0) fail("a dataset cannot be created");
      }
    }
  }

  /// Not collective.
  void write(std::int64_t layer, const std::string& name, const double* values, std::int64_t count) {
    const std::string where = group_name(layer) + "/" + name;
    const comm::Operation scope(fmt::format("HDF5 write of {} in {}", where, file_name_));
    Handle dataset(H5Dopen2(file_, where.c_str(), H5P_DEFAULT), H5Dclose);
    if (!dataset.valid()) fail(where);
    const Handle space(H5Dget_space(dataset), H5Sclose);
    for (hsize_t begin = 0; begin < static_cast<hsize_t>(count); begin += kPiece) {
      const hsize_t length = std::min(kPiece, static_cast<hsize_t>(count) - begin);
      const Handle memory(H5Screate_simple(1, &length, nullptr), H5Sclose);
      if (H5Sselect_hyperslab(space, H5S_SELECT_SET, &begin, nullptr, &length, nullptr) < 0 ||
          H5Dwrite(dataset, H5T_NATIVE_DOUBLE, memory, space, H5P_DEFAULT, values + begin) < 0)
        fail(where);
    }
    if (dataset.close() < 0) fail(where);
  }

  /// Collective. Also where HDF5 reports what it could not write.
  void close() {
    const comm::Operation scope(world_, "HDF5 close of " + file_name_);
    if (file_.close() < 0) fail("cannot be closed");
  }

 private:
  hid_t open(const fs::path& path, const comm::Communicator& world) {
    const comm::Operation scope(world, "HDF5 create of " + file_name_);
    // Newest layout that the 1.10 line shares: compact groups, and a superblock that notices truncation.
    H5Pset_libver_bounds(access_, H5F_LIBVER_V18, H5F_LIBVER_LATEST);
    if (world.mpi_comm() != nullptr)
      H5Pset_fapl_mpio(access_, *static_cast<const MPI_Comm*>(world.mpi_comm()), MPI_INFO_NULL);
    const Handle creation(H5Pcreate(H5P_FILE_CREATE), H5Pclose);
    H5Pset_obj_track_times(creation, false);
    return H5Fcreate(path.c_str(), H5F_ACC_TRUNC, creation, access_);
  }
  void attribute(const char* name, hid_t file_type, hid_t memory_type, const void* value) {
    const Handle space(H5Screate(H5S_SCALAR), H5Sclose);
    const Handle made(H5Acreate2(file_, name, file_type, space, H5P_DEFAULT, H5P_DEFAULT), H5Aclose);
    if (!made.valid() || H5Awrite(made, memory_type, value) < 0) fail(name);
  }
  [[noreturn]] void fail(const std::string& what) const {
    throw IoError(file_name_, fmt::format("{}: {}", what, reason()),
                  "check the free space and the file system's quota");
  }

  std::string file_name_;
  comm::Communicator world_;
  Handle access_;
  Handle file_;
};

// ----------------------------------------------------------------------------------------------------------
// Reading
// ----------------------------------------------------------------------------------------------------------

class Input {
 public:
  explicit Input(const fs::path& path) : name_(path.string()), file_(open(path), H5Fclose) {
    if (!file_.valid()) {
      const std::string why = reason();
      throw CorruptFile(name_, fmt::format("is a broken or truncated HDF5 file: {}", why),
                        "run headfold calibrate again");
    }
  }

  bool has_attribute(const char* name) const { return H5Aexists(file_, name) > 0; }

  std::string text(const char* name) const {
    const Handle attribute = open_attribute(name);
    const Handle type(H5Aget_type(attribute), H5Tclose);
    if (!type.valid() || H5Tget_class(type) != H5T_STRING || H5Tis_variable_str(type) != 0)
      wrong(name, "is no text of fixed length");
    const std::size_t size = H5Tget_size(type);
    if (size > kLongestText) wrong(name, "is too long");
    std::string value(size, '\0');
    if (H5Aread(attribute, type, value.data()) < 0) wrong(name, reason());
    value.resize(std::min(value.find('\0'), value.size()));
    return value;
  }

  std::int64_t integer(const char* name, std::int64_t least, std::int64_t most) const {
    const Handle attribute = open_attribute(name);
    const Handle type(H5Aget_type(attribute), H5Tclose);
    if (!type.valid() || H5Tget_class(type) != H5T_INTEGER) wrong(name, "is no integer");
    std::int64_t value = 0;
    if (H5Aread(attribute, H5T_NATIVE_INT64, &value) < 0) wrong(name, reason());
    if (value < least || value > most) wrong(name, fmt::format("is {}, allowed are {} to {}", value, least, most));
    return value;
  }

  /// Opens a dataset after checking that it is float64 [size], stored in this file.
  Handle dataset(std::int64_t layer, const Dataset& wanted) const {
    const std::string where = group_name(layer) + "/" + wanted.name;
    check_link(group_name(layer));
    check_link(where);
    Handle set(H5Dopen2(file_, where.c_str(), H5P_DEFAULT), H5Dclose);
    if (!set.valid()) corrupt(where, "cannot be opened: " + reason());
    const Handle type(H5Dget_type(set), H5Tclose);
    if (!type.valid() || H5Tget_class(type) != H5T_FLOAT || H5Tget_size(type) != 8)
      corrupt(where, "is not of type float64");
    const Handle space(H5Dget_space(set), H5Sclose);
    hsize_t size = 0;
    if (!space.valid() || H5Sget_simple_extent_ndims(space) != 1 ||
        H5Sget_simple_extent_dims(space, &size, nullptr) != 1)
      corrupt(where, "is not one-dimensional");
    if (size != static_cast<hsize_t>(wanted.size))
      corrupt(where, fmt::format("has {} values, expected {}", size, wanted.size));
    const Handle properties(H5Dget_create_plist(set), H5Pclose);
    // Plain values that are there: no other files, nothing to unpack, no space that is merely promised.
    const hsize_t stored = H5Dget_storage_size(set);
    if (!properties.valid() || H5Pget_layout(properties) != H5D_CONTIGUOUS || H5Pget_external_count(properties) != 0 ||
        stored < size * sizeof(double) || stored > size_)
      corrupt(where, "is not stored in the file as a plain array");
    return set;
  }

  at::Tensor read(std::int64_t layer, const Dataset& wanted) const {
    const std::string where = group_name(layer) + "/" + wanted.name;
    const Handle set = dataset(layer, wanted);
    const Handle space(H5Dget_space(set), H5Sclose);
    at::Tensor values = at::empty({wanted.size}, at::kDouble);
    for (hsize_t begin = 0; begin < static_cast<hsize_t>(wanted.size); begin += kPiece) {
      const hsize_t length = std::min(kPiece, static_cast<hsize_t>(wanted.size) - begin);
      const Handle memory(H5Screate_simple(1, &length, nullptr), H5Sclose);
      if (H5Sselect_hyperslab(space, H5S_SELECT_SET, &begin, nullptr, &length, nullptr) < 0 ||
          H5Dread(set, H5T_NATIVE_DOUBLE, memory, space, H5P_DEFAULT, values.data_ptr<double>() + begin) < 0)
        corrupt(where, "cannot be read: " + reason());
    }
    if (!std::isfinite(values.sum().item<double>())) corrupt(where, "contains NaN or Inf");
    return values;
  }

  [[noreturn]] void corrupt(const std::string& where, const std::string& what) const {
    throw CorruptFile(name_, fmt::format("dataset {} {}", where, what), "run headfold calibrate again");
  }
  [[noreturn]] void wrong(const char* attribute, const std::string& what) const {
    throw CorruptFile(name_, fmt::format("attribute {} {}", attribute, what),
                      "is this a statistics file of headfold calibrate?");
  }

 private:
  /// Hard links only: another kind may lead to another file.
  void check_link(const std::string& where) const {
    H5L_info_t info{};
    if (H5Lexists(file_, where.c_str(), H5P_DEFAULT) <= 0) corrupt(where, "is missing");
    if (H5Lget_info(file_, where.c_str(), &info, H5P_DEFAULT) < 0 || info.type != H5L_TYPE_HARD)
      corrupt(where, "is a link to another place");
  }
  hid_t open(const fs::path& path) {
    silence();
    std::error_code code;
    if (!fs::exists(path, code)) throw IoError(name_, "there is no such file", "headfold calibrate makes one");
    if (!fs::is_regular_file(path, code)) throw IoError(name_, "is not a file");
    if (H5Fis_hdf5(path.c_str()) <= 0) {
      if (::access(path.c_str(), R_OK) != 0) throw IoError(name_, "cannot be read");
      throw CorruptFile(name_, "is not an HDF5 file", "give the .h5 file that headfold calibrate wrote");
    }
    size_ = fs::file_size(path, code);
    const Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
    return H5Fopen(path.c_str(), H5F_ACC_RDONLY, access);
  }
  Handle open_attribute(const char* name) const {
    if (!has_attribute(name)) wrong(name, "is missing");
    Handle attribute(H5Aopen(file_, name, H5P_DEFAULT), H5Aclose);
    if (!attribute.valid()) wrong(name, "cannot be opened: " + reason());
    const Handle space(H5Aget_space(attribute), H5Sclose);
    if (!space.valid() || H5Sget_simple_extent_npoints(space) != 1) wrong(name, "has several values");
    return attribute;
  }

  std::string name_;
  std::uintmax_t size_ = 0;
  Handle file_;
};

OrderedJson header_json(const StatisticsHeader& header) {
  OrderedJson json;
  json["format_version"] = header.format_version;
  json["model_hash"] = header.model_hash;
  json["data_hash"] = header.data_hash;
  json["family"] = header.family;
  json["layers"] = header.layers;
  json["hidden"] = header.hidden;
  json["kv_heads"] = header.kv_heads;
  json["head_dim"] = header.head_dim;
  json["samples"] = header.samples;
  json["sequence_length"] = header.sequence_length;
  json["seed"] = header.seed;
  json["dtype"] = header.dtype;
  json["options"] = header.options;
  json["has_rotated_keys"] = header.has_rotated_keys;
  if (header.format_version == 1) return json;
  json["has_halves"] = header.has_halves;
  json["has_attention"] = header.has_attention;
  json["heads"] = header.heads;
  json["attended_heads"] = header.attended_heads;
  if (header.format_version == 2) return json;
  json["has_values"] = header.has_values;
  return json;
}

}  // namespace

at::Tensor LayerStatistics::second_moment(double sink_weight) const {
  const double tokens = count + sink_weight * count_0;
  if (!(tokens > 0)) throw InputError("the statistics hold no token with the given sink weight");
  if (sink_weight == 0) return moment / tokens;
  return (moment + moment_0 * sink_weight) / tokens;
}

at::Tensor LayerStatistics::mean(double sink_weight) const {
  const double tokens = count + sink_weight * count_0;
  if (!(tokens > 0)) throw InputError("the statistics hold no token with the given sink weight");
  return (sum + sum_0 * sink_weight) / tokens;
}

double value_checksum(const at::Tensor& values) {
  const double* data = values.data_ptr<double>();
  std::uint64_t sum = 1, sums = 0;
  for (std::int64_t i = 0; i < values.numel(); ++i) {
    sum += std::bit_cast<std::uint64_t>(data[i]);
    sums += sum;
  }
  return static_cast<double>(((sum ^ std::rotl(sums, 32)) * 0x9E3779B97F4A7C15U) >> 11);
}

LayerStatistics LayerStatistics::half(int which) const {
  if (!has_halves()) throw InternalError("a half of statistics that keep no halves");
  if (which != 0 && which != 1) throw InternalError(fmt::format("half {} of two", which));
  LayerStatistics half;
  const auto part = [&](const at::Tensor& all, const at::Tensor& even) {
    return which == 0 || !all.defined() ? even : all - even;
  };
  half.count = which == 0 ? count_even : count - count_even;
  half.count_0 = which == 0 ? count_0_even : count_0 - count_0_even;
  half.sum = part(sum, sum_even);
  half.sum_0 = part(sum_0, sum_0_even);
  half.moment = part(moment, moment_even);
  half.moment_0 = part(moment_0, moment_0_even);
  half.rotated_keys = part(rotated_keys, rotated_keys_even);
  half.values = part(values, values_even);
  return half;
}

LayerStatistics PackedStatistics::full(bool packed) const {
  // Width of each of the packed matrices that follow one another.
  const auto width = [](const at::Tensor& lower, std::int64_t matrices) {
    const std::int64_t size = lower.numel() / matrices;
    return static_cast<std::int64_t>(std::lround((std::sqrt(8 * static_cast<double>(size) + 1) - 1) / 2));
  };
  const auto unpack = [&](const at::Tensor& lower) {
    return lower.defined() ? linalg::unpack_lower(lower, width(lower, 1)) : at::Tensor();
  };
  const auto unpack_or_leave = [&](const at::Tensor& lower) { return packed ? lower : unpack(lower); };
  const auto unpack_heads = [&](const at::Tensor& lower) {
    const std::int64_t n = width(lower, heads);
    at::Tensor all = at::empty({heads, n, n}, at::kDouble);
    for (std::int64_t head = 0; head < heads; ++head)
      all.select(0, head).copy_(
          linalg::unpack_lower(lower.narrow(0, head * linalg::packed_size(n), linalg::packed_size(n)), n));
    return all;
  };
  LayerStatistics all;
  all.count = count;
  all.count_0 = count_0;
  all.sum = sum;
  all.sum_0 = sum_0;
  all.moment = unpack(moment);
  all.moment_0 = unpack_or_leave(moment_0);
  all.rotated_keys = unpack_or_leave(rotated_keys);
  all.values = unpack_or_leave(values);
  all.count_even = count_even;
  all.count_0_even = count_0_even;
  all.sum_even = sum_even;
  all.sum_0_even = sum_0_even;
  all.moment_even = unpack(moment_even);
  all.moment_0_even = unpack_or_leave(moment_0_even);
  all.rotated_keys_even = unpack_or_leave(rotated_keys_even);
  all.values_even = unpack_or_leave(values_even);
  if (rotated_queries.defined()) {
    all.attention_count = attention_count;
    all.rotated_queries = unpack_heads(rotated_queries);
    all.distance_mass = distance_mass.view({heads, -1});
    all.attended_heads = attended_heads;
    if (attended.defined()) {
      all.attended = unpack_heads(attended);
      all.attended_sum = attended_sum.view({heads, -1});
    }
  }
  return all;
}

StatisticsShape StatisticsHeader::shape() const {
  StatisticsShape shape;
  shape.hidden = hidden;
  shape.key_width = has_rotated_keys ? key_width() : 0;
  shape.value_width = has_values ? key_width() : 0;
  shape.halves = has_halves;
  shape.attention = has_attention;
  shape.heads = heads;
  shape.kv_heads = kv_heads;
  shape.head_dim = head_dim;
  shape.attended_heads = attended_heads;
  shape.sequence_length = sequence_length;
  return shape;
}

StatisticsFile::StatisticsFile(const fs::path& path) : path_(path) {
  const Input input(path);
  if (!input.has_attribute("format") || input.text("format") != kFormat)
    throw CorruptFile(path.string(), "is an HDF5 file, but not a statistics file of headfold",
                      "give the file that headfold calibrate wrote");
  constexpr std::int64_t any = std::numeric_limits<std::int64_t>::max();
  header_.format_version = input.integer("format_version", 1, any);
  if (header_.format_version > kVersion)
    throw CorruptFile(
        path.string(),
        fmt::format("has format version {}, this build reads versions 1 to {}", header_.format_version, kVersion),
        "use the headfold that wrote it, or calibrate again");
  header_.headfold_version = input.text("headfold_version");
  header_.model_hash = input.text("model_hash");
  header_.data_hash = input.text("data_hash");
  header_.family = input.text("family");
  header_.layers = input.integer("layers", 1, kMostLayers);
  header_.hidden = input.integer("hidden", 1, kWidest);
  header_.kv_heads = input.integer("kv_heads", 1, kWidest);
  header_.head_dim = input.integer("head_dim", 1, kWidest / header_.kv_heads);
  header_.samples = input.integer("samples", 1, any);
  header_.sequence_length = input.integer("sequence_length", 2, any);
  header_.seed = input.integer("seed", 0, any);
  header_.dtype = input.text("dtype");
  header_.options = input.text("options");
  header_.has_rotated_keys = input.integer("has_rotated_keys", 0, 1) == 1;
  if (header_.format_version > 2) header_.has_values = input.integer("has_values", 0, 1) == 1;
  if (header_.format_version > 1) {
    header_.has_halves = input.integer("has_halves", 0, 1) == 1;
    header_.has_attention = input.integer("has_attention", 0, 1) == 1;
    if (header_.has_attention) {
      // The largest products below stay far from overflow, and read() allocates only what the file really holds.
      input.integer("sequence_length", 2, kWidest);
      header_.heads = input.integer("heads", 1, kWidest / header_.head_dim);
      header_.attended_heads = input.integer("attended_heads", 1, header_.kv_heads);
      if (header_.kv_heads % header_.attended_heads != 0)
        input.wrong("attended_heads",
                    fmt::format("is {}, which does not divide {} KV heads", header_.attended_heads, header_.kv_heads));
      if (header_.heads % header_.kv_heads != 0)
        input.wrong("heads", fmt::format("is {}, no multiple of {} KV heads", header_.heads, header_.kv_heads));
    }
  }
  for (std::int64_t layer = 0; layer < header_.layers; ++layer)
    for (const Dataset& dataset : datasets(header_.shape(), header_.format_version)) input.dataset(layer, dataset);
}

StatisticsFile::~StatisticsFile() = default;

LayerStatistics StatisticsFile::layer(std::int64_t index, const Selection& selection) const {
  const Timed timed(Work::read_statistics);
  if (index < 0 || index >= header_.layers)
    throw InputError(
        fmt::format("{} holds layers 0 to {}; layer {} was asked for", path_.string(), header_.layers - 1, index));
  const Input input(path_);
  const StatisticsShape shape = header_.shape();
  const auto complain = [&](const std::string& name, const std::string& what) {
    input.corrupt(group_name(index) + "/" + name, what);
  };
  PackedStatistics packed;
  packed.heads = shape.heads;
  packed.attended_heads = shape.attended_heads;
  at::Tensor traces, checksums;
  for (const Dataset& dataset : datasets(shape, header_.format_version)) {
    const bool attended = dataset.name == "attended" || dataset.name == "attended_sum";
    if ((dataset.part == Part::halves && !selection.halves) ||
        (dataset.part == Part::attention && !selection.attention) || (attended && !selection.attended) ||
        (dataset.name.starts_with("rotated_keys") && !selection.rotated_keys) ||
        (dataset.name.starts_with("values") && !selection.values) ||
        ((dataset.name == "moment" || dataset.name == "moment_even") && !selection.moment) ||
        (dataset.name.starts_with("moment_0") && !selection.moment_0))
      continue;
    const at::Tensor values = input.read(index, dataset);
    const double* value = values.data_ptr<double>();
    if (dataset.tensor != nullptr) {
      packed.*dataset.tensor = values;
    } else if (dataset.name == "checksums") {
      checksums = values;
    } else if (dataset.name == "traces") {
      traces = values;
    } else if (dataset.name == "count") {
      packed.count = value[0];
      packed.count_0 = value[1];
      if (packed.count < 0 || packed.count_0 < 0 || packed.count + packed.count_0 <= 0 ||
          packed.count != std::floor(packed.count) || packed.count_0 != std::floor(packed.count_0))
        complain("count", fmt::format("holds {} and {} tokens", packed.count, packed.count_0));
    } else if (dataset.name == "count_even") {
      packed.count_even = value[0];
      packed.count_0_even = value[1];
      if (packed.count_even < 0 || packed.count_even > packed.count || packed.count_0_even < 0 ||
          packed.count_0_even > packed.count_0)
        complain("count_even", fmt::format("holds {} and {} tokens of {} and {}", packed.count_even,
                                           packed.count_0_even, packed.count, packed.count_0));
    } else if (dataset.name == "attention_count") {
      packed.attention_count = value[0];
      if (packed.attention_count <= 0) complain("attention_count", fmt::format("holds {} tokens", value[0]));
    }
  }
  // The traces are stored apart: before version 3 they alone could tell a damaged matrix.
  for (const Dataset& dataset : datasets(shape, header_.format_version)) {
    if (dataset.trace < 0 || !(packed.*dataset.tensor).defined()) continue;
    const double found = trace(packed.*dataset.tensor, dataset.matrix);
    const double stored = traces.data_ptr<double>()[dataset.trace];
    if (std::abs(found - stored) > 1e-9 * std::abs(stored))
      complain(dataset.name, fmt::format("has {} {:.12g}, recorded is {:.12g}", dataset.matrix == 1 ? "sum" : "trace",
                                         found, stored));
  }
  if (packed.distance_mass.defined()) {
    // Every row of attention is a distribution.
    const double expected = packed.attention_count * static_cast<double>(packed.heads);
    const double found = packed.distance_mass.sum().item<double>();
    if (packed.distance_mass.min().item<double>() < 0 || std::abs(found - expected) > 0.02 * expected)
      complain("distance_mass", fmt::format("is no attention of {} heads: its sum is {:.6g}, expected {:.6g}",
                                            packed.heads, found, expected));
  }
  if (checksums.defined()) {
    const double* recorded = checksums.data_ptr<double>();
    for (const Dataset& dataset : datasets(shape, header_.format_version)) {
      if (dataset.tensor == nullptr) continue;
      const double expected = *recorded++;
      const at::Tensor& values = packed.*dataset.tensor;
      if (values.defined() && value_checksum(values) != expected)
        complain(dataset.name, "is not what calibrate wrote: its checksum differs");
    }
  }
  const Timed unpacking(Work::moments);
  return packed.full(selection.packed);
}

std::string StatisticsFile::content_hash() const {
  Sha256 hash;
  hash.update(header_json(header_).dump());
  const Input input(path_);
  for (std::int64_t layer = 0; layer < header_.layers; ++layer) {
    for (const Dataset& dataset : datasets(header_.shape(), header_.format_version)) {
      // Checksums tell bits apart that another number of ranks rounds otherwise.
      if (dataset.tensor != nullptr || dataset.name == "checksums") continue;
      const at::Tensor values = input.read(layer, dataset);
      for (std::int64_t i = 0; i < dataset.size; ++i) hash.update(fmt::format("{:.8e};", values.data_ptr<double>()[i]));
    }
  }
  return hash.hex();
}

std::uint64_t layer_statistics_bytes(const StatisticsShape& shape) {
  std::uint64_t values = 0;
  for (const Dataset& dataset : datasets(shape)) values += static_cast<std::uint64_t>(dataset.size);
  return values * sizeof(double);
}

std::uint64_t statistics_file_bytes(const StatisticsHeader& header) {
  return static_cast<std::uint64_t>(header.layers) * layer_statistics_bytes(header.shape());
}

void write_statistics(const fs::path& path, const StatisticsHeader& header, const comm::Communicator& world,
                      const std::vector<OwnedLayer>& own) {
  silence();
  const StatisticsShape shape = header.shape();
  const std::vector<Dataset> wanted = datasets(shape);
  std::vector<std::int64_t> owners(static_cast<std::size_t>(header.layers), 0);
  for (const OwnedLayer& layer : own) {
    ++owners.at(static_cast<std::size_t>(layer.layer));
    const PackedStatistics& part = *layer.statistics;
    bool fits = part.rotated_keys.defined() == header.has_rotated_keys && part.values.defined() == header.has_values &&
                part.moment_even.defined() == header.has_halves && part.attended.defined() == header.has_attention;
    for (const Dataset& dataset : wanted)
      if (dataset.tensor != nullptr)
        fits = fits && (part.*dataset.tensor).defined() && (part.*dataset.tensor).numel() == dataset.size;
    if (!fits)
      throw InternalError(
          fmt::format("the statistics of layer {} do not have the shapes of their header", layer.layer));
  }
  world.all_reduce(std::span(owners));
  for (std::size_t layer = 0; layer < owners.size(); ++layer)
    if (owners[layer] != 1)
      throw InternalError(fmt::format("{} ranks want to write the statistics of layer {}", owners[layer], layer));

  const fs::path temporary = path.string() + ".tmp";
  world.on_root([&] {
    if (path.has_parent_path()) make_folder(path.parent_path());
    const std::uint64_t needed = statistics_file_bytes(header);
    const std::uint64_t there = free_bytes(path);
    if (there < needed)
      throw IoError(path.string(),
                    fmt::format("needs {}, but only {} are free", human_bytes(static_cast<double>(needed)),
                                human_bytes(static_cast<double>(there))),
                    "choose another --out");
  });
  try {
    Writer writer(temporary, world);
    writer.text("format", kFormat);
    writer.integer("format_version", kVersion);
    writer.text("headfold_version", header.headfold_version);
    writer.text("model_hash", header.model_hash);
    writer.text("data_hash", header.data_hash);
    writer.text("family", header.family);
    writer.integer("layers", header.layers);
    writer.integer("hidden", header.hidden);
    writer.integer("kv_heads", header.kv_heads);
    writer.integer("head_dim", header.head_dim);
    writer.integer("samples", header.samples);
    writer.integer("sequence_length", header.sequence_length);
    writer.integer("seed", header.seed);
    writer.text("dtype", header.dtype);
    writer.text("options", header.options);
    writer.integer("has_rotated_keys", header.has_rotated_keys ? 1 : 0);
    writer.integer("has_values", header.has_values ? 1 : 0);
    writer.integer("has_halves", header.has_halves ? 1 : 0);
    writer.integer("has_attention", header.has_attention ? 1 : 0);
    writer.integer("heads", header.heads);
    writer.integer("attended_heads", header.attended_heads);
    writer.create(header);
    for (const OwnedLayer& layer : own) {
      const PackedStatistics& part = *layer.statistics;
      for (const Dataset& dataset : wanted) {
        if (dataset.tensor != nullptr) {
          const at::Tensor& values = part.*dataset.tensor;
          writer.write(layer.layer, dataset.name, values.data_ptr<double>(), values.numel());
        } else {
          const std::vector<double> values = numbers(part, shape, dataset.name);
          writer.write(layer.layer, dataset.name, values.data(), dataset.size);
        }
      }
    }
    writer.close();
  } catch (...) {
    std::error_code code;
    if (world.root()) fs::remove(temporary, code);
    throw;
  }
  world.on_root([&] { publish(temporary, path); });
}

}  // namespace headfold::calibration
