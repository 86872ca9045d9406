// Tiles of AMX. See tiles_emulated.h for what each operation means; tests compare the two on hosts that have AMX.
// Include only in files compiled with the flags of lanes_avx512.h and -mavx512bf16 -mamx-tile -mamx-bf16.
//
// g++ 12 knows too little of what its own intrinsics touch: of a configuration the first eight bytes, of a tile that is
// loaded nothing at all. So the configuration is a constant, and stores are done before tiles are loaded.
//
// A step of `add` is four products of 16 cycles each, beside four loads of 8: 512 multiplications a cycle at best.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "lanes_avx512.h"

namespace kernels::simd {
namespace { // one copy for each translation unit: code for this instruction set must not leak to others at link time

struct alignas(64) TileShapes {
    uint8_t palette, first_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
constexpr TileShapes kWholeTiles = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
static_assert(sizeof(TileShapes) == 64);

struct Amx {
    using Lanes = Avx512;

    static void begin() { _tile_loadconfig(&kWholeTiles); }
    static void end() { _tile_release(); }

    void zero() {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    void load(const float* sums, int64_t stride) {
        const auto row_bytes = stride * static_cast<int64_t>(sizeof(float));
        after_stores();
        _tile_loadd(0, sums, row_bytes);
        _tile_loadd(1, sums + 16, row_bytes);
        _tile_loadd(2, sums + 16 * stride, row_bytes);
        _tile_loadd(3, sums + 16 * stride + 16, row_bytes);
    }
    void store(float* sums, int64_t stride) {
        const auto row_bytes = stride * static_cast<int64_t>(sizeof(float));
        _tile_stored(0, sums, row_bytes);
        _tile_stored(1, sums + 16, row_bytes);
        _tile_stored(2, sums + 16 * stride, row_bytes);
        _tile_stored(3, sums + 16 * stride + 16, row_bytes);
    }
    void add(const uint16_t* a0, const uint16_t* a1, const uint16_t* b0, const uint16_t* b1) {
        after_stores();
        _tile_loadd(4, a0, 64);
        _tile_loadd(6, b0, 64);
        _tile_loadd(7, b1, 64);
        _tile_loadd(5, a1, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }

    static __m512i in_order(__m512 first, __m512 second) { return bits(_mm512_cvtne2ps_pbh(second, first)); }
    static __m512i in_turn(__m512 even, __m512 odd) {
        const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(16));
        const __m512i turn = _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
        return _mm512_permutexvar_epi16(turn, in_order(even, odd));
    }

private:
    static void after_stores() { __asm__ volatile("" ::: "memory"); }
    static __m512i bits(__m512bh x) { return (__m512i)x; }
};

} // namespace
} // namespace kernels::simd
