#include "geometry.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>
#include <string>

namespace kernels::ct {
namespace {

// A ray at 45 degrees belongs to the rows, whatever the last bit of its sine says.
constexpr double kTie = 1e-12;
// Sheets count as equal when their positions agree to this many pixels; float32 inside the tiles is 100x coarser.
constexpr double kSame = 1e-9;

bool rows_dominate(double along_rows, double along_columns) {
    return std::fabs(along_rows) >= std::fabs(along_columns) * (1 - kTie);
}

// The first cell of the detector, relative to its middle: u_0 = first_cell() pitch + offset.
double first_cell(int64_t cells) { return -0.5 * static_cast<double>(cells - 1); }

// Turns a sheet's numbering round: positions x0 + s k become x0' + s' k' with k' = cells-1-k.
void reverse(ParallelSheet& sheet, int64_t cells) {
    sheet.x0 += sheet.s * static_cast<double>(cells - 1);
    sheet.s = -sheet.s;
    sheet.reversed = !sheet.reversed;
}

void reverse(FanSheet& sheet, int64_t cells) {
    sheet.m0 += sheet.mu * static_cast<double>(cells - 1);
    sheet.mu = -sheet.mu;
    std::swap(sheet.first, sheet.last);
    sheet.first = cells - sheet.first;
    sheet.last = cells - sheet.last;
    sheet.reversed = !sheet.reversed;
}

// Mirrors the content of the lines: x becomes width-1-x. Positions then fall with k until reverse() is called.
void mirror(ParallelSheet& sheet, int64_t width) {
    sheet.x0 = static_cast<double>(width - 1) - sheet.x0;
    sheet.s = -sheet.s;
    sheet.t = -sheet.t;
    sheet.plane = static_cast<Plane>(sheet.plane ^ 1);
}

void mirror(FanSheet& sheet, int64_t width) {
    sheet.xs = static_cast<double>(width - 1) - sheet.xs;
    sheet.p0 = -sheet.p0;
    sheet.p1 = -sheet.p1;
    sheet.side = -sheet.side;
    sheet.plane = static_cast<Plane>(sheet.plane ^ 1);
}

ParallelSheet rows_sheet(const Parallel& beam, const Shape& shape, double cosine, double sine) {
    ParallelSheet sheet{};
    const double row_middle = 0.5 * static_cast<double>(shape.height - 1);
    const double column_middle = 0.5 * static_cast<double>(shape.width - 1);
    sheet.plane = kRows;
    sheet.s = beam.pitch / (beam.pixel * cosine);
    sheet.t = sine / cosine;
    sheet.x0 = column_middle + (beam.offset - beam.axis) / (beam.pixel * cosine) + first_cell(shape.cells) * sheet.s -
               row_middle * sheet.t;
    return sheet;
}

ParallelSheet columns_sheet(const Parallel& beam, const Shape& shape, double cosine, double sine) {
    ParallelSheet sheet{};
    const double row_middle = 0.5 * static_cast<double>(shape.height - 1);
    const double column_middle = 0.5 * static_cast<double>(shape.width - 1);
    sheet.plane = kColumns;
    sheet.s = -beam.pitch / (beam.pixel * sine);
    sheet.t = cosine / sine;
    sheet.x0 = row_middle - (beam.offset - beam.axis) / (beam.pixel * sine) + first_cell(shape.cells) * sheet.s -
               column_middle * sheet.t;
    return sheet;
}

// Rows or columns dominate each cell of a fan; [begin, end) runs of equal answer, in order. A fan opens less than 180
// degrees, so there are at most three.
struct Run {
    bool rows;
    int64_t begin, end;
};

std::vector<Run> dominance_runs(double cosine, double sine, double m0, double mu, int64_t cells) {
    auto is_rows = [&](int64_t k) {
        const double m = m0 + mu * static_cast<double>(k);
        return rows_dominate(cosine + m * sine, sine - m * cosine);
    };
    // the answer changes where |cos + m sin| = |sin - m cos|; the cells on both sides of each such m decide
    std::vector<int64_t> edges{0, cells};
    const double plus = sine + cosine, minus = sine - cosine;
    for (double tangent : {plus != 0 ? minus / plus : INFINITY, minus != 0 ? -plus / minus : INFINITY}) {
        const double at = (tangent - m0) / mu;
        if (!(at > -2 && at < static_cast<double>(cells) + 2)) continue;
        for (int64_t k = static_cast<int64_t>(std::floor(at)) - 1; k <= static_cast<int64_t>(std::floor(at)) + 2; ++k)
            if (k > 0 && k < cells && is_rows(k) != is_rows(k - 1)) edges.push_back(k);
    }
    std::sort(edges.begin(), edges.end());
    edges.erase(std::unique(edges.begin(), edges.end()), edges.end());
    std::vector<Run> runs;
    for (size_t i = 0; i + 1 < edges.size(); ++i) runs.push_back({is_rows(edges[i]), edges[i], edges[i + 1]});
    return runs;
}

FanSheet fan_sheet(const Fan& beam, const Shape& shape, double cosine, double sine, const Run& run) {
    FanSheet sheet{};
    const double source_column = 0.5 * static_cast<double>(shape.width - 1) +
                                 (beam.source_axis * sine - beam.axis * cosine) / beam.pixel;
    const double source_row = 0.5 * static_cast<double>(shape.height - 1) +
                              (beam.source_axis * cosine + beam.axis * sine) / beam.pixel;
    const double distance = beam.source_axis + beam.axis_detector;
    sheet.plane = run.rows ? kRows : kColumns;
    sheet.first = run.begin;
    sheet.last = run.end;
    sheet.mu = beam.pitch / distance;
    sheet.m0 = first_cell(shape.cells) * sheet.mu + beam.offset / distance;
    sheet.xs = run.rows ? source_column : source_row;
    sheet.ls = run.rows ? source_row : source_column;
    sheet.p0 = run.rows ? sine : cosine;
    sheet.p1 = run.rows ? -cosine : sine;
    sheet.q0 = run.rows ? cosine : sine;
    sheet.q1 = run.rows ? sine : -cosine;
    // towards the detector a ray moves by -q lines; and the image's middle has depth source_axis / pixel > 0
    sheet.ahead = -1;
    if (sheet.q(0.5 * static_cast<double>(run.begin + run.end - 1)) < 0) {
        sheet.p0 = -sheet.p0, sheet.p1 = -sheet.p1, sheet.q0 = -sheet.q0, sheet.q1 = -sheet.q1;
        sheet.ahead = 1;
    }
    sheet.side = 1;
    const double middle_row = 0.5 * static_cast<double>(shape.height - 1);
    const double middle_column = 0.5 * static_cast<double>(shape.width - 1);
    if (!(run.rows ? sheet.sees(middle_column, middle_row) : sheet.sees(middle_row, middle_column))) sheet.side = -1;
    return sheet;
}

template <class SheetT, class Key>
std::vector<Group<SheetT>> collect(std::vector<SheetT> sheets, Key key) {
    // sorted by the first key alone: equal sheets are then neighbours up to rounding, and a short look back finds them
    std::sort(sheets.begin(), sheets.end(), [&](const SheetT& a, const SheetT& b) {
        return key(a)[0] != key(b)[0] ? key(a)[0] < key(b)[0] : a.view < b.view;
    });
    constexpr size_t kLookBack = 16;
    std::vector<Group<SheetT>> out;
    for (const SheetT& sheet : sheets) {
        Group<SheetT>* home = nullptr;
        for (size_t back = 1; back <= std::min(kLookBack, out.size()) && !home; ++back) {
            Group<SheetT>& group = out[out.size() - back];
            const auto a = key(group.sheet), b = key(sheet);
            bool same = group.members.size() < kMaxMembers && group.sheet.first == sheet.first &&
                        group.sheet.last == sheet.last && group.sheet.forward() == sheet.forward();
            for (size_t i = 0; same && i < a.size(); ++i) same = std::fabs(a[i] - b[i]) <= kSame;
            if (same) home = &group;
        }
        if (!home) home = &out.emplace_back(Group<SheetT>{sheet, {}});
        home->members.push_back({sheet.view, sheet.plane, sheet.reversed});
    }
    return out;
}

void require(bool ok, const char* name, double got, const char* expected) {
    if (!ok) throw std::invalid_argument(std::string(name) + " is " + std::to_string(got) + "; expected " + expected);
}

void check_angles(const double* angles, int64_t views) {
    for (int64_t v = 0; v < views; ++v) require(std::isfinite(angles[v]), "an angle", angles[v], "a finite number");
}

} // namespace

std::vector<ParallelSheet> sheets(const Parallel& beam, const Shape& shape, const double* angles, int64_t views) {
    const bool centred = beam.offset == beam.axis; // only then can a view agree with its mirror image
    std::vector<ParallelSheet> out;
    out.reserve(static_cast<size_t>(views));
    for (int64_t v = 0; v < views; ++v) {
        const double cosine = std::cos(angles[v]), sine = std::sin(angles[v]);
        const bool rows = rows_dominate(cosine, sine);
        ParallelSheet sheet = rows ? rows_sheet(beam, shape, cosine, sine) : columns_sheet(beam, shape, cosine, sine);
        sheet.view = v;
        sheet.last = shape.cells;
        if (centred && sheet.t < -kSame) mirror(sheet, rows ? shape.width : shape.height);
        if (sheet.s < 0) reverse(sheet, shape.cells);
        out.push_back(sheet);
    }
    return out;
}

std::vector<FanSheet> sheets(const Fan& beam, const Shape& shape, const double* angles, int64_t views) {
    const bool centred = beam.offset == 0 && beam.axis == 0;
    std::vector<FanSheet> out;
    out.reserve(static_cast<size_t>(2 * views));
    const double mu = beam.pitch / (beam.source_axis + beam.axis_detector);
    const double m0 = first_cell(shape.cells) * mu + beam.offset / (beam.source_axis + beam.axis_detector);
    for (int64_t v = 0; v < views; ++v) {
        const double cosine = std::cos(angles[v]), sine = std::sin(angles[v]);
        for (const Run& run : dominance_runs(cosine, sine, m0, mu, shape.cells)) {
            FanSheet sheet = fan_sheet(beam, shape, cosine, sine, run);
            const int64_t width = run.rows ? shape.width : shape.height;
            sheet.view = v;
            if (centred && sheet.xs > 0.5 * static_cast<double>(width - 1) + kSame) mirror(sheet, width);
            // d x / d k = (p1 q0 - p0 q1) mu / q^2 (l - ls)
            if ((sheet.p1 * sheet.q0 - sheet.p0 * sheet.q1) * sheet.mu * sheet.ahead < 0) reverse(sheet, shape.cells);
            out.push_back(sheet);
        }
    }
    return out;
}

std::vector<Group<ParallelSheet>> groups(std::vector<ParallelSheet> sheets) {
    return collect(std::move(sheets), [](const ParallelSheet& a) { return std::array<double, 3>{a.t, a.x0, a.s}; });
}

std::vector<Group<FanSheet>> groups(std::vector<FanSheet> sheets) {
    return collect(std::move(sheets), [](const FanSheet& a) {
        return std::array<double, 8>{a.xs, a.ls, a.p0, a.p1, a.q0, a.q1, a.m0, a.mu};
    });
}

void steps(const Parallel& beam, double angle, int64_t cells, float* out) {
    const double cosine = std::fabs(std::cos(angle)), sine = std::fabs(std::sin(angle));
    std::fill(out, out + cells, static_cast<float>(beam.pixel / std::max(cosine, sine)));
}

// float32: good to 2e-7, and four times faster than double for a number that scales float32 sums
void steps(const Fan& beam, double angle, int64_t cells, float* out) {
    const float cosine = static_cast<float>(std::cos(angle)), sine = static_cast<float>(std::sin(angle));
    const double distance = beam.source_axis + beam.axis_detector;
    const float mu = static_cast<float>(beam.pitch / distance), middle = static_cast<float>(-first_cell(cells));
    const float shift = static_cast<float>(beam.offset / distance), pixel = static_cast<float>(beam.pixel);
    for (int64_t k = 0; k < cells; ++k) {
        const float m = (static_cast<float>(k) - middle) * mu + shift;
        const float along_rows = std::fabs(cosine + m * sine), along_columns = std::fabs(sine - m * cosine);
        out[k] = pixel * std::sqrt(1 + m * m) / (along_rows > along_columns ? along_rows : along_columns);
    }
}

void check(const Parallel& beam, const Shape&, const double* angles, int64_t views) {
    require(std::isfinite(beam.pitch) && beam.pitch > 0, "pitch", beam.pitch, "a length above 0 mm");
    require(std::isfinite(beam.pixel) && beam.pixel > 0, "pixel", beam.pixel, "a length above 0 mm");
    require(std::isfinite(beam.offset), "offset", beam.offset, "a finite length in mm");
    require(std::isfinite(beam.axis), "axis", beam.axis, "a finite length in mm");
    check_angles(angles, views);
}

void check(const Fan& beam, const Shape& shape, const double* angles, int64_t views) {
    check(Parallel{beam.pitch, beam.pixel, beam.offset, beam.axis}, shape, angles, views);
    // a pixel weighs in up to one pixel away: a source nearer than that could have image behind it
    const auto span = [](int64_t size) { return static_cast<double>(std::max<int64_t>(0, size - 1)); };
    const double radius = beam.pixel * (0.5 * std::hypot(span(shape.height), span(shape.width)) + 1);
    require(std::isfinite(beam.source_axis) && beam.source_axis > radius, "source_axis", beam.source_axis,
            "a source more than a pixel outside the circle round the pixels' centres, in mm");
    require(std::isfinite(beam.axis_detector) && beam.source_axis + beam.axis_detector > 0, "axis_detector",
            beam.axis_detector, "a detector on the far side of the source, in mm");
}

} // namespace kernels::ct
