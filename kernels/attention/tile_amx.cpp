// Attention over tiles of AMX. This file alone is compiled with their flags; run only where the processor has them.
#include "../simd/tiles_amx.h"
#include "tile_matrix.h"

namespace kernels::attention {

const MatrixOps& amx_matrix_ops() {
    static const MatrixOps ops = Matrix<simd::Amx>::ops(avx512_tile_ops());
    return ops;
}

} // namespace kernels::attention
