// The products over Avx2 lanes. This file alone is compiled with their flags; run only where the processor has them.
#include "../simd/lanes_avx2.h"
#include "../simd/transpose_avx2.h"
#include "row_simd.h"

namespace kernels::nm {

const RowOps& avx2_row_ops() {
    static const RowOps ops = [] {
        RowOps ops = simd_row_ops<simd::Avx2>("avx2");
        ops.transpose = simd::transpose_avx2;
        return ops;
    }();
    return ops;
}

} // namespace kernels::nm
