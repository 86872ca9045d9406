// The search over the compiler's vectors V of any width: included by mask_portable.cpp and mask_avx2.cpp, each compiled
// with flags of its own. Integer minimum, maximum and comparison are all it takes, which every compiler makes of operators.
#pragma once
#include <algorithm>
#include <cstring>

#include "mask_ops.h"

namespace kernels::nm {
namespace { // one copy for each translation unit: code for another instruction set must not leak in at link time

typedef int32_t Four __attribute__((vector_size(16)));

template <class Vector>
Vector vector_at(const void* p) {
    Vector out;
    std::memcpy(&out, p, sizeof out);
    return out;
}

template <int A, int B, int C, int D>
Four pick(Four a, Four b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, A, B, C, D);
#else
    return __builtin_shuffle(a, b, Four{A, B, C, D});
#endif
}

// Calls body(offset of the first lane's first place, number of that lane within first..last, how many lanes) for every run
// of lanes that lie evenly in memory.
template <class Body>
void in_runs(const Groups& groups, int64_t first, int64_t last, Body body) {
    for (int64_t lane = first; lane < last;) {
        const int64_t group = lane / groups.inner, within = lane % groups.inner;
        const int64_t start = group / groups.per_row * groups.row + group % groups.per_row * groups.size * groups.inner;
        const int64_t run = groups.inner == 1 ? groups.per_row - group % groups.per_row : groups.inner - within;
        const int64_t length = std::min(run, last - lane);
        body(start + within, lane - first, length);
        lane += length;
    }
}

template <class V>
struct Search {
    using I = typename V::I;
    using D = typename V::D;
    static constexpr int N = V::N;

    static void select(const Groups& groups, int64_t first, int64_t last, int32_t* scratch) {
        if (groups.size <= kShort)
            Panel(groups, scratch).select(first, last);
        else
            select_long(groups, first, last, scratch);
    }

    static void best_template(const Templates& t, const double* values, int64_t lanes, int64_t* best) {
        using L = typename V::L;
        constexpr int N = V::N / 2;
        for (int64_t lane = 0; lane < lanes; lane += N) {
            D sums[4][6];
            for (int r = 0; r < t.m; ++r)
                for (int p = 0; p < t.patterns; ++p) {
                    D sum = vector_at<D>(values + (r * t.m + t.columns[p][0]) * lanes + lane);
                    for (int k = 1; k < t.n; ++k) sum += vector_at<D>(values + (r * t.m + t.columns[p][k]) * lanes + lane);
                    sums[r][p] = sum;
                }
            D most = D{} - 1.0;
            L found = {};
            for (int i = 0; i < t.count; ++i) {
                D sum = sums[0][t.rows[i][0]];
                for (int r = 1; r < t.m; ++r) sum += sums[r][t.rows[i][r]];
                const L better = sum > most;
                most = better ? sum : most;
                found = better ? L{} + i : found;
            }
            std::memcpy(best + lane, &found, sizeof found);
        }
    }

private:
    // Short groups. Their keys lie in a scratch buffer, places apart, lanes side by side, and are searched N lanes at once.
    class Panel {
    public:
        Panel(const Groups& groups, int32_t* keys)
            : groups_(groups), keys_(keys), width_(lanes_of(groups)),
              // to keep most is to drop few: then the smallest are sought, of equals the last
              drops_(2 * groups.keep > groups.size), sought_(drops_ ? groups.size - groups.keep : groups.keep),
              flip_(drops_ ? kMagnitude : 0) {}

        void select(int64_t first, int64_t last) {
            const int64_t lanes = last - first, whole = (lanes + N - 1) / N * N;
            in_runs(groups_, first, last, [&](int64_t from, int64_t at, int64_t length) { read(from, at, length); });
            if (whole > lanes)
                for (int64_t j = 0; j < groups_.size; ++j) std::fill(row(j) + lanes, row(j) + whole, 0);
            search(whole);
            if (in_words()) join(whole);
            in_runs(groups_, first, last, [&](int64_t from, int64_t at, int64_t length) { write(from, at, length); });
        }

