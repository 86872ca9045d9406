// The tiles over AVX2 + FMA. This file alone is compiled with those flags; run only where the processor has them.
#include "../simd/lanes_avx2.h"
#include "tile_simd.h"

namespace kernels::ct {

const TileOps& avx2_tile_ops() { return simd_tile_ops<simd::Avx2>("avx2"); }

} // namespace kernels::ct
