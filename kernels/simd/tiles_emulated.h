// Tiles in plain C++: the meaning of every operation of tiles_amx.h, bit for bit as Intel's manual describes it, and a way
// to run the kernels that use tiles on hosts without AMX. Slow; for tests.
//
// A tile holds sixteen rows of 64 bytes. Four of them are sums, two by two: 32 x 32 floats. Two are the left side of a
// product, a [2][16 rows][32] bfloat16, and two the right side, b [2][16 pairs][16 columns][2] bfloat16: entries 2i and
// 2i + 1 of a column lie side by side. Sides are 1024 bytes each, one row behind the other.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "lanes_emulated.h"

namespace kernels::simd {
namespace {

struct EmulatedTiles {
    using Lanes = Emulated<16>;

    // A thread calls `begin` before it makes one of these, and `end` after all.
    static void begin() {}
    static void end() {}

    // the sums: set to zero, read, written; rows of 32 floats, `stride` floats apart
    void zero() { *this = {}; }
    void load(const float* sums, int64_t stride) {
        for (int row = 0; row < 32; ++row) std::memcpy(sums_[row], sums + row * stride, sizeof sums_[row]);
    }
    void store(float* sums, int64_t stride) {
        for (int row = 0; row < 32; ++row) std::memcpy(sums + row * stride, sums_[row], sizeof sums_[row]);
    }

    // sums += a b
    void add(const uint16_t* a0, const uint16_t* a1, const uint16_t* b0, const uint16_t* b1) {
        product(a0, b0, 0, 0);
        product(a0, b1, 0, 16);
        product(a1, b0, 16, 0);
        product(a1, b1, 16, 16);
    }

    // floats as bfloat16, to the nearest, ties to even: those of one vector behind those of the other; in turn
    static Lanes::I in_order(const Lanes::F& first, const Lanes::F& second) {
        return Lanes::each<Lanes::I>([&](int i) {
            const Lanes::F& from = i < 8 ? first : second;
            return pair(from.lane[2 * i % 16], from.lane[2 * i % 16 + 1]);
        });
    }
    static Lanes::I in_turn(const Lanes::F& even, const Lanes::F& odd) {
        return Lanes::each<Lanes::I>([&](int i) { return pair(even.lane[i], odd.lane[i]); });
    }

private:
    float sums_[32][32];

    // TDPBF16PS: the even and the odd entries of a row are added up each by itself, then one to the other, then both to
    // the sum. Each step is rounded once; numbers below the normal ones count as zero, as input and as output.
    void product(const uint16_t* a, const uint16_t* b, int row, int column) {
        for (int i = 0; i < 16; ++i) {
            float even[16] = {}, odd[16] = {};
            for (int k = 0; k < 16; ++k)
                for (int j = 0; j < 16; ++j) {
                    const uint16_t *left = a + 32 * i + 2 * k, *right = b + 32 * k + 2 * j;
                    even[j] = normal(std::fma(widened(left[0]), widened(right[0]), even[j]));
                    odd[j] = normal(std::fma(widened(left[1]), widened(right[1]), odd[j]));
                }
            for (int j = 0; j < 16; ++j) {
                float& sum = sums_[row + i][column + j];
                sum = normal(normal(sum) + normal(even[j] + odd[j]));
            }
        }
    }

    static float normal(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }
    static float widened(uint16_t half) {
        const uint32_t bits = static_cast<uint32_t>(half) << 16;
        float out;
        std::memcpy(&out, &bits, sizeof out);
        return normal(out);
    }
    static uint32_t narrowed(float x) {
        const float from = normal(x);
        uint32_t bits;
        std::memcpy(&bits, &from, sizeof bits);
        if (x != x) return bits >> 16 | 0x40; // NaN stays NaN
        return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
    static int32_t pair(float low, float high) { return static_cast<int32_t>(narrowed(low) | narrowed(high) << 16); }
};

} // namespace
} // namespace kernels::simd
