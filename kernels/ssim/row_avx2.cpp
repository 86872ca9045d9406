// The rows over Avx2 lanes. This file alone is compiled with their flags; run only where the processor has them.
#include "../simd/lanes_avx2.h"
#include "row_simd.h"

namespace kernels::ssim {

const RowOps& avx2_row_ops() {
    static const RowOps ops = simd_row_ops<simd::Avx2>("avx2");
    return ops;
}

} // namespace kernels::ssim
