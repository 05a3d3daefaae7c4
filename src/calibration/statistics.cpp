#include <fmt/ranges.h>
#include <hdf5.h>
#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/base/hash.h>
#include <headfold/base/json.h>
#include <headfold/base/log.h>
#include <headfold/calibration/statistics.h>
#include <headfold/linalg/linalg.h>
#include <unistd.h>

#include <array>
#include <limits>
#include <utility>

namespace headfold::calibration {
namespace {

constexpr const char* kFormat = "headfold-statistics";
constexpr std::int64_t kVersion = 1;
constexpr hsize_t kPiece = hsize_t{1} << 27;     // doubles per transfer: 1 GiB, below the 2^31 bytes of MPI-IO counts
constexpr std::size_t kLongestText = 60 * 1024;  // an attribute must fit an object header
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

/// Datasets of a layer: name and number of float64 values.
struct Dataset {
  std::string name;
  std::int64_t size;
};
std::vector<Dataset> datasets(const StatisticsHeader& header) {
  const std::int64_t packed = linalg::packed_size(header.hidden);
  std::vector<Dataset> all{{"count", 2},       {"traces", 3},       {"sum", header.hidden}, {"sum_0", header.hidden},
                           {"moment", packed}, {"moment_0", packed}};
  if (header.has_rotated_keys) all.push_back({"rotated_keys", linalg::packed_size(header.key_width())});
  return all;
}

/// Sum of the diagonal of a packed lower triangle; 0 when undefined.
double trace(const at::Tensor& packed, std::int64_t n) {
  if (!packed.defined()) return 0;
  double sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += packed.data_ptr<double>()[i * (i + 1) / 2 + i];
  return sum;
}

// ----------------------------------------------------------------------------------------------------------
// Writing
// ----------------------------------------------------------------------------------------------------------

class Writer {
 public:
  Writer(const fs::path& path, const comm::Communicator& world)
      : file_name_(path.string()), access_(H5Pcreate(H5P_FILE_ACCESS), H5Pclose), file_(open(path, world), H5Fclose) {
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
    const Handle properties(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
    // Space is taken at once and not filled: every value is written by its owner.
    H5Pset_alloc_time(properties, H5D_ALLOC_TIME_EARLY);
    H5Pset_fill_time(properties, H5D_FILL_TIME_NEVER);
    for (std::int64_t layer = 0; layer < header.layers; ++layer) {
      const Handle group(H5Gcreate2(file_, group_name(layer).c_str(), H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT), H5Gclose);
      if (!group.valid()) fail("a group cannot be created");
      for (const Dataset& dataset : datasets(header)) {
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
    if (file_.close() < 0) fail("cannot be closed");
  }

 private:
  hid_t open(const fs::path& path, const comm::Communicator& world) {
    // Newest layout that the 1.10 line shares: compact groups, and a superblock that notices truncation.
    H5Pset_libver_bounds(access_, H5F_LIBVER_V18, H5F_LIBVER_LATEST);
    if (world.mpi_comm() != nullptr)
      H5Pset_fapl_mpio(access_, *static_cast<const MPI_Comm*>(world.mpi_comm()), MPI_INFO_NULL);
    return H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, access_);
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
    if (H5Lexists(file_, group_name(layer).c_str(), H5P_DEFAULT) <= 0) corrupt(group_name(layer), "is missing");
    if (H5Lexists(file_, where.c_str(), H5P_DEFAULT) <= 0) corrupt(where, "is missing");
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
    // No external files, and no space that is merely promised.
    if (!properties.valid() || H5Pget_external_count(properties) != 0 ||
        H5Dget_storage_size(set) < size * sizeof(double))
      corrupt(where, "is not stored in the file");
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
  hid_t open(const fs::path& path) const {
    silence();
    std::error_code code;
    if (!fs::exists(path, code)) throw IoError(name_, "there is no such file", "headfold calibrate makes one");
    if (!fs::is_regular_file(path, code)) throw IoError(name_, "is not a file");
    if (H5Fis_hdf5(path.c_str()) <= 0) {
      if (::access(path.c_str(), R_OK) != 0) throw IoError(name_, "cannot be read");
      throw CorruptFile(name_, "is not an HDF5 file", "give the .h5 file that headfold calibrate wrote");
    }
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

LayerStatistics PackedStatistics::full() const {
  const std::int64_t hidden = sum.numel();
  LayerStatistics all;
  all.count = count;
  all.count_0 = count_0;
  all.sum = sum;
  all.sum_0 = sum_0;
  all.moment = linalg::unpack_lower(moment, hidden);
  all.moment_0 = linalg::unpack_lower(moment_0, hidden);
  if (rotated_keys.defined()) {
    auto width =
        static_cast<std::int64_t>((std::sqrt(8.0 * static_cast<double>(rotated_keys.numel()) + 1) - 1) / 2 + 0.5);
    all.rotated_keys = linalg::unpack_lower(rotated_keys, width);
  }
  return all;
}

StatisticsFile::StatisticsFile(const fs::path& path) : path_(path) {
  const Input input(path);
  if (!input.has_attribute("format") || input.text("format") != kFormat)
    throw CorruptFile(path.string(), "is an HDF5 file, but not a statistics file of headfold",
                      "give the file that headfold calibrate wrote");
  constexpr std::int64_t any = std::numeric_limits<std::int64_t>::max();
  header_.format_version = input.integer("format_version", 1, any);
  if (header_.format_version != kVersion)
    throw CorruptFile(
        path.string(),
        fmt::format("has format version {}, this build reads version {}", header_.format_version, kVersion),
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
  for (std::int64_t layer = 0; layer < header_.layers; ++layer)
    for (const Dataset& dataset : datasets(header_)) input.dataset(layer, dataset);
}

StatisticsFile::~StatisticsFile() = default;

LayerStatistics StatisticsFile::layer(std::int64_t index) const {
  if (index < 0 || index >= header_.layers)
    throw InputError(
        fmt::format("{} holds layers 0 to {}; layer {} was asked for", path_.string(), header_.layers - 1, index));
  const Input input(path_);
  PackedStatistics packed;
  at::Tensor traces;
  for (const Dataset& dataset : datasets(header_)) {
    const at::Tensor values = input.read(index, dataset);
    if (dataset.name == "count") {
      packed.count = values.data_ptr<double>()[0];
      packed.count_0 = values.data_ptr<double>()[1];
      if (packed.count < 0 || packed.count_0 < 0 || packed.count + packed.count_0 <= 0)
        input.corrupt(group_name(index) + "/count",
                      fmt::format("holds {} and {} tokens", packed.count, packed.count_0));
    }
    if (dataset.name == "traces") traces = values;
    if (dataset.name == "sum") packed.sum = values;
    if (dataset.name == "sum_0") packed.sum_0 = values;
    if (dataset.name == "moment") packed.moment = values;
    if (dataset.name == "moment_0") packed.moment_0 = values;
    if (dataset.name == "rotated_keys") packed.rotated_keys = values;
  }
  // The traces are stored apart: a flipped or unwritten block of a matrix contradicts them.
  const std::array<double, 3> found{trace(packed.moment, header_.hidden), trace(packed.moment_0, header_.hidden),
                                    trace(packed.rotated_keys, header_.key_width())};
  const std::array<const char*, 3> names{"moment", "moment_0", "rotated_keys"};
  for (std::size_t i = 0; i < 3; ++i) {
    const double stored = traces.data_ptr<double>()[i];
    if (std::abs(found[i] - stored) > 1e-9 * std::abs(stored))
      input.corrupt(group_name(index) + "/" + names[i],
                    fmt::format("has trace {:.12g}, recorded is {:.12g}", found[i], stored));
  }
  return packed.full();
}

std::string StatisticsFile::content_hash() const {
  Sha256 hash;
  hash.update(header_json(header_).dump());
  const Input input(path_);
  for (std::int64_t layer = 0; layer < header_.layers; ++layer) {
    for (const Dataset& dataset : {Dataset{"count", 2}, Dataset{"traces", 3}}) {
      const at::Tensor values = input.read(layer, dataset);
      for (std::int64_t i = 0; i < dataset.size; ++i) hash.update(fmt::format("{:.8e};", values.data_ptr<double>()[i]));
    }
  }
  return hash.hex();
}

std::uint64_t layer_statistics_bytes(std::int64_t hidden, std::int64_t key_width, bool rotated_keys) {
  const std::int64_t values =
      5 + 2 * hidden + 2 * linalg::packed_size(hidden) + (rotated_keys ? linalg::packed_size(key_width) : 0);
  return static_cast<std::uint64_t>(values) * sizeof(double);
}

std::uint64_t statistics_file_bytes(const StatisticsHeader& header) {
  return static_cast<std::uint64_t>(header.layers) *
         layer_statistics_bytes(header.hidden, header.key_width(), header.has_rotated_keys);
}

void write_statistics(const fs::path& path, const StatisticsHeader& header, const comm::Communicator& world,
                      const std::vector<OwnedLayer>& own) {
  silence();
  std::vector<std::int64_t> owners(static_cast<std::size_t>(header.layers), 0);
  for (const OwnedLayer& layer : own) {
    ++owners.at(static_cast<std::size_t>(layer.layer));
    const PackedStatistics& part = *layer.statistics;
    if (part.sum.numel() != header.hidden || part.moment.numel() != linalg::packed_size(header.hidden) ||
        part.rotated_keys.defined() != header.has_rotated_keys ||
        (header.has_rotated_keys && part.rotated_keys.numel() != linalg::packed_size(header.key_width())))
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
    writer.create(header);
    for (const OwnedLayer& layer : own) {
      const PackedStatistics& part = *layer.statistics;
      const std::array<double, 2> counts{part.count, part.count_0};
      const std::array<double, 3> traces{trace(part.moment, header.hidden), trace(part.moment_0, header.hidden),
                                         trace(part.rotated_keys, header.key_width())};
      writer.write(layer.layer, "count", counts.data(), 2);
      writer.write(layer.layer, "traces", traces.data(), 3);
      const auto tensor = [&](const char* name, const at::Tensor& values) {
        writer.write(layer.layer, name, values.data_ptr<double>(), values.numel());
      };
      tensor("sum", part.sum);
      tensor("sum_0", part.sum_0);
      tensor("moment", part.moment);
      tensor("moment_0", part.moment_0);
      if (header.has_rotated_keys) tensor("rotated_keys", part.rotated_keys);
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
