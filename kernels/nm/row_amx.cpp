// The products over tiles of AMX. This file alone is compiled with their flags; run only where the processor has them.
#include "../simd/tiles_amx.h"
#include "row_matrix.h"

namespace kernels::nm {

const MatrixOps& amx_matrix_ops() {
    static const MatrixOps ops = Matrix<simd::Amx>::ops();
    return ops;
}

} // namespace kernels::nm
