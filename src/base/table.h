#pragma once
// Plain-text tables for the terminal and for Markdown.

#include <string>
#include <vector>

namespace headfold {

/// Collects rows and prints them with aligned columns. Columns whose cells are all numbers are right-aligned.
class Table {
 public:
  explicit Table(std::vector<std::string> header) : header_(std::move(header)) {}
  /// Adds a row; it must have as many cells as the header (InternalError otherwise).
  void add(std::vector<std::string> row);
  std::string text() const;
  std::string markdown() const;
  std::string csv() const;
  const std::vector<std::string>& header() const { return header_; }
  const std::vector<std::vector<std::string>>& rows() const { return rows_; }

 private:
  std::vector<std::string> header_;
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace headfold
