// The 16-lane tiles over emulated lanes: what AVX-512 computes, on any machine, slowly. For tests.
#include "../simd/lanes_emulated.h"
#include "tile_simd.h"

namespace kernels::splat {

const TileOps& emulated512_tile_ops() {
    static const TileOps ops = simd_tile_ops<simd::Emulated<16>>("emulated512");
    return ops;
}

} // namespace kernels::splat