    private:
        int32_t* row(int64_t place) const { return keys_ + place * width_; }
        // four bytes of a mask are one integer of its lane
        bool in_words() const { return groups_.inner == 1 && groups_.size % 4 == 0; }

        int32_t key(float x) const { return magnitude(x) ^ flip_; }

        Four key(Four bits) const {
            bits &= kMagnitude;
            return (bits < kNaN ? bits : Four{} + kNaN) ^ flip_;
        }

        void read(int64_t from, int64_t at, int64_t length) const {
            const float* weight = groups_.weight + from;
            const int64_t size = groups_.size, inner = groups_.inner;
            if (inner > 1) {
                for (int64_t j = 0; j < size; ++j)
                    for (int64_t i = 0; i < length; ++i) row(j)[at + i] = key(weight[j * inner + i]);
                return;
            }
            int64_t i = 0;
            if (size % 4 == 0)
                for (; i + 4 <= length; i += 4)
                    for (int64_t j = 0; j < size; j += 4) transpose(weight + i * size + j, row(j) + at + i);
            for (; i < length; ++i)
                for (int64_t j = 0; j < size; ++j) row(j)[at + i] = key(weight[i * size + j]);
        }

        // Four places of four groups.
        void transpose(const float* weight, int32_t* out) const {
            Four group[4], pair[4];
            for (int i = 0; i < 4; ++i) group[i] = key(vector_at<Four>(weight + i * groups_.size));
            for (int i = 0; i < 2; ++i) {
                pair[i] = pick<0, 4, 1, 5>(group[i], group[i + 2]);
                pair[i + 2] = pick<2, 6, 3, 7>(group[i], group[i + 2]);
            }
            for (int i = 0; i < 4; i += 2) {
                const Four low = pick<0, 4, 1, 5>(pair[i], pair[i + 1]), high = pick<2, 6, 3, 7>(pair[i], pair[i + 1]);
                std::memcpy(out + i * width_, &low, sizeof low);
                std::memcpy(out + (i + 1) * width_, &high, sizeof high);
            }
        }

        // Keys become 0 or -1.
        void search(int64_t lanes) const {
            switch (sought_) {
            case 1: return search<1>(lanes);
            case 2: return search<2>(lanes);
            case 3: return search<3>(lanes);
            case 4: return search<4>(lanes);
            case 5: return search<5>(lanes);
            case 6: return search<6>(lanes);
            case 7: return search<7>(lanes);
            case 8: return search<8>(lanes);
            default: return search<0>(lanes);
            }
        }

        // Count: how many are sought, 0 for any number. The largest keys so far are kept in order; the last of them is in
        // the end the threshold: whatever is above it is found, and of those equal to it as many as are wanting.
        template <int Count>
        void search(int64_t lanes) const {
            const int count = Count ? Count : static_cast<int>(sought_);
            const int64_t begin = drops_ ? groups_.size - 1 : 0, step = drops_ ? -width_ : width_;
            const I invert = I{} - static_cast<int>(drops_);
            for (int64_t lane = 0; lane < lanes; lane += N) {
                int32_t* const start = row(begin) + lane;
                I best[Count ? Count : kShort / 2] = {};
                for (int i = 0; i < count; ++i) best[i] = I{} - 1; // below every key
                for (int64_t j = 0; j < groups_.size; ++j) {
                    I x = vector_at<I>(start + j * step);
                    for (int i = 0; i < count; ++i) {
                        const I smaller = best[i] < x ? best[i] : x;
                        best[i] = best[i] < x ? x : best[i];
                        x = smaller;
                    }
                }
                const I threshold = best[count - 1];
                I wanting = I{} + count;
                for (int i = 0; i < count - 1; ++i) wanting += best[i] > threshold;
                for (int64_t j = 0; j < groups_.size; ++j) {
                    const I x = vector_at<I>(start + j * step);
                    const I equal = (x == threshold) & (wanting > 0);
                    wanting += equal;
                    const I found = ((x > threshold) | equal) ^ invert;
                    std::memcpy(start + j * step, &found, sizeof found);
                }
            }
        }

