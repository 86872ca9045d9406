// The products over sixteen emulated lanes, which compute what AVX-512 does on any machine, slowly. For tests.
#include "../simd/lanes_emulated.h"
#include "row_simd.h"

namespace kernels::nm {

const RowOps& emulated512_row_ops() {
    static const RowOps ops = simd_row_ops<simd::Emulated<16>>("emulated512");
    return ops;
}

} // namespace kernels::nm
