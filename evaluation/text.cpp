#include <headfold/evaluation/text.h>

namespace headfold::evaluation {
namespace {

void replace_all(std::string& text, std::string_view from, std::string_view to) {
  std::string result;
  std::size_t at = 0;
  for (std::size_t found = text.find(from); found != std::string::npos; found = text.find(from, at)) {
    result.append(text, at, found - at).append(to);
    at = found + from.size();
  }
  if (at == 0) return;
  result.append(text, at);
  text = std::move(result);
}

/// The regular expression \(\s*([^\)]*?)\s*\) -> (\1) for any pair of delimiters: the first closing one after an
/// opening one ends the match.
void trim_inside(std::string& text, char open, char close) {
  std::string result;
  std::size_t at = 0;
  while (true) {
    const std::size_t begin = text.find(open, at);
    const std::size_t end = begin == std::string::npos ? begin : text.find(close, begin + 1);
    if (end == std::string::npos) break;
    result.append(text, at, begin + 1 - at)
        .append(strip(std::string_view(text).substr(begin + 1, end - begin - 1)))
        .push_back(close);
    at = end + 1;
  }
  result.append(text, at);
  text = std::move(result);
}

/// The harness's re.sub(r"/' [0-9]/", r"/'[0-9]/"): its replacement is a literal, kept as it is.
void replace_quoted_digit(std::string& text) {
  constexpr std::string_view kBefore = "/' ";
  for (std::size_t at = text.find(kBefore); at != std::string::npos; at = text.find(kBefore, at)) {
    if (at + 4 < text.size() && text[at + 3] >= '0' && text[at + 3] <= '9' && text[at + 4] == '/')
      text.replace(at, 5, "/'[0-9]/");
    at += 3;
  }
}

bool starts_page(std::string_view line) {
  std::string text(line);
  replace_all(text, "= = =", "===");
  replace_all(text, "= =", "==");
  const std::string_view bare = strip(text);
  return bare.starts_with("= ") && bare.ends_with(" =");
}

}  // namespace

std::size_t leading_space_bytes(std::string_view text) {
  if (text.empty()) return 0;
  const auto byte = [&](std::size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0U; };
  const unsigned first = byte(0);
  if (first == 0x20 || (first >= 0x09 && first <= 0x0D) || (first >= 0x1C && first <= 0x1F)) return 1;
  if (first == 0xC2) return byte(1) == 0x85 || byte(1) == 0xA0 ? 2 : 0;
  if (first == 0xE1) return byte(1) == 0x9A && byte(2) == 0x80 ? 3 : 0;
  if (first == 0xE2 && byte(1) == 0x80) {
    const unsigned last = byte(2);
    return (last >= 0x80 && last <= 0x8A) || last == 0xA8 || last == 0xA9 || last == 0xAF ? 3 : 0;
  }
  if (first == 0xE2 && byte(1) == 0x81) return byte(2) == 0x9F ? 3 : 0;
  if (first == 0xE3) return byte(1) == 0x80 && byte(2) == 0x80 ? 3 : 0;
  return 0;
}

std::string_view strip(std::string_view text) {
  while (const std::size_t bytes = leading_space_bytes(text)) text.remove_prefix(bytes);
  while (!text.empty()) {
    std::size_t start = text.size() - 1;  // of the last UTF-8 character
    while (start > 0 && (static_cast<unsigned char>(text[start]) & 0xC0U) == 0x80U) --start;
    const std::size_t bytes = leading_space_bytes(text.substr(start));
    if (bytes == 0 || bytes != text.size() - start) break;
    text.remove_suffix(bytes);
  }
  return text;
}

std::vector<std::string> wikitext_pages(std::string_view raw) {
  std::vector<std::string> pages;
  std::string page;
  bool fresh = true;  // no line of this page yet
  const auto close_page = [&] {
    if (!strip(page).empty()) pages.push_back(std::move(page));
    page.clear();
    fresh = true;
  };
  for (std::size_t at = 0; at <= raw.size();) {
    const std::size_t end = std::min(raw.find('\n', at), raw.size());
    const std::string_view line = raw.substr(at, end - at);
    if (starts_page(line)) close_page();
    if (!fresh) page.push_back('\n');
    page.append(line);
    fresh = false;
    at = end + 1;
  }
  close_page();
  return pages;
}

std::string wikitext_detokenize(std::string_view page) {
  std::string text(page);
  replace_all(text, "s '", "s'");
  replace_quoted_digit(text);
  replace_all(text, " @-@ ", "-");
  replace_all(text, " @,@ ", ",");
  replace_all(text, " @.@ ", ".");
  replace_all(text, " : ", ": ");
  replace_all(text, " ; ", "; ");
  replace_all(text, " . ", ". ");
  replace_all(text, " ! ", "! ");
  replace_all(text, " ? ", "? ");
  replace_all(text, " , ", ", ");
  trim_inside(text, '(', ')');
  trim_inside(text, '[', ']');
  trim_inside(text, '{', '}');
  trim_inside(text, '"', '"');
  trim_inside(text, '\'', '\'');
  replace_all(text, "= = = =", "====");
  replace_all(text, "= = =", "===");
  replace_all(text, "= =", "==");
  replace_all(text, " \xC2\xB0 ", "\xC2\xB0");
  replace_all(text, " \n", "\n");
  replace_all(text, "\n ", "\n");
  replace_all(text, " N ", " 1 ");
  replace_all(text, " 's", "'s");
  return text;
}

std::int64_t count_words(std::string_view text) {
  std::int64_t pieces = 1;
  bool in_space = false;
  while (!text.empty()) {
    const std::size_t bytes = leading_space_bytes(text);
    if (bytes > 0 && !in_space) ++pieces;
    in_space = bytes > 0;
    text.remove_prefix(bytes > 0 ? bytes : 1);
  }
  return pieces;
}

std::vector<std::string> text_rows(std::string_view raw) {
  std::vector<std::string> rows;
  for (std::size_t at = 0; at < raw.size();) {
    const std::size_t newline = raw.find('\n', at);
    const std::size_t end = newline == std::string_view::npos ? raw.size() : newline + 1;
    const std::string_view row = raw.substr(at, end - at);
    rows.emplace_back(strip(row).empty() ? std::string_view() : row);
    at = end;
  }
  return rows;
}

std::string join_rows(const std::vector<std::string>& rows) {
  std::string text;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (i > 0) text += "\n\n";
    text += rows[i];
  }
  return text;
}

}  // namespace headfold::evaluation
