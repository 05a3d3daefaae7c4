#include "convert_folds.h"

#include <algorithm>

namespace headfold::jobs {

namespace {

/// Options that a fold may set after '@': those that say what is folded and how, but for keys, values and metrics,
/// which come before it.
const std::vector<const char*>& option_names() {
  static const std::vector<const char*> names = {
      "kv-heads", "ratio",         "sink-weight", "mean-weight",  "weight-ridge", "slow-band",      "polish",
      "context",  "latent-groups", "min-width",   "max-width",    "grouping",     "grouping-seeds", "grouping-seed",
      "budget",   "refit",         "refit-parts", "refit-sweeps", "refit-ridge"};
  return names;
}

std::vector<std::string> pieces(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::size_t begin = 0;
  while (true) {
    const std::size_t end = text.find(separator, begin);
    std::string part = text.substr(begin, end == std::string::npos ? end : end - begin);
    const std::size_t first = part.find_first_not_of(" \t\n"), last = part.find_last_not_of(" \t\n");
    parts.push_back(first == std::string::npos ? std::string() : part.substr(first, last - first + 1));
    if (end == std::string::npos) return parts;
    begin = end + 1;
  }
}

std::string grammar() {
  return "a fold is NAME or KEYS[:METRIC][/VALUES[:METRIC]], then any number of @option=value, for example "
         "rope-commuting:act+query/svd:act+out@slow-band=5@refit";
}

[[noreturn]] void refuse(const std::string& fold, const std::string& problem, const std::string& hint = grammar()) {
  throw UsageError(fmt::format("--compare {}: {}", fold.empty() ? "''" : fold, problem), hint);
}

/// Appends --name metric of one side, "svd:act".
void add_side(const std::string& fold, const std::string& side, const char* name, const char* metric,
              std::vector<std::string>& arguments) {
  const std::vector<std::string> parts = pieces(side, ':');
  if (parts.size() > 2 || parts[0].empty() || parts.back().empty())
    refuse(fold, fmt::format("'{}' is not of the form {}[:METRIC]", side, name));
  arguments.insert(arguments.end(), {fmt::format("--{}", name), parts[0]});
  if (parts.size() == 2) arguments.insert(arguments.end(), {fmt::format("--{}", metric), parts[1]});
}

/// A fold's own options as the job's parser understands them, joined with those of the job itself.
po::variables_map values_of(const std::string& fold, const std::vector<std::string>& arguments,
                            const po::variables_map& job) {
  const po::options_description known = convert_options();
  po::variables_map own;
  try {
    const int style = po::command_line_style::default_style & ~po::command_line_style::allow_guessing;
    po::store(po::command_line_parser(arguments).options(known).style(style).run(), own);
  } catch (const po::error& error) {
    refuse(fold, error.what(), "headfold convert --help lists what the options take");
  }
  const auto sets = [](const po::variables_map& values, const std::string& name) {
    return values.count(name) > 0 && !values[name].defaulted();
  };
  auto& entries = static_cast<std::map<std::string, po::variable_value>&>(own);
  const bool sized = sets(own, "kv-heads") || sets(own, "ratio");
  for (const std::string name : option_names()) {
    if (sets(own, name) || !sets(job, name)) continue;
    if (sized && (name == "kv-heads" || name == "ratio")) continue;  // two ways to say the same thing
    entries[name] = job[name];
  }
  return own;
}

FoldRequest parse_fold(const std::string& text, const po::variables_map& job, const checkpoint::ModelConfig& config) {
  FoldRequest request;
  request.text = text;
  std::vector<std::string> parts = pieces(text, '@');
  std::string fold = parts[0];
  const auto names = shorthands(config.family);
  const auto known = std::find_if(names.begin(), names.end(), [&](const auto& name) { return name.first == fold; });
  if (known != names.end()) {
    const std::vector<std::string> meant = pieces(known->second, '@');
    fold = meant[0];
    parts.insert(parts.begin() + 1, meant.begin() + 1, meant.end());
  }
  request.expanded = fold;
  const std::vector<std::string> sides = pieces(fold, '/');
  if (sides.size() > 2) refuse(text, "more than one '/'");
  std::vector<std::string> arguments;
  add_side(text, sides[0], "keys", "key-metric", arguments);
  if (sides.size() == 2) add_side(text, sides[1], "values", "value-metric", arguments);
  if (known == names.end()) {
    try {
      folding::parse_key_fold(arguments[1]);
    } catch (const UsageError&) {
      std::vector<std::string> choices;
      choices.reserve(names.size());
      for (const auto& name : names) choices.push_back(name.first);
      refuse(text, fmt::format("there is no fold '{}'; names are {} and all; folds of keys are rope-commuting, "
                               "post-rotation, norope, latent, procrustes, meanpool",
                               arguments[1], fmt::join(choices, ", ")));
    }
  }

  const po::options_description options = convert_options();
  std::map<std::string, std::string> given;
  for (std::size_t i = 1; i < parts.size(); ++i) {
    const std::size_t equals = parts[i].find('=');
    const std::string name = parts[i].substr(0, equals);
    const std::vector<const char*>& legal = option_names();
    if (std::find(legal.begin(), legal.end(), name) == legal.end())
      refuse(text, fmt::format("there is no option '{}' of a fold; choose from {}", name, fmt::join(legal, ", ")));
    const bool is_switch = options.find(name, false).semantic()->max_tokens() == 0;
    if (is_switch != (equals == std::string::npos))
      refuse(text, is_switch ? fmt::format("'{}' takes no value: write @{}", name, name)
                             : fmt::format("'{}' needs a value: write @{}=VALUE", name, name));
    const std::string value = is_switch ? std::string() : parts[i].substr(equals + 1);
    if (!is_switch && value.empty()) refuse(text, fmt::format("'{}' has an empty value", name));
    // What is written after a shorthand's own options overrides them.
    given[name] = value;
  }
  if (given.contains("kv-heads") && given.contains("ratio"))
    refuse(text, "kv-heads and ratio say the same thing; give one of them");
  for (const auto& [name, value] : given) {
    request.expanded += "@" + name + (value.empty() ? "" : "=" + value);
    arguments.push_back(fmt::format("--{}{}", name, value.empty() ? "" : "=" + value));
  }

  const po::variables_map values = values_of(text, arguments, job);
  try {
    request.options = fold_options(values, config);
    request.grouping = grouping_options(values);
    request.refit = refit_options(values);
  } catch (const UsageError& error) {
    refuse(text, error.what(), error.hint());
  }
  return request;
}

}  // namespace

std::vector<std::pair<std::string, std::string>> shorthands(checkpoint::Family family) {
  if (family == checkpoint::Family::bloom)
    return {{"meanpool", "meanpool/meanpool"},          {"procrustes", "procrustes:act/procrustes:act"},
            {"weights", "norope:weights/svd:weights"},  {"paper", "norope:act/svd:act"},
            {"query", "norope:act+query/svd:act+out"},  {"lorc", "latent:weights/svd:weights@latent-groups=1"},
            {"latent", "latent:act+query/svd:act+out"}, {"best", "norope:act+query/svd:attn+out@refit"}};
  return {{"meanpool", "meanpool/meanpool"},
          {"procrustes", "procrustes:act/procrustes:act"},
          {"weights", "rope-commuting:weights/svd:weights"},
          {"activation", "rope-commuting:act/svd:act"},
          {"query", "rope-commuting:act+query/svd:act+out"},
          {"paper", "post-rotation:act/svd:act"},
          {"lorc", "latent:weights/svd:weights@latent-groups=1"},
          {"latent", "latent:act+query/svd:act+out"},
          {"stock", "rope-commuting:act+query+dist/svd:attn+out@slow-band=auto@polish=5@refit"}};
}

std::vector<FoldRequest> parse_folds(const std::string& list, const po::variables_map& values,
                                     const checkpoint::ModelConfig& config, bool refit) {
  std::vector<FoldRequest> requests;
  for (const std::string& text : pieces(list, ',')) {
    if (text.empty()) refuse(list, "an empty entry in the list of folds");
    if (pieces(text, '@')[0] != "all") {
      requests.push_back(parse_fold(text, values, config));
      continue;
    }
    for (const auto& name : shorthands(config.family)) {
      FoldRequest request = parse_fold(name.first + text.substr(3), values, config);
      if (refit || !request.options.refit) requests.push_back(std::move(request));
    }
  }
  return requests;
}

}  // namespace headfold::jobs