        // Row q of the scratch buffer gets the bytes of the places 4 q to 4 q + 3.
        void join(int64_t lanes) const {
            for (int64_t q = 0; q < groups_.size / 4; ++q)
                for (int64_t i = 0; i < lanes; ++i)
                    row(q)[i] = (row(4 * q)[i] & 1) | (row(4 * q + 1)[i] & 0x100) | (row(4 * q + 2)[i] & 0x10000) |
                                (row(4 * q + 3)[i] & 0x1000000);
        }

        void write(int64_t from, int64_t at, int64_t length) const {
            uint8_t* out = groups_.out + from;
            const int64_t size = groups_.size, inner = groups_.inner;
            if (in_words()) {
                for (int64_t i = 0; i < length; ++i)
                    for (int64_t q = 0; q < size / 4; ++q) std::memcpy(out + i * size + 4 * q, row(q) + at + i, 4);
            } else if (inner == 1) {
                for (int64_t i = 0; i < length; ++i)
                    for (int64_t j = 0; j < size; ++j) out[i * size + j] = row(j)[at + i] & 1;
            } else {
                for (int64_t j = 0; j < size; ++j)
                    for (int64_t i = 0; i < length; ++i) out[j * inner + i] = row(j)[at + i] & 1;
            }
        }

        const Groups& groups_;
        int32_t* const keys_;
        const int64_t width_;
        const bool drops_;
        const int64_t sought_;
        const int32_t flip_;
    };

    // Long groups, one after the other.
    static void select_long(const Groups& groups, int64_t first, int64_t last, int32_t* keys) {
        const int64_t size = groups.size, inner = groups.inner;
        in_runs(groups, first, last, [&](int64_t from, int64_t, int64_t length) {
            const float* weight = groups.weight + from;
            if (inner == 1)
                for (int64_t i = 0; i < length * size; ++i) keys[i] = magnitude(weight[i]);
            else
                for (int64_t j = 0; j < size; ++j) // lanes that lie side by side share cache lines
                    for (int64_t i = 0; i < length; ++i) keys[i * size + j] = magnitude(weight[j * inner + i]);
            for (int64_t i = 0; i < length; ++i) mark(keys + i * size, size, groups.keep);
            uint8_t* out = groups.out + from;
            if (inner == 1)
                for (int64_t i = 0; i < length * size; ++i) out[i] = static_cast<uint8_t>(keys[i]);
            else
                for (int64_t j = 0; j < size; ++j)
                    for (int64_t i = 0; i < length; ++i) out[j * inner + i] = static_cast<uint8_t>(keys[i * size + j]);
        });
    }

    // Keys become 1 or 0.
    static void mark(int32_t* keys, int64_t size, int64_t keep) {
        const int32_t least = threshold(keys, size, keep);
        int32_t above = 0;
        for (int64_t j = 0; j < size; ++j) above += keys[j] > least;
        int64_t wanting = keep - above;
        for (int64_t j = 0; j < size; ++j) {
            const bool equal = keys[j] == least && wanting > 0;
            wanting -= equal;
            keys[j] = keys[j] > least || equal;
        }
    }

    // At least `keep` keys reach it and at most `keep` are above: the keep-th largest, or less where that tells the same. It
    // is found bit by bit, from the highest.
    static int32_t threshold(const int32_t* keys, int64_t size, int64_t keep) {
        int32_t least = 0;
        for (int bit = 30; bit >= 0; --bit) {
            const int32_t candidate = least | int32_t{1} << bit;
            int32_t reached = 0;
            for (int64_t j = 0; j < size; ++j) reached += keys[j] >= candidate;
            if (reached >= keep) least = candidate;
            if (reached == keep) break;
        }
        return least;
    }
};

template <class V>
MaskOps simd_mask_ops() {
    return {&Search<V>::select, &Search<V>::best_template};
}

} // namespace
} // namespace kernels::nm
