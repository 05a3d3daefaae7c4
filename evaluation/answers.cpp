#include <headfold/base/files.h>
#include <headfold/base/hash.h>
#include <headfold/evaluation/answers.h>
#include <spdlog/spdlog.h>

#include <algorithm>

namespace headfold::evaluation {
namespace {

constexpr const char* kFormat = "headfold-answers";
constexpr std::int64_t kVersion = 1;

std::string dump(const OrderedJson& value) {
  return value.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

OrderedJson to_json(const std::string& key, const Answer& answer) {
  return {{"key", key},
          {"log_likelihood", answer.log_likelihood},
          {"greedy", answer.greedy},
          {"scored_tokens", answer.scored_tokens},
          {"context_tokens", answer.context_tokens},
          {"text", answer.text}};
}

/// The lines of a shard's text after its first; CorruptFile or InputError when they are not what the first line says.
std::vector<std::string> answer_lines(const std::string& text, const std::string& file, const std::string& identity) {
  const std::size_t newline = text.find('\n');
  if (newline == std::string::npos) throw CorruptFile(file, "has no line");
  const Json header = parse_json(std::string_view(text).substr(0, newline), file);
  if (!header.is_object()) throw CorruptFile(file, "does not begin with an object");
  const std::string rest = text.substr(newline + 1);
  if (required<std::string>(header, "format", file) != kFormat ||
      required<std::int64_t>(header, "format_version", file) != kVersion)
    throw CorruptFile(file, "is of another format or version");
  if (required<std::string>(header, "identity", file) != identity)
    throw CorruptFile(file, "belongs to another model or other options");
  if (required<std::string>(header, "sha256", file) != sha256_hex(rest))
    throw CorruptFile(file, "has a wrong checksum");
  std::vector<std::string> lines;
  for (std::size_t at = 0; at < rest.size();) {
    const std::size_t end = std::min(rest.find('\n', at), rest.size());
    lines.push_back(rest.substr(at, end - at));
    at = end + 1;
  }
  if (required<std::int64_t>(header, "count", file) != std::ssize(lines))
    throw CorruptFile(file, "has another number of lines than it says");
  return lines;
}

/// Number of a shard's file name, -1 for any other file.
std::int64_t shard_number(const std::string& name) {
  if (!name.starts_with("shard_") || !name.ends_with(".jsonl")) return -1;
  const std::string digits = name.substr(6, name.size() - 12);
  if (digits.empty() || digits.size() > 15 || digits.find_first_not_of("0123456789") != std::string::npos) return -1;
  return std::stoll(digits);
}

/// "dtype was float32 and is bfloat16; ...", empty when nothing differs.
std::string difference(const Json& before, const OrderedJson& now) {
  std::string text;
  for (const auto& [key, value] : now.items()) {
    const Json old = before.is_object() && before.contains(key) ? before.at(key) : Json();
    const auto brief = [](const std::string& full) { return full.size() > 20 ? full.substr(0, 12) + "…" : full; };
    if (old.dump() != value.dump())
      text +=
          fmt::format("{}{} was {} and is {}", text.empty() ? "" : "; ", key, brief(old.dump()), brief(value.dump()));
  }
  return text;
}

}  // namespace

std::string request_key(const Request& request) {
  // Lengths before texts: no two different questions give the same bytes.
  std::string text =
      fmt::format("{} {} ", request.type == RequestType::generation ? "generate" : "score", request.max_new_tokens);
  const auto put = [&](const std::string& part) { text += fmt::format("{}:", part.size()) + part; };
  put(request.context);
  put(request.continuation);
  for (const std::string& stop : request.stops) put(stop);
  return sha256_hex(text);
}

AnswerStore::AnswerStore(const comm::Communicator& world, fs::path folder, OrderedJson identity)
    : world_(world), folder_(std::move(folder)), identity_hash_(sha256_hex(dump(identity))) {
  std::string known;
  world_.on_root([&] {
    make_folder(folder_);
    std::vector<std::pair<std::int64_t, fs::path>> shards;
    for (const auto& entry : fs::directory_iterator(folder_))
      if (const std::int64_t number = shard_number(entry.path().filename().string()); number >= 0)
        shards.emplace_back(number, entry.path());
    std::sort(shards.begin(), shards.end());
    const fs::path file = folder_ / "identity.json";
    if (fs::exists(file) && !shards.empty()) {
      try {
        afresh_ = difference(read_json(file), identity);
      } catch (const Error& error) {
        afresh_ = fmt::format("identity.json cannot be read ({})", error.what());
      }
    } else if (!shards.empty()) {
      afresh_ = "identity.json is missing";
    }
    if (!afresh_.empty()) {
      spdlog::warn("the answers in {} are not used, everything is asked anew: {}", folder_.string(), afresh_);
      for (const auto& [number, path] : shards) fs::remove(path);
      shards.clear();
    }
    write_json(file, identity);
    for (const auto& [number, path] : shards) {
      last_shard_ = std::max(last_shard_, number);
      try {
        for (const std::string& line : answer_lines(read_file(path), path.string(), identity_hash_))
          known += line + "\n";
      } catch (const Error& error) {
        spdlog::warn("{}: its answers are asked for again", error.what());
        fs::remove(path);
      }
    }
  });
  world_.broadcast(known);
  world_.broadcast(afresh_);
  for (std::size_t at = 0; at < known.size();) {
    const std::size_t end = known.find('\n', at);
    const Json line = parse_json(std::string_view(known).substr(at, end - at), folder_.string());
    const std::string file = folder_.string();
    answers_[required<std::string>(line, "key", file)] = {
        required<double>(line, "log_likelihood", file), required<bool>(line, "greedy", file),
        required<std::int64_t>(line, "scored_tokens", file), required<std::int64_t>(line, "context_tokens", file),
        required<std::string>(line, "text", file)};
    at = end + 1;
  }
}

const Answer* AnswerStore::find(const std::string& key) const {
  const auto found = answers_.find(key);
  return found == answers_.end() ? nullptr : &found->second;
}

void AnswerStore::add(const std::vector<std::string>& keys, const std::vector<Answer>& answers) {
  if (keys.size() != answers.size())
    throw InternalError(fmt::format("{} keys for {} answers", keys.size(), answers.size()));
  for (std::size_t i = 0; i < keys.size(); ++i) answers_[keys[i]] = answers[i];
  if (keys.empty()) return;
  ++last_shard_;
  world_.on_root([&] {
    std::string lines;
    for (std::size_t i = 0; i < keys.size(); ++i) lines += dump(to_json(keys[i], answers[i])) + "\n";
    const OrderedJson header = {{"format", kFormat},
                                {"format_version", kVersion},
                                {"identity", identity_hash_},
                                {"count", keys.size()},
                                {"sha256", sha256_hex(lines)}};
    write_file(folder_ / fmt::format("shard_{:06}.jsonl", last_shard_), dump(header) + "\n" + lines);
  });
}

}  // namespace headfold::evaluation
