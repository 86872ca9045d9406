// The operations on tiles of tile.h: see there. T: tiles (simd/tiles_*.h).
#pragma once
#include <algorithm>

#include "tile_simd.h"

namespace kernels::attention {
namespace { // one copy for each translation unit: code for this instruction set must not leak to others at link time

template <class T>
struct Matrix {
    using L = typename T::Lanes;
    using F = typename L::F;
    using Lanes = Tile<L, kTile / L::N>;
    static_assert(Lanes::kPanel == kTile, "rows of 64 lanes");
    static constexpr int kSide = 16;             // of a tile
    static constexpr int64_t kSize = 16 * kStep; // entries of one

    static const uint16_t* tile(const uint16_t* tiles, int64_t index) { return tiles + index * kSize; }

    static void product(const uint16_t* keys, int rows, int depth, const uint16_t* queries, int lanes, float* scores) {
        const int steps = depth / kStep;
        for (int lane = 0; lane < lanes; lane += kStep)
            for (int row = 0; row < rows; row += kStep) {
                const uint16_t *left = tile(keys, row / kSide * steps), *right = tile(queries, lane / kSide);
                T tiles;
                tiles.zero();
                for (int s = 0; s < steps; ++s)
                    tiles.add(tile(left, s), tile(left, s + steps), tile(right, 4 * s), tile(right, 4 * s + 1));
                tiles.store(scores + row * kTile + lane, kTile);
            }
    }

    static void accumulate(const uint16_t* values, int rows, int depth, const uint16_t* weights, int lanes, float* out) {
        const int across = depth / kSide, steps = (rows + kStep - 1) / kStep;
        for (int d = 0; d < depth; d += kStep)
            for (int lane = 0; lane < lanes; lane += kStep) {
                const uint16_t *left = tile(values, d / kSide), *right = tile(weights, lane / kSide);
                T tiles;
                tiles.load(out + d * kTile + lane, kTile);
                for (int s = 0; s < steps; ++s)
                    tiles.add(tile(left, s * across), tile(left, s * across + 1), tile(right, 4 * s), tile(right, 4 * s + 1));
                tiles.store(out + d * kTile + lane, kTile);
            }
    }

    static void weigh(const float* scores, int rows, int lanes, float factor, float* maximum, float* sum, float* block_sum, float* out,
                      int depth, uint16_t* weights) {
        const F by = L::set(factor);
        for (int lane = 0; lane < lanes; lane += L::N) {
            const float* column = scores + lane;
            F highest = L::mul(by, L::load(column));
            for (int r = 1; r < rows; ++r) highest = L::max(L::mul(by, L::load(column + r * kTile)), highest);
            F offset = L::load(maximum + lane), total = L::load(sum + lane);
            if (L::any(L::greater(highest, L::add(offset, L::set(kSlack)))))
                Lanes::lift(highest, offset, total, maximum + lane, out + lane, depth);
            F added = L::zero();
            const F below = L::sub(L::zero(), offset);
            const auto weight = [&](int r) {
                if (r >= rows) return L::zero();
                const F found = Lanes::power(L::fma(by, L::load(column + r * kTile), below));
                added = L::add(added, found);
                return found;
            };
            for (int r = 0; r < rows; r += kStep) {
                uint16_t* to = weights + (r / kStep * 4 + lane / kSide) * kSize;
                for (int pair = r; pair < r + kStep; pair += 2, to += 2 * kSide) {
                    const F even = weight(pair), odd = weight(pair + 1);
                    L::store(reinterpret_cast<int32_t*>(to), T::in_turn(even, odd));
                }
            }
            L::store(sum + lane, L::add(total, added));
            if (block_sum) L::store(block_sum + lane, added);
        }
    }

    static void raise(const float* scores, int rows, int lanes, float factor, const float* offset, float* sum) {
        for (int lane = 0; lane < lanes; lane += L::N) {
            const F by = L::set(factor), below = L::sub(L::zero(), L::load(offset + lane));
            F total = L::zero();
            for (int r = 0; r < rows; ++r)
                total = L::add(total, Lanes::bounded(L::fma(by, L::load(scores + r * kTile + lane), below)));
            L::store(sum + lane, total);
        }
    }

    static MatrixOps ops(const TileOps& lanes) { return {lanes, T::begin, T::end, product, accumulate, weigh, raise}; }
};

} // namespace
} // namespace kernels::attention
