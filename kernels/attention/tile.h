// The seam between what is the same on every machine (cpu.cpp: which tiles, threads, masks) and what is compiled once per
// instruction set (tile_*.cpp): products and exponentials of one tile.
//
// Everything is transposed. Up to 64 tokens (queries, or keys in the second half of the gradients) lie side by side along
// the lanes, and a buffer is rows of 64 floats. So maxima, sums and factors of a softmax are vertical, no vector is ever
// reduced, and the weights leave the exponential in the layout that the next product reads. The other operand is read by
// broadcast from where it lies in memory: nothing is packed but the 64 tokens themselves.
#pragma once
#include <cstdint>

namespace kernels::attention {

constexpr int kTile = 64;       // lanes of a buffer's row, and the most rows of a block of scores
constexpr int kMostDepth = 256; // head dim
constexpr float kNothing = -1e30f; // a maximum before the first score: finite, so that differences are

struct TileOps {
    const char* name;
    // out [rows][64] = a [rows][stride] b, with b [depth][64]; rows <= 64
    void (*product)(const float* a, int64_t stride, int rows, int depth, const float* b, int lanes, float* out);
    // out [rows][64] += a' b, with a [depth][stride] and b [depth][64]
    void (*accumulate)(const float* a, int64_t stride, int rows, int depth, const float* b, int lanes, float* out);
    // One step of the softmax over the base 2: scores [rows][64] become 2^(score - maximum) and are added to sum [64].
    // Where a maximum grows much it is raised, and sum and out [depth][64] shrink by as much. block_sum [64], unless null:
    // what was added.
    void (*weigh)(float* scores, int rows, int lanes, float* maximum, float* sum, float* block_sum, float* out, int depth);
    // scores become 2^(score - offset), at most 2^126: one offset a lane, or one a row; sum [64], unless null: of each lane
    void (*raise_by_lane)(float* scores, int rows, int lanes, const float* offset, float* sum);
    void (*raise_by_row)(float* scores, int rows, int lanes, const float* offset);
    // scores = weights (scores - shift): one shift a lane, or one a row
    void (*slope_by_lane)(float* scores, const float* weights, int rows, int lanes, const float* shift);
    void (*slope_by_row)(float* scores, const float* weights, int rows, int lanes, const float* shift);
};

const TileOps& portable_tile_ops();
#if defined(KERNELS_X86)
const TileOps& avx2_tile_ops();
const TileOps& avx512_tile_ops();
#endif
const TileOps& emulated512_tile_ops();

} // namespace kernels::attention
