#pragma once
// Teachers: a model in memory, or its most probable tokens from a file.

#include <headfold/checkpoint/safetensors.h>
#include <headfold/finetune/data.h>
#include <headfold/finetune/trainable.h>

#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>

namespace headfold::finetune {

class Teacher {
 public:
  virtual ~Teacher() = default;
  /// What the teacher says about `batch`, which Dataset::batch made from `sequences`. Good until the next call.
  virtual TeacherView view(const Batch& batch, std::span<const std::int64_t> sequences) const = 0;
  /// Most probable tokens per position that it speaks of, the rest as one class; 0: the whole vocabulary.
  virtual std::int64_t width() const { return 0; }
};

/// A model whose nothing trains, in memory beside the student.
class LiveTeacher : public Teacher {
 public:
  LiveTeacher(const checkpoint::Reader& reader, at::ScalarType dtype);
  TeacherView view(const Batch& batch, std::span<const std::int64_t> sequences) const override;
  const TrainableModel& model() const { return *model_; }

 private:
  std::unique_ptr<TrainableModel> model_;
};

/// Log-probabilities of the k most probable tokens of every scored position of a data set (docs/formats.md, "Teacher
/// cache").
class CachedTeacher : public Teacher {
 public:
  /// Throws InputError naming file, expected and found when the file was made from other data or for another
  /// vocabulary, or (with `teacher` not empty) by a teacher of another fingerprint; CorruptFile.
  CachedTeacher(const std::filesystem::path& file, const Dataset& data, std::int64_t vocab, const std::string& teacher);
  /// CorruptFile naming file, sequence and position for log-probabilities and tokens that no teacher gives.
  TeacherView view(const Batch& batch, std::span<const std::int64_t> sequences) const override;
  std::int64_t width() const override { return width_; }
  const std::string& teacher() const { return teacher_; }

 private:
  void check_rows(std::int64_t sequence, const at::Tensor& log_probs, const at::Tensor& tokens) const;
  checkpoint::SafetensorsFile file_;
  std::int64_t length_, vocab_, width_ = 0;
  std::string teacher_;
  at::Tensor log_probs_, tokens_;  // views of the file
};

/// The file beside `file` that holds the same for the validation text: NAME-validation.safetensors.
std::filesystem::path validation_cache(const std::filesystem::path& file);

/// Bytes of such a file.
std::uint64_t teacher_cache_bytes(const Dataset& data, std::int64_t width);

/// Positions whose logits are formed at a time while such a file is written: 64 MiB of them.
std::int64_t teacher_chunk_rows(std::int64_t vocab);

/// Runs every sequence of `data` through `teacher` and writes its `width` most probable tokens by position. Ranks share
/// the sequences; the file appears when it is complete. Collective. `advance` is called on every rank with the
/// sequences just finished over all ranks (estimated). IoError, also when the space does not suffice.
void write_teacher_cache(const comm::Communicator& world, const std::filesystem::path& file, const LiveTeacher& teacher,
                         const std::string& fingerprint, const Dataset& data, std::int64_t width,
                         std::int64_t micro_batch, const std::function<void(double)>& advance = {});

/// Throws InputError unless teacher and student have the same vocabulary and, as far as `text` can show, the same
/// tokenizer. Reads both folders' tokenizers.
void check_teacher(const std::filesystem::path& student_folder, const checkpoint::ModelConfig& student,
                   const std::filesystem::path& teacher_folder, const checkpoint::ModelConfig& teacher,
                   const std::string& text);

}  // namespace headfold::finetune
