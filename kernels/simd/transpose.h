// A transpose in plain C++, for any processor and for the edges of the others.
#pragma once
#include <cstdint>

namespace kernels::simd {
namespace { // one copy for each translation unit

// out [columns][out_stride] = in [rows][in_stride] transposed
inline void transpose_plain(const float* in, int64_t in_stride, int64_t rows, int64_t columns, float* out,
                            int64_t out_stride) {
    for (int64_t column = 0; column < columns; ++column)
        for (int64_t row = 0; row < rows; ++row) out[column * out_stride + row] = in[row * in_stride + column];
}

} // namespace
} // namespace kernels::simd
