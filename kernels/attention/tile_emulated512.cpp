// Attention over sixteen emulated lanes, which compute what AVX-512 does on any machine, slowly. For tests.
#include "../simd/lanes_emulated.h"
#include "tile_simd.h"

namespace kernels::attention {

const TileOps& emulated512_tile_ops() {
    static const TileOps ops = Tile<simd::Emulated<16>, 4>::ops("emulated512");
    return ops;
}

} // namespace kernels::attention
