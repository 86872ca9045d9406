// The products of row.h over lanes of any width: see there. Included once per instruction set.
#pragma once
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../simd/transpose.h"
#include "row.h"

namespace kernels::nm {
namespace { // one copy for each translation unit: code for this instruction set must not leak to others at link time

inline float widened(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float out;
    std::memcpy(&out, &wide, sizeof out);
    return out;
}
inline float value_of(const float* p) { return *p; }
inline float value_of(const uint16_t* p) { return widened(*p); }

template <class L>
typename L::F load_values(const float* p) {
    return L::load(p);
}
template <class L>
typename L::F load_values(const uint16_t* p) {
    return L::widen(p);
}

// Groups of up to 8, 16 and 32, whose inputs are permuted, and longer ones, whose inputs are gathered.
enum class Group { narrow, wide, widest, longer };

// ---- few tokens: sixteen rows along the lanes

template <class L, Group group>
typename L::F picked(const float* x, const typename L::F* window, typename L::I index) {
    if constexpr (group == Group::narrow) return L::pick(window, index);
    else if constexpr (group == Group::wide) return L::pick_wide(window, index);
    else if constexpr (group == Group::widest) return L::pick_widest(window, index);
    else return L::gather(x, index);
}

template <class L, class Value, Group kind, int Count>
void few_tokens(const Packed& w, int64_t block, const float* x, int64_t stride, float* out) {
    using F = typename L::F;
    constexpr int parts = kBlock / L::N;
    constexpr int windows = kind == Group::widest ? 2 * parts : kind == Group::wide ? parts : kind == Group::narrow ? 1 : 0;
    constexpr bool nibbles = kind == Group::narrow || kind == Group::wide;
    const auto* value = static_cast<const Value*>(w.values) + block * w.slots() * kBlock;
    const uint8_t* place = w.places + block * w.slots() * w.place_bytes();
    F sum[Count][parts];
    for (auto& row : sum)
        for (F& part : row) part = L::zero();
    for (int64_t group = 0; group < w.groups; ++group, x += w.m) {
        F window[Count][windows + 1];
        for (int t = 0; t < Count; ++t)
            for (int i = 0; i < windows; ++i) window[t][i] = L::load(x + t * stride + i * L::N);
        for (int slot = 0; slot < w.n; ++slot, value += kBlock, place += nibbles ? kBlock / 2 : kBlock)
            for (int part = 0; part < parts; ++part) {
                const F v = load_values<L>(value + part * L::N);
                const typename L::I index = nibbles ? L::nibbles(place, part) : L::bytes(place + part * L::N);
                for (int t = 0; t < Count; ++t)
                    sum[t][part] = L::fma(v, picked<L, kind>(x + t * stride, window[t], index), sum[t][part]);
            }
    }
    for (int t = 0; t < Count; ++t)
        for (int part = 0; part < parts; ++part) L::store(out + t * kBlock + part * L::N, sum[t][part]);
}

inline int place_at(const uint8_t* slot, int row, bool nibbles) {
    return nibbles ? (slot[row & 7] >> (row < 8 ? 0 : 4)) & 15 : slot[row];
}

// The same without a permutation across lanes.
template <class Value>
void few_tokens_plain(const Packed& w, int64_t block, const float* x, int64_t stride, int count, float* out) {
    const bool nibbles = w.m <= kNibbles;
    std::fill(out, out + count * kBlock, 0.0f);
    const auto* value = static_cast<const Value*>(w.values) + block * w.slots() * kBlock;
    const uint8_t* place = w.places + block * w.slots() * w.place_bytes();
    for (int64_t group = 0; group < w.groups; ++group, x += w.m)
        for (int slot = 0; slot < w.n; ++slot, value += kBlock, place += w.place_bytes())
            for (int row = 0; row < kBlock; ++row)
                for (int t = 0; t < count; ++t)
                    out[t * kBlock + row] += value_of(value + row) * x[t * stride + place_at(place, row, nibbles)];
}

template <class L, class Value, Group kind>
void few_of(const Packed& w, int64_t block, const float* x, int64_t stride, int count, float* out) {
    switch (count) {
    case 1: return few_tokens<L, Value, kind, 1>(w, block, x, stride, out);
    case 2: return few_tokens<L, Value, kind, 2>(w, block, x, stride, out);
    case 3: return few_tokens<L, Value, kind, 3>(w, block, x, stride, out);
    default: return few_tokens<L, Value, kind, 4>(w, block, x, stride, out);
    }
}

template <class L, class Value>
void few_with(const Packed& w, int64_t block, const float* x, int64_t stride, int count, float* out) {
    if constexpr (L::N < 8) return few_tokens_plain<Value>(w, block, x, stride, count, out);
    else if (w.m <= 8) return few_of<L, Value, Group::narrow>(w, block, x, stride, count, out);
    else if (w.m <= kNibbles) return few_of<L, Value, Group::wide>(w, block, x, stride, count, out);
    else if (w.m <= kPermuted) return few_of<L, Value, Group::widest>(w, block, x, stride, count, out);
    else return few_of<L, Value, Group::longer>(w, block, x, stride, count, out);
}

template <class L>
void few(const Packed& w, int64_t block, const float* x, int64_t stride, int count, float* out) {
    return w.half ? few_with<L, uint16_t>(w, block, x, stride, count, out)
                  : few_with<L, float>(w, block, x, stride, count, out);
}

// ---- many tokens: tokens along the lanes

template <class L, int Vectors>
struct Accumulators {
    typename L::F sum[Vectors];

