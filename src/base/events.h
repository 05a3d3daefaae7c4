#pragma once
// Events of a job for programs to read: one JSON object per line, appended to a file that several jobs may share.

#include <headfold/base/json.h>

#include <filesystem>
#include <string>
#include <string_view>

namespace headfold {

/// Where events go and what they say about their job.
struct EventStream {
  std::filesystem::path file;  ///< empty: nowhere
  std::string stage;           ///< the user's name for this job
  std::string job;             ///< the sub-command
  bool speaks = true;          ///< whether this process writes ordinary events (rank 0)
};

/// From here on events go to `stream`; an empty one ends that. Missing parent folders are made by the rank that speaks
/// (IoError).
void set_event_stream(EventStream stream);
const EventStream& event_stream();

/// Appends {"time", "stage", "job", "event", ..., "resident_bytes"} with `fields` in between: UNIX seconds, the
/// stream's names, `event`, memory of this process. Written by the process that speaks, by any with `anyone` (a failing
/// rank speaks for itself). One write() to a file opened for appending, so that lines of several processes do not mix.
/// A file that cannot be written costs a warning, once: no job fails for its events. Safe on any thread.
void emit_event(std::string_view event, const OrderedJson& fields = OrderedJson::object(), bool anyone = false);

}  // namespace headfold
