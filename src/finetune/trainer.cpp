#include <headfold/base/error.h>
#include <headfold/base/events.h>
#include <headfold/base/files.h>
#include <headfold/base/index.h>
#include <headfold/base/log.h>
#include <headfold/base/progress.h>
#include <headfold/base/test_point.h>
#include <headfold/checkpoint/safetensors.h>
#include <headfold/finetune/trainer.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <set>

namespace headfold::finetune {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Step numbers of the folders PREFIX-N in `folder`, ascending.
std::vector<std::int64_t> steps_in(const fs::path& folder, const std::string& prefix) {
  std::vector<std::int64_t> steps;
  std::error_code code;
  for (const auto& entry : fs::directory_iterator(folder, code)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(prefix + "-")) continue;
    const std::string number = name.substr(prefix.size() + 1);
    if (number.empty() || number.size() > 15 || number.find_first_not_of("0123456789") != std::string::npos) continue;
    steps.push_back(std::stoll(number));
  }
  std::sort(steps.begin(), steps.end());
  return steps;
}

}  // namespace

struct Trainer::State {
  State(const comm::Communicator& world_, TrainableModel& model_, const Dataset& data_, const Dataset* validation_,
        const Teacher* teacher_, const Teacher* validation_teacher_, TrainOptions options_)
      : world(world_),
        model(model_),
        data(data_),
        validation(validation_),
        teacher(teacher_),
        validation_teacher(validation_teacher_),
        options(std::move(options_)),
        optimizer(world_, model_.parameters(), options.adam, options.shard_optimizer),
        sampler(data_.sequences(), options.seed) {
    checkpoints = options.folder / "checkpoints";
    lines = options.folder / "train.jsonl";
  }

  const comm::Communicator world;
  TrainableModel& model;
  const Dataset& data;
  const Dataset* validation;
  const Teacher* teacher;
  const Teacher* validation_teacher;
  const TrainOptions options;
  Optimizer optimizer;
  Sampler sampler;
  TrainState now;
  fs::path checkpoints, lines;
  std::ofstream log;
  std::int64_t saved = -1;  // step of the newest checkpoint
  Clock::time_point started, counted, reported;
  std::int64_t first_step = 0;

  fs::path step_folder(std::int64_t step) const { return checkpoints / fmt::format("step-{}", step); }
  fs::path best_folder(std::int64_t step) const { return checkpoints / fmt::format("best-{}", step); }

  LossSums add_gradients(std::int64_t step, std::string& broken) {
    const std::vector<std::int64_t> drawn = sampler.draw((step - 1) * options.batch, options.batch);
    std::int64_t scored = 0;
    for (const std::int64_t sequence : drawn) scored += data.scored(sequence);
    const double scale = scored > 0 ? 1.0 / static_cast<double>(scored) : 0.0;
    const std::uint64_t dropout_seed = mixed(options.seed, static_cast<std::uint64_t>(step), 1);
    const std::int64_t blocks = (options.batch + options.micro_batch - 1) / options.micro_batch;
    LossSums sums;
    for (std::int64_t block = world.rank(); block < blocks; block += world.size()) {
      const std::int64_t begin = block * options.micro_batch;
      const std::int64_t end = std::min(options.batch, begin + options.micro_batch);
      const std::span<const std::int64_t> sequences(drawn.data() + begin, ix(end - begin));
      Batch batch = data.batch(sequences);
      batch.numbers = at::arange(begin, end, at::kLong);
      TeacherView view;
      if (teacher != nullptr) view = teacher->view(batch, sequences);
      // Gradients are complete, and may travel, in the last of this rank's passes only.
      std::function<void(std::int64_t)> done;
      if (block + world.size() >= blocks) done = [this](std::int64_t layer) { optimizer.layer_done(layer); };
      const LossSums part =
          model.forward_backward(batch, teacher != nullptr ? &view : nullptr, options.loss, scale, dropout_seed, done);
      if (!std::isfinite(part.cross_entropy) || !std::isfinite(part.divergence))
        for (const std::int64_t sequence : sequences)
          broken += fmt::format("{}{}", broken.empty() ? "" : ", ", sequence);
      sums += part;
    }
    optimizer.finish_gradients();
    return sums;
  }

