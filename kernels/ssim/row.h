// The seam between what is the same on every machine (cpu.cpp: which rows, threads) and what is compiled once per
// instruction set (row_*.cpp): the arithmetic along one row of an image.
//
// With window means m(.) of render x and photograph y, SSIM = a b / (c d) where
//     a = 2 mx my + C1,  b = 2 (m(x y) - mx my) + C2,  c = mx^2 + my^2 + C1,  d = m(x^2) - mx^2 + vy + C2.
// Its sum over all pixels has the gradient  m(g_mx) + 2 x m(g_xx) + y m(g_xy)  with respect to x: g_mx, g_xx and g_xy are
// the derivatives of a pixel's SSIM by mx, m(x^2) and m(x y), and the window, being symmetric, is its own adjoint.
//
// A row is `length` floats long (columns times channels), a buffer `kept(length)`: rounded up to whole vectors, zeros
// behind, so that no loop has a tail.
#pragma once
#include <cstdint>

namespace kernels::ssim {

constexpr int kHalf = 5, kWindow = 2 * kHalf + 1; // pixels
constexpr float kC1 = 0.01f * 0.01f, kC2 = 0.03f * 0.03f;
constexpr int64_t kWidest = 16; // lanes of the widest instruction set
inline int64_t kept(int64_t length) { return (length + kWidest - 1) / kWidest * kWidest; }

struct Row {
    int64_t length, channels;
    const float* weights; // [kHalf + 1] of the window, the middle one first
};

// Floats of a buffer with room for half a window before and behind a row; the row begins at `margin(row)`.
inline int64_t margin(const Row& row) { return kept(kHalf * row.channels); }
inline int64_t padded(const Row& row) { return kept(row.length) + 2 * margin(row); }

struct Derivatives {
    float *by_mean, *by_square, *by_product; // g_mx, g_xx, g_xy, each times the pixel's weight
};

struct Sums {
    double ssim, l1;
};

struct RowOps {
    const char* name;
    // Means over the window of rows [kWindow], each a buffer, into out, a buffer; scratch: padded(row) floats, zeros in
    // its margins.
    void (*mean)(const Row& row, const float* const* rows, float* scratch, float* out);
    // Derivatives at the middle one of the rows of render and photo, and the sums over it. mean, variance, weight:
    // buffers; where a buffer goes on behind the row, variance is 1 and weight 0. scratch: 3 padded(row) floats.
    Sums (*compare)(const Row& row, const float* const* render, const float* const* photo, const float* mean,
                    const float* variance, const float* weight, float* scratch, const Derivatives& out);
    // The gradient of l1 |x - y| - dssim SSIM in one row, from `derivatives`: kWindow rows of each of the three.
    void (*gradient)(const Row& row, const float* const* by_mean, const float* const* by_square,
                     const float* const* by_product, const float* render, const float* photo, float l1, float dssim,
                     float* scratch, float* out);
};

const RowOps& portable_row_ops();
#if defined(KERNELS_X86)
const RowOps& avx2_row_ops();
const RowOps& avx512_row_ops();
#endif
const RowOps& emulated512_row_ops();

} // namespace kernels::ssim
