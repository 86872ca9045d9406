// One tile of 16 x 16 pixels, generic over the lanes V of simd/. Pixels are taken in blocks of 4 x V::N/4, one lane each.
//
// Forward goes block by block, so that the transmittance and the colours of a block stay in registers; which Gaussians
// reach which block is worked out exactly before. Backward goes Gaussian by Gaussian, front to back over the same blocks
// and with the same instructions, hence the same decisions; a Gaussian's sums over the tile are then reduced once.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "tile.h"

namespace kernels::splat {
namespace { // one copy for each translation unit: code for one instruction set must not leak to others at link time

constexpr int kAhead = 8;   // items between asking for memory and using it
constexpr int kChunk = 128; // Gaussians whose constants and lists stay in the first-level cache
constexpr int kAny = 0;     // channels known at run time only

// Asks for the record of a later item of the tile: neighbours in depth lie anywhere in memory.
inline void prefetch(const float* records, const Tile& tile, int64_t i, int64_t stride) {
    if (i + kAhead < tile.count) __builtin_prefetch(records + tile.ids[i + kAhead] * stride);
}

// What a block's evaluation needs of a Gaussian, relative to the tile: u = r1 x + r2 y + cu, v = s1 y + cv.
struct Local {
    float r1, r2, cu, s1, cv, log_opacity;
    const float* color;
};

inline Local local(const float* record, const Tile& tile) {
    const float x = record[kX] - static_cast<float>(tile.x), y = record[kY] - static_cast<float>(tile.y);
    return {record[kR1],        record[kR2], -(record[kR1] * x + record[kR2] * y), record[kS1], -record[kS1] * y,
            record[kLogOpacity], record + kColor};
}

template <class V>
struct Layout {
    static constexpr int kRows = V::N / 4; // of a block; it has 4 columns
    static constexpr int kBlocks = kPixels / V::N;

    // pixel centres of every lane of every block, and which pixel of the tile it is in row-major order
    alignas(64) float x[kPixels], y[kPixels];
    int pixel[kPixels];
    // of the next V::N rows of pixels: the centres, and where the four bits of the row's blocks belong
    alignas(64) float row[V::N];
    alignas(64) int32_t shift[V::N];

