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

// Products of bfloat16 on processors with tiles (simd/tiles_emulated.h), beside the operations of the same lanes. Queries
// lie along the lanes here too, so they and the weights are right sides of products and all of keys and values are left
// ones. Those are packed once for all queries, with zeros behind the ends: keys and depth to multiples of 32.
//     keys    [slots / 16][depth / 32][16 keys][32 of the depth]
//     values  [slots / 32][depth / 16][16 of the depth][32 keys]
//     queries [depth / 32][4][16 pairs of the depth][16 queries][2]
//     weights [64 / 32][4][16 pairs of keys][16 queries][2]
struct MatrixOps {
    const TileOps& lanes; // buffers with rows of 64
    void (*begin)(); // what a thread calls before it uses the products, and after
    void (*end)();
    // scores = keys [rows] queries, depth a multiple of 32; also of the zeros behind `rows`
    void (*product)(const uint16_t* keys, int rows, int depth, const uint16_t* queries, int lanes, float* scores);
    // out [depth] += values [rows] weights
    void (*accumulate)(const uint16_t* values, int rows, int depth, const uint16_t* weights, int lanes, float* out);
    // As in TileOps, of factor times scores. The weights are rounded, with zeros behind `rows`; sums are of unrounded ones.
    void (*weigh)(const float* scores, int rows, int lanes, float factor, float* maximum, float* sum, float* block_sum, float* out,
                  int depth, uint16_t* weights);
    // sum [64] of 2^(factor score - offset), at most 2^112 each
    void (*raise)(const float* scores, int rows, int lanes, float factor, const float* offset, float* sum);
};
constexpr int kStep = 32; // of keys and depth in a product of tiles

const TileOps& portable_tile_ops();
#if defined(KERNELS_X86)
const TileOps& avx2_tile_ops();
const TileOps& avx512_tile_ops();
#endif
const TileOps& emulated512_tile_ops();
#if defined(KERNELS_AMX)
const MatrixOps& amx_matrix_ops();
#endif
const MatrixOps& emulated_amx_matrix_ops();

} // namespace kernels::attention