  /// Sums over all ranks; `extra` travels with them.
  LossSums summed(const LossSums& own, double* extra = nullptr) const {
    std::array<double, 5> values = {own.cross_entropy, own.divergence, static_cast<double>(own.tokens),
                                    static_cast<double>(own.agreements), extra != nullptr ? *extra : 0.0};
    world.all_reduce(std::span(values));
    LossSums all;
    all.cross_entropy = values[0];
    all.divergence = values[1];
    all.tokens = static_cast<std::int64_t>(values[2]);
    all.agreements = static_cast<std::int64_t>(values[3]);
    if (extra != nullptr) *extra = values[4];
    return all;
  }

  [[noreturn]] void give_up(std::int64_t step, const std::string& broken, const char* what, double value) const {
    std::string sequences;
    for (const std::string& own : world.all_gather(broken))
      if (!own.empty()) sequences += (sequences.empty() ? "" : ", ") + own;
    if (sequences.empty()) {
      Sampler again(data.sequences(), options.seed);
      for (const std::int64_t sequence : again.draw((step - 1) * options.batch, options.batch))
        if (sequences.size() < 400) sequences += fmt::format("{}{}", sequences.empty() ? "" : ", ", sequence);
    }
    // Weights that no step has changed are the checkpoint's own, and the learning rate had no part in them.
    if (now.step == 0)
      throw NumericalError(
          fmt::format("{} the {} is {}: the model gives it before anything is trained",
                      step > 0 ? fmt::format("step {}:", step) : std::string("before step 1:"), what, value),
          "try --dtype float32; if it persists, the checkpoint that --model names is broken");
    throw NumericalError(
        fmt::format("step {}: the {} is {}, from sequences {} of the training data (counted from 0)", step, what, value,
                    sequences),
        saved >= 0 ? fmt::format("{} holds the state after step {}; look at these sequences, or train with a lower "
                                 "--learning-rate, which is another training: --overwrite, or another --out",
                                 step_folder(saved).string(), saved)
                   : std::string("look at these sequences, or train with a lower --learning-rate and --overwrite"));
  }

  void validate() {
    if (validation == nullptr) return;
    LossOptions plain;
    if (validation_teacher != nullptr)
      plain.distill_weight = options.loss.distill_weight > 0 ? options.loss.distill_weight : 0.5;
    const std::int64_t blocks = (validation->sequences() + options.micro_batch - 1) / options.micro_batch;
    LossSums own;
    for (std::int64_t block = world.rank(); block < blocks; block += world.size()) {
      std::vector<std::int64_t> sequences;
      for (std::int64_t s = block * options.micro_batch;
           s < std::min(validation->sequences(), (block + 1) * options.micro_batch); ++s)
        sequences.push_back(s);
      const Batch batch = validation->batch(sequences);
      TeacherView view;
      if (validation_teacher != nullptr) view = validation_teacher->view(batch, sequences);
      own += model.evaluate(batch, validation_teacher != nullptr ? &view : nullptr, plain);
    }
    const LossSums all = summed(own);
    const double loss = all.cross_entropy / static_cast<double>(std::max<std::int64_t>(all.tokens, 1));
    if (!std::isfinite(loss)) give_up(now.step, "", "loss on the validation text", loss);
    now.last_validation = loss;
    now.last_divergence = all.divergence / static_cast<double>(std::max<std::int64_t>(all.tokens, 1));
    if (now.step == 0) {
      now.first_validation = now.last_validation;
      now.first_divergence = now.last_divergence;
    }
    if (now.best_step < 0 || loss < now.best_loss) {
      now.best_step = now.step;
      now.best_loss = loss;
      now.worse = 0;
      world.on_root([&] { save_best(); });
    } else {
      ++now.worse;
    }
    if (!world.root()) return;
    OrderedJson line;
    line["step"] = now.step;
    line["validation_loss"] = loss;
    line["validation_perplexity"] = std::exp(loss);
    std::string divergence;
    if (validation_teacher != nullptr) {
      const std::int64_t width = validation_teacher->width();
      line["validation_kl"] = now.last_divergence;
      if (width > 0) line["validation_kl_top"] = width;
      divergence = fmt::format(", KL{} {:.4f}", width > 0 ? fmt::format(" over the top {} tokens", width) : "",
                               now.last_divergence);
    }
    write_line(line);
    spdlog::info("step {}: validation perplexity {:.4f}{}{}", now.step, std::exp(loss), divergence,
                 now.best_step == now.step
                     ? ", the best so far"
                     : fmt::format(" (best {:.4f} at step {})", std::exp(now.best_loss), now.best_step));
  }