    Layout() {
        for (int i = 0; i < kPixels; ++i) {
            const int block = i / V::N, lane = i % V::N;
            const int column = block % 4 * 4 + lane % 4, line = block / 4 * kRows + lane / 4;
            x[i] = static_cast<float>(column) + 0.5f;
            y[i] = static_cast<float>(line) + 0.5f;
            pixel[i] = line * kTile + column;
        }
        for (int i = 0; i < V::N; ++i) {
            row[i] = static_cast<float>(i) + 0.5f;
            shift[i] = i / kRows * 4;
        }
    }
};

template <class V>
const Layout<V>& layout() {
    static const Layout<V> it;
    return it;
}

// 2^p for p in -126..127, to 2e-7: the nearest integer by the rounding of a large sum, the rest by a polynomial.
template <class V>
inline typename V::F exp2(typename V::F p) {
    const auto magic = V::set(12582912.0f); // 1.5 2^23: the low bits of p + magic hold the integer
    const auto shifted = V::add(p, magic);
    const auto rest = V::sub(p, V::sub(shifted, magic)); // -0.5..0.5
    auto power = V::set(1.3333558e-3f);
    power = V::fma(power, rest, V::set(9.6181291e-3f));
    power = V::fma(power, rest, V::set(5.5504109e-2f));
    power = V::fma(power, rest, V::set(2.4022651e-1f));
    power = V::fma(power, rest, V::set(6.9314718e-1f));
    power = V::fma(power, rest, V::set(1.0f));
    return V::add_exponent(power, shifted);
}

template <class V>
struct Evaluation {
    typename V::F u, v, power; // power: the opacity before it is limited; meaningless where not valid
    typename V::M valid;
};

template <class V>
inline Evaluation<V> evaluate(const Local& g, typename V::F x, typename V::F y) {
    const auto u = V::fma(V::set(g.r1), x, V::fma(V::set(g.r2), y, V::set(g.cu)));
    const auto v = V::fma(V::set(g.s1), y, V::set(g.cv));
    const auto p = V::fnma(v, v, V::fnma(u, u, V::set(g.log_opacity)));
    return {u, v, exp2<V>(p), V::at_least(p, V::set(kMinLogAlpha))};
}

// The blocks in which the Gaussian may reach 1/255, a bit each: from the exact interval of every row of pixels.
template <class V>
inline uint64_t reach(const float* record, const Tile& tile) {
    constexpr float slack = 1e-3f; // of the limit and of a pixel, against rounding: a block too many costs time alone
    const float limit = record[kLogOpacity] - kMinLogAlpha;
    if (!(limit >= 0.0f)) return 0; // too faint, or not a number
    const auto& at = layout<V>();
    const auto zero = V::zero();
    const auto one = V::set(int32_t{1});
    const auto x = V::set(record[kX] - static_cast<float>(tile.x) - 0.5f); // from here on in pixel indices
    const auto row = V::load(at.row), shift = V::load(at.shift);
    uint64_t mask = 0;
    for (int part = 0; part < kTile / V::N; ++part) {
        const auto dy = V::add(row, V::set(static_cast<float>(tile.y + part * V::N) - record[kY]));
        const auto v = V::mul(V::set(record[kS1]), dy);
        const auto rest = V::fnma(v, v, V::set(limit + slack));
        const auto half = V::fma(V::sqrt(V::max(rest, zero)), V::set(record[kInverseR1]), V::set(slack));
        const auto middle = V::fnma(V::set(record[kRatio]), dy, x);
        const auto left = V::max(V::sub(middle, half), zero), right = V::add(middle, half);
        const auto inside = V::both(V::at_least(rest, zero), V::both(V::at_least(right, left), V::at_least(V::set(15.0f), left)));
        // first and last pixel, then the blocks they are in
        const auto begin = V::quarter(V::truncate(V::min(V::add(left, V::set(0.9999f)), V::set(15.0f))));
        const auto end = V::quarter(V::truncate(V::max(V::min(right, V::set(15.0f)), zero)));
        const auto columns = V::sub(V::shift_left(one, V::add(end, one)), V::shift_left(one, begin));
        const auto bits = V::shift_left(V::keep(inside, V::keep(V::at_least(V::to_float(end), V::to_float(begin)), columns)), shift);
        mask |= static_cast<uint64_t>(V::either_lane(bits)) << (16 * part);
    }
    return mask;
}

// The pixels of an image that a tile covers, in the order of lanes: `fill` where the tile leaves the image.
template <class V>
void gather(const float* image, int64_t channels, const Tile& tile, float fill, float* out) {
    const auto& at = layout<V>();
    for (int i = 0; i < kPixels; ++i) {
        const int row = at.pixel[i] / kTile, column = at.pixel[i] % kTile;
        const bool inside = row < tile.rows && column < tile.columns;
        const float* pixel = image + ((tile.y + row) * tile.width + tile.x + column) * channels;
        for (int64_t c = 0; c < channels; ++c) out[c * kPixels + i] = inside ? pixel[c] : fill;
    }
}

template <class V>
void scatter(const float* in, int64_t channels, const Tile& tile, float* image) {
    const auto& at = layout<V>();
    for (int i = 0; i < kPixels; ++i) {
        const int row = at.pixel[i] / kTile, column = at.pixel[i] % kTile;
        if (row >= tile.rows || column >= tile.columns) continue;
        float* pixel = image + ((tile.y + row) * tile.width + tile.x + column) * channels;
        for (int64_t c = 0; c < channels; ++c) pixel[c] = in[c * kPixels + i];
    }
}

// A block's transmittance, running past the stop and where it stopped, and its colours, across the chunks of a tile.
struct ForwardState {
    alignas(64) float running[kPixels], stopped[kPixels];
    float* colors; // [channels][kPixels]
};

// One block and the Gaussians of a chunk that reach it. Returns whether any of its pixels is still open.
template <class V, int Channels>
bool forward_block(const ForwardTask& task, int block, const Local* locals, const uint8_t* list, int count, ForwardState& state) {
    using F = typename V::F;
    const auto& at = layout<V>();
    const int64_t channels = Channels == kAny ? task.channels : Channels;
    const int first = block * V::N;
    const F x = V::load(at.x + first), y = V::load(at.y + first);
    const F limit = V::set(task.max_alpha), stop = V::set(kMinTransmittance);
    F running = V::load(state.running + first), stopped = V::load(state.stopped + first);
    F colors[Channels == kAny ? 1 : Channels];
    if constexpr (Channels != kAny)
        for (int c = 0; c < Channels; ++c) colors[c] = V::load(state.colors + c * kPixels + first);
    bool open = true;
    for (int i = 0; i < count && open; ++i) {
        const Local& g = locals[list[i]];
        const auto e = evaluate<V>(g, x, y);
        const F alpha = V::keep(e.valid, V::min(limit, e.power));
        const F next = V::fnma(alpha, running, running);
        const auto ok = V::greater(next, stop);
        const F weight = V::keep(ok, V::mul(running, alpha));
        if constexpr (Channels == kAny)
            for (int64_t c = 0; c < channels; ++c) {
                float* color = state.colors + c * kPixels + first;
                V::store(color, V::fma(weight, V::set(g.color[c]), V::load(color)));
            }
        else
            for (int c = 0; c < Channels; ++c) colors[c] = V::fma(weight, V::set(g.color[c]), colors[c]);
        stopped = V::select(ok, next, stopped);
        running = next;
        open = V::any(ok);
    }
    V::store(state.running + first, running);
    V::store(state.stopped + first, stopped);
    if constexpr (Channels != kAny)
        for (int c = 0; c < Channels; ++c) V::store(state.colors + c * kPixels + first, colors[c]);
    return open;
}

template <class V, int Channels>
void forward(const ForwardTask& task) {
    constexpr int blocks = Layout<V>::kBlocks;
    const Tile& tile = task.tile;
    const int64_t stride = record_floats(task.channels);
    static thread_local std::vector<float> colors;
    colors.assign(task.channels * kPixels, 0.0f);
    ForwardState state;
    state.colors = colors.data();
    uint64_t open = 0;
    for (int i = 0; i < kPixels; ++i) {
        const int pixel = layout<V>().pixel[i];
        const bool inside = pixel / kTile < tile.rows && pixel % kTile < tile.columns;
        state.running[i] = state.stopped[i] = inside ? 1.0f : 0.0f;
        if (inside) open |= uint64_t{1} << (i / V::N);
    }
    Local locals[kChunk];
    uint8_t lists[blocks][kChunk];
    int64_t begin = 0;
    for (; begin < tile.count && open; begin += kChunk) {
        const int count = static_cast<int>(std::min<int64_t>(kChunk, tile.count - begin));
        int sizes[blocks] = {};
        for (int i = 0; i < count; ++i) {
            prefetch(task.records, tile, begin + i, stride);
            const float* record = task.records + tile.ids[begin + i] * stride;
            locals[i] = local(record, tile);
            const uint64_t mask = reach<V>(record, tile);
            task.masks[begin + i] = mask;
            for (uint64_t rest = mask & open; rest; rest &= rest - 1) {
                const int block = __builtin_ctzll(rest);
                lists[block][sizes[block]++] = static_cast<uint8_t>(i);
            }
        }
        for (uint64_t rest = open; rest; rest &= rest - 1) {
            const int block = __builtin_ctzll(rest);
            if (!forward_block<V, Channels>(task, block, locals, lists[block], sizes[block], state))
                open &= ~(uint64_t{1} << block);
        }
    }
    if (begin < tile.count) std::fill(task.masks + begin, task.masks + tile.count, uint64_t{0});
    if (task.background)
        for (int64_t c = 0; c < task.channels; ++c)
            for (int i = 0; i < kPixels; ++i) colors[c * kPixels + i] += state.stopped[i] * task.background[c];
    scatter<V>(colors.data(), task.channels, tile, task.render);
    scatter<V>(state.stopped, 1, tile, task.transmittance);
}

// The sums of one Gaussian over the pixels of a tile, in lanes.
template <class V, int Channels, bool Absolute>
struct Sums {
    using F = typename V::F;
    static constexpr int kFixed = kAbsX + (Absolute ? 2 : 0);
    F fixed[kFixed];
    F color[Channels == kAny ? 1 : Channels];

