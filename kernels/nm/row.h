// The seam between what is the same on every machine (cpu.cpp: which rows and tokens, threads) and what is compiled once
// per instruction set (row_*.cpp): products of a packed weight with a few tokens, or with a block of many.
//
// A packed weight W [rows, columns] keeps n of every m neighbouring columns. Sixteen rows form a block, in which
//     values [groups][n][16]            float or bfloat16
//     places [groups][n][8] or [16]     of a value within its group: nibbles up to m = 16 (byte i holds row i low, row
//                                       i + 8 high), bytes above
// lie in the order in which a product reads them. Rows behind the last one hold zeros.
//
// Many tokens: tokens lie along the lanes. A panel is some columns of the input, transposed: [columns][width], small
// enough for the first-level cache; each kept weight is broadcast and meets one row of it. There is no gather.
#pragma once
#include <cstdint>

namespace kernels::nm {

constexpr int64_t kBlock = 16;
constexpr int kNibbles = 16; // the largest m whose places are nibbles
constexpr int kFew = 4;      // tokens that `few` takes at once, at most
constexpr int kMostVectors = 8; // of tokens in a panel's row
constexpr int kPermuted = 32; // the largest m that `few` serves by permutation
constexpr int64_t kSlack = 32; // floats that may be read behind an input of `few`

struct Packed {
    const void* values;
    const uint8_t* places;
    int64_t rows, groups;
    int n, m;
    bool half; // values are bfloat16

    int64_t blocks() const { return (rows + kBlock - 1) / kBlock; }
    int64_t columns() const { return groups * m; }
    int64_t slots() const { return groups * n; } // kept values in a row
    int64_t place_bytes() const { return m <= kNibbles ? kBlock / 2 : kBlock; } // of a slot of a block
};

// Kept weights by column instead of by row: those of `column` in panel p are entries starts[p * columns + column] up to
// the next one. A panel spans `panel_rows` rows, `row` counts from its first.
struct Entry {
    float value;
    uint32_t row;
};
struct Lists {
    const Entry* entries;
    const int64_t* starts; // [panels * columns + 1]
};

struct RowOps {
    const char* name;
    int lanes;
    // out [count][16] = x [count][stride] W^T for the rows of one block; count <= kFew. x is followed by kSlack floats.
    void (*few)(const Packed& w, int64_t block, const float* x, int64_t stride, int count, float* out);
    // y [16][vectors * lanes] += the block's rows over groups first..last, times panel [(last - first) m][vectors * lanes]
    void (*many)(const Packed& w, int64_t block, int64_t first, int64_t last, const float* panel, int vectors, float* y);
    // y [count][vectors * lanes] += for each of `count` lists, from `starts` on, value times row of the panel
    void (*listed)(const Entry* entries, const int64_t* starts, int64_t count, const float* panel, int vectors, float* y);
    // out [slots of groups first..last][16] += sum over tokens of dy [16][width] and x [columns][width] at the kept places
    // of one block, width = vectors * lanes; out begins at the first group
    void (*sampled)(const Packed& w, int64_t block, int64_t first, int64_t last, const float* dy, const float* x,
                    int vectors, float* out);
    // out [columns][out_stride] = in [rows][in_stride] transposed
    void (*transpose)(const float* in, int64_t in_stride, int64_t rows, int64_t columns, float* out, int64_t out_stride);
};

// Many tokens in bfloat16, on processors with tiles (simd/tiles_emulated.h): a panel of the weight is spread out with its
// zeros, as the right side of products; tokens are the left side. Saves the reading of zeros, not the arithmetic.
struct MatrixOps {
    void (*begin)(); // what a thread calls before it uses `multiply`, and after
    void (*end)();
    // panel [steps][16 pairs][16 rows][2] = the block's columns from group `first` on, zeros behind those of group last - 1
    void (*spread)(const Packed& w, int64_t block, int64_t first, int64_t last, int64_t steps, uint16_t* panel);
    // sums [32 tokens][32 rows] of `steps` steps of 32 columns, added to what is there unless `fresh`. x and panel begin
    // with sixteen tokens and sixteen rows; the next ones follow x_stride and panel_stride behind.
    void (*multiply)(const uint16_t* x, int64_t x_stride, const uint16_t* panel, int64_t panel_stride, int64_t steps, bool fresh,
                     float* sums);
    // y [tokens][stride] = sums + bias [32], of the first `rows` rows
    void (*finish)(const float* sums, const float* bias, int tokens, int rows, uint16_t* y, int64_t stride);
};
constexpr int64_t kSide = 32; // of sums, and columns of a step

const RowOps& portable_row_ops();
#if defined(KERNELS_X86)
const RowOps& avx2_row_ops();
const RowOps& avx512_row_ops();
#endif
const RowOps& emulated512_row_ops();
#if defined(KERNELS_AMX)
const MatrixOps& amx_matrix_ops();
#endif
const MatrixOps& emulated_amx_matrix_ops();

} // namespace kernels::nm
