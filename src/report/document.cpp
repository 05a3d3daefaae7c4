#include <fmt/format.h>
#include <headfold/base/error.h>
#include <headfold/report/document.h>
#include <headfold/report/figure.h>
#include <headfold/report/text.h>

namespace headfold::report {
namespace {

/// The marker of a series before its name; decoration, hence hidden from readers that do not see it.
std::string key_svg(int key) {
  static constexpr const char* kShapes[kSeriesColours] = {"M1 5.5a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0Z",
                                                          "M1.5 1.5h8v8h-8Z",
                                                          "M5.5 .5L10.6 9.5H.4Z",
                                                          "M5.5 0L11 5.5L5.5 11L0 5.5Z",
                                                          "M5.5 10.5L.4 1.5H10.6Z",
                                                          "M3.7 .3h3.6v3.4h3.4v3.6h-3.4v3.4h-3.6v-3.4h-3.4v-3.6h3.4Z"};
  return fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"key\" viewBox=\"0 0 11 11\" aria-hidden=\"true\" "
      "style=\"display:inline-block\"><path class=\"dot {}\" d=\"{}\"/></svg>",
      key < 0 ? std::string("cn") : fmt::format("c{}", key % kSeriesColours),
      kShapes[key < 0 ? 0 : key % kSeriesColours]);
}

std::string cell_html(const Cell& cell) {
  std::string text = cell.key >= -1 ? key_svg(cell.key) : std::string();
  text += cell.pill >= 0
              ? fmt::format("<span class=\"pill{}\">{}</span>", cell.pill == 1 ? " yes" : "", escape_markup(cell.text))
              : escape_markup(cell.text);
  if (!cell.small.empty()) text += fmt::format("<small>{}</small>", escape_markup(cell.small));
  return text;
}

}  // namespace

std::string Words::html() const {
  std::string text;
  for (const auto& [part, strong] : parts_)
    text += strong ? "<strong>" + escape_markup(part) + "</strong>" : escape_markup(part);
  return text;
}

std::string Words::markdown() const {
  std::string text;
  for (const auto& [part, strong] : parts_)
    text += strong ? "**" + escape_markdown(part) + "**" : escape_markdown(part);
  return text;
}

std::string Words::plain() const {
  std::string text;
  for (const auto& [part, strong] : parts_) text += part;
  return text;
}

void Document::heading(int level, const std::string& text, const std::string& id) {
  html_ += fmt::format("<h{0}{1}>{2}</h{0}>\n", level,
                       id.empty() ? std::string() : fmt::format(" id=\"{}\"", escape_markup(id)), escape_markup(text));
  markdown_ += fmt::format("\n{} {}\n\n", std::string(static_cast<std::size_t>(level), '#'), escape_markdown(text));
}

void Document::paragraph(const Words& words, const std::string& css) {
  html_ += fmt::format("<p{}>{}</p>\n", css.empty() ? std::string() : fmt::format(" class=\"{}\"", css), words.html());
  markdown_ += words.markdown() + "\n\n";
}

void Document::table_html(const Grid& grid) {
  html_ += fmt::format("<div class=\"scroll\" role=\"region\" tabindex=\"0\" aria-label=\"{}\"><table>\n<thead><tr>",
                       escape_markup(grid.name));
  for (const Column& column : grid.columns)
    html_ +=
        fmt::format("<th scope=\"col\"{}>{}{}</th>", column.number ? " class=\"n\"" : "", escape_markup(column.title),
                    column.small.empty() ? std::string() : "<small>" + escape_markup(column.small) + "</small>");
  html_ += "</tr></thead>\n<tbody>\n";
  for (std::size_t r = 0; r < grid.rows.size(); ++r) {
    html_ += grid.mark_first && r == 0 ? "<tr class=\"first\">" : "<tr>";
    for (std::size_t c = 0; c < grid.columns.size(); ++c) {
      const Cell& cell = grid.rows[r].at(c);
      std::string css = grid.columns[c].number ? "n" : grid.columns[c].wide ? "w" : "";
      if (cell.best) css += css.empty() ? "best" : " best";
      const std::string attribute = css.empty() ? std::string() : fmt::format(" class=\"{}\"", css);
      html_ += c == 0 ? fmt::format("<th scope=\"row\"{}>{}</th>", attribute, cell_html(cell))
                      : fmt::format("<td{}>{}</td>", attribute, cell_html(cell));
    }
    html_ += "</tr>\n";
  }
  html_ += "</tbody></table></div>\n";
}

