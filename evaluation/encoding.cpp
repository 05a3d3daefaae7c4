#include <headfold/base/files.h>
#include <headfold/evaluation/encoding.h>
#include <headfold/evaluation/text.h>

#include <algorithm>
#include <cstring>

namespace headfold::evaluation {
namespace {

std::vector<std::int32_t> narrow(const std::vector<std::int64_t>& ids) {
  return {ids.begin(), ids.end()};
}

/// White space at the end of a text, as Python's rstrip() sees it.
std::size_t trailing_space(std::string_view text) {
  const std::string_view bare = strip(text);
  return bare.empty() ? text.size() : static_cast<std::size_t>(text.data() + text.size() - (bare.data() + bare.size()));
}

[[noreturn]] void refuse(const Request& request, const char* what) {
  throw InputError(fmt::format("{} (both counted from 0) has {}: context \"{}\", continuation \"{}\"", name_of(request),
                               what, request.context.substr(0, 60), request.continuation.substr(0, 60)),
                   "the harness scores continuations of at least one token after a context of at least one");
}

}  // namespace

HarnessVersion parse_harness_version(const std::string& name) {
  for (const HarnessVersion version : {HarnessVersion::v0_4_9_1, HarnessVersion::v0_4_9_2})
    if (name == name_of(version)) return version;
  throw UsageError(fmt::format("--harness-compat {}: choose 0.4.9.1 (no BOS) or 0.4.9.2 (as the tokenizer does)", name),
                   "releases before 0.4.9.1 are like it, later ones like 0.4.9.2");
}

const char* name_of(HarnessVersion version) {
  return version == HarnessVersion::v0_4_9_1 ? "0.4.9.1" : "0.4.9.2";
}

tokenizer::Bos benchmark_bos(tokenizer::Bos asked, HarnessVersion version) {
  return asked == tokenizer::Bos::model_default && version == HarnessVersion::v0_4_9_1 ? tokenizer::Bos::never : asked;
}

std::int64_t harness_max_length(const checkpoint::ModelConfig& config) {
  constexpr std::int64_t kDefault = 2048;
  for (const char* key : {"n_positions", "max_position_embeddings", "n_ctx"})
    if (const auto found = config.raw.find(key); found != config.raw.end() && !found->is_null())
      return required<std::int64_t>(config.raw, key, config.file);
  const fs::path file = fs::path(config.file).parent_path() / "tokenizer_config.json";
  if (!fs::exists(file)) return kDefault;
  const Json tokenizer = read_json(file);
  if (!tokenizer.is_object()) return kDefault;
  const auto found = tokenizer.find("model_max_length");
  // transformers writes 10^30 where no length is known.
  if (found == tokenizer.end() || !found->is_number() || found->get<double>() > 1e15 || found->get<double>() < 1)
    return kDefault;
  return static_cast<std::int64_t>(found->get<double>());
}

Encoder::Encoder(const tokenizer::Tokenizer& tokenizer, tokenizer::Bos policy)
    : tokenizer_(tokenizer), policy_(policy) {
  if (tokenizer.bos() >= 0) bos_text_ = tokenizer.token_text(tokenizer.bos());
}

std::int64_t Encoder::prefix() const {
  if (tokenizer_.bos() >= 0) return tokenizer_.bos();
  if (tokenizer_.eos() >= 0) return tokenizer_.eos();
  throw InputError("an empty context needs a first token, and the tokenizer has neither BOS nor EOS");
}

std::vector<std::int64_t> Encoder::encode(std::string_view text) const {
  if (bos_text_.empty() || !text.starts_with(bos_text_)) return tokenizer_.encode(text, policy_);
  std::vector<std::int64_t> ids = tokenizer_.encode(text);
  if (!ids.empty() && ids.front() == tokenizer_.bos()) return ids;
  ids = tokenizer_.encode(text.substr(bos_text_.size()));
  ids.insert(ids.begin(), tokenizer_.bos());
  return ids;
}

std::pair<std::vector<std::int64_t>, std::vector<std::int64_t>> Encoder::pair(const std::string& context,
                                                                              const std::string& continuation) const {
  if (context.empty()) {
    std::vector<std::int64_t> ids = tokenizer_.encode(continuation);
    // SentencePiece files do not find BOS in a text by themselves.
    if (!bos_text_.empty() && continuation.starts_with(bos_text_)) ids = encode(continuation);
    const std::int64_t first = prefix();
    if (!ids.empty() && ids.front() == first) ids.erase(ids.begin());
    return {std::vector<std::int64_t>{first}, std::move(ids)};
  }
  const std::string bare = context.substr(0, context.size() - trailing_space(context));
  if (last_context_ == nullptr || bare != last_text_) {
    last_ids_ = encode(bare);
    last_text_ = bare;
    last_context_ = std::make_shared<const std::vector<std::int32_t>>(narrow(last_ids_));
  }
  std::vector<std::int64_t> whole = encode(context + continuation);
  whole.erase(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(std::min(whole.size(), last_ids_.size())));
  return {last_ids_, std::move(whole)};
}

EncodedRequest Encoder::request(const Request& request) const {
  EncodedRequest result;
  if (request.type == RequestType::generation) {
    std::vector<std::int64_t> ids = encode(request.context);
    if (ids.empty()) ids.push_back(prefix());
    result.context = std::make_shared<const std::vector<std::int32_t>>(narrow(ids));
    return result;
  }
  const auto [context, continuation] = pair(request.context, request.continuation);
  if (context.empty()) refuse(request, "a context without a token");
  if (continuation.empty()) refuse(request, "a continuation without a token of its own");
  result.context =
      request.context.empty() ? std::make_shared<const std::vector<std::int32_t>>(narrow(context)) : last_context_;
  result.continuation = narrow(continuation);
  return result;
}

std::vector<EncodedRequest> encode_requests(const comm::Communicator& world, const Encoder& encoder,
                                            const std::vector<const Request*>& requests) {
  std::vector<EncodedRequest> all(requests.size());
  if (world.size() == 1) {
    for (std::size_t i = 0; i < requests.size(); ++i) all[i] = encoder.request(*requests[i]);
    return all;
  }
  // Contiguous shares of about the same number of bytes, so that choices stay together.
  std::vector<double> bytes(requests.size() + 1, 0.0);
  for (std::size_t i = 0; i < requests.size(); ++i)
    bytes[i + 1] = bytes[i] + static_cast<double>(requests[i]->context.size() + requests[i]->continuation.size()) + 1;
  const auto begin_of = [&](int rank) {
    const double wanted = bytes.back() * rank / world.size();
    return static_cast<std::size_t>(std::lower_bound(bytes.begin(), bytes.end(), wanted) - bytes.begin());
  };
  // Per request: whether the context is that of the one before, its length and ids if not, then the continuation's.
  std::vector<std::int32_t> own;
  const std::size_t end = world.rank() + 1 == world.size() ? requests.size() : begin_of(world.rank() + 1);
  const std::vector<std::int32_t>* last = nullptr;
  const auto put = [&](const std::vector<std::int32_t>& ids) {
    own.push_back(static_cast<std::int32_t>(ids.size()));
    own.insert(own.end(), ids.begin(), ids.end());
  };
  std::vector<EncodedRequest> keep;  // contexts stay alive, so that equal addresses mean equal contexts
  for (std::size_t i = begin_of(world.rank()); i < end; ++i) {
    keep.push_back(encoder.request(*requests[i]));
    const EncodedRequest& encoded = keep.back();
    own.push_back(encoded.context.get() == last ? 1 : 0);
    if (encoded.context.get() != last) put(*encoded.context);
    put(encoded.continuation);
    last = encoded.context.get();
  }
  const std::vector<std::string> shares =
      world.all_gather({reinterpret_cast<const char*>(own.data()), own.size() * sizeof(std::int32_t)});
  std::size_t next = 0;
  for (const std::string& share : shares) {
    std::vector<std::int32_t> values(share.size() / sizeof(std::int32_t));
    if (!values.empty()) std::memcpy(values.data(), share.data(), share.size());
    auto at = values.begin();
    const auto take = [&] {
      const std::int32_t count = *at++;
      std::vector<std::int32_t> ids(at, at + count);
      at += count;
      return ids;
    };
    while (at != values.end()) {
      EncodedRequest& encoded = all.at(next++);
      encoded.context =
          *at++ == 1 ? all.at(next - 2).context : std::make_shared<const std::vector<std::int32_t>>(take());
      encoded.continuation = take();
    }
  }
  if (next != requests.size())
    throw InternalError(fmt::format("{} of {} requests were encoded", next, requests.size()));
  return all;
}

}  // namespace headfold::evaluation
