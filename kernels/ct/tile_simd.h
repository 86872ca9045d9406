// Joseph's tiles over vectors of N lanes, N = 8 (AVX2) or 16 (AVX-512), written once.
//
// Pair lanes. A vector serves N/2 cells: lanes (2i, 2i+1) hold the pixels left and right of cell i's position, fetched by
// one permutation of a window of N pixels. Positions are fixed-point, 9 bits before and 23 after the point, relative to
// the window: position = line part + block part, both rounded once from double, so precision does not depend on the
// image's size and there are no ties; the shift by 23 is the lane's index, the low bits are the weight:
//     x = block + line;  index = x >> 23;  w = {2, -1} + {-, +}(1.fraction)     -> 1-f | f
//     sum += w * permute(window, index)                                            for each member
// The first line costs 5 operations for any number of members (images or symmetric views), the second 2 for each.
// The adjoint swaps the roles of cells and pixels; its weight is max(0, 1 - s |k - t|).
//
// Limits, checked at every call; beyond them the portable tiles run: N/2 positions must fit a window (forward spacing
// s <= 1.66 for N = 8, 1.85 for 16; fan 2; adjoint s >= 0.6 or 0.54), up to s = 16 by gathers in parallel beams.
// Lines past the source of a near fan beam run on the portable tiles.
//
// Provenance: own design; the pair lanes follow the project's kernel notes, symmetric members, fixed-point positions
// and the exact fan weights do not. Measured on Zen 4 (AVX2); AVX-512 compiled and tested through emulated lanes only.
// Doubt: at spacings near a limit the choice of path changes with the last bit of s; both paths are tested there.
#pragma once
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "tile.h"
#include "tile_portable.h"

#define KERNELS_INLINE inline __attribute__((always_inline))

namespace kernels::ct {
namespace {

constexpr double kOne = 8388608.0;      // 1.0 in fixed point: 2^23
constexpr int32_t kFractionMask = 0x7fffff;
constexpr double kSlack = 1e-4;         // keeps rounding from pushing a lane out of its window
constexpr double kWidestGather = 16;    // spacing: 9 bits of index, and the padding of cpu.cpp
constexpr int64_t kWidestFan = 1 << 18; // positions: 20 bits before the point

// floor and fraction of a position, the fraction in fixed point; the fraction may round up to 1.0
KERNELS_INLINE void split(double position, int64_t* whole, int32_t* fraction) {
    const double floor = std::floor(position);
    *whole = static_cast<int64_t>(floor);
    *fraction = static_cast<int32_t>((position - floor) * kOne + 0.5);
}

template <class V>
struct Pairs {
    using F = typename V::F;
    using I = typename V::I;
    static constexpr int N = V::N;
    static constexpr int kHalf = N / 2;

