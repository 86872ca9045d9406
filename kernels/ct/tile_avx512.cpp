// The tiles over AVX-512 F, DQ, VL, BW. This file alone is compiled with those flags; run only where the processor has
// them.
#include "../simd/lanes_avx512.h"
#include "tile_simd.h"

namespace kernels::ct {

const TileOps& avx512_tile_ops() { return simd_tile_ops<simd::Avx512>("avx512"); }

} // namespace kernels::ct
