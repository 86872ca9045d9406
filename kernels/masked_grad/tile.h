// What is compiled for each instruction set: the products of chosen entries, and a step of AdamW on a few of them.
//
// The sum over tokens (or over the pixels of all images) is cut into chunks. In a chunk both factors lie transposed, so
// that an entry (row, column) of the weight's gradient is the product of two rows of kChunk floats:
//
//     gradient, [rows][kChunk]     input, [columns][kChunk]     out[e] += gradient[row of e] . input[column of e]
#pragma once
#include <cstdint>

namespace kernels::masked_grad {

constexpr int kTile = 128; // rows and columns of a tile; an entry's offset is kTile * row + column
constexpr int64_t kChunk = 128; // tokens that are summed at once
constexpr int64_t kMultiple = 32; // tokens of the last chunk are filled up with zeros to a multiple of this

// Factors of one step of AdamW: g = scale gradient, m = m + (g - m) take1, v = keep2 v + take2 g g, and then
// w = w keep - m rate / (sqrt(v) root + eps), with both corrections of the bias within rate and root.
struct Step {
    float scale, take1, keep2, take2, keep, rate, root, eps;
};

struct TileOps {
    const char* name;
    // Of `count` entries of a tile; `gradient` holds its rows from `row` on, `input` its columns.
    void (*products)(const int16_t* offsets, int64_t count, const float* gradient, int row, const float* input, int64_t length,
                     float* out);
    // out [columns][out_stride] = in [rows][in_stride] transposed
    void (*transpose)(const float* in, int64_t in_stride, int64_t rows, int64_t columns, float* out, int64_t out_stride);
    void (*adamw)(const Step& step, int64_t count, const float* gradient, float* first, float* second, float* value);
};

const TileOps& portable_tile_ops();
const TileOps& avx2_tile_ops();
const TileOps& avx512_tile_ops();
const TileOps& emulated512_tile_ops();

} // namespace kernels::masked_grad
