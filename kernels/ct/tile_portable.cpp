// Plain C++ tiles for any machine and any geometry: positions in double, one ray at a time.
// The vector tiles fall back to these functions where a geometry exceeds their windows, so there are no limits here.
// Measured (Zen 4, one thread, 512^2, 720 views): see results/bench.json under isa "portable".
#include <algorithm>
#include <cmath>

#include "tile.h"
#include "tile_portable.h"

namespace kernels::ct {
namespace {

// position(k, l) -> pixels. Sums the lines of one ray in double, so that one float addition per tile remains.
template <class Position>
void project(const ProjectTask& task, Position position) {
    for (int64_t k = task.begin; k < task.end; ++k) {
        double sums[kMaxMembers] = {};
        for (int i = 0; i < task.lines; ++i) {
            const double x = position(k, task.line + i);
            if (!(x > -1 && x < static_cast<double>(task.width))) continue;
            const double floor = std::floor(x);
            const double right = x - floor;
            const ptrdiff_t at = i * task.stride + static_cast<ptrdiff_t>(floor);
            for (int m = 0; m < task.members; ++m)
                sums[m] += (1 - right) * task.tiles[m][at] + right * task.tiles[m][at + 1];
        }
        for (int m = 0; m < task.members; ++m)
            task.rows[m][task.reversed[m] ? task.cells - 1 - k : k] += static_cast<float>(sums[m]);
    }
}

// Adds weight(k) * row[k] over the cells of the closed range [from, to] to every member at (line i, position x).
template <class SheetT, class Weight>
void gather(const SheetT& sheet, const BackprojectTask& task, int i, int64_t x, double from, double to, Weight weight) {
    const int64_t first = std::max(sheet.first, static_cast<int64_t>(std::ceil(std::max(from, -1.0))));
    const int64_t last = std::min(sheet.last - 1, static_cast<int64_t>(std::floor(std::min(to, 1.0 * sheet.last))));
    double sums[kMaxMembers] = {};
    for (int64_t k = first; k <= last; ++k) {
        const double w = weight(k);
        if (!(w > 0)) continue;
        for (int m = 0; m < task.members; ++m)
            sums[m] += w * task.rows[m][task.reversed[m] ? task.cells - 1 - k : k];
    }
    for (int m = 0; m < task.members; ++m) task.sums[m][(i * task.sum_stride + x) * task.sums_per_position] += static_cast<float>(sums[m]);
}

} // namespace

namespace portable {

void project_parallel(const ParallelSheet& sheet, const ProjectTask& task) {
    project(task, [&](int64_t k, int64_t l) {
        return sheet.x0 + sheet.s * static_cast<double>(k) + sheet.t * static_cast<double>(l);
    });
}

void project_fan(const FanSheet& sheet, const ProjectTask& task) {
    project(task, [&](int64_t k, int64_t l) {
        return sheet.xs + sheet.slope(static_cast<double>(k)) * (static_cast<double>(l) - sheet.ls);
    });
}

void backproject_parallel(const ParallelSheet& sheet, const BackprojectTask& task) {
    const double step = task.pixel * std::sqrt(1 + sheet.t * sheet.t); // |cos| = 1 / sqrt(1 + tan^2)
    for (int i = 0; i < task.lines; ++i)
        for (int64_t x = task.begin; x < task.end; ++x) {
            const double t = sheet.cell_at(static_cast<double>(x), static_cast<double>(task.line + i));
            gather(sheet, task, i, x, t - 1 / sheet.s, t + 1 / sheet.s, [&](int64_t k) {
                return step * (1 - sheet.s * std::fabs(static_cast<double>(k) - t));
            });
        }
}

// The ray of cell k meets the line at a distance |k - t| |mu depth| / q_k from pixel x, where t is the (fractional)
// cell whose ray meets x itself: an identity of the projective map, no approximation.
void backproject_fan(const FanSheet& sheet, const BackprojectTask& task) {
    for (int i = 0; i < task.lines; ++i) {
        const double l = static_cast<double>(task.line + i);
        for (int64_t x = task.begin; x < task.end; ++x) {
            const double t = sheet.cell_at(static_cast<double>(x), l);
            const double scale = std::fabs(sheet.mu) * sheet.depth(static_cast<double>(x), l);
            // |k - t| scale < q_k = q_t + (k - t) tilt
            const double tilt = sheet.q1 * sheet.mu, q_t = sheet.q(t);
            const double below = scale + tilt > 0 ? q_t / (scale + tilt) : INFINITY;
            const double above = scale - tilt > 0 ? q_t / (scale - tilt) : INFINITY;
            gather(sheet, task, i, x, t - below, t + above, [&](int64_t k) {
                const double m = sheet.tangent(static_cast<double>(k)), q = sheet.q(static_cast<double>(k));
                const double step = task.pixel * std::sqrt(1 + m * m) / q;
                return step * (1 - std::fabs(static_cast<double>(k) - t) * scale / q);
            });
        }
    }
}

} // namespace portable

const TileOps& portable_tile_ops() {
    static const TileOps ops{"portable", 1, portable::project_parallel, portable::project_fan,
                             portable::backproject_parallel, portable::backproject_fan};
    return ops;
}

} // namespace kernels::ct
