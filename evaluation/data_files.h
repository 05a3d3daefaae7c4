#pragma once
// Data sets as files: JSON lines, JSON lists, CSV, TSV and label files, with errors that name file, line and field.

#include <headfold/base/json.h>

#include <cstdint>
#include <filesystem>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace headfold::evaluation {

/// A document as it stands in a file.
struct Record {
  OrderedJson fields;  ///< an object, keys in the file's order
  std::string where;   ///< "FILE, line 12", for messages
};

/// A file's text without a byte order mark before it. Throws IoError (longer than `max_bytes` too); CorruptFile
/// (invalid UTF-8: file and line).
std::string read_text(const std::filesystem::path& file, std::uint64_t max_bytes = std::uint64_t{1} << 32);

/// parse_json() whose messages are UTF-8 whatever the text is: bytes of it that are cut out of a character are written
/// as \xNN. Throws CorruptFile.
Json parse_text(std::string_view text, const std::string& where);

/// Objects of a file: one per line, or a JSON list of them when the file begins with "[". Blank lines are passed over.
/// Throws IoError; CorruptFile (broken JSON, invalid UTF-8, a key twice in an object; file and line); InputError (not
/// an object, no object at all).
std::vector<Record> read_records(const std::filesystem::path& file);

/// One row of a table.
struct TableRow {
  std::vector<std::string> cells;
  std::string where;  ///< with the number of the row's first line
};
/// RFC 4180: comma, quoted cells with doubled quotes and line breaks, CRLF or LF. Throws IoError; CorruptFile (a quote
/// that is not closed or followed by text, invalid UTF-8); InputError for an empty file.
std::vector<TableRow> read_csv(const std::filesystem::path& file);
/// Cells between tabs, rows between line breaks, no quoting.
std::vector<TableRow> read_tsv(const std::filesystem::path& file);

/// Lines of a file of labels, white space stripped, blank ones at the end left out. Each is to be a number from `first`
/// to `last` and the result is counted from 0. `documents` of them are expected. Throws IoError, InputError (file,
/// line).
std::vector<std::int64_t> read_labels(const std::filesystem::path& file, std::int64_t first, std::int64_t last,
                                      std::size_t documents);

/// The text, list of texts or number in a field. InputError naming place and key when it is absent or of another type.
std::string text_field(const Record& record, const std::string& key);
std::vector<std::string> text_list_field(const Record& record, const std::string& key);
/// A number, or a text that is one ("1"), from `first` to `last`; true and false, bare or as texts, are 1 and 0 where
/// both are allowed.
/// InputError naming place, key, what was expected and found.
std::int64_t number_field(const Record& record, const std::string& key, std::int64_t first, std::int64_t last);
/// The object in a field, as a record of its own for messages.
Record object_field(const Record& record, const std::string& key);
bool has_field(const Record& record, const std::string& key);

/// Refuses the second document of an id, and a document without one among others that have one.
class UniqueIds {
 public:
  /// Ids are compared by their JSON text. InputError naming place, field and value.
  void check(const Record& record, const std::string& key);

 private:
  std::set<std::string> seen_;
  std::string without_;  ///< place of the first document without an id
};

/// A value's JSON text, cut for a message.
std::string shown(const OrderedJson& value);

}  // namespace headfold::evaluation