    static F lanes(float even, float odd) {
        float values[N];
        for (int i = 0; i < N; ++i) values[i] = i % 2 ? odd : even;
        return V::load(values);
    }
    // lane pair i: i * step
    static F ramp(float step, float first = 0) {
        float values[N];
        for (int i = 0; i < N; ++i) values[i] = first + static_cast<float>(i / 2) * step;
        return V::load(values);
    }
    // fixed-point offsets of N/2 positions `step` apart, one more in the odd lanes
    static I offsets(double step) {
        int32_t values[N];
        for (int i = 0; i < N; ++i)
            values[i] = static_cast<int32_t>((i / 2) * step * kOne + 0.5) + (i % 2 << 23);
        return V::load(values);
    }
    static I odd_one() {
        int32_t values[N];
        for (int i = 0; i < N; ++i) values[i] = i % 2;
        return V::load(values);
    }
    static I signed_one() {
        int32_t values[N];
        for (int i = 0; i < N; ++i) values[i] = i % 2 ? 0x3f800000 : static_cast<int32_t>(0xbf800000u);
        return V::load(values);
    }
};

// row[k .. k+N) += sums, as far as `end`; a reversed row has cell k at cells-1-k.
template <class V>
KERNELS_INLINE void add_to_row(const ProjectTask& task, int m, int64_t k, typename V::F sums) {
    float* row = task.rows[m];
    if (k + V::N <= task.end) {
        if (!task.reversed[m]) {
            V::store(row + k, V::add(V::load(row + k), sums));
        } else {
            float* at = row + task.cells - k - V::N;
            V::store(at, V::add(V::load(at), V::reverse(sums)));
        }
        return;
    }
    float values[V::N];
    V::store(values, sums);
    for (int64_t i = 0; i < task.end - k; ++i) row[task.reversed[m] ? task.cells - 1 - k - i : k + i] += values[i];
}

// ---------------------------------------------------------------------------------------------- parallel, forward

template <class V, int Members, bool kGather>
void project_parallel_block(const ParallelSheet& sheet, const ProjectTask& task) {
    using P = Pairs<V>;
    using F = typename V::F;
    using I = typename V::I;
    constexpr int kVectors = 2; // 2 x Members sums, 2 block parts and 3 constants fill 16 registers at 4 members
    ptrdiff_t line_at[kTileLines];
    int32_t line_fraction[kTileLines];
    for (int i = 0; i < kTileLines; ++i) {
        int64_t whole;
        split(sheet.x0 + sheet.t * static_cast<double>(task.line + i), &whole, &line_fraction[i]);
        line_at[i] = i * task.stride + whole;
    }
    const I offsets = P::offsets(sheet.s), mask = V::set(kFractionMask), one = P::signed_one();
    const F weight = P::lanes(2, -1);
    const float* tiles[Members];
    for (int m = 0; m < Members; ++m) tiles[m] = task.tiles[m];
    for (int64_t k = task.begin; k < task.end; k += kVectors * P::kHalf) {
        int64_t block_at[kVectors];
        I block[kVectors];
        for (int v = 0; v < kVectors; ++v) {
            int32_t fraction;
            split(sheet.s * static_cast<double>(k + v * P::kHalf), &block_at[v], &fraction);
            block[v] = V::add(offsets, V::set(fraction));
        }
        F sums[kVectors][Members];
        for (int v = 0; v < kVectors; ++v)
            for (int m = 0; m < Members; ++m) sums[v][m] = V::zero();
#pragma GCC unroll 16
        for (int i = 0; i < kTileLines; ++i) {
            const I line = V::set(line_fraction[i]);
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) {
                const I x = V::add(block[v], line);
                const I index = V::integer(x);
                const F w = V::add(weight, V::fraction(x, mask, one));
                const ptrdiff_t at = line_at[i] + block_at[v];
                assert(at - i * task.stride >= -task.padding && at - i * task.stride + P::N <= task.width + task.padding);
#pragma GCC unroll 4
                for (int m = 0; m < Members; ++m) {
                    const float* window = tiles[m] + at;
                    const F pixels = kGather ? V::gather(window, index) : V::permute(V::load(window), index);
                    sums[v][m] = V::fma(w, pixels, sums[v][m]);
                }
            }
        }
        for (int m = 0; m < Members; ++m) add_to_row<V>(task, m, k, V::pair_sums(sums[0][m], sums[1][m]));
    }
}

// Hands a task's members on in fours, twos and ones: Call::run<V, Members>(sheet, task).
template <class Task>
Task members_from(const Task& task, int begin) {
    Task rest = task;
    for (int m = begin; m < task.members; ++m) {
        rest.rows[m - begin] = task.rows[m];
        rest.reversed[m - begin] = task.reversed[m];
        if constexpr (std::is_same_v<Task, ProjectTask>)
            rest.tiles[m - begin] = task.tiles[m];
        else
            rest.sums[m - begin] = task.sums[m];
    }
    const int left = task.members - begin;
    rest.members = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    return rest;
}

template <template <class, int> class Block, class V, class SheetT, class Task>
void by_members(const SheetT& sheet, const Task& task) {
    for (int done = 0; done < task.members;) {
        const Task rest = members_from(task, done);
        if (rest.members == 4)
            Block<V, 4>::run(sheet, rest);
        else if (rest.members == 2)
            Block<V, 2>::run(sheet, rest);
        else
            Block<V, 1>::run(sheet, rest);
        done += rest.members;
    }
}

template <class V, int Members>
struct ProjectParallelWindow {
    static void run(const ParallelSheet& sheet, const ProjectTask& task) {
        project_parallel_block<V, Members, false>(sheet, task);
    }
};
template <class V, int Members>
struct ProjectParallelGather {
    static void run(const ParallelSheet& sheet, const ProjectTask& task) {
        project_parallel_block<V, Members, true>(sheet, task);
    }
};

template <class V>
void project_parallel(const ParallelSheet& sheet, const ProjectTask& task) {
    // block part < 1 + (N/2-1) s, line part < 1, one more for the odd lane: all of it below N
    if (3 + (V::N / 2 - 1) * sheet.s <= V::N - kSlack)
        by_members<ProjectParallelWindow, V>(sheet, task);
    else if (sheet.s <= kWidestGather)
        by_members<ProjectParallelGather, V>(sheet, task);
    else
        portable::project_parallel(sheet, task);
}

// ---------------------------------------------------------------------------------------------- adjoint, shared

// A stretch of detector rows in the sheet's numbering, from cell `first` on, scaled and with zeros where no cell is.
template <int Members>
struct Rows {
    static constexpr int kFloats = 1024;
    alignas(64) float cell[Members][kFloats + 16]; // not a power of two apart: rows must not share cache sets
    int64_t first;

