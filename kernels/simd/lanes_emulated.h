// Lanes in plain C++: the meaning of every operation of lanes_avx2.h and lanes_avx512.h, and a way to run the 16-lane
// kernels on hosts without AVX-512. Slow; for tests. Nothing is inlined: the unrolled kernels would grow past all bounds.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define KERNELS_EMULATED static __attribute__((noinline))

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
    struct M {
        bool lane[N];
    };

    template <class Out, class Body>
    static Out each(Body body) {
        Out out;
        for (int i = 0; i < N; ++i) out.lane[i] = body(i);
        return out;
    }

    KERNELS_EMULATED F zero() { return set(0.0f); }
    KERNELS_EMULATED F set(float x) { return each<F>([&](int) { return x; }); }
    KERNELS_EMULATED I set(int32_t x) { return each<I>([&](int) { return x; }); }
    KERNELS_EMULATED F load(const float* p) { return each<F>([&](int i) { return p[i]; }); }
    KERNELS_EMULATED I load(const int32_t* p) {
        I out;
        std::memcpy(out.lane, p, sizeof out.lane);
        return out;
    }
    KERNELS_EMULATED void store(float* p, const F& a) { std::memcpy(p, a.lane, sizeof a.lane); }
    KERNELS_EMULATED void store(int32_t* p, const I& a) { std::memcpy(p, a.lane, sizeof a.lane); }

    KERNELS_EMULATED F add(const F& a, const F& b) { return each<F>([&](int i) { return a.lane[i] + b.lane[i]; }); }
    KERNELS_EMULATED F sub(const F& a, const F& b) { return each<F>([&](int i) { return a.lane[i] - b.lane[i]; }); }
    KERNELS_EMULATED F mul(const F& a, const F& b) { return each<F>([&](int i) { return a.lane[i] * b.lane[i]; }); }
    KERNELS_EMULATED F div(const F& a, const F& b) { return each<F>([&](int i) { return a.lane[i] / b.lane[i]; }); }
    // a b + c and c - a b, rounded once
    KERNELS_EMULATED F fma(const F& a, const F& b, const F& c) { return each<F>([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); }); }
    KERNELS_EMULATED F fnma(const F& a, const F& b, const F& c) { return each<F>([&](int i) { return std::fma(-a.lane[i], b.lane[i], c.lane[i]); }); }
    // the second operand where either is NaN
    KERNELS_EMULATED F max(const F& a, const F& b) { return each<F>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; }); }
    KERNELS_EMULATED I sub(const I& a, const I& b) { // wraps around, as add does
        return each<I>([&](int i) {
            return static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) - static_cast<uint32_t>(b.lane[i]));
        });
    }
    KERNELS_EMULATED I add(const I& a, const I& b) {
        return each<I>([&](int i) {
            return static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) + static_cast<uint32_t>(b.lane[i]));
        });
    }

    // Fixed-point positions, 9 bits before and 23 after the point: the integer part, and one + fraction as a float,
    // which is (x & mask) | one with mask 0x7fffff and `one` the bits of 1.0f or -1.0f.
    KERNELS_EMULATED I integer(const I& x) {
        return each<I>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(x.lane[i]) >> 23); });
    }
    KERNELS_EMULATED F fraction(const I& x, const I& mask, const I& one) {
        return each<F>([&](int i) {
            const int32_t bits = (x.lane[i] & mask.lane[i]) | one.lane[i];
            float out;
            std::memcpy(&out, &bits, sizeof out);
            return out;
        });
    }
    // towards zero; to the nearest. INT32_MIN for what does not fit.
    KERNELS_EMULATED I truncate(const F& a) { return each<I>([&](int i) { return convert(std::trunc(a.lane[i])); }); }
    KERNELS_EMULATED I round(const F& a) { return each<I>([&](int i) { return convert(std::nearbyint(a.lane[i])); }); }
    KERNELS_EMULATED F to_float(const I& a) { return each<F>([&](int i) { return static_cast<float>(a.lane[i]); }); }

    // N bytes; N of the sixteen nibbles of eight bytes, byte i holding numbers i (low) and i + 8, `half` saying which
    // eight where N is 8: only the low four bits of each lane are for use; N words of 16 bits; N bfloat16 as floats
    KERNELS_EMULATED I bytes(const uint8_t* p) { return each<I>([&](int i) { return static_cast<int32_t>(p[i]); }); }
    KERNELS_EMULATED I nibbles(const uint8_t* p, int half) {
        return each<I>([&](int i) { return static_cast<int32_t>(p[i % 8]) >> (i / 8 + half > 0 ? 4 : 0); });
    }
    KERNELS_EMULATED I words(const uint16_t* p) { return each<I>([&](int i) { return static_cast<int32_t>(p[i]); }); }
    KERNELS_EMULATED F widen(const uint16_t* p) {
        return each<F>([&](int i) {
            const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
            float out;
            std::memcpy(&out, &bits, sizeof out);
            return out;
        });
    }
    // window[index mod 8, 16 or 32]: of as many floats in as many vectors as it takes
    KERNELS_EMULATED F pick(const F* window, const I& index) { return each<F>([&](int i) { return window[0].lane[index.lane[i] & 7]; }); }
    KERNELS_EMULATED F pick_wide(const F* window, const I& index) {
        return each<F>([&](int i) { return window[(index.lane[i] & 15) / N].lane[(index.lane[i] & 15) % N]; });
    }
    KERNELS_EMULATED F pick_widest(const F* window, const I& index) {
        return each<F>([&](int i) { return window[(index.lane[i] & 31) / N].lane[(index.lane[i] & 31) % N]; });
    }
    // a[index mod N], p[index]
    KERNELS_EMULATED F permute(const F& a, const I& index) { return each<F>([&](int i) { return a.lane[index.lane[i] & (N - 1)]; }); }
    KERNELS_EMULATED F gather(const float* p, const I& index) { return each<F>([&](int i) { return p[index.lane[i]]; }); }
    // even lanes of a, odd lanes of b
    KERNELS_EMULATED F even_odd(const F& a, const F& b) { return each<F>([&](int i) { return i % 2 ? b.lane[i] : a.lane[i]; }); }
    // sums of neighbouring lanes: those of a, then those of b
    KERNELS_EMULATED F pair_sums(const F& a, const F& b) {
        return each<F>([&](int i) {
            const F& from = i < N / 2 ? a : b;
            const int at = 2 * (i % (N / 2));
            return from.lane[at] + from.lane[at + 1];
        });
    }
    KERNELS_EMULATED F reverse(const F& a) { return each<F>([&](int i) { return a.lane[N - 1 - i]; }); }

    KERNELS_EMULATED F min(const F& a, const F& b) { return each<F>([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; }); }
    KERNELS_EMULATED F sqrt(const F& a) { return each<F>([&](int i) { return std::sqrt(a.lane[i]); }); }
    KERNELS_EMULATED F abs(const F& a) { return each<F>([&](int i) { return std::fabs(a.lane[i]); }); }
    // false where either is NaN
    KERNELS_EMULATED M greater(const F& a, const F& b) { return each<M>([&](int i) { return a.lane[i] > b.lane[i]; }); }
    KERNELS_EMULATED M at_least(const F& a, const F& b) { return each<M>([&](int i) { return a.lane[i] >= b.lane[i]; }); }
    KERNELS_EMULATED M both(const M& a, const M& b) { return each<M>([&](int i) { return a.lane[i] && b.lane[i]; }); }
    KERNELS_EMULATED bool any(const M& m) {
        for (bool x : m.lane)
            if (x) return true;
        return false;
    }
    // a where m, else zero; a where m, else b
    KERNELS_EMULATED F keep(const M& m, const F& a) { return each<F>([&](int i) { return m.lane[i] ? a.lane[i] : 0.0f; }); }
    KERNELS_EMULATED I keep(const M& m, const I& a) { return each<I>([&](int i) { return m.lane[i] ? a.lane[i] : 0; }); }
    KERNELS_EMULATED F select(const M& m, const F& a, const F& b) { return each<F>([&](int i) { return m.lane[i] ? a.lane[i] : b.lane[i]; }); }
    // zero where the count is not 0..31
    KERNELS_EMULATED I shift_left(const I& a, const I& by) {
        return each<I>([&](int i) {
            return by.lane[i] < 0 || by.lane[i] > 31 ? 0 : static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) << by.lane[i]);
        });
    }
    KERNELS_EMULATED I quarter(const I& a) { return each<I>([&](int i) { return a.lane[i] >> 2; }); } // rounded down
    KERNELS_EMULATED I either(const I& a, const I& b) { return each<I>([&](int i) { return a.lane[i] | b.lane[i]; }); }
    KERNELS_EMULATED I both(const I& a, const I& b) { return each<I>([&](int i) { return a.lane[i] & b.lane[i]; }); }
    KERNELS_EMULATED M equal(const I& a, const I& b) { return each<M>([&](int i) { return a.lane[i] == b.lane[i]; }); }
    // the or of all lanes
    KERNELS_EMULATED uint32_t either_lane(const I& a) {
        uint32_t out = 0;
        for (int32_t x : a.lane) out |= static_cast<uint32_t>(x);
        return out;
    }
    // a 2^n, where the low bits of n's pattern hold an integer n, and a and the product are normal numbers
    KERNELS_EMULATED F add_exponent(const F& a, const F& n) {
        return each<F>([&](int i) {
            uint32_t bits, exponent;
            std::memcpy(&bits, &a.lane[i], sizeof bits);
            std::memcpy(&exponent, &n.lane[i], sizeof exponent);
            bits += exponent << 23;
            float out;
            std::memcpy(&out, &bits, sizeof out);
            return out;
        });
    }
    // the sum of the lanes, halves first; of eight vectors
    KERNELS_EMULATED float sum(const F& a) {
        F x = a;
        for (int half = N / 2; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) x.lane[i] += x.lane[i + half];
        return x.lane[0];
    }
    KERNELS_EMULATED void sums8(const F* a, float* out) {
        for (int i = 0; i < 8; ++i) out[i] = sum(a[i]);
    }

private:
    static int32_t convert(float x) {
        return x >= -2147483648.0f && x < 2147483648.0f ? static_cast<int32_t>(x) : INT32_MIN;
    }
};

} // namespace
} // namespace kernels::simd
