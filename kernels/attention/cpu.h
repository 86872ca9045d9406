// Block-sparse attention on the CPU. All arrays are contiguous; results do not depend on `threads` (>= 1), bit for bit.
#pragma once
#include <cstdint>

namespace kernels::attention {

// float32, or bfloat16 as its bits
struct Array {
    const void* data;
    bool half;
};
struct ArrayOut {
    void* data;
    bool half;
};

// q [batch][heads][queries][depth]; k and v [batch][key_heads][keys][depth], key_heads a divisor of heads.
// present [batch][keys]: 0 for keys that are padding and may hold anything; null if there are none.
struct Problem {
    int64_t batch, heads, key_heads, queries, keys;
    int depth, block; // tokens a side of a tile
    float scale;
    const uint8_t* present;

    int64_t query_blocks() const { return (queries + block - 1) / block; }
    int64_t key_blocks() const { return (keys + block - 1) / block; }
};

// Kept key blocks of row (batch b, head h, query block r), row = ((b % mask_batch) mask_heads + h % mask_heads) blocks + r:
// columns[starts[row]] up to columns[starts[row + 1]], ascending. mask_batch and mask_heads are 1 or the problem's.
struct Mask {
    const int32_t* starts;
    const uint16_t* columns;
    int64_t batch, heads;
};

// out like q, lse [batch][heads][queries] in natural logarithms. Where there is nothing to attend to: 0 and -inf.
void attention(const Problem& p, const Mask& mask, Array q, Array k, Array v, ArrayOut out, float* lse, int threads);

// Over all tiles, and scores [batch][heads][query_blocks][key_blocks], the sum of weights in each.
void search(const Problem& p, Array q, Array k, Array v, ArrayOut out, float* lse, float* scores, int threads);

// Sums of exp(scale q k - lse) alone, at most 2^112 each; queries with an lse of -inf add nothing.
void block_scores(const Problem& p, Array q, Array k, const float* lse, float* scores, int threads);

// dq, dk, dv from d_out like q and shift [batch][heads][queries] = sum(d_out out) - d_lse.
void gradients(const Problem& p, const Mask& mask, Array d_out, const float* shift, Array q, Array k, Array v,
               const float* lse, ArrayOut dq, ArrayOut dk, ArrayOut dv, int threads);

} // namespace kernels::attention