    // false if cells [from, to] do not fit
    template <class SheetT, class Scale>
    KERNELS_INLINE bool load(const SheetT& sheet, const BackprojectTask& task, double from, double to, Scale scale) {
        if (!(to - from < kFloats - 64)) return false;
        // a fan's windows start up to 16 cells early: their reach is that of the chunk's least spacing
        first = static_cast<int64_t>(std::floor(from)) - 20;
        const int64_t end = static_cast<int64_t>(std::ceil(to)) + 20; // one window of 16 past the last cell
        const int64_t a = first > sheet.first ? first : sheet.first, b = end < sheet.last ? end : sheet.last;
        for (int m = 0; m < Members; ++m) {
            std::memset(cell[m], 0, static_cast<size_t>(end - first) * sizeof(float));
            const float* row = task.rows[m];
            if (task.reversed[m])
                for (int64_t k = a; k < b; ++k) cell[m][k - first] = row[task.cells - 1 - k];
            else
                for (int64_t k = a; k < b; ++k) cell[m][k - first] = row[k];
        }
        alignas(64) float factor[kFloats];
        for (int64_t k = a; k < b; ++k) factor[k - first] = scale(static_cast<float>(k - a), a);
        for (int m = 0; m < Members; ++m)
            for (int64_t k = a; k < b; ++k) cell[m][k - first] *= factor[k - first];
        return true;
    }
};

// the smallest and largest fractional cell over the corners of a tile's chunk, whole vectors included
struct Span {
    double low, high;
};
template <class SheetT>
KERNELS_INLINE Span span_of(const SheetT& sheet, double x0, double x1, double l0, double l1) {
    const double corners[4] = {sheet.cell_at(x0, l0), sheet.cell_at(x0, l1), sheet.cell_at(x1, l0), sheet.cell_at(x1, l1)};
    Span span{corners[0], corners[0]};
    for (double corner : corners) {
        span.low = corner < span.low ? corner : span.low;
        span.high = corner > span.high ? corner : span.high;
    }
    return span;
}

// sums += w0 * (cells n, n+1); with kWide also w1 * (cells n-1, n+2), for more than two cells a pixel
template <class V, bool kWide>
KERNELS_INLINE void add_cells(const float* window, typename V::I index, typename V::F near, typename V::F far, float* sums) {
    using F = typename V::F;
    F sum = V::fma(near, V::permute(V::load(window), index), V::load(sums));
    if (kWide) {
        const F outer = V::even_odd(V::permute(V::load(window - 1), index), V::permute(V::load(window + 1), index));
        sum = V::fma(far, outer, sum);
    }
    V::store(sums, sum);
}

// ---------------------------------------------------------------------------------------------- parallel, adjoint

// Pixel x of line l meets cell t = (x - x0 - l tan) / s. Even lanes: cell n = floor(t), weight 1 - s f; odd lanes: cell
// n+1, weight 1 - s (1 - f); both from w = 1.f by one fma, clamped at 0.
template <class V, int Members, bool kWide>
void backproject_parallel_block(const ParallelSheet& sheet, const BackprojectTask& task) {
    using P = Pairs<V>;
    using F = typename V::F;
    using I = typename V::I;
    const int64_t end = (task.end + P::N - 1) / P::N * P::N;
    const Span span = span_of(sheet, static_cast<double>(task.begin), static_cast<double>(end - 1),
                              static_cast<double>(task.line), static_cast<double>(task.line + kTileLines - 1));
    Rows<Members> rows;
    const float step = static_cast<float>(task.pixel * std::sqrt(1 + sheet.t * sheet.t));
    if (!rows.load(sheet, task, span.low, span.high, [&](float, int64_t) { return step; }))
        return portable::backproject_parallel(sheet, task);

    ptrdiff_t line_at[kTileLines];
    int32_t line_fraction[kTileLines];
    for (int i = 0; i < kTileLines; ++i) {
        int64_t whole;
        split(sheet.cell_at(0, static_cast<double>(task.line + i)), &whole, &line_fraction[i]);
        line_at[i] = whole - rows.first;
    }
    const double inverse = 1 / sheet.s;
    const float s = static_cast<float>(sheet.s);
    const I offsets = P::offsets(inverse), mask = V::set(kFractionMask), one = P::signed_one();
    const F slope = V::set(s), near = P::lanes(1 + s, 1 - 2 * s), far = P::lanes(1, 1 - 3 * s), zero = V::zero();
    for (int64_t x = task.begin; x < end; x += P::N) {
        int64_t block_at[2];
        I block[2];
        for (int v = 0; v < 2; ++v) {
            int32_t fraction;
            split(inverse * static_cast<double>(x + v * P::kHalf), &block_at[v], &fraction);
            block[v] = V::add(offsets, V::set(fraction));
        }
#pragma GCC unroll 4
        for (int i = 0; i < kTileLines; ++i) {
            const I line = V::set(line_fraction[i]);
            const ptrdiff_t sum_at = 2 * (i * task.sum_stride + x);
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) {
                const I t = V::add(block[v], line);
                const I index = V::integer(t);
                const F w = V::fraction(t, mask, one);
                const F near_weight = V::max(V::fma(slope, w, near), zero);
                const F far_weight = kWide ? V::max(V::fma(slope, w, far), zero) : zero;
                const ptrdiff_t at = line_at[i] + block_at[v];
                assert(at >= 1 && at + P::N + 1 <= Rows<Members>::kFloats);
#pragma GCC unroll 4
                for (int m = 0; m < Members; ++m)
                    add_cells<V, kWide>(rows.cell[m] + at, index, near_weight, far_weight, task.sums[m] + sum_at + v * P::N);
            }
        }
    }
}

