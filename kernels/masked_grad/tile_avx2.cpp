// The products over Avx2 lanes. This file alone is compiled with their flags; run only where the processor has them.
#include "../simd/lanes_avx2.h"
#include "../simd/transpose_avx2.h"
#include "tile_simd.h"

namespace kernels::masked_grad {

const TileOps& avx2_tile_ops() {
    static const TileOps ops = [] {
        TileOps ops = simd_tile_ops<simd::Avx2>("avx2");
        ops.transpose = simd::transpose_avx2;
        return ops;
    }();
    return ops;
}

} // namespace kernels::masked_grad
