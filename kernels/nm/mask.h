// Which weights an N:M pattern keeps, on the CPU. kernels/nm/reference.py is the specification. Masks are bytes, 1 where a
// weight is kept; they do not depend on `threads` (>= 1).
#pragma once
#include <cstdint>

namespace kernels::nm {

// [outer][size][inner], contiguous: groups run along `size`, and `inner` of them lie side by side.
struct Axis {
    int64_t outer, size, inner;
};

// The n largest magnitudes of every m along the axis, of equals the first; a last group of r keeps min(n, r).
void mask(const float* weight, const Axis& axis, int64_t n, int64_t m, uint8_t* out, int threads);

constexpr int64_t kLargestTile = 64; // columns of a tile are bits of a word

// [batch][rows][columns], contiguous; m, at most kLargestTile, divides rows and columns.
struct Matrices {
    int64_t batch, rows, columns;
};

// n in every row and column of each m x m tile, with the largest sum of magnitudes.
void transposable_mask(const float* weight, const Matrices& size, int64_t n, int64_t m, uint8_t* out, int threads);

} // namespace kernels::nm
