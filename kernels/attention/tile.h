// The seam between what is the same on every machine (cpu.cpp: which tiles, threads, masks) and what is compiled once per
// instruction set (tile_*.cpp): products and exponentials of one tile.
//
// Everything is transposed. Up to 64 tokens (queries, or keys in the second half of the gradients) lie side by side along
// the lanes. So maxima, sums and factors of a softmax are vertical, no vector is ever reduced, and the weights leave the
// exponential in the layout that the next product reads. The other operand is read by broadcast from where it lies in
// memory: nothing is packed but the 64 tokens themselves.
//
// A buffer [rows][64] is cut into panels of as many lanes as a product holds in registers: [panel][rows][lanes of it].
// Whole rows of 64 would put a panel's rows 256 bytes apart, into a quarter of the first-level cache's sets.
#pragma once
#include <cstdint>

namespace kernels::attention {

constexpr int kTile = 64;       // lanes, and the most rows of a block of scores
constexpr int kMostDepth = 256; // head dim
constexpr float kNothing = -1e30f; // a maximum before the first score: finite, so that differences are

// rows, stride and depth say how the other operand lies: rows <= 64 for scores, or the head dim for outputs. Buffers named
// [depth] hold exactly that many rows, buffers of scores 64.
struct TileOps {
    const char* name;
    // floats of bfloat16s
    void (*widen)(const uint16_t* bits, int64_t count, float* floats);
    // buffer [depth] = factor times rows [count][depth], transposed; zero in the lanes behind `count`
    void (*pack)(const float* rows, int count, int depth, float factor, float* buffer);
    // rows [count][depth] = buffer [depth] transposed, each lane times its factor; zero where that is zero
    void (*unpack)(const float* buffer, int count, int depth, const float* factor, float* rows);
    // scores = a [rows][depth] b, with b [depth]
    void (*product)(const float* a, int rows, int depth, const float* b, int lanes, float* scores);
    // out [depth] += a' weights, with a [rows][depth]
    void (*accumulate)(const float* a, int rows, int depth, const float* weights, int lanes, float* out);
    // One step of the softmax over the base 2: scores become 2^(score - maximum) and are added to sum [64]. Where a maximum
    // grows much it is raised, and sum and out [depth] shrink by as much. block_sum [64], unless null: what was added.
    void (*weigh)(float* scores, int rows, int lanes, float* maximum, float* sum, float* block_sum, float* out, int depth);
    // scores become 2^(score - offset), at most 2^112: one offset a lane, or one a row; sum [64], unless null: of each lane
    void (*raise_by_lane)(float* scores, int rows, int lanes, const float* offset, float* sum);
    void (*raise_by_row)(float* scores, int rows, int lanes, const float* offset);
    // scores = weights (scores - shift): one shift a lane, or one a row
    void (*slope_by_lane)(float* scores, const float* weights, int rows, int lanes, const float* shift);
    void (*slope_by_row)(float* scores, const float* weights, int rows, int lanes, const float* shift);
    // values become 2^(value - offset), at most 2^112; lanes [64] of each
    void (*raise)(float* values, const float* offset);
};

const TileOps& portable_tile_ops();
#if defined(KERNELS_X86)
const TileOps& avx2_tile_ops();
const TileOps& avx512_tile_ops();
#endif
const TileOps& emulated512_tile_ops();

} // namespace kernels::attention
