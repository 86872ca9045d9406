// The 16-lane tiles in plain C++: the logic of tile_avx512.cpp on any machine, for tests. Slower than portable.
#include "../simd/lanes_emulated.h"
#include "tile_simd.h"

namespace kernels::ct {

const TileOps& emulated512_tile_ops() { return simd_tile_ops<simd::Emulated<16>>("emulated512"); }

} // namespace kernels::ct
