#pragma once
// Figures of a report as inline SVG. Colours come from CSS variables of the page (classes c0 … c5 for series, q0 … q7
// for ordered shades), so that one figure serves light, dark and paper. Every text is escaped here.

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace headfold::report {

/// Number of series colours (each with its own marker) and of ordered shades in the page's style sheet.
inline constexpr int kSeriesColours = 6;
inline constexpr int kShades = 8;

/// Multiples of 1, 2 or 5 × 10^k inside [low, high], at most `most` of them (at least 2 wherever the range allows).
/// Throws InternalError unless low < high, both finite.
std::vector<double> nice_ticks(double low, double high, int most);
/// Ticks of a logarithmic axis inside [low, high], both positive: powers of ten, with 2 and 5 between them when there
/// is room, nice_ticks() when less than three of those fall inside. Throws InternalError unless 0 < low < high.
std::vector<double> log_ticks(double low, double high, int most);

/// One axis: its range, how values map to it, and what is written along it.
struct Axis {
  double low = 0, high = 1;
  bool log = false;
  bool reversed = false;  ///< the high end comes first (left or bottom)
  std::string title;
  std::vector<std::pair<double, std::string>> ticks;
  /// 0 … 1 along the axis; clamped.
  double at(double value) const;
};

/// An axis over `values` (non-finite ones are ignored) with ticks that carry `unit` ("%", "×", may be empty). Linear
/// axes begin at zero when `from_zero`, logarithmic ones are chosen by the caller and need positive values (else the
/// axis is linear).
Axis make_axis(const std::vector<double>& values, std::string title, const std::string& unit, bool log, bool from_zero,
               int ticks = 6);

struct Point {
  double x = 0, y = 0;
  std::string hint;  ///< shown by browsers while the pointer rests on it
};

enum class Marker { none, filled, hollow };

struct Series {
  std::string name;
  std::string label;  ///< written at the last point; empty: none
  int colour = 0;     ///< series colour and marker shape; -1: neutral
  int shade = -1;     ///< ordered shade instead of a series colour when >= 0
  bool line = true;
  bool dashed = false;
  Marker marker = Marker::filled;
  double marker_size = 4.6;  ///< radius
  std::vector<Point> points;
};

/// A diagram of lines and markers.
struct Chart {
  std::string id;     ///< unique on the page
  std::string title;  ///< for readers that do not see it
  std::string description;
  std::string heading;  ///< printed above the plot; may be empty
  double width = 520, height = 330;
  Axis x, y;
  std::vector<Series> series;
  /// Vertical rule with a word, e.g. the width that a fold keeps.
  struct Rule {
    double x = 0;
    std::string label;
  };
  std::vector<Rule> rules;
  /// Thin vertical lines from a point to another (paired values).
  std::vector<std::pair<Point, Point>> stems;
  int stem_colour = 0;
  std::vector<std::string> shade_labels;  ///< two: what the first and the last shade stand for; empty: no key to shades
  std::string svg() const;
};

struct Bar {
  std::string label, detail, value;
  double length = 0;  ///< in any unit, >= 0
  int colour = 0;     ///< -1: neutral
};

/// Horizontal bars, each under its label.
std::string bar_chart(const std::string& id, const std::string& title, const std::string& description,
                      const std::vector<Bar>& bars, double width = 520);

/// Changes against a common zero, one row per task and one marker per model in it.
struct ChangeRows {
  struct Mark {
    double value = 0, error = 0;  ///< the whisker reaches `error` to both sides; 0: none
    int colour = 0;               ///< series colour and marker shape
    bool filled = true;
    std::string hint;
  };
  struct Row {
    std::string label;
    bool strong = false;  ///< a group: its parts follow
    std::vector<Mark> marks;
  };
  std::string id, title, description, heading;
  std::string x_title, unit;  ///< `unit` behind every tick
  double low = 0, high = 0;   ///< the axis reaches from here to there at least, and over all values
  std::vector<Row> rows;
  std::vector<std::pair<std::string, int>> key;  ///< names and colours of the markers
  double width = 520;
  std::string svg() const;
};

struct HeatMap {
  std::string id, title, description, heading;
  std::string x_title, y_title;
  std::vector<std::string> row_labels;
  std::vector<std::pair<double, std::string>> x_ticks;  ///< position 0 … 1 along the row
  std::vector<std::vector<int>> shades;                 ///< by row and column; -1: no value
  std::vector<std::string> key;                         ///< kShades texts for the key; empty: none
  std::vector<std::vector<std::string>>
      texts;         ///< written into the cells; empty: none. Equal neighbours stay apart then
  double rule = -1;  ///< position 0 … 1 of a vertical rule; < 0: none
  double width = 520;
  std::string svg() const;
};

}  // namespace headfold::report
