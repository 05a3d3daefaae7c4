#include <headfold/base/error.h>
#include <headfold/base/hash.h>
#include <headfold/checkpoint/safetensors.h>
#include <headfold/finetune/training_state.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>

namespace headfold::finetune {
namespace {

constexpr const char* kFormat = "headfold-training-state";
constexpr std::int64_t kVersion = 1;
constexpr const char* kStateHint = "remove this checkpoint; the same command then resumes from the one before";

}  // namespace

OrderedJson to_json(const TrainState& state) {
  OrderedJson json;
  json["step"] = state.step;
  json["tokens"] = state.tokens;
  json["seconds"] = state.seconds;
  json["best_step"] = state.best_step;
  json["best_loss"] = state.best_loss;
  json["worse"] = state.worse;
  json["first_validation"] = state.first_validation;
  json["last_validation"] = state.last_validation;
  json["first_divergence"] = state.first_divergence;
  json["last_divergence"] = state.last_divergence;
  json["last_loss"] = state.last_loss;
  json["early"] = state.early;
  return json;
}

TrainState state_from(const Json& json, const std::string& file) {
  if (!json.is_object()) throw CorruptFile(file, "\"state\" is no JSON object", kStateHint);
  TrainState state;
  const auto count = [&](const char* key, std::int64_t least) {
    const auto value = required<std::int64_t>(json, key, file);
    if (value < least || value > (std::int64_t{1} << 60))
      throw CorruptFile(file, fmt::format("\"{}\" is {}, expected at least {}", key, value, least), kStateHint);
    return value;
  };
  const auto number = [&](const char* key) {
    const auto value = required<double>(json, key, file);
    if (!std::isfinite(value)) throw CorruptFile(file, fmt::format("\"{}\" is {}", key, value), kStateHint);
    return value;
  };
  state.step = count("step", 0);
  state.tokens = count("tokens", 0);
  state.seconds = number("seconds");
  state.best_step = count("best_step", -1);
  state.best_loss = number("best_loss");
  state.worse = count("worse", 0);
  state.first_validation = number("first_validation");
  state.last_validation = number("last_validation");
  state.first_divergence = number("first_divergence");
  state.last_divergence = number("last_divergence");
  state.last_loss = number("last_loss");
  state.early = required<bool>(json, "early", file);
  if (state.best_step > state.step)
    throw CorruptFile(file, fmt::format("\"best_step\" is {} after {} steps", state.best_step, state.step), kStateHint);
  if (state.seconds < 0) throw CorruptFile(file, fmt::format("\"seconds\" is {}", state.seconds), kStateHint);
  return state;
}

OrderedJson to_json(const StoredState& stored) {
  OrderedJson json;
  json["format"] = kFormat;
  json["format_version"] = kVersion;
  json["state"] = to_json(stored.state);
  json["adam_steps"] = stored.adam_steps;
  json["identity"] = stored.identity;
  json["identity_sha256"] = sha256_hex(stored.identity.dump());
  return json;
}

StoredState read_state(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / "state.json";
  const std::string file = path.string();
  const Json json = read_json(path, std::uint64_t{64} << 20);
  if (!json.is_object()) throw CorruptFile(file, "is no JSON object", kStateHint);
  if (const auto format = json.find("format"); format == json.end() || *format != kFormat)
    throw CorruptFile(file, "is no training state of headfold", kStateHint);
  if (const auto version = json.find("format_version"); version == json.end() || *version != kVersion)
    throw CorruptFile(file,
                      fmt::format("format_version is {}, this headfold reads {}",
                                  version == json.end() ? "missing" : version->dump().substr(0, 40), kVersion),
                      kStateHint);
  StoredState stored;
  try {
    stored.state = state_from(required<Json>(json, "state", file), file);
    stored.adam_steps = required<std::int64_t>(json, "adam_steps", file);
  } catch (const InputError& error) {  // a key that is missing or of another type: headfold wrote none like it
    const std::string text = error.what();
    throw CorruptFile(file, text.starts_with(file + ": ") ? text.substr(file.size() + 2) : text, kStateHint);
  }
  if (stored.adam_steps != stored.state.step)
    throw CorruptFile(
        file, fmt::format("\"adam_steps\" is {} after {} steps of training", stored.adam_steps, stored.state.step),
        kStateHint);
  stored.identity = json.value("identity", Json());
  // A damaged identity would look like another training, which ends the job instead of giving way to the state before.
  if (const auto sum = json.find("identity_sha256"); sum != json.end() && *sum != sha256_hex(stored.identity.dump()))
    throw CorruptFile(file, "\"identity\" does not agree with its checksum", kStateHint);
  return stored;
}

TensorSource stored_tensors(const std::filesystem::path& file, const std::vector<Parameter>& parameters, bool squares) {
  const auto stored = std::make_shared<const checkpoint::SafetensorsFile>(file);
  const std::string path = file.string();
  for (const Parameter& parameter : parameters) {
    if (!stored->has(parameter.name))
      throw CorruptFile(path, fmt::format("tensor {} is missing", parameter.name), kStateHint);
    const checkpoint::TensorInfo& info = stored->info(parameter.name);
    if (info.dtype != "F32" || info.shape != parameter.value.sizes().vec())
      throw CorruptFile(
          path,
          fmt::format("tensor {} is {} {}, expected F32 {}", parameter.name, info.dtype,
                      checkpoint::shape_text(info.shape), checkpoint::shape_text(parameter.value.sizes().vec())),
          kStateHint);
    const at::Tensor flat = stored->view(parameter.name).reshape({-1});
    constexpr std::int64_t kPiece = std::int64_t{1} << 22;
    for (std::int64_t begin = 0; begin < flat.numel(); begin += kPiece) {
      const at::Tensor piece = flat.slice(0, begin, std::min(flat.numel(), begin + kPiece));
      const char* wrong = !at::isfinite(piece).all().item<bool>()       ? "that are not finite"
                          : squares && piece.min().item<float>() < 0.0F ? "below 0"
                                                                        : nullptr;
      if (wrong != nullptr)
        throw CorruptFile(path, fmt::format("tensor {} holds values {}", parameter.name, wrong), kStateHint);
      stored->map().done_with(info.begin, info.end);
    }
  }
  for (const auto& [name, info] : stored->tensors())
    if (std::none_of(parameters.begin(), parameters.end(),
                     [&, &wanted = name](const Parameter& p) { return p.name == wanted; }))
      throw CorruptFile(path, fmt::format("tensor {} belongs to nothing that is trained", name), kStateHint);
  auto last = std::make_shared<std::string>();
  return [stored, last](const std::string& name) {
    if (!last->empty()) stored->map().done_with(stored->info(*last).begin, stored->info(*last).end);
    if (!stored->has(name)) return at::Tensor();
    *last = name;
    return stored->view(name);
  };
}

}  // namespace headfold::finetune
