// The operations of tile.h over lanes of any width: see there. Included once per instruction set.
#pragma once
#include <cstring>

#include "../simd/transpose.h"
#include "tile.h"

namespace kernels::masked_grad {
namespace { // one copy for each translation unit: code for this instruction set must not leak to others at link time

// Sums by lane; two at a time, for an addition waits for the one before it.
template <class L>
typename L::F dot(const float* a, const float* b, int64_t length) {
    typename L::F even = L::zero(), odd = L::zero();
    for (int64_t t = 0; t < length; t += 2 * L::N) {
        even = L::fma(L::load(a + t), L::load(b + t), even);
        odd = L::fma(L::load(a + t + L::N), L::load(b + t + L::N), odd);
    }
    return L::add(even, odd);
}

template <class L>
void products(const int16_t* offsets, int64_t count, const float* gradient, int row, const float* input, int64_t length,
              float* out) {
    static_assert(kMultiple % (2 * L::N) == 0);
    auto of = [&](uint32_t offset) {
        return dot<L>(gradient + (static_cast<int>(offset / kTile) - row) * kChunk, input + offset % kTile * kChunk, length);
    };
    int64_t e = 0;
    for (; e + 8 <= count; e += 8) { // eight sums over lanes cost little more than two
        typename L::F lanes[8];
        float sums[8];
        for (int i = 0; i < 8; ++i) lanes[i] = of(offsets[e + i]);
        L::sums8(lanes, sums);
        for (int i = 0; i < 8; ++i) out[e + i] += sums[i];
    }
    for (; e < count; ++e) out[e] += L::sum(of(offsets[e]));
}

template <class L>
void adamw_lanes(const Step& step, const float* gradient, float* first, float* second, float* value) {
    using F = typename L::F;
    const F g = L::mul(L::load(gradient), L::set(step.scale));
    const F m = L::fma(L::sub(g, L::load(first)), L::set(step.take1), L::load(first));
    const F v = L::fma(L::mul(g, g), L::set(step.take2), L::mul(L::load(second), L::set(step.keep2)));
    const F size = L::fma(L::sqrt(v), L::set(step.root), L::set(step.eps));
    L::store(first, m);
    L::store(second, v);
    L::store(value, L::fnma(L::set(step.rate), L::div(m, size), L::mul(L::load(value), L::set(step.keep))));
}

template <class L>
void adamw(const Step& step, int64_t count, const float* gradient, float* first, float* second, float* value) {
    int64_t e = 0;
    for (; e + L::N <= count; e += L::N) adamw_lanes<L>(step, gradient + e, first + e, second + e, value + e);
    if (e == count) return;
    float rest[4][L::N] = {};
    const int64_t bytes = (count - e) * static_cast<int64_t>(sizeof(float));
    const float* from[4] = {gradient + e, first + e, second + e, value + e};
    for (int i = 0; i < 4; ++i) std::memcpy(rest[i], from[i], bytes);
    adamw_lanes<L>(step, rest[0], rest[1], rest[2], rest[3]);
    float* to[3] = {first + e, second + e, value + e};
    for (int i = 0; i < 3; ++i) std::memcpy(to[i], rest[i + 1], bytes);
}

template <class L>
TileOps simd_tile_ops(const char* name) {
    return {name, products<L>, simd::transpose_plain, adamw<L>};
}

} // namespace
} // namespace kernels::masked_grad