template <class V, int Members>
struct BackprojectParallelNear {
    static void run(const ParallelSheet& sheet, const BackprojectTask& task) {
        backproject_parallel_block<V, Members, false>(sheet, task);
    }
};
template <class V, int Members>
struct BackprojectParallelWide {
    static void run(const ParallelSheet& sheet, const BackprojectTask& task) {
        backproject_parallel_block<V, Members, true>(sheet, task);
    }
};

template <class V>
void backproject_parallel(const ParallelSheet& sheet, const BackprojectTask& task) {
    if (sheet.s < 0.5 || 3 + (V::N / 2 - 1) / sheet.s > V::N - kSlack)
        portable::backproject_parallel(sheet, task);
    else if (sheet.s < 1)
        by_members<BackprojectParallelWide, V>(sheet, task);
    else
        by_members<BackprojectParallelNear, V>(sheet, task);
}

// ---------------------------------------------------------------------------------------------- fan, forward

// Like the parallel tile, but every cell has a slope of its own: the position of a vector's first cell on each line
// comes from double, the distance of the other cells from it grows by a constant from line to line.
template <class V, int Members>
struct ProjectFan {
    using P = Pairs<V>;
    using F = typename V::F;
    using I = typename V::I;
    // adding this to a double leaves its fraction in the low 32 bits and its integer part above
    static constexpr double kMagic = 1572864.0; // 1.5 * 2^20
    static constexpr int64_t kMagicHigh = (int64_t{1043} << 20) + (1 << 19);

