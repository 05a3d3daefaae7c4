#pragma once
// Where a job's time goes: seconds by kind of work, summed over threads.

#include <cstdint>
#include <string>
#include <vector>

namespace headfold {

/// Kinds of work that are timed apart.
enum class Work { read_weights, read_statistics, moments, products, eigen, new_weights, copying, writing, sync, other };
std::string name_of(Work);

/// Times its own scope on its thread, less the scopes inside it: every second counts once. Cheap (four clock reads) and
/// safe on any thread. Processor time is that of the thread itself.
class Timed {
 public:
  explicit Timed(Work work);
  ~Timed();
  Timed(const Timed&) = delete;
  Timed& operator=(const Timed&) = delete;

 private:
  /// Nanoseconds on the wall and of the processor.
  struct Moment {
    std::int64_t wall, processor;
  };
  static Moment now();
  static void count(Work work, const Moment& since, const Moment& until);
  Work work_;
  Timed* outer_;
  Moment since_;
};

struct Spent {
  std::string work;                   ///< name_of(Work)
  double seconds, processor_seconds;  ///< waiting for a disk or a core is part of the first only
};
/// Spent since the process began, by all threads that timed something, in the order of Work.
std::vector<Spent> profile();

}  // namespace headfold
