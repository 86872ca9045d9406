// Sixteen lanes over AVX-512 F, DQ, VL, BW. A thin table: one intrinsic a line wherever there is one. See
// lanes_emulated.h for what each operation means; tests compare the two on hosts that have AVX-512.
// Include only in files compiled with -mavx512f -mavx512dq -mavx512vl -mavx512bw.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "lanes_avx2.h"

namespace kernels::simd {
namespace { // one copy for each translation unit: code for this instruction set must not leak to others at link time

struct Avx512 {
    static constexpr int N = 16;
    using F = __m512;
    using I = __m512i;
    using M = __mmask16;

    static F zero() { return _mm512_setzero_ps(); }
    static F set(float x) { return _mm512_set1_ps(x); }
    static I set(int32_t x) { return _mm512_set1_epi32(x); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static I load(const int32_t* p) { return _mm512_loadu_si512(p); }
    static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
    static void store(int32_t* p, I a) { _mm512_storeu_si512(p, a); }

    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static I add(I a, I b) { return _mm512_add_epi32(a, b); }
    static I sub(I a, I b) { return _mm512_sub_epi32(a, b); }

    static I integer(I x) { return _mm512_srli_epi32(x, 23); }
    static F fraction(I x, I mask, I one) {
        return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(x, mask, one, 0xea)); // (x & mask) | one
    }
    static I truncate(F a) { return _mm512_cvttps_epi32(a); }
    static I round(F a) { return _mm512_cvtps_epi32(a); }
    static F to_float(I a) { return _mm512_cvtepi32_ps(a); }

    static F permute(F a, I index) { return _mm512_permutexvar_ps(index, a); }
    static F gather(const float* p, I index) { return _mm512_i32gather_ps(index, p, 4); }
    static F even_odd(F a, F b) { return _mm512_mask_blend_ps(0xaaaa, a, b); }
    static F pair_sums(F a, F b) {
        const I even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const I odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
        return _mm512_add_ps(_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b));
    }
    static F reverse(F a) {
        return permute(a, _mm512_setr_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    }

    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static F sqrt(F a) { return _mm512_sqrt_ps(a); }
    static F abs(F a) { return _mm512_abs_ps(a); }
    static M greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
    static M at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
    static M both(M a, M b) { return static_cast<M>(a & b); }
    static bool any(M m) { return m != 0; }
    static F keep(M m, F a) { return _mm512_maskz_mov_ps(m, a); }
    static F select(M m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }
    static I keep(M m, I a) { return _mm512_maskz_mov_epi32(m, a); }
    static I shift_left(I a, I by) { return _mm512_sllv_epi32(a, by); }
    static I quarter(I a) { return _mm512_srai_epi32(a, 2); }
    static I either(I a, I b) { return _mm512_or_si512(a, b); }
    static I both(I a, I b) { return _mm512_and_si512(a, b); }
    static M equal(I a, I b) { return _mm512_cmpeq_epi32_mask(a, b); }
    static uint32_t either_lane(I a) { return static_cast<uint32_t>(_mm512_reduce_or_epi32(a)); }
    static F add_exponent(F a, F n) {
        return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_slli_epi32(_mm512_castps_si512(n), 23)));
    }
    static I bytes(const uint8_t* p) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static I nibbles(const uint8_t* p, int) {
        const __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
        return _mm512_inserti32x8(_mm512_castsi256_si512(both), _mm256_srli_epi32(both, 4), 1);
    }
    static I words(const uint16_t* p) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static F widen(const uint16_t* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(words(p), 16)); }
    static F pick(const F* window, I index) { return permute(window[0], index); }
    static F pick_wide(const F* window, I index) { return permute(window[0], index); }
    static F pick_widest(const F* window, I index) { return _mm512_permutex2var_ps(window[0], index, window[1]); }
    static float sum(F a) { return Avx2::sum(half(a)); }
    static void sums8(const F* a, float* out) {
        __m256 halves[8];
        for (int i = 0; i < 8; ++i) halves[i] = half(a[i]);
        Avx2::sums8(halves, out);
    }

private:
    static __m256 half(F a) { return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)); }
};

} // namespace
} // namespace kernels::simd
