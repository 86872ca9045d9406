// The seam between what is the same on every machine (mask.cpp, mask_tiles.cpp: which groups and tiles, threads) and what
// is compiled once per instruction set (mask_*.cpp).
//
// Magnitudes are compared as integers: the bits of |x|, with every NaN mapped to one number above infinity, have the
// order of the magnitudes, and -0 equals 0.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "mask.h"

namespace kernels::nm {

constexpr int32_t kMagnitude = 0x7fffffff, kInfinity = 0x7f800000, kNaN = kInfinity + 1;
namespace { // one copy for each translation unit, which may be compiled for another instruction set

inline int32_t magnitude(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return std::min(bits & kMagnitude, kNaN);
}

} // namespace

constexpr int64_t kShort = 64;   // places of the largest group that is searched in many lanes at once
constexpr int64_t kPanel = 4096; // keys of such lanes that lie in a scratch buffer: with 16 KiB they stay in L1

// Groups of one size. Group g begins at g / per_row * row + g % per_row * size * inner, its places are `inner` apart, and
// `inner` groups lie side by side there: they are called lanes, numbered through from group to group.
struct Groups {
    const float* weight;
    uint8_t* out;
    int64_t count, per_row, row;
    int64_t inner, size, keep; // 0 < keep < size
};

// The legal m x m tiles for m <= 4 in lexicographic order: each row of a tile is one of the patterns.
struct Templates {
    int m, n, patterns, count;
    uint8_t columns[6][3]; // of a pattern: the n columns that it keeps, ascending
    uint8_t rows[90][4];   // of a template: the pattern of each row
};

struct MaskOps {
    // The masks of the lanes first..last - 1: at most lanes_of(groups). scratch: max(kPanel, lanes_of * size) integers.
    void (*select)(const Groups& groups, int64_t first, int64_t last, int32_t* scratch);
    // values [m m][lanes] of `lanes` tiles, a multiple of kTileLanes; best [lanes]: of each the template with the largest
    // sum, the first of equals. Sums run from the left, first within a row, then over the rows.
    void (*best_template)(const Templates& templates, const double* values, int64_t lanes, int64_t* best);
};

constexpr int64_t kTileLanes = 4;

// How many lanes one call of `select` takes.
inline int64_t lanes_of(const Groups& groups) {
    const int64_t wanted = groups.size <= kShort ? 256 : 16, room = groups.size <= kShort ? kPanel : int64_t{1} << 18;
    const int64_t fit = room / groups.size / 16 * 16; // whole vectors
    return fit < 1 ? 1 : fit < wanted ? fit : wanted;
}

const MaskOps& portable_mask_ops();
#if defined(KERNELS_X86)
const MaskOps& avx2_mask_ops();
#endif
const MaskOps& mask_ops(); // of the instruction set in use

} // namespace kernels::nm
