// The products over sixteen emulated lanes, which compute what AVX-512 does on any machine, slowly. For tests.
#include "../simd/lanes_emulated.h"
#include "tile_simd.h"

namespace kernels::masked_grad {

const TileOps& emulated512_tile_ops() {
    static const TileOps ops = simd_tile_ops<simd::Emulated<16>>("emulated512");
    return ops;
}

} // namespace kernels::masked_grad