  void write_line(const OrderedJson& line) {
    log << line.dump() << '\n';
    log.flush();
    if (!log) throw IoError(lines.string(), "cannot write to it", "is the disk full?");
  }

  fs::path temporary_of(const fs::path& folder) const {
    return checkpoints / ("." + folder.filename().string() + ".tmp");
  }
  /// A checkpoint is filled in a temporary folder and then gets its name: it is there whole or not at all.
  void begin_folder(const fs::path& folder, const char* file, const std::map<std::string, at::Tensor>& tensors) const {
    const fs::path temporary = temporary_of(folder);
    std::error_code code;
    fs::remove_all(temporary, code);
    make_folder(temporary);
    checkpoint::write_safetensors(temporary / file, tensors);
  }
  void finish_folder(const fs::path& folder) const {
    write_json(temporary_of(folder) / "state.json", state_json());
    std::error_code code;
    fs::remove_all(folder, code);
    publish(temporary_of(folder), folder);
  }

  OrderedJson state_json() const {
    OrderedJson json =
        to_json(StoredState{now, optimizer.steps(), Json::parse(options.identity.empty() ? "null" : options.identity)});
    // What follows from step, seed and options is stated all the same, for readers.
    json["epoch"] = sampler.epoch_of(now.step * options.batch);
    json["sampler_position"] = now.step * options.batch;
    json["seed"] = options.seed;
    json["ranks"] = world.size();
    json["data"] = data.fingerprint();
    return json;
  }

  void save_best() {
    begin_folder(best_folder(now.best_step), "parameters.safetensors", optimizer.values());
    finish_folder(best_folder(now.best_step));
  }

  void save() {
    if (saved == now.step) return;
    world.require_equal(optimizer.fingerprint(), fmt::format("the trained weights after step {}", now.step));
    now.seconds += seconds_since(counted);
    counted = Clock::now();
    const fs::path folder = step_folder(now.step);
    world.on_root([&] { begin_folder(folder, "parameters.safetensors", optimizer.values()); });
    // One after the other: where ranks share the optimiser's state each is gathered into memory of its own.
    for (const bool second : {false, true}) {
      const auto moments = second ? optimizer.second_moments() : optimizer.first_moments();
      world.on_root([&] {
        checkpoint::write_safetensors(
            temporary_of(folder) / (second ? "moments-second.safetensors" : "moments-first.safetensors"), moments);
      });
    }
    world.on_root([&] {
      finish_folder(folder);
      // Two latest, and every best that one of them speaks of.
      std::vector<std::int64_t> steps = steps_in(checkpoints, "step");
      std::error_code code;
      while (steps.size() > 2) {
        // A checkpoint of a later step belongs to a run that was begun anew from an older one.
        const auto stale = std::find_if(steps.begin(), steps.end(), [&](std::int64_t s) { return s > now.step; });
        const auto which = stale != steps.end() ? stale : steps.begin();
        fs::remove_all(step_folder(*which), code);
        steps.erase(which);
      }
      std::set<std::int64_t> wanted = {now.best_step};
      for (const std::int64_t step : steps) {
        try {
          wanted.insert(read_state(step_folder(step)).state.best_step);
        } catch (const Error&) {  // not readable: nothing to keep for it
        }
      }
      for (const std::int64_t step : steps_in(checkpoints, "best"))
        if (!wanted.contains(step)) fs::remove_all(best_folder(step), code);
    });
    saved = now.step;
  }

