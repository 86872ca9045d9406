// The operations of tile.h over lanes of any width: see there. Included once per instruction set.
//
// L: lanes (see simd/); Vectors: of a row of the buffer that a product holds at once. With six rows of them the sums fill
// the registers, and each broadcast meets `Vectors` multiplications.
#pragma once
#include <cstring>

#include "tile.h"

namespace kernels::attention {
namespace { // one copy for each translation unit: code for this instruction set must not leak to others at link time

constexpr int kRows = 6;
constexpr int kLine = 16; // floats in a line of the cache
constexpr float kHighest = 112.0f; // of a power under an old offset: a sum over a tile of 128 x 128 is still finite
constexpr float kSlack = 8.0f; // powers of two by which weights may exceed 1 before the maximum is raised

template <class L, int Vectors>
struct Tile {
    using F = typename L::F;
    static constexpr int kPanel = Vectors * L::N;
    static_assert(kTile % kPanel == 0);

    // Rows at a time: never a rest of one or two, whose few sums would wait for each other.
    static int group(int rows) { return rows >= 2 * kRows ? kRows : rows > kRows ? (rows + 1) / 2 : rows; }

    static void widen(const uint16_t* bits, int64_t count, float* floats) {
        auto* words = reinterpret_cast<char*>(floats);
        for (int64_t i = 0; i < count; ++i) {
            const uint32_t wide = static_cast<uint32_t>(bits[i]) << 16;
            std::memcpy(words + i * sizeof wide, &wide, sizeof wide);
        }
    }

    // A row of a panel within a buffer of `rows` rows.
    static float* at(float* buffer, int rows, int lane, int row) { return buffer + static_cast<int64_t>(lane) * rows + row * kPanel; }
    static const float* at(const float* buffer, int rows, int lane, int row) { return at(const_cast<float*>(buffer), rows, lane, row); }

    // sum [Rows][Vectors] = a b over the depth; a's entry of a row at depth d is at a[row * row_stride + d * depth_stride]
    template <int Rows, bool Add>
    static void micro(const float* a, int64_t row_stride, int64_t depth_stride, int depth, const float* b, float* out) {
        F sum[Rows][Vectors];
        for (auto& row : sum)
            for (F& part : row) part = L::zero();
#pragma GCC unroll 4
        for (int d = 0; d < depth; ++d, a += depth_stride, b += kPanel) {
            if constexpr (!Add)
                if (d % kLine == 0) // six rows are too many streams for the processor to foresee the next six
                    for (int r = 0; r < Rows; ++r) __builtin_prefetch(a + (r + Rows) * row_stride);
            F other[Vectors];
            for (int v = 0; v < Vectors; ++v) other[v] = L::load(b + v * L::N);
            for (int r = 0; r < Rows; ++r) {
                const F one = L::set(a[r * row_stride]);
                for (int v = 0; v < Vectors; ++v) sum[r][v] = L::fma(one, other[v], sum[r][v]);
            }
        }
        for (int r = 0; r < Rows; ++r)
            for (int v = 0; v < Vectors; ++v) {
                float* to = out + r * kPanel + v * L::N;
                L::store(to, Add ? L::add(L::load(to), sum[r][v]) : sum[r][v]);
            }
    }

    template <bool Add>
    static void rows_of(int rows, const float* a, int64_t row_stride, int64_t depth_stride, int depth, const float* b, float* out) {
        switch (rows) {
        case 1: return micro<1, Add>(a, row_stride, depth_stride, depth, b, out);
        case 2: return micro<2, Add>(a, row_stride, depth_stride, depth, b, out);
        case 3: return micro<3, Add>(a, row_stride, depth_stride, depth, b, out);
        case 4: return micro<4, Add>(a, row_stride, depth_stride, depth, b, out);
        case 5: return micro<5, Add>(a, row_stride, depth_stride, depth, b, out);
        default: return micro<6, Add>(a, row_stride, depth_stride, depth, b, out);
        }
    }

    // Panel by panel: a panel of b stays in the first-level cache while a passes.
    static void product(const float* a, int rows, int depth, const float* b, int lanes, float* scores) {
        for (int lane = 0; lane < lanes; lane += kPanel)
            for (int first = 0, size; first < rows; first += size) {
                size = group(rows - first);
                rows_of<false>(size, a + static_cast<int64_t>(first) * depth, depth, 1, depth, at(b, depth, lane, 0), at(scores, kTile, lane, first));
            }
    }

    // Columns of a by columns: those six, a line of each row, stay while the weights of all lanes pass.
    static void accumulate(const float* a, int rows, int depth, const float* weights, int lanes, float* out) {
        for (int first = 0, size; first < depth; first += size) {
            size = group(depth - first);
            for (int lane = 0; lane < lanes; lane += kPanel)
                rows_of<true>(size, a + first, 1, depth, rows, at(weights, kTile, lane, 0), at(out, depth, lane, first));
        }
    }

    static void pack(const float* rows, int count, int depth, float factor, float* buffer) {
        constexpr int kStep = 8; // rows at a time, so that writes fill half a cache line
        for (int first = 0; first < kTile; first += kStep)
            for (int d = 0; d < depth; ++d) {
                float* to = at(buffer, depth, first / kPanel * kPanel, d) + first % kPanel;
                for (int lane = first; lane < first + kStep; ++lane)
                    *to++ = lane < count ? factor * rows[static_cast<int64_t>(lane) * depth + d] : 0.0f;
            }
    }

