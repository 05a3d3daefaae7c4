#include <headfold/base/error.h>
#include <headfold/base/table.h>

#include <algorithm>
#include <cctype>

namespace headfold {
namespace {

/// Terminal columns of a UTF-8 text: its code points (all symbols used here are one column wide).
std::size_t columns_of(const std::string& text) {
  return static_cast<std::size_t>(
      std::count_if(text.begin(), text.end(), [](unsigned char c) { return (c & 0xC0) != 0x80; }));
}

bool numeric(const std::string& cell) {
  return cell.empty() || cell == "-" || std::isdigit(static_cast<unsigned char>(cell[0])) != 0 ||
         ((cell[0] == '-' || cell[0] == '+') && cell.size() > 1 &&
          std::isdigit(static_cast<unsigned char>(cell[1])) != 0);
}

std::string csv_cell(const std::string& cell) {
  if (cell.find_first_of(",\"\n\r") == std::string::npos) return cell;
  std::string quoted = "\"";
  for (const char c : cell) {
    if (c == '"') quoted += '"';
    quoted += c;
  }
  return quoted + "\"";
}

}  // namespace

void Table::add(std::vector<std::string> row) {
  if (row.size() != header_.size())
    throw InternalError(fmt::format("table row with {} cells under {} headings", row.size(), header_.size()));
  rows_.push_back(std::move(row));
}

std::string Table::text() const {
  std::vector<std::size_t> width(header_.size());
  std::vector<bool> right(header_.size(), true);
  for (std::size_t c = 0; c < header_.size(); ++c) {
    width[c] = columns_of(header_[c]);
    for (const auto& row : rows_) {
      width[c] = std::max(width[c], columns_of(row[c]));
      right[c] = right[c] && numeric(row[c]);
    }
  }
  const auto line = [&](const std::vector<std::string>& row) {
    std::string text;
    for (std::size_t c = 0; c < row.size(); ++c) {
      const std::string pad(width[c] - columns_of(row[c]), ' ');
      if (c > 0) text += "  ";
      text += right[c] ? pad + row[c] : row[c] + pad;
    }
    while (!text.empty() && text.back() == ' ') text.pop_back();
    return text + "\n";
  };
  std::string text = line(header_);
  for (const auto& row : rows_) text += line(row);
  return text;
}

std::string Table::markdown() const {
  std::string text = "|";
  for (const auto& cell : header_) text += " " + cell + " |";
  text += "\n|";
  for (std::size_t c = 0; c < header_.size(); ++c) text += " --- |";
  text += "\n";
  for (const auto& row : rows_) {
    text += "|";
    for (const auto& cell : row) text += " " + cell + " |";
    text += "\n";
  }
  return text;
}

std::string Table::csv() const {
  std::string text;
  const auto line = [&](const std::vector<std::string>& row) {
    for (std::size_t c = 0; c < row.size(); ++c) text += (c > 0 ? "," : "") + csv_cell(row[c]);
    text += "\n";
  };
  line(header_);
  for (const auto& row : rows_) line(row);
  return text;
}

}  // namespace headfold