  void open_lines(bool resumed) {
    world.on_root([&] {
      make_folder(checkpoints);
      // What a killed job was filling.
      std::vector<fs::path> unfinished;
      for (const auto& entry : fs::directory_iterator(checkpoints))
        if (const std::string name = entry.path().filename().string(); name.starts_with('.') && name.ends_with(".tmp"))
          unfinished.push_back(entry.path());
      for (const fs::path& path : unfinished) fs::remove_all(path);
      std::string kept;
      if (resumed && fs::exists(lines)) {
        const std::string text = read_file(lines);
        for (std::size_t begin = 0; begin < text.size();) {
          const std::size_t end = text.find('\n', begin);
          if (end == std::string::npos) break;  // a line that was being written
          const std::string_view line = std::string_view(text).substr(begin, end + 1 - begin);
          begin = end + 1;
          const Json json = Json::parse(line, nullptr, false);
          if (json.is_object() && json.value("step", now.step + 1) <= now.step) kept += line;
        }
      }
      write_file(lines, kept);
      log.open(lines, std::ios::app);
      if (!log) throw IoError(lines.string(), "cannot open it for writing");
    });
  }

  bool resume() {
    std::string chosen;
    TensorSource values, first, second;
    StoredState stored;
    world.on_root([&] {
      std::vector<std::int64_t> steps = steps_in(checkpoints, "step");
      const bool any = !steps.empty();
      for (; !steps.empty() && chosen.empty(); steps.pop_back()) {
        const fs::path folder = step_folder(steps.back());
        try {
          stored = read_state(folder);
          if (!options.identity.empty() && stored.identity != Json::parse(options.identity))
            throw InputError(
                fmt::format("{}: was made with other options, another model or other data", folder.string()),
                "choose another --out, or --overwrite to begin anew");
          if (stored.state.step != steps.back())
            throw CorruptFile((folder / "state.json").string(),
                              fmt::format("is of step {}, its folder of step {}", stored.state.step, steps.back()));
          values = stored_tensors(folder / "parameters.safetensors", model.parameters());
          first = stored_tensors(folder / "moments-first.safetensors", model.parameters());
          second = stored_tensors(folder / "moments-second.safetensors", model.parameters(), true);
          chosen = folder.string();
        } catch (const CorruptFile& error) {
          spdlog::warn("a checkpoint cannot be read, trying the one before: {}", error.what());
        } catch (const IoError& error) {
          spdlog::warn("a checkpoint cannot be read, trying the one before: {}", error.what());
        }
      }
      if (any && chosen.empty())
        spdlog::warn("{}: none of the checkpoints can be read, training begins anew", checkpoints.string());
    });
    world.broadcast(chosen);
    if (chosen.empty()) return false;
    optimizer.restore(values, first, second, stored.adam_steps, chosen);
    std::string text = world.root() ? to_json(stored.state).dump() : std::string();
    world.broadcast(text);
    now = state_from(Json::parse(text), chosen);
    saved = now.step;
    // Every rank must stand at the same values before anybody trains on.
    world.require_equal(optimizer.fingerprint(), fmt::format("the weights read from {}", chosen));
    if (world.root()) {
      spdlog::info("resuming after step {} of {} from {}", now.step, options.schedule.steps, chosen);
      emit_event("resume", {{"step", now.step}, {"of", options.schedule.steps}, {"unit", "step"}});
    }
    return true;
  }

  void report_step(const LossSums& sums, double rate, double norm, double seconds) {
    if (!world.root()) return;
    const double tokens = static_cast<double>(std::max<std::int64_t>(sums.tokens, 1));
    const double speed = static_cast<double>(options.batch * data.length()) / std::max(seconds, 1e-9);
    OrderedJson line;
    line["step"] = now.step;
    line["epoch"] = static_cast<double>(now.step * options.batch) / static_cast<double>(data.sequences());
    line["loss"] = now.last_loss;
    line["cross_entropy"] = sums.cross_entropy / tokens;
    if (teacher != nullptr) {
      line["kl"] = sums.divergence / tokens;
      if (teacher->width() > 0) line["kl_top"] = teacher->width();
    }
    line["accuracy"] = static_cast<double>(sums.agreements) / tokens;
    line["scored_tokens"] = sums.tokens;
    line["tokens"] = now.tokens;
    line["learning_rate"] = rate;
    line["gradient_norm"] = norm;
    line["seconds"] = seconds;
    line["tokens_per_second"] = speed;
    write_line(line);
    const bool last = now.step == options.schedule.steps;
    if (!last && now.step != first_step + 1 && seconds_since(reported) < options.report_seconds) return;
    reported = Clock::now();
    const double each = seconds_since(started) / static_cast<double>(now.step - first_step);
    emit_progress("finetune", "step", static_cast<double>(now.step), static_cast<double>(options.schedule.steps),
                  1 / std::max(each, 1e-9));
    spdlog::info("step {}/{}: loss {:.4f}{}, {:.0f} tokens/s, rate {:.3g}, gradient norm {:.3g}, {} resident, {} left",
                 now.step, options.schedule.steps, now.last_loss,
                 teacher != nullptr ? fmt::format(" (KL {:.4f})", sums.divergence / tokens) : std::string(), speed,
                 rate, norm, human_bytes(static_cast<double>(peak_resident_bytes())),
                 human_seconds(each * static_cast<double>(options.schedule.steps - now.step)));
  }

