#include <headfold/base/error.h>
#include <headfold/scale/rates.h>

#include <cmath>

namespace headfold::scale {
namespace {

constexpr const char* kFormat = "headfold-rates";
constexpr double kLeast = 1e-12, kMost = 1e24;  // of a figure: what is beyond makes seconds infinite or nothing

/// Stated by the makers' data sheets: dense matrix products, no sparsity; links per direction. `share`: what is taken
/// to be attainable of a stated figure; these shares are assumptions. `fold`, `eigen` and `host_memory` are of the
/// host, where conversions and the optimiser of `finetune --full` run: of a rank with a few cores of its node (one core
/// of an AMD EPYC, Zen 3, has been measured at 4.8e9 and 1.5e10 FLOP/s).
const char* const kSheets = R"json({
  "a100": {"name": "NVIDIA A100 SXM 80 GB", "source": "NVIDIA A100 Tensor Core GPU data sheet (2021); HDR InfiniBand, one 200 Gb/s port per GPU",
    "memory_bytes": 80e9, "memory": 2039e9, "product.bfloat16": 312e12, "product.float32": 19.5e12,
    "inside": 300e9, "host_link": 32e9, "network": 25e9},
  "h100": {"name": "NVIDIA H100 SXM 80 GB", "source": "NVIDIA H100 Tensor Core GPU data sheet (2023); NDR InfiniBand, one 400 Gb/s port per GPU",
    "memory_bytes": 80e9, "memory": 3350e9, "product.bfloat16": 989e12, "product.float32": 67e12,
    "inside": 450e9, "host_link": 64e9, "network": 50e9},
  "h200": {"name": "NVIDIA H200 SXM 141 GB", "source": "NVIDIA H200 Tensor Core GPU data sheet (2024); NDR InfiniBand, one 400 Gb/s port per GPU",
    "memory_bytes": 141e9, "memory": 4800e9, "product.bfloat16": 989e12, "product.float32": 67e12,
    "inside": 450e9, "host_link": 64e9, "network": 50e9},
  "share": {"product.bfloat16": 0.6, "product.float32": 0.8, "attention": 0.3, "gram": 0.4, "attention_statistics": 0.2, "head": 0.5,
    "element_wise": 0.7, "memory": 0.85, "inside": 0.8, "network": 0.8, "host_link": 0.8},
  "assumed": {"node_memory_bytes": 1e12, "fold": 2e10, "eigen": 4e10, "host_memory": 2e10, "storage": 5e9, "inside_latency": 1e-5, "network_latency": 2e-5, "job": 5.0, "text": 1e7,
    "training": 1.15}
})json";

double stated(const Json& device, const std::string& key) {
  return device.at(key).get<double>();
}

}  // namespace

const Figure& Rates::at(const std::string& name) const {
  const auto found = figures.find(name);
  if (found != figures.end()) return found->second;
  throw UsageError(fmt::format("{}: there is no figure \"{}\"", file.empty() ? device : file, name),
                   name.ends_with("bfloat16") || name.ends_with("float32")
                       ? fmt::format("headfold bench --dtype {} measures it", name.substr(name.rfind('.') + 1))
                       : "headfold bench measures it, of conversions on shapes with KV heads to fold; those of links "
                         "under mpirun -np 2");
}

std::string Rates::of(const std::string& name, at::ScalarType dtype) {
  return name + (dtype == at::kFloat ? ".float32" : ".bfloat16");
}

const Json& sheets() {
  static const Json all = Json::parse(kSheets);
  return all;
}

std::vector<std::string> sheet_names() {
  std::vector<std::string> names;
  for (const auto& [name, sheet] : sheets().items())
    if (sheet.contains("name")) names.push_back(name);
  return names;
}

std::string unit_of(const std::string& name) {
  static const std::map<std::string, std::string> units = {{"product", "FLOP/s"},
                                                           {"attention", "FLOP/s"},
                                                           {"element_wise", "B/s"},
                                                           {"gram", "FLOP/s"},
                                                           {"attention_statistics", "FLOP/s"},
                                                           {"sums", "B/s"},
                                                           {"head", "FLOP/s"},
                                                           {"training", "x"},
                                                           {"load", "B/s"},
                                                           {"fold", "FLOP/s"},
                                                           {"eigen", "FLOP/s"},
                                                           {"memory", "B/s"},
                                                           {"host_memory", "B/s"},
                                                           {"read", "B/s"},
                                                           {"copy", "B/s"},
                                                           {"write", "B/s"},
                                                           {"statistics", "B/s"},
                                                           {"inside", "B/s"},
                                                           {"network", "B/s"},
                                                           {"inside_latency", "s"},
                                                           {"network_latency", "s"},
                                                           {"all_reduce_inside", "B/s"},
                                                           {"all_reduce_network", "B/s"},
                                                           {"storage", "B/s"},
                                                           {"job", "s"},
                                                           {"text", "B/s"}};
  std::string stem = name;
  for (const char* dtype : {".float32", ".bfloat16"})
    if (stem.ends_with(dtype)) stem = stem.substr(0, stem.size() - std::string(dtype).size());
  const auto found = units.find(stem);
  if (found == units.end()) return {};
  static const std::vector<std::string> typed = {"product", "attention", "element_wise", "gram", "attention_statistics",
                                                 "head",    "training",  "load"};
  const bool needs_dtype = std::find(typed.begin(), typed.end(), stem) != typed.end();
  return needs_dtype == (stem != name) ? found->second : std::string();
}

