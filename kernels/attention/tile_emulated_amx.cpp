// Attention over emulated tiles, which compute what AMX does on any machine, slowly. For tests.
#include "../simd/tiles_emulated.h"
#include "tile_matrix.h"

namespace kernels::attention {

const MatrixOps& emulated_amx_matrix_ops() {
    static const MatrixOps ops = Matrix<simd::EmulatedTiles>::ops(emulated512_tile_ops());
    return ops;
}

} // namespace kernels::attention