    // One vector's lines: where the first cell's window starts on each, the fraction, and how the others move.
    struct Vector {
        alignas(32) uint64_t bits[kTileLines];
        alignas(32) uint64_t fraction[kTileLines];
        I offsets, growth;
    };

    static KERNELS_INLINE void prepare(const FanSheet& sheet, const ProjectTask& task, int64_t k, F steps, I odd, Vector* out) {
        const double q = sheet.q(static_cast<double>(k)), slope = sheet.slope(static_cast<double>(k));
        const double from_source = static_cast<double>(task.line) - sheet.ls;
        const double start = sheet.xs + slope * from_source + (kMagic + 0x1p-24);
        double positions[kTileLines];
        for (int i = 0; i < kTileLines; ++i) positions[i] = start + slope * i;
        std::memcpy(out->bits, positions, sizeof positions);
        for (int i = 0; i < kTileLines; ++i) out->fraction[i] = (out->bits[i] >> 9) & kFractionMask;
        // slope(k + i) - slope(k) = i (p1 q0 - p0 q1) mu / (q_k q_k+i)
        const float determinant = static_cast<float>((sheet.p1 * sheet.q0 - sheet.p0 * sheet.q1) * sheet.mu / q * kOne);
        const F q_lanes = V::fma(V::set(static_cast<float>(sheet.q1 * sheet.mu)), steps, V::set(static_cast<float>(q)));
        const F spread = V::div(V::mul(V::set(determinant), steps), q_lanes);
        // anchored in the middle of the tile: rounding the growth then costs half as much at both ends
        out->growth = V::round(spread);
        I offsets = V::round(V::mul(spread, V::set(static_cast<float>(from_source + kTileLines / 2))));
        for (int i = 0; i < kTileLines / 2; ++i) offsets = V::sub(offsets, out->growth);
        out->offsets = V::add(offsets, odd);
    }

    static void run(const FanSheet& sheet, const ProjectTask& task) {
        const I mask = V::set(kFractionMask), one = P::signed_one(), odd = P::offsets(0);
        const F weight = P::lanes(2, -1), steps = P::ramp(1);
        const float* tiles[Members];
        for (int m = 0; m < Members; ++m) tiles[m] = task.tiles[m];
        for (int64_t k = task.begin; k < task.end; k += P::N) {
            Vector vectors[2];
            // a second vector past the end would look past the sheet's cells: let it repeat the first, its sums are dropped
            const int64_t second = k + P::kHalf < task.end ? k + P::kHalf : k;
            prepare(sheet, task, k, steps, odd, &vectors[0]);
            prepare(sheet, task, second, steps, odd, &vectors[1]);
            I offsets[2] = {vectors[0].offsets, vectors[1].offsets};
            const I growth[2] = {vectors[0].growth, vectors[1].growth};
            F sums[2][Members];
            for (int m = 0; m < Members; ++m) sums[0][m] = sums[1][m] = V::zero();
#pragma GCC unroll 16
            for (int i = 0; i < kTileLines; ++i) {
#pragma GCC unroll 2
                for (int v = 0; v < 2; ++v) {
                    const I x = V::add(offsets[v], V::set(static_cast<int32_t>(vectors[v].fraction[i])));
                    offsets[v] = V::add(offsets[v], growth[v]);
                    const I index = V::integer(x);
                    const F w = V::add(weight, V::fraction(x, mask, one));
                    const int64_t whole = static_cast<int64_t>(vectors[v].bits[i] >> 32) - kMagicHigh;
                    assert(whole >= -task.padding && whole + P::N <= task.width + task.padding);
                    const ptrdiff_t at = i * task.stride + whole;
#pragma GCC unroll 4
                    for (int m = 0; m < Members; ++m)
                        sums[v][m] = V::fma(w, V::permute(V::load(tiles[m] + at), index), sums[v][m]);
                }
            }
            for (int m = 0; m < Members; ++m) add_to_row<V>(task, m, k, V::pair_sums(sums[0][m], sums[1][m]));
        }
    }
};

// All of the tile's lines lie in front of the source?
KERNELS_INLINE bool in_front(const FanSheet& sheet, int64_t line) {
    const double nearest = sheet.ahead > 0 ? static_cast<double>(line) : static_cast<double>(line + kTileLines - 1);
    return (nearest - sheet.ls) * sheet.ahead > 0;
}

