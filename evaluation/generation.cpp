#include <headfold/base/error.h>
#include <headfold/evaluation/generation.h>
#include <headfold/evaluation/responder.h>

#include <algorithm>
#include <numeric>

namespace headfold::evaluation {
namespace {

/// A place of the cache and the text in it.
struct Slot {
  std::vector<std::int64_t> cached;  // tokens whose keys and values are there
  std::vector<std::int64_t> generated;
  std::size_t prompt = 0;
  bool busy = false;
};

std::int64_t common_beginning(const std::vector<std::int64_t>& a, const std::vector<std::int64_t>& b) {
  const auto [first, second] = std::mismatch(a.begin(), a.end(), b.begin(), b.end());
  return first - a.begin();
}

}  // namespace

std::string cut_at_stops(std::string text, const std::vector<std::string>& stops) {
  for (const std::string& stop : stops)
    if (!stop.empty()) text.resize(std::min(text.size(), text.find(stop)));
  return text;
}

std::vector<Generated> generate_texts(const model::Pipeline& pipeline, const comm::Grid& grid,
                                      const tokenizer::Tokenizer& tokenizer, const std::vector<Prompt>& prompts,
                                      const GenerationOptions& options, std::int64_t* computed) {
  std::vector<Generated> results(prompts.size());
  if (prompts.empty()) return results;
  std::int64_t capacity = 0;
  for (const Prompt& prompt : prompts)
    capacity = std::max(capacity, std::ssize(prompt.ids) + std::max<std::int64_t>(prompt.max_new_tokens, 1));
  const std::int64_t slot_count = std::clamp<std::int64_t>(options.slots, 1, std::ssize(prompts));
  std::vector<model::LayerCache> caches = pipeline.make_cache(slot_count, capacity);
  std::vector<Slot> slots(static_cast<std::size_t>(slot_count));
  // Prompts that begin alike come after one another.
  std::vector<std::size_t> waiting(prompts.size());
  std::iota(waiting.begin(), waiting.end(), std::size_t{0});
  std::stable_sort(waiting.begin(), waiting.end(),
                   [&](std::size_t a, std::size_t b) { return prompts[a].ids < prompts[b].ids; });
  std::size_t next = 0;

  // Adds prompt `waiting[next]` to a pass, in `free`.
  const auto admit = [&](std::size_t free, std::vector<std::int64_t>& ids, std::vector<model::Segment>& segments) {
    const Prompt& prompt = prompts[waiting[next]];
    std::int64_t shared = 0;
    std::size_t source = free;
    for (std::size_t s = 0; s < slots.size() && options.share; ++s) {
      // The last token of a prompt is read in any case: its prediction is wanted.
      const std::int64_t common = std::min(common_beginning(slots[s].cached, prompt.ids), std::ssize(prompt.ids) - 1);
      if (common >= options.shortest_shared && common > shared) shared = common, source = s;
    }
    segments.push_back({shared, std::ssize(prompt.ids) - shared, static_cast<std::int64_t>(free),
                        source == free ? -1 : static_cast<std::int64_t>(source)});
    ids.insert(ids.end(), prompt.ids.begin() + shared, prompt.ids.end());
    slots[free] = {prompt.ids, {}, waiting[next], true};
    ++next;
    return std::ssize(prompt.ids) - shared;
  };
  const auto finish = [&](Slot& slot) {
    const Prompt& prompt = prompts[slot.prompt];
    std::vector<std::int64_t> ids = slot.generated;
    if (!ids.empty() && std::find(options.end_ids.begin(), options.end_ids.end(), ids.back()) != options.end_ids.end())
      ids.pop_back();
    results[slot.prompt] = {cut_at_stops(tokenizer.decode(ids), prompt.stops), std::ssize(slot.generated)};
    slot.busy = false;
  };

  while (true) {
    std::vector<std::int64_t> ids;
    std::vector<model::Segment> segments;
    for (std::size_t s = 0; s < slots.size(); ++s) {
      if (!slots[s].busy) continue;
      segments.push_back({std::ssize(slots[s].cached), 1, static_cast<std::int64_t>(s)});
      ids.push_back(slots[s].generated.back());
      slots[s].cached.push_back(ids.back());
    }
    std::int64_t read = 0;
    for (std::size_t s = 0; s < slots.size() && next < waiting.size(); ++s)
      if (!slots[s].busy && (read == 0 || read + std::ssize(prompts[waiting[next]].ids) <= options.max_tokens))
        read += admit(s, ids, segments);
    if (segments.empty()) break;
    if (computed != nullptr) *computed += std::ssize(ids);

    // 0 .. vocab-1: the likeliest token after each segment; -1: the model gave NaN.
    std::vector<std::int64_t> chosen(segments.size(), -1);
    model::PipelineHooks hooks;
    hooks.output = [&](std::int64_t, const at::Tensor& hidden) {
      std::vector<std::int64_t> last;
      last.reserve(segments.size());
      std::int64_t row = 0;
      for (const model::Segment& segment : segments) last.push_back((row += segment.tokens) - 1);
      const at::Tensor rows = hidden.index_select(0, at::tensor(last, at::kLong).to(hidden.device()));
      const at::Tensor logits = model::to_host(pipeline.head().logits(rows)).to(at::kFloat).contiguous();
      const std::int64_t vocabulary = logits.size(1);
      const auto* values = logits.data_ptr<float>();
      for (std::size_t i = 0; i < segments.size(); ++i) {
        const float* begin = values + static_cast<std::int64_t>(i) * vocabulary;
        bool finite = true;
        for (std::int64_t v = 0; v < vocabulary; ++v) finite = finite && std::isfinite(begin[v]);
        if (finite) chosen[i] = std::max_element(begin, begin + vocabulary) - begin;
      }
    };
    pipeline.run_packed({{at::tensor(ids, at::kLong), segments}}, hooks, &caches);
    if (grid.stages > 1) grid.pipeline.broadcast(std::as_writable_bytes(std::span(chosen)), grid.stages - 1);

    for (std::size_t i = 0; i < segments.size(); ++i) {
      Slot& slot = slots[static_cast<std::size_t>(segments[i].slot)];
      const Prompt& prompt = prompts[slot.prompt];
      if (chosen[i] < 0)
        throw InputError(fmt::format("{}: the model gives NaN or infinite logits", pipeline.config().file),
                         "try --dtype float32; if it persists, headfold inspect on the model");
      slot.generated.push_back(chosen[i]);
      const bool ended = std::find(options.end_ids.begin(), options.end_ids.end(), chosen[i]) != options.end_ids.end();
      bool stopped = ended || std::ssize(slot.generated) >= prompt.max_new_tokens;
      if (!stopped && !prompt.stops.empty()) {
        const std::string text = tokenizer.decode(slot.generated);
        stopped = std::any_of(prompt.stops.begin(), prompt.stops.end(), [&](const std::string& stop) {
          return !stop.empty() && text.find(stop) != std::string::npos;
        });
      }
      if (stopped) finish(slot);
    }
  }
  return results;
}

}  // namespace headfold::evaluation
