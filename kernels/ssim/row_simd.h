// One row over the lanes L of any instruction set: included by the row_*.cpp, each compiled with flags of its own.
#pragma once
#include "row.h"

namespace kernels::ssim {
namespace { // one copy for each translation unit: code for another instruction set must not leak in at link time

template <class L>
struct Rows {
    using F = typename L::F;

    // The window is a product: first down the columns, then along the row.
    static void mean(const Row& row, const float* const* rows, float* scratch, float* out) {
        const int64_t size = kept(row.length);
        for (int64_t i = 0; i < size; i += L::N) L::store(scratch + margin(row) + i, down(row, rows, i));
        along(row, scratch, [&](int64_t i, F value) { L::store(out + i, value); });
    }

    static Sums compare(const Row& row, const float* const* render, const float* const* photo, const float* mean,
                        const float* variance, const float* weight, float* scratch, const Derivatives& out) {
        const int64_t size = kept(row.length), room = padded(row), start = margin(row);
        float *x = scratch, *xx = scratch + room, *xy = scratch + 2 * room;
        for (int64_t i = 0; i < size; i += L::N) {
            F sum_x = L::zero(), sum_xx = L::zero(), sum_xy = L::zero();
            for (int k = 0; k < kWindow; ++k) {
                const F value = L::load(render[k] + i);
                const F weighted = L::mul(L::set(row.weights[k < kHalf ? kHalf - k : k - kHalf]), value);
                sum_x = L::add(sum_x, weighted);
                sum_xx = L::fma(weighted, value, sum_xx);
                sum_xy = L::fma(weighted, L::load(photo[k] + i), sum_xy);
            }
            L::store(x + start + i, sum_x);
            L::store(xx + start + i, sum_xx);
            L::store(xy + start + i, sum_xy);
        }
        const F two = L::set(2.0f), c1 = L::set(kC1), c2 = L::set(kC2), one = L::set(1.0f);
        F ssim = L::zero(), l1 = L::zero();
        for (int64_t i = 0; i < size; i += L::N) {
            const F mx = along(row, x, i), mxx = along(row, xx, i), mxy = along(row, xy, i);
            const F my = L::load(mean + i), share = L::load(weight + i);
            const F product = L::mul(mx, my), square = L::mul(mx, mx);
            const F a = L::fma(two, product, c1), b = L::fma(two, L::sub(mxy, product), c2);
            const F c = L::add(L::fma(my, my, square), c1);
            const F d = L::add(L::sub(mxx, square), L::add(L::load(variance + i), c2));
            const F inverse = L::div(one, L::mul(c, d));
            const F value = L::mul(L::mul(a, b), inverse);
            ssim = L::fma(value, share, ssim);
            l1 = L::add(l1, L::abs(L::sub(L::load(render[kHalf] + i), L::load(photo[kHalf] + i))));
            // 1/c = d inverse and 1/d = c inverse: one division is enough
            const F by_d = L::mul(value, L::mul(c, inverse)), by_c = L::mul(value, L::mul(d, inverse));
            const F by_mean = L::sub(L::mul(L::mul(L::sub(b, a), inverse), my), L::mul(L::sub(by_c, by_d), mx));
            L::store(out.by_mean + i, L::mul(L::mul(two, by_mean), share));
            L::store(out.by_square + i, L::mul(L::sub(L::zero(), by_d), share));
            L::store(out.by_product + i, L::mul(L::mul(two, L::mul(a, inverse)), share));
        }
        return {L::sum(ssim), L::sum(l1)};
    }

    static void gradient(const Row& row, const float* const* by_mean, const float* const* by_square,
                         const float* const* by_product, const float* render, const float* photo, float l1, float dssim,
                         float* scratch, float* out) {
        const int64_t size = kept(row.length), room = padded(row), start = margin(row);
        for (int64_t i = 0; i < size; i += L::N) {
            L::store(scratch + start + i, down(row, by_mean, i));
            L::store(scratch + room + start + i, down(row, by_square, i));
            L::store(scratch + 2 * room + start + i, down(row, by_product, i));
        }
        const F plus = L::set(l1), minus = L::set(-l1), share = L::set(dssim), two = L::set(2.0f);
        for (int64_t i = 0; i < size; i += L::N) {
            const F x = L::load(render + i), y = L::load(photo + i);
            F of_ssim = L::fma(y, along(row, scratch + 2 * room, i), along(row, scratch, i));
            of_ssim = L::fma(L::mul(two, x), along(row, scratch + room, i), of_ssim);
            const F sign = L::add(L::keep(L::greater(x, y), plus), L::keep(L::greater(y, x), minus));
            L::store(out + i, L::fnma(share, of_ssim, sign));
        }
    }

private:
    static F down(const Row& row, const float* const* rows, int64_t i) {
        F sum = L::mul(L::set(row.weights[0]), L::load(rows[kHalf] + i));
        for (int k = 1; k <= kHalf; ++k)
            sum = L::fma(L::set(row.weights[k]), L::add(L::load(rows[kHalf - k] + i), L::load(rows[kHalf + k] + i)), sum);
        return sum;
    }

    static F along(const Row& row, const float* buffer, int64_t i) {
        const float* at = buffer + margin(row) + i;
        F sum = L::mul(L::set(row.weights[0]), L::load(at));
        for (int k = 1; k <= kHalf; ++k)
            sum = L::fma(L::set(row.weights[k]), L::add(L::load(at - k * row.channels), L::load(at + k * row.channels)), sum);
        return sum;
    }

    template <class Put>
    static void along(const Row& row, const float* buffer, Put put) {
        for (int64_t i = 0; i < kept(row.length); i += L::N) put(i, along(row, buffer, i));
    }
};

template <class L>
RowOps simd_row_ops(const char* name) {
    return {name, &Rows<L>::mean, &Rows<L>::compare, &Rows<L>::gradient};
}

} // namespace
} // namespace kernels::ssim