void Document::table_markdown(const Grid& grid) {
  markdown_ += "|";
  for (const Column& column : grid.columns)
    markdown_ +=
        fmt::format(" {} |", escape_markdown(column.title + (column.small.empty() ? "" : " (" + column.small + ")")));
  markdown_ += "\n|";
  for (const Column& column : grid.columns) markdown_ += column.number ? " ---: |" : " --- |";
  markdown_ += "\n";
  for (const auto& row : grid.rows) {
    markdown_ += "|";
    for (const Cell& cell : row) {
      std::string text = escape_markdown(cell.text);
      if (cell.best) text = fmt::format("**{}**", text);
      if (!cell.small.empty()) text += " (" + escape_markdown(cell.small) + ")";
      markdown_ += " " + text + " |";
    }
    markdown_ += "\n";
  }
  markdown_ += "\n";
}

void Document::table(const Grid& grid) {
  table_html(grid);
  table_markdown(grid);
}

void Document::folded(const std::string& summary, const Grid& grid) {
  html_ += fmt::format("<details><summary>{}</summary>\n", escape_markup(summary));
  table_html(grid);
  html_ += "</details>\n";
  markdown_ += escape_markdown(summary) + ":\n\n";
  table_markdown(grid);
}

void Document::figure(const std::vector<std::string>& svgs, const std::string& panel_css, const Words& caption) {
  html_ += fmt::format("<figure>\n<div class=\"{}\">\n", panel_css);
  for (const std::string& svg : svgs) html_ += "<div>" + svg + "</div>\n";
  html_ += fmt::format("</div>\n<figcaption>{}</figcaption>\n</figure>\n", caption.html());
  markdown_ += fmt::format("*Figure (in index.html):* {}\n\n", caption.markdown());
}

void Document::facts(const std::vector<std::pair<std::string, std::string>>& facts) {
  html_ += "<dl class=\"facts\">\n";
  for (const auto& [name, value] : facts) {
    html_ += fmt::format("<dt>{}</dt><dd>{}</dd>\n", escape_markup(name), escape_markup(value));
    markdown_ += fmt::format("- {}: {}\n", escape_markdown(name), escape_markdown(value));
  }
  html_ += "</dl>\n";
  markdown_ += "\n";
}

void Document::words_explained(const std::vector<std::pair<std::string, std::string>>& entries) {
  html_ += "<dl class=\"words\">\n";
  for (const auto& [name, value] : entries) {
    html_ += fmt::format("<dt>{}</dt><dd>{}</dd>\n", escape_markup(name), escape_markup(value));
    markdown_ += fmt::format("- **{}**: {}\n", escape_markdown(name), escape_markdown(value));
  }
  html_ += "</dl>\n";
  markdown_ += "\n";
}

void Document::code(const std::string& text) {
  // Line ends are the only controls that a code block keeps.
  std::string lines, shown;
  for (std::size_t at = 0; at <= text.size();) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    lines += escape_markup(text.substr(at, end - at)) + "\n";
    shown += "    " + clean_text(text.substr(at, end - at)) + "\n";
    at = end + 1;
  }
  html_ += "<pre><code>" + lines + "</code></pre>\n";
  markdown_ += shown + "\n";
}

void Document::missing(const std::vector<std::string>& sentences, const std::string& title) {
  if (sentences.empty()) return;
  html_ += fmt::format("<div class=\"missing\"><strong>{}</strong><ul>\n", escape_markup(title));
  markdown_ += fmt::format("**{}**\n\n", escape_markdown(title));
  for (const std::string& sentence : sentences) {
    html_ += "<li>" + escape_markup(sentence) + "</li>\n";
    markdown_ += "- " + escape_markdown(sentence) + "\n";
  }
  html_ += "</ul></div>\n";
  markdown_ += "\n";
}

}  // namespace headfold::report