    explicit Accumulators(const float* from) {
        for (int i = 0; i < Vectors; ++i) sum[i] = L::load(from + i * L::N);
    }
    void add(typename L::F weight, const float* row) {
        for (int i = 0; i < Vectors; ++i) sum[i] = L::fma(weight, L::load(row + i * L::N), sum[i]);
    }
    void store(float* to) const {
        for (int i = 0; i < Vectors; ++i) L::store(to + i * L::N, sum[i]);
    }
};

template <class L, class Value, bool nibbles, int Vectors>
void many_rows(const Packed& w, int64_t block, int64_t first, int64_t last, const float* panel, float* y) {
    constexpr int64_t width = Vectors * L::N, bytes = nibbles ? kBlock / 2 : kBlock;
    const int64_t start = block * w.slots() + first * w.n;
    const auto* values = static_cast<const Value*>(w.values) + start * kBlock;
    const uint8_t* places = w.places + start * bytes;
    const int64_t group_floats = w.m * width;
    for (int row = 0; row < kBlock; ++row, y += width) {
        Accumulators<L, Vectors> sums(y);
        const auto* value = values + row;
        const uint8_t* place = places + (nibbles ? row & 7 : row);
        const int shift = nibbles && row >= 8 ? 4 : 0, keep = nibbles ? 15 : 255;
        const float* inputs = panel;
        for (int64_t group = first; group < last; ++group, inputs += group_floats)
            for (int slot = 0; slot < w.n; ++slot, value += kBlock, place += bytes)
                sums.add(L::set(value_of(value)), inputs + ((*place >> shift) & keep) * width);
        sums.store(y);
    }
}

template <class L, int Vectors>
void listed_rows(const Entry* entries, const int64_t* starts, int64_t count, const float* panel, float* y) {
    constexpr int64_t width = Vectors * L::N;
    for (int64_t list = 0; list < count; ++list, y += width) {
        Accumulators<L, Vectors> sums(y);
        for (int64_t i = starts[list]; i < starts[list + 1]; ++i)
            sums.add(L::set(entries[i].value), panel + entries[i].row * width);
        sums.store(y);
    }
}

// Eight kept places of a row at once, so that their eight sums over the lanes are made together; the row's tokens four
// vectors at a time, which stay in registers.
template <class L, int Vectors>
void sampled_rows(const Packed& w, int64_t block, int64_t first, int64_t last, const float* dy, const float* x, float* out) {
    using F = typename L::F;
    constexpr int64_t width = Vectors * L::N;
    constexpr int at_once = 8, kept = Vectors < 4 ? Vectors : 4;
    const bool nibbles = w.m <= kNibbles;
    const int64_t slots = (last - first) * w.n, bytes = w.place_bytes();
    const uint8_t* places = w.places + (block * w.slots() + first * w.n) * bytes;
    for (int row = 0; row < kBlock; ++row, dy += width) {
        const float* group = x;
        int slot = 0;
        for (int64_t begin = 0; begin < slots; begin += at_once) {
            const int count = static_cast<int>(std::min<int64_t>(at_once, slots - begin));
            const float* columns[at_once];
            F sums[at_once];
            for (int i = 0; i < at_once; ++i) {
                sums[i] = L::zero();
                columns[i] = i < count ? group + place_at(places + (begin + i) * bytes, row, nibbles) * width : x;
                if (i < count && ++slot == w.n) slot = 0, group += w.m * width;
            }
            for (int v = 0; v < Vectors; v += kept) {
                F slopes[kept];
                for (int k = 0; k < kept; ++k) slopes[k] = L::load(dy + (v + k) * L::N);
                for (int i = 0; i < at_once; ++i)
                    for (int k = 0; k < kept; ++k)
                        sums[i] = L::fma(slopes[k], L::load(columns[i] + (v + k) * L::N), sums[i]);
            }
            float totals[at_once];
            L::sums8(sums, totals);
            for (int i = 0; i < count; ++i) out[(begin + i) * kBlock + row] += totals[i];
        }
    }
}

template <class L, int Vectors>
void many_of(const Packed& w, int64_t block, int64_t first, int64_t last, const float* panel, float* y) {
    if (w.m <= kNibbles)
        return w.half ? many_rows<L, uint16_t, true, Vectors>(w, block, first, last, panel, y)
                      : many_rows<L, float, true, Vectors>(w, block, first, last, panel, y);
    return w.half ? many_rows<L, uint16_t, false, Vectors>(w, block, first, last, panel, y)
                  : many_rows<L, float, false, Vectors>(w, block, first, last, panel, y);
}

// Calls `use` with the number of vectors as a constant: 8, 4, 2 or 1.
template <class Use>
void with_vectors(int vectors, Use use) {
    switch (vectors) {
    case 8: return use(std::integral_constant<int, 8>{});
    case 4: return use(std::integral_constant<int, 4>{});
    case 2: return use(std::integral_constant<int, 2>{});
    default: return use(std::integral_constant<int, 1>{});
    }
}

template <class L>
void many(const Packed& w, int64_t block, int64_t first, int64_t last, const float* panel, int vectors, float* y) {
    with_vectors(vectors, [&](auto v) { many_of<L, v>(w, block, first, last, panel, y); });
}

template <class L>
void listed(const Entry* entries, const int64_t* starts, int64_t count, const float* panel, int vectors, float* y) {
    with_vectors(vectors, [&](auto v) { listed_rows<L, v>(entries, starts, count, panel, y); });
}

template <class L>
void sampled(const Packed& w, int64_t block, int64_t first, int64_t last, const float* dy, const float* x, int vectors,
             float* out) {
    with_vectors(vectors, [&](auto v) { sampled_rows<L, v>(w, block, first, last, dy, x, out); });
}

template <class L>
RowOps simd_row_ops(const char* name) {
    return {name, L::N, few<L>, many<L>, listed<L>, sampled<L>, simd::transpose_plain};
}

} // namespace
} // namespace kernels::nm
