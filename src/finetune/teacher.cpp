#include <headfold/base/error.h>
#include <headfold/base/files.h>
#include <headfold/base/log.h>
#include <headfold/finetune/teacher.h>
#include <headfold/tokenizer/tokenizer.h>

#include <fstream>

namespace headfold::finetune {
namespace {

constexpr const char* kFormat = "headfold-teacher-cache";
constexpr const char* kVersion = "1";

LoraOptions nothing_trains() {
  LoraOptions options;
  options.targets.clear();
  options.dropout = 0;
  return options;
}

std::vector<checkpoint::TensorSpec> specs(const Dataset& data, std::int64_t width) {
  const std::vector<std::int64_t> shape = {data.sequences(), data.length(), width};
  return {{"log_probs", "F32", shape}, {"tokens", "I32", shape}};
}

std::map<std::string, std::string> metadata(const Dataset& data, std::int64_t width, std::int64_t vocab,
                                            const std::string& teacher) {
  return {{"format", kFormat},
          {"version", kVersion},
          {"data", data.fingerprint()},
          {"vocab", fmt::format("{}", vocab)},
          {"width", fmt::format("{}", width)},
          {"teacher", teacher}};
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

CachedTeacher::CachedTeacher(const std::filesystem::path& path, const Dataset& data, std::int64_t vocab,
                             const std::string& teacher)
    : file_(path), length_(data.length()) {
  const auto value = [&](const char* key) {
    const auto found = file_.metadata().find(key);
    return found == file_.metadata().end() ? std::string("nothing") : found->second;
  };
  const auto expect = [&](const char* key, const std::string& expected, const char* what) {
    if (value(key) != expected)
      throw InputError(fmt::format("{}: {} is {}, expected {}", path.string(), what, value(key), expected),
                       "remove the file and run again with --teacher to make it anew");
  };
  expect("format", kFormat, "its format");
  expect("version", kVersion, "its version");
  expect("data", data.fingerprint(), "the fingerprint of the data it was made from");
  expect("vocab", fmt::format("{}", vocab), "the teacher's vocabulary");
  if (!teacher.empty()) expect("teacher", teacher, "the fingerprint of its teacher");
  teacher_ = value("teacher");
  const std::vector<std::int64_t> shape = file_.info("log_probs").shape;
  if (shape.size() != 3 || shape[0] != data.sequences() || shape[1] != length_ || shape[2] < 1 || shape[2] > vocab ||
      file_.info("tokens").shape != shape || file_.info("log_probs").dtype != "F32" ||
      file_.info("tokens").dtype != "I32")
    throw CorruptFile(
        path.string(),
        fmt::format("log_probs {} and tokens {} do not fit {} sequences of {} tokens", checkpoint::shape_text(shape),
                    checkpoint::shape_text(file_.info("tokens").shape), data.sequences(), length_));
  width_ = shape[2];
  log_probs_ = file_.view("log_probs");
  tokens_ = file_.view("tokens");
}

TeacherView CachedTeacher::view(const Batch& batch, std::span<const std::int64_t> sequences) const {
  std::vector<at::Tensor> log_probs, tokens;
  for (const std::int64_t sequence : sequences) {
    log_probs.push_back(log_probs_.select(0, sequence));
    tokens.push_back(tokens_.select(0, sequence));
  }
  const at::Tensor scored = batch.targets.reshape({-1}).ge(0).nonzero().squeeze(1);
  TeacherView view;
  view.top_log_probs = at::cat(log_probs).index_select(0, scored);
  view.top_tokens = at::cat(tokens).index_select(0, scored).to(at::kLong);
  return view;
}

std::uint64_t teacher_cache_bytes(const Dataset& data, std::int64_t width) {
  return checkpoint::lay_out(specs(data, width), metadata(data, width, 1, std::string(64, '0'))).file_bytes;
}

void write_teacher_cache(const comm::Communicator& world, const std::filesystem::path& path, const LiveTeacher& teacher,
                         const std::string& fingerprint, const Dataset& data, std::int64_t width,
                         std::int64_t micro_batch, const std::function<void(double)>& advance) {
  const std::int64_t vocab = teacher.model().config().vocab;
  width = std::min(width, vocab);
  const auto tensors = specs(data, width);
  const checkpoint::SafetensorsLayout layout = checkpoint::lay_out(tensors, metadata(data, width, vocab, fingerprint));
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
    for (std::int64_t block = world.rank(); block < blocks && file; block += world.size()) {
      std::vector<std::int64_t> sequences;
      for (std::int64_t s = block * micro_batch; s < std::min(data.sequences(), (block + 1) * micro_batch); ++s)
        sequences.push_back(s);
      const Batch batch = data.batch(sequences);
      const TeacherView view = teacher.view(batch, sequences);
      const at::Tensor scored = batch.targets.reshape({-1}).ge(0).nonzero().squeeze(1);
      const auto rows = static_cast<std::int64_t>(sequences.size());
      at::Tensor log_probs = at::zeros({rows * data.length(), width}, at::kFloat);
      at::Tensor tokens = at::zeros({rows * data.length(), width}, at::kInt);
      const std::int64_t chunk = std::max<std::int64_t>(1, (std::int64_t{16} << 20) / vocab);
      for (std::int64_t begin = 0; begin < scored.numel(); begin += chunk) {
        const std::int64_t end = std::min(scored.numel(), begin + chunk);
        const auto [top, which] =
            at::topk(at::log_softmax(view.logits(begin, end).to(at::kFloat), -1), width, -1, true, true);
        log_probs.index_copy_(0, scored.slice(0, begin, end), top);
        tokens.index_copy_(0, scored.slice(0, begin, end), which.to(at::kInt));
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
    if (!file) failure = fmt::format("rank {} cannot write to it", world.rank());
  }
  for (const std::string& message : world.all_gather(failure))
    if (!message.empty()) throw IoError(temporary.string(), message, "is the disk full? do all ranks see this folder?");
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