template <class V>
void project_fan(const FanSheet& sheet, const ProjectTask& task) {
    const double q0 = sheet.q(static_cast<double>(task.begin)), q1 = sheet.q(static_cast<double>(task.end - 1));
    const double q = q0 < q1 ? q0 : q1;
    const double farthest = sheet.ahead > 0 ? static_cast<double>(task.line + kTileLines - 1) : static_cast<double>(task.line);
    const double s = std::fabs(sheet.mu * (farthest - sheet.ls)) / (q * q);
    // fraction <= 1, N/2-1 spacings, one more for the odd lane
    const bool window = 2 + (V::N / 2 - 1) * s <= V::N - kSlack;
    if (window && in_front(sheet, task.line) && task.width < kWidestFan)
        by_members<ProjectFan, V>(sheet, task);
    else
        portable::project_fan(sheet, task);
}

// ---------------------------------------------------------------------------------------------- fan, adjoint

// The least distance between neighbouring rays over a tile's chunk, in pixels a cell: |mu| U (U - |q1|) / dl, where the
// -|q1| bounds how far the distance to the next ray falls short of the derivative. 0 where the chunk reaches behind the
// source.
template <class V>
KERNELS_INLINE double least_spacing(const FanSheet& sheet, const BackprojectTask& task) {
    if (!in_front(sheet, task.line)) return 0;
    const double l0 = static_cast<double>(task.line), l1 = static_cast<double>(task.line + kTileLines - 1);
    const double x0 = static_cast<double>(task.begin);
    const double x1 = static_cast<double>((task.end + V::N - 1) / V::N * V::N);
    const double tilt = std::fabs(sheet.q1);
    double least = INFINITY;
    for (double x : {x0, x1}) {
        // along a column U = a + b dl: least where dl^2 = a (a - |q1|) / b^2, if that is on the tile, else at an end
        const double a = sheet.depth(x, sheet.ls), b = sheet.depth(x, sheet.ls + 1) - a;
        const double turn = sheet.ls + sheet.ahead * std::sqrt(std::fabs(a * (a - tilt))) / std::fabs(b);
        for (double l : {l0, l1, turn > l0 && turn < l1 ? turn : l0}) {
            const double depth = sheet.depth(x, l);
            if (!(depth > 2)) return 0;
            const double s = std::fabs(sheet.mu) * depth * (depth - tilt) / std::fabs(l - sheet.ls);
            least = s < least ? s : least;
        }
    }
    return least;
}

