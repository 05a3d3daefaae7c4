#pragma once
// A page under construction: every block is written as HTML and as Markdown at once. Private to src/report.

#include <string>
#include <utility>
#include <vector>

namespace headfold::report {

/// A sentence with strong parts; escaped when it is written.
class Words {
 public:
  Words() = default;
  Words(const char* text) { add(text); }         // NOLINT(google-explicit-constructor): plain text is words
  Words(const std::string& text) { add(text); }  // NOLINT(google-explicit-constructor)
  Words& add(const std::string& text) { return put(text, false); }
  Words& strong(const std::string& text) { return put(text, true); }
  std::string html() const;
  std::string markdown() const;
  std::string plain() const;
  bool empty() const { return parts_.empty(); }

 private:
  Words& put(const std::string& text, bool strong) {
    parts_.emplace_back(text, strong);
    return *this;
  }
  std::vector<std::pair<std::string, bool>> parts_;
};

struct Cell {
  std::string text = {};
  std::string small = {};  ///< a second, quieter line
  bool best = false;
  int pill = -1;  ///< 0 / 1: text in a pill that means no / yes
  int key = -2;   ///< marker of series `key` (>= 0), of the original (-1), none (-2)
};

struct Column {
  std::string title, small = {};
  bool number = false;
  bool wide = false;  ///< long texts: give it room
};

struct Grid {
  std::string name;  ///< for readers that do not see it
  std::vector<Column> columns;
  std::vector<std::vector<Cell>> rows;
  bool mark_first = false;  ///< the first row is what the others are compared with
};

class Document {
 public:
  void html(const std::string& raw) { html_ += raw; }
  void heading(int level, const std::string& text, const std::string& id = {});
  void paragraph(const Words& words, const std::string& css = {});
  void table(const Grid& grid);
  /// A table that HTML readers open.
  void folded(const std::string& summary, const Grid& grid);
  void figure(const std::vector<std::string>& svgs, const std::string& panel_css, const Words& caption);
  void facts(const std::vector<std::pair<std::string, std::string>>& facts);
  void words_explained(const std::vector<std::pair<std::string, std::string>>& entries);
  void code(const std::string& text);
  void missing(const std::vector<std::string>& sentences, const std::string& title = "Not in this run");
  const std::string& html() const { return html_; }
  const std::string& markdown() const { return markdown_; }

 private:
  void table_html(const Grid& grid);
  void table_markdown(const Grid& grid);
  std::string html_, markdown_;
};

}  // namespace headfold::report
