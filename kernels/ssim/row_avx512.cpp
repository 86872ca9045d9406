// The rows over Avx512 lanes. This file alone is compiled with their flags; run only where the processor has them.
#include "../simd/lanes_avx512.h"
#include "row_simd.h"

namespace kernels::ssim {

const RowOps& avx512_row_ops() {
    static const RowOps ops = simd_row_ops<simd::Avx512>("avx512");
    return ops;
}

} // namespace kernels::ssim
