#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/base/log.h>
#include <headfold/comm/stopping.h>
#include <headfold/finetune/teacher.h>
#include <headfold/model/compute.h>
#include <headfold/tokenizer/tokenizer.h>

#include <fstream>

#include "teacher_cache.h"

namespace headfold::finetune {
namespace {

LoraOptions nothing_trains() {
  LoraOptions options;
  options.targets.clear();
  options.dropout = 0;
  return options;
}

}  // namespace

LiveTeacher::LiveTeacher(const checkpoint::Reader& reader, at::ScalarType dtype)
    : model_(std::make_unique<TrainableModel>(reader, nothing_trains(), dtype)) {}

TeacherView LiveTeacher::view(const Batch& batch, std::span<const std::int64_t>) const {
  const at::Tensor hidden = model_->hidden(batch);
  TeacherView view;
  view.logits = [this, hidden](std::int64_t begin, std::int64_t end) {
    return model_->logits(hidden.slice(0, begin, end));
  };
  return view;
}

std::int64_t teacher_chunk_rows(std::int64_t vocab) {
  return std::max<std::int64_t>(1, (std::int64_t{16} << 20) / vocab);
}

void write_teacher_cache(const comm::Communicator& world, const std::filesystem::path& path, const LiveTeacher& teacher,
                         const std::string& fingerprint, const Dataset& data, std::int64_t width,
                         std::int64_t micro_batch, const std::function<void(double)>& advance) {
  const std::int64_t vocab = teacher.model().config().vocab;
  width = std::min(width, vocab);
  const auto tensors = teacher_cache_tensors(data, width);
  const checkpoint::SafetensorsLayout layout =
      checkpoint::lay_out(tensors, teacher_cache_metadata(data, width, vocab, fingerprint));
  fs::path temporary = path;
  temporary += ".tmp";
  const auto check = [&](std::ios& stream, const char* what) {
    if (!stream) throw IoError(temporary.string(), fmt::format("cannot {}", what), "is the disk full?");
  };
  world.on_root([&] {
    if (path.has_parent_path()) make_folder(path.parent_path());
    if (free_bytes(path) < layout.file_bytes)
      throw IoError(path.string(),
                    fmt::format("needs {}, but only {} are free", human_bytes(static_cast<double>(layout.file_bytes)),
                                human_bytes(static_cast<double>(free_bytes(path)))),
                    "choose a smaller --teacher-top, or another place for --cache-teacher");
    {
      std::ofstream file(temporary, std::ios::binary | std::ios::trunc);
      check(file, "create it");
      file.write(layout.header.data(), static_cast<std::streamsize>(layout.header.size()));
      file.close();
      check(file, "write to it");
    }
    std::error_code code;
    fs::resize_file(temporary, layout.file_bytes, code);
    if (code) throw IoError(temporary.string(), code.message(), "is the disk full?");
  });
  std::string failure;
  {
    std::fstream file(temporary, std::ios::in | std::ios::out | std::ios::binary);
    const std::int64_t blocks = (data.sequences() + micro_batch - 1) / micro_batch;
    const auto row_bytes = static_cast<std::uint64_t>(data.length() * width * 4);
    // Ranks go along together, so that one that is asked to stop stops all of them.
    for (std::int64_t first = 0; first < blocks && !comm::stop_agreed(world); first += world.size()) {
      const std::int64_t block = first + world.rank();
      if (block >= blocks || !file) continue;
      std::vector<std::int64_t> sequences;
      for (std::int64_t s = block * micro_batch; s < std::min(data.sequences(), (block + 1) * micro_batch); ++s)
        sequences.push_back(s);
      const Batch batch = data.batch(sequences);
      const TeacherView view = teacher.view(batch, sequences);
      const at::Tensor scored = batch.targets.reshape({-1}).ge(0).nonzero().squeeze(1);
      const auto rows = static_cast<std::int64_t>(sequences.size());
      at::Tensor log_probs = at::zeros({rows * data.length(), width}, at::kFloat);
      at::Tensor tokens = at::zeros({rows * data.length(), width}, at::kInt);
      const std::int64_t chunk = teacher_chunk_rows(vocab);
      for (std::int64_t begin = 0; begin < scored.numel(); begin += chunk) {
        const std::int64_t end = std::min(scored.numel(), begin + chunk);
        const auto [top, which] =
            at::topk(at::log_softmax(view.logits(begin, end).to(at::kFloat), -1), width, -1, true, true);
        if (failure.empty() && at::isnan(top).any().item<bool>())
          failure = fmt::format("the teacher gives NaN for sequence {}{}", sequences.front(),
                                rows > 1 ? fmt::format(" or one of the {} after it", rows - 1) : std::string());
        log_probs.index_copy_(0, scored.slice(0, begin, end), model::to_host(top));
        tokens.index_copy_(0, scored.slice(0, begin, end), model::to_host(which).to(at::kInt));
      }
      for (const auto& [tensor, which] : {std::pair{&log_probs, 0}, std::pair{&tokens, 1}}) {
        const std::uint64_t at =
            layout.begin[static_cast<std::size_t>(which)] + static_cast<std::uint64_t>(sequences.front()) * row_bytes;
        file.seekp(static_cast<std::streamoff>(at));
        file.write(static_cast<const char*>(tensor->data_ptr()), static_cast<std::streamsize>(row_bytes) * rows);
      }
      if (advance) advance(std::min(static_cast<double>(rows) * world.size(), static_cast<double>(data.sequences())));
    }
    file.close();
    if (!file && failure.empty()) failure = fmt::format("rank {} cannot write to it", world.rank());
  }
  for (const std::string& message : world.all_gather(failure))
    if (message.starts_with("the teacher")) {
      std::error_code code;
      if (world.root()) fs::remove(temporary, code);
      throw NumericalError(message, "try --dtype float32; if it persists, the teacher's checkpoint is broken");
    } else if (!message.empty())
      throw IoError(temporary.string(), message, "is the disk full? do all ranks see this folder?");
  if (comm::stop_agreed(world)) {
    std::error_code code;
    if (world.root()) fs::remove(temporary, code);
    throw Stopped(fmt::format("stopped on request while writing {}, which is begun again", path.string()));
  }
  world.on_root([&] { publish(temporary, path); });
}

void check_teacher(const std::filesystem::path& student_folder, const checkpoint::ModelConfig& student,
                   const std::filesystem::path& teacher_folder, const checkpoint::ModelConfig& teacher,
                   const std::string& text) {
  if (student.vocab != teacher.vocab)
    throw InputError(fmt::format("{}: the teacher's vocabulary has {} entries, that of {} has {}",
                                 teacher_folder.string(), teacher.vocab, student_folder.string(), student.vocab),
                     "the teacher must be the model that was folded, or one with the same tokenizer");
  const auto own = tokenizer::load_tokenizer(student_folder), other = tokenizer::load_tokenizer(teacher_folder);
  if (own->vocab_size() != other->vocab_size() || own->bos() != other->bos() || own->eos() != other->eos() ||
      own->encode(text) != other->encode(text))
    throw InputError(
        fmt::format("{}: the teacher's tokenizer ({}, {} entries) is another than that of {} ({}, {} entries)",
                    teacher_folder.string(), other->kind(), other->vocab_size(), student_folder.string(), own->kind(),
                    own->vocab_size()),
        "the teacher must be the model that was folded, or one with the same tokenizer");
}

}  // namespace headfold::finetune