    // fixed and colour sums as one row of floats, eight at a time
    void reduce(float* slot) const {
        constexpr int count = kFixed + (Channels == kAny ? 0 : Channels);
        F all[(count + 7) / 8 * 8];
        for (int i = 0; i < kFixed; ++i) all[i] = fixed[i];
        for (int c = 0; c < count - kFixed; ++c) all[kFixed + c] = color[c];
        for (int i = count; i < (count + 7) / 8 * 8; ++i) all[i] = V::zero();
        alignas(64) float sums[(count + 7) / 8 * 8];
        for (int i = 0; i < count; i += 8) V::sums8(all + i, sums + i);
        for (int i = 0; i < kFixed; ++i) slot[i] = sums[i];
        for (int c = 0; c < count - kFixed; ++c) slot[kSumColor + c] = sums[kFixed + c];
    }
};

// Per pixel, in the order of lanes, before the next Gaussian: the transmittance, and what the Gaussians behind add to
// the loss with the background, per unit of their own change.
struct BackwardState {
    alignas(64) float running[kPixels], behind[kPixels];
    const float* grad;   // [channels][kPixels]
    float* color_lanes;  // [channels][V::N], for any number of channels: the sums of one Gaussian
};

template <class V, int Channels, bool Absolute>
void backward_gaussian(const BackwardTask& task, const Local& g, const float* record, uint64_t& open, uint64_t mask,
                       BackwardState& state, float* slot) {
    using F = typename V::F;
    const auto& at = layout<V>();
    const int64_t channels = Channels == kAny ? task.channels : Channels;
    const F limit = V::set(task.max_alpha), stop = V::set(kMinTransmittance), one = V::set(1.0f);
    Sums<V, Channels, Absolute> sums;
    for (auto& sum : sums.fixed) sum = V::zero();
    for (auto& sum : sums.color) sum = V::zero();
    if constexpr (Channels == kAny) std::fill(state.color_lanes, state.color_lanes + channels * V::N, 0.0f);
    for (; mask; mask &= mask - 1) {
        const int block = __builtin_ctzll(mask), first = block * V::N;
        const auto e = evaluate<V>(g, V::load(at.x + first), V::load(at.y + first));
        const F running = V::load(state.running + first);
        const F alpha = V::keep(e.valid, V::min(limit, e.power));
        const F next = V::fnma(alpha, running, running);
        const auto ok = V::greater(next, stop);
        const F weight = V::keep(ok, V::mul(running, alpha));
        F shade = V::zero(); // colour times dL/dcolour
        for (int64_t c = 0; c < channels; ++c) {
            const F grad = V::load(state.grad + c * kPixels + first);
            shade = V::fma(V::set(g.color[c]), grad, shade);
            if constexpr (Channels == kAny)
                V::store(state.color_lanes + c * V::N, V::fma(weight, grad, V::load(state.color_lanes + c * V::N)));
            else
                sums.color[c] = V::fma(weight, grad, sums.color[c]);
        }
        const F own = V::mul(weight, shade);
        const F behind = V::sub(V::load(state.behind + first), own);
        V::store(state.running + first, next);
        V::store(state.behind + first, behind);
        const auto moves = V::both(ok, V::at_least(limit, e.power)); // an opacity at its limit stays there
        const F h = V::keep(moves, V::fnma(behind, V::div(alpha, V::sub(one, alpha)), own));
        const F hu = V::mul(h, e.u), hv = V::mul(h, e.v);
        sums.fixed[kH] = V::add(sums.fixed[kH], h);
        sums.fixed[kHu] = V::add(sums.fixed[kHu], hu);
        sums.fixed[kHv] = V::add(sums.fixed[kHv], hv);
        sums.fixed[kHuu] = V::fma(hu, e.u, sums.fixed[kHuu]);
        sums.fixed[kHuv] = V::fma(hu, e.v, sums.fixed[kHuv]);
        sums.fixed[kHvv] = V::fma(hv, e.v, sums.fixed[kHvv]);
        if constexpr (Absolute) {
            const F y = V::fma(V::set(record[kR2]), hu, V::mul(V::set(record[kS1]), hv));
            sums.fixed[kAbsX] = V::add(sums.fixed[kAbsX], V::abs(hu));
            sums.fixed[kAbsY] = V::add(sums.fixed[kAbsY], V::abs(y));
        }
        if (!V::any(ok)) open &= ~(uint64_t{1} << block);
    }
    sums.reduce(slot);
    if constexpr (Channels == kAny)
        for (int64_t c = 0; c < channels; ++c) slot[kSumColor + c] = V::sum(V::load(state.color_lanes + c * V::N));
}

template <class V, int Channels, bool Absolute>
void backward(const BackwardTask& task) {
    const Tile& tile = task.tile;
    const int64_t channels = task.channels, stride = record_floats(channels);
    static thread_local std::vector<float> grads, render, color_lanes;
    grads.resize(channels * kPixels);
    render.resize(channels * kPixels);
    gather<V>(task.grad_render, channels, tile, 0.0f, grads.data());
    gather<V>(task.render, channels, tile, 0.0f, render.data());
    BackwardState state;
    color_lanes.resize(channels * V::N);
    state.grad = grads.data();
    state.color_lanes = color_lanes.data();
    alignas(64) float grad_alpha[kPixels];
    gather<V>(task.grad_alpha, 1, tile, 0.0f, grad_alpha);
    gather<V>(task.transmittance, 1, tile, 0.0f, state.behind);
    for (int i = 0; i < kPixels; ++i) {
        state.running[i] = state.behind[i] > 0.0f ? 1.0f : 0.0f; // none is left outside the image alone
        state.behind[i] *= -grad_alpha[i];
    }
    for (int64_t c = 0; c < channels; ++c)
        for (int i = 0; i < kPixels; ++i) state.behind[i] += grads[c * kPixels + i] * render[c * kPixels + i];
    uint64_t open = ~uint64_t{0};
    for (int64_t i = 0; i < tile.count; ++i) {
        prefetch(task.records, tile, i, stride);
        if (i + kAhead < tile.count) __builtin_prefetch(task.sums + task.slots[i + kAhead] * stride, 1);
        float* slot = task.sums + task.slots[i] * stride;
        const uint64_t mask = task.masks[i] & open;
        if (!mask) {
            std::fill(slot, slot + stride, 0.0f);
            continue;
        }
        const float* record = task.records + tile.ids[i] * stride;
        backward_gaussian<V, Channels, Absolute>(task, local(record, tile), record, open, mask, state, slot);
    }
}

template <class V, int Channels>
void backward_either(const BackwardTask& task) {
    if (task.absolute)
        backward<V, Channels, true>(task);
    else
        backward<V, Channels, false>(task);
}

// Depth alone, colours or normals, and either with depth have code of their own; any other number of channels works.
template <class V>
TileOps simd_tile_ops(const char* name) {
    return {name,
            [](const ForwardTask& task) {
                switch (task.channels) {
                case 1: return forward<V, 1>(task);
                case 3: return forward<V, 3>(task);
                case 4: return forward<V, 4>(task);
                default: return forward<V, kAny>(task);
                }
            },
            [](const BackwardTask& task) {
                switch (task.channels) {
                case 1: return backward_either<V, 1>(task);
                case 3: return backward_either<V, 3>(task);
                case 4: return backward_either<V, 4>(task);
                default: return backward_either<V, kAny>(task);
                }
            }};
}

} // namespace
} // namespace kernels::splat
