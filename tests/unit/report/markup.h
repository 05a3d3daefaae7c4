#pragma once
// A tiny checker of XML: enough to say whether a figure is well-formed.

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace headfold::testing_support {

/// What is wrong with `xml`, or nothing. Checks that elements nest and close, attributes are quoted and unique, one
/// root stands alone, text holds no bare < or &.
inline std::optional<std::string> xml_error(std::string_view xml) {
  const auto entity_ok = [](std::string_view text) -> bool {
    for (std::size_t at = text.find('&'); at != std::string_view::npos; at = text.find('&', at + 1)) {
      const std::size_t end = text.find(';', at);
      if (end == std::string_view::npos) return false;
      const std::string_view name = text.substr(at + 1, end - at - 1);
      if (name != "amp" && name != "lt" && name != "gt" && name != "quot" && name != "apos" && name != "#39")
        return false;
    }
    return true;
  };
  const auto name_char = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == ':';
  };
  std::vector<std::string> open;
  std::size_t at = 0;
  bool root = false;
  while (at < xml.size()) {
    if (xml[at] != '<') {
      const std::size_t end = std::min(xml.find('<', at), xml.size());
      const std::string_view text = xml.substr(at, end - at);
      if (open.empty() && text.find_first_not_of(" \n") != std::string_view::npos)
        return "text outside the root: " + std::string(text);
      if (text.find('>') != std::string_view::npos || !entity_ok(text))
        return "bare markup in text: " + std::string(text);
      at = end;
      continue;
    }
    const bool closing = xml.substr(at).starts_with("</");
    at += closing ? 2 : 1;
    std::string name;
    while (at < xml.size() && name_char(xml[at])) name += xml[at++];
    if (name.empty()) return "an element without a name at " + std::to_string(at);
    std::vector<std::string> attributes;
    bool self_closing = false;
    while (true) {
      const std::size_t before = at;
      while (at < xml.size() && xml[at] == ' ') ++at;
      if (at >= xml.size()) return "<" + name + " is never finished";
      if (xml[at] == '>') break;
      if (xml.substr(at).starts_with("/>")) {
        self_closing = true;
        ++at;
        break;
      }
      if (before == at) return "no blank before an attribute of <" + name;
      std::string attribute;
      while (at < xml.size() && name_char(xml[at])) attribute += xml[at++];
      if (attribute.empty() || !xml.substr(at).starts_with("=\""))
        return "attribute '" + attribute + "' of <" + name + " is not name=\"value\"";
      const std::size_t end = xml.find('"', at + 2);
      if (end == std::string_view::npos) return "attribute " + attribute + " is never closed";
      const std::string_view value = xml.substr(at + 2, end - at - 2);
      if (value.find('<') != std::string_view::npos || !entity_ok(value))
        return "bare markup in attribute " + attribute + ": " + std::string(value);
      for (const std::string& other : attributes)
        if (other == attribute) return "attribute " + attribute + " appears twice in <" + name;
      attributes.push_back(attribute);
      at = end + 1;
    }
    ++at;
    if (closing) {
      if (open.empty() || open.back() != name)
        return "</" + name + "> closes " + (open.empty() ? std::string("nothing") : "<" + open.back() + ">");
      open.pop_back();
    } else {
      if (open.empty() && root) return "a second root <" + name + ">";
      root = true;
      if (!self_closing) open.push_back(name);
    }
  }
  if (!open.empty()) return "<" + open.back() + "> is never closed";
  return root ? std::nullopt : std::optional<std::string>("no element at all");
}

/// Every <svg …>…</svg> of a page.
inline std::vector<std::string> svgs_of(const std::string& html) {
  std::vector<std::string> found;
  for (std::size_t at = html.find("<svg"); at != std::string::npos; at = html.find("<svg", at + 1)) {
    const std::size_t end = html.find("</svg>", at);
    if (end == std::string::npos) {
      found.push_back(html.substr(at));
      break;
    }
    found.push_back(html.substr(at, end + 6 - at));
  }
  return found;
}

}  // namespace headfold::testing_support
