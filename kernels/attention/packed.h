// Queries, keys and values in tiles, as the operations of MatrixOps want them: see tile.h.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../simd/lines.h"
#include "cpu.h"
#include "tile.h"

namespace kernels::attention {

inline int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// Tiles of up to 64 queries [count][depth], zeros behind the ends.
inline void pack_queries(const uint16_t* rows, int count, int depth, Halves& queries) {
    queries.zero();
    for (int64_t lane = 0; lane < count; ++lane, rows += depth) {
        uint16_t* to = queries.data() + lane / 16 * 16 * kStep + lane % 16 * 2;
        for (int64_t d = 0; d < depth; ++d) to[d / kStep * kStep * kTile + d % kStep / 2 * 32 + d % 2] = rows[d];
    }
}

// Keys, and values unless they are null, of the heads [first, last) of all batch entries' key heads. Each block of keys has
// the same number of slots; its present keys stand at the beginning of them, zeros behind: padding is never multiplied.
class PackedKeys {
public:
    PackedKeys(const Problem& problem, int64_t first, int64_t last, Array keys, const Array* values, int threads)
        : p(problem), first_(first), blocks_(p.key_blocks()), slots_(round_up(p.block, kStep)), depth_(round_up(p.depth, kStep)),
          counts_(p.batch * blocks_), keys_((last - first) * entries(p)), values_(values ? (last - first) * entries(p) : 0) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t task = 0; task < (last - first) * blocks_; ++task) pack(keys, values, first + task / blocks_, task % blocks_);
        for (int64_t i = 0; i < p.batch * blocks_; ++i) {
            const Span keys_of = span(i % blocks_);
            counts_[i] = static_cast<int>(keys_of.last - keys_of.first);
            if (p.present) counts_[i] -= static_cast<int>(std::count(flags(i / blocks_) + keys_of.first, flags(i / blocks_) + keys_of.last, 0));
        }
    }

    // Of a head's keys, and of its values.
    static int64_t entries(const Problem& p) { return p.key_blocks() * round_up(p.block, kStep) * round_up(p.depth, kStep); }

    int depth() const { return static_cast<int>(depth_); } // a multiple of 32
    int count(int64_t batch, int64_t block) const { return counts_[batch * blocks_ + block]; }
    int64_t first_slot(int64_t block) const { return block * slots_; }
    // From a slot on: a multiple of 32.
    const uint16_t* keys(int64_t head, int64_t slot) const { return keys_.data() + at(head, slot); }
    const uint16_t* values(int64_t head, int64_t slot) const { return values_.data() + at(head, slot); }

private:
    const Problem& p;
    int64_t first_, blocks_, slots_, depth_;
    std::vector<int> counts_; // [batch][blocks] of present keys
    Halves keys_, values_;

    struct Span {
        int64_t first, last;
    };

    Span span(int64_t block) const { return {block * p.block, std::min((block + 1) * p.block, p.keys)}; }
    const uint8_t* flags(int64_t batch) const { return p.present + batch * p.keys; }
    int64_t at(int64_t head, int64_t slot) const { return ((head - first_) * blocks_ * slots_ + slot) * depth_; }

    void pack(Array keys, const Array* values, int64_t head, int64_t block) {
        const Span keys_of = span(block);
        int64_t slot = first_slot(block);
        for (int64_t key = keys_of.first; key < keys_of.last; ++key) {
            if (p.present && !flags(head / p.key_heads)[key]) continue;
            const int64_t row = (head * p.keys + key) * p.depth;
            pack_key(static_cast<const uint16_t*>(keys.data) + row, keys_.data() + at(head, slot / 16 * 16) + slot % 16 * kStep);
            if (values) pack_value(static_cast<const uint16_t*>(values->data) + row, values_.data() + at(head, slot / kStep * kStep) + slot % kStep);
            ++slot;
        }
    }

    void pack_key(const uint16_t* row, uint16_t* to) const {
        for (int64_t d = 0; d < p.depth; d += kStep) std::copy_n(row + d, std::min<int64_t>(kStep, p.depth - d), to + d * 16);
    }

    void pack_value(const uint16_t* row, uint16_t* to) const {
        for (int64_t d = 0; d < p.depth; ++d) to[d * kStep] = row[d];
    }
};

} // namespace kernels::attention
