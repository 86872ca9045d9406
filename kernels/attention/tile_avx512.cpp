// Attention over Avx512 lanes. This file alone is compiled with their flags; run only where the processor has them.
#include "../simd/lanes_avx512.h"
#include "tile_simd.h"

namespace kernels::attention {

const TileOps& avx512_tile_ops() {
    static const TileOps ops = Tile<simd::Avx512, 4>::ops("avx512");
    return ops;
}

} // namespace kernels::attention
