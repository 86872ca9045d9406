// Attention in the compiler's vector extension, for any machine.
#include "../simd/lanes_portable.h"
#include "tile_simd.h"

namespace kernels::attention {

const TileOps& portable_tile_ops() {
    static const TileOps ops = Tile<simd::Portable, 2>::ops("portable");
    return ops;
}

} // namespace kernels::attention
