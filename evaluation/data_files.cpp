#include <headfold/base/files.h>
#include <headfold/evaluation/data_files.h>
#include <headfold/evaluation/text.h>
#include <headfold/tokenizer/utf8.h>

#include <charconv>
#include <optional>

namespace headfold::evaluation {
namespace {

std::string line_of(const fs::path& file, std::int64_t line) {
  return fmt::format("{}, line {}", file.string(), line);
}

/// Parsed twice: the strict parser of base finds keys that appear twice but forgets their order.
OrderedJson parse_ordered(std::string_view text, const std::string& where) {
  parse_text(text, where);
  return OrderedJson::parse(text.begin(), text.end());
}

void check_text(std::string_view text, const fs::path& file) {
  const std::size_t at = tokenizer::invalid_utf8_at(text);
  if (at == std::string_view::npos) return;
  const auto line = 1 + std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(at), '\n');
  throw CorruptFile(line_of(file, line),
                    fmt::format("is not UTF-8: byte 0x{:02X}", static_cast<unsigned char>(text[at])));
}

Record object_record(OrderedJson value, const std::string& where) {
  if (!value.is_object())
    throw InputError(fmt::format("{}: a document is a JSON object, and this is {}", where, shown(value)));
  return {std::move(value), where};
}

std::string_view without_carriage_return(std::string_view line) {
  if (line.ends_with('\r')) line.remove_suffix(1);
  return line;
}

/// Calls `with(line, number)` for every line, without its break.
template <class F>
void for_each_line(std::string_view text, F&& with) {
  std::int64_t number = 1;
  for (std::size_t at = 0; at < text.size(); ++number) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    with(without_carriage_return(text.substr(at, end - at)), number);
    at = end + 1;
  }
}

void refuse_empty(bool empty, const fs::path& file) {
  if (empty) throw InputError(fmt::format("{} holds no document", file.string()));
}

std::optional<std::int64_t> parse_number(std::string_view text) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

}  // namespace

std::string shown(const OrderedJson& value) {
  const std::string text = value.dump(-1, ' ', true, OrderedJson::error_handler_t::replace);
  return text.size() > 80 ? text.substr(0, 77) + "..." : text;
}

std::string read_text(const fs::path& file, std::uint64_t max_bytes) {
  std::string text = read_file(file, max_bytes);
  check_text(text, file);
  if (text.starts_with("\xEF\xBB\xBF")) text.erase(0, 3);
  return text;
}

Json parse_text(std::string_view text, const std::string& where) {
  try {
    return parse_json(text, where);
  } catch (const CorruptFile& error) {
    std::string_view said = error.what();
    if (tokenizer::invalid_utf8_at(said) == std::string_view::npos) throw;
    said.remove_prefix(std::min(where.size() + 2, said.size()));  // CorruptFile puts the place there itself
    std::string readable;
    for (std::size_t at = tokenizer::invalid_utf8_at(said); at != std::string_view::npos;
         at = tokenizer::invalid_utf8_at(said)) {
      readable += fmt::format("{}\\x{:02X}", said.substr(0, at), static_cast<unsigned char>(said[at]));
      said.remove_prefix(at + 1);
    }
    throw CorruptFile(where, readable.append(said));
  }
}

std::vector<Record> read_records(const fs::path& file) {
  const std::string text = read_text(file);
  std::vector<Record> records;
  const std::string_view bare = strip(text);
  if (bare.starts_with('[')) {
    OrderedJson list = parse_ordered(text, file.string());
    for (std::size_t i = 0; i < list.size(); ++i)
      records.push_back(object_record(std::move(list[i]), fmt::format("{}, document {}", file.string(), i + 1)));
  } else {
    for_each_line(text, [&](std::string_view line, std::int64_t number) {
      if (strip(line).empty()) return;
      const std::string where = line_of(file, number);
      records.push_back(object_record(parse_ordered(line, where), where));
    });
  }
  refuse_empty(records.empty(), file);
  return records;
}

std::vector<TableRow> read_csv(const fs::path& file) {
  const std::string text = read_text(file);
  std::vector<TableRow> rows;
  std::int64_t line = 1;
  for (std::size_t at = 0; at < text.size();) {
    TableRow row;
    row.where = line_of(file, line);
    bool more = true;
    while (more) {
      std::string cell;
      if (at < text.size() && text[at] == '"') {
        ++at;
        while (true) {
          if (at >= text.size()) throw CorruptFile(row.where, "a quoted cell is not closed");
          if (text[at] == '"') {
            if (at + 1 < text.size() && text[at + 1] == '"') {
              ++at;
            } else {
              break;
            }
          }
          if (text[at] == '\n') ++line;
          cell.push_back(text[at++]);
        }
        ++at;
        if (at < text.size() && text[at] == '\r' && at + 1 < text.size() && text[at + 1] == '\n') ++at;
        if (at < text.size() && text[at] != ',' && text[at] != '\n')
          throw CorruptFile(row.where, "text follows the closing quote of a cell");
      } else {
        const std::size_t end = std::min(text.find_first_of(",\n", at), text.size());
        cell = text.substr(at, end - at);
        if ((end == text.size() || text[end] == '\n') && cell.ends_with('\r')) cell.pop_back();
        at = end;
      }
      row.cells.push_back(std::move(cell));
      more = at < text.size() && text[at] == ',';
      ++at;
    }
    ++line;
    if (row.cells.size() > 1 || !row.cells[0].empty()) rows.push_back(std::move(row));
  }
  refuse_empty(rows.empty(), file);
  return rows;
}

