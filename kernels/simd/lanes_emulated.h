// Lanes in plain C++: the meaning of every operation of lanes_avx2.h and lanes_avx512.h, and a way to run the 16-lane
// kernels on hosts without AVX-512. Slow; for tests.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace kernels::simd {
namespace {

template <int Lanes>
struct Emulated {
    static constexpr int N = Lanes;
    struct F {
        float lane[N];
    };
    struct I {
        int32_t lane[N];
    };

    template <class Out, class Body>
    static Out each(Body body) {
        Out out;
        for (int i = 0; i < N; ++i) out.lane[i] = body(i);
        return out;
    }

    static F zero() { return set(0.0f); }
    static F set(float x) { return each<F>([&](int) { return x; }); }
    static I set(int32_t x) { return each<I>([&](int) { return x; }); }
    static F load(const float* p) { return each<F>([&](int i) { return p[i]; }); }
    static I load(const int32_t* p) { return each<I>([&](int i) { return p[i]; }); }
    static void store(float* p, F a) { std::memcpy(p, a.lane, sizeof a.lane); }
    static void store(int32_t* p, I a) { std::memcpy(p, a.lane, sizeof a.lane); }

    static F add(F a, F b) { return each<F>([&](int i) { return a.lane[i] + b.lane[i]; }); }
    static F sub(F a, F b) { return each<F>([&](int i) { return a.lane[i] - b.lane[i]; }); }
    static F mul(F a, F b) { return each<F>([&](int i) { return a.lane[i] * b.lane[i]; }); }
    static F div(F a, F b) { return each<F>([&](int i) { return a.lane[i] / b.lane[i]; }); }
    // a b + c and c - a b, rounded once
    static F fma(F a, F b, F c) { return each<F>([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); }); }
    static F fnma(F a, F b, F c) { return each<F>([&](int i) { return std::fma(-a.lane[i], b.lane[i], c.lane[i]); }); }
    // the second operand where either is NaN
    static F max(F a, F b) { return each<F>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; }); }
    static I sub(I a, I b) { // wraps around, as add does
        return each<I>([&](int i) {
            return static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) - static_cast<uint32_t>(b.lane[i]));
        });
    }
    static I add(I a, I b) {
        return each<I>([&](int i) {
            return static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) + static_cast<uint32_t>(b.lane[i]));
        });
    }

    // Fixed-point positions, 9 bits before and 23 after the point: the integer part, and one + fraction as a float,
    // which is (x & mask) | one with mask 0x7fffff and `one` the bits of 1.0f or -1.0f.
    static I integer(I x) {
        return each<I>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(x.lane[i]) >> 23); });
    }
    static F fraction(I x, I mask, I one) {
        return each<F>([&](int i) {
            const int32_t bits = (x.lane[i] & mask.lane[i]) | one.lane[i];
            float out;
            std::memcpy(&out, &bits, sizeof out);
            return out;
        });
    }
    // towards zero; to the nearest. INT32_MIN for what does not fit.
    static I truncate(F a) { return each<I>([&](int i) { return convert(std::trunc(a.lane[i])); }); }
    static I round(F a) { return each<I>([&](int i) { return convert(std::nearbyint(a.lane[i])); }); }
    static F to_float(I a) { return each<F>([&](int i) { return static_cast<float>(a.lane[i]); }); }

    // a[index mod N], p[index]
    static F permute(F a, I index) { return each<F>([&](int i) { return a.lane[index.lane[i] & (N - 1)]; }); }
    static F gather(const float* p, I index) { return each<F>([&](int i) { return p[index.lane[i]]; }); }
    // even lanes of a, odd lanes of b
    static F even_odd(F a, F b) { return each<F>([&](int i) { return i % 2 ? b.lane[i] : a.lane[i]; }); }
    // sums of neighbouring lanes: those of a, then those of b
    static F pair_sums(F a, F b) {
        return each<F>([&](int i) {
            const F& from = i < N / 2 ? a : b;
            const int at = 2 * (i % (N / 2));
            return from.lane[at] + from.lane[at + 1];
        });
    }
    static F reverse(F a) { return each<F>([&](int i) { return a.lane[N - 1 - i]; }); }

private:
    static int32_t convert(float x) {
        return x >= -2147483648.0f && x < 2147483648.0f ? static_cast<int32_t>(x) : INT32_MIN;
    }
};

} // namespace
} // namespace kernels::simd