  const TrainState& run(const std::function<bool()>& stop_requested) {
    const bool resumed = saved >= 0;
    open_lines(resumed);
    started = counted = reported = Clock::now();
    first_step = now.step;
    const fs::path stop_file = options.folder / "STOP";
    if (!resumed) validate();
    while (now.step < options.schedule.steps && !now.early) {
      const auto step_start = Clock::now();
      const std::int64_t step = now.step + 1;
      optimizer.zero_gradients();
      std::string broken;
      const LossSums own = add_gradients(step, broken);
      double stop = stop_requested && stop_requested() ? 1 : 0;
      std::error_code code;
      if (world.root() && fs::exists(stop_file, code)) stop = 1;
      const LossSums sums = summed(own, &stop);
      const double loss = sums.loss(options.loss);
      if (!std::isfinite(sums.cross_entropy) || !std::isfinite(loss)) give_up(step, broken, "loss", loss);
      const double norm = optimizer.gradient_norm();
      if (!std::isfinite(norm)) give_up(step, broken, "norm of the gradient", norm);
      const double rate = options.schedule.rate(step);
      optimizer.step(rate, options.clip > 0 && norm > options.clip ? options.clip / norm : 1.0);
      now.step = step;
      now.tokens += options.batch * data.length();
      now.last_loss = loss;
      set_latest_progress("finetune", "step", static_cast<double>(now.step),
                          static_cast<double>(options.schedule.steps));
      test_point("progress finetune");
      report_step(sums, rate, norm, seconds_since(step_start));
      const bool last = now.step == options.schedule.steps;
      if (last || (options.validate_every > 0 && now.step % options.validate_every == 0)) {
        validate();
        now.early = options.patience > 0 && now.worse >= options.patience && !last;
        if (now.early && world.root())
          spdlog::info("step {}: {} validations without a better one; training ends here", now.step, now.worse);
      }
      if (stop > 0 && !last && !now.early) {
        save();
        throw Stopped(fmt::format("stopped on request after step {} of {}, saved in {}", now.step,
                                  options.schedule.steps, step_folder(now.step).string()));
      }
      if (options.checkpoint_every > 0 && now.step % options.checkpoint_every == 0) save();
    }
    save();
    return now;
  }

  std::int64_t take_best() {
    if (now.best_step < 0) return now.step;
    TensorSource values;
    const fs::path folder = best_folder(now.best_step);
    std::int64_t found = 1;
    world.on_root([&] {
      try {
        values = stored_tensors(folder / "parameters.safetensors", model.parameters());
      } catch (const Error& error) {
        spdlog::warn("the best step's weights cannot be read, the last step's are used instead: {}", error.what());
        found = 0;
      }
    });
    world.broadcast(std::as_writable_bytes(std::span(&found, 1)));
    if (found == 0) return now.step;
    optimizer.restore_values(values, folder.string());
    return now.best_step;
  }
};

Trainer::Trainer(const comm::Communicator& world, TrainableModel& model, const Dataset& data, const Dataset* validation,
                 const Teacher* teacher, const Teacher* validation_teacher, TrainOptions options)
    : state_(std::make_unique<State>(world, model, data, validation, teacher, validation_teacher, std::move(options))) {
}
Trainer::~Trainer() = default;
bool Trainer::resume() {
  return state_->resume();
}
const TrainState& Trainer::run(const std::function<bool()>& stop_requested) {
  return state_->run(stop_requested);
}
std::int64_t Trainer::take_best() {
  return state_->take_best();
}
const TrainState& Trainer::state() const {
  return state_->now;
}

}  // namespace headfold::finetune
