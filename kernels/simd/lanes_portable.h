// Four lanes in the compiler's vector extension: SSE2 on any x86-64, NEON on Arm. See lanes_emulated.h for what each
// operation means.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace kernels::simd {
namespace { // one copy for each translation unit: code for another instruction set must not leak in at link time

struct Portable {
    static constexpr int N = 4;
    typedef float F __attribute__((vector_size(16)));
    typedef int32_t I __attribute__((vector_size(16)));
    typedef uint32_t U __attribute__((vector_size(16)));
    using M = I; // all ones or all zeros

    static F zero() { return F{}; }
    static F set(float x) { return F{x, x, x, x}; }
    static I set(int32_t x) { return I{x, x, x, x}; }
    static F load(const float* p) { return read<F>(p); }
    static I load(const int32_t* p) { return read<I>(p); }
    static void store(float* p, F a) { std::memcpy(p, &a, sizeof a); }
    static void store(int32_t* p, I a) { std::memcpy(p, &a, sizeof a); }

    static F add(F a, F b) { return a + b; }
    static F sub(F a, F b) { return a - b; }
    static F mul(F a, F b) { return a * b; }
    static F div(F a, F b) { return a / b; }
    static F fma(F a, F b, F c) { return a * b + c; }
    static F fnma(F a, F b, F c) { return c - a * b; }
    static F max(F a, F b) { return a > b ? a : b; }
    static F min(F a, F b) { return a < b ? a : b; }
    static F sqrt(F a) { return F{std::sqrt(a[0]), std::sqrt(a[1]), std::sqrt(a[2]), std::sqrt(a[3])}; }
    static F abs(F a) { return cast<F>(cast<I>(a) & 0x7fffffff); }
    static I add(I a, I b) { return cast<I>(cast<U>(a) + cast<U>(b)); }
    static I sub(I a, I b) { return cast<I>(cast<U>(a) - cast<U>(b)); }
    // towards zero, of a value within int32
    static I truncate(F a) { return __builtin_convertvector(a, I); }
    static F to_float(I a) { return __builtin_convertvector(a, F); }

    static M greater(F a, F b) { return a > b; }
    static M at_least(F a, F b) { return a >= b; }
    static M both(M a, M b) { return a & b; }
    static bool any(M m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }
    static F keep(M m, F a) { return cast<F>(m & cast<I>(a)); }
    static I keep(M m, I a) { return m & a; }
    static F select(M m, F a, F b) { return cast<F>((m & cast<I>(a)) | (~m & cast<I>(b))); }
    static I shift_left(I a, I by) { return cast<I>(cast<U>(a) << cast<U>(by)); } // counts of 0..31 only
    static I quarter(I a) { return a >> 2; }
    static I either(I a, I b) { return a | b; }
    static uint32_t either_lane(I a) { return static_cast<uint32_t>(a[0] | a[1] | a[2] | a[3]); }
    static F add_exponent(F a, F n) { return cast<F>(cast<U>(a) + (cast<U>(n) << 23)); }
    static float sum(F a) { return (a[0] + a[2]) + (a[1] + a[3]); }
    static void sums8(const F* a, float* out) {
        for (int i = 0; i < 8; ++i) out[i] = sum(a[i]);
    }

private:
    template <class To>
    static To read(const void* p) {
        To out;
        std::memcpy(&out, p, sizeof out);
        return out;
    }
    template <class To, class From>
    static To cast(From a) {
        return (To)a; // same size: the bits
    }
};

} // namespace
} // namespace kernels::simd
