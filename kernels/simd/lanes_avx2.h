// Eight lanes over AVX2 + FMA. A thin table: one intrinsic a line wherever there is one. See lanes_emulated.h for what
// each operation means; tests compare the two. Include only in files compiled with -mavx2 -mfma.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace kernels::simd {
namespace { // one copy for each translation unit: code for this instruction set must not leak to others at link time

struct Avx2 {
    static constexpr int N = 8;
    using F = __m256;
    using I = __m256i;
    using M = __m256;

    static F zero() { return _mm256_setzero_ps(); }
    static F set(float x) { return _mm256_set1_ps(x); }
    static I set(int32_t x) { return _mm256_set1_epi32(x); }
    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static I load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static void store(float* p, F a) { _mm256_storeu_ps(p, a); }
    static void store(int32_t* p, I a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }

    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F div(F a, F b) { return _mm256_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static I add(I a, I b) { return _mm256_add_epi32(a, b); }
    static I sub(I a, I b) { return _mm256_sub_epi32(a, b); }

    static I integer(I x) { return _mm256_srli_epi32(x, 23); }
    static F fraction(I x, I mask, I one) {
        return _mm256_castsi256_ps(_mm256_or_si256(_mm256_and_si256(x, mask), one));
    }
    static I truncate(F a) { return _mm256_cvttps_epi32(a); }
    static I round(F a) { return _mm256_cvtps_epi32(a); }
    static F to_float(I a) { return _mm256_cvtepi32_ps(a); }

    static F permute(F a, I index) { return _mm256_permutevar8x32_ps(a, index); }
    static F gather(const float* p, I index) { return _mm256_i32gather_ps(p, index, 4); }
    static F even_odd(F a, F b) { return _mm256_blend_ps(a, b, 0xaa); }
    static F pair_sums(F a, F b) {
        const __m256d sums = _mm256_castps_pd(_mm256_hadd_ps(a, b));
        return _mm256_castpd_ps(_mm256_permute4x64_pd(sums, 0xd8));
    }
    static F reverse(F a) { return permute(a, _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0)); }

    static F min(F a, F b) { return _mm256_min_ps(a, b); }
    static F sqrt(F a) { return _mm256_sqrt_ps(a); }
    static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
    static M greater(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
    static M at_least(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
    static M both(M a, M b) { return _mm256_and_ps(a, b); }
    static bool any(M m) { return _mm256_movemask_ps(m) != 0; }
    static F keep(M m, F a) { return _mm256_and_ps(m, a); }
    static F select(M m, F a, F b) { return _mm256_blendv_ps(b, a, m); }
    static I keep(M m, I a) { return _mm256_and_si256(_mm256_castps_si256(m), a); }
    static I shift_left(I a, I by) { return _mm256_sllv_epi32(a, by); }
    static I quarter(I a) { return _mm256_srai_epi32(a, 2); }
    static I either(I a, I b) { return _mm256_or_si256(a, b); }
    static uint32_t either_lane(I a) {
        __m128i x = _mm_or_si128(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
        x = _mm_or_si128(x, _mm_shuffle_epi32(x, 0x4e));
        return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_or_si128(x, _mm_shuffle_epi32(x, 0xb1))));
    }
    static F add_exponent(F a, F n) {
        return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_castps_si256(n), 23)));
    }
    static I bytes(const uint8_t* p) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    }
    static I nibbles(const uint8_t* p, int half) { return half ? _mm256_srli_epi32(bytes(p), 4) : bytes(p); }
    static F widen(const uint16_t* p) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }
    static F pick(const F* window, I index) { return permute(window[0], index); }
    static F pick_wide(const F* window, I index) {
        const F upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)); // bit 3 becomes the sign
        return _mm256_blendv_ps(permute(window[0], index), permute(window[1], index), upper);
    }
    static F pick_widest(const F* window, I index) {
        const F upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 27)); // bit 4
        return _mm256_blendv_ps(pick_wide(window, index), pick_wide(window + 2, index), upper);
    }
    static float sum(F a) {
        __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
    }
    static void sums8(const F* a, float* out) {
        const __m256 x = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
        const __m256 y = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
        store(out, _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31)));
    }
};

} // namespace
} // namespace kernels::simd
