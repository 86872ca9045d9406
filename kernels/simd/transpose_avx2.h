// A transpose in squares of eight by eight, for the files compiled with AVX2.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "transpose.h"

namespace kernels::simd {
namespace { // one copy for each translation unit

inline void transpose_square(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
    __m256 row[8], pair[8];
    for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_ps(in + i * in_stride);
    for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
        pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        row[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
        row[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
        row[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
        row[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(out + i * out_stride, _mm256_permute2f128_ps(row[i], row[i + 4], 0x20));
        _mm256_storeu_ps(out + (i + 4) * out_stride, _mm256_permute2f128_ps(row[i], row[i + 4], 0x31));
    }
}

inline void transpose_avx2(const float* in, int64_t in_stride, int64_t rows, int64_t columns, float* out,
                           int64_t out_stride) {
    const int64_t whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
    for (int64_t row = 0; row < whole_rows; row += 8)
        for (int64_t column = 0; column < whole_columns; column += 8)
            transpose_square(in + row * in_stride + column, in_stride, out + column * out_stride + row, out_stride);
    transpose_plain(in + whole_columns, in_stride, whole_rows, columns - whole_columns, out + whole_columns * out_stride,
                    out_stride);
    transpose_plain(in + whole_rows * in_stride, in_stride, rows - whole_rows, columns, out + whole_rows, out_stride);
}

} // namespace
} // namespace kernels::simd