std::vector<TableRow> read_tsv(const fs::path& file) {
  const std::string text = read_text(file);
  std::vector<TableRow> rows;
  for_each_line(text, [&](std::string_view line, std::int64_t number) {
    if (strip(line).empty()) return;
    TableRow row;
    row.where = line_of(file, number);
    for (std::size_t at = 0; at <= line.size();) {
      const std::size_t end = std::min(line.find('\t', at), line.size());
      row.cells.emplace_back(line.substr(at, end - at));
      at = end + 1;
    }
    rows.push_back(std::move(row));
  });
  refuse_empty(rows.empty(), file);
  return rows;
}

std::vector<std::int64_t> read_labels(const fs::path& file, std::int64_t first, std::int64_t last,
                                      std::size_t documents) {
  const std::string text = read_text(file);
  std::vector<std::int64_t> labels;
  std::int64_t blank = 0;  // the line of the first blank one not yet at the end
  for_each_line(text, [&](std::string_view raw, std::int64_t number) {
    const std::string_view line = strip(raw);
    if (line.empty()) {
      if (blank == 0) blank = number;
      return;
    }
    if (blank != 0) throw InputError(fmt::format("{}: a label is missing: the line is blank", line_of(file, blank)));
    const auto value = parse_number(line);
    if (!value || *value < first || *value > last)
      throw InputError(fmt::format("{}: label {} is no number from {} to {}", line_of(file, number),
                                   shown(OrderedJson(line.substr(0, 40))), first, last));
    labels.push_back(*value - first);
  });
  if (labels.size() != documents)
    throw InputError(
        fmt::format("{} has {} labels, and there are {} documents", file.string(), labels.size(), documents),
        "do the two files belong together?");
  return labels;
}

std::string text_field(const Record& record, const std::string& key) {
  return required<std::string>(record.fields, key, record.where);
}

std::vector<std::string> text_list_field(const Record& record, const std::string& key) {
  return required<std::vector<std::string>>(record.fields, key, record.where);
}

std::int64_t number_field(const Record& record, const std::string& key, std::int64_t first, std::int64_t last) {
  const auto found = record.fields.find(key);
  if (found == record.fields.end() || found->is_null())
    throw InputError(fmt::format("{}: key \"{}\" is missing", record.where, key));
  std::optional<std::int64_t> value;
  const bool truth = first <= 0 && last >= 1;
  if (found->is_string()) {
    const auto& text = found->get_ref<const std::string&>();
    value = parse_number(text);
    if (truth && (text == "true" || text == "false")) value = text == "true" ? 1 : 0;
  }
  if (found->is_boolean() && truth) value = found->get<bool>() ? 1 : 0;
  if (json_detail::Holds<std::int64_t>::in(*found)) value = found->get<std::int64_t>();
  if (!value || *value < first || *value > last)
    throw InputError(fmt::format("{}: key \"{}\" is {}, expected a number from {} to {}", record.where, key,
                                 shown(*found), first, last));
  return *value;
}

Record object_field(const Record& record, const std::string& key) {
  const auto found = record.fields.find(key);
  if (found == record.fields.end() || found->is_null())
    throw InputError(fmt::format("{}: key \"{}\" is missing", record.where, key));
  if (!found->is_object())
    throw InputError(fmt::format("{}: key \"{}\" is {}, expected an object", record.where, key, shown(*found)));
  return {*found, fmt::format("{}, in \"{}\"", record.where, key)};
}

bool has_field(const Record& record, const std::string& key) {
  const auto found = record.fields.find(key);
  return found != record.fields.end() && !found->is_null();
}

void UniqueIds::check(const Record& record, const std::string& key) {
  const auto found = record.fields.find(key);
  const bool missing = found == record.fields.end() || found->is_null();
  if (missing && without_.empty()) without_ = record.where;
  if (!without_.empty() && !(missing && seen_.empty()))
    throw InputError(fmt::format("{}: key \"{}\" is missing, and other documents have it", without_, key));
  if (missing) return;
  if (!seen_.insert(found->dump()).second)
    throw InputError(
        fmt::format("{}: key \"{}\" is {}, and an earlier document has the same", record.where, key, shown(*found)));
}

}  // namespace headfold::evaluation
