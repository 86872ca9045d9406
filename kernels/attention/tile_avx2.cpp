// Attention over Avx2 lanes. This file alone is compiled with their flags; run only where the processor has them.
#include "../simd/lanes_avx2.h"
#include "tile_simd.h"

namespace kernels::attention {

const TileOps& avx2_tile_ops() {
    static const TileOps ops = Tile<simd::Avx2, 2>::ops("avx2");
    return ops;
}

} // namespace kernels::attention