    static void unpack(const float* buffer, int count, int depth, const float* factor, float* rows) {
        for (int lane = 0; lane < count; ++lane, rows += depth) {
            const float* from = at(buffer, depth, lane / kPanel * kPanel, 0) + lane % kPanel;
            for (int d = 0; d < depth; ++d) rows[d] = factor[lane] == 0.0f ? 0.0f : factor[lane] * from[d * kPanel];
        }
    }

    // 2^x for x <= 126; 0 below -126, where the result would not be a normal number. NaN stays: it is the second operand of
    // max, and not less than anything.
    static F power(F x) {
        const F magic = L::set(12582912.0f); // 1.5 2^23: adding it rounds to an integer, which its low bits then hold
        const F bounded = L::max(L::set(-126.0f), x);
        const F shifted = L::add(bounded, magic);
        const F rest = L::sub(bounded, L::sub(shifted, magic)); // in [-0.5, 0.5]
        F sum = L::set(1.32764713e-3f); // a minimax fit, 7.5e-8 relative
        sum = L::fma(sum, rest, L::set(9.67554096e-3f));
        sum = L::fma(sum, rest, L::set(5.55071309e-2f));
        sum = L::fma(sum, rest, L::set(2.40221202e-1f));
        sum = L::fma(sum, rest, L::set(6.93146944e-1f));
        sum = L::fma(sum, rest, L::set(1.00000012f));
        return L::select(L::greater(L::set(-126.0f), x), L::zero(), L::add_exponent(sum, shifted));
    }

    // Calls body(first vector of a buffer of scores, lane) for every L::N lanes; rows of it lie kPanel apart.
    template <class Body>
    static void for_columns(float* scores, int lanes, Body body) {
        for (int lane = 0; lane < lanes; lane += L::N) body(at(scores, kTile, lane / kPanel * kPanel, 0) + lane % kPanel, lane);
    }

    // A maximum that was left far behind is raised; the total and what was summed up with it shrink by as much.
    static void lift(F highest, F& offset, F& total, float* maximum, float* out, int depth) {
        const F raised = L::max(highest, offset), factor = power(L::sub(offset, raised));
        for (int d = 0; d < depth; ++d) L::store(out + d * kPanel, L::mul(L::load(out + d * kPanel), factor));
        total = L::mul(total, factor);
        offset = raised;
        L::store(maximum, raised);
    }

    static void weigh(float* scores, int rows, int lanes, float* maximum, float* sum, float* block_sum, float* out, int depth) {
        for_columns(scores, lanes, [=](float* column, int lane) {
            F highest = L::load(column);
            for (int r = 1; r < rows; ++r) highest = L::max(L::load(column + r * kPanel), highest);
            F offset = L::load(maximum + lane), total = L::load(sum + lane);
            if (L::any(L::greater(highest, L::add(offset, L::set(kSlack)))))
                lift(highest, offset, total, maximum + lane, at(out, depth, lane / kPanel * kPanel, 0) + lane % kPanel, depth);
            F added = L::zero();
            for (int r = 0; r < rows; ++r) {
                const F weight = power(L::sub(L::load(column + r * kPanel), offset));
                L::store(column + r * kPanel, weight);
                added = L::add(added, weight);
            }
            L::store(sum + lane, L::add(total, added));
            if (block_sum) L::store(block_sum + lane, added);
        });
    }

    static F bounded(F x) { return power(L::min(L::set(kHighest), x)); }

    static void raise_by_lane(float* scores, int rows, int lanes, const float* offset, float* sum) {
        for_columns(scores, lanes, [=](float* column, int lane) {
            const F by = L::load(offset + lane);
            F total = L::zero();
            for (int r = 0; r < rows; ++r) {
                const F weight = bounded(L::sub(L::load(column + r * kPanel), by));
                L::store(column + r * kPanel, weight);
                total = L::add(total, weight);
            }
            if (sum) L::store(sum + lane, total);
        });
    }

    static void raise_by_row(float* scores, int rows, int lanes, const float* offset) {
        for_columns(scores, lanes, [=](float* column, int) {
            for (int r = 0; r < rows; ++r)
                L::store(column + r * kPanel, bounded(L::sub(L::load(column + r * kPanel), L::set(offset[r]))));
        });
    }

    static void slope_by_lane(float* scores, const float* weights, int rows, int lanes, const float* shift) {
        for_columns(scores, lanes, [=](float* column, int lane) {
            const F by = L::load(shift + lane);
            const float* weight = weights + (column - scores);
            for (int r = 0; r < rows; ++r)
                L::store(column + r * kPanel, L::mul(L::load(weight + r * kPanel), L::sub(L::load(column + r * kPanel), by)));
        });
    }

    static void slope_by_row(float* scores, const float* weights, int rows, int lanes, const float* shift) {
        for_columns(scores, lanes, [=](float* column, int) {
            const float* weight = weights + (column - scores);
            for (int r = 0; r < rows; ++r)
                L::store(column + r * kPanel,
                         L::mul(L::load(weight + r * kPanel), L::sub(L::load(column + r * kPanel), L::set(shift[r]))));
        });
    }

    static void raise(float* values, const float* offset) {
        for (int lane = 0; lane < kTile; lane += L::N)
            L::store(values + lane, bounded(L::sub(L::load(values + lane), L::load(offset + lane))));
    }

    static TileOps ops(const char* name) {
        return {name,  widen,         pack,         unpack,        product,      accumulate,
                weigh, raise_by_lane, raise_by_row, slope_by_lane, slope_by_row, raise};
    }
};

} // namespace
} // namespace kernels::attention
