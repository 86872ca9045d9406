// The products over emulated tiles, which compute what AMX does on any machine, slowly. For tests.
#include "../simd/tiles_emulated.h"
#include "row_matrix.h"

namespace kernels::nm {

const MatrixOps& emulated_amx_matrix_ops() {
    static const MatrixOps ops = Matrix<simd::EmulatedTiles>::ops();
    return ops;
}

} // namespace kernels::nm
