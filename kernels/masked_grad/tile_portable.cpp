// The products over four lanes that every processor has.
#include "../simd/lanes_portable.h"
#include "tile_simd.h"

namespace kernels::masked_grad {

const TileOps& portable_tile_ops() {
    static const TileOps ops = simd_tile_ops<simd::Portable>("portable");
    return ops;
}

} // namespace kernels::masked_grad