// Exact, no series. With U the depth of a pixel, dl its distance in lines from the source and c a reference pixel of the
// same line, j pixels away:  t_j = t_c + j dl / (|mu| U_c U_j)   and, e = k - t_j,
//     weight_k = max(0, dl / (|mu| U_j) + e sign(mu) q1 - |e| U_j) * |mu| / q_k
// so that |mu| step_k / q_k goes into the detector row beforehand and one division a pixel remains.
template <class V, int Members, bool kWide>
void backproject_fan_block(const FanSheet& sheet, const BackprojectTask& task) {
    using P = Pairs<V>;
    using F = typename V::F;
    using I = typename V::I;
    const int64_t end = (task.end + P::N - 1) / P::N * P::N;
    const double l0 = static_cast<double>(task.line), l1 = static_cast<double>(task.line + kTileLines - 1);
    const Span span = span_of(sheet, static_cast<double>(task.begin), static_cast<double>(end - 1), l0, l1);
    Rows<Members> rows;
    const float mu = static_cast<float>(sheet.mu), scale = static_cast<float>(std::fabs(sheet.mu) * task.pixel);
    const bool fits = rows.load(sheet, task, span.low, span.high, [&](float i, int64_t a) {
        const float m = static_cast<float>(sheet.tangent(static_cast<double>(a))) + i * mu;
        const float q = static_cast<float>(sheet.q0) + static_cast<float>(sheet.q1) * m;
        return scale * std::sqrt(1 + m * m) / (q * q);
    });
    if (!fits) return portable::backproject_fan(sheet, task);

    const double inverse_mu = 1 / std::fabs(sheet.mu);
    const float across = static_cast<float>(sheet.side * sheet.q1); // d depth / d x
    const float tilt = static_cast<float>(sheet.mu > 0 ? sheet.q1 : -sheet.q1);
    const F zero = V::zero();
    const F flip = P::lanes(1, -1), shift = P::lanes(0, 1); // f in even lanes, 1 - f in odd ones
    const I odd = P::odd_one();
    // references: the first pixel of the second vector; the first vector's window starts `back` cells earlier
    const int back = static_cast<int>(std::ceil(P::kHalf / least_spacing<V>(sheet, task) + kSlack));
    for (int64_t x = task.begin; x < end; x += P::N) {
        const double centre = static_cast<double>(x + P::kHalf);
        int32_t at[kTileLines];
        float fraction[kTileLines], depth[kTileLines], lines[kTileLines], inverse_depth[kTileLines];
        for (int i = 0; i < kTileLines; ++i) {
            const double l = l0 + i, u = sheet.depth(centre, l);
            const double t = sheet.cell_at(centre, l), floor = std::floor(t);
            at[i] = static_cast<int32_t>(floor - static_cast<double>(rows.first));
            fraction[i] = static_cast<float>(t - floor);
            depth[i] = static_cast<float>(u);
            inverse_depth[i] = static_cast<float>(1 / u);
            lines[i] = static_cast<float>(std::fabs(l - sheet.ls) * inverse_mu);
        }
        const F ramp[2] = {P::ramp(1, -P::kHalf), P::ramp(1)};
        const F depths[2] = {V::mul(ramp[0], V::set(across)), V::mul(ramp[1], V::set(across))};
        const F tilts = P::lanes(tilt, -tilt);
        const float backs[2] = {static_cast<float>(back), 0.0f};
        const int whole[2] = {-back, 0};
#pragma GCC unroll 2
        for (int i = 0; i < kTileLines; ++i) {
            const ptrdiff_t sum_at = 2 * (i * task.sum_stride + x);
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) {
                const F u = V::add(depths[v], V::set(depth[i]));
                const F reach = V::div(V::set(lines[i]), u); // dl / (|mu| U_j)
                const F t = V::fma(V::mul(ramp[v], V::set(inverse_depth[i])), reach, V::set(fraction[i] + backs[v]));
                const I n = V::truncate(t);
                const F f = V::sub(t, V::to_float(n));
                const F e = V::fma(flip, f, shift);
                const F fall = V::add(u, tilts);
                const F inner = V::fnma(e, fall, reach);
                const F near_weight = V::max(inner, zero);
                const F far_weight = kWide ? V::max(V::sub(inner, fall), zero) : zero;
                const I index = V::add(n, odd);
                const ptrdiff_t from = at[i] + whole[v];
                assert(from >= 1 && from + P::N + 1 <= Rows<Members>::kFloats);
#pragma GCC unroll 4
                for (int m = 0; m < Members; ++m)
                    add_cells<V, kWide>(rows.cell[m] + from, index, near_weight, far_weight, task.sums[m] + sum_at + v * P::N);
            }
        }
    }
}

template <class V, int Members>
struct BackprojectFanNear {
    static void run(const FanSheet& sheet, const BackprojectTask& task) {
        backproject_fan_block<V, Members, false>(sheet, task);
    }
};
template <class V, int Members>
struct BackprojectFanWide {
    static void run(const FanSheet& sheet, const BackprojectTask& task) {
        backproject_fan_block<V, Members, true>(sheet, task);
    }
};

template <class V>
void backproject_fan(const FanSheet& sheet, const BackprojectTask& task) {
    const double least = least_spacing<V>(sheet, task);
    // fraction < 1, N/2 spacings rounded up, one more for the odd lane
    if (least < 0.5 || 2 + (V::N / 2) / least > V::N - 2 * kSlack)
        portable::backproject_fan(sheet, task);
    else if (least < 1 + kSlack)
        by_members<BackprojectFanWide, V>(sheet, task);
    else
        by_members<BackprojectFanNear, V>(sheet, task);
}

template <class V>
const TileOps& simd_tile_ops(const char* name) {
    static const TileOps ops{name, 2, project_parallel<V>, project_fan<V>, backproject_parallel<V>, backproject_fan<V>};
    return ops;
}

} // namespace
} // namespace kernels::ct