Rates sheet_rates(const std::string& device) {
  const std::vector<std::string> names = sheet_names();
  if (std::find(names.begin(), names.end(), device) == names.end())
    throw UsageError(fmt::format("--gpu {}: choose cpu, {}", device, fmt::join(names, ", ")));
  const Json& sheet = sheets().at(device);
  const Json& share = sheets().at("share");
  const Json& assumed = sheets().at("assumed");
  Rates rates;
  rates.device = device;
  rates.device_memory = stated(sheet, "memory_bytes");
  rates.node_memory = stated(assumed, "node_memory_bytes");
  const auto put = [&](const std::string& name, const std::string& key, const std::string& share_key) {
    const double part = stated(share, share_key);
    rates.figures[name] = {part * stated(sheet, key), unit_of(name), fmt::format("data sheet x {:.2f}", part)};
  };
  for (const std::string dtype : {".float32", ".bfloat16"}) {
    put("product" + dtype, "product" + dtype, "product" + dtype);
    for (const char* name : {"attention", "gram", "attention_statistics", "head"})
      put(name + dtype, "product" + dtype, name);
    put("element_wise" + dtype, "memory", "element_wise");
    put("load" + dtype, "host_link", "host_link");
    rates.figures["training" + dtype] = {stated(assumed, "training"), "x", "assumed"};
  }
  put("memory", "memory", "memory");
  put("inside", "inside", "inside");
  put("network", "network", "network");
  for (const char* name : {"read", "copy", "write", "statistics"})
    rates.figures[name] = {stated(assumed, "storage"), "B/s", "assumed"};
  for (const char* name :
       {"fold", "eigen", "host_memory", "storage", "inside_latency", "network_latency", "job", "text"})
    rates.figures[name] = {stated(assumed, name), unit_of(name), "assumed"};
  return rates;
}

Rates read_rates(const std::filesystem::path& path) {
  const std::string file = path.string();
  const Json json = read_json(path, std::uint64_t{1} << 24);
  if (!json.is_object() || optional<std::string>(json, "format", "", file) != kFormat)
    throw InputError(fmt::format("{}: is no file of rates (key \"format\")", file), "headfold bench --out writes one");
  if (const auto version = required<std::int64_t>(json, "format_version", file); version != 1)
    throw InputError(fmt::format("{}: key \"format_version\" is {}, this program reads 1", file, version));
  Rates rates;
  rates.file = file;
  rates.device = required<std::string>(json, "device", file);
  const std::vector<std::string> known = sheet_names();
  if (rates.device != "cpu") {
    if (std::find(known.begin(), known.end(), rates.device) == known.end())
      throw InputError(fmt::format("{}: key \"device\" is \"{}\": cpu, {} are known", file, rates.device.substr(0, 40),
                                   fmt::join(known, ", ")));
    rates = sheet_rates(rates.device);  // what was not measured
    rates.file = file;
  }
  const auto count = [&](const char* key, std::int64_t most) {
    const auto value = required<std::int64_t>(json, key, file);
    if (value < 1 || value > most)
      throw InputError(fmt::format("{}: key \"{}\" is {}: from 1 to {}", file, key, value, most));
    return static_cast<int>(value);
  };
  rates.threads = count("threads", 65536);
  const int cores = count("cores", 65536);
  if (rates.device == "cpu") rates.cores = cores;
  const auto memory = required<double>(json, "node_memory_bytes", file);
  if (!(memory > 0) || !std::isfinite(memory))
    throw InputError(fmt::format("{}: key \"node_memory_bytes\" is {}: above 0", file, memory));
  rates.node_memory = memory;
  const auto figures = json.find("figures");
  if (figures == json.end() || !figures->is_object() || figures->empty())
    throw InputError(fmt::format("{}: key \"figures\" is missing or no object", file));
  for (const auto& [name, figure] : figures->items()) {
    const std::string unit = unit_of(name);
    if (unit.empty())
      throw InputError(
          fmt::format("{}: figures.\"{}\" is no figure that a prediction knows", file, name.substr(0, 60)));
    const std::string where = fmt::format("{}: figures.\"{}\"", file, name);
    if (!figure.is_object()) throw InputError(where + " is no object with value and unit");
    const auto value = required<double>(figure, "value", where);
    if (!(value >= kLeast && value <= kMost))
      throw InputError(fmt::format("{}: value {:g} is not from {:g} to {:g}", where, value, kLeast, kMost));
    if (const auto stored = required<std::string>(figure, "unit", where); stored != unit)
      throw InputError(fmt::format("{}: unit \"{}\", {} is expected", where, stored.substr(0, 20), unit));
    rates.figures[name] = {value, unit, "measured"};
  }
  return rates;
}

OrderedJson to_json(const Rates& rates, const OrderedJson& facts) {
  OrderedJson json;
  json["format"] = kFormat;
  json["format_version"] = 1;
  json["device"] = rates.device;
  json["cores"] = rates.cores;
  json["threads"] = rates.threads;
  json["node_memory_bytes"] = rates.node_memory;
  for (const auto& [key, value] : facts.items()) json[key] = value;
  json["figures"] = OrderedJson::object();
  for (const auto& [name, figure] : rates.figures) {
    json["figures"][name]["value"] = figure.value;
    json["figures"][name]["unit"] = figure.unit;
  }
  return json;
}

}  // namespace headfold::scale
