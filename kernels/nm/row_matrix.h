// The operations on tiles of row.h: see there. T: tiles (simd/tiles_*.h).
#pragma once
#include <algorithm>

#include "row.h"

namespace kernels::nm {
namespace { // one copy for each translation unit: code for this instruction set must not leak to others at link time

template <class T>
struct Matrix {
    using L = typename T::Lanes;
    using I = typename L::I;

    // A pair of columns of sixteen rows is a vector. Where in its group a slot belongs its place says, row by row, so each
    // pair of the group takes from it what is its own. About n (10 / m + 5 / 2) instructions a column, to save time where
    // its products take T / 32 cycles and those of its kept weights alone, in float32, n T / 2m.
    static void spread(const Packed& w, int64_t block, int64_t first, int64_t last, int64_t steps, uint16_t* panel) {
        const bool nibbles = w.m <= kNibbles;
        const int64_t slot_bytes = w.place_bytes(), start = block * w.slots() + first * w.n;
        const auto* value = static_cast<const uint16_t*>(w.values) + start * kBlock;
        const uint8_t* place = w.places + start * slot_bytes;
        std::fill(panel, panel + steps * kSide * kBlock, uint16_t{0});
        for (int64_t column = 0; column < (last - first) * w.m; column += w.m) {
            auto* pairs = reinterpret_cast<int32_t*>(panel + column / 2 * 2 * kBlock);
            const int odd = static_cast<int>(column % 2); // a group may begin with the second column of a pair
            for (int slot = 0; slot < w.n; ++slot, value += kBlock, place += slot_bytes) {
                const I at = L::add(L::set(odd), nibbles ? L::both(L::nibbles(place, 0), L::set(15)) : L::bytes(place));
                const I word = L::shift_left(L::words(value), L::shift_left(L::both(at, L::set(1)), L::set(4)));
                const I even = L::both(at, L::set(~1));
                for (int pair = 0; pair < odd + w.m; pair += 2) {
                    int32_t* to = pairs + pair / 2 * kBlock;
                    L::store(to, L::either(L::load(to), L::keep(L::equal(even, L::set(pair)), word)));
                }
            }
        }
    }

    static void multiply(const uint16_t* x, int64_t x_stride, const uint16_t* panel, int64_t panel_stride, int64_t steps, bool fresh,
                         float* sums) {
        constexpr int64_t side = kBlock * kSide; // entries of a tile
        T tiles;
        if (fresh) tiles.zero();
        else tiles.load(sums, kSide);
        for (int64_t step = 0; step < steps; ++step, x += side, panel += side) tiles.add(x, x + x_stride, panel, panel + panel_stride);
        tiles.store(sums, kSide);
    }

    static void finish(const float* sums, const float* bias, int tokens, int rows, uint16_t* y, int64_t stride) {
        for (int token = 0; token < tokens; ++token, sums += kSide, y += stride) {
            const auto first = L::add(L::load(sums), L::load(bias)), second = L::add(L::load(sums + kBlock), L::load(bias + kBlock));
            uint16_t out[kSide];
            L::store(reinterpret_cast<int32_t*>(out), T::in_order(first, second));
            std::copy(out, out + rows, y);
        }
    }

    static MatrixOps ops() { return {T::begin, T::end, spread, multiply, finish}; }
};

} // namespace
} // namespace kernels::nm
